/**
 * Where a command prints: its answer on standard output, everything else on standard error.
 *
 * Progress is a bar with what is left where standard error is a terminal, and otherwise a line for each part that is
 * done.
 */
import { stripVTControlCharacters } from 'node:util'
import type { OpenProgress } from '@tmem/core'
import { Presets, SingleBar } from 'cli-progress'
import pc from 'picocolors'

/** How far a part of the work is. */
export interface Progress {
  /** `done` of `total` units are done. */
  at(done: number, total: number): void
  /**
   * The part is done; `result` in a few words (default: how long it took). Takes the bar away, and does nothing more
   * where the part is over already.
   */
  done(result?: string): void
  /** The part is over, done or not: what came of it, if anything, somebody else says. */
  end(): void
}

/** A screen that is drawn anew in place. */
export interface Screen {
  /** Shows this text instead of the one before, as much of it as there is room for. */
  draw(text: string): void
  /** The text stays, and what is printed next comes below it. */
  end(): void
}

/** What a command prints to, and the signal that ends it early. */
export interface Terminal {
  /** Raised by SIGINT, SIGTERM and SIGHUP. */
  readonly signal: AbortSignal
  /**
   * From now on those signals call `handler`, each time, and neither raise `signal` nor end the process; until the
   * function that this returns is called. For a server, which may have to refuse.
   */
  takeSignals(handler: () => void): () => void
  /** Prints the answer, or a part of it, to standard output. */
  print(text: string): void
  /** Prints a line to standard error. */
  note(line: string): void
  /** Begins a part of the work that may take seconds. `bar`: nothing but the bar, as somebody else says the rest. */
  progress(label: string, only?: 'bar'): Progress
  /** Where standard output is a terminal. */
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

/** Home, each line to its end, and nothing below: nothing flickers, as nothing is blank in between. */
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

/** A line that is no wider than the screen; one that is loses its colours with its end. */
function cut(line: string, columns: number): string {
  const plain = stripVTControlCharacters(line)
  return plain.length <= columns ? line : plain.slice(0, columns)
}

/** Does what tells how far it is, part by part, and shows that. */
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

/** How long the rest takes when it goes on as it did. */
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

/** A table without lines: head in bold, all columns but the first to the right unless `align` says otherwise. */
export function tableOf(
  head: readonly string[],
  rows: readonly (readonly string[])[],
  align: readonly ('left' | 'right')[] = head.map((_, column) => (column === 0 ? 'left' : 'right')),
): string {
  const all = [head.map((cell) => pc.bold(cell)), ...rows]
  // Colour codes take no place on the screen.
  const widthOf = (cell: string): number => stripVTControlCharacters(cell).length
  const widths = head.map((_, column) => Math.max(...all.map((row) => widthOf(row[column]!))))
  const padded = (cell: string, column: number): string => {
    const space = ' '.repeat(widths[column]! - widthOf(cell))
    return align[column] === 'left' ? cell + space : space + cell
  }
  return all.map((row) => row.map(padded).join('  ').trimEnd()).join('\n')
}
