/**
 * A process whose zcache takes all the memory it may have, under the governor, until its standard input ends. Prints
 * one JSON line per step: budget and use in bytes. Started by cgroup.test.ts inside of a control group with a limit.
 */
import { readFileSync } from 'node:fs'
import { ByteLimit, compose } from '@tmem/core'
import { mappedAllocator } from '@tmem/memory'
import { Governor, readHostMemory, zcache } from '@tmem/zcache'

const MiB = 2 ** 20
const read = (path) => {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return undefined
  }
}
const limitBytes = new ByteLimit(1024 * MiB)
const governor = new Governor({
  limit: limitBytes,
  floorBytes: 8 * MiB,
  reserveBytes: 96 * MiB,
  growBytesPerSecond: 64 * MiB,
  holdMs: 3000,
})
const allocator = mappedAllocator()
if (allocator.lacks !== undefined) console.error(allocator.lacks)
const store = compose([zcache({ limitBytes })], { allocator })
const pool = store.newPool({ client: 0, persistent: false, shared: true, pageSize: 4096 })
const page = new Uint8Array(4096)
const start = performance.now()
let index = 0
let isOver = false
process.stdin.resume().once('end', () => {
  isOver = true
})
while (!isOver) {
  const ms = performance.now() - start
  const { counters } = store.stats().children.find(({ name }) => name === 'zcache')
  governor.step(ms, counters.used_bytes, readHostMemory(read))
  while (store.tick({ pages: 256 }).pending);
  for (let i = 0; i < 2000; i++) {
    // Noise: it fills the pool without compressing.
    for (let at = 0; at < 4096; at += 64) page[at] = Math.imul(index + at, 0x9e3779b1) >>> 13
    crypto.getRandomValues(page.subarray(0, 3000))
    pool.put(0, index++, page)
  }
  console.log(JSON.stringify({ budget: limitBytes.bytes, used: counters.used_bytes }))
  await new Promise((resolve) => setTimeout(resolve, 50))
}
await store.close()
