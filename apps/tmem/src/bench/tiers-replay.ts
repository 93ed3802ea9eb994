/**
 * The rows of `tmem bench tiers` about which pages are read from disk: fixed traces through an address space over a
 * stack of two places, compared with simulated orders of pages over the calls that reach it.
 *
 * A read from disk is a page that the address space had to wait for. Where the process has read more bytes from files
 * meanwhile than that many pages, these count: a stack that reads in the middle of a get, or to clean up, is not better
 * for it. Every page that is read is compared with what was last written there; a wrong byte is a failure, not a
 * figure.
 */
import { basePageSize, type PageStore } from '@tmem/core'
import { Swapper } from '@tmem/swapper'
import { writeBit } from '../demo/workload.ts'
import { Failed } from '../ending.ts'
import { type Bench, type Row, ratioRow, skippedRow, valueRow } from './frame.ts'
import { Lru, RecordedCalls, watched } from './tiers-reference.ts'
import { Contents, mebibyte, noProcessIo, processIo, sumOf, turns, withStack } from './tiers-rig.ts'
import { type Trace, type TraceName, traceNames, traceOf } from './traces.ts'

/** By trace: the largest ratio of its reads to those of an LRU that is good enough. */
const goals: Readonly<Record<TraceName, number>> = Object.freeze({
  'hot-set': 1.05,
  'zipf-writes': 1.05,
  zipf: 1.05,
  scan: 0.95,
  loop: 0.95,
})

/** What happened between two places of a trace. */
interface Passed {
  /** Pages that the address space asked the stack for, and those of them that were read from disk. */
  readonly faults: number
  readonly diskReads: number
  /** What the LRU has read meanwhile. */
  readonly lruReads: number
  /** Bytes that this process has read and written meanwhile. */
  readonly bytesRead: number
  readonly bytesWritten: number
}

interface Replayed {
  readonly whole: Passed
  /** By name of a part: all of it, and its second half. */
  readonly parts: ReadonlyMap<string, { readonly whole: Passed; readonly late: Passed }>
  readonly minReads: number
  /** Most bytes of memory that the stack said it used, over its limit; `undefined` when it says nothing. */
  readonly memoryShare: number | undefined
}

/** All traces. */
export async function replayRows(bench: Bench): Promise<Row[]> {
  const reason = noProcessIo()
  if (reason !== undefined) return traceNames.map((name) => skippedRow(`reads-${name}`, reason))
  const contents = new Contents()
  const rows: Row[] = []
  for (const name of traceNames) {
    const replayed = await replay(bench, traceOf(name, bench.quick), contents)
    const { whole, minReads } = replayed
    rows.push(ratioRow(`reads-${name}`, 'pages', whole.diskReads, 'lru', whole.lruReads, goals[name]))
    if (name === 'hot-set') rows.push(...hotSetRows(replayed))
    if (name === 'scan' || name === 'loop')
      rows.push(ratioRow(`reads-${name}-to-min`, 'pages', whole.diskReads, 'belady-min', minReads))
    if (name === 'zipf' || name === 'loop') {
      const { bytesWritten, bytesRead } = replayed.parts.get('steady')!.whole
      rows.push(ratioRow(`written-${name}-steady`, 'bytes', bytesWritten, 'bytes-read', bytesRead, 0.01))
    }
  }
  return rows
}

/** The phases one by one: the LRU reads nothing in one of them, so one page in a hundred is granted. */
function hotSetRows({ parts, memoryShare }: Replayed): Row[] {
  const rows: Row[] = []
  for (const [name, { whole, late }] of parts) {
    const granted = 1.05 * whole.lruReads + 0.01 * whole.faults
    const share = late.faults === 0 ? 0 : late.diskReads / late.faults
    rows.push(
      ratioRow(`reads-hot-set-${name}`, 'pages', whole.diskReads, '1.05-lru-and-1%-of-faults', granted, 1),
      valueRow(`reads-hot-set-${name}-second-half`, 'of faults', share, 0.02),
    )
  }
  rows.push(
    memoryShare === undefined
      ? skippedRow('memory-hot-set', 'the stack has no counter used_bytes')
      : valueRow('memory-hot-set', 'of the limit', memoryShare, 1),
  )
  return rows
}

