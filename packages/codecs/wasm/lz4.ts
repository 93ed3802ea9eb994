/**
 * The fast LZ4 codec: AssemblyScript, compiled to WebAssembly with SIMD by wasm/build.mjs and kept as text in
 * src/lz4-module.ts.
 *
 * Source: "LZ4 Block Format Description" (lz4_Block_format.md of the LZ4 project). src/lz4.ts does the same in plain
 * TypeScript, and the tests hold the two, lz4js, lz4-napi and C's lz4 against each other.
 *
 * Where a page's time goes, and what follows from it (4 KiB pages of the mixed corpus, counted with cachegrind on the
 * same search written in C): 175 sequences and 1,400 lookups a page, 15 instructions a lookup, and 1.6 branches that
 * are predicted wrongly for each sequence. Both halves cost about the same. So:
 * - A table entry carries bits of the hash beside the position: whether a candidate matches is known without loading
 * it.
 * - Five bytes are hashed, not four: matches of four bytes save one byte each and cost a sequence (a quarter fewer
 *   sequences for 1 % more bytes).
 * - Each block adds another number to its hash bits, so that entries of earlier blocks do not match, and the table is
 *   not cleared for every page. What matches by chance is found out, because the four bytes are compared all the same.
 * - Four lookups are written out one after the other: trying two or four at once without branches was slower.
 * - A block is written to scratch memory that is always large enough, so that no sequence asks for room.
 *
 * Memory, divided by the host (src/lz4-wasm.ts has the same numbers): constants in the second KiB, the table, the page,
 * the block, then the caller's part. The page and the block are followed by at least 1 KiB that belongs to nobody:
 * copies go in steps of 16 bytes, and loads may run over the end of a range, but what they find there never reaches
 * the result. The same holds for the end of the memory.
 */

/** Entries of 32 bits: position in the low bits, bits of the hash above. 4,096 for pages of 4 KiB, 8,192 for others. */
const TABLE: usize = 0x800;
const TABLE_BYTES: usize = 0x8000;
/** The block to compress, or what decompress() made: up to 2 MiB. */
const PAGE: usize = 0x10000;
/**
 * What compress() made: up to the bound of 2 MiB. The low 12 bits of both addresses differ by 3 KiB, more than the
 * output usually lags behind the input: stores here would otherwise seem to hit the loads there.
 */
const BLOCK: usize = 0x211c00;

const MIN_MATCH: usize = 4;
const MATCH_START_LIMIT: usize = 12;
const LAST_LITERALS: usize = 5;
const MAX_DISTANCE: usize = 65535;

/** A prime near 2^64 over the golden ratio, times 2^24: only the low five bytes of the other factor count. */
const HASH_FACTOR: u64 = 0xcf1bbcdcbb000000;

/**
 * Row d holds the 16 indices i mod d: applied to 16 bytes at distance d they give the next 16 bytes of the repetition.
 * Row 0 is never used.
 */
// prettier-ignore
const REPEAT: usize = memory.data<u8>([
  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
  0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1,
  0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0,
  0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,
  0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0,
  0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3,
  0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1,
  0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7,
  0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6,
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5,
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 4,
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3,
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 1, 2,
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 1,
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0,
]);

/** The smallest multiple of d that is 16 or more: a repetition of d bytes is also one of that many. */
// prettier-ignore
const STRIDE: usize = memory.data<u8>([0, 16, 16, 18, 16, 20, 18, 21, 16, 18, 20, 22, 24, 26, 28, 30]);

/** Added to the hash bits of the entries of a block; another one for each block. */
let nonce: u32 = 0;
/** Second result of emit(): the place behind the match. */
let behind: usize = 0;

/** Copies in steps of 16 bytes, at least one of them, up to or over `end`. */
// @ts-ignore: decorator
@inline
function copySteps(to: usize, from: usize, end: usize): void {
  do {
    v128.store(to, v128.load(from));
    to += 16;
    from += 16;
  } while (to < end);
}

/** Writes the part of a length that is above 15. Returns the address behind it. */
// @ts-ignore: decorator
@inline
function writeLength(op: usize, rest: usize): usize {
  while (rest >= 255) {
    store<u8>(op++, 255);
    rest -= 255;
  }
  store<u8>(op, <u8>rest);
  return op + 1;
}

