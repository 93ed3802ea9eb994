/**
 * `tmem bench tiers`: where the pages of a stack of several places rest, and the cost of their moves.
 *
 * Most figures are counts of pages, bytes and operations from the system's counters of this process, which are the same
 * in every run; times are measured in turns, as everywhere. The stack is `zcache > frontswap` with only its sizes set,
 * composed from text and used through its public interface. The references are simulated over the same calls
 * (tiers-reference.ts), or measured in the same run.
 */
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { basePageSize, GetOutcome, type PageStore, type Pool, type StatsNode } from '@tmem/core'
import { runDemo } from '../demo/demo.ts'
import { createRandom } from '../demo/workload.ts'
import type { Terminal } from '../terminal.ts'
import { randomOrder } from './core.ts'
import { type Bench, type Row, ratioRow, type Subject, type Suite, valueRow } from './frame.ts'
import { zswapRows } from './guest.ts'
import { replayRows } from './tiers-replay.ts'
import { Contents, mebibyte, poolOf, settle, sumOf, turns, withStack } from './tiers-rig.ts'
import { sinkingRows } from './tiers-sinking.ts'
import { pageRows } from './zcache.ts'

/** The suite. */
export const tiers: Suite = {
  name: 'tiers',
  summary:
    'where the pages of a stack rest: disk reads and writes against LRU, MIN and a log; puts and gets over a file',
  run: tiersRows,
}

async function tiersRows(bench: Bench): Promise<readonly Row[]> {
  return [
    ...(await replayRows(bench)),
    await demoRow(bench),
    ...(await sinkingRows(bench)),
    ...(await codecRows(bench)),
    await missRow(bench),
    ...(await metadataRows(bench)),
    await heapRow(bench),
    ...(await zswapRows(bench)),
  ]
}

/**
 * Disk I/O of the demo's machine with tmem over that of its machine with a swap file alone: a hundredth is 99 %
 * avoided.
 */
async function demoRow(bench: Bench): Promise<Row> {
  const silent: Terminal = {
    signal: bench.signal,
    takeSignals: () => () => undefined,
    print: () => undefined,
    note: () => undefined,
    progress: (label) => bench.progress(`tiers: the demo's ${label}`),
  }
  const { machines } = await runDemo({ seed: 1, ...(bench.quick ? { size: 16 * mebibyte } : {}) }, silent)
  const io = (name: string): number => {
    const { diskReads, diskWrites } = machines.find((machine) => machine.name === name)!
    return diskReads + diskWrites
  }
  return ratioRow('demo-disk-io', 'operations', io('tmem'), 'swap-file-alone', io('swap'), 0.01)
}

/** Put and get where all pages have room in memory, over a file, against the codec alone: as in `tmem bench zcache`. */
async function codecRows(bench: Bench): Promise<Row[]> {
  // No rule of any time refuses these, so that none goes to the file.
  const contents = new Contents(basePageSize / 2)
  const pages = Array.from({ length: 4096 }, (_, page) => contents.of(page, 0))
  const corpus = { pageBytes: basePageSize, bytes: Buffer.concat(pages), pages, sources: [] }
  const bytes = pages.length * basePageSize
  const rows = await withStack(`zcache(limit=${bytes}) > frontswap(file={file},size=${bytes})`, bytes, (store) =>
    pageRows(bench, corpus, { store, pool: poolOf(store) }),
  )
  return rows.map((row) => ({ ...row, name: `${row.name}-over-file` }))
}

/** A stack of four places, the pages of which are in all of them. */
function withFourPlaces<Answer>(pages: number, use: (store: PageStore) => Promise<Answer>): Promise<Answer> {
  const bytes = pages * basePageSize
  const limit = Math.ceil(bytes / 7)
  const text = `memory(limit=${limit}) > zcache(limit=${limit}) > zcache(limit=${limit}) > frontswap(file={file},size=${bytes})`
  return withStack(text, bytes, use)
}

