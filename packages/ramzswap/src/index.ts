/** Block devices to swap to, over any page stores: ramzswap with what zram added, and virtswap. */
export * from './device.ts'
export { type ImageFile, type OpenImageFile, openImageFile } from './image-file.ts'
export { openSnapshot, type Snapshot, type SnapshotOptions } from './snapshot.ts'
export { type DevicePlan, tiersOf } from './tiers.ts'
