/** The swap file as a layer of a stack: its settings, judged before anything is opened. */
import {
  type ByteAmount,
  bytesOf,
  checkOptions,
  type Layer,
  type LayerContext,
  type LayerFactory,
  maxEntries,
  maxPageSize,
  type OptionNames,
  type OptionValue,
  type PlaceTraits,
  TmemError,
} from '@tmem/core'
import { PageFile, type PageFileIo, TransferBuffers } from '@tmem/page-file'
import { clusterBytes, roomFor, SwapPlace, slotBytes } from './place.ts'

/** Settings of a swap file. */
export interface SwapFileOptions {
  /** Path of the swap file or block device. */
  readonly file: string
  /** Bytes of pages that it holds: a multiple of 4096, at most 64 GiB. */
  readonly sizeBytes: ByteAmount
  /** Use a file or device made with mkswap: pages go to its slots as they are (default: make a file of our own). */
  readonly existing?: boolean
  /**
   * In a file of our own, too, pages go to slots as they are, without frames: what a kernel's swap area is (default:
   * compressed as they come).
   */
  readonly slots?: boolean
  /** Leave a file that was made in place at the end (default: remove it). */
  readonly keep?: boolean
  /**
   * Most bytes that are written in any hour for pages that could as well stay in memory (default: any). Needs the
   * stack's clock.
   */
  readonly bytesPerHour?: ByteAmount
  /** The system that has the file (default: this machine's). */
  readonly files?: PageFileIo
}

const names: OptionNames<SwapFileOptions> = {
  file: true,
  sizeBytes: true,
  existing: 'flag?',
  slots: 'flag?',
  keep: 'flag?',
  bytesPerHour: true,
  files: 'object?',
}

/**
 * The end of a stack: every page finds a place in the swap file. Throws `TypeError` for unknown options, `RangeError`
 * for settings that make no sense.
 */
export function frontswap(options: SwapFileOptions): Layer {
  checkOptions('frontswap', options, names)
  const { existing = false, slots = existing } = options
  const sizeBytes = bytesOf('frontswap', 'sizeBytes', options.sizeBytes)
  const bytesPerHour =
    options.bytesPerHour === undefined ? undefined : bytesOf('frontswap', 'bytesPerHour', options.bytesPerHour)
  if (typeof options.file !== 'string' || options.file === '')
    throw new TypeError('frontswap: file is the path of the swap file or block device; it is missing')
  if (existing && !slots) throw new RangeError('an area made with mkswap has slots')
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < slotBytes || sizeBytes % slotBytes !== 0)
    throw new RangeError(`a swap file has a positive multiple of ${slotBytes} bytes, got ${sizeBytes}`)
  if (sizeBytes / slotBytes > maxEntries)
    throw new RangeError(`a swap file holds at most ${maxEntries * slotBytes} bytes of pages, got ${sizeBytes}`)
  let largest = slotBytes
  while (largest * 2 <= Math.min(maxPageSize, sizeBytes)) largest *= 2
  const traits: PlaceTraits = Object.freeze({
    persistent: true,
    ephemeral: false,
    waits: true,
    survives: 'nothing',
    rawOnly: slots,
    // Twice as many pages that shrink to a half as of those that do not.
    capacity: slots ? sizeBytes / slotBytes : Math.min(maxEntries, (2 * sizeBytes) / slotBytes),
    reservedBytes: sizeBytes,
    maxPageSize: largest,
  })
  const roomBytes = slots ? sizeBytes + slotBytes : roomFor(sizeBytes)
  return Object.freeze({
    name: 'frontswap',
    place: {
      traits,
      open: (context: LayerContext) => {
        const file = openSwapFile({ ...options, bytes: slots ? roomBytes : slotBytes + roomBytes }, context)
        const from = slots ? 0 : slotBytes
        return new SwapPlace({ file, traits, from, roomBytes, slots, bytesPerHour }, context)
      },
    },
  })
}

/** A swap file to open. */
export interface SwapFileRequest extends Pick<SwapFileOptions, 'file' | 'existing' | 'keep' | 'files'> {
  /** Bytes of it that are used, header included. */
  readonly bytes: number
  /** The first 4096 bytes of a file that is made (default: zeros). */
  readonly header?: Uint8Array
}

