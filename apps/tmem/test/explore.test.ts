/** `tmem explore FILE`: rules and scenarios of the user's own. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pageMappingRules } from '@tmem/mmu-notifier'
import { describe, expect, test } from 'vitest'
import { temporaryDirectory, tmem } from './tmem.ts'

const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')

/** A file in a directory without packages. */
function file(code: string): string {
  const path = join(temporaryDirectory(), 'scenario.mjs')
  writeFileSync(path, code)
  return path
}

const scenario = (steps: string, more = ''): string =>
  `export default { initial: () => ({ n: 0 }), actors: [{ name: 'a', locals: {}, steps: [${steps}] }], ${more} }`
const up = `{ label: 'up', run: (state) => { state.n++ } }`

test('the walk-through of the README has 30 lines and prints what it says', async () => {
  const [, code = '', output] = /```js\n(.*?)```\n\n`tmem explore mremap.mjs` prints:\n\n```text\n(.*?)```/s.exec(
    readme,
  )!
  expect(code.trimEnd().split('\n').length).toBeLessThanOrEqual(30)
  const path = file(code)
  expect(await tmem(['explore', path])).toEqual({ code: 0, stdout: output, stderr: '' })

  // Without the flush the rule is broken where it should be kept: the walk-through can fail.
  const broken = await tmem(['explore', file(code.replace('state.oldTranslation = false', ''))])
  expect(broken).toMatchObject({ code: 1, stderr: expect.stringContaining('the rule does not hold where it is kept') })
  const tame = await tmem([
    'explore',
    file(code.replace("'unlock table', before: 'flush 0'", "'flush 0', before: 'unlock table'")),
  ])
  expect(tame).toMatchObject({ code: 1, stderr: 'tmem: mremap-flush: the broken rule was not caught\n' })
})

describe('a scenario', () => {
  test('that holds', async () => {
    const found = await tmem(['explore', file(scenario(up)), '--json'])
    expect(found).toMatchObject({ code: 0, stderr: '' })
    expect(JSON.parse(found.stdout)).toMatchObject({ kind: 'holds', states: 2, histories: '1' })
  })

  test('that does not', async () => {
    const small = `invariants: [{ name: 'small', check: ({ n }) => (n < 2 ? null : 'n is ' + n) }]`
    const found = await tmem(['explore', file(scenario(`${up}, ${up}`, small))])
    expect(found).toMatchObject({ code: 1, stderr: 'tmem: scenario.mjs: violated: small\n' })
    expect(found.stdout).toMatch(/shortest history, 2 steps:(.|\n)*=> n is 2\n$/)
  })

  test('that is larger than the budget', async () => {
    const endless = `{ label: 'up', at: 'x', run: (state) => { state.n++ }, jump: { to: 'x', if: () => true } }`
    const found = await tmem(['explore', file(scenario(endless)), '--states', '1000'])
    expect(found.code).toBe(1)
    expect(found.stdout).toMatch(/^bounded: nothing wrong in 1000 states, /)
    expect(found.stderr).toMatch(/^tmem: scenario.mjs: bounded: stopped after 1000 states, .*\n$/)
  })

  test('that is interrupted', async () => {
    const endless = `{ label: 'up', at: 'x', run: (state) => { state.n++ }, jump: { to: 'x', if: () => true } }`
    const code = `process.stderr.write('begun\\n')\n${scenario(endless)}`
    const found = await tmem(['explore', file(code), '--states', '16777216'], {
      during: async (running) => {
        await new Promise((done) => running.stderr.once('data', done))
        running.kill('SIGINT')
      },
    })
    expect(found).toEqual({ code: 130, stdout: '', stderr: 'begun\ntmem: interrupted\n' })
  })
})

test('a rule of the catalogue under a budget is bounded, too, and not called caught', async () => {
  const found = await tmem(['explore', 'ranges-need-a-counter', '--states', '20', '--json'])
  expect(found.code).toBe(1)
  expect(JSON.parse(found.stdout)).toMatchObject({ bounded: true, mutantCaught: false, kept: { kind: 'bounded' } })
  expect(found.stderr).toMatch(/^tmem: ranges-need-a-counter: bounded: /)
})

