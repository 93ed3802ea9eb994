/**
 * What the suite is told about a store, and what each of its cases works with: a store opened for it alone, a pool of
 * one kind and size, and operations that are carried out one by one, in batches, by `fetch` or by `lend`.
 */
import type {
  Account,
  Accounts,
  Capabilities,
  LayerContext,
  ObjectId,
  PageStore,
  Pool,
  PoolAttributes,
} from '@tmem/core'
import {
  basePageSize,
  GetOutcome,
  getOutcomeName,
  PageBatch,
  PutOutcome,
  poolRefusalName,
  putOutcomeName,
  systemAllocator,
} from '@tmem/core'
import { type FailingAllocator, failingAllocator } from '@tmem/faults'
import { expect, expectSame, fail, makePage, type PageKind } from './pages.ts'

/** Reasons of a refused put that only some stores have, and only when they are brought to it. */
export type DrivenReason = Exclude<keyof typeof PutOutcome, 'Stored' | 'PoolGone'>

/**
 * How a store is brought to refuse a put for a reason:
 * - `filling`: by pages that are easy to compress, of which it has room for less than `bytes`
 * - `noise`: by one page that cannot be compressed
 * - `quota`: when the client's account takes no more charges, within `bytes`
 * - `allocator`: when the allocator has no more memory, within `bytes` of pages
 * - `freezing`: by freezing the pool
 * - `opening`: it is another store that does, within `bytes` of pages
 *
 * A text says why the store never gives this reason; so does leaving it out.
 */
export type Refusal =
  | string
  | { readonly by: 'filling' | 'quota' | 'allocator'; readonly bytes: number }
  | { readonly by: 'noise' | 'freezing' }
  | {
      readonly by: 'opening'
      readonly bytes: number
      readonly open: (context: LayerContext) => PageStore | Promise<PageStore>
    }

/** What the suite cannot see from the store's capabilities. */
export interface Manifest {
  /**
   * True (default): a dozen pages of each size that are easy to compress find a place and stay there, ephemeral ones
   * too. False: puts may be refused and ephemeral pages may vanish at any time.
   */
  readonly steady?: boolean
  /** Page sizes tried, in bytes (default: 4 KiB, 8 KiB, 64 KiB and 2 MiB, as far as the store keeps them). */
  readonly pageSizes?: readonly number[]
  /** How the store is brought to each of its refusals (default: by freezing a pool, and nothing else). */
  readonly refusals?: Readonly<Partial<Record<DrivenReason, Refusal>>>
  /** Runs of the property test (default 60) and its seed (default 1). */
  readonly property?: { readonly runs?: number; readonly seed?: number }
}

/** A store under test. */
export interface Subject {
  readonly name: string
  /** Opens a new, empty store with this memory and these accounts. Called for each case. */
  readonly open: (context: LayerContext) => PageStore | Promise<PageStore>
  readonly manifest?: Manifest
}

/** Accounts that remember what was charged, and refuse on demand. */
export class Ledger implements Accounts {
  /** Largest total of each client. */
  maximum: number = Number.POSITIVE_INFINITY
  /** What went wrong, e.g. a release of more than was charged. */
  readonly mistakes: string[] = []
  readonly #accounts = new Map<number, LedgerAccount>()

  of(client: number): Account {
    let account = this.#accounts.get(client)
    if (account === undefined) {
      account = new LedgerAccount(client, this)
      this.#accounts.set(client, account)
    }
    return account
  }

  /** Bytes charged to a client now. */
  charged(client: number): number {
    return this.#accounts.get(client)?.bytes ?? 0
  }

  /** Throws unless everything was given back, and never more than was charged. */
  expectSettled(when: string): void {
    expect(this.mistakes.length === 0, `${when}: ${this.mistakes[0]}`)
    for (const [client, { bytes }] of this.#accounts)
      expect(bytes === 0, `${when}, ${bytes} bytes are still charged to client ${client}`)
  }
}

class LedgerAccount implements Account {
  readonly weight = 0
  bytes = 0
  readonly #client: number
  readonly #ledger: Ledger

  constructor(client: number, ledger: Ledger) {
    this.#client = client
    this.#ledger = ledger
  }

