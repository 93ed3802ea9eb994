/**
 * Background work of a device, when its stack asks for it: soon after it has asked to be woken, again while there is
 * more to do, and else now and then.
 *
 * While there is more to do it rests as long as it has worked, so that it takes half of a processor at most, and
 * requests have their turn.
 *
 * A device whose work throws is broken. It is left alone from then on, and nobody else's work ends with it.
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

  /** Begins at once. `onBroken` is told once, when `tick` has thrown. */
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
    // It may have asked for more meanwhile.
    if (this.#stopped || this.#soon !== undefined) return
    this.#timer = setTimeout(() => this.#run(), pending ? performance.now() - begun : heartbeatMs)
  }
}
