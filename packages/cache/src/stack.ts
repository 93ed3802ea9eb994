/**
 * The stack below a cache, made for an amount of memory or named by the user; and the limit, which includes the cache's
 * own tables.
 */
import {
  type Allocator,
  type ByteAmount,
  ByteLimit,
  bytesOf,
  checkOptions,
  compose,
  type Layer,
  type LayerFactory,
  limitOf,
  type PageStore,
  type Pool,
  parseStack,
  poolRefusalName,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { memoryFactory } from '@tmem/memory'
import { spill, spillFactory } from '@tmem/spill'
import { zcache, zcacheFactory } from '@tmem/zcache'
import { pageBytes } from './records.ts'

/** A file beneath the memory, which survives a restart. */
export interface CacheFile {
  /** Path; the file is made if it is not there. One that is not a cache's own is refused, and stays as it is. */
  readonly path: string
  /** Its size: 64 KiB to 256 GiB. */
  readonly size: ByteAmount
}

/** What the stack of a cache is made of. */
export interface StackOptions {
  readonly memory?: ByteAmount | ByteLimit | undefined
  readonly file?: CacheFile | undefined
  readonly stack?: string | readonly Layer[] | undefined
  readonly layers?: readonly LayerFactory[] | undefined
  readonly allocator?: Allocator | undefined
}

/** Smallest amount of memory of a cache, and what its tables get above a stack of the user's, if nothing is said. */
export const minMemoryBytes: number = 2 * 2 ** 20
const tablesBytes = 64 * 2 ** 20
/** Bytes of memory, or of a file, for each page that there may be. */
const bytesPerPage = 512

/** What a codec works in (a table of 64 KiB, and of its blocks what pages touch), and what else has no allocator. */
const workspaceBytes = 256 * 1024

/** An opened stack. */
export interface CacheStack {
  readonly store: PageStore
  readonly pool: Pool
  /** For the cache's own tables; what they take is not counted in `taken`. */
  readonly allocator: Allocator
  /** The limit of the whole cache; of its own stack, what is left to the places. */
  readonly limit: ByteLimit
  readonly places: ByteLimit | undefined
  /** What the stack has taken besides the memory of its places. */
  readonly taken: { bytes: number }
  /** Pages that there may be at once. */
  readonly capacity: number
  /** Bytes of the largest entry that it is worth making room for, as the limit is now. */
  readonly largest: number
  /** Some place promises that what it has taken survives the process. */
  readonly survives: boolean
}

/** Opens the stack. Throws `TypeError`, `RangeError` or `TmemError`, with nothing left open. */
export function openStack(options: StackOptions, wake: () => void): CacheStack {
  const { memory, file, stack, layers = [], allocator: given = systemAllocator } = options
  if (stack !== undefined && file !== undefined)
    throw new TypeError('cache: file is for a cache that makes its own stack; name the file in the stack')
  if (stack === undefined && memory === undefined)
    throw new TypeError("cache: memory is how much it may use, such as '256MiB'; it is missing")
  const limit = limitOf('cache', 'memory', memory ?? tablesBytes)
  if (!(limit.maximumBytes >= minMemoryBytes))
    throw new RangeError(`cache: memory is at least ${minMemoryBytes} bytes, got ${limit.maximumBytes}`)
  if (file !== undefined) checkOptions('cache: file', file, { path: true, size: true })
  const fileBytes = file === undefined ? 0 : bytesOf('cache: file', 'size', file.size)
  const taken = { bytes: workspaceBytes }
  // What rests in memory, and the directory, the places count themselves.
  const allocator: Allocator = {
    ...given,
    allocate: (bytes, site) => {
      if (!/^(zcache|chain\.handles|chain\.residents)/.test(site)) taken.bytes += bytes
      return given.allocate(bytes, site)
    },
  }
  let places: ByteLimit | undefined
  let opened: readonly Layer[]
  if (stack === undefined) {
    places = new ByteLimit(limit.maximumBytes)
    opened = [zcache({ limitBytes: places })]
    if (file !== undefined) opened = [...opened, spill({ file: file.path, sizeBytes: fileBytes })]
  } else if (typeof stack === 'string')
    opened = parseStack(stack, [memoryFactory, zcacheFactory, spillFactory, ...layers])
  else opened = stack
  // A place that could be a store by itself is a place here, too: the cache has to know what its pages use.
  const store = compose(
    opened.map((layer) => (layer.place === undefined ? layer : { name: layer.name, place: layer.place })),
    { allocator, wake },
  )
  const survives = store.usage?.().places.some((place) => place.survives !== 'nothing') ?? false
  // Pages that may vanish where a place keeps no others; elsewhere it is the cache that says which entries go.
  const persistent = store.capabilities.persistent && !survives
  const pool = store.newPool({ client: 0, persistent, shared: !persistent, pageSize: pageBytes })
  if (typeof pool === 'number') {
    // A rejection of this close is not handled on purpose: it surfaces beside the error thrown here.
    void store.close()
    throw new TmemError('TMEM_BAD_STACK', `cache: ${store.name} gives no pool: ${poolRefusalName(pool)}`, {
      layer: 'cache',
    })
  }
  const bytes = limit.maximumBytes + fileBytes
  return {
    store,
    pool,
    allocator: given,
    limit,
    places,
    taken,
    capacity: Math.min(2 ** 24 - 2, Math.floor((stack === undefined ? bytes : limit.maximumBytes * 8) / bytesPerPage)),
    get largest() {
      return stack === undefined ? (limit.bytes + fileBytes) / 2 : Number.POSITIVE_INFINITY
    },
    survives,
  }
}
