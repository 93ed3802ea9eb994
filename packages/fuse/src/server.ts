/**
 * The server of a mount: reads requests from /dev/fuse, answers them from a tree of nodes.
 *
 * It runs in the event loop of its thread: it takes requests until there are none, and then the loop waits for more, or
 * where it cannot (watch.ts) one of the runtime's threads does. A request that a device answers at once is answered at
 * once; one that has to wait keeps its buffers, and others go on meanwhile, as long as there are buffers.
 *
 * Invariants:
 *  - All buffers are reserved, and touched, before the mount: a kernel that swaps to a file of it must not have to wait
 *    for memory that only swapping can free.
 *  - The loop reads only while there is a free slot beside `#next`: what it has read can be at work while it reads the
 *    next request.
 *  - Each request is answered exactly once (FORGET and INTERRUPT: never).
 *  - After `close` nothing is mounted and the descriptor is closed. A mount that is in use is not taken away: `close`
 *    rejects, and the server goes on.
 *  - Who has a device open is counted from what the kernel says of opening and releasing it, whatever path led there. A
 *    loop device, and so a file system or swap on it, has it open.
 *  - One server mounts on a directory: it holds a lock of the directory behind the mount (device and inode), which ends
 *    with it.
 *
 * Source: Linux's include/uapi/linux/fuse.h (version 7.31 of the protocol), fuse(4), mount.fuse(8), flock(2).
 */
import { closeSync, constants, openSync } from 'node:fs'
import { lstat } from 'node:fs/promises'
import { resolve } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { types } from 'node:util'
import { type BlockDevice, type Completion, checkOptions, type StatsNode, TmemError } from '@tmem/core'
import { type Mount, mounts, type Place, placeOf } from './mounts.ts'
import { errorNumbers, System } from './system.ts'
import { type FuseDevice, type FuseDirectory, type FuseNode, type FuseText, type FuseWriter, Inodes } from './tree.ts'
import { type Watch, watch } from './watch.ts'

/** Settings of a mount. */
export interface FuseOptions {
  /**
   * A directory. What is left of a server that was killed is taken away first, unless something of it is still in use.
   */
  readonly mountPoint: string
  readonly root: FuseDirectory
  /**
   * How many turns the event loop makes, without waiting, after the last request (default 0). Answers to a client with
   * one request at a time then come sooner, for the price of a processor that works while that client does.
   */
  readonly busyTurns?: number
  /** A device or knob failed; the client has its answer already. */
  readonly onError?: (error: unknown) => void
}

/** A mount that is served. */
export interface FuseServer {
  /** Where it is, as the kernel calls it: without symbolic links. */
  readonly mountPoint: string
  /** Number of the file system, `MAJOR:MINOR`: what `stat` of each file in it says. */
  readonly device: string
  stats(): StatsNode
  /**
   * How many open files lead to a device, whatever path they were opened by: a loop device over it is one. Copies of a
   * descriptor (`dup`, `fork`) are one with it; a mapping counts until it goes.
   */
  opens(device: BlockDevice): number
  /**
   * Resolves to `opens` of it, when that is 0 or a moment has passed: the kernel tells of the last one to close it a
   * little later.
   */
  opensNow(device: BlockDevice): Promise<number>
  /** Inode numbers under which a device was found so far: with `device` they say which file it is. */
  inodes(device: BlockDevice): readonly number[]
  /** Resolves when the mount is gone, whoever took it away. */
  readonly ended: Promise<void>
  /**
   * Unmounts, and resolves when the mount is gone. Rejects with `TmemError` (`TMEM_IO`, cause `EBUSY`) while a file of
   * it is in use, or something is mounted over it; then the server goes on. Copies of the mount elsewhere have no
   * server then.
   */
  close(): Promise<void>
}

const opcode = {
  LOOKUP: 1,
  FORGET: 2,
  GETATTR: 3,
  SETATTR: 4,
  SYMLINK: 6,
  MKNOD: 8,
  MKDIR: 9,
  UNLINK: 10,
  RMDIR: 11,
  RENAME: 12,
  LINK: 13,
  OPEN: 14,
  READ: 15,
  WRITE: 16,
  STATFS: 17,
  RELEASE: 18,
  FSYNC: 20,
  FLUSH: 25,
  INIT: 26,
  OPENDIR: 27,
  READDIR: 28,
  RELEASEDIR: 29,
  FSYNCDIR: 30,
  ACCESS: 34,
  CREATE: 35,
  INTERRUPT: 36,
  DESTROY: 38,
  BATCH_FORGET: 42,
  FALLOCATE: 43,
  RENAME2: 45,
  LSEEK: 46,
} as const

