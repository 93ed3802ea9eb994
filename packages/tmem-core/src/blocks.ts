/**
 * Puts, gets, fetches and flushes of blocks: what a page of at most 64 KiB is, and a part of a larger one.
 *
 * A put goes to the first place that takes it; where that is full, the coldest pages of it go down, and only what finds
 * no room then goes to the next place itself, down to the refusal that the caller sees. Pages of a batch that go
 * straight to a slow place wait for each other, and are written together.
 *
 * Invariants: a put that was refused leaves nothing (`keep`: leaves what was there); a handle is in the directory
 * exactly while a place has its page. Nothing here allocates per page but what waits: a fetch of a deferred page is a
 * promise.
 */
import {
  bytesPerPage,
  codecIn,
  type Directory,
  EPHEMERAL,
  lengthIn,
  MAIN,
  placeIn,
  REFERENCED,
  samePlace,
  TRIED,
  UNTOUCHED,
} from './directory.ts'
import type { Flights } from './flights.ts'
import { none } from './handles.ts'
import { moved, nowhere } from './history.ts'
import type { Ledger } from './ledger.ts'
import { longAgo, type Mover } from './mover.ts'
import { GetOutcome, Pending, PutOutcome, putOutcomeCount, TmemError } from './outcomes.ts'
import { type BlockCodec, maxBlockBytes } from './place.ts'
import type { Rising } from './rising.ts'
import { copyBytes } from './runtime.ts'
import { fillWord, isRepeated, wordAt } from './same-filled.ts'
import type { PoolKind, Seat } from './seat.ts'
import type { Sinking } from './sinking.ts'
import type { Allocator, Borrower, LayerContext, ObjectId, PageBatch, Whereabouts } from './store.ts'

/** Counters of the chain itself, in pages; those larger than a block count once. */
export interface ChainCounters {
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

/** What the operations need to know of a pool. */
export interface BlockPool extends PoolKind {
  /** No new pages are taken. */
  readonly frozen: boolean
  /** It was destroyed. */
  readonly gone: boolean
  /** Charges the owner; always true for an ephemeral pool. */
  charge(bytes: number): boolean
}

const asItIs = 1
const inWorkspace = 2

/**
 * What is known of an entry that is being put: it had a page; it has it still; the new one does not shrink, as far as
 * anybody has tried.
 */
const known = 1
const kept = 2
const huge = 4

export class Blocks {
  readonly name: string
  readonly mover: Mover
  readonly ledger: Ledger
  readonly flights: Flights
  readonly sinking: Sinking
  readonly rising: Rising
  readonly seats: readonly Seat[]
  readonly directory: Directory
  readonly codec: BlockCodec
  /** Why the outside world refused, since the last put began. */
  failure: Error | undefined
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
  /** By outcome: puts that were refused. */
  readonly refused: Float64Array = new Float64Array(putOutcomeCount)
  /** Where a page is shown to a borrower. */
  #page: Uint8Array = new Uint8Array(0)
  #lending = false
  readonly #allocator: Allocator
  readonly #wake: (() => void) | undefined
  #woken = false
  /** What `block` in the ledger holds of the page being put: nothing, the page in the workspace or as it is. */
  #formed = 0
  #checksum = 0
  /** The page being put does not shrink, as far as anybody has tried. */
  #huge = false
  /**
   * By place and frame that was staged: its entry in the batch (`none`: it is a page by itself), and what is known of
   * it.
   */
  readonly #stagedAt: readonly number[][]
  readonly #stagedAs: readonly number[][]
  #stagedSeat: Seat | undefined
  /** Where the pages come from that are staged: of a batch, and of one by itself. */
  #batch: PageBatch | undefined
  #batchPool: BlockPool | undefined
  #lonePool: BlockPool | undefined
  #loneBytes: Uint8Array | undefined
  #loneAt = 0

