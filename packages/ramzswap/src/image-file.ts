/**
 * The file under a snapshot: a raw image of a device, and the lock that keeps a second server away from it.
 *
 * The image is a plain file: byte n of it is byte n of the device. It is sparse, so pages that were never written take no room. The lock is a
 * file beside it (`IMAGE.lock`) with the mark of the process that has it open. A lock whose process has ended is taken over.
 *
 * Source: open(2), pwrite(2), fdatasync(2); a directory is synced once, so that a new file is still there after a power failure.
 */
import {
  close,
  closeSync,
  constants,
  fdatasync,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  openSync,
  read,
  readFileSync,
  renameSync,
  rmSync,
  write,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { dirname, resolve } from 'node:path'
import { promisify } from 'node:util'
import { markedProcess, processMark, TmemError } from '@tmem/core'

/** What a snapshot needs of its image. Every failure is the system's own error. Tests give one that fails. */
export interface ImageFile {
  /** Bytes that it had when it was opened. */
  readonly sizeBytes: number
  /** Fills `into` from `position` on. */
  read(into: Uint8Array, position: number): Promise<void>
  /** Writes `bytes`, or a first part of them, in the background: how many. */
  write(bytes: Uint8Array, position: number): Promise<number>
  /** The same, done when it returns. */
  writeNow(bytes: Uint8Array, position: number): number
  /** What was written is on the disk when this resolves. */
  sync(): Promise<void>
  /** Cuts it off, or adds zeros without taking room. */
  truncate(sizeBytes: number): void
  /** Closes it and gives the lock back. */
  close(): Promise<void>
}

/** Opens an image, or makes an empty one. Throws `TmemError` (`TMEM_IO`) with nothing left behind. */
export type OpenImageFile = (path: string) => ImageFile

const failure = (path: string, what: string, cause?: unknown): TmemError =>
  new TmemError('TMEM_IO', `snapshot ${path}: ${what}`, { layer: 'snapshot', cause })

/** Opens a real file. */
export const openImageFile: OpenImageFile = (path) => {
  const unlock = lock(path)
  let descriptor: number | undefined
  try {
    descriptor = openSync(path, constants.O_RDWR | constants.O_CREAT, 0o600)
    const found = fstatSync(descriptor)
    if (!found.isFile()) throw failure(path, 'it is no plain file')
    const folder = openSync(dirname(resolve(path)), constants.O_RDONLY)
    try {
      fsyncSync(folder)
    } finally {
      closeSync(folder)
    }
    return new NodeImageFile(descriptor, found.size, unlock)
  } catch (error) {
    if (descriptor !== undefined) closeSync(descriptor)
    unlock()
    if (error instanceof TmemError) throw error
    throw failure(path, `it cannot be opened: ${(error as Error).message}`, error)
  }
}

/** Takes the lock of an image; what it returns gives it back. */
function lock(image: string): () => void {
  const path = `${image}.lock`
  const mark = processMark()
  for (;;) {
    try {
      writeFileSync(path, mark, { flag: 'wx', mode: 0o600 })
      return () => rmSync(path)
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST')
        throw failure(image, `it cannot be locked: ${(error as Error).message}`, error)
    }
    takeAway(image, path)
  }
}

/** Takes away a lock whose process has ended. Throws for any other. */
function takeAway(image: string, path: string): void {
  const aside = `${path}-${process.pid}`
  try {
    judge(image, path)
    // Renamed before it is judged again: of two who found it abandoned, only one gets it, and neither takes the other's new one.
    renameSync(path, aside)
    try {
      judge(image, aside)
    } catch (error) {
      renameSync(aside, path)
      throw error
    }
    rmSync(aside)
  } catch (error) {
    // Somebody else was quicker.
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
  }
}

function judge(image: string, path: string): void {
  const holder = markedProcess(readFileSync(path, 'utf8'))
  if (holder === undefined)
    throw failure(image, `${path} is there, and no lock of ours: remove it if nobody uses the image`)
  if (holder.running) throw failure(image, `process ${holder.pid} has it open (says ${path})`)
}

const readAt = promisify(read)
const writeAt = promisify(write)
const syncAt = promisify(fdatasync)
const closeAt = promisify(close)

class NodeImageFile implements ImageFile {
  readonly sizeBytes: number
  readonly #descriptor: number
  readonly #unlock: () => void

  constructor(descriptor: number, sizeBytes: number, unlock: () => void) {
    this.#descriptor = descriptor
    this.sizeBytes = sizeBytes
    this.#unlock = unlock
  }

  async read(into: Uint8Array, position: number): Promise<void> {
    for (let done = 0; done < into.length; ) {
      const { bytesRead } = await readAt(this.#descriptor, into, done, into.length - done, position + done)
      if (bytesRead === 0) throw new Error(`it ends at ${position + done}`)
      done += bytesRead
    }
  }

  async write(bytes: Uint8Array, position: number): Promise<number> {
    const { bytesWritten } = await writeAt(this.#descriptor, bytes, 0, bytes.length, position)
    return bytesWritten
  }

  writeNow(bytes: Uint8Array, position: number): number {
    return writeSync(this.#descriptor, bytes, 0, bytes.length, position)
  }

  sync(): Promise<void> {
    return syncAt(this.#descriptor)
  }

  truncate(sizeBytes: number): void {
    ftruncateSync(this.#descriptor, sizeBytes)
  }

  async close(): Promise<void> {
    try {
      await closeAt(this.#descriptor)
    } finally {
      this.#unlock()
    }
  }
}
