/**
 * What can be asked of a stack beside putting and getting: where pages are, what rests where, and that they move now.
 */
import {
  compose,
  createAccounts,
  GetOutcome,
  type Layer,
  PageBatch,
  type PageStore,
  type PlaceTraits,
  type Pool,
  PutOutcome,
  Whereabouts,
} from '@tmem/core'
import { type SwapFile, SwapPlace } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { expect, test } from 'vitest'
import { countersOf, MiB } from './subjects.ts'

/** A swap file in memory, which fails and waits when it is told to. */
class MemoryFile implements SwapFile {
  readonly directIo = true
  readonly content: Uint8Array = new Uint8Array(8 * MiB)
  failing: Error | undefined
  writes = 0
  before: () => Promise<void> = () => Promise.resolve()

  async write(bytes: Uint8Array, at: number, length: number, position: number): Promise<void> {
    await this.before()
    this.writeNow(bytes, at, length, position)
  }

  writeNow(bytes: Uint8Array, at: number, length: number, position: number): void {
    if (this.failing !== undefined) throw this.failing
    this.writes++
    this.content.set(bytes.subarray(at, at + length), position)
  }

  async read(into: Uint8Array, at: number, length: number, position: number): Promise<void> {
    this.readNow(into, at, length, position)
  }

  readNow(into: Uint8Array, at: number, length: number, position: number): void {
    into.set(this.content.subarray(position, position + length), at)
  }

  sync(): Promise<void> {
    return Promise.resolve()
  }

  close(): Promise<void> {
    return Promise.resolve()
  }
}

const fileLayer = (file: SwapFile, slots: boolean = false, pages: number = 1024): Layer => {
  const traits: PlaceTraits = {
    persistent: true,
    ephemeral: false,
    waits: true,
    survives: 'nothing',
    rawOnly: slots,
    capacity: pages,
    reservedBytes: pages * 4096,
    maxPageSize: 65_536,
  }
  const roomBytes = slots ? (pages + 1) * 4096 : 7 * MiB
  return {
    name: 'frontswap',
    place: {
      traits,
      open: (context) =>
        new SwapPlace({ file, traits, from: slots ? 0 : 4096, roomBytes, slots, bytesPerHour: undefined }, context),
    },
  }
}

/** Memory that belongs to somebody else. */
const lent = (limitBytes: number): Layer => {
  const { name, place } = memory({ limitBytes })
  return { name, place: { ...place!, traits: { ...place!.traits, foreign: true } } }
}

/** Exactly so many pages of plain memory. */
function room(pages: number): Layer {
  for (let limitBytes = pages * 4096; ; limitBytes += 512) {
    const { name, place } = memory({ limitBytes })
    if (place!.traits.reservedBytes >= pages * 4096) return { name, place: place! }
  }
}

const open = (layers: readonly Layer[], more: Parameters<typeof compose>[1] = {}): { store: PageStore; pool: Pool } => {
  const store = compose(layers, { check: 'model', ...more })
  const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return { store, pool }
}

const text = (n: number): Buffer => Buffer.alloc(4096, `page ${n} of text, and more of it `)
let state = 1
const next = (): number => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0
  return state >>> 24
}
const noise = (): Buffer => Buffer.from(Uint8Array.from({ length: 4096 }, next))
/** What deflate makes less of than LZ4. */
const sixBits = (): Buffer => Buffer.from(Uint8Array.from({ length: 4096 }, () => next() & 63))
/** Asserts equality, also where a history takes another branch each time. */
const same = (got: unknown, wanted: unknown): void => expect(got).toEqual(wanted)
const indexesOf = (...indexes: number[]): Uint32Array => Uint32Array.from(indexes)

async function contentOf(pool: Pool, index: number): Promise<Buffer> {
  const into = Buffer.alloc(4096)
  expect(await pool.fetch(0, index, into)).toBe(GetOutcome.Hit)
  return into
}

/** Asserts that what the places say adds up, and answers their pages from the top. */
function pagesOf(store: PageStore): number[] {
  const { sameFilled, places } = store.usage!()
  for (const one of places) {
    const came = one.put + one.sunk + one.rose + one.recovered
    same([one.name, came - one.passedDown - one.raised - one.gone], [one.name, one.pages])
    expect(one.huge + (one.waits ? 0 : one.good)).toBeLessThanOrEqual(one.pages)
  }
  const [chain] = countersOf(store, 'chain')
  expect(places.reduce((sum, { pages }) => sum + pages, sameFilled)).toBe(chain!['pages'])
  return places.map(({ pages }) => pages)
}