const opcodeNames: ReadonlyMap<number, string> = new Map(
  Object.entries(opcode).map(([name, number]) => [number, name.toLowerCase()]),
)

/** INIT: asynchronous reads, writes of more than a page, asynchronous direct I/O, more than 32 pages in a request. */
const initFlags = (1 << 0) | (1 << 5) | (1 << 15) | (1 << 22)
/** OPEN: O_ACCMODE; the answer's flag for not through the page cache. */
const accessMode = 3
const directIo = 1
/** SETATTR: the size is to be set; mode, owner, group or times are. */
const setSize = 1 << 3
const setOther = 0b111 | (0b1101_1 << 4)
/** LSEEK: to the next bytes, or to the next hole. */
const seekData = 3
const seekHole = 4
/** Bytes of a device that are looked through before other requests have their turn. */
const turnBytes = 2 ** 30
const punchHole = 2
const zeroRange = 0x10
const keepSize = 1

const requestHeader = 40
const answerHeader = 16
const writeHeader = 40
/** Largest transfer: what the kernel may ask for at once, and what a buffer has room for. */
const maxTransfer = 256 * 1024
const maxPages = maxTransfer / 4096
/** Requests at work at once. */
const slots = 16
/** Requests that are answered before the event loop has its turn. */
const turnRequests = 64
/** Texts open at once. */
const maxOpenTexts = 1024
/**
 * How long the kernel may believe that a name is there; and what a node is: size and bytes of a device also change by
 * others than the kernel.
 */
const seconds = 1
const validSeconds = ({ kind }: FuseNode): number => (kind === 'device' ? 0 : seconds)
/** How long after unmounting the kernel may take to say that nothing is mounted any more. */
const goneMs = 2000
/** How often, and how many milliseconds apart, it is looked whether a device that somebody closed has been released. */
const releaseLooks = 20
const releaseMs = 10

/** Buffers of one request. */
interface Slot {
  readonly request: Uint8Array
  readonly requestView: DataView
  readonly answer: Uint8Array
  readonly answerView: DataView
}

/** Buffers that are filled once, so that the memory is really there. */
function newSlot(): Slot {
  const request = new Uint8Array(requestHeader + writeHeader + maxTransfer).fill(1)
  const answer = new Uint8Array(answerHeader + maxTransfer).fill(1)
  return { request, requestView: new DataView(request.buffer), answer, answerView: new DataView(answer.buffer) }
}

/**
 * Mounts a tree and serves it. Rejects with `TmemError`: `TMEM_UNSUPPORTED` where FUSE is not to be had, `TMEM_IO` when
 * it cannot be mounted.
 */
export async function fuseServer(options: FuseOptions): Promise<FuseServer> {
  checkOptions('fuseServer', options, {
    mountPoint: 'text',
    root: 'object',
    busyTurns: 'number?',
    onError: 'function?',
  })
  const system = await System.load()
  const open: number[] = []
  try {
    const directory = await claimDirectory(system, resolve(options.mountPoint))
    open.push(directory)
    const descriptor = openFuse()
    open.push(descriptor)
    const server = new RawFuseServer(system, descriptor, directory, options)
    // By number: whatever became of its name, it is the directory that was claimed.
    system.mount(descriptor, `/proc/self/fd/${directory}`, options.mountPoint)
    server.begin(resolve(options.mountPoint))
    return server
  } catch (error) {
    for (const descriptor of open) closeSync(descriptor)
    system.close()
    throw error
  }
}

function openFuse(): number {
  try {
    return openSync('/dev/fuse', constants.O_RDWR | constants.O_NONBLOCK)
  } catch (error) {
    throw new TmemError('TMEM_UNSUPPORTED', `/dev/fuse cannot be opened: ${(error as Error).message}`, { cause: error })
  }
}

/**
 * Tells the kernel that this process serves a device to which memory is written. False where that is not allowed.
 * Rejects with `TmemError` (`TMEM_UNSUPPORTED`) where it cannot be asked for.
 */
export async function setIoFlusher(): Promise<boolean> {
  const system = await System.load()
  try {
    return system.setIoFlusher()
  } finally {
    system.close()
  }
}

/**
 * A directory on which nobody else mounts: open, and locked as long as it is. What a dead server left mounted there
 * goes, if nobody uses it.
 */
