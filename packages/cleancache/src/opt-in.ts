/**
 * What a file system must guarantee before its pages may go to cleancache: seven points, of which code can check some
 * and has to be told the others. A file system that says nothing is left alone.
 *
 * Source: the rules for file systems in the cleancache document of the kernel, as in the reference notes, §1.6.
 */
import type { FileHandle } from './keys.ts'

/** What is known of a file system, and what it promises. */
export interface FileSystemFacts {
  /** For messages, e.g. `ext4 on /dev/vda`. */
  readonly name: string
  /** Bytes of its blocks. */
  readonly blockSize: number
  /** Its files rest in memory (tmpfs, ramfs). */
  readonly inMemory: boolean
  /** Promise: whatever removes or truncates pages tells cleancache, by `removePage` or the invalidations. */
  readonly invalidates: boolean
  /** Promise: the inode number of a file is never another file's while pages of the first may be cached. */
  readonly uniqueInodes: boolean
  /** Instead of unique inode numbers: a handle that names the file for good. */
  readonly encodeHandle?: (inode: number | bigint) => FileHandle
  /** Promise: `invalidateFs` is called when the file system goes, before it is shut down. */
  readonly invalidatesAtEnd: boolean
  /** Reads ask cleancache before the disk. Without it pages are put and never got: not wrong, but of no use. */
  readonly readsAskFirst: boolean
  /** Other machines change its files, too. */
  readonly cluster: boolean
}

/** A guarantee that is missing. */
export interface MissingGuarantee {
  /** Number of the guarantee, 1 to 7, as in the reference. */
  readonly guarantee: number
  /** What is wrong, in words. */
  readonly reason: string
}

/** Which of the seven guarantees are missing; an empty list: the file system may opt in. */
export function missingGuarantees(fs: FileSystemFacts, pageSize: number, shared: boolean): readonly MissingGuarantee[] {
  const missing: MissingGuarantee[] = []
  const need = (guarantee: number, kept: boolean, reason: string): void => {
    if (!kept) missing.push({ guarantee, reason: `${fs.name}: ${reason}` })
  }
  need(1, !fs.inMemory, 'its files rest in memory already')
  need(2, fs.invalidates, 'it does not tell of every removal and truncation, so that stale pages would come back')
  need(
    3,
    fs.uniqueInodes || fs.encodeHandle !== undefined,
    'inode numbers are used again and it has no file handles, so that a file would get the pages of another one',
  )
  need(4, fs.invalidatesAtEnd, 'it does not give its pool up when it goes')
  need(5, fs.readsAskFirst, 'its reads do not ask for the pages that it puts')
  need(6, fs.blockSize === pageSize, `its blocks have ${fs.blockSize} bytes, pages have ${pageSize}`)
  need(7, !fs.cluster || shared, 'other machines change its files: it needs a shared pool (initSharedFs)')
  return missing
}
