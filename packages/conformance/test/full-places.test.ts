/** What a chain of places owes its callers where places are full, fail, lie or move things about. */
import type { ComposeOptions, Layer, PageStore, Pool, PoolAttributes, SlowPlace } from '@tmem/core'
import { compose, GetOutcome, PageBatch, PutOutcome } from '@tmem/core'
import { corrupt, count, fail, passingPlace, refuse, type SlowFrame, slowMemory } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { describe, expect, test } from 'vitest'
import { makePage } from '../src/index.ts'
import { countersOf } from './subjects.ts'

const { Stored, NoMemory, Unavailable } = PutOutcome
const persistent: PoolAttributes = { client: 1, persistent: true, shared: false, pageSize: 4096 }
const sharedEphemeral: PoolAttributes = { ...persistent, persistent: false, shared: true }
const page = (seed: number): Uint8Array => makePage('noise', seed, 4096)
/** Memory for so many pages. */
const frames = (pages: number): Layer => memory({ limitBytes: pages * 4215 + 200 })
/** Slow memory for so many pages that do not shrink. */
const slow = (pages: number, options: Partial<Parameters<typeof slowMemory>[0]> = {}): Layer =>
  slowMemory({ sizeBytes: pages * 4224, ...options })
const open = (layers: readonly Layer[], options: ComposeOptions = {}): PageStore =>
  compose(layers, { check: 'model', ...options })

function poolOf(store: PageStore, attributes: PoolAttributes = persistent): Pool {
  const pool = store.newPool(attributes)
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return pool
}

async function got(pool: Pool, index: number): Promise<Uint8Array | undefined> {
  const into = new Uint8Array(4096)
  let outcome = pool.get(1, index, into)
  if (outcome === GetOutcome.Deferred) outcome = await pool.fetch(1, index, into)
  return outcome === GetOutcome.Hit ? into : undefined
}

/** The page under (1, index) must be that of the seed. */
async function expectPage(pool: Pool, index: number, seed: number = index): Promise<void> {
  const bytes = await got(pool, index)
  if (bytes === undefined || Buffer.compare(bytes, page(seed)) !== 0)
    throw new Error(`page ${index} is ${bytes === undefined ? 'missing' : 'another'}`)
}

const putAll = (pool: Pool, from: number, to: number): PutOutcome[] =>
  Array.from({ length: to - from }, (_, i) => pool.put(1, from + i, page(from + i)))

const batchOf = (entries: readonly (readonly [index: number, seed: number])[]): PageBatch => {
  const batch = new PageBatch(entries.length)
  for (const [index, seed] of entries) batch.bytes.set(page(seed), batch.offsets[batch.push(1, index)]!)
  return batch
}

const turns = async (store: PageStore, rounds: number): Promise<void> => {
  for (let i = 0; i < rounds; i++) {
    store.tick({ pages: 64 })
    await new Promise((resolve) => setImmediate(resolve))
  }
}

/** What was stored must be somewhere, or have gone for a reason that was counted. */
function expectSums(store: PageStore): void {
  store.check!()
  const node = store.stats()
  const { counters } = node
  const dropped = countersOf(store, 'moves').reduce((sum, moves) => sum + moves['dropped_ephemeral']!, 0)
  const gone = ['replaced', 'got', 'flushed', 'put_to_flush', 'corrupt_dropped'].reduce(
    (sum, name) => sum + counters[name]!,
    0,
  )
  expect(counters['stored']).toBe(counters['pages']! + gone + dropped)
}

