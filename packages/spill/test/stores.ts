/** Stacks with a spill for tests, and what is in them. */
import {
  type ComposeOptions,
  compose,
  GetOutcome,
  type Layer,
  type ObjectId,
  type PageStore,
  type Pool,
  PutOutcome,
  type StatsNode,
} from '@tmem/core'
import { MemoryFiles } from '@tmem/page-file'
import { expect } from 'vitest'
import { type SpillOptions, spill } from '../src/index.ts'

export const pageSize = 4096
export const path = '/spill'

/** A spill of 1 MiB in memory, or whatever is given. */
export const spillIn = (files: MemoryFiles, options: Partial<SpillOptions> = {}): Layer =>
  spill({ file: path, sizeBytes: 2 ** 20, boot: 'this boot', files, ...options })

/**
 * A stack of a spill alone. The model of the boundary would know nothing of pages of an earlier run, so it is not
 * there.
 */
export const open = (files: MemoryFiles, options: Partial<SpillOptions> = {}, more: ComposeOptions = {}): PageStore =>
  compose([spillIn(files, options)], more)

export function poolOf(store: PageStore, client = 1, shared = true, size = pageSize): Pool {
  const pool = store.newPool({ client, persistent: false, shared, pageSize: size })
  if (typeof pool === 'number') throw new Error(`refused: ${pool}`)
  return pool
}

/** A page that tells its seed; some compress, some do not. */
export function pageOf(seed: number, size: number = pageSize): Uint8Array {
  const page = new Uint8Array(size).fill(seed)
  let state = (seed + 1) * 0x9e3779b1
  if (seed % 3 === 0)
    for (let at = 0; at < size; at++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      page[at] = state >>> 24
    }
  return page
}

export async function fetched(pool: Pool, object: ObjectId, index: number): Promise<Uint8Array | undefined> {
  const into = new Uint8Array(pool.attributes.pageSize)
  return (await pool.fetch(object, index, into)) === GetOutcome.Hit ? into : undefined
}

/** Whether a page is as it was put, or gone. */
export async function isRightOrGone(pool: Pool, object: ObjectId, index: number, seed: number): Promise<boolean> {
  const page = await fetched(pool, object, index)
  return page === undefined || Buffer.compare(page, pageOf(seed, page.length)) === 0
}

export const put = (pool: Pool, object: ObjectId, index: number, seed: number): void =>
  expect(pool.put(object, index, pageOf(seed, pool.attributes.pageSize))).toBe(PutOutcome.Stored)

/** Counters of the layer of that name. */
export function countersOf(store: PageStore, name = 'spill'): Readonly<Record<string, number>> {
  const visit = (node: StatsNode): Readonly<Record<string, number>> | undefined =>
    node.name === name ? node.counters : node.children.map(visit).find((found) => found !== undefined)
  return visit(store.stats())!
}

/** The process dies: nothing is closed, and its files are free. The old store is not used any more. */
export const crash = (files: MemoryFiles): void => files.kill()

export { MemoryFiles }