test('a page is where it is said to be, in the form that is said; what rests where adds up', async () => {
  const { store, pool } = open([zcache({ limitBytes: MiB }), fileLayer(new MemoryFile())])
  const content = Array.from({ length: 900 }, (_, n) =>
    n % 4 === 0 ? noise() : n % 4 === 1 ? Buffer.alloc(4096, n) : text(n),
  )
  for (let round = 0; round < 3; round++)
    for (const [n, page] of content.entries()) {
      if (round === 1 && n % 7 === 0) pool.flushPage(0, n)
      else if (round !== 1 || n % 3 === 0) same(pool.replace!(0, n, page), PutOutcome.Stored)
      if (n % 5 === 0) store.tick({ pages: 64 })
      if (n % 40 === 39) {
        const other = n - 30
        if ((round === 1 && other % 7 === 0) === false) await contentOf(pool, other)
        pagesOf(store)
      }
    }
  const counted = { same: 0, pages: [0, 0], huge: [0, 0], bytes: [0, 0], good: 0 }
  const where = new Whereabouts()
  for (const [n, page] of content.entries()) {
    expect(pool.whereIs!(0, n, where)).toBe(true)
    if (where.place < 0) {
      same(n % 4, 1)
      counted.same++
    } else {
      same([n, where.huge], [n, n % 4 === 0])
      counted.pages[where.place]!++
      if (where.huge) counted.huge[where.place]!++
      counted.bytes[where.place]! += where.bytes
      if (where.place === 0 && where.bytes <= 2048) counted.good++
      const into = Buffer.alloc(4096)
      same(pool.get(0, n, into), where.place === 0 ? GetOutcome.Hit : GetOutcome.Deferred)
      if (where.place === 0) same(into.equals(page), true)
    }
  }
  expect(pool.whereIs!(0, 5000, where)).toBe(false)
  const { sameFilled, places } = store.usage!()
  expect(counted).toEqual({
    same: sameFilled,
    pages: pagesOf(store),
    huge: places.map(({ huge }) => huge),
    bytes: places.map(({ bytes }) => bytes),
    good: places[0]!.good,
  })
  expect(places[1]!.huge).toBeGreaterThan(10)
  expect(places[0]!.usedBytes).toBeGreaterThan(places[0]!.bytes)
  expect(places[0]!.usedBytes).toBeLessThanOrEqual(MiB)
  await store.close()
})

test('pages sink on request, many to a write, and only those', async () => {
  const file = new MemoryFile()
  const { store, pool } = open([zcache({ limitBytes: MiB }), fileLayer(file)])
  const content = Array.from({ length: 120 }, (_, n) => (n % 2 === 0 ? noise() : text(n)))
  for (const [n, page] of content.entries()) pool.put(0, n, page)
  const odd = Uint32Array.from({ length: 60 }, (_, n) => 2 * n + 1)
  // They were used, but before they were asked to go.
  for (const n of odd) pool.get(0, n, Buffer.alloc(4096))
  expect(await pool.sink!(0, odd, 50, true)).toEqual({ pages: 50, failure: undefined })
  expect(pagesOf(store)).toEqual([70, 50])
  expect(file.writes).toBe(1)
  // Those that are there already, and one that there is not, are passed over; noise of more than a flight takes
  // several.
  const all = Uint32Array.from({ length: 121 }, (_, n) => n)
  expect(await pool.sink!(0, all, 121, true)).toEqual({ pages: 70, failure: undefined })
  expect(pagesOf(store)).toEqual([0, 120])
  expect(file.writes).toBeGreaterThan(2)
  // What rose has a copy there, and goes for nothing.
  const { writes } = file
  for (const [n, page] of content.entries()) expect((await contentOf(pool, n)).equals(page)).toBe(true)
  expect(pagesOf(store)).toEqual([120, 0])
  expect(await pool.sink!(0, all, 121, true)).toEqual({ pages: 120, failure: undefined })
  expect(file.writes).toBe(writes)
  expect(() => pool.whereIs!(-1, 0, new Whereabouts())).toThrow(RangeError)
  await expect(pool.sink!(0, all, 122, true)).rejects.toThrow(RangeError)
  await store.close()
})

