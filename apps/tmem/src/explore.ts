/**
 * `tmem explore`: runs small concurrent programs through all their interleavings: the rules of page mapping, each kept
 * and once broken on purpose, or a program from a file of the user.
 *
 * The default export of a file is a scenario, a rule (a scenario and its mutant), or a function that returns either.
 * The function gets the functions of @tmem/interleave, so that the file need not import a package. Its code runs in
 * this process.
 */
import { on } from 'node:events'
import { availableParallelism } from 'node:os'
import { basename, resolve } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { pathToFileURL } from 'node:url'
import { Worker } from 'node:worker_threads'
import type { ExploreData, ExploreSide } from '@tmem/console'
import type { Exploration, RuleEntry, RuleReport, RuleSummary, Scenario } from '@tmem/interleave'
import * as interleave from '@tmem/interleave'
import { checkTrace, type TraceReport } from '@tmem/kernel-guest'
import { pageMapping } from '@tmem/mmu-notifier'
import pc from 'picocolors'
import { BadInput, Failed, throwIfInterrupted } from './ending.ts'
import type { ExplorerData } from './explore-worker.ts'
import { readGivenFile } from './given-file.ts'
import { judgeReport, type ReportOptions, writeReport } from './report-file.ts'
import { type Terminal, tableOf } from './terminal.ts'

const maxTraceBytes = 2 ** 30

/** Options of the command. */
export interface ExploreOptions extends ReportOptions {
  readonly list?: true
  /** Print the litmus test of a rule instead; with `mutant`, that of its mutant. */
  readonly litmus?: true
  readonly mutant?: true
  /** A trace of the calls of a guest's kernel, to check instead. */
  readonly trace?: string
  readonly json?: true
  /** Most states that one exploration may visit. */
  readonly states?: number
}

/**
 * Explores one rule and prints the history of its mutant as a chart; or all rules, and prints a table; or a file.
 *
 * Throws `Failed` unless everything holds, every mutant was caught, and no exploration was stopped by its bound.
 */
export async function explore(name: string | undefined, options: ExploreOptions, terminal: Terminal): Promise<void> {
  if (options.trace !== undefined) {
    if (name !== undefined) throw new BadInput('give a name or --trace, not both')
    if (options.report !== undefined) throw new BadInput('--report shows interleavings: leave out --trace')
    exploreTrace(options.trace, options, terminal)
    return
  }
  if (name !== undefined && options.list === true) throw new BadInput('give a name or --list, not both')
  if (options.report !== undefined && options.litmus === true)
    throw new BadInput('--report shows interleavings: leave out --litmus')
  judgeReport(options)
  if (options.litmus === true) {
    printLitmus(name, options, terminal)
    return
  }
  if (options.mutant === true) throw new BadInput('--mutant needs --litmus: give both')
  if (name === undefined) return exploreAll(options, terminal)
  if (isFile(name)) return exploreFile(name, options, terminal)
  const entry = pageMapping.entries.find((one) => one.name === name)
  const found = entry ?? unknown(name)
  const report = await reportOn(found, options, terminal)
  writeReport(options, { kind: 'explore', explore: [pictureOf(found, report)] })
  printReport(report, options, terminal)
}

/** Throws `BadInput` for a file that is not a trace, `Failed` for a trace that contradicts the rules. */
function exploreTrace(path: string, { json }: ExploreOptions, terminal: Terminal): void {
  let bytes: Uint8Array
  try {
    bytes = readGivenFile(path, maxTraceBytes)
  } catch (error) {
    throw new BadInput(`--trace: ${path} cannot be read: ${(error as Error).message}`)
  }
  let report: TraceReport
  try {
    report = checkTrace(bytes)
  } catch (error) {
    if (error instanceof RangeError) throw new BadInput(`--trace: ${path}: ${error.message}`)
    throw error
  }
  const { events, seconds, kinds, singlePages, ranges, hooks, hooksWithPages, contradictions } = report
  if (json === true) terminal.print(JSON.stringify(report))
  else {
    const rows = Object.entries(kinds).map(([kind, count]) => [kind, count.toLocaleString('en')])
    terminal.print(tableOf(['event', 'times'], rows))
    const share = singlePages + ranges === 0 ? '-' : `${((100 * singlePages) / (singlePages + ranges)).toFixed(1)} %`
    terminal.print(
      `\n${events.toLocaleString('en')} events in ${seconds.toFixed(1)} s. ${share} of the ranges are one page: with a callback for these ` +
        `there would be ${hooksWithPages.toLocaleString('en')} hooks instead of ${hooks.toLocaleString('en')}.`,
    )
    for (const { event, rule, message } of contradictions) terminal.print(pc.red(`event ${event}: ${rule}: ${message}`))
  }
  const [first] = contradictions
  if (first !== undefined)
    throw new Failed(`${contradictions.length} contradictions, the first at event ${first.event}: ${first.rule}`)
}

