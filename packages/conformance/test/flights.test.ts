/**
 * What the chain owes a slow place, and its pages, when flights fail, are refused, or land while their pages change.
 */
import {
  ByteLimit,
  compose,
  createAccounts,
  type Flight,
  GetOutcome,
  type Layer,
  none,
  type ObjectId,
  type Owners,
  type PageStore,
  type Place,
  type Pool,
  PutOutcome,
  planStack,
  type SlowPlace,
  systemAllocator,
} from '@tmem/core'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { describe, expect, test } from 'vitest'
import { openChains } from '../../tmem-core/src/shards.ts'
import { countersOf } from './subjects.ts'

const { Hit, Miss, Deferred } = GetOutcome
const { Stored } = PutOutcome
const pageSize = 4096
const unitBytes = 64

/** A slow place that does what it is told; its frames lie in a map. */
class Toy implements SlowPlace {
  readonly name = 'toy'
  readonly traits
  readonly unitBytes = unitBytes
  readonly flightBytes = 64 * 1024
  readonly frames = new Map<number, Uint8Array>()
  owners: Owners | undefined
  /** What becomes of the next flights. */
  failure: Error | undefined
  refuses = false
  landsItself = false
  /** Flights that wait to be let go. */
  readonly waiting: (() => void)[] = []
  waits = false
  writes = 0
  recovered: { object: ObjectId; index: number; location: number; units: number }[] = []
  owned: number[] = []
  /** Bytes behind the last frame of a flight, up to a block, that were not zero. */
  dirtyEnds = 0
  /** Which pages of the last flight that waited were still what they had been. */
  current: boolean[] = []
  #next = 0

  constructor(survives: 'nothing' | 'process') {
    this.traits = Object.freeze({
      persistent: true,
      ephemeral: true,
      waits: true,
      survives,
      rawOnly: false,
      capacity: 4096,
      reservedBytes: 0,
      maxPageSize: 65_536,
    })
  }

  attach(owners: Owners): void {
    this.owners = owners
  }

  open(): boolean {
    return true
  }

