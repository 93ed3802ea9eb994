/**
 * The allocator of device memory: slabs of slots of equal size, so that a freed slot serves the next frame of about
 * that size, and no frame has to be moved in memory that only copies reach.
 *
 * A slab has room for two of the largest frames. Sizes of slots grow by an eighth, so a slot is at most an eighth
 * larger than its frame. A location is the unit at which a slot begins.
 *
 * Invariants: a slab that has no frame has no size; those that have a free slot are in the list of their size, unless
 * what is there is lost.
 */
import { maxBlockBytes, none, unitsOf } from '@tmem/core'

/** Bytes of the unit in which frames are counted. */
export const unitBytes = 64
const mostUnits: number = unitsOf(maxBlockBytes, unitBytes)
/** Units of a slab. */
export const slabUnits: number = 2 * mostUnits

/** Units of the slots of each size, the smallest first; and the size for a frame of so many units. */
const sizes: readonly number[] = (() => {
  const all: number[] = []
  for (let units = 1; units < mostUnits; units = Math.max(units + 1, Math.floor(units * 1.125))) all.push(units)
  return [...all, mostUnits]
})()
const sizeFor: Uint8Array = (() => {
  const by = new Uint8Array(mostUnits + 1)
  for (let units = 1, size = 0; units <= mostUnits; units++) {
    if (units > sizes[size]!) size++
    by[units] = size
  }
  return by
})()

const noSize = 255
/** Words of the map of a slab's slots. */
const mapWords: number = Math.ceil(slabUnits / 32)

/** Bytes of the tables for one slab. */
export const bytesPerSlab: number = mapWords * 4 + 3 * 4 + 2 + 1 + 1

export class Slabs {
  readonly count: number
  usedUnits = 0
  frames = 0
  /**
   * By slab: used slots, one bit each; neighbours in the list of its size; slots in use; size; what is there is lost.
   */
  readonly #maps: Int32Array
  readonly #next: Int32Array
  readonly #before: Int32Array
  readonly #used: Uint16Array
  readonly #size: Uint8Array
  readonly #lost: Uint8Array
  /** Slabs without a frame, the lowest last. */
  readonly #empty: Int32Array
  #emptyCount: number
  /** By size: first slab with a free slot. */
  readonly #first: Int32Array = new Int32Array(sizes.length).fill(none)

  /** @param table `bytesPerSlab` for each slab */
  constructor(table: ArrayBufferLike, count: number) {
    this.count = count
    let at = 0
    const words = (length: number): Int32Array => {
      const view = new Int32Array(table, at, length)
      at += length * 4
      return view
    }
    this.#maps = words(count * mapWords)
    this.#next = words(count)
    this.#before = words(count)
    this.#empty = words(count)
    this.#used = new Uint16Array(table, at, count)
    this.#size = new Uint8Array(table, at + 2 * count, count).fill(noSize)
    this.#lost = new Uint8Array(table, at + 3 * count, count)
    for (let n = 0; n < count; n++) this.#empty[n] = count - 1 - n
    this.#emptyCount = count
  }

  /** A slot for a frame of so many units, or `none`. */
  take(units: number): number {
    const size = sizeFor[units]!
    let slab = this.#first[size]!
    if (slab === none) {
      if (this.#emptyCount === 0) return none
      slab = this.#empty[--this.#emptyCount]!
      this.#size[slab] = size
      this.#link(slab)
    }
    const slot = this.#freeSlot(slab)
    this.#maps[slab * mapWords + (slot >>> 5)]! |= 1 << (slot & 31)
    if (++this.#used[slab]! === slotsOf(size)) this.#unlink(slab)
    this.usedUnits += sizes[size]!
    this.frames++
    return slab * slabUnits + slot * sizes[size]!
  }

  free(location: number): void {
    const slab = slabOf(location)
    const size = this.#size[slab]!
    const slot = (location % slabUnits) / sizes[size]!
    const isLost = this.#lost[slab] === 1
    if (this.#used[slab] === slotsOf(size) && !isLost) this.#link(slab)
    this.#maps[slab * mapWords + (slot >>> 5)]! &= ~(1 << (slot & 31))
    this.usedUnits -= sizes[size]!
    this.frames--
    if (--this.#used[slab]! > 0) return
    if (!isLost) this.#unlink(slab)
    this.#lost[slab] = 0
    this.#size[slab] = noSize
    this.#empty[this.#emptyCount++] = slab
  }

  /** What is in the slabs now is lost: they are given nothing more until they are empty. */
  lose(): void {
    for (let slab = 0; slab < this.count; slab++) {
      if (this.#used[slab] === 0 || this.#lost[slab] === 1) continue
      if (this.#used[slab]! < slotsOf(this.#size[slab]!)) this.#unlink(slab)
      this.#lost[slab] = 1
    }
  }

  isLost(location: number): boolean {
    return this.#lost[slabOf(location)] === 1
  }

  isUsed(location: number): boolean {
    const slab = slabOf(location)
    const size = this.#size[slab]
    if (size === undefined || size === noSize) return false
    const slot = (location % slabUnits) / sizes[size]!
    return Number.isInteger(slot) && ((this.#maps[slab * mapWords + (slot >>> 5)]! >>> (slot & 31)) & 1) === 1
  }

  /** Units of the slot at a location that is in use. */
  unitsAt(location: number): number {
    return sizes[this.#size[slabOf(location)]!]!
  }

  #freeSlot(slab: number): number {
    for (let word = slab * mapWords, slot = 0; ; word++, slot += 32) {
      const free = ~this.#maps[word]!
      if (free !== 0) return slot + 31 - Math.clz32(free & -free)
    }
  }

  #link(slab: number): void {
    const size = this.#size[slab]!
    const next = this.#first[size]!
    this.#next[slab] = next
    this.#before[slab] = none
    if (next !== none) this.#before[next] = slab
    this.#first[size] = slab
  }

  #unlink(slab: number): void {
    const next = this.#next[slab]!
    const before = this.#before[slab]!
    if (next !== none) this.#before[next] = before
    if (before === none) this.#first[this.#size[slab]!] = next
    else this.#next[before] = next
  }
}

/** Which slab a location is in. */
export const slabOf = (location: number): number => Math.floor(location / slabUnits)

const slotsOf = (size: number): number => Math.floor(slabUnits / sizes[size]!)
