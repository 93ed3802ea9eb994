/** Files of our own for pages: claimed, marked, around the operating system's cache, whole transfers or an error. */
export type { FileClaim, Mark } from './claim.ts'
export * from './memory-files.ts'
export * from './page-file.ts'
export { type FileIdentity, type OpenHow, type PageFileIo, type SystemFilesOptions, systemFiles } from './system.ts'
export { type PageFileCounters, TransferBuffers, type TransferBuffersOptions } from './transfers.ts'
