/**
 * The file of a spill: a header, a table of records, and a ring of frames.
 *
 * A record says which page a frame is of and where it lies, and has a digest of it (128 bits of SHA-256), under which
 * alone it is served. It is written after its frame, and emptied before anything happens that makes it wrong; so a
 * process may die at any moment. A machine may not: what the system had not written yet would come back in any order.
 * So a file counts only when it was closed, or when this is still the same boot of the machine. That it was closed is
 * gone from the disk before anything in it changes.
 *
 * Layout: block 0 with the mark of a page file, and the header in it at byte 1024 · records (64 bytes each; all zeros:
 * empty) · the ring, in units of 64 bytes. Little-endian. Nothing of it needs to be right: what does not check is
 * empty.
 *
 * Source: the mail of November 2011 that wants compressed page cache written out; the rest is our own.
 */
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { types } from 'node:util'
import { crc32 } from 'node:zlib'
import { type LayerContext, maxEntries, maxObjectId, type ObjectId, TmemError } from '@tmem/core'
import { PageFile, type PageFileIo } from '@tmem/page-file'

/** Bytes of a record. */
const recordBytes = 64
/** Bytes of the unit in which the ring is counted. */
export const unitBytes = 64
/** Blocks in which the file is written: two writes to one of them cannot be under way at once. */
export const blockBytes = 4096
export const digestBytes = 16

const version = 3
/** Of the header: it begins here, and has this many bytes, the last four of them a checksum. */
const headerAt = 1024
const headerBytes = 128
/** Bytes that one flight carries at most, and frames. */
export const flightBytes: number = 128 * 1024
export const mostFrames: number = flightBytes / unitBytes

/** Sizes of the parts of a file. */
export interface SpillGeometry {
  /** Bytes of all of it. */
  readonly fileBytes: number
  /** Records. */
  readonly capacity: number
  /** Where the ring begins, and its length in units. */
  readonly ringAt: number
  readonly ringUnits: number
}

/** Parts of a file of about so many bytes, 64 KiB at least: one record for each KiB. */
export function geometryOf(sizeBytes: number): SpillGeometry {
  const fileBytes = Math.floor(sizeBytes / blockBytes) * blockBytes
  const capacity = Math.min(maxEntries - mostFrames, Math.floor(fileBytes / 1024))
  const ringAt = blockBytes + Math.ceil((capacity * recordBytes) / blockBytes) * blockBytes
  return { fileBytes, capacity, ringAt, ringUnits: (fileBytes - ringAt) / unitBytes }
}

/** A frame in the file. One object serves for many. */
export class SpillRecord {
  /** The pool's key, the same in every run; object and index. */
  key = 0
  object: ObjectId = 0
  index = 0
  /** Where in the ring: units from its first beginning, counted on when it goes round. */
  position = 0
  /** Units of the frame. */
  units = 0
  readonly digest: Uint8Array = new Uint8Array(digestBytes)
}

/** What is at the place of a record. */
export type Found = 'nothing' | 'damaged' | 'record'

export interface SpillFileOptions {
  readonly path: string
  readonly sizeBytes: number
  /** Name of this boot of the machine; empty: none is known. */
  readonly boot: string
  readonly files: PageFileIo | undefined
}

export class SpillFile {
  readonly geometry: SpillGeometry
  /** Whether anything of an earlier run may be in the table. */
  readonly counts: boolean
  readonly #file: PageFile
  readonly #boot: string
  readonly #sizeBytes: number
  /** Records that are read or written together, and the number of the first of those that were read. */
  readonly #records: Uint8Array
  readonly #view: DataView
  readonly #zeros: Uint8Array = new Uint8Array(recordBytes * 64)
  #loaded = -1

