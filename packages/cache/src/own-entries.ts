/**
 * The entries of one thread, in pages of a stack, found by a table without an object per entry.
 *
 * New entries are written into a page in the window, and read there like all others. A full page goes into the stack. A
 * read of an entry brings its whole page back, of which the window keeps a copy. In a stack of memory alone, the window
 * takes all spare memory, and gives it back before any entry is evicted.
 *
 * Eviction takes expired pages first; then, as in S3-FIFO, the oldest page of the new entries while these are more than
 * a tenth, and else the oldest page of the reused entries. Used entries of an evicted page are written again to the
 * queue of reused entries, and the others are dropped, so that entries are judged and not pages. Places that hold only
 * ephemeral pages evict on their own; a vanished page is a miss for each of its entries.
 *
 * Invariants: `live` of a page is the number of entries in the table that refer to it; a page in a queue has at least
 * one; a page number is reused only when no entry refers to its old page. `#record` and `#hash` belong to the last key
 * of a lookup, and are read before any await.
 *
 * Source of the rule: Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023); of pages of one
 * lifetime, Segcache (NSDI 2021).
 */
import { GetOutcome, PutOutcome, putOutcomeName, systemAllocator, TmemError } from '@tmem/core'
import { copyBytes } from '@tmem/core/runtime'
import type { CacheKey } from './cache.ts'
import { type Entries, type EntryStats, hashOfKey, type Lifetime, timeOf } from './entries.ts'
import { KeyHash, type KeyKind } from './hash.ts'
import { hit, Miss, stale } from './outcome.ts'
import {
  emptyingFrame,
  isMainQueue,
  movingFrame,
  nestedFrame,
  none,
  PageBook,
  queueFor,
  queues,
  transferFrame,
} from './pages.ts'
import {
  EntryFacts,
  headBytes,
  maxSharedBytes,
  offsetIn,
  pageBytes,
  RecordView,
  recordBytes,
  recordsIn,
  setOffset,
  stampIn,
  writeHead,
  writeRecord,
} from './records.ts'
import { Buffer } from './runtime.ts'
import { restoreSnapshot, sinkPages, takeSnapshot, writeSnapshot } from './snapshot.ts'
import type { CacheStack } from './stack.ts'
import { EntryTable, Ghosts, maxRecords, maxUses, noSlot, pageOf, recordOf, refOf, usesOf, withUses } from './table.ts'
import { Tags } from './tags.ts'
import { maxValueBytes, readRaw, ValueKind, type ValueWriter } from './values.ts'

/** How often a write makes room before it gives up; and how often in vain before what was used is not kept any more. */
const attempts = 512
const patientAttempts = 32
/** How often room is made for a page that was refused for a reason: not where no room would help. */
const attemptsFor = (outcome: PutOutcome): number => {
  switch (outcome) {
    case PutOutcome.NoMemory:
    case PutOutcome.Quota:
      return attempts
    case PutOutcome.Policy:
    case PutOutcome.AllocationFailed:
      return patientAttempts
    default:
      return 0
  }
}
/** Pages that are moved together then. */
const compactPages = 64
/** Pages that a write lets go while more is used than the limit allows. */
const excessPages = 4

/** Pages that are written down at once. */
const sunkAtOnce = 1024
/** What the tables have to leave to the places. */
const leastPlacesBytes = 512 * 1024
/** Steps in which the places get their share of the limit. */
const shareBytes = 64 * 1024

/** Pages that come to a full window until it is looked anew whether there is memory for more of it. */
const growEvery = 16
/** Bytes of the window for each so many bytes of memory; and its smallest and largest number of pages. */
const windowShare = 24
/** The same for what the window may have besides, of memory that nothing else needs; and what it leaves of that. */
const extraShare = 2
const leftShare = 16
const minFrames = 48
const maxFrames = 16384

/** Takes over an entry: a record, and whether it was used again. */
export type Adopt = (bytes: Buffer, at: number, end: number, hash: number, expiry: number, isMain: boolean) => void

