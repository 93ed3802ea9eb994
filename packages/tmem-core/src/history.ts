/**
 * The last moves of a stack's pages, for whoever asks how one came to be where it is.
 *
 * Noted is whatever a place below the first one has a part in: what sinks, rises, is copied down, is put straight
 * there, ends there. Puts into the first place and ends in it are not, as they would push out all others, and cost
 * time where it counts.
 *
 * Invariants: the newest records are there, as many as there is room for; noting one allocates nothing.
 */
import { tagOf } from './directory.ts'
import type { HandleTable } from './handles.ts'
import { TmemError } from './outcomes.ts'
import type { Allocator, MoveReason, ObjectId, PageHistory, PageMove } from './store.ts'

/** Records at most. */
export const maxRecords: number = 2 ** 20

/** Why a page moved, as records have it: a number costs no look into a table of names. */
export const moved: Readonly<Record<MoveReason, number>> = {
  put: 0,
  recovered: 1,
  sunk: 2,
  sunk_clean: 3,
  copied: 4,
  rose: 5,
  released: 6,
  gone: 7,
}
const reasons = Object.keys(moved) as readonly MoveReason[]

/** A time, and the words of a record. */
const bytesPerRecord = 8 + 3 * 4
const recordWords = 3
const INDEX = 0
/** A scattered handle: two objects of a pool that have a page of one index are told apart by these 32 bits. */
const TAG = 1
/** Pool in the low half, then the reason in eight bits, the places before and after in four each, plus one. */
const EVENT = 2
const poolMask = 0xffff

/** Place of what is in none. */
export const nowhere = -1

export interface HistoryOptions {
  readonly table: HandleTable
  /** 1 to `maxRecords`. */
  readonly records: number
  /** Milliseconds, never going back. */
  readonly clock: () => number
  readonly allocator: Allocator
}

export class History {
  readonly #table: HandleTable
  readonly #clock: () => number
  readonly #records: number
  readonly #times: Float64Array
  readonly #words: Uint32Array
  readonly #began: number
  /** Records that there ever were, and where the next one is written. */
  #count = 0
  #next = 0

  /** Throws `TmemError` (`TMEM_NO_MEMORY`). */
  constructor({ table, records, clock, allocator }: HistoryOptions) {
    const memory = allocator.allocate(records * bytesPerRecord, 'chain.history')
    if (memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `no memory for a history of ${records} moves: remember fewer`, {
        layer: 'chain',
      })
    this.#table = table
    this.#clock = clock
    this.#records = records
    this.#times = new Float64Array(memory, 0, records)
    this.#words = new Uint32Array(memory, records * 8, records * recordWords)
    this.#began = clock()
  }

  /** Notes a move of the page of an entry, for a reason of `moved`, between places by their numbers. */
  note(reason: number, entry: number, from: number, to: number): void {
    const table = this.#table
    const record = this.#next
    this.#count++
    this.#next = record + 1 === this.#records ? 0 : record + 1
    this.#times[record] = this.#clock()
    const pool = table.poolOf(entry)
    const index = table.indexOf(entry)
    const at = record * recordWords
    const words = this.#words
    words[at + INDEX] = index
    words[at + TAG] = tagOf(pool, table.objectOf(entry), index)
    words[at + EVENT] = pool | (reason << 16) | ((from + 1) << 24) | ((to + 1) << 28)
  }

  /** The moves of a page that are remembered, the oldest first. */
  movesOf(pool: number, object: ObjectId, index: number): PageHistory {
    const moves: PageMove[] = []
    const tag = tagOf(pool, object, index) >>> 0
    const oldest = Math.max(0, this.#count - this.#records)
    const words = this.#words
    for (let n = oldest; n < this.#count; n++) {
      const record = n % this.#records
      const at = record * recordWords
      const event = words[at + EVENT]!
      if (words[at + INDEX] !== index || words[at + TAG] !== tag || (event & poolMask) !== pool) continue
      moves.push({
        reason: reasons[(event >>> 16) & 0xff]!,
        from: ((event >>> 24) & 15) - 1,
        to: (event >>> 28) - 1,
        atMs: this.#times[record]!,
      })
    }
    return { moves, sinceMs: oldest === 0 ? this.#began : this.#times[oldest % this.#records]! }
  }

  /** A pool is gone: the next one of its number has another history. */
  forget(pool: number): void {
    const known = Math.min(this.#count, this.#records)
    for (let at = EVENT; at < known * recordWords; at += recordWords)
      if ((this.#words[at]! & poolMask) === pool) this.#words[at]! |= noPool
  }
}

/** There are fewer pools than that. */
const noPool = 0xffff
