import { spawn, spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { crc32 } from 'node:zlib'
import {
  compose,
  GetOutcome,
  type ObjectId,
  type PageStore,
  type Pool,
  PoolRefusal,
  PutOutcome,
  parseStack,
} from '@tmem/core'
import fc from 'fast-check'
import { afterAll, describe, expect, test } from 'vitest'
import { nodeSpillIo, type SpillIo, type SpillOptions, spill, spillFactory } from '../src/index.ts'
import { bootName } from '../src/spill-file.ts'

const { Hit, Miss, Deferred } = GetOutcome
const { Stored, Unavailable } = PutOutcome
const pageSize = 4096
const folder = mkdtempSync(join(tmpdir(), 'spill-'))
afterAll(() => rmSync(folder, { recursive: true }))
let files = 0
const path = (): string => join(folder, `spill${files++}`)

/** Without the model of the boundary, which knows nothing of pages of an earlier run. */
const open = (file: string, options: Partial<SpillOptions> = {}): PageStore =>
  compose([spill({ file, sizeBytes: 2 ** 20, boot: 'this boot', ...options })])
function poolOf(store: PageStore, client = 1, shared = true): Pool {
  const pool = store.newPool({ client, persistent: false, shared, pageSize })
  if (typeof pool === 'number') throw new Error(`refused: ${pool}`)
  return pool
}
/** A page that tells its seed; some compress, some do not. */
function pageOf(seed: number): Uint8Array {
  const page = new Uint8Array(pageSize).fill(seed)
  let state = (seed + 1) * 0x9e3779b1
  if (seed % 3 === 0)
    for (let at = 0; at < pageSize; at++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      page[at] = state >>> 24
    }
  return page
}
async function fetched(pool: Pool, object: ObjectId, index: number): Promise<Uint8Array | undefined> {
  const into = new Uint8Array(pageSize)
  return (await pool.fetch(object, index, into)) === Hit ? into : undefined
}
/** The process dies: nothing is closed, and the header names a process that has ended. (The descriptor goes with the test.) */
function crash(file: string): void {
  const bytes = readFileSync(file)
  const mark = Buffer.from(`${ended} - -`.padEnd(80, '\0'), 'latin1')
  bytes.writeUInt32LE(`${ended} - -`.length, 124)
  mark.copy(bytes, 128)
  bytes.writeUInt32LE(crc32(bytes.subarray(0, 4092)), 4092)
  writeFileSync(file, bytes)
}
/** Number of a process that has ended. */
const ended = spawnSync(process.execPath, ['-e', '']).pid

describe('a restart', () => {
  test.each([
    ['closed in order', async (store: PageStore) => store.close()],
    ['dead', async (_store: PageStore, file: string) => crash(file)],
  ])('the process was %s: every page is there', async (_how, end) => {
    const file = path()
    let store = open(file)
    let pools = [poolOf(store), poolOf(store), poolOf(store, 2), poolOf(store, 1, false)]
    const wide = 2n ** 190n + 7n
    for (const [number, pool] of pools.entries())
      for (let index = 0; index < 10; index++)
        expect(pool.put(index % 2 === 0 ? 5 : wide, index, pageOf(number * 10 + index))).toBe(Stored)
    await end(store, file)
    store = open(file)
    expect(store.stats().counters).toMatchObject({ recovered: 40, live: 40, corrupt_dropped: 0 })
    pools = [poolOf(store), poolOf(store), poolOf(store, 2), poolOf(store, 1, false)]
    for (const [number, pool] of pools.entries())
      for (let index = 0; index < 10; index++)
        expect(await fetched(pool, index % 2 === 0 ? 5 : wide, index)).toEqual(pageOf(number * 10 + index))
    // Taken from the private pool for good.
    expect(store.stats().counters['live']).toBe(30)
    await store.close()
  })

  test('a file of another boot counts only when it was closed', async () => {
    for (const [closed, boot, recovered] of [
      [true, 'another', 1],
      [false, 'another', 0],
      [false, '', 0],
      [false, 'this boot', 1],
    ] as const) {
      const file = path()
      const store = open(file)
      poolOf(store).put(1, 1, pageOf(1))
      if (closed) await store.close()
      else crash(file)
      const next = open(file, { boot })
      expect(next.stats().counters['recovered']).toBe(recovered)
      await next.close()
    }
  })

  test('what was flushed, replaced, taken or refused does not come back', async () => {
    const file = path()
    const store = open(file)
    const pool = poolOf(store, 1, false)
    for (let index = 0; index < 6; index++) pool.put(1, index, pageOf(index))
    pool.put(2, 0, pageOf(9))
    pool.flushPage(1, 0)
    pool.put(1, 1, pageOf(50))
    expect(await fetched(pool, 1, 2)).toEqual(pageOf(2))
    pool.flushObject(2)
    crash(file)
    const next = open(file)
    const again = poolOf(next, 1, false)
    expect(await fetched(again, 1, 0)).toBeUndefined()
    expect(await fetched(again, 1, 1)).toEqual(pageOf(50))
    expect(await fetched(again, 1, 2)).toBeUndefined()
    expect(await fetched(again, 2, 0)).toBeUndefined()
    expect(await fetched(again, 1, 3)).toEqual(pageOf(3))
    await next.close()
  })

  test('DEVIATION: a destroyed pool: gone for this run, also for a new pool of its kind; found by the next run when there was none', async () => {
    const file = path()
    const store = open(file)
    const pool = poolOf(store)
    pool.put(1, 1, pageOf(1))
    pool.destroy()
    pool.destroy()
    expect(pool.put(1, 2, pageOf(1))).toBe(PutOutcome.PoolGone)
    expect(pool.get(1, 1, pageOf(0))).toBe(Miss)
    const second = poolOf(store)
    expect(second.get(1, 1, pageOf(0))).toBe(Miss)
    second.put(1, 3, pageOf(3))
    second.destroy()
    await store.close()
    const next = open(file)
    const found = poolOf(next)
    expect(await fetched(found, 1, 1)).toBeUndefined()
    expect(await fetched(found, 1, 3)).toEqual(pageOf(3))
    await next.close()
  })

  test('written with one codec, read with another', async () => {
    const file = path()
    let store = open(file, { codec: 'deflate' })
    poolOf(store).put(1, 1, pageOf(1))
    await store.close()
    store = open(file, { codec: 'lz4js' })
    const pool = poolOf(store)
    pool.put(1, 2, pageOf(2))
    await store.close()
    store = open(file)
    const again = poolOf(store)
    expect([await fetched(again, 1, 1), await fetched(again, 1, 2)]).toEqual([pageOf(1), pageOf(2)])
    await store.close()
  })

  test('another size begins anew; a file that is not ours is left alone', async () => {
    const file = path()
    let store = open(file)
    poolOf(store).put(1, 1, pageOf(1))
    await store.close()
    store = open(file, { sizeBytes: 2 ** 21 })
    expect(store.stats().counters['recovered']).toBe(0)
    await store.close()
    const foreign = path()
    writeFileSync(foreign, 'somebody else\n'.repeat(1000))
    expect(() => open(foreign)).toThrow('it holds something else')
    expect(readFileSync(foreign, 'utf8').startsWith('somebody else')).toBe(true)
    expect(() => open(join(folder, 'none', 'spill'))).toThrow('it cannot be opened')
  })

  test('a file that is in use is not opened, by this process or another one; a killed one leaves it to the next', async () => {
    const file = path()
    const store = open(file)
    poolOf(store).put(1, 1, pageOf(1))
    expect(() => open(file)).toThrow('this process uses it already')
    await store.close()
    const holder = spawn(process.execPath, [fileURLToPath(new URL('holder.mjs', import.meta.url)), file])
    try {
      await new Promise((resolve, reject) => {
        holder.stdout.once('data', resolve)
        holder.once('exit', (code) => reject(new Error(`the other process ended with ${code}`)))
      })
      expect(() => open(file, { boot: bootName() })).toThrow(`process ${holder.pid} uses it`)
      expect(() => open(file, { boot: 'another' })).toThrow(`process ${holder.pid} uses it`)
    } finally {
      holder.kill('SIGKILL')
      await new Promise((resolve) => holder.once('close', resolve))
    }
    const next = open(file, { boot: bootName() })
    const pool = poolOf(next)
    // What was there before, and what the other one had put.
    expect([await fetched(pool, 1, 1), await fetched(pool, 1, 2)]).toEqual([pageOf(1), pageOf(2)])
    await next.close()
  })

  test('who was killed long ago, and whose number another process has now, does not keep the file', async () => {
    const file = path()
    const store = open(file)
    poolOf(store).put(1, 1, pageOf(1))
    const bytes = readFileSync(file)
    // This process, started at another time.
    const mark = `${process.pid} 1 -`
    bytes.writeUInt32LE(mark.length, 124)
    bytes.write(mark.padEnd(80, '\0'), 128, 'latin1')
    bytes.writeUInt32LE(crc32(bytes.subarray(0, 4092)), 4092)
    writeFileSync(file, bytes)
    const next = open(file)
    expect(next.stats().counters['recovered']).toBe(1)
    await next.close()
  })
})

describe('a ring', () => {
  test('the oldest pages are overwritten, and what is there is right', async () => {
    const file = path()
    let store = open(file, { sizeBytes: 128 * 1024 })
    let pool = poolOf(store)
    let newest = 0
    for (let round = 0; round < 4; round++) {
      for (let n = 0; n < 300; n++) expect(pool.put(3, newest, pageOf(newest++ % 251))).toBe(Stored)
      const live: number[] = []
      for (let index = 0; index < newest; index++) {
        const page = await fetched(pool, 3, index)
        if (page === undefined) continue
        live.push(index)
        expect(Buffer.compare(page, pageOf(index % 251))).toBe(0)
      }
      // The newest ones, without a gap but for what a restart put out of order.
      expect(live.length).toBeGreaterThan(40)
      expect(live.at(-1)).toBe(newest - 1)
      expect(store.stats().counters['live']).toBe(live.length)
      await store.close()
      store = open(file, { sizeBytes: 128 * 1024 })
      pool = poolOf(store)
    }
    await store.close()
  })

  test('large pages, that find no place at the end of the ring', async () => {
    const store = open(path(), { sizeBytes: 512 * 1024 })
    expect(store.capabilities.maxPageSize).toBe(65_536)
    const pool = store.newPool({ client: 1, persistent: false, shared: true, pageSize: 65_536 })
    if (typeof pool === 'number') throw new Error('refused')
    const noise = (n: number): Uint8Array => Buffer.concat(Array.from({ length: 16 }, (_, at) => pageOf((n + at) * 3)))
    for (let n = 0; n < 40; n++) {
      expect(pool.put(1, n, noise(n))).toBe(Stored)
      const into = new Uint8Array(65_536)
      expect(await pool.fetch(1, n, into)).toBe(Hit)
      expect(Buffer.compare(into, noise(n))).toBe(0)
    }
    expect(store.newPool({ client: 1, persistent: true, shared: false, pageSize })).toBe(PoolRefusal.Unsupported)
    expect(store.newPool({ client: 1, persistent: false, shared: false, pageSize: 2 ** 21 })).toBe(
      PoolRefusal.BadPageSize,
    )
    await store.close()
  })

  test('what is stored = live + replaced + got + flushed + evicted + destroyed + dropped', async () => {
    const store = open(path(), { sizeBytes: 128 * 1024 })
    const pool = poolOf(store, 1, false)
    for (let n = 0; n < 500; n++) {
      pool.put(n % 7, n % 3 === 0 ? n % 4 : n % 90, pageOf((n % 83) * 3))
      if (n % 5 === 0) pool.flushPage(n % 7, (n * 3) % 90)
      if (n % 11 === 1) await fetched(pool, (n - 1) % 7, (n - 1) % 90)
    }
    const { stored, live, replaced, got, flushed, evicted, destroyed, corrupt_dropped } = store.stats().counters
    expect(stored).toBe(live! + replaced! + got! + flushed! + evicted! + destroyed! + corrupt_dropped!)
    for (const count of [live, replaced, got, flushed, evicted]) expect(count).toBeGreaterThan(0)
    await store.close()
  })

  test('a get defers; a fetch that is overtaken looks again', async () => {
    const store = open(path())
    const pool = poolOf(store)
    pool.put(1, 1, pageOf(1))
    expect(pool.get(1, 1, pageOf(0))).toBe(Deferred)
    const first = fetched(pool, 1, 1)
    const second = fetched(pool, 1, 1)
    await new Promise((resolve) => setImmediate(resolve))
    pool.put(1, 1, pageOf(2))
    const pages = [await first, await second]
    expect(pages[1]).toEqual(pageOf(2))
    expect([pageOf(1), pageOf(2)]).toContainEqual(pages[0])
    const gone = fetched(pool, 1, 1)
    pool.destroy()
    expect(await gone).toBeUndefined()
    await store.close()
  })
})

describe('a file that is torn or altered costs the cache, never wrong bytes', () => {
  /** A closed file of a hundred pages. */
  const prepared = path()
  const pages = 100
  test('prepare', async () => {
    const store = open(prepared, { sizeBytes: 512 * 1024 })
    const pool = poolOf(store)
    for (let index = 0; index < pages; index++) expect(pool.put(index % 10, index, pageOf(index))).toBe(Stored)
    await store.close()
  })

  /** Opens a copy that was altered; how many pages are right. Every other one must be missing. */
  async function survivors(alter: (file: string) => void): Promise<number> {
    const file = path()
    copyFileSync(prepared, file)
    alter(file)
    const store = open(file, { sizeBytes: 512 * 1024 })
    const pool = poolOf(store)
    let right = 0
    for (let index = 0; index < pages; index++) {
      const page = await fetched(pool, index % 10, index)
      if (page === undefined) continue
      expect(Buffer.compare(page, pageOf(index))).toBe(0)
      right++
    }
    // And it can be used as if nothing had been.
    for (let index = 0; index < 50; index++) expect(pool.put(77, index, pageOf(index))).toBe(Stored)
    for (let index = 0; index < 50; index++)
      expect(Buffer.compare((await fetched(pool, 77, index))!, pageOf(index))).toBe(0)
    await store.close()
    rmSync(file)
    return right
  }

  test('untouched: all of them', async () => {
    expect(await survivors(() => {})).toBe(pages)
  })

  test('any bytes altered', { timeout: 60_000 }, async () => {
    const size = readFileSync(prepared).length
    const place = fc.oneof(fc.nat(size - 1), fc.integer({ min: 4096, max: 4096 + pages * 64 }), fc.nat(4095))
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(place, fc.integer({ min: 1, max: 255 })), { minLength: 1, maxLength: 20 }),
        async (changes) => {
          await survivors((file) => {
            const bytes = readFileSync(file)
            // The name of the format is what makes it ours.
            for (const [at, change] of changes) if (at >= 8) bytes[at]! ^= change
            writeFileSync(file, bytes)
          })
        },
      ),
      { seed: 11, numRuns: 40 },
    )
  })

  test('cut off anywhere', async () => {
    const { length } = readFileSync(prepared)
    const counts: number[] = []
    for (const at of [0, 1, 4095, 4096, 4160, 5000, 4096 + 512 * 64, 60_000, 100_000, length - 1])
      counts.push(await survivors((file) => truncateSync(file, at)))
    expect(counts.slice(0, 4)).toEqual([0, 0, 0, 0])
    expect(Math.max(...counts)).toBe(pages - 1)
  })

  test('cut off at, before and behind each structure', { timeout: 60_000 }, async () => {
    const bytes = readFileSync(prepared)
    const ringAt = 4096 + Math.ceil((512 * 64) / 4096) * 4096
    const borders = [8, 12, 16, 32, 128, 4092, 4096, ringAt]
    for (let record = 0; record < pages; record += 7) borders.push(4096 + record * 64, 4096 + record * 64 + 60)
    // Where pages begin and end, by their records.
    for (let record = 0; record < pages; record += 5) {
      const at = 4096 + record * 64
      const begin = ringAt + bytes.readUInt32LE(at + 32) * 64
      borders.push(begin, begin + bytes.readUInt32LE(at + 36))
    }
    let last = 0
    for (const border of borders.sort((a, b) => a - b))
      for (const at of [border - 1, border, border + 1]) {
        // Shorter than the name of the format it is nobody's.
        const right = await survivors((file) => truncateSync(file, at))
        if (at <= ringAt && right > 0) throw new Error(`${right} pages without a ring, cut off at ${at}`)
        last = Math.max(last, right)
      }
    expect(last).toBeGreaterThan(pages / 2)
  })

  test('blocks of several generations of the file: a page that was once put there, or none', {
    timeout: 60_000,
  }, async () => {
    const file = path()
    const sizeBytes = 128 * 1024
    /** By handle: all that was ever put under it. */
    const ever = new Map<string, Set<number>>()
    const generations: Buffer[] = []
    let seed = 1
    for (let generation = 0; generation < 5; generation++) {
      const store = open(file, { sizeBytes })
      const pool = poolOf(store)
      for (let n = 0; n < 40; n++) {
        const [object, index] = [n % 3, (n * 7 + generation) % 30]
        const handle = `${object}:${index}`
        seed = (seed * 5 + 3) % 251
        if (n % 5 === 4) pool.flushPage(object, index)
        else if (pool.put(object, index, pageOf(seed)) === Stored)
          ever.set(handle, (ever.get(handle) ?? new Set()).add(seed))
      }
      await store.close()
      generations.push(readFileSync(file))
    }
    let [found, gone] = [0, 0]
    await fc.assert(
      fc.asyncProperty(fc.infiniteStream(fc.nat(4)), fc.constantFrom(64, 512, 4096, 32_768), async (choices, block) => {
        const length = Math.max(...generations.map((one) => one.length))
        const mixed = Buffer.alloc(length)
        // The header is one block: it has a checksum of its own.
        for (let at = 4096; at < length; at += block)
          mixed.set(generations[choices.next().value]!.subarray(at, at + block), at)
        generations[choices.next().value]!.copy(mixed, 0, 0, 4096)
        const copy = path()
        writeFileSync(copy, mixed)
        const store = open(copy, { sizeBytes })
        const pool = poolOf(store)
        for (const [handle, seeds] of ever) {
          const [object, index] = handle.split(':').map(Number)
          const page = await fetched(pool, object!, index!)
          if (page === undefined) gone++
          else if ([...seeds].some((one) => Buffer.compare(page, pageOf(one)) === 0)) found++
          else throw new Error(`wrong bytes for ${handle}`)
        }
        await store.close()
        rmSync(copy)
      }),
      { seed: 12, numRuns: 60 },
    )
    expect(found).toBeGreaterThan(500)
    expect(gone).toBeGreaterThan(500)
  })

  test('blocks exchanged, records copied to other places', async () => {
    const blocks = (file: string, work: (bytes: Buffer) => void): void => {
      const bytes = readFileSync(file)
      work(bytes)
      writeFileSync(file, bytes)
    }
    // Two records exchanged: neither is at its place.
    expect(
      await survivors((file) =>
        blocks(file, (bytes) => {
          const first = Buffer.from(bytes.subarray(4096, 4160))
          bytes.copyWithin(4096, 4160, 4224)
          first.copy(bytes, 4160)
        }),
      ),
    ).toBe(pages - 2)
    // The ring moved by a unit: every page is another one's.
    expect(await survivors((file) => blocks(file, (bytes) => bytes.copyWithin(40_960, 40_960 + 64)))).toBeLessThan(10)
    // One record twice.
    expect(await survivors((file) => blocks(file, (bytes) => bytes.copyWithin(4096 + 200 * 64, 4096, 4160)))).toBe(
      pages,
    )
  })
})

