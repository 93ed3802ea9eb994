/**
 * `tmem bench core`: the store of plain memory against the copy of a page to a random place.
 *
 * The reference is the fastest way that JavaScript has to copy a page into, or out of, a random place of as much memory
 * as the store holds: `set`, `Buffer.copy` and `copyWithin` are all measured, in the same rounds, and the fastest of
 * them counts. Both sides see the same random order, in which no page comes twice, and take turns one by one, so that
 * each begins with the other's memory in the caches and in the processor's address translation. The store is used as
 * everybody uses it: composed, with its checked boundary.
 */
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { basePageSize, compose, PageBatch, type PageStore, type Pool, PutOutcome } from '@tmem/core'
import { memory } from '@tmem/memory'
import { LRUCache } from 'lru-cache'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type Bench, type Row, ratioRow, type Subject, type Suite, skippedRow, valueRow } from './frame.ts'
import { measureMemcpy } from './memcpy.ts'
import { threadRows } from './threads.ts'

/** The suite. */
export const core: Suite = {
  name: 'core',
  summary: 'the store of plain memory: put, get and miss against copies of a page to random places',
  run: coreRows,
}

const small = 100_000
const large = 1_000_000

async function coreRows(bench: Bench): Promise<readonly Row[]> {
  return [
    ...(await residentRows(bench, small, { putNew: 1.4, putReplace: 1.25, get: 1.2, absent: 0.15 })),
    ...(await mapRows(bench)),
    ...(await largePageRows(bench)),
    ...(await batchRows(bench)),
    ...(bench.quick
      ? [skippedRow('resident-4k-1000k', 'a quick run does not fill 4 GiB')]
      : await residentRows(bench, large, { putNew: 1.4, putReplace: 1.4, get: 1.4, absent: 1.4 })),
    ...(await firstTouchRows(bench)),
    ...(await refusalRows(bench)),
    ...(await steadyRows(bench)),
    ...(await pauseRows(bench)),
    ...(await threadRows(bench)),
    ...(await measureMemcpy(bench)),
  ]
}

/** A random order of the numbers below `count`, the same for every run. */
export function randomOrder(count: number, length: number): Uint32Array {
  const order = new Uint32Array(length)
  let seed = 0x2545f491
  for (let i = 0; i < length; i++) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
    order[i] = Math.floor((seed / 2 ** 32) * count)
  }
  return order
}

/** A random order in which no number comes twice. */
function shuffled(count: number, length: number): Uint32Array {
  const all = new Uint32Array(count)
  for (let i = 0; i < count; i++) all[i] = i
  let seed = 0x9e3779b9
  for (let i = 0; i < length; i++) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
    const other = i + Math.floor((seed / 2 ** 32) * (count - i))
    const held = all[i]
    all[i] = all[other]
    all[other] = held
  }
  return all.slice(0, length)
}

function openStore(pages: number, pageSize: number = basePageSize): { store: PageStore; pool: Pool } {
  const bytes = Math.ceil(pages * (pageSize + 96 * (pageSize / basePageSize))) + 2 ** 20
  const store = compose([memory({ limitBytes: bytes })])
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize })
  if (typeof pool === 'number') throw new Failed(`bench core: the store refused the pool (${pool})`)
  return { store, pool }
}

function fill(pool: Pool, pages: number): void {
  const page = new Uint8Array(pool.attributes.pageSize).fill(7)
  for (let index = 0; index < pages; index++)
    if (pool.put(0, index, page) !== PutOutcome.Stored)
      throw new Failed(`bench core: the store refused page ${index} of ${pages}`)
}

/** Pages at random places of plain buffers, touched, as chunks: a single buffer of 4 GiB is slower to index. */
class PlainPages {
  static readonly chunkShift = 14
  readonly chunks: Buffer[] = []

  constructor(pages: number) {
    for (let first = 0; first < pages; first += 1 << PlainPages.chunkShift)
      this.chunks.push(Buffer.alloc(basePageSize << PlainPages.chunkShift, 1))
  }
}

const chunkMask = (1 << PlainPages.chunkShift) - 1

