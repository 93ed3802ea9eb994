/**
 * The page engine: pools, handles and frames of plain memory, all of whose state lies in typed arrays.
 *
 * Page bytes lie in large chunks outside of the JavaScript heap (`Frames`), handles in typed arrays (`HandleTable`).
 * The entry number of a page is the number of its first frame, so that one lookup finds both; a put is a lookup and one
 * copy, a get is a lookup and one copy.
 *
 * Keys. A page of 2^k × 4 KiB is entered under the index of its first 4 KiB (index × 2^k); its parts, when they were
 * put one by one or when the page was split, under their own. So a page is either one run of frames or single frames,
 * and both the pool (order k) and its view in parts (order 0) find either.
 *
 * Eviction. Ephemeral pages queue per client in the order of their insertion; only a get from a shared pool moves a
 * page back to the new end (Xen's lists, without the global one). DEVIATION: Xen's quota test is inverted (a client
 * counts as over its quota when its share of pages is *below* its share of weight). Here a client is over when its
 * share of pages is above its share of weight, as the design document of Xen's tmem says. DEVIATION: where Xen takes
 * the oldest page of all clients, the oldest page of the client with the most pages per weight goes (a client without a
 * weight counts as 1): one queue per page instead of two, and a fair share besides.
 *
 * Invariants: bytes of chunks and metadata stay within the limit that was given at the start; refusing costs the same
 * however full the engine is; a frame given to another owner is overwritten whole, or scrubbed, before anybody can read
 * it.
 */
import type {
  Account,
  Accounts,
  Allocator,
  Borrower,
  ByteLimit,
  Census,
  ObjectId,
  PageBatch,
  PageVisitor,
  PoolAttributes,
  PoolRefusal,
} from '@tmem/core'
import {
  basePageSize,
  GetOutcome,
  maxEntries,
  maxPageSize,
  none,
  Pending,
  PutOutcome,
  PoolRefusal as Refusal,
  TmemError,
} from '@tmem/core'
import { entryWords, HandleTable, type HandleTableMemory } from '@tmem/core/unstable'
import { Frames } from './frames.ts'

/** Largest chunk of frames: big enough that chunks are few, small enough that giving one back is worth having. */
const largestChunkBytes = 64 * 1024 * 1024
/** A chunk holds at least one page of the largest size, where the limit allows that. */
const smallestChunkBytes = 2 * 1024 * 1024
/** Ephemeral pages that one put may evict beyond what it needs itself, before it gives up: refusing stays bounded. */
const spareEvictions = 8
/** Frames that the engine keeps ready beyond those in use: 64 MiB. */
const readyFrames = 16384

/** How many pages a pool has is told by the table of handles. */
const poolWords = 5
const GENERATION = 0
const ORDER = 1
const FLAGS = 2
const CLIENT = 3
const PARTS = 4

const PERSISTENT = 1
const SHARED = 2
const FROZEN = 4

const clientWords = 4
const CLIENT_ID = 0
const CLIENT_POOLS = 1
const EPHEMERAL_FRAMES = 2
const PERSISTENT_FRAMES = 3

const counterNames = [
  'puts',
  'succ_puts',
  'dup_puts_replaced',
  'gets',
  'succ_gets',
  'flushed_pages',
  'flushed_objects',
  'evicted_pages',
  'taken_pages',
  'moved_pages',
  'refused_no_memory',
  'refused_quota',
  'refused_frozen',
  'refused_allocation',
] as const
const PUTS = 0
const SUCC_PUTS = 1
const REPLACED = 2
const GETS = 3
const SUCC_GETS = 4
const FLUSHED_PAGES = 5
const FLUSHED_OBJECTS = 6
const EVICTED = 7
const TAKEN = 8
const MOVED = 9
const NO_MEMORY = 10
const QUOTA = 11
const REFUSED_FROZEN = 12
const ALLOCATION = 13

/** Answers of `#place` and `#locate` beside frame numbers; a negative `PutOutcome` is a refusal. */
const scattered = -1000

/** What an engine is made of. */
export interface EngineOptions {
  /** Budget in bytes, pages and metadata together; `maximumBytes` sizes the metadata. */
  readonly limit: ByteLimit
  readonly allocator: Allocator
  readonly accounts: Accounts
  /** All chunks are allocated at the start and never given back: what threads need, which cannot learn of new ones. */
  readonly fixed: boolean
}

/** The memory of an engine: what another thread needs to attach to it. */
export interface EngineMemory {
  readonly capacity: number
  readonly chunkShift: number
  readonly state: ArrayBufferLike
  readonly frameState: ArrayBufferLike
  readonly frameStates: ArrayBufferLike
  readonly chunks: readonly (ArrayBufferLike | undefined)[]
  readonly handles: HandleTableMemory
}

/** log2 of the frames in a page of that size. */
export const orderOf = (pageSize: number): number => 31 - Math.clz32(pageSize / basePageSize)

/**
 * Pools, and clients with pools, that an engine of so many frames can have at once: one for 64 frames and one for 256,
 * as far as that is not few or more than anybody has.
 */
const poolsFor = (frames: number): number => Math.min(16_384, Math.max(256, Math.floor(frames / 64)))
const clientsFor = (frames: number): number => Math.min(4096, Math.max(64, Math.floor(frames / 256)))

/** Behind the counters: pools, clients, and one word more. */
const stateBytes = (frames: number): number =>
  counterNames.length * 8 + (poolsFor(frames) * poolWords + clientsFor(frames) * clientWords + 1) * 4

/** What an engine needs whatever its size: pools, clients, counters, chains of frames and queues. */
const fixedBytes = 24 * 1024
/** What it needs beyond that for more pools and clients; the table of handles has three words of each, too. */
const moreBytes = (frames: number): number =>
  stateBytes(frames) - stateBytes(0) + 12 * (poolsFor(frames) - poolsFor(0) + clientsFor(frames) - clientsFor(0))

export class Engine {
  /**
   * Bytes of metadata that each 4 KiB of capacity may need: handle, state byte, and an object of its own. Objects are
   * budgeted for the worst case, because chunks cannot shrink by a page when objects come late.
   */
  static readonly bytesPerFrame: number = HandleTable.bytesPerEntry + 1 + HandleTable.bytesPerObject

