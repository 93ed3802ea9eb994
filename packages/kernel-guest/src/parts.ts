/**
 * What a guest is made of: Debian's last kernel with the frontswap hooks (5.10, bullseye), its headers, busybox, and our
 * module, built for that kernel. Packages are downloaded with apt and unpacked into a folder of ours; nothing is
 * installed, and nothing of the system's apt is changed.
 *
 * Invariant: each part appears whole or not at all; several processes may prepare the same folder.
 *
 * The mirror is the one that the system's own apt uses for Debian.
 */
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  accessSync,
  constants,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { checkOptions } from '@tmem/core'
import { findKernel, type Kernel } from '@tmem/guest'

/** What a guest boots. */
export interface GuestParts {
  /** With the modules of its drives, and without ours. */
  readonly kernel: Kernel
  /** Paths of busybox, and of our module. */
  readonly busybox: string
  readonly module: string
}

/** Where they come from. */
export interface PartsOptions {
  /** Folder that they are kept in; it is made. Some 350 MiB. */
  readonly cache: string
  /** Told what is being done, in a few words. */
  readonly onStep?: (what: string) => void
  readonly signal?: AbortSignal
}

/** A program that is missing, or that failed: one line that says what to do. */
export class PartsError extends Error {}

const suite = 'bullseye'
const defaultMirror = 'http://deb.debian.org/debian'
/** Programs, and the packages that have them. */
const programs: Readonly<Record<string, string>> = Object.freeze({
  'qemu-system-x86_64': 'qemu-system-x86',
  setpriv: 'util-linux',
  'apt-get': 'apt',
  'dpkg-deb': 'dpkg',
  make: 'make',
  gcc: 'gcc libc6-dev',
})

/** What a guest needs of this machine and is not there, as one line; `undefined`: nothing. */
export function lacksForGuests(): string | undefined {
  if (process.platform !== 'linux' || process.arch !== 'x64')
    return `a guest runs on Linux on x86-64, and this is ${process.platform} on ${process.arch}`
  const missing = Object.keys(programs).filter((name) => !isProgram(name))
  if (missing.length === 0) return undefined
  const packages = missing.map((name) => programs[name]).join(' ')
  return `${missing.join(', ')} missing; install: apt-get install --no-install-recommends ${packages}`
}

function isProgram(name: string): boolean {
  return (process.env['PATH'] ?? '').split(delimiter).some((folder) => {
    try {
      accessSync(join(folder, name), constants.X_OK)
      return true
    } catch {
      return false
    }
  })
}

/**
 * Prepares what is not there yet: downloads about 45 MiB, unpacks, compiles; a minute the first time. Rejects with
 * `PartsError` when that fails, with the signal's reason when it aborts.
 */
export async function prepareParts(options: PartsOptions): Promise<GuestParts> {
  checkOptions('prepareParts', options, { cache: 'text', onStep: 'function?', signal: 'object?' })
  const lacks = lacksForGuests()
  if (lacks !== undefined) throw new PartsError(lacks)
  return new Preparation(options).run()
}

class Preparation {
  readonly #folder: string
  readonly #onStep: (what: string) => void
  readonly #signal: AbortSignal | undefined

