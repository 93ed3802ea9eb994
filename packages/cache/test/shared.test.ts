/**
 * A cache that threads share: what one sets another one gets, also while threads are ended in the middle of it.
 *
 * A thread that is ended runs nothing any more, no `finally` either, from a point on that the runtime finds at the next
 * call or turn of a loop. The runtime ends code that takes too long in the same way (`timeout` of `node:vm`): so a
 * thousand ends need no thousand threads.
 */
import { spawnSync } from 'node:child_process'
import { Script } from 'node:vm'
import { MessageChannel, Worker } from 'node:worker_threads'
import { ByteLimit } from '@tmem/core'
import { zcache } from '@tmem/zcache'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { Cache, type SharedCache } from '../src/index.ts'
import { Locks, lockWords, threadMark } from '../src/locks.ts'
import { randomOf, turnOf } from './shared-worker.mjs'

type Turn = (cache: Cache<string>, random: Random, name: string, turn: number, model: Map<string, unknown>) => string[]
type Random = (end: number) => number

const program = new URL('./shared-worker.mjs', import.meta.url)
const startWorker = (workerData?: object): Worker => new Worker(program, { workerData, execArgv: [] })

/** A thread that does tasks, one at a time. */
class Hand {
  readonly worker: Worker = startWorker()

  run<T>(task: string, args: object): Promise<T> {
    return new Promise((resolve, reject) => {
      this.worker.once('error', reject)
      this.worker.once('message', ({ value, error }: { value: T; error?: string }) => {
        this.worker.off('error', reject)
        if (error === undefined) resolve(value)
        else reject(new Error(error))
      })
      this.worker.postMessage({ task, args })
    })
  }
}

let hands: Hand[] = []
beforeAll(() => {
  hands = [new Hand(), new Hand()]
})
afterAll(async () => {
  await Promise.all(hands.map(({ worker }) => worker.terminate()))
})

/** Text of 300 letters that does not shrink much. */
const next = randomOf(3) as Random
const letters = Buffer.from(Array.from({ length: 100_000 }, () => 33 + next(90))).toString('latin1')
const noise = (n: number): string => `${n} ${letters.slice((n * 7919) % 99_000, ((n * 7919) % 99_000) + 300)}`

const names = (count: number): string[] => Array.from({ length: count }, (_, n) => `key ${n}`)

