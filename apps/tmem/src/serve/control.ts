/**
 * The control socket of `tmem serve`: one line of JSON asks, one line of JSON answers, then the connection ends.
 *
 * A socket that nobody listens on any more is what a killed server left; it is replaced. Requests are at most 4 KiB.
 */
import { statSync } from 'node:fs'
import { connect, createServer, type Server } from 'node:net'
import { setTimeout } from 'node:timers/promises'
import type { StatsNode } from '@tmem/core'
import { listenAtPath } from '@tmem/nbd'
import type { PageReport } from '@tmem/ramzswap'
import { Failed, throwIfInterrupted } from '../ending.ts'
import type { SocketAccess } from './endpoints.ts'
import { isTrusted, type Peer, peerOf } from './peer.ts'

/** Where it is unless said otherwise. */
export const defaultControl: string = `${process.env['XDG_RUNTIME_DIR'] ?? '/run'}/tmem.sock`

/** What can be asked. */
export type Request =
  | { readonly do: 'info' }
  | { readonly do: 'stats' }
  | ({ readonly do: 'users' } & Named)
  | ({ readonly do: 'explain' } & ExplainRequest)
  | ({ readonly do: 'knobs' } & KnobsRequest)

/** Which device. */
interface Named {
  readonly device: string
}

/** The page at an offset in bytes. */
export interface ExplainRequest extends Named {
  readonly offset: number
}

/** The knobs of a device; with a name that one; with a value it is turned. */
export interface KnobsRequest extends Named {
  readonly name?: string
  readonly value?: string
}

/** What a server is. */
export interface Info {
  readonly pid: number
  readonly stack: string
  /** What is offered each page first, or null. */
  readonly hypervisor: string | null
  readonly devices: readonly { readonly name: string; readonly sizeBytes: number }[]
  /** Files that are served through a page cache, to be read alone. */
  readonly pageCaches: readonly { readonly name: string; readonly sizeBytes: number }[]
  /** Caches of values, and where clients of Redis find them. */
  readonly caches: readonly { readonly name: string; readonly listen: string }[]
  readonly nbd: readonly string[]
  /** Directory of the FUSE mount, as the kernel calls it, or null. */
  readonly fuse: string | null
  /** Where Prometheus reads, or null. */
  readonly metrics: string | null
  /** Number of that mount's file system, `MAJOR:MINOR`: its files are those whose `stat` says so. */
  readonly fileSystem: string | null
  /** Address of its console, or null. */
  readonly http: string | null
}

/** The answers, by request. */
export interface Answers {
  readonly info: Info
  readonly stats: {
    readonly info: Info
    readonly devices: readonly StatsNode[]
    readonly pageCaches: readonly StatsNode[]
    readonly caches: readonly StatsNode[]
    readonly servers: readonly StatsNode[]
  }
  /** How many connections and open files lead to a device now. */
  readonly users: { readonly clients: number; readonly opens: number }
  /** The page there, and the name of the codec that made its block: null where none did, or only the block knows. */
  readonly explain: PageReport & { readonly device: string; readonly offset: number; readonly codecName: string | null }
  /** Name and value of each knob that was asked for; of one that was turned, what it says to that. */
  readonly knobs: Readonly<Record<string, string>>
}

/** Answers what is asked; `peer`: who asks. Throws, or rejects, for what it does not know or cannot do. */
export type Answer = (request: Request, peer: () => Peer | undefined) => object | Promise<object>

const maxRequest = 4096
const patienceMs = 10_000

/**
 * Listens; `answer` throws for what it does not know or cannot do, which is answered, and told to `refused`. Rejects
 * with `Failed` when the socket cannot be had.
 */
