import {
  type Completion,
  compose,
  type Flight,
  type Layer,
  type LayerContext,
  type MemoryPlace,
  type Owners,
  PutOutcome,
  planStack,
  type SlowPlace,
  type StatsNode,
  systemAllocator,
} from '@tmem/core'
import { count, failingAllocator, refuse } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { describe, expect, test } from 'vitest'
import { type Ramzswap, type RamzswapOptions, ramzswap, virtswap } from '../src/index.ts'
import {
  backingFile,
  bytesOf,
  codeOf,
  compressed,
  expectBytes,
  expectSums,
  failsFirst,
  room,
  same,
  section,
  systemError,
} from './subject.ts'

const pages = 64
const sizeBytes = pages * 4096
const page = (kind: Parameters<typeof bytesOf>[0], seed = 1): Uint8Array => bytesOf(kind, 4096, seed)

async function contentOf(device: Ramzswap, at = 0, length = device.sizeBytes): Promise<Uint8Array> {
  const bytes = new Uint8Array(length).fill(0xee)
  await device.read(at, bytes)
  return bytes
}

function withFile(more: Partial<RamzswapOptions> & { readonly maxSizeBytes?: number } = {}) {
  const { layers, file } = backingFile(more.maxSizeBytes === undefined ? pages : more.maxSizeBytes / 4096)
  const device = ramzswap({
    name: 'dev',
    sizeBytes,
    stack: [...compressed(), ...layers],
    check: 'model',
    ...more,
  })
  return { device, file: file() }
}

