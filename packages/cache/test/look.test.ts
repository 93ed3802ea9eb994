/** Deciding by what is there: nobody comes between, wherever the entry is. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Allocator, systemAllocator, TmemError } from '@tmem/core'
import { expect, onTestFinished, test } from 'vitest'
import { Cache, type CacheOptions } from '../src/index.ts'
import { sunk } from './resp-client.ts'

async function made(
  kind: 'own' | 'shared' | 'file',
  options: Partial<CacheOptions<string>> = {},
): Promise<Cache<string>> {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-look-'))
  const file = { path: join(folder, 'file'), size: '8MiB' } as const
  const cache = new Cache<string>({ memory: '4MiB', ...(kind === 'file' ? { file } : {}), ...options })
  onTestFinished(async () => {
    await cache.close()
    rmSync(folder, { recursive: true })
  })
  if (kind === 'shared') cache.share()
  await cache.ready()
  return cache
}

test.each(['own', 'shared', 'file'] as const)(
  'what is there is told with what is left of its life: %s',
  async (kind) => {
    const time = { now: 1e12 }
    const cache = await made(kind, { clock: () => time.now })
    const seen = (key: string): unknown => cache.look(key, (value, left) => [value, left])
    cache.set('ever', 'a')
    cache.set('soon', 'b', { ttl: 50 })
    expect(seen('ever')).toEqual(['a', Number.POSITIVE_INFINITY])
    expect(seen('soon')).toEqual(['b', 50])
    expect(seen('none')).toEqual([undefined, Number.POSITIVE_INFINITY])
    time.now += 49
    expect(seen('soon')).toEqual(['b', 1])
    time.now += 1
    expect(seen('soon')).toEqual([undefined, Number.POSITIVE_INFINITY])
    const { hits, misses } = cache.stats()
    expect({ hits, absent: misses.absent, expired: misses.expired }).toEqual({ hits: 3, absent: 1, expired: 1 })
  },
)

test('what is in the file is waited for, and decided by in the turn in which it is found', async () => {
  const cache = await made('file')
  cache.set('count', '0')
  await sunk(cache as Cache<never>)
  const count = (value: string | undefined): boolean => cache.set('count', String(Number(value) + 1))
  const first = cache.look('count', count)
  expect(first).toBeInstanceOf(Promise)
  await Promise.all([first, ...Array.from({ length: 19 }, async () => cache.look('count', count))])
  expect(await cache.load('count')).toBe('20')
  cache.check()
})

test('what the caller throws comes back, and a closed cache says so', async () => {
  const cache = await made('file')
  cache.set('a', '1')
  const fails = (): never => {
    throw new Error('mine')
  }
  expect(() => cache.look('a', fails)).toThrow('mine')
  await sunk(cache as Cache<never>)
  await expect(cache.look('a', fails)).rejects.toThrow('mine')
  await cache.close()
  expect(() => cache.look('a', () => undefined)).toThrow(TmemError)
})

test('all memory for pages and tables is the allocator’s', async () => {
  const sites = new Set<string>()
  const allocator: Allocator = {
    ...systemAllocator,
    allocate: (bytes, site) => {
      sites.add(site)
      return systemAllocator.allocate(bytes, site)
    },
  }
  const cache = await made('own', { allocator })
  for (let n = 0; n < 5000; n++) cache.set(`key ${n}`, 'value '.repeat(20))
  expect([...sites]).toEqual(expect.arrayContaining(['cache.pages', 'cache.table', 'cache.window']))
  expect([...sites].some((site) => site.startsWith('zcache'))).toBe(true)
})

test('a value larger than the largest one finds no room, a little less does', async () => {
  for (const kind of ['own', 'shared', 'file'] as const) {
    const cache = await made(kind)
    const { largestBytes } = cache.stats()
    expect([kind, cache.set('a', 'x'.repeat(largestBytes + 1))]).toEqual([kind, false])
    expect([kind, cache.set('a', 'x'.repeat(largestBytes - 8192))]).toEqual([kind, true])
  }
})
