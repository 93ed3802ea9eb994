/** Watches the places of a device's stack, and logs when one fails and when it works again. */
import type { Ramzswap } from '@tmem/ramzswap'
import type { Log } from './log.ts'

/** A look now and then is enough: a failure and recovery between two looks is logged at the later look and the next. */
export class PlaceWatch {
  readonly #device: Ramzswap
  readonly #log: Log
  readonly #before = new Map<number, { failed: number; worked: number; fails: boolean }>()

  constructor(device: Ramzswap, log: Log) {
    this.#device = device
    this.#log = log
  }

  look(): void {
    const device = this.#device.name
    for (const [number, { name: place, failed, failure, writes, reads }] of this.#device.usage().places.entries()) {
      const before = this.#before.get(number) ?? { failed: 0, worked: 0, fails: false }
      const worked = writes + reads
      let { fails } = before
      if (failed > before.failed) {
        const why = failure === undefined ? '' : `: ${failure.message}`
        if (!fails) this.#log.error('place.failed', `${device}: ${place} fails${why}`, { device, place, failed })
        fails = true
      } else if (fails && failure === undefined && worked > before.worked) {
        this.#log.info('place.back', `${device}: ${place} works again`, { device, place, failed })
        fails = false
      }
      this.#before.set(number, { failed, worked, fails })
    }
  }
}
