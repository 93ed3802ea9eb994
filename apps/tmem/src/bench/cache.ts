/**
 * `tmem bench cache`: a cache of compressed values against those that people use: lru-cache, lmdb on tmpfs, Redis.
 *
 * Values are JSON records of 100 to 2,000 bytes out of real files (`cache-records.ts`), keys are asked for by a Zipf
 * distribution of exponent 0.9. What takes time is measured in turns. Memory is that of processes of their own, less
 * that of one that makes the same records and keeps none. Misses are counted where both have the same resident memory:
 * what an entry of lru-cache takes was measured in the same run.
 */
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { Cache } from '@tmem/cache'
import { KeyvStore } from '@tmem/cache/keyv'
import Keyv from 'keyv'
import { LRUCache } from 'lru-cache'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { lackingServer, serverCommands } from '../lending-server.ts'
import { keyOf, Records, randomOf, type StoredRecord, zipfOf } from './cache-records.ts'
import type { CacheRound, CacheThreadData } from './cache-thread.ts'
import { type Bench, median, type Row, ratioRow, type Suite, skippedRow, valueRow } from './frame.ts'
import { roundOf, Thread } from './threads.ts'

/** The suite. */
export const cache: Suite = {
  name: 'cache',
  summary: 'values in compressed memory, against lru-cache, lmdb and Redis',
  run: async (bench) => {
    const records = new Records()
    const held = await heldRows(bench)
    return [
      ...(await timeRows(bench, records)),
      ...held.rows,
      ...(await missRows(bench, records, held.lruBytes)),
      ...(await stallRows(bench, records)),
      await fetchRow(),
      await twoThreadsRow(bench, records),
      await fourThreadsRow(bench),
      ...(await keyvRows(bench, records)),
    ]
  },
}

const json = { encode: JSON.stringify, decode: JSON.parse } as const

// ---- Times --------------------------------------------------------------------------------------------------------

async function timeRows(bench: Bench, records: Records): Promise<Row[]> {
  const rows: Row[] = []
  for (const [name, count] of bench.quick
    ? ([['20k', 20_000]] as const)
    : ([
        ['200k', 200_000],
        ['1m', 1_000_000],
      ] as const))
    rows.push(...(await timesOf(bench, records, name, count)))
  return rows
}

