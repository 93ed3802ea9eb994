/**
 * Connections take turns by the time that their requests have cost, however many wait, and however much each of them
 * has sent.
 *
 * A turn ends after `turnMs`; what the connection has received beyond it waits for its next turn. Whoever uses up its
 * turn is a bulk client until a turn of its ends early, and those that are not come first. Between two looks at the
 * sockets there is about one `turnMs` for bytes that have just come, one for others that are not bulk, and then a turn
 * of one bulk client: a client that asks for little is answered after about one turn however many bulk clients there
 * are, and they have at least a third of the time.
 *
 * Invariants (start-time fair queueing, in both classes):
 *  - Who has used least is next. `used` of an account never goes back, and who comes with new bytes has used at most
 *    one turn less than whoever was
 *    next when last somebody was: to have asked for nothing for long saves up no more.
 *  - An account waits at most once, and what waits is called in some turn of the event loop.
 *
 * One request is never stopped in the middle: what may take long comes in slices (slices.ts).
 *
 * Source: Goyal, Vin, Cheng, "Start-time Fair Queueing" (1996).
 */

/** Milliseconds of work after which the next one has its turn. */
export const turnMs = 0.2

/** What one connection has used. */
export interface Account {
  /** Milliseconds of turns, and what it was raised to while it asked for nothing. */
  used: number
  /** Its last turn was used up. */
  bulk: boolean
  /** It is in the queue. */
  waits: boolean
  /** Its turn has come. */
  turn(): void
}

/** The queue of one server. */
export class Turns {
  readonly #now: () => number
  readonly #waiting: Account[] = []
  /** What the one that was next had used: the least of all, when last that was asked. */
  #level = 0
  #beganMs = 0
  /** Whether the turn is over was asked. */
  #asked = false
  /** Of turns that followed each other without a pause, or since the sockets were looked at. */
  #spentMs = 0
  /** When the last turn ended. */
  #endedMs = 0
  /** Whose turn has come from the queue. */
  #called: Account | undefined
  #scheduled = false

  /** @param now milliseconds, never going back */
  constructor(now: () => number = () => performance.now()) {
    this.#now = now
  }

  /** Begins a turn, which `leave` ends. False: others are first, and the account waits. */
  enter(account: Account): boolean {
    if (account.waits) return false
    const nowMs = this.#now()
    // While nothing was done others could have been served.
    this.#spentMs = Math.max(0, this.#spentMs - (nowMs - this.#endedMs))
    this.#endedMs = nowMs
    account.used = Math.max(account.used, this.#level - turnMs)
    const isFirst =
      this.#called === account || (this.#spentMs < turnMs && !this.#waiting.some((other) => isBefore(other, account)))
    if (!isFirst) {
      this.wait(account)
      return false
    }
    this.#called = undefined
    if (this.#waiting.length === 0) this.#level = account.used
    this.#beganMs = nowMs
    this.#asked = false
    return true
  }

  /** The turn that has begun is used up. Never when it is first asked: each turn is good for something. */
  over(): boolean {
    if (!this.#asked) {
      this.#asked = true
      return false
    }
    return this.#now() - this.#beganMs >= turnMs
  }

  /** Ends the turn that has begun. */
  leave(account: Account): void {
    this.#endedMs = this.#now()
    const costMs = this.#endedMs - this.#beganMs
    account.used += costMs
    account.bulk = costMs >= turnMs
    this.#spentMs += costMs
  }

  /** The account has more to do. */
  wait(account: Account): void {
    if (account.waits) return
    account.waits = true
    this.#waiting.push(account)
    this.#schedule()
  }

  /** The account has nothing to do any more. */
  forget(account: Account): void {
    if (!account.waits) return
    account.waits = false
    this.#waiting.splice(this.#waiting.indexOf(account), 1)
  }

  #schedule(): void {
    if (this.#scheduled) return
    this.#scheduled = true
    setImmediate(this.#round)
  }

  readonly #round = (): void => {
    this.#scheduled = false
    this.#spentMs = 0
    while (this.#spentMs < turnMs && this.#call(false));
    this.#call(true)
    this.#spentMs = 0
    if (this.#waiting.length > 0) this.#schedule()
  }

  /** Gives the next one of a class its turn; false: nobody of it waits. */
  #call(bulk: boolean): boolean {
    let next: Account | undefined
    for (const account of this.#waiting)
      if (account.bulk === bulk && (next === undefined || isBefore(account, next))) next = account
    if (next === undefined) return false
    this.forget(next)
    this.#level = next.used
    this.#called = next
    next.turn()
    this.#called = undefined
    return true
  }
}

const isBefore = (one: Account, other: Account): boolean =>
  one.bulk === other.bulk ? one.used < other.used : !one.bulk
