/**
 * A place in its stack: what the chain knows of it, counts of it, and keeps ready for it.
 *
 * A slow place has its flights, with memory taken when the stack is made: what is written to it is gathered there.
 * A place that failed, or that had no room, is spared for a while; how long is a matter of the seat alone.
 */
import type { Directory } from './directory.ts'
import { none } from './handles.ts'
import { Order, type SinkClock } from './order.ts'
import { putOutcomeCount, TmemError } from './outcomes.ts'
import { Flight, isSlow, type MemoryPlace, maxBlockBytes, type Place, type SlowPlace, unitsOf } from './place.ts'
import type { Account, Allocator, ObjectId, PoolAttributes } from './store.ts'

/**
 * Flights of one slow place: puts that go straight there, what must sink for a put, and what sinks in the background.
 */
export const STRAIGHT = 0
export const FORCED = 1
export const flightsOfSeat = 4
/** Numbers in the directory that they need: what goes straight is not in memory. */
const numbersOfSeat = flightsOfSeat - FORCED
/** Most attempts that a place which failed is left alone for. */
const maxRest = 1024
/** Frames that a full place is spared before it is asked again. */
const maxSpared = 64

/** An open place, and whether its memory is somebody else's in this stack. */
export interface OpenPlace {
  readonly place: Place
  readonly foreign: boolean
}

/** What a stack needs to know of a pool where blocks move. */
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
 * Why pages moved, and where to; counted for each place. Blocks in it = put + sunkIn + sunkClean + rose + recovered -
 * passedDown - droppedClean - released - raised - gone.
 */
export interface SeatCounters {
  /**
   * Blocks put here from above (those of them that do not shrink), sunk to here (with a write, and without), risen to
   * here, found here.
   */
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
  /** Blocks that were written ahead: they stayed above, and their copies are here. */
  cleaned: number
}

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
  /**
   * By flight and frame: the page stays in memory, and this is its clean copy. By flight: bytes of those that leave.
   */
  readonly stays: Uint8Array[] = []
  readonly leaving: number[] = []
  /** Number in the directory of the first flight that has one. */
  readonly #firstNumber: number
  /** By flight: it is under way; how many of its pages have left memory when it is over. */
  readonly underWay: (Promise<number> | undefined)[] = []
  /** Where the search for clean copies to give up goes on. */
  copyHand = 0
  /**
   * Resident where the search for pages to write ahead goes on, how far it goes, and how many have been paid for: see
   * `Sinking.cleanAhead`.
   */
  cleanHand: number = none
  cleanLeft = 0
  savedWrites = 0
  /**
   * Units of the smallest frame that had no room here, units that were given up since, and frames that were not offered
   * for that.
   */
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
    cleaned: 0,
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
      const flight = new Flight(memory, bytes, place.unitBytes)
      this.flights.push(flight)
      this.stays.push(new Uint8Array(flight.owners.length))
      this.leaving.push(0)
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
   * Whether a frame is worth offering. A place that is full would look for room each time, and write what it then
   * refuses: so it is asked for as much as was given up there since, or for less than it refused, or again when it was
   * spared for a while.
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
