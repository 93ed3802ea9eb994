import {
  compose,
  GetOutcome,
  PageBatch,
  type PageStore,
  PoolRefusal,
  PutOutcome,
  parseStack,
  TmemError,
} from '@tmem/core'
import { memory } from '@tmem/memory'
import { type FileCall, type FileFault, systemFiles } from '@tmem/page-file'
import { zcache } from '@tmem/zcache'
import { describe, expect, test } from 'vitest'
import { spill, spillFactory } from '../src/index.ts'
import {
  countersOf,
  crash,
  fetched,
  isRightOrGone,
  MemoryFiles,
  open,
  pageOf,
  pageSize,
  path,
  poolOf,
  put,
  spillIn,
} from './stores.ts'

const { Hit, Miss, Deferred } = GetOutcome
const { Stored, Unavailable } = PutOutcome
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
/** The first sync from now on fails, and only that one. */
const failFirstSync = (files: MemoryFiles): void => {
  let syncs = 0
  files.fault = ({ name }) => (name === 'sync' && syncs++ === 0 ? { code: 'EIO' } : undefined)
}
/** Where the ring of a spill of 1 MiB begins. */
const ringAt = 4096 + 1024 * 64

describe('a restart', () => {
  test.each([
    ['closed in order', (store: { close(): Promise<void> }) => store.close()],
    ['dead', async (_store: object, files: MemoryFiles) => crash(files)],
  ])('the process was %s: every page is there', async (_how, end) => {
    const files = new MemoryFiles()
    let store = open(files)
    let pools = [poolOf(store), poolOf(store), poolOf(store, 2), poolOf(store, 1, false)]
    const objects = [5, 2n ** 190n + 7n, 2n ** 127n, 2 ** 45 + 3, 2n ** 64n]
    for (const [number, pool] of pools.entries())
      for (let index = 0; index < 10; index++) put(pool, objects[index % 5]!, index, number * 10 + index)
    await end(store, files)
    store = open(files)
    expect(countersOf(store)).toMatchObject({ left: 40, live: 0, damaged_records: 0 })
    pools = [poolOf(store), poolOf(store), poolOf(store, 2), poolOf(store, 1, false)]
    expect(countersOf(store)).toMatchObject({ recovered: 40, live: 40, left: 0 })
    expect(countersOf(store, 'chain')).toMatchObject({ recovered: 40, pages: 40 })
    store.check!()
    for (const [number, pool] of pools.entries())
      for (let index = 0; index < 10; index++)
        expect(await fetched(pool, objects[index % 5]!, index)).toEqual(pageOf(number * 10 + index))
    // Taken from the private pool for good.
    expect(countersOf(store)['live']).toBe(30)
    await store.close()
  })

  test('a file of another boot counts only when it was closed', async () => {
    for (const [closed, boot, left] of [
      [true, 'another', 1],
      [false, 'another', 0],
      [false, '', 0],
      [true, '', 1],
      [false, 'this boot', 1],
    ] as const) {
      const files = new MemoryFiles()
      const store = open(files)
      put(poolOf(store), 1, 1, 1)
      if (closed) await store.close()
      else crash(files)
      const next = open(files, { boot })
      expect(countersOf(next)['left']).toBe(left)
      await next.close()
    }
  })

  test('what was flushed, replaced, taken or refused does not come back', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    const pool = poolOf(store, 1, false)
    for (let index = 0; index < 6; index++) put(pool, 1, index, index)
    put(pool, 2, 0, 9)
    pool.flushPage(1, 0)
    put(pool, 1, 1, 50)
    expect(await fetched(pool, 1, 2)).toEqual(pageOf(2))
    pool.flushObject(2)
    crash(files)
    const next = open(files)
    const again = poolOf(next, 1, false)
    expect(await fetched(again, 1, 0)).toBeUndefined()
    expect(await fetched(again, 1, 1)).toEqual(pageOf(50))
    expect(await fetched(again, 1, 2)).toBeUndefined()
    expect(await fetched(again, 2, 0)).toBeUndefined()
    expect(await fetched(again, 1, 3)).toEqual(pageOf(3))
    await next.close()
  })

  test('DEVIATION: a destroyed pool: gone for this run, also for a new pool of its kind; found by the next run when there was none', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    const pool = poolOf(store)
    put(pool, 1, 1, 1)
    pool.destroy()
    expect(pool.put(1, 2, pageOf(1))).toBe(PutOutcome.PoolGone)
    expect(pool.get(1, 1, pageOf(0))).toBe(Miss)
    expect(countersOf(store)).toMatchObject({ left: 1, live: 0 })
    const second = poolOf(store)
    expect(second.get(1, 1, pageOf(0))).toBe(Miss)
    expect(countersOf(store)['left']).toBe(0)
    put(second, 1, 3, 3)
    second.destroy()
    await store.close()
    const next = open(files)
    const found = poolOf(next)
    expect(await fetched(found, 1, 1)).toBeUndefined()
    expect(await fetched(found, 1, 3)).toEqual(pageOf(3))
    await next.close()
  })

  test('pages in parts are found whole, or not at all', async () => {
    const files = new MemoryFiles()
    const large = 128 * 1024
    const store = open(files, { sizeBytes: 2 ** 21 })
    const pool = poolOf(store, 1, true, large)
    put(pool, 1, 4, 6)
    put(pool, 1, 9, 9)
    // Half of one of them.
    const second = files.content(path)!.subarray(4096 + 2 * 64, 4096 + 3 * 64)
    expect(second.some((byte) => byte !== 0)).toBe(true)
    await store.close()
    const bytes = files.content(path)!
    bytes.fill(0, 4096 + 2 * 64, 4096 + 3 * 64)
    files.put(path, bytes)
    const next = open(files, { sizeBytes: 2 ** 21 })
    const again = poolOf(next, 1, true, large)
    expect(await fetched(again, 1, 4)).toEqual(pageOf(6, large))
    expect(await fetched(again, 1, 9)).toBeUndefined()
    expect(countersOf(next)['live']).toBe(2)
    await next.close()
  })

  test('blocks are written as they come, whichever codec made them, and read by a stack with another one', async () => {
    const files = new MemoryFiles()
    const through = async (codec: 'lz4' | 'deflate' | 'lz4js', from: number): Promise<void> => {
      const { ByteLimit } = await import('@tmem/core')
      const limit = new ByteLimit(2 ** 20)
      const store = compose([zcache({ limitBytes: limit, codec }), spillIn(files)])
      const pool = poolOf(store)
      for (let index = 0; index < from; index++) {
        expect(await fetched(pool, 3, index)).toEqual(pageOf(index))
      }
      for (let index = from; index < from + 20; index++) put(pool, 3, index, index)
      // What is in memory is passed down before the end.
      limit.bytes = 0
      while (countersOf(store, 'chain')['pages'] !== countersOf(store)['live']) {
        store.tick({ pages: 1024 })
        await turn()
      }
      const chain = countersOf(store, 'chain')
      expect(chain['encoded_again']).toBe(0)
      expect(chain['decoded_to_move']).toBe(0)
      await store.close()
    }
    await through('deflate', 0)
    await through('lz4js', 20)
    await through('lz4', 40)
    const store = compose([zcache({ limitBytes: 2 ** 20 }), spillIn(files)])
    expect(countersOf(store)['left']).toBe(60)
    const pool = poolOf(store)
    for (let index = 0; index < 60; index++) expect(await fetched(pool, 3, index)).toEqual(pageOf(index))
    await store.close()
  })

  test('a page that rose into memory is not in the file any more', async () => {
    const files = new MemoryFiles()
    const store = compose([zcache({ limitBytes: 256 * 1024 }), spillIn(files)])
    const pool = poolOf(store)
    for (let index = 0; index < 200; index++) put(pool, 1, index, index * 3)
    expect(pool.get(1, 0, pageOf(0))).toBe(Deferred)
    expect(await fetched(pool, 1, 0)).toEqual(pageOf(0))
    expect(pool.get(1, 0, pageOf(0))).toBe(Hit)
    pool.put(1, 0, pageOf(1))
    crash(files)
    const next = open(files)
    expect(await fetched(poolOf(next), 1, 0)).toBeUndefined()
    await next.close()
  })

  test('another size begins anew', async () => {
    const files = new MemoryFiles()
    let store = open(files)
    put(poolOf(store), 1, 1, 1)
    await store.close()
    for (const sizeBytes of [2 ** 21, 2 ** 20, 2 ** 20 + 1]) {
      store = open(files, { sizeBytes })
      expect(countersOf(store)['left']).toBe(0)
      const pool = poolOf(store)
      expect(await fetched(pool, 1, 1)).toBeUndefined()
      put(pool, 1, 1, 2)
      await store.close()
    }
  })
})

