import type { PageModel } from '@tmem/conformance'
import { contradictionIn, History, pageModels } from '@tmem/conformance'
import type { PoolAttributes } from '@tmem/core'
import { GetOutcome, PoolRefusal, PutOutcome } from '@tmem/core'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { SharedMemoryHandle, SharedMemoryOptions } from '../src/index.ts'
import { SharedMemoryStore } from '../src/index.ts'
import { Crew, settled } from './crew.ts'

const KiB = 1024
const MiB = 1024 * KiB

let crew: Crew
beforeAll(() => {
  crew = Crew.start(4)
})
afterAll(() => crew.close())

const attributesOf = (more: Partial<PoolAttributes> = {}): PoolAttributes => ({
  client: 1,
  persistent: true,
  shared: false,
  pageSize: 4 * KiB,
  ...more,
})

/** A store made by this thread, which then leaves it to the workers: a wait here would have no bound. */
function storeWith(options: SharedMemoryOptions, ...pools: readonly PoolAttributes[]) {
  const store = SharedMemoryStore.create(options)
  const numbers = pools.map((attributes) => {
    const pool = store.newPool(attributes)
    if (typeof pool === 'number') throw new Error(`the pool was refused: ${pool}`)
    return pool.number
  })
  return { store, handle: store.handle, numbers }
}

const shared = (words: number): Int32Array => new Int32Array(new SharedArrayBuffer(words * 4))

/** Why a history is not linearizable; `undefined` when it is. */
const contradiction = (history: History, modelOf: PageModel | ((page: number) => PageModel)): string | undefined =>
  contradictionIn(history, modelOf)?.text

