/**
 * Runs of neighbouring pages of a file, which cross the store together; and pages that were handed over and are put
 * later, in turns.
 *
 * Invariants:
 *  - Waiting pages are bounded (16 MiB for a cache, counting whole buffers); pages beyond the bound are put at once.
 *  - A turn puts 256 KiB at most, or a page when that is larger, and lets everything else that is ready run before the
 *    next one.
 */
import { type GetOutcome, type ObjectId, PageBatch, type Pool, PutOutcome, Whereabouts } from '@tmem/core'
import { turn } from '@tmem/core/runtime'

/** Bytes that cross the store at once, and are put in a turn, at most, or a page when that is larger. */
const runBytes = 262_144
/** Bytes that may wait. */
const largestBacklog = 16 * 2 ** 20
const nothing = new Uint8Array(0)

/** Pages of a file that wait, from the `first` on. */
export interface Run {
  readonly first: number
  readonly bytes: Uint8Array
}

/** Whose pages wait. */
export interface Waiting {
  /** Puts its next pages, so many at most; false: none is left. */
  putNext(pages: number): boolean
}

/** What all files of a cache share. */
export class Runs {
  readonly #pageSize: number
  readonly #batch: PageBatch
  readonly #where = new Whereabouts()
  /** Bytes that wait, and whose pages among them are to be put soon. */
  #bytes = 0
  readonly #soon = new Set<Waiting>()
  #running = false

  constructor(pageSize: number) {
    this.#pageSize = pageSize
    this.#batch = new PageBatch(Math.max(1, Math.floor(runBytes / pageSize)), pageSize, nothing)
  }

  /** Puts pages; how many were stored. */
  put(pool: Pool, object: ObjectId, first: number, pages: Uint8Array): number {
    // Most files have one page: that needs no batch.
    if (pages.length === this.#pageSize) return pool.put(object, first, pages) === PutOutcome.Stored ? 1 : 0
    let stored = 0
    this.#each(object, first, pages, (batch) => {
      stored += pool.putMany(batch)
    })
    return stored
  }

  /** Gets as many pages as `into` has room for; the answer to each. */
  get(pool: Pool, object: ObjectId, first: number, into: Uint8Array, outcomes: GetOutcome[]): void {
    if (into.length === this.#pageSize) {
      outcomes.push(pool.get(object, first, into))
      return
    }
    this.#each(object, first, into, (batch) => {
      pool.getMany(batch)
      for (let entry = 0; entry < batch.length; entry++) outcomes.push(batch.outcomes[entry] as GetOutcome)
    })
  }

  #each(object: ObjectId, first: number, bytes: Uint8Array, cross: (batch: PageBatch) => void): void {
    const batch = this.#batch
    const count = bytes.length / this.#pageSize
    if (count === 0) return
    batch.bytes = bytes
    try {
      for (let page = 0; page < count; ) {
        batch.clear()
        for (; page < count && batch.length < batch.capacity; page++)
          batch.push(object, first + page, page * this.#pageSize)
        cross(batch)
      }
    } finally {
      // What is somebody else's is not kept alive.
      batch.clear()
      batch.bytes = nothing
    }
  }

  /** Whether the first pages of an object are there; false, too, where that cannot be told without reading them. */
  has(pool: Pool, object: ObjectId, pages: number): boolean {
    if (pool.whereIs === undefined) return false
    for (let index = 0; index < pages; index++) if (!pool.whereIs(object, index, this.#where)) return false
    return true
  }

  /** Takes room for bytes that wait; false: there is none. */
  hold(bytes: number): boolean {
    if (this.#bytes + bytes > largestBacklog) return false
    this.#bytes += bytes
    return true
  }

  /** Gives room back. */
  release(bytes: number): void {
    this.#bytes -= bytes
  }

  /** Somebody's pages are to be put, from the next turn on. */
  soon(whose: Waiting): void {
    this.#soon.add(whose)
    if (!this.#running) void this.#run()
  }

  async #run(): Promise<void> {
    this.#running = true
    try {
      while (this.#soon.size > 0) {
        await turn()
        for (const whose of this.#soon) {
          if (!whose.putNext(this.#batch.capacity)) this.#soon.delete(whose)
          break
        }
      }
    } finally {
      this.#running = false
    }
  }
}
