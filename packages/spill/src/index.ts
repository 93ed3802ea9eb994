/** The end of a stack of ephemeral pages: a file that survives a restart. */
export { type SpillOptions, spill, spillFactory } from './spill.ts'
export { nodeSpillIo, type SpillIo } from './spill-file.ts'
