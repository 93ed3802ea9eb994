import {
  type Allocator,
  ByteLimit,
  createAccounts,
  GetOutcome,
  getOutcomeName,
  PageBatch,
  PoolRefusal,
  PutOutcome,
  poolRefusalName,
  putOutcomeName,
  residentAllocator,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { expect, test } from 'vitest'
import { maxPagesFor, minLimitBytes, zcache, zcacheFactory } from '../src/index.ts'
import { KiB, MiB, newPool, noisyPage, open, sameBytes } from './pages.ts'

const { Stored, Incompressible, NoMemory, Quota, Frozen, PoolGone } = PutOutcome
const { Hit, Miss } = GetOutcome

test('a page comes back as it was stored, and later writes to the caller’s page do not matter', () => {
  const store = open({ limitBytes: MiB })
  const pool = newPool(store, 'swap')
  const page = noisyPage(1, 0.3)
  const original = page.slice()
  expect(pool.put(7, 3, page)).toBe(Stored)
  page.fill(1)
  const into = new Uint8Array(4096)
  expect(pool.get(7, 3, into)).toBe(Hit)
  expect(sameBytes(into, original)).toBe(true)
  expect(pool.get(7, 4, into)).toBe(Miss)
  expect(pool.get(8, 3, into)).toBe(Miss)
  expect(sameBytes(into, original)).toBe(true)
  store.check()
})

test('an allocator that gives all at the start is asked for nothing later, whatever is stored and given back', () => {
  let asked = 0
  const allocator: Allocator = {
    ahead: true,
    allocate: (bytes, site) => {
      asked++
      return residentAllocator.allocate(bytes, site)
    },
  }
  const store = open({ limitBytes: 4 * MiB, incompressible: 'keep' }, { allocator })
  const pool = newPool(store, 'swap')
  const begun = asked
  const into = new Uint8Array(4096)
  let outcome: PutOutcome = Stored
  for (let round = 0; round < 3; round++) {
    const held = new Map<number, Uint8Array>()
    for (let n = 0; n < 2500; n++) {
      const page = noisyPage(n + round, (n % 10) / 10)
      outcome = pool.put(round, n, page)
      if (outcome === Stored) held.set(n, page)
    }
    expect(outcome).toBe(NoMemory)
    store.check()
    for (const [n, page] of held) {
      expect(pool.get(round, n, into)).toBe(Hit)
      expect(sameBytes(into, page)).toBe(true)
    }
    pool.flushObject(round)
    store.tick({ pages: 10_000 })
    store.check()
  }
  const arena = store.stats().children.find(({ name }) => name === 'arena')!.counters
  expect(arena['chunks_returned']).toBeGreaterThan(10)
  expect(asked).toBe(begun)
  for (let nth = 1; nth <= begun - 1; nth++) {
    let left = nth
    const failing: Allocator = {
      ahead: true,
      allocate: (bytes, site) => (--left === 0 ? undefined : systemAllocator.allocate(bytes, site)),
    }
    expect(() => open({ limitBytes: 4 * MiB }, { allocator: failing })).toThrow(/no memory/)
  }
})

test('a page at an odd offset of a buffer is stored as well as any other', () => {
  const pool = newPool(open({ limitBytes: MiB }), 'swap')
  const page = new Uint8Array(5000).subarray(33, 33 + 4096)
  page.set(noisyPage(2, 0.4))
  const into = new Uint8Array(5000).subarray(7, 7 + 4096)
  expect(pool.put(0, 0, page)).toBe(Stored)
  expect(pool.get(0, 0, into)).toBe(Hit)
  expect(sameBytes(into, page)).toBe(true)
})

test.each([4, 8, 64, 128, 2048])('pages of %i KiB come back whole', (size) => {
  const store = open({ limitBytes: 16 * MiB })
  const pool = newPool(store, 'swap', size * KiB)
  const into = new Uint8Array(size * KiB)
  const pages = [0.02, 0.3, 0.6].map((noise, i) => noisyPage(i + 1, noise, size * KiB))
  for (const [i, page] of pages.entries()) expect(pool.put(1, i, page)).toBe(Stored)
  store.check()
  pages.forEach((page, i) => {
    expect(pool.get(1, i, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
  })
  for (const page of pages) expect(pool.put(1, 1, page)).toBe(Stored)
  store.check()
  pool.flushObject(1)
  store.check()
  expect(store.stats().counters).toMatchObject({ live: 0, pers_zpages: 0, pers_zbytes: 0, flushed: 3, replaced: 3 })
})

test('a large page may be partly same-filled and partly random', () => {
  const store = open({ limitBytes: 8 * MiB })
  const pool = newPool(store, 'swap', 2 * MiB)
  const page = new Uint8Array(2 * MiB)
  page.set(noisyPage(5, 1, 256 * KiB), 512 * KiB)
  expect(pool.put(0, 0, page)).toBe(Stored)
  const into = new Uint8Array(2 * MiB).fill(9)
  expect(pool.get(0, 0, into)).toBe(Hit)
  expect(sameBytes(into, page)).toBe(true)
  expect(store.stats().counters).toMatchObject({ same_filled_pages: 28, raw_pages: 4 })
  pool.flushPage(0, 0)
  expect(store.stats().counters).toMatchObject({ same_filled_pages: 0, raw_pages: 0, live: 0 })
  store.check()
})

test('a page that repeats one word of 8 bytes takes no place, whichever word it is', () => {
  const store = open({ limitBytes: MiB })
  const pool = newPool(store, 'swap')
  const into = new Uint8Array(4096).fill(77)
  const words = [
    [0],
    [255],
    [1, 2],
    [1, 2, 3, 4],
    [1, 2, 3, 4, 5, 6, 7, 0x88],
    [9, 9, 9, 9, 9, 9, 9, 1],
    [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80],
  ]
  const pages = words.map((word) => Uint8Array.from({ length: 4096 }, (_, i) => word[i % word.length]!))
  for (const [i, page] of pages.entries()) expect(pool.put(0, i, page)).toBe(Stored)
  expect(store.stats().counters).toMatchObject({ same_filled_pages: words.length, pers_zpages: 0, pers_zbytes: 0 })
  expect(store.stats().children[0]!.counters).toMatchObject({ zspages: 0, slot_bytes: 0 })
  pages.forEach((page, i) => {
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
  })
  // One byte off anywhere is another page.
  for (const at of [0, 5, 2047, 2048, 4088, 4095]) {
    const page = new Uint8Array(4096)
    page[at] = 1
    pool.put(1, at, page)
    expect(pool.get(1, at, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
  }
  expect(store.stats().counters['same_filled_pages']).toBe(words.length)
  store.check()
})

test('what does not shrink is refused, or kept raw by policy', () => {
  const page = noisyPage(3, 1)
  const refusing = open({ limitBytes: MiB })
  expect(newPool(refusing, 'swap').put(0, 0, page)).toBe(Incompressible)
  expect(newPool(refusing, 'cache').put(0, 0, page)).toBe(Incompressible)
  expect(refusing.stats().counters).toMatchObject({
    compress_poor: 2,
    failed_pers_puts: 1,
    failed_eph_puts: 1,
    live: 0,
  })
  const keeping = open({ limitBytes: MiB, incompressible: 'keep' })
  const pool = newPool(keeping, 'swap')
  expect(pool.put(0, 0, page)).toBe(Stored)
  const into = new Uint8Array(4096)
  expect(pool.get(0, 0, into)).toBe(Hit)
  expect(sameBytes(into, page)).toBe(true)
  expect(keeping.stats().counters).toMatchObject({ raw_pages: 1, pers_zbytes: 4096 })
  keeping.check()
})

test('a refused duplicate leaves nothing behind', () => {
  const store = open({ limitBytes: MiB })
  const pool = newPool(store, 'swap')
  expect(pool.put(0, 0, noisyPage(1, 0.2))).toBe(Stored)
  expect(pool.put(0, 0, noisyPage(2, 1))).toBe(Incompressible)
  expect(pool.get(0, 0, new Uint8Array(4096))).toBe(Miss)
  expect(store.stats().counters).toMatchObject({ put_to_flush: 1, live: 0, stored: 1 })
  store.check()
})

test('the mean rule: a large result is refused only while the mean is large, too', () => {
  const store = open({ limitBytes: 4 * MiB })
  const pool = newPool(store, 'swap')
  // Compresses to about 70 %: above 5/8, below 7/8.
  const poor = (seed: number): Uint8Array => noisyPage(seed, 0.78)
  expect(pool.put(0, 0, poor(1))).toBe(Stored)
  expect(pool.put(0, 1, poor(2))).toBe(Incompressible)
  expect(store.stats().counters).toMatchObject({ mean_compress_poor: 1, compress_poor: 0 })
  // Good pages bring the mean down: then poor ones are welcome again.
  for (let i = 2; i < 6; i++) expect(pool.put(0, i, noisyPage(i, 0.1))).toBe(Stored)
  expect(pool.put(0, 1, poor(2))).toBe(Stored)
  // Ephemeral pages know no mean.
  const cache = newPool(open({ limitBytes: MiB }), 'cache')
  for (let i = 0; i < 4; i++) expect(cache.put(0, i, poor(i))).toBe(Stored)
})

test('gets: private ephemeral removes, shared ephemeral and persistent keep', () => {
  const store = open({ limitBytes: MiB })
  const page = noisyPage(1, 0.2)
  const into = new Uint8Array(4096)
  const outcomes = (['cache', 'shared', 'swap'] as const).map((kind) => {
    const pool = newPool(store, kind)
    pool.put(0, 0, page)
    return [pool.get(0, 0, into), pool.get(0, 0, into)]
  })
  expect(outcomes).toEqual([
    [Hit, Miss],
    [Hit, Hit],
    [Hit, Hit],
  ])
  expect(store.stats().counters).toMatchObject({ got: 1, live: 2, hits: 5, gets: 6 })
  store.check()
})

test('persistent pages eat ephemeral ones, the oldest first; a shared get makes a page young again', () => {
  const store = open({ limitBytes: MiB })
  const cache = newPool(store, 'shared')
  const swap = newPool(store, 'swap')
  const into = new Uint8Array(4096)
  let cached = 0
  while (store.stats().counters['evicted_eph_zpages'] === 0)
    expect(cache.put(0, cached++, noisyPage(cached, 0.5))).toBe(Stored)
  expect(store.stats().counters['eph_ate_tail']).toBeGreaterThan(0)
  let oldest = 0
  while (cache.get(0, oldest, into) === Miss) oldest++
  // That get made the oldest page the youngest.
  const before = store.stats().counters['evicted_eph_zpages']!
  let swapped = 0
  while (store.stats().counters['pers_ate_eph'] === 0)
    expect(swap.put(0, swapped++, noisyPage(swapped, 0.5))).toBe(Stored)
  expect(store.stats().counters['evicted_eph_zpages']).toBeGreaterThan(before)
  expect(cache.get(0, oldest, into)).toBe(Hit)
  expect(cache.get(0, oldest + 1, into)).toBe(Miss)
  // In the end there are only persistent pages, and they are never evicted.
  let outcome: PutOutcome = Stored
  while (outcome === Stored) outcome = swap.put(0, swapped++, noisyPage(swapped, 0.5))
  expect(outcome).toBe(NoMemory)
  expect(store.stats().counters['eph_pages']).toBe(0)
  for (let i = 0; i < swapped - 1; i++) expect(swap.get(0, i, into)).toBe(Hit)
  expect(store.stats().counters['used_bytes']).toBeLessThanOrEqual(MiB)
  store.check()
})

test('no allocation and no page takes the layer over its limit', () => {
  let given = 0
  const allocator = {
    allocate: (bytes: number, site: string) => {
      if (site === 'zcache.chunk' || site === 'zcache.page') given += bytes
      return systemAllocator.allocate(bytes, site)
    },
  }
  const store = open({ limitBytes: 2 * MiB }, { allocator })
  const pool = newPool(store, 'swap')
  for (let i = 0; i < 6000; i++) {
    pool.put(i % 50, i, noisyPage(i, (i % 10) / 12))
    expect(store.stats().counters['used_bytes']).toBeLessThanOrEqual(2 * MiB)
  }
  expect(given).toBeLessThanOrEqual(2 * MiB)
  expect(given).toBeGreaterThan(1.5 * MiB)
  expect(maxPagesFor(2 * MiB)).toBe(store.stats().counters['max_pages'])
  store.check()
})

test('zero pages are bounded by their metadata', () => {
  const store = open({ limitBytes: minLimitBytes })
  const pool = newPool(store, 'swap')
  const zero = new Uint8Array(4096)
  let stored = 0
  while (pool.put(0, stored, zero) === Stored) stored++
  expect(stored).toBe(maxPagesFor(minLimitBytes))
  const cache = newPool(store, 'cache')
  expect(cache.put(0, 0, zero)).toBe(NoMemory)
  pool.flushPage(0, 0)
  expect(cache.put(0, 0, zero)).toBe(Stored)
  expect(cache.put(0, 1, zero)).toBe(Stored)
  expect(cache.get(0, 0, zero)).toBe(Miss)
  expect(pool.put(0, 0, zero)).toBe(Stored)
  expect(cache.get(0, 1, zero)).toBe(Miss)
  store.check()
})

test('persistent pages are charged to their owner, and given back', () => {
  const accounts = createAccounts({ maximumBytes: 20_000 })
  const store = open({ limitBytes: MiB }, { accounts })
  const pool = newPool(store, 'swap')
  const cache = newPool(store, 'cache')
  let stored = 0
  while (pool.put(0, stored, noisyPage(stored, 0.4)) === Stored) stored++
  expect(stored).toBeGreaterThan(5)
  expect(pool.put(0, stored, noisyPage(stored, 0.4))).toBe(Quota)
  expect(store.stats().counters['rejected_quota']).toBe(2)
  expect(cache.put(0, 0, noisyPage(1, 0.4))).toBe(Stored)
  expect(accounts.charged(1)).toBeGreaterThan(store.stats().counters['pers_zbytes']!)
  pool.destroy()
  expect(accounts.charged(1)).toBe(0)
  store.check()
})

test('a frozen pool refuses new handles only', () => {
  const store = open({ limitBytes: MiB })
  const pool = newPool(store, 'swap')
  const into = new Uint8Array(4096)
  pool.put(0, 0, noisyPage(1, 0.2))
  pool.freeze()
  expect(pool.put(0, 1, noisyPage(2, 0.2))).toBe(Frozen)
  expect(pool.put(0, 0, noisyPage(3, 0.2))).toBe(Stored)
  expect(pool.get(0, 0, into)).toBe(Hit)
  expect(sameBytes(into, noisyPage(3, 0.2))).toBe(true)
  pool.flushPage(0, 0)
  expect(pool.put(0, 0, noisyPage(3, 0.2))).toBe(Frozen)
  pool.thaw()
  expect(pool.put(0, 1, noisyPage(2, 0.2))).toBe(Stored)
})

test('destroyed pools and closed stores hold nothing', async () => {
  const store = open({ limitBytes: MiB })
  const pool = newPool(store, 'swap')
  const page = noisyPage(1, 0.2)
  const batch = new PageBatch(2)
  pool.put(0, 0, page)
  pool.destroy()
  pool.destroy()
  expect(pool.put(0, 0, page)).toBe(PoolGone)
  expect(pool.get(0, 0, page)).toBe(Miss)
  batch.push(0, 0)
  expect(pool.putMany(batch)).toBe(0)
  expect(batch.outcomes[0]).toBe(PoolGone)
  batch.rearm()
  expect(pool.getMany(batch)).toBe(0)
  expect(batch.outcomes[0]).toBe(Miss)
  // The number is used again, the pages are not.
  const again = newPool(store, 'swap')
  expect(again.get(0, 0, page)).toBe(Miss)
  again.put(0, 0, page)
  store.check()
  await Promise.all([store.close(), store.close()])
  expect(again.put(0, 0, page)).toBe(PoolGone)
  expect(store.newPool(again.attributes)).toBe(PoolRefusal.Closed)
  expect(store.stats().counters).toMatchObject({ live: 0 })
})

test('pools: what cannot be had is refused with its reason', () => {
  const store = open({ limitBytes: 4 * MiB })
  expect(store.newPool({ client: 1, persistent: true, shared: true, pageSize: 4096 })).toBe(
    PoolRefusal.SharedPersistent,
  )
  for (let i = 0; i < 256; i++) newPool(store, 'swap')
  expect(store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })).toBe(PoolRefusal.NoSlot)
  expect(() => store.newPool({ client: 1, persistent: true, shared: false, pageSize: 5000 })).toThrow(RangeError)
  const pool = newPool(open({ limitBytes: MiB }), 'swap')
  expect(pool.split()).toBe(PoolRefusal.Unsupported)
})

test('batches store and load as single calls do', () => {
  const store = open({ limitBytes: MiB })
  const pool = newPool(store, 'cache')
  const batch = new PageBatch(4)
  for (let i = 0; i < 4; i++) batch.bytes.set(noisyPage(i, i === 2 ? 1 : 0.2), batch.offsets[batch.push(1, i)])
  batch.outcomes[3] = Stored
  pool.put(1, 3, noisyPage(9, 0.1))
  expect(pool.putMany(batch)).toBe(3)
  expect([...batch.outcomes]).toEqual([Stored, Stored, Incompressible, Stored])
  const out = new PageBatch(4)
  for (let i = 0; i < 4; i++) out.push(1, i)
  expect(pool.getMany(out)).toBe(2)
  expect([...out.outcomes]).toEqual([Hit, Hit, Miss, Miss])
  expect(sameBytes(out.bytes.subarray(4096, 8192), noisyPage(1, 0.2))).toBe(true)
  batch.rearm()
  pool.putMany(batch)
  pool.flushMany(batch)
  expect(store.stats().counters['live']).toBe(0)
  store.check()
})

test('lend shows the page, removes a private ephemeral one, and leaves no trace of it in its scratch', () => {
  const store = open({ limitBytes: MiB })
  const cache = newPool(store, 'cache')
  const swap = newPool(store, 'swap')
  const page = noisyPage(1, 0.2)
  let seen: Uint8Array | undefined
  cache.put(0, 0, page)
  expect(
    cache.lend(0, 0, (bytes, at, length) => {
      seen = bytes.subarray(at, at + length)
      expect(sameBytes(seen!, page)).toBe(true)
      cache.put(0, 0, noisyPage(2, 0.2))
    }),
  ).toBe(Hit)
  expect(sameBytes(seen!, new Uint8Array(4096))).toBe(true)
  expect(cache.get(0, 0, page)).toBe(Hit)
  expect(sameBytes(page, noisyPage(2, 0.2))).toBe(true)
  swap.put(0, 0, page)
  expect(() => swap.lend(0, 0, () => void swap.lend(0, 0, () => {}))).toThrow(TypeError)
  expect(() =>
    swap.lend(0, 0, () => {
      throw new Error('from the borrower')
    }),
  ).toThrow('from the borrower')
  expect(swap.lend(0, 0, () => {})).toBe(Hit)
  expect(swap.lend(0, 1, () => expect.unreachable())).toBe(Miss)
})

test('the limit can be lowered to nothing and raised again while pages are there', () => {
  const limitBytes = new ByteLimit(2 * MiB)
  const store = open({ limitBytes })
  const cache = newPool(store, 'cache')
  const swap = newPool(store, 'swap')
  for (let i = 0; i < 400; i++) cache.put(0, i, noisyPage(i, 0.5))
  for (let i = 0; i < 50; i++) swap.put(0, i, noisyPage(i, 0.5))
  limitBytes.bytes = 0
  expect(swap.put(0, 50, noisyPage(50, 0.5))).toBe(NoMemory)
  let ticks = 0
  while (store.tick({ pages: 100 }).pending) expect(++ticks).toBeLessThan(100)
  expect(store.stats().counters).toMatchObject({ eph_pages: 0, pers_pages: 50 })
  store.check()
  const into = new Uint8Array(4096)
  for (let i = 0; i < 50; i++) {
    expect(swap.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, noisyPage(i, 0.5))).toBe(true)
  }
  limitBytes.bytes = 2 * MiB
  expect(swap.put(0, 50, noisyPage(50, 0.5))).toBe(Stored)
  store.check()
})

test('compaction gives memory back after most pages were flushed', () => {
  const store = open({ limitBytes: 16 * MiB })
  const pool = newPool(store, 'swap')
  let stored = 0
  while (pool.put(0, stored, noisyPage(stored, 0.2 + (stored % 7) / 20)) === Stored) stored++
  for (let i = 0; i < stored; i++) if (i % 10 !== 3) pool.flushPage(0, i)
  const before = store.stats().children[2]!.counters['chunk_bytes']!
  let ticks = 0
  while (store.tick({ pages: 64 }).pending) {
    store.check()
    expect(++ticks).toBeLessThan(1000)
  }
  const after = store.stats().children[2]!.counters
  expect(after['chunk_bytes']).toBeLessThan(before / 4)
  store.check()
  const into = new Uint8Array(4096)
  for (let i = 3; i < stored; i += 10) {
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, noisyPage(i, 0.2 + (i % 7) / 20))).toBe(true)
  }
  pool.destroy()
  store.tick({ pages: 64 })
  expect(store.stats().children[0]!.counters).toMatchObject({ zspages: 0, slot_bytes: 0 })
  expect(store.stats().children[2]!.counters).toMatchObject({ chunk_bytes: 0, runs: 0, run_bytes: 0 })
})