/** Lets other things happen until a condition holds, at most five seconds. */
async function until(condition: () => boolean): Promise<void> {
  for (let tries = 0; !condition(); tries++) {
    if (tries === 1000) throw new Error('the threads did not come so far')
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
}

const check = (handle: SharedMemoryHandle): Promise<Record<string, number>> => crew.run(0, 'check', { store: handle })

const kinds: readonly { attributes: PoolAttributes; model: PageModel }[] = [
  { attributes: attributesOf(), model: pageModels.persistent },
  { attributes: attributesOf({ persistent: false, shared: true }), model: pageModels.sharedEphemeral },
  { attributes: attributesOf({ persistent: false }), model: pageModels.privateEphemeral },
]

interface PoolSpec {
  readonly number: number
  readonly base: number
  readonly objects: number
  readonly indexes: number
  readonly parts?: number
  readonly kinds?: number
  readonly ownHandles?: boolean
}

interface HammerOptions {
  readonly handle: SharedMemoryHandle
  readonly pools: readonly PoolSpec[]
  readonly threads: number
  readonly operations: number
  readonly seed: number
  /** Entries that one operation may add to the history. */
  readonly weight?: number
  readonly firstObject?: (thread: number) => number
  readonly mutant?: 'stale bytes' | 'without locks'
}

/** Random operations from several threads: their history, and how often each outcome was had. */
async function hammer({ handle, pools, threads, operations, seed, weight = 3, firstObject, mutant }: HammerOptions) {
  const histories = Array.from({ length: threads }, () => new History(operations * weight))
  const clock = shared(1)
  const gate = shared(1)
  const tallies = await crew.all<Record<string, number>>(threads, 'hammer', (thread) => ({
    store: handle,
    pools,
    seed: seed * 100 + thread,
    operations,
    history: histories[thread]!.memory,
    clock,
    gate,
    threads,
    firstObject: firstObject?.(thread),
    mutant,
  }))
  const tally: Record<string, number> = {}
  for (const one of tallies) for (const [name, count] of Object.entries(one)) tally[name] = (tally[name] ?? 0) + count
  return { history: History.merged(histories), tally }
}

describe('operations from several threads', () => {
  test('on the same handles are atomic', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 16 * MiB, shards: 4 }, ...kinds.map((kind) => kind.attributes))
    const pools = numbers.map((number, i) => ({ number, base: i * 100, objects: 2, indexes: 3 }))
    const { history, tally } = await hammer({ handle, pools, threads: 3, operations: 6000, seed: 1 })
    // There is room for all, so that no page may vanish.
    expect(
      contradiction(history, (page) => ({ ...kinds[Math.floor(page / 100)]!.model, vanishes: false })),
    ).toBeUndefined()
    expect(Object.keys(tally).sort()).toEqual(['batch', 'flush object', 'get 0', 'get 1', 'put 0'])
    expect((await check(handle)).evicted_pages).toBe(0)
  })

  test('on handles of their own do not meet', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 16 * MiB }, ...kinds.map((kind) => kind.attributes))
    const pools = numbers.map((number, i) => ({ number, base: i * 100, objects: 2, indexes: 20, ownHandles: true }))
    const { history } = await hammer({
      handle,
      pools,
      threads: 4,
      operations: 3000,
      seed: 2,
      weight: 8,
      firstObject: (thread) => 7 + thread * 10,
    })
    expect(
      contradiction(history, (page) => ({ ...kinds[Math.floor((page % 100_000) / 100)]!.model, vanishes: false })),
    ).toBeUndefined()
    await check(handle)
  })

  test('in a store that is too small for them are atomic, too', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 500 * KiB, shards: 2 }, ...kinds.map((kind) => kind.attributes))
    const pools = numbers.map((number, i) => ({ number, base: i * 1000, objects: 4, indexes: 25 }))
    const { history, tally } = await hammer({ handle, pools, threads: 3, operations: 5000, seed: 3, weight: 4 })
    expect(contradiction(history, (page) => kinds[Math.floor(page / 1000)]!.model)).toBeUndefined()
    expect(tally[`put ${PutOutcome.NoMemory}`]).toBeGreaterThan(0)
    expect((await check(handle)).evicted_pages).toBeGreaterThan(0)
  })

  test('on large pages and their parts are atomic', async () => {
    const large = kinds.map(({ attributes }) => ({ ...attributes, pageSize: 32 * KiB }))
    const { handle, numbers } = storeWith({ limitBytes: 32 * MiB, shards: 2 }, ...large)
    const pools = numbers.map((number, i) => ({ number, base: i * 100, objects: 1, indexes: 3, parts: 8 }))
    const { history, tally } = await hammer({ handle, pools, threads: 3, operations: 3000, seed: 4, weight: 9 })
    expect(
      contradiction(history, (page) => ({ ...kinds[Math.floor(page / 100)]!.model, vanishes: false })),
    ).toBeUndefined()
    expect(tally['part get 0']).toBeGreaterThan(0)
    await check(handle)
  })

  test('on large pages in a store that is too small leave no page behind', async () => {
    const large = kinds.map(({ attributes }) => ({ ...attributes, pageSize: 16 * KiB }))
    const { handle, numbers } = storeWith({ limitBytes: 800 * KiB, shards: 2 }, ...large)
    const pools = numbers.map((number, i) => ({ number, base: i * 1000, objects: 2, indexes: 30, parts: 4 }))
    const { history, tally } = await hammer({ handle, pools, threads: 3, operations: 3000, seed: 5, weight: 5 })
    expect(contradiction(history, (page) => kinds[Math.floor(page / 1000)]!.model)).toBeUndefined()
    expect(tally[`put ${PutOutcome.NoMemory}`]).toBeGreaterThan(0)
    await check(handle)
  })

  test('never see a mixture of two pages of 2 MiB', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 160 * MiB, shards: 2 }, attributesOf({ pageSize: 2 * MiB }))
    const pools = [{ number: numbers[0]!, base: 0, objects: 1, indexes: 1, kinds: 55 }]
    const { history } = await hammer({ handle, pools, threads: 2, operations: 150, seed: 6, weight: 1 })
    expect(contradiction(history, pageModels.persistent)).toBeUndefined()
    await check(handle)
  })
})

