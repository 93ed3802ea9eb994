/**
 * Files that are read around the operating system's cache (`O_DIRECT`): for a program whose own cache is to be the only
 * one.
 *
 * Each file that can be read is opened a second time, by its descriptor, for direct reading. Whole pages are read
 * through buffers of our own and copied from there: direct transfers want memory that is aligned for the device, and
 * JavaScript cannot see addresses. So the first read into a buffer is tried at every multiple of 16 bytes (the
 * allocator's alignment) until the kernel takes it.
 *
 * Everything else (writes, parts of pages, the rest after a short read) takes the ordinary way; the kernel keeps both
 * coherent. So does all reading where direct transfers are refused, for a file or for its whole file system: `stats`
 * and `refused` say so.
 *
 * Invariants: a direct descriptor lives exactly as long as the descriptor that it belongs to; a buffer has one reader
 * at a time.
 *
 * Source: open(2), NOTES on O_DIRECT; proc(5) for /proc/self/fd.
 */
import { constants, type Mode, type PathLike, type TimeLike } from 'node:fs'
import { types } from 'node:util'
import { type Allocator, checkOptions, type StatsNode, systemAllocator, TmemError } from '@tmem/core'
import { type FileIo, nodeFileIo } from './file-io.ts'

/** Settings of direct reading. */
export interface DirectReadsOptions {
  /** Where the buffers come from: about 1 MiB, once (default: the system). */
  readonly allocator?: Allocator
  /** The files (default: this machine's). */
  readonly io?: FileIo
}

/** What direct reading counts. */
export interface DirectReadsCounters {
  /** Reads that went around the operating system's cache, and their bytes. */
  directReads: number
  directBytes: number
  /** Reads of whole pages that could not. */
  bufferedReads: number
  /** Files for which direct reading was refused. */
  refusedFiles: number
}

/** Blocks of every disk divide this, and so do places in a file that are read directly. */
const blockBytes = 4096
/** Largest direct read, and how many there can be at the same time. */
const bufferBytes = 256 * 1024
const buffers = 4
/** Memory is aligned to this at least. */
const allocatorAlignment = 16

/** The second descriptor of a file; open as long as the first, because reads may be under way. */
interface DirectDescriptor {
  readonly descriptor: number
  usable: boolean
}

interface DirectBuffer {
  readonly bytes: Uint8Array
  /** Where direct transfers into it begin. */
  at: number
}

/**
 * Files whose pages are read directly: the `io` of a `PageCache`. Throws `TmemError` (`TMEM_NO_MEMORY`) when there is
 * none for the buffers.
 */
export class DirectReads implements FileIo {
  readonly counters: DirectReadsCounters = { directReads: 0, directBytes: 0, bufferedReads: 0, refusedFiles: 0 }
  readonly #io: FileIo
  /** Direct descriptor by ordinary one. */
  readonly #direct: Map<number, DirectDescriptor> = new Map()
  /** By device: why its files are not read directly. */
  readonly #refused: Map<bigint, string> = new Map()
  readonly #free: DirectBuffer[]
  readonly #waiting: ((buffer: DirectBuffer) => void)[] = []

  constructor(options: DirectReadsOptions = {}) {
    checkOptions('DirectReads', options, { allocator: 'object?', io: 'object?' })
    const { allocator = systemAllocator, io = nodeFileIo } = options
    this.#io = io
    const each = bufferBytes + blockBytes
    const memory = allocator.allocate(each * buffers, 'page-cache.direct')
    if (memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `no memory for the buffers of direct reading (${each * buffers} bytes)`, {
        layer: 'page-cache',
      })
    this.#free = Array.from({ length: buffers }, (_, n) => ({ bytes: new Uint8Array(memory, n * each, each), at: 0 }))
  }

  /** Why files of a device (its number, as `stat` gives it) are read through the operating system's cache after all. */
  get refused(): ReadonlyMap<bigint, string> {
    return this.#refused
  }

  async open(path: PathLike, flags: number, mode: Mode): Promise<number> {
    const descriptor = await this.#io.open(path, flags, mode)
    try {
      await this.#openDirect(descriptor, flags)
    } catch (error) {
      await this.#io.close(descriptor)
      throw error
    }
    return descriptor
  }

  async close(descriptor: number): Promise<void> {
    const direct = this.#direct.get(descriptor)
    this.#direct.delete(descriptor)
    try {
      if (direct !== undefined) await this.#io.close(direct.descriptor)
    } finally {
      await this.#io.close(descriptor)
    }
  }

