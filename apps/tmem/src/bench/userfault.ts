/**
 * `tmem bench userfault`: faults of a `SwappableBuffer` over zcache against the kernel's swap to zram, and what a
 * resident page costs.
 *
 * Faults: a region of 256 MiB with 32 MiB in memory, one load at a random page at a time, which is timed; every fourth
 * page is then written. Of all loads the slowest ones are the faults, as many as were counted. The kernel does the same
 * in C.
 *
 * Zipf: one word at a time, at places whose pages follow Zipf's law with exponent 1.2, three writes in ten, with an
 * eighth of the region in memory; against the cache that a program would have instead: pages in a Map in the order of
 * their use over `readSync` and `writeSync`. That file is either left to the operating system's cache, which then holds
 * all of it (the program uses far more memory than its limit), or opened around it (O_DIRECT), so that both sides keep
 * to the same memory.
 */
import { closeSync, constants, mkdtempSync, openSync, readSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import type { StatsNode } from '@tmem/core'
import { SwappableBuffer, userfaultUnsupported } from '@tmem/userfault'
import { createStream, writeBit } from '../demo/workload.ts'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type Bench, median, type Row, ratioRow, type Suite, skippedRow, valueRow } from './frame.ts'
import { type FaultTimes, type FaultWork, withZramSwap, type ZramSwap } from './zram.ts'

/** The suite. */
export const userfault: Suite = {
  name: 'userfault',
  summary: "page faults answered from zcache against the kernel's zram swap, resident pages, a Zipf load",
  run: userfaultRows,
}

const MiB = 2 ** 20
const pageBytes = 4096
const pageWords = pageBytes / 4
const names = Object.freeze([
  'fault-zcache-median',
  'fault-zcache-p99',
  'clean-evictions-compressed-again',
  'resident-access',
  'zipf-eighth',
])

async function userfaultRows(bench: Bench): Promise<readonly Row[]> {
  const reason = await userfaultUnsupported()
  if (reason !== undefined) return names.map((name) => skippedRow(name, reason))
  return [...(await faultRows(bench)), await cleanRow(), ...(await residentRows(bench)), ...(await zipfRows(bench))]
}

/** A buffer over zcache with room for everything, and its pager on the processor of this thread. */
function open(bytes: number, residentBytes: number): Promise<SwappableBuffer> {
  return SwappableBuffer.open({
    bytes,
    residentBytes,
    stack: `zcache(limit=${bytes})`,
    modules: [import.meta.resolve('@tmem/zcache')],
    cpu: 0,
  })
}

const xorshift = (seed: number): number => {
  let next = seed
  next ^= next << 13
  next ^= next >>> 17
  return next ^ (next << 5)
}

/** Three words in four are the same: a page shrinks to a third. The same as in the C program. */
const word = (page: number, version: number, i: number): number =>
  (i & 3) === 0 ? Math.imul(Math.imul(version, 7919) + i + page, 40503) : Math.imul(page + 1, 2654435761) + version

async function faultRows(bench: Bench): Promise<Row[]> {
  const work: FaultWork = { pages: 65_536, residentPages: 8192, operations: bench.quick ? 10_000 : 40_000 }
  const rounds = bench.quick ? 3 : 9
  const memory = await open(work.pages * pageBytes, work.residentPages * pageBytes)
  const ours: FaultTimes[] = []
  const kernel: FaultTimes[] = []
  try {
    const words = new Uint32Array(memory.buffer)
    for (let page = 0; page < work.pages; page++) fillPage(words, page)
    const round = faultRound(memory, words, work)
    const measure = async (swap: ZramSwap | undefined): Promise<void> => {
      // What an attempt before has measured has nothing beside it.
      ours.length = kernel.length = 0
      for (let n = 0; n <= rounds; n++) {
        const times = round()
        const swapped = await swap?.round()
        // The first round warms up.
        if (n > 0) ours.push(times)
        if (n > 0 && swapped !== undefined) kernel.push(swapped)
        await setImmediate()
        throwIfInterrupted(bench.signal)
      }
    }
    const trouble = await withZramSwap(work, measure)
    if (trouble !== undefined) await measure(undefined)
    const of = (all: readonly FaultTimes[], what: keyof FaultTimes): number => median(all.map((times) => times[what]))
    const own = of(ours, 'median')
    const p99 = ratioRow('fault-zcache-p99', 'ns/fault', of(ours, 'p99'), 'own-median', own, 3)
    if (trouble !== undefined)
      return [skippedRow('fault-zcache-median', `the reference cannot be had: ${trouble}`), p99]
    return [
      ratioRow('fault-zcache-median', 'ns/fault', own, 'zram-lz4-median', of(kernel, 'median'), 4),
      ratioRow('fault-zcache-all', 'ns/fault', of(ours, 'perFault'), 'zram-lz4-all', of(kernel, 'perFault')),
      p99,
      ratioRow('fault-zram-lz4-p99', 'ns/fault', of(kernel, 'p99'), 'zram-lz4-median', of(kernel, 'median')),
    ]
  } finally {
    await memory.close()
  }
}

