/**
 * A catalogue of rules: for each rule a scenario in which it is kept, and a mutant, the same scenario with that one
 * rule broken, which the explorer must catch. A rule whose mutant is not caught is not tested by its scenario.
 */
import { type ChartOptions, chartExploration } from './chart.ts'
import { type Exploration, type ExploreOptions, explore } from './explore.ts'
import type { LitmusTest } from './litmus.ts'
import type { Scenario } from './scenario.ts'

/** One rule with the scenario and the mutant that test it. */
export interface RuleEntry<S extends object = object> {
  /** Short, unique, in lower case with hyphens. */
  readonly name: string
  /** The rule in one sentence. */
  readonly rule: string
  /** Where the rule is stated: a kernel's file, a commit, a mail, a document. */
  readonly source: string
  /** The version of the modelled system (of the kernel) whose rule it is. */
  readonly version: string
  scenario(): Scenario<S>
  readonly mutant: {
    /** What the mutant does instead. */
    readonly breaks: string
    /** `Violated.name` that must be found: a mutant that fails for another reason does not count as caught. */
    readonly caughtAs: string
    scenario(): Scenario<S>
  }
  /** The accesses on which a lockless rule hangs, and the same with the rule broken. */
  readonly litmus?: { readonly kept: LitmusTest; readonly broken: LitmusTest }
}

/** A rule as data, for `--list --json`. */
export interface RuleSummary {
  readonly name: string
  readonly rule: string
  readonly source: string
  readonly version: string
  /** States visited in the scenario with the rule kept; all of its interleavings are covered. */
  readonly states: number
  /** The scenario holds and its mutant was caught for the right reason. */
  readonly mutantCaught: boolean
  /** A bound was reached in one of the two explorations: then nothing is shown, and `mutantCaught` may be false. */
  readonly bounded: boolean
}

/** Both explorations of one rule. */
export interface RuleReport extends RuleSummary {
  readonly breaks: string
  readonly kept: Exploration
  readonly broken: Exploration
  /** Everything as text, with the shortest history to the mutant's violation as a chart. */
  readonly text: string
}

export interface Catalogue {
  readonly entries: readonly RuleEntry[]
  /** All rules explored. */
  listScenarios(options?: ExploreOptions): { readonly scenarios: readonly RuleSummary[] }
  /** @throws RangeError if there is no rule of this name; the message has the nearest names. */
  explore(name: string, options?: ExploreOptions & ChartOptions): RuleReport
}

/** @throws RangeError if two rules have the same name. */
export function catalogue(entries: readonly RuleEntry[]): Catalogue {
  const byName = new Map(entries.map((entry) => [entry.name, entry]))
  if (byName.size !== entries.length) {
    const twice = entries.filter((entry) => byName.get(entry.name) !== entry).map(({ name }) => name)
    throw new RangeError(`two rules have the same name: ${twice.join(', ')}`)
  }
  return {
    entries,
    listScenarios: (options = {}) => ({
      scenarios: entries.map((entry) => {
        const { name, rule, source, version, states, mutantCaught, bounded } = reportOn(entry, options)
        return { name, rule, source, version, states, mutantCaught, bounded }
      }),
    }),
    explore: (name, options = {}) => {
      const entry = byName.get(name)
      if (entry === undefined) {
        throw new RangeError(`no scenario "${name}"; nearest: ${nearest(name, [...byName.keys()]).join(', ')}`)
      }
      return reportOn(entry, options)
    },
  }
}

function reportOn(entry: RuleEntry, options: ExploreOptions & ChartOptions): RuleReport {
  const { width, ...bounds } = options
  const chart = width === undefined ? {} : { width }
  return ruleReport(entry, explore(entry.scenario(), bounds), explore(entry.mutant.scenario(), bounds), chart)
}

/** The report on a rule whose scenario and mutant have been explored. */
export function ruleReport(
  entry: RuleEntry,
  kept: Exploration,
  broken: Exploration,
  options: ChartOptions = {},
): RuleReport {
  const { name, rule, source, version, mutant } = entry
  const [scenario, mutated] = [entry.scenario(), mutant.scenario()]
  const text = [
    `${name}: ${rule}`,
    `source: ${source} (${version})`,
    '',
    `rule kept: ${chartExploration(kept, namesOf(scenario), options)}`,
    '',
    `rule broken (${mutant.breaks}): ${chartExploration(broken, namesOf(mutated), options)}`,
  ].join('\n')
  const mutantCaught = kept.kind === 'holds' && broken.kind === 'violated' && broken.name === mutant.caughtAs
  const bounded = kept.kind === 'bounded' || broken.kind === 'bounded'
  return {
    name,
    rule,
    source,
    version,
    states: kept.states,
    mutantCaught,
    bounded,
    breaks: mutant.breaks,
    kept,
    broken,
    text,
  }
}

function namesOf(scenario: Scenario<object>): string[] {
  return scenario.actors.map(({ name }) => name)
}

/** The three names that share most pairs of letters with what was asked for. */
function nearest(wanted: string, names: readonly string[]): string[] {
  const pairs = (text: string): Set<string> => new Set(Array.from(text, (_, i) => text.slice(i, i + 2)))
  const asked = pairs(wanted)
  const score = (name: string): number => {
    const own = pairs(name)
    return [...own].filter((pair) => asked.has(pair)).length / (own.size + asked.size)
  }
  return names.toSorted((a, b) => score(b) - score(a)).slice(0, 3)
}
