import { setTimeout } from 'node:timers/promises'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { Cache } from '../src/index.ts'

let now = 0
let cache: Cache<string>
beforeEach(() => {
  now = 1e9
  cache = new Cache({ memory: '2MiB', clock: () => now })
})
afterEach(async () => {
  cache.check()
  await cache.close()
})

describe('fetch', () => {
  test('calls one loader for a thousand callers', async () => {
    let calls = 0
    const loader = async (): Promise<string> => {
      calls++
      await setTimeout(5)
      return 'loaded'
    }
    const values = await Promise.all(Array.from({ length: 1000 }, () => cache.fetch('k', loader)))
    expect(new Set(values)).toEqual(new Set(['loaded']))
    expect(calls).toBe(1)
    expect(await cache.fetch('k', loader)).toBe('loaded')
    expect(calls).toBe(1)
    expect(cache.stats()).toMatchObject({ loads: 1, loadFailures: 0, entries: 1 })
  })

  test('answers the old value within its grace, and loads a new one behind it', async () => {
    let version = 0
    const loader = (): Promise<string> => Promise.resolve(`version ${++version}`)
    const options = { ttl: 100, grace: 1000 }
    expect(await cache.fetch('k', loader, options)).toBe('version 1')
    now += 99
    expect(await cache.fetch('k', loader, options)).toBe('version 1')
    now += 1
    expect(cache.get('k')).toBe(undefined)
    expect(cache.has('k')).toBe(false)
    expect(await cache.fetch('k', loader, options)).toBe('version 1')
    await setTimeout(1)
    expect(await cache.fetch('k', loader, options)).toBe('version 2')
    now += 1100
    expect(await cache.fetch('k', loader, options)).toBe('version 3')
    expect(cache.stats().stale).toBe(1)
  })

  test('a loader that fails within the grace is tried again, and its failure is counted', async () => {
    const options = { ttl: 100, grace: 1000 }
    await cache.fetch('k', () => 'old', options)
    now += 500
    const failing = (): never => {
      throw new Error('down')
    }
    expect(await cache.fetch('k', failing, options)).toBe('old')
    await setTimeout(1)
    expect(await cache.fetch('k', failing, options)).toBe('old')
    await setTimeout(1)
    expect(cache.stats()).toMatchObject({ loads: 3, loadFailures: 2, stale: 2 })
    now += 600
    await expect(cache.fetch('k', failing, options)).rejects.toThrow('down')
  })

  test('a loader that fails is an error of all who wait, and nothing is kept', async () => {
    const failing = async (): Promise<string> => {
      await setTimeout(1)
      throw new Error('down')
    }
    const ends = await Promise.allSettled([cache.fetch('k', failing), cache.fetch('k', failing)])
    expect(ends.map(({ status }) => status)).toEqual(['rejected', 'rejected'])
    expect(cache.stats()).toMatchObject({ loads: 1, loadFailures: 1, entries: 0 })
    expect(await cache.fetch('k', () => 'up')).toBe('up')
  })

  test('that there is nothing is remembered by choice', async () => {
    let calls = 0
    const loader = (): undefined => {
      calls++
    }
    await cache.fetch('k', loader)
    await cache.fetch('k', loader)
    expect(calls).toBe(2)
    expect(await cache.fetch('k', loader, { absentTtl: 50 })).toBe(undefined)
    expect(await cache.fetch('k', loader, { absentTtl: 50 })).toBe(undefined)
    expect(calls).toBe(3)
    expect(cache.has('k')).toBe(false)
    now += 50
    await cache.fetch('k', loader, { absentTtl: 50 })
    expect(calls).toBe(4)
  })

  test('a loader has its time', async () => {
    let reason: unknown
    const slow = (_key: unknown, { signal }: { signal: AbortSignal }): Promise<string> =>
      new Promise(() => {
        signal.addEventListener('abort', () => {
          reason = signal.reason
        })
      })
    await expect(cache.fetch('k', slow, { timeout: 5 })).rejects.toMatchObject({ name: 'TimeoutError' })
    expect(reason).toMatchObject({ name: 'TimeoutError' })
    expect(await cache.fetch('k', () => 'next')).toBe('next')
  })

  test('a caller that goes ends its wait, and the last one the load', async () => {
    const [one, two] = [new AbortController(), new AbortController()]
    let aborted = false
    const loader = (_key: unknown, { signal }: { signal: AbortSignal }): Promise<string> =>
      new Promise(() => {
        signal.addEventListener('abort', () => {
          aborted = true
        })
      })
    const first = cache.fetch('k', loader, { signal: one.signal })
    const second = cache.fetch('k', loader, { signal: two.signal })
    one.abort()
    await expect(first).rejects.toMatchObject({ name: 'AbortError' })
    expect(aborted).toBe(false)
    two.abort()
    await expect(second).rejects.toMatchObject({ name: 'AbortError' })
    expect(aborted).toBe(true)
    await expect(cache.fetch('k', loader, { signal: AbortSignal.abort() })).rejects.toMatchObject({
      name: 'AbortError',
    })
  })

  test.each([
    ['set', () => cache.set('k', 'newer'), 'newer'],
    ['delete', () => cache.delete('k'), undefined],
    ['clear', () => cache.clear(), undefined],
    ['deleteByTag', () => cache.deleteByTag('t'), undefined],
  ])('%s while a loader runs is newer than what it gives', async (_name, change, wanted) => {
    const value = cache.fetch(
      'k',
      async () => {
        await setTimeout(5)
        return 'older'
      },
      { tags: ['t'] },
    )
    await setTimeout(1)
    change()
    expect(await value).toBe('older')
    expect(cache.get('k')).toBe(wanted)
  })

  test('what cannot be kept is an error, and closing ends all', async () => {
    await expect(cache.fetch('k', () => (() => 1) as never)).rejects.toThrow(/cannot be serialised/)
    const waiting = cache.fetch('k', () => new Promise<string>(() => undefined))
    await cache.close()
    await expect(waiting).rejects.toMatchObject({ code: 'TMEM_CLOSED' })
    cache = new Cache({ memory: '2MiB' })
  })

  test.each([
    ['no loader', () => cache.fetch('k', 'v' as never), /loader is a function, got string/],
    ['grace without ttl', () => cache.fetch('k', () => 'v', { grace: 5 }), /grace is time behind the end of a ttl/],
    ['a timeout below 0', () => cache.fetch('k', () => 'v', { timeout: -1 }), /timeout is a number .* above 0, got -1/],
    ['an unknown option', () => cache.fetch('k', () => 'v', { timout: 1 } as never), /did you mean timeout/],
    ['no signal', () => cache.fetch('k', () => 'v', { signal: {} as never }), /signal is an AbortSignal/],
  ])('bad input: %s', async (_name, attempt, message) => {
    await expect(attempt()).rejects.toThrow(message)
  })
})

