/** Counters of a page cache: one object, which its parts share. */
export interface PageCacheCounters {
  /** Pages that were in the first level when they were asked for. */
  hits: number
  /** Pages that were not. */
  misses: number
  /** Pages read ahead of anybody who asked, and how many of them were asked for. */
  readaheadPages: number
  readaheadHits: number
  /** Requests to read the file, and what they brought. */
  diskReads: number
  diskPagesRead: number
  diskBytesRead: number
  /** Reads of parts of pages that found no frame, or a page that was half written. */
  uncachedReads: number
  /** Requests to write the file, and what they took. */
  diskWrites: number
  diskBytesWritten: number
  /** Times that a file was found changed by somebody else. */
  foreignChanges: number
  /** Times that pages were dropped because the file was too fresh to tell. */
  unsettledDrops: number
  readErrors: number
  writeErrors: number
  /** Pages that cleancache had and could not give. */
  cleancacheErrors: number
}

/** All of them at zero. */
export const zeroCounters = (): PageCacheCounters => ({
  hits: 0,
  misses: 0,
  readaheadPages: 0,
  readaheadHits: 0,
  diskReads: 0,
  diskPagesRead: 0,
  diskBytesRead: 0,
  uncachedReads: 0,
  diskWrites: 0,
  diskBytesWritten: 0,
  foreignChanges: 0,
  unsettledDrops: 0,
  readErrors: 0,
  writeErrors: 0,
  cleancacheErrors: 0,
})
