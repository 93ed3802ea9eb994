/**
 * Whether what several threads saw of a store could have happened one after another: linearizability of recorded
 * histories, page by page.
 *
 * Each operation took effect at one moment between the call and the answer; a history is linearizable when such moments
 * can be chosen so that every answer is right. Linearizability is local: a history is linearizable exactly when the
 * part of it that concerns each page is, and a store promises no more than that (an operation on many pages is recorded
 * as one operation on each of them).
 *
 * Method. Calls and answers are walked through in the order of their times. A configuration is a set of unanswered
 * operations that have taken effect already and what the page then holds; all configurations that are possible are
 * kept, each once. An answer leaves those in which its operation has taken effect, after any others that may have come
 * first. There are never more configurations than the operations of a moment allow, whatever the length of the history,
 * so the walk is linear in it. When none is left, the history is not linearizable.
 *
 * Sources: M. Herlihy and J. Wing, Linearizability: A Correctness Condition for Concurrent Objects (1990), for the
 * definition and locality; J. Wing and C. Gong, Testing and Verifying Concurrent Objects (1993), for the search; G.
 * Lowe, Testing for Linearizability (2017), for "just in time" linearization and the remembered configurations.
 */
import { ConformanceError } from './pages.ts'

/** What was done with a page, and what was answered. */
export const PageOperation = {
  /** A put that was stored: the page holds `value`. */
  Put: 0,
  /** A put that was refused: the page holds nothing. */
  RefusedPut: 1,
  /** A get that found `value`. */
  Hit: 2,
  /** A get that found nothing. */
  Miss: 3,
  /** A flush, of the page, its object or its pool. */
  Flush: 4,
} as const
export type PageOperation = (typeof PageOperation)[keyof typeof PageOperation]

/** Largest value of a page in a history. */
export const maxHistoryValue: number = 2 ** 31 - 3
/** Operations on one page that may be under way at once. */
const maxUnderWay = 20

const columns = 6
const THREAD = 0
const OPERATION = 1
const HANDLE = 2
const VALUE = 3
const INVOKED = 4
const ANSWERED = 5

/**
 * A list of operations in shared memory, so that a worker thread can fill it: one list per thread. Times come from one
 * counter for all threads (`Atomics.add`), read before the call and after the answer.
 */
export class History {
  /** Can be posted to another thread, for `new History(memory)`. */
  readonly memory: SharedArrayBuffer
  readonly #words: Int32Array

  /** @param room how many operations fit, or the memory of a history in another thread */
  constructor(room: number | SharedArrayBuffer) {
    this.memory = typeof room === 'number' ? new SharedArrayBuffer((1 + room * columns) * 4) : room
    this.#words = new Int32Array(this.memory)
  }

  /** All operations of several histories. */
  static merged(histories: readonly History[]): History {
    const all = new History(histories.reduce((sum, { length }) => sum + length, 0))
    for (const { length, memory } of histories) {
      all.#words.set(new Int32Array(memory, 4, length * columns), 1 + all.length * columns)
      all.#words[0] = all.length + length
    }
    return all
  }

  /** Operations recorded. */
  get length(): number {
    return this.#words[0]
  }

