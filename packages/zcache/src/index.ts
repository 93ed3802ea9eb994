/** zcache: a layer that keeps compressed pages in bounded memory. */
export { type AllocatorName, minLimitBytes, type ZcacheOptions, zcache, zcacheFactory } from './layer.ts'
export { maxPagesFor } from './zcache.ts'
