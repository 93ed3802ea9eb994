/**
 * LZ4 blocks in plain TypeScript: the structure check, the portable codec, and the fence around lz4js.
 *
 * Source: "LZ4 Block Format Description" (lz4_Block_format.md of the LZ4 project). A block is a row of sequences: a
 * token byte (literal count in the high four bits, match length - 4 in the low four; 15 means "and more bytes follow,
 * until one is not 255"), the literals, a little-endian 16-bit distance 1..65535, and the rest of the match length. The
 * last sequence is literals only and the block ends with them.
 *
 * Invariants:
 * - What is written here keeps the two rules for block ends: the last 5 bytes are literals, and the last match starts
 *   at least 12 bytes before the end. C's decoder refuses blocks that do not.
 * - What is read here need not keep them: they exist so that decoders may copy in large steps, and none here relies on
 *   them. Everything else must hold: a distance of 0 or one that reaches before the block, a run or a match that
 *   crosses an end, bytes left over on either side, all give -1. All LZ4 codecs of this package accept the same blocks.
 */
// Whoever compiles this file from another package finds the types of lz4js too.
// oxlint-disable-next-line typescript/triple-slash-reference
/// <reference path="./lz4js.d.ts" />
import { compressBlock, decompressBlock } from 'lz4js'
import { type Codec, checkBlockLength, checkCall, copyBytes, MAX_BLOCK_BYTES } from './codec.ts'

/** Shortest match that the format can express, in bytes. */
const MIN_MATCH = 4
/** A match may not start in the last 12 bytes of a block. */
const MATCH_START_LIMIT = 12
/** A match may not cover the last 5 bytes of a block. */
const LAST_LITERALS = 5
/** Longest distance of a match, in bytes. */
const MAX_DISTANCE = 65535

/** Largest LZ4 block for `length` bytes of input: all literals, their count, and slack for copying in steps. */
export function lz4Bound(length: number): number {
  checkBlockLength(length)
  return length + Math.floor(length / 255) + 16
}

/**
 * Tells whether `src[at, at + length)` is an LZ4 block of exactly `decodedLength` bytes, without decoding it.
 * The ranges must lie inside the array.
 */
export function isLz4Block(src: Uint8Array, at: number, length: number, decodedLength: number): boolean {
  const end = at + length
  let ip = at
  let op = 0
  for (;;) {
    if (ip >= end) return false
    const token = src[ip++] as number
    let run = token >> 4
    if (run === 15) {
      let more: number
      do {
        if (ip >= end) return false
        more = src[ip++] as number
        run += more
      } while (more === 255)
    }
    if (run > end - ip || run > decodedLength - op) return false
    ip += run
    op += run
    if (ip === end) return op === decodedLength
    if (end - ip < 2) return false
    const distance = (src[ip] as number) | ((src[ip + 1] as number) << 8)
    ip += 2
    if (distance === 0 || distance > op) return false
    let match = token & 15
    if (match === 15) {
      let more: number
      do {
        if (ip >= end) return false
        more = src[ip++] as number
        match += more
      } while (more === 255)
    }
    match += MIN_MATCH
    if (match > decodedLength - op) return false
    op += match
  }
}

/**
 * A checksum of `bytes[at, at + length)` for telling damage: Fletcher's, over eight lanes of little-endian 32-bit words
 * (the end is filled up with zeros), mixed into one word. The WebAssembly module has the same.
 */
export function checksumPortable(bytes: Uint8Array, at: number, length: number): number {
  const sums = new Int32Array(16).fill(length, 0, 4).fill(~length, 4, 8)
  for (let from = at; from < at + length; from += 32)
    for (let lane = 0; lane < 8; lane++) {
      let word = 0
      for (let byte = 3; byte >= 0; byte--) {
        const i = from + lane * 4 + byte
        word = (word << 8) | (i < at + length ? (bytes[i] as number) : 0)
      }
      sums[lane] = (sums[lane] as number) + word
      sums[lane + 8] = (sums[lane + 8] as number) + (sums[lane] as number)
    }
  let sum = 0
  for (const lane of sums) {
    sum = Math.imul(sum ^ lane, 0x9e3779b1)
    sum = (sum << 13) | (sum >>> 19)
  }
  return sum
}

/** Bytes that a final sequence of `run` literals takes. */
function literalsSize(run: number): number {
  return 1 + (run >= 15 ? Math.floor((run - 15) / 255) + 1 : 0) + run
}

/** Writes the final sequence: `run` literals. The room must be there. Returns the index behind it. */
function writeLiterals(src: Uint8Array, srcAt: number, run: number, dst: Uint8Array, dstAt: number): number {
  let op = dstAt
  if (run >= 15) {
    dst[op++] = 0xf0
    let rest = run - 15
    for (; rest >= 255; rest -= 255) dst[op++] = 255
    dst[op++] = rest
  } else {
    dst[op++] = run << 4
  }
  copyBytes(src, srcAt, run, dst, op)
  return op + run
}