async function claimDirectory(system: System, path: string): Promise<number> {
  let place = looked(path)
  if (isFuse(place)) {
    await sweep(system, path, place)
    place = looked(path)
  }
  if (isFuse(place)) throw taken(place.path)
  const directory = asUsable(path, () => openSync(path, constants.O_RDONLY | constants.O_DIRECTORY))
  if (system.lock(directory)) {
    // Between the look and the lock another server may have mounted there, so that this is the root of its mount.
    const now = looked(path)
    if (now.path === place.path && now.mount.id === place.mount.id) return directory
  }
  closeSync(directory)
  throw taken(place.path)
}

const looked = (path: string): Place => asUsable(path, () => placeOf(path))
const isFuse = ({ isMountPoint, mount }: Place): boolean => isMountPoint && mount.type.startsWith('fuse')

/** Takes a mount away whose server is gone. Looks at it from another thread: its server may be in this one. */
async function sweep(system: System, path: string, { path: point }: Place): Promise<void> {
  const isDead = await lstat(`${point}/.`).then(
    () => false,
    (error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOTCONN') return true
      throw unusable(path, error)
    },
  )
  if (!isDead) throw taken(point)
  try {
    // Not lazily: while a loop device or a program has a file of it open, it has to be found by its name.
    system.unmount(point)
  } catch (error) {
    throw busy(
      `what a server that was killed has left on ${point} is in use: end that (fuser -m ${point} names programs), then start again: ${(error as Error).message}`,
    )
  }
}

function asUsable<Result>(path: string, act: () => Result): Result {
  try {
    return act()
  } catch (error) {
    throw unusable(path, error)
  }
}

const unusable = (mountPoint: string, error: unknown): TmemError =>
  new TmemError('TMEM_IO', `${mountPoint} cannot be used: ${(error as Error).message}`, { layer: 'fuse', cause: error })

const taken = (point: string): TmemError =>
  new TmemError('TMEM_IO', `something is mounted on ${point} already: choose another directory`, { layer: 'fuse' })

const busy = (message: string): TmemError =>
  new TmemError('TMEM_IO', message, { layer: 'fuse', cause: Object.assign(new Error('EBUSY'), { code: 'EBUSY' }) })

class RawFuseServer implements FuseServer {
  readonly ended: Promise<void>
  #mount: Mount | undefined
  readonly #system: System
  readonly #descriptor: number
  /** The directory behind the mount, which is locked as long as it is open. */
  readonly #directory: number
  readonly #inodes: Inodes
  readonly #busyTurns: number
  readonly #onError: (error: unknown) => void
  readonly #free: Slot[] = []
  /** Where the loop reads the next request to; nobody else uses it. */
  #next: Slot
  #watch: Watch | undefined
  /** Texts by file handle: as they were when they were opened; and what is left unread of a directory. */
  readonly #texts = new Map<number, Uint8Array>()
  readonly #directories = new Map<number, readonly (readonly [string, FuseNode])[]>()
  /** Devices by file handle, each has one; and how often each of them is open. */
  readonly #devices = new Map<number, BlockDevice>()
  readonly #opens = new Map<BlockDevice, { readonly handle: number; count: number }>()
  readonly #counts = new Map<number, number>()
  #nextHandle = 1
  #quietTurns = 0
  /** The next turn is used. */
  #turning = false
  /** Nobody reads now: all buffers are at work. */
  #stalled = false
  /** Nobody opens a device of it any more. */
  #unmounted = false
  #gone = false
  #errors = 0
  #bytesRead = 0
  #bytesWritten = 0
  #end: () => void = () => undefined

  constructor(system: System, descriptor: number, directory: number, options: FuseOptions) {
    const { root, busyTurns = 0, onError = () => undefined } = options
    if (!Number.isSafeInteger(busyTurns) || busyTurns < 0)
      throw new RangeError(`busyTurns must not be negative, got ${busyTurns}`)
    this.#system = system
    this.#descriptor = descriptor
    this.#directory = directory
    this.#inodes = new Inodes(root)
    this.#busyTurns = busyTurns
    this.#onError = onError
    this.ended = new Promise((settle) => {
      this.#end = settle
    })
    this.#next = newSlot()
    for (let n = 0; n < slots; n++) this.#free.push(newSlot())
  }

  /** It is mounted there now. */
  begin(path: string): void {
    this.#mount = placeOf(path).mount
    process.on('exit', this.#exit)
    this.#watch = watch(this.#descriptor, {
      room: () => this.#next.request,
      received: (count) => this.#received(count),
      closed: () => this.#finish(),
    })
    if (this.#watch === undefined) this.#receive()
  }