describe('a device', () => {
  test('DEVIATION: what was never written reads as zeros; the original left the buffer as it was', async () => {
    const { device } = withFile()
    expectBytes(await contentOf(device), new Uint8Array(sizeBytes))
    expect(device.ramzswapStats()).toMatchObject({ pages_stored: 0, good_compress_pct: 0, num_reads: pages })
    await device.close()
  })

  test('a page that compresses is in memory and is read without waiting', async () => {
    const { device } = withFile()
    expect(device.write(4096, page('text'))).toBeUndefined()
    const into = new Uint8Array(4096)
    expect(device.read(4096, into)).toBeUndefined()
    expect(into).toEqual(page('text'))
    const stats = device.ramzswapStats()
    expect(stats).toMatchObject({
      disksize: sizeBytes,
      num_reads: 1,
      num_writes: 1,
      pages_stored: 1,
      orig_data_size: 4096,
      good_compress_pct: 100,
      pages_expand_pct: 0,
      bdev_num_reads: 0,
      bdev_num_writes: 0,
    })
    expect(stats.compr_data_size).toBeGreaterThan(0)
    expect(stats.compr_data_size).toBeLessThan(2048)
    expect(stats.mem_used_total).toBeGreaterThan(stats.compr_data_size)
    expect(stats.pages_used).toBe(Math.ceil(stats.mem_used_total / 4096))
    expectSums(device.stats())
    await device.close()
  })

  test('zero and same-filled pages take no store and no memory', async () => {
    const { device } = withFile()
    for (const [n, kind] of (['zero', 'word', 'word'] as const).entries()) void device.write(n * 4096, page(kind, n))
    expectBytes(await contentOf(device, 0, 3 * 4096), Buffer.concat([page('zero'), page('word', 1), page('word', 2)]))
    expect(device.ramzswapStats()).toMatchObject({
      pages_zero: 3,
      pages_stored: 0,
      compr_data_size: 0,
      bdev_num_writes: 0,
    })
    expect([0, 1, 2, 3].map((slot) => device.blockState(slot))).toEqual(['s', 's', 's', ''])
    expectSums(device.stats())
    await device.close()
  })

  test('a page that repeats all but its last word is not same-filled', async () => {
    const { device } = withFile()
    for (const at of [4092, 4095, 2048, 1, 0]) {
      const almost = page('word')
      almost[at] = almost[at]! ^ 1
      void device.write(0, almost)
      expect(device.ramzswapStats().pages_zero).toBe(0)
      expectBytes(await contentOf(device, 0, 4096), almost)
    }
    await device.close()
  })

  test('a page that does not compress goes to the backing store, several at once in one write', async () => {
    const { device, file } = withFile()
    const before = file.writes
    void device.write(0, bytesOf('noise', 16 * 4096, 3))
    expect(file.writes - before).toBe(1)
    expectBytes(await contentOf(device, 0, 16 * 4096), bytesOf('noise', 16 * 4096, 3))
    expect(device.ramzswapStats()).toMatchObject({ pages_stored: 0, bdev_num_writes: 16, bdev_num_reads: 16 })
    expect(device.blockState(0)).toBe('wh')
    const into = new Uint8Array(4096)
    const wait = device.read(0, into)
    expect(wait).toBeInstanceOf(Promise)
    await wait
    expectSums(device.stats())
    await device.close()
  })

  test('DEVIATION: without that rule it rests in memory as it is, while there is room; the original wrote it at once', async () => {
    const { layers, file } = backingFile(pages)
    const stack = [zcache({ limitBytes: 256 * 1024 }), ...layers]
    const device = ramzswap({ name: 'dev', sizeBytes: pages * 4096, stack, check: 'model' })
    const before = file().writes
    void device.write(0, bytesOf('noise', 16 * 4096, 3))
    expect(file().writes).toBe(before)
    expect([device.blockState(0), device.ramzswapStats().pages_expand_pct]).toEqual(['h', 100])
    void device.write(0, bytesOf('noise', sizeBytes, 4))
    expect(device.ramzswapStats().bdev_num_writes).toBeGreaterThan(10)
    expect(section(device.stats(), 'mm_stat')).toMatchObject({ huge_pages_since: 16 + pages })
    expectSums(device.stats())
    expectBytes(await contentOf(device), bytesOf('noise', sizeBytes, 4))
    expectSums(device.stats())
    await device.close()
  })

  test('without a backing store such a page is kept uncompressed (pages_expand)', async () => {
    const device = ramzswap({ name: 'dev', sizeBytes, stack: [...compressed(), ...room(pages)], check: 'model' })
    void device.write(0, page('noise'))
    void device.write(4096, page('text'))
    expect(device.ramzswapStats()).toMatchObject({ pages_stored: 2, pages_expand_pct: 50, good_compress_pct: 50 })
    expect(section(device.stats(), 'mm_stat')).toMatchObject({ huge_pages: 1, huge_pages_since: 1 })
    expectBytes(await contentOf(device, 0, 4096), page('noise'))
    await device.discard(0, 4096)
    expect(section(device.stats(), 'mm_stat')).toMatchObject({ huge_pages: 0, huge_pages_since: 1 })
    expectSums(device.stats())
    await device.close()
  })

  test('what is over the memlimit goes to the backing store, and the limit can be changed', async () => {
    const { device } = withFile({ memlimitBytes: 20_000 })
    for (let n = 0; n < pages; n++) void device.write(n * 4096, page('third', n))
    const { backing, compressed: inMemory } = section(device.stats(), 'slots')
    expect(inMemory).toBeGreaterThan(2)
    expect(backing).toBe(pages - inMemory!)
    expect(device.ramzswapStats()).toMatchObject({ memlimit: 20_000 })
    expect(device.ramzswapStats().compr_data_size).toBeLessThanOrEqual(20_000)
    device.memlimitBytes = 0
    for (let n = 0; n < pages; n++) void device.write(n * 4096, page('third', n + 1))
    expect(section(device.stats(), 'slots')).toMatchObject({ backing: 0, compressed: pages })
    for (let n = 0; n < pages; n++) expectBytes(await contentOf(device, n * 4096, 4096), page('third', n + 1))
    expectSums(device.stats())
    await device.close()
  })

  test('DEVIATION: each device has its own limits and statistics; the original had one size limit for all', async () => {
    const a = withFile({ name: 'a', memlimitBytes: 4096 })
    const b = withFile({ name: 'b' })
    for (const { device } of [a, b]) void device.write(0, bytesOf('third', 32 * 4096, 1))
    expect(section(a.device.stats(), 'slots')['backing']).toBeGreaterThan(28)
    expect(section(b.device.stats(), 'slots')['backing']).toBe(0)
    void a.device.write(0, page('zero'))
    expect([a.device.ramzswapStats().num_writes, b.device.ramzswapStats().num_writes]).toEqual([33, 32])
    await a.device.close()
    expectBytes(await contentOf(b.device, 0, 32 * 4096), bytesOf('third', 32 * 4096, 1))
    await b.device.close()
  })

  test('DEVIATION: requests may be of any multiple of 512 bytes; others are counted as invalid_io', async () => {
    const { device } = withFile()
    void device.write(1024, bytesOf('text', 7 * 512, 2))
    const wanted = new Uint8Array(3 * 4096)
    wanted.set(bytesOf('text', 7 * 512, 2), 1024)
    expectBytes(await contentOf(device, 0, 3 * 4096), wanted)
    for (const [at, length] of [
      [100, 512],
      [0, 100],
      [-512, 512],
      [sizeBytes, 512],
      [sizeBytes - 512, 1024],
      [0.5, 512],
      [Number.NaN, 512],
    ] as const) {
      expect(() => device.read(at, new Uint8Array(length))).toThrow(RangeError)
      expect(() => device.write(at, new Uint8Array(length))).toThrow(RangeError)
      expect(() => device.discard(at, length)).toThrow(RangeError)
      expect(() => device.zero(at, length)).toThrow(RangeError)
      expect(() => device.map(at, length, () => true)).toThrow(RangeError)
    }
    expect(device.ramzswapStats().invalid_io).toBe(35)
    expect(device.write(sizeBytes, new Uint8Array(0))).toBeUndefined()
    await device.close()
  })

  test('a discard frees whole pages, zeroes parts of others, and is counted (notify_free)', async () => {
    const { device } = withFile()
    void device.write(0, bytesOf('text', 4 * 4096, 1))
    await device.discard(4096 - 512, 4096 + 1024)
    const wanted = bytesOf('text', 4 * 4096, 1).fill(0, 4096 - 512, 2 * 4096 + 512)
    expectBytes(await contentOf(device, 0, 4 * 4096), wanted)
    expect(device.ramzswapStats()).toMatchObject({ notify_free: 1, pages_stored: 3 })
    await device.discard(0, sizeBytes)
    expect(device.ramzswapStats()).toMatchObject({ notify_free: 4, pages_stored: 0, compr_data_size: 0 })
    await device.discard(0, sizeBytes)
    expect(device.ramzswapStats().notify_free).toBe(4)
    expectSums(device.stats())
    await device.close()
  })

  test('DEVIATION: slot 0 is a page like any other, so that freeing it makes no counter underflow', async () => {
    const { device } = withFile()
    await device.discard(0, 4096)
    expect(device.ramzswapStats()).toMatchObject({ pages_stored: 0, notify_free: 0, pages_zero: 0 })
    void device.write(0, page('text'))
    await device.discard(0, 4096)
    expect(device.ramzswapStats()).toMatchObject({ pages_stored: 0, notify_free: 1, pages_zero: 0 })
    expectSums(device.stats())
    await device.close()
  })

  test('DEVIATION: all reads and writes are counted; the original took reads that it forwarded out of num_reads', async () => {
    const { device } = withFile()
    await device.write(0, Buffer.concat([page('text'), page('noise'), page('zero')]))
    for (let n = 0; n < 4; n++) await device.read(n * 4096, new Uint8Array(4096))
    expect(device.ramzswapStats()).toMatchObject({
      num_reads: 4,
      num_writes: 3,
      bdev_num_reads: 1,
      bdev_num_writes: 1,
      failed_writes: 0,
    })
    await device.close()
  })

  test('DEVIATION: a page that finds no memory and is forwarded is no failed write', async () => {
    const { layers } = backingFile(pages)
    const allocator = failingAllocator(systemAllocator)
    const device = ramzswap({ name: 'dev', sizeBytes, stack: [...compressed(), ...layers], allocator })
    allocator.fail({ sites: ['zcache.chunk'] })
    await device.write(0, page('text'))
    expect(allocator.failures).toBeGreaterThan(0)
    expect(device.ramzswapStats()).toMatchObject({ num_writes: 1, failed_writes: 0, bdev_num_writes: 1 })
    await device.close()
  })

  test('reset: nothing is left, and everything is counted anew', async () => {
    const { device } = withFile()
    const fresh = device.stats()
    await device.write(0, Buffer.concat([page('text'), page('noise'), page('zero'), page('word')]))
    await device.write(0, page('text', 2))
    await device.discard(4096, 4096)
    await device.writeback({ pageIndex: 0 })
    expect(() => device.read(1, new Uint8Array(512))).toThrow(RangeError)
    device.reset()
    device.tick({ pages: 10_000 })
    device.forgetMostUsed()
    // What the stores below have counted is theirs.
    const own = ({ counters, children }: StatsNode) => [
      counters,
      children.filter((child) => child.children.length === 0),
    ]
    const again = device.stats()
    const { mem_used_total: used = 0, pages_used: usedPages = 0 } = again.counters
    expect(used).toBeLessThanOrEqual(2 ** 20)
    expect(section(again, 'mm_stat')['mem_used_max']).toBe(used)
    const text = JSON.stringify(own(fresh))
      .replaceAll(/"(mem_used_total|mem_used_max)":\d+/g, `"$1":${used}`)
      .replaceAll(/"pages_used":\d+/g, `"pages_used":${usedPages}`)
    expect(JSON.stringify(own(again)).replaceAll(/"pages_compacted":\d+/g, '"pages_compacted":0')).toBe(text)
    expectBytes(await contentOf(device), new Uint8Array(sizeBytes))
    expectSums(device.stats())
    await device.close()
  })

  test('zero writes zeros, which take no memory', async () => {
    const { device } = withFile()
    void device.write(0, bytesOf('noise', 3 * 4096, 1))
    await device.zero(512, 2 * 4096)
    expectBytes(await contentOf(device, 0, 3 * 4096), bytesOf('noise', 3 * 4096, 1).fill(0, 512, 512 + 2 * 4096))
    expect(device.ramzswapStats().notify_free).toBe(0)
    const runs: [number, boolean][] = []
    device.map(512, 4 * 4096, (length, allocated) => runs.push([length, allocated]) > 0)
    expect(runs).toEqual([
      [3584, true],
      [4096, false],
      [4096, true],
      [4096 + 512, false],
    ])
    await device.close()
  })

  test('map tells bytes from zeros, page by page', async () => {
    const { device } = withFile()
    void device.write(0, page('text'))
    void device.write(2 * 4096, page('zero'))
    void device.write(3 * 4096, page('word'))
    const runs: [number, boolean][] = []
    device.map(0, sizeBytes, (length, allocated) => runs.push([length / 4096, allocated]) > 0)
    expect(runs).toEqual([
      [1, true],
      [2, false],
      [1, true],
      [60, false],
    ])
    runs.length = 0
    device.map(0, sizeBytes, (length) => runs.push([length, true]) < 2)
    expect(runs.length).toBe(2)
    await device.close()
  })

  test('changes its size while it is in use; what is cut off is gone', async () => {
    const { device } = withFile({ maxSizeBytes: 2 * sizeBytes })
    void device.write(sizeBytes - 4096, page('text'))
    device.resize(2 * sizeBytes)
    expect(device.sizeBytes).toBe(2 * sizeBytes)
    void device.write(2 * sizeBytes - 4096, page('noise'))
    expectBytes(await contentOf(device, sizeBytes - 4096, 4096), page('text'))
    device.resize(sizeBytes - 4096)
    expect(() => device.read(sizeBytes - 4096, new Uint8Array(4096))).toThrow(RangeError)
    expect(section(device.stats(), 'slots')).toMatchObject({ slots: pages - 1, cut_off: 2 })
    device.resize(2 * sizeBytes)
    expectBytes(await contentOf(device), new Uint8Array(2 * sizeBytes))
    expect(() => device.resize(2 * sizeBytes + 4096)).toThrow(/was made for at most/)
    expect(() => device.resize(100)).toThrow(RangeError)
    expectSums(device.stats())
    await device.close()
  })

  test('does not grow beyond the room that its stores reserve', async () => {
    const { layers } = backingFile(pages)
    const stack = [...compressed(), ...layers]
    const device = ramzswap({ name: 'dev', sizeBytes, maxSizeBytes: 2 * sizeBytes, stack })
    expect(await codeOf(() => device.resize(sizeBytes + 4096))).toBe('TMEM_NO_MEMORY')
    expect(device.sizeBytes).toBe(sizeBytes)
    await device.close()
  })

  test('DEVIATION: without room for its whole size it is refused when it is made, and the message names the layers', async () => {
    const make =
      (stack: readonly Layer[], more: Partial<RamzswapOptions> = {}) =>
      () =>
        ramzswap({ name: 'swap0', sizeBytes, stack, ...more })
    expect(make(compressed())).toThrow(
      /^device swap0 cannot stand above zcache: it needs room for all of its 262144 bytes.*zcache reserves 0/,
    )
    expect(make([...compressed(), ...backingFile(pages - 1).layers])).toThrow(
      /above zcache > frontswap: .*frontswap reserves 258048/,
    )
    expect(await codeOf(make([]))).toBe('TMEM_BAD_STACK')
    expect(make([refuse({ every: 3 }), ...room(pages)])).toThrow(/memory reserves 0/)
    expect(make([...compressed(), ...room(pages)], { memlimitBytes: 1 })).toThrow(/needs a backing store/)
    const half = backingFile(pages / 2)
    expect(make([...room(pages), ...half.layers], { memlimitBytes: 4096 })).toThrow(/needs a backing store/)
    while (!half.file().closed) await new Promise((resolve) => setImmediate(resolve))
    expect(make(room(pages), { sizeBytes: 1000 })).toThrow(RangeError)
    expect(make(backingFile(pages).layers, { maxSizeBytes: 4096 })).toThrow(RangeError)
  })

  test('with a memlimit it grows as far as the rest has somewhere to go', async () => {
    const stack = [...room(pages), ...backingFile(pages).layers]
    const device = ramzswap({ name: 'dev', sizeBytes, maxSizeBytes: 2 * sizeBytes, stack, memlimitBytes: 65_536 })
    expect(await codeOf(() => device.resize(sizeBytes + 4096))).toBe('TMEM_NO_MEMORY')
    device.memlimitBytes = 0
    device.resize(2 * sizeBytes)
    expect(() => {
      device.memlimitBytes = 65_536
    }).toThrow(/needs a backing store/)
    await device.close()
  })

  test('knobs and statistics go through a filter above the places', async () => {
    const stack = [count(), zcache({ limitBytes: 2 ** 20, recompress: 'deflate' }), ...backingFile(pages).layers]
    const device = ramzswap({ name: 'dev', sizeBytes, stack, check: 'model' })
    for (let n = 0; n < 8; n++) void device.write(n * 4096, page(n < 4 ? 'half' : 'noise', n))
    expect(await device.recompress({ thresholdBytes: 1500 })).toBe(4)
    expect(await device.writeback('huge')).toBe(4)
    expect(section(device.stats(), 'slots')).toMatchObject({ compressed: 4, recompressed: 4, backing: 4 })
    expect(device.compact(64)).toBe(0)
    expect(device.blockState(4)).toBe('wh')
    for (let n = 0; n < 8; n++) expectBytes(await contentOf(device, n * 4096, 4096), page(n < 4 ? 'half' : 'noise', n))
    await device.close()
  })

  test('a stack that is no stack of places is refused, and closed', async () => {
    let closed = 0
    const [{ place }] = room(pages) as [Layer]
    const plan = { ...planStack([{ name: 'memory', place: place! }]) }
    const alone: Layer = {
      name: 'alone',
      plan: () => plan,
      open: (_next, context) => {
        const store = compose([{ name: 'memory', place: place! }], context)
        return {
          name: 'alone',
          capabilities: plan,
          newPool: (attributes) => store.newPool(attributes),
          tick: (budget) => store.tick(budget),
          stats: () => store.stats(),
          close: () => {
            closed++
            return store.close()
          },
        }
      },
    }
    expect(() => ramzswap({ name: 'dev', sizeBytes, stack: [alone] })).toThrow(
      'device dev: alone is no stack of places: it does not say where pages are',
    )
    expect(closed).toBe(1)
  })

  test('a closed device says so', async () => {
    const { device, file } = withFile()
    void device.write(0, bytesOf('noise', 8192, 1))
    let release = (): void => undefined
    file.beforeRead = () =>
      new Promise((resolve) => {
        release = resolve
      })
    const reading = codeOf(() => device.read(0, new Uint8Array(4096)))
    await Promise.resolve()
    const closing = device.close()
    release()
    expect(await reading).toBe('TMEM_CLOSED')
    await closing
    expect(device.close()).toBe(closing)
    expect(file.closed).toBe(true)
    for (const use of [
      () => device.read(0, new Uint8Array(512)),
      () => device.write(0, new Uint8Array(512)),
      () => device.discard(0, 512),
      () => device.zero(0, 512),
      () => device.flush(),
      () => device.writeback('huge'),
    ])
      expect(await codeOf(use)).toBe('TMEM_CLOSED')
  })
})

