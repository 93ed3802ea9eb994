/** A client that says what the test tells it to, right or wrong, and understands every reply. */
import { mkdtempSync, rmSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type ConnectionOptions as TlsConnectionOptions, connect as tlsConnect } from 'node:tls'
import type { BlockDevice, Completion } from '@tmem/core'
import { afterEach } from 'vitest'
import { ChunkPool } from '../src/chunks.ts'
import { Connection, type Service, type Wire } from '../src/connection.ts'
import {
  memoryDevice,
  type NbdAddress,
  type NbdEndpoint,
  type NbdServer,
  type NbdServerOptions,
  nbdServer,
} from '../src/index.ts'
import { Command, Handshake, IHAVEOPT, OPTION_REPLY, Option, Reply } from '../src/protocol.ts'
import { servedOf } from '../src/server.ts'
import { Turns } from '../src/turns.ts'

/** Everything that a test opened is closed after it, also when it failed. */
const cleanups: (() => unknown)[] = []
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup()
})
export const later = (cleanup: () => unknown): void => {
  cleanups.push(cleanup)
}

/** A folder of the test's own. */
export function testFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-nbd-'))
  later(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** A server on a unix socket of its own, or where the test says. */
export async function serve(
  options: Partial<NbdServerOptions> = {},
  endpoint?: NbdEndpoint,
): Promise<{ server: NbdServer; address: NbdAddress }> {
  const server = nbdServer({ exports: [{ device: memoryDevice({ sizeBytes: 2 ** 20 }) }], ...options })
  later(() => server.close())
  const address = await server.listen(endpoint ?? { path: join(testFolder(), 'nbd.sock') })
  return { server, address }
}

/** What stands for a client that takes everything, until it is gone. */
class BareWire implements Wire {
  sentBytes = 0
  gone = false

  sendNow(_chunk: unknown, _at: number, length: number): number {
    if (this.gone) return -1
    this.sentBytes += length
    return length
  }

  send(): void {}
  resume(): void {}
  end(): void {}
  destroy(): void {}
}

/** A connection without a socket, with a device of 1 MiB, ready for requests. */
export function bareConnection({ hold }: Pick<Service, 'hold'>): {
  connection: Connection
  wire: BareWire
  pool: ChunkPool
} {
  const served = servedOf({ device: memoryDevice({ sizeBytes: 2 ** 20 }) })
  const pool = new ChunkPool(2 ** 24, 4)
  const service: Service = {
    exports: new Map([['', served]]),
    pool,
    // A clock that stands: no turn is ever over.
    turns: new Turns(() => 0),
    requests: 16,
    together: { inFlight: 0, limit: 512 },
    failed: () => undefined,
  }
  const wire = new BareWire()
  const options = { tls: 'none', clientFlags: Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES } as const
  const connection = new Connection(hold === undefined ? service : { ...service, hold }, wire, options)
  connection.feed(optionBytes(Option.EXPORT_NAME))
  wire.sentBytes = 0
  return { connection, wire, pool }
}

export interface OptionAnswer {
  readonly type: number
  readonly payload: Buffer
}

export interface Answer {
  readonly error: number
  readonly data: Buffer
  /** Of BLOCK_STATUS: [length, flags]. */
  readonly extents: [number, number][]
  /** Chunks (or the simple reply) that it took. */
  readonly parts: number
}

interface Pending {
  readonly read: { at: number; length: number } | undefined
  error: number
  data: Buffer
  extents: [number, number][]
  parts: number
  readonly resolve: (answer: Answer) => void
  readonly reject: (error: Error) => void
}

export class Gone extends Error {}

export class Client {
  socket: Socket
  /** The connection has ended. */
  readonly closed: Promise<true>
  structured = false
  #received = Buffer.alloc(0)
  #waiting: { count: number; resolve(bytes: Buffer): void; reject(error: Error): void } | undefined
  #over = false
  #cookie = 0n
  readonly #pending = new Map<bigint, Pending>()
  #end: (over: true) => void = () => {}

  private constructor(socket: Socket) {
    this.socket = socket
    this.closed = new Promise((resolve) => {
      this.#end = resolve
    })
    this.#listen()
  }

  /** Connected; nothing was read yet. */
  static async raw(address: NbdAddress): Promise<Client> {
    if ('fd' in address) throw new Error('of a socket that was handed over only its maker knows the address')
    const socket = 'path' in address ? connect(address.path) : connect(address.port, address.host)
    const client = new Client(socket)
    later(() => client.socket.destroy())
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve)
      socket.once('error', reject)
    })
    return client
  }

  /** Greeted. */
  static async greeted(address: NbdAddress, flags = 3): Promise<Client> {
    const client = await Client.raw(address)
    await client.bytes(18)
    client.send(u32(flags))
    return client
  }

  /** In transmission. */
  static async ready(
    address: NbdAddress,
    { name = '', structured = true, status = false }: { name?: string; structured?: boolean; status?: boolean } = {},
  ): Promise<Client> {
    const client = await Client.greeted(address)
    if (structured) await client.structuredReplies()
    if (status) await client.option(Option.SET_META_CONTEXT, contexts(name, 'base:allocation'))
    await client.go(name)
    return client
  }

  /** `session` gets what the server hands out for resuming. */
  async secure(options: TlsConnectionOptions, session: (given: Buffer) => void = () => {}): Promise<void> {
    const plain = this.socket
    plain.removeAllListeners('data')
    plain.removeAllListeners('close')
    const secured = tlsConnect({ ...options, socket: plain })
    secured.on('session', session)
    this.socket = secured
    this.#listen()
    await new Promise<void>((resolve, reject) => {
      this.socket.once('secureConnect', resolve)
      this.socket.once('error', reject)
    })
  }

  #listen(): void {
    this.socket.on('error', () => {})
    this.socket.on('data', (bytes: Buffer) => {
      this.#received = Buffer.concat([this.#received, bytes])
      this.#serve()
    })
    this.socket.on('close', () => {
      this.#over = true
      this.#serve()
      for (const pending of this.#pending.values()) pending.reject(new Gone('closed'))
      this.#end(true)
    })
  }

  #serve(): void {
    const waiting = this.#waiting
    if (waiting === undefined) return
    if (this.#received.length >= waiting.count) {
      this.#waiting = undefined
      const bytes = this.#received.subarray(0, waiting.count)
      this.#received = this.#received.subarray(waiting.count)
      waiting.resolve(bytes)
    } else if (this.#over) {
      this.#waiting = undefined
      waiting.reject(new Gone('closed'))
    }
  }

  send(...parts: Uint8Array[]): void {
    this.socket.write(Buffer.concat(parts))
  }

  /** The next bytes of the stream. Rejects with `Gone` when the server closes before. */
  bytes(count: number): Promise<Buffer> {
    return new Promise((resolve, reject) => {
      this.#waiting = { count, resolve, reject }
      this.#serve()
    })
  }

  async optionAnswer(): Promise<OptionAnswer> {
    const header = await this.bytes(20)
    if (header.readUInt32BE(0) !== OPTION_REPLY[0] || header.readUInt32BE(4) !== OPTION_REPLY[1])
      throw new Error(`not a reply to an option: ${header.toString('hex')}`)
    return { type: header.readUInt32BE(12), payload: await this.bytes(header.readUInt32BE(16)) }
  }

  /** Sends an option and collects what is answered, the final answer last. */
  async option(option: number, data: Uint8Array = Buffer.alloc(0)): Promise<OptionAnswer[]> {
    this.send(optionBytes(option, data))
    const answers: OptionAnswer[] = []
    for (;;) {
      const answer = await this.optionAnswer()
      answers.push(answer)
      if (answer.type === Reply.ACK || answer.type >= 0x80000000) return answers
    }
  }

  async structuredReplies(): Promise<void> {
    await this.option(Option.STRUCTURED_REPLY)
    this.structured = true
  }

  async go(name = ''): Promise<OptionAnswer[]> {
    const answers = await this.option(Option.GO, infoBytes(name))
    if (answers.at(-1)!.type !== Reply.ACK) throw new Error(`GO: ${answers.at(-1)!.type.toString(16)}`)
    this.transmit()
    return answers
  }

  /** From here on what comes are replies to requests. */
  transmit(): void {
    this.#replies().catch((error: Error) => {
      for (const pending of this.#pending.values()) pending.reject(error)
    })
  }

  /** Sends a request; resolves with its reply. */
  request(
    type: number,
    at: number,
    length: number,
    { flags = 0, payload }: { flags?: number; payload?: Uint8Array } = {},
  ): Promise<Answer> {
    const cookie = ++this.#cookie
    const answer = new Promise<Answer>((resolve, reject) => {
      const read = type === Command.READ ? { at, length } : undefined
      this.#pending.set(cookie, {
        read,
        error: 0,
        data: Buffer.alloc(read ? length : 0),
        extents: [],
        parts: 0,
        resolve,
        reject,
      })
    })
    this.send(requestBytes(type, at, length, cookie, flags), payload ?? Buffer.alloc(0))
    return answer
  }

  read(at: number, length: number, flags = 0): Promise<Answer> {
    return this.request(Command.READ, at, length, { flags })
  }

  write(at: number, payload: Uint8Array, flags = 0): Promise<Answer> {
    return this.request(Command.WRITE, at, payload.length, { flags, payload })
  }

  async #replies(): Promise<void> {
    for (;;) {
      const magic = (await this.bytes(4)).readUInt32BE()
      if (magic === 0x67446698) {
        const header = await this.bytes(12)
        const { cookie, pending } = this.#pendingOf(header, 4)
        pending.error = header.readUInt32BE()
        if (this.structured && pending.read) throw new Error('a simple reply to a structured read')
        if (pending.read && pending.error === 0) pending.data = await this.bytes(pending.read.length)
        pending.parts++
        this.#answer(cookie, pending)
      } else if (magic === 0x668e33ef) {
        if (!this.structured) throw new Error('a structured reply that was not asked for')
        const header = await this.bytes(16)
        const { cookie, pending } = this.#pendingOf(header, 4)
        const type = header.readUInt16BE(2)
        const payload = await this.bytes(header.readUInt32BE(12))
        pending.parts++
        if (type === 1) payload.copy(pending.data, Number(payload.readBigUInt64BE()) - pending.read!.at, 8)
        else if (type === 5) {
          for (let n = 4; n < payload.length; n += 8)
            pending.extents.push([payload.readUInt32BE(n), payload.readUInt32BE(n + 4)])
        } else if (type >= 0x8000) pending.error = payload.readUInt32BE()
        else if (type !== 0) throw new Error(`chunk of type ${type}`)
        if ((header.readUInt16BE() & 1) === 1) this.#answer(cookie, pending)
      } else throw new Error(`not a reply: ${magic.toString(16)}`)
    }
  }

  #pendingOf(header: Buffer, at: number): { cookie: bigint; pending: Pending } {
    const cookie = header.readBigUInt64BE(at)
    const pending = this.#pending.get(cookie)
    if (pending === undefined) throw new Error(`a reply to request ${cookie}, which does not wait`)
    return { cookie, pending }
  }

  #answer(cookie: bigint, { error, data, extents, parts, resolve }: Pending): void {
    this.#pending.delete(cookie)
    resolve({ error, data, extents, parts })
  }
}

