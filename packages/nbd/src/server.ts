/**
 * The server: exports, endpoints, limits, TLS. What is said on a connection is in connection.ts.
 *
 * A unix socket, or TCP without TLS, is received from into the connection's own chunks and sent to by direct system
 * calls; where the runtime does not allow that, and under TLS, through Node's streams (wires.ts). Both speak the same
 * protocol. Who may come in is decided in door.ts, who is served next in turns.ts.
 */
import { fstatSync } from 'node:fs'
import { createServer, type Server, Socket } from 'node:net'
import { type BlockDevice, type ByteAmount, bytesOf, checkOptions, type OptionNames, type StatsNode } from '@tmem/core'
import { ChunkPool } from './chunks.ts'
import { Connection, type ConnectionOptions, type Service } from './connection.ts'
import { addressClass, Door, type Guest, type NbdRefusal } from './door.ts'
import type { Served } from './negotiation.ts'
import { MAXIMUM_STRING } from './protocol.ts'
import { slicesOf } from './slices.ts'
import { listenAtPath, listening } from './socket-path.ts'
import { type NbdTls, Securing } from './tls.ts'
import { Turns } from './turns.ts'
import { type DirectOptions, DirectWire, handleOf, type SocketHandle, StreamWire } from './wires.ts'

/** What clients see under one name. */
export interface NbdExport {
  /** Up to 4096 bytes of UTF-8; the empty name (the default) is what a client gets that names none. */
  readonly name?: string
  /** Also what a client gets that names none. At most one export is. */
  readonly isDefault?: boolean
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
  /**
   * Clients that are served at once (default 256); as many more may be negotiating. One more is told so when it has
   * negotiated.
   */
  readonly connections?: number
  /** Of these, connections from one address on TCP: an IPv4 address, or a /64 network of IPv6 (default 64). */
  readonly connectionsPerAddress?: number
  /** Milliseconds that a client has to negotiate, TLS included (default 10,000). */
  readonly handshakeMs?: number
  /**
   * Requests that a connection may have at work in devices that have to wait (default 128). All connections together:
   * 32 times as many, and one for each.
   */
  readonly requests?: number
  /**
   * Bytes of buffers, over all connections (default 64 MiB), a quarter of them for each at most. Beyond it each
   * connection has one request in flight, and at most four buffers of 20 KiB. All of it is reserved when the server is
   * made.
   */
  readonly bytes?: ByteAmount
  /**
   * Milliseconds of silence after which the system asks the peer of a TCP connection whether it is there (default
   * 60,000); some ten seconds later one that does not answer is gone. 0: it is never asked.
   */
  readonly keepAliveMs?: number
}

/** Where the server listens. */
export type NbdEndpoint =
  | {
      /** Path of a unix socket. A socket of this user that nobody listens on is replaced. */
      readonly path: string
      /** Its permissions (default 0600: who is not its owner, or root, cannot connect). */
      readonly mode?: number
      /** Number of its group (default: that of this process, or of the folder). Has to be one of this user's. */
      readonly gid?: number
    }
  | {
      /** 0: any free one. The protocol's own port is 10809. */
      readonly port: number
      /** Default `127.0.0.1`. */
      readonly host?: string
      readonly tls?: NbdTls
    }
  | {
      /** A socket that listens already, by its descriptor: who started this process made it (socket activation). */
      readonly fd: number
      /** Only where it is TCP: a unix socket is not secured. */
      readonly tls?: NbdTls
    }

/** Where the server listens, as it came to be. */
export type NbdAddress =
  | { readonly path: string }
  | { readonly host: string; readonly port: number }
  /** A unix socket that was handed over. */
  | { readonly fd: number }

/** Settings of a server. */
export interface NbdServerOptions {
  readonly exports: readonly NbdExport[]
  readonly limits?: NbdLimits
  /** A device failed; the client has its answer already. */
  readonly onError?: (error: unknown, exportName: string) => void
  /** A client was sent away; it is counted, and where the protocol lets it be told, it was. */
  readonly onRefused?: (refusal: NbdRefusal) => void
  /**
   * How many turns the event loop makes without sleeping after bytes have come, as long as more often follow (default
   * 50, about a tenth of a millisecond). The next request is then answered sooner, for the price of a processor that
   * does not rest while a client is busy; 0 turns it off.
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
  checkOptions('nbdServer', options, {
    exports: 'list',
    limits: 'object?',
    onError: 'function?',
    onRefused: 'function?',
    busyTurns: 'number?',
  })
  for (const given of options.exports) checkOptions('an export of nbdServer', given, exportNames)
  return new NodeNbdServer(options)
}

/** Where the first bytes are received after a pause: what is received there is copied on at once. */
const restartBytes = 4096
/** The loop stops turning after so many times in vain, and tries again at every so many-th arrival. */
const patience = 8
const retryAfter = 16
const exportNames: OptionNames<NbdExport> = {
  name: true,
  isDefault: 'flag?',
  description: true,
  device: 'object',
  readOnly: 'flag?',
  resizable: 'flag?',
  isUsedElsewhere: 'function?',
}
const limitNames: OptionNames<NbdLimits> = {
  connections: 'number?',
  connectionsPerAddress: 'number?',
  handshakeMs: 'number?',
  requests: 'number?',
  bytes: 'bytes?',
  keepAliveMs: 'number?',
}
const defaults = {
  connections: 256,
  connectionsPerAddress: 64,
  handshakeMs: 10_000,
  requests: 128,
  bytes: 64 * 2 ** 20,
  keepAliveMs: 60_000,
}
/** Requests in flight on all connections, as a multiple of what one may have. */
const togetherFactor = 32
/** Largest delay of a timer. */
const longestMs = 2 ** 31 - 1

class NodeNbdServer implements NbdServer {
  readonly #service: Service
  readonly #served: readonly Served[]
  readonly #pool: ChunkPool
  readonly #door: Door
  readonly #handshakeMs: number
  readonly #keepAliveMs: number
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
  #secured = 0
  #closing: Promise<void> | undefined
  #closed = false

