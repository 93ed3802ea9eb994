import { describe, expect, test } from 'vitest'
import {
  type Actor,
  acquire,
  actor,
  END,
  edited,
  explore,
  type HasLocks,
  RuleViolation,
  release,
  replay,
  runAlone,
  type Scenario,
  type Step,
} from '../src/index.ts'

interface Counter {
  value: number
  locks: Record<string, string>
}

/** Two threads that add one by reading and writing back; with the lock nothing is lost. */
function counter(locked: boolean, threads = 2): Scenario<Counter> {
  const thread = (name: string): Actor<Counter> => {
    const add: Step<Counter, { seen: number }>[] = [
      {
        label: 'read',
        touches: { reads: ['value'] },
        run: (state, me) => {
          me.seen = state.value
        },
      },
      {
        label: 'write',
        touches: { writes: ['value'] },
        run: (state, me) => {
          state.value = me.seen + 1
        },
        shows: (state) => `value=${state.value}`,
      },
    ]
    const lock = [acquire('l', name), ...add, release('l', name)] as Step<Counter, { seen: number }>[]
    return actor(name, { seen: 0 }, locked ? lock : add)
  }
  return {
    initial: () => ({ value: 0, locks: { l: '' } }),
    actors: Array.from({ length: threads }, (_, i) => thread(`thread ${i}`)),
    atEnd: [{ name: 'nothing lost', check: ({ value }) => (value === threads ? null : `${value} of ${threads}`) }],
  }
}

describe('what is found', () => {
  test('a lost update, with the shortest history', () => {
    const result = explore(counter(false))
    expect(result).toMatchObject({ kind: 'violated', what: 'end', name: 'nothing lost', shortest: true })
    expect(
      result.kind === 'violated' && result.history.map(({ actor, label, shows }) => [actor, label, shows]),
    ).toEqual([
      [0, 'read', ''],
      [1, 'read', ''],
      [1, 'write', 'value=1'],
      [0, 'write', 'value=1'],
    ])
  })

  test('nothing, when the lock is held', () => {
    expect(explore(counter(true), { reduction: 'none' })).toMatchObject({ kind: 'holds', histories: '2' })
  })

  test('all histories: two threads of two free steps make six', () => {
    const scenario = { ...counter(false), atEnd: [] }
    expect(explore(scenario, { reduction: 'none' })).toMatchObject({ kind: 'holds', histories: '6' })
  })

  test('a deadlock: two locks taken in different order', () => {
    const two = (name: string, first: string, second: string) =>
      actor<HasLocks>(name, {}, [
        acquire(first, name),
        acquire(second, name),
        release(second, name),
        release(first, name),
      ])
    const scenario = (order: [string, string]): Scenario<HasLocks> => ({
      initial: () => ({ locks: { a: '', b: '' } }),
      actors: [two('one', 'a', 'b'), two('two', ...order)],
    })
    expect(explore(scenario(['b', 'a']))).toMatchObject({
      kind: 'violated',
      what: 'deadlock',
      message: 'waiting for ever: one at "lock b", two at "lock a"',
      history: [{ actor: 0 }, { actor: 1 }],
    })
    expect(explore(scenario(['a', 'b'])).kind).toBe('holds')
  })

  test('a livelock: retrying for a thing that nobody does', () => {
    const retry: Step<{ done: boolean }>[] = [
      { label: 'look', at: 'again', run: () => {}, jump: { to: 'again', if: ({ done }) => !done } },
    ]
    const doer: Step<{ done: boolean }>[] = [
      {
        label: 'do',
        run: (state) => {
          state.done = true
        },
      },
    ]
    const scenario = (steps: Step<{ done: boolean }>[]) => ({
      initial: () => ({ done: false }),
      actors: [actor('waiter', {}, retry), actor('doer', {}, steps)],
    })
    expect(explore(scenario(doer))).toMatchObject({ kind: 'holds', histories: null })
    expect(explore(scenario([]))).toMatchObject({ kind: 'violated', what: 'livelock', history: [] })
  })

  test('a broken rule that a step reports, also by an error of another package with the same shape', () => {
    class Foreign extends Error {
      override readonly name = 'RuleViolation'
      readonly rule = 'mine'
    }
    for (const error of [new RuleViolation('mine', 'no'), new Foreign('no')]) {
      const steps = [
        {
          label: 'break',
          run: () => {
            throw error
          },
        },
      ]
      const result = explore({ initial: () => ({}), actors: [actor('one', {}, steps)] })
      expect(result).toMatchObject({ kind: 'violated', what: 'rule', name: 'mine', message: 'no', history: [{}] })
    }
  })

  test('an invariant that does not hold at the start has an empty history', () => {
    const scenario = { initial: () => ({}), actors: [], invariants: [{ name: 'never', check: () => 'no' }] }
    expect(explore(scenario)).toMatchObject({ kind: 'violated', what: 'invariant', history: [] })
  })

  test('a daemon that waits when the others have ended is no deadlock', () => {
    const waits: Step<object>[] = [{ label: 'wait', when: () => false, run: () => {} }]
    const scenario = (daemon: boolean) => ({ initial: () => ({}), actors: [actor('d', {}, waits, { daemon })] })
    expect(explore(scenario(true)).kind).toBe('holds')
    expect(explore(scenario(false))).toMatchObject({ what: 'deadlock' })
  })

  test('a jump to the end', () => {
    const steps: Step<{ n: number }>[] = [
      { label: 'stop', run: () => {}, jump: { to: END, if: () => true } },
      {
        label: 'never',
        run: (state) => {
          state.n++
        },
      },
    ]
    const atEnd = [{ name: 'untouched', check: ({ n }: { n: number }) => (n === 0 ? null : 'ran on') }]
    expect(explore({ initial: () => ({ n: 0 }), actors: [actor('one', {}, steps)], atEnd }).kind).toBe('holds')
  })
})

