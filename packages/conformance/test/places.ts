/**
 * Two small places for tests: one in memory, one that waits. Right, short, slow; `place-mutants.ts` breaks them, one
 * rule at a time, and `chain.test.ts` puts them into stacks, where the slow one fails, packs its frames and gives
 * ephemeral ones up for others, more often than a real place would.
 *
 * Both keep blocks in a row of units, first fit, so that room may lie in pieces.
 */
import {
  type Block,
  ByteLimit,
  type Flight,
  type Layer,
  type LayerContext,
  type MemoryPlace,
  type MovedBlock,
  maxPageSize,
  none,
  type Owners,
  type Place,
  type PlaceTraits,
  PutOutcome,
  type SlowPlace,
  type StatsNode,
  unitsOf,
} from '@tmem/core'

/** What is kept in a row of units: where it begins is its location. */
export interface Kept {
  bytes: Uint8Array
  owner: number
  units: number
}

/** A row of units and what lies in it. */
export class Row {
  readonly kept: Map<number, Kept> = new Map()
  readonly length: number
  used = 0
  /** Locations in use, the lowest first. */
  readonly #order: number[] = []

  constructor(length: number) {
    this.length = length
  }

  /** The first hole of so many units, or `none`. */
  find(units: number): number {
    let at = 0
    for (const location of this.#order) {
      if (location - at >= units) return at
      at = location + this.kept.get(location)!.units
    }
    return this.length - at >= units ? at : none
  }

  add(location: number, one: Kept): void {
    this.#order.splice(this.#indexOf(location), 0, location)
    this.kept.set(location, one)
    this.used += one.units
  }

  remove(location: number): void {
    this.#order.splice(this.#indexOf(location), 1)
    this.used -= this.kept.get(location)!.units
    this.kept.delete(location)
  }

  #indexOf(location: number): number {
    let low = 0
    for (let high = this.#order.length; low < high; ) {
      const middle = (low + high) >>> 1
      if (this.#order[middle]! < location) low = middle + 1
      else high = middle
    }
    return low
  }

  sorted(): [number, Kept][] {
    return this.#order.map((location) => [location, this.kept.get(location)!])
  }

  /** Slides up to `most` blocks down into holes. Answers how many moved. */
  slide(most: number, moved: (owner: number, from: number, to: number) => void): number {
    let done = 0
    let at = 0
    for (const [location, one] of this.sorted()) {
      if (location > at) {
        if (done === most) return done
        this.remove(location)
        this.add(at, one)
        done++
        moved(one.owner, location, at)
      }
      at += one.units
    }
    return done
  }
}

export const mapTraits: PlaceTraits = Object.freeze({
  persistent: true,
  ephemeral: true,
  waits: false,
  survives: 'nothing',
  rawOnly: false,
  capacity: 4096,
  reservedBytes: 0,
  maxPageSize,
})

/** Bytes of a unit of the place in memory. */
const unit = 64

/** A place in memory, with so many bytes for blocks. */
export class MapPlace implements MemoryPlace {
  readonly name: string = 'map'
  readonly traits: PlaceTraits = mapTraits
  readonly limit: ByteLimit
  readonly row: Row
  readonly context: LayerContext
  /** Memory that the next block will have. */
  spare: ArrayBufferLike | undefined
  charged = 0
  refusals = 0
  closed = false

  constructor(limit: number | ByteLimit, context: LayerContext) {
    this.limit = typeof limit === 'number' ? new ByteLimit(limit) : limit
    this.row = new Row(Math.floor(this.limit.maximumBytes / unit))
    this.context = context
  }

  get limitBytes(): number {
    return this.limit.bytes
  }

  prepare(length: number): void {
    if (this.spare === undefined || this.spare.byteLength < length)
      this.spare = this.context.allocator.allocate(length, 'map.block')
  }

