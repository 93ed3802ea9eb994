/**
 * One client: its requests, and when they are begun. What it receives is in incoming.ts, what it says before in
 * handshake.ts and negotiation.ts, what it sends in replies.ts. Knows no sockets, only a `Wire`.
 *
 * Bytes are parsed where they were received; a write hands a view of them to the device. A read is done by the device
 * right into what is sent. What a device does at once is answered in the same call; how many answers leave together is
 * decided in pace.ts. Only what a device answers with a promise gets objects of its own.
 *
 * Invariants:
 *  - During a read that is larger than a chunk (`#stream`), other replies wait.
 *  - Requests are begun in turns (turns.ts), and what may take long is done in slices (slices.ts). Between its turns,
 *    while one of
 *    its requests has slices left, while output waits for the client, the limit of requests is reached, or the memory
 *    is used up, no request is begun and nothing is received (`busy`): a client that does not read makes its own
 *    connection stop, and holds at most the chunks that it had.
 *  - Memory: what all connections have, and each of them, is bounded by the pool; when that is used up, a connection
 *    has at
 *    most one request in flight, one small chunk to receive into and two to send from.
 *
 * Source: doc/proto.md of NetworkBlockDevice/nbd.
 */
import type { Completion } from '@tmem/core'
import { type Chunk, type ChunkPool, largeChunk, type Share } from './chunks.ts'
import { Handshake } from './handshake.ts'
import { Incoming, roomBytes } from './incoming.ts'
import { errnoOf, judgeRange, judgeResize, judgeWrite } from './judgement.ts'
import { CONTEXT_ID, Negotiation, type Served, type Standing } from './negotiation.ts'
import { heldBytes, Pace } from './pace.ts'
import {
  CHUNK_DONE,
  Command,
  CommandFlag,
  DATA_CHUNK_BYTES,
  Errno,
  Handshake as HandshakeFlag,
  IHAVEOPT,
  MAXIMUM_PAYLOAD,
  NBDMAGIC,
  Option,
  REQUEST_BYTES,
  REQUEST_MAGIC,
  Reply,
  Chunk as ReplyChunk,
  SIMPLE_BYTES,
} from './protocol.ts'
import { Replies } from './replies.ts'
import { Extents, Ranged } from './slices.ts'
import type { Account, Turns } from './turns.ts'

/** What carries bytes to and from a client. */
export interface Wire {
  /** Sends what can be sent without waiting; how many bytes that were, or -1 when the client is gone. */
  sendNow(chunk: Chunk, at: number, length: number): number
  /** Sends all of it, waiting for the client; then calls `done`. The bytes stay untouched until then. */
  send(bytes: Uint8Array, done: () => void): void
  /** Receives again, after `received` or `feed` answered false. */
  resume(): void
  /** Closes after what was sent has left. */
  end(): void
  /** Closes now. */
  destroy(): void
}

/** What connections share. */
export interface Service {
  readonly exports: ReadonlyMap<string, Served>
  readonly pool: ChunkPool
  readonly turns: Turns
  /** Requests in flight on one connection. */
  readonly requests: number
  /** Requests in flight on all connections together: how many there are, and may be beside one for each. */
  readonly together: { inFlight: number; readonly limit: number }
  /**
   * Answers are ready but held, because more are expected: `turned` is to be called after each turn of the event loop
   * in which nothing came. Absent where nobody counts turns; then nothing is held.
   */
  readonly hold?: (connection: Connection) => void
  /** A device failed: the client was told, and so is whoever runs the server. */
  failed(error: unknown, served: Served): void
}

/** Settings of one connection. */
export interface ConnectionOptions extends Pick<Standing, 'tls' | 'refusal'> {
  /** Begins TLS on the wire; the connection has ended, another one follows on the secured wire. */
  startTls?(clientFlags: number): void
  /** Of a connection that begins secured: what the client said in its greeting. */
  readonly clientFlags?: number | undefined
  /** As `Standing.admit`; by default everybody may. */
  admit?(): string | undefined
}

