/** Many histories, one after the other, until one finds a wrong answer or there is no more time. */
import { checkOptions } from '@tmem/core'
import { HistoryFailure, runHistory, Workshop } from './history.ts'
import { type FaultCounts, type FaultKind, noFaults } from './world.ts'

/** What is run. Without an end it goes on until `signal` or a wrong answer. */
export interface SimulationOptions {
  /** 0 to 2^32-1: with the number of a history, it decides everything. */
  readonly seed: number
  /** Number of the first history (default 0). */
  readonly first?: number
  /** Histories at most. */
  readonly histories?: number
  /** Seconds at most. */
  readonly seconds?: number
  /** Told what is done, line by line. */
  readonly trace?: (line: string) => void
  /** Ends it after the history that is running. */
  readonly signal?: AbortSignal
  /** Called about every second. */
  readonly onProgress?: (report: SimulationReport) => void
}

/** A wrong answer. */
export interface SimulationFailure {
  readonly history: number
  /** The stack, as far as a text can say it. */
  readonly stack: string
  /** Operations of the history until it was seen. */
  readonly operation: number
  readonly message: string
  /** Where it was seen. */
  readonly detail: string
}

/** What was run, and what came of it. */
export interface SimulationReport {
  readonly seed: number
  readonly histories: number
  readonly operations: number
  /** Pages that were put. */
  readonly pages: number
  readonly faults: FaultCounts
  readonly seconds: number
  readonly historiesPerSecond: number
  /** The first wrong answer; nothing is run after it. */
  readonly failure?: SimulationFailure
}

/**
 * Runs histories. Resolves with a report, also of a failure. While it runs, a promise that nobody handles counts as a
 * wrong answer of the history that is running.
 */
export async function simulate(options: SimulationOptions): Promise<SimulationReport> {
  checkOptions('simulate', options, {
    seed: 'number',
    first: 'number?',
    histories: 'number?',
    seconds: 'number?',
    trace: 'function?',
    signal: 'object?',
    onProgress: 'function?',
  })
  const { seed, first = 0, histories = Number.POSITIVE_INFINITY, seconds = Number.POSITIVE_INFINITY } = options
  const { trace, signal, onProgress } = options
  const begun = performance.now()
  const workshop = new Workshop()
  const faults = noFaults()
  let done = 0
  let operations = 0
  let pages = 0
  let failure: SimulationFailure | undefined
  let unhandled: unknown
  const onUnhandled = (reason: unknown): void => {
    unhandled ??= reason
  }
  const report = (): SimulationReport => {
    const elapsed = (performance.now() - begun) / 1000
    return {
      seed,
      histories: done,
      operations,
      pages,
      faults,
      seconds: elapsed,
      historiesPerSecond: Math.round(done / elapsed),
      ...(failure === undefined ? {} : { failure }),
    }
  }
  process.on('unhandledRejection', onUnhandled)
  try {
    for (let reported = begun; done < histories && failure === undefined && signal?.aborted !== true; ) {
      const now = performance.now()
      if (now - begun >= seconds * 1000) break
      if (now - reported >= 1000) {
        reported = now
        onProgress?.(report())
      }
      const history = first + done
      try {
        const one = await runHistory(seed, history, trace === undefined ? { workshop } : { workshop, trace })
        operations += one.operations
        pages += one.pages
        for (const kind of Object.keys(faults) as FaultKind[]) faults[kind] += one.faults[kind]
        // Signals, and promises that nobody handles, are told between turns of the event loop.
        await new Promise<void>((resolve) => setImmediate(resolve))
        if (unhandled !== undefined) throw new HistoryFailure(seed, history, one.stack, one.operations, unhandled)
      } catch (error) {
        failure = failureOf(history, error)
      }
      done++
    }
  } finally {
    process.off('unhandledRejection', onUnhandled)
  }
  return report()
}

function failureOf(history: number, error: unknown): SimulationFailure {
  if (!(error instanceof HistoryFailure)) throw error
  const { stack: detail = '' } = error.cause instanceof Error ? error.cause : {}
  return { history, stack: error.stackText, operation: error.operation, message: error.message, detail }
}