describe('pools', () => {
  test('destroyed while others work in them are gone everywhere, and stay so', async () => {
    const rounds = 25
    const pages = 6
    const threads = 3
    for (const [i, { attributes, model }] of kinds.entries()) {
      const { handle } = storeWith({ limitBytes: 16 * MiB, shards: 4 })
      const histories = Array.from({ length: threads }, () => new History(100_000))
      const common = { store: handle, rounds, words: shared(6), pages, clock: shared(1), gate: shared(1), threads }
      const runs = histories.map(({ memory }, thread) =>
        crew.run<number[]>(thread, thread === 0 ? 'destroyer' : 'inhabitant', {
          ...common,
          attributes: { ...attributes, pageSize: 8 * KiB },
          history: memory,
          seed: i * 10 + thread,
        }),
      )
      const [destroyed, ...lastStored] = await settled(runs)
      for (let round = 0; round < rounds; round++)
        for (const last of lastStored) expect(last[round]!).toBeLessThan(destroyed![round]!)
      expect(contradiction(History.merged(histories), { ...model, vanishes: false })).toBeUndefined()
      const counters = await check(handle)
      expect(counters.pages).toBe(0)
      expect(counters.frames).toBe(0)
    }
  })

  test('made by several threads have different numbers, and every thread can open them', async () => {
    const { handle } = storeWith({ limitBytes: 16 * MiB, shards: 2 })
    interface Made {
      made: { number: number; attributes: PoolAttributes; outcome: PutOutcome }[]
      refusal: number
    }
    const makeAll = (count: number, seed: number): Promise<Made[]> => {
      const gate = shared(1)
      return crew.all<Made>(3, 'makePools', (thread) => ({
        store: handle,
        count,
        seed: seed + thread,
        gate,
        threads: 3,
      }))
    }
    const some = await makeAll(20, 1)
    const numbers = some.flatMap(({ made }) => made.map(({ number }) => number))
    expect(numbers).toHaveLength(60)
    expect(new Set(numbers).size).toBe(60)
    expect(some.flatMap(({ made }) => made.map(({ outcome }) => outcome))).toEqual(
      new Array(60).fill(PutOutcome.Stored),
    )

    const gate = shared(1)
    const visited = await crew.all<{ attributes: PoolAttributes; own: boolean }[]>(3, 'visitPools', (thread) => {
      const whose = (thread + 1) % 3
      return { store: handle, whose, made: some[whose]!.made, destroy: 2, gate, threads: 3 }
    })
    for (let thread = 0; thread < 3; thread++)
      expect(visited[thread]).toEqual(some[(thread + 1) % 3]!.made.map(({ attributes }) => ({ attributes, own: true })))

    // Every other pool is gone: 30 are left of the 256 that there can be.
    const rest = await makeAll(256, 4)
    expect(rest.map(({ refusal }) => refusal)).toEqual(new Array(3).fill(PoolRefusal.NoSlot))
    const taken = rest.flatMap(({ made }) => made.map(({ number }) => number))
    expect(taken).toHaveLength(226)
    const left = some.flatMap(({ made }) => made.filter((_, i) => i % 2 === 1).map(({ number }) => number))
    expect(new Set([...taken, ...left]).size).toBe(256)
    await check(handle)
  })

  test('made and destroyed all the time do not get mixed up', async () => {
    const { handle } = storeWith({ limitBytes: 16 * MiB, shards: 4 })
    const gate = shared(1)
    const left = await crew.all<number>(3, 'churn', (thread) => ({
      store: handle,
      rounds: 1500,
      seed: thread + 1,
      gate,
      threads: 3,
    }))
    expect(left).toEqual([4, 4, 4])
    expect((await check(handle)).pages).toBe(12)
  })

  test('that are frozen take no new page from any thread, and thawed they do again', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 16 * MiB, shards: 4 }, attributesOf())
    const common = {
      store: handle,
      number: numbers[0],
      rounds: 20,
      words: shared(2),
      clock: shared(1),
      gate: shared(1),
    }
    const [periods, ...puts] = (await settled<unknown>([
      crew.run(0, 'freezer', { ...common, threads: 3 }),
      crew.run(1, 'newcomer', { ...common, threads: 3 }),
      crew.run(2, 'newcomer', { ...common, threads: 3 }),
    ])) as [
      { freezing: number; frozen: number; thawing: number; thawed: number }[],
      ...{ invoked: number; answered: number; outcome: PutOutcome }[][],
    ]
    const all = puts.flat()
    const whileFrozen = all.filter(({ invoked, answered }) =>
      periods.some((period) => invoked > period.frozen && answered < period.thawing),
    )
    const whileOpen = all.filter(({ invoked, answered }) =>
      periods.every((period) => answered < period.freezing || invoked > period.thawed),
    )
    expect(whileFrozen.length).toBeGreaterThan(100)
    expect(whileOpen.length).toBeGreaterThan(100)
    expect(new Set(whileFrozen.map(({ outcome }) => outcome))).toEqual(new Set([PutOutcome.Frozen]))
    expect(new Set(whileOpen.map(({ outcome }) => outcome))).toEqual(new Set([PutOutcome.Stored]))
    expect((await check(handle)).frames).toBe(0)
  })

  test.each([4 * KiB, 16 * KiB])('pages of %i bytes of one client are limited over all threads', async (pageSize) => {
    const maximum = 60
    const { store, handle, numbers } = storeWith(
      { limitBytes: 16 * MiB, shards: 4 },
      attributesOf({ client: 7, pageSize }),
    )
    store.setMaximum(7, maximum * pageSize + pageSize - 1)
    const gate = shared(1)
    const spent = await crew.all<{ stored: number; refused: number }>(3, 'spender', (thread) => ({
      store: handle,
      number: numbers[0],
      client: 7,
      maximum,
      seed: thread + 1,
      operations: 80_000,
      gate,
      threads: 3,
    }))
    expect(spent.reduce((sum, { stored }) => sum + stored, 0)).toBe(maximum)
    expect(spent.reduce((sum, { refused }) => sum + refused, 0)).toBeGreaterThan(0)
    expect(store.charged(7)).toBe(maximum * pageSize)
    expect((await check(handle)).pers_frames).toBe((maximum * pageSize) / 4096)
    await store.close()
    expect(store.charged(7)).toBe(0)
  })
})

