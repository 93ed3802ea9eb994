/**
 * The file (or block device) under a swap area: whole-page synchronous writes, asynchronous reads, direct I/O.
 *
 * Direct I/O (`O_DIRECT`) keeps the operating system from caching the pages a second time. It wants memory that is
 * aligned for the device, and JavaScript cannot see addresses; so the first aligned place is found by trying the first
 * write at every multiple of 16 bytes of a page (the allocator's alignment) until the kernel takes it. A file system that
 * refuses, or that keeps its files in memory anyway (tmpfs, ramfs), is used through its cache, and `directIo` says so.
 *
 * Room is made when the file is made: every block is written once. A sparse file would find the disk full in the middle
 * of a swap-out, and blocks that were never written make the file system journal their first write.
 *
 * A file that is to be removed at the end says so in its first bytes (which a swap header leaves free), with the mark of its process. When that
 * process is killed the file stays; who wants to make a file of that name finds the mark, and takes the leftover away.
 *
 * Invariants: a file that was made here is removed again when anything fails before `open` returns; a file that was
 * there before is never made, resized or removed, unless its maker has said that nobody will want it, and has ended.
 *
 * Source: open(2), swapon(2) (files with holes are refused), mkswap(8) for what an existing area must look like.
 */
import {
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  lstatSync,
  openSync,
  read,
  readFileSync,
  readSync,
  realpathSync,
  rmSync,
  type Stats,
  statfsSync,
  unlinkSync,
  writeSync,
} from 'node:fs'
import { dirname, resolve } from 'node:path'
import { type MarkedProcess, markedProcess, processMark, TmemError } from '@tmem/core'

/** Bytes of one slot: the page of the swap area's header. */
export const slotBytes = 4096

/** What a swap area needs of a file. Tests give one that fails. */
export interface BlockFile {
  /** True when the operating system's cache is bypassed. */
  readonly directIo: boolean
  /** The first offset of the I/O memory from which transfers are aligned. */
  readonly alignedFrom: number
  /** Writes all of `length` bytes of the I/O memory from `at` to `position`, or throws the system's error. */
  write(at: number, length: number, position: number): void
  /** Reads exactly `length` bytes to `at` of the I/O memory, or rejects with the system's error. */
  read(at: number, length: number, position: number): Promise<void>
  /** Closes the file; removes it when it was made here and `keep` was not asked for. No read may be under way. */
  close(): void
}

/** Which file, and how. */
export interface BlockFileRequest {
  /** Path. Without `existing` nothing may be there yet, but for what a killed process made and would have removed. */
  readonly file: string
  /** Bytes that are needed, a multiple of 4096. */
  readonly bytes: number
  /** Use what is there: a file or block device with a swap header (`mkswap`) that is not in use. */
  readonly existing: boolean
  /** Leave a file that was made here in place. */
  readonly keep: boolean
  /** Read in the calling thread, which may wait, instead of the runtime's pool of threads. */
  readonly blockingReads: boolean
  /** The I/O memory: at least 8192 bytes. Every transfer is from or to it. */
  readonly memory: Uint8Array
  /** The header to write when the file is made here: 4096 bytes. */
  readonly header: Uint8Array
}

/** Opens a file as `BlockFile`. Throws `TmemError` (`TMEM_IO`) with nothing left behind. */
export type OpenBlockFile = (request: BlockFileRequest) => BlockFile

/** File systems that keep their files in memory: `O_DIRECT` has no meaning there (tmpfs, ramfs). */
const memoryFileSystems: ReadonlySet<number> = new Set([0x01021994, 0x858458f6])

const failure = (request: BlockFileRequest, what: string, cause?: unknown): TmemError =>
  new TmemError('TMEM_IO', `swap file ${request.file}: ${what}`, { layer: 'frontswap', cause })

const reason = (error: unknown): string => (error instanceof Error ? error.message : String(error))

/** Whether `error` is a system error with that code. */
export const hasCode = (error: unknown, code: string): boolean =>
  error instanceof Error && 'code' in error && error.code === code

/** Opens a real file or block device. */
export const openBlockFile: OpenBlockFile = (request) => {
  if (request.existing) return openExisting(request)
  const descriptor = makeFile(request)
  const file = new NodeBlockFile(request, descriptor, true)
  try {
    const room = statfsSync(dirname(resolve(request.file)))
    if (room.bavail * room.bsize < request.bytes)
      throw failure(
        request,
        `it needs ${request.bytes} bytes, and ${room.bavail * room.bsize} are free on its file system`,
      )
    file.prepare(request.keep ? request.header : marked(request.header))
    file.fill()
  } catch (error) {
    file.close()
    if (error instanceof TmemError) throw error
    throw failure(request, `its ${request.bytes} bytes cannot be written: ${reason(error)}`, error)
  }
  return file
}

