/**
 * Frontswap: a shadow in front of every swap area. A page on its way to a slot is first offered to the backends, the
 * one that registered last first; whether one of them or the slot on disk has it is known by one bit per slot, the
 * frontswap map, and by nothing else.
 *
 * Invariants:
 *  - A bit is set exactly while one backend was told to keep the page of that slot and not yet told to drop it.
 *  - Before a slot is stored to again its bit is cleared, and every backend is told to drop what it holds of it: the
 *    new page may go to another backend than the old one. So after a refused store nobody has a page of that slot.
 *  - The pages of a type are the bits set in its map.
 *
 * The kernel has one pool for all; here pages may belong to several owners (clients, page sizes) with a pool each, so
 * that each is charged for its own pages. Owner 0 is enough for most.
 *
 * DEVIATION: an exclusive load drops the backend's copy itself. The original trusted the backend to have done it and
 * leaked the page when it had not: later invalidates see a clear bit. DEVIATION: swapoff tells the backend before it
 * gives the map up. Linux 3.10 did it the other way round, so the backend was never told. DEVIATION: a backend that
 * registers twice is refused; the kernel's list of them would become a ring.
 *
 * Source: mm/frontswap.c of Linux 4.2 on, which has several backends (commit d1dc6f1bcf1e), with writethrough and
 * exclusive loads, which were dropped before 6.5; mm/swapfile.c. As described in the reference notes.
 */
import {
  type Allocator,
  checkedAttributes,
  checkOptions,
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
  /** Of the backends that keep such pages, the last that registered first. */
  readonly pools: Pool[]
}

