/**
 * Writing: bytes stay in frames until they are flushed, and only the bytes that were written go to the file.
 *
 * Invariants: a page that holds bytes to be written is dropped only after they are in the file, or were given up with an error that
 * somebody was told; writers of one file wait for each other (`FileRecord.exclusive`). When there is no frame to be had, a write goes to
 * the file directly.
 *
 * Source: mm/truncate.c as described in the reference notes, §1.3; dirty ranges of pages that were never read, as in Linux's NFS client.
 */
import { none, TmemError } from '@tmem/core'
import type { PageCacheCounters } from './counters.ts'
import type { FileIo } from './file-io.ts'
import type { FileRecord, OpenFile } from './file-record.ts'
import { copy, Frame, type Frames } from './frames.ts'
import type { Versions } from './versions.ts'

/** Pages written in one request at most. */
const writeCluster = 64

/** What writing needs. */
export interface WriterOptions {
  readonly io: FileIo
  readonly frames: Frames
  readonly versions: Versions
  readonly counters: PageCacheCounters
  /** The files that may have dirty pages. */
  readonly files: () => Iterable<FileRecord>
}

export class Writer {
  readonly #io: FileIo
  readonly #frames: Frames
  readonly #versions: Versions
  readonly #counters: PageCacheCounters
  readonly #files: () => Iterable<FileRecord>
  readonly #maxDirty: number
  #dirtyPages = 0

  constructor({ io, frames, versions, counters, files }: WriterOptions) {
    this.#io = io
    this.#frames = frames
    this.#versions = versions
    this.#counters = counters
    this.#files = files
    this.#maxDirty = frames.count >> 1
  }

  /** Pages that hold bytes to be written. */
  get dirtyPages(): number {
    return this.#dirtyPages
  }

  /** Writes to the pages of the file, or past them where there is no frame. How many bytes; throws when there was none. */
  async writeAt(handle: OpenFile, from: Uint8Array, at: number, length: number, position: number): Promise<number> {
    const { file } = handle
    const { pageSize } = this.#frames
    if (this.#dirtyPages > this.#maxDirty) await this.#flushOthers(file)
    return file.exclusive(async () => {
      this.#versions.validate(file, handle.descriptor)
      let done = 0
      while (done < length) {
        const index = Math.floor((position + done) / pageSize)
        const start = position + done - index * pageSize
        const count = Math.min(pageSize - start, length - done)
        try {
          if (this.#dirtyPages > this.#maxDirty && file.dirtyPages > 0) await this.flush(file)
          if (await this.#dirty(file, index, start, from, at + done, count)) done += count
          else {
            const written = await this.#versions.past(handle, () =>
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

  /** Writes what is dirty. For the holder of `exclusive`. Rejects with the system's error; what is not written stays dirty. */
  async flush(file: FileRecord): Promise<void> {
    if (file.dirtyPages === 0) return
    const handle = [...file.handles].find((one) => one.writesPages)
    if (handle === undefined) throw new TmemError('TMEM_BROKEN', 'dirty pages without a file to write them to')
    await this.#versions.past(handle, () => this.#writeDirty(file, handle.descriptor))
  }

  /** Makes the file so long. For the holder of `exclusive`. */
  async truncate(handle: OpenFile, length: number): Promise<void> {
    const { file } = handle
    const frames = this.#frames
    await this.#versions.past(handle, async () => {
      // First the file: when that fails nothing was given up.
      await this.#io.truncate(handle.descriptor, length)
      for (let frame = frames.first(file.number), next = none; frame !== none; frame = next) {
        next = frames.next(frame)
        const start = frames.indexOf(frame) * frames.pageSize
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

  /** A file was closed by somebody. What could not be written is given up when nobody is left who could. */
  giveUp(file: FileRecord): void {
    if ([...file.handles].some((one) => one.writesPages)) return
    const frames = this.#frames
    for (let frame = frames.first(file.number), next = none; frame !== none; frame = next) {
      next = frames.next(frame)
      if ((frames.state[frame]! & Frame.Dirty) === 0) continue
      this.#clean(file, frame)
      frames.drop(frame)
    }
    file.dirtyEnd = 0
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
      const whole = frames.dirtyFrom[frame] === 0 && frames.dirtyTo[frame] === frames.pageSize
      frames.state[frame] = state | Frame.Dirty | (whole ? Frame.UpToDate : 0)
      if (!dirty) {
        file.dirtyPages++
        this.#dirtyPages++
      }
      file.dirtyEnd = Math.max(file.dirtyEnd, index * frames.pageSize + end)
      frames.touch(frame)
      return true
    }
  }

  /** Writes the dirty parts in the order of their places, those that touch in one request. */
  async #writeDirty(file: FileRecord, descriptor: number): Promise<void> {
    const frames = this.#frames
    const { pageSize } = frames
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
        this.#counters.diskWrites++
        let bytes: number
        try {
          bytes = await this.#io.write(descriptor, part, at, part.length - at, position + done)
          // A write of nothing would be tried for ever.
          if (bytes === 0) throw new Error('the file system wrote nothing')
        } catch (error) {
          this.#counters.writeErrors++
          throw error
        }
        at += bytes
        done += bytes
        this.#counters.diskBytesWritten += bytes
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
        file.dirtyEnd = Math.max(file.dirtyEnd, frames.indexOf(frame) * frames.pageSize + frames.dirtyTo[frame]!)
  }

  #clean(file: FileRecord, frame: number): void {
    this.#frames.state[frame] = this.#frames.state[frame]! & ~Frame.Dirty
    file.dirtyPages--
    this.#dirtyPages--
  }

  /** Too much is dirty: files are written until it is not. What fails stays dirty, and its own `sync` or `close` says so. */
  async #flushOthers(mine: FileRecord): Promise<void> {
    for (const file of this.#files()) {
      if (this.#dirtyPages <= this.#maxDirty) return
      if (file === mine || file.dirtyPages === 0) continue
      await Promise.allSettled([file.exclusive(() => this.flush(file))])
    }
  }
}
