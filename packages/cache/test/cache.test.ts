import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import { ByteLimit, TmemError } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { zcache } from '@tmem/zcache'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { Cache, type CacheKey, type CacheMessage, type CacheOptions } from '../src/index.ts'

const memory = '4MiB'
let folder = ''
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'tmem-cache-'))
})
afterAll(() => {
  rmSync(folder, { recursive: true })
})

/** Text that does not shrink much. */
const letters = Buffer.from(randomBytesOf(2 ** 20).map((byte) => 33 + (byte % 90))).toString('latin1')

function randomBytesOf(length: number): Uint8Array {
  const bytes = new Uint8Array(length)
  let state = 1
  for (let n = 0; n < length; n++) {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0
    bytes[n] = state >>> 16
  }
  return bytes
}

const noise = (length: number, seed: number): string => {
  const at = (seed * 7919) % (letters.length - 2 ** 18)
  return letters.slice(at, at + length)
}

/** What is thrown, as its kind and its message. */
function thrown(work: () => unknown): string {
  try {
    work()
  } catch (error) {
    return String(error)
  }
  return 'nothing'
}

async function using<V>(options: CacheOptions<V>, use: (cache: Cache<V>) => void | Promise<void>): Promise<void> {
  const cache = new Cache<V>(options)
  try {
    await cache.ready()
    await use(cache)
    cache.check()
  } finally {
    await cache.close()
  }
}

describe('values', () => {
  const values: readonly unknown[] = [
    '',
    'text',
    'größe',
    'Ελλάδα',
    'emoji 🦊',
    'lone \ud83e',
    '\udc00\ud800',
    'x'.repeat(4070),
    'x'.repeat(4080),
    'y'.repeat(100_000),
    'я'.repeat(70_000),
    new Uint8Array(0),
    new Uint8Array([1, 2, 3]),
    Buffer.from('a buffer'),
    Buffer.alloc(50_000, 'long '),
    0,
    -0,
    Number.NaN,
    12n,
    true,
    null,
    { a: [1, { b: 'c' }], when: new Date(5), set: new Set([1]), map: new Map([['k', /x/g]]) },
    [undefined, 1],
    new Float64Array([1.5, -2]),
    { view: new Uint16Array([1, 2]), long: 'z'.repeat(9000) },
    new Error('an error'),
  ]

  test('come back as they were, each its own', async () => {
    await using({ memory }, (cache) => {
      for (const [n, value] of values.entries()) expect(cache.set(`key ${n}`, value)).toBe(true)
      for (const [n, value] of values.entries()) expect(cache.get(`key ${n}`)).toStrictEqual(value)
      // Again, when they have left the window.
      for (let n = 0; n < 3000; n++) cache.set(`filler ${n}`, 'f'.repeat(300))
      for (const [n, value] of values.entries()) {
        const got = cache.get(`key ${n}`)
        expect(got).toStrictEqual(value)
        if (got instanceof Uint8Array) got.fill(9)
        else if (ArrayBuffer.isView(got)) new Uint8Array(got.buffer, got.byteOffset, got.byteLength).fill(9)
        else if (typeof got === 'object' && got !== null && 'view' in got) (got.view as Uint16Array).fill(9)
        expect(cache.get(`key ${n}`)).toStrictEqual(value)
      }
    })
  })

  test('of 64 MiB are kept where there is room, and larger ones are an error', async () => {
    await using<Uint8Array>({ memory: '192MiB' }, (cache) => {
      const large = new Uint8Array(64 * 2 ** 20)
      for (let n = 0; n < large.length; n += 1000) large[n] = n / 1000
      expect(cache.set('large', large)).toBe(true)
      expect(Buffer.compare(cache.get('large')!, large)).toBe(0)
      expect(() => cache.set('large', new Uint8Array(64 * 2 ** 20 + 1))).toThrow(/at most 67108864 bytes/)
      expect(cache.get('large')?.length).toBe(large.length)
    })
  })

  test('go through a codec', async () => {
    const codec = { encode: JSON.stringify, decode: JSON.parse } as const
    await using<{ readonly name: string }>({ memory, codec }, (cache) => {
      cache.set('a', { name: 'Ada' })
      expect(cache.get('a')).toEqual({ name: 'Ada' })
    })
    const bytes = { encode: (value: number) => Uint8Array.of(value), decode: (value: Uint8Array) => value[0]! }
    await using<number>({ memory, codec: bytes }, (cache) => {
      cache.set('a', 7)
      expect(cache.get('a')).toBe(7)
    })
  })
})

