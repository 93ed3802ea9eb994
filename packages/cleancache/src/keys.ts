/**
 * File keys: what names a file to cleancache, 24 bytes, seen as six 32-bit words.
 *
 * A file system that can encode file handles gives the handle; any other gives the inode number; words that are not
 * used are zero. A key is computed once for each file that is opened, not for each page.
 *
 * Source: cleancache_get_key of Linux 3.0 to 4.x as described in the reference notes, §1.2.
 */
import { maxObjectId, type ObjectId } from '@tmem/core'

/** Names a file in the pool of its file system: word 0 is the lowest 32 bits. */
export type FileKey = ObjectId

/** Words of a file key. */
export const fileKeyWords = 6

/** Handle types that name no file of their own. */
export const HandleType = {
  /** The root of the file system: types up to this one. */
  Root: 0,
  /** The file system has no handle for this file. */
  Invalid: 255,
} as const

/** A file handle, as a file system encodes it for those who find the file again later. */
export interface FileHandle {
  /** What kind of handle: 0 to 255. */
  readonly type: number
  /** Its 32-bit words. */
  readonly words: readonly number[] | Uint32Array
}

/**
 * The key of a file that its inode number names: unique while the file exists. Throws `RangeError` outside of 64 bits.
 */
export function keyOfInode(inode: number | bigint): FileKey {
  const wide = BigInt(inode)
  if (wide < 0n || wide >> 64n !== 0n) throw new RangeError(`an inode number has 64 bits, got ${inode}`)
  return wide <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(wide) : wide
}

/**
 * The key of a file that a handle names, or `undefined`: then its pages are not cached. That is so when the type is at
 * or below `Root`, or `Invalid`, when the handle has more than six words, and for the id that tmem reserves (all bits
 * set).
 */
export function keyOfHandle({ type, words }: FileHandle): FileKey | undefined {
  if (type <= HandleType.Root || type === HandleType.Invalid || words.length > fileKeyWords) return undefined
  let key = 0n
  for (let word = words.length - 1; word >= 0; word--) key = (key << 32n) | BigInt(words[word]! >>> 0)
  if (key > maxObjectId) return undefined
  return key <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(key) : key
}
