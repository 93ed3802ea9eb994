/**
 * What a store of pages is: the interface between every two layers of a stack.
 *
 * Rules that every layer keeps (asserted by the checked boundary and by the conformance suite):
 *  1. `put` is synchronous and may be refused, at any time, with a reason; refusing is cheap and bounded.
 *  2. After a refused put no layer holds any page under that handle, not even an older one; after an accepted put
 *     exactly one layer holds it.
 *  3. `get` is synchronous: hit, miss or deferred; `fetch` is its twin that may wait.
 *  4. A flush always succeeds and reaches every layer below.
 *  5. Buffers belong to the caller: a store copies out of them and into them and keeps no reference.
 *  6. No timer, thread, clock, random number or socket inside a layer except those it was given; background work is
 *     `tick`.
 *
 * Source: the transcendent memory API (December 2009, "Take 3"): pools, objects, pages; the objections of October
 * and November 2011 (page sizes, batches, stacking, a fallback for each failure) are why the interface has page sizes,
 * batches, `fetch` and layers.
 */
import type { GetOutcome, PoolRefusal, PutOutcome } from './outcomes.ts'
import { Pending } from './outcomes.ts'
import type { Place, PlacePlan, PlaceTraits } from './place.ts'

/**
 * Names an object inside a pool: an integer of at most 192 bits. A non-negative safe integer `number` is the fast
 * path; anything larger is a `bigint`. `5` and `5n` name the same object. All 192 bits set is reserved as invalid.
 */
export type ObjectId = number | bigint

/** Largest object id. One more (all 192 bits set) is the reserved invalid id of the original. */
export const maxObjectId: bigint = (1n << 192n) - 2n

/** Smallest page, in bytes, and the unit in which a split page is addressed. */
export const basePageSize = 4096
/** Largest page, in bytes. */
export const maxPageSize: number = 2 * 1024 * 1024

/** What a pool is; fixed when it is made. */
export interface PoolAttributes {
  /** Who made it, and owns it until `Pool.handOver`: an integer from 0 to 65535. Persistent pages are charged to it. */
  readonly client: number
  /** True: what was stored stays until flushed. False (ephemeral): a page may vanish at any time. */
  readonly persistent: boolean
  /** True: a get leaves the page in place. False (private): a get of an ephemeral page removes it. */
  readonly shared: boolean
  /** Bytes in a page: a power of two from 4 KiB to 2 MiB. */
  readonly pageSize: number
}

/** What a layer or a whole stack can do. Frozen data; `compose` checks it. */
export interface Capabilities {
  /** Keeps ephemeral pools. */
  readonly ephemeral: boolean
  /** Keeps persistent pools. */
  readonly persistent: boolean
  /** Keeps shared pools: a get leaves the page in place. */
  readonly shared: boolean
  /** Smallest page size that it keeps, in bytes. */
  readonly minPageSize: number
  /** Largest page size that it keeps, in bytes. */
  readonly maxPageSize: number
  /** A get may answer `Deferred`. */
  readonly deferred: boolean
  /** `Pool.split` gives a view in 4 KiB pages. */
  readonly split: boolean
  /** Bytes of pages that are sure to find a place: a put below that amount is refused only when the outside fails. */
  readonly reservedBytes: number
  /**
   * A put reads each byte of the page once, a get writes each once, and nothing is decided by them: a page may lie
   * where others write to it meanwhile, and whatever they write is all that comes of it. Absent: a page must hold still
   * during a call.
   */
  readonly readsOnce?: true
}

/** Lent bytes: `length` bytes of `bytes` from `at`; valid only inside the callback, read only. */
export type Borrower = (bytes: Uint8Array, at: number, length: number) => void

/** Bounds one `tick`. */
export interface Budget {
  /** At most this many pages are touched (moved, written, recompressed, prepared). */
  readonly pages: number
  /** At most so many bytes are sent down (default: any). */
  readonly bytes?: number
}

/** What one `tick` did. */
export interface Progress {
  /** Pages touched. */
  readonly pages: number
  /** True when there is more to do now. */
  readonly pending: boolean
}

/** Nothing was done and nothing is waiting. */
export const idle: Progress = Object.freeze({ pages: 0, pending: false })

