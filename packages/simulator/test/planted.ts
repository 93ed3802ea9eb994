/**
 * Bugs that a stack could have, planted into the shipped modules from outside: each changes a method of a class for as
 * long as it is there. `first` is a history of seed 1 from which on it is found soon.
 */
import { GetOutcome, PutOutcome } from '@tmem/core'
import { SwapPlace } from '@tmem/frontswap'
import { FramesPlace } from '../../memory/src/place.ts'
import { SpillFile } from '../../spill/src/spill-file.ts'
import { Blocks } from '../../tmem-core/src/blocks.ts'
import { Chain } from '../../tmem-core/src/chain.ts'
import { ChainPool } from '../../tmem-core/src/chain-pool.ts'
import { Directory } from '../../tmem-core/src/directory.ts'
import { Ledger } from '../../tmem-core/src/ledger.ts'
import { Reads } from '../../tmem-core/src/reads.ts'
import { Rising } from '../../tmem-core/src/rising.ts'
import { Sinking } from '../../tmem-core/src/sinking.ts'
import { ByteBudget } from '../../zcache/src/arena.ts'

/** A bug, and how to take it out again. */
export interface Planted {
  readonly name: string
  readonly first: number
  readonly plant: () => () => void
}

/** Puts another method in the place of one; `make` is given what was there. */
function patch<T extends object, K extends keyof T>(target: T, key: K, make: (before: T[K]) => T[K]): () => void {
  const before = target[key]
  target[key] = make(before)
  return () => {
    target[key] = before
  }
}

const all =
  (...undo: readonly (() => void)[]): (() => void) =>
  () => {
    for (const one of undo) one()
  }

const ignore = (): void => {}

/** True every `n`-th time. */
function every(n: number): () => boolean {
  let count = 0
  return () => ++count % n === 0
}

type Copy = readonly [place: number, location: number, units: number]