const Phase = { Handshake: 0, Requests: 1, Payload: 2, Ended: 3 } as const
type Phase = (typeof Phase)[keyof typeof Phase]

/** A read that is sent piece by piece. */
interface Stream {
  at: number
  left: number
  readonly length: number
  readonly high: number
  readonly low: number
  /** The header has been sent. */
  begun: boolean
  waiting: boolean
  error: number
}

/** A write some of whose parts have to wait. */
interface Write {
  readonly high: number
  readonly low: number
  readonly flags: number
  parts: number
  /** All parts were given to the device. */
  given: boolean
  error: number
}

/** The protocol with one client. */
export class Connection implements Account, Share {
  /** Of its turns. */
  used = 0
  bulk = false
  waits = false
  /** Of its chunks. */
  bytes = 0
  readonly #service: Service
  readonly #wire: Wire
  readonly #startTls: ((clientFlags: number) => void) | undefined
  #phase: Phase = Phase.Handshake

  readonly #in: Incoming
  /** Received, but there was no room for it yet. */
  #rest: Uint8Array | undefined
  #stalled = false
  /** Parsing stopped because of `busy`. */
  #blocked = false

  readonly #replies: Replies
  readonly #pace = new Pace()
  /** What is ready is held. */
  #holding = false
  /** `turned` is being called. */
  #turns = false

  readonly #negotiation: Negotiation
  readonly #handshake: Handshake
  // What was negotiated.
  #status = false

  #served: Served | undefined
  #inFlight = 0
  #stream: Stream | undefined
  /** Requests that have slices left and wait for nothing else. */
  #sliced: Ranged[] = []
  /** Replies that wait for the end of `#stream`. */
  #held: (() => void)[] = []
  #ending = false
  #whenIdle: (() => void) | undefined

  // The write whose payload is being received.
  #writeAt = 0
  #writeLeft = 0
  #writeBytes = 0
  #writeHigh = 0
  #writeLow = 0
  #writeFlags = 0
  #writeError = 0
  #write: Write | undefined

