/**
 * Frontswap: a shadow in front of every swap area. A page on its way to a slot is first offered to a backend; whether
 * the backend or the slot on disk has it is known by one bit per slot, the frontswap map, and by nothing else.
 *
 * Invariants:
 *  - A bit is set exactly while the backend was told to keep the page of that slot and not yet told to drop it.
 *  - After a refused store the bit is clear and the backend has been told to drop whatever it held of that slot.
 *  - The pages of a type are the bits set in its map.
 *
 * The kernel has one pool for all; here pages may belong to several owners (clients, page sizes) with a pool each, so
 * that each is charged for its own pages. Owner 0 is enough for most.
 *
 * DEVIATION: an exclusive load drops the backend's copy itself. The original trusted the backend to have done it and
 * leaked the page when it had not: later invalidates see a clear bit. DEVIATION: swapoff tells the backend before it
 * gives the map up. Linux 3.10 did it the other way round, so the backend was never told. DEVIATION: a second backend
 * is refused, as cleancache does from 4.1 on; the original put the new one in the place of the old, whose pages were
 * then lost.
 *
 * Source: mm/frontswap.c and mm/swapfile.c of Linux 3.5 to 3.10 as described in the reference notes.
 */
import {
  type Allocator,
  checkedAttributes,
  GetOutcome,
  type PageBatch,
  type PageStore,
  Pending,
  type Pool,
  type PoolAttributes,
  PutOutcome,
  TmemError,
} from '@tmem/core'
import { noSlot, type SwapArea } from './swap-area.ts'

/** Largest number of swap types (areas) at once. */
export const maxTypes = 32
/** Most entries that a `PageBatch` can have. */
const largestBatch = 65_536
/** No swap entry: slot 0 of type 0 is a header. */
export const noEntry = 0

const offsetBits = 26
const offsetMask: number = 2 ** offsetBits - 1
/** Low bits of the offset that go into the object id, which spreads the pages of a type over 256 objects. */
const swizzleBits = 8
const swizzleMask: number = 2 ** swizzleBits - 1

/** A swap entry: type and offset (slot) in one integer. */
export const swapEntry = (type: number, offset: number): number => (type << offsetBits) | offset
/** The type of a swap entry. */
export const swapType = (entry: number): number => entry >>> offsetBits
/** The offset (slot) of a swap entry. */
export const swapOffset = (entry: number): number => entry & offsetMask
/** Object id under which a backend knows a swap entry: `type << 8 | offset & 255`. */
export const swapObject = (entry: number): number =>
  (swapType(entry) << swizzleBits) | (swapOffset(entry) & swizzleMask)
/** Index under which a backend knows a swap entry: `offset >> 8`. */
export const swapIndex = (entry: number): number => swapOffset(entry) >>> swizzleBits

/** How a `Frontswap` works. */
export interface FrontswapOptions {
  readonly allocator: Allocator
  /** True: every page is written to its slot as well, so that the backend may lose it. Default false. */
  readonly writethrough?: boolean
  /** True: a load takes the page out of the backend; `markDirty` is told that its slot holds nothing. Default false. */
  readonly exclusiveLoads?: boolean
  /** Told of each page that an exclusive load made the only copy: it must be stored again before it is dropped. */
  readonly markDirty?: (entry: number) => void
}

/** Where pages go that a partial or whole swapoff pulls back into memory. */
export interface Unuse {
  /** Whether memory for so many pages may be had (the trial charge of the original). Default: yes. */
  mayCommit?(pages: number): boolean
  /** A frame of the page's size for the page of that entry; `undefined` when there is no memory for it now. */
  frame(entry: number): Uint8Array | undefined
  /**
   * True: the page is in the frame, dirty, and its slot is free. False: the page went away while it was being read, the
   * frame is not needed.
   */
  done(entry: number, frame: Uint8Array, moved: boolean): void
  /** Whose page that is. Default: owner 0. */
  owner?(entry: number): number
}

/** What a partial swapoff did. */
export interface Shrunk {
  /** Pages pulled back. */
  readonly pages: number
  /** True when it stopped for want of memory (-ENOMEM). */
  readonly outOfMemory: boolean
}

