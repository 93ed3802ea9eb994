/**
 * Entries in memory that worker threads share: shards by the upper bits of the hash, each behind a lock of its own. The
 * thread that gets an entry reads the only copy itself, without a message to another thread.
 *
 * A thread works in one shard at a time, and does not wait there. Only code of this package runs under a lock: keys are
 * hashed, values serialised and the clock read before; values are deserialised and decoded after. A thread that ends in
 * a shard leaves a lock that the next thread takes over (`locks.ts`). If it was changing the shard, the shard is
 * emptied: entries are ephemeral, and a miss is always right.
 *
 * Invariant: the memory in use of each shard stays within its share of the limit.
 */
import { type BlockCodec, sharedAllocator, TmemError } from '@tmem/core'
import { blockCodec } from '@tmem/zcache'
import type { CacheKey } from './cache.ts'
import { type Entries, type EntryStats, hashOfKey, type Lifetime, timeOf } from './entries.ts'
import { KeyHash } from './hash.ts'
import { Locks, lockWords, type ThreadKind, threadKind, threadMark } from './locks.ts'
import { hit, Miss, stale } from './outcome.ts'
import type { OwnEntries } from './own-entries.ts'
import { EntryFacts } from './records.ts'
import { Shard } from './shard.ts'
import { Count, memoryOf, type ShardShape, shapeOf } from './shard-memory.ts'
import { copyRaw, decodeRaw, maxValueBytes, ValueKind, type ValueWriter } from './values.ts'

/** A shared cache as another thread gets it. Nothing in it is meant to be looked at. */
export interface SharedCache {
  readonly type: 'tmem:cache'
  /** Numbers of process and layout: memory of another process, or of another version, is none that could be joined. */
  readonly process: number
  readonly version: number
  readonly seed0: number
  readonly seed1: number
  /** The time of the cache's clock, in milliseconds since 1970, when that of the process was 0. */
  readonly clockOrigin: number
  readonly shape: ShardShape
  readonly threads: ThreadKind
  readonly locks: Int32Array
  readonly shards: readonly ArrayBufferLike[]
}

/** Rises with each change of the layout. */
const version = 1
/** Smallest limit. */
const leastBytes = 2 * 2 ** 20
/** Shards, where each has so much: more than threads that are likely to work at once. */
const usualShards = 16
const usualShardBytes = 4 * 2 ** 20
/** Bytes of a shard at most: what lies in it has to be named. */
const largestShardBytes = 2 ** 30
/** What the codec of this thread works in, and what else is not in shared memory. */
const workspaceBytes = 512 * 1024
/** No end of life, or of freshness. */
const never: number = Number.POSITIVE_INFINITY
/** Segments that a tick looks at for so many pages. */
const pagesPerSegment = 16

/** Milliseconds of a clock that all threads of the process share. */
export const processTime = (): number => Number(process.hrtime.bigint()) / 1e6

/** A handle, if it can be joined here. Throws `TypeError` for what is none, `TmemError` for one of another process. */
export function checkedHandle(handle: SharedCache): SharedCache {
  const given = handle as Partial<SharedCache> | null | undefined
  if (given?.type !== 'tmem:cache' || !(given.locks?.buffer instanceof SharedArrayBuffer))
    throw new TypeError('Cache.join: shared is what cache.share() has given, posted to this thread')
  if (handle.process !== process.pid || handle.version !== version)
    throw new TmemError('TMEM_UNSUPPORTED', 'Cache.join: this is the cache of another process, or of another version', {
      layer: 'cache',
    })
  return handle
}

/** See the head of the file. */
export class SharedEntries implements Entries {
  value: unknown
  isAbsent = false
  expiry: number = never
  readonly opening: undefined = undefined
  readonly handle: SharedCache
  readonly #clock: () => number
  /** Whether anybody wants to know how many entries went. */
  readonly #isTold: () => boolean
  readonly #hash: KeyHash
  readonly #locks: Locks
  readonly #shards: readonly Shard[]
  /** The shard of a hash is what is left of it when so many bits are taken off; 32: there is one. */
  readonly #shift: number
  readonly #facts: EntryFacts = new EntryFacts()
  /** What the clock said last, and writes since then. */
  #now = 0
  #turn = 0
  /** Entries that went, of which nobody was told yet. */
  #went = 0

  private constructor(handle: SharedCache, clock: () => number, isTold: () => boolean) {
    this.handle = handle
    this.#clock = clock
    this.#isTold = isTold
    this.#hash = new KeyHash(handle.seed0, handle.seed1)
    this.#locks = new Locks(handle.locks, threadMark(handle.threads))
    const codec: BlockCodec = blockCodec('lz4')
    this.#shards = handle.shards.map((memory, n) => new Shard(handle.shape, memory, n, this.#locks, codec))
    this.#shift = 32 - Math.log2(handle.shards.length)
  }

