/**
 * A swap file as a place of a stack: the regular way. Every page finds room in it, compressed as it comes or as it is.
 *
 * The file is a row of clusters for 128 KiB of pages each, counted in units. Which units are in use is one bit each. A
 * flight goes behind the last one or to a free cluster, in one write, while there is one. Else it fills holes that
 * frames have left behind: its frames are put into an order in which they fill them exactly, first those of whole
 * blocks, in the clusters that were filled longest ago; so that little more is written than the frames have, and
 * nothing has to be read for it. Only when those are used up, holes are filled of which the blocks at the ends have to
 * be read and written again, the cheapest first; then the frames of the emptiest clusters are packed together
 * (`#pack`); and what still finds no place goes into any hole that fits.
 *
 * A swap area made by mkswap holds pages as they are, one to a slot of 4 KiB, and slot 0, its header, is left alone.
 *
 * Invariants: a unit is marked from the moment a flight is given it until its frame is freed, or the flight fails; a
 * location is never given out while a frame is there; room for `reservedBytes` of pages that do not shrink is there
 * whatever is written and freed in which order.
 */
import {
  type Budget,
  type Flight,
  frameBytes,
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
import type { PageFileCounters } from '@tmem/page-file'

/** What a swap place needs of a file: whole transfers, or the system's error. A `PageFile` is one. */
export interface SwapFile {
  readonly directIo: boolean
  /**
   * Transfers of the system so far, those included that a write of part of a block needs (default: they are not told).
   */
  readonly counters?: Readonly<PageFileCounters>
  write(bytes: Uint8Array, at: number, length: number, position: number): Promise<void>
  /** Not for blocks to which a write is under way. */
  writeNow(bytes: Uint8Array, at: number, length: number, position: number): void
  read(into: Uint8Array, at: number, length: number, position: number): Promise<void>
  readNow(into: Uint8Array, at: number, length: number, position: number): void
  sync(): Promise<void>
  close(): Promise<void>
}

const noTransfers: Pick<PageFileCounters, 'reads' | 'writes' | 'readBytes' | 'writtenBytes'> = {
  reads: 0,
  writes: 0,
  readBytes: 0,
  writtenBytes: 0,
}

/** Bytes of the pages that a cluster has room for, and one flight carries. */
const clusterPageBytes = 128 * 1024
/** Bytes of the unit of compressed frames. */
export const frameUnitBytes = 128
/** Bytes of a page of the original, and of a slot. */
export const slotBytes = 4096

/** Holes of so many bytes are looked for first; and so many clusters are looked at for one flight. */
const goodHoleBytes = 16 * 1024
const clustersLookedAt = 64
/**
 * What is written for a unit, where blocks have to be written again: cheap holes are filled first, then frames are
 * packed.
 */
const holeCosts: readonly number[] = [1.25, 1.5, 2]
/** Frames of which those are chosen that fill a hole best. */
const framesTried = 64
/** How often packing is tried for one flight. */
const packsAtOnce = 8
/** Flights from this length on end with a whole block. */
const longFlightBytes = 32 * 1024
/** Clusters beyond what the pages need, so that there is something to pack into. */
const spareClusters = 4
const hourMs = 3_600_000

/** Units of a page that does not shrink, with its frame. */
const rawUnits = unitsOf(slotBytes, frameUnitBytes)
/** Bytes of a cluster of frames: when nothing shrinks, there is room for its pages, be they of 4 KiB or of 64. */
export const clusterBytes: number = (clusterPageBytes / slotBytes) * rawUnits * frameUnitBytes

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
  readonly flightBytes: number
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
  /**
   * One bit per block: a write to it is under way. Another one would have to wait for it, which a write that blocks
   * cannot do.
   */
  readonly #busy: Int32Array
  #usedUnits = 0
  #freeClusters: number
  /** Where free clusters, and holes, are looked for next. */
  #nextCluster = 0
  #nextHole = 0
  /** The rest of the cluster that is being filled. */
  #openUnit = 0
  #openEnd = 0
  readonly #first: number
  readonly #keptClusters: number
  #owners: Owners | undefined
  /** Memory for packing: a cluster that is read, and one that is filled. */
  readonly #packing: Uint8Array
  readonly #bytesPerHour: number | undefined
  readonly #clock: (() => number) | undefined
  #allowance: number
  #allowanceAt = 0
  #frames = 0
  /** What the file had moved when it was opened. */
  readonly #before: typeof noTransfers
  /** Runs that were written for flights: of several frames, and of one. */
  #clusteredWrites = 0
  #holeWrites = 0
  #readErrors = 0
  #writeErrors = 0
  #packedFrames = 0
  #packedBytes = 0
  #fragmented = 0
  #forcedBytes = 0
  /**
   * The flight that is being placed: its frames, first those that have a place in the order in which they are written,
   * then those that are left; and the runs of units that they were given: first unit, units.
   */
  readonly #order: Uint16Array = new Uint16Array(clusterBytes / frameBytes)
  #placed = 0
  #left = 0
  readonly #runs: number[] = []
  /** For choosing frames: by sum of units, who reached it; and who was chosen. */
  readonly #reached: Uint16Array
  readonly #chosen: Uint16Array = new Uint16Array(framesTried)

  /**
   * It owns the file. Throws `TmemError` (`TMEM_NO_MEMORY`) when the allocator has no memory for its tables; then the
   * file is closed.
   */
  constructor(options: SwapPlaceOptions, { allocator, clock }: LayerContext) {
    const { file, traits, from, roomBytes, slots, bytesPerHour } = options
    this.traits = traits
    this.#file = file
    this.#before = { ...(file.counters ?? noTransfers) }
    this.#from = from
    this.unitBytes = slots ? slotBytes : frameUnitBytes
    this.flightBytes = slots ? clusterPageBytes : clusterBytes
    this.#unitsPerCluster = this.flightBytes / this.unitBytes
    this.#unitsPerBlock = slotBytes / this.unitBytes
    this.#units = Math.floor(roomBytes / this.unitBytes)
    this.#clusters = Math.ceil(this.#units / this.#unitsPerCluster)
    this.#bytesPerHour = clock === undefined ? undefined : bytesPerHour
    this.#clock = clock
    this.#allowance = bytesPerHour ?? 0
    this.#allowanceAt = clock?.() ?? 0
    const bits = this.#clusters * this.#unitsPerCluster
    const busyWords = Math.ceil(bits / this.#unitsPerBlock / 32)
    const bytes = bits / 8 + (this.#clusters + busyWords) * 4
    const memory = allocator.allocate(bytes + 2 * clusterBytes, 'frontswap.map')
    if (memory === undefined) {
      // A rejection of this close surfaces as an unhandled one, beside the error that is thrown here.
      void file.close()
      throw new TmemError('TMEM_NO_MEMORY', `no memory for the map of a swap file (${bytes} bytes)`, {
        layer: 'frontswap',
      })
    }
    this.#map = new Int32Array(memory, 0, bits / 32)
    this.#used = new Uint32Array(memory, bits / 8, this.#clusters)
    this.#busy = new Int32Array(memory, bits / 8 + this.#clusters * 4, busyWords)
    this.#packing = new Uint8Array(memory, bytes, 2 * clusterBytes)
    this.#reached = new Uint16Array(this.#unitsPerCluster + 1)
    this.#freeClusters = this.#clusters
    this.#first = slots ? 1 : 0
    this.#keptClusters = slots ? 0 : 1
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
    return this.#allowance >= this.flightBytes
  }

  async write(flight: Flight): Promise<void> {
    this.#place(flight)
    const runs = this.#runs.slice()
    const order = this.#order.slice(0, flight.count)
    const writes: Promise<void>[] = []
    this.#arrange(flight, order, false)
    for (let n = 0, at = 0; n < runs.length; n += 2) {
      const unit = runs[n]!
      const units = runs[n + 1]!
      this.#setBusy(unit, units, true)
      writes.push(this.#file.write(flight.bytes, at, this.#lengthOf(flight, unit, units, at), this.#positionOf(unit)))
      at += units * this.unitBytes
    }
    const results = await Promise.allSettled(writes)
    // The flight is its sender's: it is as it came.
    this.#arrange(flight, order, true)
    for (let n = 0; n < runs.length; n += 2) this.#setBusy(runs[n]!, runs[n + 1]!, false)
    for (const result of results) if (result.status === 'rejected') throw this.#failed(flight, result.reason)
    this.#allowance -= flight.filled
  }

  writeNow(flight: Flight): void {
    this.#place(flight)
    const runs = this.#runs
    const order = this.#order.subarray(0, flight.count)
    this.#forcedBytes += flight.filled
    this.#arrange(flight, order, false)
    try {
      for (let n = 0, at = 0; n < runs.length; n += 2) {
        const unit = runs[n]!
        const units = runs[n + 1]!
        this.#file.writeNow(flight.bytes, at, this.#lengthOf(flight, unit, units, at), this.#positionOf(unit))
        at += units * this.unitBytes
      }
    } catch (error) {
      throw this.#failed(flight, error)
    } finally {
      this.#arrange(flight, order, true)
    }
  }

  async read(location: number, units: number, into: Uint8Array): Promise<void> {
    try {
      await this.#file.read(into, 0, units * this.unitBytes, this.#positionOf(location))
    } catch (error) {
      this.#readErrors++
      throw error
    }
  }

  readNow(location: number, units: number, into: Uint8Array): void {
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
    const before = this.#before
    const moved = this.#file.counters ?? noTransfers
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
        diskReads: moved.reads - before.reads,
        diskWrites: moved.writes - before.writes,
        diskBytesRead: moved.readBytes - before.readBytes,
        diskBytesWritten: moved.writtenBytes - before.writtenBytes,
        clusteredWrites: this.#clusteredWrites,
        holeWrites: this.#holeWrites,
        forcedBytesWritten: this.#forcedBytes,
        packedFrames: this.#packedFrames,
        packedBytes: this.#packedBytes,
        readErrors: this.#readErrors,
        writeErrors: this.#writeErrors,
        fragmented: this.#fragmented,
        map_bytes: this.#map.byteLength + this.#used.byteLength + this.#busy.byteLength,
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

  /** Gives the frames of a flight their locations, in runs that can be written. What finds no place is refused. */
  #place(flight: Flight): void {
    this.#runs.length = 0
    this.#placed = 0
    this.#left = flight.count
    for (let n = 0; n < flight.count; n++) this.#order[n] = n
    const block = this.#unitsPerBlock
    this.#fillOpen(flight)
    this.#fillFree(flight)
    // Whole blocks cost no read, and nothing that is written twice.
    this.#fillHoles(flight, goodHoleBytes / this.unitBytes, true, 17 / 16)
    this.#fillHoles(flight, block, true, 17 / 16)
    if (this.#left > 0) this.#makeRoom(flight)
    for (let n = 0; n < this.#left; n++) flight.locations[this.#order[this.#placed + n]!] = none
  }

  /** Places what is left where something else has to be written again for it: the cheapest first. */
  #makeRoom(flight: Flight): void {
    this.#fragmented++
    for (const cost of holeCosts) this.#fillHoles(flight, 1, false, cost)
    for (let n = 0; n < packsAtOnce && this.#left > 0 && this.#pack(); n++) this.#fillFree(flight)
    this.#fillHoles(flight, 1, false, Number.POSITIVE_INFINITY)
    // Where there is hardly more room than for what is here, packing makes longer holes.
    for (let n = 0; n < packsAtOnce && this.#left > 0 && this.#pack(); n++) {
      this.#fillFree(flight)
      this.#fillHoles(flight, 1, false, Number.POSITIVE_INFINITY)
    }
  }

  /** Places frames behind those that came last, in the cluster that is being filled. */
  #fillOpen(flight: Flight): void {
    if (this.#left === 0 || this.#openUnit === this.#openEnd) return
    const start = this.#openUnit % this.#unitsPerBlock
    const inBlock = start !== 0 && (flight.filled >= longFlightBytes || this.#isBusy(this.#openUnit))
    const from = inBlock ? this.#openUnit + this.#unitsPerBlock - start : this.#openUnit
    this.#openUnit = this.#fill(flight, from, this.#openEnd, Number.POSITIVE_INFINITY)
  }

  /** Places frames into free clusters, but for the one that is kept for packing. */
  #fillFree(flight: Flight): void {
    while (this.#left > 0 && this.#freeClusters > this.#keptClusters) {
      const before = this.#left
      this.#openUnit = this.#freeCluster() * this.#unitsPerCluster
      this.#openEnd = this.#openUnit + this.#unitsPerCluster
      this.#fillOpen(flight)
      if (this.#left === before) return
    }
  }

  /** A cluster of which nothing is in use; there is one. */
  #freeCluster(): number {
    while (this.#used[this.#nextCluster] !== 0) this.#nextCluster = (this.#nextCluster + 1) % this.#clusters
    return this.#nextCluster
  }

  /**
   * Fills holes of at least `least` units, from where it ended last time: what was filled longest ago has the largest
   * holes. `whole`: only of blocks that are free as a whole. `cost`: the most units that are written for each that is
   * filled; without a limit all of the file is looked at.
   */
  #fillHoles(flight: Flight, least: number, whole: boolean, cost: number): void {
    const block = this.#unitsPerBlock
    const clusters = cost === Number.POSITIVE_INFINITY ? this.#clusters : clustersLookedAt
    let smallest = this.#smallest(flight)
    for (let left = Math.min(this.#clusters, clusters); left > 0 && this.#left > 0; left--) {
      const cluster = this.#nextHole
      this.#nextHole = cluster + 1 === this.#clusters ? 0 : cluster + 1
      const base = cluster * this.#unitsPerCluster
      const end = base + this.#unitsPerCluster
      // The cluster that is being filled has no holes yet; the last free one is kept for packing.
      if (this.#openUnit < this.#openEnd && this.#openEnd === end) continue
      if (this.#unitsPerCluster - this.#used[cluster]! < Math.max(least, smallest)) continue
      if (this.#used[cluster] === 0 && this.#freeClusters === this.#keptClusters) continue
      for (let unit = this.#nextFree(base, end); unit < end && this.#left > 0; ) {
        const to = this.#nextUsed(unit, end)
        const start = unit % block
        const rest = to % block
        const from = start !== 0 && (whole || this.#isBusy(unit)) ? unit + block - start : unit
        const until = rest !== 0 && (whole || this.#isBusy(to)) ? to - rest : to
        if (until - from >= Math.max(least, smallest) && this.#fill(flight, from, until, cost) > from)
          smallest = this.#smallest(flight)
        unit = this.#nextFree(to, end)
      }
    }
  }

  /** Units of the smallest frame that has no place yet. */
  #smallest(flight: Flight): number {
    let units = Number.POSITIVE_INFINITY
    for (let n = 0; n < this.#left; n++) units = Math.min(units, flight.units[this.#order[this.#placed + n]!]!)
    return units
  }

  /**
   * Places those frames into free units that fill them best; answers where they end. None at all, when more than `cost`
   * units would have to be written for each.
   */
  #fill(flight: Flight, from: number, to: number, cost: number): number {
    const taken = this.#choose(flight, to - from)
    if (taken === 0) return from
    const first = this.#placed
    let end = from
    for (let n = first; n < first + taken; n++) end += flight.units[this.#order[n]!]!
    const block = this.#unitsPerBlock
    const written = Math.ceil(end / block) * block - from + (from % block)
    // What the last frame leaves of its block is lost anywhere.
    if (written > cost * (end - from) + (taken === this.#left ? block : 0)) return from
    for (let n = first, at = from; n < first + taken; n++) {
      const frame = this.#order[n]!
      flight.locations[frame] = at
      at += flight.units[frame]!
    }
    this.#placed += taken
    this.#left -= taken
    this.#mark(from, end - from)
    this.#frames += taken
    this.#runs.push(from, end - from)
    if (taken > 1) this.#clusteredWrites++
    else this.#holeWrites++
    return end
  }

  /**
   * Brings those frames to the front of what is left whose units add up to as many as possible, but not more than
   * `room`; how many they are. Which sums can be had is found by adding one frame after the other.
   */
  #choose(flight: Flight, room: number): number {
    const order = this.#order
    const first = this.#placed
    const last = first + this.#left
    let sum = 0
    for (let n = first; n < last && sum <= room; n++) sum += flight.units[order[n]!]!
    if (sum <= room) return this.#left
    // By sum: which frame reached it first.
    const reached = this.#reached
    reached.fill(0, 0, room + 1)
    let best = 0
    for (let n = first; n < Math.min(last, first + framesTried) && best < room; n++) {
      const units = flight.units[order[n]!]!
      // From above, so that no frame is added twice.
      for (let s = Math.min(best, room - units); s >= 0; s--)
        if ((s === 0 || reached[s] !== 0) && reached[s + units] === 0) reached[s + units] = n - first + 1
      for (let s = Math.min(room, best + units); s > best; s--) if (reached[s] !== 0) best = s
    }
    // The last that were added have the highest numbers: moving them to the front one by one leaves the others where
    // they are.
    let taken = 0
    for (let s = best; s > 0; ) {
      const n = first + reached[s]! - 1
      s -= flight.units[order[n]!]!
      this.#chosen[taken++] = n
    }
    for (let n = taken - 1, to = first; n >= 0; n--, to++) {
      const from = this.#chosen[n]!
      const frame = order[from]!
      order.copyWithin(to + 1, to, from)
      order[to] = frame
    }
    return taken
  }

  /** Brings the frames of a flight into the order in which they are written, or `back` into that in which they came. */
  #arrange(flight: Flight, order: Uint16Array, back: boolean): void {
    if (order.every((frame, n) => frame === n)) return
    const staged = this.#packing.subarray(0, flight.filled)
    staged.set(flight.bytes.subarray(0, flight.filled))
    let at = 0
    for (const frame of order) {
      const offset = flight.offsets[frame]!
      const bytes = flight.units[frame]! * this.unitBytes
      const from = back ? at : offset
      flight.bytes.set(staged.subarray(from, from + bytes), back ? offset : at)
      at += bytes
    }
  }

  /**
   * Packs the frames of the emptiest clusters together, so that clusters become free: it reads and writes before it
   * returns. What fails leaves everything where it is. False: there is nothing to gain.
   */
  #pack(): boolean {
    const owners = this.#owners
    // A page in a slot does not say whose it is.
    if (owners === undefined || this.#keptClusters === 0 || this.#freeClusters === 0) return false
    const target = this.#freeCluster()
    // What was being filled is as any other from now on.
    this.#openUnit = this.#openEnd = 0
    const from = this.#packing.subarray(0, clusterBytes)
    const to = this.#packing.subarray(clusterBytes)
    const base = target * this.#unitsPerCluster
    const freeBefore = this.#freeClusters
    let filled = 0
    const moves: number[] = []
    const sources: number[] = []
    const stuck: number[] = []
    for (let left = 16; left > 0; left--) {
      const source = this.#emptiest([target, ...sources, ...stuck])
      // The last page's worth is left to frames that are smaller.
      if (source === none || filled + rawUnits > this.#unitsPerCluster) break
      try {
        this.#file.readNow(from, 0, clusterBytes, this.#positionOf(source * this.#unitsPerCluster))
      } catch (error) {
        this.#readErrors++
        this.#cannotPack(error)
        stuck.push(source)
        continue
      }
      const before = filled
      filled = this.#gather(source, from, to, filled, base, moves)
      // A frame that nobody knows by its header (it is damaged) keeps its cluster from becoming free.
      if (before === 0 && filled < this.#used[source]!) {
        filled = 0
        moves.length = 0
        stuck.push(source)
        continue
      }
      sources.push(source)
    }
    if (filled === 0) return false
    try {
      this.#file.writeNow(to, 0, filled * this.unitBytes, this.#positionOf(base))
    } catch (error) {
      this.#writeErrors++
      this.#cannotPack(error)
      return false
    }
    this.#mark(base, filled)
    this.#packedFrames += moves.length / 4
    this.#packedBytes += filled * this.unitBytes
    for (let n = 0; n < moves.length; n += 4) {
      const [owner, old, at, units] = moves.slice(n, n + 4) as [number, number, number, number]
      this.#unmark(owners.moved(owner, old, at, units) ? old : at, units)
    }
    return this.#freeClusters >= freeBefore
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
      if (held === 0 || units !== held) {
        unit++
        continue
      }
      if (filled + held <= this.#unitsPerCluster) {
        to.set(from.subarray(at, at + held * this.unitBytes), filled * this.unitBytes)
        moves.push(owner, unit, base + filled, held)
        filled += held
      }
      unit += held
    }
    return filled
  }

  /** The cluster with the fewest units in use, but none of `without`, nor one that is being written to. */
  #emptiest(without: readonly number[]): number {
    let best = none
    for (let cluster = 0; cluster < this.#clusters; cluster++) {
      const used = this.#used[cluster]!
      if (used === 0 || (best !== none && used >= this.#used[best]!)) continue
      if (without.includes(cluster) || this.#isBeingWritten(cluster)) continue
      best = cluster
    }
    return best
  }

  #isUsed(unit: number): boolean {
    return ((this.#map[unit >>> 5]! >>> (unit & 31)) & 1) === 1
  }

  /** The first unit from `unit` on that is in use, or `end`. */
  #nextUsed(unit: number, end: number): number {
    return this.#nextBit(unit, end, 0)
  }

  /** The first unit from `unit` on that is free, or `end`. */
  #nextFree(unit: number, end: number): number {
    return this.#nextBit(unit, end, -1)
  }

  #nextBit(unit: number, end: number, flip: number): number {
    for (let at = unit; at < end; at = (at | 31) + 1) {
      const bits = (this.#map[at >>> 5]! ^ flip) & (-1 << (at & 31))
      if (bits !== 0) return Math.min(end, (at & ~31) + 31 - Math.clz32(bits & -bits))
    }
    return end
  }

  /** Whether a write to the block of that unit is under way. */
  #isBusy(unit: number): boolean {
    const block = Math.floor(unit / this.#unitsPerBlock)
    return ((this.#busy[block >>> 5]! >>> (block & 31)) & 1) === 1
  }

  #isBeingWritten(cluster: number): boolean {
    const first = cluster * this.#unitsPerCluster
    for (let unit = first; unit < first + this.#unitsPerCluster; unit += this.#unitsPerBlock)
      if (this.#isBusy(unit)) return true
    return false
  }

  #setBusy(unit: number, units: number, busy: boolean): void {
    const last = Math.floor((unit + units - 1) / this.#unitsPerBlock)
    for (let block = Math.floor(unit / this.#unitsPerBlock); block <= last; block++)
      this.#busy[block >>> 5] = busy
        ? this.#busy[block >>> 5]! | (1 << (block & 31))
        : this.#busy[block >>> 5]! & ~(1 << (block & 31))
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

  /** Bytes that a run writes: to the end of its last block, where that is free, so that it need not be read before. */
  #lengthOf(flight: Flight, unit: number, units: number, at: number): number {
    const length = units * this.unitBytes
    const end = unit + units
    const over = (this.#unitsPerBlock - (end % this.#unitsPerBlock)) % this.#unitsPerBlock
    if (over === 0 || this.#nextUsed(end, end + over) < end + over) return length
    return Math.min(length + over * this.unitBytes, flight.bytes.length - at)
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
