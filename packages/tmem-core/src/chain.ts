/**
 * The chain: a stack of places seen as one page store. It alone decides where a page is.
 *
 * One directory says for every page which place has it. So a get or a miss is one lookup however many places there are,
 * a flush reaches the one place that has the page, and two places never answer for one page.
 *
 * New pages and pages in use rest on top; the coldest go down (`sinking.ts`, `order.ts`), and what was read from a slow
 * place rises (`rising.ts`). What is done with one page is in `blocks.ts`; here are the pools, the background work, and
 * the end.
 *
 * Invariants: what is charged to a client is what its persistent pages take in memory places; and, counted in pages,
 * those in parts once, puts = stored + refused, stored + recovered = pages + replaced + put_to_flush + got + flushed +
 * dropped + corrupt_dropped.
 */
import { Blocks, type ChainCounters } from './blocks.ts'
import { ChainPool } from './chain-pool.ts'
import { pagesOf, statsOf, usageOf } from './chain-stats.ts'
import { Directory, EPHEMERAL, samePlace, UNTOUCHED } from './directory.ts'
import { maxEntries, none } from './handles.ts'
import type { LedgerShare } from './ledger.ts'
import { checkPlaces, Mover, PlaceContents } from './mover.ts'
import { PoolRefusal, TmemError } from './outcomes.ts'
import { isSlow, type Place } from './place.ts'
import { rawCodec } from './raw-codec.ts'
import type { OpenPlace, Seat } from './seat.ts'
import type { Sinking } from './sinking.ts'
import type {
  Budget,
  Capabilities,
  LayerContext,
  PageStore,
  PoolAttributes,
  Progress,
  StackUsage,
  StatsNode,
} from './store.ts'
import { idle } from './store.ts'

/** Pools at once, and those of them that are of one client, kind and page size. */
const maxPools = 16_384
const maxAlike = 256

export class Chain implements PageStore {
  readonly name: string
  readonly capabilities: Capabilities
  readonly blocks: Blocks
  readonly mover: Mover
  readonly sinking: Sinking
  readonly seats: readonly Seat[]
  readonly directory: Directory
  readonly pools: (ChainPool | undefined)[] = []
  /** Numbers of pools that are gone, and the keys of those that are there. */
  readonly #free: number[] = []
  readonly #keys = new Set<number>()
  readonly #context: LayerContext
  readonly #places: readonly Place[]
  readonly #isShared: boolean
  /** Some place compresses pages again; the resident that is looked at next; operations until the last look. */
  readonly #recompresses: boolean
  #scanAt = 0
  #scannedAt = 0
  /** Syncs under way. */
  #syncing: Promise<unknown> = Promise.resolve()
  #closing: Promise<void> | undefined

  /**
   * Opens nothing: the places are open. With `share` it is one of several chains over them, for so many pages each, and
   * whoever made them closes the places. Throws `TmemError` (`TMEM_NO_MEMORY`).
   */
  constructor(
    open: readonly OpenPlace[],
    capabilities: Capabilities,
    context: LayerContext,
    share?: LedgerShare & { readonly capacity: number },
  ) {
    const places = open.map(({ place }) => place)
    this.name = places[0]!.name
    this.capabilities = capabilities
    this.#context = context
    this.#places = places
    const { allocator } = context
    let residents = 0
    let capacity = 0
    for (const { traits } of places) {
      capacity += traits.capacity
      if (!traits.waits) residents += traits.capacity
    }
    capacity = Math.min(capacity, share?.capacity ?? maxEntries)
    this.#isShared = share !== undefined
    this.directory = new Directory({
      capacity,
      residents: Math.min(residents, capacity),
      pools: maxPools,
      slow: places.map(isSlow),
      allocator,
    })
    const codec = places.find(({ codec }) => codec !== undefined)?.codec ?? rawCodec(allocator)
    this.mover = new Mover({
      places: open,
      directory: this.directory,
      codec,
      pools: this.pools,
      context,
      ...(share === undefined ? {} : { share }),
    })
    this.seats = this.mover.seats
    this.sinking = this.mover.sinking
    this.blocks = new Blocks(this.name, this.mover, context)
    this.#recompresses = places.some((place) => !isSlow(place) && place.stronger !== undefined)
  }

  get failure(): Error | undefined {
    return this.blocks.failure
  }

  get counters(): ChainCounters {
    return this.blocks.counters
  }

  usage(): StackUsage {
    return usageOf(this.blocks)
  }

