/**
 * zcache: compressed pages in bounded memory.
 *
 * A put compresses straight from the caller's page; what is copied afterwards is the compressed page, to a place of
 * exactly its size class. A page that repeats one 8-byte word needs no place at all. A get decompresses straight into the
 * caller's page, after the length and the checksum of what rests here were found right.
 *
 * Per page there are 12 bytes here (location, checksum, kind) beside the table of handles, and one word (the owner) in
 * front of the compressed bytes. A page of more than 64 KiB is kept in segments of 64 KiB: each has an entry number of its
 * own, linked to the next.
 *
 * Invariants:
 *  - `budget.used` counts chunks, scratch, tables as far as they were ever touched; it never passes the limit in force
 *    (a limit lowered later is reached by `tick` and by eviction, persistent pages stay);
 *  - an entry has a place in the arena exactly when its kind is not `SAME`;
 *  - ephemeral entries are in queue 0, persistent ones in queue 1, both in the order in which they were stored;
 *  - pages stored = live + replaced + taken by gets + flushed + evicted + dropped as corrupt + put_to_flush.
 *
 * Sources: zcache of Linux 2.6.39 to 3.10 (limits, mean rule, who evicts whom, names of the counters), zswap (same-filled
 * pages).
 */
import { type Codec, type CodecName, createCodec } from '@tmem/codecs'
import type {
  Account,
  Borrower,
  Budget,
  Capabilities,
  Layer,
  LayerContext,
  LayerFactory,
  ObjectId,
  PageBatch,
  PageStore,
  Pool,
  PoolAttributes,
  Progress,
  StatsNode,
} from '@tmem/core'
import {
  assertBatch,
  assertIndex,
  assertPage,
  ByteLimit,
  basePageSize,
  checkedAttributes,
  GetOutcome,
  HandleTable,
  idle,
  maxEntries,
  maxPageSize,
  Pending,
  PoolRefusal,
  PutOutcome,
  TmemError,
} from '@tmem/core'
import { Arena, ByteBudget, none } from './arena.ts'
import { type ZAllocator, Zsmalloc } from './zsmalloc.ts'

/** Settings of a zcache. */
export interface ZcacheOptions {
  /**
   * Bytes that the layer may use, metadata and scratch included: a number of at least 256 KiB, or a `ByteLimit` that can
   * be changed while the layer is in use.
   */
  readonly limitBytes: number | ByteLimit
  /** Codec for new pages (default `lz4`). */
  readonly codec?: CodecName
  /** Largest compressed persistent page, in bytes per 4 KiB of page (default 3584, as zv_max_zsize). 1 to 4096. */
  readonly zvMaxZsize?: number
  /**
   * A persistent page that compresses to more than this is refused while the mean is above it, too; in bytes per 4 KiB of
   * page (default 2560, as zv_max_mean_zsize). 1 to 4096.
   */
  readonly zvMaxMeanZsize?: number
  /** What becomes of a page that does not shrink enough: `refuse` (default) or `keep` it uncompressed. */
  readonly incompressible?: 'refuse' | 'keep'
}

/** Smallest limit: below it the tables would leave no room for pages. */
export const minLimitBytes: number = 256 * 1024

/** Largest number of pages that a zcache of that limit holds: one per 512 bytes, at most 2^24-1. */
export const maxPagesFor = (limitBytes: number): number => Math.min(maxEntries, Math.floor(limitBytes / 512))

/** Largest compressed ephemeral page per 4 KiB (zcache2). */
const ephemeralMaxZsize = 4000
/** Pages are compressed in segments of at most this many bytes: LZ4 sees no further back. */
const segmentBytes = 64 * 1024

/** Pools at once. */
const maxPools = 256
const EPHEMERAL = 0
const PERSISTENT = 1

/** Kind of an entry: the low 24 bits are its compressed bytes, then four bits of codec id, then flags. */
const sizeMask = 0xffffff
const codecShift = 24
const codecMask = 15
const SAME = 1 << 28
/** Another segment of the page follows: its entry is in the links. */
const CHAIN = 1 << 29

/** Bytes of metadata of one entry here; the table of handles has its own. The last word is touched for segments only. */
const ownBytesPerEntry = 16
const bytesPerEntry = HandleTable.bytesPerEntry + ownBytesPerEntry

/** Views of the runtime's own memory functions that take offsets, so that no page operation makes a view. */
const copyBytes: (
  this: Uint8Array,
  target: Uint8Array,
  targetStart: number,
  sourceStart: number,
  sourceEnd: number,
) => number = Buffer.prototype.copy
const compareBytes: (
  this: Uint8Array,
  target: Uint8Array,
  targetStart: number,
  targetEnd: number,
  sourceStart: number,
  sourceEnd: number,
) => number = Buffer.prototype.compare

