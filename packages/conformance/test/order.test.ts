/** Which pages stay in memory: a stack beside an LRU that has room for as many pages, over the same references. */
import { setImmediate } from 'node:timers/promises'
import { compose, GetOutcome, type PageStore, type Pool, PutOutcome } from '@tmem/core'
import { slowMemory } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'
import { countersOf, MiB } from './subjects.ts'

const pages = 1024
const limitBytes = 2 * MiB

/** Numbers below `count`, the same in every run. */
function below(): (count: number) => number {
  let state = 12_345
  return (count) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return Math.floor((state / 2 ** 32) * count)
  }
}

class Machine {
  readonly store: PageStore
  readonly #pool: Pool
  readonly #page = new Uint8Array(4096)
  readonly #resident: number
  readonly #lru = new Map<number, true>()
  #references = 0
  reads = 0
  lruReads = 0

  /** @param places memory places that share the limit */
  constructor(places: number = 1) {
    const upper = Array.from({ length: places }, () => memory({ limitBytes: limitBytes / places }))
    this.store = compose([...upper, slowMemory({ sizeBytes: 8 * MiB })])
    const pool = this.store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') throw new Error(`refused: ${pool}`)
    this.#pool = pool
    for (let page = 0; page < pages; page++) {
      for (let at = 0; at < 4096; at++) this.#page[at] = at * (page + 3)
      if (pool.put(1, page, this.#page) !== PutOutcome.Stored) throw new Error(`no room for ${page}`)
    }
    this.#resident = countersOf(this.store, 'memory').reduce((sum, { pages: own }) => sum + own!, 0)
    for (let page = pages - this.#resident; page < pages; page++) this.#lru.set(page, true)
  }

  /** Pages that came back soon after they had sunk. */
  get refaults(): number {
    return countersOf(this.store, 'order').reduce(
      (sum, one) => sum + one['refaults_main']! + one['refaults_probation']!,
      0,
    )
  }

  async use(page: number): Promise<void> {
    if (!this.#lru.delete(page)) {
      this.lruReads++
      this.#lru.delete(this.#lru.keys().next().value!)
    }
    this.#lru.set(page, true)
    const outcome = this.#pool.get(1, page, this.#page)
    if (outcome === GetOutcome.Deferred) this.reads++
    const hit = outcome === GetOutcome.Deferred ? await this.#pool.fetch(1, page, this.#page) : outcome
    if (hit !== GetOutcome.Hit) throw new Error(`page ${page} is missing`)
    if (++this.#references % 16 === 0) this.store.tick({ pages: 32 })
  }
}

async function run(references: number, next: (n: number) => number): Promise<Machine> {
  const machine = new Machine()
  for (let n = 0; n < references; n++) await machine.use(next(n))
  await machine.store.close()
  return machine
}

describe('against an LRU', () => {
  test('a scan leaves what is in use alone', async () => {
    const random = below()
    let scanned = 0
    const { reads, lruReads } = await run(20_000, () =>
      random(10) < 6 ? random(300) : 300 + (scanned++ % (pages - 300)),
    )
    // Second chance alone comes to 0.9.
    expect(reads).toBeLessThan(0.85 * lruReads)
  })

  test('a loop larger than memory finds some of its pages', async () => {
    const { reads, lruReads } = await run(20_000, (n) => n % 700)
    expect(lruReads).toBeGreaterThan(19_000)
    expect(reads).toBeLessThan(0.95 * lruReads)
  })

  // How long ago a page sank is counted alike in all memory places: it may have gone through several.
  test.each([1, 2])('pages that nobody used for long are in memory soon again, in %i places', async (places) => {
    const random = below()
    const machine = new Machine(places)
    for (let n = 0; n < 8000; n++) await machine.use(random(300))
    for (let n = 0; n < 2000; n++) await machine.use(300 + (n % (pages - 300)))
    const { reads, lruReads, refaults } = machine
    const references = 8000
    for (let n = 0; n < references; n++) await machine.use(50 + random(400))
    expect(machine.reads - reads).toBeLessThan(1.05 * (machine.lruReads - lruReads) + 0.01 * references)
    expect(machine.refaults - refaults).toBeGreaterThan(50)
    await machine.store.close()
  })
})

test('ephemeral pages that sink say nothing of the queues of persistent ones', async () => {
  const store = compose([memory({ limitBytes }), slowMemory({ sizeBytes: 8 * MiB, ephemeral: true })])
  const pool = store.newPool({ client: 0, persistent: false, shared: true, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error(`refused: ${pool}`)
  const share = (): number => countersOf(store, 'order')[0]!['probation_share_percent']!
  const before = share()
  for (let page = 0; page < pages; page++) {
    pool.put(
      1,
      page,
      Uint8Array.from({ length: 4096 }, (_, at) => at * (page + 3)),
    )
    store.tick({ pages: 16 })
    await setImmediate()
  }
  expect(countersOf(store, 'moves')[1]!['sunk_in']).toBeGreaterThan(pages / 4)
  expect(share()).toBe(before)
  await store.close()
})
