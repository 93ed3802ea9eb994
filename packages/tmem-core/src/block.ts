/**
 * A block device made of pages: what ramzswap is and what NBD and FUSE serve.
 *
 * Unlike a store of pages, a device cannot refuse: a write that was acknowledged is kept until it is overwritten or
 * discarded, and a device without room for its whole size says so when it is made. Ranges are in bytes, multiples of
 * `blockSize`, inside of `sizeBytes`; anything else is misuse (`RangeError`) before anything changed.
 *
 * An operation that need not wait is done when it returns `undefined`; one that must wait returns a promise. A failure
 * is thrown or rejects, accordingly: a `TmemError` whose `cause` has the system's own error, so that `ENOSPC` can be
 * told from `EIO`. The caller's buffer belongs to the device until the operation is done. Operations on overlapping
 * ranges that run at the same time have no order among themselves, but each page is written whole.
 */
import type { StatsNode } from './store.ts'

/** Done, or done when the promise resolves. Throws or rejects with `TmemError` when the outside world fails. */
export type Completion = undefined | Promise<void>

/** Bytes by address, in blocks: the rules are at the head of the file. */
export interface BlockDevice {
  /** Name of the device, e.g. `ramzswap0`. */
  readonly name: string
  /** Size in bytes, a multiple of `blockSize`; may change by `resize`. */
  readonly sizeBytes: number
  /**
   * Bytes that `map` would report as allocated, where the device knows without looking: `undefined` where it does not.
   */
  readonly allocatedBytes?: number | undefined
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
  /** Writes zeros; `keep` asks that the room stays reserved (no hole). Without it, as quick as `discard`. */
  zero(at: number, length: number, keep?: boolean): Completion
  /** All writes that were done before are where they survive what the device promises to survive. */
  flush(): Completion
  /**
   * Calls `report` for consecutive runs of the range: whether there are bytes, or only zeros without memory. When it
   * answers false, it knows enough: the device may stop (and need not).
   */
  map(at: number, length: number, report: (length: number, allocated: boolean) => boolean): void
  /**
   * Changes the size while the device is in use, where a device can. What lies beyond a smaller end is gone. Throws
   * `RangeError` for a size that cannot be, `TmemError` when there is no room for it; then nothing has changed.
   */
  resize?(sizeBytes: number): void
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
