/**
 * A worker thread of `tmem bench cache`: works in a cache that it shares with others, or holds records of its own.
 *
 * It reports when its records are ready, and then runs rounds on request and reports their start and end.
 */
import { parentPort, workerData } from 'node:worker_threads'
import { Cache, type SharedCache } from '@tmem/cache'
import { LRUCache } from 'lru-cache'
import { keyOf, Records, randomOf, type StoredRecord, zipfOf } from './cache-records.ts'
import type { Times } from './threads-worker.ts'

/** What a worker thread is given at its start. */
export interface CacheThreadData {
  /** A cache with all records; without one the thread holds them itself, in an lru-cache, or holds none. */
  readonly shared?: SharedCache
  readonly holds: boolean
  readonly records: number
  /** One word: a round begins when it reaches the number of the round. */
  readonly start?: Int32Array
}

/** One round: gets, and a set for every ten of them. The thread answers when it is ready, and again when it is done. */
export interface CacheRound {
  readonly number: number
  readonly operations: number
}

/** Longest wait for the start of a round, in milliseconds. */
const patience = 60_000

const { shared, holds, records: count, start } = workerData as CacheThreadData
const records = new Records()
const lru = holds && shared === undefined ? new LRUCache<string, string>({ max: count }) : undefined
for (let n = 0; lru !== undefined && n < count; n++) lru.set(keyOf(n), JSON.stringify(records.at(n)))
const cache =
  shared === undefined
    ? undefined
    : Cache.join<StoredRecord>(shared, { codec: { encode: JSON.stringify, decode: JSON.parse } })
// All of them read as much, so that what a thread takes for its own work is the same.
for (let n = 0; n < 10_000; n++) {
  const key = keyOf(n % count)
  if (cache === undefined) JSON.parse(lru?.get(key) ?? JSON.stringify(records.at(n % count)))
  else cache.get(key)
}

parentPort!.on('message', ({ number, operations }: CacheRound) => {
  const next = zipfOf(count, randomOf(number))
  const asked = Array.from({ length: operations }, () => next())
  parentPort!.postMessage('ready')
  for (let before = Atomics.load(start!, 0); before < number; before = Atomics.load(start!, 0))
    if (Atomics.wait(start!, 0, before, patience) === 'timed-out') throw new Error(`round ${number} did not begin`)
  const begun = Number(process.hrtime.bigint())
  let missing = 0
  for (const [n, record] of asked.entries()) {
    const key = keyOf(record)
    if (n % 11 === 10) cache!.set(key, records.at(record))
    else if (cache!.get(key) === undefined) missing++
  }
  const ended = Number(process.hrtime.bigint())
  // Two of a hundred thousand keys may have one hash.
  if (missing > operations / 100) throw new Error(`${missing} of ${operations} records are not there`)
  parentPort!.postMessage({ begun, ended } satisfies Times)
})
// The records are held as long as the thread is there: what nobody refers to the collector would take away.
parentPort!.once('close', () => lru?.clear())
globalThis.gc?.()
parentPort!.postMessage(lru?.size ?? 0)
