/** Faults of chain and places that the simulator has found, each by itself. */
import {
  type Allocator,
  basePageSize,
  compose,
  createAccounts,
  GetOutcome,
  type Layer,
  type LayerContext,
  type MemoryPlace,
  PageBatch,
  type PageStore,
  Pending,
  type Place,
  type PlaceTraits,
  type Pool,
  PutOutcome,
  systemAllocator,
} from '@tmem/core'
import { roomFor, SwapPlace } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { expect, test } from 'vitest'
import { Random } from '../src/random.ts'
import { type FaultRates, MemoryPool, noFaults, SimulatedDisk, World } from '../src/world.ts'

const newWorld = (rates: Partial<FaultRates> = {}): World =>
  new World(new Random(1, 1), { ...noFaults(), ...rates }, new MemoryPool())

/** A swap file over a simulated disk. */
function swap(world: World, sizeBytes: number, more: Partial<PlaceTraits> = {}): Layer {
  const traits: PlaceTraits = {
    persistent: true,
    ephemeral: false,
    waits: true,
    survives: 'nothing',
    rawOnly: false,
    capacity: sizeBytes / basePageSize,
    reservedBytes: sizeBytes,
    maxPageSize: 65536,
    ...more,
  }
  const roomBytes = roomFor(sizeBytes)
  const open = (context: LayerContext): SwapPlace =>
    new SwapPlace(
      {
        file: new SimulatedDisk(world, basePageSize + roomBytes, traits.survives !== 'nothing'),
        traits,
        from: basePageSize,
        roomBytes,
        slots: false,
        bytesPerHour: undefined,
      },
      context,
    )
  return { name: 'frontswap', place: { traits, open } }
}

function poolOf(store: PageStore, attributes: { persistent?: boolean; shared?: boolean; client?: number } = {}): Pool {
  const { persistent = true, shared = false, client = 0 } = attributes
  const pool = store.newPool({ client, persistent, shared, pageSize: basePageSize })
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return pool
}

const random = new Random(5, 5)
const stock = Uint8Array.from({ length: 2 ** 20 }, () => random.word())
/** A page that does not shrink. */
function noise(): Uint8Array {
  const from = random.below(stock.length - basePageSize)
  return stock.slice(from, from + basePageSize)
}

/** Lets all transfers that are under way end. */
async function settle(world: World): Promise<void> {
  for (let left = 100; left > 0; left--) {
    world.events.pass(1000)
    await new Promise((resolve) => setImmediate(resolve))
    if (world.events.pending === 0) return
  }
  throw new Error('it does not come to rest')
}

test('two fetches of one private ephemeral page: one has it', async () => {
  const world = newWorld()
  const store = compose([swap(world, 64 * 1024, { ephemeral: true })])
  const pool = poolOf(store, { persistent: false })
  const page = noise()
  expect(pool.put(1, 1, page)).toBe(PutOutcome.Stored)
  const into = [new Uint8Array(basePageSize), new Uint8Array(basePageSize)] as const
  const fetches = Promise.all(into.map((buffer) => pool.fetch(1, 1, buffer)))
  await settle(world)
  expect((await fetches).toSorted((a, b) => a - b)).toEqual([GetOutcome.Hit, GetOutcome.Miss])
  store.check!()
  await store.close()
})

test('a failed read of a page that another fetch has brought up is no failure', async () => {
  const world = newWorld()
  const store = compose([memory({ limitBytes: 64 * 1024 }), swap(world, 256 * 1024)])
  const pool = poolOf(store)
  const pages = Array.from({ length: 40 }, noise)
  for (const [index, page] of pages.entries()) expect(pool.put(1, index, page)).toBe(PutOutcome.Stored)
  await settle(world)
  const sunk = pages.findIndex((_, index) => pool.get(1, index, new Uint8Array(basePageSize)) === GetOutcome.Deferred)
  const first = new Uint8Array(basePageSize)
  const second = new Uint8Array(basePageSize)
  const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
  const one = pool.fetch(1, sunk, first)
  const other = pool.fetch(1, sunk, second)
  await turn()
  // The transfer that ends first succeeds, the other one does not.
  expect(world.events.pending).toBe(2)
  world.events.pass(world.events.untilNext)
  await turn()
  world.faulty = true
  world.outageUntil = Number.POSITIVE_INFINITY
  await settle(world)
  expect([await one, await other]).toEqual([GetOutcome.Hit, GetOutcome.Hit])
  expect([first, second]).toEqual([pages[sunk], pages[sunk]])
  expect(world.readErrors).toBe(1)
  world.faulty = false
  await store.close()
})

