import { readFileSync } from 'node:fs'
import { type Exploration, type ExploreOptions, explore, type Scenario } from '@tmem/interleave'
import { describe, expect, test } from 'vitest'
import { pageMapping, pageMappingRules } from '../src/index.ts'

type Reduction = NonNullable<ExploreOptions['reduction']>

/** Verdict, states, and every state in which nobody could go on. */
function outcome(scenario: Scenario<object>, reduction: Reduction) {
  const ends = new Set<string>()
  const collect = {
    name: 'collect',
    check: (state: object) => {
      ends.add(JSON.stringify(state))
      return null
    },
  }
  const result = explore({ ...scenario, atEnd: [...(scenario.atEnd ?? []), collect] }, { reduction })
  return { kind: result.kind, states: result.states, ends: [...ends].sort() }
}

describe('every rule', { timeout: 120_000 }, () => {
  test.each(pageMappingRules.map((entry) => [entry.name, entry] as const))('%s', (_, { mutant, ...entry }) => {
    // Audited: a wrong footprint would make the reduction leave histories out.
    const kept = explore(entry.scenario(), { auditFootprints: true })
    const broken = explore(mutant.scenario(), { auditFootprints: true })
    expect(kept).toMatchObject({ kind: 'holds' })
    expect(broken).toMatchObject({ kind: 'violated', name: mutant.caughtAs, shortest: true })
    // The reductions hide nothing. (What they find is searched again without them.)
    const full = outcome(entry.scenario(), 'none')
    expect(full.kind).toBe('holds')
    for (const reduction of ['persistent-sets', 'dynamic'] as const) {
      const reduced = outcome(entry.scenario(), reduction)
      expect(reduced.kind).toBe('holds')
      expect(reduced.ends).toEqual(full.ends)
      expect(reduced.states).toBeLessThanOrEqual(full.states)
    }
    // What is found does not hang on declarations. (A mutant may break more than one thing.)
    const watched = explore(mutant.scenario(), { reduction: 'dynamic' })
    expect(watched).toMatchObject({ kind: 'violated', shortest: true })
    const steps = (found: Exploration): number => (found.kind === 'violated' ? found.history.length : 0)
    expect(steps(watched)).toBeLessThanOrEqual(steps(broken))
  })
})

test('the table', { timeout: 120_000 }, () => {
  const { scenarios } = pageMapping.listScenarios()
  expect(scenarios.length).toBeGreaterThanOrEqual(100)
  expect(scenarios.filter(({ mutantCaught }) => !mutantCaught)).toEqual([])
  expect(new Set(scenarios.map(({ name }) => name)).size).toBe(scenarios.length)
  for (const { name, rule, source, states } of scenarios) {
    expect(name).toMatch(/^[a-z0-9]+(-[a-z0-9]+)*$/)
    expect(rule.length).toBeGreaterThan(20)
    expect(source.length).toBeGreaterThan(3)
    expect(states).toBeGreaterThan(0)
  }
  expect(JSON.parse(JSON.stringify(scenarios))).toEqual(scenarios)
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const rows = scenarios.map(({ name, rule, states }) => `| \`${name}\` | ${rule} | ${states} |`)
  expect(readme).toContain(rows.join('\n'))
  expect(readme).toContain(`${scenarios.reduce((sum, { states }) => sum + states, 0).toLocaleString('en')} states`)
  expect(readme).toContain(`${scenarios.length} rules`)
  const watched = pageMappingRules.map((entry) => explore(entry.scenario(), { reduction: 'dynamic' }).states)
  expect(readme).toContain(`${watched.reduce((sum, states) => sum + states, 0).toLocaleString('en')} with`)
})

test('one rule as a chart', () => {
  const report = pageMapping.explore('ranges-need-a-counter')
  expect(JSON.parse(JSON.stringify(report))).toEqual(report)
  expect(() => pageMapping.explore('kvm-sequence')).toThrow(/nearest: kvm-sequence-/)
})
