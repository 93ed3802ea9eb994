/**
 * The operating system's files, as far as a page file needs them: one method for each call, so that a test or a
 * simulator can put another system in its place, or fail a single call of this one.
 *
 * node:fs does nearly all of it. What it lacks comes from the C library through koffi, where that loads: whole-file
 * locks, space given back and taken ahead, where data lies. Without koffi those answer that they cannot be had, and
 * `lacks` says why.
 *
 * Invariants: a descriptor stays node:fs's own, so the runtime closes it when the thread that opened it ends, after the
 * transfers under way.
 *
 * Source: open(2), linkat(2), flock(2), fallocate(2), lseek(2), statfs(2), swapon(2); proc(5) for /proc/self/fd,
 * /proc/swaps and /proc/locks; loop(4) for what is known of a loop device in /sys/block.
 */

import {
  type BigIntStats,
  closeSync,
  constants,
  existsSync,
  fdatasync,
  fdatasyncSync,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  lstatSync,
  openSync,
  read,
  readdirSync,
  readFileSync,
  readSync,
  statfsSync,
  statSync,
  unlinkSync,
  write,
  writeSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, resolve } from 'node:path'
import { types } from 'node:util'
import { checkOptions } from '@tmem/core'
import { claimDescriptor, type FileClaim, hasCode, type Mark } from './claim.ts'

/** What a name or a descriptor leads to. */
export interface FileIdentity {
  readonly kind: 'file' | 'block device' | 'character device' | 'directory' | 'link' | 'FIFO' | 'socket'
  /** Which file it is, whatever its name: device and inode; of a block device its own number. */
  readonly id: string
  /** Its length in bytes; of anything but files and block devices 0. */
  readonly bytes: number
  /** Bytes of the disk that it takes: fewer than `bytes` when it has holes. */
  readonly allocatedBytes: number
  /** Number of the user to whom it belongs. */
  readonly owner: number
}

/** How a file is opened. */
export interface OpenHow {
  /** Make it, with mode 0600; fails with `EEXIST` when there is anything of that name. Default: open what is there. */
  readonly make?: boolean
  /** For writing, too. */
  readonly write: boolean
  /** Follow a symbolic link; else one fails with `ELOOP`. */
  readonly follow: boolean
  /** A block device: fails with `EBUSY` while it is mounted, swapped to or opened so by somebody else. */
  readonly exclusive: boolean
}

/**
 * A system with files. Methods throw or reject with the system's own error (`code`). A transfer may be short: it
 * answers how many bytes it moved. Everything is positional: no method depends on where another one was.
 */
export interface PageFileIo {
  /** Why some of what follows cannot be had here, in words; `undefined` when all can. */
  readonly lacks: string | undefined
  /** Number of the user whose files are ours; `undefined` where there are no such numbers. */
  readonly user: number | undefined
  /** What is there of that name; `undefined` for nothing. */
  identify(path: string, follow: boolean): FileIdentity | undefined
  identifyOpen(descriptor: number): FileIdentity
  open(path: string, how: OpenHow): number
  /**
   * Makes a file without a name, in the folder of `path` and to be given that one by `name`, for reading and writing,
   * with mode 0600: it is gone with its descriptor until then. `undefined` where that cannot be had.
   */
  makeUnnamed(path: string): number | undefined
  /**
   * Gives a file made by `makeUnnamed` its name. 'taken': there is something of that name; 'none': the file system
   * cannot do that.
   */
  name(descriptor: number, path: string): 'named' | 'taken' | 'none'
  /**
   * The same file once more, around the system's cache; transfers are then of whole blocks from and to aligned memory,
   * else `EINVAL`. `memory`: the file system keeps its files in memory, so nothing is gained, and nothing can fail
   * later; `none`: it has no such way.
   */
  openDirect(descriptor: number, write: boolean): number | 'memory' | 'none'
  close(descriptor: number): void
  /**
   * What the kernel does with it, and how to end that: it swaps to it, or has a loop device over it; `undefined`:
   * nothing.
   */
  kernelUse(identity: FileIdentity): string | undefined
  /** Number of the process that has it locked, where the system tells. */
  lockedBy(identity: FileIdentity): number | undefined
  /** Makes the file this owner's; `mark` is what was found in it. `undefined`: somebody else has it. */
  claim(descriptor: number, identity: FileIdentity, mark: Mark | undefined): FileClaim | undefined
  /** Waits in the calling thread: for what is over in a moment. */
  pause(milliseconds: number): void
  read(descriptor: number, into: Uint8Array, at: number, length: number, position: number): Promise<number>
  readNow(descriptor: number, into: Uint8Array, at: number, length: number, position: number): number
  write(descriptor: number, from: Uint8Array, at: number, length: number, position: number): Promise<number>
  writeNow(descriptor: number, from: Uint8Array, at: number, length: number, position: number): number
  /** What was written is on the medium afterwards. */
  sync(descriptor: number): Promise<void>
  syncNow(descriptor: number): void
  /** Makes the name of a new file last: syncs the folder that has it. */
  syncFolder(path: string): void
  resize(descriptor: number, bytes: number): void
  /** Takes the blocks of a file ahead, keeping what is in it; false (and nothing done) where that cannot be had. */
  reserve(descriptor: number, bytes: number): boolean
  /** Gives whole blocks back, which then read as zeros; false (and nothing done) where that cannot be had. */
  punch(descriptor: number, position: number, length: number): boolean
  /** The first run of data from `position` on, as far as the system knows; `undefined` when only holes follow. */
  nextData(descriptor: number, position: number, bytes: number): { from: number; to: number } | undefined
  /** Bytes that a new file in the folder of that one can take. */
  freeBytes(path: string): number
  /** Takes the name away. */
  remove(path: string): void
}