test('what a full swap file refuses goes to the next one, alone and in a batch', async () => {
  const world = newWorld()
  const store = compose([swap(world, 16 * basePageSize), swap(world, 1024 * basePageSize)])
  const pool = poolOf(store)
  const pages = Array.from({ length: 400 }, noise)
  for (let index = 0; index < 300; index++) expect(pool.put(1, index, pages[index]!)).toBe(PutOutcome.Stored)
  const batch = new PageBatch(100)
  for (let index = 300; index < 400; index++) {
    const entry = batch.push(1, index)
    batch.page(entry).set(pages[index]!)
  }
  expect(pool.putMany(batch)).toBe(100)
  store.check!()
  const into = new Uint8Array(basePageSize)
  for (const index of [0, 299, 300, 399]) {
    const fetch = pool.fetch(1, index, into)
    await settle(world)
    expect(await fetch).toBe(GetOutcome.Hit)
    expect(into).toEqual(pages[index])
  }
  await store.close()
})

test('a page that waits to be written with its batch is there for an allocator that uses the stack', async () => {
  const world = newWorld()
  let whileAllocating = (): void => undefined
  const allocator: Allocator = {
    allocate: (bytes, site) => {
      whileAllocating()
      return systemAllocator.allocate(bytes, site)
    },
  }
  const store = compose([memory({ limitBytes: 256 * 1024 }), swap(world, 256 * 1024)], {
    allocator,
    accounts: createAccounts({ maximumBytes: 8192 }),
  })
  // The client's quota keeps all but the first page out of memory; another client's put asks for a chunk.
  const pool = poolOf(store)
  const other = poolOf(store, { client: 1 })
  const into = new Uint8Array(basePageSize)
  const answers: number[] = []
  const batch = new PageBatch(8)
  for (let index = 0; index < 8; index++) {
    const entry = batch.push(1, index)
    batch.page(entry).set(noise())
  }
  whileAllocating = () => {
    answers.push(pool.get(1, 5, into))
    pool.flushPage(1, 6)
  }
  expect(pool.putMany(batch)).toBe(8)
  whileAllocating = () => undefined
  expect(other.put(1, 1, noise())).toBe(PutOutcome.Stored)
  store.check!()
  await store.close()
})

test('a directory that is full of pages that may vanish takes one that may not', async () => {
  const world = newWorld()
  const store = compose([memory({ limitBytes: 64 * 1024 }), swap(world, 16 * basePageSize)])
  const kept = poolOf(store)
  const lost = poolOf(store, { persistent: false })
  for (let index = 0; index < 16; index++) {
    expect(kept.put(1, index, noise())).toBe(PutOutcome.Stored)
    store.tick({ pages: 64 })
    await settle(world)
  }
  for (let index = 0; index < 64; index++) lost.put(1, index, noise())
  for (let index = 16; index < 24; index++) expect(kept.put(1, index, noise())).toBe(PutOutcome.Stored)
  store.check!()
  await store.close()
})

test('memory takes pages, however many objects there are elsewhere', async () => {
  const world = newWorld()
  const store = compose([memory({ limitBytes: 64 * 1024 }), swap(world, 512 * basePageSize)])
  const pool = poolOf(store)
  for (let object = 0; object < 400; object++) {
    expect(pool.put(object, 0, noise())).toBe(PutOutcome.Stored)
    expect(pool.get(object, 0, new Uint8Array(basePageSize))).toBe(GetOutcome.Hit)
    await settle(world)
  }
  await store.close()
})

test('a swap file that finds no memory for its tables is closed', () => {
  const world = newWorld()
  const allocator: Allocator = {
    allocate: (bytes, site) => (site === 'frontswap.map' ? undefined : systemAllocator.allocate(bytes, site)),
  }
  expect(() => compose([swap(world, 64 * 1024)], { allocator })).toThrow(/no memory for the map/)
  expect(world.disks.map(({ isClosed }) => isClosed)).toEqual([true])
})

test.each(['read', 'write'] as const)('packing that cannot %s costs nobody a page', async (what) => {
  const world = newWorld({ [what === 'read' ? 'failedRead' : 'failedWrite']: 1000 })
  const store = compose([swap(world, 256 * basePageSize)])
  const pool = poolOf(store)
  const pages = new Map<number, Uint8Array>()
  for (let round = 0; round < 3; round++) {
    for (let index = 0; index < 250; index++) {
      const page = noise()
      if (pool.put(1, index, page) === PutOutcome.Stored) pages.set(index, page)
      else pages.delete(index)
    }
    // Every second page goes, so that what is free lies in pieces.
    for (let index = round % 2; index < 250; index += 2) {
      pool.flushPage(1, index)
      pages.delete(index)
    }
    world.faulty = what === 'read' || round % 2 === 0
  }
  world.faulty = false
  store.check!()
  const into = new Uint8Array(basePageSize)
  for (const [index, page] of pages) {
    const fetch = pool.fetch(1, index, into)
    await settle(world)
    expect(await fetch).toBe(GetOutcome.Hit)
    expect(into).toEqual(page)
  }
  await store.close()
})