function fillPage(words: Uint32Array, page: number): void {
  for (let i = 0; i < pageWords; i++) words[page * pageWords + i] = word(page, 1, i)
}

/** One round after the other, each going on in the random order where the last one stopped. */
function faultRound(memory: SwappableBuffer, words: Uint32Array, { pages, operations }: FaultWork): () => FaultTimes {
  const taken = new Float64Array(operations)
  let seed = 0x2545f491
  let sum = 0
  return () => {
    const before = memory.stats().counters['missingFaults']!
    const start = performance.now()
    for (let n = 0; n < operations; n++) {
      seed = xorshift(seed)
      const page = (seed >>> 0) % pages
      const at = page * pageWords
      const began = performance.now()
      sum = (sum + words[at + 5]) | 0
      taken[n] = (performance.now() - began) * 1e6
      if ((seed >>> 16) % 4 === 0) for (let i = 0; i < pageWords; i += 4) words[at + i] = word(page, n, i)
    }
    const total = (performance.now() - start) * 1e6
    const faults = Math.min(operations, memory.stats().counters['missingFaults']! - before)
    const slow = taken.sort().subarray(operations - faults)
    return { median: slow[faults >> 1], p99: slow[Math.floor(faults * 0.99)], perFault: total / faults }
  }
}

/** Pages that go without having been written, and how often the store compressed one nevertheless. */
async function cleanRow(): Promise<Row> {
  const name = 'clean-evictions-compressed-again'
  const memory = await open(32 * MiB, 4 * MiB)
  try {
    const words = new Uint32Array(memory.buffer)
    const pages = words.length / pageWords
    let sum = 0
    const pass = (): void => {
      for (let page = 0; page < pages; page++) sum = (sum + words[page * pageWords]) | 0
    }
    for (let page = 0; page < pages; page++) fillPage(words, page)
    pass()
    const before = memory.stats()
    for (let n = 0; n < 4; n++) pass()
    const after = memory.stats()
    const evictions = after.counters['evictions']! - before.counters['evictions']!
    if (evictions < 3 * pages) throw new Failed(`bench userfault: only ${evictions} pages were evicted`)
    return valueRow(name, 'pages', compressed(after) - compressed(before), 0)
  } finally {
    await memory.close()
  }
}

/** Pages that zcache has ever compressed: its own counter, not the pager's. */
const compressed = ({ children }: StatsNode): number => children[0]!.counters['stored']!

/** Words of memory that is all resident, against those of a plain ArrayBuffer. */
async function residentRows(bench: Bench): Promise<Row[]> {
  const bytes = 64 * MiB
  const memory = await open(bytes, bytes)
  try {
    const ours = new Uint32Array(memory.buffer).fill(1)
    const plain = new Uint32Array(new ArrayBuffer(bytes)).fill(1)
    const order = new Uint32Array(2 ** 20)
    for (let n = 0, seed = 1; n < order.length; n++) {
      seed = xorshift(seed)
      order[n] = (seed >>> 0) % ours.length
    }
    const anywhere = (words: Uint32Array) => (operations: number) => {
      for (let n = 0; n < operations; n++) {
        const at = order[n & (order.length - 1)]
        words[at] = words[at] + 1
      }
    }
    const inOrder = (words: Uint32Array) => (operations: number) => {
      for (let n = 0; n < operations; n++) words[n] = words[n] + 1
    }
    const operations = bench.quick ? 2 ** 20 : 2 ** 23
    const ns = await bench.measure(
      'userfault: resident pages',
      {
        ours: { run: anywhere(ours) },
        plain: { run: anywhere(plain) },
        oursInOrder: { run: inOrder(ours) },
        plainInOrder: { run: inOrder(plain) },
      },
      { operations },
    )
    return [
      ratioRow('resident-access', 'ns/access', ns.ours, 'array-buffer', ns.plain, 1),
      ratioRow('resident-access-in-order', 'ns/access', ns.oursInOrder, 'array-buffer', ns.plainInOrder),
    ]
  } finally {
    await memory.close()
  }
}