/** One node of the tree of statistics: plain integer counters under their historical names, and what is below. */
export interface StatsNode {
  /** Name of the layer or section, e.g. `frontswap`. */
  readonly name: string
  /** Counters and gauges by name. Bytes and pages are integers. */
  readonly counters: Readonly<Record<string, number>>
  /** Sections of this layer, then the layer below. */
  readonly children: readonly StatsNode[]
}

/**
 * A pool of pages in a store. A handle is (object, index); index is an integer from 0 to 2^32-1 (for pages larger than
 * 4 KiB: 0 to 2^32 / (pageSize / 4096) - 1). Pages are `Uint8Array`s of exactly `attributes.pageSize` bytes.
 * Anything else is misuse and throws `TypeError` or `RangeError` before anything changed.
 */
export interface Pool {
  readonly attributes: PoolAttributes
  /** Copies a page in. On anything but `Stored`, no layer holds a page under this handle any more. */
  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome
  /**
   * Copies a page out. A hit removes the page from a private ephemeral pool and leaves it in place in every other.
   * On `Deferred`, await `fetch`.
   */
  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome
  /**
   * As `get`, waiting where that is needed; resolves to `Hit` or `Miss`. Rejects with `TmemError` when the page is
   * known to exist and cannot be had (I/O error, corruption). Calls for one handle are serialised; the answer is never
   * older than the state at the time of the call. With a signal (`AbortSignal.timeout(ms)` is a deadline) it rejects
   * with the signal's reason when that comes first, and `into` is as it was; a store that never waits need not look at
   * it.
   */
  fetch(object: ObjectId, index: number, into: Uint8Array, signal?: AbortSignal): Promise<GetOutcome>
  /**
   * As `getMany`, waiting where that is needed, for many pages at once. Resolves to the number of hits; then no entry
   * is `Deferred`. Rejects as `fetch`, when all others are done, with the error of the first entry that cannot be had;
   * all that cannot stay `Pending` or `Deferred`. Absent: fetch one by one.
   */
  fetchMany?(batch: PageBatch, signal?: AbortSignal): Promise<number>
  /** Removes a page, if there is one, here and below. Cannot fail. */
  flushPage(object: ObjectId, index: number): void
  /** Removes all pages of an object, here and below. Cannot fail. */
  flushObject(object: ObjectId): void
  /**
   * Puts every entry of the batch whose outcome is `Pending`, in order. An entry that is already `Stored` was taken by
   * a layer above: any copy here or below is dropped. Other entries are left alone. Returns how many entries are now
   * `Stored`. One crossing per layer and batch. (So a layer that hands a page of the batch down meanwhile loses it: it
   * does that with ephemeral pages only.)
   */
  putMany(batch: PageBatch): number
  /** Gets every entry whose outcome is `Pending`; afterwards none is. Returns the number of hits in the whole batch. */
  getMany(batch: PageBatch): number
  /** Flushes every entry, whatever its outcome says. */
  flushMany(batch: PageBatch): void
  /** A get without the copy: the page is lent to `use`. In a private ephemeral pool it is removed afterwards. */
  lend(object: ObjectId, index: number, use: Borrower): GetOutcome
  /**
   * The same pages seen in 4 KiB parts (index = index * parts + part), or why that cannot be had. See
   * `Capabilities.split`.
   */
  split(): Pool | PoolRefusal
  /**
   * As `put`, but a refusal leaves the page that is there: for who cannot do without either, as a block device. Absent
   * where a pool cannot keep both at once.
   */
  replace?(object: ObjectId, index: number, page: Uint8Array): PutOutcome
  /** As `putMany`, but a refusal leaves the page that is there. Absent as `replace` is. */
  replaceMany?(batch: PageBatch): number
  /**
   * The caller has the page in memory of its own and will not ask for it soon: gives up the copy in memory, where
   * another one lies below (on disk), which stays. True: a page is still there under the handle. Putting it back as
   * `unchanged` then costs no write below. False, and nothing was done: there is no other copy.
   */
  release?(object: ObjectId, index: number): boolean
  /**
   * Says where a page of up to 64 KiB is. False, and `into` is as it was: there is none, or it is larger. Does not
   * count as use.
   */
  whereIs?(object: ObjectId, index: number, into: Whereabouts): boolean
  /**
   * The last moves of a page of up to 64 KiB between places, as far as the stack remembers them: also of one that is
   * gone. `undefined`: nothing is remembered here (see `ComposeOptions.history`), or its pages are larger. It looks
   * through all that is remembered.
   */
  movesOf?(object: ObjectId, index: number): PageHistory | undefined
  /**
   * Moves pages of an object down now, the first `count` of `indexes`: to the next place below them that takes them, or
   * (`slow`) past all that are memory, to the next one that waits. What is not in memory, or on its way already, is
   * passed over. Resolves when what moved is safe there. Absent: nothing can be moved.
   */
  sink?(object: ObjectId, indexes: Uint32Array, count: number, slow: boolean): Promise<Sunk>
  /**
   * Compresses pages of an object again with the stronger codec of their place, the first `count` of `indexes`; how
   * many take less now. Pages with a clean copy below are passed over: they can go at no price.
   */
  recompress?(object: ObjectId, indexes: Uint32Array, count: number): number
  /**
   * The pages of an ephemeral pool count as another client's from now on (0 to 65535): where memory is shared out by
   * client and weight they are the newest of its pages. `attributes` stay as they are. False, and nothing was done:
   * there is no room for another client. Absent: no client is told from another here. Throws `RangeError` for a
   * persistent pool, whose pages its client has promised to pay for.
   */
  handOver?(client: number): boolean
  /**
   * Calls `visit` with each page, or each one of `object`, in an order that nothing is promised of, until it answers
   * false. `visit` must not use the stack. Absent: the pages of the pool cannot be listed.
   */
  walk?(visit: PageVisitor, object?: ObjectId): void
  /** How much is here now: in `into`, where it is given, which is returned. Absent where `walk` is. */
  census?(into?: Census): Census
  /** Refuses new handles from now on, until `thaw`. Replacing, getting and flushing go on. */
  freeze(): void
  /** Ends `freeze`. */
  thaw(): void
  /** Removes all pages; afterwards a put answers `PoolGone`, a get `Miss`. Idempotent. */
  destroy(): void
}

