/**
 * A driver for unstorage that stores items in a cache: `createStorage({ driver: tmemDriver({ cache }) })`.
 *
 * Keys of unstorage have parts between colons; a base is the first few parts. The driver tags an item with each of its
 * bases, so that `clear` can delete a base without its keys, which a cache does not list.
 */
import { checkOptions, TmemError } from '@tmem/core'
import type { Cache } from './cache.ts'
import { maxTags } from './records.ts'

/** Settings of a driver. */
export interface TmemDriverOptions {
  /** One without a codec; it stays its maker's: `dispose` does not close it. */
  readonly cache: Cache
  /**
   * Seconds until an item is gone, where `setItem` says nothing (`ttl`; default: it stays until its room is needed).
   */
  readonly ttl?: number
}

/** What an item is set with. */
interface ItemOptions {
  /** Seconds. */
  readonly ttl?: number
}

/** What unstorage calls: its `Driver`. Written down here because its own declarations do not pass a strict check. */
export interface TmemDriver {
  readonly name: 'tmem'
  readonly flags: { readonly ttl: true }
  readonly options: TmemDriverOptions
  getInstance(): Cache
  hasItem(key: string): Promise<boolean>
  getItem(key: string): Promise<string | null>
  getItemRaw(key: string): Promise<unknown>
  setItem(key: string, value: string, options?: ItemOptions): Promise<void>
  setItemRaw(key: string, value: unknown, options?: ItemOptions): Promise<void>
  removeItem(key: string): Promise<void>
  getKeys(): Promise<string[]>
  /** @param base the first parts of keys; without one all items that the driver has set */
  clear(base?: string): Promise<void>
}

/**
 * Makes a driver. `getKeys` of the storage rejects with `TmemError` (`TMEM_UNSUPPORTED`); a value for which the cache
 * has no room is an error of `setItem`. Throws `TypeError` for settings that make no sense.
 */
export function tmemDriver(options: TmemDriverOptions): TmemDriver {
  checkOptions<TmemDriverOptions>('tmemDriver', options, { cache: 'object', ttl: 'number?' })
  const { cache, ttl } = options
  const set = async (key: string, value: unknown, transaction: ItemOptions | undefined): Promise<void> => {
    await cache.ready()
    const seconds = transaction?.ttl ?? ttl
    const stored = cache.set(key, value, {
      ttl: seconds === undefined ? undefined : seconds * 1000,
      tags: basesOf(key),
    })
    if (!stored) throw new Error(`the cache has no room for the value of ${key}: give it more memory`)
  }
  return {
    name: 'tmem',
    flags: { ttl: true },
    options,
    getInstance: () => cache,
    hasItem: async (key) => (await cache.load(key)) !== undefined,
    getItem: async (key) => ((await cache.load(key)) as string | undefined) ?? null,
    getItemRaw: async (key) => (await cache.load(key)) ?? null,
    setItem: set,
    setItemRaw: set,
    async removeItem(key) {
      await cache.ready()
      cache.delete(key)
    },
    getKeys: () =>
      Promise.reject(
        new TmemError('TMEM_UNSUPPORTED', 'the tmem driver of unstorage: a cache does not list its keys', {
          layer: 'cache',
        }),
      ),
    async clear(base = '') {
      await cache.ready()
      cache.deleteByTag(tagOf(base.replace(/:$/, '')))
    },
  }
}

const tagOf = (base: string): string => `unstorage:${base}`

/** Tags of all bases of a key, the empty one among them. */
function basesOf(key: string): string[] {
  const parts = key.split(':')
  if (parts.length > maxTags) throw new RangeError(`a key has at most ${maxTags} parts, this one has ${parts.length}`)
  return parts.map((_, n) => tagOf(parts.slice(0, n).join(':')))
}
