/**
 * The store of entries below a cache: in a stack of one thread (`own-entries.ts`), or in memory that threads share
 * (`shared-entries.ts`). A cache adds everything that runs code of the user: codecs, loaders, listeners.
 *
 * Rule: its methods run no code of the user except the clock and `use`.
 */
import type { CacheKey } from './cache.ts'
import type { KeyHash } from './hash.ts'
import { maxKeyBytes, maxWide } from './records.ts'
import { isBytes } from './runtime.ts'
import type { ValueWriter } from './values.ts'

/** What is said of an entry. */
export interface Lifetime {
  /** Milliseconds from now until it is gone, and until it is not fresh any more; Infinity: never. */
  readonly expiry: number
  readonly fresh: number
  readonly tags: readonly string[]
}

/** What is counted of entries, and what rests where. */
export interface EntryStats {
  /** Entries that are known; some of them may have expired, vanished, or been deleted by a tag. */
  readonly entries: number
  readonly sets: number
  /** Sets that found no room, by reason. */
  readonly refused: Readonly<Record<string, number>>
  readonly deletes: number
  /** Entries that went: their room was needed, they had expired, or the stack refused or lost their page. */
  readonly evictions: {
    readonly room: number
    readonly expired: number
    readonly refused: number
    readonly vanished: number
  }
  /** Entries that were written again because they were used. */
  readonly kept: number
  /** Pages of the stack that were brought to the window, and that were written. */
  readonly pagesRead: number
  readonly pagesWritten: number
  /** Bytes: the limit, all memory in use, and of that the table of entries, the tables of pages, and the window. */
  readonly limitBytes: number
  readonly memoryBytes: number
  readonly tableBytes: number
  readonly pageTableBytes: number
  readonly windowBytes: number
  /** No value with more bytes finds room, as the limit is now. */
  readonly largestBytes: number
  /** By place: pages, bytes of them, and memory that the place uses. */
  readonly places: readonly {
    readonly name: string
    readonly pages: number
    readonly bytes: number
    readonly usedBytes: number
  }[]
  /** Of a cache that threads share. */
  readonly shared?: SharedStats
}

/** What threads have in common. */
export interface SharedStats {
  readonly shards: number
  /** Locks that were taken over from a thread that had ended. */
  readonly takenOver: number
  /** Shards that were emptied because a thread ended while it changed them, and entries that were lost with them. */
  readonly dropped: number
  readonly droppedEntries: number
}

/** See the head of the file. `who` is named in errors. */
export interface Entries {
  /**
   * What was found last: its value before the codec, whether it is known that there is none, and the end of its life in
   * milliseconds since 1970 (Infinity: never).
   */
  readonly value: unknown
  readonly isAbsent: boolean
  readonly expiry: number
  /** What an earlier run has left is being read; `undefined`: nothing is waited for. */
  readonly opening: Promise<void> | undefined

  /** Looks for a key: `hit`, `stale` or `Miss`. As use it reads the value, otherwise only whether it is absent. */
  find(who: string, key: CacheKey, isUse: boolean): number
  /** Waits for the page of a key that `find` said is deferred, and looks again: `use` runs while it is still so. */
  bring<T>(key: CacheKey, use: (outcome: number) => T | Promise<T>): Promise<T>
  /** What changes with every write of the key. `undefined`: the caller would know of it. */
  versionOf(who: string, key: CacheKey): number | undefined
  /**
   * Stores what the writer has. False: there was no room, and the key has no value now; or somebody wrote it since it
   * had that version.
   */
  store(who: string, key: CacheKey, writer: ValueWriter, lifetime: Lifetime, version?: number): boolean
  /** Removes a key. What `find` said of it. */
  remove(who: string, key: CacheKey): number
  deleteByTag(tag: string): void
  clear(): void
  /** Does what is left to do, as far as so many pages. Whether there is more. */
  tick(pages: number): boolean
  /** Writes down what is in memory to where it survives. */
  sync(): Promise<void>
  stats(): EntryStats
  /** Entries that went since the last call. */
  takeEvicted(): number
  check(): void
  /** Gives everything back. Called once. */
  close(): Promise<void>
}

/** The hash of a key; `kind` and `length` of `hash` are the key's then. Throws for what is no key. */
export function hashOfKey(hash: KeyHash, who: string, key: CacheKey): number {
  if (typeof key !== 'string' && !isBytes(key))
    throw new TypeError(`cache.${who}: a key is a string or a Uint8Array, got ${key === null ? 'null' : typeof key}`)
  if (key.length <= maxKeyBytes) {
    const sum = hash.of(key)
    if (hash.length <= maxKeyBytes) return sum
  }
  throw new RangeError(`cache.${who}: a key has at most ${maxKeyBytes} bytes, this one has more: hash it`)
}

/** A point in time as it is kept; what lies too far ahead is never. */
export function timeOf(time: number): number {
  return time > maxWide ? Number.POSITIVE_INFINITY : Math.ceil(time)
}