/**
 * What rests in one place of a stack, and what came and went. Counted in blocks of at most 64 KiB, of which a larger
 * page has several. pages = put + sunk + rose + recovered - passedDown - raised - gone.
 */
export interface PlaceUsage {
  readonly name: string
  /**
   * It may have to wait (a disk); what it promises to survive; its memory is somebody else's; it can compress pages
   * again.
   */
  readonly waits: boolean
  readonly survives: 'nothing' | 'process' | 'host'
  readonly foreign: boolean
  readonly recompresses: boolean
  readonly pages: number
  /** Bytes of the blocks; where it waits, with what frames and rounding take. */
  readonly bytes: number
  /** Pages that are kept as they are in memory, or that do not shrink in a place that waits. */
  readonly huge: number
  /** Blocks in memory of at most 2 KiB: half a page of 4 KiB. */
  readonly good: number
  /** Memory that the place has taken, metadata included; 0 where it waits. */
  readonly usedBytes: number
  /**
   * Blocks that came: put here (those of them that do not shrink), sunk from above, risen from below, left by an
   * earlier run.
   */
  readonly put: number
  readonly putHuge: number
  readonly sunk: number
  readonly rose: number
  readonly recovered: number
  /** Blocks that went: down, up, and for good (flushed, replaced, taken, dropped). */
  readonly passedDown: number
  readonly raised: number
  readonly gone: number
  /** Blocks that it refused. */
  readonly refused: number
  /** Where it waits: blocks written, and blocks read; and writes and reads that failed. */
  readonly writes: number
  readonly reads: number
  readonly failed: number
  /** Why the last write there failed; `undefined`: it went well, or there was none. */
  readonly failure: Error | undefined
  /** Blocks in memory that were moved together, compressed again, and compressed again in vain. */
  readonly compacted: number
  readonly recompressed: number
  readonly recompressPoor: number
}

/** What rests where in a stack. */
export interface StackUsage {
  /** Pages that repeat one word of 32 bits: they take no place. */
  readonly sameFilled: number
  /** From the top. */
  readonly places: readonly PlaceUsage[]
}

/** Names of places from the top, each for one of them: the second `frontswap` of a stack is `frontswap-2`. */
export function placeNames(places: readonly { readonly name: string }[]): string[] {
  const seen = new Map<string, number>()
  return places.map(({ name }) => {
    const count = (seen.get(name) ?? 0) + 1
    seen.set(name, count)
    return count === 1 ? name : `${name}-${count}`
  })
}