function makeFile(request: BlockFileRequest): number {
  const { O_RDWR, O_CREAT, O_EXCL } = constants
  for (;;) {
    try {
      return openSync(request.file, O_RDWR | O_CREAT | O_EXCL, 0o600)
    } catch (error) {
      if (!hasCode(error, 'EEXIST')) throw failure(request, `it cannot be made: ${reason(error)}`, error)
      const maker = makerOf(request.file)
      if (maker?.running === true)
        throw failure(request, `process ${maker.pid} made it, and uses it; give each device a file of its own`, error)
      if (maker === undefined)
        throw failure(request, 'it exists already; remove it, or ask for the existing one to be used', error)
      // Had its maker not ended after all (in another container), it would go on with a file that has lost its name only.
      rmSync(request.file, { force: true })
    }
  }
}

const markStart = 'tmem swap file, not kept; process '

/** A header whose free space says who will remove the file. */
function marked(header: Uint8Array): Uint8Array {
  const page = header.slice()
  page.set(Buffer.from(`${markStart}${processMark()}\n`, 'latin1'))
  return page
}

/** Who made that file and would have removed it; `undefined` when it is no such file. */
function makerOf(path: string): MarkedProcess | undefined {
  let descriptor: number
  try {
    // A pipe would keep us waiting, and a link leads to somebody else's file.
    if (!lstatSync(path).isFile()) return undefined
    descriptor = openSync(path, constants.O_RDONLY)
  } catch (error) {
    if (hasCode(error, 'ENOENT') || hasCode(error, 'EACCES')) return undefined
    throw error
  }
  try {
    const page = Buffer.alloc(slotBytes)
    if (readSync(descriptor, page, 0, slotBytes, 0) < slotBytes) return undefined
    const text = page.toString('latin1')
    if (!text.startsWith(markStart) || !text.endsWith('SWAPSPACE2')) return undefined
    return markedProcess(text.slice(markStart.length, text.indexOf('\n')))
  } finally {
    closeSync(descriptor)
  }
}

function openExisting(request: BlockFileRequest): BlockFile {
  const { O_RDWR, O_EXCL } = constants
  let descriptor: number
  let kind: Stats
  try {
    kind = lstatSync(realpathSync(request.file))
    if (!kind.isFile() && !kind.isBlockDevice()) throw failure(request, 'it is neither a file nor a block device')
    // O_EXCL on a block device: refused (EBUSY) while it is mounted or swapped to.
    descriptor = openSync(request.file, kind.isBlockDevice() ? O_RDWR | O_EXCL : O_RDWR)
  } catch (error) {
    if (error instanceof TmemError) throw error
    if (hasCode(error, 'EBUSY')) throw failure(request, 'the device is in use (mounted, or active swap)', error)
    throw failure(request, `it cannot be opened: ${reason(error)}`, error)
  }
  const file = new NodeBlockFile(request, descriptor, false)
  try {
    if (isActiveSwap(request.file)) throw failure(request, 'the system swaps to it; run swapoff first')
    const page = new Uint8Array(slotBytes)
    const length = readSync(descriptor, page, 0, slotBytes, 0)
    const signature = length === slotBytes ? String.fromCharCode(...page.subarray(slotBytes - 10)) : ''
    if (signature !== 'SWAPSPACE2')
      throw failure(request, 'it has no swap header, so its content belongs to somebody else; run mkswap on it first')
    const view = new DataView(page.buffer)
    const pages = view.getUint32(1028, true) + 1
    if (view.getUint32(1024, true) !== 1) throw failure(request, 'its swap header is of another version than 1')
    if (pages * slotBytes < request.bytes)
      throw failure(
        request,
        `its header has ${pages} pages of 4096 bytes, and ${request.bytes / slotBytes} are asked for`,
      )
    if (view.getUint32(1032, true) !== 0) throw failure(request, 'its header lists bad pages, which are not supported')
    if (kind.isFile() && kind.size < request.bytes)
      throw failure(request, `it has ${kind.size} bytes, fewer than the ${request.bytes} that its header promises`)
    file.prepare(page)
    // A file may have holes; a device has its blocks.
    if (kind.isFile()) file.fill()
  } catch (error) {
    file.close()
    if (error instanceof TmemError) throw error
    throw failure(request, `it cannot be used: ${reason(error)}`, error)
  }
  return file
}

/** Whether the kernel swaps to that file now (Linux's list of swap areas; elsewhere there is no such list). */
function isActiveSwap(file: string): boolean {
  const path = realpathSync(file)
  let list: string
  try {
    list = readFileSync('/proc/swaps', 'utf8')
  } catch (error) {
    if (hasCode(error, 'ENOENT')) return false
    throw error
  }
  // Blanks in a path are written in octal there.
  return list.split('\n').some((line) => line.split(/\s+/)[0]?.replaceAll('\\040', ' ') === path)
}

