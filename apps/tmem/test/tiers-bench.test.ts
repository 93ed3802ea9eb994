/**
 * What `tmem bench tiers` compares with: its fixed traces, its simulated orders of pages, its log; and a quick run
 * through the program.
 */
import { readdirSync } from 'node:fs'
import { basePageSize, compose, GetOutcome, PageBatch, type Pool, PutOutcome } from '@tmem/core'
import { memory } from '@tmem/memory'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { z } from 'zod'
import { requires } from '../../../tools/requires.ts'
import { createBench, type MeasuredRow } from '../src/bench/frame.ts'
import { zswapRows } from '../src/bench/guest.ts'
import { tiers } from '../src/bench/tiers.ts'
import { type Calls, GreedyLog, Lru, RecordedCalls, watched } from '../src/bench/tiers-reference.ts'
import { digestOf, traceNames, traceOf } from '../src/bench/traces.ts'
import { createRandom, writeBit } from '../src/demo/workload.ts'
import { Interrupted } from '../src/ending.ts'
import { silentTerminal, strangeLines, temporaryDirectory, tmem } from './tmem.ts'

describe('the traces', () => {
  // Written down a second time, so that a trace cannot be changed together with its digest without anybody noticing.
  test.each([
    ['hot-set', 'c8762e8d682fabb8', 515_536, '916a2b23f5a28f96'],
    ['zipf-writes', 'e12638001af244dd', 765_536, 'b7b6a790d66cb8f2'],
    ['zipf', '1b0faea869baf03b', 765_536, '21f625c402682350'],
    ['scan', '032f63c65c8342e5', 565_536, '7182bad6fd24e811'],
    ['loop', 'e4c46d48572d3abc', 465_536, '9795765e81ee2a7b'],
  ] as const)('%s is what it was', (name, digest, length, quickDigest) => {
    const full = traceOf(name, false)
    expect({ digest: digestOf(full.references), length: full.references.length }).toEqual({ digest, length })
    expect(digestOf(traceOf(name, true).references)).toBe(quickDigest)
  })

  test('one reference that differs is noticed', () => {
    const references = Uint32Array.from([1, 2, 3 + writeBit])
    expect(digestOf(references)).toBe('54222420c0321a57')
    references[1] = 4
    expect(digestOf(references)).not.toBe('54222420c0321a57')
  })

  test.each(traceNames)('%s writes all pages first, and its parts follow without gaps', (name) => {
    for (const quick of [true, false]) {
      const { pages, frames, references, parts } = traceOf(name, quick)
      expect({ pages, frames }).toEqual(quick ? { pages: 4096, frames: 512 } : { pages: 65_536, frames: 8192 })
      expect(references.subarray(0, pages).every((reference, page) => reference === page + writeBit)).toBe(true)
      let at = pages
      for (const { from, to } of parts) {
        expect(from).toBe(at)
        expect(to).toBeGreaterThan(from)
        at = to
      }
      expect(at).toBe(references.length)
      expect(references.every((reference) => reference % writeBit < pages)).toBe(true)
    }
  })

  const counted = (name: Parameters<typeof traceOf>[0], part: number) => {
    const { references, parts } = traceOf(name, false)
    const pages = new Map<number, number>()
    let writes = 0
    const { from, to } = parts[part]!
    for (const reference of references.subarray(from, to)) {
      if (reference >= writeBit) writes++
      const page = reference % writeBit
      pages.set(page, (pages.get(page) ?? 0) + 1)
    }
    return { writes: writes / (to - from), pages, count: to - from }
  }

  test('have the shares of writes and the pages that they are named after', () => {
    expect(counted('hot-set', 0)).toMatchObject({ writes: 0 })
    expect(counted('hot-set', 2).writes).toBeCloseTo(0.3, 2)
    expect(Math.min(...counted('hot-set', 0).pages.keys())).toBe(65_536 - 16_384)
    expect(Math.max(...counted('hot-set', 1).pages.keys())).toBe(16_383)
    expect(counted('zipf-writes', 1).writes).toBeCloseTo(0.1, 2)
    expect(counted('zipf', 1).writes).toBe(0)
    expect(counted('scan', 1).writes).toBeCloseTo(0.06, 2)
    const { pages, count } = counted('zipf', 1)
    // The sum of 1/k up to n is ln n + 0.5772: the share of the page that is used most, and of the first hundred.
    const most = [...pages.values()].sort((a, b) => b - a)
    const all = Math.log(65_536) + 0.5772
    expect(most[0]! / count).toBeCloseTo(1 / all, 2)
    expect(most.slice(0, 100).reduce((sum, one) => sum + one) / count).toBeCloseTo((Math.log(100) + 0.5772) / all, 2)
    expect(counted('loop', 0).pages.size).toBe(45_000)
  })
})

