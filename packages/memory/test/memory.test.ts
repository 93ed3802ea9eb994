import type { Allocator, ClientAccounts, Layer, Pool, PoolAttributes, PoolRefusal as Refusal } from '@tmem/core'
import {
  ByteLimit,
  compose,
  createAccounts,
  GetOutcome,
  maxObjectId,
  PageBatch,
  PoolRefusal,
  PutOutcome,
  residentAllocator,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { HandleTable } from '@tmem/core/unstable'
import { describe, expect, test } from 'vitest'
import type { MemoryPool } from '../src/memory.ts'
import { MemoryStore, memory } from '../src/memory.ts'
import { pageOf } from './reference.ts'

const KiB = 1024
const MiB = 1024 * KiB

interface Opened {
  readonly store: MemoryStore
  readonly limit: ByteLimit
  readonly accounts: ClientAccounts
  /** Frames that fit. */
  readonly capacity: number
}

function open(limitBytes: number, allocator: Allocator = systemAllocator): Opened {
  const limit = new ByteLimit(limitBytes)
  const accounts = createAccounts()
  const store = new MemoryStore(limit, { allocator, accounts })
  return { store, limit, accounts, capacity: store.capabilities.reservedBytes / 4096 }
}

const kinds = {
  ephemeral: { persistent: false, shared: false },
  persistent: { persistent: true, shared: false },
  shared: { persistent: false, shared: true },
} as const

const attributes = (kind: keyof typeof kinds, pageSize = 4096, client = 0): PoolAttributes => ({
  client,
  pageSize,
  ...kinds[kind],
})

function poolOf(store: MemoryStore, kind: keyof typeof kinds, pageSize = 4096, client = 0): MemoryPool {
  return must(store.newPool(attributes(kind, pageSize, client)))
}

function must<P extends Pool>(pool: P | Refusal): P {
  if (typeof pool === 'number') throw new Error(`refused: ${pool}`)
  return pool
}

const counter = (store: { stats(): { counters: Readonly<Record<string, number>> } }, name: string): number =>
  store.stats().counters[name]

/** Puts pages 0 to count-1 of object 0, page i with the bytes of number `value + i × parts`. Returns the outcomes. */
const putAll = (pool: Pool, count: number, value = 1, object = 0): number[] => {
  const parts = pool.attributes.pageSize / 4096
  return Array.from({ length: count }, (_, i) => pool.put(object, i, pageOf(value + i * parts, parts)))
}

/**
 * Which of the pages are there with the right bytes; what is there with others is `wrong`. Takes those of private
 * pools.
 */
const heldOf = (pool: Pool, count: number, value = 1, object = 0): (number | 'wrong')[] => {
  const parts = pool.attributes.pageSize / 4096
  const into = Buffer.alloc(parts * 4096)
  const held: (number | 'wrong')[] = []
  for (let i = 0; i < count; i++)
    if (pool.get(object, i, into) === GetOutcome.Hit)
      held.push(into.equals(pageOf(value + i * parts, parts)) ? i : 'wrong')
  return held
}

const range = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, i) => from + i)

/** Ticks until nothing is left to do. */
const settle = (store: MemoryStore, pages: number): number => {
  let ticks = 1
  while (store.tick({ pages }).pending && ticks < 10_000) ticks++
  return ticks
}

