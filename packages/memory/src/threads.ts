/**
 * The memory store for several worker threads at once: page engines over shared memory, each behind a lock.
 *
 * The store is cut into shards by a hash of the handle; each shard is a page engine (`engine.ts`) of its own, all of
 * whose state lies in shared memory, and one thread at a time works in it. So operations on one handle are atomic,
 * operations on different handles seldom meet, and there is no order between them but that of the locks.
 *
 * `SharedMemoryStore.create` makes the store; its `handle` can be posted to a worker, which attaches. Every thread
 * opens the pools that it uses by their number. All memory is reserved at the start, since a thread cannot learn of
 * memory that another one allocates; the operating system gives it out as it is touched.
 *
 * A thread that is ended in the middle of an operation leaves its shard locked: end workers between operations.
 */
import {
  type Account,
  type Accounts,
  assertBatch,
  assertClient,
  assertEntries,
  assertIndex,
  assertObject,
  assertPage,
  type Borrower,
  type Budget,
  type ByteAmount,
  ByteLimit,
  basePageSize,
  bytesOf,
  type Capabilities,
  checkedAttributes,
  checkOptions,
  GetOutcome,
  idle,
  type ObjectId,
  type PageBatch,
  type PageStore,
  Pending,
  type Pool,
  type PoolAttributes,
  type PoolRefusal,
  type Progress,
  PutOutcome,
  PoolRefusal as Refusal,
  type StatsNode,
  sharedAllocator,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import type { Engine, EngineMemory } from './engine.ts'
import { orderOf, Engine as PageEngine, refusalOf } from './engine.ts'

/** Settings of a store for several threads. */
export interface SharedMemoryOptions {
  /**
   * Budget in bytes, pages and metadata together, shared out evenly among the shards. (768 KiB of accounts come on top,
   * touched only where there are clients.)
   */
  readonly limitBytes: ByteAmount
  /** Shards: a power of two from 1 to 256 (default: 16, or fewer so that each has at least 4 MiB). */
  readonly shards?: number
}

/** What another thread needs to attach; can be posted to a worker. */
export interface SharedMemoryHandle {
  readonly shardBytes: number
  readonly locks: ArrayBufferLike
  readonly accounts: ArrayBufferLike
  readonly engines: readonly EngineMemory[]
}

const smallestShardBytes = 4 * 1024 * 1024
/** Locks stand a cache line apart. */
const lockWords = 16
const UNLOCKED = 0
const LOCKED = 1
/** Locked, and a thread may be asleep waiting for it. */
const CONTENDED = 2
/**
 * Tries before a thread goes to sleep: longer than the copy of a page, since waking up costs more. With 100 two threads
 * had 1.4 to 1.8 times the throughput of one (16 shards, 100,000 pages), with 2,000 1.8 to 1.9.
 */
const spins = 2000

const clientCount = 65536
const noMaximum = 0x7fffffff

/**
 * Accounts in shared memory, in frames of 4 KiB: charged, maximum (stored as its complement, so that 0 is none),
 * weight.
 */
class SharedAccounts implements Accounts {
  readonly words: Int32Array
  readonly #accounts = new Map<number, SharedAccount>()

  constructor(memory: ArrayBufferLike) {
    this.words = new Int32Array(memory)
  }

  of(client: number): SharedAccount {
    let account = this.#accounts.get(client)
    if (account === undefined) {
      account = new SharedAccount(this.words, client)
      this.#accounts.set(client, account)
    }
    return account
  }
}

class SharedAccount implements Account {
  readonly #words: Int32Array
  readonly #charged: number
  readonly #maximum: number
  readonly #weight: number

  constructor(words: Int32Array, client: number) {
    this.#words = words
    this.#charged = client * 3
    this.#maximum = client * 3 + 1
    this.#weight = client * 3 + 2
  }

  get weight(): number {
    return Atomics.load(this.#words, this.#weight)
  }

  set weight(weight: number) {
    Atomics.store(this.#words, this.#weight, weight)
  }

  get frames(): number {
    return Atomics.load(this.#words, this.#charged)
  }

  set maximum(frames: number) {
    Atomics.store(this.#words, this.#maximum, noMaximum - frames)
  }

  charge(bytes: number): boolean {
    const frames = bytes / basePageSize
    // Never charged beyond the maximum, not even for a moment: another thread's charge that fits would be refused.
    for (;;) {
      const before = Atomics.load(this.#words, this.#charged)
      if (before + frames > noMaximum - Atomics.load(this.#words, this.#maximum)) return false
      if (Atomics.compareExchange(this.#words, this.#charged, before, before + frames) === before) return true
    }
  }

  release(bytes: number): void {
    Atomics.sub(this.#words, this.#charged, bytes / basePageSize)
  }
}

/** One thread's view of a store in shared memory. */
export class SharedMemoryStore implements PageStore {
  readonly name = 'memory'
  readonly capabilities: Capabilities
  /** For `SharedMemoryStore.attach` in another thread. */
  readonly handle: SharedMemoryHandle
  readonly #engines: readonly Engine[]
  readonly #locks: Int32Array
  readonly #accounts: SharedAccounts
  readonly #owner: boolean
  /** The word that says that the owner has closed the store: beside the last lock, under which it changes. */
  readonly #closedAt: number
  #closed = false
  /** The shard that this thread is in, or -1: a borrower that calls the store would wait for itself. */
  #inside = -1
  #nextTick = 0

  private constructor(
    handle: SharedMemoryHandle,
    engines: readonly Engine[],
    accounts: SharedAccounts,
    owner: boolean,
  ) {
    this.handle = handle
    this.#engines = engines
    this.#locks = new Int32Array(handle.locks)
    this.#accounts = accounts
    this.#owner = owner
    this.#closedAt = engines.length * lockWords + 1
    this.capabilities = Object.freeze({
      ephemeral: true,
      persistent: true,
      shared: true,
      minPageSize: basePageSize,
      maxPageSize: PageEngine.largestPageFor(handle.shardBytes),
      deferred: false,
      split: true,
      // How many pages fit one shard depends on how the handles scatter.
      reservedBytes: 0,
    })
  }

  /** Makes a store. Throws `RangeError` for impossible settings, `TmemError` (`TMEM_NO_MEMORY`) without memory. */
  static create(options: SharedMemoryOptions): SharedMemoryStore {
    checkOptions('SharedMemoryStore.create', options, { limitBytes: 'bytes', shards: 'number?' })
    const limitBytes = bytesOf('SharedMemoryStore.create', 'limitBytes', options.limitBytes)
    const { shards = defaultShards(limitBytes) } = options
    if (!Number.isInteger(shards) || shards < 1 || shards > 256 || (shards & (shards - 1)) !== 0)
      throw new RangeError(`shards must be a power of two from 1 to 256, got ${shards}`)
    const reserve = (bytes: number, site: string): ArrayBufferLike => {
      const memory = sharedAllocator.allocate(bytes, site)
      if (memory === undefined)
        throw new TmemError('TMEM_NO_MEMORY', `no shared memory for ${site} (${bytes} bytes)`, { layer: 'memory' })
      return memory
    }
    const locks = reserve((shards + 1) * lockWords * 4, 'memory.locks')
    const accountMemory = reserve(clientCount * 3 * 4, 'memory.accounts')
    const accounts = new SharedAccounts(accountMemory)
    const shardBytes = Math.floor((limitBytes - locks.byteLength) / shards)
    const engines = Array.from({ length: shards }, () =>
      PageEngine.create({ limit: new ByteLimit(shardBytes), allocator: sharedAllocator, accounts, fixed: true }),
    )
    const handle = { shardBytes, locks, accounts: accountMemory, engines: engines.map((engine) => engine.memory) }
    return new SharedMemoryStore(handle, engines, accounts, true)
  }

  /** The same store in another thread. */
  static attach(handle: SharedMemoryHandle): SharedMemoryStore {
    const accounts = new SharedAccounts(handle.accounts)
    const engines = handle.engines.map((memory) =>
      PageEngine.attach(
        { limit: new ByteLimit(handle.shardBytes), allocator: systemAllocator, accounts, fixed: true },
        memory,
      ),
    )
    return new SharedMemoryStore(handle, engines, accounts, false)
  }

  newPool(attributes: PoolAttributes): SharedMemoryPool | PoolRefusal {
    const checked = checkedAttributes(attributes)
    if (this.#closed) return Refusal.Closed
    return this.#exclusively(() => {
      if (this.#locks[this.#closedAt] !== 0) return Refusal.Closed
      if (checked.pageSize > this.capabilities.maxPageSize) return Refusal.BadPageSize
      // First all that could fail in one shard only: the shards count their pools' generations together.
      for (const engine of this.#engines) if (!engine.prepare(checked.pageSize)) return Refusal.NoMemory
      const made = this.#locked(0, () => this.#engines[0].newPool(checked))
      if (made < 0) return refusalOf(made)
      for (let shard = 1; shard < this.#engines.length; shard++) {
        const number = this.#locked(shard, () => this.#engines[shard].newPool(checked))
        if (number !== made)
          throw new TmemError('TMEM_BROKEN', `pool ${made} is pool ${number} in shard ${shard}`, { layer: 'memory' })
      }
      return new SharedMemoryPool(this, this.#engines, made, checked)
    })
  }

  /** A pool that another thread made, by its `number`; `Unsupported` when there is none. */
  openPool(number: number): SharedMemoryPool | PoolRefusal {
    if (this.#closed) return Refusal.Closed
    return this.#exclusively(() => {
      const attributes = this.#engines[0].attributesOf(number)
      return attributes === undefined
        ? Refusal.Unsupported
        : new SharedMemoryPool(this, this.#engines, number, attributes)
    })
  }

  /** Largest persistent memory of a client in this store, in bytes; `Infinity` is none. */
  setMaximum(client: number, bytes: number): void {
    if (!(bytes >= 0)) throw new RangeError(`the maximum must not be negative, got ${bytes}`)
    this.#accounts.of(client).maximum = Math.min(noMaximum, Math.floor(bytes / basePageSize))
  }

  /** Weight of a client, an integer: its share of ephemeral memory relative to the others. */
  setWeight(client: number, weight: number): void {
    if (!(Number.isInteger(weight) && weight >= 0 && weight <= 0x7fffffff))
      throw new RangeError(`a weight must be an integer from 0 to 2147483647, got ${weight}`)
    this.#accounts.of(client).weight = weight
  }

  /** Bytes charged to a client. */
  charged(client: number): number {
    return this.#accounts.of(client).frames * basePageSize
  }

  tick(budget: Budget): Progress {
    if (this.#closed) return idle
    let pages = 0
    let pending = false
    for (let i = 0; i < this.#engines.length && pages < budget.pages; i++) {
      const shard = (this.#nextTick + i) % this.#engines.length
      this.#locked(shard, () => {
        pages += this.#engines[shard].tick(budget.pages - pages)
        pending ||= this.#engines[shard].pending
      })
    }
    this.#nextTick = (this.#nextTick + 1) % this.#engines.length
    return { pages, pending: pending && pages > 0 }
  }

  stats(): StatsNode {
    const counters: Record<string, number> = {}
    for (let shard = 0; shard < this.#engines.length; shard++) {
      const all = this.#locked(shard, () => this.#engines[shard].statistics())
      for (const [name, value] of Object.entries(all)) counters[name] = (counters[name] ?? 0) + value
    }
    counters.shards = this.#engines.length
    return { name: this.name, counters, children: [] }
  }

  /** Ends this thread's use; in the thread that made the store, the end of all pools. */
  async close(): Promise<void> {
    if (this.#closed) return
    this.#assertOutside()
    this.#closed = true
    if (!this.#owner) return
    // Not while another thread is half way through making a pool; and none makes one afterwards.
    this.#exclusively(() => {
      this.#locks[this.#closedAt] = 1
      for (let shard = 0; shard < this.#engines.length; shard++)
        this.#locked(shard, () => this.#engines[shard].destroyAll())
    })
  }

  /** Throws unless the invariants of every shard hold; for tests. */
  check(): void {
    for (let shard = 0; shard < this.#engines.length; shard++) this.#locked(shard, () => this.#engines[shard].check())
  }

  /** Takes the lock of a shard. For the pools of this store. */
  enter(shard: number): void {
    this.#assertOutside()
    const at = shard * lockWords
    for (let i = 0; i < spins; i++)
      if (Atomics.compareExchange(this.#locks, at, UNLOCKED, LOCKED) === UNLOCKED) {
        this.#inside = shard
        return
      }
    while (Atomics.exchange(this.#locks, at, CONTENDED) !== UNLOCKED) Atomics.wait(this.#locks, at, CONTENDED)
    this.#inside = shard
  }

  #assertOutside(): void {
    if (this.#inside !== -1) throw new TypeError('the store was called from inside one of its own callbacks')
  }

  /** Gives the lock of a shard back. For the pools of this store. */
  leave(shard: number): void {
    this.#inside = -1
    const at = shard * lockWords
    if (Atomics.exchange(this.#locks, at, UNLOCKED) === CONTENDED) Atomics.notify(this.#locks, at, 1)
  }

  /** Runs `work` with nobody else making or destroying pools. */
  exclusively(work: () => void): void {
    this.#exclusively(work)
  }

  #exclusively<T>(work: () => T): T {
    const lock = this.#engines.length
    this.enter(lock)
    // Below this lock come those of the shards.
    this.#inside = -1
    try {
      return work()
    } finally {
      this.leave(lock)
    }
  }

  #locked<T>(shard: number, work: () => T): T {
    this.enter(shard)
    try {
      return work()
    } finally {
      this.leave(shard)
    }
  }
}

/** One thread's view of a pool in shared memory. */
export class SharedMemoryPool implements Pool {
  readonly attributes: PoolAttributes
  /** For `SharedMemoryStore.openPool` in another thread. */
  readonly number: number
  readonly #store: SharedMemoryStore
  readonly #engines: readonly Engine[]
  readonly #generation: number
  readonly #pageSize: number
  readonly #order: number
  readonly #frames: number
  /** Frames in a page of the pool, also in a view of its parts: all parts of a page lie in one shard. */
  readonly #wholeFrames: number
  readonly #shardMask: number

  /** Made by the store and by `split`; a view in parts is of the generation of its pool, also when that is gone. */
  constructor(
    store: SharedMemoryStore,
    engines: readonly Engine[],
    number: number,
    attributes: PoolAttributes,
    wholeFrames: number = attributes.pageSize / basePageSize,
    generation: number = engines[0].generation(number),
  ) {
    this.attributes = attributes
    this.number = number
    this.#store = store
    this.#engines = engines
    this.#generation = generation
    this.#pageSize = attributes.pageSize
    this.#order = orderOf(attributes.pageSize)
    this.#frames = 1 << this.#order
    this.#wholeFrames = wholeFrames
    this.#shardMask = engines.length - 1
    for (const engine of engines)
      if (!engine.prepare(wholeFrames * basePageSize))
        throw new TmemError('TMEM_NO_MEMORY', `no memory for a page of ${wholeFrames * basePageSize} bytes`, {
          layer: 'memory',
        })
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.#pageSize)
    assertIndex(index, this.#pageSize)
    const shard = this.#shardOf(object, index)
    this.#store.enter(shard)
    try {
      if (this.#gone(shard)) return PutOutcome.PoolGone
      return this.#engines[shard].put(this.number, object, index * this.#frames, this.#order, page, 0)
    } finally {
      this.#store.leave(shard)
    }
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.#pageSize)
    assertIndex(index, this.#pageSize)
    const shard = this.#shardOf(object, index)
    this.#store.enter(shard)
    try {
      if (this.#gone(shard)) return GetOutcome.Miss
      return this.#engines[shard].get(this.number, object, index * this.#frames, this.#order, into, 0)
    } finally {
      this.#store.leave(shard)
    }
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    return this.get(object, index, into)
  }

  flushPage(object: ObjectId, index: number): void {
    assertIndex(index, this.#pageSize)
    const shard = this.#shardOf(object, index)
    this.#store.enter(shard)
    try {
      if (!this.#gone(shard)) this.#engines[shard].flushPage(this.number, object, index * this.#frames, this.#order)
    } finally {
      this.#store.leave(shard)
    }
  }

  flushObject(object: ObjectId): void {
    this.#everywhere((engine) => engine.flushObject(this.number, object))
  }

  putMany(batch: PageBatch): number {
    assertBatch(batch, this.#pageSize)
    assertEntries(batch)
    const { objects, indexes, offsets, outcomes, bytes, length } = batch
    let stored = 0
    for (let i = 0; i < length; i++) {
      if (outcomes[i] === Pending || outcomes[i] === PutOutcome.Stored) {
        const shard = this.#shardOf(objects[i], indexes[i])
        const key = indexes[i] * this.#frames
        this.#store.enter(shard)
        try {
          if (outcomes[i] === PutOutcome.Stored) {
            if (!this.#gone(shard)) this.#engines[shard].flushPage(this.number, objects[i], key, this.#order)
          } else if (this.#gone(shard)) outcomes[i] = PutOutcome.PoolGone
          else outcomes[i] = this.#engines[shard].put(this.number, objects[i], key, this.#order, bytes, offsets[i])
        } finally {
          this.#store.leave(shard)
        }
      }
      if (outcomes[i] === PutOutcome.Stored) stored++
    }
    return stored
  }

  getMany(batch: PageBatch): number {
    assertBatch(batch, this.#pageSize)
    assertEntries(batch)
    const { objects, indexes, offsets, outcomes, bytes, length } = batch
    let hits = 0
    for (let i = 0; i < length; i++) {
      if (outcomes[i] === Pending) {
        const shard = this.#shardOf(objects[i], indexes[i])
        this.#store.enter(shard)
        try {
          outcomes[i] = this.#gone(shard)
            ? GetOutcome.Miss
            : this.#engines[shard].get(
                this.number,
                objects[i],
                indexes[i] * this.#frames,
                this.#order,
                bytes,
                offsets[i],
              )
        } finally {
          this.#store.leave(shard)
        }
      }
      if (outcomes[i] === GetOutcome.Hit) hits++
    }
    return hits
  }

  flushMany(batch: PageBatch): void {
    assertBatch(batch, this.#pageSize)
    assertEntries(batch)
    for (let i = 0; i < batch.length; i++) this.flushPage(batch.objects[i], batch.indexes[i])
  }

  /** As `Pool.lend`; the page's shard is locked meanwhile, so the borrower must not call the store (`TypeError`). */
  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    assertIndex(index, this.#pageSize)
    const shard = this.#shardOf(object, index)
    this.#store.enter(shard)
    try {
      if (this.#gone(shard)) return GetOutcome.Miss
      return this.#engines[shard].lend(this.number, object, index * this.#frames, this.#order, use)
    } finally {
      this.#store.leave(shard)
    }
  }

  split(): SharedMemoryPool {
    const attributes = Object.freeze({ ...this.attributes, pageSize: basePageSize })
    return new SharedMemoryPool(
      this.#store,
      this.#engines,
      this.number,
      attributes,
      this.#wholeFrames,
      this.#generation,
    )
  }

  handOver(client: number): boolean {
    assertClient(client)
    let done = true
    // Every shard has the same pools, hence the same room for clients.
    this.#store.exclusively(() =>
      this.#everywhere((engine) => {
        done = engine.handOver(this.number, client) && done
      }),
    )
    return done
  }

  freeze(): void {
    this.#everywhere((engine) => engine.freeze(this.number, true))
  }

  thaw(): void {
    this.#everywhere((engine) => engine.freeze(this.number, false))
  }

  destroy(): void {
    this.#store.exclusively(() => this.#everywhere((engine) => engine.destroyPool(this.number)))
  }

  #everywhere(work: (engine: Engine) => void): void {
    for (let shard = 0; shard < this.#engines.length; shard++) {
      this.#store.enter(shard)
      try {
        if (!this.#gone(shard)) work(this.#engines[shard])
      } finally {
        this.#store.leave(shard)
      }
    }
  }

  #gone(shard: number): boolean {
    return this.#engines[shard].generation(this.number) !== this.#generation
  }

  #shardOf(object: ObjectId, index: number): number {
    const low = typeof object === 'number' ? object | 0 : lowWord(object)
    const page = this.#frames === this.#wholeFrames ? index : Math.floor(index / this.#wholeFrames)
    // Other factors than in the handle table, so that one shard's handles still scatter there.
    const mixed = Math.imul(low ^ Math.imul(page, 0x27d4eb2f), 0x165667b1)
    return (mixed ^ (mixed >>> 15)) & this.#shardMask
  }
}

function lowWord(object: bigint): number {
  assertObject(object)
  return Number(BigInt.asIntN(32, object))
}

function defaultShards(limitBytes: number): number {
  let shards = 16
  while (shards > 1 && limitBytes / shards < smallestShardBytes) shards /= 2
  return shards
}
