/**
 * A connection of a client of Redis: requests are read one after the other, and answers are written in their order.
 *
 * Invariant: while a command is at work, or its answers wait to be read, nothing more is read or begun.
 */
import { Buffer } from 'node:buffer'
import type { Duplex } from 'node:stream'
import { type Argument, ProtocolError, type RequestParser } from './resp-parser.ts'

/** Bytes of answers that are put together before they are written. */
const answerBytes = 16 * 1024
/** What a connection may hold without being looked at. */
const smallBytes = 64 * 1024

/** What a connection needs of its server. */
export interface Host {
  run(request: readonly Argument[]): Promise<void> | undefined
  failed(why: string): void
  weigh(): void
}

/** A client: reads requests, writes answers. */
export class Connection {
  readonly id: number
  name = ''
  /** Version of the protocol: 2 or 3. */
  protocol = 2
  readonly #socket: Duplex
  readonly #parser: RequestParser
  readonly #host: Host
  readonly #answers: Buffer = Buffer.allocUnsafe(answerBytes)
  #used = 0
  /** A command is at work, or its answers wait to be read. */
  #isBusy = false
  /** The client has ended its side. */
  #isEnded = false
  /** Nothing more is answered. */
  #isOver = false

  constructor(socket: Duplex, id: number, parser: RequestParser, host: Host) {
    this.id = id
    this.#socket = socket
    this.#parser = parser
    this.#host = host
    // Whoever asked may go away at any time.
    socket.on('error', () => socket.destroy())
    socket.on('data', (chunk: Buffer) => {
      // Behind an error it is read no more; until its client has noticed, what comes is passed over.
      if (this.#isOver) return
      parser.push(chunk)
      this.#proceed()
    })
    socket.on('end', () => {
      this.#isEnded = true
      if (!this.#isBusy) this.quit()
    })
  }

  get heldBytes(): number {
    return this.#parser.heldBytes + this.#socket.writableLength
  }

  /** Nobody reads its answers any more. */
  get isGone(): boolean {
    return this.#socket.destroyed
  }

  destroy(): void {
    this.#isOver = true
    this.#socket.destroy()
  }

  /** Resolves once it has ended. */
  close(): Promise<void> {
    return new Promise((resolve) => {
      if (this.#socket.closed) resolve()
      this.#socket.once('close', () => resolve())
      this.flush()
      this.#isOver = true
      if (this.#isBusy || this.#socket.writableLength > 0) this.#socket.destroy()
      else this.#socket.end(() => this.#socket.destroy())
    })
  }

  /** Ends it behind the answers so far. */
  quit(): void {
    if (this.#isOver) return
    this.flush()
    this.#isOver = true
    this.#parser.done()
    this.#socket.end()
    this.#socket.resume()
  }

  // ---- Answers ----------------------------------------------------------------------------------------------------

  /** A line; of printable ASCII. */
  line(text: string): void {
    if (this.#used + text.length + 2 > answerBytes) this.flush()
    this.#used += this.#answers.write(text, this.#used, 'latin1')
    this.#answers[this.#used++] = 13
    this.#answers[this.#used++] = 10
  }

  ok(): void {
    this.line('+OK')
  }

  error(text: string): void {
    this.line(`-${text.replaceAll(/[^\x20-\x7e]/g, '?').slice(0, 1024)}`)
  }

  integer(value: number): void {
    this.line(`:${value}`)
  }

  array(length: number): void {
    this.line(`*${length}`)
  }

  /** Pairs follow. */
  map(pairs: number): void {
    this.line(this.protocol === 3 ? `%${pairs}` : `*${pairs * 2}`)
  }

  /** Bytes, which stay as they are; `undefined`: there are none. */
  bulk(value: Uint8Array | undefined): void {
    if (value === undefined) {
      this.line(this.protocol === 3 ? '_' : '$-1')
      return
    }
    this.line(`$${value.length}`)
    if (this.#used + value.length + 2 <= answerBytes) {
      this.#answers.set(value, this.#used)
      this.#used += value.length
    } else {
      this.flush()
      if (!this.#isOver) this.#socket.write(value)
    }
    this.line('')
  }

  text(text: string): void {
    this.bulk(Buffer.from(text))
  }

  flush(): void {
    if (this.#used > 0 && !this.#isOver) this.#socket.write(Buffer.from(this.#answers.subarray(0, this.#used)))
    this.#used = 0
  }

  /** Resolves when the client has read, or is gone; `undefined`: it has. */
  drained(): Promise<void> | undefined {
    const socket = this.#socket
    if (!socket.writableNeedDrain) return undefined
    this.#host.weigh()
    if (socket.destroyed) return undefined
    return new Promise((resolve) => {
      const settle = (): void => {
        socket.off('drain', settle)
        socket.off('close', settle)
        resolve()
      }
      socket.on('drain', settle)
      socket.on('close', settle)
    })
  }

  // ---- Requests ---------------------------------------------------------------------------------------------------

  /** Does what has come, as far as that goes at once. */
  #proceed(): void {
    const parser = this.#parser
    try {
      while (!this.#isOver) {
        const request = parser.next()
        if (request === undefined) break
        const waits = this.#host.run(request) ?? this.drained()
        if (waits !== undefined) {
          this.#wait(waits)
          return
        }
        parser.done()
      }
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error
      this.#host.failed(error.message)
      this.error(`ERR Protocol error: ${error.message}`)
      this.quit()
    }
    if (this.#isOver) return
    this.flush()
    const waits = this.drained()
    if (waits !== undefined) this.#wait(waits)
    else if (this.#isEnded) this.quit()
    else {
      if (this.heldBytes > smallBytes) this.#host.weigh()
      this.#socket.resume()
    }
  }

  /** Reads and does nothing until then. */
  #wait(waits: Promise<void>): void {
    this.#isBusy = true
    this.flush()
    this.#socket.pause()
    void waits.then(() => {
      this.#isBusy = false
      this.#parser.done()
      if (this.#socket.destroyed) this.#isOver = true
      else this.#proceed()
    })
  }
}