/** Makes a zcache layer. Throws `RangeError` for settings that make no sense. */
export function zcache(options: ZcacheOptions): Layer {
  const { limitBytes, codec = 'lz4', zvMaxZsize = 3584, zvMaxMeanZsize = 2560, incompressible = 'refuse' } = options
  const limit = typeof limitBytes === 'number' ? limitBytes : limitBytes.maximumBytes
  if (!Number.isSafeInteger(limit) || limit < minLimitBytes)
    throw new RangeError(`zcache needs a limit of at least ${minLimitBytes} bytes, got ${limit}`)
  for (const [name, value] of [
    ['zvMaxZsize', zvMaxZsize],
    ['zvMaxMeanZsize', zvMaxMeanZsize],
  ] as const)
    if (!Number.isInteger(value) || value < 1 || value > basePageSize)
      throw new RangeError(`${name} must be an integer from 1 to ${basePageSize}, got ${value}`)
  if (incompressible !== 'refuse' && incompressible !== 'keep')
    throw new RangeError(`incompressible must be refuse or keep, got ${String(incompressible)}`)
  const plan = (below: Capabilities | undefined): Capabilities =>
    Object.freeze({
      ephemeral: true,
      persistent: below?.persistent ?? true,
      shared: true,
      minPageSize: below?.minPageSize ?? basePageSize,
      maxPageSize: below?.maxPageSize ?? maxPageSize,
      deferred: below?.deferred ?? false,
      split: false,
      reservedBytes: below?.reservedBytes ?? 0,
    })
  return Object.freeze({
    name: 'zcache',
    plan,
    open: (next: PageStore | undefined, context: LayerContext): PageStore =>
      new Zcache(
        { limitBytes, codec, zvMaxZsize, zvMaxMeanZsize, incompressible },
        plan(next?.capabilities),
        next,
        context,
      ),
  })
}

/** The layer in the textual form of a stack: `zcache(limit=64MiB,codec=lz4)`. */
export const zcacheFactory: LayerFactory = Object.freeze({
  name: 'zcache',
  summary: 'compressed pages in bounded memory',
  options: Object.freeze({
    limit: {
      kind: 'bytes',
      summary: 'memory that it may use, metadata included',
      required: true,
      minimum: minLimitBytes,
    },
    codec: { kind: 'text', summary: 'codec for new pages (default lz4)', choices: ['lz4', 'lz4js'] },
    zvMaxZsize: {
      kind: 'integer',
      summary: 'largest compressed persistent page, per 4 KiB (default 3584)',
      minimum: 1,
      maximum: basePageSize,
    },
    zvMaxMeanZsize: {
      kind: 'integer',
      summary: 'mean above which larger persistent pages are refused, per 4 KiB (default 2560)',
      minimum: 1,
      maximum: basePageSize,
    },
    incompressible: {
      kind: 'text',
      summary: 'pages that do not shrink enough: refuse (default) or keep them uncompressed',
      choices: ['refuse', 'keep'],
    },
  }),
  create: (options) => {
    const { limit, ...rest } = options
    return zcache({ limitBytes: limit as number, ...(rest as Omit<ZcacheOptions, 'limitBytes'>) })
  },
} satisfies LayerFactory)

/** The opened layer. Exported for this package's tests; from outside it is a `PageStore`. */
export class Zcache implements PageStore {
  readonly name = 'zcache'
  readonly capabilities: Capabilities
  readonly next: PageStore | undefined
  readonly context: LayerContext
  readonly #options: Required<ZcacheOptions>
  readonly #budget: ByteBudget
  readonly #table: HandleTable
  readonly #arena: Arena
  readonly #allocator: ZAllocator
  readonly #locations: Uint32Array
  readonly #checksums: Int32Array
  readonly #kinds: Uint32Array
  readonly #links: Int32Array
  readonly #keepsRaw: boolean
  readonly #codec: Codec
  /** By id, for decoding. */
  readonly #codecs: (Codec | undefined)[] = []
  readonly #pools: (ZcachePool | undefined)[] = new Array<ZcachePool | undefined>(maxPools).fill(undefined)
  readonly #moved: (owner: number, from: number, to: number) => void
  /** Entries in use: pages and their further segments. */
  #entries = 0
  /** Entries and objects whose metadata is in the budget: as many as were ever touched. */
  #countedEntries = 0
  #countedObjects = 0
  /** Where pages are compressed to, and pages of a lend. */
  #scratch: Uint8Array = new Uint8Array(0)
  #lendScratch: Uint8Array = new Uint8Array(0)
  #lending = false
  #closing: Promise<void> | undefined
  /** Result of `#sameFilled`. */
  #sameLow = 0
  #sameHigh = 0
  /** Result of `#pack`. */
  #packedCodec = 0

  // Counters. `stored` and what became of it first; then those with historical names.
  #stored = 0
  #replaced = 0
  #got = 0
  #flushed = 0
  #evicted = 0
  #corruptDropped = 0
  #putToFlush = 0
  #gets = 0
  #hits = 0
  #flushTotal = 0
  #flushFound = 0
  #flobjTotal = 0
  #flobjFound = 0
  #failedEphPuts = 0
  #failedPersPuts = 0
  #failedAlloc = 0
  #compressPoor = 0
  #meanCompressPoor = 0
  #ephAteTail = 0
  #ephAteTailFailed = 0
  #persAteEph = 0
  #persAteEphFailed = 0
  #rejectedQuota = 0
  #rawPages = 0
  #sameFilledPages = 0
  /** Pages with compressed bytes, those bytes, and the pages' own, per queue. */
  readonly #zpages = [0, 0]
  readonly #zbytes = [0, 0]
  readonly #pageBytes = [0, 0]

