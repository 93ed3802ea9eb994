/**
 * What a client says before it is in transmission, as it is received: its greeting, then options. What they mean is in
 * negotiation.ts.
 */
import type { Incoming } from './incoming.ts'
import { MAXIMUM_OPTION, type Negotiation, type Served } from './negotiation.ts'
import { Handshake as Flag, IHAVEOPT, Option } from './protocol.ts'

/**
 * What came of it: more has to be received; it is to go on; the client broke the protocol; it ends; TLS begins; or the
 * export that it has chosen.
 */
export type Shaken = 'wait' | 'more' | 'broken' | 'end' | 'tls' | Served

export class Handshake {
  readonly #negotiation: Negotiation
  #isGreeted: boolean
  /** An option that is too long, and the bytes of it that are yet to be passed over. */
  #skipOption = 0
  #skip = 0

  /** @param isGreeted the client's greeting came before, in the clear */
  constructor(negotiation: Negotiation, isGreeted: boolean) {
    this.#negotiation = negotiation
    this.#isGreeted = isGreeted
  }

  /** What comes next is an option, which costs something. */
  get isAtOption(): boolean {
    return this.#isGreeted && this.#skip === 0
  }

  /** Deals with the next thing that is there. */
  next(incoming: Incoming): Shaken {
    if (!this.#isGreeted) return this.#greeting(incoming)
    return this.#skip > 0 ? this.#skipping(incoming) : this.#option(incoming)
  }

  #greeting(incoming: Incoming): Shaken {
    if (incoming.available < 4) return 'wait'
    const flags = incoming.chunk.data.getUint32(incoming.start)
    incoming.start += 4
    if ((flags & ~(Flag.FIXED_NEWSTYLE | Flag.NO_ZEROES)) !== 0) return 'broken'
    this.#negotiation.clientFlags = flags
    this.#isGreeted = true
    return 'more'
  }

  #skipping(incoming: Incoming): Shaken {
    const count = Math.min(this.#skip, incoming.available)
    incoming.start += count
    this.#skip -= count
    if (this.#skip > 0) return 'wait'
    this.#negotiation.tooLong(this.#skipOption)
    return 'more'
  }

  #option(incoming: Incoming): Shaken {
    const { available, start: at } = incoming
    if (available < 16) return 'wait'
    const { data, bytes } = incoming.chunk
    if (data.getUint32(at) !== IHAVEOPT[0] || data.getUint32(at + 4) !== IHAVEOPT[1]) return 'broken'
    const option = data.getUint32(at + 8)
    const length = data.getUint32(at + 12)
    if (length > MAXIMUM_OPTION) {
      if (option === Option.EXPORT_NAME) return 'broken'
      incoming.start += 16
      this.#skipOption = option
      this.#skip = length
      return 'more'
    }
    if (available < 16 + length) return 'wait'
    const body = Buffer.from(bytes.subarray(at + 16, at + 16 + length))
    incoming.start += 16 + length
    return this.#negotiation.option(option, body)
  }
}
