/**
 * The explorer: visits every state that a scenario can reach, breadth first, and reports the first thing that is wrong.
 *
 * Violations: a step throws a RuleViolation; an invariant does not hold; nobody can go on though somebody has not ended
 * (deadlock); a check at the end fails; no end can be reached any more (livelock: retries for ever; the history leads
 * to the loop that is never left).
 *
 * Partial-order reduction (`reduction.ts`): in a state, the actors P are enough to expand if no step that the other
 * actors could still take, ever, meets the next steps of P, and if no invariant sees what these write.
 *
 * Why that is sound without a rule against putting an actor off around a loop: states from which no end can be reached
 * are violations here. If there is none, every history can be continued to an end, and persistent sets keep each
 * history to an end up to the order of steps that do not meet and that no invariant sees. If the full exploration has
 * such a state, so has the reduced one: follow a history into it; wherever P holds none of its steps, go one step
 * nearer to an end, which cannot be reached with the rest of the history still to come. (What steps touch may also be
 * watched instead of believed; then such a rule is needed, and kept.) The tests compare the explorations on random
 * programs and on every scenario of the catalogue. A reduced history need not be the shortest, so whatever was found is
 * searched again without reduction, no deeper than it.
 */
import { checkOptions } from '@tmem/core'
import { encodePlain, touchedNothing } from './plain.ts'
import { type Point, Program, type Trouble } from './program.ts'
import { Declared, Observed, type Reduction } from './reduction.ts'
import { isRuleViolation, type Scenario, type Step } from './scenario.ts'

export interface ExploreOptions {
  /**
   * Which interleavings are left out, because another one comes to the same. Default "persistent-sets": by what the
   * steps declare that they touch. "dynamic": by what they are seen to touch; slower for each state, and fewer states
   * where steps declare little. "none": no one.
   */
  readonly reduction?: 'none' | 'persistent-sets' | 'dynamic'
  /** Bound on the number of states; default 200,000. */
  readonly maxStates?: number
  /** Bound on the number of steps of a history; default none. */
  readonly maxDepth?: number
  /** Checks every step against its declared footprint (slow). Default false. */
  readonly auditFootprints?: boolean
}

/** One step of a history. */
export interface HistoryStep {
  /** Index in `Scenario.actors`. */
  readonly actor: number
  readonly label: string
  /** What Step.shows() said after the step. */
  readonly shows: string
}

export interface Counts {
  /** Different states visited. */
  readonly states: number
  /** Steps taken between them. */
  readonly transitions: number
  /** Longest distance of a state from the initial one. */
  readonly depth: number
}

export type Exploration = Holds | Violated | Bounded

/** Every reachable state was visited (or shown not to matter) and nothing was wrong. */
export interface Holds extends Counts {
  readonly kind: 'holds'
  /**
   * How many different complete histories there are, in decimal digits (there can be very many); null if some loop
   * makes them infinitely many.
   */
  readonly histories: string | null
}

export interface Violated extends Counts {
  readonly kind: 'violated'
  readonly what: Trouble['what']
  /** The rule of the RuleViolation or the name of the check; else the same as `what`. */
  readonly name: string
  readonly message: string
  readonly history: readonly HistoryStep[]
  /** Whether no shorter history leads to it. False only if the second search met a bound. */
  readonly shortest: boolean
}

/**
 * A bound was reached before anything was found. In the states that were visited nothing was wrong that a state or a
 * step shows; nothing is known of the others, nor of ends that can no longer be reached.
 */
export interface Bounded extends Counts {
  readonly kind: 'bounded'
  readonly bound: 'maxStates' | 'maxDepth'
}

/**
 * Explores a scenario.
 * @throws TypeError if the state is not plain data; RangeError for a jump to nowhere, a bound that is no positive
 * number or, with auditFootprints, a step that touches what it did not declare; whatever else the scenario's own code
 * throws.
 */
export function explore<S extends object>(scenario: Scenario<S>, options: ExploreOptions = {}): Exploration {
  const run = exploration(scenario, options)
  let at = run.next()
  while (at.done !== true) at = run.next()
  return at.value
}

/**
 * The same with a pause every 500 states, for programs that must answer signals or show progress meanwhile. What the
 * pause throws ends the exploration.
 */
export async function exploreWithPauses<S extends object>(
  scenario: Scenario<S>,
  options: ExploreOptions,
  pause: (counts: Counts) => Promise<void>,
): Promise<Exploration> {
  const run = exploration(scenario, options)
  let at = run.next()
  for (; at.done !== true; at = run.next()) await pause(at.value)
  return at.value
}