describe('a ring', () => {
  test('the oldest pages are overwritten, also after restarts, and what is there is right', async () => {
    const files = new MemoryFiles()
    const sizeBytes = 128 * 1024
    let store = open(files, { sizeBytes })
    let pool = poolOf(store)
    let newest = 0
    for (let round = 0; round < 4; round++) {
      for (let n = 0; n < 300; n++) put(pool, 3, newest, newest++ % 251)
      const live: number[] = []
      for (let index = 0; index < newest; index++) {
        const page = await fetched(pool, 3, index)
        if (page === undefined) continue
        live.push(index)
        expect(Buffer.compare(page, pageOf(index % 251))).toBe(0)
      }
      // The newest ones, without a gap: 28 frames of 4160 bytes in 116 KiB.
      expect(live).toEqual(Array.from({ length: live.length }, (_, n) => newest - live.length + n))
      expect(live.length).toBeGreaterThan(25)
      expect(countersOf(store)['live']).toBe(live.length)
      store.check!()
      if (round % 2 === 0) await store.close()
      else crash(files)
      store = open(files, { sizeBytes })
      pool = poolOf(store)
      store.check!()
    }
    await store.close()
  })

  test('more small frames than records: the oldest go, though there are bytes left', async () => {
    const files = new MemoryFiles()
    const store = compose([zcache({ limitBytes: 256 * 1024 }), spillIn(files, { sizeBytes: 128 * 1024 })])
    const pool = poolOf(store)
    const small = (index: number): Uint8Array => {
      const page = new Uint8Array(pageSize)
      new DataView(page.buffer).setUint32(0, index)
      return page
    }
    for (let index = 0; index < 5000; index++) expect(pool.put(1, index, small(index))).toBe(Stored)
    expect(countersOf(store)).toMatchObject({ records: 128, live: 128 })
    expect(countersOf(store)['overwritten']).toBeGreaterThan(1000)
    store.check!()
    const into = new Uint8Array(pageSize)
    let found = 0
    for (let index = 0; index < 5000; index++) {
      if ((await pool.fetch(1, index, into)) !== Hit) continue
      found++
      expect(Buffer.compare(into, small(index))).toBe(0)
    }
    expect(found).toBeGreaterThan(128)
    await store.close()
  })

  test('large pages, that find no place at the end of the ring', async () => {
    const files = new MemoryFiles()
    const store = open(files, { sizeBytes: 512 * 1024 })
    expect(store.capabilities.maxPageSize).toBe(65_536)
    const pool = poolOf(store, 1, true, 65_536)
    for (let n = 0; n < 40; n++) {
      put(pool, 1, n, n * 3)
      expect(Buffer.compare((await fetched(pool, 1, n))!, pageOf(n * 3, 65_536))).toBe(0)
    }
    store.check!()
    expect(store.newPool({ client: 1, persistent: true, shared: false, pageSize })).toBe(PoolRefusal.Unsupported)
    expect(store.newPool({ client: 1, persistent: false, shared: false, pageSize: 2 ** 21 })).toBe(
      PoolRefusal.BadPageSize,
    )
    await store.close()
  })

  test('pages in parts, larger than all of the ring: below memory they are dropped, and nothing breaks', async () => {
    const files = new MemoryFiles()
    const large = 2 ** 17
    const store = compose([memory({ limitBytes: 2 ** 21 }), spillIn(files, { sizeBytes: 192 * 1024 })], {
      check: 'model',
    })
    const pool = poolOf(store, 1, true, large)
    for (let n = 0; n < 60; n++) put(pool, 1, n, n)
    store.check!()
    for (let n = 0; n < 60; n++) expect(await isRightOrGone(pool, 1, n, n)).toBe(true)
    expect(Buffer.compare((await fetched(pool, 1, 59))!, pageOf(59, large))).toBe(0)
    await store.close()
  })

  test('a batch is one write to the ring and one of records; what it overwrites is erased together', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    const pool = poolOf(store)
    const batch = new PageBatch(20, pageSize)
    const putBatch = (first: number): FileCall[] => {
      const calls: FileCall[] = []
      files.fault = (call) => {
        if (call.name === 'write') calls.push(call)
        return undefined
      }
      batch.clear()
      for (let n = 0; n < 20; n++) batch.bytes.set(pageOf(first + n), batch.offsets[batch.push(1, first + n)]!)
      expect(pool.putMany(batch)).toBe(20)
      files.fault = () => undefined
      return calls
    }
    const bytes = 20 * 4160
    for (let n = 0; n < 11; n++)
      expect(putBatch(n * 20).map(({ position, length }) => [position, length])).toEqual([
        [ringAt + n * bytes, bytes],
        [4096 + n * 20 * 64, 20 * 64],
      ])
    // Round the end of the ring it is in two parts; what has to go for it is erased at once, before.
    const [erased, ...writes] = putBatch(220)
    expect([erased!.position, erased!.length % 64]).toEqual([4096, 0])
    expect(erased!.length).toBeGreaterThan(64)
    expect(writes.map(({ position }) => position)).toEqual([ringAt + 11 * bytes, ringAt, 4096 + 220 * 64])
    store.check!()
    await store.close()
  })

  test('what was written and recovered = live + overwritten + erased + forgotten', async () => {
    const files = new MemoryFiles()
    let store = open(files, { sizeBytes: 128 * 1024 })
    for (let round = 0; round < 3; round++) {
      const pool = poolOf(store, 1, false)
      const other = poolOf(store, 2)
      for (let n = 0; n < 300; n++) {
        pool.put(n % 7, n % 3 === 0 ? n % 4 : n % 90, pageOf((n % 83) * 3))
        if (n % 40 === 0) other.put(1, n, pageOf(n % 200))
        if (n % 5 === 0) pool.flushPage(n % 7, (n * 3) % 90)
        if (n % 11 === 1) await fetched(pool, (n - 1) % 7, (n - 1) % 90)
      }
      other.destroy()
      const { written, recovered, live, overwritten, erased, forgotten } = countersOf(store)
      expect(written! + recovered!).toBe(live! + overwritten! + erased! + forgotten!)
      for (const count of [live, overwritten, erased, forgotten, round === 0 ? 1 : recovered])
        expect(count).toBeGreaterThan(0)
      store.check!()
      await store.close()
      store = open(files, { sizeBytes: 128 * 1024 })
    }
    await store.close()
  })

  test('a get defers; a fetch that is overtaken looks again', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    const pool = poolOf(store)
    put(pool, 1, 1, 1)
    expect(pool.get(1, 1, pageOf(0))).toBe(Deferred)
    const first = fetched(pool, 1, 1)
    const second = fetched(pool, 1, 1)
    await turn()
    put(pool, 1, 1, 2)
    const pages = [await first, await second]
    for (const page of pages) expect([pageOf(1), pageOf(2)]).toContainEqual(page)
    expect(await fetched(pool, 1, 1)).toEqual(pageOf(2))
    const gone = fetched(pool, 1, 1)
    pool.destroy()
    expect(await gone).toBeUndefined()
    await store.close()
  })

  test('where the pool of threads may not be used, everything is done at once', async () => {
    const files = new MemoryFiles()
    const store = compose([zcache({ limitBytes: 256 * 1024 }), spillIn(files)], { io: 'blocking', check: 'model' })
    // A call that need not block would be held up for ever.
    files.fault = () => ({ until: new Promise(() => undefined) })
    const pool = poolOf(store)
    for (let index = 0; index < 200; index++) {
      put(pool, 1, index, index)
      store.tick({ pages: 8 })
    }
    for (let index = 0; index < 200; index++) expect(await fetched(pool, 1, index)).toEqual(pageOf(index))
    files.fault = () => undefined
    await store.close()
  })
})

