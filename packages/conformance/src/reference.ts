/**
 * The reference store: what a store of pages means, in as few words as possible. Slow, and meant to be obviously right.
 *
 * Every pool is one `Map` from "object/part" to the 4 KiB of that part; a larger page is nothing but its parts, and is
 * there when all of them are. It serves three ends: the model against which other stores are compared, the store on
 * which the suite itself is tested (by breaking one rule of it at a time), and something to compose in tests.
 */
import {
  type Accounts,
  type Allocator,
  assertBatch,
  assertEntries,
  assertIndex,
  assertObject,
  assertPage,
  type Borrower,
  type ByteAmount,
  basePageSize,
  bytesOf,
  type Capabilities,
  checkedAttributes,
  checkOptions,
  GetOutcome,
  idle,
  type Layer,
  type LayerContext,
  maxPageSize,
  type ObjectId,
  type PageBatch,
  type PageStore,
  Pending,
  type Pool,
  type PoolAttributes,
  PoolRefusal,
  type Progress,
  PutOutcome,
  type StatsNode,
} from '@tmem/core'

/** Settings of the reference store. */
export interface ReferenceOptions {
  /** Most bytes of pages (default: no limit). Ephemeral pages are evicted, oldest first, before a put is refused. */
  readonly limitBytes?: ByteAmount
}

export const referenceCapabilities: Capabilities = Object.freeze({
  ephemeral: true,
  persistent: true,
  shared: true,
  minPageSize: basePageSize,
  maxPageSize,
  deferred: false,
  split: true,
  reservedBytes: 0,
})

/** The reference store as the last layer of a stack. */
export function reference(options: ReferenceOptions = {}): Layer {
  checkOptions('reference', options, { limitBytes: 'bytes?' })
  const limitBytes =
    options.limitBytes === undefined ? undefined : bytesOf('reference', 'limitBytes', options.limitBytes)
  return Object.freeze({
    name: 'reference',
    plan: (below: Capabilities | undefined) => (below === undefined ? referenceCapabilities : 'it passes nothing on'),
    open: (_next: PageStore | undefined, context: LayerContext) => new ReferenceStore(context, limitBytes),
  })
}

/** 4 KiB of some page. */
export interface Part {
  readonly key: string
  readonly pool: ReferenceContents
  readonly bytes: Uint8Array
}

/** What a pool and its view in parts have in common. */
export interface ReferenceContents {
  readonly attributes: PoolAttributes
  readonly parts: Map<string, Part>
  frozen: boolean
  gone: boolean
}

export class ReferenceStore implements PageStore {
  readonly name = 'reference'
  readonly capabilities: Capabilities = referenceCapabilities
  readonly allocator: Allocator
  readonly accounts: Accounts
  readonly limitBytes: number
  readonly pools: Set<ReferenceContents> = new Set()
  /** Ephemeral parts, oldest first. */
  readonly evictable: Set<Part> = new Set()
  bytes = 0
  closed = false
  readonly counters: Record<'puts' | 'succ_puts' | 'gets' | 'succ_gets' | 'evicted_parts', number> = {
    puts: 0,
    succ_puts: 0,
    gets: 0,
    succ_gets: 0,
    evicted_parts: 0,
  }

  constructor(context: LayerContext, limitBytes: number = Number.POSITIVE_INFINITY) {
    this.allocator = context.allocator
    this.accounts = context.accounts
    this.limitBytes = limitBytes
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const checked = checkedAttributes(attributes)
    if (this.closed) return PoolRefusal.Closed
    if (checked.persistent && checked.shared) return PoolRefusal.SharedPersistent
    const contents = { attributes: checked, parts: new Map<string, Part>(), frozen: false, gone: false }
    this.pools.add(contents)
    return this.poolOf(contents, checked)
  }

  /** A view of a pool's contents in pages of the given attributes. */
  poolOf(contents: ReferenceContents, attributes: PoolAttributes): Pool {
    return new ReferencePool(this, contents, attributes)
  }

  /** Makes a part; undefined when there is no memory. */
  add(pool: ReferenceContents, key: string, source: Uint8Array): PutOutcome {
    const { client, persistent } = pool.attributes
    while (this.bytes + basePageSize > this.limitBytes) {
      const [oldest] = this.evictable
      if (oldest === undefined) return PutOutcome.NoMemory
      this.drop(oldest)
      this.counters.evicted_parts++
    }
    if (persistent && !this.accounts.of(client).charge(basePageSize)) return PutOutcome.Quota
    const memory = this.allocator.allocate(basePageSize, 'reference.part')
    if (memory === undefined) {
      if (persistent) this.accounts.of(client).release(basePageSize)
      return PutOutcome.AllocationFailed
    }
    const part = { key, pool, bytes: new Uint8Array(memory) }
    part.bytes.set(source)
    this.bytes += basePageSize
    pool.parts.set(key, part)
    if (!persistent) this.evictable.add(part)
    return PutOutcome.Stored
  }

  drop(part: Part): void {
    const { client, persistent } = part.pool.attributes
    part.pool.parts.delete(part.key)
    this.evictable.delete(part)
    this.bytes -= basePageSize
    if (persistent) this.accounts.of(client).release(basePageSize)
  }

  empty(pool: ReferenceContents): void {
    pool.gone = true
    for (const part of pool.parts.values()) this.drop(part)
    this.pools.delete(pool)
  }

