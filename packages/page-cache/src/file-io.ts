/**
 * What the page cache needs of the outside: files by descriptor, with a stamp that tells when one was changed. Tests
 * give one that fails.
 *
 * Source: open(2), pread(2), statfs(2), and the magic numbers of linux/magic.h.
 */
import * as fs from 'node:fs'
import { promisify } from 'node:util'
import type { FileSystemFacts } from '@tmem/cleancache'
import type { StatsNode } from '@tmem/core'
import { outOfRange, wrongValue } from './file-arguments.ts'

/** A file system as the system describes it. */
export interface FileSystemKind {
  /** Magic number (Linux: `f_type`). */
  readonly type: number
  /** Bytes of a block. */
  readonly blockSize: number
}

/** Files, by descriptor. Every failure is the system's own error. */
export interface FileIo {
  /** Opens a file; `flags` are the system's. */
  open(path: fs.PathLike, flags: number, mode: fs.Mode): Promise<number>
  close(descriptor: number): Promise<void>
  /** At once, because it waits for no disk: the inode of an open file is in memory. */
  stat(descriptor: number): fs.BigIntStats
  /** The same in plain numbers. */
  plainStat(descriptor: number): fs.Stats
  /** Which file system the file is on. */
  kind(path: fs.PathLike): Promise<FileSystemKind>
  /** One read; answers the bytes read, 0 at the end. `null` reads at the descriptor's own position. */
  read(descriptor: number, into: Uint8Array, at: number, length: number, position: number | null): Promise<number>
  /** One read into several buffers in turn. */
  readv(descriptor: number, into: readonly Uint8Array[], position: number): Promise<number>
  /** One write; answers the bytes written. `null` writes where the descriptor stands: the end, when it appends. */
  write(descriptor: number, from: Uint8Array, at: number, length: number, position: number | null): Promise<number>
  /** One write of several buffers in turn. */
  writev(descriptor: number, from: readonly Uint8Array[], position: number | null): Promise<number>
  truncate(descriptor: number, length: number): Promise<void>
  chmod(descriptor: number, mode: fs.Mode): Promise<void>
  chown(descriptor: number, user: number, group: number): Promise<void>
  utimes(descriptor: number, accessed: fs.TimeLike, changed: fs.TimeLike): Promise<void>
  /** To disk: data and metadata, or what is needed to read the data. */
  sync(descriptor: number): Promise<void>
  datasync(descriptor: number): Promise<void>
  /** What it counts, if anything, for the tree of statistics. */
  stats?(): StatsNode
}

const open = promisify(fs.open)
const close = promisify(fs.close)
const statfs = promisify(fs.statfs)
const read = promisify(fs.read)
const readv = promisify(fs.readv)
const write = promisify(fs.write)
const writev = promisify(fs.writev)
const truncate = promisify(fs.ftruncate)
const chmod = promisify(fs.fchmod)
const chown = promisify(fs.fchown)
const utimes = promisify(fs.futimes)
const sync = promisify(fs.fsync)
const datasync = promisify(fs.fdatasync)

