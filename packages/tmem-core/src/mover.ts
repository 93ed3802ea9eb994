/**
 * What happens between the places of a stack: blocks are given a place, sink when they are cold, and rise when they are
 * asked for.
 *
 * A page counts as moved when its new place has acknowledged it; until then the old place answers for it. So each move has
 * the same three steps: the new place has the block; the directory says so; the old place gives it up. What happens to a page between
 * the first step and the second (a flush, another put, a read) is seen by looking at its entry again: an entry on a flight has the
 * number of the flight, and whatever changes the page takes the number away.
 *
 * A page that rose keeps its block below as a clean copy, so that sinking again writes nothing; a flush or another put ends both.
 *
 * Nothing is compressed here but what lies uncompressed in a memory place and goes to one that compresses.
 *
 * Invariants: a location of a slow place is known to exactly one entry, as its place or as its clean copy, or to a flight; a read in
 * progress whose location is given up is marked as stale before the location can be given out again.
 */
import type { Directory } from './directory.ts'
import {
  bytesPerObject,
  bytesPerPage,
  bytesPerResident,
  codecIn,
  EPHEMERAL,
  isFlying,
  lengthIn,
  MAIN,
  PROBATION,
  placeIn,
  REFERENCED,
  samePlace,
  TRIED,
  tagOf,
} from './directory.ts'
import { none } from './handles.ts'
import { Order, SinkClock } from './order.ts'
import { PutOutcome, putOutcomeCount, TmemError } from './outcomes.ts'
import {
  Block,
  type BlockCodec,
  Flight,
  frameBytes,
  isSlow,
  type MemoryPlace,
  type MovedBlock,
  maxBlockBytes,
  maxRoundingBytes,
  type Owners,
  type Place,
  type RecoverBlock,
  type SlowPlace,
  unitsOf,
} from './place.ts'
import type { Account, Allocator, LayerContext, ObjectId, PoolAttributes, Sunk } from './store.ts'
import { basePageSize } from './store.ts'

/** Flights of one slow place: puts that go straight there, what must sink for a put, and what sinks in the background. */
const STRAIGHT = 0
const FORCED = 1
const flightsOfSeat = 4
/** Numbers in the directory that they need: what goes straight is not in memory. */
const numbersOfSeat = flightsOfSeat - FORCED
/** Blocks that are read at the same time. */
const readsAtOnce = 16
/** Most attempts that a place which failed is left alone for. */
const maxRest = 1024
/** Bytes that go down at once when a put finds no room: one write. */
const forcedBytes = 128 * 1024
/** Epochs after which a page that sank counts as new. */
export const longAgo = 128
/** Frames that a full place is spared before it is asked again. */
const maxSpared = 64
/** How often a put tries to find room, and the bytes of ephemeral pages that go first. */
const squeezes = 12
const ephemeralBytes = 16 * 1024
/** Bytes of pages that go down to memory at once: what the places there are prepared for. */
const passedBytes = 256 * 1024
/** Pages that one call lets sink at most, clean ones included. */
const maxVictims = 512

/** What the mover needs to know of a pool. */
export interface PoolKind {
  readonly number: number
  /** The same in every run for pools of one kind that are made in the same order. */
  readonly key: number
  readonly attributes: PoolAttributes
  /** Bytes of the blocks that its pages are kept in, and blocks of a page. */
  readonly blockBytes: number
  readonly parts: number
  readonly account: Account | undefined
  /** An ephemeral page was dropped for want of room; `index` is that of one of its parts. */
  wasDropped(object: ObjectId, index: number): void
  /** A page has ended because a fetch took it, or because it could not be read. */
  ended(why: 'got' | 'corrupt_dropped'): void
}

/**
 * Why pages moved, and where to; counted for each place. Blocks in it = put + sunkIn + sunkClean + rose + recovered - passedDown -
 * droppedClean - released - raised - gone.
 */
export interface SeatCounters {
  /** Blocks put here from above (those of them that do not shrink), sunk to here (with a write, and without), risen to here, found here. */
  put: number
  putHuge: number
  sunkIn: number
  sunkClean: number
  rose: number
  recovered: number
  /** Blocks that left: passed down, dropped or released in favour of a clean copy, raised. */
  passedDown: number
  droppedClean: number
  released: number
  raised: number
  /** Blocks given up: flushed, replaced, taken, dropped; of these, ephemeral ones that had to make room. */
  gone: number
  droppedEphemeral: number
  /** Blocks that were moved together; that were compressed again, in vain, and the bytes that this saved. */
  compacted: number
  recompressed: number
  recompressPoor: number
  recompressSavedBytes: number
  /** Flights that landed, and those that were forced by a put; frames in them; their bytes. */
  flights: number
  forcedFlights: number
  frames: number
  frameBytes: number
  failedFlights: number
  /** Blocks read, reads that failed, reads whose page had changed meanwhile. */
  reads: number
  failedReads: number
  staleReads: number
  /** Damaged blocks that were met. */
  corrupt: number
  /** Blocks that were used while they were on their way down. */
  usedInFlight: number
}

/** As `RecoverBlock`, for a page in a place of that number. */
export type EnterSlow = (place: number, ...page: Parameters<RecoverBlock>) => number

/** A place in its stack, and what the chain knows of it. */
export class Seat {
  readonly number: number
  readonly place: Place
  readonly memory: MemoryPlace | undefined
  readonly slow: SlowPlace | undefined
  readonly order: Order
  /** Blocks here are pages as they are, without a checksum or a frame of ours. */
  readonly raw: boolean
  /** Its memory is somebody else's: nobody is charged for it. */
  readonly foreign: boolean
  readonly flights: Flight[] = []
  /** Number in the directory of the first flight that has one. */
  readonly #firstNumber: number
  /** By flight: it is under way; how many of its pages have left memory when it is over. */
  readonly underWay: (Promise<number> | undefined)[] = []
  /** Where the search for clean copies to give up goes on. */
  copyHand = 0
  /** Units of the smallest frame that had no room here, units that were given up since, and frames that were not offered for that. */
  #refusedUnits = Number.POSITIVE_INFINITY
  #freedUnits = 0
  #spared = 0
  /** Attempts for which the place is left alone, and how many the next failure costs. */
  rest: number = 0
  nextRest: number = 1
  /** Blocks in memory, and objects, whose metadata is in the place's limit: as many as there ever were at once. */
  countedBlocks = 0
  countedObjects = 0
  /** Why it refused last, for whoever asks. */
  failure: Error | undefined
  readonly refused: Float64Array = new Float64Array(putOutcomeCount)
  readonly counters: SeatCounters = {
    put: 0,
    putHuge: 0,
    sunkIn: 0,
    sunkClean: 0,
    rose: 0,
    recovered: 0,
    passedDown: 0,
    droppedClean: 0,
    released: 0,
    raised: 0,
    gone: 0,
    droppedEphemeral: 0,
    compacted: 0,
    recompressed: 0,
    recompressPoor: 0,
    recompressSavedBytes: 0,
    flights: 0,
    forcedFlights: 0,
    frames: 0,
    frameBytes: 0,
    failedFlights: 0,
    reads: 0,
    failedReads: 0,
    staleReads: 0,
    corrupt: 0,
    usedInFlight: 0,
  }

  constructor(
    number: number,
    { place, foreign }: OpenPlace,
    directory: Directory,
    allocator: Allocator,
    slowBefore: number,
    clock: SinkClock,
  ) {
    this.number = number
    this.place = place
    this.order = new Order(directory, number, clock)
    this.raw = place.traits.rawOnly
    this.foreign = foreign
    this.#firstNumber = 1 + slowBefore * numbersOfSeat
    if (!isSlow(place)) {
      this.memory = place
      return
    }
    this.slow = place
    const bytes = Math.max(place.flightBytes, unitsOf(maxBlockBytes, place.unitBytes) * place.unitBytes)
    for (let n = 0; n < flightsOfSeat; n++) {
      const memory = allocator.allocate(bytes, 'chain.flight')
      if (memory === undefined)
        throw new TmemError('TMEM_NO_MEMORY', `no memory to write pages to ${place.name} (${bytes} bytes)`, {
          layer: place.name,
        })
      this.flights.push(new Flight(memory, bytes, place.unitBytes))
      this.underWay.push(undefined)
    }
  }

  /** Whether pages of that kind may rest here. */
  keeps(persistent: boolean): boolean {
    return persistent ? this.place.traits.persistent : this.place.traits.ephemeral
  }

  /** Whether what rises may leave its block here. Where content survives, an old page would come back after a crash. */
  get keepsCopies(): boolean {
    return this.place.traits.survives === 'nothing'
  }