  charge(bytes: number): boolean {
    if (!Number.isInteger(bytes) || bytes < 0)
      this.#ledger.mistakes.push(`client ${this.#client} was charged ${bytes} bytes`)
    if (this.bytes + bytes > this.#ledger.maximum) return false
    this.bytes += bytes
    return true
  }

  release(bytes: number): void {
    this.bytes -= bytes
    if (!(this.bytes >= 0))
      this.#ledger.mistakes.push(`client ${this.#client} got back ${bytes} bytes: more than it was charged`)
  }
}

/** One opened store and what it stands on. */
export interface World {
  readonly store: PageStore
  readonly allocator: FailingAllocator
  readonly ledger: Ledger
}

export async function openWorld(open: Subject['open']): Promise<World> {
  const allocator = failingAllocator(systemAllocator)
  const ledger = new Ledger()
  return { store: await open({ allocator, accounts: ledger }), allocator, ledger }
}

/** A kind of pool. */
export interface Kind {
  readonly name: 'private ephemeral' | 'shared ephemeral' | 'private persistent'
  readonly persistent: boolean
  readonly shared: boolean
}

export const kinds: readonly Kind[] = [
  { name: 'private ephemeral', persistent: false, shared: false },
  { name: 'shared ephemeral', persistent: false, shared: true },
  { name: 'private persistent', persistent: true, shared: false },
]

/** Whether a store with these capabilities keeps pools of that kind. */
export const keepsKind = (capabilities: Capabilities, kind: Kind): boolean =>
  (kind.persistent ? capabilities.persistent : capabilities.ephemeral) && (!kind.shared || capabilities.shared)

/** How operations are carried out. */
export type Mode = 'single' | 'batched' | 'fetched' | 'lent'
export const modes: readonly Mode[] = ['single', 'batched', 'fetched', 'lent']

/** The pool's answer to a new pool that must not be refused. */
export function poolOf(store: PageStore, attributes: PoolAttributes): Pool {
  const pool = store.newPool(attributes)
  if (typeof pool === 'number') fail(`newPool(${JSON.stringify(attributes)}) was refused: ${poolRefusalName(pool)}`)
  return pool
}

export type Handle = readonly [object: ObjectId, index: number]
export type Entry = readonly [object: ObjectId, index: number, page: Uint8Array]

/** Operations on one pool, in one mode; remembers which puts were refused. */
export class Hands {
  readonly pool: Pool
  readonly mode: Mode
  readonly steady: boolean
  readonly size: number
  /** Handles whose last put was refused. */
  readonly #refused = new Set<string>()

  constructor(pool: Pool, mode: Mode, steady: boolean) {
    this.pool = pool
    this.mode = mode
    this.steady = steady
    this.size = pool.attributes.pageSize
  }

  /** True when a get leaves a page in place. */
  get keeps(): boolean {
    const { persistent, shared } = this.pool.attributes
    return persistent || shared
  }

  /** A page of this pool's size. */
  page(seed: number, kind: PageKind = 'text'): Uint8Array {
    return makePage(kind, seed, this.size)
  }

  /** Puts pages, and returns the outcomes: any refusal is allowed. */
  offer(...entries: readonly Entry[]): PutOutcome[] {
    const outcomes: PutOutcome[] = []
    if (this.mode === 'batched') {
      const batch = this.batch(entries)
      this.pool.putMany(batch)
      for (let i = 0; i < entries.length; i++) outcomes.push(batch.outcomes[i]! as PutOutcome)
    } else for (const [object, index, page] of entries) outcomes.push(this.pool.put(object, index, page))
    for (const [i, [object, index]] of entries.entries()) this.note(object, index, outcomes[i]!)
    return outcomes
  }

  /** True when the last put under this handle was refused. */
  wasRefused(object: ObjectId, index: number): boolean {
    return this.#refused.has(`${object}/${index}`)
  }

  /** Remembers the outcome of a put. */
  note(object: ObjectId, index: number, outcome: PutOutcome): void {
    if (outcome === PutOutcome.Stored) this.#refused.delete(`${object}/${index}`)
    else this.#refused.add(`${object}/${index}`)
  }

  /** Puts pages; a steady store must take them. */
  put(...entries: readonly Entry[]): void {
    const outcomes = this.offer(...entries)
    if (!this.steady) return
    for (const [i, [object, index]] of entries.entries())
      expect(outcomes[i] === PutOutcome.Stored, `put ${object}/${index} was refused: ${putOutcomeName(outcomes[i]!)}`)
  }

