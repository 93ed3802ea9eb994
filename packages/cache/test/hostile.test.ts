/**
 * Callers who do what they may at the wrong moment: many at once, from inside of what the cache calls, with bytes that
 * they use again.
 */
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { ByteLimit, GetOutcome, type Layer, type PageStore, type Pool, systemAllocator } from '@tmem/core'
import { spill } from '@tmem/spill'
import { zcache } from '@tmem/zcache'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { Cache, type CacheMessage } from '../src/index.ts'
import { PageBook } from '../src/pages.ts'

let folder = ''
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'tmem-cache-hostile-'))
})
afterAll(() => {
  rmSync(folder, { recursive: true })
})

const names = (count: number): string[] => Array.from({ length: count }, (_, n) => `key ${n}`)

/** A cache over a file in which everything lies that was set. */
async function onFile(name: string, entries: Iterable<readonly [string | Uint8Array, string]>, ttl?: number) {
  const open = async () => {
    const cache = new Cache<string>({ memory: '4MiB', file: { path: join(folder, name), size: '16MiB' } })
    await cache.ready()
    return cache
  }
  const cache = await open()
  cache.setMany(entries, { ttl })
  await cache.close()
  return await open()
}

/** Bytes that do not shrink. */
function noiseOf(length: number): Uint8Array {
  const bytes = new Uint8Array(length)
  let state = 7
  for (let n = 0; n < length; n++) {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0
    bytes[n] = state >>> 16
  }
  return bytes
}

/** `target`, with other methods in some places. */
function withMethods<T extends object>(target: T, methods: Readonly<Partial<T>>): T {
  return new Proxy(target, {
    get(_, name) {
      if (Object.hasOwn(methods, name)) return methods[name as keyof T]
      const value: unknown = Reflect.get(target, name, target)
      return typeof value === 'function' ? (value.bind(target) as unknown) : value
    },
  })
}

/** A filter whose fetches end all at once, as those do whose answers come in one packet. */
const together: Layer = {
  name: 'together',
  plan: (below) => below!,
  open: (next) =>
    withMethods(next!, {
      newPool(options: Parameters<PageStore['newPool']>[0]) {
        const pool = next!.newPool(options)
        if (typeof pool === 'number') return pool
        let end: Promise<void> | undefined
        return withMethods(pool, {
          async fetch(...page: Parameters<Pool['fetch']>) {
            const outcome = await pool.fetch(...page)
            if (outcome !== GetOutcome.Hit) return outcome
            end ??= setTimeout(50).then(() => {
              end = undefined
            })
            await end
            return outcome
          },
        })
      },
    }),
}

