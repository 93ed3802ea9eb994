/**
 * The store of plain memory: one page engine behind the interface of a store, alone or above another layer.
 *
 * What the engine refuses goes to the layer below, if there is one; so do pages that it evicts. The store keeps nothing
 * but engine state: see `engine.ts` for the invariants.
 */
import type {
  Borrower,
  Budget,
  Capabilities,
  Layer,
  LayerContext,
  LayerFactory,
  ObjectId,
  PageBatch,
  PageStore,
  PlaceTraits,
  Pool,
  PoolAttributes,
  PoolRefusal,
  Progress,
  StatsNode,
} from '@tmem/core'
import {
  assertBatch,
  assertIndex,
  assertPage,
  ByteLimit,
  basePageSize,
  checkedAttributes,
  GetOutcome,
  idle,
  maxPageSize,
  none,
  Pending,
  PutOutcome,
  PoolRefusal as Refusal,
  TmemError,
} from '@tmem/core'
import type { Engine } from './engine.ts'
import { orderOf, Engine as PageEngine, refusalOf } from './engine.ts'
import { FramesPlace, framesFor } from './place.ts'

/** Settings of the memory store. */
export interface MemoryOptions {
  /**
   * Budget in bytes, pages and metadata together: about 32 KiB to 64 GiB. A `ByteLimit` can be changed while the store
   * is in use: lowered, it evicts, demotes and gives chunks back at the next ticks.
   */
  readonly limitBytes: number | ByteLimit
}

/** The memory store as a layer: terminal, or above another one that takes what it refuses and evicts. */
export function memory(options: MemoryOptions): Layer {
  const limit = typeof options.limitBytes === 'number' ? new ByteLimit(options.limitBytes) : options.limitBytes
  const traits: PlaceTraits = Object.freeze({
    persistent: true,
    ephemeral: true,
    waits: false,
    survives: 'nothing',
    rawOnly: true,
    capacity: Math.max(1, framesFor(limit.maximumBytes)),
    reservedBytes: framesFor(limit.maximumBytes) * basePageSize,
    maxPageSize: PageEngine.largestPageFor(limit.maximumBytes),
  })
  return {
    name: 'memory',
    place: { traits, open: (context) => new FramesPlace(limit, traits, context) },
    plan: (below) => capabilitiesOver(limit, below),
    open: (next, context) => new MemoryStore(limit, next, context),
  }
}

/** The memory store in the textual form of a stack: `memory(limit=64MiB)`. */
export const memoryFactory: LayerFactory = {
  name: 'memory',
  summary: 'plain memory, uncompressed',
  options: {
    limit: { kind: 'bytes', summary: 'budget of pages and metadata', required: true, minimum: 64 * 1024 },
  },
  create: (options) => memory({ limitBytes: options.limit as number }),
}

function capabilitiesOver(limit: ByteLimit, below: Capabilities | undefined): Capabilities | string {
  const capacity = PageEngine.capacityFor(limit.maximumBytes)
  if (capacity < 1) return `its limit of ${limit.maximumBytes} bytes has no room for a page and its metadata`
  return Object.freeze({
    ephemeral: true,
    persistent: below?.persistent ?? true,
    shared: true,
    minPageSize: below?.minPageSize ?? basePageSize,
    maxPageSize: Math.min(below?.maxPageSize ?? maxPageSize, PageEngine.largestPageFor(limit.maximumBytes)),
    deferred: below?.deferred ?? false,
    split: below === undefined,
    reservedBytes: below?.reservedBytes ?? capacity * basePageSize,
  })
}

/** The memory store opened; `memory(…)` in a stack, or `new MemoryStore(…)` alone, for the exchange of frames. */
export class MemoryStore implements PageStore {
  readonly name = 'memory'
  readonly capabilities: Capabilities
  readonly #engine: Engine
  readonly #next: PageStore | undefined
  readonly #pools: MemoryPool[] = []
  #closing: Promise<void> | undefined

  constructor(limit: ByteLimit, next: PageStore | undefined, context: LayerContext) {
    const capabilities = capabilitiesOver(limit, next?.capabilities)
    if (typeof capabilities === 'string')
      throw new TmemError('TMEM_BAD_STACK', `memory: ${capabilities}`, { layer: 'memory' })
    this.capabilities = capabilities
    this.#next = next
    const { allocator, accounts } = context
    this.#engine = PageEngine.create({ limit, allocator, accounts, fixed: allocator.ahead === true })
    if (next !== undefined)
      this.#engine.demotion = (pool, object, index, bytes) => this.#pools[pool].demote(object, index, bytes)
  }

