/**
 * The order of pages in a memory place: which one goes down next.
 *
 * Two queues, both by second chance. New pages are in the main one. A page that rose from below is on probation: it is used now, but
 * nobody knows whether it will be again; so a scan or a loop that is larger than memory passes through probation and leaves
 * the main queue alone. Used once more on probation, a page is in the main queue.
 *
 * Probation has a share of the bytes that follows what happens. The directory remembers of a page that sank from which queue it
 * did, and when. If it comes back soon, the queue that it sank from was too short: its share grows. A page that comes
 * back soon goes to the main queue at once.
 *
 * Sources: 2Q (Johnson and Shasha, 1994), ARC (Megiddo and Modha, 2003), second chance (Corbató, 1969). Chosen by simulation over the
 * traces of `tmem bench tiers` against LRU, 2Q and S3-FIFO with fixed shares: fixed shares miss on one of the traces.
 */
import { type Directory, isFlying, MAIN, maxPlaces, PROBATION, REFERENCED } from './directory.ts'
import { none } from './handles.ts'

const leastShare = 0.02
const mostShare = 0.9
const firstShare = 0.25
/** Epochs are counted modulo this, so a page that sank so many of them ago may be taken for a recent one. */
const epochsOfAll = 256
/** A memory's worth of pages sinks in so many epochs; and a page counts as recent for so many. */
const epochsPerTurn = 16
const recentEpochs = 32
/** Pages that are given a second chance for one that goes: so that finding one is bounded. */
const maxChances = 64

/** What all memory places of a stack have in common: how long ago pages sank to places that wait, counted in pages that sank since. */
export class SinkClock {
  readonly #directory: Directory
  #epoch = 0
  #left = 1

  constructor(directory: Directory) {
    this.#directory = directory
  }

  /** Now, for `Directory.setSlow`. */
  get epoch(): number {
    return this.#epoch
  }

  /** Counts a page that sinks. */
  sank(): void {
    if (--this.#left > 0) return
    this.#epoch = (this.#epoch + 1) % epochsOfAll
    let residents = 0
    for (let place = 0; place < maxPlaces; place++)
      residents += this.#directory.queued(place, MAIN) + this.#directory.queued(place, PROBATION)
    this.#left = Math.max(1, Math.floor(residents / epochsPerTurn))
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
  get epoch(): number {
    return this.#clock.epoch
  }

  /** Counts a page that sinks. */
  sank(): void {
    this.#clock.sank()
  }

  /** The queue for a page that rises; learns from it. `entry` is still noted as slow. */
  queueFor(entry: number): number {
    const directory = this.#directory
    if (directory.ageOf(entry, this.#clock.epoch) > recentEpochs) return PROBATION
    const residents = directory.queued(this.#place, MAIN) + directory.queued(this.#place, PROBATION)
    const step = 32 / Math.max(64, residents)
    if (directory.isMainGhost(entry)) {
      this.mainRefaults++
      this.share = Math.max(leastShare, this.share - step)
    } else {
      this.probationRefaults++
      this.share = Math.min(mostShare, this.share + step)
    }
    return MAIN
  }

  /**
   * The resident that goes next, or `none`: neither one that was used since it was passed by, nor one that is on its way already.
   * `sizeOf` says what a resident takes.
   */
  next(sizeOf: (entry: number) => number): number {
    const directory = this.#directory
    const place = this.#place
    let flying = directory.queued(place, MAIN) + directory.queued(place, PROBATION)
    for (let chances = maxChances; ; ) {
      const probation = directory.bytesOf(place, PROBATION)
      const total = probation + directory.bytesOf(place, MAIN)
      let queue: number = probation > total * this.share ? PROBATION : MAIN
      let resident = directory.oldest(place, queue)
      if (resident === none) {
        queue = MAIN + PROBATION - queue
        resident = directory.oldest(place, queue)
        if (resident === none) return none
      }
      const entry = directory.entryOf(resident)
      const state = directory.stateOf(entry)
      if (isFlying(state)) {
        // It is on its way: behind all others, and when all are, there is none.
        if (--flying < 0) return none
        this.#move(resident, entry, queue, sizeOf(entry))
        continue
      }
      if ((state & REFERENCED) === 0 || chances === 0) return resident
      chances--
      directory.flag(entry, 0, REFERENCED)
      this.#move(resident, entry, MAIN, sizeOf(entry))
    }
  }

  #move(resident: number, entry: number, queue: number, bytes: number): void {
    this.#directory.unlink(this.#place, resident, entry, bytes)
    this.#directory.append(this.#place, queue, resident, entry, bytes)
  }
}
