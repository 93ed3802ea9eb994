/**
 * `tmem run … -- COMMAND`: serves devices for one command, and ends with it. Signals go to the command; its exit code
 * is that of this program, 128 and its number for a signal, as shells have it.
 *
 * The command finds the way in its environment: `TMEM_CONTROL`, `TMEM_DEVICE` (the first), `TMEM_NBD` (a URI, as
 * NBD's clients take it) and, with a mount, `TMEM_FILE`.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { constants, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { BadInput, Ended, Failed } from '../ending.ts'
import type { Info } from '../serve/control.ts'
import { type Course, type ServeOptions, serve } from '../serve/serve.ts'
import type { Terminal } from '../terminal.ts'

/** Serves, runs the command, and ends. Rejects with `Ended` unless its exit code is 0, and as `serve` does. */
export async function runCommand(
  command: readonly string[],
  options: Omit<ServeOptions, 'control' | 'nbd'>,
  terminal: Terminal,
): Promise<void> {
  // Nobody else is to find the sockets.
  const folder = ownFolder()
  const control = join(folder, 'control.sock')
  const socket = join(folder, 'nbd.sock')
  let code = 0
  try {
    const course = courseOf(command, { control, socket }, (ended) => {
      code = ended
    })
    await serve({ drain: true, logLevel: 'warn', ...options, control, nbd: [`unix:${socket}`] }, terminal, course)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
  if (code !== 0) throw new Ended(code)
}

/** Absolute: the command may work in another folder. Throws `BadInput`. */
function ownFolder(): string {
  const parent = resolve(tmpdir())
  try {
    return mkdtempSync(join(parent, 'tmem-run-'))
  } catch (error) {
    throw new BadInput(`the sockets have no place in ${parent}, name another TMPDIR: ${(error as Error).message}`)
  }
}

function courseOf(
  [program, ...words]: readonly string[],
  { control, socket }: { readonly control: string; readonly socket: string },
  ended: (code: number) => void,
): Course {
  let signalled: () => void = () => undefined
  return {
    until: ({ devices, fuse }: Info) =>
      new Promise((settle, reject) => {
        const { name } = devices[0]!
        const env = {
          ...process.env,
          TMEM_CONTROL: control,
          TMEM_DEVICE: name,
          TMEM_NBD: `nbd+unix:///${name}?socket=${socket}`,
          ...(fuse === null ? {} : { TMEM_FILE: join(fuse, name) }),
        }
        const failed = (error: Error): void => reject(new Failed(`${program || '""'} cannot be run: ${error.message}`))
        let child: ChildProcess
        try {
          child = spawn(program!, words, { stdio: 'inherit', env })
        } catch (error) {
          // Some of what the system refuses is thrown, some comes as an event.
          failed(error as Error)
          return
        }
        signalled = () => void child.kill('SIGTERM')
        child.once('error', failed)
        child.once('exit', (code, signal) => {
          ended(code ?? 128 + constants.signals[signal!])
          settle()
        })
      }),
    signalled: () => signalled(),
  }
}
