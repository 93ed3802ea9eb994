/**
 * The server: exports, endpoints, limits, TLS. What is said on a connection is in connection.ts.
 *
 * A unix socket, or TCP without TLS, is received from into the connection's own chunks and sent to by direct system calls; where
 * the runtime does not allow that, and under TLS, through Node's streams. Both speak the same protocol.
 */
import { writeSync } from 'node:fs'
import { createServer, type Server, Socket, type SocketConstructorOpts } from 'node:net'
import { createServer as createTlsServer, type TlsOptions, type Server as TlsServer } from 'node:tls'
import type { BlockDevice, StatsNode } from '@tmem/core'
import { type Chunk, ChunkPool } from './chunks.ts'
import { Connection, type Service, type Wire } from './connection.ts'
import type { Served, TlsState } from './negotiation.ts'
import { MAXIMUM_STRING } from './protocol.ts'
import { listenAtPath, listening } from './socket-path.ts'

/** What clients see under one name. */
export interface NbdExport {
  /** Up to 4096 bytes of UTF-8; the empty name (the default) is what a client gets that names none. */
  readonly name?: string
  /** For people; shown by `nbdinfo --list`. */
  readonly description?: string
  readonly device: BlockDevice
  /** Refuses everything that writes, also on a device that could. */
  readonly readOnly?: boolean
  /** Lets clients change the size (RESIZE); the device must be able to. */
  readonly resizable?: boolean
  /** Whether others than clients use the device now: then no client can make it smaller. Default: nobody does. */
  readonly isUsedElsewhere?: () => boolean
}

/** Bounds on what clients can make the server do. */
export interface NbdLimits {
  /** Connections at once (default 256); one more is closed at once. */
  readonly connections?: number
  /** Requests that a connection may have at work in devices that have to wait (default 128). */
  readonly requests?: number
  /**
   * Bytes of buffers, over all connections (default 64 MiB). Beyond it each connection has one request in flight, and
   * at most four buffers of 20 KiB.
   */
  readonly bytes?: number
}

/** TLS on a TCP endpoint: what clients are shown, and whom they have to be. */
export interface NbdTls extends Pick<TlsOptions, 'key' | 'cert' | 'ca' | 'crl' | 'minVersion' | 'passphrase'> {
  /** Clients must show a certificate that `ca` has signed. */
  readonly verifyClients?: boolean
  /** Clients may also go on without TLS. Only for a network that is trusted anyway. */
  readonly optional?: boolean
}

/** Where the server listens. */
export type NbdEndpoint =
  | {
      /** Path of a unix socket. A socket of this user that nobody listens on is replaced. */
      readonly path: string
    }
  | {
      /** 0: any free one. The protocol's own port is 10809. */
      readonly port: number
      /** Default `127.0.0.1`. */
      readonly host?: string
      readonly tls?: NbdTls
    }

/** Where the server listens, as it came to be. */
export type NbdAddress = { readonly path: string } | { readonly host: string; readonly port: number }

/** Settings of a server. */
export interface NbdServerOptions {
  readonly exports: readonly NbdExport[]
  readonly limits?: NbdLimits
  /** A device failed; the client has its answer already. */
  readonly onError?: (error: unknown, exportName: string) => void
  /**
   * How many turns the event loop makes without sleeping after bytes have come, as long as more often follow (default 50,
   * about a tenth of a millisecond). The next request is then answered sooner, for the price of a processor that does not
   * rest while a client is busy; 0 turns it off.
   */
  readonly busyTurns?: number
}

/** A server; it listens nowhere until told to. */
export interface NbdServer {
  /** Adds an endpoint. Rejects with the system's error when it cannot be had. */
  listen(endpoint: NbdEndpoint): Promise<NbdAddress>
  /** Section `nbd`: connections, buffers; and one section for each export. */
  stats(): StatsNode
  /**
   * Listens no more, waits for what devices are doing, closes the connections. Devices stay open: they belong to the
   * caller. Idempotent.
   */
  close(): Promise<void>
}

/** Makes a server for these exports. Throws `RangeError` or `TypeError` for what cannot be served. */
export function nbdServer(options: NbdServerOptions): NbdServer {
  return new NodeNbdServer(options)
}