describe('eviction', () => {
  test('takes the oldest page of a client first, and what was evicted stays away', () => {
    const { store, capacity } = open(MiB)
    const pool = poolOf(store, 'ephemeral')
    expect(putAll(pool, capacity + 20).every((outcome) => outcome === PutOutcome.Stored)).toBe(true)
    expect(counter(store, 'evicted_pages')).toBe(20)
    expect(heldOf(pool, capacity + 20)).toEqual(range(20, capacity + 20))
    // Now there is room, and still nothing of it comes back.
    expect(heldOf(pool, capacity + 20)).toEqual([])
  })

  test('a get from a shared pool makes a page young again, replacing it does not', () => {
    const { store, capacity } = open(MiB)
    const pool = poolOf(store, 'shared')
    putAll(pool, capacity)
    expect(pool.get(0, 0, Buffer.alloc(4096))).toBe(GetOutcome.Hit)
    expect(pool.lend(0, 1, () => undefined)).toBe(GetOutcome.Hit)
    pool.put(0, 2, pageOf(3, 1))
    for (let i = 0; i < 3; i++) pool.put(1, i, pageOf(9, 1))
    expect(heldOf(pool, 6)).toEqual([0, 1, 5])
  })

  test('a page that is read in parts from a shared pool is young as a whole', () => {
    const { store, capacity } = open(MiB)
    const pool = poolOf(store, 'shared', 8 * KiB)
    const parts = must(pool.split())
    putAll(pool, Math.floor(capacity / 2))
    expect(parts.get(0, 1, Buffer.alloc(4096))).toBe(GetOutcome.Hit)
    for (let i = 0; i < 3; i++) pool.put(1, i, pageOf(9, 2))
    expect(heldOf(pool, 5)).toEqual([0, 4])
  })

  test('never takes a persistent page: an ephemeral put is refused, a persistent one takes ephemeral pages', () => {
    const { store, capacity } = open(MiB)
    const persistent = poolOf(store, 'persistent')
    const ephemeral = poolOf(store, 'ephemeral')
    putAll(ephemeral, capacity)
    expect(putAll(persistent, capacity).every((outcome) => outcome === PutOutcome.Stored)).toBe(true)
    expect(heldOf(ephemeral, capacity)).toEqual([])
    expect(ephemeral.put(5, 5, pageOf(1, 1))).toBe(PutOutcome.NoMemory)
    expect(persistent.put(5, 5, pageOf(1, 1))).toBe(PutOutcome.NoMemory)
    expect(heldOf(persistent, capacity)).toEqual(range(0, capacity))
  })

  describe('DEVIATION: the quota test is the one that the design describes, not the inverted one', () => {
    /** Two clients fill the store half and half, oldest pages first those of client 2. */
    const halves = (weights: readonly number[]): { opened: Opened; pools: readonly MemoryPool[]; half: number } => {
      const opened = open(MiB)
      const pools = [1, 2].map((client) => poolOf(opened.store, 'shared', 4096, client))
      for (const [i, weight] of weights.entries()) opened.accounts.setWeight(i + 1, weight)
      const half = Math.floor(opened.capacity / 2)
      putAll(pools[1], opened.capacity - half)
      putAll(pools[0], half)
      return { opened, pools, half }
    }

    test('a client over its quota pays with its own oldest page', () => {
      const { pools, half } = halves([1, 3])
      expect(pools[0].put(1, 0, pageOf(9, 1))).toBe(PutOutcome.Stored)
      expect(heldOf(pools[0], half)).toEqual(range(1, half))
      expect(heldOf(pools[1], half)).toEqual(range(0, half))
    })

    test('pages of a pool that was handed over are the newest of its new client, and count as its own', () => {
      const { opened, pools, half } = halves([1, 1])
      expect(pools[0].handOver(2)).toBe(true)
      opened.store.check()
      expect(pools[0].put(1, 0, pageOf(9, 1))).toBe(PutOutcome.Stored)
      expect(heldOf(pools[0], half)).toEqual(range(0, half))
      expect(heldOf(pools[1], opened.capacity - half)).toEqual(range(1, opened.capacity - half))
      expect(pools[0].handOver(2)).toBe(true)
      opened.store.check()
    })

    test('a pool is not handed over where there is no room for another client, or to no client, or a persistent one', () => {
      const { store } = open(MiB)
      const pools = Array.from({ length: 64 }, (_, client) => poolOf(store, 'shared', 4096, client))
      poolOf(store, 'shared', 4096, 0)
      expect(pools[0].handOver(64)).toBe(false)
      expect(pools[0].handOver(63)).toBe(true)
      expect(() => pools[0].handOver(65536)).toThrow(RangeError)
      expect(() => poolOf(store, 'persistent', 4096, 5).handOver(6)).toThrow(RangeError)
      pools[0].destroy()
      expect(pools[0].handOver(64)).toBe(true)
      store.check()
    })

    test('a client within its quota does not: the one with the most pages per weight pays', () => {
      const { pools, half } = halves([1, 3])
      expect(pools[1].put(1, 0, pageOf(9, 1))).toBe(PutOutcome.Stored)
      expect(heldOf(pools[0], half)).toEqual(range(1, half))
      expect(heldOf(pools[1], half)).toEqual(range(0, half))
    })

    test('over its quota, a client pays even where another has more pages per weight', () => {
      const { store, accounts, capacity } = open(MiB)
      const pools = [1, 2, 3].map((client) => poolOf(store, 'shared', 4096, client))
      accounts.setWeight(1, 1)
      accounts.setWeight(2, 1)
      accounts.setWeight(3, 2)
      const third = Math.floor(capacity / 3)
      // Shares of pages 30 %, 60 % and 10 %, of weight 25 %, 25 % and 50 %.
      const counts = [Math.floor(third * 0.9), Math.floor(third * 1.8)]
      counts.push(capacity - counts[0] - counts[1])
      for (const [i, pool] of pools.entries()) putAll(pool, counts[i])
      expect(pools[0].put(1, 0, pageOf(9, 1))).toBe(PutOutcome.Stored)
      expect(pools.map((pool, i) => heldOf(pool, counts[i]).length)).toEqual([counts[0] - 1, counts[1], counts[2]])
      expect(pools[2].put(1, 0, pageOf(9, 1))).toBe(PutOutcome.Stored)
      expect(pools.map((pool, i) => heldOf(pool, counts[i]).length)).toEqual([counts[0] - 1, counts[1] - 1, counts[2]])
    })

    test('the most pages per weight is not the most pages', () => {
      const { store, accounts, capacity } = open(MiB)
      const pools = [1, 2, 3].map((client) => poolOf(store, 'shared', 4096, client))
      accounts.setWeight(1, 3)
      accounts.setWeight(2, 1)
      accounts.setWeight(3, 1)
      const most = Math.floor(capacity * 0.6)
      putAll(pools[0], most)
      putAll(pools[1], capacity - most)
      expect(pools[2].put(1, 0, pageOf(9, 1))).toBe(PutOutcome.Stored)
      expect(heldOf(pools[0], most).length).toBe(most)
      expect(heldOf(pools[1], capacity)).toEqual(range(1, capacity - most))
    })

    test('DEVIATION: without weights the client with the most pages pays, whoever’s page is the oldest', () => {
      const { store, capacity } = open(MiB)
      const small = poolOf(store, 'shared', 4096, 1)
      const large = poolOf(store, 'shared', 4096, 2)
      putAll(small, 20)
      putAll(large, capacity - 20)
      for (let i = 0; i < 10; i++) small.put(1, i, pageOf(9, 1))
      expect(heldOf(small, 20)).toEqual(range(0, 20))
      expect(heldOf(large, capacity)).toEqual(range(10, capacity - 20))
    })
  })
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
  const { store, limit, capacity } = open(4 * MiB, allocator)
  const pool = poolOf(store, 'persistent')
  const begun = asked
  for (let round = 0; round < 3; round++) {
    const outcomes = putAll(pool, capacity + 1, round, round)
    expect(outcomes.filter((outcome) => outcome === PutOutcome.Stored)).toHaveLength(capacity)
    pool.flushObject(round)
    limit.bytes = round % 2 === 0 ? MiB : 4 * MiB
    for (let n = 0; n < 100; n++) store.tick({ pages: 100 })
    limit.bytes = 4 * MiB
    store.check()
  }
  expect(asked).toBe(begun)
})