describe('keys', () => {
  const keys: readonly CacheKey[] = [
    '',
    'a',
    'A',
    '__proto__',
    'constructor',
    'é',
    'e\u0301',
    '\ud800',
    '\ud801',
    '\ufffd',
    'Ā',
    'k'.repeat(64 * 1024),
    'я'.repeat(32 * 1024),
    new Uint8Array(0),
    Buffer.from('a'),
    Buffer.from('a', 'utf16le'),
    new Uint8Array(64 * 1024),
  ]

  test('of every kind are different keys', async () => {
    await using<string>({ memory }, (cache) => {
      for (const [n, key] of keys.entries()) expect(cache.set(key, `value ${n}`)).toBe(true)
      for (const [n, key] of keys.entries()) {
        expect(cache.get(key)).toBe(`value ${n}`)
        expect(cache.has(key)).toBe(true)
      }
      for (const key of keys) expect(cache.delete(key)).toBe(true)
      for (const key of keys) {
        expect(cache.get(key)).toBe(undefined)
        expect(cache.delete(key)).toBe(false)
      }
      expect(cache.stats().entries).toBe(0)
    })
  })
})

describe('what is told', () => {
  test('to those who listen: each operation, with what came of it', async () => {
    await using<string>({ memory: '2MiB' }, (cache) => {
      const told: string[] = []
      const listen = (message: unknown): void => {
        const { cache: from, operation, key, outcome } = message as CacheMessage
        expect(from).toBe(cache)
        told.push(`${operation} ${String(key)} ${outcome}`)
        // Who listens may use the cache, too.
        if (operation === 'get') cache.has('b')
      }
      cache.set('before', 'x')
      subscribe('tmem:cache', listen)
      try {
        cache.set('a', 'x')
        expect(cache.get('a')).toBe('x')
        cache.get('b')
        cache.delete('a')
        expect(cache.set('b', 'x'.repeat(2 ** 21))).toBe(false)
      } finally {
        unsubscribe('tmem:cache', listen)
      }
      cache.get('a')
      expect(told).toEqual(['set a stored', 'get a hit', 'get b absent', 'delete a deleted', 'set b refused'])
    })
  })

  test('in stats: what was counted, and several at once', async () => {
    await using<string>({ memory: '2MiB' }, (cache) => {
      expect(cache.setMany([['a', '1'] as const, ['b', '2'] as const].values())).toBe(2)
      expect(cache.getMany(['b', 'none', 'a'])).toEqual(['2', undefined, '1'])
      cache.clear()
      expect(cache.getMany(['a', 'b'])).toEqual([undefined, undefined])
      expect(cache.set('a', 'again')).toBe(true)
      const { sets, hits, misses, entries, memoryBytes, limitBytes } = cache.stats()
      expect({ sets, hits, entries }).toEqual({ sets: 3, hits: 2, entries: 1 })
      expect(misses).toMatchObject({ absent: 3, evicted: 0 })
      expect(memoryBytes).toBeLessThanOrEqual(limitBytes)
    })
  })
})

