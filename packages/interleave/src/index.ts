/** Explores all interleavings of small concurrent programs. See the README for an example. */
export {
  type Catalogue,
  catalogue,
  type RuleEntry,
  type RuleReport,
  type RuleSummary,
  ruleReport,
} from './catalogue.ts'
export { type ChartOptions, chartExploration, chartHistory } from './chart.ts'
export {
  type Bounded,
  type Counts,
  type Exploration,
  type ExploreOptions,
  explore,
  exploreWithPauses,
  type HistoryStep,
  type Holds,
  replay,
  type Violated,
} from './explore.ts'
export { type LitmusStep, type LitmusTest, type LitmusThread, litmusScenario, litmusText } from './litmus.ts'
export {
  type Actor,
  acquire,
  actor,
  type Check,
  type Edit,
  END,
  edited,
  type Footprint,
  type HasLocks,
  isRuleViolation,
  type Jump,
  RuleViolation,
  release,
  requireRule,
  runAlone,
  type Scenario,
  type Step,
} from './scenario.ts'
export { begin, followed, type Moment, type NextStep } from './stepping.ts'