export function u32(...values: number[]): Buffer {
  const bytes = Buffer.alloc(4 * values.length)
  values.forEach((value, n) => {
    bytes.writeUInt32BE(value >>> 0, 4 * n)
  })
  return bytes
}

export function u16(...values: number[]): Buffer {
  const bytes = Buffer.alloc(2 * values.length)
  values.forEach((value, n) => {
    bytes.writeUInt16BE(value, 2 * n)
  })
  return bytes
}

export const optionBytes = (option: number, data: Uint8Array = Buffer.alloc(0), length = data.length): Buffer =>
  Buffer.concat([u32(...IHAVEOPT, option, length), data])

/** Data of INFO and GO. */
export const infoBytes = (name: string, ...items: number[]): Buffer => {
  const bytes = Buffer.from(name)
  return Buffer.concat([u32(bytes.length), bytes, u16(items.length, ...items)])
}

/** Data of SET_META_CONTEXT and LIST_META_CONTEXT. */
export const contexts = (name: string, ...queries: string[]): Buffer => {
  const text = (value: string): Buffer => Buffer.concat([u32(Buffer.byteLength(value)), Buffer.from(value)])
  return Buffer.concat([text(name), u32(queries.length), ...queries.map(text)])
}

export function requestBytes(type: number, at: number, length: number, cookie: bigint, flags = 0): Buffer {
  const bytes = Buffer.alloc(28)
  bytes.writeUInt32BE(0x25609513, 0)
  bytes.writeUInt16BE(flags, 4)
  bytes.writeUInt16BE(type, 6)
  bytes.writeBigUInt64BE(cookie, 8)
  bytes.writeBigUInt64BE(BigInt(at), 16)
  bytes.writeUInt32BE(length, 24)
  return bytes
}