async function timesOf(bench: Bench, records: Records, name: string, count: number): Promise<Row[]> {
  const folder = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'tmem-bench-cache-'))
  const memory = Math.max(8 * 2 ** 20, count * 1024)
  const ours = new Cache<StoredRecord>({ memory, codec: json })
  const texts = new Cache<string>({ memory })
  const lmdb = await import('lmdb').catch((error: unknown) => {
    // Optional: it is a native module.
    if ((error as NodeJS.ErrnoException).code === 'ERR_MODULE_NOT_FOUND') return undefined
    throw error
  })
  const theirs = lmdb?.open<StoredRecord, string>({
    path: join(folder, 'json'),
    encoding: 'json',
    mapSize: count * 8192,
  })
  const theirTexts = lmdb?.open<string, string>({
    path: join(folder, 'text'),
    encoding: 'string',
    mapSize: count * 8192,
  })
  try {
    const progress = bench.progress(`${name} records`)
    try {
      for (let n = 0; n < count; n++) {
        const record = records.at(n)
        ours.set(keyOf(n), record)
        void theirs?.put(keyOf(n), record)
        if (n % 1000 !== 999) continue
        await theirs?.flushed
        progress.at(n + 1, count)
        throwIfInterrupted(bench.signal)
      }
      progress.done()
    } finally {
      progress.end()
    }
    await theirs?.flushed
    const rows: Row[] = []
    const next = zipfOf(count, randomOf(1))
    const operations = bench.quick ? 5000 : 20_000
    let keys: string[] = []
    // Each has keys of its own in each round: whoever comes second would find them, and its own pages, in the caches of
    // the processor. The set makes one piece of each key, which is two when it is made, so that nobody has to.
    const pick = (): void => {
      keys = Array.from({ length: operations }, () => keyOf(next()))
      new Set(keys)
    }
    // Two of a hundred thousand keys may have one hash.
    let [found, missing] = [0, 0]
    const check = (value: StoredRecord | undefined): void => {
      if (typeof value?.id === 'number') found++
      else if (++missing > 100 + found / 100) throw new Failed(`bench cache: ${missing} records are missing`)
    }
    const get = {
      prepare: pick,
      run: () =>
        keys.forEach((key) => {
          check(ours.get(key))
        }),
    }
    if (theirs === undefined || theirTexts === undefined)
      rows.push(skippedRow(`get-${name}`, 'lmdb is not installed'), skippedRow(`set-${name}`, 'lmdb is not installed'))
    else {
      const got = await bench.measure(
        `get ${name}`,
        {
          ours: get,
          lmdb: {
            prepare: pick,
            run: () =>
              keys.forEach((key) => {
                check(theirs.get(key))
              }),
          },
        },
        { operations },
      )
      rows.push(ratioRow(`get-${name}`, 'ns', got.ours, 'lmdb', got.lmdb, 1))
      let values: string[] = []
      const pickBoth = (): void => {
        pick()
        values = keys.map((key) => JSON.stringify(records.at(Number(key.slice(7)))))
      }
      const set = await bench.measure(
        `set ${name}`,
        {
          ours: {
            prepare: pickBoth,
            run: () => keys.forEach((key, n) => void texts.set(key, values[n]!)),
          },
          lmdb: {
            prepare: pickBoth,
            run: async () => {
              for (const [n, key] of keys.entries()) void theirTexts.put(key, values[n]!)
              await theirTexts.flushed
            },
          },
        },
        { operations },
      )
      rows.push(ratioRow(`set-${name}`, 'ns', set.ours, 'lmdb', set.lmdb, 0.5))
    }
    const redis = await startRedis(folder)
    if (redis === undefined) rows.push(skippedRow(`get-${name}-redis`, lackingServer))
    else {
      try {
        for (let n = 0; n < count; n++) redis.send(['SET', keyOf(n), JSON.stringify(records.at(n))])
        await redis.answers(count)
        const got = await bench.measure(
          `get ${name}, Redis`,
          {
            ours: get,
            redis: {
              prepare: pick,
              run: async () => {
                for (const key of keys) {
                  redis.send(['GET', key])
                  check(JSON.parse(await redis.answer()) as StoredRecord)
                }
              },
            },
          },
          { operations },
        )
        rows.push(ratioRow(`get-${name}-redis`, 'ns', got.ours, 'redis', got.redis, 0.06))
      } finally {
        await redis.end()
      }
    }
    return rows
  } finally {
    await theirs?.close()
    await theirTexts?.close()
    await ours.close()
    await texts.close()
    rmSync(folder, { recursive: true })
  }
}

/** A Redis of our own on a unix socket, spoken to one at a time; `undefined`: no program for it is there. */
async function startRedis(folder: string): Promise<Redis | undefined> {
  const as = { argv0: 'redis-server', stdio: 'ignore' } as const
  const command = serverCommands.find((name) => spawnSync(name, ['--version'], as).error === undefined)
  if (command === undefined) return undefined
  const path = join(folder, 'redis.sock')
  const options = ['--port', '0', '--unixsocket', path, '--save', '', '--appendonly', 'no', '--dir', folder]
  const child = spawn(command, options, as)
  for (let tries = 0; !existsSync(path); tries++) {
    if (tries === 500 || child.exitCode !== null) throw new Failed(`bench cache: ${command} did not start`)
    await setTimeout(10)
  }
  const socket = connect(path)
  await new Promise((resolve, reject) => socket.once('connect', resolve).once('error', reject))
  const ended = new Promise((resolve) => child.once('exit', resolve))
  return new Redis(socket, async () => {
    child.kill()
    await ended
  })
}

