/** Ephemeral pages that must leave a zcache are offered to the places below; each page is in one place at most. */
import type { Allocator, Layer, MemoryPlace } from '@tmem/core'
import { ByteLimit, GetOutcome, PutOutcome, systemAllocator } from '@tmem/core'
import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import { random } from '../../../tools/random.ts'
import { xvmalloc, zbud } from '../src/history.ts'
import { KiB, MiB, newPool, noisyPage, open, type Stack, sameBytes, settle } from './pages.ts'

const { Stored } = PutOutcome
const { Hit, Miss } = GetOutcome

/** Pages that left the zcache: passed down, and dropped. */
function left(stack: Stack): { passedDown: number; dropped: number } {
  const { passed_down, dropped_ephemeral } = stack.counters('moves')
  return { passedDown: passed_down!, dropped: dropped_ephemeral! }
}

/** Plain memory that refuses the blocks that `refuses` names, by how many were offered so far. */
function choosy(limitBytes: number, refuses: (offered: number) => boolean): Layer {
  const layer = memory({ limitBytes })
  return {
    name: 'choosy',
    place: {
      traits: layer.place!.traits,
      open(context) {
        const place = layer.place!.open(context) as MemoryPlace
        const put = place.put.bind(place)
        let offered = 0
        place.put = (block, owner) => (refuses(offered++) ? -PutOutcome.Policy : put(block, owner))
        return place
      },
    },
  }
}

test.each([
  ['zsmalloc', undefined],
  ['xvmalloc', xvmalloc],
  ['zbud', zbud],
] as const)('a working set larger than the zcache is whole, with what is below it: %s', (_name, allocator) => {
  const stack = open(
    { limitBytes: MiB, ...(allocator === undefined ? {} : { allocator }) },
    { below: [memory({ limitBytes: 16 * MiB })] },
  )
  const pool = newPool(stack, 'cache')
  const pages = 1500
  for (let i = 0; i < pages; i++) {
    expect(pool.put(i % 50, i, noisyPage(i, 0.4))).toBe(Stored)
    if (i % 100 === 0) stack.check()
  }
  const { passedDown, dropped } = left(stack)
  expect(passedDown).toBeGreaterThan(500)
  expect(dropped).toBe(0)
  expect(stack.counters()['pages']! + stack.counters('memory')['pages']!).toBe(pages)
  expect(stack.counters('memory')['used_frames']).toBe(passedDown)
  const into = new Uint8Array(4096)
  for (let i = 0; i < pages; i++) {
    expect(pool.get(i % 50, i, into)).toBe(Hit)
    expect(sameBytes(into, noisyPage(i, 0.4))).toBe(true)
  }
  for (let i = 0; i < pages; i++) expect(pool.get(i % 50, i, into)).toBe(Miss)
  stack.check()
})

test('persistent pages that eat ephemeral ones pass them down, too', () => {
  const stack = open({ limitBytes: MiB }, { below: [memory({ limitBytes: 16 * MiB })] })
  const cache = newPool(stack, 'cache')
  const swap = newPool(stack, 'swap')
  for (let i = 0; i < 400; i++) cache.put(0, i, noisyPage(i, 0.4))
  for (let i = 0; i < 300; i++) expect(swap.put(0, i, noisyPage(1000 + i, 0.4))).toBe(Stored)
  expect(left(stack).passedDown).toBeGreaterThan(100)
  // The persistent ones are on top.
  expect(stack.counters('order')['main_pages']).toBe(300)
  const into = new Uint8Array(4096)
  for (let i = 0; i < 400; i++) expect(cache.get(0, i, into)).toBe(Hit)
  expect(left(stack).dropped).toBe(0)
  stack.check()
})

test('what the place below refuses is dropped, and counted so', () => {
  const stack = open({ limitBytes: MiB }, { below: [choosy(16 * MiB, (offered) => offered % 2 === 0)] })
  const pool = newPool(stack, 'shared')
  for (let i = 0; i < 1000; i++) expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
  const { passedDown, dropped } = left(stack)
  expect(passedDown).toBeGreaterThan(100)
  expect(Math.abs(passedDown - dropped)).toBeLessThanOrEqual(1)
  expect(stack.chain()['pages']).toBe(1000 - dropped)
  expect(stack.counters('memory')['pages']).toBe(passedDown)
  stack.check()
})

