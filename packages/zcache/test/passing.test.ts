/** Evicted ephemeral pages are offered to the layer below, in an order that leaves every page in one place at most. */
import type { Allocator, LayerContext, PageStore, Pool } from '@tmem/core'
import { ByteLimit, createAccounts, GetOutcome, PutOutcome, systemAllocator } from '@tmem/core'
import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'
import { type ZcacheOptions, zcache } from '../src/index.ts'
import type { Zcache } from '../src/zcache.ts'
import { KiB, MiB, newPool, noisyPage, random, sameBytes } from './pages.ts'

const { Stored } = PutOutcome
const { Hit, Miss } = GetOutcome

/** A zcache over memory; `watch` wraps the puts that reach the memory. */
function over(
  options: ZcacheOptions,
  limitBytes: number,
  watch: (put: () => PutOutcome, object: number, index: number) => PutOutcome = (put) => put(),
  allocator: Allocator = systemAllocator,
): { store: Zcache; below: PageStore } {
  const context: LayerContext = { allocator, accounts: createAccounts() }
  const below = memory({ limitBytes }).open(undefined, context)
  const watched: PageStore = {
    name: below.name,
    capabilities: below.capabilities,
    newPool: (wanted) => {
      const pool = below.newPool(wanted)
      if (typeof pool === 'number') return pool
      const put: Pool['put'] = (object, index, page) =>
        watch(() => pool.put(object, index, page), Number(object), index)
      return new Proxy(pool, {
        get: (target, name) => {
          if (name === 'put') return put
          const value: unknown = Reflect.get(target, name, target)
          return typeof value === 'function' ? value.bind(target) : value
        },
      })
    },
    tick: (budget) => below.tick(budget),
    stats: () => below.stats(),
    close: () => below.close(),
  }
  return { store: zcache(options).open(watched, context) as Zcache, below }
}

const evictions = (store: PageStore): { evicted: number; passedOn: number; dropped: number } => {
  const { counters } = store.stats()
  return {
    evicted: counters['evicted_eph_zpages']!,
    passedOn: counters['evicted_eph_passed_on']!,
    dropped: counters['evicted_eph_dropped']!,
  }
}

test.each(['zsmalloc', 'xvmalloc', 'zbud', 'zcache1'] as const)(
  'a working set larger than the store is whole, with what is below it: %s',
  (allocator) => {
    const { store, below } = over({ limitBytes: MiB, allocator }, 16 * MiB)
    const pool = newPool(store, 'cache')
    const pages = 1500
    for (let i = 0; i < pages; i++) {
      expect(pool.put(i % 50, i, noisyPage(i, 0.4))).toBe(Stored)
      if (i % 100 === 0) store.check()
    }
    const { evicted, passedOn, dropped } = evictions(store)
    expect(passedOn).toBeGreaterThan(500)
    expect([evicted, dropped]).toEqual([passedOn, 0])
    // Each page is in exactly one place.
    expect(store.stats().counters['live']! + below.stats().counters['pages']!).toBe(pages)
    const into = new Uint8Array(4096)
    for (let i = 0; i < pages; i++) {
      expect(pool.get(i % 50, i, into)).toBe(Hit)
      expect(sameBytes(into, noisyPage(i, 0.4))).toBe(true)
    }
    for (let i = 0; i < pages; i++) expect(pool.get(i % 50, i, into)).toBe(Miss)
    store.check()
  },
)

test('persistent pages that eat ephemeral ones pass them down, too', () => {
  const { store } = over({ limitBytes: MiB }, 16 * MiB)
  const cache = newPool(store, 'cache')
  const swap = newPool(store, 'swap')
  for (let i = 0; i < 400; i++) cache.put(0, i, noisyPage(i, 0.4))
  for (let i = 0; i < 300; i++) expect(swap.put(0, i, noisyPage(1000 + i, 0.4))).toBe(Stored)
  expect(store.stats().counters['pers_ate_eph']).toBeGreaterThan(100)
  const into = new Uint8Array(4096)
  for (let i = 0; i < 400; i++) expect(cache.get(0, i, into)).toBe(Hit)
  expect(evictions(store).dropped).toBe(0)
  store.check()
})