describe('bad input', () => {
  const cases: readonly (readonly [string, (cache: Cache<unknown>) => unknown, RegExp])[] = [
    ['a number as key', (cache) => cache.get(5 as never), /cache\.get: a key is a string or a Uint8Array, got number/],
    ['null as key', (cache) => cache.set(null as never, 1), /cache\.set: a key is .* got null/],
    ['a key too long', (cache) => cache.set('k'.repeat(65537), 1), /a key has at most 65536 bytes/],
    ['a wide key too long', (cache) => cache.has('я'.repeat(32769)), /a key has at most 65536 bytes/],
    ['undefined', (cache) => cache.set('k', undefined), /undefined is what get answers/],
    ['a function', (cache) => cache.set('k', () => 1), /the value cannot be serialised/],
    ['a symbol inside', (cache) => cache.set('k', { s: Symbol('s') }), /the value cannot be serialised/],
    [
      'a getter that throws',
      (cache) =>
        cache.set('k', {
          get bad() {
            throw new Error('from the getter')
          },
        }),
      /from the getter/,
    ],
    ['ttl 0', (cache) => cache.set('k', 1, { ttl: 0 }), /ttl is a number of milliseconds above 0, got 0/],
    ['ttl below 0', (cache) => cache.set('k', 1, { ttl: -1 }), /above 0, got -1/],
    ['ttl NaN', (cache) => cache.set('k', 1, { ttl: Number.NaN }), /above 0, got NaN/],
    ['ttl as text', (cache) => cache.set('k', 1, { ttl: '5' as never }), /ttl is a number of milliseconds, got string/],
    ['an unknown option', (cache) => cache.set('k', 1, { tll: 5 } as never), /has no option tll; did you mean ttl/],
    ['tags that are none', (cache) => cache.set('k', 1, { tags: 'a' as never }), /tags are an array of strings/],
    ['a tag that is missing', (cache) => cache.set('k', 1, { tags: Array(1) }), /tags are an array of strings/],
    ['a port', (cache) => cache.set('k', new MessageChannel().port1), /^TypeError: the value cannot be serialised/],
    [
      'shared memory',
      (cache) => cache.set('k', new SharedArrayBuffer(8)),
      /^TypeError: the value cannot be serialised/,
    ],
    ['a promise', (cache) => cache.set('k', Promise.resolve()), /^TypeError: the value cannot be serialised/],
    ['too many tags', (cache) => cache.set('k', 1, { tags: Array(256).fill('t') }), /at most 255 tags, got 256/],
    ['a tag that is none', (cache) => cache.deleteByTag(1 as never), /a tag is a string, got number/],
  ]

  test.each(cases)('%s is one error, and changes nothing', async (_name, attempt, message) => {
    await using<unknown>({ memory }, (cache) => {
      cache.set('k', 'before')
      cache.set('other', 'other')
      expect(thrown(() => attempt(cache))).toMatch(message)
      expect(cache.get('k')).toBe('before')
      expect(cache.get('other')).toBe('other')
    })
  })

  test('tags are those of the call, whatever the codec does to their array', async () => {
    const tags = ['first']
    const encode = (value: unknown): string => {
      for (let n = 0; n < 300; n++) tags.push(`later ${n}`)
      return JSON.stringify(value)
    }
    await using<unknown>({ memory, codec: { encode, decode: JSON.parse } }, (cache) => {
      cache.set('other', 'other')
      tags.length = 1
      cache.set('k', 'value', { tags })
      cache.deleteByTag('later 7')
      expect([cache.get('k'), cache.get('other')]).toEqual(['value', 'other'])
      cache.deleteByTag('first')
      expect(cache.get('k')).toBeUndefined()
      cache.check()
    })
  })

  const options: readonly (readonly [string, unknown, RegExp])[] = [
    ['none', undefined, /expected an object of options/],
    ['no memory', {}, /memory is how much it may use/],
    ['too little', { memory: '1MiB' }, /memory is at least 2097152 bytes, got 1048576/],
    ['none of it', { memory: 0 }, /^cache: memory is a positive integer of bytes, got 0$/],
    ['less than none', { memory: -1 }, /^cache: memory is a positive integer of bytes, got -1$/],
    ['no number', { memory: Number.NaN }, /^cache: memory is a positive integer of bytes, got NaN$/],
    ['no amount', { memory: 'much' }, /memory is an amount of bytes/],
    ['an unknown one', { memory, size: 1 }, /cache has no option size/],
    ['half a codec', { memory, codec: { encode: JSON.stringify } }, /codec has two functions/],
    ['a stack with an unknown layer', { stack: 'zcach(limit=1MiB)' }, /zcache/],
  ]
  test.each(options)('of options: %s', (_name, value, message) => {
    expect(() => new Cache(value as never)).toThrow(message)
  })

  test('a file whose tables do not fit into the memory', () => {
    const path = join(folder, 'too-large')
    expect(() => new Cache({ memory: '2MiB', file: { path, size: '1MiB' } })).toThrow(
      /memory is at least \d+ bytes with these settings, got 2097152/,
    )
  })

  test('a cache that is closed says so, and closes once', async () => {
    const cache = new Cache({ memory })
    await cache.close()
    await cache.close()
    for (const use of [() => cache.get('k'), () => cache.set('k', 1), () => cache.delete('k'), () => cache.clear()])
      expect(use).toThrow(expect.objectContaining({ code: 'TMEM_CLOSED' }))
    await expect(cache.load('k')).rejects.toThrow(TmemError)
  })

  test('code of the user that uses the cache meanwhile', async () => {
    await using<unknown>({ memory }, (cache) => {
      const value = {
        get inner() {
          cache.set('inner', 'x'.repeat(5000))
          cache.delete('outer')
          return 'inner'
        },
      }
      expect(cache.set('outer', value)).toBe(true)
      expect(cache.get('outer')).toEqual({ inner: 'inner' })
      expect(cache.get('inner')).toBe('x'.repeat(5000))
    })
  })
})

