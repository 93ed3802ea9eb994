/** A cache of values of any size in compressed memory, with a limit that counts everything. */
export {
  Cache,
  type CacheKey,
  type CacheMessage,
  type CacheOptions,
  type CacheStats,
  type JoinOptions,
  type SetOptions,
} from './cache.ts'
export type { EntryStats, SharedStats } from './entries.ts'
export type { LoadContext, Loader } from './loads.ts'
export type { SharedCache } from './shared-entries.ts'
export type { CacheFile } from './stack.ts'
export type { ValueCodec } from './values.ts'
