/**
 * Files in memory, which behave as a system's do and fail when told to: for tests of what stands on page files, and for
 * simulators.
 *
 * A file has its content, as everybody reads it, and what a power failure would leave of it: what was synced, and of
 * each change since then whatever the caller of `powerFailure` decides: all, none, or a first part. Before each call of
 * the system `fault` is asked, and may fail it, shorten it or hold it up; calls that are not held up are done when they
 * are made, so a run depends on nothing but the caller.
 *
 * Invariants: no clock, no random numbers, nothing of this machine. Errors carry the codes of a real system.
 */
import { type ByteAmount, bytesOf, checkOptions } from '@tmem/core'
import type { FileClaim } from './claim.ts'
import type { FileIdentity, OpenHow, PageFileIo } from './system.ts'

/** A call of the system, before it is done. */
export interface FileCall {
  readonly name: 'open' | 'read' | 'write' | 'sync' | 'resize' | 'reserve' | 'punch' | 'remove'
  readonly path: string
  /** Where, and how many bytes; 0 for calls without. */
  readonly position: number
  readonly length: number
  /** Around the cache. */
  readonly direct: boolean
}

/** What is to become of a call. */
export interface FileFault {
  /**
   * It fails with an error of that code (`EIO`, `ENOSPC`); with `bytes`, after it has moved that much. A sync that
   * fails takes what was written until then for lost, also what came meanwhile: it can be read, and no later sync makes
   * it last.
   */
  readonly code?: string
  /** A transfer moves only so many bytes. */
  readonly bytes?: number
  /** A call that does not block is done only when this has resolved. */
  readonly until?: Promise<void>
}

/** Settings of `MemoryFiles`. */
export interface MemoryFilesOptions {
  /** Asked before each call; `undefined`: all is well. */
  readonly fault?: (call: FileCall) => FileFault | undefined
  /**
   * Whether there is a way around the cache, which then takes only whole blocks, and memory at 16 bytes behind a
   * multiple of 512 (default: true).
   */
  readonly direct?: boolean
  /** Bytes that all files together can have (default: no limit). */
  readonly roomBytes?: ByteAmount
}

/** A change since the last sync. */
type Change =
  | { readonly kind: 'write'; readonly position: number; readonly bytes: Uint8Array }
  | { readonly kind: 'resize'; readonly length: number }

interface MemoryFile {
  readonly id: number
  path: string
  content: Uint8Array
  durable: Uint8Array
  changes: Change[]
  claimed: boolean
}

interface Descriptor {
  readonly file: MemoryFile
  readonly direct: boolean
}

const unit = 4096

/** A system of files in memory: the `files` of a page file. */
export class MemoryFiles implements PageFileIo {
  readonly lacks: undefined
  readonly user: undefined
  /** Replaceable at any time. */
  fault: (call: FileCall) => FileFault | undefined
  readonly #direct: boolean
  readonly #roomBytes: number
  readonly #files: Map<string, MemoryFile> = new Map()
  readonly #descriptors: Map<number, Descriptor> = new Map()
  #next = 1

  constructor(options: MemoryFilesOptions = {}) {
    checkOptions('MemoryFiles', options, { fault: 'function?', direct: 'flag?', roomBytes: 'bytes?' })
    const { fault = () => undefined, direct = true } = options
    const roomBytes = bytesOf('MemoryFiles', 'roomBytes', options.roomBytes ?? Number.POSITIVE_INFINITY)
    this.fault = fault
    this.#direct = direct
    this.#roomBytes = roomBytes
  }

  /** The content of a file, as it can be read now; `undefined`: there is none of that name. */
  content(path: string): Uint8Array | undefined {
    return this.#files.get(path)?.content.slice()
  }

  /** What a power failure would leave of it, if nothing of what was not synced stayed. */
  durable(path: string): Uint8Array | undefined {
    return this.#files.get(path)?.durable.slice()
  }

  /** Puts a file there. */
  put(path: string, content: Uint8Array): void {
    const file = this.#make(path)
    file.content = content.slice()
    file.durable = content.slice()
  }

