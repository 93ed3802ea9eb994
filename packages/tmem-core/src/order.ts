/**
 * The order of pages in a memory place: which one goes down next.
 *
 * Two queues, both by second chance. New pages are in the main one. A page that rose from below is on probation: it is
 * used now, but nobody knows whether it will be again; so a scan or a loop that is larger than memory passes through
 * probation and leaves the main queue alone. Used once more on probation, a page is in the main queue.
 *
 * Probation has a share of the bytes that follows what the pages of both queues turn out to be worth. The directory
 * remembers of a page that sank from which queue it did, and when, in pages that sank from that queue since. A page
 * that comes back soon sank too early: it goes to the main queue at once. Each page that sinks speaks against its
 * queue, each that comes back soon speaks for it, by a weight that says at which part of early ones a queue is worth
 * its bytes: half of those of probation, an eighth of those of the main queue. So what is in use after a change of
 * phase gets the room of what nobody asks for any more, and a scan or a loop does not: what sinks from probation then
 * does not come back soon. That main pages sink for good raises the share no further than to a half, because in a loop
 * all of them do.
 *
 * Sources: 2Q (Johnson and Shasha, 1994), ARC (Megiddo and Modha, 2003), second chance (Corbató, 1969). Chosen over the
 * traces of `tmem bench tiers` against LRU, 2Q and S3-FIFO with fixed shares, and against one clock for both queues:
 * each of these misses on one of the traces.
 */
import { type Directory, isFlying, MAIN, maxPlaces, PROBATION, REFERENCED } from './directory.ts'
import { none } from './handles.ts'

const leastShare = 0.02
const mostShare = 0.9
const firstShare = 0.5
/** Epochs are counted modulo this, so a page that sank so many of them ago may be taken for a recent one. */
const epochsOfAll = 256
/** A memory's worth of pages sinks from a queue in so many epochs; and a page counts as recent for so many. */
const epochsPerTurn = 16
const recentEpochs = 8
/** A memory's worth of pages that sink moves the share by so much; one that comes back soon weighs as many of them. */
const step = 8
const mainWeight = 8
const probationWeight = 2
/** Pages that are given a second chance for one that goes: so that finding one is bounded. */
const maxChances = 64

/**
 * What all memory places of a stack have in common: how long ago pages sank from a queue to places that wait, counted
 * in pages that did since.
 */
export class SinkClock {
  readonly #directory: Directory
  readonly #epochs = [0, 0]
  readonly #left = [1, 1]

  constructor(directory: Directory) {
    this.#directory = directory
  }

  /** Now, for `Directory.setSlow`. */
  epochOf(main: boolean): number {
    return this.#epochs[Number(main)]!
  }

  /** Counts a page that sank, from the main queue or from another one. */
  sank(main: boolean): void {
    const queue = Number(main)
    if (--this.#left[queue]! > 0) return
    this.#epochs[queue] = (this.#epochs[queue]! + 1) % epochsOfAll
    let residents = 0
    for (let place = 0; place < maxPlaces; place++)
      residents += this.#directory.queued(place, MAIN) + this.#directory.queued(place, PROBATION)
    this.#left[queue] = Math.max(1, Math.floor(residents / epochsPerTurn))
  }
}

export class Order {
  /** Share of the bytes for probation. */
  share: number = firstShare
  /** Refaults of pages that sank from the main queue, and from probation. */
  mainRefaults = 0
  probationRefaults = 0
  readonly #directory: Directory
  readonly #place: number
  readonly #clock: SinkClock

  constructor(directory: Directory, place: number, clock: SinkClock) {
    this.#directory = directory
    this.#place = place
    this.#clock = clock
  }

  /** Now, for `Directory.setSlow`. */
  epochOf(main: boolean): number {
    return this.#clock.epochOf(main)
  }

  /** Counts a page that sank, from the main queue or from another one. */
  sank(main: boolean): void {
    this.#clock.sank(main)
    if (!main) this.#learn(-1)
    else if (this.share < firstShare) this.#learn(1)
  }

  #learn(steps: number): void {
    const share = this.share + (steps * step) / Math.max(64, this.#residents)
    this.share = Math.min(mostShare, Math.max(leastShare, share))
  }

  get #residents(): number {
    return this.#directory.queued(this.#place, MAIN) + this.#directory.queued(this.#place, PROBATION)
  }

  /** The queue for a page that rises; learns from it. `entry` is still noted as slow. */
  queueFor(entry: number): number {
    const directory = this.#directory
    const main = directory.isMainGhost(entry)
    if (directory.ageOf(entry, this.#clock.epochOf(main)) > recentEpochs) return PROBATION
    if (main) {
      this.mainRefaults++
      this.#learn(-mainWeight)
    } else {
      this.probationRefaults++
      this.#learn(probationWeight)
    }
    return MAIN
  }

  /**
   * The resident that goes next, or `none`: neither one that was used since it was passed by, nor one that is on its
   * way already. `sizeOf` says what a resident takes.
   */
  next(sizeOf: (entry: number) => number): number {
    const directory = this.#directory
    const place = this.#place
    for (let chances = maxChances; ; ) {
      const probation = directory.bytesOf(place, PROBATION)
      const total = probation + directory.bytesOf(place, MAIN)
      let queue: number = probation > total * this.share ? PROBATION : MAIN
      let resident = this.#oldest(queue)
      if (resident === none) {
        queue = MAIN + PROBATION - queue
        resident = this.#oldest(queue)
        if (resident === none) return none
      }
      const entry = directory.entryOf(resident)
      const state = directory.stateOf(entry)
      if ((state & REFERENCED) === 0 || chances === 0) return resident
      chances--
      directory.flag(entry, 0, REFERENCED)
      this.#move(resident, entry, MAIN, sizeOf(entry))
    }
  }

  /**
   * The oldest resident of a queue that is not on a flight. What leaves by one is at the other end of its queue; what
   * is only written ahead has stayed where it was: neither is more than a few flights.
   */
  #oldest(queue: number): number {
    const directory = this.#directory
    let resident = directory.oldest(this.#place, queue)
    while (resident !== none && isFlying(directory.stateOf(directory.entryOf(resident))))
      resident = directory.newer(resident)
    return resident
  }

  #move(resident: number, entry: number, queue: number, bytes: number): void {
    this.#directory.unlink(this.#place, resident, entry, bytes)
    this.#directory.append(this.#place, queue, resident, entry, bytes)
  }
}