describe('a put that finds a place full', () => {
  test('goes to the next place, also when that is the second slow one, and in a batch', async () => {
    const store = open([frames(20), slow(6), slow(10)])
    const pool = poolOf(store)
    expect(putAll(pool, 0, 28)).toEqual(Array.from({ length: 28 }, () => Stored))
    const batch = batchOf(Array.from({ length: 12 }, (_, i) => [28 + i, 28 + i]))
    expect(pool.putMany(batch)).toBe(8)
    expect([...batch.outcomes]).toEqual(Array.from({ length: 12 }, (_, i) => (i < 8 ? Stored : NoMemory)))
    for (let i = 0; i < 36; i++) await expectPage(pool, i)
    for (let i = 36; i < 40; i++) expect(await got(pool, i)).toBeUndefined()
    expectSums(store)
    await store.close()
  })

  test('is refused, and nothing is left of it nor lost beside it', async () => {
    const store = open([slow(8)])
    const pool = poolOf(store)
    putAll(pool, 0, 8)
    for (let round = 0; round < 3; round++)
      expect(putAll(pool, 8, 12)).toEqual([NoMemory, NoMemory, NoMemory, NoMemory])
    pool.flushPage(1, 3)
    expect(putAll(pool, 8, 10)).toEqual([Stored, NoMemory])
    for (const i of [0, 1, 2, 4, 5, 6, 7, 8]) await expectPage(pool, i)
    expectSums(store)
    await store.close()
  })

  test('is refused without asking the place each time, and stored as soon as something was given up there', async () => {
    const store = open([frames(20), count(), slow(20), count(), slow(20)])
    const pool = poolOf(store)
    const crossings = (): number => countersOf(store, 'count').reduce((sum, calls) => sum + calls['writeNow']!, 0)
    expect(putAll(pool, 0, 60).filter((outcome) => outcome !== Stored)).toEqual([])
    const before = crossings()
    expect(new Set(putAll(pool, 60, 360))).toEqual(new Set([NoMemory]))
    expect(crossings() - before).toBeLessThan(50)
    for (const i of [7, 41]) {
      pool.flushPage(1, i)
      expect(pool.put(1, 60 + i, page(60 + i))).toBe(Stored)
      expect(pool.put(1, 400, page(400))).toBe(NoMemory)
    }
    // What is smaller than what was refused may find a hole.
    const other = open([slow(9)])
    const large = poolOf(other, { ...persistent, pageSize: 16_384 })
    expect([0, 1, 2].map((i) => large.put(1, i, makePage('noise', i, 16_384)))).toEqual([Stored, Stored, NoMemory])
    expect(poolOf(other).put(1, 0, page(0))).toBe(Stored)
    await other.close()
    for (let i = 0; i < 60; i++) if (i !== 7 && i !== 41) await expectPage(pool, i)
    await store.close()
  })

  test('does not fail for want of memory that the place below could have', () => {
    const pool = poolOf(open([frames(20), frames(248)]))
    expect(putAll(pool, 0, 260).filter((outcome) => outcome !== Stored)).toEqual([])
  })

  test('eats ephemeral pages, also when the place that would take those has failed', () => {
    const store = open([frames(20), fail({ what: ['write'] }), slow(100, { ephemeral: true, persistent: false })])
    const cheap = poolOf(store, sharedEphemeral)
    expect(putAll(cheap, 0, 30).filter((outcome) => outcome === Stored).length).toBeGreaterThanOrEqual(20)
    const pool = poolOf(store)
    expect(putAll(pool, 0, 20)).toEqual(Array.from({ length: 20 }, () => Stored))
  })

  test('says why the outside world has failed, in a batch, too', () => {
    const store = open([slow(4), refuse({ every: 2 }), fail({ code: 'ENOSPC' }), slow(4)])
    const pool = poolOf(store)
    const batch = batchOf(Array.from({ length: 8 }, (_, i) => [i, i]))
    expect(pool.putMany(batch)).toBe(4)
    expect(batch.outcomes[7]).toBe(Unavailable)
    expect(store.failure).toMatchObject({ code: 'ENOSPC' })
    expect(pool.put(1, 0, page(0))).toBe(Stored)
    expect(store.failure).toBeUndefined()
  })
})

