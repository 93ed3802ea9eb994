/**
 * Cleancache: a second chance for clean pages of files. The page cache offers a page that it removes; whoever reads
 * asks here before the disk.
 *
 * Invariants:
 *  - A put has no result: whoever puts never learns whether the page was stored. `puts` counts attempts.
 *  - A file system that has no pool (not opted in, refused, waiting for a backend), or a file without a key, reaches no
 *    backend and no counter.
 *  - A pool id is given to a file system only by the backend, and belongs to it until `invalidateFs`.
 *  - On registration the backend is published first, then each waiting file system gets its pool; until it has one,
 *    its pages reach nothing. (In Linux 3.10 all pools came first, and `puts` and `failed_gets` of waiting file systems
 *    counted, because their fake pool ids were positive.)
 *
 * A page is locked by its owner for every call that names it (get, put, invalidate): two calls for one handle at the
 * same time have no defined order here. The caller says so with the `Locked` bit, which is asserted.
 *
 * DEVIATION: Linux 3.10 keeps at most 32 private and 32 shared file systems waiting, under fake pool ids, and leaves
 * the others uncached without a word. Here, as from 4.1 on, the file system itself remembers that it waits, and there
 * is no limit. DEVIATION: an access that the backend can only answer by waiting (`Deferred`) is not counted by
 * `getPage`; `fetchPage` counts it. No backend of the kernel could defer.
 *
 * Source: mm/cleancache.c of Linux 4.1 on (states, registration, counters) as described in the reference notes, §1.
 */
import { assertPageSize, GetOutcome, type StatsNode } from '@tmem/core'
import { type FileKey, keyOfHandle, keyOfInode } from './keys.ts'
import { type FileSystemFacts, type MissingGuarantee, missingGuarantees } from './opt-in.ts'

/** Bits of what the page cache knows of a page. */
export const PageState = {
  /** Its owner holds the page's lock: needed for every call that names the page. */
  Locked: 1,
  /** Its bytes are those of the file. */
  UpToDate: 2,
  /** There are blocks on disk behind it: no hole, and not beyond the end. Truncation takes the bit away first. */
  MappedToDisk: 4,
} as const

/** What keeps the pages: the operations of the kernel's `cleancache_ops`. */
export interface CleancacheBackend {
  readonly name: string
  /** Makes a pool for a file system; its id (0 is valid), or a negative number: refused. */
  initFs(pageSize: number): number
  /** As `initFs`, for the machines of a cluster that give the same uuid (16 bytes). */
  initSharedFs(uuid: Uint8Array, pageSize: number): number
  /** Takes a copy of the page, or does not. After that, an older copy is gone in any case. */
  putPage(pool: number, key: FileKey, index: number, page: Uint8Array): void
  /** Fills the page. In a private pool the copy is gone then, in a shared one it stays. */
  getPage(pool: number, key: FileKey, index: number, into: Uint8Array): GetOutcome
  /** As `getPage`, waiting where that is needed. Rejects when a page is there and cannot be had. */
  fetchPage(pool: number, key: FileKey, index: number, into: Uint8Array): Promise<GetOutcome>
  invalidatePage(pool: number, key: FileKey, index: number): void
  invalidateInode(pool: number, key: FileKey): void
  /** Drops all pages; the id is free then. */
  invalidateFs(pool: number): void
  /** What it counts, for the tree of statistics. */
  stats?(): StatsNode
}

/** Answer to `register`. */
export const Registration = {
  Done: 0,
  /** There is a backend already (-EBUSY): it stays, and is never taken away. */
  Busy: 1,
} as const
export type Registration = (typeof Registration)[keyof typeof Registration]

/** Counters under their historical names. */
export interface CleancacheCounters {
  /** Gets that were hits. */
  succ_gets: number
  /** Gets that reached the backend and were misses. */
  failed_gets: number
  /** Puts that reached the backend, whatever became of them. */
  puts: number
  /** Pages invalidated singly; those of files and file systems as a whole are not counted. */
  invalidates: number
}

// States of a superblock beside the pool ids, as from Linux 4.1 on.
const noPool = -1
const waitsForPrivate = -2
const waitsForShared = -3

