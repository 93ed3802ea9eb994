/**
 * The suite: all rules that apply to a store, as named cases.
 *
 * Which rules apply is read off the store's capabilities and the manifest. Nothing is skipped in silence: a capability
 * that is missing has a case that checks that it is missing, a reason that the store never gives has one that checks
 * that.
 */
import type { Capabilities } from '@tmem/core'
import { PutOutcome } from '@tmem/core'
import type { DrivenReason, Kind, Manifest, Mode, Refusal, Subject, World } from './harness.ts'
import { Hands, modes, openWorld, poolOf, Trial } from './harness.ts'
import { ConformanceError } from './pages.ts'
import { runProperty } from './property.ts'
import { type Bench, capabilitiesOf, type PageRule, pageRules, refusalRule, scopeOf, storeRules } from './rules.ts'

/** One case of the suite. */
export interface Case {
  /** The section: the page size, or what the rule is about. */
  readonly section: string
  /** The rule, the same for every store. */
  readonly name: string
  /** Opens a store, tries the rule, closes the store. Rejects with `ConformanceError` when the rule is broken. */
  run(): Promise<void>
}

/** What the suite needs of a test runner: `describe` and `it` of vitest, node:test, mocha or jest. */
export interface Runner {
  describe(name: string, body: () => void): unknown
  it(name: string, body: () => Promise<void>): unknown
}

/** Name of the case that compares whole histories with the reference store. */
export const propertyName = 'any history is answered as the reference store could have'

/**
 * Registers all cases for a store: `await conformance({name, open}, {describe, it})`. The store is opened once before
 * that, to see what it can do.
 */
export async function conformance(subject: Subject, runner: Runner): Promise<void> {
  const cases = await conformanceCases(subject)
  runner.describe(`${subject.name} conforms`, () => {
    for (const section of new Set(cases.map((one) => one.section)))
      runner.describe(section, () => {
        for (const one of cases) if (one.section === section) runner.it(one.name, () => one.run())
      })
  })
}

/** All cases for a store, for a test runner of another kind. */
export async function conformanceCases(subject: Subject): Promise<Case[]> {
  const capabilities = await capabilitiesOf(subject)
  const manifest = subject.manifest ?? {}
  const scope = scopeOf(capabilities, manifest)
  const cases: Case[] = []
  const bench = (worlds: World[]): Bench => ({
    capabilities,
    manifest,
    ...scope,
    ...benchTools(subject, worlds, scope),
  })
  for (const rule of storeRules)
    if (rule.when?.(capabilities) ?? true)
      cases.push({ section: 'store', name: rule.name, run: () => withWorlds((worlds) => rule.run(bench(worlds))) })

  for (const [reason, refusal] of Object.entries(refusalsOf(capabilities, manifest))) {
    const rule = refusalRule(reason as DrivenReason, refusal)
    cases.push({ section: 'refusals', name: rule.name, run: () => withWorlds((worlds) => rule.run(bench(worlds))) })
  }

  for (const size of scope.sizes)
    for (const rule of pageRules) {
      if (rule.sizes === 'smallest' && size !== scope.sizes[0]) continue
      if (!(rule.when?.(capabilities) ?? true)) continue
      const applicable = scope.kinds.filter((kind) => rule.kinds?.(kind) ?? true)
      if (applicable.length === 0) continue
      // The ways of getting a page do not depend on its size: all four are tried with the smallest.
      const tried = rule.modes ?? (size === scope.sizes[0] ? modes : modes.slice(0, 2))
      const trials = applicable.flatMap((kind) => tried.map((mode): TrialOf => ({ kind, mode, size })))
      const run = (): Promise<void> => withWorlds((worlds) => tryRule(subject, rule, trials, worlds))
      cases.push({ section: `pages of ${size / 1024} KiB`, name: rule.name, run })
    }

  const name = `${subject.name} conforms history ${propertyName}`
  cases.push({ section: 'history', name: propertyName, run: () => runProperty(subject, scope, name) })
  return cases
}

interface TrialOf {
  readonly kind: Kind
  readonly mode: Mode
  readonly size: number
}

/** Tries a rule with pools of each kind and in each mode, in one store. */
async function tryRule(subject: Subject, rule: PageRule, trials: readonly TrialOf[], worlds: World[]): Promise<void> {
  const world = await openWorld(subject.open)
  worlds.push(world)
  for (const { kind, mode, size } of trials) {
    const trial = new Trial(world, subject.manifest ?? {}, kind, mode, size)
    try {
      await rule.run(trial)
      trial.destroyPools()
    } catch (error) {
      if (!(error instanceof Error)) throw error
      const where = `${kind.name} pool, ${size / 1024} KiB pages, ${mode}`
      throw new ConformanceError(`${where}: ${error.message}`, { cause: error })
    }
  }
}

function benchTools(
  subject: Subject,
  worlds: World[],
  scope: { readonly kinds: readonly Kind[]; readonly sizes: readonly number[] },
): Pick<Bench, 'open' | 'hands'> {
  return {
    open: async (open = subject.open) => {
      const world = await openWorld(open)
      worlds.push(world)
      return world
    },
    hands: (store, client = 1) => {
      const kind = scope.kinds.find(({ persistent }) => persistent) ?? scope.kinds[0]!
      const { persistent, shared } = kind
      const pool = poolOf(store, { client, persistent, shared, pageSize: scope.sizes[0]! })
      return new Hands(pool, 'single', subject.manifest?.steady ?? true)
    },
  }
}

/** Closes every store that a case opened, also when it failed. */
async function withWorlds(run: (worlds: World[]) => Promise<void>): Promise<void> {
  const worlds: World[] = []
  try {
    await run(worlds)
  } finally {
    for (const { store } of worlds) await store.close()
  }
}

/** How each reason is tried: what the manifest leaves out is never given, but for `Frozen`, which every store has. */
function refusalsOf(capabilities: Capabilities, manifest: Manifest): Record<DrivenReason, Refusal> {
  const reasons = Object.keys(PutOutcome).filter((name) => name !== 'Stored' && name !== 'PoolGone') as DrivenReason[]
  const never = 'the manifest names no way to it'
  return Object.fromEntries(
    reasons.map((reason) => {
      const fallback: Refusal = reason === 'Frozen' ? { by: 'freezing' } : never
      return [reason, manifest.refusals?.[reason] ?? fallback]
    }),
  ) as Record<DrivenReason, Refusal>
}
