/** Transcendent memory: pools, objects, pages, outcomes; composing stores; the memory store. */
export * from './block.ts'
export * from './compose.ts'
export * from './context.ts'
export {
  HandleTable,
  type HandleTableMemory,
  type HandleTableOptions,
  maxEntries,
  none,
} from './handles.ts'
export * from './memory.ts'
export * from './outcomes.ts'
export * from './process-mark.ts'
export * from './stack-text.ts'
export * from './store.ts'
export * from './threads.ts'
export * from './tmem.ts'
