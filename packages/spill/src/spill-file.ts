/**
 * The file of a spill: a header, a table of records, and a ring of compressed pages.
 *
 * Every record has a checksum of its own, and a digest of the handle and the page (128 bits of SHA-256) under which alone a page is
 * served. A record is written after its bytes, and emptied before its bytes are given to somebody else: so a process may
 * die at any moment. A machine may not: what the system had not written yet would come back in any order. So a file counts
 * only when it was closed, or when this is still the same boot of the machine.
 *
 * Layout: header (4096 bytes) · records (64 bytes each, all zeros: empty) · ring, in units of 64 bytes. Little-endian.
 *
 * Source: the mail of November 2011 that wants compressed page cache written out; the rest is our own.
 */
import {
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  openSync,
  read,
  readFileSync,
  readSync,
  unlinkSync,
  writeSync,
} from 'node:fs'
import { crc32 } from 'node:zlib'
import { markedProcess, processMark, TmemError } from '@tmem/core'

export const headerBytes = 4096
export const recordBytes = 64
export const unitBytes = 64
/** Last bytes of a record: its checksum. */
const checksumAt = 60
const magic = 'TMEMSPIL'
const version = 2
/** Of the header: name of the boot; mark of the process. Each with its length before it. */
const bootAt = 32
const markAt = 128
const textBytes = 80

/** What the layer needs of a file. Tests give one that fails. */
export interface SpillIo {
  /** Opens a file for reading and writing, making it if need be. */
  open(path: string): number
  /** Writes all of it, or throws. */
  write(descriptor: number, bytes: Uint8Array, length: number, position: number): void
  /** Reads exactly so many bytes; fewer are an error. */
  read(descriptor: number, into: Uint8Array, length: number, position: number): Promise<void>
  /** The same at once: when a file is opened. */
  readNow(descriptor: number, into: Uint8Array, length: number, position: number): void
  size(descriptor: number): number
  truncate(descriptor: number, length: number): void
  sync(descriptor: number): void
  close(descriptor: number): void
  unlink(path: string): void
}

const ended = (position: number): Error => new Error(`the file ends at ${position}`)

/** Files of this machine. */
export const nodeSpillIo: SpillIo = Object.freeze({
  open: (path: string) => openSync(path, constants.O_RDWR | constants.O_CREAT, 0o600),
  write(descriptor: number, bytes: Uint8Array, length: number, position: number) {
    for (let done = 0; done < length; ) {
      const written = writeSync(descriptor, bytes, done, length - done, position + done)
      if (written === 0) throw new Error('the file system wrote nothing')
      done += written
    }
  },
  read: (descriptor: number, into: Uint8Array, length: number, position: number) =>
    new Promise<void>((resolve, reject) => {
      const next = (done: number): void =>
        read(descriptor, into, done, length - done, position + done, (error, bytes) => {
          if (error !== null) reject(error)
          else if (bytes === 0) reject(ended(position + done))
          else if (done + bytes < length) next(done + bytes)
          else resolve()
        })
      next(0)
    }),
  readNow(descriptor: number, into: Uint8Array, length: number, position: number) {
    for (let done = 0; done < length; ) {
      const bytes = readSync(descriptor, into, done, length - done, position + done)
      if (bytes === 0) throw ended(position + done)
      done += bytes
    }
  },
  size: (descriptor: number) => fstatSync(descriptor).size,
  truncate: (descriptor: number, length: number) => ftruncateSync(descriptor, length),
  sync: (descriptor: number) => fsyncSync(descriptor),
  close: (descriptor: number) => closeSync(descriptor),
  unlink: (path: string) => unlinkSync(path),
})

/** A name of this boot of the machine, where there is one (Linux). */
export function bootName(): string {
  try {
    return readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim()
  } catch (error) {
    // Another system: then a file counts only when it was closed.
    if (error instanceof Error && 'code' in error) return ''
    throw error
  }
}

/** Sizes of the parts of a file. */
export interface SpillGeometry {
  /** Records. */
  readonly capacity: number
  /** Where the ring begins, and its length in units. */
  readonly ringAt: number
  readonly units: number
}

/** Parts of a file of so many bytes: one record for each KiB. */
export function geometryOf(sizeBytes: number): SpillGeometry {
  const capacity = Math.min(2 ** 24 - 1, Math.floor(sizeBytes / 1024))
  const ringAt = headerBytes + Math.ceil((capacity * recordBytes) / headerBytes) * headerBytes
  return { capacity, ringAt, units: Math.floor((sizeBytes - ringAt) / unitBytes) }
}

