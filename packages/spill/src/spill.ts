/**
 * Spill: a place for ephemeral pages that survives a restart of the process: a ring of frames in a file, the oldest of
 * which are overwritten. Pools that are made again in the same order, for the same client and of the same kind, find
 * their pages.
 *
 * Records are numbered in the order of their frames in the ring, round and round as it is: so the oldest frame is that
 * of the oldest record, and both make room together. The number of a record is the location of its frame.
 *
 * Invariants:
 *  - A record is in the file only while its page is here: it is written after its frame, and only if the page is still
 *    what was
 *    sent; it is emptied before the page is answered, changed or dropped. So nothing that went comes back after a
 *    crash.
 *  - A frame is served only when its bytes have the digest of its record. Anything else costs the page.
 *  - Positions of records grow with their numbers from the oldest to the newest, and all lie within one length of the
 *    ring.
 *
 * **What the client owes.** After a restart the pages are those of before. So object ids must name *contents* for good
 * (a version of a file, a hash), not places in the memory of the process that died. Those of @tmem/page-cache and
 * @tmem/fscache do.
 *
 * DEVIATION: what a destroyed pool leaves cannot be reached any more in this run, but stays in the file, until a pool
 * of the same kind is made in this run or its place is needed: closing a stack destroys its pools, and what is to
 * survive would be gone. What must not come back is flushed. DEVIATION: a digest makes objects for each frame; this is
 * the way to a disk, not the hot path.
 */
import {
  type ByteAmount,
  basePageSize,
  bytesOf,
  checkOptions,
  type Flight,
  type Layer,
  type LayerContext,
  type LayerFactory,
  maxPageSize,
  none,
  type OptionValue,
  type Owners,
  type PlaceTraits,
  type RecoverBlock,
  type SlowPlace,
  type StatsNode,
  TmemError,
} from '@tmem/core'
import type { PageFileIo } from '@tmem/page-file'
import {
  blockBytes,
  bootName,
  digestBytes,
  digestOf,
  flightBytes,
  geometryOf,
  mostFrames,
  SpillFile,
  SpillRecord,
  unitBytes,
} from './spill-file.ts'

/** Settings of a spill. */
export interface SpillOptions {
  /** Path; the file is made if it is not there. One that is not a spill's is refused. */
  readonly file: string
  /** Bytes of the file: 64 KiB to 256 GiB, rounded down to 4 KiB. A spill of another size is begun anew. */
  readonly sizeBytes: ByteAmount
  /** The system that has the file (default: this machine's). */
  readonly files?: PageFileIo
  /** Names this boot of the machine (default: what Linux says); empty: only a file that was closed counts. */
  readonly boot?: string
}

const minSizeBytes = 64 * 1024
const maxSizeBytes = 2 ** 38
/** The largest page takes at most one part in so many of the ring. */
const pagesOfRing = 4
const unitsPerBlock = blockBytes / unitBytes

/**
 * A place that keeps ephemeral pages in a file, for the next run, too. Throws `RangeError` for a size that makes no
 * sense.
 */
export function spill(options: SpillOptions): Layer {
  checkOptions('spill', options, { file: true, sizeBytes: true, files: 'object?', boot: 'any?' })
  const { file, files, boot } = options
  const sizeBytes = bytesOf('spill', 'sizeBytes', options.sizeBytes)
  if (typeof file !== 'string' || file === '') throw new TypeError('spill: file is the path of the file; it is missing')
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < minSizeBytes || sizeBytes > maxSizeBytes)
    throw new RangeError(`a spill file has ${minSizeBytes} to ${maxSizeBytes} bytes, got ${sizeBytes}`)
  const { capacity, ringUnits } = geometryOf(sizeBytes)
  let largest = basePageSize
  while (largest * 2 <= Math.min(maxPageSize, (ringUnits * unitBytes) / pagesOfRing)) largest *= 2
  const traits: PlaceTraits = Object.freeze({
    persistent: false,
    ephemeral: true,
    waits: true,
    survives: 'process',
    rawOnly: false,
    // Those of a flight are known before it takes the records of others.
    capacity: capacity + mostFrames,
    reservedBytes: 0,
    maxPageSize: largest,
  })
  return Object.freeze({
    name: 'spill',
    place: {
      traits,
      open: (context: LayerContext) => {
        const { allocator } = context
        const tables = allocator.allocate(capacity * bytesPerRecord, 'spill.tables')
        if (tables === undefined)
          throw new TmemError(
            'TMEM_NO_MEMORY',
            `no memory for the tables of a spill (${capacity * bytesPerRecord} bytes): give a smaller size`,
            { layer: 'spill' },
          )
        return new SpillPlace(
          traits,
          new SpillFile({ path: file, sizeBytes, files, boot: boot ?? bootName() }, context),
          tables,
        )
      },
    },
  })
}