/** Writes the token's literal half, the rest of its length and the literals. Returns the address behind them. */
// @ts-ignore: decorator
@inline
function writeRun(op: usize, anchor: usize, run: usize): usize {
  store<u8>(op, <u8>(min<usize>(run, 15) << 4));
  op++;
  if (run >= 15) op = writeLength(op, run - 15);
  copySteps(op, anchor, op + run);
  return op + run;
}

/**
 * Writes the sequence of the literals from `anchor` and the match of `at` with `match`, of which four bytes are known
 * to agree; extends it both ways. Returns the address behind the sequence; `behind` is the place behind the match.
 */
function emit(op: usize, anchor: usize, at: usize, match: usize, end: usize): usize {
  const limit = end - LAST_LITERALS;
  const distance = at - match;
  let stop = at + MIN_MATCH;
  while (stop + 8 <= limit) {
    const difference = load<u64>(stop) ^ load<u64>(stop - distance);
    if (difference != 0) {
      stop += <usize>(ctz(difference) >> 3);
      break;
    }
    stop += 8;
  }
  if (stop + 8 > limit) {
    while (stop < limit && load<u8>(stop) == load<u8>(stop - distance)) stop++;
  }
  let ip = at;
  while (ip > anchor && ip - distance > PAGE && load<u8>(ip - 1) == load<u8>(ip - distance - 1)) ip--;

  const rest = stop - ip - MIN_MATCH;
  const token = op;
  op = writeRun(op, anchor, ip - anchor);
  store<u16>(op, <u16>distance);
  op += 2;
  store<u8>(token, load<u8>(token) | <u8>min<usize>(rest, 15));
  if (rest >= 15) op = writeLength(op, rest - 15);
  behind = stop;
  return op;
}

/** The last bytes of a block, one place at a time, and the final literals. Returns the length of the whole block. */
function finish(op: usize, anchor: usize, at: usize, end: usize, bias: u32, bits: u32, indexBits: u32): usize {
  const positions: u32 = (1 << bits) - 1;
  let ip = at;
  // `end - 12` is above 0 also for a block without bytes.
  while (ip <= end - MATCH_START_LIMIT) {
    const product = load<u64>(ip) * HASH_FACTOR;
    const slot = <usize>(product >> (64 - indexBits)) << 2;
    const from = PAGE + <usize>(load<u32>(slot, TABLE) & positions);
    store<u32>(slot, (<u32>(product >> 32) << bits) + <u32>ip + bias, TABLE);
    if (from < ip && ip - from <= MAX_DISTANCE && load<u32>(from) == load<u32>(ip)) {
      op = emit(op, anchor, ip, from, end);
      anchor = behind;
      ip = behind;
    } else {
      ip++;
    }
  }
  return writeRun(op, anchor, end - anchor) - BLOCK;
}

/**
 * Compresses PAGE[0, length) to BLOCK. `bits`: of an entry for the position; 2^bits >= length.
 * Reading 28 bytes from any place up to `quick` stays inside the block, and a match from there that agrees in at most
 * 18 bytes keeps the last 5 free.
 */
