/** The suite that keyv has for its stores, over a cache; and what it does not ask. */
import keyvTestSuite from '@keyv/test-suite'
import Keyv from 'keyv'
import * as vitest from 'vitest'
import { afterAll, describe, expect, test } from 'vitest'
import { Cache } from '../src/index.ts'
import { KeyvStore } from '../src/keyv.ts'

const cache = new Cache({ memory: '4MiB' })
afterAll(async () => {
  cache.check()
  await cache.close()
})

describe('the suite of keyv', () => {
  keyvTestSuite(vitest, Keyv, () => new KeyvStore(cache))
})

describe('a store for keyv', () => {
  test('forgets what has expired, and keeps what has no end', async () => {
    let now = 1e6
    const own = new Cache({ memory: '2MiB', clock: () => now })
    const store = new KeyvStore(own)
    await store.set('short', 'value', 10)
    await store.set('ever', 'value', 0)
    expect(await store.getMany(['short', 'ever'])).toEqual(['value', 'value'])
    now += 10
    expect(await store.getMany(['short', 'ever'])).toEqual([undefined, 'value'])
    expect(await store.has('short')).toBe(false)
    await own.close()
  })

  test('clears its own namespace, and leaves what else is in the cache', async () => {
    cache.set('mine', 'mine')
    const [one, two] = ['one', 'two'].map((namespace) => new Keyv({ store: new KeyvStore(cache), namespace }))
    await one!.set('k', 1)
    await two!.set('k', 2)
    await one!.clear()
    expect(await one!.get('k')).toBe(undefined)
    expect(await two!.get('k')).toBe(2)
    expect(cache.get('mine')).toBe('mine')
    expect(await two!.delete(['k', 'none'])).toBe(true)
    expect(await two!.delete(['k', 'none'])).toBe(false)
  })

  test('a value for which there is no room is an error', async () => {
    const keyv = new Keyv({ store: new KeyvStore(cache) })
    const errors: unknown[] = []
    keyv.on('error', (error) => errors.push(error))
    expect(await keyv.set('k', 'x'.repeat(3 * 2 ** 20))).toBe(false)
    expect(String(errors[0])).toMatch(/no room for the value/)
    expect(await keyv.get('k')).toBe(undefined)
  })
})
