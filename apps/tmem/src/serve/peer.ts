/**
 * Who is at the other end of a unix socket: the process that listens there, or connected, and its user, as the kernel
 * noted when it did.
 * Whose file the socket is says less: a folder in which others may write can have anything under that name.
 *
 * Source: unix(7), SO_PEERCRED; getsockopt(2).
 */
import { createRequire } from 'node:module'
import type { Socket } from 'node:net'

type Koffi = typeof import('koffi')

/** These two have other numbers on some architectures that Node runs on; there it is not asked. */
const socketLevel = 1
const peerCredentials = 17
const architectures: ReadonlySet<string> = new Set(['x64', 'ia32', 'arm', 'arm64', 'riscv64', 'loong64', 's390x'])

/** A process at the other end, and its user. The process may have ended meanwhile. */
export interface Peer {
  readonly pid: number
  readonly uid: number
}

/** Who is at the other end of a connected socket; `undefined` where the system or koffi does not tell. */
export function peerOf(socket: Socket): Peer | undefined {
  if (process.platform !== 'linux' || !architectures.has(process.arch)) return undefined
  // Not part of the runtime's documented interface: used where it is there.
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

/** Whether what a user's process says may be acted upon: the own user's, or root's, who may do anything anyway. */
export const isTrusted = (user: number): boolean => user === 0 || user === process.geteuid?.()