  writeNow(flight: Flight): void {
    this.writes++
    const { filled } = flight
    if (flight.count === 0) throw new Error('a flight with nothing in it')
    this.dirtyEnds += flight.bytes.subarray(filled, Math.ceil(filled / 4096) * 4096).filter((byte) => byte !== 0).length
    if (this.failure !== undefined) throw this.failure
    for (let n = 0; n < flight.count; n++) {
      if (this.refuses) continue
      const from = flight.offsets[n]!
      this.frames.set(this.#next, flight.bytes.slice(from, from + flight.units[n]! * unitBytes))
      flight.locations[n] = this.#next++
    }
  }

  async write(flight: Flight): Promise<void> {
    if (this.waits) await new Promise<void>((resolve) => this.waiting.push(resolve))
    this.current = Array.from({ length: flight.count }, (_, n) => this.owners!.isCurrent(flight, n))
    this.writeNow(flight)
    if (this.landsItself) this.owners!.landed(flight)
  }

  async read(location: number, _units: number, into: Uint8Array): Promise<void> {
    into.set(this.frames.get(location)!)
  }

  free(location: number): void {
    if (!this.frames.delete(location)) throw new Error(`freed twice: ${location}`)
  }

  recover(_key: number, enter: (object: ObjectId, index: number, location: number, units: number) => number): void {
    for (const { object, index, location, units } of this.recovered.splice(0)) {
      const owner = enter(object, index, location, units)
      this.owned.push(owner)
      if (owner === none) this.frames.delete(location)
    }
  }

  stats() {
    return { name: this.name, counters: {}, children: [] }
  }

  async close(): Promise<void> {}
}

const toyLayer = (toy: Toy): Layer => ({ name: 'toy', place: { traits: toy.traits, open: () => toy } })

/** zcache as a layer whose blocks come out with one bit wrong while they are spoilt. */
function damagedUpper(): { readonly upper: Layer; readonly spoil: (on: boolean) => void } {
  let isSpoilt = false
  const compressed = zcache({ limitBytes: 256 * 1024 }).place!
  const damaging = (place: Place): Place =>
    new Proxy(place, {
      get: (target, property) => {
        const value = Reflect.get(target, property)
        if (typeof value !== 'function') return value
        return (...args: unknown[]) => {
          const answer = value.apply(target, args)
          const [, block] = args as [number, { bytes: Uint8Array; at: number }]
          if (property === 'get' && isSpoilt) block.bytes[block.at + 5]! ^= 1
          return answer
        }
      },
    })
  return {
    upper: {
      name: 'zcache',
      place: { traits: compressed.traits, open: (context) => damaging(compressed.open(context)) },
    },
    spoil: (on) => {
      isSpoilt = on
    },
  }
}

function poolOf(store: PageStore, persistent: boolean, shared = !persistent): Pool {
  const pool = store.newPool({ client: 1, persistent, shared, pageSize })
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return pool
}

/** A page that is not the same everywhere. */
function pageOf(seed: number): Uint8Array {
  const page = new Uint8Array(pageSize).fill(seed)
  page[1] = seed + 1
  return page
}

/** A page that does not shrink. */
function noise(seed: number): Uint8Array {
  const page = new Uint8Array(pageSize)
  for (let at = 0, state = seed + 1; at < pageSize; at++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    page[at] = state >>> 24
  }
  return page
}

async function holds(pool: Pool, index: number, seed: number): Promise<boolean> {
  const into = new Uint8Array(pageSize)
  return (await pool.fetch(7, index, into)) === Hit && Buffer.compare(into, pageOf(seed)) === 0
}

const fill = (pool: Pool, from: number, to: number): void => {
  for (let index = from; index < to; index++) expect(pool.put(7, index, pageOf(index % 200))).toBe(Stored)
}

describe('ephemeral pages over a place that must be written', () => {
  test('who needs room writes many pages at once', async () => {
    const toy = new Toy('process')
    const store = compose([memory({ limitBytes: 256 * 1024 }), toyLayer(toy)])
    const pool = poolOf(store, false)
    fill(pool, 0, 400)
    // A sixteenth of the limit at once: four pages.
    expect(toy.frames.size).toBeGreaterThan(300)
    expect(toy.writes * 4).toBeLessThanOrEqual(toy.frames.size + 4)
    for (let index = 0; index < 400; index++) expect(await holds(pool, index, index % 200)).toBe(true)
    await store.close()
  })

  test.each([
    ['fails', new Error('the disk is gone')],
    ['takes nothing', undefined],
  ] as const)('a place that %s does not keep new pages out: the oldest go', async (_how, failure) => {
    const toy = new Toy('process')
    const store = compose([memory({ limitBytes: 256 * 1024 }), toyLayer(toy)])
    const pool = poolOf(store, false)
    toy.failure = failure
    toy.refuses = true
    fill(pool, 0, 400)
    expect(await holds(pool, 399, 199)).toBe(true)
    expect(pool.get(7, 0, new Uint8Array(pageSize))).toBe(Miss)
    const [{ dropped_ephemeral }] = countersOf(store, 'moves') as [{ dropped_ephemeral: number }]
    expect(dropped_ephemeral).toBeGreaterThan(300)
    // One that fails is left alone for a while, and one that takes nothing is offered several at once.
    expect(toy.writes).toBeLessThan(failure === undefined ? 110 : 20)
    await store.close()
  })

  test('the middle one of three places makes room for what comes from above', async () => {
    const toy = new Toy('process')
    const store = compose([memory({ limitBytes: 128 * 1024 }), zcache({ limitBytes: 400_000 }), toyLayer(toy)])
    const pool = poolOf(store, false)
    for (let index = 0; index < 400; index++) expect(pool.put(7, index, noise(index))).toBe(Stored)
    expect(toy.frames.size).toBeGreaterThan(200)
    for (const index of [0, 100, 399]) {
      const into = new Uint8Array(pageSize)
      expect(await pool.fetch(7, index, into)).toBe(Hit)
      expect(Buffer.compare(into, noise(index))).toBe(0)
    }
    await store.close()
  })

  test('a damaged page on its way down is dropped, once', async () => {
    for (const below of ['memory', 'slow'] as const) {
      const toy = new Toy('process')
      const { upper, spoil } = damagedUpper()
      const lower = below === 'memory' ? [memory({ limitBytes: 2 ** 20 })] : [toyLayer(toy)]
      const store = compose([upper, ...lower])
      const pool = poolOf(store, false)
      fill(pool, 0, 100)
      spoil(true)
      for (let index = 100; index < 900; index++) pool.put(7, index, noise(index))
      spoil(false)
      for (let index = 900; index < 2000; index++) expect(pool.put(7, index, noise(index))).toBe(Stored)
      const into = new Uint8Array(pageSize)
      expect(await pool.fetch(7, 1999, into)).toBe(Hit)
      expect(Buffer.compare(into, noise(1999))).toBe(0)
      expect(countersOf(store, 'moves')[0]!['corrupt']).toBeGreaterThan(0)
      await store.close()
    }
  })
})

describe('writing ahead', () => {
  /** Reads pages at random, one in so many is put anew; ticks in between. */
  async function use(store: PageStore, pool: Pool, rounds: number, putEvery: number): Promise<void> {
    let state = 1
    for (let n = 0; n < rounds; n++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      const index = Math.floor((state / 2 ** 32) ** 2 * 200)
      const isPut = putEvery > 0 && n % putEvery === 0
      expect(isPut ? pool.put(7, index, pageOf(index)) === Stored : await holds(pool, index, index)).toBe(true)
      if (n % 16 > 0) continue
      store.tick({ pages: 16 })
      await new Promise((resolve) => setImmediate(resolve))
    }
  }

  test('who only reads comes to an end of writing', async () => {
    const toy = new Toy('nothing')
    const store = compose([memory({ limitBytes: 256 * 1024 }), toyLayer(toy)])
    const pool = poolOf(store, true)
    fill(pool, 0, 200)
    await use(store, pool, 2000, 0)
    const before = toy.writes
    expect(countersOf(store, 'moves')[1]!['cleaned']).toBeGreaterThan(0)
    await use(store, pool, 2000, 0)
    expect(toy.writes).toBe(before)
    expect(toy.dirtyEnds).toBe(0)
    store.check?.()
    pool.flushObject(7)
    expect(toy.frames.size).toBe(0)
    await store.close()
  })

  test('what is damaged is not written, and stays for a get to report', async () => {
    const toy = new Toy('nothing')
    const { upper, spoil } = damagedUpper()
    const store = compose([upper, toyLayer(toy)])
    const pool = poolOf(store, true)
    for (let index = 0; index < 100; index++) expect(pool.put(7, index, noise(index))).toBe(Stored)
    const into = new Uint8Array(pageSize)
    for (let n = 0; n < 300; n++) expect(await pool.fetch(7, (n * 7) % 100, into)).toBe(Hit)
    const moves = (): number[] => countersOf(store, 'moves').map(({ cleaned, corrupt }) => cleaned! + corrupt!)
    const [, before] = moves()
    const writes = toy.writes
    spoil(true)
    for (let n = 0; n < 4; n++) store.tick({ pages: 16 })
    spoil(false)
    await new Promise((resolve) => setImmediate(resolve))
    const [corrupt, cleaned] = moves()
    expect(corrupt).toBeGreaterThan(0)
    expect([cleaned, toy.writes]).toEqual([before, writes])
    for (let index = 0; index < 100; index++) {
      expect(await pool.fetch(7, index, into)).toBe(Hit)
      expect(Buffer.compare(into, noise(index))).toBe(0)
    }
    await store.close()
  })

  test('who only writes, and where old pages would come back, none is written ahead', async () => {
    for (const [survives, putEvery] of [
      ['nothing', 1],
      ['process', 0],
    ] as const) {
      const toy = new Toy(survives)
      const store = compose([memory({ limitBytes: 256 * 1024 }), toyLayer(toy)])
      const pool = poolOf(store, true)
      fill(pool, 0, 200)
      await use(store, pool, 2000, putEvery)
      expect(countersOf(store, 'moves')[1]!['cleaned']).toBe(0)
      await store.close()
    }
  })

  test('a page that is put, flushed or used while it is written ahead is right', async () => {
    const toy = new Toy('nothing')
    const store = compose([memory({ limitBytes: 256 * 1024 }), toyLayer(toy)])
    const pool = poolOf(store, true)
    fill(pool, 0, 200)
    // No ticks: nothing is written ahead yet.
    for (let n = 0; n < 600; n++) expect(await holds(pool, (n * 7) % 200, (n * 7) % 200)).toBe(true)
    toy.waits = true
    for (let n = 0; n < 4; n++) store.tick({ pages: 16 })
    expect(toy.waiting.length).toBeGreaterThan(0)
    for (let index = 0; index < 200; index += 3) expect(pool.put(7, index, pageOf(index + 20))).toBe(Stored)
    for (let index = 1; index < 200; index += 3) pool.flushPage(7, index)
    toy.waits = false
    for (const go of toy.waiting.splice(0)) go()
    await new Promise((resolve) => setImmediate(resolve))
    for (let index = 0; index < 200; index++)
      expect(await holds(pool, index, index % 3 === 0 ? index + 20 : index)).toBe(index % 3 !== 1)
    const { cleaned } = countersOf(store, 'moves')[1]! as { cleaned: number }
    expect(cleaned).toBeGreaterThan(0)
    store.check?.()
    pool.flushObject(7)
    expect(toy.frames.size).toBe(0)
    await store.close()
  })
})

describe('a place that survives its process', () => {
  test('lands its flight itself, and knows which pages changed meanwhile', async () => {
    const toy = new Toy('process')
    toy.waits = true
    toy.landsItself = true
    const limit = new ByteLimit(256 * 1024)
    const store = compose([memory({ limitBytes: limit }), toyLayer(toy)])
    const pool = poolOf(store, true)
    fill(pool, 0, 56)
    limit.bytes = 128 * 1024
    store.tick({ pages: 64 })
    // One is put anew, one is flushed; all others land.
    pool.put(7, 0, pageOf(99))
    pool.flushPage(7, 1)
    for (const go of toy.waiting.splice(0)) go()
    await new Promise((resolve) => setImmediate(resolve))
    expect(toy.current.filter((one) => !one)).toHaveLength(2)
    expect(toy.current.length).toBeGreaterThan(10)
    expect(await holds(pool, 0, 99)).toBe(true)
    expect(await holds(pool, 1, 1)).toBe(false)
    expect(await holds(pool, 2, 2)).toBe(true)
    pool.flushObject(7)
    expect(toy.frames.size).toBe(0)
    await store.close()
  })

  test('keeps no copy of what was used on its way', async () => {
    for (const [survives, left] of [
      ['nothing', 1],
      ['process', 0],
    ] as const) {
      const toy = new Toy(survives)
      toy.waits = true
      const limit = new ByteLimit(256 * 1024)
      const store = compose([memory({ limitBytes: limit }), toyLayer(toy)])
      const pool = poolOf(store, true)
      fill(pool, 0, 56)
      limit.bytes = 128 * 1024
      store.tick({ pages: 64 })
      pool.get(7, 0, new Uint8Array(pageSize))
      for (const go of toy.waiting.splice(0)) go()
      await new Promise((resolve) => setImmediate(resolve))
      expect(pool.get(7, 0, new Uint8Array(pageSize))).toBe(Hit)
      expect(countersOf(store, 'chain')[0]!['clean_copies']).toBe(left)
      expect(countersOf(store, 'moves')[1]!['used_in_flight']).toBe(1)
      await store.close()
    }
  })

  test('hands over what an earlier run left: it is told who owns it', async () => {
    const toy = new Toy('process')
    let store = compose([memory({ limitBytes: 256 * 1024 }), toyLayer(toy)])
    let pool = poolOf(store, false)
    fill(pool, 0, 100)
    const [{ location, units }] = [...toy.frames].map(([at, bytes]) => ({
      location: at,
      units: bytes.length / 64,
    })) as [{ location: number; units: number }]
    // Without a word to the place, as by a killed process.
    toy.recovered = [
      { object: 7, index: 0, location, units },
      { object: 7n, index: 0, location: location + 1, units },
    ]
    store = compose([memory({ limitBytes: 256 * 1024 }), toyLayer(toy)])
    pool = poolOf(store, false)
    expect(toy.owned[0]).toBeGreaterThanOrEqual(0)
    expect(toy.owned[1]).toBe(none)
    expect(toy.owners!.unitsAt(toy.owned[0]!, location)).toBe(units)
    expect([toy.owners!.objectOf(toy.owned[0]!), toy.owners!.indexOf(toy.owned[0]!)]).toEqual([7, 0])
    expect(pool.get(7, 0, new Uint8Array(pageSize))).toBe(Deferred)
    expect(await holds(pool, 0, 0)).toBe(true)
    await store.close()
  })
})

test('several directories over one place: each page is recovered into its own', async () => {
  const toy = new Toy('process')
  const plan = planStack([toyLayer(toy)])
  const openShards = (): PageStore =>
    openChains([{ place: toy, foreign: false }], plan, { allocator: systemAllocator, accounts: createAccounts() }, 1000)
  const first = poolOf(openShards(), false)
  fill(first, 0, 500)
  toy.recovered = [...toy.frames].map(([location, bytes]) => ({
    object: 7,
    index: location,
    location,
    units: bytes.length / unitBytes,
  }))
  const store = openShards()
  const pool = poolOf(store, false)
  expect(new Set(toy.owned.map((owner) => owner >>> 24)).size).toBeGreaterThan(3)
  expect(countersOf(store, 'chain')[0]).toMatchObject({ recovered: 500, pages: 500 })
  for (let index = 0; index < 500; index++) expect(await holds(pool, index, index % 200)).toBe(true)
  await store.close()
})

test('more small pages than the directory has entries: the oldest ephemeral ones go', () => {
  const store = compose([zcache({ limitBytes: 256 * 1024 }), memory({ limitBytes: 2 ** 20 })])
  const pool = poolOf(store, false)
  fill(pool, 0, 6000)
  const [chain] = countersOf(store, 'chain') as [Record<string, number>]
  expect(chain['pages']).toBeLessThan(2000)
  for (let n = 1; n <= chain['pages']!; n++) expect(pool.get(7, 6000 - n, new Uint8Array(pageSize))).toBe(Hit)
  void store.close()
})

test('where files are read and written in the calling thread, no flight is left under way', async () => {
  const toy = new Toy('nothing')
  const limit = new ByteLimit(256 * 1024)
  const store = compose([memory({ limitBytes: limit }), toyLayer(toy)], { io: 'blocking' })
  toy.write = () => Promise.reject(new Error('it was told not to wait'))
  const pool = poolOf(store, true)
  fill(pool, 0, 56)
  limit.bytes = 128 * 1024
  for (let n = 0; n < 10; n++) store.tick({ pages: 16 })
  const { counters } = store
    .stats()
    .children.at(-1)!
    .children.find(({ name }) => name === 'moves')!
  expect(toy.frames.size).toBeGreaterThan(0)
  expect(counters['sunk_in']).toBe(toy.frames.size)
  await store.close()
})
