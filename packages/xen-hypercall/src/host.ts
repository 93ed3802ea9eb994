/**
 * The host: takes the raw structures of guests, and answers with the numbers that Xen's tmem gave.
 *
 * A call copies the structure out of the guest's memory once, and checks the copy. Its checks come in Xen's order. The
 * pages go to any store (`compose`), which also decides what is evicted; a stack of places evicts in the order in which
 * ephemeral pages came, over all clients, as Xen did.
 *
 * Invariants: a domain reaches only pools in the slots of its own client; a reused slot number reaches nothing of the
 * earlier pool; a refused put leaves no page under its handle; the state of a domain is bounded (16 slots, 16 permits;
 * for a domain that is being saved the names of its pages; for a shared pool twice its objects).
 *
 * DEVIATION: no page is kept under the object id of all ones, because it ends a pool in a saved stream: a put of it
 * gets -ENOMEM. DEVIATION: a get with a bad frame leaves the page in its pool; Xen lost it. DEVIATION: AUTH and
 * RESTORE_NEW are privileged in all releases, and CONTROL in 4.0, too. DEVIATION: a refusal for lack of a slot for a
 * shared pool leaves nothing in the table. `defects: 'original'` restores the defects of Xen that the README names.
 *
 * Source: the reference notes on the hypercall ABI, §2; on the semantics of tmem, §2 to §7.
 */
import {
  type ClientAccounts,
  checkOptions,
  GetOutcome,
  type ObjectId,
  type OptionNames,
  type PageStore,
  PutOutcome,
  TmemError,
  Whereabouts,
} from '@tmem/core'
import {
  allClients,
  type Bits,
  Command,
  defaultRelease,
  Errno,
  interfaceVersion,
  invalidObject,
  isSince,
  maxPools,
  noUuid,
  operationLayouts,
  PoolBit,
  pageBytes,
  pageSizeShift,
  type Release,
  readField,
  readObject,
  readUuid,
  releases,
  sysctlHead,
  sysctlLayout,
  sysctlTmem,
  versionShift,
} from './abi.ts'
import {
  type CallScratch,
  Client,
  Domain,
  type DomainOptions,
  ephemeralPages,
  type PageName,
  XenPool,
} from './clients.ts'
import { type ControlBuffer, type ControlRequest, control } from './control.ts'
import { type GuestMemory, noFrame } from './guest-memory.ts'

/** What a call is answered with: a promise only where the store has to wait for a disk or another machine. */
export type Answer = number | Promise<number>

/** How a host works. */
export interface XenHostOptions {
  /** Where pages go. It must list its pages (`Pool.walk`). The caller closes it, after the host. */
  readonly store: PageStore
  /** Whose behaviour (default `defaultRelease`). */
  readonly release?: Release
  /** `original`: the defects of saving and restoring that Xen had, too (default `mended`). See the README. */
  readonly defects?: 'mended' | 'original'
  /** The accounts of the store: told of weights. */
  readonly accounts?: ClientAccounts
  /** Boot option `tmem_shared_auth`: sharing needs a permit (default false; from 4.9 on it always does). */
  readonly sharedAuth?: boolean
  /** Boot option `tmem_compress`: what a new client has (default true). The store decides what is compressed. */
  readonly compress?: boolean
  /** Clients at once: 1 to 65,535 (default 16,384). A call of one too many is answered -ENOMEM. */
  readonly clients?: number
  /** The security module, from 4.3 on: whether that domain may make tmem calls, or (`isControl`) control. */
  readonly security?: (domain: number, isControl: boolean) => boolean
  /**
   * Bytes that are free for tmem. With it each put first sees to it that 1 MiB is, by evicting as Xen did: the caller's
   * own oldest page where it has more than its share, else the oldest of all. Without it the store makes room itself.
   */
  readonly freeBytes?: () => number
}

const optionNames: OptionNames<XenHostOptions> = {
  store: 'object',
  release: 'text?',
  defects: 'text?',
  accounts: 'object?',
  sharedAuth: 'flag?',
  compress: 'flag?',
  clients: 'number?',
  security: 'function?',
  freeBytes: 'function?',
}

/** Counters of the whole host; the names are those of the G line of LIST. */
export class HostCounters {
  /** Calls, those that failed, and copies that failed. */
  Tt = 0
  Te = 0
  Cf = 0
  /** Pools that got no memory, and pages. */
  Af = 0
  Pf = 0
  /** Puts that found less than 1 MiB free. */
  Lm = 0
  /** Pages evicted, and attempts. */
  Et = 0
  Ea = 0
  /** Pages relinquished, attempts, and the most evictions for one. */
  Rt = 0
  Ra = 0
  Rx = 0
  /** Pools destroyed. */
  Fp = 0
  /** Ephemeral puts that were stored. */
  Ep = 0
  /** The most ephemeral pages, objects and pages that a LIST has seen. */
  Em = 0
  Om = 0
  Pm = 0
}

