/**
 * A hypervisor as a page store of a guest: our own front ends, `Frontswap` of @tmem/frontswap among them, run over it
 * through raw hypercalls, and keep their pages in whatever the host composes.
 *
 * A pool is a pool of the guest's domain, a handle is the handle of the hypercall. Pages have 4 KiB. A domain has 16
 * pools in all, of which a `LinuxGuest` of the same domain may have some; whatever client a pool is made for, its pages
 * are the domain's. Shared pools are not kept: they have a uuid, for which this interface has no word (cleancache has;
 * see `linuxCleancache`).
 *
 * Invariants: after a refused put the handle has no page, whatever the host answered. A page that the host has and
 * cannot return is an error and never a miss, because a swapper would then take its stale slot for the page.
 *
 * DEVIATION: while 14 gets wait for the host, a get of a missing page is also answered `Deferred`.
 *
 * DEVIATION: the interface freezes whole domains, and only a toolstack may. `Pool.freeze` is a feature of the guest:
 * while frozen, a put first checks with a get whether there is a page to replace. If the host has to wait, that get may
 * take the new page out of a private ephemeral pool.
 */
import {
  assertBatch,
  assertEntries,
  assertIndex,
  assertObject,
  assertPage,
  type Borrower,
  basePageSize,
  type Capabilities,
  checkedAttributes,
  GetOutcome,
  idle,
  type ObjectId,
  type PageBatch,
  type PageStore,
  Pending,
  type Pool,
  type PoolAttributes,
  PoolRefusal,
  type Progress,
  PutOutcome,
  type StatsNode,
  TmemError,
  untilAborted,
} from '@tmem/core'
import { Errno, PoolBit, pageBytes } from './abi.ts'
import { GuestCalls } from './calls.ts'
import type { Domain } from './clients.ts'
import type { XenHost } from './host.ts'

const capabilities: Capabilities = Object.freeze({
  ephemeral: true,
  persistent: true,
  shared: false,
  minPageSize: basePageSize,
  maxPageSize: basePageSize,
  deferred: true,
  split: false,
  reservedBytes: 0,
})

const zeroCounters = { puts: 0, succ_puts: 0, gets: 0, succ_gets: 0, flushed_pages: 0, flushed_objects: 0 }

/** Gets that can be under way at once. */
const gets = 14

export class HypercallStore implements PageStore {
  /** Frames that a store needs. */
  static readonly frames: number = 2 + gets
  readonly name = 'xen'
  readonly capabilities: Capabilities = capabilities
  readonly #calls: GuestCalls
  readonly #counters = { ...zeroCounters }
  readonly #pools = new Set<HypercallPool>()
  #isClosed = false

