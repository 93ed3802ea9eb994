/**
 * The chain under everything that can happen to it: places that are full, fail, pack their frames or give ephemeral
 * ones up, an allocator that refuses, limits that go up and down, pages in parts, fetches that others overtake. After
 * each step the invariants of directory, mover, chain and places hold (`check`), and what the clients are charged for
 * is what is in memory.
 */
import {
  ByteLimit,
  basePageSize,
  compose,
  GetOutcome,
  type Layer,
  PageBatch,
  type PageStore,
  type Pool,
  PutOutcome,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { failingAllocator } from '@tmem/faults'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import fc from 'fast-check'
import { afterAll, describe, expect as expectEqual, test } from 'vitest'
import { Ledger, makePage, type PageKind } from '../src/index.ts'
import { expect, expectSame } from '../src/pages.ts'
import { calm, layerOf, MapPlace, mapTraits, type Outside, RestlessPlace, SlowMapPlace, slowTraits } from './places.ts'
import { countersOf, swapFolder } from './subjects.ts'

const folder = swapFolder()
afterAll(() => folder.remove())

const KiB = 1024
const map = (bytes: number): Layer => layerOf('map', mapTraits, (context) => new MapPlace(bytes, context))
const slow = (bytes: number, outside: Outside): Layer =>
  layerOf('slow', slowTraits, (context) => new SlowMapPlace(bytes, outside, context))

/** A stack, with the limits that may be changed while it is in use. */
interface Stack {
  readonly layers: readonly Layer[]
  readonly limits: readonly ByteLimit[]
}

const stacks: Readonly<Record<string, (outside: Outside) => Stack>> = {
  'map over slow': (outside) => ({ layers: [map(24 * KiB), slow(160 * KiB, outside)], limits: [] }),
  'map over a slow place that is restless': (outside) => ({
    layers: [map(24 * KiB), layerOf('slow', slowTraits, (context) => new RestlessPlace(200 * KiB, outside, context))],
    limits: [],
  }),
  'a slow place that is restless': (outside) => ({
    layers: [layerOf('slow', slowTraits, (context) => new RestlessPlace(200 * KiB, outside, context))],
    limits: [],
  }),
  'slow alone': (outside) => ({ layers: [slow(160 * KiB, outside)], limits: [] }),
  'map over map over slow over slow': (outside) => ({
    layers: [map(24 * KiB), map(24 * KiB), slow(64 * KiB, outside), slow(160 * KiB, outside)],
    limits: [],
  }),
  'zcache over slow': (outside) => {
    const limit = new ByteLimit(320 * KiB)
    return { layers: [zcache({ limitBytes: limit }), slow(640 * KiB, outside)], limits: [limit] }
  },
  'memory over zcache over frontswap': () => {
    const limits = [new ByteLimit(128 * KiB), new ByteLimit(320 * KiB)] as const
    return {
      layers: [
        memory({ limitBytes: limits[0] }),
        zcache({ limitBytes: limits[1] }),
        frontswap({ file: folder.file(), sizeBytes: 2048 * KiB }),
      ],
      limits,
    }
  },
  'frontswap alone': () => ({ layers: [frontswap({ file: folder.file(), sizeBytes: 512 * KiB })], limits: [] }),
}

const large = 2 * 64 * KiB
const kinds = [
  { persistent: true, shared: false, pageSize: basePageSize },
  { persistent: true, shared: false, pageSize: large },
  { persistent: false, shared: false, pageSize: basePageSize },
  { persistent: false, shared: true, pageSize: basePageSize },
  { persistent: false, shared: true, pageSize: large },
] as const

const contents: readonly PageKind[] = ['text', 'noise', 'text', 'noise', 'word']
/** Pages of 4 KiB are many, large ones few. */
const keysOf = (pageSize: number): number => (pageSize === large ? 3 : 24)

/** A pool, and what it must contain; an ephemeral page may be missing. */
interface Held {
  readonly pool: Pool
  readonly pages: Map<number, Uint8Array>
}

/** A fetch under way, and what the page was since it began. */
interface Fetching {
  readonly held: Held
  readonly key: number
  readonly into: Uint8Array
  readonly states: (Uint8Array | undefined)[]
  readonly outcome: Promise<GetOutcome | TmemError>
}

type Step = readonly [what: number, pool: number, key: number, seed: number]

class World {
  readonly store: PageStore
  readonly outside: Outside = calm()
  readonly limits: readonly ByteLimit[]
  readonly allocator = failingAllocator(systemAllocator)
  readonly ledger = new Ledger()
  readonly held: Held[] = []
  readonly fetches: Fetching[] = []
  /** Reads may have failed since the last time that nothing was under way. */
  troubled = false

  constructor(make: (outside: Outside) => Stack) {
    const { layers, limits } = make(this.outside)
    this.limits = limits
    this.store = compose(layers, { allocator: this.allocator, accounts: this.ledger, clock: () => 0, check: 'model' })
    const can = this.store.capabilities
    for (const kind of kinds)
      if ((kind.persistent ? can.persistent : can.ephemeral) && kind.pageSize <= can.maxPageSize) this.#open(kind)
  }

  #open(kind: (typeof kinds)[number], at: number = this.held.length): void {
    const pool = this.store.newPool({ client: at % 2, ...kind })
    if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
    this.held[at] = { pool, pages: new Map() }
  }

  async step([what, which, which2, seed]: Step): Promise<void> {
    const held = this.held[which % this.held.length]!
    const { pool } = held
    const { pageSize, persistent } = pool.attributes
    const key = which2 % keysOf(pageSize)
    const page = makePage(contents[seed % contents.length]!, seed, pageSize)
    if (what < 30) this.#wasPut(held, key, page, pool.put(key >> 3, key & 7, page), false)
    else if (what < 36 && pool.replace !== undefined)
      this.#wasPut(held, key, page, pool.replace(key >> 3, key & 7, page), persistent)
    else if (what < 42) this.#putMany(held, key, seed)
    else if (what < 55) this.#got(held, key, pool)
    else if (what < 68) this.#fetch(held, key)
    else if (what < 72) await this.#settle()
    else if (what < 78) {
      pool.flushPage(key >> 3, key & 7)
      this.#change(held, key, undefined)
    } else if (what < 80) {
      pool.flushObject(key >> 3)
      for (let other = 0; other < 24; other++) if (other >> 3 === key >> 3) this.#change(held, other, undefined)
    } else if (what < 84) {
      if (pool.release!(key >> 3, key & 7)) expect(held.pages.has(key), `page ${key} was released and never put`)
    } else if (what < 88) {
      const { pages } = this.store.tick({ pages: 1 + (seed % 64) })
      expect(pages <= 1 + (seed % 64), `tick touched ${pages} pages`)
    } else if (what < 92) await this.outside.turn()
    else if (what < 95) {
      this.outside.failing = (['nothing', 'writes', 'nothing', 'reads', 'all'] as const)[seed % 5]!
      this.troubled ||= this.outside.failing !== 'nothing'
    } else if (what < 96) this.allocator.fail(seed % 2 === 0 ? 'none' : 'all')
    else if (what < 98) for (const limit of this.limits) limit.bytes = Math.floor((limit.maximumBytes * (seed % 5)) / 4)
    else if (what < 99) this.#destroy(which % this.held.length)
    else await this.store.sync?.()
    this.check()
  }

  #change(held: Held, key: number, page: Uint8Array | undefined): void {
    if (page === undefined) held.pages.delete(key)
    else held.pages.set(key, page)
    for (const one of this.fetches) if (one.held === held && one.key === key) one.states.push(page)
  }

  #wasPut(held: Held, key: number, page: Uint8Array, outcome: number, keeps: boolean): void {
    if (outcome === PutOutcome.Stored) this.#change(held, key, page)
    else if (!keeps) this.#change(held, key, undefined)
  }

  /** Some pages at once, one handle among them twice; what is there already goes back unchanged. */
  #putMany(held: Held, first: number, seed: number): void {
    const { pool, pages } = held
    const { pageSize, persistent } = pool.attributes
    const batch = new PageBatch(8, pageSize)
    const put: Uint8Array[] = []
    for (let n = 0; n < 8; n++) {
      const key = (first + (n === 7 ? 2 : n)) % keysOf(pageSize)
      const same = n % 3 === 0 ? pages.get(key) : undefined
      put[n] = same ?? makePage(contents[(seed + n) % contents.length]!, seed + n, pageSize)
      const entry = batch.push(key >> 3, key & 7)
      batch.bytes.set(put[n]!, batch.offsets[entry]!)
      // The same handle was put before in this batch: what is there is not what it was.
      batch.unchanged[entry] = same === undefined || pageSize === large || n === 7 ? 0 : 1
      // A filter above has taken this one.
      if (n === 5 && seed % 4 === 0) batch.outcomes[entry] = PutOutcome.Stored
    }
    const keeps = seed % 2 === 0 && pool.replaceMany !== undefined
    if (keeps) pool.replaceMany!(batch)
    else pool.putMany(batch)
    for (let n = 0; n < 8; n++) {
      const key = (first + (n === 7 ? 2 : n)) % keysOf(pageSize)
      if (n === 5 && seed % 4 === 0) this.#change(held, key, undefined)
      else this.#wasPut(held, key, put[n]!, batch.outcomes[n]!, keeps && persistent)
    }
  }

  #got(held: Held, key: number, pool: Pool): void {
    const { pageSize } = pool.attributes
    const into = new Uint8Array(pageSize)
    const outcome = pool.get(key >> 3, key & 7, into)
    if (outcome === GetOutcome.Deferred) expect(held.pages.has(key), `page ${key} is deferred and was never put`)
    else this.#compare(held, key, outcome, into, [held.pages.get(key)])
  }

  #compare(
    held: Held,
    key: number,
    outcome: number,
    into: Uint8Array,
    states: readonly (Uint8Array | undefined)[],
  ): void {
    const { persistent, shared } = held.pool.attributes
    if (outcome === GetOutcome.Miss) {
      expect(!persistent || states.includes(undefined), `page ${key} is lost`)
      // What was missed once may not come back; a fetch that was overtaken says nothing of what is there now.
      if (states.length === 1) this.#change(held, key, undefined)
      return
    }
    expect(outcome === GetOutcome.Hit, `an outcome of ${outcome}`)
    const found = states.find((state) => state !== undefined && Buffer.compare(state, into) === 0)
    if (found === undefined) expectSame(into, states.at(-1) ?? new Uint8Array(0), `page ${key}`)
    if (!persistent && !shared) this.#change(held, key, undefined)
  }

  #fetch(held: Held, key: number): void {
    const { pool } = held
    const { persistent, shared, pageSize } = pool.attributes
    // Of a page that two may take nobody could say who did.
    if (!persistent && !shared && this.fetches.length > 0) return
    const into = new Uint8Array(pageSize)
    const outcome = pool.fetch(key >> 3, key & 7, into).catch((error: unknown) => {
      if (error instanceof TmemError) return error
      throw error
    })
    this.fetches.push({ held, key, into, states: [held.pages.get(key)], outcome })
  }

  /** Waits for whatever is under way. */
  async #settle(): Promise<void> {
    for (const { held, key, into, states, outcome } of this.fetches.splice(0)) {
      const answer = await outcome
      if (answer instanceof TmemError)
        expect(this.troubled && answer.code === 'TMEM_IO', `page ${key} cannot be had: ${answer.message}`)
      else this.#compare(held, key, answer, into, states)
    }
    this.troubled = this.outside.failing !== 'nothing'
  }

  #destroy(which: number): void {
    const { pool, pages } = this.held[which]!
    pool.destroy()
    for (const key of pages.keys()) this.#change(this.held[which]!, key, undefined)
    for (const one of this.fetches) if (one.held.pool === pool) one.states.push(undefined)
    this.allocator.fail('none')
    this.#open(pool.attributes as (typeof kinds)[number], which)
  }

  check(): void {
    this.store.check!()
    const { charged_bytes: here = -1 } = countersOf(this.store, 'chain')[0]!
    const charged = this.ledger.charged(0) + this.ledger.charged(1)
    expect(here === charged, `${charged} bytes are charged, ${here} are here`)
  }

  /** Everything that must be there is there; nothing is left after closing. */
  async end(): Promise<void> {
    this.outside.failing = 'nothing'
    this.allocator.fail('none')
    await this.#settle()
    for (const held of this.held)
      for (let key = 0; key < keysOf(held.pool.attributes.pageSize); key++) {
        this.#fetch(held, key)
        await this.#settle()
      }
    this.check()
    await this.store.close()
    this.ledger.expectSettled('after close')
  }
}

