/**
 * Page frames: 4 KiB units in large chunks of memory, handed out in runs of a power of two (a buddy system per chunk).
 *
 * A frame is a number; frame f lies in chunk f >>> chunkShift. Chunks come from the allocator one at a time and are
 * given back when they are empty and the owner asks for it. Per frame there is one byte of state; free runs are chained
 * in words that the owner lends (those of the handle table, unused while the frame is free), so a frame costs nothing
 * more.
 *
 * Invariants: a free run never has a free buddy of the same order; every frame of a present chunk belongs to exactly
 * one run; frames of an absent chunk belong to none.
 */
import { basePageSize } from '@tmem/core'
import { copyBytes } from '@tmem/core/runtime'

const none = -1

/** State byte of the first frame of a run: in use or free, with the order in the low four bits. All others are 0. */
const USED = 0x80
const FREE = 0x40
/** A run in use that belongs to a caller outside. */
const LENT = 0x20
/** A free run that is in no chain: its chunk is being emptied. */
const FENCED = 0x10
const orderMask = 0x0f

/** Words of the owner used for the chains of free runs. */
const PREVIOUS = 0
const NEXT = 1

/** Words of the state: frames in use, chunks present, then a chain per order, then frames in use per chunk. */
const FRAMES_USED = 0
const CHUNKS = 1
const CHAINS = 2
const maxOrder = 14
const CHUNK_USED: number = CHAINS + maxOrder + 1

/** In place of a chunk that is not there. */
const absent: Uint8Array = new Uint8Array(0)

/** The memory of a set of frames: what another thread needs to attach to it. */
export interface FramesMemory {
  readonly capacity: number
  readonly chunkShift: number
  readonly state: ArrayBufferLike
  readonly frameStates: ArrayBufferLike
  readonly chunks: readonly (ArrayBufferLike | undefined)[]
}

export class Frames {
  /** Frames in all, present or not. */
  readonly capacity: number
  /** log2 of the frames in a chunk. */
  readonly chunkShift: number
  readonly #state: Int32Array
  readonly #frames: Uint8Array
  readonly #words: Int32Array
  readonly #stride: number
  readonly #chunks: Uint8Array[]
  readonly #chunkMask: number

  /** Bytes that `state` needs for so many chunks. */
  static stateBytes(chunks: number): number {
    return (CHUNK_USED + chunks) * 4
  }

  /**
   * @param memory as made by the owner; `state` and `frameStates` zeroed for new frames
   * @param words at least two words per frame at the start of each group of `stride` words; the owner's, lent while
   * free
   */
  constructor(memory: FramesMemory, words: Int32Array, stride: number) {
    this.capacity = memory.capacity
    this.chunkShift = memory.chunkShift
    this.#chunkMask = (1 << memory.chunkShift) - 1
    this.#state = new Int32Array(memory.state)
    this.#frames = new Uint8Array(memory.frameStates)
    this.#words = words
    this.#stride = stride
    this.#chunks = memory.chunks.map((chunk) => (chunk === undefined ? absent : new Uint8Array(chunk)))
  }

  /** Marks all chains empty; once, by whoever made the memory. */
  initialize(): void {
    this.#state.fill(none, CHAINS, CHAINS + maxOrder + 1)
  }

  /** Frames in use. */
  get used(): number {
    return this.#state[FRAMES_USED]
  }

  /** Chunks present. */
  get chunks(): number {
    return this.#state[CHUNKS]
  }

  /** Number of chunks when all are present. */
  get chunkCount(): number {
    return this.#chunks.length
  }

  /** Frames that chunk `chunk` has (the last one may be smaller). */
  chunkFrames(chunk: number): number {
    return Math.min(1 << this.chunkShift, this.capacity - (chunk << this.chunkShift))
  }

  /** Frames in use in a chunk. */
  chunkUsed(chunk: number): number {
    return this.#state[CHUNK_USED + chunk]
  }

  /** Whether a chunk is present. */
  has(chunk: number): boolean {
    return this.#chunks[chunk].length !== 0
  }

