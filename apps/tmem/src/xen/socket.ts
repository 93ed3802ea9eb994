/**
 * The protocol of a Xen host's socket. A request is a line of JSON, and so is the answer; some requests also have bytes
 * around it:
 *
 *     save      the stream in pieces (length u32, bytes), a piece of length 0, then the line; a length of all
 *               ones: it broke
 *     restore   the asker sends such pieces after its line, and a piece of length 0
 *     guest     after the line calls: a tmem_op of 64 bits (56 bytes) and a page each, answered by a result (s32)
 *               and a page
 *
 * Invariant: a reader keeps one piece of at most 1 MiB.
 */
import { once } from 'node:events'
import { statSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { Failed } from '../ending.ts'
import { isTrusted, peerOf } from '../serve/peer.ts'

/** The default path of the socket. */
export const defaultXenControl: string = `${process.env['XDG_RUNTIME_DIR'] ?? '/run'}/tmem-xen.sock`

/** Most bytes of a request and of an answer, which may list many domains. */
const maxAsking = 65_536
const maxAnswer = 2 ** 22
const maxPiece = 2 ** 20
/** Length of a piece in whose stead there is an error: the line follows. */
const failedPiece = 0xffffffff
/** Bytes that pieces of a stream are put together to. */
const pieceBytes = 65_536

/** Reads lines and bytes of a socket; its other events have handlers already. */
export class SocketReader {
  readonly #source: AsyncIterator<Buffer>
  readonly #maxLine: number
  #rest: Buffer = Buffer.alloc(0)

  constructor(socket: Socket, maxLine: number = maxAsking) {
    this.#maxLine = maxLine
    this.#source = socket[Symbol.asyncIterator]() as AsyncIterator<Buffer>
  }

  /** Reads more bytes; false at the end. */
  async #more(): Promise<boolean> {
    const next = await this.#source.next()
    if (next.done === true) return false
    this.#rest = this.#rest.length === 0 ? next.value : Buffer.concat([this.#rest, next.value])
    return true
  }

  /** This many bytes; `undefined` if the connection ends first. */
  async take(bytes: number): Promise<Buffer | undefined> {
    while (this.#rest.length < bytes) if (!(await this.#more())) return undefined
    const taken = this.#rest.subarray(0, bytes)
    this.#rest = this.#rest.subarray(bytes)
    return taken
  }

  /** A line of JSON. Throws if it is not JSON, or too long. */
  async line(): Promise<unknown> {
    for (;;) {
      const end = this.#rest.indexOf(10)
      if (end >= 0) {
        const line = this.#rest.subarray(0, end).toString()
        this.#rest = this.#rest.subarray(end + 1)
        return JSON.parse(line)
      }
      if (this.#rest.length > this.#maxLine) throw new Error(`a line has more than ${this.#maxLine} bytes`)
      if (!(await this.#more())) throw new Error('the connection ended before its line was whole')
    }
  }

  /** Pieces up to the one of length 0. Throws when they end before. */
  async *pieces(): AsyncGenerator<Buffer> {
    for (;;) {
      const length = (await this.take(4))?.readUInt32LE()
      if (length === 0) return
      if (length === failedPiece) throw new Error(String(((await this.line()) as { error?: unknown }).error))
      if (length !== undefined && length > maxPiece)
        throw new Error(`a piece has ${length} bytes, more than ${maxPiece}`)
      const piece = length === undefined ? undefined : await this.take(length)
      if (piece === undefined) throw new Error('the connection ended in the middle of the stream')
      yield piece
    }
  }
}

/** Milliseconds that the other side may take no bytes of a stream, or a host may not answer to a whole one. */
export const streamPatienceMs = 30_000

/**
 * Writes, and waits while the other side has not read what was written before; at most `patienceMs`, then it ends the
 * connection. Rejects when the other side has gone, or is ended.
 */
export async function write(socket: Socket, bytes: Uint8Array | string, patienceMs?: number): Promise<void> {
  if (socket.destroyed) throw new Error('the other side has gone')
  if (socket.write(bytes)) return
  const waiting = new AbortController()
  const { signal } = waiting
  const timer = patienceMs === undefined ? undefined : setTimeout(() => socket.destroy(), patienceMs)
  try {
    await Promise.race([once(socket, 'drain', { signal }), once(socket, 'close', { signal })])
  } finally {
    clearTimeout(timer)
    // Each drain would leave its listener for the end.
    waiting.abort()
  }
  if (socket.destroyed) throw new Error('the other side has gone, or reads nothing')
}

export const writeLine = (socket: Socket, line: object): Promise<void> => write(socket, `${JSON.stringify(line)}\n`)

/**
 * Writes a stream as pieces, without the last one. Whoever takes none of it for `patienceMs` is ended: a guest may
 * stand still meanwhile.
 */
export async function writePieces(
  socket: Socket,
  stream: AsyncIterable<Uint8Array>,
  patienceMs: number = streamPatienceMs,
): Promise<number> {
  let bytes = 0
  let parts: Uint8Array[] = []
  let length = 0
  const flush = async (): Promise<void> => {
    if (length === 0) return
    const head = Buffer.alloc(4)
    head.writeUInt32LE(length)
    await write(socket, Buffer.concat([head, ...parts]), patienceMs)
    bytes += length
    parts = []
    length = 0
    // Guests have their turn.
    await new Promise((resolve) => setImmediate(resolve))
  }
  for await (const part of stream) {
    parts.push(part)
    length += part.length
    if (length >= pieceBytes) await flush()
  }
  await flush()
  return bytes
}

/** The piece after which there is none. */
export const lastPiece: Uint8Array = new Uint8Array(4)

/** The piece after which there is a line with an error. */
export const brokenPiece: Uint8Array = new Uint8Array(4).fill(0xff)

/** Connects to a host of the own user or of root, and sends a request. Rejects with `Failed`. */
export async function open(
  path: string,
  line: object,
): Promise<{ readonly socket: Socket; readonly reader: SocketReader }> {
  const socket = connect(path)
  try {
    await once(socket, 'connect')
  } catch (error) {
    throw new Failed(
      `no host at ${path} (${(error as Error).message}): start one with tmem xen host, or name its socket with --control`,
    )
  }
  // What comes of it is seen by whoever reads or writes.
  socket.on('error', () => socket.destroy())
  const user = peerOf(socket)?.uid ?? statSync(path).uid
  if (!isTrusted(user)) {
    socket.destroy()
    throw new Failed(
      `the host at ${path} belongs to user ${user}, whose answers cannot be trusted: run as that user, or name another --control`,
    )
  }
  await writeLine(socket, line)
  return { socket, reader: new SocketReader(socket, maxAnswer) }
}

/** The answer in a line. Rejects with `Failed` when it is an error. */
export async function answerOf(path: string, reader: SocketReader): Promise<Record<string, unknown>> {
  let answer: Record<string, unknown>
  try {
    answer = (await reader.line()) as Record<string, unknown>
  } catch (error) {
    throw new Failed(`the host at ${path} did not answer: ${(error as Error).message}`)
  }
  const { error } = answer
  if (typeof error === 'string') throw new Failed(`the host at ${path}: ${error}`)
  return answer
}

/** Sends a request and resolves to its answer. Rejects with `Failed`. */
export async function ask(path: string, line: object): Promise<Record<string, unknown>> {
  const { socket, reader } = await open(path, line)
  try {
    return await answerOf(path, reader)
  } finally {
    socket.destroy()
  }
}