  /**
   * The process ends without having closed: nothing would be served any more, and the thread that waits would keep it
   * from ending.
   */
  readonly #exit = (): void => {
    this.#system.endWait()
    const { place } = this.#whereNow()
    if (place !== undefined) this.#system.unmountIfUnused(place.path)
  }

  get mountPoint(): string {
    return this.#mount!.point
  }

  get device(): string {
    return this.#mount!.device
  }

  opens(device: BlockDevice): number {
    return this.#opens.get(device)?.count ?? 0
  }

  inodes(device: BlockDevice): readonly number[] {
    return this.#inodes.numbersOf(device)
  }

  async opensNow(device: BlockDevice): Promise<number> {
    for (let look = 0; look < releaseLooks && this.opens(device) > 0 && !this.#gone; look++) await setTimeout(releaseMs)
    return this.opens(device)
  }

  #unmount(): void {
    const { isMounted, place } = this.#whereNow()
    if (place !== undefined) this.#system.unmount(place.path)
    else if (isMounted) throw busy(`something is mounted over ${this.mountPoint}: unmount that first`)
    this.#unmounted = true
  }

  /**
   * Where the mount is now, if it is, and on top: its directory may have been renamed, and something else mounted over
   * it.
   */
  #whereNow(): { isMounted: boolean; place: Place | undefined } {
    const now = mounts().find(({ id }) => id === this.#mount!.id)
    if (now === undefined) return { isMounted: false, place: undefined }
    const place = placeOf(now.point)
    return { isMounted: true, place: place.mount.id === now.id ? place : undefined }
  }

  stats(): StatsNode {
    const counters: Record<string, number> = {
      errors: this.#errors,
      bytes_read: this.#bytesRead,
      bytes_written: this.#bytesWritten,
      in_flight: slots - this.#free.length,
      open_texts: this.#texts.size,
    }
    for (const [code, count] of this.#counts) counters[opcodeNames.get(code) ?? `opcode_${code}`] = count
    return { name: 'fuse', counters, children: [] }
  }

  async close(): Promise<void> {
    if (this.#gone) return
    let open = 0
    for (const device of this.#opens.keys()) open += await this.opensNow(device)
    if (open > 0) throw busy(`${this.mountPoint} is in use: ${open} open files lead to its devices`)
    this.#unmount()
    // Copies of the mount (bind mounts, other namespaces) keep the file system alive, and nobody has a device of it
    // open.
    const late = new AbortController()
    await Promise.race([this.ended, setTimeout(goneMs, undefined, { signal: late.signal })])
    late.abort()
    if (this.#gone) return
    this.#system.endWait()
    this.#finish()
  }

  /**
   * Takes and answers requests until there are none, or no buffers for them. After some of them the event loop has its
   * turn: what devices wait for, and everything else in this thread, must go on under any load.
   */
  #receive(): void {
    for (let served = 0; !this.#gone; served++) {
      const slot = this.#free.pop()
      if (slot === undefined) {
        this.#stalled = true
        this.#watch?.pause()
        return
      }
      if (served === turnRequests) {
        this.#free.push(slot)
        this.#again()
        return
      }
      const length = this.#system.read(this.#descriptor, slot.request)
      if (length > 0) {
        this.#quietTurns = 0
        this.#serve(slot, length)
        continue
      }
      this.#free.push(slot)
      switch (-length) {
        case errorNumbers.EAGAIN:
          this.#wait()
          return
        // A request that was given up before it was read.
        case errorNumbers.ENOENT:
        case errorNumbers.EINTR:
          continue
        default:
          // ENODEV: unmounted. Whatever else: there is nothing to be served any more.
          this.#finish()
          return
      }
    }
  }

  /** The loop has read a request. There are free buffers: else it would have been paused. */
  #received(count: number): boolean {
    const slot = this.#next
    this.#next = this.#free.pop()!
    this.#quietTurns = 0
    this.#serve(slot, count)
    this.#receive()
    return !this.#stalled
  }

  /** Looks for requests in the next turn. */
  #again(): void {
    if (this.#turning) return
    this.#turning = true
    setImmediate(() => {
      this.#turning = false
      this.#receive()
    })
  }

  #wait(): void {
    if (this.#quietTurns < this.#busyTurns) {
      this.#quietTurns++
      this.#again()
    } else if (this.#watch === undefined)
      this.#system.whenReadable(this.#descriptor, () => {
        this.#receive()
      })
  }

  #finish(): void {
    if (this.#gone) return
    this.#gone = true
    process.off('exit', this.#exit)
    if (this.#watch === undefined) closeSync(this.#descriptor)
    else this.#watch.close()
    closeSync(this.#directory)
    this.#system.close()
    this.#end()
  }

  /** Answers one request, now or later, and gives its buffers back. */
  #serve(slot: Slot, length: number): void {
    const code = slot.requestView.getUint32(4, true)
    this.#counts.set(code, (this.#counts.get(code) ?? 0) + 1)
    let answer: number | Promise<number>
    try {
      answer = this.#answer(slot, code, length)
    } catch (error) {
      answer = this.#failed(error)
    }
    if (typeof answer === 'number') this.#reply(slot, answer)
    else
      void answer
        .catch((error: unknown) => this.#failed(error))
        .then((later) => {
          this.#reply(slot, later)
        })
  }

  /** Sends an answer: bytes after its header, a negative error number, or `noAnswer`. */
  #reply(slot: Slot, answer: number): void {
    if (answer !== noAnswer && !this.#gone) {
      const { answerView, requestView } = slot
      const length = answerHeader + Math.max(0, answer)
      answerView.setUint32(0, length, true)
      answerView.setInt32(4, Math.min(0, answer), true)
      answerView.setUint32(8, requestView.getUint32(8, true), true)
      answerView.setUint32(12, requestView.getUint32(12, true), true)
      const written = this.#system.write(this.#descriptor, slot.answer, length)
      // ENOENT: the one who asked has gone. ENODEV: the mount has, which the next read will find out.
      if (written < 0 && written !== -errorNumbers.ENOENT && written !== -errorNumbers.ENODEV)
        this.#onError(
          new TmemError('TMEM_IO', `an answer was refused by the kernel: error ${-written}`, { layer: 'fuse' }),
        )
    }
    this.#free.push(slot)
    if (!this.#stalled) return
    this.#stalled = false
    this.#watch?.resume()
    this.#again()
  }

  #failed(error: unknown): number {
    this.#errors++
    this.#onError(error)
    return -errorNumberOf(error)
  }

  #answer(slot: Slot, code: number, length: number): number | Promise<number> {
    const view = slot.requestView
    const number = lowWord(view, 16)
    switch (code) {
      case opcode.INIT:
        return initAnswer(slot)
      case opcode.FORGET:
      case opcode.BATCH_FORGET:
      case opcode.INTERRUPT:
        return noAnswer
      case opcode.SYMLINK:
      case opcode.MKNOD:
      case opcode.MKDIR:
      case opcode.UNLINK:
      case opcode.RMDIR:
      case opcode.RENAME:
      case opcode.LINK:
      case opcode.CREATE:
      case opcode.RENAME2:
        // The files are those of the tree.
        return -errorNumbers.EPERM
      case opcode.DESTROY:
      case opcode.FLUSH:
      case opcode.FSYNCDIR:
        return 0
      case opcode.STATFS:
        slot.answer.fill(0, answerHeader, answerHeader + 80)
        slot.answerView.setUint32(answerHeader + 40, 4096, true)
        slot.answerView.setUint32(answerHeader + 44, 255, true)
        slot.answerView.setUint32(answerHeader + 48, 4096, true)
        return 80
      case opcode.RELEASE:
        this.#release(lowWord(view, requestHeader))
        return 0
      case opcode.RELEASEDIR:
        this.#directories.delete(lowWord(view, requestHeader))
        return 0
    }
    const node = this.#inodes.node(number)
    if (node === undefined) return -errorNumbers.ENOENT
    switch (code) {
      case opcode.LOOKUP:
        return this.#lookup(slot, number, node, length)
      case opcode.GETATTR:
        return attributesAnswer(slot, number, node)
      case opcode.SETATTR:
        // A text is cut to nothing before it is written to; a device has the size that it has.
        // Nothing else can be changed: what came with the size are the times of the change.
        if (!isChangeable(view.getUint32(requestHeader, true), node)) return -errorNumbers.EPERM
        return attributesAnswer(slot, number, node)
      case opcode.ACCESS:
        return (view.getUint32(requestHeader, true) & ~accessOf(node)) === 0 ? 0 : -errorNumbers.EACCES
      case opcode.OPENDIR:
        return this.#openDirectory(slot, node)
      case opcode.READDIR:
        return this.#readDirectory(slot, number)
      case opcode.OPEN:
        return this.#open(slot, node)
      case opcode.READ:
        return this.#read(slot, node)
      case opcode.WRITE:
        return this.#write(slot, node)
      case opcode.FSYNC:
        return node.kind === 'device' ? done(node.device.flush(), 0) : 0
      case opcode.FALLOCATE:
        return allocateRange(slot, node)
      case opcode.LSEEK:
        return seek(slot, node)
      default:
        return -errorNumbers.ENOSYS
    }
  }

  #lookup(slot: Slot, number: number, node: FuseNode, length: number): number {
    if (node.kind !== 'directory') return -errorNumbers.ENOTDIR
    // The name ends with a zero byte.
    const name = utf8.decode(slot.request.subarray(requestHeader, length - 1))
    const found = node.entries().get(name)
    if (found === undefined) return -errorNumbers.ENOENT
    const { answer, answerView } = slot
    const at = answerHeader
    answer.fill(0, at, at + 40)
    const child = this.#inodes.enter(number, name, found)
    setWide(answerView, at, child)
    setWide(answerView, at + 8, 1)
    setWide(answerView, at + 16, seconds)
    setWide(answerView, at + 24, validSeconds(found))
    setAttributes(slot, at + 40, child, found)
    return 128
  }

  #openDirectory(slot: Slot, node: FuseNode): number {
    if (node.kind !== 'directory') return -errorNumbers.ENOTDIR
    if (this.#directories.size === maxOpenTexts) return -errorNumbers.ENOSPC
    const handle = this.#nextHandle++
    this.#directories.set(handle, [...node.entries()])
    return opened(slot, handle, 0)
  }

  #readDirectory(slot: Slot, number: number): number {
    const view = slot.requestView
    const entries = this.#directories.get(lowWord(view, requestHeader))
    if (entries === undefined) return -errorNumbers.EBADF
    const room = Math.min(view.getUint32(requestHeader + 16, true), maxTransfer)
    const { answer, answerView } = slot
    let used = 0
    for (let n = lowWord(view, requestHeader + 8); n < entries.length; n++) {
      const [name, node] = entries[n]!
      const text = utf8Bytes.encode(name)
      const size = (24 + text.length + 7) & ~7
      if (used + size > room) break
      const at = answerHeader + used
      answer.fill(0, at, at + size)
      setWide(answerView, at, this.#inodes.enter(number, name, node))
      setWide(answerView, at + 8, n + 1)
      answerView.setUint32(at + 16, text.length, true)
      answerView.setUint32(at + 20, node.kind === 'directory' ? 4 : 8, true)
      answer.set(text, at + 24)
      used += size
    }
    return used
  }

  #open(slot: Slot, node: FuseNode): number {
    if (node.kind === 'directory') return -errorNumbers.EISDIR
    const isForWriting = (slot.requestView.getUint32(requestHeader, true) & accessMode) !== constants.O_RDONLY
    if (isForWriting && (accessOf(node) & constants.W_OK) === 0)
      return node.kind === 'device' ? -errorNumbers.EROFS : -errorNumbers.EACCES
    if (node.kind === 'device') return this.#openDevice(slot, node)
    if (this.#texts.size === maxOpenTexts) return -errorNumbers.ENOSPC
    const handle = this.#nextHandle++
    this.#texts.set(handle, utf8Bytes.encode(node.read()))
    return opened(slot, handle, directIo)
  }

  #openDevice(slot: Slot, { device, mayOpen }: FuseDevice): number {
    if (this.#unmounted || mayOpen?.() === false) return -errorNumbers.EBUSY
    let opens = this.#opens.get(device)
    if (opens === undefined) {
      opens = { handle: this.#nextHandle++, count: 0 }
      this.#opens.set(device, opens)
      this.#devices.set(opens.handle, device)
    }
    opens.count++
    return opened(slot, opens.handle, 0)
  }

  #release(handle: number): void {
    const device = this.#devices.get(handle)
    if (device === undefined) this.#texts.delete(handle)
    else this.#opens.get(device)!.count--
  }

  #read(slot: Slot, node: FuseNode): number | Promise<number> {
    const view = slot.requestView
    const at = wideNumber(view, requestHeader + 8)
    const size = Math.min(view.getUint32(requestHeader + 16, true), maxTransfer)
    if (node.kind === 'device') {
      const { device } = node
      const length = Math.max(0, Math.min(size, device.sizeBytes - at))
      this.#bytesRead += length
      if (length === 0) return 0
      const { blockSize } = device
      const { answer } = slot
      if (at % blockSize === 0 && length % blockSize === 0)
        return done(device.read(at, answer.subarray(answerHeader, answerHeader + length)), length)
      // Any reader may ask for any bytes of a file: reads whole blocks, and moves the part to the front.
      const from = at - (at % blockSize)
      const whole = Math.ceil((at + length - from) / blockSize) * blockSize
      const blocks = new Uint8Array(whole)
      const moved = (): number => {
        answer.set(blocks.subarray(at - from, at - from + length), answerHeader)
        return length
      }
      const reading = device.read(from, blocks)
      return reading === undefined ? moved() : reading.then(moved)
    }
    const text = this.#texts.get(lowWord(view, requestHeader))
    if (text === undefined) return -errorNumbers.EBADF
    const part = text.subarray(at, at + size)
    slot.answer.set(part, answerHeader)
    return part.length
  }

  #write(slot: Slot, node: FuseNode): number | Promise<number> {
    const view = slot.requestView
    const at = wideNumber(view, requestHeader + 8)
    const length = view.getUint32(requestHeader + 16, true)
    const first = requestHeader + writeHeader
    if (length > maxTransfer) return -errorNumbers.EINVAL
    const bytes = slot.request.subarray(first, first + length)
    setWide(slot.answerView, answerHeader, length)
    if (node.kind === 'device') {
      const { device } = node
      if (device.readOnly) return -errorNumbers.EROFS
      if (at + length > device.sizeBytes) return -errorNumbers.ENOSPC
      if (at % device.blockSize !== 0 || length % device.blockSize !== 0) return -errorNumbers.EINVAL
      this.#bytesWritten += length
      return done(device.write(at, bytes), 8)
    }
    const writer = { uid: view.getUint32(24, true), pid: view.getUint32(32, true) }
    return writeText(node as FuseText, at, bytes, writer)
  }
}