/** File systems that keep their files in memory (tmpfs, ramfs). */
const memoryFileSystems: ReadonlySet<number> = new Set([0x01021994, 0x858458f6])

type Koffi = typeof import('koffi')
type Call = (...args: readonly (number | string)[]) => number

/** What is used of the C library. A call that fails throws an error as node:fs would. */
class Libc {
  readonly #koffi: Koffi
  readonly #flock: Call
  /** Linux's alone, as they are used here. */
  readonly #fallocate: Call | undefined
  readonly #lseek: Call | undefined
  readonly #linkat: Call | undefined

  /** Throws when koffi cannot be loaded, or the library lacks a function. */
  constructor() {
    // An import would have to be waited for, and files are opened at once.
    this.#koffi = createRequire(import.meta.url)('koffi') as Koffi
    const libc = this.#koffi.load(null)
    this.#flock = libc.func('int flock(int, int)') as Call
    // A shorter number would cut a position off, and give another part of the file back.
    if (process.platform !== 'linux' || this.#koffi.sizeof('long') !== 8) return
    this.#fallocate = libc.func('int fallocate(int, int, long, long)') as Call
    this.#lseek = libc.func('long lseek(int, long, int)') as Call
    this.#linkat = libc.func('int linkat(int, str, int, str, int)') as Call
  }

  /** Whether files without a name can be given one. */
  get links(): boolean {
    return this.#linkat !== undefined
  }

  /** Gives an open file a name. */
  link(descriptor: number, path: string): 'named' | 'taken' | 'none' {
    const here = -100
    const follow = 0x400
    if (this.#linkat?.(here, `/proc/self/fd/${descriptor}`, here, path, follow) === 0) return 'named'
    return this.#code() === 'EEXIST' ? 'taken' : 'none'
  }

  /**
   * Locks the open file for this descriptor alone. False: another descriptor has it locked; `undefined`: no locks
   * there.
   */
  lock(descriptor: number): boolean | undefined {
    const exclusively = 2
    const atOnce = 4
    if (this.#flock(descriptor, exclusively | atOnce) === 0) return true
    const code = this.#code()
    if (code === 'EAGAIN' || code === 'EWOULDBLOCK') return false
    if (code === 'ENOLCK' || code === 'EINVAL' || isUnsupported(code)) return undefined
    throw systemError('flock', code)
  }

  /** `fallocate`, with the flags of that call; false where the file system has none. */
  allocate(descriptor: number, flags: number, position: number, length: number): boolean {
    if (this.#fallocate === undefined) return false
    for (;;) {
      if (this.#fallocate(descriptor, flags, position, length) === 0) return true
      const code = this.#code()
      if (isUnsupported(code)) return false
      if (code !== 'EINTR') throw systemError('fallocate', code)
    }
  }

  /**
   * The first place from `position` on with data (3) or with a hole (4); `undefined` when there is none; without
   * `lseek` all is data.
   */
  seek(descriptor: number, position: number, what: 3 | 4): number | undefined {
    if (this.#lseek === undefined) return what === 3 ? position : undefined
    const found = this.#lseek(descriptor, position, what)
    if (found >= 0) return found
    const code = this.#code()
    if (code === 'ENXIO') return undefined
    throw systemError('lseek', code)
  }

  #code(): string {
    const number = this.#koffi.errno()
    const known = Object.entries(this.#koffi.os.errno).find(([, value]) => value === number)
    return known?.[0] ?? `errno ${number}`
  }
}

const isUnsupported = (code: string): boolean => code === 'EOPNOTSUPP' || code === 'ENOTSUP' || code === 'ENOSYS'

const systemError = (call: string, code: string): Error =>
  Object.assign(new Error(`${code}: ${call} failed`), { code, syscall: call })

/** Settings of `systemFiles`. */
export interface SystemFilesOptions {
  /** False: without the C library, as where koffi cannot be loaded. Default: with it where it can. */
  readonly native?: boolean
}

/** The files of this machine. */
export function systemFiles(options: SystemFilesOptions = {}): PageFileIo {
  checkOptions('systemFiles', options, { native: 'flag?' })
  const { native = true } = options
  if (!native) return new SystemFiles(undefined, 'calls of the C library were not asked for')
  if (process.platform === 'win32') return new SystemFiles(undefined, 'this system has no such calls')
  let libc: Libc
  try {
    libc = new Libc()
  } catch (error) {
    return new SystemFiles(
      undefined,
      `koffi cannot be loaded: ${types.isNativeError(error) ? error.message : String(error)}`,
    )
  }
  return new SystemFiles(libc, undefined)
}

class SystemFiles implements PageFileIo {
  readonly lacks: string | undefined
  readonly user: number | undefined = process.geteuid?.()
  readonly #libc: Libc | undefined

  constructor(libc: Libc | undefined, lacks: string | undefined) {
    this.#libc = libc
    this.lacks = lacks
  }

  identify(path: string, follow: boolean): FileIdentity | undefined {
    const options = { bigint: true, throwIfNoEntry: false } as const
    const stat = follow ? statSync(path, options) : lstatSync(path, options)
    return stat === undefined ? undefined : identity(stat)
  }

  identifyOpen(descriptor: number): FileIdentity {
    return identity(fstatSync(descriptor, { bigint: true }))
  }

  open(path: string, how: OpenHow): number {
    const { O_RDONLY, O_RDWR, O_CREAT, O_EXCL, O_NOFOLLOW, O_NONBLOCK, O_NOCTTY } = constants
    let flags = how.write ? O_RDWR : O_RDONLY
    if (how.make) flags |= O_CREAT | O_EXCL
    if (how.exclusive) flags |= O_EXCL
    if (!how.follow) flags |= O_NOFOLLOW
    // Somebody may put a pipe or a terminal there after it was looked at.
    return openSync(path, flags | O_NONBLOCK | O_NOCTTY, 0o600)
  }

  makeUnnamed(path: string): number | undefined {
    if (this.#libc?.links !== true || !existsSync('/proc/self/fd')) return undefined
    const { O_RDWR, O_DIRECTORY } = constants
    // Node names it not. The same on all of Linux's architectures that Node runs on.
    const unnamed = 0o20000000 | O_DIRECTORY
    try {
      return openSync(dirname(resolve(path)), O_RDWR | unnamed, 0o600)
    } catch {
      // File systems say in many ways that they have no such files; what else is wrong is told by making it with a
      // name.
      return undefined
    }
  }

  name(descriptor: number, path: string): 'named' | 'taken' | 'none' {
    return this.#libc!.link(descriptor, path)
  }

  openDirect(descriptor: number, write: boolean): number | 'memory' | 'none' {
    // Without O_DIRECT in the constants the platform has none (macOS, Windows).
    const direct: number | undefined = constants.O_DIRECT
    if (direct === undefined) return 'none'
    // By number, so that it is the same file whatever happens to its name.
    const path = `/proc/self/fd/${descriptor}`
    try {
      // The node of a device lies in a file system in memory, the device does not.
      if (fstatSync(descriptor).isFile() && memoryFileSystems.has(statfsSync(path).type)) return 'memory'
      return openSync(path, (write ? constants.O_RDWR : constants.O_RDONLY) | direct)
    } catch (error) {
      // No such way in this file system; no /proc; a file that this user may not open a second time.
      if (['EINVAL', 'ENOENT', 'EACCES'].some((code) => hasCode(error, code))) return 'none'
      throw error
    }
  }

  close(descriptor: number): void {
    closeSync(descriptor)
  }

  kernelUse({ id }: FileIdentity): string | undefined {
    const there = mountTable()
    const leadsHere = (text: string): boolean => {
      const path = Buffer.from(text, 'latin1').toString()
      // A server of files that hangs would be waited for, in a call that nothing ends. Our own file's has just
      // answered.
      const mount = mountOf(path, there)
      if (mount !== undefined && waitsForOthers(mount.type) && mount.device !== deviceOf(id)) return false
      try {
        return this.identify(path, true)?.id === id
      } catch {
        // Where nothing can be looked at (a mount whose server ends, a folder of somebody else) is no file that is open
        // here.
        return false
      }
    }
    const [, ...areas] = contentOf('/proc/swaps')?.trim().split('\n') ?? []
    for (const area of areas) {
      if (leadsHere(unescaped(area.split(/\s/)[0]!))) return 'the system swaps to it; run swapoff first'
    }
    for (const name of existsSync('/sys/block') ? readdirSync('/sys/block') : []) {
      const file = contentOf(`/sys/block/${name}/loop/backing_file`)
      // One that only reads it spoils nothing.
      if (file === undefined || contentOf(`/sys/block/${name}/ro`)?.trim() !== '0') continue
      if (leadsHere(file.trimEnd())) return `it is the file of /dev/${name}; run losetup -d /dev/${name} first`
    }
    return undefined
  }

  lockedBy({ id }: FileIdentity): number | undefined {
    const [device, inode] = id.split(' ').map((part) => (/^\d+$/.test(part) ? BigInt(part) : undefined))
    if (device === undefined || inode === undefined) return undefined
    const { major, minor } = numbersOf(device)
    const hex = (number: bigint): string => number.toString(16).padStart(2, '0')
    const file = ` ${hex(major)}:${hex(minor)}:${inode} `
    const line = contentOf('/proc/locks')
      ?.split('\n')
      .find((each) => each.includes(' FLOCK ') && each.includes(file))
    const [, pid] = / WRITE +(\d+) /.exec(line ?? '') ?? []
    return pid === undefined || pid === '0' ? undefined : Number(pid)
  }

  claim(descriptor: number, { id }: FileIdentity, mark: Mark | undefined): FileClaim | undefined {
    const lock = (): boolean | undefined => this.#libc?.lock(descriptor)
    return claimDescriptor({ descriptor, id, mark, lock, pause: (milliseconds) => this.pause(milliseconds) })
  }

  pause(milliseconds: number): void {
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, milliseconds)
  }

  read(descriptor: number, into: Uint8Array, at: number, length: number, position: number): Promise<number> {
    return new Promise((resolve, reject) =>
      read(descriptor, into, at, length, position, (error, bytes) => (error === null ? resolve(bytes) : reject(error))),
    )
  }

  readNow(descriptor: number, into: Uint8Array, at: number, length: number, position: number): number {
    return readSync(descriptor, into, at, length, position)
  }

  write(descriptor: number, from: Uint8Array, at: number, length: number, position: number): Promise<number> {
    return new Promise((resolve, reject) =>
      write(descriptor, from, at, length, position, (error, bytes) =>
        error === null ? resolve(bytes) : reject(error),
      ),
    )
  }

  writeNow(descriptor: number, from: Uint8Array, at: number, length: number, position: number): number {
    return writeSync(descriptor, from, at, length, position)
  }

  sync(descriptor: number): Promise<void> {
    return new Promise((resolve, reject) =>
      fdatasync(descriptor, (error) => (error === null ? resolve() : reject(error))),
    )
  }

  syncNow(descriptor: number): void {
    fdatasyncSync(descriptor)
  }

  syncFolder(path: string): void {
    const folder = openSync(dirname(resolve(path)), constants.O_RDONLY)
    try {
      fsyncSync(folder)
    } finally {
      closeSync(folder)
    }
  }

  resize(descriptor: number, bytes: number): void {
    ftruncateSync(descriptor, bytes)
  }

  reserve(descriptor: number, bytes: number): boolean {
    return this.#libc?.allocate(descriptor, 0, 0, bytes) ?? false
  }

  punch(descriptor: number, position: number, length: number): boolean {
    const keepSize = 1
    const hole = 2
    return this.#libc?.allocate(descriptor, keepSize | hole, position, length) ?? false
  }

  nextData(descriptor: number, position: number, bytes: number): { from: number; to: number } | undefined {
    if (position >= bytes) return undefined
    const libc = this.#libc
    if (libc === undefined || !fstatSync(descriptor).isFile()) return { from: position, to: bytes }
    const from = libc.seek(descriptor, position, 3)
    if (from === undefined || from >= bytes) return undefined
    return { from, to: Math.min(bytes, libc.seek(descriptor, from, 4) ?? bytes) }
  }

  freeBytes(path: string): number {
    const { bavail, bsize } = statfsSync(dirname(resolve(path)))
    return bavail * bsize
  }

  remove(path: string): void {
    unlinkSync(path)
  }
}

function identity(stat: BigIntStats): FileIdentity {
  const kind = kindOf(stat)
  const device = kind === 'block device'
  const bytes = device ? blockDeviceBytes(stat.rdev) : kind === 'file' ? Number(stat.size) : 0
  return {
    kind,
    // Two nodes may lead to the same device.
    id: device ? `block ${stat.rdev}` : `${stat.dev} ${stat.ino}`,
    bytes,
    allocatedBytes: device ? bytes : Number(stat.blocks) * 512,
    owner: Number(stat.uid),
  }
}

function kindOf(stat: BigIntStats): FileIdentity['kind'] {
  if (stat.isFile()) return 'file'
  if (stat.isBlockDevice()) return 'block device'
  if (stat.isCharacterDevice()) return 'character device'
  if (stat.isDirectory()) return 'directory'
  if (stat.isSymbolicLink()) return 'link'
  return stat.isFIFO() ? 'FIFO' : 'socket'
}

/** The two numbers of a device, which Linux's dev_t packs into one. */
const numbersOf = (device: bigint): { major: bigint; minor: bigint } => ({
  major: ((device >> 8n) & 0xfffn) | ((device >> 32n) & ~0xfffn),
  minor: (device & 0xffn) | ((device >> 12n) & ~0xffn),
})

/** Length of a block device by its number; 0 where the system does not tell. */
function blockDeviceBytes(number: bigint): number {
  const { major, minor } = numbersOf(number)
  const sectors = contentOf(`/sys/dev/block/${major}:${minor}/size`)
  return sectors === undefined ? 0 : Number(sectors) * 512
}

/** Blanks and backslashes in a path are written in octal in the kernel's tables. */
const unescaped = (path: string): string =>
  path.replace(/\\(\d{3})/g, (_, octal) => String.fromCharCode(Number.parseInt(octal, 8)))

/** A line of /proc/self/mountinfo. Texts are bytes, as `latin1` has them. */
interface MountLine {
  /** `MAJOR:MINOR`. */
  readonly device: string
  readonly point: string
  readonly type: string
}

function mountTable(): MountLine[] {
  const lines = contentOf('/proc/self/mountinfo')?.trim().split('\n') ?? []
  return lines.map((line) => {
    const [, , device = '', , point = '', ...rest] = line.split(' ')
    return { device, point: unescaped(point), type: rest[rest.indexOf('-') + 1] ?? '' }
  })
}

/** The mount in which a path lies, by its text: of those on one directory the last. */
function mountOf(path: string, table: readonly MountLine[]): MountLine | undefined {
  const text = Buffer.from(path).toString('latin1')
  let found: MountLine | undefined
  for (const mount of table) {
    const isIn = mount.point === '/' || text === mount.point || text.startsWith(`${mount.point}/`)
    if (isIn && mount.point.length >= (found?.point.length ?? 0)) found = mount
  }
  return found
}

/** Whether files of that type are asked of a process or of another machine. */
const waitsForOthers = (type: string): boolean =>
  /^(fuse|fuseblk|nfs\d?|cifs|smb3|9p|ceph|afs|virtiofs)($|\.)/.test(type)

/** The device of a file's `id`, as the kernel's tables have it. */
function deviceOf(id: string): string | undefined {
  const number = /^\d+/.exec(id)?.[0]
  if (number === undefined) return undefined
  const { major, minor } = numbersOf(BigInt(number))
  return `${major}:${minor}`
}

/** A file of the system that may not be there. */
function contentOf(path: string): string | undefined {
  try {
    return readFileSync(path, 'latin1')
  } catch (error) {
    // ENODEV: what it is about is going away while it is read (a loop device that is detached).
    if (hasCode(error, 'ENOENT') || hasCode(error, 'ENODEV')) return undefined
    throw error
  }
}
