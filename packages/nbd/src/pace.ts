/**
 * When answers are sent: at once to a client that waits for each of them, several together to one that has many
 * requests under way.
 *
 * Each sending costs a system call here and, where the client sleeps, waking it, which on a virtual machine costs more
 * than a request. But a client whose answers all come together has nothing to do until then, and then the server has
 * nothing. So answers go out by halves of what the client has under way: it deals with one half while the server deals
 * with the other.
 *
 * How many requests a client has under way cannot be asked. When answers are held until nothing more comes, their
 * number is it: the client has sent all that it may, and waits. That is tried now and then. Held answers go out at the
 * latest after `quietTurns` turns of the event loop in which nothing came.
 */

/** Turns of the event loop without an arrival after which nothing more is expected. */
const quietTurns = 8
/** One sending in so many waits until nothing more comes. */
const trialEvery = 64
/** Answers to requests for so many bytes, together, are not held. */
export const heldBytes: number = 64 * 1024
/**
 * Nor are so many: a client that never waits for answers has no depth, and the more it sends the longer they would be
 * held.
 */
const heldAnswers = 64

/** Of one connection. */
export class Pace {
  /** Requests that the client seems to have under way at once. */
  #depth = 1
  /** Answers that are not sent, and the bytes that their requests were for. */
  #answers = 0
  #bytes = 0
  /** Answers to what was received at once. */
  #burst = 0
  #quiet = 0
  #sendings = 0
  #trial = true

  /**
   * An answer is ready, to a request for so many bytes. True: all that is ready should be sent now, whatever else has
   * been received.
   */
  answered(bytes: number): boolean {
    this.#bytes += bytes
    this.#answers++
    this.#burst++
    const least = Math.min(Math.max(this.#answers, this.#burst), 2 * heldAnswers)
    if (least > this.#depth) this.#depth = least
    if (this.#bytes >= heldBytes || this.#answers >= heldAnswers) return true
    return !this.#trial && this.#depth >= 4 && this.#answers >= this.#depth >> 1
  }

  /** Whether what is ready may wait for more, now that everything received is done. */
  get holds(): boolean {
    if (this.#answers === 0 || this.#bytes >= heldBytes) return false
    return this.#trial || (this.#depth >= 4 && this.#answers < this.#depth >> 1)
  }

  /** Something was received. */
  arrived(): void {
    this.#quiet = 0
    this.#burst = 0
  }

  /** The event loop has turned and nothing came. True: nothing more is expected, and what is ready should be sent. */
  turned(): boolean {
    if (++this.#quiet < quietTurns) return false
    // Where answers are still under way to the client it has more than these.
    this.#depth = Math.max(this.#answers, this.#trial ? 1 : this.#depth - (this.#depth >> 3) - 1)
    return true
  }

  /** All that was ready is sent. */
  sent(): void {
    if (this.#answers === 0) return
    this.#answers = 0
    this.#bytes = 0
    this.#trial = ++this.#sendings % trialEvery === 0
  }
}