type Call = readonly ['put', page: number, bytes: number] | readonly ['get' | 'release' | 'flush', page: number]

const pagesUpTo = 5
const calls = (sizes: fc.Arbitrary<number>, maxLength: number): fc.Arbitrary<Call[]> => {
  const page = fc.nat(pagesUpTo - 1)
  const put = fc.tuple(fc.constant('put' as const), page, sizes)
  const get = fc.tuple(fc.constant('get' as const), page)
  const give = fc.tuple(fc.constantFrom('release' as const, 'flush' as const), page)
  return fc.array(
    fc.oneof({ weight: 4, arbitrary: put }, { weight: 6, arbitrary: get }, { weight: 1, arbitrary: give }),
    { maxLength },
  )
}

function make(to: Calls, all: readonly Call[]): void {
  for (const [kind, page, bytes] of all) {
    if (kind === 'put') to.put(page, bytes!)
    else to[kind](page)
  }
}

const minOf = (all: readonly Call[], limit: number): number => {
  const recorded = new RecordedCalls()
  make(recorded, all)
  return recorded.minReads(limit)
}

const lruOf = (all: readonly Call[], limit: number): number => {
  const lru = new Lru(limit)
  make(lru, all)
  return lru.reads
}

/** An LRU without anything clever: a list of what is in memory, the last used first. */
function plainLru(all: readonly Call[], limit: number): number {
  let memoryPages: [page: number, bytes: number][] = []
  const disk = new Map<number, number>()
  let reads = 0
  for (const [kind, page, bytes] of all) {
    const here = memoryPages.find(([one]) => one === page)
    memoryPages = memoryPages.filter(([one]) => one !== page)
    if (kind === 'put') memoryPages.unshift([page, bytes!])
    else if (kind === 'get' && here !== undefined) memoryPages.unshift(here)
    else if (kind === 'get' && disk.has(page)) {
      reads++
      memoryPages.unshift([page, disk.get(page)!])
    }
    if (kind === 'release' && here !== undefined) disk.set(page, here[1])
    else if (kind !== 'release') disk.delete(page)
    let sum = memoryPages.reduce((total, [, size]) => total + size, 0)
    while (sum > limit) {
      const [oldest, size] = memoryPages.pop()!
      sum -= size
      disk.set(oldest, size)
    }
  }
  return reads
}

/** The fewest reads that any choice of what stays in memory comes to: all choices are tried. */
function fewestReads(all: readonly Call[], limit: number): number {
  /** Reads by what is in memory, a bit for each page. */
  let states = new Map<number, number>([[0, 0]])
  const sizes = new Map<number, number>()
  const sum = (set: number): number =>
    [...sizes].reduce((total, [page, bytes]) => total + ((set >> page) & 1) * bytes, 0)
  for (const [kind, page, bytes] of all) {
    const bit = 1 << page
    const known = sizes.has(page)
    if (kind === 'put') sizes.set(page, bytes!)
    if (kind === 'flush') sizes.delete(page)
    const next = new Map<number, number>()
    for (const [set, reads] of states) {
      const cost = reads + (kind === 'get' && known && (set & bit) === 0 ? 1 : 0)
      const largest = kind === 'put' || (kind === 'get' && known) ? set | bit : set & ~bit
      // Every part of what could be kept may be kept.
      for (let kept = largest; ; kept = (kept - 1) & largest) {
        if (sum(kept) <= limit && cost < (next.get(kept) ?? Number.POSITIVE_INFINITY)) next.set(kept, cost)
        if (kept === 0) break
      }
    }
    states = next
  }
  return Math.min(...states.values())
}

