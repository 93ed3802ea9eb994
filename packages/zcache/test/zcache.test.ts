/** A zcache as the only place of a stack: what is stored comes back, within a hard limit, whatever fails. */

import { createCodec } from '@tmem/codecs'
import {
  type Allocator,
  ByteLimit,
  createAccounts,
  GetOutcome,
  getOutcomeName,
  type Pool,
  PutOutcome,
  poolRefusalName,
  putOutcomeName,
  residentAllocator,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { expect, test } from 'vitest'
import { random } from '../../../tools/random.ts'
import { xvmalloc, zbud } from '../src/history.ts'
import { maxPagesFor, minLimitBytes, zcache, zcacheFactory } from '../src/index.ts'
import { KiB, MiB, newPool, noisyPage, open, type Stack, sameBytes, settle } from './pages.ts'

const { Stored, NoMemory, Quota, AllocationFailed } = PutOutcome
const { Hit, Miss } = GetOutcome

test('a page comes back as it was stored, and later writes to the caller’s page do not matter', () => {
  const stack = open({ limitBytes: MiB })
  const pool = newPool(stack, 'swap')
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
  stack.check()
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
  const stack = open({ limitBytes: 16 * MiB })
  const pool = newPool(stack, 'swap', size * KiB)
  const into = new Uint8Array(size * KiB)
  const pages = [0.02, 0.3, 0.6].map((noise, i) => noisyPage(i + 1, noise, size * KiB))
  for (const [i, page] of pages.entries()) expect(pool.put(1, i, page)).toBe(Stored)
  stack.check()
  pages.forEach((page, i) => {
    expect(pool.get(1, i, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
  })
  for (const page of pages) expect(pool.put(1, 1, page)).toBe(Stored)
  stack.check()
  pool.flushObject(1)
  stack.check()
  expect(stack.counters()).toMatchObject({ zpages: 0, zbytes: 0, orig_bytes: 0, slot_bytes: 0 })
})

test('a large page may be partly same-filled and partly random', () => {
  const stack = open({ limitBytes: 8 * MiB })
  const pool = newPool(stack, 'swap', 2 * MiB)
  const page = new Uint8Array(2 * MiB)
  page.set(noisyPage(5, 1, 256 * KiB), 512 * KiB)
  expect(pool.put(0, 0, page)).toBe(Stored)
  const into = new Uint8Array(2 * MiB).fill(9)
  expect(pool.get(0, 0, into)).toBe(Hit)
  expect(sameBytes(into, page)).toBe(true)
  expect(stack.chain()['same_filled_pages']).toBe(28)
  expect(stack.counters()).toMatchObject({ zpages: 4, raw_pages: 4, zbytes: 256 * KiB, orig_bytes: 256 * KiB })
  pool.flushPage(0, 0)
  expect(stack.counters()).toMatchObject({ zpages: 0, raw_pages: 0, orig_bytes: 0 })
  stack.check()
})

test('a page that repeats one word takes no place here', () => {
  const stack = open({ limitBytes: MiB })
  const pool = newPool(stack, 'swap')
  const into = new Uint8Array(4096).fill(77)
  const words = [[0], [255], [1, 2], [1, 2, 3, 0x84], [0x80, 0x80, 0x80, 0x80]]
  const pages = words.map((word) => Uint8Array.from({ length: 4096 }, (_, i) => word[i % word.length]!))
  for (const [i, page] of pages.entries()) expect(pool.put(0, i, page)).toBe(Stored)
  expect(stack.counters()).toMatchObject({ zpages: 0, zbytes: 0 })
  expect(stack.counters('zsmalloc')).toMatchObject({ zspages: 0, slot_bytes: 0 })
  pages.forEach((page, i) => {
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
  })
  // One byte off anywhere is another page.
  for (const at of [0, 5, 15, 16, 17, 2047, 2048, 4088, 4095]) {
    const page = new Uint8Array(4096)
    page[at] = 1
    pool.put(1, at, page)
    expect(pool.get(1, at, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
  }
  expect(stack.counters()['zpages']).toBe(9)
  stack.check()
})

test('every codec of this runtime can be used', () => {
  const into = new Uint8Array(4096)
  const page = noisyPage(1, 0.2)
  for (const codec of ['lz4', 'lz4js', 'deflate'] as const) {
    const stack = open({ limitBytes: MiB, codec })
    const pool = newPool(stack, 'swap')
    expect(pool.put(0, 0, page)).toBe(Stored)
    expect(pool.get(0, 0, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
    const alone = new Uint8Array(8192)
    expect(stack.counters()['zbytes']).toBe(createCodec(codec).compress(page, 0, 4096, alone, 0, 4096))
  }
  expect(() => open({ limitBytes: MiB, codec: 'lzo' as never })).toThrow(
    expect.objectContaining({ code: 'TMEM_UNSUPPORTED', layer: 'zcache' }),
  )
})

test('no allocation and no page takes it over its limit', () => {
  let given = 0
  const allocator: Allocator = {
    allocate: (bytes, site) => {
      if (site === 'zcache.chunk') given += bytes
      return systemAllocator.allocate(bytes, site)
    },
  }
  const stack = open({ limitBytes: 2 * MiB }, { allocator })
  const pool = newPool(stack, 'swap')
  for (let i = 0; i < 6000; i++) {
    pool.put(i % 50, i, noisyPage(i, (i % 10) / 12))
    expect(stack.counters()['used_bytes']).toBeLessThanOrEqual(2 * MiB)
  }
  expect(given).toBeLessThanOrEqual(2 * MiB)
  expect(given).toBeGreaterThan(1.5 * MiB)
  stack.check()
})

test('zero pages are bounded, too', () => {
  const pool = newPool(open({ limitBytes: minLimitBytes }), 'swap')
  const zero = new Uint8Array(4096)
  let stored = 0
  while (pool.put(0, stored, zero) === Stored) stored++
  expect(stored).toBe(maxPagesFor(minLimitBytes))
  pool.flushPage(0, 0)
  expect(pool.put(0, stored, zero)).toBe(Stored)
})

test('what a client is charged covers its blocks, and is given back', () => {
  const accounts = createAccounts({ maximumBytes: 20_000 })
  const stack = open({ limitBytes: MiB }, { accounts })
  const pool = newPool(stack, 'swap')
  let stored = 0
  while (pool.put(0, stored, noisyPage(stored, 0.4)) === Stored) stored++
  expect(stored).toBeGreaterThan(5)
  expect(pool.put(0, stored, noisyPage(stored, 0.4))).toBe(Quota)
  expect(accounts.charged(1)).toBeGreaterThan(stack.counters()['zbytes']!)
  expect(newPool(stack, 'cache').put(0, 0, noisyPage(1, 0.4))).toBe(Stored)
  pool.destroy()
  expect(accounts.charged(1)).toBe(0)
  stack.check()
})

test('persistent pages eat ephemeral ones, the oldest first; a shared get makes a page young again', () => {
  const stack = open({ limitBytes: MiB })
  const cache = newPool(stack, 'shared')
  const swap = newPool(stack, 'swap')
  const into = new Uint8Array(4096)
  const dropped = (): number => stack.counters('moves')['dropped_ephemeral']!
  let cached = 0
  while (dropped() === 0) expect(cache.put(0, cached++, noisyPage(cached, 0.5))).toBe(Stored)
  let oldest = 0
  while (cache.get(0, oldest, into) === Miss) oldest++
  // That get made the oldest page the youngest.
  const before = dropped()
  let swapped = 0
  while (dropped() < before + 10) expect(swap.put(0, swapped++, noisyPage(swapped, 0.5))).toBe(Stored)
  expect(cache.get(0, oldest, into)).toBe(Hit)
  expect(cache.get(0, oldest + 1, into)).toBe(Miss)
  // In the end there are only persistent pages, and they are never dropped.
  let outcome: PutOutcome = Stored
  while (outcome === Stored) outcome = swap.put(0, swapped++, noisyPage(swapped, 0.5))
  expect(outcome).toBe(NoMemory)
  expect(stack.counters('order')).toMatchObject({ ephemeral_pages: 0, main_pages: swapped - 1 })
  for (let i = 0; i < swapped - 1; i++) expect(swap.get(0, i, into)).toBe(Hit)
  stack.check()
})

test('the limit can be lowered to nothing and raised again while pages are there', () => {
  const limitBytes = new ByteLimit(2 * MiB)
  const stack = open({ limitBytes })
  const cache = newPool(stack, 'cache')
  const swap = newPool(stack, 'swap')
  for (let i = 0; i < 400; i++) cache.put(0, i, noisyPage(i, 0.5))
  for (let i = 0; i < 50; i++) swap.put(0, i, noisyPage(i, 0.5))
  limitBytes.bytes = 0
  // There may be a slot for it, but no more memory.
  const before = stack.counters()['used_bytes']!
  swap.put(0, 50, noisyPage(50, 0.5))
  swap.flushPage(0, 50)
  expect(stack.counters()['used_bytes']).toBeLessThanOrEqual(before)
  settle(stack, 100)
  expect(stack.counters('order')).toMatchObject({ ephemeral_pages: 0, main_pages: 50 })
  stack.check()
  const into = new Uint8Array(4096)
  for (let i = 0; i < 50; i++) {
    expect(swap.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, noisyPage(i, 0.5))).toBe(true)
  }
  limitBytes.bytes = 2 * MiB
  expect(swap.put(0, 50, noisyPage(50, 0.5))).toBe(Stored)
  stack.check()
})

test('compaction gives memory back after most pages were flushed', () => {
  const stack = open({ limitBytes: 16 * MiB })
  const pool = newPool(stack, 'swap')
  let stored = 0
  while (pool.put(0, stored, noisyPage(stored, 0.2 + (stored % 7) / 20)) === Stored) stored++
  for (let i = 0; i < stored; i++) if (i % 10 !== 3) pool.flushPage(0, i)
  const before = stack.counters('arena')['chunk_bytes']!
  for (let ticks = 0; stack.store.tick({ pages: 64 }).pending; ticks++) {
    stack.check()
    expect(ticks).toBeLessThan(1000)
  }
  expect(stack.counters('arena')['chunk_bytes']).toBeLessThan(before / 4)
  stack.check()
  const into = new Uint8Array(4096)
  for (let i = 3; i < stored; i += 10) {
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, noisyPage(i, 0.2 + (i % 7) / 20))).toBe(true)
  }
  pool.destroy()
  settle(stack, 64)
  expect(stack.counters('zsmalloc')).toMatchObject({ zspages: 0, slot_bytes: 0 })
  expect(stack.counters('arena')).toMatchObject({ chunk_bytes: 0, runs: 0, run_bytes: 0 })
})

test('a put moves blocks together when its own finds no place among them', () => {
  const stack = open({ limitBytes: 2 * MiB })
  const pool = newPool(stack, 'swap')
  let stored = 0
  while (pool.put(0, stored, noisyPage(stored, 0.2)) === Stored) stored++
  for (let i = 0; i < stored; i += 2) pool.flushPage(0, i)
  // Half of the memory is free, in slots of another size.
  for (let i = 0; i < stored / 16; i++) expect(pool.put(1, i, noisyPage(i, 0.8))).toBe(Stored)
  expect(stack.counters()['pages_compacted']).toBeGreaterThan(0)
  stack.check()
  const into = new Uint8Array(4096)
  for (let i = 1; i < stored; i += 2) {
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, noisyPage(i, 0.2))).toBe(true)
  }
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
  const stack = open({ limitBytes: 4 * MiB }, { allocator })
  const pool = newPool(stack, 'swap')
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
    stack.check()
    for (const [n, page] of held) {
      expect(pool.get(round, n, into)).toBe(Hit)
      expect(sameBytes(into, page)).toBe(true)
    }
    pool.flushObject(round)
    settle(stack)
    stack.check()
  }
  expect(stack.counters('arena')['chunks_returned']).toBeGreaterThan(10)
  expect(asked).toBe(begun)
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
  const allocator: Allocator = {
    allocate: (bytes, site) => {
      const memory = systemAllocator.allocate(bytes, site)!
      if (site === 'zcache.chunk') chunks.push(memory)
      return memory
    },
  }
  const stack = open({ limitBytes: 4 * MiB }, { allocator })
  const swap = newPool(stack, 'swap', pageSize)
  const cache = newPool(stack, 'cache', pageSize)
  const into = new Uint8Array(pageSize).fill(0xee)
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
    const step = pageSize === 4 * KiB ? 1 : 4999
    const { zbytes, zpages } = stack.counters()
    for (let bit = 32; bit < 32 + Math.floor(zbytes! / zpages! / 2) * 8; bit += step) {
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
    // With the bit as it was the page is there: it was kept.
    expect(swap.get(0, 0, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
    swap.flushPage(0, 0)
    expect(cache.put(0, 0, page)).toBe(Stored)
    for (const chunk of chunks) new Uint8Array(chunk)[40]! ^= 4
    expect(cache.get(0, 0, into)).toBe(Miss)
    expect(cache.get(0, 0, into)).toBe(Miss)
  }
  expect(stack.counters()).toMatchObject({ zpages: 0 })
  expect(stack.chain()).toMatchObject({ corrupt_dropped: 2 })
  stack.check()
})

/** Opens a store whose allocation number `failing` fails, puts a page twice, and says what happened. */
function withFailure(failing: number): { site: string | undefined; story: string; charged: number } {
  const sites: string[] = []
  const allocator: Allocator = {
    allocate: (bytes, site) => {
      sites.push(site)
      return sites.length - 1 === failing ? undefined : systemAllocator.allocate(bytes, site)
    },
  }
  const accounts = createAccounts()
  const story: string[] = []
  try {
    const stack = open({ limitBytes: MiB }, { allocator, accounts })
    const pool = stack.store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') story.push(poolRefusalName(pool))
    else {
      const page = noisyPage(1, 0.3)
      for (let i = 0; i < 2; i++) story.push(putOutcomeName(pool.put(0, 0, page)), getOutcomeName(pool.get(0, 0, page)))
      const { failed_alloc, failed_getfreepages } = stack.counters()
      story.push(`${failed_alloc} ${failed_getfreepages}`)
      stack.check()
      pool.destroy()
    }
  } catch (error) {
    story.push(error instanceof TmemError ? error.code : String(error))
  }
  return { site: sites[failing], story: story.join(' '), charged: accounts.charged(1) }
}

test('every allocation may fail: at the start the stack does not open, later the put is refused', () => {
  const stories = new Map<string | undefined, string>()
  for (let number = 0; !stories.has(undefined); number++) {
    const { site, story, charged } = withFailure(number)
    expect(charged).toBe(0)
    stories.set(site, story)
  }
  expect(stories.get(undefined)).toBe('Stored Hit Stored Hit 0 0')
  expect(stories.get('zcache.chunk')).toBe('AllocationFailed Miss Stored Hit 1 1')
  expect(stories.has('zcache.arena')).toBe(true)
  stories.delete(undefined)
  stories.delete('zcache.chunk')
  expect(new Set(stories.values())).toEqual(new Set(['TMEM_NO_MEMORY', 'NoMemory']))
})

test('memory is asked for before a put changes anything, so an allocator may use the stack to find some', () => {
  const opened: { stack?: Stack; pool?: Pool } = {}
  let inside = 0
  let deepest = 0
  let index = 0
  const into = new Uint8Array(4096)
  const allocator: Allocator = {
    allocate: (bytes, site) => {
      if (site !== 'zcache.chunk') return systemAllocator.allocate(bytes, site)
      inside++
      deepest = Math.max(deepest, inside)
      // Reclaim: everything that a caller may do, in the middle of somebody else's put.
      opened.pool!.flushPage(0, index)
      opened.pool!.get(0, index + 1, into)
      if (inside < 3) opened.pool!.put(1, index, noisyPage(index, 0.5))
      opened.stack!.store.tick({ pages: 10 })
      inside--
      return index % 3 === 0 ? undefined : systemAllocator.allocate(bytes, site)
    },
  }
  opened.stack = open({ limitBytes: 2 * MiB }, { allocator })
  opened.pool = newPool(opened.stack, 'swap')
  const outcomes = new Set<number>()
  for (; index < 1500; index++) {
    const outcome = opened.pool.put(0, index, noisyPage(index, 0.5))
    outcomes.add(outcome)
    expect(opened.pool.get(0, index, into)).toBe(outcome === Stored ? Hit : Miss)
    if (index % 50 === 0) opened.stack.check()
  }
  expect(deepest).toBeGreaterThan(1)
  expect(outcomes).toEqual(new Set([Stored, NoMemory, AllocationFailed]))
  opened.stack.check()
})

test('a pool that is destroyed while memory is being found stores nothing', () => {
  const opened: { pool?: Pool } = {}
  const allocator: Allocator = {
    allocate: (bytes, site) => {
      if (site === 'zcache.chunk') opened.pool!.destroy()
      return systemAllocator.allocate(bytes, site)
    },
  }
  const stack = open({ limitBytes: 2 * MiB }, { allocator })
  opened.pool = newPool(stack, 'swap')
  expect(opened.pool.put(0, 0, noisyPage(0, 0.5))).toBe(PutOutcome.PoolGone)
  stack.check()
})

test('a closed stack holds nothing', async () => {
  const stack = open({ limitBytes: MiB })
  const pool = newPool(stack, 'swap')
  for (let i = 0; i < 100; i++) pool.put(0, i, noisyPage(i, 0.3))
  await Promise.all([stack.store.close(), stack.store.close()])
  expect(stack.counters('arena')).toMatchObject({ chunks: 0, spare_chunks: 0, run_bytes: 0 })
  expect(stack.counters()).toMatchObject({ zpages: 0, zbytes: 0 })
})

/** A page that does not shrink. */
const randomPage = (seed: number): Uint8Array => {
  const next = random(seed)
  return Uint8Array.from({ length: 4096 }, () => next() * 256)
}

test.each([
  ['xvmalloc', xvmalloc, 4088],
  ['zbud', zbud, 4000],
] as const)('%s keeps blocks as well, up to the size that it has a place for', (name, allocator, largest) => {
  const stack = open({ limitBytes: MiB, allocator })
  const pool = newPool(stack, 'swap')
  const into = new Uint8Array(4096)
  const next = random(4)
  let kept = 0
  let poor = 0
  for (let i = 0; i < 150; i++) {
    const page = i % 10 === 0 ? randomPage(i) : noisyPage(i, next())
    const outcome = pool.put(0, i, page)
    const fits = createCodec('lz4').compress(page, 0, 4096, new Uint8Array(8192), 0, largest) > 0
    expect(outcome).toBe(fits ? Stored : PutOutcome.Incompressible)
    if (!fits) {
      poor++
      continue
    }
    kept++
    expect(pool.get(0, i, into)).toBe(Hit)
    expect(sameBytes(into, page)).toBe(true)
  }
  expect(poor).toBeGreaterThan(2)
  expect(stack.counters()).toMatchObject({ zpages: kept, compress_poor: poor })
  expect(stack.counters(name)).toMatchObject({ zpages: kept })
  stack.check()
})

test('settings that make no sense are refused', () => {
  for (const options of [
    { limitBytes: minLimitBytes - 1 },
    { limitBytes: Number.NaN },
    { limitBytes: MiB, zvMaxZsize: 5000 },
    { limitBytes: MiB, zvMaxMeanZsize: 0 },
    { limitBytes: MiB, zvPageCountPolicyPercent: 151 },
    { limitBytes: MiB, incompressible: 'drop' as never },
  ])
    expect(() => zcache(options)).toThrow(RangeError)
})

test('the factory makes the layer from named options', () => {
  const layer = zcacheFactory.create({ limit: MiB, codec: 'lz4js', incompressible: 'keep', zvMaxZsize: 3584 })
  expect(layer.name).toBe('zcache')
  expect(layer.place!.traits).toMatchObject({ persistent: true, ephemeral: true, waits: false, capacity: 2048 })
})
