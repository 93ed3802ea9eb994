/** The swap file as a layer of a stack: its settings, judged before anything is opened. */
import {
  type Layer,
  type LayerContext,
  type LayerFactory,
  maxEntries,
  maxPageSize,
  type OptionValue,
  type PlaceTraits,
} from '@tmem/core'
import { roomFor, SwapPlace, slotBytes } from './place.ts'
import { openPlain } from './plain.ts'

/** Settings of a swap file. */
export interface SwapFileOptions {
  /** Path of the swap file or block device. */
  readonly file: string
  /** Bytes of pages that it holds: a multiple of 4096, at most 64 GiB. */
  readonly sizeBytes: number
  /** Use a file or device made with mkswap: pages go to its slots as they are (default: make a file of our own). */
  readonly existing?: boolean
  /** Leave a file that was made in place at the end (default: remove it). */
  readonly keep?: boolean
  /** Most bytes that are written in any hour for pages that could as well stay in memory (default: any). Needs the stack's clock. */
  readonly bytesPerHour?: number
}

/** The end of a stack: every page finds a place in the swap file. Throws `RangeError` for settings that make no sense. */
export function frontswap(options: SwapFileOptions): Layer {
  const { sizeBytes, existing = false, bytesPerHour } = options
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
    rawOnly: existing,
    capacity: sizeBytes / slotBytes,
    reservedBytes: sizeBytes,
    maxPageSize: largest,
  })
  const roomBytes = existing ? sizeBytes + slotBytes : roomFor(sizeBytes)
  return Object.freeze({
    name: 'frontswap',
    place: {
      traits,
      open: (context: LayerContext) =>
        new SwapPlace(
          {
            file: openPlain(options.file),
            traits,
            from: existing ? 0 : slotBytes,
            roomBytes,
            slots: existing,
            bytesPerHour,
          },
          context,
        ),
    },
  })
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