describe('many at once', () => {
  test('who waited answers its own value, although all others came at the same time', async () => {
    const stack = [
      together,
      zcache({ limitBytes: 2 ** 22 }),
      spill({ file: join(folder, 'together'), sizeBytes: 2 ** 24 }),
    ]
    let cache = new Cache<string>({ stack })
    await cache.ready()
    cache.setMany(names(400).map((key) => [key, `value of ${key} `.repeat(20)]))
    await cache.close()
    cache = new Cache<string>({ stack })
    await cache.ready()
    const waits = names(400).map((key, n) => (n % 2 === 0 ? cache.load(key) : cache.fetch(key, () => 'loaded')))
    for (const [n, value] of (await Promise.all(waits)).entries()) expect(value).toBe(`value of key ${n} `.repeat(20))
    expect(cache.stats().misses.deferred).toBe(0)
    await cache.close()
  })

  test('each load answers the value of its own key', async () => {
    const keys = names(2000)
    const cache = await onFile(
      'loads',
      keys.map((key) => [key, `value of ${key} `.repeat(20)]),
    )
    const values = await Promise.all(keys.map((key) => cache.load(key)))
    for (const [n, value] of values.entries()) expect(value).toBe(`value of key ${n} `.repeat(20))
    await cache.close()
  })

  test('each fetch answers the value of its own key', async () => {
    const keys = names(2000)
    const cache = await onFile(
      'fetches',
      keys.map((key) => [key, `value of ${key} `.repeat(20)]),
    )
    const values = await Promise.all(keys.map((key) => cache.fetch(key, () => 'loaded')))
    for (const [n, value] of values.entries()) expect(value).toBe(`value of key ${n} `.repeat(20))
    await cache.close()
  })

  test('a key that its caller changes while it waits stays what it was', async () => {
    const bytes = Buffer.from('key 1')
    const cache = await onFile('aliases', [
      [Buffer.from('key 1'), 'one'],
      [Buffer.from('key 2'), 'two'],
    ])
    const loaded = cache.load(bytes)
    bytes.write('key 2')
    expect(await loaded).toBe('one')

    bytes.write('key 3')
    const fetched = cache.fetch(bytes, async (key) => {
      await setTimeout(1)
      return Buffer.from(key as Uint8Array).toString()
    })
    bytes.write('key 4')
    expect(await fetched).toBe('key 3')
    expect(cache.get(Buffer.from('key 3'))).toBe('key 3')
    expect(cache.get(Buffer.from('key 4'))).toBe(undefined)
    await cache.close()
  })

  test('a short entry at the very end of a page is found', async () => {
    // Head 8, offsets 4; a record of 9 + 6 + 1 + 0 bytes is the last one.
    const cache = await onFile(
      'end',
      [
        ['a', 'x'.repeat(4096 - 8 - 4 - 16 - 16)],
        ['b', ''],
      ],
      1e6,
    )
    expect(await cache.load('b')).toBe('')
    expect(await cache.load('a')).toHaveLength(4052)
    await cache.close()
  })
})

describe('from inside', () => {
  test('who listens may use the cache when entries go', async () => {
    const cache = new Cache<string>({ memory: '2MiB' })
    const value = (n: number): string => Buffer.from(noiseOf(700).map((byte) => (byte + n) & 0x7f)).toString('latin1')
    let evictions = 0
    const listener = (message: unknown): void => {
      if ((message as CacheMessage).operation !== 'evict') return
      evictions++
      cache.set(`evict ${evictions}`, `from inside ${evictions} `.repeat(50))
    }
    subscribe('tmem:cache', listener)
    let wrong = 0
    try {
      for (let n = 0; n < 4000; n++) {
        cache.set(`key ${n}`, value(n))
        const got = cache.get(`key ${n}`)
        if (got !== undefined && got !== value(n)) wrong++
      }
    } finally {
      unsubscribe('tmem:cache', listener)
    }
    expect(evictions).toBeGreaterThan(10)
    expect(wrong).toBe(0)
    cache.check()
    await cache.close()
  })

  test('a loader that asks for its own key is told so', async () => {
    const cache = new Cache<string>({ memory: '2MiB' })
    const loader = async (): Promise<string> => (await cache.fetch('k', loader))!
    await expect(cache.fetch('k', loader)).rejects.toThrow(/its own key/)
    const later = async (_key: unknown, { signal }: { signal: AbortSignal }): Promise<string> => {
      await setTimeout(1)
      return (await cache.fetch('k', later, { signal }))!
    }
    await expect(cache.fetch('k', later)).rejects.toThrow(/its own key/)
    await cache.close()
  })

  test('a close ends a load whose key was set meanwhile', async () => {
    const cache = new Cache<string>({ memory: '2MiB' })
    let calls = 0
    const loaded = cache.fetch('k', async () => {
      calls++
      // It does not look at its signal.
      await setTimeout(2000, undefined, { ref: false })
      return 'late'
    })
    await setTimeout(1)
    cache.set('k', 'newer')
    const unborn = cache.fetch('other', () => {
      calls++
      return 'never'
    })
    const [ended, notBegun] = await Promise.allSettled([loaded, unborn, cache.close()])
    expect([ended, notBegun]).toMatchObject([
      { status: 'rejected', reason: { code: 'TMEM_CLOSED' } },
      { status: 'rejected', reason: { code: 'TMEM_CLOSED' } },
    ])
    expect(calls).toBe(1)
  })

  test('tags that their caller changes while the loader runs stay what they were', async () => {
    const cache = new Cache<string>({ memory: '2MiB' })
    const tags = ['tag']
    const fetched = cache.fetch('k', () => setTimeout(1, 'loaded'), { tags })
    tags[0] = 'other'
    await fetched
    cache.deleteByTag('other')
    expect(cache.get('k')).toBe('loaded')
    cache.deleteByTag('tag')
    expect(cache.get('k')).toBe(undefined)
    await cache.close()
  })
})

