/**
 * Which version of a file the pages in memory are of: each call compares the file's change time and size with what is
 * known, and drops what is out of date.
 *
 * The file key names the version (device, inode, birth, change time, size): a page in cleancache can be found only by
 * who sees the same version. Change times have a granularity. As long as a file's own is not older than that, another
 * change could hide behind it: then pages are kept for the call that read them and no longer, and never put
 * (`settled`).
 *
 * Nobody can tell a write of ours from one that somebody else made at the same moment. So whoever does something to the
 * file itself (`past`) drops its pages afterwards.
 */
import { createHash } from 'node:crypto'
import type { BigIntStats } from 'node:fs'
import { type Cleancache, type FileKey, keyOfHandle } from '@tmem/cleancache'
import { none } from '@tmem/core'
import type { PageCacheCounters } from './counters.ts'
import type { FileIo } from './file-io.ts'
import type { FileRecord, OpenFile } from './file-record.ts'
import type { Frames } from './frames.ts'

/** A file system that keeps whole seconds shows it: then this is the granularity, in milliseconds. */
const coarseGranularityMs = 2100

/** What versions are told by. */
export interface VersionsOptions {
  readonly io: FileIo
  readonly frames: Frames
  readonly cleancache: Cleancache
  readonly counters: PageCacheCounters
  /** Largest difference between two changes that have the same change time, in milliseconds. */
  readonly granularityMs: number
  /** The clock that change times are compared with, in milliseconds. */
  readonly now: () => number
}

export class Versions {
  readonly #io: FileIo
  readonly #frames: Frames
  readonly #cleancache: Cleancache
  readonly #counters: PageCacheCounters
  readonly #granularityMs: number
  readonly #now: () => number

  constructor({ io, frames, cleancache, counters, granularityMs, now }: VersionsOptions) {
    this.#io = io
    this.#frames = frames
    this.#cleancache = cleancache
    this.#counters = counters
    this.#granularityMs = granularityMs
    this.#now = now
  }

  /** Compares the file with what is known of it, and drops what is out of date. Never waits. */
  validate(file: FileRecord, descriptor: number): void {
    if (file.superblock === undefined) return
    const stamp = this.#io.stat(descriptor)
    const same =
      stamp.ctimeNs === file.stamp.ctimeNs && stamp.size === file.stamp.size && stamp.mtimeNs === file.stamp.mtimeNs
    if (same && file.settled) return
    if (same) {
      if (this.#drop(file)) this.#counters.unsettledDrops++
      file.settled = this.#isSettled(stamp)
      return
    }
    this.#counters.foreignChanges++
    this.restamp(file, stamp)
  }

  /**
   * Does something to the file itself: cleancache is told before and after, pages are dropped afterwards. For
   * the holder of `exclusive`.
   */
  async past<T>({ file, descriptor }: OpenFile, work: () => Promise<T>): Promise<T> {
    if (file.superblock === undefined) return work()
    this.validate(file, descriptor)
    const { superblock, key } = file
    return this.#cleancache.aroundInode(superblock, key, async () => {
      try {
        return await work()
      } finally {
        this.restamp(file, this.#io.stat(descriptor))
      }
    })
  }

  /** The file has changed: another version, another key. Its pages go. */
  restamp(file: FileRecord, stamp: BigIntStats): void {
    const { superblock } = file
    this.#cleancache.invalidateInode(superblock!, file.key)
    this.#drop(file)
    file.stamp = stamp
    file.size = Number(stamp.size)
    file.sparse = stamp.blocks * 512n < stamp.size
    file.settled = this.#isSettled(stamp)
    file.key = versionKey(stamp, file.uuid)
  }

  #isSettled(stamp: BigIntStats): boolean {
    const coarse = stamp.ctimeNs % 1_000_000_000n === 0n
    const age = this.#now() - Number(stamp.ctimeNs / 1_000_000n)
    return age > (coarse ? Math.max(coarseGranularityMs, this.#granularityMs) : this.#granularityMs)
  }

  /** Drops the pages of a file; whether there were any. */
  #drop(file: FileRecord): boolean {
    const frames = this.#frames
    let dropped = false
    for (let frame = frames.first(file.number); frame !== none; frame = frames.first(file.number)) {
      frames.drop(frame)
      dropped = true
    }
    return dropped
  }
}

/** Names one version of one file: 24 bytes of a hash over what tells versions apart. */
function versionKey(stamp: BigIntStats, uuid: Uint8Array | undefined): FileKey | undefined {
  const words = new BigInt64Array([
    uuid === undefined ? stamp.dev : 0n,
    stamp.ino,
    stamp.birthtimeNs,
    stamp.ctimeNs,
    stamp.size,
  ])
  const digest = createHash('sha256')
    .update(uuid ?? new Uint8Array())
    .update(words)
    .digest()
  return keyOfHandle({ type: 1, words: Array.from({ length: 6 }, (_, word) => digest.readUInt32LE(word * 4)) })
}