test('without a place below they are dropped, oldest first', () => {
  const stack = open({ limitBytes: MiB })
  const pool = newPool(stack, 'cache')
  for (let i = 0; i < 1000; i++) expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
  const { passedDown, dropped } = left(stack)
  expect(dropped).toBeGreaterThan(300)
  expect(passedDown).toBe(0)
  const into = new Uint8Array(4096)
  for (let i = 0; i < 1000; i++) expect(pool.get(0, i, into)).toBe(i < dropped ? Miss : Hit)
})

test('no put passes more than a bounded number of pages down', () => {
  let offered = 0
  const stack = open(
    { limitBytes: 2 * MiB },
    {
      below: [
        choosy(64 * MiB, () => {
          offered++
          return false
        }),
      ],
    },
  )
  const pool = newPool(stack, 'cache')
  const next = random(3)
  const into = new Uint8Array(4096)
  let most = 0
  for (let i = 0; i < 5000; i++) {
    offered = 0
    // Each page an object of its own: that takes the most metadata.
    expect(pool.put(i, 0, noisyPage(i, next()))).toBe(Stored)
    most = Math.max(most, offered)
    if (next() < 0.4) pool.get(Math.floor(next() * i), 0, into)
  }
  expect(most).toBeGreaterThan(1)
  expect(most).toBeLessThanOrEqual(16 + 32 + 64)
  expect(left(stack).dropped).toBe(0)
  stack.check()
})

test('pages in parts go down, and come back whole or not at all', () => {
  const stack = open({ limitBytes: 4 * MiB }, { below: [memory({ limitBytes: 8 * MiB })] })
  const pool = newPool(stack, 'cache', 512 * KiB)
  const pages = 40
  for (let i = 0; i < pages; i++) expect(pool.put(0, i, noisyPage(i, 0.4, 512 * KiB))).toBe(Stored)
  expect(left(stack).passedDown).toBeGreaterThan(50)
  const { dropped } = stack.chain()
  expect(dropped).toBeGreaterThan(0)
  const into = new Uint8Array(512 * KiB)
  let right = 0
  for (let i = 0; i < pages; i++)
    if (pool.get(0, i, into) === Hit && sameBytes(into, noisyPage(i, 0.4, 512 * KiB))) right++
  expect(right).toBe(pages - dropped!)
  expect(stack.chain()['blocks']).toBe(0)
  stack.check()
})

test('a lowered limit passes ephemeral pages down in ticks', () => {
  const limitBytes = new ByteLimit(2 * MiB)
  const stack = open({ limitBytes }, { below: [memory({ limitBytes: 16 * MiB })] })
  const pool = newPool(stack, 'cache')
  for (let i = 0; i < 600; i++) expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
  limitBytes.bytes = MiB
  settle(stack, 32)
  stack.check()
  expect(stack.counters()['used_bytes']).toBeLessThanOrEqual(MiB)
  expect(left(stack).passedDown).toBeGreaterThan(100)
  const into = new Uint8Array(4096)
  for (let i = 0; i < 600; i++) expect(pool.get(0, i, into)).toBe(Hit)
})

test('a damaged page is not passed down', () => {
  const chunks: ArrayBufferLike[] = []
  const allocator: Allocator = {
    allocate: (bytes, site) => {
      const memory = systemAllocator.allocate(bytes, site)
      if (site === 'zcache.chunk') chunks.push(memory!)
      return memory
    },
  }
  const stack = open({ limitBytes: MiB }, { below: [memory({ limitBytes: 16 * MiB })], allocator })
  const pool = newPool(stack, 'cache')
  for (let i = 0; i < 100; i++) pool.put(0, i, noisyPage(i, 0.4))
  for (const chunk of chunks) new Uint8Array(chunk)[40]! ^= 1
  for (let i = 100; i < 1200; i++) pool.put(0, i, noisyPage(i, 0.4))
  expect(stack.counters('moves')['corrupt']).toBeGreaterThan(0)
  const into = new Uint8Array(4096)
  let missing = 0
  for (let i = 0; i < 1200; i++)
    if (pool.get(0, i, into) === Miss) missing++
    else if (!sameBytes(into, noisyPage(i, 0.4))) throw new Error(`page ${i} has other bytes`)
  // Those that were met on their way down, and those that a get met here.
  expect(missing).toBe(stack.counters('moves')['corrupt'])
  stack.check()
})
