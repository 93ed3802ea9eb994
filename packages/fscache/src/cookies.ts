/**
 * FS-Cache, with memory instead of a disk behind it: a network file system hands in clean pages of its files and asks
 * for them before it asks the server. The proposal of the mail of December 2009: an in-memory, compressed backend for
 * FS-Cache.
 *
 * A **volume** stands for a server or an export, a **cookie** for a file in it. Pages rest in an ephemeral pool, and
 * may disappear at any time: then a read says that there is no data, and the client asks its server. Dirty pages stay
 * with the client.
 *
 * Invariants:
 *  - A read fills the page with the bytes of the last write of that cookie, version and index, or answers `NoData` or
 *    `NoBuffer`: never other bytes, never part of them, never an I/O error.
 *  - Pages are kept under a name made of volume, cookie and version (24 bytes of SHA-256): another version finds
 *    nothing of this one, also when the store below survives a restart.
 *  - Nothing beyond the size of a cookie can be read from the cache; what was cut off does not come back.
 *  - Waiting pages are put before any other read or write of the file; a new version drops them.
 *
 * DEVIATION: reads and writes of a kernel backend are queued and answered later, because it waits for a disk. Here they
 * are answered at once; only a store that has to wait (`Deferred` below) makes `read` answer a promise.
 * DEVIATION: pinning, reserving space and index cookies for enumeration are not offered: nothing here outlives its
 * room.
 *
 * Source: the FS-Cache contract as described in the reference notes, §4, and the kernel's FS-Cache documents (cookies,
 * retire).
 */
import { hash } from 'node:crypto'
import {
  assertPage,
  assertPageSize,
  type ByteAmount,
  basePageSize,
  bytesOf,
  checkOptions,
  GetOutcome,
  type ObjectId,
  type PageStore,
  type Pool,
  poolRefusalName,
  type StatsNode,
  TmemError,
} from '@tmem/core'
import { type Run, Runs } from './runs.ts'

/** Answer to a read. */
export const ReadOutcome = {
  /** The page is filled. */
  Data: 0,
  /** -ENODATA: the cookie is in the cache, this page is not (any more): ask the server, and write the page here. */
  NoData: 1,
  /** -ENOBUFS: the cookie is not in the cache: ask the server, do not bother to write here. */
  NoBuffer: 2,
} as const
export type ReadOutcome = (typeof ReadOutcome)[keyof typeof ReadOutcome]

/** Answer to a write. A page that is not stored costs a later read, nothing else. */
export const WriteOutcome = {
  Stored: 0,
  /** The next read of this page says `NoData`. */
  Dropped: 1,
  /** -ENOBUFS: the cookie is not in the cache. */
  NoBuffer: 2,
} as const
export type WriteOutcome = (typeof WriteOutcome)[keyof typeof WriteOutcome]

/** Settings of a cache. */
export interface FsCacheOptions {
  /** Where pages rest: any stack with ephemeral pools. It is not closed with the cache. */
  readonly store: PageStore
  /** Bytes of a page (default 4096). */
  readonly pageSize?: ByteAmount
  /** To whom the pool belongs (default 0). */
  readonly client?: number
  /** Cookies that can be acquired at once (default 65,536); further ones are not cached. */
  readonly cookies?: number
}

/** Counters in the manner of /proc/fs/fscache/stats. */
export interface FsCacheCounters {
  /** Cookies acquired; how many of them found no room; and given up, with retirement or without. */
  acquires: number
  acquires_nobufs: number
  relinquishes: number
  retires: number
  invalidates: number
  resizes: number
  /** Reads, and what they answered. */
  reads: number
  reads_ok: number
  reads_nodata: number
  reads_nobufs: number
  /** Reads whose page was there, and could not be had. */
  reads_failed: number
  /** Writes, and what they answered. */
  writes: number
  writes_ok: number
  writes_dropped: number
  writes_nobufs: number
}

/** The facts about a file that the cache needs. */
export interface CookieAuxiliary {
  /** What tells one version of the file from another: an ETag, a change time with a size. Pages of one version only. */
  readonly version: string
  /** Bytes of the file. */
  readonly size: number
}

/** When more pages than this are cut off, the whole file is dropped: the time of a call is bounded. */
const largestSweep = 4096

