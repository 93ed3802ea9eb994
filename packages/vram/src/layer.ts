/** Memory of a video device as a layer of a stack: its settings, checked before a device is opened. */
import {
  type ByteAmount,
  bytesOf,
  checkOptions,
  type Layer,
  type LayerContext,
  type LayerFactory,
  maxEntries,
  maxPageSize,
  type OptionValue,
  type PlaceTraits,
} from '@tmem/core'
import { PageFile } from '@tmem/page-file'
import { type DeviceMemory, openDevice } from './opencl.ts'
import { copyBytes, VramPlace } from './place.ts'

/** Settings of vram. */
export interface VramOptions {
  /** Bytes of device memory that blocks may take: 1 MiB to 256 GiB. Takes 0.4 % of it as memory here. */
  readonly limitBytes: ByteAmount
  /** Which device: its number, or a part of its name, as `videoDevices` has them (default: the first one). */
  readonly device?: string
  /**
   * Path of a file that has a copy of each block: made, and removed at the end. Then pages that may not vanish go
   * there.
   */
  readonly copy?: string
  /**
   * Pages that may not vanish go there without a copy, too: those that are there when the device is reset are lost, and
   * a get of them fails (default: false: only pages that may vanish go there).
   */
  readonly volatile?: boolean
  /** How a device is opened (default: with `openDevice`). For tests. */
  readonly open?: () => DeviceMemory
}

const minLimitBytes = 2 ** 20
const maxLimitBytes = 2 ** 38
/** Bytes of the smallest average block that there is room for in the tables. */
const averageBytes = 1024
/** Blocks that are asked for together: what 1 MiB of pages consists of. */
const readsAtOnce = 256

/**
 * Blocks in the memory of a video device. Throws `TypeError` for unknown options, `RangeError` for settings that make
 * no sense; opening it throws `TmemError` (`TMEM_UNSUPPORTED`) where there is no device.
 */
export function vram(options: VramOptions): Layer {
  checkOptions('vram', options, {
    limitBytes: true,
    device: 'text?',
    copy: 'text?',
    volatile: 'flag?',
    open: 'function?',
  })
  const { device, copy, volatile: mayLose = false, open = () => openDevice(device) } = options
  const limitBytes = bytesOf('vram', 'limitBytes', options.limitBytes)
  if (!Number.isSafeInteger(limitBytes) || limitBytes < minLimitBytes || limitBytes > maxLimitBytes)
    throw new RangeError(`vram: limitBytes is ${minLimitBytes} to ${maxLimitBytes}, got ${limitBytes}`)
  const traits: PlaceTraits = Object.freeze({
    persistent: mayLose || copy !== undefined,
    ephemeral: true,
    waits: true,
    survives: 'nothing',
    rawOnly: false,
    capacity: Math.min(maxEntries, Math.floor(limitBytes / averageBytes)),
    // The device may be lost, or have less memory than it was asked for.
    reservedBytes: 0,
    maxPageSize,
    readsAtOnce,
  })
  return Object.freeze({
    name: 'vram',
    place: {
      traits,
      open: (context: LayerContext) => {
        const file = copy === undefined ? undefined : openCopy(copy, limitBytes, context)
        try {
          return new VramPlace({ traits, limitBytes, open, copy: file }, context)
        } catch (error) {
          // A rejection of this close surfaces as an unhandled one, beside the error that is thrown here.
          void file?.close()
          throw error
        }
      },
    },
  })
}

const openCopy = (path: string, limitBytes: number, { allocator }: LayerContext): PageFile =>
  PageFile.open({
    path,
    mode: 'make',
    bytes: 4096 + copyBytes(limitBytes),
    content: { name: 'tmem vram copy', tolerant: true },
    // It outlives the device, not this machine.
    through: 'cache',
    allocator,
    layer: 'vram',
  })

/** `vram(limit=1GiB,copy=/var/tmp/vram)` in the text of a stack. */
export const vramFactory: LayerFactory = Object.freeze({
  name: 'vram',
  summary: 'spare memory of a video device, over OpenCL',
  options: Object.freeze({
    limit: {
      kind: 'bytes',
      summary: 'bytes of device memory that blocks may take',
      required: true,
      minimum: minLimitBytes,
      maximum: maxLimitBytes,
    },
    device: { kind: 'text', summary: 'number of the device, or a part of its name (default: the first one)' },
    copy: {
      kind: 'text',
      summary: 'path of a file with a copy of each block: then pages that may not vanish go there',
    },
    volatile: {
      kind: 'flag',
      summary: 'pages that may not vanish go there without a copy, and are lost with the device (default: no)',
    },
  } as const),
  create: ({ limit, device, copy, volatile: mayLose }: Readonly<Record<string, OptionValue>>): Layer =>
    vram({
      limitBytes: Number(limit),
      ...(device === undefined ? {} : { device: String(device) }),
      ...(copy === undefined ? {} : { copy: String(copy) }),
      ...(mayLose === undefined ? {} : { volatile: mayLose === true }),
    }),
})