  stats(): StatsNode {
    return statsOf(this.blocks, this.#isShared)
  }

  newPool(attributes: PoolAttributes): ChainPool | PoolRefusal {
    if (this.#closing !== undefined) return PoolRefusal.Closed
    const { persistent, shared, pageSize, client } = attributes
    if (persistent && shared) return PoolRefusal.SharedPersistent
    if (pageSize < this.capabilities.minPageSize || pageSize > this.capabilities.maxPageSize)
      return PoolRefusal.BadPageSize
    if (!this.seats.some((seat) => seat.keeps(persistent))) return PoolRefusal.Unsupported
    if (!this.blocks.reserve(pageSize)) return PoolRefusal.NoMemory
    const key = this.#keyFor(attributes)
    if ((this.#free.length === 0 && this.pools.length === maxPools) || key === undefined) return PoolRefusal.NoSlot
    const number = this.#free.pop() ?? this.pools.length
    // Ephemeral pages are the host's: they can be taken away at any time.
    const account = persistent ? this.#context.accounts.of(client) : undefined
    const pool = new ChainPool(this.blocks, number, key, attributes, account, () => {
      this.pools[number] = undefined
      this.#free.push(number)
      this.#keys.delete(key)
    })
    this.pools[number] = pool
    this.#keys.add(key)
    if (!this.#isShared) {
      this.mover.recover(pool)
      this.countRecovered(pool)
    }
    return pool
  }

  /** What an earlier run has left of a pool has been entered. */
  countRecovered(pool: ChainPool): void {
    this.counters.recovered += this.mover.dropIncomplete(pool)
  }

  /**
   * Kind of a pool (22 bits: client, shared, persistent, size), and which one of those of its kind it is. `undefined`:
   * there are too many of them.
   */
  #keyFor({ client, shared, persistent, pageSize }: PoolAttributes): number | undefined {
    const kind =
      (client | ((shared ? 1 : 0) << 16) | ((persistent ? 1 : 0) << 17) | (Math.log2(pageSize / 4096) << 18)) * maxAlike
    let key = kind
    while (this.#keys.has(key)) key++
    return key < kind + maxAlike ? key : undefined
  }

  tick(budget: Budget): Progress {
    if (this.#closing !== undefined) return idle
    this.blocks.wasWoken()
    const { seats, sinking } = this
    for (const seat of seats) seat.askAgain()
    let pages = 0
    let pending = false
    let bytes = budget.bytes ?? Number.POSITIVE_INFINITY
    // From the bottom up: what sinks finds room.
    for (let number = seats.length - 1; number >= 0 && pages < budget.pages; number--) {
      const seat = seats[number]!
      // Each duty has half of what is left, so that none starves another.
      const half = Math.ceil((budget.pages - pages) / 2)
      if (seat.memory !== undefined) {
        const before = seat.memory.excess()
        const excess = Math.min(bytes, sinking.excess(seat))
        const done = excess > 0 ? sinking.relieve(seat, excess, half) : 0
        pages += done
        bytes -= excess
        if (bytes > 0) pages += sinking.cleanAhead(seat, Math.ceil((budget.pages - pages) / 2))
        const moved = sinking.compact(seat, Math.ceil((budget.pages - pages) / 2))
        pages += moved
        // With all moved together it may show that more has to go; what nobody takes is no reason to come again.
        if (moved > 0 || ((done > 0 || before <= 0) && sinking.excess(seat) > 0)) pending = true
      }
      const own = seat.place.tick?.({ pages: budget.pages - pages })
      if (own !== undefined) {
        pages += own.pages
        pending ||= own.pending
      }
    }
    const left = budget.pages - pages
    if (this.#recompresses && left > 0) {
      const tried = this.#recompressResting(left)
      pages += tried
      // All of it was used: there are more that rest.
      if (tried > 0 && tried === left) pending = true
    }
    return { pages, pending }
  }

  compact(pages: number): number {
    let moved = 0
    if (this.#closing !== undefined) return moved
    for (const seat of this.seats) moved += this.sinking.compact(seat, pages - moved)
    return moved
  }

  evict(client?: number): number {
    return this.#closing === undefined ? this.sinking.dropOne(client) : 0
  }

  ephemeralBytes(): number {
    return this.seats.reduce((sum, { number }) => sum + this.directory.bytesOf(number, EPHEMERAL), 0)
  }

  async ready(): Promise<void> {
    for (const place of this.#places) await place.ready?.()
  }

  sync(): Promise<void> {
    if (this.#closing !== undefined)
      return Promise.reject(new TmemError('TMEM_CLOSED', `${this.name}: the stack is closed`, { layer: this.name }))
    const sync = this.#sync()
    // A close waits for it.
    this.#syncing = Promise.allSettled([this.#syncing, sync])
    return sync
  }

  async #sync(): Promise<void> {
    await this.mover.settle()
    for (const { slow } of this.seats) if (slow !== undefined && slow.traits.survives !== 'nothing') await slow.sync?.()
  }

  check(): void {
    const contents = this.#places.map(() => new PlaceContents())
    this.checkInto(contents)
    checkPlaces(this.#places, contents)
  }

  /** Checks the chain, and adds what it knows to be in each place. */
  checkInto(contents: readonly PlaceContents[]): void {
    const { directory, counters, mover, seats } = this
    const { table } = directory
    mover.check(contents)
    let pages = 0
    for (const [number, pool] of this.pools.entries())
      for (let entry = table.firstOfPool(number); entry !== none; entry = table.nextOfPool(entry)) {
        if (pool === undefined) throw new Error(`chain: entry ${entry} is of a pool that is gone`)
        const { persistent } = pool.attributes
        const place = directory.placeOf(entry)
        const where = `chain: pool ${number} object ${table.objectOf(entry)} index ${table.indexOf(entry)}`
        if (place === samePlace ? !persistent : !seats[place]!.keeps(persistent))
          throw new Error(`${where} is in a place that does not keep it`)
        if (place !== samePlace && seats[place]!.memory !== undefined)
          if ((directory.queueOf(entry) === EPHEMERAL) === persistent) throw new Error(`${where} is in a wrong queue`)
        pages += 1 / pool.parts
        const part = table.indexOf(entry) % pool.parts
        const next = table.indexOf(entry) - part + ((part + 1) % pool.parts)
        if (table.find(number, table.objectOf(entry), next) === none) throw new Error(`${where} lacks its other parts`)
      }
    if (pages !== pagesOf(counters)) throw new Error(`chain: ${pages} pages, counted ${pagesOf(counters)}`)
    const refused = this.blocks.refused.reduce((sum, count) => sum + count, 0)
    if (counters.puts !== counters.stored + refused)
      throw new Error(`chain: ${counters.puts} puts, ${counters.stored} stored and ${refused} refused`)
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    let failure: unknown
    for (const pool of this.pools) {
      try {
        pool?.destroy()
      } catch (error) {
        failure ??= error
      }
    }
    await this.mover.close()
    await this.#syncing
    if (!this.#isShared) await closePlaces(this.#places)
    // What was broken before; the places are closed all the same.
    if (failure !== undefined) throw failure
  }

  /**
   * Compresses pages again that were not touched while the scan passed all others. The scan goes as far as there were
   * puts and gets since the last time, and as the budget allows: so a page rests when it was not touched in about as
   * many operations as there are pages in memory, or, on a quiet stack, in two rounds of ticks. How many were tried.
   */
  #recompressResting(pages: number): number {
    const { directory, counters, mover, sinking } = this
    const { residentWatermark } = directory
    const operations = counters.puts + counters.gets
    let credit = Math.min(residentWatermark, operations - this.#scannedAt + pages)
    this.#scannedAt = operations
    let done = 0
    for (; credit > 0 && done < pages; credit--) {
      const resident = this.#scanAt < residentWatermark ? this.#scanAt : 0
      this.#scanAt = resident + 1
      const entry = directory.entryOf(resident)
      if (!mover.ledger.isResident(entry, resident)) continue
      const state = directory.stateOf(entry)
      if ((state & UNTOUCHED) === 0) {
        directory.flag(entry, UNTOUCHED, 0)
        continue
      }
      // What gets memory may use the stack, so the page is looked up again.
      sinking.prepare(this.pools[directory.table.poolOf(entry)]!.blockBytes)
      if (mover.ledger.isResident(entry, resident) && sinking.recompress(entry) >= 0) done++
    }
    return done
  }
}

/** Closes places from the top down: every one, also when one fails; then rejects with the first error. */
export async function closePlaces(places: readonly Place[]): Promise<void> {
  const failed: unknown[] = []
  for (const place of places) {
    try {
      await place.close()
    } catch (error) {
      failed.push(error)
    }
  }
  if (failed.length > 0) throw failed[0]
}