/** A mounted file system, as cleancache sees it: made by `initFs` and `initSharedFs`. */
export interface Superblock {
  readonly facts: FileSystemFacts
  readonly pageSize: number
  /** Its pool in the backend; `undefined` while there is none (no backend yet, refused, not opted in, gone). */
  readonly poolId: number | undefined
  /** True: it will get a pool when a backend registers. */
  readonly waiting: boolean
  /** Why it could not opt in; empty when it has. */
  readonly missing: readonly MissingGuarantee[]
}

class MountedSuperblock implements Superblock {
  readonly facts: FileSystemFacts
  readonly pageSize: number
  readonly uuid: Uint8Array | undefined
  readonly missing: readonly MissingGuarantee[]
  state: number = noPool

  constructor(
    facts: FileSystemFacts,
    pageSize: number,
    uuid: Uint8Array | undefined,
    missing: readonly MissingGuarantee[],
  ) {
    this.facts = facts
    this.pageSize = pageSize
    this.uuid = uuid
    this.missing = missing
  }

  get poolId(): number | undefined {
    return this.state < 0 ? undefined : this.state
  }

  get waiting(): boolean {
    return this.state < noPool
  }
}

export class Cleancache {
  readonly counters: CleancacheCounters = { succ_gets: 0, failed_gets: 0, puts: 0, invalidates: 0 }
  #backend: CleancacheBackend | undefined
  /** File systems that opted in and have not gone. */
  readonly #mounted = new Set<MountedSuperblock>()

  /** True when a backend is registered. */
  get enabled(): boolean {
    return this.#backend !== undefined
  }

