/**
 * The transcendent memory API of the mail of December 2009 (Take 3), as Xen implemented it: clients, pool ids, shared
 * pools and who may join them, freezing. Where the pages rest is any `PageStore`.
 *
 * A client has a small table of pools; the number of a slot is the pool id, so 0 is a valid one, and one shared pool
 * has different ids in the tables of its sharers. Nothing of a destroyed pool can be reached through its old id, also
 * when the slot is used again.
 *
 * Where the sources disagree: DEVIATION: the 2009 text says that a get from a private pool is destructive. That holds
 * for ephemeral pools only, as in Xen's code: a page of a private persistent pool stays. DEVIATION: an unauthorised
 * client, or one that gives the reserved uuid (all ones), asks for a shared pool and gets a refusal. Xen gave it a
 * private one and said nothing, so that it believed that it shared. DEVIATION: authorising a uuid twice takes one slot;
 * from Xen 4.9 on it took two, and withdrawing once left it permitted. DEVIATION: joining with another page size is
 * refused. Xen ignored what the joiner said. DEVIATION: a sharer that leaves takes no pages with it; when it was the
 * owner, the pages of this pool, and no others, count as the next owner's from then on, so that a later client of the
 * same number does not pay for them. Xen dropped the objects that the leaver had touched last, moved the *whole*
 * ephemeral list of a leaving owner to the next one, and left the pool's pages unevictable for ever.
 */
import { checkOptions } from './options.ts'
import type { PoolRefusal } from './outcomes.ts'
import { GetOutcome, PutOutcome, PoolRefusal as Refusal } from './outcomes.ts'
import type { Borrower, ObjectId, PageStore, Pool } from './store.ts'
import { assertClient, basePageSize, isPageSize } from './store.ts'

/** Bits of the flags word of new_pool. */
export const PoolFlag = {
  /** Persistent; without it ephemeral. */
  Persist: 1,
  /** Shared; without it private. */
  Shared: 2,
  /** Reserved by the original for pages that are compressed already; always refused. */
  Precompressed: 4,
} as const

const pageSizeShift = 4
const pageSizeMask = 0xf
const versionShift = 24
/** The only version of the specification that there is. */
export const specificationVersion = 1
/** Bits that must be zero: 8 to 23. Bit 3, which nobody ever named, is not among them: it is ignored, as in Xen. */
const reservedMask = 0x00ffff00

/** What a flags word says. */
export interface PoolFlags {
  readonly persistent: boolean
  readonly shared: boolean
  /** Bytes: a power of two from 4 KiB to 2 MiB. */
  readonly pageSize: number
}

/** Builds the flags word of new_pool (unsigned, 32 bits). Throws `RangeError` for an impossible page size. */
export function encodePoolFlags(flags: PoolFlags): number {
  if (!isPageSize(flags.pageSize)) throw new RangeError(`no page has ${flags.pageSize} bytes`)
  const order = Math.log2(flags.pageSize / basePageSize)
  return (
    ((flags.persistent ? PoolFlag.Persist : 0) |
      (flags.shared ? PoolFlag.Shared : 0) |
      (order << pageSizeShift) |
      (specificationVersion << versionShift)) >>>
    0
  )
}

/** Reads a flags word, or says why no pool can be made of it; the checks are in Xen's order. */
export function decodePoolFlags(word: number): PoolFlags | PoolRefusal {
  if (word >>> versionShift !== specificationVersion) return Refusal.BadVersion
  const persistent = (word & PoolFlag.Persist) !== 0
  const shared = (word & PoolFlag.Shared) !== 0
  if (shared && persistent) return Refusal.SharedPersistent
  const pageSize = basePageSize * 2 ** ((word >>> pageSizeShift) & pageSizeMask)
  if (!isPageSize(pageSize)) return Refusal.BadPageSize
  if ((word & PoolFlag.Precompressed) !== 0) return Refusal.Precompressed
  if ((word & reservedMask) !== 0) return Refusal.ReservedBits
  return { persistent, shared, pageSize }
}

/** A 128-bit name under which a pool is shared: 0 to 2^128-1, of which the last is reserved. */
export type Uuid = bigint
const reservedUuid: Uuid = (1n << 128n) - 1n

/** Answer to a change of what a client may share. */
export const Authorization = {
  /** It is as was asked for, whether it was before or not. */
  Done: 0,
  /** All slots of the client are in use. */
  NoSlot: 1,
  /** There was nothing to withdraw. */
  Absent: 2,
} as const
export type Authorization = (typeof Authorization)[keyof typeof Authorization]

/** A new pool, or why there is none. */
export type NewPool = { readonly poolId: number } | { readonly refusal: PoolRefusal }

