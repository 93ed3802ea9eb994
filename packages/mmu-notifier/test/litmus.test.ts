/**
 * Rules as litmus tests, before two judges. herd7 is in no Debian package (opam: herdtools7), and its model of the
 * kernel is in the kernel's sources: where both are, TMEM_LKMM=.../tools/memory-model lets these tests ask it.
 */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { explore, type LitmusTest, litmusScenario, litmusText } from '@tmem/interleave'
import { describe, expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { pageMappingRules } from '../src/index.ts'

const rules = pageMappingRules.flatMap(({ name, litmus }) => (litmus === undefined ? [] : [[name, litmus] as const]))
const model = process.env['TMEM_LKMM'] ?? 'TMEM_LKMM (tools/memory-model of the kernel)'

/** Whether herd7 finds the forbidden outcome: Never or Sometimes. */
function herd(litmus: LitmusTest): string {
  const directory = mkdtempSync(join(tmpdir(), 'tmem-litmus-'))
  try {
    const file = join(directory, 'test.litmus')
    writeFileSync(file, litmusText(litmus))
    const output = execFileSync('herd7', ['-I', model, '-conf', `${model}/linux-kernel.cfg`, file], {
      encoding: 'utf8',
    })
    return /^Observation \S+ (\w+)/m.exec(output)?.[1] ?? output
  } finally {
    rmSync(directory, { recursive: true })
  }
}

const unfenced = (litmus: LitmusTest): LitmusTest => ({
  ...litmus,
  threads: litmus.threads.map((thread) => ({ ...thread, steps: thread.steps.filter((step) => !('fence' in step)) })),
})

test('there are some', () => {
  expect(rules.length).toBeGreaterThanOrEqual(3)
})

describe.each(rules)('%s', (_, { kept, broken }) => {
  test('the explorer finds the forbidden outcome under the broken rule only', () => {
    expect(explore(litmusScenario(kept)).kind).toBe('holds')
    expect(explore(litmusScenario(broken))).toMatchObject({ kind: 'violated', name: 'forbidden' })
    // Nothing but the order of the same accesses differs.
    const accesses = ({ threads }: LitmusTest) =>
      threads.map(({ steps }) => steps.map((one) => JSON.stringify(one)).sort())
    expect(accesses(broken)).toEqual(accesses(kept))
    expect(broken.forbidden).toEqual(kept.forbidden)
  })

  test('herd7 agrees on both; and it needs the fences, which the explorer does not', (ctx) => {
    requires(ctx, { commands: ['herd7'], paths: [model] })
    expect([herd(kept), herd(broken), herd(unfenced(kept))]).toEqual(['Never', 'Sometimes', 'Sometimes'])
    expect(explore(litmusScenario(unfenced(kept))).kind).toBe('holds')
  })
})
