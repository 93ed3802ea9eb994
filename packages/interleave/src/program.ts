/**
 * A scenario made ready for running: points (a state of everything), steps between them, and what a step may do later.
 *
 * Invariant: a point never changes once it is made; every step works on a copy.
 */
import { clonePlain, covers, encodePlain, overlaps, recording, type Touched, touchedNothing } from './plain.ts'
import { type Check, isRuleViolation, type Scenario, type Step, targetOf } from './scenario.ts'

/** The shared state, the registers of each actor, and the number of the step that each takes next. */
export interface Point<S> {
  readonly state: S
  readonly locals: object[]
  readonly at: number[]
}

/** Something that is wrong. */
export interface Trouble {
  readonly what: 'rule' | 'invariant' | 'deadlock' | 'end' | 'livelock'
  readonly name: string
  readonly message: string
}

export class Program<S extends object> {
  readonly scenario: Scenario<S>
  readonly #targets: number[][]
  readonly #future: number[][][]

  /** @throws RangeError for a jump to nowhere. */
  constructor(scenario: Scenario<S>) {
    this.scenario = scenario
    this.#targets = scenario.actors.map(({ steps }) =>
      steps.map((step) => (step.jump === undefined ? -1 : targetOf(steps, step.jump.to))),
    )
    this.#future = scenario.actors.map(({ steps }, a) =>
      steps.map((_, p) => reachable(p, this.#targets[a] as number[])),
    )
  }

  start(): Point<S> {
    const { actors } = this.scenario
    const initial = this.scenario.initial()
    encodePlain(initial) // before the copy, which would make plain objects of class instances
    return {
      state: clonePlain(initial),
      locals: actors.map(({ locals }) => clonePlain(locals)),
      at: actors.map(() => 0),
    }
  }

  /** The next step of an actor; undefined when it has ended. */
  stepOf(point: Point<S>, actor: number): Step<S> | undefined {
    return this.scenario.actors[actor]?.steps[point.at[actor] as number]
  }

  /** The numbers of the steps that an actor may still take, its next one included. */
  future(point: Point<S>, actor: number): readonly number[] {
    return this.#future[actor]?.[point.at[actor] as number] ?? []
  }

  enabled(point: Point<S>): number[] {
    return point.at.flatMap((_, actor) => {
      const step = this.stepOf(point, actor)
      if (step === undefined) return []
      return step.when === undefined || step.when(point.state, point.locals[actor] as object) ? [actor] : []
    })
  }

  /** The point after a step; the step itself may throw. */
  step(point: Point<S>, actor: number, touched?: Touched): Point<S> {
    const step = this.stepOf(point, actor) as Step<S>
    const next = { state: clonePlain(point.state), locals: clonePlain(point.locals), at: [...point.at] }
    const state = touched === undefined ? next.state : recording(next.state, touched)
    const me = next.locals[actor] as object
    step.run(state, me)
    const at = point.at[actor] as number
    const jumps = step.jump?.if(state, me) ?? false
    next.at[actor] = jumps ? ((this.#targets[actor] as number[])[at] as number) : at + 1
    return next
  }

  /** What the next step of an actor touches here: its guard; and, if it can go on, its action and its jump. */
  observe(point: Point<S>, actor: number, enabled: boolean): Touched {
    const touched = touchedNothing()
    this.stepOf(point, actor)?.when?.(recording(clonePlain(point.state), touched), point.locals[actor] as object)
    try {
      if (enabled) this.step(point, actor, touched)
    } catch (error) {
      if (!isRuleViolation(error)) throw error
    }
    return touched
  }

  /** Throws if a step or its guard touches what it did not declare. The guard of a waiting step counts too. */
  auditStep(point: Point<S>, actor: number, enabled: boolean): void {
    const step = this.stepOf(point, actor)
    if (step?.touches === undefined) return
    const touched = this.observe(point, actor, enabled)
    const writes = step.touches.writes ?? []
    const all = [...writes, ...(step.touches.reads ?? [])]
    const where = `${this.scenario.actors[actor]?.name}: "${step.label}"`
    for (const path of touched.writes) {
      if (!writes.some((one) => covers(one, path))) throw new RangeError(`${where} writes ${path}, not declared`)
    }
    for (const path of touched.reads) {
      if (!all.some((one) => covers(one, path))) throw new RangeError(`${where} reads ${path}, not declared`)
    }
    for (const path of touched.passes) {
      if (!all.some((one) => overlaps(one, path))) throw new RangeError(`${where} looks at ${path}, not declared`)
    }
  }

  /** The end of everything: what is wrong in a state in which nobody can go on. */
  atEnd(point: Point<S>): Trouble | null {
    const { actors, atEnd = [] } = this.scenario
    const waiting = actors.filter(({ steps, daemon }, a) => !daemon && (point.at[a] as number) < steps.length)
    if (waiting.length > 0) {
      const where = waiting.map(
        (one) => `${one.name} at "${one.steps[point.at[actors.indexOf(one)] as number]?.label}"`,
      )
      return { what: 'deadlock', name: 'deadlock', message: `waiting for ever: ${where.join(', ')}` }
    }
    return firstFailure('end', atEnd, point.state)
  }

  /** What is wrong with a state; with `touched`, what was looked at for that. */
  invariant(state: S, touched?: Touched): Trouble | null {
    const seen = touched === undefined ? state : recording(state, touched)
    return firstFailure('invariant', this.scenario.invariants ?? [], seen)
  }
}

function firstFailure<S extends object>(
  what: 'end' | 'invariant',
  checks: readonly Check<S>[],
  state: S,
): Trouble | null {
  for (const one of checks) {
    const message = one.check(state)
    if (message !== null) return { what, name: one.name, message }
  }
  return null
}

function reachable(from: number, targets: readonly number[]): number[] {
  const seen = new Set([from])
  for (const at of seen) {
    for (const next of [at + 1, targets[at] as number]) if (next >= 0 && next < targets.length) seen.add(next)
  }
  return [...seen]
}