function copyInSubjects({ chunks }: PlainPages, order: Uint32Array): Record<'set' | 'copy' | 'copyWithin', Subject> {
  const page = new Uint8Array(basePageSize).fill(7)
  const buffer = Buffer.from(page.buffer)
  return {
    set: {
      run(operations) {
        for (let pass = 0; pass < operations; pass += order.length)
          for (let i = 0; i < order.length; i++)
            chunks[order[i] >> PlainPages.chunkShift].set(page, (order[i] & chunkMask) * basePageSize)
      },
    },
    copy: {
      run(operations) {
        for (let pass = 0; pass < operations; pass += order.length)
          for (let i = 0; i < order.length; i++)
            buffer.copy(
              chunks[order[i] >> PlainPages.chunkShift],
              (order[i] & chunkMask) * basePageSize,
              0,
              basePageSize,
            )
      },
    },
    copyWithin: {
      run(operations) {
        // The source is always the first page of the same chunk.
        for (let pass = 0; pass < operations; pass += order.length)
          for (let i = 0; i < order.length; i++)
            chunks[order[i] >> PlainPages.chunkShift].copyWithin((order[i] & chunkMask) * basePageSize, 0, basePageSize)
      },
    },
  }
}

function copyOutSubjects({ chunks }: PlainPages, order: Uint32Array): Record<'outSet' | 'outCopy', Subject> {
  const into = new Uint8Array(basePageSize)
  return {
    outSet: {
      run(operations) {
        for (let pass = 0; pass < operations; pass += order.length)
          for (let i = 0; i < order.length; i++) {
            const at = (order[i] & chunkMask) * basePageSize
            into.set(chunks[order[i] >> PlainPages.chunkShift].subarray(at, at + basePageSize))
          }
      },
    },
    outCopy: {
      run(operations) {
        for (let pass = 0; pass < operations; pass += order.length)
          for (let i = 0; i < order.length; i++) {
            const at = (order[i] & chunkMask) * basePageSize
            chunks[order[i] >> PlainPages.chunkShift].copy(into, 0, at, at + basePageSize)
          }
      },
    },
  }
}

const fastest = (candidates: Readonly<Record<string, number>>): [string, number] =>
  Object.entries(candidates).reduce((best, next) => (next[1] < best[1] ? next : best))

/** Put, get and miss with so many pages resident. */
async function residentRows(
  bench: Bench,
  pages: number,
  goals: { putNew: number; putReplace: number; get: number; absent: number },
): Promise<Row[]> {
  const operations = bench.quick ? 20_000 : 400_000
  const { store, pool } = openStore(pages)
  try {
    fill(pool, pages)
    const plain = new PlainPages(pages)
    const order = shuffled(pages, Math.min(pages, operations))
    const few = order.slice(0, bench.quick ? 20_000 : 50_000)
    const copyFew = copyInSubjects(plain, few)
    const page = new Uint8Array(basePageSize).fill(9)
    const into = new Uint8Array(basePageSize)
    const copyIntoPlain = copyInSubjects(plain, order)
    const copyOutOfPlain = copyOutSubjects(plain, order)
    const fresh = await bench.measure(
      `core: new pages, ${pages} of 4 KiB`,
      {
        set: copyFew.set,
        putNew: {
          prepare(count) {
            for (let i = 0; i < count; i++) pool.flushPage(0, few[i])
          },
          run(count) {
            for (let i = 0; i < count; i++) pool.put(0, few[i], page)
          },
        },
        copy: copyFew.copy,
      },
      { operations: few.length, ...(bench.quick ? {} : { rounds: 15, warmup: 10 }) },
    )
    // Long turns, so that the first touch of the other side's memory is a small part of each.
    const ns = await bench.measure(
      `core: ${pages} pages of 4 KiB`,
      {
        set: copyIntoPlain.set,
        putReplace: {
          run(count) {
            for (let pass = 0; pass < count; pass += order.length)
              for (let i = 0; i < order.length; i++) pool.put(0, order[i], page)
          },
        },
        copy: copyIntoPlain.copy,
        get: {
          run(count) {
            for (let pass = 0; pass < count; pass += order.length)
              for (let i = 0; i < order.length; i++) pool.get(0, order[i], into)
          },
        },
        copyWithin: copyIntoPlain.copyWithin,
        miss: {
          run(count) {
            for (let pass = 0; pass < count; pass += order.length)
              for (let i = 0; i < order.length; i++) pool.get(0, pages + order[i], into)
          },
        },
        outSet: copyOutOfPlain.outSet,
        flush: {
          run(count) {
            for (let pass = 0; pass < count; pass += order.length)
              for (let i = 0; i < order.length; i++) pool.flushPage(0, pages + order[i])
          },
        },
        outCopy: copyOutOfPlain.outCopy,
      },
      { operations },
    )
    const [freshCopy, freshCopyNs] = fastest({ set: fresh.set, 'buffer-copy': fresh.copy })
    const [copyIn, copyInNs] = fastest({ set: ns.set, 'buffer-copy': ns.copy, 'copy-within': ns.copyWithin })
    const [copyOut, copyOutNs] = fastest({ 'set-of-subarray': ns.outSet, 'buffer-copy': ns.outCopy })
    const size = `4k-${pages / 1000}k`
    const counters = store.stats().counters
    return [
      ratioRow(`put-new-${size}`, 'ns/page', fresh.putNew, freshCopy, freshCopyNs, goals.putNew),
      ratioRow(`put-replace-${size}`, 'ns/page', ns.putReplace, copyIn, copyInNs, goals.putReplace),
      ratioRow(`get-hit-${size}`, 'ns/page', ns.get, `${copyOut}-out`, copyOutNs, goals.get),
      ratioRow(`get-miss-${size}`, 'ns/page', ns.miss, `${copyOut}-out`, copyOutNs, goals.absent),
      ratioRow(`flush-absent-${size}`, 'ns/page', ns.flush, `${copyOut}-out`, copyOutNs, goals.absent),
      valueRow(`metadata-${size}`, 'bytes/page', counters.metadata_bytes / counters.pages, 32),
    ]
  } finally {
    await store.close()
  }
}

