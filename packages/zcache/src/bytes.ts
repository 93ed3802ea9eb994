/** The runtime's own copy, which takes offsets, so that no page operation makes a view. */
const copy: (
  this: Uint8Array,
  target: Uint8Array,
  targetStart: number,
  sourceStart: number,
  sourceEnd: number,
) => number = Buffer.prototype.copy

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
