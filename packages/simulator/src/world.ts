/**
 * The world around a stack, simulated: a clock, an order in which transfers complete, a disk, and memory that may run
 * out. All of it is drawn from the seed, nothing from this machine.
 *
 * A transfer begins when it is asked for and ends at a time that is drawn, so later ones overtake it. A part of it is
 * done when it begins and the rest when it ends, so who changes a buffer, or looks at one, before its promise has
 * settled is found out.
 *
 * Faults are honest or lies. An honest one reports an error (nothing or a part was done). A lie does not: what was
 * acknowledged is not there. What a lie has spoilt is noted by the grain of a few bytes, so that a stack may report
 * damage exactly where there is some; also where a place that packs has taken it: what it does not look into is as
 * damaged there.
 *
 * Source: the simulated storage of TigerBeetle and the simulation of FoundationDB, for the idea that one seed decides
 * everything.
 */
import type { Allocator, Place } from '@tmem/core'
import type { SwapFile } from '@tmem/frontswap'
import { type FileCall, type FileFault, MemoryFiles } from '@tmem/page-file'
import type { Random } from './random.ts'

/** What can go wrong. */
export const faultKinds = [
  /** Transfers that take up to a hundred times as long. */
  'late',
  /** A read, write or sync that reports an error; a write may be done in part. */
  'failedRead',
  'failedWrite',
  'failedSync',
  /** Every transfer fails for a while. */
  'outage',
  /** A write of which only the first sectors are done, or none, and which is acknowledged. */
  'torn',
  'lost',
  /** A bit that flips on the disk; a read that answers from somewhere else, once. */
  'rotten',
  'misread',
  /** A request for memory that is refused. */
  'allocation',
  /** A bit that flips on its way out of memory. */
  'memoryRot',
  /** The process ends: with a close, or without one. */
  'restart',
  'crash',
  /** The machine ends. */
  'powerFailure',
] as const
export type FaultKind = (typeof faultKinds)[number]
/** How often each has happened. */
export type FaultCounts = Record<FaultKind, number>

/** The counts of a world in which nothing has gone wrong. */
export const noFaults = (): FaultCounts => Object.fromEntries(faultKinds.map((kind) => [kind, 0])) as FaultCounts

/** How often a fault happens, in a thousand occasions. */
export type FaultRates = Readonly<Record<FaultKind, number>>

const lies: readonly FaultKind[] = ['torn', 'lost', 'rotten', 'misread']

/** Draws rates: a third of all histories has no faults, another third honest ones only. */
export function drawRates(random: Random): FaultRates {
  const rates: FaultCounts = noFaults()
  const group = random.below(3)
  if (group === 0) return rates
  for (const kind of faultKinds)
    if (random.below(3) === 0 && (group === 2 || !lies.includes(kind))) rates[kind] = random.of([2, 10, 40, 150])
  // An end of the process costs the pages that the rest of the history needs.
  rates.restart = Math.min(rates.restart, 10)
  rates.crash = Math.min(rates.crash, 10)
  rates.powerFailure = Math.min(rates.powerFailure, 10)
  return rates
}

interface Due {
  readonly at: number
  readonly run: () => void
}

/** Virtual time, and what is going to happen. */
export class Events {
  /** Milliseconds. */
  now = 0
  readonly #due: Due[] = []

  after(delay: number, run: () => void): void {
    this.#due.push({ at: this.now + delay, run })
  }

  get pending(): number {
    return this.#due.length
  }

