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
})

test('one rule as a chart', () => {
  const report = pageMapping.explore('ranges-need-a-counter')
  expect(JSON.parse(JSON.stringify(report))).toEqual(report)
  expect(pageMapping.explore('page-lives-until-callback-returns').text).toMatchInlineSnapshot(`
    "page-lives-until-callback-returns: invalidate_page is called before the page is freed
    source: mm/mmu_notifier.c, include/linux/mmu_notifier.h 2.6.31

    rule kept: holds: 90 states, 123 steps between them, at most 12 deep, 92 complete histories

    rule broken (the page is freed first): violated: invariant "no dangling spte" (59 states, 74 steps between them, at most 9 deep)
    shortest history, 9 steps:

     # | vcpu                                    | unmap
    ---+-----------------------------------------+-------------------------------------
     1 | read seq -> 0                           |
     2 | look the page up (may sleep) -> frame 0 |
     3 | lock mmu_lock                           |
     4 | count 0 and seq unchanged? -> yes       |
     5 | install the spte                        |
     6 | unlock mmu_lock                         |
     7 | put the page                            |
     8 |                                         | clear and flush the entry -> frame 0
     9 |                                         | free the page -> count 0

    => kvm maps page 0 to frame 0, which is free"
  `)
  expect(() => pageMapping.explore('kvm-sequence')).toThrow(/nearest: kvm-sequence-/)
})
