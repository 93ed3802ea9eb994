/**
 * Where `tmem serve` listens for NBD, as it is said on the command line.
 *
 * TLS is for TCP, and then required of every client. Its directory has the names that QEMU, libnbd and nbdkit use:
 * server-cert.pem, server-key.pem, and ca-cert.pem when clients have to show a certificate, too. So one directory
 * serves all of them.
 */
import { spawnSync } from 'node:child_process'
import { readFileSync, realpathSync, statSync } from 'node:fs'
import { isIP } from 'node:net'
import { dirname, join, resolve } from 'node:path'
import { createSecureContext } from 'node:tls'
import { parseBytes } from '@tmem/core'
import type { NbdEndpoint, NbdLimits, NbdTls } from '@tmem/nbd'
import { BadInput } from '../ending.ts'

/** What the command line says of NBD. */
export interface EndpointOptions {
  /** `unix:PATH` or `tcp:HOST:PORT`. */
  readonly nbd?: readonly string[]
  /** Directory with the server's certificate and key. */
  readonly tlsCertificates?: string
  readonly tlsVerifyPeer?: true
  /** `NAME=VALUE,…`. */
  readonly nbdLimits?: string
  /** Octal permissions, and name or number of a group: of the unix sockets that it makes. */
  readonly socketMode?: string
  readonly socketGroup?: string
}

/** Who may connect to the unix sockets of a server. */
export interface SocketAccess {
  readonly mode?: number
  readonly gid?: number
}

/**
 * What `--socket-mode` and `--socket-group` say. Throws `BadInput` for what is no mode, and for a group that there is
 * not.
 */
export function accessOf({ socketMode, socketGroup }: EndpointOptions): SocketAccess {
  if (socketMode !== undefined && !/^0?[0-7]{3}$/.test(socketMode))
    throw new BadInput(`bad --socket-mode "${socketMode}": expected three octal digits, such as 660`)
  if (socketGroup === undefined) return socketMode === undefined ? {} : { mode: Number.parseInt(socketMode, 8) }
  return { mode: Number.parseInt(socketMode ?? '660', 8), gid: groupNumber(socketGroup) }
}

function groupNumber(group: string): number {
  if (/^\d{1,9}$/.test(group)) return Number(group)
  // As the system looks names up, wherever they come from.
  const found = spawnSync('getent', ['group', '--', group], { encoding: 'utf8' })
  const [, number] = /^[^:]*:[^:]*:(\d+):/.exec(found.stdout ?? '') ?? []
  if (number === undefined)
    throw new BadInput(`--socket-group: ${found.error?.message ?? `there is no group ${JSON.stringify(group)}`}`)
  return Number(number)
}

/** What `--nbd-limits` can set: how each is called there, and read. */
const limitNames = {
  connections: ['connections', Number, 1],
  'per-address': ['connectionsPerAddress', Number, 1],
  requests: ['requests', Number, 1],
  bytes: ['bytes', parseBytes, 1],
  handshake: ['handshakeMs', (text: string) => Number(text) * 1000, 1],
  keepalive: ['keepAliveMs', (text: string) => Number(text) * 1000, 0],
} as const

/** Limits on what clients can do. Throws `BadInput` for what is none. */
export function limitsOf({ nbdLimits }: EndpointOptions): NbdLimits {
  const limits: Record<string, number> = {}
  for (const part of nbdLimits?.split(',') ?? []) {
    const [name = '', text = ''] = part.split('=')
    const known = limitNames[name as keyof typeof limitNames]
    const [key, read, least] = known ?? []
    const value = text === '' ? undefined : read?.(text)
    if (key === undefined || value === undefined || !Number.isSafeInteger(value) || value < least! || value >= 2 ** 48)
      throw new BadInput(
        `bad --nbd-limits "${part}": expected ${Object.keys(limitNames).join('=…, ')}=…, with commas between; bytes as 64MiB, handshake and keepalive in seconds`,
      )
    limits[key] = value
  }
  const longest = 2 ** 31 - 1
  if ((limits['handshakeMs'] ?? 0) > longest || (limits['keepAliveMs'] ?? 0) > longest)
    throw new BadInput(`bad --nbd-limits "${nbdLimits}": handshake and keepalive are at most ${longest / 1000} seconds`)
  return limits
}

/**
 * All endpoints, `descriptors` of sockets that listen already among them. Throws `BadInput` for addresses, files or
 * combinations that make no sense.
 */
export function endpointsOf(options: EndpointOptions, descriptors: readonly number[]): NbdEndpoint[] {
  const { nbd = [], tlsCertificates, tlsVerifyPeer } = options
  if (tlsVerifyPeer === true && tlsCertificates === undefined)
    throw new BadInput('--tls-verify-peer needs --tls-certificates, the directory with ca-cert.pem')
  const tls = tlsCertificates === undefined ? undefined : tlsOf(tlsCertificates, tlsVerifyPeer === true)
  const access = accessOf(options)
  const endpoints: NbdEndpoint[] = nbd.map((text) => endpointOf(text, tls, access))
  for (const fd of descriptors) endpoints.push(tls === undefined ? { fd } : { fd, tls })
  if (tls !== undefined && endpoints.every((endpoint) => 'path' in endpoint))
    throw new BadInput('--tls-certificates is for TCP: add --nbd tcp:HOST:PORT, or leave it out')
  return endpoints
}

