/**
 * The operating system, through koffi: memory maps, userfaultfd, the wake-up of another thread, processors.
 *
 * Invariants: every failing call becomes an error that names the call and the error number's name; no state but the
 * loaded functions; a descriptor opened here is close-on-exec and belongs to the caller.
 *
 * Source: mmap(2), madvise(2), userfaultfd(2), ioctl_userfaultfd(2), Linux's include/uapi/linux/userfaultfd.h (numbers
 * and layouts), eventfd(2), sched_setaffinity(2), pthread_key_create(3).
 */
import { TmemError } from '@tmem/core'

/** Requests to a userfaultfd: the same on all of Linux's architectures whose ioctl numbers are the generic ones. */
const request = {
  new: 0xaa00,
  api: 0xc018aa3f,
  register: 0xc020aa00,
  unregister: 0x8010aa01,
  wake: 0x8010aa02,
  copy: 0xc028aa03,
  writeprotect: 0xc018aa06,
} as const

const errorNumbers = {
  ENOENT: 2,
  ESRCH: 3,
  EINTR: 4,
  EAGAIN: 11,
  EEXIST: 17,
} as const

const protReadWrite = 3
const mapPrivate = 2
const mapAnonymous = 0x20
const mapNoReserve = 0x4000
const adviceDontNeed = 4
const adviceDontFork = 10
const adviceNoHugePage = 15
const closeOnExec = 0o2000000
const nonBlocking = 0o4000
const readWrite = 2
const pageSizeName = 30
const cpuMaskBytes = 1024
const pollIn = 1

/** Bytes of one message of a userfaultfd, and what is read of it. */
const messageBytes = 32
const pageFaultEvent = 0x12
/** Flags of a page fault: the thread wanted to write; the page is there and write-protected. */
export const faultWrite = 1
export const faultWriteProtected = 2
/** Messages that are read at once. */
export const messageBatch = 16

/** The number of the system call userfaultfd(2) where that is known. */
const userfaultfdCall: Readonly<Record<string, number>> = { x64: 323, arm64: 282 }

type Koffi = typeof import('koffi')
type Call = (...args: readonly (number | bigint | Uint8Array | string)[]) => number

/** Memory outside of JavaScript's heap, with its address. */
export interface Mapping {
  readonly address: number
  readonly buffer: ArrayBuffer
}

/** What the rest of the package needs of Linux. One per thread. */
export class System {
  /** Bytes of a page of this machine's memory. */
  readonly pageSize: number
  readonly #koffi: Koffi
  readonly #calls: Readonly<Record<string, Call>>
  readonly #symbol: (name: string) => number
  /** Arguments of ioctl, pollfd records, messages: written here, because the kernel wants an address. */
  readonly #scratch: Mapping
  readonly #words: Uint32Array
  readonly #shorts: Uint16Array

