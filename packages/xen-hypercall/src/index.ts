/** Xen's tmem interface, byte for byte: hypercalls, control, saved streams. */
export * from './abi.ts'
export { Client, Domain, type DomainOptions, type PageName, PoolCounters, XenPool } from './clients.ts'
export { type ControlBuffer, type ControlRequest, controlBuffer } from './control.ts'
export * from './describe.ts'
export * from './guest-memory.ts'
export * from './host.ts'
export * from './linux.ts'
export * from './stream.ts'
