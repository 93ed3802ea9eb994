/**
 * The reference: what a stack may answer, by what was put into it.
 *
 * For each handle of a pool the version that was put last. Operations that are done when they return have one right
 * answer (an ephemeral page may be missing, but not come back). A fetch takes time: it may answer with whatever was
 * there at some moment of it.
 *
 * A complaint says what was answered and what was right.
 */
import { GetOutcome, getOutcomeName, type ObjectId, type Pool, PutOutcome, putOutcomeName, TmemError } from '@tmem/core'
import type { Pages } from './pages.ts'
import type { World } from './world.ts'

/** An answer that is wrong. */
export class Complaint extends Error {}

/** A fetch under way, and the versions that it may answer with; 0 is a miss. */
export interface Fetch {
  readonly pool: ModelPool
  readonly handle: number
  readonly possible: number[]
  readonly into: Uint8Array
  readonly at: number
}

/** A pool and what is in it. Handles are numbered from 0. */
export class ModelPool {
  readonly pool: Pool
  /** Which one of the history. */
  readonly number: number
  /** What it is, and which one of its kind: the name under which its pages may be found again. */
  readonly key: string
  readonly handles: number
  readonly indexes: number
  /** By handle: the version that is there, or 0. */
  readonly current: Int32Array
  /** By handle: 1 when a page may be there or not. */
  readonly doubtful: Uint8Array
  /**
   * By handle: older versions that were answered, because a disk has lied. Each may be what is there, as long as
   * nothing else is put.
   */
  readonly older: Map<number, number[]> = new Map()
  isFrozen = false
  isGone = false

  constructor(pool: Pool, number: number, key: string, handles: number, indexes: number) {
    this.key = key
    this.pool = pool
    this.number = number
    this.handles = handles
    this.indexes = indexes
    this.current = new Int32Array(handles)
    this.doubtful = new Uint8Array(handles)
  }

  get persistent(): boolean {
    return this.pool.attributes.persistent
  }

  get pageSize(): number {
    return this.pool.attributes.pageSize
  }

  /** Objects: small numbers, and wide ones. */
  objectOf(handle: number): ObjectId {
    const object = Math.floor(handle / this.indexes)
    return object % 3 === 2 ? (1n << 90n) + BigInt(object) : object
  }

  indexOf(handle: number): number {
    return handle % this.indexes
  }

  nameOf(handle: number): string {
    return `pool ${this.number} object ${this.objectOf(handle)} index ${this.indexOf(handle)}`
  }
}

/** Versions that an ephemeral page can be got of at most once are noted here as gone. */
export class Model {
  readonly pages: Pages
  readonly world: World
  readonly fetches: Fetch[] = []
  /** Bytes of the persistent pages that are there. */
  persistentBytes = 0
  /** Whose a version is. */
  readonly #owners: (ModelPool | undefined)[] = [undefined]
  readonly #handles: number[] = [0]
  readonly #taken = new Set<number>()
  /** By key of a pool: pages that it had when it ended, which a place that survives may have kept. */
  readonly #left = new Map<string, Pick<ModelPool, 'current' | 'older'>>()
  #readErrors = 0
  #damage = 0
  /** Of it, other pages than those that were asked for. */
  #otherPages = 0
  /** Pages of batches that could not be had, for a reason that nobody told. */
  #untold = 0

  constructor(pages: Pages, world: World) {
    this.pages = pages
    this.world = world
  }

  /** A new version for a handle. */
  next(pool: ModelPool, handle: number): number {
    const version = this.pages.next(this.world.random)
    this.#owners[version] = pool
    this.#handles[version] = handle
    return version
  }

  /** What is there changes. */
  set(pool: ModelPool, handle: number, version: number): void {
    const before = pool.current[handle]!
    pool.doubtful[handle] = 0
    // Also of a page that was put as it was: it may have been missing before.
    for (const fetch of this.fetches) if (fetch.pool === pool && fetch.handle === handle) fetch.possible.push(version)
    if (before === version) return
    pool.older.delete(handle)
    if (pool.persistent) {
      if (before === 0) this.persistentBytes += pool.pageSize
      else if (version === 0) this.persistentBytes -= pool.pageSize
    }
    pool.current[handle] = version
  }