describe('share and join', () => {
  test('what was in the cache is there for all, and what one thread sets the others get', async () => {
    const cache = new Cache<unknown>({ memory: '8MiB' })
    const large = 'large '.repeat(100_000)
    for (const key of names(2000)) cache.set(key, `value of ${key}`, { tags: ['all'] })
    cache.set('large', large)
    cache.set('object', { n: [1, new Date(2)] })
    cache.set('deleted', 1, { tags: ['gone'] })
    cache.deleteByTag('gone')
    const shared = cache.share()
    cache.check()
    expect(cache.stats()).toMatchObject({ entries: 2002, shared: { shards: 2 } })
    const keys = [...names(2000), 'large', 'object', 'deleted']
    const wanted = [...names(2000).map((key) => `value of ${key}`), large, { n: [1, new Date(2)] }, undefined]
    expect(cache.getMany(keys)).toEqual(wanted)
    expect(await hands[0]!.run('read', { shared, keys })).toEqual(wanted)
    cache.deleteByTag('all')
    expect(cache.get('key 1')).toBe(undefined)
    expect(await hands[1]!.run('read', { shared, keys: ['key 1', 'object'] })).toEqual([undefined, wanted[2001]])
    expect(cache.share()).toBe(shared)
    await cache.close()
    const again = Cache.join(shared)
    expect(again.get('large')).toBe(large)
    await again.close()
  })

  test('the limit counts all of it, and what is used stays', async () => {
    const cache = new Cache<string>({ memory: '4MiB' })
    cache.share()
    for (let n = 0; n < 40_000; n++) {
      cache.set(`key ${n}`, noise(n))
      cache.get(`key ${n % 100}`)
    }
    const { memoryBytes, limitBytes, evictions, entries } = cache.stats()
    expect(memoryBytes).toBeLessThanOrEqual(limitBytes)
    expect(limitBytes).toBeLessThanOrEqual(4 * 2 ** 20)
    expect(evictions.room).toBeGreaterThan(20_000)
    expect(entries).toBeGreaterThan(8000)
    expect(cache.getMany(names(100)).filter((value) => value !== undefined)).toHaveLength(100)
    cache.check()
    await cache.close()
  })

  test('expired values go before others', async () => {
    let now = 1e6
    const cache = new Cache<string>({ memory: '4MiB', clock: () => now })
    cache.share()
    for (let n = 0; n < 400; n++) cache.set(`ever ${n}`, noise(n))
    for (let n = 0; n < 20_000; n++) cache.set(`short ${n}`, noise(n), { ttl: 10 })
    const before = cache.getMany(Array.from({ length: 400 }, (_, n) => `ever ${n}`)).filter((one) => one !== undefined)
    now += 20
    const { evictions } = cache.stats()
    for (let n = 0; n < 2000; n++) cache.set(`new ${n}`, noise(n))
    expect(cache.stats().evictions.room).toBe(evictions.room)
    expect(
      cache.getMany(Array.from({ length: 400 }, (_, n) => `ever ${n}`)).filter((one) => one !== undefined),
    ).toEqual(before)
    expect(cache.tick(1e6)).toBe(false)
    cache.check()
    await cache.close()
  })

  test('a value that was set in another thread while it was loaded here is newer', async () => {
    const cache = new Cache<string>({ memory: '4MiB' })
    const shared = cache.share()
    const flags = new Int32Array(new SharedArrayBuffer(8))
    const load = hands[0]!.run('load', { shared, key: 'k', value: 'old', flags })
    expect(Atomics.wait(flags, 0, 0, 10_000)).not.toBe('timed-out')
    cache.set('k', 'new')
    Atomics.store(flags, 1, 1)
    Atomics.notify(flags, 1)
    expect(await load).toBe('old')
    expect(cache.get('k')).toBe('new')
    await cache.close()
  })

  test('the clock of a cache is that of all its threads, whenever they began', async () => {
    const ahead = 3_600_000
    const cache = new Cache<string>({ memory: '4MiB', clock: () => performance.timeOrigin + performance.now() + ahead })
    const shared = cache.share()
    // As in a thread that began before the clock of the system was set by an hour.
    cache.set('k', 'v', { ttl: ahead / 2 })
    cache.set('short', 'v', { ttl: 1 })
    await new Promise((resolve) => setTimeout(resolve, 5))
    expect(await hands[0]!.run('read', { shared, keys: ['k', 'short'] })).toEqual(['v', undefined])
    await cache.close()
  })

  test('what cannot be shared, or joined, is one error, and stays as it was', async () => {
    const limit = new ByteLimit(8 * 2 ** 20)
    const small = new Cache<string>({ memory: limit })
    small.set('k', 'v')
    limit.bytes = 2 ** 20
    expect(() => small.share()).toThrow(
      new RangeError('cache.share: memory is at least 2097152 bytes, the limit is 1048576 now'),
    )
    limit.bytes = 8 * 2 ** 20
    expect(small.get('k')).toBe('v')
    const stacked = new Cache({ stack: [zcache({ limitBytes: 2 ** 22 })] })
    expect(() => stacked.share()).toThrow(/a file or a stack is of one thread/)
    for (const none of [undefined, null, {}, 'cache', small])
      expect(() => Cache.join(none as unknown as SharedCache)).toThrow(/shared is what cache.share\(\) has given/)
    const shared = small.share()
    expect(() => Cache.join({ ...shared, process: 1 })).toThrow(/another process/)
    expect(() => Cache.join(shared, { memory: 1 } as object)).toThrow(/memory/)
    await expect(small.sync()).rejects.toThrow(/no place of this cache survives/)
    expect(small.set('large', 'x'.repeat(5 * 2 ** 20))).toBe(false)
    expect(small.stats().refused).toEqual({ 'too large': 1 })
    expect(small.get('k')).toBe('v')
    // A handle may be posted as often as one likes, also to this thread.
    const { port1, port2 } = new MessageChannel()
    const posted = new Promise<SharedCache>((resolve) => port2.once('message', resolve))
    port1.postMessage(shared)
    expect(Cache.join<string>(await posted).get('k')).toBe('v')
    port1.close()
    await Promise.all([small.close(), stacked.close()])
    expect(() => small.share()).toThrow(/closed/)
  })
})

