/**
 * What a page cache knows of a file, open or not: its version, its size, and who has it open.
 *
 * Invariant: `stamp`, `settled`, `sparse`, `size` and `key` belong together (`Versions` sets them).
 */
import type { BigIntStats } from 'node:fs'
import type { FileKey, Superblock } from '@tmem/cleancache'
import type { OptIn } from './file-io.ts'
import { Turns } from './turns.ts'

/** Somebody who has a file open. */
export interface OpenFile {
  readonly file: FileRecord
  /** The system's own descriptor; past the cache. */
  readonly descriptor: number
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
  /** Bytes of the file, by the stamp. */
  size = 0
  readonly #writers = new Turns()

  constructor(number: number, id: string, stamp: BigIntStats, superblock: Superblock | undefined, optIn?: OptIn) {
    this.number = number
    this.id = id
    this.stamp = stamp
    this.superblock = superblock
    this.uuid = optIn?.uuid
  }

  /** Runs what changes the file, one after the other in the order of the calls. */
  exclusive<T>(work: () => Promise<T>): Promise<T> {
    return this.#writers.take(work)
  }
}
