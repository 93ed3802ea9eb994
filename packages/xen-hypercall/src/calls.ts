/**
 * Hypercalls of a guest: the structure goes into a frame of the guest, and pages through other frames reserved for
 * calls.
 *
 * A real guest's processor stands still until its call is done. Here the host may have to wait for a disk: the frame of
 * such a get is taken until the answer has arrived, and a fetch returns the answer. There can be as many pending gets
 * as frames for them; one more get is answered `Deferred`, whether its page exists or not.
 *
 * Invariants: a fetch answers with the state at its call or later: after a put, flush or destroy during a pending get,
 * later fetches ask the host again. A page that a get has taken out of a private ephemeral pool goes to one fetch, not
 * two. An answer without a fetch is kept while there is room for it.
 */
import type { ObjectId } from '@tmem/core'
import {
  Command,
  Errno,
  type Layout,
  operationLayouts,
  pageBytes,
  pageSizeShift,
  versionShift,
  writeObject,
} from './abi.ts'
import type { Domain } from './clients.ts'
import type { Answer, XenHost } from './host.ts'

/** A get that the host has to wait for. */
interface Late {
  readonly pool: number
  readonly object: ObjectId
  readonly index: number
  readonly page: Uint8Array
  /** The result, with the page in `page`; or why the host has stopped. */
  readonly answer: Promise<number | Error>
  isThere: boolean
  /** Fetches that wait for it. */
  waiting: number
  /** The page was put or flushed since: nobody joins any more. */
  isOld: boolean
}

export class GuestCalls {
  readonly #host: XenHost
  readonly #domain: Domain
  readonly #firstFrame: number
  readonly #op: DataView
  readonly #putFrame: Uint8Array
  /** The frames for gets, and the numbers of those that are not taken. */
  readonly #getFrames: readonly Uint8Array[]
  readonly #free: number[]
  readonly #creat: Layout<'uuid' | 'flags' | 'arg1'>['fields']
  readonly #gen: Layout<'oid' | 'index' | 'tmem_offset' | 'pfn_offset' | 'len' | 'cmfn'>['fields']
  /** Object ids are less than this. */
  readonly #objects: bigint
  readonly #late: Late[] = []

  /**
   * `firstFrame`: the first of the frames, one after the other: one for structures, one for puts, `gets` for gets.
   * Throws `RangeError` when they are not there.
   */
  constructor(host: XenHost, domain: Domain, firstFrame: number, gets: number) {
    const own = Array.from({ length: 2 + gets }, (_, n) => domain.memory.frame(firstFrame + n))
    if (own.includes(undefined))
      throw new RangeError(`the guest has no frames ${firstFrame} to ${firstFrame + 1 + gets}`)
    const [op, put, ...others] = own as [Uint8Array, Uint8Array, ...Uint8Array[]]
    const { creat, gen } = operationLayouts(host.release, domain.bits)
    this.#host = host
    this.#domain = domain
    this.#firstFrame = firstFrame
    this.#op = new DataView(op.buffer, op.byteOffset, pageBytes)
    this.#putFrame = put
    this.#getFrames = others
    this.#free = others.map((_, n) => n)
    this.#creat = creat.fields
    this.#gen = gen.fields
    this.#objects = 1n << BigInt(64 * (gen.fields.oid.count ?? 1))
  }