  /** Shared entries with those of one thread, which has none afterwards. Throws `RangeError` and `TmemError`. */
  static from(own: OwnEntries, clock: () => number, isTold: () => boolean): SharedEntries {
    const { limitBytes, seeds } = own
    const threads = threadKind()
    if (limitBytes < leastBytes)
      throw new RangeError(`cache.share: memory is at least ${leastBytes} bytes, the limit is ${limitBytes} now`)
    let shards = 2 ** Math.floor(Math.log2(Math.max(1, Math.min(usualShards, limitBytes / usualShardBytes))))
    while (limitBytes / shards > largestShardBytes) shards *= 2
    const shape = shapeOf(Math.floor((limitBytes - workspaceBytes) / shards))
    const reserve = (bytes: number): ArrayBufferLike => {
      const memory = sharedAllocator.allocate(bytes, 'cache.shared')
      if (memory === undefined)
        throw new TmemError('TMEM_NO_MEMORY', `cache.share: no shared memory of ${bytes} bytes`, { layer: 'cache' })
      return memory
    }
    const shared = new SharedEntries(
      {
        type: 'tmem:cache',
        process: process.pid,
        version,
        seed0: seeds[0],
        seed1: seeds[1],
        clockOrigin: clock() - processTime(),
        shape,
        threads,
        locks: new Int32Array(reserve(shards * lockWords * 4)),
        shards: Array.from({ length: shards }, () => reserve(memoryOf(shape))),
      },
      clock,
      isTold,
    )
    for (const shard of shared.#shards) shard.counts[Count.sequence] = own.sequence
    own.handOver((bytes, at, end, hash, expiry, isMain) => {
      const now = clock()
      if (expiry <= now) return
      shared.#in(shared.#shardOf(hash), (shard) => {
        shard.adopt(bytes, at, end, hash, expiry, isMain, now)
      })
    })
    return shared
  }

  /** The entries of a handle that was checked. */
  static join(handle: SharedCache, clock: () => number, isTold: () => boolean): SharedEntries {
    return new SharedEntries(handle, clock, isTold)
  }

  find(who: string, key: CacheKey, isUse: boolean): number {
    const hash = hashOfKey(this.#hash, who, key)
    const { kind, length } = this.#hash
    const number = this.#shardOf(hash)
    let raw: string | Uint8Array | undefined
    let valueKind: ValueKind = ValueKind.Absent
    let expiry = never
    let fresh = never
    let outcome: number
    const shard = this.#enter(number)
    try {
      outcome = shard.find(key, kind, length, hash, isUse)
      if (outcome === hit) {
        const { record } = shard
        ;({ valueKind, expiry, fresh } = record)
        if (isUse) raw = copyRaw(record.bytes, record.valueAt, record.valueLength, valueKind)
      }
    } finally {
      this.#locks.leave(number)
    }
    if (expiry !== never || fresh !== never) {
      const now = this.#clock()
      if (now >= expiry) {
        this.#in(number, () => {
          shard.expire(key, kind, length, hash, now)
        })
        return Miss.Expired
      }
      if (now >= fresh) outcome = stale
    }
    this.isAbsent = valueKind === ValueKind.Absent
    this.expiry = expiry
    if (isUse) this.value = decodeRaw(raw, valueKind)
    return outcome
  }

  /** Nothing is deferred in memory. */
  async bring<T>(key: CacheKey, use: (outcome: number) => T | Promise<T>): Promise<T> {
    return await use(this.find('load', key, true))
  }

  versionOf(who: string, key: CacheKey): number {
    const hash = hashOfKey(this.#hash, who, key)
    return this.#in(this.#shardOf(hash), (shard) => shard.versionOf(hash))
  }

  store(who: string, key: CacheKey, writer: ValueWriter, lifetime: Lifetime, known?: number): boolean {
    const { expiry, fresh, tags } = lifetime
    const facts = this.#facts
    facts.tags = tags.map((tag) => this.#hash.of(tag))
    const hash = hashOfKey(this.#hash, who, key)
    const { kind, length } = this.#hash
    // It is for the order in which entries go, too; for that it need not be asked for each time.
    if (fresh !== never || (this.#turn++ & 15) === 0) this.#now = this.#clock()
    const now = this.#now
    facts.expiry = timeOf(now + expiry)
    facts.fresh = fresh < expiry ? timeOf(now + fresh) : Number.POSITIVE_INFINITY
    const number = this.#shardOf(hash)
    const shard = this.#enter(number)
    try {
      const stored = shard.write(key, kind, length, hash, facts, writer, expiry, now, known)
      this.#noteWent(shard)
      return stored
    } finally {
      this.#locks.leave(number)
    }
  }

  remove(who: string, key: CacheKey): number {
    const hash = hashOfKey(this.#hash, who, key)
    const { kind, length } = this.#hash
    const now = this.#clock()
    return this.#in(this.#shardOf(hash), (shard) => {
      const outcome = shard.find(key, kind, length, hash, false)
      const { valueKind, expiry } = shard.record
      this.isAbsent = valueKind === ValueKind.Absent
      shard.remove(hash, outcome === hit)
      return outcome === hit && now >= expiry ? Miss.Expired : outcome
    })
  }

  /** In one shard after the other: who writes meanwhile writes before or behind it, key by key. */
  deleteByTag(tag: string): void {
    const hash = this.#hash.of(tag)
    this.#inAll((shard) => {
      shard.deleteByTag(hash)
    })
  }

  /** As `deleteByTag`. */
  clear(): void {
    this.#inAll((shard) => {
      shard.clear()
    })
  }

  tick(pages: number): boolean {
    const now = this.#clock()
    let left = Math.ceil(pages / pagesPerSegment)
    let isMore = false
    this.#inAll((shard) => {
      if (left <= 0) return
      left -= shard.tick(left, now)
      this.#noteWent(shard)
      isMore ||= left <= 0
    })
    return isMore
  }

  sync(): Promise<void> {
    return Promise.reject(
      new TmemError('TMEM_UNSUPPORTED', 'cache.sync: no place of this cache survives the process', { layer: 'cache' }),
    )
  }

  stats(): EntryStats {
    const counts = new Float64Array(Count.count)
    const sum = { entries: 0, used: 0, table: 0, window: 0, touched: 0, pages: 0, taken: 0, takenOver: 0 }
    this.#inAll((shard, number) => {
      for (let n = 0; n < counts.length; n++) counts[n]! += shard.counts[n]!
      sum.entries += shard.entries
      sum.used += shard.usedBytes
      sum.table += shard.tableBytes
      sum.window += shard.windowBytes
      sum.touched += shard.touchedBytes
      sum.pages += shard.pages
      sum.taken += shard.takenBytes
      sum.takenOver += this.#locks.takenOver(number)
    })
    const { shape, shards } = this.handle
    const refused: Record<string, number> = {}
    if (counts[Count.noRoom] !== 0) refused['no room'] = counts[Count.noRoom]!
    if (counts[Count.tooLarge] !== 0) refused['too large'] = counts[Count.tooLarge]!
    return {
      entries: sum.entries,
      sets: counts[Count.sets]!,
      refused,
      deletes: counts[Count.deletes]!,
      evictions: {
        room: counts[Count.room]!,
        expired: counts[Count.expired]!,
        refused: counts[Count.refused]!,
        vanished: 0,
      },
      kept: counts[Count.kept]!,
      pagesRead: counts[Count.pagesRead]!,
      pagesWritten: counts[Count.pagesWritten]!,
      limitBytes: shape.limitBytes * shards.length + workspaceBytes,
      memoryBytes: sum.used + workspaceBytes,
      tableBytes: sum.table,
      pageTableBytes: sum.used - sum.table - sum.window - sum.touched,
      windowBytes: sum.window,
      largestBytes: Math.min(maxValueBytes, Math.floor(shape.limitBytes / 2)),
      places: [{ name: 'shared', pages: sum.pages, bytes: sum.taken, usedBytes: sum.touched }],
      shared: {
        shards: shards.length,
        takenOver: sum.takenOver,
        dropped: counts[Count.dropped]!,
        droppedEntries: counts[Count.droppedEntries]!,
      },
    }
  }

  takeEvicted(): number {
    const went = this.#went
    this.#went = 0
    return went
  }

  check(): void {
    this.#inAll((shard) => {
      shard.check((record) => this.#hash.bytes(record.bytes, record.keyAt, record.keyLength, record.keyKind))
    })
  }

  close(): Promise<void> {
    this.#locks.close()
    return Promise.resolve()
  }

  #noteWent(shard: Shard): void {
    const went = shard.takeWent()
    if (went > 0 && this.#isTold()) this.#went += went
  }

  #shardOf(hash: number): number {
    return this.#shift === 32 ? 0 : hash >>> this.#shift
  }

  /** Takes the lock of a shard, which is whole then. */
  #enter(number: number): Shard {
    const shard = this.#shards[number]!
    if (this.#locks.enter(number)) shard.drop()
    return shard
  }

  #in<T>(number: number, work: (shard: Shard, number: number) => T): T {
    const shard = this.#enter(number)
    try {
      return work(shard, number)
    } finally {
      this.#locks.leave(number)
    }
  }

  #inAll(work: (shard: Shard, number: number) => void): void {
    for (let number = 0; number < this.#shards.length; number++) this.#in(number, work)
  }
}
