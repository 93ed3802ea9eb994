/**
 * Pages that tell who they are. Each version that is ever put has a number; the number decides every byte of its page,
 * so that what comes back can be compared as a whole, and named when it is another one.
 *
 * Kinds of content, chosen by weight for each history: one word repeated; a stamp and zeros; text that shrinks to a
 * half; bytes that do not shrink; and a random part followed by zeros, which shrinks to any size.
 */
import { Random, scatter } from './random.ts'

/** Versions of one history at most. */
const maxVersions = 1 << 20
/** Longest page, in bytes. */
const longest = 128 * 1024
const stockBytes = 2 * longest

/** Where random bytes and text come from: the same in every run. */
function stock(fill: (random: Random, bytes: Uint8Array) => void): Uint8Array {
  const bytes = new Uint8Array(stockBytes)
  fill(new Random(1, 2), bytes)
  return bytes
}

/** Kinds; 1 is a stamp and zeros. */
const SAME = 0
const TEXT = 2
const NOISE = 3
const MIXED = 4
const kinds = 5

export class Pages {
  readonly #noise: Uint8Array = stock((random, bytes) => {
    for (let n = 0; n < bytes.length; n++) bytes[n] = random.word()
  })
  readonly #text: Uint8Array = stock((random, bytes) => {
    for (let at = 0; at < bytes.length; ) {
      const word = random.below(512)
      for (let n = 2 + (word % 7); n > 0 && at < bytes.length; n--) bytes[at++] = 97 + (scatter(word * 8 + n) % 26)
      if (at < bytes.length) bytes[at++] = 32
    }
  })
  readonly #kinds: Uint8Array = new Uint8Array(maxVersions)
  readonly #expected: Uint8Array = new Uint8Array(longest)
  /** Versions so far; 0 means no page. */
  count = 0
  #weights: readonly number[] = []

  /** Begins a history: contents are chosen by it. */
  begin(random: Random): void {
    this.count = 0
    this.#weights = random.swarm(kinds)
    if (this.#weights.every((weight) => weight === 0)) this.#weights = [0, 0, 1, 0, 0]
  }

  /** A new version. */
  next(random: Random): number {
    if (++this.count === maxVersions) throw new RangeError(`a history has at most ${maxVersions} pages`)
    this.#kinds[this.count] = random.weighted(this.#weights)
    return this.count
  }

  /** Fills `into[at]` with the page of a version. */
  fill(version: number, into: Uint8Array, at: number, length: number): void {
    const kind = this.#kinds[version]!
    if (kind === SAME) {
      into.fill(0, at, at + 4)
      write(into, at, version)
      for (let done = 4; done < length; done *= 2) into.copyWithin(at + done, at, at + Math.min(done, length - done))
      return
    }
    const scattered = scatter(version)
    const from = scattered % (stockBytes - length)
    if (kind === TEXT) copy.call(this.#text, into, at, from, from + length)
    else {
      const noise = kind === NOISE ? length : kind === MIXED ? (scattered >>> 12) % length : 0
      copy.call(this.#noise, into, at, from, from + noise)
      into.fill(0, at + noise, at + length)
    }
    // Each part of a large page is told apart from the others, too: it is where it is.
    for (let part = 0; part < length; part += 4096) {
      write(into, at + part, version)
      write(into, at + part + 4092, version ^ part)
    }
  }

  /** Whose page this is: a version, or 0 when no page of this history looks like that. */
  identify(bytes: Uint8Array, at: number, length: number): number {
    const version = bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)
    if (version < 1 || version > this.count) return 0
    this.fill(version, this.#expected, 0, length)
    return compare.call(bytes, this.#expected, 0, length, at, at + length) === 0 ? version : 0
  }
}

function write(into: Uint8Array, at: number, word: number): void {
  into[at] = word
  into[at + 1] = word >>> 8
  into[at + 2] = word >>> 16
  into[at + 3] = word >>> 24
}

/** The runtime's own functions with offsets, which make no views. */
const copy: (this: Uint8Array, target: Uint8Array, to: number, from: number, end: number) => number =
  Buffer.prototype.copy
const compare: (
  this: Uint8Array,
  target: Uint8Array,
  targetStart: number,
  targetEnd: number,
  sourceStart: number,
  sourceEnd: number,
) => number = Buffer.prototype.compare