test('in a browser a cache is of one thread, and says so', () => {
  const code = `
    delete globalThis.Buffer
    const { stdout } = process
    globalThis.process = undefined
    const { Cache } = await import(${JSON.stringify(new URL('../dist/index.js', import.meta.url))})
    const cache = new Cache({ memory: '4MiB' })
    cache.set('a', 'b')
    try {
      cache.share()
    } catch (error) {
      stdout.write([error.code, cache.get('a'), await cache.fetch('c', () => 'd')].join())
    }`
  const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', code], { encoding: 'utf8' })
  expect({ stdout, stderr }).toEqual({ stdout: 'TMEM_UNSUPPORTED,b,d', stderr: '' })
})

test.each([1, 2, 3])('from two threads it answers as a Map for each does, or has nothing (seed %i)', async (seed) => {
  const cache = new Cache<string>({ memory: '3MiB' })
  const shared = cache.share()
  const turns = 6000
  const done = await Promise.all(
    hands.map((hand, n) =>
      hand.run<{ wrong: string[]; hits: number; known: number }>('hammer', {
        shared,
        name: `thread ${n}`,
        seed: seed * 10 + n,
        turns,
      }),
    ),
  )
  for (const { wrong, hits, known } of done) {
    expect(wrong).toEqual([])
    expect(hits).toBeGreaterThan(500)
    expect(known).toBeGreaterThan(0)
  }
  cache.check()
  expect(cache.stats().shared).toMatchObject({ dropped: 0, takenOver: 0 })
  await cache.close()
})