/** Bytes that the system has for the path of a socket; the runtime would cut off what is more. */
const mostPathBytes = 107

/** A path at which a socket can be made. Throws `BadInput` for any other. */
export function socketPath(text: string): string {
  const path = resolve(text)
  if (Buffer.byteLength(path) > mostPathBytes)
    throw new BadInput(
      `the path of a socket has at most ${mostPathBytes} bytes: ${path} has ${Buffer.byteLength(path)}`,
    )
  try {
    // The folder first: of a file in its place some runtimes say that there is nothing, others ENOTDIR.
    const folder = statSync(dirname(path), { throwIfNoEntry: false })
    if (folder === undefined)
      throw new BadInput(
        `the socket ${path} cannot be made: there is no directory ${dirname(path)}: make it with mkdir -p`,
      )
    if (!folder.isDirectory()) throw new BadInput(`the socket ${path} cannot be made: ${dirname(path)} is no directory`)
    const found = statSync(path, { throwIfNoEntry: false })
    if (found !== undefined && !found.isSocket())
      throw new BadInput(`${path} is there, and no socket: name another path`)
    assertOwnFolder(path)
  } catch (error) {
    if (error instanceof BadInput) throw error
    throw new BadInput(`the socket ${path} cannot be made: ${(error as Error).message}`)
  }
  return path
}

/**
 * Throws `BadInput` when another user could put something else under a name: in its folder, or in one of those that
 * lead there. In a folder with the sticky bit (`/tmp`) nobody takes away what is another one's.
 */
function assertOwnFolder(path: string): void {
  for (let at = realpathSync(dirname(path)); ; at = dirname(at)) {
    const { uid, gid, mode } = statSync(at)
    const what = `the socket ${path} would lie in ${at}`
    if (uid !== 0 && uid !== process.geteuid?.()) throw new BadInput(`${what}, which is user ${uid}'s: name your own`)
    // A group of the user's own number is nobody else's, where systems give each user one.
    const others = mode & (gid === uid ? 0o002 : 0o022)
    if (others !== 0 && (mode & sticky) === 0)
      throw new BadInput(`${what}, where others may write (chmod go-w), so they could replace it: name another`)
    if (at === dirname(at)) return
  }
}

const sticky = 0o1000

/** Where a cache of values listens. */
export type CacheEndpoint = ({ readonly path: string } & SocketAccess) | TcpAddress

/** What the address of a cache says. Throws `BadInput` for what is none. */
export const cacheEndpointOf = (text: string, access: SocketAccess): CacheEndpoint =>
  endpointOf(text, undefined, access) as CacheEndpoint

/** Whether only this host reaches what listens there. */
export const isLoopback = (host: string): boolean =>
  host === 'localhost' || host === '::1' || (isIP(host) === 4 && host.startsWith('127.'))

function endpointOf(text: string, tls: NbdTls | undefined, access: SocketAccess): NbdEndpoint {
  const unix = /^unix:(.+?)(?:,mode=([0-7]{3,4}))?$/.exec(text)
  if (unix !== null) {
    const path = socketPath(unix[1]!)
    return { path, ...access, ...(unix[2] === undefined ? {} : { mode: Number.parseInt(unix[2], 8) & 0o777 }) }
  }
  const address = tcpOf(text)
  if (address === undefined) throw new BadInput(`bad address "${text}": expected unix:PATH or tcp:HOST:PORT`)
  return tls === undefined ? address : { ...address, tls }
}

/** A host and a port of TCP. */
export interface TcpAddress {
  readonly host: string
  readonly port: number
}

/** What `tcp:HOST:PORT` says; `undefined`: it is something else. */
function tcpOf(text: string): TcpAddress | undefined {
  const tcp = /^tcp:(.+):(\d+)$/.exec(text)
  if (tcp === null || Number(tcp[2]) > 65535) return undefined
  return { host: tcp[1]!.replaceAll(/^\[|\]$/g, ''), port: Number(tcp[2]) }
}

/** Where `--metrics` says that Prometheus reads. Throws `BadInput` for what is no address. */
export function metricsAddress(text: string): TcpAddress {
  const address = tcpOf(text)
  if (address === undefined)
    throw new BadInput(`bad --metrics "${text}": expected tcp:HOST:PORT, e.g. tcp:127.0.0.1:9464`)
  return address
}

function tlsOf(directory: string, verifyClients: boolean): NbdTls {
  try {
    const read = (name: string): Buffer => readFileSync(join(directory, name))
    const tls = {
      cert: read('server-cert.pem'),
      key: read('server-key.pem'),
      ...(verifyClients ? { ca: read('ca-cert.pem'), verifyClients } : {}),
    }
    // What is no certificate, or not the key's, is found now and not when the first client comes.
    createSecureContext(tls)
    return tls
  } catch (error) {
    throw new BadInput(`--tls-certificates ${directory}: ${(error as Error).message}`)
  }
}