  constructor({ cache, onStep = () => undefined, signal }: PartsOptions) {
    mkdirSync(cache, { recursive: true })
    this.#folder = realpathSync(cache)
    this.#onStep = onStep
    this.#signal = signal
    // The kernel's own makefiles refuse such paths.
    if (/[\s:]/.test(this.#folder))
      throw new PartsError(`${this.#folder} has a space or colon in it, which building a module does not allow`)
  }

  async run(): Promise<GuestParts> {
    const root = join(this.#folder, 'debian')
    await this.#made(root, (target) => this.#unpack(target))
    const kernel = findKernel(root)
    if (kernel === undefined) throw new PartsError(`there is no kernel in ${root}: remove that folder, and try again`)
    const sources = ['tmem_guest.c', 'Kbuild'].map((name) => readFileSync(sourceOf(name)))
    const digest = createHash('sha256').update(Buffer.concat(sources)).update(kernel.release).digest('hex')
    const module = join(this.#folder, `tmem_guest-${digest.slice(0, 16)}.ko`)
    await this.#made(module, (target) => this.#compile(root, kernel.release, target))
    return { kernel, busybox: join(root, 'bin/busybox'), module }
  }

  /** Makes a file or folder under another name first; whoever was as quick has made as good a one. */
  async #made(target: string, make: (scratch: string) => Promise<void>): Promise<void> {
    if (existsSync(target)) return
    const scratch = mkdtempSync(`${target}.`)
    try {
      const whole = join(scratch, 'whole')
      await make(whole)
      try {
        renameSync(whole, target)
      } catch (error) {
        if (!['ENOTEMPTY', 'EEXIST'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error
      }
    } finally {
      rmSync(scratch, { recursive: true, force: true })
    }
  }

  async #unpack(target: string): Promise<void> {
    const apt = join(dirname(target), 'apt')
    const archives = join(dirname(target), 'archives')
    for (const folder of [join(apt, 'lists/partial'), join(apt, 'cache/archives/partial'), archives])
      mkdirSync(folder, { recursive: true })
    writeFileSync(join(apt, 'status'), '')
    this.#onStep('asking which mirror the system uses')
    const mirror = await this.#mirror()
    const security = mirror.replace(/\/debian\/?$/, '/debian-security')
    const suites = [`deb ${mirror} ${suite} main`, `deb ${security} ${suite}-security main`]
    writeFileSync(join(apt, 'sources.list'), `${suites.join('\n')}\n`)
    const settings = Object.entries({
      'Dir::Etc::sourcelist': join(apt, 'sources.list'),
      'Dir::Etc::sourceparts': '-',
      'Dir::State::lists': join(apt, 'lists'),
      'Dir::State::status': join(apt, 'status'),
      'Dir::Cache': join(apt, 'cache'),
      'APT::Architecture': 'amd64',
      // The suite is old: nobody renews its lists any more.
      'Acquire::Check-Valid-Until': 'false',
      'Acquire::Languages': 'none',
      // Else root's downloads are done by a user who may not write here.
      'APT::Sandbox::User': process.getuid?.() === 0 ? 'root' : '',
    }).flatMap(([name, value]) => ['-o', `${name}=${value}`])
    this.#onStep(`reading the lists of ${suite} at ${mirror}`)
    await this.#run('apt-get', [...settings, 'update', '-qq'])
    const shown = async (name: string): Promise<string> =>
      this.#run('apt-cache', [...settings, 'show', '--no-all-versions', name])
    const depends = async (name: string, wanted: RegExp): Promise<string[]> => {
      const line = /^Depends: (.*)$/m.exec(await shown(name))?.[1] ?? ''
      const found = line
        .split(',')
        .map((word) => word.trim().split(' ')[0]!)
        .filter((word) => wanted.test(word))
      if (found.length === 0) throw new PartsError(`the package ${name} of ${suite} depends on nothing like ${wanted}`)
      return found
    }
    const [headers] = await depends('linux-headers-cloud-amd64', /^linux-headers-5\.10\.0-.*-cloud-amd64$/)
    const packages = [
      headers!,
      headers!.replace('headers', 'image'),
      ...(await depends(headers!, /^linux-(headers-.*-common|kbuild-)/)),
      'busybox-static',
    ]
    this.#onStep(`downloading ${packages.join(', ')}`)
    await this.#run('apt-get', [...settings, 'download', '-qq', ...packages], archives)
    mkdirSync(target)
    for (const file of readdirSync(archives)) {
      this.#onStep(`unpacking ${file}`)
      await this.#run('dpkg-deb', ['-x', join(archives, file), target])
    }
    rmSync(archives, { recursive: true })
  }

  /** Where the system's apt finds Debian. */
  async #mirror(): Promise<string> {
    const lines = await this.#run('apt-get', ['indextargets', '--format', '$(ORIGIN) $(SITE)', 'Created-By: Packages'])
    const sites = lines.split('\n').flatMap((line) => /^Debian (\S+\/debian)\/?$/.exec(line)?.[1] ?? [])
    return sites[0] ?? defaultMirror
  }

  async #compile(root: string, release: string, target: string): Promise<void> {
    this.#onStep(`compiling the module for ${release}`)
    const folder = mkdtempSync(join(this.#folder, 'build.'))
    try {
      for (const name of ['tmem_guest.c', 'Kbuild']) copyFileSync(sourceOf(name), join(folder, name))
      // Its makefile names the folders where it would be installed.
      const headers = join(root, 'usr/src', `linux-headers-${release}`)
      const makefile = readFileSync(join(headers, 'Makefile'), 'utf8').replaceAll(' /usr/', ` ${root}/usr/`)
      const own = join(folder, 'Makefile.headers')
      writeFileSync(own, makefile)
      const words = ['-C', headers, '-f', own, `M=${folder}`, 'CC=gcc', 'SKIP_STACK_VALIDATION=1', 'modules']
      await this.#run('make', words)
      copyFileSync(join(folder, 'tmem_guest.ko'), target)
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  }

  /** Runs a program and answers what it printed. Rejects with `PartsError` that has its own last words. */
  #run(program: string, words: readonly string[], cwd?: string): Promise<string> {
    this.#signal?.throwIfAborted()
    return new Promise((resolve, reject) => {
      const child = spawn(program, words, {
        stdio: ['ignore', 'pipe', 'pipe'],
        env: { ...process.env, LC_ALL: 'C' },
        ...(cwd === undefined ? {} : { cwd }),
        ...(this.#signal === undefined ? {} : { signal: this.#signal }),
      })
      let printed = ''
      let complaint = ''
      child.stdout.setEncoding('utf8').on('data', (text: string) => {
        printed += text
      })
      child.stderr.setEncoding('utf8').on('data', (text: string) => {
        complaint += text
      })
      child.once('error', (error) => {
        reject(
          this.#signal?.aborted === true
            ? (this.#signal.reason as Error)
            : new PartsError(`${program}: ${error.message}`),
        )
      })
      child.once('close', (status) => {
        if (status === 0) resolve(printed)
        else reject(new PartsError(`${program} ended with ${status ?? 'a signal'}: ${lastOf(complaint || printed)}`))
      })
    })
  }
}

const lastOf = (text: string): string => text.trim().split('\n').slice(-4).join(' / ')
const sourceOf = (name: string): string => fileURLToPath(new URL(`../src/${name}`, import.meta.url))
