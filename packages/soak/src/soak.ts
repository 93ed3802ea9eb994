/**
 * A soak: servers of the program under test, one after the other in one folder, clients that do all that clients may,
 * and a model that knows what must be read back.
 *
 * A server has one life: it is started over what the one before has left, read as a whole, used by a crew of clients
 * for some seconds, and ends: killed under load, or asked to. Between crews there are quiet moments, in which nobody
 * has a device open: everything is read and compared, descriptors, memory and statistics are looked at, and what gives
 * up pages is done (while there are users it has to be refused).
 *
 * The seed decides what everybody does, and for how long; in which order the requests of several clients meet is the
 * machine's. So a run with the same seed tries the same things, and need not end the same way.
 *
 * Devices: one without an image (a kill leaves nothing, and the next server must refuse until that is consented to),
 * one with an image (what was flushed is there), one whose image is written through (what was acknowledged is there).
 */
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, realpathSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { checkOptions } from '@tmem/core'
import { Random } from '@tmem/simulator/unstable'
import { type Ask, type Counts, type Device, Found, Life, noCounts, type Stack, type Trouble } from './life.ts'
import { DeviceModel, type Left } from './model.ts'
import { ServerFailure, ServerProcess } from './process.ts'

/** What is run. */
export interface SoakOptions {
  /** The program and its first arguments: what follows them begins with `serve`. */
  readonly program: readonly string[]
  /** Asks the server at a control socket; rejects with the reason where it refuses. */
  readonly ask: Ask
  /** How long. The last life is brought to its end. */
  readonly seconds: number
  /** 0 to 2^32-1. */
  readonly seed: number
  /** Where its folder is made (default: the folder for temporary files). */
  readonly folder?: string
  /** Ends it early; it still reports. */
  readonly signal?: AbortSignal
  /** Called about every second. */
  readonly onProgress?: (report: SoakReport) => void
}

/** What went wrong. */
export interface SoakFailure {
  readonly kind: Trouble
  readonly message: string
  /** Number of the server, from 0. */
  readonly life: number
  readonly stack: string
  /** What was done last, and what the server said last. */
  readonly detail: readonly string[]
}

/** What was done, and what came of it. */
export interface SoakReport extends Counts {
  readonly seed: number
  readonly seconds: number
  /** Why no server had a mount, if so. */
  readonly noMount?: string
  readonly failure?: SoakFailure
}

const mebibyte = 2 ** 20
const maxBytes = 24 * mebibyte
const logLines = 30

const stacks: readonly Stack[] = Object.freeze([
  { text: 'zcache(limit=4MiB) > frontswap(file="FOLDER/{name}.swap",size={size})', waits: true, recompresses: false },
  {
    text: 'zcache(limit=3MiB,recompress=deflate) > frontswap(file="FOLDER/{name}.swap",size={size})',
    waits: true,
    recompresses: true,
  },
  {
    text: 'memory(limit=3MiB) > zcache(limit=3MiB) > frontswap(file="FOLDER/{name}.swap",size={size})',
    waits: true,
    recompresses: false,
  },
  { text: 'memory(limit=40MiB)', waits: false, recompresses: false },
])

/** Runs a soak. Resolves with a report, also of a failure, or when it is ended early; nothing is left behind. */
export async function soak(options: SoakOptions): Promise<SoakReport> {
  checkOptions('soak', options, {
    program: 'list',
    ask: 'function',
    seconds: 'number',
    seed: 'number',
    folder: 'text?',
    signal: 'object?',
    onProgress: 'function?',
  })
  return new Soak(options).run()
}

class Soak {
  readonly #options: SoakOptions
  readonly #folder: string
  readonly #mount: string
  readonly #devices: readonly Device[]
  readonly #began = performance.now()
  readonly #counts: Counts = noCounts()
  readonly #noMount: string | undefined
  readonly #log: string[] = []
  #server: ServerProcess | undefined
  #stack = ''
  /** The server before has lost something that the next one must not pass over. */
  #mustRefuse = false