  constructor(name: string, mover: Mover, { allocator, wake }: LayerContext) {
    const { ledger } = mover
    this.name = name
    this.mover = mover
    this.ledger = ledger
    this.flights = mover.flights
    this.sinking = mover.sinking
    this.rising = mover.rising
    this.seats = ledger.seats
    this.directory = ledger.directory
    this.codec = ledger.codec
    this.#allocator = allocator
    this.#wake = wake
    this.#stagedAt = this.seats.map(() => [])
    this.#stagedAs = this.seats.map(() => [])
    this.flights.onLanded = () => {
      for (const seat of this.seats) if (seat.memory !== undefined) this.wakeFor(seat)
    }
  }

  /** The entry of a page, or `none`. A page that waits to be written with its batch is in place first. */
  find(pool: BlockPool, object: ObjectId, index: number): number {
    const { table } = this.directory
    const entry = table.find(pool.number, object, index)
    if (entry === none || this.#stagedSeat === undefined || !this.#isStaged(entry)) return entry
    this.commit()
    return table.find(pool.number, object, index)
  }

  /**
   * Stores the block of `pool.blockBytes` bytes at `bytes[at]`. `keep`: a refusal leaves what is there. `unchanged`: a
   * copy below still serves. `batchEntry`: what goes straight to a slow place waits for `commit`, and the answer is
   * `Pending`.
   */
  put(
    pool: BlockPool,
    object: ObjectId,
    index: number,
    bytes: Uint8Array,
    at: number,
    keep: boolean,
    unchanged: boolean,
    batchEntry: number,
  ): number {
    const { directory, ledger, sinking } = this
    sinking.prepare(pool.blockBytes)
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
    if (isKnown && !isKept) ledger.vacate(entry)
    // The directory has room for what the places have: where that is all taken, an ephemeral page makes room, as in a
    // place.
    if (!isKnown)
      do entry = directory.enter(pool.number, object, index)
      while (entry === none && sinking.dropOne() > 0)
    if (entry === none) return PutOutcome.NoMemory
    const as = (isKnown ? known : 0) | (isKept ? kept : 0)
    const outcome = this.#store(pool, entry, bytes, at, as, batchEntry, 0, PutOutcome.NoMemory)
    return outcome === Pending ? Pending : this.#wasPut(pool, entry, bytes, at, as, outcome)
  }

  /** A put has come to its end: nothing is left of what was refused. Answers what became of it. */
  #wasPut(pool: BlockPool, entry: number, bytes: Uint8Array, at: number, as: number, outcome: number): number {
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
    if (this.ledger.overwrite(seat, entry)) {
      this.counters.replaced++
      return PutOutcome.Stored
    }
    this.ledger.vacate(entry)
    const second = this.#store(pool, entry, bytes, at, known, none, 0, outcome)
    return this.#wasPut(pool, entry, bytes, at, known, second)
  }

  /**
   * Where a page rests, if all blocks have one size there. When every such slot is taken, as it may be where a stack
   * has room for just so many pages, its own is the one for the page that replaces it.
   */
  #slotOf(entry: number): Seat | undefined {
    const place = this.directory.placeOf(entry)
    const seat = place === samePlace ? undefined : this.seats[place]!
    return seat?.raw === true ? seat : undefined
  }