/** Counters under their historical names. */
export interface FrontswapCounters {
  /** Successful loads. */
  loads: number
  /** Accepted stores, duplicates and writethrough included. */
  succ_stores: number
  /** Refused stores that reached the backend. */
  failed_stores: number
  /** Pages invalidated singly whose bit was set. */
  invalidates: number
}

interface SwapType {
  readonly area: SwapArea
  /** The frontswap map; undefined when the area opted out. */
  readonly map: Int32Array | undefined
  /** Bits set. */
  pages: number
  /** False while the area is being emptied: no slot of it is given out. */
  writable: boolean
}

interface Owner {
  readonly attributes: PoolAttributes
  /** Undefined while there is no backend, or when it does not keep such pages. */
  pool: Pool | undefined
}

export class Frontswap {
  readonly counters: FrontswapCounters = { loads: 0, succ_stores: 0, failed_stores: 0, invalidates: 0 }
  /** May be switched at any time; pages stored before are not written again. */
  writethrough: boolean
  exclusiveLoads: boolean
  readonly #allocator: Allocator
  readonly #markDirty: ((entry: number) => void) | undefined
  readonly #types: (SwapType | undefined)[] = []
  /** Types by priority, the highest first; of equal ones the next to be used first. */
  readonly #order: number[] = []
  readonly #owners: (Owner | undefined)[] = []
  #backend: PageStore | undefined
  /** Scratch: the entries of a batch that were offered. */
  readonly #offered: Uint16Array = new Uint16Array(largestBatch)

  constructor(options: FrontswapOptions) {
    this.#allocator = options.allocator
    this.writethrough = options.writethrough ?? false
    this.exclusiveLoads = options.exclusiveLoads ?? false
    this.#markDirty = options.markDirty
  }

  /** True when a backend is registered. */
  get enabled(): boolean {
    return this.#backend !== undefined
  }