  /** Lets time pass. Returns how many events that were due have happened. */
  pass(milliseconds: number): number {
    const end = this.now + milliseconds
    let happened = 0
    for (;;) {
      let first = -1
      for (let n = 0; n < this.#due.length; n++)
        if (this.#due[n]!.at <= end && (first < 0 || this.#due[n]!.at < this.#due[first]!.at)) first = n
      if (first < 0) break
      const [{ at, run }] = this.#due.splice(first, 1) as [Due]
      this.now = Math.max(this.now, at)
      happened++
      run()
    }
    this.now = end
    return happened
  }

  /** Time until the first event. */
  get untilNext(): number {
    let first = Number.POSITIVE_INFINITY
    for (const { at } of this.#due) first = Math.min(first, at)
    return Math.max(0, first - this.now)
  }

  /** The process has ended: nobody waits for anything any more. */
  forget(): void {
    this.#due.length = 0
  }
}

/** Memory by size, to be used again by the next history: zeroed memory is what costs most otherwise. */
export class MemoryPool {
  readonly #free = new Map<number, ArrayBuffer[]>()
  readonly #taken: ArrayBuffer[] = []

  take(bytes: number): ArrayBuffer {
    const buffer = this.#free.get(bytes)?.pop()
    if (buffer === undefined) {
      const made = new ArrayBuffer(bytes)
      this.#taken.push(made)
      return made
    }
    new Uint8Array(buffer).fill(0)
    this.#taken.push(buffer)
    return buffer
  }

  /** The history is over: nobody uses any of it. */
  reclaim(): void {
    for (const buffer of this.#taken.splice(0)) {
      const list = this.#free.get(buffer.byteLength)
      if (list === undefined) this.#free.set(buffer.byteLength, [buffer])
      else list.push(buffer)
    }
  }
}

/** What a history and its world have in common. */
export class World implements Allocator {
  readonly random: Random
  readonly rates: FaultRates
  readonly faults: FaultCounts = noFaults()
  readonly events: Events = new Events()
  readonly memory: MemoryPool
  /** The places and disks of the stack that is open. */
  readonly places: Place[] = []
  readonly disks: SimulatedDisk[] = []
  /** A place keeps pages as they are, in slots or frames of one size. */
  hasSlots = false
  /** The stack has asked for a tick. */
  isWoken = false
  /** The disks are away until then. */
  outageUntil = 0
  /** Errors and damage that were handed out: as many pages may be reported as unreadable. */
  readErrors = 0
  damagedReads = 0
  syncErrors = 0
  /** Faults happen. Not while a stack opens or at the end, when all must come to rest. */
  faulty = false
  /** Files may fail to sync. */
  syncsFail = true
  /** The files of places that survive, and the name of this boot of the machine. */
  readonly files: MemoryFiles = new MemoryFiles({ direct: false })
  boot = 1
  /** What asks for memory may use the stack before it gets it. */
  whileAllocating: (() => void) | undefined
  /** The first rule that was broken towards the world. */
  violation: string | undefined

  constructor(random: Random, rates: FaultRates, memory: MemoryPool) {
    this.random = random
    this.rates = rates
    this.memory = memory
    this.files.fault = (call) => this.#judge(call)
  }

  /** The machine ends: what was not synced is there in part. */
  failPower(): void {
    this.boot++
    // A disk writes a sector as a whole, or not at all.
    this.files.powerFailure(({ position, length }) => {
      const end = position + this.random.below(length + 1)
      return this.random.of([0, length, Math.max(0, end - (end % sectorBytes) - position)])
    })
  }

  /** What becomes of a call of the system about a file. */
  #judge({ name, position, length }: FileCall): FileFault | undefined {
    const { random, events } = this
    let delay = 1 + random.below(20)
    if (this.strikes('late')) delay *= random.from(2, 100)
    const until = new Promise<void>((resolve) => events.after(delay, resolve))
    if (name === 'read') {
      if (!this.isOut && !this.strikes('failedRead')) return { until, ...this.#shorter(position, length) }
      this.readErrors++
    } else if (name === 'write') {
      // Its first block is how a place disowns a file of which it cannot say any more what is in it.
      if (position < 4096 || (!this.isOut && !this.strikes('failedWrite')))
        return { until, ...this.#shorter(position, length) }
    } else if (name === 'sync') {
      if (!this.syncsFail || (!this.isOut && !this.strikes('failedSync'))) return { until }
      this.syncErrors++
    } else return undefined
    return { until, code: 'EIO', ...(name === 'write' ? { bytes: random.below(length + 1) } : {}) }
  }

  /** The system may move less than was asked for; in whole sectors here, because power fails between sectors. */
  #shorter(position: number, length: number): { readonly bytes?: number } {
    if (!this.faulty || this.random.below(50) > 0) return {}
    const end = position + this.random.below(length)
    const bytes = end - (end % sectorBytes) - position
    return bytes > 0 ? { bytes } : {}
  }

  /** Whether a fault happens now; it is counted. */
  strikes(kind: FaultKind): boolean {
    if (!this.faulty || !this.random.chance(this.rates[kind])) return false
    this.faults[kind]++
    return true
  }

  /** Notes what no stack may do. The stack may take the error for a fault of the disk: so it is noted here, too. */
  violated(what: string): Error {
    this.violation ??= what
    return new Error(what)
  }

  get isOut(): boolean {
    return this.faulty && this.events.now < this.outageUntil
  }

  allocate(bytes: number, _site: string): ArrayBufferLike | undefined {
    this.whileAllocating?.()
    return this.strikes('allocation') ? undefined : this.memory.take(bytes)
  }
}

const sectorBytes = 512
/** Damage is noted for so many bytes. */
const grain = 128

/** An error as the system reports it. */
function systemError(code: 'EIO' | 'ENOSPC'): Error {
  return Object.assign(new Error(code === 'EIO' ? 'EIO: i/o error' : 'ENOSPC: no space left on device'), { code })
}

interface Transfer {
  readonly position: number
  readonly end: number
}

/** A file on a simulated disk. */
export class SimulatedDisk implements SwapFile {
  readonly directIo = true
  readonly bytes: number
  /** Its place promises that what was synced survives. */
  readonly survives: boolean
  /** Transfers under way. */
  underWay = 0
  isClosed = false
  /** Writes that were acknowledged, and how many of the first of these a sync has made last. */
  acknowledged = 0
  synced = 0
  readonly #content: Uint8Array
  readonly #spoilt: Uint8Array
  /** Spoilt grains that were read, by their bytes: whoever writes the same has only moved them. */
  readonly #handedOut = new Set<string>()
  readonly #world: World
  readonly #writes: Transfer[] = []
  readonly #latency: number

  constructor(world: World, bytes: number, survives: boolean) {
    this.bytes = bytes
    this.survives = survives
    this.#world = world
    this.#content = new Uint8Array(world.memory.take(bytes))
    this.#spoilt = new Uint8Array(world.memory.take(Math.ceil(bytes / grain)))
    this.#latency = world.random.of([1, 3, 10, 40])
    world.disks.push(this)
  }

  write(bytes: Uint8Array, at: number, length: number, position: number): Promise<void> {
    this.#begin(bytes, at, position, length)
    const transfer = this.#beginWrite(position, length)
    // Some of it is on the disk at once, the rest at the end.
    const early = this.#sectorsOf(length)
    this.#store(bytes, at, early, position)
    return this.#later(() => {
      this.#writes.splice(this.#writes.indexOf(transfer), 1)
      this.#finishWrite(bytes, at + early, length - early, position + early)
    })
  }

  writeNow(bytes: Uint8Array, at: number, length: number, position: number): void {
    this.#begin(bytes, at, position, length)
    this.#writes.splice(this.#writes.indexOf(this.#beginWrite(position, length)), 1)
    this.#finishWrite(bytes, at, length, position)
  }

  read(into: Uint8Array, at: number, length: number, position: number): Promise<void> {
    this.#begin(into, at, position, length)
    const early = this.#sectorsOf(length)
    into.set(this.#content.subarray(position, position + early), at)
    return this.#later(() => this.#finishRead(into, at, length, position, early))
  }

  readNow(into: Uint8Array, at: number, length: number, position: number): void {
    this.#begin(into, at, position, length)
    this.#finishRead(into, at, length, position, 0)
  }

  sync(): Promise<void> {
    this.#begin(this.#content, 0, 0, 0)
    const before = this.acknowledged
    return this.#later(() => {
      if (this.#world.isOut || this.#world.strikes('failedSync')) {
        this.#world.syncErrors++
        throw systemError('EIO')
      }
      this.synced = Math.max(this.synced, before)
    })
  }