function* exploration<S extends object>(
  scenario: Scenario<S>,
  options: ExploreOptions,
): Generator<Counts, Exploration> {
  checkOptions('explore', options, {
    reduction: 'text?',
    maxStates: 'number?',
    maxDepth: 'number?',
    auditFootprints: 'flag?',
  })
  const maxStates = bound('maxStates', options.maxStates ?? 200_000)
  const maxDepth = bound('maxDepth', options.maxDepth ?? Number.POSITIVE_INFINITY)
  const program = new Program(scenario)
  const audit = options.auditFootprints ?? false
  const reduction = reductionOf(program, options.reduction ?? 'persistent-sets')
  let found = yield* search(program, { reduction, maxStates, maxDepth, audit })
  // What was found is there all the same. What was not found shows something only if nothing new was seen.
  while (found.kind === 'holds' && reduction?.grew === true) {
    reduction.again()
    found = yield* search(program, { reduction, maxStates, maxDepth, audit: false })
  }
  if (found.kind !== 'violated' || reduction === undefined) return found
  const deepest = found.what === 'livelock' ? maxDepth : found.history.length
  const again = yield* search(program, { reduction: undefined, maxStates, maxDepth: deepest, audit: false })
  const history = again.kind === 'violated' ? again : { ...found, shortest: false }
  return { ...history, states: found.states, transitions: found.transitions, depth: found.depth }
}

function reductionOf<S extends object>(
  program: Program<S>,
  kind: NonNullable<ExploreOptions['reduction']>,
): Reduction<S> | undefined {
  switch (kind) {
    case 'none':
      return undefined
    case 'persistent-sets':
      return new Declared(program)
    case 'dynamic':
      return new Observed(program)
    default:
      throw new RangeError(`reduction must be none, persistent-sets or dynamic, not ${String(kind satisfies never)}`)
  }
}

/**
 * Follows one history by the indices of the actors that take the steps.
 * @throws RangeError if an actor cannot go on.
 */
export function replay<S extends object>(scenario: Scenario<S>, actors: readonly number[]): S {
  const program = new Program(scenario)
  let point = program.start()
  for (const index of actors) {
    if (!program.enabled(point).includes(index)) throw new RangeError(`actor ${index} cannot go on`)
    point = program.step(point, index)
  }
  return point.state
}

function bound(name: string, value: number): number {
  if (!(value > 0)) throw new RangeError(`${name} must be a positive number, not ${value}`)
  return value
}

/** States expanded between two pauses: some ten milliseconds. */
const PAUSE = 500

interface Limits<S extends object> {
  readonly reduction: Reduction<S> | undefined
  readonly maxStates: number
  readonly maxDepth: number
  readonly audit: boolean
}

/** A visited state. `point` is dropped once it has been expanded. */
interface Node<S> {
  point: Point<S> | null
  readonly parent: number
  readonly by: number
  readonly depth: number
  readonly successors: number[]
}

function* search<S extends object>(program: Program<S>, limits: Limits<S>): Generator<Counts, Exploration> {
  const { reduction } = limits
  const nodes: Node<S>[] = []
  const known = new Map<string, number>()
  const ends: number[] = []
  let transitions = 0
  let depth = 0
  let tooDeep = false
  const counts = (): Counts => ({ states: nodes.length, transitions, depth })
  const violated = (trouble: Trouble, path: readonly number[]): Violated => {
    return { kind: 'violated', ...trouble, history: historyOf(program, path), shortest: true, ...counts() }
  }
  const pathTo = (index: number): number[] => {
    const path: number[] = []
    for (let at = index; at > 0; at = nodes[at]?.parent as number) path.push(nodes[at]?.by as number)
    return path.reverse()
  }
  /** The node of a point, new or known. */
  const visit = (point: Point<S>, parent: number, by: number): { index: number; fresh: boolean } => {
    const key = encodePlain(point)
    const index = known.get(key)
    if (index !== undefined) return { index, fresh: false }
    const at = parent < 0 ? 0 : (nodes[parent]?.depth as number) + 1
    if (at > depth) depth = at
    known.set(key, nodes.length)
    nodes.push({ point, parent, by, depth: at, successors: [] })
    return { index: nodes.length - 1, fresh: true }
  }

  const invariant = (state: S): Trouble | null => {
    if (reduction?.needsOpenState !== true) return program.invariant(state)
    const touched = touchedNothing()
    const trouble = program.invariant(state, touched)
    reduction.invariantsLookedAt(touched)
    return trouble
  }

  const first = program.start()
  visit(first, -1, -1)
  const wrong = invariant(first.state)
  if (wrong !== null) return violated(wrong, [])

  for (let index = 0; index < nodes.length; index++) {
    if (index % PAUSE === PAUSE - 1) yield counts()
    const node = nodes[index] as Node<S>
    const point = node.point as Point<S>
    node.point = null
    const enabled = program.enabled(point)
    if (limits.audit) {
      for (const actor of point.at.keys()) program.auditStep(point, actor, enabled.includes(actor))
    }
    if (enabled.length === 0) {
      ends.push(index)
      const trouble = program.atEnd(point)
      if (trouble !== null) return violated(trouble, pathTo(index))
      continue
    }
    if (node.depth >= limits.maxDepth) {
      tooDeep = true
      continue
    }
    // Who took the last step goes first: of several shortest histories the one with the fewest changes is kept.
    const order = enabled.toSorted((a, b) => Number(b === node.by) - Number(a === node.by))
    const enough = reduction?.choose(point, order) ?? order
    let open = false
    for (const actor of [...enough, ...order.filter((one) => !enough.includes(one))]) {
      // The rest: only if it would otherwise be put off for ever.
      if (!enough.includes(actor) && (open || reduction?.needsOpenState !== true)) break
      let next: Point<S>
      try {
        next = program.step(point, actor)
      } catch (error) {
        if (!isRuleViolation(error)) throw error
        const trouble = { what: 'rule', name: error.rule, message: error.message } as const
        return violated(trouble, [...pathTo(index), actor])
      }
      transitions++
      const { index: to, fresh } = visit(next, index, actor)
      node.successors.push(to)
      if (to > index) open = true
      const trouble = fresh ? invariant(next.state) : null
      if (trouble !== null) return violated(trouble, pathTo(to))
      if (nodes.length > limits.maxStates) {
        nodes.pop()
        return { kind: 'bounded', bound: 'maxStates', ...counts() }
      }
    }
  }
  if (tooDeep) return { kind: 'bounded', bound: 'maxDepth', ...counts() }
  const trapped = firstTrapped(nodes, ends)
  if (trapped >= 0) {
    const message = 'from here no end can be reached: somebody retries for ever'
    return violated({ what: 'livelock', name: 'livelock', message }, pathTo(trapped))
  }
  return { kind: 'holds', histories: countHistories(nodes), ...counts() }
}

