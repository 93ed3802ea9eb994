/** Layers that refuse, delay, corrupt, count, trace or discard, and an allocator that fails: for tests and trials. */
export * from './allocator.ts'
export * from './layers.ts'
export { PassingPool, PassingStore, passingPlan } from './passing.ts'
export * from './trace.ts'
