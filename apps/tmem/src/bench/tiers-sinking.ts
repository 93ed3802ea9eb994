/**
 * The rows of `tmem bench tiers` about pages that sink from compressed memory to a file: what is written for them, in
 * how many operations, and what puts take meanwhile.
 *
 * Which pages rest in the file is seen from outside: their get is deferred. How many bytes have sunk follows from that
 * and from what the codec makes of them, without a counter of the stack's: what is in the file afterwards and was not
 * before, and what was overwritten there. What is written is counted by the system for the whole process.
 */
import { basePageSize, GetOutcome, type PageStore, type Pool, PutOutcome, putOutcomeName } from '@tmem/core'
import { createRandom } from '../demo/workload.ts'
import { type Bench, type Row, ratioRow, type Subject, skippedRow } from './frame.ts'
import { GreedyLog } from './tiers-reference.ts'
import { Contents, mebibyte, noProcessIo, poolOf, processIo, settle, turns, withStack } from './tiers-rig.ts'

/** All rows about sinking. */
export async function sinkingRows(bench: Bench): Promise<Row[]> {
  const reason = noProcessIo()
  const all = new Contents()
  // No rule of any time refuses these, so that all of them have room in memory where there is room.
  const shrinking = new Contents(basePageSize / 2)
  const rows: Row[] = []
  for (const percent of [50, 80, 90])
    rows.push(
      reason === undefined ? await liveRow(bench, all, percent) : skippedRow(`written-${percent}%-live`, reason),
    )
  rows.push(reason === undefined ? await streamRow(bench, shrinking) : skippedRow('write-operations', reason))
  rows.push(...(await putRows(bench, shrinking)))
  return rows
}

/** A put was refused: what was to be measured cannot be. */
class Refused extends Error {}

/** Pages of one pool, each in its version. */
class Pages {
  readonly store: PageStore
  readonly pool: Pool
  readonly #contents: Contents
  readonly #versions: Uint32Array
  readonly #into: Uint8Array = new Uint8Array(basePageSize)
  readonly #turn: () => Promise<void> | undefined

  constructor(bench: Bench, store: PageStore, contents: Contents, count: number) {
    this.store = store
    this.pool = poolOf(store)
    this.#contents = contents
    this.#versions = new Uint32Array(count)
    this.#turn = turns(store, bench)
  }