// @ts-ignore: decorator
@inline
function search(length: usize, bits: u32, indexBits: u32): usize {
  const positions: u32 = (1 << bits) - 1;
  const slots: usize = ((1 << indexBits) - 1) << 2;
  const end = PAGE + length;
  let op = BLOCK;
  let anchor = PAGE;
  let ip = PAGE;
  nonce += 0x9e3779b1;
  const bias: u32 = (nonce & ~positions) - <u32>PAGE;
  if (length >= 32) {
    const quick = end - 28;
    let misses: u32 = 0;
    while (ip <= quick) {
      const word = load<u64>(ip);
      const base: u32 = <u32>ip + bias;
      let product = word * HASH_FACTOR;
      let entry: u32 = (<u32>(product >> 32) << bits) + base;
      let slot = <usize>(product >> (62 - indexBits)) & slots;
      let found = load<u32>(slot, TABLE);
      store<u32>(slot, entry, TABLE);
      if ((found ^ entry) > positions) {
        product = (word >> 8) * HASH_FACTOR;
        entry = (<u32>(product >> 32) << bits) + base + 1;
        slot = <usize>(product >> (62 - indexBits)) & slots;
        found = load<u32>(slot, TABLE);
        store<u32>(slot, entry, TABLE);
        if ((found ^ entry) > positions) {
          product = (word >> 16) * HASH_FACTOR;
          entry = (<u32>(product >> 32) << bits) + base + 2;
          slot = <usize>(product >> (62 - indexBits)) & slots;
          found = load<u32>(slot, TABLE);
          store<u32>(slot, entry, TABLE);
          if ((found ^ entry) > positions) {
            product = (word >> 24) * HASH_FACTOR;
            entry = (<u32>(product >> 32) << bits) + base + 3;
            slot = <usize>(product >> (62 - indexBits)) & slots;
            found = load<u32>(slot, TABLE);
            store<u32>(slot, entry, TABLE);
            if ((found ^ entry) > positions) {
              // Every 64 bytes without a match, the gap between two looks at four places grows by four.
              ip += 4 + ((misses++ >> 4) << 2);
              continue;
            }
            ip += 3;
          } else ip += 2;
        } else ip += 1;
      }
      const from = PAGE + <usize>(found & positions);
      // Other bytes with the same hash, or an entry of an earlier block that matches by chance: it may point anywhere.
      if (load<u32>(from) != load<u32>(ip)) {
        ip++;
        continue;
      }
      if (from >= ip) {
        ip++;
        continue;
      }
      if (bits > 16) {
        if (ip - from > MAX_DISTANCE) {
          ip++;
          continue;
        }
      }
      misses = 0;
      const run = ip - anchor;
      const same: u32 = <u32>i8x16.bitmask(i8x16.eq(v128.load(ip, 4), v128.load(from, 4))) | 0xffff8000;
      if (same == 0xffffffff) {
        op = emit(op, anchor, ip, from, end);
        ip = behind;
      } else if (run >= 15) {
        op = emit(op, anchor, ip, from, end);
        ip = behind;
      } else {
        const rest = <usize>ctz(~same);
        store<u8>(op, <u8>((run << 4) | rest));
        v128.store(op, v128.load(anchor), 1);
        op += run;
        store<u16>(op, <u16>(ip - from), 1);
        op += 3;
        ip += rest + MIN_MATCH;
      }
      anchor = ip;
      const last = load<u64>(ip - 2) * HASH_FACTOR;
      store<u32>(<usize>(last >> (62 - indexBits)) & slots, (<u32>(last >> 32) << bits) + <u32>ip - 2 + bias, TABLE);
    }
  }
  return finish(op, anchor, ip, end, bias, bits, indexBits);
}

// Functions of their own, because the compiler's registers are given out per function.
function searchPage(length: usize): usize {
  return search(length, 12, 12);
}
function searchMedium(length: usize): usize {
  return search(length, 16, 13);
}
function searchLarge(length: usize): usize {
  return search(length, 21, 13);
}

/**
 * Compresses PAGE[0, length) to BLOCK, and copies it to `to` when that is not 0 and `room` is enough.
 * Returns the bytes written, or 0 when they are more than `room`.
 */
export function compress(length: usize, to: usize, room: usize): usize {
  let written: usize;
  if (length <= 0x1000) {
    written = searchPage(length);
  } else {
    // With fewer hash bits in an entry, more of the old ones would have to be found out.
    memory.fill(TABLE, 0, TABLE_BYTES);
    written = length <= 0x10000 ? searchMedium(length) : searchLarge(length);
  }
  if (written > room) return 0;
  if (to != 0) memory.copy(to, BLOCK, written);
  return written;
}

