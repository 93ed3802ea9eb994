/** `tmem explore`: rules of page mapping, each run through all interleavings of a small program, and once broken on purpose. */
import { setImmediate } from 'node:timers/promises'
import type { RuleReport, RuleSummary } from '@tmem/interleave'
import { pageMapping } from '@tmem/mmu-notifier'
import pc from 'picocolors'
import { BadInput, Failed, throwIfInterrupted } from './ending.ts'
import { type Terminal, tableOf } from './terminal.ts'

/** Options of the command. */
export interface ExploreOptions {
  readonly list?: true
  readonly json?: true
}

/** Explores one rule and prints the history of its mutant as a chart; or all, and prints a table. */
export async function explore(name: string | undefined, options: ExploreOptions, terminal: Terminal): Promise<void> {
  if (name !== undefined && options.list === true) throw new BadInput('give a name or --list, not both')
  const json = options.json === true
  const reports = name === undefined ? await exploreAll(json, terminal) : [exploreOne(name, json, terminal)]
  const uncaught = reports.filter(({ mutantCaught }) => !mutantCaught)
  if (uncaught.length > 0)
    throw new Failed(`the broken rule was not caught: ${uncaught.map((report) => report.name).join(', ')}`)
}

async function exploreAll(json: boolean, terminal: Terminal): Promise<RuleSummary[]> {
  const scenarios: RuleSummary[] = []
  const progress = terminal.progress('exploring')
  try {
    for (const entry of pageMapping.entries) {
      const { name, rule, source, version, states, mutantCaught } = pageMapping.explore(entry.name)
      scenarios.push({ name, rule, source, version, states, mutantCaught })
      progress.at(scenarios.length, pageMapping.entries.length)
      await setImmediate()
      throwIfInterrupted(terminal.signal)
    }
  } finally {
    progress.end()
  }
  if (json) terminal.print(JSON.stringify({ scenarios }))
  else {
    const caught = (yes: boolean): string => (yes ? pc.green('yes') : pc.red('NO'))
    const rows = scenarios.map(({ name, version, states, mutantCaught, rule, source }) => [
      name,
      version,
      `${states}`,
      caught(mutantCaught),
      rule,
      source,
    ])
    const heads = ['scenario', 'kernel', 'states', 'mutant caught', 'rule', 'source']
    terminal.print(tableOf(heads, rows, ['left', 'left', 'right', 'left', 'left', 'left']))
    terminal.print('\nAll interleavings of each were run. tmem explore NAME shows how its mutant breaks the rule.')
  }
  return scenarios
}

function exploreOne(name: string, json: boolean, terminal: Terminal): RuleSummary {
  let found: RuleReport
  try {
    found = pageMapping.explore(name, { width: process.stdout.columns ?? 100 })
  } catch (error) {
    // No rule has this name; the message has the nearest ones.
    if (error instanceof RangeError) throw new BadInput(`${error.message}; tmem explore --list shows all`)
    throw error
  }
  const { text, ...report } = found
  terminal.print(json ? JSON.stringify(report) : text)
  return report
}
