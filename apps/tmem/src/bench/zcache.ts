/**
 * `tmem bench zcache`: compressed pages against the codec alone, against others' LZ4, and against the kernel's zram.
 *
 * The pages are those of this machine: executables, shared libraries, headers, JavaScript, a fifth zero pages, some
 * random. All of them are kept, those that do not shrink as they are, so that both sides of a row have the same pages.
 * The store is used as everybody uses it: composed, with its checked boundary.
 *
 * Bytes are all that there are: chunks with all that is free in them, tables as far as they were ever touched, those of
 * the directory for pages without a block (zero pages) as well, which the layer's own budget does not count.
 */
import { setImmediate } from 'node:timers/promises'
import { availableCodecs, type CodecName, createCodec, createLz4Arena } from '@tmem/codecs'
import {
  type Corpus,
  codecSubject,
  interleave,
  type Lz4Napi,
  liblz4Subject,
  mixedCorpus,
  napiSubject,
  storeBytes,
} from '@tmem/codecs/bench'
import { compose, GetOutcome, type PageStore, type Pool, PutOutcome } from '@tmem/core'
import { memory } from '@tmem/memory'
import { zcache as zcacheLayer } from '@tmem/zcache'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type Bench, median, type Row, ratioRow, type Suite, skippedRow } from './frame.ts'
import { zramBytes } from './zram-use.ts'

/** The suite. */
export const zcache: Suite = {
  name: 'zcache',
  summary: 'compressed pages: time against the codec alone, LZ4 against others, bytes against zram',
  run: zcacheRows,
}

const pageBytes = 4096
const timedPages = 4096

async function zcacheRows(bench: Bench): Promise<readonly Row[]> {
  const corpus = mixedCorpus(bench.quick ? 32_768 : 49_152)
  const timed = part(corpus, timedPages)
  return [
    ...(await pageRows(bench, timed)),
    ...(await tradeRows(bench, timed)),
    ...(await codecRows(bench, timed)),
    ...(await zeroRows(bench)),
    ...(await churnRows(bench, corpus)),
    ...(await zramRows(bench, corpus)),
    ...(await giveBackRows(bench, corpus)),
  ]
}

const part = ({ bytes, pages, sources }: Corpus, count: number): Corpus => ({
  pageBytes,
  bytes: bytes.subarray(0, count * pageBytes),
  pages: pages.slice(0, count),
  sources,
})

/** A store with room for so many pages, and a pool that keeps all of them. */
function open(pages: number, recompress?: CodecName): { store: PageStore; pool: Pool } {
  const limitBytes = Math.ceil(pages * pageBytes * 0.75)
  const store = compose([zcacheLayer({ limitBytes, ...(recompress === undefined ? {} : { recompress }) })])
  return { store, pool: poolOf(store) }
}

function poolOf(store: PageStore): Pool {
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: pageBytes })
  if (typeof pool === 'number') throw new Failed(`bench zcache: the store refused the pool (${pool})`)
  return pool
}

function fill(pool: Pool, pages: readonly Uint8Array[]): void {
  for (let index = 0; index < pages.length; index++) putPage(pool, index, pages[index])
}

function putPage(pool: Pool, index: number, page: Uint8Array): void {
  if (pool.put(0, index, page) !== PutOutcome.Stored) throw new Failed(`bench zcache: the store refused page ${index}`)
}

/** Every page is what was put: figures of a store that loses something mean nothing. */
function verify(pool: Pool, pages: readonly Uint8Array[]): void {
  const into = Buffer.alloc(pageBytes)
  for (let index = 0; index < pages.length; index++)
    if (pool.get(0, index, into) !== GetOutcome.Hit || into.compare(pages[index]) !== 0)
      throw new Failed(`bench zcache: page ${index} is not what was put`)
}

/** Bytes of everything, of that in chunks, and of the compressed pages in these. */
function bytesOf(store: PageStore): { used: number; chunks: number; compressed: number } {
  const chain = store.stats()
  const { counters } = chain.children.find(({ name }) => name === 'zcache')!
  const ownTables = counters['metadata_bytes']! - counters['directory_bytes']!
  const chunks = counters['used_bytes']! - counters['metadata_bytes']!
  return { used: chunks + ownTables + chain.counters['metadata_bytes']!, chunks, compressed: counters['zbytes']! }
}

/**
 * Lets the store do all that it can between operations. A tick that finds nothing to do may still have noted which
 * pages are idle.
 */
async function settle(store: PageStore, pages: number, bench: Bench): Promise<void> {
  const perTick = 1024
  for (let quiet = 0; quiet <= 2 * pages; quiet += perTick) {
    if (store.tick({ pages: perTick }).pages > 0) quiet = 0
    await setImmediate()
    throwIfInterrupted(bench.signal)
  }
}

/**
 * Put and get against the same codec alone, in its arena: the shortest way that there is. Closes the store, which has
 * room for all.
 */
