/**
 * The frames of the first level: pages of files in memory, on an active and an inactive list.
 *
 * A page enters the inactive list. Its first access marks it referenced, the second moves it to the active list; so
 * pages that are read once, however many, never push out those that are read again. When the active list grows longer
 * than the inactive one its oldest pages go back. Frames are taken from the old end of the inactive list.
 *
 * A frame that is pinned is not given to anybody else. One that is dropped while it is pinned is detached: nobody finds
 * it any more, those who hold it may read it, and the last one to let go frees it.
 *
 * Invariants: a frame is in the table, and on one of the lists, and on the chain of its file, exactly while it is
 * neither free nor detached. Frames that are pinned or loading are never evicted.
 *
 * Source: mm/swap.c and mm/vmscan.c of Linux 3.x (mark_page_accessed, shrink_inactive_list), by their documented
 * behaviour.
 */
import { type Allocator, none, TmemError } from '@tmem/core'
import { HandleTable } from '@tmem/core/unstable'

/** Bits of a frame's state. */
export const Frame = {
  /** Every byte of it is the file's. */
  UpToDate: 1,
  Referenced: 2,
  Active: 4,
  /** Being filled: `loading` has the promise. Nobody else touches the bytes. */
  Loading: 8,
  /** At least one of its bytes came from the file. */
  Mapped: 16,
  /** Dropped, but pinned. */
  Detached: 32,
  /** Read ahead, and not asked for yet. */
  Ahead: 64,
} as const

const inactive = 0
const active = 1

/** Told of a frame that is evicted, while it still has its bytes. */
export type Evicted = (frame: number) => void

export class Frames {
  readonly count: number
  readonly pageSize: number
  /** Bits of `Frame`, by frame. */
  readonly state: Uint8Array
  /** By frame: the page. */
  readonly pages: readonly Uint8Array[]
  /** By frame: resolves when it is not being filled any more. Never rejects. */
  readonly loading: (Promise<void> | undefined)[]
  readonly #pins: Uint32Array
  /** By frame: its neighbours on the chain of its file. */
  readonly #previous: Int32Array
  readonly #next: Int32Array
  /** By file number: the first frame of the chain. */
  readonly #first: Map<number, number> = new Map()
  readonly #table: HandleTable
  readonly #evicted: Evicted
  activations = 0
  deactivations = 0
  evictions = 0

  /** Throws `TmemError` with `TMEM_NO_MEMORY` when the allocator has too little. */
  constructor(count: number, pageSize: number, allocator: Allocator, evicted: Evicted) {
    const reserve = (bytes: number, part: string): ArrayBufferLike => {
      const memory = allocator.allocate(bytes, `page-cache.${part}`)
      if (memory === undefined)
        throw new TmemError(
          'TMEM_NO_MEMORY',
          `no memory for the ${part} of a page cache (${bytes} bytes): give it a smaller size`,
          { layer: 'page-cache' },
        )
      return memory
    }
    this.count = count
    this.pageSize = pageSize
    this.#evicted = evicted
    this.#table = HandleTable.create({ capacity: count, queues: 2, pools: 1, allocator, site: 'page-cache' })
    const memory = reserve(count * pageSize, 'frames')
    this.pages = Array.from({ length: count }, (_, frame) => new Uint8Array(memory, frame * pageSize, pageSize))
    const tables = reserve(count * 13, 'tables')
    this.#pins = new Uint32Array(tables, 0, count)
    this.#previous = new Int32Array(tables, count * 4, count)
    this.#next = new Int32Array(tables, count * 8, count)
    this.state = new Uint8Array(tables, count * 12, count)
    this.loading = new Array<Promise<void> | undefined>(count).fill(undefined)
  }

  /** Frames that hold a page. */
  get resident(): number {
    return this.#table.size
  }

  get active(): number {
    return this.#table.queued(active)
  }

  get inactive(): number {
    return this.#table.queued(inactive)
  }

  /** The frame of a page, or `none`. */
  find(file: number, index: number): number {
    return this.#table.find(0, file, index)
  }

