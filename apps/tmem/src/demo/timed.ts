/**
 * The processor time that a stack takes: the time of the calls to it, less the time for which they wait for the swap
 * file.
 *
 * Only the synchronous part of a call counts: the wait of a `fetch` is not processor time.
 */
import type {
  Borrower,
  Budget,
  Capabilities,
  Flight,
  GetOutcome,
  Layer,
  ObjectId,
  Owners,
  PageBatch,
  PageStore,
  Place,
  PlaceTraits,
  Pool,
  PoolAttributes,
  PoolRefusal,
  Progress,
  PutOutcome,
  SlowPlace,
  StatsNode,
} from '@tmem/core'
import { isSlow } from '@tmem/core'

/** Milliseconds between `start` and `stop`, summed. */
export class Stopwatch {
  elapsed = 0
  readonly #now: () => number

  /** `now` is a clock in milliseconds. */
  constructor(now: () => number = () => performance.now()) {
    this.#now = now
  }

  start(): number {
    return this.#now()
  }

  stop(start: number): void {
    this.elapsed += this.#now() - start
  }
}

/** A slow place whose blocking writes are timed. */
export function timedPlace(layer: Layer, watch: Stopwatch): Layer {
  const { place } = layer
  if (place === undefined) return layer
  return {
    ...layer,
    place: {
      ...place,
      open: (context): Place => {
        const opened = place.open(context)
        return isSlow(opened) ? new TimedPlace(opened, watch) : opened
      },
    },
  }
}

class TimedPlace implements SlowPlace {
  readonly name: string
  readonly traits: PlaceTraits
  readonly unitBytes: number
  readonly flightBytes: number
  readonly #place: SlowPlace
  readonly #watch: Stopwatch

  constructor(place: SlowPlace, watch: Stopwatch) {
    this.name = place.name
    this.traits = place.traits
    this.unitBytes = place.unitBytes
    this.flightBytes = place.flightBytes
    this.#place = place
    this.#watch = watch
  }

  get failure(): Error | undefined {
    return this.#place.failure
  }

  attach(owners: Owners): void {
    this.#place.attach?.(owners)
  }

  open(forced: boolean): boolean {
    return this.#place.open(forced)
  }

  write(flight: Flight): Promise<void> {
    return this.#place.write(flight)
  }

  writeNow(flight: Flight): void {
    const start = this.#watch.start()
    try {
      this.#place.writeNow!(flight)
    } finally {
      this.#watch.stop(start)
    }
  }

  read(location: number, units: number, into: Uint8Array): Promise<void> {
    return this.#place.read(location, units, into)
  }

  free(location: number, units: number): void {
    this.#place.free(location, units)
  }

  stats(): StatsNode {
    return this.#place.stats()
  }

  close(): Promise<void> {
    return this.#place.close()
  }
}

/** A store whose calls are timed. */
export class TimedStore implements PageStore {
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

  release(object: ObjectId, index: number): boolean {
    const start = this.#watch.start()
    const released = this.#pool.release?.(object, index) ?? false
    this.#watch.stop(start)
    return released
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
