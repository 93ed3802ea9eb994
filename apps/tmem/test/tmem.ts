/** Runs the built program as a user would, and gives its parts a terminal that nobody reads. */
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { onTestFinished } from 'vitest'
import type { Terminal } from '../src/terminal.ts'

const bin = fileURLToPath(new URL('../dist/bin.js', import.meta.url))

/** What a run of the program came to. */
export interface Ended {
  readonly code: number | null
  readonly stdout: string
  readonly stderr: string
}

/** How it is run. */
export interface RunOptions {
  /** A program and its first arguments that run the rest of their arguments. */
  readonly through?: readonly string[]
  /** Called with the running process. */
  readonly during?: (running: ChildProcessWithoutNullStreams) => Promise<void>
}

/** Runs `tmem WORDS…`. */
export async function tmem(words: readonly string[], { through = [], during }: RunOptions = {}): Promise<Ended> {
  const [command, ...rest] = [...through, process.execPath, bin, ...words]
  const running = spawn(command!, rest, { env: { ...process.env, NO_COLOR: '1' } })
  let stdout = ''
  let stderr = ''
  running.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text
  })
  running.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text
  })
  const closed = new Promise<number | null>((resolve, reject) => {
    running.on('close', resolve)
    running.on('error', reject)
  })
  try {
    await during?.(running)
  } catch (error) {
    running.kill('SIGKILL')
    throw error
  }
  return { code: await closed, stdout, stderr }
}

/** What a bench says besides a line with figures for each part that is done. */
export const strangeLines = (stderr: string): string[] =>
  stderr.split('\n').filter((line) => line !== '' && !/^[^:]+: (?:[a-z0-9]+: )?.*\d/.test(line))

/** A new directory that goes away with the test. */
export function temporaryDirectory(): string {
  const path = mkdtempSync(join(tmpdir(), 'tmem-test-'))
  onTestFinished(() => rmSync(path, { recursive: true, force: true }))
  return path
}

/** A terminal that nobody reads. */
export const silentTerminal = (signal: AbortSignal = new AbortController().signal): Terminal => ({
  signal,
  takeSignals: () => () => undefined,
  print: () => undefined,
  note: () => undefined,
  progress: () => ({ at: () => undefined, done: () => undefined, end: () => undefined }),
})
