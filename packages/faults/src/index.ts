/**
 * Filters that refuse, delay, corrupt, fail, tear, count or trace; ends of stacks for tests; and an allocator that
 * fails.
 */
export * from './allocator.ts'
export * from './ends.ts'
export * from './layers.ts'
export { PassingPool, PassingStore, passingPlace, passingPlan } from './passing.ts'
export * from './trace.ts'
