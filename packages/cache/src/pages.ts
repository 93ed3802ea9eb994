/**
 * Which pages there are: numbers, queues in the order in which they are to go, and the window: decoded pages.
 *
 * A page has a number as long as an entry can refer to it. A page that is being filled lies in the window, and is in no
 * queue. Full pages are in queues: for each class of lifetimes one for what is new and one for what was used again; so
 * the oldest of a class is about the first whose entries expire.
 *
 * The window has copies of pages in the form in which records are read. What was asked for most lately stays there, by
 * the second-chance rule. A page that is being filled, or `used` twice since the hand passed, is not taken. Only pages
 * that are read take more of it into use: who writes alone needs few frames, and memory for no others.
 *
 * Everything is in typed arrays, reserved for all pages; the operating system gives memory only to what was touched.
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
  /** Frames of the window, one behind the other. */
  readonly window: Buffer
  readonly frames: number
  readonly #queue: Uint8Array
  readonly #older: Int32Array
  readonly #newer: Int32Array
  readonly #frameOf: Int32Array
  readonly #oldest: Int32Array = new Int32Array(queues).fill(none)
  readonly #newest: Int32Array = new Int32Array(queues).fill(none)
  readonly #owner: Int32Array
  /** 0: may be taken; 1: used since the hand passed; 2: being filled. */
  readonly #state: Uint8Array
  #hand = ownFrames
  /** Frames in use are those below: those that are needed for writing, and one more for each page that was read. */
  #framesUsed: number
  #free = none
  /** The stamp of the next page. */
  #stamp = 1

  /** Throws `TmemError` (`TMEM_NO_MEMORY`). */
  constructor(capacity: number, frames: number, allocator: Allocator) {
    this.capacity = capacity
    this.frames = frames + ownFrames
    const bytes = capacity * bytesPerPage + 8
    const memory = allocator.allocate(bytes, 'cache.pages')
    const window = allocator.allocate(this.frames * pageBytes, 'cache.window')
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
    this.window = Buffer.from(window, 0, this.frames * pageBytes)
    this.#owner = new Int32Array(this.frames).fill(none)
    this.#state = new Uint8Array(this.frames)
    this.#framesUsed = Math.min(this.frames, ownFrames + framesForWriting)
  }

  /** Bytes of the tables that are in use: as far as they were touched. */
  get tableBytes(): number {
    return this.watermark * bytesPerPage + this.frames * 5
  }

  /** Bytes that are in use: of the tables, and of the window. */
  get bytes(): number {
    return this.tableBytes + this.window.length
  }

  /** Forgets all pages. */
  clear(): void {
    this.used = this.gone = this.watermark = 0
    this.#free = none
    this.queued.fill(0)
    this.#oldest.fill(none)
    this.#newest.fill(none)
    this.#owner.fill(none)
    this.#state.fill(0)
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
      const page = this.#owner[frame]!
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

  /** Where in the window a page is, in bytes; 0: it is not there. */
  placeOf(page: number): number {
    const frame = this.#frameOf[page]!
    if (frame === 0) return 0
    this.#state[frame] |= 1
    return frame * pageBytes
  }

  /** Where in the window there is room for a page, whose copy is written there now, in bytes. */
  enter(page: number, isFilling: boolean): number {
    let frame = this.#hand
    if (!isFilling && this.#framesUsed < this.frames) frame = this.#framesUsed++
    else
      for (;;) {
        const state = this.#state[frame]!
        if (state === 0) break
        // What is being filled stays.
        if (state === 1) this.#state[frame] = 0
        if (++frame === this.#framesUsed) frame = ownFrames
      }
    const owner = this.#owner[frame]!
    if (owner !== none) this.#frameOf[owner] = 0
    this.#owner[frame] = page
    this.#frameOf[page] = frame
    this.#state[frame] = isFilling ? 2 : 0
    this.#hand = frame + 1 === this.#framesUsed ? ownFrames : frame + 1
    return frame * pageBytes
  }

  /** A page is full: its copy may go. */
  filled(page: number): void {
    this.#state[this.#frameOf[page]!] = 1
  }

  /** Forgets the copy of a page, if there is one. */
  dropFrame(page: number): void {
    const frame = this.#frameOf[page]!
    if (frame === 0) return
    this.#frameOf[page] = 0
    this.#owner[frame] = none
    this.#state[frame] = 0
  }
}