test('a page that is used, replaced or flushed while it sinks on request is right', async () => {
  const file = new MemoryFile()
  const { store, pool } = open([zcache({ limitBytes: MiB }), fileLayer(file)])
  const content = Array.from({ length: 4 }, noise)
  for (const [n, page] of content.entries()) pool.put(0, n, page)
  let land = (): void => undefined
  file.before = () =>
    new Promise((resolve) => {
      land = resolve
    })
  const sunk = pool.sink!(0, indexesOf(0, 1, 2, 3), 4, true)
  await Promise.resolve()
  pool.get(0, 1, Buffer.alloc(4096))
  pool.put(0, 2, text(2))
  pool.flushPage(0, 3)
  land()
  expect(await sunk).toEqual({ pages: 1, failure: undefined })
  expect(pagesOf(store)).toEqual([2, 1])
  for (const [n, page] of [content[0]!, content[1]!, text(2)].entries())
    expect((await contentOf(pool, n)).equals(page)).toBe(true)
  await store.close()
})

test('while one transfer of what sinks on request is on its way, the next one is sent, and no more', async () => {
  const file = new MemoryFile()
  const { store, pool } = open([zcache({ limitBytes: MiB }), fileLayer(file)])
  const content = Array.from({ length: 160 }, noise)
  for (const [n, page] of content.entries()) pool.put(0, n, page)
  let underWay = 0
  let most = 0
  file.before = async () => {
    most = Math.max(most, ++underWay)
    for (let turns = 0; turns < 3; turns++) await new Promise((resolve) => setImmediate(resolve))
    underWay--
  }
  const all = Uint32Array.from({ length: 160 }, (_, n) => n)
  expect(await pool.sink!(0, all, 160, true)).toEqual({ pages: 160, failure: undefined })
  expect(file.writes).toBeGreaterThan(4)
  expect(most).toBe(2)
  for (const [n, page] of content.entries()) expect((await contentOf(pool, n)).equals(page)).toBe(true)
  await store.close()
})

test('what cannot be written stays where it was, and the system says why', async () => {
  const file = new MemoryFile()
  const { store, pool } = open([zcache({ limitBytes: MiB }), fileLayer(file)])
  const content = Array.from({ length: 100 }, noise)
  for (const [n, page] of content.entries()) pool.put(0, n, page)
  file.failing = Object.assign(new Error('full'), { code: 'ENOSPC' })
  const all = Uint32Array.from({ length: 100 }, (_, n) => n)
  expect(await pool.sink!(0, all, 100, true)).toEqual({ pages: 0, failure: file.failing })
  expect(pagesOf(store)).toEqual([100, 0])
  file.failing = undefined
  expect((await pool.sink!(0, all, 100, true)).pages).toBe(100)
  for (const [n, page] of content.entries()) expect((await contentOf(pool, n)).equals(page)).toBe(true)
  await store.close()
})

test("somebody else's memory is charged to nobody, and is not sure to be there; what comes from there is compressed", async () => {
  const accounts = createAccounts()
  const layers = [lent(MiB), zcache({ limitBytes: MiB, incompressible: 'refuse' }), fileLayer(new MemoryFile())]
  const { store, pool } = open(layers, { accounts })
  expect(store.capabilities.reservedBytes).toBe(4 * MiB)
  const content = Array.from({ length: 20 }, (_, n) => (n < 10 ? text(n) : noise()))
  for (const [n, page] of content.entries()) pool.put(0, n, page)
  expect(pagesOf(store)).toEqual([20, 0, 0])
  expect(accounts.charged(1)).toBe(0)
  expect(store.usage!().places.map(({ foreign }) => foreign)).toEqual([true, false, false])
  expect(
    await pool.sink!(
      0,
      Uint32Array.from({ length: 20 }, (_, n) => n),
      20,
      false,
    ),
  ).toEqual({ pages: 20, failure: undefined })
  expect(pagesOf(store)).toEqual([0, 10, 10])
  expect(store.usage!().places.map(({ huge }) => huge)).toEqual([0, 0, 10])
  const charged = accounts.charged(1)
  expect(charged).toBeGreaterThan(0)
  expect(charged).toBeLessThan(10 * 1024)
  for (const [n, page] of content.entries()) expect((await contentOf(pool, n)).equals(page)).toBe(true)
  expect(pagesOf(store)[0]).toBe(10)
  expect(accounts.charged(1)).toBe(charged)
  pool.flushObject(0)
  expect(accounts.charged(1)).toBe(0)
  expect(countersOf(store, 'frontswap')[0]!['frames']).toBe(0)
  await store.close()
})