  /** Pages in the backend: the sum over all types. */
  get currPages(): number {
    let pages = 0
    for (const type of this.#types) pages += type?.pages ?? 0
    return pages
  }

  /** Areas in use, by type. */
  get areas(): readonly (SwapArea | undefined)[] {
    return this.#types.map((type) => type?.area)
  }

  /** Pages of a type that are in the backend. */
  pagesOf(type: number): number {
    return this.#types[type]?.pages ?? 0
  }

  /**
   * Registers the backend, before or after swapon: pools are made for the owners that wait, then stores begin. There is
   * no unregister. Throws `TypeError` when there is one already.
   */
  register(backend: PageStore): void {
    if (this.#backend !== undefined) throw new TypeError(`frontswap has a backend already: ${this.#backend.name}`)
    for (const owner of this.#owners) if (owner !== undefined) owner.pool = poolFor(backend, owner.attributes)
    // Published last: a store never meets a backend that is not ready.
    this.#backend = backend
  }

  /**
   * Adds an owner of pages, with a pool of its own in the backend. Its pages bypass frontswap when the backend has no
   * pool for it. `attributes` must be persistent and private.
   */
  addOwner(owner: number, attributes: PoolAttributes): void {
    if (this.#owners[owner] !== undefined) throw new RangeError(`frontswap has an owner ${owner} already`)
    const kept = checkedAttributes(attributes)
    if (!kept.persistent || kept.shared) throw new RangeError('frontswap keeps persistent private pages only')
    this.#owners[owner] = { attributes: kept, pool: this.#backend && poolFor(this.#backend, kept) }
  }

  /** Removes an owner, all of whose pages have been invalidated, and its pool. */
  removeOwner(owner: number): void {
    this.#owners[owner]?.pool?.destroy()
    this.#owners[owner] = undefined
  }

  /** The pool of an owner in the backend, if there is one. */
  poolOf(owner: number): Pool | undefined {
    return this.#owners[owner]?.pool
  }

  /**
   * Brings an area into use under the lowest free type, with a map unless it opted out. Throws `TmemError` with
   * `TMEM_NO_MEMORY` when there is no memory for the map, `RangeError` when all types are in use.
   */
  swapon(area: SwapArea): number {
    let type = 0
    while (this.#types[type] !== undefined) type++
    if (type === maxTypes) throw new RangeError(`all ${maxTypes} swap types are in use`)
    const words = Math.ceil(area.slots / 32)
    const memory = area.frontswap ? this.#allocator.allocate(words * 4, 'frontswap.map') : undefined
    if (area.frontswap && memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `no memory for the frontswap map of ${area.file} (${words * 4} bytes)`, {
        layer: 'frontswap',
      })
    const map = memory && new Int32Array(memory, 0, words)
    this.#types[type] = { area, map, pages: 0, writable: true }
    const behind = this.#order.findIndex((other) => this.#types[other]!.area.priority < area.priority)
    this.#order.splice(behind < 0 ? this.#order.length : behind, 0, type)
    return type
  }

  /**
   * Takes `slots` slots for a page in the area of highest priority that has them (areas of equal priority in turn,
   * group by group). Answers the swap entry, or `noEntry`.
   */
  getSwapPage(slots = 1): number {
    const order = this.#order
    for (let place = 0; place < order.length; place++) {
      const type = order[place]!
      const { area, writable } = this.#types[type]!
      if (!writable) continue
      const offset = area.allocate(slots)
      if (offset === noSlot) continue
      // The end of a group of 32 slots: the next of the same priority has its turn.
      if ((offset & 31) === 31) this.#requeue(place)
      return swapEntry(type, offset)
    }
    return noEntry
  }

  /** Frees the slot of a page that nobody needs any more, and tells the backend. */
  swapFree(entry: number, owner = 0): void {
    this.invalidatePage(entry, owner)
    this.#type(entry).area.free(swapOffset(entry))
  }

  /** Whether the backend has the page of that entry. */
  test(entry: number): boolean {
    const { map } = this.#type(entry)
    const offset = swapOffset(entry)
    return map !== undefined && (map[offset >>> 5]! & (1 << (offset & 31))) !== 0
  }

  /**
   * Offers a page to the backend. `Stored`: no write is needed. Anything else: write it to its slot; the backend holds
   * nothing of it, except in writethrough mode, where a page that was taken answers `Policy`.
   */
  store(entry: number, page: Uint8Array, owner = 0): PutOutcome {
    const type = this.#type(entry)
    const pool = this.#owners[owner]?.pool
    if (type.map === undefined || pool === undefined) return PutOutcome.Unavailable
    const outcome = pool.put(swapObject(entry), swapIndex(entry), page)
    return this.#stored(entry, outcome, pool)
  }

  /**
   * Offers the pages of a batch whose outcomes are `Pending` in one call. The batch has them under `swapObject` and
   * `swapIndex`; `entries` has the swap entry of each. The outcomes become those of `store`.
   */
  storeMany(batch: PageBatch, entries: Uint32Array, owner = 0): void {
    const pool = this.#owners[owner]?.pool
    let offered = 0
    for (let n = 0; n < batch.length; n++) {
      if (batch.outcomes[n] !== Pending) continue
      if (pool === undefined || this.#type(entries[n]!).map === undefined) batch.outcomes[n] = PutOutcome.Unavailable
      else this.#offered[offered++] = n
    }
    if (pool === undefined || offered === 0) return
    pool.putMany(batch)
    for (let place = 0; place < offered; place++) {
      const n = this.#offered[place]!
      batch.outcomes[n] = this.#stored(entries[n]!, batch.outcomes[n] as PutOutcome, pool)
    }
  }

  /**
   * Loads a page. `Miss`: read its slot. (A miss with the bit set, see `test`, means that the backend lost it: only in
   * writethrough mode has the slot a copy.) `Deferred`: await `fetch`.
   */
  load(entry: number, into: Uint8Array, owner = 0): GetOutcome {
    const pool = this.#owners[owner]?.pool
    if (pool === undefined || !this.test(entry)) return GetOutcome.Miss
    return this.#loaded(entry, pool.get(swapObject(entry), swapIndex(entry), into), pool)
  }

  /**
   * As `load`, waiting where that is needed: `Hit` or `Miss`. As under the kernel's page lock, one call per entry at a
   * time.
   */
  async fetch(entry: number, into: Uint8Array, owner = 0): Promise<GetOutcome> {
    const pool = this.#owners[owner]?.pool
    if (pool === undefined || !this.test(entry)) return GetOutcome.Miss
    return this.#loaded(entry, await pool.fetch(swapObject(entry), swapIndex(entry), into), pool)
  }

  /** Tells the backend to drop a page, if the bit says that it has it. */
  invalidatePage(entry: number, owner = 0): void {
    if (!this.test(entry)) return
    this.#owners[owner]?.pool?.flushPage(swapObject(entry), swapIndex(entry))
    this.#clear(this.#type(entry), entry)
    this.counters.invalidates++
  }

  /** Tells the backend to drop all pages of a type. */
  invalidateArea(type: number): void {
    const found = this.#types[type]
    if (found?.map === undefined) return
    for (const owner of this.#owners)
      for (let low = 0; low <= swizzleMask; low++) owner?.pool?.flushObject((type << swizzleBits) | low)
    found.pages = 0
    found.map.fill(0)
  }

  /**
   * Takes an area out of use: pulls all of its pages back, tells the backend, then gives the type free. False (and the
   * area in use again, with the pages that are left) when `unuse` has no memory. Rejects when a page cannot be read.
   * The area is not closed.
   */
  async swapoff(type: number, unuse: Unuse): Promise<boolean> {
    const found = this.#types[type]
    if (found === undefined || !found.writable) throw new RangeError(`swap type ${type} is not in use`)
    found.writable = false
    let done = false
    try {
      const pages = found.area.usedSlots
      if (unuse.mayCommit?.(pages) === false) return false
      done = !(await this.#unuse(type, unuse, false, 0)).outOfMemory
      if (!done) return false
      this.invalidateArea(type)
      this.#types[type] = undefined
      this.#order.splice(this.#order.indexOf(type), 1)
      return true
    } finally {
      found.writable = !done
    }
  }

  /**
   * Partial swapoff: pulls pages out of the backend until `target` are left, but from one area only (the first, by
   * priority, that may commit the memory); call again for more.
   */
  async shrink(target: number, unuse: Unuse): Promise<Shrunk> {
    const excess = this.currPages - target
    let outOfMemory = false
    if (excess <= 0) return { pages: 0, outOfMemory }
    for (const type of this.#order) {
      const { pages: held } = this.#types[type]!
      if (held === 0) continue
      const pages = Math.min(excess, held)
      if (unuse.mayCommit?.(pages) === false) {
        outOfMemory = true
        continue
      }
      return await this.#unuse(type, unuse, true, excess < held ? pages : 0)
    }
    return { pages: 0, outOfMemory }
  }

  /** Pulls pages of a type back: only those in the backend, or all; at most `limit`, 0 for no limit. */
  async #unuse(type: number, unuse: Unuse, onlyFrontswap: boolean, limit: number): Promise<Shrunk> {
    const { area } = this.#types[type]!
    let pages = 0
    for (let slot = area.nextPage(1); slot !== noSlot; slot = area.nextPage(slot + 1)) {
      const entry = swapEntry(type, slot)
      if (onlyFrontswap && !this.test(entry)) continue
      const frame = unuse.frame(entry)
      if (frame === undefined) return { pages, outOfMemory: true }
      const owner = unuse.owner?.(entry) ?? 0
      const stamp = area.stamp(slot)
      let moved = false
      try {
        moved = (await this.#pull(entry, frame, owner)) && area.stamp(slot) === stamp
      } finally {
        if (moved) this.swapFree(entry, owner)
        unuse.done(entry, frame, moved)
      }
      if (moved && ++pages === limit) break
    }
    return { pages, outOfMemory: false }
  }

  /** Reads a page from wherever it is. False when it changed meanwhile. */
  async #pull(entry: number, frame: Uint8Array, owner: number): Promise<boolean> {
    const { area } = this.#type(entry)
    if (!this.test(entry)) return area.read(swapOffset(entry), frame)
    const pool = this.#owners[owner]?.pool
    const outcome = await pool?.fetch(swapObject(entry), swapIndex(entry), frame)
    if (outcome === GetOutcome.Hit) {
      this.counters.loads++
      return true
    }
    if (this.test(entry)) {
      if (this.writethrough) return area.read(swapOffset(entry), frame)
      throw lost(entry)
    }
    return false
  }

  #stored(entry: number, outcome: PutOutcome, pool: Pool): PutOutcome {
    const type = this.#type(entry)
    const duplicate = this.test(entry)
    if (outcome === PutOutcome.Stored) {
      this.counters.succ_stores++
      if (!duplicate) this.#set(type, entry)
      return this.writethrough ? PutOutcome.Policy : outcome
    }
    this.counters.failed_stores++
    if (duplicate) {
      this.#clear(type, entry)
      pool.flushPage(swapObject(entry), swapIndex(entry))
    }
    return outcome
  }

  #loaded(entry: number, outcome: GetOutcome, pool: Pool): GetOutcome {
    if (outcome !== GetOutcome.Hit) return outcome
    this.counters.loads++
    if (this.exclusiveLoads && this.test(entry)) {
      this.#markDirty?.(entry)
      pool.flushPage(swapObject(entry), swapIndex(entry))
      this.#clear(this.#type(entry), entry)
    }
    return outcome
  }

  #type(entry: number): SwapType {
    const type = this.#types[swapType(entry)]
    if (type === undefined) throw new RangeError(`swap type ${swapType(entry)} is not in use`)
    return type
  }

  #set(type: SwapType, entry: number): void {
    const offset = swapOffset(entry)
    type.map![offset >>> 5] = type.map![offset >>> 5]! | (1 << (offset & 31))
    type.pages++
  }

  #clear(type: SwapType, entry: number): void {
    const offset = swapOffset(entry)
    type.map![offset >>> 5] = type.map![offset >>> 5]! & ~(1 << (offset & 31))
    type.pages--
  }

  /** Moves the type at that place behind the others of its priority. */
  #requeue(place: number): void {
    const order = this.#order
    const priority = (at: number): number => this.#types[order[at]!]!.area.priority
    const [type] = order.splice(place, 1)
    let at = place
    while (at < order.length && priority(at) === this.#types[type!]!.area.priority) at++
    order.splice(at, 0, type!)
  }
}

/** When pages are to come back by themselves; the defaults are those of Xen's selfballooning and of ramster. */
export interface SelfShrinkOptions {
  /** One page in so many comes back at a time; this many or fewer all at once. A positive integer, default 20. */
  readonly hysteresis?: number
  /** Calls to wait after the number of pages has grown. Default 3. */
  readonly inertia?: number
}

/**
 * Frontswap never gives a page up by itself: what was swapped out once and is not needed stays in the backend. This
 * decides, each time it is asked (every 5 seconds in the original), down to how many pages to `shrink`: a little at a
 * time, and not while the number grows.
 */
export class SelfShrink {
  readonly #hysteresis: number
  readonly #inertia: number
  #last = 0
  #left = 0

  /** Throws `RangeError` unless both are integers, `hysteresis` positive and `inertia` not negative. */
  constructor({ hysteresis = 20, inertia = 3 }: SelfShrinkOptions = {}) {
    if (!Number.isInteger(hysteresis) || hysteresis < 1 || !Number.isInteger(inertia) || inertia < 0)
      throw new RangeError(`hysteresis and inertia must be counts, got ${hysteresis} and ${inertia}`)
    this.#hysteresis = hysteresis
    this.#inertia = inertia
  }

  /** The target for `shrink`, or `undefined`: not now. `currPages` is that of the `Frontswap`. */
  target(currPages: number): number | undefined {
    const grew = currPages > this.#last
    this.#last = currPages
    if (grew || currPages === 0) this.#left = this.#inertia
    else if (this.#left > 0) this.#left--
    if (grew || currPages === 0 || this.#left > 0) return undefined
    return currPages <= this.#hysteresis ? 0 : currPages - Math.floor(currPages / this.#hysteresis)
  }
}

/** A backend broke its promise to keep an accepted page. */
const lost = (entry: number): TmemError =>
  new TmemError('TMEM_CORRUPT', 'the store in front of the swap area lost a page that it had accepted', {
    layer: 'frontswap',
    handle: `swap type ${swapType(entry)} offset ${swapOffset(entry)}`,
  })

function poolFor(backend: PageStore, attributes: PoolAttributes): Pool | undefined {
  const pool = backend.newPool(attributes)
  return typeof pool === 'number' ? undefined : pool
}
