/**
 * The demo's stream of page reads and writes: skewed like real ones, and identical for the same seed.
 *
 * The k-th most used of n pages is used in proportion to 1 / k^s (Zipf's law). Sampling is by rejection-inversion,
 * which needs no table and takes the same time for any number of pages.
 *
 * Sources: W. Hörmann, G. Derflinger, "Rejection-inversion to generate variates from monotone discrete distributions",
 * ACM TOMACS 6 (1996), 169–184. The generator is Chris Doty-Humphrey's sfc32 (PractRand).
 */

/** Numbers from 0 (included) to 1 (excluded), evenly spread, with 32 random bits each. */
export type Random = () => number

/** The same numbers for the same seed, an integer from 0 to 2^32-1. */
export function createRandom(seed: number): Random {
  let a = 0
  let b = 0
  let c = seed | 0
  let counter = 1
  const random = (): number => {
    const sum = (((a + b) | 0) + counter) | 0
    counter = (counter + 1) | 0
    a = b ^ (b >>> 9)
    b = (c + (c << 3)) | 0
    c = (((c << 21) | (c >>> 11)) + sum) | 0
    return (sum >>> 0) / 2 ** 32
  }
  // The words of the seed need some rounds until each bit has reached every word.
  for (let round = 0; round < 15; round++) random()
  return random
}

/**
 * Ranks from 0 to `count - 1`, rank k with a probability in proportion to 1 / (k + 1)^`exponent`.
 * `count` is a positive integer, `exponent` positive.
 */
export function createZipf(count: number, exponent: number, random: Random): () => number {
  if (!Number.isSafeInteger(count) || count < 1) throw new RangeError(`count must be a positive integer, got ${count}`)
  if (!(exponent > 0 && Number.isFinite(exponent))) throw new RangeError(`exponent must be positive, got ${exponent}`)
  // The integral of x^-s and its inverse, written so that they are exact near s = 1, where both have a removable
  // singularity.
  const integral = (x: number): number => {
    const log = Math.log(x)
    const t = (1 - exponent) * log
    return (Math.abs(t) < 1e-8 ? 1 + t / 2 : Math.expm1(t) / t) * log
  }
  const inverse = (y: number): number => {
    const t = Math.max(-1, y * (1 - exponent))
    return Math.exp((Math.abs(t) < 1e-8 ? 1 - t / 2 : Math.log1p(t) / t) * y)
  }
  const top = integral(1.5) - 1
  const bottom = integral(count + 0.5)
  // Every x this near to its integer is accepted without evaluating the curve.
  const near = 2 - inverse(integral(2.5) - 2 ** -exponent)
  return () => {
    for (;;) {
      const u = bottom + random() * (top - bottom)
      const x = inverse(u)
      const k = Math.min(count, Math.max(1, Math.round(x)))
      if (k - x <= near || u >= integral(k + 0.5) - k ** -exponent) return k - 1
    }
  }
}

/** A reference with this bit set is a write; the rest is the number of the page. */
export const writeBit: number = 2 ** 31

/** The parameters of a stream. */
export interface StreamOptions {
  /** Number of pages, at most 2^31. */
  readonly pages: number
  /** Number of references. */
  readonly references: number
  /** Exponent of Zipf's law. */
  readonly exponent: number
  /** The part of the references that are writes, 0 to 1. */
  readonly writes: number
  readonly seed: number
}

/**
 * The whole stream, made beforehand so that no machine's time includes it. The choice of the most used pages is random,
 * too.
 */
export function createStream({ pages, references, exponent, writes, seed }: StreamOptions): Uint32Array {
  const random = createRandom(seed)
  const pageOfRank = new Uint32Array(pages).map((_, rank) => rank)
  for (let last = pages - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1))
    const page = pageOfRank[last]!
    pageOfRank[last] = pageOfRank[other]!
    pageOfRank[other] = page
  }
  const rank = createZipf(pages, exponent, random)
  const stream = new Uint32Array(references)
  for (let at = 0; at < references; at++) {
    const page = pageOfRank[rank()]!
    stream[at] = random() < writes ? page + writeBit : page
  }
  return stream
}
