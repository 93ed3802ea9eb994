/**
 * A store for the cache interceptor of undici 7 that keeps responses in a cache: `new
 * Agent().compose(interceptors.cache({ store: new UndiciStore(cache) }))`.
 *
 * A response is an entry with its metadata as JSON and its body. Another entry, the index, lists the responses of an
 * address by method and request headers (`Vary`). A response is written before the index names it. So a response that
 * the index does not name does not exist, and one that it names may have been evicted.
 */
import { createHash } from 'node:crypto'
import { Writable } from 'node:stream'
import type { cacheStores } from 'undici'
import type { Cache } from './cache.ts'
import { maxValueBytes } from './values.ts'

type MemoryStore = InstanceType<typeof cacheStores.MemoryCacheStore>
type RequestKey = Parameters<MemoryStore['get']>[0]
type StoredValue = Parameters<MemoryStore['createWriteStream']>[1]
type Found = Exclude<ReturnType<MemoryStore['get']>, Promise<unknown> | undefined>

/** A response that there is. */
interface Variant {
  readonly method: string
  readonly vary?: StoredValue['vary']
  readonly deleteAt: number
}

/** Most responses of one address that are kept: by other request headers. The oldest go. */
const maxVariants = 64
/** Code units of the longest name that is a key as it stands: at two bytes each, half of what a key may have. */
const maxNameLength = 16_384

/** What the cache interceptor of an agent stores. Several may have one cache, and then share what is in it. */
export class UndiciStore implements Pick<MemoryStore, 'get' | 'createWriteStream' | 'delete'> {
  readonly #cache: Cache
  #isReady = false

  /** @param cache one without a codec; it stays its maker's */
  constructor(cache: Cache) {
    this.#cache = cache
    // Who asks is told of a failure.
    cache.ready().then(
      () => {
        this.#isReady = true
      },
      () => undefined,
    )
  }

  /** The response for a request: at once where memory answers. */
  get(key: RequestKey): Found | Promise<Found | undefined> | undefined {
    if (!this.#isReady) return this.#load(key)
    const cache = this.#cache
    const index = cache.get(indexName(key)) as string | undefined
    // It is there, and one has to wait for it.
    if (index === undefined) return cache.has(indexName(key)) ? this.#load(key) : undefined
    const variant = variantFor(key, index)
    if (variant === undefined) return undefined
    const name = variantName(key, variant)
    const response = cache.get(name) as Buffer | undefined
    if (response === undefined) return cache.has(name) ? this.#load(key) : undefined
    return unpacked(response)
  }

  /** Where undici writes the body of a response, which is stored when that ends: unless it is too large. */
  createWriteStream(key: RequestKey, value: StoredValue): Writable {
    let chunks: Buffer[] = []
    let length = 0
    return new Writable({
      write: (chunk: Buffer, _encoding, done) => {
        length += chunk.length
        if (length <= maxValueBytes) chunks.push(chunk)
        else chunks = []
        done()
      },
      final: (done) => {
        const body = length <= maxValueBytes ? chunks : undefined
        // At once where memory answers: the next request may come together with the end of this response.
        if (!this.#isReady || this.#isDeferred(indexName(key))) {
          this.#storeLater(key, value, body).then(() => process.nextTick(done), done)
          return
        }
        this.#store(key, value, body)
        done()
      },
    })
  }

  /** Deletes all responses of an address. */
  delete(key: RequestKey): void | Promise<void> {
    if (!this.#isReady)
      return this.#cache.ready().then(() => {
        this.#delete(key)
      })
    this.#delete(key)
  }

  async #load(key: RequestKey): Promise<Found | undefined> {
    const index = (await this.#cache.load(indexName(key))) as string | undefined
    const variant = index === undefined ? undefined : variantFor(key, index)
    if (variant === undefined) return undefined
    const response = (await this.#cache.load(variantName(key, variant))) as Buffer | undefined
    return response === undefined ? undefined : unpacked(response)
  }

  /** Whether there is an entry, and one has to wait for it. */
  #isDeferred(name: string): boolean {
    return this.#cache.get(name) === undefined && this.#cache.has(name)
  }

