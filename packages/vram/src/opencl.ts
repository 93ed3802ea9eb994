/**
 * The few calls of OpenCL that blocks in device memory need: find a device, buffers, copies to and from them.
 *
 * A copy starts at once, and copies are done in the order of the calls. Source and target must stay unchanged until
 * `finish` has resolved, which does not block this thread.
 *
 * Source: the OpenCL 1.2 specification, §4 (platforms, devices), §5.2 (buffers); numbers from CL/cl.h. A command queue
 * is made by the call of 1.x, which every loader has.
 */
import { createRequire } from 'node:module'
import { TmemError } from '@tmem/core'

type Koffi = typeof import('koffi')
type Call = ((...args: readonly unknown[]) => number | bigint) & {
  async(...args: readonly unknown[]): void
}

const success = 0
const deviceNotFound = -1
/** No platform is registered with the loader. */
const platformNotFound = -1001
const allTypes = 0xffffffff
const deviceName = 0x102b
const deviceGlobalBytes = 0x101f
const deviceAvailable = 0x1027
const readWrite = 1
/** By name of the loader: Linux, macOS, Windows. */
const loaders = ['libOpenCL.so.1', '/System/Library/Frameworks/OpenCL.framework/OpenCL', 'OpenCL.dll']

/** Errors by number, as far as these calls have them. */
const errorNames: Readonly<Record<number, string>> = {
  [-1]: 'CL_DEVICE_NOT_FOUND',
  [-2]: 'CL_DEVICE_NOT_AVAILABLE',
  [-4]: 'CL_MEM_OBJECT_ALLOCATION_FAILURE',
  [-5]: 'CL_OUT_OF_RESOURCES',
  [-6]: 'CL_OUT_OF_HOST_MEMORY',
  [-14]: 'CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST',
  [-30]: 'CL_INVALID_VALUE',
  [-33]: 'CL_INVALID_DEVICE',
  [-34]: 'CL_INVALID_CONTEXT',
  [-36]: 'CL_INVALID_COMMAND_QUEUE',
  [-38]: 'CL_INVALID_MEM_OBJECT',
  [-61]: 'CL_INVALID_BUFFER_SIZE',
  [-1001]: 'CL_PLATFORM_NOT_FOUND_KHR',
}

/** What a call of OpenCL has failed with. */
export class OpenClError extends Error {
  readonly number: number
  readonly call: string

  constructor(call: string, number: number) {
    super(`${call}: ${errorNames[number] ?? `error ${number}`}`)
    this.number = number
    this.call = call
  }
}

/** A device, and how much memory it says that it has. */
export interface VideoDevice {
  readonly name: string
  readonly bytes: number
}

/** A buffer of a device: a number of its own. */
export type DeviceBuffer = number | bigint

/** The memory of one device. Calls throw `OpenClError`. */
export interface DeviceMemory extends VideoDevice {
  /** Makes a buffer. Memory may be taken for it only when it is written to. */
  create(bytes: number): DeviceBuffer
  release(buffer: DeviceBuffer): void
  /** Begins to copy all of `from` to a place in a buffer. */
  write(buffer: DeviceBuffer, at: number, from: Uint8Array): void
  /** Begins to fill all of `into`. */
  read(buffer: DeviceBuffer, at: number, into: Uint8Array): void
  /** Resolves when everything that was begun is done. Rejects with `OpenClError`. */
  finish(): Promise<void>
  /** Gives everything back. Nothing is under way any more. */
  close(): void
}

/** The calls, by name. */
interface Api {
  readonly call: (name: string, ...args: readonly unknown[]) => void
  readonly functions: Readonly<Record<string, Call>>
}

const prototypes: Readonly<Record<string, string>> = {
  clGetPlatformIDs: 'int clGetPlatformIDs(uint32_t, void *, void *)',
  clGetDeviceIDs: 'int clGetDeviceIDs(uintptr_t, uint64_t, uint32_t, void *, void *)',
  clGetDeviceInfo: 'int clGetDeviceInfo(uintptr_t, uint32_t, size_t, void *, void *)',
  clCreateContext: 'uintptr_t clCreateContext(void *, uint32_t, void *, void *, void *, void *)',
  clReleaseContext: 'int clReleaseContext(uintptr_t)',
  clCreateCommandQueue: 'uintptr_t clCreateCommandQueue(uintptr_t, uintptr_t, uint64_t, void *)',
  clReleaseCommandQueue: 'int clReleaseCommandQueue(uintptr_t)',
  clCreateBuffer: 'uintptr_t clCreateBuffer(uintptr_t, uint64_t, size_t, void *, void *)',
  clReleaseMemObject: 'int clReleaseMemObject(uintptr_t)',
  clEnqueueWriteBuffer:
    'int clEnqueueWriteBuffer(uintptr_t, uintptr_t, uint32_t, size_t, size_t, void *, uint32_t, void *, void *)',
  clEnqueueReadBuffer:
    'int clEnqueueReadBuffer(uintptr_t, uintptr_t, uint32_t, size_t, size_t, void *, uint32_t, void *, void *)',
  clFinish: 'int clFinish(uintptr_t)',
}

