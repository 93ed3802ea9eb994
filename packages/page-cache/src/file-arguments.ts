/**
 * What callers give to an open file, checked and completed as node:fs/promises does: with its defaults, and its errors
 * (`code`).
 *
 * DEVIATION: a number that is no place in a file (a fraction, NaN, less than -1) is refused wherever a position is
 * taken. Node.js refuses it in some of its calls and versions, and reads or writes at the current position in the
 * others.
 *
 * Source: the documentation of node:fs/promises (FileHandle) and what Node.js 20 to 24 do.
 */
import { constants } from 'node:os'
import { inspect } from 'node:util'

/** Bytes of a read that names no buffer. */
const defaultBufferBytes = 16_384

/** `undefined`: where the last transfer without a position ended. */
export type Position = number | undefined

/** A read: `length` bytes into `bytes` from `offset`. */
export interface ReadArguments {
  /** As it was given, for the answer. */
  readonly buffer: NodeJS.ArrayBufferView
  readonly bytes: Uint8Array
  readonly position: Position
}

/** A write. */
export interface WriteArguments {
  /** As it was given, for the answer. */
  readonly buffer: NodeJS.ArrayBufferView | string
  readonly bytes: Uint8Array
  readonly position: Position
}

/** Options of `readFile` and `writeFile`. */
export interface FileOptions {
  readonly encoding?: BufferEncoding | null | undefined
  readonly signal?: AbortSignal | undefined
}

/** The arguments of `read`, in each of its three forms. Throws as Node does. */
export function readArguments(first: unknown, second: unknown, length: unknown, position: unknown): ReadArguments {
  if (!isView(first)) {
    if (first !== undefined && (typeof first !== 'object' || Array.isArray(first)))
      throw wrongType('options', 'an object', first)
    const given = (first ?? {}) as Record<string, unknown>
    const { buffer = Buffer.alloc(defaultBufferBytes), offset = 0, length, position = null } = given
    if (!isView(buffer)) throw wrongType('buffer', 'a Buffer, TypedArray or DataView', buffer)
    return intoRange(buffer, offset, length, position)
  }
  if (typeof second !== 'object' || second === null) return intoRange(first, second, length, position)
  const given = second as Record<string, unknown>
  return intoRange(first, given['offset'], given['length'], given['position'])
}

function intoRange(buffer: NodeJS.ArrayBufferView, from: unknown, count: unknown, position: unknown): ReadArguments {
  const offset = from ?? 0
  assertInteger('offset', offset)
  const length = count ?? buffer.byteLength - offset
  const place = position ?? -1
  // Nothing is read, whatever the rest says.
  if (length === 0) return { buffer, bytes: new Uint8Array(), position: undefined }
  if (buffer.byteLength === 0) throw wrongValue('buffer', 'has no bytes to read to', buffer)
  assertInteger('length', length)
  if (length > buffer.byteLength - offset) throw outOfRange('length', `<= ${buffer.byteLength - offset}`, length)
  if (typeof place !== 'number' && typeof place !== 'bigint') throw wrongType('position', 'an integer', place)
  return { buffer, bytes: bytesOf(buffer).subarray(offset, offset + length), position: placeOf(place) }
}

/** The arguments of `write`, in each of its forms. Throws as Node does. */
export function writeArguments(what: unknown, second: unknown, third: unknown, fourth: unknown): WriteArguments {
  if (typeof what === 'string') return { buffer: what, bytes: encoded(what, third), position: writePlace(second) }
  if (!isView(what)) throw wrongType('buffer', 'a string, Buffer, TypedArray or DataView', what)
  // Null counts as options, too: then nothing behind it is looked at.
  const given = typeof second === 'object' ? ((second ?? {}) as Record<string, unknown>) : undefined
  const { byteLength } = what
  const offset = (given === undefined ? second : given['offset']) ?? 0
  const count = given === undefined ? third : given['length']
  const position = given === undefined ? fourth : given['position']
  assertInteger('offset', offset)
  if (offset > byteLength) throw outOfRange('offset', `<= ${byteLength}`, offset)
  const length = typeof count === 'number' ? count : byteLength - offset
  assertInteger('length', length)
  if (length > byteLength - offset) throw outOfRange('length', `<= ${byteLength - offset}`, length)
  return { buffer: what, bytes: bytesOf(what).subarray(offset, offset + length), position: writePlace(position) }
}

/** The arguments of `readv` and `writev`. */
export function buffersOf(buffers: readonly NodeJS.ArrayBufferView[]): readonly Uint8Array[] {
  if (!Array.isArray(buffers) || !buffers.every(isView))
    throw wrongType('buffers', 'an array of Buffers, TypedArrays or DataViews', buffers)
  return buffers.map(bytesOf)
}

/** Whether something is a view of bytes, of whatever kind. */
export const isView = (value: unknown): value is NodeJS.ArrayBufferView => ArrayBuffer.isView(value)

