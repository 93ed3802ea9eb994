/**
 * The explorer: visits every state that a scenario can reach, breadth first, and reports the first thing that is wrong.
 *
 * Violations: a step throws a RuleViolation; an invariant does not hold; nobody can go on though somebody has not ended
 * (deadlock); a check at the end fails; no end can be reached any more (livelock: retries for ever; the history leads to
 * the loop that is never left).
 *
 * Partial-order reduction. In a state, the actors P are enough to expand if no step that the other actors could still
 * take, ever, conflicts with the next steps of P (closure over declared footprints: persistent sets). So that no
 * invariant is skipped, P is used only when its steps write nothing that an invariant reads.
 *
 * Why that is sound without a rule against putting an actor off around a loop: states from which no end can be reached
 * are violations here. If there is none, every history can be continued to an end, and persistent sets keep each
 * history to an end up to the order of steps that do not meet and that no invariant sees. If the full exploration has
 * such a state, so has the reduced one: follow a history into it; wherever P holds none of its steps, go one step
 * nearer to an end, which cannot be reached with the rest of the history still to come. The tests compare both
 * explorations on random programs. A reduced history need not be the shortest, so whatever was found is searched again
 * without reduction, no deeper than it.
 *
 * Source: P. Godefroid, "Partial-Order Methods for the Verification of Concurrent Systems" (1996).
 */
import { clonePlain, covers, encodePlain, overlaps, recording, type Touched } from './plain.ts'
import { type Check, isRuleViolation, type Scenario, type Step, targetOf } from './scenario.ts'

export interface ExploreOptions {
  /** Default "persistent-sets". */
  readonly reduction?: 'none' | 'persistent-sets'
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
   * How many different complete histories there are, in decimal digits (there can be very many); null if some loop makes
   * them infinitely many.
   */
  readonly histories: string | null
}

export interface Violated extends Counts {
  readonly kind: 'violated'
  readonly what: 'rule' | 'invariant' | 'deadlock' | 'end' | 'livelock'
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
  const maxStates = bound('maxStates', options.maxStates ?? 200_000)
  const maxDepth = bound('maxDepth', options.maxDepth ?? Number.POSITIVE_INFINITY)
  const reduced = (options.reduction ?? 'persistent-sets') === 'persistent-sets'
  const program = new Program(scenario)
  const audit = options.auditFootprints ?? false
  const found = yield* search(program, { reduced, maxStates, maxDepth, audit })
  if (found.kind !== 'violated' || !reduced) return found
  const deepest = found.what === 'livelock' ? maxDepth : found.history.length
  const again = yield* search(program, { reduced: false, maxStates, maxDepth: deepest, audit: false })
  const history = again.kind === 'violated' ? again : { ...found, shortest: false }
  return { ...history, states: found.states, transitions: found.transitions, depth: found.depth }
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

interface Point<S> {
  readonly state: S
  readonly locals: object[]
  readonly at: number[]
}

interface Trouble {
  readonly what: Violated['what']
  readonly name: string
  readonly message: string
}

/** A scenario made ready for running: jump targets as numbers, conflicts between steps as tables. */
class Program<S extends object> {
  readonly scenario: Scenario<S>
  readonly #targets: number[][]
  readonly #future: number[][][]
  readonly #visible: boolean[][]

  constructor(scenario: Scenario<S>) {
    this.scenario = scenario
    const { actors, invariants = [] } = scenario
    this.#targets = actors.map(({ steps }) =>
      steps.map((step) => (step.jump === undefined ? -1 : targetOf(steps, step.jump.to))),
    )
    // #future[a][p]: the steps that actor a at p may still take.
    this.#future = actors.map(({ steps }, a) => steps.map((_, p) => reachable(p, this.#targets[a] as number[])))
    this.#visible = actors.map(({ steps }) =>
      steps.map(({ touches }) => {
        const writes = touches === undefined ? [''] : (touches.writes ?? [])
        return invariants.some(({ reads = [''] }) => meet(writes, reads))
      }),
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

  stepOf(point: Point<S>, actor: number): Step<S> | undefined {
    return this.scenario.actors[actor]?.steps[point.at[actor] as number]
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
    if (touched !== undefined) step.when?.(state, me)
    step.run(state, me)
    const at = point.at[actor] as number
    const jumps = step.jump?.if(state, me) ?? false
    next.at[actor] = jumps ? ((this.#targets[actor] as number[])[at] as number) : at + 1
    return next
  }

  /** Throws if a step or its guard touches what it did not declare. The guard of a waiting step counts too. */
  auditStep(point: Point<S>, actor: number, enabled: boolean): void {
    const step = this.stepOf(point, actor)
    if (step?.touches === undefined) return
    const touched = { reads: new Set<string>(), passes: new Set<string>(), writes: new Set<string>() }
    step.when?.(recording(clonePlain(point.state), touched), point.locals[actor] as object)
    try {
      if (enabled) this.step(point, actor, touched)
    } catch (error) {
      if (!isRuleViolation(error)) throw error
    }
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

  /** The smallest persistent set whose steps no invariant can see, or all that can go on. */
  persistent(point: Point<S>, enabled: readonly number[]): readonly number[] {
    let smallest = enabled
    for (const seed of enabled) {
      const chosen = new Set([seed])
      for (const member of chosen) {
        for (let other = 0; other < point.at.length; other++) {
          if (!chosen.has(other) && this.#mayDisturb(point, other, member)) chosen.add(other)
        }
      }
      const set = enabled.filter((one) => chosen.has(one))
      const hidden = set.every((one) => !this.#visible[one]?.[point.at[one] as number])
      if (hidden && set.length < smallest.length) smallest = set
    }
    return smallest
  }

  /** Whether anything that actor `other` may still do conflicts with the next step of `member`. */
  #mayDisturb(point: Point<S>, other: number, member: number): boolean {
    const next = this.stepOf(point, member)
    if (next === undefined) return false
    const steps = this.scenario.actors[other]?.steps ?? []
    const future = this.#future[other]?.[point.at[other] as number] ?? []
    return future.some((index) => conflict(next, steps[index] as Step<S>))
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

  invariant(state: S): Trouble | null {
    return firstFailure('invariant', this.scenario.invariants ?? [], state)
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

function conflict<S extends object>(one: Step<S>, other: Step<S>): boolean {
  const places = ({ touches }: Step<S>) =>
    touches === undefined
      ? { all: [''], writes: [''] }
      : { all: [...(touches.reads ?? []), ...(touches.writes ?? [])], writes: touches.writes ?? [] }
  const [a, b] = [places(one), places(other)]
  return meet(a.writes, b.all) || meet(a.all, b.writes)
}

function meet(some: readonly string[], others: readonly string[]): boolean {
  return some.some((one) => others.some((other) => overlaps(one, other)))
}

/** States expanded between two pauses: some ten milliseconds. */
const PAUSE = 500

interface Limits {
  readonly reduced: boolean
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

function* search<S extends object>(program: Program<S>, limits: Limits): Generator<Counts, Exploration> {
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

  const first = program.start()
  visit(first, -1, -1)
  const wrong = program.invariant(first.state)
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
    for (const actor of limits.reduced ? program.persistent(point, order) : order) {
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
      const trouble = fresh ? program.invariant(next.state) : null
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