  tick(): Progress {
    return idle
  }

  stats(): StatsNode {
    return { name: this.name, counters: { ...this.counters, bytes: this.bytes }, children: [] }
  }

  async close(): Promise<void> {
    this.closed = true
    for (const pool of this.pools) this.empty(pool)
  }
}

export class ReferencePool implements Pool {
  readonly attributes: PoolAttributes
  readonly store: ReferenceStore
  readonly contents: ReferenceContents

  constructor(store: ReferenceStore, contents: ReferenceContents, attributes: PoolAttributes) {
    this.store = store
    this.contents = contents
    this.attributes = attributes
  }

  /** Keys of the parts of a page. A number and a bigint of the same value have the same key. */
  keys(object: ObjectId, index: number): string[] {
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    const parts = this.attributes.pageSize / basePageSize
    return Array.from({ length: parts }, (_, part) => `${object}/${index * parts + part}`)
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.attributes.pageSize)
    return this.replace(object, index, page)
  }

  replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const keys = this.keys(object, index)
    this.store.counters.puts++
    if (this.contents.gone) return PutOutcome.PoolGone
    if (this.contents.frozen && !keys.some((key) => this.contents.parts.has(key))) return PutOutcome.Frozen
    this.remove(keys)
    for (const [part, key] of keys.entries()) {
      const source = page.subarray(part * basePageSize, (part + 1) * basePageSize)
      const outcome = this.store.add(this.contents, key, source)
      if (outcome === PutOutcome.Stored) continue
      this.remove(keys)
      return outcome
    }
    // Making room may have evicted the first parts of this very page.
    if (!keys.every((key) => this.contents.parts.has(key))) {
      this.remove(keys)
      return PutOutcome.NoMemory
    }
    this.store.counters.succ_puts++
    return PutOutcome.Stored
  }

  remove(keys: readonly string[]): void {
    for (const key of keys) {
      const part = this.contents.parts.get(key)
      if (part !== undefined) this.store.drop(part)
    }
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.attributes.pageSize)
    const keys = this.keys(object, index)
    this.store.counters.gets++
    const page = this.read(keys)
    if (page === undefined) return GetOutcome.Miss
    into.set(page)
    this.taken(keys)
    this.store.counters.succ_gets++
    return GetOutcome.Hit
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    return this.get(object, index, into)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    const keys = this.keys(object, index)
    this.store.counters.gets++
    const page = this.read(keys)
    if (page === undefined) return GetOutcome.Miss
    use(page, 0, page.length)
    this.taken(keys)
    this.store.counters.succ_gets++
    return GetOutcome.Hit
  }

  /** A copy of the page; undefined unless all of its parts are there. */
  read(keys: readonly string[]): Uint8Array | undefined {
    const page = new Uint8Array(this.attributes.pageSize)
    for (const [i, key] of keys.entries()) {
      const part = this.contents.parts.get(key)
      if (part === undefined) return undefined
      page.set(part.bytes, i * basePageSize)
    }
    return page
  }

  /** A page was got: it leaves a private ephemeral pool. */
  taken(keys: readonly string[]): void {
    const { persistent, shared } = this.attributes
    if (!persistent && !shared) this.remove(keys)
  }

  flushPage(object: ObjectId, index: number): void {
    this.remove(this.keys(object, index))
  }

  flushObject(object: ObjectId): void {
    assertObject(object)
    this.remove([...this.contents.parts.keys()].filter((key) => key.startsWith(`${object}/`)))
  }

  putMany(batch: PageBatch): number {
    this.assertBatch(batch)
    let stored = 0
    for (let i = 0; i < batch.length; i++) {
      const outcome = batch.outcomes[i]
      if (outcome === Pending) batch.outcomes[i] = this.put(batch.objects[i]!, batch.indexes[i]!, pageAt(batch, i))
      else if (outcome === PutOutcome.Stored) this.flushPage(batch.objects[i]!, batch.indexes[i]!)
      if (batch.outcomes[i] === PutOutcome.Stored) stored++
    }
    return stored
  }

  getMany(batch: PageBatch): number {
    this.assertBatch(batch)
    let hits = 0
    for (let i = 0; i < batch.length; i++) {
      if (batch.outcomes[i] === Pending)
        batch.outcomes[i] = this.get(batch.objects[i]!, batch.indexes[i]!, pageAt(batch, i))
      if (batch.outcomes[i] === GetOutcome.Hit) hits++
    }
    return hits
  }

  flushMany(batch: PageBatch): void {
    this.assertBatch(batch)
    for (let i = 0; i < batch.length; i++) this.flushPage(batch.objects[i]!, batch.indexes[i]!)
  }

  assertBatch(batch: PageBatch): void {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
  }

  split(): Pool | PoolRefusal {
    return this.store.poolOf(this.contents, Object.freeze({ ...this.attributes, pageSize: basePageSize }))
  }

  freeze(): void {
    this.contents.frozen = true
  }

  thaw(): void {
    this.contents.frozen = false
  }

  destroy(): void {
    this.store.empty(this.contents)
  }
}

/** The page of an entry. */
export const pageAt = (batch: PageBatch, entry: number): Uint8Array =>
  batch.bytes.subarray(batch.offsets[entry]!, batch.offsets[entry]! + batch.pageSize)
