/**
 * Why a request cannot be done, and what the protocol calls an error of a device. Numbers are the protocol's; 0: it can
 * be.
 */
import { TmemError } from '@tmem/core'
import type { Served } from './negotiation.ts'
import { CommandFlag, Errno } from './protocol.ts'

/** Why a range cannot be read. */
export function judgeRange({ device }: Served, at: number, length: number): number {
  const { sizeBytes, blockSize } = device
  if (at + length > sizeBytes) return Errno.EINVAL
  return at % blockSize === 0 && length % blockSize === 0 ? 0 : Errno.EINVAL
}

/** Why a range cannot be written. */
export function judgeWrite(served: Served, flags: number, allowed: number, at: number, length: number): number {
  if ((flags & ~allowed) !== 0) return Errno.EINVAL
  if (served.readOnly) return Errno.EPERM
  if (at + length > served.device.sizeBytes) return Errno.ENOSPC
  return judgeRange(served, at, length)
}

/** Why the device cannot be given that size. */
export function judgeResize(served: Served, flags: number, size: number): number {
  const { device, resizable, readOnly, connections, isUsedElsewhere } = served
  if ((flags & ~CommandFlag.FUA) !== 0) return Errno.EINVAL
  if (!resizable || readOnly) return Errno.EPERM
  if (size % device.blockSize !== 0 || !Number.isSafeInteger(size)) return Errno.EINVAL
  // Others would lose what they believe to have.
  return size < device.sizeBytes && (connections > 1 || isUsedElsewhere()) ? Errno.EPERM : 0
}

/** The answer to an error of a device. */
export function errnoOf(thrown: unknown): number {
  // Bounded, because causes can be circular.
  let error = thrown
  for (let depth = 0; depth < 8 && error instanceof Error; depth++) {
    switch ((error as NodeJS.ErrnoException).code) {
      case 'ENOSPC':
      case 'EDQUOT':
      case 'EFBIG':
        return Errno.ENOSPC
      case 'EPERM':
      case 'EACCES':
      case 'EROFS':
        return Errno.EPERM
      case 'ENOMEM':
      case 'TMEM_NO_MEMORY':
        return Errno.ENOMEM
      case 'TMEM_CLOSED':
        return Errno.ESHUTDOWN
      default:
    }
    error = error.cause
  }
  // The size may have changed since the range was judged.
  return thrown instanceof RangeError && !(thrown instanceof TmemError) ? Errno.EINVAL : Errno.EIO
}
