/**
 * A scenario taken step by step, by somebody who says whose turn it is: for looking at one history.
 *
 * Invariant: a moment never changes; each step leads to another one.
 */
import type { HistoryStep } from './explore.ts'
import { type Point, Program, type Trouble } from './program.ts'
import { isRuleViolation, type Scenario } from './scenario.ts'

/** What an actor would do next. */
export interface NextStep {
  /** Its label; null: the actor has ended. */
  readonly label: string | null
  /** Whether it can go on now: false where it waits for somebody, and where it has ended. */
  readonly ready: boolean
}

/** A scenario at some moment of one history. */
export interface Moment<S extends object> {
  readonly state: Readonly<S>
  /** The steps that led here. */
  readonly history: readonly HistoryStep[]
  /** By actor, in the order of the scenario. */
  readonly next: readonly NextStep[]
  /** What is wrong here; null: nothing that shows. Nobody can go on from where something is. */
  readonly trouble: Trouble | null
  /** The moment after an actor's next step. Throws `RangeError` unless it is ready. */
  take(actor: number): Moment<S>
}

/**
 * The beginning of a scenario. Throws `TypeError` if the state is not plain data, `RangeError` for a jump to nowhere.
 */
export function begin<S extends object>(scenario: Scenario<S>): Moment<S> {
  const program = new Program(scenario)
  const point = program.start()
  return momentOf(program, point, [], program.invariant(point.state))
}

/**
 * A whole history that takes its turns in the order of `actors` as far as that goes: where the one whose turn it is
 * cannot go on, the first that can does. At most `most` steps.
 */
export function followed<S extends object>(scenario: Scenario<S>, actors: readonly number[], most = 1000): Moment<S> {
  let moment = begin(scenario)
  for (let n = 0; n < most; n++) {
    const turn = actors[n]
    const first = moment.next.findIndex(({ ready }) => ready)
    if (first < 0) break
    moment = moment.take(turn !== undefined && moment.next[turn]?.ready === true ? turn : first)
  }
  return moment
}

function momentOf<S extends object>(
  program: Program<S>,
  point: Point<S>,
  history: readonly HistoryStep[],
  broken: Trouble | null,
): Moment<S> {
  const enabled = program.enabled(point)
  const trouble = broken ?? (enabled.length === 0 ? program.atEnd(point) : null)
  const next = point.at.map((_, actor): NextStep => {
    const label = program.stepOf(point, actor)?.label ?? null
    return { label, ready: trouble === null && enabled.includes(actor) }
  })
  return {
    state: point.state,
    history,
    next,
    trouble,
    take(actor) {
      const step = program.stepOf(point, actor)
      if (step === undefined || next[actor]?.ready !== true) throw new RangeError(`actor ${actor} cannot go on`)
      try {
        const after = program.step(point, actor)
        const shows = step.shows?.(after.state, after.locals[actor]!) ?? ''
        const taken = [...history, { actor, label: step.label, shows }]
        return momentOf(program, after, taken, program.invariant(after.state))
      } catch (error) {
        if (!isRuleViolation(error)) throw error
        const { rule: name, message } = error
        return momentOf(program, point, [...history, { actor, label: step.label, shows: '' }], {
          what: 'rule',
          name,
          message,
        })
      }
    },
  }
}
