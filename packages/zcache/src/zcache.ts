/**
 * zcache: compressed pages in bounded memory.
 *
 * A put compresses straight from the caller's page; what is copied afterwards is the compressed page, to a place of
 * exactly its size. A page that repeats one 8-byte word needs no place at all. A get decompresses straight into the
 * caller's page, after the length and the checksum of what rests here were found right.
 *
 * Per page there are 12 bytes here (location, checksum, kind) beside the table of handles, and one word (the owner) beside
 * the compressed bytes. A page that is larger than a block (64 KiB, or 4 KiB with the allocators that know only page frames)
 * is kept in segments of a block: each has an entry number of its own, linked to the next.
 *
 * Memory is had before a put changes anything (`preload`); after that a put only evicts, moves, and refuses. A put that is
 * refused is a flush.
 *
 * Above another layer, ephemeral pages that leave for want of room are offered to it first (`makeRoom`, also before a put changes
 * anything, because that layer may use this store meanwhile): the oldest, until the longest run that a page may need is free. What a
 * put still evicts half way (a page of many segments) is dropped.
 *
 * Invariants:
 *  - `budget.used` counts chunks, scratch, and tables as far as they were ever touched; it never passes the limit in force
 *    (a limit lowered later is reached by `tick`);
 *  - an entry in use has a kind that is not zero, and a place exactly when that is not `SAME`;
 *  - ephemeral pages are in queue 0, persistent ones in queue 1, both in the order in which they were stored; persistent
 *    pages whose bytes are in the file are in queue 2, and have no place in the arena;
 *  - evicted pages = dropped + passed down;
 *  - pages stored = live + replaced + taken by gets + flushed + evicted + dropped as corrupt + put_to_flush + written back.
 *
 * Sources: zcache of Linux 2.6.39 to 3.10 (limits, mean rule, who evicts whom, names of the counters), zswap (same-filled
 * pages, hysteresis), zram (recompression of idle pages).
 */
import { type Codec, CodecError, type CodecName, createCodec, createLz4Arena, type Lz4Arena } from '@tmem/codecs'
import type {
  Borrower,
  Budget,
  ByteLimit,
  Capabilities,
  LayerContext,
  ObjectId,
  PageStore,
  Pool,
  PoolAttributes,
  Progress,
  StatsNode,
} from '@tmem/core'
import {
  basePageSize,
  checkedAttributes,
  GetOutcome,
  HandleTable,
  idle,
  maxEntries,
  PoolRefusal,
  PutOutcome,
  TmemError,
} from '@tmem/core'
import { Arena, ByteBudget, granuleBytes, none, type ZAllocator } from './arena.ts'
import { copyBytes, fillSame, isSameFilled, wordAt } from './bytes.ts'
import type { AllocatorName } from './layer.ts'
import { EPHEMERAL, ON_FILE, PERSISTENT, ZcachePool } from './pool.ts'
import { Writeback, type WritebackOptions } from './writeback.ts'
import { Xvmalloc } from './xvmalloc.ts'
import { Zbud } from './zbud.ts'
import { Zsmalloc } from './zsmalloc.ts'

/** Settings after their defaults were filled in; see `ZcacheOptions`. */
export interface Settings {
  readonly limit: ByteLimit
  readonly codec: CodecName
  readonly recompress: CodecName | undefined
  readonly allocator: AllocatorName
  readonly zvMaxZsize: number
  readonly zvMaxMeanZsize: number
  readonly zvPageCountPolicyPercent: number | undefined
  readonly acceptThresholdPercent: number
  readonly keepsRaw: boolean
  readonly writeback: WritebackOptions | undefined
}

/** Largest number of pages that a zcache of that limit holds: one per 512 bytes, at most 2^24-1. */
export const maxPagesFor = (limitBytes: number): number => Math.min(maxEntries, Math.floor(limitBytes / 512))

/** Largest compressed ephemeral page per 4 KiB (zcache2). */
const ephemeralMaxZsize = 4000
/** LZ4 sees no further back than this, and whole blocks must find a place in one piece. */
const largestBlock = 64 * 1024
/** Pages passed down for one put, at most (a frame with two is one): so a put stays short, and the next ones go on. */
const maxPassedDown = 16
/** Pools at once. */
const maxPools = 256

/** Words of an entry: location or low word of a same-filled page, checksum or high word, kind, entry of the next segment. */
const LOCATION = 0
const CHECKSUM = 1
const KIND = 2
const LINK = 3
const entryWords = 4

/** Kind: bytes at rest (20 bits), id of their codec (4 bits, 0 is raw), flags. */
const sizeMask = 0xfffff
const codecShift = 20
const codecMask = 15
const SAME = 1 << 24
/** Another segment of the page follows. */
const CHAIN = 1 << 25
/** Not a page that could be evicted by its place: a further segment, or a page that is being stored. */
const PINNED = 1 << 26
/** Not touched since the recompression passed by. */
const UNTOUCHED = 1 << 27
/** Recompression found nothing to gain. */
const TRIED = 1 << 28
/** The bytes are in the file; the location is there. */
const ON_DISK = 1 << 29
/** The bytes are being written to the file; they are here as well. */
const WRITING = 1 << 30
/** Read since writing back passed by. */
const REFERENCED = 1 << 31

/** Bytes of metadata of one entry; its link is touched only by pages of several segments. */
const bytesPerEntry = HandleTable.bytesPerEntry + entryWords * 4

/** Units in which sizes are counted by the histograms of persistent pages: 64 to a block. */
const distUnits = 64

/** The opened layer. From outside it is a `PageStore`; `check` is for tests. */
export class Zcache implements PageStore {
  readonly name = 'zcache'
  readonly capabilities: Capabilities
  readonly #next: PageStore | undefined
  readonly #context: LayerContext
  readonly #settings: Settings
  readonly #budget: ByteBudget
  readonly #table: HandleTable
  readonly #arena: Arena
  /** By queue; may be one and the same. */
  readonly #allocators: readonly [ZAllocator, ZAllocator]
  readonly #blockBytes: number
  /**
   * Memory in which the fast codec works without copying, and where sums are fast: blocks at rest pass through its start, on the
   * way in and out; at `#blockAt` they are uncompressed to be compressed again.
   */
  readonly #home: Lz4Arena
  readonly #blockAt: number
  readonly #meta: Int32Array
  readonly #codec: Codec
  readonly #strong: Codec | undefined
  readonly #writeback: Writeback | undefined
  /** By id, for decoding. */
  readonly #codecs: (Codec | undefined)[] = []
  readonly #pools: (ZcachePool | undefined)[] = new Array<ZcachePool | undefined>(maxPools).fill(undefined)
  readonly #moved: (owner: number, from: number, to: number) => void
  /** Bytes that were in the budget before the first page. */
  readonly #fixedBytes: number
  /** Entries in use: pages and their further segments. */
  #entries = 0
  /** Entries and objects whose metadata is in the budget: as many as were ever touched. */
  #countedEntries = 0
  #countedObjects = 0
  /** Bytes of the codec's home that pools of this store can touch. */
  #homeBytes = 0
  /** Where whole pages are shown: to a borrower, or to the layer below. One at a time. */
  #page: Uint8Array = new Uint8Array(0)
  #lending = false
  #passing = false
  /** Counts whatever may have changed what is under a handle. */
  #changes = 0
  #closing: Promise<void> | undefined
  /** Codec of what `#pack` left in the scratch. */
  #packedCodec = 0
  /** Bytes that were live when the limit was hit, until they have fallen to the threshold; otherwise 0. */
  #fullBytes = 0
  /** Recompression: the entry that it looks at next, and how many it may look at. */
  #scanAt = 0
  #scanCredit = 0