  /** Puts the next version of a page, and gives the stack its turn when it is due. */
  put(page: number): Promise<void> | undefined {
    this.#versions[page]++
    const outcome = this.pool.put(0, page, this.#contents.of(page, this.#versions[page]))
    if (outcome !== PutOutcome.Stored) throw new Refused(`the stack refused page ${page} (${putOutcomeName(outcome)})`)
    return this.#turn()
  }

  /** Bytes that a page takes compressed in the file; 0 when it does not rest there. */
  sunkBytes(page: number): number {
    if (this.pool.get(0, page, this.#into) !== GetOutcome.Deferred) return 0
    return this.#contents.bytesOf(page, this.#versions[page])
  }

  /** All pages that rest in the file. */
  sunk(): { pages: number; bytes: number } {
    let [pages, bytes] = [0, 0]
    for (let page = 0; page < this.#versions.length; page++) {
      const own = this.sunkBytes(page)
      if (own > 0) pages++
      bytes += own
    }
    return { pages, bytes }
  }
}

/** The stack with little memory, over a file. */
const stackOf = (limitBytes: number, fileBytes: number): string =>
  `zcache(limit=${limitBytes}) > frontswap(file={file},size=${fileBytes})`

/**
 * Pages are overwritten at random, each as often as any other, so many that the compressed bytes of those in the file
 * are a given share of its size. After twice as many bytes as the file has, what is written for the next so many is
 * compared with the bytes that sank.
 */
async function liveRow(bench: Bench, contents: Contents, percent: number): Promise<Row> {
  const name = `written-${percent}%-live`
  const fileBytes = (bench.quick ? 8 : 32) * mebibyte
  const limitBytes = fileBytes / 16
  const mean = contents.meanBytes
  const inFile = Math.floor((fileBytes * percent) / 100 / mean)
  const count = inFile + Math.floor(limitBytes / mean)
  const turnover = Math.ceil(fileBytes / mean)
  const progress = bench.progress(`tiers: a file of which ${percent} % is live`)
  try {
    return await withStack(stackOf(limitBytes, fileBytes), fileBytes, async (store) => {
      const pages = new Pages(bench, store, contents, count)
      const random = createRandom(percent)
      for (let page = 0; page < count; page++) await pages.put(page)
      for (let n = 0; n < 2 * turnover; n++) {
        await pages.put(Math.floor(random() * count))
        if (n % 1024 === 0) progress.at(n, 3 * turnover)
      }
      await settle(store, bench)
      const before = { written: processIo().bytesWritten, sunk: pages.sunk().bytes }
      let overwritten = 0
      for (let n = 0; n < turnover; n++) {
        const page = Math.floor(random() * count)
        overwritten += pages.sunkBytes(page)
        await pages.put(page)
        if (n % 1024 === 0) progress.at(2 * turnover + n, 3 * turnover)
      }
      await settle(store, bench)
      progress.done()
      const written = processIo().bytesWritten - before.written
      const sunk = pages.sunk().bytes - before.sunk + overwritten
      if (sunk <= 0) return skippedRow(name, 'no page sank')
      if (percent === 50) return ratioRow(name, 'bytes', written, 'compressed-bytes-sunk', sunk, 1.05)
      const log = logCost(contents, inFile, fileBytes, turnover)
      return ratioRow(name, 'bytes per byte sunk', written / sunk, 'greedy-log', log)
    })
  } catch (error) {
    if (error instanceof Refused) return skippedRow(name, `${error.message}: its file has no room for so many`)
    throw error
  } finally {
    progress.end()
  }
}

/** Bytes that a log with greedy cleaning writes for each byte, when pages are overwritten as above. */
function logCost(contents: Contents, count: number, fileBytes: number, turnover: number): number {
  const log = new GreedyLog(fileBytes, 128 * 1024)
  const random = createRandom(1)
  for (let page = 0; page < count; page++) log.write(page, contents.bytesOf(page, 0))
  let [asked, before] = [0, 0]
  for (let n = 0; n < 3 * turnover; n++) {
    if (n === 2 * turnover) [asked, before] = [0, log.writtenBytes]
    const page = Math.floor(random() * count)
    const bytes = contents.bytesOf(page, n)
    asked += bytes
    log.write(page, bytes)
  }
  return (log.writtenBytes - before) / asked
}

/** New pages come one by one, all of which sink in the end: how many operations write them. */
async function streamRow(bench: Bench, contents: Contents): Promise<Row> {
  const name = 'write-operations'
  const limitBytes = 4 * mebibyte
  const full = Math.ceil((2 * limitBytes) / contents.meanBytes)
  const count = full + (bench.quick ? 4096 : 32_768)
  const fileBytes = 2 * count * basePageSize
  return withStack(stackOf(limitBytes, fileBytes), fileBytes, async (store) => {
    const pages = new Pages(bench, store, contents, count)
    for (let page = 0; page < full; page++) await pages.put(page)
    await settle(store, bench)
    const before = { operations: processIo().writes, sunk: pages.sunk().pages }
    for (let page = full; page < count; page++) await pages.put(page)
    await settle(store, bench)
    const operations = processIo().writes - before.operations
    const sunk = pages.sunk().pages - before.sunk
    if (sunk <= 0) return skippedRow(name, 'no page sank')
    return ratioRow(name, 'operations', operations, 'pages-sunk', sunk, 1 / 16)
  })
}

/** Pages are put in order, over and over: where all of them have room, and where each put makes another page sink. */
async function putRows(bench: Bench, contents: Contents): Promise<Row[]> {
  const count = bench.quick ? 8192 : 32_768
  const fileBytes = 2 * count * basePageSize
  const wholeBytes = count * contents.meanBytes
  const limits = { sinking: Math.ceil(wholeBytes / 16), room: Math.ceil(wholeBytes * 1.5) }
  return withStack(stackOf(limits.room, fileBytes), fileBytes, (roomy) =>
    withStack(stackOf(limits.sinking, fileBytes), fileBytes, async (narrow) => {
      const streams = {
        sinking: new Stream(bench, narrow, contents, count),
        room: new Stream(bench, roomy, contents, count),
      }
      await streams.room.run(count)
      await streams.sinking.run(count)
      const operations = count / 4
      const ns = await bench.measure('tiers: puts while pages sink, and puts with room', streams, { operations })
      const tail = { sinking: await streams.sinking.tail(2 * count), room: await streams.room.tail(2 * count) }
      return [
        ratioRow('put-sinking', 'ns/page', ns.sinking, 'put-with-room', ns.room, 1.3),
        ratioRow('put-sinking-p99.9', 'µs', tail.sinking, 'put-with-room-p99.9', tail.room),
      ]
    }),
  )
}

/** An endless stream of puts, with the stack's turns. */
class Stream implements Subject {
  readonly #pages: Pages
  readonly #count: number
  #next = 0

  constructor(bench: Bench, store: PageStore, contents: Contents, count: number) {
    this.#pages = new Pages(bench, store, contents, count)
    this.#count = count
  }

  readonly run = async (operations: number): Promise<void> => {
    for (let n = 0; n < operations; n++) {
      const turn = this.#put()
      if (turn !== undefined) await turn
    }
  }

  /** The time in µs that 999 of 1,000 puts do not pass; turns are not in it. */
  async tail(operations: number): Promise<number> {
    const taken = new Float64Array(operations)
    for (let n = 0; n < operations; n++) {
      const start = performance.now()
      const turn = this.#put()
      taken[n] = performance.now() - start
      if (turn !== undefined) await turn
    }
    return taken.sort()[Math.floor(operations * 0.999)] * 1000
  }

  #put(): Promise<void> | undefined {
    const page = this.#next
    this.#next = page + 1 === this.#count ? 0 : page + 1
    return this.#pages.put(page)
  }
}