/** The files of this machine. */
export const nodeFileIo: FileIo = Object.freeze({
  open: (path: fs.PathLike, flags: number, mode: fs.Mode) => open(path, flags, mode),
  close: (descriptor: number) => close(descriptor),
  stat: (descriptor: number) => fs.fstatSync(descriptor, { bigint: true }),
  plainStat: (descriptor: number) => fs.fstatSync(descriptor),
  kind: async (path: fs.PathLike) => {
    const { type, bsize } = await statfs(path)
    return { type, blockSize: bsize }
  },
  read: async (descriptor: number, into: Uint8Array, at: number, length: number, position: number | null) =>
    (await read(descriptor, into, at, length, position)).bytesRead,
  readv: async (descriptor: number, into: readonly Uint8Array[], position: number) =>
    (await readv(descriptor, into, position)).bytesRead,
  write: async (descriptor: number, from: Uint8Array, at: number, length: number, position: number | null) =>
    (await write(descriptor, from, at, length, position)).bytesWritten,
  writev: async (descriptor: number, from: readonly Uint8Array[], position: number | null) =>
    (await (position === null ? writev(descriptor, from) : writev(descriptor, from, position))).bytesWritten,
  truncate: (descriptor: number, length: number) => truncate(descriptor, length),
  chmod: (descriptor: number, mode: fs.Mode) => chmod(descriptor, mode),
  chown: (descriptor: number, user: number, group: number) => chown(descriptor, user, group),
  utimes: (descriptor: number, accessed: fs.TimeLike, changed: fs.TimeLike) => utimes(descriptor, accessed, changed),
  sync: (descriptor: number) => sync(descriptor),
  datasync: (descriptor: number) => datasync(descriptor),
})

/** Local file systems on disks whose change times can be relied on. */
const localFileSystems: ReadonlyMap<number, string> = new Map([
  [0xef53, 'ext4'],
  [0x58465342, 'xfs'],
  [0x9123683e, 'btrfs'],
  [0xf2f52010, 'f2fs'],
  [0xca451a4e, 'bcachefs'],
  [0x2fc12fc1, 'zfs'],
  [0x794c7630, 'overlayfs'],
])

/** How a file system takes part: its facts, and for a cluster the uuid (16 bytes) of its shared pool. */
export interface OptIn {
  readonly facts: FileSystemFacts
  readonly uuid?: Uint8Array
}

/**
 * The usual choice: local file systems on disks take part, anything unknown (a network, a file system in memory, /proc)
 * is left alone: its files are passed through.
 */
export function localDisks(kind: FileSystemKind): OptIn | undefined {
  const name = localFileSystems.get(kind.type)
  return name === undefined ? undefined : { facts: pageCacheFacts(name, kind.blockSize) }
}

/**
 * What the page cache can promise for a local file system on disk; its part of the seven guarantees. Inode numbers
 * count as unique because its file keys also name the version of the file.
 */
export function pageCacheFacts(name: string, blockSize: number): FileSystemFacts {
  return Object.freeze({
    name,
    blockSize,
    inMemory: false,
    invalidates: true,
    uniqueInodes: true,
    invalidatesAtEnd: true,
    readsAskFirst: true,
    cluster: false,
  })
}

/**
 * Flags in the form of node:fs (`'r+'`, or a number) as the system's number. Throws `TypeError` for unknown ones,
 * `RangeError` for numbers of more than 32 bits.
 */
export function flagsOf(flags: string | number | null | undefined): number {
  const { O_RDONLY, O_RDWR, O_WRONLY, O_CREAT, O_TRUNC, O_EXCL, O_APPEND, O_SYNC } = fs.constants
  if (flags === null || flags === undefined) return O_RDONLY
  if (typeof flags === 'number') {
    if ((flags | 0) !== flags) throw outOfRange('flags', 'an integer of 32 bits', flags)
    return flags
  }
  const [, first, ...more] = /^([rwa])([xs]?)(\+?)$/.exec(rightWay(flags)) ?? []
  const [extra, plus] = more
  if (first === undefined || (extra === 'x' && first === 'r') || (extra === 's' && first === 'w'))
    throw wrongValue('flags', "must be those of node:fs, such as 'r+'", flags)
  const access = plus === '+' ? O_RDWR : first === 'r' ? O_RDONLY : O_WRONLY
  const kind = first === 'r' ? 0 : first === 'w' ? O_CREAT | O_TRUNC : O_CREAT | O_APPEND
  return access | kind | (extra === 'x' ? O_EXCL : extra === 's' ? O_SYNC : 0)
}

/** `'xa'` is `'ax'`. */
const rightWay = (flags: string): string => flags.replace(/^([xs])([rwa])/, '$2$1')
