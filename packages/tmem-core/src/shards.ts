/**
 * More pages than one directory can number: several chains over the same places, each for the handles that fall to it.
 *
 * Which chain a page is in follows from its handle alone, so that nothing is looked up twice. Places know what is whose
 * by the top byte of the owner's number. Each chain has the order of its own pages; background work takes turns.
 */
import { Chain, closePlaces } from './chain.ts'
import type { ChainPool } from './chain-pool.ts'
import { tagOf } from './directory.ts'
import { maxEntries } from './handles.ts'
import { checkPlaces, PlaceContents } from './mover.ts'
import { GetOutcome, Pending, type PoolRefusal, PutOutcome } from './outcomes.ts'
import { isSlow, type MovedBlock, type Owners, type Place } from './place.ts'
import type { OpenPlace } from './seat.ts'
import type {
  Borrower,
  Budget,
  Capabilities,
  Census,
  LayerContext,
  ObjectId,
  PageBatch,
  PageHistory,
  PageStore,
  PageVisitor,
  PlaceUsage,
  Pool,
  PoolAttributes,
  Progress,
  StackUsage,
  StatsNode,
  Sunk,
  Whereabouts,
} from './store.ts'

/** Bits of an owner's number that are the chain's own. */
const ownBits = 24
const ownMask = 2 ** ownBits - 1
const maxShards = 128
/** Handles do not fall evenly. */
const slack = 1.05
/** Mark of an entry of a batch that is another chain's. */
const elsewhere = 254

/**
 * The chain over open places, or several where they can hold more than `pagesOfOne` pages together. Throws `TmemError`
 * (`TMEM_NO_MEMORY`), `RangeError` for more than 2^31 pages.
 */
export function openChains(
  places: readonly OpenPlace[],
  capabilities: Capabilities,
  context: LayerContext,
  pagesOfOne: number = maxEntries,
): PageStore {
  const capacity = places.reduce((sum, { place }) => sum + place.traits.capacity, 0)
  if (capacity <= pagesOfOne) return new Chain(places, capabilities, context)
  const count = Math.ceil((capacity * slack) / pagesOfOne)
  if (count > maxShards)
    throw new RangeError(`a stack has at most ${maxShards * pagesOfOne} pages, these places have room for ${capacity}`)
  return new Shards(places, capabilities, context, count, pagesOfOne)
}

class Shards implements PageStore {
  readonly name: string
  readonly capabilities: Capabilities
  readonly chains: readonly Chain[]
  readonly #places: readonly Place[]
  #turn = 0
  #closing: Promise<void> | undefined

