/**
 * A swap area of the model: slots of 4 KiB in a file, as the kernel's swap type is. Slot 0 is the header and never
 * holds a page.
 *
 * What is known of each slot lies in typed arrays: whether it is free, the checksum of what was last written, a stamp
 * that changes whenever the slot changes hands or content, and the next slot of a page that takes several.
 *
 * Invariants:
 *  - A read that answers true has delivered exactly what was last written to the slots, checked by checksum. When the
 *    stamp moved while it
 *    was under way (freed, overwritten, given to another page), it answers false: look again.
 *  - Nothing is allocated after `open` but by the file's transfers.
 *
 * Slots are given out by next fit, within a wholly free group of 32 slots while there is one.
 *
 * Source: mm/swapfile.c as described in the reference notes (swap areas, priorities, clusters); the SWAPSPACE2 header
 * as mkswap(8) writes it.
 */
import { crc32 } from 'node:zlib'
import { type Allocator, type ByteAmount, bytesOf, checkOptions, TmemError } from '@tmem/core'
import type { PageFile, PageFileIo } from '@tmem/page-file'
import { openSwapFile } from './layer.ts'
import { slotBytes } from './place.ts'

/** No slot: slot 0 is the header. */
export const noSlot = 0

/** Largest number of slots of an area, the header among them: 256 GiB of pages. */
export const maxSlots: number = 2 ** 26

/** A swap area to open. */
export interface SwapAreaOptions {
  /** Path of the file or block device. */
  readonly file: string
  /** Bytes of pages that it holds: a multiple of 4096. The file has 4096 bytes more, for the header. */
  readonly sizeBytes: ByteAmount
  /**
   * True: use the file or device that is there, made with mkswap. Default false: make the file; it must not be there.
   */
  readonly existing?: boolean
  /** True: leave a file that was made here in place at the end. */
  readonly keep?: boolean
  /** Areas of higher priority are filled first, those of equal priority in turn: -32768 to 32767, default 0. */
  readonly priority?: number
  /** False: no page for this area is ever offered to frontswap. Default true. */
  readonly frontswap?: boolean
  /** The system that has the file (default: this machine's). */
  readonly files?: PageFileIo
}

export class SwapArea {
  readonly priority: number
  /** False: this area has opted out of frontswap. */
  readonly frontswap: boolean
  /** Slots, the header among them: slots 1 to slots-1 hold pages. */
  readonly slots: number
  readonly #file: PageFile
  readonly #map: SlotMap
  readonly #checksums: Uint32Array
  readonly #stamps: Uint32Array
  readonly #next: Uint32Array
  /** One bit per slot: a page begins there. */
  readonly #heads: Int32Array
  #used = 0
  #closed = false

  private constructor(options: SwapAreaOptions, sizeBytes: number, allocator: Allocator) {
    const slots = sizeBytes / slotBytes + 1
    this.priority = options.priority ?? 0
    this.frontswap = options.frontswap ?? true
    this.slots = slots
    const words = Math.ceil(slots / 32)
    const bytes = slots * 12 + words * 4 + SlotMap.bytesFor(slots)
    const memory = allocator.allocate(bytes, 'frontswap.slots')
    if (memory === undefined)
      throw new TmemError(
        'TMEM_NO_MEMORY',
        `no memory for a swap area of ${sizeBytes} bytes (${bytes} bytes for its tables): give a smaller size`,
        { layer: 'frontswap' },
      )
    this.#checksums = new Uint32Array(memory, 0, slots)
    this.#stamps = new Uint32Array(memory, slots * 4, slots)
    this.#next = new Uint32Array(memory, slots * 8, slots)
    this.#heads = new Int32Array(memory, slots * 12, words)
    this.#map = new SlotMap(slots, memory, slots * 12 + words * 4)
    this.#file = openSwapFile({ ...options, bytes: slots * slotBytes, header: header(slots) }, { allocator })
  }

