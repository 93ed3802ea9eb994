/**
 * A block device made of pages: what ramzswap is and what NBD and FUSE serve.
 *
 * Unlike a store of pages, a device cannot refuse: a write that was acknowledged is kept until it is overwritten or
 * discarded, and a device without room for its whole size says so when it is made. Ranges are in bytes, multiples of
 * `blockSize`, inside of `sizeBytes`; anything else is misuse (`RangeError`) before anything changed.
 *
 * An operation that need not wait is done when it returns `undefined`; one that must wait returns a promise. The caller's
 * buffer belongs to the device until then. Operations on overlapping ranges that run at the same time have no order
 * among themselves, but each page is written whole.
 */
import type { StatsNode } from './store.ts'

/** Done, or done when the promise resolves. Rejects with `TmemError` when the outside world fails. */
export type Completion = undefined | Promise<void>

export interface BlockDevice {
  /** Name of the device, e.g. `ramzswap0`. */
  readonly name: string
  /** Size in bytes, a multiple of `blockSize`; may change by `resize`. */
  readonly sizeBytes: number
  /** Smallest unit of a request: 512 bytes, or more where the device cannot do less. */
  readonly blockSize: number
  /** Unit in which requests are cheapest, e.g. 4096. */
  readonly preferredBlockSize: number
  readonly readOnly: boolean
  /** Fills `into` with the bytes from `at` on; what was never written, or discarded, reads as zeros. */
  read(at: number, into: Uint8Array): Completion
  /** Writes `bytes` from `at` on. */
  write(at: number, bytes: Uint8Array): Completion
  /** The range is not needed any more: it reads as zeros afterwards, and its memory is given back. */
  discard(at: number, length: number): Completion
  /** Writes zeros; `keep` asks that the room stays reserved (no hole). */
  zero(at: number, length: number, keep?: boolean): Completion
  /** All writes that were done before are where they survive what the device promises to survive. */
  flush(): Completion
  /** Calls `report` for consecutive runs of the range: whether there are bytes, or only zeros without memory. */
  map(at: number, length: number, report: (length: number, allocated: boolean) => void): void
  stats(): StatsNode
  /** Gives everything back. Idempotent. */
  close(): Promise<void>
}

/** Throws `RangeError` unless the range is in whole blocks inside of the device. */
export function assertBlockRange(device: BlockDevice, at: number, length: number): void {
  const { blockSize, sizeBytes } = device
  if (!Number.isSafeInteger(at) || !Number.isSafeInteger(length) || at < 0 || length < 0 || at + length > sizeBytes)
    throw new RangeError(`${length} bytes at ${at} are outside of ${device.name}, which has ${sizeBytes}`)
  if (at % blockSize !== 0 || length % blockSize !== 0)
    throw new RangeError(`${length} bytes at ${at} are not in whole blocks of ${blockSize} bytes of ${device.name}`)
}