describe('lifetimes and tags', () => {
  test('what has expired is gone, at the millisecond', async () => {
    let now = 1000
    await using<string>({ memory, clock: () => now }, (cache) => {
      cache.set('short', 's', { ttl: 10 })
      cache.set('long', 'l', { ttl: 1e9 })
      cache.set('huge', 'h', { ttl: Number.MAX_VALUE })
      cache.set('ever', 'e')
      now += 9
      expect(cache.getMany(['short', 'long', 'huge', 'ever'])).toEqual(['s', 'l', 'h', 'e'])
      now += 1
      expect(cache.getMany(['short', 'long', 'huge', 'ever'])).toEqual([undefined, 'l', 'h', 'e'])
      expect(cache.stats().misses.expired).toBe(1)
      // A clock that jumps back brings nothing back, and forward ends what has an end.
      now = 0
      expect(cache.has('short')).toBe(false)
      expect(cache.get('long')).toBe('l')
      now = 1e15
      expect(cache.getMany(['long', 'huge', 'ever'])).toEqual([undefined, 'h', 'e'])
    })
  })

  test('expired values go before others', async () => {
    let now = 0
    await using<string>({ memory, clock: () => now }, (cache) => {
      for (let n = 0; n < 2000; n++) cache.set(`ever ${n}`, noise(500, n))
      for (let n = 0; n < 2000; n++) cache.set(`short ${n}`, noise(500, n), { ttl: 1000 })
      now = 5000
      for (let n = 0; n < 3000; n++) cache.set(`new ${n}`, noise(500, n), { ttl: 1e6 })
      const { evictions } = cache.stats()
      expect(evictions.room).toBe(0)
      expect(evictions.expired).toBeGreaterThan(300)
      for (let n = 0; n < 2000; n++) expect(cache.has(`ever ${n}`)).toBe(true)
    })
  })

  test('the default clock goes on', async () => {
    await using<string>({ memory }, async (cache) => {
      cache.set('k', 'v', { ttl: 20 })
      expect(cache.get('k')).toBe('v')
      await setTimeout(30)
      expect(cache.get('k')).toBe(undefined)
    })
  })

  test('a tag takes what has it, and nothing else', async () => {
    await using<number>({ memory }, (cache) => {
      cache.set('a', 1, { tags: ['x', 'y'] })
      cache.set('b', 2, { tags: ['y'] })
      cache.set('c', 3)
      cache.deleteByTag('x')
      expect(cache.getMany(['a', 'b', 'c'])).toEqual([undefined, 2, 3])
      cache.set('a', 4, { tags: ['x'] })
      expect(cache.get('a')).toBe(4)
      cache.deleteByTag('y')
      expect(cache.getMany(['a', 'b', 'c'])).toEqual([4, undefined, 3])
      expect(cache.stats().misses.untagged).toBe(2)
      // More tags than are remembered: entries with tags go, others do not.
      for (let n = 0; n < 20_000; n++) cache.deleteByTag(`tag ${n}`)
      expect(cache.getMany(['a', 'c'])).toEqual([undefined, 3])
    })
  })
})