describe('changes that meet', () => {
  test('two halves of one page on disk are both kept, in whatever order their reads end', async () => {
    for (const order of [
      [0, 1],
      [1, 0],
    ]) {
      const { device, file } = withFile()
      void device.write(0, page('noise'))
      const gates: (() => void)[] = []
      file.beforeRead = () => new Promise((resolve) => gates.push(resolve))
      const first = device.write(0, new Uint8Array(512).fill(1))
      const second = device.write(512, new Uint8Array(512).fill(2))
      await Promise.resolve()
      expect(gates.length).toBe(2)
      file.beforeRead = () => Promise.resolve()
      for (const n of order) gates[n]!()
      await Promise.all([first, second])
      expectBytes(await contentOf(device, 0, 4096), page('noise').fill(1, 0, 512).fill(2, 512, 1024))
      await device.close()
    }
  })

  test('a whole page written while a part of it waits for the disk is not undone', async () => {
    const { device, file } = withFile()
    void device.write(0, page('noise', 1))
    let release = (): void => undefined
    file.beforeRead = () =>
      new Promise((resolve) => {
        release = resolve
      })
    const part = device.write(512, new Uint8Array(512).fill(9))
    await Promise.resolve()
    expect(device.write(0, page('text', 2))).toBeUndefined()
    file.beforeRead = () => Promise.resolve()
    release()
    await part
    expectBytes(await contentOf(device, 0, 4096), page('text', 2).fill(9, 512, 1024))
    await device.close()
  })

  test('a page discarded, or cut off, while it is read', async () => {
    const { device, file } = withFile()
    void device.write(0, bytesOf('noise', sizeBytes, 1))
    const gates: (() => void)[] = []
    file.beforeRead = () => new Promise((resolve) => gates.push(resolve))
    const into = new Uint8Array(4096)
    const reading = device.read(0, into)
    const cut = codeOf(() => device.read(sizeBytes - 4096, new Uint8Array(4096)))
    await Promise.resolve()
    void device.discard(0, 4096)
    device.resize(sizeBytes / 2)
    for (const open of gates) open()
    await reading
    expect(into).toEqual(new Uint8Array(4096))
    expect(await cut).toBe('TMEM_IO')
    await device.close()
  })

  test('more requests wait than there are pages for them', async () => {
    const { device } = withFile()
    void device.write(0, bytesOf('noise', sizeBytes, 1))
    const wanted = bytesOf('noise', sizeBytes, 1)
    const writes: Promise<void>[] = []
    for (let n = 0; n < pages; n++) {
      wanted.fill(n, n * 4096 + 512, n * 4096 + 1024)
      writes.push(Promise.resolve(device.write(n * 4096 + 512, new Uint8Array(512).fill(n))))
    }
    await Promise.all(writes)
    expect(device.ramzswapStats().bdev_num_writes).toBe(2 * pages)
    expectBytes(await contentOf(device), wanted)
    await device.close()
  })
})