/** Takes the name of a page; false ends the walk. */
export type PageVisitor = (object: ObjectId, index: number) => boolean

/** What a pool has. One object serves for many answers. */
export interface Census {
  pages: number
  /**
   * Objects with a page. In a stack of several chains (more than 2^24 pages) one counts in each that has a page of it.
   */
  objects: number
}

/** Where a page is, and in which form: filled by `Pool.whereIs`. One object serves for many pages. */
export class Whereabouts {
  /** Number of its place in the stack, from the top; -1: it repeats one word, and takes no place. */
  place = -1
  /** Bytes of its block; where it waits, with what its frame and rounding take; 0 for one that repeats a word. */
  bytes = 0
  /** Number of the codec that made the block, 0: none did; -1: only the block itself knows, in a place that waits. */
  codec = -1
  /** It is kept as it is in memory, or does not shrink in a place that waits. */
  huge = false
  /** Compressed with the stronger codec of its place; and: that has been tried, and gained nothing. */
  recompressed = false
  incompressible = false
}

/**
 * Why a page moved: it was put straight below the first place, or back to the top from there; it was found when its
 * place opened; it sank, with a write, or for nothing because a copy lay below; it was copied down and stays; it rose
 * because it was asked for; its caller has it in memory of its own; it ended (replaced, flushed, taken, dropped).
 */
export type MoveReason = 'put' | 'recovered' | 'sunk' | 'sunk_clean' | 'copied' | 'rose' | 'released' | 'gone'

/** One move of a page. */
export interface PageMove {
  readonly reason: MoveReason
  /** Number of the place that it was in, and of that which it is in then (or the copy is), from the top; -1: none. */
  readonly from: number
  readonly to: number
  /** When, by the clock of the stack. */
  readonly atMs: number
}

/**
 * Moves of a page in which a place below the first one has a part; puts into the first place, and ends in it, are not
 * remembered.
 */
export interface PageHistory {
  /** The oldest first. */
  readonly moves: readonly PageMove[]
  /** All moves of the stack after that are remembered, by its clock. */
  readonly sinceMs: number
}

/** What became of pages that were to sink. */
export interface Sunk {
  /** Pages that are where they were to go. The others are where they were. */
  readonly pages: number
  /** Why the place that they were to go to failed, if it did: the system's own error. */
  readonly failure: Error | undefined
}

/** A place for pages: one layer, or a whole stack. */
export interface PageStore {
  readonly name: string
  readonly capabilities: Capabilities
  /**
   * Why the last put, or one of the last batch, was refused with `Unavailable`: the system's own error, so that a full
   * disk can be told from a broken one. Absent where no system is asked; `undefined` when nothing failed. Through a
   * stack, that of the uppermost layer that has one.
   */
  readonly failure?: Error | undefined
  /** Makes a pool, or says why not. Test with `typeof answer === 'number'`. */
  newPool(attributes: PoolAttributes): Pool | PoolRefusal
  /** Does background work within the budget, in this layer and below. */
  tick(budget: Budget): Progress
  /** Counters of this layer and of those below. */
  stats(): StatsNode
  /** What rests where: the same as numbers. Absent: this is no stack of places. */
  usage?(): StackUsage
  /**
   * Moves up to `pages` blocks together, so that memory becomes free; how many it moved, 0: there is nothing to gain.
   */
  compact?(pages: number): number
  /**
   * Drops the ephemeral page in memory that came first, of all or of that client: the bytes that its block had; 0:
   * there is none. (Of one client it is looked for among the first 4,096, and 0 says that it is not there.)
   */
  evict?(client?: number): number
  /** Bytes of memory that ephemeral pages take. */
  ephemeralBytes?(): number
  /** Resolves when every layer takes pages: those that must connect or recover have done so. Absent: it is ready. */
  ready?(): Promise<void>
  /**
   * Resolves when all pages that rest in places which promise to survive something are where they do. Moves nothing.
   * Rejects with `TmemError` (`TMEM_IO`). Absent: nothing here promises that.
   */
  sync?(): Promise<void>
  /** Throws an `Error` that names a broken invariant, here or below. For tests: it looks at every page. */
  check?(): void
  /** Destroys the pools, closes what is below, gives everything back. Idempotent. */
  close(): Promise<void>
}