  /**
   * `firstFrame`: the first of `HypercallStore.frames` frames of the guest, one after the other, that nobody else uses.
   * Throws `RangeError` when they are not there.
   */
  constructor(host: XenHost, domain: Domain, firstFrame: number) {
    this.#calls = new GuestCalls(host, domain, firstFrame, gets)
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const checked = checkedAttributes(attributes)
    if (this.#isClosed) return PoolRefusal.Closed
    if (checked.shared) return checked.persistent ? PoolRefusal.SharedPersistent : PoolRefusal.Unsupported
    if (checked.pageSize !== basePageSize) return PoolRefusal.BadPageSize
    const id = this.#calls.newPool(checked.persistent ? PoolBit.Persistent : 0, undefined, basePageSize)
    if (id === -Errno.ENOMEM) return PoolRefusal.NoMemory
    if (id < 0) return PoolRefusal.NoSlot
    const pool = new HypercallPool(this.#calls, this.#counters, id, checked, () => this.#pools.delete(pool))
    this.#pools.add(pool)
    return pool
  }

  tick(): Progress {
    return idle
  }

  /** What the guest has asked for; the host counts what it has done (LIST). */
  stats(): StatsNode {
    return { name: this.name, counters: { ...this.#counters, pools: this.#pools.size }, children: [] }
  }

  /** Destroys the pools. Host and domain stay. */
  async close(): Promise<void> {
    this.#isClosed = true
    for (const pool of this.#pools) pool.destroy()
  }
}

class HypercallPool implements Pool {
  readonly attributes: PoolAttributes
  readonly #calls: GuestCalls
  readonly #counters: typeof zeroCounters
  readonly #id: number
  readonly #onDestroy: () => void
  /** A page of the pool's own, while nobody has it. */
  #spare: Uint8Array | undefined = new Uint8Array(pageBytes)
  #isFrozen = false
  #isGone = false

  constructor(
    calls: GuestCalls,
    counters: typeof zeroCounters,
    id: number,
    attributes: PoolAttributes,
    onDestroy: () => void,
  ) {
    this.attributes = attributes
    this.#calls = calls
    this.#counters = counters
    this.#id = id
    this.#onDestroy = onDestroy
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, pageBytes)
    assertHandle(object, index)
    this.#counters.puts++
    if (this.#isGone) return PutOutcome.PoolGone
    const isRefused = this.#isFrozen && !this.#isThere(object, index)
    const outcome = isRefused ? PutOutcome.Frozen : putOutcomeOf(this.#calls.put(this.#id, object, index, page))
    if (outcome === PutOutcome.Stored) this.#counters.succ_puts++
    // With the original's defects, or for a frame or a permit that it lacks, a host leaves the older page.
    else this.#calls.flushPage(this.#id, object, index)
    return outcome
  }

  /** Asked by a get, which takes the page out of a private ephemeral pool: whoever asks replaces it. */
  #isThere(object: ObjectId, index: number): boolean {
    return this.#borrow((page) => {
      const answer = this.#calls.get(this.#id, object, index, page)
      return answer === undefined ? this.#calls.isUnderWay(this.#id, object, index) : answer === 1
    })
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, pageBytes)
    assertHandle(object, index)
    this.#counters.gets++
    if (this.#isGone) return GetOutcome.Miss
    const answer = this.#calls.get(this.#id, object, index, into)
    return answer === undefined ? GetOutcome.Deferred : this.#got(answer, object, index)
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array, signal?: AbortSignal): Promise<GetOutcome> {
    assertPage(into, pageBytes)
    assertHandle(object, index)
    this.#counters.gets++
    if (this.#isGone) return GetOutcome.Miss
    signal?.throwIfAborted()
    if (signal === undefined) return this.#got(await this.#calls.fetch(this.#id, object, index, into), object, index)
    // What comes after the end of the wait must not touch the caller's buffer.
    const page = new Uint8Array(pageBytes)
    const answer = await untilAborted(this.#calls.fetch(this.#id, object, index, page), signal)
    if (answer === 1) into.set(page)
    return this.#got(answer, object, index)
  }

  #got(answer: number, object: ObjectId, index: number): GetOutcome {
    switch (answer) {
      case 1:
        this.#counters.succ_gets++
        return GetOutcome.Hit
      case 0:
      case -Errno.EEMPTY:
      case -Errno.ENODEV:
        return GetOutcome.Miss
      default:
        throw new TmemError('TMEM_IO', `the host has the page and cannot give it: GET_PAGE was answered ${answer}`, {
          layer: 'xen',
          handle: `pool ${this.#id} object ${object} index ${index}`,
        })
    }
  }

  flushPage(object: ObjectId, index: number): void {
    assertHandle(object, index)
    if (this.#isGone) return
    this.#counters.flushed_pages++
    this.#calls.flushPage(this.#id, object, index)
  }

  flushObject(object: ObjectId): void {
    assertObject(object)
    if (this.#isGone) return
    this.#counters.flushed_objects++
    this.#calls.flushObject(this.#id, object)
  }

  /** The interface has no batches: a call for each page. */
  putMany(batch: PageBatch): number {
    assertPages(batch)
    const { objects, indexes, outcomes, length } = batch
    let stored = 0
    for (let n = 0; n < length; n++) {
      if (outcomes[n] === Pending) outcomes[n] = this.put(objects[n]!, indexes[n]!, batch.page(n))
      // A layer above has taken it: then it is not here any more.
      else if (outcomes[n] === PutOutcome.Stored) this.flushPage(objects[n]!, indexes[n]!)
      if (outcomes[n] === PutOutcome.Stored) stored++
    }
    return stored
  }

  getMany(batch: PageBatch): number {
    assertPages(batch)
    const { objects, indexes, outcomes, length } = batch
    let hits = 0
    for (let n = 0; n < length; n++) {
      if (outcomes[n] === Pending) outcomes[n] = this.get(objects[n]!, indexes[n]!, batch.page(n))
      if (outcomes[n] === GetOutcome.Hit) hits++
    }
    return hits
  }

  flushMany(batch: PageBatch): void {
    assertPages(batch)
    for (let n = 0; n < batch.length; n++) this.flushPage(batch.objects[n]!, batch.indexes[n]!)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    return this.#borrow((page) => {
      const outcome = this.get(object, index, page)
      if (outcome === GetOutcome.Hit) use(page, 0, pageBytes)
      return outcome
    })
  }

  /** A page of the pool's own; whoever comes meanwhile gets another one. */
  #borrow<T>(use: (page: Uint8Array) => T): T {
    const page = this.#spare ?? new Uint8Array(pageBytes)
    this.#spare = undefined
    try {
      return use(page)
    } finally {
      this.#spare = page
    }
  }

  /** Pages are 4 KiB already. */
  split(): PoolRefusal {
    return this.#isGone ? PoolRefusal.Closed : PoolRefusal.Unsupported
  }

  freeze(): void {
    this.#isFrozen = true
  }

  thaw(): void {
    this.#isFrozen = false
  }

  destroy(): void {
    if (this.#isGone) return
    this.#isGone = true
    this.#calls.destroyPool(this.#id)
    this.#onDestroy()
  }
}

function assertHandle(object: ObjectId, index: number): void {
  assertObject(object)
  assertIndex(index, pageBytes)
}

function assertPages(batch: PageBatch): void {
  assertBatch(batch, pageBytes)
  assertEntries(batch)
}

/** What the answer to PUT_PAGE means. */
function putOutcomeOf(answer: number): PutOutcome {
  switch (answer) {
    case 1:
      return PutOutcome.Stored
    case -Errno.EFROZEN:
      return PutOutcome.Frozen
    case -Errno.ENODEV:
      return PutOutcome.PoolGone
    case -Errno.EPERM:
      return PutOutcome.Policy
    case -Errno.EFAULT:
      return PutOutcome.Unavailable
    default:
      // -ENOMEM, and -ENOSPC, which says that the older page has gone.
      return PutOutcome.NoMemory
  }
}