describe('the limit', () => {
  test('is kept whatever is written, and what is used stays', async () => {
    await using<string>({ memory }, (cache) => {
      for (let n = 0; n < 20_000; n++) {
        cache.set(`key ${n}`, noise(20 + (n % 900), n))
        if (n % 50 === 0) for (let hot = 0; hot < 100; hot++) if (n > 2000) cache.get(`key ${hot}`)
      }
      const { memoryBytes, entries, evictions } = cache.stats()
      expect(memoryBytes).toBeLessThanOrEqual(4 * 2 ** 20)
      expect(memoryBytes).toBeGreaterThan(3 * 2 ** 20)
      expect(evictions.room).toBeGreaterThan(10_000)
      expect(entries).toBeGreaterThan(3000)
      const hot = Array.from({ length: 100 }, (_, n) => cache.get(`key ${n}`)).filter((value) => value !== undefined)
      expect(hot.length).toBeGreaterThan(95)
    })
  })

  test('what was used in another time makes room', { timeout: 60_000 }, async () => {
    await using<string | Uint8Array>({ memory: '8MiB' }, (cache) => {
      // All of it is used as often as is counted, in pages that are small once they are compressed.
      for (let n = 0; n < 90_000; n++) cache.set(`small ${n}`, `${n}:`.repeat(20))
      for (let turn = 0; turn < 4; turn++) for (let n = 0; n < 90_000; n++) cache.get(`small ${n}`)
      const bytes = new Uint8Array(2_500_000)
      for (let at = 0, word = 12_345; at < bytes.length; at++) {
        word = (Math.imul(word, 1_103_515_245) + 12_345) | 0
        bytes[at] = word >>> 16
      }
      let refused = 0
      for (let n = 0; n < 8; n++) {
        if (!cache.set(`large ${n}`, bytes)) refused++
        cache.get(`large ${n}`)
      }
      for (let n = 0; n < 300; n++) {
        if (!cache.set(`medium ${n}`, bytes.subarray(n * 1000, n * 1000 + 9000))) refused++
        for (let turn = 0; turn < 3; turn++) cache.get(`medium ${n}`)
      }
      expect(refused).toBe(0)
      expect(cache.get('medium 299')).toEqual(bytes.subarray(299_000, 308_000))
      expect(cache.stats().memoryBytes).toBeLessThanOrEqual(8 * 2 ** 20)
    })
  })

  test('what no room would help takes nobody’s room', async () => {
    const stack = [zcache({ limitBytes: 4 * 2 ** 20, zvMaxZsize: 2048 })]
    await using<string | Uint8Array>({ stack }, (cache) => {
      for (let n = 0; n < 20_000; n++) cache.set(`small ${n}`, `${n}-`.repeat(60))
      // None of these shrinks enough, alone in its page or in three.
      for (let n = 0; n < 100; n++)
        cache.set(`refused ${n}`, Buffer.from(noise(n % 2 === 0 ? 3000 : 6000, n), 'latin1'))
      expect(cache.stats().evictions.refused + (cache.stats().refused['Incompressible'] ?? 0)).toBeGreaterThan(90)
      let there = 0
      for (let n = 0; n < 20_000; n++) if (cache.has(`small ${n}`)) there++
      expect(there).toBeGreaterThan(19_900)
    })
  })

  test('can be lowered while the cache is full, and raised again', async () => {
    const limit = new ByteLimit(8 * 2 ** 20)
    await using<string>({ memory: limit }, (cache) => {
      for (let n = 0; n < 12_000; n++) cache.set(`key ${n}`, noise(600, n))
      expect(cache.stats().memoryBytes).toBeGreaterThan(6 * 2 ** 20)
      limit.bytes = 4 * 2 ** 20
      for (let n = 0; n < 1000 && cache.tick(); n++);
      const lowered = cache.stats()
      expect(lowered.memoryBytes).toBeLessThanOrEqual(4 * 2 ** 20)
      expect(lowered.entries).toBeGreaterThan(2000)
      let wrong = 0
      for (let n = 0; n < 12_000; n++) {
        const value = cache.get(`key ${n}`)
        if (value !== undefined && value !== noise(600, n)) wrong++
      }
      expect(wrong).toBe(0)
      limit.bytes = 8 * 2 ** 20
      for (let n = 0; n < 12_000; n++) cache.set(`key ${n}`, noise(600, n))
      expect(cache.stats().memoryBytes).toBeGreaterThan(6 * 2 ** 20)
    })
  })

  const rowOf = (n: number): string => JSON.stringify({ id: n, text: 'a row of some table, '.repeat(20 + (n % 20)) })

  test('leaves free memory to pages that are read, which keep it until entries need it', async () => {
    await using<string>({ memory: '16MiB' }, (cache) => {
      for (let n = 0; n < 8000; n++) cache.set(`row ${n}`, rowOf(n))
      const readAll = (): number => {
        const before = cache.stats().pagesRead
        for (let n = 0; n < 8000; n++) expect(cache.get(`row ${n}`)).toBe(rowOf(n))
        return cache.stats().pagesRead - before
      }
      const least = cache.stats().windowBytes
      expect(readAll()).toBeGreaterThan(1000)
      expect(readAll()).toBe(0)
      const { windowBytes, memoryBytes } = cache.stats()
      expect(windowBytes).toBeGreaterThan(4 * least)
      expect(memoryBytes).toBeLessThanOrEqual(16 * 2 ** 20)
      // All that entries can use is theirs.
      for (let n = 0; n < 40_000; n++) cache.set(`key ${n}`, noise(600, n))
      const full = cache.stats()
      expect(full.windowBytes).toBe(least)
      expect(full.evictions.room).toBeGreaterThan(0)
      expect(full.memoryBytes).toBeLessThanOrEqual(16 * 2 ** 20)
      expect(full.memoryBytes).toBeGreaterThan(15 * 2 ** 20)
    })
  })

  test('when it is lowered, copies of pages go before entries', async () => {
    const limit = new ByteLimit(16 * 2 ** 20)
    await using<string>({ memory: limit }, (cache) => {
      for (let n = 0; n < 8000; n++) cache.set(`row ${n}`, rowOf(n))
      for (let n = 0; n < 8000; n++) cache.get(`row ${n}`)
      const { entries, memoryBytes, windowBytes } = cache.stats()
      // Two keys of one hash displace each other: among 8,000 there are two in one run of 134.
      expect(entries).toBeGreaterThan(7996)
      limit.bytes = memoryBytes - windowBytes / 2
      for (let n = 0; n < 1000 && cache.tick(); n++);
      const lowered = cache.stats()
      expect(lowered.memoryBytes).toBeLessThanOrEqual(limit.bytes)
      expect(lowered.entries).toBe(entries)
      let there = 0
      for (let n = 0; n < 8000; n++) if (cache.get(`row ${n}`) === rowOf(n)) there++
      expect(there).toBe(entries)
      cache.clear()
      expect(cache.stats().windowBytes).toBeLessThan(2 ** 20)
    })
  })

  test.each([1, 2, 3])('the window grows and shrinks, and a value is the last one or none (seed %i)', async (seed) => {
    const limit = new ByteLimit(12 * 2 ** 20)
    let state = seed * 1000
    const random = (below: number): number => {
      state += 1 + seed
      return letters.charCodeAt(state % letters.length) % below
    }
    await using<string>({ memory: limit }, (cache) => {
      const model = new Map<string, string>()
      const anyRow = (n: number): string => `${rowOf(n)} ${noise(random(90), n)}`
      const sizes = new Set<number>()
      let wrong = 0
      for (let turn = 0; turn < 60_000; turn++) {
        const key = `key ${(random(90) * 90 + random(90)) % 6000}`
        // Times of writing, and of reading.
        if (random(90) < (turn % 20_000 < 8000 ? 60 : 3)) {
          const value = anyRow(turn)
          if (cache.set(key, value)) model.set(key, value)
          else model.delete(key)
        } else if (random(90) === 7) {
          cache.delete(key)
          model.delete(key)
        } else {
          const got = cache.get(key)
          if (got !== undefined && got !== model.get(key)) wrong++
        }
        if (turn % 5000 !== 4999) continue
        limit.bytes = (turn % 10_000 < 5000 ? 4 : 12) * 2 ** 20
        while (cache.tick());
        cache.check()
        const { memoryBytes, windowBytes } = cache.stats()
        sizes.add(windowBytes)
        expect(memoryBytes).toBeLessThanOrEqual(limit.bytes)
      }
      expect(wrong).toBe(0)
      expect(sizes.size).toBeGreaterThan(2)
    })
  })

  test('a value that cannot fit is refused, and others stay', async () => {
    await using<Uint8Array | string>({ memory }, (cache) => {
      cache.set('small', 'small')
      cache.set('large', 'before')
      expect(cache.set('large', new Uint8Array(3 * 2 ** 20))).toBe(false)
      expect(cache.get('large')).toBe(undefined)
      expect(cache.get('small')).toBe('small')
      expect(cache.stats().refused).toEqual({ 'too large': 1 })
    })
  })

  test('a cache over a stack, in code and as text', async () => {
    for (const stack of [[zcache({ limitBytes: '1MiB' })], 'zcache(limit=1MiB)', 'memory(limit=1MiB)'])
      await using<string>({ stack }, (cache) => {
        for (let n = 0; n < 3000; n++) expect(cache.set(`key ${n}`, noise(400, n))).toBe(true)
        expect(cache.get('key 2999')).toBe(noise(400, 2999))
        expect(cache.stats().places[0]!.usedBytes).toBeLessThanOrEqual(2 ** 20)
        expect(cache.stats().evictions.room).toBeGreaterThan(100)
      })
  })
})

