/**
 * What happens between the places of a stack: the parts that give blocks a place, let them sink and let them rise, and
 * what places may ask of them.
 *
 * Each move has the same three steps: the new place has the block; the directory says so; the old place gives it up.
 */
import { type Directory, samePlace } from './directory.ts'
import { Flights } from './flights.ts'
import { none } from './handles.ts'
import { moved, nowhere } from './history.ts'
import { Ledger, type LedgerOptions } from './ledger.ts'
import { TmemError } from './outcomes.ts'
import { isSlow, type Owners, type Place, type RecoverBlock } from './place.ts'
import { Rising } from './rising.ts'
import { type PoolKind, type Seat, STRAIGHT } from './seat.ts'
import { Sinking } from './sinking.ts'
import type { ObjectId } from './store.ts'

/** Epochs after which a page that sank counts as new. */
export const longAgo = 128

/** As `RecoverBlock`, for a page in a place of that number. */
export type EnterSlow = (place: number, ...page: Parameters<RecoverBlock>) => number

export class Mover {
  readonly seats: readonly Seat[]
  readonly directory: Directory
  readonly ledger: Ledger
  readonly flights: Flights
  readonly sinking: Sinking
  readonly rising: Rising

  /** Throws `TmemError` (`TMEM_NO_MEMORY`). */
  constructor(options: LedgerOptions) {
    const { directory, context, share } = options
    this.directory = directory
    this.ledger = new Ledger(options)
    this.seats = this.ledger.seats
    this.flights = new Flights(this.ledger, context)
    this.sinking = new Sinking(this.ledger, this.flights, context)
    this.rising = new Rising(this.ledger, this.sinking, context)
    if (share === undefined) for (const seat of this.seats) seat.slow?.attach?.(this.ownersOf(seat.number))
  }

  /** What a place may ask about its frames here. */
  ownersOf(number: number): Owners {
    const { directory } = this
    const seat = this.seats[number]!
    return {
      unitsAt: (owner, location) => this.#unitsAt(seat, owner - this.ledger.base, location),
      moved: (owner, from, to, units) => this.#relocate(seat, owner - this.ledger.base, from, to, units),
      drop: (owner, location) => this.#giveWay(seat, owner - this.ledger.base, location),
      recall: (owner, location, where) => this.#recall(seat, owner - this.ledger.base, location, where === 'room'),
      poolOf: (owner) => this.ledger.poolOf(owner - this.ledger.base).key,
      isPersistent: (owner) => this.ledger.poolOf(owner - this.ledger.base).attributes.persistent,
      objectOf: (owner) => directory.table.objectOf(owner - this.ledger.base),
      indexOf: (owner) => directory.table.indexOf(owner - this.ledger.base),
      isCurrent: (flight, frame) => {
        const number = seat.flights.indexOf(flight)
        // What goes straight there is nowhere else, and cannot change meanwhile.
        return (
          number === STRAIGHT ||
          this.flights.onFlight(this.ledger.entryIn(flight, frame), seat.numberOf(number)) !== undefined
        )
      },
      landed: (flight) => this.flights.landed(seat, seat.flights.indexOf(flight)),
    }
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
    this.ledger.history?.note(moved.recovered, entry, nowhere, place)
    return entry + this.ledger.base
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
    for (const entry of incomplete) this.ledger.drop(entry)
    return (blocks - incomplete.length) / pool.parts
  }

  /** An ephemeral page makes room for another one in its place. */
  #giveWay(seat: Seat, entry: number, location: number): boolean {
    if (!this.#knows(seat, entry, location) || this.ledger.poolOf(entry).attributes.persistent) return false
    if (this.directory.placeOf(entry) === seat.number) this.ledger.evict(entry)
    else this.ledger.endCopy(this.directory.residentOf(entry))
    return true
  }

  /** A page comes up, because its place wants to be rid of the frame. */
  async #recall(seat: Seat, entry: number, location: number, onlyIntoRoom: boolean): Promise<boolean> {
    const { directory } = this
    for (let wasRead = false; ; wasRead = true) {
      if (!this.#knows(seat, entry, location)) return true
      if (directory.placeOf(entry) !== seat.number) {
        this.ledger.endCopy(directory.residentOf(entry))
        return true
      }
      const pool = this.ledger.poolOf(entry)
      const { persistent, shared } = pool.attributes
      if (wasRead || (!persistent && !shared) || (onlyIntoRoom && !this.#hasRoomAbove(seat, persistent))) return false
      const units = directory.unitsOf(entry)
      const read = await this.rising.reads.wait(seat, units * seat.slow!.unitBytes)
      if (read === undefined) return false
      try {
        // It may have gone, and another one have come, while this waited.
        if (!this.#knows(seat, entry, location) || directory.placeOf(entry) !== seat.number) continue
        if (directory.unitsOf(entry) !== units || this.ledger.poolOf(entry) !== pool) continue
        await this.rising.read(read, entry, new Uint8Array(pool.blockBytes), 0)
      } catch (error) {
        // Whoever asks for the page is told.
        if (!(error instanceof TmemError)) throw error
        return false
      } finally {
        this.rising.reads.giveBack(read)
      }
    }
  }

  /** Whether the memory that a page would come up into is less than half full. */
  #hasRoomAbove(seat: Seat, persistent: boolean): boolean {
    const memory = this.seats.find(
      (one) => one.memory !== undefined && one.number < seat.number && one.keeps(persistent),
    )?.memory
    return memory !== undefined && memory.usedBytes < memory.limitBytes / 2
  }

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

  #relocate(seat: Seat, entry: number, from: number, to: number, units: number): boolean {
    if (!this.#knows(seat, entry, from)) return false
    const { directory } = this
    this.ledger.stale(seat, from)
    if (directory.placeOf(entry) === seat.number) directory.relocate(entry, to, units)
    else {
      const resident = directory.residentOf(entry)
      directory.dropCopy(resident)
      directory.setCopy(resident, seat.number, to, units)
    }
    return true
  }

  /** Resolves when nothing is under way any more; what begins meanwhile is waited for, too. */
  async settle(): Promise<void> {
    for (const seat of this.seats)
      while (seat.isBusy) await Promise.all(seat.underWay.filter((flight) => flight !== undefined))
  }

  /** Ends what is under way; who waits for a read is told. */
  async close(): Promise<void> {
    this.sinking.close()
    this.rising.close()
    await this.settle()
    await this.rising.reads.settle()
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
        contents[place]!.owners.set(resident + this.ledger.base, directory.blockOf(resident))
        if (directory.copyOf(resident) !== none)
          contents[directory.copyPlaceOf(resident)]!.blocks.push({
            location: directory.copyOf(resident),
            units: directory.copyUnitsOf(resident),
          })
        const flight = directory.flightOf(entry)
        if (flight !== 0 && !seats.some((seat) => seat.carries(flight, entry + this.ledger.base)))
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