/**
 * What a program is told of an error: the system's own reason, which is the error's code or that of what it was caused
 * by; of those that say something about the file that the program has, and not only about one that is used for it.
 */
function errorNumberOf(error: unknown): number {
  for (let reason = error; types.isNativeError(reason); reason = reason.cause) {
    const { code } = reason as NodeJS.ErrnoException
    const number = code === undefined ? undefined : told.get(code)
    if (number !== undefined) return number
    if (reason instanceof RangeError || reason instanceof TypeError) return errorNumbers.EINVAL
  }
  return errorNumbers.EIO
}

const told: ReadonlyMap<string, number> = new Map([
  ['ENOSPC', errorNumbers.ENOSPC],
  ['EDQUOT', errorNumbers.ENOSPC],
  ['ENOMEM', errorNumbers.ENOMEM],
  ['EBUSY', errorNumbers.EBUSY],
  ['EPERM', errorNumbers.EPERM],
  ['EACCES', errorNumbers.EACCES],
  ['EROFS', errorNumbers.EROFS],
  ['EINVAL', errorNumbers.EINVAL],
  ['TMEM_UNSUPPORTED', errorNumbers.EOPNOTSUPP],
])

/** The request gets no answer at all. */
const noAnswer = Number.NEGATIVE_INFINITY
const utf8 = new TextDecoder()
const utf8Bytes = new TextEncoder()

