/**
 * Which actors are enough to expand in a state. Two ways, both with persistent sets: the actors P are enough if no step
 * that the others could still take, ever, meets the next steps of P; and only if no invariant sees the steps of P.
 *
 * `Declared` believes what the steps declare (`Step.touches`); a step that declares nothing meets every other.
 *
 * `Observed` watches what steps touch, and needs no declarations. What a step of P touches is watched in the very
 * state; what the others could still touch is what their steps were seen to touch in any state so far. That is too
 * little at first: whenever a step, or an invariant, touches something new, the search has to begin again (`grew`),
 * until one has ended in which nothing was new. Why the last search is complete, though it only knows of the states
 * that it visited: take a history of the full exploration, from a visited state on, with a step t that touches what it
 * was never seen to touch, and no such step before it. If a step of P stands at or before t, then all before that are
 * as they were seen to be, it can be moved to the front (it touches the same there, and that was seen), and what is
 * left is shorter. If none does, every p of P is independent of all before t, so that they can follow p as well; t then
 * still touches something that it was never seen to touch: the same as without p, or at the latest what p wrote, which
 * t cannot be known to touch, else it would be in P's closure. So the history can be continued behind p. That cannot go
 * on for ever, because of the queue proviso: in a state that is not expanded in full, one step of P leads to a state
 * that is expanded later. In the end t is taken in a visited state, and has been seen. An invariant is a step that only
 * reads.
 *
 * Sources: P. Godefroid, "Partial-Order Methods for the Verification of Concurrent Systems" (1996), persistent sets;
 * C. Flanagan, P. Godefroid, "Dynamic partial-order reduction for model checking software" (2005), dependence as it is
 * observed; D. Bosnacki, G. Holzmann, "Improving Spin's partial-order reduction for breadth-first search" (2005), the
 * proviso.
 */
import { overlaps, type Touched, touchedNothing } from './plain.ts'
import type { Point, Program } from './program.ts'
import type { Step } from './scenario.ts'

/** Chooses actors whose steps are enough. */
export interface Reduction<S extends object> {
  /** Of those that can go on, the ones that are enough, as far as the state alone says. */
  choose(point: Point<S>, enabled: readonly number[]): readonly number[]
  /** A state was visited: its invariants looked at this. */
  invariantsLookedAt(touched: Touched): void
  /** Whether a choice is only good if one of its steps leads to a state that is expanded later. */
  readonly needsOpenState: boolean
  /** Something new was seen since the search began, so that earlier choices may have been wrong. */
  readonly grew: boolean
  /** The search begins again, with what was seen so far. */
  again(): void
}

/** By what the steps declare. */
export class Declared<S extends object> implements Reduction<S> {
  readonly needsOpenState = false
  readonly grew = false
  readonly #program: Program<S>
  readonly #visible: boolean[][]

  constructor(program: Program<S>) {
    this.#program = program
    const { actors, invariants = [] } = program.scenario
    this.#visible = actors.map(({ steps }) =>
      steps.map(({ touches }) => {
        const writes = touches === undefined ? [''] : (touches.writes ?? [])
        return invariants.some(({ reads = [''] }) => meet(writes, reads))
      }),
    )
  }

  choose(point: Point<S>, enabled: readonly number[]): readonly number[] {
    return smallest(
      point,
      enabled,
      (member, other) => this.#mayDisturb(point, other, member),
      (one) => this.#visible[one]?.[point.at[one] as number] !== true,
    )
  }

  invariantsLookedAt(): void {}

  again(): void {}

  /** Whether anything that actor `other` may still do conflicts with the next step of `member`. */
  #mayDisturb(point: Point<S>, other: number, member: number): boolean {
    const next = this.#program.stepOf(point, member)
    if (next === undefined) return false
    const steps = this.#program.scenario.actors[other]?.steps ?? []
    return this.#program.future(point, other).some((index) => conflict(next, steps[index] as Step<S>))
  }
}

/** By what the steps were seen to touch. */
export class Observed<S extends object> implements Reduction<S> {
  readonly needsOpenState = true
  grew = false
  readonly #program: Program<S>
  /** By actor and number of the step: all that it was seen to touch. */
  readonly #seen: Footprints[][]
  /**
   * By actor and number of the step: what it and all that may follow it were seen to touch; undefined: not computed.
   */
  #later: (Footprints | undefined)[][]
  readonly #invariants: Footprints = new Footprints()

  constructor(program: Program<S>) {
    this.#program = program
    this.#seen = program.scenario.actors.map(({ steps }) => steps.map(() => new Footprints()))
    this.#later = this.#seen.map(() => [])
  }

