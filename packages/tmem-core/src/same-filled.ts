/**
 * Pages that repeat one word of four bytes: zeros, mostly. They are kept as that word.
 */
import { compareBytes } from './runtime.ts'

/** Whether a page repeats its first four bytes. */
export function isRepeated(bytes: Uint8Array, at: number, length: number): boolean {
  // Most pages differ in what the first cache line has, most others at one of these; only what does not is compared as
  // a whole with itself, a word further on.
  for (let i = 0; i < 12; i++) if (bytes[at + i] !== bytes[at + 4 + i]) return false
  const half = at + (length >>> 1)
  const end = at + length - 4
  for (let i = 0; i < 4; i++) {
    const byte = bytes[at + i]
    if (byte !== bytes[end + i] || byte !== bytes[half + i]) return false
  }
  return compareBytes.call(bytes, bytes, at, end, at + 4, at + length) === 0
}

export function wordAt(bytes: Uint8Array, at: number): number {
  return bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)
}

export function fillWord(bytes: Uint8Array, at: number, length: number, word: number): void {
  if (word === Math.imul(word & 0xff, 0x01010101)) {
    bytes.fill(word, at, at + length)
    return
  }
  for (let i = 0; i < 4; i++) bytes[at + i] = word >>> (8 * i)
  for (let done = 4; done < length; done *= 2) bytes.copyWithin(at + done, at, at + Math.min(done, length - done))
}