function writeText(node: FuseText, at: number, bytes: Uint8Array, writer: FuseWriter): number | Promise<number> {
  if (node.write === undefined) return -errorNumbers.EPERM
  // A knob takes one word at once; what comes in pieces is not put together.
  if (at !== 0) return -errorNumbers.EINVAL
  const taken = node.write(utf8.decode(bytes).trim(), writer)
  return taken === undefined ? 8 : taken.then(() => 8)
}

/** The answer once an operation is done. */
function done(completion: Completion, answer: number): number | Promise<number> {
  return completion === undefined ? answer : completion.then(() => answer)
}

function initAnswer(slot: Slot): number {
  const { answer, answerView, requestView } = slot
  const at = answerHeader
  answer.fill(0, at, at + 64)
  answerView.setUint32(at, 7, true)
  answerView.setUint32(at + 4, 31, true)
  answerView.setUint32(at + 8, maxTransfer, true)
  answerView.setUint32(at + 12, initFlags & requestView.getUint32(requestHeader + 12, true), true)
  answerView.setUint16(at + 16, slots, true)
  answerView.setUint16(at + 18, slots, true)
  answerView.setUint32(at + 20, maxTransfer, true)
  answerView.setUint32(at + 24, 1, true)
  answerView.setUint16(at + 28, maxPages, true)
  return 64
}