  /** Gets pages: each the bytes, or undefined. */
  async get(...handles: readonly Handle[]): Promise<(Uint8Array | undefined)[]> {
    const pages: (Uint8Array | undefined)[] = []
    if (this.mode === 'batched') {
      const batch = this.batch(handles)
      this.pool.getMany(batch)
      for (const [i, [object, index]] of handles.entries())
        pages.push(
          await this.#settle(batch.outcomes[i]!, object, index, batch.bytes.slice(i * this.size, (i + 1) * this.size)),
        )
      return pages
    }
    for (const [object, index] of handles) {
      const into = new Uint8Array(this.size)
      let outcome: number
      if (this.mode === 'single') outcome = this.pool.get(object, index, into)
      else if (this.mode === 'fetched') outcome = await this.pool.fetch(object, index, into)
      else
        outcome = this.pool.lend(object, index, (bytes, at, length) => {
          into.set(bytes.subarray(at, at + length))
        })
      pages.push(await this.#settle(outcome, object, index, into))
    }
    return pages
  }

  async #settle(outcome: number, object: ObjectId, index: number, into: Uint8Array): Promise<Uint8Array | undefined> {
    const answer = outcome === GetOutcome.Deferred ? await this.pool.fetch(object, index, into) : outcome
    if (answer === GetOutcome.Hit) return into
    if (answer === GetOutcome.Miss) return undefined
    return fail(`get ${object}/${index} ended with ${getOutcomeName(answer)}`)
  }

  flush(...handles: readonly Handle[]): void {
    if (this.mode === 'batched') this.pool.flushMany(this.batch(handles))
    else for (const [object, index] of handles) this.pool.flushPage(object, index)
  }

  /** Each page must be there with these bytes; in a pool that does not keep pages it is then gone. */
  expectPages(...entries: readonly Entry[]): Promise<void> {
    return this.#expect(entries, this.steady || this.pool.attributes.persistent)
  }

  /** As `expectPages`, after something that may cost ephemeral pages, as want of memory does. */
  expectPagesUnderPressure(...entries: readonly Entry[]): Promise<void> {
    return this.#expect(entries, this.pool.attributes.persistent)
  }

  async #expect(entries: readonly Entry[], certain: boolean): Promise<void> {
    const pages = await this.get(...entries.map(([object, index]) => [object, index] as const))
    for (const [i, [object, index, expected]] of entries.entries()) {
      const page = pages[i]
      const name = `page ${object}/${index}`
      if (this.#refused.has(`${object}/${index}`)) expect(page === undefined, `${name} is there after a refused put`)
      else if (page !== undefined) expectSame(page, expected, name)
      else if (certain) fail(`${name} is missing`)
    }
  }

  /** No page may be there. */
  async expectNone(...handles: readonly Handle[]): Promise<void> {
    const pages = await this.get(...handles)
    for (const [i, [object, index]] of handles.entries())
      expect(pages[i] === undefined, `page ${object}/${index} is there and should not be`)
  }

  /** A batch of exactly these handles, with their pages if they have any. */
  batch(entries: readonly (Entry | Handle)[]): PageBatch {
    const batch = new PageBatch(Math.max(1, entries.length), this.size)
    for (const [object, index, page] of entries) {
      const at = batch.offsets[batch.push(object, index)]!
      if (page !== undefined) batch.bytes.set(page, at)
    }
    return batch
  }
}

/** What a rule about pages works with: everything of `Hands`, and the store around it. */
export class Trial extends Hands {
  readonly world: World
  readonly kind: Kind
  readonly manifest: Manifest
  readonly #others: Hands[] = []

  constructor(world: World, manifest: Manifest, kind: Kind, mode: Mode, size: number) {
    const pool = poolOf(world.store, { client: 1, persistent: kind.persistent, shared: kind.shared, pageSize: size })
    super(pool, mode, manifest.steady ?? true)
    this.world = world
    this.kind = kind
    this.manifest = manifest
  }

  /** The largest index that a page of this size can have. */
  get lastIndex(): number {
    return 2 ** 32 / (this.size / basePageSize) - 1
  }

  /** Another pool of the same kind and size. */
  another(client = 1): Hands {
    const pool = poolOf(this.world.store, { ...this.pool.attributes, client })
    const other = new Hands(pool, this.mode, this.steady)
    this.#others.push(other)
    return other
  }

  /** Ends the trial: the next one finds the store as this one did. */
  destroyPools(): void {
    for (const { pool } of [this, ...this.#others]) pool.destroy()
  }
}
