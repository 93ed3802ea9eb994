import type { Layer } from '@tmem/core'
import { compose, GetOutcome, PageBatch, PutOutcome, TmemError } from '@tmem/core'
import { corrupt, count, delay, discard, fail, refuse, slowMemory, TraceLog, tear, trace } from '@tmem/faults'
import { afterAll, describe, expect, it, test } from 'vitest'
import { conformance, conformanceCases, type Manifest, makePage } from '../src/index.ts'
import { expectSame } from '../src/pages.ts'
import { countersOf, layers, MiB, stack, swapFolder } from './subjects.ts'

const folder = swapFolder()
afterAll(() => folder.remove())

/** A turn is a few microtasks: the same number each time. */
const turn = async (): Promise<void> => {
  for (let i = 0; i < 3; i++) await Promise.resolve()
}
const later = (): Layer => delay({ turn, pages: 20_000 })
const room = (): Layer => layers.memory(8 * MiB)
const inMemory: Manifest['refusals'] = {
  NoMemory: { by: 'filling', bytes: 10 * MiB },
  Quota: { by: 'quota', bytes: MiB },
  AllocationFailed: { by: 'allocator', bytes: 10 * MiB },
}
const runner = { describe, it }
const few = [4096, 65_536]

await conformance(
  stack('refuse every second put, over memory', () => [refuse({ every: 2 }), room()], {
    steady: false,
    pageSizes: few,
    refusals: { ...inMemory, NoMemory: { by: 'filling', bytes: 20 * MiB }, Policy: { by: 'filling', bytes: MiB } },
  }),
  runner,
)
await conformance(
  stack(
    'refuse all as unavailable, over memory',
    () => [refuse({ every: 1, reason: PutOutcome.Unavailable }), room()],
    {
      steady: false,
      pageSizes: few,
      refusals: { Frozen: 'it refuses for its own reason', Unavailable: { by: 'filling', bytes: MiB } },
    },
  ),
  runner,
)
await conformance(
  stack('zcache over refuse over memory', () => [layers.zcache(300_000), refuse({ every: 3 }), room()], {
    steady: false,
    pageSizes: few,
    refusals: {
      // What the filter refuses finds room in the zcache, whose coldest pages try again to go down, until nothing has
      // room.
      ...inMemory,
      NoMemory: { by: 'filling', bytes: 40 * MiB },
    },
  }),
  runner,
)
await conformance(
  stack('delay over memory', () => [later(), room()], { pageSizes: few, refusals: inMemory }),
  runner,
)
await conformance(
  stack(
    'delay over zcache over refuse over delay over slow memory',
    () => [
      later(),
      layers.zcache(300_000),
      refuse({ every: 5 }),
      delay({ turn }),
      slowMemory({ sizeBytes: 2 * MiB, turn }),
    ],
    {
      steady: false,
      pageSizes: few,
      refusals: { NoMemory: { by: 'filling', bytes: 40 * MiB } },
      property: { runs: 40 },
    },
  ),
  runner,
)
await conformance(
  stack(
    'memory over writes that fail, over slow memory',
    () => [layers.memory(200_000), fail({ every: 3, what: ['write'] }), slowMemory({ sizeBytes: 4 * MiB, turn })],
    {
      steady: false,
      pageSizes: few,
      refusals: { NoMemory: { by: 'filling', bytes: 40 * MiB }, Unavailable: { by: 'filling', bytes: 6 * MiB } },
      property: { runs: 40 },
    },
  ),
  runner,
)
await conformance(
  stack(
    'count and trace above and between all places',
    () => [
      count(),
      layers.zcache(300_000),
      trace({ log: new TraceLog({ operations: 64 }) }),
      count(),
      layers.memory(200_000),
      trace({ log: new TraceLog({ operations: 64 }) }),
      count(),
      layers.frontswap(folder.file()),
    ],
    { pageSizes: few, refusals: { NoMemory: { by: 'filling', bytes: 20 * MiB } }, property: { runs: 30 } },
  ),
  runner,
)
await conformance(
  stack('memory over delay over frontswap', () => [layers.memory(200_000), later(), layers.frontswap(folder.file())], {
    steady: false,
    pageSizes: few,
    refusals: { NoMemory: { by: 'filling', bytes: 6 * MiB } },
    property: { runs: 40 },
  }),
  runner,
)
await conformance(
  stack('count over trace over memory', () => [count(), trace({ log: new TraceLog({ operations: 64 }) }), room()], {
    pageSizes: few,
    refusals: inMemory,
  }),
  runner,
)
await conformance(
  stack('discard', () => [discard()], {
    steady: false,
    pageSizes: few,
    refusals: { Policy: { by: 'filling', bytes: MiB } },
  }),
  runner,
)
await conformance(
  stack('discard that loses', () => [discard({ mode: 'lose' })], { steady: false, pageSizes: few }),
  runner,
)