class NodeBlockFile implements BlockFile {
  directIo = false
  alignedFrom = 0
  readonly #request: BlockFileRequest
  readonly #made: boolean
  /** The first descriptor stays open: on a block device it is what keeps others out. */
  readonly #first: number
  /** Where transfers go: the first descriptor, or one with direct I/O. */
  #descriptor: number
  #closed = false

  constructor(request: BlockFileRequest, descriptor: number, made: boolean) {
    this.#request = request
    this.#first = descriptor
    this.#descriptor = descriptor
    this.#made = made
  }

  /** Goes over to direct I/O where that works, finds the aligned place, and writes the header to slot 0. */
  prepare(header: Uint8Array): void {
    const { memory } = this.#request
    if (this.#goDirect(header)) return
    memory.set(header, 0)
    this.write(0, slotBytes, 0)
  }

  #goDirect(header: Uint8Array): boolean {
    const { memory, file } = this.#request
    // Without O_DIRECT in the constants the platform has none (macOS, Windows).
    const flag: number | undefined = constants.O_DIRECT
    const first = fstatSync(this.#first)
    // The node of a device lies in a file system in memory, the device does not.
    if (flag === undefined || (first.isFile() && memoryFileSystems.has(statfsSync(file).type))) return false
    let direct: number
    try {
      direct = openSync(file, constants.O_RDWR | flag)
    } catch (error) {
      if (hasCode(error, 'EINVAL')) return false
      throw error
    }
    let taken = false
    try {
      const second = fstatSync(direct)
      if (first.ino !== second.ino || first.dev !== second.dev)
        throw failure(this.#request, 'somebody else replaced it while it was being opened')
      let at = 0
      for (; at < slotBytes && !taken; at += 16) {
        memory.set(header, at)
        taken = takes(direct, memory, at)
      }
      if (!taken) return false
      this.#descriptor = direct
      this.directIo = true
      this.alignedFrom = at - 16
      return true
    } finally {
      if (!taken) closeSync(direct)
    }
  }

  /** Writes every block after the header once. */
  fill(): void {
    const { bytes, memory } = this.#request
    const chunk = Math.floor((memory.length - this.alignedFrom) / slotBytes) * slotBytes
    memory.fill(0)
    for (let position = slotBytes; position < bytes; position += chunk)
      this.write(this.alignedFrom, Math.min(chunk, bytes - position), position)
    // What goes through a cache may find the disk full later than now.
    if (!this.directIo) fsyncSync(this.#descriptor)
  }

  write(at: number, length: number, position: number): void {
    const { memory } = this.#request
    for (let done = 0; done < length; )
      done += checked(writeSync(this.#descriptor, memory, at + done, length - done, position + done), 'write')
  }

  async read(at: number, length: number, position: number): Promise<void> {
    const { memory, blockingReads } = this.#request
    if (blockingReads) {
      for (let done = 0; done < length; )
        done += checked(readSync(this.#descriptor, memory, at + done, length - done, position + done), 'read')
      return
    }
    await new Promise<void>((resolve, reject) => {
      const next = (done: number): void =>
        read(this.#descriptor, memory, at + done, length - done, position + done, (error, bytes) => {
          if (error !== null) reject(error)
          else if (bytes === 0) reject(new Error(`end of file at ${position + done}`))
          else if (done + bytes < length) next(done + bytes)
          else resolve()
        })
      next(0)
    })
  }

  close(): void {
    if (this.#closed) return
    this.#closed = true
    const { file, keep } = this.#request
    try {
      if (!this.#made || keep) return
      const ours = fstatSync(this.#first)
      const there = lstatSync(file, { throwIfNoEntry: false })
      // Only what was made here is removed: somebody may have put another file in its place.
      if (there !== undefined && there.ino === ours.ino && there.dev === ours.dev) unlinkSync(file)
    } finally {
      if (this.#descriptor !== this.#first) closeSync(this.#descriptor)
      closeSync(this.#first)
    }
  }
}

/** Tries one direct write of a page at a possibly unaligned place. */
function takes(descriptor: number, memory: Uint8Array, at: number): boolean {
  try {
    return writeSync(descriptor, memory, at, slotBytes, 0) === slotBytes
  } catch (error) {
    if (hasCode(error, 'EINVAL')) return false
    throw error
  }
}

function checked(bytes: number, what: string): number {
  // A transfer of nothing would be tried for ever.
  if (bytes === 0) throw new Error(`${what} transferred nothing`)
  return bytes
}
