/** A filter that encrypts and authenticates blocks which leave the process. */
export { type SealOptions, seal, sealFactory } from './layer.ts'
