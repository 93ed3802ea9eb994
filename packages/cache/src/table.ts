/**
 * The table of entries: from the hash of a key to the position of its record, without an object per entry.
 *
 * A slot has two words: the hash, and the reference: page (24 bits, plus one), record in it (6 bits), and how often the
 * entry was used (2 bits). Of two keys with the same hash, the later one takes the slot. The earlier one becomes a
 * miss, and never a wrong value, as the record holds the key.
 *
 * The table is split in segments by the upper bits of the hash. Each is open addressing with linear probing, whose
 * homes are in the order of the hashes; each grows by a quarter on its own, so that growth never needs more memory at
 * once than a small share of the table, and shrinks on request. Removal shifts back.
 *
 * Invariant: a hash is in at most one slot; between its home and its slot there is no empty one.
 */
import type { Allocator } from '@tmem/core'

const segmentBits = 6
const segments = 2 ** segmentBits
const firstSlots = 64
const slotWords = 2

/** Records in one page, at most, and uses that are counted. */
export const maxRecords = 64
export const maxUses = 3

const recordShift = 24
const usesShift = 30
const pageMask = 0xffffff

/** No slot. */
export const noSlot = -1

/** The reference to a record. `page` is below 2^24 - 1. */
export const refOf = (page: number, record: number, uses: number): number =>
  (page + 1) | (record << recordShift) | (uses << usesShift)
/** Page of a reference. */
export const pageOf = (ref: number): number => (ref & pageMask) - 1
/** Number of the record in its page. */
export const recordOf = (ref: number): number => (ref >>> recordShift) & (maxRecords - 1)
/** How often the entry was used since it was written or looked at last: 0 to 3. */
export const usesOf = (ref: number): number => ref >>> usesShift
/** The same reference with another number of uses. */
export const withUses = (ref: number, uses: number): number => (ref & 0x3fffffff) | (uses << usesShift)

export class EntryTable {
  /** Entries, and bytes of all segments. */
  count = 0
  bytes = 0
  readonly #allocator: Allocator
  readonly #segments: Int32Array[] = []
  readonly #slots: Int32Array = new Int32Array(segments)
  readonly #counts: Int32Array = new Int32Array(segments)
  /** The segment in which the last slot is. */
  #segment = 0

  constructor(allocator: Allocator) {
    this.#allocator = allocator
    for (let n = 0; n < segments; n++) {
      this.#segments.push(new Int32Array(firstSlots * slotWords))
      this.#slots[n] = firstSlots
    }
    this.bytes = segments * firstSlots * slotWords * 4
  }

  /** The slot of a hash, or `noSlot`. It is good until something is added or removed, or another one is asked for. */
  find(hash: number): number {
    const segment = hash >>> (32 - segmentBits)
    const words = this.#segments[segment]!
    const size = this.#slots[segment]!
    let at = homeOf(hash, size)
    for (;;) {
      const ref = words[at * slotWords + 1]!
      if (ref === 0) return noSlot
      if (words[at * slotWords] === hash) {
        this.#segment = segment
        return at
      }
      if (++at === size) at = 0
    }
  }

  /** Reference in the slot that was found last. */
  refAt(slot: number): number {
    return this.#segments[this.#segment]![slot * slotWords + 1]!
  }

  /** Changes the reference in the slot that was found last. */
  setRef(slot: number, ref: number): void {
    this.#segments[this.#segment]![slot * slotWords + 1] = ref
  }