/** A rule for a report: the history that breaks the mutant, and beside it the kept rule with the same turns. */
function pictureOf(entry: RuleEntry, { kept, broken }: Pick<RuleReport, 'kept' | 'broken'>): ExploreData {
  const { name, rule, source, version, mutant } = entry
  const turns = broken.kind === 'violated' ? broken.history.map(({ actor }) => actor) : []
  return {
    name,
    rule,
    source: `${source} (${version})`,
    breaks: mutant.breaks,
    kept: sideOf(entry.scenario(), kept, turns),
    broken: sideOf(mutant.scenario(), broken, turns),
  }
}

function sideOf(scenario: Scenario<object>, found: Exploration, turns: readonly number[]): ExploreSide {
  const actors = scenario.actors.map(({ name }) => name)
  const size = `${found.states} states`
  if (found.kind === 'violated') {
    const { history, message } = found
    return { actors, history, message, found: `violated within ${size}: ${found.name}` }
  }
  const { history, trouble } = interleave.followed(scenario, turns)
  const what = found.kind === 'holds' ? `holds in all ${size}` : `bounded: nothing wrong in ${size}; there are more`
  return { actors, history, message: trouble?.message ?? null, found: what }
}

function printLitmus(name: string | undefined, { mutant, json }: ExploreOptions, terminal: Terminal): void {
  const those = pageMapping.entries.flatMap((entry) => (entry.litmus === undefined ? [] : [entry.name]))
  if (name === undefined) throw new BadInput(`--litmus needs a rule: ${those.join(', ')}`)
  const entry = pageMapping.entries.find((one) => one.name === name) ?? unknown(name)
  if (entry.litmus === undefined)
    throw new BadInput(
      `${name} has no litmus test, as it does not depend on the order of single accesses; these do: ${those.join(', ')}`,
    )
  const [kept, broken] = [entry.litmus.kept, entry.litmus.broken].map(interleave.litmusText)
  if (json === true) terminal.print(JSON.stringify({ name, kept, broken }))
  else terminal.print(((mutant === true ? broken : kept) ?? '').trimEnd())
}

function unknown(name: string): never {
  try {
    pageMapping.explore(name)
  } catch (error) {
    // The message contains the nearest names.
    if (error instanceof RangeError) throw new BadInput(`${error.message}; tmem explore --list shows all`)
    throw error
  }
  throw new BadInput(`no scenario "${name}"`)
}

async function exploreAll(options: ExploreOptions, terminal: Terminal): Promise<void> {
  const reports = await allReports(options, terminal)
  writeReport(options, {
    kind: 'explore',
    explore: reports.map((report, n) => pictureOf(pageMapping.entries[n]!, report)),
  })
  const scenarios: RuleSummary[] = reports.map(({ name, rule, source, version, states, mutantCaught, bounded }) => {
    return { name, rule, source, version, states, mutantCaught, bounded }
  })
  if (options.json === true) terminal.print(JSON.stringify({ scenarios }))
  else {
    const rows = scenarios.map(({ name, version, states, mutantCaught, bounded, rule, source }) => [
      name,
      version,
      `${states}`,
      mutantCaught ? pc.green('yes') : pc.red(bounded ? 'bounded' : 'NO'),
      rule,
      source,
    ])
    const heads = ['scenario', 'kernel', 'states', 'mutant caught', 'rule', 'source']
    terminal.print(tableOf(heads, rows, ['left', 'left', 'right', 'left', 'left', 'left']))
    const all = scenarios.every(({ bounded }) => !bounded)
    terminal.print(
      `\n${all ? 'All interleavings of each were run.' : 'Rows with "bounded" did not run all interleavings.'} ` +
        'tmem explore NAME shows how its mutant breaks the rule.',
    )
  }
  const wrong = reports.flatMap((report) => whyNot(report) ?? [])
  const more = wrong.length > 3 ? `; and ${wrong.length - 3} more` : ''
  if (wrong.length > 0) throw new Failed(`${wrong.slice(0, 3).join('; ')}${more}`)
}

