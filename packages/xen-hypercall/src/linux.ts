/**
 * The guest's side as Linux had it: the shims that turn hooks of cleancache and frontswap into hypercalls, and the
 * driver that gives memory back by itself.
 *
 * Put and get succeed only with the result 1; everything else is "not stored" or "not there", also what Xen calls an
 * error. Pages are copied through frames of the guest that nobody else uses.
 *
 * DEVIATION: a hypercall of the original never came back before it was done. Here the host may have to wait for a disk:
 * then a get answers `Deferred`, and the fetch of the same page has it.
 *
 * Source: drivers/xen/tmem.c and drivers/xen/xen-selfballoon.c of Linux as described in the reference notes, §8.
 */
import { checkOptions, GetOutcome, type ObjectId, type OptionNames } from '@tmem/core'
import {
  Command,
  Errno,
  operationLayouts,
  PoolBit,
  pageBytes,
  pageSizeShift,
  versionShift,
  writeObject,
} from './abi.ts'
import type { Domain } from './clients.ts'
import type { Answer, XenHost } from './host.ts'

const megabytePages = 256

/** Frames of the guest that the shims use: the first for structures, the others for pages. */
const frames = 3

/** A get that the host has to wait for. */
interface Late {
  readonly name: string
  readonly page: Uint8Array
  readonly answer: Promise<number>
}

/** Hypercalls as a guest kernel makes them. */
export class LinuxGuest {
  readonly #host: XenHost
  readonly #domain: Domain
  readonly #firstFrame: number
  readonly #op: DataView
  readonly #putFrame: Uint8Array
  readonly #getFrame: Uint8Array
  #late: Late | undefined
  #frontswapPool = -1

  /**
   * `firstFrame`: the first of three frames, one after the other, that are the shims' own. Throws `RangeError` when
   * they are not there.
   */
  constructor(host: XenHost, domain: Domain, firstFrame: number) {
    const own = Array.from({ length: frames }, (_, n) => domain.memory.frame(firstFrame + n))
    if (own.includes(undefined)) throw new RangeError(`the guest has no frames ${firstFrame} to ${firstFrame + 2}`)
    const [op, put, get] = own as [Uint8Array, Uint8Array, Uint8Array]
    this.#host = host
    this.#domain = domain
    this.#firstFrame = firstFrame
    this.#op = new DataView(op.buffer, op.byteOffset, pageBytes)
    this.#putFrame = put
    this.#getFrame = get
  }

  #call(command: number, pool: number): Answer {
    this.#op.setUint32(0, command, true)
    this.#op.setInt32(4, pool, true)
    return this.#host.call(this.#domain.id, this.#firstFrame * pageBytes)
  }

  /** NEW_POOL; the id is the low word of the result. */
  newPool(flags: number, uuid: Uint8Array | undefined, size: number): number {
    const { fields } = operationLayouts(this.#host.release, this.#domain.bits).creat
    const order = Math.log2(size) - 12
    if (!Number.isInteger(order) || order < 0) return -Errno.EINVAL
    for (let n = 0; n < 16; n++) this.#op.setUint8(fields.uuid.at + n, uuid?.[n] ?? 0)
    const version = this.#host.release === '4.0.0' ? 0 : 1
    this.#op.setUint32(fields.flags.at, (flags | (order << pageSizeShift) | (version << versionShift)) >>> 0, true)
    this.#op.setUint32(fields.arg1.at, 0, true)
    return (this.#call(Command.NewPool, 0) as number) | 0
  }

  destroyPool(pool: number): void {
    void this.#call(Command.DestroyPool, pool)
  }

  #page(command: number, pool: number, object: ObjectId, index: number, frame: number): Answer {
    const { fields } = operationLayouts(this.#host.release, this.#domain.bits).gen
    writeObject(this.#op, fields.oid, object)
    for (const name of ['tmem_offset', 'pfn_offset', 'len'] as const) this.#op.setUint32(fields[name].at, 0, true)
    this.#op.setUint32(fields.index.at, index, true)
    this.#op.setUint32(fields.cmfn.at, frame, true)
    if (fields.cmfn.bytes === 8) this.#op.setUint32(fields.cmfn.at + 4, 0, true)
    return this.#call(command, pool)
  }

  /** True: the page was stored. */
  put(pool: number, object: ObjectId, index: number, page: Uint8Array): boolean {
    this.#putFrame.set(page)
    return this.#page(Command.PutPage, pool, object, index, this.#firstFrame + 1) === 1
  }

  get(pool: number, object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    // Its frame is not free.
    if (this.#late !== undefined) return GetOutcome.Deferred
    const answer = this.#page(Command.GetPage, pool, object, index, this.#firstFrame + 2)
    if (typeof answer === 'number') {
      if (answer !== 1) return GetOutcome.Miss
      into.set(this.#getFrame)
      return GetOutcome.Hit
    }
    const page = new Uint8Array(pageBytes)
    const settled = answer.then((result) => {
      if (result === 1) page.set(this.#getFrame)
      return result
    })
    this.#late = { name: `${pool}/${object}/${index}`, page, answer: settled }
    return GetOutcome.Deferred
  }

  async fetch(pool: number, object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    const name = `${pool}/${object}/${index}`
    for (;;) {
      const late = this.#late
      if (late === undefined) {
        const outcome = this.get(pool, object, index, into)
        if (outcome !== GetOutcome.Deferred) return outcome
        continue
      }
      const result = await late.answer
      if (this.#late === late) this.#late = undefined
      if (late.name !== name) continue
      if (result !== 1) return GetOutcome.Miss
      into.set(late.page)
      return GetOutcome.Hit
    }
  }

  flushPage(pool: number, object: ObjectId, index: number): void {
    void this.#page(Command.FlushPage, pool, object, index, 0)
  }

  flushObject(pool: number, object: ObjectId): void {
    void this.#page(Command.FlushObject, pool, object, 0, 0)
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