  put(block: Block, owner: number): number {
    const units = this.sizeOf(block.length) / unit
    const location = (this.row.used + units) * unit + this.charged > this.limitBytes ? none : this.row.find(units)
    if (location === none) return this.refuse(PutOutcome.NoMemory)
    if (this.spare === undefined || this.spare.byteLength < block.length)
      return this.refuse(PutOutcome.AllocationFailed)
    const bytes = new Uint8Array(this.spare, 0, block.length)
    this.spare = undefined
    bytes.set(block.bytes.subarray(block.at, block.at + block.length))
    this.row.add(location, { bytes, owner, units })
    return location
  }

  refuse(reason: PutOutcome): number {
    this.refusals++
    return -reason
  }

  get(location: number, into: Block): void {
    into.bytes.set(this.row.kept.get(location)!.bytes.subarray(0, into.length), into.at)
  }

  free(location: number, _length: number, _pageBytes: number): void {
    this.row.remove(location)
  }

  sizeOf(length: number): number {
    return Math.ceil(length / unit) * unit
  }

  excess(): number {
    return Math.ceil(this.row.used * unit + this.charged - this.limitBytes * 0.75)
  }

  charge(bytes: number): boolean {
    if (this.charged + bytes > this.limitBytes / 8) return false
    this.charged += bytes
    return true
  }

  fit(_length: number, moved: MovedBlock): boolean {
    return this.compact(8, moved) > 0
  }

  compact(blocks: number, moved: MovedBlock): number {
    return this.row.slide(blocks, (owner, _from, to) => moved(owner, to))
  }

  get usedBytes(): number {
    return this.row.used * unit + this.charged
  }

  stats(): StatsNode {
    return {
      name: this.name,
      counters: { used_bytes: this.row.used * unit, limit_bytes: this.limitBytes, refusals: this.refusals },
      children: [],
    }
  }

  check(owns: (owner: number, location: number) => boolean): void {
    for (const [location, { owner }] of this.row.kept)
      if (!owns(owner, location)) throw new Error(`${this.name}: the block at ${location} belongs to nobody`)
  }

  close(): Promise<void> {
    this.closed = true
    return Promise.resolve()
  }
}

export const slowTraits: PlaceTraits = Object.freeze({ ...mapTraits, waits: true })

/** Which transfers of a slow place fail. */
export type Failing = 'nothing' | 'writes' | 'reads' | 'all'

/** What a test says to the slow places that it has opened. */
export interface Outside {
  failing: Failing
  /** What each transfer waits for. */
  readonly turn: () => Promise<void>
}

export const calm = (): Outside => ({
  failing: 'nothing',
  turn: () => new Promise((resolve) => setImmediate(resolve)),
})

const failure = (): Error => Object.assign(new Error('EIO: the disk failed'), { code: 'EIO' })

/** A place that waits a turn for each transfer. */
export class SlowMapPlace implements SlowPlace {
  readonly name: string = 'slow'
  readonly traits: PlaceTraits = slowTraits
  readonly unitBytes: number = 256
  readonly flightBytes: number = 128 * 1024
  readonly row: Row
  readonly outside: Outside
  owners: Owners | undefined
  writes = 0
  reads = 0
  packed = 0
  closed = false

  constructor(roomBytes: number, outside: Outside, _context: LayerContext) {
    this.row = new Row(Math.floor(roomBytes / this.unitBytes))
    this.outside = outside
  }

  attach(owners: Owners): void {
    this.owners = owners
  }

  open(_forced: boolean): boolean {
    return true
  }

  async write(flight: Flight): Promise<void> {
    const { count } = flight
    // What is on its way needs room of its own from now on.
    this.place(flight, count)
    await this.outside.turn()
    if (this.fails('writes')) this.undo(flight, count)
    this.writes++
  }

  writeNow(flight: Flight): void {
    this.place(flight, flight.count)
    if (this.fails('writes')) this.undo(flight, flight.count)
    this.writes++
  }

  fails(what: Failing): boolean {
    return this.outside.failing === what || this.outside.failing === 'all'
  }