  /** Registers the backend, before or after file systems are mounted. There is no unregister. */
  register(backend: CleancacheBackend): Registration {
    if (this.#backend !== undefined) return Registration.Busy
    this.#backend = backend
    // One that is mounted from now on has its pool already.
    for (const superblock of this.#mounted) if (superblock.waiting) init(backend, superblock)
    return Registration.Done
  }

  /**
   * Opts a file system in, with a pool of its own. When a guarantee is missing it stays uncached, and `missing` says
   * why. Throws `RangeError` for an impossible page size.
   */
  initFs(facts: FileSystemFacts, pageSize: number): Superblock {
    return this.#mount(facts, pageSize, undefined)
  }

  /** Opts a file system of a cluster in: all machines that give this uuid (16 bytes) have one pool together. */
  initSharedFs(uuid: Uint8Array, facts: FileSystemFacts, pageSize: number): Superblock {
    if (uuid.length !== 16) throw new RangeError(`a uuid has 16 bytes, got ${uuid.length}`)
    return this.#mount(facts, pageSize, uuid.slice())
  }

  /** The key of a file, or `undefined`: its pages are not cached. Keep it as long as the file is open. */
  fileKey(superblock: Superblock, inode: number | bigint): FileKey | undefined {
    const { encodeHandle } = superblock.facts
    return encodeHandle === undefined ? keyOfInode(inode) : keyOfHandle(encodeHandle(inode))
  }

  /**
   * Asks for a page before the disk is read. `Hit`: the page is filled and up to date, no I/O. `Miss`: read the disk.
   * `Deferred`: await `fetchPage`. Only for a page that is not up to date and whose blocks are all mapped.
   */
  getPage(
    superblock: Superblock,
    key: FileKey | undefined,
    index: number,
    into: Uint8Array,
    state: number,
  ): GetOutcome {
    assertLocked(state)
    const { state: pool } = superblock as MountedSuperblock
    if (this.#backend === undefined || pool < 0 || key === undefined) return GetOutcome.Miss
    const outcome = this.#backend.getPage(pool, key, index, into)
    if (outcome !== GetOutcome.Deferred) this.#got(outcome)
    return outcome
  }

  /** As `getPage`, waiting where that is needed: `Hit` or `Miss`. The page stays locked until it is answered. */
  async fetchPage(
    superblock: Superblock,
    key: FileKey | undefined,
    index: number,
    into: Uint8Array,
    state: number,
  ): Promise<GetOutcome> {
    assertLocked(state)
    const { state: pool } = superblock as MountedSuperblock
    if (this.#backend === undefined || pool < 0 || key === undefined) return GetOutcome.Miss
    const outcome = await this.#backend.fetchPage(pool, key, index, into)
    this.#got(outcome)
    return outcome
  }

  /** Offers a page that is clean, up to date and mapped to disk. Nothing tells whether it was taken. */
  putPage(superblock: Superblock, key: FileKey | undefined, index: number, page: Uint8Array, state: number): void {
    assertLocked(state)
    const { state: pool } = superblock as MountedSuperblock
    if (this.#backend === undefined || pool < 0 || key === undefined) return
    this.#backend.putPage(pool, key, index, page)
    this.counters.puts++
  }

  /** The page leaves the page cache: it is put when it is up to date and mapped to disk, else invalidated. */
  removePage(superblock: Superblock, key: FileKey | undefined, index: number, page: Uint8Array, state: number): void {
    const wanted = PageState.UpToDate | PageState.MappedToDisk
    if ((state & wanted) === wanted) this.putPage(superblock, key, index, page, state)
    else this.invalidatePage(superblock, key, index, state)
  }

  /** A page must not come back: it was truncated, also in part. */
  invalidatePage(superblock: Superblock, key: FileKey | undefined, index: number, state: number): void {
    assertLocked(state)
    const { state: pool } = superblock as MountedSuperblock
    if (this.#backend === undefined || pool < 0 || key === undefined) return
    this.#backend.invalidatePage(pool, key, index)
    this.counters.invalidates++
  }

  /** No page of a file may come back. No page lock is needed; see `aroundInode` for puts that race. */
  invalidateInode(superblock: Superblock, key: FileKey | undefined): void {
    const { state: pool } = superblock as MountedSuperblock
    if (this.#backend === undefined || pool < 0 || key === undefined) return
    this.#backend.invalidateInode(pool, key)
  }

  /**
   * Truncates a range of a file, writes past the page cache, or the like: the file is invalidated before *and* after
   * `work`, also when it fails. Pages that are removed meanwhile are put as always; the second call takes them away.
   */
  async aroundInode<T>(
    superblock: Superblock,
    key: FileKey | undefined,
    work: () => T | Promise<T>,
  ): Promise<Awaited<T>> {
    this.invalidateInode(superblock, key)
    try {
      return await work()
    } finally {
      this.invalidateInode(superblock, key)
    }
  }

  /** The file system goes: all of its pages are dropped and its pool is given back. Later calls do nothing. */
  invalidateFs(superblock: Superblock): void {
    const mounted = superblock as MountedSuperblock
    const pool = mounted.state
    mounted.state = noPool
    this.#mounted.delete(mounted)
    if (pool >= 0) this.#backend!.invalidateFs(pool)
  }

  /** Counters, and the backend's below. */
  stats(): StatsNode {
    const below = this.#backend?.stats?.()
    return { name: 'cleancache', counters: { ...this.counters }, children: below === undefined ? [] : [below] }
  }

  #mount(facts: FileSystemFacts, pageSize: number, uuid: Uint8Array | undefined): Superblock {
    assertPageSize(pageSize)
    const missing = missingGuarantees(facts, pageSize, uuid !== undefined)
    const superblock = new MountedSuperblock(facts, pageSize, uuid, missing)
    if (missing.length > 0) return superblock
    this.#mounted.add(superblock)
    if (this.#backend === undefined) superblock.state = uuid === undefined ? waitsForPrivate : waitsForShared
    else init(this.#backend, superblock)
    return superblock
  }

  #got(outcome: GetOutcome): void {
    if (outcome === GetOutcome.Hit) this.counters.succ_gets++
    else this.counters.failed_gets++
  }
}

function init(backend: CleancacheBackend, superblock: MountedSuperblock): void {
  const { pageSize, uuid } = superblock
  const pool = uuid === undefined ? backend.initFs(pageSize) : backend.initSharedFs(uuid, pageSize)
  // Every negative answer is a refusal; it must not be taken for "waits".
  superblock.state = pool < 0 ? noPool : pool
}

function assertLocked(state: number): void {
  if ((state & PageState.Locked) === 0) throw new TypeError('cleancache: the page must be locked')
}
