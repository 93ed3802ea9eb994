/**
 * A cache of entries with keys: values of any size in compressed memory.
 *
 * The store of entries (`entries.ts`) handles bytes; this file has everything that runs code of the user: codecs,
 * loaders, listeners of the channel. Such code runs before or after a change, never within it.
 */

import {
  type Allocator,
  type ByteAmount,
  type ByteLimit,
  checkOptions,
  type Layer,
  type LayerFactory,
  type OptionNames,
  TmemError,
} from '@tmem/core'
import type { Entries, EntryStats } from './entries.ts'
import { KeyHash } from './hash.ts'
import { type Loader, Loads } from './loads.ts'
import { hit, Miss, missNames, outcomeName, stale } from './outcome.ts'
import { OwnEntries } from './own-entries.ts'
import { maxTags, maxWide } from './records.ts'
import { Buffer, channel } from './runtime.ts'
import { checkedHandle, processTime, type SharedCache, SharedEntries } from './shared-entries.ts'
import { type CacheFile, openStack } from './stack.ts'
import { type ValueCodec, ValueWriter } from './values.ts'

/**
 * A key: a string, or bytes. A string and its bytes are different keys. Up to 64 KiB (wide strings: two bytes a unit).
 */
export type CacheKey = string | Uint8Array

/** Settings of a cache. */
export interface CacheOptions<V> {
  /**
   * Memory that it may use: keys, values, tables, everything; at least 2 MiB. Or a `ByteLimit` that can be changed
   * while the cache is in use; what is above a lowered one goes with the next writes, and ticks. Over a `stack`, whose
   * places have limits of their own, it bounds what the cache's own tables may take (default 64 MiB).
   */
  readonly memory?: ByteAmount | ByteLimit
  /** A file beneath the memory: what is not used goes there, and a restart finds it again. */
  readonly file?: CacheFile
  /** A stack instead of the cache's own, as layers or as text. */
  readonly stack?: string | readonly Layer[]
  /** Layers by which that text may name others than `memory`, `zcache` and `spill`. */
  readonly layers?: readonly LayerFactory[]
  /** Gives the memory for tables, window and places (default: the system). */
  readonly allocator?: Allocator
  /**
   * How values become strings or bytes (default: strings and bytes as they are, all else by structured clone). Example:
   * `{ encode: JSON.stringify, decode: JSON.parse }`.
   */
  readonly codec?: ValueCodec<V, string> | ValueCodec<V, Uint8Array>
  /** Milliseconds since 1970 (default: the time of the start, plus a clock that never jumps). */
  readonly clock?: () => number
}

const optionNames: OptionNames<CacheOptions<unknown>> = {
  memory: 'any?',
  file: 'any?',
  stack: 'any?',
  layers: 'list?',
  allocator: 'object?',
  codec: 'object?',
  clock: 'function?',
}

/** What is said of an entry that is set. */
export interface SetOptions {
  /** Milliseconds until it is gone: more than 0 (default: it stays until its room is needed). */
  readonly ttl?: number | undefined
  /** Names by which `deleteByTag` finds it: at most 255. */
  readonly tags?: readonly string[] | undefined
}

const joinNames: OptionNames<JoinOptions<unknown>> = { codec: 'object?', clock: 'function?' }

const setNames: OptionNames<SetOptions> = { ttl: true, tags: true }

/** What is said of a value that is fetched. */
export interface FetchOptions extends SetOptions {
  /**
   * Milliseconds behind the end of its ttl during which the old value is answered at once, while a new one is loaded
   * (default 0). Needs a ttl.
   */
  readonly grace?: number | undefined
  /** Milliseconds that the loader has (default: any time). */
  readonly timeout?: number | undefined
  /**
   * Milliseconds for which it is remembered that there is no value: that the loader gave `undefined` (default: not).
   */
  readonly absentTtl?: number | undefined
  /** Ends the wait of this caller. */
  readonly signal?: AbortSignal | undefined
}

