/**
 * A file of our own: swap areas, cold blocks, spills, images. It is opened by what may be there, claimed, marked, and
 * moved whole ranges in and out of, around the operating system's cache where that can be.
 *
 * Invariants:
 *  - No file is written, resized or removed that is not ours, unless the caller asked for a foreign one by its mode;
 *    and none
 *    that another owner, in whichever process or thread, has claimed. Everything is judged before it is opened and once
 *    more when it is claimed: what does not pass is as it was.
 *  - When `open` throws, nothing is left behind: what was made is removed again.
 *  - Where the system has files without a name, one that is made gets its name when it is claimed and marked: nobody
 *    finds it before, and a process that is killed meanwhile leaves nothing.
 *  - Only the very file that was opened is removed (device and inode), and only when it was made here or its maker had
 *    said that nobody
 *    will want it.
 *  - A transfer moves the whole range or fails, with the system's error as cause. See transfers.ts for order, memory
 *    and late errors.
 *  - A file that is to be kept and that nobody can find any more (removed, renamed, replaced), or that somebody else
 *    has cut off, fails its next sync. No write makes a file that was cut off as long as it was, which would hide it.
 *
 * Source: open(2), swapon(2), mkswap(8) for what a swap area must look like; the rest is our own.
 */
import { dirname, resolve } from 'node:path'
import { types } from 'node:util'
import { type Allocator, type ByteAmount, bytesOf, checkOptions, systemAllocator, TmemError } from '@tmem/core'
import {
  blockBytes,
  type FileClaim,
  findMark,
  hasCode,
  isZeros,
  type Mark,
  markOf,
  markPlaces,
  setMark,
  standsAgainst,
  touchesMark,
  userOf,
  userText,
} from './claim.ts'
import { type FileIdentity, type PageFileIo, systemFiles } from './system.ts'
import { type PageFileCounters, TransferBuffers, Transfers } from './transfers.ts'

/** What a marked file holds. */
export interface PageFileContent {
  /**
   * In words, 1 to 64 printable ASCII characters: `tmem cold blocks`. A file with another name in its mark is not
   * opened.
   */
  readonly name: string
  /**
   * The first block of a new file: 4096 bytes (default: zeros). Bytes 0 to 1023 and 3072 to 4085 become the mark's; the
   * others stay the caller's, who may read and write them at any time.
   */
  readonly header?: Uint8Array
  /**
   * A file of zeros only (what a power failure leaves), and one with one of its two marks damaged, are ours, too: for
   * content that is checked, or worth nothing. Default false: such a file is refused.
   */
  readonly tolerant?: boolean
}

/**
 * What may be there.
 *  - `make`: nothing, or a leftover: a file that we made, would have removed, and whose process or thread has ended.
 *  - `ours`: nothing, or a file with our mark and the same content.
 *  - `plain`: nothing, or any file. It has no mark: every byte of it is the caller's.
 *  - `existing`: a file or device, whatever it holds. With `content` it is marked and becomes ours; without, only the
 *    caller writes to it.
 *  - `read`: the same, to be read only, and not claimed.
 */
export type PageFileMode = (typeof modes)[number]

const modes = ['make', 'ours', 'plain', 'existing', 'read'] as const

/**
 * What was there.
 *  - `nothing`: it was made. `leftover`, `zeros`: it was emptied. All three read as zeros, but for the first block of a
 *    marked one.
 *  - `ours`; `damaged`: ours, but one of its marks was spoilt, so its content needs to be checked.
 *  - `other`: a file without a mark that counts (modes `plain`, `existing`, `read`).
 */
export type PageFileFound = 'nothing' | 'leftover' | 'zeros' | 'ours' | 'damaged' | 'other'

/** Which file, and how. */
export interface PageFileRequest {
  /** Path. Links in its last part are followed with the modes `existing` and `read`, and refused with the others. */
  readonly path: string
  readonly mode: PageFileMode
  /** Length of a file that is made or emptied, a multiple of 4096. What was there keeps its length until `resize`. */
  readonly bytes?: ByteAmount
  /** What it holds: required with `make` and `ours`, possible with `existing`. */
  readonly content?: PageFileContent
  /**
   * Leave the file in place when it is closed (default: false; what was there with another mark than that of a leftover
   * always stays).
   */
  readonly keep?: boolean
  /**
   * A block device may be used (default: it is refused). It must be free: not mounted, swapped to, or in use otherwise.
   */
  readonly blockDevice?: boolean
  /**
   * `device` (default): around the operating system's cache where that can be, and a write is acknowledged when its
   * errors have been reported. `cache`: a write is acknowledged when it is in the cache; a late error is reported by
   * `sync`.
   */
  readonly through?: 'device' | 'cache'
  /**
   * `blocking`: all transfers are done in the calling thread, which waits: for a thread on which those of the runtime's
   * pool may be waiting (a pager). Default `pool`: only `readNow`, `writeNow` and `syncNow` block.
   */
  readonly io?: 'pool' | 'blocking'
  /** Where memory comes from, at sites `pageFile.…` (default: the system). */
  readonly allocator?: Allocator
  /** Buffers to share with other files of this thread (default: four of 128 KiB of its own). */
  readonly buffers?: TransferBuffers
  /** The layer that its errors name (default: `page-file`). */
  readonly layer?: string
  /** The system that has the file (default: this machine's). */
  readonly files?: PageFileIo
}

