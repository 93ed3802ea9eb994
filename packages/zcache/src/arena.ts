/**
 * The memory in which compressed pages rest: chunks from the stack's allocator, handed out in runs of neighbouring
 * granules (128 bytes), all within one byte budget.
 *
 * A granule has a number; granule g lies in chunk `g >>> chunkShift`. A run never crosses chunks. A chunk without a run is
 * given back; one such chunk is kept as a spare, so that a put and a flush at the edge do not take and give back a
 * chunk each time, until `trim` or until somebody else needs the bytes.
 *
 * Invariants: every granule of a present chunk is in exactly one run or free; `budget.used` counts every byte that the
 * arena holds, spare included.
 */
import type { Allocator, ByteLimit } from '@tmem/core'
import { TmemError } from '@tmem/core'

/** No run, no location, no zspage. */
export const none = -1

/** Bytes of a granule: what runs are counted in. */
export const granuleBytes = 128
const granuleShift = 7

/** Bytes in use against a limit that can be changed from outside. What exists already above a lowered limit stays. */
export class ByteBudget {
  readonly limit: ByteLimit
  used = 0

  constructor(limit: ByteLimit) {
    this.limit = limit
  }

  /** Takes bytes if the limit allows it. */
  take(bytes: number): boolean {
    if (this.used + bytes > this.limit.bytes) return false
    this.used += bytes
    return true
  }

  /** Gives bytes back. */
  give(bytes: number): void {
    this.used -= bytes
  }
}

/** Bytes of a chunk for a limit: a 64th of it, as a power of two from 128 KiB to 4 MiB. */
export function chunkBytesFor(limitBytes: number): number {
  return 2 ** Math.min(22, Math.max(17, Math.floor(Math.log2(limitBytes / 64))))
}

export class Arena {
  readonly chunkBytes: number
  /** Granules in a chunk. */
  readonly chunkGranules: number
  readonly chunkShift: number
  /** Largest number of chunks at once. */
  readonly maxChunks: number
  readonly budget: ByteBudget
  /** Chunk memory by chunk number, as bytes and as words; `undefined` where there is none. */
  readonly bytes: (Uint8Array | undefined)[]
  readonly words: (Int32Array | undefined)[]
  /** Chunks present. */
  chunks = 0
  /** Granules in runs. */
  usedGranules = 0
  /** Whether the last failure of `run` was the allocator's (not the budget's). */
  refusedByAllocator = false
  /** How often the allocator had no chunk (failed_getfreepages). */
  failures = 0
  /** Chunks given back so far. */
  chunksReturned = 0
  readonly #allocator: Allocator
  /** One bit per granule: 1 is in a run. */
  readonly #map: Int32Array
  readonly #usedIn: Int32Array
  /** Per chunk: no run longer than this is free. An upper bound, made exact whenever a search fails. */
  readonly #longest: Int32Array
  /** Chunk that must not be chosen for new runs (it is being emptied), or `none`. */
  #avoid = none
  #spares = 0
  /** Where the next search starts: chunks before it are full. */
  #firstOpen = 0

  constructor(allocator: Allocator, budget: ByteBudget) {
    const limit = budget.limit.maximumBytes
    this.#allocator = allocator
    this.budget = budget
    this.chunkBytes = chunkBytesFor(limit)
    this.chunkGranules = this.chunkBytes / granuleBytes
    this.chunkShift = Math.log2(this.chunkGranules)
    this.maxChunks = Math.max(1, Math.floor(limit / this.chunkBytes))
    this.bytes = new Array<Uint8Array | undefined>(this.maxChunks).fill(undefined)
    this.words = new Array<Int32Array | undefined>(this.maxChunks).fill(undefined)
    // A bit per granule and two words per chunk, for the whole limit at once: this must not fail later.
    const bytes = this.maxChunks * (this.chunkGranules / 8 + 8)
    const memory = allocator.allocate(bytes, 'zcache.arena')
    if (memory === undefined || !budget.take(bytes))
      throw new TmemError('TMEM_NO_MEMORY', `zcache: no memory for the map of its arena (${bytes} bytes)`, {
        layer: 'zcache',
      })
    this.#usedIn = new Int32Array(memory, 0, this.maxChunks)
    this.#longest = new Int32Array(memory, this.maxChunks * 4, this.maxChunks)
    this.#map = new Int32Array(memory, this.maxChunks * 8)
  }