  /** Gives frames their locations. */
  place(flight: Flight, count: number): void {
    for (let n = 0; n < count; n++) {
      const units = flight.units[n]!
      const at = flight.offsets[n]!
      const location = this.room(units)
      flight.locations[n] = location
      if (location === none) continue
      const bytes = flight.bytes.slice(at, at + units * this.unitBytes)
      this.row.add(location, { bytes, owner: flight.owners[n]!, units })
    }
  }

  /** Nothing is kept of a flight that failed. */
  undo(flight: Flight, count: number): never {
    for (let n = 0; n < count; n++) {
      if (flight.locations[n]! !== none) this.row.remove(flight.locations[n]!)
      flight.locations[n] = none
    }
    throw failure()
  }

  /** Room for a frame: a hole, or what is there after packing, or after an ephemeral page has gone. */
  room(units: number): number {
    const location = this.row.find(units)
    if (location !== none || this.owners === undefined) return location
    if (this.pack() > 0) return this.row.find(units)
    for (const [at, { owner }] of this.row.sorted())
      if (this.owners.unitsAt(owner, at) > 0 && this.owners.drop(owner, at) && this.row.find(units) !== none) break
    return this.row.find(units)
  }

  /** Moves frames that count into the holes below them. */
  pack(): number {
    const { owners, row } = this
    let done = 0
    for (const [from, one] of row.sorted()) {
      // One whose flight has just come down is not known yet: it stays where it is.
      if (owners!.unitsAt(one.owner, from) === 0) continue
      const to = row.find(one.units)
      if (to === none || to > from) continue
      row.add(to, one)
      row.remove(from)
      if (!owners!.moved(one.owner, from, to, one.units)) throw new Error('slow: a frame in use cannot be moved')
      done++
    }
    this.packed += done
    return done
  }

  async read(location: number, units: number, into: Uint8Array): Promise<void> {
    await this.outside.turn()
    this.readNow(location, units, into)
  }

  readNow(location: number, units: number, into: Uint8Array): void {
    this.reads++
    if (this.fails('reads')) throw failure()
    const one = this.row.kept.get(location)
    // Whoever gave the block up while he was reading it gets anything.
    if (one !== undefined) into.set(one.bytes.subarray(0, units * this.unitBytes))
  }

  free(location: number, _units: number): void {
    this.row.remove(location)
  }

  sync(): Promise<void> {
    return this.outside.turn()
  }

  stats(): StatsNode {
    return {
      name: this.name,
      counters: {
        frames: this.row.kept.size,
        used_units: this.row.used,
        writes: this.writes,
        reads: this.reads,
        packed: this.packed,
      },
      children: [],
    }
  }

  check(blocks: readonly { readonly location: number; readonly units: number }[]): void {
    if (blocks.length !== this.row.kept.size)
      throw new Error(`slow: ${this.row.kept.size} frames, not ${blocks.length}`)
    for (const { location, units } of blocks)
      if (this.row.kept.get(location)?.units !== units)
        throw new Error(`slow: no frame of ${units} units at ${location}`)
  }

  close(): Promise<void> {
    this.closed = true
    return Promise.resolve()
  }
}

/**
 * A slow place that moves frames, and gives an ephemeral one up, with each flight that comes: what real ones do when
 * they have no room.
 */
export class RestlessPlace extends SlowMapPlace {
  override place(flight: Flight, count: number): void {
    const { owners, row } = this
    let moves = 4
    for (const [from, one] of row.sorted().toReversed()) {
      if (owners === undefined || owners.unitsAt(one.owner, from) === 0) continue
      if (moves === 2 && owners.drop(one.owner, from)) continue
      const to = row.find(one.units)
      if (to === none || moves-- === 0) break
      row.add(to, one)
      row.remove(from)
      if (!owners.moved(one.owner, from, to, one.units)) throw new Error('slow: a frame in use cannot be moved')
      this.packed++
    }
    super.place(flight, count)
  }
}

/** A place as a layer. */
export const layerOf = (name: string, traits: PlaceTraits, open: (context: LayerContext) => Place): Layer =>
  Object.freeze({ name, place: { traits, open } })

/** Units of the slow place that a block of so many bytes takes. */
export const slowUnits = (length: number): number => unitsOf(length, 256)
