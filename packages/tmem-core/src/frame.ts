/**
 * The head of a frame: what says of a block in a slow place whose it is, and that it is what was written.
 *
 * Four words: the checksum of the block under the seal; its length - 1 and codec; a checksum of its handle, so that
 * nobody else's frame is taken for it; the number of its owner.
 */

/** Ties the words of a head together: a checksum under another head does not fit. */
export const sealOf = (form: number, tag: number): number =>
  Math.imul(form ^ 0x5bd1e995, 0x9e3779b1) ^ Math.imul(tag, 0x85ebca6b)
