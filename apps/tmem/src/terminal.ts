/**
 * Where a command prints: its answer on standard output, everything else on standard error.
 *
 * Progress is a bar where standard error is a terminal, and otherwise a line for each part that is done.
 */
import { stripVTControlCharacters } from 'node:util'
import { Presets, SingleBar } from 'cli-progress'
import pc from 'picocolors'

/** How far a part of the work is. */
export interface Progress {
  /** `done` of `total` units are done. */
  at(done: number, total: number): void
  /** The part is done; `result` in a few words. Also takes the bar away. */
  end(result?: string): void
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
  /** Begins a part of the work that may take seconds. */
  progress(label: string): Progress
}

/** The terminal of this process. */
export function processTerminal(signal: AbortSignal, takeSignals: Terminal['takeSignals']): Terminal {
  const note = (line: string): void => void process.stderr.write(`${line}\n`)
  return {
    signal,
    takeSignals,
    print: (text) => void process.stdout.write(`${text}\n`),
    note,
    progress(label) {
      const bar = process.stderr.isTTY ? barFor(label) : undefined
      return {
        at: (done, total) => {
          bar?.setTotal(total)
          bar?.update(done)
        },
        end: (result) => {
          bar?.stop()
          if (result !== undefined) note(`${label}: ${result}`)
        },
      }
    },
  }
}

function barFor(label: string): SingleBar {
  const format = `${label} {bar} {percentage} %`
  const bar = new SingleBar(
    { format, clearOnComplete: true, hideCursor: true, gracefulExit: false },
    Presets.shades_classic,
  )
  bar.start(1, 0)
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
