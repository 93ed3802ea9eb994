/**
 * Chunks over mapped memory: in a file, and so a process, of its own, because it looks at what the whole process has.
 */
import { type Allocator, GetOutcome, PutOutcome } from '@tmem/core'
import { mappedAllocator } from '@tmem/memory'
import { expect, test } from 'vitest'
import { MiB, newPool, noisyPage, open, settle } from './pages.ts'

const { Stored } = PutOutcome
const { Hit } = GetOutcome

test('with mapped memory what goes is the system’s at once, and all of it at the end', async (ctx) => {
  const { lacks, ...mapped } = mappedAllocator()
  if (mapped.free === undefined) ctx.skip(`needs mapped memory: ${lacks}`)
  const given = new Set<ArrayBufferLike>()
  const allocator: Allocator = {
    allocate(bytes, site) {
      const chunk = mapped.allocate(bytes, site)
      if (chunk !== undefined && site === 'zcache.chunk') given.add(chunk)
      return chunk
    },
    free(chunk, site) {
      expect(given.delete(chunk)).toBe(true)
      mapped.free!(chunk, site)
    },
  }
  const stack = open({ limitBytes: 64 * MiB }, { allocator })
  const pool = newPool(stack, 'swap')
  const page = noisyPage(1, 1)
  const fill = (): void => {
    for (let i = 0; i < 14_000; i++) {
      new DataView(page.buffer).setUint32(0, i)
      expect(pool.put(0, i, page)).toBe(Stored)
    }
  }
  // Once for the runtime, which takes memory of its own for what runs often: by version 10 to 25 MiB.
  fill()
  pool.flushObject(0)
  settle(stack)
  const before = process.memoryUsage.rss()
  fill()
  expect(process.memoryUsage.rss() - before).toBeGreaterThan(40 * MiB)
  for (let i = 0; i < 14_000; i++) if (i % 20 !== 0) pool.flushPage(0, i)
  settle(stack)
  expect(process.memoryUsage.rss() - before).toBeLessThan(10 * MiB)
  expect(given.size).toBe(stack.counters('arena')['chunks'])
  for (let i = 0; i < 14_000; i += 20) {
    expect(pool.get(0, i, page)).toBe(Hit)
    expect(new DataView(page.buffer).getUint32(0)).toBe(i)
  }
  await stack.store.close()
  expect(given.size).toBe(0)
})
