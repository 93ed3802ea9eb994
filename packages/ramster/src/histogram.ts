/** How long things took, counted by powers of two: plain integers that can be added up. */

/**
 * Upper bound of the first bucket, in microseconds, and buckets with a bound: up to 4.2 s. What took longer has one.
 */
const firstBoundUs = 64
const bounds = 17

export class Histogram {
  readonly #counts: Float64Array = new Float64Array(bounds + 1)
  #totalUs = 0

  /** Counts something that began at `since`, by `performance.now()`. */
  since(since: number): void {
    const us = Math.max(0, Math.round((performance.now() - since) * 1000))
    this.#totalUs += us
    // 0 for up to the first bound, and one more for each doubling.
    const bucket = 32 - Math.clz32(Math.floor(Math.max(0, us - 1) / firstBoundUs))
    this.#counts[Math.min(bounds, bucket)]!++
  }

  /**
   * How many took at most so many microseconds, and more than the bound before (`le_64_us`, `le_128_us` …
   * `le_4194304_us`, `longer`), how many there were, and what they took together.
   */
  counters(): Record<string, number> {
    const counters: Record<string, number> = {}
    let count = 0
    for (const [bucket, times] of this.#counts.entries()) {
      counters[bucket < bounds ? `le_${firstBoundUs * 2 ** bucket}_us` : 'longer'] = times
      count += times
    }
    return { count, total_us: this.#totalUs, ...counters }
  }
}
