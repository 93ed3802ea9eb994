/**
 * The process at the other end of a unix socket, and its user, as the kernel recorded them when the process listened or
 * connected. The owner of the socket's file proves less: in a directory where others may write, the name can lead to
 * anything.
 *
 * Source: unix(7), SO_PEERCRED; getsockopt(2).
 */
import { createRequire } from 'node:module'
import type { Socket } from 'node:net'

type Koffi = typeof import('koffi')

/** The architectures on which these two constants have these values; on others the peer is unknown. */
const socketLevel = 1
const peerCredentials = 17
const architectures: ReadonlySet<string> = new Set(['x64', 'ia32', 'arm', 'arm64', 'riscv64', 'loong64', 's390x'])

/** A process at the other end, and its user. The process may have ended meanwhile. */
export interface Peer {
  readonly pid: number
  readonly uid: number
}

/** The peer of a connected socket; `undefined` without koffi, or if the system does not say. */
export function peerOf(socket: Socket): Peer | undefined {
  if (process.platform !== 'linux' || !architectures.has(process.arch)) return undefined
  // `_handle` is not part of the documented interface of Node.
  const { _handle: handle } = socket as unknown as { _handle?: { readonly fd?: number } | null }
  const descriptor = handle?.fd
  if (descriptor === undefined || descriptor < 0) return undefined
  let koffi: Koffi
  try {
    koffi = createRequire(import.meta.url)('koffi') as Koffi
  } catch {
    // An optional dependency.
    return undefined
  }
  const getsockopt = koffi.load(null).func('int getsockopt(int, int, int, _Out_ uint32_t *, _Inout_ uint32_t *)')
  const credentials = new Uint32Array(3)
  const length = new Uint32Array([credentials.byteLength])
  const done = getsockopt(descriptor, socketLevel, peerCredentials, credentials, length) as number
  if (done !== 0 || length[0] !== credentials.byteLength) return undefined
  return { pid: credentials[0]!, uid: credentials[1]! }
}

/** Whether to trust the answers of a user's process: of the own user, or of root, who may do anything anyway. */
export const isTrusted = (user: number): boolean => user === 0 || user === process.geteuid?.()