/** Told how much of a file is done. */
export type Progress = (bytes: number, total: number) => void

/** How often a file is looked at again when others open, replace or remove it at the same moment: 15 ms in all. */
const attempts = 6

/** An open file. */
export class PageFile {
  readonly path: string
  readonly found: PageFileFound
  /** The file stays when it is closed. */
  readonly keep: boolean
  /**
   * The kinds of lock by which it is claimed: `flock`, `net:[NUMBER]` (a socket's name in that namespace); none for
   * mode `read`.
   */
  readonly locks: readonly string[]
  /** Bytes of a block: a write of whole ones needs no reads, and only whole ones are given back. */
  readonly blockBytes: number = blockBytes
  readonly #io: PageFileIo
  readonly #layer: string
  readonly #identity: FileIdentity
  readonly #descriptor: number
  readonly #claim: FileClaim | undefined
  readonly #content: PageFileContent | undefined
  readonly #readOnly: boolean
  readonly #follows: boolean
  readonly #allocator: Allocator
  #direct: number | undefined
  #transfers: Transfers
  #closing: Promise<void> | undefined

  private constructor(request: PageFileRequest, opened: Opened) {
    const { content, through = 'device', io = 'pool', allocator = systemAllocator } = request
    this.path = request.path
    this.#layer = layerOf(request)
    this.#readOnly = request.mode === 'read'
    this.#follows = follows(request)
    this.#content = content
    this.#allocator = allocator
    this.#io = opened.io
    this.#identity = opened.identity
    this.#descriptor = opened.descriptor
    this.#claim = opened.claim
    this.found = opened.found
    this.keep = keepsOf(request, opened.found)
    this.locks = opened.claim?.locks ?? []
    const direct = through === 'device' ? this.#io.openDirect(this.#descriptor, !this.#readOnly) : 'none'
    this.#direct = typeof direct === 'number' ? direct : undefined
    try {
      const blocking = io === 'blocking'
      this.#transfers = new Transfers({
        io: this.#io,
        cached: this.#descriptor,
        direct: this.#direct,
        bytes: this.#io.identifyOpen(this.#descriptor).bytes,
        secure: through === 'device' && direct !== 'memory',
        blocking,
        // Through the cache a buffer only stands for a transfer.
        buffers:
          request.buffers ??
          new TransferBuffers({
            allocator,
            ...(this.#direct === undefined ? { bytes: blockBytes } : {}),
            ...(blocking ? { count: 1 } : {}),
          }),
      })
      this.#transfers.align()
    } catch (error) {
      if (this.#direct !== undefined) this.#io.close(this.#direct)
      throw error
    }
  }

  /**
   * Opens a file, or makes it. Blocks; an owner that holds the file is waited for 15 ms. Throws `TmemError`: `TMEM_IO`
   * (the message says what is there and what to do), `TMEM_NO_MEMORY`; `RangeError` and `TypeError` for a request that
   * makes no sense.
   */
  static open(request: PageFileRequest): PageFile {
    checkRequest(request)
    const io = request.files ?? systemFiles()
    for (let attempt = 1; ; attempt++) {
      try {
        return PageFile.#open(request, io)
      } catch (error) {
        if (error instanceof Momentary) {
          if (attempt === attempts) throw error.error
          io.pause(attempt)
        } else if (error instanceof TmemError) {
          throw error
        } else {
          throw failure(request, `it cannot be opened: ${reason(error)}`, error)
        }
      }
    }
  }

