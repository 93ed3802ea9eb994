/** Servers of system tests: those that a sweep after a failed test must find. */
import { type ChildProcess, spawn } from 'node:child_process'
import { bin } from '../serving.ts'

/** A server that serves. */
export interface Served {
  readonly child: ChildProcess
  /** What it has said on standard error by now. */
  readonly notes: () => string
  /** What it said of itself when it was ready. */
  readonly info: { readonly pid: number; readonly fuse: string | null }
  /** Its exit code, or `null` after a signal. */
  readonly ended: Promise<number | null>
}

/**
 * Starts `tmem serve` and waits until it serves; it is in `running` until it has ended. Rejects with its exit code and
 * what it said when it does not serve.
 */
export async function served(running: Set<ChildProcess>, ...words: readonly string[]): Promise<Served> {
  const child = spawn(process.execPath, [bin, 'serve', ...words, '--json'], { stdio: ['ignore', 'pipe', 'pipe'] })
  running.add(child)
  let notes = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    notes += text
  })
  const ended = new Promise<number | null>((resolve) => {
    child.once('exit', (code) => {
      running.delete(child)
      resolve(code)
    })
  })
  const ready = await Promise.race([
    new Promise<string>((resolve) => child.stdout.setEncoding('utf8').once('data', resolve)),
    ended.then((code) => {
      throw new Error(`ended with ${code}: ${notes}`)
    }),
  ])
  return { child, notes: () => notes, info: JSON.parse(ready), ended }
}