  /**
   * Opens the file, or makes it. Throws `TmemError`: `TMEM_IO` (somebody else's file, or somebody uses it; the message
   * says what to do), `TMEM_NO_MEMORY`; with nothing left behind.
   */
  constructor({ path, sizeBytes, boot, files }: SpillFileOptions, { allocator, io }: LayerContext) {
    this.geometry = geometryOf(sizeBytes)
    this.#boot = boot
    this.#sizeBytes = sizeBytes
    const { fileBytes } = this.geometry
    const memory = allocator.allocate(flightBytes, 'spill.records')
    if (memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `no memory for the records of a spill (${flightBytes} bytes)`, {
        layer: 'spill',
      })
    this.#records = new Uint8Array(memory, 0, flightBytes)
    this.#view = new DataView(memory, 0, flightBytes)
    this.#file = PageFile.open({
      path,
      mode: 'ours',
      bytes: fileBytes,
      // What is in it is checked, and worth nothing when it is gone.
      content: { name: 'tmem spill', tolerant: true },
      keep: true,
      through: 'cache',
      allocator,
      layer: 'spill',
      ...(io === undefined ? {} : { io }),
      ...(files === undefined ? {} : { files }),
    })
    const file = this.#file
    const wasThere = file.found === 'ours' || file.found === 'damaged'
    try {
      const state = wasThere ? this.#state() : 'none'
      this.counts = state !== 'none'
      if (wasThere && !this.counts) file.resize(blockBytes)
      // What was cut off reads as zeros: no frame there has its digest.
      if (file.bytes !== fileBytes) file.resize(fileBytes)
      if (state === 'open') this.#rewriteRecords()
      this.#writeHeader(false)
      // From here on it counts only as long as the machine runs.
      file.syncNow()
    } catch (error) {
      file.closeNow({ remove: !wasThere })
      throw error
    }
  }

  /** Writes frames that lie side by side into the ring. Rejects with `TmemError` (`TMEM_IO`). */
  writeFrames(bytes: Uint8Array, at: number, length: number, unit: number): Promise<void> {
    return this.#file.write(bytes, at, length, this.#placeOf(unit))
  }

  /** The same, before it returns. No other write to one of its blocks is under way. */
  writeFramesNow(bytes: Uint8Array, at: number, length: number, unit: number): void {
    this.#file.writeNow(bytes, at, length, this.#placeOf(unit))
  }

  /** Reads a frame to the start of `into`. Rejects with `TmemError` (`TMEM_IO`). */
  readFrame(into: Uint8Array, length: number, unit: number): Promise<void> {
    return this.#file.read(into, 0, length, this.#placeOf(unit))
  }

  /** The same, before it returns. */
  readFrameNow(into: Uint8Array, length: number, unit: number): void {
    this.#file.readNow(into, 0, length, this.#placeOf(unit))
  }

  #placeOf(unit: number): number {
    return this.geometry.ringAt + unit * unitBytes
  }

  /** Begins records that are written together; those that are not set are empty. */
  beginRecords(count: number): void {
    this.#loaded = -1
    this.#records.fill(0, 0, count * recordBytes)
  }

  /** Sets the record of that number as the one with number `slot` of those that are written together. */
  setRecord(slot: number, number: number, record: SpillRecord): void {
    const at = slot * recordBytes
    const view = this.#view
    view.setUint32(at, record.key, true)
    view.setUint32(at + 4, record.index, true)
    setObject(view, at + 8, record.object)
    view.setFloat64(at + 32, record.position, true)
    view.setUint32(at + 40, record.units, true)
    this.#records.set(record.digest, at + 44)
    view.setUint32(at + 60, this.#checksum(at, number), true)
  }

  /**
   * Writes `count` records that were set, from number `slot` of them on, to the places from number `first` on. Throws
   * `TmemError` (`TMEM_IO`).
   */
  writeRecords(slot: number, count: number, first: number): void {
    this.#file.writeNow(this.#records, slot * recordBytes, count * recordBytes, blockBytes + first * recordBytes)
  }

  /** Empties records, before it returns. Throws `TmemError` (`TMEM_IO`), unless they are empty all the same. */
  eraseRecords(first: number, count: number): void {
    const atOnce = this.#zeros.length / recordBytes
    try {
      for (let done = 0; done < count; done += atOnce)
        this.#file.writeNow(
          this.#zeros,
          0,
          Math.min(atOnce, count - done) * recordBytes,
          blockBytes + (first + done) * recordBytes,
        )
    } catch (error) {
      if (!this.#isEmpty(first, count)) throw error
    }
  }

  /** On a full disk nothing can be written where nothing was. */
  #isEmpty(first: number, count: number): boolean {
    this.#loaded = -1
    const atOnce = this.#records.length / recordBytes
    for (let done = 0; done < count; done += atOnce) {
      const length = Math.min(atOnce, count - done) * recordBytes
      this.#file.readNow(this.#records, 0, length, blockBytes + (first + done) * recordBytes)
      if (!isZero(this.#records, 0, length)) return false
    }
    return true
  }

  /** Reads the record of a number. Fast when its neighbours were read before. Throws `TmemError` (`TMEM_IO`). */
  readRecord(number: number, into: SpillRecord): Found {
    const atOnce = this.#records.length / recordBytes
    const first = number - (number % atOnce)
    if (this.#loaded !== first) {
      const count = Math.min(atOnce, this.geometry.capacity - first)
      this.#file.readNow(this.#records, 0, count * recordBytes, blockBytes + first * recordBytes)
      this.#loaded = first
    }
    const at = (number - first) * recordBytes
    const view = this.#view
    into.units = view.getUint32(at + 40, true)
    if (into.units === 0 && isZero(this.#records, at, recordBytes)) return 'nothing'
    if (view.getUint32(at + 60, true) !== this.#checksum(at, number)) return 'damaged'
    into.key = view.getUint32(at, true)
    into.index = view.getUint32(at + 4, true)
    into.object = objectAt(view, at + 8)
    into.position = view.getFloat64(at + 32, true)
    into.digest.set(this.#records.subarray(at + 44, at + 44 + digestBytes))
    return BigInt(into.object) <= maxObjectId ? 'record' : 'damaged'
  }

  /** Of a record at its place: a copy of it elsewhere is not good. */
  #checksum(at: number, number: number): number {
    return crc32(this.#records.subarray(at, at + 60), number)
  }

  /** Nothing in the file may ever be believed again. Answers whether that could be brought about. */
  disown(): boolean {
    return (
      worked(() => this.#file.writeNow(this.#zeros, 0, headerBytes, headerAt)) ||
      worked(() => this.#file.resize(blockBytes))
    )
  }

  /**
   * Makes the content count after a restart of the machine, too, and closes the file; with `remove` it goes. Rejects
   * with `TmemError` (`TMEM_IO`), the file being closed all the same.
   */
  async close(remove: boolean): Promise<void> {
    const file = this.#file
    try {
      if (remove) return
      await file.sync()
      this.#writeHeader(true)
      await file.sync()
    } finally {
      await file.close({ remove })
    }
  }

  /** Closes the file as it is, before it returns: nothing has come of opening it. */
  closeNow(): void {
    this.#file.closeNow({ remove: false })
  }

  /**
   * Writes the table once more as it is read. What an earlier run has written may be gone from the disk, when a sync
   * failed since then: it can be read, no later sync says so, and an emptied record would come back at the end of the
   * machine. (A frame that is gone has another digest.)
   */
  #rewriteRecords(): void {
    const bytes = this.geometry.ringAt - blockBytes
    for (let done = 0; done < bytes; done += this.#records.length) {
      const length = Math.min(this.#records.length, bytes - done)
      this.#file.readNow(this.#records, 0, length, blockBytes + done)
      this.#file.writeNow(this.#records, 0, length, blockBytes + done)
    }
  }

  /**
   * Whether the content may be believed, being of this version and size: it was closed, or is of a run of this boot
   * that was not.
   */
  #state(): 'closed' | 'open' | 'none' {
    const header = new Uint8Array(headerBytes)
    const view = new DataView(header.buffer)
    if (this.#file.bytes < headerAt + headerBytes) return 'none'
    this.#file.readNow(header, 0, headerBytes, headerAt)
    if (view.getUint32(headerBytes - 4, true) !== crc32(header.subarray(0, headerBytes - 4))) return 'none'
    if (view.getUint32(0, true) !== version || view.getFloat64(8, true) !== this.#sizeBytes) return 'none'
    if (view.getUint32(4, true) === 1) return 'closed'
    const boot = Buffer.from(header.buffer, 20, view.getUint32(16, true)).toString('latin1')
    return boot !== '' && boot === this.#boot ? 'open' : 'none'
  }

  #writeHeader(closed: boolean): void {
    const header = new Uint8Array(headerBytes)
    const view = new DataView(header.buffer)
    const boot = Buffer.from(this.#boot, 'latin1').subarray(0, headerBytes - 24)
    view.setUint32(0, version, true)
    view.setUint32(4, closed ? 1 : 0, true)
    view.setFloat64(8, this.#sizeBytes, true)
    view.setUint32(16, boot.length, true)
    header.set(boot, 20)
    view.setUint32(headerBytes - 4, crc32(header.subarray(0, headerBytes - 4)), true)
    this.#file.writeNow(header, 0, headerBytes, headerAt)
  }
}

/** A name of this boot of the machine, where there is one (Linux). */
export function bootName(): string {
  try {
    return readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim()
  } catch (error) {
    // Another system: then a file counts only when it was closed.
    if (types.isNativeError(error) && 'code' in error) return ''
    throw error
  }
}

/** Digest of a frame: the start of its SHA-256. */
export function digestOf(bytes: Uint8Array, at: number, length: number): Uint8Array {
  const hash = createHash('sha256').update(bytes.subarray(at, at + length))
  return hash.digest().subarray(0, digestBytes)
}

/** Writes an object id of up to 192 bits. */
function setObject(view: DataView, at: number, object: ObjectId): void {
  if (typeof object === 'number') {
    view.setUint32(at, object >>> 0, true)
    view.setUint32(at + 4, Math.floor(object / 2 ** 32), true)
    return
  }
  for (let word = 0; word < 3; word++)
    view.setBigUint64(at + word * 8, BigInt.asUintN(64, object >> BigInt(word * 64)), true)
}

/** The object id there: a number where it fits one. */
function objectAt(view: DataView, at: number): ObjectId {
  const high = view.getUint32(at + 4, true)
  let isNumber = high < 2 ** 21
  for (let word = 8; word < 24; word += 4) isNumber &&= view.getUint32(at + word, true) === 0
  if (isNumber) return high * 2 ** 32 + view.getUint32(at, true)
  let object = 0n
  for (let word = 2; word >= 0; word--) object = (object << 64n) | view.getBigUint64(at + word * 8, true)
  return object
}

function isZero(bytes: Uint8Array, from: number, length: number): boolean {
  for (let at = from; at < from + length; at++) if (bytes[at] !== 0) return false
  return true
}

/** Whether an action on the file worked; the caller has another one, or says so. */
function worked(action: () => void): boolean {
  try {
    action()
    return true
  } catch (error) {
    if (types.isNativeError(error)) return false
    throw error
  }
}
