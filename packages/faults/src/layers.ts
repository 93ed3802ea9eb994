/**
 * The fault layers: each passes everything on but the one thing that it is there to break or to watch.
 *
 * Everything is deterministic: counters and seeds are given, there is no clock and no random number. What a fault layer
 * does is allowed to a layer by the interface (refusing, forgetting, deferring), so a stack with one of them in it
 * passes the conformance suite; the exception is `corrupt`, which lies, and which whatever verifies must catch.
 */
import type {
  Allocator,
  Borrower,
  Capabilities,
  Layer,
  LayerContext,
  LayerFactory,
  ObjectId,
  PageBatch,
  PageStore,
  Pool,
  PoolAttributes,
  Progress,
  StatsNode,
} from '@tmem/core'
import {
  assertBatch,
  assertEntries,
  assertIndex,
  assertObject,
  assertPage,
  basePageSize,
  checkedAttributes,
  GetOutcome,
  HandleTable,
  idle,
  maxPageSize,
  none,
  Pending,
  PoolRefusal,
  PutOutcome,
  TmemError,
} from '@tmem/core'
import type { BatchJudge } from './passing.ts'
import {
  decidedAbove,
  maxBatchEntries,
  openPassing,
  PassingPool,
  PassingStore,
  passingPlan,
  putRefusing,
} from './passing.ts'

const assertPositive = (what: string, value: number): void => {
  if (!Number.isInteger(value) || value < 1) throw new RangeError(`${what} must be a positive integer, got ${value}`)
}

const reserve = (allocator: Allocator, bytes: number, site: string): ArrayBufferLike => {
  const memory = allocator.allocate(bytes, site)
  if (memory !== undefined) return memory
  const layer = site.slice(0, site.indexOf('.'))
  throw new TmemError('TMEM_NO_MEMORY', `${layer} cannot open: no memory for ${site} (${bytes} bytes)`, { layer })
}

/** Settings of `refuse`. */
export interface RefuseOptions {
  /** Every n-th put is refused, counted over all pools of the store and entry by entry in batches; 1 refuses all. */
  readonly every: number
  /** The reason given (default `Policy`). Anything but `Stored`. */
  readonly reason?: PutOutcome
}

/** Refuses every n-th put. By the rules no layer holds a page under that handle afterwards, not even an older one. */
export function refuse(options: RefuseOptions): Layer {
  const { every, reason = PutOutcome.Policy } = options
  assertPositive('every', every)
  if (reason === PutOutcome.Stored) throw new RangeError('the reason of a refusal cannot be Stored')
  const changes = { reservedBytes: 0 }
  return Object.freeze({
    name: 'refuse',
    plan: (below: Capabilities | undefined) => passingPlan(below, changes),
    open: (next: PageStore | undefined, { allocator }: LayerContext) =>
      openPassing('refuse', next, changes, (capabilities, below) => {
        const marks = new Uint8Array(reserve(allocator, maxBatchEntries, 'refuse.marks'))
        return new RefuseStore(capabilities, below, every, reason, marks)
      }),
  })
}

class RefuseStore extends PassingStore {
  readonly every: number
  readonly reason: PutOutcome
  readonly marks: Uint8Array
  puts = 0
  refused = 0
  closed = false

  constructor(capabilities: Capabilities, next: PageStore, every: number, reason: PutOutcome, marks: Uint8Array) {
    super('refuse', capabilities, next)
    this.every = every
    this.reason = reason
    this.marks = marks
  }

  wrap(pool: Pool): Pool {
    return new RefusePool(pool, this, { gone: false })
  }

  counters(): Readonly<Record<string, number>> {
    return { puts: this.puts, refused: this.refused }
  }

  override close(): Promise<void> {
    this.closed = true
    return this.next.close()
  }
}

class RefusePool extends PassingPool implements BatchJudge {
  readonly #store: RefuseStore
  /** Shared with the view in parts. */
  readonly #life: { gone: boolean }

  constructor(next: Pool, store: RefuseStore, life: { gone: boolean }) {
    super(next)
    this.#store = store
    this.#life = life
  }

