/**
 * The generator of histories, which soaks share: it may change or go in any release but a patch, because what one seed
 * means changes with every operation that histories learn.
 */
export { Random, scatter } from './random.ts'