describe('refusing', () => {
  /** A store full of persistent pages, with `some` ephemeral ones among them, and a spy on whatever it calls. */
  const full = (
    limitBytes: number,
    some: number,
  ): { store: MemoryStore; pool: MemoryPool; limit: ByteLimit; calls: () => number } => {
    let calls = 0
    const allocator: Allocator = {
      allocate: (bytes, site) => {
        calls++
        return systemAllocator.allocate(bytes, site)
      },
    }
    const real = createAccounts()
    const limit = new ByteLimit(limitBytes)
    const store = new MemoryStore(limit, {
      allocator,
      accounts: {
        of: (client) => {
          const account = real.of(client)
          return {
            get weight() {
              calls++
              return account.weight
            },
            charge: (bytes) => {
              calls++
              return account.charge(bytes)
            },
            release: (bytes) => account.release(bytes),
          }
        },
      },
    })
    const pool = poolOf(store, 'persistent')
    const capacity = store.capabilities.reservedBytes / 4096
    putAll(poolOf(store, 'ephemeral', 4096, 1), some)
    const page = pageOf(1, 1)
    for (let i = 0; i < capacity - some; i++) pool.put(0, i, page)
    calls = 0
    return { store, pool, limit, calls: () => calls }
  }

  test('costs the same in a small and in a large store', () => {
    const work = [MiB, 64 * MiB].map((limitBytes) => {
      const { store, pool, calls } = full(limitBytes, 0)
      expect(pool.put(7, 7, pageOf(1, 1))).toBe(PutOutcome.NoMemory)
      return [calls(), counter(store, 'evicted_pages'), counter(store, 'moved_pages')]
    })
    expect(work).toEqual([
      [0, 0, 0],
      [0, 0, 0],
    ])
  })

  test('evicts a bounded number of pages before it gives up, however many there are', () => {
    const work = [MiB, 64 * MiB].map((limitBytes) => {
      const { store, capacity, limit } = open(limitBytes)
      const pool = poolOf(store, 'ephemeral')
      const page = pageOf(1, 1)
      for (let i = 0; i < capacity; i++) pool.put(0, i, page)
      limit.bytes = 0
      const huge = poolOf(store, 'ephemeral', 64 * KiB)
      expect(pool.put(1, 0, page)).toBe(PutOutcome.NoMemory)
      const single = counter(store, 'evicted_pages')
      expect(huge.put(1, 0, pageOf(1, 16))).toBe(PutOutcome.NoMemory)
      return [single, counter(store, 'evicted_pages') - single]
    })
    expect(work[1]).toEqual(work[0])
    expect(work[0][0]).toBeLessThanOrEqual(9)
    expect(work[0][1]).toBeLessThanOrEqual(24)
  })

  test('AllocationFailed when a chunk is not to be had, and then it works again', () => {
    let fails = false
    const opened = open(8 * MiB, {
      allocate: (bytes, site) => (fails && site === 'memory.chunk' ? undefined : systemAllocator.allocate(bytes, site)),
    })
    const pool = poolOf(opened.store, 'persistent')
    fails = true
    expect(pool.put(0, 0, pageOf(1, 1))).toBe(PutOutcome.AllocationFailed)
    fails = false
    expect(putAll(pool, 500).filter((outcome) => outcome !== PutOutcome.Stored)).toEqual([])
    fails = true
    expect(putAll(pool, 600).filter((outcome) => outcome !== PutOutcome.Stored).length).toBeGreaterThan(0)
    const held = 600 - putAll(pool, 600).filter((outcome) => outcome === PutOutcome.AllocationFailed).length
    expect(held).toBe(512)
    expect(heldOf(pool, 600)).toEqual(range(0, 512))
    // A refused replacement of a larger page leaves nothing behind, as any refused put.
    const large = poolOf(opened.store, 'persistent', 8 * KiB)
    expect(large.put(0, 0, pageOf(1, 2))).toBe(PutOutcome.AllocationFailed)
    expect(large.get(0, 0, Buffer.alloc(8 * KiB))).toBe(GetOutcome.Miss)
    fails = false
    expect(putAll(pool, 600).every((outcome) => outcome === PutOutcome.Stored)).toBe(true)
    expect(opened.accounts.charged(0)).toBe(600 * 4096)
    opened.store.check()
  })

  test('Quota: a client that only ever stores is stopped, others are not, and what goes is given back', () => {
    const { store, accounts } = open(MiB)
    accounts.setMaximum(3, 10 * 4096)
    const pool = poolOf(store, 'persistent', 4096, 3)
    const large = poolOf(store, 'persistent', 8 * KiB, 3)
    expect(putAll(pool, 12).map((outcome) => outcome === PutOutcome.Quota)).toEqual([
      ...Array(10).fill(false),
      true,
      true,
    ])
    expect(large.put(0, 0, pageOf(1, 2))).toBe(PutOutcome.Quota)
    expect(poolOf(store, 'persistent', 4096, 4).put(0, 0, pageOf(1, 1))).toBe(PutOutcome.Stored)
    expect(poolOf(store, 'ephemeral', 4096, 3).put(0, 0, pageOf(1, 1))).toBe(PutOutcome.Stored)
    // A replacement costs nothing more.
    expect(pool.put(0, 3, pageOf(99, 1))).toBe(PutOutcome.Stored)
    pool.flushPage(0, 0)
    expect(large.put(0, 0, pageOf(1, 2))).toBe(PutOutcome.Quota)
    pool.flushPage(0, 1)
    expect(large.put(0, 0, pageOf(1, 2))).toBe(PutOutcome.Stored)
    pool.destroy()
    large.destroy()
    expect(accounts.charged(3)).toBe(0)
  })

  test('handles made to collide are refused, charge nothing and lose nothing', () => {
    const { store, accounts, capacity } = open(MiB)
    // The same table as the store's, to find indexes with the same home in its first object.
    const twin = HandleTable.create({ capacity, queues: 64, pools: 256, allocator: systemAllocator, site: 'twin' })
    const home = (index: number): number => {
      const entry = twin.acquire()
      twin.insert(entry, 0, 0, index)
      const slots = new Int32Array(twin.memory.slots)
      const at = slots.findIndex((word) => word !== 0)
      twin.remove(entry)
      twin.release(entry)
      slots.fill(0)
      return at
    }
    const wanted = home(0)
    const colliding: number[] = []
    for (let index = 0; colliding.length < 140; index++) if (home(index) === wanted) colliding.push(index)
    const pool = poolOf(store, 'persistent')
    const outcomes = colliding.map((index, i) => pool.put(0, index, pageOf(1 + i, 1)))
    const stored = outcomes.filter((outcome) => outcome === PutOutcome.Stored).length
    expect(outcomes).toContain(PutOutcome.NoMemory)
    expect(stored).toBeGreaterThan(100)
    expect(accounts.charged(0)).toBe(stored * 4096)
    expect(counter(store, 'frames')).toBe(stored)
    const into = Buffer.alloc(4096)
    const right = colliding.map((index, i) =>
      pool.get(0, index, into) === GetOutcome.Hit ? into.equals(pageOf(1 + i, 1)) : outcomes[i] === PutOutcome.NoMemory,
    )
    expect(right).toEqual(colliding.map(() => true))
    store.check()
  })

  test('nothing is refused for the number of objects: one page each, and the bytes stay within the limit', () => {
    for (const limitBytes of [MiB, 6 * MiB]) {
      const { store, capacity, limit } = open(limitBytes)
      const pool = poolOf(store, 'persistent')
      // All chunks are there before the objects come.
      putAll(pool, capacity)
      pool.flushObject(0)
      const page = pageOf(1, 1)
      const outcomes = range(0, capacity).map((object) => pool.put(object, 0, page))
      expect(outcomes.filter((outcome) => outcome !== PutOutcome.Stored)).toEqual([])
      expect(counter(store, 'objects')).toBe(capacity)
      expect(counter(store, 'bytes')).toBeLessThanOrEqual(limit.bytes)
      // What is reported is what the allocator gave, as far as it was used.
      expect(counter(store, 'bytes')).toBeGreaterThan(limitBytes * 0.98)
    }
  })
})

