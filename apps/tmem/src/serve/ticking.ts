/**
 * Background work of a device: soon after its stack has asked for it, again while there is more to do, and otherwise
 * now and then.
 *
 * Between two turns it rests for as long as it has worked, so that it takes at most half of a processor and requests
 * get their turn.
 *
 * A device whose work throws is broken: its work ends, and that of other devices goes on.
 */
import type { Progress } from '@tmem/core'

/** Pause while there is nothing to do. */
const heartbeatMs = 1000

export class Ticking {
  readonly #tick: () => Progress
  readonly #onBroken: (error: Error) => void
  #timer: NodeJS.Timeout | undefined
  #soon: NodeJS.Immediate | undefined
  #stopped = false

  /** Begins at once. Calls `onBroken` once if `tick` throws. */
  constructor(tick: () => Progress, onBroken: (error: Error) => void) {
    this.#tick = tick
    this.#onBroken = onBroken
    this.wake()
  }

  /** There is work. */
  wake(): void {
    if (this.#stopped || this.#soon !== undefined) return
    clearTimeout(this.#timer)
    this.#soon = setImmediate(() => this.#run())
  }

  stop(): void {
    this.#stopped = true
    clearTimeout(this.#timer)
    clearImmediate(this.#soon)
  }

  #run(): void {
    this.#soon = undefined
    const begun = performance.now()
    let pending: boolean
    try {
      pending = this.#tick().pending
    } catch (error) {
      this.stop()
      this.#onBroken(error as Error)
      return
    }
    // The stack may have asked for more meanwhile.
    if (this.#stopped || this.#soon !== undefined) return
    this.#timer = setTimeout(() => this.#run(), pending ? performance.now() - begun : heartbeatMs)
  }
}