describe('bounds and misuse', () => {
  test('a bound that is reached is said, never taken for success', () => {
    expect(explore(counter(true, 4), { maxStates: 10 })).toMatchObject({ kind: 'bounded', bound: 'maxStates' })
    expect(explore(counter(true), { maxDepth: 3 })).toMatchObject({ kind: 'bounded', bound: 'maxDepth' })
    expect(() => explore(counter(true), { maxStates: 0 })).toThrow(RangeError)
    expect(() => explore(counter(true), { maxDepth: Number.NaN })).toThrow(RangeError)
  })

  test('state that is not plain is refused', () => {
    const scenario = (value: unknown) => ({ initial: () => ({ value }), actors: [] })
    for (const value of [undefined, () => 0, Number.NaN, 1n, new Map(), new Uint8Array(1)]) {
      expect(() => explore(scenario(value))).toThrow(TypeError)
    }
  })

  test('an error of the scenario itself passes through', () => {
    const steps = [
      {
        label: 'bug',
        run: () => {
          throw new TypeError('a mistake of mine')
        },
      },
    ]
    expect(() => explore({ initial: () => ({}), actors: [actor('one', {}, steps)] })).toThrow('a mistake of mine')
  })

  test('jumps to nowhere, unknown locks, locks of others', () => {
    const nowhere = [{ label: 'x', run: () => {}, jump: { to: 'y', if: () => true } }]
    expect(() => explore({ initial: () => ({}), actors: [actor('one', {}, nowhere)] })).toThrow(/jumps to "y"/)
    const state: HasLocks = { locks: { a: 'me' } }
    expect(() => runAlone([acquire('b', 'me')], state, {})).toThrow(/no lock "b"/)
    expect(() => runAlone([acquire('a', 'you')], state, {})).toThrow(/waits for ever/)
    expect(() => runAlone([release('a', 'you')], state, {})).toThrow(RuleViolation)
  })

  test('a program that does not end alone', () => {
    const loop = [{ label: 'x', at: 'x', run: () => {}, jump: { to: 'x', if: () => true } }]
    expect(() => runAlone(loop, {}, {})).toThrow(/does not end/)
  })

  test('an edit that matches nothing, or too much, is an error and not the original', () => {
    const scenario = counter(true)
    expect(() => edited(scenario, { actor: 'nobody' })).toThrow(RangeError)
    expect(() => edited(scenario, { actor: 'thread 0', without: ['no such step'] })).toThrow(/exactly one step/)
    const unlocked = edited(scenario, { actor: 'thread 0', without: ['lock l', 'unlock l'] })
    expect(explore(unlocked)).toMatchObject({ name: 'nothing lost' })
    const moved = edited(scenario, { actor: 'thread 1', move: { step: 'read', before: 'lock l' } })
    expect(explore(moved)).toMatchObject({ name: 'nothing lost' })
    const changed = edited(scenario, { actor: 'thread 1', change: { step: 'read', to: { run: () => {} } } })
    expect(explore(changed)).toMatchObject({ name: 'nothing lost' })
  })
})

test('a history can be replayed', () => {
  expect(replay(counter(false), [0, 1, 1, 0])).toMatchObject({ value: 1 })
  expect(() => replay(counter(true), [0, 1])).toThrow(/actor 1 cannot go on/)
})

test('exploring leaves the scenario as it was and gives the same answer again', () => {
  const scenario = counter(true, 3)
  expect(explore(scenario)).toEqual(explore(scenario))
})
