/**
 * The pages of a cache: their numbers, their queues in the order of eviction, and the window of decoded pages.
 *
 * A page has a number as long as an entry can refer to it. A page that is being filled is in the window and in no
 * queue. Each class of lifetimes has a queue of full pages with new entries and one with reused entries, so that the
 * oldest page of a class is about the first to expire.
 *
 * The window has decoded copies of pages, from which records are read. It keeps recently used pages by the
 * second-chance rule: a page that is being filled, or was `used` twice since the hand passed, is not replaced. Only
 * reads make the window use more frames: a program that only writes needs few, and no memory for others.
 *
 * The first part of the window is fixed, and pages are filled there. The chunks behind it hold copies alone, and come
 * and go with the free memory (`grow`, `shrink`).
 *
 * All state is in typed arrays, reserved for all pages; the operating system backs only the touched parts with memory.
 */
import type { Allocator } from '@tmem/core'
import { TmemError } from '@tmem/core'
import { pageBytes } from './records.ts'
import { Buffer } from './runtime.ts'

/** No page, no frame. */
export const none = -1

/** Longest lifetimes of the classes, in milliseconds; what lives longer, or for ever, has classes of its own. */
const lifetimes: readonly number[] = [1e3, 8e3, 64e3, 512e3, 4096e3, 32768e3, 262144e3]
const classes = lifetimes.length + 2
/** Queues: of each class, what is new, then what was used again. */
export const queues: number = classes * 2
/** No queue: being filled; and gone from the stack, while entries may still refer to it. */
const filling = 255
const gone = 254

/** The queue for entries with so many milliseconds to live. */
export function queueFor(lifetime: number, isMain: boolean): number {
  let which = 0
  if (lifetime === Number.POSITIVE_INFINITY) which = classes - 1
  else while (which < lifetimes.length && lifetime > lifetimes[which]!) which++
  return which * 2 + (isMain ? 1 : 0)
}

/** Whether a queue has what was used again. */
export const isMainQueue = (queue: number): boolean => (queue & 1) === 1

/**
 * Frames of the window that are never of a page: for transfers, for the pages that are being emptied, and for a record
 * that moves.
 */
export const transferFrame = 0
export const emptyingFrame = 1
export const nestedFrame = 2
export const movingFrame = 3
const ownFrames = 4
/** Frames of a chunk of the window: a share of those that there may be, and at least and at most so many. */
const chunkShare = 64
const minChunkFrames = 16
const maxChunkFrames = 1024
/** Frames in use before any page is read: enough for a page of each queue that is being filled, and some that were. */
const framesForWriting = 2 * queues

/** Bytes of the tables for each page. */
const bytesPerPage = 8 + 4 * 5 + 2 * 2 + 1

/** What is known of a page of an earlier run. */
export interface RestoredPage {
  readonly stamp: number
  readonly span: number
  readonly hash: number
  readonly queue: number
  readonly expiry: number
}

export class PageBook {
  /** Largest number of pages at once. */
  readonly capacity: number
  /**
   * Pages with a number, those of them that are gone; the largest number that was ever given out, plus one; pages in
   * queues of both kinds.
   */
  used = 0
  gone = 0
  watermark = 0
  readonly queued: Int32Array = new Int32Array(2)
  /** Latest end of life of its entries; entries that are in the table; stamp. */
  readonly expiry: Float64Array
  readonly live: Uint16Array
  readonly stamps: Uint32Array
  /** Pages of a record that has its own, 0: shared; and the hash of its entry. */
  readonly spans: Uint16Array
  readonly hashes: Int32Array
  /** Frames of the window that are always there, one behind the other. */
  readonly window: Buffer
  /** Where `locate` and `enter` have found a page, or room for one. */
  bytes: Buffer
  at = 0
  /** Bytes of a chunk, and of those that there are. */
  readonly chunkBytes: number
  extraBytes = 0
  /** Frames of the part that is always there. */
  readonly #baseFrames: number
  readonly #chunkFrames: number
  readonly #chunks: Buffer[] = []
  readonly #maxChunks: number
  readonly #allocator: Allocator
  readonly #queue: Uint8Array
  readonly #older: Int32Array
  readonly #newer: Int32Array
  readonly #frameOf: Int32Array
  readonly #oldest: Int32Array = new Int32Array(queues).fill(none)
  readonly #newest: Int32Array = new Int32Array(queues).fill(none)
  /** By frame: its page, plus one; 0: it has none. */
  readonly #owner: Int32Array
  /** 0: may be taken; 1: used since the hand passed; 2: being filled. */
  readonly #state: Uint8Array
  /** Where the next frame is looked for, for a copy, and for a page that is being filled. */
  #hand = ownFrames
  #fillingHand = ownFrames
  /** Frames in use are those below: those that are needed for writing, and one more for each page that was read. */
  #framesUsed: number
  #free = none
  /** The stamp of the next page. */
  #stamp = 1

