/**
 * The files of this machine with change times of a clock that the test moves by hand, in ticks as coarse as a kernel's,
 * and with faults on demand. Two changes in one tick have the same time, as in real life, but every time that the test
 * runs.
 */
import {
  closeSync,
  constants,
  fstatSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  rmSync,
  unlinkSync,
  writeSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll } from 'vitest'
import { type FileIo, nodeFileIo } from '../src/index.ts'

const tickMs = 10
const ext4 = 0xef53

/** A system error. */
export const systemError = (code: string, call: string): Error =>
  Object.assign(new Error(`${code}: injected, ${call}`), { code, syscall: call })

export class TimedIo implements FileIo {
  /** Milliseconds; not a whole second. */
  nowMs = 1_700_000_000_007
  /** What the file system is said to be. */
  type: number = ext4
  blockSize = 4096
  /** So many of the next reads fail (EIO), of the next writes and truncations (ENOSPC), before they do anything. */
  failReads = 0
  failWrites = 0
  failTruncates = 0
  /** Transfers are cut to so many bytes. */
  largest: number = Number.POSITIVE_INFINITY
  /** Called before each read, with the descriptor's file still as it is; may wait. */
  beforeRead: (() => void | Promise<void>) | undefined
  reads = 0
  writes = 0
  readonly #changed = new Map<bigint, bigint>()
  readonly #base: FileIo

  /** @param base the files themselves */
  constructor(base: FileIo = nodeFileIo) {
    this.#base = base
  }

  /** The clock that the page cache is given. */
  readonly now = (): number => this.nowMs

  /** Somebody changed the file behind this descriptor now. */
  touched(descriptor: number): void {
    const tick = Math.floor(this.nowMs / tickMs) * tickMs
    this.#changed.set(fstatSync(descriptor, { bigint: true }).ino, BigInt(tick) * 1_000_000n + 1n)
  }

  /** Does something to a file as another process would. */
  foreign(path: string, flags: number, work: (descriptor: number) => void): void {
    const descriptor = openSync(path, flags, 0o600)
    try {
      work(descriptor)
      this.touched(descriptor)
    } finally {
      closeSync(descriptor)
    }
  }

  foreignWrite(path: string, bytes: Uint8Array, position: number): void {
    this.foreign(path, constants.O_WRONLY | constants.O_CREAT, (fd) => {
      if (bytes.length > 0) writeSync(fd, bytes, 0, bytes.length, position)
    })
  }

  foreignTruncate(path: string, length: number): void {
    this.foreign(path, constants.O_WRONLY, (fd) => ftruncateSync(fd, length))
  }

  /** Another file under the same name; the inode number may be the same. */
  foreignReplace(path: string, bytes: Uint8Array): void {
    unlinkSync(path)
    this.foreignWrite(path, bytes, 0)
  }

  async open(path: string, flags: number, mode: number): Promise<number> {
    const descriptor = await this.#base.open(path, flags, mode)
    if (!this.#changed.has(fstatSync(descriptor, { bigint: true }).ino)) this.touched(descriptor)
    return descriptor
  }

  close(descriptor: number): Promise<void> {
    return this.#base.close(descriptor)
  }

  stat(descriptor: number): ReturnType<FileIo['stat']> {
    const stats = this.#base.stat(descriptor)
    const changed = this.#changed.get(stats.ino)
    if (changed !== undefined) Object.assign(stats, { ctimeNs: changed, mtimeNs: changed })
    return stats
  }

  plainStat(descriptor: number): ReturnType<FileIo['plainStat']> {
    return this.#base.plainStat(descriptor)
  }

  async kind(): Promise<{ type: number; blockSize: number }> {
    return { type: this.type, blockSize: this.blockSize }
  }

  async read(
    descriptor: number,
    into: Uint8Array,
    at: number,
    length: number,
    position: number | null,
  ): Promise<number> {
    await this.#beforeRead('read')
    return this.#base.read(descriptor, into, at, Math.min(length, this.largest), position)
  }

  async readv(descriptor: number, into: readonly Uint8Array[], position: number): Promise<number> {
    await this.#beforeRead('readv')
    if (this.largest === Number.POSITIVE_INFINITY) return this.#base.readv(descriptor, into, position)
    return this.#base.read(descriptor, into[0]!, 0, Math.min(into[0]!.length, this.largest), position)
  }

  async write(
    descriptor: number,
    from: Uint8Array,
    at: number,
    length: number,
    position: number | null,
  ): Promise<number> {
    this.writes++
    if (this.failWrites > 0) {
      this.failWrites--
      throw systemError('ENOSPC', 'write')
    }
    const bytes = await this.#base.write(descriptor, from, at, Math.min(length, this.largest), position)
    this.touched(descriptor)
    return bytes
  }

  async writev(descriptor: number, from: readonly Uint8Array[], position: number | null): Promise<number> {
    const bytes = Buffer.concat(from)
    return this.write(descriptor, bytes, 0, bytes.length, position)
  }

  async chmod(...args: Parameters<FileIo['chmod']>): Promise<void> {
    await this.#base.chmod(...args)
    this.touched(args[0])
  }

  async chown(...args: Parameters<FileIo['chown']>): Promise<void> {
    await this.#base.chown(...args)
    this.touched(args[0])
  }

  async utimes(...args: Parameters<FileIo['utimes']>): Promise<void> {
    await this.#base.utimes(...args)
    this.touched(args[0])
  }

  async truncate(descriptor: number, length: number): Promise<void> {
    if (this.failTruncates > 0) {
      this.failTruncates--
      throw systemError('ENOSPC', 'ftruncate')
    }
    await this.#base.truncate(descriptor, length)
    this.touched(descriptor)
  }

  // What is behind the system's cache is not what is tested here.
  async sync(): Promise<void> {}
  async datasync(): Promise<void> {}

  async #beforeRead(call: string): Promise<void> {
    this.reads++
    await this.beforeRead?.()
    if (this.failReads > 0) {
      this.failReads--
      throw systemError('EIO', call)
    }
  }
}

/** A folder that is removed after the tests. */
export function testFolder(): (name: string) => string {
  const folder = mkdtempSync(join(tmpdir(), 'page-cache-'))
  afterAll(() => rmSync(folder, { recursive: true }))
  return (name) => join(folder, name)
}