describe('a batch that goes straight to a slow place', () => {
  test('may name a handle twice, and flush what it has just put', async () => {
    const store = open([slow(100)])
    const pool = poolOf(store)
    putAll(pool, 0, 4)
    const batch = batchOf([
      [1, 11],
      [2, 12],
      [1, 21],
      [3, 13],
      [2, 22],
    ])
    batch.outcomes[4] = Stored
    expect(pool.putMany(batch)).toBe(5)
    await expectPage(pool, 0, 0)
    await expectPage(pool, 1, 21)
    expect(await got(pool, 2)).toBeUndefined()
    await expectPage(pool, 3, 13)
    expectSums(store)
    await store.close()
  })

  test('crosses to it in few writes', () => {
    const store = open([slow(1000)])
    // 31 pages that do not shrink fill a flight of 128 KiB.
    const pool = poolOf(store)
    expect(pool.putMany(batchOf(Array.from({ length: 310 }, (_, i) => [i, i])))).toBe(310)
    expect(countersOf(store, 'slowMemory')[0]).toMatchObject({ writes: 10 })
  })
})

describe('replace', () => {
  test.each([
    ['memory', () => [frames(20)]],
    ['memory over a slow place', () => [frames(20), slow(6)]],
    ['a slow place', () => [slow(6)]],
    ['zcache over a slow place', () => [zcache({ limitBytes: 300_000 }), slow(10)]],
  ])('leaves the page that is there when the new one is refused, in %s', async (_name, places) => {
    let full = false
    const closed = (): Layer => refuse({ when: () => full })
    const [first, ...rest] = places()
    const store = open([behind(closed(), first!), ...rest.flatMap((layer) => [closed(), layer])])
    const pool = poolOf(store)
    const pages = putAll(pool, 0, 100).filter((outcome) => outcome === Stored).length
    const seeds = Array.from({ length: pages }, (_, i) => i)
    const check = async (): Promise<void> => {
      for (const [i, seed] of seeds.entries()) await expectPage(pool, i, seed)
    }
    for (const closedNow of [true, false]) {
      full = closedNow
      let refused = 0
      for (let i = 0; i < pages; i++) {
        const outcome = pool.replace!(1, i, page(1000 + i))
        if (outcome === Stored) seeds[i] = 1000 + i
        else refused++
      }
      await check()
      const batch = batchOf(seeds.map((_, i) => [i, 2000 + i]))
      pool.replaceMany!(batch)
      for (let i = 0; i < pages; i++)
        if (batch.outcomes[i] === Stored) seeds[i] = 2000 + i
        else refused++
      await check()
      // In memory that keeps pages as they are, a page that has no other room takes that of the old one.
      const inMemory = countersOf(store, 'memory')[0]?.['pages'] ?? 0
      if (closedNow && refused !== 2 * (pages - inMemory))
        throw new Error(`${refused} replacements were refused, with ${inMemory} of ${pages} pages in memory`)
    }
    expectSums(store)
    await store.close()
  })

  test('of a page in a slot goes there when all slots are taken', async () => {
    const store = open([slowMemory({ sizeBytes: 8 * 4096, rawOnly: true })])
    const pool = poolOf(store)
    putAll(pool, 0, 8)
    expect(pool.replace!(1, 3, page(103))).toBe(Stored)
    expect(pool.replaceMany!(batchOf([[4, 104]]))).toBe(1)
    for (const [i, seed] of [0, 1, 2, 103, 104, 5, 6, 7].entries()) await expectPage(pool, i, seed)
    expectSums(store)
    await store.close()
  })

  test('of an ephemeral page does not eat that very page to make room', async () => {
    const store = open([frames(20), slow(10, { ephemeral: true })])
    const pool = poolOf(store, sharedEphemeral)
    putAll(pool, 0, 30)
    for (let round = 1; round < 90; round++) {
      const index = (round * 7) % 30
      if (pool.replace!(1, index, page(100 * round)) === Stored) await expectPage(pool, index, 100 * round)
      await turns(store, round % 3)
    }
    expect(countersOf(store, 'chain')[0]!['pages']).toBeGreaterThan(10)
    await store.close()
  })

  test('is not offered for pages in parts', () => {
    const store = open([zcache({ limitBytes: 2 ** 20 })])
    expect(typeof poolOf(store, { ...persistent, pageSize: 65_536 }).replace).toBe('function')
    expect(typeof poolOf(store, { ...persistent, pageSize: 131_072 }).replace).toBe('undefined')
  })
})