  async readv(descriptor: number, into: readonly Uint8Array[], position: number): Promise<number> {
    const direct = this.#direct.get(descriptor)
    const wanted = into.reduce((sum, { length }) => sum + length, 0)
    if (!direct?.usable || position % blockBytes !== 0 || wanted % blockBytes !== 0) {
      this.counters.bufferedReads++
      return this.#io.readv(descriptor, into, position)
    }
    const buffer = this.#free.pop() ?? (await new Promise<DirectBuffer>((resolve) => this.#waiting.push(resolve)))
    try {
      const bytes = await this.#read(direct.descriptor, buffer, Math.min(wanted, bufferBytes), position)
      if (bytes !== undefined) {
        this.counters.directReads++
        this.counters.directBytes += bytes
        scatter(buffer, bytes, into)
        return bytes
      }
    } finally {
      const next = this.#waiting.shift()
      if (next === undefined) this.#free.push(buffer)
      else next(buffer)
    }
    // It was opened, but the transfer itself is refused at every alignment.
    if (direct.usable) this.#refuse(descriptor, 'no alignment of memory suits its device')
    direct.usable = false
    this.counters.bufferedReads++
    return this.#io.readv(descriptor, into, position)
  }

  stat(descriptor: number): ReturnType<FileIo['stat']> {
    return this.#io.stat(descriptor)
  }

  plainStat(descriptor: number): ReturnType<FileIo['plainStat']> {
    return this.#io.plainStat(descriptor)
  }

  kind(path: PathLike): ReturnType<FileIo['kind']> {
    return this.#io.kind(path)
  }

  read(
    descriptor: number,
    into: Uint8Array,
    at: number,
    length: number,
    position: number | null,
  ): ReturnType<FileIo['read']> {
    return this.#io.read(descriptor, into, at, length, position)
  }

  write(
    descriptor: number,
    from: Uint8Array,
    at: number,
    length: number,
    position: number | null,
  ): ReturnType<FileIo['write']> {
    return this.#io.write(descriptor, from, at, length, position)
  }

  writev(descriptor: number, from: readonly Uint8Array[], position: number | null): ReturnType<FileIo['writev']> {
    return this.#io.writev(descriptor, from, position)
  }

  truncate(descriptor: number, length: number): Promise<void> {
    return this.#io.truncate(descriptor, length)
  }

  chmod(descriptor: number, mode: Mode): Promise<void> {
    return this.#io.chmod(descriptor, mode)
  }

  chown(descriptor: number, user: number, group: number): Promise<void> {
    return this.#io.chown(descriptor, user, group)
  }

  utimes(descriptor: number, accessed: TimeLike, changed: TimeLike): Promise<void> {
    return this.#io.utimes(descriptor, accessed, changed)
  }

  sync(descriptor: number): Promise<void> {
    return this.#io.sync(descriptor)
  }

  datasync(descriptor: number): Promise<void> {
    return this.#io.datasync(descriptor)
  }

  stats(): StatsNode {
    return { name: 'direct-reads', counters: { ...this.counters, refusedDevices: this.#refused.size }, children: [] }
  }

  /**
   * Opens the file behind a descriptor once more: by number, so that it is the same file whatever happens to its name.
   */
  async #openDirect(descriptor: number, flags: number): Promise<void> {
    const { O_RDONLY, O_WRONLY, O_DIRECT } = constants
    if ((flags & O_WRONLY) !== 0) return
    const stat = this.#io.stat(descriptor)
    if (!stat.isFile() || this.#refused.has(stat.dev)) return
    const flag: number | undefined = O_DIRECT
    if (flag === undefined) {
      this.#refuse(descriptor, 'this system has no O_DIRECT')
      return
    }
    try {
      const direct = await this.#io.open(`/proc/self/fd/${descriptor}`, O_RDONLY | flag, 0)
      this.#direct.set(descriptor, { descriptor: direct, usable: true })
    } catch (error) {
      if (!types.isNativeError(error) || !('code' in error)) throw error
      // One file that may not be opened again says nothing of the others; a file system without direct I/O (EINVAL)
      // does.
      if (error.code === 'EINVAL') this.#refuse(descriptor, 'its file system has no direct I/O')
      else this.counters.refusedFiles++
    }
  }

  #refuse(descriptor: number, reason: string): void {
    this.counters.refusedFiles++
    this.#refused.set(this.#io.stat(descriptor).dev, reason)
  }

  /** Reads directly; `undefined` when the kernel takes no place in the buffer. */
  async #read(direct: number, buffer: DirectBuffer, length: number, position: number): Promise<number | undefined> {
    for (let tries = 0; tries < blockBytes; tries += allocatorAlignment) {
      try {
        return await this.#io.read(direct, buffer.bytes, buffer.at, length, position)
      } catch (error) {
        if (!(types.isNativeError(error) && 'code' in error && error.code === 'EINVAL')) throw error
        buffer.at = (buffer.at + allocatorAlignment) % blockBytes
      }
    }
    return undefined
  }
}

/** Copies the first `bytes` of a buffer to several places in turn. */
function scatter({ bytes: from, at }: DirectBuffer, bytes: number, into: readonly Uint8Array[]): void {
  let done = 0
  for (const part of into) {
    const count = Math.min(part.length, bytes - done)
    if (count <= 0) return
    part.set(from.subarray(at + done, at + done + count))
    done += count
  }
}