/** Where layers get memory: one place, so that each request can be counted, bounded and made to fail. */
export interface Allocator {
  /**
   * Zeroed memory, or `undefined` when there is none. `site` names the place in the code, e.g. `memory.chunk`.
   * `bytes` is a positive integer.
   */
  allocate(bytes: number, site: string): ArrayBufferLike | undefined
  /**
   * Takes memory back that `allocate` gave for that site, and that nobody uses any more: it may be handed out again. It
   * uses no stack meanwhile. Absent: the garbage collector finds it.
   */
  free?(memory: ArrayBufferLike, site: string): void
  /**
   * Memory may not be had later: layers take all that they may ever need when they open, and keep what they do not need
   * any more (default: they take it when pages come, and give it back).
   */
  readonly ahead?: boolean
}

/** Persistent memory of one client. */
export interface Account {
  /** Share of ephemeral memory that the client may expect, relative to the weights of the others; 0: none was set. */
  readonly weight: number
  /** Charges bytes; false (and nothing charged) when the maximum would be passed. */
  charge(bytes: number): boolean
  /** Gives bytes back. */
  release(bytes: number): void
}

/** Persistent memory by client: the limit against a client that only ever stores. */
export interface Accounts {
  /** The account of a client; the same object for the same client. */
  of(client: number): Account
}

/** What a stack hands to each of its layers. */
export interface LayerContext {
  readonly allocator: Allocator
  readonly accounts: Accounts
  /** Milliseconds, from any start, never going back: for budgets of wear. Absent: there are none. */
  readonly clock?: () => number
  /** Moves that each chain of the stack remembers, which needs a clock. Absent: none. */
  readonly history?: number
  /** Called when background work has come up, so that somebody calls `tick` soon. Called again only after a `tick`. */
  readonly wake?: () => void
  /**
   * `blocking`: files are read and written in the calling thread, which may not use the runtime's pool of threads
   * (default: `pool`).
   */
  readonly io?: 'pool' | 'blocking'
  /**
   * Told how far a layer is with what takes long when it opens: what that is, for people, and how much of it is done.
   */
  readonly onProgress?: OpenProgress
}

/** `done` of `total` bytes are done of what a layer does when it opens. */
export type OpenProgress = (what: string, done: number, total: number) => void

/**
 * A layer before it is opened: frozen data and functions, so that a stack can be judged before anything is allocated.
 * It is a place (it has `place`), which keeps pages; or a filter, which changes something about the pages that pass
 * (`open`, above the first place) or about the blocks (`wrapPlace`, between places); or a whole store by itself (`open`
 * over nothing).
 */
export interface Layer {
  /** Name as in the textual form of a stack, e.g. `zcache`. */
  readonly name: string
  /** A place: what it promises, and how to open it. The chain decides what rests in it. */
  readonly place?: PlacePlan
  /**
   * What the stack from here downwards can do when `below` is what the next layer can do (`undefined`: there is none);
   * a string says in words why the two cannot stand together. Absent in places, whose traits say it.
   */
  plan?(below: Capabilities | undefined): Capabilities | string
  /** Opens the layer over the next one. It owns `next` and closes it. Throws `TmemError` when it cannot open. */
  open?(next: PageStore | undefined, context: LayerContext): PageStore
  /** What a place promises when the layer is around it (absent: the same); a string says in words why it cannot be. */
  planPlace?(below: PlaceTraits): PlaceTraits | string
  /** The layer around the place that follows it. It owns that place. */
  wrapPlace?(place: Place, context: LayerContext): Place
}

/** Kinds of option values in the textual form of a stack. `bytes` are written `64MiB`, `flag` as `yes` or `no`. */
export type OptionKind = 'bytes' | 'integer' | 'number' | 'text' | 'flag'
/** A parsed option: bytes, integers and numbers are `number`s, flags are `boolean`s. */
export type OptionValue = number | string | boolean

/** One option of a layer in the textual form of a stack. */
export interface OptionSpec {
  readonly kind: OptionKind
  /** What it sets, in a few words, for `--help` and errors. */
  readonly summary: string
  readonly required?: boolean
  /** Text options: the allowed values. Numbers and bytes: words that may stand instead of one. */
  readonly choices?: readonly string[]
  /** Smallest and largest number allowed. */
  readonly minimum?: number
  readonly maximum?: number
}