export class FsCache {
  readonly pageSize: number
  readonly counters: FsCacheCounters = {
    acquires: 0,
    acquires_nobufs: 0,
    relinquishes: 0,
    retires: 0,
    invalidates: 0,
    resizes: 0,
    reads: 0,
    reads_ok: 0,
    reads_nodata: 0,
    reads_nobufs: 0,
    reads_failed: 0,
    writes: 0,
    writes_ok: 0,
    writes_dropped: 0,
    writes_nobufs: 0,
  }
  readonly #store: PageStore
  readonly #pool: Pool
  readonly #runs: Runs
  readonly #maxCookies: number
  readonly #cookies = new Set<Cookie>()
  /** Those in use, and by how many: an exclusive one by one, which is written as infinitely many. */
  readonly #volumes = new Map<string, number>()
  #withdrawn = false

  /** Throws `TmemError` (`TMEM_BAD_STACK`) when the store keeps no ephemeral pool with such pages. */
  constructor(options: FsCacheOptions) {
    checkOptions('FsCache', options, { store: 'object', pageSize: 'bytes?', client: 'number?', cookies: 'number?' })
    const { store, client = 0, cookies = 65_536 } = options
    const pageSize = bytesOf('FsCache', 'pageSize', options.pageSize ?? basePageSize)
    assertPageSize(pageSize)
    if (!Number.isInteger(cookies) || cookies < 1)
      throw new RangeError(`cookies must be a positive integer, got ${cookies}`)
    const pool = store.newPool({ client, persistent: false, shared: true, pageSize })
    if (typeof pool === 'number')
      throw new TmemError(
        'TMEM_BAD_STACK',
        `${store.name} refused a shared ephemeral pool with pages of ${pageSize} bytes: ${poolRefusalName(pool)}`,
        { layer: 'fscache' },
      )
    this.pageSize = pageSize
    this.#store = store
    this.#pool = pool
    this.#runs = new Runs(pageSize)
    this.#maxCookies = cookies
  }

