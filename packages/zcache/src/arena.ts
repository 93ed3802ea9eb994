/**
 * The memory in which compressed pages rest: chunks from the stack's allocator, handed out in runs of neighbouring
 * granules (128 bytes), all within one byte budget; and what an allocator of compressed pages must be able to do.
 *
 * A run is known by a number, so that the arena may move its bytes without telling anybody: chunks are emptied by
 * moving their runs into the holes of the others, and given back. A run never crosses chunks. Each run has five words
 * that belong to whoever took it.
 *
 * Memory is taken from the stack's allocator in `preload` only, which a store calls before it touches anything: so
 * whatever the allocator does to find memory never meets a half-done put. Where the allocator gives all memory ahead,
 * all chunks are taken at the start and put by; what is in the budget is the same.
 *
 * Invariants: every granule of a present chunk is in exactly one run or free; a run is in the list of its chunk;
 * `budget.used` counts every byte of the chunks and the run table as far as it was ever touched.
 */
import type { Allocator, ByteLimit, MovedBlock, StatsNode } from '@tmem/core'
import { TmemError } from '@tmem/core'

/** No run, no location, no entry. */
export const none = -1

/** Bytes of a granule: what runs are counted in. */
export const granuleBytes = 128
const granuleShift = 7

/** Bytes of the shortest run that anybody takes: it bounds the number of runs. */
export const minRunBytes = 4096

/** Words of a run: first granule, granules, neighbours in its chunk, tag of the owner, then five that belong to it. */
export const runWords = 10
const BASE = 0
const GRANULES = 1
const PREVIOUS_IN_CHUNK = 2
const NEXT_IN_CHUNK = 3
const TAG = 4
/** First of the owner's words; here it chains free run numbers while there is no owner. */
export const OWN = 5

/** A location has 10 bits for a place in its run, and the rest for the run. */
export const localBits = 10
const maxRuns = 2 ** (32 - localBits)

/**
 * Finds places for compressed pages. A place is named by a location, a number from 0 to 2^32-1; `locate` tells where
 * its bytes are. An owner is a number from 0 to 2^31-1 by which the caller knows the page.
 */
export interface ZAllocator {
  /** Largest object, in bytes. */
  readonly maxSize: number
  /** Bytes of memory that a failing `alloc` would need: the longest run it takes for objects of up to 4 KiB. */
  readonly longestRun: number
  /** After `locate`: the chunk, as bytes and as words, and the offset of the object in it (a multiple of 4). */
  readonly bytes: Uint8Array
  readonly words: Int32Array
  readonly at: number
  /** Bytes of all slots in use: the objects, their headers, and what rounding up costs. */
  readonly slotBytes: number
  /** Takes a place for `size` bytes (1 to `maxSize`), with room up to the next multiple of four, or `none`. */
  alloc(size: number, owner: number): number
  /** Bytes that `alloc` takes for an object of `size` bytes. */
  slotSize(size: number): number
  /** Gives a place back. */
  free(location: number): void
  /** Sets `bytes`, `words` and `at`. */
  locate(location: number): void
  /** Moves up to `objects` objects so that runs become free. Returns how many were moved; 0: nothing to gain now. */
  compact(objects: number, moved: MovedBlock): number
  /**
   * Throws an `Error` that says which invariant is broken. `owns(owner, location)` must be true for all objects. Adds
   * its runs to `runs`.
   */
  check(owns: (owner: number, location: number) => boolean, runs: Set<number>): void
  /** Its statistics, under its own name. */
  stats(): StatsNode
}

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

/**
 * Bytes of a chunk for a limit, a power of two: a 64th of it from 128 KiB to 1 MiB, so that a store that empties gives
 * most of its memory back; above 1 GiB a 1024th up to 4 MiB, so that a search for a free run stays short.
 */
