/** As much of an NBD client as `tmem bench nbd` needs: one request at a time, and the patterns of hostile ones. */
import { connect, type Socket } from 'node:net'
import { Failed } from '../ending.ts'

/** Greeting and what EXPORT_NAME answers without padding; a simple reply. */
const helloBytes = 18 + 10
const replyBytes = 16
const gibibyte = 2 ** 30

const Command = { READ: 0, WRITE: 1, TRIM: 4, WRITE_ZEROES: 6, BLOCK_STATUS: 7 } as const

/** A request, with room for its payload. */
function request(type: number, at: number, length: number, payloadBytes = 0): Buffer {
  const bytes = Buffer.alloc(28 + payloadBytes, type)
  bytes.writeUInt32BE(0x25609513, 0)
  bytes.writeUInt16BE(0, 4)
  bytes.writeUInt16BE(type, 6)
  bytes.writeBigUInt64BE(0n, 8)
  bytes.writeBigUInt64BE(BigInt(at), 16)
  bytes.writeUInt32BE(length, 24)
  return bytes
}

/** An option of the handshake. */
function option(number: number, data: Buffer): Buffer {
  const head = Buffer.alloc(16)
  head.write('IHAVEOPT', 'latin1')
  head.writeUInt32BE(number, 8)
  head.writeUInt32BE(data.length, 12)
  return Buffer.concat([head, data])
}

const many = (count: number, one: Buffer): Buffer => Buffer.concat(Array<Buffer>(count).fill(one))

/** What hostile clients send, again and again; none waits for answers, all take them. Beyond the first 64 MiB. */
export const hostilePatterns: Readonly<Record<string, () => Buffer>> = Object.freeze({
  'block-status': () => many(20_000, request(Command.BLOCK_STATUS, 0, gibibyte)),
  trim: () => many(9000, request(Command.TRIM, gibibyte / 8, gibibyte / 2)),
  'write-zeroes': () => many(9000, request(Command.WRITE_ZEROES, gibibyte / 8, gibibyte / 2)),
  'write-32m': () => request(Command.WRITE, gibibyte / 8, 2 ** 25, 2 ** 25),
  'write-32m-trim': () =>
    Buffer.concat([
      request(Command.WRITE, gibibyte / 8, 2 ** 25, 2 ** 25),
      request(Command.TRIM, gibibyte / 8, 2 ** 25),
    ]),
  'read-32m': () => many(64, request(Command.READ, 0, 2 ** 25)),
  'read-4k': () => many(20_000, request(Command.READ, 0, 4096)),
})

/** A connection to the default export, without structured replies unless it asks for block status. */
export class BenchClient {
  readonly socket: Socket
  #wanted = 0
  #got: () => void = () => {}
  #gone: (reason: Error) => void = () => {}

  private constructor(socket: Socket) {
    this.socket = socket
    socket.on('data', ({ length }) => {
      this.#wanted -= length
      if (this.#wanted <= 0) this.#got()
    })
    socket.on('error', () => {})
    socket.on('close', () => this.#gone(new Failed('bench nbd: the server closed the connection')))
  }

  /** Rejects when the server is not there, or closes. */
  static async connect(path: string, blockStatus = false): Promise<BenchClient> {
    const client = new BenchClient(connect(path))
    const parts: Buffer[] = [Buffer.from([0, 0, 0, 3])]
    let bytes = helloBytes
    if (blockStatus) {
      const query = Buffer.from('base:allocation')
      parts.push(option(8, Buffer.alloc(0)), option(10, Buffer.from([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15, ...query])))
      bytes += 20 + (20 + 4 + query.length) + 20
    }
    parts.push(option(1, Buffer.alloc(0)))
    await client.#exchange(Buffer.concat(parts), bytes)
    return client
  }

  async read(at: number, length: number): Promise<void> {
    await this.#exchange(request(Command.READ, at, length), replyBytes + length)
  }

  async write(at: number, bytes: Uint8Array): Promise<void> {
    await this.#exchange(Buffer.concat([request(Command.WRITE, at, bytes.length), bytes]), replyBytes)
  }

  close(): void {
    this.socket.destroy()
  }

  #exchange(bytes: Buffer, answerBytes: number): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#wanted = answerBytes
      this.#got = resolve
      this.#gone = reject
      this.socket.write(bytes)
    })
  }
}