describe('the byte limit', () => {
  test('metadata is at most 32 bytes for each 4 KiB where objects have many pages', () => {
    const { store, capacity } = open(512 * MiB)
    const pool = poolOf(store, 'ephemeral')
    for (let object = 0; object < 100; object++) pool.put(object, 0, pageOf(1, 1))
    expect(counter(store, 'metadata_bytes') / capacity).toBeLessThanOrEqual(32)
    expect(capacity * 4096).toBeGreaterThan(512 * MiB * 0.97)
  })

  test('and so it is of 100,000 pages with some room left, pools for all of it included', () => {
    const pages = 100_000
    const { store } = open(pages * (4096 + 96) + MiB)
    const pool = poolOf(store, 'persistent')
    const page = pageOf(1, 1)
    expect(range(0, pages).filter((index) => pool.put(0, index, page) !== PutOutcome.Stored)).toEqual([])
    expect(counter(store, 'metadata_bytes') / pages).toBeLessThanOrEqual(32)
    store.check()
  })

  test('a closed store holds no chunk', async () => {
    const { store } = open(8 * MiB)
    const pool = poolOf(store, 'persistent')
    for (let i = 0; i < 1000; i++) pool.put(0, i, pageOf(i, 1))
    expect(counter(store, 'chunks')).toBeGreaterThan(0)
    await store.close()
    expect(counter(store, 'chunks')).toBe(0)
  })

  test('memory reported is memory taken from the allocator', async () => {
    let allocated = 0
    const { store, limit } = open(6 * MiB, {
      allocate: (bytes, site) => {
        if (site === 'memory.chunk') allocated += bytes
        return systemAllocator.allocate(bytes, site)
      },
    })
    const pool = poolOf(store, 'persistent')
    for (let i = 0; i < 1400; i++) {
      pool.put(0, i, pageOf(i, 1))
      if (i % 100 !== 0) continue
      const { bytes, metadata_bytes, chunks } = store.stats().counters
      expect(bytes - metadata_bytes).toBe(allocated)
      expect(bytes).toBeLessThanOrEqual(limit.bytes)
      expect(chunks).toBe(Math.ceil(allocated / (2 * MiB)))
    }
    await store.close()
  })

  test('lowered to 0 and raised again: everything goes, all chunks are given back, and it works again', () => {
    const { store, limit, capacity } = open(6 * MiB)
    const pool = poolOf(store, 'ephemeral')
    const large = poolOf(store, 'shared', 64 * KiB)
    putAll(large, 20)
    putAll(pool, capacity - 320)
    limit.bytes = 0
    expect(pool.put(9, 9, pageOf(1, 1))).toBe(PutOutcome.NoMemory)
    settle(store, 100)
    expect(counter(store, 'pages')).toBe(0)
    expect(counter(store, 'chunks')).toBe(0)
    expect(counter(store, 'bytes')).toBe(counter(store, 'metadata_bytes'))
    expect(pool.put(9, 9, pageOf(1, 1))).toBe(PutOutcome.NoMemory)
    expect(heldOf(pool, capacity)).toEqual([])
    limit.bytes = limit.maximumBytes
    expect(putAll(pool, capacity).every((outcome) => outcome === PutOutcome.Stored)).toBe(true)
    expect(heldOf(pool, capacity)).toEqual(range(0, capacity))
    store.check()
  })

  test('lowered with persistent pages: they stay, and new ones are refused', () => {
    const { store, limit } = open(6 * MiB)
    const pool = poolOf(store, 'persistent')
    putAll(pool, 700)
    limit.bytes = 0
    settle(store, 50)
    expect(pool.put(9, 9, pageOf(1, 1))).toBe(PutOutcome.NoMemory)
    expect(pool.put(0, 9, pageOf(10, 1))).toBe(PutOutcome.Stored)
    // The second chunk cannot be emptied into the first, which is full.
    expect(counter(store, 'chunks')).toBe(2)
    for (let i = 500; i < 700; i++) pool.flushPage(0, i)
    settle(store, 50)
    expect(counter(store, 'chunks')).toBe(1)
    expect(heldOf(pool, 700)).toEqual(range(0, 500))
  })

  test('a tick never touches more pages than its budget, whatever their size', () => {
    for (const pages of [0, 1, 2, 7]) {
      const { store, limit } = open(18 * MiB)
      const huge = poolOf(store, 'ephemeral', 2 * MiB)
      const kept = poolOf(store, 'persistent', 64 * KiB)
      putAll(huge, 5)
      putAll(kept, 20)
      putAll(huge, 2, 5000, 1)
      limit.bytes = 3 * MiB
      const before = counter(store, 'pages')
      const progress = store.tick({ pages })
      expect(progress.pages).toBeLessThanOrEqual(pages)
      expect(before - counter(store, 'pages') + counter(store, 'moved_pages')).toBeLessThanOrEqual(pages)
      expect(progress.pending || pages === 0).toBe(true)
    }
  })

  test('compaction gives chunks back; every page keeps its bytes and its age', () => {
    for (const budget of [1, 17, 5000]) {
      const { store, limit } = open(14 * MiB + 300 * KiB)
      const persistent = poolOf(store, 'persistent')
      const shared = poolOf(store, 'shared', 4096, 1)
      const large = poolOf(store, 'persistent', 64 * KiB)
      const split = poolOf(store, 'shared', 64 * KiB, 2)
      const parts = must(split.split())
      for (let i = 0; i < 60; i++) {
        for (let k = 0; k < 16; k++) persistent.put(0, i * 16 + k, pageOf(1 + i * 16 + k, 1))
        for (let k = 0; k < 16; k++) shared.put(0, i * 16 + k, pageOf(1 + i * 16 + k, 1))
        if (i < 40) large.put(0, i, pageOf(1 + i * 16, 16))
        if (i < 10) split.put(0, i, pageOf(1 + i * 16, 16))
      }
      // One of eight stays, everywhere.
      for (let i = 0; i < 960; i++)
        if (i % 8 !== 0) {
          persistent.flushPage(0, i)
          shared.flushPage(0, i)
        }
      for (let i = 0; i < 40; i++) if (i % 8 !== 0) large.flushPage(0, i)
      for (let i = 0; i < 160; i++) if (i % 16 !== 5) parts.flushPage(0, i)
      // All memory is touched, so that nothing but compaction is left to do.
      settle(store, 5000)
      const chunks = counter(store, 'chunks')
      expect(chunks).toBeGreaterThan(4)
      limit.bytes = 4 * MiB
      settle(store, budget)
      expect(counter(store, 'bytes')).toBeLessThanOrEqual(limit.bytes)
      expect(counter(store, 'chunks')).toBeLessThan(chunks - 2)
      expect(counter(store, 'moved_pages')).toBeGreaterThan(50)
      expect(counter(store, 'evicted_pages')).toBe(0)
      store.check()
      const eighth = range(0, 120).map((i) => i * 8)
      expect(heldOf(persistent, 960)).toEqual(eighth)
      expect(heldOf(large, 40)).toEqual([0, 8, 16, 24, 32])
      const into = Buffer.alloc(4096)
      const rightParts = range(0, 10).filter(
        (i) => parts.get(0, i * 16 + 5, into) === GetOutcome.Hit && into.equals(pageOf(1 + i * 16 + 5, 1)),
      )
      expect(rightParts).toEqual(range(0, 10))
      // The oldest go first, as if nothing had been moved.
      limit.bytes = 0
      store.tick({ pages: 40 })
      limit.bytes = limit.maximumBytes
      expect(heldOf(shared, 960)).toEqual(eighth.slice(40))
      store.check()
    }
  })

  test('a frame of the caller’s is never moved', () => {
    const { store, limit } = open(6 * MiB)
    const pool = poolOf(store, 'persistent')
    putAll(pool, 512)
    const frame = pool.reserveFrame()
    putAll(pool, 20, 9000, 1)
    const at = pool.frameOffset(frame)
    const bytes = pool.frameBytes(frame)
    bytes.set(pageOf(77, 1), at)
    for (let i = 100; i < 512; i++) pool.flushPage(0, i)
    limit.bytes = 3 * MiB
    settle(store, 100)
    store.check()
    expect(counter(store, 'chunks')).toBe(2)
    expect(heldOf(pool, 20, 9000, 1)).toEqual(range(0, 20))
    limit.bytes = limit.maximumBytes
    putAll(pool, 600)
    expect(pool.frameBytes(frame)).toBe(bytes)
    expect(pool.frameOffset(frame)).toBe(at)
    expect(pool.putFrame(5, 5, frame)).toBe(PutOutcome.Stored)
    const into = Buffer.alloc(4096)
    pool.get(5, 5, into)
    expect(into.equals(pageOf(77, 1))).toBe(true)
  })
})