/** The bytes that a view is of. */
export const bytesOf = (view: NodeJS.ArrayBufferView): Uint8Array =>
  view instanceof Uint8Array ? view : new Uint8Array(view.buffer, view.byteOffset, view.byteLength)

/** Where a write goes: what is no number leaves it to the file's own position. */
export const writePlace = (position: unknown): Position =>
  typeof position === 'number' ? placeOf(position) : undefined

/** Data of `writeFile`, or each piece of it. */
export function dataOf(data: unknown, encoding: BufferEncoding | null | undefined): Uint8Array {
  if (isView(data)) return bytesOf(data)
  if (typeof data !== 'string') throw wrongType('data', 'a string, Buffer, TypedArray, DataView or an iterable', data)
  return Buffer.from(data, encoding ?? 'utf8')
}

/** Whether data of `writeFile` comes in pieces. */
export function isInPieces(data: unknown): data is AsyncIterable<unknown> | Iterable<unknown> {
  if (typeof data !== 'object' || data === null || isView(data)) return false
  return Symbol.asyncIterator in data || Symbol.iterator in data
}

/** The options of `readFile` and `writeFile`. */
export function fileOptions(options: unknown): FileOptions {
  if (options === undefined || options === null || typeof options === 'function') return {}
  const given: FileOptions = typeof options === 'string' ? { encoding: options as BufferEncoding } : options
  if (typeof given !== 'object') throw wrongType('options', 'a string or an object', given)
  const { encoding, signal } = given
  if (encoding && !Buffer.isEncoding(encoding)) throw wrongValue('encoding', 'is unknown', encoding)
  if (signal !== undefined && (signal === null || typeof signal !== 'object' || !('aborted' in signal)))
    throw wrongType('options.signal', 'an AbortSignal', signal)
  return given
}

/** Throws when the signal says that nobody waits any more. */
export function assertWanted(signal: AbortSignal | undefined): void {
  if (signal?.aborted !== true) return
  const error = new Error('The operation was aborted', { cause: signal.reason })
  throw Object.assign(error, { name: 'AbortError', code: 'ABORT_ERR' })
}

/** The length of a file. Negative ones are 0, as in Node. */
export function lengthOf(length: unknown): number {
  if (typeof length !== 'number') throw wrongType('len', 'an integer', length)
  if (!Number.isSafeInteger(length)) throw outOfRange('len', 'an integer', length)
  return Math.max(0, length)
}

/** Text as bytes; encodings that nobody knows are taken for UTF-8, as in Node. */
function encoded(text: string, encoding: unknown): Uint8Array {
  const known = typeof encoding === 'string' && Buffer.isEncoding(encoding) ? encoding : 'utf8'
  if (known.toLowerCase() === 'hex' && text.length % 2 !== 0)
    throw wrongValue('encoding', `is invalid for data of length ${text.length}`, encoding)
  return Buffer.from(text, known)
}

function placeOf(position: number | bigint): Position {
  const place = Number(position)
  if (place === -1) return undefined
  if (!Number.isSafeInteger(place) || place < 0)
    throw outOfRange('position', `an integer from -1 to ${Number.MAX_SAFE_INTEGER}`, position)
  return place
}

function assertInteger(name: string, value: unknown): asserts value is number {
  if (typeof value !== 'number') throw wrongType(name, 'an integer', value)
  if (!Number.isSafeInteger(value) || value < 0) throw outOfRange(name, 'an integer, and not negative', value)
}

const text = (value: unknown): string => inspect(value, { depth: 0, maxStringLength: 40, maxArrayLength: 3 })

/** An argument of another type. */
export const wrongType = (name: string, wanted: string, got: unknown): TypeError =>
  Object.assign(new TypeError(`${name} must be ${wanted}, got ${text(got)}`), { code: 'ERR_INVALID_ARG_TYPE' })

/** An argument of the right type that makes no sense. */
export const wrongValue = (name: string, why: string, got: unknown): TypeError =>
  Object.assign(new TypeError(`${name} ${why}: got ${text(got)}`), { code: 'ERR_INVALID_ARG_VALUE' })

/** A number that is too large, too small or no integer. */
export const outOfRange = (name: string, wanted: string, got: unknown): RangeError =>
  Object.assign(new RangeError(`${name} must be ${wanted}, got ${text(got)}`), { code: 'ERR_OUT_OF_RANGE' })

/** A call at a time when it makes no sense. */
export const wrongState = (message: string): Error => Object.assign(new Error(message), { code: 'ERR_INVALID_STATE' })

/** The error of a system call that was not worth making. */
export function systemError(code: 'EBADF' | 'EINVAL', call: string, why: string): Error {
  const error = new Error(`${code}: ${why}, ${call}`)
  return Object.assign(error, { code, errno: -constants.errno[code], syscall: call })
}
