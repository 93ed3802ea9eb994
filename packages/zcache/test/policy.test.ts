/** Policies: thresholds, hysteresis, writing back, recompression, and where memory may be asked for. */
import { createCodec } from '@tmem/codecs'
import type { LayerContext, PageStore, Pool } from '@tmem/core'
import { ByteLimit, compose, createAccounts, GetOutcome, PutOutcome, systemAllocator } from '@tmem/core'
import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import { type ZcacheOptions, zcache } from '../src/index.ts'
import type { Zcache } from '../src/zcache.ts'
import { attributes, KiB, MiB, newPool, noisyPage, open, random, sameBytes } from './pages.ts'

const { Stored, NoMemory, Policy, AllocationFailed } = PutOutcome
const { Hit, Miss } = GetOutcome

/** Puts pages of about half a page each under indexes from `first` until one is refused; the number stored. */
function fill(pool: Pool, first = 0): number {
  let index = first
  while (pool.put(0, index, noisyPage(index, 0.5)) === Stored) index++
  return index - first
}

/** Text that deflate packs better than LZ4. */
function textPage(seed: number): Uint8Array {
  const next = random(seed)
  const words = [
    'page',
    'frame',
    'object',
    'pool',
    'put',
    'get',
    'flush',
    'ephemeral',
    'persistent',
    'slot',
    'the',
    'of',
  ]
  let text = `${seed} `
  while (text.length < 4096) text += `${words[Math.floor(next() * words.length)]}${next() < 0.1 ? '\n' : ' '}`
  return new Uint8Array(Buffer.from(text.slice(0, 4096), 'latin1'))
}

test('hysteresis: after the limit was hit, pages are refused until what is live is below the threshold', () => {
  const store = open({ limitBytes: MiB, acceptThresholdPercent: 80 })
  const pool = newPool(store, 'swap')
  const stored = fill(pool)
  expect(store.stats().counters).toMatchObject({ pool_limit_hit: 1, rejected_full: 0 })
  // Full or nearly: refused before any work; what replaces a page is looked at.
  pool.flushPage(0, 0)
  expect(pool.put(0, 0, noisyPage(0, 0.5))).toBe(Policy)
  expect(pool.put(0, 1, noisyPage(1, 0.4))).toBe(Stored)
  expect(store.stats().counters).toMatchObject({ pool_limit_hit: 1, rejected_full: 1 })
  let flushed = 1
  while (pool.put(0, stored, noisyPage(stored, 0.5)) === Policy) pool.flushPage(0, ++flushed)
  expect(flushed / stored).toBeGreaterThan(0.1)
  expect(flushed / stored).toBeLessThan(0.3)
  expect(pool.put(0, 0, noisyPage(0, 0.5))).toBe(Stored)
  // Without hysteresis a freed place is used at once.
  const eager = newPool(open({ limitBytes: MiB }), 'swap')
  const count = fill(eager)
  for (let i = 0; i < 20; i++) eager.flushPage(0, i)
  expect(eager.put(0, count, noisyPage(1, 0.5))).toBe(Stored)
  store.check()
})

test('ephemeral pages end the hysteresis: they can be eaten', () => {
  const store = open({ limitBytes: MiB, acceptThresholdPercent: 50 })
  const swap = newPool(store, 'swap')
  const stored = fill(swap)
  expect(swap.put(0, stored, noisyPage(1, 0.5))).toBe(Policy)
  swap.flushPage(0, 0)
  const cache = newPool(store, 'cache')
  expect(cache.put(0, 0, new Uint8Array(4096))).toBe(Stored)
  expect(swap.put(0, 0, noisyPage(0, 0.5))).toBe(Stored)
})

test('zv_page_count_policy_percent bounds persistent pages by what they are uncompressed', () => {
  const store = open({ limitBytes: MiB, zvPageCountPolicyPercent: 75 })
  const pool = newPool(store, 'swap')
  let stored = 0
  while (pool.put(0, stored, new Uint8Array(4096)) === Stored) stored++
  expect(stored).toBe((0.75 * MiB) / 4096)
  expect(pool.put(0, stored, noisyPage(1, 0.1))).toBe(Policy)
  expect(pool.put(0, 0, noisyPage(1, 0.1))).toBe(Stored)
  pool.flushPage(0, 1)
  expect(pool.put(0, stored, noisyPage(1, 0.1))).toBe(Stored)
  expect(store.stats().counters['rejected_page_count']).toBe(2)
})

/** Opens a zcache over a plain memory store. */
function over(options: ZcacheOptions, limitBytes: number): { store: Zcache; below: PageStore } {
  const context: LayerContext = { allocator: systemAllocator, accounts: createAccounts() }
  const below = memory({ limitBytes }).open(undefined, context)
  return { store: zcache(options).open(below, context) as Zcache, below }
}

