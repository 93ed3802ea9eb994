import { expect, test } from 'vitest'
import { actor, catalogue, chartHistory, explore, type RuleEntry, type Scenario, type Step } from '../src/index.ts'

const write = (value: number): Step<{ x: number }> => ({
  label: `write ${value}`,
  run: (state) => {
    state.x = value
  },
  shows: ({ x }) => `x=${x}`,
})
const small = (value: number): Scenario<{ x: number }> => ({
  initial: () => ({ x: 0 }),
  actors: [actor('left', {}, [write(1)]), actor('right', {}, [write(value)])],
  invariants: [{ name: 'small', check: ({ x }) => (x < 3 ? null : `x is ${x}`) }],
})
const entry = (name: string, mutant: number, caughtAs = 'small'): RuleEntry<{ x: number }> => ({
  name,
  rule: 'x stays small',
  source: 'this test',
  version: '1.0',
  scenario: () => small(2),
  mutant: { breaks: `writes ${mutant}`, caughtAs, scenario: () => small(mutant) },
})

test('the list says for each rule whether its mutant was caught, for the right reason', () => {
  const list = catalogue([entry('good', 9), entry('tame', 1), entry('other-reason', 9, 'deadlock')]).listScenarios()
  expect(list.scenarios.map(({ name, mutantCaught }) => [name, mutantCaught])).toEqual([
    ['good', true],
    ['tame', false],
    ['other-reason', false],
  ])
  expect(list.scenarios[0]).toEqual({
    name: 'good',
    rule: 'x stays small',
    source: 'this test',
    version: '1.0',
    states: 5,
    mutantCaught: true,
    bounded: false,
  })
  expect(JSON.parse(JSON.stringify(list))).toEqual(list)
})

test('one rule as text', () => {
  expect(catalogue([entry('good', 9)]).explore('good').text).toBe(
    [
      'good: x stays small',
      'source: this test (1.0)',
      '',
      'rule kept: holds: 5 states, 4 steps between them, at most 2 deep, 2 complete histories',
      '',
      'rule broken (writes 9): violated: invariant "small" (3 states, 2 steps between them, at most 1 deep)',
      'shortest history, 1 steps:',
      '',
      ' # | left | right',
      '---+------+---------------',
      ' 1 |      | write 9 -> x=9',
      '',
      '=> x is 9',
    ].join('\n'),
  )
})

test('long cells are wrapped inside their column', () => {
  const result = explore(small(2))
  expect(result.kind).toBe('holds')
  const history = [{ actor: 1, label: 'a long label that has to be broken somewhere', shows: '' }]
  expect(chartHistory(history, ['left', 'right'], { width: 50 })).toBe(
    [
      ' # | left | right',
      '---+------+---------------------',
      ' 1 |      | a long label that',
      '   |      |   has to be broken',
      '   |      |   somewhere',
    ].join('\n'),
  )
})

test('unknown and double names', () => {
  const rules = catalogue([entry('kvm-counter', 9), entry('gru-counter', 9), entry('release', 9), entry('xip', 9)])
  expect(() => rules.explore('kvm-conter')).toThrow(/nearest: kvm-counter, gru-counter/)
  expect(() => catalogue([entry('a', 9), entry('b', 9), entry('a', 9)])).toThrow(/same name: a/)
})