/** Repeatable bytes. */
export function bytesOf(seed: number, length: number): Buffer {
  const bytes = Buffer.alloc(length)
  let state = (seed * 2654435761 + 1) >>> 0
  for (let n = 0; n < length; n++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    bytes[n] = state >>> 24
  }
  return bytes
}

/** A device whose operations wait until the test lets them go on, or fail as the test says. */
export class SlowDevice implements BlockDevice {
  readonly #inner: BlockDevice
  /** Operations that wait. */
  readonly waiting: (() => void)[] = []
  /** Operations of that name fail from now on. */
  failing: Map<string, () => Error> = new Map()
  /** True: operations wait for `go`; `'turn'`: for the next turn of the event loop; false: they are done at once. */
  slow: boolean | 'turn' = true
  /** The largest number of operations that waited at once. */
  most = 0
  calls: string[] = []

  constructor(inner: BlockDevice) {
    this.#inner = inner
  }

  get name(): string {
    return 'slow'
  }
  get sizeBytes(): number {
    return this.#inner.sizeBytes
  }
  get blockSize(): number {
    return this.#inner.blockSize
  }
  get preferredBlockSize(): number {
    return this.#inner.preferredBlockSize
  }
  get readOnly(): boolean {
    return this.#inner.readOnly
  }