/** Sizes of the tables, and whether sharing needs a permit. */
export interface TmemOptions {
  /** Pools that each client can have (default 16, as Xen). */
  readonly poolsPerClient?: number
  /** Shared pools in all (default 16, as Xen). */
  readonly sharedPools?: number
  /** Uuids that each client can be authorised for (default 16, as Xen). */
  readonly permitsPerClient?: number
  /** True: every client may share under any uuid (default false: only under those it was authorised for). */
  readonly everybodyShares?: boolean
}

/** A pool and those who use it; a private pool has one user. */
interface Membership {
  readonly pool: Pool
  readonly uuid: Uuid | undefined
  /** Users in the order in which they joined; the first is the owner. A client that joined twice is in it twice. */
  readonly users: number[]
  /** Whose the pages are where memory is shared out by client: the owner, as soon as the store has room for it. */
  charged: number
}

interface Client {
  readonly slots: (Membership | undefined)[]
  readonly permits: Set<Uuid>
  frozen: boolean
}

/** Clients, their pool ids and shared pools over one store. */
export class Tmem {
  readonly #store: PageStore
  readonly #poolsPerClient: number
  readonly #sharedPools: number
  readonly #permitsPerClient: number
  #everybodyShares: boolean
  readonly #clients = new Map<number, Client>()
  readonly #shared = new Map<Uuid, Membership>()

  constructor(store: PageStore, options: TmemOptions = {}) {
    checkOptions('Tmem', options, {
      poolsPerClient: 'number?',
      sharedPools: 'number?',
      permitsPerClient: 'number?',
      everybodyShares: 'flag?',
    })
    const { poolsPerClient = 16, sharedPools = 16, permitsPerClient = 16, everybodyShares = false } = options
    for (const [name, value] of Object.entries({ poolsPerClient, sharedPools, permitsPerClient }))
      if (!Number.isInteger(value) || value < 1)
        throw new RangeError(`${name} must be a positive integer, got ${value}`)
    this.#store = store
    this.#poolsPerClient = poolsPerClient
    this.#sharedPools = sharedPools
    this.#permitsPerClient = permitsPerClient
    this.#everybodyShares = everybodyShares
  }

