/** Cleancache: a second chance for clean pages of files, over any page store. */
export * from './backend.ts'
export * from './cleancache.ts'
export * from './keys.ts'
export * from './opt-in.ts'
