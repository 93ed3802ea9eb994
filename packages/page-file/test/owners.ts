/** Owners of files elsewhere: other processes, other threads. They run what was built. */
import { type ChildProcess, fork, spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import type { PageFileRequest } from '../src/index.ts'

/** What an owner answers. */
interface Answer {
  readonly id: number
  readonly open: boolean
  readonly found: string
  readonly locks: readonly string[]
  readonly thread: number
  readonly code: string
  readonly message: string
}

export interface Owner {
  /** Opens a file, at once or at a time of the day; tells how that went. */
  open(request: PageFileRequest, how?: { readonly native?: boolean; readonly at?: number }): Promise<Answer>
  close(): Promise<Answer>
  /** Begins to overwrite the file, again and again. */
  write(): Promise<Answer>
  /** Ends it at once, in the middle of what it does; resolves when it has ended. */
  kill(): Promise<void>
}

const program = new URL('./owner.mjs', import.meta.url)

function owner(
  send: (message: object) => void,
  listen: (hear: (answer: Answer) => void) => void,
  kill: Owner['kill'],
): Owner {
  const asked = new Map<number, (answer: Answer) => void>()
  let next = 0
  listen((answer) => asked.get(answer.id)?.(answer))
  const ask = (act: string, details: object): Promise<Answer> =>
    new Promise((resolve) => {
      asked.set(++next, resolve)
      send({ id: next, act, ...details })
    })
  return {
    open: (request, { native = true, at = 0 } = {}) => ask('open', { request, native, at }),
    close: () => ask('close', {}),
    write: () => ask('write', {}),
    kill,
  }
}

export const otherProcess = (): Owner => processOwner(fork(program, { execArgv: [] }))

/** A process in a network namespace of its own; needs root. */
export const processElsewhere = (): Owner =>
  processOwner(
    spawn('unshare', ['--net', process.execPath, fileURLToPath(program)], {
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    }),
  )

function processOwner(child: ChildProcess): Owner {
  const ended = once(child, 'exit')
  const kill = async (): Promise<void> => {
    child.kill('SIGKILL')
    await ended
  }
  return owner(
    (message) => child.send(message),
    (hear) => child.on('message', hear as (answer: unknown) => void),
    kill,
  )
}

export function otherThread(): Owner {
  const worker = new Worker(program, { execArgv: [] })
  const kill = async (): Promise<void> => {
    await worker.terminate()
  }
  return owner(
    (message) => worker.postMessage(message),
    (hear) => worker.on('message', hear),
    kill,
  )
}
