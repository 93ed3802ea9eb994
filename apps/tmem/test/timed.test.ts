import { join } from 'node:path'
import { compose, PutOutcome } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import { Stopwatch, TimedStore, timedPlace } from '../src/demo/timed.ts'
import { temporaryDirectory } from './tmem.ts'

/** A clock that goes on by a millisecond whenever somebody looks: a call takes as long as there are looks within it. */
const lookedAt = (): (() => number) => {
  let clock = 0
  return () => ++clock
}
const attributes = { client: 0, persistent: true, shared: false, pageSize: 4096 } as const

test('the time of a store is that of the calls to it', async () => {
  const watch = new Stopwatch(lookedAt())
  const store = new TimedStore(compose([memory({ limitBytes: 2 ** 20 })]), watch)
  const pool = store.newPool(attributes)
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  const page = new Uint8Array(4096)
  expect(pool.put(0, 0, page)).toBe(PutOutcome.Stored)
  pool.get(0, 0, page)
  pool.flushPage(0, 0)
  expect(watch.elapsed).toBe(3)
  await store.close()
})

test('what a put waits for in the swap file is timed apart', async () => {
  const now = lookedAt()
  const calls = new Stopwatch(now)
  const waits = new Stopwatch(now)
  const file = join(temporaryDirectory(), 'swap.img')
  const store = new TimedStore(compose([timedPlace(frontswap({ file, sizeBytes: 2 ** 20 }), waits)]), calls)
  const pool = store.newPool(attributes)
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  const page = Uint8Array.from({ length: 4096 }, (_, at) => at)
  expect(pool.put(0, 0, page)).toBe(PutOutcome.Stored)
  // Looks: the call begins, the write begins, the write ends, the call ends.
  expect({ calls: calls.elapsed, waits: waits.elapsed }).toEqual({ calls: 3, waits: 1 })
  const back = new Uint8Array(4096)
  await pool.fetch(0, 0, back)
  expect(back).toEqual(page)
  expect(waits.elapsed).toBe(1)
  await store.close()
})