/** A page in the file. */
export interface SpillRecord {
  /** Kind and number of its pool. */
  readonly poolKey: number
  readonly object: bigint
  readonly index: number
  /** Where in the ring, in units, and how many bytes. */
  readonly unit: number
  readonly length: number
  /** Codec id; 0: not compressed. */
  readonly codec: number
  /** 16 bytes. */
  readonly digest: Uint8Array
}

export class SpillFile {
  readonly geometry: SpillGeometry
  readonly #path: string
  readonly #io: SpillIo
  readonly #boot: string
  readonly #sizeBytes: number
  readonly #descriptor: number
  readonly #record: Uint8Array = new Uint8Array(recordBytes)
  readonly #view: DataView = new DataView(this.#record.buffer)
  #closed = false

  /** Opens or makes the file. `found` is told of every record that may be good. Throws `TmemError` (`TMEM_IO`). */
  constructor(
    path: string,
    sizeBytes: number,
    io: SpillIo,
    boot: string,
    found: (entry: number, record: SpillRecord) => boolean,
  ) {
    this.geometry = geometryOf(sizeBytes)
    this.#path = path
    this.#io = io
    this.#boot = boot
    this.#sizeBytes = sizeBytes
    try {
      this.#descriptor = io.open(path)
    } catch (error) {
      throw this.#failure('it cannot be opened', error)
    }
    try {
      if (this.#counts()) this.#recover(found)
      else io.truncate(this.#descriptor, 0)
      // From here on it counts only as long as the machine runs.
      this.#writeHeader(false)
    } catch (error) {
      io.close(this.#descriptor)
      throw error instanceof TmemError ? error : this.#failure('it cannot be used', error)
    }
  }

  /** Writes the bytes of a page into the ring. */
  writePage(bytes: Uint8Array, length: number, unit: number): void {
    this.#io.write(this.#descriptor, bytes, length, this.geometry.ringAt + unit * unitBytes)
  }

  readPage(into: Uint8Array, length: number, unit: number): Promise<void> {
    return this.#io.read(this.#descriptor, into, length, this.geometry.ringAt + unit * unitBytes)
  }

  writeRecord(entry: number, record: SpillRecord): void {
    const view = this.#view
    this.#record.fill(0)
    view.setUint32(0, record.poolKey, true)
    view.setUint32(4, record.index, true)
    for (let word = 0; word < 3; word++)
      view.setBigUint64(8 + word * 8, BigInt.asUintN(64, record.object >> BigInt(word * 64)), true)
    view.setUint32(32, record.unit, true)
    view.setUint32(36, record.length, true)
    view.setUint32(40, record.codec, true)
    this.#record.set(record.digest, 44)
    view.setUint32(checksumAt, checksumOf(this.#record, entry), true)
    this.#io.write(this.#descriptor, this.#record, recordBytes, headerBytes + entry * recordBytes)
  }

  clearRecord(entry: number): void {
    this.#record.fill(0)
    this.#io.write(this.#descriptor, this.#record, recordBytes, headerBytes + entry * recordBytes)
  }

  /** Nothing in the file may ever be believed again: it is removed and emptied. Answers whether at least one of that worked. */
  abandon(): boolean {
    const tries = [() => this.#io.truncate(this.#descriptor, 0), () => this.#io.unlink(this.#path)]
    return tries.map(worked).some(Boolean)
  }

  /** Makes the content count after a restart of the machine, too, and closes the file. Throws `TmemError`. Idempotent. */
  close(keep: boolean): void {
    if (this.#closed) return
    this.#closed = true
    try {
      if (!keep) return
      this.#io.sync(this.#descriptor)
      this.#writeHeader(true)
      this.#io.sync(this.#descriptor)
    } catch (error) {
      throw this.#failure('it cannot be closed in order: what it holds is lost when the machine stops', error)
    } finally {
      this.#io.close(this.#descriptor)
    }
  }

  /** Whether the content may be believed: ours, of this size, and closed or of this boot. Throws when somebody uses it. */
  #counts(): boolean {
    if (this.#io.size(this.#descriptor) < headerBytes) return false
    const header = new Uint8Array(headerBytes)
    this.#io.readNow(this.#descriptor, header, headerBytes, 0)
    const view = new DataView(header.buffer)
    if (Buffer.from(header.buffer, 0, 8).toString('latin1') !== magic) {
      // A file that is not ours is not overwritten.
      throw new TmemError('TMEM_IO', `spill file ${this.#path}: it holds something else; remove it, or name another`, {
        layer: 'spill',
      })
    }
    if (view.getUint32(headerBytes - 4, true) !== crc32(header.subarray(0, headerBytes - 4))) return false
    if (view.getUint32(8, true) !== version || view.getFloat64(16, true) !== this.#sizeBytes) return false
    const closed = view.getUint32(12, true) === 1
    const boot = textOf(header, bootAt)
    const user = markedProcess(textOf(header, markAt))
    if (!closed && user?.running === true) {
      const who = user.pid === process.pid ? 'this process uses it already' : `process ${user.pid} uses it`
      throw new TmemError('TMEM_IO', `spill file ${this.#path}: ${who}`, { layer: 'spill' })
    }
    return closed || (boot !== '' && boot === this.#boot)
  }

  /** Reads all records. One that is damaged costs one page; so does a second one for the same place. */
  #recover(found: (entry: number, record: SpillRecord) => boolean): void {
    const { capacity, ringAt, units } = this.geometry
    const size = this.#io.size(this.#descriptor)
    const perRead = 1024
    const chunk = new Uint8Array(perRead * recordBytes)
    for (let first = 0; first < capacity; first += perRead) {
      const bytes = Math.min(
        perRead * recordBytes,
        (capacity - first) * recordBytes,
        size - headerBytes - first * recordBytes,
      )
      if (bytes < recordBytes) return
      this.#io.readNow(this.#descriptor, chunk, bytes, headerBytes + first * recordBytes)
      for (let at = 0; at + recordBytes <= bytes; at += recordBytes) {
        const bytesOf = chunk.subarray(at, at + recordBytes)
        const view = new DataView(chunk.buffer, at, recordBytes)
        const entry = first + at / recordBytes
        const length = view.getUint32(36, true)
        if (length === 0) continue
        const unit = view.getUint32(32, true)
        const fits = unit + Math.ceil(length / unitBytes) <= units && ringAt + unit * unitBytes + length <= size
        const good =
          view.getUint32(checksumAt, true) === checksumOf(bytesOf, entry) &&
          fits &&
          found(entry, {
            poolKey: view.getUint32(0, true),
            index: view.getUint32(4, true),
            object:
              view.getBigUint64(8, true) | (view.getBigUint64(16, true) << 64n) | (view.getBigUint64(24, true) << 128n),
            unit,
            length,
            codec: view.getUint32(40, true),
            digest: bytesOf.slice(44, 60),
          })
        if (!good) this.clearRecord(entry)
      }
    }
  }

  #writeHeader(closed: boolean): void {
    const header = new Uint8Array(headerBytes)
    const view = new DataView(header.buffer)
    header.set(Buffer.from(magic, 'latin1'), 0)
    view.setUint32(8, version, true)
    view.setUint32(12, closed ? 1 : 0, true)
    view.setFloat64(16, this.#sizeBytes, true)
    setText(header, bootAt, this.#boot)
    setText(header, markAt, processMark())
    view.setUint32(headerBytes - 4, crc32(header.subarray(0, headerBytes - 4)), true)
    this.#io.write(this.#descriptor, header, headerBytes, 0)
  }

  #failure(what: string, cause: unknown): TmemError {
    const reason = cause instanceof Error ? `: ${cause.message}` : ''
    return new TmemError('TMEM_IO', `spill file ${this.#path}: ${what}${reason}`, { layer: 'spill', cause })
  }
}

/** Of a record at its place: a copy of it elsewhere is not good. */
const checksumOf = (record: Uint8Array, entry: number): number => crc32(record.subarray(0, checksumAt), entry)

function worked(action: () => void): boolean {
  try {
    action()
    return true
  } catch {
    // The caller counts what worked; there is a second way.
    return false
  }
}

/** A text in the header, with its length in the four bytes before it. */
function setText(header: Uint8Array, at: number, text: string): void {
  const bytes = Buffer.from(text, 'latin1').subarray(0, textBytes)
  new DataView(header.buffer).setUint32(at - 4, bytes.length, true)
  header.set(bytes, at)
}

function textOf(header: Uint8Array, at: number): string {
  const length = new DataView(header.buffer).getUint32(at - 4, true)
  return Buffer.from(header.buffer, at, Math.min(length, textBytes)).toString('latin1')
}