  readonly memory: EngineMemory
  readonly #limit: ByteLimit
  readonly #allocator: Allocator
  readonly #accounts: Accounts
  readonly #fixed: boolean
  readonly #table: HandleTable
  readonly #frames: Frames
  readonly #maxPools: number
  readonly #maxClients: number
  readonly #pools: Int32Array
  readonly #clients: Int32Array
  readonly #counters: Float64Array
  /** Accounts by client slot, as far as this thread has met them, and whose they are. */
  readonly #account: Account[] = []
  readonly #accountClient: Int32Array
  /** Scratch for one page: where parts are gathered. */
  #scratch: Uint8Array | undefined
  #seenLimit = -1
  #allowedFrames = 0
  #touched = 0
  /** The parts of one large page are being placed. */
  #scattering = false
  /** Entries that the batch at work still has, and the run of frames from which its new pages are served. */
  #batchLeft = 0
  #runNext = 0
  #runEnd = 0

  private constructor(options: EngineOptions, memory: EngineMemory, table: HandleTable) {
    this.memory = memory
    this.#limit = options.limit
    this.#allocator = options.allocator
    this.#accounts = options.accounts
    this.#fixed = options.fixed
    this.#table = table
    this.#counters = new Float64Array(memory.state, 0, counterNames.length)
    this.#maxPools = poolsFor(memory.capacity)
    this.#maxClients = clientsFor(memory.capacity)
    this.#accountClient = new Int32Array(this.#maxClients).fill(none)
    const poolsAt = counterNames.length * 8
    const clientsAt = poolsAt + this.#maxPools * poolWords * 4
    this.#pools = new Int32Array(memory.state, poolsAt, this.#maxPools * poolWords)
    this.#clients = new Int32Array(memory.state, clientsAt, this.#maxClients * clientWords + 1)
    this.#frames = new Frames(
      {
        capacity: memory.capacity,
        chunkShift: memory.chunkShift,
        state: memory.frameState,
        frameStates: memory.frameStates,
        chunks: memory.chunks,
      },
      table.words,
      entryWords,
    )
  }

  /** Frames that fit a budget of so many bytes beside their metadata. */
  static capacityFor(bytes: number): number {
    const bytesPerFrame = basePageSize + Engine.bytesPerFrame
    const most = Math.floor((bytes - fixedBytes) / bytesPerFrame)
    return Math.floor((bytes - fixedBytes - moreBytes(most)) / bytesPerFrame)
  }

  /**
   * Makes an empty engine. Throws `RangeError` for a limit without room for a single page or for more than 2^24-1
   * pages, and `TmemError` (`TMEM_NO_MEMORY`) when the metadata cannot be had.
   */
  static create(options: EngineOptions): Engine {
    const { limit, allocator, fixed } = options
    const capacity = Engine.capacityFor(limit.maximumBytes)
    if (capacity < 1)
      throw new RangeError(`a limit of ${limit.maximumBytes} bytes has no room for a page and its metadata`)
    if (capacity > maxEntries)
      throw new RangeError(
        `a limit of ${limit.maximumBytes} bytes is more than the ${maxEntries} pages of one store: use several`,
      )
    let chunkBytes = largestChunkBytes
    while (chunkBytes > smallestChunkBytes && chunkBytes * 8 > limit.maximumBytes) chunkBytes /= 2
    const chunkShift = orderOf(chunkBytes)
    const chunkCount = Math.ceil(capacity / 2 ** chunkShift)
    const reserve = (bytes: number, site: string): ArrayBufferLike => {
      const memory = allocator.allocate(bytes, site)
      if (memory === undefined)
        throw new TmemError(
          'TMEM_NO_MEMORY',
          `no memory for ${site} (${bytes} bytes) of a store of ${limit.maximumBytes} bytes: give a smaller limit`,
          { layer: 'memory' },
        )
      return memory
    }
    const state = reserve(stateBytes(capacity), 'memory.state')
    const frameState = reserve(Frames.stateBytes(chunkCount), 'memory.frameState')
    const frameStates = reserve(capacity, 'memory.frameStates')
    const [queues, pools] = [clientsFor(capacity), poolsFor(capacity)]
    const table = HandleTable.create({ capacity, queues, pools, allocator, site: 'memory' })
    const chunks: (ArrayBufferLike | undefined)[] = new Array(chunkCount).fill(undefined)
    if (fixed)
      for (let chunk = 0; chunk < chunkCount; chunk++)
        chunks[chunk] = reserve(
          Math.min(2 ** chunkShift, capacity - chunk * 2 ** chunkShift) * basePageSize,
          'memory.chunk',
        )
    const memory = { capacity, chunkShift, state, frameState, frameStates, chunks, handles: table.memory }
    const engine = new Engine(options, memory, table)
    engine.#frames.initialize()
    if (fixed) for (let chunk = 0; chunk < chunkCount; chunk++) engine.#frames.openChunk(chunk)
    return engine
  }

  /** The same engine seen from another thread. Calls of several threads must exclude one another. */
  static attach(options: EngineOptions, memory: EngineMemory): Engine {
    return new Engine(options, memory, HandleTable.attach(memory.handles))
  }

  /** Frames of 4 KiB that there can be. */
  get capacity(): number {
    return this.#frames.capacity
  }

  /** Largest page, in bytes, that a store with this limit can keep: at least eight of them fit. */
  static largestPageFor(bytes: number): number {
    const capacity = Engine.capacityFor(bytes)
    let pageSize = basePageSize
    while (pageSize < maxPageSize && (pageSize * 16) / basePageSize <= capacity) pageSize *= 2
    return pageSize
  }

  /** Gives the memory of all chunks back that hold no page and no frame of a caller's. */
  release(): void {
    for (let chunk = 0; chunk < this.#frames.chunkCount; chunk++)
      if (this.#frames.has(chunk) && this.#frames.chunkUsed(chunk) === 0) this.#dropChunk(chunk)
  }

  /** Makes a pool: its number, or (negative) the refusal. */
  newPool(attributes: PoolAttributes): number {
    const pools = this.#pools
    let number = 0
    while (number < this.#maxPools && (pools[number * poolWords + GENERATION] & 1) !== 0) number++
    if (number === this.#maxPools) return -Refusal.NoSlot
    if (attributes.pageSize > Engine.largestPageFor(this.#limit.maximumBytes)) return -Refusal.BadPageSize
    if (!this.prepare(attributes.pageSize)) return -Refusal.NoMemory
    const client = this.#openClient(attributes.client)
    if (client === none) return -Refusal.NoSlot
    const at = number * poolWords
    pools[at + ORDER] = orderOf(attributes.pageSize)
    pools[at + FLAGS] = (attributes.persistent ? PERSISTENT : 0) | (attributes.shared ? SHARED : 0)
    pools[at + CLIENT] = client
    pools[at + PARTS] = 0
    pools[at + GENERATION] = pools[at + GENERATION] + 1
    return number
  }

  /** Generation of a pool: changes when it is destroyed; odd while it exists. */
  generation(pool: number): number {
    return this.#pools[pool * poolWords + GENERATION]
  }

  /** What a pool is, or `undefined` when there is none of that number. */
  attributesOf(pool: number): PoolAttributes | undefined {
    const at = pool * poolWords
    if (!(pool >= 0 && pool < this.#maxPools) || (this.#pools[at + GENERATION] & 1) === 0) return undefined
    return Object.freeze({
      client: this.#clients[this.#pools[at + CLIENT] * clientWords + CLIENT_ID],
      persistent: (this.#pools[at + FLAGS] & PERSISTENT) !== 0,
      shared: (this.#pools[at + FLAGS] & SHARED) !== 0,
      pageSize: basePageSize << this.#pools[at + ORDER],
    })
  }

  /** Removes all pools. */
  destroyAll(): void {
    for (let pool = 0; pool < this.#maxPools; pool++)
      if ((this.#pools[pool * poolWords + GENERATION] & 1) !== 0) this.destroyPool(pool)
  }

  /** Reserves what pages of that size need in this thread; false when there is no memory. */
  prepare(pageSize: number): boolean {
    return pageSize === basePageSize || this.#reserveScratch(pageSize)
  }

  /** Scratch for one page. False when there is no memory. */
  #reserveScratch(bytes: number): boolean {
    if (this.#scratch !== undefined && this.#scratch.length >= bytes) return true
    const memory = this.#allocator.allocate(bytes, 'memory.scratch')
    if (memory === undefined) return false
    this.#scratch = new Uint8Array(memory)
    return true
  }

  /** Removes all pages of a pool and the pool. */
  destroyPool(pool: number): void {
    const at = pool * poolWords
    for (let entry = this.#table.firstOfPool(pool); entry !== none; entry = this.#table.firstOfPool(pool))
      this.#drop(entry, at)
    const clientAt = this.#pools[at + CLIENT] * clientWords
    this.#clients[clientAt + CLIENT_POOLS] = this.#clients[clientAt + CLIENT_POOLS] - 1
    this.#pools[at + GENERATION] = this.#pools[at + GENERATION] + 1
  }

  /**
   * The pages of an ephemeral pool count as another client's, as its newest, in the order that they have. False, and
   * nothing was done: all slots for clients are in use.
   */
  handOver(pool: number, client: number): boolean {
    const at = pool * poolWords
    const pools = this.#pools
    if ((pools[at + FLAGS] & PERSISTENT) !== 0) throw new RangeError('a persistent pool cannot be handed over')
    const from = pools[at + CLIENT]
    const to = this.#openClient(client)
    if (to === none) return false
    this.#clients[from * clientWords + CLIENT_POOLS] = this.#clients[from * clientWords + CLIENT_POOLS] - 1
    pools[at + CLIENT] = to
    if (to === from) return true
    for (let entry = this.#table.oldest(from); entry !== none; ) {
      const next = this.#table.newer(entry)
      if (this.#table.poolOf(entry) === pool) {
        const frames = 1 << this.#frames.orderOf(entry)
        this.#table.unlink(from, entry)
        this.#table.append(to, entry)
        this.#clients[from * clientWords + EPHEMERAL_FRAMES] -= frames
        this.#clients[to * clientWords + EPHEMERAL_FRAMES] += frames
      }
      entry = next
    }
    return true
  }

  /** Freezes or thaws a pool. */
  freeze(pool: number, frozen: boolean): void {
    const at = pool * poolWords + FLAGS
    this.#pools[at] = frozen ? this.#pools[at] | FROZEN : this.#pools[at] & ~FROZEN
  }

  /** Stores the page of 2^order frames that starts at `source[at]`. `key` is the index of its first 4 KiB. */
  put(pool: number, object: ObjectId, key: number, order: number, source: Uint8Array, at: number): PutOutcome {
    const frame = this.#place(pool, object, key, order)
    if (frame >= 0) {
      if (at === 0 && source.length === basePageSize << order) this.#frames.fill(frame, 0, source)
      else this.#frames.copyIn(frame, source, at, basePageSize << order)
      return PutOutcome.Stored
    }
    if (frame === scattered) return this.#putScattered(pool, object, key, order, source, at)
    return -frame as PutOutcome
  }

  /** Copies a page out; a hit takes it out of a private ephemeral pool. */
  get(pool: number, object: ObjectId, key: number, order: number, target: Uint8Array, at: number): GetOutcome {
    const counters = this.#counters
    counters[GETS]++
    const frame = this.#locate(pool, object, key, order)
    if (frame === none) return GetOutcome.Miss
    if (frame === scattered) this.#gather(pool, object, key, order, target, at)
    else this.#frames.copyOut(frame, 0, target, at, basePageSize << order)
    counters[SUCC_GETS]++
    this.#afterGet(pool, object, key, order, frame)
    return GetOutcome.Hit
  }

  /** Lends a page; a hit takes it out of a private ephemeral pool afterwards. */
  lend(pool: number, object: ObjectId, key: number, order: number, use: Borrower): GetOutcome {
    this.#counters[GETS]++
    const frame = this.#locate(pool, object, key, order)
    if (frame === none) return GetOutcome.Miss
    this.#counters[SUCC_GETS]++
    if (frame === scattered) {
      this.#gather(pool, object, key, order, this.#scratch!, 0)
      use(this.#scratch!, 0, basePageSize << order)
    } else use(this.#frames.bytesOf(frame), this.#frames.offsetOf(frame), basePageSize << order)
    // The borrower may have used the store meanwhile: only the page that was lent is taken.
    const now = this.#locate(pool, object, key, order)
    if (now === frame) this.#afterGet(pool, object, key, order, frame)
    return GetOutcome.Hit
  }

  /** Removes a page; whether there was one. */
  flushPage(pool: number, object: ObjectId, key: number, order: number): boolean {
    const at = pool * poolWords
    const entry = this.#table.find(pool, object, key)
    const poolOrder = this.#pools[at + ORDER]
    if (poolOrder === 0 ? entry !== none : order !== 0 && entry !== none && this.#frames.orderOf(entry) === order) {
      this.#counters[FLUSHED_PAGES]++
      this.#drop(entry, at)
      return true
    }
    if (poolOrder === 0) return false
    const removed = order === 0 ? this.#flushPart(pool, object, key, entry) : this.#flushParts(pool, object, key, order)
    if (removed) this.#counters[FLUSHED_PAGES]++
    return removed
  }

  /** Removes all pages of an object. */
  flushObject(pool: number, object: ObjectId): void {
    const at = pool * poolWords
    let removed = 0
    for (
      let entry = this.#table.firstOfObject(pool, object);
      entry !== none;
      entry = this.#table.firstOfObject(pool, object)
    ) {
      this.#drop(entry, at)
      removed++
    }
    if (removed === 0) return
    this.#counters[FLUSHED_OBJECTS]++
    this.#counters[FLUSHED_PAGES] += removed
  }

  /**
   * Puts every `Pending` entry of a batch. First all places are found and then all pages copied, so that neither waits
   * for the other's cache misses.
   */
  putMany(pool: number, batch: PageBatch, order: number): void {
    const { objects, indexes, outcomes, scratch, length } = batch
    const scale = 1 << order
    let copied = 0
    for (let i = 0; i < length; i++) {
      scratch[i] = none
      this.#batchLeft = length - i
      if (outcomes[i] !== Pending) {
        // A layer above took it: then it is not ours any more.
        if (outcomes[i] === PutOutcome.Stored) this.flushPage(pool, objects[i], indexes[i] * scale, order)
        continue
      }
      const frame = this.#place(pool, objects[i], indexes[i] * scale, order)
      if (frame >= 0) {
        scratch[i] = frame
        outcomes[i] = PutOutcome.Stored
        continue
      }
      let outcome = -frame as PutOutcome
      if (frame === scattered) {
        // It may evict, reuse and fill a frame whose older copy must not come after.
        copied = this.#copyInMany(batch, order, copied, i)
        outcome = this.#putScattered(pool, objects[i], indexes[i] * scale, order, batch.bytes, batch.offsets[i])
      }
      outcomes[i] = outcome
    }
    this.#copyInMany(batch, order, copied, length)
    this.#batchLeft = 0
    while (this.#runNext < this.#runEnd) this.#frames.free(this.#runNext++)
  }

  /**
   * Copies the pages of entries `from` to `to`-1 to their places in `scratch`; neighbours to neighbours in one copy.
   */
  #copyInMany(batch: PageBatch, order: number, from: number, to: number): number {
    const { offsets, scratch } = batch
    const frames = this.#frames
    for (let i = from; i < to; i++) {
      const frame = scratch[i]
      if (frame === none) continue
      const run = i + 1 < to && scratch[i + 1] === frame + (1 << order) ? this.#runOf(batch, order, i, to) : 1
      if (run === 1) frames.fill(frame, 0, batch.page(i))
      else frames.copyIn(frame, batch.bytes, offsets[i], (run * basePageSize) << order)
      i += run - 1
    }
    return to
  }

  /** Number of entries from `first` on whose pages and places lie side by side. */
  #runOf({ offsets, scratch }: PageBatch, order: number, first: number, to: number): number {
    const size = basePageSize << order
    const frame = scratch[first]
    let run = 1
    while (
      first + run < to &&
      scratch[first + run] === frame + (run << order) &&
      offsets[first + run] === offsets[first] + run * size &&
      this.#frames.sameChunk(scratch[first + run], frame)
    )
      run++
    return run
  }

  /** Gets every `Pending` entry of a batch. First all are found, then copied. */
  getMany(pool: number, batch: PageBatch, order: number): void {
    const { objects, indexes, offsets, outcomes, scratch, bytes, length } = batch
    const frames = this.#frames
    const size = basePageSize << order
    const scale = 1 << order
    for (let i = 0; i < length; i++) {
      scratch[i] = none
      if (outcomes[i] !== Pending) continue
      const key = indexes[i] * scale
      this.#counters[GETS]++
      const frame = this.#locate(pool, objects[i], key, order)
      if (frame === none) {
        outcomes[i] = GetOutcome.Miss
        continue
      }
      this.#counters[SUCC_GETS]++
      outcomes[i] = GetOutcome.Hit
      if (frame === scattered) this.#gather(pool, objects[i], key, order, bytes, offsets[i])
      else scratch[i] = frame
      // Freed frames keep their bytes until the next put, which cannot come before the copies below.
      this.#afterGet(pool, objects[i], key, order, frame)
    }
    for (let i = 0; i < length; i++) {
      const frame = scratch[i]
      if (frame === none) continue
      const run = i + 1 < length && scratch[i + 1] === frame + scale ? this.#runOf(batch, order, i, length) : 1
      frames.copyOut(frame, 0, bytes, offsets[i], run * size)
      i += run - 1
    }
  }

  /** Takes a scrubbed run of frames out for the caller, or (negative) the refusal. */
  reserveFrame(pool: number): number {
    const at = pool * poolWords
    const frame = this.#allocate(this.#pools[at + ORDER], this.#pools[at + CLIENT])
    if (frame < 0) return frame === scattered ? -PutOutcome.NoMemory : frame
    this.#frames.scrub(frame)
    this.#frames.lend(frame)
    return frame
  }

  /** Gives a frame of the caller's back. */
  freeFrame(frame: number): void {
    this.#frames.unlend(frame)
    this.#frames.free(frame)
  }

  /** Moves a frame of the caller's in under a handle; refused, it stays the caller's, and the handle is empty. */
  putFrame(pool: number, object: ObjectId, key: number, frame: number): PutOutcome {
    const at = pool * poolWords
    const order = this.#pools[at + ORDER]
    this.#frames.assertLent(frame, order)
    this.#counters[PUTS]++
    const known = this.flushPage(pool, object, key, order)
    if (!known && (this.#pools[at + FLAGS] & FROZEN) !== 0) return -this.#refuse(PutOutcome.Frozen) as PutOutcome
    const entered = this.#enter(frame, pool, at, object, key, order)
    if (entered < 0) return -entered as PutOutcome
    this.#frames.unlend(frame)
    this.#counters[SUCC_PUTS]++
    return PutOutcome.Stored
  }

  /** Moves a page out as a frame of the caller's, or `none` (also for a page that lies in single frames). */
  takeFrame(pool: number, object: ObjectId, key: number): number {
    const at = pool * poolWords
    this.#counters[GETS]++
    const frame = this.#table.find(pool, object, key)
    if (frame === none || this.#frames.orderOf(frame) !== this.#pools[at + ORDER]) return none
    this.#counters[SUCC_GETS]++
    this.#counters[TAKEN]++
    this.#leave(frame, at)
    this.#frames.lend(frame)
    return frame
  }

  /** The bytes that hold a frame, and where it starts in them. */
  bytesOf(frame: number): Uint8Array {
    return this.#frames.bytesOf(frame)
  }

  /** Where a frame starts in `bytesOf(frame)`. */
  offsetOf(frame: number): number {
    return this.#frames.offsetOf(frame)
  }

  /**
   * Background work: shrinks to the limit, gives chunks back, makes the next frames ready. Returns the pages touched.
   */
  tick(budget: number): number {
    let done = 0
    while (done < budget && this.#frames.used > this.#allowed()) {
      if (!this.#evict(none)) break
      done++
    }
    if (!this.#fixed) done += this.#compact(budget - done)
    return done + this.#makeReady(budget - done)
  }

  /**
   * Drops the ephemeral page of a client that came first (`undefined`: of the client whose turn it is); its bytes, 0:
   * there is none.
   */
  evictOne(client: number | undefined): number {
    let slot: number = none
    if (client !== undefined) {
      slot = this.#clientSlot(client)
      if (slot === none) return 0
    } else slot = this.#victim(none)
    const entry = slot === none ? none : this.#table.oldest(slot)
    if (entry === none) return 0
    const bytes = basePageSize << this.#frames.orderOf(entry)
    this.#counters[EVICTED]++
    this.#drop(entry, this.#table.poolOf(entry) * poolWords)
    return bytes
  }

  /** Bytes of ephemeral pages. */
  ephemeralBytes(): number {
    let frames = 0
    for (let slot = 0; slot < this.#usedClients; slot++) frames += this.#clients[slot * clientWords + EPHEMERAL_FRAMES]
    return frames * basePageSize
  }

  /** Calls `visit` with each 4 KiB of a pool, or of an object of it, until it answers false. */
  walk(pool: number, visit: PageVisitor, object: ObjectId | undefined): void {
    const table = this.#table
    let entry = object === undefined ? table.firstOfPool(pool) : table.firstOfObject(pool, object)
    while (entry !== none) {
      const first = table.indexOf(entry)
      const parts = 1 << this.#frames.orderOf(entry)
      for (let part = 0; part < parts; part++) if (!visit(table.objectOf(entry), first + part)) return
      entry = object === undefined ? table.nextOfPool(entry) : table.nextOfObject(entry)
    }
  }

  /** Whether there is a page under a handle of a pool of pages of 4 KiB. */
  has(pool: number, object: ObjectId, index: number): boolean {
    return this.#table.find(pool, object, index) !== none
  }

  /** What a pool has, in pages of 4 KiB. */
  census(pool: number, into: Census): Census {
    into.objects = this.#table.objectsOf(pool)
    into.pages = this.#pools[pool * poolWords + ORDER] === 0 ? this.#table.pagesOf(pool) : this.#countParts(pool)
    return into
  }

  #countParts(pool: number): number {
    let parts = 0
    for (let entry = this.#table.firstOfPool(pool); entry !== none; entry = this.#table.nextOfPool(entry))
      parts += 1 << this.#frames.orderOf(entry)
    return parts
  }

  /** True while chunks or pages are held beyond the limit, or frames can still be made ready. */
  get pending(): boolean {
    return this.#frames.used > this.#allowed() || this.#chunkToEmpty() !== none || this.#behind()
  }

  /** Bytes held now: chunks and metadata. */
  get bytes(): number {
    return this.#chunkBytes() + this.#metadataBytes()
  }

  /** Counters and gauges by name. */
  statistics(): Record<string, number> {
    const all: Record<string, number> = {}
    for (const [i, name] of counterNames.entries()) all[name] = this.#counters[i]
    let ephemeral = 0
    let persistent = 0
    for (let client = 0; client < this.#usedClients; client++) {
      ephemeral += this.#clients[client * clientWords + EPHEMERAL_FRAMES]
      persistent += this.#clients[client * clientWords + PERSISTENT_FRAMES]
    }
    all.pages = this.#table.size
    all.objects = this.#table.objects
    all.frames = this.#frames.used
    all.eph_frames = ephemeral
    all.pers_frames = persistent
    all.chunks = this.#frames.chunks
    all.metadata_bytes = this.#metadataBytes()
    all.bytes = this.bytes
    all.limit_bytes = this.#limit.bytes
    return all
  }

  /** Throws unless the invariants hold; for tests. */
  check(): void {
    this.#frames.check()
    const pages = new Int32Array(this.#maxPools)
    const parts = new Int32Array(this.#maxPools)
    const ephemeral = new Int32Array(this.#maxClients)
    let entries = 0
    for (let chunk = 0; chunk < this.#frames.chunkCount; chunk++) {
      if (!this.#frames.has(chunk)) continue
      const first = chunk << this.memory.chunkShift
      for (let frame = this.#frames.nextUsed(first); frame !== none; ) {
        if (!this.#frames.isLent(frame)) {
          entries++
          const pool = this.#table.poolOf(frame)
          const found = this.#table.find(pool, this.#table.objectOf(frame), this.#table.indexOf(frame))
          if (found !== frame) throw new Error(`frame ${frame} is in use and its handle leads to ${found}`)
          const at = pool * poolWords
          pages[pool]++
          if (this.#frames.orderOf(frame) !== this.#pools[at + ORDER]) parts[pool]++
          if ((this.#pools[at + FLAGS] & PERSISTENT) === 0) ephemeral[this.#pools[at + CLIENT]]++
        }
        const next = frame + (1 << this.#frames.orderOf(frame))
        frame = next >= first + this.#frames.chunkFrames(chunk) ? none : this.#frames.nextUsed(next)
      }
    }
    if (entries !== this.#table.size) throw new Error(`${this.#table.size} handles for ${entries} runs of frames`)
    for (let pool = 0; pool < this.#maxPools; pool++)
      if (pages[pool] !== this.#table.pagesOf(pool) || parts[pool] !== this.#pools[pool * poolWords + PARTS])
        throw new Error(`pool ${pool} counts other pages or parts than it has`)
    for (let client = 0; client < this.#usedClients; client++) {
      let queued = 0
      for (let entry = this.#table.oldest(client); entry !== none; entry = this.#table.newer(entry)) {
        const at = this.#table.poolOf(entry) * poolWords
        if ((this.#pools[at + FLAGS] & PERSISTENT) !== 0 || this.#pools[at + CLIENT] !== client || queued > entries)
          throw new Error(`frame ${entry} is in the queue of client slot ${client}`)
        queued++
      }
      if (queued !== ephemeral[client] || queued !== this.#table.queued(client))
        throw new Error(`client slot ${client} has ${ephemeral[client]} ephemeral pages, ${queued} in its queue`)
    }
    if (this.bytes > this.#limit.maximumBytes)
      throw new Error(`${this.bytes} bytes held, the limit is ${this.#limit.maximumBytes}`)
  }

  /** Finds or makes the place of a page that is to be stored: its frame, `scattered`, or a refusal. */
  #place(pool: number, object: ObjectId, key: number, order: number): number {
    const at = pool * poolWords
    const pools = this.#pools
    const counters = this.#counters
    const poolOrder = pools[at + ORDER]
    counters[PUTS]++
    const entry = this.#table.find(pool, object, key)
    // The page itself, or the page whose first part this is. (In a pool of 4 KiB pages there is nothing else.)
    if (entry !== none && (poolOrder === 0 || this.#frames.orderOf(entry) >= order)) {
      counters[SUCC_PUTS]++
      counters[REPLACED]++
      return entry
    }
    let known = false
    if (poolOrder !== 0) {
      if (order === 0) {
        const whole = this.#wholeOf(pool, object, key, poolOrder)
        if (whole !== none) {
          counters[SUCC_PUTS]++
          counters[REPLACED]++
          return whole + (key & ((1 << poolOrder) - 1))
        }
      } else known = this.#flushParts(pool, object, key, order)
    }
    if ((pools[at + FLAGS] & FROZEN) !== 0 && !known && !this.#scattering) return this.#refuse(PutOutcome.Frozen)
    const frame = this.#allocate(order, pools[at + CLIENT])
    if (frame < 0) return frame
    const entered = this.#enter(frame, pool, at, object, key, order)
    if (entered < 0) {
      this.#frames.free(frame)
      return entered
    }
    counters[SUCC_PUTS]++
    return frame
  }

  /** Enters a run in use under a handle: charges it, tables it, queues it. Its frame, or a refusal. */
  #enter(frame: number, pool: number, at: number, object: ObjectId, key: number, order: number): number {
    const pools = this.#pools
    const client = pools[at + CLIENT]
    const persistent = (pools[at + FLAGS] & PERSISTENT) !== 0
    if (persistent && !this.#accountOf(client).charge(basePageSize << order)) return this.#refuse(PutOutcome.Quota)
    if (!this.#table.insert(frame, pool, object, key)) {
      if (persistent) this.#accountOf(client).release(basePageSize << order)
      return this.#refuse(PutOutcome.NoMemory)
    }
    const clientAt = client * clientWords + (persistent ? PERSISTENT_FRAMES : EPHEMERAL_FRAMES)
    this.#clients[clientAt] = this.#clients[clientAt] + (1 << order)
    if (!persistent) this.#table.append(client, frame)
    if (order !== pools[at + ORDER]) pools[at + PARTS] = pools[at + PARTS] + 1
    return frame
  }

  /** Undoes `#enter`: the run stays in use and belongs to nobody. */
  #leave(entry: number, at: number): void {
    const pools = this.#pools
    const order = this.#frames.orderOf(entry)
    const client = pools[at + CLIENT]
    if ((pools[at + FLAGS] & PERSISTENT) !== 0) {
      this.#accountOf(client).release(basePageSize << order)
      this.#clients[client * clientWords + PERSISTENT_FRAMES] -= 1 << order
    } else {
      this.#table.unlink(client, entry)
      this.#clients[client * clientWords + EPHEMERAL_FRAMES] -= 1 << order
    }
    if (order !== pools[at + ORDER]) pools[at + PARTS] = pools[at + PARTS] - 1
    this.#table.remove(entry)
  }

  #drop(entry: number, at: number): void {
    this.#leave(entry, at)
    this.#frames.free(entry)
  }

  /** The run that holds the whole page around `key`, or `none`. */
  #wholeOf(pool: number, object: ObjectId, key: number, poolOrder: number): number {
    // Keys are unsigned 32-bit numbers, so no bit operation on them.
    const head = key - (key % (1 << poolOrder))
    const entry = this.#table.find(pool, object, head)
    return entry !== none && this.#frames.orderOf(entry) === poolOrder ? entry : none
  }

  /** Where a page or part lies: its frame, `scattered` when all of its parts are there one by one, or `none`. */
  #locate(pool: number, object: ObjectId, key: number, order: number): number {
    const entry = this.#table.find(pool, object, key)
    const poolOrder = this.#pools[pool * poolWords + ORDER]
    if (poolOrder === 0) return entry
    if (entry !== none && this.#frames.orderOf(entry) >= order) return entry
    if (order === 0) {
      const whole = this.#wholeOf(pool, object, key, poolOrder)
      return whole === none ? none : whole + (key % (1 << poolOrder))
    }
    if (entry === none || this.#pools[pool * poolWords + PARTS] < 1 << order) return none
    for (let part = 1; part < 1 << order; part++) if (this.#table.find(pool, object, key + part) === none) return none
    return scattered
  }

  #gather(pool: number, object: ObjectId, key: number, order: number, target: Uint8Array, at: number): void {
    for (let part = 0; part < 1 << order; part++)
      this.#frames.copyOut(
        this.#table.find(pool, object, key + part),
        0,
        target,
        at + part * basePageSize,
        basePageSize,
      )
  }

  /** What a hit does: nothing (persistent), refresh (shared), or take the page away (private ephemeral). */
  #afterGet(pool: number, object: ObjectId, key: number, order: number, frame: number): void {
    const at = pool * poolWords
    const flags = this.#pools[at + FLAGS]
    if ((flags & PERSISTENT) !== 0) return
    const poolOrder = this.#pools[at + ORDER]
    if ((flags & SHARED) !== 0) {
      if (frame === scattered) {
        for (let part = 0; part < 1 << order; part++) this.#refresh(this.#table.find(pool, object, key + part), at)
      } else this.#refresh(order === poolOrder ? frame : this.#headOf(pool, object, key, poolOrder, frame), at)
      return
    }
    if (frame === scattered) this.#flushParts(pool, object, key, order)
    else if (order === poolOrder) this.#drop(frame, at)
    else this.#flushPart(pool, object, key, this.#table.find(pool, object, key))
  }

  /** The entry that holds a part: the whole page's, or the part's own. */
  #headOf(pool: number, object: ObjectId, key: number, poolOrder: number, frame: number): number {
    const whole = this.#wholeOf(pool, object, key, poolOrder)
    return whole === none ? frame : whole
  }

  #refresh(entry: number, at: number): void {
    const client = this.#pools[at + CLIENT]
    this.#table.unlink(client, entry)
    this.#table.append(client, entry)
  }

  /** Removes one part of a larger page, which is split if it is whole. `entry` is what was found under `key`. */
  #flushPart(pool: number, object: ObjectId, key: number, entry: number): boolean {
    const at = pool * poolWords
    const poolOrder = this.#pools[at + ORDER]
    const whole = this.#wholeOf(pool, object, key, poolOrder)
    if (whole !== none) {
      this.#split(whole, pool, at)
      this.#drop(whole + (key % (1 << poolOrder)), at)
      return true
    }
    if (entry === none) return false
    this.#drop(entry, at)
    return true
  }

  /** Removes all single parts of a page; whether there was one. */
  #flushParts(pool: number, object: ObjectId, key: number, order: number): boolean {
    const at = pool * poolWords
    if (this.#pools[at + PARTS] === 0) return false
    let removed = false
    for (let part = 0; part < 1 << order; part++) {
      const entry = this.#table.find(pool, object, key + part)
      if (entry === none) continue
      this.#drop(entry, at)
      removed = true
    }
    return removed
  }

  /** Turns a whole page into single parts, in place. */
  #split(entry: number, pool: number, at: number): void {
    const count = 1 << this.#frames.orderOf(entry)
    const object = this.#table.objectOf(entry)
    const key = this.#table.indexOf(entry)
    const client = this.#pools[at + CLIENT]
    const persistent = (this.#pools[at + FLAGS] & PERSISTENT) !== 0
    this.#frames.shatter(entry)
    for (let part = 1; part < count; part++) {
      // There are as many entries as frames; only handles made to collide could find no room.
      if (!this.#table.insert(entry + part, pool, object, key + part))
        throw new TmemError('TMEM_BROKEN', `a page of ${count} parts could not be split: handles collide`, {
          layer: 'memory',
          handle: `object ${object} index ${key}`,
        })
      if (!persistent) this.#table.append(client, entry + part)
    }
    this.#pools[at + PARTS] += count
  }

  /** Stores a large page in single frames, because no run is long enough. */
  #putScattered(
    pool: number,
    object: ObjectId,
    key: number,
    order: number,
    source: Uint8Array,
    at: number,
  ): PutOutcome {
    for (let part = 0; part < 1 << order; part++) {
      // Whether the pool is frozen was asked for the whole page.
      this.#scattering = true
      const frame = this.#place(pool, object, key + part, 0)
      this.#scattering = false
      if (frame < 0) {
        this.#flushParts(pool, object, key, order)
        return -frame as PutOutcome
      }
      this.#frames.copyIn(frame, source, at + part * basePageSize, basePageSize)
    }
    return PutOutcome.Stored
  }

  /** A run of 2^order frames, evicting ephemeral pages where that helps; `scattered`, or a refusal. */
  #allocate(order: number, client: number): number {
    if (order === 0 && this.#batchLeft > 1) {
      if (this.#runNext === this.#runEnd) this.#startRun()
      if (this.#runNext < this.#runEnd) return this.#runNext++
    }
    const count = 1 << order
    const frames = this.#frames
    let refusal: PutOutcome = PutOutcome.NoMemory
    for (let evictions = count + spareEvictions; ; evictions--) {
      if (frames.used + count <= this.#allowed()) {
        const frame = frames.allocate(order)
        if (frame !== none) return frame
        const chunk = this.#fixed ? none : frames.absentChunk()
        if (chunk !== none) {
          if (this.#grow(chunk)) {
            evictions++
            continue
          }
          refusal = PutOutcome.AllocationFailed
        } else if (order !== 0) return scattered
      }
      if (evictions === 0 || !this.#evict(client)) return this.#refuse(refusal)
    }
  }

  /**
   * Takes a run for the new pages of a batch, where there is a long one: pages that come together lie side by side, are
   * copied as one, and leave together as one run again.
   */
  #startRun(): void {
    const frames = this.#frames
    const order = Math.min(31 - Math.clz32(this.#batchLeft), this.memory.chunkShift)
    if (frames.used + (1 << order) > this.#allowed()) return
    const run = frames.allocate(order)
    if (run === none) return
    frames.shatter(run)
    this.#runNext = run
    this.#runEnd = run + (1 << order)
  }

  /** Makes a chunk present; false when the allocator has nothing. */
  #grow(chunk: number): boolean {
    const memory = this.#allocator.allocate(this.#frames.chunkFrames(chunk) * basePageSize, 'memory.chunk')
    if (memory === undefined) return false
    this.#frames.addChunk(chunk, memory)
    this.#touched = Math.min(this.#touched, chunk << this.memory.chunkShift)
    return true
  }

  /** Frames that may be in use under the limit of this moment. */
  #allowed(): number {
    const bytes = this.#limit.bytes
    if (bytes !== this.#seenLimit) {
      this.#seenLimit = bytes
      // The metadata is there for the maximum, whatever the limit is now.
      const spent = this.#limit.maximumBytes - this.capacity * basePageSize
      this.#allowedFrames = Math.max(0, Math.min(this.capacity, Math.floor((bytes - spent) / basePageSize)))
    }
    return this.#allowedFrames
  }

  /** Evicts one ephemeral page; false when there is none. `client` is the slot that asks, or `none`. */
  #evict(client: number): boolean {
    const victim = this.#victim(client)
    if (victim === none) return false
    const entry = this.#table.oldest(victim)
    const at = this.#table.poolOf(entry) * poolWords
    this.#counters[EVICTED]++
    this.#drop(entry, at)
    return true
  }

  /** Whose oldest page goes: the asking client's if it is over its quota, else that of the most pages per weight. */
  #victim(client: number): number {
    const clients = this.#clients
    let total = 0
    let weights = 0
    let victim = none
    let most = 0
    for (let slot = 0; slot < this.#usedClients; slot++) {
      const pages = clients[slot * clientWords + EPHEMERAL_FRAMES]
      if (pages === 0) continue
      const weight = this.#accountOf(slot).weight
      total += pages
      weights += weight
      const share = pages / (weight === 0 ? 1 : weight)
      if (share > most) {
        most = share
        victim = slot
      }
    }
    if (client === none || weights === 0) return victim
    const own = clients[client * clientWords + EPHEMERAL_FRAMES]
    const weight = this.#accountOf(client).weight
    if (own !== 0 && weight !== 0 && own / total > weight / weights) return client
    return victim
  }

  /** Empties and gives back chunks beyond the limit, at most `budget` pages moved. */
  #compact(budget: number): number {
    const frames = this.#frames
    let moved = 0
    for (let chunk = this.#chunkToEmpty(); chunk !== none; chunk = this.#chunkToEmpty()) {
      frames.fence(chunk)
      const first = chunk << this.memory.chunkShift
      let stuck = false
      for (let frame = frames.nextUsed(first); frame !== none && !stuck; frame = frames.nextUsed(first)) {
        const order = frames.orderOf(frame)
        if (moved === budget || frames.isLent(frame)) stuck = true
        else {
          const to = frames.allocate(order)
          if (to === none) {
            // The free frames elsewhere are enough, but in shorter runs: the page goes on in parts.
            const pool = this.#table.poolOf(frame)
            if (order === 0) stuck = true
            else this.#split(frame, pool, pool * poolWords)
          } else {
            this.#moveRun(frame, to, order)
            frames.freeFenced(frame)
            moved++
          }
        }
      }
      frames.unfence(chunk)
      if (stuck) break
      this.#dropChunk(chunk)
    }
    return moved
  }

  #dropChunk(chunk: number): void {
    const memory = this.#frames.dropChunk(chunk)
    this.#allocator.free?.(memory, 'memory.chunk')
  }

  /**
   * The chunk to give back: the emptiest, when there are bytes beyond the limit and its pages fit elsewhere; or `none`.
   */
  #chunkToEmpty(): number {
    if (this.#fixed || this.bytes <= this.#limit.bytes) return none
    const chunk = this.#emptiestChunk()
    return chunk !== none && this.#fitsElsewhere(chunk) ? chunk : none
  }

  /** Whether the other chunks have as many free frames as this one has in use. */
  #fitsElsewhere(chunk: number): boolean {
    const frames = this.#frames
    let free = 0
    for (let other = 0; other < frames.chunkCount; other++)
      if (other !== chunk && frames.has(other)) free += frames.chunkFrames(other) - frames.chunkUsed(other)
    return free >= frames.chunkUsed(chunk)
  }

  #moveRun(from: number, to: number, order: number): void {
    const at = this.#table.poolOf(from) * poolWords
    const persistent = (this.#pools[at + FLAGS] & PERSISTENT) !== 0
    this.#frames.copyFrame(from, to, 1 << order)
    this.#table.move(from, to, persistent ? none : this.#pools[at + CLIENT])
    this.#counters[MOVED]++
  }

  #emptiestChunk(): number {
    let emptiest = none
    for (let chunk = 0; chunk < this.#frames.chunkCount; chunk++)
      if (
        this.#frames.has(chunk) &&
        (emptiest === none || this.#frames.chunkUsed(chunk) < this.#frames.chunkUsed(emptiest))
      )
        emptiest = chunk
    return emptiest
  }

  /**
   * Has the operating system give real memory to frames before they are needed (its zeroing costs more than the copy).
   */
  #makeReady(budget: number): number {
    let done = 0
    for (; done < budget && this.#behind(); done++) {
      const chunk = this.#touched >>> this.memory.chunkShift
      if (!this.#frames.has(chunk)) {
        // A chunk beyond the limit would be given back by the next tick, and so on for ever.
        if (this.bytes + this.#frames.chunkFrames(chunk) * basePageSize > this.#limit.bytes) break
        if (!this.#grow(chunk)) break
      }
      this.#frames.touch(this.#touched++)
    }
    return done
  }

  /** Whether frames in use come near to those that were never touched. */
  #behind(): boolean {
    return this.#touched < Math.min(this.#allowed(), this.#frames.used + readyFrames)
  }

  /** Slots of clients that ever had pools, from the first on: what has to be looked at. */
  get #usedClients(): number {
    return this.#clients[this.#maxClients * clientWords]
  }

  /** The slot of a client that has pools, or `none`. */
  #clientSlot(id: number): number {
    for (let slot = 0; slot < this.#usedClients; slot++) {
      const at = slot * clientWords
      if (this.#clients[at + CLIENT_ID] === id && this.#clients[at + CLIENT_POOLS] !== 0) return slot
    }
    return none
  }

  #openClient(id: number): number {
    const clients = this.#clients
    let free: number = none
    const used = this.#usedClients
    if (used < this.#maxClients) free = used
    for (let slot = used - 1; slot >= 0; slot--) {
      if (clients[slot * clientWords + CLIENT_POOLS] === 0) free = slot
      else if (clients[slot * clientWords + CLIENT_ID] === id) {
        clients[slot * clientWords + CLIENT_POOLS] += 1
        return slot
      }
    }
    if (free === none) return none
    if (free === used) clients[this.#maxClients * clientWords] = used + 1
    clients[free * clientWords + CLIENT_ID] = id
    clients[free * clientWords + CLIENT_POOLS] = 1
    return free
  }

  #accountOf(slot: number): Account {
    const id = this.#clients[slot * clientWords + CLIENT_ID]
    // Another thread may have given the slot to another client meanwhile.
    if (this.#accountClient[slot] !== id) {
      this.#account[slot] = this.#accounts.of(id)
      this.#accountClient[slot] = id
    }
    return this.#account[slot]
  }

  #refuse(reason: PutOutcome): number {
    const counters = this.#counters
    if (reason === PutOutcome.NoMemory) counters[NO_MEMORY]++
    else if (reason === PutOutcome.Quota) counters[QUOTA]++
    else if (reason === PutOutcome.Frozen) counters[REFUSED_FROZEN]++
    else counters[ALLOCATION]++
    return -reason
  }

  #chunkBytes(): number {
    let bytes = 0
    for (let chunk = 0; chunk < this.#frames.chunkCount; chunk++)
      if (this.#frames.has(chunk)) bytes += this.#frames.chunkFrames(chunk) * basePageSize
    return bytes
  }

  #metadataBytes(): number {
    return (
      fixedBytes +
      moreBytes(this.capacity) +
      this.capacity * (HandleTable.bytesPerEntry + 1) +
      this.#table.objectWatermark * HandleTable.bytesPerObject
    )
  }
}

/** A refusal of `Engine.newPool` as such. */
export const refusalOf = (answer: number): PoolRefusal => -answer as PoolRefusal
