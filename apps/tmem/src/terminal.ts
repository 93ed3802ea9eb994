/**
 * The output of a command: its answer on standard output, everything else on standard error.
 *
 * On a terminal, progress is a bar with the time that is left; elsewhere it is a line for each finished part.
 */
import { stripVTControlCharacters } from 'node:util'
import type { OpenProgress } from '@tmem/core'
import { Presets, SingleBar } from 'cli-progress'
import pc from 'picocolors'

/** Progress of one part of the work. */
export interface Progress {
  /** `done` of `total` units are done. */
  at(done: number, total: number): void
  /**
   * The part is done; `result` says so in a few words (default: how long it took). Removes the bar. Without effect once
   * the part is over.
   */
  done(result?: string): void
  /** The part is over, done or not. Removes the bar and prints nothing. */
  end(): void
}

/** A screen that is drawn anew in place. */
export interface Screen {
  /** Replaces the text before by this one, cut to the size of the screen. */
  draw(text: string): void
  /** Leaves the text on the screen; later output appears below it. */
  end(): void
}

/** Where a command prints, and the signal that ends it early. */
export interface Terminal {
  /** Raised by SIGINT, SIGTERM and SIGHUP. */
  readonly signal: AbortSignal
  /**
   * From now on each of those signals calls `handler`, and neither raises `signal` nor ends the process, until the
   * returned function is called; then the handler before it is called again. For a server, which may have to refuse to
   * end, and is not to be left half undone.
   */
  takeSignals(handler: () => void): () => void
  /** Prints the answer, or a part of it, to standard output. */
  print(text: string): void
  /** Prints a line to standard error. */
  note(line: string): void
  /** Begins a part of the work that may take seconds. `bar`: shows the bar alone, without a line at the end. */
  progress(label: string, only?: 'bar'): Progress
  /** Present if standard output is a terminal. */
  readonly screen?: Screen
}

/** The terminal of this process. */
export function processTerminal(signal: AbortSignal, takeSignals: Terminal['takeSignals']): Terminal {
  const note = (line: string): void => void process.stderr.write(`${line}\n`)
  return {
    signal,
    takeSignals,
    print: (text) => void process.stdout.write(`${text}\n`),
    note,
    ...(process.stdout.isTTY ? { screen: ansiScreen(process.stdout) } : {}),
    progress: (label, only) => {
      const begun = performance.now()
      const bar = process.stderr.isTTY ? barFor(label) : undefined
      let isOver = false
      const end = (): void => {
        isOver = true
        bar?.stop()
      }
      return {
        at: (done, total) => {
          bar?.setTotal(total)
          bar?.update(done, { left: leftOf(performance.now() - begun, done, total) })
        },
        done: (result) => {
          if (isOver) return
          end()
          if (only !== 'bar') note(`${label}: ${result ?? `${((performance.now() - begun) / 1000).toFixed(1)} s`}`)
        },
        end,
      }
    },
  }
}

/** Overwrites line by line from the top and clears only the rest, so that nothing flickers. */
function ansiScreen(output: NodeJS.WriteStream): Screen {
  let isBegun = false
  return {
    draw: (text) => {
      const lines = text.split('\n').slice(0, output.rows - 1)
      const shown = lines.map((line) => `${cut(line, output.columns)}\u001b[K`).join('\n')
      output.write(`${isBegun ? '' : '\u001b[2J'}\u001b[H${shown}\u001b[J`)
      isBegun = true
    },
    end: () => {
      if (isBegun) output.write('\n')
    },
  }
}

/** A line that fits the screen. A line that is cut loses its colours. */
function cut(line: string, columns: number): string {
  const plain = stripVTControlCharacters(line)
  return plain.length <= columns ? line : plain.slice(0, columns)
}

/** Runs `act` and shows the progress that it reports, part by part. */
export async function withProgress<Result>(
  terminal: Terminal,
  act: (onProgress: OpenProgress) => Promise<Result>,
): Promise<Result> {
  let shown: { readonly what: string; readonly progress: Progress } | undefined
  try {
    const result = await act((what, done, total) => {
      if (shown?.what !== what) {
        shown?.progress.done()
        shown = { what, progress: terminal.progress(what) }
      }
      shown.progress.at(done, total)
    })
    shown?.progress.done()
    return result
  } finally {
    shown?.progress.end()
  }
}

/** An estimate of the time that is left, from the speed so far. */
function leftOf(ms: number, done: number, total: number): string {
  if (done <= 0 || done >= total) return ''
  const seconds = Math.ceil(((ms / done) * (total - done)) / 1000)
  return seconds < 120 ? `${seconds} s left` : `${Math.ceil(seconds / 60)} min left`
}

function barFor(label: string): SingleBar {
  const format = `${label} {bar} {percentage} % {left}`
  const bar = new SingleBar(
    { format, clearOnComplete: true, hideCursor: true, gracefulExit: false },
    Presets.shades_classic,
  )
  bar.start(1, 0, { left: '' })
  return bar
}

/**
 * A table without lines, its head in bold. All columns but the first are right-aligned unless `align` says otherwise.
 */
export function tableOf(
  head: readonly string[],
  rows: readonly (readonly string[])[],
  align: readonly ('left' | 'right')[] = head.map((_, column) => (column === 0 ? 'left' : 'right')),
): string {
  const all = [head.map((cell) => pc.bold(cell)), ...rows]
  // Colour codes have no width on the screen.
  const widthOf = (cell: string): number => stripVTControlCharacters(cell).length
  const widths = head.map((_, column) => Math.max(...all.map((row) => widthOf(row[column]!))))
  const padded = (cell: string, column: number): string => {
    const space = ' '.repeat(widths[column]! - widthOf(cell))
    return align[column] === 'left' ? cell + space : space + cell
  }
  return all.map((row) => row.map(padded).join('  ').trimEnd()).join('\n')
}