  async #storeLater(key: RequestKey, value: StoredValue, body: readonly Buffer[] | undefined): Promise<void> {
    await this.#cache.ready()
    // With the index in memory, what is read next is what is written back: nobody comes in between.
    await this.#cache.load(indexName(key))
    this.#store(key, value, body)
  }

  /** Stores a response; without a body only the older one of the same request goes. */
  #store(key: RequestKey, value: StoredValue, body: readonly Buffer[] | undefined): void {
    const cache = this.#cache
    const now = Date.now()
    const variant: Variant = { method: key.method, vary: value.vary, deleteAt: value.deleteAt }
    const name = variantName(key, variant)
    const response = body === undefined ? undefined : packed(value, body)
    const isStored =
      response !== undefined &&
      response.length <= maxValueBytes &&
      value.deleteAt > now &&
      cache.set(name, response, { ttl: value.deleteAt - now })
    if (!isStored) cache.delete(name)
    const others = variantsOf(cache.get(indexName(key)) as string | undefined).filter(
      (one) => one.deleteAt > now && variantName(key, one) !== name,
    )
    const variants = isStored ? [variant, ...others] : others
    for (const one of variants.splice(maxVariants)) cache.delete(variantName(key, one))
    const ttl = Math.max(0, ...variants.map(({ deleteAt }) => deleteAt - now))
    if (ttl === 0) cache.delete(indexName(key))
    else cache.set(indexName(key), JSON.stringify(variants), { ttl })
  }

  #delete(key: RequestKey): void {
    const cache = this.#cache
    for (const variant of variantsOf(cache.get(indexName(key)) as string | undefined))
      cache.delete(variantName(key, variant))
    cache.delete(indexName(key))
  }
}

/** A key of the cache. Long ones, which it would refuse, are known by their SHA-256. */
const named = (name: string): string =>
  name.length <= maxNameLength ? name : `undici:sha256:${createHash('sha256').update(name).digest('base64')}`

const addressOf = ({ origin, path }: RequestKey): string => `${origin}${path}`
const indexName = (key: RequestKey): string => named(`undici:index:${addressOf(key)}`)

/** Headers in one order, so that one request has one name. */
const variantName = (key: RequestKey, { method, vary }: Variant): string => {
  const headers = Object.entries(vary ?? {}).sort(([a], [b]) => (a < b ? -1 : 1))
  return named(`undici:${method}:${JSON.stringify(headers)}:${addressOf(key)}`)
}

const variantsOf = (index: string | undefined): Variant[] =>
  index === undefined ? [] : (JSON.parse(index) as Variant[])

/** The newest response that there is for a request. */
function variantFor(key: RequestKey, index: string): Variant | undefined {
  const now = Date.now()
  return variantsOf(index).find(
    ({ method, vary, deleteAt }) =>
      deleteAt > now &&
      method === key.method &&
      Object.entries(vary ?? {}).every(([name, value]) => isSame(value, key.headers?.[name])),
  )
}

/** Whether a header of the request is as it was; one that there was not is `null`. */
const isSame = (was: string | readonly string[] | null, is: string | readonly string[] | undefined): boolean =>
  JSON.stringify(was ?? null) === JSON.stringify(is ?? null)

/** A response as it is kept: four bytes of length, what is known of it as JSON, the body. */
function packed(value: StoredValue, body: readonly Buffer[]): Buffer {
  const facts = Buffer.from(JSON.stringify(value))
  const length = Buffer.alloc(4)
  length.writeUInt32LE(facts.length)
  return Buffer.concat([length, facts, ...body])
}

function unpacked(response: Buffer): Found {
  const end = 4 + response.readUInt32LE(0)
  const value = JSON.parse(response.toString('utf8', 4, end)) as Omit<Found, 'body'>
  // undici writes the pieces of the body again when it was revalidated.
  return { ...value, body: end === response.length ? [] : [response.subarray(end)] }
}