/** The protocol of Redis, as far as it is needed here: simple answers, and strings in bytes. */
class Redis {
  readonly #socket: Socket
  readonly #stop: () => Promise<void>
  #bytes: Buffer = Buffer.alloc(0)
  #wake: (() => void) | undefined

  constructor(socket: Socket, stop: () => Promise<void>) {
    this.#socket = socket
    this.#stop = stop
    socket.on('data', (more) => {
      this.#bytes = this.#bytes.length === 0 ? more : Buffer.concat([this.#bytes, more])
      this.#wake?.()
    })
  }

  send(words: readonly string[]): void {
    this.#socket.write(
      `*${words.length}\r\n${words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join('')}`,
    )
  }

  async answers(count: number): Promise<void> {
    for (let n = 0; n < count; n++) await this.answer()
  }

  async answer(): Promise<string> {
    for (;;) {
      const end = this.#bytes.indexOf('\r\n')
      if (end >= 0) {
        const line = this.#bytes.toString('latin1', 0, end)
        if (!line.startsWith('$')) return this.#take(0, end, end + 2)
        const length = Number(line.slice(1))
        if (this.#bytes.length >= end + 2 + length + 2) return this.#take(end + 2, end + 2 + length, end + 4 + length)
      }
      await new Promise<void>((resolve) => {
        this.#wake = resolve
      })
      this.#wake = undefined
    }
  }

  async end(): Promise<void> {
    this.#socket.destroy()
    await this.#stop()
  }

  #take(from: number, to: number, next: number): string {
    const text = this.#bytes.toString('utf8', from, to)
    this.#bytes = this.#bytes.subarray(next)
    return text
  }
}

// ---- Memory -------------------------------------------------------------------------------------------------------

/** What a process with records says. */
async function worker<Answer>(what: string, kind: string, records: number, bytes: number): Promise<Answer> {
  const path = fileURLToPath(new URL('./cache-worker.js', import.meta.url))
  // Five threads with room for garbage of their own would drown what they hold.
  const flags = what === 'threads' ? ['--max-semi-space-size=1'] : []
  const words = ['--expose-gc', '--max-old-space-size=12288', ...flags, path, what, kind, `${records}`, `${bytes}`]
  const child = spawn(process.execPath, words, { stdio: ['ignore', 'pipe', 'inherit'] })
  let text = ''
  child.stdout.on('data', (more: Buffer) => {
    text += more.toString()
  })
  const code = await new Promise((resolve) => child.once('close', resolve))
  if (code !== 0) throw new Failed(`bench cache: the process that holds records (${kind}) ended with ${String(code)}`)
  return JSON.parse(text) as Answer
}

interface Held {
  readonly rss: number
  readonly heap: number
  readonly entries: number
}

async function heldRows(bench: Bench): Promise<{ readonly rows: Row[]; readonly lruBytes: number }> {
  // Of fewer, what the program itself takes from one moment to the next would be a good part.
  const count = bench.quick ? 100_000 : 1_000_000
  const progress = bench.progress('memory')
  try {
    const [empty, tmem, lru] = [
      await worker<Held>('hold', 'empty', count, 0),
      await worker<Held>('hold', 'tmem', count, Math.max(8 * 2 ** 20, count * 768)),
      await worker<Held>('hold', 'lru', count, 0),
    ]
    // Two of a hundred thousand keys may have one hash.
    if (tmem.entries < count * 0.999) throw new Failed(`bench cache: ${tmem.entries} of ${count} records are there`)
    progress.done()
    const lruBytes = (lru.rss - empty.rss) / count
    return {
      rows: [
        ratioRow('resident', 'bytes/entry', (tmem.rss - empty.rss) / count, 'lru-cache', lruBytes, 0.5),
        valueRow('heap', 'bytes/entry', Math.max(0, tmem.heap - empty.heap), 0.1),
      ],
      lruBytes,
    }
  } finally {
    progress.end()
  }
}

