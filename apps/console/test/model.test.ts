/** What the page works out, of the statistics of real devices. */
import { randomFillSync } from 'node:crypto'
import { slowMemory } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { ramzswap } from '@tmem/ramzswap'
import { zcache } from '@tmem/zcache'
import { describe, expect, onTestFinished, test } from 'vitest'
import type { ConsoleDevice, ConsoleState } from '../src/state.ts'
import {
  ageText,
  bytesOf,
  bytesText,
  flowsOf,
  latenciesOf,
  nanosecondsText,
  rateText,
  swapUseOf,
  totalsOf,
} from '../src/web/model.ts'

const page = Buffer.alloc(4096)

function device() {
  const opened = ramzswap({
    name: '<b>a</b>',
    sizeBytes: 8 * 2 ** 20,
    stack: [zcache({ limitBytes: 512 * 1024 }), slowMemory({ sizeBytes: 16 * 2 ** 20 })],
    clock: () => 0,
  })
  onTestFinished(() => opened.close())
  return {
    write: async (from: number, to: number) => {
      for (let slot = from; slot < to; slot++) {
        page.fill(`${slot} is a page of text, `)
        if (slot % 2 === 0) randomFillSync(page)
        await opened.write(slot * 4096, page)
      }
    },
    read: async (slot: number) => opened.read(slot * 4096, page),
    discard: async (slot: number) => opened.discard(slot * 4096, 4096),
    state: (atMs: number, run = 'one'): ConsoleState => ({
      atMs,
      server: { pid: 1, run, stack: '', nbd: [], fuse: null, writable: false },
      devices: [
        {
          name: opened.name,
          stats: opened.stats(),
          knobs: {},
          users: { clients: 0, opens: 0 },
          swap: { sizeBytes: 8 * 2 ** 20, usedBytes: 90 * 4096, priority: 100 },
          ages: opened.ages() ?? null,
        },
      ],
      servers: [],
      events: [],
    }),
  }
}

const only = ({ devices: [one] }: ConsoleState): ConsoleDevice => one!

test('bytes add up, in each place and in all', async () => {
  const { write, state } = device()
  await write(0, 600)
  await write(600, 610)
  const found = only(state(0))
  const places = bytesOf(found)
  expect(places.map(({ name }) => name)).toEqual(['directory', 'zcache', 'slowMemory'])
  for (const { blocks, metadata, waste, used } of places) {
    expect(blocks + metadata + waste).toBe(used)
    expect(Math.min(blocks, metadata, waste)).toBeGreaterThanOrEqual(0)
  }
  const totals = totalsOf(found)
  expect(places.reduce((sum, { pages }) => sum + pages, 0)).toBe(totals.pages - totals.lost)
  expect(totals.pages).toBe(610)
  expect(places[1]!.used).toBe(found.stats.counters['mem_used_total'])
  expect(places[1]!.waste).toBeGreaterThan(0)
  expect(places[2]!.pages).toBeGreaterThan(0)
})

test('rates are what was counted between two states of one run', async () => {
  const { write, read, discard, state } = device()
  const first = state(1000)
  await write(0, 600)
  await read(3)
  await discard(0)
  const second = state(3000)
  const flows = flowsOf('<b>a</b>', first, second)!
  expect(flows).toMatchObject({ writes: 300, reads: 0.5, freed: 0.5, refused: [] })
  const [top, below] = flows.places
  expect(top!.put + below!.put).toBeCloseTo(300, 5)
  expect(below!.sunk).toBeCloseTo(top!.down, 5)
  expect(flowsOf('<b>a</b>', undefined, second)).toBeUndefined()
  expect(flowsOf('<b>a</b>', state(1000, 'another run'), second)).toBeUndefined()
  expect(flowsOf('b', first, second)).toBeUndefined()
  // Counters that went back say nothing.
  expect(flowsOf('<b>a</b>', second, { ...first, atMs: 5000 })).toMatchObject({ writes: 0, reads: 0 })
})

test("the kernel's swap against ours", async () => {
  const { write, state } = device()
  await write(0, 100)
  expect(swapUseOf(only(state(0)))).toEqual({ kernel: 90, ours: 100, stale: 10, unwritten: 0 })
  expect(swapUseOf({ ...only(state(0)), swap: null })).toBeUndefined()
})

test('ages of pages by where they rest', async () => {
  const { write, state } = device()
  await write(0, 50)
  const { ages } = only(state(0))
  expect(ages).toMatchObject({ seen: 50, bounds: [1, 10, 60, 600, 3600, 86_400] })
  expect(ages!.places.map(({ name }) => name)).toEqual(['directory', 'zcache', 'slowMemory'])
  expect(ages!.places[1]!.pages).toEqual([50, 0, 0, 0, 0, 0, 0])
})

test('latencies by operation and place', () => {
  const section = (name: string, children: readonly object[], counters = {}) => ({ name, counters, children })
  const times = { count: 7, p50_ns: 1000, p90_ns: 2000, p99_ns: 4000, max_ns: 9000 }
  const stats = section('a', [section('latency', [section('put', [section('zcache', [], times)]), section('nbd', [])])])
  const found = { stats } as unknown as ConsoleDevice
  expect(latenciesOf(found)).toEqual([{ name: 'put zcache', count: 7, percentiles: [1000, 2000, 4000, 9000] }])
})

describe('figures for people', () => {
  test.each([
    [bytesText(0), '0 B'],
    [bytesText(1023), '1023 B'],
    [bytesText(1024), '1.0 KiB'],
    [bytesText(120 * 2 ** 20), '120 MiB'],
    [rateText(0), '0'],
    [rateText(0.5), '0.5'],
    [rateText(12_345.6), '12,346'],
    [ageText(10), '10 s'],
    [ageText(600), '10 min'],
    [ageText(86_400), '1 d'],
    [nanosecondsText(999), '999 ns'],
    [nanosecondsText(12_345), '12.3 µs'],
    [nanosecondsText(2e9), '2.0 s'],
  ])('%s', (text, expected) => expect(text).toBe(expected))
})

test('plain memory has its figures, too', () => {
  const opened = ramzswap({ name: 'm', sizeBytes: 2 ** 20, stack: [memory({ limitBytes: 4 * 2 ** 20 })] })
  onTestFinished(() => opened.close())
  void opened.write(0, page)
  const users = { clients: 0, opens: 0 }
  const [, place] = bytesOf({ name: 'm', stats: opened.stats(), knobs: {}, users, swap: null, ages: null })
  expect(place).toMatchObject({ name: 'memory', kind: 'memory' })
  expect(place!.blocks + place!.metadata + place!.waste).toBe(place!.used)
})
