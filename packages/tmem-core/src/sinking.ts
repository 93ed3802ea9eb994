/**
 * How blocks get room in memory, and what goes down for it: the coldest pages first, many in one write, and no put
 * waits for more than one.
 *
 * Nothing is compressed here but what lies uncompressed in a memory place and goes to one that compresses.
 */
import {
  codecIn,
  type Directory,
  EPHEMERAL,
  isFlying,
  lengthIn,
  MAIN,
  PROBATION,
  placeIn,
  REFERENCED,
  samePlace,
  TRIED,
} from './directory.ts'
import type { Flights } from './flights.ts'
import { none } from './handles.ts'
import { moved } from './history.ts'
import type { Ledger } from './ledger.ts'
import { PutOutcome } from './outcomes.ts'
import type { Block, MemoryPlace } from './place.ts'
import { copyBytes } from './runtime.ts'
import type { PoolKind, Seat } from './seat.ts'
import type { LayerContext, Sunk } from './store.ts'
import { basePageSize } from './store.ts'

/** Bytes that go down at once when a put finds no room: one write. */
const forcedBytes = 128 * 1024
/** How often a put tries to find room, and the bytes of ephemeral pages that go first. */
const squeezes = 12
const ephemeralBytes = 16 * 1024
/** Bytes of pages that go down to memory at once: what the places there are prepared for. */
const passedBytes = 256 * 1024
/** Pages that one call lets sink at most, clean ones included. */
const maxVictims = 512
/** Share of the main queue, from its oldest page on, that is written ahead. */
const cleanShare = 0.75
/** Pages that one call looks at for those to write ahead. */
const maxLooks = 1024
/** Pages that one call looks at for one of a client. */
const maxSearched = 4096

export class Sinking {
  readonly seats: readonly Seat[]
  readonly directory: Directory
  readonly #ledger: Ledger
  readonly #flights: Flights
  /** Writes block in their thread: nothing is written that need not be. */
  readonly #waits: boolean
  #closed = false
  /** Blocks that memory below is prepared to take. */
  #passes = 0
  /** Location of the block that `allocate` took last. */
  #location = none

  constructor(ledger: Ledger, flights: Flights, { io }: LayerContext) {
    this.seats = ledger.seats
    this.directory = ledger.directory
    this.#ledger = ledger
    this.#flights = flights
    this.#waits = io === 'blocking'
  }

  /**
   * Lets the memory places get memory, before anything is half done: the first for a block, those below for what makes
   * room for it.
   */
  prepare(blockBytes: number): void {
    this.#prepare(0, blockBytes)
  }