/** Decompresses `length` bytes at `src` to PAGE. Returns `outLength`, or -1 when the block is malformed. */
export function decompress(src: usize, length: usize, outLength: usize): i32 {
  const end = src + length;
  const outEnd = PAGE + outLength;
  let ip = src;
  let op = PAGE;
  if (length == 0) return -1;

  // Short runs and matches are copied first and checked afterwards. From a checked place (op <= outEnd, ip < end) a
  // short run moves `op` and `ip` by 14 at most, and a short match writes 20 bytes there: 34 bytes behind outEnd. A
  // long match is checked before it is copied, and its steps run over its end by 31 at most. So 64 bytes are enough.
  while (true) {
    const token = <usize>load<u8>(ip++);
    let run = token >> 4;
    if (run < 15) {
      v128.store(op, v128.load(ip));
      ip += run;
      op += run;
    } else {
      let more: usize;
      do {
        if (ip >= end) return -1;
        more = <usize>load<u8>(ip++);
        run += more;
      } while (more == 255);
      if (ip > end || run > end - ip || run > outEnd - op) return -1;
      copySteps(op, ip, op + run);
      ip += run;
      op += run;
    }
    if (ip >= end) return ip == end && op == outEnd ? <i32>outLength : -1;

    const distance = <usize>load<u16>(ip);
    ip += 2;
    let from = op - distance;
    if (from < PAGE) return -1;
    let match = token & 15;
    if (match < 15) {
      match += MIN_MATCH;
      if (distance >= 16) {
        v128.store(op, v128.load(from));
        store<u32>(op, load<u32>(from, 16), 16);
      } else {
        if (distance == 0) return -1;
        v128.store(op, i8x16.swizzle(v128.load(from), v128.load(REPEAT + (distance << 4))));
        store<u32>(op, load<u32>(op + 16 - <usize>load<u8>(STRIDE + distance)), 16);
      }
      op += match;
      if (op > outEnd) return -1;
    } else {
      let more: usize;
      do {
        if (ip >= end) return -1;
        more = <usize>load<u8>(ip++);
        match += more;
      } while (more == 255);
      match += MIN_MATCH;
      if (op > outEnd || match > outEnd - op) return -1;
      const stop = op + match;
      if (distance < 16) {
        if (distance == 0) return -1;
        v128.store(op, i8x16.swizzle(v128.load(from), v128.load(REPEAT + (distance << 4))));
        from = op + 16 - <usize>load<u8>(STRIDE + distance);
        op += 16;
      }
      if (op < stop) copySteps(op, from, stop);
      op = stop;
    }
    if (ip >= end) return -1;
  }
}

/** 32 bytes for the end of what is summed, below the constants. */
const REST: usize = 0x200;

// @ts-ignore: decorator
@inline
function mix(sum: u32, lane: u32): u32 {
  return rotl<u32>((sum ^ lane) * 0x9e3779b1, 13);
}

// @ts-ignore: decorator
@inline
function mixAll(sum: u32, lanes: v128): u32 {
  sum = mix(sum, i32x4.extract_lane(lanes, 0));
  sum = mix(sum, i32x4.extract_lane(lanes, 1));
  sum = mix(sum, i32x4.extract_lane(lanes, 2));
  return mix(sum, i32x4.extract_lane(lanes, 3));
}

/**
 * A checksum of `length` bytes: Fletcher's, over eight lanes of 32-bit words (the end is filled up with zeros), mixed
 * into one word. checksumPortable() in src/lz4.ts is the same.
 */
export function checksum(at: usize, length: usize): u32 {
  let a0 = i32x4.splat(<i32>length);
  let a1 = i32x4.splat(<i32>~length);
  let b0 = i32x4.splat(0);
  let b1 = b0;
  const end = at + (length & ~31);
  for (; at < end; at += 32) {
    a0 = i32x4.add(a0, v128.load(at));
    a1 = i32x4.add(a1, v128.load(at, 16));
    b0 = i32x4.add(b0, a0);
    b1 = i32x4.add(b1, a1);
  }
  const rest = length & 31;
  if (rest != 0) {
    memory.fill(REST, 0, 32);
    memory.copy(REST, at, rest);
    a0 = i32x4.add(a0, v128.load(REST));
    a1 = i32x4.add(a1, v128.load(REST, 16));
    b0 = i32x4.add(b0, a0);
    b1 = i32x4.add(b1, a1);
  }
  return mixAll(mixAll(mixAll(mixAll(0, a0), a1), b0), b1);
}
