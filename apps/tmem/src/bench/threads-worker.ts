/** A worker thread of `threads.ts`: works in pages of its own, and says when it began and ended. */
import { parentPort, workerData } from 'node:worker_threads'
import { basePageSize, GetOutcome, PutOutcome } from '@tmem/core'
import { type SharedMemoryHandle, SharedMemoryStore } from '@tmem/memory'

/** What a worker thread is given at its start. */
export interface ThreadData {
  readonly store: SharedMemoryHandle
  /** The pool to work in. */
  readonly pool: number
  /** The object whose pages are this thread's, indexes 0 to pages-1. */
  readonly object: number
  readonly pages: number
  /** As much plain memory, for the reference: this thread's alone. */
  readonly plain: SharedArrayBuffer
  /** One word: a round begins when it reaches the number of the round. */
  readonly start: SharedArrayBuffer
}

/** What is measured: puts and gets in turn, or copies in and out in turn. */
export type Work = 'store' | 'copy'

/** One round. The thread answers when it is ready, and again when it is done. */
export interface Round {
  readonly number: number
  readonly work: Work
  /** Pages put or copied in, and as many got or copied out. */
  readonly operations: number
}

/** Times of one round in nanoseconds, of a clock that all threads share. */
export interface Times {
  readonly begun: number
  readonly ended: number
}

/** Longest wait for the start of a round, in milliseconds. */
const patience = 60_000

const { store: handle, pool: number, object, pages, plain, start } = workerData as ThreadData
const pool = SharedMemoryStore.attach(handle).openPool(number)
if (typeof pool === 'number') throw new Error(`pool ${number} could not be opened (${pool})`)
const startWord = new Int32Array(start)
const buffer = Buffer.from(plain)
const page = new Uint8Array(basePageSize).fill(7)
const into = new Uint8Array(basePageSize)

// Before anything is measured: all pages are there, and the operating system has given out all memory.
for (let index = 0; index < pages; index++) {
  if (pool.put(object, index, page) !== PutOutcome.Stored) throw new Error(`page ${index} of ${pages} was refused`)
  buffer.set(page, index * basePageSize)
}

let seed = 0x2545f491 + object

const works: Record<Work, (operations: number) => void> = {
  store(operations) {
    for (let i = 0; i < operations; i++) {
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
      if (pool.put(object, Math.floor((seed / 2 ** 32) * pages), page) !== PutOutcome.Stored)
        throw new Error('a put was refused')
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
      if (pool.get(object, Math.floor((seed / 2 ** 32) * pages), into) !== GetOutcome.Hit)
        throw new Error('a page is gone')
    }
  },
  copy(operations) {
    for (let i = 0; i < operations; i++) {
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
      buffer.set(page, Math.floor((seed / 2 ** 32) * pages) * basePageSize)
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
      const at = Math.floor((seed / 2 ** 32) * pages) * basePageSize
      buffer.copy(into, 0, at, at + basePageSize)
    }
  },
}

const now = (): number => Number(process.hrtime.bigint())

parentPort!.on('message', ({ number: round, work, operations }: Round) => {
  parentPort!.postMessage('ready')
  for (let before = Atomics.load(startWord, 0); before < round; before = Atomics.load(startWord, 0))
    if (Atomics.wait(startWord, 0, before, patience) === 'timed-out') throw new Error(`round ${round} did not begin`)
  const begun = now()
  works[work](operations)
  const times: Times = { begun, ended: now() }
  parentPort!.postMessage(times)
})
parentPort!.postMessage('ready')
