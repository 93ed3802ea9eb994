/**
 * A pool of a stack: turns pages into blocks, and counts.
 *
 * Pages of more than 64 KiB are kept in parts of 64 KiB, each under a handle of its own: they move one by one. A page
 * in parts is here with all of them or with none. Arguments were checked at the boundary of the stack.
 */
import { untilAborted } from './abort.ts'
import type { BlockPool, Blocks } from './blocks.ts'
import { none } from './handles.ts'
import { GetOutcome, Pending, PoolRefusal, PutOutcome } from './outcomes.ts'
import { maxBlockBytes } from './place.ts'
import type {
  Account,
  Borrower,
  Census,
  ObjectId,
  PageBatch,
  PageHistory,
  PageVisitor,
  Pool,
  PoolAttributes,
  Sunk,
  Whereabouts,
} from './store.ts'

/** A fetch of a page in parts, and whether the page changed meanwhile. */
interface Watch {
  readonly object: ObjectId
  readonly index: number
  changed: boolean
}

/** A pool of a stack: turns pages into blocks, and counts. Arguments were checked at the boundary of the stack. */
export class ChainPool implements Pool, BlockPool {
  readonly attributes: PoolAttributes
  readonly number: number
  readonly key: number
  readonly blockBytes: number
  readonly account: Account | undefined
  /** Blocks of a page. */
  readonly parts: number
  frozen = false
  gone = false
  readonly #blocks: Blocks
  readonly #onDestroy: () => void
  readonly #watches: Watch[] = []
  /** The last fetch of a page in parts. */
  #fetching: Promise<void> = Promise.resolve()

  constructor(
    blocks: Blocks,
    number: number,
    key: number,
    attributes: PoolAttributes,
    account: Account | undefined,
    onDestroy: () => void,
  ) {
    this.#blocks = blocks
    this.#onDestroy = onDestroy
    this.number = number
    this.key = key
    this.attributes = attributes
    this.blockBytes = Math.min(attributes.pageSize, maxBlockBytes)
    this.parts = attributes.pageSize / this.blockBytes
    this.account = account
    if (this.parts === 1) return
    // Of a page in parts some may be replaced already when another one is refused.
    this.replace = undefined as never
    this.replaceMany = undefined as never
  }

  /** The object and the first part of the page that is being put in parts; `none`: no part of it was dropped. */
  #putting: ObjectId = 0
  #puttingFirst = none

  /** Charges the owner; always true for an ephemeral pool. */
  charge(bytes: number): boolean {
    return this.account === undefined || this.account.charge(bytes)
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    this.#blocks.failure = undefined
    const outcome = this.#put(object, index, page, 0, false, false, none) as PutOutcome
    this.#blocks.count(outcome)
    return outcome
  }

  replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    this.#blocks.failure = undefined
    const outcome = this.#put(object, index, page, 0, true, false, none) as PutOutcome
    this.#blocks.count(outcome)
    return outcome
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    return this.#get(object, index, into, 0)
  }

  fetch(object: ObjectId, index: number, into: Uint8Array, signal?: AbortSignal): Promise<GetOutcome> {
    // Without a promise of its own: many pages are fetched together.
    return signal === undefined ? this.#fetch(object, index, into) : this.#fetchUntil(object, index, into, signal)
  }

  async #fetchUntil(object: ObjectId, index: number, into: Uint8Array, signal: AbortSignal): Promise<GetOutcome> {
    if (this.gone) return GetOutcome.Miss
    signal.throwIfAborted()
    // What comes after the end of the wait must not touch the caller's buffer.
    const page = new Uint8Array(into.length)
    const outcome = await untilAborted(this.#fetch(object, index, page), signal)
    if (outcome === GetOutcome.Hit) into.set(page)
    return outcome
  }

  async #fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    if (this.gone) return GetOutcome.Miss
    const outcome =
      this.parts === 1
        ? await this.#blocks.fetch(this, object, index, into, 0)
        : await this.#fetchParts(object, index, into)
    this.#blocks.counters.gets++
    if (outcome === GetOutcome.Hit) this.#blocks.counters.hits++
    return outcome
  }

  flushPage(object: ObjectId, index: number): void {
    if (this.gone) return
    if (this.#flush(object, index)) this.#blocks.counters.flushed++
  }

  flushObject(object: ObjectId): void {
    if (this.gone) return
    const { table } = this.#blocks.directory
    this.#changed(object, none)
    this.#blocks.counters.flushed +=
      this.#blocks.flushAll(() => table.firstOfObject(this.number, object), false) / this.parts
  }

  putMany(batch: PageBatch): number {
    return this.#putMany(batch, false)
  }

  replaceMany(batch: PageBatch): number {
    return this.#putMany(batch, true)
  }

  getMany(batch: PageBatch): number {
    const { objects, indexes, offsets, outcomes, bytes, length } = batch
    let hits = 0
    for (let n = 0; n < length; n++) {
      if (outcomes[n] === Pending) outcomes[n] = this.#get(objects[n]!, indexes[n]!, bytes, offsets[n]!)
      if (outcomes[n] === GetOutcome.Hit) hits++
    }
    return hits
  }

  flushMany(batch: PageBatch): void {
    for (let n = 0; n < batch.length; n++) this.flushPage(batch.objects[n]!, batch.indexes[n]!)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    if (this.gone) return GetOutcome.Miss
    return this.#blocks.lend(this.attributes.pageSize, (page) => this.#get(object, index, page, 0), use)
  }

  /** Pages are kept as blocks: there is no cheap view of their parts. */
  split(): PoolRefusal {
    return this.gone ? PoolRefusal.Closed : PoolRefusal.Unsupported
  }

  release(object: ObjectId, index: number): boolean {
    return !this.gone && this.parts === 1 && this.#blocks.release(this, object, index)
  }

  whereIs(object: ObjectId, index: number, into: Whereabouts): boolean {
    if (this.gone || this.parts > 1) return false
    return this.#blocks.whereIs(this.#find(object, index), into)
  }

  movesOf(object: ObjectId, index: number): PageHistory | undefined {
    if (this.gone || this.parts > 1) return undefined
    return this.#blocks.ledger.history?.movesOf(this.number, object, index)
  }

  async sink(object: ObjectId, indexes: Uint32Array, count: number, slow: boolean): Promise<Sunk> {
    const { parts } = this
    const find = (n: number): number => this.#find(object, indexes[Math.floor(n / parts)]! * parts + (n % parts))
    const sunk = await this.#blocks.sinking.sinkPages(this, find, count * parts, slow)
    return parts === 1 ? sunk : { pages: Math.floor(sunk.pages / parts), failure: sunk.failure }
  }

  recompress(object: ObjectId, indexes: Uint32Array, count: number): number {
    const { sinking } = this.#blocks
    const { parts } = this
    let smaller = 0
    for (let n = 0; n < count * parts; n++) {
      // What gets memory may use the stack: before the page is looked up.
      sinking.prepare(this.blockBytes)
      const entry = this.#find(object, indexes[Math.floor(n / parts)]! * parts + (n % parts))
      if (entry !== none && sinking.recompress(entry) === 1) smaller++
    }
    return Math.floor(smaller / parts)
  }

  walk(visit: PageVisitor, object?: ObjectId): void {
    if (this.gone) return
    const { table } = this.#blocks.directory
    let entry = object === undefined ? table.firstOfPool(this.number) : table.firstOfObject(this.number, object)
    while (entry !== none) {
      const part = table.indexOf(entry)
      // A page in parts is here with all of them.
      if (part % this.parts === 0 && !visit(table.objectOf(entry), part / this.parts)) return
      entry = object === undefined ? table.nextOfPool(entry) : table.nextOfObject(entry)
    }
  }

  census(into: Census = { pages: 0, objects: 0 }): Census {
    const { table } = this.#blocks.directory
    into.pages = this.gone ? 0 : table.pagesOf(this.number) / this.parts
    into.objects = this.gone ? 0 : table.objectsOf(this.number)
    return into
  }

  /** The entry of a block, or `none`. */
  #find(object: ObjectId, index: number): number {
    return this.gone ? none : this.#blocks.find(this, object, index)
  }

  freeze(): void {
    this.frozen = true
  }

  thaw(): void {
    this.frozen = false
  }

  destroy(): void {
    if (this.gone) return
    this.gone = true
    for (const watch of this.#watches) watch.changed = true
    const { table } = this.#blocks.directory
    this.#blocks.counters.flushed += this.#blocks.flushAll(() => table.firstOfPool(this.number), true) / this.parts
    this.#blocks.ledger.history?.forget(this.number)
    this.#onDestroy()
  }

  #putMany(batch: PageBatch, keep: boolean): number {
    const blocks = this.#blocks
    const { objects, indexes, offsets, outcomes, unchanged, bytes, length } = batch
    blocks.failure = undefined
    blocks.beginBatch(this, batch)
    for (let n = 0; n < length; n++) {
      // What a filter above has taken is not here any more.
      if (outcomes[n] === PutOutcome.Stored) this.flushPage(objects[n]!, indexes[n]!)
      if (outcomes[n] !== Pending) continue
      const outcome = this.#put(objects[n]!, indexes[n]!, bytes, offsets[n]!, keep, unchanged[n] === 1, n)
      if (outcome !== Pending) blocks.settle(n, outcome)
    }
    blocks.endBatch()
    let stored = 0
    for (let n = 0; n < length; n++) if (outcomes[n] === PutOutcome.Stored) stored++
    return stored
  }

  #put(
    object: ObjectId,
    index: number,
    bytes: Uint8Array,
    at: number,
    keep: boolean,
    unchanged: boolean,
    batchEntry: number,
  ): number {
    const blocks = this.#blocks
    blocks.counters.puts++
    if (this.gone) return PutOutcome.PoolGone
    if (this.parts === 1) return blocks.put(this, object, index, bytes, at, keep, unchanged, batchEntry)
    const isKnown = blocks.isInMemory(this, object, index * this.parts) !== undefined
    if (!isKnown && this.frozen) return PutOutcome.Frozen
    // A page that is half of each would be worse than none.
    this.#flush(object, index)
    const outcome = this.#putParts(object, index * this.parts, bytes, at)
    if (isKnown && outcome === PutOutcome.Stored) blocks.counters.replaced++
    else if (isKnown) blocks.counters.put_to_flush++
    return outcome
  }

  /** Stores a page in parts, of which none is here: all of them, or none. */
  #putParts(object: ObjectId, first: number, bytes: Uint8Array, at: number): number {
    const wasFrozen = this.frozen
    // Whether the page is new was judged before.
    this.frozen = false
    this.#putting = object
    this.#puttingFirst = first
    let outcome: number = PutOutcome.Stored
    try {
      for (let part = 0; part < this.parts && outcome === PutOutcome.Stored; part++) {
        const from = at + part * this.blockBytes
        outcome = this.#blocks.put(this, object, first + part, bytes, from, false, false, none)
        // Room was made for this part by dropping the others.
        if (this.#puttingFirst === none) outcome = PutOutcome.NoMemory
      }
    } finally {
      this.frozen = wasFrozen
      this.#puttingFirst = none
    }
    if (outcome !== PutOutcome.Stored) this.#flush(object, first / this.parts)
    return outcome
  }

  ended(why: 'got' | 'corrupt_dropped'): void {
    this.#blocks.counters[why]++
  }

  /** The chain has dropped an ephemeral page: `index` is that of one of its parts. */
  wasDropped(object: ObjectId, index: number): void {
    const first = index - (index % this.parts)
    if (this.parts > 1 && first === this.#puttingFirst && BigInt(object) === BigInt(this.#putting))
      this.#puttingFirst = none
    else this.#blocks.counters.dropped++
  }

  #get(object: ObjectId, index: number, into: Uint8Array, to: number): GetOutcome {
    if (this.gone) return GetOutcome.Miss
    const blocks = this.#blocks
    const { counters } = blocks
    counters.gets++
    const outcome =
      this.parts === 1 ? blocks.get(this, object, index, into, to) : this.#getParts(object, index, into, to)
    if (outcome === GetOutcome.Hit) counters.hits++
    else if (outcome === GetOutcome.Deferred) counters.deferred++
    return outcome
  }

  #getParts(object: ObjectId, index: number, into: Uint8Array, to: number): GetOutcome {
    const blocks = this.#blocks
    const first = index * this.parts
    let deferred = false
    for (let part = 0; part < this.parts; part++) {
      const here = blocks.isInMemory(this, object, first + part)
      if (here === undefined) return GetOutcome.Miss
      if (!here) deferred = true
    }
    if (deferred) return GetOutcome.Deferred
    for (let part = 0; part < this.parts; part++) {
      const outcome = blocks.get(this, object, first + part, into, to + part * this.blockBytes)
      if (outcome === GetOutcome.Hit) continue
      return outcome
    }
    this.#take(object, index)
    return GetOutcome.Hit
  }

  /** A page in parts was got: a private ephemeral one is taken out by that. */
  #take(object: ObjectId, index: number): void {
    const { persistent, shared } = this.attributes
    if (!persistent && !shared && this.#flush(object, index)) this.#blocks.counters.got++
  }

  /**
   * Fetches a page part by part, into memory of its own: a page that changes meanwhile is fetched anew, so that it is
   * never half of each, and one that is gone leaves the caller's buffer alone. Fetches of one pool take turns, so that
   * a page is not taken by two.
   */
  async #fetchParts(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    const turn = this.#fetching
    let done: () => void = () => undefined
    this.#fetching = new Promise((resolve) => {
      done = resolve
    })
    await turn
    try {
      return await this.#fetchAlone(object, index, into)
    } finally {
      done()
    }
  }

  async #fetchAlone(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    const blocks = this.#blocks
    let page: Uint8Array | undefined
    for (;;) {
      if (this.gone) return GetOutcome.Miss
      const outcome = this.#getParts(object, index, into, 0)
      if (outcome !== GetOutcome.Deferred) return outcome
      page ??= new Uint8Array(into.length)
      const watch: Watch = { object, index, changed: false }
      this.#watches.push(watch)
      let fetched: GetOutcome = GetOutcome.Hit
      try {
        for (let part = 0; part < this.parts && fetched === GetOutcome.Hit && !watch.changed; part++)
          fetched = await blocks.fetch(this, object, index * this.parts + part, page, part * this.blockBytes)
      } finally {
        this.#watches.splice(this.#watches.indexOf(watch), 1)
      }
      if (watch.changed || this.gone) continue
      if (fetched !== GetOutcome.Hit) return fetched
      into.set(page)
      this.#take(object, index)
      return fetched
    }
  }

  #flush(object: ObjectId, index: number): boolean {
    const blocks = this.#blocks
    if (this.parts === 1) return blocks.flush(this, object, index)
    this.#changed(object, index)
    let found = false
    for (let part = 0; part < this.parts; part++)
      if (blocks.flush(this, object, index * this.parts + part)) found = true
    return found
  }

  /** A page (`none`: any of the object) changes: who fetches it in parts begins again. */
  #changed(object: ObjectId, index: number): void {
    for (const watch of this.#watches)
      if (BigInt(watch.object) === BigInt(object) && (index === none || watch.index === index)) watch.changed = true
  }
}
