/**
 * Page stores of plain memory: one engine, alone, as a layer of a stack, or shared by several threads; and memory by
 * mmap.
 */
export * from './mapped.ts'
export * from './memory.ts'
export * from './threads.ts'