  /** All processes end: descriptors are void, and so are claims. Files stay as they are read. */
  kill(): void {
    this.#descriptors.clear()
    for (const file of this.#files.values()) file.claimed = false
  }

  /**
   * The power fails: as `kill`, and of each change that was not synced only a part stays: `kept` is asked for the bytes
   * of it (from its first one on; default: 0). Changes of length stay when it answers anything but 0.
   */
  powerFailure(
    kept: (change: { readonly path: string; readonly position: number; readonly length: number }) => number = () => 0,
  ): void {
    this.kill()
    for (const file of this.#files.values()) {
      let content = file.durable
      for (const change of file.changes) {
        const position = change.kind === 'resize' ? 0 : change.position
        const length = change.kind === 'resize' ? change.length : change.bytes.length
        const stays = kept({ path: file.path, position, length })
        if (change.kind === 'resize') content = stays === 0 ? content : resized(content, change.length)
        else content = written(content, change.position, change.bytes.subarray(0, stays))
      }
      file.content = content
      file.durable = content.slice()
      file.changes = []
    }
  }

  identify(path: string): FileIdentity | undefined {
    const file = this.#files.get(path)
    return file === undefined ? undefined : identity(file)
  }

  identifyOpen(descriptor: number): FileIdentity {
    return identity(this.#open(descriptor).file)
  }

  open(path: string, { make = false }: OpenHow): number {
    this.#begin({ name: 'open', path, position: 0, length: 0, direct: false })
    const there = this.#files.get(path)
    if (make && there !== undefined) throw systemError('EEXIST', 'open')
    if (!make && there === undefined) throw systemError('ENOENT', 'open')
    return this.#describe({ file: there ?? this.#make(path), direct: false })
  }

  makeUnnamed(): undefined {
    return undefined
  }

  name(): 'none' {
    return 'none'
  }

  openDirect(descriptor: number): number | 'none' {
    return this.#direct ? this.#describe({ file: this.#open(descriptor).file, direct: true }) : 'none'
  }

  close(descriptor: number): void {
    this.#open(descriptor)
    this.#descriptors.delete(descriptor)
  }

  kernelUse(): undefined {
    return undefined
  }

  lockedBy(): undefined {
    return undefined
  }

  claim(descriptor: number): FileClaim | undefined {
    const { file } = this.#open(descriptor)
    if (file.claimed) return undefined
    file.claimed = true
    return {
      locks: ['memory'],
      release: () => {
        file.claimed = false
      },
    }
  }

  pause(): void {
    // Nobody else runs meanwhile.
  }

  async read(descriptor: number, into: Uint8Array, at: number, length: number, position: number): Promise<number> {
    const fault = this.#transfer('read', descriptor, into, at, length, position)
    await fault?.until
    return this.#read(descriptor, into, at, length, position, fault)
  }

  readNow(descriptor: number, into: Uint8Array, at: number, length: number, position: number): number {
    const fault = this.#transfer('read', descriptor, into, at, length, position)
    return this.#read(descriptor, into, at, length, position, fault)
  }

  async write(descriptor: number, from: Uint8Array, at: number, length: number, position: number): Promise<number> {
    const fault = this.#transfer('write', descriptor, from, at, length, position)
    await fault?.until
    return this.#write(descriptor, from, at, length, position, fault)
  }

  writeNow(descriptor: number, from: Uint8Array, at: number, length: number, position: number): number {
    const fault = this.#transfer('write', descriptor, from, at, length, position)
    return this.#write(descriptor, from, at, length, position, fault)
  }

  async sync(descriptor: number): Promise<void> {
    const { file } = this.#open(descriptor)
    const fault = this.fault({ name: 'sync', path: file.path, position: 0, length: 0, direct: false })
    // What is written from here on is not covered.
    const covered = new Set(file.changes)
    await fault?.until
    this.#sync(descriptor, covered, fault)
  }

  syncNow(descriptor: number): void {
    const { file } = this.#open(descriptor)
    const fault = this.fault({ name: 'sync', path: file.path, position: 0, length: 0, direct: false })
    this.#sync(descriptor, new Set(file.changes), fault)
  }

  syncFolder(): void {
    // Names last at once.
  }

  resize(descriptor: number, bytes: number): void {
    const { file } = this.#open(descriptor)
    this.#begin({ name: 'resize', path: file.path, position: 0, length: bytes, direct: false })
    this.#checkRoom(file, bytes)
    file.content = resized(file.content, bytes)
    file.changes.push({ kind: 'resize', length: bytes })
  }

  reserve(descriptor: number, bytes: number): boolean {
    const { file } = this.#open(descriptor)
    this.#begin({ name: 'reserve', path: file.path, position: 0, length: bytes, direct: false })
    this.#checkRoom(file, bytes)
    return true
  }

  punch(descriptor: number, position: number, length: number): boolean {
    const { file } = this.#open(descriptor)
    this.#begin({ name: 'punch', path: file.path, position, length, direct: false })
    const bytes = new Uint8Array(length)
    file.content.set(bytes, position)
    file.changes.push({ kind: 'write', position, bytes })
    return true
  }

  /** Blocks of zeros are holes here. */
  nextData(descriptor: number, position: number, bytes: number): { from: number; to: number } | undefined {
    const { content } = this.#open(descriptor).file
    const isHole = (at: number): boolean => content.subarray(at, at + unit).every((byte) => byte === 0)
    let from = position
    while (from < bytes && isHole(from)) from += unit - (from % unit)
    if (from >= bytes) return undefined
    let to = from
    while (to < bytes && !isHole(to)) to += unit - (to % unit)
    return { from, to: Math.min(to, bytes) }
  }

  freeBytes(): number {
    let taken = 0
    for (const { content } of this.#files.values()) taken += content.length
    return this.#roomBytes - taken
  }

  remove(path: string): void {
    this.#begin({ name: 'remove', path, position: 0, length: 0, direct: false })
    if (!this.#files.delete(path)) throw systemError('ENOENT', 'unlink')
  }

  #make(path: string): MemoryFile {
    const none = new Uint8Array(0)
    const file = { id: this.#next++, path, content: none, durable: none, changes: [], claimed: false }
    this.#files.set(path, file)
    return file
  }

  #describe(descriptor: Descriptor): number {
    const number = this.#next++
    this.#descriptors.set(number, descriptor)
    return number
  }

  #open(descriptor: number): Descriptor {
    const open = this.#descriptors.get(descriptor)
    if (open === undefined) throw systemError('EBADF', 'file')
    return open
  }

  #begin(call: FileCall): void {
    const code = this.fault(call)?.code
    if (code !== undefined) throw systemError(code, call.name)
  }

  #checkRoom(file: MemoryFile, bytes: number): void {
    if (bytes - file.content.length > this.freeBytes()) throw systemError('ENOSPC', 'file')
  }

