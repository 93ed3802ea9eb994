import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { createRandom, createStream, createZipf, writeBit } from '../src/demo/workload.ts'

describe('random numbers', () => {
  test('are the same for the same seed, and others for another', () => {
    const take = (seed: number): number[] => Array.from({ length: 50 }, createRandom(seed))
    expect(take(7)).toEqual(take(7))
    expect(take(7)).not.toEqual(take(8))
    expect(take(0)).not.toEqual(take(2 ** 32 - 1))
    for (const number of take(0)) expect(number >= 0 && number < 1).toBe(true)
  })

  test('are spread evenly', () => {
    const random = createRandom(1)
    const buckets = new Array<number>(16).fill(0)
    for (let i = 0; i < 160_000; i++) buckets[Math.floor(random() * 16)]! += 1
    const chiSquared = buckets.reduce((sum, count) => sum + (count - 10_000) ** 2 / 10_000, 0)
    // 15 degrees of freedom: above 37.7 with a probability of 0.001. The seed is fixed, so the outcome is, too.
    expect(chiSquared).toBeLessThan(37.7)
  })
})

describe("Zipf's law", () => {
  test.each([0.5, 0.99, 1, 1.2, 2.5])('holds for exponent %f', (exponent) => {
    const count = 40
    const zipf = createZipf(count, exponent, createRandom(3))
    const seen = new Array<number>(count).fill(0)
    const draws = 200_000
    for (let i = 0; i < draws; i++) seen[zipf()]! += 1
    const weights = seen.map((_, rank) => (rank + 1) ** -exponent)
    const sum = weights.reduce((a, b) => a + b)
    const chiSquared = seen.reduce((total, observed, rank) => {
      const expected = (draws * weights[rank]!) / sum
      return total + (observed - expected) ** 2 / expected
    }, 0)
    // 39 degrees of freedom: above 72.1 with a probability of 0.001.
    expect(chiSquared).toBeLessThan(72.1)
  })

  test('never leaves its range', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 2 ** 31 }),
        fc.double({ min: 0.01, max: 20, noNaN: true }),
        fc.integer({ min: 0, max: 2 ** 32 - 1 }),
        (count, exponent, seed) => {
          const zipf = createZipf(count, exponent, createRandom(seed))
          for (let i = 0; i < 20; i++) {
            const rank = zipf()
            expect(Number.isInteger(rank) && rank >= 0 && rank < count, `${rank}`).toBe(true)
          }
        },
      ),
      { seed: 1 },
    )
  })

  test('refuses what it cannot do', () => {
    expect(() => createZipf(0, 1, createRandom(0))).toThrow(RangeError)
    expect(() => createZipf(2.5, 1, createRandom(0))).toThrow(RangeError)
    expect(() => createZipf(5, 0, createRandom(0))).toThrow(RangeError)
    expect(() => createZipf(5, Number.NaN, createRandom(0))).toThrow(RangeError)
  })
})

test('a stream has its share of writes, reaches all parts of the pages, and follows from its seed', () => {
  const options = { pages: 500, references: 20_000, exponent: 1.1, writes: 0.3, seed: 5 }
  const stream = createStream(options)
  expect(createStream(options)).toEqual(stream)
  expect(createStream({ ...options, seed: 6 })).not.toEqual(stream)
  const writes = stream.filter((reference) => reference >= writeBit).length
  expect(writes / stream.length).toBeCloseTo(0.3, 1)
  const uses = new Array<number>(500).fill(0)
  for (const reference of stream) uses[reference % writeBit]! += 1
  const ordered = uses.map((count, page) => ({ count, page })).sort((a, b) => b.count - a.count)
  expect(ordered[0]!.count / ordered[9]!.count).toBeGreaterThan(8)
  // Which pages are hot is shuffled: the ten hottest are not the first ten.
  expect(ordered.slice(0, 10).some(({ page }) => page > 50)).toBe(true)
})
