/**
 * The guest's side in Linux: the shims that turn hooks of cleancache and frontswap into hypercalls, and the
 * selfballooning driver, which gives memory back on its own.
 *
 * Put and get succeed only with the result 1; everything else is "not stored" or "not there", also what Xen calls an
 * error. Pages are copied through frames of the guest that nobody else uses.
 *
 * DEVIATION: a hypercall of the original never returned before it was done. Here the host may have to wait for a disk:
 * a get is then answered `Deferred`, and the fetch of the same page returns it.
 *
 * Source: drivers/xen/tmem.c and drivers/xen/xen-selfballoon.c of Linux as described in the reference notes, §8.
 */
import { checkOptions, GetOutcome, type ObjectId, type OptionNames } from '@tmem/core'
import { PoolBit, pageBytes } from './abi.ts'
import { GuestCalls } from './calls.ts'
import type { Domain } from './clients.ts'
import type { XenHost } from './host.ts'

const megabytePages = 256

/** Hypercalls as the shims of a guest kernel make them. */
export class LinuxGuest {
  readonly #calls: GuestCalls
  #frontswapPool = -1

  /**
   * `firstFrame`: the first of three frames, one after the other, that are the shims' own. Throws `RangeError` when
   * they are not there.
   */
  constructor(host: XenHost, domain: Domain, firstFrame: number) {
    this.#calls = new GuestCalls(host, domain, firstFrame, 1)
  }

  /** NEW_POOL; the id is the low word of the result. */
  newPool(flags: number, uuid: Uint8Array | undefined, size: number): number {
    return this.#calls.newPool(flags, uuid, size)
  }

  destroyPool(pool: number): void {
    this.#calls.destroyPool(pool)
  }

  /** True: the page was stored. */
  put(pool: number, object: ObjectId, index: number, page: Uint8Array): boolean {
    return this.#calls.put(pool, object, index, page) === 1
  }

  get(pool: number, object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    const answer = this.#calls.get(pool, object, index, into)
    if (answer === undefined) return GetOutcome.Deferred
    return answer === 1 ? GetOutcome.Hit : GetOutcome.Miss
  }

