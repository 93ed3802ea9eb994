/**
 * The parts of Node.js that the cache uses, and their replacements in browsers: the used part of `Buffer`, a
 * diagnostics channel, structured clones, and the asynchronous context.
 *
 * Invariant: each kind of `Buffer` reads what the other writes. In browsers the channel has no listeners, and values
 * other than strings and bytes need a codec.
 */
import { builtin, compareBytes } from '@tmem/core/runtime'

/** A `Buffer`, or what stands in for one. */
export type Buffer = globalThis.Buffer

type Encoding = 'latin1' | 'utf8' | 'utf16le'

/** As `Buffer` of Node.js, without its checks: callers stay inside. */
export class PortableBuffer extends Uint8Array<ArrayBuffer> {
  static alloc(bytes: number): PortableBuffer {
    return new PortableBuffer(new ArrayBuffer(bytes))
  }

  static allocUnsafeSlow(bytes: number): PortableBuffer {
    return new PortableBuffer(new ArrayBuffer(bytes))
  }

  /** A copy of bytes, or a view of `length` bytes of memory from `at` on. */
  static override from(source: unknown, at?: unknown, length?: unknown): PortableBuffer {
    if (source instanceof ArrayBuffer) return new PortableBuffer(source, at as number, length as number)
    const bytes = source as Uint8Array
    const copy = new PortableBuffer(new ArrayBuffer(bytes.length))
    copy.set(bytes)
    return copy
  }

  static isBuffer(value: unknown): boolean {
    return value instanceof PortableBuffer
  }

  /** Bytes of a string in UTF-8. */
  static byteLength(text: string): number {
    let bytes = text.length
    for (let i = 0; i < text.length; i++) {
      const unit = text.charCodeAt(i)
      if (unit < 0x80) continue
      bytes++
      if (unit < 0x800) continue
      bytes++
      // A pair has four bytes for two units; one alone is written as U+FFFD, which has three.
      if (unit < 0xd800 || unit > 0xdbff) continue
      const next = text.charCodeAt(i + 1)
      if (next >= 0xdc00 && next <= 0xdfff) i++
    }
    return bytes
  }

  #view(at: number): DataView {
    return new DataView(this.buffer, this.byteOffset + at)
  }

  readInt32LE(at: number): number {
    return this.#view(at).getInt32(0, true)
  }

  readUInt32LE(at: number): number {
    return this.#view(at).getUint32(0, true)
  }

  readDoubleLE(at: number): number {
    return this.#view(at).getFloat64(0, true)
  }

  readUIntLE(at: number, bytes: number): number {
    let value = 0
    for (let i = bytes - 1; i >= 0; i--) value = value * 256 + this[at + i]!
    return value
  }

  writeInt32LE(value: number, at: number): number {
    this.#view(at).setInt32(0, value, true)
    return at + 4
  }

  writeUInt32LE(value: number, at: number): number {
    this.#view(at).setUint32(0, value, true)
    return at + 4
  }

  writeDoubleLE(value: number, at: number): number {
    this.#view(at).setFloat64(0, value, true)
    return at + 8
  }

  writeUIntLE(value: number, at: number, bytes: number): number {
    let rest = value
    for (let i = 0; i < bytes; i++) {
      this[at + i] = rest % 256
      rest = Math.floor(rest / 256)
    }
    return at + bytes
  }

  compare(target: Uint8Array, targetFrom: number, targetEnd: number, from: number, end: number): number {
    return compareBytes.call(this, target, targetFrom, targetEnd, from, end)
  }

  write(text: string, at: number, length: number, encoding: Encoding): number {
    if (encoding === 'utf8') return new TextEncoder().encodeInto(text, this.subarray(at, at + length)).written
    if (encoding === 'latin1') {
      for (let i = 0; i < length; i++) this[at + i] = text.charCodeAt(i)
      return length
    }
    for (let i = 0; i < length; i++) this[at + i] = text.charCodeAt(i >>> 1) >>> (8 * (i & 1))
    return length
  }

  override toString(encoding: Encoding = 'utf8', from: number = 0, end: number = this.length): string {
    if (encoding === 'utf8') return new TextDecoder().decode(this.slice(from, end))
    const step = encoding === 'latin1' ? 1 : 2
    const parts: string[] = []
    for (let at = from; at < end; ) {
      const units: number[] = []
      for (; at < end && units.length < 4096; at += step)
        units.push(step === 1 ? this[at]! : this[at]! | (this[at + 1]! << 8))
      parts.push(String.fromCharCode(...units))
    }
    return parts.join('')
  }
}

/** `Buffer` where there is one. */
export const Buffer: typeof globalThis.Buffer =
  (globalThis as { readonly Buffer?: typeof globalThis.Buffer }).Buffer ??
  (PortableBuffer as unknown as typeof globalThis.Buffer)

/** What all kinds of typed arrays have in common. */
const typedArray: object = Object.getPrototypeOf(Uint8Array.prototype)

/**
 * Whether a value is a `Uint8Array`, or a `Buffer`: the thing itself, and no proxy of one, which could run any code.
 */
export function isBytes(value: unknown): value is Uint8Array {
  return Reflect.get(typedArray, Symbol.toStringTag, value) === 'Uint8Array'
}

/** What is used of a diagnostics channel. */
export interface Channel {
  readonly hasSubscribers: boolean
  publish(message: unknown): void
}

/** The diagnostics channel of that name; one that nobody can listen to where there is none. */
export function channel(name: string): Channel {
  const made = builtin<typeof import('node:diagnostics_channel')>('node:diagnostics_channel')?.channel(name)
  return made ?? { hasSubscribers: false, publish: () => {} }
}

const v8 = builtin<typeof import('node:v8')>('node:v8')

/** A structured clone as bytes. Throws `TypeError` for what cannot be cloned; errors of getters stay the user's own. */
export const cloned: (value: unknown) => Uint8Array = v8 === undefined ? notCloned : clonerOf(v8)

/** The value of such bytes, which may be views of them. */
export function unclone(bytes: Uint8Array): unknown {
  return v8!.deserialize(bytes)
}

function notCloned(): never {
  throw new TypeError(
    'the value cannot be serialised here (only strings and bytes can): give a codec, such as ' +
      '{ encode: JSON.stringify, decode: JSON.parse }',
  )
}

function clonerOf({ DefaultSerializer }: typeof import('node:v8')): (value: unknown) => Uint8Array {
  class Cloner extends DefaultSerializer {
    _getSharedArrayBufferId(): never {
      throw notClonable('shared memory')
    }
  }
  // V8 calls it, and Node.js uses it as a constructor: a method would be none.
  Object.assign(Cloner.prototype, {
    _getDataCloneError: function DataCloneError(message: string): Error {
      return notClonable(message)
    },
  })
  return (value) => {
    const cloner = new Cloner()
    cloner.writeHeader()
    cloner.writeValue(value)
    return cloner.releaseBuffer()
  }
}

const notClonable = (what: string): TypeError => new TypeError(`the value cannot be serialised (${what}): give a codec`)

/** A value that goes along with what is called, and with what that waits for. */
export interface Context<T> {
  run<Result>(value: T, work: () => Result): Result
  getStore(): T | undefined
}

/** A context; where the runtime has none, one that nobody is ever in. */
export function context<T extends object>(): Context<T> {
  const hooks = builtin<typeof import('node:async_hooks')>('node:async_hooks')
  return hooks === undefined
    ? { run: (_, work) => work(), getStore: () => undefined }
    : new hooks.AsyncLocalStorage<T>()
}
