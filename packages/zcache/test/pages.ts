/** Pages for tests, and the smallest context that a layer can be opened in. */
import type { Accounts, Allocator, LayerContext, Pool, PoolAttributes } from '@tmem/core'
import { createAccounts, systemAllocator } from '@tmem/core'
import type { ZcacheOptions } from '../src/index.ts'
import { zcache } from '../src/index.ts'
import type { Zcache } from '../src/zcache.ts'

export const KiB = 1024
export const MiB = 1024 * 1024

/** Opens a zcache without anything around or below it. */
export function open(options: ZcacheOptions, given: { allocator?: Allocator; accounts?: Accounts } = {}): Zcache {
  const context: LayerContext = {
    allocator: given.allocator ?? systemAllocator,
    accounts: given.accounts ?? createAccounts(),
  }
  return zcache(options).open(undefined, context) as Zcache
}

const kinds = {
  swap: { client: 1, persistent: true, shared: false },
  cache: { client: 1, persistent: false, shared: false },
  shared: { client: 1, persistent: false, shared: true },
} as const

export function attributes(kind: keyof typeof kinds, pageSize = 4096): PoolAttributes {
  return { ...kinds[kind], pageSize }
}

export function newPool(store: Zcache, kind: keyof typeof kinds, pageSize = 4096): Pool {
  const pool = store.newPool(attributes(kind, pageSize))
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return pool
}

/** A small generator of random numbers (mulberry32): the same seed gives the same pages. */
export function random(seed: number): () => number {
  let state = seed | 0
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
}

/**
 * A page of which about `noise` (0 to 1) is random: it compresses to a little more than that share. The noise is in pieces
 * of 64 bytes.
 */
export function noisyPage(seed: number, noise: number, pageSize = 4096): Uint8Array {
  const next = random(seed)
  const page = new Uint8Array(pageSize)
  new DataView(page.buffer).setUint32(0, seed)
  for (let at = 64; at < pageSize; at += 64) {
    if (next() < noise) for (let i = 0; i < 64; i++) page[at + i] = next() * 256
    else page.fill(seed & 0xff, at, at + 64)
  }
  return page
}

/** Compares bytes: much faster than a deep comparison of typed arrays, which matters for pages of 2 MiB. */
export const sameBytes = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0
