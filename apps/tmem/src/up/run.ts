/**
 * `tmem run … -- COMMAND`: serves devices while one command runs. Signals go to the command. This program ends with the
 * exit code of the command, or with 128 plus the number of the signal that ended it, as shells do.
 *
 * The command finds the server in its environment: `TMEM_CONTROL`, `TMEM_DEVICE` (the first device), `TMEM_NBD` (a URI,
 * as NBD clients take it) and, with a mount, `TMEM_FILE`.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { constants, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { BadInput, Ended, Failed } from '../ending.ts'
import type { Info } from '../serve/control.ts'
import { type Course, type ServeOptions, serve } from '../serve/serve.ts'
import type { Terminal } from '../terminal.ts'

/**
 * Serves, runs the command, and ends. Rejects as `serve` does, and with `Ended` unless the command's exit code is 0.
 */
export async function runCommand(
  command: readonly string[],
  options: Omit<ServeOptions, 'control' | 'nbd'>,
  terminal: Terminal,
): Promise<void> {
  // No other user may reach the sockets.
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

/** A new private directory, as an absolute path: the command may change its directory. Throws `BadInput`. */
function ownFolder(): string {
  const parent = resolve(tmpdir())
  try {
    return mkdtempSync(join(parent, 'tmem-run-'))
  } catch (error) {
    throw new BadInput(
      `the sockets cannot be created in ${parent}: ${(error as Error).message}; set TMPDIR to another directory`,
    )
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
          // The runtime throws some refusals of the system and emits others as events.
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