  constructor(service: Service, wire: Wire, options: ConnectionOptions) {
    this.#service = service
    this.#wire = wire
    this.#startTls = options.startTls?.bind(options)
    this.#in = new Incoming(service.pool, this)
    this.#replies = new Replies(service.pool, this, wire, {
      flush: () => this.#flush(),
      drained: () => this.#wake(),
      gone: () => void this.#destroy(),
    })
    const { tls, refusal } = options
    const standing = { tls, refusal, canSecure: options.startTls !== undefined, admit: () => options.admit?.() }
    this.#negotiation = new Negotiation(service.exports, standing, (bytes) => this.#replies.append(bytes))
    if (options.clientFlags !== undefined) this.#negotiation.clientFlags = options.clientFlags
    this.#handshake = new Handshake(this.#negotiation, options.clientFlags !== undefined)
  }

  /** Sends the greeting. */
  greet(): void {
    const greeting = Buffer.alloc(18)
    greeting.writeUInt32BE(NBDMAGIC[0], 0)
    greeting.writeUInt32BE(NBDMAGIC[1], 4)
    greeting.writeUInt32BE(IHAVEOPT[0], 8)
    greeting.writeUInt32BE(IHAVEOPT[1], 12)
    greeting.writeUInt16BE(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES, 16)
    this.#replies.append(greeting)
    this.#flush()
  }

  /** Nothing may be received now: `resume` of the wire will be called. */
  get stalled(): boolean {
    return this.#stalled
  }

  get ended(): boolean {
    return this.#phase === Phase.Ended
  }

  /** The client was told that it needs TLS. */
  get needsTls(): boolean {
    return this.#negotiation.needsTls
  }

  /** Where the next bytes are to be received. */
  room(): Uint8Array {
    return this.#in.room()
  }

  /** `count` bytes were put where `room` said. False: receive no more until `resume`. */
  received(count: number): boolean {
    this.#in.received(count)
    this.#pace.arrived()
    this.#run()
    this.#stalled = this.#busy()
    return !this.#stalled && !this.ended
  }

  /** The event loop has turned, and nothing was received. False: nothing is held any more. */
  turned(): boolean {
    if (this.#holding && this.#pace.turned()) this.#flush()
    this.#turns = this.#holding
    return this.#turns
  }

  /** Takes bytes that were received elsewhere; they must stay as they are until `resume`. False: as in `received`. */
  feed(bytes: Uint8Array): boolean {
    let at = 0
    this.#stalled = false
    while (at < bytes.length && !this.ended) {
      if (this.#busy()) {
        this.#rest = bytes.subarray(at)
        this.#stalled = true
        return false
      }
      at += this.#in.take(bytes, at)
      this.#run()
    }
    this.#stalled = this.#busy()
    return !this.#stalled && !this.ended
  }

  /** The wire is closed: nothing can be sent or received any more. What devices still do is waited for by `idle`. */
  closed(): void {
    if (this.ended) return
    this.#phase = Phase.Ended
    this.#holding = false
    this.#service.turns.forget(this)
    if (this.#served !== undefined) this.#served.connections--
    this.#in.release()
    this.#rest = undefined
    this.#replies.close()
    this.#stream = undefined
    this.#sliced = []
    this.#endHeld()
    this.#checkIdle()
  }

  /** Begins no more requests, and closes the wire when those in flight are done. */
  async shutdown(): Promise<void> {
    this.#ending = true
    await this.idle()
    if (this.ended) return
    this.#flush()
    // What the client has not read by now it will not wait for either.
    if (this.#replies.isDraining || this.#stream !== undefined) this.#destroy()
    else this.#wire.end()
  }

  /** Resolves when the devices have done everything that was asked of them. */
  idle(): Promise<void> {
    return new Promise((resolve) => {
      this.#whenIdle = resolve
      this.#checkIdle()
    })
  }

  // ---- receiving

  #busy(): boolean {
    if (this.waits || this.#replies.isDraining || this.#stream !== undefined || this.#sliced.length > 0 || this.#ending)
      return true
    if (this.#inFlight === 0) return false
    const { requests, together, pool } = this.#service
    if (this.#inFlight >= requests || together.inFlight >= together.limit) return true
    return pool.full || this.bytes > pool.shareBytes
  }

  /** `busy`, or the turn is over; remembered for `#run`. */
  #mustWait(): boolean {
    this.#blocked = this.#busy() || this.#turnIsOver()
    return this.#blocked
  }

  /** The turn is over: it goes on in the next one. */
  #turnIsOver(): boolean {
    const { turns } = this.#service
    if (!turns.over()) return false
    turns.wait(this)
    return true
  }

  /** Its turn has come: goes on where it stopped. */
  turn(): void {
    this.#wake()
  }

  /** Goes on after something that was waited for. */
  #wake(): void {
    if (this.ended) {
      this.#replies.drop()
      return
    }
    this.#run()
    this.#checkIdle()
    if (!this.#stalled || this.ended || this.#busy()) return
    this.#stalled = false
    const rest = this.#rest
    this.#rest = undefined
    if (rest !== undefined && !this.feed(rest)) return
    this.#wire.resume()
  }

  /** Deals with what is there, as far as it may. */
  #run(): void {
    const { turns } = this.#service
    if (!turns.enter(this)) {
      // Nobody has to wait for answers that are there.
      this.#flush()
      return
    }
    do {
      this.#blocked = false
      if (this.#stream !== undefined) this.#pump()
      this.#goOn()
      this.#parse()
      if (this.#mayHold()) break
      this.#flush()
      // What was sent may have been what it had to wait for.
    } while (!this.ended && ((this.#blocked && !this.#busy()) || (this.#sliced.length > 0 && !this.waits)))
    turns.leave(this)
  }

  /** Whether what is ready is held; then it will be sent by `turned`, or with what comes. */
  #mayHold(): boolean {
    const { hold } = this.#service
    if (hold === undefined || this.#blocked || this.waits || this.#ending || this.#inFlight > 0) return false
    if (this.#phase < Phase.Requests || this.ended || this.#replies.isDraining || !this.#pace.holds) return false
    // The rest of a large payload keeps coming for long; what is ready has nothing to do with that.
    if (this.#phase === Phase.Payload && this.#writeBytes >= heldBytes) return false
    this.#holding = true
    if (!this.#turns) {
      this.#turns = true
      hold(this)
    }
    return true
  }

  #parse(): void {
    for (let more = true; more && this.#phase !== Phase.Ended; ) {
      switch (this.#phase) {
        case Phase.Requests:
          more = this.#requests()
          break
        case Phase.Payload:
          more = this.#payload()
          break
        default:
          more = this.#shake()
      }
    }
    // The client was found to be gone in the middle of an answer, which may have taken another chunk since.
    if (this.#phase === Phase.Ended) this.#replies.drop()
  }

  // ---- handshake

  /** Deals with the next thing of the handshake. False: nothing can go on. */
  #shake(): boolean {
    if (this.#handshake.isAtOption && this.#mustWait()) return false
    const outcome = this.#handshake.next(this.#in)
    switch (outcome) {
      case 'wait':
        return false
      case 'more':
        return true
      case 'broken':
        return this.#destroy()
      case 'end':
        this.#endSoon()
        return false
      case 'tls':
        return this.#secure()
      default:
        this.#transmit(outcome)
        return true
    }
  }

  #secure(): boolean {
    const begin = this.#startTls
    // Bytes that came in the clear behind the request would be taken for part of the secured session.
    if (begin === undefined || this.#in.start !== this.#in.end || this.#rest !== undefined) return this.#destroy()
    this.#negotiation.reply(Option.STARTTLS, Reply.ACK)
    this.#flush()
    const { clientFlags } = this.#negotiation
    this.closed()
    begin(clientFlags)
    return false
  }

  #transmit(served: Served): void {
    this.#served = served
    served.connections++
    this.#replies.structured = this.#negotiation.structured
    this.#status = this.#negotiation.contextOf === served
    this.#phase = Phase.Requests
  }

  // ---- requests

  /** Handles requests until one needs a payload (true) or nothing can go on (false). */
  #requests(): boolean {
    while (this.#in.end - this.#in.start >= REQUEST_BYTES) {
      if (this.#mustWait()) return false
      const { data } = this.#in.chunk
      const at = this.#in.start
      if (data.getUint32(at) !== REQUEST_MAGIC) return this.#destroy()
      const flags = data.getUint16(at + 4)
      const type = data.getUint16(at + 6)
      // Signed: those are always small integers to the runtime.
      const high = data.getInt32(at + 8)
      const low = data.getInt32(at + 12)
      const from = data.getUint32(at + 16) * 0x1_0000_0000 + data.getUint32(at + 20)
      const length = data.getUint32(at + 24)
      this.#in.start = at + REQUEST_BYTES
      if (type === Command.READ) this.#read(flags, from, length, high, low)
      else if (type === Command.WRITE) {
        if (length > MAXIMUM_PAYLOAD) return this.#destroy()
        this.#writeAt = from
        this.#writeLeft = length
        this.#writeBytes = length
        this.#writeHigh = high
        this.#writeLow = low
        this.#writeFlags = flags
        this.#writeError = judgeWrite(this.#served!, flags, CommandFlag.FUA, from, length)
        this.#phase = Phase.Payload
        return true
      } else if (type === Command.DISC) {
        this.#endSoon()
        return false
      } else this.#command(type, flags, from, length, high, low)
      if (this.#pace.answered(type === Command.READ ? length : 0)) this.#flush()
      if (this.#phase !== Phase.Requests) return false
    }
    return false
  }

  #read(flags: number, at: number, length: number, high: number, low: number): void {
    const served = this.#served!
    const structured = this.#replies.structured
    // FUA may be set on every command.
    const allowed = structured ? CommandFlag.FUA | CommandFlag.DF : CommandFlag.FUA
    const error = (flags & ~allowed) !== 0 || length > MAXIMUM_PAYLOAD ? Errno.EINVAL : judgeRange(served, at, length)
    if (error !== 0) {
      this.#fail(error, high, low)
      return
    }
    const { counters } = served
    counters.reads++
    counters.bytesRead += length
    const header = structured ? DATA_CHUNK_BYTES : SIMPLE_BYTES
    if (length === 0) {
      if (structured) this.#replies.final(ReplyChunk.NONE, high, low)
      else this.#simple(0, high, low)
      return
    }
    if (!this.#replies.reserve(header + length)) {
      this.#stream = { at, left: length, length, high, low, begun: false, waiting: false, error: 0 }
      this.#pump()
      return
    }
    const chunk = this.#replies.chunk!
    const place = this.#replies.to
    let completion: Completion
    try {
      completion = served.device.read(at, chunk.view(place + header, length))
    } catch (thrown) {
      this.#fail(this.#errorOf(thrown), high, low)
      return
    }
    this.#replies.readHeader(chunk, place, CHUNK_DONE, at, length, high, low)
    const end = place + header + length
    if (completion === undefined) {
      this.#replies.to = end
      return
    }
    // The bytes before are ready; these are when the device is done; what follows does not wait for them.
    this.#replies.seal()
    chunk.holds++
    this.#replies.from = end
    this.#replies.to = end
    this.#later(completion, (failure) => {
      if (failure !== 0 || this.ended) {
        this.#service.pool.release(chunk)
        if (failure !== 0) this.#fail(failure, high, low)
      } else {
        this.#replies.enqueue(chunk, place, end)
      }
    })
  }

  /** Goes on with a read that is larger than a chunk: piece after piece, as the client takes them. */
  #pump(): void {
    const stream = this.#stream!
    const { device } = this.#served!
    while (stream.left > 0 && !stream.waiting) {
      this.#flush()
      if (this.#replies.isDraining || this.ended || this.#turnIsOver()) return
      const header = stream.begun ? 0 : this.#replies.structured ? DATA_CHUNK_BYTES : SIMPLE_BYTES
      this.#replies.reserve(header + Math.min(stream.left, largeChunk - roomBytes))
      const chunk = this.#replies.chunk!
      const place = this.#replies.to
      const fits = chunk.capacity - place - header
      const unit = device.preferredBlockSize <= fits ? device.preferredBlockSize : device.blockSize
      const length = stream.left <= fits ? stream.left : fits - ((stream.at + fits) % unit)
      let completion: Completion
      if (stream.error !== 0) chunk.bytes.fill(0, place + header, place + header + length)
      else {
        try {
          completion = device.read(stream.at, chunk.view(place + header, length))
        } catch (thrown) {
          if (!this.#streamFailed(stream, this.#errorOf(thrown))) return
          continue
        }
      }
      if (completion === undefined) {
        this.#streamed(stream, chunk, place, header, length)
        continue
      }
      chunk.holds++
      stream.waiting = true
      this.#inFlight++
      this.#service.together.inFlight++
      const settled = (failure: number): void => {
        this.#inFlight--
        this.#service.together.inFlight--
        stream.waiting = false
        if (!this.ended && (failure === 0 || this.#streamFailed(stream, failure)) && failure === 0)
          this.#streamed(stream, chunk, place, header, length)
        this.#service.pool.release(chunk)
        this.#wake()
        this.#checkIdle()
      }
      completion.then(
        () => settled(0),
        (reason: unknown) => settled(this.#errorOf(reason)),
      )
    }
    if (stream.left > 0 || this.#stream === undefined) return
    this.#stream = undefined
    if (this.#replies.structured) {
      if (stream.error === 0) this.#replies.final(ReplyChunk.NONE, stream.high, stream.low)
      else this.#fail(stream.error, stream.high, stream.low)
    }
    this.#endHeld()
  }

  #endHeld(): void {
    const held = this.#held
    this.#held = []
    for (const reply of held) reply()
  }

  #streamed(stream: Stream, chunk: Chunk, place: number, header: number, length: number): void {
    if (header > 0) {
      this.#replies.readHeader(chunk, place, 0, stream.at, stream.length, stream.high, stream.low)
      stream.begun = true
    }
    this.#replies.to = place + header + length
    stream.at += length
    stream.left -= length
  }

  /** A piece could not be read. True: the stream goes on, with zeros in place of what is missing. */
  #streamFailed(stream: Stream, error: number): boolean {
    if (!stream.begun) {
      this.#stream = undefined
      this.#fail(error, stream.high, stream.low)
      this.#endHeld()
      return false
    }
    // In a simple reply that has begun there is no place for an error.
    if (!this.#replies.structured) return this.#destroy()
    stream.error = error
    return true
  }

  /** Takes as much of a payload as is there. True: it is complete. */
  #payload(): boolean {
    while (this.#writeLeft > 0) {
      let count = Math.min(this.#in.end - this.#in.start, this.#writeLeft)
      if (this.#writeError === 0) {
        if (count < this.#writeLeft) {
          if (this.#in.chunk.capacity - this.#in.end >= roomBytes) return false
          // The chunk is full: all whole blocks go on, so that there is room again.
          const { preferredBlockSize, blockSize } = this.#served!.device
          const end = this.#writeAt + count
          const whole = count - (end % preferredBlockSize)
          count = whole > 0 ? whole : count - (end % blockSize)
        }
        if (count <= 0 || this.#mustWait()) return false
        const slice = this.#served!.slices.write
        count = slice.next(this.#writeAt, count)
        const began = performance.now()
        this.#writePart(count)
        slice.took(count, performance.now() - began)
      } else if (count === 0) return false
      this.#in.start += count
      this.#writeAt += count
      this.#writeLeft -= count
    }
    if (this.#phase !== Phase.Payload) return false
    this.#phase = Phase.Requests
    const write = this.#write
    if (write !== undefined) {
      this.#write = undefined
      write.given = true
      if (this.#writeError !== 0) write.error = this.#writeError
      if (write.parts === 0) this.#written(write.error, write.flags, write.high, write.low)
    } else this.#written(this.#writeError, this.#writeFlags, this.#writeHigh, this.#writeLow)
    if (this.#pace.answered(this.#writeBytes)) this.#flush()
    return true
  }

  #writePart(count: number): void {
    const { device, counters } = this.#served!
    const { chunk } = this.#in
    counters.bytesWritten += count
    let completion: Completion
    try {
      completion = device.write(this.#writeAt, chunk.view(this.#in.start, count))
    } catch (thrown) {
      this.#writeError = this.#errorOf(thrown)
      return
    }
    if (completion === undefined) return
    this.#write ??= {
      high: this.#writeHigh,
      low: this.#writeLow,
      flags: this.#writeFlags,
      parts: 0,
      given: false,
      error: 0,
    }
    const write = this.#write
    write.parts++
    chunk.holds++
    this.#later(completion, (failure) => {
      this.#service.pool.release(chunk)
      write.parts--
      if (failure !== 0) write.error = failure
      if (write.given && write.parts === 0) this.#written(write.error, write.flags, write.high, write.low)
    })
  }

  #written(error: number, flags: number, high: number, low: number): void {
    this.#served!.counters.writes++
    if (error !== 0) this.#fail(error, high, low)
    else if ((flags & CommandFlag.FUA) === 0) this.#simple(0, high, low)
    else this.#answer(() => this.#served!.device.flush(), 0, high, low)
  }

  /** Everything but READ, WRITE and DISC. */
  #command(type: number, flags: number, at: number, length: number, high: number, low: number): void {
    const served = this.#served!
    const { device, counters, slices } = served
    const { FUA, NO_HOLE, REQ_ONE, FAST_ZERO } = CommandFlag
    const answer = (failure: number): void => this.#done(failure, flags, high, low)
    let error: number
    switch (type) {
      case Command.FLUSH:
        counters.flushes++
        error = (flags & ~FUA) !== 0 || at !== 0 || length !== 0 ? Errno.EINVAL : 0
        if (error === 0) this.#answer(() => device.flush(), 0, high, low)
        break
      case Command.TRIM:
        counters.trims++
        error = judgeWrite(served, flags, FUA, at, length)
        // Over the end: ENOSPC belongs to what writes, EINVAL to a trim.
        if (error === Errno.ENOSPC) error = Errno.EINVAL
        if (error === 0)
          this.#ranged(new Ranged(at, length, slices.discard, (from, n) => device.discard(from, n), answer))
        break
      case Command.WRITE_ZEROES: {
        counters.zeroes++
        error = judgeWrite(served, flags, FUA | NO_HOLE | FAST_ZERO, at, length)
        const keep = (flags & NO_HOLE) !== 0
        // Zeros that keep their room may be as slow as any other bytes; without it they are a discard.
        if (error === 0 && keep && (flags & FAST_ZERO) !== 0) error = Errno.ENOTSUP
        if (error === 0)
          this.#ranged(new Ranged(at, length, slices.zero, (from, n) => device.zero(from, n, keep), answer))
        break
      }
      case Command.CACHE:
        counters.caches++
        error = (flags & ~FUA) !== 0 ? Errno.EINVAL : judgeRange(served, at, length)
        if (error === 0) this.#simple(0, high, low)
        break
      case Command.BLOCK_STATUS:
        counters.statuses++
        error = !this.#status || (flags & ~(FUA | REQ_ONE)) !== 0 ? Errno.EINVAL : judgeRange(served, at, length)
        if (error === 0 && length === 0) error = Errno.EINVAL
        if (error === 0) this.#blockStatus((flags & REQ_ONE) !== 0, at, length, high, low)
        break
      case Command.RESIZE:
        counters.resizes++
        error = judgeResize(served, flags, at)
        if (error === 0) error = this.#resize(at)
        if (error === 0) this.#simple(0, high, low)
        break
      default:
        error = Errno.EINVAL
    }
    if (error !== 0) this.#fail(error, high, low)
  }

  #resize(size: number): number {
    const { device } = this.#served!
    const grows = size > device.sizeBytes
    try {
      device.resize!(size)
      return 0
    } catch (thrown) {
      const error = this.#errorOf(thrown)
      return grows && (error === Errno.ENOMEM || error === Errno.EINVAL) ? Errno.ENOSPC : error
    }
  }

  #blockStatus(one: boolean, at: number, length: number, high: number, low: number): void {
    const served = this.#served!
    const { device } = served
    const extents = new Extents(one)
    // An answer need not reach to the end of what was asked for.
    const map = (from: number, count: number): boolean => {
      device.map(from, count, extents.report)
      return extents.full
    }
    this.#ranged(
      new Ranged(at, length, served.slices.map, map, (error) => {
        if (error !== 0) this.#fail(error, high, low)
        else this.#extents(extents, high, low)
      }),
    )
  }

  #extents({ lengths, states }: Extents, high: number, low: number): void {
    if (this.ended) return
    const place = this.#replies.final(ReplyChunk.BLOCK_STATUS, high, low, 4 + 8 * lengths.length)
    const { data } = this.#replies.chunk!
    data.setUint32(place, CONTEXT_ID)
    for (let n = 0; n < lengths.length; n++) {
      data.setUint32(place + 4 + 8 * n, lengths[n]!)
      data.setUint32(place + 8 + 8 * n, states[n]!)
    }
  }

  // ---- requests in slices

  /**
   * Does the first slice. What is left is done in this connection's turns, before anything that comes after it is
   * begun.
   */
  #ranged(ranged: Ranged): void {
    this.#step(ranged)
    this.#goOn()
  }

  #goOn(): void {
    while (this.#sliced.length > 0 && !this.ended && !this.#turnIsOver()) this.#step(this.#sliced.shift()!)
  }

  /** Does a slice; then, or when the device is done with it, the next one is on the list, or the answer is sent. */
  #step(sliced: Ranged): void {
    let completion: Completion
    try {
      completion = sliced.step()
    } catch (thrown) {
      sliced.answer(this.#errorOf(thrown))
      return
    }
    const next = (failure: number): void => {
      if (failure !== 0 || sliced.done) sliced.answer(failure)
      else this.#sliced.push(sliced)
    }
    if (completion === undefined) next(0)
    else this.#later(completion, next)
  }

  // ---- replies

  /** Does something on the device, then with FUA a flush, then answers. */
  #answer(operation: () => Completion, flags: number, high: number, low: number): void {
    let completion: Completion
    try {
      completion = operation()
    } catch (thrown) {
      this.#fail(this.#errorOf(thrown), high, low)
      return
    }
    const done = (failure: number): void => this.#done(failure, flags, high, low)
    if (completion === undefined) done(0)
    else this.#later(completion, done)
  }

  /** Something was done on the device: with FUA a flush, then the answer. */
  #done(failure: number, flags: number, high: number, low: number): void {
    if (failure !== 0) this.#fail(failure, high, low)
    else if ((flags & CommandFlag.FUA) !== 0) this.#answer(() => this.#served!.device.flush(), 0, high, low)
    else this.#simple(0, high, low)
  }

  /** Waits for a device. `done` gets 0 or the protocol's number of the error; replies in it wait for a stream's end. */
  #later(completion: Promise<void>, done: (failure: number) => void): void {
    this.#inFlight++
    this.#service.together.inFlight++
    const finish = (failure: number): void => {
      this.#inFlight--
      this.#service.together.inFlight--
      if (this.#stream === undefined) done(failure)
      else this.#held.push(() => done(failure))
      this.#wake()
      this.#checkIdle()
    }
    completion.then(
      () => finish(0),
      (reason: unknown) => finish(this.#errorOf(reason)),
    )
  }

  #simple(error: number, high: number, low: number): void {
    if (!this.ended) this.#replies.simple(error, high, low)
  }

  #fail(error: number, high: number, low: number): void {
    if (this.ended) return
    this.#served!.counters.errors++
    this.#replies.error(error, high, low)
  }

  #errorOf(thrown: unknown): number {
    this.#service.failed(thrown, this.#served!)
    return errnoOf(thrown)
  }

  // ---- sending

  /** Sends what is ready. */
  #flush(): void {
    if (this.#replies.isSending) return
    this.#holding = false
    this.#pace.sent()
    this.#replies.send()
    if (this.#ending && !this.ended) this.#checkEnd()
  }

  // ---- ending

  /** Begins nothing any more; closes when everything in flight is done and sent. */
  #endSoon(): void {
    this.#ending = true
    this.#flush()
  }

  #checkEnd(): void {
    if (this.#inFlight > 0 || this.#replies.isDraining || !this.#replies.isEmpty) return
    if (this.#stream !== undefined || this.#whenIdle !== undefined) return
    this.#wire.end()
  }

  #checkIdle(): void {
    if (this.#inFlight > 0 || this.#sliced.length > 0 || this.#whenIdle === undefined) return
    const resolve = this.#whenIdle
    this.#whenIdle = undefined
    resolve()
  }

  /** The client broke the protocol, or is gone. */
  #destroy(): false {
    this.closed()
    this.#wire.destroy()
    return false
  }
}
