import { conformance } from '@tmem/conformance'
import { compose, GetOutcome, PutOutcome } from '@tmem/core'
import { delay, refuse } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { describe, expect, it, test } from 'vitest'
import { timed } from '../src/demo/timed.ts'

// Taking the time changes nothing else: what a layer does, it does through the stopwatch, too.
const layers = () => [timed(memory({ limitBytes: 200_000 })), timed(memory({ limitBytes: 2 ** 24 }))]
await conformance(
  {
    name: 'memory over memory, timed',
    open: (context) => compose(layers(), { ...context, check: 'model' }),
    manifest: {
      pageSizes: [4096, 8192],
      property: { runs: 20 },
      refusals: {
        NoMemory: { by: 'filling', bytes: 2 ** 25 },
        Quota: { by: 'quota', bytes: 2 ** 20 },
        AllocationFailed: { by: 'allocator', bytes: 2 ** 25 },
      },
    },
  },
  { describe, it },
)

test('the time of a layer is its own, without that of the layers below', async () => {
  // A clock that goes on by a millisecond whenever somebody looks: a call takes as long as there are looks within it.
  let clock = 0
  const now = (): number => ++clock
  const above = timed(refuse({ every: 2 }), now)
  const below = timed(memory({ limitBytes: 2 ** 20 }), now)
  const store = compose([above, below])
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  const page = new Uint8Array(4096)
  const before = [above.seconds(), below.seconds()]
  expect(pool.put(0, 0, page)).toBe(PutOutcome.Stored)
  // Looks: above, its way down, below, and the three again on the way back.
  expect([above.seconds() - before[0]!, below.seconds() - before[1]!]).toEqual([0.002, 0.001])
  await store.close()
})

test('what a layer asks of the next one after a wait is not taken off its own time', async () => {
  let clock = 0
  const now = (): number => ++clock
  // A fetch waits first, then asks the layer below.
  const above = timed(delay({ turn: () => Promise.resolve() }), now)
  const below = timed(memory({ limitBytes: 2 ** 20 }), now)
  const store = compose([above, below])
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  expect(pool.put(0, 0, new Uint8Array(4096))).toBe(PutOutcome.Stored)
  const before = [above.seconds(), below.seconds()]
  expect(await pool.fetch(0, 0, new Uint8Array(4096))).toBe(GetOutcome.Hit)
  expect([above.seconds() - before[0]!, below.seconds() - before[1]!]).toEqual([0.001, 0.001])
  await store.close()
})