function opened(slot: Slot, handle: number, flags: number): number {
  slot.answer.fill(0, answerHeader, answerHeader + 16)
  setWide(slot.answerView, answerHeader, handle)
  slot.answerView.setUint32(answerHeader + 8, flags, true)
  return 16
}

function attributesAnswer(slot: Slot, number: number, node: FuseNode): number {
  slot.answer.fill(0, answerHeader, answerHeader + 16)
  setWide(slot.answerView, answerHeader, validSeconds(node))
  setAttributes(slot, answerHeader + 16, number, node)
  return 104
}

function setAttributes(slot: Slot, at: number, number: number, node: FuseNode): void {
  const { answer, answerView } = slot
  answer.fill(0, at, at + 88)
  setWide(answerView, at, number)
  // Texts have no size, as in /proc: they are made when they are opened.
  const size = node.kind === 'device' ? node.device.sizeBytes : 0
  setWide(answerView, at + 8, size)
  const allocated = node.kind === 'device' ? (node.device.allocatedBytes ?? size) : 0
  setWide(answerView, at + 16, Math.ceil(allocated / 512))
  answerView.setUint32(at + 60, modeOf(node), true)
  answerView.setUint32(at + 64, node.kind === 'directory' ? 2 : 1, true)
  answerView.setUint32(at + 68, process.getuid!(), true)
  answerView.setUint32(at + 72, process.getgid!(), true)
  answerView.setUint32(at + 80, 4096, true)
}

