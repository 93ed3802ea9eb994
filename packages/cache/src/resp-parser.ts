/**
 * Requests of RESP, the protocol of Redis, out of bytes as they come: arrays of bulk strings, and inline commands.
 *
 * All that a client says is bounded before it is believed: lengths are digits without a sign and without zeros in
 * front, lines end, a request has so many arguments and so many bytes. What breaks these rules is a `ProtocolError`,
 * behind which nothing more can be read. An argument that is too large to be kept is no such error: its bytes are
 * passed over, so that the request can be refused and the connection goes on.
 *
 * Invariants: a byte is looked at once and copied once at most, wherever the input was split; of a request that is not
 * whole, no more than `heldBytes` is held, and nothing of it keeps what came around it.
 *
 * Source: "Redis serialization protocol specification", sections on requests and inline commands.
 */

import { Buffer } from 'node:buffer'

/** What a client said is no request. */
export class ProtocolError extends Error {}

/** An argument; `undefined`: it was too large, and passed over. */
export type Argument = Buffer | undefined

/** Bounds on a request. */
export interface RequestLimits {
  /** Bytes of an argument that is kept. */
  readonly argumentBytes: number
  /** Bytes of all arguments that are kept. */
  readonly requestBytes: number
}

/** Arguments of a request, bytes of an inline command, and bytes of an argument that may be passed over. */
export const maxArguments = 65_536
export const maxInlineBytes: number = 64 * 1024
export const maxPassedBytes: number = 512 * 2 ** 20
/** `*` or `$`, ten digits, and the end of the line. */
const maxHeaderBytes = 12
/** What an argument takes besides its bytes, about. */
const argumentOverhead = 64

const lf = 10
const cr = 13
const space = 32
const doubleQuote = 34
const dollar = 36
const singleQuote = 39
const star = 42
const zero = 48

const nothing = Buffer.alloc(0)

/** See the head of the file. */
export class RequestParser {
  readonly #limits: RequestLimits
  #chunk: Buffer = nothing
  #at = 0
  /** The beginning of a line whose end has not come. */
  #begun: Buffer[] = []
  #begunBytes = 0
  /**
   * The request: what is whole of it, how many arguments are to come, and from which on they are views of the chunk.
   */
  #arguments: Argument[] = []
  #missing = 0
  #firstView = 0
  #keptBytes = 0
  /** The argument that has begun: bytes to come, of it and of the end of its line, and where they go. */
  #dataLeft = 0
  #endLeft = 0
  #isPassed = false
  #bulk: Buffer | undefined
  #isView = false

  constructor(limits: RequestLimits) {
    this.#limits = limits
  }

  /** Bytes of the request that is being read, or was read last until `done`: held, or announced. */
  get heldBytes(): number {
    return this.#begunBytes + this.#keptBytes
  }

  /** Takes bytes, after `next` has said that there is no whole request left in those before. They are not copied. */
  push(chunk: Buffer): void {
    this.#chunk = chunk
    this.#at = 0
  }