describe('times', () => {
  test('a grace without end has an end of freshness', async () => {
    let now = 1e12
    const cache = new Cache<string>({ memory: '2MiB', clock: () => now })
    for (const grace of [Number.POSITIVE_INFINITY, 1e300]) {
      const key = `k ${grace}`
      let version = 0
      const loader = (): string => `version ${++version}`
      expect(await cache.fetch(key, loader, { ttl: 100, grace })).toBe('version 1')
      expect(cache.get(key)).toBe('version 1')
      now += 100
      expect(cache.get(key)).toBe(undefined)
      expect(await cache.fetch(key, loader, { ttl: 100, grace })).toBe('version 1')
      await setTimeout(1)
      expect(await cache.fetch(key, loader, { ttl: 100, grace })).toBe('version 2')
    }
    await cache.close()
  })

  test('a clock that gives no time is an error, and nothing has changed', async () => {
    let now = 1e12
    const cache = new Cache<string>({ memory: '2MiB', clock: () => now })
    cache.set('k', 'old')
    for (now of [Number.NaN, -1, Number.POSITIVE_INFINITY, 2 ** 50]) {
      expect(() => cache.set('k', 'new', { ttl: 10 })).toThrow(/clock/)
      expect(cache.get('k')).toBe('old')
    }
    cache.check()
    await cache.close()
  })
})

describe('a lowered limit', () => {
  test('holds, and a value that is too large for it costs no others', async () => {
    const limit = new ByteLimit(64 * 2 ** 20)
    const cache = new Cache<string | Uint8Array>({ memory: limit })
    for (let n = 0; n < 200_000; n++) cache.set(`key ${n}`, `value ${n} `.repeat(10))
    limit.bytes = 9 * 2 ** 20
    while (cache.tick());
    const { entries, memoryBytes } = cache.stats()
    expect(memoryBytes).toBeLessThanOrEqual(limit.bytes)
    expect(entries).toBeGreaterThan(1000)
    expect(cache.set('large', noiseOf(16 * 2 ** 20))).toBe(false)
    expect(cache.stats().entries).toBe(entries)
    cache.check()
    await cache.close()
  })

  test('who only writes uses little of the window, and who reads all of it', () => {
    const book = new PageBook(4000, 1000, 0, systemAllocator)
    const fill = (): number => {
      const page = book.take(0)
      const at = book.enterFilling(page)
      book.filled(page)
      return at
    }
    const read = (): number => {
      book.enter(book.take(0))
      return book.at
    }
    expect(Math.max(...Array.from({ length: 1500 }, fill))).toBeLessThan(50 * 4096)
    expect(Math.max(...Array.from({ length: 1500 }, read))).toBe((book.frames - 1) * 4096)
  })

  test('deleted tags count', async () => {
    const cache = new Cache<string>({ memory: '2MiB' })
    const before = cache.stats().memoryBytes
    for (let n = 0; n < 10_000; n++) cache.deleteByTag(`tag ${n}`)
    expect(cache.stats().memoryBytes).toBeGreaterThan(before + 10_000 * 32)
    await cache.close()
  })
})
