/**
 * A page cache for files, in a program's own memory, with a second chance behind it: a clean page that falls out is offered to
 * cleancache, and a page that is read is asked for there before the disk.
 *
 * Invariants:
 *  - A byte that is read was in the file (or written here) at some time during the call: never older.
 *  - A page in the first level is the file's as of `FileRecord.stamp` (change time, size), or dirty. Each call compares the
 *    stamp with the file and drops what is out of date.
 *  - The file key names the *version* of a file (device, inode, birth, change time, size): a page in cleancache can be found
 *    only by who sees the same version, also after the file was unlinked and its inode used again.
 *  - Change times have a granularity. As long as a file's own is not older than that, another change could hide behind it: then
 *    pages are kept for the call that read them and no longer, and never put (`settled`).
 *  - A page that holds bytes to be written is dropped only after they are in the file, or were given up with an error that
 *    somebody was told.
 *  - When there is no frame to be had, reads and writes go to the file directly: no call ever fails for want of memory.
 *
 * Nobody can tell a write of ours from one that somebody else made at the same moment. So whoever writes to the file (flush,
 * truncate, direct or appending writes) drops its clean pages afterwards.
 *
 * Locks: a page that is being filled is locked (`Frame.Loading`); writers of one file wait for each other
 * (`FileRecord.exclusive`), readers wait for nobody but the page they want.
 *
 * Source: the hook sites of mm/filemap.c, mm/truncate.c and fs/mpage.c as described in the reference notes, §1.3; dirty ranges of pages
 * that were never read, as in Linux's NFS client.
 */
