/** The filters between places, and the slow place in plain memory. */
import type { Layer, PageStore, Place, Pool, PoolAttributes, StatsNode } from '@tmem/core'
import { compose, GetOutcome, PageBatch, PutOutcome, planStack, type SlowPlace, type TmemError } from '@tmem/core'
import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'
import {
  corrupt,
  count,
  delay,
  fail,
  passingPlace,
  refuse,
  replay,
  type SlowFrame,
  slowMemory,
  TraceLog,
  tear,
  trace,
} from '../src/index.ts'

const persistent: PoolAttributes = { client: 1, persistent: true, shared: false, pageSize: 4096 }
const ephemeral: PoolAttributes = { ...persistent, persistent: false }
const sharedEphemeral: PoolAttributes = { ...ephemeral, shared: true }
/** Room for 20 pages. */
const few = (): Layer => memory({ limitBytes: 86_000 })
const slow = (options: Partial<Parameters<typeof slowMemory>[0]> = {}): Layer =>
  slowMemory({ sizeBytes: 2 ** 20, ...options })

/** A page that does not repeat itself, so that it takes room. */
function page(seed: number): Uint8Array {
  const bytes = new Uint8Array(4096)
  for (let i = 0; i < 4096; i++) bytes[i] = (seed * 31 + i * (i >> 4)) & 0xff
  return bytes
}

function poolOf(store: PageStore, attributes: PoolAttributes = persistent): Pool {
  const pool = store.newPool(attributes)
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return pool
}

/** Puts so many pages under (1, 0 …): the reasons, and how often each. */
function fill(pool: Pool, pages: number): Record<number, number> {
  const outcomes: Record<number, number> = {}
  for (let i = 0; i < pages; i++) {
    const outcome = pool.put(1, i, page(i))
    outcomes[outcome] = (outcomes[outcome] ?? 0) + 1
  }
  return outcomes
}

/** The page, waiting where that is needed; `undefined` for a miss. */
async function got(pool: Pool, index: number): Promise<Uint8Array | undefined> {
  const into = new Uint8Array(4096)
  return (await pool.fetch(1, index, into)) === GetOutcome.Hit ? into : undefined
}

async function expectPages(pool: Pool, pages: number): Promise<void> {
  for (let i = 0; i < pages; i++) expectPage(await got(pool, i), i)
}

/** Comparing byte by byte is left to the runtime: there are many. */
function expectPage(bytes: Uint8Array | undefined, seed: number): void {
  if (bytes === undefined || Buffer.compare(bytes, page(seed)) !== 0) throw new Error(`page ${seed} is another`)
}

/** Counters of the first section of that name. */
function section(store: PageStore, name: string): Readonly<Record<string, number>> {
  const find = (node: StatsNode): StatsNode | undefined => {
    if (node.name === name) return node
    for (const child of node.children) {
      const found = find(child)
      if (found !== undefined) return found
    }
    return undefined
  }
  return find(store.stats())?.counters ?? {}
}

const settle = async (store: PageStore): Promise<void> => {
  for (let i = 0; i < 50; i++) {
    store.tick({ pages: 64 })
    await new Promise((resolve) => setImmediate(resolve))
  }
}

