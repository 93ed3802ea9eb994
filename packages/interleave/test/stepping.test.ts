/** Scenarios taken step by step. */
import { expect, test } from 'vitest'
import { actor, begin, explore, followed, type Scenario } from '../src/index.ts'

interface Counter {
  value: number
}

const add = [
  {
    label: 'read',
    run: (state: Counter, me: { seen: number }) => {
      me.seen = state.value
    },
  },
  {
    label: 'write',
    run: (state: Counter, me: { seen: number }) => {
      state.value = me.seen + 1
    },
    shows: ({ value }: Counter) => `value=${value}`,
  },
]
const scenario: Scenario<Counter> = {
  initial: () => ({ value: 0 }),
  actors: [actor('A', { seen: 0 }, add), actor('B', { seen: 0 }, add)],
  atEnd: [{ name: 'nothing lost', check: ({ value }) => (value === 2 ? null : `value is ${value}, not 2`) }],
}

test('a moment leads to others, and stays what it is', () => {
  const first = begin(scenario)
  expect(first.next).toEqual([
    { label: 'read', ready: true },
    { label: 'read', ready: true },
  ])
  const second = first.take(0).take(1)
  expect(first.history).toEqual([])
  expect(second.next.map(({ label }) => label)).toEqual(['write', 'write'])
  const end = second.take(1).take(0)
  expect(end.next).toEqual([
    { label: null, ready: false },
    { label: null, ready: false },
  ])
  expect(end.trouble).toEqual({ what: 'end', name: 'nothing lost', message: 'value is 1, not 2' })
  expect(end.history.at(-1)).toEqual({ actor: 0, label: 'write', shows: 'value=1' })
  expect(() => end.take(0)).toThrow('actor 0 cannot go on')
  expect(first.take(0).take(0).take(1).take(1)).toMatchObject({ trouble: null, state: { value: 2 } })
})

test('the turns of a history that was found lead to the same trouble', () => {
  const found = explore(scenario)
  if (found.kind !== 'violated') throw new Error('nothing was found')
  const moment = followed(
    scenario,
    found.history.map(({ actor: who }) => who),
  )
  expect(moment.history).toEqual(found.history)
  expect(moment.trouble?.message).toBe(found.message)
})

test('who waits cannot go on, and somebody else has the turn', () => {
  const held = { locks: { lock: '' }, order: [] as string[] }
  type State = typeof held
  const steps = (name: string) => [
    {
      label: 'lock',
      when: ({ locks }: State) => locks.lock === '',
      run: (state: State) => {
        state.locks.lock = name
        state.order.push(name)
      },
    },
    {
      label: 'unlock',
      run: (state: State) => {
        state.locks.lock = ''
      },
    },
  ]
  const locking: Scenario<State> = {
    initial: () => structuredClone(held),
    actors: ['A', 'B'].map((name) => actor(name, {}, steps(name))),
  }
  const moment = begin(locking).take(0)
  expect(moment.next).toEqual([
    { label: 'unlock', ready: true },
    { label: 'lock', ready: false },
  ])
  // B would be next, and cannot: A goes on.
  expect(followed(locking, [0, 1, 1, 1]).state.order).toEqual(['A', 'B'])
})

test('a rule that is broken in a step ends the history with that step', () => {
  const broken: Scenario<{ n: number }> = {
    initial: () => ({ n: 0 }),
    actors: [
      actor('A', {}, [
        {
          label: 'breaks it',
          run: () => {
            throw Object.assign(new Error('not so'), { name: 'RuleViolation', rule: 'so' })
          },
        },
      ]),
    ],
  }
  const moment = begin(broken).take(0)
  expect(moment).toMatchObject({
    trouble: { what: 'rule', name: 'so', message: 'not so' },
    history: [{ label: 'breaks it' }],
  })
  expect(moment.next).toEqual([{ label: 'breaks it', ready: false }])
})