async function replay(bench: Bench, trace: Trace, contents: Contents): Promise<Replayed> {
  // A quarter of the pages' bytes, and room for twice their number below.
  const limitBytes = (trace.pages * basePageSize) / 4
  const fileBytes = trace.pages * basePageSize * 2
  const text = `zcache(limit=${limitBytes / mebibyte}MiB) > frontswap(file={file},size=${fileBytes / mebibyte}MiB)`
  return withStack(text, fileBytes, async (store) => {
    const lru = new Lru(limitBytes)
    const recorded = new RecordedCalls()
    const space = new AddressSpace(bench, trace, contents, store, watched(store, [lru, recorded]), lru)
    try {
      const start = space.sample()
      await space.run(0, trace.parts[0]!.from)
      const parts = new Map<string, { whole: Passed; late: Passed }>()
      let before = space.sample()
      for (const { name, from, to } of trace.parts) {
        const half = from + Math.floor((to - from) / 2)
        await space.run(from, half)
        const middle = space.sample()
        await space.run(half, to)
        const after = space.sample()
        parts.set(name, { whole: passed(before, after), late: passed(middle, after) })
        before = after
      }
      const memoryShare = space.mostMemory === undefined ? undefined : space.mostMemory / limitBytes
      return { whole: passed(start, before), parts, minReads: recorded.minReads(limitBytes), memoryShare }
    } finally {
      space.close()
    }
  })
}

/** Counters at one place of a trace. */
interface Sample {
  readonly faults: number
  readonly waits: number
  readonly lruReads: number
  readonly bytesRead: number
  readonly bytesWritten: number
}

function passed(before: Sample, after: Sample): Passed {
  const between = (name: keyof Sample): number => after[name] - before[name]
  const bytesRead = between('bytesRead')
  return {
    faults: between('faults'),
    diskReads: Math.max(between('waits'), Math.floor(bytesRead / basePageSize)),
    lruReads: between('lruReads'),
    bytesRead,
    bytesWritten: between('bytesWritten'),
  }
}

/** The program of a trace: writes pages, and compares those that it reads. */
class AddressSpace {
  /** Most bytes that the stack has said it uses. */
  mostMemory: number | undefined
  readonly #bench: Bench
  readonly #trace: Trace
  readonly #contents: Contents
  readonly #store: PageStore
  readonly #lru: Lru
  readonly #swapper: Swapper
  readonly #versions: Uint32Array
  readonly #into: Buffer = Buffer.alloc(basePageSize)
  readonly #turn: () => Promise<void> | undefined

  constructor(bench: Bench, trace: Trace, contents: Contents, store: PageStore, front: PageStore, lru: Lru) {
    this.#bench = bench
    this.#trace = trace
    this.#contents = contents
    this.#store = store
    this.#lru = lru
    this.#swapper = new Swapper({ pages: trace.pages, frames: trace.frames, store: front })
    this.#versions = new Uint32Array(trace.pages)
    this.#turn = turns(store, bench)
  }

  sample(): Sample {
    const { swapIns: faults, majorFaults: waits } = this.#swapper.counters
    const { bytesRead, bytesWritten } = processIo()
    return { faults, waits, lruReads: this.#lru.reads, bytesRead, bytesWritten }
  }

  /** Does references `from` (included) to `to` (excluded). */
  async run(from: number, to: number): Promise<void> {
    const { name, references } = this.#trace
    const progress = this.#bench.progress(`tiers: trace ${name}`)
    try {
      for (let n = from; n < to; n++) {
        const reference = references[n]
        const page = reference % writeBit
        // Nothing is waited for, and no promise made, as long as the page is there.
        const wait = reference >= writeBit ? this.#write(page) : this.#swapper.read(page, 0, this.#into)
        if (wait !== undefined) await wait
        if (reference < writeBit) this.#compare(page)
        const turn = this.#turn()
        if (turn === undefined) continue
        await turn
        progress.at(n, references.length)
        this.#look()
      }
      progress.done()
    } finally {
      progress.end()
    }
  }

  close(): void {
    this.#swapper.close()
  }

  #write(page: number): Promise<void> | undefined {
    this.#versions[page]++
    return this.#swapper.write(page, 0, this.#contents.of(page, this.#versions[page]))
  }

  #compare(page: number): void {
    if (this.#into.compare(this.#contents.of(page, this.#versions[page])) !== 0)
      throw new Failed(`bench tiers: page ${page} of the trace ${this.#trace.name} is not what was last written`)
  }

  #look(): void {
    const used = sumOf(this.#store.stats(), 'used_bytes')
    if (used !== undefined) this.mostMemory = Math.max(this.mostMemory ?? 0, used)
  }
}
