/** An address space larger than its memory. */
export * from './swapper.ts'
