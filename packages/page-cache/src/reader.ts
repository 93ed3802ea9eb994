/**
 * Reading: a page comes from the first level, from cleancache, or from the file, and with it some of those behind it.
 *
 * A page that is being filled is locked (`Frame.Loading`); readers wait for nobody but the page they want. When there
 * is no frame to be had, a read goes to the file directly: no call ever fails for want of memory.
 *
 * Source: the hook sites of mm/filemap.c and fs/mpage.c as described in the reference notes, §1.3.
 */
import { type Cleancache, PageState } from '@tmem/cleancache'
import { GetOutcome, none, TmemError } from '@tmem/core'
import type { PageCacheCounters } from './counters.ts'
import type { FileIo } from './file-io.ts'
import type { FileRecord, OpenFile } from './file-record.ts'
import { copy, Frame, type Frames } from './frames.ts'
import type { Versions } from './versions.ts'

/** Pages of the first window of read-ahead, and of the largest. */
const firstWindow = 4
const largestWindow = 32

/** An open file, and where its reader is: the reader's own. */
export interface ReadingFile extends OpenFile {
  /** Page that was read last. */
  lastIndex: number
  /** Pages of the next read-ahead. */
  window: number
}

/** What reading needs. */
export interface ReaderOptions {
  readonly io: FileIo
  readonly frames: Frames
  readonly cleancache: Cleancache
  readonly versions: Versions
  readonly counters: PageCacheCounters
}

export class Reader {
  readonly #io: FileIo
  readonly #frames: Frames
  readonly #cleancache: Cleancache
  readonly #versions: Versions
  readonly #counters: PageCacheCounters
  /** Largest window: with few frames, pages read ahead must not push each other out. */
  readonly #window: number

  constructor({ io, frames, cleancache, versions, counters }: ReaderOptions) {
    this.#io = io
    this.#frames = frames
    this.#cleancache = cleancache
    this.#versions = versions
    this.#counters = counters
    this.#window = Math.max(1, Math.min(largestWindow, frames.count >> 2))
  }

  /** Fills `into` from `at` with up to `length` bytes of the file from `position`; how many, fewer only at the end. */
  async readAt(
    handle: ReadingFile,
    into: Uint8Array,
    at: number,
    length: number,
    position: number,
    sequential: boolean,
  ): Promise<number> {
    const { file } = handle
    const frames = this.#frames
    const { pageSize } = frames
    this.#versions.validate(file, handle.descriptor)
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
        if (tried !== index) this.#counters.hits++
        if ((state & Frame.Ahead) !== 0) this.#counters.readaheadHits++
        copy(frames.pages[frame]!, from, count, into, at + done)
        // Reading a page in small pieces is one access.
        if (handle.lastIndex !== index) frames.touch(frame)
        handle.lastIndex = index
        done += count
      } else if ((state & Frame.Loading) !== 0) {
        frames.pin(frame)
        await frames.loading[frame]
        // Good for this call even if it was dropped meanwhile: it was being read when the call began, or began after
        // that.
        const filled = (frames.state[frame]! & Frame.UpToDate) !== 0
        if (filled) {
          copy(frames.pages[frame]!, from, count, into, at + done)
          done += count
        }
        frames.unpin(frame)
        if (filled) this.#counters.hits++
        else tried = index
      } else if (tried !== index) {
        tried = index
        await this.#load(handle, index, lastIndex, sequential)
      } else {
        const got = await this.#readAround(handle, into, at + done, count, position + done)
        done += got
        if (got < count) break
      }
    }
    return done
  }

  /**
   * Brings a page in, the ones that the call wants after it, and when it reads on from where it was, some more. From
   * cleancache or from the file. What cannot be had is left out: the caller then reads it alone, and finds the error.
   */
  async #load(handle: ReadingFile, index: number, lastIndex: number, sequential: boolean): Promise<void> {
    const { file } = handle
    const frames = this.#frames
    const { pageSize } = frames
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
          this.#counters.readaheadPages++
        } else this.#counters.misses++
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

  /**
   * Asks cleancache for a page at once. A store that broke its word says so to whoever reads; the page is given up
   * first.
   */
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
  async #fetch(handle: ReadingFile, frame: number, page: number): Promise<void> {
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
        this.#counters.cleancacheErrors++
      }
      if (outcome === GetOutcome.Hit) this.#filled(frame, true, Frame.Mapped)
      else await this.#readRun(handle, [frame])
    })()
    this.#frames.loading[frame] = fetched
    await fetched
  }

  /** Reads pages that lie one behind the other. Never rejects: frames that could not be filled are dropped. */
  #readRun(handle: ReadingFile, run: readonly number[]): Promise<void> {
    const { file } = handle
    const frames = this.#frames
    const { pageSize } = frames
    const first = frames.state[run[0]!]! & Frame.Detached ? none : frames.indexOf(run[0]!)
    const reading = (async (): Promise<void> => {
      let got = 0
      const { size } = file
      try {
        // Dropped while cleancache was asked: whoever waits looks again.
        if (first === none) return
        got = await this.#readPages(handle.descriptor, run, first * pageSize)
      } catch {
        // Whoever wants one of the pages reads it alone, and is told.
        this.#counters.readErrors++
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
    const { pageSize } = this.#frames
    const length = run.length * pageSize
    let got = 0
    while (got < length) {
      const page = Math.floor(got / pageSize)
      const buffers = run.slice(page).map((frame) => this.#frames.pages[frame]!)
      if (got % pageSize !== 0) buffers[0] = buffers[0]!.subarray(got % pageSize)
      this.#counters.diskReads++
      const bytes = await this.#io.readv(descriptor, buffers, position + got)
      if (bytes === 0) break
      got += bytes
      this.#counters.diskBytesRead += bytes
    }
    this.#counters.diskPagesRead += Math.ceil(got / pageSize)
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

  /** Reads part of a page past the frames. */
  async #readAround(
    handle: ReadingFile,
    into: Uint8Array,
    at: number,
    count: number,
    position: number,
  ): Promise<number> {
    this.#counters.uncachedReads++
    let got = 0
    try {
      while (got < count) {
        this.#counters.diskReads++
        const bytes = await this.#io.read(handle.descriptor, into, at + got, count - got, position + got)
        if (bytes === 0) break
        got += bytes
        this.#counters.diskBytesRead += bytes
      }
    } catch (error) {
      this.#counters.readErrors++
      throw error
    }
    // A part of a page costs the disk a page.
    if (got > 0) this.#counters.diskPagesRead++
    return got
  }
}