test('above a lowered limit persistent pages go down, secured there before they are given up here', () => {
  const limitBytes = new ByteLimit(2 * MiB)
  const { store } = over({ limitBytes }, 8 * MiB)
  const pool = newPool(store, 'swap')
  for (let i = 0; i < 300; i++) expect(pool.put(0, i, noisyPage(i, 0.5))).toBe(Stored)
  limitBytes.bytes = MiB / 2
  let ticks = 0
  while (store.tick({ pages: 20 }).pending) expect(++ticks).toBeLessThan(200)
  const { counters } = store.stats()
  expect(counters['used_bytes']).toBeLessThanOrEqual(MiB / 2)
  expect(counters['writtenback_pages']).toBeGreaterThan(100)
  store.check()
  const into = new Uint8Array(4096)
  for (let i = 0; i < 300; i++) {
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, noisyPage(i, 0.5))).toBe(true)
  }
})

test('after the limit was hit, tick writes back to the threshold; what the layer below refuses stays', () => {
  const { store } = over({ limitBytes: MiB, acceptThresholdPercent: 70 }, 256 * KiB)
  const pool = newPool(store, 'swap')
  let index = 0
  // The layer below takes the first refused ones, until it is full as well.
  while (pool.put(0, index, noisyPage(index, 0.5)) === Stored) index++
  const { counters } = store.stats()
  store.tick({ pages: 50 })
  expect(store.stats().counters['writtenback_pages']).toBe(0)
  pool.flushPage(0, index - 1)
  for (let i = 0; i < 20; i++) pool.flushPage(0, index - 1 - i)
  store.tick({ pages: 50 })
  expect(store.stats().counters['writtenback_pages']).toBeGreaterThan(0)
  expect(store.stats().counters['live']).toBeLessThan(counters['live']!)
  const into = new Uint8Array(4096)
  for (let i = 0; i < index - 20; i++) {
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, noisyPage(i, 0.5))).toBe(true)
  }
  store.check()
})

test('pages that nobody touches are compressed again, and come back as they were', () => {
  const store = open({ limitBytes: 4 * MiB, recompress: 'deflate', incompressible: 'keep' })
  const accounts = createAccounts()
  const pool = newPool(store, 'swap')
  const large = newPool(store, 'swap', 128 * KiB)
  const count = 100
  for (let i = 0; i < count; i++) pool.put(0, i, textPage(i))
  const noise = random(1)
  pool.put(
    1,
    0,
    Uint8Array.from({ length: 4096 }, () => noise() * 256),
  )
  pool.put(1, 1, new Uint8Array(4096))
  const big = Buffer.concat(Array.from({ length: 32 }, (_, i) => textPage(i)))
  large.put(0, 0, big)
  const before = store.stats().counters['pers_zbytes']!
  const into = new Uint8Array(4096)
  for (let round = 0; round < 20; round++) {
    // The first ten are in use all the time.
    for (let i = 0; i < 10; i++) pool.get(0, i, into)
    store.tick({ pages: 64 })
    store.check()
  }
  const { counters } = store.stats()
  expect(counters['pers_zbytes']).toBeLessThan(before * 0.8)
  expect(counters['recompressed_pages']).toBe(count - 10 + 1)
  expect(counters['recompress_poor']).toBe(1)
  expect(counters['recompress_saved_bytes']).toBeGreaterThan(before * 0.15)
  // Left alone, the ten follow; then there is nothing more to do.
  expect(store.tick({ pages: 1000 }).pages).toBe(10)
  expect(store.tick({ pages: 1000 }).pages).toBe(0)
  for (let i = 0; i < count; i++) {
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, textPage(i))).toBe(true)
  }
  const bigInto = new Uint8Array(128 * KiB)
  expect(large.get(0, 0, bigInto)).toBe(Hit)
  expect(sameBytes(bigInto, big)).toBe(true)
  pool.destroy()
  large.destroy()
  expect(accounts.charged(1)).toBe(0)
  store.check()
})

test('a quiet store finds its idle pages, too; a tick never touches more pages than its budget', () => {
  const store = open({ limitBytes: 4 * MiB, recompress: 'deflate' })
  const pool = newPool(store, 'shared')
  for (let i = 0; i < 50; i++) pool.put(0, i, textPage(i))
  let pages = 0
  for (let ticks = 0; ticks < 100; ticks++) {
    const progress = store.tick({ pages: 4 })
    expect(progress.pages).toBeLessThanOrEqual(4)
    pages += progress.pages
  }
  expect(pages).toBeGreaterThanOrEqual(50)
  expect(store.stats().counters['recompressed_pages']).toBe(50)
  expect(store.tick({ pages: 0 })).toEqual({ pages: 0, pending: false })
})

test('an unknown codec is an error when the layer is opened', () => {
  expect(() => open({ limitBytes: MiB, codec: 'lzo' as never })).toThrow(
    expect.objectContaining({ code: 'TMEM_UNSUPPORTED', layer: 'zcache' }),
  )
})

