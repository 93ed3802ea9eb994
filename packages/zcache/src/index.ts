/** zcache: a layer that keeps compressed pages in bounded memory. */
export { maxPagesFor, minLimitBytes, type ZcacheOptions, zcache, zcacheFactory } from './zcache.ts'