  /**
   * Makes a pool, or joins the shared one of that uuid; the id is the lowest free slot of the client. `uuid` matters
   * for shared pools only.
   */
  newPool(client: number, uuid: Uuid, flags: number): NewPool {
    assertClient(client)
    assertUuid(uuid)
    const asked = decodePoolFlags(flags)
    if (typeof asked === 'number') return { refusal: asked }
    const state = this.#clientOf(client)
    let poolId = 0
    while (state.slots[poolId] !== undefined) poolId++
    if (poolId === this.#poolsPerClient) return { refusal: Refusal.NoSlot }
    if (asked.shared) {
      if (uuid === reservedUuid || !(this.#everybodyShares || state.permits.has(uuid)))
        return { refusal: Refusal.NotAuthorized }
      const known = this.#shared.get(uuid)
      if (known !== undefined) {
        if (known.pool.attributes.pageSize !== asked.pageSize) return { refusal: Refusal.BadPageSize }
        known.users.push(client)
        state.slots[poolId] = known
        return { poolId }
      }
      if (this.#shared.size === this.#sharedPools) return { refusal: Refusal.NoSharedSlot }
    }
    const pool = this.#store.newPool({ client, ...asked })
    if (typeof pool === 'number') return { refusal: pool }
    const membership: Membership = { pool, uuid: asked.shared ? uuid : undefined, users: [client], charged: client }
    if (asked.shared) this.#shared.set(uuid, membership)
    if (state.frozen) pool.freeze()
    state.slots[poolId] = membership
    return { poolId }
  }

  /**
   * Gives a pool up. A private one goes with its pages; a shared one goes with its last user, and passes to the user
   * who joined next when its owner leaves. An id that is not in use is ignored.
   */
  destroyPool(client: number, poolId: number): void {
    const state = this.#clients.get(client)
    const membership = state?.slots[poolId]
    if (state === undefined || membership === undefined) return
    state.slots[poolId] = undefined
    const { users, pool, uuid } = membership
    const owner = users[0]
    users.splice(users.indexOf(client), 1)
    if (users.length === 0) {
      if (uuid !== undefined) this.#shared.delete(uuid)
      pool.destroy()
    } else if (users[0] !== owner) this.#applyFreeze(membership)
    // Also those of other pools: with one pool less the store may have room for their owners.
    for (const shared of this.#shared.values()) charge(shared)
  }

  /** Copies a page in; see `Pool.put`. `PoolGone` for an id that is not in use. */
  putPage(client: number, poolId: number, object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const pool = this.#poolOf(client, poolId)
    return pool === undefined ? PutOutcome.PoolGone : pool.put(object, index, page)
  }

  /** Copies a page out; see `Pool.get`. `Miss` for an id that is not in use. */
  getPage(client: number, poolId: number, object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    const pool = this.#poolOf(client, poolId)
    return pool === undefined ? GetOutcome.Miss : pool.get(object, index, into)
  }

  /** As `getPage`, waiting where that is needed; see `Pool.fetch`. */
  async fetchPage(
    client: number,
    poolId: number,
    object: ObjectId,
    index: number,
    into: Uint8Array,
  ): Promise<GetOutcome> {
    const pool = this.#poolOf(client, poolId)
    return pool === undefined ? GetOutcome.Miss : pool.fetch(object, index, into)
  }

  /** Lends a page; see `Pool.lend`. */
  lendPage(client: number, poolId: number, object: ObjectId, index: number, use: Borrower): GetOutcome {
    const pool = this.#poolOf(client, poolId)
    return pool === undefined ? GetOutcome.Miss : pool.lend(object, index, use)
  }

  /** Removes a page, for all who share the pool. */
  flushPage(client: number, poolId: number, object: ObjectId, index: number): void {
    this.#poolOf(client, poolId)?.flushPage(object, index)
  }

  /** Removes all pages of an object, for all who share the pool. */
  flushObject(client: number, poolId: number, object: ObjectId): void {
    this.#poolOf(client, poolId)?.flushObject(object)
  }

  /** The pool behind an id, for batches; `undefined` when the id is not in use. Valid until the id is given up. */
  pool(client: number, poolId: number): Pool | undefined {
    return this.#poolOf(client, poolId)
  }

  /** Lets a client share under a uuid. Idempotent. */
  authorize(client: number, uuid: Uuid): Authorization {
    assertClient(client)
    assertUuid(uuid)
    const { permits } = this.#clientOf(client)
    if (permits.has(uuid)) return Authorization.Done
    if (permits.size === this.#permitsPerClient) return Authorization.NoSlot
    permits.add(uuid)
    return Authorization.Done
  }

  /** Takes the permit away. A pool that was joined before stays joined. */
  withdraw(client: number, uuid: Uuid): Authorization {
    assertClient(client)
    return this.#clients.get(client)?.permits.delete(uuid) ? Authorization.Done : Authorization.Absent
  }

  /** Lets every client share under any uuid from now on, or ends that. */
  authorizeEverybody(everybody: boolean): void {
    this.#everybodyShares = everybody
  }

  /** Freezes all pools that the client owns: new handles are refused, replacing, getting and flushing go on. */
  freeze(client: number): void {
    this.#setFrozen(client, true)
  }

  /** Ends `freeze`. */
  thaw(client: number): void {
    this.#setFrozen(client, false)
  }

  /** The client died: all its pools are given up, its permits and its freeze forgotten. */
  destroyClient(client: number): void {
    const state = this.#clients.get(client)
    if (state === undefined) return
    for (let poolId = 0; poolId < state.slots.length; poolId++) this.destroyPool(client, poolId)
    this.#clients.delete(client)
  }

  #setFrozen(client: number, frozen: boolean): void {
    assertClient(client)
    const state = this.#clientOf(client)
    state.frozen = frozen
    for (const membership of state.slots) if (membership?.users[0] === client) this.#applyFreeze(membership)
  }

  /** A pool is frozen when its owner is. */
  #applyFreeze(membership: Membership): void {
    if (this.#clientOf(membership.users[0]).frozen) membership.pool.freeze()
    else membership.pool.thaw()
  }

  #poolOf(client: number, poolId: number): Pool | undefined {
    return this.#clients.get(client)?.slots[poolId]?.pool
  }

  #clientOf(client: number): Client {
    let state = this.#clients.get(client)
    if (state === undefined) {
      state = { slots: new Array(this.#poolsPerClient).fill(undefined), permits: new Set(), frozen: false }
      this.#clients.set(client, state)
    }
    return state
  }
}

/** Lets the owner of a shared pool have its pages. */
function charge(membership: Membership): void {
  const [owner] = membership.users
  if (owner === membership.charged) return
  if (membership.pool.handOver?.(owner) !== false) membership.charged = owner
}

function assertUuid(uuid: Uuid): void {
  if (typeof uuid !== 'bigint') throw new TypeError(`uuid must be a bigint, got ${typeof uuid}`)
  if (uuid < 0n || uuid > reservedUuid) throw new RangeError('uuid must have 128 bits')
}
