/** The frontswap and cleancache hooks of a real Linux guest, over Xen's tmem interface. */
export { type AttachCounters, AttachedGuest, type AttachOptions, attachGuest } from './attach.ts'
export {
  type BootedGuest,
  type BootedRun,
  type BootOptions,
  bootGuest,
  type DriveCounts,
  type Workload,
  workloads,
} from './boot.ts'
export { type GuestParts, lacksForGuests, PartsError, type PartsOptions, prepareParts } from './parts.ts'
export { SavedPages, type SavedPagesOptions } from './saved-pages.ts'
export { type Contradiction, checkTrace, type TraceReport, traceHead } from './trace.ts'