export const planted: readonly Planted[] = [
  {
    name: 'a read is believed although its page was given up meanwhile',
    first: 5,
    plant: () =>
      patch(
        Rising.prototype,
        'read',
        (read) =>
          function (this: Rising, ...words) {
            Object.defineProperty(words[0], 'stale', { configurable: true, get: () => false, set: ignore })
            return read.apply(this, words)
          },
      ),
  },
  {
    name: 'the block in memory is given up before the write was acknowledged',
    first: 0,
    plant: () =>
      patch(
        SwapPlace.prototype,
        'write',
        (write) =>
          function (this: SwapPlace, flight) {
            write.call(this, flight).catch(() => undefined)
            return Promise.resolve()
          },
      ),
  },
  {
    name: 'a clean copy is kept after a put',
    first: 7,
    plant: () => {
      const copies = new WeakMap<Directory, Map<number, Copy>>()
      const undoVacate = patch(
        Ledger.prototype,
        'vacate',
        (vacate) =>
          function (this: Ledger, entry, forget) {
            const { directory } = this
            const resident = directory.residentOf(entry)
            if (this.seats[directory.placeOf(entry)]?.memory !== undefined && directory.copyOf(resident) >= 0) {
              const kept = copies.get(this.directory) ?? new Map<number, Copy>()
              copies.set(this.directory, kept)
              const [place, units] = [directory.copyPlaceOf(resident), directory.copyUnitsOf(resident)]
              kept.set(entry, [place, directory.copyOf(resident), units])
              directory.dropCopy(resident)
            }
            vacate.call(this, entry, forget)
          },
      )
      const undoEnter = patch(
        Sinking.prototype,
        'enter',
        (enter) =>
          function (this: Sinking, seat, entry, resident, queue, checksum) {
            enter.call(this, seat, entry, resident, queue, checksum)
            const copy = copies.get(this.directory)?.get(entry)
            copies.get(this.directory)?.delete(entry)
            if (copy !== undefined) this.directory.setCopy(resident, ...copy)
          },
      )
      return all(undoVacate, undoEnter)
    },
  },
  {
    name: 'a sync that does not sync',
    first: 0,
    plant: () => patch(SwapPlace.prototype, 'sync', () => () => Promise.resolve()),
  },
  {
    name: 'a location is given out while a frame is there',
    first: 0,
    plant: () =>
      patch(
        SwapPlace.prototype,
        'write',
        (write) =>
          async function (this: SwapPlace, flight) {
            await write.call(this, flight)
            const last = flight.count - 1
            if (flight.locations[last]! >= 0) this.free(flight.locations[last]!, flight.units[last]!)
          },
      ),
  },
  {
    name: 'a flight is believed although its page has changed meanwhile',
    first: 6,
    plant: () => {
      const flights = new WeakMap<Directory, Map<number, number>>()
      const undoSet = patch(
        Directory.prototype,
        'setFlight',
        (setFlight) =>
          function (this: Directory, entry, flight) {
            const known = flights.get(this) ?? new Map<number, number>()
            flights.set(this, known)
            known.set(entry, flight)
            setFlight.call(this, entry, flight)
          },
      )
      const undoOf = patch(
        Directory.prototype,
        'flightOf',
        () =>
          function (this: Directory, entry) {
            return flights.get(this)?.get(entry) ?? 0
          },
      )
      return all(undoSet, undoOf)
    },
  },
  {
    name: 'a write that failed is taken for done',
    first: 80,
    plant: () =>
      patch(
        SwapPlace.prototype,
        'write',
        (write) =>
          function (this: SwapPlace, flight) {
            const writing = write.call(this, flight)
            const locations = flight.locations.slice(0, flight.count)
            return writing.catch(() => flight.locations.set(locations))
          },
      ),
  },
  {
    name: 'a put that was refused leaves the old page',
    first: 0,
    plant: () =>
      patch(
        Blocks.prototype,
        'put',
        (put) =>
          function (this: Blocks, pool, object, index, bytes, at, _keep, unchanged, entry) {
            return put.call(this, pool, object, index, bytes, at, true, unchanged, entry)
          },
      ),
  },
  {
    name: 'a flush leaves the page that is on disk',
    first: 0,
    plant: () =>
      patch(
        Blocks.prototype,
        'flush',
        (flush) =>
          function (this: Blocks, pool, object, index) {
            return this.isInMemory(pool, object, index) === false || flush.call(this, pool, object, index)
          },
      ),
  },
  {
    name: "another page's frame is served",
    first: 0,
    plant: () => {
      const isDue = every(40)
      return patch(
        FramesPlace.prototype,
        'get',
        (get) =>
          function (this: FramesPlace, location, into) {
            get.call(this, isDue() ? Math.max(0, location - 1) : location, into)
          },
      )
    },
  },
  {
    name: 'who waits for a read is not woken',
    first: 0,
    plant: () => {
      const isDue = every(3)
      return patch(
        Reads.prototype,
        'giveBack',
        (giveBack) =>
          function (this: Reads, read) {
            if (!isDue()) giveBack.call(this, read)
          },
      )
    },
  },
  {
    name: 'a client goes on paying for a page that was released',
    first: 150,
    plant: () =>
      patch(
        Blocks.prototype,
        'release',
        (release) =>
          function (this: Blocks, pool, object, index) {
            const wasHere = this.isInMemory(pool, object, index) === true
            const released = release.call(this, pool, object, index)
            if (released && wasHere) pool.account?.charge(1)
            return released
          },
      ),
  },
  {
    name: 'a page is taken out of another queue than the one it is in',
    first: 0,
    plant: () =>
      patch(
        Directory.prototype,
        'queueOf',
        (queueOf) =>
          function (this: Directory, entry) {
            const queue = queueOf.call(this, entry)
            return queue === 1 ? 0 : queue
          },
      ),
  },
  {
    name: 'a limit is not kept',
    first: 0,
    plant: () =>
      patch(
        ByteBudget.prototype,
        'take',
        () =>
          function (this: ByteBudget, bytes) {
            this.used += bytes
            return true
          },
      ),
  },
  {
    name: 'a torn frame is believed',
    first: 0,
    plant: () =>
      patch(
        Chain.prototype,
        'newPool',
        (newPool) =>
          function (this: Chain, attributes) {
            for (const { place, memory } of this.mover.seats)
              for (const codec of [this.blocks.codec, place.codec, memory?.stronger])
                if (codec !== undefined) codec.checksum = () => 0
            return newPool.call(this, attributes)
          },
      ),
  },
  {
    name: 'a pool that is destroyed leaves its pages to the next one',
    first: 0,
    plant: () =>
      patch(
        ChainPool.prototype,
        'destroy',
        () =>
          function (this: ChainPool) {
            this.gone = true
          },
      ),
  },
  {
    name: 'a page that was got stays in its private ephemeral pool',
    first: 8,
    plant: () =>
      patch(
        Blocks.prototype,
        'get',
        (get) =>
          function (this: Blocks, pool, object, index, into, to) {
            const outcome = get.call(this, pool, object, index, into, to)
            const { persistent, shared } = pool.attributes
            if (outcome !== GetOutcome.Hit || persistent || shared) return outcome
            this.counters.puts++
            const stored = this.put(pool, object, index, into, to, false, false, -1)
            if (stored === PutOutcome.Stored) this.counters.stored++
            else this.refused[stored]!++
            return outcome
          },
      ),
  },
  {
    name: 'a page that was flushed is found again after a restart',
    first: 725,
    plant: () => patch(SpillFile.prototype, 'eraseRecords', () => ignore),
  },
  {
    name: 'a frame of memory is given back while it is in use',
    first: 0,
    plant: () => {
      const isDue = every(20)
      return patch(
        FramesPlace.prototype,
        'put',
        (put) =>
          function (this: FramesPlace, block, owner) {
            const frame = put.call(this, block, owner)
            if (frame >= 0 && isDue()) this.free(frame)
            return frame
          },
      )
    },
  },
]