/**
 * Opens a swap file, with all of its room taken. Throws `TmemError` (`TMEM_IO`, `TMEM_NO_MEMORY`) with nothing left
 * behind.
 */
export function openSwapFile(
  request: SwapFileRequest,
  { allocator, io, onProgress }: Pick<LayerContext, 'allocator' | 'io' | 'onProgress'>,
): PageFile {
  const { file: path, bytes, header, existing = false, keep = false, files } = request
  const content = { name: 'tmem swap file', ...(header === undefined ? {} : { header }) }
  const file = PageFile.open({
    path,
    layer: 'frontswap',
    allocator,
    // A flight is one transfer.
    buffers: new TransferBuffers({ bytes: clusterBytes, allocator, ...(io === 'blocking' ? { count: 1 } : {}) }),
    ...(io === undefined ? {} : { io }),
    ...(files === undefined ? {} : { files }),
    ...(existing ? { mode: 'existing', blockDevice: true } : { mode: 'make', keep, bytes, content }),
  })
  try {
    if (existing) checkArea(file, bytes)
    // Room now: a sparse file would find the disk full in the middle of a swap-out. A device has its blocks.
    // At once, but where the file system has no call for that: there each block is written.
    if (file.isFile) file.fillNow((done, total) => onProgress?.(`taking the room for ${path}`, done, total))
    return file
  } catch (error) {
    file.closeNow()
    throw error
  }
}

/** Throws `TmemError` (`TMEM_IO`) unless the file is a swap area, made by mkswap, with room for so many bytes. */
function checkArea(file: PageFile, bytes: number): void {
  const failure = (what: string): TmemError =>
    new TmemError('TMEM_IO', `swap file ${file.path}: ${what}`, { layer: 'frontswap' })
  if (file.bytes < slotBytes) throw failure('it has no swap header; run mkswap on it first')
  const header = new Uint8Array(slotBytes)
  file.readNow(header, 0, slotBytes, 0)
  if (String.fromCharCode(...header.subarray(slotBytes - 10)) !== 'SWAPSPACE2')
    throw failure('it has no swap header, so its content belongs to somebody else; run mkswap on it first')
  const view = new DataView(header.buffer)
  if (view.getUint32(1024, true) !== 1) throw failure('its swap header is of another version than 1')
  const pages = view.getUint32(1028, true) + 1
  if (pages * slotBytes < bytes)
    throw failure(`its header has ${pages} pages of ${slotBytes} bytes, and ${bytes / slotBytes} are asked for`)
  if (view.getUint32(1032, true) !== 0) throw failure('its header lists bad pages, which are not supported')
  if (file.bytes < bytes) throw failure(`it has ${file.bytes} bytes, fewer than the ${bytes} that its header promises`)
}

/** `frontswap(file=/tmp/swap.img,size=1GiB)` in the text of a stack. */
export const frontswapFactory: LayerFactory = Object.freeze({
  name: 'frontswap',
  summary: 'the end of a stack: pages go to a swap file',
  options: Object.freeze({
    file: { kind: 'text', summary: 'path of the swap file or block device', required: true },
    size: { kind: 'bytes', summary: 'bytes of pages that it holds', required: true, minimum: slotBytes },
    existing: { kind: 'flag', summary: 'use a file or device made with mkswap (default: make the file)' },
    keep: { kind: 'flag', summary: 'leave the file in place at the end' },
    perHour: {
      kind: 'bytes',
      summary: 'most that is written in an hour without need (default: any)',
      minimum: 128 * 1024,
    },
  } as const),
  create: (options: Readonly<Record<string, OptionValue>>): Layer => {
    const { file, size, existing, keep, perHour } = options
    return frontswap({
      file: String(file),
      // A size need not be a whole number of pages in the text.
      sizeBytes: Math.floor(Number(size) / slotBytes) * slotBytes,
      existing: existing === true,
      keep: keep === true,
      ...(perHour === undefined ? {} : { bytesPerHour: Number(perHour) }),
    })
  },
})
