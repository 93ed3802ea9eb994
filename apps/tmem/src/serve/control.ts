/**
 * The control socket of `tmem serve`: a request is one line of JSON, the answer another; then the connection ends.
 *
 * A socket without a listener is what a killed server left behind, and is replaced. Requests have at most 4 KiB.
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
import { formerServer } from './record.ts'

/** The default path of the socket. */
export const defaultControl: string = `${process.env['XDG_RUNTIME_DIR'] ?? '/run'}/tmem.sock`

/** The requests. */
export type Request =
  | { readonly do: 'info' }
  | { readonly do: 'stats' }
  | ({ readonly do: 'users' } & Named)
  | ({ readonly do: 'explain' } & ExplainRequest)
  | ({ readonly do: 'knobs' } & KnobsRequest)

/** Name of the device. */
interface Named {
  readonly device: string
}

/** The page at an offset in bytes. */
export interface ExplainRequest extends Named {
  readonly offset: number
}

/** All knobs of a device; with a name, one of them; with a value, sets that one. */
export interface KnobsRequest extends Named {
  readonly name?: string
  readonly value?: string
}

/** The facts about a server. */
export interface Info {
  readonly pid: number
  readonly stack: string
  /** The hypervisor that is offered each page first, or null. */
  readonly hypervisor: string | null
  readonly devices: readonly { readonly name: string; readonly sizeBytes: number }[]
  /** Files that are served read-only through a page cache. */
  readonly pageCaches: readonly { readonly name: string; readonly sizeBytes: number }[]
  /** Caches of values, and their addresses for clients of Redis. */
  readonly caches: readonly { readonly name: string; readonly listen: string }[]
  readonly nbd: readonly string[]
  /** Directory of the FUSE mount, under the kernel's name for it, or null. */
  readonly fuse: string | null
  /** Address of the metrics, or null. */
  readonly metrics: string | null
  /** Device number of the mount's file system, `MAJOR:MINOR`, which `stat` reports for its files. */
  readonly fileSystem: string | null
  /** Address of the console, or null. */
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
  /** The numbers of connections and open files of a device now. */
  readonly users: { readonly clients: number; readonly opens: number }
  /** The page, and the name of the codec of its block: null if there is none, or if only the block names it. */
  readonly explain: PageReport & { readonly device: string; readonly offset: number; readonly codecName: string | null }
  /** Name and value of each requested knob; for a knob that was set, its answer. */
  readonly knobs: Readonly<Record<string, string>>
}

/** Answers a request of `peer`. Throws, or rejects, for an unknown request and for a failure. */
export type Answer = (request: Request, peer: () => Peer | undefined) => object | Promise<object>

const maxRequest = 4096
const patienceMs = 10_000

/**
 * Listens. Errors of `answer` are sent to the client and passed to `refused`. Rejects with `Failed` if it cannot
 * listen.
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
    // The client may disconnect at any time.
    socket.on('error', () => socket.destroy())
    socket.on('data', (part: string) => {
      text += part
      const end = text.indexOf('\n')
      if (end < 0 && text.length <= maxRequest) return
      socket.removeAllListeners('data')
      // A knob may take long.
      socket.setTimeout(0)
      void reply(text.slice(0, Math.max(end, 0)), (request) => answer(request, () => peerOf(socket)), refused).then(
        (said) => socket.end(`${JSON.stringify(said)}\n`),
      )
    })
  })
  await listenAtPath(server, path, mode, gid).catch((error: Error) => {
    throw new Failed(`the control socket ${path} cannot be created: ${error.message}`)
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

/** Why there is no answer, and what to do. Throws `Failed` for a spoilt record. */
function noAnswer(path: string, { code, message }: NodeJS.ErrnoException): string {
  if (code === 'EACCES' || code === 'EPERM')
    return `this user may not open the control socket ${path} (${message}): run as the user of the server or as root, or give the socket a group with tmem serve --socket-group`
  // Any error without a code is the timeout of this client.
  if (code === undefined)
    return `the server at ${path} ${message}: it is stopped or hangs: look at its process; no other server can start until it ends`
  const former = formerServer(path)
  if (former === undefined)
    return `no server at ${path} (${message}): start one with tmem up or tmem serve, or name its socket with --control`
  const { pid, running, end } = former
  return running
    ? `no server answers at ${path}: process ${pid} starts or ends there; tmem stat --wait SECONDS waits for one that starts`
    : `no server at ${path}: process ${pid}, the last one, ${end}; start it again, which says what is lost and what to run first`
}

const retryMs = 200

/** Asks until a server answers, for at most `seconds`: for callers that have started a server in the background. */
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
 * Asks a server. Rejects with `Failed` if there is none, if it belongs to another user, or if it answers with an error.
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
        reject(
          new Failed(
            `the server at ${path} belongs to user ${user}, whose answers cannot be trusted: run as that user, or name another --control`,
          ),
        )
        socket.destroy()
      }
    })
    socket.on('data', (part: string) => {
      text += part
    })
    socket.on('error', (error: NodeJS.ErrnoException) => {
      try {
        reject(new Failed(noAnswer(path, error)))
      } catch (spoilt) {
        reject(spoilt as Error)
      }
    })
    socket.on('end', () => {
      let answer: unknown
      try {
        answer = JSON.parse(text)
      } catch {
        reject(new Failed(`the server at ${path} did not answer with JSON: is it tmem serve?`))
        return
      }
      if (typeof answer === 'object' && answer !== null && 'error' in answer)
        reject(new Failed(`the server at ${path}: ${String(answer.error)}`))
      // A `tmem xen host` knows some of the requests, too.
      else if (kind === 'info' && !Array.isArray((answer as Partial<Info> | null)?.devices))
        reject(new Failed(`the socket ${path} is not that of tmem serve: name another --control`))
      else resolve(answer as Answers[Kind])
    })
  })
}
