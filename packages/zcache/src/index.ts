/** zcache: a layer that keeps compressed pages in bounded memory. */

export { Decision, Governor, type GovernorOptions, type HostMemory, type ReadText, readHostMemory } from './governor.ts'
export { type AllocatorName, minLimitBytes, type ZcacheOptions, zcache, zcacheFactory } from './layer.ts'
export type { WritebackDevice, WritebackOptions } from './writeback.ts'
export { maxPagesFor } from './zcache.ts'