  constructor(
    open: readonly OpenPlace[],
    capabilities: Capabilities,
    context: LayerContext,
    count: number,
    capacity: number,
  ) {
    const places = open.map(({ place }) => place)
    this.name = places[0]!.name
    this.capabilities = capabilities
    this.#places = places
    const chains: Chain[] = []
    this.chains = chains
    const moved: MovedBlock = (owner, location) =>
      chains[owner >>> ownBits]!.directory.moveBlock(owner & ownMask, location)
    const { history } = context
    const own = history === undefined ? context : { ...context, history: Math.ceil(history / count) }
    for (let shard = 0; shard < count; shard++)
      chains.push(new Chain(open, capabilities, own, { base: shard * 2 ** ownBits, moved, capacity }))
    for (const [number, place] of places.entries()) if (isSlow(place)) place.attach?.(this.#ownersOf(number))
  }

  get failure(): Error | undefined {
    return this.chains.find(({ failure }) => failure !== undefined)?.failure
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const pools: ChainPool[] = []
    for (const chain of this.chains) {
      const pool = chain.newPool(attributes)
      if (typeof pool === 'number') {
        for (const made of pools) made.destroy()
        return pool
      }
      pools.push(pool)
    }
    const sharded = new ShardedPool(pools)
    this.chains[0]!.mover.recover(pools[0]!, (place, object, index, ...where) => {
      const shard = sharded.shardOf(object, Math.floor(index / pools[0]!.parts))
      return this.chains[shard]!.mover.enterSlow(pools[shard]!, place, object, index, ...where)
    })
    for (const [shard, chain] of this.chains.entries()) chain.countRecovered(pools[shard]!)
    return sharded
  }

  tick(budget: Budget): Progress {
    let pages = 0
    let pending = false
    this.#turn++
    for (let n = 0; n < this.chains.length && pages < budget.pages; n++) {
      const chain = this.chains[(this.#turn + n) % this.chains.length]!
      const left = this.chains.length - n
      const progress = chain.tick({ ...budget, pages: Math.ceil((budget.pages - pages) / left) })
      pages += progress.pages
      pending ||= progress.pending
    }
    return { pages, pending }
  }

  compact(pages: number): number {
    let moved = 0
    // Any chain compacts all of a place.
    if (this.#closing === undefined) moved = this.chains[0]!.compact(pages)
    return moved
  }

  /** The first page of the chain that has most: which of them came first over all, none of them knows. */
  evict(client?: number): number {
    const sizes = this.chains.map((chain) => chain.ephemeralBytes())
    for (let left = sizes.length; left > 0; left--) {
      const most = sizes.indexOf(Math.max(...sizes))
      const freed = this.chains[most]!.evict(client)
      if (freed > 0) return freed
      sizes[most] = -1
    }
    return 0
  }

  ephemeralBytes(): number {
    return this.chains.reduce((sum, chain) => sum + chain.ephemeralBytes(), 0)
  }

  usage(): StackUsage {
    const all = this.chains.map((chain) => chain.usage())
    return {
      sameFilled: all.reduce((sum, { sameFilled }) => sum + sameFilled, 0),
      places: all[0]!.places.map((first, number) => {
        const sum: Record<string, unknown> = { ...first }
        // All of them know the memory of the place, each its own pages.
        for (const { places } of all.slice(1))
          for (const [name, value] of Object.entries(places[number]!))
            if (typeof value === 'number' && name !== 'usedBytes') sum[name] = (sum[name] as number) + value
        sum['failure'] = all.map(({ places }) => places[number]!.failure).find((failure) => failure !== undefined)
        return sum as unknown as PlaceUsage
      }),
    }
  }

  async ready(): Promise<void> {
    await this.chains[0]!.ready()
  }

  async sync(): Promise<void> {
    for (const chain of this.chains) await chain.sync()
  }

  stats(): StatsNode {
    const trees = this.chains.map((chain) => chain.stats())
    const own = (node: StatsNode): StatsNode => {
      const place = this.#places.find(({ name }) => name === node.name)?.stats()
      if (place === undefined) return node
      return {
        name: node.name,
        counters: { ...node.counters, ...place.counters },
        children: [...node.children, ...place.children],
      }
    }
    const sum = trees.reduce(added)
    return { ...sum, children: sum.children.map(own) }
  }

  check(): void {
    const contents = this.#places.map(() => new PlaceContents())
    for (const chain of this.chains) chain.checkInto(contents)
    checkPlaces(this.#places, contents)
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    const closed = await Promise.allSettled(this.chains.map((chain) => chain.close()))
    await closePlaces(this.#places)
    for (const result of closed) if (result.status === 'rejected') throw result.reason
  }

  #ownersOf(number: number): Owners {
    const all = this.chains.map((chain) => chain.mover.ownersOf(number))
    const of = (owner: number): Owners => all[owner >>> ownBits]!
    return {
      // What was read may be no owner of anybody's.
      unitsAt: (owner, location) => (owner < 0 ? 0 : (all[owner >>> ownBits]?.unitsAt(owner, location) ?? 0)),
      moved: (owner, from, to, units) => of(owner).moved(owner, from, to, units),
      drop: (owner, location) => of(owner).drop(owner, location),
      recall: (owner, location, where) => of(owner).recall(owner, location, where),
      poolOf: (owner) => of(owner).poolOf(owner),
      isPersistent: (owner) => of(owner).isPersistent(owner),
      objectOf: (owner) => of(owner).objectOf(owner),
      indexOf: (owner) => of(owner).indexOf(owner),
      isCurrent: (flight, frame) => of(flight.owners[frame]!).isCurrent(flight, frame),
      landed: (flight) => of(flight.owners[0]!).landed(flight),
    }
  }
}

/** Two trees of the same form, their counters added up; what says the same everywhere stays. */
function added(a: StatsNode, b: StatsNode): StatsNode {
  const counters: Record<string, number> = {}
  for (const [name, value] of Object.entries(a.counters))
    counters[name] =
      name.startsWith('bytes_per_') || name.endsWith('_percent') ? value : value + (b.counters[name] ?? 0)
  return {
    name: a.name,
    counters,
    children: a.children.map((child, number) => added(child, b.children[number]!)),
  }
}

class ShardedPool implements Pool {
  readonly attributes: PoolAttributes
  readonly #pools: readonly Pool[]
  /** Outcomes of a batch, while one chain works on it. */
  #outcomes: Uint8Array = new Uint8Array(0)

  constructor(pools: readonly Pool[]) {
    this.attributes = pools[0]!.attributes
    this.#pools = pools
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    return this.#of(object, index).put(object, index, page)
  }

  replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    return this.#of(object, index).replace!(object, index, page)
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    return this.#of(object, index).get(object, index, into)
  }

  fetch(object: ObjectId, index: number, into: Uint8Array, signal?: AbortSignal): Promise<GetOutcome> {
    return this.#of(object, index).fetch(object, index, into, signal)
  }

  flushPage(object: ObjectId, index: number): void {
    this.#of(object, index).flushPage(object, index)
  }

  flushObject(object: ObjectId): void {
    for (const pool of this.#pools) pool.flushObject(object)
  }

  putMany(batch: PageBatch): number {
    this.#each(batch, (pool) => pool.putMany(batch))
    return countOf(batch, PutOutcome.Stored)
  }

  replaceMany(batch: PageBatch): number {
    this.#each(batch, (pool) => pool.replaceMany!(batch))
    return countOf(batch, PutOutcome.Stored)
  }

  getMany(batch: PageBatch): number {
    for (let n = 0; n < batch.length; n++)
      if (batch.outcomes[n] === Pending)
        batch.outcomes[n] = this.get(batch.objects[n]!, batch.indexes[n]!, batch.page(n))
    return countOf(batch, GetOutcome.Hit)
  }

  flushMany(batch: PageBatch): void {
    for (let n = 0; n < batch.length; n++) this.flushPage(batch.objects[n]!, batch.indexes[n]!)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    return this.#of(object, index).lend(object, index, use)
  }

  split(): Pool | PoolRefusal {
    return this.#pools[0]!.split()
  }

  release(object: ObjectId, index: number): boolean {
    return this.#of(object, index).release!(object, index)
  }

  whereIs(object: ObjectId, index: number, into: Whereabouts): boolean {
    return this.#of(object, index).whereIs!(object, index, into)
  }

  movesOf(object: ObjectId, index: number): PageHistory | undefined {
    return this.#of(object, index).movesOf!(object, index)
  }

  async sink(object: ObjectId, indexes: Uint32Array, count: number, slow: boolean): Promise<Sunk> {
    let pages = 0
    for (const [shard, pool] of this.#pools.entries()) {
      const own = this.#indexesOf(shard, object, indexes, count)
      const sunk = await pool.sink!(object, own, own.length, slow)
      pages += sunk.pages
      if (sunk.failure !== undefined) return { pages, failure: sunk.failure }
    }
    return { pages, failure: undefined }
  }

  recompress(object: ObjectId, indexes: Uint32Array, count: number): number {
    let pages = 0
    for (const [shard, pool] of this.#pools.entries()) {
      const own = this.#indexesOf(shard, object, indexes, count)
      pages += pool.recompress!(object, own, own.length)
    }
    return pages
  }

  walk(visit: PageVisitor, object?: ObjectId): void {
    let goesOn = true
    for (const pool of this.#pools)
      pool.walk!((...page) => {
        goesOn &&= visit(...page)
        return goesOn
      }, object)
  }

  census(into: Census = { pages: 0, objects: 0 }): Census {
    let pages = 0
    let objects = 0
    for (const pool of this.#pools) {
      pool.census!(into)
      pages += into.pages
      objects += into.objects
    }
    into.pages = pages
    into.objects = objects
    return into
  }

  freeze(): void {
    for (const pool of this.#pools) pool.freeze()
  }

  thaw(): void {
    for (const pool of this.#pools) pool.thaw()
  }

  destroy(): void {
    for (const pool of this.#pools) pool.destroy()
  }

  /** Number of the chain that a page falls to. */
  shardOf(object: ObjectId, index: number): number {
    return (tagOf(0, object, index) >>> 0) % this.#pools.length
  }

  #indexesOf(shard: number, object: ObjectId, indexes: Uint32Array, count: number): Uint32Array {
    return indexes.subarray(0, count).filter((index) => this.shardOf(object, index) === shard)
  }

  #of(object: ObjectId, index: number): Pool {
    return this.#pools[this.shardOf(object, index)]!
  }

  /** Lets each chain work on its own entries of a batch. */
  #each(batch: PageBatch, work: (pool: Pool) => void): void {
    const { objects, indexes, outcomes, length } = batch
    if (this.#outcomes.length < length) this.#outcomes = new Uint8Array(batch.capacity)
    const before = this.#outcomes
    for (let n = 0; n < length; n++) before[n] = outcomes[n]!
    for (const [shard, pool] of this.#pools.entries()) {
      for (let n = 0; n < length; n++)
        outcomes[n] = this.shardOf(objects[n]!, indexes[n]!) === shard ? before[n]! : elsewhere
      work(pool)
      for (let n = 0; n < length; n++) if (outcomes[n] !== elsewhere) before[n] = outcomes[n]!
    }
    for (let n = 0; n < length; n++) outcomes[n] = before[n]!
  }
}

function countOf(batch: PageBatch, outcome: number): number {
  let count = 0
  for (let n = 0; n < batch.length; n++) if (batch.outcomes[n] === outcome) count++
  return count
}