test.each([
  ['nothing', '', /the default export must be a scenario/],
  ['a number', 'export default 5', /the default export must be a scenario/],
  ['bad JavaScript', 'export default (', /cannot be loaded: Unexpected/],
  ['a function that throws', '\nexport default () => { throw new Error("no") }', /scenario.mjs: no \(line 2\)$/m],
  ['no actors', 'export default { initial: () => ({}), actors: [] }', /needs actors, a list of at least one/],
  ['a step without run', scenario(`{ label: 'up' }`), /step 1 of actor "a" needs a label, and run/],
  ['a check that is none', scenario(up, 'atEnd: [5]'), /atEnd of the scenario must be a list of \{ name, check \}/],
  [
    'a rule without a mutant',
    'export default { mutant: 0, name: "x", rule: "", source: "" }',
    /rule's version must be/,
  ],
  ['a jump to nowhere', scenario(`{ ...${up}, jump: { to: 'z', if: () => true } }`), /jumps to "z", which no step/],
  ['state that is not plain', scenario(`{ label: 'up', run: (s) => { s.n = new Map() } }`), /state\.n is a Map/],
  ['a mistake in a step', scenario(`{ label: 'up', run: (s) => s.x.y }`), /reading 'y'\) \(line 1\)$/m],
])('%s: one line that says what and where', async (_, code, message) => {
  const found = await tmem(['explore', file(code)])
  expect({ ...found, stderr: found.stderr.split('\n').length }).toEqual({ code: 2, stdout: '', stderr: 2 })
  expect(found.stderr).toMatch(message)
})

test('a file that is not there', async () => {
  const found = await tmem(['explore', './not-there.mjs'])
  expect(found).toMatchObject({
    code: 2,
    stderr: expect.stringMatching(/^tmem: .\/not-there.mjs cannot be loaded: .*\n$/),
  })
})

test('a lockless rule and its mutant as litmus tests', async () => {
  const printed = async (...words: string[]) => tmem(['explore', '--litmus', ...words])
  const kept = await printed('gup-reads-the-directory-again')
  expect(kept).toMatchObject({ code: 0, stderr: '' })
  expect(kept.stdout).toMatch(/^C gup-reads-the-directory-again\n(.|\n)*exists \(0:found=1 \/\\ 1:seen=1\)\n$/)
  const broken = await printed('gup-reads-the-directory-again', '--mutant')
  expect(broken.stdout).toMatch(/^C gup-reads-the-directory-again-broken\n/)
  const { stdout } = await printed('gup-reads-the-directory-again', '--json')
  expect(`${JSON.parse(stdout).kept}${JSON.parse(stdout).broken}`).toBe(kept.stdout + broken.stdout)
  for (const [words, message] of [
    [
      ['ranges-need-a-counter'],
      /^tmem: ranges-need-a-counter has no litmus test, as .*; these do: kvm-sequence-before-count/,
    ],
    [[], /^tmem: --litmus needs a rule: kvm-sequence-before-count, /],
    [['gup-reads-the-dir'], /^tmem: no scenario "gup-reads-the-dir"; nearest: gup-reads-the-directory-again/],
  ] as const) {
    const refused = await printed(...words)
    expect(refused).toMatchObject({ code: 2, stdout: '', stderr: expect.stringMatching(message) })
    expect(refused.stderr.trimEnd().split('\n')).toHaveLength(1)
  }
  expect(await tmem(['explore', 'gup-reads-the-directory-again', '--mutant'])).toMatchObject({ code: 2, stdout: '' })
})

test('all rules, by a thread on each processor: in their order, and what is bounded is said in short', async () => {
  const bounded = await tmem(['explore', '--list', '--states', '2', '--json'])
  expect(bounded).toMatchObject({
    code: 1,
    stderr: expect.stringMatching(/^exploring: \d+ rules\ntmem: (.*: bounded: .*; ){3}and \d+ more\n$/),
  })
  expect(JSON.parse(bounded.stdout).scenarios.map(({ name }: { name: string }) => name)).toEqual(
    pageMappingRules.map(({ name }) => name),
  )
})
