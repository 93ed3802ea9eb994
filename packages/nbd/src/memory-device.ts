/**
 * A block device of plain memory: for tests, and as the export without compression.
 *
 * Its whole size is reserved when it is made, so that no write can be refused later; the operating system gives memory
 * when a page is first written. A bit per 4 KiB page says whether it was written: what was not, or was discarded, reads
 * as zeros. Discarded memory is zeroed and stays reserved.
 */
import {
  type Allocator,
  assertBlockRange,
  type BlockDevice,
  type ByteAmount,
  bytesOf,
  checkOptions,
  type StatsNode,
  systemAllocator,
  TmemError,
} from '@tmem/core'

/** Settings of a device of plain memory. */
export interface MemoryDeviceOptions {
  /** Bytes; a multiple of `blockSize`. */
  readonly sizeBytes: ByteAmount
  /** Smallest unit of a request: a power of two from 1 (the default) to 4096. */
  readonly blockSize?: ByteAmount
  readonly readOnly?: boolean
  readonly name?: string
  readonly allocator?: Allocator
}

/** A device that does everything at once. */
export interface MemoryDevice extends BlockDevice {
  read(at: number, into: Uint8Array): undefined
  write(at: number, bytes: Uint8Array): undefined
  discard(at: number, length: number): undefined
  zero(at: number, length: number, keep?: boolean): undefined
  flush(): undefined
  resize(sizeBytes: number): void
}

const pageSize = 4096
/** Memory is had in pieces, because one buffer cannot be as large as a device. */
const pieceBytes = 64 * 2 ** 20

/** Makes a device of plain memory. Throws `TMEM_NO_MEMORY` when its size is not to be had. */
export function memoryDevice(options: MemoryDeviceOptions): MemoryDevice {
  checkOptions('memoryDevice', options, {
    sizeBytes: 'bytes',
    blockSize: 'bytes?',
    readOnly: 'flag?',
    name: 'text?',
    allocator: 'object?',
  })
  const blockSize = bytesOf('memoryDevice', 'blockSize', options.blockSize ?? 1)
  if (!Number.isInteger(blockSize) || blockSize < 1 || blockSize > pageSize || (blockSize & (blockSize - 1)) !== 0)
    throw new RangeError(`blockSize must be a power of two from 1 to ${pageSize}, got ${blockSize}`)
  return new PlainMemory(options, blockSize)
}

class PlainMemory implements MemoryDevice {
  readonly name: string
  readonly blockSize: number
  readonly preferredBlockSize = pageSize
  readonly readOnly: boolean
  #sizeBytes = 0
  #pieces: Buffer[] = []
  /** A bit per page: it was written. */
  #written: Uint8Array = new Uint8Array(0)
  readonly #allocator: Allocator
  #closed = false
  readonly #counters = { reads: 0, writes: 0, bytesRead: 0, bytesWritten: 0, discards: 0, zeroes: 0, flushes: 0 }

  constructor(options: MemoryDeviceOptions, blockSize: number) {
    this.name = options.name ?? 'memory'
    this.blockSize = blockSize
    this.readOnly = options.readOnly ?? false
    this.#allocator = options.allocator ?? systemAllocator
    this.resize(bytesOf('memoryDevice', 'sizeBytes', options.sizeBytes))
  }

  get sizeBytes(): number {
    return this.#sizeBytes
  }