/** What an operation answers, or the code of what it throws. */
function outcomeOf(operation: () => number): number | string {
  try {
    return operation()
  } catch (error) {
    return error instanceof TmemError ? error.code : String(error)
  }
}

test.each([4 * KiB, 256 * KiB])('every flipped bit of a stored page of %i bytes is found', (pageSize) => {
  const chunks: ArrayBufferLike[] = []
  const allocator = {
    allocate: (bytes: number, site: string) => {
      const memory = systemAllocator.allocate(bytes, site)!
      if (site === 'zcache.chunk') chunks.push(memory)
      return memory
    },
  }
  const store = open({ limitBytes: 4 * MiB, incompressible: 'keep' }, { allocator })
  const swap = newPool(store, 'swap', pageSize)
  const cache = newPool(store, 'cache', pageSize)
  const into = new Uint8Array(pageSize).fill(0xee)
  const untouched = into.slice()
  for (const noise of [0.1, 1]) {
    const page = noisyPage(1, noise, pageSize)
    expect(swap.put(0, 0, page)).toBe(Stored)
    const memory = chunks
      .map((chunk) => new Uint8Array(chunk))
      .find((bytes) => {
        bytes[40]! ^= 1
        const hit = outcomeOf(() => swap.get(0, 0, into)) !== 'TMEM_CORRUPT'
        bytes[40]! ^= 1
        return !hit
      })!
    into.set(untouched)
    const step = pageSize === 4 * KiB ? 1 : 4999
    for (let bit = 32; bit < (noise === 1 ? 4096 : 100) * 8; bit += step) {
      memory[bit >> 3]! ^= 1 << (bit & 7)
      let error: unknown
      try {
        swap.get(0, 0, into)
      } catch (thrown) {
        error = thrown
      }
      memory[bit >> 3]! ^= 1 << (bit & 7)
      expect(error).toBeInstanceOf(TmemError)
      expect(error).toMatchObject({ code: 'TMEM_CORRUPT', layer: 'zcache', handle: 'pool 0 object 0 index 0' })
    }
    expect(sameBytes(into, untouched)).toBe(true)
    // With the bit as it was the page is there: it was kept.
    expect(swap.get(0, 0, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
    into.set(untouched)
    swap.flushPage(0, 0)
    expect(cache.put(0, 0, page)).toBe(Stored)
    for (const chunk of chunks) new Uint8Array(chunk)[40]! ^= 4
    expect(cache.get(0, 0, into)).toBe(Miss)
    expect(sameBytes(into, untouched)).toBe(true)
    expect(cache.get(0, 0, into)).toBe(Miss)
  }
  expect(store.stats().counters).toMatchObject({ corrupt_dropped: 2, live: 0 })
  store.check()
})

/** Opens a store whose allocation number `failing` fails, puts a page twice, and says what happened. */
function withFailure(failing: number): { site: string | undefined; story: string; charged: number } {
  const sites: string[] = []
  const allocator = {
    allocate: (bytes: number, site: string) => {
      sites.push(site)
      return sites.length - 1 === failing ? undefined : systemAllocator.allocate(bytes, site)
    },
  }
  const accounts = createAccounts()
  const story: string[] = []
  try {
    const store = open({ limitBytes: MiB }, { allocator, accounts })
    const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') story.push(poolRefusalName(pool))
    else {
      const page = noisyPage(1, 0.3)
      for (let i = 0; i < 2; i++) story.push(putOutcomeName(pool.put(0, 0, page)), getOutcomeName(pool.get(0, 0, page)))
      story.push(String(store.stats().counters['failed_alloc']))
      store.check()
      pool.destroy()
    }
  } catch (error) {
    story.push(error instanceof TmemError ? error.code : String(error))
  }
  return { site: sites[failing], story: story.join(' '), charged: accounts.charged(1) }
}

test('every allocation site may fail: at the start the layer does not open, later the put is refused', () => {
  const stories: Record<string, string> = {}
  for (let number = 0; ; number++) {
    const { site, story, charged } = withFailure(number)
    expect(charged).toBe(0)
    stories[site ?? 'none'] = story
    if (site === undefined) break
  }
  expect(stories).toEqual({
    'zcache.handles.state': 'TMEM_NO_MEMORY',
    'zcache.handles.entries': 'TMEM_NO_MEMORY',
    'zcache.handles.slots': 'TMEM_NO_MEMORY',
    'zcache.handles.objects': 'TMEM_NO_MEMORY',
    'zcache.handles.objectSlots': 'TMEM_NO_MEMORY',
    'zcache.entries': 'TMEM_NO_MEMORY',
    'zcache.arena': 'TMEM_NO_MEMORY',
    'zcache.page': 'NoMemory',
    'zcache.chunk': 'AllocationFailed Miss Stored Hit 1',
    none: 'Stored Hit Stored Hit 0',
  })
})

test('misuse throws before anything changes', () => {
  const pool = newPool(open({ limitBytes: MiB }), 'swap')
  const page = noisyPage(1, 0.2)
  pool.put(0, 0, page)
  expect(() => pool.put(0, 0, new Uint8Array(4095))).toThrow(RangeError)
  expect(() => pool.put(0, -1, page)).toThrow(RangeError)
  expect(() => pool.put(-1, 0, page)).toThrow(RangeError)
  expect(() => pool.put(1.5, 0, page)).toThrow(RangeError)
  expect(() => pool.put('x' as never, 0, page)).toThrow(TypeError)
  expect(() => pool.get(0, 0, [] as never)).toThrow(TypeError)
  expect(() => pool.putMany(new PageBatch(1, 8192))).toThrow(RangeError)
  expect(pool.get(0, 0, page)).toBe(Hit)
  for (const options of [
    { limitBytes: minLimitBytes - 1 },
    { limitBytes: Number.NaN },
    { limitBytes: MiB, zvMaxZsize: 5000 },
    { limitBytes: MiB, zvMaxMeanZsize: 0 },
    { limitBytes: MiB, incompressible: 'drop' as never },
  ])
    expect(() => zcache(options)).toThrow(RangeError)
})

test('the factory makes the layer from named options', () => {
  const layer = zcacheFactory.create({ limit: MiB, codec: 'lz4js', incompressible: 'keep' })
  expect(layer.name).toBe('zcache')
  const store = layer.open(undefined, { allocator: systemAllocator, accounts: createAccounts() })
  expect(store.stats().counters['limit_bytes']).toBe(MiB)
  expect(store.capabilities).toMatchObject({ ephemeral: true, persistent: true, shared: true, deferred: false })
})