/**
 * If no end can be reached from some state: the nearest state of a loop that is never left, or -1. The first state that
 * is trapped would be nearer, but there much may still happen, and one would not see why it is in vain. Nodes are in
 * breadth-first order.
 */
function firstTrapped<S>(nodes: readonly Node<S>[], ends: readonly number[]): number {
  const before: number[][] = nodes.map(() => [])
  nodes.forEach((node, from) => {
    for (const to of node.successors) before[to]?.push(from)
  })
  const ending = new Set(ends)
  for (const at of ending) for (const from of before[at] as number[]) ending.add(from)
  const trapped = nodes.findIndex((_, index) => !ending.has(index))
  return trapped < 0 ? -1 : Math.min(...loopBelow(nodes, trapped))
}

/** States that reach each other and nothing else, reachable from a state that reaches no end. */
function loopBelow<S>(nodes: readonly Node<S>[], from: number): Set<number> {
  const reach = (start: number): Set<number> => {
    const seen = new Set([start])
    for (const at of seen) for (const to of nodes[at]?.successors ?? []) seen.add(to)
    return seen
  }
  let loop = reach(from)
  for (let smaller: Set<number> | null = loop; smaller !== null; ) {
    loop = smaller
    smaller = null
    for (const at of loop) {
      const inner = reach(at)
      if (inner.size < loop.size) smaller = inner
      if (smaller !== null) break
    }
  }
  return loop
}

/** The number of paths from the initial state to an end, null if there is a cycle. */
function countHistories<S>(nodes: readonly Node<S>[]): string | null {
  const missing = nodes.map(() => 0)
  for (const node of nodes) for (const to of node.successors) missing[to] = (missing[to] as number) + 1
  const ways: bigint[] = nodes.map((_, index) => (index === 0 ? 1n : 0n))
  const ready = missing[0] === 0 ? [0] : []
  let total = 0n
  for (const at of ready) {
    const { successors } = nodes[at] as Node<S>
    if (successors.length === 0) total += ways[at] as bigint
    for (const to of successors) {
      ways[to] = (ways[to] as bigint) + (ways[at] as bigint)
      missing[to] = (missing[to] as number) - 1
      if (missing[to] === 0) ready.push(to)
    }
  }
  return ready.length === nodes.length ? String(total) : null
}

/** Labels and remarks along a path. The last step may be the one that throws. */
function historyOf<S extends object>(program: Program<S>, path: readonly number[]): HistoryStep[] {
  let point = program.start()
  return path.map((actor) => {
    const step = program.stepOf(point, actor) as Step<S>
    try {
      point = program.step(point, actor)
    } catch (error) {
      if (!isRuleViolation(error)) throw error
      return { actor, label: step.label, shows: '' }
    }
    return { actor, label: step.label, shows: step.shows?.(point.state, point.locals[actor] as object) ?? '' }
  })
}
