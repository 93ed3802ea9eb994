import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { actor, type Check, type Exploration, edited, explore, type Scenario, type Step } from '../src/index.ts'
import { encodePlain } from '../src/plain.ts'

/** A random program over a few small variables, with exact footprints. */
interface Vars {
  v: Record<string, number>
}
interface Instruction {
  kind: 'copy' | 'add' | 'wait' | 'loop' | 'assert' | 'local' | 'through'
  a: string
  b: string
  n: number
}

const names = ['x', 'y', 'z', 'w']
const instruction: fc.Arbitrary<Instruction> = fc.record({
  kind: fc.constantFrom('copy', 'copy', 'add', 'add', 'wait', 'loop', 'assert', 'local', 'through'),
  a: fc.constantFrom(...names),
  b: fc.constantFrom(...names),
  n: fc.nat(2),
})
const program = fc.record({
  actors: fc.array(fc.array(instruction, { minLength: 1, maxLength: 4 }), { minLength: 2, maxLength: 4 }),
  // Values of two variables that must never be seen together.
  watched: fc.option(fc.tuple(fc.constantFrom(...names), fc.nat(2), fc.constantFrom(...names), fc.nat(2)), {
    nil: null,
  }),
})

function compile({ kind, a, b, n }: Instruction, index: number): Step<Vars, { r: number }> {
  const [va, vb] = [`v.${a}`, `v.${b}`]
  const label = `${index} ${kind}`
  switch (kind) {
    case 'copy':
      return {
        label,
        touches: { reads: [vb], writes: [va] },
        run: ({ v }) => {
          v[a] = v[b] as number
        },
      }
    case 'add':
      return {
        label,
        touches: { writes: [va] },
        run: ({ v }) => {
          v[a] = ((v[a] as number) + 1) % 3
        },
      }
    case 'wait':
      return { label, touches: { reads: [va] }, when: ({ v }) => v[a] !== n, run: () => {} }
    case 'loop':
      return {
        label,
        at: label,
        touches: { reads: [va] },
        run: () => {},
        jump: { to: label, if: ({ v }) => v[a] === n },
      }
    case 'assert':
      return {
        label,
        touches: { reads: [va] },
        run: ({ v }) => {
          if (v[a] === n && n === 2) throw Object.assign(new Error('x'), { name: 'RuleViolation', rule: 'assert' })
        },
      }
    case 'through':
      // Which variable is written is known only when the step runs.
      return {
        label,
        touches: { reads: [va], writes: ['v'] },
        run: ({ v }) => {
          v[names[v[a] as number] as string] = n
        },
      }
    case 'local':
      return {
        label,
        touches: { reads: [va] },
        run: ({ v }, me) => {
          me.r = v[a] as number
        },
      }
  }
}

type Random = typeof program extends fc.Arbitrary<infer T> ? T : never

/** The same, but the steps declare nothing. */
function silent<S extends object>(scenario: Scenario<S>): Scenario<S> {
  const actors = scenario.actors.map((one) => ({
    ...one,
    steps: one.steps.map(({ touches: _touches, ...step }) => step),
  }))
  const invariants = (scenario.invariants ?? []).map(({ reads: _reads, ...check }) => check)
  return { ...scenario, actors, invariants }
}

/** Both reductions: what is declared and believed, and what is seen where nothing is declared. */
const reductions = [
  ['persistent-sets', <S extends object>(scenario: Scenario<S>) => scenario],
  ['dynamic', silent],
] as const

function scenarioOf({ actors, watched }: Random, atEnd: Check<Vars>[] = []): Scenario<Vars> {
  return {
    initial: () => ({ v: { x: 0, y: 1, z: 2, w: 0 } }),
    actors: actors.map((list, i) => actor(`actor ${i}`, { r: 0 }, list.map(compile))),
    invariants:
      watched === null
        ? []
        : [
            {
              name: 'watched',
              reads: [`v.${watched[0]}`, `v.${watched[2]}`],
              check: ({ v }) => (v[watched[0]] === watched[1] && v[watched[2]] === watched[3] ? 'seen together' : null),
            },
          ],
    atEnd,
  }
}