/** Put and get against what a program would use without us: a Map of buffers, and lru-cache; both copy, too. */
async function mapRows(bench: Bench): Promise<Row[]> {
  const pages = small
  const operations = bench.quick ? 10_000 : 30_000
  const { store, pool } = openStore(pages)
  try {
    fill(pool, pages)
    const map = new Map<number, Buffer>()
    const lru = new LRUCache<number, Buffer>({ maxSize: pages * basePageSize, sizeCalculation: (page) => page.length })
    const page = Buffer.alloc(basePageSize, 9)
    const into = Buffer.alloc(basePageSize)
    for (let index = 0; index < pages; index++) {
      map.set(index, Buffer.from(page))
      lru.set(index, Buffer.from(page))
    }
    const order = randomOrder(pages, operations)
    const once = shuffled(pages, operations)
    const ns = await bench.measure(
      `core: against Map and lru-cache, ${pages} pages`,
      {
        put: {
          prepare(count) {
            for (let i = 0; i < count; i++) pool.flushPage(0, once[i])
          },
          run(count) {
            for (let i = 0; i < count; i++) pool.put(0, once[i], page)
          },
        },
        mapPut: {
          prepare(count) {
            for (let i = 0; i < count; i++) map.delete(once[i])
          },
          run(count) {
            for (let i = 0; i < count; i++) map.set(once[i], Buffer.from(page))
          },
        },
        lruPut: {
          prepare(count) {
            for (let i = 0; i < count; i++) lru.delete(once[i])
          },
          run(count) {
            for (let i = 0; i < count; i++) lru.set(once[i], Buffer.from(page))
          },
        },
        get: {
          run(count) {
            for (let i = 0; i < count; i++) pool.get(0, order[i], into)
          },
        },
        mapGet: {
          run(count) {
            for (let i = 0; i < count; i++) map.get(order[i])?.copy(into)
          },
        },
        lruGet: {
          run(count) {
            for (let i = 0; i < count; i++) lru.get(order[i])?.copy(into)
          },
        },
      },
      { operations },
    )
    return [
      ratioRow('put-new-4k-100k-map', 'ns/page', ns.put, 'map-of-buffers', ns.mapPut, 0.3),
      ratioRow('put-new-4k-100k-lru', 'ns/page', ns.put, 'lru-cache', ns.lruPut, 0.3),
      ratioRow('get-hit-4k-100k-map', 'ns/page', ns.get, 'map-of-buffers', ns.mapGet, 1.5),
      ratioRow('get-hit-4k-100k-lru', 'ns/page', ns.get, 'lru-cache', ns.lruGet, 1.5),
    ]
  } finally {
    await store.close()
  }
}