  // Counters. `stored` and what became of it first; then those with historical names.
  #stored = 0
  #replaced = 0
  #got = 0
  #flushed = 0
  #evicted = 0
  #passedOn = 0
  #dropped = 0
  #corruptDropped = 0
  #putToFlush = 0
  #writtenBack = 0
  #promoted = 0
  #gets = 0
  #hits = 0
  #flushTotal = 0
  #flushFound = 0
  #flobjTotal = 0
  #flobjFound = 0
  readonly #failedPuts: [number, number] = [0, 0]
  #failedAlloc = 0
  #compressPoor = 0
  #meanCompressPoor = 0
  #ephAteTail = 0
  #ephAteTailFailed = 0
  #persAteEph = 0
  #persAteEphFailed = 0
  #evictedPageframes = 0
  #rejectedQuota = 0
  #rejectedFull = 0
  #rejectedPageCount = 0
  #poolLimitHit = 0
  #recompressed = 0
  #recompressPoor = 0
  #recompressSaved = 0
  #decompressFail = 0
  #raw = 0
  #same = 0
  #sameMax = 0
  /** By queue: blocks with bytes at rest, those bytes, the bytes that they were; and the largest values. */
  readonly #zpages: [number, number] = [0, 0]
  readonly #zbytes: [number, number] = [0, 0]
  readonly #blockTotal: [number, number] = [0, 0]
  readonly #zpagesMax: [number, number] = [0, 0]
  readonly #zbytesMax: [number, number] = [0, 0]
  readonly #cumulZpages: [number, number] = [0, 0]
  readonly #cumulZbytes: [number, number] = [0, 0]
  /** Uncompressed bytes of persistent pages, same-filled ones included. */
  #persistentBytes = 0
  /** Persistent blocks by size, now and ever. */
  readonly #distribution: Int32Array = new Int32Array(distUnits + 1)
  readonly #cumulDistribution: Float64Array = new Float64Array(distUnits + 1)

