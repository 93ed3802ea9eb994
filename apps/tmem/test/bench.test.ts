import { stripVTControlCharacters } from 'node:util'
import { describe, expect, test } from 'vitest'
import { z } from 'zod'
import {
  createBench,
  median,
  ratioRow,
  type Subject,
  type Suite,
  shownPart,
  skippedRow,
  valueRow,
} from '../src/bench/frame.ts'
import { runSuite } from '../src/bench/suites.ts'
import { Interrupted } from '../src/ending.ts'
import { tableOf } from '../src/terminal.ts'
import { silentTerminal } from './tmem.ts'

describe('measuring', () => {
  test('takes turns, warms up, and answers medians per operation', async () => {
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
    const bench = createBench(silentTerminal(), false, () => clock)
    const subjects = { a: subject('a', [500, 9, 2, 4]), b: subject('b', [500, 40, 10, 20]) }
    expect(await bench.measure('test', subjects, { operations: 1000, rounds: 3, warmup: 1 })).toEqual({
      a: 4000,
      b: 20_000,
    })
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
    const bench = createBench(silentTerminal(interruption.signal), true, () => clock)
    expect(await bench.measure('test', { wait }, { operations: 1 })).toEqual({ wait: 7e6 })
    interruption.abort()
    await expect(bench.measure('test', { wait }, { operations: 1 })).rejects.toBeInstanceOf(Interrupted)
  })

  test('each part that is done says what came of it, and one that fails only that it is over', async () => {
    const said: (readonly [string, string | undefined])[] = []
    const terminal = {
      ...silentTerminal(),
      progress: (label: string) => {
        let isDone = false
        return {
          at: () => undefined,
          done: (result?: string) => {
            isDone = true
            said.push([label, result])
          },
          end: () => {
            if (!isDone) said.push([label, undefined])
          },
        }
      },
    }
    let clock = 0
    const bench = createBench(terminal, true, () => clock)
    const run = (): void => {
      clock += 7
    }
    await bench.measure('two', { a: { run }, b: { run } }, { operations: 1000 })
    expect(await shownPart(bench, 'part', async () => [3, '3 of 4'])).toBe(3)
    const failure = new Error('no more')
    const failing = async (): Promise<never> => Promise.reject(failure)
    await expect(shownPart(bench, 'failing', failing)).rejects.toBe(failure)
    await expect(bench.measure('fails', { a: { run: failing } }, { operations: 1 })).rejects.toBe(failure)
    expect(said).toEqual([
      ['two', 'a 7000 ns, b 7000 ns'],
      ['part', '3 of 4'],
      ['failing', undefined],
      ['fails', undefined],
    ])
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

test('a table is as wide as what is seen of it', () => {
  const red = (text: string): string => `\u001b[31m${text}\u001b[39m`
  const lines = tableOf(
    ['what', 'ours'],
    [
      ['put', red('12')],
      ['a long name', '3456.7'],
    ],
  ).split('\n')
  expect(lines.map((line) => stripVTControlCharacters(line))).toEqual([
    'what           ours',
    'put              12',
    'a long name  3456.7',
  ])
  expect(lines[1]).toBe(`put              ${red('12')}`)
})

describe('a suite', () => {
  const suite: Suite = {
    name: 'sums',
    summary: 'adding up',
    run: async (bench) => {
      const ns = await bench.measure('sums', { ours: adding(3), theirs: adding(1) }, { operations: 1000 })
      const ratio = ratioRow('add', 'ns', ns.ours, 'theirs', ns.theirs, 1e9)
      return [ratio, valueRow('quick', 'yes or no', Number(bench.quick)), skippedRow('more', 'no time')]
    },
  }
  const adding = (each: number): Subject => ({
    run: (operations) => {
      let sum = 0
      for (let i = 0; i < operations * each; i++) sum += i
      expect(sum).toBeGreaterThan(0)
    },
  })
  const printed = async (options: { json?: true; quick?: true }): Promise<string> => {
    const text: string[] = []
    await runSuite(suite, options, { ...silentTerminal(), print: (part) => text.push(part) })
    return text.join('\n')
  }

  test('prints one JSON document', async () => {
    const figure = z.number().positive()
    const answer = z.strictObject({
      suite: z.literal('sums'),
      quick: z.literal(true),
      machine: z.strictObject({
        cpu: z.string(),
        cores: figure,
        memoryBytes: figure,
        platform: z.literal(process.platform),
        arch: z.literal(process.arch),
        kernel: z.string(),
        node: z.literal(process.version),
        v8: z.string(),
      }),
      rows: z.tuple([
        z.strictObject({
          name: z.literal('add'),
          unit: z.literal('ns'),
          value: figure,
          reference: z.literal('theirs'),
          reference_value: figure,
          ratio: figure,
          goal: z.literal(1e9),
          met: z.literal(true),
        }),
        z.strictObject({ name: z.literal('quick'), unit: z.literal('yes or no'), value: z.literal(1) }),
        z.strictObject({ name: z.literal('more'), skipped: z.literal('no time') }),
      ]),
    })
    const { rows } = answer.parse(JSON.parse(await printed({ json: true, quick: true })))
    expect(rows[0].value / rows[0].reference_value / rows[0].ratio).toBeCloseTo(1, 2)
  })

  test('prints a table', async () => {
    const text = stripVTControlCharacters(await printed({}))
    expect(text).toMatch(/^tmem bench sums: adding up$/m)
    expect(text).toMatch(/^add +\S+ ns +theirs \S+ +\d+\.\d\d +≤ 1000000000 +met$/m)
    expect(text).toMatch(/^more +skipped: no time$/m)
  })
})
