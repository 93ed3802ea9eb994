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

describe('pages in a row, and pages that wait', () => {
  const pages = 12
  const run = (first: number, count: number, fill: number): Uint8Array => {
    const bytes = new Uint8Array(count * pageSize)
    for (let page = 0; page < count; page++) bytes.fill(fill + first + page, page * pageSize, (page + 1) * pageSize)
    return bytes
  }
  const turns = async (count: number): Promise<void> => {
    for (let turn = 0; turn < count; turn++) await new Promise((resolve) => setImmediate(resolve))
  }

  test('random runs, held or written, and everything that ends them: as page by page', async () => {
    const place = fc.record({ first: fc.nat(pages - 1), count: fc.integer({ min: 1, max: 6 }), fill: fc.nat(200) })
    const kinds = ['hold', 'hold', 'writeMany', 'read', 'readMany', 'soon', 'uncache', 'resize', 'change', 'again']
    const step = fc.tuple(fc.constantFrom(...kinds), place)
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 30 }), async (steps) => {
        const auxiliary = { version: 'v', size: pages * pageSize - 10 }
        const [volume, other] = [make().acquireVolume('v'), make().acquireVolume('v')]
        let [cookie, single] = [volume.acquireCookie('f', auxiliary), other.acquireCookie('f', auxiliary)]
        const compare = (first: number, count: number): void => {
          const [some, one] = [run(first, count, 0), run(first, count, 0)]
          const outcomes = Array.from({ length: count }, (_, page) =>
            single.read(first + page, one.subarray(page * pageSize, (page + 1) * pageSize)),
          )
          expect(cookie.readMany(first, some)).toEqual(outcomes)
          expect(Buffer.compare(some, one)).toBe(0)
        }
        const compareOne = (index: number): void => {
          expect(cookie.read(index, pageOf(0))).toBe(single.read(index, pageOf(0)))
        }
        for (const [kind, { first, count, fill }] of steps) {
          const fits = Math.min(count, cookie.pages - first)
          if ((kind === 'hold' || kind === 'writeMany') && fits > 0) {
            const bytes = run(first, fits, fill)
            cookie[kind](first, bytes)
            for (let page = 0; page < fits; page++)
              single.write(first + page, bytes.subarray(page * pageSize, (page + 1) * pageSize))
          } else if (kind === 'read') compareOne(first)
          else if (kind === 'readMany') compare(first, count)
          else if (kind === 'soon') {
            cookie.settleSoon()
            await turns(fill % 3)
          } else if (kind === 'uncache') for (const each of [cookie, single]) each.uncache(first)
          else if (kind === 'resize') for (const each of [cookie, single]) each.resize(first * pageSize + fill)
          else if (kind === 'change')
            for (const each of [cookie, single]) each.invalidate({ version: `v${fill % 2}`, size: auxiliary.size })
          else if (kind === 'again') {
            for (const each of [cookie, single]) each.relinquish(fill % 2 === 0)
            cookie = volume.acquireCookie('f', auxiliary)
            single = other.acquireCookie('f', auxiliary)
          }
        }
        compare(0, pages + 1)
      }),
      { seed: 9, numRuns: 300 },
    )
  })

  test('what is held is put in turns, 256 KiB in each, when somebody says so; what is given up is not', async () => {
    const cache = make([memory({ limitBytes: 2 ** 23 })])
    const cookie = cache.acquireVolume('v').acquireCookie('f', { version: '1', size: 2 ** 20 })
    const { counters } = cache
    cookie.hold(0, run(0, 100, 1))
    await turns(3)
    expect(counters.writes).toBe(0)
    cookie.settleSoon()
    const seen: number[] = []
    for (let turn = 0; turn < 4; turn++) {
      await turns(1)
      seen.push(counters.writes_ok)
    }
    expect(seen.filter((stored) => stored === 64)).not.toEqual([])
    expect(seen.at(-1)).toBe(100)
    cookie.hold(100, run(100, 100, 1))
    cookie.settleSoon()
    cookie.invalidate({ version: '2', size: 2 ** 20 })
    cookie.hold(0, run(0, 100, 1))
    cookie.relinquish(true)
    await turns(3)
    expect(counters.writes).toBe(100)
  })

  test('16 MiB wait at most, whole buffers counted: further pages are put at once, the oldest first', () => {
    const cache = make([memory({ limitBytes: 2 ** 26 })])
    const size = 2 ** 25
    const [one, other] = ['one', 'other'].map((key) =>
      cache.acquireVolume(key).acquireCookie('f', { version: '1', size }),
    )
    const half = 2 ** 11
    one!.hold(0, run(0, half, 1))
    // A page of a large buffer keeps all of it.
    one!.hold(half, run(0, half, 1).subarray(0, pageSize))
    expect(cache.counters.writes).toBe(0)
    one!.hold(0, run(0, half, 1).subarray(0, 0))
    other!.hold(0, run(0, 1, 7))
    expect(cache.counters.writes).toBe(1)
    one!.hold(0, run(0, half, 9))
    expect(cache.counters.writes).toBe(1 + half)
    const into = pageOf(0)
    expect(one!.read(5, into)).toBe(Data)
    expect(into).toEqual(pageOf(14))
    expect(cache.counters.writes).toBe(1 + half + 1 + half)
  })

  test('withdrawn, or the store closed, meanwhile: nothing is put, and nobody hears of it', async () => {
    const store = compose([memory({ limitBytes: 2 ** 20 })], { check: 'model' })
    const cache = new FsCache({ store })
    const cookie = cache.acquireVolume('v').acquireCookie('f', { version: '1', size: 2 ** 20 })
    cookie.hold(0, run(0, 100, 1))
    cookie.settleSoon()
    await store.close()
    await turns(3)
    expect(cache.counters).toMatchObject({ writes: 100, writes_ok: 0, writes_dropped: 100 })
    const second = make()
    const held = second.acquireVolume('v').acquireCookie('f', { version: '1', size: 2 ** 20 })
    held.hold(0, run(0, 100, 1))
    held.settleSoon()
    second.withdraw()
    await turns(3)
    expect(second.counters.writes_ok).toBe(0)
  })

  test('bytes that are no pages, and pages beyond the end, are refused', () => {
    const cookie = filled(make())
    for (const bytes of [new Uint8Array(pageSize + 1), new Uint8Array(100)]) {
      expect(() => cookie.readMany(0, bytes)).toThrow('4096 bytes each')
      expect(() => cookie.writeMany(0, bytes)).toThrow('4096 bytes each')
      expect(() => cookie.hold(0, bytes)).toThrow('4096 bytes each')
      expect(() => cookie.write(0, bytes)).toThrow(RangeError)
    }
    expect(() => cookie.write(0, new Uint8Array(2 * pageSize))).toThrow(RangeError)
    expect(() => cookie.writeMany(8, new Uint8Array(3 * pageSize))).toThrow('page 10 of file is beyond its end')
    expect(() => cookie.hold(-1, new Uint8Array(pageSize))).toThrow(RangeError)
  })

  test('complete: all of it is there, as far as a store can tell', () => {
    const cookie = filled(make())
    expect(cookie.complete).toBe(true)
    cookie.uncache(4)
    expect(cookie.complete).toBe(false)
    cookie.hold(4, pageOf(1))
    expect(cookie.complete).toBe(true)
    cookie.relinquish()
    expect(cookie.complete).toBe(false)
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
    const many = new Uint8Array(3 * pageSize)
    const answers = cookie.readMany(8, many)
    expect(answers).toBeInstanceOf(Promise)
    open()
    expect(await answer).toBe(Data)
    expect(into).toEqual(pageOf(5))
    expect(await answers).toEqual([Data, Data, NoData])
    expect(many.subarray(0, 2 * pageSize)).toEqual(new Uint8Array([...pageOf(9), ...pageOf(10)]))
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
