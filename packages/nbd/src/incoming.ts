/**
 * What a connection has received and not dealt with yet: bytes in one chunk, parsed where they lie.
 *
 * Invariant: bytes of the chunk before `start` are done with, [`start`, `end`) wait to be parsed. Nothing is moved or
 * overwritten in a chunk that a device still holds a part of: then another chunk is taken.
 */
import { type Chunk, type ChunkPool, largeChunk, type Share } from './chunks.ts'

/** With less room than this at the end of a chunk, what is unfinished moves to the front. */
export const roomBytes = 4096

export class Incoming {
  chunk: Chunk
  start = 0
  end = 0
  readonly #pool: ChunkPool
  readonly #share: Share
  /** The last read filled all the room that there was. */
  #wantsLarge = false

  constructor(pool: ChunkPool, share: Share) {
    this.#pool = pool
    this.#share = share
    this.chunk = pool.take(false, share)
  }

  /** Bytes that wait to be parsed. */
  get available(): number {
    return this.end - this.start
  }

  /** Where the next bytes are to be received. */
  room(): Uint8Array {
    this.#makeRoom()
    return this.chunk.view(this.end, this.chunk.capacity - this.end)
  }

  /** `count` bytes were put where `room` said. */
  received(count: number): void {
    this.#wantsLarge = this.end + count === this.chunk.capacity
    this.end += count
  }

  /** Takes bytes from `at` on, as many as there is room for; how many that were. */
  take(bytes: Uint8Array, at: number): number {
    this.#makeRoom()
    const count = Math.min(bytes.length - at, this.chunk.capacity - this.end)
    this.chunk.bytes.set(bytes.subarray(at, at + count), this.end)
    this.received(count)
    return count
  }

  /** Nothing is received any more. */
  release(): void {
    this.#pool.release(this.chunk)
  }

  #makeRoom(): void {
    const { chunk } = this
    const left = this.end - this.start
    const larger = this.#wantsLarge && chunk.capacity < largeChunk
    if (!larger) {
      if (left === 0 && chunk.holds === 1) {
        this.start = 0
        this.end = 0
        return
      }
      if (chunk.capacity - this.end >= roomBytes) return
      if (chunk.holds === 1 && this.start > 0) {
        chunk.bytes.copyWithin(0, this.start, this.end)
        this.start = 0
        this.end = left
        return
      }
    }
    this.#wantsLarge = false
    // A device that holds on to what it gets pins whole chunks: those are better small.
    const next = this.#pool.take(larger || left + 2 * roomBytes > chunk.capacity, this.#share)
    chunk.bytes.copy(next.bytes, 0, this.start, this.end)
    this.start = 0
    this.end = left
    this.chunk = next
    this.#pool.release(chunk)
  }
}