/** Pages of 2 MiB against copies of 2 MiB. */
async function largePageRows(bench: Bench): Promise<Row[]> {
  const size = 2 * 2 ** 20
  const pages = bench.quick ? 64 : 192
  const operations = bench.quick ? 40 : 150
  const { store, pool } = openStore(pages, size)
  try {
    fill(pool, pages)
    const plain = Array.from({ length: pages }, () => Buffer.alloc(size, 1))
    const page = new Uint8Array(size).fill(9)
    const into = new Uint8Array(size)
    const order = randomOrder(pages, operations)
    const ns = await bench.measure(
      `core: ${pages} pages of 2 MiB`,
      {
        put: {
          run(count) {
            for (let i = 0; i < count; i++) pool.put(0, order[i], page)
          },
        },
        copyIn: {
          run(count) {
            for (let i = 0; i < count; i++) plain[order[i]].set(page)
          },
        },
        get: {
          run(count) {
            for (let i = 0; i < count; i++) pool.get(0, order[i], into)
          },
        },
        copyOut: {
          run(count) {
            for (let i = 0; i < count; i++) into.set(plain[order[i]])
          },
        },
      },
      { operations },
    )
    return [
      ratioRow('put-2m', 'ns/page', ns.put, 'set', ns.copyIn, 1.05),
      ratioRow('get-2m', 'ns/page', ns.get, 'set', ns.copyOut, 1.05),
    ]
  } finally {
    await store.close()
  }
}

/** Batches of 512 pages against the same pages one by one, from and to the same memory: extents, then random pages. */
async function batchRows(bench: Bench): Promise<Row[]> {
  const count = 512 * (bench.quick ? 20 : 60)
  const extents = new Uint32Array(count)
  for (let i = 0; i < count; i++) extents[i] = i
  return [
    ...(await batchRowsOver(bench, 'extents', extents)),
    ...(await batchRowsOver(bench, 'random', shuffled(small, count))),
  ]
}

async function batchRowsOver(bench: Bench, what: string, order: Uint32Array): Promise<Row[]> {
  const perBatch = 512
  const { store, pool } = openStore(small)
  try {
    fill(pool, small)
    const batch = new PageBatch(perBatch, basePageSize, new Uint8Array(perBatch * basePageSize).fill(3))
    const views = Array.from({ length: perBatch }, (_, i) =>
      batch.bytes.subarray(i * basePageSize, (i + 1) * basePageSize),
    )
    const load = (first: number): void => {
      batch.clear()
      for (let i = 0; i < perBatch; i++) batch.push(0, order[first + i])
    }
    const flushAll = (): void => {
      for (let i = 0; i < order.length; i++) pool.flushPage(0, order[i])
    }
    const put: Subject = {
      run(operations) {
        for (let i = 0; i < operations; i++) pool.put(0, order[i], views[i % perBatch])
      },
    }
    const putMany: Subject = {
      run(operations) {
        for (let first = 0; first < operations; first += perBatch) {
          load(first)
          pool.putMany(batch)
        }
      },
    }
    const ns = await bench.measure(
      `core: batches of ${perBatch}, ${what}`,
      {
        putNew: { prepare: flushAll, run: put.run },
        putManyNew: { prepare: flushAll, run: putMany.run },
        put,
        putMany,
        get: {
          run(operations) {
            for (let i = 0; i < operations; i++) pool.get(0, order[i], views[i % perBatch])
          },
        },
        getMany: {
          run(operations) {
            for (let first = 0; first < operations; first += perBatch) {
              load(first)
              pool.getMany(batch)
            }
          },
        },
      },
      { operations: order.length },
    )
    return [
      ratioRow(`batch-512-put-new-${what}`, 'ns/page', ns.putManyNew, 'single-puts', ns.putNew, 0.9),
      ratioRow(`batch-512-put-replace-${what}`, 'ns/page', ns.putMany, 'single-puts', ns.put, 0.9),
      ratioRow(`batch-512-get-${what}`, 'ns/page', ns.getMany, 'single-gets', ns.get, 0.9),
    ]
  } finally {
    await store.close()
  }
}

/** The first use of memory costs the operating system's zeroing; `tick` does that ahead of time. */
async function firstTouchRows(bench: Bench): Promise<Row[]> {
  const pages = bench.quick ? 8_192 : 16_384
  const page = new Uint8Array(basePageSize).fill(7)
  let opened = openStore(pages)
  const reopen = async (ready: boolean): Promise<void> => {
    await opened.store.close()
    opened = openStore(pages)
    if (ready) while (opened.store.tick({ pages: 4096 }).pending);
  }
  const run = (count: number): void => {
    for (let i = 0; i < count; i++) opened.pool.put(0, i, page)
  }
  const ns = await bench.measure(
    'core: first touch',
    { untouched: { prepare: () => reopen(false), run }, ready: { prepare: () => reopen(true), run } },
    { operations: pages },
  )
  await opened.store.close()
  return [ratioRow('put-first-touch-made-ready', 'ns/page', ns.ready, 'untouched-memory', ns.untouched)]
}

