/**
 * What a stack gives to its layers: memory, and the accounts to which persistent pages are charged.
 *
 * Both are plain objects that can be replaced: to count every allocation, to make one fail, to share one limit between
 * stacks.
 */
import type { Account, Accounts, Allocator } from './store.ts'

const allocate = (make: (bytes: number) => ArrayBufferLike, bytes: number): ArrayBufferLike | undefined => {
  try {
    return make(bytes)
  } catch (error) {
    // The runtime's answer to "no memory" (and to "longer than any buffer can be") is a RangeError.
    if (error instanceof RangeError) return undefined
    throw error
  }
}

/** Memory of this process's own. Untouched pages of large requests cost nothing until they are written. */
export const systemAllocator: Allocator = {
  allocate: (bytes) => allocate((length) => new ArrayBuffer(length), bytes),
}

/** Memory that several worker threads can use at once. */
export const sharedAllocator: Allocator = {
  allocate: (bytes) => allocate((length) => new SharedArrayBuffer(length), bytes),
}

/** Limits of `createAccounts`. */
export interface AccountsOptions {
  /** Largest amount of persistent memory of each client, in bytes (default: no limit). */
  readonly maximumBytes?: number
}

/** Accounts whose maxima can be changed and read. */
export interface ClientAccounts extends Accounts {
  /** Sets the maximum of one client, in bytes. What is already charged above it stays; further charges fail. */
  setMaximum(client: number, bytes: number): void
  /** Bytes charged to a client. */
  charged(client: number): number
}

class ClientAccount implements Account {
  maximum: number
  bytes = 0

  constructor(maximum: number) {
    this.maximum = maximum
  }

  charge(bytes: number): boolean {
    if (this.bytes + bytes > this.maximum) return false
    this.bytes += bytes
    return true
  }

  release(bytes: number): void {
    this.bytes -= bytes
  }
}

/**
 * Accounts for the persistent memory of clients: the limit against a client that stores without bound. One object can
 * serve several layers and stacks: then a client's maximum is over all of them.
 */
export function createAccounts(options: AccountsOptions = {}): ClientAccounts {
  const { maximumBytes = Number.POSITIVE_INFINITY } = options
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
    charged: (client) => accounts.get(client)?.bytes ?? 0,
  }
}