  over(next: Pool): Pool {
    return new RefusePool(next, this.#store, this.#life)
  }

  /** Counts a put. In a pool that is gone nothing is refused here, so that the answer is the right one: `PoolGone`. */
  judge(): PutOutcome {
    const store = this.#store
    if (this.#life.gone || store.closed) return PutOutcome.Stored
    store.puts++
    if (store.puts % store.every !== 0) return PutOutcome.Stored
    store.refused++
    return store.reason
  }

  override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const outcome = this.judge()
    if (outcome === PutOutcome.Stored) return this.next.put(object, index, page)
    this.next.flushPage(object, index)
    return outcome
  }

  override putMany(batch: PageBatch): number {
    return putRefusing(this.next, batch, this.#store.marks, this)
  }

  override destroy(): void {
    this.#life.gone = true
    this.next.destroy()
  }
}

const reasons: readonly string[] = Object.keys(PutOutcome).filter((name) => name !== 'Stored')

/** `refuse(every=3,reason=NoMemory)` in the text of a stack. */
export const refuseFactory: LayerFactory = {
  name: 'refuse',
  summary: 'refuses every n-th put',
  options: {
    every: { kind: 'integer', summary: 'refuse every n-th put', required: true, minimum: 1 },
    reason: { kind: 'text', summary: 'the reason given', choices: reasons },
  },
  create: ({ every, reason }) =>
    refuse({
      every: every as number,
      ...(reason === undefined ? {} : { reason: PutOutcome[reason as keyof typeof PutOutcome] }),
    }),
}

/** Settings of `delay`. */
export interface DelayOptions {
  /** Resolves when it is a fetch's turn: the caller's scheduler. */
  readonly turn: () => Promise<void>
  /**
   * 4 KiB pages that the layer can keep book of, 1 to 2^24-1 (default 65,536: 5.3 MiB); a put beyond is refused (`NoMemory`).
   * An ephemeral page that vanished below stays in the book until it is asked for or flushed.
   */
  readonly pages?: number
}

const delayPools = 256

/**
 * Answers every get of a page that is below with `Deferred`; `fetch` then waits for its turn. Misses are answered at once:
 * the layer keeps book of what is below, by 4 KiB part, as a layer over a network or a disk would.
 */
export function delay(options: DelayOptions): Layer {
  const { turn, pages = 65_536 } = options
  const changes = { deferred: true, reservedBytes: 0 }
  assertPositive('pages', pages)
  return Object.freeze({
    name: 'delay',
    plan: (below: Capabilities | undefined) => passingPlan(below, changes),
    open: (next: PageStore | undefined, { allocator }: LayerContext) =>
      openPassing('delay', next, changes, (capabilities, below) => {
        const marks = new Uint8Array(reserve(allocator, maxBatchEntries, 'delay.marks'))
        const book = HandleTable.create({ capacity: pages, pools: delayPools, allocator, site: 'delay.book' })
        return new DelayStore(capabilities, below, turn, book, marks)
      }),
  })
}

class DelayStore extends PassingStore {
  readonly turn: () => Promise<void>
  readonly book: HandleTable
  readonly marks: Uint8Array
  readonly used = new Uint8Array(delayPools)
  /** Puts so far: tells whether there was one while something waited. */
  changes = 0
  deferred = 0
  fetches = 0
  refused = 0
  closed = false

  constructor(
    capabilities: Capabilities,
    next: PageStore,
    turn: () => Promise<void>,
    book: HandleTable,
    marks: Uint8Array,
  ) {
    super('delay', capabilities, next)
    this.turn = turn
    this.book = book
    this.marks = marks
  }

  wrap(pool: Pool): Pool | PoolRefusal {
    const number = this.used.indexOf(0)
    if (number === -1) return PoolRefusal.NoSlot
    this.used[number] = 1
    return new DelayPool(pool, this, { number })
  }

  counters(): Readonly<Record<string, number>> {
    const { deferred, fetches, refused, book } = this
    return { deferred, fetches, refused_no_memory: refused, booked_pages: book.size }
  }

  override close(): Promise<void> {
    this.closed = true
    return this.next.close()
  }
}

class DelayPool extends PassingPool implements BatchJudge {
  readonly #store: DelayStore
  readonly #parts: number
  /** Number in the book, `none` once destroyed; shared with the view in parts. */
  readonly #place: { number: number }

  constructor(next: Pool, store: DelayStore, place: { number: number }) {
    super(next)
    this.#store = store
    this.#parts = this.attributes.pageSize / basePageSize
    this.#place = place
  }

  over(next: Pool): Pool {
    return new DelayPool(next, this.#store, this.#place)
  }

  get #gone(): boolean {
    return this.#place.number === none || this.#store.closed
  }

  /** True when every part of the page is in the book. */
  #booked(object: ObjectId, index: number): boolean {
    const { book } = this.#store
    for (let part = 0; part < this.#parts; part++)
      if (book.find(this.#place.number, object, index * this.#parts + part) === none) return false
    return true
  }

  /** Enters what is missing of the page; false, and the page is out of the book, when that is full. */
  #enter(object: ObjectId, index: number): boolean {
    const { book } = this.#store
    const { number } = this.#place
    for (let part = index * this.#parts; part < (index + 1) * this.#parts; part++) {
      if (book.find(number, object, part) !== none) continue
      const entry = book.acquire()
      if (entry !== none && book.insert(entry, number, object, part)) continue
      if (entry !== none) book.release(entry)
      this.#strike(object, index)
      return false
    }
    return true
  }

  #strike(object: ObjectId, index: number): void {
    const { book } = this.#store
    for (let part = index * this.#parts; part < (index + 1) * this.#parts; part++)
      this.#free(book.find(this.#place.number, object, part))
  }

  #free(entry: number): void {
    if (entry === none) return
    const { book } = this.#store
    book.remove(entry)
    book.release(entry)
  }

  judge(object: ObjectId, index: number): PutOutcome {
    if (this.#gone || this.#enter(object, index)) return PutOutcome.Stored
    this.#store.refused++
    return PutOutcome.NoMemory
  }

  override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const verdict = this.judge(object, index)
    if (verdict !== PutOutcome.Stored) {
      this.next.flushPage(object, index)
      return verdict
    }
    this.#store.changes++
    const outcome = this.next.put(object, index, page)
    if (outcome !== PutOutcome.Stored && !this.#gone) this.#strike(object, index)
    return outcome
  }

  override putMany(batch: PageBatch): number {
    const stored = putRefusing(this.next, batch, this.#store.marks, this)
    if (this.#gone) return stored
    this.#store.changes++
    // In order, because a batch may name a handle twice. What is entered here again had its place a moment ago.
    const { marks } = this.#store
    const { objects, indexes, outcomes, length } = batch
    for (let i = 0; i < length; i++) {
      const stored = outcomes[i] === PutOutcome.Stored
      if (marks[i] === PutOutcome.Stored && stored) this.#enter(objects[i]!, indexes[i]!)
      else if (marks[i] !== decidedAbove || stored) this.#strike(objects[i]!, indexes[i]!)
    }
    return stored
  }

  override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    return this.#answer(object, index)
  }

  override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    return this.#answer(object, index)
  }

  override getMany(batch: PageBatch): number {
    const { objects, indexes, outcomes, length } = batch
    let hits = 0
    for (let i = 0; i < length; i++) {
      if (outcomes[i] === Pending) outcomes[i] = this.#answer(objects[i]!, indexes[i]!)
      if (outcomes[i] === GetOutcome.Hit) hits++
    }
    return hits
  }

  #answer(object: ObjectId, index: number): GetOutcome {
    if (this.#gone || !this.#booked(object, index)) return GetOutcome.Miss
    this.#store.deferred++
    return GetOutcome.Deferred
  }

  override async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    this.#store.fetches++
    await this.#store.turn()
    const { changes } = this.#store
    const outcome = await this.next.fetch(object, index, into)
    const { persistent, shared } = this.attributes
    const taken = outcome === GetOutcome.Miss || (!persistent && !shared)
    // After a put in between the page may be a new one: then it stays in the book, and the next fetch settles it.
    if (taken && changes === this.#store.changes && !this.#gone) this.#strike(object, index)
    return outcome
  }

  override flushPage(object: ObjectId, index: number): void {
    if (!this.#gone) this.#strike(object, index)
    this.next.flushPage(object, index)
  }

  override flushMany(batch: PageBatch): void {
    if (!this.#gone) for (let i = 0; i < batch.length; i++) this.#strike(batch.objects[i]!, batch.indexes[i]!)
    this.next.flushMany(batch)
  }

  override flushObject(object: ObjectId): void {
    if (!this.#gone) {
      const { book } = this.#store
      for (let entry = book.firstOfObject(this.#place.number, object); entry !== none; ) {
        this.#free(entry)
        entry = book.firstOfObject(this.#place.number, object)
      }
    }
    this.next.flushObject(object)
  }

  override destroy(): void {
    const { book, used } = this.#store
    const { number } = this.#place
    if (number !== none) {
      for (let entry = book.firstOfPool(number); entry !== none; entry = book.firstOfPool(number)) this.#free(entry)
      used[number] = 0
      this.#place.number = none
    }
    this.next.destroy()
  }
}

/** `delay(pages=65536)` in the text of a stack; the turns come from the given scheduler. */
export const delayFactory = (turn: () => Promise<void>): LayerFactory => ({
  name: 'delay',
  summary: 'answers every hit later',
  options: { pages: { kind: 'integer', summary: '4 KiB pages to keep book of', minimum: 1, maximum: 2 ** 24 - 1 } },
  create: ({ pages }) => delay({ turn, ...(pages === undefined ? {} : { pages: pages as number }) }),
})

/** Settings of `corrupt`. */
export interface CorruptOptions {
  /** Every n-th page that is served has one bit flipped, counted over all pools of the store; 1 flips in all. */
  readonly every: number
  /** Chooses the bits: a 32-bit integer (default 1). The same seed flips the same bits. */
  readonly seed?: number
}

/** Flips one bit in every n-th page that is got: what a verification above must catch. Never part of an honest stack. */
export function corrupt(options: CorruptOptions): Layer {
  const { every, seed = 1 } = options
  assertPositive('every', every)
  if (!Number.isInteger(seed)) throw new RangeError(`seed must be an integer, got ${seed}`)
  return Object.freeze({
    name: 'corrupt',
    plan: (below: Capabilities | undefined) => passingPlan(below),
    open: (next: PageStore | undefined, { allocator }: LayerContext) =>
      openPassing('corrupt', next, {}, (capabilities, below) => {
        return new CorruptStore(capabilities, below, every, seed, allocator)
      }),
  })
}

class CorruptStore extends PassingStore {
  readonly #every: number
  readonly #allocator: Allocator
  #random: number
  #hits = 0
  #corrupted = 0

  constructor(capabilities: Capabilities, next: PageStore, every: number, seed: number, allocator: Allocator) {
    super('corrupt', capabilities, next)
    this.#every = every
    this.#allocator = allocator
    // A xorshift generator never leaves zero.
    this.#random = seed | 0 || 1
  }

  wrap(pool: Pool): Pool | PoolRefusal {
    const scratch = this.#allocator.allocate(pool.attributes.pageSize, 'corrupt.page')
    if (scratch === undefined) return PoolRefusal.NoMemory
    return new CorruptPool(pool, this, new Uint8Array(scratch))
  }

  counters(): Readonly<Record<string, number>> {
    return { hits: this.#hits, corrupted: this.#corrupted }
  }

  /** Counts a hit: the number of the bit to flip in a page of `length` bytes, or -1 when this page stays whole. */
  nextBit(length: number): number {
    this.#hits++
    if (this.#hits % this.#every !== 0) return -1
    this.#corrupted++
    this.#random ^= this.#random << 13
    this.#random ^= this.#random >>> 17
    this.#random ^= this.#random << 5
    return (this.#random >>> 0) % (length * 8)
  }
}

const flip = (bytes: Uint8Array, at: number, bit: number): void => {
  if (bit >= 0) bytes[at + (bit >>> 3)]! ^= 1 << (bit & 7)
}

class CorruptPool extends PassingPool {
  readonly #store: CorruptStore
  readonly #scratch: Uint8Array

  constructor(next: Pool, store: CorruptStore, scratch: Uint8Array) {
    super(next)
    this.#store = store
    this.#scratch = scratch
  }

  over(next: Pool): Pool {
    return new CorruptPool(next, this.#store, this.#scratch.subarray(0, next.attributes.pageSize))
  }

  override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    const outcome = this.next.get(object, index, into)
    if (outcome === GetOutcome.Hit) flip(into, 0, this.#store.nextBit(into.length))
    return outcome
  }

  override async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    const outcome = await this.next.fetch(object, index, into)
    if (outcome === GetOutcome.Hit) flip(into, 0, this.#store.nextBit(into.length))
    return outcome
  }

  override getMany(batch: PageBatch): number {
    const { outcomes, length, bytes, offsets, pageSize } = batch
    const asked = outcomes.slice(0, length)
    const hits = this.next.getMany(batch)
    for (let i = 0; i < length; i++)
      if (asked[i] === Pending && outcomes[i] === GetOutcome.Hit)
        flip(bytes, offsets[i]!, this.#store.nextBit(pageSize))
    return hits
  }

  /** Lent bytes belong to the lender: the flipped page is a copy. */
  override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    return this.next.lend(object, index, (bytes, at, length) => {
      const bit = this.#store.nextBit(length)
      if (bit < 0) return use(bytes, at, length)
      this.#scratch.set(bytes.subarray(at, at + length))
      flip(this.#scratch, 0, bit)
      return use(this.#scratch, 0, length)
    })
  }
}

/** `corrupt(every=100,seed=7)` in the text of a stack. */
export const corruptFactory: LayerFactory = {
  name: 'corrupt',
  summary: 'flips a bit in every n-th page that is got',
  options: {
    every: { kind: 'integer', summary: 'flip a bit in every n-th page', required: true, minimum: 1 },
    seed: { kind: 'integer', summary: 'chooses the bits' },
  },
  create: ({ every, seed }) =>
    corrupt({ every: every as number, ...(seed === undefined ? {} : { seed: seed as number }) }),
}

/** Counts the calls that cross it, by operation: nodes of `stats()` named `count`. A batch is one crossing. */
export function count(): Layer {
  return Object.freeze({
    name: 'count',
    plan: (below: Capabilities | undefined) => passingPlan(below),
    open: (next: PageStore | undefined) =>
      openPassing('count', next, {}, (capabilities, below) => new CountStore(capabilities, below)),
  })
}

const operations = [
  'newPool',
  'put',
  'get',
  'fetch',
  'flushPage',
  'flushObject',
  'putMany',
  'getMany',
  'flushMany',
  'lend',
  'split',
  'freeze',
  'thaw',
  'destroy',
  'tick',
] as const
type Crossings = Record<(typeof operations)[number], number>

class CountStore extends PassingStore {
  readonly #crossings = Object.fromEntries(operations.map((name) => [name, 0])) as Crossings

  constructor(capabilities: Capabilities, next: PageStore) {
    super('count', capabilities, next)
  }

  wrap(pool: Pool): Pool {
    return new CountPool(pool, this.#crossings)
  }

  counters(): Readonly<Record<string, number>> {
    return { ...this.#crossings }
  }

  override newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    this.#crossings.newPool++
    return super.newPool(attributes)
  }

  override tick(budget: { readonly pages: number }): Progress {
    this.#crossings.tick++
    return this.next.tick(budget)
  }
}

class CountPool extends PassingPool {
  readonly #crossings: Crossings

  constructor(next: Pool, crossings: Crossings) {
    super(next)
    this.#crossings = crossings
  }

  over(next: Pool): Pool {
    return new CountPool(next, this.#crossings)
  }

  override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    this.#crossings.put++
    return this.next.put(object, index, page)
  }

  override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    this.#crossings.get++
    return this.next.get(object, index, into)
  }

  override fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    this.#crossings.fetch++
    return this.next.fetch(object, index, into)
  }

  override flushPage(object: ObjectId, index: number): void {
    this.#crossings.flushPage++
    this.next.flushPage(object, index)
  }

  override flushObject(object: ObjectId): void {
    this.#crossings.flushObject++
    this.next.flushObject(object)
  }

  override putMany(batch: PageBatch): number {
    this.#crossings.putMany++
    return this.next.putMany(batch)
  }

  override getMany(batch: PageBatch): number {
    this.#crossings.getMany++
    return this.next.getMany(batch)
  }

  override flushMany(batch: PageBatch): void {
    this.#crossings.flushMany++
    this.next.flushMany(batch)
  }

  override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    this.#crossings.lend++
    return this.next.lend(object, index, use)
  }

  override split(): Pool | PoolRefusal {
    this.#crossings.split++
    return super.split()
  }

  override freeze(): void {
    this.#crossings.freeze++
    this.next.freeze()
  }

  override thaw(): void {
    this.#crossings.thaw++
    this.next.thaw()
  }

  override destroy(): void {
    this.#crossings.destroy++
    this.next.destroy()
  }
}

/** `count()` in the text of a stack. */
export const countFactory: LayerFactory = {
  name: 'count',
  summary: 'counts the calls that cross it',
  options: {},
  create: () => count(),
}

/** Settings of `discard`. */
export interface DiscardOptions {
  /**
   * `refuse` (default): refuses every page (`Policy`), in pools of every kind.
   * `lose`: takes every page of an ephemeral pool and forgets it at once, which the interface allows.
   */
  readonly mode?: 'refuse' | 'lose'
}

/** The last layer of a stack that keeps nothing: for measuring the layers above, and as an end that does no harm. */
export function discard(options: DiscardOptions = {}): Layer {
  const lose = options.mode === 'lose'
  const capabilities: Capabilities = Object.freeze({
    ephemeral: true,
    persistent: !lose,
    shared: true,
    minPageSize: basePageSize,
    maxPageSize,
    deferred: false,
    split: true,
    reservedBytes: 0,
  })
  return Object.freeze({
    name: 'discard',
    plan: (below: Capabilities | undefined) => (below === undefined ? capabilities : 'it passes nothing on'),
    open: () => new DiscardStore(capabilities, lose),
  })
}

class DiscardStore implements PageStore {
  readonly name = 'discard'
  readonly capabilities: Capabilities
  readonly lose: boolean
  puts = 0
  gets = 0
  flushes = 0
  closed = false

  constructor(capabilities: Capabilities, lose: boolean) {
    this.capabilities = capabilities
    this.lose = lose
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const checked = checkedAttributes(attributes)
    if (this.closed) return PoolRefusal.Closed
    if (checked.shared && checked.persistent) return PoolRefusal.SharedPersistent
    if (checked.persistent && this.lose) return PoolRefusal.Unsupported
    return new DiscardPool(checked, this, { frozen: false, gone: false })
  }

  tick(): Progress {
    return idle
  }

  stats(): StatsNode {
    return { name: 'discard', counters: { puts: this.puts, gets: this.gets, flushes: this.flushes }, children: [] }
  }

  close(): Promise<void> {
    this.closed = true
    return Promise.resolve()
  }
}

class DiscardPool implements Pool {
  readonly attributes: PoolAttributes
  readonly #store: DiscardStore
  /** Shared with the view in parts. */
  readonly #state: { frozen: boolean; gone: boolean }

  constructor(attributes: PoolAttributes, store: DiscardStore, state: { frozen: boolean; gone: boolean }) {
    this.attributes = attributes
    this.#store = store
    this.#state = state
  }

  #outcome(): PutOutcome {
    this.#store.puts++
    if (this.#state.gone || this.#store.closed) return PutOutcome.PoolGone
    if (this.#state.frozen) return PutOutcome.Frozen
    return this.#store.lose ? PutOutcome.Stored : PutOutcome.Policy
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.attributes.pageSize)
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    return this.#outcome()
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.attributes.pageSize)
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    this.#store.gets++
    return GetOutcome.Miss
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    return this.get(object, index, into)
  }

  flushPage(object: ObjectId, index: number): void {
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    this.#store.flushes++
  }

  flushObject(object: ObjectId): void {
    assertObject(object)
    this.#store.flushes++
  }

  putMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    let stored = 0
    for (let i = 0; i < batch.length; i++) {
      if (batch.outcomes[i] === Pending) batch.outcomes[i] = this.#outcome()
      if (batch.outcomes[i] === PutOutcome.Stored) stored++
    }
    return stored
  }

  getMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    let hits = 0
    for (let i = 0; i < batch.length; i++) {
      this.#store.gets++
      if (batch.outcomes[i] === Pending) batch.outcomes[i] = GetOutcome.Miss
      if (batch.outcomes[i] === GetOutcome.Hit) hits++
    }
    return hits
  }

  flushMany(batch: PageBatch): void {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    this.#store.flushes += batch.length
  }

  lend(object: ObjectId, index: number, _use: Borrower): GetOutcome {
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    this.#store.gets++
    return GetOutcome.Miss
  }

  split(): Pool {
    return new DiscardPool(Object.freeze({ ...this.attributes, pageSize: basePageSize }), this.#store, this.#state)
  }

  freeze(): void {
    this.#state.frozen = true
  }

  thaw(): void {
    this.#state.frozen = false
  }

  destroy(): void {
    this.#state.gone = true
  }
}

/** `discard(mode=lose)` in the text of a stack. */
export const discardFactory: LayerFactory = {
  name: 'discard',
  summary: 'keeps nothing',
  options: { mode: { kind: 'text', summary: 'what becomes of a page', choices: ['refuse', 'lose'] } },
  create: ({ mode }) => discard(mode === undefined ? {} : { mode: mode as 'refuse' | 'lose' }),
}
