/** FS-Cache over any page store, and files of HTTP servers in front of it. */
export * from './cookies.ts'
export { HttpFiles, type HttpFilesOptions } from './http.ts'
export { HttpFile, StaleFileError } from './parts.ts'
export type { Fetch } from './request.ts'
export type { HttpFilesCounters } from './table.ts'
