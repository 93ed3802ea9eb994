/**
 * A process of `tmem bench cache` that holds records: `cache-worker.js WHAT KIND RECORDS BYTES`, with `--expose-gc`.
 *
 * WHAT is `hold`: how much memory it takes; or `stall`: how long the event loop stands while the program makes garbage.
 * KIND is `tmem`, `lru`, or `empty`, which makes the records and keeps none. BYTES is the memory of a `tmem`. One line
 * of JSON is the answer.
 */
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setImmediate } from 'node:timers/promises'
import { Cache } from '@tmem/cache'
import { LRUCache } from 'lru-cache'
import { keyOf, Records } from './cache-records.ts'

const [what, kind, count, bytes] = process.argv.slice(2) as [string, string, string, string]
const records = new Records()
const number = Number(count)
const collect = (): void => {
  globalThis.gc!()
  globalThis.gc!()
}

const cache = kind === 'tmem' ? new Cache<string>({ memory: Number(bytes) }) : undefined
const lru = kind === 'lru' ? new LRUCache<string, string>({ max: number }) : undefined
let heapHalfway = 0
for (let n = 0; n < number; n++) {
  if (n === number >>> 1) {
    collect()
    heapHalfway = process.memoryUsage().heapUsed
  }
  const value = JSON.stringify(records.at(n))
  cache?.set(keyOf(n), value)
  lru?.set(keyOf(n), value)
}
collect()
const entries = cache?.stats().entries ?? lru?.size ?? 0
if (what === 'hold') {
  const { rss, heapUsed } = process.memoryUsage()
  console.log(JSON.stringify({ rss, heap: heapUsed - heapHalfway, entries }))
} else {
  const delay = monitorEventLoopDelay({ resolution: 1 })
  delay.enable()
  const until = performance.now() + 5000
  // What a server makes: objects that are gone with the request, and some that live a little longer.
  const lately: unknown[] = []
  for (let n = 0; performance.now() < until; n++) {
    const until = performance.now() + 0.5
    while (performance.now() < until) lately[n % 50_000] = JSON.parse(JSON.stringify(records.at(n++)))
    await setImmediate()
  }
  delay.disable()
  console.log(JSON.stringify({ longest: delay.max / 1e6, p999: delay.percentile(99.9) / 1e6, entries }))
}
await cache?.close()
