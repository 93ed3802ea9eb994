/** Copying bytes between places in memory. */
import { copyBytes as copy } from '@tmem/core/runtime'

/** Copies `length` bytes. */
export function copyBytes(
  source: Uint8Array,
  sourceAt: number,
  length: number,
  target: Uint8Array,
  targetAt: number,
): void {
  copy.call(source, target, targetAt, sourceAt, sourceAt + length)
}
