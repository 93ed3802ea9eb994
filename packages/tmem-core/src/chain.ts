/**
 * The chain: a stack of places seen as one page store. It alone decides where a page is.
 *
 * One directory says for every page which place has it. So a get or a miss is one lookup however many places there are, a flush
 * reaches the one place that has the page, and two places never answer for one page.
 *
 * New pages and pages in use rest on top. A put goes to the first place that takes it; where that is full, the coldest pages
 * of it go down (`mover.ts`, `order.ts`), and only what finds no room then goes to the next place itself, down to the refusal that the
 * caller sees. A page that was read from a slow place rises.
 *
 * Pages of more than 64 KiB are kept in parts of 64 KiB, each under a handle of its own: they move one by one.
 *
 * Invariants: a handle is in the directory exactly while a place has its page; a put that was refused leaves nothing (`replace`: leaves
 * what was there); what is charged to a client is what its persistent pages take in memory places; a page in parts is here with all
 * of them or with none; and, counted in pages, those in parts once,
 * puts = stored + refused, stored + recovered = pages + replaced + put_to_flush + got + flushed + dropped + corrupt_dropped.
 *
 * Nothing here allocates per page but what waits: a fetch of a deferred page is a promise.
 */

import {
  bytesPerObject,
  bytesPerPage,
  bytesPerResident,
  codecIn,
  Directory,
  EPHEMERAL,
  lengthIn,
  MAIN,
  PROBATION,
  placeIn,
  REFERENCED,
  samePlace,
  TRIED,
  UNTOUCHED,
} from './directory.ts'
import { maxEntries, none } from './handles.ts'
import type { OpenPlace, Seat } from './mover.ts'
import { checkPlaces, longAgo, Mover, type MoverShare, PlaceContents, type PoolKind } from './mover.ts'
import { GetOutcome, Pending, PoolRefusal, PutOutcome, putOutcomeCount, putOutcomeName, TmemError } from './outcomes.ts'
import { type BlockCodec, isSlow, maxBlockBytes, type Place } from './place.ts'
import { rawCodec } from './raw-codec.ts'
import type {
  Account,
  Borrower,
  Budget,
  Capabilities,
  LayerContext,
  ObjectId,
  PageBatch,
  PageStore,
  Pool,
  PoolAttributes,
  Progress,
  StackUsage,
  StatsNode,
  Sunk,
  Whereabouts,
} from './store.ts'
import { idle } from './store.ts'

/** Pools at once. */
const maxPools = 256

/** Counters of the chain itself, in pages; those larger than a block count once. */
interface ChainCounters {
  puts: number
  stored: number
  /** Pages that an earlier run had left. */
  recovered: number
  /** Pages that ended because another one was stored in their stead. */
  replaced: number
  /** … because the put of another one was refused. */
  put_to_flush: number
  /** … because a get took them out of a private ephemeral pool. */
  got: number
  /** … because they were flushed, or their pool destroyed. */
  flushed: number
  /** … because their room was needed: ephemeral ones. */
  dropped: number
  /** … because they were damaged, or could not be read: ephemeral ones. */
  corrupt_dropped: number
  gets: number
  hits: number
  deferred: number
  /** Blocks that a fetch waited for. */
  fetched: number
  unchanged_puts: number
  released: number
}

export class Chain implements PageStore {
  readonly name: string
  readonly capabilities: Capabilities
  readonly mover: Mover
  readonly directory: Directory
  readonly codec: BlockCodec
  failure: Error | undefined
  readonly pools: (ChainPool | undefined)[] = []
  readonly counters: ChainCounters = {
    puts: 0,
    stored: 0,
    recovered: 0,
    replaced: 0,
    put_to_flush: 0,
    got: 0,
    flushed: 0,
    dropped: 0,
    corrupt_dropped: 0,
    gets: 0,
    hits: 0,
    deferred: 0,
    fetched: 0,
    unchanged_puts: 0,
    released: 0,
  }
  readonly refused: Float64Array = new Float64Array(putOutcomeCount)
  readonly #context: LayerContext
  readonly #places: readonly Place[]
  readonly #isShared: boolean
  /** Where a page is shown to a borrower. */
  #page: Uint8Array = new Uint8Array(0)
  #lending = false
  /** What `block` in the mover holds of the page being put: nothing, the page in the workspace or as it is. */
  #formed = 0
  #checksum = 0
  /** The page being put does not shrink, as far as anybody has tried. */
  #huge = false
  /** By place and frame that was staged: its entry in the batch (`none`: it is a page by itself), and what is known of it. */
  readonly #stagedAt: readonly number[][]
  readonly #stagedAs: readonly number[][]
  #stagedSeat: Seat | undefined
  /** Where the pages come from that are staged: of a batch, and of one by itself. */
  #batch: PageBatch | undefined
  #batchPool: ChainPool | undefined
  #lonePool: ChainPool | undefined
  #loneBytes: Uint8Array | undefined
  #loneAt = 0
  /** Some place compresses pages again; the resident that is looked at next; operations until the last look. */
  readonly #recompresses: boolean
  #scanAt = 0
  #scannedAt = 0
  #woken = false
  /** Syncs under way. */
  #syncing: Promise<unknown> = Promise.resolve()
  #closing: Promise<void> | undefined

  /**
   * Opens nothing: the places are open. With `share` it is one of several chains over them, for so many pages each, and whoever made them closes
   * the places. Throws `TmemError` (`TMEM_NO_MEMORY`).
   */
  constructor(
    open: readonly OpenPlace[],
    capabilities: Capabilities,
    context: LayerContext,
    share?: MoverShare & { readonly capacity: number },
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
    this.#stagedAt = places.map(() => [])
    this.#stagedAs = places.map(() => [])
    this.directory = new Directory({
      capacity,
      residents: Math.min(residents, capacity),
      pools: maxPools,
      slow: places.map(isSlow),
      allocator,
    })
    this.codec = places.find(({ codec }) => codec !== undefined)?.codec ?? rawCodec(allocator)
    this.mover = new Mover({
      places: open,
      directory: this.directory,
      codec: this.codec,
      pools: this.pools,
      context,
      ...(share === undefined ? {} : { share }),
    })
    this.mover.onLanded = () => {
      for (const seat of this.mover.seats) if (seat.memory !== undefined) this.#wakeFor(seat)
    }
    this.#recompresses = places.some((place) => !isSlow(place) && place.stronger !== undefined)
  }