describe('a thread that ends', () => {
  test('in a thousand places: nobody hangs, no value is torn, and what was lost is counted', {
    timeout: 120_000,
  }, () => {
    const cache = new Cache<string>({ memory: '3MiB' })
    const shared = cache.share()
    const random = randomOf(20) as Random
    const model = new Map<string, unknown>()
    const here = new Map<string, unknown>()
    const state = { turn: 0, cache: Cache.join<string>(shared), random, model, turnOf: turnOf as Turn }
    Object.assign(globalThis, { ended: state })
    // The model is told after the cache: at the end of a thread nothing is known of its last key.
    const script = new Script(
      `for (;;) { ended.turn++; ended.turnOf(ended.cache, ended.random, 'ended', ended.turn, ended.model) }`,
    )
    const ends = new Map<unknown, number>()
    for (let n = 0; n < 1000; n++) {
      // Otherwise all ends would be as far from the beginning of a turn.
      for (let wait = random(20_000); wait > 0; wait--) Math.sqrt(wait)
      try {
        script.runInThisContext({ timeout: 1 })
      } catch (error) {
        const { code } = error as NodeJS.ErrnoException
        ends.set(code, (ends.get(code) ?? 0) + 1)
      }
      model.clear()
      state.cache.deleteByTag('ended')
      if (n % 25 === 0) cache.check()
      expect((turnOf as Turn)(cache, random, 'here', n, here)).toEqual([])
    }
    expect(ends).toEqual(new Map([['ERR_SCRIPT_EXECUTION_TIMEOUT', 1000]]))
    cache.check()
    const { shared: counted } = cache.stats()
    expect(counted!.takenOver).toBeGreaterThan(100)
    expect(counted!.dropped).toBeGreaterThan(10)
    expect(counted!.dropped).toBeLessThanOrEqual(counted!.takenOver)
    // And it is of use.
    cache.set('afterwards', 'kept')
    expect(cache.get('afterwards')).toBe('kept')
    Reflect.deleteProperty(globalThis, 'ended')
  })

  test('as a whole: its locks are taken over by those that it leaves waiting', { timeout: 240_000 }, async () => {
    const kills = Number(process.env['TMEM_KILLS'] ?? 40)
    const cache = new Cache<string>({ memory: '3MiB' })
    const shared = cache.share()
    const random = randomOf(7) as Random
    const model = new Map<string, unknown>()
    let turn = 0
    for (let killed = 0; killed < kills; killed += 4) {
      const started = Array.from({ length: 4 }, () => new Int32Array(new SharedArrayBuffer(4)))
      const workers = started.map((word, n) =>
        startWorker({ forever: { shared, name: `killed ${killed + n}`, seed: killed + n, started: word } }),
      )
      // The thread that starts workers must not sleep while they load.
      for (const word of started)
        while (Atomics.load(word, 0) === 0) await new Promise((resolve) => setTimeout(resolve, 1))
      for (const worker of workers) {
        // Meanwhile the lock is one of theirs: a thread that comes back for it at once would have it nearly always.
        await new Promise((resolve) => setTimeout(resolve, 1 + random(4)))
        void worker.terminate()
        for (let n = 0; n < 100; n++) expect((turnOf as Turn)(cache, random, 'main', ++turn, model)).toEqual([])
      }
      await Promise.all(workers.map((worker) => worker.terminate()))
      cache.check()
    }
    const { shared: counted } = cache.stats()
    expect(counted!.takenOver).toBeGreaterThan(kills / 10)
    await cache.close()
  })

  test('out of stack: the thread says so, and goes on, and so do others', async () => {
    const cache = new Cache<string>({ memory: '3MiB' })
    const shared = cache.share()
    expect(await hands[0]!.run<number>('overflow', { shared })).toBeGreaterThan(10)
    for (const key of names(200)) expect(cache.set(key, key)).toBe(true)
    expect(await hands[0]!.run('read', { shared, keys: names(200) })).toEqual(names(200))
    cache.check()
    await cache.close()
  })

  test.each(['task', 'descriptor'] as const)('is known by its mark (%s)', async (kind) => {
    const here = threadMark(kind)
    expect(here.isAlive(here.mark)).toBe(true)
    const words = new Int32Array(new SharedArrayBuffer(lockWords * 8))
    const worker = new Worker(
      `import { parentPort, workerData } from 'node:worker_threads'
       import { Locks, threadMark } from ${JSON.stringify(new URL('../dist/locks.js', import.meta.url))}
       const mark = threadMark(workerData.kind)
       const locks = new Locks(workerData.words, mark)
       locks.enter(0)
       locks.begin(0)
       locks.enter(1)
       parentPort.postMessage(mark.mark)
       setInterval(() => {}, 1000)`,
      { eval: true, workerData: { kind, words }, execArgv: ['--input-type=module'] },
    )
    const mark = await new Promise<number>((resolve, reject) => {
      worker.once('message', resolve)
      worker.once('error', reject)
    })
    expect(mark).not.toBe(here.mark)
    expect(here.isAlive(mark)).toBe(true)
    await worker.terminate()
    const locks = new Locks(words, here)
    // It ended in the middle of a change of one, and of none of the other.
    expect(locks.enter(0)).toBe(true)
    expect(locks.enter(1)).toBe(false)
    expect([locks.takenOver(0), locks.takenOver(1)]).toEqual([1, 1])
    expect(here.isAlive(mark)).toBe(false)
    locks.end(0)
    locks.leave(0)
    locks.leave(1)
    expect(locks.enter(0)).toBe(false)
    locks.leave(0)
    locks.close()
  })
})