  newPool(attributes: PoolAttributes): MemoryPool | PoolRefusal {
    const checked = checkedAttributes(attributes)
    if (this.#closing !== undefined) return Refusal.Closed
    const below = this.#next?.newPool(checked)
    // Ephemeral pages need nothing below: what is refused here is then really dropped.
    if (typeof below === 'number' && (below !== Refusal.Unsupported || checked.persistent)) return below
    const number = this.#engine.newPool(checked)
    if (number < 0) {
      if (typeof below === 'object') below.destroy()
      return refusalOf(number)
    }
    const pool = new MemoryPool(this.#engine, number, checked, typeof below === 'object' ? below : undefined)
    this.#pools[number] = pool
    return pool
  }

  tick(budget: Budget): Progress {
    if (this.#closing !== undefined) return idle
    const pages = this.#engine.tick(budget.pages)
    const below = this.#next?.tick({ pages: budget.pages - pages }) ?? idle
    return { pages: pages + below.pages, pending: (pages > 0 && this.#engine.pending) || below.pending }
  }

  stats(): StatsNode {
    return {
      name: this.name,
      counters: this.#engine.statistics(),
      children: this.#next === undefined ? [] : [this.#next.stats()],
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    for (const pool of this.#pools) pool?.destroy()
    this.#engine.release()
    await this.#next?.close()
  }

  /** Throws unless the invariants of the engine hold; for tests. */
  check(): void {
    this.#engine.check()
  }
}

/** A pool of the memory store: the interface of every pool, and the exchange of frames. */
export class MemoryPool implements Pool {
  readonly attributes: PoolAttributes
  readonly #engine: Engine
  readonly #number: number
  readonly #generation: number
  readonly #below: Pool | undefined
  readonly #pageSize: number
  /** log2 of the frames in a page of this pool or view. */
  readonly #order: number
  /** Frames in a page. */
  readonly #frames: number

  /** Made by `MemoryStore.newPool` and `split`; a view in parts is of the generation of its pool, also when that is gone. */
  constructor(
    engine: Engine,
    number: number,
    attributes: PoolAttributes,
    below: Pool | undefined,
    generation: number = engine.generation(number),
  ) {
    this.#engine = engine
    this.#number = number
    this.#generation = generation
    this.attributes = attributes
    this.#below = below
    this.#pageSize = attributes.pageSize
    this.#order = orderOf(attributes.pageSize)
    this.#frames = 1 << this.#order
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.#pageSize)
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return PutOutcome.PoolGone
    const outcome = this.#engine.put(this.#number, object, index * this.#frames, this.#order, page, 0)
    const below = this.#below
    if (below === undefined) return outcome
    if (outcome !== PutOutcome.Stored) return below.put(object, index, page)
    below.flushPage(object, index)
    return outcome
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.#pageSize)
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return GetOutcome.Miss
    const outcome = this.#engine.get(this.#number, object, index * this.#frames, this.#order, into, 0)
    if (outcome === GetOutcome.Hit || this.#below === undefined) return outcome
    return this.#below.get(object, index, into)
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    const outcome = this.get(object, index, into)
    if (outcome !== GetOutcome.Deferred) return outcome
    const fetched = await this.#below!.fetch(object, index, into)
    if (fetched !== GetOutcome.Miss || this.#gone()) return fetched
    // A put may have brought the page up here meanwhile, which took it away below.
    return this.#engine.get(this.#number, object, index * this.#frames, this.#order, into, 0)
  }

  flushPage(object: ObjectId, index: number): void {
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return
    this.#engine.flushPage(this.#number, object, index * this.#frames, this.#order)
    this.#below?.flushPage(object, index)
  }

  flushObject(object: ObjectId): void {
    if (this.#gone()) return
    this.#engine.flushObject(this.#number, object)
    this.#below?.flushObject(object)
  }

  putMany(batch: PageBatch): number {
    assertBatch(batch, this.#pageSize)
    if (this.#gone()) return settle(batch, PutOutcome.PoolGone)
    this.#engine.putMany(this.#number, batch, this.#order, this.#below === undefined)
    return this.#below === undefined ? count(batch) : this.#below.putMany(batch)
  }

  getMany(batch: PageBatch): number {
    assertBatch(batch, this.#pageSize)
    if (this.#gone()) return settle(batch, GetOutcome.Miss)
    this.#engine.getMany(this.#number, batch, this.#order, this.#below === undefined)
    return this.#below === undefined ? count(batch) : this.#below.getMany(batch)
  }

  flushMany(batch: PageBatch): void {
    assertBatch(batch, this.#pageSize)
    if (this.#gone()) return
    for (let i = 0; i < batch.length; i++)
      this.#engine.flushPage(this.#number, batch.objects[i], batch.indexes[i] * this.#frames, this.#order)
    this.#below?.flushMany(batch)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return GetOutcome.Miss
    const outcome = this.#engine.lend(this.#number, object, index * this.#frames, this.#order, use)
    return outcome === GetOutcome.Hit || this.#below === undefined ? outcome : this.#below.lend(object, index, use)
  }

  split(): MemoryPool | PoolRefusal {
    // Over another layer a page could lie half here and half there, and then neither would have it.
    if (this.#below !== undefined) return Refusal.Unsupported
    const attributes = Object.freeze({ ...this.attributes, pageSize: basePageSize })
    return new MemoryPool(this.#engine, this.#number, attributes, undefined, this.#generation)
  }

  freeze(): void {
    if (this.#gone()) return
    this.#engine.freeze(this.#number, true)
    this.#below?.freeze()
  }

  thaw(): void {
    if (this.#gone()) return
    this.#engine.freeze(this.#number, false)
    this.#below?.thaw()
  }

  destroy(): void {
    if (this.#gone()) return
    this.#engine.destroyPool(this.#number)
    this.#below?.destroy()
  }

  /**
   * Exchange of ownership: a page-sized run of the store's own memory for the caller to write, zeroed; its number, or the
   * (negative) put refusal. It counts against the limit until it is put in or given back.
   */
  reserveFrame(): number {
    return this.#gone() ? -PutOutcome.PoolGone : this.#engine.reserveFrame(this.#number)
  }

  /** The bytes that hold a frame of the caller's; it starts at `frameOffset(frame)`. */
  frameBytes(frame: number): Uint8Array {
    return this.#engine.bytesOf(frame)
  }

  /** Where a frame of the caller's starts in `frameBytes(frame)`. */
  frameOffset(frame: number): number {
    return this.#engine.offsetOf(frame)
  }

  /**
   * Puts a page by moving its frame in: no copy. On `Stored` the frame is the store's; refused, it stays the caller's and
   * no page is left under the handle. Throws `RangeError` for a frame that is not the caller's.
   */
  putFrame(object: ObjectId, index: number, frame: number): PutOutcome {
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return PutOutcome.PoolGone
    const outcome = this.#engine.putFrame(this.#number, object, index * this.#frames, frame)
    this.#below?.flushPage(object, index)
    return outcome
  }

  /** Gets a page by moving its frame out, whatever the kind of pool: no copy, and the page is gone here. `-1` is a miss. */
  takeFrame(object: ObjectId, index: number): number {
    assertIndex(index, this.#pageSize)
    return this.#gone() ? none : this.#engine.takeFrame(this.#number, object, index * this.#frames)
  }

  /** Gives a frame of the caller's back. Throws `RangeError` for one that is not the caller's. */
  freeFrame(frame: number): void {
    this.#engine.freeFrame(frame)
  }

  /** Offers a page to the layer below; whether it took it. The store's own use. */
  demote(object: ObjectId, index: number, bytes: Uint8Array): boolean {
    return this.#below?.put(object, index, bytes) === PutOutcome.Stored
  }

  #gone(): boolean {
    return this.#engine.generation(this.#number) !== this.#generation
  }
}

/** Entries with outcome 0: `Stored` or `Hit`. */
function count(batch: PageBatch): number {
  const { outcomes, length } = batch
  let zero = 0
  for (let i = 0; i < length; i++) if (outcomes[i] === 0) zero++
  return zero
}

/** Gives every entry that waits this outcome. */
function settle(batch: PageBatch, outcome: number): number {
  for (let i = 0; i < batch.length; i++) if (batch.outcomes[i] === Pending) batch.outcomes[i] = outcome
  return count(batch)
}