test('many pages are fetched, one of which is damaged: all others are done', async () => {
  const layer = zcache({ limitBytes: 2 ** 20 })
  const { traits, open } = { traits: layer.place!.traits, open: (context: LayerContext) => layer.place!.open(context) }
  let damaged = -1
  const damaging = (context: LayerContext): Place => {
    const place = open(context) as MemoryPlace
    const get = place.get.bind(place)
    let gets = 0
    place.get = (location, into) => {
      get(location, into)
      // The second page that is asked for, and whenever it is asked for again.
      if (++gets === 2) damaged = location
      if (location === damaged) into.bytes[into.at] = into.bytes[into.at]! ^ 1
    }
    return place
  }
  const store = compose([{ name: 'zcache', place: { traits, open: damaging } }])
  const pool = poolOf(store)
  const batch = new PageBatch(3)
  for (let index = 0; index < 3; index++) {
    expect(pool.put(1, index, noise())).toBe(PutOutcome.Stored)
    batch.push(1, index)
  }
  await expect(pool.fetchMany!(batch)).rejects.toMatchObject({ code: 'TMEM_CORRUPT' })
  expect([...batch.outcomes]).toEqual([GetOutcome.Hit, Pending, GetOutcome.Hit])
  await store.close()
})

test('what is spoilt on a disk is so where it was moved to, and not any more when it was written anew', () => {
  const world = newWorld({ rotten: 1000 })
  const disk = new SimulatedDisk(world, 4 * basePageSize, false)
  const page = noise()
  world.faulty = true
  disk.writeNow(page, 0, basePageSize, 0)
  world.faulty = false
  const damaged = new Uint8Array(basePageSize)
  const damagedReadsAt = (position: number): number => {
    const before = world.damagedReads
    disk.readNow(damaged, 0, basePageSize, position)
    return world.damagedReads - before
  }
  expect(damagedReadsAt(0)).toBe(1)
  expect(damaged).not.toEqual(page)
  // A place packs without a look into frames.
  disk.writeNow(damaged, 0, basePageSize, 2 * basePageSize)
  expect([damagedReadsAt(2 * basePageSize), damagedReadsAt(2 * basePageSize)]).toEqual([1, 1])
  disk.writeNow(page, 0, basePageSize, 2 * basePageSize)
  expect(damagedReadsAt(2 * basePageSize)).toBe(0)
})

test('an ephemeral page whose copy had to go while it was passed down is dropped', async () => {
  const world = newWorld()
  let isFull = false
  /** A layer whose place is changed as it opens. */
  const changed = <P extends Place>({ name, place }: Layer, change: (place: P) => void): Layer => {
    const open = (context: LayerContext): Place => {
      const opened = place!.open(context)
      change(opened as P)
      return opened
    }
    return { name, place: { traits: place!.traits, open } }
  }
  const middle = changed(zcache({ limitBytes: 2 ** 20 }), (place: MemoryPlace) => {
    const put = place.put.bind(place)
    place.put = (block, owner) => (isFull ? -PutOutcome.NoMemory : put(block, owner))
  })
  const below = changed(swap(world, 64 * 1024, { ephemeral: true }), (place: SwapPlace) => {
    const writeNow = place.writeNow.bind(place)
    place.writeNow = (flight) => {
      if (!isFull) writeNow(flight)
    }
  })
  const store = compose([memory({ limitBytes: 64 * 1024 }), middle, below])
  const pool = poolOf(store, { persistent: false, shared: true })
  // One page in memory with a copy in the swap file, and one in the place between.
  const page = noise()
  expect(pool.put(1, 0, page)).toBe(PutOutcome.Stored)
  const sunk = pool.sink!(1, Uint32Array.of(0), 1, true)
  await settle(world)
  await sunk
  const into = new Uint8Array(basePageSize)
  const fetched = pool.fetch(1, 0, into)
  await settle(world)
  expect([await fetched, into]).toEqual([GetOutcome.Hit, page])
  expect(pool.put(1, 1, noise())).toBe(PutOutcome.Stored)
  await pool.sink!(1, Uint32Array.of(1), 1, false)
  // The place between makes room in vain: the swap file has none, so the copy is given up.
  isFull = true
  for (let index = 2; index < 20; index++) expect(pool.put(1, index, noise())).toBe(PutOutcome.Stored)
  store.check!()
  expect(pool.get(1, 0, into)).toBe(GetOutcome.Miss)
  await store.close()
})

test('close waits for a sync, and one that comes later says so', async () => {
  const world = newWorld()
  const store = compose([swap(world, 64 * 1024, { survives: 'process' })])
  expect(poolOf(store).put(1, 1, noise())).toBe(PutOutcome.Stored)
  const sync = store.sync!()
  const closed = store.close()
  const late = store.sync!()
  const answers = Promise.allSettled([sync, closed, late])
  await settle(world)
  const [first, second, third] = await answers
  expect([first.status, second.status]).toEqual(['fulfilled', 'fulfilled'])
  expect(third).toMatchObject({ status: 'rejected', reason: { code: 'TMEM_CLOSED' } })
  expect(world.violation).toBeUndefined()
})