describe('the simulated orders of pages', () => {
  test('the LRU reads what a plain one reads', () => {
    fc.assert(
      fc.property(calls(fc.integer({ min: 1, max: 5 }), 60), fc.integer({ min: 0, max: 12 }), (all, limit) => {
        expect(lruOf(all, limit)).toBe(plainLru(all, limit))
      }),
    )
    // What is used stays, what was used longest ago goes; and what is read comes back.
    const first: Call[] = [
      ['put', 0, 1],
      ['put', 1, 1],
      ['get', 0],
      ['put', 2, 1],
    ]
    expect(lruOf([...first, ['get', 0], ['get', 2]], 2)).toBe(0)
    expect(lruOf([...first, ['get', 1], ['get', 1]], 2)).toBe(1)
  })

  test('of pages of one size no order reads less than MIN', () => {
    fc.assert(
      fc.property(calls(fc.constant(1), 40), fc.integer({ min: 0, max: 4 }), (all, limit) => {
        expect(minOf(all, limit)).toBe(fewestReads(all, limit))
      }),
      { numRuns: 3000 },
    )
  })

  test('of pages of various sizes MIN does not promise the least, and never reads less', () => {
    fc.assert(
      fc.property(calls(fc.integer({ min: 1, max: 4 }), 20), fc.integer({ min: 0, max: 10 }), (all, limit) => {
        expect(minOf(all, limit)).toBeGreaterThanOrEqual(fewestReads(all, limit))
      }),
    )
  })

  test('MIN keeps a part of a loop, of which an LRU keeps nothing', () => {
    const round = Array.from({ length: 10 }, (_, page): Call => ['get', page])
    const all: Call[] = [...round.map(([, page]): Call => ['put', page, 1]), ...round, ...round, ...round, ...round]
    expect(lruOf(all, 5)).toBe(40)
    // Of each ten gets those of the five that stayed are answered, but for the one place that the others pass through.
    expect(minOf(all, 5)).toBeLessThan(25)
  })

  test('see every call that a front end makes, and none twice', async () => {
    const seen: string[] = []
    const spy: Calls = {
      put: (page, bytes) => seen.push(`put ${page} ${bytes < 100 ? 'small' : bytes}`),
      get: (page) => seen.push(`get ${page}`),
      release: (page) => seen.push(`release ${page}`),
      flush: (page) => seen.push(`flush ${page}`),
    }
    const store = watched(compose([memory({ limitBytes: 2 ** 20 })]), [spy])
    const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: basePageSize }) as Pool
    const random = createRandom(1)
    const noise = Uint8Array.from({ length: basePageSize }, () => random() * 256)
    expect(pool.put(0, 1, noise)).toBe(PutOutcome.Stored)
    const batch = new PageBatch(3)
    for (const index of [2, 3, 4]) batch.push(0, index)
    batch.outcomes[1] = PutOutcome.Stored
    expect(pool.putMany(batch)).toBe(3)
    batch.rearm()
    batch.outcomes[0] = GetOutcome.Hit
    pool.getMany(batch)
    const into = new Uint8Array(basePageSize)
    expect(pool.get(0, 1, into)).toBe(GetOutcome.Hit)
    expect(into).toEqual(noise)
    expect(await pool.fetch(0, 1, into)).toBe(GetOutcome.Hit)
    // There is nothing below: it is not granted.
    expect(pool.release?.(0, 1)).toBe(false)
    pool.flushPage(0, 1)
    pool.flushMany(batch)
    expect(pool.attributes.pageSize).toBe(basePageSize)
    // A call that they know nothing of must not go unnoticed.
    expect(() => pool.flushObject(0)).toThrow('know nothing of')
    await store.close()
    expect(seen).toEqual([
      'put 1 4096',
      'put 2 small',
      'put 4 small',
      'get 3',
      'get 4',
      'get 1',
      'release 1',
      'flush 1',
      'flush 2',
      'flush 3',
      'flush 4',
    ])
  })
})