  constructor(options: SoakOptions) {
    this.#options = options
    // As the kernel calls it, which lists the mount.
    this.#folder = realpathSync(mkdtempSync(join(options.folder ?? tmpdir(), 'tmem-soak-')))
    const device = (name: string, number: number, left: Left): Device => ({
      model: new DeviceModel(name, number, 16 * mebibyte, maxBytes),
      left,
      image: left === 'nothing' ? undefined : join(this.#folder, `${name}.img`),
      maxPages: maxBytes / 4096,
      resizing: undefined,
    })
    this.#devices = [device('plain', 0, 'nothing'), device('image', 1, 'flushed'), device('through', 2, 'acknowledged')]
    this.#noMount = whyNoMount()
    this.#mount = join(this.#folder, 'mount')
    mkdirSync(this.#mount)
  }

  async run(): Promise<SoakReport> {
    const { seconds, signal, onProgress, seed } = this.#options
    const isOver = (): boolean => signal?.aborted === true || this.#elapsed() >= seconds
    const progress = setInterval(() => onProgress?.(this.#report()), 1000)
    // Where the process is made to end at once.
    const atExit = (): void => this.#sweep()
    process.once('exit', atExit)
    let failure: SoakFailure | undefined
    try {
      do await this.#life(new Random(seed, this.#counts.lives), isOver)
      while (!isOver())
    } catch (error) {
      if (!(error instanceof Found || error instanceof ServerFailure)) throw error
      failure = {
        kind: error instanceof Found ? error.kind : 'server',
        message: error.message,
        life: this.#counts.lives,
        stack: this.#stack,
        detail: [...this.#log, ...(this.#server?.notes ?? [])],
      }
    } finally {
      clearInterval(progress)
      process.off('exit', atExit)
      if (this.#server?.hasEnded === false) await this.#server.kill()
      this.#sweep()
    }
    return this.#report(failure)
  }

  #elapsed(): number {
    return (performance.now() - this.#began) / 1000
  }

  #report(failure?: SoakFailure): SoakReport {
    return {
      seed: this.#options.seed,
      seconds: Math.round(this.#elapsed() * 10) / 10,
      ...this.#counts,
      ...(this.#noMount === undefined ? {} : { noMount: this.#noMount }),
      ...(failure === undefined ? {} : { failure }),
    }
  }

  #note(line: string): void {
    this.#log.push(`${this.#elapsed().toFixed(2)} s: ${line}`)
    if (this.#log.length > logLines) this.#log.shift()
  }

  /** Takes away what is there, whatever it is. */
  #sweep(): void {
    this.#server?.killNow()
    if (isMounted(this.#mount)) spawnSync('umount', ['-l', this.#mount])
    rmSync(this.#folder, { recursive: true, force: true })
  }

  /** One server from its start to its end. */
  async #life(random: Random, isOver: () => boolean): Promise<void> {
    const stack = random.of(stacks)
    const mounts = this.#noMount === undefined && random.chance(600)
    this.#stack = stack.text
    await this.#start(stack.text, mounts)
    const life = new Life(this.#server!, this.#devices, this.#options.ask, this.#counts, {
      socket: join(this.#folder, 'nbd.sock'),
      control: join(this.#folder, 'control.sock'),
      mount: mounts ? this.#mount : undefined,
      stack,
      note: (line) => this.#note(line),
    })
    await life.settle(true)
    const end = this.#elapsed() + this.#lengthOf(random)
    const over = (): boolean => isOver() || this.#elapsed() >= end
    for (;;) {
      const crewEnd = this.#elapsed() + 0.5 + random.below(30) / 10
      await life.begin(random)
      while (!over() && this.#elapsed() < crewEnd) await life.pass(50 + random.below(150))
      if (over()) break
      await life.quiet(random)
    }
    this.#counts.lives++
    if (isOver()) await this.#endQuietly(life, random, stack)
    else if (random.chance(650)) await this.#kill(life)
    else await this.#end(life, random, stack)
  }

  /** Seconds: mostly a few, as ends are what is tried; now and then so long that something could grow. */
  #lengthOf(random: Random): number {
    return random.chance(120) ? Math.min(120, this.#options.seconds / 4) : random.of([0.3, 1, 2, 3, 5, 8])
  }

  async #start(stack: string, mounts: boolean): Promise<void> {
    const words = [
      ...this.#options.program,
      'serve',
      '--stack',
      stack.replaceAll('FOLDER', this.#folder),
      '--nbd',
      `unix:${join(this.#folder, 'nbd.sock')}`,
      '--control',
      join(this.#folder, 'control.sock'),
      '--json',
      '--log',
      'text',
      '--log-level',
      'warn',
    ]
    for (const device of this.#devices) {
      const { model, image, left } = device
      if (image !== undefined) adoptSize(device, image)
      const kept = image === undefined ? '' : `,snapshot=${image}${left === 'acknowledged' ? ',writethrough' : ''}`
      words.push('--device', `name=${model.name},size=${model.sizeBytes},max=${maxBytes}${kept}`)
    }
    if (mounts) {
      words.push('--fuse', this.#mount)
      this.#counts.mounts++
    } else if (isMounted(this.#mount))
      // What a killed server left is for the next one with a mount to take away; this one has none.
      spawnSync('umount', ['-l', this.#mount])
    if (this.#mustRefuse) {
      const code = await this.#startedWith(words)
      if (code !== 3 || !this.#server!.notes.some((line) => line.includes('--fresh')))
        throw new Found(
          'server',
          `a server that starts over lost pages must refuse with 3 and name --fresh, got ${code}`,
        )
      this.#counts.refusedStarts++
      words.push('--fresh')
    }
    const code = await this.#startedWith(words)
    if (code !== undefined)
      throw new Found('server', `the server does not start: exit code ${code}: ${this.#server!.notes.join('; ')}`)
    this.#mustRefuse = false
    this.#note(`server ${this.#counts.lives} serves${mounts ? ', with a mount' : ''}: ${stack}`)
  }

  #startedWith(words: readonly string[]): Promise<number | null | undefined> {
    this.#server = new ServerProcess(words)
    return this.#server.started()
  }

  async #kill(life: Life): Promise<void> {
    this.#note('kill -9')
    life.isEnding = true
    await this.#server!.kill()
    await life.dismiss()
    this.#counts.kills++
    for (const { model, left } of this.#devices) model.ended(left)
    this.#mustRefuse = true
  }

  /** SIGTERM, with clients connected or without. */
  async #end(life: Life, random: Random, stack: Stack): Promise<void> {
    const connected = random.chance(500)
    if (!connected) return this.#endQuietly(life, random, stack)
    await life.endFiles()
    life.isEnding = true
    this.#note('SIGTERM under load')
    const hasUsers = life.hasUsers(this.#devices[0]!)
    const { most } = this.#devices[0]!.model.pages()
    const code = await this.#server!.terminate()
    await life.dismiss()
    this.#counts.terminations++
    if (code !== 0 && code !== 3) throw new Found('server', `SIGTERM under load: exit code ${code}`)
    if (code === 3 && most === 0) throw new Found('server', 'it says that pages are lost, and held none')
    this.#mustRefuse = code === 3
    this.#note(`it has ended with ${code}${hasUsers ? '' : ', nobody had the device without an image open'}`)
    for (const { model, left } of this.#devices) model.ended(left === 'nothing' ? 'nothing' : 'acknowledged')
  }

  /** SIGTERM when nobody is there: nothing is lost but what no image has, and nothing is left but images. */
  async #endQuietly(life: Life, random: Random, stack: Stack): Promise<void> {
    await life.quiet(random)
    this.#note('SIGTERM')
    life.isEnding = true
    const code = await this.#server!.terminate()
    this.#counts.terminations++
    if (code !== 0) throw new Found('server', `SIGTERM with nobody connected: exit code ${code}`)
    for (const { model, left } of this.#devices) model.ended(left === 'nothing' ? 'nothing' : 'acknowledged')
    const known = this.#devices.flatMap(({ model, image }) => (image === undefined ? [] : [`${model.name}.img`]))
    const left = readdirSync(this.#folder).filter(
      // A stack without a file knows nothing of what a killed server with one has left.
      (name) => name !== 'mount' && !known.includes(name) && (stack.waits || !name.endsWith('.swap')),
    )
    if (left.length > 0) throw new Found('server', `a clean end has left ${left.join(', ')}`)
    if (isMounted(this.#mount)) throw new Found('server', 'a clean end has left the mount')
  }
}

/** A resize that was under way when the server was killed may be done. */
function adoptSize(device: Device, image: string): void {
  const size = statSync(image, { throwIfNoEntry: false })?.size
  if (size !== undefined && size === device.resizing) device.model.resize(size)
  device.resizing = undefined
}

/** Why this machine cannot have a mount; `undefined`: it can. */
function whyNoMount(): string | undefined {
  if (process.getuid?.() !== 0) return 'a mount needs root'
  return existsSync('/dev/fuse') ? undefined : 'a mount needs /dev/fuse'
}

const isMounted = (directory: string): boolean =>
  readFileSync('/proc/self/mountinfo', 'utf8').includes(` ${directory} `)
