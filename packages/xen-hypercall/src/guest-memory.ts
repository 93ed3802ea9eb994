/**
 * The memory of a guest: bytes, and a table that says which of them each frame number of the guest stands for.
 *
 * Addresses and frame numbers come from the guest, and may be anything: a bad one is an answer, not an exception. A
 * read of a structure copies it once, and the copy is checked, because a guest may write meanwhile.
 */
import { pageBytes } from './abi.ts'

/** No frame. */
export const noFrame = -1

export class GuestMemory {
  readonly bytes: Uint8Array
  /** True: others can write to it meanwhile. */
  readonly isShared: boolean
  /** `bytes` as words; none where they are not aligned. */
  readonly words: Uint32Array
  readonly #frames: Int32Array
  /** By frame number: the view of what it stands for, made when it is first asked for. */
  readonly #views: (Uint8Array | undefined)[] = []

  /**
   * @param bytes a whole number of pages of 4 KiB
   * @param frames by frame number of the guest the number of the page in `bytes`, or `noFrame`; at most 2^24 of them.
   *   Default: one after the other. Copied; see `map`.
   * @param isShared others can write to it meanwhile: threads, or processes that have it mapped. Default: whether it is
   * a
   *   SharedArrayBuffer
   */
  constructor(bytes: Uint8Array, frames?: ArrayLike<number>, isShared: boolean = isSharedArray(bytes)) {
    if (bytes.length % pageBytes !== 0)
      throw new RangeError(`guest memory: expected a multiple of ${pageBytes} bytes, got ${bytes.length}`)
    const pages = bytes.length / pageBytes
    if (frames !== undefined && frames.length > 2 ** 24)
      throw new RangeError(`guest memory: expected at most ${2 ** 24} frames, got ${frames.length}`)
    this.bytes = bytes
    this.words =
      bytes.byteOffset % 4 === 0
        ? new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
        : new Uint32Array(0)
    this.isShared = isShared
    this.#frames = frames === undefined ? Int32Array.from({ length: pages }, (_, n) => n) : Int32Array.from(frames)
    for (const [frame, page] of this.#frames.entries()) this.#assertPage(frame, page)
  }

  /** Frame numbers run from 0 to less than this. */
  get frames(): number {
    return this.#frames.length
  }

  /** Changes what a frame number stands for: a page of `bytes`, or `noFrame`. */
  map(frame: number, page: number): void {
    if (!(frame >= 0 && frame < this.#frames.length)) throw new RangeError(`guest memory: there is no frame ${frame}`)
    this.#assertPage(frame, page)
    this.#frames[frame] = page
    this.#views[frame] = undefined
  }

  #assertPage(frame: number, page: number): void {
    if (page !== noFrame && !(page >= 0 && page < this.bytes.length / pageBytes))
      throw new RangeError(`guest memory: frame ${frame} cannot stand for page ${page}`)
  }

  /** The 4 KiB of a frame, or `undefined`: there is no such frame. The same view until `map` changes it. */
  frame(number: number): Uint8Array | undefined {
    if (!(number >= 0 && number < this.#views.length)) return this.#view(number)
    return this.#views[number] ?? this.#view(number)
  }

  #view(number: number): Uint8Array | undefined {
    const page = number >= 0 ? this.#frames[number] : undefined
    if (page === undefined || page === noFrame) return undefined
    const view = this.bytes.subarray(page * pageBytes, (page + 1) * pageBytes)
    this.#views[number] = view
    return view
  }

  /** Copies from the guest, across frames; false: some of it is not there, and `into` may be filled in part. */
  read(address: number, into: Uint8Array): boolean {
    return this.#transfer(address, into, false)
  }

  /**
   * The number of the word of `words` at an address, with so many bytes behind it; -1: it is not aligned, lies in two
   * frames, or is not there. What is read there is read once: a guest may change it meanwhile.
   */
  wordAt(address: number, length: number): number {
    // Of 32 bits: others are not what a guest of that much memory gives.
    const frame = address >>> 12
    const within = address & (pageBytes - 1)
    if (frame * pageBytes + within !== address || frame >= this.#frames.length) return -1
    if ((within & 3) !== 0 || within + length > pageBytes || this.words.length === 0) return -1
    const page = this.#frames[frame]!
    return page === noFrame ? -1 : (page * pageBytes + within) >>> 2
  }

  /** Copies to the guest, across frames; false: some of it is not there, and nothing was written. */
  write(address: number, from: Uint8Array): boolean {
    return this.has(address, from.length) && this.#transfer(address, from, true)
  }

  /** Whether all of these bytes are there. */
  has(address: number, length: number): boolean {
    if (!Number.isSafeInteger(address) || address < 0 || !Number.isSafeInteger(address + length)) return false
    const last = Math.floor((address + Math.max(length, 1) - 1) / pageBytes)
    if (last >= this.#frames.length) return false
    for (let frame = Math.floor(address / pageBytes); frame <= last; frame++)
      if (this.#frames[frame] === noFrame) return false
    return true
  }

  #transfer(address: number, bytes: Uint8Array, isWrite: boolean): boolean {
    if (!this.has(address, bytes.length)) return false
    for (let done = 0; done < bytes.length; ) {
      const at = (address + done) % pageBytes
      const length = Math.min(pageBytes - at, bytes.length - done)
      const start = this.#frames[Math.floor((address + done) / pageBytes)]! * pageBytes + at
      if (isWrite) copy.call(bytes, this.bytes, start, done, done + length)
      else copy.call(this.bytes, bytes, done, start, start + length)
      done += length
    }
    return true
  }
}

const isSharedArray = ({ buffer }: Uint8Array): boolean =>
  typeof SharedArrayBuffer === 'function' && buffer instanceof SharedArrayBuffer

/** The runtime's own copy with offsets, which makes no view. */
const copy: (this: Uint8Array, target: Uint8Array, to: number, from: number, end: number) => number =
  Buffer.prototype.copy