  constructor(settings: Settings, capabilities: Capabilities, next: PageStore | undefined, context: LayerContext) {
    this.capabilities = capabilities
    this.#next = next
    this.#context = context
    this.#settings = settings
    this.#blockBytes = settings.allocator === 'zsmalloc' ? largestBlock : basePageSize
    // No codec makes more of a block than LZ4's bound and a kilobyte.
    this.#blockAt = 2 * this.#blockBytes
    this.#home = createLz4Arena(this.#blockAt + this.#blockBytes)
    this.#codec = openCodec(settings.codec, this.#home)
    this.#strong = settings.recompress === undefined ? undefined : openCodec(settings.recompress, this.#home)
    this.#codecs[this.#codec.id] = this.#codec
    if (this.#strong !== undefined) this.#codecs[this.#strong.id] = this.#strong
    this.#budget = new ByteBudget(settings.limit)
    const capacity = maxPagesFor(settings.limit.maximumBytes)
    const { allocator } = context
    this.#table = HandleTable.create({ capacity, queues: 3, pools: maxPools, allocator, site: 'zcache.handles' })
    const memory = allocator.allocate(capacity * entryWords * 4, 'zcache.entries')
    if (memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `zcache: no memory for ${capacity} entries: give a smaller limit`, {
        layer: 'zcache',
      })
    this.#meta = new Int32Array(memory, 0, capacity * entryWords)
    this.#arena = new Arena(allocator, this.#budget)
    this.#allocators = openAllocators(settings.allocator, this.#arena)
    this.#moved = (owner, _from, to) => {
      this.#meta[owner * entryWords + LOCATION] = to
    }
    this.#writeback =
      settings.writeback === undefined
        ? undefined
        : new Writeback(settings.writeback, this.#blockBytes, allocator, this.#budget)
    this.#fixedBytes = this.#budget.used
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const checked = checkedAttributes(attributes)
    if (this.#closing !== undefined) return PoolRefusal.Closed
    if (checked.persistent && checked.shared) return PoolRefusal.SharedPersistent
    const { minPageSize, maxPageSize } = this.capabilities
    if (checked.pageSize < minPageSize || checked.pageSize > maxPageSize) return PoolRefusal.BadPageSize
    if (!this.#prepareScratch(checked.pageSize)) return PoolRefusal.NoMemory
    const number = this.#pools.indexOf(undefined)
    if (number === none) return PoolRefusal.NoSlot
    const below = this.#next?.newPool(checked)
    // Ephemeral pages need nothing below: what is refused here is then really dropped.
    if (typeof below === 'number' && (below !== PoolRefusal.Unsupported || checked.persistent)) return below
    const pool = new ZcachePool(this, number, checked, typeof below === 'number' ? undefined : below, this.#context)
    this.#pools[number] = pool
    return pool
  }

  /** Comes down to the limit, moves pages together, gives empty chunks back, compresses idle pages again. */
  tick(budget: Budget): Progress {
    if (this.#closing !== undefined) return idle
    let pages = this.#writeOut(budget.pages)
    pages += this.#shrink(budget.pages - pages)
    // Half of what is left, when somebody else is waiting for it.
    const share = this.#strong === undefined ? budget.pages - pages : Math.ceil((budget.pages - pages) / 2)
    pages += this.#compact(share)
    if (this.#strong !== undefined) pages += this.#recompress(this.#strong, budget.pages - pages)
    const pending = pages > 0 && pages >= budget.pages
    if (this.#next === undefined) return { pages, pending }
    const below = this.#next.tick({ pages: budget.pages - pages })
    return { pages: pages + below.pages, pending: pending || below.pending }
  }

  stats(): StatsNode {
    const table = this.#table
    const arena = this.#arena
    const [ephemeral, persistent] = this.#allocators
    const children: StatsNode[] =
      ephemeral === persistent ? [sectionOf(ephemeral)] : [sectionOf(ephemeral), sectionOf(persistent)]
    children.push(
      {
        name: 'zv',
        counters: {
          curr_zpages: this.#zpages[PERSISTENT],
          curr_zbytes: this.#zbytes[PERSISTENT],
          max_zsize: this.#settings.zvMaxZsize,
          max_mean_zsize: this.#settings.zvMaxMeanZsize,
          curr_mean_zsize:
            this.#blockTotal[PERSISTENT] === 0
              ? 0
              : Math.round((this.#zbytes[PERSISTENT] * basePageSize) / this.#blockTotal[PERSISTENT]),
        },
        children: [
          { name: 'curr_dist_counts', counters: histogram(this.#distribution), children: [] },
          { name: 'cumul_dist_counts', counters: histogram(this.#cumulDistribution), children: [] },
        ],
      },
      {
        name: 'arena',
        counters: {
          chunks: arena.chunks,
          chunk_bytes: arena.chunks * arena.chunkBytes,
          spare_chunks: arena.spares,
          chunks_taken: arena.chunksTaken,
          chunks_returned: arena.chunksReturned,
          runs: arena.runCount,
          run_bytes: arena.usedGranules * granuleBytes,
          runs_moved: arena.runsMoved,
          wasted_bytes: arena.chunks * arena.chunkBytes - this.#slotBytes(),
        },
        children: [],
      },
    )
    if (this.#writeback !== undefined)
      children.push({ name: 'writeback', counters: this.#writeback.counters(), children: [] })
    if (this.#next !== undefined) children.push(this.#next.stats())
    return {
      name: 'zcache',
      counters: {
        stored: this.#stored,
        live: table.size,
        replaced: this.#replaced,
        got: this.#got,
        flushed: this.#flushed,
        evicted_eph_zpages: this.#evicted,
        evicted_eph_passed_on: this.#passedOn,
        evicted_eph_dropped: this.#dropped,
        corrupt_dropped: this.#corruptDropped,
        put_to_flush: this.#putToFlush,
        writtenback_pages: this.#writtenBack,
        gets: this.#gets,
        hits: this.#hits,
        obj_count: table.objects,
        obj_count_max: table.objectWatermark,
        flush_total: this.#flushTotal,
        flush_found: this.#flushFound,
        flobj_total: this.#flobjTotal,
        flobj_found: this.#flobjFound,
        failed_eph_puts: this.#failedPuts[EPHEMERAL],
        failed_pers_puts: this.#failedPuts[PERSISTENT],
        failed_getfreepages: arena.failures,
        failed_alloc: this.#failedAlloc,
        compress_poor: this.#compressPoor,
        mean_compress_poor: this.#meanCompressPoor,
        eph_ate_tail: this.#ephAteTail,
        eph_ate_tail_failed: this.#ephAteTailFailed,
        pers_ate_eph: this.#persAteEph,
        pers_ate_eph_failed: this.#persAteEphFailed,
        evicted_eph_pageframes: this.#evictedPageframes,
        pool_limit_hit: this.#poolLimitHit,
        rejected_full: this.#rejectedFull,
        rejected_page_count: this.#rejectedPageCount,
        rejected_quota: this.#rejectedQuota,
        decompress_fail: this.#decompressFail,
        recompressed_pages: this.#recompressed,
        recompress_poor: this.#recompressPoor,
        recompress_saved_bytes: this.#recompressSaved,
        eph_pages: table.queued(EPHEMERAL),
        pers_pages: table.queued(PERSISTENT) + table.queued(ON_FILE),
        pers_pages_on_file: table.queued(ON_FILE),
        promoted_pages: this.#promoted,
        eph_zpages: this.#zpages[EPHEMERAL],
        eph_zpages_max: this.#zpagesMax[EPHEMERAL],
        pers_zpages: this.#zpages[PERSISTENT],
        pers_zpages_max: this.#zpagesMax[PERSISTENT],
        eph_zbytes: this.#zbytes[EPHEMERAL],
        eph_zbytes_max: this.#zbytesMax[EPHEMERAL],
        pers_zbytes: this.#zbytes[PERSISTENT],
        pers_zbytes_max: this.#zbytesMax[PERSISTENT],
        eph_cumul_zpages: this.#cumulZpages[EPHEMERAL],
        pers_cumul_zpages: this.#cumulZpages[PERSISTENT],
        eph_cumul_zbytes: this.#cumulZbytes[EPHEMERAL],
        pers_cumul_zbytes: this.#cumulZbytes[PERSISTENT],
        same_filled_pages: this.#same,
        same_filled_pages_max: this.#sameMax,
        raw_pages: this.#raw,
        used_bytes: this.#budget.used,
        limit_bytes: this.#budget.limit.bytes,
        metadata_bytes: this.#budget.used - arena.chunks * arena.chunkBytes,
        max_pages: table.capacity,
      },
      children,
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    for (const pool of this.#pools) pool?.retire()
    this.#arena.close()
    this.#page = new Uint8Array(0)
    await this.#writeback?.close()
    await this.#next?.close()
  }

  /** Gets memory for a put, before anything is half done. What the allocator does meanwhile may use this store. */
  preload(pool: ZcachePool): void {
    const { longestRun } = this.#allocators[pool.queue]
    const { pageSize } = pool
    this.#arena.preload(longestRun, pageSize <= basePageSize ? longestRun : pageSize + (pageSize >>> 2))
  }

  /**
   * Above another layer: passes ephemeral pages down until the put that follows will hardly have to evict any. Nothing is half done
   * yet, so that what the layer below does meanwhile may use this store. At most `maxPassedDown` steps.
   */
  makeRoom(pool: ZcachePool, object: ObjectId): void {
    if (this.#next === undefined || this.#table.oldest(EPHEMERAL) === none || pool.frozen) return
    // The page that shows them is in use: what has to go is dropped.
    if (this.#passing || this.#lending) return
    const arena = this.#arena
    const allocator = this.#allocators[pool.queue]
    const { longestRun } = allocator
    // A page of one block takes one run at most. What a larger one takes only compression will tell: whole chunks then.
    const large = pool.pageSize > this.#blockBytes
    const wanted = large ? Math.min(pool.pageSize, this.#budget.limit.bytes / 8) : longestRun
    for (let left = maxPassedDown; left > 0; left--) {
      let room = this.#metadataRoom(pool, object)
      if (room < 0 && arena.trim() > 0) room = this.#metadataRoom(pool, object)
      if (room >= 0 && ((!large && arena.hasRun(longestRun)) || arena.canHave(wanted, room))) return
      const runs = arena.runCount
      allocator.compact(256, this.#moved)
      if (arena.runCount === runs && !arena.defragment(4 * longestRun) && !this.#evictFor(pool, true)) return
    }
  }

  /** Stores the page at `bytes[at]`. Anything but `Stored` leaves no copy here. */
  put(pool: ZcachePool, object: ObjectId, index: number, bytes: Uint8Array, at: number): PutOutcome {
    const table = this.#table
    const existing = table.find(pool.number, object, index)
    this.#scanCredit++
    this.#changes++
    let outcome: PutOutcome
    if (existing !== none) {
      // The old page may not survive, whatever comes of the new one: its memory serves the new one.
      table.unlink(this.#queueOf(pool, existing), existing)
      this.#dropData(pool, existing)
      outcome = this.#store(pool, existing, object, index, bytes, at)
    } else if (pool.frozen) return PutOutcome.Frozen
    else outcome = this.#refusal(pool) ?? this.#store(pool, none, object, index, bytes, at)
    if (outcome === PutOutcome.Stored) {
      this.#stored++
      if (existing !== none) this.#replaced++
      return outcome
    }
    this.#failedPuts[pool.queue]++
    if (existing !== none) {
      table.remove(existing)
      this.#release(existing)
      this.#putToFlush++
    }
    return outcome
  }

  /**
   * Fills `bytes[at]` with the page (`Hit`), or says that it is in the file (`Deferred`) or not here (`Miss`). Removes it where
   * a get does so.
   */
  get(pool: ZcachePool, object: ObjectId, index: number, bytes: Uint8Array, at: number): GetOutcome {
    const entry = this.#table.find(pool.number, object, index)
    this.#gets++
    this.#scanCredit++
    if (entry === none) return GetOutcome.Miss
    const word = entry * entryWords + KIND
    if ((this.#meta[word]! & ON_DISK) !== 0) return GetOutcome.Deferred
    if (!this.#decode(pool, entry, bytes, at)) return GetOutcome.Miss
    this.#hits++
    if (pool.queue === EPHEMERAL) {
      if (!pool.attributes.shared) {
        this.#removeEntry(pool, entry)
        this.#got++
        return GetOutcome.Hit
      }
      this.#table.unlink(EPHEMERAL, entry)
      this.#table.append(EPHEMERAL, entry)
    }
    const kind = this.#meta[word]!
    const touched = (kind & ~UNTOUCHED) | (this.#writeback === undefined ? 0 : REFERENCED)
    if (touched !== kind) this.#meta[word] = touched
    return GetOutcome.Hit
  }

  /**
   * After a `Deferred`: reads the page from the file. Resolves to true when `into` was filled, to false when the page
   * changed meanwhile and must be asked for again. Rejects with `TmemError` (`TMEM_IO`, `TMEM_CORRUPT`); the page stays.
   */
  fetch(pool: ZcachePool, object: ObjectId, index: number, into: Uint8Array): Promise<boolean> {
    const file = this.#writeback!
    const meta = this.#meta
    const entry = this.#table.find(pool.number, object, index)
    const word = entry * entryWords
    const location = this.#location(entry)
    const sum = meta[word + CHECKSUM]!
    const size = meta[word + KIND]! & sizeMask
    const codec = (meta[word + KIND]! >>> codecShift) & codecMask
    return file.read(location, size, () => {
      // Flushed, replaced, brought back by somebody else: then what was read is no page's any more.
      if (
        this.#pools[pool.number] !== pool ||
        this.#table.find(pool.number, object, index) !== entry ||
        (meta[word + KIND]! & ON_DISK) === 0 ||
        this.#location(entry) !== location ||
        meta[word + CHECKSUM] !== sum
      )
        return false
      copyBytes(file.page, 0, size, this.#home.bytes, 0)
      if (this.#sum(size, codec) !== sum)
        throw this.#corruption(pool, entry, 'what came back from the file is not what was written')
      this.#unpack(pool, entry, meta[word + KIND]!, into, 0, pool.pageSize)
      this.#hits++
      this.#promote(pool, entry, file)
      return true
    })
  }

  /** Lends the page; otherwise as `get`. The view is a scratch page: a lend inside of a lend throws `TypeError`. */
  lend(pool: ZcachePool, object: ObjectId, index: number, use: Borrower): GetOutcome {
    if (this.#lending || this.#passing)
      throw new TypeError(
        'zcache: lend inside of a lend, or while a page goes down: copy the page out with get instead',
      )
    const { pageSize } = pool
    const page = this.#page
    const outcome = this.get(pool, object, index, page, 0)
    if (outcome !== GetOutcome.Hit) return outcome
    this.#lending = true
    try {
      use(page, 0, pageSize)
    } finally {
      this.#lending = false
      // The next borrower may be another client.
      page.fill(0, 0, pageSize)
    }
    return outcome
  }

  /** Whether the page is here. */
  has(pool: ZcachePool, object: ObjectId, index: number): boolean {
    return this.#table.find(pool.number, object, index) !== none
  }

  flushPage(pool: ZcachePool, object: ObjectId, index: number): void {
    this.#flushTotal++
    const entry = this.#table.find(pool.number, object, index)
    if (entry === none) return
    this.#flushFound++
    this.#removeEntry(pool, entry)
    this.#flushed++
  }

  flushObject(pool: ZcachePool, object: ObjectId): void {
    this.#flobjTotal++
    let entry = this.#table.firstOfObject(pool.number, object)
    if (entry === none) return
    this.#flobjFound++
    for (; entry !== none; entry = this.#table.firstOfObject(pool.number, object)) {
      this.#removeEntry(pool, entry)
      this.#flushed++
    }
  }

  /** Empties a pool and frees its number. */
  forget(pool: ZcachePool): void {
    for (let entry = this.#table.firstOfPool(pool.number); entry !== none; ) {
      this.#removeEntry(pool, entry)
      this.#flushed++
      entry = this.#table.firstOfPool(pool.number)
    }
    this.#pools[pool.number] = undefined
  }

  /**
   * Throws an `Error` that names a broken invariant of the memory behind the pages, of the table or of the counters.
   * For tests: it visits everything.
   */
  check(): void {
    const table = this.#table
    const meta = this.#meta
    const places: [Map<number, number>, Map<number, number>] = [new Map(), new Map()]
    const zbytes = [0, 0]
    let entries = 0
    let persistentBytes = 0
    const onFile: number[] = []
    for (const inQueue of [EPHEMERAL, PERSISTENT, ON_FILE] as const)
      for (let entry = table.oldest(inQueue); entry !== none; entry = table.newer(entry)) {
        const pool = this.#pools[table.poolOf(entry)]!
        const queue = inQueue === EPHEMERAL ? EPHEMERAL : PERSISTENT
        if (pool.queue !== queue || this.#queueOf(pool, entry) !== inQueue)
          throw new Error(`zcache: entry ${entry} is in the wrong queue`)
        if (queue === PERSISTENT) persistentBytes += pool.pageSize
        for (let segment = entry; ; segment = meta[segment * entryWords + LINK]!) {
          const kind = meta[segment * entryWords + KIND]!
          entries++
          if (kind === 0 || ((kind & PINNED) !== 0) !== (segment !== entry))
            throw new Error(`zcache: entry ${segment} has kind ${kind}`)
          if ((kind & ON_DISK) !== 0) onFile.push(this.#location(segment))
          else if ((kind & SAME) === 0) {
            zbytes[queue]! += kind & sizeMask
            places[queue].set(this.#location(segment), segment)
          }
          if ((kind & CHAIN) === 0) break
        }
      }
    if (entries !== this.#entries) throw new Error(`zcache: ${entries} entries, counted ${this.#entries}`)
    let inUse = 0
    for (let entry = 0; entry < table.entryWatermark; entry++) if (meta[entry * entryWords + KIND] !== 0) inUse++
    if (inUse !== entries) throw new Error(`zcache: ${inUse} entries are marked as in use, ${entries} are`)
    const runs = new Set<number>()
    let owned = 0
    for (const queue of [EPHEMERAL, PERSISTENT] as const) {
      if (queue === PERSISTENT && this.#allocators[0] === this.#allocators[1]) break
      this.#allocators[queue].check((owner, location) => {
        owned++
        const found = places[queue].get(location) ?? places[PERSISTENT].get(location)
        return found === owner
      }, runs)
    }
    this.#arena.check(runs)
    this.#writeback?.check(onFile)
    if (owned !== places[0].size + places[1].size)
      throw new Error(`zcache: ${places[0].size + places[1].size} places, the allocators know ${owned}`)
    if (zbytes[0] !== this.#zbytes[0] || zbytes[1] !== this.#zbytes[1])
      throw new Error(`zcache: ${zbytes.join('+')} bytes at rest, counted ${this.#zbytes.join('+')}`)
    if (persistentBytes !== this.#persistentBytes)
      throw new Error(`zcache: ${persistentBytes} bytes of persistent pages, counted ${this.#persistentBytes}`)
    const distributed = this.#distribution.reduce((sum, blocks) => sum + blocks, 0)
    if (distributed !== this.#zpages[PERSISTENT]) throw new Error(`zcache: ${distributed} blocks in the histogram`)
    const gone =
      this.#replaced +
      this.#got +
      this.#flushed +
      this.#evicted +
      this.#corruptDropped +
      this.#putToFlush +
      this.#writtenBack
    if (this.#stored !== table.size + gone)
      throw new Error(`zcache: stored ${this.#stored}, live ${table.size} and gone ${gone} do not add up`)
    if (this.#evicted !== this.#passedOn + this.#dropped)
      throw new Error(
        `zcache: evicted ${this.#evicted}, passed on ${this.#passedOn}, dropped ${this.#dropped} do not add up`,
      )
    const used =
      this.#fixedBytes +
      this.#homeBytes +
      this.#page.length +
      this.#countedEntries * bytesPerEntry +
      this.#countedObjects * HandleTable.bytesPerObject +
      this.#arena.bytesInBudget()
    if (used !== this.#budget.used) throw new Error(`zcache: ${used} bytes in use, counted ${this.#budget.used}`)
  }

  /** Makes the scratch memory large enough for pages of that size. */
  #prepareScratch(pageSize: number): boolean {
    // The codec's home is address space until it is touched: as far as pages of this size reach, it counts from now on.
    const homeBytes = Math.min(pageSize, this.#blockBytes) * (this.#strong === undefined ? 1 : 2)
    if (homeBytes > this.#homeBytes) {
      if (!this.#budget.take(homeBytes - this.#homeBytes)) return false
      this.#homeBytes = homeBytes
    }
    const before = this.#page.length
    if (before >= pageSize) return true
    if (!this.#budget.take(pageSize - before)) return false
    const memory = this.#context.allocator.allocate(pageSize, 'zcache.page')
    if (memory === undefined || this.#page.length !== before) {
      this.#budget.give(pageSize - before)
      // Whoever gave the memory may have made a pool of this size meanwhile.
      return this.#page.length >= pageSize
    }
    this.#page = new Uint8Array(memory, 0, pageSize)
    return true
  }

  /** Why a new page of this pool is not even looked at, if there is a reason. */
  #refusal(pool: ZcachePool): PutOutcome | undefined {
    if (pool.queue !== PERSISTENT) return undefined
    const { zvPageCountPolicyPercent } = this.#settings
    const limit = this.#budget.limit.bytes
    if (
      zvPageCountPolicyPercent !== undefined &&
      (this.#persistentBytes + pool.pageSize) * 100 > zvPageCountPolicyPercent * limit
    ) {
      this.#rejectedPageCount++
      return PutOutcome.Policy
    }
    if (this.#fullBytes === 0) return undefined
    if (this.#table.oldest(EPHEMERAL) !== none || !this.#aboveThreshold()) {
      this.#fullBytes = 0
      return undefined
    }
    this.#rejectedFull++
    return PutOutcome.Policy
  }

  /** Bytes of places and metadata in use. */
  #liveBytes(): number {
    const metadata = this.#entries * bytesPerEntry + this.#table.objects * HandleTable.bytesPerObject
    return this.#slotBytes() + metadata
  }

  /** Whether what is live is still above its share of what it was when the limit was hit. */
  #aboveThreshold(): boolean {
    return this.#liveBytes() * 100 > this.#fullBytes * this.#settings.acceptThresholdPercent
  }

  /** Bytes of all places in use. */
  #slotBytes(): number {
    const [ephemeral, persistent] = this.#allocators
    return ephemeral === persistent ? ephemeral.slotBytes : ephemeral.slotBytes + persistent.slotBytes
  }

  /** The put proper: `existing` is an entry without data and outside of the queues, or `none`. */
  #store(
    pool: ZcachePool,
    existing: number,
    object: ObjectId,
    index: number,
    bytes: Uint8Array,
    at: number,
  ): PutOutcome {
    const { pageSize } = pool
    const table = this.#table
    const same = isSameFilled(bytes, at, pageSize)
    const oneBlock = pageSize <= this.#blockBytes
    let packed = 0
    if (!same && oneBlock) {
      packed = this.#pack(pool, bytes, at)
      if (packed === 0) return PutOutcome.Incompressible
    }
    const entry = existing !== none ? existing : this.#acquire(pool, object)
    if (entry === none) return this.#noRoom(pool)
    const outcome = same
      ? this.#placeSame(pool, entry, bytes, at)
      : oneBlock
        ? this.#place(pool, entry, packed, pageSize)
        : this.#placeSegments(pool, entry, object, bytes, at)
    if (outcome === PutOutcome.Stored) {
      if (existing !== none || table.insert(entry, pool.number, object, index)) {
        table.append(pool.queue, entry)
        if (pool.queue === PERSISTENT) this.#persistentBytes += pageSize
        return outcome
      }
      this.#freeData(pool, entry)
    }
    if (existing !== none) return outcome
    this.#release(entry)
    // Everything had a place but the handle: the table has no room near its home.
    return outcome === PutOutcome.Stored ? PutOutcome.NoMemory : outcome
  }

  /** Bytes at rest that are accepted from a page of this pool. */
  #maxZsize(pool: ZcachePool): number {
    const perBase = pool.queue === PERSISTENT ? this.#settings.zvMaxZsize : ephemeralMaxZsize
    return Math.floor((perBase * pool.pageSize) / basePageSize)
  }

  /**
   * Compresses a page of one block to the scratch. Returns the bytes, or 0 when they are too many and the page is not
   * to be kept raw. `#packedCodec` is the codec's id, or 0 for raw (the page is in the scratch then, too).
   */
  #pack(pool: ZcachePool, bytes: Uint8Array, at: number): number {
    const { pageSize } = pool
    const room = Math.min(this.#maxZsize(pool), this.#allocators[pool.queue].maxSize)
    const packed = this.#codec.compress(bytes, at, pageSize, this.#home.bytes, 0, room)
    if (packed !== 0) {
      this.#packedCodec = this.#codec.id
      return this.#meanIsPoor(pool) && this.#aboveMean(pool, packed) ? 0 : packed
    }
    if (!this.#settings.keepsRaw) {
      this.#compressPoor++
      return 0
    }
    this.#packedCodec = 0
    copyBytes(bytes, at, pageSize, this.#home.bytes, 0)
    return pageSize
  }

  /** Half of the mean rule: whether the mean of the persistent pages here is above its limit. */
  #meanIsPoor(pool: ZcachePool): boolean {
    return (
      pool.queue === PERSISTENT &&
      this.#zbytes[PERSISTENT] * basePageSize > this.#settings.zvMaxMeanZsize * this.#blockTotal[PERSISTENT]
    )
  }

  /** The other half: whether a result is above that limit, too. Counts the refusal. */
  #aboveMean(pool: ZcachePool, packed: number): boolean {
    if (packed * basePageSize <= this.#settings.zvMaxMeanZsize * pool.pageSize) return false
    this.#meanCompressPoor++
    return true
  }

  /** Bytes that are left of the limit when a new page of this pool has its numbers and metadata; below 0: it would not get them. */
  #metadataRoom(pool: ZcachePool, object: ObjectId): number {
    const table = this.#table
    const entries = this.#entries + Math.ceil(pool.pageSize / this.#blockBytes)
    if (entries > table.capacity) return -1
    const bytes = Math.max(0, entries - this.#countedEntries) * bytesPerEntry
    const isNew = table.objects === this.#countedObjects && !table.hasObject(pool.number, object)
    const needed = isNew ? bytes + HandleTable.bytesPerObject : bytes
    // What is not needed now is not missed either when the limit was lowered.
    return needed === 0
      ? Math.max(0, this.#budget.limit.bytes - this.#budget.used)
      : this.#budget.limit.bytes - this.#budget.used - needed
  }

  /** A number for a new entry, with room for its metadata (and its object's), or `none`. */
  #acquire(pool: ZcachePool, object: ObjectId): number {
    const table = this.#table
    for (;;) {
      const entryBytes = this.#entries === this.#countedEntries ? bytesPerEntry : 0
      const objectBytes =
        table.objects === this.#countedObjects && !table.hasObject(pool.number, object) ? HandleTable.bytesPerObject : 0
      const bytes = entryBytes + objectBytes
      if (this.#budget.take(bytes) || (this.#arena.trim() > 0 && this.#budget.take(bytes))) {
        const entry = table.acquire()
        if (entry !== none) {
          this.#entries++
          if (entryBytes !== 0) this.#countedEntries++
          if (objectBytes !== 0) this.#countedObjects++
          return entry
        }
        this.#budget.give(bytes)
      }
      if (!this.#evictFor(pool, false)) return none
    }
  }

  #release(entry: number): void {
    this.#meta[entry * entryWords + KIND] = 0
    this.#entries--
    this.#table.release(entry)
  }

  #location(entry: number): number {
    return this.#meta[entry * entryWords + LOCATION]! >>> 0
  }

  #placeSame(pool: ZcachePool, entry: number, bytes: Uint8Array, at: number): PutOutcome {
    if (!pool.charge(bytesPerEntry)) {
      this.#rejectedQuota++
      return PutOutcome.Quota
    }
    const meta = this.#meta
    const word = entry * entryWords
    meta[word + LOCATION] = wordAt(bytes, at)
    meta[word + CHECKSUM] = wordAt(bytes, at + 4)
    meta[word + KIND] = SAME
    if (++this.#same > this.#sameMax) this.#sameMax = this.#same
    return PutOutcome.Stored
  }

  /** Gives the `packed` bytes in the scratch, which were `length` bytes of page, a place. */
  #place(pool: ZcachePool, entry: number, packed: number, length: number): PutOutcome {
    const allocator = this.#allocators[pool.queue]
    const charge = bytesPerEntry + allocator.slotSize(packed)
    if (!pool.charge(charge)) {
      this.#rejectedQuota++
      return PutOutcome.Quota
    }
    const location = this.#allocate(pool, allocator, packed, entry)
    if (location === none) {
      pool.giveBack(charge)
      return this.#noRoom(pool)
    }
    this.#write(allocator, entry, location, packed, this.#packedCodec, 0)
    this.#count(pool, packed, length)
    if (this.#packedCodec === 0) this.#raw++
    return PutOutcome.Stored
  }

  /** Copies the scratch to its place and notes in the entry what is there. */
  #write(allocator: ZAllocator, entry: number, location: number, packed: number, codec: number, flags: number): void {
    allocator.locate(location)
    copyBytes(this.#home.bytes, 0, packed, allocator.bytes, allocator.at)
    const meta = this.#meta
    const word = entry * entryWords
    meta[word + LOCATION] = location
    meta[word + CHECKSUM] = this.#sum(packed, codec)
    meta[word + KIND] = packed | (codec << codecShift) | flags
  }

  /** Stores a page of several segments; `head` is the entry of the page and of its first segment. */
  #placeSegments(pool: ZcachePool, head: number, object: ObjectId, bytes: Uint8Array, at: number): PutOutcome {
    const { pageSize } = pool
    const { keepsRaw } = this.#settings
    const block = this.#blockBytes
    const meanIsPoor = !keepsRaw && this.#meanIsPoor(pool)
    const maxZsize = keepsRaw ? pageSize : this.#maxZsize(pool)
    const { maxSize } = this.#allocators[pool.queue]
    let total = 0
    let last = none
    for (let from = at; from < at + pageSize; from += block) {
      const same = isSameFilled(bytes, from, block)
      let packed = 0
      if (!same) {
        // A segment that does not shrink is kept raw, if it can be: the page is judged as a whole.
        packed = this.#codec.compress(bytes, from, block, this.#home.bytes, 0, Math.min(block - 1, maxSize))
        this.#packedCodec = this.#codec.id
        if (packed === 0) {
          this.#packedCodec = 0
          packed = block
          copyBytes(bytes, from, block, this.#home.bytes, 0)
        }
        total += packed
      }
      let outcome: PutOutcome
      if (total > maxZsize || packed > maxSize) {
        this.#compressPoor++
        outcome = PutOutcome.Incompressible
      } else if (meanIsPoor && this.#aboveMean(pool, total)) outcome = PutOutcome.Incompressible
      else {
        const entry = last === none ? head : this.#acquire(pool, object)
        if (entry === none) outcome = this.#noRoom(pool)
        else {
          outcome = same ? this.#placeSame(pool, entry, bytes, from) : this.#place(pool, entry, packed, block)
          if (outcome === PutOutcome.Stored) {
            // The head, too, until the page is whole: nobody may evict it now.
            this.#meta[entry * entryWords + KIND]! |= PINNED
            if (last !== none) {
              this.#meta[last * entryWords + KIND]! |= CHAIN
              this.#meta[last * entryWords + LINK] = entry
            }
            last = entry
          } else if (last !== none) this.#release(entry)
        }
      }
      if (outcome !== PutOutcome.Stored) {
        if (last !== none) this.#freeData(pool, head)
        return outcome
      }
    }
    this.#meta[head * entryWords + KIND]! &= ~PINNED
    return PutOutcome.Stored
  }

  /** Counts a block in. */
  #count(pool: ZcachePool, packed: number, length: number): void {
    const { queue } = pool
    const zpages = ++this.#zpages[queue]
    this.#zbytes[queue] += packed
    const zbytes = this.#zbytes[queue]
    this.#blockTotal[queue] += length
    if (zpages > this.#zpagesMax[queue]) this.#zpagesMax[queue] = zpages
    if (zbytes > this.#zbytesMax[queue]) this.#zbytesMax[queue] = zbytes
    this.#cumulZpages[queue]++
    this.#cumulZbytes[queue] += packed
    if (queue !== PERSISTENT) return
    const unit = Math.ceil((packed * distUnits) / length)
    this.#distribution[unit]!++
    this.#cumulDistribution[unit]!++
  }

  /** Counts a block out. */
  #discount(pool: ZcachePool, packed: number, length: number): void {
    const { queue } = pool
    this.#zpages[queue]--
    this.#zbytes[queue] -= packed
    this.#blockTotal[queue] -= length
    if (queue === PERSISTENT) this.#distribution[Math.ceil((packed * distUnits) / length)]!--
  }

  /** A place for `size` bytes, evicting ephemeral pages as needed; `none` when that does not help. */
  #allocate(pool: ZcachePool, allocator: ZAllocator, size: number, entry: number): number {
    let location = allocator.alloc(size, entry)
    // An evicted page frees a slot, a run needs several: enough evictions for a few runs of this size, then it is given up.
    for (let left = 64 + (size >>> 8); location === none && left > 0; left--) {
      const arena = this.#arena
      const runs = arena.runCount
      allocator.compact(256, this.#moved)
      // Moving a chunk together costs as much as copying it: not for the last hole.
      if (arena.runCount === runs && !arena.defragment(4 * allocator.longestRun) && !this.#evictFor(pool, false))
        return none
      location = allocator.alloc(size, entry)
    }
    return location
  }

  /** The outcome of a put that found no room. */
  #noRoom(pool: ZcachePool): PutOutcome {
    if (this.#arena.refusedByAllocator) {
      this.#failedAlloc++
      return PutOutcome.AllocationFailed
    }
    if (pool.queue === PERSISTENT) {
      this.#poolLimitHit++
      if (this.#settings.acceptThresholdPercent < 100) this.#fullBytes = this.#liveBytes()
    }
    return PutOutcome.NoMemory
  }

  /** Evicts an ephemeral page for a put of this pool, offering it to the layer below if that is wanted; false when there is none. */
  #evictFor(pool: ZcachePool, passing: boolean): boolean {
    const evicted = this.#table.oldest(EPHEMERAL) !== none
    if (evicted) this.#evict(passing)
    if (pool.queue === PERSISTENT) {
      if (evicted) this.#persAteEph++
      else this.#persAteEphFailed++
    } else if (evicted) this.#ephAteTail++
    else this.#ephAteTailFailed++
    return evicted
  }

  /** Evicts the ephemeral page that the allocator likes best, or the oldest, and what leaves with it. There is one. */
  #evict(passing: boolean): void {
    const allocator = this.#allocators[EPHEMERAL]
    const runs = this.#arena.runCount
    const victim = allocator.victim()
    const entry = this.#isPage(victim) ? victim : this.#table.oldest(EPHEMERAL)
    const kind = this.#meta[entry * entryWords + KIND]!
    const neighbour = (kind & (SAME | CHAIN)) === 0 ? allocator.neighbour(this.#location(entry)) : none
    if (this.#drop(entry, passing) && this.#isPage(neighbour)) this.#drop(neighbour, passing)
    this.#evictedPageframes += runs - this.#arena.runCount
  }

  #isPage(entry: number): boolean {
    return entry !== none && (this.#meta[entry * entryWords + KIND]! & PINNED) === 0
  }

  /** Evicts one ephemeral page. False when somebody used this store while the page was offered: then it may still be here. */
  #drop(entry: number, passing: boolean): boolean {
    const pool = this.#pools[this.#table.poolOf(entry)]!
    let passed: boolean | undefined = false
    if (passing && pool.next !== undefined && !this.#passing && !this.#lending) {
      const page = this.#page.length === pool.pageSize ? this.#page : this.#page.subarray(0, pool.pageSize)
      if (!this.#decode(pool, entry, page, 0)) return true
      passed = this.#offer(pool, pool.next, entry, page)
      if (passed === undefined) return false
    }
    this.#removeEntry(pool, entry)
    this.#evicted++
    if (passed) this.#passedOn++
    else this.#dropped++
    return true
  }

  /**
   * Offers a page to the layer below; it stays here. `undefined`: somebody used this store meanwhile, so that the page may not be
   * what is here, or should be; then it is taken back from below.
   */
  #offer(pool: ZcachePool, below: Pool, entry: number, page: Uint8Array): boolean | undefined {
    const object = this.#table.objectOf(entry)
    const index = this.#table.indexOf(entry)
    const changes = this.#changes
    let outcome: PutOutcome
    this.#passing = true
    try {
      outcome = below.put(object, index, page)
    } finally {
      this.#passing = false
      page.fill(0)
    }
    if (changes === this.#changes) return outcome === PutOutcome.Stored
    below.flushPage(object, index)
    return undefined
  }

  /** The queue that an entry is in. */
  #queueOf(pool: ZcachePool, entry: number): number {
    return (this.#meta[entry * entryWords + KIND]! & ON_DISK) === 0 ? pool.queue : ON_FILE
  }

  /** Takes an entry and its data out of everything. */
  #removeEntry(pool: ZcachePool, entry: number): void {
    this.#changes++
    this.#table.unlink(this.#queueOf(pool, entry), entry)
    this.#dropData(pool, entry)
    this.#table.remove(entry)
    this.#release(entry)
  }

  /** Frees the data of a whole page; the entry stays. */
  #dropData(pool: ZcachePool, entry: number): void {
    this.#freeData(pool, entry)
    if (pool.queue === PERSISTENT) this.#persistentBytes -= pool.pageSize
  }

  /** Frees what an entry holds and what its owner was charged, further segments included; the entry itself stays. */
  #freeData(pool: ZcachePool, entry: number): void {
    const meta = this.#meta
    const allocator = this.#allocators[pool.queue]
    const length = Math.min(pool.pageSize, this.#blockBytes)
    for (let segment = entry; ; ) {
      const kind = meta[segment * entryWords + KIND]!
      let slot = 0
      if ((kind & SAME) !== 0) this.#same--
      else if ((kind & ON_DISK) !== 0) this.#writeback!.release(this.#location(segment))
      else {
        const size = kind & sizeMask
        slot = allocator.slotSize(size)
        this.#discount(pool, size, length)
        if (((kind >>> codecShift) & codecMask) === 0) this.#raw--
        allocator.free(this.#location(segment))
      }
      pool.giveBack(bytesPerEntry + slot)
      const next = (kind & CHAIN) === 0 ? none : meta[segment * entryWords + LINK]!
      if (segment !== entry) this.#release(segment)
      if (next === none) return
      segment = next
    }
  }

  /** Checksum of the block at the start of the codec's home; the codec counts, so that no other decodes it. */
  #sum(size: number, codec: number): number {
    return this.#home.checksum(0, size) ^ Math.imul(codec, 0x9e3779b1)
  }

  /** Brings the bytes of an entry to the start of the codec's home; whether they are those that were stored. */
  #bring(allocator: ZAllocator, entry: number, kind: number): boolean {
    const size = kind & sizeMask
    allocator.locate(this.#location(entry))
    copyBytes(allocator.bytes, allocator.at, size, this.#home.bytes, 0)
    return this.#sum(size, (kind >>> codecShift) & codecMask) === this.#meta[entry * entryWords + CHECKSUM]
  }

  /** Decodes the block at the start of the codec's home. */
  #unpack(pool: ZcachePool, entry: number, kind: number, bytes: Uint8Array, at: number, length: number): void {
    const codec = (kind >>> codecShift) & codecMask
    const home = this.#home.bytes
    if (codec === 0) copyBytes(home, 0, length, bytes, at)
    else if (this.#codecs[codec]!.decompress(home, 0, kind & sizeMask, bytes, at, length) !== length) {
      // The bytes are sound, the checksum says so: this codec cannot read what it wrote.
      this.#decompressFail++
      throw this.#corruption(pool, entry, `codec ${this.#codecs[codec]!.name} cannot decode its own block`)
    }
  }

  /**
   * Decodes an entry to `bytes[at]`. A page that is not what was stored throws `TMEM_CORRUPT` when it is
   * persistent (and stays, so that the damage does not turn into a quiet miss) and is dropped when it is ephemeral (false).
   * A damaged page is found before the caller's page is touched.
   */
  #decode(pool: ZcachePool, entry: number, bytes: Uint8Array, at: number): boolean {
    const meta = this.#meta
    const kind = meta[entry * entryWords + KIND]!
    if ((kind & CHAIN) !== 0) return this.#decodeSegments(pool, entry, bytes, at)
    if ((kind & SAME) !== 0) {
      fillSame(bytes, at, pool.pageSize, meta[entry * entryWords + LOCATION]!, meta[entry * entryWords + CHECKSUM]!)
      return true
    }
    if (!this.#bring(this.#allocators[pool.queue], entry, kind)) return this.#corrupt(pool, entry)
    this.#unpack(pool, entry, kind, bytes, at, pool.pageSize)
    return true
  }

  #decodeSegments(pool: ZcachePool, entry: number, bytes: Uint8Array, at: number): boolean {
    const meta = this.#meta
    const allocator = this.#allocators[pool.queue]
    for (let segment = entry; ; segment = meta[segment * entryWords + LINK]!) {
      const kind = meta[segment * entryWords + KIND]!
      if ((kind & SAME) === 0 && !this.#bring(allocator, segment, kind)) return this.#corrupt(pool, entry)
      if ((kind & CHAIN) === 0) break
    }
    const length = this.#blockBytes
    for (let segment = entry, to = at; ; segment = meta[segment * entryWords + LINK]!, to += length) {
      const word = segment * entryWords
      const kind = meta[word + KIND]!
      if ((kind & SAME) !== 0) fillSame(bytes, to, length, meta[word + LOCATION]!, meta[word + CHECKSUM]!)
      else {
        this.#bring(allocator, segment, kind)
        this.#unpack(pool, entry, kind, bytes, to, length)
      }
      if ((kind & CHAIN) === 0) return true
    }
  }

  #corrupt(pool: ZcachePool, entry: number): false {
    if (pool.queue === PERSISTENT)
      throw this.#corruption(pool, entry, 'the checksum of the compressed page is not what it was')
    this.#removeEntry(pool, entry)
    this.#corruptDropped++
    return false
  }

  #corruption(pool: ZcachePool, entry: number, reason: string): TmemError {
    const handle = `pool ${pool.number} object ${this.#table.objectOf(entry)} index ${this.#table.indexOf(entry)}`
    return new TmemError(
      'TMEM_CORRUPT',
      `zcache: ${reason} (${handle}); the page cannot be had: check this machine's memory`,
      { layer: 'zcache', handle },
    )
  }

  /**
   * Starts a write of cold pages to the file, while more is live than is wanted in memory: the oldest first, but for those
   * that were read since they were passed by. Returns the pages looked at.
   */
  #writeOut(pages: number): number {
    const file = this.#writeback
    if (file === undefined || pages === 0) return 0
    const wanted = (this.#budget.limit.bytes * file.startPercent) / 100
    let excess = this.#fixedBytes + this.#liveBytes() - wanted
    if (excess <= 0 || !file.begin()) return 0
    const table = this.#table
    const meta = this.#meta
    const allocator = this.#allocators[PERSISTENT]
    let done = 0
    for (let left = table.queued(PERSISTENT); left > 0 && done < pages && excess > 0; left--) {
      const entry = table.oldest(PERSISTENT)
      const word = entry * entryWords + KIND
      const kind = meta[word]!
      // Whatever comes of it, it is not looked at again before all others.
      table.unlink(PERSISTENT, entry)
      table.append(PERSISTENT, entry)
      done++
      if ((kind & REFERENCED) !== 0) {
        meta[word] = kind & ~REFERENCED
        continue
      }
      if ((kind & (SAME | CHAIN)) !== 0 || !this.#bring(allocator, entry, kind)) continue
      const size = kind & sizeMask
      if (!file.add(entry, this.#home.bytes, 0, size)) break
      meta[word] = kind | WRITING
      excess -= allocator.slotSize(size)
    }
    file.submit(
      (entry, location) => this.#written(entry, location),
      (entry) => {
        meta[entry * entryWords + KIND]! &= ~WRITING
      },
    )
    return done
  }

  /** A page is safe in the file: its place here is given up, unless it was flushed, replaced or read meanwhile. */
  #written(entry: number, location: number): boolean {
    const word = entry * entryWords
    const kind = this.#meta[word + KIND]!
    if ((kind & WRITING) === 0) return false
    this.#meta[word + KIND] = kind & ~WRITING
    if ((kind & REFERENCED) !== 0) return false
    const pool = this.#pools[this.#table.poolOf(entry)]!
    const allocator = this.#allocators[PERSISTENT]
    const size = kind & sizeMask
    allocator.free(this.#location(entry))
    pool.giveBack(allocator.slotSize(size))
    this.#discount(pool, size, pool.pageSize)
    if (((kind >>> codecShift) & codecMask) === 0) this.#raw--
    this.#table.unlink(PERSISTENT, entry)
    this.#table.append(ON_FILE, entry)
    this.#meta[word + LOCATION] = location
    this.#meta[word + KIND] = (kind & ~WRITING) | ON_DISK
    return true
  }

  /** Takes a page that was just read from the file back into memory, if there is room without giving anything up. */
  #promote(pool: ZcachePool, entry: number, file: Writeback): void {
    const word = entry * entryWords
    const kind = this.#meta[word + KIND]!
    const size = kind & sizeMask
    const allocator = this.#allocators[PERSISTENT]
    const slot = allocator.slotSize(size)
    if (!pool.charge(slot)) return
    const location = allocator.alloc(size, entry)
    if (location === none) {
      pool.giveBack(slot)
      return
    }
    allocator.locate(location)
    copyBytes(file.page, 0, size, allocator.bytes, allocator.at)
    file.release(this.#location(entry))
    this.#table.unlink(ON_FILE, entry)
    this.#table.append(PERSISTENT, entry)
    this.#meta[word + LOCATION] = location
    this.#meta[word + KIND] = (kind & ~ON_DISK) | REFERENCED
    this.#count(pool, size, pool.pageSize)
    if (((kind >>> codecShift) & codecMask) === 0) this.#raw++
    this.#promoted++
  }

  /**
   * Comes down to the limit: empty chunks first, then pages together, then ephemeral pages are given up; persistent
   * ones go to the layer below, which also makes room for new ones after the limit was hit. Returns the pages touched.
   */
  #shrink(pages: number): number {
    let done = 0
    while (done < pages && this.#budget.used > this.#budget.limit.bytes) {
      this.#arena.trim()
      const moved = this.#compact(pages - done)
      done += moved
      if (moved > 0 || this.#budget.used <= this.#budget.limit.bytes) continue
      if (this.#table.oldest(EPHEMERAL) !== none) {
        this.#evict(true)
        done++
      } else if (this.#writeBack()) done++
      else return done
    }
    while (done < pages && this.#fullBytes > 0 && this.#aboveThreshold()) {
      if (!this.#writeBack()) break
      done++
    }
    return done
  }

  /** Passes the oldest persistent page with bytes at rest down; false when none goes. */
  #writeBack(): boolean {
    if (this.#lending || this.#passing || this.#next === undefined) return false
    const table = this.#table
    let entry = table.oldest(PERSISTENT)
    // A same-filled page would free nothing worth the way.
    while (entry !== none && (this.#meta[entry * entryWords + KIND]! & (SAME | CHAIN)) === SAME)
      entry = table.newer(entry)
    if (entry === none) return false
    const pool = this.#pools[table.poolOf(entry)]!
    const page = this.#page.subarray(0, pool.pageSize)
    this.#decode(pool, entry, page, 0)
    // The place below is safe before this one is given up.
    if (this.#offer(pool, pool.next!, entry, page) !== true) return false
    this.#removeEntry(pool, entry)
    this.#writtenBack++
    return true
  }

  /** Moves objects and runs together and gives empty chunks back. Returns the pages moved. */
  #compact(pages: number): number {
    const [ephemeral, persistent] = this.#allocators
    // Objects that move together make holes between runs: neither may starve the other.
    let done = ephemeral.compact(Math.ceil(pages / 2), this.#moved)
    if (persistent !== ephemeral) done += persistent.compact(Math.ceil(pages / 2) - done, this.#moved)
    while (done < pages) {
      const moved = this.#arena.compact(pages - done)
      if (moved === 0) break
      done += moved
    }
    if (done < pages) this.#arena.trim()
    return done
  }

  /**
   * Compresses pages again that were not touched while the scan passed all others. The scan goes as far as there were puts
   * and gets since the last time, and as the budget allows: so a page is idle when it was not touched in about as
   * many operations as there are pages, or, on a quiet store, in two rounds of ticks.
   */
  #recompress(strong: Codec, pages: number): number {
    const table = this.#table
    const watermark = table.entryWatermark
    let credit = Math.min(watermark, this.#scanCredit + pages)
    this.#scanCredit = 0
    let done = 0
    for (; credit > 0 && done < pages; credit--) {
      const entry = this.#scanAt < watermark ? this.#scanAt : 0
      this.#scanAt = entry + 1
      const word = entry * entryWords + KIND
      const kind = this.#meta[word]!
      // Neither free entries, nor further segments, nor pages without bytes at rest.
      if (kind === 0 || (kind & (PINNED | TRIED | ON_DISK | WRITING)) !== 0 || (kind & (SAME | CHAIN)) === SAME)
        continue
      if ((kind & UNTOUCHED) === 0) {
        this.#meta[word] = kind | UNTOUCHED
        continue
      }
      const pool = this.#pools[table.poolOf(entry)]!
      this.preload(pool)
      // The allocator may have used the store meanwhile.
      if (this.#meta[word] === kind) this.#recompressPage(strong, pool, entry)
      done++
    }
    return done
  }

  #recompressPage(strong: Codec, pool: ZcachePool, entry: number): void {
    const meta = this.#meta
    const length = Math.min(pool.pageSize, this.#blockBytes)
    const saved = this.#recompressSaved
    for (let segment = entry; ; segment = meta[segment * entryWords + LINK]!) {
      const kind = meta[segment * entryWords + KIND]!
      if ((kind & SAME) === 0 && ((kind >>> codecShift) & codecMask) !== strong.id)
        if (!this.#recompressBlock(strong, pool, segment, kind, length))
          // No room now for the shorter one: there may be, the next time.
          return
      if ((kind & CHAIN) === 0) break
    }
    meta[entry * entryWords + KIND]! |= TRIED
    if (this.#recompressSaved > saved) this.#recompressed++
    else this.#recompressPoor++
  }

  /** Replaces the bytes of a block by stronger compressed ones, if that frees anything; false when there was no room. */
  #recompressBlock(strong: Codec, pool: ZcachePool, entry: number, kind: number, length: number): boolean {
    const allocator = this.#allocators[pool.queue]
    // Damage is for a get to report, or to drop.
    if (!this.#bring(allocator, entry, kind)) return true
    this.#unpack(pool, entry, kind, this.#home.bytes, this.#blockAt, length)
    const size = kind & sizeMask
    const packed = strong.compress(this.#home.bytes, this.#blockAt, length, this.#home.bytes, 0, size - 1)
    const before = allocator.slotSize(size)
    if (packed === 0 || allocator.slotSize(packed) >= before) return true
    const location = allocator.alloc(packed, entry)
    if (location === none) return false
    allocator.free(this.#location(entry))
    this.#write(allocator, entry, location, packed, strong.id, kind & ~(sizeMask | (codecMask << codecShift)))
    this.#discount(pool, size, length)
    this.#count(pool, packed, length)
    if (((kind >>> codecShift) & codecMask) === 0) this.#raw--
    const saved = before - allocator.slotSize(packed)
    pool.giveBack(saved)
    this.#recompressSaved += saved
    return true
  }
}

/** Makes a codec, or throws `TmemError` (`TMEM_UNSUPPORTED`) where this runtime lacks it. */
function openCodec(name: CodecName, home: Lz4Arena): Codec {
  try {
    return name === 'lz4' ? home.codec : createCodec(name)
  } catch (error) {
    if (error instanceof CodecError)
      throw new TmemError('TMEM_UNSUPPORTED', `zcache: ${error.message}`, { layer: 'zcache', cause: error })
    throw error
  }
}

function openAllocators(name: AllocatorName, arena: Arena): readonly [ZAllocator, ZAllocator] {
  switch (name) {
    case 'zsmalloc': {
      const both = new Zsmalloc(arena)
      return [both, both]
    }
    case 'xvmalloc': {
      const both = new Xvmalloc(arena)
      return [both, both]
    }
    case 'zbud':
      return [new Zbud(arena, 2, 'zbud_eph'), new Zbud(arena, 2, 'zbud_pers')]
    case 'zcache1':
      return [new Zbud(arena, 1, 'zbud'), new Xvmalloc(arena)]
  }
}

/** The statistics of an allocator: its counters, and the histograms of a zbud. */
function sectionOf(allocator: ZAllocator): StatsNode {
  const children: StatsNode[] = []
  if (allocator instanceof Zbud) {
    const { unbuddied, cumulative } = allocator.histograms()
    children.push(
      { name: 'unbuddied_list_counts', counters: unbuddied, children: [] },
      { name: 'cumul_chunk_counts', counters: cumulative, children: [] },
    )
  }
  return { name: allocator.name, counters: allocator.counters(), children }
}

/** Blocks by size: the key is the largest size in 64ths of the block; only what occurs. */
function histogram(counts: Int32Array | Float64Array): Record<string, number> {
  const record: Record<string, number> = {}
  for (let unit = 1; unit < counts.length; unit++) if (counts[unit] !== 0) record[unit] = counts[unit]!
  return record
}