describe('faults', () => {
  test('DEVIATION: an overwrite that fails leaves the old page; the original freed it first', async () => {
    for (const code of ['EIO', 'ENOSPC']) {
      const { device, file } = withFile()
      void device.write(0, page('text'))
      void device.write(4096, page('noise', 1))
      file.failWrite = () => systemError(code)
      expect(await codeOf(() => device.write(0, page('noise', 2)))).toBe('TMEM_IO')
      expect(await codeOf(() => device.write(4096, page('noise', 3)))).toBe('TMEM_IO')
      expect(await codeOf(() => device.write(4096 + 512, new Uint8Array(512)))).toBe('TMEM_IO')
      expect(await codeOf(() => device.write(0, bytesOf('noise', 3 * 4096, 4)))).toBe('TMEM_IO')
      expectBytes(
        await contentOf(device, 0, 3 * 4096),
        Buffer.concat([page('text'), page('noise', 1), new Uint8Array(4096)]),
      )
      expect(device.ramzswapStats().failed_writes).toBe(6)
      expectSums(device.stats())
      file.failWrite = () => undefined
      void device.write(0, page('noise', 5))
      expectBytes(await contentOf(device, 0, 4096), page('noise', 5))
      await device.close()
    }
  })

  test('why a write failed is the cause of its error, also below another layer', async () => {
    const causeOf = async (use: () => Completion | Promise<number>): Promise<unknown> => {
      try {
        await use()
      } catch (error) {
        return ((error as Error).cause as { code?: string }).code
      }
      return 'none'
    }
    for (const code of ['EIO', 'ENOSPC', 'EDQUOT']) {
      const { device, file } = withFile()
      await device.write(8192, page('text'))
      file.failWrite = () => systemError(code)
      expect(await causeOf(() => device.write(0, page('noise', 2)))).toBe(code)
      expect(await causeOf(() => device.write(0, bytesOf('noise', 3 * 4096, 4)))).toBe(code)
      expect(await causeOf(() => device.write(512, bytesOf('noise', 512, 4)))).toBe('none')
      expect(await causeOf(() => device.writeback({ pageIndex: 2 }))).toBe(code)
      await device.close()
    }
  })

  test('a page that cannot be read is an error, counted, and heals when it is overwritten', async () => {
    const { device, file } = withFile()
    void device.write(0, bytesOf('noise', 8192, 1))
    file.failRead = failsFirst('EIO')
    expect(await codeOf(() => device.read(0, new Uint8Array(8192)))).toBe('TMEM_IO')
    expect(await codeOf(() => device.write(512, new Uint8Array(512)))).toBe('TMEM_IO')
    expect(device.ramzswapStats().failed_reads).toBe(2)
    expectBytes(await contentOf(device, 4096, 4096), bytesOf('noise', 8192, 1).subarray(4096))
    await device.write(0, page('text'))
    expectBytes(await contentOf(device, 0, 4096), page('text'))
    await device.close()
  })

  test('bytes that come back altered are an error, never data', async () => {
    // The boundary of the model would stop a place that lies.
    const { device, file } = withFile({ check: 'arguments' })
    void device.write(0, page('noise'))
    file.content[4096 + 77]! ^= 1
    expect(await codeOf(() => device.read(0, new Uint8Array(4096)))).toBe('TMEM_CORRUPT')
    expect(await codeOf(() => device.read(512, new Uint8Array(512)))).toBe('TMEM_CORRUPT')
    await device.close()
  })

  test('a full device can be overwritten in place, also page by page', async () => {
    const { device } = withFile()
    void device.write(0, bytesOf('noise', sizeBytes, 1))
    void device.write(0, bytesOf('noise', sizeBytes, 2))
    const wanted = bytesOf('noise', sizeBytes, 2)
    for (const n of [0, 5, 63]) {
      void device.write(n * 4096, page('noise', n))
      wanted.set(page('noise', n), n * 4096)
    }
    await device.write(512, new Uint8Array(512).fill(7))
    wanted.fill(7, 512, 1024)
    expectBytes(await contentOf(device), wanted)
    expect(device.ramzswapStats().failed_writes).toBe(0)
    expectSums(device.stats())
    await device.close()
  })

  test('also on a full and failing device an overwrite that fails leaves the old page', async () => {
    const { device, file } = withFile()
    void device.write(0, bytesOf('noise', sizeBytes, 1))
    file.failWrite = () => systemError('EIO')
    expect(await codeOf(() => device.write(0, page('noise', 2)))).toBe('TMEM_IO')
    expect(await codeOf(() => device.write(4096, bytesOf('noise', 8192, 3)))).toBe('TMEM_IO')
    expect(await codeOf(() => device.write(0, new Uint8Array(512)))).toBe('TMEM_IO')
    expect(section(device.stats(), 'slots')['lost']).toBe(0)
    expectSums(device.stats())
    expectBytes(await contentOf(device), bytesOf('noise', sizeBytes, 1))
    file.failWrite = () => undefined
    void device.write(0, page('text', 3))
    expectBytes(await contentOf(device, 0, 4096), page('text', 3))
    expectSums(device.stats())
    await device.close()
  })

  test('a page lost on a full and failing swap area reads as an error until it is overwritten or discarded', async () => {
    // An area made with mkswap has no slot to spare: the old page's is the one for the new page.
    const { layers, file } = backingFile(pages, true)
    const device = ramzswap({ name: 'dev', sizeBytes, stack: layers })
    void device.write(0, bytesOf('noise', sizeBytes, 1))
    void device.write(0, page('noise', 2))
    expectBytes(await contentOf(device, 0, 4096), page('noise', 2))
    file().failWrite = () => systemError('EIO')
    for (const slot of [0, 1]) expect(await codeOf(() => device.write(slot * 4096, page('noise', 3)))).toBe('TMEM_IO')
    expect(await codeOf(() => device.read(0, new Uint8Array(4096)))).toBe('TMEM_IO')
    expect(await codeOf(() => device.write(0, new Uint8Array(512)))).toBe('TMEM_IO')
    expect(section(device.stats(), 'slots')['lost']).toBe(1)
    expectSums(device.stats())
    file().failWrite = () => undefined
    void device.write(0, page('noise', 4))
    expectBytes(await contentOf(device, 0, 4096), page('noise', 4))
    await device.discard(4096, 4096)
    expectBytes(await contentOf(device, 4096, 4096), new Uint8Array(4096))
    expect(section(device.stats(), 'slots')['lost']).toBe(0)
    expectSums(device.stats())
    await device.close()
  })

  test('every allocation fails once: the device does not open, or nothing acknowledged is lost', async () => {
    const workload = async (device: Ramzswap): Promise<void> => {
      const wanted = new Uint8Array(sizeBytes)
      for (let n = 0; n < pages; n++) {
        const bytes = page((['text', 'noise', 'half', 'zero'] as const)[n % 4]!, n)
        await device.write(n * 4096, bytes)
        wanted.set(bytes, n * 4096)
      }
      await device.write(512, new Uint8Array(8192).fill(3))
      wanted.fill(3, 512, 512 + 8192)
      device.idle('all')
      await device.writeback('idle', 8)
      device.tick({ pages: 100 })
      expectBytes(await contentOf(device), wanted)
      expectSums(device.stats())
    }
    const allocator = failingAllocator(systemAllocator)
    let runs = 0
    let notOpened = 0
    for (let nth = 1; ; nth++) {
      allocator.fail({ nth })
      runs++
      let opened: ReturnType<typeof withFile> | undefined
      const code = await codeOf(() => {
        opened = withFile({ allocator })
      })
      if (opened === undefined) {
        same(code, 'TMEM_NO_MEMORY')
        notOpened++
        continue
      }
      await workload(opened.device)
      await opened.device.close()
      expect(opened.file.closed).toBe(true)
      if (allocator.failures === 0) break
    }
    expect(notOpened).toBeGreaterThan(8)
    expect(runs).toBeGreaterThan(notOpened + 1)
    expect([...allocator.sites.keys()]).toEqual(expect.arrayContaining(['ramzswap.table', 'ramzswap.pages']))
  })
})

