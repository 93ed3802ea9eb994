/** zcache: a layer that keeps compressed pages in bounded memory. */

export type { Arena, ZAllocator } from './arena.ts'
export { blockCodec } from './block-codec.ts'
export {
  Decision,
  Governor,
  type GovernorOptions,
  type HostMemory,
  type MemoryLimit,
  memoryLimits,
  type ReadText,
  readHostMemory,
} from './governor.ts'
export { maxPagesFor, minLimitBytes, type ZcacheOptions, zcache, zcacheFactory } from './layer.ts'
