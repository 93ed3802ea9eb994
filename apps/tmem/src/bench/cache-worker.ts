/**
 * A process of `tmem bench cache` that holds records: `cache-worker.js WHAT KIND RECORDS BYTES`, with `--expose-gc`.
 *
 * WHAT is `hold`: how much memory it takes; `threads`: the same in four threads, which share a `tmem`, and have an
 * `lru` each; or `stall`: how long the event loop stands while the program makes garbage.
 * KIND is `tmem`, `lru`, or `empty`, which makes the records and keeps none. BYTES is the memory of a `tmem`. One line
 * of JSON is the answer.
 */
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setImmediate } from 'node:timers/promises'
import { Cache } from '@tmem/cache'
import { LRUCache } from 'lru-cache'
import { keyOf, Records } from './cache-records.ts'
import type { CacheThreadData } from './cache-thread.ts'
import { median } from './frame.ts'
import { Thread } from './threads.ts'

const [what, kind, count, bytes] = process.argv.slice(2) as [string, string, string, string]
const records = new Records()
const number = Number(count)
const collect = (): void => {
  globalThis.gc!()
  globalThis.gc!()
}

const cache = kind === 'tmem' ? new Cache<string>({ memory: Number(bytes) }) : undefined
const isThreads = what === 'threads'
const lru = kind === 'lru' && !isThreads ? new LRUCache<string, string>({ max: number }) : undefined
const shared = isThreads ? cache?.share() : undefined
/** Parts in which the growth of the heap is looked at; the first half is left out. */
const parts = 10
const heaps: number[] = []
for (let n = 0; n < number; n++) {
  if (what === 'hold' && n % (number / parts) === 0) {
    collect()
    heaps.push(process.memoryUsage().heapUsed)
  }
  const value = JSON.stringify(records.at(n))
  cache?.set(keyOf(n), value)
  lru?.set(keyOf(n), value)
}
collect()
const entries = cache?.stats().entries ?? lru?.size ?? 0
if (isThreads) {
  const data: CacheThreadData = {
    ...(shared === undefined ? {} : { shared }),
    holds: kind !== 'empty',
    records: number,
  }
  const threads = Array.from({ length: 4 }, () => new Thread('./cache-thread.js', data))
  for (const thread of threads) await thread.next()
  collect()
  console.log(JSON.stringify({ rss: process.memoryUsage().rss, heap: 0, entries }))
  await Promise.all(threads.map((thread) => thread.end()))
} else if (what === 'hold') {
  const { rss } = process.memoryUsage()
  // Code is compiled, and thrown away, in single steps of up to 100 KB; what entries take they take in every part.
  const grown = heaps.slice(1).map((heap, part) => (heap - heaps[part]!) / (number / parts))
  console.log(JSON.stringify({ rss, heap: median(grown.slice(parts / 2)), entries }))
} else {
  const delay = monitorEventLoopDelay({ resolution: 1 })
  delay.enable()
  const until = performance.now() + 5000
  // What a server makes: objects that are gone with the request, and some that live a little longer. Were all of them
  // to live as long, collecting the program's own would be all that is seen: then a cache is as good as none.
  const lately: unknown[] = []
  for (let n = 0; performance.now() < until; ) {
    const pause = performance.now() + 0.5
    for (; performance.now() < pause; n++) {
      const made: unknown = JSON.parse(JSON.stringify(records.at(n)))
      if (n % 16 === 0) lately[(n / 16) % 5000] = made
    }
    await setImmediate()
  }
  delay.disable()
  // Asked only now: what nobody asks any more, the collector takes away at once, with all that it holds.
  const held = cache?.stats().entries ?? lru?.size ?? 0
  console.log(JSON.stringify({ longest: delay.max / 1e6, p999: delay.percentile(99.9) / 1e6, entries: held }))
}
await cache?.close()
