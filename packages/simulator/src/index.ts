/** Whole stacks over a simulated disk and clock, under seeded faults, against a reference model. */
export * from './history.ts'
export * from './simulate.ts'
export { type FaultCounts, type FaultKind, faultKinds } from './world.ts'