  /**
   * The arguments of the next request, at least one; `undefined`: it is not whole. They may be views of what was
   * pushed, and are the caller's until `done`. Throws `ProtocolError`.
   */
  next(): readonly Argument[] | undefined {
    while (this.#missing === 0) {
      const line = this.#line()
      if (line === undefined) return this.#pause()
      if (line[0] !== star) {
        const words = wordsOf(line)
        if (words.length === 0) continue
        return words
      }
      this.done()
      this.#missing = lengthIn(line, 'multibulk', maxArguments)
    }
    for (; this.#missing > 0; this.#missing--) {
      if (this.#endLeft === 0) {
        const line = this.#line()
        if (line === undefined) return this.#pause()
        if (line[0] !== dollar) throw new ProtocolError(`expected '$', got ${shown(line[0])}`)
        this.#begin(lengthIn(line, 'bulk', maxPassedBytes))
      }
      if (!this.#fill()) return this.#pause()
    }
    return this.#arguments
  }

  /** The request that was read last is over. */
  done(): void {
    this.#arguments = []
    this.#firstView = 0
    this.#keptBytes = 0
  }

  /** An argument of that length begins. */
  #begin(length: number): void {
    const { argumentBytes, requestBytes } = this.#limits
    const takes = length + argumentOverhead
    this.#dataLeft = length
    this.#endLeft = 2
    this.#bulk = undefined
    this.#isPassed = length > argumentBytes || this.#keptBytes + takes > requestBytes
    if (!this.#isPassed) this.#keptBytes += takes
  }

  /** Takes what is there of the argument that has begun. Whether it is whole. */
  #fill(): boolean {
    const chunk = this.#chunk
    const end = this.#at + Math.min(this.#dataLeft, chunk.length - this.#at)
    if (!this.#isPassed && this.#dataLeft > 0) {
      if (this.#bulk === undefined) {
        this.#isView = end - this.#at === this.#dataLeft
        this.#bulk = this.#isView ? chunk.subarray(this.#at, end) : Buffer.allocUnsafeSlow(this.#dataLeft)
      }
      if (!this.#isView) chunk.copy(this.#bulk, this.#bulk.length - this.#dataLeft, this.#at, end)
    }
    this.#dataLeft -= end - this.#at
    this.#at = end
    if (this.#dataLeft > 0) return false
    for (; this.#endLeft > 0; this.#endLeft--) {
      if (this.#at === chunk.length) return false
      if (chunk[this.#at++] !== (this.#endLeft === 2 ? cr : lf))
        throw new ProtocolError('a bulk string does not end where it says')
    }
    this.#arguments.push(this.#isPassed ? undefined : (this.#bulk ?? nothing))
    // What began in an earlier chunk is in memory of its own, and so is all before it.
    if (this.#bulk !== undefined && !this.#isView) this.#firstView = this.#arguments.length
    this.#bulk = undefined
    this.#isView = false
    return true
  }

  /** The chunk is over: nothing of it stays for the sake of what lies in it. */
  #pause(): undefined {
    for (; this.#firstView < this.#arguments.length; this.#firstView++) {
      const view = this.#arguments[this.#firstView]
      if (view !== undefined) this.#arguments[this.#firstView] = Buffer.from(view)
    }
    if (this.#isView) this.#bulk = Buffer.from(this.#bulk!)
    this.#isView = false
    this.#chunk = nothing
    this.#at = 0
  }

  /**
   * The next line without its LF; `undefined`: its end has not come. Throws `ProtocolError` for one that is too long.
   */
  #line(): Buffer | undefined {
    const chunk = this.#chunk
    const from = this.#at
    const first = this.#begun[0]?.[0] ?? chunk[from]
    const isHeader = this.#missing > 0 || first === star
    const most = isHeader ? maxHeaderBytes : maxInlineBytes
    const stop = Math.min(chunk.length, from + most - this.#begunBytes + 1)
    let end = from
    while (end < stop && chunk[end] !== lf) end++
    if (this.#begunBytes + end - from > most)
      throw new ProtocolError(isHeader ? 'invalid length' : `an inline command has at most ${maxInlineBytes} bytes`)
    const part = chunk.subarray(from, end)
    this.#at = Math.min(end + 1, chunk.length)
    if (end === chunk.length) {
      if (part.length > 0) this.#begun.push(Buffer.from(part))
      this.#begunBytes += part.length
      return undefined
    }
    if (this.#begunBytes === 0) return part
    const line = Buffer.concat([...this.#begun, part])
    this.#begun = []
    this.#begunBytes = 0
    return line
  }
}

/** The length in a header line: digits, then CR. Throws `ProtocolError`. */
function lengthIn(line: Buffer, what: string, most: number): number {
  const end = line.length - 1
  let length = 0
  let isRight = end >= 2 && line[end] === cr && (line[1] !== zero || end === 2)
  for (let at = 1; at < end; at++) {
    const digit = line[at]! - zero
    if (digit < 0 || digit > 9) isRight = false
    length = length * 10 + digit
  }
  if (!isRight || length > most) throw new ProtocolError(`invalid ${what} length`)
  return length
}

/** The words of an inline command. Throws `ProtocolError` for quotation marks, which would mean something elsewhere. */
function wordsOf(line: Buffer): Buffer[] {
  const words: Buffer[] = []
  const end = line[line.length - 1] === cr ? line.length - 1 : line.length
  for (let at = 0; at < end; ) {
    const from = at
    while (at < end && line[at]! > space) {
      if (line[at] === doubleQuote || line[at] === singleQuote)
        throw new ProtocolError('an inline command has no quotation marks here: send bulk strings')
      at++
    }
    if (at > from) words.push(line.subarray(from, at))
    else at++
  }
  return words
}

const shown = (byte: number | undefined): string =>
  byte === undefined ? 'nothing' : byte < 0x21 || byte > 0x7e ? `byte ${byte}` : `'${String.fromCharCode(byte)}'`
