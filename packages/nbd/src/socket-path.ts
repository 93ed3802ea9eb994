/**
 * A unix socket at a path: a dead one that lies there is replaced, one that is alive or somebody else's never.
 *
 * Invariant: from the look whether the socket there is dead to listening in its place nobody else does the same. A name
 * in the abstract namespace is held meanwhile, that of the folder (device and inode) and the name in it; the kernel
 * gives it to one listener, and it ends with its process. Who does not get it in time listens only where nothing is.
 *
 * Source: unix(7). Servers in different network namespaces have different such names.
 */
import { chmod, chown, lstat, rm, stat } from 'node:fs/promises'
import { connect, createServer, type ListenOptions, type Server } from 'node:net'
import { basename, dirname, resolve } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { isMainThread } from 'node:worker_threads'

/** How often, and how many milliseconds apart, the name is asked for. */
const tries = 100
const tryMs = 10

/**
 * Has a server listen at the path of a unix socket. A socket there that nobody listens on is replaced, if it is this
 * user's. `mode`: its permissions, whatever the umask is (default 0600: nobody but its user and root can connect). They
 * are its own from its first moment on, but for other threads than the main one, which cannot change the umask. `gid`:
 * the group that it is for (default: that of this process, or of the folder); until it is that group's, nobody but its
 * user can connect. Rejects with the system's error: `EADDRINUSE` when there is anything else, `EPERM` when the group
 * is not this user's to give.
 */
export async function listenAtPath(server: Server, path: string, mode = 0o600, gid?: number): Promise<void> {
  const claim = await claimPath(path)
  try {
    if (claim !== undefined) await removeDead(path)
    // The socket is made in this turn.
    const first = gid === undefined ? mode : mode & 0o700
    const mask = isMainThread ? process.umask(0o777 & ~first) : undefined
    const begun = listening(server, { path })
    if (mask !== undefined) process.umask(mask)
    await begun
    try {
      if (gid !== undefined) await chown(path, -1, gid)
      if (mask === undefined || first !== mode) await chmod(path, mode)
    } catch (error) {
      // Closing removes the socket.
      server.close()
      throw error
    }
  } finally {
    claim?.close()
  }
}

/** Resolves once the server listens; rejects with the system's error when it cannot. */
export function listening(server: Server, options: ListenOptions | { readonly fd: number }): Promise<void> {
  return new Promise((settle, reject) => {
    server.once('error', reject)
    server.listen(options, () => {
      server.off('error', reject)
      settle()
    })
  })
}

/** Holds the name that belongs to a path; `undefined`: it is not to be had. */
async function claimPath(path: string): Promise<Server | undefined> {
  if (process.platform !== 'linux') return createServer()
  const { dev, ino } = await stat(dirname(resolve(path)), { bigint: true })
  const name = `\0tmem socket ${dev} ${ino} ${basename(path)}`
  for (let n = 0; n < tries; n++) {
    const claim = createServer((stranger) => stranger.destroy())
    try {
      // Exclusive: not shared among the processes of a cluster.
      await listening(claim, { path: name, exclusive: true })
      return claim
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EADDRINUSE') throw error
    }
    await setTimeout(tryMs)
  }
  return undefined
}

/** Removes the socket of a server that did not live to remove it itself. */
async function removeDead(path: string): Promise<void> {
  const found = await lstat(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined
    throw error
  })
  if (found?.isSocket() !== true || found.uid !== process.geteuid?.()) return
  const refused = await new Promise<boolean>((settle) => {
    const trial = connect(path)
    trial.on('connect', () => {
      trial.destroy()
      settle(false)
    })
    trial.on('error', (error: NodeJS.ErrnoException) => settle(error.code === 'ECONNREFUSED'))
  })
  if (refused) await rm(path)
}
