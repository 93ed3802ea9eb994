import { execFileSync } from 'node:child_process'
import { existsSync, readFileSync, statSync } from 'node:fs'
import { systemAllocator } from '@tmem/core'
import { failingAllocator } from '@tmem/faults'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { noSlot, SwapArea } from '../src/index.ts'
import { codeOf, Disk, openArea, page, same, testFolder } from './device.ts'

const folder = testFolder()

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

test('a page is written and read in one request for neighbours, and survives scattered slots', async () => {
  const { area, disk } = openArea(64)
  const large = new Uint8Array(16 * 4096).map((_, n) => (n * 7) >>> 3)
  const together = area.allocate(16)
  area.write(together, large)
  expect(disk.asked('write').map(({ position, length }) => [position, length])).toEqual([[4096, 16 * 4096]])
  for (const slot of allocated(area, 48)) if (slot % 3 !== 0) area.free(slot)
  area.free(together)
  const scattered = area.allocate(40)
  const most = new Uint8Array(40 * 4096).map((_, n) => n >>> 6)
  disk.forget()
  area.write(scattered, most)
  expect(disk.asked('write').length).toBeGreaterThan(8)
  const into = new Uint8Array(40 * 4096)
  expect(await area.read(scattered, into)).toBe(true)
  expect(into).toEqual(most)
  area.free(scattered)
  expect(area.usedSlots).toBe(16)
  await area.close()
})

test.each(['EIO', 'ENOSPC'])('a write that fails with %s says so, and the slot serves the next', async (code) => {
  const { area, disk } = openArea(8)
  const slot = area.allocate(1)
  disk.fail('write', code)
  expect(() => area.write(slot, page(1))).toThrow(
    expect.objectContaining({ code: 'TMEM_IO', cause: expect.objectContaining({ code }) }),
  )
  disk.fail('write', undefined)
  area.write(slot, page(2))
  const into = page(0)
  expect(await area.read(slot, into)).toBe(true)
  expect(into).toEqual(page(2))
  await area.close()
})

test('an altered slot is found out, whichever byte it is', async () => {
  const { area, disk } = openArea(4)
  const slot = area.allocate(2)
  const large = new Uint8Array(8192).map((_, n) => n)
  area.write(slot, large)
  const into = new Uint8Array(8192)
  for (const at of [0, 4095, 4096, 8191]) {
    disk.damage(slot * 4096 + at)
    await expect(area.read(slot, into)).rejects.toMatchObject({
      code: 'TMEM_CORRUPT',
      handle: expect.stringMatching(/^slot [12]$/),
    })
    disk.damage(slot * 4096 + at)
  }
  expect(await area.read(slot, into)).toBe(true)
  expect(into).toEqual(large)
  await area.close()
})

test('a read that fails leaves the page, and a later one may succeed', async () => {
  const { area, disk } = openArea(4)
  const slot = area.allocate(1)
  area.write(slot, page(5))
  disk.fail('read', 'EIO')
  const into = page(0)
  await expect(area.read(slot, into)).rejects.toMatchObject({ code: 'TMEM_IO', cause: { code: 'EIO' } })
  disk.fail('read', undefined)
  expect(await area.read(slot, into)).toBe(true)
  expect(into).toEqual(page(5))
  await area.close()
})

test.each(['freed', 'written', 'freed while the disk fails', 'closed'])(
  'a read that was overtaken (%s) delivers nothing, and no error',
  async (how) => {
    const { area, disk } = openArea(4)
    const slot = area.allocate(1)
    area.write(slot, page(7))
    let release = (): void => undefined
    const until = new Promise<void>((resolve) => {
      release = resolve
    })
    disk.fault = ({ name }) =>
      name === 'read' ? { until, ...(how.endsWith('fails') ? { code: 'EIO' } : {}) } : undefined
    const reading = area.read(slot, page(0))
    let closing: Promise<void> | undefined
    if (how === 'written') area.write(slot, page(8))
    else if (how === 'closed') closing = area.close()
    else area.free(slot)
    release()
    expect(await reading).toBe(false)
    await closing
    await area.close()
    expect(area.allocate(1)).toBe(noSlot)
    expect(disk.files.content(disk.path)).toBe(undefined)
  },
)

test('sizes and priorities that make no sense are refused', () => {
  const options = { file: 'x', sizeBytes: 4 * 4096, files: new Disk().files }
  for (const sizeBytes of [0, -4096, 4095, 5000, Number.NaN, 2 ** 40])
    expect(() => SwapArea.open({ ...options, sizeBytes }, systemAllocator)).toThrow(RangeError)
  for (const priority of [1.5, 32768, -32769])
    expect(() => SwapArea.open({ ...options, priority }, systemAllocator)).toThrow(RangeError)
})

test('every allocation of an area, failed once: nothing is left behind', async () => {
  const allocator = failingAllocator(systemAllocator)
  const disk = new Disk()
  const options = { file: disk.path, sizeBytes: 4 * 4096, files: disk.files }
  const area = SwapArea.open(options, allocator)
  expect([...allocator.sites.keys()]).toEqual(['frontswap.slots', 'pageFile.buffers'])
  await area.close()
  const count = allocator.requests
  for (let nth = 1; nth <= count; nth++) {
    allocator.fail({ nth })
    expect(await codeOf(() => SwapArea.open(options, allocator))).toBe('TMEM_NO_MEMORY')
    expect(disk.files.content(disk.path)).toBe(undefined)
  }
})

test('the file is a Linux swap area, with all of its room from the start', async (ctx) => {
  requires(ctx, { commands: ['file'] })
  const file = folder.file()
  const area = SwapArea.open({ file, sizeBytes: 300 * 4096 }, systemAllocator)
  const { size, blocks, mode } = statSync(file)
  expect([size, mode & 0o777]).toEqual([301 * 4096, 0o600])
  expect(blocks * 512).toBeGreaterThanOrEqual(size)
  const header = readFileSync(file).subarray(0, 4096)
  expect(header.toString('latin1', 4086)).toBe('SWAPSPACE2')
  expect([header.readUInt32LE(1024), header.readUInt32LE(1028), header.readUInt32LE(1032)]).toEqual([1, 300, 0])
  expect(execFileSync('file', [file], { encoding: 'utf8' })).toMatch(/Linux.*swap file.*version 1.*size 300 pages/)
  await area.close()
  expect(existsSync(file)).toBe(false)
})

test('the system takes our file as swap', async (ctx) => {
  requires(ctx, { root: true, commands: ['swapon', 'swapoff'] })
  const file = folder.file()
  await SwapArea.open({ file, sizeBytes: 40 * 4096, keep: true }, systemAllocator).close()
  try {
    execFileSync('swapon', [file], { stdio: 'pipe' })
  } catch (error) {
    ctx.skip(`needs a kernel that swaps to a file here: ${error instanceof Error ? error.message : ''}`)
  }
  try {
    expect(readFileSync('/proc/swaps', 'utf8')).toContain(file)
  } finally {
    execFileSync('swapoff', [file])
  }
})