describe('what zram added', () => {
  test('a writeback limit that is lowered while pages are written is used up, not unlimited', async () => {
    const { device, file } = withFile()
    for (let n = 0; n < 8; n++) void device.write(n * 4096, page('text', n))
    device.idle('all')
    device.writebackLimit = 3
    file.beforeWrite = async () => {
      device.writebackLimit = 1
    }
    // Two at once keep to it together.
    const moved = await Promise.all([device.writeback('idle'), device.writeback('idle')])
    expect(moved).toEqual([3, 0])
    expect(device.writebackLimit).toBe(0)
    expect(await device.writeback('idle')).toBe(0)
    await device.close()
  })

  test('writeback moves huge, idle or single pages, within its limit, many to a write', async () => {
    const { layers, file } = backingFile(pages)
    const stack = [...compressed(), ...room(pages), ...layers]
    const device = ramzswap({ name: 'dev', sizeBytes, stack, check: 'model' })
    for (let n = 0; n < 8; n++) void device.write(n * 4096, page(n < 4 ? 'noise' : 'text', n))
    expect([0, 4].map((slot) => device.blockState(slot))).toEqual(['h', ''])
    const { writes } = file()
    device.writebackLimit = 3
    expect(await device.writeback('huge')).toBe(3)
    expect(file().writes - writes).toBe(1)
    expect(device.writebackLimit).toBe(0)
    expect(await device.writeback('huge')).toBe(0)
    device.writebackLimit = undefined
    expect(await device.writeback('idle')).toBe(0)
    expect(device.idle('all')).toBe(8)
    await device.read(4 * 4096, new Uint8Array(512))
    expect([1, 3, 4, 5].map((slot) => device.blockState(slot))).toEqual(['whi', 'hi', '', 'i'])
    expect(await device.writeback('huge_idle')).toBe(1)
    expect(await device.writeback('idle', 2)).toBe(2)
    expect(await device.writeback({ pageIndex: 4 })).toBe(1)
    expect(await device.writeback({ pageIndex: 4 })).toBe(0)
    expect(await device.writeback({ pageIndex: 40 })).toBe(0)
    expect(section(device.stats(), 'bd_stat')).toMatchObject({ bd_count: 7, bd_writes: 7, writeback_limit_enable: 0 })
    for (let n = 0; n < 8; n++) expectBytes(await contentOf(device, n * 4096, 4096), page(n < 4 ? 'noise' : 'text', n))
    expect(section(device.stats(), 'bd_stat')['bd_reads']).toBe(7)
    expectSums(device.stats())
    await device.close()
  })

  test('huge pages are found, and counted right, in a stack that ends in a file', async () => {
    const stack = [zcache({ limitBytes: 2 ** 20 }), ...backingFile(pages).layers]
    const device = ramzswap({ name: 'dev', sizeBytes, stack, check: 'model' })
    for (let n = 0; n < 12; n++) void device.write(n * 4096, page(n % 3 === 0 ? 'noise' : 'text', n))
    expect(section(device.stats(), 'mm_stat')).toMatchObject({ huge_pages: 4, huge_pages_since: 4 })
    expect(await device.writeback('huge')).toBe(4)
    expect([0, 1, 3].map((slot) => device.blockState(slot))).toEqual(['wh', '', 'wh'])
    expect(section(device.stats(), 'mm_stat')).toMatchObject({ huge_pages: 0, huge_pages_since: 4 })
    expect(section(device.stats(), 'bd_stat')).toMatchObject({ bd_count: 4, bd_writes: 4 })
    // What is read rises, and is huge there again.
    await device.read(0, new Uint8Array(4096))
    expect(device.blockState(0)).toBe('h')
    expect(section(device.stats(), 'mm_stat')).toMatchObject({ huge_pages: 1, huge_pages_since: 4 })
    void device.write(0, page('text', 1))
    expect(section(device.stats(), 'mm_stat')).toMatchObject({ huge_pages: 0, huge_pages_since: 4 })
    expectSums(device.stats())
    await device.close()
  })

  const small = { limitBytes: 2 ** 20, recompress: 'deflate' as const }
  test.each([
    ['zcache > file', () => [zcache(small)], 8],
    ['zcache > memory > file', () => [zcache(small), memory({ limitBytes: 2 ** 20 })], 8],
    ['zcache > zcache > file', () => [zcache({ limitBytes: 2 ** 20 }), zcache(small)], 0],
    ['memory > zcache > file', () => [memory({ limitBytes: 2 ** 16 }), zcache(small)], 1],
    ['memory > file', () => [memory({ limitBytes: 2 ** 20 })], 0],
  ])('huge is one thing in every stack: %s', async (_name, layers, triedAtLeast) => {
    const device = ramzswap({
      name: 'dev',
      sizeBytes,
      stack: [...layers(), ...backingFile(pages).layers],
      check: 'model',
    })
    // Noise of six bits, which LZ4 does not shrink and deflate does.
    const contents = Array.from({ length: 24 }, (_, n) =>
      n % 3 === 0 ? page('noise', n).map((byte) => byte & 63) : page(n % 3 === 1 ? 'noise' : 'text', n),
    )
    for (const [n, content] of contents.entries()) await device.write(n * 4096, content)
    const states = (): string[] => contents.map((_, n) => device.blockState(n))
    const agree = (): number => {
      const inMemory = states().filter((state) => state.includes('h') && !state.includes('w')).length
      expect(section(device.stats(), 'mm_stat')['huge_pages']).toBe(inMemory)
      expect(section(device.stats(), 'slots')['uncompressed']).toBe(inMemory)
      return inMemory
    }
    expect(agree()).toBeGreaterThanOrEqual(16)
    const before = section(device.stats(), 'slots')
    const shrunk = triedAtLeast === 0 ? 0 : await device.recompress({ type: 'huge' })
    const after = section(device.stats(), 'slots')
    expect(after['recompressed']! - before['recompressed']!).toBe(shrunk)
    expect(shrunk).toBeGreaterThanOrEqual(triedAtLeast)
    const left = agree()
    expect(left).toBe(before['uncompressed']! - shrunk)
    device.idle('all')
    await device.read(0, new Uint8Array(4096))
    await device.read(4096, new Uint8Array(4096))
    const touched = states()
      .slice(0, 2)
      .filter((state) => state === 'h' || state === 'hn').length
    expect(await device.writeback('huge_idle')).toBe(left - touched)
    expect(await device.writeback('huge')).toBe(touched)
    expect(agree()).toBe(0)
    expect(section(device.stats(), 'bd_stat')['bd_count']).toBe(left)
    for (const [n, content] of contents.entries()) expectBytes(await contentOf(device, n * 4096, 4096), content)
    expectSums(device.stats())
    await device.close()
  })

  test('requests have their turn while pages are moved, and what they change is kept', async () => {
    const many = 400
    const stack = [zcache({ limitBytes: 2 ** 21, recompress: 'deflate' }), ...backingFile(many).layers]
    const device = ramzswap({ name: 'dev', sizeBytes: many * 4096, stack, check: 'model' })
    for (let n = 0; n < many; n++) void device.write(n * 4096, page('half', n))
    for (const [move, counter] of [
      [() => device.recompress(), 'recompressed'],
      [() => device.writeback('idle'), 'backing'],
    ] as const) {
      device.idle('all')
      const moved = move()
      const seen: number[] = []
      for (let n = 0; n < 3; n++) {
        await new Promise((resolve) => setImmediate(resolve))
        seen.push(section(device.stats(), 'slots')[counter]!)
      }
      expect(seen[2]).toBeLessThan(many)
      // Behind, and far ahead of what is being moved.
      void device.write(0, page('noise', many))
      void device.discard((many - 1) * 4096, 4096)
      const count = await moved
      expect(count).toBeGreaterThan(many / 2)
      expect(section(device.stats(), 'slots')[counter]).toBeGreaterThan(many / 2)
      expectBytes(await contentOf(device, 0, 4096), page('noise', many))
      for (let n = 1; n < many - 1; n++) expectBytes(await contentOf(device, n * 4096, 4096), page('half', n))
      expectBytes(await contentOf(device, (many - 1) * 4096, 4096), new Uint8Array(4096))
      expectSums(device.stats())
    }
    await device.close()
  })

  test('a device that is closed while pages are moved says so', async () => {
    const many = 200
    const stack = [...compressed(), ...backingFile(many).layers]
    const device = ramzswap({ name: 'dev', sizeBytes: many * 4096, stack })
    for (let n = 0; n < many; n++) void device.write(n * 4096, page('text', n))
    device.idle('all')
    const moved = codeOf(() => device.writeback('idle'))
    await Promise.resolve()
    await device.close()
    expect(await moved).toBe('TMEM_CLOSED')
  })

  test('writeback that fails leaves the page where it was', async () => {
    const { device, file } = withFile()
    void device.write(0, page('text'))
    file.failWrite = () => systemError('ENOSPC')
    expect(await codeOf(() => device.writeback({ pageIndex: 0 }))).toBe('TMEM_IO')
    expect(device.blockState(0)).toBe('')
    expectBytes(await contentOf(device, 0, 4096), page('text'))
    await expect(() => device.writeback({ pageIndex: pages })).rejects.toThrow(RangeError)
    expectSums(device.stats())
    await device.close()
  })

  test('idle knows ages when there is a clock', async () => {
    let now = 100_000
    const { device } = withFile({ clock: () => now })
    void device.write(0, page('text'))
    now = 110_000
    void device.write(4096, page('text'))
    now = 120_000
    expect(device.idle(15)).toBe(1)
    expect([device.blockState(0), device.blockState(1)]).toEqual(['i', ''])
    void device.read(0, new Uint8Array(512))
    expect(device.idle(15)).toBe(0)
    expect(device.idle(10)).toBe(1)
    await device.close()
    expect(await codeOf(() => withFile().device.idle(5))).toBe('TMEM_UNSUPPORTED')
  })

  test('ages count the pages of each place by when they were touched, and looking is no touch', async () => {
    let now = 0
    const { device } = withFile({ clock: () => now })
    void device.write(0, page('text'))
    void device.write(4096, page('zero'))
    await device.writeback({ pageIndex: 0 })
    now = 5_000
    void device.write(8192, page('text', 2))
    now = 10_500
    const all = { bounds: [1, 10, 60, 600, 3600, 86_400], seen: 3 }
    for (let look = 0; look < 2; look++) {
      const ages = device.ages()!
      expect(ages).toMatchObject(all)
      expect(Object.fromEntries(ages.places.map(({ name, pages: counts }) => [name, counts]))).toEqual({
        directory: [0, 0, 1, 0, 0, 0, 0],
        zcache: [0, 1, 0, 0, 0, 0, 0],
        frontswap: [0, 0, 1, 0, 0, 0, 0],
      })
    }
    void device.read(8192, new Uint8Array(512))
    now = 200_000_000
    expect(device.ages()!.places.map(({ pages: counts }) => counts.at(-1))).toEqual([1, 1, 1])
    // A sample: no more slots than were asked for.
    for (let n = 0; n < pages; n++) void device.write(n * 4096, page('text', n))
    expect(device.ages(16)!.seen).toBe(16)
    expect(device.ages(16)).toEqual(device.ages(16))
    await device.close()
    expect(withFile().device.ages()).toBeUndefined()
  })

  test('recompress keeps what becomes smaller, and marks the rest', async () => {
    const stack = [zcache({ limitBytes: 2 ** 20, recompress: 'deflate' }), ...backingFile(pages).layers]
    const device = ramzswap({ name: 'dev', sizeBytes, stack, check: 'model' })
    for (let n = 0; n < 6; n++) void device.write(n * 4096, page((['half', 'noise', 'text'] as const)[n % 3]!, n))
    const before = device.ramzswapStats().compr_data_size
    expect(await device.recompress({ type: 'idle' })).toBe(0)
    expect(await device.recompress({ type: 'huge', maxPages: 1 })).toBe(0)
    expect([1, 4].map((slot) => device.blockState(slot))).toEqual(['hn', 'h'])
    expect(await device.recompress({ thresholdBytes: 1500 })).toBe(2)
    expect([0, 3, 4].map((slot) => device.blockState(slot))).toEqual(['r', 'r', 'hn'])
    expect(device.ramzswapStats().compr_data_size).toBeLessThan(before)
    expect(section(device.stats(), 'slots')).toMatchObject({ recompressed: 2, recompress_poor: 2 })
    expect(await device.recompress({ type: 'huge' })).toBe(0)
    expect(section(device.stats(), 'slots')['recompress_poor']).toBe(2)
    expect(await device.writeback('incompressible')).toBe(2)
    for (let n = 0; n < 6; n++)
      expectBytes(await contentOf(device, n * 4096, 4096), page((['half', 'noise', 'text'] as const)[n % 3]!, n))
    expectSums(device.stats())
    expect(await codeOf(() => withFile().device.recompress())).toBe('TMEM_UNSUPPORTED')
    await device.close()
  })

  test('compact gives memory back', async () => {
    const stack = [zcache({ limitBytes: 2 ** 22 }), ...room(1024)]
    const device = ramzswap({ name: 'dev', sizeBytes: 2 ** 22, stack })
    for (let n = 0; n < 1024; n++) void device.write(n * 4096, page('half', n))
    for (let n = 0; n < 1024; n++) if (n % 8 !== 0) void device.discard(n * 4096, 4096)
    const before = device.ramzswapStats().mem_used_total
    let moved = 0
    for (let done = device.compact(64); done > 0; done = device.compact(64)) moved += done
    device.tick({ pages: 100 })
    expect(moved).toBeGreaterThan(10)
    expect(device.ramzswapStats().mem_used_total).toBeLessThan(before / 2)
    expect(section(device.stats(), 'mm_stat')['pages_compacted']).toBeGreaterThanOrEqual(moved)
    for (let n = 0; n < 1024; n += 8) expectBytes(await contentOf(device, n * 4096, 4096), page('half', n))
    await device.close()
  })

  test('mm_stat agrees with what the places use', async () => {
    const { device } = withFile()
    void device.write(0, bytesOf('text', sizeBytes, 1))
    const tree = device.stats()
    const zcacheTree = tree.children
      .find(({ name }) => name === 'chain')!
      .children.find(({ name }) => name === 'zcache')!
    expect(section(tree, 'mm_stat')).toMatchObject({
      orig_data_size: sizeBytes,
      compr_data_size: zcacheTree.counters['zbytes'],
      mem_used_total: zcacheTree.counters['used_bytes'],
      mem_used_max: zcacheTree.counters['used_bytes'],
    })
    await device.discard(0, sizeBytes)
    for (let n = 0; n < 100; n++) device.tick({ pages: 100 })
    const after = section(device.stats(), 'mm_stat')
    expect(after['compr_data_size']).toBe(0)
    expect(after['mem_used_max']).toBeGreaterThanOrEqual(after['mem_used_total']!)
    await device.close()
  })

  test('somebody is told when there is background work', async () => {
    let woken = 0
    const stack = [zcache({ limitBytes: 256 * 1024 }), ...backingFile(256).layers]
    const device = ramzswap({ name: 'dev', sizeBytes: 2 ** 20, stack, wake: () => woken++ })
    for (let n = 0; n < 8; n++) void device.write(n * 4096, page('noise', n))
    expect(woken).toBe(0)
    for (let n = 0; n < 50; n++) void device.write(n * 4096, page('noise', n))
    expect(woken).toBe(1)
    expect(device.tick({ pages: 64 }).pages).toBeGreaterThan(0)
    await device.close()
  })
})

