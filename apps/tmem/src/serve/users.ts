/**
 * The users of a device, and the claim that keeps new ones out while its pages are dropped.
 *
 * Users are NBD clients and openers of the device's file: programs, or a loop device with swap or a file system on it.
 * Both are counted at their entrance, whatever path led them there.
 *
 * Invariant: an operation that drops pages which a user may need (`reset`, a smaller `disksize`, RESIZE) runs only
 * while nobody else uses the device. It claims the device first, then counts the users, then acts.
 */
import { setImmediate } from 'node:timers/promises'

/** The entrances of users. */
export interface Entrances {
  /** Number of NBD clients that have the device open. */
  clients(): number
  /** Open files of the device: `opens` at once, `opensNow` after the kernel has reported what was closed. */
  opens(): number
  opensNow(): Promise<number>
  /** How this host's kernel uses the file, in words; `undefined` if it does not, or if that is unknown. */
  kernelUse(): Promise<string | undefined>
}

/** The error for pages that are in use; in the mount it is EBUSY. */
export const inUse = (message: string): Error => Object.assign(new Error(message), { code: 'EBUSY' })

export class Users {
  readonly #name: string
  readonly #entrances: Entrances
  #isClaimed = false

  constructor(name: string, entrances: Entrances) {
    this.#name = name
    this.#entrances = entrances
  }

  /** Whether the file may be opened: not while pages are dropped. */
  get mayOpen(): boolean {
    return !this.#isClaimed
  }

  /** Whether anybody but NBD clients uses the device. */
  get hasFile(): boolean {
    return this.#entrances.opens() > 0
  }

  /** Whether anybody uses the device. */
  get isThere(): boolean {
    return this.hasFile || this.#entrances.clients() > 0
  }

  /** The same, after the connections that have ended by now are closed. */
  async isThereStill(): Promise<boolean> {
    await this.#departures()
    return this.isThere
  }

  /** The numbers of connections and open files now. */
  counts(): { readonly clients: number; readonly opens: number } {
    return { clients: this.#entrances.clients(), opens: this.#entrances.opens() }
  }

  /** The users in words; `undefined` if there are none. */
  async text(): Promise<string | undefined> {
    const opens = await this.#entrances.opensNow()
    const use = opens > 0 ? ((await this.#entrances.kernelUse()) ?? `${opens} open files`) : undefined
    await this.#departures()
    const clients = this.#entrances.clients()
    const said = [...(clients > 0 ? [`${clients} NBD connections`] : []), ...(use === undefined ? [] : [use])]
    return said.length === 0 ? undefined : said.join('; ')
  }

  /** Lets the event loop read the end of connections and close them, which takes several turns. */
  async #departures(): Promise<void> {
    for (let turns = 0; turns < 16 && this.#entrances.clients() > 0; turns++) await setImmediate()
  }

  /** Runs an operation that drops pages. Rejects (`EBUSY`) without running it if anybody uses the device. */
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
