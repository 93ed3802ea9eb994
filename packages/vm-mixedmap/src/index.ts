/** Page mapping as an executable model: areas, entries, frames with and without page descriptors. See the README. */
export * from './descriptors.ts'
export * from './gup.ts'
export * from './mapping.ts'
export * from './memory.ts'
export * from './tlb.ts'
export * from './xip.ts'
