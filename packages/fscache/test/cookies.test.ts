import { compose, TmemError } from '@tmem/core'
import { delay, discard, refuse } from '@tmem/faults'
import { memory } from '@tmem/memory'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { type Cookie, FsCache, ReadOutcome, WriteOutcome } from '../src/index.ts'

const { Data, NoData, NoBuffer } = ReadOutcome
const pageSize = 4096
const pageOf = (fill: number): Uint8Array => new Uint8Array(pageSize).fill(fill)
const make = (layers = [memory({ limitBytes: 2 ** 20 })], cookies?: number): FsCache =>
  new FsCache({ store: compose(layers, { check: 'model' }), ...(cookies === undefined ? {} : { cookies }) })

/** A cookie of ten pages, all written: page n has n + 1. */
function filled(cache: FsCache, key = 'file', version = 'v1'): Cookie {
  const cookie = cache.acquireVolume(`server of ${key}`).acquireCookie(key, { version, size: 10 * pageSize })
  for (let index = 0; index < 10; index++) expect(cookie.write(index, pageOf(index + 1))).toBe(WriteOutcome.Stored)
  return cookie
}

describe('cookies', () => {
  test('a page is read as often as one likes, and is untouched when there is no data', () => {
    const cookie = filled(make())
    const into = pageOf(0)
    for (const index of [3, 3, 9]) {
      expect(cookie.read(index, into)).toBe(Data)
      expect(into).toEqual(pageOf(index + 1))
    }
    cookie.uncache(3)
    expect(cookie.read(3, into)).toBe(NoData)
    expect(cookie.read(10, into)).toBe(NoData)
    expect(into).toEqual(pageOf(10))
    expect(() => cookie.write(10, into)).toThrow(RangeError)
    expect(() => cookie.write(-1, into)).toThrow(RangeError)
  })

  test('resizing drops what is cut off, also in part, and what had zeros behind its end', () => {
    const cookie = filled(make())
    const into = pageOf(0)
    cookie.resize(3 * pageSize + 10)
    expect([cookie.size, cookie.pages]).toEqual([3 * pageSize + 10, 4])
    expect([2, 3, 4].map((index) => cookie.read(index, into))).toEqual([Data, NoData, NoData])
    cookie.write(3, pageOf(50))
    cookie.resize(10 * pageSize)
    // Longer: the last page had zeros behind its end; nothing that was cut off comes back.
    expect([2, 3, 4, 9].map((index) => cookie.read(index, into))).toEqual([Data, NoData, NoData, NoData])
    cookie.resize(10 * pageSize)
    expect(cookie.read(2, into)).toBe(Data)
    const huge = filled(make(), 'huge')
    huge.resize(2 ** 45)
    huge.resize(pageSize)
    expect(huge.read(5, into)).toBe(NoData)
    expect(() => cookie.resize(-1)).toThrow(RangeError)
  })

  test('invalidating makes another version, which has nothing of the first', () => {
    const cookie = filled(make())
    cookie.invalidate({ version: 'v2', size: 2 * pageSize })
    expect(cookie.read(0, pageOf(0))).toBe(NoData)
    cookie.write(0, pageOf(77))
    // Back again: the pages of the first version are gone for good.
    cookie.invalidate({ version: 'v1', size: 10 * pageSize })
    expect(cookie.read(0, pageOf(0))).toBe(NoData)
    expect(cookie.read(5, pageOf(0))).toBe(NoData)
  })

  test('relinquished: who acquires the same version finds the pages; retired: nobody does', () => {
    const cache = make()
    const volume = cache.acquireVolume('server')
    const auxiliary = { version: 'v1', size: 2 * pageSize }
    let cookie = volume.acquireCookie('file', auxiliary)
    expect(() => volume.acquireCookie('file', auxiliary)).toThrow('in use already')
    cookie.write(1, pageOf(9))
    cookie.relinquish()
    cookie.relinquish()
    expect(cookie.enabled).toBe(false)
    expect(cookie.read(1, pageOf(0))).toBe(NoBuffer)
    expect(cookie.write(1, pageOf(0))).toBe(WriteOutcome.NoBuffer)
    cookie = volume.acquireCookie('file', { ...auxiliary, version: 'v2' })
    expect(cookie.read(1, pageOf(0))).toBe(NoData)
    cookie.relinquish()
    cookie = volume.acquireCookie('file', auxiliary)
    const into = pageOf(0)
    expect(cookie.read(1, into)).toBe(Data)
    expect(into).toEqual(pageOf(9))
    cookie.relinquish(true)
    expect(volume.acquireCookie('file', auxiliary).read(1, into)).toBe(NoData)
    expect(cache.counters).toMatchObject({ acquires: 4, relinquishes: 3, retires: 1 })
  })

  test('names do not run into one another', () => {
    const cache = make()
    const names = fc.tuple(fc.string({ maxLength: 4 }), fc.string({ maxLength: 4 }), fc.string({ maxLength: 4 }))
    fc.assert(
      fc.property(names, names, ([v1, k1, e1], [v2, k2, e2]) => {
        const volume = cache.acquireVolume(v1)
        const cookie = volume.acquireCookie(k1, { version: e1, size: pageSize })
        cookie.write(0, pageOf(1))
        volume.relinquish()
        const other = cache.acquireVolume(v2)
        const outcome = other.acquireCookie(k2, { version: e2, size: pageSize }).read(0, pageOf(0))
        expect(outcome).toBe(v1 === v2 && k1 === k2 && e1 === e2 ? Data : NoData)
        other.relinquish()
        const again = cache.acquireVolume(v1)
        again.acquireCookie(k1, { version: e1, size: pageSize })
        again.relinquish(true)
      }),
      {
        seed: 3,
        examples: [
          [
            ['a', 'bc', ''],
            ['ab', 'c', ''],
          ],
          [
            ['a', '', 'b'],
            ['a', 'b', ''],
          ],
        ],
      },
    )
  })

  test('volumes: one of a key at a time; withdrawing the cache ends everything', () => {
    const cache = make()
    const cookie = filled(cache)
    expect(() => cache.acquireVolume('server of file')).toThrow('in use already')
    cache.withdraw()
    cache.withdraw()
    expect(cookie.read(0, pageOf(0))).toBe(NoBuffer)
    expect(() => cache.acquireVolume('x')).toThrow(TmemError)
    expect(cache.stats().counters).toMatchObject({ volumes: 0, cookies: 0 })
  })

  test('no room for a cookie: NoBuffer, and no error', () => {
    const cache = make(undefined, 1)
    const first = filled(cache)
    const second = cache.acquireVolume('b').acquireCookie('b', { version: '', size: pageSize })
    expect(second.enabled).toBe(false)
    expect(second.write(0, pageOf(1))).toBe(WriteOutcome.NoBuffer)
    expect(second.read(0, pageOf(0))).toBe(NoBuffer)
    second.resize(5)
    second.uncache(0)
    second.invalidate({ version: 'x', size: 1 })
    second.relinquish(true)
    first.relinquish()
    expect(cache.counters).toMatchObject({ acquires_nobufs: 1, reads_nobufs: 1, writes_nobufs: 1 })
  })

  test('a store without ephemeral pools, and settings that make no sense, are refused', () => {
    const store = compose([memory({ limitBytes: 2 ** 20 })])
    expect(() => new FsCache({ store, pageSize: 100 })).toThrow(RangeError)
    expect(() => new FsCache({ store, cookies: 0 })).toThrow(RangeError)
    expect(() => new FsCache({ store, pageSize: 2 ** 21 })).toThrow('BadPageSize')
    expect(() => make().acquireVolume('a').acquireCookie('b', { version: '', size: 0.5 })).toThrow(RangeError)
  })
})

