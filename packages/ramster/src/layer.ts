/** Memory of other machines as a layer of a stack: its settings, judged before anything is reached. */
import {
  type ByteAmount,
  bytesOf,
  checkOptions,
  type Layer,
  type LayerContext,
  maxEntries,
  maxPageSize,
  type PlaceTraits,
} from '@tmem/core'
import { openRamster, unitBytes } from './place.ts'
import type { RemotePlan } from './remote.ts'

/** Settings of ramster. */
export interface RamsterOptions {
  /**
   * The machines: 1 to 8. With one, only pages that may vanish go there; with more, those that may not go to two of
   * them. They must share nothing: not the computer, not the server.
   */
  readonly machines: readonly RemotePlan[]
  /** Bytes of blocks that it holds, copies not counted: 1 MiB to 256 GiB. Takes 1 % of it as memory here. */
  readonly sizeBytes: ByteAmount
}

const minSizeBytes = 2 ** 20
const maxSizeBytes = 2 ** 38
const mostMachines = 8

/**
 * Blocks in the memory of other machines. Throws `TypeError` for unknown options, `RangeError` for settings that make
 * no sense.
 */
export function ramster(options: RamsterOptions): Layer {
  checkOptions('ramster', options, { machines: true, sizeBytes: true })
  const { machines } = options
  const sizeBytes = bytesOf('ramster', 'sizeBytes', options.sizeBytes)
  if (!Array.isArray(machines) || machines.length < 1 || machines.length > mostMachines)
    throw new RangeError(`ramster: machines is a list of 1 to ${mostMachines} machines`)
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < minSizeBytes || sizeBytes > maxSizeBytes)
    throw new RangeError(`ramster: sizeBytes is ${minSizeBytes} to ${maxSizeBytes}, got ${sizeBytes}`)
  const persistent = machines.length > 1
  const traits: PlaceTraits = Object.freeze({
    persistent,
    ephemeral: true,
    waits: true,
    survives: 'nothing',
    rawOnly: false,
    capacity: Math.min(maxEntries, Math.floor(sizeBytes / 2048)),
    // A machine may be full, or away.
    reservedBytes: 0,
    maxPageSize,
  })
  return Object.freeze({
    name: 'ramster',
    place: {
      traits,
      open: (context: LayerContext) =>
        openRamster({ traits, machines, sizeBytes: Math.floor(sizeBytes / unitBytes) * unitBytes }, context),
    },
  })
}