describe('large pages', () => {
  /** A store in which no two neighbouring frames are free, and `free` frames are. */
  const fragmented = (
    kind: keyof typeof kinds,
    pageSize: number,
  ): Opened & { filler: MemoryPool; pool: MemoryPool; parts: Pool; free: number } => {
    const opened = open(MiB)
    const filler = poolOf(opened.store, 'persistent', 4096, 9)
    const pool = poolOf(opened.store, kind, pageSize)
    putAll(filler, opened.capacity, 100_000)
    for (let i = 0; i < opened.capacity; i += 2) filler.flushPage(0, i)
    return { ...opened, filler, pool, parts: must(pool.split()), free: Math.ceil(opened.capacity / 2) }
  }

  test('lie in single frames where no run is free, and nobody can tell', () => {
    for (const kind of ['ephemeral', 'persistent', 'shared'] as const) {
      const { store, pool, parts, filler, accounts, capacity } = fragmented(kind, 64 * KiB)
      expect(putAll(pool, 3)).toEqual([0, 0, 0])
      store.check()
      expect(accounts.charged(0)).toBe(kind === 'persistent' ? 3 * 64 * KiB : 0)
      let lent: Uint8Array | undefined
      expect(
        pool.lend(0, 1, (bytes, at, length) => {
          lent = Buffer.from(bytes.subarray(at, at + length))
        }),
      ).toBe(GetOutcome.Hit)
      expect(pageOf(17, 16).equals(lent!)).toBe(true)
      expect(heldOf(pool, 3)).toEqual(kind === 'ephemeral' ? [0, 2] : [0, 1, 2])
      expect(counter(store, 'frames')).toBe(Math.floor(capacity / 2) + (kind === 'ephemeral' ? 0 : 48))
      // Replaced, in parts and as a whole; flushed in parts and as a whole.
      expect(pool.put(0, 0, pageOf(500, 16))).toBe(PutOutcome.Stored)
      expect(parts.put(0, 7, pageOf(900, 1))).toBe(PutOutcome.Stored)
      const into = Buffer.alloc(64 * KiB)
      const expected = pageOf(500, 16)
      expected.set(pageOf(900, 1), 7 * 4096)
      expect(pool.get(0, 0, into)).toBe(GetOutcome.Hit)
      expect(into.equals(expected)).toBe(true)
      pool.put(0, 0, pageOf(500, 16))
      parts.flushPage(0, 15)
      expect(pool.get(0, 0, into)).toBe(GetOutcome.Miss)
      expect(parts.get(0, 14, Buffer.alloc(4096))).toBe(GetOutcome.Hit)
      pool.flushPage(0, 0)
      pool.flushObject(0)
      expect(counter(store, 'frames')).toBe(Math.floor(capacity / 2))
      expect(accounts.charged(0)).toBe(0)
      expect(heldOf(filler, capacity, 100_000).length).toBe(Math.floor(capacity / 2))
      store.check()
    }
  })

  test('refused half-way, they leave nothing behind', () => {
    const { store, pool, free, accounts, capacity } = fragmented('persistent', 64 * KiB)
    const fit = Math.floor(free / 16)
    expect(putAll(pool, fit + 1)).toEqual([...Array(fit).fill(PutOutcome.Stored), PutOutcome.NoMemory])
    expect(accounts.charged(0)).toBe(fit * 64 * KiB)
    accounts.setMaximum(0, (fit * 16 - 8) * 4096)
    pool.flushPage(0, 0)
    expect(pool.put(0, 0, pageOf(1, 16))).toBe(PutOutcome.Quota)
    expect(accounts.charged(0)).toBe((fit - 1) * 64 * KiB)
    expect(counter(store, 'frames')).toBe(Math.floor(capacity / 2) + (fit - 1) * 16)
    expect(heldOf(pool, fit)).toEqual(range(1, fit))
    store.check()
  })

  test('a batch may evict what it has just stored, and no bytes get mixed up', () => {
    // Three pages of two frames: one run in two halves of a batch, then one that must lie scattered over an evicted
    // one.
    const { store, capacity, filler, pool } = fragmented('shared', 8 * KiB)
    const parts = must(pool.split())
    // One run of two frames besides, which the first entry gets.
    filler.flushPage(0, 101)
    const free = Math.ceil(capacity / 2) + 1
    const batch = new PageBatch(free, 8 * KiB)
    for (let i = 0; i < free; i++) {
      batch.push(0, i)
      batch.bytes.set(pageOf(1 + i * 2, 2), batch.offsets[i])
    }
    expect(pool.putMany(batch)).toBe(free)
    store.check()
    const into = Buffer.alloc(4096)
    const wrong = range(0, free * 2).filter(
      (i) => parts.get(0, i, into) === GetOutcome.Hit && !into.equals(pageOf(1 + i, 1)),
    )
    expect(wrong).toEqual([])
    expect(heldOf(pool, free).length).toBeGreaterThan(free / 2 - 2)
  })

  test('parts: put one by one they are a page, taken out of a whole page they leave the rest', () => {
    const { store } = open(MiB)
    const pool = poolOf(store, 'persistent', 16 * KiB)
    const parts = must(pool.split())
    const into = Buffer.alloc(16 * KiB)
    expect(parts.attributes).toEqual(attributes('persistent'))
    for (const part of [2, 0, 3]) expect(parts.put(5, 4 + part, pageOf(10 + part, 1))).toBe(PutOutcome.Stored)
    expect(pool.get(5, 1, into)).toBe(GetOutcome.Miss)
    expect(parts.put(5, 5, pageOf(11, 1))).toBe(PutOutcome.Stored)
    expect(pool.get(5, 1, into)).toBe(GetOutcome.Hit)
    expect(into.equals(pageOf(10, 4))).toBe(true)
    // A whole put over parts, a part into a whole, a part out of a whole.
    expect(pool.put(5, 1, pageOf(20, 4))).toBe(PutOutcome.Stored)
    expect(counter(store, 'pages')).toBe(1)
    expect(parts.put(5, 6, pageOf(99, 1))).toBe(PutOutcome.Stored)
    expect(counter(store, 'pages')).toBe(1)
    parts.flushPage(5, 4)
    expect(counter(store, 'pages')).toBe(3)
    expect(pool.get(5, 1, into)).toBe(GetOutcome.Miss)
    const part = Buffer.alloc(4096)
    expect([4, 5, 6, 7].map((index) => parts.get(5, index, part))).toEqual([1, 0, 0, 0])
    expect(part.equals(pageOf(23, 1))).toBe(true)
    pool.flushPage(5, 1)
    expect([4, 5, 6, 7].map((index) => parts.get(5, index, part))).toEqual([1, 1, 1, 1])
    expect(counter(store, 'frames')).toBe(0)
  })

  test('a get of a part takes just that part out of a private ephemeral page', () => {
    const { store } = open(MiB)
    const pool = poolOf(store, 'ephemeral', 8 * KiB)
    const parts = must(pool.split())
    const into = Buffer.alloc(4096)
    pool.put(1, 0, pageOf(30, 2))
    expect(parts.get(1, 1, into)).toBe(GetOutcome.Hit)
    expect(into.equals(pageOf(31, 1))).toBe(true)
    expect(parts.get(1, 1, into)).toBe(GetOutcome.Miss)
    expect(parts.get(1, 0, into)).toBe(GetOutcome.Hit)
    expect(into.equals(pageOf(30, 1))).toBe(true)
    expect(counter(store, 'frames')).toBe(0)
  })

  test('every size from 4 KiB to 2 MiB in one store, at both ends of the indexes', () => {
    const { store } = open(64 * MiB)
    for (let pageSize = 4096; pageSize <= 2 * MiB; pageSize *= 2) {
      const count = pageSize / 4096
      const pool = poolOf(store, 'persistent', pageSize)
      const last = 2 ** 32 / count - 1
      const into = Buffer.alloc(pageSize)
      for (const index of [0, 1, last - 1, last]) {
        expect(pool.put(maxObjectId, index, pageOf(index % 1000, count))).toBe(PutOutcome.Stored)
        expect(pool.get(maxObjectId, index, into)).toBe(GetOutcome.Hit)
        expect(into.equals(pageOf(index % 1000, count))).toBe(true)
      }
      expect(() => pool.put(0, last + 1, into)).toThrow(RangeError)
      expect(must(pool.split()).get(maxObjectId, 2 ** 32 - 1, Buffer.alloc(4096))).toBe(GetOutcome.Hit)
    }
    store.check()
  })

  test('a page size that does not fit eight times is refused', () => {
    const { store } = open(MiB)
    expect(store.capabilities.maxPageSize).toBe(64 * KiB)
    expect(store.newPool(attributes('ephemeral', 128 * KiB))).toBe(PoolRefusal.BadPageSize)
  })
})

