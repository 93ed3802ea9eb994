import type { Layer, PageStore, Pool, PoolAttributes, StatsNode } from '@tmem/core'
import {
  compose,
  GetOutcome,
  PageBatch,
  Pending,
  PoolRefusal,
  PutOutcome,
  parseStack,
  planStack,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'
import {
  corrupt,
  corruptFactory,
  count,
  countFactory,
  delay,
  delayFactory,
  discard,
  discardFactory,
  failingAllocator,
  refuse,
  refuseFactory,
  TraceLog,
  traceFactory,
} from '../src/index.ts'

const persistent: PoolAttributes = { client: 1, persistent: true, shared: false, pageSize: 4096 }
const ephemeral: PoolAttributes = { ...persistent, persistent: false }
const room = (): Layer => memory({ limitBytes: 4 * 2 ** 20 })
const page = (seed: number, size = 4096): Uint8Array => new Uint8Array(size).fill(seed)

function poolOf(store: PageStore, attributes: PoolAttributes = persistent): Pool {
  const pool = store.newPool(attributes)
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return pool
}

function get(pool: Pool, object: number, index: number): Uint8Array | undefined {
  const into = page(0, pool.attributes.pageSize)
  return pool.get(object, index, into) === GetOutcome.Hit ? into : undefined
}

function batchOf(handles: readonly (readonly [number, number])[]): PageBatch {
  const batch = new PageBatch(handles.length)
  for (const [object, index] of handles) batch.bytes.fill(object, batch.offsets[batch.push(object, index)])
  return batch
}

/** Counters of every layer of that name, from the top. */
function counters(store: PageStore, name: string): Readonly<Record<string, number>>[] {
  const found: Readonly<Record<string, number>>[] = []
  const visit = (node: StatsNode): void => {
    if (node.name === name) found.push(node.counters)
    for (const child of node.children) visit(child)
  }
  visit(store.stats())
  return found
}

describe('refuse', () => {
  test('refuses every n-th put, over all pools, and leaves no older page behind', () => {
    const store = compose([refuse({ every: 3, reason: PutOutcome.NoMemory }), room()])
    const a = poolOf(store)
    const b = poolOf(store, ephemeral)
    expect(a.put(1, 0, page(1))).toBe(PutOutcome.Stored)
    expect(b.put(1, 0, page(2))).toBe(PutOutcome.Stored)
    expect(a.put(1, 0, page(3))).toBe(PutOutcome.NoMemory)
    expect(get(a, 1, 0)).toBeUndefined()
    expect(get(b, 1, 0)).toEqual(page(2))
    expect(a.put(1, 0, page(4))).toBe(PutOutcome.Stored)
    expect(get(a, 1, 0)).toEqual(page(4))
    expect(counters(store, 'refuse')).toEqual([{ puts: 4, refused: 1 }])
  })

  test('counts the entries of a batch, which crosses it once and loses the older pages of what is refused', () => {
    const store = compose([refuse({ every: 2 }), count(), room()])
    const pool = poolOf(store)
    pool.put(9, 0, page(9))
    const batch = batchOf([
      [1, 0],
      [2, 0],
      [9, 0],
      [4, 0],
    ])
    batch.outcomes[3] = PutOutcome.Incompressible
    expect(pool.putMany(batch)).toBe(1)
    expect([...batch.outcomes]).toEqual([
      PutOutcome.Policy,
      PutOutcome.Stored,
      PutOutcome.Policy,
      PutOutcome.Incompressible,
    ])
    expect(get(pool, 2, 0)).toEqual(page(2))
    for (const object of [1, 9, 4]) expect(get(pool, object, 0)).toBeUndefined()
    expect(counters(store, 'count')[0]).toMatchObject({ put: 1, putMany: 1, flushPage: 0, flushMany: 0 })
  })

  test('counts the parts of a split pool with the others', () => {
    const store = compose([refuse({ every: 2 }), room()])
    const pool = poolOf(store, { ...persistent, pageSize: 8192 })
    const parts = pool.split()
    if (typeof parts === 'number') throw new Error('no parts')
    expect(pool.put(1, 0, page(1, 8192))).toBe(PutOutcome.Stored)
    expect(parts.put(1, 1, page(2))).toBe(PutOutcome.Policy)
    expect(get(pool, 1, 0)).toBeUndefined()
    expect(get(parts, 1, 0)).toEqual(page(1))
  })

  test('says PoolGone where the pool is gone', async () => {
    const store = compose([refuse({ every: 1 }), room()])
    const pool = poolOf(store)
    const other = poolOf(store)
    pool.destroy()
    expect(pool.put(1, 0, page(1))).toBe(PutOutcome.PoolGone)
    await store.close()
    expect(other.put(1, 0, page(1))).toBe(PutOutcome.PoolGone)
  })

  test('takes no nonsense', () => {
    for (const every of [0, -1, 1.5, Number.NaN]) expect(() => refuse({ every })).toThrow(RangeError)
    expect(() => refuse({ every: 1, reason: PutOutcome.Stored })).toThrow(RangeError)
  })
})

describe('delay', () => {
  /** A scheduler for tests: turns come when it says so, in the order that it says. */
  const scheduler = (): { turn: () => Promise<void>; waiting: (() => void)[] } => {
    const waiting: (() => void)[] = []
    return { waiting, turn: () => new Promise((resolve) => waiting.push(resolve)) }
  }

  test('answers hits with Deferred and misses at once; a fetch waits for its turn', async () => {
    const { turn, waiting } = scheduler()
    const store = compose([delay({ turn }), room()], { check: 'model' })
    const pool = poolOf(store)
    pool.put(1, 0, page(1))
    pool.put(1, 1, page(2))
    const into = page(9)
    expect(pool.get(1, 0, into)).toBe(GetOutcome.Deferred)
    expect(into).toEqual(page(9))
    expect(pool.get(1, 7, into)).toBe(GetOutcome.Miss)
    expect(pool.lend(1, 0, () => undefined)).toBe(GetOutcome.Deferred)
    const order: number[] = []
    const pages = [page(0), page(0)]
    const fetches = pages.map((target, i) => pool.fetch(1, i, target).then((outcome) => order.push(i, outcome)))
    expect(waiting.length).toBe(2)
    waiting[1]!()
    await fetches[1]
    waiting[0]!()
    await fetches[0]
    expect(order).toEqual([1, GetOutcome.Hit, 0, GetOutcome.Hit])
    expect(pages).toEqual([page(1), page(2)])
  })

  test('knows what a fetch took out, what was flushed, and what a put in between brought', async () => {
    const { turn, waiting } = scheduler()
    const pool = poolOf(compose([delay({ turn }), room()], { check: 'model' }), ephemeral)
    const into = page(0)
    pool.put(1, 0, page(1))
    const fetching = pool.fetch(1, 0, into)
    pool.put(1, 0, page(2))
    waiting.shift()!()
    expect(await fetching).toBe(GetOutcome.Hit)
    expect(into).toEqual(page(2))
    expect(pool.get(1, 0, into)).toBe(GetOutcome.Miss)
    for (const object of [1, 2, 3]) pool.put(object, 0, page(object))
    pool.flushPage(1, 0)
    pool.flushObject(2)
    pool.flushMany(batchOf([[3, 0]]))
    for (const object of [1, 2, 3]) expect(pool.get(object, 0, into)).toBe(GetOutcome.Miss)
  })

  test('refuses what its book has no room for, and makes room when pages go', () => {
    const store = compose([delay({ turn: () => Promise.resolve(), pages: 3 }), room()], { check: 'model' })
    const pool = poolOf(store, { ...persistent, pageSize: 8192 })
    const small = poolOf(store)
    expect(pool.put(1, 0, page(1, 8192))).toBe(PutOutcome.Stored)
    expect(pool.put(1, 1, page(1, 8192))).toBe(PutOutcome.NoMemory)
    expect(small.put(1, 0, page(1))).toBe(PutOutcome.Stored)
    expect(small.put(1, 1, page(1))).toBe(PutOutcome.NoMemory)
    const batch = batchOf([
      [1, 1],
      [1, 0],
    ])
    expect(small.putMany(batch)).toBe(1)
    expect([...batch.outcomes]).toEqual([PutOutcome.NoMemory, PutOutcome.Stored])
    expect(counters(store, 'delay')[0]).toMatchObject({ booked_pages: 3, refused_no_memory: 3 })
    pool.destroy()
    expect(counters(store, 'delay')[0]).toMatchObject({ booked_pages: 1 })
    expect(small.put(1, 1, page(1))).toBe(PutOutcome.Stored)
  })

  test('has 256 pools at once', () => {
    const store = compose([delay({ turn: () => Promise.resolve(), pages: 16 }), discard()])
    const pools = Array.from({ length: 256 }, () => poolOf(store))
    expect(store.newPool(persistent)).toBe(PoolRefusal.NoSlot)
    pools[7]!.destroy()
    pools[7]!.destroy()
    expect(typeof store.newPool(persistent)).toBe('object')
    expect(store.newPool(persistent)).toBe(PoolRefusal.NoSlot)
  })
})

describe('corrupt', () => {
  const bitsOff = (a: Uint8Array, b: Uint8Array): number =>
    a.reduce((sum, byte, i) => sum + (byte ^ b[i]!).toString(2).replaceAll('0', '').length, 0)

  test('flips one bit in every n-th page that is got, the same bits for the same seed', async () => {
    const run = async (seed: number): Promise<Uint8Array[]> => {
      const pool = poolOf(compose([corrupt({ every: 2, seed }), room()]))
      pool.put(1, 0, page(1))
      const pages: Uint8Array[] = []
      for (let i = 0; i < 2; i++) pages.push(get(pool, 1, 0)!)
      for (let i = 0; i < 2; i++) {
        const into = page(0)
        await pool.fetch(1, 0, into)
        pages.push(into)
      }
      const batch = batchOf([
        [1, 0],
        [8, 8],
        [1, 0],
      ])
      pool.getMany(batch)
      pages.push(batch.bytes.slice(0, 4096), batch.bytes.slice(8192))
      for (let i = 0; i < 2; i++)
        pool.lend(1, 0, (bytes, at, length) => {
          pages.push(bytes.slice(at, at + length))
        })
      return pages
    }
    const pages = await run(5)
    expect(pages.map((got) => bitsOff(got, page(1)))).toEqual([0, 1, 0, 1, 0, 1, 0, 1])
    expect(await run(5)).toEqual(pages)
    expect(await run(6)).not.toEqual(pages)
  })

  test('is caught by the model boundary', () => {
    const pool = poolOf(compose([corrupt({ every: 1 }), room()], { check: 'model' }))
    pool.put(1, 0, page(1))
    expect(() => get(pool, 1, 0)).toThrow(expect.objectContaining({ code: 'TMEM_BROKEN' }))
  })

  test('refuses a pool when there is no memory for its page', () => {
    const allocator = failingAllocator(systemAllocator)
    const store = compose([corrupt({ every: 1 }), room()], { allocator })
    allocator.fail({ sites: ['corrupt.page'] })
    expect(store.newPool(persistent)).toBe(PoolRefusal.NoMemory)
    allocator.fail('none')
    expect(typeof store.newPool(persistent)).toBe('object')
  })
})

describe('count', () => {
  test('a batch of 512 pages crosses every layer of a stack once', () => {
    const small = memory({ limitBytes: 400_000 })
    const layers = [count(), refuse({ every: 100 }), count(), corrupt({ every: 2 ** 30 }), count(), small, room()]
    const store = compose(layers, { check: 'model' })
    const pool = poolOf(store)
    const batch = batchOf(Array.from({ length: 512 }, (_, i) => [i + 1, i] as const))
    const stored = pool.putMany(batch)
    expect(stored).toBeGreaterThan(400)
    batch.rearm()
    expect(pool.getMany(batch)).toBe(stored)
    pool.flushMany(batch)
    const crossings = counters(store, 'count')
    expect(crossings.length).toBe(3)
    for (const crossed of crossings)
      expect(crossed).toMatchObject({ putMany: 1, getMany: 1, flushMany: 1, put: 0, get: 0, flushPage: 0, newPool: 1 })
  })

  test('does not say that it reads pages once, because others of the kind do not', () => {
    expect(compose([room()]).capabilities.readsOnce).toBe(true)
    expect(compose([count(), room()]).capabilities).not.toHaveProperty('readsOnce')
    expect(planStack([count(), room()])).not.toHaveProperty('readsOnce')
  })

  test('counts every operation', async () => {
    const store = compose([count(), room()])
    const pool = poolOf(store)
    pool.put(1, 0, page(1))
    get(pool, 1, 0)
    await pool.fetch(1, 0, page(0))
    pool.lend(1, 0, () => undefined)
    pool.flushPage(1, 0)
    pool.flushObject(1)
    const parts = pool.split() as Pool
    parts.put(1, 0, page(1))
    pool.freeze()
    pool.thaw()
    store.tick({ pages: 1 })
    pool.destroy()
    const [layer] = counters(store, 'count')
    expect(layer).toEqual({
      newPool: 1,
      put: 2,
      get: 1,
      fetch: 1,
      flushPage: 1,
      flushObject: 1,
      putMany: 0,
      getMany: 0,
      flushMany: 0,
      replace: 0,
      replaceMany: 0,
      release: 0,
      lend: 1,
      split: 1,
      freeze: 1,
      thaw: 1,
      destroy: 1,
      tick: 1,
      sync: 0,
    })
  })
})

describe('discard', () => {
  test('refuses every page, or takes and forgets ephemeral ones', () => {
    const refusing = poolOf(compose([discard()]))
    expect(refusing.put(1, 0, page(1))).toBe(PutOutcome.Policy)
    expect(get(refusing, 1, 0)).toBeUndefined()
    const store = compose([discard({ mode: 'lose' })])
    expect(store.newPool(persistent)).toBe(PoolRefusal.Unsupported)
    const losing = poolOf(store, ephemeral)
    expect(losing.put(1, 0, page(1))).toBe(PutOutcome.Stored)
    expect(get(losing, 1, 0)).toBeUndefined()
    expect(counters(store, 'discard')).toEqual([{ puts: 1, gets: 1, flushes: 0 }])
  })

  test('is the end of a stack, and the other layers are not', () => {
    expect(() => compose([discard(), room()])).toThrow('discard cannot stand above memory: it passes nothing on')
    for (const layer of [
      refuse({ every: 1 }),
      count(),
      corrupt({ every: 1 }),
      delay({ turn: () => Promise.resolve() }),
    ])
      expect(() => compose([layer])).toThrow(`${layer.name} cannot be the last layer`)
  })
})

describe('failingAllocator', () => {
  test('fails the n-th request, every request of a site, all or none, and lists the sites', () => {
    const allocator = failingAllocator(systemAllocator, { nth: 2 })
    const ask = (...sites: string[]): boolean[] => sites.map((site) => allocator.allocate(8, site) !== undefined)
    expect(ask('a', 'b', 'a', 'c')).toEqual([true, false, true, true])
    expect([...allocator.sites]).toEqual([
      ['a', 2],
      ['b', 1],
      ['c', 1],
    ])
    expect([allocator.requests, allocator.failures]).toEqual([4, 1])
    allocator.fail({ sites: ['a', 'c'] })
    expect(allocator.requests).toBe(0)
    expect(ask('a', 'b', 'c')).toEqual([false, true, false])
    allocator.fail('all')
    expect(ask('a', 'b')).toEqual([false, false])
    allocator.fail('none')
    expect(ask('a', 'b')).toEqual([true, true])
    for (const nth of [0, -1, 1.5]) expect(() => failingAllocator(systemAllocator, { nth })).toThrow(RangeError)
  })

  test.each([
    ['refuse.marks', refuse({ every: 1 })],
    ['delay.marks', delay({ turn: () => Promise.resolve() })],
    ['delay.book.state', delay({ turn: () => Promise.resolve() })],
  ])('without memory for %s a stack does not open', (site, layer) => {
    const allocator = failingAllocator(systemAllocator, { sites: [site] })
    let error: unknown
    try {
      compose([layer, room()], { allocator })
    } catch (thrown) {
      error = thrown
    }
    expect(error).toBeInstanceOf(TmemError)
    expect((error as TmemError).code).toBe('TMEM_NO_MEMORY')
  })
})

test('the layers can be named in the text of a stack', () => {
  const factories = [
    refuseFactory,
    delayFactory(() => Promise.resolve()),
    corruptFactory,
    countFactory,
    traceFactory(new TraceLog()),
    discardFactory,
  ]
  const text =
    'count > trace(label=top) > refuse(every=2,reason=Quota) > delay(pages=64) > corrupt(every=9,seed=4) > discard(mode=lose)'
  const store = compose(parseStack(text, factories))
  const names: string[] = []
  for (let node: StatsNode | undefined = store.stats(); node !== undefined; node = node.children[0])
    names.push(node.name)
  expect(names).toEqual(['count', 'trace', 'refuse', 'delay', 'corrupt', 'discard'])
  const pool = poolOf(store, ephemeral)
  expect([pool.put(1, 0, page(1)), pool.put(1, 0, page(1))]).toEqual([PutOutcome.Stored, PutOutcome.Quota])
  expect(() => parseStack('refuse(every=0) > discard', factories)).toThrow(TmemError)
  expect(() => parseStack('refuse(every=1,reason=Stored) > discard', factories)).toThrow(TmemError)
})

test('a batch entry that is pending nowhere is left alone', () => {
  const pool = poolOf(compose([refuse({ every: 1 }), discard()]))
  const batch = batchOf([[1, 0]])
  batch.outcomes[0] = PutOutcome.Quota
  expect(pool.putMany(batch)).toBe(0)
  expect(batch.outcomes[0]).toBe(PutOutcome.Quota)
  batch.outcomes[0] = Pending
  expect(pool.putMany(batch)).toBe(0)
  expect(batch.outcomes[0]).toBe(PutOutcome.Policy)
})