  /**
   * Adds an operation. `value` (0 to `maxHistoryValue`) is what was put or found. Throws `RangeError` when the history
   * is full or the operation was answered before it was called.
   */
  record(
    thread: number,
    operation: PageOperation,
    handle: number,
    value: number,
    invoked: number,
    answered: number,
  ): void {
    const at = 1 + this.length * columns
    if (at + columns > this.#words.length) throw new RangeError(`the history is full: it has ${this.length} operations`)
    if (!(answered > invoked)) throw new RangeError(`answered at ${answered}, called at ${invoked}`)
    if (!(Number.isInteger(value) && value >= 0 && value <= maxHistoryValue))
      throw new RangeError(`a value must be an integer from 0 to ${maxHistoryValue}, got ${value}`)
    this.#words[at + THREAD] = thread
    this.#words[at + OPERATION] = operation
    this.#words[at + HANDLE] = handle
    this.#words[at + VALUE] = value
    this.#words[at + INVOKED] = invoked
    this.#words[at + ANSWERED] = answered
    this.#words[0] = this.length + 1
  }

  /** Number of the thread that did operation `i`. */
  thread(i: number): number {
    return this.#words[1 + i * columns + THREAD]
  }

  /** What operation `i` was. */
  operation(i: number): PageOperation {
    return this.#words[1 + i * columns + OPERATION] as PageOperation
  }

  /** The page of operation `i`. */
  handle(i: number): number {
    return this.#words[1 + i * columns + HANDLE]
  }

  /** What operation `i` put or found. */
  value(i: number): number {
    return this.#words[1 + i * columns + VALUE]
  }

  /** When operation `i` was called. */
  invoked(i: number): number {
    return this.#words[1 + i * columns + INVOKED]
  }

  /** When operation `i` was answered. */
  answered(i: number): number {
    return this.#words[1 + i * columns + ANSWERED]
  }
}

/** How a page of some kind of pool behaves. */
export interface PageModel {
  readonly name: string
  /** A hit takes the page away. */
  readonly takes: boolean
  /** The page may vanish at any time; a miss is then always right, and final until the next put. */
  readonly vanishes: boolean
}

/**
 * The kinds of pools. A store with room for all may be held to a model of its own in which ephemeral pages do not
 * vanish.
 */
export const pageModels: {
  readonly persistent: PageModel
  readonly sharedEphemeral: PageModel
  readonly privateEphemeral: PageModel
} = {
  persistent: { name: 'persistent', takes: false, vanishes: false },
  sharedEphemeral: { name: 'shared ephemeral', takes: false, vanishes: true },
  privateEphemeral: { name: 'private ephemeral', takes: true, vanishes: true },
}

/** Operations on one page whose answers contradict each other. */
export interface Contradiction {
  readonly handle: number
  readonly model: PageModel
  /** The operations, by their numbers in the history, in the order in which they were called. */
  readonly operations: readonly number[]
  /** The operations drawn beside each other in the order of their times. */
  readonly text: string
}

/**
 * The smallest stretch of the history that no order of effects explains, or `undefined` when the history is
 * linearizable. Every page begins empty. Throws `RangeError` when more than 20 operations on one page overlap.
 */
export function contradictionIn(
  history: History,
  modelOf: PageModel | ((handle: number) => PageModel),
): Contradiction | undefined {
  const byHandle = new Map<number, number[]>()
  for (let i = 0; i < history.length; i++) {
    const list = byHandle.get(history.handle(i))
    if (list === undefined) byHandle.set(history.handle(i), [i])
    else list.push(i)
  }
  let smallest: Contradiction | undefined
  for (const [handle, operations] of byHandle) {
    const model = typeof modelOf === 'function' ? modelOf(handle) : modelOf
    const found = new PageHistory(history, model, operations).contradiction(handle)
    if (found !== undefined && found.operations.length < (smallest?.operations.length ?? Number.POSITIVE_INFINITY))
      smallest = found
  }
  return smallest
}

/** Throws `ConformanceError` with the smallest contradiction unless the history is linearizable. */
export function expectLinearizable(history: History, modelOf: PageModel | ((handle: number) => PageModel)): void {
  const found = contradictionIn(history, modelOf)
  if (found !== undefined) throw new ConformanceError(found.text)
}

/** What a page holds: nothing, anything, or a value (plus two). */
const NOTHING = 0
const ANYTHING = 1
const FIRST_VALUE = 2
const IMPOSSIBLE = -1

/** What the page holds after an operation, or `IMPOSSIBLE`. */
function after(operation: PageOperation, value: number, held: number, model: PageModel): number {
  switch (operation) {
    case PageOperation.Put:
      return value + FIRST_VALUE
    case PageOperation.RefusedPut:
    case PageOperation.Flush:
      return NOTHING
    case PageOperation.Hit:
      if (held !== ANYTHING && held !== value + FIRST_VALUE) return IMPOSSIBLE
      return model.takes ? NOTHING : value + FIRST_VALUE
    case PageOperation.Miss:
      return model.vanishes || held === NOTHING || held === ANYTHING ? NOTHING : IMPOSSIBLE
  }
}

/** A configuration as one number: what is held in the low 32 bits, above it a bit for each operation under way. */
const bitOf = (lane: number): number => 2 ** (32 + lane)
const has = (configuration: number, lane: number): boolean => Math.floor(configuration / bitOf(lane)) % 2 === 1

/** The history of one page: its calls and answers in the order of their times. */
class PageHistory {
  readonly #history: History
  readonly #model: PageModel
  /** Operation × 2 for a call, plus 1 for an answer. */
  readonly #events: Float64Array
  /** Operations that overlap have different lanes. */
  readonly #lanes = new Map<number, number>()

