/**
 * A page cache for files, in a program's own memory, with a second chance behind it: a clean page that falls out is
 * offered to cleancache, and a page that is read is asked for there before the disk.
 *
 * This file puts the parts together and opens files: what is known of them (`files.ts`, `versions.ts`), the frames
 * (`frames.ts`), reading (`reader.ts`), writing (`writer.ts`), and a file handle over them (`cached-file.ts`).
 *
 * Invariants:
 *  - A byte that is read was in the file at some time during the call: never older.
 *  - A page in the first level is the file's as of `FileRecord.stamp` (change time, size).
 *  - A byte that is written is in the file when the call is answered: nothing is lost by who never closes.
 *  - When there is no frame to be had, reads and writes go to the file directly: no call ever fails for want of memory.
 */
import { constants, type Mode, type PathLike } from 'node:fs'
import { Cleancache } from '@tmem/cleancache'
import {
  type Allocator,
  assertPageSize,
  type ByteAmount,
  basePageSize,
  bytesOf,
  checkOptions,
  type StatsNode,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { CachedFile, type FileParts } from './cached-file.ts'
import { type PageCacheCounters, zeroCounters } from './counters.ts'
import { type FileIo, type FileSystemKind, flagsOf, localDisks, nodeFileIo, type OptIn } from './file-io.ts'
import { Files } from './files.ts'
import { Frames } from './frames.ts'
import { Reader } from './reader.ts'
import { Versions } from './versions.ts'
import { Writer } from './writer.ts'

/** Settings of a page cache. */
export interface PageCacheOptions {
  /** Bytes of pages in the first level: at least 16 pages. Tables take about 100 bytes more per page. */
  readonly sizeBytes: ByteAmount
  /** Bytes of a page (default 4096). Cleancache wants it to be the file system's block size. */
  readonly pageSize?: ByteAmount
  /** Where clean pages go that fall out (default: nowhere). */
  readonly cleancache?: Cleancache
  /** Files remembered while nobody has them open (default 65,536). */
  readonly inodes?: number
  /** Which file systems take part, and how; `undefined`: files are passed through (default: `localDisks`). */
  readonly optIn?: (kind: FileSystemKind) => OptIn | undefined
  /** Largest difference between two changes that have the same change time, in milliseconds (default 20). */
  readonly timestampGranularityMs?: number
  /** The clock that change times are compared with, in milliseconds (default `Date.now`). */
  readonly now?: () => number
  readonly allocator?: Allocator
  /** The files (default: this machine's, through its cache; `DirectReads` goes around it). */
  readonly io?: FileIo
}

/** Settings of `open` beside path and flags. */
export interface OpenOptions {
  /** Permissions of a file that is made (default 0o666). */
  readonly mode?: Mode
  /** True: reads and writes go past the cache, as with `O_DIRECT`, but without its rules of alignment. */
  readonly direct?: boolean
}

const minFrames = 16

export class PageCache {
  readonly counters: PageCacheCounters = zeroCounters()
  readonly pageSize: number
  readonly #io: FileIo
  readonly #cleancache: Cleancache
  readonly #frames: Frames
  readonly #files: Files
  readonly #parts: FileParts
  #closing: Promise<void> | undefined

  /**
   * Throws `RangeError` for numbers that make no sense, `TmemError` with `TMEM_NO_MEMORY` when the allocator has too
   * little.
   */
  constructor(options: PageCacheOptions) {
    checkOptions('PageCache', options, {
      sizeBytes: 'bytes',
      pageSize: 'bytes?',
      cleancache: 'object?',
      inodes: 'number?',
      optIn: 'function?',
      timestampGranularityMs: 'number?',
      now: 'function?',
      allocator: 'object?',
      io: 'object?',
    })
    const sizeBytes = bytesOf('PageCache', 'sizeBytes', options.sizeBytes)
    const pageSize = bytesOf('PageCache', 'pageSize', options.pageSize ?? basePageSize)
    const { inodes = 65_536, timestampGranularityMs = 20 } = options
    assertPageSize(pageSize)
    const frames = Math.floor(sizeBytes / pageSize)
    if (!(frames >= minFrames && frames <= 2 ** 24 - 1))
      throw new RangeError(`a page cache has ${minFrames} to ${2 ** 24 - 1} pages; ${sizeBytes} bytes are ${frames}`)
    if (!Number.isInteger(inodes) || inodes < 1)
      throw new RangeError(`inodes must be a positive integer, got ${inodes}`)
    if (!(timestampGranularityMs >= 0)) throw new RangeError('timestampGranularityMs must not be negative')
    const { io = nodeFileIo, cleancache = new Cleancache(), allocator = systemAllocator } = options
    const { now = Date.now, optIn = localDisks } = options
    const { counters } = this
    this.pageSize = pageSize
    this.#io = io
    this.#cleancache = cleancache
    this.#frames = new Frames(frames, pageSize, allocator, (frame) => this.#files.evicted(frame))
    const shared = { io, cleancache, counters, frames: this.#frames }
    const versions = new Versions({ ...shared, granularityMs: timestampGranularityMs, now })
    this.#files = new Files({ ...shared, versions, optIn, inodes })
    this.#parts = {
      io,
      reader: new Reader({ ...shared, versions }),
      writer: new Writer({ ...shared, versions }),
      closed: (file) => {
        file.file.handles.delete(file)
        this.#files.trim()
      },
    }
  }

  /**
   * Opens a file, as `open` of node:fs/promises does. Rejects with the system's error, or with `TmemError`
   * (`TMEM_UNSUPPORTED`) for what is no regular file, `TMEM_CLOSED` after `close`.
   */
  async open(
    path: PathLike,
    flags: string | number = 'r',
    options: OpenOptions | Mode | null = {},
  ): Promise<CachedFile> {
    this.#assertOpen()
    const { mode = 0o666, direct = false } = typeof options === 'object' ? (options ?? {}) : { mode: options }
    const asked = flagsOf(flags)
    // Truncation must tell cleancache, so it is done here; and an appending descriptor can write nowhere but at the
    // end.
    const descriptor = await this.#io.open(path, asked & ~constants.O_TRUNC, mode)
    let handle: CachedFile | undefined
    try {
      const stamp = this.#io.stat(descriptor)
      if (!stamp.isFile())
        throw new TmemError('TMEM_UNSUPPORTED', `${String(path)} is no regular file: only those have pages`, {
          layer: 'page-cache',
        })
      const mount = await this.#files.mountOf(stamp.dev, path)
      this.#assertOpen()
      const file = this.#files.recordOf(stamp, mount)
      handle = new CachedFile(this.#parts, file, descriptor, asked, direct || file.superblock === undefined)
      file.handles.add(handle)
      this.#files.trim()
      if ((asked & constants.O_TRUNC) !== 0) await handle.truncate(0)
      return handle
    } catch (error) {
      if (handle === undefined) await this.#io.close(descriptor)
      else await handle.close()
      throw error
    }
  }

  /** Offers all clean pages to cleancache and forgets them, as writing 1 to `drop_caches` does. Answers how many. */
  dropCaches(): number {
    return this.#frames.evict(this.#frames.count)
  }

  /** Pages in the first level. */
  get residentPages(): number {
    return this.#frames.resident
  }

  /** Counters, those of the files if they count, and cleancache's below. */
  stats(): StatsNode {
    const frames = this.#frames
    const files = this.#io.stats?.()
    const below = this.#cleancache.stats()
    return {
      name: 'page-cache',
      counters: {
        ...this.counters,
        resident: frames.resident,
        active: frames.active,
        inactive: frames.inactive,
        activations: frames.activations,
        deactivations: frames.deactivations,
        evictions: frames.evictions,
        inodes: this.#files.count,
      },
      children: files === undefined ? [below] : [files, below],
    }
  }

  /** Closes all files, then gives the pools in cleancache up. Rejects with the first error of a file. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    const handles = [...this.#files.all()].flatMap((file) => [...file.handles])
    const results = await Promise.allSettled(handles.map((handle) => handle.close()))
    await this.#files.close()
    for (const result of results) if (result.status === 'rejected') throw result.reason
  }

  #assertOpen(): void {
    if (this.#closing !== undefined)
      throw new TmemError('TMEM_CLOSED', 'the page cache is closed', { layer: 'page-cache' })
  }
}