  constructor(
    options: Required<ZcacheOptions>,
    capabilities: Capabilities,
    next: PageStore | undefined,
    context: LayerContext,
  ) {
    this.capabilities = capabilities
    this.next = next
    this.context = context
    this.#options = options
    const limit = typeof options.limitBytes === 'number' ? new ByteLimit(options.limitBytes) : options.limitBytes
    this.#budget = new ByteBudget(limit)
    const capacity = maxPagesFor(limit.maximumBytes)
    const { allocator } = context
    this.#table = HandleTable.create({ capacity, queues: 2, pools: maxPools, allocator, site: 'zcache.handles' })
    const metadata = allocator.allocate(capacity * ownBytesPerEntry, 'zcache.entries')
    if (metadata === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `zcache: no memory for ${capacity} entries: give a smaller limit`, {
        layer: 'zcache',
      })
    this.#locations = new Uint32Array(metadata, 0, capacity)
    this.#checksums = new Int32Array(metadata, capacity * 4, capacity)
    this.#kinds = new Uint32Array(metadata, capacity * 8, capacity)
    this.#links = new Int32Array(metadata, capacity * 12, capacity)
    this.#keepsRaw = options.incompressible === 'keep'
    this.#arena = new Arena(allocator, this.#budget)
    this.#allocator = new Zsmalloc(this.#arena, allocator)
    this.#codec = createCodec(options.codec)
    this.#codecs[this.#codec.id] = this.#codec
    this.#moved = (owner, _from, to) => {
      this.#locations[owner] = to
    }
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const checked = checkedAttributes(attributes)
    if (this.#closing !== undefined) return PoolRefusal.Closed
    if (checked.persistent && checked.shared) return PoolRefusal.SharedPersistent
    const { minPageSize, maxPageSize } = this.capabilities
    if (checked.pageSize < minPageSize || checked.pageSize > maxPageSize) return PoolRefusal.BadPageSize
    const number = this.#pools.indexOf(undefined)
    if (number === none) return PoolRefusal.NoSlot
    if (!this.#prepareScratch(checked.pageSize)) return PoolRefusal.NoMemory
    const below = this.next?.newPool(checked)
    // Ephemeral pages need nothing below: what is refused here is then really dropped.
    if (typeof below === 'number' && (below !== PoolRefusal.Unsupported || checked.persistent)) return below
    const pool = new ZcachePool(this, number, checked, typeof below === 'number' ? undefined : below, this.context)
    this.#pools[number] = pool
    return pool
  }

  tick(budget: Budget): Progress {
    if (this.#closing !== undefined) return idle
    let pages = 0
    while (this.#budget.used > this.#budget.limit.bytes && pages < budget.pages) {
      this.#arena.trim()
      if (this.#budget.used <= this.#budget.limit.bytes || this.#table.oldest(EPHEMERAL) === none) break
      this.#evict()
      pages++
    }
    pages += this.#allocator.compact(budget.pages - pages, this.#moved)
    const pending = pages >= budget.pages
    if (this.next === undefined) return { pages, pending }
    const below = this.next.tick({ pages: budget.pages - pages })
    return { pages: pages + below.pages, pending: pending || below.pending }
  }

  stats(): StatsNode {
    const table = this.#table
    return {
      name: 'zcache',
      counters: {
        stored: this.#stored,
        live: table.size,
        replaced: this.#replaced,
        got: this.#got,
        flushed: this.#flushed,
        evicted_eph_zpages: this.#evicted,
        corrupt_dropped: this.#corruptDropped,
        put_to_flush: this.#putToFlush,
        gets: this.#gets,
        hits: this.#hits,
        obj_count: table.objects,
        obj_count_max: table.objectWatermark,
        flush_total: this.#flushTotal,
        flush_found: this.#flushFound,
        flobj_total: this.#flobjTotal,
        flobj_found: this.#flobjFound,
        failed_eph_puts: this.#failedEphPuts,
        failed_pers_puts: this.#failedPersPuts,
        failed_getfreepages: this.#arena.failures,
        failed_alloc: this.#failedAlloc,
        compress_poor: this.#compressPoor,
        mean_compress_poor: this.#meanCompressPoor,
        eph_ate_tail: this.#ephAteTail,
        eph_ate_tail_failed: this.#ephAteTailFailed,
        pers_ate_eph: this.#persAteEph,
        pers_ate_eph_failed: this.#persAteEphFailed,
        rejected_quota: this.#rejectedQuota,
        eph_pages: table.queued(EPHEMERAL),
        pers_pages: table.queued(PERSISTENT),
        eph_zpages: this.#zpages[EPHEMERAL]!,
        pers_zpages: this.#zpages[PERSISTENT]!,
        eph_zbytes: this.#zbytes[EPHEMERAL]!,
        pers_zbytes: this.#zbytes[PERSISTENT]!,
        same_filled_pages: this.#sameFilledPages,
        raw_pages: this.#rawPages,
        used_bytes: this.#budget.used,
        limit_bytes: this.#budget.limit.bytes,
        metadata_bytes: this.#budget.used - this.#arena.chunks * this.#arena.chunkBytes,
        max_pages: table.capacity,
      },
      children: [
        { name: this.#allocator.name, counters: this.#allocator.counters(), children: [] },
        ...(this.next === undefined ? [] : [this.next.stats()]),
      ],
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    for (const pool of this.#pools) pool?.retire()
    this.#arena.close()
    this.#scratch = new Uint8Array(0)
    this.#lendScratch = new Uint8Array(0)
    await this.next?.close()
  }

  /**
   * Throws an `Error` that names a broken invariant of the memory behind the pages, of the table or of the counters.
   * For tests: it visits everything.
   */
  check(): void {
    const table = this.#table
    const places = new Map<number, number>()
    const zbytes = [0, 0]
    let entries = 0
    for (const queue of [EPHEMERAL, PERSISTENT])
      for (let entry = table.oldest(queue); entry !== none; entry = table.newer(entry)) {
        if (this.#pools[table.poolOf(entry)]!.queue !== queue)
          throw new Error(`zcache: entry ${entry} is in the wrong queue`)
        for (let segment = entry; ; segment = this.#links[segment]!) {
          const kind = this.#kinds[segment]!
          entries++
          if ((kind & SAME) === 0) {
            zbytes[queue]! += kind & sizeMask
            places.set(this.#locations[segment]!, segment)
          }
          if ((kind & CHAIN) === 0) break
        }
      }
    if (entries !== this.#entries) throw new Error(`zcache: ${entries} entries, counted ${this.#entries}`)
    let owned = 0
    this.#allocator.check((owner, location) => {
      owned++
      return places.get(location) === owner
    })
    if (owned !== places.size) throw new Error(`zcache: ${places.size} places, the allocator knows ${owned}`)
    if (zbytes[0] !== this.#zbytes[0] || zbytes[1] !== this.#zbytes[1])
      throw new Error(`zcache: ${zbytes.join('+')} compressed bytes, counted ${this.#zbytes.join('+')}`)
    const gone = this.#replaced + this.#got + this.#flushed + this.#evicted + this.#corruptDropped + this.#putToFlush
    if (this.#stored !== table.size + gone)
      throw new Error(`zcache: stored ${this.#stored}, live ${table.size} and gone ${gone} do not add up`)
  }

  /** Stores the page at `bytes[at]`. Anything but `Stored` leaves no copy here. */
  put(pool: ZcachePool, object: ObjectId, index: number, bytes: Uint8Array, at: number): PutOutcome {
    const table = this.#table
    const existing = table.find(pool.number, object, index)
    if (existing === none && pool.frozen) return PutOutcome.Frozen
    if (existing !== none) {
      // The old page may not survive, whatever comes of the new one: its memory serves the new one.
      this.#dropData(pool, existing)
      table.unlink(pool.queue, existing)
    }
    const outcome = this.#store(pool, existing, object, index, bytes, at)
    if (outcome === PutOutcome.Stored) {
      this.#stored++
      if (existing !== none) this.#replaced++
      return outcome
    }
    if (pool.queue === PERSISTENT) this.#failedPersPuts++
    else this.#failedEphPuts++
    if (existing !== none) {
      table.remove(existing)
      this.#release(existing)
      this.#putToFlush++
    }
    return outcome
  }

  /** Fills `bytes[at]` with the page; false when it is not here. Removes it where a get does so. */
  get(pool: ZcachePool, object: ObjectId, index: number, bytes: Uint8Array, at: number): boolean {
    const entry = this.#table.find(pool.number, object, index)
    this.#gets++
    if (entry === none || !this.#decode(pool, entry, bytes, at)) return false
    this.#hits++
    if (pool.queue === EPHEMERAL) {
      if (pool.attributes.shared) {
        this.#table.unlink(EPHEMERAL, entry)
        this.#table.append(EPHEMERAL, entry)
      } else {
        this.#removeEntry(pool, entry)
        this.#got++
      }
    }
    return true
  }

  /** Lends the page; false when it is not here. The view is a scratch page: a lend inside of a lend throws `TypeError`. */
  lend(pool: ZcachePool, object: ObjectId, index: number, use: Borrower): boolean {
    if (this.#lending) throw new TypeError('zcache: lend inside of a lend: copy the page out with get instead')
    const { pageSize } = pool.attributes
    const scratch = this.#lendScratch
    if (!this.get(pool, object, index, scratch, 0)) return false
    this.#lending = true
    try {
      use(scratch, 0, pageSize)
    } finally {
      this.#lending = false
      // The next borrower may be another client.
      scratch.fill(0, 0, pageSize)
    }
    return true
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
  destroy(pool: ZcachePool): void {
    for (let entry = this.#table.firstOfPool(pool.number); entry !== none; ) {
      this.#removeEntry(pool, entry)
      this.#flushed++
      entry = this.#table.firstOfPool(pool.number)
    }
    this.#pools[pool.number] = undefined
  }

  /** Makes the scratch memory large enough for pages of that size. */
  #prepareScratch(pageSize: number): boolean {
    const grow = (old: Uint8Array, bytes: number, site: string): Uint8Array | undefined => {
      if (old.length >= bytes) return old
      if (!this.#budget.take(bytes - old.length)) return undefined
      const memory = this.context.allocator.allocate(bytes, site)
      if (memory !== undefined) return new Uint8Array(memory, 0, bytes)
      this.#budget.give(bytes - old.length)
      return undefined
    }
    const scratch = grow(this.#scratch, this.#codec.bound(Math.min(pageSize, segmentBytes)), 'zcache.scratch')
    if (scratch === undefined) return false
    this.#scratch = scratch
    const lendScratch = grow(this.#lendScratch, pageSize, 'zcache.lend')
    if (lendScratch === undefined) return false
    this.#lendScratch = lendScratch
    return true
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
    const { pageSize } = pool.attributes
    const table = this.#table
    const same = this.#sameFilled(bytes, at, pageSize)
    const oneBlock = pageSize <= segmentBytes
    let packed = 0
    if (!same && oneBlock) {
      packed = this.#pack(pool, bytes, at, pageSize)
      if (packed === 0) return PutOutcome.Incompressible
    }
    const entry = existing !== none ? existing : this.#acquire(pool, object)
    if (entry === none) return this.#allocationOutcome()
    const outcome = same
      ? this.#placeSame(pool, entry)
      : oneBlock
        ? this.#place(pool, entry, packed, pageSize)
        : this.#placeSegments(pool, entry, object, bytes, at)
    if (outcome === PutOutcome.Stored) {
      if (existing !== none || table.insert(entry, pool.number, object, index)) {
        table.append(pool.queue, entry)
        return outcome
      }
      this.#dropData(pool, entry)
    }
    if (existing !== none) return outcome
    this.#release(entry)
    // Everything had a place but the handle: the table has no room near its home.
    return outcome === PutOutcome.Stored ? PutOutcome.NoMemory : outcome
  }

  /** Compressed bytes that are accepted from a page of this pool. */
  #maxZsize(pool: ZcachePool): number {
    const perBase = pool.queue === PERSISTENT ? this.#options.zvMaxZsize : ephemeralMaxZsize
    return Math.floor((perBase * pool.attributes.pageSize) / basePageSize)
  }

  /**
   * Compresses a page of one block to the scratch. Returns the bytes, or 0 when they are too many and the page is not
   * to be kept raw. `#packedCodec` is the codec's id, or 0 for raw (the page is in the scratch then, too).
   */
  #pack(pool: ZcachePool, bytes: Uint8Array, at: number, pageSize: number): number {
    const packed = this.#codec.compress(bytes, at, pageSize, this.#scratch, 0, this.#maxZsize(pool))
    if (packed !== 0) {
      this.#packedCodec = this.#codec.id
      return this.#meanIsPoor(pool) && this.#aboveMean(pool, packed) ? 0 : packed
    }
    if (!this.#keepsRaw) {
      this.#compressPoor++
      return 0
    }
    this.#packedCodec = 0
    copyBytes.call(bytes, this.#scratch, 0, at, at + pageSize)
    return pageSize
  }

  /** Half of the mean rule: whether the mean of the persistent pages here is above its limit. */
  #meanIsPoor(pool: ZcachePool): boolean {
    return (
      pool.queue === PERSISTENT &&
      this.#zbytes[PERSISTENT]! * basePageSize > this.#options.zvMaxMeanZsize * this.#pageBytes[PERSISTENT]!
    )
  }

  /** The other half: whether a result is above that limit, too. Counts the refusal. */
  #aboveMean(pool: ZcachePool, packed: number): boolean {
    if (packed * basePageSize <= this.#options.zvMaxMeanZsize * pool.attributes.pageSize) return false
    this.#meanCompressPoor++
    return true
  }

  /** A number for a new entry, with room for its metadata (and its object's), or `none`. */
  #acquire(pool: ZcachePool, object: ObjectId): number {
    const table = this.#table
    this.#arena.refusedByAllocator = false
    for (;;) {
      const entryBytes = this.#entries === this.#countedEntries ? bytesPerEntry : 0
      const objectBytes =
        table.objects === this.#countedObjects && !table.hasObject(pool.number, object) ? HandleTable.bytesPerObject : 0
      const bytes = entryBytes + objectBytes
      const fits = this.#budget.take(bytes) || (this.#arena.trim() > 0 && this.#budget.take(bytes))
      if (fits) {
        const entry = table.acquire()
        if (entry !== none) {
          this.#entries++
          if (entryBytes !== 0) this.#countedEntries++
          if (objectBytes !== 0) this.#countedObjects++
          return entry
        }
        this.#budget.give(bytes)
      }
      if (!this.#evictFor(pool)) return none
    }
  }

  #release(entry: number): void {
    this.#entries--
    this.#table.release(entry)
  }

  #placeSame(pool: ZcachePool, entry: number): PutOutcome {
    if (!pool.charge(bytesPerEntry)) {
      this.#rejectedQuota++
      return PutOutcome.Quota
    }
    this.#locations[entry] = this.#sameLow
    this.#checksums[entry] = this.#sameHigh
    this.#kinds[entry] = SAME
    this.#sameFilledPages++
    return PutOutcome.Stored
  }

  /** Gives the `packed` bytes in the scratch, which were `length` bytes of page, a place. */
  #place(pool: ZcachePool, entry: number, packed: number, length: number): PutOutcome {
    const allocator = this.#allocator
    const charge = bytesPerEntry + allocator.slotSize(packed)
    if (!pool.charge(charge)) {
      this.#rejectedQuota++
      return PutOutcome.Quota
    }
    const location = this.#allocate(pool, packed, entry)
    if (location === none) {
      pool.giveBack(charge)
      return this.#allocationOutcome()
    }
    allocator.locate(location)
    const { bytes, words, at } = allocator
    copyBytes.call(this.#scratch, bytes, at, 0, packed)
    // The checksum is taken over whole words.
    for (let end = at + packed; (end & 3) !== 0; end++) bytes[end] = 0
    this.#locations[entry] = location
    this.#checksums[entry] = checksum(words, at >>> 2, packed, this.#packedCodec)
    this.#kinds[entry] = packed | (this.#packedCodec << codecShift)
    this.#count(pool, packed, length, 1)
    if (this.#packedCodec === 0) this.#rawPages++
    return PutOutcome.Stored
  }

  /** Stores a page of several segments; `head` is the entry of the page and of its first segment. */
  #placeSegments(pool: ZcachePool, head: number, object: ObjectId, bytes: Uint8Array, at: number): PutOutcome {
    const { pageSize } = pool.attributes
    const meanIsPoor = !this.#keepsRaw && this.#meanIsPoor(pool)
    const maxZsize = this.#keepsRaw ? pageSize : this.#maxZsize(pool)
    let total = 0
    let last = none
    let outcome: PutOutcome = PutOutcome.Stored
    for (let from = at; from < at + pageSize; from += segmentBytes) {
      const same = this.#sameFilled(bytes, from, segmentBytes)
      let packed = 0
      if (!same) {
        // A segment that does not shrink is kept raw: the page is judged as a whole.
        this.#packedCodec = this.#codec.id
        packed = this.#codec.compress(bytes, from, segmentBytes, this.#scratch, 0, segmentBytes - 1)
        if (packed === 0) {
          this.#packedCodec = 0
          packed = segmentBytes
          copyBytes.call(bytes, this.#scratch, 0, from, from + segmentBytes)
        }
        total += packed
      }
      if (total > maxZsize) {
        this.#compressPoor++
        outcome = PutOutcome.Incompressible
      } else if (meanIsPoor && this.#aboveMean(pool, total)) outcome = PutOutcome.Incompressible
      else {
        const entry = last === none ? head : this.#acquire(pool, object)
        if (entry === none) outcome = this.#allocationOutcome()
        else {
          outcome = same ? this.#placeSame(pool, entry) : this.#place(pool, entry, packed, segmentBytes)
          if (outcome !== PutOutcome.Stored && last !== none) this.#release(entry)
        }
        if (outcome === PutOutcome.Stored) {
          if (last !== none) {
            this.#kinds[last] = this.#kinds[last]! | CHAIN
            this.#links[last] = entry
          }
          last = entry
        }
      }
      if (outcome !== PutOutcome.Stored) {
        if (last !== none) this.#dropData(pool, head)
        return outcome
      }
    }
    return outcome
  }

  /** Counts one block in (`sign` 1) or out (-1). */
  #count(pool: ZcachePool, packed: number, length: number, sign: 1 | -1): void {
    const { queue } = pool
    this.#zpages[queue]! += sign
    this.#zbytes[queue]! += sign * packed
    this.#pageBytes[queue]! += sign * length
  }

  /** A place for `size` bytes, evicting ephemeral pages as needed; `none` when that does not help. */
  #allocate(pool: ZcachePool, size: number, entry: number): number {
    const allocator = this.#allocator
    this.#arena.refusedByAllocator = false
    if (size > allocator.maxSize) return none
    let location = allocator.alloc(size, entry)
    // An evicted page frees a slot, a run needs several: enough evictions for a few runs of this size, then it is given up.
    for (let left = 64 + (size >>> 8); location === none && left > 0; left--) {
      if (!allocator.compactOne(256, this.#moved) && !this.#evictFor(pool)) return none
      location = allocator.alloc(size, entry)
    }
    return location
  }

  #allocationOutcome(): PutOutcome {
    if (this.#arena.refusedByAllocator) {
      this.#failedAlloc++
      return PutOutcome.AllocationFailed
    }
    return PutOutcome.NoMemory
  }

  /** Evicts the oldest ephemeral page for a put of this pool; false when there is none. */
  #evictFor(pool: ZcachePool): boolean {
    const evicted = this.#table.oldest(EPHEMERAL) !== none
    if (evicted) this.#evict()
    if (pool.queue === PERSISTENT) {
      if (evicted) this.#persAteEph++
      else this.#persAteEphFailed++
    } else if (evicted) this.#ephAteTail++
    else this.#ephAteTailFailed++
    return evicted
  }

  #evict(): void {
    const entry = this.#table.oldest(EPHEMERAL)
    this.#removeEntry(this.#pools[this.#table.poolOf(entry)]!, entry)
    this.#evicted++
  }

  /** Takes an entry and its data out of everything. */
  #removeEntry(pool: ZcachePool, entry: number): void {
    this.#dropData(pool, entry)
    this.#table.unlink(pool.queue, entry)
    this.#table.remove(entry)
    this.#release(entry)
  }

  /** Frees what an entry holds and what its owner was charged, further segments included; the entry itself stays. */
  #dropData(pool: ZcachePool, entry: number): void {
    const length = Math.min(pool.attributes.pageSize, segmentBytes)
    for (let segment = entry; ; ) {
      const kind = this.#kinds[segment]!
      let slot = 0
      if ((kind & SAME) !== 0) this.#sameFilledPages--
      else {
        const size = kind & sizeMask
        slot = this.#allocator.slotSize(size)
        this.#count(pool, size, length, -1)
        if (((kind >>> codecShift) & codecMask) === 0) this.#rawPages--
        this.#allocator.free(this.#locations[segment]!)
      }
      pool.giveBack(bytesPerEntry + slot)
      const next = (kind & CHAIN) === 0 ? none : this.#links[segment]!
      if (segment !== entry) this.#release(segment)
      if (next === none) return
      segment = next
    }
  }

  /**
   * Decodes an entry to `bytes[at]`. A page that is not what was stored throws `TMEM_CORRUPT` when it is
   * persistent (and stays, so that the damage does not turn into a quiet miss) and is dropped when it is ephemeral (false).
   * A damaged page is found before the caller's page is touched.
   */
  #decode(pool: ZcachePool, entry: number, bytes: Uint8Array, at: number): boolean {
    const allocator = this.#allocator
    for (let segment = entry; ; segment = this.#links[segment]!) {
      const kind = this.#kinds[segment]!
      if ((kind & SAME) === 0) {
        allocator.locate(this.#locations[segment]!)
        const codec = (kind >>> codecShift) & codecMask
        if (checksum(allocator.words, allocator.at >>> 2, kind & sizeMask, codec) !== this.#checksums[segment])
          return this.#corrupt(pool, entry)
      }
      if ((kind & CHAIN) === 0) break
    }
    const length = Math.min(pool.attributes.pageSize, segmentBytes)
    for (let segment = entry, to = at; ; segment = this.#links[segment]!, to += length) {
      const kind = this.#kinds[segment]!
      if ((kind & SAME) !== 0) {
        // The last segment ends with the page; when it is also the first it may be larger than a segment.
        const end = (kind & CHAIN) === 0 ? at + pool.attributes.pageSize : to + length
        fill(bytes, to, end - to, this.#locations[segment]!, this.#checksums[segment]!)
      } else {
        allocator.locate(this.#locations[segment]!)
        const codec = (kind >>> codecShift) & codecMask
        if (codec === 0) copyBytes.call(allocator.bytes, bytes, to, allocator.at, allocator.at + length)
        else if (
          this.#codecs[codec]!.decompress(allocator.bytes, allocator.at, kind & sizeMask, bytes, to, length) !== length
        )
          // The memory is sound, the checksum says so: this codec cannot read what it wrote.
          throw this.#corruption(pool, entry, `codec ${this.#codecs[codec]!.name} cannot decode its own block`)
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

  /** Whether the page repeats one 8-byte word; then it is in `#sameLow` and `#sameHigh`. */
  #sameFilled(bytes: Uint8Array, at: number, length: number): boolean {
    // Most pages differ at one of these; only what does not is compared as a whole with itself, a word further on.
    const half = at + (length >>> 1)
    const end = at + length - 8
    for (let i = 0; i < 8; i++) if (bytes[at + i] !== bytes[end + i] || bytes[at + i] !== bytes[half + i]) return false
    if (compareBytes.call(bytes, bytes, at, end, at + 8, at + length) !== 0) return false
    this.#sameLow = bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)
    this.#sameHigh = bytes[at + 4]! | (bytes[at + 5]! << 8) | (bytes[at + 6]! << 16) | (bytes[at + 7]! << 24)
    return true
  }
}

/**
 * Checksum of compressed bytes: four lanes of xor and multiply over whole words (the last one padded with zeros), with length
 * and codec mixed in. Each step is a bijection of its lane, so that no damage within one word goes unseen.
 */
function checksum(words: Int32Array, at: number, bytes: number, codec: number): number {
  let a = bytes | (codec << 24)
  let b = 0x85ebca6b | 0
  let c = 0xc2b2ae35 | 0
  let d = 0x27d4eb2f
  const count = (bytes + 3) >>> 2
  const whole = at + (count & ~3)
  let i = at
  for (; i < whole; i += 4) {
    a = Math.imul(a ^ words[i]!, 0x9e3779b1)
    b = Math.imul(b ^ words[i + 1]!, 0x85ebca77)
    c = Math.imul(c ^ words[i + 2]!, 0xc2b2ae3d)
    d = Math.imul(d ^ words[i + 3]!, 0x27d4eb2f)
  }
  for (; i < at + count; i++) a = Math.imul(a ^ words[i]!, 0x9e3779b1)
  // Multiplication carries upwards only: fold the upper bits down and rotate the lanes apart.
  a ^= a >>> 15
  b ^= b >>> 13
  c ^= c >>> 16
  d ^= d >>> 14
  return a ^ ((b << 8) | (b >>> 24)) ^ ((c << 16) | (c >>> 16)) ^ ((d << 24) | (d >>> 8))
}

/** Fills a page with a repeated 8-byte word. */
function fill(bytes: Uint8Array, at: number, length: number, low: number, high: number): void {
  const byte = low & 0xff
  if ((low | 0) === (high | 0) && (low | 0) === Math.imul(byte, 0x01010101)) {
    bytes.fill(byte, at, at + length)
    return
  }
  for (let i = 0; i < 4; i++) {
    bytes[at + i] = low >>> (8 * i)
    bytes[at + 4 + i] = high >>> (8 * i)
  }
  for (let done = 8; done < length; done *= 2) bytes.copyWithin(at + done, at, at + done)
}

/** One pool: checks arguments, decides what goes on to the pool below. */
class ZcachePool implements Pool {
  readonly attributes: PoolAttributes
  readonly number: number
  /** Queue of its pages: `PERSISTENT` or `EPHEMERAL`. */
  readonly queue: number
  frozen = false
  readonly #store: Zcache
  readonly #next: Pool | undefined
  readonly #account: Account | undefined
  #gone = false

  constructor(
    store: Zcache,
    number: number,
    attributes: PoolAttributes,
    next: Pool | undefined,
    context: LayerContext,
  ) {
    this.attributes = attributes
    this.number = number
    this.queue = attributes.persistent ? PERSISTENT : EPHEMERAL
    this.#store = store
    this.#next = next
    // Ephemeral pages are the host's: they can be taken away at any time.
    this.#account = attributes.persistent ? context.accounts.of(attributes.client) : undefined
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.attributes.pageSize)
    assertIndex(index, this.attributes.pageSize)
    if (this.#gone) return PutOutcome.PoolGone
    const outcome = this.#store.put(this, object, index, page, 0)
    if (this.#next === undefined) return outcome
    if (outcome !== PutOutcome.Stored) return this.#next.put(object, index, page)
    this.#next.flushPage(object, index)
    return outcome
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.attributes.pageSize)
    assertIndex(index, this.attributes.pageSize)
    if (this.#gone) return GetOutcome.Miss
    if (this.#store.get(this, object, index, into, 0)) return GetOutcome.Hit
    return this.#next === undefined ? GetOutcome.Miss : this.#next.get(object, index, into)
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    assertPage(into, this.attributes.pageSize)
    assertIndex(index, this.attributes.pageSize)
    if (this.#gone) return GetOutcome.Miss
    if (this.#store.get(this, object, index, into, 0)) return GetOutcome.Hit
    if (this.#next === undefined) return GetOutcome.Miss
    const outcome = await this.#next.fetch(object, index, into)
    // It may have come up to here while the layer below was waiting.
    if (outcome === GetOutcome.Miss && !this.#gone && this.#store.get(this, object, index, into, 0))
      return GetOutcome.Hit
    return outcome
  }

  flushPage(object: ObjectId, index: number): void {
    assertIndex(index, this.attributes.pageSize)
    if (this.#gone) return
    this.#store.flushPage(this, object, index)
    this.#next?.flushPage(object, index)
  }

  flushObject(object: ObjectId): void {
    if (this.#gone) return
    this.#store.flushObject(this, object)
    this.#next?.flushObject(object)
  }

  putMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    const { objects, indexes, offsets, outcomes, bytes, length } = batch
    for (let i = 0; i < length; i++) {
      if (this.#gone) {
        if (outcomes[i] === Pending) outcomes[i] = PutOutcome.PoolGone
      } else if (outcomes[i] === PutOutcome.Stored) this.#store.flushPage(this, objects[i]!, indexes[i]!)
      else if (outcomes[i] === Pending) {
        const outcome = this.#store.put(this, objects[i]!, indexes[i]!, bytes, offsets[i]!)
        if (outcome === PutOutcome.Stored || this.#next === undefined) outcomes[i] = outcome
      }
    }
    if (this.#next !== undefined && !this.#gone) return this.#next.putMany(batch)
    return count(batch, PutOutcome.Stored)
  }

  getMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    const { objects, indexes, offsets, outcomes, bytes, length } = batch
    for (let i = 0; i < length; i++) {
      if (outcomes[i] !== Pending) continue
      if (!this.#gone && this.#store.get(this, objects[i]!, indexes[i]!, bytes, offsets[i]!))
        outcomes[i] = GetOutcome.Hit
      else if (this.#gone || this.#next === undefined) outcomes[i] = GetOutcome.Miss
    }
    if (this.#next !== undefined && !this.#gone) return this.#next.getMany(batch)
    return count(batch, GetOutcome.Hit)
  }

  flushMany(batch: PageBatch): void {
    assertBatch(batch, this.attributes.pageSize)
    if (this.#gone) return
    for (let i = 0; i < batch.length; i++) this.#store.flushPage(this, batch.objects[i]!, batch.indexes[i]!)
    this.#next?.flushMany(batch)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    assertIndex(index, this.attributes.pageSize)
    if (this.#gone) return GetOutcome.Miss
    if (this.#store.lend(this, object, index, use)) return GetOutcome.Hit
    return this.#next === undefined ? GetOutcome.Miss : this.#next.lend(object, index, use)
  }

  /** Pages are compressed as a whole: there is no cheap view of their parts. */
  split(): PoolRefusal {
    return this.#gone ? PoolRefusal.Closed : PoolRefusal.Unsupported
  }

  freeze(): void {
    this.frozen = true
    this.#next?.freeze()
  }

  thaw(): void {
    this.frozen = false
    this.#next?.thaw()
  }

  destroy(): void {
    if (this.#gone) return
    this.retire()
    this.#next?.destroy()
  }

  /** Removes the pages here and ends the pool, but not the one below. */
  retire(): void {
    this.#gone = true
    this.#store.destroy(this)
  }

  /** Charges the owner; always true for an ephemeral pool. */
  charge(bytes: number): boolean {
    return this.#account === undefined || this.#account.charge(bytes)
  }

  /** Takes a charge back. */
  giveBack(bytes: number): void {
    this.#account?.release(bytes)
  }
}

/** Entries of a batch with that outcome. */
function count(batch: PageBatch, outcome: number): number {
  let entries = 0
  for (let i = 0; i < batch.length; i++) if (batch.outcomes[i] === outcome) entries++
  return entries
}