/** Words of a region of which an eighth is in memory, by Zipf's law. */
async function zipfRows(bench: Bench): Promise<Row[]> {
  const pages = 65_536
  const frames = pages / 8
  const operations = bench.quick ? 100_000 : 400_000
  const stream = createStream({ pages, references: operations, exponent: 1.2, writes: 0.3, seed: 7 })
  const folder = mkdtempSync(join(tmpdir(), 'tmem-userfault-'))
  const memory = await open(pages * pageBytes, frames * pageBytes)
  const files: FileCache[] = []
  try {
    const words = new Uint32Array(memory.buffer)
    for (let page = 0; page < pages; page++) fillPage(words, page)
    const buffered = new FileCache(join(folder, 'buffered'), pages, frames, false)
    files.push(buffered)
    const direct = new FileCache(join(folder, 'direct'), pages, frames, true)
    files.push(direct)
    const sums = { ours: 0, buffered: 0, direct: 0 }
    const through = (name: 'buffered' | 'direct', cache: FileCache) => ({
      run(count: number) {
        let sum = sums[name]
        for (let n = 0; n < count; n++) {
          const reference = stream[n]
          const page = reference & ~writeBit
          const writes = reference >= writeBit
          const at = cache.place(page, writes) + (n & (pageWords - 1))
          if (writes) cache.words[at] = n
          else sum = (sum + cache.words[at]) | 0
        }
        sums[name] = sum
      },
    })
    const ours = {
      run(count: number) {
        let sum = sums.ours
        for (let n = 0; n < count; n++) {
          const reference = stream[n]
          const at = (reference & ~writeBit) * pageWords + (n & (pageWords - 1))
          if (reference >= writeBit) words[at] = n
          else sum = (sum + words[at]) | 0
        }
        sums.ours = sum
      },
    }
    const ns = await bench.measure(
      'userfault: Zipf, an eighth in memory',
      { ours, buffered: through('buffered', buffered), direct: through('direct', direct) },
      { operations, rounds: bench.quick ? 3 : 5 },
    )
    if (sums.buffered !== sums.ours || sums.direct !== sums.ours)
      throw new Failed('bench userfault: the buffer and the files do not hold the same words')
    return [
      ratioRow('zipf-eighth', 'ns/access', ns.ours, 'file-lru', ns.buffered, 0.25),
      direct.direct
        ? ratioRow('zipf-eighth-same-memory', 'ns/access', ns.ours, 'file-lru-direct', ns.direct, 0.25)
        : skippedRow('zipf-eighth-same-memory', `the file system of ${tmpdir()} has no direct I/O`),
    ]
  } finally {
    for (const file of files) file.close()
    await memory.close()
    rmSync(folder, { recursive: true, force: true })
  }
}

/**
 * Pages of a file of which some are in memory, the least recently used ones replaced: what a program would write by
 * hand.
 */
class FileCache {
  readonly words: Uint32Array
  /** The operating system's cache is bypassed. */
  readonly direct: boolean
  readonly #frames: Uint8Array
  readonly #file: number
  readonly #count: number
  /** Frame by page, in the order of use. */
  readonly #pages = new Map<number, number>()
  readonly #dirty: Uint8Array

  constructor(path: string, pages: number, frames: number, direct: boolean) {
    const { O_RDWR, O_CREAT, O_DIRECT } = constants
    const flag: number | undefined = O_DIRECT
    const memory = new ArrayBuffer((frames + 1) * pageBytes)
    let file = openSync(path, O_RDWR | O_CREAT, 0o600)
    const filler = new Uint32Array(pageWords)
    for (let page = 0; page < pages; page++) {
      for (let i = 0; i < pageWords; i++) filler[i] = word(page, 1, i)
      writeSync(file, filler, 0, pageBytes, page * pageBytes)
    }
    let from = 0
    if (direct && flag !== undefined) {
      closeSync(file)
      file = openSync(path, O_RDWR | flag)
      from = alignedPlace(file, memory)
    }
    this.direct = direct && from >= 0
    this.#file = file
    this.#count = frames
    this.#frames = new Uint8Array(memory, Math.max(0, from), frames * pageBytes)
    this.words = new Uint32Array(memory, Math.max(0, from), frames * pageWords)
    this.#dirty = new Uint8Array(frames)
  }

  /** Where a page is in `words`. */
  place(page: number, writes: boolean): number {
    let frame = this.#pages.get(page)
    if (frame === undefined) {
      frame = this.#free()
      this.#transferred(readSync(this.#file, this.#frames, frame * pageBytes, pageBytes, page * pageBytes))
    } else this.#pages.delete(page)
    this.#pages.set(page, frame)
    if (writes) this.#dirty[frame] = 1
    return frame * pageWords
  }

  close(): void {
    closeSync(this.#file)
  }

  #free(): number {
    if (this.#pages.size < this.#count) return this.#pages.size
    const [[page, frame]] = this.#pages
    this.#pages.delete(page)
    if (this.#dirty[frame] === 1) {
      this.#dirty[frame] = 0
      this.#transferred(writeSync(this.#file, this.#frames, frame * pageBytes, pageBytes, page * pageBytes))
    }
    return frame
  }

  #transferred(bytes: number): void {
    if (bytes !== pageBytes) throw new Failed(`bench userfault: ${bytes} bytes of a page were transferred`)
  }
}

/**
 * The first place in memory from which the device takes a page, or -1 where there is none: JavaScript cannot see
 * addresses.
 */
function alignedPlace(file: number, memory: ArrayBuffer): number {
  for (let at = 0; at < pageBytes; at += 16)
    try {
      if (readSync(file, new Uint8Array(memory, at, pageBytes), 0, pageBytes, 0) === pageBytes) return at
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EINVAL') throw error
    }
  return -1
}
