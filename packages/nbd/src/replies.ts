/**
 * What a connection sends: replies are written into an outgoing chunk, and leave in the order in which they became
 * ready.
 *
 * Invariants:
 *  - `chunk` holds ready bytes in [`from`, `to`); the queue holds ready bytes that leave before those. Whoever adds to
 *    the
 *    queue seals what is ready first.
 *  - A reply is contiguous in what is sent.
 *  - While output waits for the client (`isDraining`) nothing is given to the wire.
 */
import type { Chunk, ChunkPool, Share } from './chunks.ts'
import type { Wire } from './connection.ts'
import {
  CHUNK_BYTES,
  CHUNK_DONE,
  Chunk as ReplyChunk,
  SIMPLE_BYTES,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_MAGIC,
} from './protocol.ts'

/** Ready bytes of a chunk. */
interface Segment {
  readonly chunk: Chunk
  readonly from: number
  readonly to: number
}

/** Whose replies they are. */
export interface Sender {
  /** Everything that is ready should be sent now, to make room: calls `send`. */
  flush(): void
  /** Output does not wait for the client any more. */
  drained(): void
  /** The client was found to be gone. */
  gone(): void
}

export class Replies {
  chunk: Chunk | undefined
  from = 0
  to = 0
  /** Replies are structured, as was negotiated. */
  structured = false
  isDraining = false
  readonly #pool: ChunkPool
  readonly #share: Share
  readonly #wire: Wire
  readonly #sender: Sender
  #queue: Segment[] = []
  #isSending = false
  #isClosed = false

  constructor(pool: ChunkPool, share: Share, wire: Wire, sender: Sender) {
    this.#pool = pool
    this.#share = share
    this.#wire = wire
    this.#sender = sender
  }

  /** Nothing is ready. */
  get isEmpty(): boolean {
    return this.#queue.length === 0 && this.from === this.to
  }

  get isSending(): boolean {
    return this.#isSending
  }

  append(bytes: Buffer): void {
    this.reserve(bytes.length)
    bytes.copy(this.chunk!.bytes, this.to)
    this.to += bytes.length
  }

  /** Makes room for `need` bytes in one piece at `to`; false when no chunk to be had is that large. */
  reserve(need: number): boolean {
    if (this.chunk !== undefined && this.chunk.capacity - this.to < need) {
      this.#sender.flush()
      const out: Chunk | undefined = this.chunk
      if (out !== undefined && out.capacity - this.to < need) {
        this.seal()
        this.#pool.release(out)
        this.chunk = undefined
      }
    }
    if (this.chunk === undefined) {
      this.chunk = this.#pool.take(true, this.#share)
      this.from = 0
      this.to = 0
    }
    return this.chunk.capacity - this.to >= need
  }

  /** Puts the ready bytes at the end of the queue: what comes next need not follow them in the chunk. */
  seal(): void {
    const { chunk } = this
    if (chunk === undefined || this.from === this.to) return
    chunk.holds++
    this.#queue.push({ chunk, from: this.from, to: this.to })
    this.from = this.to
  }

  /** Adds bytes of a chunk to the queue; the caller's hold on it goes with them. */
  enqueue(chunk: Chunk, from: number, to: number): void {
    this.seal()
    this.#queue.push({ chunk, from, to })
  }

  /** Sends what is ready. */
  send(): void {
    this.#isSending = true
    while (!this.isDraining && !this.#isClosed) {
      const first = this.#queue.shift()
      if (first !== undefined) this.#give(first.chunk, first.from, first.to)
      else if (this.from < this.to) {
        const out = this.chunk!
        const { from } = this
        out.holds++
        this.from = this.to
        this.#give(out, from, this.to)
      } else break
    }
    this.#isSending = false
    // An idle connection has nothing to send from.
    if (this.from === this.to && this.chunk?.holds === 1) this.drop()
  }

  /** Gives the chunk up that is being filled. */
  drop(): void {
    if (this.chunk !== undefined) this.#pool.release(this.chunk)
    this.chunk = undefined
  }

  /** Nothing can be sent any more. */
  close(): void {
    this.#isClosed = true
    this.drop()
    for (const { chunk } of this.#queue) this.#pool.release(chunk)
    this.#queue = []
  }

  simple(error: number, high: number, low: number): void {
    this.reserve(SIMPLE_BYTES)
    const { data } = this.chunk!
    const place = this.to
    data.setUint32(place, SIMPLE_REPLY_MAGIC)
    data.setUint32(place + 4, error)
    data.setInt32(place + 8, high)
    data.setInt32(place + 12, low)
    this.to = place + SIMPLE_BYTES
  }

  /** Begins a final chunk of a structured reply; returns where its payload goes. */
  final(type: number, high: number, low: number, length = 0): number {
    this.reserve(CHUNK_BYTES + length)
    const { data } = this.chunk!
    const place = this.to
    data.setUint32(place, STRUCTURED_REPLY_MAGIC)
    data.setUint16(place + 4, CHUNK_DONE)
    data.setUint16(place + 6, type)
    data.setInt32(place + 8, high)
    data.setInt32(place + 12, low)
    data.setUint32(place + 16, length)
    this.to = place + CHUNK_BYTES + length
    return place + CHUNK_BYTES
  }

  error(error: number, high: number, low: number): void {
    if (!this.structured) {
      this.simple(error, high, low)
      return
    }
    const place = this.final(ReplyChunk.ERROR, high, low, 6)
    const { data } = this.chunk!
    data.setUint32(place, error)
    data.setUint16(place + 4, 0)
  }

  /** The header of the answer to a READ, at a place in a chunk. */
  readHeader(chunk: Chunk, place: number, flags: number, at: number, length: number, high: number, low: number): void {
    const { data } = chunk
    if (!this.structured) {
      data.setUint32(place, SIMPLE_REPLY_MAGIC)
      data.setUint32(place + 4, 0)
      data.setInt32(place + 8, high)
      data.setInt32(place + 12, low)
      return
    }
    data.setUint32(place, STRUCTURED_REPLY_MAGIC)
    data.setUint16(place + 4, flags)
    data.setUint16(place + 6, ReplyChunk.OFFSET_DATA)
    data.setInt32(place + 8, high)
    data.setInt32(place + 12, low)
    data.setUint32(place + 16, length + 8)
    data.setUint32(place + 20, Math.floor(at / 0x1_0000_0000))
    data.setUint32(place + 24, at >>> 0)
  }

  /** Gives ready bytes to the wire; the hold on the chunk goes with them. */
  #give(chunk: Chunk, from: number, to: number): void {
    const sent = this.#wire.sendNow(chunk, from, to - from)
    if (sent === to - from) {
      this.#pool.release(chunk)
      return
    }
    if (sent < 0) {
      this.#pool.release(chunk)
      this.#sender.gone()
      return
    }
    this.isDraining = true
    this.#wire.send(chunk.bytes.subarray(from + sent, to), () => {
      this.#pool.release(chunk)
      this.isDraining = false
      this.#sender.drained()
    })
  }
}
