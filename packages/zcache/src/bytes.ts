/** What zcache does with bytes: copying and comparing without making views, same-filled pages. */

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
  // Most pages differ in their first cache line, most others at one of these; only what does not is compared as a whole with
  // itself, a word further on.
  for (let i = 0; i < 8; i++) if (bytes[at + i] !== bytes[at + 8 + i]) return false
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
