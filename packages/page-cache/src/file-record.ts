/**
 * What a page cache knows of a file, open or not: its version, its size, and who has it open.
 *
 * Invariants: `stamp`, `settled`, `sparse`, `diskSize` and `key` belong together (`Versions` sets them); `dirtyPages` and `dirtyEnd` are
 * those of the frames of the file (`Writer` counts them).
 */
import type { BigIntStats } from 'node:fs'
import type { FileKey, Superblock } from '@tmem/cleancache'
import type { OptIn } from './file-io.ts'

/** Somebody who has a file open. */
export interface OpenFile {
  readonly file: FileRecord
  /** The system's own descriptor; past the cache. */
  readonly descriptor: number
  /** Whether dirty pages may be written through it. */
  readonly writesPages: boolean
  close(): Promise<void>
}

/** What the cache knows of a file, open or not. */
export class FileRecord {
  /** Names the file in `Frames`. */
  readonly number: number
  readonly id: string
  /** Undefined: passed through, nothing is kept. */
  readonly superblock: Superblock | undefined
  /** Instead of the device, for a cluster: the same on all machines. */
  readonly uuid: Uint8Array | undefined
  readonly handles: Set<OpenFile> = new Set()
  key: FileKey | undefined
  stamp: BigIntStats
  /** The stamp is so old that any later change would have another. */
  settled = false
  /** Fewer blocks than its size needs: zeros may be holes. */
  sparse = false
  /** Bytes of the file on disk, by the stamp; and where the last byte ends that is yet to be written. */
  diskSize = 0
  dirtyEnd = 0
  dirtyPages = 0
  #queue: Promise<unknown> = Promise.resolve()

  constructor(number: number, id: string, stamp: BigIntStats, superblock: Superblock | undefined, optIn?: OptIn) {
    this.number = number
    this.id = id
    this.stamp = stamp
    this.superblock = superblock
    this.uuid = optIn?.uuid
  }

  /** Bytes of the file as everybody here sees it. */
  get size(): number {
    return Math.max(this.diskSize, this.dirtyEnd)
  }

  /** Runs one after the other, in the order of the calls. */
  exclusive<T>(work: () => Promise<T>): Promise<T> {
    const mine = this.#queue.then(work)
    // The next one in the queue does not care how this one ended: its caller does.
    this.#queue = mine.catch(() => undefined)
    return mine
  }
}