describe.each(reductions)('the reduction %s', (reduction, of) => {
  test('finds what the full exploration finds, on random programs', { timeout: 60_000 }, () => {
    let violated = 0
    let smaller = 0
    fc.assert(
      fc.property(program, (random) => {
        const full = explore(scenarioOf(random), { reduction: 'none' })
        const reduced = explore(of(scenarioOf(random)), { reduction, auditFootprints: true })
        const length = (result: Exploration) => (result.kind === 'violated' ? result.history.length : 0)
        expect(reduced.kind).toBe(full.kind)
        expect(length(reduced)).toBe(length(full))
        expect(reduced.states <= full.states || full.kind === 'violated').toBe(true)
        if (full.kind === 'violated') violated++
        else if (reduced.states < full.states) smaller++
      }),
      { seed: 7, numRuns: 500 },
    )
    // The property says nothing if one of these does not happen.
    expect(violated).toBeGreaterThan(100)
    expect(smaller).toBeGreaterThan(30)
  })

  test('reaches the same ends, on random programs', { timeout: 60_000 }, () => {
    const endsOf = (random: Random, how: 'none' | typeof reduction): string[] | null => {
      const ends = new Set<string>()
      const collect: Check<Vars> = {
        name: 'collect',
        check: (state) => {
          ends.add(encodePlain(state))
          return null
        },
      }
      const scenario = scenarioOf({ ...random, watched: null }, [collect])
      const result = explore(how === 'none' ? scenario : of(scenario), { reduction: how })
      return result.kind === 'holds' ? [...ends].sort() : null
    }
    fc.assert(
      fc.property(program, (random) => {
        expect(endsOf(random, reduction)).toEqual(endsOf(random, 'none'))
      }),
      { seed: 8, numRuns: 300 },
    )
  })

  test('explores one order of steps that do not meet', () => {
    const apart = of<Vars>({
      initial: () => ({ v: { x: 0, y: 0, z: 0, w: 0 } }),
      actors: names.map((name) => actor<Vars>(name, {}, [compile({ kind: 'add', a: name, b: name, n: 0 }, 0)])),
    })
    expect(explore(apart, { reduction })).toMatchObject({ kind: 'holds', states: 5, histories: '1' })
    const read = compile({ kind: 'local', a: 'x', b: 'x', n: 0 }, 0)
    const readers = of<Vars>({ ...apart, actors: names.map((name) => actor<Vars>(name, { r: 0 }, [read])) })
    expect(explore(readers, { reduction })).toMatchObject({ kind: 'holds', states: 5, histories: '1' })
  })

  test.each(names)('sees a state in which only %s has been set, if an invariant asks for it', (name) => {
    const add = (own: string) => actor<Vars>(own, {}, [compile({ kind: 'add', a: own, b: own, n: 0 }, 0)])
    const only: Check<Vars> = {
      name: 'only',
      reads: ['v'],
      check: ({ v }) => (names.every((one) => v[one] === (one === name ? 1 : 0)) ? 'seen' : null),
    }
    const scenario = { initial: () => ({ v: { x: 0, y: 0, z: 0, w: 0 } }), actors: names.map(add), invariants: [only] }
    expect(explore(of(scenario), { reduction })).toMatchObject({ kind: 'violated', name: 'only' })
  })

  test('does not put an actor off for ever behind a loop of another', () => {
    const spin: Step<Vars>[] = [
      { label: 'spin', at: 'spin', touches: {}, run: () => {}, jump: { to: 'spin', if: () => true } },
    ]
    const bad = compile({ kind: 'assert', a: 'z', b: 'z', n: 2 }, 0)
    const scenario: Scenario<Vars> = {
      initial: () => ({ v: { x: 0, y: 0, z: 2, w: 0 } }),
      actors: [actor('spinner', {}, spin), actor('bad', { r: 0 }, [bad])],
    }
    expect(explore(of(scenario), { reduction })).toMatchObject({ kind: 'violated', name: 'assert' })
  })
})