  /**
   * Opens an area and reserves all that it will ever need. Throws `RangeError` for sizes and priorities that make no
   * sense, `TmemError` with `TMEM_NO_MEMORY` when the allocator has too little, with `TMEM_IO` when the file cannot be
   * had (present already, foreign content, in use, disk full).
   */
  static open(options: SwapAreaOptions, allocator: Allocator): SwapArea {
    checkOptions('SwapArea.open', options, {
      file: 'text',
      sizeBytes: 'bytes',
      existing: 'flag?',
      keep: 'flag?',
      priority: 'number?',
      frontswap: 'flag?',
      files: 'object?',
    })
    const { priority = 0 } = options
    const sizeBytes = bytesOf('SwapArea.open', 'sizeBytes', options.sizeBytes)
    if (!Number.isSafeInteger(sizeBytes) || sizeBytes < slotBytes || sizeBytes % slotBytes !== 0)
      throw new RangeError(
        `the size of a swap area must be a positive multiple of ${slotBytes} bytes, got ${sizeBytes}`,
      )
    if (sizeBytes / slotBytes >= maxSlots)
      throw new RangeError(`a swap area holds at most ${(maxSlots - 1) * slotBytes} bytes of pages, got ${sizeBytes}`)
    if (!Number.isInteger(priority) || priority < -32768 || priority > 32767)
      throw new RangeError(`priority must be an integer from -32768 to 32767, got ${priority}`)
    return new SwapArea(options, sizeBytes, allocator)
  }

  get file(): string {
    return this.#file.path
  }

  /** Slots that can be had now. */
  get freeSlots(): number {
    return this.#map.free
  }

  /** Slots that hold pages. */
  get usedSlots(): number {
    return this.#used
  }

