/**
 * What is done to one server while it serves: crews of clients and an operator, and the quiet moments between them.
 *
 * Everybody has random numbers of their own. A client that goes in the middle of a request is followed by another one;
 * what it had asked for is in doubt until the next quiet moment. The operator turns knobs, and sees that what gives up
 * pages is refused while there are users.
 */
import { connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import type { StatsNode } from '@tmem/core'
import { Random } from '@tmem/simulator/unstable'
import { type Change, type DeviceModel, type Left, pageSectors, sectorBytes, type Wrong } from './model.ts'
import type { ServerProcess } from './process.ts'
import { FileWay, Gone, NbdWay, Refused, type Way } from './ways.ts'

/** Asks the server at a control socket; rejects with the reason where it refuses. */
export type Ask = (
  control: string,
  request: { readonly do: string; readonly [name: string]: string },
) => Promise<unknown>

/** What may be wrong: bytes; something that grew; an answer; a start or an end. */
export type Trouble = 'wrong bytes' | 'growth' | 'answer' | 'server'

/** Something is not as it has to be. */
export class Found extends Error {
  readonly kind: Trouble

  constructor(kind: Trouble, message: string) {
    super(message)
    this.kind = kind
  }
}

/** A device of all servers of a soak. */
export interface Device {
  readonly model: DeviceModel
  /** What a kill leaves. */
  readonly left: Left
  readonly image: string | undefined
  readonly maxPages: number
  /** Size in bytes that was asked for and not acknowledged yet. */
  resizing: number | undefined
}

/** The stack of all devices of a server. */
export interface Stack {
  /** `FOLDER` is the soak's. */
  readonly text: string
  /** It ends in a file. */
  readonly waits: boolean
  readonly recompresses: boolean
}

/** How often what was done. */
export interface Counts {
  /** Servers, how they ended, and those that refused to start because something was lost, as they have to. */
  lives: number
  kills: number
  terminations: number
  refusedStarts: number
  /** Requests of clients that were answered. */
  reads: number
  writes: number
  trims: number
  zeroes: number
  flushes: number
  /** Clients that went in the middle of a request. */
  vanished: number
  /**
   * Knobs that were turned, among them sizes and resets; resets and smaller sizes that were refused because of users.
   */
  knobs: number
  resizes: number
  resets: number
  refusedKnobs: number
  /** Servers with a mount. */
  mounts: number
  quiets: number
  comparedBytes: number
  /** Largest growth of a server's memory between quiet moments, beside what pages take. */
  mostGrowthBytes: number
}

export const noCounts = (): Counts => ({
  lives: 0,
  kills: 0,
  terminations: 0,
  refusedStarts: 0,
  reads: 0,
  writes: 0,
  trims: 0,
  zeroes: 0,
  flushes: 0,
  vanished: 0,
  knobs: 0,
  resizes: 0,
  resets: 0,
  refusedKnobs: 0,
  mounts: 0,
  quiets: 0,
  comparedBytes: 0,
  mostGrowthBytes: 0,
})

/** Where the server is, and what it serves. */
export interface Surroundings {
  readonly socket: string
  readonly control: string
  readonly mount: string | undefined
  readonly stack: Stack
  note(line: string): void
}

const pageBytes = 4096
/** Memory may move by so much between quiet moments: the runtime's own heap does. */
const growthBytes = 64 * 2 ** 20
/** Quiet moments from whose largest figure growth is counted. */
const quietsToSettle = 2
/** Compared at a time, and how many reads of that are under way. */
const pieceBytes = 2 ** 18
const piecesUnderWay = 4
/** Clients, and what each of them has under way, at most. */
const maxClients = 6
const maxLanes = 6
/** Milliseconds in which a server must have noticed that its clients are gone. */
const goneMs = 10_000

/** A client that is there. */
interface Member {
  readonly device: Device
  readonly way: Way
  /** It has gone in the middle of something. */
  hasVanished: boolean
  isOver: boolean
}

/** What a client does, by weight. */
const works = ['read', 'write', 'trim', 'zero', 'flush', 'vanish'] as const
const weights: readonly number[] = Object.freeze([420, 430, 50, 40, 59, 1])

export class Life {
  /** What fails from now on fails because the server ends. */
  isEnding = false
  readonly #server: ServerProcess
  readonly #devices: readonly Device[]
  readonly #ask: Ask
  readonly #counts: Counts
  readonly #there: Surroundings
  readonly #members = new Set<Member>()
  #crew: { isOver: boolean; readonly doing: Promise<void>[] } = { isOver: true, doing: [] }
  #failure: Error | undefined
  #quiets = 0
  #descriptors = 0
  #restingBytes = 0

  constructor(server: ServerProcess, devices: readonly Device[], ask: Ask, counts: Counts, there: Surroundings) {
    this.#server = server
    this.#devices = devices
    this.#ask = ask
    this.#counts = counts
    this.#there = there
  }

  /** A crew begins; resolves when all of it is there. */
  async begin(random: Random): Promise<void> {
    const crew = { isOver: false, doing: [] as Promise<void>[] }
    this.#crew = crew
    const { mount } = this.#there
    const numbers = (): Random => new Random(random.word(), random.word())
    const begun: Promise<void>[] = []
    for (let n = random.from(2, maxClients); n > 0; n--) {
      const device = random.of(this.#devices)
      const path = mount === undefined || random.chance(650) ? undefined : join(mount, device.model.name)
      const [lanes, own] = [random.from(1, maxLanes), numbers()]
      begun.push(
        new Promise((isThere) => {
          crew.doing.push(this.#caught(this.#client(crew, device, path, lanes, own, isThere)).finally(isThere))
        }),
      )
    }
    await Promise.all(begun)
    crew.doing.push(this.#caught(this.#operator(crew, numbers())))
  }

  /** Lets them go on for a while. Throws what they have found. */
  async pass(ms: number): Promise<void> {
    await setTimeout(ms)
    if (this.#server.hasEnded && !this.isEnding)
      this.#failure ??= new Found('server', `the server has ended by itself: ${this.#server.notes.join('; ')}`)
    if (this.#failure !== undefined) throw this.#failure
  }

  /** Whether a client has the device open. */
  hasUsers(device: Device): boolean {
    return [...this.#members].some((member) => member.device === device)
  }

  /** Files of the mount are closed: with one open the server must not end, and says so. */
  async endFiles(): Promise<void> {
    const files = [...this.#members].filter(({ way }) => way.kind === 'file')
    if (files.length > 0) {
      this.#server.ask()
      await this.#until('it says nothing of open files after SIGTERM', () =>
        this.#server.notes.some((line) => line.includes('not stopped')),
      )
    }
    for (const member of files) member.isOver = true
    await this.#until('files are not closed', () => files.every((member) => !this.#members.has(member)))
  }

  /** The crew ends. Throws what it has found. */
  async dismiss(): Promise<void> {
    this.#crew.isOver = true
    await Promise.all(this.#crew.doing)
    if (this.#failure !== undefined) throw this.#failure
  }

  /** Nobody has a device open: looks at everything, then gives some of it up. */
  async quiet(random: Random): Promise<void> {
    await this.dismiss()
    for (const { model } of this.#devices) {
      let users = ''
      await this.#until(
        () => `${model.name} is open to ${users} when nobody has it open`,
        async () => {
          users = JSON.stringify(await this.#asked({ do: 'users', device: model.name }))
          return users === '{"clients":0,"opens":0}'
        },
      )
      model.settling()
    }
    await this.settle(false, this.#there.mount !== undefined && random.chance(300))
    await this.#watch()
    for (const device of this.#devices) await this.#giveUp(device, random)
  }

  /**
   * Reads all of all devices and compares it. `lasts`: what is there is what a server before has left.
   */
  async settle(lasts: boolean, throughMount = false): Promise<void> {
    for (const { model } of this.#devices) {
      const way = throughMount
        ? await FileWay.open(join(this.#there.mount!, model.name))
        : await NbdWay.open(this.#there.socket, model.name)
      try {
        for (let at = 0; at < model.sizeBytes; at += piecesUnderWay * pieceBytes) {
          const places = Array.from({ length: piecesUnderWay }, (_, n) => at + n * pieceBytes)
          const pieces = await Promise.all(
            places
              .filter((place) => place < model.sizeBytes)
              .map(async (place) => {
                const bytes = await way.read(place, Math.min(pieceBytes, model.sizeBytes - place))
                return { place, bytes }
              }),
          )
          for (const { place, bytes } of pieces) {
            this.#judge(
              model.settle(place / sectorBytes, bytes, lasts),
              lasts ? 'after a start' : 'when nobody is there',
            )
            this.#counts.comparedBytes += bytes.length
          }
        }
      } finally {
        await way.close()
      }
    }
  }

  #judge(wrong: Wrong | undefined, when: string): void {
    if (wrong !== undefined) throw new Found('wrong bytes', `${wrong.message} (${when})`)
  }

  /** Descriptors, memory, statistics of a server that nobody uses. */
  async #watch(): Promise<void> {
    const { notes } = this.#server
    const { devices } = (await this.#asked({ do: 'stats' })) as { devices: readonly StatsNode[] }
    let usedBytes = 0
    for (const [n, { model }] of this.#devices.entries()) {
      const { counters, children } = devices[n]!
      usedBytes += counters['mem_used_total']!
      const of = (name: string): Readonly<Record<string, number>> =>
        children.find((child) => child.name === name)?.counters ?? {}
      const { slots, empty, lost } = of('slots')
      const { least, most } = model.pages()
      const held = slots! - empty!
      const wrong = [
        ...(held >= least && held <= most ? [] : [`${held} pages held, where there are ${least} to ${most}`]),
        ...(counters['disksize'] === model.sizeBytes ? [] : [`disksize ${counters['disksize']}`]),
        ...(lost === 0 ? [] : [`${lost} pages lost`]),
        ...['failed_reads', 'failed_writes'].flatMap((name) =>
          counters[name] === 0 ? [] : [`${counters[name]} ${name}`],
        ),
        ...((of('snapshot')['failures'] ?? 0) === 0 ? [] : [`${of('snapshot')['failures']} failures of the image`]),
      ]
      if (wrong.length > 0)
        throw new Found('growth', `statistics of ${model.name}: ${wrong.join(', ')}; ${notes.join('; ')}`)
    }
    this.#counts.quiets++
    this.#quiets++
    const restingBytes = this.#server.residentBytes - usedBytes
    if (this.#quiets <= quietsToSettle) {
      this.#restingBytes = Math.max(this.#restingBytes, restingBytes)
      this.#descriptors = Math.max(this.#descriptors, this.#server.descriptors)
      return
    }
    const grownBytes = restingBytes - this.#restingBytes
    this.#counts.mostGrowthBytes = Math.max(this.#counts.mostGrowthBytes, grownBytes)
    if (grownBytes > growthBytes)
      throw new Found(
        'growth',
        `resident memory beside pages is ${inMebibytes(restingBytes)} with nobody there, ${inMebibytes(grownBytes)} more than in its first quiet moments`,
      )
    await this.#until(
      () => `${this.#server.descriptors} descriptors are open with nobody there, ${this.#descriptors} were at first`,
      () => this.#server.descriptors <= this.#descriptors,
    )
  }

  /** What is done only while nobody is there. */
  async #giveUp(device: Device, random: Random): Promise<void> {
    const { model, left } = device
    if (random.chance(150)) {
      const change = model.begin(0, model.sectors, true)
      await this.#knob(device, 'reset', '1')
      model.done(change, left === 'acknowledged')
      this.#counts.resets++
    }
    if (random.chance(250))
      await this.#resize(device, random.from(Math.floor(model.sizeBytes / 2 / pageBytes), device.maxPages))
  }

  async #resize(device: Device, pages: number): Promise<void> {
    const sizeBytes = pages * pageBytes
    device.resizing = sizeBytes
    await this.#knob(device, 'disksize', `${sizeBytes}`)
    device.model.resize(sizeBytes)
    device.resizing = undefined
    this.#counts.resizes++
  }

  async #knob({ model }: Device, name: string, value: string): Promise<void> {
    this.#there.note(`${model.name}: ${name} ${value}`)
    await this.#asked({ do: 'knobs', device: model.name, name, value })
    this.#counts.knobs++
  }

  /** An answer; a refusal is a failure. */
  async #asked(request: { readonly do: string; readonly [name: string]: string }): Promise<unknown> {
    try {
      return await this.#ask(this.#there.control, request)
    } catch (error) {
      if (this.isEnding) throw new Gone('the server ends')
      throw new Found('answer', `${JSON.stringify(request)}: ${(error as Error).message}`)
    }
  }

  /** Resolves once it is so; rejects when that takes too long. */
  async #until(otherwise: string | (() => string), isSo: () => boolean | Promise<boolean>): Promise<void> {
    for (const end = performance.now() + goneMs; !(await isSo()); await setTimeout(20))
      if (performance.now() > end) throw new Found('growth', typeof otherwise === 'string' ? otherwise : otherwise())
  }

  /** The first thing that is found is what counts. */
  async #caught(doing: Promise<void>): Promise<void> {
    try {
      await doing
    } catch (error) {
      if (error instanceof Gone && this.isEnding) return
      this.#failure ??=
        error instanceof Gone ? new Found('server', `a client was cut off: ${error.message}`) : (error as Error)
    }
  }

  /** A client, and whoever follows when it vanishes. */
  async #client(
    crew: { readonly isOver: boolean },
    device: Device,
    path: string | undefined,
    lanes: number,
    random: Random,
    isThere: () => void,
  ): Promise<void> {
    while (!crew.isOver && !this.isEnding) {
      const way =
        path === undefined ? await NbdWay.open(this.#there.socket, device.model.name) : await FileWay.open(path)
      const member: Member = { device, way, hasVanished: false, isOver: false }
      this.#members.add(member)
      isThere()
      try {
        await Promise.all(
          Array.from({ length: lanes }, () => this.#lane(crew, member, new Random(random.word(), random.word()))),
        )
      } finally {
        await way.close()
        this.#members.delete(member)
      }
      if (!member.hasVanished) return
    }
  }

  async #lane(crew: { readonly isOver: boolean }, member: Member, random: Random): Promise<void> {
    while (!crew.isOver && !member.isOver && !member.hasVanished && this.#failure === undefined) {
      try {
        await this.#work(member, random)
      } catch (error) {
        if (error instanceof Gone && (member.hasVanished || this.isEnding)) return
        if (error instanceof Refused && this.isEnding) return
        throw error instanceof Refused
          ? new Found('answer', `${member.device.model.name} over ${member.way.kind}: ${error.message}`)
          : error
      }
    }
  }

  /** One request, and what the model has to say to its answer. */
  async #work(member: Member, random: Random): Promise<void> {
    const { device, way } = member
    const { model } = device
    const counts = this.#counts
    const work = works[random.weighted(weights)]!
    if (work === 'vanish' && way.vanish !== undefined) {
      member.hasVanished = true
      counts.vanished++
      this.#there.note(`a client of ${model.name} vanishes`)
      way.vanish()
    } else if (work === 'flush') {
      const flush = model.beginFlush()
      await way.flush()
      model.flushed(flush)
      counts.flushes++
    } else if (work === 'trim' && way.trim !== undefined) {
      const change = freeChange(model, random, true)
      if (change === undefined) return
      await this.#changed(device, change, false, (at, length) => way.trim!(at, length))
      counts.trims++
    } else if (work === 'zero' && way.zero !== undefined) {
      const change = freeChange(model, random, true)
      if (change === undefined) return
      await this.#changed(device, change, false, (at, length) => way.zero!(at, length))
      counts.zeroes++
    } else if (work === 'read') {
      const [from, to] = rangeOf(model, random)
      const reading = model.beginRead(from, to)
      let bytes: Uint8Array | undefined
      try {
        bytes = await way.read(from * sectorBytes, (to - from) * sectorBytes)
      } finally {
        this.#judge(model.endRead(reading, bytes), `over ${way.kind}`)
      }
      counts.reads++
      counts.comparedBytes += bytes.length
    } else {
      const change = freeChange(model, random, false)
      if (change === undefined) return
      const lasts = random.chance(20)
      await this.#changed(device, change, lasts, (at) => way.write(at, model.bytesOf(change), lasts))
      counts.writes++
    }
  }

  async #changed(
    { model, left }: Device,
    change: Change,
    lasts: boolean,
    act: (at: number, length: number) => Promise<void>,
  ): Promise<void> {
    try {
      await act(change.from * sectorBytes, (change.to - change.from) * sectorBytes)
    } catch (error) {
      model.abandon(change)
      throw error
    }
    model.done(change, lasts || left === 'acknowledged')
  }

  async #operator(crew: { readonly isOver: boolean }, random: Random): Promise<void> {
    const { stack, socket } = this.#there
    const knobs: (readonly [string, string])[] = [
      ['idle', 'all'],
      ['idle', '1'],
      ['compact', '1'],
      ['mem_used_max', '0'],
    ]
    if (stack.waits)
      knobs.push(
        ['writeback', 'huge'],
        ['writeback', 'idle'],
        ['writeback', 'page_indexes=0-500'],
        ['mem_limit', '2MiB'],
        ['mem_limit', '0'],
        ['writeback_limit', '100'],
        ['writeback_limit', 'off'],
      )
    if (stack.recompresses) knobs.push(['recompress', 'type=idle max_pages=200'], ['recompress', 'type=huge'])
    while (!crew.isOver && !this.isEnding) {
      const device = random.of(this.#devices)
      const { model } = device
      const what = random.below(100)
      if (what < 70) await this.#knob(device, ...random.of(knobs))
      else if (what < 80) {
        const pages = model.sizeBytes / pageBytes
        if (pages < device.maxPages) await this.#resize(device, Math.min(device.maxPages, pages + random.from(1, 300)))
      } else if (what < 90) await this.#refused(device, random)
      else if (what < 95) await this.#asked({ do: 'stats' })
      else await knock(socket, random)
      await setTimeout(random.below(60))
    }
  }

  /** What gives up pages is refused to who asks while there is a user. */
  async #refused({ model }: Device, random: Random): Promise<void> {
    const way = await NbdWay.open(this.#there.socket, model.name)
    const [name, value] = random.chance(500) ? ['reset', '1'] : ['disksize', `${pageBytes}`]
    try {
      await this.#ask(this.#there.control, { do: 'knobs', device: model.name, name: name!, value: value! })
    } catch (error) {
      if (this.isEnding) return
      if (!/in use/.test((error as Error).message))
        throw new Found('answer', `${name} of ${model.name}, which is in use: ${(error as Error).message}`)
      this.#counts.refusedKnobs++
      return
    } finally {
      await way.close()
    }
    throw new Found('answer', `${name} of ${model.name} was done, with a client connected`)
  }
}

/** A range of sectors: a part of a page, some pages, many; mostly in the first quarter of the device. */
function rangeOf({ sectors }: DeviceModel, random: Random): readonly [number, number] {
  const place = random.chance(700) ? sectors / 4 : sectors
  const kind = random.below(100)
  if (kind < 15) {
    const from = random.below(place - pageSectors)
    return [from, from + random.from(1, pageSectors)]
  }
  if (kind < 30) {
    const length = random.from(1, 8 * pageSectors)
    const from = random.below(place - length)
    return [from, from + length]
  }
  const pages = kind < 95 ? random.from(1, 16) : random.from(64, 256)
  const from = random.below(place / pageSectors - pages) * pageSectors
  return [from, from + pages * pageSectors]
}

/** A change where nothing else is under way, if that is found. */
function freeChange(model: DeviceModel, random: Random, isZero: boolean): Change | undefined {
  for (let tries = 0; tries < 4; tries++) {
    const [from, to] = rangeOf(model, random)
    if (model.isFree(from, to)) return model.begin(from, to, isZero)
  }
  return undefined
}

/** Somebody connects who is no client, or goes before he is one. */
async function knock(path: string, random: Random): Promise<void> {
  const socket = connect(path)
  // Whatever becomes of it: the next client of ours finds a server that serves.
  const closed = new Promise((resolve) => socket.once('close', resolve).on('error', resolve))
  const bytes = Buffer.alloc(random.of([0, 3, 4, 20, 4000]), random.word() & 255)
  socket.write(bytes)
  await setTimeout(random.below(30))
  socket.destroy()
  await closed
}

const inMebibytes = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)} MiB`
