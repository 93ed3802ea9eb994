/** The ends of stacks for tests: one that keeps nothing, and a place that may have to wait, in plain memory. */
import {
  assertBatch,
  assertEntries,
  assertIndex,
  assertObject,
  assertPage,
  type Borrower,
  type ByteAmount,
  basePageSize,
  bytesOf,
  type Capabilities,
  checkedAttributes,
  checkOptions,
  type Flight,
  GetOutcome,
  idle,
  type Layer,
  type LayerFactory,
  maxEntries,
  maxPageSize,
  none,
  type ObjectId,
  type Owners,
  type PageBatch,
  type PageStore,
  Pending,
  type PlaceTraits,
  type Pool,
  type PoolAttributes,
  PoolRefusal,
  type Progress,
  PutOutcome,
  type RecoverBlock,
  type SlowPlace,
  type StatsNode,
  unitsOf,
} from '@tmem/core'
import { turn as aTurn } from '@tmem/core/runtime'

/** A frame at rest in slow memory, and whose it is. */
export interface SlowFrame {
  readonly bytes: Uint8Array
  /** Number by which the stack knows it; `none` when it is left over from an earlier run. */
  owner: number
  /** Key of its pool, and its handle: the same in every run. */
  readonly pool: number
  readonly object: ObjectId
  readonly index: number
}

/** Settings of `slowMemory`; each but the size has a default that fits. */
export interface SlowMemoryOptions {
  /** Bytes of frames that it holds, at least 4096. */
  readonly sizeBytes: ByteAmount
  /** Bytes of its unit: a power of two, 16 to 4096 (default 128). */
  readonly unitBytes?: ByteAmount
  /** Bytes that one flight carries (default 128 KiB). */
  readonly flightBytes?: ByteAmount
  /** Keeps persistent pages (default true), ephemeral ones (default false). */
  readonly persistent?: boolean
  readonly ephemeral?: boolean
  /** Takes pages as they are only (default false). */
  readonly rawOnly?: boolean
  /** What each transfer waits for (default: a turn of the event loop). */
  readonly turn?: () => Promise<void>
  /** Reads and writes at once where a caller cannot wait (default true). */
  readonly now?: boolean
  /** Each tick moves this many frames to other locations, as a place does that regains space (default 0). */
  readonly moves?: number
  /**
   * Where its frames are, by location: given again to another slow memory, that one begins with what this one has left,
   * as a file does (default: nothing is left).
   */
  readonly frames?: Map<number, SlowFrame>
}

/**
 * A slow place in plain memory: a frame that was freed is gone at once, and its location is the next to be given out,
 * so that who reads too late finds another page there. Throws `RangeError` for settings that make no sense.
 */
export function slowMemory(options: SlowMemoryOptions): Layer {
  checkOptions('slowMemory', options, {
    sizeBytes: 'bytes',
    unitBytes: 'bytes?',
    flightBytes: 'bytes?',
    persistent: 'flag?',
    ephemeral: 'flag?',
    rawOnly: 'flag?',
    turn: 'function?',
    now: 'flag?',
    moves: 'number?',
    frames: 'object?',
  })
  const sizeBytes = bytesOf('slowMemory', 'sizeBytes', options.sizeBytes)
  const unitBytes = bytesOf('slowMemory', 'unitBytes', options.unitBytes ?? 128)
  const flightBytes = bytesOf('slowMemory', 'flightBytes', options.flightBytes ?? 128 * 1024)
  const { persistent = true, ephemeral = false } = options
  const { rawOnly = false, now = true, frames } = options
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < basePageSize)
    throw new RangeError(`slow memory has at least ${basePageSize} bytes, got ${sizeBytes}`)
  if (!(unitBytes >= 16 && unitBytes <= 4096) || (unitBytes & (unitBytes - 1)) !== 0)
    throw new RangeError(`a unit must be a power of two from 16 to 4096 bytes, got ${unitBytes}`)
  if (!Number.isSafeInteger(flightBytes) || flightBytes < unitBytes)
    throw new RangeError(`a flight has at least a unit of ${unitBytes} bytes, got ${flightBytes}`)
  if (!persistent && !ephemeral) throw new RangeError('slow memory keeps persistent pages, or ephemeral ones, or both')
  const units = Math.floor(sizeBytes / unitBytes)
  const unitsOfPage = rawOnly ? basePageSize / unitBytes : unitsOf(basePageSize, unitBytes)
  // Frames of pages that are gone already are on flights as well.
  const sure = units - Math.ceil((3 * flightBytes) / unitBytes)
  const traits: PlaceTraits = Object.freeze({
    persistent,
    ephemeral,
    waits: true,
    survives: frames === undefined ? 'nothing' : 'process',
    rawOnly,
    capacity: Math.min(maxEntries, units),
    reservedBytes: persistent && now ? Math.max(0, Math.floor(sure / unitsOfPage)) * basePageSize : 0,
    maxPageSize,
  })
  const settings = { ...options, unitBytes, flightBytes, units, now }
  return Object.freeze({ name: 'slowMemory', place: { traits, open: () => new SlowMemory(traits, settings) } })
}

