/**
 * What the parts of `tmem bench tiers` share: pages, stacks over a file of their own, and what this process reads and
 * writes.
 */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { createCodec } from '@tmem/codecs'
import { basePageSize, compose, type PageStore, type Pool, parseStack, type StatsNode } from '@tmem/core'
import { makeSwapDirectory } from '../demo/swap-files.ts'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { layerFactories } from '../layers.ts'
import type { Bench } from './frame.ts'

export const mebibyte: number = 2 ** 20

/**
 * What pages hold: those of the running program, in another order. One number, the version, says what a page holds now.
 */
export class Contents {
  readonly #pages: readonly Uint8Array[]
  readonly #bytes: Uint16Array

  /**
   * Only of those that the fast codec compresses to so many bytes, or fewer; a page that does not shrink counts as a
   * page.
   */
  constructor(mostBytes: number = basePageSize) {
    const source = readFileSync(process.execPath)
    const codec = createCodec('lz4')
    const room = new Uint8Array(basePageSize)
    const pages: Uint8Array[] = []
    const sizes: number[] = []
    for (let at = 0; at + basePageSize <= source.length; at += basePageSize) {
      const page = source.subarray(at, at + basePageSize)
      const bytes = codec.compress(page, 0, basePageSize, room, 0, basePageSize - 1) || basePageSize
      if (bytes > mostBytes) continue
      pages.push(page)
      sizes.push(bytes)
    }
    this.#pages = pages
    this.#bytes = Uint16Array.from(sizes)
  }

  /** A page in its version: valid as long as nobody writes to it. */
  of(page: number, version: number): Uint8Array {
    return this.#pages[this.#number(page, version)]
  }

  /** Bytes to which the fast codec compresses it. */
  bytesOf(page: number, version: number): number {
    return this.#bytes[this.#number(page, version)]
  }

  /** Mean of those of all pages. */
  get meanBytes(): number {
    return this.#bytes.reduce((sum, bytes) => sum + bytes, 0) / this.#bytes.length
  }

  #number(page: number, version: number): number {
    return (page * 7 + version * 61_803) % this.#pages.length
  }
}

/**
 * Opens the stack, with `{file}` in its text for a file on a disk that has room for `fileBytes` and goes away
 * afterwards, and closes it when `use` has ended.
 */
export async function withStack<Answer>(
  text: string,
  fileBytes: number,
  use: (store: PageStore) => Promise<Answer>,
): Promise<Answer> {
  const directory = makeSwapDirectory(undefined, fileBytes)
  try {
    const file = JSON.stringify(join(directory.path, 'tiers.img'))
    const store = compose(
      parseStack(
        text.replaceAll('{file}', () => file),
        layerFactories,
      ),
    )
    try {
      return await use(store)
    } finally {
      await store.close()
    }
  } finally {
    directory.remove()
  }
}

/** A pool for persistent pages of 4 KiB. */
export function poolOf(store: PageStore): Pool {
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: basePageSize })
  if (typeof pool === 'number') throw new Failed(`bench tiers: the stack refused the pool (${pool})`)
  return pool
}

/** Operations between two turns of a stack's background work. */
const turnEvery = 256

/** Counts an operation; after some of them gives the stack a turn, lets the event loop run, and looks at the signal. */
export function turns(store: PageStore, bench: Bench): () => Promise<void> | undefined {
  let operations = 0
  const turn = async (): Promise<void> => {
    store.tick({ pages: turnEvery })
    await setImmediate()
    throwIfInterrupted(bench.signal)
  }
  return () => (++operations % turnEvery === 0 ? turn() : undefined)
}

/** Gives the stack turns until it finds nothing more to do. */
export async function settle(store: PageStore, bench: Bench): Promise<void> {
  for (let pending = true; pending; ) {
    pending = store.tick({ pages: turnEvery }).pending
    await setImmediate()
    throwIfInterrupted(bench.signal)
  }
}

/**
 * What this process has read and written through the system so far: files, and the few bytes by which threads wake each
 * other.
 */
export interface ProcessIo {
  readonly bytesRead: number
  readonly bytesWritten: number
  /** Calls that write. */
  readonly writes: number
}

const ioFile = '/proc/self/io'

/** Why `processIo` cannot be had here, if it cannot. */
export const noProcessIo = (): string | undefined => (existsSync(ioFile) ? undefined : `needs ${ioFile}`)

/** Reads the counters. */
export function processIo(): ProcessIo {
  const text = readFileSync(ioFile, 'latin1')
  const counter = (name: string): number => Number(new RegExp(`^${name}: (\\d+)$`, 'm').exec(text)![1])
  return { bytesRead: counter('rchar'), bytesWritten: counter('wchar'), writes: counter('syscw') }
}

/** The sum of a counter over all nodes that have it; `undefined` when none has. */
export function sumOf(node: StatsNode, counter: string): number | undefined {
  let sum = node.counters[counter]
  for (const child of node.children) {
    const below = sumOf(child, counter)
    if (below !== undefined) sum = (sum ?? 0) + below
  }
  return sum
}