/** Resident memory for each record that four threads have: out of one cache, or each in an lru-cache of its own. */
async function fourThreadsRow(bench: Bench): Promise<Row> {
  const count = bench.quick ? 20_000 : 200_000
  const progress = bench.progress('memory of four threads')
  try {
    const empty = await worker<Held>('threads', 'empty', count, 0)
    const tmem = await worker<Held>('threads', 'tmem', count, Math.max(12 * 2 ** 20, count * 512))
    const lru = await worker<Held>('threads', 'lru', count, 0)
    if (tmem.entries < count * 0.999) throw new Failed(`bench cache: ${tmem.entries} of ${count} records are there`)
    const [ours, theirs] = [(tmem.rss - empty.rss) / count, (lru.rss - empty.rss) / count]
    return ratioRow('four-threads-resident', 'bytes/entry', ours, 'four lru-caches', theirs, 0.15)
  } finally {
    progress.end()
  }
}

// ---- Two threads --------------------------------------------------------------------------------------------------

/** Gets, and a set for every ten, of JSON records: with two threads on one cache an operation costs half at best. */
async function twoThreadsRow(bench: Bench, records: Records): Promise<Row> {
  const count = bench.quick ? 20_000 : 200_000
  const operations = bench.quick ? 5000 : 20_000
  const shared = new Cache<StoredRecord>({ memory: Math.max(8 * 2 ** 20, count * 1024), codec: json })
  const handle = shared.share()
  for (let n = 0; n < count; n++) shared.set(keyOf(n), records.at(n))
  const start = new Int32Array(new SharedArrayBuffer(4))
  const data: CacheThreadData = { shared: handle, holds: true, records: count, start }
  const threads = [1, 2].map(() => new Thread('./cache-thread.js', data))
  const progress = bench.progress('two threads')
  const taken: { readonly one: number[]; readonly two: number[] } = { one: [], two: [] }
  try {
    await Promise.all(threads.map((thread) => thread.next()))
    const rounds = bench.quick ? 4 : 16
    const warmup = bench.quick ? 1 : 5
    let number = 0
    const round = async (kind: 'one' | 'two', working: readonly Thread[], counts: boolean): Promise<void> => {
      throwIfInterrupted(bench.signal)
      const ns = await roundOf(working, start, { number: ++number, operations } satisfies CacheRound)
      if (counts) taken[kind].push(ns / (operations * working.length))
    }
    for (let turn = 0; turn < warmup + rounds; turn++) {
      await round('one', [threads[turn % 2]!], turn >= warmup)
      await round('two', threads, turn >= warmup)
      progress.at(turn + 1, warmup + rounds)
    }
  } finally {
    progress.end()
    await Promise.all(threads.map((thread) => thread.end()))
    await shared.close()
  }
  return ratioRow('two-threads', 'ns', median(taken.two), 'one thread', median(taken.one), 1 / 1.7)
}

// ---- Misses -------------------------------------------------------------------------------------------------------

async function missRows(bench: Bench, records: Records, lruBytes: number): Promise<Row[]> {
  const count = bench.quick ? 100_000 : 200_000
  return [
    await missesOf(bench, records, 'misses-zipf', count, lruBytes, 0),
    await missesOf(bench, records, 'misses-scans', count, lruBytes, 1),
  ]
}

/**
 * Gets what is asked for, and sets what was missed. `scanned`: records of each of ten scans, in caches of lru-cache.
 */