/** Where the first bytes are received after a pause: what is received there is copied on at once. */
const restartBytes = 4096
/** The loop stops turning after so many times in vain, and tries again at every so many-th arrival. */
const patience = 8
const retryAfter = 16
const defaults = { connections: 256, requests: 128, bytes: 64 * 2 ** 20 }

class NodeNbdServer implements NbdServer {
  readonly #service: Service
  readonly #served: readonly Served[]
  readonly #pool: ChunkPool
  readonly #maximumConnections: number
  readonly #listeners = new Set<Server>()
  readonly #connections = new Set<Connection>()
  /** As they were accepted: also those in the middle of beginning TLS. */
  readonly #sockets = new Set<Socket>()
  readonly #restart = new Uint8Array(restartBytes)
  readonly #busyTurns: number
  #quietTurns = 0
  #turning = false
  readonly #held: Connection[] = []
  /** Arrivals of bytes, and how often in a row the loop turned for nothing. */
  #arrivals = 0
  #inVain = 0
  #accepted = 0
  #refused = 0
  #secured = 0
  #closing: Promise<void> | undefined
  #closed = false

  constructor({ exports, limits = {}, onError, busyTurns = 50 }: NbdServerOptions) {
    this.#served = exports.map(servedOf)
    const byName = new Map(this.#served.map((served) => [served.name, served]))
    if (byName.size !== this.#served.length) throw new RangeError('two exports have the same name')
    const { connections, requests, bytes } = { ...defaults, ...limits }
    for (const [name, value] of Object.entries({ connections, requests, bytes }))
      if (!Number.isSafeInteger(value) || value < 1)
        throw new RangeError(`limits.${name} must be a positive integer, got ${value}`)
    if (!Number.isSafeInteger(busyTurns) || busyTurns < 0)
      throw new RangeError(`busyTurns must not be negative, got ${busyTurns}`)
    this.#busyTurns = busyTurns
    this.#maximumConnections = connections
    this.#pool = new ChunkPool(bytes)
    this.#service = {
      exports: byName,
      pool: this.#pool,
      requests,
      failed: (error, { name }) => onError?.(error, name),
      ...(busyTurns > 0 ? { hold: (connection) => this.#hold(connection) } : {}),
    }
  }

  async listen(endpoint: NbdEndpoint): Promise<NbdAddress> {
    if (this.#closed) throw new TypeError('the server was closed')
    const tls = 'tls' in endpoint ? endpoint.tls : undefined
    const securing = tls === undefined ? undefined : new Securing(tls, (socket, flags) => this.#secure(socket, flags))
    const server = createServer({ noDelay: true, pauseOnConnect: true }, (socket) => {
      if (this.#sockets.size >= this.#maximumConnections || this.#closed) {
        this.#refused++
        socket.destroy()
        return
      }
      this.#accepted++
      this.#accept(socket, securing)
    })
    if ('path' in endpoint) await listenAtPath(server, endpoint.path)
    else await listening(server, { port: endpoint.port, host: endpoint.host ?? '127.0.0.1' })
    this.#listeners.add(server)
    const address = server.address()
    return typeof address === 'string' || address === null
      ? { path: String(address) }
      : { host: address.address, port: address.port }
  }

  stats(): StatsNode {
    return {
      name: 'nbd',
      counters: {
        connections: this.#connections.size,
        accepted: this.#accepted,
        refused: this.#refused,
        secured: this.#secured,
        buffer_bytes: this.#pool.used,
        peak_buffer_bytes: this.#pool.peak,
      },
      children: this.#served.map(({ name, connections, counters }) => ({
        name: name === '' ? 'default' : name,
        counters: { connections, ...counters },
        children: [],
      })),
    }
  }

  close(): Promise<void> {
    this.#closed = true
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    const stopped = [...this.#listeners].map((server) => new Promise<void>((resolve) => server.close(() => resolve())))
    await Promise.all([...this.#connections].map((connection) => connection.shutdown()))
    // Left are those that began TLS and have not ended it, or do not take what was sent.
    for (const socket of this.#sockets) socket.destroySoon()
    await Promise.all(stopped)
  }

  #accept(socket: Socket, securing: Securing | undefined): void {
    const handle = securing === undefined ? handleOf(socket) : undefined
    if (handle !== undefined) this.#direct(socket, handle)
    else {
      this.#open(socket)
      const tls = securing === undefined ? 'none' : securing.optional ? 'optional' : 'required'
      this.#stream(socket, tls, (clientFlags) => securing?.begin(socket, clientFlags))
    }
  }

  #secure(socket: Socket, clientFlags: number): void {
    this.#secured++
    socket.on('error', ignoreReset)
    this.#stream(socket, 'on', () => {}, clientFlags)
  }

  #open(socket: Socket): void {
    this.#sockets.add(socket)
    socket.on('error', ignoreReset)
    socket.on('close', () => this.#sockets.delete(socket))
  }

  /** Serves a connection through Node's stream; `clientFlags` when it begins secured. */
  #stream(socket: Socket, tls: TlsState, startTls: (clientFlags: number) => void, clientFlags?: number): void {
    const wire = new StreamWire(socket)
    const take = (bytes: Buffer): void => {
      const more = connection.feed(bytes)
      if (!more) socket.pause()
      this.#busy(more)
    }
    const over = (): void => {
      connection.closed()
      this.#connections.delete(connection)
    }
    const connection = new Connection(this.#service, wire, {
      tls,
      startTls: (flags) => {
        socket.off('data', take)
        socket.off('close', over)
        socket.pause()
        this.#connections.delete(connection)
        startTls(flags)
      },
      ...(clientFlags === undefined ? {} : { clientFlags }),
    })
    this.#connections.add(connection)
    socket.on('data', take)
    socket.on('close', over)
    if (clientFlags === undefined) connection.greet()
    socket.resume()
  }

  /** Serves a connection with as little as possible between it and the system. */
  #direct(accepted: Socket, handle: SocketHandle): void {
    const wire = new DirectWire(handle.fd)
    const connection = new Connection(this.#service, wire, { tls: 'none' })
    let room: Uint8Array | undefined
    const options: DirectOptions = {
      handle,
      pauseOnCreate: true,
      onread: {
        buffer: () => {
          // The runtime asks again after each read. While nothing may be received, the connection's chunk stays
          // as it is; what comes first after that is received on the side.
          room = connection.ended || connection.stalled ? this.#restart : connection.room()
          return room
        },
        callback: (count, bytes) => {
          const more =
            bytes === this.#restart
              ? connection.feed(Uint8Array.prototype.slice.call(bytes, 0, count))
              : connection.received(count)
          this.#busy(more)
          return more
        },
      },
    }
    const socket = new Socket(options)
    wire.socket = socket
    this.#connections.add(connection)
    this.#open(socket)
    socket.on('end', () => socket.destroy())
    socket.on('close', () => {
      connection.closed()
      this.#connections.delete(connection)
      // Ends the accepted socket, which has no handle of its own any more: the listener counts it.
      accepted.destroy()
    })
    connection.greet()
    socket.resume()
  }

  /**
   * Bytes have come: more may follow soon, and a loop that still turns need not be woken. Where they mostly do not follow, it
   * is tried again only now and then. None will follow as long as a connection takes no `more`.
   */
  #busy(more: boolean): void {
    if (!more) {
      this.#quietTurns = this.#busyTurns
      return
    }
    this.#quietTurns = 0
    this.#arrivals++
    if (this.#turning) this.#inVain = 0
    else if (this.#busyTurns > 0 && (this.#inVain < patience || this.#arrivals % retryAfter === 0)) {
      this.#turning = true
      setImmediate(this.#turn)
    }
  }

  /** Answers of this connection wait for more requests: the loop turns as long as they do. */
  #hold(connection: Connection): void {
    this.#held.push(connection)
    if (this.#turning) return
    this.#turning = true
    setImmediate(this.#turn)
  }

  readonly #turn = (): void => {
    // Those that hold nothing any more leave the list.
    let kept = 0
    for (const connection of this.#held) if (connection.turned()) this.#held[kept++] = connection
    this.#held.length = kept
    if (kept > 0) {
      setImmediate(this.#turn)
      return
    }
    if (this.#quietTurns++ < this.#busyTurns && !this.#closed) {
      setImmediate(this.#turn)
      return
    }
    this.#turning = false
    this.#inVain++
  }
}

/** What Node has behind a socket. Not part of its documented interface: used where it is there. */
interface SocketHandle {
  readonly fd: number
}
interface DirectOptions extends SocketConstructorOpts {
  handle: SocketHandle
  pauseOnCreate: boolean
  onread: { buffer: () => Uint8Array; callback: (count: number, bytes: Uint8Array) => boolean }
}

/** Takes the handle out of a socket that has received nothing yet. */
function handleOf(socket: Socket): SocketHandle | undefined {
  const inside = socket as unknown as { _handle?: (SocketHandle & { useUserBuffer?: unknown }) | null }
  const handle = inside._handle
  if (!handle || typeof handle.useUserBuffer !== 'function' || !(handle.fd >= 0)) return undefined
  inside._handle = null
  return handle
}

/** More than this goes through the socket. */
const directBytes = 128 * 1024

/** Sends by system calls what the system takes at once, the rest through the socket. */
class DirectWire implements Wire {
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
class StreamWire implements Wire {
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

/** Turns connections into secured ones. */
class Securing {
  readonly optional: boolean
  readonly #server: TlsServer
  /** What clients said in their greeting, by address: a secured socket does not tell from which one it was made. */
  readonly #flags = new Map<string, number>()

  constructor(tls: NbdTls, secured: (socket: Socket, clientFlags: number) => void) {
    const { verifyClients = false, optional = false, ...context } = tls
    if (verifyClients && context.ca === undefined) throw new TypeError('verifyClients needs ca: who signs for clients')
    this.optional = optional
    this.#server = createTlsServer({
      minVersion: 'TLSv1.2',
      ...context,
      requestCert: verifyClients,
      rejectUnauthorized: verifyClients,
    })
    this.#server.on('secureConnection', (socket) => secured(socket, this.#flags.get(addressOf(socket)) ?? 0))
    this.#server.on('tlsClientError', (_, socket) => socket.destroy())
  }

  /** Begins TLS on a connection whose client was told to. */
  begin(socket: Socket, clientFlags: number): void {
    const address = addressOf(socket)
    this.#flags.set(address, clientFlags)
    socket.on('close', () => this.#flags.delete(address))
    this.#server.emit('connection', socket)
  }
}

const addressOf = ({ remoteAddress, remotePort }: Socket): string => `${remoteAddress} ${remotePort}`

/** A client that vanishes is nobody's error: `close` follows, and everything is ended there. */
const ignoreReset = (): void => {}

/** Judges an export: what connections need of it. Throws `RangeError` or `TypeError`. */
export function servedOf(given: NbdExport): Served {
  const { name = '', description, device, readOnly = false, resizable = false, isUsedElsewhere = nobody } = given
  const nameBytes = Buffer.from(name)
  const descriptionBytes = description === undefined ? undefined : Buffer.from(description)
  for (const text of [nameBytes, descriptionBytes])
    if (text !== undefined && (text.length > MAXIMUM_STRING || text.includes(0)))
      throw new RangeError(`names and descriptions have at most ${MAXIMUM_STRING} bytes, none of them zero`)
  const { blockSize, preferredBlockSize } = device
  if (!powerOfTwo(blockSize) || blockSize > largestBlock)
    throw new RangeError(`blocks of ${blockSize} bytes cannot be served: powers of two up to ${largestBlock} can`)
  if (!powerOfTwo(preferredBlockSize) || preferredBlockSize < blockSize)
    throw new RangeError(`preferredBlockSize must be a power of two, at least ${blockSize}, got ${preferredBlockSize}`)
  if (resizable && (device.resize === undefined || readOnly || device.readOnly))
    throw new TypeError(`the export "${name}" cannot be resizable: its device cannot change its size, or is read-only`)
  return {
    name,
    nameBytes,
    description: descriptionBytes,
    device,
    readOnly: readOnly || device.readOnly,
    resizable,
    isUsedElsewhere,
    connections: 0,
    counters: {
      reads: 0,
      writes: 0,
      bytesRead: 0,
      bytesWritten: 0,
      flushes: 0,
      trims: 0,
      zeroes: 0,
      caches: 0,
      statuses: 0,
      resizes: 0,
      errors: 0,
    },
  }
}

const nobody = (): boolean => false
const largestBlock = 4096
const powerOfTwo = (value: number): boolean =>
  Number.isInteger(value) && value > 0 && Number.isInteger(Math.log2(value))
