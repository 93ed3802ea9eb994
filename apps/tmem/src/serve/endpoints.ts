/**
 * The addresses on which `tmem serve` listens, from its command line.
 *
 * TLS is for TCP, and then every client must use it. The file names in its directory are those of QEMU, libnbd and
 * nbdkit (server-cert.pem, server-key.pem, and ca-cert.pem if clients need a certificate), so that all of them can
 * share a directory.
 */
import { spawnSync } from 'node:child_process'
import { readFileSync, realpathSync, statSync } from 'node:fs'
import { isIP } from 'node:net'
import { dirname, join, resolve } from 'node:path'
import { createSecureContext } from 'node:tls'
import { parseBytes } from '@tmem/core'
import type { NbdEndpoint, NbdLimits, NbdTls } from '@tmem/nbd'
import { BadInput } from '../ending.ts'

/** The options for NBD on the command line. */
export interface EndpointOptions {
  /** `unix:PATH` or `tcp:HOST:PORT`. */
  readonly nbd?: readonly string[]
  /** Directory with the server's certificate and key. */
  readonly tlsCertificates?: string
  readonly tlsVerifyPeer?: true
  /** `NAME=VALUE,…`. */
  readonly nbdLimits?: string
  /** Octal permissions, and name or number of the group, of the unix sockets that the server makes. */
  readonly socketMode?: string
  readonly socketGroup?: string
}

/** Who may connect to the unix sockets of a server. */
export interface SocketAccess {
  readonly mode?: number
  readonly gid?: number
}

/** The meaning of `--socket-mode` and `--socket-group`. Throws `BadInput` for a bad mode and for an unknown group. */
export function accessOf({ socketMode, socketGroup }: EndpointOptions): SocketAccess {
  if (socketMode !== undefined && !/^0?[0-7]{3}$/.test(socketMode))
    throw new BadInput(`bad --socket-mode "${socketMode}": expected three octal digits, such as 660`)
  if (socketGroup === undefined) return socketMode === undefined ? {} : { mode: Number.parseInt(socketMode, 8) }
  return { mode: Number.parseInt(socketMode ?? '660', 8), gid: groupNumber(socketGroup) }
}

function groupNumber(group: string): number {
  if (/^\d{1,9}$/.test(group)) return Number(group)
  // getent asks all name services of the system.
  const found = spawnSync('getent', ['group', '--', group], { encoding: 'utf8' })
  const [, number] = /^[^:]*:[^:]*:(\d+):/.exec(found.stdout ?? '') ?? []
  if (number === undefined)
    throw new BadInput(`--socket-group: ${found.error?.message ?? `there is no group ${JSON.stringify(group)}`}`)
  return Number(number)
}

/** The names in `--nbd-limits`, and how to parse their values. */
const limitNames = {
  connections: ['connections', Number, 1],
  'per-address': ['connectionsPerAddress', Number, 1],
  requests: ['requests', Number, 1],
  bytes: ['bytes', parseBytes, 1],
  handshake: ['handshakeMs', (text: string) => Number(text) * 1000, 1],
  keepalive: ['keepAliveMs', (text: string) => Number(text) * 1000, 0],
} as const

/** Limits on clients. Throws `BadInput` for bad ones. */
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
 * All endpoints, including `descriptors` of sockets that listen already. Throws `BadInput` for bad addresses, files or
 * combinations.
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
    throw new BadInput('--tls-certificates is for TCP: add --nbd tcp:HOST:PORT, or leave out --tls-certificates')
  return endpoints
}

/** Most bytes of a socket's path in the system; the runtime would cut a longer path. */
const mostPathBytes = 107

/** Checks that a socket can be created at a path. Throws `BadInput` if not. */
export function socketPath(text: string): string {
  const path = resolve(text)
  if (Buffer.byteLength(path) > mostPathBytes)
    throw new BadInput(
      `the path ${path} has ${Buffer.byteLength(path)} bytes, and that of a socket at most ${mostPathBytes}: name a shorter one`,
    )
  try {
    // The directory first: if a file is in its place, some runtimes report ENOENT and others ENOTDIR.
    const folder = statSync(dirname(path), { throwIfNoEntry: false })
    if (folder === undefined)
      throw new BadInput(
        `the socket ${path} cannot be created: the directory ${dirname(path)} does not exist: make it with mkdir -p`,
      )
    if (!folder.isDirectory())
      throw new BadInput(`the socket ${path} cannot be created: ${dirname(path)} is not a directory`)
    const found = statSync(path, { throwIfNoEntry: false })
    if (found !== undefined && !found.isSocket())
      throw new BadInput(`${path} exists and is not a socket: name another path`)
    assertOwnFolder(path)
  } catch (error) {
    if (error instanceof BadInput) throw error
    throw new BadInput(`the socket ${path} cannot be created: ${(error as Error).message}`)
  }
  return path
}

/**
 * Throws `BadInput` if another user could replace the file at a path, in its directory or in one that leads there. In a
 * directory with the sticky bit (`/tmp`) nobody can remove files of another user.
 */
function assertOwnFolder(path: string): void {
  for (let at = realpathSync(dirname(path)); ; at = dirname(at)) {
    const { uid, gid, mode } = statSync(at)
    const what = `the socket ${path} would lie in ${at}`
    if (uid !== 0 && uid !== process.geteuid?.()) throw new BadInput(`${what}, which is user ${uid}'s: name your own`)
    // A group with the number of the user is the user's private group on systems that have such groups.
    const others = mode & (gid === uid ? 0o002 : 0o022)
    if (others !== 0 && (mode & sticky) === 0)
      throw new BadInput(
        `${what}, where others could replace it: take away their right to write (chmod go-w), or name another path`,
      )
    if (at === dirname(at)) return
  }
}

const sticky = 0o1000

/** The address of a cache of values. */
export type CacheEndpoint = ({ readonly path: string } & SocketAccess) | TcpAddress

/** Parses the address of a cache. Throws `BadInput` for a bad one. */
export const cacheEndpointOf = (text: string, access: SocketAccess): CacheEndpoint =>
  endpointOf(text, undefined, access) as CacheEndpoint

/** Whether only this host can reach the address. */
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

/** Parses `tcp:HOST:PORT`; `undefined` for any other text. */
function tcpOf(text: string): TcpAddress | undefined {
  const tcp = /^tcp:(.+):(\d+)$/.exec(text)
  if (tcp === null || Number(tcp[2]) > 65535) return undefined
  return { host: tcp[1]!.replaceAll(/^\[|\]$/g, ''), port: Number(tcp[2]) }
}

/** Parses `--metrics`. Throws `BadInput` for a bad address. */
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
    // Finds a bad certificate, or a key that does not match, now and not when the first client connects.
    createSecureContext(tls)
    return tls
  } catch (error) {
    throw new BadInput(`--tls-certificates ${directory}: ${(error as Error).message}`)
  }
}