describe('the log', () => {
  /** Written bytes per byte, after twice the size of the log, of blocks that are overwritten at random. */
  const cost = (live: number, segments: number, perSegment: number): number => {
    const blocks = Math.floor(segments * perSegment * live)
    const log = new GreedyLog(segments * perSegment * 10, perSegment * 10)
    const random = createRandom(9)
    for (let block = 0; block < blocks; block++) log.write(block, 10)
    const rounds = segments * perSegment
    let before = 0
    for (let n = 0; n < 3 * rounds; n++) {
      if (n === 2 * rounds) before = log.writtenBytes
      log.write(Math.floor(random() * blocks), 10)
    }
    expect(log.liveBytes).toBe(blocks * 10)
    return (log.writtenBytes - before) / (rounds * 10)
  }

  test('writes what theory says, or a little less', () => {
    // Cleaning in order of age under uniform overwriting: w = a / (a + W(-a e^-a)) with a = 1 / live and W Lambert's
    // function; greedy cleaning is a little better. Source: P. Desnoyers, "Analytic modeling of SSD write performance",
    // SYSTOR 2012.
    for (const live of [0.5, 0.7, 0.8, 0.9]) {
      const a = 1 / live
      let w = 0
      // The fixed point of w = -a e^(-a) e^(-w), by Newton.
      for (let n = 0; n < 100; n++) w -= (w * Math.exp(w) + a * Math.exp(-a)) / (Math.exp(w) * (w + 1))
      const theory = a / (a + w)
      const measured = cost(live, 512, 32)
      expect(measured).toBeGreaterThan(theory * 0.85)
      expect(measured).toBeLessThan(theory * 1.1)
    }
  })

  test('keeps the last version of each block, whatever comes, in the room that it has', () => {
    const operation = fc.tuple(fc.nat(19), fc.integer({ min: 1, max: 1000 }))
    fc.assert(
      fc.property(fc.array(operation, { minLength: 100, maxLength: 400 }), (operations) => {
        const log = new GreedyLog(8 * 4096, 4096)
        const sizes = new Map<number, number>()
        let asked = 0
        for (const [block, bytes] of operations) {
          log.write(block, bytes)
          sizes.set(block, bytes)
          asked += bytes
          expect(log.liveBytes).toBe([...sizes.values()].reduce((sum, size) => sum + size))
        }
        expect(log.writtenBytes).toBeGreaterThanOrEqual(asked)
      }),
    )
  })

  test('cleans the segment with the fewest live bytes', () => {
    // Four segments of two blocks. When 6 comes the last free one is kept for cleaning; of the full ones the second has
    // one dead block.
    const log = new GreedyLog(4 * 8192, 8192)
    for (const block of [0, 1, 2, 3, 3, 5]) log.write(block, 4096)
    expect(log.writtenBytes).toBe(6 * 4096)
    // Only block 2 is moved.
    log.write(6, 4096)
    expect(log.writtenBytes).toBe((6 + 1 + 1) * 4096)
    expect(log.liveBytes).toBe(6 * 4096)
  })

  test('says that it is full, and takes no block that is longer than a segment', () => {
    const log = new GreedyLog(4 * 8192, 8192)
    expect(() => {
      for (let block = 0; block < 100; block++) log.write(block, 4096)
    }).toThrow('the log is full')
    expect(() => log.write(0, 8193)).toThrow(RangeError)
    expect(() => new GreedyLog(3 * 8192, 8192)).toThrow(RangeError)
  })
})