describe('flights', () => {
  /** Writes to the ring wait until they are let go. */
  function held(): { files: MemoryFiles; go: () => Promise<void>; waiting: () => number } {
    const files = new MemoryFiles()
    const waiting: (() => void)[] = []
    files.fault = ({ name, position }) =>
      name === 'write' && position >= ringAt ? { until: new Promise((resolve) => waiting.push(resolve)) } : undefined
    return {
      files,
      go: async () => {
        for (const resolve of waiting.splice(0)) resolve()
        for (let n = 0; n < 10; n++) await turn()
      },
      waiting: () => waiting.length,
    }
  }
  const stack = async (files: MemoryFiles) => {
    const { ByteLimit } = await import('@tmem/core')
    const limit = new ByteLimit(256 * 1024)
    const store = compose([memory({ limitBytes: limit }), spillIn(files)], { check: 'model' })
    const pool = poolOf(store)
    for (let index = 0; index < 50; index++) put(pool, 1, index, index)
    limit.bytes = 128 * 1024
    store.tick({ pages: 100 })
    return { store, pool }
  }

  test('a page that changed on its way gets no record', async () => {
    const { files, go, waiting } = held()
    const { store, pool } = await stack(files)
    expect(waiting()).toBeGreaterThan(0)
    put(pool, 1, 0, 99)
    pool.flushPage(1, 1)
    const before = files.content(path)!
    await go()
    const { written } = countersOf(store)
    expect(written).toBeGreaterThan(5)
    const after = files.content(path)!
    // The first two records of the flight are empty, the third is there.
    for (const [number, isThere] of [false, false, true].entries()) {
      const at = 4096 + number * 64
      expect(before.subarray(at, at + 64).some((byte) => byte !== 0)).toBe(false)
      expect(after.subarray(at, at + 64).some((byte) => byte !== 0)).toBe(isThere)
    }
    store.check!()
    expect(await fetched(pool, 1, 0)).toEqual(pageOf(99))
    expect(await fetched(pool, 1, 1)).toBeUndefined()
    expect(await fetched(pool, 1, 2)).toEqual(pageOf(2))
    await store.close()
  })

  test('a put that has to write meanwhile writes beside them', async () => {
    const { files, go, waiting } = held()
    const { store, pool } = await stack(files)
    const flights = waiting()
    expect(flights).toBeGreaterThan(0)
    for (let index = 50; index < 120; index++) put(pool, 1, index, index)
    store.check!()
    await go()
    store.check!()
    for (let index = 0; index < 120; index++) expect(await fetched(pool, 1, index)).toEqual(pageOf(index))
    await store.close()
  })

  test('one that is still under way when the ring has come round is not overwritten', async () => {
    const { files, go, waiting } = held()
    const { store, pool } = await stack(files)
    expect(waiting()).toBeGreaterThan(0)
    for (let index = 50; index < 700; index++) put(pool, 1, index, index % 251)
    store.check!()
    await go()
    store.check!()
    for (let index = 0; index < 700; index++) expect(await isRightOrGone(pool, 1, index, index % 251)).toBe(true)
    await store.close()
  })

  test('close waits for them', async () => {
    const { files, go, waiting } = held()
    const { store } = await stack(files)
    expect(waiting()).toBeGreaterThan(0)
    let closed = false
    const closing = store.close().then(() => {
      closed = true
    })
    await turn()
    expect(closed).toBe(false)
    await go()
    await closing
  })
})

