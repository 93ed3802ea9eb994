/**
 * What the filters of this package have in common: they pass every call on, and each changes only what it is there for.
 *
 * Above the first place a filter of one's own is a `PassingStore` whose `wrap` puts a `PassingPool` around each pool;
 * both can be overridden method by method. Between places it is a `passingPlace` with the methods that it changes.
 *
 * Invariant: a filter has the optional methods that what is below it has, and no other, because their absence says
 * something.
 */
import type {
  Borrower,
  Budget,
  Capabilities,
  Census,
  GetOutcome,
  ObjectId,
  PageBatch,
  PageHistory,
  PageStore,
  PageVisitor,
  Place,
  Pool,
  PoolAttributes,
  PoolRefusal,
  Progress,
  PutOutcome,
  StackUsage,
  StatsNode,
  Sunk,
  Whereabouts,
} from '@tmem/core'
import { Pending, PutOutcome as Put, TmemError } from '@tmem/core'

/** A pool that passes every call on to the pool below. */
export abstract class PassingPool implements Pool {
  readonly attributes: PoolAttributes
  /** The pool below. */
  readonly next: Pool

  constructor(next: Pool) {
    this.attributes = next.attributes
    this.next = next
    for (const name of [
      'replace',
      'replaceMany',
      'release',
      'whereIs',
      'movesOf',
      'sink',
      'recompress',
      'walk',
      'census',
      'handOver',
    ] as const)
      if (next[name] === undefined) this[name] = undefined as never
  }

  /** The same layer over another pool: over the parts of this one. */
  abstract over(next: Pool): Pool

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    return this.next.put(object, index, page)
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    return this.next.get(object, index, into)
  }

  fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    return this.next.fetch(object, index, into)
  }

  flushPage(object: ObjectId, index: number): void {
    this.next.flushPage(object, index)
  }

  flushObject(object: ObjectId): void {
    this.next.flushObject(object)
  }

  putMany(batch: PageBatch): number {
    return this.next.putMany(batch)
  }

  getMany(batch: PageBatch): number {
    return this.next.getMany(batch)
  }

  flushMany(batch: PageBatch): void {
    this.next.flushMany(batch)
  }

  /** Absent where the pool below has no `replace`; so are all of the optional methods that follow. */
  replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    return this.next.replace!(object, index, page)
  }

  replaceMany(batch: PageBatch): number {
    return this.next.replaceMany!(batch)
  }

  release(object: ObjectId, index: number): boolean {
    return this.next.release!(object, index)
  }

  whereIs(object: ObjectId, index: number, into: Whereabouts): boolean {
    return this.next.whereIs!(object, index, into)
  }

  movesOf(object: ObjectId, index: number): PageHistory | undefined {
    return this.next.movesOf!(object, index)
  }

  sink(object: ObjectId, indexes: Uint32Array, count: number, slow: boolean): Promise<Sunk> {
    return this.next.sink!(object, indexes, count, slow)
  }

  recompress(object: ObjectId, indexes: Uint32Array, count: number): number {
    return this.next.recompress!(object, indexes, count)
  }

  handOver(client: number): boolean {
    return this.next.handOver!(client)
  }

  walk(visit: PageVisitor, object?: ObjectId): void {
    this.next.walk!(visit, object)
  }

  census(into?: Census): Census {
    return this.next.census!(into)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    return this.next.lend(object, index, use)
  }

  split(): Pool | PoolRefusal {
    const parts = this.next.split()
    return typeof parts === 'number' ? parts : this.over(parts)
  }

  freeze(): void {
    this.next.freeze()
  }

  thaw(): void {
    this.next.thaw()
  }

  destroy(): void {
    this.next.destroy()
  }
}

/** A store that passes every call on to the store below. */
export abstract class PassingStore implements PageStore {
  readonly name: string
  readonly capabilities: Capabilities
  /** The store below. */
  readonly next: PageStore

  constructor(name: string, capabilities: Capabilities, next: PageStore) {
    this.name = name
    this.capabilities = capabilities
    this.next = next
  }

  /**
   * The layer's own pool around a new pool of the store below, or why there can be none (the pool below is destroyed
   * then).
   */
  abstract wrap(pool: Pool): Pool | PoolRefusal

