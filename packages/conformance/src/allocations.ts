/**
 * Every allocation fails once.
 *
 * The same work is done again and again on a newly opened stack: first with all the memory it wants, then once for each
 * allocation with that one refused, then once for each site with all of its allocations refused. Each time either
 * the stack does not open (`TMEM_NO_MEMORY`, and everything was given back), or the work is done and no byte is
 * lost: what the stack refused took the regular way.
 */
import {
  checkOptions,
  GetOutcome,
  type LayerContext,
  type ObjectId,
  PageBatch,
  type PageStore,
  Pending,
  type Pool,
  PutOutcome,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { type FailurePlan, failingAllocator } from '@tmem/faults'
import { keepsKind, kinds, Ledger } from './harness.ts'
import { expect, expectSame, makePage, type PageKind } from './pages.ts'

/** What a workload did. */
export interface WorkloadResult {
  /** Pages that the stack took. */
  readonly stored: number
  /** Pages that took the regular way, because the stack refused them. */
  readonly regular: number
}

/** Work on an open stack that checks every byte and throws when one is wrong or lost. It need not close the stack. */
export type Workload = (store: PageStore) => Promise<WorkloadResult>

/** What `everyAllocation` saw. */
export interface AllocationReport {
  /** Allocations by site in the run in which none failed. */
  readonly sites: ReadonlyMap<string, number>
  /** Runs with a failure. */
  readonly runs: number
  /** Runs in which the stack did not open. */
  readonly notOpened: number
  /** Runs in which more pages took the regular way than without a failure. */
  readonly fellBack: number
}

/** Settings of `everyAllocation`. */
export interface EveryAllocationOptions {
  /** Called after each run; throws when something was left open (files, sockets). */
  readonly afterRun?: () => void | Promise<void>
}

/**
 * Runs `workload` once for every allocation that it makes, and once for every site, with that one failing.
 *
 * Throws `ConformanceError` when a byte is lost, and when there was no allocation to fail.
 *
 * @param open opens the stack with the given memory and accounts
 * @param workload what is done (default: `regularWay`)
 */
export async function everyAllocation(
  open: (context: LayerContext) => PageStore | Promise<PageStore>,
  workload: Workload = regularWay,
  options: EveryAllocationOptions = {},
): Promise<AllocationReport> {
  checkOptions('everyAllocation', options, { afterRun: 'function?' })
  const run = async (plan: FailurePlan): Promise<Run> => {
    const result = await runOnce(open, workload, plan)
    await options.afterRun?.()
    return result
  }
  const whole = await run('none')
  expect(whole.result !== undefined, 'the stack does not open with all the memory that it wants')
  expect(
    whole.sites.size > 0,
    'nothing was allocated: the stack does not use the allocator that it is given, so no allocation can fail',
  )
  let notOpened = 0
  let fellBack = 0
  let runs = 0
  const note = ({ result }: Run): void => {
    runs++
    if (result === undefined) notOpened++
    else if (result.regular > whole.result!.regular) fellBack++
  }
  // The number of allocations may change once one has failed: the end is where none is left to fail.
  for (let nth = 1; ; nth++) {
    const failing = await run({ nth })
    if (failing.failures === 0) break
    note(failing)
  }
  for (const site of whole.sites.keys()) {
    const failing = await run({ sites: [site] })
    expect(failing.failures > 0, `nothing was allocated at ${site} this time: the stack is not deterministic`)
    note(failing)
  }
  return { sites: whole.sites, runs, notOpened, fellBack }
}

interface Run {
  /** `undefined` when the stack did not open. */
  readonly result: WorkloadResult | undefined
  readonly failures: number
  readonly sites: ReadonlyMap<string, number>
}

async function runOnce(
  open: (context: LayerContext) => PageStore | Promise<PageStore>,
  workload: Workload,
  plan: FailurePlan,
): Promise<Run> {
  const allocator = failingAllocator(systemAllocator, plan)
  const accounts = new Ledger()
  let store: PageStore | undefined
  try {
    store = await open({ allocator, accounts })
  } catch (error) {
    if (!(error instanceof TmemError && error.code === 'TMEM_NO_MEMORY' && allocator.failures > 0)) throw error
  }
  const result = store === undefined ? undefined : await workload(store)
  await store?.close()
  accounts.expectSettled(`with ${JSON.stringify(plan)}, after close`)
  return { result, failures: allocator.failures, sites: allocator.sites }
}

/** Pages in each pool of the workload. */
const workloadPages = 48

/**
 * A workload that is to a stack what a swapper and a page cache are: pages go in one by one and in batches, are
 * replaced, flushed and read back; what the stack refuses is kept on the regular way (here a `Map`, in life the swap
 * file); what it forgets, where it may, is made again. Throws when a byte is wrong or lost.
 */
export async function regularWay(store: PageStore): Promise<WorkloadResult> {
  let stored = 0
  let regular = 0
  const { capabilities: can } = store
  const pageSizes = new Set([can.minPageSize, Math.min(can.maxPageSize, 4 * can.minPageSize)])
  for (const kind of kinds)
    for (const pageSize of pageSizes) {
      if (!keepsKind(can, kind)) continue
      const { persistent, shared } = kind
      const pool = store.newPool({ client: 1, persistent, shared, pageSize })
      // No pool for want of memory: every page takes the regular way from the start.
      if (typeof pool === 'number') {
        regular += workloadPages
        continue
      }
      const customer = new Customer(pool)
      await customer.work(store)
      pool.destroy()
      stored += customer.stored
      regular += customer.regular
    }
  return { stored, regular }
}

/** Somebody who puts pages and always has the regular way. */
class Customer {
  stored = 0
  regular = 0
  readonly #pool: Pool
  readonly #size: number
  /** The regular way: what the pool refused. */
  readonly #regularWay = new Map<string, Uint8Array>()
  /** What every page must contain: kind and seed. */
  readonly #wanted = new Map<string, readonly [object: ObjectId, index: number, kind: PageKind, seed: number]>()

  constructor(pool: Pool) {
    this.#pool = pool
    this.#size = pool.attributes.pageSize
  }

  #note(object: ObjectId, index: number, kind: PageKind, seed: number, outcome: number): void {
    const name = `${object}/${index}`
    this.#wanted.set(name, [object, index, kind, seed])
    this.#regularWay.delete(name)
    if (outcome === PutOutcome.Stored) this.stored++
    else {
      this.regular++
      this.#regularWay.set(name, makePage(kind, seed, this.#size))
    }
  }

  #put(object: ObjectId, index: number, kind: PageKind, seed: number): void {
    this.#note(object, index, kind, seed, this.#pool.put(object, index, makePage(kind, seed, this.#size)))
  }

  async work(store: PageStore): Promise<void> {
    const kindOf = (i: number): PageKind => (['text', 'noise', 'word', 'text', 'zero'] as const)[i % 5]!
    for (let i = 0; i < workloadPages / 2; i++) this.#put(i >> 3, i & 7, kindOf(i), i)
    store.tick({ pages: 8 })
    const batch = new PageBatch(workloadPages / 2, this.#size)
    for (let i = 0; i < batch.capacity; i++)
      batch.bytes.set(makePage(kindOf(i), 100 + i, this.#size), batch.offsets[batch.push(2n ** 70n, i)]!)
    this.#pool.putMany(batch)
    for (let i = 0; i < batch.length; i++) this.#note(2n ** 70n, i, kindOf(i), 100 + i, batch.outcomes[i]!)
    // Replace some by pages of another kind, flush some: one by one, an object, in a batch.
    for (let i = 0; i < workloadPages / 2; i += 3) this.#put(i >> 3, i & 7, kindOf(i + 1), 200 + i)
    this.#pool.flushPage(0, 1)
    this.#wanted.delete('0/1')
    this.#pool.flushObject(1)
    for (let i = 0; i < 8; i++) this.#wanted.delete(`1/${i}`)
    store.tick({ pages: 64 })
    const gone: readonly (readonly [ObjectId, number])[] = [
      [0, 1],
      [1, 0],
      [1, 7],
    ]
    for (const [object, index] of gone)
      expect((await this.#get(object, index)) === undefined, `page ${object}/${index} was flushed and is there`)
    for (const [object, index, kind, seed] of this.#wanted.values()) await this.#check(object, index, kind, seed)
    // Once more in a batch, where the pages are still there.
    if (this.#pool.attributes.persistent) await this.#checkBatch(batch)
  }

  async #get(object: ObjectId, index: number): Promise<Uint8Array | undefined> {
    const into = new Uint8Array(this.#size)
    let outcome = this.#pool.get(object, index, into)
    if (outcome === GetOutcome.Deferred) outcome = await this.#pool.fetch(object, index, into)
    return outcome === GetOutcome.Hit ? into : undefined
  }

  async #check(object: ObjectId, index: number, kind: PageKind, seed: number): Promise<void> {
    this.#compare(object, index, kind, seed, await this.#get(object, index))
  }

  #compare(object: ObjectId, index: number, kind: PageKind, seed: number, page: Uint8Array | undefined): void {
    const name = `page ${object}/${index}`
    const regular = this.#regularWay.get(`${object}/${index}`)
    const wanted = makePage(kind, seed, this.#size)
    if (regular !== undefined) {
      expect(page === undefined, `${name} is there after a refused put`)
      expectSame(regular, wanted, `${name} on the regular way`)
    } else if (page !== undefined) expectSame(page, wanted, name)
    else expect(!this.#pool.attributes.persistent, `${name} is lost`)
  }

  async #checkBatch(batch: PageBatch): Promise<void> {
    batch.rearm()
    this.#pool.getMany(batch)
    for (let i = 0; i < batch.length; i++) {
      const into = batch.bytes.slice(i * this.#size, (i + 1) * this.#size)
      let outcome = batch.outcomes[i]!
      expect(outcome !== Pending, `getMany left entry ${i} pending`)
      if (outcome === GetOutcome.Deferred) outcome = await this.#pool.fetch(batch.objects[i]!, batch.indexes[i]!, into)
      const [object, index, kind, seed] = this.#wanted.get(`${batch.objects[i]}/${batch.indexes[i]}`)!
      this.#compare(object, index, kind, seed, outcome === GetOutcome.Hit ? into : undefined)
    }
  }
}