  /** A pool begins; it may have pages that one of the same key had when it ended. */
  begin(pool: ModelPool): void {
    const left = this.#left.get(pool.key)
    this.#left.delete(pool.key)
    if (left === undefined) return
    for (let handle = 0; handle < pool.handles; handle++) this.set(pool, handle, left.current[handle]!)
    for (const [handle, older] of left.older) pool.older.set(handle, older)
  }

  /** What pools have left is lost: that of a key, or all of it. */
  lose(key: string | undefined): void {
    if (key === undefined) this.#left.clear()
    else this.#left.delete(key)
  }

  /** The pool is destroyed, or its stack is closed; `survives`: a place may keep its pages. */
  end(pool: ModelPool, survives: boolean): void {
    pool.isGone = true
    if (survives && !pool.persistent)
      this.#left.set(pool.key, { current: pool.current.slice(), older: new Map(pool.older) })
    for (let handle = 0; handle < pool.handles; handle++) this.set(pool, handle, 0)
  }

  /** A put was answered. `keep`: a refusal leaves what was there. */
  wasPut(pool: ModelPool, handle: number, version: number, outcome: number, keep: boolean): void {
    const before = pool.current[handle]!
    if (outcome === PutOutcome.Stored) {
      if (pool.isGone) throw new Complaint(`${pool.nameOf(handle)}: a pool that is gone stored a page`)
      if (pool.isFrozen && before === 0) throw new Complaint(`${pool.nameOf(handle)}: a frozen pool stored a new page`)
      this.set(pool, handle, version)
      return
    }
    const refused = `${pool.nameOf(handle)}: a put was refused with ${putOutcomeName(outcome)}`
    if (outcome === PutOutcome.PoolGone && !pool.isGone) throw new Complaint(`${refused}, but the pool is there`)
    if (
      outcome === PutOutcome.Frozen &&
      !(pool.isFrozen && (before === 0 || !pool.persistent || pool.doubtful[handle] === 1))
    )
      throw new Complaint(`${refused}, but the pool is not frozen, or has that page`)
    if (!keep) this.set(pool, handle, 0)
    // Where all slots or frames are taken, its own is for the page that replaces it: then both may be lost.
    else if (this.world.hasSlots) pool.doubtful[handle] = 1
  }

  /** The versions that may be answered now. */
  possibleOf(pool: ModelPool, handle: number): number[] {
    return [pool.current[handle]!, ...(pool.older.get(handle) ?? [])]
  }

  /** An operation that does not wait was answered. */
  wasGot(pool: ModelPool, handle: number, outcome: number, bytes: Uint8Array, at: number): void {
    const current = pool.current[handle]!
    if (outcome === GetOutcome.Deferred) {
      if (current === 0) throw new Complaint(`${pool.nameOf(handle)}: Deferred, but no page is there`)
      return
    }
    this.#judge(pool, handle, outcome, bytes, at, this.possibleOf(pool, handle))
  }

  /** A fetch was answered. */
  wasFetched(fetch: Fetch, outcome: number): void {
    this.#judge(fetch.pool, fetch.handle, outcome, fetch.into, fetch.at, fetch.possible)
  }

  /**
   * Nobody waits for a fetch any more. It may have taken the page out of its private ephemeral pool, or may yet do
   * that.
   */
  gaveUp({ pool, handle }: Fetch): void {
    if (!pool.persistent && !pool.pool.attributes.shared) pool.doubtful[handle] = 1
  }