  /** Units of a slow place that a block takes. */
  unitsFor(length: number): number {
    const { unitBytes } = this.slow!
    return this.raw ? length / unitBytes : unitsOf(length, unitBytes)
  }

  /** Number in the directory of a flight. */
  numberOf(flight: number): number {
    return this.#firstNumber + flight - FORCED
  }

  /** Whether a flight is under way that has this number in the directory, and carries the block of an owner. */
  carries(number: number, owner: number): boolean {
    const flight = number - this.#firstNumber + FORCED
    if (this.underWay[flight] === undefined) return false
    const { owners, count } = this.flights[flight]!
    return owners.subarray(0, count).includes(owner)
  }

  /** Whether anything is under way. */
  get isBusy(): boolean {
    return this.underWay.some((flight) => flight !== undefined)
  }

  /**
   * Whether a frame is worth offering. A place that is full would look for room each time, and write what it then refuses: so it is
   * asked for as much as was given up there since, or for less than it refused, or again when it was spared for a while.
   */
  mayTake(units: number): boolean {
    if (units < this.#refusedUnits) return true
    if (units > this.#freedUnits && ++this.#spared < maxSpared) return false
    if (units <= this.#freedUnits) this.#freedUnits -= units
    else this.askAgain()
    return true
  }

  /** There was no room for a frame. */
  hadNoRoom(units: number): void {
    this.#refusedUnits = Math.min(this.#refusedUnits, units)
  }

  /** A frame was given up. */
  gaveUp(units: number): void {
    if (this.#refusedUnits !== Number.POSITIVE_INFINITY) this.#freedUnits += units
  }

  /** What it refused before does not count any more. */
  askAgain(): void {
    this.#refusedUnits = Number.POSITIVE_INFINITY
    this.#freedUnits = 0
    this.#spared = 0
  }

  /** The outside world failed: the place is left alone for a while. */
  failed(error: Error): void {
    this.failure = error
    // Room that was to be had for what failed is still there.
    this.askAgain()
    this.rest = this.nextRest
    this.nextRest = Math.min(maxRest, this.nextRest * 2)
  }

  /** The place works. */
  worked(): void {
    this.nextRest = 1
    this.failure = undefined
  }
}

/** A read in progress. */
export class Read {
  readonly bytes: Uint8Array
  readonly words: Int32Array
  seat: Seat | undefined
  location: number = none
  /** What was asked for was given up, or moved, meanwhile. */
  stale = false

  constructor(memory: ArrayBufferLike, at: number, length: number) {
    this.bytes = new Uint8Array(memory, at, length)
    this.words = new Int32Array(memory, at, length >>> 2)
  }
}

/** An open place, and whether its memory is somebody else's in this stack. */
export interface OpenPlace {
  readonly place: Place
  readonly foreign: boolean
}

export interface MoverOptions {
  readonly places: readonly OpenPlace[]
  readonly directory: Directory
  readonly codec: BlockCodec
  readonly pools: readonly (PoolKind | undefined)[]
  readonly context: LayerContext
  /** Where several directories share the places: which of them this is. */
  readonly share?: MoverShare
}

/** What tells the movers of a stack with several directories apart. */
export interface MoverShare {
  /** Added to the numbers by which places know what is ours. */
  readonly base: number
  /** Finds the mover of a resident that a place has moved. */
  readonly moved: MovedBlock
}

export class Mover {
  readonly seats: readonly Seat[]
  readonly directory: Directory
  readonly codec: BlockCodec
  /** The block that is being put, and one that is on the move meanwhile. */
  readonly block: Block = new Block()
  readonly #moving: Block = new Block()
  readonly #pools: readonly (PoolKind | undefined)[]
  readonly #reads: Read[] = []
  readonly #freeReads: Read[] = []
  readonly #waiting: ((read: Read | undefined) => void)[] = []
  /** Called when no read is under way any more. */
  #allReadsBack: (() => void) | undefined
  /** Bytes of the longest frame that any place can have. */
  readonly #readBytes: number
  readonly #context: LayerContext
  readonly #base: number
  /** A page for blocks that must be decoded on their way down. */
  #page: Uint8Array = new Uint8Array(0)
  #countedObjects = 0
  #closed = false
  /** Blocks that memory below is prepared to take. */
  #passes = 0
  /** Location of the block that `allocate` took last. */
  #location = none
  /** Pages that were decoded on their way, and encoded. */
  decoded = 0
  encoded = 0
  /** Pages encoded although a block of them lay below: they had risen to where pages are kept as they are. */
  encodedAgain = 0
  /** Called when a flight has landed: there may be room for the next one. */
  onLanded: () => void = () => undefined
  /** Told by a place of a block that it has moved. */
  readonly moved: (resident: number, location: number) => void
  readonly #sizes: ((entry: number) => number)[]

  constructor(options: MoverOptions) {
    const { places, directory, codec, pools, context, share } = options
    this.directory = directory
    this.codec = codec
    this.#pools = pools
    this.#context = context
    let slow = 0
    const clock = new SinkClock(directory)
    this.seats = places.map(
      (open, number) => new Seat(number, open, directory, context.allocator, isSlow(open.place) ? slow++ : 0, clock),
    )
    this.#base = share?.base ?? 0
    this.moved = share?.moved ?? ((resident, location) => directory.moveBlock(resident, location))
    this.#sizes = this.seats.map(
      ({ memory }) =>
        (entry: number) =>
          memory === undefined ? 0 : memory.sizeOf(lengthIn(directory.stateOf(entry))),
    )
    if (share === undefined) for (const seat of this.seats) seat.slow?.attach?.(this.ownersOf(seat.number))
    this.#readBytes = Math.max(
      0,
      // A place may round up to whole blocks.
      ...this.seats.map((seat) =>
        seat.slow === undefined ? 0 : seat.unitsFor(maxBlockBytes) * seat.slow.unitBytes + maxRoundingBytes,
      ),
    )
    if (slow === 0) return
    // All of them now: a page that cannot be read for want of memory would be lost to its caller.
    const reads = context.io === 'blocking' ? 1 : readsAtOnce
    const memory = context.allocator.allocate(reads * this.#readBytes, 'chain.reads')
    if (memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `no memory to read pages (${reads * this.#readBytes} bytes)`, {
        layer: 'chain',
      })
    for (let n = 0; n < reads; n++) {
      const read = new Read(memory, n * this.#readBytes, this.#readBytes)
      this.#reads.push(read)
      this.#freeReads.push(read)
    }
  }

  /** What a place may ask about its frames here. */
  ownersOf(number: number): Owners {
    const { directory } = this
    const seat = this.seats[number]!
    return {
      unitsAt: (owner, location) => this.#unitsAt(seat, owner - this.#base, location),
      moved: (owner, from, to, units) => this.#relocate(seat, owner - this.#base, from, to, units),
      drop: (owner, location) => this.#giveWay(seat, owner - this.#base, location),
      poolOf: (owner) => this.#poolOf(owner - this.#base).key,
      objectOf: (owner) => directory.table.objectOf(owner - this.#base),
      indexOf: (owner) => directory.table.indexOf(owner - this.#base),
      isCurrent: (flight, frame) => {
        const number = seat.flights.indexOf(flight)
        // What goes straight there is nowhere else, and cannot change meanwhile.
        return number === STRAIGHT || this.#onFlight(this.entryIn(flight, frame), seat.numberOf(number)) !== undefined
      },
      landed: (flight) => this.#landed(seat, seat.flights.indexOf(flight)),
    }
  }

  /** The entry that a frame of a flight is of. */
  entryIn(flight: Flight, frame: number): number {
    return flight.owners[frame]! - this.#base
  }

  /** Makes room for decoding pages of that size on their way. False: no memory. */
  reservePage(bytes: number): boolean {
    if (this.#page.length >= bytes) return true
    const memory = this.#context.allocator.allocate(bytes, 'chain.page')
    if (memory === undefined) return this.#page.length >= bytes
    this.#page = new Uint8Array(memory, 0, bytes)
    return true
  }

  /** Lets the memory places get memory, before anything is half done: the first for a block, those below for what makes room for it. */
  prepare(blockBytes: number): void {
    this.#prepare(0, blockBytes)
  }

  #prepare(first: number, blockBytes: number): void {
    for (let number = first; number < this.seats.length; number++)
      this.seats[number]!.memory?.prepare?.(number === 0 ? blockBytes : passedBytes)
    this.#passes = passedBytes / blockBytes
  }

  // ---- Giving blocks a place --------------------------------------------------------------------------------------

  /**
   * Gives `block` a place in a memory place: the number of its resident, which no entry knows yet, or (negative) why not. Colder
   * pages may go down for it: at most one write.
   */
  allocate(seat: Seat, pool: PoolKind): number {
    const { directory, block } = this
    const charge = this.#chargeOf(seat, block.length)
    if (pool.account?.charge(charge) === false) return -PutOutcome.Quota
    const resident = this.#acquire(seat)
    if (resident === none) {
      pool.account?.release(charge)
      return -PutOutcome.NoMemory
    }
    let location = this.#offer(seat, block, resident)
    if (location === -PutOutcome.NoMemory) location = this.#squeeze(seat, block, resident)
    if (location >= 0) {
      this.#location = location
      return resident
    }
    directory.releaseResident(resident)
    pool.account?.release(charge)
    return location
  }

  /** Notes that an entry's page is the block of a resident from `allocate`. */
  enter(seat: Seat, entry: number, resident: number, queue: number, checksum: number): void {
    const { directory, block } = this
    directory.setResident(entry, seat.number, resident, block.length, block.codec)
    directory.setBlock(resident, entry, this.#location, checksum)
    const bytes = seat.memory!.sizeOf(block.length)
    directory.append(seat.number, queue, resident, entry, bytes)
  }

  /** Puts `block` where the page of an entry is, of the same length and in memory. False: the place cannot do that, and nothing was done. */
  overwrite({ memory }: Seat, entry: number): boolean {
    if (memory?.overwrite === undefined) return false
    const { directory } = this
    const resident = directory.residentOf(entry)
    memory.overwrite(directory.blockOf(resident), this.block)
    directory.setFlight(entry, 0)
    if (directory.copyOf(resident) !== none) this.#endCopy(resident)
    return true
  }

  /** Gives up what `allocate` has given. */
  #cancel(seat: Seat, pool: PoolKind, resident: number): void {
    const { length } = this.block
    seat.memory!.free(this.#location, length, pool.blockBytes)
    this.directory.releaseResident(resident)
    pool.account?.release(this.#chargeOf(seat, length))
  }

  /** Bytes that a client pays for a block in memory. */
  #chargeOf({ foreign, memory }: Seat, length: number): number {
    return foreign ? 0 : bytesPerPage + bytesPerResident + memory!.sizeOf(length)
  }

  /** A number for a resident, or `none`. */
  #acquire(seat: Seat): number {
    const { directory } = this
    for (let attempt = 0; attempt < squeezes; attempt++) {
      const resident = directory.acquireResident()
      if (resident !== none || !this.#makeRoom(seat, attempt)) return resident
    }
    return none
  }

  /** Offers a block to a memory place: its location, or (negative) why not. */
  #offer(seat: Seat, block: Block, resident: number): number {
    return this.#charge(seat) ? seat.memory!.put(block, resident + this.#base) : -PutOutcome.NoMemory
  }

  /**
   * Takes the metadata of one block more, as far as there never were so many, out of the limit of its place. Each may be an object by
   * itself; objects beyond that are those of pages elsewhere. False: there is no room for it.
   */
  #charge(seat: Seat): boolean {
    const { pages, table } = this.directory
    const blocks = pages[seat.number]! + 1
    const moreBlocks = Math.max(0, blocks - seat.countedBlocks)
    const mayHave = seat.countedBlocks + moreBlocks - seat.countedObjects
    const moreObjects = Math.max(0, Math.min(table.objects - this.#countedObjects, mayHave))
    if (moreBlocks === 0 && moreObjects === 0) return true
    if (!seat.memory!.charge(moreBlocks * (bytesPerPage + bytesPerResident) + moreObjects * bytesPerObject))
      return false
    seat.countedBlocks += moreBlocks
    seat.countedObjects += moreObjects
    this.#countedObjects += moreObjects
    return true
  }

  /** Finds room for a block in a place that is full. */
  #squeeze(seat: Seat, block: Block, resident: number): number {
    const memory = seat.memory!
    let location: number = -PutOutcome.NoMemory
    for (let attempt = 0; attempt < squeezes && location === -PutOutcome.NoMemory; attempt++) {
      // For a few bytes of metadata a chunk has to become empty: before pages go for that, those that are there move together.
      const isBetter = this.#charge(seat)
        ? memory.fit?.(block.length, this.moved) === true
        : this.compact(seat, maxVictims) > 0
      if (!isBetter && !this.#makeRoom(seat, attempt)) break
      location = this.#offer(seat, block, resident)
    }
    return location
  }

  /**
   * Gives up some of a memory place, ephemeral pages first, and more of them with each attempt: what goes is of other sizes than what comes,
   * so that a few need not leave a place. False when nothing can go.
   */
  #makeRoom(seat: Seat, attempt: number): boolean {
    const bytes = this.#forcedBytes(seat.memory!)
    const eaten = Math.min(bytes, ephemeralBytes * 2 ** attempt)
    return this.sinkEphemeral(seat, eaten, true) > 0 || this.sink(seat, bytes, true) > 0
  }

  /** Bytes that go down in one write when a put finds no room. */
  #forcedBytes({ limitBytes }: MemoryPlace): number {
    return Math.min(forcedBytes, limitBytes / 16)
  }

  /** Drops the oldest ephemeral page in memory. False: there is none. */
  dropOne(): boolean {
    const { directory, seats } = this
    const seat = seats.findLast(({ number }) => directory.queued(number, EPHEMERAL) > 0)
    if (seat === undefined) return false
    this.#evict(directory.entryOf(directory.oldest(seat.number, EPHEMERAL)))
    return true
  }

  // ---- Sinking ----------------------------------------------------------------------------------------------------

  /**
   * Bytes that should go down: what is above the high mark of a memory place and not on its way, and, where that costs a write, a flight more, so that
   * writes are large and few. 0: nothing.
   */
  excess(seat: Seat): number {
    const above = seat.memory!.excess()
    if (above <= 0) return 0
    let flying = 0
    let batch = 0
    for (const { slow, flights, underWay } of this.seats) {
      if (slow === undefined) continue
      batch = this.#forcedBytes(seat.memory!) / 2
      for (const [number, flight] of flights.entries()) if (underWay[number] !== undefined) flying += flight.filled
    }
    return above > flying ? above - flying + batch : 0
  }

  /**
   * Lets so many bytes and pages of a memory place go down at most. Called when nothing is half done: memory below gets memory for what comes, some
   * blocks at a time. Returns the pages.
   */
  relieve(seat: Seat, bytes: number, most: number): number {
    const resting = (): number =>
      [MAIN, PROBATION, EPHEMERAL].reduce((sum, queue) => sum + this.directory.bytesOf(seat.number, queue), 0)
    const least = resting() - bytes
    let pages = 0
    for (;;) {
      this.#prepare(seat.number + 1, Math.max(basePageSize, this.#page.length))
      const busy = pages
      pages += this.sinkEphemeral(seat, resting() - least, false, most - pages)
      if (pages < most && this.directory.queued(seat.number, EPHEMERAL) === 0)
        pages += this.sink(seat, resting() - least, false, most - pages)
      // More goes at once only where memory took all that it was prepared for.
      if (pages === busy || pages === most || this.#passes > 0 || resting() <= least) return pages
    }
  }

  /**
   * Lets the coldest persistent pages of a memory place go down until `bytes` are free or on their way. `now`: before it
   * returns, in one write at most. Returns the pages that go, clean ones included.
   */
  sink(seat: Seat, bytes: number, now: boolean, most: number = maxVictims): number {
    const { directory } = this
    const sizeOf = this.#sizes[seat.number]!
    let target: Seat | undefined
    let flight = none
    let pages = 0
    let freed = 0
    for (let left = Math.min(most, maxVictims); left > 0 && freed < bytes; left--) {
      const resident = seat.order.next(sizeOf)
      if (resident === none) break
      const entry = directory.entryOf(resident)
      const size = sizeOf(entry)
      if (this.#isClean(seat, resident)) {
        this.#dropClean(seat, entry, resident)
        pages++
        freed += size
        continue
      }
      target ??= this.#below(seat, true, now)
      if (target === undefined) break
      if (target.memory !== undefined) {
        if (this.#passes === 0) break
        this.#passes--
        const moved = this.#passDown(seat, target, entry, resident)
        if (moved === undefined) continue
        if (!moved) {
          target = this.#below(target, true, now)
          if (target === undefined) break
          continue
        }
        pages++
        freed += size
        continue
      }
      // The memory between has not taken it.
      if (directory.copyOf(resident) !== none) {
        this.#dropClean(seat, entry, resident)
        pages++
        freed += size
        continue
      }
      if (flight === none) {
        flight = this.#openFlight(target, now)
        if (flight === none) break
      }
      const boarded = this.#board(seat, target, flight, entry, resident)
      if (boarded === undefined) continue
      if (!boarded) break
      pages++
      freed += size
    }
    if (flight === none || target!.flights[flight]!.count === 0) return pages
    const frames = target!.flights[flight]!.count
    // What could not be written is where it was.
    return pages - frames + this.#launch(target!, flight, now)
  }

  /**
   * The same for ephemeral pages, in the order in which they came; what no place below takes is dropped. Whoever needs room `now` and has
   * to write for it writes many at once.
   */
  sinkEphemeral(seat: Seat, bytes: number, now: boolean, most: number = maxVictims): number {
    const { directory } = this
    const queued = directory.queued(seat.number, EPHEMERAL)
    if (queued === 0) return 0
    const sizeOf = this.#sizes[seat.number]!
    let target = this.#below(seat, false, now)
    const wanted = now && target?.slow !== undefined ? this.#forcedBytes(seat.memory!) : bytes
    let flight = none
    let pages = 0
    let freed = 0
    for (let left = Math.min(most, maxVictims, queued); left > 0 && freed < wanted; left--) {
      const resident = directory.oldest(seat.number, EPHEMERAL)
      // A page in parts goes with all of them.
      if (resident === none) break
      const entry = directory.entryOf(resident)
      if (isFlying(directory.stateOf(entry))) {
        this.#requeue(seat, entry, resident, EPHEMERAL)
        continue
      }
      const size = sizeOf(entry)
      const hasCopy = directory.copyOf(resident) !== none
      if (target?.slow !== undefined && flight === none && !hasCopy) {
        flight = this.#openFlight(target, now)
        if (flight === none) {
          // All of its flights are under way. Only who cannot wait drops what is cold.
          if (!now) break
          target = undefined
        }
      }
      let goes: boolean | undefined = false
      if (target?.memory !== undefined && !this.#isClean(seat, resident)) {
        if (this.#passes === 0) break
        this.#passes--
        goes = this.#passDown(seat, target, entry, resident)
      } else if (target?.slow !== undefined && !hasCopy) {
        goes = this.#board(seat, target, flight, entry, resident)
        // The flight is full; or, when it is empty, the place is.
        if (goes === false && target.flights[flight]!.count > 0) break
      }
      pages++
      freed += size
      // What is damaged has been dropped already.
      if (goes !== false) continue
      // Asked anew: the copy may have been what had to go for another page.
      if (directory.copyOf(resident) !== none) this.#dropClean(seat, entry, resident)
      else this.#evict(entry)
    }
    if (flight === none) return pages
    const { count, owners } = target!.flights[flight]!
    if (count > 0) this.#launch(target!, flight, now)
    if (now)
      // What that place did not take has to go all the same.
      for (let n = 0; n < count; n++) {
        const entry = owners[n]! - this.#base
        if (!directory.isNowhere(entry) && directory.placeOf(entry) === seat.number) this.#evict(entry)
      }
    return pages
  }

  /** The next place below that takes pages of that kind now. */
  #below(seat: Seat, persistent: boolean, forced: boolean): Seat | undefined {
    for (let number = seat.number + 1; number < this.seats.length; number++) {
      const below = this.seats[number]!
      if (!below.keeps(persistent)) continue
      if (below.slow === undefined) return below
      // Who has no other way asks again at once; an ephemeral page can be dropped.
      if (below.rest > 0 && !(forced && persistent)) {
        below.rest--
        continue
      }
      if (forced && below.slow.writeNow === undefined) continue
      if (below.slow.open(forced)) return below
    }
    return undefined
  }

  /** A flight that can be filled, or `none`. */
  #openFlight(target: Seat, now: boolean): number {
    for (let n = now ? FORCED : FORCED + 1; n < (now ? FORCED + 1 : flightsOfSeat); n++) {
      if (target.underWay[n] !== undefined) continue
      target.flights[n]!.clear()
      return n
    }
    return none
  }

  /** Moves a block between memory places. `undefined`: it is damaged and stays, or is gone; false: the place below does not take it. */
  #passDown(seat: Seat, target: Seat, entry: number, resident: number): boolean | undefined {
    const { directory } = this
    const pool = this.#poolOf(entry)
    const state = directory.stateOf(entry)
    const memory = target.memory!
    const moving = this.#moving
    const before = this.#chargeOf(seat, lengthIn(state))
    let checksum: number | undefined
    let location: number
    for (let isFirst = true; ; isFirst = false) {
      // Anew each time: what makes room moves through the same memory, and a codec need not make the same block twice.
      checksum = this.#fetchBlock(seat, entry, resident, target)
      if (checksum === undefined) {
        this.#keepDamaged(seat, entry, resident)
        return undefined
      }
      const more = this.#chargeOf(target, moving.length) - before
      if (more > 0 && pool.account?.charge(more) === false) return false
      location = this.#offer(target, moving, resident)
      if (location >= 0) {
        if (more < 0) pool.account?.release(-more)
        break
      }
      if (more > 0) pool.account?.release(more)
      const isFull = location === -PutOutcome.NoMemory
      // Its own coldest pages go further down first, but no persistent one for an ephemeral one.
      if (
        !isFirst ||
        !isFull ||
        !(moving.persistent ? this.#makeRoom(target, 0) : this.sinkEphemeral(target, ephemeralBytes, true) > 0)
      ) {
        target.refused[-location]!++
        return false
      }
      // Another part of its page was what had to go.
      if (directory.isNowhere(entry)) return undefined
    }
    const queue = directory.queueOf(entry)
    const huge = this.#isHuge(seat, entry)
    directory.unlink(seat.number, resident, entry, seat.memory!.sizeOf(lengthIn(state)))
    seat.memory!.free(directory.blockOf(resident), lengthIn(state), pool.blockBytes)
    directory.leave(entry)
    directory.setResident(entry, target.number, resident, moving.length, moving.codec)
    if (target.raw && huge) directory.flag(entry, TRIED, 0)
    directory.setBlock(resident, entry, location, checksum)
    directory.append(target.number, queue, resident, entry, memory.sizeOf(moving.length))
    seat.counters.passedDown++
    target.counters.sunkIn++
    return true
  }

  /**
   * Brings the block of a resident to `#moving`, in the form that `target` takes: decoded where that keeps pages as they are, encoded
   * where it was a page as it is and `target` compresses. Returns its checksum, or `undefined` when it is damaged.
   */
  #fetchBlock(seat: Seat, entry: number, resident: number, target: Seat): number | undefined {
    const { directory, codec } = this
    const state = directory.stateOf(entry)
    const pool = this.#poolOf(entry)
    const moving = this.#moving
    const { workspace, spareAt } = codec
    moving.pageBytes = pool.blockBytes
    moving.persistent = pool.attributes.persistent
    moving.length = lengthIn(state)
    moving.codec = codecIn(state)
    moving.bytes = workspace
    moving.at = spareAt
    seat.memory!.get(directory.blockOf(resident), moving)
    if (seat.raw && target.place.codec !== undefined && (state & TRIED) === 0) {
      const to = spareAt + maxBlockBytes
      const length = codec.encode(workspace, spareAt, moving.length, to, moving.length - 1)
      this.encoded++
      if (directory.copyOf(resident) !== none) this.encodedAgain++
      if (length > 0) {
        moving.at = to
        moving.length = length
        moving.codec = codec.id
      } else directory.flag(entry, TRIED, 0)
    }
    const checksum = codec.checksum(moving.codec, moving.at, moving.length)
    if (!seat.raw && !directory.isSum(resident, checksum)) return undefined
    if (!target.raw || moving.codec === 0) return target.raw ? 0 : checksum
    this.decoded++
    if (!codec.decode(moving.codec, spareAt, moving.length, this.#page, 0, pool.blockBytes)) return undefined
    moving.bytes = this.#page
    moving.at = 0
    moving.length = pool.blockBytes
    moving.codec = 0
    return 0
  }

  /** Whether the page of an entry does not shrink, as far as anybody has tried. */
  #isHuge(seat: Seat, entry: number): boolean {
    const state = this.directory.stateOf(entry)
    return codecIn(state) === 0 && (!seat.raw || (state & TRIED) !== 0)
  }

  /** A damaged block does not move: a get reports it. It goes behind all others, so that it stops nobody. */
  #keepDamaged(seat: Seat, entry: number, resident: number): void {
    seat.counters.corrupt++
    if (this.directory.queueOf(entry) === EPHEMERAL) this.#evict(entry)
    else this.#requeue(seat, entry, resident, MAIN)
  }

  #requeue(seat: Seat, entry: number, resident: number, queue: number): void {
    const bytes = this.#sizes[seat.number]!(entry)
    this.directory.unlink(seat.number, resident, entry, bytes)
    this.directory.append(seat.number, queue, resident, entry, bytes)
  }

  /** Whether a page can go for nothing: it has a clean copy below, and no other memory place comes before that. */
  #isClean(seat: Seat, resident: number): boolean {
    const { directory } = this
    if (directory.copyOf(resident) === none) return false
    const below = this.seats[seat.number + 1]!
    return below.memory === undefined || below.number > directory.copyPlaceOf(resident)
  }

  /** A page that has a clean copy goes for nothing. */
  #dropClean(seat: Seat, entry: number, resident: number): void {
    const { directory } = this
    const isEphemeral = directory.queueOf(entry) === EPHEMERAL
    this.#dropToCopy(seat, entry, resident)
    seat.counters.droppedClean++
    if (!isEphemeral) seat.order.sank(directory.isMainGhost(entry))
  }

  /** Gives the block in memory up in favour of its clean copy. */
  #dropToCopy(seat: Seat, entry: number, resident: number): void {
    const { directory } = this
    const place = directory.copyPlaceOf(resident)
    const location = directory.copyOf(resident)
    this.seats[place]!.counters.sunkClean++
    this.#leaveMemory(seat, entry, resident, place, location, directory.copyUnitsOf(resident))
  }

  /** A page is in a slow place from now on: its block in memory is given up. */
  #leaveMemory(seat: Seat, entry: number, resident: number, place: number, location: number, units: number): void {
    const { directory } = this
    const memory = seat.memory!
    const state = directory.stateOf(entry)
    const length = lengthIn(state)
    const main = directory.queueOf(entry) === MAIN
    const huge = this.#isHuge(seat, entry)
    directory.unlink(seat.number, resident, entry, memory.sizeOf(length))
    memory.free(directory.blockOf(resident), length, this.#poolOf(entry).blockBytes)
    if (directory.copyOf(resident) !== none) directory.dropCopy(resident)
    directory.releaseResident(resident)
    this.#poolOf(entry).account?.release(this.#chargeOf(seat, length))
    directory.leave(entry)
    directory.setSlow(entry, place, location, units, main, seat.order.epochOf(main), huge)
  }

  /**
   * Adds a block to a flight. `undefined`: it is damaged and stays; false: the flight is full, or the place.
   */
  #board(seat: Seat, target: Seat, number: number, entry: number, resident: number): boolean | undefined {
    const { directory } = this
    const flight = target.flights[number]!
    const length = target.raw ? this.#poolOf(entry).blockBytes : lengthIn(directory.stateOf(entry))
    if (!this.#hasRoom(target, flight, length) || !this.mayTake(target, target.unitsFor(length))) return false
    const checksum = this.#fetchBlock(seat, entry, resident, target)
    if (checksum === undefined) {
      this.#keepDamaged(seat, entry, resident)
      return undefined
    }
    this.#frame(target, flight, this.#moving, entry, checksum)
    directory.setFlight(entry, target.numberOf(number))
    this.#requeue(seat, entry, resident, directory.queueOf(entry))
    return true
  }

  /** Whether a frame is worth offering to a slow place: a full one makes room as long as there are clean copies to give up. */
  mayTake(seat: Seat, units: number): boolean {
    return this.directory.copies > 0 || seat.mayTake(units)
  }

  #hasRoom(target: Seat, flight: Flight, length: number): boolean {
    const bytes = target.unitsFor(length) * target.slow!.unitBytes
    return (
      flight.filled + bytes <= Math.max(target.slow!.flightBytes, bytes) && flight.filled + bytes <= flight.bytes.length
    )
  }

