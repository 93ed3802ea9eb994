import fc from 'fast-check'
import { expect, test } from 'vitest'
import { Durations, durationBoundsNs, placeNames } from '../src/index.ts'

test('each is counted once, below its bound and not below the one before, and the sums are theirs', () => {
  const ns = fc.oneof(
    fc.nat(5000),
    fc.nat(2 ** 31 - 1),
    fc.maxSafeNat(),
    fc.constantFrom(1023, 1024, 2 ** 31, 2 ** 34 - 1, 2 ** 34),
  )
  fc.assert(
    fc.property(fc.array(fc.tuple(ns, fc.integer({ min: 1, max: 20 })), { maxLength: 50 }), (all) => {
      const durations = new Durations()
      const expected = new Array<number>(durationBoundsNs.length + 1).fill(0)
      for (const [value, weight] of all) {
        durations.add(value, weight)
        const bucket = durationBoundsNs.findIndex((bound) => value < bound)
        expected[bucket < 0 ? durationBoundsNs.length : bucket]! += weight
      }
      expect([...durations.below]).toEqual(expected)
      expect(durations.count).toBe(all.reduce((sum, [, weight]) => sum + weight, 0))
      expect(durations.sumNs).toBe(all.reduce((sum, [value, weight]) => sum + value * weight, 0))
      expect(durations.maxNs).toBe(Math.max(0, ...all.map(([value]) => value)))
    }),
  )
})

test('a share of them took at most that', () => {
  const durations = new Durations()
  expect(durations.shareNs(0.99)).toBe(0)
  for (let n = 0; n < 99; n++) durations.add(1500)
  durations.add(5_000_000)
  expect([durations.shareNs(0.5), durations.shareNs(0.99), durations.shareNs(1)]).toEqual([2048, 2048, 5_000_000])
  expect(durations.counters()).toEqual({
    count: 100,
    sum_ns: 5_148_500,
    max_ns: 5_000_000,
    p50_ns: 2048,
    p90_ns: 2048,
    p99_ns: 2048,
    below_2048_ns: 99,
    below_8388608_ns: 1,
  })
  durations.add(2 ** 40)
  expect(durations.counters()['below_any_ns']).toBe(1)
})

test('no name of a place stands for two', () => {
  const names = ['zcache', 'frontswap', 'frontswap', 'frontswap']
  expect(placeNames(names.map((name) => ({ name })))).toEqual(['zcache', 'frontswap', 'frontswap-2', 'frontswap-3'])
})