describe('a disk that fails', () => {
  const failing = (): { io: SpillIo; fail: Set<keyof SpillIo>; nth: { writes: number; late: boolean } } => {
    const fail = new Set<keyof SpillIo>()
    const nth = { writes: Number.POSITIVE_INFINITY, late: false }
    const error = (name: string): Error => Object.assign(new Error(`EIO: injected, ${name}`), { code: 'EIO' })
    const io = Object.fromEntries(
      Object.entries(nodeSpillIo).map(([name, work]) => [
        name,
        (...args: unknown[]) => {
          const fails = fail.has(name as keyof SpillIo) || (name === 'write' && nth.writes-- === 0)
          if (fails && !nth.late) throw error(name)
          const answer = (work as (...args: unknown[]) => unknown)(...args)
          if (fails) throw error(name)
          return answer
        },
      ]),
    ) as unknown as SpillIo
    return { io, fail, nth }
  }

  test('a page that cannot be read is dropped: a miss', async () => {
    const { io, fail } = failing()
    const store = open(path(), { io })
    const pool = poolOf(store)
    pool.put(1, 1, pageOf(1))
    fail.add('read')
    expect(await fetched(pool, 1, 1)).toBeUndefined()
    fail.clear()
    expect(await fetched(pool, 1, 1)).toBeUndefined()
    expect(store.stats().counters).toMatchObject({ read_errors: 1, live: 0 })
    await store.close()
  })

  // What fails is one write, before or after it did its work; the record that may be there is then emptied.
  test.each([
    [0, false],
    [1, false],
    [0, true],
    [1, true],
  ])(
    'a put whose write %i fails (its work done: %s) is refused, and nothing of it is left, also after a restart',
    async (n, late) => {
      const { io, nth } = failing()
      const file = path()
      const store = open(file, { io })
      const pool = poolOf(store)
      pool.put(1, 1, pageOf(1))
      // After the old record was emptied.
      nth.late = late
      nth.writes = n + 1
      expect(pool.put(1, 1, pageOf(2))).toBe(Unavailable)
      nth.writes = Number.POSITIVE_INFINITY
      expect(pool.get(1, 1, pageOf(0))).toBe(Miss)
      crash(file)
      const next = open(file)
      expect(await fetched(poolOf(next), 1, 1)).toBeUndefined()
      await next.close()
    },
  )

  test('a record that cannot be emptied: the file is given up, and nothing of it comes back', async () => {
    const { io, nth } = failing()
    const file = path()
    const store = open(file, { io })
    const pool = poolOf(store)
    pool.put(1, 1, pageOf(1))
    pool.put(1, 2, pageOf(2))
    nth.writes = 0
    pool.flushPage(1, 1)
    expect(existsSync(file)).toBe(false)
    expect(pool.put(1, 3, pageOf(3))).toBe(Unavailable)
    expect(await fetched(pool, 1, 1)).toBeUndefined()
    expect(store.stats().counters['abandoned']).toBe(1)
    await store.close()
    const next = open(file)
    expect(next.stats().counters['recovered']).toBe(0)
    await next.close()
  })

  test('when it cannot be given up, either, that is said', async () => {
    const { io, nth, fail } = failing()
    const store = open(path(), { io })
    const pool = poolOf(store)
    pool.put(1, 1, pageOf(1))
    nth.writes = 0
    fail.add('truncate').add('unlink')
    expect(() => pool.flushPage(1, 1)).toThrow('cannot be removed')
    await store.close()
  })

  test('closing fails: TMEM_IO; opening fails: TMEM_IO', async () => {
    const { io, fail } = failing()
    const store = open(path(), { io })
    fail.add('sync')
    await expect(store.close()).rejects.toMatchObject({ code: 'TMEM_IO' })
    fail.clear()
    const file = path()
    await open(file).close()
    fail.add('readNow')
    expect(() => open(file, { io })).toThrow('it cannot be used')
  })
})