describe('misuse', () => {
  test.each([4 * KiB, 64 * KiB])('is thrown, changes nothing and leaves nothing locked (%i)', async (pageSize) => {
    for (const { attributes } of kinds.slice(0, 2)) {
      const { handle, numbers } = storeWith({ limitBytes: 64 * MiB, shards: 4 }, { ...attributes, pageSize })
      const { thrown, outcome, value } = await crew.run<{
        thrown: Record<string, string>
        outcome: GetOutcome
        value: number
      }>(1, 'misuse', { store: handle, number: numbers[0] })
      const inside = 'TypeError: the store was called from inside one of its own callbacks'
      const mistakes = Object.entries(thrown)
      expect(mistakes.filter(([, message]) => message === inside).map(([name]) => name)).toEqual(
        [
          'put',
          'get',
          'fetch',
          'flushPage',
          'flushObject',
          'putMany',
          'getMany',
          'flushMany',
          'lend',
          'put of a part',
          'freeze',
          'thaw',
          'destroy',
          'newPool',
          'openPool',
          'tick',
          'stats',
          'check',
          'close',
        ].sort((a, b) => Object.keys(thrown).indexOf(a) - Object.keys(thrown).indexOf(b)),
      )
      expect(Object.fromEntries(mistakes.filter(([, message]) => message !== inside))).toEqual({
        'a borrower that throws': 'Error: thrown by the borrower',
        'a short page': `RangeError: page must have ${pageSize} bytes, got ${pageSize - 1}`,
        'no page': 'TypeError: page must be a Uint8Array',
        'an object that is none': 'TypeError: object id must be a number or a bigint, got string',
        'a negative object': 'RangeError: object id must be an integer from 0 to 2^192-2, got -1',
        'half an object': 'RangeError: object id must be an integer from 0 to 2^192-2, got 0.5',
        'an index that is none': expect.stringContaining('RangeError: index must be an integer from 0 to'),
        'no batch': 'TypeError: batch must be a PageBatch',
        'a negative maximum': 'RangeError: the maximum must not be negative, got -1',
        'half a weight': 'RangeError: a weight must be an integer from 0 to 2147483647, got 0.5',
      })
      expect([outcome, value]).toEqual([GetOutcome.Hit, 77])
      // Another thread finds every shard open.
      expect(await crew.run(2, 'once', { store: handle, number: numbers[0] })).toEqual({ outcome: 0, value: 77 })
      await check(handle)
    }
  })

  test('impossible settings are refused', () => {
    for (const shards of [0, 3, 512, 1.5])
      expect(() => SharedMemoryStore.create({ limitBytes: MiB, shards })).toThrow('shards must be a power of two')
    expect(() => SharedMemoryStore.create({ limitBytes: 10 * KiB })).toThrow(RangeError)
    expect(() => SharedMemoryStore.create({ limitBytes: Number.NaN })).toThrow(RangeError)
    expect(() => SharedMemoryStore.create({ limitBytes: 2 ** 52, shards: 256 })).toThrow(RangeError)
  })
})

