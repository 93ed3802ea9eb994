/** Memory of other machines as a place of a stack. */
export { type RamsterLayer, type RamsterOptions, ramster, ramsterFactory } from './layer.ts'
export { type Borrowing, Lenders } from './lenders.ts'
export { type ProcessMemoryOptions, processMemory } from './process-memory.ts'
export type { Borrower, Kept, RemoteMemory, RemotePlan } from './remote.ts'
export { type ValkeyClusterOptions, type ValkeyOptions, valkey, valkeyCluster } from './valkey.ts'
