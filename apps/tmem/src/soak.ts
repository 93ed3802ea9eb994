/** `tmem soak`: servers of this program under clients, knobs and kills; a model says what each read must return. */
import { fileURLToPath } from 'node:url'
import { soak as run, type SoakReport } from '@tmem/soak'
import { Failed, throwIfInterrupted } from './ending.ts'
import { ask } from './serve/control.ts'
import { type Terminal, tableOf } from './terminal.ts'

/** Options of the command. */
export interface SoakOptions {
  readonly minutes: number
  readonly seed?: number
  readonly json?: true
}

/** Soaks for the given time and prints the counts. Throws `Failed` at the first wrong byte or other broken promise. */
export async function soak(options: SoakOptions, terminal: Terminal): Promise<void> {
  const seed = options.seed ?? Math.floor(Math.random() * 2 ** 32)
  const seconds = options.minutes * 60
  const progress = terminal.progress(`soaking (seed ${seed})`)
  const report = await run({
    program: [process.execPath, fileURLToPath(new URL('./bin.js', import.meta.url))],
    ask: (control, request) => ask(control, request.do as 'knobs', request as never),
    seconds,
    seed,
    signal: terminal.signal,
    onProgress: (so) => progress.at(Math.min(so.seconds, seconds), seconds),
  })
  progress.done(`${report.lives} servers`)
  const { failure } = report
  const again = `tmem soak --minutes ${options.minutes} --seed ${seed}`
  if (options.json === true) terminal.print(JSON.stringify(failure === undefined ? report : { ...report, again }))
  else terminal.print(textOf(report))
  if (failure !== undefined) throw new Failed(`${failure.kind}: ${failure.message}; again: ${again}`)
  throwIfInterrupted(terminal.signal)
}

function textOf({ failure, noMount, seconds, ...counts }: SoakReport): string {
  const words = (name: string): string => name.replaceAll(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`)
  const table = tableOf(
    ['what', 'how much'],
    Object.entries(counts)
      .filter(([name]) => name !== 'seed')
      .map(([name, count]) => [words(name), count.toLocaleString('en')]),
  )
  const mount = noMount === undefined ? '' : `\nno mount was tested: ${noMount}`
  const detail =
    failure === undefined ? '' : `\n\nserver ${failure.life}, ${failure.stack}\n${failure.detail.join('\n')}`
  return `${table}${mount}\n${seconds} s: ${failure === undefined ? 'nothing wrong' : failure.message}${detail}`
}
