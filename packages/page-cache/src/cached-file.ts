/**
 * An open file of a page cache, with everything that a file handle of node:fs/promises has, but for its `fd`: who would
 * write through that would do it past the cache.
 *
 * Invariants:
 *  - A transfer without a position begins where the one before it ended, in the order of the calls, whoever waits for
 *    them or not. (Node's go to several threads at once: which of two is first there is up to the system.)
 *  - What was written is in the file when the call is answered, as with node:fs: nothing is lost by who never closes.
 *  - The descriptor stays open until all calls and streams that use it are done.
 *  - Errors are the system's own, and where arguments are wrong, Node's (`code`).
 *
 * Source: the documentation of node:fs/promises (FileHandle).
 */
import { EventEmitter } from 'node:events'
import {
  type BigIntStats,
  constants,
  createReadStream,
  createWriteStream,
  type Mode,
  type ReadStream,
  type Stats,
  type TimeLike,
  type WriteStream,
} from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import { createInterface, type Interface } from 'node:readline'
import { ReadableStream } from 'node:stream/web'
import {
  assertWanted,
  buffersOf,
  dataOf,
  type FileOptions,
  fileOptions,
  isInPieces,
  isView,
  lengthOf,
  outOfRange,
  type Position,
  readArguments,
  systemError,
  writeArguments,
  writePlace,
  wrongState,
} from './file-arguments.ts'
import type { FileIo } from './file-io.ts'
import type { FileRecord } from './file-record.ts'
import type { Reader, ReadingFile } from './reader.ts'
import { streamOperations } from './stream-operations.ts'
import { Turns } from './turns.ts'
import type { Writer } from './writer.ts'

/** Where to read to. */
export interface ReadOptions<T extends NodeJS.ArrayBufferView = NodeJS.ArrayBufferView> {
  readonly buffer?: T | undefined
  /** Where in the buffer (default 0), in bytes. */
  readonly offset?: number | null | undefined
  /** Bytes at most (default: what is left of the buffer). */
  readonly length?: number | null | undefined
  /** Where in the file; `null` (default) or -1: where the last transfer without a position ended. */
  readonly position?: number | bigint | null | undefined
}

type StreamOptions = Parameters<FileHandle['createReadStream']>[0]
type WriteStreamOptions = Parameters<FileHandle['createWriteStream']>[0]
type TextOptions = (FileOptions & { readonly encoding: BufferEncoding }) | BufferEncoding
/** What `writeFile` takes: at once, or in pieces. */
export type FileData =
  | string
  | NodeJS.ArrayBufferView
  | AsyncIterable<string | NodeJS.ArrayBufferView>
  | Iterable<string | NodeJS.ArrayBufferView>

/** Bytes of one read of `readFile`; between two of them it looks whether it was aborted. */
const chunkBytes = 512 * 1024
/** Bytes of one read beyond what a file is said to have. */
const beyondBytes = 8192
/** Longest file that `readFile` takes, as in Node. */
const maxFileBytes = 2 ** 31 - 1
/** Bytes of one piece of a web stream whose reader brings no buffer. */
const pieceBytes = 16_384

/** The parts of a page cache that a file works with. */
export interface FileParts {
  readonly io: FileIo
  readonly reader: Reader
  readonly writer: Writer
  /** Told that a file is closed, before its descriptor is. */
  readonly closed: (file: CachedFile) => void
}

export class CachedFile extends EventEmitter implements Omit<FileHandle, 'fd'>, ReadingFile {
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
  /** Where the last transfer without a position ended; those take turns. */
  #position = 0
  readonly #turns = new Turns()
  /** Where the last read ended. */
  #readEnd = 0
  /** Calls and streams at work. */
  #users = 0
  #idle: (() => void) | undefined
  #closing: Promise<void> | undefined
  /** The descriptor is closed, or about to be. */
  #closed = false
  /** There is a web stream. */
  #locked = false

  /** Made by `PageCache.open`. */
  constructor(parts: FileParts, file: FileRecord, descriptor: number, flags: number, direct: boolean) {
    super()
    this.#parts = parts
    this.file = file
    this.descriptor = descriptor
    this.#flags = flags
    this.#direct = direct
  }