class SlowMemory implements SlowPlace {
  readonly name = 'slowMemory'
  readonly traits: PlaceTraits
  readonly unitBytes: number
  readonly flightBytes: number
  readonly writeNow?: (flight: Flight) => void
  readonly readNow?: (location: number, units: number, into: Uint8Array) => void
  readonly #frames: Map<number, SlowFrame>
  readonly #turn: () => Promise<void>
  readonly #moves: number
  readonly #units: number
  /** Locations that were given back, and the first that never was given out. */
  readonly #free: number[] = []
  #next = 0
  #usedUnits = 0
  #owners: Owners | undefined
  /** Keys of pools of which the frames of an earlier run have been handed over. */
  readonly #recovered: Set<number> = new Set()
  /** Where `tick` goes on. */
  #cursor = 0
  readonly #counters = { writes: 0, bytes_written: 0, reads: 0, bytes_read: 0, refused: 0, moved: 0, syncs: 0 }

  constructor(
    traits: PlaceTraits,
    options: SlowMemoryOptions & { unitBytes: number; flightBytes: number; units: number; now: boolean },
  ) {
    const { unitBytes, flightBytes, units, now, turn = aTurn, moves = 0, frames = new Map() } = options
    this.traits = traits
    this.unitBytes = unitBytes
    this.flightBytes = flightBytes
    this.#units = units
    this.#turn = turn
    this.#moves = moves
    this.#frames = frames
    for (const [location, frame] of frames) {
      frame.owner = none
      this.#next = Math.max(this.#next, location + 1)
      this.#usedUnits += frame.bytes.length / unitBytes
    }
    for (let location = 0; location < this.#next; location++) if (!frames.has(location)) this.#free.push(location)
    if (!now) return
    this.writeNow = (flight) => this.#write(flight)
    this.readNow = (location, units, into) => this.#read(location, units, into)
  }

  attach(owners: Owners): void {
    this.#owners = owners
  }

  open(): boolean {
    return true
  }

  async write(flight: Flight): Promise<void> {
    await this.#turn()
    this.#write(flight)
    await this.#turn()
  }

  #write(flight: Flight): void {
    const { bytes, offsets, units, owners, locations, count, filled } = flight
    this.#counters.writes++
    this.#counters.bytes_written += filled
    for (let n = 0; n < count; n++) {
      const at = offsets[n]!
      locations[n] = this.#makeRoom(units[n]!)
        ? this.#enter(bytes.slice(at, at + units[n]! * this.unitBytes), owners[n]!)
        : none
      if (locations[n] === none) this.#counters.refused++
    }
  }

  /** Room for a frame: ephemeral pages go for it, oldest first. */
  #makeRoom(units: number): boolean {
    if (this.traits.ephemeral)
      for (const [location, { owner }] of this.#frames) {
        if (this.#usedUnits + units <= this.#units) break
        if (owner !== none) this.#owners!.drop(owner, location)
      }
    return this.#usedUnits + units <= this.#units
  }