/** What an entry is in the model. */
interface Wanted {
  readonly value: unknown
  readonly expiry: number
  readonly tags: readonly string[]
}

const anyKey = fc.oneof(
  fc.integer({ min: 0, max: 30 }).map((n) => `key ${n}`),
  fc.integer({ min: 0, max: 3 }).map((n) => 'ж'.repeat(n)),
  fc.integer({ min: 0, max: 3 }).map((n) => new Uint8Array(n)),
)
const anyValue = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.tuple(fc.integer({ min: 0, max: 1500 }), fc.nat(99)).map(([size, seed]) => noise(size, seed)),
  },
  {
    weight: 1,
    arbitrary: fc.tuple(fc.integer({ min: 3900, max: 30_000 }), fc.nat(99)).map(([size, seed]) => noise(size, seed)),
  },
  { weight: 1, arbitrary: fc.uint8Array({ maxLength: 300 }) },
  { weight: 1, arbitrary: fc.object({ maxDepth: 2 }).map((value) => JSON.parse(JSON.stringify(value)) as unknown) },
)
const anyStep = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.record({
      type: fc.constant('set' as const),
      key: anyKey,
      value: anyValue,
      ttl: fc.option(fc.constantFrom(1, 50, 5000, 1e6), { nil: undefined }),
      tags: fc.subarray(['red', 'green', 'blue']),
    }),
  },
  { weight: 8, arbitrary: fc.record({ type: fc.constant('get' as const), key: anyKey }) },
  { weight: 2, arbitrary: fc.record({ type: fc.constant('delete' as const), key: anyKey }) },
  { weight: 2, arbitrary: fc.record({ type: fc.constant('wait' as const), ms: fc.constantFrom(1, 49, 5000) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('untag' as const), tag: fc.constantFrom('red', 'green') }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('press' as const), pages: fc.nat(400), seed: fc.nat(999) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('clear' as const) }) },
)
const nameOf = (key: CacheKey): string => (typeof key === 'string' ? `s${key}` : `b${key.length}`)

