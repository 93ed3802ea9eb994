/**
 * The files that a page cache remembers, and the file systems that they are on: a page leaves the first level through
 * here, because only its file tells whether its bytes are sure to be those on disk.
 *
 * Invariants: a file is remembered while somebody has it open, and while a frame holds a page of it; a file that is
 * forgotten has no frames.
 */
import type { BigIntStats, PathLike } from 'node:fs'
import { type Cleancache, PageState, type Superblock } from '@tmem/cleancache'
import { none } from '@tmem/core'
import type { FileIo, FileSystemKind, OptIn } from './file-io.ts'
import { FileRecord } from './file-record.ts'
import { Frame, type Frames } from './frames.ts'
import type { Versions } from './versions.ts'

/** A file system, and whether its files have pages here. */
export interface Mount {
  readonly optIn: OptIn | undefined
  readonly superblock: Superblock | undefined
}

/** What files are remembered with. */
export interface FilesOptions {
  readonly io: FileIo
  readonly frames: Frames
  readonly cleancache: Cleancache
  readonly versions: Versions
  readonly optIn: (kind: FileSystemKind) => OptIn | undefined
  /** Files remembered while nobody has them open. */
  readonly inodes: number
}

export class Files {
  readonly #io: FileIo
  readonly #frames: Frames
  readonly #cleancache: Cleancache
  readonly #versions: Versions
  readonly #optIn: (kind: FileSystemKind) => OptIn | undefined
  readonly #inodes: number
  readonly #mounts: Map<bigint, Promise<Mount>> = new Map()
  /** In the order of their last opening. */
  readonly #files: Map<string, FileRecord> = new Map()
  readonly #byNumber: Map<number, FileRecord> = new Map()
  #nextNumber = 0

  constructor({ io, frames, cleancache, versions, optIn, inodes }: FilesOptions) {
    this.#io = io
    this.#frames = frames
    this.#cleancache = cleancache
    this.#versions = versions
    this.#optIn = optIn
    this.#inodes = inodes
  }

  /** Files that are remembered. */
  get count(): number {
    return this.#files.size
  }

  /** All of them, the ones longest unopened first. */
  all(): Iterable<FileRecord> {
    return this.#files.values()
  }

  /** The file system of an opened file. Rejects with the system's error. */
  async mountOf(device: bigint, path: PathLike): Promise<Mount> {
    let mount = this.#mounts.get(device)
    if (mount === undefined) {
      mount = this.#mount(path)
      this.#mounts.set(device, mount)
      mount.catch(() => this.#mounts.delete(device))
    }
    return mount
  }

  async #mount(path: PathLike): Promise<Mount> {
    const optIn = this.#optIn(await this.#io.kind(path))
    if (optIn === undefined) return { optIn, superblock: undefined }
    const { facts, uuid } = optIn
    const superblock =
      uuid === undefined
        ? this.#cleancache.initFs(facts, this.#frames.pageSize)
        : this.#cleancache.initSharedFs(uuid, facts, this.#frames.pageSize)
    return { optIn, superblock }
  }

  /** What is known of a file that was just opened. */
  recordOf(stamp: BigIntStats, { optIn, superblock }: Mount): FileRecord {
    const id = `${stamp.dev}:${stamp.ino}`
    let file = this.#files.get(id)
    if (file === undefined) {
      file = new FileRecord(this.#nextNumber++, id, stamp, superblock, optIn)
      this.#byNumber.set(file.number, file)
      if (superblock !== undefined) this.#versions.restamp(file, stamp)
    } else this.#files.delete(id)
    this.#files.set(id, file)
    return file
  }

  /** Forgets files that nobody has open, the ones longest unused first, until there are not too many. */
  trim(): void {
    for (const file of this.#files.values()) {
      if (this.#files.size <= this.#inodes) return
      if (file.handles.size === 0) this.#forget(file)
    }
  }

  /** Pages of a file that is forgotten go the usual way; its key is made again when it is opened again. */
  #forget(file: FileRecord): void {
    const frames = this.#frames
    for (let frame = frames.first(file.number); frame !== none; frame = frames.first(file.number)) {
      this.evicted(frame)
      frames.drop(frame)
    }
    this.#files.delete(file.id)
    this.#byNumber.delete(file.number)
  }

  /** A page leaves the first level: to cleancache, if its bytes are sure to be those on disk. */
  evicted(frame: number): void {
    const frames = this.#frames
    const file = this.#byNumber.get(frames.fileOf(frame))!
    const page = frames.pages[frame]!
    let state: number = PageState.Locked
    if ((frames.state[frame]! & Frame.UpToDate) !== 0 && file.settled) state |= PageState.UpToDate
    if ((frames.state[frame]! & Frame.Mapped) !== 0 && !(file.sparse && isZero(page))) state |= PageState.MappedToDisk
    this.#cleancache.removePage(file.superblock!, file.key, frames.indexOf(frame), page, state)
  }

  /** Forgets all files, and gives the pools in cleancache up. */
  async close(): Promise<void> {
    for (const file of this.#files.values()) this.#forget(file)
    for (const mount of this.#mounts.values()) {
      const { superblock } = await mount
      if (superblock !== undefined) this.#cleancache.invalidateFs(superblock)
    }
  }
}

function isZero(page: Uint8Array): boolean {
  for (let at = 0; at < page.length; at++) if (page[at] !== 0) return false
  return true
}