const fetchNames: OptionNames<FetchOptions> = {
  ttl: true,
  tags: true,
  grace: true,
  timeout: true,
  absentTtl: true,
  signal: true,
}

/** What a thread says that joins a shared cache: both as all others do, see `CacheOptions`. */
export interface JoinOptions<V> {
  readonly codec?: CacheOptions<V>['codec']
  readonly clock?: () => number
}

/**
 * Counters, and the content of each place. In a shared cache, only the counters named here are of this thread alone.
 */
export interface CacheStats extends EntryStats {
  readonly hits: number
  /** Values that `fetch` answered although they were not fresh any more. */
  readonly stale: number
  /** Loaders that `fetch` called, and those of them that failed. */
  readonly loads: number
  readonly loadFailures: number
  readonly misses: Readonly<Record<Exclude<(typeof missNames)[number], ''>, number>>
}

/** The message on the channel `tmem:cache` for each operation, while the channel has listeners. */
export interface CacheMessage {
  readonly cache: Cache<never>
  readonly operation: 'get' | 'set' | 'delete' | 'evict'
  /** The key; of an eviction there is none. */
  readonly key: CacheKey | undefined
  /** `hit`, why it is a miss, `stored`, why it was refused, or how many entries went. */
  readonly outcome: string | number
}

/** A cache. See the head of the file. */
export class Cache<V = unknown> {
  readonly #loads: Loads<V> = new Loads()
  readonly #codec: ValueCodec<unknown> | undefined
  readonly #clock: () => number
  readonly #channel = channel('tmem:cache')
  readonly #isTold = (): boolean => this.#channel.hasSubscribers
  readonly #writer: ValueWriter = new ValueWriter()
  /** Those of this thread, until they are shared. */
  #entries: Entries
  #closed: Promise<void> | undefined
  #syncing: Promise<void> = Promise.resolve()
  #hits = 0
  #stale = 0
  readonly #misses: Float64Array = new Float64Array(missNames.length)