test('where there are only persistent pages nothing is moved about before a put', () => {
  const history = (below: boolean): Readonly<Record<string, number>> => {
    const context: LayerContext = { allocator: systemAllocator, accounts: createAccounts() }
    const store = below
      ? over({ limitBytes: MiB }, 16 * MiB).store
      : (zcache({ limitBytes: MiB }).open(undefined, context) as Zcache)
    const pool = newPool(store, 'swap')
    for (let i = 0; i < 900; i++) {
      pool.put(0, i, noisyPage(i, 0.4))
      if (i % 3 === 0) pool.flushPage(0, i >> 1)
    }
    const { counters, children } = store.stats()
    const { runs_moved, runs } = children.find(({ name }) => name === 'arena')!.counters
    return {
      tried: counters['pers_ate_eph_failed']!,
      hit: counters['pool_limit_hit']!,
      moved: runs_moved! + children[0]!.counters['objects_moved']!,
      runs: runs!,
    }
  }
  const alone = history(false)
  expect(alone['hit']).toBeGreaterThan(50)
  expect(alone['moved']).toBeGreaterThan(0)
  // But for the few bytes of a second scratch page it does what it does alone.
  const above = history(true)
  for (const name of ['tried', 'hit', 'moved', 'runs']) expect(above[name]! / alone[name]!).toBeCloseTo(1, 1)
})

test('what the layer below refuses is dropped, and counted so', () => {
  const { store, below } = over({ limitBytes: MiB }, 16 * MiB, (put, _object, index) =>
    index % 2 === 0 ? PutOutcome.Policy : put(),
  )
  const pool = newPool(store, 'shared')
  for (let i = 0; i < 1000; i++) expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
  const { evicted, passedOn, dropped } = evictions(store)
  expect(passedOn).toBeGreaterThan(100)
  expect(dropped).toBeGreaterThan(100)
  expect(passedOn + dropped).toBe(evicted)
  expect(below.stats().counters['pages']).toBe(passedOn)
  store.check()
})

test('without a pool below, or without a layer, evicted pages are dropped', () => {
  const context: LayerContext = { allocator: systemAllocator, accounts: createAccounts() }
  const store = zcache({ limitBytes: MiB }).open(undefined, context) as Zcache
  const pool = newPool(store, 'cache')
  for (let i = 0; i < 1000; i++) pool.put(0, i, noisyPage(i, 0.4))
  const { evicted, passedOn, dropped } = evictions(store)
  expect(evicted).toBeGreaterThan(300)
  expect([passedOn, dropped]).toEqual([0, evicted])
})

test('a frozen pool passes nothing down: below, its pages would be new', () => {
  const { store } = over({ limitBytes: MiB }, 16 * MiB)
  const frozen = newPool(store, 'cache')
  const pool = newPool(store, 'cache')
  for (let i = 0; i < 300; i++) frozen.put(0, i, noisyPage(i, 0.4))
  frozen.freeze()
  for (let i = 0; i < 600; i++) pool.put(0, i, noisyPage(i, 0.4))
  expect(evictions(store).dropped).toBeGreaterThan(250)
  frozen.thaw()
  const into = new Uint8Array(4096)
  let hits = 0
  for (let i = 0; i < 300; i++) if (frozen.get(0, i, into) === Hit) hits++
  expect(hits).toBeLessThan(50)
  store.check()
})