export async function serveControl(
  { path, mode, gid }: { readonly path: string } & SocketAccess,
  answer: Answer,
  refused: (error: Error) => void,
): Promise<Server> {
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    let text = ''
    socket.setEncoding('utf8')
    socket.setTimeout(patienceMs, () => socket.destroy())
    // Whoever asked may go away at any time.
    socket.on('error', () => socket.destroy())
    socket.on('data', (part: string) => {
      text += part
      const end = text.indexOf('\n')
      if (end < 0 && text.length <= maxRequest) return
      socket.removeAllListeners('data')
      // A knob may take its time.
      socket.setTimeout(0)
      void reply(text.slice(0, Math.max(end, 0)), (request) => answer(request, () => peerOf(socket)), refused).then(
        (said) => socket.end(`${JSON.stringify(said)}\n`),
      )
    })
  })
  await listenAtPath(server, path, mode, gid).catch((error: Error) => {
    throw new Failed(`the control socket ${path} cannot be made: ${error.message}`)
  })
  return server
}

async function reply(
  text: string,
  answer: (request: Request) => object | Promise<object>,
  refused: (error: Error) => void,
): Promise<object> {
  try {
    return await answer(JSON.parse(text) as Request)
  } catch (error) {
    refused(error as Error)
    return { error: (error as Error).message }
  }
}

/** Why nobody answers, and what to do. */
function noAnswer(path: string, { code, message }: NodeJS.ErrnoException): string {
  if (code === 'EACCES' || code === 'EPERM')
    return `this user may not open the control socket ${path} (${message}): ask as the user of its server or as root, or have tmem serve give it a group (--socket-group)`
  // What is no error of the system is our own patience, which came to its end.
  if (code === undefined)
    return `the server at ${path} ${message}: it is stopped or hangs, so look at its process; while it is there no other can start`
  return `no server at ${path} (${message}): start one with tmem serve, or name its --control`
}

const retryMs = 200

/** Asks until a server answers, so many seconds: who starts one in the background cannot know when it serves. */
export async function infoWithin(seconds: number, control: string, signal: AbortSignal): Promise<Info> {
  const end = performance.now() + seconds * 1000
  for (;;) {
    try {
      return await ask(control, 'info')
    } catch (error) {
      if (performance.now() >= end) throw error
    }
    await setTimeout(retryMs, undefined, { signal }).catch(() => undefined)
    throwIfInterrupted(signal)
  }
}

/**
 * Asks a server. Rejects with `Failed` when there is none, when it is somebody else's, or when it answers with an
 * error.
 */
export function ask<Kind extends Request['do']>(
  path: string,
  kind: Kind,
  ...[details]: Kind extends 'knobs'
    ? [KnobsRequest]
    : Kind extends 'explain'
      ? [ExplainRequest]
      : Kind extends 'users'
        ? [Named]
        : []
): Promise<Answers[Kind]> {
  return new Promise((resolve, reject) => {
    const socket = connect(path)
    let text = ''
    socket.setEncoding('utf8')
    if (kind !== 'knobs')
      socket.setTimeout(patienceMs, () =>
        socket.destroy(new Error(`has not answered for ${patienceMs / 1000} seconds`)),
      )
    socket.on('connect', () => {
      const user = peerOf(socket)?.uid ?? statSync(path).uid
      if (isTrusted(user)) socket.write(`${JSON.stringify({ do: kind, ...details })}\n`)
      else {
        reject(new Failed(`the server at ${path} is user ${user}'s, and is not asked: what it says could be anything`))
        socket.destroy()
      }
    })
    socket.on('data', (part: string) => {
      text += part
    })
    socket.on('error', (error: NodeJS.ErrnoException) => reject(new Failed(noAnswer(path, error))))
    socket.on('end', () => {
      let answer: unknown
      try {
        answer = JSON.parse(text)
      } catch {
        reject(new Failed(`the server at ${path} has not answered with JSON`))
        return
      }
      if (typeof answer === 'object' && answer !== null && 'error' in answer)
        reject(new Failed(`the server at ${path}: ${String(answer.error)}`))
      // A host of Xen knows some of the words, too.
      else if (kind === 'info' && !Array.isArray((answer as Partial<Info> | null)?.devices))
        reject(new Failed(`what answers at ${path} is no server of devices: name another --control`))
      else resolve(answer as Answers[Kind])
    })
  })
}