describe('what is only seen late', () => {
  test('begins again when a step, behind a loop, touches what it was not seen to touch', () => {
    // "late" looks at y only once x is set, which happens behind "spin"; "other" may write y before or after that.
    const scenario: Scenario<Vars> = {
      initial: () => ({ v: { x: 0, y: 0, z: 0, w: 0 } }),
      actors: [
        actor<Vars>('first', {}, [{ label: 'set y', run: ({ v }) => void Object.assign(v, { y: 1 }) }]),
        actor<Vars>('second', { r: 0 }, [
          { label: 'set x', run: ({ v }) => void Object.assign(v, { x: 1 }) },
          {
            label: 'late',
            run: ({ v }) => {
              if (v['x'] === 1 && v['y'] === 0) v['w'] = 1
            },
          },
        ]),
      ],
      atEnd: [{ name: 'w', check: ({ v }) => (v['w'] === 1 ? 'late came first' : null) }],
    }
    expect(explore(scenario, { reduction: 'dynamic' })).toMatchObject({ kind: 'violated', name: 'w' })
  })

  test('begins again when an invariant looks at something new', () => {
    const scenario: Scenario<Vars> = {
      initial: () => ({ v: { x: 0, y: 0, z: 0, w: 0 } }),
      actors: ['x', 'y', 'z'].map((name) =>
        actor<Vars>(name, {}, [compile({ kind: 'add', a: name, b: name, n: 0 }, 0)]),
      ),
      invariants: [{ name: 'x and not y', check: ({ v }) => (v['x'] === 1 && v['y'] === 0 ? 'seen' : null) }],
    }
    expect(explore(scenario, { reduction: 'dynamic' })).toMatchObject({ kind: 'violated', name: 'x and not y' })
  })

  test('tells objects that are looked at from objects that are only passed', () => {
    interface Tree {
      a: { b: { x: number }; y: number } | null
      done: number
    }
    const make = (run: (state: Tree) => void): Scenario<Tree> => ({
      initial: () => ({ a: { b: { x: 0 }, y: 0 }, done: 0 }),
      actors: [
        actor<Tree>('one', {}, [{ label: 'x', run: ({ a }) => void Object.assign(a?.b ?? {}, { x: 1 }) }]),
        actor<Tree>('two', {}, [{ label: 'two', run }]),
      ],
    })
    const y = make(({ a }) => void Object.assign(a ?? {}, { y: 1 }))
    expect(explore(y, { reduction: 'dynamic' }).states).toBe(3)
    const looks: Scenario<Tree> = {
      ...y,
      actors: [
        actor<Tree>('look', {}, [
          { label: 'look', run: (state) => void Object.assign(state, { done: state.a ? 1 : 2 }) },
        ]),
        actor<Tree>('drop', {}, [{ label: 'drop', run: (state) => void Object.assign(state, { a: null }) }]),
      ],
      atEnd: [{ name: 'there', check: ({ done }) => (done === 2 ? 'it had gone' : null) }],
    }
    expect(explore(looks, { reduction: 'dynamic' })).toMatchObject({ kind: 'violated', name: 'there' })
  })

  test('an actor that waits is let go on by whoever its guard looks at', () => {
    const scenario: Scenario<Vars> = {
      initial: () => ({ v: { x: 0, y: 0, z: 0, w: 0 } }),
      actors: [
        actor<Vars>('reader', {}, [{ label: 'z = x', run: ({ v }) => void Object.assign(v, { z: v['x'] }) }]),
        actor<Vars>('waiting', {}, [
          { label: 'x = 1', when: ({ v }) => v['y'] === 1, run: ({ v }) => void Object.assign(v, { x: 1 }) },
        ]),
        actor<Vars>('opener', {}, [{ label: 'y = 1', run: ({ v }) => void Object.assign(v, { y: 1 }) }]),
      ],
      atEnd: [{ name: 'x was seen', check: ({ v }) => (v['z'] === 1 ? 'seen' : null) }],
    }
    expect(explore(scenario, { reduction: 'dynamic' })).toMatchObject({ kind: 'violated', name: 'x was seen' })
  })
})