const steps = fc.array(fc.tuple(fc.nat(99), fc.nat(9), fc.nat(23), fc.nat(1000)), {
  minLength: 20,
  maxLength: 150,
  size: 'max',
})

describe('whatever happens to it, a chain keeps its invariants and every byte:', () => {
  test.each(Object.keys(stacks))('%s', { timeout: 120_000 }, async (name) => {
    await fc.assert(
      fc.asyncProperty(steps, async (history) => {
        const world = new World(stacks[name]!)
        try {
          for (const step of history) await world.step(step)
          await world.end()
        } finally {
          await Promise.allSettled(world.fetches.map(({ outcome }) => outcome))
          await world.store.close()
        }
      }),
      { numRuns: Number(process.env['TMEM_RUNS'] ?? 60), seed: Number(process.env['TMEM_SEED'] ?? 1) },
    )
  })
})

test('metadata is taken out of the limit of the place where the page is', () => {
  const store = compose([memory({ limitBytes: 86_000 }), memory({ limitBytes: 2 ** 20 })])
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: basePageSize })
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  const outcomes = Array.from({ length: 200 }, (_, index) => pool.put(0, index, makePage('noise', index, basePageSize)))
  expectEqual(new Set(outcomes)).toEqual(new Set([PutOutcome.Stored]))
  const [upper, lower] = countersOf(store, 'memory')
  expectEqual([upper!['pages'], lower!['pages']]).toEqual([expectEqual.closeTo(20, -1), expectEqual.closeTo(180, -1)])
})