/** Positions are looked up by a hash of this many bits: 32 KiB of table, which stays in the first-level cache. */
const HASH_BITS = 13
/** 2^32 over the golden ratio: spreads four bytes over the upper bits of a product. */
const HASH_FACTOR = 0x9e3779b1
/** Every so many failed attempts the search steps one byte further, so that it runs through what does not compress. */
const SKIP_SHIFT = 6
/** From this length on a match is moved by the runtime's own copy; below it a loop is cheaper. */
const LONG_MATCH = 48

/**
 * The LZ4 codec for runtimes without WebAssembly SIMD: typed arrays only.
 *
 * The table is never cleared between blocks. It holds `position + epoch`, and the epoch moves on by the length of each
 * block, so an entry below the epoch belongs to an earlier block and counts as empty.
 */
export function createPortableLz4(): Codec {
  const table = new Int32Array(1 << HASH_BITS)
  let epoch = 1

  return {
    name: 'lz4',
    id: 2,
    engine: 'typescript',
    bound: lz4Bound,
    compress(src, srcAt, srcLength, dst, dstAt, dstRoom) {
      checkCall(src, srcAt, srcLength, dst, dstAt, dstRoom, srcLength)
      if (epoch > 0x7fffffff - MAX_BLOCK_BYTES) {
        table.fill(0)
        epoch = 1
      }
      const shift = srcAt - epoch
      epoch += srcLength
      return compressPortable(table, shift, src, srcAt, srcLength, dst, dstAt, dstRoom)
    },
    decompress(src, srcAt, srcLength, dst, dstAt, dstLength) {
      checkCall(src, srcAt, srcLength, dst, dstAt, dstLength, dstLength)
      return decompressPortable(src, srcAt, srcLength, dst, dstAt, dstLength)
    },
  }
}

/** `shift`: index into `src` minus table entry; entries whose index falls before `srcAt` are of earlier blocks. */
function compressPortable(
  table: Int32Array,
  shift: number,
  src: Uint8Array,
  srcAt: number,
  srcLength: number,
  dst: Uint8Array,
  dstAt: number,
  dstRoom: number,
): number {
  const end = srcAt + srcLength
  const roomEnd = dstAt + dstRoom
  const lastStart = end - MATCH_START_LIMIT
  const matchEnd = end - LAST_LITERALS
  let anchor = srcAt
  let op = dstAt
  if (srcLength > MATCH_START_LIMIT) {
    table[hash(src, srcAt)] = srcAt - shift
    let ip = srcAt + 1
    let attempts = 1 << SKIP_SHIFT
    while (ip <= lastStart) {
      const slot = hash(src, ip)
      let from = (table[slot] as number) + shift
      table[slot] = ip - shift
      if (
        from < srcAt ||
        ip - from > MAX_DISTANCE ||
        src[from] !== src[ip] ||
        src[from + 1] !== src[ip + 1] ||
        src[from + 2] !== src[ip + 2] ||
        src[from + 3] !== src[ip + 3]
      ) {
        ip += attempts++ >> SKIP_SHIFT
        continue
      }
      attempts = 1 << SKIP_SHIFT
      const distance = ip - from
      let matched = ip + MIN_MATCH
      from += MIN_MATCH
      while (matched < matchEnd && src[matched] === src[from]) {
        matched++
        from++
      }
      while (ip > anchor && ip - distance > srcAt && src[ip - 1] === src[ip - distance - 1]) ip--

      const run = ip - anchor
      let rest = matched - ip - MIN_MATCH
      if (op + sequenceSize(run, rest) > roomEnd) return 0
      const low = Math.min(rest, 15)
      if (run >= 15) {
        dst[op++] = 0xf0 | low
        let more = run - 15
        for (; more >= 255; more -= 255) dst[op++] = 255
        dst[op++] = more
      } else {
        dst[op++] = (run << 4) | low
      }
      copyBytes(src, anchor, run, dst, op)
      op += run
      dst[op++] = distance
      dst[op++] = distance >> 8
      if (rest >= 15) {
        for (rest -= 15; rest >= 255; rest -= 255) dst[op++] = 255
        dst[op++] = rest
      }
      anchor = matched
      ip = matched
      if (ip <= lastStart) table[hash(src, ip - 2)] = ip - 2 - shift
    }
  }
  const run = end - anchor
  if (op + literalsSize(run) > roomEnd) return 0
  return writeLiterals(src, anchor, run, dst, op) - dstAt
}

function hash(src: Uint8Array, at: number): number {
  const word =
    (src[at] as number) |
    ((src[at + 1] as number) << 8) |
    ((src[at + 2] as number) << 16) |
    ((src[at + 3] as number) << 24)
  return Math.imul(word, HASH_FACTOR) >>> (32 - HASH_BITS)
}

/** Bytes that a sequence of `run` literals and a match of `rest` + 4 bytes takes. */
function sequenceSize(run: number, rest: number): number {
  return literalsSize(run) + 2 + (rest >= 15 ? Math.floor((rest - 15) / 255) + 1 : 0)
}

