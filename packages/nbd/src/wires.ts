/**
 * Sockets as wires: by system calls of our own where the runtime lets us have the descriptor, else (and under TLS)
 * through Node's streams.
 */
import { writeSync } from 'node:fs'
import type { Socket, SocketConstructorOpts } from 'node:net'
import type { Chunk } from './chunks.ts'
import type { Wire } from './connection.ts'

/** What Node has behind a socket. Not part of its documented interface: used where it is there. */
export interface SocketHandle {
  readonly fd: number
}

/** How a socket is made around a handle, receiving into buffers that it asks for. */
export interface DirectOptions extends SocketConstructorOpts {
  handle: SocketHandle
  pauseOnCreate: boolean
  onread: { buffer: () => Uint8Array; callback: (count: number, bytes: Uint8Array) => boolean }
}

/** Takes the handle out of a socket that has received nothing yet. */
export function handleOf(socket: Socket): SocketHandle | undefined {
  const inside = socket as unknown as { _handle?: (SocketHandle & { useUserBuffer?: unknown }) | null }
  const handle = inside._handle
  if (!handle || typeof handle.useUserBuffer !== 'function' || !(handle.fd >= 0)) return undefined
  inside._handle = null
  return handle
}

/** More than this goes through the socket. */
const directBytes = 128 * 1024

/** Sends by system calls what the system takes at once, the rest through the socket. */
export class DirectWire implements Wire {
  socket!: Socket
  readonly #fd: number

  constructor(fd: number) {
    this.#fd = fd
  }

  sendNow(chunk: Chunk, at: number, length: number): number {
    if (this.socket.destroyed) return -1
    // Hardly ever taken at once, and an exception each time that nothing is.
    if (length > directBytes) return 0
    try {
      return writeSync(this.#fd, chunk.bytes, at, length)
    } catch (error) {
      return (error as NodeJS.ErrnoException).code === 'EAGAIN' ? 0 : -1
    }
  }

  send(bytes: Uint8Array, done: () => void): void {
    this.socket.write(bytes, done)
  }

  resume(): void {
    this.socket.resume()
  }

  end(): void {
    this.socket.end(() => this.socket.destroy())
  }

  destroy(): void {
    this.socket.destroy()
  }
}

/** Sends through a stream. */
export class StreamWire implements Wire {
  readonly #socket: Socket

  constructor(socket: Socket) {
    this.#socket = socket
  }

  sendNow(): number {
    return this.#socket.destroyed ? -1 : 0
  }

  send(bytes: Uint8Array, done: () => void): void {
    this.#socket.write(bytes, done)
  }

  resume(): void {
    this.#socket.resume()
  }

  end(): void {
    this.#socket.end(() => this.#socket.destroy())
  }

  destroy(): void {
    this.#socket.destroy()
  }
}