test('settings that make no sense are refused; in text it is a layer like any other', async () => {
  expect(() => spill({ file: 'x', sizeBytes: 1000 })).toThrow(RangeError)
  expect(() => spill({ file: 'x', sizeBytes: 2 ** 40 })).toThrow(RangeError)
  const file = path()
  const store = compose(parseStack(`spill(file=${file},size=1MiB)`, [spillFactory]))
  poolOf(store).put(1, 1, pageOf(1))
  await store.close()
  expect(existsSync(file)).toBe(true)
  expect(() => parseStack(`spill(file=${file})`, [spillFactory])).toThrow('size')
})

test('histories with crashes and restarts: what is found is the last page put, or nothing', async () => {
  const step = fc.record({
    do: fc.constantFrom('put', 'put', 'put', 'fetch', 'fetch', 'flush', 'flushObject', 'crash', 'close'),
    object: fc.nat(2),
    index: fc.nat(8),
    seed: fc.nat(250),
  })
  let hits = 0
  await fc.assert(
    fc.asyncProperty(
      fc.array(step, { minLength: 10, maxLength: 80, size: 'max' }),
      fc.boolean(),
      async (steps, shared) => {
        const file = path()
        const sizeBytes = 96 * 1024
        let store = open(file, { sizeBytes })
        let pool = poolOf(store, 1, shared)
        const model = new Map<string, number>()
        for (const { do: what, object, index, seed } of steps) {
          const handle = `${object}:${index}`
          if (what === 'put') {
            if (pool.put(object, index, pageOf(seed)) !== Stored) throw new Error('the spill refused a page')
            model.set(handle, seed)
          } else if (what === 'flush') {
            pool.flushPage(object, index)
            model.delete(handle)
          } else if (what === 'flushObject') {
            pool.flushObject(object)
            for (let n = 0; n <= 8; n++) model.delete(`${object}:${n}`)
          } else if (what === 'fetch') {
            const page = await fetched(pool, object, index)
            if (page !== undefined) hits++
            const wanted = model.get(handle)
            if (page !== undefined && (wanted === undefined || Buffer.compare(page, pageOf(wanted)) !== 0))
              throw new Error(`wrong bytes for ${handle}`)
            // A miss is for good; a private page is taken.
            if (page === undefined || !shared) model.delete(handle)
          } else {
            if (what === 'close') await store.close()
            else crash(file)
            store = open(file, { sizeBytes })
            pool = poolOf(store, 1, shared)
          }
        }
        await store.close()
        rmSync(file)
      },
    ),
    { seed: 2, numRuns: 60 },
  )
  expect(hits).toBeGreaterThan(50)
})