describe('pages may disappear at any time', () => {
  test('DEVIATION: nothing is pinned, reserved or listed: a page of a cookie in use goes when others come', () => {
    const cache = make([memory({ limitBytes: 100_000 })])
    const cookie = filled(cache)
    expect(cookie.read(0, pageOf(0))).toBe(Data)
    const other = cache.acquireVolume('another').acquireCookie('f', { version: '1', size: 100 * pageSize })
    for (let index = 0; index < 100; index++) other.write(index, pageOf(index))
    for (let index = 0; index < 10; index++) expect(cookie.read(index, pageOf(0))).toBe(NoData)
    expect(cookie.enabled).toBe(true)
    const offered = [FsCache, cache.acquireVolume('third').constructor, cookie.constructor].flatMap((made) =>
      Object.getOwnPropertyNames(made.prototype),
    )
    expect(offered.filter((name) => /pin|reserve|list|keys|entries|iterator/i.test(name))).toEqual([])
  })

  test('a page that went between write and read is NoData, never an error', () => {
    for (const layers of [
      [discard({ mode: 'lose' as const })],
      [refuse({ every: 1 }), memory({ limitBytes: 2 ** 20 })],
    ]) {
      const cache = make(layers)
      const cookie = cache.acquireVolume('v').acquireCookie('f', { version: '1', size: 5 * pageSize })
      const outcomes = [0, 1, 2].map((index) => cookie.write(index, pageOf(index)))
      expect(new Set(outcomes).size).toBe(1)
      for (const index of [0, 1, 2]) expect(cookie.read(index, pageOf(0))).toBe(NoData)
    }
  })

  test('a store that is too small: what is there is right', () => {
    const cache = make([memory({ limitBytes: 100_000 })])
    const cookie = cache.acquireVolume('v').acquireCookie('f', { version: '1', size: 200 * pageSize })
    let there = 0
    for (let index = 0; index < 200; index++) cookie.write(index, pageOf(index))
    for (let index = 0; index < 200; index++) {
      const into = pageOf(255)
      if (cookie.read(index, into) === NoData) continue
      there++
      expect(into).toEqual(pageOf(index))
    }
    expect(there).toBeGreaterThan(5)
    expect(there).toBeLessThan(30)
    const { reads, reads_ok, reads_nodata, reads_nobufs } = cache.counters
    expect(reads).toBe(reads_ok + reads_nodata + reads_nobufs)
  })
})

