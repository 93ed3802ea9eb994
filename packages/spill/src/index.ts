/** A place for ephemeral pages in a file, which survives a restart. */
export { type SpillOptions, spill, spillFactory } from './spill.ts'