/** A get of a handle that has no page, below four places and below one. */
async function missRow(bench: Bench): Promise<Row> {
  const count = bench.quick ? 4096 : 16_384
  const contents = new Contents()
  const filled = async (store: PageStore): Promise<Pool> => {
    const pool = poolOf(store)
    for (let page = 0; page < count; page++) pool.put(0, page, contents.of(page, 0))
    await settle(store, bench)
    return pool
  }
  return withFourPlaces(2 * count, (four) =>
    withStack(`memory(limit=${2 * count * basePageSize})`, 0, async (one) => {
      const order = randomOrder(count, count)
      const into = new Uint8Array(basePageSize)
      const miss = (pool: Pool): Subject => ({
        run(operations) {
          for (let pass = 0; pass < operations; pass += count)
            for (let n = 0; n < count; n++) pool.get(0, count + order[n], into)
        },
      })
      const subjects = { four: miss(await filled(four)), one: miss(await filled(one)) }
      const ns = await bench.measure('tiers: misses', subjects, { operations: count * (bench.quick ? 4 : 16) })
      return ratioRow('miss-four-places', 'ns/page', ns.four, 'miss-one-place', ns.one, 1.1)
    }),
  )
}

/**
 * What is kept beside the compressed bytes for a page in memory, for a page in the file, and for an object: by the
 * stack's own counters, less what places were charged for the directory, which it counts itself. A page in the file
 * also has its part of the map of what is free there.
 */
async function metadataRows(bench: Bench): Promise<Row[]> {
  const contents = new Contents(basePageSize / 2)
  const count = bench.quick ? 2048 : 16_384
  const most = 4 * count
  const limitBytes = Math.ceil(2 * count * contents.meanBytes)
  const fileBytes = most * basePageSize
  const text = `zcache(limit=${limitBytes}) > frontswap(file={file},size=${fileBytes})`
  const counted = (stats: StatsNode): number => sumOf(stats, 'metadata_bytes')! - sumOf(stats, 'directory_bytes')!
  /**
   * Bytes that pages have taken, how many of these rest in the file, and bytes of the map for each that it has room
   * for.
   */
  const taken = (pages: number, handle: (page: number) => [object: number, index: number]) =>
    withStack(text, fileBytes, async (store) => {
      const pool = poolOf(store)
      const before = counted(store.stats())
      const turn = turns(store, bench)
      for (let page = 0; page < pages; page++) {
        pool.put(...handle(page), contents.of(page, 0))
        await turn()
      }
      await settle(store, bench)
      const into = new Uint8Array(basePageSize)
      let sunk = 0
      for (let page = 0; page < pages; page++) if (pool.get(...handle(page), into) === GetOutcome.Deferred) sunk++
      const stats = store.stats()
      const mapBytes = sumOf(stats, 'map_bytes')! / sumOf(stats, 'slots')!
      return { bytes: counted(stats) - before, sunk, mapBytes }
    })
  const few = await taken(count, (page) => [0, page])
  const many = await taken(most, (page) => [0, page])
  const apart = await taken(count, (page) => [page, 0])
  const inMemory = few.bytes / count
  return [
    valueRow('metadata-page-in-memory', 'bytes', inMemory, 52),
    valueRow(
      'metadata-page-in-file',
      'bytes',
      (many.bytes - (most - many.sunk) * inMemory) / many.sunk + many.mapBytes,
      32,
    ),
    valueRow('metadata-object', 'bytes', (apart.bytes - few.bytes) / count, 60),
  ]
}

/** What the heap grows by while pages come, are asked for and go, in four places. */
async function heapRow(bench: Bench): Promise<Row> {
  const operations = bench.quick ? 100_000 : 1_000_000
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  const contents = new Contents()
  const handles = 8192
  return withFourPlaces(handles, async (store) => {
    const pool = poolOf(store)
    const into = new Uint8Array(basePageSize)
    const random = createRandom(3)
    const turn = turns(store, bench)
    const churn = async (count: number): Promise<void> => {
      for (let n = 0; n < count; n++) {
        const index = Math.floor(random() * handles)
        const kind = random()
        if (kind < 0.5) pool.put(0, index, contents.of(index, n))
        else if (kind < 0.75) pool.flushPage(0, index)
        else if (pool.get(0, index, into) === GetOutcome.Deferred) await pool.fetch(0, index, into)
        await turn()
      }
    }
    await churn(operations / 10)
    collect()
    const before = process.memoryUsage().heapUsed
    await churn(operations)
    collect()
    const grown = Math.max(0, process.memoryUsage().heapUsed - before)
    return valueRow(`heap-growth-${operations / 1e6}m-operations`, 'KiB', grown / 1024, 64)
  })
}
