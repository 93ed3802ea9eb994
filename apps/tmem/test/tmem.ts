/** Runs the built program as a user would. */
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { onTestFinished } from 'vitest'

const bin = new URL('../dist/bin.js', import.meta.url).pathname

/** What a run of the program came to. */
export interface Ended {
  readonly code: number | null
  readonly stdout: string
  readonly stderr: string
}

/** Runs `tmem WORDS…`; `during` gets the running process. */
export async function tmem(
  words: readonly string[],
  during?: (running: ChildProcessWithoutNullStreams) => void | Promise<void>,
): Promise<Ended> {
  return ended(spawn(process.execPath, [bin, ...words], { env: { ...process.env, NO_COLOR: '1' } }), during)
}

/** The same through a shell line in which `$tmem` stands for the program. */
export async function shell(line: string): Promise<Ended> {
  const env = { ...process.env, NO_COLOR: '1', tmem: `${process.execPath} ${bin}` }
  return ended(spawn('sh', ['-c', line], { env }))
}

async function ended(
  running: ChildProcessWithoutNullStreams,
  during?: (running: ChildProcessWithoutNullStreams) => void | Promise<void>,
): Promise<Ended> {
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
  await during?.(running)
  return { code: await closed, stdout, stderr }
}

/** A new directory that goes away with the test. */
export function temporaryDirectory(): string {
  const path = mkdtempSync(join(tmpdir(), 'tmem-test-'))
  onTestFinished(() => rmSync(path, { recursive: true, force: true }))
  return path
}
