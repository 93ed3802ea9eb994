/**
 * Progress of long work of a server: a bar on a terminal, and a line in the log after two seconds and every ten seconds
 * from then on. Work that is done sooner leaves no line.
 */
import { formatBytes } from '@tmem/core'
import type { Progress, Terminal } from '../terminal.ts'
import type { Log } from './log.ts'

const patienceMs = 2000
const lineMs = 10_000

export class LongWork {
  readonly #terminal: Terminal
  readonly #log: Log
  readonly #event: string
  readonly #begun: number = performance.now()
  #progress: Progress | undefined
  #shown: string | undefined
  #saidAt = Number.NEGATIVE_INFINITY

  /** `event`: the event of the lines in the log. */
  constructor(terminal: Terminal, log: Log, event: string) {
    this.#terminal = terminal
    this.#log = log
    this.#event = event
  }

  /** `done` of `total` bytes of the work `what` are done. */
  at(what: string, done: number, total: number): void {
    const now = performance.now()
    if (now - this.#begun <= patienceMs) return
    if (this.#shown !== what) {
      this.#progress?.end()
      this.#progress = this.#terminal.progress(what, 'bar')
      this.#shown = what
      this.#saidAt = Number.NEGATIVE_INFINITY
    }
    if (now - this.#saidAt >= lineMs) {
      this.#saidAt = now
      const percent = total === 0 ? 100 : Math.floor((100 * done) / total)
      this.#log.info(this.#event, `${what}: ${percent} % of ${formatBytes(total)} done`)
    }
    this.#progress!.at(done, total)
  }

  end(): void {
    this.#progress?.end()
  }
}