describe('batches', () => {
  const batchOf = (handles: readonly (readonly [object: number, index: number])[]): PageBatch => {
    const batch = new PageBatch(Math.max(1, handles.length), 4096)
    for (const [i, [object, index]] of handles.entries()) {
      batch.push(object, index)
      batch.bytes.set(pageOf(100 + i, 1), i * 4096)
    }
    return batch
  }

  test('the last of several puts of one handle wins', () => {
    const pool = poolOf(open(MiB).store, 'persistent')
    const batch = batchOf([
      [1, 1],
      [2, 2],
      [1, 1],
      [1, 1],
    ])
    expect(pool.putMany(batch)).toBe(4)
    const into = Buffer.alloc(4096)
    pool.get(1, 1, into)
    expect(into.equals(pageOf(103, 1))).toBe(true)
  })

  test('each entry has its own outcome: stored, refused, and left alone', () => {
    const { store, accounts } = open(MiB)
    accounts.setMaximum(0, 2 * 4096)
    const pool = poolOf(store, 'persistent')
    pool.put(4, 4, pageOf(1, 1))
    const batch = batchOf([
      [1, 1],
      [2, 2],
      [3, 3],
      [4, 4],
    ])
    batch.outcomes[2] = PutOutcome.Incompressible
    // A layer above took it: the copy here must go, which makes room in the quota for nothing that came before.
    batch.outcomes[3] = PutOutcome.Stored
    expect(pool.putMany(batch)).toBe(2)
    expect([...batch.outcomes.subarray(0, 4)]).toEqual([
      PutOutcome.Stored,
      PutOutcome.Quota,
      PutOutcome.Incompressible,
      PutOutcome.Stored,
    ])
    expect(pool.get(4, 4, Buffer.alloc(4096))).toBe(GetOutcome.Miss)
    expect(accounts.charged(0)).toBe(4096)
  })

  test('a private ephemeral page is hit once in a batch', () => {
    const pool = poolOf(open(MiB).store, 'ephemeral')
    pool.put(1, 1, pageOf(7, 1))
    const batch = batchOf([
      [1, 1],
      [1, 1],
    ])
    batch.bytes.fill(0)
    expect(pool.getMany(batch)).toBe(1)
    expect([...batch.outcomes]).toEqual([GetOutcome.Hit, GetOutcome.Miss])
    expect(Buffer.from(batch.bytes.subarray(0, 4096)).equals(pageOf(7, 1))).toBe(true)
    expect(batch.bytes.subarray(4096).every((byte) => byte === 0)).toBe(true)
  })

  test('flushMany flushes every entry, whatever its outcome says; an empty batch does nothing', () => {
    const { store } = open(MiB)
    const pool = poolOf(store, 'persistent')
    const batch = batchOf([
      [1, 1],
      [2, 2],
      [3, 3],
    ])
    pool.putMany(batch)
    pool.flushMany(batch)
    expect(counter(store, 'pages')).toBe(0)
    batch.clear()
    expect(pool.putMany(batch)).toBe(0)
    expect(pool.getMany(batch)).toBe(0)
  })

  test('of a pool that is gone answers PoolGone and Miss to every entry that waits', () => {
    const pool = poolOf(open(MiB).store, 'persistent')
    pool.destroy()
    const batch = batchOf([
      [1, 1],
      [2, 2],
    ])
    batch.outcomes[0] = PutOutcome.Stored
    expect(pool.putMany(batch)).toBe(1)
    expect([...batch.outcomes]).toEqual([PutOutcome.Stored, PutOutcome.PoolGone])
    batch.rearm()
    expect(pool.getMany(batch)).toBe(0)
    expect([...batch.outcomes]).toEqual([GetOutcome.Miss, GetOutcome.Miss])
  })
})

describe('lending', () => {
  test('gives the bytes without a copy, and takes the page out of a private ephemeral pool afterwards', () => {
    const { store } = open(MiB)
    for (const kind of ['ephemeral', 'persistent', 'shared'] as const) {
      const pool = poolOf(store, kind)
      pool.put(1, 1, pageOf(5, 1))
      const seen: unknown[] = []
      const borrow = (): number =>
        pool.lend(1, 1, (bytes, at, length) => {
          seen.push(Buffer.from(bytes.buffer, bytes.byteOffset + at, length).equals(pageOf(5, 1)))
          expect(counter(store, 'pages')).toBeGreaterThan(0)
        })
      expect(borrow()).toBe(GetOutcome.Hit)
      expect(borrow()).toBe(kind === 'ephemeral' ? GetOutcome.Miss : GetOutcome.Hit)
      expect(seen).toEqual(kind === 'ephemeral' ? [true] : [true, true])
      pool.destroy()
    }
  })

  test('a borrower that throws leaves the page where it is', () => {
    const { store } = open(MiB)
    const pool = poolOf(store, 'ephemeral')
    pool.put(1, 1, pageOf(5, 1))
    expect(() =>
      pool.lend(1, 1, () => {
        throw new Error('borrower')
      }),
    ).toThrow('borrower')
    expect(pool.get(1, 1, Buffer.alloc(4096))).toBe(GetOutcome.Hit)
    store.check()
  })

  test('the borrower may use the store, destroy the pool and close the store', async () => {
    const { store, limit } = open(MiB)
    const pool = poolOf(store, 'ephemeral')
    const uses: ((use: MemoryPool) => unknown)[] = [
      (use) => use.flushPage(1, 1),
      (use) => use.flushObject(1),
      (use) => use.get(1, 1, Buffer.alloc(4096)),
      (use) => use.lend(1, 1, () => undefined),
      (use) => putAll(use, 400, 1, 2),
      (use) => use.takeFrame(1, 1),
      () => {
        limit.bytes = 0
        store.tick({ pages: 1000 })
        limit.bytes = limit.maximumBytes
      },
      (use) => use.destroy(),
      () => store.close(),
    ]
    for (const use of uses) {
      const borrowed = store.newPool(attributes('ephemeral'))
      if (typeof borrowed === 'number') break
      borrowed.put(1, 1, pageOf(5, 1))
      expect(borrowed.lend(1, 1, () => void use(borrowed))).toBe(GetOutcome.Hit)
      expect(borrowed.get(1, 1, Buffer.alloc(4096))).toBe(GetOutcome.Miss)
      store.check()
    }
    expect(pool.put(1, 1, pageOf(1, 1))).toBe(PutOutcome.PoolGone)
    await store.close()
  })

  test('what another handle stores meanwhile is not taken for what was lent', () => {
    const { store } = open(MiB)
    const pool = poolOf(store, 'ephemeral')
    pool.put(1, 1, pageOf(5, 1))
    pool.lend(1, 1, () => {
      // The same frame, a moment later another page’s.
      pool.flushPage(1, 1)
      pool.put(2, 2, pageOf(6, 1))
    })
    expect(pool.get(2, 2, Buffer.alloc(4096))).toBe(GetOutcome.Hit)
    expect(counter(store, 'pages')).toBe(0)
    pool.put(1, 1, pageOf(5, 1))
    pool.lend(1, 1, () => {
      // The same handle, another page in another frame.
      pool.flushPage(1, 1)
      pool.put(2, 2, pageOf(6, 1))
      pool.put(1, 1, pageOf(7, 1))
    })
    const into = Buffer.alloc(4096)
    expect(pool.get(1, 1, into)).toBe(GetOutcome.Hit)
    expect(into.equals(pageOf(7, 1))).toBe(true)
    expect(pool.get(2, 2, into)).toBe(GetOutcome.Hit)
  })
})

