/**
 * Who may come in, and for how long somebody may stand in the door: places for clients that are served, and as many
 * more for those that are still negotiating.
 *
 * Invariants:
 *  - A guest is in the door from the moment it is accepted until it may send requests (under TLS that may include
 *    showing a certificate), at
 *    most `handshakeMs`. Who is in the door never takes the place of one that is served.
 *  - Nor can those that say nothing keep others out: when the door, or the share of an address, is full, the one that
 *    has stood in it longest
 *    (of that address, or of the one that has most in it) makes way.
 *  - One address has at most `connectionsPerAddress`, in the door and served. On a unix socket clients have no address:
 *    who may connect there is the business
 *    of the socket's permissions.
 *  - Whoever is sent away is counted, by reason, and told of.
 */

/** Why somebody was sent away. A contract: counters are named after them. */
export type RefusalReason = 'full' | 'address' | 'silent' | 'displaced' | 'tls'

/** Somebody was sent away. */
export interface NbdRefusal {
  /**
   * `full`: all places are taken; `address`: all that one address may have; `silent`: it did not negotiate in time;
   * `displaced`: the same, and its place was wanted; `tls`: no TLS, a handshake that failed, or a certificate that is
   * none.
   */
  readonly reason: RefusalReason
  /** `ADDRESS:PORT`, or `a unix socket`. */
  readonly peer: string
  /** In words, for people. */
  readonly message: string
}

/** Bounds of a door. */
export interface DoorLimits {
  readonly connections: number
  readonly connectionsPerAddress: number
  readonly handshakeMs: number
}

/** Who is accepted. `close` ends it at once. */
export interface Guest {
  readonly peer: string
  /** What is counted together; `undefined`: of this host. */
  readonly address: string | undefined
  close: () => void
}

/** The door of one server. */
export class Door {
  readonly #limits: DoorLimits
  readonly #refused: (refusal: NbdRefusal) => void
  /** In the door, in the order in which they came, and what ends their time. */
  readonly #standing = new Map<Guest, NodeJS.Timeout>()
  readonly #told = new WeakSet<Guest>()
  readonly #served = new Set<Guest>()
  readonly #byAddress = new Map<string, number>()
  /** How many were sent away. */
  readonly counts: Record<RefusalReason, number> = { full: 0, address: 0, silent: 0, displaced: 0, tls: 0 }

  constructor(limits: DoorLimits, refused: (refusal: NbdRefusal) => void) {
    this.#limits = limits
    this.#refused = refused
  }

  /** Guests that negotiate. */
  get standing(): number {
    return this.#standing.size
  }

  /** Somebody has come. False: it was sent away. */
  enter(guest: Guest): boolean {
    const { connections, connectionsPerAddress, handshakeMs } = this.#limits
    const { address } = guest
    if (address !== undefined && (this.#byAddress.get(address) ?? 0) >= connectionsPerAddress) {
      const first = this.#firstOf(address)
      if (first === undefined) {
        this.refuse(guest, 'address', `its address has all ${connectionsPerAddress} connections that one may have`)
        return false
      }
      this.refuse(first, 'displaced', `it said nothing, and its address has ${connectionsPerAddress} connections`)
    }
    if (this.#standing.size >= connections) {
      const first = this.#firstOf(this.#mostIn())
      this.refuse(first!, 'displaced', `it said nothing, and ${connections} others do not either`)
    }
    const timer = setTimeout(() => {
      this.refuse(guest, 'silent', `it did not choose an export within ${handshakeMs / 1000} s`)
    }, handshakeMs)
    // A server that ends does not wait for it.
    timer.unref()
    this.#standing.set(guest, timer)
    if (address !== undefined) this.#byAddress.set(address, (this.#byAddress.get(address) ?? 0) + 1)
    return true
  }

  /** A guest has negotiated, and would send requests. Answers why it may not. */
  admit(guest: Guest): string | undefined {
    const { connections } = this.#limits
    if (this.#served.size >= connections) {
      this.tell(guest, 'full', `all ${connections} places are taken`)
      return `all ${connections} places of this server are taken: try again later`
    }
    this.#leaveDoor(guest)
    this.#served.add(guest)
    return undefined
  }

  /** Sends somebody away. */
  refuse(guest: Guest, reason: RefusalReason, message: string): void {
    this.tell(guest, reason, message)
    this.leave(guest)
    guest.close()
  }

  /** A guest has gone, or is told to go by somebody else. Idempotent. */
  leave(guest: Guest): void {
    const was = this.#leaveDoor(guest) || this.#served.delete(guest)
    const { address } = guest
    if (!was || address === undefined) return
    const left = this.#byAddress.get(address)! - 1
    if (left === 0) this.#byAddress.delete(address)
    else this.#byAddress.set(address, left)
  }

  /** Counts and tells of a refusal that somebody else carries out; of each guest once. */
  tell(guest: Guest, reason: RefusalReason, message: string): void {
    if (this.#told.has(guest)) return
    this.#told.add(guest)
    this.counts[reason]++
    this.#refused({ reason, peer: guest.peer, message })
  }

  #leaveDoor(guest: Guest): boolean {
    clearTimeout(this.#standing.get(guest))
    return this.#standing.delete(guest)
  }

  #firstOf(address: string | undefined): Guest | undefined {
    for (const guest of this.#standing.keys()) if (guest.address === address) return guest
    return undefined
  }

  /** The address that has most guests in the door. */
  #mostIn(): string | undefined {
    const counts = new Map<string | undefined, number>()
    for (const { address } of this.#standing.keys()) counts.set(address, (counts.get(address) ?? 0) + 1)
    return [...counts].reduce((most, each) => (each[1] > most[1] ? each : most))[0]
  }
}

/**
 * What is counted as one address: an IPv4 address, or the /64 network of an IPv6 one, all of which one host may have.
 */
export function addressClass(remote: string | undefined): string | undefined {
  if (remote === undefined || remote === '') return undefined
  const mapped = /^::ffff:(\d+\.\d+\.\d+\.\d+)$/i.exec(remote)
  if (mapped !== null) return mapped[1]
  if (!remote.includes(':')) return remote
  const [head = '', tail] = remote.replace(/%.*$/, '').split('::')
  const first = head === '' ? [] : head.split(':')
  const last = tail === undefined || tail === '' ? [] : tail.split(':')
  const zeros = tail === undefined ? 0 : 8 - first.length - last.length
  const groups = [...first, ...Array<string>(Math.max(0, zeros)).fill('0'), ...last]
  return `${groups
    .slice(0, 4)
    .map((group) => Number.parseInt(group, 16).toString(16))
    .join(':')}::/64`
}