  constructor(history: History, model: PageModel, operations: readonly number[]) {
    this.#history = history
    this.#model = model
    const timeOf = (event: number): number =>
      event % 2 === 0 ? history.invoked(event / 2) : history.answered((event - 1) / 2)
    // At the same time calls come first: then the operations overlap, which rules less out.
    this.#events = Float64Array.from(operations.flatMap((i) => [i * 2, i * 2 + 1])).sort(
      (a, b) => timeOf(a) - timeOf(b) || (a % 2) - (b % 2),
    )
    const free = Array.from({ length: maxUnderWay }, (_, lane) => maxUnderWay - 1 - lane)
    for (const event of this.#events) {
      const operation = Math.floor(event / 2)
      if (event % 2 === 1) free.push(this.#lanes.get(operation)!)
      else {
        const lane = free.pop()
        if (lane === undefined)
          throw new RangeError(`more than ${maxUnderWay} operations overlap on page ${history.handle(operation)}`)
        this.#lanes.set(operation, lane)
      }
    }
  }

  contradiction(handle: number): Contradiction | undefined {
    const all = this.#events.length
    const end = this.#walk(0, all, new Set([NOTHING]), new Set())
    if (end === all) return undefined
    const fails = (from: number, left: ReadonlySet<number> = new Set()): boolean =>
      this.#walk(from, end + 1, this.#anythingAt(from, left), left) <= end
    // The latest start from which it cannot be right, whatever was before: an earlier start knows more, so it is found
    // by doubling and then halving. Without one, the page was empty at the start and should have stayed so.
    let size = 2
    while (size <= end && !fails(end + 1 - size)) size *= 2
    let start = Math.max(0, end + 1 - size)
    const fromNothing = start === 0 && !fails(0)
    if (!fromNothing)
      for (let good = end + 1 - size / 2; good - start > 1; ) {
        const middle = (good + start) >> 1
        if (fails(middle)) start = middle
        else good = middle
      }
    const operations = new Set(this.#underWayAt(start))
    for (const event of this.#events.subarray(start, end + 1)) operations.add(Math.floor(event / 2))
    // Leaving out a get that changes nothing does not make a right history wrong.
    const left = new Set<number>()
    for (const operation of operations) {
      if (!this.#changesNothing(operation)) continue
      left.add(operation)
      const still = fromNothing ? this.#walk(0, end + 1, new Set([NOTHING]), left) <= end : fails(start, left)
      if (!still) left.delete(operation)
    }
    const kept = [...operations].filter((operation) => !left.has(operation))
    return { handle, model: this.#model, operations: kept, text: this.#drawn(handle, kept, fromNothing) }
  }

  /** Walks events `from` to `to`; where no configuration is left, or `to`. Operations in `left` are left out. */
  #walk(from: number, to: number, initial: ReadonlySet<number>, left: ReadonlySet<number>): number {
    const underWay = new Map<number, number>()
    for (const operation of this.#underWayAt(from))
      if (!left.has(operation)) underWay.set(this.#lanes.get(operation)!, operation)
    let configurations = initial
    for (let at = from; at < to; at++) {
      const event = this.#events[at]
      const operation = Math.floor(event / 2)
      if (left.has(operation)) continue
      const lane = this.#lanes.get(operation)!
      if (event % 2 === 0) underWay.set(lane, operation)
      else {
        configurations = this.#answer(configurations, lane, underWay)
        if (configurations.size === 0) return at
        underWay.delete(lane)
      }
    }
    return to
  }

  /** The configurations in which the operation in `lane` has taken effect, without that operation. */
  #answer(
    configurations: ReadonlySet<number>,
    lane: number,
    underWay: ReadonlyMap<number, number>,
  ): ReadonlySet<number> {
    const done = new Set<number>()
    const known = new Set(configurations)
    // A set may grow while it is walked through.
    for (const configuration of known) {
      if (has(configuration, lane)) {
        done.add(configuration - bitOf(lane))
        continue
      }
      const held = configuration % 2 ** 32
      for (const [other, operation] of underWay) {
        if (has(configuration, other)) continue
        const then = after(this.#history.operation(operation), this.#history.value(operation), held, this.#model)
        if (then !== IMPOSSIBLE) known.add(configuration - held + bitOf(other) + then)
      }
    }
    return done
  }

  /** Operations called before event `from` and answered at or after it. */
  #underWayAt(from: number): ReadonlySet<number> {
    const underWay = new Set<number>()
    for (const event of this.#events.subarray(0, from))
      if (event % 2 === 0) underWay.add(event / 2)
      else underWay.delete((event - 1) / 2)
    return underWay
  }

  /** Every configuration that there can be before event `from`. */
  #anythingAt(from: number, left: ReadonlySet<number>): ReadonlySet<number> {
    let configurations = [ANYTHING]
    for (const operation of this.#underWayAt(from)) {
      if (left.has(operation)) continue
      const bit = bitOf(this.#lanes.get(operation)!)
      configurations = configurations.flatMap((configuration) => [configuration, configuration + bit])
    }
    return new Set(configurations)
  }

  #changesNothing(operation: number): boolean {
    const what = this.#history.operation(operation)
    return (what === PageOperation.Hit && !this.#model.takes) || (what === PageOperation.Miss && !this.#model.vanishes)
  }

  /** One line per operation: who, what, and a bar from its call to its answer. */
  #drawn(handle: number, operations: readonly number[], fromNothing: boolean): string {
    const history = this.#history
    const times = operations.flatMap((i) => [history.invoked(i), history.answered(i)]).sort((a, b) => a - b)
    const columnOf = new Map([...new Set(times)].map((time, column) => [time, column]))
    const wide = columnOf.size > 100
    const lines = operations.map((i) => {
      const from = columnOf.get(history.invoked(i))!
      const to = columnOf.get(history.answered(i))!
      const bar = wide
        ? `called ${history.invoked(i)}, answered ${history.answered(i)}`
        : `${' '.repeat(from)}|${'-'.repeat(to - from - 1)}|`
      return `  thread ${history.thread(i)}  ${this.#said(i).padEnd(24)}  ${bar}`
    })
    return [
      `page ${handle} (${this.#model.name}): no order of these operations explains their answers;`,
      `before them the page held ${fromNothing ? 'nothing' : 'anything or nothing'}`,
      ...lines,
    ].join('\n')
  }

  #said(i: number): string {
    const value = this.#history.value(i)
    switch (this.#history.operation(i)) {
      case PageOperation.Put:
        return `put ${value}`
      case PageOperation.RefusedPut:
        return `put ${value}: refused`
      case PageOperation.Hit:
        return `get: ${value}`
      case PageOperation.Miss:
        return 'get: miss'
      case PageOperation.Flush:
        return 'flush'
    }
  }
}
