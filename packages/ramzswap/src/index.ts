/** Block devices to swap to, over any page stores: ramzswap with what zram added, and virtswap. */
export * from './device.ts'
export { type DevicePlan, tiersOf } from './tiers.ts'
