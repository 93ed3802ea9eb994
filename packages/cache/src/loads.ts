/**
 * Values that are being loaded: one loader for a key, however many callers wait for it.
 *
 * A load is told by its signal to end when its time is over, when every caller that waited for it has gone, and when
 * the cache is closed. What it gives is kept only if nobody set or deleted the key meanwhile: what they did is newer.
 *
 * Invariant: a load is in `#running` until its loader has ended, or is not waited for any more; in `#under` only as
 * long as it is the one of its key.
 */
import type { CacheKey } from './cache.ts'
import { Buffer } from './runtime.ts'

/** What a loader is told. */
export interface LoadContext {
  /** Aborts when nobody needs the value any more. */
  readonly signal: AbortSignal
}

/** Gets the value of a key from where it comes from. `undefined`: there is none. */
export type Loader<V> = (key: CacheKey, context: LoadContext) => V | undefined | PromiseLike<V | undefined>

/** A load that is under way. */
export interface Load<V> {
  readonly value: Promise<V | undefined>
  /** Nobody has set or deleted the key since it began. */
  isCurrent: boolean
  readonly tags: readonly string[]
  readonly end: AbortController
  /** Callers that wait. One that nobody waited for ever (a stale value was good enough) goes on. */
  waiting: number
}

/** What is made of a load. */
export interface LoadPlan<V> {
  readonly loader: Loader<V>
  readonly tags: readonly string[]
  /** Milliseconds. */
  readonly timeout: number | undefined
  /** Keeps what was loaded, if that is still wanted. */
  readonly keep: (value: V | undefined) => void
}

export class Loads<V> {
  /** Loaders that were called, and those of them that failed. */
  started = 0
  failed = 0
  readonly #under: Map<string, Load<V>> = new Map()
  readonly #running: Set<Load<V>> = new Set()
  /** The load whose loader has been called, and has not come back. */
  #calling: Load<V> | undefined

  /** The load of a key that is under way. */
  of(key: CacheKey): Load<V> | undefined {
    return this.#under.size === 0 ? undefined : this.#under.get(nameOf(key))
  }

  /** Begins to load the value of a key, which nobody does yet. */
  start(key: CacheKey, { loader, tags, timeout, keep }: LoadPlan<V>): Load<V> {
    const end = new AbortController()
    const name = nameOf(key)
    this.started++
    // Who comes now begins another one.
    end.signal.addEventListener('abort', () => {
      this.#leave(name, load)
    })
    const timer =
      timeout === undefined
        ? undefined
        : setTimeout(
            () => {
              end.abort(new DOMException(`cache.fetch: the loader took more than ${timeout} ms`, 'TimeoutError'))
            },
            Math.min(timeout, maxTimer),
          )
    const run = async (): Promise<V | undefined> => {
      try {
        end.signal.throwIfAborted()
        // A loader that does not look at its signal is not waited for.
        const value = await until(
          end.signal,
          Promise.resolve(this.#call(load, () => loader(key, { signal: end.signal }))),
        )
        this.#leave(name, load)
        if (load.isCurrent) keep(value)
        return value
      } catch (error) {
        this.failed++
        throw error
      } finally {
        clearTimeout(timer)
        this.#running.delete(load)
        this.#leave(name, load)
      }
    }
    const load = { isCurrent: true, tags, end, waiting: 0 } as { -readonly [Name in keyof Load<V>]: Load<V>[Name] }
    this.#under.set(name, load)
    this.#running.add(load)
    // The loader runs when everything is in place, also one that fails or comes back here at once.
    load.value = Promise.resolve().then(run)
    // It is counted; who waits is told.
    load.value.catch(() => undefined)
    return load
  }

  /** Waits for a load, until the caller's own signal. Rejects when the load would wait for itself, as far as is known. */
  async wait(load: Load<V>, signal: AbortSignal | undefined): Promise<V | undefined> {
    if (load === this.#calling || load.end.signal === signal)
      throw new Error('cache.fetch: a loader fetches its own key, and would wait for itself: get it from elsewhere')
    load.waiting++
    try {
      return await (signal === undefined ? load.value : until(signal, load.value))
    } finally {
      load.waiting--
      if (load.waiting === 0 && signal?.aborted === true) load.end.abort(signal.reason)
    }
  }

  /** The key was set or deleted. */
  supersede(key: CacheKey): void {
    if (this.#under.size === 0) return
    const name = nameOf(key)
    const load = this.#under.get(name)
    if (load === undefined) return
    load.isCurrent = false
    this.#leave(name, load)
  }

  /** All keys were deleted, or all with a tag. */
  supersedeAll(tag?: string): void {
    for (const [name, load] of this.#under) {
      if (tag !== undefined && !load.tags.includes(tag)) continue
      load.isCurrent = false
      this.#leave(name, load)
    }
  }

  /** Ends all. */
  abort(reason: Error): void {
    for (const load of this.#running) {
      load.isCurrent = false
      load.end.abort(reason)
    }
  }

  #call<T>(load: Load<V>, loader: () => T): T {
    this.#calling = load
    try {
      return loader()
    } finally {
      this.#calling = undefined
    }
  }

  /** A load is not that of its key any more: whoever comes now begins another one. */
  #leave(name: string, load: Load<V>): void {
    if (this.#under.get(name) === load) this.#under.delete(name)
  }
}

/** Longest time that a timer can be set for. */
const maxTimer = 2 ** 31 - 1

const nameOf = (key: CacheKey): string =>
  typeof key === 'string' ? `s${key}` : `b${Buffer.from(key.buffer, key.byteOffset, key.length).toString('latin1')}`

/** What the promise comes to; rejects with the signal's reason when that comes first. */
function until<T>(signal: AbortSignal, promise: Promise<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    const abort = (): void => {
      reject(signal.reason as Error)
    }
    if (signal.aborted) abort()
    else signal.addEventListener('abort', abort, { once: true })
    promise.then(resolve, reject).finally(() => {
      signal.removeEventListener('abort', abort)
    })
  })
}
