/**
 * Writing: whatever is written goes to the file at once, and a write that was answered is as safe as one of node:fs.
 *
 * Invariants: writers of one file wait for each other (`FileRecord.exclusive`); pages that were read before are dropped
 * when the bytes reach the file (`Versions.past`), so that nobody finds an older byte.
 *
 * Source: write(2), pwritev(2); mm/truncate.c as described in the reference notes, §1.3.
 */
import type { PageCacheCounters } from './counters.ts'
import type { FileIo } from './file-io.ts'
import type { OpenFile } from './file-record.ts'
import type { Versions } from './versions.ts'

/** What writing needs. */
export interface WriterOptions {
  readonly io: FileIo
  readonly versions: Versions
  readonly counters: PageCacheCounters
}

/** How a write ended. */
export interface Written {
  /** Bytes that are in the file: fewer than given only when something went wrong after the first. */
  readonly bytes: number
  /** Where in the file the last of them ends. */
  readonly end: number
}

export class Writer {
  readonly #io: FileIo
  readonly #versions: Versions
  readonly #counters: PageCacheCounters

  constructor({ io, versions, counters }: WriterOptions) {
    this.#io = io
    this.#versions = versions
    this.#counters = counters
  }

  /**
   * Writes the parts one behind the other; `null`: where the file ends. Rejects with the system's error when no byte
   * was written.
   */
  write(handle: OpenFile, parts: readonly Uint8Array[], position: number | null): Promise<Written> {
    return this.change(handle, async () => {
      const bytes = await this.#all(handle.descriptor, parts, position)
      const end = position === null ? Number(this.#io.stat(handle.descriptor).size) : position + bytes
      return { bytes, end }
    })
  }

  /** Does something to the file itself: after others who do, and so that nobody finds what was there before. */
  change<T>(handle: OpenFile, work: () => Promise<T>): Promise<T> {
    return handle.file.exclusive(() => this.#versions.past(handle, work))
  }

  async #all(descriptor: number, parts: readonly Uint8Array[], position: number | null): Promise<number> {
    let done = 0
    let left = parts
    for (;;) {
      const place = position === null ? null : position + done
      let bytes: number
      this.#counters.diskWrites++
      try {
        // Several in one call: who appends is not to find somebody else's bytes between them.
        bytes =
          left.length === 1
            ? await this.#io.write(descriptor, left[0]!, 0, left[0]!.length, place)
            : await this.#io.writev(descriptor, left, place)
      } catch (error) {
        this.#counters.writeErrors++
        // What was written counts; whoever goes on finds the error again.
        if (done > 0) return done
        throw error
      }
      done += bytes
      this.#counters.diskBytesWritten += bytes
      left = behind(left, bytes)
      // A write of nothing would be tried for ever.
      if (left.length === 0 || bytes === 0) return done
    }
  }
}

/** What is left of the parts behind so many bytes. */
function behind(parts: readonly Uint8Array[], bytes: number): readonly Uint8Array[] {
  let skip = bytes
  for (const [n, part] of parts.entries()) {
    if (skip < part.length) return [part.subarray(skip), ...parts.slice(n + 1)]
    skip -= part.length
  }
  return []
}
