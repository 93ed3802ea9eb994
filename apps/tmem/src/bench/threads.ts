/**
 * One worker thread against two, each in pages of its own: how much of a second processor a shared store lets through.
 *
 * Method: rounds of one thread and of two, of the store and of plain copies in shared memory, take turns; all run once
 * before a round counts. Each thread does the same work in every round, so that two threads do twice as much; a round
 * lasts from the first start to the last end. The plain copies show the limit of the machine, whose processors share
 * its memory, and perhaps one core.
 */
import { Worker } from 'node:worker_threads'
import { basePageSize } from '@tmem/core'
import { SharedMemoryStore } from '@tmem/memory'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type Bench, median, type Row, ratioRow } from './frame.ts'
import type { Round, ThreadData, Times, Work } from './threads-worker.ts'

/** How much is measured. */
export interface ThreadsOptions {
  /** Resident pages of 4 KiB, half of them each thread's. */
  readonly pages: number
  /** Puts, and as many gets, of each thread in each round. */
  readonly operations: number
  /** Rounds that are counted, of each kind. */
  readonly rounds: number
  /** Shards of the store (default: the store's own choice). */
  readonly shards?: number
  readonly signal?: AbortSignal
}

/** Pages per second, put or got, of one thread and of two together. */
export interface Throughput {
  readonly one: number
  readonly two: number
  /** `two / one`, as the median over the rounds. */
  readonly ratio: number
}

/** Throughput of a shared store and of plain copies to and from random places. */
export async function measureThreads(options: ThreadsOptions): Promise<Record<Work, Throughput>> {
  const { pages, operations, rounds, shards, signal } = options
  const half = Math.floor(pages / 2)
  // A shard fills unevenly, and everything must fit.
  const limitBytes = Math.ceil(pages * (basePageSize + 100) * 1.1) + 32 * 2 ** 20
  const store = SharedMemoryStore.create(shards === undefined ? { limitBytes } : { limitBytes, shards })
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: basePageSize })
  if (typeof pool === 'number') throw new Failed(`the shared store refused the pool (${pool})`)
  const start = new SharedArrayBuffer(4)
  const threads = [1, 2].map((object) => {
    const plain = new SharedArrayBuffer(half * basePageSize)
    const data: ThreadData = { store: store.handle, pool: pool.number, object, pages: half, plain, start }
    return new Thread('./threads-worker.js', data)
  })
  try {
    await Promise.all(threads.map((thread) => thread.next()))
    const startWord = new Int32Array(start)
    let number = 0
    /** Pages per second of these threads together. */
    const round = async (work: Work, working: readonly Thread[]): Promise<number> => {
      if (signal !== undefined) throwIfInterrupted(signal)
      number++
      const taken = await roundOf(working, startWord, { number, work, operations } satisfies Round)
      return (working.length * operations * 2 * 1e9) / taken
    }
    const figures: Record<Work, { one: number[]; two: number[] }> = {
      store: { one: [], two: [] },
      copy: { one: [], two: [] },
    }
    const works: readonly Work[] = ['store', 'copy']
    for (let turn = 0; turn <= rounds; turn++)
      for (const work of works) {
        const alone = [threads[turn % 2]]
        // Which of the two comes first changes, too.
        const first = await round(work, turn % 4 < 2 ? alone : threads)
        const second = await round(work, turn % 4 < 2 ? threads : alone)
        if (turn === 0) continue
        figures[work].one.push(turn % 4 < 2 ? first : second)
        figures[work].two.push(turn % 4 < 2 ? second : first)
      }
    return { store: throughput(figures.store), copy: throughput(figures.copy) }
  } finally {
    await Promise.all(threads.map((thread) => thread.end()))
    await store.close()
  }
}

/** The rows of `tmem bench core`: cost of a page with two threads against one; half of it at best. */
export async function threadRows(bench: Bench): Promise<readonly Row[]> {
  const pages = bench.quick ? 20_000 : 100_000
  const { store, copy } = await measureThreads({
    pages,
    operations: bench.quick ? 10_000 : 50_000,
    rounds: bench.quick ? 3 : 15,
    signal: bench.signal,
  })
  const size = `4k-${pages / 1000}k`
  return [
    ratioRow(`two-threads-${size}`, 'ns/page', 1e9 / store.two, 'one-thread', 1e9 / store.one, 1 / 1.7),
    ratioRow(`two-threads-copy-${size}`, 'ns/page', 1e9 / copy.two, 'one-thread', 1e9 / copy.one),
  ]
}

function throughput({ one, two }: { one: readonly number[]; two: readonly number[] }): Throughput {
  return { one: median(one), two: median(two), ratio: median(one.map((alone, i) => two[i] / alone)) }
}

/** A round of threads that begin together when `start` reaches its number: nanoseconds from first to last. */
export async function roundOf<Round extends { readonly number: number }>(
  working: readonly Thread[],
  start: Int32Array,
  round: Round,
): Promise<number> {
  for (const thread of working) thread.begin(round)
  await Promise.all(working.map((thread) => thread.next()))
  Atomics.store(start, 0, round.number)
  Atomics.notify(start, 0)
  const times = (await Promise.all(working.map((thread) => thread.next()))) as Times[]
  return Math.max(...times.map((time) => time.ended)) - Math.min(...times.map((time) => time.begun))
}

/** A worker thread and what it says. */
export class Thread {
  readonly #worker: Worker
  readonly #said: unknown[] = []
  #failure: Error | undefined
  #heard: (() => void) | undefined

  /** @param program beside this file */
  constructor(program: string, data: object) {
    this.#worker = new Worker(new URL(program, import.meta.url), {
      workerData: data,
      // This process's own flags may lead imports elsewhere.
      execArgv: [],
    })
    this.#worker.on('message', (message: unknown) => {
      this.#said.push(message)
      this.#heard?.()
    })
    const failed = (error: Error): void => {
      this.#failure ??= error
      this.#heard?.()
    }
    this.#worker.on('error', failed)
    this.#worker.on('exit', (code) => failed(new Failed(`a worker thread ended (${code})`)))
  }

  begin(round: object): void {
    this.#worker.postMessage(round)
  }

  /** What the thread says next. */
  async next(): Promise<unknown> {
    while (this.#said.length === 0) {
      if (this.#failure !== undefined) throw this.#failure
      await new Promise<void>((resolve) => {
        this.#heard = resolve
      })
    }
    return this.#said.shift()
  }

  async end(): Promise<void> {
    await this.#worker.terminate()
  }
}
