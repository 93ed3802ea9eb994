/** Transcendent memory: pools, objects, pages, outcomes; composing stores. What is not settled is in `unstable.ts`. */
export * from './abort.ts'
export * from './block.ts'
export * from './compose.ts'
export * from './context.ts'
export * from './durations.ts'
export { maxEntries, none } from './handles.ts'
export {
  type ByteAmount,
  bytesOf,
  checkOptions,
  formatBytes,
  limitOf,
  nearestName,
  type OptionNames,
  parseBytes,
  type ValueKind,
} from './options.ts'
export * from './outcomes.ts'
export * from './place.ts'
export * from './process-mark.ts'
export * from './stack-text.ts'
export * from './store.ts'
export * from './tmem.ts'