/** The reports on all rules, in the order of the rules; made by one thread for each processor. */
async function allReports({ states }: ExploreOptions, terminal: Terminal): Promise<readonly RuleReport[]> {
  const count = pageMapping.entries.length
  const reports: RuleReport[] = []
  let [asked, done] = [0, 0]
  const progress = terminal.progress('exploring')
  const workerData: ExplorerData = { states }
  const threads = Array.from(
    { length: Math.min(availableParallelism(), count) },
    () => new Worker(new URL('./explore-worker.js', import.meta.url), { workerData }),
  )
  const stop = (): Promise<unknown> => Promise.all(threads.map((thread) => thread.terminate()))
  try {
    await Promise.all(
      threads.map(async (thread) => {
        // An error of the thread rejects this promise, too.
        const messages = on(thread, 'message', { signal: terminal.signal })
        while (asked < count) {
          const number = asked++
          thread.postMessage(number)
          const { value } = await messages.next()
          ;[reports[number]] = value as [RuleReport]
          progress.at(++done, count)
        }
      }),
    )
    progress.done(`${done} rules`)
  } catch (error) {
    throwIfInterrupted(terminal.signal)
    throw error
  } finally {
    await stop()
    progress.end()
  }
  return reports
}

async function reportOn(entry: RuleEntry, options: ExploreOptions, terminal: Terminal): Promise<RuleReport> {
  const kept = await run(entry.scenario(), options, terminal)
  const broken = await run(entry.mutant.scenario(), options, terminal)
  return interleave.ruleReport(entry, kept, broken, { width: process.stdout.columns ?? 100 })
}

function run(scenario: Scenario<object>, { states }: ExploreOptions, terminal: Terminal): Promise<Exploration> {
  return interleave.exploreWithPauses(scenario, states === undefined ? {} : { maxStates: states }, async () => {
    await setImmediate()
    throwIfInterrupted(terminal.signal)
  })
}

function printReport(report: RuleReport, { json }: ExploreOptions, terminal: Terminal): void {
  const { text, ...data } = report
  terminal.print(json === true ? JSON.stringify(data) : text)
  const wrong = whyNot(report)
  if (wrong !== null) throw new Failed(wrong)
}

/** Why a report does not prove its rule; null if it does. */
function whyNot({ name, kept, broken, mutantCaught }: RuleReport): string | null {
  if (mutantCaught) return null
  if (kept.kind === 'violated') return `${name}: the rule does not hold where it is kept (${kept.name})`
  for (const one of [kept, broken]) if (one.kind === 'bounded') return `${name}: ${boundedAt(one.states)}`
  return broken.kind === 'violated'
    ? `${name}: the broken rule was caught as "${broken.name}", which is not the expected violation`
    : `${name}: the broken rule was not caught`
}

const boundedAt = (states: number): string =>
  `bounded: stopped after ${states} states, without a result for the rest; allow more with --states`

// ---------------------------------------------------------------------------------------------------------------
// Files

function isFile(name: string): boolean {
  return /\.[cm]?js$/.test(name) || name.includes('/')
}

async function exploreFile(path: string, options: ExploreOptions, terminal: Terminal): Promise<void> {
  const url = pathToFileURL(resolve(path)).href
  const subject = await load(path, url)
  try {
    if (isRule(subject)) {
      const report = await reportOn(subject, options, terminal)
      writeReport(options, { kind: 'explore', explore: [pictureOf(subject, report)] })
      printReport(report, options, terminal)
      return
    }
    const found = await run(subject, options, terminal)
    const own = { name: basename(path), rule: 'a scenario from a file', source: path, breaks: '' }
    writeReport(options, {
      kind: 'explore',
      explore: [{ ...own, kept: sideOf(subject, found, []), broken: null }],
    })
    const names = subject.actors.map(({ name }) => name)
    const width = process.stdout.columns ?? 100
    terminal.print(options.json === true ? JSON.stringify(found) : interleave.chartExploration(found, names, { width }))
    if (found.kind === 'violated') throw new Failed(`${basename(path)}: violated: ${found.name}`)
    if (found.kind === 'bounded') throw new Failed(`${basename(path)}: ${boundedAt(found.states)}`)
  } catch (error) {
    // Errors that the file's code throws, or that the explorer finds in it, are bad input and not bugs of this program.
    if (inFile(error, url) || isExplorersWord(error)) throw new BadInput(`${path}: ${saying(error, url)}`)
    throw error
  }
}

