/**
 * Two ways to a device of a server: a client of NBD, and the file of its mount.
 *
 * The client of NBD knows what is wanted here: EXPORT_NAME, simple replies, any number of requests under way. It is
 * written from the protocol's document (doc/proto.md of NetworkBlockDevice/nbd) and shares nothing with the server's
 * side, so that a mistake in one is not one in the other. The file is opened for direct I/O: the kernel keeps what it
 * has read otherwise, and what a client of NBD writes does not reach that.
 */
import { constants } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { connect, type Socket } from 'node:net'

/** The connection has ended, or its server. */
export class Gone extends Error {}

/** The server says that it could not do it. */
export class Refused extends Error {
  /** Of the protocol, as Linux numbers errors. */
  readonly errno: number

  constructor(what: string, errno: number) {
    super(`${what} is answered with error ${errno}`)
    this.errno = errno
  }
}

/** Positions and lengths are bytes, whole sectors. All reject with `Gone` or `Refused`. */
export interface Way {
  readonly kind: 'NBD' | 'file'
  read(at: number, length: number): Promise<Uint8Array>
  /** @param lasts it shall survive the server when it is acknowledged (FUA) */
  write(at: number, bytes: Uint8Array, lasts: boolean): Promise<void>
  /** `undefined`: there is no such request on this way. */
  trim?(at: number, length: number): Promise<void>
  zero?(at: number, length: number): Promise<void>
  flush(): Promise<void>
  /** Ends as it should. */
  close(): Promise<void>
  /** Goes without a word, in the middle of whatever is under way. */
  vanish?(): void
}

const Command = { READ: 0, WRITE: 1, DISC: 2, FLUSH: 3, TRIM: 4, WRITE_ZEROES: 6 } as const
const FUA = 1
const ESHUTDOWN = 108
/** Greeting, and what EXPORT_NAME answers without padding: size and flags. */
const greetingBytes = 18
const exportBytes = 10
const replyBytes = 16

interface Pending {
  readonly what: string
  readonly into: Buffer | undefined
  readonly resolve: (bytes: Buffer) => void
  readonly reject: (error: Error) => void
}

const nothing = Buffer.alloc(0)

/** A client of NBD on a unix socket. */
export class NbdWay implements Way {
  readonly kind = 'NBD'
  readonly #socket: Socket
  readonly #pending = new Map<bigint, Pending>()
  #cookie = 0n
  #received: Buffer[] = []
  #bytes = 0
  /** The reply whose data is being received. */
  #replied: { readonly pending: Pending; at: number } | undefined
  #hello: ((size: Buffer) => void) | undefined
  #gone: Error | undefined