/** See the head of the file. */
export class OwnEntries implements Entries {
  value: unknown
  isAbsent = false
  expiry: number = Number.POSITIVE_INFINITY
  opening: Promise<void> | undefined
  readonly #clock: () => number
  /** Whether anybody wants to know how many entries went. */
  readonly #isTold: () => boolean
  readonly #stack: CacheStack
  /** That of an earlier run, once its entries are here. */
  #hash: KeyHash
  readonly #table: EntryTable
  readonly #ghosts: Ghosts
  readonly #book: PageBook
  readonly #tags: Tags = new Tags()
  readonly #facts: EntryFacts = new EntryFacts()
  readonly #record: RecordView = new RecordView()
  /** By queue: the page that is being filled, and the bytes of its records. */
  readonly #open: Int32Array = new Int32Array(queues).fill(none)
  readonly #filled: Int32Array = new Int32Array(queues)
  /** A page on its way, and one that is being emptied: places in the window. */
  readonly #transfer: Buffer
  /** Records of a page that is being emptied which are written again: number, and uses. */
  readonly #keeping: Uint8Array = new Uint8Array(maxRecords * 2)
  #isEmptying = false
  /** Entries that went, of which nobody was told yet. */
  #untold = 0
  /** The page of the entry that was found last was not in the window, or that is used again and again since now. */
  #isToMove = false
  /** Pages that come to the window until it is looked whether it may grow. */
  #patience = 0
  /** The stack has asked for a tick, or uses more than its limit. */
  #isOver = false
  #isClosed = false
  #isRestored = false
  /** The last snapshot. */
  #epoch = 0
  readonly #counts = {
    sets: 0,
    deletes: 0,
    room: 0,
    expired: 0,
    refused: 0,
    vanished: 0,
    kept: 0,
    pagesRead: 0,
    pagesWritten: 0,
  }
  readonly #refusals: Map<string, number> = new Map()

  /**
   * @param open the stack, which calls `wake` when it asks for a tick
   * @throws RangeError when the limit is too low for the tables; then the stack is closed
   */
  constructor(open: (wake: () => void) => CacheStack, hash: KeyHash, clock: () => number, isTold: () => boolean) {
    this.#hash = hash
    this.#clock = clock
    this.#isTold = isTold
    this.#stack = open(() => {
      this.#isOver = true
    })
    const { limit, capacity } = this.#stack
    const frames = Math.floor(limit.maximumBytes / windowShare / pageBytes)
    // Over a file, or a stack of the user's, memory that is free now is the places'.
    const extraFrames = this.isOfMemory ? Math.floor(limit.maximumBytes / extraShare / pageBytes) : 0
    const baseFrames = Math.min(maxFrames, Math.max(minFrames, frames))
    this.#book = new PageBook(capacity, baseFrames, extraFrames, this.#stack.allocator)
    this.#table = new EntryTable(this.#stack.allocator)
    this.#ghosts = new Ghosts(new Int32Array(2 ** Math.floor(Math.log2(limit.maximumBytes / 512))))
    this.#transfer = this.#book.window.subarray(transferFrame * pageBytes, (transferFrame + 1) * pageBytes)
    this.#shareLimit()
    const least = this.#ownBytes() + this.#stack.taken.bytes + leastPlacesBytes
    if (limit.bytes >= least || this.#stack.places === undefined) {
      if (!this.#stack.survives) return
      this.opening = this.#restore()
      // Who waits for it is told.
      this.opening.catch(() => undefined)
      return
    }
    // A rejection of this close is not handled on purpose: it surfaces beside the error thrown here.
    void this.close()
    throw new RangeError(`cache: memory is at least ${least} bytes with these settings, got ${limit.bytes}`)
  }

  find(who: string, key: CacheKey, isUse: boolean): number {
    const hash = hashOfKey(this.#hash, who, key)
    return this.#taken(key, this.#find(key, hash, isUse), isUse)
  }

  async bring<T>(key: CacheKey, use: (outcome: number) => T | Promise<T>): Promise<T> {
    const hash = this.#hash.of(key)
    return await this.#bring(key, hash, (outcome) => use(this.#taken(key, outcome, true)))
  }

  versionOf(): undefined {
    return undefined
  }

  store(who: string, key: CacheKey, writer: ValueWriter, lifetime: Lifetime): boolean {
    const { expiry, fresh, tags } = lifetime
    const facts = this.#facts
    facts.tags = tags.length === 0 ? noHashes : tags.map((tag) => this.#hash.of(tag))
    if (tags.length > 0) facts.sequence = ++this.#tags.sequence
    const hash = hashOfKey(this.#hash, who, key)
    const { kind, length } = this.#hash
    // What never ends may still be fresh for a while only; there is no end of freshness behind that of life.
    const now = fresh === Number.POSITIVE_INFINITY ? 0 : this.#clock()
    facts.expiry = timeOf(now + expiry)
    facts.fresh = fresh < expiry ? timeOf(now + fresh) : Number.POSITIVE_INFINITY
    this.#counts.sets++
    const isMain = this.#replace(hash)
    const bytes = recordBytes(facts, length, writer.length)
    const queue = queueFor(expiry, isMain)
    if (bytes > maxSharedBytes) return this.#storeSpan(key, kind, length, hash, bytes, queue, writer)
    const at = this.#reserve(queue, bytes, hash)
    if (at === none) return this.#refused('no room')
    const { window } = this.#book
    writer.writeTo(window, writeRecord(window, at, facts, key, kind, length, writer.kind, writer.length))
    return this.#noted(queue, at, bytes, hash, facts.expiry, 0)
  }

  remove(who: string, key: CacheKey): number {
    const hash = hashOfKey(this.#hash, who, key)
    const outcome = this.#taken(key, this.#find(key, hash, false), false)
    if (outcome === hit || outcome === stale || outcome === Miss.Deferred) {
      this.#remove(this.#table.find(hash))
      this.#counts.deletes++
    }
    return outcome
  }

  deleteByTag(tag: string): void {
    this.#tags.delete(this.#hash.of(tag))
  }

  clear(): void {
    const { pool } = this.#stack
    const book = this.#book
    this.#table.clear()
    this.#ghosts.clear()
    this.#tags.clear()
    this.#open.fill(none)
    for (let page = 0; page < book.watermark; page++) if (book.spans[page] !== 0) pool.flushObject(page + 1)
    pool.flushObject(0)
    book.clear()
    this.#shareLimit()
  }

  tick(pages: number): boolean {
    this.#shareLimit()
    return this.#relieve(pages)
  }

  async sync(): Promise<void> {
    if (!this.#stack.survives)
      throw new TmemError('TMEM_UNSUPPORTED', 'cache.sync: no place of this cache survives the process', {
        layer: 'cache',
      })
    await this.#writeDown()
  }

  stats(): EntryStats {
    const { limit, store, taken, largest } = this.#stack
    const places = (store.usage?.().places ?? []).map(({ name, pages, bytes, usedBytes }) => ({
      name,
      pages,
      bytes,
      usedBytes,
    }))
    const { sets, deletes, room, expired, refused, vanished, kept, pagesRead, pagesWritten } = this.#counts
    return {
      entries: this.#table.count,
      sets,
      refused: Object.fromEntries(this.#refusals),
      deletes,
      evictions: { room, expired, refused, vanished },
      kept,
      pagesRead,
      pagesWritten,
      limitBytes: limit.bytes,
      memoryBytes: this.#ownBytes() + taken.bytes + places.reduce((sum, { usedBytes }) => sum + usedBytes, 0),
      tableBytes: this.#table.bytes,
      pageTableBytes: this.#book.tableBytes,
      windowBytes: this.#book.windowBytes,
      largestBytes: Math.min(maxValueBytes, Math.floor(largest)),
      places,
    }
  }

  takeEvicted(): number {
    const count = this.#untold
    this.#untold = 0
    return count
  }

  check(): void {
    const book = this.#book
    const live = new Map<number, number>()
    this.#table.forEach((hash, ref) => {
      const page = pageOf(ref)
      if (book.isGone(page)) return
      live.set(page, (live.get(page) ?? 0) + 1)
      if (this.#table.find(hash) === noSlot) throw new Error(`cache: an entry of page ${page} cannot be found`)
    })
    for (const [page, count] of live)
      if (book.live[page] !== count)
        throw new Error(`cache: page ${page} has ${count} entries, counted ${book.live[page]}`)
    book.check((page) => live.has(page))
    this.#stack.store.check?.()
  }

  async close(): Promise<void> {
    this.#isClosed = true
    try {
      await this.opening
      if (this.#isRestored) await this.#writeDown()
    } finally {
      await this.#stack.store.close()
    }
  }

  /** Seeds of the hash; the last write of an entry with tags; bytes of the limit. */
  get seeds(): readonly [number, number] {
    return [this.#hash.seed0, this.#hash.seed1]
  }

  get sequence(): number {
    return this.#tags.sequence
  }

  get limitBytes(): number {
    return this.#stack.limit.bytes
  }

  /** Whether the stack is one that the cache has made of memory alone. */
  get isOfMemory(): boolean {
    return this.#stack.places !== undefined && !this.#stack.survives
  }

  /** Hands all entries over, the oldest first, and keeps none. They give their memory back page by page. */
  handOver(adopt: Adopt): void {
    const book = this.#book
    // Nobody reads here again.
    this.#patience = Number.POSITIVE_INFINITY
    while (book.shrink());
    for (let queue = 0; queue < queues; queue++) {
      for (let page = book.oldest(queue); page !== none; page = book.oldest(queue)) {
        this.#handOverPage(page, isMainQueue(queue), adopt)
        book.unlink(page)
        this.#drop(page)
      }
      const page = this.#open[queue]!
      this.#open[queue] = none
      if (page === none) continue
      this.#handOverPage(page, isMainQueue(queue), adopt)
      book.release(page)
    }
  }

  #handOverPage(page: number, isMain: boolean, adopt: Adopt): void {
    const book = this.#book
    const record = this.#record
    if (book.spans[page] !== 0) {
      const whole = Buffer.allocUnsafeSlow(book.spans[page]! * pageBytes)
      const hash = book.hashes[page]!
      if (this.#readSpan(page, whole) === hit && record.read(whole, headBytes, whole.length)) {
        if (!this.#tags.hasDeleted(record)) adopt(whole, headBytes, record.end, hash, record.expiry, isMain)
      }
      this.#table.removeAt(this.#table.find(hash))
      book.live[page] = 0
      return
    }
    const isThere = book.locate(page) || this.#fill(page) === hit
    const { bytes, at } = book
    for (let n = 0; isThere && n < recordsIn(bytes, at); n++) {
      const from = at + offsetIn(bytes, at, n)
      if (!record.read(bytes, from, at + pageBytes)) continue
      const { end, expiry } = record
      const isDeleted = this.#tags.hasDeleted(record)
      const slot = this.#slotOf(page, n)
      if (slot === noSlot) continue
      const hash = this.#hash.bytes(bytes, record.keyAt, record.keyLength, record.keyKind)
      this.#table.removeAt(slot)
      if (!isDeleted) adopt(bytes, from, end, hash, expiry, isMain)
    }
    book.live[page] = 0
  }

  /** Reads what was found, which is where it is now only. */
  #taken(key: CacheKey, outcome: number, isUse: boolean): number {
    if (outcome !== hit && outcome !== stale) return outcome
    const { bytes, valueAt, valueLength, valueKind, expiry } = this.#record
    this.isAbsent = valueKind === ValueKind.Absent
    this.expiry = expiry
    if (!isUse) return outcome
    this.value = readRaw(bytes, valueAt, valueLength, valueKind)
    if (this.#isToMove && outcome === hit) this.#gather(key)
    return outcome
  }

  // ---- The file ---------------------------------------------------------------------------------------------------

  async #restore(): Promise<void> {
    const { pool, store } = this.#stack
    await store.ready?.()
    const head = await restoreSnapshot(pool, { table: this.#table, book: this.#book, tags: this.#tags })
    if (head !== undefined) {
      this.#epoch = head.epoch
      this.#hash = new KeyHash(head.seed0, head.seed1)
    }
    this.#shareLimit()
    this.#isRestored = true
    this.opening = undefined
  }

  async #writeDown(): Promise<void> {
    const { pool, store } = this.#stack
    const book = this.#book
    for (let queue = 0; queue < queues; queue++) if (this.#open[queue] !== none) this.#seal(queue)
    const indexes = new Uint32Array(sunkAtOnce)
    // Pages that come meanwhile may sink, or not; the numbers are asked for anew after each wait.
    for (let page = 0; page < book.watermark; ) {
      let count = 0
      for (; page < book.watermark && count < sunkAtOnce; page++) {
        if (!book.isQueued(page)) continue
        if (book.spans[page] !== 0) break
        indexes[count++] = page
      }
      await sinkPages(pool, 0, indexes, count)
      const span = book.isQueued(page) ? book.spans[page]! : 0
      if (count === sunkAtOnce || span === 0) continue
      await sinkPages(
        pool,
        page + 1,
        Uint32Array.from({ length: span }, (_, n) => n),
        span,
      )
      page++
    }
    this.#epoch = (this.#epoch + 1) >>> 0
    const { seed0, seed1 } = this.#hash
    const epoch = this.#epoch
    const parts = takeSnapshot({ table: this.#table, book, tags: this.#tags }, epoch, seed0, seed1)
    await writeSnapshot(pool, parts, epoch)
    await store.sync?.()
  }

  // ---- Finding ----------------------------------------------------------------------------------------------------

  /** Looks for the entry of a key. On a hit, `#record` is it; and on `stale`. */
  #find(key: CacheKey, hash: number, isUse = true): number {
    const book = this.#book
    const slot = this.#table.find(hash)
    if (slot === noSlot) return this.#ghosts.has(hash) ? Miss.Evicted : Miss.Absent
    const ref = this.#table.refAt(slot)
    const page = pageOf(ref)
    const { kind, length } = this.#hash
    this.#isToMove = false
    // Only shared pages are in the window.
    const isHere = book.locate(page)
    if (isHere || book.spans[page] === 0) {
      if (!isHere) {
        const outcome = book.isGone(page) ? Miss.Vanished : this.#fill(page)
        if (outcome !== hit) return this.#lost(hash, page, outcome)
      }
      const { bytes, at } = book
      if (!this.#record.read(bytes, at + offsetIn(bytes, at, recordOf(ref)), at + pageBytes)) return Miss.Collided
    } else {
      const whole = Buffer.allocUnsafeSlow(book.spans[page]! * pageBytes)
      const outcome = this.#readSpan(page, whole)
      if (outcome !== hit) return this.#lost(hash, page, outcome)
      if (!this.#record.read(whole, headBytes, whole.length)) return Miss.Collided
    }
    return this.#judge(key, kind, length, hash, isUse)
  }

  /** Whether the record that was read is the one that was looked for, and still alive. */
  #judge(key: CacheKey, kind: KeyKind, length: number, hash: number, isUse: boolean): number {
    const record = this.#record
    if (!record.isOf(key, kind, length)) return Miss.Collided
    if (record.tagCount > 0 && this.#tags.hasDeleted(record)) {
      this.#remove(this.#table.find(hash))
      return Miss.Untagged
    }
    let outcome: number = hit
    if (record.expiry !== Number.POSITIVE_INFINITY || record.fresh !== Number.POSITIVE_INFINITY) {
      const now = this.#clock()
      if (now >= record.expiry) {
        this.#remove(this.#table.find(hash))
        this.#counts.expired++
        return Miss.Expired
      }
      if (now >= record.fresh) outcome = stale
    }
    if (!isUse) return outcome
    const slot = this.#table.find(hash)
    const ref = this.#table.refAt(slot)
    const uses = usesOf(ref)
    if (uses === maxUses) return outcome
    this.#table.setRef(slot, withUses(ref, uses + 1))
    if (uses + 1 === maxUses) this.#isToMove = true
    return outcome
  }

  /** Brings a page to the window, where the book then points at it: `hit`, `Miss.Deferred`, or `Miss.Vanished`. */
  #fill(page: number): number {
    const book = this.#book
    if (book.isTight) this.#growWindow()
    book.enter(page)
    const { bytes, at } = book
    // A view that lives as long as this call is cheaper than one more copy of a page, and than a view for each frame.
    const outcome = this.#stack.pool.get(0, page, new Uint8Array(bytes.buffer, bytes.byteOffset + at, pageBytes))
    if (outcome === GetOutcome.Hit && stampIn(bytes, at) === book.stamps[page]) {
      this.#counts.pagesRead++
      this.#isToMove = true
      return hit
    }
    book.dropFrame(page)
    return outcome === GetOutcome.Deferred ? Miss.Deferred : Miss.Vanished
  }

  /** Reads all pages of a record that has its own. */
  #readSpan(page: number, into: Buffer): number {
    const { pool } = this.#stack
    for (let n = 0; n * pageBytes < into.length; n++) {
      const outcome = pool.get(page + 1, n, into.subarray(n * pageBytes, (n + 1) * pageBytes))
      if (outcome === GetOutcome.Deferred) return Miss.Deferred
      if (outcome !== GetOutcome.Hit) return Miss.Vanished
      if (n === 0 && stampIn(into, 0) !== this.#book.stamps[page]) return Miss.Vanished
      this.#counts.pagesRead++
    }
    return hit
  }

  /** A page was not to be had for an entry: unless one only has to wait for it, it is gone. */
  #lost(hash: number, page: number, outcome: number): number {
    if (outcome === Miss.Deferred) return outcome
    const book = this.#book
    this.#table.removeAt(this.#table.find(hash))
    // It was counted when it went; where pages do not vanish it was the cache that let it go.
    if (book.isGone(page)) return this.#stack.pool.attributes.persistent ? Miss.Evicted : Miss.Vanished
    this.#counts.vanished += book.live[page]!
    book.live[page]!--
    book.unlink(page)
    this.#drop(page)
    return outcome
  }

  /** Waits for the page of a key, looks again, and answers what is made of that at once: while it is still so. */
  async #bring<T>(key: CacheKey, hash: number, use: (outcome: number) => T | Promise<T>): Promise<T> {
    const book = this.#book
    const { pool } = this.#stack
    for (;;) {
      const slot = this.#table.find(hash)
      if (slot === noSlot) return use(this.#find(key, hash))
      const page = pageOf(this.#table.refAt(slot))
      const stamp = book.stamps[page]!
      const span = book.spans[page]!
      const bytes = Buffer.allocUnsafeSlow(Math.max(1, span) * pageBytes)
      let got: GetOutcome = GetOutcome.Hit
      for (let n = 0; n * pageBytes < bytes.length && got === GetOutcome.Hit; n++) {
        const into = bytes.subarray(n * pageBytes, (n + 1) * pageBytes)
        got = span === 0 ? await pool.fetch(0, page, into) : await pool.fetch(page + 1, n, into)
      }
      if (this.#isClosed) throw new TmemError('TMEM_CLOSED', 'cache.load: the cache is closed', { layer: 'cache' })
      const again = this.#table.find(hash)
      if (again === noSlot) return use(this.#rehashed(key, hash))
      if (pageOf(this.#table.refAt(again)) !== page || book.stamps[page] !== stamp) {
        // Written anew meanwhile.
        const outcome = this.#rehashed(key, hash)
        if (outcome !== Miss.Deferred) return use(outcome)
        continue
      }
      if (got !== GetOutcome.Hit || stampIn(bytes, 0) !== stamp) return use(this.#lost(hash, page, Miss.Vanished))
      this.#counts.pagesRead += Math.max(1, span)
      this.#hash.of(key)
      const { kind, length } = this.#hash
      const ref = this.#table.refAt(again)
      const at = span === 0 ? offsetIn(bytes, 0, recordOf(ref)) : headBytes
      if (!this.#record.read(bytes, at, bytes.length)) return use(Miss.Collided)
      if (span === 0 && !book.locate(page)) {
        book.enter(page)
        copyBytes.call(bytes, book.bytes, book.at, 0, pageBytes)
      }
      return use(this.#judge(key, kind, length, hash, true))
    }
  }

  /** Looks for a key when other keys were hashed meanwhile. */
  #rehashed(key: CacheKey, hash: number): number {
    this.#hash.of(key)
    return this.#find(key, hash)
  }

  /**
   * An entry that is used again and again is written anew beside others that were used again: so a page in the window
   * has several such entries, instead of one among others, and they do not go with a page of what is new.
   */
  #gather(key: CacheKey): void {
    const book = this.#book
    const { window } = book
    this.#isToMove = false
    const hash = this.#hash.of(key)
    const slot = this.#table.find(hash)
    if (slot === noSlot) return
    const ref = this.#table.refAt(slot)
    const page = pageOf(ref)
    if (usesOf(ref) < maxUses || book.spans[page] !== 0 || book.isFilling(page) || isMainQueue(book.queueOf(page)))
      return
    if (!book.locate(page)) return
    const record = this.#record
    const from = movingFrame * pageBytes
    const start = book.at + offsetIn(book.bytes, book.at, recordOf(ref))
    if (!record.read(book.bytes, start, book.at + pageBytes)) return
    const bytes = record.end - start
    const { expiry } = record
    copyBytes.call(book.bytes, window, from, start, record.end)
    this.#remove(slot)
    const queue = queueFor(expiry === Number.POSITIVE_INFINITY ? expiry : expiry - this.#clock(), true)
    const to = this.#reserve(queue, bytes, hash)
    if (to === none) {
      this.#counts.refused++
      return
    }
    window.copyWithin(to, from, from + bytes)
    this.#noted(queue, to, bytes, hash, expiry, 1)
    this.#counts.kept++
  }

  // ---- Storing ----------------------------------------------------------------------------------------------------

  /** Removes the entry of a hash, if there is one. Whether the next one has been here before, and was used. */
  #replace(hash: number): boolean {
    const slot = this.#table.find(hash)
    if (slot === noSlot) {
      const isBack = this.#ghosts.has(hash)
      if (isBack) this.#ghosts.remove(hash)
      return isBack
    }
    const ref = this.#table.refAt(slot)
    const page = pageOf(ref)
    const isMain = usesOf(ref) > 0 || (!this.#book.isFilling(page) && isMainQueue(this.#book.queueOf(page)))
    this.#remove(slot)
    return isMain
  }

  /**
   * Makes room for a record in the page of a queue that is being filled, and in the table: where it goes in the window,
   * or `none`. Nothing but the record may be written before `#noted`.
   */
  #reserve(queue: number, bytes: number, hash: number): number {
    const book = this.#book
    if (!this.#growTable(hash)) return none
    let page = this.#open[queue]!
    if (page !== none) {
      const at = book.placeOf(page)
      const records = recordsIn(book.window, at)
      const filled = this.#filled[queue]!
      if (records < maxRecords && filled + bytes + 2 * (records + 1) <= pageBytes) return at + filled
      this.#seal(queue)
    }
    page = this.#takePage(0)
    if (page === none) return none
    // What made room may have begun one.
    if (this.#open[queue] !== none) {
      book.release(page)
      return this.#reserve(queue, bytes, hash)
    }
    const at = book.enterFilling(page)
    book.window.fill(0, at, at + pageBytes)
    writeHead(book.window, at, 0, book.stamps[page]!)
    this.#open[queue] = page
    this.#filled[queue] = headBytes
    return at + headBytes
  }

  /** Notes the record that was written where `#reserve` said. */
  #noted(queue: number, at: number, bytes: number, hash: number, expiry: number, uses: number): boolean {
    const book = this.#book
    const page = this.#open[queue]!
    const from = book.placeOf(page)
    const record = recordsIn(book.window, from)
    setOffset(book.window, from, record, at - from)
    writeHead(book.window, from, record + 1, book.stamps[page]!)
    this.#filled[queue]! += bytes
    if (expiry > book.expiry[page]!) book.expiry[page] = expiry
    this.#table.add(hash, refOf(page, record, uses))
    book.live[page]!++
    return true
  }

  /** Stores a record in pages of its own. */
  #storeSpan(
    key: CacheKey,
    kind: KeyKind,
    length: number,
    hash: number,
    recordLength: number,
    queue: number,
    writer: ValueWriter,
  ): boolean {
    const { pool, largest, store } = this.#stack
    const book = this.#book
    const span = Math.ceil((headBytes + recordLength) / pageBytes)
    const whole = span * pageBytes > largest ? undefined : systemAllocator.allocate(span * pageBytes, 'cache.value')
    const page = whole === undefined || !this.#growTable(hash) ? none : this.#takePage(span)
    if (whole === undefined || page === none) {
      writer.takeAbsent()
      return this.#refused(whole === undefined ? 'too large' : 'no room')
    }
    const { expiry } = this.#facts
    const bytes = Buffer.from(whole, 0, span * pageBytes)
    writeHead(bytes, 0, 1, book.stamps[page]!)
    writer.writeTo(bytes, writeRecord(bytes, headBytes, this.#facts, key, kind, length, writer.kind, writer.length))
    this.#shareLimit()
    // All of its pages together.
    let inVain = 0
    for (let n = 0; n < span; n++) {
      const part = bytes.subarray(n * pageBytes, (n + 1) * pageBytes)
      let outcome = pool.put(page + 1, n, part)
      for (let tries = 0; tries < attemptsFor(outcome); tries++) {
        if (!this.#makeRoom(inVain < patientAttempts)) break
        outcome = pool.put(page + 1, n, part)
        if (outcome !== PutOutcome.Stored) inVain++
      }
      if (outcome === PutOutcome.Stored) continue
      pool.flushObject(page + 1)
      book.release(page)
      return this.#refused(
        outcome === PutOutcome.Unavailable ? (store.failure?.message ?? 'Unavailable') : putOutcomeName(outcome),
      )
    }
    this.#counts.pagesWritten += span
    this.#table.add(hash, refOf(page, 0, 0))
    book.live[page] = 1
    book.expiry[page] = expiry
    book.hashes[page] = hash
    book.append(page, queue)
    if (this.#isOver) this.#relieve(excessPages)
    return true
  }

  /**
   * The page of a queue that is being filled is full: it goes into the stack, or, where nothing helps, with its
   * entries.
   */
  #seal(queue: number): void {
    const book = this.#book
    const page = this.#open[queue]!
    this.#open[queue] = none
    if (book.live[page] === 0) {
      book.release(page)
      return
    }
    this.#shareLimit()
    let outcome = this.#put(page)
    for (let tries = 0; tries < attemptsFor(outcome); tries++) {
      if (!this.#makeRoom(tries < patientAttempts)) break
      outcome = this.#put(page)
    }
    if (outcome !== PutOutcome.Stored) {
      this.#counts.refused += book.live[page]!
      this.#forgetEntries(page, book.placeOf(page))
      book.release(page)
      return
    }
    this.#counts.pagesWritten++
    book.filled(page)
    book.append(page, queue)
    if (this.#isOver) this.#relieve(excessPages)
  }

  #put(page: number): PutOutcome {
    const from = this.#book.placeOf(page)
    this.#book.window.copyWithin(transferFrame * pageBytes, from, from + pageBytes)
    return this.#stack.pool.put(0, page, this.#transfer)
  }

  #refused(reason: string): false {
    this.#refusals.set(reason, (this.#refusals.get(reason) ?? 0) + 1)
    return false
  }

  /** A number for a page; those that are gone, and then the oldest, make room. */
  #takePage(span: number): number {
    const book = this.#book
    if (book.gone > 64 && book.gone * 8 > book.used) this.#sweep()
    let page = book.take(span)
    if (page === none && book.gone > 0) {
      this.#sweep()
      page = book.take(span)
    }
    for (let tries = 0; page === none && tries < attempts && this.#evict(tries < patientAttempts); tries++)
      page = book.take(span)
    return page
  }

  /** Forgets the entries of pages that are gone. */
  #sweep(): void {
    const book = this.#book
    this.#table.removeWhere((ref) => book.isGone(pageOf(ref)))
    book.releaseGone()
  }

  /** Sees to it that a hash can be added to the table, within the limit. */
  #growTable(hash: number): boolean {
    const growth = this.#table.growthFor(hash)
    if (growth === 0) return true
    const { limit } = this.#stack
    // Half of it at least is for what the table is about.
    for (let tries = 0; this.#ownBytes() - this.#book.extraBytes + growth > limit.bytes / 2; tries++) {
      if (tries === attempts || !this.#evict(tries < patientAttempts)) return false
      if (this.#table.growthFor(hash) === 0) return true
    }
    if (!this.#table.reserve(hash)) return false
    this.#shareLimit()
    return true
  }

  // ---- Removing ---------------------------------------------------------------------------------------------------

  /** Removes the entry in the slot that was found last. */
  #remove(slot: number): void {
    const book = this.#book
    const page = pageOf(this.#table.refAt(slot))
    this.#table.removeAt(slot)
    if (book.isGone(page)) return
    book.live[page]!--
    if (book.live[page] !== 0 || book.isFilling(page)) return
    book.unlink(page)
    this.#drop(page)
  }

  /** A page that is in no queue ends; its number, when no entry refers to it. */
  #drop(page: number): void {
    const book = this.#book
    if (book.spans[page] === 0) this.#stack.pool.flushPage(0, page)
    else this.#stack.pool.flushObject(page + 1)
    if (book.live[page] === 0) book.release(page)
    else book.setGone(page)
  }

  /** Removes all entries that refer to a shared page, which is at a place in the window. */
  #forgetEntries(page: number, at: number): void {
    const { window } = this.#book
    const record = this.#record
    for (let n = recordsIn(window, at) - 1; n >= 0; n--) {
      if (!record.read(window, at + offsetIn(window, at, n), at + pageBytes)) continue
      const slot = this.#slotOf(page, n)
      if (slot !== noSlot) this.#table.removeAt(slot)
    }
    this.#book.live[page] = 0
  }

  /** The slot of the record that was read, if it is that of page and number. */
  #slotOf(page: number, number: number): number {
    const { bytes, keyAt, keyLength, keyKind } = this.#record
    const slot = this.#table.find(this.#hash.bytes(bytes, keyAt, keyLength, keyKind))
    if (slot === noSlot) return noSlot
    const ref = this.#table.refAt(slot)
    return pageOf(ref) === page && recordOf(ref) === number ? slot : noSlot
  }

  /** The page that goes next, or `none`. */
  #victim(): number {
    const book = this.#book
    const now = this.#clock()
    const small = this.#oldestOf(0, now)
    // Expired.
    if (small < none) return -2 - small
    const main = this.#oldestOf(1, now)
    if (main < none) return -2 - main
    if (small === none) return main
    return main === none || book.queued[0]! * 10 > book.queued[1]! ? small : main
  }

  /** The oldest page of the queues of a kind, or `none`; a page of which all has expired as -2 - page. */
  #oldestOf(kind: number, now: number): number {
    const book = this.#book
    let oldest: number = none
    for (let queue = kind; queue < queues; queue += 2) {
      const page = book.oldest(queue)
      if (page === none) continue
      if (book.expiry[page]! <= now) return -2 - page
      if (oldest === none || book.stamps[page]! < book.stamps[oldest]!) oldest = page
    }
    return oldest
  }

  /** Lets one page go: what is used of it is written anew, if that is to be kept. False: there is none. */
  #evict(isToKeep: boolean): boolean {
    const page = this.#victim()
    if (page === none) return false
    const book = this.#book
    const wasMain = isMainQueue(book.queueOf(page))
    const before = this.#counts.room + this.#counts.expired
    // What is written anew needs room itself.
    const isKept = isToKeep && !this.#isEmptying
    if (book.spans[page] === 0) this.#evictShared(page, wasMain, isKept)
    else this.#evictSpan(page, wasMain, isKept)
    if (this.#isTold()) this.#untold += this.#counts.room + this.#counts.expired - before
    return true
  }

  #evictSpan(page: number, wasMain: boolean, isKept: boolean): void {
    const book = this.#book
    const hash = book.hashes[page]!
    const slot = this.#table.find(hash)
    const ref = this.#table.refAt(slot)
    const now = this.#clock()
    const queue = queueFor(book.expiry[page]! - now, true)
    book.unlink(page)
    if (usesOf(ref) > 0 && book.expiry[page]! > now && isKept) {
      this.#table.setRef(slot, withUses(ref, wasMain ? usesOf(ref) - 1 : 0))
      this.#counts.kept++
      book.append(page, queue)
      return
    }
    this.#table.removeAt(slot)
    if (book.expiry[page]! > now) this.#went(hash, wasMain)
    else this.#counts.expired++
    book.live[page] = 0
    this.#drop(page)
  }

  #evictShared(page: number, wasMain: boolean, isKept: boolean): void {
    const book = this.#book
    const { window } = book
    const frame = (this.#isEmptying ? nestedFrame : emptyingFrame) * pageBytes
    book.unlink(page)
    if (book.locate(page)) copyBytes.call(book.bytes, window, frame, book.at, book.at + pageBytes)
    else {
      const outcome = this.#stack.pool.get(0, page, this.#transfer)
      const from = transferFrame * pageBytes
      if (outcome !== GetOutcome.Hit || stampIn(window, from) !== book.stamps[page]) {
        // Nobody waits for it here: what is on a disk goes as it is.
        if (outcome === GetOutcome.Deferred) this.#counts.room += book.live[page]!
        else this.#counts.vanished += book.live[page]!
        this.#drop(page)
        return
      }
      window.copyWithin(frame, from, from + pageBytes)
    }
    const now = book.expiry[page] === Number.POSITIVE_INFINITY ? 0 : this.#clock()
    const record = this.#record
    const keeping = this.#keeping
    let kept = 0
    for (let n = 0; n < recordsIn(window, frame); n++) {
      if (!record.read(window, frame + offsetIn(window, frame, n), frame + pageBytes)) continue
      const slot = this.#slotOf(page, n)
      if (slot === noSlot) continue
      const uses = usesOf(this.#table.refAt(slot))
      this.#table.removeAt(slot)
      const isOver = record.expiry <= (now || this.#clock())
      if (isOver || this.#tags.hasDeleted(record)) {
        if (isOver) this.#counts.expired++
      } else if (uses > 0 && isKept) {
        keeping[kept * 2] = n
        keeping[kept * 2 + 1] = wasMain ? uses - 1 : 0
        kept++
      } else this.#went(this.#hash.bytes(window, record.keyAt, record.keyLength, record.keyKind), wasMain)
    }
    book.live[page] = 0
    this.#drop(page)
    if (kept === 0) return
    this.#isEmptying = true
    try {
      for (let n = 0; n < kept; n++) this.#keep(frame, keeping[n * 2]!, keeping[n * 2 + 1]!, now)
    } finally {
      this.#isEmptying = false
    }
  }

  /** Writes a record of the page that is being emptied anew. */
  #keep(frame: number, number: number, uses: number, now: number): void {
    const { window } = this.#book
    const record = this.#record
    const from = frame + offsetIn(window, frame, number)
    record.read(window, from, frame + pageBytes)
    const bytes = record.end - from
    const { expiry } = record
    const hash = this.#hash.bytes(window, record.keyAt, record.keyLength, record.keyKind)
    const queue = queueFor(expiry - now, true)
    const at = this.#reserve(queue, bytes, hash)
    if (at === none) {
      this.#went(hash, true)
      return
    }
    window.copyWithin(at, from, from + bytes)
    if (this.#noted(queue, at, bytes, hash, expiry, uses)) this.#counts.kept++
  }

  /** An entry went because its room was needed. */
  #went(hash: number, wasMain: boolean): void {
    this.#counts.room++
    if (!wasMain) this.#ghosts.add(hash)
  }

  // ---- The limit --------------------------------------------------------------------------------------------------

  /** Bytes of the cache's own tables. */
  #ownBytes(): number {
    return this.#table.bytes + this.#ghosts.bytes + this.#book.tableBytes + this.#book.windowBytes + this.#tags.bytes
  }

  /** Lets the window grow into memory that nothing else needs: so what is read again and again lies decoded. */
  #growWindow(): void {
    const book = this.#book
    if (--this.#patience > 0) return
    const { limit, taken } = this.#stack
    const free = limit.bytes - this.#ownBytes() - taken.bytes - this.#usedBytes()
    if (free - book.chunkBytes >= limit.bytes / leftShare && book.grow()) this.#shareLimit()
    else this.#patience = growEvery
  }

  /** Makes room in the places: copies in the window go before entries. False: there is nothing that could go. */
  #makeRoom(isToKeep: boolean): boolean {
    if (!this.#book.shrink()) {
      const isGone = this.#evict(isToKeep)
      // What went was of other sizes: holes are room for others once they are together.
      if (!isToKeep) this.#stack.store.compact?.(compactPages)
      return isGone
    }
    this.#shareLimit()
    return true
  }

  /** Gives the places what the cache's own tables leave of the limit. */
  #shareLimit(): void {
    const { limit, places, taken } = this.#stack
    if (places === undefined) return
    const left = limit.bytes - this.#ownBytes() - taken.bytes
    const bytes = Math.max(0, Math.floor(left / shareBytes) * shareBytes)
    if (bytes < places.bytes) this.#isOver = true
    places.bytes = bytes
  }

  /** Lets pages go while the places use more than they may, at most so many. Whether there is more to do. */
  #relieve(pages: number): boolean {
    const { places, store } = this.#stack
    let left = pages
    while (left > 0 && !this.#isEmptying) {
      const { pending } = store.tick({ pages: 64 })
      if (places === undefined || this.#usedBytes() <= places.bytes) {
        this.#isOver = pending
        return pending
      }
      for (let n = 0; n < excessPages && left > 0; n++, left--) if (!this.#makeRoom(true)) return false
      if (this.#table.shrink()) this.#shareLimit()
    }
    return true
  }

  #usedBytes(): number {
    let bytes = 0
    for (const { usedBytes } of this.#stack.store.usage?.().places ?? []) bytes += usedBytes
    return bytes
  }
}

const noHashes: readonly number[] = Object.freeze([])
