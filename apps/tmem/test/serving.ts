/** Servers of the built program, as tests run them. */
import { type ChildProcess, spawn } from 'node:child_process'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { onTestFinished } from 'vitest'
import { temporaryDirectory } from './tmem.ts'

/** The built program. */
export const bin: string = fileURLToPath(new URL('../dist/bin.js', import.meta.url))

/** A server that runs. */
export interface Serving {
  readonly folder: string
  readonly control: string
  readonly info: {
    pid: number
    nbd: string[]
    fuse: string | null
    http: string | null
    devices: { name: string; sizeBytes: number }[]
  }
  /** Sends SIGTERM and waits: the exit code and what it said on standard error. */
  readonly stop: () => Promise<{ code: number | null; stderr: string }>
  /** Ends it as nothing can be prepared for. */
  readonly kill: () => Promise<void>
}

/** Starts a server that listens on a unix socket. */
export const serving = (stack: string, ...words: string[]): Promise<Serving> =>
  servingIn(temporaryDirectory(), stack, ...words)

/** Where a server runs. */
interface Where {
  readonly folder: string
  readonly env: NodeJS.ProcessEnv
}

/**
 * The same in a folder that is there: `FOLDER` in the words is that one. Rejects with what it said where it does not
 * serve.
 */
export async function servingIn(where: string | Where, stack: string, ...words: string[]): Promise<Serving> {
  const { folder, env } = typeof where === 'string' ? { folder: where, env: process.env } : where
  const control = join(folder, 'control.sock')
  const child: ChildProcess = spawn(
    process.execPath,
    [
      bin,
      'serve',
      '--stack',
      stack.replaceAll('FOLDER', folder),
      '--nbd',
      `unix:${folder}/nbd.sock`,
      '--control',
      control,
      '--json',
      '--log',
      'text',
      '--log-level',
      'warn',
      ...words.map((word) => word.replaceAll('FOLDER', folder)),
    ],
    { stdio: ['ignore', 'pipe', 'pipe'], env },
  )
  onTestFinished(() => void child.kill('SIGKILL'))
  let stderr = ''
  child.stderr!.setEncoding('utf8').on('data', (text: string) => {
    stderr += text
  })
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve))
  const ready = await Promise.race([
    new Promise<string>((resolve) => child.stdout!.setEncoding('utf8').once('data', resolve)),
    ended.then((code) => {
      throw new Error(`exit code ${code}: ${stderr.trimEnd()}`)
    }),
  ])
  return {
    folder,
    control,
    info: JSON.parse(ready),
    stop: async () => {
      child.kill('SIGTERM')
      return { code: await ended, stderr }
    },
    kill: async () => {
      child.kill('SIGKILL')
      await ended
    },
  }
}