  /** What is cut off is gone: after growing again it reads as zeros. */
  resize(sizeBytes: number): void {
    if (!Number.isSafeInteger(sizeBytes) || sizeBytes < 0 || sizeBytes % this.blockSize !== 0)
      throw new RangeError(`sizeBytes must be a multiple of ${this.blockSize}, got ${sizeBytes}`)
    this.#assertOpen()
    if (sizeBytes < this.#sizeBytes) this.#erase(sizeBytes, this.#sizeBytes - sizeBytes)
    const pieces: Buffer[] = []
    for (let at = 0; at < sizeBytes; at += pieceBytes) {
      const bytes = Math.min(pieceBytes, sizeBytes - at)
      const old = this.#pieces[pieces.length]
      if (old !== undefined && old.length >= bytes) pieces.push(old)
      else {
        const made = Buffer.from(this.#allocate(Math.ceil(bytes / pageSize) * pageSize, 'memoryDevice.piece'))
        old?.copy(made)
        pieces.push(made)
      }
    }
    const pages = Math.ceil(sizeBytes / pageSize)
    const written = new Uint8Array(this.#allocate(Math.max(1, Math.ceil(pages / 8)), 'memoryDevice.written'))
    written.set(this.#written.subarray(0, written.length))
    this.#pieces = pieces
    this.#written = written
    this.#sizeBytes = sizeBytes
  }

  read(at: number, into: Uint8Array): undefined {
    this.#assert(at, into.length)
    this.#counters.reads++
    this.#counters.bytesRead += into.length
    let done = 0
    while (done < into.length) {
      const piece = this.#pieces[Math.floor((at + done) / pieceBytes)]!
      const from = (at + done) % pieceBytes
      done += piece.copy(into, done, from, Math.min(pieceBytes, from + into.length - done))
    }
    return undefined
  }

  write(at: number, bytes: Uint8Array): undefined {
    this.#assert(at, bytes.length)
    this.#counters.writes++
    this.#counters.bytesWritten += bytes.length
    const end = at + bytes.length
    const last = Math.floor((end - 1) / pageSize)
    for (let page = Math.floor(at / pageSize); page <= last; page++) this.#written[page >> 3]! |= 1 << (page & 7)
    const from = at % pieceBytes
    if (bytes.length === 0) return undefined
    if (from + bytes.length <= pieceBytes) {
      this.#pieces[Math.floor(at / pieceBytes)]!.set(bytes, from)
      return undefined
    }
    for (let done = 0; done < bytes.length; ) {
      const place = (at + done) % pieceBytes
      const length = Math.min(bytes.length - done, pieceBytes - place)
      this.#pieces[Math.floor((at + done) / pieceBytes)]!.set(bytes.subarray(done, done + length), place)
      done += length
    }
    return undefined
  }

  discard(at: number, length: number): undefined {
    this.#assert(at, length)
    this.#counters.discards++
    this.#erase(at, length)
    return undefined
  }

  zero(at: number, length: number, keep = false): undefined {
    this.#assert(at, length)
    this.#counters.zeroes++
    this.#erase(at, length)
    if (!keep || length === 0) return undefined
    const last = Math.floor((at + length - 1) / pageSize)
    for (let page = Math.floor(at / pageSize); page <= last; page++) this.#written[page >> 3]! |= 1 << (page & 7)
    return undefined
  }

  flush(): undefined {
    this.#assertOpen()
    this.#counters.flushes++
    return undefined
  }

  map(at: number, length: number, report: (length: number, allocated: boolean) => boolean): void {
    this.#assert(at, length)
    const end = at + length
    let from = at
    while (from < end) {
      const page = Math.floor(from / pageSize)
      const written = this.#isWritten(page)
      let next = page + 1
      while (next * pageSize < end && this.#isWritten(next) === written) next++
      const to = Math.min(end, next * pageSize)
      if (!report(to - from, written)) return
      from = to
    }
  }

  stats(): StatsNode {
    let pages = 0
    for (const byte of this.#written) for (let bits = byte; bits !== 0; bits &= bits - 1) pages++
    return {
      name: this.name,
      counters: { ...this.#counters, size_bytes: this.#sizeBytes, written_pages: pages },
      children: [],
    }
  }

  async close(): Promise<void> {
    this.#closed = true
    this.#pieces = []
    this.#written = new Uint8Array(0)
  }

  #isWritten(page: number): boolean {
    return ((this.#written[page >> 3]! >> (page & 7)) & 1) === 1
  }

  /** Zeros the range; pages that lie in it as a whole count as never written. */
  #erase(at: number, length: number): void {
    const end = at + length
    for (let from = at; from < end; ) {
      const page = Math.floor(from / pageSize)
      const to = Math.min(end, (page + 1) * pageSize)
      // Eight pages at a time where none was written: a large discard of an empty device touches no memory.
      if ((page & 7) === 0 && this.#written[page >> 3] === 0) {
        from = (page + 8) * pageSize
        continue
      }
      if (this.#isWritten(page)) {
        const place = from % pieceBytes
        this.#pieces[Math.floor(from / pieceBytes)]!.fill(0, place, place + to - from)
        if (to - from === pageSize || (from % pageSize === 0 && to === this.#sizeBytes))
          this.#written[page >> 3]! &= ~(1 << (page & 7))
      }
      from = to
    }
  }

  #allocate(bytes: number, site: string): ArrayBufferLike {
    const memory = this.#allocator.allocate(bytes, site)
    if (memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `no memory for the device ${this.name}: ${bytes} bytes were refused`, {
        layer: this.name,
      })
    return memory
  }

  #assert(at: number, length: number): void {
    this.#assertOpen()
    assertBlockRange(this, at, length)
  }

  #assertOpen(): void {
    if (this.#closed) throw new TmemError('TMEM_CLOSED', `the device ${this.name} was closed`, { layer: this.name })
  }
}