  /**
   * Takes `count` slots for one page and chains them; answers the first, or `noSlot` (and nothing taken) when there are
   * too few. They lie side by side where that can be had.
   */
  allocate(count: number): number {
    if (this.#closed || this.#map.free < count) return noSlot
    const first = this.#map.take()
    let last = first
    for (let taken = 1; taken < count; taken++) {
      const slot = this.#map.take()
      this.#next[last] = slot
      last = slot
    }
    this.#next[last] = noSlot
    this.#used += count
    this.#heads[first >>> 5] = this.#heads[first >>> 5]! | (1 << (first & 31))
    this.#touch(first)
    return first
  }

  /** Gives a page's slots back. */
  free(first: number): void {
    this.#touch(first)
    this.#heads[first >>> 5] = this.#heads[first >>> 5]! & ~(1 << (first & 31))
    for (let slot = first; slot !== noSlot; slot = this.#next[slot]!) {
      this.#used--
      this.#map.give(slot)
    }
  }

  /** The first slot from `from` on (1 to slots) that a page begins with, or `noSlot`. */
  nextPage(from: number): number {
    if (from >= this.slots) return noSlot
    let word = from >>> 5
    let bits = this.#heads[word]! & (-1 << (from & 31))
    while (bits === 0 && ++word < this.#heads.length) bits = this.#heads[word]!
    return bits === 0 ? noSlot : word * 32 + lowestBit(bits)
  }

  /** Changes whenever the page of that first slot is written, freed or given out again (modulo 2^32). */
  stamp(first: number): number {
    return this.#stamps[first]!
  }

  /**
   * Writes a page to its slots, neighbours in one request; waits in the calling thread. Throws `TmemError` (`TMEM_IO`):
   * then the slots hold no page that could be read.
   */
  write(first: number, page: Uint8Array): void {
    this.#touch(first)
    for (let slot = first, at = 0; slot !== noSlot; slot = this.#next[slot]!, at += slotBytes)
      this.#checksums[slot] = crc32(page.subarray(at, at + slotBytes))
    for (let slot = first, at = 0; slot !== noSlot; ) {
      const run = this.#run(slot)
      this.#file.writeNow(page, at, run * slotBytes, slot * slotBytes)
      at += run * slotBytes
      slot = this.#next[slot + run - 1]!
    }
  }

  /**
   * Reads a page of chained slots into `into`, whose length is the page's. True: it is what was last written. False:
   * the page was written, freed or replaced meanwhile (or the area closed), and what is in `into` means nothing.
   * Rejects with `TmemError`: `TMEM_IO` when the device failed, `TMEM_CORRUPT` when the bytes came back altered; the
   * page stays.
   */
  async read(first: number, into: Uint8Array): Promise<boolean> {
    const stamp = this.#stamps[first]!
    const isStale = (): boolean => this.#closed || this.#stamps[first] !== stamp
    for (let slot = first, at = 0; at < into.length && !isStale(); ) {
      const run = this.#run(slot)
      try {
        await this.#file.read(into, at, run * slotBytes, slot * slotBytes)
      } catch (error) {
        if (isStale()) return false
        throw error
      }
      at += run * slotBytes
      slot = this.#next[slot + run - 1]!
    }
    if (isStale()) return false
    for (let slot = first, at = 0; at < into.length; slot = this.#next[slot]!, at += slotBytes)
      if (crc32(into.subarray(at, at + slotBytes)) !== this.#checksums[slot])
        throw new TmemError('TMEM_CORRUPT', `swap file ${this.file}: slot ${slot} came back altered`, {
          layer: 'frontswap',
          handle: `slot ${slot}`,
        })
    return true
  }

  /**
   * Waits for what is under way, then closes the file (and removes it, when it was made here and not to be kept).
   * Idempotent.
   */
  close(): Promise<void> {
    this.#closed = true
    return this.#file.close()
  }

  #touch(first: number): void {
    this.#stamps[first] = this.#stamps[first]! + 1
  }

  /** How many slots of a page lie side by side from that one on. */
  #run(slot: number): number {
    let run = 1
    while (this.#next[slot + run - 1] === slot + run) run++
    return run
  }
}

/** The header of a Linux swap area, version 1, as mkswap writes it, without a uuid and with a label. */
function header(slots: number): Uint8Array {
  const page = new Uint8Array(slotBytes)
  const view = new DataView(page.buffer)
  view.setUint32(1024, 1, true)
  view.setUint32(1028, slots - 1, true)
  const text = (from: number, characters: string): void => {
    for (let n = 0; n < characters.length; n++) page[from + n] = characters.charCodeAt(n)
  }
  text(1052, 'tmem')
  text(slotBytes - 10, 'SWAPSPACE2')
  return page
}

/** Position of the lowest bit set in a word that is not zero. */
const lowestBit = (word: number): number => 31 - Math.clz32(word & -word)

/**
 * Which slots are free: one bit each, and above them two summaries of one bit per word (any free, all free), so that
 * finding the next slot looks at a 32nd of the words at most.
 */
class SlotMap {
  free = 0
  readonly #free: Int32Array
  readonly #some: Int32Array
  readonly #whole: Int32Array
  /** Where the next search begins. */
  #cursor = 0

  /** Bytes that it takes of the memory that it is given. */
  static bytesFor(slots: number): number {
    const words = Math.ceil(slots / 32)
    return (words + 2 * Math.ceil(words / 32)) * 4
  }

  constructor(slots: number, memory: ArrayBufferLike, at: number) {
    const words = Math.ceil(slots / 32)
    const summary = Math.ceil(words / 32)
    this.#free = new Int32Array(memory, at, words)
    this.#some = new Int32Array(memory, at + words * 4, summary)
    this.#whole = new Int32Array(memory, at + (words + summary) * 4, summary)
    for (let slot = 1; slot < slots; slot++) this.give(slot)
  }

  /**
   * Takes a free slot: the next one of the group in use, else of the next group that is wholly free, else of any. There
   * is one.
   */
  take(): number {
    let word = this.#cursor >>> 5
    let bits = this.#free[word]! & (-1 << (this.#cursor & 31))
    if (bits === 0) {
      word = next(this.#whole, word)
      if (word < 0) word = next(this.#some, this.#cursor >>> 5)
      bits = this.#free[word]!
    }
    const bit = lowestBit(bits)
    const left = this.#free[word]! & ~(1 << bit)
    this.#free[word] = left
    this.#whole[word >>> 5] = this.#whole[word >>> 5]! & ~(1 << (word & 31))
    if (left === 0) this.#some[word >>> 5] = this.#some[word >>> 5]! & ~(1 << (word & 31))
    this.free--
    // Past the end of the last word the search starts over: there is no word there.
    this.#cursor = word * 32 + bit + 1
    if (this.#cursor === this.#free.length * 32) this.#cursor = 0
    return word * 32 + bit
  }

  give(slot: number): void {
    const word = slot >>> 5
    const now = this.#free[word]! | (1 << (slot & 31))
    this.#free[word] = now
    this.#some[word >>> 5] = this.#some[word >>> 5]! | (1 << (word & 31))
    if (now === -1) this.#whole[word >>> 5] = this.#whole[word >>> 5]! | (1 << (word & 31))
    this.free++
  }
}

/** The first bit set in `map` from bit `from` on, going round; -1 when none is. */
function next(map: Int32Array, from: number): number {
  const start = from >>> 5
  const first = map[start]! & (-1 << (from & 31))
  if (first !== 0) return start * 32 + lowestBit(first)
  for (let n = 1; n <= map.length; n++) {
    const word = start + n < map.length ? start + n : start + n - map.length
    if (map[word] !== 0) return word * 32 + lowestBit(map[word]!)
  }
  return -1
}