  #transfer(
    name: 'read' | 'write',
    descriptor: number,
    memory: Uint8Array,
    at: number,
    length: number,
    position: number,
  ): FileFault | undefined {
    const { file, direct } = this.#open(descriptor)
    const aligned = (memory.byteOffset + at) % 512 === 16 && length % unit === 0 && position % unit === 0
    if (direct && !aligned) throw systemError('EINVAL', name)
    return this.fault({ name, path: file.path, position, length, direct })
  }

  #read(descriptor: number, into: Uint8Array, at: number, length: number, position: number, fault?: FileFault): number {
    const { content } = this.#open(descriptor).file
    const bytes = content.subarray(position, position + Math.min(length, fault?.bytes ?? length))
    into.set(bytes, at)
    if (fault?.code !== undefined) throw systemError(fault.code, 'read')
    return bytes.length
  }

  #write(
    descriptor: number,
    from: Uint8Array,
    at: number,
    length: number,
    position: number,
    fault?: FileFault,
  ): number {
    const { file } = this.#open(descriptor)
    const moved = Math.min(length, fault?.bytes ?? (fault?.code === undefined ? length : 0))
    const bytes = from.slice(at, at + moved)
    this.#checkRoom(file, position + moved)
    if (moved > 0) {
      file.content = written(file.content, position, bytes)
      file.changes.push({ kind: 'write', position, bytes })
    }
    if (fault?.code !== undefined) throw systemError(fault.code, 'write')
    return moved
  }

  #sync(descriptor: number, covered: ReadonlySet<Change>, fault?: FileFault): void {
    const { file } = this.#open(descriptor)
    if (fault?.code !== undefined) {
      // As on Linux what could not be written counts as clean, and no later sync writes it. What came meanwhile may
      // have been on its way, too. (Lengths are in the file system's journal, which tries again.)
      file.changes = file.changes.filter(({ kind }) => kind === 'resize')
      throw systemError(fault.code, 'fdatasync')
    }
    const changes = file.changes.filter((change) => covered.has(change))
    file.changes = file.changes.filter((change) => !covered.has(change))
    for (const change of changes)
      file.durable =
        change.kind === 'resize'
          ? resized(file.durable, change.length)
          : written(file.durable, change.position, change.bytes)
  }
}

const identity = ({ id, content }: MemoryFile): FileIdentity => ({
  kind: 'file',
  id: `memory ${id}`,
  bytes: content.length,
  allocatedBytes: content.length,
  owner: 0,
})

function resized(content: Uint8Array, length: number): Uint8Array {
  const bytes = new Uint8Array(length)
  bytes.set(content.subarray(0, length))
  return bytes
}

/** The content with those bytes there; longer if need be. */
function written(content: Uint8Array, position: number, bytes: Uint8Array): Uint8Array {
  const all = position + bytes.length > content.length ? resized(content, position + bytes.length) : content
  all.set(bytes, position)
  return all
}

const systemError = (code: string, call: string): Error =>
  Object.assign(new Error(`${code}: ${call} failed`), { code, syscall: call })