  /** Takes `granules` neighbouring granules: the number of the first, or `none`. `granules` is at most `chunkGranules`. */
  run(granules: number): number {
    let open = true
    for (let chunk = this.#firstOpen; chunk < this.maxChunks; chunk++) {
      if (this.bytes[chunk] === undefined) continue
      if (this.#usedIn[chunk] === this.chunkGranules) {
        if (open) this.#firstOpen = chunk + 1
        continue
      }
      open = false
      // While a chunk is being emptied, an empty one is no better place.
      if (this.#avoid !== none && (chunk === this.#avoid || this.#usedIn[chunk] === 0)) continue
      if (this.#longest[chunk]! < granules) continue
      const at = this.#find(chunk, granules)
      if (at !== none) return this.#take(chunk, at, granules)
    }
    if (this.#avoid !== none) return none
    const chunk = this.#grow()
    return chunk === none ? none : this.#take(chunk, 0, granules)
  }

  /** Gives a run back. */
  freeRun(first: number, granules: number): void {
    const chunk = first >>> this.chunkShift
    this.#mark(first, granules, false)
    this.usedGranules -= granules
    const used = this.#usedIn[chunk]! - granules
    this.#usedIn[chunk] = used
    // The freed run may have joined its neighbours: anything up to all free granules is possible.
    this.#longest[chunk] = this.chunkGranules - used
    if (chunk < this.#firstOpen) this.#firstOpen = chunk
    if (used === 0) {
      this.#spares++
      if (this.#spares > 1) this.#giveBack(chunk)
    }
  }

  /** Gives all chunks without a run back. Returns the bytes. */
  trim(): number {
    let bytes = 0
    for (let chunk = 0; this.#spares > 0 && chunk < this.maxChunks; chunk++) {
      if (this.bytes[chunk] === undefined || this.#usedIn[chunk] !== 0) continue
      this.#giveBack(chunk)
      bytes += this.chunkBytes
    }
    return bytes
  }

  /**
   * The present chunk with the fewest used granules, if its runs would find room in the others (by count), or `none`.
   * What `moveOut` is good for.
   */
  emptiest(): number {
    let best = none
    for (let chunk = 0; chunk < this.maxChunks; chunk++) {
      if (this.bytes[chunk] === undefined || this.#usedIn[chunk] === 0) continue
      if (best === none || this.#usedIn[chunk]! < this.#usedIn[best]!) best = chunk
    }
    if (best === none) return none
    const freeElsewhere =
      (this.chunks - this.#spares) * this.chunkGranules - this.usedGranules - (this.chunkGranules - this.#usedIn[best]!)
    return freeElsewhere >= this.#usedIn[best]! ? best : none
  }

  /**
   * While a chunk is being emptied: a run of the same length in another, present chunk, the bytes copied, the old one
   * freed. Returns the first granule of the new one, or `none` (and nothing changed).
   */
  moveOut(first: number, granules: number): number {
    const chunk = first >>> this.chunkShift
    this.#avoid = chunk
    const to = this.run(granules)
    this.#avoid = none
    if (to === none) return none
    const from = (first & (this.chunkGranules - 1)) << granuleShift
    this.bytes[to >>> this.chunkShift]!.set(
      this.bytes[chunk]!.subarray(from, from + (granules << granuleShift)),
      (to & (this.chunkGranules - 1)) << granuleShift,
    )
    this.freeRun(first, granules)
    return to
  }

  /** Granules free in a chunk; 0 for an absent one. */
  freeIn(chunk: number): number {
    return this.bytes[chunk] === undefined ? 0 : this.chunkGranules - this.#usedIn[chunk]!
  }

  /** Whether the free granules of a chunk are known to be in pieces: sliding its runs together would make longer ones. */
  isFragmented(chunk: number): boolean {
    return this.#longest[chunk]! < this.freeIn(chunk)
  }

  /** Moves a run within its chunk to a lower place `to`, over nothing but itself and free granules. */
  slide(first: number, granules: number, to: number): void {
    const from = this.offsetOf(first)
    this.bytes[first >>> this.chunkShift]!.copyWithin(this.offsetOf(to), from, from + (granules << granuleShift))
    this.#mark(first, granules, false)
    this.#mark(to, granules, true)
  }

  /** After all runs of a chunk were slid together: its free granules are one run. */
  slidTogether(chunk: number): void {
    this.#longest[chunk] = this.freeIn(chunk)
  }

  /** Byte offset of a granule inside its chunk. */
  offsetOf(granule: number): number {
    return (granule & (this.chunkGranules - 1)) << granuleShift
  }

  /** Drops all memory. The arena cannot be used afterwards. */
  close(): void {
    this.bytes.fill(undefined)
    this.words.fill(undefined)
    this.chunks = 0
    this.usedGranules = 0
  }

  /** Throws an `Error` that says which invariant is broken; `runs` are all runs that the owners know of. */
  check(runs: Iterable<readonly [first: number, granules: number]>): void {
    const seen = new Uint8Array(this.maxChunks * this.chunkGranules)
    let total = 0
    for (const [first, granules] of runs) {
      if (first >>> this.chunkShift !== (first + granules - 1) >>> this.chunkShift)
        throw new Error(`arena: the run of ${granules} at ${first} crosses chunks`)
      for (let granule = first; granule < first + granules; granule++) {
        if (seen[granule] === 1) throw new Error(`arena: granule ${granule} is in two runs`)
        seen[granule] = 1
        if (!this.#isUsed(granule)) throw new Error(`arena: granule ${granule} is not marked as used`)
      }
      total += granules
    }
    if (total !== this.usedGranules) throw new Error(`arena: ${total} granules in runs, counted ${this.usedGranules}`)
    let present = 0
    let spares = 0
    for (let chunk = 0; chunk < this.maxChunks; chunk++) {
      const base = chunk << this.chunkShift
      let used = 0
      let free = 0
      let longest = 0
      for (let granule = base; granule < base + this.chunkGranules; granule++) {
        if (!this.#isUsed(granule)) free++
        else {
          if (seen[granule] === 0) throw new Error(`arena: granule ${granule} is used by nobody`)
          used++
          free = 0
        }
        longest = Math.max(longest, free)
      }
      if (this.bytes[chunk] === undefined) {
        if (used !== 0) throw new Error(`arena: the absent chunk ${chunk} has used granules`)
        continue
      }
      present++
      if (used === 0) spares++
      if (used !== this.#usedIn[chunk]) throw new Error(`arena: chunk ${chunk} has ${used} granules in use`)
      if (longest > this.#longest[chunk]!) throw new Error(`arena: chunk ${chunk} has a longer run than it admits`)
      if (chunk < this.#firstOpen && used !== this.chunkGranules) throw new Error(`arena: chunk ${chunk} is not full`)
    }
    if (present !== this.chunks) throw new Error(`arena: ${present} chunks, counted ${this.chunks}`)
    if (spares !== this.#spares) throw new Error(`arena: ${spares} spare chunks, counted ${this.#spares}`)
  }

  #take(chunk: number, at: number, granules: number): number {
    const first = (chunk << this.chunkShift) + at
    this.#mark(first, granules, true)
    if (this.#usedIn[chunk] === 0) this.#spares--
    this.#usedIn[chunk] = this.#usedIn[chunk]! + granules
    this.usedGranules += granules
    return first
  }

  /** Sets or clears the bits of a run. */
  #mark(first: number, granules: number, used: boolean): void {
    const map = this.#map
    for (let granule = first, left = granules; left > 0; ) {
      const bit = granule & 31
      const count = Math.min(32 - bit, left)
      const bits = (count === 32 ? -1 : (1 << count) - 1) << bit
      const word = granule >>> 5
      map[word] = used ? map[word]! | bits : map[word]! & ~bits
      granule += count
      left -= count
    }
  }

  #isUsed(granule: number): boolean {
    return ((this.#map[granule >>> 5]! >>> (granule & 31)) & 1) === 1
  }

  /** First fit. A search that fails leaves the exact longest free run behind. */
  #find(chunk: number, granules: number): number {
    const map = this.#map
    const base = chunk << this.chunkShift
    let length = 0
    let longest = 0
    for (let at = 0; at < this.chunkGranules; ) {
      const word = map[(base + at) >>> 5]!
      if (word === 0) {
        length += 32
        at += 32
        // The run may have begun in the middle of an earlier word: it starts `length` before here.
        if (length >= granules) return at - length
        continue
      }
      if (word === -1) {
        if (length > longest) longest = length
        length = 0
        at += 32
        continue
      }
      for (const end = at + 32; at < end; at++)
        if (((word >>> (at & 31)) & 1) === 1) {
          if (length > longest) longest = length
          length = 0
        } else if (++length === granules) return at + 1 - granules
    }
    this.#longest[chunk] = Math.max(longest, length)
    return none
  }

  #grow(): number {
    this.refusedByAllocator = false
    if (this.chunks === this.maxChunks || !this.budget.take(this.chunkBytes)) return none
    const memory = this.#allocator.allocate(this.chunkBytes, 'zcache.chunk')
    if (memory === undefined) {
      this.budget.give(this.chunkBytes)
      this.refusedByAllocator = true
      this.failures++
      return none
    }
    const chunk = this.bytes.indexOf(undefined)
    this.bytes[chunk] = new Uint8Array(memory, 0, this.chunkBytes)
    this.words[chunk] = new Int32Array(memory, 0, this.chunkBytes / 4)
    this.chunks++
    this.#spares++
    this.#usedIn[chunk] = 0
    this.#longest[chunk] = this.chunkGranules
    if (chunk < this.#firstOpen) this.#firstOpen = chunk
    return chunk
  }

  #giveBack(chunk: number): void {
    this.bytes[chunk] = undefined
    this.words[chunk] = undefined
    this.chunks--
    this.#spares--
    this.chunksReturned++
    this.budget.give(this.chunkBytes)
  }
}