/** Whether SETATTR may have what it asks for. */
const isChangeable = (asked: number, node: FuseNode): boolean =>
  (asked & setSize) === 0 ? (asked & setOther) === 0 : node.kind === 'text' && node.write !== undefined

/** What access(2) may ask for: 4 reading, 2 writing, 1 going through. */
function accessOf(node: FuseNode): number {
  const { R_OK, W_OK, X_OK } = constants
  if (node.kind === 'directory') return R_OK | X_OK
  const isWritable = node.kind === 'device' ? !node.device.readOnly : node.write !== undefined
  return isWritable ? R_OK | W_OK : R_OK
}

/** The mount is its owner's: nobody else is let in by the kernel, and modes say so. */
function modeOf(node: FuseNode): number {
  switch (node.kind) {
    case 'directory':
      return 0o40500
    case 'device':
      return node.device.readOnly ? 0o100400 : 0o100600
    case 'text':
      return node.write === undefined ? 0o100400 : 0o100600
  }
}

/** Holes are discards, zeroed ranges are zeros; room is there anyway. */
function allocateRange(slot: Slot, node: FuseNode): number | Promise<number> {
  if (node.kind !== 'device') return -errorNumbers.EOPNOTSUPP
  const view = slot.requestView
  const { device } = node
  const at = wideNumber(view, requestHeader + 8)
  const length = wideNumber(view, requestHeader + 16)
  const mode = view.getUint32(requestHeader + 24, true)
  if (device.readOnly) return -errorNumbers.EROFS
  if (at + length > device.sizeBytes) return -errorNumbers.EFBIG
  switch (mode & ~keepSize) {
    case 0:
      return 0
    case punchHole:
      return done(device.discard(at, length), 0)
    case zeroRange:
      return done(device.zero(at, length), 0)
    default:
      return -errorNumbers.EOPNOTSUPP
  }
}

/** Where from a position on a device has its next bytes, or its next hole; the end counts as one. */
async function seek(slot: Slot, node: FuseNode): Promise<number> {
  if (node.kind !== 'device') return -errorNumbers.EINVAL
  const { device } = node
  const position = wideNumber(slot.requestView, requestHeader + 8)
  const what = slot.requestView.getUint32(requestHeader + 16, true)
  if (what !== seekData && what !== seekHole) return -errorNumbers.EINVAL
  if (position >= device.sizeBytes) return -errorNumbers.ENXIO
  let at = position - (position % device.blockSize)
  let isFound = false
  // The size may change between two turns.
  while (!isFound && at < device.sizeBytes) {
    device.map(at, Math.min(turnBytes, device.sizeBytes - at), (length, allocated) => {
      isFound ||= allocated === (what === seekData)
      if (!isFound) at += length
      return !isFound
    })
    if (!isFound) await new Promise((resolve) => setImmediate(resolve))
  }
  if (!isFound && what === seekData) return -errorNumbers.ENXIO
  setWide(slot.answerView, answerHeader, Math.max(position, Math.min(at, device.sizeBytes)))
  return 8
}

/** The low 32 bits of a 64-bit number of our own making, which never needs more. */
const lowWord = (view: DataView, at: number): number => view.getUint32(at, true)

/** A 64-bit number of the kernel's; beyond 2^53 it is imprecise, and beyond every device. */
const wideNumber = (view: DataView, at: number): number =>
  view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32

function setWide(view: DataView, at: number, value: number): void {
  view.setUint32(at, value, true)
  view.setUint32(at + 4, Math.floor(value / 2 ** 32), true)
}
