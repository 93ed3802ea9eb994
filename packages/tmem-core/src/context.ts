/**
 * What a stack gives to its layers: memory, and the accounts to which persistent pages are charged.
 *
 * Both are plain objects that can be replaced: to count every allocation, to make one fail, to share one limit between
 * stacks.
 */
import { type ByteAmount, bytesOf, checkOptions } from './options.ts'
import type { Account, Accounts, Allocator } from './store.ts'

const allocate = (make: (bytes: number) => ArrayBufferLike, bytes: number): ArrayBufferLike | undefined => {
  try {
    return make(bytes)
  } catch (error) {
    // The runtime's answer to "no memory" (and to "longer than any buffer can be") is a RangeError, perhaps of another
    // realm.
    if ((error as { readonly name?: unknown } | null)?.name === 'RangeError') return undefined
    throw error
  }
}

/** Memory of this process's own. Untouched pages of large requests cost nothing until they are written. */
export const systemAllocator: Allocator = {
  allocate: (bytes) => allocate((length) => new ArrayBuffer(length), bytes),
}

/**
 * Memory that is there before it is needed: all of it is touched when it is handed out, and layers ask for all of it
 * when they open. For who must not wait for memory, because others get memory by what it does: a server that a kernel
 * of the same machine swaps to.
 */
export const residentAllocator: Allocator = {
  ahead: true,
  allocate: (bytes, site) => {
    const memory = systemAllocator.allocate(bytes, site)
    // One byte of each page of the operating system makes it give the page.
    if (memory !== undefined) for (let at = 0, view = new Uint8Array(memory); at < bytes; at += 4096) view[at] = 0
    return memory
  },
}

/** Memory that several worker threads can use at once. */
export const sharedAllocator: Allocator = {
  allocate: (bytes) => allocate((length) => new SharedArrayBuffer(length), bytes),
}

/** Limits of `createAccounts`. */
export interface AccountsOptions {
  /** Largest amount of persistent memory of each client, in bytes (default: no limit). */
  readonly maximumBytes?: ByteAmount
}

/** Accounts whose maxima can be changed and read. */
export interface ClientAccounts extends Accounts {
  /** Sets the maximum of one client, in bytes. What is already charged above it stays; further charges fail. */
  setMaximum(client: number, bytes: number): void
  /** Sets the weight of one client: its share of ephemeral memory relative to the others; 0 takes the weight away. */
  setWeight(client: number, weight: number): void
  /** Bytes charged to a client. */
  charged(client: number): number
}

const CHARGED = 0
const MAXIMUM = 1
const WEIGHT = 2

class ClientAccount implements Account {
  /** In an array, because a fractional field of an object costs an indirection with each change. */
  readonly #values: Float64Array = new Float64Array(3)

  constructor(maximum: number) {
    this.#values[MAXIMUM] = maximum
  }

  get bytes(): number {
    return this.#values[CHARGED]
  }

  set maximum(bytes: number) {
    this.#values[MAXIMUM] = bytes
  }

  get weight(): number {
    return this.#values[WEIGHT]
  }

  set weight(weight: number) {
    this.#values[WEIGHT] = weight
  }

  charge(bytes: number): boolean {
    const values = this.#values
    const charged = values[CHARGED] + bytes
    if (charged > values[MAXIMUM]) return false
    values[CHARGED] = charged
    return true
  }

  release(bytes: number): void {
    this.#values[CHARGED] -= bytes
  }
}

/**
 * Accounts for the persistent memory of clients: the limit against a client that stores without bound. One object can
 * serve several layers and stacks: then a client's maximum is over all of them.
 */
export function createAccounts(options: AccountsOptions = {}): ClientAccounts {
  checkOptions('createAccounts', options, { maximumBytes: 'bytes?' })
  const maximumBytes = bytesOf('createAccounts', 'maximumBytes', options.maximumBytes ?? Number.POSITIVE_INFINITY)
  if (!(maximumBytes >= 0)) throw new RangeError(`maximumBytes must not be negative, got ${maximumBytes}`)
  const accounts = new Map<number, ClientAccount>()
  const of = (client: number): ClientAccount => {
    let account = accounts.get(client)
    if (account === undefined) {
      account = new ClientAccount(maximumBytes)
      accounts.set(client, account)
    }
    return account
  }
  return {
    of,
    setMaximum(client, bytes) {
      if (!(bytes >= 0)) throw new RangeError(`the maximum must not be negative, got ${bytes}`)
      of(client).maximum = bytes
    },
    setWeight(client, weight) {
      if (!(weight >= 0)) throw new RangeError(`the weight must not be negative, got ${weight}`)
      of(client).weight = weight
    },
    charged: (client) => accounts.get(client)?.bytes ?? 0,
  }
}

/**
 * A byte budget that can be changed while it is in use: whoever holds the object sets `bytes`, the layer that was given
 * it follows at the next put or tick.
 */
export class ByteLimit {
  /** Largest value that `bytes` may have: what the layer reserves its metadata for. */
  readonly maximumBytes: number
  #bytes: number

  /** @param maximumBytes a positive integer; `bytes` starts there */
  constructor(maximumBytes: number) {
    if (!Number.isSafeInteger(maximumBytes) || maximumBytes <= 0)
      throw new RangeError(`a byte limit must be a positive integer, got ${maximumBytes}`)
    this.maximumBytes = maximumBytes
    this.#bytes = maximumBytes
  }

  /** The budget now: 0 to `maximumBytes`. */
  get bytes(): number {
    return this.#bytes
  }

  set bytes(bytes: number) {
    if (!(bytes >= 0 && bytes <= this.maximumBytes))
      throw new RangeError(`the byte limit must be from 0 to ${this.maximumBytes}, got ${bytes}`)
    this.#bytes = bytes
  }
}