  go(): void {
    for (const next of this.waiting.splice(0)) next()
  }

  #do(name: string, operation: () => Completion): Completion {
    this.calls.push(name)
    const run = (): Completion => {
      const failure = this.failing.get(name)
      if (failure !== undefined) throw failure()
      return operation()
    }
    if (this.slow === false) return run()
    const turn = new Promise<void>((resolve) => {
      if (this.slow === 'turn') setImmediate(resolve)
      else this.waiting.push(resolve)
      this.most = Math.max(this.most, this.waiting.length)
    })
    return turn.then(run)
  }

  read(at: number, into: Uint8Array): Completion {
    return this.#do('read', () => this.#inner.read(at, into))
  }
  write(at: number, bytes: Uint8Array): Completion {
    return this.#do('write', () => this.#inner.write(at, bytes))
  }
  discard(at: number, length: number): Completion {
    return this.#do('discard', () => this.#inner.discard(at, length))
  }
  zero(at: number, length: number, keep?: boolean): Completion {
    return this.#do(keep ? 'zero keep' : 'zero', () => this.#inner.zero(at, length, keep))
  }
  flush(): Completion {
    return this.#do('flush', () => this.#inner.flush())
  }
  map(at: number, length: number, report: (length: number, allocated: boolean) => boolean): void {
    const failure = this.failing.get('map')
    if (failure !== undefined) throw failure()
    this.#inner.map(at, length, report)
  }
  stats(): ReturnType<BlockDevice['stats']> {
    return this.#inner.stats()
  }
  close(): Promise<void> {
    return this.#inner.close()
  }
}

/** Lets everything that is on its way arrive. */
export async function until(condition: () => boolean): Promise<void> {
  for (let turns = 0; !condition(); turns++) {
    if (turns > 20_000) throw new Error(`in vain: ${condition.toString()}`)
    await new Promise((resolve) => (turns < 100 ? setImmediate(resolve) : setTimeout(resolve, 1)))
  }
}