  constructor({ exports, limits = {}, onError, onRefused, busyTurns = 50 }: NbdServerOptions) {
    this.#served = exports.map(servedOf)
    const byName = new Map(this.#served.map((served) => [served.name, served]))
    if (byName.size !== this.#served.length) throw new RangeError('two exports have the same name')
    for (const [n, { isDefault }] of exports.entries())
      if (isDefault === true) {
        const served = this.#served[n]!
        if (byName.has('') && byName.get('') !== served)
          throw new RangeError('two exports are for clients that name none')
        byName.set('', served)
      }
    checkOptions('limits of nbdServer', limits, limitNames)
    const all = {
      ...defaults,
      ...limits,
      bytes: bytesOf('limits of nbdServer', 'bytes', limits.bytes ?? defaults.bytes),
    }
    for (const [name, value] of Object.entries(all)) {
      const least = name === 'keepAliveMs' ? 0 : 1
      const most = name.endsWith('Ms') ? longestMs : Number.MAX_SAFE_INTEGER
      if (!Number.isSafeInteger(value) || value < least || value > most)
        throw new RangeError(`limits.${name} must be an integer from ${least} to ${most}, got ${value}`)
    }
    const { connections, requests, bytes } = all
    if (!Number.isSafeInteger(busyTurns) || busyTurns < 0)
      throw new RangeError(`busyTurns must not be negative, got ${busyTurns}`)
    this.#busyTurns = busyTurns
    this.#handshakeMs = all.handshakeMs
    this.#keepAliveMs = all.keepAliveMs
    this.#door = new Door(all, (refusal) => {
      // Who is sent away because the server ends was not refused.
      if (!this.#closed) onRefused?.(refusal)
    })
    this.#pool = new ChunkPool(bytes, 2 * connections)
    this.#service = {
      exports: byName,
      pool: this.#pool,
      turns: new Turns(),
      requests,
      together: { inFlight: 0, limit: togetherFactor * requests },
      failed: (error, { name }) => onError?.(error, name),
      ...(busyTurns > 0 ? { hold: (connection) => this.#hold(connection) } : {}),
    }
  }

  async listen(endpoint: NbdEndpoint): Promise<NbdAddress> {
    if (this.#closed) throw new TypeError('the server was closed')
    checkEndpoint(endpoint)
    const tls = 'tls' in endpoint ? endpoint.tls : undefined
    const securing = tls === undefined ? undefined : new Securing(tls, this.#handshakeMs)
    const keepAlive = { keepAlive: this.#keepAliveMs > 0, keepAliveInitialDelay: this.#keepAliveMs }
    const server = createServer({ noDelay: true, pauseOnConnect: true, ...keepAlive }, (socket) => {
      if (this.#closed) socket.destroy()
      else this.#accept(socket, securing)
    })
    if ('path' in endpoint) await listenAtPath(server, endpoint.path, endpoint.mode, endpoint.gid)
    else if ('fd' in endpoint) await listening(server, socketOf(endpoint.fd))
    else await listening(server, { port: endpoint.port, host: endpoint.host ?? '127.0.0.1' })
    this.#listeners.add(server)
    const address = server.address()
    if (typeof address === 'object' && address !== null) return { host: address.address, port: address.port }
    return 'fd' in endpoint ? { fd: endpoint.fd } : { path: String(address) }
  }

  stats(): StatsNode {
    return {
      name: 'nbd',
      counters: {
        connections: this.#connections.size,
        accepted: this.#accepted,
        negotiating: this.#door.standing,
        refused: Object.values(this.#door.counts).reduce((sum, count) => sum + count, 0),
        ...Object.fromEntries(Object.entries(this.#door.counts).map(([reason, count]) => [`refused_${reason}`, count])),
        secured: this.#secured,
        buffer_bytes: this.#pool.used,
        peak_buffer_bytes: this.#pool.peak,
        reserved_buffer_bytes: this.#pool.reservedBytes,
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

  #accept(socket: Socket, secures: Securing | undefined): void {
    const { remoteAddress, remotePort } = socket
    const securing = remoteAddress === undefined ? undefined : secures
    const guest: Guest = {
      peer: remoteAddress === undefined ? 'a unix socket' : `${remoteAddress}:${remotePort}`,
      address: addressClass(remoteAddress),
      // Until it is served by something else, which is a socket around the same handle.
      close: () => socket.destroy(),
    }
    socket.on('error', ignoreReset)
    if (!this.#door.enter(guest)) return
    this.#accepted++
    const handle = securing === undefined ? handleOf(socket) : undefined
    if (handle !== undefined) this.#direct(socket, handle, guest)
    else {
      this.#open(socket, guest)
      const tls = securing === undefined ? 'none' : securing.optional ? 'optional' : 'required'
      const startTls = (clientFlags: number): void =>
        securing?.begin(socket, {
          secured: (secured, refusal) => this.#secure(secured, guest, clientFlags, refusal),
          failed: (reason) => this.#door.refuse(guest, 'tls', `TLS failed: ${reason}`),
        })
      this.#stream(socket, guest, { tls, ...(securing === undefined ? {} : { startTls }) })
    }
  }

  #secure(socket: Socket, guest: Guest, clientFlags: number, refusal: string | undefined): void {
    socket.on('error', ignoreReset)
    if (refusal === undefined) this.#secured++
    else this.#door.tell(guest, 'tls', refusal)
    this.#stream(socket, guest, { tls: 'on', clientFlags, refusal })
  }

  #open(socket: Socket, guest: Guest): void {
    this.#sockets.add(socket)
    socket.on('error', ignoreReset)
    socket.on('close', () => {
      this.#sockets.delete(socket)
      this.#door.leave(guest)
    })
  }

  /** Serves a connection through Node's stream. */
  #stream(socket: Socket, guest: Guest, options: ConnectionOptions): void {
    const wire = new StreamWire(socket)
    const take = (bytes: Buffer): void => {
      const more = connection.feed(bytes)
      if (!more) socket.pause()
      this.#busy(more)
    }
    const over = (): void => {
      if (connection.needsTls) this.#door.tell(guest, 'tls', 'it does not use TLS')
      connection.closed()
      this.#connections.delete(connection)
    }
    const begin = (flags: number): void => {
      socket.off('data', take)
      socket.off('close', over)
      socket.pause()
      this.#connections.delete(connection)
      options.startTls?.(flags)
    }
    const connection = new Connection(this.#service, wire, {
      ...options,
      admit: () => this.#door.admit(guest),
      ...(options.startTls === undefined ? {} : { startTls: begin }),
    })
    this.#connections.add(connection)
    socket.on('data', take)
    socket.on('close', over)
    if (options.clientFlags === undefined) connection.greet()
    socket.resume()
  }

  /** Serves a connection with as little as possible between it and the system. */
  #direct(accepted: Socket, handle: SocketHandle, guest: Guest): void {
    const wire = new DirectWire(handle.fd)
    const connection = new Connection(this.#service, wire, { tls: 'none', admit: () => this.#door.admit(guest) })
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
    this.#open(socket, guest)
    guest.close = () => socket.destroy()
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
   * Bytes have come: more may follow soon, and a loop that still turns need not be woken. Where they mostly do not
   * follow, it is tried again only now and then. None will follow as long as a connection takes no `more`.
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

/** A client that vanishes is nobody's error: `close` follows, and everything is ended there. */
const ignoreReset = (): void => {}

/** A descriptor that was handed over. Throws for what is no socket. */
function socketOf(fd: number): { fd: number } {
  if (!fstatSync(fd).isSocket()) throw new TypeError(`descriptor ${fd} is no socket`)
  return { fd }
}

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
    slices: slicesOf(device),
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

function checkEndpoint(endpoint: NbdEndpoint): void {
  const who = 'an endpoint of nbdServer'
  // Only to have anything else told: an object with the names of all three kinds.
  checkOptions<{ path?: string; mode?: number; gid?: number; port?: number; host?: string; fd?: number; tls?: NbdTls }>(
    who,
    endpoint,
    {
      path: 'text?',
      mode: 'number?',
      gid: 'number?',
      port: 'number?',
      host: 'text?',
      fd: 'number?',
      tls: 'object?',
    },
  )
  const kinds = ['path', 'port', 'fd'].filter((name) => endpoint[name as keyof NbdEndpoint] !== undefined)
  if (kinds.length !== 1)
    throw new TypeError(`${who} has a path, a port or an fd; this has ${kinds.join(' and ') || 'none of them'}`)
  if ('path' in endpoint)
    checkOptions(`${who} with a path`, endpoint, { path: 'text', mode: 'number?', gid: 'number?' })
  else if ('fd' in endpoint) checkOptions(`${who} with an fd`, endpoint, { fd: 'number', tls: 'object?' })
  else checkOptions(`${who} with a port`, endpoint, { port: 'number', host: 'text?', tls: 'object?' })
}

const nobody = (): boolean => false
const largestBlock = 4096
const powerOfTwo = (value: number): boolean =>
  Number.isInteger(value) && value > 0 && Number.isInteger(Math.log2(value))
