/**
 * The filters: each passes everything on but the one thing that it is there to break or to watch.
 *
 * Most stand above the first place of a stack, where pages pass, and between places as well, where blocks do (`fail`
 * and `tear` only there: above, it is for the stack to bear what they do).
 *
 * Everything is deterministic: counters and seeds are given, there is no clock and no random number. What a filter does
 * is allowed to a layer or to a place by the interface (refusing, forgetting, deferring, failing), so a stack with one
 * of them in it passes the conformance suite; the exceptions are `corrupt` and `tear`, which lie, and which whatever
 * verifies must catch.
 */
import {
  type Allocator,
  type Block,
  type Borrower,
  basePageSize,
  type Capabilities,
  checkOptions,
  type Flight,
  frameBytes,
  GetOutcome,
  isSlow,
  type Layer,
  type LayerContext,
  type LayerFactory,
  none,
  type ObjectId,
  type OptionNames,
  type PageBatch,
  type PageStore,
  Pending,
  type Place,
  type PlaceTraits,
  type Pool,
  type PoolAttributes,
  PoolRefusal,
  type Progress,
  PutOutcome,
  type SlowPlace,
  type StatsNode,
  TmemError,
} from '@tmem/core'
import { HandleTable } from '@tmem/core/unstable'
import type { BatchJudge } from './passing.ts'
import {
  decidedAbove,
  maxBatchEntries,
  methodsOf,
  openPassing,
  PassingPool,
  PassingStore,
  passingPlace,
  passingPlan,
  putRefusing,
  statsWith,
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

/** When a fault happens. */
export interface Occasion {
  /**
   * Every n-th time, counted over the whole layer, and page by page in batches and flights where it is about pages; 1
   * (default): each time.
   */
  readonly every?: number
  /** Only while this answers true; what happens meanwhile is not counted (default: always). */
  readonly when?: () => boolean
}

const occasion: OptionNames<Occasion> = { every: 'number?', when: 'function?' }

/** Counts occasions. */
class Turns {
  /** Occasions so far, and those at which the fault happened. */
  seen = 0
  due = 0
  readonly #every: number
  readonly #when: (() => boolean) | undefined

  constructor({ every = 1, when }: Occasion) {
    assertPositive('every', every)
    this.#every = every
    this.#when = when
  }

  /** Another occasion: whether the fault happens now. */
  next(): boolean {
    if (this.#when?.() === false) return false
    this.seen++
    if (this.seen % this.#every !== 0) return false
    this.due++
    return true
  }
}

/** Settings of `refuse`. */
export interface RefuseOptions extends Occasion {
  /**
   * The reason given (default `Policy`). Anything but `Stored`. A slow place refuses without one, and the stack says
   * `NoMemory`.
   */
  readonly reason?: PutOutcome
}

/**
 * Refuses puts. Above the first place no layer holds a page under that handle afterwards, not even an older one
 * (`replace`: the older one stays). Between places it refuses blocks, one by one: those of a slow place in the middle
 * of their flight.
 */
export function refuse(options: RefuseOptions): Layer {
  checkOptions('refuse', options, { ...occasion, reason: 'number?' })
  const { reason = PutOutcome.Policy } = options
  if (reason === PutOutcome.Stored) throw new RangeError('the reason of a refusal cannot be Stored')
  assertPositive('every', options.every ?? 1)
  const changes = { reservedBytes: 0 }
  return Object.freeze({
    name: 'refuse',
    plan: (below: Capabilities | undefined) => passingPlan(below, changes),
    open: (next: PageStore | undefined, { allocator }: LayerContext) =>
      openPassing('refuse', next, changes, (capabilities, below) => {
        const marks = new Uint8Array(reserve(allocator, maxBatchEntries, 'refuse.marks'))
        return new RefuseStore(capabilities, below, new Turns(options), reason, marks)
      }),
    planPlace: (below: PlaceTraits) => ({ ...below, ...changes }),
    wrapPlace: (next: Place) => refusing(next, new Turns(options), reason),
  })
}

function refusing(next: Place, turns: Turns, reason: PutOutcome): Place {
  const common = {
    traits: Object.freeze({ ...next.traits, reservedBytes: 0 }),
    stats: () => statsWith(next, 'refuse', { puts: turns.seen, refused: turns.due }),
  }
  if (!isSlow(next))
    return passingPlace(next, {
      ...common,
      put: (block: Block, owner: number) => (turns.next() ? -reason : next.put(block, owner)),
    })
  const sieve = ({ count, locations, units }: Flight): void => {
    for (let n = 0; n < count; n++) {
      if (!turns.next() || locations[n] === none) continue
      next.free(locations[n]!, units[n]!)
      locations[n] = none
    }
  }
  return passingPlace(next, {
    ...common,
    write: async (flight: Flight) => {
      await next.write(flight)
      sieve(flight)
    },
    writeNow: (flight: Flight) => {
      next.writeNow!(flight)
      sieve(flight)
    },
  })
}

class RefuseStore extends PassingStore {
  readonly turns: Turns
  readonly reason: PutOutcome
  readonly marks: Uint8Array
  closed = false

  constructor(capabilities: Capabilities, next: PageStore, turns: Turns, reason: PutOutcome, marks: Uint8Array) {
    super('refuse', capabilities, next)
    this.turns = turns
    this.reason = reason
    this.marks = marks
  }

  wrap(pool: Pool): Pool {
    return new RefusePool(pool, this, { gone: false })
  }

  counters(): Readonly<Record<string, number>> {
    return { puts: this.turns.seen, refused: this.turns.due }
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
    return store.turns.next() ? store.reason : PutOutcome.Stored
  }

  override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const outcome = this.judge()
    if (outcome === PutOutcome.Stored) return this.next.put(object, index, page)
    this.next.flushPage(object, index)
    return outcome
  }

  override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const outcome = this.judge()
    return outcome === PutOutcome.Stored ? this.next.replace!(object, index, page) : outcome
  }

  override putMany(batch: PageBatch): number {
    return putRefusing(this.next, batch, this.#store.marks, this)
  }

  override replaceMany(batch: PageBatch): number {
    return putRefusing(this.next, batch, this.#store.marks, this, true)
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
  /** Resolves when it is the turn of a fetch, or of a transfer: the caller's scheduler. */
  readonly turn: () => Promise<void>
  /**
   * Above the first place: 4 KiB pages that the layer can keep book of, 1 to 2^24-1 (default 65,536: 5.3 MiB); a put
   * beyond is refused (`NoMemory`). An ephemeral page that vanished below stays in the book until it is asked for or
   * flushed.
   */
  readonly pages?: number
}

const delayPools = 256

/**
 * Above the first place it answers every get of a page that is below with `Deferred`; `fetch` then waits for its turn.
 * Misses are answered at once: the layer keeps book of what is below, by 4 KiB part, as a layer over a network or a
 * disk would. Around a slow place each write, read and sync waits for its turn before it begins, so that they overtake
 * each other as the scheduler wants.
 */
export function delay(options: DelayOptions): Layer {
  checkOptions('delay', options, { turn: 'function', pages: 'number?' })
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
    planPlace: (below: PlaceTraits) => (below.waits ? below : 'a place in memory answers at once'),
    wrapPlace: (next: Place) => delaying(next as SlowPlace, turn),
  })
}

function delaying(next: SlowPlace, turn: () => Promise<void>): SlowPlace {
  let delayed = 0
  const wait = async (): Promise<void> => {
    delayed++
    await turn()
  }
  return passingPlace(next, {
    stats: () => statsWith(next, 'delay', { delayed }),
    write: async (flight: Flight) => {
      await wait()
      await next.write(flight)
    },
    read: async (location: number, units: number, into: Uint8Array) => {
      await wait()
      await next.read(location, units, into)
    },
    sync: async () => {
      await wait()
      await next.sync!()
    },
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

  override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const was = !this.#gone && this.#booked(object, index)
    const verdict = was ? PutOutcome.Stored : this.judge(object, index)
    if (verdict !== PutOutcome.Stored) return verdict
    this.#store.changes++
    const outcome = this.next.replace!(object, index, page)
    if (outcome !== PutOutcome.Stored && !was && !this.#gone) this.#strike(object, index)
    return outcome
  }

  /** One by one: what a page was before counts for each. */
  override replaceMany(batch: PageBatch): number {
    const { objects, indexes, outcomes, length } = batch
    let stored = 0
    for (let i = 0; i < length; i++) {
      if (outcomes[i] === PutOutcome.Stored) this.flushPage(objects[i]!, indexes[i]!)
      else if (outcomes[i] === Pending) outcomes[i] = this.replace(objects[i]!, indexes[i]!, batch.page(i))
      if (outcomes[i] === PutOutcome.Stored) stored++
    }
    return stored
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
export interface CorruptOptions extends Occasion {
  /** Chooses the bits: a 32-bit integer (default 1). The same seed flips the same bits. */
  readonly seed?: number
  /**
   * Damages pages, or blocks, on their way up (`got`, the default: what is kept stays whole) or on their way down
   * (`kept`).
   */
  readonly what?: 'got' | 'kept'
}

/** Flips one bit in pages, or in blocks: what a verification above must catch. Never part of an honest stack. */
export function corrupt(options: CorruptOptions): Layer {
  checkOptions('corrupt', options, { ...occasion, seed: 'number?', what: 'text?' })
  const { every = 1, seed = 1, what = 'got' } = options
  assertPositive('every', every)
  if (!Number.isInteger(seed)) throw new RangeError(`seed must be an integer, got ${seed}`)
  if (what !== 'got' && what !== 'kept') throw new RangeError(`what must be got or kept, got ${String(what)}`)
  return Object.freeze({
    name: 'corrupt',
    plan: (below: Capabilities | undefined) => passingPlan(below),
    open: (next: PageStore | undefined, { allocator }: LayerContext) =>
      openPassing('corrupt', next, {}, (capabilities, below) => {
        return new CorruptStore(capabilities, below, new Bits(options), what, allocator)
      }),
    wrapPlace: (next: Place) => corrupting(next, new Bits(options), what),
  })
}

/** Chooses which pages are damaged, and where. */
class Bits {
  readonly turns: Turns
  #random: number

  constructor(options: CorruptOptions) {
    this.turns = new Turns(options)
    // A xorshift generator never leaves zero.
    this.#random = (options.seed ?? 1) | 0 || 1
  }

  /** The number of the bit to flip in `length` bytes, or -1 when these stay whole. */
  next(length: number): number {
    if (!this.turns.next()) return -1
    this.#random ^= this.#random << 13
    this.#random ^= this.#random >>> 17
    this.#random ^= this.#random << 5
    return (this.#random >>> 0) % (length * 8)
  }

  counters(): Readonly<Record<string, number>> {
    return { pages: this.turns.seen, corrupted: this.turns.due }
  }
}

const flip = (bytes: Uint8Array, at: number, bit: number): void => {
  if (bit >= 0) bytes[at + (bit >>> 3)]! ^= 1 << (bit & 7)
}

function corrupting(next: Place, bits: Bits, what: 'got' | 'kept'): Place {
  const stats = (): StatsNode => statsWith(next, 'corrupt', bits.counters())
  if (!isSlow(next))
    return passingPlace(
      next,
      what === 'got'
        ? {
            stats,
            get: (location: number, into: Block) => {
              next.get(location, into)
              flip(into.bytes, into.at, bits.next(into.length))
            },
          }
        : {
            stats,
            put: (block: Block, owner: number) => {
              const bit = bits.next(block.length)
              // The bytes are the caller's: they are whole again afterwards.
              flip(block.bytes, block.at, bit)
              const location = next.put(block, owner)
              flip(block.bytes, block.at, bit)
              return location
            },
          },
    )
  const { rawOnly } = next.traits
  // What lies behind the block in its last unit means nothing.
  const lengthOf = (bytes: Uint8Array, at: number, units: number): number =>
    rawOnly ? units * next.unitBytes : frameBytes + (bytes[at + 4]! | (bytes[at + 5]! << 8)) + 1
  if (what === 'got')
    return passingPlace(next, {
      stats,
      read: async (location: number, units: number, into: Uint8Array) => {
        await next.read(location, units, into)
        flip(into, 0, bits.next(lengthOf(into, 0, units)))
      },
      readNow: (location: number, units: number, into: Uint8Array) => {
        next.readNow!(location, units, into)
        flip(into, 0, bits.next(lengthOf(into, 0, units)))
      },
    })
  return writingOtherwise(next, stats, ({ bytes, offsets, units, count }) => {
    const flips: number[] = []
    for (let n = 0; n < count; n++) {
      const at = offsets[n]!
      flips.push(at, bits.next(lengthOf(bytes, at, units[n]!)))
    }
    const flipAll = (): void => {
      for (let n = 0; n < flips.length; n += 2) flip(bytes, flips[n]!, flips[n + 1]!)
    }
    flipAll()
    return flipAll
  })
}

/**
 * A slow place that is given other bytes than the flight had: `change` changes them, and what it returns makes them
 * whole again.
 */
function writingOtherwise(next: SlowPlace, stats: () => StatsNode, change: (flight: Flight) => () => void): SlowPlace {
  return passingPlace(next, {
    stats,
    write: async (flight: Flight) => {
      const restore = change(flight)
      try {
        await next.write(flight)
      } finally {
        restore()
      }
    },
    writeNow: (flight: Flight) => {
      const restore = change(flight)
      try {
        next.writeNow!(flight)
      } finally {
        restore()
      }
    },
  })
}

class CorruptStore extends PassingStore {
  readonly bits: Bits
  readonly what: 'got' | 'kept'
  readonly #allocator: Allocator

  constructor(capabilities: Capabilities, next: PageStore, bits: Bits, what: 'got' | 'kept', allocator: Allocator) {
    super('corrupt', capabilities, next)
    this.bits = bits
    this.what = what
    this.#allocator = allocator
  }

  wrap(pool: Pool): Pool | PoolRefusal {
    if (this.what === 'kept') return new CorruptingPool(pool, this.bits)
    const scratch = this.#allocator.allocate(pool.attributes.pageSize, 'corrupt.page')
    if (scratch === undefined) return PoolRefusal.NoMemory
    return new CorruptPool(pool, this.bits, new Uint8Array(scratch))
  }

  counters(): Readonly<Record<string, number>> {
    return this.bits.counters()
  }
}

/** Damages pages that are put. They are the caller's: they are whole again afterwards. */
class CorruptingPool extends PassingPool {
  readonly #bits: Bits

  constructor(next: Pool, bits: Bits) {
    super(next)
    this.#bits = bits
  }

  over(next: Pool): Pool {
    return new CorruptingPool(next, this.#bits)
  }

  override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    return this.#damaged(page, () => this.next.put(object, index, page))
  }

  override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    return this.#damaged(page, () => this.next.replace!(object, index, page))
  }

  override putMany(batch: PageBatch): number {
    return this.#damagedAll(batch, () => this.next.putMany(batch))
  }

  override replaceMany(batch: PageBatch): number {
    return this.#damagedAll(batch, () => this.next.replaceMany!(batch))
  }

  #damaged<T>(page: Uint8Array, put: () => T): T {
    const bit = this.#bits.next(page.length)
    flip(page, 0, bit)
    try {
      return put()
    } finally {
      flip(page, 0, bit)
    }
  }

  #damagedAll(batch: PageBatch, put: () => number): number {
    const { bytes, offsets, outcomes, length, pageSize } = batch
    const flips = Array.from({ length }, (_, i) => (outcomes[i] === Pending ? this.#bits.next(pageSize) : -1))
    const flipAll = (): void => {
      for (let i = 0; i < length; i++) flip(bytes, offsets[i]!, flips[i]!)
    }
    flipAll()
    try {
      return put()
    } finally {
      flipAll()
    }
  }
}

class CorruptPool extends PassingPool {
  readonly #bits: Bits
  readonly #scratch: Uint8Array

  constructor(next: Pool, bits: Bits, scratch: Uint8Array) {
    super(next)
    this.#bits = bits
    this.#scratch = scratch
  }

  over(next: Pool): Pool {
    return new CorruptPool(next, this.#bits, this.#scratch.subarray(0, next.attributes.pageSize))
  }

  override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    const outcome = this.next.get(object, index, into)
    if (outcome === GetOutcome.Hit) flip(into, 0, this.#bits.next(into.length))
    return outcome
  }

  override async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    const outcome = await this.next.fetch(object, index, into)
    if (outcome === GetOutcome.Hit) flip(into, 0, this.#bits.next(into.length))
    return outcome
  }

  override getMany(batch: PageBatch): number {
    const { outcomes, length, bytes, offsets, pageSize } = batch
    const asked = outcomes.slice(0, length)
    const hits = this.next.getMany(batch)
    for (let i = 0; i < length; i++)
      if (asked[i] === Pending && outcomes[i] === GetOutcome.Hit) flip(bytes, offsets[i]!, this.#bits.next(pageSize))
    return hits
  }

  /** Lent bytes belong to the lender: the flipped page is a copy. */
  override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    return this.next.lend(object, index, (bytes, at, length) => {
      const bit = this.#bits.next(length)
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
  summary: 'flips a bit in every n-th page',
  options: {
    every: { kind: 'integer', summary: 'flip a bit in every n-th page', required: true, minimum: 1 },
    seed: { kind: 'integer', summary: 'chooses the bits' },
    what: { kind: 'text', summary: 'on its way up (default) or down', choices: ['got', 'kept'] },
  },
  create: (options) => corrupt(options as CorruptOptions),
}

/** Settings of `fail`. */
export interface FailOptions extends Occasion {
  /** What fails (default: all three, counted together). */
  readonly what?: readonly ('write' | 'read' | 'sync')[]
  /** Code of the system's error (default `EIO`). */
  readonly code?: string
}

/** Makes the transfers of a slow place fail with an error of the system, before they reach it. */
export function fail(options: FailOptions): Layer {
  checkOptions('fail', options, { ...occasion, what: 'list?', code: 'text?' })
  const { what = ['write', 'read', 'sync'], code = 'EIO' } = options
  assertPositive('every', options.every ?? 1)
  return Object.freeze({
    name: 'fail',
    planPlace: (below: PlaceTraits) =>
      below.waits ? { ...below, reservedBytes: 0 } : 'a place in memory does not fail',
    wrapPlace: (next: Place) => failing(next as SlowPlace, new Turns(options), what, code),
  })
}

function failing(next: SlowPlace, turns: Turns, what: readonly string[], code: string): SlowPlace {
  const meet = (syscall: 'write' | 'read' | 'sync'): void => {
    if (!what.includes(syscall) || !turns.next()) return
    const error = Object.assign(new Error(`${code}: ${syscall} was made to fail`), { code, syscall })
    if (syscall !== 'sync') throw error
    throw new TmemError('TMEM_IO', `${next.name}: ${error.message}`, { layer: next.name, cause: error })
  }
  return passingPlace(next, {
    traits: Object.freeze({ ...next.traits, reservedBytes: 0 }),
    stats: () => statsWith(next, 'fail', { transfers: turns.seen, failed: turns.due }),
    write: async (flight: Flight) => {
      meet('write')
      await next.write(flight)
    },
    read: async (location: number, units: number, into: Uint8Array) => {
      meet('read')
      await next.read(location, units, into)
    },
    writeNow: (flight: Flight) => {
      meet('write')
      next.writeNow!(flight)
    },
    readNow: (location: number, units: number, into: Uint8Array) => {
      meet('read')
      next.readNow!(location, units, into)
    },
    sync: async () => {
      meet('sync')
      await next.sync!()
    },
  })
}

/** `fail(every=100,what=write,code=ENOSPC)` in the text of a stack. */
export const failFactory: LayerFactory = {
  name: 'fail',
  summary: 'makes transfers of the place below fail',
  options: {
    every: { kind: 'integer', summary: 'every n-th transfer fails', required: true, minimum: 1 },
    what: { kind: 'text', summary: 'which ones (default: all)', choices: ['write', 'read', 'sync'] },
    code: { kind: 'text', summary: "code of the system's error (default EIO)" },
  },
  create: ({ every, what, code }) =>
    fail({
      every: every as number,
      ...(what === undefined ? {} : { what: [what as 'write' | 'read' | 'sync'] }),
      ...(code === undefined ? {} : { code: code as string }),
    }),
}

/** Settings of `tear`. */
export interface TearOptions extends Occasion {
  /** Share of a flight's bytes that reach the place, from its beginning: 0 (all of it is lost) to 1 (default 0.5). */
  readonly kept?: number
}

/**
 * Loses the end of flights that are acknowledged all the same, as a disk does that lies about its cache. What is lost
 * reads as zeros.
 */
export function tear(options: TearOptions): Layer {
  checkOptions('tear', options, { ...occasion, kept: 'number?' })
  const { kept = 0.5 } = options
  assertPositive('every', options.every ?? 1)
  if (!(kept >= 0 && kept <= 1)) throw new RangeError(`kept must be from 0 to 1, got ${kept}`)
  return Object.freeze({
    name: 'tear',
    planPlace: (below: PlaceTraits) => (below.waits ? below : 'a place in memory takes no flights'),
    wrapPlace: (next: Place) => tearing(next as SlowPlace, new Turns(options), kept),
  })
}

function tearing(next: SlowPlace, turns: Turns, kept: number): SlowPlace {
  const stats = (): StatsNode => statsWith(next, 'tear', { flights: turns.seen, torn: turns.due })
  return writingOtherwise(next, stats, ({ bytes, filled }) => {
    if (!turns.next()) return () => undefined
    const from = Math.floor(filled * kept)
    const lost = bytes.slice(from, filled)
    bytes.fill(0, from, filled)
    return () => bytes.set(lost, from)
  })
}

/** `tear(every=10,kept=0.5)` in the text of a stack. */
export const tearFactory: LayerFactory = {
  name: 'tear',
  summary: 'loses the end of flights',
  options: {
    every: { kind: 'integer', summary: 'every n-th flight', required: true, minimum: 1 },
    kept: { kind: 'number', summary: 'share that is kept (default 0.5)', minimum: 0, maximum: 1 },
  },
  create: (options) => tear(options as TearOptions),
}

/**
 * Counts the calls that cross it, by operation: nodes of `stats()` named `count`. A batch is one crossing, and so is a
 * flight.
 */
export function count(): Layer {
  return Object.freeze({
    name: 'count',
    plan: (below: Capabilities | undefined) => passingPlan(below),
    open: (next: PageStore | undefined) =>
      openPassing('count', next, {}, (capabilities, below) => new CountStore(capabilities, below)),
    wrapPlace: counting,
  })
}

function counting(next: Place): Place {
  const methods = methodsOf(next).filter((name) => name !== 'stats' && name !== 'check')
  const crossings = Object.fromEntries(methods.map((name) => [name, 0]))
  const changes = Object.fromEntries(
    methods.map((name) => [
      name,
      (...given: unknown[]): unknown => {
        crossings[name]!++
        return (next[name as keyof Place] as unknown as (...given: unknown[]) => unknown)(...given)
      },
    ]),
  )
  return passingPlace(next, { ...changes, stats: () => statsWith(next, 'count', crossings) })
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
  'replace',
  'replaceMany',
  'release',
  'lend',
  'split',
  'freeze',
  'thaw',
  'destroy',
  'tick',
  'sync',
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

  override sync(): Promise<void> {
    this.#crossings.sync++
    return super.sync()
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

  override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    this.#crossings.replace++
    return this.next.replace!(object, index, page)
  }

  override replaceMany(batch: PageBatch): number {
    this.#crossings.replaceMany++
    return this.next.replaceMany!(batch)
  }

  override release(object: ObjectId, index: number): boolean {
    this.#crossings.release++
    return this.next.release!(object, index)
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
