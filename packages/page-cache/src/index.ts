/** A page cache for files with a second chance behind it. */
export { CachedFile, type FileData, type ReadOptions } from './cached-file.ts'
export type { PageCacheCounters } from './counters.ts'
export { DirectReads, type DirectReadsCounters, type DirectReadsOptions } from './direct-io.ts'
export {
  type FileIo,
  type FileSystemKind,
  localDisks,
  nodeFileIo,
  type OptIn,
  pageCacheFacts,
} from './file-io.ts'
export { type OpenOptions, PageCache, type PageCacheOptions } from './page-cache.ts'
