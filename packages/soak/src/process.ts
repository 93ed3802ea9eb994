/** A server of the program under test as a process: started, asked to end, killed, and looked at from outside. */
import { type ChildProcess, spawn } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'

/** It has not done in time what it should have; or has ended when it should not have. */
export class ServerFailure extends Error {}

/** Milliseconds after which a start or an end has failed. */
const patienceMs = 60_000
/** Lines of what it says that are kept. */
const keptLines = 40

export class ServerProcess {
  readonly #child: ChildProcess
  /** Resolves to its exit code, or `null` after a signal. */
  readonly ended: Promise<number | null>
  #notes: string[] = []
  #hasEnded = false
  readonly #ready: Promise<string>

  /** @param words the program and its arguments */
  constructor(words: readonly string[]) {
    const child = spawn(words[0]!, words.slice(1), { stdio: ['ignore', 'pipe', 'pipe'] })
    this.#child = child
    let rest = ''
    child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      const lines = (rest + text).split('\n')
      rest = lines.pop()!
      this.#notes = [...this.#notes, ...lines].slice(-keptLines)
    })
    let output = ''
    this.#ready = new Promise((resolve) => {
      child.stdout!.setEncoding('utf8').on('data', (text: string) => {
        output += text
        if (output.includes('\n')) resolve(output)
      })
    })
    this.ended = new Promise((resolve, reject) => {
      child.once('error', reject)
      child.once('close', (code) => {
        this.#hasEnded = true
        if (rest !== '') this.#notes.push(rest)
        resolve(code)
      })
    })
  }

  get hasEnded(): boolean {
    return this.#hasEnded
  }

  /** What it has said last on standard error, by line. */
  get notes(): readonly string[] {
    return this.#notes
  }

  /** Resolves to `undefined` once it serves, or to its exit code when it does not. */
  async started(): Promise<number | null | undefined> {
    return this.#within('has not begun to serve', Promise.race([this.#ready.then(() => undefined), this.ended]))
  }

  /** Sends SIGTERM. */
  ask(): void {
    this.#child.kill('SIGTERM')
  }

  /** Sends SIGTERM, and resolves to the exit code. */
  async terminate(): Promise<number | null> {
    this.ask()
    return this.#within('has not ended after SIGTERM', this.ended)
  }

  async kill(): Promise<void> {
    this.#child.kill('SIGKILL')
    await this.ended
  }

  /** Ends it where nobody can wait any more. */
  killNow(): void {
    this.#child.kill('SIGKILL')
  }

  /** Bytes of its memory that are resident. */
  get residentBytes(): number {
    const pages = Number(readFileSync(`/proc/${this.#child.pid}/statm`, 'utf8').split(' ')[1])
    return pages * 4096
  }

  /** What its open descriptors lead to. */
  get descriptors(): number {
    return readdirSync(`/proc/${this.#child.pid}/fd`).length
  }

  async #within<T>(what: string, doing: Promise<T>): Promise<T> {
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<never>((_, reject) => {
      timer = setTimeout(
        () => reject(new ServerFailure(`the server ${what} within ${patienceMs / 1000} s`)),
        patienceMs,
      )
    })
    try {
      return await Promise.race([doing, late])
    } finally {
      clearTimeout(timer)
    }
  }
}
