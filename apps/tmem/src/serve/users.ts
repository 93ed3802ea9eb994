/**
 * Who uses a device, and that nobody begins to while its pages are given up.
 *
 * Users are clients of NBD and whoever has the device's file open: a program, or a loop device with swap or a file
 * system on it. Both are counted where they come in, so it does not matter by which path they came.
 *
 * Invariant: what gives up pages that somebody may count on (`reset`, a smaller `disksize`, RESIZE) is done only while
 * nobody else uses the device. It is claimed first, then looked at, then done.
 */
import { setImmediate } from 'node:timers/promises'

/** Where users come in. */
export interface Entrances {
  /** Clients of NBD that have it open. */
  clients(): number
  /** Files that lead to it: `opens` at once, `opensNow` after the kernel has told of what was closed. */
  opens(): number
  opensNow(): Promise<number>
  /** What this host's kernel does with the file, in words; `undefined`: nothing, or nobody can tell. */
  kernelUse(): Promise<string | undefined>
}

/** Somebody uses what was to be taken away; in the mount it is EBUSY. */
export const inUse = (message: string): Error => Object.assign(new Error(message), { code: 'EBUSY' })

export class Users {
  readonly #name: string
  readonly #entrances: Entrances
  #isClaimed = false

  constructor(name: string, entrances: Entrances) {
    this.#name = name
    this.#entrances = entrances
  }

  /** Whether its file may be opened: not while its pages are given up. */
  get mayOpen(): boolean {
    return !this.#isClaimed
  }

  /** Whether others than NBD's clients use it. */
  get hasFile(): boolean {
    return this.#entrances.opens() > 0
  }

  /** Whether anybody uses it. */
  get isThere(): boolean {
    return this.hasFile || this.#entrances.clients() > 0
  }

  /** The same, after clients that have left by now were seen to. */
  async isThereStill(): Promise<boolean> {
    await this.#departures()
    return this.isThere
  }

  /** How many connections and open files lead to it now. */
  counts(): { readonly clients: number; readonly opens: number } {
    return { clients: this.#entrances.clients(), opens: this.#entrances.opens() }
  }

  /** Who uses it, in words; `undefined`: nobody. */
  async text(): Promise<string | undefined> {
    const opens = await this.#entrances.opensNow()
    const use = opens > 0 ? ((await this.#entrances.kernelUse()) ?? `${opens} open files`) : undefined
    await this.#departures()
    const clients = this.#entrances.clients()
    const said = [...(clients > 0 ? [`${clients} NBD connections`] : []), ...(use === undefined ? [] : [use])]
    return said.length === 0 ? undefined : said.join('; ')
  }

  /** A connection's end is read, and then closed, in turns of the event loop after whatever else came with it. */
  async #departures(): Promise<void> {
    for (let turns = 0; turns < 16 && this.#entrances.clients() > 0; turns++) await setImmediate()
  }

  /**
   * Does what gives up pages while nobody uses the device. Rejects (`EBUSY`) when somebody does; nothing is done
   * then.
   */
  async whileUnused<Result>(act: () => Result | Promise<Result>): Promise<Result> {
    if (this.#isClaimed) throw inUse(`${this.#name} is being emptied already`)
    this.#isClaimed = true
    try {
      const who = await this.text()
      if (who !== undefined) throw inUse(`${this.#name} is in use: ${who}`)
      return await act()
    } finally {
      this.#isClaimed = false
    }
  }
}