/** A place that keeps pages beyond its own end: what an earlier run has left, and whether it was synced. */
function surviving(): { layer: Layer; syncs: () => number } {
  const { layers } = backingFile(pages)
  const { place } = layers[0]!
  const traits = { ...place!.traits, survives: 'host' as const }
  const kept = new Map<number, { location: number; units: number }>()
  let syncs = 0
  let inner: SlowPlace | undefined
  const open = (context: LayerContext): SlowPlace => {
    inner ??= place!.open(context) as SlowPlace
    const below = inner
    let owners: Owners
    return {
      name: below.name,
      traits,
      unitBytes: below.unitBytes,
      flightBytes: below.flightBytes,
      open: (forced) => below.open(forced),
      attach: (given) => {
        owners = given
      },
      write: (flight) => Promise.resolve(below.writeNow!(flight)).then(() => note(flight)),
      writeNow: (flight) => {
        below.writeNow!(flight)
        note(flight)
      },
      read: (location, units, into) => below.read(location, units, into),
      free: (location, units) => {
        for (const [index, one] of kept) if (one.location === location) kept.delete(index)
        below.free(location, units)
      },
      forget: () => undefined,
      recover: (_pool, enter) => {
        for (const [index, { location, units }] of kept) enter(0, index, location, units)
      },
      sync: async () => {
        syncs++
      },
      stats: () => below.stats(),
      close: () => Promise.resolve(),
    }
    function note(flight: Flight): void {
      for (let n = 0; n < flight.count; n++)
        kept.set(owners.indexOf(flight.owners[n]!), { location: flight.locations[n]!, units: flight.units[n]! })
    }
  }
  return { layer: { name: 'frontswap', place: { traits, open } }, syncs: () => syncs }
}

