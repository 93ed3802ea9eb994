import { readFileSync } from 'node:fs'
import { explore } from '@tmem/interleave'
import { describe, expect, test } from 'vitest'
import { pageMapping, pageMappingRules } from '../src/index.ts'

describe('every rule', () => {
  test.each(pageMappingRules.map((entry) => [entry.name, entry] as const))('%s', (_, { mutant, ...entry }) => {
    // Audited: a wrong footprint would make the reduction leave histories out.
    const kept = explore(entry.scenario(), { auditFootprints: true })
    const broken = explore(mutant.scenario(), { auditFootprints: true })
    expect(kept).toMatchObject({ kind: 'holds' })
    expect(broken).toMatchObject({ kind: 'violated', name: mutant.caughtAs, shortest: true })
    // The reduction hides nothing. (What it finds is searched again without it.)
    const full = explore(entry.scenario(), { reduction: 'none' })
    expect(full.kind).toBe('holds')
    expect(kept.states).toBeLessThanOrEqual(full.states)
  })
})

test('the table', { timeout: 60_000 }, () => {
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
})

test('one rule as a chart', () => {
  const report = pageMapping.explore('ranges-need-a-counter')
  expect(JSON.parse(JSON.stringify(report))).toEqual(report)
  expect(() => pageMapping.explore('kvm-sequence')).toThrow(/nearest: kvm-sequence-/)
})
