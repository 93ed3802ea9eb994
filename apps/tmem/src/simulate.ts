/**
 * `tmem simulate`: runs whole stacks over a simulated disk and clock, under faults, against a reference; or repeats one
 * such history.
 */
import { type FaultKind, faultKinds, simulate as run, type SimulationReport } from '@tmem/simulator'
import { BadInput, Failed, throwIfInterrupted } from './ending.ts'
import { type Terminal, tableOf } from './terminal.ts'

/** Options of the command. */
export interface SimulateOptions {
  readonly seconds?: number
  readonly seed?: number
  readonly history?: number
  readonly trace?: true
  readonly json?: true
}

/**
 * Runs histories for the given time and prints the counts; with `history`, runs only that one. Throws `Failed` at the
 * first wrong answer.
 */
export async function simulate(options: SimulateOptions, terminal: Terminal): Promise<void> {
  const { seconds, history, trace, json } = options
  if (history !== undefined && options.seed === undefined)
    throw new BadInput('--history needs the --seed of the history: give both')
  if (history !== undefined && seconds !== undefined) throw new BadInput('give --history or --seconds, not both')
  if (trace === true && (history === undefined || json === true))
    throw new BadInput('--trace prints one history: give --seed and --history, without --json')
  const seed = options.seed ?? Math.floor(Math.random() * 2 ** 32)
  const end = seconds ?? 10
  const progress = terminal.progress(`simulating (seed ${seed})`)
  const report = await run({
    seed,
    signal: terminal.signal,
    ...(history === undefined ? { seconds: end } : { first: history, histories: 1 }),
    ...(trace === true ? { trace: (line: string) => terminal.print(line) } : {}),
    onProgress: (so) => progress.at(Math.min(so.seconds, end), end),
  })
  progress.done(`${report.histories} histories`)
  const { failure } = report
  const replay = failure === undefined ? undefined : `tmem simulate --seed ${seed} --history ${failure.history}`
  if (json === true) terminal.print(JSON.stringify(replay === undefined ? report : { ...report, replay }))
  else terminal.print(textOf(report))
  if (failure !== undefined) throw new Failed(`${failure.message}; again: ${replay}`)
  throwIfInterrupted(terminal.signal)
}

function textOf({ histories, historiesPerSecond, operations, pages, faults, failure }: SimulationReport): string {
  const count = (number: number): string => number.toLocaleString('en')
  const kinds: readonly FaultKind[] = faultKinds.filter((kind) => faults[kind] > 0)
  const table = tableOf(
    ['fault', 'times'],
    kinds.map((kind) => [kind, count(faults[kind])]),
  )
  const sum = `${count(histories)} histories (${count(historiesPerSecond)} a second), ${count(operations)} operations, ${count(pages)} pages`
  const detail = failure === undefined ? '' : `\n\n${failure.detail}`
  return `${kinds.length === 0 ? '' : `${table}\n\n`}${sum}: ${failure === undefined ? 'no wrong answer' : 'a wrong answer'}${detail}`
}