test('tmem bench tiers --quick --json: every row has a figure or a reason, and no file is left', {
  timeout: 240_000,
}, async (ctx) => {
  requires(ctx, { paths: ['/proc/self/io'] })
  const folder = temporaryDirectory()
  const { code, stdout, stderr } = await tmem(['bench', 'tiers', '--quick', '--json'], {
    through: ['env', `TMPDIR=${folder}`],
  })
  expect({ code, notes: strangeLines(stderr) }).toEqual({ code: 0, notes: [] })
  expect(readdirSync(folder)).toEqual([])
  const figure = z.number().nonnegative()
  const measured = z.strictObject({
    name: z.string(),
    unit: z.string(),
    value: figure,
    reference: z.string().optional(),
    reference_value: figure.optional(),
    ratio: figure.optional(),
    goal: z.number().positive().optional(),
    met: z.boolean().optional(),
  })
  const skipped = z.strictObject({ name: z.string(), skipped: z.string().min(1) })
  const { rows } = z
    .object({ suite: z.literal('tiers'), quick: z.literal(true), rows: z.array(z.union([measured, skipped])) })
    .parse(JSON.parse(stdout))
  const phases = ['newest', 'oldest', 'mixed']
  expect(rows.map(({ name }) => name)).toEqual([
    'reads-hot-set',
    ...phases.flatMap((phase) => [`reads-hot-set-${phase}`, `reads-hot-set-${phase}-second-half`]),
    'memory-hot-set',
    'reads-zipf-writes',
    'reads-zipf',
    'written-zipf-steady',
    'reads-scan',
    'reads-scan-to-min',
    'reads-loop',
    'reads-loop-to-min',
    'written-loop-steady',
    'demo-disk-io',
    'written-50%-live',
    'written-80%-live',
    'written-90%-live',
    'write-operations',
    'put-sinking',
    'put-sinking-p99.9',
    'put-new-over-file',
    'get-over-file',
    'miss-four-places',
    'metadata-page-in-memory',
    'metadata-page-in-file',
    'metadata-object',
    'heap-growth-0.1m-operations',
    'guest-pages-read',
    'guest-time',
  ])
  const row = (name: string): MeasuredRow => rows.find((one) => one.name === name) as MeasuredRow
  // The reference is a simulation of fixed calls. It reads what its order must: each page of the set that was written
  // first, once.
  expect(row('reads-hot-set').reference_value).toBeGreaterThan(1000)
  // A loop of 2,812 pages over memory for less is what an LRU can only read from disk: all of its 25,000 references.
  expect(row('reads-loop').reference_value).toBeGreaterThan(24_000)
  for (const name of ['scan', 'loop'])
    expect(row(`reads-${name}-to-min`).reference_value).toBeLessThan(row(`reads-${name}`).reference_value!)
  // No order of pages reads less than MIN does, but for the bytes that it leaves to sizes.
  for (const name of ['scan', 'loop']) expect(row(`reads-${name}-to-min`).ratio).toBeGreaterThan(0.95)
  expect(row('demo-disk-io').reference_value).toBeGreaterThan(1000)
})

test('without its programs the rows of the guest say so', async () => {
  const path = process.env['PATH']
  process.env['PATH'] = '/nowhere'
  try {
    const rows = await zswapRows(createBench(silentTerminal(), false))
    const reason = expect.stringMatching(
      /^(needs the (program qemu-system-x86_64$|package )|the kernel .* is built without zswap)/,
    )
    expect(rows).toEqual([
      { name: 'guest-pages-read', skipped: reason },
      { name: 'guest-time', skipped: reason },
    ])
  } finally {
    process.env['PATH'] = path
  }
})

test('an interruption ends it', async () => {
  await expect(tiers.run(createBench(silentTerminal(AbortSignal.abort()), true))).rejects.toBeInstanceOf(Interrupted)
})