function decompressPortable(
  src: Uint8Array,
  srcAt: number,
  srcLength: number,
  dst: Uint8Array,
  dstAt: number,
  dstLength: number,
): number {
  const end = srcAt + srcLength
  const opEnd = dstAt + dstLength
  let ip = srcAt
  let op = dstAt
  for (;;) {
    if (ip >= end) return -1
    const token = src[ip++] as number
    let run = token >> 4
    if (run === 15) {
      let more: number
      do {
        if (ip >= end) return -1
        more = src[ip++] as number
        run += more
      } while (more === 255)
    }
    if (run > end - ip || run > opEnd - op) return -1
    copyBytes(src, ip, run, dst, op)
    ip += run
    op += run
    if (ip === end) return op === opEnd ? dstLength : -1
    if (end - ip < 2) return -1
    const distance = (src[ip] as number) | ((src[ip + 1] as number) << 8)
    ip += 2
    if (distance === 0 || distance > op - dstAt) return -1
    let match = token & 15
    if (match === 15) {
      let more: number
      do {
        if (ip >= end) return -1
        more = src[ip++] as number
        match += more
      } while (more === 255)
    }
    match += MIN_MATCH
    if (match > opEnd - op) return -1
    if (match >= LONG_MATCH && distance >= match) {
      dst.copyWithin(op, op - distance, op - distance + match)
      op += match
    } else if (match >= LONG_MATCH && distance === 1) {
      dst.fill(dst[op - 1] as number, op, op + match)
      op += match
    } else {
      let from = op - distance
      for (const stop = op + match; op < stop; ) dst[op++] = dst[from++] as number
    }
  }
}

/**
 * lz4js 0.2.0 behind the codec interface. Its traps, and what stands before each:
 * - stale table entries give distance 0: the table is cleared for every block;
 * - it writes past a short destination: it gets scratch memory of bound() bytes, and only what fits is copied out;
 * - its answer 0 for "nothing found" depends on the source offset, and is also given for short blocks: blocks always
 *   start at offset 0 of what it sees, and a 0 becomes a block of literals;
 * - it lets matches start up to 10 bytes before the end: such a last match is turned back into literals;
 * - its decoder checks nothing: the structure of a block is checked before the decoder sees it.
 */
export function createLz4js(): Codec {
  const table = new Uint32Array(1 << 16)
  let input = new Uint8Array(0)
  let output = new Uint8Array(0)

  return {
    name: 'lz4js',
    id: 1,
    engine: 'lz4js',
    bound: lz4Bound,
    compress(src, srcAt, srcLength, dst, dstAt, dstRoom) {
      checkCall(src, srcAt, srcLength, dst, dstAt, dstRoom, srcLength)
      const bound = lz4Bound(srcLength)
      if (output.length < bound) output = new Uint8Array(bound)
      let from = src
      if (srcAt !== 0) {
        if (input.length < srcLength) input = new Uint8Array(srcLength)
        copyBytes(src, srcAt, srcLength, input, 0)
        from = input
      }
      table.fill(0)
      let written = compressBlock(from, output, 0, srcLength, table)
      if (written === 0) {
        if (literalsSize(srcLength) > dstRoom) return 0
        return writeLiterals(src, srcAt, srcLength, dst, dstAt) - dstAt
      }
      written = keepEndRules(from, srcLength, output, written)
      if (written > dstRoom) return 0
      copyBytes(output, 0, written, dst, dstAt)
      return written
    },
    decompress(src, srcAt, srcLength, dst, dstAt, dstLength) {
      checkCall(src, srcAt, srcLength, dst, dstAt, dstLength, dstLength)
      if (!isLz4Block(src, srcAt, srcLength, dstLength)) return -1
      decompressBlock(src, dst, srcAt, srcLength, dstAt)
      return dstLength
    },
  }
}

/**
 * Replaces the last match of a sound block of `src[0, length)` by literals when it starts too near the end.
 * Only the last one can: behind a match that starts in the last 11 bytes, lz4js leaves 5 and needs 9 for another.
 * @returns the length of the block afterwards; never above the bound.
 */
function keepEndRules(src: Uint8Array, length: number, block: Uint8Array, blockLength: number): number {
  let ip = 0
  let op = 0
  for (;;) {
    const sequence = ip
    const start = op
    const token = block[ip++] as number
    let run = token >> 4
    if (run === 15) {
      let more: number
      do {
        more = block[ip++] as number
        run += more
      } while (more === 255)
    }
    ip += run
    op += run
    if (ip >= blockLength) return blockLength
    if (op > length - MATCH_START_LIMIT) return writeLiterals(src, start, length - start, block, sequence)
    ip += 2
    let match = token & 15
    if (match === 15) {
      let more: number
      do {
        more = block[ip++] as number
        match += more
      } while (more === 255)
    }
    op += match + MIN_MATCH
  }
}