test('over a place that survives its process a flush syncs, and the pages are there again', async () => {
  const { layer, syncs } = surviving()
  const options = { name: 'dev', sizeBytes, maxSizeBytes: sizeBytes, stack: [layer] }
  const first = ramzswap(options)
  for (const n of [0, 5, 63]) void first.write(n * 4096, page('noise', n))
  await first.flush()
  expect(syncs()).toBe(1)
  await first.close()
  const smaller = ramzswap({ ...options, sizeBytes: sizeBytes - 4096 })
  expectBytes(await contentOf(smaller, 0, 4096), page('noise', 0))
  expectBytes(await contentOf(smaller, 5 * 4096, 4096), page('noise', 5))
  expectBytes(await contentOf(smaller, 4096, 4096), new Uint8Array(4096))
  expect(section(smaller.stats(), 'slots')).toMatchObject({ backing: 2, empty: pages - 3, lost: 0 })
  smaller.resize(sizeBytes)
  expectBytes(await contentOf(smaller, 63 * 4096, 4096), new Uint8Array(4096))
  await smaller.close()
})

describe('virtswap', () => {
  const make = (hypervisor: Layer[], more: Partial<RamzswapOptions> = {}) =>
    virtswap({
      name: 'vs',
      sizeBytes,
      stack: [...hypervisor, ...compressed(), ...backingFile(pages).layers],
      check: 'model',
      ...more,
    })

  test('each page is offered to the hypervisor first, uncompressed; what it refuses stays in the guest', async () => {
    const device = make([moody(room(pages)[0]!)])
    for (let n = 0; n < 9; n++) void device.write(n * 4096, page(n === 5 ? 'noise' : 'text', n))
    expect(section(device.stats(), 'slots')).toMatchObject({ hypervisor: 6, compressed: 2, backing: 1 })
    expect(device.ramzswapStats()).toMatchObject({ pages_stored: 2, orig_data_size: 8192, pages_expand_pct: 0 })
    expect(section(device.stats(), 'mm_stat')).toMatchObject({ huge_pages: 0, huge_pages_since: 1 })
    for (let n = 0; n < 9; n++)
      expectBytes(await contentOf(device, n * 4096, 4096), page(n === 5 ? 'noise' : 'text', n))
    expectSums(device.stats())
    await device.close()
  })

  test('when its memory is full, the coldest pages come to the guest', async () => {
    const device = make(room(8))
    for (let n = 0; n < 20; n++) void device.write(n * 4096, page('text', n))
    const { hypervisor, compressed: own } = section(device.stats(), 'slots')
    expect(hypervisor).toBeGreaterThan(4)
    expect(own).toBe(20 - hypervisor!)
    // The first came first, and was not used.
    expect([device.blockState(0), device.blockState(19)]).toEqual(['', 'h'])
    for (let n = 0; n < 20; n++) expectBytes(await contentOf(device, n * 4096, 4096), page('text', n))
    expectSums(device.stats())
    await device.close()
  })

  test('a memlimit does not count what is with the hypervisor, which is not sure to be there', async () => {
    expect(() => virtswap({ name: 'vs', sizeBytes, stack: room(pages) })).toThrow(/it needs room for all of its 262144/)
    const device = make(room(32), { memlimitBytes: 5000 })
    for (let n = 0; n < 32; n++) void device.write(n * 4096, page('text', n))
    expect(section(device.stats(), 'slots')).toMatchObject({ hypervisor: 32 })
    expect(await device.recall()).toBe(32)
    const { compressed: own, backing } = section(device.stats(), 'slots')
    expect([own! > 5, backing! > 5, own! + backing!]).toEqual([true, true, 32])
    expectSums(device.stats())
    await device.close()
  })

  test('recalled pages come back compressed, or go to the backing file', async () => {
    const device = make(room(pages))
    for (let n = 0; n < 10; n++) void device.write(n * 4096, page(n % 5 === 0 ? 'noise' : 'text', n))
    expect(section(device.stats(), 'slots')).toMatchObject({ hypervisor: 10, compressed: 0, backing: 0 })
    expect(await device.recall(4)).toBe(4)
    expect(section(device.stats(), 'slots')).toMatchObject({ hypervisor: 6, compressed: 3, backing: 1, recalled: 4 })
    expect(device.ramzswapStats().good_compress_pct).toBe(100)
    expect(await device.recall()).toBe(6)
    for (let n = 0; n < 10; n++)
      expectBytes(await contentOf(device, n * 4096, 4096), page(n % 5 === 0 ? 'noise' : 'text', n))
    expectSums(device.stats())
    await device.close()
  })

  test('a page that nobody here takes stays with the hypervisor', async () => {
    const backing = backingFile(pages)
    const device = make([], { stack: [...room(pages), ...compressed(), ...backing.layers] })
    void device.write(0, page('noise'))
    backing.file().failWrite = () => systemError('EIO')
    expect(await device.recall()).toBe(0)
    expect(section(device.stats(), 'slots')).toMatchObject({ hypervisor: 1, recall_failed: 1 })
    expectBytes(await contentOf(device, 0, 4096), page('noise'))
    await device.close()
  })
})

/** Memory that refuses every third page. */
function moody({ name, place }: Layer): Layer {
  return {
    name,
    place: {
      traits: place!.traits,
      open: (context) => {
        const below = place!.open(context) as MemoryPlace
        let puts = 0
        return {
          name,
          traits: below.traits,
          get limitBytes() {
            return below.limitBytes
          },
          get usedBytes() {
            return below.usedBytes
          },
          prepare: (length) => below.prepare?.(length),
          put: (block, owner) => (++puts % 3 === 0 ? -PutOutcome.Policy : below.put(block, owner)),
          get: (location, into) => below.get(location, into),
          free: (location, length, pageBytes) => below.free(location, length, pageBytes),
          sizeOf: (length) => below.sizeOf(length),
          excess: () => below.excess(),
          charge: (bytes) => below.charge(bytes),
          stats: () => below.stats(),
          close: () => below.close(),
        }
      },
    },
  }
}
