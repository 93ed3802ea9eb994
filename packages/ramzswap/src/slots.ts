/**
 * What a device itself keeps of each slot: whether it holds a page, whether that is all zeros, or marked as idle, and
 * when it was touched last.
 *
 * Where the page is, the stack knows. That it should be there is known here: so a page that the stack has lost is an
 * error, and never zeros.
 *
 * Invariant: `held` slots below `size` hold a page, `full` of which have bytes; none beyond.
 */
import { type Allocator, TmemError } from '@tmem/core'

const HELD = 1
const IDLE = 2
const ZERO = 4

export class Slots {
  /** Slots of the device now. */
  size: number
  /** Slots that hold a page; and those of them that have bytes, and not only zeros. */
  held = 0
  full = 0
  readonly #states: Uint8Array
  /** Seconds of the last access. */
  readonly #touched: Uint32Array
  readonly #seconds: (() => number) | undefined

  /** Throws `TmemError` (`TMEM_NO_MEMORY`). `clock` gives milliseconds; without one there are no ages. */
  constructor(device: string, size: number, capacity: number, clock: (() => number) | undefined, allocator: Allocator) {
    const bytes = capacity * (clock === undefined ? 1 : 5)
    const memory = allocator.allocate(bytes, 'ramzswap.table')
    if (memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `device ${device}: no memory for its table (${bytes} bytes)`, {
        layer: device,
      })
    this.size = size
    this.#touched = new Uint32Array(memory, 0, clock === undefined ? 0 : capacity)
    this.#states = new Uint8Array(memory, this.#touched.byteLength, capacity)
    this.#seconds = clock === undefined ? undefined : () => clock() / 1000
  }

  get hasAges(): boolean {
    return this.#seconds !== undefined
  }

  holds(slot: number): boolean {
    return (this.#states[slot]! & HELD) !== 0
  }

  isIdle(slot: number): boolean {
    return (this.#states[slot]! & IDLE) !== 0
  }

  /** Whether a slot has bytes, and not only zeros. */
  hasBytes(slot: number): boolean {
    return (this.#states[slot]! & (HELD | ZERO)) === HELD
  }

  /** A page was stored. */
  hold(slot: number, isZero: boolean): void {
    this.empty(slot)
    this.held++
    if (!isZero) this.full++
    this.#states[slot] = isZero ? HELD | ZERO : HELD
    if (this.#seconds !== undefined) this.#touched[slot] = this.#seconds()
  }

  /** The page is no more. */
  empty(slot: number): void {
    if (this.holds(slot)) this.held--
    if (this.hasBytes(slot)) this.full--
    this.#states[slot] = 0
  }

  /** An access ends idleness. */
  touch(slot: number): void {
    this.#states[slot] = this.#states[slot]! & ~IDLE
    if (this.#seconds !== undefined) this.#touched[slot] = this.#seconds()
  }

  /** Whole seconds since the last access; needs a clock. */
  ageOf(slot: number): number {
    return Math.max(0, Math.floor(this.#seconds!()) - this.#touched[slot]!)
  }

  /** Marks pages as idle: all, or those not touched for so many seconds. How many are marked now. */
  markIdle(age: 'all' | number): number {
    const before = age === 'all' ? Number.POSITIVE_INFINITY : this.#seconds!() - age
    let marked = 0
    for (let slot = 0; slot < this.size; slot++) {
      const state = this.#states[slot]!
      if ((state & HELD) === 0) continue
      if (age === 'all' || this.#touched[slot]! <= before) this.#states[slot] = state | IDLE
      if (this.isIdle(slot)) marked++
    }
    return marked
  }
}
