/** Memory of other machines as a place of a stack. */
export { type RamsterOptions, ramster } from './layer.ts'
export { type ProcessMemoryOptions, processMemory } from './process-memory.ts'
export type { Borrower, RemoteMemory, RemotePlan } from './remote.ts'
