/**
 * The machines that lend to a ramster, which may change while it runs.
 *
 * A removed machine gets no new blocks from then on. Its blocks move to the other machines or rise (`place.ts`), and
 * once it has none left it is released. Nothing is lost: blocks without another place stay there until one has room.
 *
 * Invariants: there are 1 to 8 machines at any moment, including those that are leaving; names are unique; enough
 * machines stay for the persistent pages.
 */
import type { RemotePlan } from './remote.ts'

/** Most machines at once. */
export const mostMachines = 8
/** Machines that a page which may not vanish is on. */
export const copiesOfPersistent = 2

/** A place whose machines these are. */
export interface Borrowing {
  /** Begins to reach another machine. Throws what it cannot be borrowed for; then nothing has changed. */
  add(plan: RemotePlan): void
  /** Gives a machine nothing more. Resolves when it was let go of, or the place is closed. */
  remove(plan: RemotePlan): Promise<void>
}

export class Lenders {
  readonly #plans: RemotePlan[]
  readonly #leaving: Map<RemotePlan, Promise<void>> = new Map()
  readonly #places: Set<Borrowing> = new Set()
  /** With one machine at the start only pages that may vanish go there, however many come later. */
  readonly persistent: boolean

  /** Throws `RangeError` unless these are 1 to 8 machines of different names. */
  constructor(plans: readonly RemotePlan[]) {
    if (!Array.isArray(plans) || plans.length < 1 || plans.length > mostMachines)
      throw new RangeError(`ramster: machines is a list of 1 to ${mostMachines} machines`)
    this.#plans = [...plans]
    this.persistent = plans.length >= copiesOfPersistent
  }

  /** Machines by name: those that are being taken out say so. */
  get machines(): readonly { readonly name: string; readonly isLeaving: boolean }[] {
    return this.#plans.map((plan) => ({ name: plan.name, isLeaving: this.#leaving.has(plan) }))
  }

  /**
   * Adds a machine. It is used once it answers. Throws `RangeError` when there is one of that name, or no room for
   * another; `TmemError` when it cannot be borrowed from. Then nothing has changed.
   */
  add(plan: RemotePlan): void {
    if (this.#plans.some(({ name }) => name === plan.name)) throw new RangeError(`ramster: ${plan.name} lends already`)
    if (this.#plans.length === mostMachines)
      throw new RangeError(`ramster: there are ${mostMachines} machines, which is the most: take one out first`)
    const done: Borrowing[] = []
    try {
      for (const place of this.#places) {
        place.add(plan)
        done.push(place)
      }
    } catch (error) {
      // A rejection of these surfaces as an unhandled one, beside the error that is thrown here.
      for (const place of done) void place.remove(plan)
      throw error
    }
    this.#plans.push(plan)
  }

  /**
   * Takes a machine out. Resolves when it has none of our blocks any more and was let go of, which takes as long as
   * the others have no room for them; or when the places are closed. Throws `RangeError` at once when there is none of
   * that name, or too few would stay.
   */
  remove(name: string): Promise<void> {
    const plan = this.#plans.find((one) => one.name === name)
    if (plan === undefined)
      throw new RangeError(`ramster: ${name} lends nothing; there are ${this.#plans.map((one) => one.name).join(', ')}`)
    const already = this.#leaving.get(plan)
    if (already !== undefined) return already
    const least = this.persistent ? copiesOfPersistent : 1
    if (this.#plans.length - this.#leaving.size <= least)
      throw new RangeError(`ramster: ${name} cannot go: ${least} must stay; add another machine first`)
    const gone = Promise.all([...this.#places].map((place) => place.remove(plan))).then(() => {
      this.#plans.splice(this.#plans.indexOf(plan), 1)
      this.#leaving.delete(plan)
    })
    this.#leaving.set(plan, gone)
    return gone
  }

  /** Told of a place that opens: its machines now. */
  joined(place: Borrowing): readonly RemotePlan[] {
    this.#places.add(place)
    return this.#plans.filter((plan) => !this.#leaving.has(plan))
  }

  /** Told of a place that closes. */
  left(place: Borrowing): void {
    this.#places.delete(place)
  }
}
