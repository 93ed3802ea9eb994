/**
 * The language in which a small concurrent program is written down so that it can be explored.
 *
 * What is modelled: a few actors (threads, processors, devices) that work on one shared state. An actor is a list of
 * steps; a step is atomic, everything between two steps can be interleaved. The whole state of a run is plain data:
 * the shared state, one record of local registers per actor, and one program counter per actor.
 *
 * Why step lists and not generator functions: a suspended generator can be neither copied nor compared. An explorer of
 * generators has to replay every history from its beginning, and never notices that a retry loop has come back to a
 * state it knows. With plain data a state is copied once per step, two states are equal exactly when their encodings
 * are, and loops close.
 *
 * Invariants: initial(), guards, steps and checks are deterministic; guards and checks change nothing; all state is
 * plain (null, booleans, finite numbers, strings, arrays and plain objects without cycles or sharing).
 */

/** The jump target that ends an actor's program. */
export const END = 'end'

/**
 * Places in the shared state that a step may touch, as dotted paths ("mm.ptes" covers everything below it). What is
 * written may also be read. The reduction believes these declarations; `auditFootprints` checks them.
 */
export interface Footprint {
  readonly reads?: readonly string[]
  readonly writes?: readonly string[]
}

/** A jump after a step: to the step whose `at` is `to`, or END, if the condition holds after the step has run. */
export interface Jump<S extends object, L extends object> {
  readonly to: string
  if(state: Readonly<S>, me: Readonly<L>): boolean
}

/** One atomic action of an actor. */
export interface Step<S extends object, L extends object = object> {
  /** What the chart prints. */
  readonly label: string
  /** A name for jumps; unique in the actor. */
  readonly at?: string
  /** The step can run only when this holds (a lock is free, a message is there). Without it: always. */
  when?(state: Readonly<S>, me: Readonly<L>): boolean
  /** Changes the state and the actor's own registers. */
  run(state: S, me: L): void
  readonly jump?: Jump<S, L>
  /** Omitted: may touch everything. Covers when(), run() and jump.if(). */
  readonly touches?: Footprint
  /** Printed after the label, computed after the step. Not part of the footprint. */
  shows?(state: Readonly<S>, me: Readonly<L>): string
}

/** A thread, a processor or a device: a program with its own registers. */
export interface Actor<S extends object> {
  readonly name: string
  /** Initial values of the registers: plain data. */
  readonly locals: object
  readonly steps: readonly Step<S, object>[]
  /** May still wait when all others have ended: then that is no deadlock. */
  readonly daemon?: boolean
}

/** Something that must hold; the text says what is wrong, null that nothing is. */
export interface Check<S extends object> {
  readonly name: string
  /** Where it looks; omitted: everywhere, which turns the reduction off for every step that writes. */
  readonly reads?: readonly string[]
  check(state: Readonly<S>): string | null
}

/** A small concurrent program with what must hold in it. */
export interface Scenario<S extends object> {
  initial(): S
  readonly actors: readonly Actor<S>[]
  /** Hold in every state. */
  readonly invariants?: readonly Check<S>[]
  /** Hold in every state in which no actor can go on. */
  readonly atEnd?: readonly Check<S>[]
}

/**
 * Thrown by a step, or by a model that a step calls, when a rule was broken. The explorer recognises it by `name` and
 * `rule`, so that a model needs no dependency on this package. Every other error is a fault of the scenario and passes
 * through explore().
 */
export class RuleViolation extends Error {
  override readonly name = 'RuleViolation'
  /** Which rule: a short stable name. */
  readonly rule: string
  constructor(rule: string, message: string) {
    super(message)
    this.rule = rule
  }
}

/** Throws a RuleViolation unless the condition holds. */
export function requireRule(condition: boolean, rule: string, message: string): void {
  if (!condition) throw new RuleViolation(rule, message)
}

/** Whether an error says that a rule was broken: RuleViolation of this package or one of the same shape. */
export function isRuleViolation(error: unknown): error is RuleViolation {
  return error instanceof Error && error.name === 'RuleViolation' && 'rule' in error && typeof error.rule === 'string'
}

/** An actor whose steps share the type of its registers. */
export function actor<S extends object, L extends object = object>(
  name: string,
  locals: L,
  steps: readonly Step<S, L>[],
  options: { readonly daemon?: boolean } = {},
): Actor<S> {
  return { name, locals, steps, ...options }
}

/** State with named locks: the value is the holder, "" when free. */
export interface HasLocks {
  locks: Record<string, string>
}

