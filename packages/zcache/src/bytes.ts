/** What zcache does with bytes: copying and comparing without making views, the checksum, same-filled pages. */

/** The runtime's own memory functions that take offsets, so that no page operation makes a view. */
const copy: (
  this: Uint8Array,
  target: Uint8Array,
  targetStart: number,
  sourceStart: number,
  sourceEnd: number,
) => number = Buffer.prototype.copy
const compare: (
  this: Uint8Array,
  target: Uint8Array,
  targetStart: number,
  targetEnd: number,
  sourceStart: number,
  sourceEnd: number,
) => number = Buffer.prototype.compare

/** Copies `length` bytes. */
export function copyBytes(
  source: Uint8Array,
  sourceAt: number,
  length: number,
  target: Uint8Array,
  targetAt: number,
): void {
  copy.call(source, target, targetAt, sourceAt, sourceAt + length)
}

/** Whether the bytes repeat their first eight. `length` is a multiple of eight. */
export function isSameFilled(bytes: Uint8Array, at: number, length: number): boolean {
  // Most pages differ at one of these; only what does not is compared as a whole with itself, a word further on.
  const half = at + (length >>> 1)
  const end = at + length - 8
  for (let i = 0; i < 8; i++) if (bytes[at + i] !== bytes[end + i] || bytes[at + i] !== bytes[half + i]) return false
  return compare.call(bytes, bytes, at, end, at + 8, at + length) === 0
}

/** The four bytes from `at` as a little-endian word. */
export function wordAt(bytes: Uint8Array, at: number): number {
  return bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)
}

/** Fills a page with a repeated 8-byte word, given as two little-endian ones. */
export function fillSame(bytes: Uint8Array, at: number, length: number, low: number, high: number): void {
  if (low === high && low === Math.imul(low & 0xff, 0x01010101)) {
    bytes.fill(low, at, at + length)
    return
  }
  for (let i = 0; i < 4; i++) {
    bytes[at + i] = low >>> (8 * i)
    bytes[at + 4 + i] = high >>> (8 * i)
  }
  for (let done = 8; done < length; done *= 2) bytes.copyWithin(at + done, at, at + done)
}

/**
 * Checksum of compressed bytes: four lanes of xor and multiply over whole words (the last one padded with zeros by whoever
 * stored them), with length and codec mixed in. Each step is a bijection of its lane, so that no damage within one word
 * goes unseen.
 */
export function checksum(words: Int32Array, at: number, bytes: number, codec: number): number {
  // All four start as 32-bit integers: a start above 2^31 makes the runtime calculate in floating point, at a third of the speed.
  let a = bytes | (codec << 24)
  let b = 0x85ebca6b | 0
  let c = 0xc2b2ae35 | 0
  let d = 0x27d4eb2f
  const end = at + ((bytes + 3) >>> 2)
  const whole = at + ((end - at) & ~3)
  let i = at
  for (; i < whole; i += 4) {
    a = Math.imul(a ^ words[i]!, 0x9e3779b1)
    b = Math.imul(b ^ words[i + 1]!, 0x85ebca77)
    c = Math.imul(c ^ words[i + 2]!, 0xc2b2ae3d)
    d = Math.imul(d ^ words[i + 3]!, 0x27d4eb2f)
  }
  for (; i < end; i++) a = Math.imul(a ^ words[i]!, 0x9e3779b1)
  // Multiplication carries upwards only: fold the upper bits down and turn the lanes against each other.
  a ^= a >>> 15
  b ^= b >>> 13
  c ^= c >>> 16
  d ^= d >>> 14
  return a ^ ((b << 8) | (b >>> 24)) ^ ((c << 16) | (c >>> 16)) ^ ((d << 24) | (d >>> 8))
}
