/**
 * The host's state of domains, their clients and pools: plain data that only `host.ts` and `control.ts` change.
 *
 * A client has 16 slots; the number of a slot is the pool id. A shared pool is one `XenPool` in the slots of several
 * clients, under other numbers. Its first user that has not left is the owner, who is asked whether it is frozen.
 */
import { type Census, checkOptions, type ObjectId, type Pool } from '@tmem/core'
import { type Bits, maxPools, noUuid, type OperationLayouts } from './abi.ts'
import type { GuestMemory } from './guest-memory.ts'

/** A domain: a guest, and how its calls are read. */
export interface DomainOptions {
  /** 0 to 32,751. */
  readonly id: number
  readonly memory: GuestMemory
  /** Width of its structures (default 64). */
  readonly bits?: Bits
  /** It may administer the machine (default: domain 0 may). */
  readonly privileged?: boolean
}

/** How a call of a width is read: where the words of the arm `gen` are, and room for a copy of it. */
export interface CallScratch {
  readonly length: number
  readonly oid: number
  /** In 4.0.0 an object id has 2 words, later 6. */
  readonly isNarrow: boolean
  readonly index: number
  readonly cmfn: number
  /** A number of a frame has 2 words, of guests of 32 bits 1. */
  readonly isWide: boolean
  readonly words: Uint32Array
  readonly bytes: Uint8Array
  readonly view: DataView
  readonly layouts: OperationLayouts
}

export class Domain {
  readonly id: number
  /** A guest whose domain was restored, or moved here, brings its own when it comes. */
  memory: GuestMemory
  readonly bits: Bits
  readonly isPrivileged: boolean
  /** It is being killed: its calls get -ENODEV. */
  isDying = false
  /** Where its calls are copied to: those of its width, which the host has once. */
  scratch: CallScratch | undefined
  /** Its client, once it has one. */
  client: Client | undefined

  constructor(options: DomainOptions) {
    checkOptions('Domain', options, { id: 'number', memory: 'object', bits: 'number?', privileged: 'flag?' })
    const { id, memory, bits = 64, privileged = id === 0 } = options
    if (!Number.isInteger(id) || id < 0 || id > 32_751)
      throw new RangeError(`a domain has a number from 0 to 32751, not ${id}`)
    if (bits !== 32 && bits !== 64) throw new RangeError(`a guest has 32 or 64 bits, not ${String(bits)}`)
    this.id = id
    this.memory = memory
    this.bits = bits
    this.isPrivileged = privileged
  }
}

/** What a pool counts; the names are those of the lines of LIST. */
export class PoolCounters {
  /** Puts that stored a page, and all. */
  ps = 0
  pt = 0
  /** Duplicates whose old page went, and that were replaced. */
  pd = 0
  pr = 0
  /** Puts refused for want of memory. */
  px = 0
  /** Gets that hit, and all (a get from an empty pool is none). */
  gs = 0
  gt = 0
  /** Flushes of a page that was there, and all; the same of objects. */
  fs = 0
  ft = 0
  os = 0
  ot = 0
}

/** Names of pages that were flushed while their client moves: 28 bytes each. */
export interface PageName {
  readonly poolId: number
  readonly object: ObjectId
  readonly index: number
}

/** A pool as the interface knows it, over a pool of a store. */
export class XenPool {
  readonly pool: Pool
  readonly isPersistent: boolean
  readonly isShared: boolean
  /** 0 for a private pool. */
  readonly uuid: bigint
  /** Clients that use it, in the order in which they came; one that joined twice is in it twice. */
  readonly users: Client[]
  owner: Client
  readonly counters: PoolCounters = new PoolCounters()
  /**
   * Pages as far as we know (evictions are not told, so that it is exact of persistent ones only), the most there were,
   * and the most objects at such a time.
   */
  pages = 0
  maxPages = 0
  maxObjects = 0
  /** Of a shared pool: who touched an object last. */
  readonly lastClients: Map<ObjectId, number> = new Map()
  readonly #census: Census = { pages: 0, objects: 0 }
  /** The pages that a save still has to look at, and the next of them. */
  saving: { readonly names: readonly PageName[]; next: number } | undefined

  constructor(pool: Pool, owner: Client, isPersistent: boolean, uuid: bigint | undefined) {
    this.pool = pool
    this.owner = owner
    this.users = [owner]
    this.isPersistent = isPersistent
    this.isShared = uuid !== undefined
    this.uuid = uuid ?? 0n
    // What an earlier run has left in its store.
    this.pages = pool.census!().pages
  }

  /** What is in it now, until this is asked again. */
  census(): Census {
    return this.pool.census!(this.#census)
  }

  /** A page was entered under a handle that had none. `isCounted`: `pages` has it already. */
  entered(isCounted: boolean): void {
    if (!isCounted) this.pages++
    if (this.pages <= this.maxPages) return
    const { pages, objects } = this.census()
    this.pages = pages
    this.maxPages = Math.max(this.maxPages, pages)
    this.maxObjects = Math.max(this.maxObjects, objects)
  }

  /** After a put into a persistent pool: how many pages came or went by it. Nothing else changes them unseen. */
  changed(): number {
    const { pages } = this.census()
    const more = pages - this.pages
    this.pages = pages
    return more
  }

  /**
   * Notes who touched an object last; forgets objects that have gone where they are more than half of what is noted.
   */
  touched(object: ObjectId, client: number): void {
    const { lastClients } = this
    lastClients.set(object, client)
    if (lastClients.size <= 1024 || lastClients.size <= 2 * this.census().objects) return
    const kept = new Map<ObjectId, number>()
    this.pool.walk!((name) => {
      const last = lastClients.get(name)
      if (last !== undefined) kept.set(name, last)
      return true
    })
    lastClients.clear()
    for (const [name, last] of kept) lastClients.set(name, last)
  }
}

export class Client {
  readonly id: number
  readonly slots: (XenPool | undefined)[] = new Array<undefined>(maxPools).fill(undefined)
  isFrozen = false
  /** It is being saved, and was frozen before; and goes on running meanwhile. */
  isSaving = false
  wasFrozen = false
  isMigrating = false
  compress: boolean
  weight = 0
  cap = 0
  /** Uuids under which it may share; `noUuid` is a free slot. */
  readonly permits: bigint[] = new Array<bigint>(maxPools).fill(noUuid)
  /** Sharing needs a permit: decided when the client is made. */
  readonly needsPermit: boolean
  /** Handles of persistent pages that were flushed since its save began, and the next to be told of. */
  invalidations: PageName[] = []
  nextInvalidation = 0
  /** Hits in ephemeral pools, puts and hits in persistent ones. */
  ephemeralGets = 0
  persistentPuts = 0
  persistentGets = 0
  /** Puts refused for want of memory, and the most ephemeral pages that a LIST has seen. */
  noMemory = 0
  maxEphemeral = 0

  constructor(id: number, compress: boolean, needsPermit: boolean) {
    this.id = id
    this.compress = compress
    this.needsPermit = needsPermit
  }
}

/** Pages of the ephemeral pools that a client owns. */
export function ephemeralPages(client: Client): number {
  let pages = 0
  for (const pool of client.slots)
    if (pool !== undefined && pool.owner === client && !pool.isPersistent) pages += pool.census().pages
  return pages
}