describe('a disk that fails', () => {
  const failing = (fault: (call: FileCall) => FileFault | undefined): MemoryFiles => {
    const files = new MemoryFiles()
    files.fault = fault
    return files
  }

  test('a page that cannot be read is dropped: a miss', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    const pool = poolOf(store)
    put(pool, 1, 1, 1)
    files.fault = ({ name }) => (name === 'read' ? { code: 'EIO' } : undefined)
    expect(await fetched(pool, 1, 1)).toBeUndefined()
    files.fault = () => undefined
    expect(await fetched(pool, 1, 1)).toBeUndefined()
    expect(countersOf(store)).toMatchObject({ read_errors: 1, live: 0 })
    await store.close()
  })

  test('a full disk: why a put is refused is known; what is there stays, and when there is room again it goes on', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    const pool = poolOf(store)
    for (let index = 0; index < 10; index++) put(pool, 1, index, index)
    files.fault = ({ name, position }) => (name === 'write' && position >= ringAt ? { code: 'ENOSPC' } : undefined)
    for (let index = 10; index < 2000; index++) {
      expect(pool.put(1, index, pageOf(index % 200))).toBe(Unavailable)
      expect(store.failure).toMatchObject({ code: 'TMEM_IO', cause: { code: 'ENOSPC' } })
    }
    const batch = new PageBatch(2, pageSize)
    batch.push(1, 10)
    batch.push(1, 11)
    expect(pool.putMany(batch)).toBe(0)
    expect(store.failure).toMatchObject({ cause: { code: 'ENOSPC' } })
    // Nothing was overwritten for what could not be written.
    for (let index = 0; index < 10; index++) expect(await fetched(pool, 1, index)).toEqual(pageOf(index))
    files.fault = () => undefined
    put(pool, 1, 10, 10)
    expect(store.failure).toBeUndefined()
    store.check!()
    await store.close()
  })

  test('a disk that is full where records are written', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    const pool = poolOf(store)
    put(pool, 1, 0, 0)
    files.fault = ({ name, position }) =>
      name === 'write' && position >= 4096 && position < ringAt ? { code: 'ENOSPC' } : undefined
    // Nothing was there, so nothing has to be removed: the file is as good as before.
    expect(pool.put(1, 1, pageOf(1))).toBe(Unavailable)
    expect(countersOf(store)).toMatchObject({ abandoned: 0, live: 1 })
    files.fault = () => undefined
    put(pool, 1, 1, 1)
    store.check!()
    await store.close()
  })

  test('below memory, too: what is old goes, what is new stays', async () => {
    const files = failing(() => undefined)
    const store = compose([memory({ limitBytes: 256 * 1024 }), spillIn(files)], { check: 'model' })
    const pool = poolOf(store)
    files.fault = ({ name, position }) => (name === 'write' && position >= ringAt ? { code: 'ENOSPC' } : undefined)
    for (let index = 0; index < 500; index++) put(pool, 1, index, index % 200)
    expect(await fetched(pool, 1, 499)).toEqual(pageOf(99))
    await store.close()
  })

  // What fails is one write, before or after it did its work; the record that may be there is then emptied.
  test.each([
    ['the frame', 0, 0],
    ['the frame, in part', 0, 100],
    ['the record', 1, 0],
    ['the record, in part', 1, 30],
    ['the record, its work done', 1, 64],
  ])(
    'a put whose write of %s fails is refused, and nothing of it is left, also after a restart',
    async (_what, n, bytes) => {
      const files = new MemoryFiles()
      const store = open(files)
      const pool = poolOf(store)
      put(pool, 1, 1, 1)
      // After the old record was emptied.
      let writes = n + 1
      files.fault = ({ name }) => (name === 'write' && writes-- === 0 ? { code: 'EIO', bytes } : undefined)
      expect(pool.put(1, 1, pageOf(2))).toBe(Unavailable)
      expect(writes).toBeLessThan(0)
      files.fault = () => undefined
      expect(pool.get(1, 1, pageOf(0))).toBe(Miss)
      store.check!()
      crash(files)
      const next = open(files)
      expect(countersOf(next)['left']).toBe(0)
      expect(await fetched(poolOf(next), 1, 1)).toBeUndefined()
      await next.close()
    },
  )

  test.each(['closed', 'killed'] as const)(
    'a record that cannot be emptied: the file is given up, and nothing of it comes back, also when it is then %s',
    async (end) => {
      const files = new MemoryFiles()
      const store = open(files)
      const pool = poolOf(store)
      put(pool, 1, 1, 1)
      put(pool, 1, 2, 2)
      let writes = 0
      files.fault = ({ name }) => (name === 'write' && writes++ === 0 ? { code: 'EIO' } : undefined)
      pool.flushPage(1, 1)
      expect(await fetched(pool, 1, 1)).toBeUndefined()
      expect(pool.put(1, 3, pageOf(3))).toBe(Unavailable)
      expect(store.failure).toMatchObject({ cause: { code: 'EIO' } })
      expect(countersOf(store)['abandoned']).toBe(1)
      if (end === 'closed') await store.close()
      else crash(files)
      expect(files.content(path) === undefined).toBe(end === 'closed')
      const next = open(files)
      expect(countersOf(next)['left']).toBe(0)
      await next.close()
    },
  )

  test('nor can its header be emptied: then it is cut off', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    const pool = poolOf(store)
    put(pool, 1, 1, 1)
    let writes = 0
    files.fault = ({ name }) => (name === 'write' && writes++ < 2 ? { code: 'EIO' } : undefined)
    pool.flushPage(1, 1)
    expect(files.content(path)).toHaveLength(4096)
    crash(files)
    const next = open(files)
    expect(countersOf(next)['left']).toBe(0)
    await next.close()
  })

  test('when it cannot be given up, either, that is said', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    const pool = poolOf(store)
    put(pool, 1, 1, 1)
    files.fault = ({ name }) => (name === 'write' || name === 'resize' ? { code: 'EIO' } : undefined)
    expect(() => pool.flushPage(1, 1)).toThrow('cannot be removed')
    files.fault = () => undefined
    await store.close()
  })

  test('closing fails: TMEM_IO, and the file is free; opening fails: TMEM_IO, and nothing is left behind', async () => {
    const files = new MemoryFiles()
    const store = open(files)
    files.fault = ({ name }) => (name === 'sync' ? { code: 'EIO' } : undefined)
    await expect(store.close()).rejects.toMatchObject({ code: 'TMEM_IO' })
    for (const name of ['read', 'write', 'sync'] as const) {
      files.fault = (call) => (call.name === name ? { code: 'EIO' } : undefined)
      expect(() => open(files)).toThrow(TmemError)
    }
    // The table of an earlier run: it is read when all else was in order.
    files.fault = ({ name, position }) => (name === 'read' && position >= 4096 ? { code: 'EIO' } : undefined)
    expect(() => open(files)).toThrow(TmemError)
    files.fault = () => undefined
    await open(files).close()
    const fresh = failing(({ name, position }) => (name === 'write' && position === 1024 ? { code: 'EIO' } : undefined))
    expect(() => open(fresh)).toThrow(TmemError)
    expect(fresh.content(path)).toBeUndefined()
  })

  test.each([
    [
      'closing',
      async (store: PageStore, files: MemoryFiles) => {
        failFirstSync(files)
        await store.close()
      },
    ],
    [
      'opening',
      async (_store: PageStore, files: MemoryFiles) => {
        crash(files)
        failFirstSync(files)
        open(files)
      },
    ],
  ])(
    'a sync that fails at %s: what it should have made last is written once more, so that nothing comes back',
    async (_when, fail) => {
      const files = new MemoryFiles()
      let store = open(files)
      put(poolOf(store), 1, 1, 1)
      await store.close()
      store = open(files)
      poolOf(store).flushPage(1, 1)
      await expect(fail(store, files)).rejects.toThrow(TmemError)
      // The next run syncs, and is closed in order; the system has forgotten by then.
      await open(files).close()
      files.powerFailure()
      store = open(files, { boot: 'the next' })
      expect(await fetched(poolOf(store), 1, 1)).toBeUndefined()
      await store.close()
    },
  )

  test('a power failure: what is in use is begun anew, what was closed is there', async () => {
    for (const kept of [() => 0, ({ length }: { length: number }) => length]) {
      const files = new MemoryFiles()
      let store = open(files)
      put(poolOf(store), 1, 1, 1)
      await store.close()
      files.powerFailure(kept)
      store = open(files, { boot: 'the next' })
      const pool = poolOf(store)
      expect(await fetched(pool, 1, 1)).toEqual(pageOf(1))
      pool.flushPage(1, 1)
      put(pool, 1, 2, 2)
      files.powerFailure(kept)
      store = open(files, { boot: 'the one after it' })
      expect(countersOf(store)['left']).toBe(0)
      await store.close()
    }
  })
})

test('settings that make no sense are refused; in text it is a layer like any other', async () => {
  expect(() => spill({ file: 'x', sizeBytes: 1000 })).toThrow(RangeError)
  expect(() => spill({ file: 'x', sizeBytes: 2 ** 40 })).toThrow(RangeError)
  expect(() => parseStack(`spill(file=x)`, [spillFactory])).toThrow('size')
  const [layer] = parseStack(`spill(file=${path},size=1MiB)`, [spillFactory])
  expect(layer!.place!.traits).toMatchObject({
    ephemeral: true,
    persistent: false,
    survives: 'process',
    rawOnly: false,
  })
  expect(systemFiles().identify(path, false)).toBeUndefined()
})