describe('the life of a store', () => {
  test('what one thread puts, another gets', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 16 * MiB }, attributesOf())
    expect(await crew.run(0, 'once', { store: handle, number: numbers[0], value: 9 })).toEqual({ outcome: 0 })
    expect(await crew.run(1, 'once', { store: handle, number: numbers[0] })).toEqual({ outcome: 0, value: 9 })
    expect(await crew.run(1, 'once', { store: handle, number: 200 })).toEqual({ refusal: PoolRefusal.Unsupported })
  })

  test('a thread that leaves takes nothing with it', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 16 * MiB }, attributesOf())
    await crew.run(0, 'once', { store: handle, number: numbers[0], value: 9 })
    expect(await crew.run(0, 'leave', { store: handle, number: numbers[0], attributes: attributesOf() })).toEqual({
      newPool: PoolRefusal.Closed,
      openPool: PoolRefusal.Closed,
      tick: 0,
    })
    expect(await crew.run(1, 'once', { store: handle, number: numbers[0] })).toEqual({ outcome: 0, value: 9 })
  })

  test('when its maker closes it, it is closed for everybody', async () => {
    const { store, handle, numbers } = storeWith({ limitBytes: 16 * MiB }, attributesOf())
    const words = shared(2)
    const stays = crew.run<Record<string, number>>(0, 'stay', {
      store: handle,
      number: numbers[0],
      attributes: attributesOf(),
      words,
    })
    await Promise.race([stays, until(() => Atomics.load(words, 0) === 1)])
    await store.close()
    Atomics.store(words, 1, 1)
    Atomics.notify(words, 1)
    expect(await stays).toEqual({
      before: PutOutcome.Stored,
      put: PutOutcome.PoolGone,
      get: GetOutcome.Miss,
      newPool: PoolRefusal.Closed,
      openPool: PoolRefusal.Unsupported,
    })
    expect(store.charged(1)).toBe(0)
    expect((await check(handle)).frames).toBe(0)
  })

  test('a thread that is ended between operations leaves its pages and no lock', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 16 * MiB, shards: 1 }, attributesOf())
    const mortal = Crew.start(1)
    try {
      await mortal.run(0, 'once', { store: handle, number: numbers[0], value: 33 })
    } finally {
      await mortal.close()
    }
    await expect(mortal.run(0, 'check', { store: handle })).rejects.toThrow('the threads were ended')
    expect(await crew.run(0, 'once', { store: handle, number: numbers[0] })).toEqual({ outcome: 0, value: 33 })
    await check(handle)
  })
})

describe('what these tests would catch', () => {
  test('a store that seldom returns stale bytes', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 16 * MiB }, attributesOf())
    const pools = [{ number: numbers[0]!, base: 0, objects: 1, indexes: 3, kinds: 45 }]
    const { history } = await hammer({
      handle,
      pools,
      threads: 2,
      operations: 3000,
      seed: 8,
      weight: 1,
      mutant: 'stale bytes',
    })
    expect(contradiction(history, pageModels.persistent)).toContain('no order of these operations explains')
  })

  test('a store without locks', async () => {
    const { handle, numbers } = storeWith({ limitBytes: 160 * MiB, shards: 2 }, attributesOf({ pageSize: 2 * MiB }))
    const page = { store: handle, number: numbers[0], value: 1 }
    await crew.run(0, 'once', page)
    const pools = [{ number: numbers[0]!, base: 0, objects: 1, indexes: 1, kinds: 45 }]
    // The pages are so large that one thread is in the midst of a copy nearly always.
    const run = hammer({ handle, pools, threads: 2, operations: 2000, seed: 9, weight: 1, mutant: 'without locks' })
    await expect(run).rejects.toThrow('torn page')
  })
})