/** Makes a layer out of named options: what a package exports so that its layer can be named in text. */
export interface LayerFactory {
  /** Name in the text, e.g. `zcache`. */
  readonly name: string
  readonly summary: string
  readonly options: Readonly<Record<string, OptionSpec>>
  /** `options` were checked against the specification: required ones are there, kinds and ranges are right. */
  create(options: Readonly<Record<string, OptionValue>>): Layer
}

/**
 * Up to `capacity` handles with a page each: the caller's, reusable, and the only thing that a batch operation touches.
 *
 * Page i lies in `bytes` at `offsets[i]` and has `pageSize` bytes. `outcomes[i]` holds the outcome of entry i
 * (`PutOutcome` or `GetOutcome`), or `Pending`.
 */
export class PageBatch {
  readonly capacity: number
  readonly pageSize: number
  /** Entries in use. */
  length = 0
  readonly objects: ObjectId[]
  readonly indexes: Uint32Array
  readonly offsets: Float64Array
  readonly outcomes: Uint8Array
  /**
   * 1: the page is what the store had under this handle when it was released or read, so that a copy that is there
   * still serves. Set after `push`; a store that does not look at it puts the page as any other.
   */
  readonly unchanged: Uint8Array
  /** A number per entry for whoever works on the batch, during a call. */
  readonly scratch: Int32Array
  #bytes: Uint8Array
  /** Where the page ends that lies furthest on. */
  #end = 0
  readonly #pages: (Uint8Array | undefined)[]

  /**
   * @param capacity entries, 1 to 65536
   * @param pageSize bytes of a page: of the pool that the batch will be used with
   * @param bytes where the pages lie; by default a new buffer with room for `capacity` pages back to back
   */
  constructor(capacity: number, pageSize: number = basePageSize, bytes?: Uint8Array) {
    if (!Number.isInteger(capacity) || capacity < 1 || capacity > 65536)
      throw new RangeError(`batch capacity must be an integer from 1 to 65536, got ${capacity}`)
    assertPageSize(pageSize)
    this.capacity = capacity
    this.pageSize = pageSize
    this.#bytes = bytes ?? new Uint8Array(capacity * pageSize)
    this.#pages = new Array(capacity).fill(undefined)
    this.scratch = new Int32Array(capacity)
    this.objects = new Array<ObjectId>(capacity).fill(0)
    this.indexes = new Uint32Array(capacity)
    this.offsets = new Float64Array(capacity)
    this.outcomes = new Uint8Array(capacity)
    this.unchanged = new Uint8Array(capacity)
  }

  /** Whether all pages lie inside of `bytes`: not so when `bytes` was replaced by something too short. */
  get fits(): boolean {
    return this.#end <= this.#bytes.length
  }

  /** Where the pages lie. May be replaced between batches. */
  get bytes(): Uint8Array {
    return this.#bytes
  }

  set bytes(bytes: Uint8Array) {
    this.#bytes = bytes
    this.#pages.fill(undefined)
  }

