/** Memory of other machines as a place of a stack. */
export { type RamsterOptions, ramster, ramsterFactory } from './layer.ts'
export { type ProcessMemoryOptions, processMemory } from './process-memory.ts'
export type { Borrower, RemoteMemory, RemotePlan } from './remote.ts'
export { type ValkeyOptions, valkey } from './valkey.ts'