describe('the exchange of frames', () => {
  test('a frame is zeroed, counts against the limit, and its bytes become the page without a copy', () => {
    const { store, capacity } = open(MiB)
    const pool = poolOf(store, 'persistent')
    putAll(pool, capacity)
    expect(pool.reserveFrame()).toBe(-PutOutcome.NoMemory)
    pool.flushPage(0, 7)
    const frame = pool.reserveFrame()
    const bytes = pool.frameBytes(frame).subarray(pool.frameOffset(frame), pool.frameOffset(frame) + 4096)
    expect(bytes.every((byte) => byte === 0)).toBe(true)
    expect(pool.put(9, 9, pageOf(1, 1))).toBe(PutOutcome.NoMemory)
    bytes.set(pageOf(8, 1))
    expect(pool.putFrame(0, 7, frame)).toBe(PutOutcome.Stored)
    expect(() => pool.freeFrame(frame)).toThrow(RangeError)
    expect(heldOf(pool, capacity)).toEqual(range(0, capacity))
    const taken = pool.takeFrame(0, 7)
    expect(taken).toBe(frame)
    expect(pool.takeFrame(0, 7)).toBe(-1)
    expect(Buffer.from(bytes).equals(pageOf(8, 1))).toBe(true)
    pool.freeFrame(taken)
    expect(pool.put(9, 9, pageOf(1, 1))).toBe(PutOutcome.Stored)
    store.check()
  })

  test('refused, it stays the caller’s, and nothing is left under the handle', () => {
    const { store, accounts } = open(MiB)
    const pool = poolOf(store, 'persistent')
    const frame = pool.reserveFrame()
    pool.frameBytes(frame).set(pageOf(4, 1), pool.frameOffset(frame))
    pool.put(1, 1, pageOf(1, 1))
    accounts.setMaximum(0, 0)
    expect(pool.putFrame(1, 1, frame)).toBe(PutOutcome.Quota)
    expect(pool.get(1, 1, Buffer.alloc(4096))).toBe(GetOutcome.Miss)
    accounts.setMaximum(0, MiB)
    pool.freeze()
    expect(pool.putFrame(1, 1, frame)).toBe(PutOutcome.Frozen)
    pool.thaw()
    expect(pool.putFrame(1, 1, frame)).toBe(PutOutcome.Stored)
    const into = Buffer.alloc(4096)
    pool.get(1, 1, into)
    expect(into.equals(pageOf(4, 1))).toBe(true)
    const other = pool.reserveFrame()
    pool.destroy()
    expect(pool.putFrame(1, 1, other)).toBe(PutOutcome.PoolGone)
    expect(pool.reserveFrame()).toBe(-PutOutcome.PoolGone)
    expect(pool.takeFrame(1, 1)).toBe(-1)
    pool.freeFrame(other)
    expect(counter(store, 'frames')).toBe(0)
    store.check()
  })

  test('a frame of another page size is not taken', () => {
    const { store } = open(MiB)
    const small = poolOf(store, 'persistent')
    const large = poolOf(store, 'persistent', 8 * KiB)
    const frame = small.reserveFrame()
    expect(() => large.putFrame(0, 0, frame)).toThrow(RangeError)
    expect(small.putFrame(0, 0, frame)).toBe(PutOutcome.Stored)
  })
})