test('the place below is secure before the page is given up, and the scratch page is empty afterwards', () => {
  let inBoth = 0
  const opened: { store?: Zcache } = {}
  const scratch: Uint8Array[] = []
  const allocator: Allocator = {
    allocate: (bytes, site) => {
      const memory = systemAllocator.allocate(bytes, site)!
      if (site === 'zcache.page') scratch.push(new Uint8Array(memory))
      return memory
    },
  }
  const watch = (put: () => PutOutcome, object: number, index: number): PutOutcome => {
    const live = opened.store!.stats().counters['live']!
    const outcome = put()
    // Nobody got or flushed it here meanwhile: it is still one of the live ones.
    expect(opened.store!.stats().counters['live']).toBe(live)
    opened.store!.check()
    expect(object).toBe(7)
    if (index < 700) inBoth++
    return outcome
  }
  const { store } = over({ limitBytes: MiB }, 16 * MiB, watch, allocator)
  opened.store = store
  const pool = newPool(store, 'shared')
  for (let i = 0; i < 700; i++) pool.put(7, i, noisyPage(i, 0.4))
  expect(inBoth).toBe(evictions(store).passedOn)
  expect(inBoth).toBeGreaterThan(200)
  expect(scratch.map((bytes) => bytes.every((byte) => byte === 0))).toEqual([true])
  // A borrower after all that sees its own page, and none of what was shown to the layer below.
  const outcome = pool.lend(7, 699, (bytes) => {
    expect(sameBytes(bytes.subarray(0, 4096), noisyPage(699, 0.4))).toBe(true)
    // A put while a page is lent passes nothing down, because what is lent would be seen to change.
    const { passedOn, dropped } = evictions(store)
    for (let i = 700; i < 950; i++) pool.put(7, i, noisyPage(i, 0.4))
    expect(sameBytes(bytes.subarray(0, 4096), noisyPage(699, 0.4))).toBe(true)
    expect(evictions(store)).toMatchObject({ passedOn, dropped: expect.toSatisfy((now: number) => now > dropped) })
  })
  expect(outcome).toBe(Hit)
})

test('no put passes more than a bounded number of pages down', () => {
  let inPut = 0
  let most = 0
  const { store } = over({ limitBytes: 2 * MiB }, 64 * MiB, (put) => {
    inPut++
    return put()
  })
  const pool = newPool(store, 'cache')
  const next = random(3)
  const into = new Uint8Array(4096)
  for (let i = 0; i < 5000; i++) {
    inPut = 0
    // Each page an object of its own: that takes the most metadata.
    pool.put(i, 0, noisyPage(i, next()))
    most = Math.max(most, inPut)
    if (next() < 0.4) pool.get(Math.floor(next() * i), 0, into)
  }
  expect(most).toBeGreaterThan(1)
  // One of them may be the page itself, refused here.
  expect(most).toBeLessThanOrEqual(17)
  const { evicted, passedOn } = evictions(store)
  expect(passedOn / evicted).toBeGreaterThan(0.98)
  store.check()
})

test('pages of many segments go down whole', () => {
  const { store } = over({ limitBytes: 4 * MiB }, 64 * MiB)
  const pool = newPool(store, 'cache', 512 * KiB)
  const pages = 40
  for (let i = 0; i < pages; i++) expect(pool.put(0, i, noisyPage(i, 0.4, 512 * KiB))).toBe(Stored)
  const { evicted, passedOn } = evictions(store)
  expect(passedOn).toBeGreaterThan(10)
  const into = new Uint8Array(512 * KiB)
  let hits = 0
  for (let i = 0; i < pages; i++)
    if (pool.get(0, i, into) === Hit && sameBytes(into, noisyPage(i, 0.4, 512 * KiB))) hits++
  expect(hits).toBe(pages - (evicted - passedOn))
  store.check()
})

test('a lowered limit passes ephemeral pages down in ticks', () => {
  const limitBytes = new ByteLimit(2 * MiB)
  const { store } = over({ limitBytes }, 16 * MiB)
  const pool = newPool(store, 'cache')
  for (let i = 0; i < 600; i++) expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
  limitBytes.bytes = MiB
  while (store.tick({ pages: 32 }).pending) store.check()
  expect(store.stats().counters['used_bytes']).toBeLessThanOrEqual(MiB)
  expect(evictions(store).passedOn).toBeGreaterThan(100)
  const into = new Uint8Array(4096)
  for (let i = 0; i < 600; i++) expect(pool.get(0, i, into)).toBe(Hit)
})