  private constructor(koffi: Koffi) {
    this.#koffi = koffi
    const libc = koffi.load(null)
    const define = (prototype: string): Call => libc.func(prototype) as unknown as Call
    this.#calls = {
      mmap: define('uintptr_t mmap(uintptr_t address, size_t length, int prot, int flags, int fd, int64_t offset)'),
      munmap: define('int munmap(uintptr_t address, size_t length)'),
      madvise: define('int madvise(uintptr_t address, size_t length, int advice)'),
      ioctl: define('int ioctl(int fd, unsigned long request, uintptr_t argument)'),
      open: define('int open(const char *path, int flags)'),
      close: define('int close(int fd)'),
      read: define('int64_t read(int fd, uintptr_t into, size_t length)'),
      write: define('int64_t write(int fd, uintptr_t from, size_t length)'),
      poll: define('int poll(uintptr_t records, unsigned long count, int timeout)'),
      syscall: define('long syscall(long number, long argument)'),
      sysconf: define('long sysconf(int name)'),
      eventfd: define('int eventfd(unsigned int value, int flags)'),
      getAffinity: define('int sched_getaffinity(int thread, size_t length, _Out_ uint8_t *mask)'),
      setAffinity: define('int sched_setaffinity(int thread, size_t length, const uint8_t *mask)'),
      keyCreate: define('int pthread_key_create(uintptr_t key, uintptr_t destructor)'),
      keyDelete: define('int pthread_key_delete(unsigned int key)'),
      setSpecific: define('int pthread_setspecific(unsigned int key, uintptr_t value)'),
      exit: define('void _exit(int status)'),
    }
    this.#symbol = (name) => Number(koffi.address(libc.symbol(name)))
    this.pageSize = this.#calls['sysconf']!(pageSizeName)
    this.#scratch = this.map(this.pageSize)
    this.#words = new Uint32Array(this.#scratch.buffer)
    this.#shorts = new Uint16Array(this.#scratch.buffer)
  }

  /** Loads what is needed. Throws `TmemError` (`TMEM_UNSUPPORTED`) that says why this machine cannot do it. */
  static async load(): Promise<System> {
    const { platform, arch } = process
    if (platform !== 'linux') throw unsupported(`it needs Linux's userfaultfd, and this is ${platform}`)
    if (!Object.hasOwn(userfaultfdCall, arch)) throw unsupported(`it is made for x64 and arm64, and this is ${arch}`)
    let koffi: Koffi
    try {
      const module = (await import('koffi')) as Koffi & { default?: Koffi }
      koffi = module.default ?? module
    } catch (error) {
      throw unsupported(
        `koffi, through which it calls the system, cannot be loaded on ${platform}-${arch}: ` +
          `${error instanceof Error ? error.message.split('\n')[0] : String(error)}; ` +
          'install it with its optional dependencies (npm install koffi, without --omit=optional)',
        error,
      )
    }
    return new System(koffi)
  }

  /** Private zeroed memory, of which the system gives what is touched. `length` is a multiple of the page size. */
  map(length: number): Mapping {
    const flags = mapPrivate | mapAnonymous | mapNoReserve
    const address = this.#calls['mmap']!(0, length, protReadWrite, flags, -1, 0)
    // MAP_FAILED is all ones.
    if (address >= 2 ** 53)
      throw new TmemError('TMEM_NO_MEMORY', `userfault: no address space for ${length} bytes: ${this.#error()}`, {
        layer: 'userfault',
      })
    return { address, buffer: this.view(address, length) }
  }

  unmap(address: number, length: number): void {
    this.#checked('munmap', this.#calls['munmap']!(address, length))
  }

  /** Memory at an address. The caller sees to it that it is there for as long as the buffer is used. */
  view(address: number, length: number): ArrayBuffer {
    return this.#koffi.view(BigInt(address), length)
  }

  /** Gives pages back to the system: their next touch is a page fault, or zeros where faults are not watched. */
  drop(address: number, length: number): void {
    this.#checked('madvise(MADV_DONTNEED)', this.#calls['madvise']!(address, length, adviceDontNeed))
  }

  /**
   * Keeps the pages out of child processes (after a fork both would share them, and neither could be moved) and
   * out of huge pages (which would be filled without a fault).
   */
  keepPlain(address: number, length: number): void {
    this.#checked('madvise(MADV_DONTFORK)', this.#calls['madvise']!(address, length, adviceDontFork))
    const plain = this.#calls['madvise']!(address, length, adviceNoHugePage)
    // A kernel without huge pages does not know the advice (EINVAL).
    if (plain !== 0 && this.#koffi.errno() !== 22) this.#checked('madvise(MADV_NOHUGEPAGE)', plain)
  }

  /**
   * Opens a userfaultfd that also sees the faults of system calls, and agrees on write protection. Non-blocking: a
   * descriptor that blocks answers no poll. Throws `TMEM_UNSUPPORTED` with what is missing.
   */
  openUserfaultfd(): number {
    const fd = this.#newUserfaultfd()
    const words = this.#words
    // struct uffdio_api: the protocol, features wanted (bit 0: write-protect faults), ioctls.
    words.fill(0, 0, 6)
    words[0] = 0xaa
    words[2] = 1
    if (this.#calls['ioctl']!(fd, request.api, this.#scratch.address) !== 0) {
      const reason = this.#error()
      this.close(fd)
      throw unsupported(
        `this kernel's userfaultfd cannot write-protect pages (UFFDIO_API: ${reason}); Linux 5.7 or newer, built ` +
          'with CONFIG_HAVE_ARCH_USERFAULTFD_WP, can',
      )
    }
    return fd
  }

  #newUserfaultfd(): number {
    const device = this.#calls['open']!('/dev/userfaultfd', readWrite | closeOnExec)
    let deviceReason = ''
    if (device >= 0) {
      const fd = this.#calls['ioctl']!(device, request.new, closeOnExec | nonBlocking)
      deviceReason = fd < 0 ? this.#error() : ''
      this.close(device)
      if (fd >= 0) return fd
    } else deviceReason = this.#error()
    const fd = this.#calls['syscall']!(userfaultfdCall[process.arch]!, closeOnExec | nonBlocking)
    if (fd >= 0) return fd
    throw unsupported(
      `this process may not handle page faults (/dev/userfaultfd: ${deviceReason}; userfaultfd(2): ${this.#error()}). ` +
        'Give it access to /dev/userfaultfd (Linux 6.1 or newer, e.g. chgrp and chmod g+rw, in a container also ' +
        '--device /dev/userfaultfd), or run sysctl vm.unprivileged_userfaultfd=1 as root, or give it the capability ' +
        'CAP_SYS_PTRACE; ENOSYS and ENOENT mean a kernel built without CONFIG_USERFAULTFD',
    )
  }

  /** Has faults of absent and of write-protected pages reported. */
  register(fd: number, address: number, length: number): void {
    this.#range(address, length)
    this.#set(2, 3)
    this.#set(3, 0)
    const result = this.#calls['ioctl']!(fd, request.register, this.#scratch.address)
    // The kernel answers which requests work on the range: bit 6 is write protection.
    if (result !== 0 || ((this.#words[6] ?? 0) & (1 << 6)) === 0)
      throw unsupported(
        `userfaultfd cannot watch this memory (UFFDIO_REGISTER: ${result === 0 ? 'no write protection' : this.#error()})`,
      )
  }

  /** Ends the watch: protection is lifted, all who wait go on, and absent pages are zeros from now on. */
  unregister(fd: number, address: number, length: number): void {
    this.#range(address, length)
    this.#checked('UFFDIO_UNREGISTER', this.#calls['ioctl']!(fd, request.unregister, this.#scratch.address))
  }

  /** Lets the threads that wait for a page look again. */
  wake(fd: number, address: number): void {
    this.#range(address, this.pageSize)
    this.#checked('UFFDIO_WAKE', this.#calls['ioctl']!(fd, request.wake, this.#scratch.address))
  }

  /**
   * Fills an absent page and wakes who waits for it. False: it was there already (another thread's fault was answered
   * first; nothing was changed, and nobody was woken).
   */
  fill(fd: number, address: number, source: number, writeProtected: boolean): boolean {
    for (;;) {
      this.#set(0, address)
      this.#set(1, source)
      this.#set(2, this.pageSize)
      this.#set(3, writeProtected ? 2 : 0)
      this.#set(4, 0)
      if (this.#calls['ioctl']!(fd, request.copy, this.#scratch.address) === 0) return true
      const error = this.#koffi.errno()
      if (error === errorNumbers.EEXIST) return false
      // The address space is being changed by another thread (mmap, fork): for a moment.
      if (error !== errorNumbers.EAGAIN) throw this.#failure('UFFDIO_COPY')
    }
  }

  /** Write-protects a page that is there, or lifts that and wakes who waits. */
  protect(fd: number, address: number, on: boolean): void {
    for (;;) {
      this.#range(address, this.pageSize)
      this.#set(2, on ? 1 : 0)
      if (this.#calls['ioctl']!(fd, request.writeprotect, this.#scratch.address) === 0) return
      if (this.#koffi.errno() !== errorNumbers.EAGAIN) throw this.#failure('UFFDIO_WRITEPROTECT')
    }
  }

  /**
   * Waits until one of two descriptors can be read. `milliseconds`: -1 is for ever. Answers 0: none (time is up); bit
   * 0: the first; bit 1: the second.
   */
  wait(first: number, second: number, milliseconds: number): number {
    const at = pollAt / 4
    this.#words[at] = first
    this.#words[at + 1] = pollIn
    this.#words[at + 2] = second
    this.#words[at + 3] = pollIn
    const ready = this.#calls['poll']!(this.#scratch.address + pollAt, 2, milliseconds)
    if (ready < 0) {
      if (this.#koffi.errno() === errorNumbers.EINTR) return 0
      throw this.#failure('poll')
    }
    if (ready === 0) return 0
    return (this.#shorts[pollAt / 2 + 3] === 0 ? 0 : 1) | (this.#shorts[pollAt / 2 + 7] === 0 ? 0 : 2)
  }

  /** Reads messages that are there; the number of them. See `messageAddress` and `messageFlags`. */
  readMessages(fd: number): number {
    const bytes = this.#calls['read']!(fd, this.#scratch.address + messagesAt, messageBatch * messageBytes)
    if (bytes >= 0) return bytes / messageBytes
    const error = this.#koffi.errno()
    if (error === errorNumbers.EAGAIN || error === errorNumbers.EINTR) return 0
    throw this.#failure('read of the userfaultfd')
  }

  /** Where the n-th message's fault was. Throws for a message that is not a page fault: none was asked for. */
  messageAddress(n: number): number {
    const at = (messagesAt + n * messageBytes) / 4
    if ((this.#words[at]! & 0xff) !== pageFaultEvent)
      throw new TmemError('TMEM_BROKEN', `userfaultfd sent an event ${this.#words[at]! & 0xff} that was not asked for`)
    return this.#words[at + 4]! + this.#words[at + 5]! * 2 ** 32
  }

  messageFlags(n: number): number {
    return this.#words[(messagesAt + n * messageBytes) / 4 + 2]!
  }

  /** A descriptor through which one thread wakes another out of `wait`. */
  openBell(): number {
    return this.#checked('eventfd', this.#calls['eventfd']!(0, closeOnExec | nonBlocking))
  }

  ring(bell: number): void {
    this.#words[bellAt / 4] = 1
    this.#words[bellAt / 4 + 1] = 0
    this.#checked('write to an eventfd', this.#calls['write']!(bell, this.#scratch.address + bellAt, 8))
  }

  silence(bell: number): void {
    const bytes = this.#calls['read']!(bell, this.#scratch.address + bellAt, 8)
    if (bytes < 0 && this.#koffi.errno() !== errorNumbers.EAGAIN) throw this.#failure('read of an eventfd')
  }

  close(fd: number): void {
    this.#checked('close', this.#calls['close']!(fd))
  }

  /** Processors on which the calling thread may run, as the kernel's bit mask. */
  affinity(): Uint8Array {
    const mask = new Uint8Array(cpuMaskBytes)
    this.#checked('sched_getaffinity', this.#calls['getAffinity']!(0, mask.length, mask))
    return mask
  }

  setAffinity(mask: Uint8Array): void {
    this.#checked('sched_setaffinity', this.#calls['setAffinity']!(0, mask.length, mask))
  }

  /** Keeps the calling thread on one processor. */
  pin(cpu: number): void {
    const mask = new Uint8Array(cpuMaskBytes)
    mask[cpu >> 3] = 1 << (cpu & 7)
    if (this.#calls['setAffinity']!(0, mask.length, mask) !== 0)
      throw unsupported(`this process may not run on processor ${cpu} (sched_setaffinity: ${this.#error()})`)
  }

  /**
   * Sees to it that the process does not outlive the calling thread. When the thread ends, however it does (also when
   * the runtime stops it in the middle of JavaScript), the system's own thread-specific destructors run: `perror` with
   * `message`, then `_exit` with `status`, then `close` of `fd`. No JavaScript is needed for it.
   */
  guard(message: string, status: number, fd: number): Guard {
    const text = new TextEncoder().encode(message)
    const place = this.map(this.pageSize)
    new Uint8Array(place.buffer).set(text.subarray(0, this.pageSize - 1))
    // glibc gives out the lowest free key and runs destructors by ascending key: in the order in which they are made.
    const key = (destructor: string, value: number): number => {
      const failed = this.#calls['keyCreate']!(this.#scratch.address + bellAt, this.#symbol(destructor))
      if (failed !== 0) throw new TmemError('TMEM_NO_MEMORY', `userfault: pthread_key_create answered ${failed}`)
      const made = this.#words[bellAt / 4]!
      this.#calls['setSpecific']!(made, value)
      return made
    }
    const fatal = [key('perror', place.address), key('_exit', status)]
    const closing = key('close', fd)
    return {
      // The keys stay until `release`: deleting one while the thread ends would race with its destructor.
      disarm: () => {
        for (const one of fatal) this.#calls['setSpecific']!(one, 0)
      },
      release: () => {
        for (const one of [...fatal, closing]) this.#calls['keyDelete']!(one)
        this.unmap(place.address, this.pageSize)
      },
    }
  }

  /** Ends the process at once, without running anything else in it. */
  endProcess(status: number): never {
    this.#calls['exit']!(status)
    throw new Error('_exit returned')
  }

  /** Writes a 64-bit argument below 2^53. */
  #set(position: number, value: number): void {
    this.#words[position * 2] = value
    this.#words[position * 2 + 1] = value / 2 ** 32
  }

  #range(address: number, length: number): void {
    this.#set(0, address)
    this.#set(1, length)
  }

  #checked(what: string, result: number): number {
    if (result < 0) throw this.#failure(what)
    return result
  }

  /** Name of the calling thread's last error. */
  #error(): string {
    const number = this.#koffi.errno()
    const known = Object.entries(this.#koffi.os.errno).find(([, value]) => value === number)
    return known?.[0] ?? `error ${number}`
  }

  #failure(what: string): TmemError {
    return new TmemError('TMEM_IO', `userfault: ${what} failed: ${this.#error()}`, { layer: 'userfault' })
  }
}

/** Ends the process with the thread, until told otherwise. For the thread that made it. */
export interface Guard {
  /** The thread may end; the descriptor is still closed then. */
  disarm(): void
  /** Nothing happens any more when the thread ends. */
  release(): void
}

/** Places in the scratch page. */
const pollAt = 128
const bellAt = 192
const messagesAt = 1024

const unsupported = (why: string, cause?: unknown): TmemError =>
  new TmemError('TMEM_UNSUPPORTED', `userfault cannot work here: ${why}`, { layer: 'userfault', cause })
