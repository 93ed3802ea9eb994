/**
 * An open file of a page cache, in the form of a file handle of node:fs/promises.
 *
 * What was written is in the file after `sync`, `datasync` or `close`; until then only those who read through the same cache see
 * it. Errors are the system's own, as those of a file handle.
 *
 * Source: the documentation of node:fs/promises (FileHandle).
 */
import { type BigIntStats, constants, type Stats } from 'node:fs'
import { constants as system } from 'node:os'
import type { FileIo } from './file-io.ts'
import type { FileRecord } from './file-record.ts'
import type { Reader, ReadingFile } from './reader.ts'
import type { Versions } from './versions.ts'
import type { Writer } from './writer.ts'

/** Where to read to. */
export interface ReadOptions<T extends Uint8Array = Uint8Array> {
  readonly buffer?: T
  /** Where in the buffer (default 0). */
  readonly offset?: number
  /** Bytes at most (default: what is left of the buffer). */
  readonly length?: number
  /** Where in the file; `null` (default) or -1: where the last read or write without a position ended. */
  readonly position?: number | bigint | null
}

/** Buffer of a read that names none: 16 KiB. */
const defaultBufferBytes = 16_384
/** Largest place in a file. */
const maxPosition = Number.MAX_SAFE_INTEGER

/** The parts of a page cache that a file works with. */
export interface FileParts {
  readonly io: FileIo
  readonly versions: Versions
  readonly reader: Reader
  readonly writer: Writer
  /** Told that a file is closed, before its descriptor is. */
  readonly closed: (file: CachedFile) => void
}

export class CachedFile implements ReadingFile {
  readonly file: FileRecord
  /** The system's own descriptor; past the cache. */
  readonly descriptor: number
  readonly #parts: FileParts
  readonly #flags: number
  /** Past the frames. */
  readonly #direct: boolean
  /** Page that was read last, and pages of the next read-ahead: the page cache's own. */
  lastIndex = -1
  window = 0
  #position = 0
  /** Where the last read ended. */
  #readEnd = 0
  #users = 0
  #idle: (() => void) | undefined
  #closing: Promise<void> | undefined

  /** Made by `PageCache.open`. */
  constructor(parts: FileParts, file: FileRecord, descriptor: number, flags: number, direct: boolean) {
    this.#parts = parts
    this.file = file
    this.descriptor = descriptor
    this.#flags = flags
    this.#direct = direct
  }

  /** Whether dirty pages may be written through this handle. */
  get writesPages(): boolean {
    return this.#writes && !this.#appends
  }

  /** Reads; answers how many bytes, 0 at the end of the file. */
  read<T extends Uint8Array>(
    buffer: T,
    offset?: number | null,
    length?: number | null,
    position?: number | bigint | null,
  ): Promise<{ bytesRead: number; buffer: T }>
  read<T extends Uint8Array>(
    buffer: T,
    options: Omit<ReadOptions<T>, 'buffer'>,
  ): Promise<{ bytesRead: number; buffer: T }>
  read(options?: ReadOptions): Promise<{ bytesRead: number; buffer: Uint8Array }>
  async read(
    first: Uint8Array | ReadOptions = {},
    second?: number | null | Omit<ReadOptions, 'buffer'>,
    third?: number | null,
    fourth?: number | bigint | null,
  ): Promise<{ bytesRead: number; buffer: Uint8Array }> {
    if (typeof first !== 'object') throw new TypeError(`a read takes a buffer or options, got ${typeof first}`)
    const options: ReadOptions =
      first instanceof Uint8Array ? { ...given(second, third, fourth), buffer: first } : first
    const buffer = options.buffer ?? Buffer.alloc(defaultBufferBytes)
    const offset = options.offset ?? 0
    const length = options.length ?? buffer.byteLength - offset
    assertRange(buffer, offset, length)
    const place = placeOf(options.position)
    if ((this.#flags & constants.O_WRONLY) !== 0) throw badDescriptor('read')
    const bytesRead = await this.#use(() => this.#read(buffer, offset, length, place ?? this.#position))
    if (place === undefined) this.#position += bytesRead
    return { bytesRead, buffer }
  }

  /** Writes; answers how many bytes, fewer than given only when something went wrong after the first. */
  write<T extends Uint8Array>(
    buffer: T,
    offset?: number | null,
    length?: number | null,
    position?: number | null,
  ): Promise<{ bytesWritten: number; buffer: T }>
  write<T extends Uint8Array>(
    buffer: T,
    options: { offset?: number; length?: number; position?: number | null },
  ): Promise<{ bytesWritten: number; buffer: T }>
  write(
    text: string,
    position?: number | null,
    encoding?: BufferEncoding,
  ): Promise<{ bytesWritten: number; buffer: string }>
  async write(
    what: Uint8Array | string,
    second?: number | null | { offset?: number; length?: number; position?: number | null },
    third?: number | string | null,
    fourth?: number | null,
  ): Promise<{ bytesWritten: number; buffer: Uint8Array | string }> {
    const options: ReadOptions =
      typeof what === 'string'
        ? { position: second as number | null }
        : given(second, third as number | null | undefined, fourth)
    const buffer = typeof what === 'string' ? Buffer.from(what, (third ?? 'utf8') as BufferEncoding) : what
    const offset = options.offset ?? 0
    const length = options.length ?? buffer.byteLength - offset
    assertRange(buffer, offset, length)
    const place = placeOf(options.position)
    if (!this.#writes) throw badDescriptor('write')
    const bytesWritten = await this.#use(async () => {
      const written = await this.#write(buffer, offset, length, place ?? this.#position)
      if ((this.#flags & constants.O_SYNC) !== 0) await this.#flush()
      return written
    })
    if (place === undefined) this.#position += bytesWritten
    return { bytesWritten, buffer: what }
  }

  /** Makes the file so long: what is beyond is gone, what is missing is zeros. */
  async truncate(length = 0): Promise<void> {
    if (!Number.isSafeInteger(length)) throw new RangeError(`the length of a file must be an integer, got ${length}`)
    if (!this.#writes) throw badDescriptor('ftruncate')
    // As in node:fs, a negative length is 0.
    await this.#use(() => this.file.exclusive(() => this.#parts.writer.truncate(this, Math.max(0, length))))
  }

  /** What the file system says of the file; its size counts what is yet to be written. */
  stat(options: { readonly bigint: true }): Promise<BigIntStats>
  stat(options?: { readonly bigint?: false }): Promise<Stats>
  async stat(options: { readonly bigint?: boolean } = {}): Promise<Stats | BigIntStats> {
    return this.#use(async () => {
      this.#parts.versions.validate(this.file, this.descriptor)
      if (options.bigint === true) {
        const stats = this.#parts.io.stat(this.descriptor)
        return Object.assign(stats, { size: BigInt(Math.max(Number(stats.size), this.file.dirtyEnd)) })
      }
      const stats = this.#parts.io.plainStat(this.descriptor)
      return Object.assign(stats, { size: Math.max(stats.size, this.file.dirtyEnd) })
    })
  }

  /** Writes what is dirty, and waits until it is on disk. Rejects when it cannot: then it stays dirty, and `sync` may be tried again. */
  async sync(): Promise<void> {
    await this.#use(async () => {
      await this.#flush()
      await this.#parts.io.sync(this.descriptor)
    })
  }