  #enter(bytes: Uint8Array, owner: number): number {
    const location = this.#free.pop() ?? this.#next++
    const owners = this.#owners!
    const [pool, object, index] = [owners.poolOf(owner), owners.objectOf(owner), owners.indexOf(owner)]
    this.#frames.set(location, { bytes, owner, pool, object, index })
    this.#usedUnits += bytes.length / this.unitBytes
    return location
  }

  async read(location: number, units: number, into: Uint8Array): Promise<void> {
    await this.#turn()
    this.#read(location, units, into)
  }

  #read(location: number, units: number, into: Uint8Array): void {
    const frame = this.#frames.get(location)
    if (frame === undefined) throw new Error(`nothing is at ${location} any more`)
    this.#counters.reads++
    this.#counters.bytes_read += units * this.unitBytes
    into.set(frame.bytes.subarray(0, units * this.unitBytes))
  }

  free(location: number): void {
    const { bytes } = this.#frames.get(location)!
    this.#frames.delete(location)
    this.#free.push(location)
    this.#usedUnits -= bytes.length / this.unitBytes
  }

  forget(location: number): void {
    if (this.traits.survives === 'nothing') this.free(location)
    else this.#frames.get(location)!.owner = none
  }

  recover(pool: number, enter: RecoverBlock): void {
    const again = this.#recovered.has(pool)
    this.#recovered.add(pool)
    for (const [location, frame] of this.#frames) {
      if (frame.owner !== none || frame.pool !== pool) continue
      if (!again) frame.owner = enter(frame.object, frame.index, location, frame.bytes.length / this.unitBytes)
      if (frame.owner === none) this.free(location)
    }
  }

  async sync(): Promise<void> {
    await this.#turn()
    this.#counters.syncs++
  }

  tick({ pages }: { readonly pages: number }): Progress {
    let moved = 0
    for (let left = this.#next; left > 0 && moved < Math.min(pages, this.#moves); left--) {
      const location = this.#cursor++ % this.#next
      const frame = this.#frames.get(location)
      if (frame === undefined || frame.owner === none) continue
      const units = this.#owners!.unitsAt(frame.owner, location)
      if (units === 0) continue
      const to = this.#enter(frame.bytes, frame.owner)
      this.free(this.#owners!.moved(frame.owner, location, to, units) ? location : to)
      moved++
    }
    this.#counters.moved += moved
    return moved === 0 ? idle : { pages: moved, pending: false }
  }

  stats(): StatsNode {
    return {
      name: this.name,
      counters: {
        used_bytes: this.#usedUnits * this.unitBytes,
        limit_bytes: this.#units * this.unitBytes,
        frames: this.#frames.size,
        ...this.#counters,
      },
      children: [],
    }
  }

  check(blocks: readonly { readonly location: number; readonly units: number }[]): void {
    for (const { location, units } of blocks)
      if (this.#frames.get(location)?.bytes.length !== units * this.unitBytes)
        throw new Error(`slowMemory: no frame of ${units} units is at ${location}`)
    let owned = 0
    for (const { owner } of this.#frames.values()) if (owner !== none) owned++
    if (owned !== blocks.length) throw new Error(`slowMemory: ${owned} frames, the stack knows ${blocks.length}`)
  }

  close(): Promise<void> {
    return Promise.resolve()
  }
}

/** `slowMemory(size=64MiB)` in the text of a stack. */
export const slowMemoryFactory: LayerFactory = {
  name: 'slowMemory',
  summary: 'memory that has to wait, as a disk does',
  options: {
    size: { kind: 'bytes', summary: 'bytes that it holds', required: true, minimum: basePageSize },
    ephemeral: { kind: 'flag', summary: 'keeps ephemeral pages, too' },
  },
  create: ({ size, ephemeral }) =>
    slowMemory({ sizeBytes: size as number, ...(ephemeral === undefined ? {} : { ephemeral: ephemeral as boolean }) }),
}

/** Settings of `discard`. */
export interface DiscardOptions {
  /**
   * `refuse` (default): refuses every page (`Policy`), in pools of every kind.
   * `lose`: takes every page of an ephemeral pool and forgets it at once, which the interface allows.
   */
  readonly mode?: 'refuse' | 'lose'
}

/** The last layer of a stack that keeps nothing: for measuring the layers above, and as an end that does no harm. */
export function discard(options: DiscardOptions = {}): Layer {
  checkOptions('discard', options, { mode: 'text?' })
  const lose = options.mode === 'lose'
  const capabilities: Capabilities = Object.freeze({
    ephemeral: true,
    persistent: !lose,
    shared: true,
    minPageSize: basePageSize,
    maxPageSize,
    deferred: false,
    split: true,
    reservedBytes: 0,
  })
  return Object.freeze({
    name: 'discard',
    plan: (below: Capabilities | undefined) => (below === undefined ? capabilities : 'it passes nothing on'),
    open: () => new DiscardStore(capabilities, lose),
  })
}

class DiscardStore implements PageStore {
  readonly name = 'discard'
  readonly capabilities: Capabilities
  readonly lose: boolean
  puts = 0
  gets = 0
  flushes = 0
  closed = false

  constructor(capabilities: Capabilities, lose: boolean) {
    this.capabilities = capabilities
    this.lose = lose
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const checked = checkedAttributes(attributes)
    if (this.closed) return PoolRefusal.Closed
    if (checked.shared && checked.persistent) return PoolRefusal.SharedPersistent
    if (checked.persistent && this.lose) return PoolRefusal.Unsupported
    return new DiscardPool(checked, this, { frozen: false, gone: false })
  }

  tick(): Progress {
    return idle
  }

  stats(): StatsNode {
    return { name: 'discard', counters: { puts: this.puts, gets: this.gets, flushes: this.flushes }, children: [] }
  }

  close(): Promise<void> {
    this.closed = true
    return Promise.resolve()
  }
}

class DiscardPool implements Pool {
  readonly attributes: PoolAttributes
  readonly #store: DiscardStore
  /** Shared with the view in parts. */
  readonly #state: { frozen: boolean; gone: boolean }

  constructor(attributes: PoolAttributes, store: DiscardStore, state: { frozen: boolean; gone: boolean }) {
    this.attributes = attributes
    this.#store = store
    this.#state = state
  }

  #outcome(): PutOutcome {
    this.#store.puts++
    if (this.#state.gone || this.#store.closed) return PutOutcome.PoolGone
    if (this.#state.frozen) return PutOutcome.Frozen
    return this.#store.lose ? PutOutcome.Stored : PutOutcome.Policy
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.attributes.pageSize)
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    return this.#outcome()
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.attributes.pageSize)
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    this.#store.gets++
    return GetOutcome.Miss
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    return this.get(object, index, into)
  }

  flushPage(object: ObjectId, index: number): void {
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    this.#store.flushes++
  }

  flushObject(object: ObjectId): void {
    assertObject(object)
    this.#store.flushes++
  }

  putMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    let stored = 0
    for (let i = 0; i < batch.length; i++) {
      if (batch.outcomes[i] === Pending) batch.outcomes[i] = this.#outcome()
      if (batch.outcomes[i] === PutOutcome.Stored) stored++
    }
    return stored
  }

  getMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    let hits = 0
    for (let i = 0; i < batch.length; i++) {
      this.#store.gets++
      if (batch.outcomes[i] === Pending) batch.outcomes[i] = GetOutcome.Miss
      if (batch.outcomes[i] === GetOutcome.Hit) hits++
    }
    return hits
  }

  flushMany(batch: PageBatch): void {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    this.#store.flushes += batch.length
  }

  lend(object: ObjectId, index: number, _use: Borrower): GetOutcome {
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    this.#store.gets++
    return GetOutcome.Miss
  }

  split(): Pool {
    return new DiscardPool(Object.freeze({ ...this.attributes, pageSize: basePageSize }), this.#store, this.#state)
  }

  freeze(): void {
    this.#state.frozen = true
  }

  thaw(): void {
    this.#state.frozen = false
  }

  destroy(): void {
    this.#state.gone = true
  }
}

/** `discard(mode=lose)` in the text of a stack. */
export const discardFactory: LayerFactory = {
  name: 'discard',
  summary: 'keeps nothing',
  options: { mode: { kind: 'text', summary: 'what becomes of a page', choices: ['refuse', 'lose'] } },
  create: ({ mode }) => discard(mode === undefined ? {} : { mode: mode as 'refuse' | 'lose' }),
}
