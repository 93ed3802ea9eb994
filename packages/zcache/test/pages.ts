/** Pages for tests, and a zcache in a stack of which the test sees the inside. */
import type { Accounts, Allocator, Layer, PageStore, Pool, PoolAttributes, StatsNode } from '@tmem/core'
import { compose } from '@tmem/core'
import { random } from '../../../tools/random.ts'
import type { ZcacheOptions } from '../src/index.ts'
import { zcache } from '../src/index.ts'

export const KiB = 1024
export const MiB = 1024 * 1024

/** A stack whose first place is a zcache. */
export interface Stack {
  readonly store: PageStore
  /** Counters of the zcache, or of a section of it. */
  counters(section?: string): Readonly<Record<string, number>>
  /** Counters of the chain. */
  chain(): Readonly<Record<string, number>>
  /** Throws unless chain, allocator and arena are sound. */
  check(): void
}

/** Opens a zcache, above other layers if there are any. */
export function open(
  options: ZcacheOptions,
  given: {
    allocator?: Allocator
    accounts?: Accounts
    below?: readonly Layer[]
    check?: 'model'
    wake?: () => void
  } = {},
): Stack {
  const { below = [], ...context } = given
  const store = compose([zcache(options), ...below], context)
  return {
    store,
    counters: (section = 'zcache') => sectionOf(store, section),
    chain: () => store.stats().counters,
    check: () => store.check!(),
  }
}

/** Counters of the first section of that name. Throws when there is none. */
export function sectionOf(store: PageStore, name: string): Readonly<Record<string, number>> {
  const find = (node: StatsNode): StatsNode | undefined =>
    node.name === name ? node : node.children.map(find).find((found) => found !== undefined)
  const found = find(store.stats())
  if (found === undefined) throw new Error(`no section ${name}`)
  return found.counters
}

const kinds = {
  swap: { client: 1, persistent: true, shared: false },
  cache: { client: 1, persistent: false, shared: false },
  shared: { client: 1, persistent: false, shared: true },
} as const

export function newPool({ store }: Stack, kind: keyof typeof kinds, pageSize = 4096): Pool {
  const attributes: PoolAttributes = { ...kinds[kind], pageSize }
  const pool = store.newPool(attributes)
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return pool
}

/**
 * A page of which about `noise` (0 to 1) is random: it compresses to a little more than that share. The noise is in
 * pieces of 64 bytes.
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

/** Ticks until nothing is left to do at once. */
export function settle({ store }: Stack, pages = 1000): void {
  for (let ticks = 0; store.tick({ pages }).pending; ticks++) if (ticks > 10_000) throw new Error('it never ends')
}
