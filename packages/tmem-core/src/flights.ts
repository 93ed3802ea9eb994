/**
 * Flights: many blocks that go down to a slow place in one write.
 *
 * A page counts as moved when its new place has acknowledged it; until then the old place answers for it. What happens
 * to a page meanwhile (a flush, another put, a read) is seen by looking at its entry again: an entry on a flight has
 * the number of the flight, and whatever changes the page takes the number away.
 */
import { type Directory, EPHEMERAL, lengthIn, REFERENCED, samePlace } from './directory.ts'
import { sealOf } from './frame.ts'
import { none } from './handles.ts'
import { moved } from './history.ts'
import type { Ledger } from './ledger.ts'
import { PutOutcome } from './outcomes.ts'
import { type Block, type Flight, frameBytes, maxRoundingBytes } from './place.ts'
import { copyBytes } from './runtime.ts'
import { FORCED, flightsOfSeat, type Seat, STRAIGHT } from './seat.ts'
import type { LayerContext } from './store.ts'

export class Flights {
  readonly seats: readonly Seat[]
  readonly directory: Directory
  /** Called when a flight has landed: there may be room for the next one. */
  onLanded: () => void = () => undefined
  readonly #ledger: Ledger
  readonly #context: LayerContext

  constructor(ledger: Ledger, context: LayerContext) {
    this.seats = ledger.seats
    this.directory = ledger.directory
    this.#ledger = ledger
    this.#context = context
  }

  /** A flight that can be filled, or `none`. */
  open(target: Seat, now: boolean): number {
    for (let n = now ? FORCED : FORCED + 1; n < (now ? FORCED + 1 : flightsOfSeat); n++) {
      if (target.underWay[n] !== undefined) continue
      target.flights[n]!.clear()
      target.leaving[n] = 0
      return n
    }
    return none
  }

