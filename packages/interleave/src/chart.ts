/** Histories as text: one column per actor, one row per step. */
import { checkOptions } from '@tmem/core'
import type { Exploration, HistoryStep } from './explore.ts'

export interface ChartOptions {
  /** Characters per line; the columns share what they do not need. Default 100, at least 20 per column are kept. */
  readonly width?: number
}

/** A history as a table with a row per step. Names are the actors' names, in the order of the scenario. */
export function chartHistory(
  history: readonly HistoryStep[],
  names: readonly string[],
  options: ChartOptions = {},
): string {
  checkOptions('chartHistory', options, { width: 'number?' })
  const cells = history.map(({ label, shows }) => (shows === '' ? label : `${label} -> ${shows}`))
  const number = Math.max(2, String(history.length).length)
  const room = Math.floor(((options.width ?? 100) - number - 1) / names.length) - 3
  const widths = names.map((name, actor) => {
    const own = cells.filter((_, row) => history[row]?.actor === actor)
    return Math.min(Math.max(20, room), Math.max(name.length, ...own.map((text) => text.length)))
  })
  const line = (first: string, columns: readonly string[]): string =>
    `${first.padStart(number)} | ${columns.map((text, actor) => text.padEnd(widths[actor] as number)).join(' | ')}`.trimEnd()
  const rows = history.flatMap(({ actor }, row) =>
    wrap(cells[row] as string, widths[actor] as number).map((part, index) =>
      line(
        index === 0 ? String(row + 1) : '',
        names.map((_, column) => (column === actor ? part : '')),
      ),
    ),
  )
  const rule = `${'-'.repeat(number)}-+-${widths.map((width) => '-'.repeat(width)).join('-+-')}`
  return [line('#', names), rule, ...rows].join('\n')
}

/** One exploration as text: what was found and, if something is wrong, the history that leads to it. */
export function chartExploration(result: Exploration, names: readonly string[], options: ChartOptions = {}): string {
  checkOptions('chartExploration', options, { width: 'number?' })
  const size = `${result.states} states, ${result.transitions} steps between them, at most ${result.depth} deep`
  switch (result.kind) {
    case 'holds': {
      const histories = result.histories === null ? 'with loops' : `${result.histories} complete histories`
      return `holds: ${size}, ${histories}`
    }
    case 'bounded':
      return `bounded: nothing wrong in ${size}; there are more (${result.bound} reached), of which nothing is known`
    case 'violated': {
      const kind = result.shortest ? 'shortest history' : 'history'
      const how = result.what === result.name ? result.name : `${result.what} "${result.name}"`
      return [
        `violated: ${how} (${size})`,
        `${kind}, ${result.history.length} steps:`,
        '',
        chartHistory(result.history, names, options),
        '',
        `=> ${result.message}`,
      ].join('\n')
    }
  }
}

function wrap(text: string, width: number): string[] {
  const lines: string[] = []
  let current = ''
  for (const word of text.split(' ')) {
    if (current !== '' && current.length + 1 + word.length > width) {
      lines.push(current)
      current = `  ${word}`
    } else current = current === '' ? word : `${current} ${word}`
  }
  return [...lines, current]
}
