/** MMU notifiers as an executable model, and the catalogue of page-mapping rules. See the README. */
import { type Catalogue, catalogue, type RuleEntry } from '@tmem/interleave'
import { cowRules } from './scenarios/cow.ts'
import { deviceRules } from './scenarios/devices.ts'
import { guestRules } from './scenarios/guests.ts'
import { gupRules } from './scenarios/gup.ts'
import { intervalRules } from './scenarios/interval.ts'
import { listRules } from './scenarios/list.ts'
import { litmusPairs } from './scenarios/litmus.ts'
import { mappingRules } from './scenarios/mapping.ts'
import { tlbRules } from './scenarios/tlb.ts'
import { xipRules } from './scenarios/xip.ts'

export * from './clients.ts'
export * from './notifier.ts'
export * from './workload.ts'

const rules: readonly RuleEntry[] = [
  ...listRules,
  ...intervalRules,
  ...mappingRules,
  ...xipRules,
  ...gupRules,
  ...cowRules,
  ...tlbRules,
  ...deviceRules,
  ...guestRules,
]

/** Every rule of page mapping with its scenario and its mutant; some with litmus tests. */
export const pageMappingRules: readonly RuleEntry[] = rules.map((entry) => {
  const litmus = litmusPairs[entry.name]
  return litmus === undefined ? entry : { ...entry, litmus }
})

/**
 * The catalogue of all rules. `pageMapping.listScenarios()` explores them all (some seconds) and gives the table of
 * rule, states and whether the mutant was caught; `pageMapping.explore(name)` gives both explorations of one rule and,
 * as `text`, the chart of its mutant's shortest history.
 */
export const pageMapping: Catalogue = catalogue(pageMappingRules)