  /**
   * Adds a block to a flight. `undefined`: it is damaged and stays; false: the flight is full, or the place. `stays`:
   * only a copy goes down.
   */
  board(
    seat: Seat,
    target: Seat,
    number: number,
    entry: number,
    resident: number,
    stays: boolean = false,
  ): boolean | undefined {
    const { directory } = this
    const flight = target.flights[number]!
    const length = target.raw ? this.#ledger.poolOf(entry).blockBytes : lengthIn(directory.stateOf(entry))
    if (!this.#hasRoom(target, flight, length) || !this.mayTake(target, target.unitsFor(length))) return false
    const checksum = this.#ledger.fetchBlock(seat, entry, resident, target)
    if (checksum === undefined) {
      this.#ledger.keepDamaged(seat, entry, resident)
      return undefined
    }
    const { filled } = flight
    target.stays[number]![flight.count] = Number(stays)
    this.#frame(target, flight, this.#ledger.moving, entry, checksum)
    if (!stays) target.leaving[number]! += flight.filled - filled
    directory.setFlight(entry, target.numberOf(number))
    if (!stays) this.#ledger.requeue(seat, entry, resident, directory.queueOf(entry))
    return true
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
    copyBytes.call(block.bytes, bytes, from, block.at, block.at + block.length)
    const end = at + units * flight.unitBytes
    // What is left of the unit held another flight's bytes.
    bytes.fill(0, from + block.length, end)
    if (!target.raw) {
      const word = at >>> 2
      const form = (block.length - 1) | (block.codec << 16)
      const tag = this.#ledger.tagOf(entry)
      words[word] = checksum ^ sealOf(form, tag)
      words[word + 1] = form
      words[word + 2] = tag
      words[word + 3] = entry + this.#ledger.base
    }
    flight.offsets[count] = at
    flight.units[count] = units
    flight.owners[count] = entry + this.#ledger.base
    flight.locations[count] = none
    flight.count = count + 1
    flight.filled = end
  }

  /** Sends a flight off. Returns the pages that have left, or are on their way. */
  launch(target: Seat, number: number, now: boolean): number {
    const flight = target.flights[number]!
    const slow = target.slow!
    clearEnd(flight)
    target.counters.flights++
    if (now) target.counters.forcedFlights++
    if (now || (this.#context.io === 'blocking' && slow.writeNow !== undefined)) {
      try {
        slow.writeNow!(flight)
      } catch (error) {
        this.#crashed(target, number, error)
        return 0
      }
      return this.landed(target, number)
    }
    target.underWay[number] = slow.write(flight).then(
      () => {
        target.underWay[number] = undefined
        const left = this.landed(target, number)
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

  /** A flight is safe: its pages change places, those that are still what was sent. How many do, or were to stay. */
  landed(target: Seat, number: number): number {
    let left = 0
    let refused = 0
    const { directory } = this
    const flight = target.flights[number]!
    const id = target.numberOf(number)
    target.worked()
    target.counters.frames += flight.count
    target.counters.frameBytes += flight.filled
    for (let n = 0; n < flight.count; n++) {
      const entry = this.#ledger.entryIn(flight, n)
      const location = flight.locations[n]!
      const seat = this.onFlight(entry, id)
      if (seat === undefined) {
        if (location !== none) this.#ledger.freeSlow(target, location, flight.units[n]!)
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
      const stays = target.stays[number]![n] === 1
      if (stays || ((directory.stateOf(entry) & REFERENCED) !== 0 && directory.queueOf(entry) !== EPHEMERAL)) {
        if (target.keepsCopies) {
          directory.setCopy(resident, target.number, location, flight.units[n]!)
          this.#ledger.history?.note(moved.copied, entry, seat.number, target.number)
        } else this.#ledger.freeSlow(target, location, flight.units[n]!)
        if (stays) {
          target.counters.cleaned++
          left++
        } else target.counters.usedInFlight++
        continue
      }
      const isEphemeral = directory.queueOf(entry) === EPHEMERAL
      this.#ledger.leaveMemory(seat, entry, resident, target.number, location, flight.units[n]!)
      if (!isEphemeral) seat.order.sank(directory.isMainGhost(entry))
      seat.counters.passedDown++
      target.counters.sunkIn++
      this.#ledger.history?.note(moved.sunk, entry, seat.number, target.number)
      left++
    }
    flight.clear()
    this.#ledger.giveUpCopies(target, refused)
    return left
  }

  /** Nothing of a flight is kept below: its pages are where they were. */
  #crashed(target: Seat, number: number, error: unknown): void {
    if (!(error instanceof Error)) throw error
    const flight = target.flights[number]!
    target.counters.failedFlights++
    target.failed(error)
    for (let n = 0; n < flight.count; n++) {
      const entry = this.#ledger.entryIn(flight, n)
      if (this.onFlight(entry, target.numberOf(number)) !== undefined) this.directory.setFlight(entry, 0)
    }
    flight.clear()
  }

  /** The memory place of an entry that is on that flight still. */
  onFlight(entry: number, id: number): Seat | undefined {
    const place = this.directory.placeOf(entry)
    if (place === samePlace) return undefined
    const seat = this.seats[place]!
    return seat.memory !== undefined && this.directory.flightOf(entry) === id ? seat : undefined
  }

  /**
   * Whether a frame is worth offering to a slow place: a full one makes room as long as there are clean copies to give
   * up.
   */
  mayTake(seat: Seat, units: number): boolean {
    return this.directory.copies > 0 || seat.mayTake(units)
  }

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
    if (!this.#hasRoom(seat, flight, this.#ledger.block.length)) return false
    this.#frame(seat, flight, this.#ledger.block, entry, checksum)
    return true
  }

  /** Writes what was staged. Answers the error; the locations are in the flight, which the caller clears. */
  writeStaged(seat: Seat): Error | undefined {
    const flight = seat.flights[STRAIGHT]!
    clearEnd(flight)
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
    this.#ledger.giveUpCopies(seat, refused)
    return undefined
  }
}

/** What a place that writes whole blocks writes behind the last frame is nobody's: no frame of an earlier flight. */
function clearEnd({ bytes, filled }: Flight): void {
  bytes.fill(0, filled, Math.ceil(filled / maxRoundingBytes) * maxRoundingBytes)
}
