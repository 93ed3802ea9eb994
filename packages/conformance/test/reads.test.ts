/** How many reads of a slow place are under way at once, and who begins when one is over. */
import { compose, GetOutcome, type Layer, PageBatch, type Pool, PutOutcome, type SlowPlace } from '@tmem/core'
import { slowMemory } from '@tmem/faults'
import { zcache } from '@tmem/zcache'
import { expect, onTestFinished, test } from 'vitest'

const KiB = 1024
const MiB = 1024 * KiB

/** A read that waits to be let go. */
interface Held {
  readonly units: number
  readonly go: () => void
}

/** Slow memory that wants so many reads at once, and holds each until it is let go. */
function held(readsAtOnce: number | undefined, reads: Held[]): Layer {
  const { name, place: plan } = slowMemory({ sizeBytes: 16 * MiB, unitBytes: 64 })
  const traits = Object.freeze({ ...plan!.traits, ...(readsAtOnce === undefined ? {} : { readsAtOnce }) })
  return {
    name,
    place: {
      traits,
      open: (context) => {
        const place = plan!.open(context) as SlowPlace
        const read = place.read.bind(place)
        return Object.assign(place, {
          traits,
          read: async (location: number, units: number, into: Uint8Array) => {
            await new Promise<void>((resolve) => reads.push({ units, go: resolve }))
            await read(location, units, into)
          },
        })
      },
    },
  }
}

/** A stack over such a place, with pools of pages that do not shrink, all of them below. */
async function stackOf(readsAtOnce: number | undefined, sizes: readonly { pageSize: number; count: number }[]) {
  const reads: Held[] = []
  const store = compose([zcache({ limitBytes: 16 * MiB }), held(readsAtOnce, reads)])
  const pools: Pool[] = []
  onTestFinished(async () => {
    await letGo(reads, store.close())
  })
  for (const { pageSize, count } of sizes) {
    const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize })
    if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
    for (let index = 0; index < count; index++)
      expect(pool.put(0, index, noise(index, pageSize))).toBe(PutOutcome.Stored)
    const indexes = Uint32Array.from({ length: count }, (_, index) => index)
    expect((await pool.sink!(0, indexes, count, true)).failure).toBeUndefined()
    pools.push(pool)
  }
  return { store, pools, reads }
}

function noise(seed: number, pageSize: number): Uint8Array {
  const page = new Uint8Array(pageSize)
  for (let at = 0, state = seed + 1; at < pageSize; at++) {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0
    page[at] = state >>> 16
  }
  return page
}

/** Fails unless a page is that noise. */
function expectNoise(page: Uint8Array, seed: number): void {
  expect(Buffer.compare(page, noise(seed, page.length)), `page ${seed} is another one`).toBe(0)
}

/** Lets turns go by until nothing goes on by itself. */
async function settled(): Promise<void> {
  for (let n = 0; n < 8; n++) await new Promise((resolve) => setImmediate(resolve))
}

/** Lets all reads go, those that begin meanwhile included; the most that there were at once. */
async function letGo(reads: Held[], done: Promise<unknown>): Promise<number> {
  let most = 0
  let isDone = false
  const end = done.finally(() => {
    isDone = true
  })
  while (!isDone) {
    await settled()
    most = Math.max(most, reads.length)
    for (const { go } of reads.splice(0)) go()
  }
  await end
  return most
}

test.each([
  { readsAtOnce: undefined, most: 16 },
  { readsAtOnce: 1, most: 1 },
  { readsAtOnce: 100, most: 100 },
  { readsAtOnce: 256, most: 256 },
])('of a place that wants $readsAtOnce reads at once, $most of 300 are under way', async ({ readsAtOnce, most }) => {
  const { pools, reads } = await stackOf(readsAtOnce, [{ pageSize: 4 * KiB, count: 300 }])
  const batch = new PageBatch(300)
  for (let index = 0; index < 300; index++) batch.push(0, index)
  const fetched = pools[0]!.fetchMany!(batch)
  expect(await letGo(reads, fetched)).toBe(most)
  expect(await fetched).toBe(300)
  for (let index = 0; index < 300; index++) expectNoise(batch.page(index), index)
})

test('of pages of 64 KiB, as many reads are under way as there is memory for', async () => {
  const { pools, reads } = await stackOf(256, [{ pageSize: 64 * KiB, count: 40 }])
  const batch = new PageBatch(40, 64 * KiB)
  for (let index = 0; index < 40; index++) batch.push(0, index)
  const fetched = pools[0]!.fetchMany!(batch)
  expect(await letGo(reads, fetched)).toBe(17)
  for (let index = 0; index < 40; index++) expectNoise(batch.page(index), index)
})

test('small reads do not overtake a large one that waits for memory, and no byte is lent twice', async () => {
  const { pools, reads } = await stackOf(1000, [
    { pageSize: 4 * KiB, count: 500 },
    { pageSize: 64 * KiB, count: 1 },
  ])
  const [small, large] = pools as [Pool, Pool]
  const pages = Array.from({ length: 500 }, () => new Uint8Array(4 * KiB))
  const fetchSmall = (from: number, to: number): Promise<GetOutcome>[] =>
    pages.slice(from, to).map((page, n) => small.fetch(0, from + n, page))
  const fetches = fetchSmall(0, 260)
  const page = new Uint8Array(64 * KiB)
  fetches.push(large.fetch(0, 0, page), ...fetchSmall(260, 500))
  await settled()
  // 272 small ones would have room; the large one does not, and what comes after it waits as well.
  expect(reads).toHaveLength(260)
  for (const { go } of reads.splice(0, 40)) go()
  await settled()
  expect(reads.filter(({ units }) => units > 1000)).toHaveLength(1)
  await letGo(reads, Promise.all(fetches))
  expectNoise(page, 0)
  for (const [index, one] of pages.entries()) expectNoise(one, index)
})

test('who waits when the stack is closed is told that there is no page', async () => {
  const { store, pools, reads } = await stackOf(2, [{ pageSize: 4 * KiB, count: 5 }])
  const fetches = [0, 1, 2, 3, 4].map((index) => pools[0]!.fetch(0, index, new Uint8Array(4 * KiB)))
  await settled()
  expect(reads).toHaveLength(2)
  const closed = store.close()
  await letGo(reads, Promise.all([closed, ...fetches]))
  expect(await Promise.all(fetches)).toEqual(Array(5).fill(GetOutcome.Miss))
})