  /** The layer's own counters. */
  abstract counters(): Readonly<Record<string, number>>

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const below = this.next.newPool(attributes)
    if (typeof below === 'number') return below
    const pool = this.wrap(below)
    if (typeof pool === 'number') below.destroy()
    return pool
  }

  tick(budget: Budget): Progress {
    return this.next.tick(budget)
  }

  usage(): StackUsage {
    return this.next.usage?.() ?? { sameFilled: 0, places: [] }
  }

  compact(pages: number): number {
    return this.next.compact?.(pages) ?? 0
  }

  evict(client?: number): number {
    return this.next.evict?.(client) ?? 0
  }

  ephemeralBytes(): number {
    return this.next.ephemeralBytes?.() ?? 0
  }

  async ready(): Promise<void> {
    await this.next.ready?.()
  }

  async sync(): Promise<void> {
    await this.next.sync?.()
  }

  stats(): StatsNode {
    return { name: this.name, counters: this.counters(), children: [this.next.stats()] }
  }

  close(): Promise<void> {
    return this.next.close()
  }
}

/** The plan of a layer that keeps no pages: what is below, with the given changes. */
export function passingPlan(
  below: Capabilities | undefined,
  changes: Partial<Capabilities> = {},
): Capabilities | string {
  if (below === undefined) return 'it keeps no pages itself and needs a layer below'
  // Some keep or compare pages.
  const { readsOnce: _, ...others } = below
  return Object.freeze({ ...others, ...changes })
}

/**
 * Opening a layer that keeps no pages: `make` gets what it can do and the store below. Throws `TMEM_BAD_STACK` without
 * one.
 */
export function openPassing(
  name: string,
  next: PageStore | undefined,
  changes: Partial<Capabilities>,
  make: (capabilities: Capabilities, next: PageStore) => PageStore,
): PageStore {
  const capabilities = passingPlan(next?.capabilities, changes)
  if (typeof capabilities === 'string')
    throw new TmemError('TMEM_BAD_STACK', `${name} cannot be the last layer: ${capabilities}`, { layer: name })
  return make(capabilities, next!)
}

/** Names of everything that a place has, its own and its class's. */
function namesOf(place: Place): readonly string[] {
  const names = new Set<string>()
  for (let from: object = place; from !== Object.prototype; from = Object.getPrototypeOf(from) as object)
    for (const name of Object.getOwnPropertyNames(from)) if (name !== 'constructor') names.add(name)
  return [...names]
}

/** Names of the methods that a place has. */
export const methodsOf = (place: Place): readonly string[] =>
  namesOf(place).filter((name) => typeof place[name as keyof Place] === 'function')

/**
 * A place that does all that `next` does, but what `changes` has in its stead. A change of what `next` does not have is
 * left out; one to `undefined` takes it away.
 */
export function passingPlace<P extends Place>(next: P, changes: Partial<P>): P {
  const place: object = {}
  for (const name of namesOf(next)) {
    const value: unknown = next[name as keyof P]
    Object.defineProperty(
      place,
      name,
      Object.getOwnPropertyDescriptor(changes, name) ??
        // What is no method may change: it is looked up each time.
        (typeof value === 'function' ? { value: value.bind(next) } : { get: () => next[name as keyof P] }),
    )
  }
  return place as P
}

/** The statistics of a place, with a section of a filter's own. */
export function statsWith(next: Place, name: string, counters: Readonly<Record<string, number>>): StatsNode {
  const stats = next.stats()
  return { ...stats, children: [{ name, counters: { ...counters }, children: [] }, ...stats.children] }
}

/** Largest number of entries in a batch. */
export const maxBatchEntries = 65_536

/** Decides about one entry of a batch: `Stored` to pass it on, anything else to refuse it. */
export interface BatchJudge {
  judge(object: ObjectId, index: number): PutOutcome
}

/** Mark of an entry that was decided above. */
export const decidedAbove = 254

/**
 * Puts a batch of which this layer refuses some entries, in one crossing: the refused ones go down as `Stored` (taken
 * above), which makes every layer below drop its copy, and get their reason afterwards. With `keep` (for `replaceMany`)
 * they go down as refused, which leaves the copies. `marks` has room for `maxBatchEntries`; afterwards it holds the
 * judgement of each entry, or `decidedAbove`.
 */
export function putRefusing(
  next: Pool,
  batch: PageBatch,
  marks: Uint8Array,
  judge: BatchJudge,
  keep: boolean = false,
): number {
  const { objects, indexes, outcomes, length } = batch
  for (let i = 0; i < length; i++) {
    const pending = outcomes[i] === Pending
    const mark = pending ? judge.judge(objects[i]!, indexes[i]!) : decidedAbove
    marks[i] = mark
    if (pending && mark !== Put.Stored) outcomes[i] = keep ? mark : Put.Stored
  }
  if (keep) return next.replaceMany!(batch)
  let stored = next.putMany(batch)
  for (let i = 0; i < length; i++) {
    if (marks[i] === Put.Stored || marks[i] === decidedAbove) continue
    outcomes[i] = marks[i]!
    stored--
  }
  return stored
}
