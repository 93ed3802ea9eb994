import type { ByteLimit, Layer } from '@tmem/core'
import { compose } from '@tmem/core'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryStore, memory } from '../src/memory.ts'
import type { Operation, WorldOptions } from './reference.ts'
import { operation, World } from './reference.ts'

const KiB = 1024
const MiB = 1024 * KiB

/** The memory layer, with the store that it opens at hand. */
const watched = (limit: ByteLimit, opened: MemoryStore[]): Layer => ({
  ...memory({ limitBytes: limit }),
  open: (_next, context) => {
    const store = new MemoryStore(limit, context)
    opened.push(store)
    return store
  },
})

const start: readonly Operation[] = [
  { do: 'newPool', client: 0, kind: 0, size: 0 },
  { do: 'newPool', client: 1, kind: 1, size: 1 },
  { do: 'newPool', client: 2, kind: 2, size: 2 },
]

/** Pages of every kind in all chunks of a store, with gaps. */
const crowded: readonly Operation[] = [0, 1, 2, 1, 0, 2].flatMap((pool, i): Operation[] => [
  { do: 'fill', at: { pool, object: i % 2, page: 0, part: undefined }, pages: 250 },
  { do: 'thin', at: { pool, object: i % 2, page: 0, part: undefined }, step: 2 + (i % 3) },
])

async function explore(
  make: () => WorldOptions,
  settings: { seed: number; numRuns: number; length: number; before?: readonly Operation[] },
): Promise<Map<string, number>> {
  const seen = new Map<string, number>()
  await fc.assert(
    fc.asyncProperty(
      fc.noBias(fc.array(operation, { minLength: 1, maxLength: settings.length, size: 'max' })),
      async (operations) => {
        const world = new World(make())
        for (const one of [...start, ...(settings.before ?? [])]) await world.step(one)
        for (const one of operations) await world.step(one)
        await world.finish()
        for (const [what, count] of world.seen) seen.set(what, (seen.get(what) ?? 0) + count)
      },
    ),
    { seed: settings.seed, numRuns: settings.numRuns },
  )
  return seen
}

/** One memory store, itself. */
const single = (limitBytes: number, pageSizes: readonly number[]) => (): WorldOptions => {
  let store: MemoryStore
  return {
    limitBytes,
    pageSizes,
    open: (limit, allocator, accounts) => {
      store = new MemoryStore(limit, { allocator, accounts })
      return store
    },
    single: () => store,
    check: () => store.check(),
  }
}

const kinds = ['put Stored', 'put NoMemory', 'put Frozen', 'put Quota', 'put AllocationFailed', 'get Hit', 'get Miss']

test('a store of one small chunk does what the reference does', async () => {
  const seen = await explore(single(MiB, [4 * KiB, 8 * KiB, 64 * KiB]), { seed: 2, numRuns: 100, length: 100 })
  expect([...seen.keys()]).toEqual(expect.arrayContaining([...kinds, 'evicted', 'frame put', 'frame taken']))
})

test('a store of several chunks, which come and go, does what the reference does', async () => {
  const seen = await explore(single(6 * MiB + 100 * KiB, [4 * KiB, 8 * KiB, 64 * KiB, 256 * KiB]), {
    seed: 3,
    numRuns: 70,
    length: 70,
    before: crowded,
  })
  expect([...seen.keys()]).toEqual(expect.arrayContaining([...kinds, 'evicted', 'frame put', 'frame taken']))
  expect(seen.get('moved')).toBeGreaterThan(100)
})

test('a store with pages of 4 KiB to 2 MiB side by side does what the reference does', async () => {
  const seen = await explore(single(18 * MiB, [4 * KiB, 8 * KiB, 64 * KiB, 2 * MiB]), {
    seed: 4,
    numRuns: 40,
    length: 60,
    before: crowded,
  })
  expect([...seen.keys()]).toEqual(expect.arrayContaining(['put Stored', 'put NoMemory', 'get Hit', 'evicted']))
})

test('a composed store keeps the rules of coherency, and does what the reference does', async () => {
  const seen = await explore(
    () => {
      const opened: MemoryStore[] = []
      return {
        limitBytes: MiB,
        pageSizes: [4 * KiB, 8 * KiB, 64 * KiB],
        open: (limit, allocator, accounts) =>
          compose([watched(limit, opened)], { allocator, accounts, check: 'model' }),
        check: () => {
          for (const store of opened) store.check()
        },
      }
    },
    { seed: 5, numRuns: 60, length: 100 },
  )
  expect([...seen.keys()]).toEqual(expect.arrayContaining([...kinds, 'evicted']))
})