test('a copy on disk goes with its page, also where memory between them refuses it', async () => {
  const layers = [memory({ limitBytes: 256 * 1024 }), zcache({ limitBytes: MiB, incompressible: 'refuse' })]
  const { store, pool } = open([...layers, fileLayer(new MemoryFile())])
  const content = Array.from({ length: 300 }, noise)
  for (const [n, page] of content.entries()) pool.put(0, n, page)
  for (let round = 0; round < 3; round++) {
    for (const [n, page] of content.entries()) {
      expect((await contentOf(pool, n)).equals(page)).toBe(true)
      if (n % 16 === 0) store.tick({ pages: 64 })
    }
    pagesOf(store)
  }
  pool.flushObject(0)
  expect(pagesOf(store)).toEqual([0, 0, 0])
  expect(countersOf(store, 'frontswap')[0]!['frames']).toBe(0)
  await store.close()
})

test('pages are compressed again on request: those that gain by it, and that have no copy on disk', async () => {
  const accounts = createAccounts()
  const { store, pool } = open([zcache({ limitBytes: MiB, recompress: 'deflate' }), fileLayer(new MemoryFile())], {
    accounts,
  })
  const content = Array.from({ length: 60 }, (_, n) => (n < 40 ? sixBits() : noise()))
  for (const [n, page] of content.entries()) pool.put(0, n, page)
  const all = Uint32Array.from({ length: 60 }, (_, n) => n)
  await pool.sink!(0, all, 5, true)
  for (let n = 0; n < 5; n++) await contentOf(pool, n)
  expect(pagesOf(store)).toEqual([60, 0])
  const before = { charged: accounts.charged(1), ...store.usage!().places[0]! }
  expect(before.huge).toBe(60)
  expect(pool.recompress!(0, all, 60)).toBe(35)
  const after = store.usage!().places[0]!
  expect(after).toMatchObject({ pages: 60, huge: 25, recompressed: 35, recompressPoor: 20 })
  expect(after.bytes).toBeLessThan(before.bytes - 35 * 700)
  expect(before.charged - accounts.charged(1)).toBe(countersOf(store, 'moves')[0]!['recompress_saved_bytes'])
  const where = new Whereabouts()
  const forms = [0, 5, 59].map((n) => {
    pool.whereIs!(0, n, where)
    return [where.huge, where.recompressed, where.incompressible]
  })
  expect(forms).toEqual([
    [true, false, false],
    [false, true, true].map((flag, n) => (n === 2 ? false : flag)),
    [true, false, true],
  ])
  // None of them is tried again.
  expect(pool.recompress!(0, all, 60)).toBe(0)
  expect(store.usage!().places[0]).toMatchObject({ recompressed: 35, recompressPoor: 20 })
  // They sink as they are, and come back.
  expect((await pool.sink!(0, all, 60, true)).pages).toBe(60)
  for (const [n, page] of content.entries()) expect((await contentOf(pool, n)).equals(page)).toBe(true)
  pool.flushObject(0)
  expect(accounts.charged(1)).toBe(0)
  await store.close()
})

test('a stack remembers its last moves, and since when it does', async () => {
  let now = 1000
  const clock = (): number => now
  const { store, pool } = open([zcache({ limitBytes: MiB }), fileLayer(new MemoryFile())], { clock, history: 8 })
  const movesOf = (index: number): string[] =>
    pool.movesOf!(0, index)!.moves.map(({ reason, from, to, atMs }) => `${atMs} ${reason} ${from} ${to}`)
  for (let n = 0; n < 10; n++) pool.put(0, n, text(n))
  // What is put into the first place, replaced or flushed there is no move.
  pool.replace!(0, 1, text(100))
  pool.flushPage(0, 2)
  expect(movesOf(1)).toEqual([])
  now = 2000
  await pool.sink!(0, indexesOf(1, 3), 2, true)
  now = 3000
  await contentOf(pool, 1)
  now = 4000
  // Its copy lies below still.
  await pool.sink!(0, indexesOf(1), 1, true)
  now = 5000
  pool.replace!(0, 3, text(103))
  expect(movesOf(1)).toEqual(['2000 sunk 0 1', '3000 rose 1 0', '4000 sunk_clean 0 1'])
  expect(movesOf(3)).toEqual(['2000 sunk 0 1', '5000 gone 1 -1'])
  expect([movesOf(2), movesOf(999)]).toEqual([[], []])
  // It is full with eight.
  expect(pool.movesOf!(0, 1)!.sinceMs).toBe(1000)
  now = 6000
  await pool.sink!(0, indexesOf(4, 5, 6, 7, 8), 5, true)
  expect([movesOf(1), movesOf(3)]).toEqual([['3000 rose 1 0', '4000 sunk_clean 0 1'], ['5000 gone 1 -1']])
  expect(pool.movesOf!(0, 1)!.sinceMs).toBe(3000)
  // A pool that is gone leaves nothing to the next one of its number.
  pool.destroy()
  expect(pool.movesOf!(0, 1)).toBeUndefined()
  const another = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 }) as Pool
  expect(another.movesOf!(0, 1)).toEqual({ moves: [], sinceMs: 3000 })
  await store.close()
})