  /** As `sync`, without metadata that is not needed to read the data. */
  async datasync(): Promise<void> {
    await this.#use(async () => {
      await this.#flush()
      await this.#parts.io.datasync(this.descriptor)
    })
  }

  /**
   * Writes what is dirty and closes the file. Rejects when something could not be written: it is closed all the same, and what
   * nobody else could write is given up. Whoever wants to try again calls `sync` before.
   */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close()
  }

  async #close(): Promise<void> {
    if (this.#users > 0)
      await new Promise<void>((resolve) => {
        this.#idle = resolve
      })
    try {
      if (this.writesPages) await this.#flush()
    } finally {
      await this.file.exclusive(async () => {
        this.#parts.closed(this)
        await this.#parts.io.close(this.descriptor)
      })
    }
  }

  get #writes(): boolean {
    return (this.#flags & (constants.O_WRONLY | constants.O_RDWR)) !== 0
  }

  get #appends(): boolean {
    return (this.#flags & constants.O_APPEND) !== 0
  }

  #flush(): Promise<void> {
    return this.file.exclusive(() => this.#parts.writer.flush(this.file))
  }

  async #read(buffer: Uint8Array, offset: number, length: number, position: number): Promise<number> {
    if (length === 0) return 0
    if (this.#direct) {
      if (this.file.dirtyPages > 0) await this.#flush()
      return this.#parts.io.read(this.descriptor, buffer, offset, length, position)
    }
    const sequential = position === this.#readEnd
    const bytes = await this.#parts.reader.readAt(this, buffer, offset, length, position, sequential)
    this.#readEnd = position + bytes
    return bytes
  }

  async #write(buffer: Uint8Array, offset: number, length: number, position: number): Promise<number> {
    if (length === 0) return 0
    if (!this.#direct && !this.#appends) return this.#parts.writer.writeAt(this, buffer, offset, length, position)
    return this.file.exclusive(async () => {
      await this.#parts.writer.flush(this.file)
      const place = this.#appends ? null : position
      return this.#parts.versions.past(this, () => this.#parts.io.write(this.descriptor, buffer, offset, length, place))
    })
  }

  /** Counts who is at work, so that the descriptor stays theirs until they are done. */
  async #use<T>(work: () => Promise<T>): Promise<T> {
    if (this.#closing !== undefined) throw badDescriptor('close')
    this.#users++
    try {
      return await work()
    } finally {
      if (--this.#users === 0) this.#idle?.()
    }
  }
}

function given(
  offset: number | null | undefined | Omit<ReadOptions, 'buffer'>,
  length: number | null | undefined,
  position: number | bigint | null | undefined,
): Omit<ReadOptions, 'buffer'> {
  if (typeof offset === 'object' && offset !== null) return offset
  return {
    ...(offset === undefined || offset === null ? {} : { offset }),
    ...(length === undefined || length === null ? {} : { length }),
    position: position ?? null,
  }
}

function assertRange(buffer: Uint8Array, offset: number, length: number): void {
  if (!(buffer instanceof Uint8Array)) throw new TypeError('buffer must be a Uint8Array')
  if (!Number.isInteger(offset) || offset < 0 || !Number.isInteger(length) || length < 0)
    throw new RangeError(`offset and length must be integers, not negative; got ${offset} and ${length}`)
  if (offset + length > buffer.byteLength)
    throw new RangeError(`${length} bytes at ${offset} lie outside of a buffer of ${buffer.byteLength}`)
}

/** A place in the file; `undefined`: the handle's own position. */
function placeOf(position: number | bigint | null | undefined): number | undefined {
  if (position === null || position === undefined || position === -1 || position === -1n) return undefined
  const place = Number(position)
  if (!Number.isInteger(place) || place < 0 || place > maxPosition)
    throw new RangeError(`position must be an integer from 0 to ${maxPosition}, got ${position}`)
  return place
}

/** The system's error for a descriptor that cannot do this. */
function badDescriptor(call: string): Error {
  const error = new Error(`EBADF: bad file descriptor, ${call}`)
  return Object.assign(error, { code: 'EBADF', errno: -system.errno.EBADF, syscall: call })
}