  /** @param named a file that is made has its name from the beginning */
  static #open(request: PageFileRequest, io: PageFileIo, named = false): PageFile {
    const { path, mode } = request
    const there = io.identify(path, follows(request))
    if (there === undefined && (mode === 'existing' || mode === 'read'))
      throw failure(request, 'there is nothing of that name')
    if (there !== undefined) judgeKind(request, there)
    const unnamed = there === undefined && !named ? io.makeUnnamed(path) : undefined
    const descriptor = unnamed ?? openDescriptor(request, io, there)
    let identity: FileIdentity | undefined
    let claim: FileClaim | undefined
    let made = there === undefined
    let found: PageFileFound | undefined
    try {
      identity = io.identifyOpen(descriptor)
      if (there !== undefined && identity.id !== there.id) throw new Momentary(failure(request, 'somebody replaces it'))
      if (mode === 'read') return new PageFile(request, { io, identity, descriptor, claim, found: 'other' })
      const use = unnamed === undefined ? io.kernelUse(identity) : undefined
      if (use !== undefined) throw failure(request, use)
      const before = judge(request, io, descriptor, identity, made)
      claim = io.claim(descriptor, identity, before.mark)
      // The number of a file that was just removed may be this one's already, and its owner about to give up the claim.
      for (let attempt = 1; claim === undefined && made && attempt < attempts; attempt++) {
        io.pause(attempt)
        claim = io.claim(descriptor, identity, before.mark)
      }
      if (claim === undefined) {
        const user = userText(before.mark, io.lockedBy(identity))
        throw new Momentary(failure(request, `${user}; give each its own file`))
      }
      // Once more, now that no other owner changes it: the last one may have removed it, or made something else of it.
      if (io.identify(path, follows(request))?.id !== (unnamed === undefined ? identity.id : undefined))
        throw new Momentary(failure(request, 'somebody removes it, or replaces it'))
      if (made && io.identifyOpen(descriptor).bytes > 0) {
        made = false
        throw new Momentary(failure(request, 'somebody uses it already'))
      }
      const now = judge(request, io, descriptor, identity, made)
      if (standsAgainst(now.mark, claim))
        throw new Momentary(failure(request, `${userText(now.mark)}; give each its own file`))
      found = now.found
      const opened: Opened = { io, identity, descriptor, claim, found }
      prepare(request, opened)
      if (unnamed !== undefined) {
        const outcome = io.name(descriptor, path)
        if (outcome === 'none') throw new CannotName()
        if (outcome === 'taken') throw new Momentary(failure(request, 'somebody makes it'))
      }
      if (found === 'nothing' && keepsOf(request, found)) io.syncFolder(path)
      return new PageFile(request, opened)
    } catch (error) {
      // Another owner that was quicker has what was made.
      const unwanted = found === 'leftover' || (made && !(error instanceof Momentary))
      try {
        if (unwanted && identity !== undefined) removeFile(io, path, identity)
      } finally {
        io.close(descriptor)
        claim?.release()
      }
      if (error instanceof CannotName) return PageFile.#open(request, io, true)
      throw error
    }
  }

  /** Its length in bytes. Transfers lie within it. */
  get bytes(): number {
    return this.#transfers.bytes
  }

  /** Bytes that it has now: fewer than `bytes` when somebody else has cut it off. */
  get presentBytes(): number {
    this.#checkOpen()
    return this.#mappedNow(
      () => 'its length cannot be had',
      () => this.#io.identifyOpen(this.#descriptor).bytes,
    )
  }

  /**
   * Throws `TmemError` (`TMEM_IO`) when its name does not lead to this file any more, or when somebody else has cut it
   * off: what is written to it would not be found again. `sync` looks, too, when the file is to be kept.
   */
  checkThere(): void {
    const { presentBytes } = this
    if (presentBytes < this.bytes) throw this.#cut(presentBytes)
    if (this.#identity.kind !== 'file') return
    const there = this.#mappedNow(
      () => 'it cannot be looked for',
      () => this.#io.identify(this.path, this.#follows),
    )
    if (there?.id === this.#identity.id) return
    const what = there === undefined ? 'nothing' : 'another file'
    throw this.#failure(
      `somebody has removed, renamed or replaced it: there is ${what} of that name now, and what was written cannot be found by it`,
      undefined,
    )
  }

  /** True when transfers go around the operating system's cache. */
  get directIo(): boolean {
    return this.#transfers.direct
  }

  /** True for a file, false for a block device. */
  get isFile(): boolean {
    return this.#identity.kind === 'file'
  }

  get counters(): Readonly<PageFileCounters> {
    return this.#transfers.counters
  }

  /**
   * The error of a sync that failed: what was acknowledged since the one before may be lost, though it can still be
   * read. Every later sync fails, too, until all of that was written once more and `restored` was called.
   */
  get lost(): unknown {
    return this.#transfers.lost
  }

  /**
   * Reserves memory between which and the file whole blocks move without a copy, where it begins at a multiple of 4096
   * in it. Other memory serves as well, by way of the file's buffers. `bytes` is a multiple of 4096. Blocks. Throws
   * `TmemError` (`TMEM_NO_MEMORY`).
   */
  reserve(bytes: number): Uint8Array {
    this.#checkOpen()
    checkBytes(bytes, blockBytes)
    const memory = this.#mappedNow(
      () => 'its memory cannot be aligned',
      () => this.#transfers.reserve(bytes, this.#allocator),
    )
    if (memory === undefined) throw this.#noMemory(bytes, 'transfers')
    return memory
  }

  /**
   * Fills `length` bytes of `into` from `at` on with those from `position` on. Rejects with `TmemError` (`TMEM_IO`),
   * `into` then being filled in part. Throws `RangeError` for a range outside of the file or the memory.
   */
  read(into: Uint8Array, at: number, length: number, position: number): Promise<void> {
    this.#check(into, at, length, position)
    return this.#mapped(
      () => `${length} bytes at ${position} cannot be read`,
      () => this.#transfers.read(into, at, length, position),
    )
  }

  /** The same, in the calling thread. */
  readNow(into: Uint8Array, at: number, length: number, position: number): void {
    this.#check(into, at, length, position)
    this.#mappedNow(
      () => `${length} bytes at ${position} cannot be read`,
      () => this.#transfers.readNow(into, at, length, position),
    )
  }

  /**
   * Writes `length` bytes of `from`, beginning at `at`, to `position`. They must not change until it has settled.
   * Writes that touch the same block of 4096 bytes are done in the order of their calls; whole blocks cost no reads.
   * Rejects with `TmemError` (`TMEM_IO`): then any part of the blocks touched may have been written. Throws
   * `RangeError` for a range outside of the file or the memory, or in a mark.
   */
  write(from: Uint8Array, at: number, length: number, position: number): Promise<void> {
    this.#checkWrite(from, at, length, position)
    return this.#mapped(
      () => `${length} bytes at ${position} cannot be written`,
      async () => {
        this.#checkEnd(position + length)
        await this.#transfers.write(from, at, length, position)
      },
    )
  }

  /**
   * The same, in the calling thread. Throws an `Error` when a write to one of the blocks is under way: it cannot be
   * waited for.
   */
  writeNow(from: Uint8Array, at: number, length: number, position: number): void {
    this.#checkWrite(from, at, length, position)
    if (this.#transfers.changes(position, length))
      throw new Error(
        `file ${this.path}: a write to the same blocks is under way: ${length} bytes at ${position} cannot be written at once`,
      )
    this.#mappedNow(
      () => `${length} bytes at ${position} cannot be written`,
      () => {
        this.#checkEnd(position + length)
        this.#transfers.writeNow(from, at, length, position)
      },
    )
  }

  /**
   * Resolves when everything that was acknowledged before the call is on the medium. Rejects with `TmemError`; see
   * `lost`.
   */
  sync(): Promise<void> {
    this.#checkOpen()
    return this.#mapped(
      () => 'it cannot be synced',
      async () => {
        await this.#transfers.sync()
        if (this.keep) this.checkThere()
      },
    )
  }

  /** The same, in the calling thread. */
  syncNow(): void {
    this.#checkOpen()
    this.#mappedNow(
      () => 'it cannot be synced',
      () => {
        this.#transfers.syncNow()
        if (this.keep) this.checkThere()
      },
    )
  }

  /** After `lost`: everything that had been written since the last good sync has been written once more. */
  restored(): void {
    this.#transfers.restored()
  }

  /**
   * Gives whole blocks back to the file system, after the writes to them that are under way; they then read as zeros.
   * Resolves to false, with nothing done, where that cannot be had (no koffi, a file system without holes): write zeros
   * if the content must go. The call blocks for as long as the file system needs, 0.1 ms here.
   */
  async punch(position: number, length: number): Promise<boolean> {
    this.#checkOpen()
    if (this.#readOnly || position % blockBytes !== 0 || length % blockBytes !== 0 || this.#inMark(position, length))
      throw new RangeError(
        `file ${this.path}: only whole blocks of ${blockBytes} bytes that are not its mark are given back`,
      )
    this.#checkRange(length, position)
    if (length === 0) return true
    return await this.#mapped(
      () => `${length} bytes at ${position} cannot be given back`,
      () => this.#transfers.punch(position, length),
    )
  }

  /**
   * Takes the room for all of the file, so that no later write finds the disk full; what is in it stays. At once where
   * the file system can do that (through koffi); else by writing every block, and nothing else may be written
   * meanwhile. Rejects with `TmemError`, the file then having taken part of it.
   */
  async fill(onProgress?: Progress): Promise<void> {
    this.#checkOpen()
    await this.#mapped(
      () => `the room for its ${this.bytes} bytes cannot be taken`,
      async () => {
        const chunk = this.#takeRoom(onProgress)
        if (chunk === undefined) return
        const hasContent = this.#hasContent
        for (let at = this.#dataFrom; at < this.bytes; at += chunk.length) {
          const length = Math.min(chunk.length, this.bytes - at)
          if (hasContent) await this.#transfers.read(chunk, 0, length, at)
          await this.#transfers.write(chunk, 0, length, at, false)
          onProgress?.(at + length, this.bytes)
        }
        if (!this.directIo) await this.#transfers.sync()
      },
    )
  }

  /** The same, in the calling thread. */
  fillNow(onProgress?: Progress): void {
    this.#checkOpen()
    this.#mappedNow(
      () => `the room for its ${this.bytes} bytes cannot be taken`,
      () => {
        const chunk = this.#takeRoom(onProgress)
        if (chunk === undefined) return
        const hasContent = this.#hasContent
        for (let at = this.#dataFrom; at < this.bytes; at += chunk.length) {
          const length = Math.min(chunk.length, this.bytes - at)
          if (hasContent) this.#transfers.readNow(chunk, 0, length, at)
          this.#transfers.writeNow(chunk, 0, length, at, false)
          onProgress?.(at + length, this.bytes)
        }
        if (!this.directIo) this.#transfers.syncNow()
      },
    )
  }

  /**
   * The runs of the file, from a position on, that may hold anything but zeros: position and length. All of it where
   * holes are not told.
   */
  *dataExtents(from = 0): Generator<readonly [position: number, length: number]> {
    for (let at = from; at < this.bytes; ) {
      this.#checkOpen()
      const data = this.#mappedNow(
        () => 'its holes cannot be found',
        () => this.#io.nextData(this.#descriptor, at, this.bytes),
      )
      if (data === undefined) return
      yield [data.from, data.to - data.from]
      at = data.to
    }
  }

  /**
   * Cuts the file off, or adds zeros that take no room. Throws `TmemError` (`TMEM_IO`); `RangeError` for a length that
   * is no multiple of 4096; an `Error` while transfers of a marked file are under way.
   */
  resize(bytes: number): void {
    this.#checkOpen()
    if (this.#readOnly || this.#identity.kind !== 'file')
      throw new TmemError('TMEM_UNSUPPORTED', `file ${this.path}: it keeps its length`, { layer: this.#layer })
    checkBytes(bytes, this.#content === undefined ? 0 : blockBytes)
    if (this.#content !== undefined && this.#transfers.busy)
      throw new Error(`file ${this.path}: it cannot be resized while transfers are under way`)
    this.#mappedNow(
      () => `it cannot be given a length of ${bytes} bytes`,
      () => {
        this.#io.resize(this.#descriptor, bytes)
        this.#transfers.resized(bytes)
        if (this.#content !== undefined)
          writeMark(this.#io, this.#descriptor, markOf(this.#content.name, bytes, this.keep, this.#claim!))
      },
    )
  }

  /**
   * Waits for what is under way, closes the file and ends the claim. The file is removed when it was made here and not
   * to be kept, or with `remove` in any case. Nothing is synced. Idempotent. Rejects with `TmemError`, the file being
   * closed all the same.
   */
  close(options: { readonly remove?: boolean } = {}): Promise<void> {
    this.#checkRemove(options)
    this.#closing ??= this.#transfers.quiet().then(() => this.#end(options))
    return this.#closing
  }

  /** The same, in the calling thread. Throws an `Error` while transfers are under way. */
  closeNow(options: { readonly remove?: boolean } = {}): void {
    this.#checkRemove(options)
    if (this.#closing !== undefined) return
    if (this.#transfers.busy) throw new Error(`file ${this.path}: it cannot be closed while transfers are under way`)
    this.#closing = Promise.resolve()
    this.#end(options)
  }

  #checkRemove({ remove = false }: { readonly remove?: boolean }): void {
    if (remove && (this.found === 'other' || this.#identity.kind !== 'file'))
      throw new RangeError(`file ${this.path}: it is not ours to remove`)
  }

  #end({ remove = !this.keep }: { readonly remove?: boolean }): void {
    const io = this.#io
    const errors: unknown[] = []
    const steps = [
      () => {
        if (remove) removeFile(io, this.path, this.#identity)
        // Its process may go on running: the mark says that it uses the file no more.
        else if (this.#content !== undefined) {
          const mark = markOf(this.#content.name, this.bytes, this.keep, this.#claim!)
          writeMark(io, this.#descriptor, { ...mark, process: undefined })
        }
      },
      () => {
        if (this.#direct !== undefined) io.close(this.#direct)
      },
      () => io.close(this.#descriptor),
      () => this.#claim?.release(),
    ]
    for (const step of steps) {
      try {
        step()
      } catch (error) {
        errors.push(error)
      }
    }
    if (errors.length > 0) throw this.#failure('it cannot be closed in order', errors[0])
  }

  /** Where what the caller may fill begins. */
  get #dataFrom(): number {
    return this.#content === undefined ? 0 : blockBytes
  }

  /** Whether anything of the caller's may be in it. */
  get #hasContent(): boolean {
    return !isBlank(this.found) || this.counters.writes > 0
  }

  /** Takes the room at once; else answers the memory with which to take it. */
  #takeRoom(onProgress: Progress | undefined): Uint8Array | undefined {
    const { bytes } = this
    const { kind, allocatedBytes } = this.#io.identifyOpen(this.#descriptor)
    const needed = bytes - allocatedBytes
    const free = kind === 'file' && needed > 0 ? this.#io.freeBytes(this.path) : Number.POSITIVE_INFINITY
    if (needed > free) throw new Error(`it needs ${needed} more bytes, and ${free} are free on its file system`)
    if (kind !== 'file' || this.#io.reserve(this.#descriptor, bytes) || needed <= 0) {
      onProgress?.(bytes, bytes)
      return undefined
    }
    const size = 128 * 1024
    const memory = this.#allocator.allocate(size, 'pageFile.fill')
    if (memory === undefined) throw this.#noMemory(size, 'filling it')
    return new Uint8Array(memory)
  }

  #noMemory(bytes: number, what: string): TmemError {
    const message = `file ${this.path}: no memory for ${what} (${bytes} bytes)`
    return new TmemError('TMEM_NO_MEMORY', message, { layer: this.#layer })
  }

  #check(memory: Uint8Array, at: number, length: number, position: number): void {
    this.#checkOpen()
    this.#checkRange(length, position)
    if (!Number.isSafeInteger(at) || at < 0 || at + length > memory.length)
      throw new RangeError(`${length} bytes from ${at} on are not in memory of ${memory.length} bytes`)
  }

  #checkRange(length: number, position: number): void {
    const inside = Number.isSafeInteger(position) && position >= 0 && Number.isSafeInteger(length) && length >= 0
    if (!inside || position + length > this.bytes)
      throw new RangeError(`file ${this.path}: ${length} bytes at ${position} are not in its ${this.bytes} bytes`)
  }

  #checkWrite(memory: Uint8Array, at: number, length: number, position: number): void {
    this.#check(memory, at, length, position)
    if (this.#readOnly) throw new RangeError(`file ${this.path}: it was opened to be read only`)
    if (this.#inMark(position, length))
      throw new RangeError(`file ${this.path}: bytes 0 to 1023 and 3072 to 4085 are its mark, and not to be written`)
  }

  /**
   * A write to the end of a file that somebody has cut off would make it as long as it was, and nobody would see it any
   * more.
   */
  #checkEnd(end: number): void {
    if (end <= this.bytes - blockBytes) return
    const { presentBytes } = this
    if (presentBytes < this.bytes) throw this.#cut(presentBytes)
  }

  #cut(presentBytes: number): TmemError {
    return this.#failure(`somebody has cut it off: it has ${presentBytes} bytes, and not ${this.bytes}`, undefined)
  }

  #inMark(position: number, length: number): boolean {
    return this.#content !== undefined && touchesMark(position, length)
  }

  #checkOpen(): void {
    if (this.#closing !== undefined)
      throw new TmemError('TMEM_CLOSED', `file ${this.path}: it is closed`, { layer: this.#layer })
  }

  async #mapped<T>(what: () => string, action: () => Promise<T>): Promise<T> {
    try {
      return await action()
    } catch (error) {
      throw this.#failure(what(), error)
    }
  }

  #mappedNow<T>(what: () => string, action: () => T): T {
    try {
      return action()
    } catch (error) {
      throw this.#failure(what(), error)
    }
  }

  #failure(what: string, error: unknown): TmemError {
    if (error instanceof TmemError) return error
    const why = error === undefined ? '' : `: ${reason(error)}`
    return new TmemError('TMEM_IO', `file ${this.path}: ${what}${why}`, {
      layer: this.#layer,
      cause: error,
    })
  }
}

interface Opened {
  readonly io: PageFileIo
  readonly identity: FileIdentity
  readonly descriptor: number
  readonly claim: FileClaim | undefined
  readonly found: PageFileFound
}

/** Something that will be over in a moment, and the error if it is not. */
class Momentary extends Error {
  readonly error: TmemError

  constructor(error: TmemError) {
    super(error.message)
    this.error = error
  }
}

/** The file system has files without a name, and gives them none. */
class CannotName extends Error {}

const layerOf = ({ layer = 'page-file' }: PageFileRequest): string => layer

const failure = (request: PageFileRequest, what: string, cause?: unknown): TmemError =>
  new TmemError('TMEM_IO', `file ${request.path}: ${what}`, { layer: layerOf(request), cause })

const reason = (error: unknown): string => (types.isNativeError(error) ? error.message : String(error))

const follows = ({ mode }: PageFileRequest): boolean => mode === 'existing' || mode === 'read'

const isBlank = (found: PageFileFound): boolean => found === 'nothing' || found === 'leftover' || found === 'zeros'

const keepsOf = ({ keep = false }: PageFileRequest, found: PageFileFound): boolean => keep || !isBlank(found)

function checkBytes(bytes: number | undefined, least: number): void {
  if (bytes === undefined || !Number.isSafeInteger(bytes) || bytes < least || bytes % blockBytes !== 0)
    throw new RangeError(
      `the bytes of a file, or for it, must be a multiple of ${blockBytes}, at least ${least}, got ${bytes}`,
    )
}

/** The length that is asked for, if one is. */
const lengthOf = ({ bytes }: PageFileRequest): number | undefined =>
  bytes === undefined ? undefined : bytesOf('PageFile.open', 'bytes', bytes)

function checkRequest(request: PageFileRequest): void {
  checkOptions('PageFile.open', request, {
    path: true,
    mode: true,
    bytes: 'bytes?',
    content: 'object?',
    keep: 'flag?',
    blockDevice: 'flag?',
    through: 'text?',
    io: 'text?',
    allocator: 'object?',
    buffers: 'object?',
    layer: 'text?',
    files: 'object?',
  })
  const { path, mode, content, blockDevice = false } = request
  const bytes = lengthOf(request)
  if (!modes.includes(mode)) throw new TypeError(`mode must be one of ${modes.join(', ')}, got ${String(mode)}`)
  if (typeof path !== 'string' || path === '' || path.includes('\0'))
    throw new TypeError(`the path of a file must be a text without NUL, got ${JSON.stringify(path)}`)
  const marked = mode === 'make' || mode === 'ours'
  if (marked && content === undefined) throw new TypeError(`mode '${mode}' needs content: what the file will hold`)
  if (!marked && mode !== 'existing' && content !== undefined) throw new TypeError(`mode '${mode}' has no content`)
  if (marked || mode === 'plain') checkBytes(bytes, marked ? blockBytes : 0)
  if (blockDevice && (mode === 'make' || mode === 'plain'))
    throw new TypeError(`a block device cannot be made: mode '${mode}' has files only`)
  if (content === undefined) return
  if (!/^[ -~]{1,64}$/.test(content.name))
    throw new RangeError(`content is named by 1 to 64 printable characters, got ${JSON.stringify(content.name)}`)
  if (content.header !== undefined && content.header.length !== blockBytes)
    throw new RangeError(`the header of a file has ${blockBytes} bytes, got ${content.header.length}`)
}

/** Throws for what is no file, and for what may not be used. */
function judgeKind(request: PageFileRequest, { kind, bytes }: FileIdentity): void {
  if (kind === 'file') return
  if (kind === 'link') throw failure(request, "it is a symbolic link, and leads to a file that may be somebody else's")
  if (kind !== 'block device') throw failure(request, `it is a ${kind}; name a file`)
  if (request.blockDevice !== true) throw failure(request, 'it is a block device, and using one was not asked for')
  if (bytes === 0) throw failure(request, 'the system does not tell the size of that device')
}

function openDescriptor(request: PageFileRequest, io: PageFileIo, there: FileIdentity | undefined): number {
  const { path, mode } = request
  try {
    return io.open(path, {
      make: there === undefined,
      write: mode !== 'read',
      follow: follows(request),
      exclusive: there?.kind === 'block device' && mode !== 'read',
    })
  } catch (error) {
    const moved = ['EEXIST', 'ENOENT', 'ELOOP'].find((code) => hasCode(error, code))
    if (moved === 'ENOENT' && there === undefined) {
      const folder = dirname(resolve(request.path))
      throw failure(request, `its folder does not exist: make it with mkdir -p ${folder}`, error)
    }
    if (moved !== undefined) throw new Momentary(failure(request, 'somebody makes, removes or replaces it', error))
    if (hasCode(error, 'EBUSY'))
      throw failure(request, 'the device is in use (mounted, active swap, or another program)', error)
    if (hasCode(error, 'ETXTBSY')) throw failure(request, 'the system runs it, or swaps to it', error)
    throw error
  }
}

/** What a file is to us; throws when it may not be used. Reads only. */
function judge(
  request: PageFileRequest,
  io: PageFileIo,
  descriptor: number,
  identity: FileIdentity,
  made: boolean,
): { found: PageFileFound; mark: Mark | undefined } {
  const { mode, content } = request
  if (made) return { found: 'nothing', mark: undefined }
  const block = new Uint8Array(blockBytes)
  readAll(io, descriptor, block, 0)
  const { mark, whole } = findMark(block) ?? { mark: undefined, whole: false }
  if (content === undefined || mode === 'existing') return { found: 'other', mark }
  const ours = mark !== undefined && (whole || content.tolerant === true)
  const zeros = !ours && content.tolerant === true && identity.kind === 'file' && isAllZeros(io, descriptor, identity)
  if (!ours && !zeros) {
    const what = mark === undefined ? 'it is there, and it is none of ours' : 'its mark is damaged'
    const error = failure(request, `${what}; remove it if nobody needs it, or name another`)
    // Somebody may be making it.
    throw isZeros(block) ? new Momentary(error) : error
  }
  // Another user could have put it there, to read what we write.
  if (identity.kind === 'file' && io.user !== undefined && identity.owner !== io.user)
    throw failure(request, `it belongs to user ${identity.owner}, and this is user ${io.user}`)
  if (zeros) return { found: 'zeros', mark: undefined }
  if (!mark!.keep) return { found: 'leftover', mark }
  if (userOf(mark) !== undefined && (mode === 'make' || mark!.content !== content.name))
    throw new Momentary(failure(request, `${userText(mark)}; give each its own file`))
  if (mode === 'make') throw failure(request, 'it is there, and is to be kept; remove it, or ask for it to be used')
  if (mark!.content !== content.name) throw failure(request, `it holds ${mark!.content}, not ${content.name}`)
  return { found: whole ? 'ours' : 'damaged', mark }
}

/** Reads as much as there is; the rest of `into` stays. */
function readAll(io: PageFileIo, descriptor: number, into: Uint8Array, position: number): number {
  let done = 0
  while (done < into.length) {
    const read = io.readNow(descriptor, into, done, into.length - done, position + done)
    if (read === 0) break
    done += read
  }
  return done
}

function writeAll(io: PageFileIo, descriptor: number, bytes: Uint8Array, position: number): void {
  for (let done = 0; done < bytes.length; ) {
    const written = io.writeNow(descriptor, bytes, done, bytes.length - done, position + done)
    if (written === 0) throw new Error(`nothing was written at ${position + done}`)
    done += written
  }
}

function isAllZeros(io: PageFileIo, descriptor: number, { bytes }: FileIdentity): boolean {
  const chunk = new Uint8Array(64 * 1024)
  const zeros = new Uint8Array(chunk.length)
  for (let at = 0; at < bytes; ) {
    const data = io.nextData(descriptor, at, bytes)
    if (data === undefined) return true
    for (at = data.from; at < data.to; ) {
      const read = readAll(io, descriptor, chunk.subarray(0, Math.min(chunk.length, data.to - at)), at)
      if (Buffer.compare(chunk.subarray(0, read), zeros.subarray(0, read)) !== 0) return false
      // It has become shorter.
      if (read === 0) return true
      at += read
    }
  }
  return true
}

/** Writes a mark, and nothing of what is the caller's in that block. */
function writeMark(io: PageFileIo, descriptor: number, mark: Mark): void {
  const block = new Uint8Array(blockBytes)
  setMark(block, mark)
  for (const { from, to } of markPlaces) writeAll(io, descriptor, block.subarray(from, to), from)
}

/** Makes a claimed file what was asked for: its length, its mark. */
function prepare(request: PageFileRequest, { io, descriptor, found, identity, claim }: Opened): void {
  const { content } = request
  const bytes = lengthOf(request)
  const file = identity.kind === 'file'
  if (file && found === 'leftover') io.resize(descriptor, 0)
  if (file && isBlank(found)) io.resize(descriptor, bytes!)
  const keep = keepsOf(request, found)
  if (content !== undefined) {
    const length = file && isBlank(found) ? bytes! : Math.max(blockBytes, identity.bytes)
    const mark = markOf(content.name, length, keep, claim!)
    if (found === 'ours' || found === 'damaged') {
      writeMark(io, descriptor, mark)
    } else {
      const block = content.header?.slice() ?? new Uint8Array(blockBytes)
      setMark(block, mark)
      writeAll(io, descriptor, block, 0)
    }
    // After a power failure, too, it is known whose it is.
    io.syncNow(descriptor)
    if (claim!.locks.length === 0) confirm(request, io, descriptor, mark)
  }
}

/** Without locks: of two who marked the file in turn the second one has it. */
function confirm(request: PageFileRequest, io: PageFileIo, descriptor: number, mark: Mark): void {
  io.pause(5)
  const block = new Uint8Array(blockBytes)
  readAll(io, descriptor, block, 0)
  const now = findMark(block)?.mark
  if (now?.process !== mark.process || now?.thread !== mark.thread)
    throw new Momentary(failure(request, `${userText(now)}; give each its own file`))
}

/** Takes a file's name away, if it still is that file's. */
function removeFile(io: PageFileIo, path: string, { id }: FileIdentity): void {
  if (io.identify(path, false)?.id === id) io.remove(path)
}