  /**
   * Finds a place for the page of an entry, from place number `first` on; `why`: the reason for which those before have
   * refused it. `as`: what is known of the entry.
   */
  #store(
    pool: BlockPool,
    entry: number,
    bytes: Uint8Array,
    at: number,
    as: number,
    batchEntry: number,
    first: number,
    why: number,
  ): number {
    const { directory, flights, ledger, seats, sinking } = this
    const { persistent } = pool.attributes
    const isKept = (as & kept) !== 0
    if (first === 0 && persistent && isRepeated(bytes, at, pool.blockBytes) && pool.charge(bytesPerPage)) {
      if (isKept) ledger.vacate(entry)
      directory.setSame(entry, wordAt(bytes, at))
      return PutOutcome.Stored
    }
    this.#formed = 0
    this.#huge = false
    let reason = why
    for (let number = first; number < seats.length; number++) {
      const seat = seats[number]!
      if (!seat.keeps(persistent)) continue
      if (seat.memory !== undefined) {
        this.#form(pool, seat, bytes, at)
        const resident = sinking.allocate(seat, pool)
        if (resident >= 0) {
          if (isKept) ledger.vacate(entry)
          sinking.enter(seat, entry, resident, persistent ? MAIN : EPHEMERAL, this.#checksum)
          if (this.#huge && seat.raw) directory.flag(entry, TRIED, 0)
          if (ledger.block.codec === 0) seat.counters.putHuge++
          seat.counters.put++
          if (number > 0) ledger.history?.note(moved.put, entry, nowhere, number)
          this.wakeFor(seat)
          return PutOutcome.Stored
        }
        reason = -resident
      } else if (flights.canWriteNow(seat)) {
        // A page by itself has a flight of its own.
        if (this.#stagedSeat !== undefined && (this.#stagedSeat !== seat || batchEntry === none)) this.commit()
        this.#form(pool, seat, bytes, at)
        if (flights.mayTake(seat, seat.unitsFor(ledger.block.length))) {
          if (!flights.stage(seat, entry, this.#checksum)) {
            this.commit()
            this.#form(pool, seat, bytes, at)
            flights.stage(seat, entry, this.#checksum)
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
    const flight = this.flights.staged(this.#stagedSeat!)
    for (let n = 0; n < flight.count; n++) if (this.ledger.entryIn(flight, n) === entry) return true
    return false
  }

  /** A batch begins: what goes straight to a slow place waits for the others, until `endBatch`. */
  beginBatch(pool: BlockPool, batch: PageBatch): void {
    this.#batch = batch
    this.#batchPool = pool
  }

  endBatch(): void {
    this.commit()
    this.#batch = undefined
    this.#batchPool = undefined
  }

  /**
   * Writes what was staged, and sets the outcomes in the batch. What the place refuses goes to the next one. Answers
   * the last outcome.
   */
  commit(): number {
    const seat = this.#stagedSeat
    if (seat === undefined) return PutOutcome.Stored
    const { directory, flights, ledger } = this
    const flight = flights.staged(seat)
    const stagedAt = this.#stagedAt[seat.number]!
    const stagedAs = this.#stagedAs[seat.number]!
    this.#stagedSeat = undefined
    const error = flights.writeStaged(seat)
    if (error !== undefined) this.failure = error
    let last: number = PutOutcome.Stored
    let refused: number[] | undefined
    for (let n = 0; n < flight.count; n++) {
      const entry = ledger.entryIn(flight, n)
      const location = error === undefined ? flight.locations[n]! : none
      const at = stagedAt[n]!
      const as = stagedAs[n]!
      const pool = at === none ? this.#lonePool! : this.#batchPool!
      const bytes = at === none ? this.#loneBytes! : this.#batch!.bytes
      const from = at === none ? this.#loneAt : this.#batch!.offsets[at]!
      if (location !== none) {
        if ((as & kept) !== 0) ledger.vacate(entry)
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
        if (seat.number > 0) ledger.history?.note(moved.put, entry, nowhere, seat.number)
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
  #putBack(pool: BlockPool, entry: number, bytes: Uint8Array, at: number): PutOutcome {
    const { directory, ledger, seats, sinking } = this
    this.counters.unchanged_puts++
    const place = directory.placeOf(entry)
    if (place === samePlace) return PutOutcome.Stored
    const below = seats[place]!
    if (below.memory !== undefined) {
      directory.flag(entry, REFERENCED, UNTOUCHED)
      return PutOutcome.Stored
    }
    const { persistent } = pool.attributes
    const seat = seats.find((one) => one.memory !== undefined && one.keeps(persistent))
    if (seat === undefined || seat.number > place) return PutOutcome.Stored
    this.#formed = 0
    this.#form(pool, seat, bytes, at)
    const resident = sinking.allocate(seat, pool)
    // Without room it stays below.
    if (resident < 0) return PutOutcome.Stored
    const location = directory.locationOf(entry)
    const units = directory.unitsOf(entry)
    const isCopy = below.keepsCopies
    if (isCopy) {
      directory.leave(entry)
      below.counters.raised++
    } else ledger.vacate(entry)
    sinking.enter(seat, entry, resident, persistent ? MAIN : EPHEMERAL, this.#checksum)
    if (isCopy) {
      directory.setCopy(resident, place, location, units)
      ledger.history?.note(moved.put, entry, place, seat.number)
    }
    seat.counters.put++
    this.wakeFor(seat)
    return PutOutcome.Stored
  }

  /** Makes the block of the page for a place, unless it is made already. */
  #form(pool: BlockPool, seat: Seat, bytes: Uint8Array, at: number): void {
    const { block } = this.ledger
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
    const { codec, ledger } = this
    const { workspace } = codec
    let length = codec.encode(bytes, at, pool.blockBytes, 0, pool.blockBytes - 1)
    ledger.encoded++
    block.codec = codec.id
    if (length === 0) {
      copyBytes.call(bytes, workspace, 0, at, at + pool.blockBytes)
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
  get(pool: BlockPool, object: ObjectId, index: number, into: Uint8Array, to: number): GetOutcome {
    const entry = this.find(pool, object, index)
    if (entry === none) return GetOutcome.Miss
    const outcome = this.#copyOut(pool, entry, into, to)
    if (outcome === GetOutcome.Hit) this.#used(pool, entry)
    return outcome
  }

  /** Fills `into[to]` with the block of an entry, if it is in memory. */
  #copyOut(pool: BlockPool, entry: number, into: Uint8Array, to: number): GetOutcome {
    const { directory, ledger, seats } = this
    const state = directory.stateOf(entry)
    const place = placeIn(state)
    if (place === samePlace) {
      fillWord(into, to, pool.blockBytes, directory.wordOf(entry))
      return GetOutcome.Hit
    }
    const seat = seats[place]!
    const { memory } = seat
    if (memory === undefined) return GetOutcome.Deferred
    const resident = directory.residentOf(entry)
    const length = lengthIn(state)
    const { block } = ledger
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
      if (ledger.decode(codec, length, into, to, pool.blockBytes)) return GetOutcome.Hit
    seat.counters.corrupt++
    // The copy below is as good.
    if (ledger.release(entry)) return GetOutcome.Deferred
    if (pool.attributes.persistent) throw this.#corruption(seat, entry)
    ledger.dropPage(entry)
    this.counters.corrupt_dropped++
    return GetOutcome.Miss
  }

  /** A page was used. */
  #used(pool: BlockPool, entry: number): void {
    const { directory, ledger } = this
    const { persistent, shared } = pool.attributes
    const state = directory.stateOf(entry)
    if (persistent) {
      if (placeIn(state) === samePlace) return
      const now = (state | REFERENCED) & ~UNTOUCHED
      if (now !== state) directory.flag(entry, REFERENCED, UNTOUCHED)
      return
    }
    if (shared) ledger.touch(entry)
    else if (pool.parts === 1) {
      ledger.drop(entry)
      this.counters.got++
    }
  }

  /** As `get`, waiting where that is needed. */
  async fetch(pool: BlockPool, object: ObjectId, index: number, into: Uint8Array, to: number): Promise<GetOutcome> {
    const { directory, rising, seats } = this
    const { reads } = rising
    for (;;) {
      if (pool.gone) return GetOutcome.Miss
      let entry = this.find(pool, object, index)
      if (entry === none) return GetOutcome.Miss
      const outcome = this.#copyOut(pool, entry, into, to)
      if (outcome === GetOutcome.Hit) this.#used(pool, entry)
      if (outcome !== GetOutcome.Deferred) return outcome
      const seat = seats[directory.placeOf(entry)]!
      const bytes = directory.unitsOf(entry) * seat.slow!.unitBytes
      let read = reads.lend(seat, bytes)
      if (read === undefined) {
        read = await reads.wait(seat, bytes)
        if (read === undefined) return GetOutcome.Miss
        entry = pool.gone ? none : this.find(pool, object, index)
      }
      try {
        if (entry === none) return GetOutcome.Miss
        // It may have gone to another place while this waited, and take more there.
        if (directory.placeOf(entry) !== seat.number) continue
        if (directory.unitsOf(entry) * seat.slow!.unitBytes > read.bytes.length) continue
        if (!(await rising.read(read, entry, into, to))) continue
        this.counters.fetched++
        return GetOutcome.Hit
      } finally {
        reads.giveBack(read)
      }
    }
  }

  /** Where a block is: `none`, memory (true) or a place that waits (false). */
  isInMemory(pool: BlockPool, object: ObjectId, index: number): boolean | undefined {
    const { directory, seats } = this
    const entry = this.find(pool, object, index)
    if (entry === none) return undefined
    const place = directory.placeOf(entry)
    return place === samePlace || seats[place]!.memory !== undefined
  }

  /** Says where the block of an entry is; false: there is none. */
  whereIs(entry: number, into: Whereabouts): boolean {
    if (entry === none) return false
    const { directory, seats } = this
    const state = directory.stateOf(entry)
    const place = placeIn(state)
    into.place = -1
    into.bytes = 0
    into.codec = -1
    into.huge = into.recompressed = into.incompressible = false
    if (place === samePlace) return true
    const { memory, slow } = seats[place]!
    into.place = place
    into.huge = directory.isHuge(entry)
    if (slow !== undefined) into.bytes = directory.unitsOf(entry) * slow.unitBytes
    else {
      into.bytes = lengthIn(state)
      into.codec = codecIn(state)
      into.recompressed = memory!.stronger !== undefined && codecIn(state) === memory!.stronger.id
      into.incompressible = memory!.stronger !== undefined && (state & TRIED) !== 0
    }
    return true
  }

  /** Removes a block. Whether there was one. */
  flush(pool: BlockPool, object: ObjectId, index: number): boolean {
    const entry = this.find(pool, object, index)
    if (entry === none) return false
    this.ledger.drop(entry)
    return true
  }

  /** Gives the copy in memory up where another one lies below. */
  release(pool: BlockPool, object: ObjectId, index: number): boolean {
    const entry = this.find(pool, object, index)
    if (entry === none || !this.ledger.release(entry)) return false
    this.counters.released++
    return true
  }

  /**
   * Removes all pages that `first` finds, and answers how many. `forget`: what survives keeps them for the next run.
   */
  flushAll(first: () => number, forget: boolean): number {
    let blocks = 0
    this.commit()
    for (let entry = first(); entry !== none; entry = first()) {
      this.ledger.drop(entry, forget)
      blocks++
    }
    return blocks
  }

  /** Asks for a tick, once until there is one, if a place has more than it should. */
  wakeFor(seat: Seat): void {
    if (this.#woken || this.#wake === undefined || seat.memory!.excess() <= 0) return
    this.#woken = true
    this.#wake()
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

  /** Takes memory for pages of a size that are shown or decoded. False: there is none. */
  reserve(pageSize: number): boolean {
    if (!this.ledger.reservePage(Math.min(pageSize, maxBlockBytes))) return false
    if (this.#page.length >= pageSize) return true
    const memory = this.#allocator.allocate(pageSize, 'chain.page')
    if (memory === undefined) return this.#page.length >= pageSize
    this.#page = new Uint8Array(memory, 0, pageSize)
    return true
  }

  /** A tick begins. */
  wasWoken(): void {
    this.#woken = false
  }
}
