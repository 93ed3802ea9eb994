/**
 * A swap area: slots of 4 KiB in a file, as the kernel's swap type is: slot 0 is the header and never holds a page.
 *
 * What is known of each slot lies in typed arrays: whether it is free, the checksum of what was last written, a stamp
 * that changes whenever the slot changes hands or content, and the next slot of a page that takes several.
 *
 * Invariants:
 *  - A read delivers exactly what was last written to the slots, checked by checksum, or nothing: when the stamp moved
 *    while the read was under way (flushed, overwritten, given to another page), the caller is told to look again.
 *  - A slot that failed a write with an I/O error is never given out again.
 *  - Nothing is allocated after `open` except by a read's own call into the operating system.
 *
 * Slots are given out by next fit, within a wholly free group of 32 slots while there is one, so that the pages of a batch
 * lie side by side and one write takes them.
 *
 * Source: mm/swapfile.c as described in the reference notes (swap areas, priorities, clusters); the SWAPSPACE2 header as
 * mkswap(8) writes it.
 */
import { crc32 } from 'node:zlib'
import { type Allocator, TmemError } from '@tmem/core'
import { type BlockFile, hasCode, type OpenBlockFile, openBlockFile, slotBytes } from './block-file.ts'

/** No slot: slot 0 is the header. */
export const noSlot = 0

/** Largest number of slots of an area, the header among them: 256 GiB of pages. */
export const maxSlots: number = 2 ** 26

/** Slots that one write may carry: measured, 512 KiB cost 1.3 µs a page here, and larger ones no less. */
const writeSlots = 128
/** Slots that reads under way may fill at one time: room for one page of 2 MiB. */
const readSlots = 512
/** Slots that one `submit` may carry: one page of 2 MiB, or as many small ones. */
export const gatherSlots = 512

/** A swap area to open. */
export interface SwapAreaOptions {
  /** Path of the file or block device. */
  readonly file: string
  /** Bytes of pages that it holds: a multiple of 4096. The file has 4096 bytes more, for the header. */
  readonly sizeBytes: number
  /** True: use the file or device that is there, made with mkswap. Default false: make the file; it must not be there. */
  readonly existing?: boolean
  /** True: leave a file that was made here in place at the end. */
  readonly keep?: boolean
  /**
   * Read in the calling thread, which waits, instead of the runtime's pool of threads: for a thread of its own on which threads of
   * that pool may be waiting (a pager).
   */
  readonly blockingReads?: boolean
  /** Areas of higher priority are filled first, those of equal priority in turn: -32768 to 32767, default 0. */
  readonly priority?: number
  /** False: no page for this area is ever offered to frontswap. Default true. */
  readonly frontswap?: boolean
  /** How the file is opened, for tests and other kinds of device. Default: a real file. */
  readonly open?: OpenBlockFile
}

/** What an area did, since it was opened. */
export interface SwapAreaCounters {
  /** Write requests, and those that carried more than one slot. */
  diskWrites: number
  clusteredWrites: number
  diskReads: number
  diskBytesWritten: number
  diskBytesRead: number
  writeErrors: number
  readErrors: number
  /** Slots read back altered. */
  corruptSlots: number
  /** Reads whose bytes were thrown away because the slot had changed meanwhile. */
  staleReads: number
}

export class SwapArea {
  readonly file: string
  readonly priority: number
  /** False: this area has opted out of frontswap. */
  readonly frontswap: boolean
  /** Slots, the header among them: slots 1 to slots-1 hold pages. */
  readonly slots: number
  /** Bytes reserved in memory for this area. */
  readonly reservedBytes: number
  readonly counters: SwapAreaCounters = {
    diskWrites: 0,
    clusteredWrites: 0,
    diskReads: 0,
    diskBytesWritten: 0,
    diskBytesRead: 0,
    writeErrors: 0,
    readErrors: 0,
    corruptSlots: 0,
    staleReads: 0,
  }
  /** The system's error of the write that failed last. */
  lastError: Error | undefined
  readonly #device: BlockFile
  readonly #map: SlotMap
  readonly #checksums: Uint32Array
  readonly #stamps: Uint32Array
  readonly #next: Uint32Array
  /** One bit per slot: retired; and: first slot of a page. */
  readonly #bad: Int32Array
  readonly #heads: Int32Array
  #badSlots = 0
  #used = 0
  /** The I/O memory: first the write buffer, then the places of the reads. */
  readonly #memory: Uint8Array
  readonly #writeAt: number
  readonly #readAt: number
  readonly #places = new Places(readSlots)
  /** What the next `submit` writes: slots, where their bytes begin in the source, and afterwards which ones failed. */
  readonly #gatheredSlots: Uint32Array = new Uint32Array(gatherSlots)
  readonly #gatheredFrom: Float64Array = new Float64Array(gatherSlots)
  readonly #gatheredFailed: Uint8Array = new Uint8Array(gatherSlots)
  #gathered = 0
  #reading = 0
  #closed = false
  #whenQuiet: (() => void) | undefined

