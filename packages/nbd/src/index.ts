/** Block devices over NBD. */
export { type MemoryDevice, type MemoryDeviceOptions, memoryDevice } from './memory-device.ts'
export {
  type NbdAddress,
  type NbdEndpoint,
  type NbdExport,
  type NbdLimits,
  type NbdServer,
  type NbdServerOptions,
  type NbdTls,
  nbdServer,
} from './server.ts'
export { listenAtPath } from './socket-path.ts'