/** Pages of pressure that a cache of the smallest memory holds besides everything else. */
const enough = 300

let files = 0
const stores = [
  ['memory', (): Partial<CacheOptions<unknown>> => ({ memory: '2MiB' })],
  // Room for all that is written: what was written anew takes its place until a segment goes.
  ['memory that is shared', (): Partial<CacheOptions<unknown>> => ({ memory: '32MiB' })],
  [
    'memory and a file',
    (): Partial<CacheOptions<unknown>> => ({
      memory: '4MiB',
      file: { path: join(folder, `file ${++files}`), size: '1MiB' },
    }),
  ],
  ['a stack as text', (): Partial<CacheOptions<unknown>> => ({ stack: 'memory(limit=512KiB) > zcache(limit=1MiB)' })],
] as const

test.each(stores)(
  'over %s a cache answers as a Map with expiry does, or has nothing',
  {
    timeout: 60_000,
  },
  async (name, options) => {
    // Elsewhere there is not so much memory, or pages vanish when they like.
    const isExact = name.startsWith('memory') && !name.endsWith('file')
    await fc.assert(
      fc.asyncProperty(fc.array(anyStep, { maxLength: 120 }), async (steps) => {
        let now = 1e6
        let pressed = 0
        const made = new Cache({ ...options(), clock: () => now })
        await made.ready()
        const isShared = name.endsWith('shared')
        // Half of what is done is done through another view of it.
        const views = isShared ? [made, Cache.join(made.share(), { clock: () => now })] : [made]
        let cache = made
        const model = new Map<string, Wanted>()
        const wrong: unknown[] = []
        const compare = (key: CacheKey, got: unknown, miss: unknown, wanted: unknown): void => {
          const mayMiss = !isExact || pressed >= enough
          if (!isDeepStrictEqual(got, wanted) && !(mayMiss && got === miss)) wrong.push({ key, got, wanted })
        }
        const wantedOf = (key: CacheKey): unknown => {
          const wanted = model.get(nameOf(key))
          return wanted === undefined || wanted.expiry <= now ? undefined : wanted.value
        }
        for (const [turn, step] of steps.entries()) {
          cache = views[turn % views.length]!
          switch (step.type) {
            case 'set': {
              const { key, value, ttl, tags } = step
              compare(key, cache.set(key, value, { ttl, tags }), false, true)
              model.set(nameOf(key), { value, expiry: now + (ttl ?? Number.POSITIVE_INFINITY), tags })
              break
            }
            case 'get': {
              const got = cache.get(step.key)
              compare(step.key, got, undefined, wantedOf(step.key))
              compare(step.key, cache.has(step.key), false, wantedOf(step.key) !== undefined)
              compare(step.key, await cache.load(step.key), undefined, wantedOf(step.key))
              break
            }
            case 'delete':
              compare(step.key, cache.delete(step.key), false, wantedOf(step.key) !== undefined)
              model.delete(nameOf(step.key))
              break
            case 'wait':
              now += step.ms
              break
            case 'untag':
              cache.deleteByTag(step.tag)
              for (const [key, { tags }] of model) if (tags.includes(step.tag)) model.delete(key)
              break
            case 'press':
              pressed += step.pages
              for (let n = 0; n < step.pages; n++) cache.set(`press ${step.seed} ${n}`, noise(2000, n))
              break
            case 'clear':
              cache.clear()
              model.clear()
              pressed = 0
              break
          }
        }
        for (const key of model.keys()) {
          const named = key.startsWith('s') ? key.slice(1) : new Uint8Array(Number(key.slice(1)))
          compare(named, await cache.load(named), undefined, wantedOf(named))
        }
        for (const view of views) {
          view.check()
          await view.close()
        }
        expect(wrong).toEqual([])
      }),
      { numRuns: name === 'memory and a file' ? 15 : 40 },
    )
  },
)