  /**
   * @param frames of the window that are always there
   * @param extraFrames how many may come and go behind them
   * @throws TmemError (`TMEM_NO_MEMORY`)
   */
  constructor(capacity: number, frames: number, extraFrames: number, allocator: Allocator) {
    this.capacity = capacity
    this.#allocator = allocator
    this.#baseFrames = frames + ownFrames
    this.#chunkFrames = Math.min(maxChunkFrames, Math.max(minChunkFrames, Math.floor(extraFrames / chunkShare)))
    this.chunkBytes = this.#chunkFrames * pageBytes
    this.#maxChunks = Math.floor(extraFrames / this.#chunkFrames)
    const bytes = capacity * bytesPerPage + 8
    const memory = allocator.allocate(bytes, 'cache.pages')
    const window = allocator.allocate(this.#baseFrames * pageBytes, 'cache.window')
    if (memory === undefined || window === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `cache: no memory for the tables of ${capacity} pages`, { layer: 'cache' })
    let at = 0
    const take = (width: number): number => {
      at += capacity * width
      return at - capacity * width
    }
    this.expiry = new Float64Array(memory, take(8), capacity)
    this.stamps = new Uint32Array(memory, take(4), capacity)
    this.hashes = new Int32Array(memory, take(4), capacity)
    this.#older = new Int32Array(memory, take(4), capacity)
    this.#newer = new Int32Array(memory, take(4), capacity)
    this.#frameOf = new Int32Array(memory, take(4), capacity)
    this.live = new Uint16Array(memory, take(2), capacity)
    this.spans = new Uint16Array(memory, take(2), capacity)
    this.#queue = new Uint8Array(memory, take(1), capacity)
    this.window = Buffer.from(window, 0, this.#baseFrames * pageBytes)
    this.bytes = this.window
    const allFrames = this.#baseFrames + this.#maxChunks * this.#chunkFrames
    this.#owner = new Int32Array(allFrames)
    this.#state = new Uint8Array(allFrames)
    this.#framesUsed = Math.min(this.#baseFrames, ownFrames + framesForWriting)
  }

  /** Frames that there are. */
  get frames(): number {
    return this.#baseFrames + this.#chunks.length * this.#chunkFrames
  }

  /** Bytes of the tables that are in use: as far as they were touched. */
  get tableBytes(): number {
    return this.watermark * bytesPerPage + this.frames * 5
  }

  /** Bytes of the window, as it is now. */
  get windowBytes(): number {
    return this.window.length + this.extraBytes
  }

  /** Forgets all pages. */
  clear(): void {
    this.used = this.gone = this.watermark = 0
    this.#free = none
    this.queued.fill(0)
    this.#oldest.fill(none)
    this.#newest.fill(none)
    while (this.shrink());
    this.#owner.fill(0, 0, this.#framesUsed)
    this.#state.fill(0, 0, this.#framesUsed)
  }

  /** Throws an `Error` that names a broken invariant; every page in a queue must have entries. For tests. */
  check(hasEntries: (page: number) => boolean): void {
    const counted = [0, 0]
    for (let queue = 0; queue < queues; queue++) {
      let older: number = none
      for (let page = this.#oldest[queue]!; page !== none; page = this.#newer[page]!) {
        if (this.#queue[page] !== queue || this.#older[page] !== older)
          throw new Error(`cache: page ${page} is out of order in queue ${queue}`)
        if (!hasEntries(page)) throw new Error(`cache: page ${page} is in queue ${queue}, and has no entries`)
        counted[queue & 1]! += Math.max(1, this.spans[page]!)
        older = page
      }
      if (this.#newest[queue] !== older) throw new Error(`cache: queue ${queue} has another end`)
    }
    if (counted[0] !== this.queued[0] || counted[1] !== this.queued[1])
      throw new Error(`cache: ${counted.join(' and ')} pages in queues, counted ${this.queued.join(' and ')}`)
    for (let frame = ownFrames; frame < this.frames; frame++) {
      const page = this.#owner[frame]! - 1
      if (page !== none && this.#frameOf[page] !== frame) throw new Error(`cache: frame ${frame} has a wrong owner`)
    }
  }

  /** Takes a number for a page that is being filled, with a stamp of its own; `none`: there is none. */
  take(span: number): number {
    let page = this.#free
    if (page !== none) this.#free = this.#newer[page]!
    else if (this.watermark < this.capacity) page = this.watermark++
    else return none
    this.used++
    this.#queue[page] = filling
    this.expiry[page] = 0
    this.live[page] = 0
    this.spans[page] = span
    this.#frameOf[page] = 0
    this.stamps[page] = this.#stamp++
    return page
  }

  /** The stamp that the next page will get. May only be raised. */
  get nextStamp(): number {
    return this.#stamp
  }

  set nextStamp(stamp: number) {
    this.#stamp = Math.max(this.#stamp, stamp)
  }

  /** Gives a number back; the page is in no queue. */
  release(page: number): void {
    this.dropFrame(page)
    this.#newer[page] = this.#free
    this.#free = page
    this.used--
  }

  // ---- Queues -----------------------------------------------------------------------------------------------------

  /** The queue of a page that is full. */
  queueOf(page: number): number {
    return this.#queue[page]!
  }

  /** Whether a page is being filled. */
  isFilling(page: number): boolean {
    return this.#queue[page] === filling
  }

  /** Whether a page is in a queue: it is full, and in the stack. */
  isQueued(page: number): boolean {
    return page < this.watermark && this.#queue[page]! < queues
  }

  /** Enters a page of an earlier run, behind those of its queue. Its number is none of this run's. */
  restore(page: number, { stamp, span, hash, queue, expiry }: RestoredPage): void {
    // Numbers below that have no page are given back at the end.
    while (this.watermark <= page) this.#queue[this.watermark++] = filling
    this.used++
    this.stamps[page] = stamp
    this.spans[page] = span
    this.hashes[page] = hash
    this.expiry[page] = expiry
    this.live[page] = 0
    this.#frameOf[page] = 0
    this.append(page, queue)
  }

  /** All pages of an earlier run were entered: `drop` is called with those that have no entries. */
  endRestore(drop: (page: number) => void): void {
    for (let page = this.watermark - 1; page >= 0; page--) {
      if (!this.isQueued(page)) this.used++
      else if (this.live[page] !== 0) continue
      else {
        drop(page)
        this.unlink(page)
      }
      this.release(page)
    }
  }

  /** Whether a page is gone from the stack, and has its number only because entries may refer to it. */
  isGone(page: number): boolean {
    return this.#queue[page] === gone
  }

  /** Notes that a page, which is in no queue, is gone from the stack. */
  setGone(page: number): void {
    this.dropFrame(page)
    this.#queue[page] = gone
    this.gone++
  }

  /** Gives the numbers of all pages back that are gone: no entry refers to them any more. */
  releaseGone(): void {
    for (let page = 0; this.gone > 0 && page < this.watermark; page++) {
      if (!this.isGone(page)) continue
      this.gone--
      this.#queue[page] = filling
      this.release(page)
    }
  }

  /** The page of a queue that is there longest, or `none`. */
  oldest(queue: number): number {
    return this.#oldest[queue]!
  }

  /** The page that came after that one in its queue, or `none`. */
  newer(page: number): number {
    return this.#newer[page]!
  }

  /** Puts a page that is in no queue at the new end of one. */
  append(page: number, queue: number): void {
    const newest = this.#newest[queue]!
    this.#older[page] = newest
    this.#newer[page] = none
    if (newest === none) this.#oldest[queue] = page
    else this.#newer[newest] = page
    this.#newest[queue] = page
    this.#queue[page] = queue
    this.queued[queue & 1]! += Math.max(1, this.spans[page]!)
  }

  /** Takes a page out of its queue. */
  unlink(page: number): void {
    const queue = this.#queue[page]!
    const older = this.#older[page]!
    const newer = this.#newer[page]!
    if (older === none) this.#oldest[queue] = newer
    else this.#newer[older] = newer
    if (newer === none) this.#newest[queue] = older
    else this.#older[newer] = older
    this.#queue[page] = filling
    this.queued[queue & 1]! -= Math.max(1, this.spans[page]!)
  }

  // ---- The window -------------------------------------------------------------------------------------------------

  /** Whether a page is in the window: then `bytes` and `at` say where. */
  locate(page: number): boolean {
    const frame = this.#frameOf[page]!
    if (frame === 0) return false
    this.#state[frame] |= 1
    this.#pointAt(frame)
    return true
  }

  /** Where in `window` a page is that is being filled, in bytes. */
  placeOf(page: number): number {
    return this.#frameOf[page]! * pageBytes
  }

  /** Whether all frames that there are have been in use, and there may be more. */
  get isTight(): boolean {
    return this.#framesUsed === this.frames && this.#chunks.length < this.#maxChunks
  }

  /** Takes one more chunk. False: there is no memory for it. */
  grow(): boolean {
    const memory = this.#allocator.allocate(this.chunkBytes, 'cache.window')
    if (memory === undefined) return false
    this.#chunks.push(Buffer.from(memory, 0, this.chunkBytes))
    this.extraBytes += this.chunkBytes
    return true
  }

  /** Gives a chunk back, with the copies in it. False: there is none. */
  shrink(): boolean {
    if (this.#chunks.pop() === undefined) return false
    this.extraBytes -= this.chunkBytes
    const { frames } = this
    for (let frame = frames; frame < this.#framesUsed; frame++) this.#empty(frame)
    this.#framesUsed = Math.min(this.#framesUsed, frames)
    if (this.#hand >= this.#framesUsed) this.#hand = ownFrames
    this.bytes = this.window
    return true
  }

  /** Finds room in the window for a copy of a page, which is written to `bytes[at]` now. */
  enter(page: number): void {
    const frame = this.#framesUsed < this.frames ? this.#framesUsed++ : this.#freeFrame(this.#hand, this.#framesUsed)
    this.#hand = frame + 1 >= this.#framesUsed ? ownFrames : frame + 1
    this.#settle(page, frame, 0)
    this.#pointAt(frame)
  }

  /** Finds room in `window` for a page that is being filled, in bytes. */
  enterFilling(page: number): number {
    const end = Math.min(this.#framesUsed, this.#baseFrames)
    const frame = this.#freeFrame(this.#fillingHand, end)
    this.#fillingHand = frame + 1 === end ? ownFrames : frame + 1
    this.#settle(page, frame, 2)
    return frame * pageBytes
  }

  /** A page is full: its copy may go. */
  filled(page: number): void {
    this.#state[this.#frameOf[page]!] = 1
  }

  /** Forgets the copy of a page, if there is one. */
  dropFrame(page: number): void {
    const frame = this.#frameOf[page]!
    if (frame !== 0) this.#empty(frame)
  }

  /** The first frame from `hand` on that may be taken. */
  #freeFrame(hand: number, end: number): number {
    for (let frame = hand; ; ) {
      const state = this.#state[frame]!
      if (state === 0) return frame
      // What is being filled stays.
      if (state === 1) this.#state[frame] = 0
      if (++frame === end) frame = ownFrames
    }
  }

  #settle(page: number, frame: number, state: number): void {
    this.#empty(frame)
    this.#owner[frame] = page + 1
    this.#frameOf[page] = frame
    this.#state[frame] = state
  }

  #empty(frame: number): void {
    const owner = this.#owner[frame]!
    if (owner !== 0) this.#frameOf[owner - 1] = 0
    this.#owner[frame] = 0
    this.#state[frame] = 0
  }

  #pointAt(frame: number): void {
    const extra = frame - this.#baseFrames
    if (extra < 0) {
      this.bytes = this.window
      this.at = frame * pageBytes
    } else {
      const chunk = Math.floor(extra / this.#chunkFrames)
      this.bytes = this.#chunks[chunk]!
      this.at = (extra - chunk * this.#chunkFrames) * pageBytes
    }
  }
}
