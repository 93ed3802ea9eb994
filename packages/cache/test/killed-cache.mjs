// Fills a cache over the file that is named, syncs it, says so, and goes on writing until it is killed.
import { Cache } from '@tmem/cache'

const cache = new Cache({ memory: '6MiB', file: { path: process.argv[2], size: '16MiB' }, clock: () => 1e6 })
await cache.ready()
for (let n = 0; n < 1000; n++) cache.set(`key ${n}`, `value ${n} `.repeat(1 + (n % 60)))
await cache.sync()
process.send('synced')
for (let n = 0; ; n++) {
  cache.set(`key ${n % 20}`, `later ${n % 20}`)
  if (n % 100 === 0) await new Promise((resolve) => setTimeout(resolve, 1))
}