describe('loaders that fetch', () => {
  test('what waits for them are told at once, over however many keys and caches', async () => {
    const other = new Cache<string>({ memory: '2MiB' })
    const loaders: Record<string, () => Promise<string | undefined>> = {
      a: async () => {
        await setTimeout(2)
        return await cache.fetch('b', loaders['b']!)
      },
      b: async () => {
        await setTimeout(2)
        return await other.fetch('c', loaders['c']!)
      },
      c: async () => await cache.fetch('a', loaders['a']!),
    }
    await expect(cache.fetch('a', loaders['a']!)).rejects.toThrow(
      'the loader of "c" fetches "a", whose loader fetches "b", whose loader fetches "c", and would wait for itself',
    )
    expect(cache.stats()).toMatchObject({ loads: 2, loadFailures: 2 })
    // Two that begin at the same time: whoever closes the circle is told, and all that wait for it.
    const both = await Promise.allSettled([cache.fetch('a', loaders['a']!), other.fetch('c', loaders['c']!)])
    for (const { status } of both) expect(status).toBe('rejected')
    await other.close()
  })

  test('what waits for nobody are not kept from it', async () => {
    // Many wait for the same; a chain is no circle; what a loader left behind waits for nobody.
    let left: Promise<unknown> | undefined
    const leaf = async (): Promise<string> => {
      await setTimeout(2)
      return 'leaf'
    }
    const middle = async (): Promise<string> => `${await cache.fetch('leaf', leaf)} ${await cache.fetch('leaf', leaf)}`
    const top = async (): Promise<string> => {
      left = setTimeout(20).then(async () => await cache.fetch('top', () => 'again'))
      return (await Promise.all([cache.fetch('middle', middle), cache.fetch('leaf', leaf)])).join(', ')
    }
    expect(await Promise.all([cache.fetch('top', top), cache.fetch('leaf', leaf)])).toEqual(['leaf leaf, leaf', 'leaf'])
    cache.delete('top')
    expect(await left).toBe('again')
    // One whose time is over is waited for by nobody: the next one may wait for what it waits for.
    const never = (): Promise<string> => new Promise(() => {})
    const slow = async (): Promise<string | undefined> => await cache.fetch('never', never)
    await expect(cache.fetch('slow', slow, { timeout: 5 })).rejects.toThrow(/more than 5 ms/)
    expect(await cache.fetch('slow', () => 'fast')).toBe('fast')
  })
})