describe('pools', () => {
  test('freezing refuses new handles and nothing else', () => {
    const pool = poolOf(open(MiB).store, 'persistent')
    pool.put(1, 1, pageOf(1, 1))
    pool.freeze()
    expect(pool.put(1, 2, pageOf(2, 1))).toBe(PutOutcome.Frozen)
    expect(pool.put(1, 1, pageOf(3, 1))).toBe(PutOutcome.Stored)
    expect(pool.get(1, 1, Buffer.alloc(4096))).toBe(GetOutcome.Hit)
    pool.flushPage(1, 1)
    expect(pool.put(1, 1, pageOf(3, 1))).toBe(PutOutcome.Frozen)
    pool.thaw()
    expect(pool.put(1, 1, pageOf(3, 1))).toBe(PutOutcome.Stored)
  })

  test('pages of a destroyed pool are out of reach, also for the next pool in its place', () => {
    const { store, accounts } = open(MiB)
    const old = poolOf(store, 'persistent', 8 * KiB)
    const oldParts = must(old.split())
    putAll(old, 10)
    old.destroy()
    expect(accounts.charged(0)).toBe(0)
    const fresh = poolOf(store, 'persistent', 8 * KiB)
    expect(heldOf(fresh, 10)).toEqual([])
    putAll(fresh, 10)
    for (const gone of [old, old.split(), oldParts].map(must)) {
      const page = Buffer.alloc(gone.attributes.pageSize)
      expect(gone.put(0, 0, page)).toBe(PutOutcome.PoolGone)
      expect(gone.get(0, 0, page)).toBe(GetOutcome.Miss)
      gone.flushPage(0, 1)
      gone.flushObject(0)
      gone.freeze()
      gone.destroy()
    }
    expect(fresh.put(0, 11, Buffer.alloc(8 * KiB))).toBe(PutOutcome.Stored)
    expect(heldOf(fresh, 10)).toEqual(range(0, 10))
  })

  test('there are 256 of them, of 64 clients, and closing ends them all', async () => {
    const { store } = open(MiB)
    const pools = range(0, 256).map((i) => poolOf(store, 'ephemeral', 4096, 1000 + (i % 64)))
    expect(store.newPool(attributes('ephemeral', 4096, 1000))).toBe(PoolRefusal.NoSlot)
    for (const pool of pools) expect(pool.put(0, 0, pageOf(1, 1))).toBe(PutOutcome.Stored)
    pools[5].destroy()
    expect(store.newPool(attributes('ephemeral', 4096, 2000))).toBe(PoolRefusal.NoSlot)
    for (const pool of pools.slice(6).filter((some) => some.attributes.client === 1005)) pool.destroy()
    expect(typeof store.newPool(attributes('ephemeral', 4096, 2000))).toBe('object')
    await store.close()
    await store.close()
    expect(store.newPool(attributes('ephemeral'))).toBe(PoolRefusal.Closed)
    expect(pools[0].put(0, 0, pageOf(1, 1))).toBe(PutOutcome.PoolGone)
    expect(counter(store, 'pages')).toBe(0)
    expect(store.tick({ pages: 100 })).toEqual({ pages: 0, pending: false })
  })

  test('a larger store has more of them, of more clients: what it has room for, and not one more', async () => {
    const { store } = open(512 * MiB)
    // A pool for each 256 KiB, less what is metadata; a client for each MiB.
    const pools = range(0, 1900).map((i) => poolOf(store, i % 2 === 0 ? 'ephemeral' : 'persistent', 4096, i % 500))
    for (const [i, pool] of pools.entries()) expect(pool.put(7, i, pageOf(i & 0xff, 1))).toBe(PutOutcome.Stored)
    const more: number[] = []
    for (let client = 500; typeof store.newPool(attributes('ephemeral', 4096, client)) !== 'number'; client++)
      more.push(client)
    expect(more.length).toBeGreaterThan(0)
    expect(more.length).toBeLessThan(12 + 1)
    for (let left = 2048 - 1900 - more.length; left > 0; left--)
      if (typeof store.newPool(attributes('ephemeral', 4096, 0)) === 'number') break
    expect(store.newPool(attributes('ephemeral', 4096, 0))).toBe(PoolRefusal.NoSlot)
    const into = pageOf(0, 1)
    for (const [i, pool] of pools.entries()) {
      expect(pool.get(7, i, into)).toBe(GetOutcome.Hit)
      expect(Buffer.compare(into, pageOf(i & 0xff, 1))).toBe(0)
    }
    store.check()
    await store.close()
  })

  test('misuse throws before anything changed', () => {
    const { store } = open(MiB)
    const pool = poolOf(store, 'persistent')
    pool.put(1, 1, pageOf(5, 1))
    const before = store.stats().counters['pages']
    const page = Buffer.alloc(4096)
    for (const bad of [Buffer.alloc(4095), Buffer.alloc(8192), new ArrayBuffer(4096), undefined]) {
      expect(() => pool.put(1, 1, bad as Uint8Array)).toThrow(/page must/)
      expect(() => pool.get(1, 1, bad as Uint8Array)).toThrow(/page must/)
    }
    for (const index of [-1, 2 ** 32, 0.5, Number.NaN]) {
      expect(() => pool.put(1, index, page)).toThrow(RangeError)
      expect(() => pool.get(1, index, page)).toThrow(RangeError)
      expect(() => pool.flushPage(1, index)).toThrow(RangeError)
      expect(() => pool.lend(1, index, () => undefined)).toThrow(RangeError)
      expect(() => pool.takeFrame(1, index)).toThrow(RangeError)
    }
    for (const object of [-1, 1.5, 2 ** 53, -1n, maxObjectId + 1n]) {
      expect(() => pool.put(object, 1, page)).toThrow(RangeError)
      expect(() => pool.get(object, 1, page)).toThrow(RangeError)
      expect(() => pool.flushPage(object, 1)).toThrow(RangeError)
      expect(() => pool.flushObject(object)).toThrow(RangeError)
    }
    expect(() => pool.putMany(new PageBatch(1, 8192))).toThrow(RangeError)
    expect(() => pool.putMany({} as PageBatch)).toThrow(TypeError)
    for (const wrong of [
      { client: -1 },
      { client: 65536 },
      { client: 0.5 },
      { pageSize: 4097 },
      { pageSize: 2048 },
      { pageSize: 4 * MiB },
      { persistent: 1 },
    ])
      expect(() => store.newPool({ ...attributes('ephemeral'), ...wrong } as PoolAttributes)).toThrow(/must be/)
    expect(store.stats().counters['pages']).toBe(before)
    expect(pool.get(1, 1, page)).toBe(GetOutcome.Hit)
    expect(page.equals(pageOf(5, 1))).toBe(true)
    store.check()
  })
})

describe('opening', () => {
  test('a limit without room for a page is refused, and one just large enough works', () => {
    expect(() => open(24 * KiB)).toThrow(/no room for a page/)
    expect(() => memory({ limitBytes: 1000 })).toThrow(RangeError)
    // A place needs less than a store by itself.
    expect(() => compose([memory({ limitBytes: 8192 })])).toThrow(/memory cannot be the last layer: .*no room/)
    const { store, capacity } = open(29 * KiB)
    expect(capacity).toBe(1)
    const pool = poolOf(store, 'persistent')
    expect(putAll(pool, 2)).toEqual([PutOutcome.Stored, PutOutcome.NoMemory])
    expect(heldOf(pool, 2)).toEqual([0])
  })

  test('every allocation that fails at the start is an error that says what to do', () => {
    const sites = new Set<string>()
    open(MiB, {
      allocate: (bytes, site) => {
        sites.add(site)
        return systemAllocator.allocate(bytes, site)
      },
    })
    expect(sites.size).toBeGreaterThan(4)
    for (const failing of sites) {
      let error: unknown
      try {
        open(MiB, {
          allocate: (bytes, site) => (site === failing ? undefined : systemAllocator.allocate(bytes, site)),
        })
      } catch (thrown) {
        error = thrown
      }
      expect(error).toBeInstanceOf(TmemError)
      expect(error).toMatchObject({ code: 'TMEM_NO_MEMORY', message: expect.stringMatching(/give a smaller limit/) })
    }
  })

  test('a pool of large pages without memory for its scratch is refused', () => {
    let fails = false
    const { store } = open(MiB, {
      allocate: (bytes, site) => (fails ? undefined : systemAllocator.allocate(bytes, site)),
    })
    fails = true
    expect(store.newPool(attributes('ephemeral', 8 * KiB))).toBe(PoolRefusal.NoMemory)
    fails = false
    expect(typeof store.newPool(attributes('ephemeral', 8 * KiB))).toBe('object')
  })

  test('two stores in one process do not disturb one another', () => {
    const one = open(MiB)
    const two = open(6 * MiB)
    const pools = [poolOf(one.store, 'persistent'), poolOf(two.store, 'persistent')]
    for (let i = 0; i < 1000; i++)
      for (const [k, pool] of pools.entries()) pool.put(i % 7, i, pageOf(1 + i + k * 5000, 1))
    expect(counter(one.store, 'pages')).toBe(one.capacity)
    expect(counter(two.store, 'pages')).toBe(1000)
    const into = Buffer.alloc(4096)
    const right = pools.map(
      (pool, k) =>
        range(0, 1000).filter((i) => pool.get(i % 7, i, into) === 0 && into.equals(pageOf(1 + i + k * 5000, 1))).length,
    )
    expect(right).toEqual([one.capacity, 1000])
    one.limit.bytes = 0
    pools[0].destroy()
    settle(one.store, 1000)
    expect(counter(two.store, 'pages')).toBe(1000)
    expect(two.accounts.charged(0)).toBe(1000 * 4096)
    expect(one.accounts.charged(0)).toBe(0)
    one.store.check()
    two.store.check()
  })
})

test('pages are read once, as long as nobody else looks at them', () => {
  const plain = memory({ limitBytes: MiB })
  const filter: Layer = {
    name: 'filter',
    plan: (below) => below ?? 'it keeps no pages',
    // It says of itself what is true below it.
    open: (next) => next!,
  }
  expect(compose([plain]).capabilities.readsOnce).toBe(true)
  expect(compose([filter, plain]).capabilities.readsOnce).toBeUndefined()
  expect(compose([plain], { check: 'model' }).capabilities.readsOnce).toBeUndefined()
  expect(compose([plain, memory({ limitBytes: MiB })]).capabilities.readsOnce).toBeUndefined()
})