  /** Reads; answers how many bytes, 0 at the end of the file. */
  read<T extends NodeJS.ArrayBufferView>(
    buffer: T,
    offset?: number | null,
    length?: number | null,
    position?: number | bigint | null,
  ): Promise<{ bytesRead: number; buffer: T }>
  read<T extends NodeJS.ArrayBufferView>(
    buffer: T,
    options?: Omit<ReadOptions<T>, 'buffer'>,
  ): Promise<{ bytesRead: number; buffer: T }>
  read<T extends NodeJS.ArrayBufferView = Buffer<ArrayBuffer>>(
    options?: ReadOptions<T>,
  ): Promise<{ bytesRead: number; buffer: T }>
  async read(
    first?: unknown,
    second?: unknown,
    third?: unknown,
    fourth?: unknown,
  ): Promise<{ bytesRead: number; buffer: never }> {
    return this.#use('read', async () => {
      const { buffer, bytes, position } = readArguments(first, second, third, fourth)
      const bytesRead = bytes.length === 0 ? 0 : await this.#read([bytes], position)
      return { bytesRead, buffer: buffer as never }
    })
  }

  /** Reads into several buffers in turn. */
  async readv<T extends readonly NodeJS.ArrayBufferView[]>(
    buffers: T,
    position?: number | null,
  ): Promise<{ bytesRead: number; buffers: T }> {
    return this.#use('read', async () => {
      const parts = buffersOf(buffers)
      if (parts.length === 0) throw systemError('EINVAL', 'read', 'there is no buffer to read to')
      return { bytesRead: await this.#read(parts, writePlace(position)), buffers }
    })
  }

  /** The file from the current position to its end. */
  readFile(options?: (FileOptions & { readonly encoding?: null | undefined }) | null): Promise<Buffer<ArrayBuffer>>
  readFile(options: TextOptions): Promise<string>
  readFile(options?: FileOptions | BufferEncoding | null): Promise<string | Buffer<ArrayBuffer>>
  async readFile(options?: FileOptions | BufferEncoding | null): Promise<string | Buffer<ArrayBuffer>> {
    return this.#use('read', async () => {
      const { encoding, signal } = fileOptions(options)
      // In one turn: nobody else's transfer moves the position between two reads of it.
      const bytes = await this.#turns.take(() => this.#readRest(signal))
      return encoding ? bytes.toString(encoding) : bytes
    })
  }

  /** Writes; answers how many bytes, fewer than given only when something went wrong after the first. */
  write<T extends NodeJS.ArrayBufferView>(
    buffer: T,
    offset?: number | null,
    length?: number | null,
    position?: number | null,
  ): Promise<{ bytesWritten: number; buffer: T }>
  write<T extends NodeJS.ArrayBufferView>(
    buffer: T,
    options: { offset?: number; length?: number; position?: number | null },
  ): Promise<{ bytesWritten: number; buffer: T }>
  write(
    text: string,
    position?: number | null,
    encoding?: BufferEncoding | null,
  ): Promise<{ bytesWritten: number; buffer: string }>
  async write(
    what: unknown,
    second?: unknown,
    third?: unknown,
    fourth?: unknown,
  ): Promise<{ bytesWritten: number; buffer: never }> {
    return this.#use('write', async () => {
      const buffer = what as never
      if (isView(what) && what.byteLength === 0) return { bytesWritten: 0, buffer }
      const { bytes, position } = writeArguments(what, second, third, fourth)
      return { bytesWritten: await this.#write([bytes], position), buffer }
    })
  }

  /** Writes several buffers one behind the other, in one piece. */
  async writev<T extends readonly NodeJS.ArrayBufferView[]>(
    buffers: T,
    position?: number | null,
  ): Promise<{ bytesWritten: number; buffers: T }> {
    return this.#use('write', async () => {
      const parts = buffersOf(buffers)
      const bytesWritten = parts.length === 0 ? 0 : await this.#write(parts, writePlace(position))
      return { bytesWritten, buffers }
    })
  }

  /**
   * Writes all of it from the current position on. What is there at once is written in one piece; pieces of an iterable
   * are written as they come.
   */
  async writeFile(data: FileData, options?: FileOptions | BufferEncoding | null): Promise<void> {
    await this.#use('write', async () => {
      const { encoding, signal } = fileOptions(options)
      if (!isInPieces(data)) {
        await this.#writeWhole(dataOf(data, encoding), signal)
        return
      }
      assertWanted(signal)
      for await (const piece of data) await this.#writeWhole(dataOf(piece, encoding), signal)
    })
  }

  /** As `writeFile`: a file that was opened to append is written at its end by both. */
  appendFile(data: FileData, options?: FileOptions | BufferEncoding | null): Promise<void> {
    return this.writeFile(data, options)
  }

  /**
   * A stream that reads the file, from the current position unless `start` says otherwise. It closes the file when it
   * ends, unless `autoClose` is false.
   */
  createReadStream(options?: StreamOptions): ReadStream {
    return this.#streaming((operations) =>
      createReadStream('', { ...options, fd: this.descriptor, fs: operations } as object),
    )
  }

  /** A stream that writes the file, likewise. */
  createWriteStream(options?: WriteStreamOptions): WriteStream {
    return this.#streaming((operations) =>
      createWriteStream('', { ...options, fd: this.descriptor, fs: operations } as object),
    )
  }

  /**
   * A web stream of the bytes from the current position on (always of type `bytes`); one for each file. `autoClose`:
   * the file is closed when it ends.
   */
  readableWebStream(
    options: { readonly type?: string | undefined; readonly autoClose?: boolean | undefined } = {},
  ): ReadableStream {
    if (this.#closed) throw wrongState('the file is closed')
    if (this.#closing !== undefined) throw wrongState('the file is closing')
    if (this.#locked) throw wrongState('the file has a web stream already')
    this.#locked = true
    this.#users++
    let ended = false
    let pulling = false
    const end = (): void => {
      if (!ended) this.#release()
      ended = true
    }
    const finish = async (): Promise<void> => {
      end()
      if (options.autoClose === true) await this.close()
    }
    return new ReadableStream({
      type: 'bytes',
      autoAllocateChunkSize: pieceBytes,
      start: (controller) => {
        this.once('close', () => {
          // What is being read is delivered first.
          if (!ended && !pulling) controller.close()
          end()
        })
      },
      pull: async (controller) => {
        const request = controller.byobRequest!
        pulling = true
        try {
          const { bytesRead } = await this.read(request.view as Uint8Array)
          if (bytesRead > 0) request.respond(bytesRead)
          else await finish()
          if (!ended) return
          controller.close()
          if (bytesRead === 0) request.respond(0)
        } catch (error) {
          await finish()
          throw error
        } finally {
          pulling = false
        }
      },
      cancel: finish,
    })
  }

  /** The lines of the file, from the current position on; closes the file when it ends. */
  readLines(options?: StreamOptions): Interface {
    return createInterface({ input: this.createReadStream(options), crlfDelay: Number.POSITIVE_INFINITY })
  }

  /** Makes the file so long: what is beyond is gone, what is missing is zeros. */
  async truncate(length?: number): Promise<void> {
    await this.#use('ftruncate', async () => {
      const bytes = lengthOf(length ?? 0)
      await this.#change((io) => io.truncate(this.descriptor, bytes))
    })
  }

  /** What the file system says of the file. */
  stat(options?: { readonly bigint?: false | undefined }): Promise<Stats>
  stat(options: { readonly bigint: true }): Promise<BigIntStats>
  stat(options?: { readonly bigint?: boolean | undefined }): Promise<Stats | BigIntStats>
  async stat(options?: { readonly bigint?: boolean | undefined }): Promise<Stats | BigIntStats> {
    const { io } = this.#parts
    return this.#use('fstat', async () =>
      options?.bigint === true ? io.stat(this.descriptor) : io.plainStat(this.descriptor),
    )
  }

  /** Changes who may do what with the file. */
  async chmod(mode: Mode): Promise<void> {
    await this.#use('fchmod', () => this.#change((io) => io.chmod(this.descriptor, mode)))
  }

  /** Changes whose file it is: numbers of a user and a group. */
  async chown(user: number, group: number): Promise<void> {
    await this.#use('fchown', () => this.#change((io) => io.chown(this.descriptor, user, group)))
  }

  /** Changes when the file was read and written last. */
  async utimes(accessed: TimeLike, changed: TimeLike): Promise<void> {
    await this.#use('futime', () => this.#change((io) => io.utimes(this.descriptor, accessed, changed)))
  }

  /** Waits until what was written is on the medium. */
  async sync(): Promise<void> {
    await this.#use('fsync', () => this.#parts.io.sync(this.descriptor))
  }

  /** As `sync`, without metadata that is not needed to read the data. */
  async datasync(): Promise<void> {
    await this.#use('fdatasync', () => this.#parts.io.datasync(this.descriptor))
  }

  /** Closes the file, when the calls and streams that use it are done. Emits `close` at once. */
  close(): Promise<void> {
    if (this.#closing === undefined) {
      this.#closing = this.#close()
      this.emit('close')
    }
    return this.#closing
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close()
  }

  async #close(): Promise<void> {
    if (this.#users === 0) this.#closed = true
    else
      await new Promise<void>((resolve) => {
        this.#idle = resolve
      })
    this.#parts.closed(this)
    await this.#parts.io.close(this.descriptor)
  }

  get #appends(): boolean {
    return (this.#flags & constants.O_APPEND) !== 0
  }

  /** Fills the parts in turn; how many bytes. */
  #read(parts: readonly Uint8Array[], position: Position): Promise<number> {
    if (position !== undefined) return this.#readAt(parts, position)
    return this.#turns.take(async () => {
      const bytes = await this.#readAt(parts, this.#position)
      this.#position += bytes
      return bytes
    })
  }

  async #readAt(parts: readonly Uint8Array[], position: number): Promise<number> {
    // The descriptor itself would say so, but not every read gets there.
    if ((this.#flags & constants.O_WRONLY) !== 0)
      throw systemError('EBADF', 'read', 'the file was opened for writing only')
    let done = 0
    for (const part of parts) {
      const bytes = part.length === 0 ? 0 : await this.#readPart(part, position + done)
      done += bytes
      if (bytes < part.length) break
    }
    return done
  }

  async #readPart(into: Uint8Array, position: number): Promise<number> {
    const { io, reader } = this.#parts
    if (this.#direct) return io.read(this.descriptor, into, 0, into.length, position)
    const sequential = position === this.#readEnd
    const bytes = await reader.readAt(this, into, 0, into.length, position, sequential)
    this.#readEnd = position + bytes
    return bytes
  }

  /** All from the position on. For who has the turn. */
  async #readRest(signal: AbortSignal | undefined): Promise<Buffer<ArrayBuffer>> {
    assertWanted(signal)
    const { size } = this.#parts.io.plainStat(this.descriptor)
    if (size > maxFileBytes) {
      const error = new RangeError(`the file has ${size} bytes, more than readFile takes (${maxFileBytes})`)
      throw Object.assign(error, { code: 'ERR_FS_FILE_TOO_LARGE' })
    }
    // It may have grown, and files of /proc do not say how long they are.
    const pieces: Buffer<ArrayBuffer>[] = []
    let room = Math.max(0, size - this.#position)
    for (;;) {
      const piece = Buffer.allocUnsafeSlow(room || beyondBytes)
      let filled = 0
      while (filled < piece.length) {
        assertWanted(signal)
        const part = piece.subarray(filled, filled + chunkBytes)
        const bytes = await this.#readAt([part], this.#position)
        filled += bytes
        this.#position += bytes
        if (bytes === 0) {
          if (pieces.length === 0) return piece.subarray(0, filled)
          return Buffer.concat([...pieces, piece.subarray(0, filled)])
        }
      }
      pieces.push(piece)
      room = 0
    }
  }

  /** Writes the parts one behind the other; how many bytes. */
  async #write(parts: readonly Uint8Array[], position: Position): Promise<number> {
    const { writer } = this.#parts
    const at = (place: number): number | null => (this.#appends ? null : place)
    if (position !== undefined) return (await writer.write(this, parts, at(position))).bytes
    return this.#turns.take(async () => {
      const { bytes, end } = await writer.write(this, parts, at(this.#position))
      if (bytes > 0) this.#position = end
      return bytes
    })
  }

  async #writeWhole(data: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
    for (let done = 0; done < data.length || done === 0; ) {
      assertWanted(signal)
      if (data.length === 0) return
      done += await this.#write([data.subarray(done)], undefined)
    }
  }

  #change<T>(work: (io: FileIo) => Promise<T>): Promise<T> {
    const { io, writer } = this.#parts
    return writer.change(this, () => work(io))
  }

  /** A stream of node:fs over this file, which keeps it open. */
  #streaming<T extends ReadStream | WriteStream>(make: (operations: object) => T): T {
    if (this.#closed) throw outOfRange('fd', 'that of an open file; this one is closed', -1)
    const stream = make(
      streamOperations(this, async () => {
        this.#release()
        await this.close()
      }),
    )
    this.#users++
    this.on('close', () => {
      // One that has finished, or failed, and does not close by itself would wait for another `finish`.
      if ('writableFinished' in stream && (stream.writableFinished || stream.errored !== null)) stream.destroy()
      else stream.close()
    })
    return stream
  }

  /** Counts who is at work, so that the descriptor stays theirs until they are done. */
  async #use<T>(call: string, work: () => Promise<T>): Promise<T> {
    if (this.#closed) throw systemError('EBADF', call, 'the file is closed')
    this.#users++
    try {
      return await work()
    } finally {
      this.#release()
    }
  }

  #release(): void {
    if (--this.#users > 0 || this.#closing === undefined) return
    this.#closed = true
    this.#idle?.()
  }
}
