/**
 * A swap file as a place of a stack: the regular way. Every page finds room in it, compressed as it comes or as it is.
 *
 * The file is a row of clusters of 128 KiB, counted in units. Which units are in use is one bit each. A flight goes to one free
 * cluster in one write, while there is one; else into holes that frames have left behind, whole blocks of them, so that nothing has to be
 * read to be written. Only when what is free lies in pieces smaller than that, the frames of the emptiest clusters are packed together
 * (`#pack`); and what still finds no place goes into any hole that fits.
 *
 * A swap area made by mkswap holds pages as they are, one to a slot of 4 KiB, and slot 0, its header, is left alone.
 *
 * Invariants: a unit is marked from the moment a flight is given it until its frame is freed, or the flight fails; a location is never given
 * out while a frame is there; room for `reservedBytes` of pages that do not shrink is there whatever is written and freed in which order.
 */
import {
  type Budget,
  type Flight,
  idle,
  type LayerContext,
  none,
  type Owners,
  type PlaceTraits,
  type Progress,
  type SlowPlace,
  type StatsNode,
  TmemError,
  unitsOf,
} from '@tmem/core'

/** What a swap place needs of a file: whole transfers, or the system's error. */
export interface SwapFile {
  readonly directIo: boolean
  write(bytes: Uint8Array, at: number, length: number, position: number): Promise<void>
  writeNow(bytes: Uint8Array, at: number, length: number, position: number): void
  read(into: Uint8Array, at: number, length: number, position: number): Promise<void>
  readNow(into: Uint8Array, at: number, length: number, position: number): void
  sync(): Promise<void>
  close(): Promise<void>
}

/** Bytes of a cluster: what one flight carries. */
export const clusterBytes: number = 128 * 1024
/** Bytes of the unit of compressed frames. */
export const frameUnitBytes = 128
/** Bytes of a page of the original, and of a slot. */
export const slotBytes = 4096

/** Holes of so many bytes are looked for first; and so many clusters are looked at for one flight. */
const goodHoleBytes = 16 * 1024
const clustersLookedAt = 64
/** Flights from this length on end with a whole block. */
const longFlightBytes = 32 * 1024
/** Clusters beyond what the pages need, so that there is something to pack into. */
const spareClusters = 4
const hourMs = 3_600_000

/** Units of a page that does not shrink, with its frame. */
const rawUnits = unitsOf(slotBytes, frameUnitBytes)

/** Bytes behind the header of a file that has room for so many bytes of pages. */
export function roomFor(sizeBytes: number): number {
  const bytes = (sizeBytes / slotBytes) * rawUnits * frameUnitBytes
  return (Math.ceil((bytes * 33) / 32 / clusterBytes) + spareClusters) * clusterBytes
}

export interface SwapPlaceOptions {
  readonly file: SwapFile
  readonly traits: PlaceTraits
  /** Byte of the file at which unit 0 is, and bytes from there on. */
  readonly from: number
  readonly roomBytes: number
  /** Pages as they are, in slots; the first of them is not ours. */
  readonly slots: boolean
  /** Most bytes that are written in any hour without need; needs the context's clock. */
  readonly bytesPerHour: number | undefined
}

export class SwapPlace implements SlowPlace {
  readonly name = 'frontswap'
  readonly traits: PlaceTraits
  readonly unitBytes: number
  readonly flightBytes: number = clusterBytes
  failure: Error | undefined
  readonly #file: SwapFile
  readonly #from: number
  readonly #units: number
  readonly #unitsPerCluster: number
  /** Units of a block of the file, which is what the disk writes. */
  readonly #unitsPerBlock: number
  readonly #clusters: number
  /** One bit per unit, and units in use per cluster. */
  readonly #map: Int32Array
  readonly #used: Uint32Array
  #usedUnits = 0
  #freeClusters: number
  /** Where free clusters, and holes, are looked for next. */
  #nextCluster = 0
  #nextHole = 0
  /** The rest of the cluster that is being filled, and the unit behind the run that was given last. */
  #openUnit = 0
  #openEnd = 0
  #lastUnit = 0
  readonly #first: number
  #owners: Owners | undefined
  /** Memory for packing: a cluster that is read, and one that is filled. */
  readonly #packing: Uint8Array
  readonly #bytesPerHour: number | undefined
  readonly #clock: (() => number) | undefined
  #allowance: number
  #allowanceAt = 0
  #frames = 0
  // Counters under their names in a swap area's statistics.
  #diskReads = 0
  #diskWrites = 0
  #diskBytesRead = 0
  #diskBytesWritten = 0
  #clusteredWrites = 0
  #holeWrites = 0
  #readErrors = 0
  #writeErrors = 0
  #packedFrames = 0
  #packedBytes = 0
  #fragmented = 0
  #forcedBytes = 0
  /** Runs of units that a flight was given: first unit, units, first frame, frames. */
  readonly #runs: number[] = []