export async function pageRows(
  bench: Bench,
  corpus: Corpus,
  { store, pool }: { store: PageStore; pool: Pool } = open(corpus.pages.length),
): Promise<Row[]> {
  const { pages } = corpus
  try {
    const arena = createLz4Arena(storeBytes(createCodec('lz4'), corpus))
    const alone = codecSubject('lz4', arena.codec, corpus, arena.bytes)
    // Until the runtime has compiled what is measured: the codec is compiled already.
    for (let passes = 0; passes < 10; passes++) {
      pool.flushObject(0)
      fill(pool, pages)
      verify(pool, pages)
    }
    const into = new Uint8Array(pageBytes)
    const ns = await bench.measure(
      'zcache: pages against the codec alone',
      {
        put: {
          prepare: () => pool.flushObject(0),
          run(operations) {
            for (let i = 0; i < operations; i++) pool.put(0, i, pages[i])
          },
        },
        compress: {
          async run() {
            await alone.compress()
          },
        },
        get: {
          run(operations) {
            for (let i = 0; i < operations; i++) pool.get(0, i, into)
          },
        },
        decompress: {
          async run() {
            await alone.decompress()
          },
        },
      },
      { operations: pages.length, rounds: bench.quick ? 15 : 41 },
    )
    return [
      ratioRow('put-new', 'ns/page', ns.put, 'lz4-compress-alone', ns.compress, 1.15),
      ratioRow('get', 'ns/page', ns.get, 'lz4-decompress-alone', ns.decompress, 1.25),
    ]
  } finally {
    await store.close()
  }
}

/**
 * Space for time, as the mail of December 2009 puts it: half the space for ten times the access. Compressed pages,
 * metadata and what is free in chunks included, against the same pages as they are; a get of each against a get of a
 * page that is kept as it is.
 */
export async function tradeRows(bench: Bench, { pages }: Corpus): Promise<Row[]> {
  const ours = open(pages.length)
  const plainStore = compose([memory({ limitBytes: pages.length * (pageBytes + 128) + 2 ** 20 })])
  const plain = { store: plainStore, pool: poolOf(plainStore) }
  try {
    const into = new Uint8Array(pageBytes)
    for (const { pool } of [ours, plain]) {
      fill(pool, pages)
      verify(pool, pages)
    }
    const get = (pool: Pool) => ({
      run(operations: number) {
        for (let i = 0; i < operations; i++) pool.get(0, i, into)
      },
    })
    const ns = await bench.measure(
      'zcache: space for time',
      { ours: get(ours.pool), plain: get(plain.pool) },
      { operations: pages.length, rounds: bench.quick ? 15 : 41, warmup: 10 },
    )
    const { used } = bytesOf(ours.store)
    return [
      ratioRow('trade-space', 'bytes/page', used / pages.length, 'plain-page', pageBytes, 0.5),
      ratioRow('trade-get', 'ns/page', ns.ours, 'memory', ns.plain, 10),
    ]
  } finally {
    await ours.store.close()
    await plain.store.close()
  }
}

/** The fast LZ4 against lz4-napi and C's liblz4. */
export async function codecRows(bench: Bench, corpus: Corpus): Promise<Row[]> {
  const arena = createLz4Arena(storeBytes(createCodec('lz4'), corpus))
  const subjects = [codecSubject('lz4', arena.codec, corpus, arena.bytes)]
  const missing = new Map<string, string>()
  try {
    subjects.push(napiSubject((await import('lz4-napi')) as Lz4Napi, corpus))
  } catch (error) {
    missing.set('lz4-napi', `needs lz4-napi: ${firstLine(error)}`)
  }
  try {
    subjects.push(liblz4Subject(corpus))
  } catch (error) {
    missing.set('liblz4', `needs gcc and liblz4.so.1: ${firstLine(error)}`)
  }
  try {
    const measured = await interleave(subjects, bench.quick ? 7 : 31)
    throwIfInterrupted(bench.signal)
    const ours = measured[0]!
    return (
      [
        ['lz4-napi', 0.5, 0.5],
        ['liblz4', 1.6, 2],
      ] as const
    ).flatMap(([name, compress, decompress]): Row[] => {
      const theirs = measured.find((one) => one.name === name)
      const rows = [`lz4-compress-to-${name}`, `lz4-decompress-to-${name}`] as const
      if (theirs === undefined) return rows.map((row) => skippedRow(row, missing.get(name)!))
      return [
        ratioRow(rows[0], 'ns/page', ours.compressNs, name, theirs.compressNs, compress),
        ratioRow(rows[1], 'ns/page', ours.decompressNs, name, theirs.decompressNs, decompress),
      ]
    })
  } finally {
    for (const subject of subjects) subject.close?.()
  }
}

const firstLine = (error: unknown): string => String(error).split('\n')[0]!

/**
 * Zero pages, which take no place, against a copy to plain memory: at new handles, and at those that have a zero page.
 */
