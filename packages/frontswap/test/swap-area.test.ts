import { systemAllocator } from '@tmem/core'
import { failingAllocator } from '@tmem/faults'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { noSlot, SwapArea } from '../src/index.ts'
import { codeOf, onDevice, openArea, page, same, systemError } from './device.ts'

const allocated = (area: SwapArea, count: number): number[] => Array.from({ length: count }, () => area.allocate(1))

test('slots are given out once, never the header, until there are none', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.integer({ min: 1, max: 300 }),
      fc.array(fc.record({ take: fc.boolean(), slots: fc.integer({ min: 1, max: 40 }), which: fc.nat() }), {
        maxLength: 200,
      }),
      async (pages, steps) => {
        const { area } = openArea(pages)
        const held = new Map<number, number>()
        let used = 0
        for (const { take, slots, which } of steps) {
          const first = [...held.keys()][which % Math.max(1, held.size)]
          if (take) {
            const got = area.allocate(slots)
            same(got === noSlot, used + slots > pages)
            if (got === noSlot) continue
            same(got >= 1 && got <= pages && !held.has(got), true)
            held.set(got, slots)
            used += slots
          } else if (first !== undefined) {
            area.free(first)
            used -= held.get(first)!
            held.delete(first)
          }
          expect([area.usedSlots, area.freeSlots]).toEqual([used, pages - used])
          const walked: number[] = []
          for (let slot = area.nextPage(1); slot !== noSlot; slot = area.nextPage(slot + 1)) walked.push(slot)
          expect(walked).toEqual([...held.keys()].sort((a, b) => a - b))
        }
        await area.close()
      },
    ),
    { seed: 11, numRuns: 60 },
  )
})

test('slots come side by side, and from a whole free group before a broken one', async () => {
  const { area } = openArea(128)
  expect(allocated(area, 40)).toEqual(Array.from({ length: 40 }, (_, n) => n + 1))
  // A hole in the first group is left alone while there are whole groups.
  area.free(5)
  expect(allocated(area, 3)).toEqual([41, 42, 43])
  for (let slot = 32; slot < 44; slot++) area.free(slot)
  expect(area.usedSlots).toBe(30)
  // The group in use is finished, the next ones follow, then the hole is all that is left.
  const rest = allocated(area, 98)
  expect(rest.slice(0, 20)).toEqual(Array.from({ length: 20 }, (_, n) => n + 44))
  expect(new Set(rest).size).toBe(98)
  expect(rest).toContain(5)
  expect(area.allocate(1)).toBe(noSlot)
  await area.close()
})

test('neighbours are written in one request of at most 512 KiB, others in one each', async () => {
  const { area, device } = openArea(400)
  const source = new Uint8Array(300 * 4096).map((_, n) => n >>> 12)
  const slots = allocated(area, 300)
  for (const [n, slot] of slots.entries()) area.gather(slot, n * 4096)
  expect(area.submit(source)).toBe(0)
  expect(device.writes).toEqual([
    [1, 128],
    [129, 128],
    [257, 44],
  ])
  expect(area.counters).toMatchObject({ diskWrites: 3, clusteredWrites: 3, diskBytesWritten: 300 * 4096 })
  for (const slot of [2, 4, 5]) area.gather(slot, 0)
  area.submit(source)
  expect(device.writes.slice(3)).toEqual([
    [2, 1],
    [4, 2],
  ])
  const into = page(0)
  expect(await area.read(slots[77]!, into)).toBe(true)
  expect(into).toEqual(page(77))
  await area.close()
})

test('a page of several slots survives scattered slots', async () => {
  const { area, device } = openArea(64)
  const slots = allocated(area, 64)
  for (const slot of slots) if (slot % 3 !== 0) area.free(slot)
  const large = new Uint8Array(16 * 4096).map((_, n) => (n * 7) >>> 3)
  const first = area.allocate(16)
  expect(area.write(first, large)).toBe(true)
  expect(device.writes.length).toBeGreaterThan(1)
  const into = new Uint8Array(16 * 4096)
  expect(await area.read(first, into)).toBe(true)
  expect(into).toEqual(large)
  area.free(first)
  expect(area.usedSlots).toBe(21)
  await area.close()
})

test('a slot that cannot be written spoils only its own page and is never used again', async () => {
  const { area, device } = openArea(8)
  device.failWrite = (slot, count) => (slot <= 3 && slot + count > 3 ? systemError('EIO') : undefined)
  const slots = allocated(area, 5)
  const source = new Uint8Array(5 * 4096).fill(9)
  for (const [n, slot] of slots.entries()) area.gather(slot, n * 4096)
  expect(area.submit(source)).toBe(1)
  expect(slots.map((_, n) => area.failed(n))).toEqual([false, false, true, false, false])
  expect([area.badSlots, area.isBad(3)]).toEqual([1, true])
  const into = page(0)
  expect(await area.read(4, into)).toBe(true)
  for (const slot of slots) area.free(slot)
  expect([area.freeSlots, area.usedSlots]).toEqual([7, 0])
  expect(allocated(area, 8)).not.toContain(3)
  await area.close()
})

test.each(['ENOSPC', 'EDQUOT'])('after %s the slot may be used again', async (code) => {
  const { area, device } = openArea(8)
  device.failWrite = () => systemError(code)
  const slot = area.allocate(1)
  expect(area.write(slot, page(1))).toBe(false)
  device.failWrite = () => undefined
  expect(area.badSlots).toBe(0)
  expect(area.write(slot, page(2))).toBe(true)
  await area.close()
})

