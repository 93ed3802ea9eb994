/**
 * Requests that may take long are done slice by slice, with turns of other connections between: a TRIM or WRITE_ZEROES
 * of up to 4 GiB, BLOCK_STATUS, the payload of a WRITE.
 *
 * How long a device takes for a MiB differs by a factor of a thousand (never written, full, compressed), so a slice is
 * as large as the last ones let expect to take one turn. Invariants: slices of a request are adjacent, in order, and
 * none is empty; all but the last end at a multiple of `unit` of the device.
 */
import type { BlockDevice, Completion } from '@tmem/core'
import { STATE_HOLE_ZERO } from './protocol.ts'
import { turnMs } from './turns.ts'

/** Smallest slice, unless the device's own unit is larger: below it what is called costs more than what is done. */
const leastBytes = 16 * 1024
/** Extents in one answer to BLOCK_STATUS. */
const maximumExtents = 1024

/** How much of one kind of request a device does in one turn. */
export class Slice {
  readonly #unit: number
  readonly #mostBytes: number
  #bytes: number

  /**
   * @param unit of the device, a power of two; @param mostBytes bound, also on what is done before anything was
   * measured
   */
  constructor(unit: number, mostBytes: number) {
    this.#unit = Math.max(unit, leastBytes)
    this.#mostBytes = mostBytes
    this.#bytes = Math.min(mostBytes, 2 ** 18)
  }

  /** How many of `left` bytes, more than 0, are done next from `at` on. */
  next(at: number, left: number): number {
    if (left <= this.#bytes) return left
    const end = at + this.#bytes
    return end - (end % this.#unit) - at
  }

  /** A slice of so many bytes took so long. */
  took(bytes: number, ms: number): void {
    if (ms > turnMs) {
      const fits = Math.floor((bytes * turnMs) / ms / this.#unit) * this.#unit
      // At least two units, so that one that begins within a unit does not end before it.
      this.#bytes = Math.max(2 * this.#unit, Math.min(this.#bytes, fits))
    } else if (bytes >= this.#bytes / 2 && ms < turnMs / 2) this.#bytes = Math.min(this.#mostBytes, 2 * this.#bytes)
  }
}

/** The slices of an export, by what is done: what they cost is the device's. */
export interface Slices {
  readonly write: Slice
  readonly discard: Slice
  readonly zero: Slice
  readonly map: Slice
}

/** Slices of a device of which nothing was measured yet. */
export function slicesOf({ preferredBlockSize: unit }: BlockDevice): Slices {
  return {
    write: new Slice(unit, 2 ** 20),
    discard: new Slice(unit, 2 ** 23),
    zero: new Slice(unit, 2 ** 23),
    map: new Slice(unit, 2 ** 26),
  }
}

/** Something that is done to each part of a range; true ends it before the end of the range. */
type Operation = (at: number, length: number) => Completion | boolean

/** A request for a range. */
export class Ranged {
  #at: number
  #left: number
  readonly #slice: Slice
  readonly #operation: Operation
  /** Sends the answer: 0, or the protocol's number of the error. */
  readonly answer: (error: number) => void

  constructor(at: number, length: number, slice: Slice, operation: Operation, answer: (error: number) => void) {
    this.#at = at
    this.#left = length
    this.#slice = slice
    this.#operation = operation
    this.answer = answer
  }

  /** Nothing is left to be done. */
  get done(): boolean {
    return this.#left === 0
  }

  /** Does the next slice. Throws or rejects as the device does. */
  step(): Completion {
    const at = this.#at
    const length = this.#slice.next(at, this.#left)
    this.#at += length
    this.#left -= length
    const began = performance.now()
    const outcome = this.#operation(at, length)
    this.#slice.took(length, performance.now() - began)
    if (typeof outcome !== 'boolean') return outcome
    if (outcome) this.#left = 0
    return undefined
  }
}

/** What BLOCK_STATUS answers, gathered from a device's map. */
export class Extents {
  readonly lengths: number[] = []
  readonly states: number[] = []
  readonly #most: number
  /** No more fits. */
  #full = false

  /** @param one only the first extent is asked for */
  constructor(one: boolean) {
    this.#most = one ? 1 : maximumExtents
  }

  get full(): boolean {
    return this.#full
  }

  /** For `BlockDevice.map`. */
  readonly report = (length: number, allocated: boolean): boolean => {
    const state = allocated ? 0 : STATE_HOLE_ZERO
    const last = this.lengths.length - 1
    if (last >= 0 && this.states[last] === state) this.lengths[last]! += length
    else if (last + 1 >= this.#most) {
      this.#full = true
      return false
    } else {
      this.lengths.push(length)
      this.states.push(state)
    }
    return true
  }
}
