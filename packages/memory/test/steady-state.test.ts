import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { Pool } from '@tmem/core'
import { ByteLimit, createAccounts, PageBatch, systemAllocator } from '@tmem/core'
import { expect, test } from 'vitest'
import { MemoryStore } from '../src/memory.ts'

setFlagsFromString('--expose-gc')
const collect: () => void = runInNewContext('gc')

test('a million operations in a full store leave nothing on the heap, and put hardly anything there', () => {
  const store = new MemoryStore(new ByteLimit(2 * 1024 * 1024), {
    allocator: systemAllocator,
    accounts: createAccounts(),
  })
  const made = [false, true].map((persistent) =>
    store.newPool({ client: 1, persistent, shared: false, pageSize: 4096 }),
  )
  const pools = made.filter((pool): pool is Extract<typeof pool, object> => typeof pool !== 'number') satisfies Pool[]
  const page = new Uint8Array(4096)
  const batch = new PageBatch(16, 4096)
  for (let i = 0; i < 16; i++) batch.push(900 + i, i)
  /** Puts that are new, replace, evict and are refused; gets that hit, take and miss; flushes of pages and objects. */
  const work = (operations: number): void => {
    for (let i = 0; i < operations; i += 10) {
      const pool = pools[(i / 10) & 1]
      const object = (i * 7) % 97
      const index = (i * 31) % 13
      pool.put(object, index, page)
      pool.put(object, index, page)
      pool.get(object, index, page)
      pool.get(object, index + 1, page)
      pool.get(object, 99, page)
      pool.put(object, index + 2, page)
      pool.flushPage(object, index)
      pool.flushPage(object, 98)
      if (i % 1000 === 0) pool.flushObject(object)
      else pool.put(object + 100, index, page)
      if (i % 500 === 0) {
        batch.rearm()
        pool.putMany(batch)
        pool.flushMany(batch)
      } else pool.get(object + 100, 97, page)
    }
  }
  // As often as it takes to compile everything.
  work(300_000)
  collect()
  const before = process.memoryUsage().heapUsed
  let grown = 0
  let last = before
  for (let part = 0; part < 20; part++) {
    work(50_000)
    const now = process.memoryUsage().heapUsed
    grown += Math.max(0, now - last)
    last = now
  }
  collect()
  expect(process.memoryUsage().heapUsed - before).toBeLessThan(1024 * 1024)
  // One number on the heap per operation would be 12 MB or more.
  expect(grown).toBeLessThan(2 * 1024 * 1024)
  expect(store.stats().counters['evicted_pages']).toBeGreaterThan(0)
  store.check()
})