  /** Bytes that `add` of a hash would need more: 0, unless its segment has to grow. */
  growthFor(hash: number): number {
    const segment = hash >>> (32 - segmentBits)
    const size = this.#slots[segment]!
    return (this.#counts[segment]! + 1) * 5 <= size * 4 ? 0 : (grown(size) - size) * slotWords * 4
  }

  /** Makes room for a hash that is not there. False, and nothing was done: there is no memory for it. */
  reserve(hash: number): boolean {
    const segment = hash >>> (32 - segmentBits)
    return this.growthFor(hash) === 0 || this.#resize(segment, grown(this.#slots[segment]!))
  }

  /** Adds a hash that is not there, and for which there is room. */
  add(hash: number, ref: number): void {
    const segment = hash >>> (32 - segmentBits)
    this.#insert(segment, hash, ref)
    this.#counts[segment]!++
    this.count++
  }

  /** Removes what is in the slot that was found last. */
  removeAt(slot: number): void {
    const segment = this.#segment
    const words = this.#segments[segment]!
    const size = this.#slots[segment]!
    let hole = slot
    for (let at = slot; ; ) {
      if (++at === size) at = 0
      if (words[at * slotWords + 1] === 0) break
      const home = homeOf(words[at * slotWords]!, size)
      // It may move back unless its home is behind the hole, cyclically.
      if (hole <= at ? home > hole && home <= at : home > hole || home <= at) continue
      words[hole * slotWords] = words[at * slotWords]!
      words[hole * slotWords + 1] = words[at * slotWords + 1]!
      hole = at
    }
    words[hole * slotWords + 1] = 0
    this.#counts[segment]!--
    this.count--
  }

  /** Removes every entry for which `isGone` says so. */
  removeWhere(isGone: (ref: number) => boolean): void {
    for (let segment = 0; segment < segments; segment++) {
      const words = this.#segments[segment]!
      const size = this.#slots[segment]!
      // Removal shifts what follows into the slot, which is looked at again; what comes over the end, in another round.
      for (let removed = true; removed; ) {
        removed = false
        for (let at = 0; at < size; at++)
          while (words[at * slotWords + 1] !== 0 && isGone(words[at * slotWords + 1]!)) {
            this.#segment = segment
            this.removeAt(at)
            removed = true
          }
      }
    }
  }

  /** Gives memory back that few entries are in. Whether there was some. */
  shrink(): boolean {
    const { bytes } = this
    for (let segment = 0; segment < segments; segment++) {
      // As full as after growing, so that the next ones do not make it grow again.
      const size = Math.max(firstSlots, Math.ceil(this.#counts[segment]! / 0.64))
      if (size * 5 < this.#slots[segment]! * 3) this.#resize(segment, size)
    }
    return this.bytes < bytes
  }

  /** Calls `use` with every entry. */
  forEach(use: (hash: number, ref: number) => void): void {
    for (let segment = 0; segment < segments; segment++) {
      const words = this.#segments[segment]!
      for (let at = 0; at < words.length; at += slotWords) if (words[at + 1] !== 0) use(words[at]!, words[at + 1]!)
    }
  }

  /** Removes everything, and gives the memory back. */
  clear(): void {
    for (let segment = 0; segment < segments; segment++) {
      this.#segments[segment] = new Int32Array(firstSlots * slotWords)
      this.#slots[segment] = firstSlots
      this.#counts[segment] = 0
    }
    this.count = 0
    this.bytes = segments * firstSlots * slotWords * 4
  }

  #resize(segment: number, size: number): boolean {
    const old = this.#segments[segment]!
    const memory = this.#allocator.allocate(size * slotWords * 4, 'cache.table')
    if (memory === undefined) return false
    this.#segments[segment] = new Int32Array(memory)
    this.#slots[segment] = size
    this.bytes += size * slotWords * 4 - old.byteLength
    for (let at = 0; at < old.length; at += slotWords)
      if (old[at + 1] !== 0) this.#insert(segment, old[at]!, old[at + 1]!)
    return true
  }

  #insert(segment: number, hash: number, ref: number): void {
    const words = this.#segments[segment]!
    const size = this.#slots[segment]!
    let at = homeOf(hash, size)
    while (words[at * slotWords + 1] !== 0) if (++at === size) at = 0
    words[at * slotWords] = hash
    words[at * slotWords + 1] = ref
  }
}

const grown = (size: number): number => Math.ceil(size * 1.25)

/** The segment took the upper bits. */
const homeOf = (hash: number, size: number): number => (((hash << segmentBits) >>> 0) * (size / 2 ** 32)) | 0

/**
 * Hashes of entries that went lately, so that one that comes back is known to be worth more than a new one. A table in
 * which the later one overwrites the earlier one at the same place.
 */
export class Ghosts {
  readonly bytes: number
  readonly #hashes: Int32Array

  /** @param hashes zeros, as many as a power of two */
  constructor(hashes: Int32Array) {
    this.#hashes = hashes
    this.bytes = this.#hashes.byteLength
  }

  add(hash: number): void {
    this.#hashes[hash & (this.#hashes.length - 1)] = hash
  }

  has(hash: number): boolean {
    return hash !== 0 && this.#hashes[hash & (this.#hashes.length - 1)] === hash
  }

  remove(hash: number): void {
    if (this.has(hash)) this.#hashes[hash & (this.#hashes.length - 1)] = 0
  }

  clear(): void {
    this.#hashes.fill(0)
  }
}
