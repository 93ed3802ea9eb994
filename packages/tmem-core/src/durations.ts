/**
 * How long operations of one kind took: a histogram by powers of two, for who counts each of them.
 *
 * Invariants: `below[n]` are the durations that are less than `2 ** (firstBit + n)` nanoseconds and not less than half
 * of that (the first one: all that are less; the last one: all the rest); `count` is their sum. Counting allocates
 * nothing.
 */

/** The first bucket has what took less than 1,024 ns, the last one what took 17 seconds or more. */
const firstBit = 10
const lastBit = 34
const bucketCount = lastBit - firstBit + 2

/** Bounds of the buckets but the last, in nanoseconds. */
export const durationBoundsNs: readonly number[] = Array.from(
  { length: bucketCount - 1 },
  (_, n) => 2 ** (firstBit + n),
)

export class Durations {
  /** How many there are, their sum and the largest of them. */
  count = 0
  sumNs = 0
  maxNs = 0
  readonly below: Float64Array = new Float64Array(bucketCount)

  /** Counts one of `ns` nanoseconds, for `weight` of its kind: where only some are looked at. */
  add(ns: number, weight = 1): void {
    this.count += weight
    this.sumNs += ns * weight
    if (ns > this.maxNs) this.maxNs = ns
    this.below[bucketOf(ns)]! += weight
  }

  /**
   * What that share of them (0 to 1) took at most, in nanoseconds: a bound of a bucket, or the largest; 0: there are
   * none.
   */
  shareNs(share: number): number {
    const rank = Math.ceil(this.count * share)
    let seen = 0
    for (const [bucket, count] of this.below.entries()) {
      seen += count
      if (count > 0 && seen >= rank) return Math.min(this.maxNs, durationBoundsNs[bucket] ?? this.maxNs)
    }
    return 0
  }

  /**
   * Its counters: `count`, `sum_ns`, `max_ns`, `p50_ns`, `p90_ns`, `p99_ns`, and of each bucket that has any
   * `below_N_ns`.
   */
  counters(): Record<string, number> {
    const counters: Record<string, number> = {
      count: this.count,
      sum_ns: Math.round(this.sumNs),
      max_ns: Math.round(this.maxNs),
      p50_ns: Math.round(this.shareNs(0.5)),
      p90_ns: Math.round(this.shareNs(0.9)),
      p99_ns: Math.round(this.shareNs(0.99)),
    }
    for (const [bucket, count] of this.below.entries())
      if (count > 0) counters[`below_${durationBoundsNs[bucket] ?? 'any'}_ns`] = count
    return counters
  }
}

function bucketOf(ns: number): number {
  // Four seconds are 32 bits; what takes longer is too rare for this to cost anything.
  const bits = ns < 2 ** 31 ? 32 - Math.clz32(ns) : Math.floor(Math.log2(ns)) + 1
  return Math.min(bucketCount - 1, Math.max(0, bits - firstBit))
}