test('memory is asked for before a put changes anything, so an allocator may use the store to find some', () => {
  const store: { open?: Zcache; pool?: Pool } = {}
  let inside = 0
  let deepest = 0
  let index = 0
  const into = new Uint8Array(4096)
  const allocator = {
    allocate: (bytes: number, site: string) => {
      if (site !== 'zcache.chunk') return systemAllocator.allocate(bytes, site)
      inside++
      deepest = Math.max(deepest, inside)
      // Reclaim: everything that a caller may do, in the middle of somebody else's put.
      store.open!.check()
      store.pool!.flushPage(0, index)
      store.pool!.get(0, index + 1, into)
      if (inside < 3) store.pool!.put(1, index, noisyPage(index, 0.5))
      store.open!.tick({ pages: 10 })
      store.open!.check()
      inside--
      return index % 3 === 0 ? undefined : systemAllocator.allocate(bytes, site)
    },
  }
  store.open = open({ limitBytes: 2 * MiB }, { allocator })
  store.pool = newPool(store.open, 'swap')
  const outcomes = new Set<number>()
  for (; index < 1500; index++) {
    const outcome = store.pool.put(0, index, noisyPage(index, 0.5))
    outcomes.add(outcome)
    expect(store.pool.get(0, index, into)).toBe(outcome === Stored ? Hit : Miss)
  }
  expect(deepest).toBeGreaterThan(1)
  expect(outcomes).toEqual(new Set([Stored, NoMemory, AllocationFailed]))
  store.open.check()
})

test('a pool that is destroyed while memory is being found stores nothing', () => {
  const store: { pool?: Pool } = {}
  const allocator = {
    allocate: (bytes: number, site: string) => {
      if (site === 'zcache.chunk') store.pool!.destroy()
      return systemAllocator.allocate(bytes, site)
    },
  }
  const opened = open({ limitBytes: 2 * MiB }, { allocator })
  store.pool = newPool(opened, 'swap')
  expect(store.pool.put(0, 0, noisyPage(0, 0.5))).toBe(PutOutcome.PoolGone)
  opened.check()
})

test('zcache1 keeps ephemeral pages in zbud and persistent ones in xvmalloc, and evicts whole page frames', () => {
  const store = open({ limitBytes: MiB, allocator: 'zcache1' })
  const cache = newPool(store, 'cache')
  const swap = newPool(store, 'swap')
  for (let i = 0; i < 300; i++) expect(cache.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
  for (let i = 0; i < 300; i++) swap.put(0, i, noisyPage(i, 0.4))
  const { counters, children } = store.stats()
  expect(children.map(({ name }) => name)).toEqual(['zbud', 'xvmalloc', 'zv', 'arena'])
  expect(counters['pers_ate_eph']).toBeGreaterThan(10)
  expect(counters['evicted_eph_zpages']).toBeGreaterThan(counters['pers_ate_eph']!)
  expect(counters['evicted_eph_pageframes']).toBe(counters['pers_ate_eph'])
  expect(children[0]!.counters['zpages']).toBe(counters['eph_zpages'])
  expect(children[1]!.counters['zpages']).toBe(counters['pers_zpages'])
  expect(Object.values(children[2]!.children[0]!.counters).reduce((a, b) => a + b, 0)).toBe(counters['pers_zpages'])
  expect(Object.values(children[0]!.children[1]!.counters).reduce((a, b) => a + b, 0)).toBe(300)
  store.check()
})

test('in a stack with the model of coherency at every boundary', async () => {
  const store = compose(
    [zcache({ limitBytes: MiB, recompress: 'deflate', acceptThresholdPercent: 90 }), memory({ limitBytes: MiB })],
    {
      check: 'model',
    },
  )
  const pools = (['swap', 'cache', 'shared'] as const).map((kind) => store.newPool(attributes(kind)) as Pool)
  const next = random(5)
  const into = new Uint8Array(4096)
  for (let step = 0; step < 4000; step++) {
    const pool = pools[Math.floor(next() * 3)]!
    const index = Math.floor(next() * 400)
    const what = next()
    if (what < 0.5) pool.put(0, index, noisyPage(step, next()))
    else if (what < 0.8) pool.get(0, index, into)
    else if (what < 0.95) pool.flushPage(0, index)
    else store.tick({ pages: 16 })
  }
  expect(store.stats().counters['live']).toBeGreaterThan(0)
  await store.close()
})

test('every codec of this runtime can be used', () => {
  const into = new Uint8Array(4096)
  for (const codec of ['lz4', 'lz4js', 'deflate'] as const) {
    const store = open({ limitBytes: MiB, codec })
    const pool = newPool(store, 'swap')
    expect(pool.put(0, 0, textPage(1))).toBe(Stored)
    expect(pool.get(0, 0, into)).toBe(Hit)
    expect(sameBytes(into, textPage(1))).toBe(true)
    const alone = new Uint8Array(8192)
    expect(store.stats().counters['pers_zbytes']).toBe(createCodec(codec).compress(into, 0, 4096, alone, 0, 4096))
  }
})
