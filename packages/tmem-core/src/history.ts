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

const reasons: readonly MoveReason[] = ['put', 'recovered', 'sunk', 'sunk_clean', 'copied', 'rose', 'released', 'gone']
const numbers = Object.fromEntries(reasons.map((reason, n) => [reason, n])) as Record<MoveReason, number>

/** Time, index, tag, pool, and what happened. */
const bytesPerRecord = 8 + 4 + 4 + 2 + 2

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
  readonly #indexes: Uint32Array
  /** Scattered handles: two objects of a pool that have a page of one index are told apart by these 32 bits. */
  readonly #tags: Uint32Array
  readonly #pools: Uint16Array
  /** Reason in the low byte, then place before and after in four bits each, plus one. */
  readonly #events: Uint16Array
  readonly #began: number
  /** Records that there ever were; the next one is written at its rest. */
  #count = 0

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
    this.#indexes = new Uint32Array(memory, records * 8, records)
    this.#tags = new Uint32Array(memory, records * 12, records)
    this.#pools = new Uint16Array(memory, records * 16, records)
    this.#events = new Uint16Array(memory, records * 18, records)
    this.#began = clock()
  }

  /** Notes a move of the page of an entry between places by their numbers. */
  note(reason: MoveReason, entry: number, from: number, to: number): void {
    const table = this.#table
    const at = this.#count++ % this.#records
    const pool = table.poolOf(entry)
    const index = table.indexOf(entry)
    this.#times[at] = this.#clock()
    this.#indexes[at] = index
    this.#tags[at] = tagOf(pool, table.objectOf(entry), index)
    this.#pools[at] = pool
    this.#events[at] = numbers[reason] | ((from + 1) << 8) | ((to + 1) << 12)
  }

  /** The moves of a page that are remembered, the oldest first. */
  movesOf(pool: number, object: ObjectId, index: number): PageHistory {
    const moves: PageMove[] = []
    const tag = tagOf(pool, object, index) >>> 0
    const oldest = Math.max(0, this.#count - this.#records)
    for (let n = oldest; n < this.#count; n++) {
      const at = n % this.#records
      if (this.#indexes[at] !== index || this.#tags[at] !== tag || this.#pools[at] !== pool) continue
      const event = this.#events[at]!
      moves.push({
        reason: reasons[event & 0xff]!,
        from: ((event >>> 8) & 15) - 1,
        to: (event >>> 12) - 1,
        atMs: this.#times[at]!,
      })
    }
    return { moves, sinceMs: oldest === 0 ? this.#began : this.#times[oldest % this.#records]! }
  }

  /** A pool is gone: the next one of its number has another history. */
  forget(pool: number): void {
    const known = Math.min(this.#count, this.#records)
    for (let at = 0; at < known; at++) if (this.#pools[at] === pool) this.#pools[at] = noPool
  }
}

/** There are fewer pools than that. */
const noPool = 0xffff