/** The scenario or rule that a file exports. Throws `BadInput`. */
async function load(path: string, url: string): Promise<Scenario<object> | RuleEntry> {
  let exported: { readonly default?: unknown }
  try {
    exported = (await import(url)) as typeof exported
  } catch (error) {
    throw new BadInput(`${path} cannot be loaded: ${saying(error, url)}`)
  }
  let subject = exported.default
  try {
    if (typeof subject === 'function') subject = await subject(interleave)
    const wrong = whatIsWrong(subject)
    if (wrong !== null) throw new BadInput(`${path}: ${wrong}`)
  } catch (error) {
    if (error instanceof BadInput) throw error
    throw new BadInput(`${path}: ${saying(error, url)}`)
  }
  return subject as Scenario<object> | RuleEntry
}

function isRule(subject: object): subject is RuleEntry {
  return 'mutant' in subject
}

/** Why a file's export is neither a rule nor a scenario; null if it is one. */
function whatIsWrong(subject: unknown): string | null {
  const fields = fieldsOf(subject)
  if (fields === null || !('mutant' in fields || 'initial' in fields || 'actors' in fields)) {
    return (
      'the default export must be a scenario (initial, actors), a rule (name, rule, source, version, scenario, ' +
      'mutant), or a function that returns one'
    )
  }
  if (!('mutant' in fields)) return wrongScenario(fields, 'the scenario')
  const mutant = fieldsOf(fields['mutant']) ?? {}
  for (const key of ['name', 'rule', 'source', 'version']) {
    if (typeof fields[key] !== 'string') return `the rule's ${key} must be a string`
  }
  for (const key of ['breaks', 'caughtAs']) {
    if (typeof mutant[key] !== 'string') return `the mutant's ${key} must be a string`
  }
  for (const [what, of] of Object.entries({ rule: fields, mutant })) {
    if (typeof of['scenario'] !== 'function') return `the ${what}'s scenario must be a function that returns one`
    const wrong = wrongScenario(fieldsOf(of['scenario']()), `the ${what}'s scenario`)
    if (wrong !== null) return wrong
  }
  return null
}

function wrongScenario(fields: Record<string, unknown> | null, what: string): string | null {
  if (typeof fields?.['initial'] !== 'function') return `${what} needs initial, a function that returns the state`
  const { actors } = fields
  if (!Array.isArray(actors) || actors.length === 0) return `${what} needs actors, a list of at least one`
  for (const one of actors.map(fieldsOf)) {
    if (typeof one?.['name'] !== 'string') return `every actor of ${what} needs a name`
    const { name, locals, steps } = one
    if (fieldsOf(locals) === null) return `actor "${name}" needs locals, an object of its registers ({} for none)`
    if (!Array.isArray(steps)) return `actor "${name}" needs steps, a list`
    for (const [index, step] of steps.map(fieldsOf).entries()) {
      if (typeof step?.['label'] !== 'string' || typeof step['run'] !== 'function') {
        return `step ${index + 1} of actor "${name}" needs a label, and run, a function`
      }
    }
  }
  for (const key of ['invariants', 'atEnd']) {
    const checks = fields[key] ?? []
    const fine = (one: unknown): boolean => {
      const check = fieldsOf(one)
      return typeof check?.['name'] === 'string' && typeof check['check'] === 'function'
    }
    if (!Array.isArray(checks) || !checks.every(fine)) return `${key} of ${what} must be a list of { name, check }`
  }
  return null
}

function fieldsOf(value: unknown): Record<string, unknown> | null {
  return typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : null
}

const inFile = (error: unknown, url: string): boolean => error instanceof Error && (error.stack ?? '').includes(url)

/** The refusals of the explorer: state that is not plain data, a jump or an edit that names a missing step. */
const isExplorersWord = (error: unknown): boolean => error instanceof TypeError || error instanceof RangeError

/** The first line of a message, and the line of the file that threw it. */
function saying(error: unknown, url: string): string {
  const message = error instanceof Error ? error.message : String(error)
  const stack = error instanceof Error ? (error.stack ?? '') : ''
  const at = stack.indexOf(`${url}:`)
  const [, line] = /^:(\d+)/.exec(at < 0 ? '' : stack.slice(at + url.length)) ?? []
  return `${message.split('\n')[0]}${line === undefined ? '' : ` (line ${line})`}`
}