test('the suite and the model boundary catch a layer that corrupts', async () => {
  const failed: string[] = []
  const subject = stack('corrupt', () => [corrupt({ every: 5, seed: 3 }), room()], { pageSizes: [4096], steady: false })
  for (const one of await conformanceCases(subject)) await one.run().catch((error: Error) => failed.push(error.message))
  expect(failed.length).toBeGreaterThan(5)
  expect(failed.filter((message) => message.includes('the bytes are not those of the last put'))).not.toEqual([])
})

test.each([
  ['corrupts what is read', corrupt({ every: 3 })],
  ['corrupts what is kept', corrupt({ every: 3, what: 'kept' })],
  ['loses the end of flights', tear({ every: 2 })],
  ['loses whole flights', tear({ every: 3, kept: 0 })],
])('a place that %s makes an error, never a wrong byte', async (_name, lie) => {
  const store = compose([layers.zcache(300_000), lie, slowMemory({ sizeBytes: 4 * MiB, turn })])
  const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error('no pool')
  const pages = Array.from({ length: 300 }, (_, i) => makePage(i % 3 === 0 ? 'text' : 'noise', i, 4096))
  for (const [i, page] of pages.entries()) expect(pool.put(1, i, page)).toBe(PutOutcome.Stored)
  let errors = 0
  for (const [i, page] of pages.entries()) {
    const into = new Uint8Array(4096)
    try {
      if ((await pool.fetch(1, i, into)) !== GetOutcome.Hit) throw new Error(`page ${i} is missing`)
      expectSame(into, page, `page ${i}`)
    } catch (error) {
      if (!(error instanceof TmemError) || error.code !== 'TMEM_CORRUPT') throw error
      errors++
    }
  }
  expect(errors).toBeGreaterThan(10)
  store.check!()
  await store.close()
})

test('a batch crosses a stack once, and goes down in few writes', async () => {
  const store = compose([count(), layers.zcache(300_000), count(), layers.frontswap(folder.file())], { check: 'model' })
  const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error('no pool')
  const batch = new PageBatch(400)
  for (let i = 0; i < 400; i++)
    batch.bytes.set(makePage(i % 2 === 0 ? 'text' : 'noise', i, 4096), batch.offsets[batch.push(i >> 4, i)])
  expect(pool.putMany(batch)).toBe(400)
  batch.rearm()
  const hits = pool.getMany(batch)
  const deferred = batch.outcomes.filter((outcome) => outcome === GetOutcome.Deferred).length
  expect(deferred).toBeGreaterThan(100)
  expect(hits).toBe(400 - deferred)
  pool.flushMany(batch)
  const [pages, blocks] = countersOf(store, 'count')
  expect(pages).toMatchObject({ putMany: 1, getMany: 1, flushMany: 1, put: 0, get: 0, fetch: 0, flushPage: 0 })
  // A write carries what makes room for several puts.
  expect(blocks!['writeNow']).toBeLessThanOrEqual(deferred / 3)
  expect(blocks).toMatchObject({ write: 0, read: 0 })
  await store.close()
})