  newPool(attributes: PoolAttributes): ChainPool | PoolRefusal {
    if (this.#closing !== undefined) return PoolRefusal.Closed
    const { persistent, shared, pageSize, client } = attributes
    if (persistent && shared) return PoolRefusal.SharedPersistent
    if (pageSize < this.capabilities.minPageSize || pageSize > this.capabilities.maxPageSize)
      return PoolRefusal.BadPageSize
    if (!this.mover.seats.some((seat) => seat.keeps(persistent))) return PoolRefusal.Unsupported
    if (!this.#reserve(pageSize)) return PoolRefusal.NoMemory
    let number = 0
    while (this.pools[number] !== undefined) number++
    if (number === maxPools) return PoolRefusal.NoSlot
    // Ephemeral pages are the host's: they can be taken away at any time.
    const account = persistent ? this.#context.accounts.of(client) : undefined
    const pool = new ChainPool(this, number, this.#keyFor(attributes), attributes, account)
    this.pools[number] = pool
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

  /** Kind of a pool (27 bits: client, shared, persistent, size), and which one of those of its kind it is. */
  #keyFor({ client, shared, persistent, pageSize }: PoolAttributes): number {
    const kind =
      (client | ((shared ? 1 : 0) << 16) | ((persistent ? 1 : 0) << 17) | (Math.log2(pageSize / 4096) << 18)) * maxPools
    let key = kind
    while (this.pools.some((pool) => pool?.key === key)) key++
    return key
  }

  tick(budget: Budget): Progress {
    if (this.#closing !== undefined) return idle
    this.#woken = false
    const { mover } = this
    for (const seat of mover.seats) seat.askAgain()
    let pages = 0
    let pending = false
    let bytes = budget.bytes ?? Number.POSITIVE_INFINITY
    // From the bottom up: what sinks finds room.
    for (let number = mover.seats.length - 1; number >= 0 && pages < budget.pages; number--) {
      const seat = mover.seats[number]!
      // Each duty has half of what is left, so that none starves another.
      const half = Math.ceil((budget.pages - pages) / 2)
      if (seat.memory !== undefined) {
        const before = seat.memory.excess()
        const excess = Math.min(bytes, mover.excess(seat))
        const done = excess > 0 ? mover.relieve(seat, excess, half) : 0
        pages += done
        bytes -= excess
        const moved = mover.compact(seat, Math.ceil((budget.pages - pages) / 2))
        pages += moved
        // With all moved together it may show that more has to go; what nobody takes is no reason to come again.
        if (moved > 0 || ((done > 0 || before <= 0) && mover.excess(seat) > 0)) pending = true
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
    for (const seat of this.mover.seats) moved += this.mover.compact(seat, pages - moved)
    return moved
  }

  usage(): StackUsage {
    const { directory, mover } = this
    return {
      sameFilled: directory.pages[samePlace]!,
      places: mover.seats.map(({ number, place, memory, slow, foreign, counters, refused }) => ({
        name: place.name,
        waits: slow !== undefined,
        survives: place.traits.survives,
        foreign,
        recompresses: memory?.stronger !== undefined,
        pages: directory.pages[number]!,
        bytes: directory.sizes[number]! * (slow?.unitBytes ?? 1),
        huge: directory.huge[number]!,
        good: directory.good[number]!,
        usedBytes: memory?.usedBytes ?? 0,
        put: counters.put,
        putHuge: counters.putHuge,
        sunk: counters.sunkIn + counters.sunkClean,
        rose: counters.rose,
        recovered: counters.recovered,
        passedDown: counters.passedDown + counters.droppedClean + counters.released,
        raised: counters.raised,
        gone: counters.gone,
        refused: refused.reduce((sum, one) => sum + one, 0),
        writes: slow === undefined ? 0 : counters.frames,
        reads: counters.reads,
        compacted: counters.compacted,
        recompressed: counters.recompressed,
        recompressPoor: counters.recompressPoor,
      })),
    }
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
    for (const { slow } of this.mover.seats)
      if (slow !== undefined && slow.traits.survives !== 'nothing') await slow.sync?.()
  }

  stats(): StatsNode {
    const { directory, mover } = this
    const refused: Record<string, number> = {}
    for (let reason = 1; reason < putOutcomeCount; reason++)
      if (this.refused[reason]! > 0) refused[putOutcomeName(reason)] = this.refused[reason]!
    return {
      name: 'chain',
      counters: {
        ...this.counters,
        pages: this.#pages(),
        blocks: directory.table.size,
        same_filled_pages: directory.pages[samePlace]!,
        clean_copies: directory.copies,
        objects: directory.table.objects,
        encoded: mover.encoded,
        encoded_again: mover.encodedAgain,
        decoded_to_move: mover.decoded,
        charged_bytes: this.#chargedBytes(),
        metadata_bytes: this.#metadataBytes(),
        bytes_per_page: bytesPerPage,
        bytes_per_resident: bytesPerPage + bytesPerResident,
        bytes_per_object: bytesPerObject,
      },
      children: [
        { name: 'refused', counters: refused, children: [] },
        ...mover.seats.map((seat) => this.#statsOf(seat)),
      ],
    }
  }

  /** What a place says of itself, and what the chain knows of it. */
  #statsOf(seat: Seat): StatsNode {
    const { directory } = this
    const own = this.#isShared ? { name: seat.place.name, counters: {}, children: [] } : seat.place.stats()
    const refused: Record<string, number> = {}
    for (let reason = 1; reason < putOutcomeCount; reason++)
      if (seat.refused[reason]! > 0) refused[putOutcomeName(reason)] = seat.refused[reason]!
    const { number, order, counters } = seat
    const queues =
      seat.memory === undefined
        ? []
        : [
            {
              name: 'order',
              counters: {
                main_pages: directory.queued(number, MAIN),
                main_bytes: directory.bytesOf(number, MAIN),
                probation_pages: directory.queued(number, PROBATION),
                probation_bytes: directory.bytesOf(number, PROBATION),
                ephemeral_pages: directory.queued(number, EPHEMERAL),
                ephemeral_bytes: directory.bytesOf(number, EPHEMERAL),
                probation_share_percent: Math.round(order.share * 100),
                refaults_main: order.mainRefaults,
                refaults_probation: order.probationRefaults,
              },
              children: [],
            },
          ]
    return {
      name: own.name,
      counters: {
        pages: directory.pages[number]!,
        block_bytes: directory.sizes[number]! * (seat.slow?.unitBytes ?? 1),
        huge_pages: directory.huge[number]!,
        ...own.counters,
      },
      children: [
        {
          name: 'moves',
          counters: {
            put: counters.put,
            sunk_in: counters.sunkIn,
            sunk_clean: counters.sunkClean,
            rose: counters.rose,
            recovered: counters.recovered,
            passed_down: counters.passedDown,
            dropped_clean: counters.droppedClean,
            released: counters.released,
            raised: counters.raised,
            gone: counters.gone,
            dropped_ephemeral: counters.droppedEphemeral,
            compacted: counters.compacted,
            recompressed_pages: counters.recompressed,
            recompress_poor: counters.recompressPoor,
            recompress_saved_bytes: counters.recompressSavedBytes,
            used_in_flight: counters.usedInFlight,
            corrupt: counters.corrupt,
            flights: counters.flights,
            forced_flights: counters.forcedFlights,
            failed_flights: counters.failedFlights,
            frames: counters.frames,
            frame_bytes: counters.frameBytes,
            reads: counters.reads,
            failed_reads: counters.failedReads,
            stale_reads: counters.staleReads,
            resting: seat.rest,
          },
          children: [],
        },
        { name: 'refused', counters: refused, children: [] },
        ...queues,
        ...own.children,
      ],
    }
  }

  /** Pages that are here. */
  #pages(): number {
    const { stored, recovered, replaced, put_to_flush, got, flushed, dropped, corrupt_dropped } = this.counters
    return stored + recovered - replaced - put_to_flush - got - flushed - dropped - corrupt_dropped
  }

  /** Bytes that are charged to clients. */
  #chargedBytes(): number {
    const { directory, mover } = this
    let bytes = directory.pages[samePlace]! * bytesPerPage
    for (const { number, memory, foreign } of mover.seats)
      if (memory !== undefined && !foreign)
        for (const queue of [MAIN, PROBATION])
          bytes +=
            directory.bytesOf(number, queue) + directory.queued(number, queue) * (bytesPerPage + bytesPerResident)
    return bytes
  }

  /** Bytes of the directory that were ever touched. */
  #metadataBytes(): number {
    const { directory } = this
    const { table } = directory
    return (
      table.entryWatermark * bytesPerPage +
      directory.residentWatermark * bytesPerResident +
      table.objectWatermark * bytesPerObject
    )
  }

  check(): void {
    const contents = this.#places.map(() => new PlaceContents())
    this.checkInto(contents)
    checkPlaces(this.#places, contents)
  }

  /** Checks the chain, and adds what it knows to be in each place. */
  checkInto(contents: readonly PlaceContents[]): void {
    const { directory, mover, counters } = this
    const { table } = directory
    mover.check(contents)
    let pages = 0
    for (const [number, pool] of this.pools.entries())
      for (let entry = table.firstOfPool(number); entry !== none; entry = table.nextOfPool(entry)) {
        if (pool === undefined) throw new Error(`chain: entry ${entry} is of a pool that is gone`)
        const { persistent } = pool.attributes
        const place = directory.placeOf(entry)
        const where = `chain: pool ${number} object ${table.objectOf(entry)} index ${table.indexOf(entry)}`
        if (place === samePlace ? !persistent : !mover.seats[place]!.keeps(persistent))
          throw new Error(`${where} is in a place that does not keep it`)
        if (place !== samePlace && mover.seats[place]!.memory !== undefined)
          if ((directory.queueOf(entry) === EPHEMERAL) === persistent) throw new Error(`${where} is in a wrong queue`)
        pages += 1 / pool.parts
        const part = table.indexOf(entry) % pool.parts
        const next = table.indexOf(entry) - part + ((part + 1) % pool.parts)
        if (table.find(number, table.objectOf(entry), next) === none) throw new Error(`${where} lacks its other parts`)
      }
    if (pages !== this.#pages()) throw new Error(`chain: ${pages} pages, counted ${this.#pages()}`)
    const refused = this.refused.reduce((sum, count) => sum + count, 0)
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

  // ---- Operations on blocks ---------------------------------------------------------------------------------------

  /** The entry of a page, or `none`. A page that waits to be written with its batch is in place first. */
  find(pool: ChainPool, object: ObjectId, index: number): number {
    const { table } = this.directory
    const entry = table.find(pool.number, object, index)
    if (entry === none || this.#stagedSeat === undefined || !this.#isStaged(entry)) return entry
    this.commit()
    return table.find(pool.number, object, index)
  }

  /**
   * Stores the block of `pool.blockBytes` bytes at `bytes[at]`. `keep`: a refusal leaves what is there. `unchanged`: a copy below still
   * serves. `batchEntry`: what goes straight to a slow place waits for `commit`, and the answer is `Pending`.
   */
  put(
    pool: ChainPool,
    object: ObjectId,
    index: number,
    bytes: Uint8Array,
    at: number,
    keep: boolean,
    unchanged: boolean,
    batchEntry: number,
  ): number {
    const { mover, directory } = this
    mover.prepare(pool.blockBytes)
    if (pool.gone) return PutOutcome.PoolGone
    let entry = this.find(pool, object, index)
    const isKnown = entry !== none
    if (!isKnown && pool.frozen) return PutOutcome.Frozen
    // An ephemeral page could be dropped while room is made for what comes in its stead: it goes first.
    if (unchanged && isKnown && pool.attributes.persistent) {
      this.counters.replaced++
      return this.#putBack(pool, entry, bytes, at)
    }
    const isKept = isKnown && keep && pool.attributes.persistent
    if (isKnown && !isKept) mover.vacate(entry)
    // The directory has room for what the places have: where that is all taken, an ephemeral page makes room, as in a place.
    if (!isKnown)
      do entry = directory.enter(pool.number, object, index)
      while (entry === none && mover.dropOne())
    if (entry === none) return PutOutcome.NoMemory
    const as = (isKnown ? known : 0) | (isKept ? kept : 0)
    const outcome = this.#store(pool, entry, bytes, at, as, batchEntry, 0, PutOutcome.NoMemory)
    return outcome === Pending ? Pending : this.#wasPut(pool, entry, bytes, at, as, outcome)
  }

  /** A put has come to its end: nothing is left of what was refused. Answers what became of it. */
  #wasPut(pool: ChainPool, entry: number, bytes: Uint8Array, at: number, as: number, outcome: number): number {
    if (outcome === PutOutcome.Stored) {
      if ((as & known) !== 0) this.counters.replaced++
      return outcome
    }
    if ((as & kept) === 0) {
      this.directory.remove(entry)
      if ((as & known) !== 0) this.counters.put_to_flush++
      return outcome
    }
    const seat = outcome === PutOutcome.NoMemory ? this.#slotOf(entry) : undefined
    if (seat === undefined) return outcome
    // Of a batch, another page may have been formed last.
    this.#formed = 0
    this.#form(pool, seat, bytes, at)
    if (this.mover.overwrite(seat, entry)) {
      this.counters.replaced++
      return PutOutcome.Stored
    }
    this.mover.vacate(entry)
    const second = this.#store(pool, entry, bytes, at, known, none, 0, outcome)
    return this.#wasPut(pool, entry, bytes, at, known, second)
  }

  /**
   * Where a page rests, if all blocks have one size there. When every such slot is taken, as it may be where a stack has room for just
   * so many pages, its own is the one for the page that replaces it.
   */
  #slotOf(entry: number): Seat | undefined {
    const place = this.directory.placeOf(entry)
    const seat = place === samePlace ? undefined : this.mover.seats[place]!
    return seat?.raw === true ? seat : undefined
  }

  /**
   * Finds a place for the page of an entry, from place number `first` on; `why`: the reason for which those before have refused it. `as`:
   * what is known of the entry.
   */
  #store(
    pool: ChainPool,
    entry: number,
    bytes: Uint8Array,
    at: number,
    as: number,
    batchEntry: number,
    first: number,
    why: number,
  ): number {
    const { mover, directory } = this
    const { persistent } = pool.attributes
    const isKept = (as & kept) !== 0
    if (first === 0 && persistent && isRepeated(bytes, at, pool.blockBytes) && pool.charge(bytesPerPage)) {
      if (isKept) mover.vacate(entry)
      directory.setSame(entry, wordAt(bytes, at))
      return PutOutcome.Stored
    }
    this.#formed = 0
    this.#huge = false
    let reason = why
    for (let number = first; number < mover.seats.length; number++) {
      const seat = mover.seats[number]!
      if (!seat.keeps(persistent)) continue
      if (seat.memory !== undefined) {
        this.#form(pool, seat, bytes, at)
        const resident = mover.allocate(seat, pool)
        if (resident >= 0) {
          if (isKept) mover.vacate(entry)
          mover.enter(seat, entry, resident, persistent ? MAIN : EPHEMERAL, this.#checksum)
          if (this.#huge && seat.raw) directory.flag(entry, TRIED, 0)
          if (mover.block.codec === 0) seat.counters.putHuge++
          seat.counters.put++
          this.#wakeFor(seat)
          return PutOutcome.Stored
        }
        reason = -resident
      } else if (mover.canWriteNow(seat)) {
        // A page by itself has a flight of its own.
        if (this.#stagedSeat !== undefined && (this.#stagedSeat !== seat || batchEntry === none)) this.commit()
        this.#form(pool, seat, bytes, at)
        if (mover.mayTake(seat, seat.unitsFor(mover.block.length))) {
          if (!mover.stage(seat, entry, this.#checksum)) {
            this.commit()
            this.#form(pool, seat, bytes, at)
            mover.stage(seat, entry, this.#checksum)
          }
          this.#stagedSeat = seat
          this.#stagedAt[number]!.push(batchEntry)
          this.#stagedAs[number]!.push(as | (this.#huge ? huge : 0))
          if (batchEntry !== none) return Pending
          this.#lonePool = pool
          this.#loneBytes = bytes
          this.#loneAt = at
          return this.commit()
        }
        reason = PutOutcome.NoMemory
      } else {
        reason = PutOutcome.Unavailable
        this.failure ??= seat.place.failure
      }
      seat.refused[reason]!++
    }
    return reason
  }

  #isStaged(entry: number): boolean {
    const flight = this.mover.staged(this.#stagedSeat!)
    for (let n = 0; n < flight.count; n++) if (this.mover.entryIn(flight, n) === entry) return true
    return false
  }

  /** A batch begins: what goes straight to a slow place waits for the others, until `endBatch`. */
  beginBatch(pool: ChainPool, batch: PageBatch): void {
    this.#batch = batch
    this.#batchPool = pool
  }

  endBatch(): void {
    this.commit()
    this.#batch = undefined
    this.#batchPool = undefined
  }

  /** Writes what was staged, and sets the outcomes in the batch. What the place refuses goes to the next one. Answers the last outcome. */
  commit(): number {
    const seat = this.#stagedSeat
    if (seat === undefined) return PutOutcome.Stored
    const { mover, directory } = this
    const flight = mover.staged(seat)
    const stagedAt = this.#stagedAt[seat.number]!
    const stagedAs = this.#stagedAs[seat.number]!
    this.#stagedSeat = undefined
    const error = mover.writeStaged(seat)
    if (error !== undefined) this.failure = error
    let last: number = PutOutcome.Stored
    let refused: number[] | undefined
    for (let n = 0; n < flight.count; n++) {
      const entry = mover.entryIn(flight, n)
      const location = error === undefined ? flight.locations[n]! : none
      const at = stagedAt[n]!
      const as = stagedAs[n]!
      const pool = at === none ? this.#lonePool! : this.#batchPool!
      const bytes = at === none ? this.#loneBytes! : this.#batch!.bytes
      const from = at === none ? this.#loneAt : this.#batch!.offsets[at]!
      if (location !== none) {
        if ((as & kept) !== 0) mover.vacate(entry)
        const isHuge = (as & huge) !== 0
        directory.setSlow(
          entry,
          seat.number,
          location,
          flight.units[n]!,
          false,
          seat.order.epochOf(false) - longAgo,
          isHuge,
        )
        seat.counters.put++
        if (isHuge) seat.counters.putHuge++
        last = PutOutcome.Stored
      } else {
        last = error === undefined ? PutOutcome.NoMemory : PutOutcome.Unavailable
        seat.refused[last]!++
        last = this.#store(pool, entry, bytes, from, as, none, seat.number + 1, last)
      }
      // A page by itself comes to its end in `put`.
      if (at === none) continue
      if (last === PutOutcome.NoMemory) {
        refused ??= []
        refused.push(at, entry, as)
      } else this.settle(at, this.#wasPut(pool, entry, bytes, from, as, last))
    }
    flight.clear()
    stagedAt.length = 0
    stagedAs.length = 0
    // The page is the caller's.
    this.#loneBytes = undefined
    // Some may be written once more, in this very flight.
    for (let n = 0; refused !== undefined && n < refused.length; n += 3) {
      const at = refused[n]!
      const { bytes, offsets } = this.#batch!
      const as = refused[n + 2]!
      this.settle(at, this.#wasPut(this.#batchPool!, refused[n + 1]!, bytes, offsets[at]!, as, PutOutcome.NoMemory))
    }
    // What was formed for the put that is going on is not there any more.
    this.#formed = 0
    this.#huge = false
    return last
  }

  /** Notes what became of an entry of the batch. */
  settle(at: number, outcome: number): void {
    this.#batch!.outcomes[at] = outcome
    this.count(outcome)
  }

  /** Counts what became of a put. */
  count(outcome: number): void {
    if (outcome === PutOutcome.Stored) this.counters.stored++
    else this.refused[outcome]!++
  }

  /** Puts a page back of which a copy is here: in memory, or below. It is stored in any case. */
  #putBack(pool: ChainPool, entry: number, bytes: Uint8Array, at: number): PutOutcome {
    const { mover, directory } = this
    this.counters.unchanged_puts++
    const place = directory.placeOf(entry)
    if (place === samePlace) return PutOutcome.Stored
    const below = mover.seats[place]!
    if (below.memory !== undefined) {
      directory.flag(entry, REFERENCED, UNTOUCHED)
      return PutOutcome.Stored
    }
    const { persistent } = pool.attributes
    const seat = mover.seats.find((one) => one.memory !== undefined && one.keeps(persistent))
    if (seat === undefined || seat.number > place) return PutOutcome.Stored
    this.#formed = 0
    this.#form(pool, seat, bytes, at)
    const resident = mover.allocate(seat, pool)
    // Without room it stays below.
    if (resident < 0) return PutOutcome.Stored
    const location = directory.locationOf(entry)
    const units = directory.unitsOf(entry)
    const isCopy = below.keepsCopies
    if (isCopy) {
      directory.leave(entry)
      below.counters.raised++
    } else mover.vacate(entry)
    mover.enter(seat, entry, resident, persistent ? MAIN : EPHEMERAL, this.#checksum)
    if (isCopy) directory.setCopy(resident, place, location, units)
    seat.counters.put++
    this.#wakeFor(seat)
    return PutOutcome.Stored
  }

  /** Makes the block of the page for a place, unless it is made already. */
  #form(pool: ChainPool, seat: Seat, bytes: Uint8Array, at: number): void {
    const { block } = this.mover
    const wanted = seat.raw ? asItIs : inWorkspace
    if (this.#formed === wanted) return
    block.pageBytes = pool.blockBytes
    block.persistent = pool.attributes.persistent
    if (wanted === asItIs) {
      block.bytes = bytes
      block.at = at
      block.length = pool.blockBytes
      block.codec = 0
      this.#checksum = 0
      this.#formed = wanted
      return
    }
    const { codec } = this
    const { workspace } = codec
    let length = codec.encode(bytes, at, pool.blockBytes, 0, pool.blockBytes - 1)
    this.mover.encoded++
    block.codec = codec.id
    if (length === 0) {
      copy.call(bytes, workspace, 0, at, at + pool.blockBytes)
      length = pool.blockBytes
      block.codec = 0
      this.#huge = codec.id !== 0
    }
    block.bytes = workspace
    block.at = 0
    block.length = length
    this.#checksum = codec.checksum(block.codec, 0, length)
    this.#formed = wanted
  }

  /** Fills `into[to]` with a block. A hit takes it out of a private ephemeral pool. */
  get(pool: ChainPool, object: ObjectId, index: number, into: Uint8Array, to: number): GetOutcome {
    const entry = this.find(pool, object, index)
    if (entry === none) return GetOutcome.Miss
    const outcome = this.#copyOut(pool, entry, into, to)
    if (outcome === GetOutcome.Hit) this.#used(pool, entry)
    return outcome
  }

  /** Fills `into[to]` with the block of an entry, if it is in memory. */
  #copyOut(pool: ChainPool, entry: number, into: Uint8Array, to: number): GetOutcome {
    const { directory, mover } = this
    const state = directory.stateOf(entry)
    const place = placeIn(state)
    if (place === samePlace) {
      fillWord(into, to, pool.blockBytes, directory.wordOf(entry))
      return GetOutcome.Hit
    }
    const seat = mover.seats[place]!
    const { memory } = seat
    if (memory === undefined) return GetOutcome.Deferred
    const resident = directory.residentOf(entry)
    const length = lengthIn(state)
    const { block } = mover
    block.length = length
    if (seat.raw) {
      block.bytes = into
      block.at = to
      memory.get(directory.blockOf(resident), block)
      return GetOutcome.Hit
    }
    const codec = codecIn(state)
    block.bytes = this.codec.workspace
    block.at = 0
    memory.get(directory.blockOf(resident), block)
    if (directory.isSum(resident, this.codec.checksum(codec, 0, length)))
      if (mover.decode(codec, length, into, to, pool.blockBytes)) return GetOutcome.Hit
    seat.counters.corrupt++
    // The copy below is as good.
    if (mover.release(entry)) return GetOutcome.Deferred
    if (pool.attributes.persistent) throw this.#corruption(seat, entry)
    mover.dropPage(entry)
    this.counters.corrupt_dropped++
    return GetOutcome.Miss
  }

  /** A page was used. */
  #used(pool: ChainPool, entry: number): void {
    const { directory, mover } = this
    const { persistent, shared } = pool.attributes
    const state = directory.stateOf(entry)
    if (persistent) {
      if (placeIn(state) === samePlace) return
      const now = (state | REFERENCED) & ~UNTOUCHED
      if (now !== state) directory.flag(entry, REFERENCED, UNTOUCHED)
      return
    }
    if (shared) mover.touch(entry)
    else if (pool.parts === 1) {
      mover.drop(entry)
      this.counters.got++
    }
  }

  /** As `get`, waiting where that is needed. */
  async fetch(pool: ChainPool, object: ObjectId, index: number, into: Uint8Array, to: number): Promise<GetOutcome> {
    const { mover, directory } = this
    for (;;) {
      if (pool.gone) return GetOutcome.Miss
      const outcome = this.get(pool, object, index, into, to)
      if (outcome !== GetOutcome.Deferred) return outcome
      const read = await mover.borrow()
      if (read === undefined) return GetOutcome.Miss
      try {
        const entry = pool.gone ? none : this.find(pool, object, index)
        if (entry === none) return GetOutcome.Miss
        if (directory.placeOf(entry) === samePlace) continue
        if (mover.seats[directory.placeOf(entry)]!.slow === undefined) continue
        if (!(await mover.read(read, entry, into, to))) continue
        this.counters.fetched++
        return GetOutcome.Hit
      } finally {
        mover.giveBack(read)
      }
    }
  }

  /** Where a block is: `none`, memory (true) or a place that waits (false). */
  isInMemory(pool: ChainPool, object: ObjectId, index: number): boolean | undefined {
    const { directory } = this
    const entry = this.find(pool, object, index)
    if (entry === none) return undefined
    const place = directory.placeOf(entry)
    return place === samePlace || this.mover.seats[place]!.memory !== undefined
  }

  /** Says where the block of an entry is; false: there is none. */
  whereIs(entry: number, into: Whereabouts): boolean {
    if (entry === none) return false
    const { directory, mover } = this
    const state = directory.stateOf(entry)
    const place = placeIn(state)
    into.place = -1
    into.bytes = 0
    into.huge = into.recompressed = into.incompressible = false
    if (place === samePlace) return true
    const { memory, slow } = mover.seats[place]!
    into.place = place
    into.huge = directory.isHuge(entry)
    if (slow !== undefined) into.bytes = directory.unitsOf(entry) * slow.unitBytes
    else {
      into.bytes = lengthIn(state)
      into.recompressed = memory!.stronger !== undefined && codecIn(state) === memory!.stronger.id
      into.incompressible = memory!.stronger !== undefined && (state & TRIED) !== 0
    }
    return true
  }

  /**
   * Compresses pages again that were not touched while the scan passed all others. The scan goes as far as there were puts and gets since the last
   * time, and as the budget allows: so a page rests when it was not touched in about as many operations as there are pages in memory, or, on a
   * quiet stack, in two rounds of ticks. How many were tried.
   */
  #recompressResting(pages: number): number {
    const { directory, mover, counters } = this
    const { residentWatermark } = directory
    const operations = counters.puts + counters.gets
    let credit = Math.min(residentWatermark, operations - this.#scannedAt + pages)
    this.#scannedAt = operations
    let done = 0
    for (; credit > 0 && done < pages; credit--) {
      const resident = this.#scanAt < residentWatermark ? this.#scanAt : 0
      this.#scanAt = resident + 1
      const entry = directory.entryOf(resident)
      if (!mover.isResident(entry, resident)) continue
      const state = directory.stateOf(entry)
      if ((state & UNTOUCHED) === 0) {
        directory.flag(entry, UNTOUCHED, 0)
        continue
      }
      // As in `ChainPool.recompress`.
      mover.prepare(this.pools[directory.table.poolOf(entry)]!.blockBytes)
      if (mover.isResident(entry, resident) && mover.recompress(entry) >= 0) done++
    }
    return done
  }

  /** Removes a block. Whether there was one. */
  flush(pool: ChainPool, object: ObjectId, index: number): boolean {
    const entry = this.find(pool, object, index)
    if (entry === none) return false
    this.mover.drop(entry)
    return true
  }

  /** Gives the copy in memory up where another one lies below. */
  release(pool: ChainPool, object: ObjectId, index: number): boolean {
    const entry = this.find(pool, object, index)
    if (entry === none || !this.mover.release(entry)) return false
    this.counters.released++
    return true
  }

  /** Removes all pages that `first` finds, and answers how many. `forget`: what survives keeps them for the next run. */
  flushAll(first: () => number, forget: boolean): number {
    let blocks = 0
    this.commit()
    for (let entry = first(); entry !== none; entry = first()) {
      this.mover.drop(entry, forget)
      blocks++
    }
    return blocks
  }

  /** A pool is no more. */
  forget(number: number): void {
    this.pools[number] = undefined
  }

  /** Shows a page of the stack's own to a borrower: `fill` fills it. */
  lend(pageSize: number, fill: (page: Uint8Array) => GetOutcome, use: Borrower): GetOutcome {
    if (this.#lending) throw new TypeError(`${this.name}: lend inside of a lend: copy the page out with get instead`)
    const page = this.#page
    const outcome = fill(page)
    if (outcome !== GetOutcome.Hit) return outcome
    this.#lending = true
    try {
      use(page, 0, pageSize)
    } finally {
      this.#lending = false
      // The next borrower may be another client.
      page.fill(0, 0, pageSize)
    }
    return outcome
  }

  #reserve(pageSize: number): boolean {
    if (!this.mover.reservePage(Math.min(pageSize, maxBlockBytes))) return false
    if (this.#page.length >= pageSize) return true
    const memory = this.#context.allocator.allocate(pageSize, 'chain.page')
    if (memory === undefined) return this.#page.length >= pageSize
    this.#page = new Uint8Array(memory, 0, pageSize)
    return true
  }

  #wakeFor(seat: Seat): void {
    if (this.#woken || this.#context.wake === undefined || seat.memory!.excess() <= 0) return
    this.#woken = true
    this.#context.wake()
  }

  #corruption(seat: Seat, entry: number): TmemError {
    const { table } = this.directory
    const handle = `pool ${table.poolOf(entry)} object ${table.objectOf(entry)} index ${table.indexOf(entry)}`
    return new TmemError(
      'TMEM_CORRUPT',
      `${seat.place.name}: a page at rest is not what was stored (${handle}); it cannot be had: check this machine's memory`,
      { layer: seat.place.name, handle },
    )
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

const asItIs = 1
const inWorkspace = 2

/** What is known of an entry that is being put: it had a page; it has it still; the new one does not shrink, as far as anybody has tried. */
const known = 1
const kept = 2
const huge = 4

/** A fetch of a page in parts, and whether the page changed meanwhile. */
interface Watch {
  readonly object: ObjectId
  readonly index: number
  changed: boolean
}

/** A pool of a stack: turns pages into blocks, and counts. Arguments were checked at the boundary of the stack. */
export class ChainPool implements Pool, PoolKind {
  readonly attributes: PoolAttributes
  readonly number: number
  readonly key: number
  readonly blockBytes: number
  readonly account: Account | undefined
  /** Blocks of a page. */
  readonly parts: number
  frozen = false
  gone = false
  readonly #chain: Chain
  readonly #watches: Watch[] = []
  /** The last fetch of a page in parts. */
  #fetching: Promise<void> = Promise.resolve()

  constructor(chain: Chain, number: number, key: number, attributes: PoolAttributes, account: Account | undefined) {
    this.#chain = chain
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
    this.#chain.failure = undefined
    const outcome = this.#put(object, index, page, 0, false, false, none) as PutOutcome
    this.#chain.count(outcome)
    return outcome
  }

  replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    this.#chain.failure = undefined
    const outcome = this.#put(object, index, page, 0, true, false, none) as PutOutcome
    this.#chain.count(outcome)
    return outcome
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    return this.#get(object, index, into, 0)
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array, signal?: AbortSignal): Promise<GetOutcome> {
    if (this.gone) return GetOutcome.Miss
    signal?.throwIfAborted()
    if (signal === undefined) return this.#fetch(object, index, into)
    // What comes after the end of the wait must not touch the caller's buffer.
    const page = new Uint8Array(into.length)
    const outcome = await untilAborted(this.#fetch(object, index, page), signal)
    if (outcome === GetOutcome.Hit) into.set(page)
    return outcome
  }

  async #fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    const outcome =
      this.parts === 1
        ? await this.#chain.fetch(this, object, index, into, 0)
        : await this.#fetchParts(object, index, into)
    this.#chain.counters.gets++
    if (outcome === GetOutcome.Hit) this.#chain.counters.hits++
    return outcome
  }

  flushPage(object: ObjectId, index: number): void {
    if (this.gone) return
    if (this.#flush(object, index)) this.#chain.counters.flushed++
  }

  flushObject(object: ObjectId): void {
    if (this.gone) return
    const { table } = this.#chain.directory
    this.#changed(object, none)
    this.#chain.counters.flushed +=
      this.#chain.flushAll(() => table.firstOfObject(this.number, object), false) / this.parts
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
    return this.#chain.lend(this.attributes.pageSize, (page) => this.#get(object, index, page, 0), use)
  }

  /** Pages are kept as blocks: there is no cheap view of their parts. */
  split(): PoolRefusal {
    return this.gone ? PoolRefusal.Closed : PoolRefusal.Unsupported
  }

  release(object: ObjectId, index: number): boolean {
    return !this.gone && this.parts === 1 && this.#chain.release(this, object, index)
  }

  whereIs(object: ObjectId, index: number, into: Whereabouts): boolean {
    if (this.gone || this.parts > 1) return false
    return this.#chain.whereIs(this.#find(object, index), into)
  }

  async sink(object: ObjectId, indexes: Uint32Array, count: number, slow: boolean): Promise<Sunk> {
    const { parts } = this
    const find = (n: number): number => this.#find(object, indexes[Math.floor(n / parts)]! * parts + (n % parts))
    const sunk = await this.#chain.mover.sinkPages(this, find, count * parts, slow)
    return parts === 1 ? sunk : { pages: Math.floor(sunk.pages / parts), failure: sunk.failure }
  }

  recompress(object: ObjectId, indexes: Uint32Array, count: number): number {
    const { mover } = this.#chain
    const { parts } = this
    let smaller = 0
    for (let n = 0; n < count * parts; n++) {
      // What gets memory may use the stack: before the page is looked up.
      mover.prepare(this.blockBytes)
      const entry = this.#find(object, indexes[Math.floor(n / parts)]! * parts + (n % parts))
      if (entry !== none && mover.recompress(entry) === 1) smaller++
    }
    return Math.floor(smaller / parts)
  }

  /** The entry of a block, or `none`. */
  #find(object: ObjectId, index: number): number {
    return this.gone ? none : this.#chain.find(this, object, index)
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
    const { table } = this.#chain.directory
    this.#chain.counters.flushed += this.#chain.flushAll(() => table.firstOfPool(this.number), true) / this.parts
    this.#chain.forget(this.number)
  }

  #putMany(batch: PageBatch, keep: boolean): number {
    const chain = this.#chain
    const { objects, indexes, offsets, outcomes, unchanged, bytes, length } = batch
    chain.failure = undefined
    chain.beginBatch(this, batch)
    for (let n = 0; n < length; n++) {
      // What a filter above has taken is not here any more.
      if (outcomes[n] === PutOutcome.Stored) this.flushPage(objects[n]!, indexes[n]!)
      if (outcomes[n] !== Pending) continue
      const outcome = this.#put(objects[n]!, indexes[n]!, bytes, offsets[n]!, keep, unchanged[n] === 1, n)
      if (outcome !== Pending) chain.settle(n, outcome)
    }
    chain.endBatch()
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
    const chain = this.#chain
    chain.counters.puts++
    if (this.gone) return PutOutcome.PoolGone
    if (this.parts === 1) return chain.put(this, object, index, bytes, at, keep, unchanged, batchEntry)
    const isKnown = chain.isInMemory(this, object, index * this.parts) !== undefined
    if (!isKnown && this.frozen) return PutOutcome.Frozen
    // A page that is half of each would be worse than none.
    this.#flush(object, index)
    const outcome = this.#putParts(object, index * this.parts, bytes, at)
    if (isKnown && outcome === PutOutcome.Stored) chain.counters.replaced++
    else if (isKnown) chain.counters.put_to_flush++
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
        outcome = this.#chain.put(this, object, first + part, bytes, from, false, false, none)
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
    this.#chain.counters[why]++
  }

  /** The chain has dropped an ephemeral page: `index` is that of one of its parts. */
  wasDropped(object: ObjectId, index: number): void {
    const first = index - (index % this.parts)
    if (this.parts > 1 && first === this.#puttingFirst && BigInt(object) === BigInt(this.#putting))
      this.#puttingFirst = none
    else this.#chain.counters.dropped++
  }

  #get(object: ObjectId, index: number, into: Uint8Array, to: number): GetOutcome {
    if (this.gone) return GetOutcome.Miss
    const chain = this.#chain
    const { counters } = chain
    counters.gets++
    const outcome =
      this.parts === 1 ? chain.get(this, object, index, into, to) : this.#getParts(object, index, into, to)
    if (outcome === GetOutcome.Hit) counters.hits++
    else if (outcome === GetOutcome.Deferred) counters.deferred++
    return outcome
  }

  #getParts(object: ObjectId, index: number, into: Uint8Array, to: number): GetOutcome {
    const chain = this.#chain
    const first = index * this.parts
    let deferred = false
    for (let part = 0; part < this.parts; part++) {
      const here = chain.isInMemory(this, object, first + part)
      if (here === undefined) return GetOutcome.Miss
      if (!here) deferred = true
    }
    if (deferred) return GetOutcome.Deferred
    for (let part = 0; part < this.parts; part++) {
      const outcome = chain.get(this, object, first + part, into, to + part * this.blockBytes)
      if (outcome === GetOutcome.Hit) continue
      return outcome
    }
    this.#take(object, index)
    return GetOutcome.Hit
  }

  /** A page in parts was got: a private ephemeral one is taken out by that. */
  #take(object: ObjectId, index: number): void {
    const { persistent, shared } = this.attributes
    if (!persistent && !shared && this.#flush(object, index)) this.#chain.counters.got++
  }

  /**
   * Fetches a page part by part, into memory of its own: a page that changes meanwhile is fetched anew, so that it is never half of each, and one
   * that is gone leaves the caller's buffer alone. Fetches of one pool take turns, so that a page is not taken by two.
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
    const chain = this.#chain
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
          fetched = await chain.fetch(this, object, index * this.parts + part, page, part * this.blockBytes)
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
    const chain = this.#chain
    if (this.parts === 1) return chain.flush(this, object, index)
    this.#changed(object, index)
    let found = false
    for (let part = 0; part < this.parts; part++) if (chain.flush(this, object, index * this.parts + part)) found = true
    return found
  }

  /** A page (`none`: any of the object) changes: who fetches it in parts begins again. */
  #changed(object: ObjectId, index: number): void {
    for (const watch of this.#watches)
      if (BigInt(watch.object) === BigInt(object) && (index === none || watch.index === index)) watch.changed = true
  }
}

/** Resolves as the promise does, unless the signal comes first: then it rejects with its reason. */
async function untilAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  let abort: () => void = () => undefined
  const aborted = new Promise<never>((_, reject) => {
    abort = () => reject(signal.reason as Error)
    signal.addEventListener('abort', abort, { once: true })
  })
  try {
    return await Promise.race([promise, aborted])
  } finally {
    signal.removeEventListener('abort', abort)
  }
}

/** Whether a page repeats its first four bytes. */
function isRepeated(bytes: Uint8Array, at: number, length: number): boolean {
  // Most pages differ in what the first cache line has, most others at one of these; only what does not is compared as a whole with
  // itself, a word further on.
  for (let i = 0; i < 12; i++) if (bytes[at + i] !== bytes[at + 4 + i]) return false
  const half = at + (length >>> 1)
  const end = at + length - 4
  for (let i = 0; i < 4; i++) {
    const byte = bytes[at + i]
    if (byte !== bytes[end + i] || byte !== bytes[half + i]) return false
  }
  return compare.call(bytes, bytes, at, end, at + 4, at + length) === 0
}

function wordAt(bytes: Uint8Array, at: number): number {
  return bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)
}

function fillWord(bytes: Uint8Array, at: number, length: number, word: number): void {
  if (word === Math.imul(word & 0xff, 0x01010101)) {
    bytes.fill(word, at, at + length)
    return
  }
  for (let i = 0; i < 4; i++) bytes[at + i] = word >>> (8 * i)
  for (let done = 4; done < length; done *= 2) bytes.copyWithin(at + done, at, at + Math.min(done, length - done))
}

/** The runtime's own functions with offsets, which make no views. */
const copy: (this: Uint8Array, target: Uint8Array, to: number, from: number, end: number) => number =
  Buffer.prototype.copy
const compare: (
  this: Uint8Array,
  target: Uint8Array,
  targetStart: number,
  targetEnd: number,
  sourceStart: number,
  sourceEnd: number,
) => number = Buffer.prototype.compare
