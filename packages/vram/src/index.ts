/** Memory of a video device as a place of a stack, over OpenCL. */
export { type VramOptions, vram, vramFactory } from './layer.ts'
export {
  type DeviceBuffer,
  type DeviceMemory,
  OpenClError,
  openDevice,
  type VideoDevice,
  videoDevices,
} from './opencl.ts'