  again(): void {
    this.grew = false
  }

  choose(point: Point<S>, enabled: readonly number[]): readonly number[] {
    const here = point.at.map((at, actor) => {
      const touched = this.#program.observe(point, actor, enabled.includes(actor))
      if (this.#seen[actor]?.[at]?.add(touched) === true) {
        this.grew = true
        this.#later[actor] = []
      }
      return touched
    })
    return smallest(
      point,
      enabled,
      (member, other) => this.#laterOf(point, other).meets(here[member] as Touched),
      (one) => !this.#invariants.isWrittenBy(here[one] as Touched),
    )
  }

  invariantsLookedAt(touched: Touched): void {
    if (this.#invariants.add(touched)) this.grew = true
  }

  #laterOf(point: Point<S>, actor: number): Footprints {
    const known = this.#later[actor] as (Footprints | undefined)[]
    const at = point.at[actor] as number
    let all = known[at]
    if (all === undefined) {
      all = new Footprints()
      for (const index of this.#program.future(point, actor)) all.addAll(this.#seen[actor]?.[index] as Footprints)
      known[at] = all
    }
    return all
  }
}

/** Everything that some steps touched, ready to be asked whether another step meets it. */
class Footprints {
  readonly #touched: Touched = touchedNothing()
  /** The paths that were read, written or only passed, and all outer paths of them. */
  readonly #outerOfUsed = new Set<string>()
  readonly #outerOfWritten = new Set<string>()
  readonly #outerOfPassed = new Set<string>()

  /** True if something was new. */
  add({ reads, writes, passes }: Touched): boolean {
    const size = (): number => this.#touched.reads.size + this.#touched.writes.size + this.#touched.passes.size
    const before = size()
    for (const path of reads) this.#note(path, this.#touched.reads, this.#outerOfUsed)
    for (const path of passes) this.#note(path, this.#touched.passes, this.#outerOfPassed)
    for (const path of writes) {
      this.#note(path, this.#touched.writes, this.#outerOfWritten)
      for (const outer of outerPaths(path)) this.#outerOfUsed.add(outer)
    }
    return size() > before
  }

  addAll(others: Footprints): void {
    this.add(others.#touched)
  }

  /** Whether a step that touches this and one of those cannot be exchanged. */
  meets({ reads, writes, passes }: Touched): boolean {
    if (this.isWrittenBy({ reads, writes, passes })) return true
    const { writes: written } = this.#touched
    for (const path of reads) if (inside(path, written) || this.#outerOfWritten.has(path)) return true
    for (const path of passes) if (inside(path, written)) return true
    return false
  }

  /** Whether a step writes what those read, write, or passed by. */
  isWrittenBy({ writes }: Touched): boolean {
    const { reads, writes: written } = this.#touched
    for (const path of writes) {
      if (this.#outerOfUsed.has(path) || this.#outerOfPassed.has(path)) return true
      if (inside(path, reads) || inside(path, written)) return true
    }
    return false
  }

  #note(path: string, paths: Set<string>, outer: Set<string>): void {
    if (paths.has(path)) return
    paths.add(path)
    for (const one of outerPaths(path)) outer.add(one)
  }
}

/** A path and all that it lies in. */
function outerPaths(path: string): string[] {
  const outer = ['']
  for (let dot = path.indexOf('.'); dot >= 0; dot = path.indexOf('.', dot + 1)) outer.push(path.slice(0, dot))
  if (path !== '') outer.push(path)
  return outer
}

/** Whether a path is one of those, or lies in one. */
function inside(path: string, paths: ReadonlySet<string>): boolean {
  if (paths.size === 0) return false
  if (paths.has(path) || paths.has('')) return true
  for (let dot = path.indexOf('.'); dot >= 0; dot = path.indexOf('.', dot + 1)) {
    if (paths.has(path.slice(0, dot))) return true
  }
  return false
}

/** The smallest set of those that can go on whose closure nobody disturbs and whose steps are hidden, or all. */
function smallest<S>(
  point: Point<S>,
  enabled: readonly number[],
  mayDisturb: (member: number, other: number) => boolean,
  isHidden: (one: number) => boolean,
): readonly number[] {
  let best = enabled
  for (const seed of enabled) {
    const chosen = new Set([seed])
    for (const member of chosen) {
      for (let other = 0; other < point.at.length; other++) {
        if (!chosen.has(other) && mayDisturb(member, other)) chosen.add(other)
      }
    }
    const set = enabled.filter((one) => chosen.has(one))
    if (set.length < best.length && set.every(isHidden)) best = set
  }
  return best
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
