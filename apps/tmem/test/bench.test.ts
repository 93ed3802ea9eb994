import { describe, expect, test } from 'vitest'
import { createBench, median, ratioRow, type Subject, skippedRow, valueRow } from '../src/bench/frame.ts'
import { Interrupted } from '../src/ending.ts'
import type { Terminal } from '../src/terminal.ts'

/** A terminal that nobody reads. */
const silent = (signal: AbortSignal = new AbortController().signal): Terminal => ({
  signal,
  print: () => undefined,
  note: () => undefined,
  progress: () => ({ at: () => undefined, end: () => undefined }),
})

describe('measuring', () => {
  test('takes turns, warms up for a round, and answers medians per operation', async () => {
    const calls: string[] = []
    let clock = 0
    // Milliseconds by round: the first does not count, of the others the middle one does.
    const subject = (name: string, milliseconds: number[]): Subject => ({
      prepare: () => {
        clock += 1000
      },
      run: (operations) => {
        calls.push(`${name}${operations}`)
        clock += milliseconds.shift()!
      },
    })
    const bench = createBench(silent(), false, () => clock)
    const subjects = { a: subject('a', [500, 9, 2, 4]), b: subject('b', [500, 40, 10, 20]) }
    expect(await bench.measure('test', subjects, { operations: 1000, rounds: 3 })).toEqual({ a: 4000, b: 20_000 })
    expect(calls).toEqual(['a1000', 'b1000', 'b1000', 'a1000', 'a1000', 'b1000', 'b1000', 'a1000'])
  })

  test('waits for subjects that wait, and ends when interrupted', async () => {
    const interruption = new AbortController()
    let clock = 0
    const wait: Subject = {
      run: async () => {
        await Promise.resolve()
        clock += 7
      },
    }
    const bench = createBench(silent(interruption.signal), true, () => clock)
    expect(await bench.measure('test', { wait }, { operations: 1 })).toEqual({ wait: 7e6 })
    interruption.abort()
    await expect(bench.measure('test', { wait }, { operations: 1 })).rejects.toBeInstanceOf(Interrupted)
  })

  test('the median is the middle', () => {
    expect(median([3])).toBe(3)
    expect(median([9, 1, 5])).toBe(5)
    expect(median([10, 9, 1, 2])).toBe(5.5)
    expect(() => median([])).toThrow(RangeError)
  })
})

describe('rows', () => {
  test('compare with a reference, or stand for themselves', () => {
    expect(ratioRow('put', 'ns/page', 312.3456, 'copy', 260, 1.4)).toEqual({
      name: 'put',
      unit: 'ns/page',
      value: 312.3,
      reference: 'copy',
      reference_value: 260,
      ratio: 1.201,
      goal: 1.4,
      met: true,
    })
    // Whether a goal is met is decided before rounding.
    expect(ratioRow('put', 'ns/page', 1.40001, 'copy', 1, 1.4)).toMatchObject({ ratio: 1.4, met: false })
    expect(ratioRow('put', 'ns/page', 2, 'copy', 1)).not.toHaveProperty('met')
    expect(valueRow('metadata', 'bytes/page', 24, 32)).toEqual({
      name: 'metadata',
      unit: 'bytes/page',
      value: 24,
      goal: 32,
      met: true,
    })
    expect(valueRow('pause', 'us', 5)).toEqual({ name: 'pause', unit: 'us', value: 5 })
    expect(skippedRow('memcpy', 'no compiler')).toEqual({ name: 'memcpy', skipped: 'no compiler' })
  })
})