describe('slow memory', () => {
  test('takes what finds no room above, and gives it back', async () => {
    const store = compose([few(), slow()], { check: 'model' })
    const pool = poolOf(store)
    expect(fill(pool, 100)).toEqual({ [PutOutcome.Stored]: 100 })
    expect(pool.get(1, 0, page(0))).toBe(GetOutcome.Deferred)
    await expectPages(pool, 100)
    await settle(store)
    await expectPages(pool, 100)
    pool.destroy()
    expect(section(store, 'slowMemory')).toMatchObject({ pages: 0, frames: 0, used_bytes: 0 })
    await store.close()
  })

  test('refuses what has no room, and all that cannot wait where it may not', () => {
    expect(fill(poolOf(compose([slow({ sizeBytes: 40 * 4224 })])), 50)).toEqual({
      [PutOutcome.Stored]: 40,
      [PutOutcome.NoMemory]: 10,
    })
    const outcomes = fill(poolOf(compose([few(), slow({ now: false })])), 50)
    expect(outcomes[PutOutcome.Stored]).toBeGreaterThan(15)
    expect(outcomes[PutOutcome.Unavailable]).toBe(50 - outcomes[PutOutcome.Stored]!)
  })

  test('keeps the kinds of pages that it is told to; ephemeral ones make room', async () => {
    expect(planStack([slow()])).toMatchObject({ persistent: true, ephemeral: false })
    expect(planStack([slow({ persistent: false, ephemeral: true })])).toMatchObject({ persistent: false, shared: true })
    const store = compose([slow({ ephemeral: true, sizeBytes: 40 * 4224 })], { check: 'model' })
    const dear = poolOf(store)
    const cheap = poolOf(store, sharedEphemeral)
    expect(fill(cheap, 60)).toEqual({ [PutOutcome.Stored]: 60 })
    expect(fill(dear, 30)).toEqual({ [PutOutcome.Stored]: 30 })
    await expectPages(dear, 30)
    const left = await Promise.all(Array.from({ length: 60 }, (_, i) => got(cheap, i)))
    expect(left.filter((bytes) => bytes !== undefined).length).toBe(10)
    for (let i = 50; i < 60; i++) expectPage(left[i], i)
    await store.close()
  })

  test('moves its frames about when it is told to, and nobody notices', async () => {
    const store = compose([few(), slow({ moves: 5 })], { check: 'model' })
    const pool = poolOf(store)
    fill(pool, 100)
    const fetching = Array.from({ length: 10 }, (_, i) => got(pool, i))
    await settle(store)
    for (const [i, bytes] of (await Promise.all(fetching)).entries()) expectPage(bytes, i)
    expect(section(store, 'slowMemory')['moved']).toBeGreaterThan(200)
    await expectPages(pool, 100)
    await store.close()
  })

  test('that is given the frames of another one begins with what that one has left', async () => {
    const frames = new Map<number, SlowFrame>()
    const first = compose([few(), slow({ frames })], { check: 'model' })
    const pool = poolOf(first)
    fill(pool, 100)
    const kept = section(first, 'slowMemory')['pages']!
    expect(kept).toBeGreaterThan(70)
    // A page that is flushed does not come back, nor does one that rose.
    pool.flushPage(1, 0)
    expectPage(await got(pool, 1), 1)
    await first.sync?.()
    await first.close()
    const again = compose([few(), slow({ frames })])
    const recovered = poolOf(again)
    let found = 0
    for (let i = 0; i < 100; i++) {
      const bytes = await got(recovered, i)
      if (bytes === undefined) continue
      found++
      expectPage(bytes, i)
    }
    expect(found).toBeGreaterThan(60)
    expect(await got(recovered, 0)).toBeUndefined()
    await again.close()
  })

  test('takes no nonsense', () => {
    for (const options of [
      { sizeBytes: 4095 },
      { sizeBytes: Number.NaN },
      { sizeBytes: 8192, unitBytes: 8 },
      { sizeBytes: 8192, unitBytes: 8192 },
      { sizeBytes: 8192, unitBytes: 100 },
      { sizeBytes: 8192, flightBytes: 64 },
      { sizeBytes: 8192, persistent: false },
    ])
      expect(() => slowMemory(options)).toThrow(RangeError)
  })
})