  private constructor(options: SwapAreaOptions, slots: number, reserve: Reserve) {
    this.file = options.file
    this.priority = options.priority ?? 0
    this.frontswap = options.frontswap ?? true
    this.slots = slots
    this.#map = new SlotMap(slots, reserve)
    this.#checksums = new Uint32Array(reserve(slots * 4, 'checksums'), 0, slots)
    this.#stamps = new Uint32Array(reserve(slots * 4, 'stamps'), 0, slots)
    this.#next = new Uint32Array(reserve(slots * 4, 'chains'), 0, slots)
    const words = Math.ceil(slots / 32)
    const bits = reserve(words * 8, 'bits')
    this.#bad = new Int32Array(bits, 0, words)
    this.#heads = new Int32Array(bits, words * 4, words)
    const ioBytes = (writeSlots + readSlots + 1) * slotBytes
    this.#memory = new Uint8Array(reserve(ioBytes, 'io'), 0, ioBytes)
    this.#device = (options.open ?? openBlockFile)({
      file: options.file,
      bytes: slots * slotBytes,
      existing: options.existing ?? false,
      keep: options.keep ?? false,
      blockingReads: options.blockingReads ?? false,
      memory: this.#memory,
      header: header(slots),
    })
    this.#writeAt = this.#device.alignedFrom
    this.#readAt = this.#writeAt + writeSlots * slotBytes
    this.reservedBytes = slots * 12 + words * 8 + this.#map.bytes + ioBytes
  }

  /**
   * Opens an area and reserves all that it will ever need.
   * Throws `RangeError` for sizes and priorities that make no sense, `TmemError` with `TMEM_NO_MEMORY` when the allocator has
   * too little, with `TMEM_IO` when the file cannot be had (present already, foreign content, in use, disk full).
   */
  static open(options: SwapAreaOptions, allocator: Allocator): SwapArea {
    const { sizeBytes, priority = 0 } = options
    checkSize(sizeBytes)
    if (!Number.isInteger(priority) || priority < -32768 || priority > 32767)
      throw new RangeError(`priority must be an integer from -32768 to 32767, got ${priority}`)
    return new SwapArea(options, sizeBytes / slotBytes + 1, (bytes, part) => {
      const memory = allocator.allocate(bytes, `frontswap.${part}`)
      if (memory === undefined)
        throw new TmemError(
          'TMEM_NO_MEMORY',
          `no memory for a swap area of ${sizeBytes} bytes (${bytes} bytes for its ${part}): give a smaller size`,
          { layer: 'frontswap' },
        )
      return memory
    })
  }

  /** True when the operating system's cache is bypassed (`O_DIRECT`). */
  get directIo(): boolean {
    return this.#device.directIo
  }

  /** Slots that can be had now. */
  get freeSlots(): number {
    return this.#map.free
  }

  /** Slots retired after a failed write. */
  get badSlots(): number {
    return this.#badSlots
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

  /** Gives a page's slots back. A slot that went bad is kept out of use. */
  free(first: number): void {
    this.#touch(first)
    this.#heads[first >>> 5] = this.#heads[first >>> 5]! & ~(1 << (first & 31))
    for (let slot = first; slot !== noSlot; slot = this.#next[slot]!) {
      this.#used--
      if (!this.isBad(slot)) this.#map.give(slot)
    }
  }

  /** Whether a slot was retired. */
  isBad(slot: number): boolean {
    return (this.#bad[slot >>> 5]! & (1 << (slot & 31))) !== 0
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

  /** Slots for which `gather` has room before the next `submit`. */
  get room(): number {
    return gatherSlots - this.#gathered
  }

  /** Adds the slots of a page to the next write; its bytes begin at `from` of the source that `submit` will get. */
  gather(first: number, from: number): void {
    let at = from
    for (let slot = first; slot !== noSlot; slot = this.#next[slot]!) {
      if (this.#gathered === gatherSlots) throw new RangeError(`one write carries at most ${gatherSlots} slots`)
      this.#gatheredSlots[this.#gathered] = slot
      this.#gatheredFrom[this.#gathered] = at
      this.#gathered++
      at += slotBytes
    }
  }

  /**
   * Writes what was gathered, neighbours in one request, and waits for it. Returns the number of slots that failed; `failed`
   * tells which. Never throws for what the device says: a refused page takes another way.
   */
  submit(source: Uint8Array): number {
    const count = this.#gathered
    this.#gathered = 0
    let failures = 0
    for (let from = 0; from < count; ) {
      let to = from + 1
      while (to < count && to - from < writeSlots && this.#gatheredSlots[to] === this.#gatheredSlots[to - 1]! + 1) to++
      failures += this.#write(source, from, to)
      from = to
    }
    return failures
  }

  /** Whether the n-th slot gathered for the last `submit` could not be written. */
  failed(n: number): boolean {
    return this.#gatheredFailed[n] === 1
  }

  /** Writes one page of chained slots. False when any of it failed. */
  write(first: number, page: Uint8Array): boolean {
    this.gather(first, 0)
    return this.submit(page) === 0
  }

  /**
   * Reads a page of chained slots into `into`, whose length is the page's. True: filled, with what was last written. False:
   * the page was written, freed or replaced meanwhile (or the area closed), and `into` is untouched. Rejects with
   * `TmemError`: `TMEM_IO` when the device failed, `TMEM_CORRUPT` when the bytes came back altered; the page stays.
   */
  async read(first: number, into: Uint8Array): Promise<boolean> {
    const stamp = this.#stamps[first]!
    return await this.borrow(into.length, async (page) => {
      await this.#readAll(first, stamp, page)
      if (this.#isStale(first, stamp)) {
        this.counters.staleReads++
        return false
      }
      this.#check(first, page)
      into.set(page)
      return true
    })
  }

  /** Lends `bytes` bytes of the memory that reads go to, until `use` has settled. */
  async borrow<T>(bytes: number, use: (page: Uint8Array) => Promise<T>): Promise<T> {
    const count = bytes / slotBytes
    this.#reading++
    try {
      const place = this.#places.take(count) ?? (await this.#places.wait(count))
      try {
        const at = this.#readAt + place * slotBytes
        return await use(this.#memory.subarray(at, at + bytes))
      } finally {
        this.#places.give(place, count)
      }
    } finally {
      this.#reading--
      if (this.#reading === 0) this.#whenQuiet?.()
    }
  }

  /** Closes the file at once; no read may be under way. */
  dispose(): void {
    this.#closed = true
    this.#device.close()
  }

  /** Waits for the reads under way, then closes the file (and removes it, when it was made here and not to be kept). */
  async close(): Promise<void> {
    this.#closed = true
    if (this.#reading > 0)
      await new Promise<void>((resolve) => {
        this.#whenQuiet = resolve
      })
    this.#device.close()
  }

  #write(source: Uint8Array, from: number, to: number): number {
    const memory = this.#memory
    for (let n = from; n < to; n++) {
      const slot = this.#gatheredSlots[n]!
      const at = this.#writeAt + (n - from) * slotBytes
      const bytes = source.subarray(this.#gatheredFrom[n]!, this.#gatheredFrom[n]! + slotBytes)
      memory.set(bytes, at)
      this.#checksums[slot] = crc32(bytes)
      this.#touch(slot)
    }
    const error = this.#transfer(this.#gatheredSlots[from]!, this.#writeAt, to - from)
    if (error !== undefined && to - from === 1) return this.#fail(from, error)
    this.#gatheredFailed.fill(0, from, to)
    if (error === undefined) return 0
    let failures = 0
    // One slot of the cluster may have spoilt it for all.
    for (let n = from; n < to; n++) {
      const alone = this.#transfer(this.#gatheredSlots[n]!, this.#writeAt + (n - from) * slotBytes, 1)
      if (alone !== undefined) failures += this.#fail(n, alone)
    }
    return failures
  }

  /** Notes that the n-th gathered slot could not be written; answers 1. */
  #fail(n: number, error: Error): number {
    this.#gatheredFailed[n] = 1
    this.lastError = error
    const slot = this.#gatheredSlots[n]!
    // A full disk or quota may pass; anything else is the medium.
    if (!hasCode(error, 'ENOSPC') && !hasCode(error, 'EDQUOT') && !this.isBad(slot)) {
      this.#bad[slot >>> 5] = this.#bad[slot >>> 5]! | (1 << (slot & 31))
      this.#badSlots++
    }
    return 1
  }

  #transfer(slot: number, at: number, count: number): Error | undefined {
    const { counters } = this
    counters.diskWrites++
    try {
      this.#device.write(at, count * slotBytes, slot * slotBytes)
    } catch (error) {
      counters.writeErrors++
      return error instanceof Error ? error : new Error(String(error))
    }
    if (count > 1) counters.clusteredWrites++
    counters.diskBytesWritten += count * slotBytes
    return undefined
  }

  #touch(first: number): void {
    this.#stamps[first] = this.#stamps[first]! + 1
  }

  #isStale(first: number, stamp: number): boolean {
    return this.#closed || this.#stamps[first] !== stamp
  }

  /** Reads run by run; ends early when the page has changed. */
  async #readAll(first: number, stamp: number, page: Uint8Array): Promise<void> {
    const { counters } = this
    const count = page.length / slotBytes
    const to = page.byteOffset - this.#memory.byteOffset
    let slot = first
    for (let done = 0; done < count && !this.#isStale(first, stamp); slot = this.#next[slot]!) {
      const from = slot
      let run = 1
      for (; done + run < count && this.#next[slot] === slot + 1; run++) slot++
      counters.diskReads++
      try {
        await this.#device.read(to + done * slotBytes, run * slotBytes, from * slotBytes)
      } catch (error) {
        counters.readErrors++
        if (this.#isStale(first, stamp)) return
        throw new TmemError('TMEM_IO', `swap file ${this.file}: slot ${from} cannot be read: ${String(error)}`, {
          layer: 'frontswap',
          handle: `slot ${from}`,
          cause: error,
        })
      }
      counters.diskBytesRead += run * slotBytes
      done += run
    }
  }

  #check(first: number, page: Uint8Array): void {
    let slot = first
    for (let at = 0; at < page.length; at += slotBytes, slot = this.#next[slot]!) {
      if (crc32(page.subarray(at, at + slotBytes)) === this.#checksums[slot]) continue
      this.counters.corruptSlots++
      throw new TmemError('TMEM_CORRUPT', `swap file ${this.file}: slot ${slot} came back altered`, {
        layer: 'frontswap',
        handle: `slot ${slot}`,
      })
    }
  }
}

type Reserve = (bytes: number, part: string) => ArrayBufferLike

/** Throws `RangeError` unless an area can have that many bytes of pages. */
export function checkSize(sizeBytes: number): void {
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < slotBytes || sizeBytes % slotBytes !== 0)
    throw new RangeError(`the size of a swap area must be a positive multiple of ${slotBytes} bytes, got ${sizeBytes}`)
  if (sizeBytes / slotBytes >= maxSlots)
    throw new RangeError(`a swap area holds at most ${(maxSlots - 1) * slotBytes} bytes of pages, got ${sizeBytes}`)
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
  readonly bytes: number
  free = 0
  readonly #free: Int32Array
  readonly #some: Int32Array
  readonly #whole: Int32Array
  /** Where the next search begins. */
  #cursor = 0

  constructor(slots: number, reserve: Reserve) {
    const words = Math.ceil(slots / 32)
    const summary = Math.ceil(words / 32)
    this.bytes = (words + 2 * summary) * 4
    const memory = reserve(this.bytes, 'slots')
    this.#free = new Int32Array(memory, 0, words)
    this.#some = new Int32Array(memory, words * 4, summary)
    this.#whole = new Int32Array(memory, (words + summary) * 4, summary)
    for (let slot = 1; slot < slots; slot++) this.give(slot)
  }

  /** Takes a free slot: the next one of the group in use, else of the next group that is wholly free, else of any. There is one. */
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

/** Room for reads under way, in slots; who finds none waits in turn. */
class Places {
  readonly #taken: Uint8Array
  readonly #waiting: { count: number; resolve: (place: number) => void }[] = []

  constructor(size: number) {
    this.#taken = new Uint8Array(size)
  }

  /** The first of `count` neighbouring places, or `undefined` when there are none now (or others wait already). */
  take(count: number): number | undefined {
    return this.#waiting.length === 0 ? this.#find(count) : undefined
  }

  wait(count: number): Promise<number> {
    return new Promise((resolve) => this.#waiting.push({ count, resolve }))
  }

  give(place: number, count: number): void {
    this.#taken.fill(0, place, place + count)
    for (let first = this.#waiting[0]; first !== undefined; first = this.#waiting[0]) {
      const found = this.#find(first.count)
      if (found === undefined) return
      this.#waiting.shift()
      first.resolve(found)
    }
  }

  #find(count: number): number | undefined {
    const taken = this.#taken
    for (let place = 0, run = 0; place < taken.length; place++) {
      run = taken[place] === 0 ? run + 1 : 0
      if (run < count) continue
      const from = place - count + 1
      taken.fill(1, from, place + 1)
      return from
    }
    return undefined
  }
}