  /** The lowest absent chunk, or `none`. */
  absentChunk(): number {
    if (this.#state[CHUNKS] === this.#chunks.length) return none
    return this.#chunks.indexOf(absent)
  }

  /** Makes a chunk present; its frames become free. */
  addChunk(chunk: number, memory: ArrayBufferLike): void {
    this.#chunks[chunk] = new Uint8Array(memory)
    this.openChunk(chunk)
  }

  /** Frees all frames of a chunk whose memory is there already. */
  openChunk(chunk: number): void {
    let frame = chunk << this.chunkShift
    const end = frame + this.chunkFrames(chunk)
    while (frame < end) {
      let order = this.chunkShift
      while ((frame & ((1 << order) - 1)) !== 0 || frame + (1 << order) > end) order--
      this.#push(frame, order)
      frame += 1 << order
    }
    this.#state[CHUNKS] = this.#state[CHUNKS] + 1
  }

  /** Takes an empty chunk out: its memory, which is the caller's then. */
  dropChunk(chunk: number): ArrayBufferLike {
    let frame = chunk << this.chunkShift
    const end = frame + this.chunkFrames(chunk)
    while (frame < end) {
      const order = this.#frames[frame] & orderMask
      this.#unlink(frame, order)
      frame += 1 << order
    }
    const memory = this.#chunks[chunk].buffer
    this.#chunks[chunk] = absent
    this.#state[CHUNKS] = this.#state[CHUNKS] - 1
    return memory
  }

  /** Whether a run of 2^order frames is free. */
  available(order: number): boolean {
    for (let k = order; k <= this.chunkShift; k++) if (this.#state[CHAINS + k] !== none) return true
    return false
  }

  /** Takes a run of 2^order frames; its first frame, or `none`. */
  allocate(order: number): number {
    const state = this.#state
    let k = order
    while (state[CHAINS + k] === none) if (++k > this.chunkShift) return none
    const frame = state[CHAINS + k]
    const next = this.#words[frame * this.#stride + NEXT]
    state[CHAINS + k] = next
    if (next !== none) this.#words[next * this.#stride + PREVIOUS] = none
    while (k > order) {
      k--
      this.#push(frame + (1 << k), k)
    }
    this.#frames[frame] = USED | order
    state[FRAMES_USED] = state[FRAMES_USED] + (1 << order)
    const chunkAt = CHUNK_USED + (frame >>> this.chunkShift)
    state[chunkAt] = state[chunkAt] + (1 << order)
    return frame
  }

  /** Takes the free runs of one chunk out of reach, so that nothing is allocated there; undone by `unfence`. */
  fence(chunk: number): void {
    let frame = chunk << this.chunkShift
    const end = frame + this.chunkFrames(chunk)
    while (frame < end) {
      const state = this.#frames[frame]
      if ((state & FREE) !== 0) {
        this.#unlink(frame, state & orderMask)
        this.#frames[frame] = state | FENCED
      }
      frame += 1 << (state & orderMask)
    }
  }

  /** Puts the free runs of a fenced chunk back, grown together. */
  unfence(chunk: number): void {
    let frame = chunk << this.chunkShift
    const end = frame + this.chunkFrames(chunk)
    while (frame < end) {
      const state = this.#frames[frame]
      const order = state & orderMask
      // Buddies further on are still fenced, so a run grows only backwards and the walk stays right.
      if ((state & FENCED) !== 0) this.#release(frame, order)
      frame += 1 << order
    }
  }

  /** Gives a run back; it grows together with its free buddies. */
  free(frame: number): void {
    const state = this.#state
    const order = this.#frames[frame] & orderMask
    state[FRAMES_USED] = state[FRAMES_USED] - (1 << order)
    const chunkAt = CHUNK_USED + (frame >>> this.chunkShift)
    state[chunkAt] = state[chunkAt] - (1 << order)
    this.#release(frame, order)
  }

  /** Gives back a run in a fenced chunk: it stays out of reach, and does not grow. */
  freeFenced(frame: number): void {
    const order = this.#frames[frame] & orderMask
    this.#state[FRAMES_USED] = this.#state[FRAMES_USED] - (1 << order)
    const chunkAt = CHUNK_USED + (frame >>> this.chunkShift)
    this.#state[chunkAt] = this.#state[chunkAt] - (1 << order)
    this.#frames[frame] = FREE | FENCED | order
  }

  /** Whether two frames lie in one chunk. */
  sameChunk(a: number, b: number): boolean {
    return a >>> this.chunkShift === b >>> this.chunkShift
  }

  /** Marks a run in use as belonging to a caller outside. */
  lend(frame: number): void {
    this.#frames[frame] |= LENT
  }

  /** Ends `lend`. Throws `RangeError` for what is not lent. */
  unlend(frame: number): void {
    if (!this.isLent(frame)) throw new RangeError(`frame ${frame} is not the caller's`)
    this.#frames[frame] &= ~LENT
  }

  /** Whether a run belongs to a caller outside. */
  isLent(frame: number): boolean {
    return (this.#frames[frame] & LENT) !== 0
  }

  /** Throws `RangeError` unless `frame` is a lent run of that order. */
  assertLent(frame: number, order: number): void {
    if (!this.isLent(frame)) throw new RangeError(`frame ${frame} is not the caller's`)
    if (this.orderOf(frame) !== order)
      throw new RangeError(`frame ${frame} has ${1 << this.orderOf(frame)} parts, the pool's pages have ${1 << order}`)
  }

  /** Order of the run in use that starts at `frame`. */
  orderOf(frame: number): number {
    return this.#frames[frame] & orderMask
  }

  /** Turns one run in use into runs of single frames, all in use. */
  shatter(frame: number): void {
    const count = 1 << (this.#frames[frame] & orderMask)
    this.#frames.fill(USED, frame, frame + count)
  }

  /** First frame in use at or after `frame` in its chunk that starts a run, or `none`. */
  nextUsed(frame: number): number {
    const chunk = frame >>> this.chunkShift
    const end = (chunk << this.chunkShift) + this.chunkFrames(chunk)
    let at = frame
    while (at < end) {
      const state = this.#frames[at]
      if ((state & USED) !== 0) return at
      at += 1 << (state & orderMask)
    }
    return none
  }

  /** The chunk's bytes that hold `frame`. */
  bytesOf(frame: number): Uint8Array {
    return this.#chunks[frame >>> this.chunkShift]
  }

  /** Where `frame` starts in `bytesOf(frame)`. */
  offsetOf(frame: number): number {
    return (frame & this.#chunkMask) * basePageSize
  }

  /** Copies a whole buffer to a run, from byte `at` of the run on. */
  fill(frame: number, at: number, page: Uint8Array): void {
    this.#chunks[frame >>> this.chunkShift].set(page, (frame & this.#chunkMask) * basePageSize + at)
  }

  /** Copies bytes in from an offset of a buffer. */
  copyIn(frame: number, source: Uint8Array, sourceAt: number, length: number): void {
    const chunk = this.#chunks[frame >>> this.chunkShift]
    copyBytes.call(source, chunk, (frame & this.#chunkMask) * basePageSize, sourceAt, sourceAt + length)
  }

  /** Copies bytes out to an offset of a buffer, from byte `at` of the run on. */
  copyOut(frame: number, at: number, target: Uint8Array, targetAt: number, length: number): void {
    const start = (frame & this.#chunkMask) * basePageSize + at
    copyBytes.call(this.#chunks[frame >>> this.chunkShift], target, targetAt, start, start + length)
  }

  /** Copies one frame to another. */
  copyFrame(from: number, to: number, count: number): void {
    const start = this.offsetOf(from)
    copyBytes.call(
      this.#chunks[from >>> this.chunkShift],
      this.#chunks[to >>> this.chunkShift],
      this.offsetOf(to),
      start,
      start + count * basePageSize,
    )
  }

  /** Overwrites a run with zeros. */
  scrub(frame: number): void {
    const start = this.offsetOf(frame)
    this.bytesOf(frame).fill(0, start, start + (basePageSize << this.orderOf(frame)))
  }

  /** Makes the operating system give real memory to the frame, without changing a byte. */
  touch(frame: number): void {
    const chunk = this.#chunks[frame >>> this.chunkShift]
    const at = (frame & this.#chunkMask) * basePageSize
    const same = chunk[at]
    chunk[at] = same
  }

  /** Throws unless the invariants hold; for tests. */
  check(): void {
    let used = 0
    let free = 0
    for (let chunk = 0; chunk < this.#chunks.length; chunk++) {
      if (!this.has(chunk)) continue
      let frame = chunk << this.chunkShift
      const end = frame + this.chunkFrames(chunk)
      let chunkUsed = 0
      while (frame < end) {
        const state = this.#frames[frame]
        const order = state & orderMask
        if ((state & (USED | FREE)) === 0) throw new Error(`frame ${frame} belongs to no run`)
        if ((state & USED) !== 0) chunkUsed += 1 << order
        else {
          free++
          if (order < this.chunkShift && this.#frames[frame ^ (1 << order)] === (FREE | order))
            throw new Error(`frames ${frame} and ${frame ^ (1 << order)} are free buddies`)
        }
        frame += 1 << order
      }
      if (chunkUsed !== this.chunkUsed(chunk))
        throw new Error(`chunk ${chunk} counts ${this.chunkUsed(chunk)} frames, has ${chunkUsed}`)
      used += chunkUsed
    }
    let chained = 0
    for (let order = 0; order <= this.chunkShift; order++)
      for (let at = this.#state[CHAINS + order]; at !== none; at = this.#words[at * this.#stride + NEXT]) {
        if (this.#frames[at] !== (FREE | order))
          throw new Error(`frame ${at} is chained as free, order ${order}, and is not`)
        chained++
      }
    if (chained !== free) throw new Error(`${free} free runs, ${chained} in the chains`)
    if (used !== this.used) throw new Error(`${this.used} frames counted, ${used} in use`)
  }

  /** Chains a run as free, after it has grown together with its free buddies. */
  #release(frame: number, order: number): void {
    const frames = this.#frames
    let first = frame
    let k = order
    for (; k < this.chunkShift; k++) {
      // Chunks start at multiples of their size, so the buddy's number differs in one bit.
      const buddy = first ^ (1 << k)
      if (frames[buddy] !== (FREE | k)) break
      this.#unlink(buddy, k)
      frames[first] = 0
      if (buddy < first) first = buddy
    }
    this.#push(first, k)
  }

  #push(frame: number, order: number): void {
    const words = this.#words
    const head = this.#state[CHAINS + order]
    words[frame * this.#stride + PREVIOUS] = none
    words[frame * this.#stride + NEXT] = head
    if (head !== none) words[head * this.#stride + PREVIOUS] = frame
    this.#state[CHAINS + order] = frame
    this.#frames[frame] = FREE | order
  }

  #unlink(frame: number, order: number): void {
    const words = this.#words
    const previous = words[frame * this.#stride + PREVIOUS]
    const next = words[frame * this.#stride + NEXT]
    if (previous === none) this.#state[CHAINS + order] = next
    else words[previous * this.#stride + NEXT] = next
    if (next !== none) words[next * this.#stride + PREVIOUS] = previous
    this.#frames[frame] = 0
  }
}