  /** Throws `TypeError` or `RangeError` for bad options, `TmemError` if the stack cannot be opened. */
  constructor(options: CacheOptions<V>)
  /** For `join`. */
  constructor(options: JoinOptions<V>, shared: SharedCache)
  constructor(options: CacheOptions<V>, shared?: SharedCache) {
    if (shared === undefined) checkOptions('cache', options as CacheOptions<unknown>, optionNames)
    else checkOptions('Cache.join', options as JoinOptions<unknown>, joinNames)
    const { codec, clock = monotonic(shared?.clockOrigin) } = options
    if (codec !== undefined && (typeof codec.encode !== 'function' || typeof codec.decode !== 'function'))
      throw new TypeError('cache: codec has two functions, encode and decode')
    this.#codec = codec as ValueCodec<unknown> | undefined
    this.#clock = clock
    if (shared !== undefined) {
      this.#entries = SharedEntries.join(shared, clock, this.#isTold)
      return
    }
    const seeds = crypto.getRandomValues(new Int32Array(2))
    this.#entries = new OwnEntries(
      (wake) => openStack(options, wake),
      new KeyHash(seeds[0]!, seeds[1]!),
      clock,
      this.#isTold,
    )
  }

  /**
   * Joins a cache that another thread shares, with its entries in the same memory. Codec and clock belong to this
   * thread; if one thread names them, all threads must name the same.
   *
   * @param shared what `share` has given
   * @throws TypeError when it is something else, `TmemError` (`TMEM_UNSUPPORTED`) in another process
   */
  static join<V = unknown>(shared: SharedCache, options: JoinOptions<V> = {}): Cache<V> {
    return new Cache<V>(options, checkedHandle(shared))
  }

  /**
   * Shares the cache with worker threads: gives what `Cache.join` takes there, which can be posted as often as one
   * likes (`workerData`, `postMessage`). The first call moves what is in the cache to shared memory, which takes as
   * long as copying it; the limit is what it is then, and cannot be changed any more. Each thread that has joined
   * closes its own cache, and the entries stay as long as one of them, or the handle, is there.
   *
   * @throws TypeError for a cache with a file or a stack of its user's, RangeError when it is too small
   */
  share(): SharedCache {
    this.#assertOpen('share')
    const entries = this.#entries
    if (entries instanceof SharedEntries) return entries.handle
    if (!(entries instanceof OwnEntries) || !entries.isOfMemory)
      throw new TypeError('cache.share: a cache with a file or a stack is of one thread; make it of memory alone')
    const shared = SharedEntries.from(entries, this.#clock, this.#isTold)
    this.#entries = shared
    // Nothing is left in it, and memory cannot fail.
    void entries.close()
    return shared.handle
  }

  // ---- Reading ----------------------------------------------------------------------------------------------------

  /**
   * The value of a key; `undefined` if there is none, or if it is in a place that waits (see `load`). The caller owns
   * the value.
   */
  get(key: CacheKey): V | undefined {
    this.#assertOpen('get')
    return this.#answer(key, this.#entries.find('get', key, true))
  }

  /** As `get`, but waits if necessary. Rejects with `TmemError` if the value exists and cannot be read. */
  async load(key: CacheKey): Promise<V | undefined> {
    const own = ownKey(key)
    if (this.#entries.opening !== undefined) await this.#entries.opening
    this.#assertOpen('load')
    const outcome = this.#entries.find('load', own, true)
    if (outcome !== Miss.Deferred) return this.#answer(own, outcome)
    return await this.#entries.bring(own, (brought) => {
      this.#assertOpen('load')
      return this.#answer(own, brought)
    })
  }

  /**
   * The value of a key, which `loader` gives where there is none: one call for a key, however many callers of this
   * thread wait (they get the loader's own value). Behind the end of its ttl, within `grace`, the old value is
   * answered, and loaded anew behind it; if that fails, the next call tries again. Rejects with what the loader throws,
   * with a `TimeoutError`, or with the reason of the signal; and with what `set` throws for a value that cannot be
   * kept. Loaders that would wait for each other, or for themselves, are told so by an `Error`: what a loader fetches
   * counts as waited for.
   */
  async fetch(key: CacheKey, loader: Loader<V>, options: FetchOptions = {}): Promise<V | undefined> {
    const { ttl, grace, absentTtl, tags = noTags, timeout, signal } = checkedFetch(loader, options)
    const own = ownKey(key)
    signal?.throwIfAborted()
    if (this.#entries.opening !== undefined) await this.#entries.opening
    this.#assertOpen('fetch')
    const use = (outcome: number): V | undefined | Promise<V | undefined> => {
      this.#assertOpen('fetch')
      const old = outcome === stale ? this.#value() : this.#answer(own, outcome)
      if (outcome === hit) return old
      let load = this.#loads.of(own)
      if (load === undefined) {
        const version = this.#entries.versionOf('fetch', own)
        const keep = (value: V | undefined): void => {
          if (this.#closed !== undefined) return
          if (value !== undefined) this.#writer.take('cache.fetch', value, this.#codec)
          else if (absentTtl === undefined) return
          else this.#writer.takeAbsent()
          const fresh = value === undefined ? absentTtl! : ttl
          this.#store('fetch', own, value === undefined ? fresh : fresh + grace, fresh, tags, version)
          this.#tellEvicted()
        }
        load = this.#loads.start(own, { loader, tags, timeout, keep })
      }
      if (outcome !== stale) return this.#loads.wait(load, signal)
      this.#stale++
      return old
    }
    const outcome = this.#entries.find('fetch', own, true)
    return await (outcome === Miss.Deferred ? this.#entries.bring(own, use) : use(outcome))
  }

  /**
   * Looks for a key, and lets `use` decide by what is there, in the same turn: nobody else of this thread comes
   * between. It gets the value (`undefined`: there is none) and the milliseconds that are left of its life (Infinity:
   * it has no end), and may set or delete the key. What it returns: at once, or a promise where one has to wait for the
   * value, which rejects as `load` does.
   */
  look<T>(key: CacheKey, use: (value: V | undefined, left: number) => T): T | Promise<T> {
    this.#assertOpen('look')
    const outcome = this.#entries.find('look', key, true)
    if (outcome !== Miss.Deferred) return this.#used(key, outcome, use)
    const own = ownKey(key)
    return this.#entries.bring(own, (brought) => {
      this.#assertOpen('look')
      return this.#used(own, brought, use)
    })
  }

  /** Values of several keys, as `get`. */
  getMany(keys: Iterable<CacheKey>): (V | undefined)[] {
    return Array.from(keys, (key) => this.get(key))
  }

  /**
   * Whether there is a value. Counts neither as use nor as hit. Where one has to wait for it, the hash of the key is
   * believed.
   */
  has(key: CacheKey): boolean {
    this.#assertOpen('has')
    const outcome = this.#entries.find('has', key, false)
    return outcome === Miss.Deferred || (outcome === hit && !this.#entries.isAbsent)
  }

  // ---- Writing ----------------------------------------------------------------------------------------------------

  /**
   * Sets the value of a key. False if there was no room; the key then has no value. Throws `TypeError` for a bad key
   * and for a value that cannot be serialised, `RangeError` for a key of more than 64 KiB, a value of more than 64 MiB
   * and a bad lifetime; then nothing has changed.
   */
  set(key: CacheKey, value: V, options: SetOptions = noOptions): boolean {
    const lifetime = options === noOptions ? Number.POSITIVE_INFINITY : checkedSet(options)
    // Code of the user's runs here, and may use this cache, or the array: nothing is known of either before.
    const tags = options.tags === undefined ? noTags : [...options.tags]
    this.#writer.take('cache.set', value, this.#codec)
    const stored = this.#store('set', key, lifetime, lifetime, tags)
    this.#loads.supersede(key)
    if (this.#channel.hasSubscribers) this.#tell('set', key, stored ? 'stored' : 'refused')
    return stored
  }

  /**
   * Sets several values, given as pairs of key and value. Returns how many were stored; stops at the first that throws.
   */
  setMany(entries: Iterable<readonly [CacheKey, V]>, options: SetOptions = {}): number {
    let stored = 0
    for (const [key, value] of entries) if (this.set(key, value, options)) stored++
    return stored
  }

  /** Deletes a value. Returns whether there was one; for a value in a place that waits, the hash of the key decides. */
  delete(key: CacheKey): boolean {
    this.#assertOpen('delete')
    const outcome = this.#entries.remove('delete', key)
    const isThere = outcome === Miss.Deferred || ((outcome === hit || outcome === stale) && !this.#entries.isAbsent)
    this.#loads.supersede(key)
    if (this.#channel.hasSubscribers) this.#tell('delete', key, isThere ? 'deleted' : 'absent')
    return isThere
  }

  /** Deletes all entries with a tag, in a constant time. Their memory is reused gradually. */
  deleteByTag(tag: string): void {
    if (typeof tag !== 'string') throw new TypeError(`cache.deleteByTag: a tag is a string, got ${typeof tag}`)
    this.#assertOpen('deleteByTag')
    this.#entries.deleteByTag(tag)
    this.#loads.supersedeAll(tag)
  }

  /** Deletes everything. */
  clear(): void {
    this.#assertOpen('clear')
    this.#loads.supersedeAll()
    this.#entries.clear()
  }

  // ---- Upkeep -----------------------------------------------------------------------------------------------------

  /**
   * Does what is left to do, as far as so many pages: lets entries go while the limit was lowered, and the stack's own
   * background work; of a shared cache, what has expired. Whether there is more. To be called when the limit was
   * changed, and nothing is written.
   */
  tick(pages = 256): boolean {
    this.#assertOpen('tick')
    const isMore = this.#entries.tick(pages)
    this.#tellEvicted()
    return isMore
  }

  /**
   * Resolves when what an earlier run has left in the file is known. Before, a cache with a file does nothing (`load`
   * and `fetch` wait for it). Rejects with `TmemError` when the stack fails; what is damaged costs its entries only.
   */
  async ready(): Promise<void> {
    await this.#entries.opening
  }

  /**
   * Writes down what is in memory, and the table of entries: resolves when all that was there at the call is in the
   * file, and would be found after a crash of the process. It is in the file only, then: `load` has it. What is deleted
   * or replaced afterwards is so after a crash only with the next `sync`. Rejects with `TmemError`: `TMEM_UNSUPPORTED`
   * where no place survives, `TMEM_IO` when the file fails.
   */
  sync(): Promise<void> {
    const sync = this.#syncing.then(async () => {
      await this.#entries.opening
      this.#assertOpen('sync')
      await this.#entries.sync()
    })
    this.#syncing = sync.catch(() => undefined)
    return sync
  }

  /** What was counted, and what rests where. */
  stats(): CacheStats {
    const misses = Object.fromEntries(missNames.map((name, n) => [name, this.#misses[n]!]).slice(1))
    return {
      ...this.#entries.stats(),
      hits: this.#hits,
      stale: this.#stale,
      loads: this.#loads.started,
      loadFailures: this.#loads.failed,
      misses: misses as CacheStats['misses'],
    }
  }

  /** Throws an `Error` that names a broken invariant. For tests: it looks at every entry. */
  check(): void {
    this.#entries.check()
  }

  /**
   * Gives everything back; with a file, what is in memory is written down first, as by `sync`. Of a shared cache it is
   * the end of this thread's use. Idempotent.
   */
  close(): Promise<void> {
    if (this.#closed === undefined) {
      this.#closed = this.#close()
      this.#loads.abort(new TmemError('TMEM_CLOSED', 'cache.fetch: the cache is closed', { layer: 'cache' }))
    }
    return this.#closed
  }

  async #close(): Promise<void> {
    await this.#syncing
    await this.#entries.close()
  }

  /** The value that was found. */
  #value(): V | undefined {
    const entries = this.#entries
    if (entries.isAbsent) return undefined
    const { value } = entries
    return (this.#codec === undefined ? value : this.#codec.decode(value as string | Uint8Array)) as V
  }

  #used<T>(key: CacheKey, outcome: number, use: (value: V | undefined, left: number) => T): T {
    const { expiry } = this.#entries
    const value = this.#answer(key, outcome)
    if (value === undefined || expiry === Number.POSITIVE_INFINITY) return use(value, Number.POSITIVE_INFINITY)
    // The clock may have gone on since it was found alive.
    return use(value, Math.max(1, expiry - this.#clock()))
  }

  /** What a get answers, counted and told. */
  #answer(key: CacheKey, outcome: number): V | undefined {
    let value: V | undefined
    if (outcome === hit) {
      this.#hits++
      value = this.#value()
    } else this.#misses[outcome === stale ? Miss.Expired : outcome]!++
    if (this.#channel.hasSubscribers) this.#tell('get', key, outcomeName(outcome))
    return value
  }

  /** Stores what the writer has under a key. `expiry` and `fresh`: milliseconds from now. */
  #store(
    who: string,
    key: CacheKey,
    expiry: number,
    fresh: number,
    tags: readonly string[],
    version?: number,
  ): boolean {
    this.#assertOpen(who)
    const now = fresh === Number.POSITIVE_INFINITY ? 0 : this.#clock()
    if (!(now >= 0 && now <= maxWide))
      throw new RangeError(`cache.${who}: clock gives milliseconds since 1970, below 2^48; it gave ${now}`)
    return this.#entries.store(who, key, this.#writer, { expiry, fresh, tags }, version)
  }

  #assertOpen(who: string): void {
    if (this.#closed !== undefined)
      throw new TmemError('TMEM_CLOSED', `cache.${who}: the cache is closed`, { layer: 'cache' })
    if (this.#entries.opening !== undefined)
      throw new TypeError(`cache.${who}: what is in the file is not known yet: await cache.ready() first`)
  }

  #tellEvicted(): void {
    const count = this.#entries.takeEvicted()
    if (count > 0) this.#channel.publish({ cache: this, operation: 'evict', key: undefined, outcome: count })
  }

  #tell(operation: CacheMessage['operation'], key: CacheKey | undefined, outcome: string | number): void {
    this.#tellEvicted()
    this.#channel.publish({ cache: this, operation, key, outcome })
  }
}

const noTags: readonly string[] = Object.freeze([])
const noOptions: SetOptions = Object.freeze({})

/** A key that stays as it is while somebody waits, whatever its caller does with the bytes. */
const ownKey = (key: CacheKey): CacheKey => {
  if (!(key instanceof Uint8Array)) return key
  return Buffer.isBuffer(key) ? Buffer.from(key) : new Uint8Array(key)
}
/** The lifetime that options say, in milliseconds. Throws `TypeError` or `RangeError`. */
function checkedSet(options: SetOptions): number {
  checkOptions('cache.set', options, setNames)
  const { ttl = Number.POSITIVE_INFINITY, tags } = options
  checkLifetime('cache.set', 'ttl', ttl)
  checkTags('cache.set', tags)
  return ttl
}

function checkedFetch(
  loader: unknown,
  options: FetchOptions,
): FetchOptions & { readonly ttl: number; readonly grace: number } {
  checkOptions('cache.fetch', options, fetchNames)
  const { ttl = Number.POSITIVE_INFINITY, grace, timeout, absentTtl, tags, signal } = options
  if (typeof loader !== 'function') throw new TypeError(`cache.fetch: loader is a function, got ${typeof loader}`)
  checkLifetime('cache.fetch', 'ttl', ttl)
  for (const [name, time] of Object.entries({ grace, timeout, absentTtl }))
    if (time !== undefined) checkLifetime('cache.fetch', name, time)
  if (grace !== undefined && ttl === Number.POSITIVE_INFINITY)
    throw new RangeError('cache.fetch: grace is time behind the end of a ttl, and there is none')
  checkTags('cache.fetch', tags)
  if (signal !== undefined && !(signal instanceof AbortSignal))
    throw new TypeError(`cache.fetch: signal is an AbortSignal, got ${typeof signal}`)
  // They are its caller's, who may use the array again.
  return { ...options, ttl, grace: grace ?? 0, tags: tags === undefined ? undefined : [...tags] }
}

function checkLifetime(who: string, name: string, lifetime: unknown): void {
  if (typeof lifetime !== 'number')
    throw new TypeError(`${who}: ${name} is a number of milliseconds, got ${typeof lifetime}`)
  if (!(lifetime > 0)) throw new RangeError(`${who}: ${name} is a number of milliseconds above 0, got ${lifetime}`)
}

function checkTags(who: string, tags: readonly string[] | undefined): void {
  if (tags === undefined) return
  if (!Array.isArray(tags)) throw new TypeError(`${who}: tags are an array of strings`)
  // Not `some`, which passes over holes.
  for (let n = 0; n < Math.min(tags.length, maxTags); n++)
    if (typeof tags[n] !== 'string') throw new TypeError(`${who}: tags are an array of strings`)
  if (tags.length > maxTags) throw new RangeError(`${who}: an entry has at most ${maxTags} tags, got ${tags.length}`)
}

/**
 * Milliseconds since 1970 that never jump: the time of the system at the start, and what has passed since.
 *
 * @param origin the time at which the clock of the process was 0, as another thread has it: its own start was another
 */
function monotonic(origin?: number): () => number {
  const start = performance.timeOrigin
  const time = origin === undefined ? start : origin + processTime() - performance.now()
  return () => time + performance.now()
}