  /** Writes a frame into a flight that has room for it. */
  #frame(target: Seat, flight: Flight, block: Block, entry: number, checksum: number): void {
    const { bytes, words, count } = flight
    const at = flight.filled
    const units = target.unitsFor(block.length)
    const from = target.raw ? at : at + frameBytes
    copy.call(block.bytes, bytes, from, block.at, block.at + block.length)
    const end = at + units * flight.unitBytes
    // What is left of the unit held another flight's bytes.
    bytes.fill(0, from + block.length, end)
    if (!target.raw) {
      const word = at >>> 2
      const form = (block.length - 1) | (block.codec << 16)
      const tag = this.#tagOf(entry)
      words[word] = checksum ^ sealOf(form, tag)
      words[word + 1] = form
      words[word + 2] = tag
      words[word + 3] = entry + this.#base
    }
    flight.offsets[count] = at
    flight.units[count] = units
    flight.owners[count] = entry + this.#base
    flight.locations[count] = none
    flight.count = count + 1
    flight.filled = end
  }

  /** Sends a flight off. Returns the pages that have left, or are on their way. */
  #launch(target: Seat, number: number, now: boolean): number {
    const flight = target.flights[number]!
    const slow = target.slow!
    target.counters.flights++
    if (now) target.counters.forcedFlights++
    if (now || (this.#context.io === 'blocking' && slow.writeNow !== undefined)) {
      try {
        slow.writeNow!(flight)
      } catch (error) {
        this.#crashed(target, number, error)
        return 0
      }
      return this.#landed(target, number)
    }
    target.underWay[number] = slow.write(flight).then(
      () => {
        target.underWay[number] = undefined
        const left = this.#landed(target, number)
        this.onLanded()
        return left
      },
      (error: unknown) => {
        target.underWay[number] = undefined
        this.#crashed(target, number, error)
        return 0
      },
    )
    return flight.count
  }

  /** A flight is safe: its pages change places, those that are still what was sent. How many do. */
  #landed(target: Seat, number: number): number {
    let left = 0
    let refused = 0
    const { directory } = this
    const flight = target.flights[number]!
    const id = target.numberOf(number)
    target.worked()
    target.counters.frames += flight.count
    target.counters.frameBytes += flight.filled
    for (let n = 0; n < flight.count; n++) {
      const entry = this.entryIn(flight, n)
      const location = flight.locations[n]!
      const seat = this.#onFlight(entry, id)
      if (seat === undefined) {
        if (location !== none) this.#freeSlow(target, location, flight.units[n]!)
        continue
      }
      directory.setFlight(entry, 0)
      if (location === none) {
        target.refused[PutOutcome.NoMemory]!++
        target.hadNoRoom(flight.units[n]!)
        refused += flight.units[n]!
        continue
      }
      const resident = directory.residentOf(entry)
      if ((directory.stateOf(entry) & REFERENCED) !== 0 && directory.queueOf(entry) !== EPHEMERAL) {
        if (target.keepsCopies) directory.setCopy(resident, target.number, location, flight.units[n]!)
        else this.#freeSlow(target, location, flight.units[n]!)
        target.counters.usedInFlight++
        continue
      }
      const isEphemeral = directory.queueOf(entry) === EPHEMERAL
      this.#leaveMemory(seat, entry, resident, target.number, location, flight.units[n]!)
      if (!isEphemeral) seat.order.sank(directory.isMainGhost(entry))
      seat.counters.passedDown++
      target.counters.sunkIn++
      left++
    }
    flight.clear()
    this.#giveUpCopies(target, refused)
    return left
  }

  /** Nothing of a flight is kept below: its pages are where they were. */
  #crashed(target: Seat, number: number, error: unknown): void {
    if (!(error instanceof Error)) throw error
    const flight = target.flights[number]!
    target.counters.failedFlights++
    target.failed(error)
    for (let n = 0; n < flight.count; n++) {
      const entry = this.entryIn(flight, n)
      if (this.#onFlight(entry, target.numberOf(number)) !== undefined) this.directory.setFlight(entry, 0)
    }
    flight.clear()
  }

  /** The memory place of an entry that is on that flight still. */
  #onFlight(entry: number, id: number): Seat | undefined {
    const place = this.directory.placeOf(entry)
    if (place === samePlace) return undefined
    const seat = this.seats[place]!
    return seat.memory !== undefined && this.directory.flightOf(entry) === id ? seat : undefined
  }

  /** A shared ephemeral page was used: it is the newest now. */
  touch(entry: number): void {
    const place = this.directory.placeOf(entry)
    if (place === samePlace) return
    const seat = this.seats[place]!
    if (seat.memory !== undefined) this.#requeue(seat, entry, this.directory.residentOf(entry), EPHEMERAL)
  }

  // ---- On request -------------------------------------------------------------------------------------------------

  /**
   * Moves pages down: see `Pool.sink`. `find` answers the entry of page n when it is its turn (`none`: pass over), because pages come and go while
   * flights are under way.
   */
  async sinkPages(pool: PoolKind, find: (n: number) => number, count: number, slow: boolean): Promise<Sunk> {
    let pages = 0
    for (let n = 0; n < count && !this.#closed; ) {
      let target: Seat | undefined
      let flight = none
      for (; n < count; n++) {
        // What gets memory may use the stack: before the page is looked up, and not while a flight is being filled.
        if (!slow && flight === none) this.prepare(pool.blockBytes)
        const entry = find(n)
        const state = entry === none ? 0 : this.directory.stateOf(entry)
        const seat = entry === none || placeIn(state) === samePlace ? undefined : this.seats[placeIn(state)]!
        if (seat?.memory === undefined || isFlying(state)) continue
        const resident = this.directory.residentOf(entry)
        if (!slow && !this.#isClean(seat, resident) && this.#passToMemory(seat, entry, resident)) {
          pages++
          continue
        }
        // It was damaged, or had to make room.
        if (this.directory.isNowhere(entry)) continue
        if (this.directory.copyOf(resident) !== none) {
          this.#dropClean(seat, entry, resident)
          pages++
          continue
        }
        const below = this.#slowBelow(seat, pool.attributes.persistent)
        if (below === undefined) continue
        if (flight === none) {
          target = below
          target.askAgain()
          flight = this.#openFlight(target, false)
          if (flight === none) break
        } else if (below !== target) break
        // Only a use while it is on its way keeps it here.
        this.directory.flag(entry, 0, REFERENCED)
        if (this.#board(seat, below, flight, entry, resident) === false) break
      }
      if (target === undefined) continue
      if (flight === none) await Promise.race(target.underWay.filter((one) => one !== undefined))
      else if (target.flights[flight]!.count > 0) {
        const gone = this.#launch(target, flight, false)
        pages += (await target.underWay[flight]) ?? gone
        if (target.failure !== undefined) return { pages, failure: target.failure }
      }
    }
    return { pages, failure: undefined }
  }

  /** Passes a page down to the next memory place that takes it, if one does. */
  #passToMemory(seat: Seat, entry: number, resident: number): boolean {
    const { persistent } = this.#poolOf(entry).attributes
    for (const below of this.seats) {
      if (below.number <= seat.number || below.memory === undefined || !below.keeps(persistent)) continue
      const moved = this.#passDown(seat, below, entry, resident)
      if (moved !== false) return moved === true
    }
    return false
  }

  #slowBelow(seat: Seat, persistent: boolean): Seat | undefined {
    return this.seats.find(
      (one) => one.number > seat.number && one.slow !== undefined && one.keeps(persistent) && one.slow.open(false),
    )
  }

  /**
   * Compresses the page of an entry again, with the stronger codec of its place. 1: it takes less now; 0: nothing was gained; -1: it was not
   * tried, as nothing could be gained, or it has no room now.
   */
  recompress(entry: number): number {
    const { directory, codec } = this
    const state = directory.stateOf(entry)
    const seat = placeIn(state) === samePlace ? undefined : this.seats[placeIn(state)]!
    const memory = seat?.memory
    const stronger = memory?.stronger
    if (seat === undefined || memory === undefined || stronger === undefined) return -1
    const resident = directory.residentOf(entry)
    const length = lengthIn(state)
    if (
      codecIn(state) === stronger.id ||
      (state & TRIED) !== 0 ||
      isFlying(state) ||
      directory.copyOf(resident) !== none
    )
      return -1
    const pool = this.#poolOf(entry)
    const moving = this.#moving
    // Damage is for a get to report.
    if (this.#fetchBlock(seat, entry, resident, seat) === undefined) return -1
    if (moving.codec === 0) copy.call(moving.bytes, this.#page, 0, moving.at, moving.at + length)
    else if (!codec.decode(moving.codec, moving.at, length, this.#page, 0, pool.blockBytes)) return -1
    const packed = stronger.encode(this.#page, 0, pool.blockBytes, 0, length - 1)
    const before = memory.sizeOf(length)
    const saved = packed === 0 ? 0 : before - memory.sizeOf(packed)
    if (saved > 0) {
      moving.bytes = stronger.workspace
      moving.at = 0
      moving.length = packed
      moving.codec = stronger.id
      const location = memory.put(moving, resident + this.#base)
      if (location < 0) return -1
      memory.free(directory.blockOf(resident), length, pool.blockBytes)
      directory.moveBlock(resident, location)
      directory.setSum(resident, stronger.checksum(stronger.id, 0, packed))
      directory.setForm(entry, packed, stronger.id)
      directory.resize(seat.number, directory.queueOf(entry), -saved)
      if (!seat.foreign) pool.account?.release(saved)
      seat.counters.recompressed++
      seat.counters.recompressSavedBytes += saved
      return 1
    }
    directory.flag(entry, TRIED, 0)
    seat.counters.recompressPoor++
    return 0
  }

  // ---- Straight to a slow place -----------------------------------------------------------------------------------

  /** Whether a slow place takes a block straight from a put. */
  canWriteNow(seat: Seat): boolean {
    return seat.slow!.writeNow !== undefined && seat.slow!.open(true)
  }

  /** Frames of puts that wait to be written together. */
  staged(seat: Seat): Flight {
    return seat.flights[STRAIGHT]!
  }

  /** Adds `block` to what is written straight to a slow place; false: it is full, write first. */
  stage(seat: Seat, entry: number, checksum: number): boolean {
    const flight = seat.flights[STRAIGHT]!
    if (!this.#hasRoom(seat, flight, this.block.length)) return false
    this.#frame(seat, flight, this.block, entry, checksum)
    return true
  }

  /** Writes what was staged. Answers the error; the locations are in the flight, which the caller clears. */
  writeStaged(seat: Seat): Error | undefined {
    const flight = seat.flights[STRAIGHT]!
    seat.counters.flights++
    seat.counters.forcedFlights++
    try {
      seat.slow!.writeNow!(flight)
    } catch (error) {
      if (!(error instanceof Error)) throw error
      seat.counters.failedFlights++
      seat.failed(error)
      return error
    }
    seat.worked()
    seat.counters.frames += flight.count
    seat.counters.frameBytes += flight.filled
    let refused = 0
    for (let n = 0; n < flight.count; n++) {
      if (flight.locations[n] !== none) continue
      seat.hadNoRoom(flight.units[n]!)
      refused += flight.units[n]!
    }
    this.#giveUpCopies(seat, refused)
    return undefined
  }

  // ---- Giving up --------------------------------------------------------------------------------------------------

  /**
   * Frees whatever holds the page of an entry, clean copies included. The entry stays in the table, nowhere. `forget`: what survives
   * the process may keep it for the next one.
   */
  vacate(entry: number, forget: boolean = false): void {
    const { directory } = this
    // A put that a broken rule has stopped in the middle leaves one behind.
    if (directory.isNowhere(entry)) return
    const state = directory.stateOf(entry)
    const place = placeIn(state)
    const pool = this.#poolOf(entry)
    if (place === samePlace) {
      pool.account?.release(bytesPerPage)
      directory.leave(entry)
      return
    }
    const seat = this.seats[place]!
    seat.counters.gone++
    if (seat.memory === undefined) this.#freeSlow(seat, directory.locationOf(entry), directory.unitsOf(entry), forget)
    else {
      const resident = directory.residentOf(entry)
      const length = lengthIn(state)
      if (directory.copyOf(resident) !== none) this.#endCopy(resident)
      directory.unlink(place, resident, entry, seat.memory.sizeOf(length))
      seat.memory.free(directory.blockOf(resident), length, pool.blockBytes)
      directory.releaseResident(resident)
      pool.account?.release(this.#chargeOf(seat, length))
    }
    directory.leave(entry)
  }

  /** Removes a block wherever it is. */
  drop(entry: number, forget: boolean = false): void {
    this.vacate(entry, forget)
    this.directory.remove(entry)
  }

  /** Removes the page of a block, with all its parts. */
  dropPage(entry: number): void {
    const { table } = this.directory
    const pool = this.#poolOf(entry)
    if (pool.parts === 1) {
      this.drop(entry)
      return
    }
    const object = table.objectOf(entry)
    const index = table.indexOf(entry)
    const first = index - (index % pool.parts)
    for (let part = first; part < first + pool.parts; part++) {
      const found = table.find(pool.number, object, part)
      // One that is nowhere is just being put.
      if (found !== none && !this.directory.isNowhere(found)) this.drop(found)
    }
  }

  /** Drops an ephemeral page whose room is needed. */
  #evict(entry: number): void {
    const { directory } = this
    const { table } = directory
    this.seats[directory.placeOf(entry)]!.counters.droppedEphemeral++
    this.#poolOf(entry).wasDropped(table.objectOf(entry), table.indexOf(entry))
    this.dropPage(entry)
  }

  /** Gives up the clean copy of a resident. */
  #endCopy(resident: number): void {
    const { directory } = this
    const below = this.seats[directory.copyPlaceOf(resident)]!
    this.#freeSlow(below, directory.copyOf(resident), directory.copyUnitsOf(resident))
    directory.dropCopy(resident)
  }

  /** A place had no room for so many units: as many go of what pages in memory do not need, so that the next ones find some. */
  #giveUpCopies(seat: Seat, units: number): void {
    const { directory } = this
    let freed = 0
    for (let left = directory.copyWatermark; left > 0 && freed < units && directory.copies > 0; left--) {
      seat.copyHand = (seat.copyHand + 1) % directory.copyWatermark
      const resident = seat.copyHand
      if (directory.copyOf(resident) === none || directory.copyPlaceOf(resident) !== seat.number) continue
      freed += directory.copyUnitsOf(resident)
      this.#endCopy(resident)
    }
  }

  #freeSlow(seat: Seat, location: number, units: number, forget: boolean = false): void {
    this.#stale(seat, location)
    seat.gaveUp(units)
    const slow = seat.slow!
    if (forget && slow.forget !== undefined) slow.forget(location, units)
    else slow.free(location, units)
  }

  /** Whoever is reading there has to look again. */
  #stale(seat: Seat, location: number): void {
    for (const read of this.#reads) if (read.location === location && read.seat === seat) read.stale = true
  }

  /** Gives up the block in memory of a page that has a clean copy, which stays. False when it has none. */
  release(entry: number): boolean {
    const { directory } = this
    const place = directory.placeOf(entry)
    if (place === samePlace) return false
    const seat = this.seats[place]!
    if (seat.memory === undefined) return true
    const resident = directory.residentOf(entry)
    if (directory.copyOf(resident) === none) return false
    // It is in use, not cold: it counts as of the main queue.
    if (directory.queueOf(entry) !== MAIN) this.#requeue(seat, entry, resident, MAIN)
    this.#dropToCopy(seat, entry, resident)
    seat.counters.released++
    return true
  }

  // ---- Reading and rising -----------------------------------------------------------------------------------------

  /** A buffer for a read; `undefined` when the stack was closed while it waited. */
  async borrow(): Promise<Read | undefined> {
    if (this.#closed) return undefined
    return this.#freeReads.pop() ?? (await new Promise<Read | undefined>((resolve) => this.#waiting.push(resolve)))
  }

  giveBack(read: Read): void {
    read.seat = undefined
    read.location = none
    const next = this.#waiting.shift()
    if (next !== undefined) {
      next(read)
      return
    }
    this.#freeReads.push(read)
    if (this.#freeReads.length === this.#reads.length) this.#allReadsBack?.()
  }

  /**
   * Reads the page of an entry in a slow place to `into[to]`, and takes it out of a private ephemeral pool. True: it is there. False: it changed
   * meanwhile, or was ephemeral and is gone: look again. Rejects with `TmemError` (`TMEM_IO`, `TMEM_CORRUPT`): a persistent page stays.
   */
  async read(read: Read, entry: number, into: Uint8Array, to: number): Promise<boolean> {
    const { directory } = this
    const seat = this.seats[directory.placeOf(entry)]!
    const slow = seat.slow!
    const location = directory.locationOf(entry)
    const units = directory.unitsOf(entry)
    read.seat = seat
    read.location = location
    read.stale = false
    let failure: Error | undefined
    try {
      if (this.#context.io === 'blocking' && slow.readNow !== undefined) slow.readNow(location, units, read.bytes)
      else await slow.read(location, units, read.bytes)
    } catch (error) {
      if (!(error instanceof Error)) throw error
      failure = error
    }
    if (read.stale || this.#closed) {
      seat.counters.staleReads++
      return false
    }
    const pool = this.#poolOf(entry)
    const isHere = directory.placeOf(entry) === seat.number
    // Somebody else may have brought it up meanwhile: what was read is the same.
    if (failure !== undefined && !isHere) return false
    const error =
      failure === undefined ? this.#arrived(read, entry, units, into, to) : this.#notRead(seat, entry, failure)
    // What follows is done at once: whoever fetches the same page sees one state or the other.
    const { persistent, shared } = pool.attributes
    if (error !== undefined) {
      if (persistent) throw error
      // An ephemeral page may vanish at any time.
      this.dropPage(entry)
      pool.ended('corrupt_dropped')
      return false
    }
    if (!persistent && !shared && pool.parts === 1) {
      this.drop(entry)
      pool.ended('got')
    }
    return true
  }

  #notRead(seat: Seat, entry: number, failure: Error): TmemError {
    if (failure instanceof TmemError && failure.code === 'TMEM_CORRUPT') {
      seat.counters.corrupt++
      return this.#error('TMEM_CORRUPT', seat, entry, failure.message)
    }
    seat.counters.failedReads++
    return this.#error('TMEM_IO', seat, entry, 'cannot read the page', failure)
  }

  /** Makes the page of what was read, and lets it rise. Returns what is wrong with it. */
  #arrived(read: Read, entry: number, units: number, into: Uint8Array, to: number): TmemError | undefined {
    const { directory } = this
    const seat = read.seat!
    const pool = this.#poolOf(entry)
    const isHere = directory.placeOf(entry) === seat.number
    seat.counters.reads++
    if (seat.raw) {
      copy.call(read.bytes, into, to, 0, pool.blockBytes)
      if (isHere) this.#rise(read, entry, pool, seat, 0, 0, pool.blockBytes, 0, into, to)
      return undefined
    }
    const form = read.words[1]!
    const length = (form & 0xffff) + 1
    const codec = (form >>> 16) & 15
    const { workspace } = this.codec
    const checksum = read.words[0]! ^ sealOf(form, read.words[2]!)
    const fits = read.words[2] === this.#tagOf(entry) && this.#isFrame(seat, length, codec, units, pool)
    if (fits) copy.call(read.bytes, workspace, 0, frameBytes, frameBytes + length)
    if (
      !fits ||
      this.codec.checksum(codec, 0, length) !== checksum ||
      !this.decode(codec, length, into, to, pool.blockBytes)
    ) {
      seat.counters.corrupt++
      return this.#error('TMEM_CORRUPT', seat, entry, 'what came back is not what was written')
    }
    if (isHere) this.#rise(read, entry, pool, seat, codec, frameBytes, length, checksum, into, to)
    return undefined
  }

  #isFrame(seat: Seat, length: number, codec: number, units: number, pool: PoolKind): boolean {
    // A place may have rounded up.
    return seat.unitsFor(length) <= units && (codec !== 0 || length === pool.blockBytes)
  }

  /** Makes a page of the block at the start of the workspace. */
  decode(codec: number, length: number, into: Uint8Array, to: number, pageBytes: number): boolean {
    if (codec !== 0) return this.codec.decode(codec, 0, length, into, to, pageBytes)
    copy.call(this.codec.workspace, into, to, 0, pageBytes)
    return true
  }

  /**
   * Brings a block that was just read up into memory, if there is room for it without failing anybody. `page[pageAt]` is the page that it
   * was made of.
   */
  #rise(
    read: Read,
    entry: number,
    pool: PoolKind,
    seat: Seat,
    codec: number,
    at: number,
    length: number,
    checksum: number,
    page: Uint8Array,
    pageAt: number,
  ): void {
    const { persistent, shared } = pool.attributes
    if (!persistent && !shared) return
    const upper = this.seats.find(
      (one) => one.memory !== undefined && one.number < seat.number && one.keeps(persistent),
    )
    if (upper === undefined) return
    const { directory, block } = this
    this.prepare(pool.blockBytes)
    if (read.stale || directory.placeOf(entry) !== seat.number) return
    const queue = persistent ? upper.order.queueFor(entry) : EPHEMERAL
    block.pageBytes = pool.blockBytes
    block.persistent = persistent
    let sum = checksum
    if (upper.raw && codec !== 0) {
      block.bytes = page
      block.at = pageAt
      block.length = pool.blockBytes
      block.codec = 0
    } else {
      block.bytes = read.bytes
      block.at = at
      block.length = length
      block.codec = codec
      if (seat.raw && !upper.raw) {
        copy.call(read.bytes, this.codec.workspace, 0, 0, length)
        sum = this.codec.checksum(0, 0, length)
      }
    }
    const resident = this.allocate(upper, pool)
    if (resident < 0) {
      upper.refused[-resident]!++
      return
    }
    if (directory.isNowhere(entry)) {
      // It was what had to go for it.
      this.#cancel(upper, pool, resident)
      return
    }
    // It may have moved meanwhile.
    const location = directory.locationOf(entry)
    const units = directory.unitsOf(entry)
    const huge = directory.isHuge(entry)
    directory.leave(entry)
    this.enter(upper, entry, resident, queue, sum)
    if (huge && upper.raw) directory.flag(entry, TRIED, 0)
    upper.counters.rose++
    seat.counters.raised++
    if (seat.keepsCopies) directory.setCopy(resident, seat.number, location, units)
    else this.#freeSlow(seat, location, units)
  }

  /** Enters what an earlier run has left of a pool, with `enter` where directories share the places. */
  recover(pool: PoolKind, enter: EnterSlow = (...page) => this.enterSlow(pool, ...page)): void {
    for (const { number, slow } of this.seats)
      if (this.seats[number]!.keeps(pool.attributes.persistent))
        slow?.recover?.(pool.key, (...page) => enter(number, ...page))
  }

  /** Enters a block that is in a slow place: the number of its owner, or `none` when it has no room, or is known. */
  enterSlow(pool: PoolKind, place: number, object: ObjectId, index: number, location: number, units: number): number {
    const { directory } = this
    if (directory.find(pool.number, object, index) !== none) return none
    const entry = directory.enter(pool.number, object, index)
    if (entry === none) return none
    const seat = this.seats[place]!
    directory.setSlow(entry, place, location, units, false, seat.order.epochOf(false) - longAgo, false)
    seat.counters.recovered++
    return entry + this.#base
  }

  /** After `recover`: drops the pages of which parts are missing. Returns the pages of the pool. */
  dropIncomplete(pool: PoolKind): number {
    const { table } = this.directory
    let blocks = 0
    const incomplete: number[] = []
    for (let entry = table.firstOfPool(pool.number); entry !== none; entry = table.nextOfPool(entry)) {
      blocks++
      const index = table.indexOf(entry)
      const object = table.objectOf(entry)
      const first = index - (index % pool.parts)
      for (let part = first; part < first + pool.parts; part++)
        if (table.find(pool.number, object, part) === none) {
          incomplete.push(entry)
          break
        }
    }
    for (const entry of incomplete) this.drop(entry)
    return (blocks - incomplete.length) / pool.parts
  }

  /** An ephemeral page makes room for another one in its place. */
  #giveWay(seat: Seat, entry: number, location: number): boolean {
    if (!this.#knows(seat, entry, location) || this.#poolOf(entry).attributes.persistent) return false
    if (this.directory.placeOf(entry) === seat.number) this.#evict(entry)
    else this.#endCopy(this.directory.residentOf(entry))
    return true
  }

  /** Moves blocks of a memory place together; how many. */
  compact(seat: Seat, most: number): number {
    const moved = seat.memory?.compact?.(most, this.moved) ?? 0
    seat.counters.compacted += moved
    return moved
  }

  // ---- Cleaning ---------------------------------------------------------------------------------------------------

  #knows(seat: Seat, entry: number, location: number): boolean {
    const { directory } = this
    if (entry < 0 || entry >= directory.capacity) return false
    const place = directory.placeOf(entry)
    if (place === seat.number) return directory.locationOf(entry) === location
    if (place === samePlace || this.seats[place]?.memory === undefined) return false
    const resident = directory.residentOf(entry)
    return (
      resident < directory.residentWatermark &&
      directory.copyOf(resident) === location &&
      directory.copyPlaceOf(resident) === seat.number &&
      directory.entryOf(resident) === entry
    )
  }

  #unitsAt(seat: Seat, entry: number, location: number): number {
    if (!this.#knows(seat, entry, location)) return 0
    const { directory } = this
    return directory.placeOf(entry) === seat.number
      ? directory.unitsOf(entry)
      : directory.copyUnitsOf(directory.residentOf(entry))
  }

  /** Whether the page of an entry is in memory, as that resident. */
  isResident(entry: number, resident: number): boolean {
    const { directory } = this
    if (entry >= directory.capacity || directory.isNowhere(entry)) return false
    const place = directory.placeOf(entry)
    return this.seats[place]?.memory !== undefined && directory.residentOf(entry) === resident
  }

  #relocate(seat: Seat, entry: number, from: number, to: number, units: number): boolean {
    if (!this.#knows(seat, entry, from)) return false
    const { directory } = this
    this.#stale(seat, from)
    if (directory.placeOf(entry) === seat.number) directory.relocate(entry, to, units)
    else {
      const resident = directory.residentOf(entry)
      directory.dropCopy(resident)
      directory.setCopy(resident, seat.number, to, units)
    }
    return true
  }

  // ---- Ending -----------------------------------------------------------------------------------------------------

  /** Resolves when nothing is under way any more; what begins meanwhile is waited for, too. */
  async settle(): Promise<void> {
    for (const seat of this.seats)
      while (seat.isBusy) await Promise.all(seat.underWay.filter((flight) => flight !== undefined))
  }

  /** Nothing is read any more; who waits for a buffer is told. */
  async close(): Promise<void> {
    this.#closed = true
    for (const resolve of this.#waiting.splice(0)) resolve(undefined)
    await this.settle()
    // Reads that are under way need their buffer and their place.
    if (this.#freeReads.length < this.#reads.length)
      await new Promise<void>((resolve) => {
        this.#allReadsBack = resolve
      })
  }

  /** A checksum of a handle: what a frame has, so that nobody else's frame is taken for it. */
  #tagOf(entry: number): number {
    const { table } = this.directory
    return tagOf(this.#poolOf(entry).key, table.objectOf(entry), table.indexOf(entry))
  }

  /** Throws an `Error` that names a broken invariant, and adds what is known to be in each place. For tests. */
  check(contents: readonly PlaceContents[]): void {
    const { directory, seats } = this
    const { table } = directory
    directory.check((place, length) => seats[place]!.memory!.sizeOf(length))
    for (let pool = 0; pool < table.pools; pool++)
      for (let entry = table.firstOfPool(pool); entry !== none; entry = table.nextOfPool(entry)) {
        const place = directory.placeOf(entry)
        if (place === samePlace) continue
        if (seats[place]!.memory === undefined) {
          contents[place]!.blocks.push({ location: directory.locationOf(entry), units: directory.unitsOf(entry) })
          continue
        }
        const resident = directory.residentOf(entry)
        contents[place]!.owners.set(resident + this.#base, directory.blockOf(resident))
        if (directory.copyOf(resident) !== none)
          contents[directory.copyPlaceOf(resident)]!.blocks.push({
            location: directory.copyOf(resident),
            units: directory.copyUnitsOf(resident),
          })
        const flight = directory.flightOf(entry)
        if (flight !== 0 && !seats.some((seat) => seat.carries(flight, entry + this.#base)))
          throw new Error(`chain: entry ${entry} is on a flight that is not under way`)
      }
    for (const { number, counters, place, isBusy, flights } of seats) {
      contents[number]!.isBusy ||= isBusy
      const came = counters.put + counters.sunkIn + counters.sunkClean + counters.rose + counters.recovered
      const left = counters.passedDown + counters.droppedClean + counters.released + counters.raised + counters.gone
      if (came - left !== directory.pages[number])
        throw new Error(`chain: ${directory.pages[number]} blocks in ${place.name}, counted ${came} in, ${left} out`)
      if (!isBusy && flights.some(({ count }) => count > 0))
        throw new Error(`chain: a flight to ${place.name} was left behind`)
    }
  }

  #poolOf(entry: number): PoolKind {
    return this.#pools[this.directory.table.poolOf(entry)]!
  }

  /** An error about a page. */
  #error(code: 'TMEM_IO' | 'TMEM_CORRUPT', seat: Seat, entry: number, what: string, cause?: Error): TmemError {
    const { table } = this.directory
    const handle = `pool ${table.poolOf(entry)} object ${table.objectOf(entry)} index ${table.indexOf(entry)}`
    const why = cause === undefined ? '' : `: ${cause.message}`
    return new TmemError(code, `${seat.place.name}: ${what} (${handle})${why}`, {
      layer: seat.place.name,
      handle,
      cause,
    })
  }
}

/** What the directories of a stack know to be in a place. */
export class PlaceContents {
  /** In a memory place: where the block of each owner is. */
  readonly owners: Map<number, number> = new Map()
  /** In a slow place. */
  readonly blocks: { location: number; units: number }[] = []
  /** More may be there: a flight is under way. */
  isBusy = false
}

/** Throws an `Error` unless each place has exactly what the directories know to be there. */
export function checkPlaces(places: readonly Place[], contents: readonly PlaceContents[]): void {
  for (const [number, place] of places.entries()) {
    const { owners, blocks, isBusy } = contents[number]!
    const locations = new Set(isSlow(place) ? blocks.map(({ location }) => location) : owners.values())
    if (locations.size !== blocks.length + owners.size)
      throw new Error(`chain: two blocks in ${place.name} have one location`)
    if (!isSlow(place)) place.check?.((owner, location) => owners.get(owner) === location)
    else if (!isBusy) place.check?.(blocks)
  }
}

/** Ties the header of a frame together. */
const sealOf = (form: number, tag: number): number =>
  Math.imul(form ^ 0x5bd1e995, 0x9e3779b1) ^ Math.imul(tag, 0x85ebca6b)

/** The runtime's own copy with offsets, which makes no view. */
const copy: (this: Uint8Array, target: Uint8Array, to: number, from: number, end: number) => number =
  Buffer.prototype.copy
