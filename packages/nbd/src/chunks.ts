/**
 * The buffers that bytes are received into and sent from, and the bound on them.
 *
 * Invariants: a chunk has one holder for each count in `holds` (a connection that fills or sends it, a device that was given a
 * part of it) and goes back to the pool with the last; the pool never gives out large chunks of more than `limitBytes`
 * together. Small chunks are given to each connection that needs one: their number is bounded by the caller's
 * rules (see connection.ts), not here.
 */

/** Bytes of a small chunk: 16 KiB, and room for headers. */
export const smallChunk: number = 16 * 1024 + 4096
/** Bytes of a large chunk: 256 KiB, and room for headers; as much as is handled in one piece. */
export const largeChunk: number = 256 * 1024 + 4096

/** Reused views: a chunk that is filled in the same pattern again and again needs no new ones. */
const viewSlotBits = 12

/** A buffer with a count of those who need it. */
export class Chunk {
  readonly bytes: Buffer
  readonly data: DataView
  holds = 0
  readonly #views: (Uint8Array | undefined)[]

  constructor(bytes: number) {
    // Not from Node's shared slab: a device may keep it for as long as its operation takes.
    this.bytes = Buffer.allocUnsafeSlow(bytes)
    this.data = new DataView(this.bytes.buffer)
    this.#views = new Array((bytes >> viewSlotBits) + 1).fill(undefined)
  }

  get capacity(): number {
    return this.bytes.length
  }

  /** `length` bytes from `at` on; the same object as last time when a view of that place was asked for before. */
  view(at: number, length: number): Uint8Array {
    const slot = at >> viewSlotBits
    const made = this.#views[slot]
    if (made !== undefined && made.byteOffset === at && made.length === length) return made
    const view = new Uint8Array(this.bytes.buffer, at, length)
    this.#views[slot] = view
    return view
  }
}

/** Gives out chunks and takes them back. */
export class ChunkPool {
  readonly limitBytes: number
  /** Bytes of chunks given out, small and large. */
  used = 0
  /** Largest value that `used` had. */
  peak = 0
  /** Bytes of large chunks given out. */
  #large = 0
  /** Kept for the next one who asks; few, so that an idle server is small. */
  readonly #freeSmall: Chunk[] = []
  readonly #freeLarge: Chunk[] = []

  /** @param limitBytes bound on large chunks, together */
  constructor(limitBytes: number) {
    this.limitBytes = limitBytes
  }

  /** A chunk with one hold: large, or when the limit is reached (or `large` is false) small. */
  take(large: boolean): Chunk {
    const isLarge = large && this.#large + largeChunk <= this.limitBytes
    const bytes = isLarge ? largeChunk : smallChunk
    const chunk = (isLarge ? this.#freeLarge : this.#freeSmall).pop() ?? new Chunk(bytes)
    chunk.holds = 1
    if (isLarge) this.#large += bytes
    this.used += bytes
    if (this.used > this.peak) this.peak = this.used
    return chunk
  }

  /** Ends one hold. */
  release(chunk: Chunk): void {
    if (--chunk.holds > 0) return
    const isLarge = chunk.capacity === largeChunk
    if (isLarge) this.#large -= largeChunk
    this.used -= chunk.capacity
    const free = isLarge ? this.#freeLarge : this.#freeSmall
    if (free.length < 16) free.push(chunk)
  }
}