  #prepare(first: number, blockBytes: number): void {
    for (let number = first; number < this.seats.length; number++)
      this.seats[number]!.memory?.prepare?.(number === 0 ? blockBytes : passedBytes)
    this.#passes = passedBytes / blockBytes
  }

  /**
   * Gives `block` a place in a memory place: the number of its resident, which no entry knows yet, or (negative) why
   * not. Colder pages may go down for it: at most one write.
   */
  allocate(seat: Seat, pool: PoolKind): number {
    const { directory } = this
    const { block } = this.#ledger
    const charge = this.#ledger.chargeOf(seat, block.length)
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
    const { directory } = this
    const { block } = this.#ledger
    directory.setResident(entry, seat.number, resident, block.length, block.codec)
    directory.setBlock(resident, entry, this.#location, checksum)
    const bytes = seat.memory!.sizeOf(block.length)
    directory.append(seat.number, queue, resident, entry, bytes)
  }

  /** Gives up what `allocate` has given. */
  cancel(seat: Seat, pool: PoolKind, resident: number): void {
    const { length } = this.#ledger.block
    seat.memory!.free(this.#location, length, pool.blockBytes)
    this.directory.releaseResident(resident)
    pool.account?.release(this.#ledger.chargeOf(seat, length))
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
    return this.#ledger.charge(seat) ? seat.memory!.put(block, resident + this.#ledger.base) : -PutOutcome.NoMemory
  }

  /** Finds room for a block in a place that is full. */
  #squeeze(seat: Seat, block: Block, resident: number): number {
    const memory = seat.memory!
    let location: number = -PutOutcome.NoMemory
    for (let attempt = 0; attempt < squeezes && location === -PutOutcome.NoMemory; attempt++) {
      // For a few bytes of metadata a chunk has to become empty: before pages go for that, those that are there move
      // together.
      const isBetter = this.#ledger.charge(seat)
        ? memory.fit?.(block.length, this.#ledger.moved) === true
        : this.compact(seat, maxVictims) > 0
      if (!isBetter && !this.#makeRoom(seat, attempt)) break
      location = this.#offer(seat, block, resident)
    }
    return location
  }

  /**
   * Gives up some of a memory place, ephemeral pages first, and more of them with each attempt: what goes is of other
   * sizes than what comes, so that a few need not leave a place. False when nothing can go.
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

  /**
   * Drops the ephemeral page in memory that came first, of all or of that client: the bytes that its block had. 0:
   * there is none, or none of that client among the first.
   */
  dropOne(client?: number): number {
    const { directory, seats } = this
    let left = maxSearched
    // What came first has sunk furthest.
    for (let number = seats.length - 1; number >= 0; number--) {
      let resident = directory.oldest(number, EPHEMERAL)
      for (; resident !== none && left > 0; resident = directory.newer(resident), left--) {
        const entry = directory.entryOf(resident)
        if (client !== undefined && this.#ledger.poolOf(entry).attributes.client !== client) continue
        const bytes = lengthIn(directory.stateOf(entry))
        this.#ledger.evict(entry)
        return bytes
      }
    }
    return 0
  }

  /**
   * Bytes that should go down: what is above the high mark of a memory place and not on its way, and, where that costs
   * a write, a flight more, so that writes are large and few. 0: nothing.
   */
  excess(seat: Seat): number {
    const above = seat.memory!.excess()
    if (above <= 0) return 0
    let flying = 0
    let batch = 0
    for (const { slow, leaving, underWay } of this.seats) {
      if (slow === undefined) continue
      batch = this.#forcedBytes(seat.memory!) / 2
      for (const [number, bytes] of leaving.entries()) if (underWay[number] !== undefined) flying += bytes
    }
    return above > flying ? above - flying + batch : 0
  }

  /**
   * Lets so many bytes and pages of a memory place go down at most. Called when nothing is half done: memory below gets
   * memory for what comes, some blocks at a time. Returns the pages.
   */
  relieve(seat: Seat, bytes: number, most: number): number {
    const resting = (): number =>
      [MAIN, PROBATION, EPHEMERAL].reduce((sum, queue) => sum + this.directory.bytesOf(seat.number, queue), 0)
    const least = resting() - bytes
    let pages = 0
    for (;;) {
      this.#prepare(seat.number + 1, Math.max(basePageSize, this.#ledger.page.length))
      const busy = pages
      pages += this.sinkEphemeral(seat, resting() - least, false, most - pages)
      if (pages < most && this.directory.queued(seat.number, EPHEMERAL) === 0)
        pages += this.sink(seat, resting() - least, false, most - pages)
      // More goes at once only where memory took all that it was prepared for.
      if (pages === busy || pages === most || this.#passes > 0 || resting() <= least) return pages
    }
  }

  /**
   * Lets the coldest persistent pages of a memory place go down until `bytes` are free or on their way. `now`: before
   * it returns, in one write at most. Returns the pages that go, clean ones included.
   */
  sink(seat: Seat, bytes: number, now: boolean, most: number = maxVictims): number {
    const { directory } = this
    const sizeOf = this.#ledger.sizes[seat.number]!
    let target: Seat | undefined
    let flight = none
    let pages = 0
    let freed = 0
    for (let left = Math.min(most, maxVictims); left > 0 && freed < bytes; left--) {
      const resident = seat.order.next(sizeOf)
      if (resident === none) break
      const entry = directory.entryOf(resident)
      const size = sizeOf(entry)
      if (this.#ledger.isClean(seat, resident)) {
        this.#ledger.dropClean(seat, entry, resident)
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
        this.#ledger.dropClean(seat, entry, resident)
        pages++
        freed += size
        continue
      }
      if (flight === none) {
        flight = this.#flights.open(target, now)
        if (flight === none) break
      }
      const boarded = this.#flights.board(seat, target, flight, entry, resident)
      if (boarded === undefined) continue
      if (!boarded) break
      pages++
      freed += size
    }
    if (flight === none || target!.flights[flight]!.count === 0) return pages
    const frames = target!.flights[flight]!.count
    // What could not be written is where it was.
    return pages - frames + this.#flights.launch(target!, flight, now)
  }

  /**
   * The same for ephemeral pages, in the order in which they came; what no place below takes is dropped. Whoever needs
   * room `now` and has to write for it writes many at once.
   */
  sinkEphemeral(seat: Seat, bytes: number, now: boolean, most: number = maxVictims): number {
    const { directory } = this
    const queued = directory.queued(seat.number, EPHEMERAL)
    if (queued === 0) return 0
    const sizeOf = this.#ledger.sizes[seat.number]!
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
        this.#ledger.requeue(seat, entry, resident, EPHEMERAL)
        continue
      }
      const size = sizeOf(entry)
      const hasCopy = directory.copyOf(resident) !== none
      if (target?.slow !== undefined && flight === none && !hasCopy) {
        flight = this.#flights.open(target, now)
        if (flight === none) {
          // All of its flights are under way. Only who cannot wait drops what is cold.
          if (!now) break
          target = undefined
        }
      }
      let goes: boolean | undefined = false
      if (target?.memory !== undefined && !this.#ledger.isClean(seat, resident)) {
        if (this.#passes === 0) break
        this.#passes--
        goes = this.#passDown(seat, target, entry, resident)
      } else if (target?.slow !== undefined && !hasCopy) {
        goes = this.#flights.board(seat, target, flight, entry, resident)
        // The flight is full; or, when it is empty, the place is.
        if (goes === false && target.flights[flight]!.count > 0) break
      }
      pages++
      freed += size
      // What is damaged has been dropped already.
      if (goes !== false) continue
      // Asked anew: the copy may have been what had to go for another page.
      if (directory.copyOf(resident) !== none) this.#ledger.dropClean(seat, entry, resident)
      else this.#ledger.evict(entry)
    }
    if (flight === none) return pages
    const { count, owners } = target!.flights[flight]!
    if (count > 0) this.#flights.launch(target!, flight, now)
    if (now)
      // What that place did not take has to go all the same.
      for (let n = 0; n < count; n++) {
        const entry = owners[n]! - this.#ledger.base
        if (!directory.isNowhere(entry) && directory.placeOf(entry) === seat.number) this.#ledger.evict(entry)
      }
    return pages
  }

  /**
   * Writes pages ahead while the place below has nothing else to do: they stay, and go for nothing when their turn
   * comes. Each page that went for nothing pays for one, each copy that was written or read in vain costs one: so a
   * stack that is only read comes to an end of writing, and one that is mostly written to never begins. Returns the
   * pages.
   */
  cleanAhead(seat: Seat, most: number): number {
    const { directory } = this
    const pages = Math.min(most, seat.savedWrites)
    if (pages <= 0 || this.#waits) return 0
    const target = this.#below(seat, true, false)
    if (target?.slow === undefined || !target.keepsCopies || target.isBusy) return 0
    const flight = this.#flights.open(target, false)
    let done = 0
    let resident = seat.cleanHand
    for (let left = maxLooks; left > 0 && done < pages; left--) {
      // The youngest may well be put anew before they are cold.
      if (seat.cleanLeft-- <= 0 || !this.#isMain(seat, resident)) {
        seat.cleanLeft = Math.ceil(directory.queued(seat.number, MAIN) * cleanShare)
        resident = directory.oldest(seat.number, MAIN)
        if (resident === none) break
      }
      const entry = directory.entryOf(resident)
      const next = directory.newer(resident)
      if (directory.copyOf(resident) === none && !isFlying(directory.stateOf(entry))) {
        const boarded = this.#flights.board(seat, target, flight, entry, resident, true)
        if (boarded === false) break
        // A damaged one has stayed.
        if (boarded) done++
      }
      resident = next
    }
    seat.cleanHand = resident
    seat.savedWrites -= done
    return done === 0 ? 0 : this.#flights.launch(target, flight, false)
  }

  /** Whether a resident, which may have been given up since, is in the main queue of a place. */
  #isMain(seat: Seat, resident: number): boolean {
    const { directory } = this
    if (resident === none) return false
    const entry = directory.entryOf(resident)
    if (!this.#ledger.isResident(entry, resident)) return false
    return directory.placeOf(entry) === seat.number && directory.queueOf(entry) === MAIN
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

  /**
   * Moves a block between memory places. `undefined`: it is damaged and stays, or is gone; false: the place below does
   * not take it.
   */
  #passDown(seat: Seat, target: Seat, entry: number, resident: number): boolean | undefined {
    const { directory } = this
    const pool = this.#ledger.poolOf(entry)
    const state = directory.stateOf(entry)
    const memory = target.memory!
    const moving = this.#ledger.moving
    const before = this.#ledger.chargeOf(seat, lengthIn(state))
    let checksum: number | undefined
    let location: number
    for (let isFirst = true; ; isFirst = false) {
      // Anew each time: what makes room moves through the same memory, and a codec need not make the same block twice.
      checksum = this.#ledger.fetchBlock(seat, entry, resident, target)
      if (checksum === undefined) {
        this.#ledger.keepDamaged(seat, entry, resident)
        return undefined
      }
      const more = this.#ledger.chargeOf(target, moving.length) - before
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
    const huge = this.#ledger.isHuge(seat, entry)
    directory.unlink(seat.number, resident, entry, seat.memory!.sizeOf(lengthIn(state)))
    seat.memory!.free(directory.blockOf(resident), lengthIn(state), pool.blockBytes)
    directory.leave(entry)
    directory.setResident(entry, target.number, resident, moving.length, moving.codec)
    if (target.raw && huge) directory.flag(entry, TRIED, 0)
    directory.setBlock(resident, entry, location, checksum)
    directory.append(target.number, queue, resident, entry, memory.sizeOf(moving.length))
    seat.counters.passedDown++
    target.counters.sunkIn++
    this.#ledger.history?.note(moved.sunk, entry, seat.number, target.number)
    return true
  }

  /**
   * Moves pages down: see `Pool.sink`. `find` answers the entry of page n when it is its turn (`none`: pass over),
   * because pages come and go while flights are under way. One flight is filled while another one is on its way.
   */
  async sinkPages(pool: PoolKind, find: (n: number) => number, count: number, slow: boolean): Promise<Sunk> {
    let pages = 0
    const sent: Promise<void>[] = []
    let failure: Error | undefined
    for (let n = 0; n < count && !this.#closed && failure === undefined; ) {
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
        if (!slow && !this.#ledger.isClean(seat, resident) && this.#passToMemory(seat, entry, resident)) {
          pages++
          continue
        }
        // It was damaged, or had to make room.
        if (this.directory.isNowhere(entry)) continue
        if (this.directory.copyOf(resident) !== none) {
          this.#ledger.dropClean(seat, entry, resident)
          pages++
          continue
        }
        const below = this.#slowBelow(seat, pool.attributes.persistent)
        if (below === undefined) continue
        if (flight === none) {
          target = below
          target.askAgain()
          flight = this.#flights.open(target, false)
          if (flight === none) break
        } else if (below !== target) break
        // Only a use while it is on its way keeps it here.
        this.directory.flag(entry, 0, REFERENCED)
        if (this.#flights.board(seat, below, flight, entry, resident) === false) break
      }
      if (target === undefined) continue
      if (flight === none) await Promise.race(target.underWay.filter((one) => one !== undefined))
      else if (target.flights[flight]!.count > 0) {
        const seat = target
        const gone = this.#flights.launch(seat, flight, false)
        const ended = (left: number): void => {
          pages += left
          failure ??= seat.failure
        }
        const underWay = seat.underWay[flight]
        if (underWay === undefined) ended(gone)
        else sent.push(underWay.then(ended))
      }
    }
    await Promise.all(sent)
    return { pages, failure }
  }

  /** Passes a page down to the next memory place that takes it, if one does. */
  #passToMemory(seat: Seat, entry: number, resident: number): boolean {
    const { persistent } = this.#ledger.poolOf(entry).attributes
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
   * Compresses the page of an entry again, with the stronger codec of its place. 1: it takes less now; 0: nothing was
   * gained; -1: it was not tried, as nothing could be gained, or it has no room now.
   */
  recompress(entry: number): number {
    const { directory } = this
    const { codec } = this.#ledger
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
    const pool = this.#ledger.poolOf(entry)
    const moving = this.#ledger.moving
    // Damage is for a get to report.
    if (this.#ledger.fetchBlock(seat, entry, resident, seat) === undefined) return -1
    if (moving.codec === 0) copyBytes.call(moving.bytes, this.#ledger.page, 0, moving.at, moving.at + length)
    else if (!codec.decode(moving.codec, moving.at, length, this.#ledger.page, 0, pool.blockBytes)) return -1
    const packed = stronger.encode(this.#ledger.page, 0, pool.blockBytes, 0, length - 1)
    const before = memory.sizeOf(length)
    const saved = packed === 0 ? 0 : before - memory.sizeOf(packed)
    if (saved > 0) {
      moving.bytes = stronger.workspace
      moving.at = 0
      moving.length = packed
      moving.codec = stronger.id
      const location = memory.put(moving, resident + this.#ledger.base)
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

  /** Moves blocks of a memory place together; how many. */
  compact(seat: Seat, most: number): number {
    const moved = seat.memory?.compact?.(most, this.#ledger.moved) ?? 0
    seat.counters.compacted += moved
    return moved
  }

  /** Nothing more goes down. */
  close(): void {
    this.#closed = true
  }
}