const reserveBytes = 2 ** 20
const giveUpAfter = 10

export class XenHost {
  readonly release: Release
  /** With the defects of the original. */
  readonly isOriginal: boolean
  readonly store: PageStore
  readonly counters: HostCounters = new HostCounters()
  readonly clients: Map<number, Client> = new Map()
  readonly shared: (XenPool | undefined)[] = new Array<undefined>(maxPools).fill(undefined)
  /** Every client may share under every uuid. */
  everybodyShares = false
  /** Bytes that evictions gave back, and that nobody has had since: Xen's own list of free pages. */
  freed = 0
  /** Why the store failed last, where a guest was told -EFAULT for it. */
  failure: Error | undefined
  readonly #options: XenHostOptions
  readonly #security: XenHostOptions['security']
  readonly #freeBytes: XenHostOptions['freeBytes']
  readonly #domains = new Map<number, Domain>()
  /** The domain of the last call, while it lives: most calls are of the same. */
  #last: Domain | undefined
  readonly #scratches: Readonly<Record<Bits, CallScratch>>
  /** What is asked with every call: whether the release is one of these, or later. */
  readonly #since43: boolean
  readonly #since44: boolean
  readonly #sysctl: Uint8Array = new Uint8Array(8 + sysctlLayout.bytes)
  readonly #where: Whereabouts = new Whereabouts()
  readonly #scratch: Uint8Array = new Uint8Array(pageBytes)
  #isClosed = false

  /** Throws `TypeError` or `RangeError` for options that make no sense. */
  constructor(options: XenHostOptions) {
    checkOptions('XenHost', options, optionNames)
    const { store, release = defaultRelease, defects = 'mended', clients = 16_384 } = options
    if (!releases.includes(release))
      throw new TypeError(`XenHost: release ${String(release)} is none of ${releases.join(', ')}`)
    if (defects !== 'mended' && defects !== 'original')
      throw new TypeError(`XenHost: defects is mended or original, not ${String(defects)}`)
    if (!Number.isInteger(clients) || clients < 1 || clients > 65_535)
      throw new RangeError(`XenHost: clients must be from 1 to 65535, got ${clients}`)
    this.#options = options
    this.#security = options.security
    this.#freeBytes = options.freeBytes
    this.store = store
    this.release = release
    this.isOriginal = defects === 'original'
    this.#since43 = this.isSince('4.3')
    this.#since44 = this.isSince('4.4')
    this.#scratches = { 32: scratchOf(release, 32), 64: scratchOf(release, 64) }
  }

  /** Whether the release is that one or a later one. */
  isSince(release: Release): boolean {
    return isSince(this.release, release)
  }

  // ---- Domains ----------------------------------------------------------------------------------------------------

