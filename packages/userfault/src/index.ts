/**
 * ArrayBuffers larger than the memory that they use: the real MMU's page faults, answered from a page store. Linux
 * only.
 */
export * from './buffer.ts'
