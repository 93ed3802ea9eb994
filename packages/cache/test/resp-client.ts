/** A client of RESP that says exactly what a test wants, over a real socket. */
import { randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { connect, createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { onTestFinished } from 'vitest'
import { Cache, type CacheOptions } from '../src/index.ts'
import { RespServer, type RespServerOptions } from '../src/resp.ts'

/** What a server said: bytes as latin1; an error is a string that begins with a minus sign. */
export type Reply = string | number | null | Reply[]

const crlf = '\r\n'

/** A request as bytes. */
export const request = (...words: readonly (string | Uint8Array)[]): Buffer => requestOf(words)

export function requestOf(words: readonly (string | Uint8Array)[]): Buffer {
  return Buffer.concat([
    Buffer.from(`*${words.length}\r\n`),
    ...words.flatMap((word) => {
      const bytes = typeof word === 'string' ? Buffer.from(word, 'latin1') : word
      return [Buffer.from(`$${bytes.length}\r\n`), bytes, Buffer.from(crlf)]
    }),
  ])
}

/** Reads one reply at an offset; `undefined`: it is not whole. Maps are lists of pairs. */
function replyAt(text: string, at: number): { readonly reply: Reply; readonly end: number } | undefined {
  const stop = text.indexOf(crlf, at)
  if (stop < 0) return undefined
  const [kind, line, end] = [text[at]!, text.slice(at + 1, stop), stop + 2]
  if (kind === '+') return { reply: line, end }
  if (kind === '-') return { reply: `-${line}`, end }
  if (kind === ':') return { reply: Number(line), end }
  if (kind === '_') return { reply: null, end }
  if (kind === '$') {
    if (line === '-1') return { reply: null, end }
    const length = Number(line)
    if (text.length < end + length + 2) return undefined
    if (text.slice(end + length, end + length + 2) !== crlf) throw new Error('a bulk string without an end')
    return { reply: text.slice(end, end + length), end: end + length + 2 }
  }
  if (kind !== '*' && kind !== '%') throw new Error(`no reply: ${JSON.stringify(text.slice(at, at + 40))}`)
  const all: Reply[] = []
  let next = end
  for (let n = 0; n < Number(line) * (kind === '%' ? 2 : 1); n++) {
    const inner = replyAt(text, next)
    if (inner === undefined) return undefined
    all.push(inner.reply)
    next = inner.end
  }
  return { reply: all, end: next }
}

export class Client {
  readonly socket: Socket
  /** Resolves when the server has ended its side. */
  readonly ended: Promise<void>
  #text = ''
  #at = 0
  readonly #waiting: ((reply: Reply) => void)[] = []

  constructor(path: string) {
    this.socket = connect(path)
    // What a server does that ends a connection is told by `ended`.
    this.socket.on('error', () => undefined)
    this.ended = new Promise((resolve) => {
      this.socket.once('end', resolve)
      this.socket.once('close', () => resolve())
    })
    this.socket.setEncoding('latin1')
    this.socket.on('data', (part: string) => {
      this.#text += part
      for (let next = replyAt(this.#text, this.#at); next !== undefined; next = replyAt(this.#text, this.#at)) {
        this.#at = next.end
        this.#waiting.shift()!(next.reply)
      }
      this.#text = this.#text.slice(this.#at)
      this.#at = 0
    })
    onTestFinished(() => void this.socket.destroy())
  }

  /** What the server says next, and is not expected otherwise. */
  get rest(): string {
    return this.#text
  }

  reply(): Promise<Reply> {
    return new Promise((resolve) => this.#waiting.push(resolve))
  }

  ask(...words: readonly (string | Uint8Array)[]): Promise<Reply> {
    const reply = this.reply()
    this.socket.write(request(...words))
    return reply
  }

  /** Words with spaces between. */
  say(line: string): Promise<Reply> {
    return this.ask(...line.split(' '))
  }
}

/** Values of which each takes a page: more than the window of a small cache with a file holds. */
const fillers = 120

/** Has all values of a cache with a file be where one has to wait for them. */
export async function sunk(cache: Cache<never>): Promise<void> {
  const others = cache as unknown as Cache<unknown>
  await others.sync()
  // What was read or written lately is in the window still.
  for (let n = 0; n < fillers; n++) others.set(`filler ${n}`, randomBytes(3500))
}

export interface Serving {
  readonly cache: Cache<Uint8Array>
  readonly server: RespServer
  readonly errors: Error[]
  readonly refused: string[]
  readonly folder: string
  readonly client: () => Client
}

/** A server on a socket of its own. */
export async function serving(
  options: Partial<CacheOptions<Uint8Array>> = {},
  how: Omit<RespServerOptions, 'cache'> = {},
): Promise<Serving> {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-resp-'))
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }))
  const cache = new Cache<Uint8Array>({ memory: '16MiB', ...options })
  await cache.ready()
  const [errors, refused]: [Error[], string[]] = [[], []]
  const server = new RespServer({
    cache,
    ...how,
    onError: (error) => errors.push(error),
    onRefused: (why) => refused.push(why),
  })
  const path = join(folder, 'socket')
  const listener = createServer({ allowHalfOpen: true }, (socket) => server.accept(socket))
  await new Promise<void>((resolve) => listener.listen(path, resolve))
  onTestFinished(async () => {
    listener.close()
    await server.close()
    await cache.close()
  })
  return { cache, server, errors, refused, folder, client: () => new Client(path) }
}
