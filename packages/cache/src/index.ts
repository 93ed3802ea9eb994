/** A cache of values of any size in compressed memory, with a limit that counts everything. */
export {
  Cache,
  type CacheKey,
  type CacheMessage,
  type CacheOptions,
  type CacheStats,
  type SetOptions,
} from './cache.ts'
export type { LoadContext, Loader } from './loads.ts'
export type { CacheFile } from './stack.ts'
export type { ValueCodec } from './values.ts'