test('a damaged page is not passed down', () => {
  const chunks: ArrayBufferLike[] = []
  const allocator: Allocator = {
    allocate: (bytes, site) => {
      const memory = systemAllocator.allocate(bytes, site)
      if (site === 'zcache.chunk') chunks.push(memory!)
      return memory
    },
  }
  const { store } = over({ limitBytes: MiB }, 16 * MiB, undefined, allocator)
  const pool = newPool(store, 'cache')
  for (let i = 0; i < 100; i++) pool.put(0, i, noisyPage(i, 0.4))
  for (const chunk of chunks) new Uint8Array(chunk)[40]! ^= 1
  for (let i = 100; i < 1200; i++) pool.put(0, i, noisyPage(i, 0.4))
  const damaged = store.stats().counters['corrupt_dropped']!
  expect(damaged).toBeGreaterThan(0)
  const into = new Uint8Array(4096)
  let missing = 0
  for (let i = 0; i < 1200; i++)
    if (pool.get(0, i, into) === Miss) missing++
    else if (!sameBytes(into, noisyPage(i, 0.4))) throw new Error(`page ${i} has other bytes`)
  expect(missing).toBe(damaged)
  store.check()
})

describe('whoever is below may use the store while it is offered a page', () => {
  const moves: readonly [string, (pool: Pool, object: number, index: number, store: Zcache) => void][] = [
    ['replaces the very page', (pool, object, index) => pool.put(object, index, noisyPage(5000 + index, 0.4))],
    ['flushes the very page', (pool, object, index) => pool.flushPage(object, index)],
    ['takes the very page', (pool, object, index) => pool.get(object, index, new Uint8Array(4096))],
    ['flushes its object', (pool, object) => pool.flushObject(object)],
    ['puts others', (pool, _object, index) => pool.put(99, index, noisyPage(index, 0.6))],
    ['ticks', (_pool, _object, _index, store) => store.tick({ pages: 100 })],
    ['destroys the pool', (pool) => pool.destroy()],
  ]
  test.each(moves)('%s', (name, move) => {
    const opened: { store?: Zcache; pool?: Pool } = {}
    /** What must be found under a handle, if anything is. */
    const expected = new Map<string, Uint8Array | undefined>()
    let inside = 0
    let moved = 0
    const { store } = over({ limitBytes: MiB }, 16 * MiB, (put, object, index) => {
      // What the moves themselves bring about is not disturbed again.
      if (inside > 0 || moved > 200) return put()
      inside++
      moved++
      move(opened.pool!, object, index, opened.store!)
      inside--
      if (name === 'replaces the very page') expected.set(`${object}/${index}`, noisyPage(5000 + index, 0.4))
      else if (name === 'flushes its object') for (let i = 0; i < 700; i++) expected.set(`${object}/${i}`, undefined)
      else if (name.endsWith('the very page')) expected.set(`${object}/${index}`, undefined)
      return put()
    })
    opened.store = store
    opened.pool = newPool(store, 'cache')
    for (let i = 0; i < 700; i++) {
      expected.set(`${i % 7}/${i}`, noisyPage(i, 0.4))
      const outcome = opened.pool.put(i % 7, i, noisyPage(i, 0.4))
      // The put itself came after whatever happened on its way; but a pool that went meanwhile takes nothing.
      if (outcome === Stored) expected.set(`${i % 7}/${i}`, noisyPage(i, 0.4))
      else expected.set(`${i % 7}/${i}`, undefined)
      store.check()
    }
    expect(moved).toBeGreaterThan(0)
    const into = new Uint8Array(4096)
    for (let i = 0; i < 700; i++) {
      if (opened.pool.get(i % 7, i, into) !== Hit) continue
      const wanted = expected.get(`${i % 7}/${i}`)
      expect(name !== 'destroys the pool' && wanted !== undefined && sameBytes(into, wanted)).toBe(true)
    }
  })
})
