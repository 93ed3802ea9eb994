/**
 * How long pages of a device take, by operation and by the place that has the page: `put` into the stack, `get` out of
 * memory, `fetch` of what has to be waited for.
 *
 * Of puts and gets one in `every` is looked at, and counts for all of them: looking at the clock costs as much as a
 * hundredth of a page. Fetches are few, and each is looked at.
 *
 * Invariant: counting allocates nothing once a place has been seen.
 */
import { Durations, type StatsNode } from '@tmem/core'

/** A prime, so that no batch of requests has its first page looked at each time. */
const every = 61

const PUT = 0
const GET = 1
const FETCH = 2
const operations = ['put', 'get', 'fetch'] as const
type Operation = typeof PUT | typeof GET | typeof FETCH

/** What is not looked at. */
const untimed = -1

export class PageTimes {
  readonly #now: () => number
  readonly #placeOf: (slot: number) => number
  /** By operation and place, from 0: the one that repeats a word, which is in no place. */
  readonly #durations: Durations[][] = operations.map(() => [])
  #putsLeft = every
  #getsLeft = every
  /** Pages that the batch under way stands for. */
  #weight = 0

  /** `now` gives milliseconds with their parts; `placeOf` the number of the place that has a slot's page, -1: none. */
  constructor(now: () => number, placeOf: (slot: number) => number) {
    this.#now = now
    this.#placeOf = placeOf
  }

  /** Before puts of `pages` pages together: when they began, for `put`. */
  beginPut(pages: number): number {
    this.#putsLeft -= pages
    if (this.#putsLeft > 0) return untimed
    this.#weight = every - this.#putsLeft
    this.#putsLeft = every
    return this.#now()
  }

  /** `pages` pages were put, that of `slot` among them. */
  put(begun: number, slot: number, pages: number): void {
    if (begun !== untimed) this.#add(PUT, this.#placeOf(slot), (this.#now() - begun) / pages, this.#weight)
  }

  /** Before a get: when it began, for `got`. */
  beginGet(): number {
    if (--this.#getsLeft > 0) return untimed
    this.#getsLeft = every
    return this.#now()
  }

  /** The page of a slot was got, and is where it was. */
  got(begun: number, slot: number): void {
    if (begun === untimed) return
    const ms = this.#now() - begun
    this.#add(GET, this.#placeOf(slot), ms, every)
  }

  /** Before a fetch: when it began, for `fetched`. */
  beginFetch(): number {
    return this.#now()
  }

  /** A page was fetched that was in that place before. */
  fetched(begun: number, place: number): void {
    this.#add(FETCH, place, this.#now() - begun, 1)
  }

  /** By operation and place; `places`: their names, from the top. */
  stats(places: readonly string[]): StatsNode {
    return {
      name: 'latency',
      counters: {},
      children: operations.map((name, operation) => ({
        name,
        counters: {},
        children: this.#durations[operation]!.flatMap((durations, n) =>
          durations.count === 0
            ? []
            : [{ name: n === 0 ? 'same' : places[n - 1]!, counters: durations.counters(), children: [] }],
        ),
      })),
    }
  }

  #add(operation: Operation, place: number, ms: number, weight: number): void {
    const ofPlaces = this.#durations[operation]!
    while (ofPlaces.length <= place + 1) ofPlaces.push(new Durations())
    ofPlaces[place + 1]!.add(Math.max(0, ms * 1e6), weight)
  }
}
