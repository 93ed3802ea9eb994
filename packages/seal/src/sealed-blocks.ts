/**
 * What is known here of each sealed block, by its location: the number under which it was sealed, and its length. A
 * block that is not the one of that number cannot be opened, so nothing that lies outside needs to be believed.
 *
 * A hash table with linear probing over arrays that are taken once, with room for as many blocks as the place may have.
 *
 * Invariants: a location is in it at most once; between its home and its slot no slot is empty.
 */
import type { Allocator } from '@tmem/core'

/** Largest number of a seal. */
export const maxSeal: number = 2 ** 47 - 1
/** Largest length of what is sealed. */
export const maxSealedBytes: number = 2 ** 17
const lengthBits = 17
const lengthMask: number = maxSealedBytes - 1

const empty = 0xffffffff
const wordBytes = 4
const wordsPerSlot = 3

/** Bytes of the table for so many blocks. */
export const sealedBlocksBytes = (capacity: number): number => slotsFor(capacity) * wordsPerSlot * wordBytes

/** Four slots of five are in use at most, and one never. */
const slotsFor = (capacity: number): number => Math.ceil(capacity * 1.25) + 1

export class SealedBlocks {
  count = 0
  readonly #slots: number
  /** By slot: location, low half of the seal; upper bits of the seal, and the length - 1. */
  readonly #locations: Uint32Array
  readonly #lows: Uint32Array
  readonly #rest: Uint32Array

  private constructor(memory: ArrayBufferLike, capacity: number) {
    const slots = slotsFor(capacity)
    this.#slots = slots
    this.#locations = new Uint32Array(memory, 0, slots).fill(empty)
    this.#lows = new Uint32Array(memory, slots * wordBytes, slots)
    this.#rest = new Uint32Array(memory, 2 * slots * wordBytes, slots)
  }

  /** A table for so many blocks; `undefined`: there is no memory for it. */
  static take(capacity: number, allocator: Allocator): SealedBlocks | undefined {
    const memory = allocator.allocate(sealedBlocksBytes(capacity), 'seal.table')
    return memory === undefined ? undefined : new SealedBlocks(memory, capacity)
  }

  /** The slot of a location; -1: nothing was sealed there. */
  find(location: number): number {
    for (let slot = this.#home(location); ; slot = this.#next(slot)) {
      const there = this.#locations[slot]
      if (there === location) return slot
      if (there === empty) return -1
    }
  }

  sealAt(slot: number): number {
    return (this.#rest[slot]! >>> lengthBits) * 2 ** 32 + this.#lows[slot]!
  }

  lengthAt(slot: number): number {
    return (this.#rest[slot]! & lengthMask) + 1
  }

  /** Notes what lies at a location where nothing was. */
  add(location: number, seal: number, length: number): void {
    let slot = this.#home(location)
    while (this.#locations[slot] !== empty) slot = this.#next(slot)
    this.#locations[slot] = location
    this.#lows[slot] = seal >>> 0
    this.#rest[slot] = (Math.floor(seal / 2 ** 32) << lengthBits) | (length - 1)
    this.count++
  }

  /** Forgets what lies at a location, if anything does. */
  remove(location: number): void {
    let hole = this.find(location)
    if (hole < 0) return
    // What was put further from its home for this one's sake comes nearer.
    for (let slot = this.#next(hole); this.#locations[slot] !== empty; slot = this.#next(slot)) {
      const home = this.#home(this.#locations[slot]!)
      const isBehindHole = hole <= slot ? hole < home && home <= slot : hole < home || home <= slot
      if (isBehindHole) continue
      this.#locations[hole] = this.#locations[slot]!
      this.#lows[hole] = this.#lows[slot]!
      this.#rest[hole] = this.#rest[slot]!
      hole = slot
    }
    this.#locations[hole] = empty
    this.count--
  }

  #home(location: number): number {
    return Math.floor(((Math.imul(location, 0x9e3779b1) >>> 0) * this.#slots) / 2 ** 32)
  }

  #next(slot: number): number {
    return slot + 1 === this.#slots ? 0 : slot + 1
  }
}
