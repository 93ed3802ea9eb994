/**
 * The operating system, through koffi: mount, the descriptor of /dev/fuse without exceptions, waiting for it, process
 * flags.
 *
 * Reads and writes of the descriptor answer the negative error number instead of throwing: on the way of every request
 * an exception would cost more than the request.
 *
 * Source: mount(2), umount(2), flock(2), poll(2), eventfd(2), prctl(2).
 */
import { closeSync } from 'node:fs'
import { TmemError } from '@tmem/core'

type Koffi = typeof import('koffi')
type Call = (...args: readonly (number | Uint8Array | string | null)[]) => number

export const errorNumbers = {
  EPERM: 1,
  ENOENT: 2,
  EINTR: 4,
  EIO: 5,
  ENXIO: 6,
  EBADF: 9,
  EAGAIN: 11,
  ENOMEM: 12,
  EACCES: 13,
  EBUSY: 16,
  ENODEV: 19,
  ENOTDIR: 20,
  EISDIR: 21,
  EINVAL: 22,
  EFBIG: 27,
  ENOSPC: 28,
  EROFS: 30,
  ENOSYS: 38,
  EOPNOTSUPP: 95,
  ENOTCONN: 107,
} as const

const pollIn = 1
/** umount2. */
const noFollow = 8
/** flock. */
const exclusively = 2
const atOnce = 4
const setIoFlusherOption = 57
const closeOnExec = 0o2000000

/** The loaded functions, for one descriptor. */
export class System {
  readonly #koffi: Koffi
  readonly #mount: Call
  readonly #umount: Call
  readonly #flock: Call
  readonly #read: Call
  readonly #write: Call
  readonly #prctl: Call
  /** An eventfd that ends a wait. */
  readonly #alarm: number
  /** What poll is told and answers. Kept here, because another thread writes to it while nothing else refers to it. */
  readonly #record: DataView = new DataView(new ArrayBuffer(16))
  readonly #recordBytes: Uint8Array = new Uint8Array(this.#record.buffer)
  readonly #poll: { async: (...args: unknown[]) => void }

  private constructor(koffi: Koffi) {
    const libc = koffi.load(null)
    this.#koffi = koffi
    this.#mount = libc.func('int mount(const char *, const char *, const char *, unsigned long, const char *)') as Call
    this.#umount = libc.func('int umount2(const char *, int)') as Call
    this.#flock = libc.func('int flock(int, int)') as Call
    this.#read = libc.func('int64_t read(int, void *, size_t)') as Call
    this.#write = libc.func('int64_t write(int, void *, size_t)') as Call
    this.#prctl = libc.func('int prctl(int, unsigned long, unsigned long, unsigned long, unsigned long)') as Call
    const eventfd = libc.func('int eventfd(unsigned int, int)') as Call
    this.#alarm = eventfd(0, closeOnExec)
    if (this.#alarm < 0) throw this.#failure('cannot make an eventfd')
    this.#poll = libc.func('int poll(void *, unsigned long, int)') as unknown as { async: (...args: unknown[]) => void }
  }

  /** Loads the functions. Rejects with `TmemError` (`TMEM_UNSUPPORTED`) where they are not to be had. */
  static async load(): Promise<System> {
    if (process.platform !== 'linux')
      throw new TmemError('TMEM_UNSUPPORTED', `FUSE as it is spoken here is Linux's, and this is ${process.platform}`)
    let koffi: Koffi
    try {
      const module = (await import('koffi')) as Koffi & { default?: Koffi }
      koffi = module.default ?? module
    } catch (error) {
      throw new TmemError(
        'TMEM_UNSUPPORTED',
        `koffi, through which it calls the system, cannot be loaded on linux-${process.arch}: install it with its optional dependencies`,
        { cause: error },
      )
    }
    return new System(koffi)
  }

  /** Mounts on a directory, which messages call `name`. Throws `TmemError` (`TMEM_IO`) with what failed and why. */
  mount(descriptor: number, point: string, name: string): void {
    const owner = `user_id=${process.getuid!()},group_id=${process.getgid!()}`
    const options = `fd=${descriptor},rootmode=40000,${owner}`
    // nosuid, nodev, noexec: 2, 4, 8.
    if (this.#mount('tmem', point, 'fuse.tmem', 14, options) < 0) throw this.#failure(`cannot mount on ${name}`)
  }

  /** Takes a mount away. Throws `TmemError` (`TMEM_IO`, cause `EBUSY`) while something of it is in use. */
  unmount(point: string): void {
    if (this.#umount(point, noFollow) < 0) throw this.#failure(`cannot unmount ${point}`)
  }

  /** Takes a mount away, where nothing of it is in use. */
  unmountIfUnused(point: string): void {
    this.#umount(point, noFollow)
  }

  /** Locks an open file or directory for this descriptor, as long as that is open. False: another one has it locked. */
  lock(descriptor: number): boolean {
    if (this.#flock(descriptor, exclusively | atOnce) === 0) return true
    if (this.#koffi.errno() === errorNumbers.EAGAIN) return false
    throw this.#failure('cannot lock the directory')
  }

  /** Bytes read, or the negative error number. */
  read(descriptor: number, into: Uint8Array): number {
    const bytes = this.#read(descriptor, into, into.length)
    return bytes < 0 ? -this.#koffi.errno() : bytes
  }

  /** Bytes written, or the negative error number. */
  write(descriptor: number, bytes: Uint8Array, length: number): number {
    const written = this.#write(descriptor, bytes, length)
    return written < 0 ? -this.#koffi.errno() : written
  }

  /**
   * Calls `then` when the descriptor has something to read, or has ended, or after `endWait`. Takes one of the
   * runtime's threads until then. One call at a time.
   */
  whenReadable(descriptor: number, then: () => void): void {
    for (const [n, file] of [descriptor, this.#alarm].entries()) {
      this.#record.setInt32(8 * n, file, true)
      this.#record.setInt16(8 * n + 4, pollIn, true)
    }
    this.#poll.async(this.#recordBytes, 2, -1, (error: Error | null) => {
      if (error !== null) throw error
      then()
    })
  }

  /** Ends a wait for good: the runtime waits for its threads before the process ends. */
  endWait(): void {
    this.#write(this.#alarm, new Uint8Array([1, 0, 0, 0, 0, 0, 0, 0]), 8)
  }

  /** Gives back what it holds; nothing may wait. */
  close(): void {
    closeSync(this.#alarm)
  }

  /**
   * Tells the kernel that this process serves a device that memory is written to: so that its own allocations do not
   * wait for that device (PR_SET_IO_FLUSHER). False where that is not allowed (CAP_SYS_RESOURCE) or not known.
   */
  setIoFlusher(): boolean {
    return this.#prctl(setIoFlusherOption, 1, 0, 0, 0) === 0
  }

  #failure(what: string): TmemError {
    const number = this.#koffi.errno()
    const name = Object.entries(errorNumbers).find(([, value]) => value === number)?.[0] ?? `error ${number}`
    return new TmemError('TMEM_IO', `${what}: ${name}`, {
      layer: 'fuse',
      cause: Object.assign(new Error(name), { code: name, errno: number }),
    })
  }
}