test('a page that memory has no room for, and one that its caller has, are among the moves', async () => {
  const more = { clock: () => 7, history: 4096 }
  const { store, pool } = open([memory({ limitBytes: MiB }), fileLayer(new MemoryFile())], more)
  const count = 400
  for (let n = 0; n < count; n++) pool.put(0, n, noise())
  const reasons = new Set<string>()
  for (let n = 0; n < count; n++) {
    for (const { reason } of pool.movesOf!(0, n)!.moves) reasons.add(reason)
    await contentOf(pool, n)
    if (pool.release!(0, n)) same(pool.movesOf!(0, n)!.moves.at(-1)!.reason, 'released')
  }
  expect(reasons).toContain('sunk')
  await store.close()
})

test('without a clock there is no history, and without one asked for nothing is remembered', async () => {
  const layers = (): Layer[] => [zcache({ limitBytes: MiB }), fileLayer(new MemoryFile())]
  expect(() => compose(layers(), { history: 8 })).toThrow(
    new TypeError('compose: history needs a clock, such as clock: () => performance.now()'),
  )
  for (const history of [0, -1, 1.5, 2 ** 20 + 1, Number.NaN])
    expect(() => compose(layers(), { history, clock: () => 0 })).toThrow(/^compose: history must be .* got/)
  const { store, pool } = open(layers(), { clock: () => 0 })
  expect(pool.movesOf!(0, 1)).toBeUndefined()
  await store.close()
})

test('pages that rest are compressed again in the background, those in use are not', async () => {
  const { store, pool } = open([zcache({ limitBytes: 2 * MiB, recompress: 'deflate' })])
  const content = Array.from({ length: 200 }, sixBits)
  for (const [n, page] of content.entries()) pool.put(0, n, page)
  const use = (): void => {
    for (let n = 0; n < 50; n++) expect(pool.get(0, n, Buffer.alloc(4096))).toBe(GetOutcome.Hit)
  }
  for (let tick = 0; tick < 60; tick++) {
    use()
    const { pages } = store.tick({ pages: 40 })
    expect(pages).toBeLessThanOrEqual(40)
  }
  expect(store.usage!().places[0]!.recompressed).toBe(150)
  for (const [n, page] of content.entries()) expect((await contentOf(pool, n)).equals(page)).toBe(true)
  for (let tick = 0; tick < 60; tick++) store.tick({ pages: 40 })
  expect(store.usage!().places[0]!.recompressed).toBe(200)
  for (const [n, page] of content.entries()) expect((await contentOf(pool, n)).equals(page)).toBe(true)
  await store.close()
})

test.each([
  ['plain memory', () => [room(40)]],
  ['a compressor above plain memory', () => [zcache({ limitBytes: 256 * 1024 }), room(40)]],
  ['slots of an area made with mkswap', () => [fileLayer(new MemoryFile(), true, 40)]],
  // Its second cluster of slots is free as a whole.
  ['more slots', () => [fileLayer(new MemoryFile(), true, 64)]],
] as const)('a stack with room for just so many pages can be overwritten: %s', async (name, layers) => {
  const { store, pool } = open(layers())
  const content = new Map<number, Buffer>()
  const pages = name === 'more slots' ? 64 : 40
  const batch = new PageBatch(pages, 4096)
  for (let round = 0; round < 8; round++) {
    batch.clear()
    for (let n = 0; n < pages; n++) {
      const page = noise()
      content.set(n, page)
      if (round % 2 === 0) same(pool.replace!(0, n, page), PutOutcome.Stored)
      else batch.page(batch.push(0, n)).set(page)
    }
    same(pool.replaceMany!(batch), batch.length)
    for (const [n, page] of content) expect((await contentOf(pool, n)).equals(page)).toBe(true)
    pagesOf(store)
  }
  await store.close()
})
