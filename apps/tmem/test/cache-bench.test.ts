import { expect, test } from 'vitest'
import { Records, randomOf, zipfOf } from '../src/bench/cache-records.ts'
import type { MeasuredRow, Row } from '../src/bench/frame.ts'
import { strangeLines, tmem } from './tmem.ts'

test('records are JSON of 100 to 2,000 bytes, each with its number, and the same again', () => {
  const records = new Records()
  const again = new Records()
  for (let n = 0; n < 2000; n++) {
    const text = JSON.stringify(records.at(n))
    expect(text.length).toBeGreaterThanOrEqual(100)
    expect(text.length).toBeLessThanOrEqual(2000)
    expect(text).toBe(JSON.stringify(again.at(n)))
    expect(records.at(n).id).toBe(n)
  }
})

test('few records are asked for often', () => {
  const records = 100_000
  const next = zipfOf(records, randomOf(1))
  const asked = Array.from({ length: 100_000 }, () => next())
  const share = (ranks: number): number => {
    const most = new Set(Array.from({ length: ranks }, (_, rank) => (rank * 7919 + 13) % records))
    return asked.filter((n) => most.has(n)).length / asked.length
  }
  // The integral of a Zipf distribution of exponent 0.9: (ranks ** 0.1 - 1) / (records ** 0.1 - 1).
  expect(share(100)).toBeCloseTo(0.27, 1)
  expect(share(10_000)).toBeCloseTo(0.7, 1)
})

test('tmem bench cache --quick --json', { timeout: 600_000 }, async () => {
  const { code, stdout, stderr } = await tmem(['bench', 'cache', '--quick', '--json'])
  expect({ code, notes: strangeLines(stderr) }).toEqual({ code: 0, notes: [] })
  const { rows } = JSON.parse(stdout) as { rows: readonly Row[] }
  expect(rows.map(({ name }) => name)).toEqual([
    'get-20k',
    'set-20k',
    'get-20k-redis',
    'resident',
    'heap',
    'misses-zipf',
    'misses-scans',
    'stall-longest',
    'stall-p99.9',
    'stall-longest-empty',
    'stall-p99.9-empty',
    'fetch-1000-callers',
    'two-threads',
    'four-threads-resident',
    'keyv-get',
    'keyv-set',
  ])
  const row = (name: string): MeasuredRow => rows.find((one) => one.name === name) as MeasuredRow
  // Counts are no times: they come out alike on every machine.
  expect(row('misses-zipf').ratio).toBeLessThan(0.8)
  expect(row('misses-scans').ratio).toBeLessThan(0.85)
  expect(row('fetch-1000-callers')).toMatchObject({ value: 1, met: true })
})