  async fetch(pool: number, object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    return (await this.#calls.fetch(pool, object, index, into)) === 1 ? GetOutcome.Hit : GetOutcome.Miss
  }

  flushPage(pool: number, object: ObjectId, index: number): void {
    this.#calls.flushPage(pool, object, index)
  }

  flushObject(pool: number, object: ObjectId): void {
    this.#calls.flushObject(pool, object)
  }

  // ---- Frontswap: one persistent pool for all areas
  // ------------------------------------------------------------------

  /** Makes the pool, once; false: there is none, and every page goes to its slot. */
  frontswapInit(): boolean {
    if (this.#frontswapPool < 0) this.#frontswapPool = this.newPool(PoolBit.Persistent, undefined, pageBytes)
    return this.#frontswapPool >= 0
  }

  /** True: stored. An offset of more than 32 bits is not. */
  frontswapStore(type: number, offset: number, page: Uint8Array): boolean {
    if (this.#frontswapPool < 0 || offset > 0xffffffff) return false
    return this.put(this.#frontswapPool, swapObject(type, offset), swapIndex(offset), page)
  }

  frontswapLoad(type: number, offset: number, into: Uint8Array): GetOutcome {
    if (this.#frontswapPool < 0) return GetOutcome.Miss
    return this.get(this.#frontswapPool, swapObject(type, offset), swapIndex(offset), into)
  }

  async frontswapFetch(type: number, offset: number, into: Uint8Array): Promise<GetOutcome> {
    if (this.#frontswapPool < 0) return GetOutcome.Miss
    return this.fetch(this.#frontswapPool, swapObject(type, offset), swapIndex(offset), into)
  }

  frontswapInvalidatePage(type: number, offset: number): void {
    if (this.#frontswapPool >= 0) this.flushPage(this.#frontswapPool, swapObject(type, offset), swapIndex(offset))
  }

  frontswapInvalidateArea(type: number): void {
    for (let low = 15; low >= 0 && this.#frontswapPool >= 0; low--)
      this.flushObject(this.#frontswapPool, swapObject(type, low))
  }
}

/** The object of a swap slot: 16 for each area, so that an area is not one object. */
const swapObject = (type: number, offset: number): number => type * 16 + (offset % 16)
const swapIndex = (offset: number): number => Math.floor(offset / 16)

/**
 * Cleancache's operations over hypercalls: what `Cleancache.register` of @tmem/cleancache takes. An index of more than
 * 32 bits is not cached.
 */
export function linuxCleancache(guest: LinuxGuest): LinuxCleancache {
  const isIndex = (index: number): boolean => index <= 0xffffffff
  return {
    name: 'xen',
    initFs: (size) => guest.newPool(0, undefined, size),
    initSharedFs: (uuid, size) => guest.newPool(PoolBit.Shared, uuid, size),
    putPage(pool, key, index, page) {
      if (isIndex(index)) guest.put(pool, key, index, page)
    },
    getPage: (pool, key, index, into) => (isIndex(index) ? guest.get(pool, key, index, into) : GetOutcome.Miss),
    async fetchPage(pool, key, index, into) {
      return isIndex(index) ? guest.fetch(pool, key, index, into) : GetOutcome.Miss
    },
    invalidatePage(pool, key, index) {
      if (isIndex(index)) guest.flushPage(pool, key, index)
    },
    invalidateInode: (pool, key) => guest.flushObject(pool, key),
    invalidateFs: (pool) => guest.destroyPool(pool),
  }
}

/** The form of a cleancache backend. */
export interface LinuxCleancache {
  readonly name: string
  initFs(pageSize: number): number
  initSharedFs(uuid: Uint8Array, pageSize: number): number
  putPage(pool: number, key: ObjectId, index: number, page: Uint8Array): void
  getPage(pool: number, key: ObjectId, index: number, into: Uint8Array): GetOutcome
  fetchPage(pool: number, key: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome>
  invalidatePage(pool: number, key: ObjectId, index: number): void
  invalidateInode(pool: number, key: ObjectId): void
  invalidateFs(pool: number): void
}

/** What a guest knows of its memory, in pages of 4 KiB. */
export interface BalloonFacts {
  /** Pages that it has now. */
  readonly current: number
  /** Pages that its programs were promised. */
  readonly committed: number
  /** Pages that the kernel keeps for itself. */
  readonly reserve: number
  /** Number of its highest frame. */
  readonly highest: number
  /** Pages in frontswap. */
  readonly frontswap: number
}

/** How a guest balloons by itself; the defaults are Linux's. */
export interface SelfBalloonOptions {
  /** Milliseconds, from any start, never going back. */
  readonly clock: () => number
  /** Domain 0 does not balloon (default false). */
  readonly isDomain0?: boolean
  /** Milliseconds between two looks (default 5000). */
  readonly intervalMs?: number
  /** One part in so many of what is too much goes at a time, and of what lacks comes (default 8 and 1). */
  readonly downHysteresis?: number
  readonly upHysteresis?: number
  /** MiB that are kept beyond what is committed (default 0). */
  readonly reservedMiB?: number
  /** MiB beyond the reserve that are the least (default 0: by the table). */
  readonly minUsableMiB?: number
  /**
   * What is in frontswap is room that will be wanted (default false). Shrinking itself: `SelfShrink` of
   * @tmem/frontswap.
   */
  readonly selfShrinking?: boolean
}

const balloonNames: OptionNames<SelfBalloonOptions> = {
  clock: 'function',
  isDomain0: 'flag?',
  intervalMs: 'number?',
  downHysteresis: 'number?',
  upHysteresis: 'number?',
  reservedMiB: 'number?',
  minUsableMiB: 'number?',
  selfShrinking: 'flag?',
}

/** The least that a guest keeps, in pages: the more it has, the smaller is the part that must be usable. */
export function balloonFloor(
  { highest, reserve }: Pick<BalloonFacts, 'highest' | 'reserve'>,
  minUsableMiB = 0,
): number {
  const usable = highest - reserve
  const mib = (amount: number): number => amount * megabytePages
  if (minUsableMiB > 0) return reserve + mib(minUsableMiB)
  if (usable < mib(16)) return highest
  if (usable < mib(64)) return reserve + mib(16) + Math.floor((usable - mib(16)) / 2)
  if (usable < mib(512)) return reserve + mib(40) + Math.floor((usable - mib(40)) / 8)
  return reserve + mib(99) + Math.floor((usable - mib(99)) / 32)
}

/** Selfballooning: a guest gives memory back that its programs were not promised, a part at a time. */
export class SelfBalloon {
  readonly #options: SelfBalloonOptions
  #next: number

  /** Throws `RangeError` unless the hystereses are positive integers and the amounts are not negative. */
  constructor(options: SelfBalloonOptions) {
    checkOptions('SelfBalloon', options, balloonNames)
    const {
      clock,
      intervalMs = 5000,
      downHysteresis = 8,
      upHysteresis = 1,
      reservedMiB = 0,
      minUsableMiB = 0,
    } = options
    for (const [name, value] of Object.entries({ intervalMs, downHysteresis, upHysteresis }))
      if (!Number.isInteger(value) || value < 1)
        throw new RangeError(`SelfBalloon: ${name} must be a positive integer, got ${value}`)
    for (const [name, value] of Object.entries({ reservedMiB, minUsableMiB }))
      if (!(value >= 0)) throw new RangeError(`SelfBalloon: ${name} must not be negative, got ${value}`)
    this.#options = options
    this.#next = clock() + intervalMs
  }

  /** The pages that the guest should have now; `undefined`: it is not time to look yet, or it never balloons. */
  target(facts: BalloonFacts): number | undefined {
    const { clock, isDomain0, intervalMs = 5000, downHysteresis = 8, upHysteresis = 1 } = this.#options
    const { reservedMiB = 0, minUsableMiB, selfShrinking } = this.#options
    const now = clock()
    if (isDomain0 === true || now < this.#next) return undefined
    this.#next = now + intervalMs
    const { current, committed, reserve, frontswap } = facts
    const goal = committed + reserve + reservedMiB * megabytePages + (selfShrinking === true ? frontswap : 0)
    const step =
      current > goal ? -Math.floor((current - goal) / downHysteresis) : Math.floor((goal - current) / upHysteresis)
    return Math.max(current + step, balloonFloor(facts, minUsableMiB))
  }
}