/** A step that waits for a lock and takes it. A lock is not recursive: who takes it twice waits for ever. */
export function acquire(lock: string, holder: string): Step<HasLocks> {
  return {
    label: `lock ${lock}`,
    touches: { writes: [`locks.${lock}`] },
    when: (state) => held(state, lock) === '',
    run: (state) => {
      state.locks[lock] = holder
    },
  }
}

/** A step that gives a lock back. */
export function release(lock: string, holder: string): Step<HasLocks> {
  return {
    label: `unlock ${lock}`,
    touches: { writes: [`locks.${lock}`] },
    run: (state) => {
      requireRule(held(state, lock) === holder, 'lock-holder', `${holder} unlocks ${lock} without holding it`)
      state.locks[lock] = ''
    },
  }
}

function held(state: Readonly<HasLocks>, lock: string): string {
  const holder = state.locks[lock]
  if (holder === undefined) throw new RangeError(`the scenario has no lock "${lock}"`)
  return holder
}

/**
 * Runs one program to its end with nobody else around, on the given state.
 * @throws RangeError if it has to wait, or takes more than 10,000 steps.
 */
export function runAlone<S extends object, L extends object>(steps: readonly Step<S, L>[], state: S, locals: L): L {
  let at = 0
  for (let count = 0; at < steps.length; count++) {
    const step = steps[at] as Step<S, L>
    if (count > 10_000) throw new RangeError(`the program does not end: at "${step.label}" after 10000 steps`)
    if (step.when !== undefined && !step.when(state, locals)) {
      throw new RangeError(`the program waits for ever at "${step.label}"`)
    }
    step.run(state, locals)
    at = step.jump?.if(state, locals) ? targetOf(steps, step.jump.to) : at + 1
  }
  return locals
}

/** The index of a jump target; END is one past the last step. */
export function targetOf<S extends object, L extends object>(steps: readonly Step<S, L>[], to: string): number {
  if (to === END) return steps.length
  const index = steps.findIndex((step) => step.at === to)
  if (index < 0) throw new RangeError(`a step jumps to "${to}", which no step of the actor is named`)
  return index
}

/**
 * Changes of one actor's program, for writing a mutant as "the same scenario, but ...". Steps are named by their label;
 * a label that no step or more than one step has is a RangeError, so that a mutant cannot silently become the original.
 */
export interface Edit<S extends object> {
  readonly actor: string
  /** Leaves these steps out. */
  readonly without?: readonly string[]
  /** Moves a step to just before another one. */
  readonly move?: { readonly step: string; readonly before: string }
  /** Replaces parts of a step. A new guard, action or jump takes the footprint away, unless it brings one. */
  readonly change?: { readonly step: string; readonly to: Partial<Step<S, object>> }
}

/** The scenario with one actor's program changed. */
export function edited<S extends object>(scenario: Scenario<S>, ...edits: readonly Edit<S>[]): Scenario<S> {
  return { ...scenario, actors: edits.reduce(editActors, scenario.actors) }
}

function editActors<S extends object>(actors: readonly Actor<S>[], edit: Edit<S>): readonly Actor<S>[] {
  if (actors.filter((one) => one.name === edit.actor).length !== 1) {
    throw new RangeError(`the scenario must have exactly one actor "${edit.actor}"`)
  }
  return actors.map((one) => (one.name === edit.actor ? { ...one, steps: editSteps(one, edit) } : one))
}

function editSteps<S extends object>(one: Actor<S>, edit: Edit<S>): readonly Step<S, object>[] {
  const find = (steps: readonly Step<S, object>[], label: string): number => {
    const first = steps.findIndex((step) => step.label === label)
    if (first < 0 || steps.some((step, index) => index > first && step.label === label)) {
      throw new RangeError(`actor "${one.name}" must have exactly one step "${label}"`)
    }
    return first
  }
  let steps = [...one.steps]
  for (const label of edit.without ?? []) steps.splice(find(steps, label), 1)
  if (edit.move !== undefined) {
    const [moved] = steps.splice(find(steps, edit.move.step), 1)
    steps.splice(find(steps, edit.move.before), 0, moved as Step<S, object>)
  }
  if (edit.change !== undefined) {
    const { step, to } = edit.change
    const index = find(steps, step)
    const { touches, ...old } = steps[index] as Step<S, object>
    // What the changed step touches is not known, unless the edit says it.
    const known = to.run === undefined && to.when === undefined && to.jump === undefined && touches !== undefined
    steps = steps.with(index, { ...old, ...(known ? { touches } : {}), ...to })
  }
  return steps
}
