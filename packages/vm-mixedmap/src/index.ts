/** Page mapping as an executable model: areas, entries, frames with and without page descriptors. See the README. */
export * from './balance.ts'
export * from './descriptors.ts'
export {
  type Access,
  claimPage,
  copyFrame,
  type FaultOutcome,
  fault,
  handleFault,
  mustUnshare,
  NO_SECONDARY_MMUS,
  resolvePresent,
  type SecondaryMmus,
  translate,
  unsharePage,
  writeProtectFault,
} from './fault.ts'
export * from './gup.ts'
export * from './memory.ts'
export {
  dropMapped,
  type InsertOutcome,
  mapHuge,
  type NormalPage,
  normalPfn,
  remapPfnRange,
  vmInsertHugePfn,
  vmInsertMixed,
  vmInsertPage,
  vmInsertPfn,
  vmNormalHugePage,
  vmNormalPage,
} from './normal.ts'
export { exitSpace, fork, mprotect, mremap, munmap, zapPte, zapRange } from './ranges.ts'
export * from './space.ts'
export * from './tlb.ts'
export * from './xip.ts'
