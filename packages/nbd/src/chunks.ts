/**
 * The buffers that bytes are received into and sent from, and the bounds on them.
 *
 * All memory for them is reserved when the pool is made, in one piece: later nobody can be refused what is within the
 * bounds, and the process cannot end for want of it. The system gives memory when it is first touched; what was used
 * once stays.
 *
 * Invariants: a chunk has one holder for each count in `holds` (a connection that fills or sends it, a device that was
 * given a part of it) and goes back to the pool with the last; it is charged to one share. The pool never gives out
 * large chunks of more than three quarters of `limitBytes` together, nor one beyond a share's bound. Small chunks are
 * given to each connection that needs one: who asks `full` before each request that it begins beside others has at most
 * `sureChunks` more than what the limit allows (see connection.ts).
 */
import { TmemError } from '@tmem/core'

/** Bytes of a small chunk: 16 KiB, and room for headers. */
export const smallChunk: number = 16 * 1024 + 4096
/** Bytes of a large chunk: 256 KiB, and room for headers; as much as is handled in one piece. */
export const largeChunk: number = 256 * 1024 + 4096
/** Small chunks that a connection is sure of: one to receive into, one that a device holds, two to send from. */
export const sureChunks = 4

/** Reused views: a chunk that is filled in the same pattern again and again needs no new ones. */
const viewSlotBits = 12

/** What one connection has of the pool. */
export interface Share {
  bytes: number
}

/** A buffer with a count of those who need it. */
export class Chunk {
  readonly bytes: Buffer
  readonly data: DataView
  holds = 0
  share: Share = { bytes: 0 }
  readonly #views: (Uint8Array | undefined)[]

  /** A part of a larger buffer. */
  constructor(memory: ArrayBuffer, from: number, bytes: number) {
    this.bytes = Buffer.from(memory, from, bytes)
    this.data = new DataView(memory, from, bytes)
    this.#views = new Array((bytes >> viewSlotBits) + 1).fill(undefined)
  }

  get capacity(): number {
    return this.bytes.length
  }

  /** `length` bytes from `at` on; the same object as last time when a view of that place was asked for before. */
  view(at: number, length: number): Uint8Array {
    const slot = at >> viewSlotBits
    const from = this.bytes.byteOffset + at
    const made = this.#views[slot]
    if (made !== undefined && made.byteOffset === from && made.length === length) return made
    const view = new Uint8Array(this.bytes.buffer, from, length)
    this.#views[slot] = view
    return view
  }
}

/** Gives out chunks and takes them back. */
export class ChunkPool {
  readonly limitBytes: number
  /** Bytes of one share beyond which it gets no large chunk, and begins nothing beside what it has begun. */
  readonly shareBytes: number
  /** Bytes that were reserved. */
  readonly reservedBytes: number
  /** Bytes of chunks given out, small and large. */
  used = 0
  /** Largest value that `used` had. */
  peak = 0
  readonly #memory: ArrayBuffer
  readonly #largeEnd: number
  /** Where chunks that were never given out begin. */
  #newLarge = 0
  #newSmall: number
  #smallUsed = 0
  readonly #freeSmall: Chunk[] = []
  readonly #freeLarge: Chunk[] = []

  /**
   * Reserves the memory. Throws `TMEM_NO_MEMORY` when it is not to be had.
   *
   * @param limitBytes bound on what all connections have, beside what each is sure of
   * @param connections how many there may be at once
   */
  constructor(limitBytes: number, connections: number) {
    this.limitBytes = limitBytes
    this.shareBytes = Math.floor(limitBytes / 4)
    this.#largeEnd = Math.floor((limitBytes * 0.75) / largeChunk) * largeChunk
    const small = Math.ceil(limitBytes / 4 / smallChunk) + connections * sureChunks
    this.reservedBytes = this.#largeEnd + small * smallChunk
    this.#newSmall = this.#largeEnd
    try {
      this.#memory = new ArrayBuffer(this.reservedBytes)
    } catch (cause) {
      throw new TmemError(
        'TMEM_NO_MEMORY',
        `no memory for the buffers of ${connections} connections: ${this.reservedBytes} bytes were refused; give smaller limits`,
        { layer: 'nbd', cause: cause as Error },
      )
    }
  }

  /** Nobody may begin anything beside what is under way. */
  get full(): boolean {
    return this.used > this.limitBytes || this.#smallUsed > this.limitBytes / 4
  }

  /** A chunk with one hold: large, or when there is none (or `large` is false) small. */
  take(large: boolean, share: Share): Chunk {
    const chunk = (large ? this.#takeLarge(share) : undefined) ?? this.#takeSmall()
    const bytes = chunk.capacity
    chunk.holds = 1
    chunk.share = share
    share.bytes += bytes
    this.used += bytes
    if (this.used > this.peak) this.peak = this.used
    return chunk
  }

  /** Ends one hold. */
  release(chunk: Chunk): void {
    if (--chunk.holds > 0) return
    const bytes = chunk.capacity
    chunk.share.bytes -= bytes
    this.used -= bytes
    if (bytes === largeChunk) this.#freeLarge.push(chunk)
    else {
      this.#smallUsed -= bytes
      this.#freeSmall.push(chunk)
    }
  }

  #takeLarge(share: Share): Chunk | undefined {
    if (share.bytes + largeChunk > this.shareBytes) return undefined
    const free = this.#freeLarge.pop()
    if (free !== undefined || this.#newLarge === this.#largeEnd) return free
    this.#newLarge += largeChunk
    return new Chunk(this.#memory, this.#newLarge - largeChunk, largeChunk)
  }

  #takeSmall(): Chunk {
    this.#smallUsed += smallChunk
    const free = this.#freeSmall.pop()
    if (free !== undefined) return free
    // No connection has more than it is sure of and the limit allows; if one ever had, this would not be the place to
    // end for it.
    if (this.#newSmall === this.reservedBytes) return new Chunk(new ArrayBuffer(smallChunk), 0, smallChunk)
    this.#newSmall += smallChunk
    return new Chunk(this.#memory, this.#newSmall - smallChunk, smallChunk)
  }
}
