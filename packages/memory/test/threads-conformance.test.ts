import type { Manifest } from '@tmem/conformance'
import { conformance } from '@tmem/conformance'
import type { PageStore } from '@tmem/core'
import { afterAll, describe, it } from 'vitest'
import { SharedMemoryStore } from '../src/index.ts'
import { Crew } from './crew.ts'
import { collectGarbage } from './garbage.mjs'

const KiB = 1024
const MiB = 1024 * KiB

let stores = 0
function opened(): SharedMemoryStore {
  // The garbage collector does not count shared memory, and would let that of all stores pile up.
  if (++stores % 16 === 0) collectGarbage()
  return SharedMemoryStore.create({ limitBytes: 72 * MiB, shards: 2 })
}

/** A store whose clients may have a quarter of a mebibyte each. */
function meagre(): SharedMemoryStore {
  const store = opened()
  for (let client = 0; client < 10; client++) store.setMaximum(client, 256 * KiB)
  return store
}

const manifest: Manifest = {
  refusals: {
    NoMemory: { by: 'filling', bytes: 80 * MiB },
    Quota: { by: 'opening', bytes: MiB, open: meagre },
    AllocationFailed: 'all memory is had at the start',
  },
}

await conformance({ name: 'the shared store', open: opened, manifest }, { describe, it })

/** Some cases open two stores at once. */
const crew = Crew.start(3)
const free = [0, 1, 2]
afterAll(() => crew.close())

/** A store in which another thread works in a pool of its own, until the store is closed. */
async function shared(): Promise<PageStore> {
  const thread = free.pop()
  if (thread === undefined) throw new Error('more stores are open than there are threads')
  const store = opened()
  const words = new Int32Array(new SharedArrayBuffer(8))
  const working = crew.run(thread, 'neighbour', { store: store.handle, seed: stores, words })
  if (Atomics.wait(words, 1, 0, 5000) === 'timed-out') throw new Error('the other thread did not begin')
  let closed = false
  return {
    name: store.name,
    capabilities: store.capabilities,
    newPool: (attributes) => store.newPool(attributes),
    tick: (budget) => store.tick(budget),
    stats: () => store.stats(),
    async close() {
      if (closed) return
      closed = true
      Atomics.store(words, 0, 1)
      Atomics.notify(words, 0)
      await working
      free.push(thread)
      await store.close()
      store.check()
    },
  }
}

await conformance({ name: 'the shared store with two threads', open: shared, manifest }, { describe, it })
