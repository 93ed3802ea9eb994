/** Block devices to swap to, over any stack of places: ramzswap with what zram added, and virtswap. */
export * from './device.ts'
export type { PageKind, RecompressRequest, WritebackRequest } from './moves.ts'
export { openSnapshot, type Snapshot, type SnapshotOptions } from './snapshot.ts'
export { planDevice } from './stack.ts'
export type { RamzswapStats } from './statistics.ts'
