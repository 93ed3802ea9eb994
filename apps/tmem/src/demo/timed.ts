/**
 * The processor time that one layer of a stack takes: the time of its calls less that of the calls it makes to the next layer.
 *
 * Only the synchronous part of a call counts: what a `fetch` waits for is not processor time. A layer that waits for a disk within
 * a call (the last one does) would count that, too; so this is for layers that only compute.
 */
import type {
  Borrower,
  Budget,
  Capabilities,
  GetOutcome,
  Layer,
  ObjectId,
  PageBatch,
  PageStore,
  Pool,
  PoolAttributes,
  PoolRefusal,
  Progress,
  PutOutcome,
  StatsNode,
} from '@tmem/core'

/** A layer whose time is taken. */
export interface TimedLayer extends Layer {
  /** Seconds spent in this layer alone, so far. */
  seconds(): number
}

/** Takes the time of a layer. `now` is a clock in milliseconds. */
export function timed(layer: Layer, now: () => number = () => performance.now()): TimedLayer {
  const inside = new Stopwatch(now)
  const below = new Stopwatch(now, inside)
  return {
    name: layer.name,
    plan: (capabilities) => layer.plan(capabilities),
    open: (next, context) =>
      new TimedStore(layer.open(next === undefined ? undefined : new TimedStore(next, below), context), inside),
    seconds: () => (inside.elapsed - below.elapsed) / 1000,
  }
}

class Stopwatch {
  /** Milliseconds between `start` and `stop`. */
  elapsed = 0
  #running = false
  readonly #now: () => number
  readonly #outer: Stopwatch | undefined

  /** With `outer` only what happens while that one runs counts: a call to the next layer may come after a wait. */
  constructor(now: () => number, outer?: Stopwatch) {
    this.#now = now
    this.#outer = outer
  }

  start(): number {
    this.#running = true
    return this.#now()
  }

  stop(start: number): void {
    this.#running = false
    const elapsed = this.#now() - start
    if (this.#outer === undefined || this.#outer.#running) this.elapsed += elapsed
  }
}

class TimedStore implements PageStore {
  readonly name: string
  readonly capabilities: Capabilities
  readonly #store: PageStore
  readonly #watch: Stopwatch

  constructor(store: PageStore, watch: Stopwatch) {
    this.name = store.name
    this.capabilities = store.capabilities
    this.#store = store
    this.#watch = watch
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const pool = this.#store.newPool(attributes)
    return typeof pool === 'number' ? pool : new TimedPool(pool, this.#watch)
  }

  tick(budget: Budget): Progress {
    const start = this.#watch.start()
    const progress = this.#store.tick(budget)
    this.#watch.stop(start)
    return progress
  }

  stats(): StatsNode {
    return this.#store.stats()
  }

  close(): Promise<void> {
    return this.#store.close()
  }
}

class TimedPool implements Pool {
  readonly attributes: PoolAttributes
  readonly #pool: Pool
  readonly #watch: Stopwatch

  constructor(pool: Pool, watch: Stopwatch) {
    this.attributes = pool.attributes
    this.#pool = pool
    this.#watch = watch
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const start = this.#watch.start()
    const outcome = this.#pool.put(object, index, page)
    this.#watch.stop(start)
    return outcome
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    const start = this.#watch.start()
    const outcome = this.#pool.get(object, index, into)
    this.#watch.stop(start)
    return outcome
  }

  fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    const start = this.#watch.start()
    const outcome = this.#pool.fetch(object, index, into)
    this.#watch.stop(start)
    return outcome
  }

  flushPage(object: ObjectId, index: number): void {
    const start = this.#watch.start()
    this.#pool.flushPage(object, index)
    this.#watch.stop(start)
  }

  flushObject(object: ObjectId): void {
    const start = this.#watch.start()
    this.#pool.flushObject(object)
    this.#watch.stop(start)
  }

  putMany(batch: PageBatch): number {
    const start = this.#watch.start()
    const stored = this.#pool.putMany(batch)
    this.#watch.stop(start)
    return stored
  }

  getMany(batch: PageBatch): number {
    const start = this.#watch.start()
    const hits = this.#pool.getMany(batch)
    this.#watch.stop(start)
    return hits
  }

  flushMany(batch: PageBatch): void {
    const start = this.#watch.start()
    this.#pool.flushMany(batch)
    this.#watch.stop(start)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    const start = this.#watch.start()
    const outcome = this.#pool.lend(object, index, use)
    this.#watch.stop(start)
    return outcome
  }

  split(): Pool | PoolRefusal {
    const pool = this.#pool.split()
    return typeof pool === 'number' ? pool : new TimedPool(pool, this.#watch)
  }

  freeze(): void {
    this.#pool.freeze()
  }

  thaw(): void {
    this.#pool.thaw()
  }

  destroy(): void {
    this.#pool.destroy()
  }
}
