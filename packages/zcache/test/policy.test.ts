/** The rules of 2011 and 2012, where they are wanted: what zcache refused, and why. */
import { createAccounts, GetOutcome, type Layer, PutOutcome } from '@tmem/core'
import { expect, test } from 'vitest'
import { random } from '../../../tools/random.ts'
import { zcache, zcacheFactory } from '../src/index.ts'
import { MiB, newPool, noisyPage, open, sameBytes } from './pages.ts'

const { Stored, Incompressible, Policy } = PutOutcome
const { Hit } = GetOutcome

/** A page that does not shrink at all. */
function randomPage(seed: number): Uint8Array {
  const next = random(seed)
  return Uint8Array.from({ length: 4096 }, () => next() * 256)
}

test('without rules every page is welcome; with incompressible=refuse those that shrink', () => {
  const keeping = open({ limitBytes: MiB })
  expect(newPool(keeping, 'swap').put(0, 0, randomPage(3))).toBe(Stored)
  expect(newPool(keeping, 'cache').put(0, 0, randomPage(3))).toBe(Stored)
  expect(keeping.counters()).toMatchObject({ raw_pages: 2, zbytes: 8192, compress_poor: 0 })
  const refusing = open({ limitBytes: MiB, incompressible: 'refuse' })
  const pool = newPool(refusing, 'swap')
  expect(pool.put(0, 0, randomPage(3))).toBe(Incompressible)
  expect(newPool(refusing, 'cache').put(0, 0, randomPage(3))).toBe(Incompressible)
  expect(refusing.counters()).toMatchObject({ compress_poor: 2, zpages: 0 })
  // A refused page ends the one that was there.
  expect(pool.put(0, 0, noisyPage(1, 0.9))).toBe(Stored)
  expect(pool.put(0, 0, randomPage(3))).toBe(Incompressible)
  expect(refusing.counters()).toMatchObject({ compress_poor: 3, zpages: 0 })
  refusing.check()
})

test('zv_max_zsize: a persistent page above it is refused, an ephemeral one is not', () => {
  const stack = open({ limitBytes: MiB, zvMaxZsize: 3584 })
  const swap = newPool(stack, 'swap')
  expect(swap.put(0, 0, noisyPage(1, 0.95))).toBe(Incompressible)
  expect(swap.put(0, 1, noisyPage(1, 0.8))).toBe(Stored)
  expect(newPool(stack, 'cache').put(0, 0, noisyPage(1, 0.95))).toBe(Stored)
  expect(stack.counters()).toMatchObject({ compress_poor: 1, zpages: 2 })
  expect(stack.counters('zv')).toMatchObject({ max_zsize: 3584, curr_zpages: 2 })
  // It is for 4 KiB of page: the same share of a larger one.
  const large = newPool(stack, 'swap', 65536)
  expect(large.put(0, 0, noisyPage(1, 0.95, 65536))).toBe(Incompressible)
  expect(large.put(0, 0, noisyPage(1, 0.8, 65536))).toBe(Stored)
})

test('zv_max_mean_zsize: a large result is refused only while the mean is large, too', () => {
  const stack = open({ limitBytes: 4 * MiB, zvMaxMeanZsize: 2560 })
  const pool = newPool(stack, 'swap')
  // Compresses to about 78 %: above 5/8.
  const poor = (seed: number): Uint8Array => noisyPage(seed, 0.78)
  expect(pool.put(0, 0, poor(1))).toBe(Stored)
  expect(pool.put(0, 1, poor(2))).toBe(Incompressible)
  expect(stack.counters()).toMatchObject({ mean_compress_poor: 1, compress_poor: 0 })
  // Good pages bring the mean down: then poor ones are welcome again.
  for (let i = 2; i < 6; i++) expect(pool.put(0, i, noisyPage(i, 0.1))).toBe(Stored)
  expect(pool.put(0, 1, poor(2))).toBe(Stored)
  const { curr_mean_zsize } = stack.counters('zv')
  expect(curr_mean_zsize).toBe(Math.round((stack.counters()['zbytes']! * 4096) / stack.counters()['orig_bytes']!))
  // Ephemeral pages know no mean.
  const cache = newPool(open({ limitBytes: MiB, zvMaxMeanZsize: 2560 }), 'cache')
  for (let i = 0; i < 4; i++) expect(cache.put(0, i, poor(i))).toBe(Stored)
})

test('zv_page_count_policy_percent bounds pages by what they are uncompressed', () => {
  const stack = open({ limitBytes: MiB, zvPageCountPolicyPercent: 75 })
  const pool = newPool(stack, 'swap')
  let stored = 0
  while (pool.put(0, stored, noisyPage(stored, 0.1)) === Stored) stored++
  expect(stored).toBe((0.75 * MiB) / 4096)
  expect(pool.put(0, stored, noisyPage(1, 0.1))).toBe(Policy)
  expect(newPool(stack, 'cache').put(0, 0, noisyPage(1, 0.1))).toBe(Stored)
  // What replaces a page takes its share.
  pool.flushPage(0, 1)
  expect(pool.put(0, 0, noisyPage(1, 0.2))).toBe(Stored)
  expect(pool.put(0, stored, noisyPage(1, 0.1))).toBe(Policy)
  pool.flushPage(0, 2)
  expect(pool.put(0, stored, noisyPage(1, 0.1))).toBe(Stored)
  expect(stack.counters()['rejected_page_count']).toBe(3)
  stack.check()
})