test('an altered slot is found out, whichever bit it is', async () => {
  const { area, device } = openArea(4)
  const slot = area.allocate(2)
  const large = new Uint8Array(8192).map((_, n) => n)
  expect(area.write(slot, large)).toBe(true)
  const into = new Uint8Array(8192).fill(0xee)
  for (const at of [0, 4095, 4096, 8191]) {
    const byte = slot * 4096 + at
    device.content[byte] = device.content[byte]! ^ 1
    expect(await codeOf(() => area.read(slot, into))).toBe('TMEM_CORRUPT')
    expect(into.every((value) => value === 0xee)).toBe(true)
    device.content[byte] = device.content[byte]! ^ 1
  }
  expect(area.counters.corruptSlots).toBe(4)
  expect(await area.read(slot, into)).toBe(true)
  expect(into).toEqual(large)
  await area.close()
})

test('a read that fails leaves the page, and a later one may succeed', async () => {
  const { area, device } = openArea(4)
  const slot = area.allocate(1)
  area.write(slot, page(5))
  device.failRead = () => systemError('EIO')
  const into = page(0)
  await expect(area.read(slot, into)).rejects.toMatchObject({ code: 'TMEM_IO', cause: { code: 'EIO' } })
  device.failRead = () => undefined
  expect(await area.read(slot, into)).toBe(true)
  expect(into).toEqual(page(5))
  await area.close()
})

test('a read that was overtaken delivers nothing, and no error either', async () => {
  const { area, device } = openArea(4)
  let release = (): void => undefined
  device.beforeRead = () =>
    new Promise((resolve) => {
      release = resolve
    })
  const overtake: ((slot: number) => void)[] = [(slot) => area.free(slot), (slot) => area.write(slot, page(8))]
  for (const [n, change] of overtake.entries()) {
    const slot = area.allocate(1)
    area.write(slot, page(7))
    const into = page(0)
    const reading = area.read(slot, into)
    change(slot)
    // Whatever the device says of bytes that nobody wants any more.
    device.failRead = () => (n === 0 ? systemError('EIO') : undefined)
    release()
    expect(await reading).toBe(false)
    expect(into).toEqual(page(0))
    device.failRead = () => undefined
  }
  expect(area.counters.staleReads).toBe(2)
  await area.close()
})

test('more reads at once than there is room for wait their turn', async () => {
  const { area, device } = openArea(1100)
  const slots = Array.from({ length: 1000 }, () => area.allocate(1))
  for (const [n, slot] of slots.entries()) area.write(slot, page(n & 255))
  const small = slots.map(() => page(0))
  const reads = slots.map((slot, n) => area.read(slot, small[n]!))
  expect(device.reads).toBe(512)
  expect(await Promise.all(reads)).toEqual(slots.map(() => true))
  expect(small.every((bytes, n) => bytes[0] === (n & 255))).toBe(true)
  await area.close()
})

test('a large read that waits for room is not overtaken by small ones', async () => {
  const { area, device } = openArea(600)
  const releases: (() => void)[] = []
  device.beforeRead = () =>
    new Promise((resolve) => {
      releases.push(resolve)
    })
  const [small, large] = [area.allocate(1), area.allocate(512)]
  area.write(small, page(1))
  area.write(large, page(2, 512 * 4096))
  const order: string[] = []
  const read = (name: string, slot: number, size: number): Promise<void> =>
    area.read(slot, page(0, size)).then((filled) => {
      order.push(`${name} ${filled}`)
    })
  const all = [read('first', small, 4096), read('large', large, 512 * 4096), read('last', small, 4096)]
  for (let turns = 0; turns < 50 && order.length < 3; turns++) {
    await new Promise((resolve) => {
      setImmediate(resolve)
    })
    releases.shift()?.()
  }
  await Promise.all(all)
  expect(order).toEqual(['first true', 'large true', 'last true'])
  await area.close()
})

test('close waits for the reads under way, and those that wait for room', async () => {
  const { area, device } = openArea(600)
  const slot = area.allocate(1)
  area.write(slot, page(1))
  const reads = Array.from({ length: 600 }, () => area.read(slot, page(0)))
  const closing = area.close()
  expect(device.closed).toBe(false)
  expect((await Promise.all(reads)).some(Boolean)).toBe(false)
  await closing
  expect(device.closed).toBe(true)
  expect(area.allocate(1)).toBe(noSlot)
})

test('sizes and priorities that make no sense are refused', async () => {
  const { options } = onDevice(4)
  for (const sizeBytes of [0, -4096, 4095, 5000, Number.NaN, 2 ** 40])
    expect(() => SwapArea.open({ ...options, sizeBytes }, systemAllocator)).toThrow(RangeError)
  for (const priority of [1.5, 32768, -32769])
    expect(() => SwapArea.open({ ...options, priority }, systemAllocator)).toThrow(RangeError)
})

test('every allocation of an area, failed once', async () => {
  const allocator = failingAllocator(systemAllocator)
  const { options } = onDevice(4)
  const area = SwapArea.open(options, allocator)
  expect([...allocator.sites.keys()]).toEqual([
    'frontswap.slots',
    'frontswap.checksums',
    'frontswap.stamps',
    'frontswap.chains',
    'frontswap.bits',
    'frontswap.io',
  ])
  await area.close()
  const count = allocator.requests
  for (let nth = 1; nth <= count; nth++) {
    allocator.fail({ nth })
    expect(await codeOf(() => SwapArea.open(options, allocator))).toBe('TMEM_NO_MEMORY')
  }
})