async function zeroRows(bench: Bench): Promise<Row[]> {
  const count = bench.quick ? 16_384 : 65_536
  const ours = open(count)
  const plainStore = compose([memory({ limitBytes: count * (pageBytes + 128) + 2 ** 20 })])
  const plain = { store: plainStore, pool: poolOf(plainStore) }
  try {
    const page = new Uint8Array(pageBytes)
    const put = (pool: Pool) => (operations: number) => {
      for (let i = 0; i < operations; i++) pool.put(0, Math.imul(i, 40_503) & (count - 1), page)
    }
    const fresh = ({ pool }: { pool: Pool }) => ({ prepare: () => pool.flushObject(0), run: put(pool) })
    const ns = await bench.measure(
      'zcache: zero pages',
      {
        oursNew: fresh(ours),
        oursReplaced: { run: put(ours.pool) },
        plainNew: fresh(plain),
        plainReplaced: { run: put(plain.pool) },
      },
      { operations: count },
    )
    return [
      ratioRow('put-zero-new', 'ns/page', ns.oursNew, 'memory-put-new', ns.plainNew, 0.5),
      ratioRow('put-zero-replace', 'ns/page', ns.oursReplaced, 'memory-put-replace', ns.plainReplaced, 0.5),
    ]
  } finally {
    await ours.store.close()
    await plain.store.close()
  }
}

/** A generator of random numbers below a bound, the same in every run. */
function randomly(seed: number): (below: number) => number {
  let state = seed
  return (below) => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % below
  }
}

/**
 * A store whose pages are replaced by others, at random, three times as often as there are pages, while `tick` does
 * half a page's work for each. During: the median of a hundred looks in the last third, none of which waits for `tick`.
 * After: once `tick` has caught up.
 */
export async function churnRows(bench: Bench, { pages }: Corpus): Promise<Row[]> {
  const { store, pool } = open(pages.length)
  try {
    fill(pool, pages)
    const random = randomly(0x2545f491)
    const looks = 100
    const between = Math.floor(pages.length / looks)
    const used: number[] = []
    const compressed: number[] = []
    const look = (): void => {
      const now = bytesOf(store)
      used.push(now.used)
      compressed.push(now.compressed)
    }
    for (let n = 0; n < 3 * looks; n++) {
      for (let i = 0; i < between; i++) putPage(pool, random(pages.length), pages[random(pages.length)])
      store.tick({ pages: between >> 1 })
      if (n >= 2 * looks) look()
      await setImmediate()
      throwIfInterrupted(bench.signal)
    }
    const during = median(used.map((bytes, n) => bytes / compressed[n]))
    const sum = median(compressed)
    await settle(store, pages.length, bench)
    const after = bytesOf(store)
    return [
      ratioRow('bytes-after-churn', 'bytes', after.used, 'compressed-sizes', after.compressed, 1.06),
      ratioRow('bytes-during-churn', 'bytes', during * sum, 'compressed-sizes', sum),
    ]
  } finally {
    await store.close()
  }
}

/**
 * Bytes for the corpus against zram with lz4, at once and after cold pages were compressed again. The kernel does not
 * count zram's tables of pages and handles, we count ours: the chunks alone compare like with like.
 */
async function zramRows(bench: Bench, { pages, bytes }: Corpus): Promise<Row[]> {
  const strong = availableCodecs().includes('zstd') ? 'zstd' : 'deflate'
  const names = ['bytes-for-corpus', 'chunks-for-corpus', `bytes-for-corpus-cold-${strong}`] as const
  const zram = zramBytes(bytes)
  if (typeof zram === 'string') return names.map((name) => skippedRow(name, zram))
  const { store, pool } = open(pages.length, strong)
  try {
    fill(pool, pages)
    const atOnce = bytesOf(store)
    await settle(store, pages.length, bench)
    const later = bytesOf(store)
    verify(pool, pages)
    const reference = 'zram-lz4-mem-used-total'
    return [
      ratioRow(names[0], 'bytes', atOnce.used, reference, zram, 1),
      ratioRow(names[1], 'bytes', atOnce.chunks, reference, zram),
      ratioRow(names[2], 'bytes', later.used, reference, zram, 0.85),
    ]
  } finally {
    await store.close()
  }
}

/**
 * What is kept for a tenth of the pages after the others were flushed at random and `tick` has moved the rest together.
 * Chunks are what can be given back; tables stay as large as they once were, because they are reserved for the limit.
 */
export async function giveBackRows(bench: Bench, { pages }: Corpus): Promise<Row[]> {
  const { store, pool } = open(pages.length)
  try {
    fill(pool, pages)
    const random = randomly(0x9e3779b9)
    for (let index = 0; index < pages.length; index++) if (random(10) !== 0) pool.flushPage(0, index)
    await settle(store, pages.length, bench)
    const { used, chunks, compressed } = bytesOf(store)
    return [
      ratioRow('chunks-kept-after-flush', 'bytes', chunks, 'live-compressed-bytes', compressed, 1.15),
      ratioRow('bytes-kept-after-flush', 'bytes', used, 'live-compressed-bytes', compressed),
    ]
  } finally {
    await store.close()
  }
}
