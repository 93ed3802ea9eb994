/**
 * The suite on a zcache under its governor: before every operation the host says something else about its memory, from
 * plenty to nothing at all, and the budget goes up, down and to zero while pages are there.
 */
import type {
  Borrower,
  Budget,
  GetOutcome,
  ObjectId,
  PageBatch,
  PageStore,
  Pool,
  Progress,
  PutOutcome,
} from '@tmem/core'
import { ByteLimit, compose } from '@tmem/core'
import { PassingPool, PassingStore } from '@tmem/faults'
import { Decision, Governor, zcache } from '@tmem/zcache'
import { describe, expect, it } from 'vitest'
import { conformance, type Manifest, type Subject } from '../src/index.ts'
import { countersOf, layers, MiB } from './subjects.ts'

/** What the governors of all stores have decided. */
const decided = new Map<Decision, number>()

let zeroes = 0

/** Changes the budget by readings that repeat: half a second lies between any two operations. */
class Host {
  readonly #limit: ByteLimit
  readonly #store: PageStore
  #governor: Governor | undefined
  #steps = 0

  constructor(limit: ByteLimit, store: PageStore) {
    this.#limit = limit
    this.#store = store
  }

  /** The first pool is there, and its scratch memory: without a budget there would be none. */
  begin(): void {
    this.#governor ??= new Governor({
      limit: this.#limit,
      floorBytes: 0,
      reserveBytes: MiB / 2,
      growBytesPerSecond: this.#limit.maximumBytes,
      holdMs: 1000,
    })
  }

  step(): void {
    if (this.#governor === undefined) return
    const step = this.#steps++
    const used = countersOf(this.#store, 'zcache')[0]!['used_bytes']!
    // Thirty operations with plenty, then ten in which it becomes less, down to nothing; now and then somebody waits.
    const phase = step % 40
    const availableBytes = phase < 30 ? 8 * MiB : (39 - phase) * (MiB / 8)
    const decision = this.#governor.step(step * 500, used, { availableBytes, pressurePercent: step % 97 < 5 ? 60 : 0 })
    decided.set(decision, (decided.get(decision) ?? 0) + 1)
    if (this.#limit.bytes === 0) zeroes++
    if (step % 3 === 0) this.#store.tick({ pages: 16 })
  }
}

class GovernedPool extends PassingPool {
  readonly #host: Host

  constructor(next: Pool, host: Host) {
    super(next)
    this.#host = host
  }

  over(next: Pool): Pool {
    return new GovernedPool(next, this.#host)
  }

  override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    this.#host.step()
    return super.put(object, index, page)
  }

  override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    this.#host.step()
    return super.get(object, index, into)
  }

  override fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    this.#host.step()
    return super.fetch(object, index, into)
  }

  override flushPage(object: ObjectId, index: number): void {
    this.#host.step()
    super.flushPage(object, index)
  }

  override putMany(batch: PageBatch): number {
    this.#host.step()
    return super.putMany(batch)
  }

  override getMany(batch: PageBatch): number {
    this.#host.step()
    return super.getMany(batch)
  }

  override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    this.#host.step()
    return super.lend(object, index, use)
  }
}

class GovernedStore extends PassingStore {
  readonly #host: Host

  constructor(next: PageStore, host: Host) {
    super('governed', next.capabilities, next)
    this.#host = host
  }

  wrap(pool: Pool): Pool {
    this.#host.begin()
    return new GovernedPool(pool, this.#host)
  }

  counters(): Readonly<Record<string, number>> {
    return {}
  }

  override tick(budget: Budget): Progress {
    this.#host.step()
    return super.tick(budget)
  }
}

const governed = (name: string, below: boolean, refusals: NonNullable<Manifest['refusals']>): Subject => ({
  name,
  open: (context) => {
    const limitBytes = new ByteLimit(MiB)
    const cache = zcache({ limitBytes })
    const store = compose(below ? [cache, layers.memory(8 * MiB)] : [cache], { ...context, check: 'model' })
    return new GovernedStore(store, new Host(limitBytes, store))
  },
  manifest: { steady: false, pageSizes: [4096], refusals, property: { runs: 25 } },
})

await conformance(
  governed('zcache under the governor', false, {
    NoMemory: { by: 'filling', bytes: 20 * MiB },
    Quota: { by: 'quota', bytes: MiB },
  }),
  { describe, it },
)
await conformance(
  governed('zcache under the governor, over memory', true, {
    NoMemory: { by: 'filling', bytes: 60 * MiB },
    Quota: { by: 'quota', bytes: MiB },
  }),
  { describe, it },
)

it('the governors meanwhile took every decision, and a budget of zero was among them', () => {
  const names = Object.entries(Decision).flatMap(([name, decision]) => ((decided.get(decision) ?? 0) > 0 ? [name] : []))
  expect(names.sort()).toEqual(Object.keys(Decision).sort())
  expect(zeroes).toBeGreaterThan(0)
})