describe('between places', () => {
  test('refuse: a block that the place below does not get stays, or its page is refused', async () => {
    const store = compose([few(), refuse({ every: 3 }), slow()], { check: 'model' })
    expect(store.capabilities.reservedBytes).toBeLessThan(100_000)
    expect(compose([few(), slow()]).capabilities.reservedBytes).toBeGreaterThan(500_000)
    const pool = poolOf(store)
    const outcomes = fill(pool, 100)
    expect(outcomes[PutOutcome.Stored]! + (outcomes[PutOutcome.NoMemory] ?? 0)).toBe(100)
    const { puts, refused } = section(store, 'refuse')
    expect(refused).toBe(Math.floor(puts! / 3))
    await store.close()
  })

  test('refuse: a place in memory says the reason, while it is told to', () => {
    let closed = false
    const store = compose(
      [few(), refuse({ when: () => closed, reason: PutOutcome.Quota }), memory({ limitBytes: 2 ** 20 })],
      {
        check: 'model',
      },
    )
    const pool = poolOf(store)
    expect(fill(pool, 60)).toEqual({ [PutOutcome.Stored]: 60 })
    closed = true
    expect(pool.put(2, 0, page(1))).toBe(PutOutcome.Quota)
    closed = false
    expect(pool.put(2, 0, page(1))).toBe(PutOutcome.Stored)
  })

  test('fail: a write leaves pages where they are, a read says so, and works again later', async () => {
    let broken = true
    const store = compose([few(), fail({ when: () => broken, code: 'ENOSPC' }), slow()], { check: 'model' })
    const pool = poolOf(store)
    const outcomes = fill(pool, 40)
    expect(outcomes).toEqual({ [PutOutcome.Stored]: 20, [PutOutcome.Unavailable]: 20 })
    expect(store.failure).toMatchObject({ code: 'ENOSPC' })
    for (let i = 0; i < 20; i++) expectPage(await got(pool, i), i)
    broken = false
    expect(fill(pool, 60)).toEqual({ [PutOutcome.Stored]: 60 })
    broken = true
    const index = Array.from({ length: 60 }, (_, i) => i).find((i) => pool.get(1, i, page(0)) === GetOutcome.Deferred)!
    await expect(pool.fetch(1, index, page(0))).rejects.toMatchObject({ code: 'TMEM_IO', cause: { code: 'ENOSPC' } })
    broken = false
    await expectPages(pool, 60)
    await store.close()
  })

  test('fail: a sync says so as a stack does', async () => {
    const frames = new Map<number, SlowFrame>()
    const store = compose([few(), fail({ what: ['sync'], every: 2 }), slow({ frames })], { check: 'model' })
    await store.sync?.()
    await expect(store.sync?.()).rejects.toMatchObject({ code: 'TMEM_IO', layer: 'slowMemory', cause: { code: 'EIO' } })
    expect(section(store, 'fail')).toEqual({ transfers: 2, failed: 1 })
    await store.close()
  })

  test('delay: transfers begin in the order that the scheduler says', async () => {
    const waiting: (() => void)[] = []
    const turn = (): Promise<void> => new Promise((resolve) => waiting.push(resolve))
    const store = compose([few(), delay({ turn }), slow({ turn: () => Promise.resolve() })], { check: 'model' })
    const pool = poolOf(store)
    fill(pool, 60)
    const order: number[] = []
    const fetching = [0, 1].map(async (i) => {
      expectPage(await got(pool, i), i)
      order.push(i)
    })
    await new Promise((resolve) => setImmediate(resolve))
    expect(waiting.length).toBe(2)
    waiting[1]!()
    await fetching[1]
    waiting[0]!()
    await fetching[0]
    expect(order).toEqual([1, 0])
    await store.close()
  })

  test('corrupt: what comes back damaged from below is never served', async () => {
    const stacks = (what: 'got' | 'kept'): Layer[] => [few(), corrupt({ every: 4, what }), slow()]
    for (const what of ['got', 'kept'] as const) {
      const store = compose(stacks(what))
      const pool = poolOf(store)
      fill(pool, 60)
      let damaged = 0
      for (let i = 0; i < 60; i++)
        await got(pool, i).then(
          (bytes) => expectPage(bytes, i),
          (error: unknown) => {
            expect((error as TmemError).code).toBe('TMEM_CORRUPT')
            damaged++
          },
        )
      expect(damaged).toBeGreaterThan(5)
      await store.close()
      // A boundary around the place says whose fault it was.
      const watched = compose(stacks(what), { check: 'model' })
      const other = poolOf(watched)
      fill(other, 60)
      const all = Promise.all(Array.from({ length: 60 }, (_, i) => got(other, i)))
      await expect(all).rejects.toMatchObject({ code: 'TMEM_BROKEN', layer: 'slowMemory' })
      await watched.close()
    }
  })

  test('tear: pages of which only a part was written are never served', async () => {
    const store = compose([few(), tear({ every: 2 }), slow()])
    const pool = poolOf(store)
    fill(pool, 60)
    const results = await Promise.allSettled(Array.from({ length: 60 }, (_, i) => got(pool, i)))
    const damaged = results.filter(({ status }) => status === 'rejected')
    expect(damaged.length).toBeGreaterThan(3)
    for (const [i, result] of results.entries()) if (result.status === 'fulfilled') expectPage(result.value, i)
    expect(new Set(damaged.map((result) => (result as PromiseRejectedResult).reason.code as string))).toEqual(
      new Set(['TMEM_CORRUPT']),
    )
    await store.close()
  })

  test('count: a flight is one crossing, and a batch goes down in few of them', async () => {
    const store = compose([memory({ limitBytes: 2 ** 20 }), count(), slow({ sizeBytes: 2 ** 22 })], { check: 'model' })
    const pool = poolOf(store)
    const batch = new PageBatch(600)
    for (let i = 0; i < 600; i++) batch.bytes.set(page(i), batch.offsets[batch.push(1, i)]!)
    expect(pool.putMany(batch)).toBe(600)
    const sunk = section(store, 'slowMemory')['pages']!
    expect(sunk).toBeGreaterThan(300)
    expect(section(store, 'count')).toMatchObject({ writeNow: Math.ceil(sunk / 16), write: 0, read: 0 })
    await expectPages(pool, 600)
    expect(section(store, 'count')['read']).toBeGreaterThan(sunk)
    await store.close()
  })

  test('trace: what a stack asks of its places, in its order, with what failed', async () => {
    const log = new TraceLog()
    let broken = false
    const layers = [few(), trace({ log, label: 'b' }), fail({ when: () => broken }), slow()]
    const store = compose([trace({ log, label: 'a' }), trace({ log, label: 'm' }), ...layers])
    const pool = poolOf(store)
    fill(pool, 20)
    log.clear()
    pool.put(1, 20, page(20))
    await pool.fetch(1, 0, page(0))
    broken = true
    await expect(pool.fetch(1, 1, page(0))).rejects.toThrow('EIO')
    pool.flushPage(1, 0)
    await store.close()
    expect(log.toString().split('\n')).toEqual([
      'a pool 0 put 1/20 crc 65847298: Stored',
      'm pool 0 put 1/20 crc 65847298: Stored',
      'b writeNow 2 frames, 8448 bytes: 2',
      'a pool 0 fetch 1/0 crc 9fa4e138: Hit',
      'm pool 0 fetch 1/0 crc 9fa4e138: Hit',
      'b read at 0, 33 units',
      'a pool 0 fetch 1/1',
      'm pool 0 fetch 1/1',
      'b read at 1, 33 units: Error: EIO: read was made to fail',
      'a pool 0 flushPage 1/0',
      'm pool 0 flushPage 1/0',
      'b free at 0, 33 units',
      'a close',
      'm close',
      'b forget at 1, 33 units',
      'b close slowMemory',
      'b closed slowMemory',
      'm closed',
      'a closed',
    ])
    // What passed between places is not run again: a stack makes it of the rest.
    expect(
      await replay(
        log.operations.filter(({ label }) => label === 'b'),
        compose([slow()]),
      ),
    ).toEqual([])
  })

  test('a place is as its neighbours need it, or the stack is not built', () => {
    const room = memory({ limitBytes: 2 ** 20 })
    for (const [layer, why] of [
      [delay({ turn: () => Promise.resolve() }), 'delay cannot stand above memory: a place in memory answers at once'],
      [fail({}), 'fail cannot stand above memory: a place in memory does not fail'],
      [tear({}), 'tear cannot stand above memory: a place in memory takes no flights'],
    ] as const)
      expect(() => compose([few(), layer, room])).toThrow(why)
    for (const layer of [fail({}), tear({})]) expect(() => compose([layer, few(), slow()])).toThrow(layer.name)
    for (const layer of [fail({}), tear({}), refuse({})])
      expect(() => compose([few(), layer])).toThrow('cannot be the last layer')
  })
})

test('a place of ones own passes on what the one below has, and no more', () => {
  class Below {
    readonly name = 'below'
    level = 1
    #secret = 7
    get twice(): number {
      return this.level * 2
    }
    answer(): number {
      return this.#secret
    }
  }
  const below = new Below()
  const over = passingPlace(
    below as unknown as SlowPlace,
    { name: 'over', sync: () => Promise.resolve() } as Partial<SlowPlace>,
  )
  const seen = over as unknown as Below & { sync?: unknown }
  expect([seen.name, seen.level, seen.twice, seen.answer(), seen.sync]).toEqual(['over', 1, 2, 7, undefined])
  below.level = 4
  expect([seen.level, seen.twice]).toEqual([4, 8])
  const without = passingPlace(below as unknown as Place, { answer: undefined } as Partial<Place>)
  expect((without as unknown as { answer: unknown }).answer).toBeUndefined()
})