import { createHash } from 'node:crypto'
import { type BigIntStats, constants } from 'node:fs'
import { Cleancache, type FileKey, keyOfHandle, PageState, type Superblock } from '@tmem/cleancache'
import {
  type Allocator,
  assertPageSize,
  basePageSize,
  GetOutcome,
  none,
  type StatsNode,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { CachedFile } from './cached-file.ts'
import { type FileIo, type FileSystemKind, flagsOf, localDisks, nodeFileIo, type OptIn } from './file-io.ts'
import { Frame, Frames } from './frames.ts'

/** Settings of a page cache. */
export interface PageCacheOptions {
  /** Bytes of pages in the first level: at least 16 pages. Tables take about 110 bytes more per page. */
  readonly sizeBytes: number
  /** Bytes of a page (default 4096). Cleancache wants it to be the file system's block size. */
  readonly pageSize?: number
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
  readonly mode?: number
  /** True: reads and writes go past the cache, as with `O_DIRECT`, but without its rules of alignment. */
  readonly direct?: boolean
}

/** Counters of a page cache. */
export interface PageCacheCounters {
  /** Pages that were in the first level when they were asked for. */
  hits: number
  /** Pages that were not. */
  misses: number
  /** Pages read ahead of anybody who asked, and how many of them were asked for. */
  readaheadPages: number
  readaheadHits: number
  /** Requests to read the file, and what they brought. */
  diskReads: number
  diskPagesRead: number
  diskBytesRead: number
  /** Reads of parts of pages that found no frame, or a page that was half written. */
  uncachedReads: number
  /** Requests to write the file, and what they took. */
  diskWrites: number
  diskBytesWritten: number
  /** Times that a file was found changed by somebody else. */
  foreignChanges: number
  /** Times that pages were dropped because the file was too fresh to tell. */
  unsettledDrops: number
  readErrors: number
  writeErrors: number
  /** Pages that cleancache had and could not give. */
  cleancacheErrors: number
}

const minFrames = 16
/** Pages of the first window of read-ahead, and of the largest. */
const firstWindow = 4
const largestWindow = 32
/** Pages written in one request at most. */
const writeCluster = 64
/** A file system that keeps whole seconds shows it: then this is the granularity, in milliseconds. */
const coarseGranularityMs = 2100

/** What the cache knows of a file, open or not. */
export class FileRecord {
  /** Names the file in `Frames`. */
  readonly number: number
  readonly id: string
  /** Undefined: passed through, nothing is kept. */
  readonly superblock: Superblock | undefined
  /** Instead of the device, for a cluster: the same on all machines. */
  readonly uuid: Uint8Array | undefined
  readonly handles: Set<CachedFile> = new Set()
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

export class PageCache {
  readonly counters: PageCacheCounters = {
    hits: 0,
    misses: 0,
    readaheadPages: 0,
    readaheadHits: 0,
    diskReads: 0,
    diskPagesRead: 0,
    diskBytesRead: 0,
    uncachedReads: 0,
    diskWrites: 0,
    diskBytesWritten: 0,
    foreignChanges: 0,
    unsettledDrops: 0,
    readErrors: 0,
    writeErrors: 0,
    cleancacheErrors: 0,
  }
  readonly pageSize: number
  /** The files; for `CachedFile`. */
  readonly io: FileIo
  readonly #frames: Frames
  readonly #cleancache: Cleancache
  readonly #optIn: (kind: FileSystemKind) => OptIn | undefined
  readonly #granularityMs: number
  readonly #now: () => number
  readonly #inodes: number
  readonly #window: number
  readonly #maxDirty: number
  readonly #mounts: Map<bigint, Promise<Mount>> = new Map()
  /** In the order of their last opening. */
  readonly #files: Map<string, FileRecord> = new Map()
  readonly #byNumber: Map<number, FileRecord> = new Map()
  #nextNumber = 0
  #dirtyPages = 0
  #closing: Promise<void> | undefined

  /**
   * Throws `RangeError` for numbers that make no sense, `TmemError` with `TMEM_NO_MEMORY` when the allocator has too little.
   */
  constructor(options: PageCacheOptions) {
    const { sizeBytes, pageSize = basePageSize, inodes = 65_536, timestampGranularityMs = 20 } = options
    assertPageSize(pageSize)
    const frames = Math.floor(sizeBytes / pageSize)
    if (!(frames >= minFrames && frames <= 2 ** 24 - 1))
      throw new RangeError(`a page cache has ${minFrames} to ${2 ** 24 - 1} pages; ${sizeBytes} bytes are ${frames}`)
    if (!Number.isInteger(inodes) || inodes < 1)
      throw new RangeError(`inodes must be a positive integer, got ${inodes}`)
    if (!(timestampGranularityMs >= 0)) throw new RangeError('timestampGranularityMs must not be negative')
    this.pageSize = pageSize
    this.io = options.io ?? nodeFileIo
    this.#cleancache = options.cleancache ?? new Cleancache()
    this.#optIn = options.optIn ?? localDisks
    this.#granularityMs = timestampGranularityMs
    this.#now = options.now ?? Date.now
    this.#inodes = inodes
    this.#window = Math.max(1, Math.min(largestWindow, frames >> 2))
    this.#maxDirty = frames >> 1
    this.#frames = new Frames(frames, pageSize, options.allocator ?? systemAllocator, (frame) => this.#evicted(frame))
  }

  /**
   * Opens a file, as `open` of node:fs/promises does. Rejects with the system's error, or with `TmemError` (`TMEM_UNSUPPORTED`) for
   * what is no regular file, `TMEM_CLOSED` after `close`.
   */
  async open(path: string, flags: string | number = 'r', options: OpenOptions | number = {}): Promise<CachedFile> {
    this.#assertOpen()
    const { mode = 0o666, direct = false } = typeof options === 'number' ? { mode: options } : options
    const asked = flagsOf(flags)
    // Truncation must tell cleancache, so it is done here; and an appending descriptor can write nowhere but at the end.
    const descriptor = await this.io.open(path, asked & ~constants.O_TRUNC, mode)
    let handle: CachedFile | undefined
    try {
      const stamp = this.io.stat(descriptor)
      if (!stamp.isFile())
        throw new TmemError('TMEM_UNSUPPORTED', `${path} is no regular file: only those have pages`, {
          layer: 'page-cache',
        })
      const mount = await this.#mountOf(stamp.dev, path)
      this.#assertOpen()
      const file = this.#recordOf(stamp, mount)
      handle = new CachedFile(this, file, descriptor, asked, direct || file.superblock === undefined)
      file.handles.add(handle)
      this.#trim()
      if ((asked & constants.O_TRUNC) !== 0) await handle.truncate(0)
      return handle
    } catch (error) {
      if (handle === undefined) await this.io.close(descriptor)
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

  /** Pages that hold bytes to be written. */
  get dirtyPages(): number {
    return this.#dirtyPages
  }

  /** Counters, those of the files if they count, and cleancache's below. */
  stats(): StatsNode {
    const frames = this.#frames
    const files = this.io.stats?.()
    const below = this.#cleancache.stats()
    return {
      name: 'page-cache',
      counters: {
        ...this.counters,
        resident: frames.resident,
        active: frames.active,
        inactive: frames.inactive,
        dirty: this.#dirtyPages,
        activations: frames.activations,
        deactivations: frames.deactivations,
        evictions: frames.evictions,
        inodes: this.#files.size,
      },
      children: files === undefined ? [below] : [files, below],
    }
  }

  /** Closes all files, then gives the pools in cleancache up. Rejects with the first error of a file that could not be written. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    const handles = [...this.#files.values()].flatMap((file) => [...file.handles])
    const results = await Promise.allSettled(handles.map((handle) => handle.close()))
    for (const file of this.#files.values()) this.#forget(file)
    for (const mount of this.#mounts.values()) {
      const { superblock } = await mount
      if (superblock !== undefined) this.#cleancache.invalidateFs(superblock)
    }
    for (const result of results) if (result.status === 'rejected') throw result.reason
  }

  // What follows is for CachedFile.

  /** Fills `into` from `at` with up to `length` bytes of the file from `position`; how many, fewer only at the end. */
  async readAt(
    handle: CachedFile,
    into: Uint8Array,
    at: number,
    length: number,
    position: number,
    sequential: boolean,
  ): Promise<number> {
    const { file } = handle
    const { pageSize } = this
    const frames = this.#frames
    this.validate(file, handle.descriptor)
    const lastIndex = Math.floor((position + length - 1) / pageSize)
    let tried = none
    let done = 0
    while (done < length) {
      const left = Math.min(length - done, file.size - position - done)
      if (left <= 0) break
      const index = Math.floor((position + done) / pageSize)
      const from = position + done - index * pageSize
      const count = Math.min(pageSize - from, left)
      const frame = frames.find(file.number, index)
      const state = frame === none ? 0 : frames.state[frame]!
      if ((state & (Frame.UpToDate | Frame.Loading)) === Frame.UpToDate) {
        if (tried !== index) this.counters.hits++
        if ((state & Frame.Ahead) !== 0) this.counters.readaheadHits++
        copy(frames.pages[frame]!, from, count, into, at + done)
        // Reading a page in small pieces is one access.
        if (handle.lastIndex !== index) frames.touch(frame)
        handle.lastIndex = index
        done += count
      } else if ((state & Frame.Loading) !== 0) {
        frames.pin(frame)
        await frames.loading[frame]
        // Good for this call even if it was dropped meanwhile: it was being read when the call began, or began after that.
        const filled = (frames.state[frame]! & Frame.UpToDate) !== 0
        if (filled) {
          copy(frames.pages[frame]!, from, count, into, at + done)
          done += count
        }
        frames.unpin(frame)
        if (filled) this.counters.hits++
        else tried = index
      } else if (frame === none && tried !== index) {
        tried = index
        await this.#load(handle, index, lastIndex, sequential)
      } else {
        const got = await this.#readAround(handle, frame, into, at + done, count, position + done, from)
        done += got
        if (got < count) break
      }
    }
    return done
  }

  /** Writes to the pages of the file, or past them where there is no frame. How many bytes; throws when there was none. */
  async writeAt(handle: CachedFile, from: Uint8Array, at: number, length: number, position: number): Promise<number> {
    const { file } = handle
    if (this.#dirtyPages > this.#maxDirty) await this.#flushOthers(file)
    return file.exclusive(async () => {
      this.validate(file, handle.descriptor)
      let done = 0
      while (done < length) {
        const index = Math.floor((position + done) / this.pageSize)
        const start = position + done - index * this.pageSize
        const count = Math.min(this.pageSize - start, length - done)
        try {
          if (this.#dirtyPages > this.#maxDirty && file.dirtyPages > 0) await this.flush(file)
          if (await this.#dirty(file, index, start, from, at + done, count)) done += count
          else {
            const written = await this.#past(handle, () =>
              this.#writeAll(handle.descriptor, [from.subarray(at + done, at + done + count)], position + done),
            )
            done += written
          }
        } catch (error) {
          if (done === 0) throw error
          // What was written counts; whoever goes on finds the error again.
          return done
        }
      }
      return done
    })
  }

  /** Compares the file with what is known of it, and drops what is out of date. Never waits. */
  validate(file: FileRecord, descriptor: number): void {
    if (file.superblock === undefined) return
    const stamp = this.io.stat(descriptor)
    const same =
      stamp.ctimeNs === file.stamp.ctimeNs && stamp.size === file.stamp.size && stamp.mtimeNs === file.stamp.mtimeNs
    if (same && file.settled) return
    if (same) {
      if (this.#dropClean(file)) this.counters.unsettledDrops++
      file.settled = this.#isSettled(stamp)
      return
    }
    this.counters.foreignChanges++
    this.#restamp(file, stamp)
  }

  /** Writes what is dirty. For the holder of `exclusive`. Rejects with the system's error; what is not written stays dirty. */
  async flush(file: FileRecord): Promise<void> {
    if (file.dirtyPages === 0) return
    const handle = [...file.handles].find((one) => one.writesPages)
    if (handle === undefined) throw new TmemError('TMEM_BROKEN', 'dirty pages without a file to write them to')
    await this.#past(handle, () => this.#writeDirty(file, handle.descriptor))
  }

  /**
   * Does something to the file itself: cleancache is told before and after, clean pages are dropped afterwards. For
   * the holder of `exclusive`.
   */
  past<T>(handle: CachedFile, work: () => Promise<T>): Promise<T> {
    return this.#past(handle, work)
  }

  /** Makes the file so long. For the holder of `exclusive`. */
  async truncate(handle: CachedFile, length: number): Promise<void> {
    const { file } = handle
    const frames = this.#frames
    await this.#past(handle, async () => {
      // First the file: when that fails nothing was given up.
      await this.io.truncate(handle.descriptor, length)
      for (let frame = frames.first(file.number), next = none; frame !== none; frame = next) {
        next = frames.next(frame)
        const start = frames.indexOf(frame) * this.pageSize
        const kept = length - start
        if ((frames.state[frame]! & Frame.Dirty) === 0 || kept >= frames.dirtyTo[frame]!) continue
        // What is left of a page in part may stay dirty; what lay beyond must not come back with it.
        if (kept > frames.dirtyFrom[frame]!) {
          frames.dirtyTo[frame] = kept
          frames.state[frame] = frames.state[frame]! & ~Frame.UpToDate
        } else {
          this.#clean(file, frame)
          frames.drop(frame)
        }
      }
      this.#recount(file)
    })
  }

  /** A handle was closed. What could not be written is given up when nobody is left who could. */
  closed(handle: CachedFile): void {
    const { file } = handle
    file.handles.delete(handle)
    if (![...file.handles].some((one) => one.writesPages)) {
      const frames = this.#frames
      for (let frame = frames.first(file.number), next = none; frame !== none; frame = next) {
        next = frames.next(frame)
        if ((frames.state[frame]! & Frame.Dirty) === 0) continue
        this.#clean(file, frame)
        frames.drop(frame)
      }
      file.dirtyEnd = 0
    }
    this.#trim()
  }

  async #past<T>(handle: CachedFile, work: () => Promise<T>): Promise<T> {
    const { file, descriptor } = handle
    if (file.superblock === undefined) return work()
    this.validate(file, descriptor)
    const { superblock, key } = file
    return this.#cleancache.aroundInode(superblock, key, async () => {
      try {
        return await work()
      } finally {
        this.#restamp(file, this.io.stat(descriptor))
      }
    })
  }

  /** The file has changed: another version, another key. Clean pages go; of dirty ones only the dirty part is still known. */
  #restamp(file: FileRecord, stamp: BigIntStats): void {
    const { superblock } = file
    this.#cleancache.invalidateInode(superblock!, file.key)
    this.#dropClean(file)
    file.stamp = stamp
    file.diskSize = Number(stamp.size)
    file.sparse = stamp.blocks * 512n < stamp.size
    file.settled = this.#isSettled(stamp)
    file.key = versionKey(stamp, file.uuid)
  }

  #isSettled(stamp: BigIntStats): boolean {
    const coarse = stamp.ctimeNs % 1_000_000_000n === 0n
    const age = this.#now() - Number(stamp.ctimeNs / 1_000_000n)
    return age > (coarse ? Math.max(coarseGranularityMs, this.#granularityMs) : this.#granularityMs)
  }

  /** Drops the pages of a file that are not dirty; whether there were any. */
  #dropClean(file: FileRecord): boolean {
    const frames = this.#frames
    let dropped = false
    for (let frame = frames.first(file.number), next = none; frame !== none; frame = next) {
      next = frames.next(frame)
      const state = frames.state[frame]!
      if ((state & Frame.Dirty) === 0) {
        frames.drop(frame)
        dropped = true
      } else if (frames.dirtyFrom[frame] !== 0 || frames.dirtyTo[frame] !== this.pageSize)
        frames.state[frame] = state & ~(Frame.UpToDate | Frame.Mapped)
    }
    return dropped
  }

  /** A page leaves the first level: to cleancache, if its bytes are sure to be those on disk. */
  #evicted(frame: number): void {
    const frames = this.#frames
    const file = this.#byNumber.get(frames.fileOf(frame))!
    const page = frames.pages[frame]!
    let state: number = PageState.Locked
    if ((frames.state[frame]! & Frame.UpToDate) !== 0 && file.settled) state |= PageState.UpToDate
    if ((frames.state[frame]! & Frame.Mapped) !== 0 && !(file.sparse && isZero(page))) state |= PageState.MappedToDisk
    this.#cleancache.removePage(file.superblock!, file.key, frames.indexOf(frame), page, state)
  }

  /**
   * Brings a page in, the ones that the call wants after it, and when it reads on from where it was, some more. From cleancache
   * or from the file. What cannot be had is left out: the caller then reads it alone, and finds the error.
   */
  async #load(handle: CachedFile, index: number, lastIndex: number, sequential: boolean): Promise<void> {
    const { file } = handle
    const frames = this.#frames
    const { pageSize } = this
    if (sequential) handle.window = Math.min(this.#window, Math.max(firstWindow, handle.window * 2))
    else handle.window = 0
    const end = Math.ceil(file.size / pageSize)
    const wanted = Math.min(lastIndex + 1, index + this.#window, end)
    const until = Math.min(Math.max(wanted, index + handle.window), end)
    const waits: Promise<void>[] = []
    let run: number[] = []
    const submit = (): void => {
      if (run.length > 0) waits.push(this.#readRun(handle, run))
      run = []
    }
    try {
      for (let page = index; page < until; page++) {
        const frame = frames.find(file.number, page) === none ? frames.enter(file.number, page) : none
        if (frame === none) {
          submit()
          continue
        }
        if (page >= wanted) {
          frames.state[frame] = Frame.Ahead
          this.counters.readaheadPages++
        } else this.counters.misses++
        // Until it is filled nobody else may have it.
        frames.state[frame] = frames.state[frame]! | Frame.Loading
        frames.pin(frame)
        const outcome = this.#ask(file, frame, page)
        // A run is one piece of the file.
        if (outcome !== GetOutcome.Miss) submit()
        if (outcome === GetOutcome.Hit) this.#filled(frame, true, Frame.Mapped)
        else if (outcome === GetOutcome.Deferred) {
          waits.push(this.#fetch(handle, frame, page))
        } else run.push(frame)
      }
    } finally {
      submit()
      await Promise.all(waits)
    }
  }

  /** Asks cleancache for a page at once. A store that broke its word says so to whoever reads; the page is given up first. */
  #ask(file: FileRecord, frame: number, page: number): GetOutcome {
    // Nothing is put of a file that is too fresh, so nothing is there.
    if (!file.settled || file.superblock === undefined) return GetOutcome.Miss
    try {
      const into = this.#frames.pages[frame]!
      return this.#cleancache.getPage(file.superblock, file.key, page, into, PageState.Locked)
    } catch (error) {
      this.#filled(frame, false, 0)
      throw error
    }
  }

  /** Waits for a page of cleancache; reads it from the file when that fails. */
  async #fetch(handle: CachedFile, frame: number, page: number): Promise<void> {
    const { file } = handle
    const fetched = (async (): Promise<void> => {
      const into = this.#frames.pages[frame]!
      let outcome: GetOutcome = GetOutcome.Miss
      try {
        outcome = await this.#cleancache.fetchPage(file.superblock!, file.key, page, into, PageState.Locked)
      } catch (error) {
        // The page is on disk as well: a store that cannot give its copy costs one read. Anything worse is loud.
        if (!(error instanceof TmemError) || (error.code !== 'TMEM_IO' && error.code !== 'TMEM_CORRUPT')) {
          this.#filled(frame, false, 0)
          throw error
        }
        this.counters.cleancacheErrors++
      }
      if (outcome === GetOutcome.Hit) this.#filled(frame, true, Frame.Mapped)
      else await this.#readRun(handle, [frame])
    })()
    this.#frames.loading[frame] = fetched
    await fetched
  }

  /** Reads pages that lie one behind the other. Never rejects: frames that could not be filled are dropped. */
  #readRun(handle: CachedFile, run: readonly number[]): Promise<void> {
    const { file } = handle
    const frames = this.#frames
    const { pageSize } = this
    const first = frames.state[run[0]!]! & Frame.Detached ? none : frames.indexOf(run[0]!)
    const reading = (async (): Promise<void> => {
      let got = 0
      const size = file.diskSize
      try {
        // Dropped while cleancache was asked: whoever waits looks again.
        if (first === none) return
        got = await this.#readPages(handle.descriptor, run, first * pageSize)
      } catch {
        // Whoever wants one of the pages reads it alone, and is told.
        this.counters.readErrors++
      } finally {
        for (let at = 0; at < run.length; at++) {
          const expected = Math.max(0, Math.min(pageSize, size - (first + at) * pageSize))
          const bytes = Math.max(0, Math.min(pageSize, got - at * pageSize))
          // Shorter than the stamp says: the file has changed under the read.
          const whole = first !== none && bytes >= expected
          if (whole) frames.pages[run[at]!]!.fill(0, bytes)
          this.#filled(run[at]!, whole, bytes > 0 ? Frame.Mapped : 0)
        }
      }
    })()
    for (const frame of run) frames.loading[frame] = reading
    return reading
  }

  async #readPages(descriptor: number, run: readonly number[], position: number): Promise<number> {
    const { pageSize } = this
    const length = run.length * pageSize
    let got = 0
    while (got < length) {
      const page = Math.floor(got / pageSize)
      const buffers = run.slice(page).map((frame) => this.#frames.pages[frame]!)
      if (got % pageSize !== 0) buffers[0] = buffers[0]!.subarray(got % pageSize)
      this.counters.diskReads++
      const bytes = await this.io.readv(descriptor, buffers, position + got)
      if (bytes === 0) break
      got += bytes
      this.counters.diskBytesRead += bytes
    }
    this.counters.diskPagesRead += Math.ceil(got / pageSize)
    return got
  }

  /** Unlocks a frame: filled, or to be dropped. */
  #filled(frame: number, good: boolean, mapped: number): void {
    const frames = this.#frames
    const state = frames.state[frame]! & ~Frame.Loading
    frames.state[frame] = good ? state | Frame.UpToDate | mapped : state
    frames.loading[frame] = undefined
    // A page of before the last change was dropped by it: good for those who wait for it, and nobody else.
    if ((state & Frame.Detached) === 0 && !good) frames.drop(frame)
    frames.unpin(frame)
  }

  /** Reads part of a page past the frames; over it what is dirty. */
  async #readAround(
    handle: CachedFile,
    frame: number,
    into: Uint8Array,
    at: number,
    count: number,
    position: number,
    from: number,
  ): Promise<number> {
    const { file } = handle
    const frames = this.#frames
    let dirtyFrom = 0
    let dirtyTo = 0
    if (frame !== none) {
      // Held, so that its bytes stay readable when they are written out meanwhile.
      frames.pin(frame)
      dirtyFrom = Math.max(frames.dirtyFrom[frame]!, from)
      dirtyTo = Math.min(frames.dirtyTo[frame]!, from + count)
    }
    const dirtyEnd = file.dirtyEnd
    try {
      let got = 0
      if (dirtyFrom === from && dirtyTo === from + count) got = count
      else {
        this.counters.uncachedReads++
        while (got < count) {
          this.counters.diskReads++
          const bytes = await this.io.read(handle.descriptor, into, at + got, count - got, position + got)
          if (bytes === 0) break
          got += bytes
          this.counters.diskBytesRead += bytes
        }
        // A part of a page costs the disk a page.
        if (got > 0) this.counters.diskPagesRead++
        // Beyond the file on disk, but before bytes that are yet to be written: a hole.
        const hole = Math.min(count, dirtyEnd - position)
        if (hole > got) {
          into.fill(0, at + got, at + hole)
          got = hole
        }
      }
      if (dirtyFrom < dirtyTo) copy(frames.pages[frame]!, dirtyFrom, dirtyTo - dirtyFrom, into, at + dirtyFrom - from)
      return got
    } catch (error) {
      this.counters.readErrors++
      throw error
    } finally {
      if (frame !== none) frames.unpin(frame)
    }
  }

  /** Puts bytes into a page, dirty. False when there is no frame for it. */
  async #dirty(
    file: FileRecord,
    index: number,
    start: number,
    from: Uint8Array,
    at: number,
    count: number,
  ): Promise<boolean> {
    const frames = this.#frames
    const end = start + count
    for (;;) {
      let frame = frames.find(file.number, index)
      if (frame !== none && (frames.state[frame]! & Frame.Loading) !== 0) {
        frames.pin(frame)
        await frames.loading[frame]
        frames.unpin(frame)
        continue
      }
      if (frame === none) frame = frames.enter(file.number, index)
      if (frame === none) return false
      const state = frames.state[frame]!
      const dirty = (state & Frame.Dirty) !== 0
      // Two parts with a gap between them: what lies in the gap is not ours to write.
      if (dirty && (start > frames.dirtyTo[frame]! || end < frames.dirtyFrom[frame]!)) {
        await this.flush(file)
        continue
      }
      copy(from, at, count, frames.pages[frame]!, start)
      frames.dirtyFrom[frame] = dirty ? Math.min(frames.dirtyFrom[frame]!, start) : start
      frames.dirtyTo[frame] = dirty ? Math.max(frames.dirtyTo[frame]!, end) : end
      const whole = frames.dirtyFrom[frame] === 0 && frames.dirtyTo[frame] === this.pageSize
      frames.state[frame] = state | Frame.Dirty | (whole ? Frame.UpToDate : 0)
      if (!dirty) {
        file.dirtyPages++
        this.#dirtyPages++
      }
      file.dirtyEnd = Math.max(file.dirtyEnd, index * this.pageSize + end)
      frames.touch(frame)
      return true
    }
  }

  /** Writes the dirty parts in the order of their places, those that touch in one request. */
  async #writeDirty(file: FileRecord, descriptor: number): Promise<void> {
    const frames = this.#frames
    const { pageSize } = this
    const dirty: number[] = []
    for (let frame = frames.first(file.number); frame !== none; frame = frames.next(frame))
      if ((frames.state[frame]! & Frame.Dirty) !== 0) dirty.push(frame)
    dirty.sort((a, b) => frames.indexOf(a) - frames.indexOf(b))
    const startOf = (frame: number): number => frames.indexOf(frame) * pageSize + frames.dirtyFrom[frame]!
    const endOf = (frame: number): number => frames.indexOf(frame) * pageSize + frames.dirtyTo[frame]!
    for (let first = 0; first < dirty.length; ) {
      let last = first
      while (
        last + 1 < dirty.length &&
        last + 1 - first < writeCluster &&
        startOf(dirty[last + 1]!) === endOf(dirty[last]!)
      )
        last++
      const run = dirty.slice(first, last + 1)
      const start = startOf(run[0]!)
      let written = 0
      try {
        const parts = run.map((frame) =>
          frames.pages[frame]!.subarray(frames.dirtyFrom[frame]!, frames.dirtyTo[frame]!),
        )
        written = await this.#writeAll(descriptor, parts, start, (bytes) => {
          written = bytes
        })
      } finally {
        for (const frame of run) if (endOf(frame) <= start + written) this.#clean(file, frame)
        this.#recount(file)
      }
      first = last + 1
    }
  }

  /** Writes all parts one behind the other. `progress` is told of bytes that are written when more are to come. */
  async #writeAll(
    descriptor: number,
    parts: readonly Uint8Array[],
    position: number,
    progress?: (bytes: number) => void,
  ): Promise<number> {
    let done = 0
    for (const part of parts)
      for (let at = 0; at < part.length; ) {
        this.counters.diskWrites++
        let bytes: number
        try {
          bytes = await this.io.write(descriptor, part, at, part.length - at, position + done)
          // A write of nothing would be tried for ever.
          if (bytes === 0) throw new Error('the file system wrote nothing')
        } catch (error) {
          this.counters.writeErrors++
          throw error
        }
        at += bytes
        done += bytes
        this.counters.diskBytesWritten += bytes
        progress?.(done)
      }
    return done
  }

  /** Finds out where the last byte ends that is yet to be written. */
  #recount(file: FileRecord): void {
    const frames = this.#frames
    file.dirtyEnd = 0
    if (file.dirtyPages === 0) return
    for (let frame = frames.first(file.number); frame !== none; frame = frames.next(frame))
      if ((frames.state[frame]! & Frame.Dirty) !== 0)
        file.dirtyEnd = Math.max(file.dirtyEnd, frames.indexOf(frame) * this.pageSize + frames.dirtyTo[frame]!)
  }

  #clean(file: FileRecord, frame: number): void {
    this.#frames.state[frame] = this.#frames.state[frame]! & ~Frame.Dirty
    file.dirtyPages--
    this.#dirtyPages--
  }

  /** Too much is dirty: files are written until it is not. What fails stays dirty, and its own `sync` or `close` says so. */
  async #flushOthers(mine: FileRecord): Promise<void> {
    for (const file of this.#files.values()) {
      if (this.#dirtyPages <= this.#maxDirty) return
      if (file === mine || file.dirtyPages === 0) continue
      await Promise.allSettled([file.exclusive(() => this.flush(file))])
    }
  }

  async #mountOf(device: bigint, path: string): Promise<Mount> {
    let mount = this.#mounts.get(device)
    if (mount === undefined) {
      mount = this.#mount(path)
      this.#mounts.set(device, mount)
      mount.catch(() => this.#mounts.delete(device))
    }
    return mount
  }

  async #mount(path: string): Promise<Mount> {
    const optIn = this.#optIn(await this.io.kind(path))
    if (optIn === undefined) return { optIn, superblock: undefined }
    const { facts, uuid } = optIn
    const superblock =
      uuid === undefined
        ? this.#cleancache.initFs(facts, this.pageSize)
        : this.#cleancache.initSharedFs(uuid, facts, this.pageSize)
    return { optIn, superblock }
  }

  #recordOf(stamp: BigIntStats, { optIn, superblock }: Mount): FileRecord {
    const id = `${stamp.dev}:${stamp.ino}`
    let file = this.#files.get(id)
    if (file === undefined) {
      file = new FileRecord(this.#nextNumber++, id, stamp, superblock, optIn)
      this.#byNumber.set(file.number, file)
      if (superblock !== undefined) this.#restamp(file, stamp)
    } else this.#files.delete(id)
    this.#files.set(id, file)
    return file
  }

  /** Forgets files that nobody has open, the ones longest unused first, until there are not too many. */
  #trim(): void {
    for (const file of this.#files.values()) {
      if (this.#files.size <= this.#inodes) return
      if (file.handles.size === 0) this.#forget(file)
    }
  }

  /** Pages of a file that is forgotten go the usual way; its key is made again when it is opened again. */
  #forget(file: FileRecord): void {
    const frames = this.#frames
    for (let frame = frames.first(file.number); frame !== none; frame = frames.first(file.number)) {
      this.#evicted(frame)
      frames.drop(frame)
    }
    this.#files.delete(file.id)
    this.#byNumber.delete(file.number)
  }

  #assertOpen(): void {
    if (this.#closing !== undefined)
      throw new TmemError('TMEM_CLOSED', 'the page cache is closed', { layer: 'page-cache' })
  }
}

interface Mount {
  readonly optIn: OptIn | undefined
  readonly superblock: Superblock | undefined
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

/** Copies without making a view of the source when it is copied whole. */
function copy(from: Uint8Array, at: number, length: number, into: Uint8Array, to: number): void {
  into.set(at === 0 && length === from.length ? from : from.subarray(at, at + length), to)
}

function isZero(page: Uint8Array): boolean {
  for (let at = 0; at < page.length; at++) if (page[at] !== 0) return false
  return true
}