async function missesOf(
  bench: Bench,
  records: Records,
  name: string,
  count: number,
  lruBytes: number,
  scanned: number,
): Promise<Row> {
  const entries = count / 10
  const length = count * 5
  const ours = new Cache<string>({ memory: Math.round(entries * lruBytes) })
  const theirs = new LRUCache<string, number>({ max: entries })
  const next = zipfOf(count, randomOf(2))
  const progress = bench.progress(name)
  let [missed, lruMissed, asked] = [0, 0, 0]
  const ask = (n: number): void => {
    const key = keyOf(n)
    asked++
    if (ours.get(key) === undefined) {
      missed++
      ours.set(key, JSON.stringify(records.at(n)))
    }
    if (theirs.get(key) !== undefined) return
    lruMissed++
    theirs.set(key, 1)
  }
  try {
    for (let n = 0; n < length; n++) {
      ask(next())
      // What is scanned nobody else asks for.
      if (scanned > 0 && n % (length / 10) === length / 20)
        for (let at = 0; at < scanned * entries; at++) ask(count + ((n + at) % (count * 4)))
      if (n % 10_000 !== 0) continue
      progress.at(n, length)
      await setTimeout(0)
      throwIfInterrupted(bench.signal)
    }
    progress.done()
  } finally {
    progress.end()
    await ours.close()
  }
  return ratioRow(name, '% of gets', (missed * 100) / asked, 'lru-cache', (lruMissed * 100) / asked, 0.7)
}

// ---- The event loop -----------------------------------------------------------------------------------------------

interface Stalls {
  readonly longest: number
  readonly p999: number
  readonly entries: number
}

async function stallRows(bench: Bench, records: Records): Promise<Row[]> {
  const sample = 10_000
  let bytes = 0
  for (let n = 0; n < sample; n++) bytes += JSON.stringify(records.at(n)).length
  // A GiB of values.
  const count = bench.quick ? 20_000 : Math.ceil((2 ** 30 * sample) / bytes)
  const progress = bench.progress('stalls')
  try {
    const empty = await worker<Stalls>('stall', 'empty', count, 0)
    const tmem = await worker<Stalls>('stall', 'tmem', count, Math.max(8 * 2 ** 20, count * 1024))
    const lru = await worker<Stalls>('stall', 'lru', count, 0)
    for (const { entries } of [tmem, lru])
      if (entries < count * 0.999) throw new Failed(`bench cache: ${entries} of ${count} records are there`)
    progress.done()
    return [
      ratioRow('stall-longest', 'ms', tmem.longest, 'lru-cache', lru.longest, 0.25),
      ratioRow('stall-p99.9', 'ms', tmem.p999, 'lru-cache', lru.p999, 0.25),
      // What a cache cannot spare it: the same program, which holds nothing.
      valueRow('stall-longest-empty', 'ms', empty.longest),
      valueRow('stall-p99.9-empty', 'ms', empty.p999),
    ]
  } finally {
    progress.end()
  }
}

/** What the driver costs, beside a `Map` of what keyv serialised: for who chooses, without a goal. */
async function keyvRows(bench: Bench, records: Records): Promise<Row[]> {
  const memory = new Cache({ memory: '32MiB' })
  const [ours, theirs] = [new Keyv(new KeyvStore(memory)), new Keyv()]
  const operations = 2000
  const all = (use: (key: string, n: number) => Promise<unknown>) => async (): Promise<void> => {
    for (let n = 0; n < operations; n++) await use(keyOf(n), n)
  }
  const set = await bench.measure(
    'keyv set',
    {
      ours: { run: all((key, n) => ours.set(key, records.at(n))) },
      map: { run: all((key, n) => theirs.set(key, records.at(n))) },
    },
    { operations },
  )
  const get = await bench.measure(
    'keyv get',
    { ours: { run: all((key) => ours.get(key)) }, map: { run: all((key) => theirs.get(key)) } },
    { operations },
  )
  await memory.close()
  return [
    ratioRow('keyv-get', 'ns', get.ours, 'keyv over a Map', get.map),
    ratioRow('keyv-set', 'ns', set.ours, 'keyv over a Map', set.map),
  ]
}

async function fetchRow(): Promise<Row> {
  const one = new Cache<string>({ memory: '2MiB' })
  let calls = 0
  const loader = async (): Promise<string> => {
    calls++
    await setTimeout(1)
    return 'loaded'
  }
  await Promise.all(Array.from({ length: 1000 }, () => one.fetch('key', loader)))
  await one.close()
  return valueRow('fetch-1000-callers', 'loader calls', calls, 1)
}