  /**
   * Brings a volume into the cache. Throws `TmemError` (`TMEM_CLOSED`) after `withdraw`, `RangeError` for one that is
   * in use (-EEXIST). With `shared` others may have it in use, too, if they share it: each has cookies of its own, and
   * finds the pages of the same key and version.
   */
  acquireVolume(key: string, { shared = false }: { readonly shared?: boolean } = {}): Volume {
    if (this.#withdrawn) throw new TmemError('TMEM_CLOSED', 'the cache was withdrawn', { layer: 'fscache' })
    const users = this.#volumes.get(key) ?? 0
    if (shared ? users === Infinity : users > 0) throw new RangeError(`volume ${key} is in use already`)
    this.#volumes.set(key, shared ? users + 1 : Infinity)
    return new Volume(this, key, this.#pool, this.#runs, this.#cookies, this.#maxCookies, () => {
      const left = (this.#volumes.get(key) ?? 0) - 1
      if (left > 0 && left < Infinity) this.#volumes.set(key, left)
      else this.#volumes.delete(key)
    })
  }

  /** Takes the cache away: all pages are dropped, and every cookie answers `NoBuffer` from now on. Idempotent. */
  withdraw(): void {
    if (this.#withdrawn) return
    this.#withdrawn = true
    // First: what waits is not put any more.
    this.#pool.destroy()
    for (const cookie of this.#cookies) cookie.relinquish()
    this.#volumes.clear()
  }

  /** True after `withdraw`. */
  get withdrawn(): boolean {
    return this.#withdrawn
  }

  /** Counters, and the store's below. */
  stats(): StatsNode {
    return {
      name: 'fscache',
      counters: { ...this.counters, volumes: this.#volumes.size, cookies: this.#cookies.size },
      children: [this.#store.stats()],
    }
  }
}

/** A server, or a part of one: the upper half of the names of its files. */
export class Volume {
  readonly key: string
  readonly #cache: FsCache
  readonly #pool: Pool
  readonly #runs: Runs
  readonly #cookies: Set<Cookie>
  readonly #maxCookies: number
  readonly #released: () => void
  readonly #mine = new Map<string, Cookie>()
  #given = false

  /** Made by `FsCache.acquireVolume`. */
  constructor(
    cache: FsCache,
    key: string,
    pool: Pool,
    runs: Runs,
    cookies: Set<Cookie>,
    maxCookies: number,
    released: () => void,
  ) {
    this.#cache = cache
    this.key = key
    this.#pool = pool
    this.#runs = runs
    this.#cookies = cookies
    this.#maxCookies = maxCookies
    this.#released = released
  }

  /**
   * Brings a file into the cache. One cookie per key at a time: throws `RangeError` for one that is in use. When all
   * cookies are in use it is made without room in the cache: it answers `NoBuffer`.
   */
  acquireCookie(key: string, auxiliary: CookieAuxiliary): Cookie {
    if (this.#mine.has(key)) throw new RangeError(`cookie ${key} of volume ${this.key} is in use already`)
    const { counters } = this.#cache
    counters.acquires++
    const room = this.#cookies.size < this.#maxCookies
    if (!room) counters.acquires_nobufs++
    const cookie = new Cookie(this.#cache, room ? this.#pool : undefined, this.#runs, this.key, key, auxiliary, () => {
      this.#mine.delete(key)
      this.#cookies.delete(cookie)
    })
    this.#mine.set(key, cookie)
    if (room) this.#cookies.add(cookie)
    return cookie
  }

  /** Gives the volume and its cookies up; with `retire` their pages, too. Idempotent. */
  relinquish(retire = false): void {
    if (this.#given) return
    this.#given = true
    for (const cookie of this.#mine.values()) cookie.relinquish(retire)
    this.#released()
  }
}

/** A file in the cache. */
export class Cookie {
  readonly key: string
  readonly #cache: FsCache
  readonly #volume: string
  readonly #released: () => void
  readonly #runs: Runs
  /** Pages that wait, in the order in which they came. */
  readonly #held: Run[] = []
  #pool: Pool | undefined
  #object: ObjectId
  #size = 0
  #version: string
  /** Counts changes, so that a page that was asked for before one is not taken for a page of after; -1: given up. */
  #epoch = 0

  /** Made by `Volume.acquireCookie`. */
  constructor(
    cache: FsCache,
    pool: Pool | undefined,
    runs: Runs,
    volume: string,
    key: string,
    auxiliary: CookieAuxiliary,
    released: () => void,
  ) {
    assertSize(auxiliary.size)
    this.#cache = cache
    this.#pool = pool
    this.#runs = runs
    this.#volume = volume
    this.key = key
    this.#version = auxiliary.version
    this.#size = auxiliary.size
    this.#object = nameOf(volume, key, auxiliary.version)
    this.#released = released
  }

  /** True while the file has room in the cache. */
  get enabled(): boolean {
    return this.#pool !== undefined
  }

  /** Bytes of the file. */
  get size(): number {
    return this.#size
  }

  /** The version whose pages these are. */
  get version(): string {
    return this.#version
  }

  /** Pages of the file: the last one may be there in part; the rest of it is zeros. */
  get pages(): number {
    return Math.ceil(this.#size / this.#cache.pageSize)
  }

  /**
   * Reads a page. Returns the answer, or a promise if the store has to wait; `NoData` also beyond the end of the file.
   * The buffer is untouched unless the answer is `Data`.
   */
  read(index: number, into: Uint8Array): ReadOutcome | Promise<ReadOutcome> {
    const { counters } = this.#cache
    counters.reads++
    const pool = this.#pool
    if (pool === undefined) {
      counters.reads_nobufs++
      return ReadOutcome.NoBuffer
    }
    if (index >= this.#nameable) return this.#answer(false)
    this.settle()
    const outcome = pool.get(this.#object, index, into)
    return outcome === GetOutcome.Deferred ? this.#fetch(pool, index, into) : this.#answer(outcome === GetOutcome.Hit)
  }

  /**
   * Asks for as many pages from `first` on as `into` has room for, each as by `read`: the answers, at once, or as a
   * promise where the store has to wait. Throws `RangeError` for room that is not that of pages.
   */
  readMany(first: number, into: Uint8Array): ReadOutcome[] | Promise<ReadOutcome[]> {
    const count = this.#pagesOf(into)
    const { counters, pageSize } = this.#cache
    counters.reads += count
    const pool = this.#pool
    if (pool === undefined) {
      counters.reads_nobufs += count
      return new Array<ReadOutcome>(count).fill(ReadOutcome.NoBuffer)
    }
    this.settle()
    const there = Math.max(0, Math.min(count, this.#nameable - first))
    const outcomes: GetOutcome[] = []
    this.#runs.get(pool, this.#object, first, into.subarray(0, there * pageSize), outcomes)
    const answers: ReadOutcome[] = []
    const waiting: Promise<void>[] = []
    for (let page = 0; page < count; page++) {
      const outcome = outcomes[page]
      answers.push(ReadOutcome.NoData)
      if (outcome !== GetOutcome.Deferred) answers[page] = this.#answer(outcome === GetOutcome.Hit)
      else
        waiting.push(
          this.#fetch(pool, first + page, into.subarray(page * pageSize, (page + 1) * pageSize)).then((answer) => {
            answers[page] = answer
          }),
        )
    }
    return waiting.length === 0 ? answers : Promise.all(waiting).then(() => answers)
  }

  /**
   * Whether all pages are there, as far as that can be told without reading them; they may go at any time. False where
   * the store cannot tell.
   */
  get complete(): boolean {
    this.settle()
    const { pages } = this
    return this.#pool !== undefined && pages === this.#nameable && this.#runs.has(this.#pool, this.#object, pages)
  }

  /** Hands in a clean page. Throws `RangeError` for one beyond the end of the file. */
  write(index: number, page: Uint8Array): WriteOutcome {
    assertPage(page, this.#cache.pageSize)
    if (this.writeMany(index, page) === 1) return WriteOutcome.Stored
    return this.enabled ? WriteOutcome.Dropped : WriteOutcome.NoBuffer
  }

  /**
   * Hands in clean pages, from `first` on, which lie one after the other: how many were stored. Throws `RangeError` for
   * one beyond the end of the file, and for bytes that are not pages.
   */
  writeMany(first: number, pages: Uint8Array): number {
    const count = this.#pagesWithin(first, pages)
    this.settle()
    return this.#put(first, count, pages)
  }

  /**
   * As `writeMany`, but the pages wait, and the cache keeps `pages`, which must not change any more: until `settleSoon`
   * or `settle`, or until the file is read or written. So who brings them need not wait for their copies. What finds
   * no room (16 MiB for all that waits) is put at once. Pages that the file loses meanwhile are dropped with it.
   */
  hold(first: number, pages: Uint8Array): void {
    const count = this.#pagesWithin(first, pages)
    if (count === 0) return
    let room = this.enabled && this.#runs.hold(pages.buffer.byteLength)
    // The oldest go first, a few at a time, so that the newest bytes of a page are put last.
    while (!room && this.putNext(count)) room = this.#runs.hold(pages.buffer.byteLength)
    if (room) this.#held.push({ first, bytes: pages })
    else this.#put(first, count, pages)
  }

  /** Puts the waiting pages, a part in each turn, from the next turn on. */
  settleSoon(): void {
    if (this.#held.length > 0) this.#runs.soon(this)
  }

  /** Puts the waiting pages now. */
  settle(): void {
    if (this.#held.length > 0) this.putNext(Number.POSITIVE_INFINITY)
  }

  /** For `settleSoon`: puts the next pages that wait, so many at most; false: none is left. */
  putNext(pages: number): boolean {
    const { pageSize } = this.#cache
    for (let left = pages; left > 0 && this.#held.length > 0; ) {
      const { first, bytes } = this.#held[0]!
      const count = Math.min(left, bytes.length / pageSize)
      const rest = bytes.subarray(count * pageSize)
      if (rest.length > 0) this.#held[0] = { first: first + count, bytes: rest }
      else {
        this.#held.shift()
        this.#runs.release(bytes.buffer.byteLength)
      }
      this.#put(first, count, bytes.subarray(0, count * pageSize))
      left -= count
    }
    return this.#held.length > 0
  }

  #put(first: number, count: number, pages: Uint8Array): number {
    const { counters } = this.#cache
    counters.writes += count
    if (this.#pool === undefined) {
      counters.writes_nobufs += count
      return 0
    }
    const stored = first + count <= this.#nameable ? this.#runs.put(this.#pool, this.#object, first, pages) : 0
    counters.writes_ok += stored
    counters.writes_dropped += count - stored
    return stored
  }

  /** Pages that a store has names for: a 32-bit index of 4 KiB each. Further on, a file is not cached. */
  get #nameable(): number {
    return Math.min(this.pages, 2 ** 32 / (this.#cache.pageSize / basePageSize))
  }

  #pagesOf(bytes: Uint8Array): number {
    const { pageSize } = this.#cache
    if (bytes.length % pageSize !== 0)
      throw new RangeError(`pages of ${this.key} have ${pageSize} bytes each, got ${bytes.length} bytes`)
    return bytes.length / pageSize
  }

  #pagesWithin(first: number, pages: Uint8Array): number {
    const count = this.#pagesOf(pages)
    if (Number.isInteger(first) && first >= 0 && first + count <= this.pages) return count
    throw new RangeError(
      `page ${first + Math.max(count, 1) - 1} of ${this.key} is beyond its end: it has ${this.#size} bytes`,
    )
  }

  /** What waits is not put any more. */
  #drop(): void {
    for (const { bytes } of this.#held.splice(0)) this.#runs.release(bytes.buffer.byteLength)
  }

  /** Drops a page that the client is about to change. */
  uncache(index: number): void {
    this.settle()
    this.#pool?.flushPage(this.#object, index)
  }

  /** The file has another length. Pages that are cut off, also in part, are dropped. */
  resize(size: number): void {
    assertSize(size)
    const { counters, pageSize } = this.#cache
    counters.resizes++
    this.settle()
    // The last page of before has zeros behind its end, where there is something now, or will be after another change.
    const from = Math.floor(Math.min(size, this.#size) / pageSize)
    if (this.pages - from > largestSweep) this.#pool?.flushObject(this.#object)
    else for (let index = from; index < this.pages; index++) this.#pool?.flushPage(this.#object, index)
    this.#epoch++
    this.#size = size
  }

  /** Begins a new version of the file: drops all pages; later pages belong to this version. */
  invalidate(auxiliary: CookieAuxiliary): void {
    assertSize(auxiliary.size)
    this.#cache.counters.invalidates++
    this.#drop()
    this.#pool?.flushObject(this.#object)
    this.#epoch++
    this.#version = auxiliary.version
    this.#size = auxiliary.size
    this.#object = nameOf(this.#volume, this.key, auxiliary.version)
    // What another client of the same store may have left under that name is of the same version: it stays.
  }

  /**
   * Relinquishes the cookie. `retire` drops its pages; otherwise a later cookie of the same version finds them.
   * Idempotent.
   */
  relinquish(retire = false): void {
    if (this.#pool === undefined && this.#epoch < 0) return
    const { counters } = this.#cache
    counters.relinquishes++
    if (retire) {
      counters.retires++
      this.#drop()
      this.#pool?.flushObject(this.#object)
    } else this.settle()
    this.#pool = undefined
    this.#epoch = -1
    this.#released()
  }

  async #fetch(pool: Pool, index: number, into: Uint8Array): Promise<ReadOutcome> {
    const epoch = this.#epoch
    const { pageSize, counters } = this.#cache
    // Not into the caller's page: it may turn out to be one of another version.
    const page = new Uint8Array(pageSize)
    let outcome: GetOutcome = GetOutcome.Miss
    try {
      outcome = await pool.fetch(this.#object, index, page)
    } catch (error) {
      // The server has the page: a store that cannot give its copy has none. Anything worse is loud.
      if (!(error instanceof TmemError) || (error.code !== 'TMEM_IO' && error.code !== 'TMEM_CORRUPT')) throw error
      counters.reads_failed++
    }
    const good = outcome === GetOutcome.Hit && epoch === this.#epoch && index < this.pages
    if (good) into.set(page)
    return this.#answer(good)
  }

  #answer(good: boolean): ReadOutcome {
    const { counters } = this.#cache
    if (good) counters.reads_ok++
    else counters.reads_nodata++
    return good ? ReadOutcome.Data : ReadOutcome.NoData
  }
}

function assertSize(size: number): void {
  if (!Number.isSafeInteger(size) || size < 0)
    throw new RangeError(`a size must be an integer, not negative; got ${size}`)
}

/** 24 bytes of SHA-256 over the three parts, each behind its length; never the reserved id. */
function nameOf(volume: string, key: string, version: string): ObjectId {
  let text = ''
  for (const part of [volume, key, version]) text += `${Buffer.byteLength(part)}:${part}`
  const name = BigInt(`0x${hash('sha256', text, 'hex').slice(0, 48)}`)
  return name === (1n << 192n) - 1n ? 0n : name
}