const noPools: readonly Pool[] = []

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
  /** The last that registered first. */
  readonly #backends: PageStore[] = []
  /** Scratch: the entries of a batch that were offered. */
  readonly #offered: Uint16Array = new Uint16Array(largestBatch)

  constructor(options: FrontswapOptions) {
    checkOptions('Frontswap', options, {
      allocator: 'object',
      writethrough: 'flag?',
      exclusiveLoads: 'flag?',
      markDirty: 'function?',
    })
    this.#allocator = options.allocator
    this.writethrough = options.writethrough ?? false
    this.exclusiveLoads = options.exclusiveLoads ?? false
    this.#markDirty = options.markDirty
  }

  /** True when a backend is registered. */
  get enabled(): boolean {
    return this.#backends.length > 0
  }

  /** Pages in the backends: the sum over all types. */
  get currPages(): number {
    let pages = 0
    for (const type of this.#types) pages += type?.pages ?? 0
    return pages
  }

  /** Areas in use, by type. */
  get areas(): readonly (SwapArea | undefined)[] {
    return this.#types.map((type) => type?.area)
  }

  /** Pages of a type that are in the backends. */
  pagesOf(type: number): number {
    return this.#types[type]?.pages ?? 0
  }

  /**
   * Registers a backend, before or after swapon: pools are made for the owners that there are, and from then on it is
   * the first that pages are offered to. There is no unregister. Throws `TypeError` when it is registered already.
   */
  register(backend: PageStore): void {
    if (this.#backends.includes(backend)) throw new TypeError(`frontswap has that backend already: ${backend.name}`)
    for (const owner of this.#owners) owner?.pools.unshift(...poolsIn([backend], owner.attributes))
    this.#backends.unshift(backend)
  }

  /**
   * Adds an owner of pages, with a pool of its own in each backend. Its pages bypass a backend that has no pool
   * for it. `attributes` must be persistent and private.
   */
  addOwner(owner: number, attributes: PoolAttributes): void {
    if (this.#owners[owner] !== undefined) throw new RangeError(`frontswap has an owner ${owner} already`)
    const kept = checkedAttributes(attributes)
    if (!kept.persistent || kept.shared) throw new RangeError('frontswap keeps persistent private pages only')
    this.#owners[owner] = { attributes: kept, pools: poolsIn(this.#backends, kept) }
  }

  /** Removes an owner, all of whose pages have been invalidated, and its pools. */
  removeOwner(owner: number): void {
    for (const pool of this.poolsOf(owner)) pool.destroy()
    this.#owners[owner] = undefined
  }

  /** The pools of an owner, that of the backend which registered last first. */
  poolsOf(owner: number): readonly Pool[] {
    return this.#owners[owner]?.pools ?? noPools
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

  /** Frees the slot of a page that nobody needs any more, and tells the backends. */
  swapFree(entry: number, owner = 0): void {
    this.invalidatePage(entry, owner)
    this.#type(entry).area.free(swapOffset(entry))
  }

  /** Whether a backend has the page of that entry. */
  test(entry: number): boolean {
    const { map } = this.#type(entry)
    const offset = swapOffset(entry)
    return map !== undefined && (map[offset >>> 5]! & (1 << (offset & 31))) !== 0
  }

  /**
   * Offers a page to the backends, until one takes it. `Stored`: no write is needed. Anything else (the answer of the
   * last one): write it to its slot; no backend holds anything of it, except in writethrough mode, where a page that
   * was taken answers `Policy`.
   */
  store(entry: number, page: Uint8Array, owner = 0): PutOutcome {
    const type = this.#type(entry)
    const pools = this.poolsOf(owner)
    let outcome: PutOutcome = PutOutcome.Unavailable
    if (type.map === undefined || pools.length === 0) return outcome
    this.#dropOld(type, entry, pools)
    for (const pool of pools) {
      outcome = pool.put(swapObject(entry), swapIndex(entry), page)
      if (outcome === PutOutcome.Stored) break
    }
    return this.#stored(type, entry, outcome, pools)
  }

  /**
   * Offers the pages of a batch whose outcomes are `Pending`, in one call for each backend. The batch has them under
   * `swapObject` and `swapIndex`; `entries` has the swap entry of each. The outcomes become those of `store`.
   */
  storeMany(batch: PageBatch, entries: Uint32Array, owner = 0): void {
    const pools = this.poolsOf(owner)
    const { outcomes } = batch
    let offered = 0
    for (let n = 0; n < batch.length; n++) {
      if (outcomes[n] !== Pending) continue
      const type = this.#type(entries[n]!)
      if (type.map === undefined || pools.length === 0) outcomes[n] = PutOutcome.Unavailable
      else {
        this.#dropOld(type, entries[n]!, pools)
        this.#offered[offered++] = n
      }
    }
    if (offered === 0) return
    for (const [place, pool] of pools.entries()) {
      // What the backends before have refused. What they took, the others are told to drop: they hold nothing of it.
      if (place > 0)
        for (let at = 0; at < offered; at++) {
          const n = this.#offered[at]!
          if (outcomes[n] !== PutOutcome.Stored) outcomes[n] = Pending
        }
      pool.putMany(batch)
    }
    for (let at = 0; at < offered; at++) {
      const n = this.#offered[at]!
      outcomes[n] = this.#stored(this.#type(entries[n]!), entries[n]!, outcomes[n] as PutOutcome, pools)
    }
  }

  /**
   * Loads a page. `Miss`: read its slot. (A miss with the bit set, see `test`, means that a backend lost it: only in
   * writethrough mode has the slot a copy.) `Deferred`: await `fetch`.
   */
  load(entry: number, into: Uint8Array, owner = 0): GetOutcome {
    if (!this.test(entry)) return GetOutcome.Miss
    const pools = this.poolsOf(owner)
    let outcome: GetOutcome = GetOutcome.Miss
    for (const pool of pools) {
      outcome = pool.get(swapObject(entry), swapIndex(entry), into)
      if (outcome !== GetOutcome.Miss) break
    }
    return this.#loaded(entry, outcome, pools)
  }

  /**
   * As `load`, waiting where that is needed: `Hit` or `Miss`. As under the kernel's page lock, one call per entry at a
   * time.
   */
  async fetch(entry: number, into: Uint8Array, owner = 0): Promise<GetOutcome> {
    if (!this.test(entry)) return GetOutcome.Miss
    const pools = this.poolsOf(owner)
    return this.#loaded(entry, await fetched(pools, entry, into), pools)
  }

  /** Tells the backends to drop a page, if the bit says that one has it. */
  invalidatePage(entry: number, owner = 0): void {
    if (!this.test(entry)) return
    this.#dropOld(this.#type(entry), entry, this.poolsOf(owner))
    this.counters.invalidates++
  }

  /** Tells the backends to drop all pages of a type. */
  invalidateArea(type: number): void {
    const found = this.#types[type]
    if (found?.map === undefined) return
    for (const owner of this.#owners)
      for (const pool of owner?.pools ?? noPools)
        for (let low = 0; low <= swizzleMask; low++) pool.flushObject((type << swizzleBits) | low)
    found.pages = 0
    found.map.fill(0)
  }

  /**
   * Takes an area out of use: pulls all of its pages back, tells the backends, then gives the type free. False (and the
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
   * Partial swapoff: pulls pages out of the backends until `target` are left, but from one area only (the first, by
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

  /** Pulls pages of a type back: only those in the backends, or all; at most `limit`, 0 for no limit. */
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
    if ((await fetched(this.poolsOf(owner), entry, frame)) === GetOutcome.Hit) {
      this.counters.loads++
      return true
    }
    if (this.test(entry)) {
      if (this.writethrough) return area.read(swapOffset(entry), frame)
      throw lost(entry)
    }
    return false
  }

  /** If a backend has a page of that entry: no longer. Not counted. */
  #dropOld(type: SwapType, entry: number, pools: readonly Pool[]): void {
    if (!this.test(entry)) return
    this.#clear(type, entry)
    for (const pool of pools) pool.flushPage(swapObject(entry), swapIndex(entry))
  }

  #stored(type: SwapType, entry: number, outcome: PutOutcome, pools: readonly Pool[]): PutOutcome {
    if (outcome !== PutOutcome.Stored) {
      this.counters.failed_stores++
      // A batch may name an entry twice.
      this.#dropOld(type, entry, pools)
      return outcome
    }
    this.counters.succ_stores++
    if (!this.test(entry)) this.#set(type, entry)
    return this.writethrough ? PutOutcome.Policy : outcome
  }

  #loaded(entry: number, outcome: GetOutcome, pools: readonly Pool[]): GetOutcome {
    if (outcome !== GetOutcome.Hit) return outcome
    this.counters.loads++
    if (this.exclusiveLoads && this.test(entry)) {
      this.#markDirty?.(entry)
      this.#dropOld(this.#type(entry), entry, pools)
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
  constructor(options: SelfShrinkOptions = {}) {
    checkOptions('SelfShrink', options, { hysteresis: 'number?', inertia: 'number?' })
    const { hysteresis = 20, inertia = 3 } = options
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

/** A new pool in each of the backends that keep such pages. */
function poolsIn(backends: readonly PageStore[], attributes: PoolAttributes): Pool[] {
  return backends.map((backend) => backend.newPool(attributes)).filter((pool) => typeof pool !== 'number')
}

/** Fetches a page from the first pool that has it. */
async function fetched(pools: readonly Pool[], entry: number, into: Uint8Array): Promise<GetOutcome> {
  for (const pool of pools)
    if ((await pool.fetch(swapObject(entry), swapIndex(entry), into)) === GetOutcome.Hit) return GetOutcome.Hit
  return GetOutcome.Miss
}
