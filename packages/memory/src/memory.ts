/**
 * Plain memory, in a stack and alone.
 *
 * Among other places it is a place (`place.ts`), and the chain decides what rests in it. As the only one of a stack it
 * is a store by itself, which can do more: one page engine behind the interface of a store, whose pages can be seen in
 * parts, and, without `compose`, exchanged frame by frame. The store keeps nothing but engine state: see `engine.ts`
 * for the invariants.
 */
import type {
  Borrower,
  Budget,
  ByteAmount,
  ByteLimit,
  Capabilities,
  Census,
  Layer,
  LayerContext,
  LayerFactory,
  ObjectId,
  PageBatch,
  PageStore,
  PageVisitor,
  PlaceTraits,
  Pool,
  PoolAttributes,
  PoolRefusal,
  Progress,
  StatsNode,
  Whereabouts,
} from '@tmem/core'
import {
  assertBatch,
  assertClient,
  assertIndex,
  assertPage,
  basePageSize,
  checkedAttributes,
  checkOptions,
  GetOutcome,
  idle,
  limitOf,
  none,
  Pending,
  PutOutcome,
  PoolRefusal as Refusal,
} from '@tmem/core'
import type { Engine } from './engine.ts'
import { orderOf, Engine as PageEngine, refusalOf } from './engine.ts'
import { FramesPlace, framesFor } from './place.ts'

/** Settings of the memory store. */
export interface MemoryOptions {
  /**
   * Budget in bytes, pages and metadata together: about 32 KiB to 64 GiB. A `ByteLimit` can be changed while the store
   * is in use: lowered, it gives pages up (in a stack: to the places below) and chunks back at the next ticks.
   */
  readonly limitBytes: ByteAmount | ByteLimit
}

/**
 * Plain memory as a layer: a place among others, or a whole store when it is the only place of its stack. Throws
 * `RangeError` for a limit without room for a page and its metadata.
 */
