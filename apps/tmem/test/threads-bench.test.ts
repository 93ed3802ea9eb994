import { expect, test } from 'vitest'
// What was built: a worker thread cannot load TypeScript.
import { measureThreads } from '../dist/bench/threads.js'

const few = { pages: 200, operations: 50, rounds: 2 }

test('one thread and two are measured, in the store and without it', async () => {
  const { store, copy } = await measureThreads(few)
  for (const { one, two, ratio } of [store, copy]) {
    expect(one).toBeGreaterThan(0)
    expect(two).toBeGreaterThan(0)
    expect(ratio).toBeGreaterThan(0)
    expect([one, two, ratio].every(Number.isFinite)).toBe(true)
  }
})

test('an interruption ends it', async () => {
  await expect(measureThreads({ ...few, signal: AbortSignal.abort() })).rejects.toThrow('interrupted')
})