  #call(command: number, pool: number): Answer {
    this.#op.setUint32(0, command, true)
    this.#op.setInt32(4, pool, true)
    return this.#host.call(this.#domain.id, this.#firstFrame * pageBytes)
  }

  /** NEW_POOL with the version that the host speaks; the id is the low word of the result. */
  newPool(flags: number, uuid: Uint8Array | undefined, size: number): number {
    const order = Math.log2(size) - 12
    if (!Number.isInteger(order) || order < 0) return -Errno.EINVAL
    for (let n = 0; n < 16; n++) this.#op.setUint8(this.#creat.uuid.at + n, uuid?.[n] ?? 0)
    const version = this.#host.release === '4.0.0' ? 0 : 1
    const word = (flags | (order << pageSizeShift) | (version << versionShift)) >>> 0
    this.#op.setUint32(this.#creat.flags.at, word, true)
    this.#op.setUint32(this.#creat.arg1.at, 0, true)
    return (this.#call(Command.NewPool, 0) as number) | 0
  }

  destroyPool(pool: number): void {
    this.#changed(pool)
    void this.#call(Command.DestroyPool, pool)
  }

  #page(command: number, pool: number, object: ObjectId, index: number, frame: number): Answer {
    const fields = this.#gen
    const op = this.#op
    writeObject(op, fields.oid, object)
    op.setUint32(fields.tmem_offset.at, 0, true)
    op.setUint32(fields.pfn_offset.at, 0, true)
    op.setUint32(fields.len.at, 0, true)
    op.setUint32(fields.index.at, index, true)
    op.setUint32(fields.cmfn.at, frame, true)
    if (fields.cmfn.bytes === 8) op.setUint32(fields.cmfn.at + 4, 0, true)
    return this.#call(command, pool)
  }

  /** Whether the structure has room for an object id: in 4.0.0 it has 64 bits, and a longer one would name another. */
  #fits(object: ObjectId): boolean {
    return typeof object === 'number' || object < this.#objects
  }

  /** PUT_PAGE: its result; -ENOMEM for an object id that the release has no room for. */
  put(pool: number, object: ObjectId, index: number, page: Uint8Array): number {
    if (!this.#fits(object)) return -Errno.ENOMEM
    this.#changed(pool, object, index)
    this.#putFrame.set(page)
    // A put is never waited for.
    return this.#page(Command.PutPage, pool, object, index, this.#firstFrame + 1) as number
  }

  /** GET_PAGE: its result, with 1 the page is in `into`; `undefined`: it has to be fetched. */
  get(pool: number, object: ObjectId, index: number, into: Uint8Array): number | undefined {
    if (!this.#fits(object)) return 0
    const number = this.#free.at(-1)
    if (number === undefined || this.isUnderWay(pool, object, index)) return undefined
    const frame = this.#getFrames[number]!
    const answer = this.#page(Command.GetPage, pool, object, index, this.#firstFrame + 2 + number)
    if (typeof answer === 'number') {
      if (answer === 1) into.set(frame)
      return answer
    }
    this.#free.pop()
    const page = new Uint8Array(pageBytes)
    const settled = (result: number | Error): number | Error => {
      if (result === 1) page.set(frame)
      this.#free.push(number)
      late.isThere = true
      if (late.isOld && late.waiting === 0) this.#forget(late)
      return result
    }
    // Whoever fetches learns of an error.
    const late: Late = {
      pool,
      object,
      index,
      page,
      answer: answer.then(settled, settled),
      isThere: false,
      waiting: 0,
      isOld: false,
    }
    const spare = this.#late.find((other) => other.isThere && other.waiting === 0)
    if (spare !== undefined && this.#late.length >= this.#getFrames.length) this.#forget(spare)
    this.#late.push(late)
    return undefined
  }

  #forget(late: Late): void {
    const at = this.#late.indexOf(late)
    if (at >= 0) this.#late.splice(at, 1)
  }

  #lateOf(pool: number, object: ObjectId, index: number): Late | undefined {
    return this.#late.find((late) => !late.isOld && isOf(late, pool, object, index))
  }

  /** Whether a get of that page is under way, or its answer is there for a fetch. */
  isUnderWay(pool: number, object: ObjectId, index: number): boolean {
    return this.#late.length > 0 && this.#lateOf(pool, object, index) !== undefined
  }

  /** As `get`, waiting where that is needed. Rejects when the host has stopped. */
  async fetch(pool: number, object: ObjectId, index: number, into: Uint8Array): Promise<number> {
    for (;;) {
      const late = this.#lateOf(pool, object, index)
      if (late === undefined) {
        const answer = this.get(pool, object, index, into)
        if (answer !== undefined) return answer
        // Unless it is under way by now, all frames are taken: until one of them is not.
        if (!this.isUnderWay(pool, object, index))
          await Promise.race(this.#late.filter(({ isThere }) => !isThere).map((other) => other.answer))
        continue
      }
      late.waiting++
      const answer = await late.answer
      late.waiting--
      // Another fetch has had it.
      if (!this.#late.includes(late)) continue
      this.#forget(late)
      if (answer instanceof Error) throw answer
      if (answer === 1) into.set(late.page)
      return answer
    }
  }

  flushPage(pool: number, object: ObjectId, index: number): void {
    if (!this.#fits(object)) return
    this.#changed(pool, object, index)
    void this.#page(Command.FlushPage, pool, object, index, 0)
  }

  flushObject(pool: number, object: ObjectId): void {
    if (!this.#fits(object)) return
    this.#changed(pool, object)
    void this.#page(Command.FlushObject, pool, object, 0, 0)
  }

  /** What is under way of a page, an object, or a pool, is not what is there now. */
  #changed(pool: number, object?: ObjectId, index?: number): void {
    // From the end: one that nobody waits for goes.
    for (let n = this.#late.length - 1; n >= 0; n--) {
      const late = this.#late[n]!
      if (!isOf(late, pool, object, index)) continue
      late.isOld = true
      if (late.isThere && late.waiting === 0) this.#late.splice(n, 1)
    }
  }
}

/** Whether that is a page of the pool, of the object, under the index: as far as they are given. */
function isOf(late: Late, pool: number, object?: ObjectId, index?: number): boolean {
  if (late.pool !== pool || (object !== undefined && BigInt(late.object) !== BigInt(object))) return false
  return index === undefined || late.index === index
}
