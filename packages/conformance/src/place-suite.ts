/**
 * The suite for places: all rules that apply to one, as named cases, each with a place opened for it alone.
 *
 * A place that passes can be a layer of a stack. A stack checks the same at its boundaries while it runs, with `check:
 * 'model'`.
 */
import type { PlaceSubject } from './place-hands.ts'
import {
  codecRules,
  commonRules,
  memoryRules,
  placePropertyName,
  runPlaceProperty,
  slowRules,
  withPlaces,
} from './place-rules.ts'
import type { Case, Runner } from './suite.ts'

/**
 * Registers all cases for a place: `await placeConformance({name, open}, {describe, it})`. It is opened once before
 * that, to see what it is.
 */
export async function placeConformance(subject: PlaceSubject, runner: Runner): Promise<void> {
  const cases = await placeCases(subject)
  runner.describe(`${subject.name} conforms as a place`, () => {
    for (const section of new Set(cases.map((one) => one.section)))
      runner.describe(section, () => {
        for (const one of cases) if (one.section === section) runner.it(one.name, () => one.run())
      })
  })
}

/** All cases for a place, for a test runner of another kind. */
export async function placeCases(subject: PlaceSubject): Promise<Case[]> {
  const cases: Case[] = []
  const sections = { place: commonRules, codec: codecRules, 'in memory': memoryRules, 'slow place': slowRules }
  await withPlaces(subject, ({ open, manifest }) => {
    const place = open()
    for (const [section, rules] of Object.entries(sections))
      for (const rule of rules)
        if (rule.when?.(place, manifest) ?? true)
          cases.push({ section, name: rule.name, run: () => withPlaces(subject, (bench) => rule.run(bench)) })
  })
  const title = `${subject.name} conforms as a place history ${placePropertyName}`
  cases.push({
    section: 'history',
    name: placePropertyName,
    run: () => withPlaces(subject, (bench) => runPlaceProperty(bench, title)),
  })
  return cases
}
