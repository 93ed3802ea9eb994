/** The driver for unstorage, by unstorage itself. */
import { createStorage } from 'unstorage'
import { expect, test } from 'vitest'
import { Cache } from '../src/index.ts'
import { tmemDriver } from '../src/unstorage.ts'

test('items come back as they were, and a base is cleared with all that is under it', async () => {
  let now = 1e6
  const cache = new Cache({ memory: '4MiB', clock: () => now })
  cache.set('mine', 'mine')
  const driver = tmemDriver({ cache, ttl: 100 })
  const storage = createStorage({ driver })
  await storage.setItem('users:1', { name: 'Ada' })
  await storage.setItem('users:2', 'text', { ttl: 5 })
  await storage.setItem('users', [1])
  await storage.setItemRaw('files:a', Buffer.from([0, 255]))
  await storage.setItem('files:deep:er:b', 7)
  expect(await storage.getItem('users:1')).toEqual({ name: 'Ada' })
  expect(await storage.getItem('users:2')).toBe('text')
  expect(await storage.getItemRaw('files:a')).toEqual(Buffer.from([0, 255]))
  expect(await storage.hasItem('files:a')).toBe(true)
  expect(await storage.getItems(['users:1', 'none'])).toEqual([
    { key: 'users:1', value: { name: 'Ada' } },
    { key: 'none', value: null },
  ])
  now += 5000
  expect(await storage.getItem('users:2')).toBe(null)
  await storage.removeItem('users:1')
  expect(await storage.hasItem('users:1')).toBe(false)
  // The storage itself clears mounts, as a whole; a base is for who calls the driver.
  await driver.clear('files:deep:')
  expect(await storage.getItem('files:deep:er:b')).toBe(null)
  expect(await storage.hasItem('files:a')).toBe(true)
  await storage.clear()
  expect(await storage.hasItem('files:a')).toBe(false)
  expect(await storage.hasItem('users')).toBe(false)
  // What else is in the cache is somebody else's.
  expect(cache.get('mine')).toBe('mine')
  await storage.setItem('users', [2])
  now += 100_000
  expect(await storage.getItem('users')).toBe(null)
  await storage.dispose()
  expect(cache.get('mine')).toBe('mine')
  await cache.close()
})

test('what a cache cannot do is one clear error', async () => {
  const cache = new Cache({ memory: '2MiB' })
  const storage = createStorage({ driver: tmemDriver({ cache }) })
  await expect(storage.setItem('large', 'x'.repeat(3 * 2 ** 20))).rejects.toThrow(/no room for the value of large/)
  await expect(storage.getKeys()).rejects.toThrow(/does not list its keys/)
  await expect(storage.setItem('k', 'v', { ttl: -1 })).rejects.toThrow(/ttl/)
  expect(await storage.getItem('k')).toBe(null)
  expect(() => tmemDriver({} as never)).toThrow(/cache/)
  await cache.close()
})