  /** A domain begins. Throws `RangeError` where there is one of that number. */
  addDomain(options: DomainOptions): Domain {
    if (this.#domains.has(options.id)) throw new RangeError(`there is a domain ${options.id} already`)
    const domain = new Domain(options)
    domain.scratch = this.#scratches[domain.bits]
    this.#domains.set(domain.id, domain)
    return domain
  }

  /** A domain of that number. Throws `RangeError` where there is none. */
  domain(id: number): Domain {
    const domain = this.#domains.get(id)
    if (domain === undefined) throw new RangeError(`there is no domain ${id}`)
    return domain
  }

  hasDomain(id: number): boolean {
    return this.#domains.has(id)
  }

  get domains(): Iterable<Domain> {
    return this.#domains.values()
  }

  /**
   * Kills a domain: its calls get -ENODEV from now on, also those that wait; its private pools go with their pages, and
   * it leaves the shared ones.
   */
  killDomain(id: number): void {
    const domain = this.domain(id)
    domain.isDying = true
    const client = this.clients.get(id)
    if (client !== undefined) {
      for (let slot = 0; slot < maxPools; slot++) this.destroyPool(client, slot)
      this.clients.delete(id)
      domain.client = undefined
      this.#options.accounts?.setWeight(id, 0)
    }
    this.#domains.delete(id)
    if (this.#last === domain) this.#last = undefined
  }

  /** Ends the host: every domain is killed. The store stays. */
  close(): void {
    for (const { id } of this.#domains.values()) this.killDomain(id)
    this.#isClosed = true
  }

  // ---- Calls ------------------------------------------------------------------------------------------------------

  /**
   * Hypercall 38 of a domain: `address` of a `tmem_op` in its memory. The number that the guest gets: at least 0, or an
   * error number negated. Throws `RangeError` for a domain that there is not, `TmemError` (`TMEM_BROKEN`) when the
   * store has stopped.
   */
  call(id: number, address: number): Answer {
    const domain = this.#last?.id === id ? this.#last : this.domain(id)
    this.#last = domain
    if (this.#isClosed) return -Errno.ENODEV
    if (this.#since43 && this.#security?.(id, false) === false) return -Errno.EPERM
    this.counters.Tt++
    let answer: Answer
    try {
      answer = this.#dispatch(domain, address)
    } catch (error) {
      answer = this.#failed(error)
    }
    return this.#counted(domain, answer)
  }

  /** Hypercall 35 of a domain, from 4.6 on: `address` of a sysctl structure for tmem. As `call`. */
  sysctl(id: number, address: number): Answer {
    const domain = this.domain(id)
    const version = interfaceVersion(this.release)
    if (this.#isClosed || version === undefined) return -Errno.ENOSYS
    if (!domain.memory.read(address, this.#sysctl)) return -Errno.EFAULT
    const view = new DataView(this.#sysctl.slice().buffer)
    if (readField(view, sysctlHead.fields.interface_version) !== version) return -Errno.EACCES
    if (!domain.isPrivileged || this.#security?.(id, true) === false) return -Errno.EPERM
    if (readField(view, sysctlHead.fields.cmd) !== sysctlTmem) return -Errno.ENOSYS
    const body = new DataView(view.buffer, sysctlHead.fields.body.at)
    const { fields } = sysctlLayout
    if (readField(body, fields.pad) !== 0) return -Errno.EINVAL
    const request: ControlRequest = {
      subOperation: readField(body, fields.cmd),
      poolId: readField(body, fields.pool_id),
      client: readField(body, fields.cli_id),
      arg1: readField(body, fields.arg1),
      arg2: readField(body, fields.arg2),
      object: readObject(body, fields.oid),
      buffer: guestBuffer(domain.memory, readField(body, fields.buffer)),
    }
    let answer: Answer
    try {
      answer = control(this, request)
    } catch (error) {
      answer = this.#failed(error)
    }
    return this.#counted(domain, answer)
  }

  /** Control by the program that runs the host: no structure, and no domain that could lack the privilege. */
  control(request: ControlRequest): Answer {
    return this.#isClosed ? -Errno.ENODEV : control(this, request)
  }

  /** Turns what the outside world does into an answer. */
  #failed(error: unknown): number {
    if (!(error instanceof TmemError) || error.code === 'TMEM_BROKEN') throw error
    this.failure = error
    return -Errno.EFAULT
  }

  /** Counts an answer. */
  #counted(domain: Domain, answer: Answer): Answer {
    if (typeof answer !== 'number') return this.#countedLater(domain, answer)
    if (answer < 0) this.counters.Te++
    return answer
  }

  async #countedLater(domain: Domain, waiting: Promise<number>): Promise<number> {
    let answer: number
    try {
      answer = await waiting
    } catch (error) {
      answer = this.#failed(error)
    }
    // Whoever was killed while it waited learns nothing more.
    if (domain.isDying) answer = -Errno.ENODEV
    if (answer < 0) this.counters.Te++
    return answer
  }

  /**
   * What is done most is by itself, and short, so that the compiler makes one function of it; of that each word is read
   * once where it lies. Everything else is copied first.
   */
  #dispatch(domain: Domain, address: number): Answer {
    if (domain.isDying) return -Errno.ENODEV
    const { memory } = domain
    const at = memory.wordAt(address, domain.scratch!.length)
    const command = at < 0 ? 0 : memory.words[at]!
    if (command < Command.PutPage || command > Command.FlushObject) return this.#dispatchCopy(domain, address)
    return this.#dispatchPage(domain, command, memory.words, at)
  }

  /** A put, get or flush whose words begin at `at`. */
  #dispatchPage(domain: Domain, command: number, words: Uint32Array, at: number): Answer {
    const scratch = domain.scratch!
    const client = domain.client ?? this.clientOf(domain.id)
    if (client === undefined) return -Errno.ENOMEM
    const poolId = words[at + 1]!
    const pool = poolId < maxPools ? client.slots[poolId] : undefined
    if (pool === undefined) return -Errno.ENODEV
    const object = objectOf(scratch, words, at + scratch.oid)
    const index = words[at + scratch.index]!
    // No guest has a frame whose number needs a second word.
    const isNear = !scratch.isWide || words[at + scratch.cmfn + 1] === 0
    const frame = isNear ? words[at + scratch.cmfn]! : noFrame
    switch (command) {
      case Command.PutPage:
        return this.#putFrame(client, pool, object, index, domain.memory, frame)
      case Command.GetPage:
        return this.#getFrame(domain, client, pool, object, index, frame)
      case Command.FlushPage:
        return this.flushPage(pool, object, index)
      default:
        return this.flushObject(pool, object)
    }
  }

  #dispatchCopy(domain: Domain, address: number): Answer {
    const { view, words, bytes, layouts } = domain.scratch!
    if (!domain.memory.read(address, bytes)) return -Errno.EFAULT
    const command = words[0]!
    const poolId = words[1]! | 0
    if (command >= Command.PutPage && command <= Command.FlushObject)
      return this.#dispatchPage(domain, command, words, 0)
    if (command === Command.Control || command > 100) {
      const answer = this.#administer(domain, command, poolId)
      if (answer !== undefined) return answer
    }
    const client = domain.client ?? this.clientOf(domain.id)
    if (client === undefined) return -Errno.ENOMEM
    if (command === Command.NewPool) {
      const { fields } = layouts.creat
      return this.newPool(client, undefined, readField(view, fields.flags), readUuid(view, fields.uuid))
    }
    if (command === Command.DestroyPool) return this.destroyPool(client, poolId)
    const pool = poolId >>> 0 < maxPools ? client.slots[poolId] : undefined
    if (pool === undefined) return -Errno.ENODEV
    if (this.#since44) return -Errno.ENOSYS
    const { fields } = layouts.gen
    const object = readObject(view, fields.oid)
    const index = readField(view, fields.index)
    const part: Part = {
      frame: readField(view, fields.cmfn),
      at: readField(view, fields.tmem_offset),
      frameAt: readField(view, fields.pfn_offset),
      length: readField(view, fields.len),
    }
    switch (command) {
      case Command.NewPage:
        return this.put(client, pool, object, index, this.#scratch.fill(0))
      case Command.Read:
        return this.#readPart(domain, client, pool, object, index, part)
      case Command.Write:
        return this.#writePart(domain, client, pool, object, index, part)
      default:
        // XCHG was never written; others were told to the log only.
        return 0
    }
  }

  /** The commands of toolstacks; `undefined`: it is none of them. */
  #administer(domain: Domain, command: number, poolId: number): Answer | undefined {
    const { memory } = domain
    const { view, layouts } = domain.scratch!
    const { creat, ctrl } = layouts
    switch (command) {
      case Command.Control: {
        if (ctrl === undefined) return -Errno.EOPNOTSUPP
        if (!this.#mayControl(domain, this.release === '4.0' || this.release === '4.0.0')) return -Errno.EPERM
        const { fields } = ctrl
        return control(this, {
          subOperation: readField(view, fields.subop),
          poolId,
          client: readField(view, fields.cli_id),
          arg1: readField(view, fields.arg1),
          arg2: readField(view, fields.arg2),
          object: readObject(view, fields.oid),
          buffer: guestBuffer(memory, readField(view, fields.buf)),
        })
      }
      case Command.Auth:
      case Command.RestoreNew: {
        if (this.isSince('4.9')) return -Errno.EOPNOTSUPP
        if (!this.#mayControl(domain, true)) return -Errno.EPERM
        const { fields } = creat
        const uuid = readUuid(view, fields.uuid)
        const flags = readField(view, fields.flags)
        const client = readField(view, fields.arg1)
        if (command === Command.Auth) return this.authorize(client, uuid, flags === 1)
        return this.restoreNew(client, poolId, flags, uuid)
      }
    }
    return undefined
  }

  /** `isLax`: the original did not look at the privilege in this release. */
  #mayControl(domain: Domain, isLax: boolean): boolean {
    if (this.isSince('4.3') && this.#security?.(domain.id, true) === false) return false
    return domain.isPrivileged || (this.isOriginal && isLax)
  }

  // ---- Clients and pools ------------------------------------------------------------------------------------------

  /** The client of a domain, made when there is none; `undefined`: there are too many, or the domain is gone. */
  clientOf(id: number): Client | undefined {
    const known = this.clients.get(id)
    if (known !== undefined) return known
    const domain = this.#domains.get(id)
    if (domain === undefined || this.clients.size >= (this.#options.clients ?? 16_384)) return undefined
    const needsPermit = this.isSince('4.9') || this.#options.sharedAuth === true
    const client = new Client(id, this.#options.compress ?? true, needsPermit)
    this.clients.set(id, client)
    domain.client = client
    return client
  }

  /** NEW_POOL; with `wanted` in that slot (restoring). The slot, or an error. */
  newPool(client: Client, wanted: number | undefined, flags: number, uuid: bigint): number {
    const isPersistent = (flags & PoolBit.Persistent) !== 0
    let isShared = (flags & PoolBit.Shared) !== 0
    const isFirst = this.release === '4.0.0'
    if (flags >>> versionShift !== (isFirst ? 0 : 1)) return -Errno.EPERM
    if (isShared && isPersistent && this.isSince('4.5')) return -Errno.EPERM
    if (((flags >>> pageSizeShift) & 0xf) !== 0) return -Errno.EPERM
    if (!isFirst && (flags & (PoolBit.Precompressed | PoolBit.Reserved)) !== 0) return -Errno.EPERM
    const slot = wanted ?? client.slots.indexOf(undefined)
    const hasSlot = slot >= 0 && slot < maxPools && client.slots[slot] === undefined
    if (!hasSlot && this.isSince('4.5')) return -Errno.EPERM
    if (isShared && (uuid === noUuid || !this.#mayShare(client, uuid))) isShared = false
    if (isShared && hasSlot) {
      const known = this.shared.find((pool) => pool?.uuid === uuid)
      if (known !== undefined) {
        known.users.push(client)
        client.slots[slot] = known
        return slot
      }
    }
    // Stores know no pool that is both; a get of a persistent page leaves it in place, which is what sharing asks for.
    const pool = this.store.newPool({
      client: client.id,
      persistent: isPersistent,
      shared: isShared && !isPersistent,
      pageSize: pageBytes,
    })
    if (typeof pool === 'number') {
      this.counters.Af++
      return -Errno.ENOMEM
    }
    if (pool.walk === undefined || pool.census === undefined) {
      pool.destroy()
      throw new TypeError(`XenHost: ${this.store.name} cannot list its pages, which saving a domain needs`)
    }
    const place = isShared ? this.shared.indexOf(undefined) : 0
    if (!hasSlot || place < 0) {
      pool.destroy()
      return -Errno.EPERM
    }
    const made = new XenPool(pool, client, isPersistent, isShared ? uuid : undefined)
    if (isShared) this.shared[place] = made
    if (client.isFrozen) pool.freeze()
    client.slots[slot] = made
    return slot
  }

  #mayShare(client: Client, uuid: bigint): boolean {
    return !client.needsPermit || this.everybodyShares || client.permits.includes(uuid)
  }

  /** RESTORE_NEW. */
  restoreNew(id: number, slot: number, flags: number, uuid: bigint): number {
    const client = this.clients.get(id)
    return client === undefined ? -Errno.EPERM : this.newPool(client, slot < 0 ? maxPools : slot, flags, uuid)
  }

  /**
   * AUTH: permits or withdraws; client 0xFFFF up to 4.8 means everybody. 1, 0: there was nothing to withdraw, or an
   * error.
   */
  authorize(id: number, uuid: bigint, isPermitted: boolean): number {
    if (id === allClients) {
      this.everybodyShares = isPermitted
      return 1
    }
    const client = this.clients.get(id)
    if (client === undefined) return -Errno.EINVAL
    return this.permit(client, uuid, isPermitted)
  }

  permit(client: Client, uuid: bigint, isPermitted: boolean): number {
    const at = client.permits.indexOf(uuid)
    if (!isPermitted) {
      // All ones is no uuid: a free slot.
      if (at < 0 || uuid === noUuid) return 0
      client.permits[at] = noUuid
      return 1
    }
    if (at >= 0 && !(this.isOriginal && this.isSince('4.5'))) return 1
    const free = client.permits.indexOf(noUuid)
    if (free < 0) return -Errno.ENOMEM
    client.permits[free] = uuid
    return 1
  }

  /** DESTROY_POOL: 1, or 0 where there is none. */
  destroyPool(client: Client, slot: number): number {
    const pool = slot >>> 0 < maxPools ? client.slots[slot] : undefined
    if (pool === undefined) return 0
    client.slots[slot] = undefined
    this.counters.Fp++
    // The original cleared the slot and kept the contents, which nobody reached any more.
    if (client.isMigrating && this.isOriginal) return 1
    if (client.isMigrating && pool.isPersistent)
      pool.pool.walk!((object, index) => client.invalidations.push({ poolId: slot, object, index }) > 0)
    pool.users.splice(pool.users.indexOf(client), 1)
    if (pool.users.length === 0) {
      if (pool.isShared) this.shared[this.shared.indexOf(pool)] = undefined
      pool.pool.destroy()
      return 1
    }
    for (const [object, last] of pool.lastClients)
      if (last === client.id) {
        pool.pool.flushObject(object)
        pool.lastClients.delete(object)
      }
    if (pool.owner === client && pool.users[0] !== client) {
      pool.owner = pool.users[0]!
      if (!pool.isPersistent) pool.pool.handOver?.(pool.owner.id)
      if (pool.owner.isFrozen) pool.pool.freeze()
      else pool.pool.thaw()
    }
    return 1
  }

  /** Freezes or thaws a client: the pools that it owns. */
  freeze(client: Client, isFrozen: boolean): void {
    client.isFrozen = isFrozen
    for (const pool of client.slots) {
      if (pool?.owner !== client) continue
      if (isFrozen) pool.pool.freeze()
      else pool.pool.thaw()
    }
  }

  setWeight(client: Client, weight: number): void {
    client.weight = weight
    this.#options.accounts?.setWeight(client.id, weight)
  }

  // ---- Pages ------------------------------------------------------------------------------------------------------

  /** PUT_PAGE of bytes that nobody changes meanwhile, or that the store `readsOnce`. */
  put(client: Client, pool: XenPool, object: ObjectId, index: number, page: Uint8Array): number {
    const { counters, owner } = pool
    counters.pt++
    if (typeof object !== 'number' || owner.isMigrating || this.#freeBytes !== undefined) {
      const answer = this.#mayPut(client, pool, object, index)
      if (answer !== 1) return answer
    }
    // Of a persistent pool the count of its pages says afterwards whether there was one, for less than a look before.
    const isCounted = pool.isPersistent
    const wasThere = !isCounted && pool.pool.whereIs?.(object, index, this.#where) === true
    const outcome = pool.pool.put(object, index, page)
    const more = isCounted ? pool.changed() : 0
    if (outcome !== PutOutcome.Stored) return this.#refused(client, pool, outcome, isCounted ? more !== 0 : wasThere)
    counters.ps++
    if (isCounted) client.persistentPuts++
    else this.counters.Ep++
    if (isCounted ? more === 0 : wasThere) counters.pr++
    else pool.entered(isCounted)
    if (pool.isShared) pool.touched(object, owner.id)
    return 1
  }

  /** 1: a put may go on; else what it is answered. */
  #mayPut(client: Client, pool: XenPool, object: ObjectId, index: number): number {
    if (object === invalidObject) return -Errno.ENOMEM
    if (this.#freeBytes !== undefined && !this.#hasRoom(client, this.#freeBytes)) {
      pool.counters.px++
      client.noMemory++
      // The original looked for room before it looked for the page, and left the old one.
      if (this.isOriginal || !this.#holds(pool, object, index)) return -Errno.ENOMEM
      return this.#putToFlush(pool, object, index)
    }
    if (!pool.owner.isMigrating) return 1
    // The old page may be at the other machine already, and a new one would not come there any more.
    return this.#holds(pool, object, index) ? this.#putToFlush(pool, object, index) : -Errno.EFROZEN
  }

  /** Counts a put that the store has refused, and what it was answered; with it went the page that was there. */
  #refused(client: Client, pool: XenPool, outcome: PutOutcome, wasThere: boolean): number {
    if (outcome === PutOutcome.Frozen) return -Errno.EFROZEN
    pool.counters.px++
    client.noMemory++
    this.counters.Pf++
    if (!wasThere) return -Errno.ENOMEM
    if (!pool.isPersistent) pool.pages--
    pool.counters.pd++
    return -Errno.ENOSPC
  }

  #putToFlush(pool: XenPool, object: ObjectId, index: number): number {
    pool.counters.pd++
    this.#flush(pool, object, index)
    return -Errno.ENOSPC
  }

  #putFrame(
    client: Client,
    pool: XenPool,
    object: ObjectId,
    index: number,
    memory: GuestMemory,
    frame: number,
  ): number {
    let page = memory.frame(frame)
    if (page === undefined) {
      this.counters.Cf++
      if (this.#holds(pool, object, index)) this.#putToFlush(pool, object, index)
      else if (pool.owner.isFrozen) return -Errno.EFROZEN
      return -Errno.EFAULT
    }
    if (memory.isShared && this.store.capabilities.readsOnce !== true) {
      // A codec reads a page more than once.
      this.#scratch.set(page)
      page = this.#scratch
    }
    return this.put(client, pool, object, index, page)
  }

  /** GET_PAGE: 1 a hit, 0 a miss, -EEMPTY the pool has no page. */
  get(client: Client, pool: XenPool, object: ObjectId, index: number, into: Uint8Array): Answer {
    if (object === invalidObject) return this.#missed(pool)
    const outcome = pool.pool.get(object, index, into)
    if (outcome !== GetOutcome.Deferred) return this.#got(client, pool, object, outcome)
    return pool.pool.fetch(object, index, into).then((fetched) => this.#got(client, pool, object, fetched))
  }

  #got(client: Client, pool: XenPool, object: ObjectId, outcome: GetOutcome): number {
    if (outcome !== GetOutcome.Hit) return this.#missed(pool)
    pool.counters.gt++
    pool.counters.gs++
    if (pool.isPersistent) client.persistentGets++
    else {
      client.ephemeralGets++
      if (pool.isShared) pool.touched(object, client.id)
      else pool.pages--
    }
    return 1
  }

  #missed(pool: XenPool): number {
    if (pool.census().pages === 0) return -Errno.EEMPTY
    pool.counters.gt++
    return 0
  }

  #getFrame(domain: Domain, client: Client, pool: XenPool, object: ObjectId, index: number, number: number): Answer {
    const frame = domain.memory.frame(number)
    if (frame === undefined) {
      if (!this.#holds(pool, object, index)) return this.#missed(pool)
      this.counters.Cf++
      return -Errno.EFAULT
    }
    if (object === invalidObject) return this.#missed(pool)
    const outcome = pool.pool.get(object, index, frame)
    if (outcome !== GetOutcome.Deferred) return this.#got(client, pool, object, outcome)
    return this.#fetchFrame(domain, client, pool, object, index, number)
  }

  /** Meanwhile the guest may change what its frames stand for, or die: the page comes to a page of ours first. */
  async #fetchFrame(
    domain: Domain,
    client: Client,
    pool: XenPool,
    object: ObjectId,
    index: number,
    number: number,
  ): Promise<number> {
    const page = new Uint8Array(pageBytes)
    const answer = await this.get(client, pool, object, index, page)
    if (answer !== 1 || domain.isDying) return answer
    const frame = domain.memory.frame(number)
    if (frame === undefined) {
      this.counters.Cf++
      return -Errno.EFAULT
    }
    frame.set(page)
    return 1
  }

  #readPart(domain: Domain, client: Client, pool: XenPool, object: ObjectId, index: number, part: Part): Answer {
    if (!isWithin(part)) return -Errno.EFAULT
    if (domain.memory.frame(part.frame) === undefined)
      return this.#holds(pool, object, index) ? -Errno.EFAULT : this.#missed(pool)
    const page = new Uint8Array(pageBytes)
    return after(this.get(client, pool, object, index, page), (answer) => {
      if (answer !== 1) return answer
      const frame = domain.memory.frame(part.frame)
      if (frame === undefined || domain.isDying) return -Errno.EFAULT
      frame.set(page.subarray(part.at, part.at + part.length), part.frameAt)
      return 1
    })
  }

  /** What is not written of a page that was not there is zero. */
  #writePart(domain: Domain, client: Client, pool: XenPool, object: ObjectId, index: number, part: Part): Answer {
    const source = domain.memory.frame(part.frame)
    if (!isWithin(part) || source === undefined) return -Errno.EFAULT
    const bytes = source.slice(part.frameAt, part.frameAt + part.length)
    const page = new Uint8Array(pageBytes)
    return after(this.get(client, pool, object, index, page), (answer) => {
      if (answer < 0 && answer !== -Errno.EEMPTY) return answer
      if (domain.isDying || !client.slots.includes(pool)) return -Errno.ENODEV
      page.set(bytes, part.at)
      return this.put(client, pool, object, index, page)
    })
  }

  /** FLUSH_PAGE: it is gone; 1, or -EFROZEN all the same. */
  flushPage(pool: XenPool, object: ObjectId, index: number): number {
    pool.counters.ft++
    if (object !== invalidObject && this.#flush(pool, object, index)) pool.counters.fs++
    return pool.owner.isFrozen ? -Errno.EFROZEN : 1
  }

  #flush(pool: XenPool, object: ObjectId, index: number): boolean {
    const before = pool.census().pages
    pool.pool.flushPage(object, index)
    const isGone = pool.census().pages < before
    if (isGone) {
      pool.pages--
      this.#invalidated(pool, object, index)
    }
    return isGone
  }

  /** FLUSH_OBJECT, as `flushPage`. */
  flushObject(pool: XenPool, object: ObjectId): number {
    pool.counters.ot++
    if (object !== invalidObject) {
      const names: number[] = []
      if (pool.owner.isMigrating && pool.isPersistent)
        pool.pool.walk!((_object, index) => names.push(index) > 0, object)
      const before = pool.census().pages
      pool.pool.flushObject(object)
      const gone = before - pool.census().pages
      pool.pages -= gone
      if (gone > 0) pool.counters.os++
      pool.lastClients.delete(object)
      for (const index of names) this.#invalidated(pool, object, index)
    }
    return pool.owner.isFrozen ? -Errno.EFROZEN : 1
  }

  /** A page that may have been sent to another machine is gone: it has to go there, too. */
  #invalidated(pool: XenPool, object: ObjectId, index: number): void {
    const { owner } = pool
    if (!owner.isMigrating || !pool.isPersistent) return
    const name: PageName = { poolId: owner.slots.indexOf(pool), object, index }
    owner.invalidations.push(name)
  }

  /** Whether there is a page of that name. */
  #holds(pool: XenPool, object: ObjectId, index: number): boolean {
    if (object === invalidObject) return false
    if (pool.pool.whereIs?.(object, index, this.#where) === true) return true
    // Plain memory alone does not say where a page is.
    let isThere = false
    pool.pool.walk!((_object, other) => {
      isThere = other === index
      return !isThere
    }, object)
    return isThere
  }

  // ---- Memory -----------------------------------------------------------------------------------------------------

  /** Sees to it that 1 MiB is free; false: it is not, and the release refuses the put then. */
  #hasRoom(client: Client, freeBytes: () => number): boolean {
    for (let failed = 0; freeBytes() < reserveBytes; )
      if (this.evict(client) === 0 && ++failed === giveUpAfter) {
        this.counters.Lm++
        return !this.isSince('4.4')
      }
    return true
  }

  /**
   * Evicts the ephemeral page that came first: the client's own where it has more than its share, else of all. The
   * bytes that its block had; 0: there is none.
   */
  evict(client?: Client): number {
    this.counters.Ea++
    const own = client !== undefined && this.isOverQuota(client) ? client.id : undefined
    const bytes = this.store.evict?.(own) ?? 0
    if (bytes > 0) this.counters.Et++
    return bytes
  }

  /**
   * Whether a client has more of the ephemeral pages than of the weight; never where either is 0. The test of the
   * original is the wrong way round.
   */
  isOverQuota(client: Client): boolean {
    let total = 0
    let own = 0
    let weights = 0
    for (const other of this.clients.values()) {
      const pages = ephemeralPages(other)
      total += pages
      weights += other.weight
      if (other === client) own = pages
    }
    if (own === 0 || weights === 0 || client.weight === 0) return false
    const share = Math.trunc((total * 100) / own)
    const weight = Math.trunc((weights * 100) / client.weight)
    return this.isOriginal ? share > weight : share < weight
  }

  /**
   * The host's page allocator asks for 2^order pages: whether it gets them. Only single pages are given: from what
   * evictions left, else by evicting, at most ten times.
   */
  relinquish(order: number): boolean {
    const { counters } = this
    if (this.freed < pageBytes && (this.store.ephemeralBytes?.() ?? 0) === 0) return false
    counters.Ra++
    if (order > 0) return false
    let evictions = 0
    while (this.freed < pageBytes && evictions < giveUpAfter) {
      const bytes = this.evict()
      if (bytes === 0) break
      evictions++
      this.freed += bytes
    }
    counters.Rx = Math.max(counters.Rx, evictions)
    if (this.freed < pageBytes) return false
    this.freed -= pageBytes
    counters.Rt++
    return true
  }

  /** Bytes that could be had back from tmem. */
  get freeableBytes(): number {
    return this.freed + (this.store.ephemeralBytes?.() ?? 0)
  }

  /** Evicts until `bytes` are free, and gives all of that back: how many bytes, whole pages. */
  giveBack(bytes: number): number {
    while (this.freed < bytes) {
      const freed = this.evict()
      if (freed === 0) break
      this.freed += freed
    }
    const given = Math.floor(this.freed / pageBytes) * pageBytes
    this.freed -= given
    return given
  }
}

/** Room for a call of that width. */
function scratchOf(release: Release, bits: Bits): CallScratch {
  const layouts = operationLayouts(release, bits)
  const { bytes, fields } = layouts.gen
  const buffer = new ArrayBuffer(bytes)
  return {
    length: bytes,
    oid: fields.oid.at / 4,
    isNarrow: fields.oid.count === undefined,
    index: fields.index.at / 4,
    cmfn: fields.cmfn.at / 4,
    isWide: fields.cmfn.bytes === 8,
    words: new Uint32Array(buffer),
    bytes: new Uint8Array(buffer),
    view: new DataView(buffer),
    layouts,
  }
}

/** The object id whose words begin at `at`; each of them is read once. */
function objectOf(scratch: CallScratch, words: Uint32Array, at: number): ObjectId | typeof invalidObject {
  const first = words[at]!
  const second = words[at + 1]!
  if (scratch.isNarrow && second === 0) return first
  const copy = scratch.words
  const { oid } = scratch
  if (!scratch.isNarrow) {
    const third = words[at + 2]!
    const fourth = words[at + 3]!
    const fifth = words[at + 4]!
    const sixth = words[at + 5]!
    if ((second | third | fourth | fifth | sixth) === 0) return first
    copy[oid + 2] = third
    copy[oid + 3] = fourth
    copy[oid + 4] = fifth
    copy[oid + 5] = sixth
  }
  copy[oid] = first
  copy[oid + 1] = second
  return readObject(scratch.view, scratch.layouts.gen.fields.oid)
}

/** A part of a page, and of a frame. */
interface Part {
  readonly frame: number
  readonly at: number
  readonly frameAt: number
  readonly length: number
}

const isWithin = ({ at, frameAt, length }: Part): boolean => at + length <= pageBytes && frameAt + length <= pageBytes

/** Goes on with an answer, at once where it is there. */
function after(answer: Answer, then: (answer: number) => Answer): Answer {
  return typeof answer === 'number' ? then(answer) : answer.then(then)
}

/** A buffer of control in the memory of a guest. */
function guestBuffer(memory: GuestMemory, address: number): ControlBuffer {
  return {
    read: (at, into) => memory.read(address + at, into),
    write: (at, from) => memory.write(address + at, from),
  }
}
