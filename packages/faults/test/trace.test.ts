import type { Pool, PoolAttributes } from '@tmem/core'
import { compose, PageBatch, systemAllocator } from '@tmem/core'
import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'
import { corrupt, failingAllocator, refuse, replay, TraceLog, trace } from '../src/index.ts'

const attributes: PoolAttributes = { client: 1, persistent: true, shared: false, pageSize: 4096 }
const page = (seed: number): Uint8Array => new Uint8Array(4096).fill(seed)
const room = memory({ limitBytes: 2 ** 20 })

/** Something of everything. */
async function work(pool: Pool): Promise<void> {
  pool.put(1, 0, page(1))
  pool.put(2n ** 64n, 7, page(2))
  pool.get(1, 0, page(0))
  await pool.fetch(1, 9, page(0))
  pool.lend(1, 0, () => undefined)
  const batch = new PageBatch(2)
  batch.push(3, 0)
  batch.push(3, 1)
  batch.bytes.fill(3)
  pool.putMany(batch)
  batch.rearm()
  pool.getMany(batch)
  pool.flushMany(batch)
  const parts = pool.split()
  if (typeof parts !== 'number') parts.put(4, 0, page(4))
  pool.freeze()
  pool.put(9, 9, page(9))
  pool.thaw()
  pool.flushPage(1, 0)
  pool.flushObject(2n ** 64n)
  pool.destroy()
}

test('layers open from the bottom up and close from the top down: four of them, one list', async () => {
  const log = new TraceLog()
  const layer = (label: string): ReturnType<typeof trace> => trace({ log, label })
  const store = compose([layer('first'), layer('second'), layer('third'), layer('fourth'), room])
  const pool = store.newPool(attributes)
  if (typeof pool === 'number') throw new Error('no pool')
  pool.put(1, 0, page(1))
  pool.get(1, 0, page(0))
  store.tick({ pages: 4 })
  pool.destroy()
  await store.close()
  const calls = log.operations.map(({ label, name }) => `${label} ${name}`)
  const down = (name: string): string[] => ['first', 'second', 'third', 'fourth'].map((label) => `${label} ${name}`)
  const up = (name: string): string[] => down(name).toReversed()
  expect(calls).toEqual([
    ...up('open'),
    ...down('newPool'),
    ...down('put'),
    ...down('get'),
    ...down('tick'),
    ...down('destroy'),
    ...down('close'),
    ...up('closed'),
  ])
})

test('an operation is one line', async () => {
  const log = new TraceLog()
  const store = compose([trace({ log, label: 'top' }), room])
  await work(store.newPool(attributes) as Pool)
  expect(log.toString()).toMatchInlineSnapshot(`
    "top open
    top newPool client 1 private persistent 4096: pool 0
    top pool 0 put 1/0 crc 3ad9e426: Stored
    top pool 0 put 18446744073709551616/7 crc e7e6ce3e: Stored
    top pool 0 get 1/0 crc 3ad9e426: Hit
    top pool 0 fetch 1/9: Miss
    top pool 0 lend 1/0 crc 3ad9e426: Hit
    top pool 0 putMany 3/0 crc 1a232a09 Stored 3/1 crc 1a232a09 Stored: 2
    top pool 0 getMany 3/0 crc 1a232a09 Hit 3/1 crc 1a232a09 Hit: 2
    top pool 0 flushMany 3/0 3/1
    top pool 0 split: pool 1
    top pool 1 put 4/0 crc 86e99c4f: Stored
    top pool 0 freeze
    top pool 0 put 9/9 crc b932dc9a: Frozen
    top pool 0 thaw
    top pool 0 flushPage 1/0
    top pool 0 flushObject 18446744073709551616
    top pool 0 destroy"
  `)
  expect(store.stats().counters).toEqual({ operations: log.operations.length, dropped: 0 })
})

test('the list is bounded: the oldest operations go', () => {
  const log = new TraceLog({ operations: 3 })
  const pool = compose([trace({ log }), room]).newPool(attributes) as Pool
  for (let i = 0; i < 10; i++) pool.flushPage(i, 0)
  expect(log.operations.map(({ entries }) => entries[0]!.object)).toEqual([7, 8, 9])
  expect(log.dropped).toBe(9)
  expect(log.toString().split('\n')[0]).toBe('(9 earlier operations were dropped)')
  log.clear()
  expect([log.operations.length, log.dropped]).toEqual([0, 0])
  for (const operations of [0, 1.5, 2 ** 25]) expect(() => new TraceLog({ operations })).toThrow(RangeError)
})

describe('a trace that keeps pages', () => {
  const record = async (): Promise<TraceLog> => {
    const log = new TraceLog({ pages: true })
    const store = compose([trace({ log }), room])
    await work(store.newPool(attributes) as Pool)
    await work(store.newPool({ ...attributes, persistent: false, pageSize: 4096 }) as Pool)
    return log
  }

  test('can be run again: a store of the same kind answers the same', async () => {
    const log = await record()
    expect(await replay(log.operations, compose([room]))).toEqual([])
  })

  test('shows what another store answers otherwise', async () => {
    const log = await record()
    const refusing = await replay(log.operations, compose([refuse({ every: 1 }), room]))
    expect(refusing.map(({ recorded }) => recorded.name)).toContain('put')
    const corrupted = await replay(log.operations, compose([corrupt({ every: 1 }), room]))
    expect(new Set(corrupted.map(({ recorded }) => recorded.name))).toEqual(new Set(['get', 'lend', 'getMany']))
  })

  test('keeps what was put, whatever becomes of the caller’s page', async () => {
    const log = new TraceLog({ pages: true })
    const pool = compose([trace({ log }), room]).newPool(attributes) as Pool
    const source = page(1)
    pool.put(1, 0, source)
    pool.get(1, 0, page(0))
    source.fill(9)
    expect(await replay(log.operations, compose([room]))).toEqual([])
  })

  test('says so when it has not got what it takes', async () => {
    const log = new TraceLog()
    const pool = compose([trace({ log }), room]).newPool(attributes) as Pool
    pool.put(1, 0, page(1))
    await expect(replay(log.operations, compose([room]))).rejects.toThrow('the trace kept no page for this put')
    await expect(replay(log.operations.slice(-1), compose([room]))).rejects.toThrow('was made before the trace begins')
    const starved = new TraceLog({ pages: true })
    const allocator = failingAllocator(systemAllocator, { sites: ['trace.page'] })
    const other = compose([trace({ log: starved }), room], { allocator }).newPool(attributes) as Pool
    other.put(1, 0, page(1))
    await expect(replay(starved.operations, compose([room]))).rejects.toThrow('the trace kept no page for this put')
  })
})