  close(): Promise<void> {
    if (this.underWay > 0) throw this.#world.violated(`the file was closed with ${this.underWay} transfers under way`)
    this.isClosed = true
    return Promise.resolve()
  }

  #begin(bytes: Uint8Array, at: number, position: number, length: number): void {
    if (this.isClosed) throw this.#world.violated('a transfer was begun on a closed file')
    if (position < 0 || position + length > this.bytes)
      throw this.#world.violated(`${length} bytes at ${position} lie outside of the file's ${this.bytes}`)
    if (at + length > bytes.length)
      throw this.#world.violated(`${length} bytes at ${at} lie outside of the buffer's ${bytes.length}`)
  }

  #beginWrite(position: number, length: number): Transfer {
    const end = position + length
    for (const other of this.#writes)
      if (position < other.end && other.position < end)
        throw this.#world.violated(
          `two writes are under way to the same bytes: ${position} to ${end}, ${other.position} to ${other.end}`,
        )
    const transfer = { position, end }
    this.#writes.push(transfer)
    return transfer
  }

  /** A part of a transfer in whole sectors. */
  #sectorsOf(length: number): number {
    return Math.min(length, this.#world.random.below(Math.ceil(length / sectorBytes) + 1) * sectorBytes)
  }

  #later(end: () => void): Promise<void> {
    const { random, events } = this.#world
    let delay = 1 + random.below(2 * this.#latency)
    if (this.#world.strikes('late')) delay *= random.from(2, 100)
    this.underWay++
    return new Promise((resolve, reject) => {
      events.after(delay, () => {
        this.underWay--
        try {
          end()
        } catch (error) {
          reject(error as Error)
          return
        }
        resolve()
      })
    })
  }

  #finishWrite(bytes: Uint8Array, at: number, length: number, position: number): void {
    const world = this.#world
    if (world.isOut || world.strikes('failedWrite')) {
      this.#store(bytes, at, this.#sectorsOf(length), position)
      throw systemError(world.random.below(3) === 0 ? 'ENOSPC' : 'EIO')
    }
    let done = length
    if (world.strikes('torn')) done = this.#sectorsOf(length)
    else if (world.strikes('lost')) done = 0
    this.#store(bytes, at, done, position)
    this.#spoil(position + done, length - done)
    if (length > 0 && world.strikes('rotten')) {
      const byte = position + world.random.below(length)
      this.#content[byte] = this.#content[byte]! ^ (1 << world.random.below(8))
      this.#spoil(byte, 1)
    }
    this.acknowledged++
  }

  #store(bytes: Uint8Array, at: number, length: number, position: number): void {
    this.#content.set(bytes.subarray(at, at + length), position)
    const end = Math.floor((position + length) / grain)
    for (let n = Math.ceil(position / grain); n < end; n++)
      this.#spoilt[n] = this.#handedOut.size > 0 && this.#handedOut.has(this.#grainOf(n)) ? 1 : 0
  }

  #grainOf(n: number): string {
    return String.fromCharCode(...this.#content.subarray(n * grain, (n + 1) * grain))
  }

  #spoil(position: number, length: number): void {
    if (length > 0) this.#spoilt.fill(1, Math.floor(position / grain), Math.ceil((position + length) / grain))
  }

  #finishRead(into: Uint8Array, at: number, length: number, position: number, early: number): void {
    const world = this.#world
    if (world.isOut || world.strikes('failedRead')) {
      world.readErrors++
      throw systemError('EIO')
    }
    if (world.strikes('misread')) {
      const from = Math.floor(world.random.below(this.bytes - length) / grain) * grain
      into.set(this.#content.subarray(from, from + length), at)
      world.damagedReads++
      return
    }
    into.set(this.#content.subarray(position + early, position + length), at + early)
    const end = Math.ceil((position + length) / grain)
    let isDamaged = false
    for (let n = Math.floor(position / grain); n < end; n++)
      if (this.#spoilt[n] === 1) {
        this.#handedOut.add(this.#grainOf(n))
        isDamaged = true
      }
    if (isDamaged) world.damagedReads++
  }
}