  /** It owns the file. Throws `TmemError` (`TMEM_NO_MEMORY`) when the allocator has no memory for its tables; then the file is closed. */
  constructor(options: SwapPlaceOptions, { allocator, clock }: LayerContext) {
    const { file, traits, from, roomBytes, slots, bytesPerHour } = options
    this.traits = traits
    this.#file = file
    this.#from = from
    this.unitBytes = slots ? slotBytes : frameUnitBytes
    this.#unitsPerCluster = clusterBytes / this.unitBytes
    this.#unitsPerBlock = slotBytes / this.unitBytes
    this.#units = Math.floor(roomBytes / this.unitBytes)
    this.#clusters = Math.ceil(this.#units / this.#unitsPerCluster)
    this.#bytesPerHour = clock === undefined ? undefined : bytesPerHour
    this.#clock = clock
    this.#allowance = bytesPerHour ?? 0
    this.#allowanceAt = clock?.() ?? 0
    const bits = this.#clusters * this.#unitsPerCluster
    const bytes = bits / 8 + this.#clusters * 4
    const memory = allocator.allocate(bytes + (slots ? 0 : 2 * clusterBytes), 'frontswap.map')
    if (memory === undefined) {
      // A rejection of this close surfaces as an unhandled one, beside the error that is thrown here.
      void file.close()
      throw new TmemError('TMEM_NO_MEMORY', `no memory for the map of a swap file (${bytes} bytes)`, {
        layer: 'frontswap',
      })
    }
    this.#map = new Int32Array(memory, 0, bits / 32)
    this.#used = new Uint32Array(memory, bits / 8, this.#clusters)
    this.#packing = new Uint8Array(memory, bytes, slots ? 0 : 2 * clusterBytes)
    this.#freeClusters = this.#clusters
    this.#first = slots ? 1 : 0
    // What is not there, or not ours, is taken for good.
    if (slots) this.#mark(0, 1)
    for (let unit = this.#units; unit < bits; unit++) this.#mark(unit, 1)
  }

  attach(owners: Owners): void {
    this.#owners = owners
  }

  open(forced: boolean): boolean {
    if (forced || this.#bytesPerHour === undefined) return true
    const now = this.#clock!()
    const earned = (this.#bytesPerHour / hourMs) * (now - this.#allowanceAt)
    this.#allowance = Math.min(this.#bytesPerHour, this.#allowance + earned)
    this.#allowanceAt = now
    return this.#allowance >= clusterBytes
  }

  async write(flight: Flight): Promise<void> {
    const runs = this.#place(flight)
    const writes: Promise<void>[] = []
    for (let n = 0; n < runs.length; n += 4) writes.push(this.#writeRun(flight, runs, n))
    const results = await Promise.allSettled(writes)
    for (const result of results) if (result.status === 'rejected') throw this.#failed(flight, result.reason)
    this.#allowance -= flight.filled
  }

  writeNow(flight: Flight): void {
    const runs = this.#place(flight)
    this.#forcedBytes += flight.filled
    try {
      for (let n = 0; n < runs.length; n += 4) {
        const { at, length, position } = this.#extent(flight, runs, n)
        this.#countWrite(length, runs[n + 3]!)
        this.#file.writeNow(flight.bytes, at, length, position)
      }
    } catch (error) {
      throw this.#failed(flight, error)
    }
  }

  async read(location: number, units: number, into: Uint8Array): Promise<void> {
    this.#countRead(units)
    try {
      await this.#file.read(into, 0, units * this.unitBytes, this.#positionOf(location))
    } catch (error) {
      this.#readErrors++
      throw error
    }
  }

  readNow(location: number, units: number, into: Uint8Array): void {
    this.#countRead(units)
    try {
      this.#file.readNow(into, 0, units * this.unitBytes, this.#positionOf(location))
    } catch (error) {
      this.#readErrors++
      throw error
    }
  }

  free(location: number, units: number): void {
    this.#unmark(location, units)
    this.#frames--
  }

  sync(): Promise<void> {
    return this.#file.sync()
  }

  stats(): StatsNode {
    const slots = this.traits.reservedBytes / slotBytes
    return {
      name: this.name,
      counters: {
        slots,
        used_slots: this.#frames,
        frames: this.#frames,
        used_bytes_on_disk: this.#usedUnits * this.unitBytes,
        room_bytes_on_disk: this.#units * this.unitBytes,
        free_clusters: this.#freeClusters,
        directIo: this.#file.directIo ? 1 : 0,
        diskReads: this.#diskReads,
        diskWrites: this.#diskWrites,
        diskBytesRead: this.#diskBytesRead,
        diskBytesWritten: this.#diskBytesWritten,
        clusteredWrites: this.#clusteredWrites,
        holeWrites: this.#holeWrites,
        forcedBytesWritten: this.#forcedBytes,
        packedFrames: this.#packedFrames,
        packedBytes: this.#packedBytes,
        readErrors: this.#readErrors,
        writeErrors: this.#writeErrors,
        fragmented: this.#fragmented,
        map_bytes: this.#map.byteLength + this.#used.byteLength,
      },
      children: [],
    }
  }

  close(): Promise<void> {
    return this.#file.close()
  }

  check(blocks: readonly { readonly location: number; readonly units: number }[]): void {
    const seen = new Uint8Array(this.#clusters * this.#unitsPerCluster)
    seen.fill(1, 0, this.#first)
    seen.fill(1, this.#units)
    for (const { location, units } of blocks)
      for (let unit = location; unit < location + units; unit++) {
        if (seen[unit] === 1) throw new Error(`frontswap: unit ${unit} is in two frames`)
        seen[unit] = 1
      }
    for (let unit = 0; unit < seen.length; unit++)
      if (this.#isUsed(unit) !== (seen[unit] === 1)) throw new Error(`frontswap: unit ${unit} is marked wrongly`)
    if (blocks.length !== this.#frames) throw new Error(`frontswap: ${blocks.length} frames, counted ${this.#frames}`)
  }

  // ---- Finding room -----------------------------------------------------------------------------------------------

  /** Gives the frames of a flight their locations; answers the runs that have to be written. */
  #place(flight: Flight): readonly number[] {
    const runs = this.#runs
    runs.length = 0
    let frame = this.#fillOpen(flight, 0)
    if (frame < flight.count) frame = this.#fillFree(flight, frame, 1)
    if (frame < flight.count) frame = this.#fillHoles(flight, frame, goodHoleBytes / this.unitBytes, true)
    if (frame < flight.count) frame = this.#fillHoles(flight, frame, this.#unitsPerBlock, true)
    if (frame < flight.count) {
      this.#fragmented++
      this.#pack()
      frame = this.#fillFree(flight, frame, 1)
    }
    // What is left has to be read to be written, in part: the last way.
    if (frame < flight.count) frame = this.#fillHoles(flight, frame, 1, false)
    for (; frame < flight.count; frame++) flight.locations[frame] = none
    return runs.slice()
  }

  /** A cluster of which nothing is in use, while more than `kept` are there; or `none`. */
  #freeCluster(kept: number): number {
    if (this.#freeClusters <= kept) return none
    while (this.#used[this.#nextCluster] !== 0) this.#nextCluster = (this.#nextCluster + 1) % this.#clusters
    return this.#nextCluster
  }

  /** Places frames behind those that came last, in the cluster that is being filled. */
  #fillOpen(flight: Flight, first: number): number {
    const next = this.#fill(flight, first, this.#openUnit, this.#openEnd - this.#openUnit, isLong(flight))
    if (next > first) this.#openUnit = this.#lastUnit
    return next
  }

  /** Places frames into free clusters, while more than `kept` are there; answers the first that found no place. */
  #fillFree(flight: Flight, first: number, kept: number): number {
    let frame = first
    while (frame < flight.count) {
      const cluster = this.#freeCluster(kept)
      if (cluster === none) return frame
      this.#openUnit = cluster * this.#unitsPerCluster
      this.#openEnd = this.#openUnit + this.#unitsPerCluster
      const next = this.#fillOpen(flight, frame)
      if (next === frame) return frame
      frame = next
    }
    return frame
  }

  /**
   * Places frames from `frame` on into free units; answers the first that found no place. `whole`: the last frame takes the rest of its block,
   * so that the write need not read what is there.
   */
  #fill(flight: Flight, frame: number, unit: number, units: number, whole: boolean): number {
    let next = frame
    let left = units
    while (next < flight.count && flight.units[next]! <= left) left -= flight.units[next++]!
    if (next === frame) return frame
    let at = unit
    for (let n = frame; n < next; n++) {
      flight.locations[n] = at
      at += flight.units[n]!
    }
    if (whole) {
      const end = flight.offsets[next - 1]! + flight.units[next - 1]! * this.unitBytes
      // No further than the flight's memory, out of which it is written.
      const rest = Math.min(
        (this.#unitsPerBlock - (at % this.#unitsPerBlock)) % this.#unitsPerBlock,
        (flight.bytes.length - end) / this.unitBytes,
      )
      flight.units[next - 1] = flight.units[next - 1]! + rest
      at += rest
    }
    this.#lastUnit = at
    this.#mark(unit, at - unit)
    this.#frames += next - frame
    this.#runs.push(unit, at - unit, frame, next - frame)
    return next
  }

  /** Fills holes of at least `least` units; `whole`: only blocks that are free as a whole. The last free cluster is kept for packing. */
  #fillHoles(flight: Flight, first: number, least: number, whole: boolean): number {
    let frame = first
    const looked = Math.min(this.#clusters, whole ? clustersLookedAt : this.#clusters)
    for (let left = looked; left > 0 && frame < flight.count; left--) {
      const cluster = this.#nextHole
      this.#nextHole = cluster + 1 === this.#clusters ? 0 : cluster + 1
      const base = cluster * this.#unitsPerCluster
      const free = this.#unitsPerCluster - this.#used[cluster]!
      // The cluster that is being filled has no holes yet.
      if (this.#openEnd === base + this.#unitsPerCluster) continue
      if (free < Math.max(least, flight.units[frame]!) || (this.#used[cluster] === 0 && this.#freeClusters === 1))
        continue
      for (let unit = base; unit < base + this.#unitsPerCluster && frame < flight.count; ) {
        if (this.#isUsed(unit)) {
          unit++
          continue
        }
        let end = unit
        while (end < base + this.#unitsPerCluster && !this.#isUsed(end)) end++
        const from = whole ? Math.ceil(unit / this.#unitsPerBlock) * this.#unitsPerBlock : unit
        const to = whole ? Math.floor(end / this.#unitsPerBlock) * this.#unitsPerBlock : end
        if (to - from >= least) frame = this.#fill(flight, frame, from, to - from, whole)
        unit = end
      }
    }
    return frame
  }

  /**
   * Packs the frames of the emptiest clusters together, until a cluster is free: it reads and writes before it returns. What fails leaves
   * everything where it is.
   */
  #pack(): void {
    const owners = this.#owners
    if (owners === undefined || this.#freeClusters === 0 || this.unitBytes === slotBytes) return
    const target = this.#freeCluster(0)
    if (target === none) return
    // What was being filled is as any other from now on.
    this.#openUnit = this.#openEnd = 0
    const from = this.#packing.subarray(0, clusterBytes)
    const to = this.#packing.subarray(clusterBytes)
    const base = target * this.#unitsPerCluster
    let filled = 0
    const moves: number[] = []
    for (let left = 16; left > 0; left--) {
      const source = this.#emptiest(target, moves)
      if (source === none || filled === this.#unitsPerCluster) break
      try {
        this.#file.readNow(from, 0, clusterBytes, this.#positionOf(source * this.#unitsPerCluster))
      } catch (error) {
        this.#readErrors++
        this.#cannotPack(error)
        break
      }
      this.#diskReads++
      this.#diskBytesRead += clusterBytes
      const before = filled
      filled = this.#gather(source, from, to, filled, base, moves)
      moves.push(-1 - source)
      if (filled === before) break
    }
    if (filled === 0) return
    this.#countWrite(filled * this.unitBytes, moves.length)
    this.#packedBytes += filled * this.unitBytes
    try {
      this.#file.writeNow(to, 0, filled * this.unitBytes, this.#positionOf(base))
    } catch (error) {
      this.#writeErrors++
      this.#cannotPack(error)
      return
    }
    this.#mark(base, filled)
    for (let n = 0; n < moves.length; ) {
      if (moves[n]! < 0) {
        n++
        continue
      }
      const [owner, old, held, at, units] = moves.slice(n, n + 5) as [number, number, number, number, number]
      n += 5
      this.#packedFrames++
      if (owners.moved(owner, old, at, units)) this.#unmark(old, held)
      else this.#unmark(at, units)
    }
  }

  /** Packing is not the only way: whoever needed it goes on without. */
  #cannotPack(error: unknown): void {
    if (!(error instanceof Error)) throw error
    this.failure = error
  }

  /** Copies the frames of a cluster behind those that are gathered. */
  #gather(cluster: number, from: Uint8Array, to: Uint8Array, start: number, base: number, moves: number[]): number {
    const view = new DataView(from.buffer, from.byteOffset, from.length)
    const first = cluster * this.#unitsPerCluster
    let filled = start
    for (let unit = first; unit < first + this.#unitsPerCluster; ) {
      if (!this.#isUsed(unit)) {
        unit++
        continue
      }
      const at = (unit - first) * this.unitBytes
      const owner = view.getInt32(at + 12, true)
      const held = this.#owners!.unitsAt(owner, unit)
      const units = unitsOf((view.getUint32(at + 4, true) & 0xffff) + 1, this.unitBytes)
      // Nobody's header, or a damaged one: whose frame it is cannot be told, or where it ends.
      if (held === 0 || units > held) {
        unit++
        continue
      }
      if (filled + units > this.#unitsPerCluster) return filled
      to.set(from.subarray(at, at + units * this.unitBytes), filled * this.unitBytes)
      moves.push(owner, unit, held, base + filled, units)
      filled += units
      unit += held
    }
    return filled
  }

  /** The cluster with the fewest units in use, but not `target`, nor one that was gathered. */
  #emptiest(target: number, moves: readonly number[]): number {
    let best = none
    for (let cluster = 0; cluster < this.#clusters; cluster++) {
      const used = this.#used[cluster]!
      if (used === 0 || cluster === target || moves.includes(-1 - cluster)) continue
      if (best === none || used < this.#used[best]!) best = cluster
    }
    return best
  }

  #isUsed(unit: number): boolean {
    return ((this.#map[unit >>> 5]! >>> (unit & 31)) & 1) === 1
  }

  #mark(unit: number, units: number): void {
    for (let n = unit; n < unit + units; n++) this.#map[n >>> 5] = this.#map[n >>> 5]! | (1 << (n & 31))
    for (let n = unit; n < unit + units; ) {
      const cluster = Math.floor(n / this.#unitsPerCluster)
      const part = Math.min(unit + units, (cluster + 1) * this.#unitsPerCluster) - n
      if (this.#used[cluster] === 0) this.#freeClusters--
      this.#used[cluster] = this.#used[cluster]! + part
      n += part
    }
    this.#usedUnits += units
  }

  #unmark(unit: number, units: number): void {
    for (let n = unit; n < unit + units; n++) this.#map[n >>> 5] = this.#map[n >>> 5]! & ~(1 << (n & 31))
    const cluster = Math.floor(unit / this.#unitsPerCluster)
    this.#used[cluster] = this.#used[cluster]! - units
    if (this.#used[cluster] === 0) this.#freeClusters++
    this.#usedUnits -= units
  }

  // ---- Transfers --------------------------------------------------------------------------------------------------

  #positionOf(unit: number): number {
    return this.#from + unit * this.unitBytes
  }

  #extent(
    flight: Flight,
    runs: readonly number[],
    n: number,
  ): { readonly at: number; readonly length: number; readonly position: number } {
    const frame = runs[n + 2]!
    return {
      at: flight.offsets[frame]!,
      length: runs[n + 1]! * this.unitBytes,
      position: this.#positionOf(runs[n]!),
    }
  }

  #writeRun(flight: Flight, runs: readonly number[], n: number): Promise<void> {
    const { at, length, position } = this.#extent(flight, runs, n)
    this.#countWrite(length, runs[n + 3]!)
    return this.#file.write(flight.bytes, at, length, position)
  }

  #countWrite(length: number, frames: number): void {
    this.#diskWrites++
    this.#diskBytesWritten += length
    if (frames > 1) this.#clusteredWrites++
    else this.#holeWrites++
  }

  #countRead(units: number): void {
    this.#diskReads++
    this.#diskBytesRead += units * this.unitBytes
  }

  /** A flight failed: its units are free again. */
  #failed(flight: Flight, error: unknown): unknown {
    this.#writeErrors++
    for (let n = 0; n < flight.count; n++) {
      const location = flight.locations[n]!
      if (location === none) continue
      this.free(location, flight.units[n]!)
      flight.locations[n] = none
    }
    return error
  }

  tick(_budget: Budget): Progress {
    return idle
  }
}

/** Whether the rest of a block is worth less than reading the block to write it. */
const isLong = ({ filled }: Flight): boolean => filled >= longFlightBytes
