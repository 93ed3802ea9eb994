import { fork } from 'node:child_process'
import { closeSync, copyFileSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { Cache } from '../src/index.ts'

let folder = ''
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'tmem-cache-restart-'))
})
afterEach(() => {
  rmSync(folder, { recursive: true })
})

const open = async (now = 1e6): Promise<Cache<string>> => {
  const cache = new Cache<string>({
    memory: '6MiB',
    file: { path: join(folder, 'file'), size: '16MiB' },
    clock: () => now,
  })
  await cache.ready()
  return cache
}

const valueOfKey = (n: number): string => `value ${n} `.repeat(1 + (n % 60))

describe('with a file', () => {
  test('what was there before a restart is there again', async () => {
    let cache = await open()
    for (let n = 0; n < 3000; n++) cache.set(`key ${n}`, valueOfKey(n))
    cache.set('large', 'large '.repeat(30_000))
    cache.set('short', 'short', { ttl: 1000 })
    cache.set('tagged', 'tagged', { tags: ['gone'] })
    cache.set('kept', 'kept', { tags: ['stays'] })
    for (let n = 0; n < 3000; n += 3) cache.delete(`key ${n}`)
    for (let n = 1; n < 3000; n += 3) cache.set(`key ${n}`, `new ${n}`)
    cache.deleteByTag('gone')
    await cache.close()

    cache = await open(1e6 + 500)
    for (let n = 0; n < 3000; n++) {
      const wanted = [undefined, `new ${n}`, valueOfKey(n)][n % 3]
      expect(await cache.load(`key ${n}`)).toBe(wanted)
    }
    expect(await cache.load('large')).toBe('large '.repeat(30_000))
    expect(await cache.load('short')).toBe('short')
    expect(await cache.load('tagged')).toBe(undefined)
    expect(await cache.load('kept')).toBe('kept')
    cache.deleteByTag('stays')
    cache.set('key 0', 'again')
    cache.check()
    await cache.close()

    cache = await open(1e6 + 1000)
    expect(await cache.load('short')).toBe(undefined)
    expect(await cache.load('kept')).toBe(undefined)
    expect(await cache.load('key 0')).toBe('again')
    expect(await cache.load('key 2')).toBe(valueOfKey(2))
    cache.check()
    await cache.close()
  })

  test('before it is known, nothing is done, and who can wait waits', async () => {
    const first = await open()
    first.set('k', 'v')
    await first.close()
    const cache = new Cache<string>({ memory: '6MiB', file: { path: join(folder, 'file'), size: '16MiB' } })
    expect(() => cache.get('k')).toThrow(/await cache.ready\(\) first/)
    expect(() => cache.set('k', 'w')).toThrow(/await cache.ready\(\) first/)
    expect(await cache.load('k')).toBe('v')
    await cache.close()
  })

  test('a process that is killed leaves what was synced, each value whole', async () => {
    const child = fork(new URL('killed-cache.mjs', import.meta.url), [join(folder, 'file')], {
      execArgv: [],
    })
    const ended = new Promise((resolve) => child.once('exit', resolve))
    await new Promise((resolve, reject) => {
      child.once('message', resolve)
      child.once('exit', () => reject(new Error('it ended too early')))
    })
    child.kill('SIGKILL')
    await ended
    const cache = await open()
    let found = 0
    for (let n = 0; n < 1000; n++) {
      const value = await cache.load(`key ${n}`)
      if (value !== undefined) found++
      expect([valueOfKey(n), `later ${n}`, undefined]).toContain(value)
    }
    expect(found).toBeGreaterThan(900)
    cache.check()
    await cache.close()
  })

  test.each([1, 2, 3, 4, 5, 6])('a file that was damaged costs entries, never wrong ones (seed %i)', async (seed) => {
    let cache = await open()
    for (let n = 0; n < 2000; n++) cache.set(`key ${n}`, valueOfKey(n), n % 10 === 0 ? { tags: ['t'] } : {})
    await cache.close()
    const path = join(folder, 'file')
    const { length } = readFileSync(path)
    let state = seed
    const file = openSync(path, 'r+')
    for (let n = 0; n < 40; n++) {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0
      // Not the first block, by which the file is known to be ours.
      writeSync(file, Buffer.alloc(64, state), 0, 64, 8192 + (state % (length - 16384)))
    }
    closeSync(file)
    cache = await open()
    let found = 0
    for (let n = 0; n < 2000; n++) {
      const value = await cache.load(`key ${n}`)
      if (value !== undefined) found++
      expect([valueOfKey(n), undefined]).toContain(value)
    }
    expect(found).toBeGreaterThan(0)
    cache.check()
    cache.set('new', 'new')
    await cache.close()
    cache = await open()
    expect(await cache.load('new')).toBe('new')
    await cache.close()
  })

  test('a file of an older time is no newer one', async () => {
    let cache = await open()
    cache.set('k', 'old')
    await cache.close()
    copyFileSync(join(folder, 'file'), join(folder, 'copy'))
    cache = await open()
    cache.set('k', 'new')
    await cache.close()
    writeFileSync(join(folder, 'file'), readFileSync(join(folder, 'copy')))
    cache = await open()
    expect(['old', undefined]).toContain(await cache.load('k'))
    await cache.close()
  })

  test('two caches on one file: the second is refused, and the first goes on', async () => {
    const cache = await open()
    expect(() => new Cache({ memory: '6MiB', file: { path: join(folder, 'file'), size: '16MiB' } })).toThrow(/file/)
    cache.set('k', 'v')
    expect(cache.get('k')).toBe('v')
    await cache.close()
  })

  test('sync without a file is an error', async () => {
    const cache = new Cache({ memory: '2MiB' })
    await expect(cache.sync()).rejects.toMatchObject({ code: 'TMEM_UNSUPPORTED' })
    await cache.close()
  })
})