test('steps that declare nothing are never left out by what is declared', () => {
  const apart: Scenario<Vars> = {
    initial: () => ({ v: { x: 0, y: 0, z: 0, w: 0 } }),
    actors: names.map((name) => actor<Vars>(name, {}, [compile({ kind: 'add', a: name, b: name, n: 0 }, 0)])),
  }
  expect(explore(apart, { reduction: 'none' })).toMatchObject({ states: 16, histories: '24' })
  expect(explore(silent(apart))).toMatchObject({ states: 16, histories: '24' })
  // An invariant over one variable makes only that step visible; it still has to be tried before the others.
  const watched = { ...apart, invariants: [{ name: 'x', reads: ['v.x'], check: () => null }] }
  expect(explore(watched).states).toBeLessThan(16)
})

describe('the audit of footprints', () => {
  const scenario = (step: Omit<Step<Vars>, 'label'>): Scenario<Vars> => ({
    initial: () => ({ v: { x: 0, y: 1 } }),
    actors: [actor('one', {}, [{ label: 'step', ...step }])],
  })
  const audit = (step: Omit<Step<Vars>, 'label'>) => explore(scenario(step), { auditFootprints: true })

  test('finds a write, a read, a guard, a jump and a look at the keys that were not declared', () => {
    const write = ({ v }: Vars) => {
      v['x'] = 1
    }
    expect(() => audit({ touches: { reads: ['v.x'] }, run: write })).toThrow(/writes v.x, not declared/)
    expect(() => audit({ touches: { writes: ['v.y'] }, run: write })).toThrow(/not declared/)
    expect(() => audit({ touches: {}, run: ({ v }) => void v['y'] })).toThrow(/not declared/)
    expect(() => audit({ touches: {}, when: ({ v }) => v['y'] === 2, run: () => {} })).toThrow(/not declared/)
    const jump = { to: 'end', if: ({ v }: Vars) => v['y'] === 1 }
    expect(() => audit({ touches: {}, run: () => {}, jump })).toThrow(/not declared/)
    expect(() => audit({ touches: { reads: ['v.x'] }, run: ({ v }) => void Object.keys(v) })).toThrow(/reads v, not/)
    const drop = ({ v }: Vars) => {
      delete v['x']
    }
    expect(() => audit({ touches: { reads: ['v.x'] }, run: drop })).toThrow(/writes v.x/)
    expect(() => audit({ touches: { writes: ['v.x'] }, run: ({ v }) => void ('y' in v) })).toThrow(/reads v.y/)
  })

  test('does not hold a changed step to the footprint of the old one', () => {
    const before = scenario({ touches: { reads: ['v.y'] }, run: () => {} })
    const write = (state: Vars) => {
      state.v['x'] = 1
    }
    const change = { step: 'step', to: { run: write } }
    expect(explore(edited(before, { actor: 'one', change }), { auditFootprints: true }).kind).toBe('holds')
  })

  test('accepts what was declared, exactly or further out', () => {
    const run = ({ v }: Vars) => {
      v['x'] = v['y'] as number
    }
    expect(audit({ touches: { reads: ['v.y'], writes: ['v.x'] }, run }).kind).toBe('holds')
    expect(audit({ touches: { writes: ['v'] }, run }).kind).toBe('holds')
    expect(audit({ run }).kind).toBe('holds')
  })
})
