/**
 * What a block codec is, and the argument checks that every codec of this package makes.
 *
 * A codec turns one block (a page of 4 KiB to 2 MiB; any length up to {@link MAX_BLOCK_BYTES} works) into a shorter one
 * and back. It stands between the store and the bytes, so three things matter more than the ratio: it never touches
 * memory outside the ranges it was given, it never returns guessed bytes, and it makes no garbage in steady state.
 *
 * Invariants:
 * - "does not fit" and "is not a block of mine" are values (0 and -1), because both happen in normal work;
 * - what is no `Uint8Array`, and ranges that lie outside their arrays, are the caller's mistake: `TypeError` and
 *   `RangeError`, from one check for all codecs, before anything is written;
 * - a codec keeps no block, and no reference to a caller's buffer, after a call has returned.
 */

/** Longest block, in bytes, on either side of a codec: a 2 MiB page. */
export const MAX_BLOCK_BYTES: number = 2 * 1024 * 1024

/**
 * A block codec working between the caller's buffers; holds only its own scratch memory, allocates nothing per call.
 */
export interface Codec {
  /** The name `createCodec` knows it by. */
  readonly name: CodecName
  /** Stored beside each page: a small integer, 1..15, that never changes its meaning. 0 is left to "not compressed". */
  readonly id: number
  /** What does the work, for statistics and bug reports: for example `wasm-simd`, `typescript`, `node:zlib`. */
  readonly engine: string
  /**
   * Largest number of bytes that compress() can need for `length` bytes of input.
   * @throws RangeError when `length` is not an integer in 0..MAX_BLOCK_BYTES.
   */
  bound(length: number): number
  /**
   * Compresses `src[srcAt, srcAt + srcLength)` into `dst[dstAt, dstAt + dstRoom)`. The two ranges must not overlap.
   * Nothing outside that room is written and nothing outside the source is read; after a 0 the room may hold rubbish.
   * @returns the bytes written (> 0), or 0 when the result does not fit in `dstRoom`.
   * @throws TypeError for what is no Uint8Array, RangeError when a range lies outside its array or the block is longer
   * than
   *   MAX_BLOCK_BYTES.
   */
  compress(src: Uint8Array, srcAt: number, srcLength: number, dst: Uint8Array, dstAt: number, dstRoom: number): number
  /**
   * Decompresses `src[srcAt, srcAt + srcLength)` to exactly `dstLength` bytes at `dst[dstAt]`. The ranges must not
   * overlap. Nothing outside them is read or written; after a -1 the destination may hold rubbish.
   * @returns `dstLength`, or -1 for every block that is malformed: cut, altered, bytes left over, wrong length.
   * @throws TypeError for what is no Uint8Array, RangeError when a range lies outside its array or is longer than a
   * block
   *   can be.
   */
  decompress(
    src: Uint8Array,
    srcAt: number,
    srcLength: number,
    dst: Uint8Array,
    dstAt: number,
    dstLength: number,
  ): number
}

/** Names that `createCodec` accepts. */
export type CodecName = 'lz4js' | 'lz4' | 'deflate' | 'zstd'

/** Stable reasons of a {@link CodecError}. */
export type CodecErrorCode = 'CODEC_UNKNOWN' | 'CODEC_UNAVAILABLE'

/** A codec cannot be had: nobody has that name, or this runtime lacks what it needs. */
export class CodecError extends Error {
  /** Stable: may be compared. The message may change. */
  readonly code: CodecErrorCode
  /** The name or id that was asked for. */
  readonly codec: string

  constructor(code: CodecErrorCode, codec: string, message: string) {
    super(message)
    this.name = 'CodecError'
    this.code = code
    this.codec = codec
  }
}

/**
 * Checks the six arguments of a compress or decompress call; `block` is which of the two lengths is that of the block.
 * @throws TypeError for what is no Uint8Array; RangeError that names the range, its place and the array's length.
 */
export function checkCall(
  src: Uint8Array,
  srcAt: number,
  srcLength: number,
  dst: Uint8Array,
  dstAt: number,
  dstLength: number,
  block: number,
): void {
  if (!isBytes(src) || !isBytes(dst)) throw noBytes(src, dst)
  checkBlockLength(block)
  checkRanges(src, srcAt, srcLength, dst, dstAt, dstLength)
}

/**
 * Checks two ranges.
 * @throws RangeError that names the range, its place and the array's length.
 */
export function checkRanges(
  src: Uint8Array,
  srcAt: number,
  srcLength: number,
  dst: Uint8Array,
  dstAt: number,
  dstLength: number,
): void {
  if (
    !isLength(srcAt) ||
    !isLength(srcLength) ||
    !isLength(dstAt) ||
    !isLength(dstLength) ||
    srcAt + srcLength > src.length ||
    dstAt + dstLength > dst.length
  ) {
    throw new RangeError(
      `codec: source [${String(srcAt)}, +${String(srcLength)}) of ${src.length} bytes or destination ` +
        `[${String(dstAt)}, +${String(dstLength)}) of ${dst.length} bytes lies outside its array; offsets and lengths must ` +
        `be integers inside the arrays`,
    )
  }
}

/**
 * Checks the length of an uncompressed block.
 * @throws RangeError when it is not an integer in 0..MAX_BLOCK_BYTES.
 */
export function checkBlockLength(length: number): void {
  if (!isLength(length) || length > MAX_BLOCK_BYTES) {
    throw new RangeError(`codec: a block has 0 to ${MAX_BLOCK_BYTES} bytes, not ${String(length)}; split it into pages`)
  }
}

/**
 * `>>> 0` changes every number that is not an integer in 0..2^32-1. The type comes first: a bigint has no `>>>`.
 */
const isLength = (value: number): boolean => typeof value === 'number' && value >>> 0 === value

/** What all kinds of typed arrays have in common. */
const typedArray: object = Object.getPrototypeOf(Uint8Array.prototype)

/** The name of a typed array's kind, whatever realm (a frame, a `vm` context, a test runner's) it comes from. */
const kindOf = (value: unknown): string | undefined =>
  Reflect.get(typedArray, Symbol.toStringTag, value) as string | undefined

const isBytes = (value: unknown): boolean => value instanceof Uint8Array || kindOf(value) === 'Uint8Array'

function noBytes(src: unknown, dst: unknown): TypeError {
  const [what, got] = isBytes(src) ? ['destination', dst] : ['source', src]
  const kind = kindOf(got) ?? (got === null ? 'null' : typeof got)
  return new TypeError(`codec: the ${what} must be a Uint8Array, got ${kind}; make one over the same bytes`)
}

/** Copies `length` bytes between two arrays that do not share memory, without making an object. */
export function copyBytes(src: Uint8Array, srcAt: number, length: number, dst: Uint8Array, dstAt: number): void {
  if (srcAt === 0 && length === src.length) {
    dst.set(src, dstAt)
    return
  }
  // A view and set() would be faster for long parts (2,000 bytes: 50 ns against 590 ns), but the view is an object.
  let i = 0
  for (; i + 4 <= length; i += 4) {
    dst[dstAt + i] = src[srcAt + i] as number
    dst[dstAt + i + 1] = src[srcAt + i + 1] as number
    dst[dstAt + i + 2] = src[srcAt + i + 2] as number
    dst[dstAt + i + 3] = src[srcAt + i + 3] as number
  }
  for (; i < length; i++) dst[dstAt + i] = src[srcAt + i] as number
}