/** `spill(file=/var/cache/pages,size=1GiB)` in the text of a stack. */
export const spillFactory: LayerFactory = Object.freeze({
  name: 'spill',
  summary: 'ephemeral pages in a file, which survives a restart',
  options: Object.freeze({
    file: { kind: 'text', summary: 'path of the file', required: true },
    size: { kind: 'bytes', summary: 'bytes of the file', required: true, minimum: minSizeBytes, maximum: maxSizeBytes },
  } as const),
  create: ({ file, size }: Readonly<Record<string, OptionValue>>): Layer =>
    spill({ file: String(file), sizeBytes: Number(size) }),
})

/** Bytes of the tables for a record. */
const bytesPerRecord = 14 + digestBytes

/** Frames of a flight that lie side by side in the ring. */
interface Run {
  /** Where in the flight, in the ring, and how long. */
  readonly at: number
  readonly unit: number
  units: number
}

/** A flight that has its places. */
interface Placed {
  readonly runs: readonly Run[]
  /** Number of its first record, and how many it has: they follow one another. */
  readonly first: number
  readonly count: number
  /** Where in the ring it begins and ends. */
  readonly from: number
  readonly to: number
}

class SpillPlace implements SlowPlace {
  readonly name = 'spill'
  readonly traits: PlaceTraits
  readonly unitBytes: number = unitBytes
  readonly flightBytes: number
  /** Why nothing is taken any more. */
  failure: Error | undefined
  readonly #file: SpillFile
  readonly #capacity: number
  readonly #ringUnits: number
  /**
   * By record: where its frame begins, and its units; who owns it: an owner of the stack, `none` for an empty one, or
   * `leftOf` a pool's key: an earlier run has left it, or a pool that was destroyed.
   */
  readonly #positions: Float64Array
  readonly #holders: Int32Array
  readonly #units: Uint16Array
  readonly #digests: Uint8Array
  readonly #record: SpillRecord = new SpillRecord()
  #owners: Owners | undefined
  /** The records in use and those between them: the first, and how many. */
  #oldest = 0
  #span = 0
  /** Where in the ring the next frame goes. */
  #head = 0
  /** Writes under way. */
  #writing = 0
  /** The record that is being overwritten. */
  #going: number = none
  /** Keys of pools that were asked for in this run. */
  readonly #recovered: Set<number> = new Set()
  #live = 0
  #left = 0
  #closing: Promise<void> | undefined
  readonly #counters = {
    written: 0,
    recovered: 0,
    overwritten: 0,
    erased: 0,
    forgotten: 0,
    damaged_records: 0,
    corrupt_frames: 0,
    read_errors: 0,
    write_errors: 0,
    ring_writes: 0,
    written_bytes: 0,
    read_bytes: 0,
  }

  /**
   * It owns the file. Throws `TmemError` (`TMEM_IO`) when what an earlier run has left cannot be read; then the file is
   * closed, and as it was.
   */
  constructor(traits: PlaceTraits, file: SpillFile, tables: ArrayBufferLike) {
    const { capacity, ringUnits } = file.geometry
    this.traits = traits
    this.#file = file
    this.#capacity = capacity
    this.#ringUnits = ringUnits
    this.flightBytes = Math.min(flightBytes, Math.floor(ringUnits / pagesOfRing) * unitBytes)
    this.#positions = new Float64Array(tables, 0, capacity)
    this.#holders = new Int32Array(tables, capacity * 8, capacity).fill(none)
    this.#units = new Uint16Array(tables, capacity * 12, capacity)
    this.#digests = new Uint8Array(tables, capacity * 14, capacity * digestBytes)
    if (!file.counts) return
    try {
      this.#adopt()
    } catch (error) {
      file.closeNow()
      throw error
    }
  }

  attach(owners: Owners): void {
    this.#owners = owners
  }

  open(): boolean {
    return this.failure === undefined
  }

  async write(flight: Flight): Promise<void> {
    const placed = this.#place(flight)
    this.#writing++
    const results = await Promise.allSettled(
      placed.runs.map(({ at, unit, units }) => this.#file.writeFrames(flight.bytes, at, units * unitBytes, unit)),
    )
    this.#writing--
    try {
      for (const result of results) if (result.status === 'rejected') throw result.reason
      this.#commit(flight, placed)
    } catch (error) {
      throw this.#undo(flight, placed, error)
    }
    this.#owners!.landed(flight)
  }

  writeNow(flight: Flight): void {
    const placed = this.#place(flight)
    try {
      for (const { at, unit, units } of placed.runs)
        this.#file.writeFramesNow(flight.bytes, at, units * unitBytes, unit)
      this.#commit(flight, placed)
    } catch (error) {
      throw this.#undo(flight, placed, error)
    }
  }

  async read(location: number, units: number, into: Uint8Array): Promise<void> {
    try {
      await this.#file.readFrame(into, units * unitBytes, this.#unitOf(location))
    } catch (error) {
      this.#counters.read_errors++
      throw error
    }
    this.#wasRead(location, units, into)
  }

  readNow(location: number, units: number, into: Uint8Array): void {
    try {
      this.#file.readFrameNow(into, units * unitBytes, this.#unitOf(location))
    } catch (error) {
      this.#counters.read_errors++
      throw error
    }
    this.#wasRead(location, units, into)
  }

  free(location: number): void {
    this.#holders[location] = none
    this.#live--
    // What is overwritten is counted, and erased together, by who does it.
    if (location === this.#going) return
    this.#counters.erased++
    this.#erase(location, 1)
  }

  forget(location: number): void {
    this.#holders[location] = leftOf(this.#owners!.poolOf(this.#holders[location]!))
    this.#live--
    this.#left++
    this.#counters.forgotten++
  }

  recover(key: number, enter: RecoverBlock): void {
    const again = this.#recovered.has(key)
    this.#recovered.add(key)
    if (this.#left === 0) return
    const left = leftOf(key)
    // The newest first: should a file have two of a page, the older one is no good.
    for (let n = this.#span - 1; n >= 0; n--) {
      const number = this.#numberOf(n)
      if (this.#holders[number] !== left) continue
      this.#left--
      const owner = again ? none : this.#enter(number, enter)
      this.#holders[number] = owner
      if (owner === none) this.#erase(number, 1)
      else {
        this.#live++
        this.#counters.recovered++
      }
    }
  }

  stats(): StatsNode {
    return {
      name: this.name,
      counters: {
        live: this.#live,
        left: this.#left,
        ...this.#counters,
        records: this.#capacity,
        ring_bytes: this.#ringUnits * unitBytes,
        abandoned: this.failure === undefined ? 0 : 1,
      },
      children: [],
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#file.close(this.failure !== undefined)
    return this.#closing
  }

  check(blocks: readonly { readonly location: number; readonly units: number }[]): void {
    let live = 0
    let end = Number.NEGATIVE_INFINITY
    for (let n = 0; n < this.#span; n++) {
      const number = this.#numberOf(n)
      if (this.#holders[number] === none) continue
      if (this.#holders[number]! >= 0) live++
      const position = this.#positions[number]!
      const isInside = position + this.#units[number]! <= this.#head && position >= this.#head - this.#ringUnits
      if (position < end || !isInside) throw new Error(`spill: record ${number} is out of order`)
      end = position + this.#units[number]!
    }
    for (const { location, units } of blocks)
      if (this.#holders[location]! < 0 || this.#units[location] !== units)
        throw new Error(`spill: no frame of ${units} units is at ${location}`)
    if (live !== blocks.length || live !== this.#live)
      throw new Error(`spill: ${live} frames, counted ${this.#live}, the stack knows ${blocks.length}`)
  }

  // ---- The ring ---------------------------------------------------------------------------------------------------

  /** Number of the record that is the n-th from the oldest one on. */
  #numberOf(n: number): number {
    const number = this.#oldest + n
    return number < this.#capacity ? number : number - this.#capacity
  }

  /** Unit of the ring at which a frame begins. */
  #unitOf(number: number): number {
    return this.#positions[number]! % this.#ringUnits
  }

  /** Gives frames their records and their room, and overwrites the oldest for it. What finds none has no location. */
  #place(flight: Flight): Placed {
    const from = this.#head
    // A write that is under way has its last block to itself.
    if (this.#writing > 0) this.#head = Math.ceil(from / unitsPerBlock) * unitsPerBlock
    const runs: Run[] = []
    let run: Run | undefined
    let first = none
    let count = 0
    let gone = none
    for (let n = 0; n < flight.count; n++) {
      const units = flight.units[n]!
      const at = flight.offsets[n]!
      const position = this.#positionFor(units)
      while (this.#isFull(position + units)) {
        const oldest = this.#oldest
        if (this.#holders[oldest] !== none) {
          if (!this.#overwrite(oldest)) break
          if (gone === none) gone = oldest
        }
        this.#oldest = this.#numberOf(1)
        this.#span--
      }
      if (units > this.#ringUnits || this.#isFull(position + units)) {
        flight.locations[n] = none
        continue
      }
      const number = this.#numberOf(this.#span++)
      if (first === none) first = number
      count++
      this.#head = position + units
      this.#positions[number] = position
      this.#units[number] = units
      this.#holders[number] = flight.owners[n]!
      this.#live++
      flight.locations[n] = number
      const unit = this.#unitOf(number)
      if (run !== undefined && run.unit + run.units === unit && run.at + run.units * unitBytes === at)
        run.units += units
      else {
        run = { at, unit, units }
        runs.push(run)
      }
    }
    if (gone !== none) this.#eraseTo(gone, this.#oldest)
    // What found no place leaves none behind it.
    if (count === 0) this.#head = from
    return { runs, first, count, from, to: this.#head }
  }

  /** Where in the ring a frame goes: not over its end. */
  #positionFor(units: number): number {
    const left = this.#ringUnits - (this.#head % this.#ringUnits)
    return units <= left ? this.#head : this.#head + left
  }

  /** Whether the oldest record is in the way of a frame that ends there. */
  #isFull(end: number): boolean {
    if (this.#span === 0) return false
    return this.#span === this.#capacity || this.#positions[this.#oldest]! < end - this.#ringUnits
  }

  /** Takes the oldest frame out of the stack. False: it is on its way here itself. */
  #overwrite(number: number): boolean {
    const holder = this.#holders[number]!
    if (holder < none) this.#left--
    else {
      this.#going = number
      const goes = this.#owners!.drop(holder, number)
      this.#going = none
      if (!goes) return false
      this.#counters.overwritten++
    }
    this.#holders[number] = none
    return true
  }

  /** Writes the records of a flight that is in the ring, of the pages that are still what was sent. */
  #commit(flight: Flight, { first, count, runs }: Placed): void {
    if (this.failure !== undefined) throw this.failure
    const owners = this.#owners!
    const record = this.#record
    this.#file.beginRecords(count)
    let written = 0
    for (let n = 0; n < flight.count; n++) {
      const number = flight.locations[n]!
      if (number === none) continue
      if (!owners.isCurrent(flight, n)) {
        this.#giveUp(flight, n)
        continue
      }
      const owner = flight.owners[n]!
      record.key = owners.poolOf(owner)
      record.object = owners.objectOf(owner)
      record.index = owners.indexOf(owner)
      record.position = this.#positions[number]!
      record.units = this.#units[number]!
      record.digest.set(digestOf(flight.bytes, flight.offsets[n]!, record.units * unitBytes))
      this.#digests.set(record.digest, number * digestBytes)
      this.#file.setRecord((number - first + this.#capacity) % this.#capacity, number, record)
      written++
    }
    if (written > 0) this.#writeRecords(first, count)
    this.#counters.written += written
    this.#counters.ring_writes += runs.length
    for (const { units } of runs) this.#counters.written_bytes += units * unitBytes
  }

  /** Writes records that were set. When that fails, none of them is there. */
  #writeRecords(first: number, count: number): void {
    const straight = Math.min(count, this.#capacity - first)
    try {
      this.#file.writeRecords(0, straight, first)
      if (straight < count) this.#file.writeRecords(straight, count - straight, 0)
    } catch (error) {
      this.#eraseTo(first, (first + count) % this.#capacity)
      throw error
    }
  }

  /** Gives a frame of a flight up that is not noted anywhere yet. */
  #giveUp(flight: Flight, n: number): void {
    this.#holders[flight.locations[n]!] = none
    this.#live--
    flight.locations[n] = none
  }

  /** Nothing of a flight is kept; answers why. */
  #undo(flight: Flight, { count, from, to }: Placed, error: unknown): unknown {
    this.#counters.write_errors++
    for (let n = 0; n < flight.count; n++) if (flight.locations[n] !== none) this.#giveUp(flight, n)
    // The next one tries the same place, and need not overwrite others for it.
    if (this.#head === to) {
      this.#head = from
      this.#span -= count
    }
    return error
  }

  // ---- Records ----------------------------------------------------------------------------------------------------

  /** Empties the records from one on up to another one. */
  #eraseTo(first: number, end: number): void {
    if (end > first) this.#erase(first, end - first)
    else {
      this.#erase(first, this.#capacity - first)
      if (end > 0) this.#erase(0, end)
    }
  }

  /** Empties records in the file. When that fails nothing in it may be believed again. */
  #erase(first: number, count: number): void {
    if (this.failure !== undefined) return
    try {
      this.#file.eraseRecords(first, count)
    } catch (error) {
      if (!(error instanceof Error)) throw error
      this.failure = error
      this.#counters.write_errors++
      if (!this.#file.disown())
        throw new TmemError(
          'TMEM_BROKEN',
          'spill: a page cannot be removed from the file, nor can the file: remove it',
          { layer: 'spill', cause: error },
        )
    }
  }

  #wasRead(location: number, units: number, into: Uint8Array): void {
    this.#counters.read_bytes += units * unitBytes
    const digest = digestOf(into, 0, units * unitBytes)
    for (let n = 0; n < digestBytes; n++)
      if (digest[n] !== this.#digests[location * digestBytes + n]) {
        this.#counters.corrupt_frames++
        throw new TmemError('TMEM_CORRUPT', 'what is in the file is not what was written', { layer: 'spill' })
      }
  }

  /** Enters a page that an earlier run has left: its owner, or `none`. */
  #enter(number: number, enter: RecoverBlock): number {
    const record = this.#record
    if (this.#file.readRecord(number, record) !== 'record' || record.position !== this.#positions[number]) {
      this.#counters.damaged_records++
      return none
    }
    return enter(record.object, record.index, number, record.units)
  }

  /** Takes over what the table says, as far as it can be true. */
  #adopt(): void {
    const record = this.#record
    let newest = none
    for (let number = 0; number < this.#capacity; number++) {
      const found = this.#file.readRecord(number, record)
      if (found === 'nothing') continue
      const { key, position, units } = record
      const fits = units > 0 && units <= this.#ringUnits && (position % this.#ringUnits) + units <= this.#ringUnits
      const isGood = found === 'record' && fits && Number.isSafeInteger(position) && position >= 0 && key <= mostKey
      if (!isGood) {
        this.#counters.damaged_records++
        this.#erase(number, 1)
        continue
      }
      this.#positions[number] = position
      this.#units[number] = units
      this.#holders[number] = leftOf(key)
      this.#digests.set(record.digest, number * digestBytes)
      if (newest === none || position > this.#positions[newest]!) newest = number
    }
    if (newest === none) return
    this.#head = this.#positions[newest]! + this.#units[newest]!
    this.#oldest = (newest + 1) % this.#capacity
    this.#span = this.#capacity
    // From the newest one back. What does not lie before those behind it is of another time.
    let end = this.#head
    for (let n = this.#capacity - 1; n >= 0; n--) {
      const number = this.#numberOf(n)
      if (this.#holders[number] === none) continue
      const position = this.#positions[number]!
      if (position + this.#units[number]! <= end && position >= this.#head - this.#ringUnits) {
        end = position
        this.#left++
        continue
      }
      this.#counters.damaged_records++
      this.#holders[number] = none
      this.#erase(number, 1)
    }
    // Numbers before the oldest one are free.
    while (this.#holders[this.#oldest] === none) {
      this.#oldest = this.#numberOf(1)
      this.#span--
    }
  }
}

/** What holds the record of a pool's page that nobody owns: a number below `none`. */
const leftOf = (key: number): number => -2 - key
/** Largest key of a pool. */
const mostKey = 2 ** 31 - 3