test('the sizes of what is here and of what ever was add up', () => {
  const stack = open({ limitBytes: MiB })
  const pool = newPool(stack, 'swap')
  const large = newPool(stack, 'swap', 65536)
  const next = random(9)
  let stored = 0
  for (let i = 0; i < 300; i++) {
    if (pool.put(0, i % 100, noisyPage(i, next())) === Stored) stored++
    if (i % 30 === 0 && large.put(0, 0, noisyPage(i, next() / 2, 65536)) === Stored) stored++
  }
  const sum = (section: string): number => Object.values(stack.counters(section)).reduce((a, b) => a + b, 0)
  expect(sum('curr_dist_counts')).toBe(stack.counters()['zpages'])
  expect(sum('cumul_dist_counts')).toBe(stored)
  expect(stack.counters()['orig_bytes']).toBe(100 * 4096 + 65536)
  pool.destroy()
  large.destroy()
  expect(sum('curr_dist_counts')).toBe(0)
  expect(stack.counters()).toMatchObject({ zpages: 0, zbytes: 0, orig_bytes: 0, raw_pages: 0 })
})

test('the rules in the text of a stack', () => {
  const { options } = zcacheFactory
  const create = (words: Parameters<typeof zcacheFactory.create>[0]): Layer => zcacheFactory.create(words)
  expect(options['zvMaxZsize']).toMatchObject({ kind: 'integer', maximum: 4096 })
  const layer = create({ limit: MiB, zvMaxZsize: 3584, zvMaxMeanZsize: 2560, zvPageCountPolicyPercent: 75 })
  expect(layer.name).toBe('zcache')
  expect(() => create({ limit: MiB, zvMaxMeanZsize: 4097 })).toThrow(/zvMaxMeanZsize must be an integer from 1 to 4096/)
})

/** Text that deflate packs better than LZ4. */
function textPage(seed: number): Uint8Array {
  const next = random(seed)
  const words = 'page frame object pool put get flush ephemeral persistent slot the of'.split(' ')
  let text = `${seed} `
  while (text.length < 4096) text += `${words[Math.floor(next() * words.length)]}${next() < 0.1 ? '\n' : ' '}`
  return new Uint8Array(Buffer.from(text.slice(0, 4096), 'latin1'))
}

test('recompress: pages that nobody touches are compressed again by a stronger codec, and come back as they were', () => {
  const accounts = createAccounts()
  const stack = open({ limitBytes: 4 * MiB, recompress: 'deflate' }, { accounts })
  const pool = newPool(stack, 'swap')
  const large = newPool(stack, 'shared', 131_072)
  const count = 100
  for (let i = 0; i < count; i++) expect(pool.put(0, i, textPage(i))).toBe(Stored)
  expect(pool.put(1, 0, randomPage(1))).toBe(Stored)
  const big = Buffer.concat(Array.from({ length: 32 }, (_, i) => textPage(i)))
  expect(large.put(0, 0, big)).toBe(Stored)
  const before = stack.counters()['slot_bytes']!
  const charged = accounts.charged(1)
  const into = new Uint8Array(4096)
  for (let round = 0; round < 20; round++) {
    // The first ten are in use all the time.
    for (let i = 0; i < 10; i++) pool.get(0, i, into)
    expect(stack.store.tick({ pages: 64 }).pages).toBeLessThanOrEqual(64)
    stack.check()
  }
  const { recompressed_pages, recompress_poor, recompress_saved_bytes } = stack.counters('moves')
  // Two blocks of the large page are among them.
  expect(recompressed_pages).toBe(count - 10 + 2)
  expect(recompress_poor).toBe(1)
  expect(stack.counters()['slot_bytes']).toBe(before - recompress_saved_bytes!)
  expect(recompress_saved_bytes).toBeGreaterThan(before * 0.15)
  expect(accounts.charged(1)).toBeLessThan(charged * 0.85)
  // Left alone, the ten follow; then there is nothing more to do.
  let more = 0
  for (let round = 0; round < 20; round++) more += stack.store.tick({ pages: 1000 }).pages
  expect(more).toBe(10)
  for (let i = 0; i < count; i++) {
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, textPage(i))).toBe(true)
  }
  const bigInto = new Uint8Array(131_072)
  expect(large.get(0, 0, bigInto)).toBe(Hit)
  expect(sameBytes(bigInto, big)).toBe(true)
  pool.destroy()
  expect(accounts.charged(1)).toBe(0)
  stack.check()
  expect(() => zcache({ limitBytes: MiB, recompress: 'lz4' })).toThrow(RangeError)
})