describe('a store that has to wait', () => {
  const waiting = (): { cache: FsCache; open: () => void } => {
    let open = (): void => {}
    const gate = new Promise<void>((resolve) => {
      open = resolve
    })
    const cache = make([delay({ turn: () => gate }), memory({ limitBytes: 2 ** 20 })])
    return { cache, open: () => open() }
  }

  test('DEVIATION: reads and writes are answered at once; only here read answers a promise', async () => {
    const atOnce = filled(make())
    expect([atOnce.write(1, pageOf(9)), atOnce.read(1, pageOf(0))]).toEqual([WriteOutcome.Stored, Data])
    const { cache, open } = waiting()
    const cookie = filled(cache)
    const into = pageOf(0)
    const answer = cookie.read(4, into)
    expect(answer).toBeInstanceOf(Promise)
    open()
    expect(await answer).toBe(Data)
    expect(into).toEqual(pageOf(5))
    expect(await cookie.read(10, into)).toBe(NoData)
  })

  test.each([
    ['invalidated', (cookie: Cookie) => cookie.invalidate({ version: 'v2', size: 10 * pageSize })],
    ['cut off', (cookie: Cookie) => cookie.resize(4 * pageSize + 1)],
    ['given up', (cookie: Cookie) => cookie.relinquish()],
  ])('a page whose file was %s while it came is not served', async (_what, change) => {
    const { cache, open } = waiting()
    const cookie = filled(cache)
    const into = pageOf(0)
    const answer = cookie.read(4, into)
    change(cookie)
    open()
    expect(await answer).toBe(NoData)
    expect(into).toEqual(pageOf(0))
  })

  test('a page that is there and cannot be had is NoData; a broken store is loud', async () => {
    const store = compose([delay({ turn: async () => {} }), memory({ limitBytes: 2 ** 20 })])
    let code: 'TMEM_IO' | 'TMEM_BROKEN' = 'TMEM_IO'
    const failing = {
      ...store,
      name: 'failing',
      stats: () => store.stats(),
      newPool: (attributes: Parameters<typeof store.newPool>[0]) => {
        const pool = store.newPool(attributes)
        if (typeof pool === 'object')
          pool.fetch = async () => {
            throw new TmemError(code, 'gone')
          }
        return pool
      },
    }
    const cache = new FsCache({ store: failing as unknown as typeof store })
    const cookie = filled(cache)
    expect(await cookie.read(1, pageOf(0))).toBe(NoData)
    expect(cache.counters.reads_failed).toBe(1)
    code = 'TMEM_BROKEN'
    await expect(cookie.read(1, pageOf(0))).rejects.toMatchObject({ code: 'TMEM_BROKEN' })
  })
})