/** A refusal by a full store of a hundred times as many pages: what may grow is the cache miss of one lookup. */
async function refusalRows(bench: Bench): Promise<Row[]> {
  const sizes = bench.quick ? [1_000, 100_000] : [10_000, 1_000_000]
  const stores = sizes.map((pages) => openStore(pages))
  try {
    const page = new Uint8Array(basePageSize).fill(7)
    const refuse = ({ pool }: { pool: Pool }): Subject => {
      let index = 0
      while (pool.put(0, index, page) === PutOutcome.Stored) index++
      const first = index
      return {
        run(count) {
          for (let i = 0; i < count; i++) pool.put(0, first + i, page)
        },
      }
    }
    const subjects = { few: refuse(stores[0]), many: refuse(stores[1]) }
    const ns = await bench.measure('core: refusals by full stores', subjects, { operations: 100_000 })
    return [ratioRow(`refuse-${sizes[1] / 1000}k`, 'ns/page', ns.many, `refuse-${sizes[0] / 1000}k`, ns.few, 1.5)]
  } finally {
    for (const { store } of stores) await store.close()
  }
}

/** What the heap grows by while millions of pages come and go. */
async function steadyRows(bench: Bench): Promise<Row[]> {
  const pages = 4096
  const operations = bench.quick ? 1_000_000 : 10_000_000
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  const { store, pool } = openStore(pages)
  try {
    const page = new Uint8Array(basePageSize).fill(7)
    const churn = (count: number): void => {
      for (let i = 0; i < count; i++) {
        const index = (i * 61) % pages
        if (i % 4 === 3) pool.flushPage(0, index)
        else if (i % 4 === 2) pool.get(0, index, page)
        else pool.put(0, index, page)
      }
    }
    churn(100_000)
    collect()
    const before = process.memoryUsage().heapUsed
    for (let done = 0; done < operations; done += 100_000) {
      churn(100_000)
      throwIfInterrupted(bench.signal)
    }
    collect()
    const grown = Math.max(0, process.memoryUsage().heapUsed - before)
    return [valueRow(`heap-growth-${operations / 1e6}m-operations`, 'KiB', grown / 1024, 1024)]
  } finally {
    await store.close()
  }
}

/**
 * Pauses of single puts while a store grows from nothing and is then turned over: they must not grow with the store.
 */
async function pauseRows(bench: Bench): Promise<Row[]> {
  const sizes = bench.quick ? [10_000, 100_000] : [small, large]
  const rows: Row[] = []
  const tails: number[] = []
  for (const pages of sizes) {
    const operations = bench.quick ? 300_000 : pages === large ? 10_000_000 : 2_000_000
    const { store, pool } = openStore(pages)
    try {
      const page = new Uint8Array(basePageSize).fill(7)
      // Nanoseconds of each put, in classes of about 3 %: no array as long as the run.
      const classes = new Uint32Array(1024)
      let longest = 0
      for (let i = 0; i < operations; i++) {
        const index = i < pages ? i : Math.floor((((Math.imul(i, 0x9e3779b1) >>> 0) / 2 ** 32) * pages) | 0)
        const start = process.hrtime()
        pool.put(0, index, page)
        const [seconds, nanoseconds] = process.hrtime(start)
        const taken = seconds * 1e9 + nanoseconds
        if (taken > longest) longest = taken
        classes[Math.min(1023, Math.floor(Math.log2(Math.max(1, taken)) * 32))]++
        if (i % 100_000 === 0) throwIfInterrupted(bench.signal)
      }
      let rest = Math.floor(operations / 10_000)
      let tail = 1023
      while (tail > 0 && rest >= classes[tail]) rest -= classes[tail--]
      tails.push(2 ** ((tail + 1) / 32) / 1000)
      rows.push(
        valueRow(`put-pause-p99.99-${pages / 1000}k`, 'µs', tails[tails.length - 1]),
        valueRow(`put-pause-max-${pages / 1000}k`, 'µs', longest / 1000),
      )
    } finally {
      await store.close()
    }
  }
  rows.push(ratioRow('put-pause-growth', 'µs', tails[1], `p99.99-of-${sizes[0] / 1000}k-pages`, tails[0], 1.5))
  return rows
}
