/** FS-Cache over any page store, and files of HTTP servers in front of it. */
export * from './cookies.ts'
export {
  type Fetch,
  HttpFile,
  HttpFiles,
  type HttpFilesCounters,
  type HttpFilesOptions,
  StaleFileError,
} from './http.ts'