test('what memory has no room for is in the file, and has to be waited for', { timeout: 60_000 }, async () => {
  await using<string>({ memory: '4MiB', file: { path: join(folder, 'file'), size: '16MiB' } }, async (cache) => {
    for (let n = 0; n < 8000; n++) {
      cache.set(`key ${n}`, noise(600, n))
      // Else what a slow disk has not taken yet goes.
      if (n % 100 === 0) await cache.sync()
    }
    cache.set('large', noise(200_000, 1))
    let waited = 0
    let found = 0
    for (let n = 0; n < 8000; n++) {
      if (cache.get(`key ${n}`) !== undefined) continue
      waited++
      const value = await cache.load(`key ${n}`)
      if (value !== undefined) found++
      expect(value ?? noise(600, n)).toBe(noise(600, n))
    }
    expect(waited).toBeGreaterThan(500)
    // Of two keys of one hash one is nowhere.
    expect(found).toBeGreaterThan(waited - 4)
    expect(await cache.load('large')).toBe(noise(200_000, 1))
  })
})

test('over a swap area the cache says which entries go, and what is there can be waited for', {
  timeout: 60_000,
}, async () => {
  const stack = [zcache({ limitBytes: '1MiB' }), frontswap({ file: join(folder, 'swap'), sizeBytes: 4 * 2 ** 20 })]
  await using<string>({ stack }, async (cache) => {
    for (let n = 0; n < 12_000; n++) {
      cache.set(`key ${n}`, noise(600, n))
      if (n % 100 === 0) await setTimeout(1)
    }
    let found = 0
    for (let n = 0; n < 12_000; n++) {
      const value = await cache.load(`key ${n}`)
      if (value !== undefined) found++
      expect(value ?? noise(600, n)).toBe(noise(600, n))
    }
    const { evictions, misses, entries } = cache.stats()
    expect(found).toBeGreaterThan(5000)
    expect(entries).toBe(found)
    // Nothing vanishes there.
    expect(evictions).toMatchObject({ room: 12_000 - found, vanished: 0, refused: 0 })
    expect(misses).toMatchObject({ vanished: 0, deferred: 0 })
  })
})