export function memory(options: MemoryOptions): Layer {
  checkOptions('memory', options, { limitBytes: true })
  const limit = limitOf('memory', 'limitBytes', options.limitBytes)
  const frames = framesFor(limit.maximumBytes)
  if (frames < 1) throw new RangeError(`memory: ${noRoomIn(limit)}`)
  const traits: PlaceTraits = Object.freeze({
    persistent: true,
    ephemeral: true,
    waits: false,
    survives: 'nothing',
    rawOnly: true,
    capacity: frames,
    reservedBytes: frames * basePageSize,
    maxPageSize: PageEngine.largestPageFor(limit.maximumBytes),
  })
  return {
    name: 'memory',
    place: { traits, open: (context) => new FramesPlace(limit, traits, context) },
    plan: () => capabilitiesOf(limit) ?? noRoomIn(limit),
    open: (_next, context) => new MemoryStore(limit, context),
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

const noRoomIn = (limit: ByteLimit): string =>
  `a limit of ${limit.maximumBytes} bytes has no room for a page and its metadata`

/** What a store of that limit can do by itself, where it has room for a page. */
function capabilitiesOf(limit: ByteLimit): Capabilities | undefined {
  const capacity = PageEngine.capacityFor(limit.maximumBytes)
  if (capacity < 1) return undefined
  return Object.freeze({
    ephemeral: true,
    persistent: true,
    shared: true,
    minPageSize: basePageSize,
    maxPageSize: PageEngine.largestPageFor(limit.maximumBytes),
    deferred: false,
    split: true,
    reservedBytes: capacity * basePageSize,
    readsOnce: true,
  })
}

/** The store of plain memory: what `memory(…)` alone opens; made with `new`, it exchanges frames. */
export class MemoryStore implements PageStore {
  readonly name = 'memory'
  readonly capabilities: Capabilities
  readonly #engine: Engine
  readonly #pools: MemoryPool[] = []
  #closing: Promise<void> | undefined

  /**
   * Throws `RangeError` for a limit without room for a page or for more than 2^24-1 of them, `TmemError`
   * (`TMEM_NO_MEMORY`).
   */
  constructor(limit: ByteLimit, context: LayerContext) {
    const capabilities = capabilitiesOf(limit)
    if (capabilities === undefined) throw new RangeError(`memory: ${noRoomIn(limit)}`)
    this.capabilities = capabilities
    const { allocator, accounts } = context
    this.#engine = PageEngine.create({ limit, allocator, accounts, fixed: allocator.ahead === true })
  }

  newPool(attributes: PoolAttributes): MemoryPool | PoolRefusal {
    const checked = checkedAttributes(attributes)
    if (this.#closing !== undefined) return Refusal.Closed
    const number = this.#engine.newPool(checked)
    if (number < 0) return refusalOf(number)
    const pool = new MemoryPool(this.#engine, number, checked)
    this.#pools[number] = pool
    return pool
  }

  tick(budget: Budget): Progress {
    if (this.#closing !== undefined) return idle
    const pages = this.#engine.tick(budget.pages)
    return { pages, pending: pages > 0 && this.#engine.pending }
  }

  evict(client?: number): number {
    return this.#closing === undefined ? this.#engine.evictOne(client) : 0
  }

  ephemeralBytes(): number {
    return this.#engine.ephemeralBytes()
  }

  stats(): StatsNode {
    return { name: this.name, counters: this.#engine.statistics(), children: [] }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    for (const pool of this.#pools) pool?.destroy()
    this.#engine.release()
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
  readonly #pageSize: number
  /** log2 of the frames in a page of this pool or view. */
  readonly #order: number
  /** Frames in a page. */
  readonly #frames: number

  /**
   * Made by `MemoryStore.newPool` and `split`; a view in parts is of the generation of its pool, also when that is
   * gone.
   */
  constructor(
    engine: Engine,
    number: number,
    attributes: PoolAttributes,
    generation: number = engine.generation(number),
  ) {
    this.#engine = engine
    this.#number = number
    this.#generation = generation
    this.attributes = attributes
    this.#pageSize = attributes.pageSize
    this.#order = orderOf(attributes.pageSize)
    this.#frames = 1 << this.#order
    // Some pages of a pool of large ones may be here in parts only.
    if (engine.attributesOf(number)?.pageSize !== basePageSize) this.whereIs = undefined as never
    if (this.#order === 0) return
    this.walk = undefined as never
    this.census = undefined as never
  }

  /** Absent for pools of larger pages than 4 KiB. */
  whereIs(object: ObjectId, index: number, into: Whereabouts): boolean {
    assertIndex(index, basePageSize)
    if (this.#gone() || !this.#engine.has(this.#number, object, index)) return false
    into.place = 0
    into.bytes = basePageSize
    into.codec = 0
    into.huge = true
    into.recompressed = into.incompressible = false
    return true
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.#pageSize)
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return PutOutcome.PoolGone
    return this.#engine.put(this.#number, object, index * this.#frames, this.#order, page, 0)
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.#pageSize)
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return GetOutcome.Miss
    return this.#engine.get(this.#number, object, index * this.#frames, this.#order, into, 0)
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    return this.get(object, index, into)
  }

  flushPage(object: ObjectId, index: number): void {
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return
    this.#engine.flushPage(this.#number, object, index * this.#frames, this.#order)
  }

  flushObject(object: ObjectId): void {
    if (this.#gone()) return
    this.#engine.flushObject(this.#number, object)
  }

  putMany(batch: PageBatch): number {
    assertBatch(batch, this.#pageSize)
    if (this.#gone()) return settle(batch, PutOutcome.PoolGone)
    this.#engine.putMany(this.#number, batch, this.#order)
    return count(batch)
  }

  getMany(batch: PageBatch): number {
    assertBatch(batch, this.#pageSize)
    if (this.#gone()) return settle(batch, GetOutcome.Miss)
    this.#engine.getMany(this.#number, batch, this.#order)
    return count(batch)
  }

  flushMany(batch: PageBatch): void {
    assertBatch(batch, this.#pageSize)
    if (this.#gone()) return
    for (let i = 0; i < batch.length; i++)
      this.#engine.flushPage(this.#number, batch.objects[i], batch.indexes[i] * this.#frames, this.#order)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return GetOutcome.Miss
    return this.#engine.lend(this.#number, object, index * this.#frames, this.#order, use)
  }

  /** Absent for pages of more than 4 KiB, as is `census`. */
  walk(visit: PageVisitor, object?: ObjectId): void {
    if (!this.#gone()) this.#engine.walk(this.#number, visit, object)
  }

  census(into: Census = { pages: 0, objects: 0 }): Census {
    if (!this.#gone()) return this.#engine.census(this.#number, into)
    into.pages = 0
    into.objects = 0
    return into
  }

  split(): MemoryPool {
    const attributes = Object.freeze({ ...this.attributes, pageSize: basePageSize })
    return new MemoryPool(this.#engine, this.#number, attributes, this.#generation)
  }

  handOver(client: number): boolean {
    assertClient(client)
    return this.#gone() || this.#engine.handOver(this.#number, client)
  }

  freeze(): void {
    if (this.#gone()) return
    this.#engine.freeze(this.#number, true)
  }

  thaw(): void {
    if (this.#gone()) return
    this.#engine.freeze(this.#number, false)
  }

  destroy(): void {
    if (this.#gone()) return
    this.#engine.destroyPool(this.#number)
  }

  /**
   * Exchange of ownership: a page-sized run of the store's own memory for the caller to write, zeroed; its number, or
   * the (negative) put refusal. It counts against the limit until it is put in or given back.
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
   * Puts a page by moving its frame in: no copy. On `Stored` the frame is the store's; refused, it stays the caller's
   * and no page is left under the handle. Throws `RangeError` for a frame that is not the caller's.
   */
  putFrame(object: ObjectId, index: number, frame: number): PutOutcome {
    assertIndex(index, this.#pageSize)
    if (this.#gone()) return PutOutcome.PoolGone
    return this.#engine.putFrame(this.#number, object, index * this.#frames, frame)
  }

  /**
   * Gets a page by moving its frame out, whatever the kind of pool: no copy, and the page is gone here. `-1` is a miss.
   */
  takeFrame(object: ObjectId, index: number): number {
    assertIndex(index, this.#pageSize)
    return this.#gone() ? none : this.#engine.takeFrame(this.#number, object, index * this.#frames)
  }

  /** Gives a frame of the caller's back. Throws `RangeError` for one that is not the caller's. */
  freeFrame(frame: number): void {
    this.#engine.freeFrame(frame)
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