  /** The number of the file whose page a frame holds. */
  fileOf(frame: number): number {
    return this.#table.objectOf(frame) as number
  }

  /** Which page of its file a frame holds. */
  indexOf(frame: number): number {
    return this.#table.indexOf(frame)
  }

  /** Any frame of a file, or `none`; `next` goes on. */
  first(file: number): number {
    return this.#first.get(file) ?? none
  }

  /** The frame after this one on the chain of its file, or `none`. */
  next(frame: number): number {
    return this.#next[frame]!
  }

  /** Gives a page a frame, empty and with no bit set, evicting another page if need be; `none` when all are in use. */
  enter(file: number, index: number): number {
    let frame = this.#table.acquire()
    if (frame === none) {
      if (!this.#evictOne()) return none
      frame = this.#table.acquire()
    }
    if (!this.#table.insert(frame, 0, file, index)) {
      this.#table.release(frame)
      return none
    }
    this.#table.append(inactive, frame)
    this.state[frame] = 0
    const first = this.first(file)
    this.#previous[frame] = none
    this.#next[frame] = first
    if (first !== none) this.#previous[first] = frame
    this.#first.set(file, frame)
    return frame
  }

  /** Notes an access. */
  touch(frame: number): void {
    const state = this.state[frame]! & ~Frame.Ahead
    if ((state & Frame.Referenced) === 0) this.state[frame] = state | Frame.Referenced
    else if ((state & Frame.Active) === 0) {
      this.#table.unlink(inactive, frame)
      this.#table.append(active, frame)
      this.state[frame] = (state & ~Frame.Referenced) | Frame.Active
      this.activations++
    }
  }

  /** Keeps the frame from being used for anything else. */
  pin(frame: number): void {
    this.#pins[frame]!++
  }

  unpin(frame: number): void {
    if (--this.#pins[frame]! === 0 && (this.state[frame]! & Frame.Detached) !== 0) this.#table.release(frame)
  }

  /** Takes a page out: nobody finds it any more. Its frame is free as soon as it is not pinned. */
  drop(frame: number): void {
    const state = this.state[frame]!
    const file = this.fileOf(frame)
    const previous = this.#previous[frame]!
    const next = this.#next[frame]!
    if (next !== none) this.#previous[next] = previous
    if (previous !== none) this.#next[previous] = next
    else if (next !== none) this.#first.set(file, next)
    else this.#first.delete(file)
    this.#table.unlink((state & Frame.Active) === 0 ? inactive : active, frame)
    this.#table.remove(frame)
    this.state[frame] = state | Frame.Detached
    if (this.#pins[frame] === 0) this.#table.release(frame)
  }

  /** Evicts up to `count` pages; how many there were. */
  evict(count: number): number {
    let evicted = 0
    while (evicted < count && this.#evictOne()) evicted++
    return evicted
  }

  #evictOne(): boolean {
    const table = this.#table
    // Two rounds at most: pages that come over from the active list are tried, too.
    for (let tries = table.size; tries > 0; tries--) {
      if (table.queued(active) > table.queued(inactive)) this.#deactivate()
      const frame = table.oldest(inactive)
      if (frame === none) return false
      if (this.#pins[frame] === 0 && (this.state[frame]! & Frame.Loading) === 0) {
        this.#evicted(frame)
        this.drop(frame)
        this.evictions++
        return true
      }
      table.unlink(inactive, frame)
      table.append(inactive, frame)
    }
    return false
  }

  #deactivate(): void {
    const frame = this.#table.oldest(active)
    this.#table.unlink(active, frame)
    this.#table.append(inactive, frame)
    this.state[frame] = this.state[frame]! & ~(Frame.Active | Frame.Referenced)
    this.deactivations++
  }
}

/** Copies bytes of a page, without making a view of the source when it is copied whole. */
export function copy(from: Uint8Array, at: number, length: number, into: Uint8Array, to: number): void {
  into.set(at === 0 && length === from.length ? from : from.subarray(at, at + length), to)
}
