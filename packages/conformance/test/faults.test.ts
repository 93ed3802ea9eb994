import type { Layer } from '@tmem/core'
import { compose, GetOutcome, PageBatch, PutOutcome } from '@tmem/core'
import { corrupt, count, delay, discard, refuse, TraceLog, trace } from '@tmem/faults'
import { afterAll, describe, expect, it, test } from 'vitest'
import { conformance, conformanceCases, type Manifest, makePage } from '../src/index.ts'
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
    refusals: { ...inMemory, NoMemory: { by: 'filling', bytes: 40 * MiB }, Policy: { by: 'noise' } },
  }),
  runner,
)
await conformance(
  stack('delay over memory', () => [later(), room()], { pageSizes: few, refusals: inMemory }),
  runner,
)
await conformance(
  stack(
    'zcache over delay over refuse over memory',
    () => [layers.zcache(300_000), later(), refuse({ every: 5 }), room()],
    {
      steady: false,
      pageSizes: few,
      refusals: {
        ...inMemory,
        NoMemory: { by: 'filling', bytes: 40 * MiB },
        Policy: { by: 'filling', bytes: 40 * MiB },
      },
    },
  ),
  runner,
)
await conformance(
  stack('memory over delay over frontswap', () => [layers.memory(200_000), later(), layers.frontswap(folder.file())], {
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

test('a batch crosses every layer of zcache over memory over frontswap once', async () => {
  const store = compose(
    [count(), layers.zcache(300_000), count(), layers.memory(200_000), count(), layers.frontswap(folder.file())],
    { check: 'model' },
  )
  const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error('no pool')
  const batch = new PageBatch(200)
  for (let i = 0; i < 200; i++)
    batch.bytes.set(makePage(i % 2 === 0 ? 'text' : 'noise', i, 4096), batch.offsets[batch.push(i >> 4, i)])
  expect(pool.putMany(batch)).toBe(200)
  batch.rearm()
  const hits = pool.getMany(batch)
  const deferred = batch.outcomes.filter((outcome) => outcome === GetOutcome.Deferred).length
  expect(deferred).toBeGreaterThan(0)
  expect(hits).toBe(200 - deferred)
  pool.flushMany(batch)
  const crossings = countersOf(store, 'count')
  expect(crossings.length).toBe(3)
  for (const layer of crossings)
    expect(layer).toMatchObject({ putMany: 1, getMany: 1, flushMany: 1, put: 0, get: 0, fetch: 0, flushPage: 0 })
  await store.close()
})
