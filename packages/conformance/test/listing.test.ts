/** Pages that can be listed, counted and dropped in the order in which they came: what a host of guests needs. */
import {
  compose,
  type Layer,
  type ObjectId,
  type PageStore,
  type Pool,
  PoolRefusal,
  PutOutcome,
  Whereabouts,
} from '@tmem/core'
import { count } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { describe, expect, test } from 'vitest'

const page = (fill: number): Uint8Array => {
  const bytes = new Uint8Array(4096).fill(fill)
  bytes[0] = 1
  return bytes
}

const made = (store: PageStore, client: number, persistent: boolean, pageSize = 4096): Pool => {
  const pool = store.newPool({ client, persistent, shared: false, pageSize })
  if (typeof pool === 'number') throw new Error(`refused: ${pool}`)
  return pool
}

const listed = (pool: Pool, object?: ObjectId): string[] => {
  const all: string[] = []
  pool.walk!((...name) => {
    all.push(name.join('/'))
    return true
  }, object)
  return all.sort()
}

const stacks: Readonly<Record<string, () => Layer[]>> = {
  'memory alone': () => [memory({ limitBytes: '4MiB' })],
  'a chain': () => [zcache({ limitBytes: '4MiB' })],
  'a chain under a filter': () => [count(), memory({ limitBytes: '2MiB' }), zcache({ limitBytes: '4MiB' })],
}

describe.each(Object.entries(stacks))('%s', (_name, layers) => {
  test('lists and counts the pages of a pool, and of an object', async () => {
    const store = compose(layers())
    const pool = made(store, 1, true)
    const other = made(store, 2, true)
    const wide = 2n ** 191n + 5n
    for (const [object, index] of [
      [3, 0],
      [3, 7],
      [wide, 1],
    ] as const)
      pool.put(object, index, page(index))
    other.put(3, 9, page(9))
    expect(listed(pool)).toEqual([`3/0`, `3/7`, `${wide}/1`].sort())
    expect(listed(pool, 3)).toEqual(['3/0', '3/7'])
    expect(listed(pool, 4)).toEqual([])
    const at = new Whereabouts()
    expect([pool.whereIs!(3, 7, at), pool.whereIs!(3, 8, at), pool.whereIs!(wide, 1, at)]).toEqual([true, false, true])
    expect(pool.census!()).toEqual({ pages: 3, objects: 2 })
    let seen = 0
    pool.walk!(() => ++seen < 2)
    expect(seen).toBe(2)
    pool.flushPage(3, 0)
    pool.flushObject(wide)
    expect(pool.census!()).toEqual({ pages: 1, objects: 1 })
    pool.destroy()
    expect(listed(pool)).toEqual([])
    expect(pool.census!()).toEqual({ pages: 0, objects: 0 })
    expect(other.census!()).toEqual({ pages: 1, objects: 1 })
    store.check?.()
    await store.close()
  })

  test('drops ephemeral pages in the order in which they came, of all or of one client', async () => {
    const store = compose(layers())
    const first = made(store, 1, false)
    const second = made(store, 2, false)
    const kept = made(store, 1, true)
    kept.put(1, 0, page(1))
    for (let n = 0; n < 4; n++) {
      expect(first.put(1, n, page(n))).toBe(PutOutcome.Stored)
      expect(second.put(1, n, page(n))).toBe(PutOutcome.Stored)
    }
    const bytes = store.ephemeralBytes!()
    expect(bytes).toBeGreaterThan(0)
    expect(store.evict!(2)).toBeGreaterThan(0)
    expect(listed(second)).toEqual(['1/1', '1/2', '1/3'])
    expect(store.evict!(77)).toBe(0)
    const freed = store.evict!()
    expect(freed).toBeGreaterThan(0)
    expect(store.ephemeralBytes!()).toBeLessThan(bytes)
    expect(listed(first)).toEqual(['1/1', '1/2', '1/3'])
    while (store.evict!() > 0);
    expect(first.census!().pages + second.census!().pages).toBe(0)
    expect(kept.census!().pages).toBe(1)
    expect(store.ephemeralBytes!()).toBe(0)
    store.check?.()
    await store.close()
  })
})

test('a page in parts is listed once', async () => {
  const store = compose([zcache({ limitBytes: '4MiB' })])
  const pool = made(store, 1, true, 256 * 1024)
  pool.put(1, 3, new Uint8Array(256 * 1024).fill(3))
  expect(listed(pool)).toEqual(['1/3'])
  expect(pool.census!()).toEqual({ pages: 1, objects: 1 })
  await store.close()
})

test('a view in parts of plain memory lists the parts that are there; the large pool lists nothing', async () => {
  const store = compose([memory({ limitBytes: '4MiB' })])
  const pool = made(store, 1, true, 16 * 1024)
  const parts = pool.split() as Pool
  pool.put(1, 0, new Uint8Array(16 * 1024).fill(3))
  parts.put(1, 5, page(5))
  expect(pool.walk === undefined).toBe(true)
  expect(listed(parts)).toEqual(['1/0', '1/1', '1/2', '1/3', '1/5'])
  expect(parts.census!()).toEqual({ pages: 5, objects: 1 })
  await store.close()
})

test('a chain has room for pools of thousands of clients, and 256 alike', async () => {
  const store = compose([zcache({ limitBytes: '4MiB' })])
  for (let client = 0; client < 2000; client++) made(store, client, (client & 1) === 0)
  const pool = made(store, 1999, false)
  expect(pool.put(1, 1, page(1))).toBe(PutOutcome.Stored)
  for (let n = 0; n < 256; n++) made(store, 5000, true)
  expect(store.newPool({ client: 5000, persistent: true, shared: false, pageSize: 4096 })).toBe(PoolRefusal.NoSlot)
  made(store, 5001, true)
  await store.close()
})
