/** A pool of a zcache: checks arguments, decides what goes on to the pool below; the store does the rest. */
import type { Account, Borrower, LayerContext, ObjectId, PageBatch, Pool, PoolAttributes } from '@tmem/core'
import { assertBatch, assertIndex, assertPage, GetOutcome, Pending, PoolRefusal, PutOutcome } from '@tmem/core'
import type { Zcache } from './zcache.ts'

/** Queues of the table of handles: pages that may vanish, and pages that may not. */
export const EPHEMERAL = 0
export const PERSISTENT = 1
/** Persistent pages whose bytes are in the file. */
export const ON_FILE = 2

export class ZcachePool implements Pool {
  readonly attributes: PoolAttributes
  readonly pageSize: number
  readonly number: number
  /** Queue of its pages: `PERSISTENT` or `EPHEMERAL`. */
  readonly queue: 0 | 1
  frozen = false
  /** The pool of the layer below. */
  readonly next: Pool | undefined
  readonly #store: Zcache
  readonly #account: Account | undefined
  #gone = false

  constructor(
    store: Zcache,
    number: number,
    attributes: PoolAttributes,
    next: Pool | undefined,
    context: LayerContext,
  ) {
    this.attributes = attributes
    this.pageSize = attributes.pageSize
    this.number = number
    this.queue = attributes.persistent ? PERSISTENT : EPHEMERAL
    this.next = next
    this.#store = store
    // Ephemeral pages are the host's: they can be taken away at any time.
    this.#account = attributes.persistent ? context.accounts.of(attributes.client) : undefined
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.pageSize)
    assertIndex(index, this.pageSize)
    const outcome = this.#put(object, index, page, 0)
    if (this.next === undefined || this.#gone) return outcome
    if (outcome !== PutOutcome.Stored) return this.next.put(object, index, page)
    this.next.flushPage(object, index)
    return outcome
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.pageSize)
    assertIndex(index, this.pageSize)
    if (this.#gone) return GetOutcome.Miss
    const outcome = this.#store.get(this, object, index, into, 0)
    if (outcome !== GetOutcome.Miss || this.next === undefined) return outcome
    return this.next.get(object, index, into)
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    assertPage(into, this.pageSize)
    assertIndex(index, this.pageSize)
    for (;;) {
      const here = await this.#fetchHere(object, index, into)
      if (here === GetOutcome.Hit || this.#gone || this.next === undefined) return here
      const below = await this.next.fetch(object, index, into)
      // It may have come up to here while the layer below was waiting.
      if (below !== GetOutcome.Miss || this.#gone || !this.#store.has(this, object, index)) return below
    }
  }

  flushPage(object: ObjectId, index: number): void {
    assertIndex(index, this.pageSize)
    if (this.#gone) return
    this.#store.flushPage(this, object, index)
    this.next?.flushPage(object, index)
  }

  flushObject(object: ObjectId): void {
    if (this.#gone) return
    this.#store.flushObject(this, object)
    this.next?.flushObject(object)
  }

  putMany(batch: PageBatch): number {
    assertBatch(batch, this.pageSize)
    const { objects, indexes, offsets, outcomes, bytes, length } = batch
    for (let i = 0; i < length; i++) {
      if (outcomes[i] === PutOutcome.Stored) {
        if (!this.#gone) this.#store.flushPage(this, objects[i]!, indexes[i]!)
      } else if (outcomes[i] === Pending) {
        const outcome = this.#put(objects[i]!, indexes[i]!, bytes, offsets[i]!)
        if (outcome === PutOutcome.Stored || this.next === undefined || this.#gone) outcomes[i] = outcome
      }
    }
    if (this.next !== undefined && !this.#gone) return this.next.putMany(batch)
    return count(batch, PutOutcome.Stored)
  }

  getMany(batch: PageBatch): number {
    assertBatch(batch, this.pageSize)
    const { objects, indexes, offsets, outcomes, bytes, length } = batch
    for (let i = 0; i < length; i++) {
      if (outcomes[i] !== Pending) continue
      const outcome = this.#gone ? GetOutcome.Miss : this.#store.get(this, objects[i]!, indexes[i]!, bytes, offsets[i]!)
      if (outcome !== GetOutcome.Miss || this.#gone || this.next === undefined) outcomes[i] = outcome
    }
    if (this.next !== undefined && !this.#gone) return this.next.getMany(batch)
    return count(batch, GetOutcome.Hit)
  }

  flushMany(batch: PageBatch): void {
    assertBatch(batch, this.pageSize)
    if (this.#gone) return
    for (let i = 0; i < batch.length; i++) this.#store.flushPage(this, batch.objects[i]!, batch.indexes[i]!)
    this.next?.flushMany(batch)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    assertIndex(index, this.pageSize)
    if (this.#gone) return GetOutcome.Miss
    const outcome = this.#store.lend(this, object, index, use)
    if (outcome !== GetOutcome.Miss || this.next === undefined) return outcome
    return this.next.lend(object, index, use)
  }

  /** Pages are compressed as a whole: there is no cheap view of their parts. */
  split(): PoolRefusal {
    return this.#gone ? PoolRefusal.Closed : PoolRefusal.Unsupported
  }

  freeze(): void {
    this.frozen = true
    if (!this.#gone) this.next?.freeze()
  }

  thaw(): void {
    this.frozen = false
    if (!this.#gone) this.next?.thaw()
  }

  destroy(): void {
    if (this.#gone) return
    this.retire()
    this.next?.destroy()
  }

  /** Removes the pages here and ends the pool, but not the one below. */
  retire(): void {
    this.#gone = true
    this.#store.forget(this)
  }

  /** Charges the owner; always true for an ephemeral pool. */
  charge(bytes: number): boolean {
    return this.#account === undefined || this.#account.charge(bytes)
  }

  /** Takes a charge back. */
  giveBack(bytes: number): void {
    this.#account?.release(bytes)
  }

  /** A get that waits for this layer's file. */
  async #fetchHere(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    while (!this.#gone) {
      const outcome = this.#store.get(this, object, index, into, 0)
      if (outcome !== GetOutcome.Deferred || (await this.#store.fetch(this, object, index, into)))
        return outcome === GetOutcome.Deferred ? GetOutcome.Hit : outcome
    }
    return GetOutcome.Miss
  }

  #put(object: ObjectId, index: number, bytes: Uint8Array, at: number): PutOutcome {
    if (this.#gone) return PutOutcome.PoolGone
    // Room and memory first, while nothing is half done: whoever gives them may have to use this very store for it.
    this.#store.makeRoom(this, object)
    this.#store.preload(this)
    return this.#gone ? PutOutcome.PoolGone : this.#store.put(this, object, index, bytes, at)
  }
}

/** Entries of a batch with that outcome. */
function count(batch: PageBatch, outcome: number): number {
  let entries = 0
  for (let i = 0; i < batch.length; i++) if (batch.outcomes[i] === outcome) entries++
  return entries
}