  private constructor(socket: Socket) {
    this.#socket = socket
    socket.on('data', (bytes: Buffer) => {
      this.#received.push(bytes)
      this.#bytes += bytes.length
      this.#parse()
    })
    // `close` follows.
    socket.on('error', (error) => this.#end(error))
    socket.on('close', () => this.#end(new Error('closed')))
  }

  /** Opens an export. Rejects with `Gone` where that is not to be had. */
  static async open(path: string, name: string): Promise<NbdWay> {
    const socket = connect(path)
    const way = new NbdWay(socket)
    const data = Buffer.from(name)
    const head = Buffer.alloc(4 + 16)
    head.writeUInt32BE(3, 0)
    head.write('IHAVEOPT', 4, 'latin1')
    head.writeUInt32BE(1, 12)
    head.writeUInt32BE(data.length, 16)
    socket.write(Buffer.concat([head, data]))
    await new Promise<void>((resolve, reject) => {
      way.#hello = () => resolve()
      if (way.#gone !== undefined) reject(way.#gone)
      else socket.once('close', () => reject(way.#gone ?? new Gone('closed')))
    })
    return way
  }

  async read(at: number, length: number): Promise<Uint8Array> {
    return this.#request(Command.READ, at, length, { into: Buffer.alloc(length) })
  }

  async write(at: number, bytes: Uint8Array, lasts: boolean): Promise<void> {
    await this.#request(Command.WRITE, at, bytes.length, { payload: bytes, flags: lasts ? FUA : 0 })
  }

  async trim(at: number, length: number): Promise<void> {
    await this.#request(Command.TRIM, at, length)
  }

  async zero(at: number, length: number): Promise<void> {
    await this.#request(Command.WRITE_ZEROES, at, length)
  }

  async flush(): Promise<void> {
    await this.#request(Command.FLUSH, 0, 0)
  }

  async close(): Promise<void> {
    if (this.#gone !== undefined) return
    const closed = new Promise((resolve) => this.#socket.once('close', resolve))
    this.#socket.write(requestOf(Command.DISC, 0, 0, 0n, 0))
    await closed
  }

  vanish(): void {
    this.#socket.destroy()
  }

  #request(
    type: number,
    at: number,
    length: number,
    { into, payload = nothing, flags = 0 }: { into?: Buffer; payload?: Uint8Array; flags?: number } = {},
  ): Promise<Buffer> {
    if (this.#gone !== undefined) return Promise.reject(this.#gone)
    const cookie = ++this.#cookie
    const what = `request ${type} of ${length} bytes at ${at}`
    return new Promise((resolve, reject) => {
      this.#pending.set(cookie, { what, into, resolve, reject })
      this.#socket.write(requestOf(type, at, length, cookie, flags))
      if (payload.length > 0) this.#socket.write(payload)
    })
  }

  #parse(): void {
    for (;;) {
      const replied = this.#replied
      if (replied !== undefined) {
        const into = replied.pending.into!
        while (replied.at < into.length && this.#received.length > 0) {
          const part = this.#received[0]!
          const count = part.copy(into, replied.at)
          replied.at += count
          this.#bytes -= count
          if (count === part.length) this.#received.shift()
          else this.#received[0] = part.subarray(count)
        }
        if (replied.at < into.length) return
        this.#replied = undefined
        replied.pending.resolve(into)
        continue
      }
      const wanted = this.#hello === undefined ? replyBytes : greetingBytes + exportBytes
      if (this.#bytes < wanted) return
      const all = Buffer.concat(this.#received)
      const head = all.subarray(0, wanted)
      this.#received = all.length === wanted ? [] : [all.subarray(wanted)]
      this.#bytes -= wanted
      if (this.#hello !== undefined) {
        this.#hello(head)
        this.#hello = undefined
      } else if (!this.#reply(head)) return
    }
  }

  /** False: it is none. */
  #reply(head: Buffer): boolean {
    const cookie = head.readBigUInt64BE(8)
    const pending = this.#pending.get(cookie)
    if (head.readUInt32BE(0) !== 0x67446698 || pending === undefined) {
      this.#end(new Error(`what the server sends is no reply to anything: ${head.toString('hex')}`))
      this.#socket.destroy()
      return false
    }
    this.#pending.delete(cookie)
    const errno = head.readUInt32BE(4)
    if (errno === ESHUTDOWN) pending.reject(new Gone('the server ends'))
    else if (errno !== 0) pending.reject(new Refused(pending.what, errno))
    else if (pending.into === undefined) pending.resolve(nothing)
    else this.#replied = { pending, at: 0 }
    return true
  }

  #end(error: Error): void {
    this.#gone ??= error.message.startsWith('what the server') ? error : new Gone(error.message)
    this.#replied?.pending.reject(this.#gone)
    this.#replied = undefined
    for (const { reject } of this.#pending.values()) reject(this.#gone)
    this.#pending.clear()
  }
}

function requestOf(type: number, at: number, length: number, cookie: bigint, flags: number): Buffer {
  const bytes = Buffer.alloc(28)
  bytes.writeUInt32BE(0x25609513, 0)
  bytes.writeUInt16BE(flags, 4)
  bytes.writeUInt16BE(type, 6)
  bytes.writeBigUInt64BE(cookie, 8)
  bytes.writeBigUInt64BE(BigInt(at), 16)
  bytes.writeUInt32BE(length, 24)
  return bytes
}

/** Errors of a file whose server has gone: with the connection to the kernel, and a request that it had taken. */
const goneCodes = new Set(['ENOTCONN', 'ECONNABORTED', 'ECONNREFUSED', 'ENODEV', 'EIO'])

/**
 * Transferred at a time: with direct I/O the kernel cuts what is larger than a request where pages of the caller's
 * memory end, and that memory begins anywhere.
 */
const transferBytes = 2 ** 17

/** How often a read may find that the file is shorter. */
const sizeTries = 100

/** The file of a device in a mount. */
export class FileWay implements Way {
  readonly kind = 'file'
  readonly #file: FileHandle

  private constructor(file: FileHandle) {
    this.#file = file
  }

  static async open(path: string): Promise<FileWay> {
    return new FileWay(await told(open(path, constants.O_RDWR | constants.O_DIRECT)))
  }

  async read(at: number, length: number): Promise<Uint8Array> {
    const bytes = Buffer.alloc(length)
    for (let done = 0, tries = 0; done < length; ) {
      const { bytesRead } = await told(this.#file.read(bytes, done, Math.min(transferBytes, length - done), at + done))
      // Of a device that has grown the kernel learns the new size when it asks for it, and passes over the answer while
      // somebody writes.
      if (bytesRead === 0 && ++tries > sizeTries)
        throw new Refused(`a read of ${length} bytes at ${at}: the file ends there`, 0)
      done += bytesRead
    }
    return bytes
  }

  async write(at: number, bytes: Uint8Array, lasts: boolean): Promise<void> {
    for (let done = 0; done < bytes.length; ) {
      const length = Math.min(transferBytes, bytes.length - done)
      done += (await told(this.#file.write(bytes, done, length, at + done))).bytesWritten
    }
    if (lasts) await this.flush()
  }

  async flush(): Promise<void> {
    await told(this.#file.datasync())
  }

  async close(): Promise<void> {
    // What closing has to say about a server that is gone was said by everything before.
    await this.#file.close().catch((error: NodeJS.ErrnoException) => {
      if (!goneCodes.has(error.code ?? '')) throw error
    })
  }
}

async function told<T>(doing: Promise<T>): Promise<T> {
  try {
    return await doing
  } catch (error) {
    const { code = '', errno = 0, message } = error as NodeJS.ErrnoException
    throw goneCodes.has(code) ? new Gone(message) : new Refused(message, -errno)
  }
}
