/** Block devices over NBD. */
export type { NbdRefusal, RefusalReason } from './door.ts'
export { type MemoryDevice, type MemoryDeviceOptions, memoryDevice } from './memory-device.ts'
export {
  type NbdAddress,
  type NbdEndpoint,
  type NbdExport,
  type NbdLimits,
  type NbdServer,
  type NbdServerOptions,
  nbdServer,
} from './server.ts'
export { listenAtPath } from './socket-path.ts'
export type { NbdTls } from './tls.ts'
