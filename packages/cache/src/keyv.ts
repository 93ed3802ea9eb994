/**
 * A store for keyv 5 that keeps values in a cache: `new Keyv(new KeyvStore(cache))`.
 *
 * Keyv serialises values and puts its namespace in front of each key. The driver tags the entries of its namespace, so
 * that `clear` deletes no others. There is no iterator, as a cache does not list its keys.
 */
import { EventEmitter } from 'node:events'
import type { KeyvStoreAdapter, StoredData } from 'keyv'
import type { Cache } from './cache.ts'

/** What one instance of keyv stores. Give each its own. */
export class KeyvStore extends EventEmitter implements KeyvStoreAdapter {
  readonly opts: { readonly dialect: 'tmem'; deserialize?: (text: string) => unknown } = { dialect: 'tmem' }
  /** Set by keyv. */
  namespace: string | undefined
  readonly #cache: Cache

  /** @param cache stays its maker's: `disconnect` does not close it */
  constructor(cache: Cache) {
    super()
    this.#cache = cache
  }

  async get<Value>(key: string): Promise<StoredData<Value> | undefined> {
    return (await this.#cache.load(key)) as StoredData<Value> | undefined
  }

  async getMany<Value>(keys: string[]): Promise<StoredData<Value | undefined>[]> {
    return await Promise.all(keys.map((key) => this.get<Value>(key)))
  }

  /** Rejects when the cache has no room for the value: what keyv says is stored is stored. */
  async set(key: string, value: unknown, ttl?: number): Promise<void> {
    await this.#cache.ready()
    // Keyv has 0 for ever.
    if (!this.#cache.set(key, value, { ttl: ttl === 0 ? undefined : ttl, tags: [this.#tag] }))
      throw new Error(`the cache has no room for the value of ${key}: give it more memory`)
  }

  async delete(key: string): Promise<boolean> {
    await this.#cache.ready()
    return this.#cache.delete(key)
  }

  /** Whether any of them was there. */
  async deleteMany(keys: string[]): Promise<boolean> {
    await this.#cache.ready()
    return keys.map((key) => this.#cache.delete(key)).some((wasThere) => wasThere)
  }

  async clear(): Promise<void> {
    await this.#cache.ready()
    this.#cache.deleteByTag(this.#tag)
  }

  async has(key: string): Promise<boolean> {
    return (await this.#cache.load(key)) !== undefined
  }

  get #tag(): string {
    return `keyv:${this.namespace ?? ''}`
  }
}