export function chunkBytesFor(limitBytes: number): number {
  const wanted = Math.max(Math.min(limitBytes / 64, 2 ** 20), limitBytes / 1024)
  return 2 ** Math.min(22, Math.max(17, Math.floor(Math.log2(wanted))))
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
  /** The table of runs: `runWords` each. */
  readonly runs: Int32Array
  /** Chunks present, and present without a run. */
  chunks = 0
  spares = 0
  /** Granules in runs. */
  usedGranules = 0
  /** Runs in use. */
  runCount = 0
  /** Whether the allocator refused a chunk since `preload` began. */
  refusedByAllocator = false
  /** How often the allocator had no chunk (failed_getfreepages). */
  failures = 0
  /** Chunks taken and given back so far, runs moved. */
  chunksTaken = 0
  chunksReturned = 0
  runsMoved = 0
  readonly #allocator: Allocator
  readonly #maxRuns: number
  /** One bit per granule: 1 is in a run. */
  readonly #map: Int32Array
  readonly #usedIn: Int32Array
  /** Per chunk: no run longer than this is free. An upper bound, made exact whenever a search fails. */
  readonly #longest: Int32Array
  /** First run of each chunk. */
  readonly #heads: Int32Array
  /** Memory of absent chunks, where the allocator gives all of it at the start; it is not in the budget. */
  readonly #reserve: ArrayBufferLike[] = []
  /** Scratch: the runs of one chunk by place. */
  readonly #order: Float64Array
  #tags = 0
  #freeRun = none
  #watermark = 0
  /** Chunk that must not be chosen for new runs (it is being emptied), or `none`. */
  #avoid = none
  /** Where the next search starts: chunks before it are full. */
  #firstOpen = 0
  /** Longest run known to be free since the last time one was taken. */
  #assured = 0

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
    this.#maxRuns = Math.min(maxRuns, (this.maxChunks * this.chunkBytes) / minRunBytes)
    // All tables at once, for the whole limit: this must not fail later. The run table is counted as it is touched.
    const perChunk = this.chunkBytes / minRunBytes
    const fixed = perChunk * 8 + this.maxChunks * (this.chunkGranules / 8 + 12)
    const bytes = fixed + this.#maxRuns * runWords * 4
    const memory = allocator.allocate(bytes, 'zcache.arena')
    if (memory === undefined || !budget.take(fixed))
      throw new TmemError('TMEM_NO_MEMORY', `zcache: no memory for the tables of its arena (${bytes} bytes)`, {
        layer: 'zcache',
      })
    let at = 0
    const words = (count: number): Int32Array => {
      at += count * 4
      return new Int32Array(memory, at - count * 4, count)
    }
    this.#order = new Float64Array(memory, 0, perChunk)
    at = perChunk * 8
    this.#usedIn = words(this.maxChunks)
    this.#longest = words(this.maxChunks)
    this.#heads = words(this.maxChunks).fill(none)
    this.#map = words((this.maxChunks * this.chunkGranules) / 32)
    this.runs = words(this.#maxRuns * runWords)
    while (allocator.ahead === true && this.#reserve.length < this.maxChunks) {
      const chunk = allocator.allocate(this.chunkBytes, 'zcache.chunk')
      if (chunk === undefined)
        throw new TmemError('TMEM_NO_MEMORY', `zcache: no memory for all ${this.maxChunks} chunks of its arena`, {
          layer: 'zcache',
        })
      this.#reserve.push(chunk)
    }
  }

  /**
   * Makes sure, as far as limit and allocator allow, that runs of `bytes` in all, each up to `longest` bytes, will be
   * found. The only place where the arena takes memory: to be called before a put changes anything.
   */
  preload(longest: number, bytes: number): void {
    const granules = Math.ceil(longest / granuleBytes)
    this.refusedByAllocator = false
    if (this.#assured >= granules && bytes <= longest) return
    const spares = bytes > longest ? Math.ceil(bytes / (this.chunkBytes - longest)) : 1
    while (this.spares < spares) {
      // Looking is worth it only while a chunk could be had at all.
      if (this.chunks === this.maxChunks || this.budget.used + this.chunkBytes > this.budget.limit.bytes) return
      if (bytes <= longest && this.#search(granules) !== none) break
      if (!this.#grow()) return
    }
    this.#assured = Math.max(this.#assured, granules)
  }

  /** A tag for the runs of one owner. */
  newTag(): number {
    return ++this.#tags
  }

  /** Numbers of all runs of an owner; for checks. */
  *runsOf(tag: number): Iterable<number> {
    for (const head of this.#heads)
      for (let run = head; run !== none; run = this.runs[run * runWords + NEXT_IN_CHUNK]!)
        if (this.runs[run * runWords + TAG] === tag) yield run
  }

  /** Takes `granules` neighbouring granules of a present chunk for an owner: the number of the run, or `none`. */
  take(granules: number, tag: number): number {
    const run = this.#freeRun !== none ? this.#freeRun : this.#watermark
    if (run === this.#maxRuns) return none
    const isNew = run === this.#watermark
    if (isNew && !this.charge(runWords * 4)) return none
    const at = this.#search(granules)
    if (at === none) {
      if (isNew) this.budget.give(runWords * 4)
      return none
    }
    if (isNew) this.#watermark++
    else this.#freeRun = this.runs[run * runWords + OWN]!
    this.runs[run * runWords + GRANULES] = granules
    this.runs[run * runWords + TAG] = tag
    this.runCount++
    this.#place(run, at)
    return run
  }

  /** Gives a run back. */
  free(run: number): void {
    this.#unplace(run)
    this.runs[run * runWords + OWN] = this.#freeRun
    this.#freeRun = run
    this.runCount--
  }

  /** Granules of a run. */
  granulesOf(run: number): number {
    return this.runs[run * runWords + GRANULES]!
  }

  /** Chunk number of a run. */
  chunkOf(run: number): number {
    return this.runs[run * runWords + BASE]! >>> this.chunkShift
  }

  /** Byte offset of a run inside its chunk. */
  offsetOf(run: number): number {
    return (this.runs[run * runWords + BASE]! & (this.chunkGranules - 1)) << granuleShift
  }

  /**
   * Takes bytes for tables out of the budget, in the last resort those of chunks without a run; false when there are
   * none.
   */
  charge(bytes: number): boolean {
    if (this.budget.take(bytes)) return true
    this.trim()
    return this.budget.take(bytes)
  }

  /** Gives all chunks without a run back, but for so many. */
  trim(kept = 0): void {
    for (let chunk = 0; this.spares > kept && chunk < this.maxChunks; chunk++)
      if (this.bytes[chunk] !== undefined && this.#usedIn[chunk] === 0) this.#giveBack(chunk)
  }

  /**
   * Moves runs out of the emptiest chunk into the others, up to `pages` times 4 KiB (one run at least), until it can be
   * given back. Returns the pages moved; 0 when there is nothing to gain.
   */
  compact(pages: number): number {
    const chunk = this.#emptiest()
    if (chunk === none) return 0
    let done = 0
    this.#avoid = chunk
    for (let run = this.#longestIn(chunk); run !== none && done < pages; run = this.#longestIn(chunk)) {
      const granules = this.runs[run * runWords + GRANULES]!
      let to = this.#search(granules)
      if (to === none) {
        const other = this.#mostFree(chunk)
        if (other === none || this.chunkGranules - this.#usedIn[other]! < granules) break
        done += this.#slideTogether(other)
        to = this.#search(granules)
      }
      const from = this.offsetOf(run)
      const source = this.bytes[chunk]!.subarray(from, from + (granules << granuleShift))
      this.#unplace(run)
      this.#place(run, to)
      this.bytes[this.chunkOf(run)]!.set(source, this.offsetOf(run))
      this.runsMoved++
      done += pagesIn(granules)
    }
    this.#avoid = none
    return Math.min(done, pages)
  }

  /**
   * Slides the runs of the chunk with most free granules together, if at least `bytes` are free there and they are in
   * pieces. Costs as much as copying a chunk. True when it was done.
   */
  defragment(bytes: number): boolean {
    const chunk = this.#mostFree(none)
    if (chunk === none || (this.chunkGranules - this.#usedIn[chunk]!) << granuleShift < bytes) return false
    this.#slideTogether(chunk)
    return true
  }

  /** Gives all memory back. The arena cannot be used afterwards. Idempotent. */
  close(): void {
    for (const bytes of this.bytes) if (bytes !== undefined) this.#allocator.free?.(bytes.buffer, 'zcache.chunk')
    for (const memory of this.#reserve.splice(0)) this.#allocator.free?.(memory, 'zcache.chunk')
    this.bytes.fill(undefined)
    this.words.fill(undefined)
    this.budget.give(this.chunks * this.chunkBytes)
    this.chunks = 0
    this.spares = 0
    this.usedGranules = 0
  }

  /** Throws an `Error` that says which invariant is broken; `owned` are all runs that the owners know of. */
  check(owned: ReadonlySet<number>): void {
    const seen = new Uint8Array(this.maxChunks * this.chunkGranules)
    let total = 0
    let runs = 0
    let present = 0
    let spares = 0
    for (let chunk = 0; chunk < this.maxChunks; chunk++) {
      let inChunk = 0
      let previous = none
      for (let run = this.#heads[chunk]!; run !== none; run = this.runs[run * runWords + NEXT_IN_CHUNK]!) {
        const at = run * runWords
        const first = this.runs[at + BASE]!
        const granules = this.runs[at + GRANULES]!
        if (!owned.has(run)) throw new Error(`arena: run ${run} belongs to nobody`)
        if (this.runs[at + PREVIOUS_IN_CHUNK] !== previous) throw new Error(`arena: run ${run} has a wrong neighbour`)
        if (first >>> this.chunkShift !== chunk || (first + granules - 1) >>> this.chunkShift !== chunk)
          throw new Error(`arena: run ${run} is not inside chunk ${chunk}`)
        for (let granule = first; granule < first + granules; granule++) {
          if (seen[granule] === 1) throw new Error(`arena: granule ${granule} is in two runs`)
          if (!this.#isUsed(granule)) throw new Error(`arena: granule ${granule} is not marked as used`)
          seen[granule] = 1
        }
        inChunk += granules
        runs++
        previous = run
      }
      total += inChunk
      let longest = 0
      for (let i = 0, free = 0; i < this.chunkGranules; i++) {
        const granule = (chunk << this.chunkShift) + i
        if (this.#isUsed(granule) !== (seen[granule] === 1))
          throw new Error(`arena: granule ${granule} is used by nobody`)
        free = this.#isUsed(granule) ? 0 : free + 1
        longest = Math.max(longest, free)
      }
      if (this.bytes[chunk] === undefined) {
        if (inChunk !== 0) throw new Error(`arena: the absent chunk ${chunk} has runs`)
        continue
      }
      present++
      if (inChunk === 0) spares++
      if (inChunk !== this.#usedIn[chunk]) throw new Error(`arena: chunk ${chunk} has ${inChunk} granules in use`)
      if (longest > this.#longest[chunk]!) throw new Error(`arena: chunk ${chunk} has a longer run than it admits`)
      if (chunk < this.#firstOpen && inChunk !== this.chunkGranules)
        throw new Error(`arena: chunk ${chunk} is not full`)
    }
    if (total !== this.usedGranules) throw new Error(`arena: ${total} granules in runs, counted ${this.usedGranules}`)
    if (runs !== this.runCount || runs !== owned.size)
      throw new Error(`arena: ${runs} runs, counted ${this.runCount}, owned ${owned.size}`)
    if (present !== this.chunks) throw new Error(`arena: ${present} chunks, counted ${this.chunks}`)
    if (spares !== this.spares) throw new Error(`arena: ${spares} spare chunks, counted ${this.spares}`)
  }

  /** First fit in the present chunks: a granule, or `none`. */
  #search(granules: number): number {
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
      if (at !== none) return (chunk << this.chunkShift) + at
    }
    return none
  }

  /** First fit in one chunk. A search that fails leaves the exact longest free run behind. */
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

  /** Enters a run at a free place. */
  #place(run: number, first: number): void {
    const { runs } = this
    const at = run * runWords
    const chunk = first >>> this.chunkShift
    const granules = runs[at + GRANULES]!
    const head = this.#heads[chunk]!
    runs[at + BASE] = first
    runs[at + PREVIOUS_IN_CHUNK] = none
    runs[at + NEXT_IN_CHUNK] = head
    if (head !== none) runs[head * runWords + PREVIOUS_IN_CHUNK] = run
    this.#heads[chunk] = run
    this.#mark(first, granules, true)
    if (this.#usedIn[chunk] === 0) this.spares--
    this.#usedIn[chunk] = this.#usedIn[chunk]! + granules
    this.usedGranules += granules
    this.#assured = 0
  }

  /** Takes a run out of its place. A chunk that becomes empty waits for `trim`: what is put soon needs it. */
  #unplace(run: number): void {
    const { runs } = this
    const at = run * runWords
    const first = runs[at + BASE]!
    const granules = runs[at + GRANULES]!
    const chunk = first >>> this.chunkShift
    const previous = runs[at + PREVIOUS_IN_CHUNK]!
    const next = runs[at + NEXT_IN_CHUNK]!
    if (previous === none) this.#heads[chunk] = next
    else runs[previous * runWords + NEXT_IN_CHUNK] = next
    if (next !== none) runs[next * runWords + PREVIOUS_IN_CHUNK] = previous
    this.#mark(first, granules, false)
    this.usedGranules -= granules
    const used = this.#usedIn[chunk]! - granules
    this.#usedIn[chunk] = used
    // The run may have joined its neighbours: anything up to all free granules is possible.
    this.#longest[chunk] = this.chunkGranules - used
    if (chunk < this.#firstOpen) this.#firstOpen = chunk
    if (used === 0) this.spares++
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

  /** The chunk with the fewest used granules, if the holes of the other used chunks are as many; or `none`. */
  #emptiest(): number {
    let best = none
    for (let chunk = 0; chunk < this.maxChunks; chunk++) {
      if (this.bytes[chunk] === undefined || this.#usedIn[chunk] === 0) continue
      if (best === none || this.#usedIn[chunk]! < this.#usedIn[best]!) best = chunk
    }
    if (best === none) return none
    const holes = (this.chunks - this.spares) * this.chunkGranules - this.usedGranules
    return holes - (this.chunkGranules - this.#usedIn[best]!) >= this.#usedIn[best]! ? best : none
  }

  /** The longest run of a chunk: long ones go first, because short ones would cut up the holes that long ones need. */
  #longestIn(chunk: number): number {
    let longest = none
    let granules = 0
    for (let run = this.#heads[chunk]!; run !== none; run = this.runs[run * runWords + NEXT_IN_CHUNK]!)
      if (this.runs[run * runWords + GRANULES]! > granules) {
        longest = run
        granules = this.runs[run * runWords + GRANULES]!
      }
    return longest
  }

  /** The used chunk (but not `except`) with most free granules, if they are known to be in pieces; or `none`. */
  #mostFree(except: number): number {
    let best = none
    for (let chunk = 0; chunk < this.maxChunks; chunk++) {
      const used = this.#usedIn[chunk]!
      if (this.bytes[chunk] === undefined || used === 0 || chunk === except) continue
      if (this.#longest[chunk]! === this.chunkGranules - used) continue
      if (best === none || used < this.#usedIn[best]!) best = chunk
    }
    return best
  }

  /** Slides the runs of a chunk to its start, so that its free granules are in one piece. Returns the pages moved. */
  #slideTogether(chunk: number): number {
    const { runs } = this
    let count = 0
    for (let run = this.#heads[chunk]!; run !== none; run = runs[run * runWords + NEXT_IN_CHUNK]!)
      this.#order[count++] = runs[run * runWords + BASE]! * maxRuns + run
    this.#order.subarray(0, count).sort()
    const bytes = this.bytes[chunk]!
    let to = chunk << this.chunkShift
    let done = 0
    for (let i = 0; i < count; i++) {
      const run = this.#order[i]! % maxRuns
      const at = run * runWords
      const first = runs[at + BASE]!
      const granules = runs[at + GRANULES]!
      if (first !== to) {
        const from = this.offsetOf(run)
        this.#mark(first, granules, false)
        this.#mark(to, granules, true)
        runs[at + BASE] = to
        bytes.copyWithin(this.offsetOf(run), from, from + (granules << granuleShift))
        this.runsMoved++
        done += pagesIn(granules)
      }
      to += granules
    }
    this.#longest[chunk] = this.chunkGranules - this.#usedIn[chunk]!
    return done
  }

  #grow(): boolean {
    if (!this.budget.take(this.chunkBytes)) return false
    const memory = this.#reserve.pop() ?? this.#allocator.allocate(this.chunkBytes, 'zcache.chunk')
    const chunk = this.bytes.indexOf(undefined)
    if (memory === undefined || chunk === none) {
      this.budget.give(this.chunkBytes)
      this.refusedByAllocator = true
      this.failures++
      return false
    }
    this.bytes[chunk] = new Uint8Array(memory, 0, this.chunkBytes)
    this.words[chunk] = new Int32Array(memory, 0, this.chunkBytes / 4)
    this.chunks++
    this.spares++
    this.chunksTaken++
    this.#usedIn[chunk] = 0
    this.#longest[chunk] = this.chunkGranules
    if (chunk < this.#firstOpen) this.#firstOpen = chunk
    return true
  }

  #giveBack(chunk: number): void {
    const memory = this.bytes[chunk]!.buffer
    if (this.#allocator.ahead === true) this.#reserve.push(memory)
    else this.#allocator.free?.(memory, 'zcache.chunk')
    this.bytes[chunk] = undefined
    this.words[chunk] = undefined
    this.chunks--
    this.spares--
    this.chunksReturned++
    this.#assured = 0
    this.budget.give(this.chunkBytes)
  }
}

/** Pages of 4 KiB that as many granules make, rounded up. */
const pagesIn = (granules: number): number => (granules + 31) >>> 5