  /** A get or a fetch failed: there must have been a reason, and the page stays. */
  failed(pool: ModelPool, handle: number, error: unknown): void {
    const { world } = this
    if (!(error instanceof TmemError)) throw error
    if (error.code === 'TMEM_IO') {
      if (++this.#readErrors > world.readErrors) throw new Complaint(`${error.message}, but no read has failed`)
      this.#expectReasons(error.message)
    } else if (error.code === 'TMEM_CORRUPT') this.#excuse(error.message)
    else throw new Complaint(`${pool.nameOf(handle)}: ${error.message}`)
    if (!pool.persistent) throw new Complaint(`${error.message}, but the page is ephemeral: a miss is the answer`)
  }

  /**
   * Pages of a batch could not be had. Its error is that of the first one; the others may have another reason, so each
   * counts for either.
   */
  failedMany(pool: ModelPool, handles: readonly number[], error: unknown): void {
    const [first, ...others] = handles as [number, ...number[]]
    this.failed(pool, first, error)
    for (const handle of others) {
      this.#untold++
      this.#expectReasons(`${pool.nameOf(handle)}: no answer in a batch`)
    }
  }

  /** As many pages cannot be had as there are reasons, whichever is whose. */
  #expectReasons(what: string): void {
    const { readErrors, damagedReads, faults } = this.world
    if (this.#readErrors + this.#damage + this.#untold > readErrors + damagedReads + faults.memoryRot)
      throw new Complaint(`${what}, but nothing has failed or was damaged on its way`)
  }

  /** Damage was reported, or met: somebody must have done it. */
  #excuse(what: string): void {
    const { damagedReads, faults } = this.world
    if (++this.#damage > damagedReads + faults.memoryRot)
      throw new Complaint(`${what}, but nothing was damaged on its way`)
    this.#expectReasons(what)
  }

  #judge(
    pool: ModelPool,
    handle: number,
    outcome: number,
    bytes: Uint8Array,
    at: number,
    possible: readonly number[],
  ): void {
    const name = pool.nameOf(handle)
    if (outcome === GetOutcome.Miss) {
      if (pool.persistent && !possible.includes(0) && pool.doubtful[handle] === 0)
        throw new Complaint(`${name}: a persistent page is lost`)
      // What was missed once may not come back.
      if (possible.length === 1) this.set(pool, handle, 0)
      return
    }
    if (outcome !== GetOutcome.Hit) throw new Complaint(`${name}: ${getOutcomeName(outcome)}`)
    const version = this.pages.identify(bytes, at, pool.pageSize)
    if (version === 0) throw new Complaint(`${name}: bytes that were never put (right: ${possible.join(' or ')})`)
    if (!possible.includes(version)) this.#judgeOther(pool, handle, version, possible)
    if (pool.persistent || pool.pool.attributes.shared) return
    if (this.#taken.has(version)) throw new Complaint(`${name}: page ${version} was got twice`)
    this.#taken.add(version)
    if (pool.current[handle] === version) this.set(pool, handle, 0)
  }

  /**
   * The page is another one. An older page of the same handle cannot be told apart where a disk has lied: then that may
   * be what is there from now on. It need not be: it may have been read in the wrong place, or before what is there now
   * was put.
   */
  #judgeOther(pool: ModelPool, handle: number, version: number, possible: readonly number[]): void {
    const owner = this.#owners[version]!
    const name = owner.nameOf(this.#handles[version]!)
    const what = `${pool.nameOf(handle)}: page ${version} of ${name} (right: ${possible.join(' or ')})`
    // A pool that was made like another one that is gone has its name in the frames on the disk.
    const looksTheSame = sameKind(owner, pool) && this.#handles[version] === handle
    if (!looksTheSame || possible.every((one) => one === 0)) throw new Complaint(what)
    // Memory that rots makes no other page: a disk has lied.
    if (++this.#otherPages > this.world.damagedReads) throw new Complaint(`${what}, but nothing was damaged on its way`)
    this.#excuse(what)
    for (const fetch of this.fetches) if (fetch.pool === pool && fetch.handle === handle) fetch.possible.push(version)
    if (pool.current[handle] === 0) return
    const older = pool.older.get(handle)
    if (older === undefined) pool.older.set(handle, [version])
    else older.push(version)
  }
}

const sameKind = (one: ModelPool, other: ModelPool): boolean =>
  JSON.stringify(one.pool.attributes) === JSON.stringify(other.pool.attributes)