  /** The page of an entry: a view that is made once and serves again while the entry's offset stays the same. */
  page(entry: number): Uint8Array {
    const at = this.#bytes.byteOffset + this.offsets[entry]
    const made = this.#pages[entry]
    if (made !== undefined && made.byteOffset === at) return made
    const page = new Uint8Array(this.#bytes.buffer, at, this.pageSize)
    this.#pages[entry] = page
    return page
  }

  /** Empties the batch; the memory stays. */
  clear(): void {
    this.length = 0
    this.#end = 0
  }

  /** Adds an entry in state `Pending` and returns its number. The page lies at `at`, by default back to back. */
  push(object: ObjectId, index: number, at: number = this.length * this.pageSize): number {
    const entry = this.length
    if (entry === this.capacity) throw new RangeError(`batch is full: it has room for ${this.capacity} entries`)
    if (!Number.isInteger(at) || at < 0 || at + this.pageSize > this.bytes.length)
      throw new RangeError(`page at ${at} is outside of the batch's ${this.bytes.length} bytes`)
    assertIndex(index, this.pageSize)
    this.objects[entry] = object
    this.indexes[entry] = index
    this.offsets[entry] = at
    if (at + this.pageSize > this.#end) this.#end = at + this.pageSize
    this.outcomes[entry] = Pending
    this.unchanged[entry] = 0
    this.length = entry + 1
    return entry
  }

  /** Makes every entry `Pending` again, so that the same handles can be used for another operation. */
  rearm(): void {
    this.outcomes.fill(Pending, 0, this.length)
  }
}

/** Throws `RangeError` unless `pageSize` is a power of two from 4 KiB to 2 MiB. */
export function assertPageSize(pageSize: number): void {
  if (!isPageSize(pageSize))
    throw new RangeError(
      `page size must be a power of two from ${basePageSize} to ${maxPageSize} bytes, got ${pageSize}`,
    )
}

/** True for a power of two from 4 KiB to 2 MiB. */
export function isPageSize(pageSize: number): boolean {
  return pageSize >= basePageSize && pageSize <= maxPageSize && (pageSize & (pageSize - 1)) === 0
}

/** Throws `RangeError` unless `index` can name a page of that size. */
export function assertIndex(index: number, pageSize: number): void {
  if (index >>> 0 === index && (pageSize === basePageSize || index * (pageSize / basePageSize) <= 0xffffffff)) return
  throw new RangeError(`index must be an integer from 0 to ${2 ** 32 / (pageSize / basePageSize) - 1}, got ${index}`)
}

/** Throws `TypeError` or `RangeError` unless `object` is an object id. */
export function assertObject(object: ObjectId): void {
  if (typeof object === 'number' ? Number.isSafeInteger(object) && object >= 0 : isWideObject(object)) return
  if (typeof object !== 'number' && typeof object !== 'bigint')
    throw new TypeError(`object id must be a number or a bigint, got ${typeof object}`)
  throw new RangeError(`object id must be an integer from 0 to 2^192-2, got ${object}`)
}

const isWideObject = (object: unknown): boolean => typeof object === 'bigint' && object >= 0n && object <= maxObjectId

/** Throws `TypeError` or `RangeError` unless `page` is a `Uint8Array` of exactly `pageSize` bytes. */
export function assertPage(page: Uint8Array, pageSize: number): void {
  if (!(page instanceof Uint8Array)) throw new TypeError('page must be a Uint8Array')
  if (page.length !== pageSize) throw new RangeError(`page must have ${pageSize} bytes, got ${page.length}`)
}

/** Throws `TypeError` or `RangeError` unless the batch fits a pool with this page size. */
export function assertBatch(batch: PageBatch, pageSize: number): void {
  if (!(batch instanceof PageBatch)) throw new TypeError('batch must be a PageBatch')
  if (batch.pageSize !== pageSize)
    throw new RangeError(`batch has pages of ${batch.pageSize} bytes, the pool has pages of ${pageSize}`)
  if (!batch.fits) throw new RangeError(`pages of the batch lie outside of its ${batch.bytes.length} bytes`)
}

/**
 * Throws `TypeError` or `RangeError` unless every entry names an object, an index and a place inside of the batch's
 * bytes.
 */
export function assertEntries(batch: PageBatch): void {
  const { length, capacity, objects, indexes, offsets, bytes, pageSize } = batch
  if (!Number.isInteger(length) || length < 0 || length > capacity)
    throw new RangeError(`a batch of ${capacity} entries cannot have ${length} in use`)
  for (let i = 0; i < length; i++) {
    assertObject(objects[i]!)
    assertIndex(indexes[i]!, pageSize)
    const at = offsets[i]!
    if (!Number.isInteger(at) || at < 0 || at + pageSize > bytes.length)
      throw new RangeError(`entry ${i}: the page at ${at} is outside of the batch's ${bytes.length} bytes`)
  }
}

/** Throws `RangeError` unless it is the number of a client: an integer from 0 to 65535. */
export function assertClient(client: number): void {
  if (!Number.isInteger(client) || client < 0 || client > 0xffff)
    throw new RangeError(`client must be an integer from 0 to 65535, got ${client}`)
}

/** Throws `RangeError` unless the attributes make sense; returns a frozen copy. */
export function checkedAttributes(attributes: PoolAttributes): PoolAttributes {
  const { client, persistent, shared, pageSize } = attributes
  assertClient(client)
  if (typeof persistent !== 'boolean' || typeof shared !== 'boolean')
    throw new TypeError('pool attributes `persistent` and `shared` must be booleans')
  assertPageSize(pageSize)
  return Object.freeze({ client, persistent, shared, pageSize })
}
