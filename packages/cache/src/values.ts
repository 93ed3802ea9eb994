/**
 * Conversion of values to bytes and back. Strings and bytes are stored unchanged, other values as a structured clone
 * (`v8.serialize`), unless the user names a codec.
 *
 * A returned value never shares memory with the cache or with another returned value.
 */
import { Buffer, cloned, isBytes, unclone } from './runtime.ts'

/** How a value is kept. The numbers are in files: a contract. */
export const ValueKind = {
  /** A string of code units below 128. */
  Ascii: 0,
  /** A well-formed string. */
  Utf8: 1,
  /** A string with lone surrogates, two bytes for each code unit. */
  Utf16: 2,
  /** A `Uint8Array`. */
  Bytes: 3,
  /** A `Buffer`. */
  Buffer: 4,
  /** A structured clone. */
  Clone: 5,
  /** No value: that there is none is remembered (see `FetchOptions.absentTtl`). */
  Absent: 6,
} as const
export type ValueKind = (typeof ValueKind)[keyof typeof ValueKind]

/**
 * Turns values into strings or bytes and back: `{ encode: JSON.stringify, decode: JSON.parse }`. `decode` gets what
 * `encode` gave: a string, or bytes that are its own.
 */
export interface ValueCodec<V, Encoded extends string | Uint8Array = string | Uint8Array> {
  encode(value: V): Encoded
  decode(encoded: Encoded): V
}

/** Largest value, in bytes as it is kept. */
export const maxValueBytes: number = 64 * 2 ** 20

/** A value that was made ready to be written: one at a time. */
export class ValueWriter {
  kind: ValueKind = ValueKind.Absent
  /** Bytes as it is kept. */
  length = 0
  #text = ''
  #bytes: Uint8Array | undefined

  /**
   * Makes a value ready. May run code of the user's: a codec, a getter. Throws `TypeError` for what cannot be
   * serialised, `RangeError` for what is too large, and whatever that code throws.
   */
  take(who: string, value: unknown, codec: ValueCodec<unknown> | undefined): void {
    if (value === undefined) throw new TypeError(`${who}: undefined is what get answers when there is no value`)
    const raw = codec === undefined ? value : encodeWith(who, codec, value)
    this.#bytes = undefined
    this.#text = ''
    if (typeof raw === 'string') {
      const bytes = Buffer.byteLength(raw)
      if (bytes === raw.length) this.#ready(who, ValueKind.Ascii, bytes)
      else if (isWellFormed(raw)) this.#ready(who, ValueKind.Utf8, bytes)
      else this.#ready(who, ValueKind.Utf16, raw.length * 2)
      this.#text = raw
    } else if (isBytes(raw)) {
      this.#ready(who, Buffer.isBuffer(raw) ? ValueKind.Buffer : ValueKind.Bytes, raw.length)
      this.#bytes = raw
    } else {
      const bytes = cloned(raw)
      this.#ready(who, ValueKind.Clone, bytes.length)
      this.#bytes = bytes
    }
  }

  /** Makes ready that there is no value. */
  takeAbsent(): void {
    this.kind = ValueKind.Absent
    this.length = 0
    this.#bytes = undefined
    this.#text = ''
  }

  /** Writes it, and forgets it. */
  writeTo(into: Buffer, at: number): void {
    if (this.#bytes !== undefined) into.set(this.#bytes, at)
    else if (this.kind === ValueKind.Ascii) into.write(this.#text, at, this.length, 'latin1')
    else if (this.kind === ValueKind.Utf8) into.write(this.#text, at, this.length, 'utf8')
    else if (this.kind === ValueKind.Utf16) into.write(this.#text, at, this.length, 'utf16le')
    this.#bytes = undefined
    this.#text = ''
  }

  #ready(who: string, kind: ValueKind, length: number): void {
    if (length > maxValueBytes)
      throw new RangeError(`${who}: a value has at most ${maxValueBytes} bytes, this one has ${length}: split it`)
    this.kind = kind
    this.length = length
  }
}

/** The value that is kept at `bytes[at, at + length)`, before the codec. */
export function readRaw(bytes: Buffer, at: number, length: number, kind: ValueKind): unknown {
  return decodeRaw(copyRaw(bytes, at, length, kind), kind)
}

/** The same as far as it needs the bytes: what comes back is nobody else's. `decodeRaw` does the rest. */
export function copyRaw(bytes: Buffer, at: number, length: number, kind: ValueKind): string | Uint8Array | undefined {
  switch (kind) {
    case ValueKind.Ascii:
      return bytes.toString('latin1', at, at + length)
    case ValueKind.Utf8:
      return bytes.toString('utf8', at, at + length)
    case ValueKind.Utf16:
      return bytes.toString('utf16le', at, at + length)
    case ValueKind.Bytes:
    case ValueKind.Clone:
      return new Uint8Array(bytes.subarray(at, at + length))
    case ValueKind.Buffer:
      return Buffer.from(bytes.subarray(at, at + length))
    case ValueKind.Absent:
      return undefined
  }
}

/** What was copied, as a value before the codec. */
export function decodeRaw(raw: string | Uint8Array | undefined, kind: ValueKind): unknown {
  // What is deserialised may be views of what it is read from.
  return kind === ValueKind.Clone ? unclone(raw as Uint8Array) : raw
}

function encodeWith(who: string, codec: ValueCodec<unknown>, value: unknown): string | Uint8Array {
  const encoded: unknown = codec.encode(value)
  if (typeof encoded === 'string' || isBytes(encoded)) return encoded
  throw new TypeError(`${who}: codec.encode gives a string or a Uint8Array; it gave ${typeof encoded}`)
}

/** Whether no surrogate stands alone. */
function isWellFormed(text: string): boolean {
  return (text as string & { isWellFormed(): boolean }).isWellFormed()
}