function load(): Api {
  let koffi: Koffi
  try {
    // An import would have to be waited for, and places are opened at once.
    koffi = createRequire(import.meta.url)('koffi') as Koffi
  } catch (error) {
    throw unsupported('koffi, which calls OpenCL, cannot be loaded: install it', error)
  }
  let why: unknown
  for (const loader of loaders) {
    try {
      const library = koffi.load(loader)
      const functions: Record<string, Call> = {}
      for (const [name, prototype] of Object.entries(prototypes)) functions[name] = library.func(prototype) as Call
      return {
        functions,
        call: (name, ...args) => {
          const status = Number(functions[name]!(...args))
          if (status !== success) throw new OpenClError(name, status)
        },
      }
    } catch (error) {
      why ??= error
    }
  }
  throw unsupported('there is no OpenCL here: install a loader (Debian: ocl-icd-libopencl1) and a driver', why)
}

const unsupported = (message: string, cause?: unknown): TmemError =>
  new TmemError('TMEM_UNSUPPORTED', `vram: ${message}`, {
    layer: 'vram',
    ...(cause === undefined ? {} : { cause }),
  })

/** Every device of every platform: its own number, name and memory. */
function devicesOf({ call }: Api): { readonly id: bigint; readonly device: VideoDevice }[] {
  const count = new Uint32Array(1)
  /** Numbers that a call writes to an array of its caller's; none where it has none. */
  const listed = (name: string, ...args: readonly unknown[]): bigint[] => {
    try {
      call(name, ...args, 0, null, count)
      const ids = new BigUint64Array(count[0]!)
      if (ids.length > 0) call(name, ...args, ids.length, ids, null)
      return [...ids]
    } catch (error) {
      if (error instanceof OpenClError && [deviceNotFound, platformNotFound].includes(error.number)) return []
      throw error
    }
  }
  const about = (id: bigint, what: number, bytes: number): Buffer => {
    const into = Buffer.alloc(bytes)
    call('clGetDeviceInfo', id, what, bytes, into, null)
    return into
  }
  return listed('clGetPlatformIDs')
    .flatMap((platform) => listed('clGetDeviceIDs', platform, BigInt(allTypes)))
    .filter((id) => about(id, deviceAvailable, 4).readUInt32LE(0) !== 0)
    .map((id) => {
      const text = about(id, deviceName, 256).toString('utf8')
      const end = text.indexOf('\0')
      const name = (end < 0 ? text : text.slice(0, end)).trim()
      return { id, device: { name, bytes: Number(about(id, deviceGlobalBytes, 8).readBigUInt64LE(0)) } }
    })
}

/** The devices of this machine, in the order in which they are numbered. Throws `TmemError` (`TMEM_UNSUPPORTED`). */
export function videoDevices(): VideoDevice[] {
  return devicesOf(load()).map(({ device }) => device)
}

/**
 * Opens a device: by its number, by a part of its name (whatever the case of its letters), or the first one. Throws
 * `TmemError` (`TMEM_UNSUPPORTED`) when there is none; `RangeError` for one that is not among those that there are.
 */
export function openDevice(which?: string): DeviceMemory {
  const api = load()
  const all = devicesOf(api)
  if (all.length === 0) throw unsupported('OpenCL has no device here: install its driver (the vendor’s ICD)')
  const found = chosen(all, which)
  const { call, functions } = api
  const status = new Int32Array(1)
  const made = (name: string, ...args: readonly unknown[]): DeviceBuffer => {
    const handle = functions[name]!(...args, status)
    if (status[0] !== success) throw new OpenClError(name, status[0]!)
    return handle
  }
  const context = made('clCreateContext', null, 1, BigUint64Array.of(found.id), null, null)
  let queue: DeviceBuffer
  try {
    queue = made('clCreateCommandQueue', context, found.id, 0n)
  } catch (error) {
    call('clReleaseContext', context)
    throw error
  }
  return {
    ...found.device,
    create: (bytes) => made('clCreateBuffer', context, BigInt(readWrite), bytes, null),
    release: (buffer) => call('clReleaseMemObject', buffer),
    write: (buffer, at, from) => call('clEnqueueWriteBuffer', queue, buffer, 0, at, from.length, from, 0, null, null),
    read: (buffer, at, into) => call('clEnqueueReadBuffer', queue, buffer, 0, at, into.length, into, 0, null, null),
    finish: () =>
      new Promise((resolve, reject) => {
        functions['clFinish']!.async(queue, (error: Error | null, code: number) => {
          if (error !== null) reject(error)
          else if (code === success) resolve()
          else reject(new OpenClError('clFinish', code))
        })
      }),
    close: () => {
      call('clReleaseCommandQueue', queue)
      call('clReleaseContext', context)
    },
  }
}

function chosen<One extends { readonly device: VideoDevice }>(all: readonly One[], which: string | undefined): One {
  if (which === undefined) return all[0]!
  const found = /^\d+$/.test(which)
    ? all[Number(which)]
    : all.find(({ device }) => device.name.toLowerCase().includes(which.toLowerCase()))
  if (found !== undefined) return found
  const list = all.map(({ device }, number) => `${number}: ${device.name}`).join('; ')
  throw new RangeError(`vram: device is a number or a part of a name; there is no ${which}, there are ${list}`)
}