test('what is damaged in memory goes once, if it is ephemeral, and stops nobody', async () => {
  const store = compose([behind(corrupt({ every: 3 }), zcache({ limitBytes: 300_000 })), slow(60, { ephemeral: true })])
  const pool = poolOf(store, sharedEphemeral)
  const any = (i: number): Uint8Array => makePage(i % 2 === 0 ? 'noise' : 'text', i, 4096)
  for (let i = 0; i < 300; i++) pool.put(1, i, any(i))
  await turns(store, 20)
  for (let i = 0; i < 300; i++) {
    const bytes = await got(pool, i)
    if (bytes !== undefined && Buffer.compare(bytes, any(i)) !== 0) throw new Error(`page ${i} is another`)
  }
  expect(countersOf(store, 'moves')[0]!['corrupt']).toBeGreaterThan(10)
  expectSums(store)
  await store.close()
})

test('a place whose content survives the process keeps no copy of what is in memory', async () => {
  const kept = new Map<number, SlowFrame>()
  const store = open([frames(300), slow(300, { frames: kept })])
  const pool = poolOf(store)
  putAll(pool, 0, 400)
  for (let round = 0; round < 5; round++) {
    for (let i = 0; i < 400; i++) await expectPage(pool, i)
    putAll(pool, 0, 5)
    // What is used while it is on its way down stays above.
    store.tick({ pages: 64 })
    for (let i = 0; i < 400; i++) pool.get(1, i, new Uint8Array(4096))
    await turns(store, 5)
    expect(store.stats().counters['clean_copies']).toBe(0)
    expect(kept.size).toBe(countersOf(store, 'slowMemory')[0]!['pages'])
  }
  expect(countersOf(store, 'moves')[1]!['used_in_flight']).toBeGreaterThan(0)
  await store.close()
})

test('a page that rises while its place moves frames about is not mixed up with another', async () => {
  // Each write moves all frames first.
  const restless: Layer = {
    name: 'restless',
    wrapPlace: (place) => {
      const below = place as SlowPlace
      return passingPlace(below, {
        writeNow: (flight) => {
          below.tick!({ pages: 1000 })
          below.writeNow!(flight)
        },
      })
    },
  }
  const store = open([frames(20), restless, slow(100, { moves: 1000, ephemeral: true })])
  const pools = [poolOf(store), poolOf(store, sharedEphemeral)]
  for (const pool of pools) putAll(pool, 0, 40)
  for (let round = 0; round < 5; round++) {
    await Promise.all(Array.from({ length: 40 }, (_, i) => expectPage(pools[0]!, i)))
    for (let i = 0; i < 40; i++) {
      const bytes = await got(pools[1]!, i)
      if (bytes !== undefined && Buffer.compare(bytes, page(i)) !== 0) throw new Error(`page ${i} is another`)
    }
    putAll(pools[1]!, 0, 10)
  }
  expect(countersOf(store, 'slowMemory')[0]!['moved']).toBeGreaterThan(1000)
  expectSums(store)
  await store.close()
})

/** A place with a filter around it, to be the first of a stack, above which no filter between places can stand. */
function behind(filter: Layer, { name, place }: Layer): Layer {
  return {
    name,
    place: { traits: place!.traits, open: (context) => filter.wrapPlace!(place!.open(context), context) },
  }
}
