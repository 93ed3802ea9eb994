/** Pages for tests: made from small numbers only, so that a failure can be repeated. */
import { compareBytes } from '@tmem/core/runtime'

/** A failed expectation of the suite. The message says what was expected of which page. */
export class ConformanceError extends Error {
  override readonly name = 'ConformanceError'
}

/** Throws `ConformanceError` with this message. */
export function fail(message: string): never {
  throw new ConformanceError(message)
}

/** Throws `ConformanceError` unless `condition` holds. */
export function expect(condition: boolean, message: string): asserts condition {
  if (!condition) fail(message)
}

/** What a page looks like: all zero, one word repeated, easy to compress, impossible to compress. */
export type PageKind = 'zero' | 'word' | 'text' | 'noise'

/**
 * A page of `size` bytes. Pages of kind `text` and `noise` with different seeds differ in each of their 4 KiB parts.
 */
export function makePage(kind: PageKind, seed: number, size: number): Uint8Array {
  const page = new Uint8Array(size)
  const words = new Uint32Array(page.buffer)
  if (kind === 'word') words.fill(Math.imul(seed, 0x9e3779b1) | 1)
  if (kind === 'noise') {
    let random = Math.imul(seed, 0x9e3779b1) | 1
    for (let i = 0; i < words.length; i++) {
      random ^= random << 13
      random ^= random >>> 17
      random ^= random << 5
      words[i] = random
    }
  }
  if (kind === 'text') {
    const line = new TextEncoder().encode(`page ${seed} `.padEnd(64, 'abcdefgh'))
    for (let at = 0; at < 256; at += 64) page.set(line, at)
    for (let filled = 256; filled < size; filled *= 2) page.copyWithin(filled, 0, Math.min(filled, size - filled))
    // A stamp in every 256 bytes keeps parts apart.
    for (let at = 0; at < words.length; at += 64) words[at] = Math.imul(seed, 65_537) + at
  }
  return page
}

/** Where two pages differ first, or -1. */
export function firstDifference(a: Uint8Array, b: Uint8Array): number {
  if (a.length === b.length && compareBytes.call(a, b, 0, b.length, 0, a.length) === 0) return -1
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return i
  return a.length
}

/** Throws unless the bytes are the same. */
export function expectSame(actual: Uint8Array, expected: Uint8Array, what: string): void {
  const at = firstDifference(actual, expected)
  if (at >= 0) fail(`${what}: byte ${at} of ${expected.length} is ${actual[at]}, not ${expected[at]}`)
}
