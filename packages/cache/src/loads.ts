/**
 * Running loads: one loader for each key, however many callers wait for its value.
 *
 * The signal of a load is raised when its time is over, when all its callers have gone, and when the cache is closed.
 * Its value is kept only if nobody set or deleted the key meanwhile, as those calls are newer.
 *
 * A loader that fetches other keys waits for their loads. A fetch that would close a circle of such waits, of any
 * length, rejects at once. Every fetch in a loader counts as a wait, as the cache cannot know whether it is awaited.
 *
 * Invariant: a load is in `#running` until its loader has ended or nobody waits for it any more, and in `#under` only
 * as long as it is the load of its key. `waitsFor` of a load holds the loads for which its loader waits now.
 */
import type { CacheKey } from './cache.ts'
import { Buffer, type Context, context } from './runtime.ts'

/** What a loader is told. */
export interface LoadContext {
  /** Aborts when nobody needs the value any more. */
  readonly signal: AbortSignal
}

/** Gets the value of a key from where it comes from. `undefined`: there is none. */
export type Loader<V> = (key: CacheKey, context: LoadContext) => V | undefined | PromiseLike<V | undefined>

/** What a load is for others that wait. */
type Waiting = Pick<Load<unknown>, 'key' | 'hasEnded' | 'waitsFor'>

/** The load in whose loader the program is: a loader may fetch from several caches. */
const loading: Context<Waiting> = context<Waiting>()

/** A load that is under way. */
export interface Load<V> {
  readonly value: Promise<V | undefined>
  /** Nobody has set or deleted the key since it began. */
  isCurrent: boolean
  readonly tags: readonly string[]
  readonly end: AbortController
  /** Its loader has ended, or is not waited for any more. */
  hasEnded: boolean
  /** Name of its key, for messages. */
  readonly key: CacheKey
  readonly waitsFor: Map<Waiting, number>
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
          Promise.resolve(loading.run(load, () => loader(key, { signal: end.signal }))),
        )
        this.#leave(name, load)
        if (load.isCurrent) keep(value)
        return value
      } catch (error) {
        this.failed++
        throw error
      } finally {
        clearTimeout(timer)
        load.hasEnded = true
        this.#running.delete(load)
        this.#leave(name, load)
      }
    }
    const load = { isCurrent: true, hasEnded: false, key, tags, end, waitsFor: new Map(), waiting: 0 } as {
      -readonly [Name in keyof Load<V>]: Load<V>[Name]
    }
    this.#under.set(name, load)
    this.#running.add(load)
    // The loader runs when everything is in place, also one that fails or comes back here at once.
    load.value = Promise.resolve().then(run)
    // It is counted; who waits is told.
    load.value.catch(() => undefined)
    return load
  }

  /** Waits for a load, until the caller's own signal. Rejects when a loader would wait for itself. */
  async wait(load: Load<V>, signal: AbortSignal | undefined): Promise<V | undefined> {
    const store = loading.getStore()
    // What a loader has left behind waits for nobody's sake.
    const caller = store?.hasEnded === false ? store : undefined
    const circle = load.end.signal === signal ? [load] : caller === undefined ? undefined : wayTo(caller, load)
    if (circle !== undefined)
      throw new Error(`cache.fetch: ${textOf(circle)}, and would wait for itself: get it elsewhere`)
    load.waiting++
    caller?.waitsFor.set(load, (caller.waitsFor.get(load) ?? 0) + 1)
    try {
      return await (signal === undefined ? load.value : until(signal, load.value))
    } finally {
      load.waiting--
      if (caller !== undefined) {
        const times = caller.waitsFor.get(load)! - 1
        if (times === 0) caller.waitsFor.delete(load)
        else caller.waitsFor.set(load, times)
      }
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

  /** A load is not that of its key any more: whoever comes now begins another one. */
  #leave(name: string, load: Load<V>): void {
    if (this.#under.get(name) === load) this.#under.delete(name)
  }
}

/** The loads from one to another, by which it waits for that one; `undefined`: it does not. */
function wayTo(target: Waiting, from: Waiting): readonly Waiting[] | undefined {
  // A map goes on with what is added to it.
  const before = new Map<Waiting, Waiting | undefined>([[from, undefined]])
  for (const at of before.keys()) {
    if (at === target) {
      const way: Waiting[] = []
      for (let one: Waiting | undefined = at; one !== undefined; one = before.get(one)) way.unshift(one)
      return way
    }
    for (const next of at.waitsFor.keys()) if (!before.has(next)) before.set(next, at)
  }
  return undefined
}

/** What loaders do, each of which fetches the next one's key, and the last one that of the first. */
function textOf(circle: readonly Waiting[]): string {
  const [first, ...others] = circle.map(({ key }) => said(key))
  if (others.length === 0) return `the loader of ${first} fetches its own key`
  return `the loader of ${others.at(-1)} fetches ${[first, ...others].join(', whose loader fetches ')}`
}

/** A key in a message. */
const said = (key: CacheKey): string => {
  const text = typeof key === 'string' ? JSON.stringify(key) : `the bytes ${Buffer.from(key).toString('hex')}`
  return text.length <= 60 ? text : `${text.slice(0, 57)}...`
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
