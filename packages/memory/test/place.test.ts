/**
 * Frames of plain memory as a place: blocks keep their bytes while they move, and memory comes and goes as the limit
 * says.
 */
import type { Allocator, MemoryPlace, PageStore, Pool } from '@tmem/core'
import {
  Block,
  ByteLimit,
  compose,
  createAccounts,
  GetOutcome,
  PutOutcome,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { describe, expect, test } from 'vitest'
import { memory } from '../src/memory.ts'

const KiB = 1024
const MiB = 1024 * KiB
const { Stored, NoMemory, AllocationFailed } = PutOutcome

/**
 * A place, and what a chain does with it: blocks of one kind, by the number of their owner, filled with that number.
 */
class World {
  readonly place: MemoryPlace
  readonly limit: ByteLimit
  readonly blocks: Map<number, { location: number; length: number }> = new Map()
  readonly #block = new Block()
  #owner = 0

  constructor(limitBytes: number, allocator: Allocator = systemAllocator) {
    this.limit = new ByteLimit(limitBytes)
    const { place } = memory({ limitBytes: this.limit })
    this.place = place!.open({ allocator, accounts: createAccounts() }) as MemoryPlace
  }

  /** Puts a block, out of the middle of a buffer: 0, or the refusal. */
  put(length = 4096, prepares = true): number {
    if (prepares) this.place.prepare!(length)
    const owner = ++this.#owner
    const block = this.#block
    block.bytes = new Uint8Array(length + 100).fill(owner, 50, 50 + length)
    block.at = 50
    block.length = length
    block.pageBytes = length
    block.persistent = true
    const location = this.place.put(block, owner)
    if (location < 0) return -location
    this.blocks.set(owner, { location, length })
    return Stored
  }

  free(owner: number): void {
    const { location, length } = this.blocks.get(owner)!
    this.place.free(location, length, length)
    this.blocks.delete(owner)
  }

  compact(blocks: number): number {
    return this.place.compact!(blocks, (owner, location) => {
      this.blocks.get(owner)!.location = location
    })
  }

  /** Throws unless every block is what it was, and nothing else is there. */
  check(): void {
    let owned = 0
    this.place.check!((owner, location) => {
      owned++
      return this.blocks.get(owner)?.location === location
    })
    if (owned !== this.blocks.size) throw new Error(`${owned} blocks, not ${this.blocks.size}`)
    for (const [owner, { location, length }] of this.blocks) {
      const into = this.#block
      into.bytes = new Uint8Array(length + 6).fill(0xee)
      into.at = 3
      into.length = length
      this.place.get(location, into)
      const [before, after] = [into.bytes[2], into.bytes[length + 3]]
      if (before !== 0xee || after !== 0xee) throw new Error(`block ${owner} was read beyond its ends`)
      if (!into.bytes.subarray(3, length + 3).every((byte) => byte === (owner & 0xff)))
        throw new Error(`block ${owner} is not what it was`)
    }
  }

  get counters(): Readonly<Record<string, number>> {
    return this.place.stats().counters
  }
}

test.each([4, 8, 16, 32, 64])(
  'blocks of %i KiB keep their bytes; as many fit as were promised, and no more',
  (size) => {
    const world = new World(4 * MiB)
    const room = Math.floor(world.place.traits.reservedBytes / (size * KiB))
    for (let i = 0; i < room; i++) expect(world.put(size * KiB)).toBe(Stored)
    expect(world.put(size * KiB)).toBe(NoMemory)
    world.check()
    expect(world.counters['used_bytes']).toBeLessThanOrEqual(4 * MiB)
    expect(world.place.sizeOf(size * KiB)).toBe(size * KiB)
    world.free(3)
    world.free(room)
    expect([world.put(size * KiB), world.put(size * KiB), world.put(size * KiB)]).toEqual([Stored, Stored, NoMemory])
    world.check()
  },
)

test('blocks of all sizes side by side', () => {
  const world = new World(8 * MiB)
  for (let i = 0; i < 300; i++) {
    expect(world.put((4 * KiB) << (i % 5))).toBe(Stored)
    if (i % 3 === 0) world.free(i + 1)
    if (world.place.excess() > 0) for (const owner of [...world.blocks.keys()].slice(0, 20)) world.free(owner)
  }
  world.check()
  while (world.compact(1000) > 0) world.check()
  world.check()
})

test('memory is asked for in prepare alone, for as many bytes as are to come', () => {
  const sites: string[] = []
  let refuses = false
  const world = new World(32 * MiB, {
    allocate: (bytes, site) => {
      sites.push(site)
      return refuses ? undefined : systemAllocator.allocate(bytes, site)
    },
  })
  sites.length = 0
  expect(world.put(4096, false)).toBe(AllocationFailed)
  expect(sites).toEqual([])
  refuses = true
  expect(world.put()).toBe(AllocationFailed)
  expect(sites).toEqual(['memory.chunk'])
  expect(world.counters['refused_allocation']).toBe(1)
  refuses = false
  expect(world.put()).toBe(Stored)
  const chunk = world.counters['used_bytes']! - world.counters['metadata_bytes']!
  sites.length = 0
  world.place.prepare!(chunk)
  expect(sites).toEqual(['memory.chunk'])
  for (let i = 0; i < chunk / 4096; i++) expect(world.put(4096, false)).toBe(Stored)
  world.check()
})

test('an allocator may use the place while it looks for memory', () => {
  const opened: { world?: World } = {}
  const inside: number[] = []
  let busy = false
  const world = new World(8 * MiB, {
    allocate: (bytes, site) => {
      if (site === 'memory.chunk' && !busy) {
        busy = true
        // Both find the same chunk absent.
        inside.push(opened.world!.put(), opened.world!.put(64 * KiB))
        busy = false
      }
      return systemAllocator.allocate(bytes, site)
    },
  })
  opened.world = world
  for (let i = 0; i < 500; i++) expect(world.put()).toBe(Stored)
  expect(inside.length).toBeGreaterThan(2)
  expect(new Set(inside)).toEqual(new Set([Stored]))
  world.check()
})

describe('moving blocks together', () => {
  test.each([
    ['the garbage collector finds them', false],
    ['they are given back to the allocator', true],
  ])('gives chunks back: %s', (_, gives) => {
    const given: ArrayBufferLike[] = []
    const world = new World(16 * MiB, {
      allocate: (bytes, site) => systemAllocator.allocate(bytes, site),
      ...(gives ? { free: (chunk: ArrayBufferLike) => void given.push(chunk) } : {}),
    })
    for (let i = 0; i < 3500; i++) world.put((4 * KiB) << (i % 100 === 0 ? 2 : 0))
    const before = world.counters['chunks']!
    for (const owner of Array.from(world.blocks.keys())) if (owner % 10 !== 3) world.free(owner)
    for (let rounds = 0; world.compact(50) > 0; rounds++) {
      if (rounds > 100) throw new Error('it never ends')
      world.check()
    }
    const { chunks, moved_pages } = world.counters
    expect(chunks).toBeLessThanOrEqual(2)
    expect(moved_pages).toBeGreaterThan(50)
    expect(given.length).toBe(gives ? before - chunks! : 0)
    world.check()
  })

  test('moves no more at once than it may', () => {
    const world = new World(16 * MiB)
    for (let i = 0; i < 3500; i++) world.put()
    for (const owner of Array.from(world.blocks.keys())) if (owner % 3 !== 0) world.free(owner)
    for (let left = 1; left < 40; left += 3) expect(world.compact(left)).toBeLessThanOrEqual(left)
    world.check()
  })

  test('where all memory was taken ahead it stays', () => {
    let asked = 0
    const world = new World(8 * MiB, {
      ahead: true,
      allocate: (bytes, site) => {
        asked++
        return systemAllocator.allocate(bytes, site)
      },
    })
    const begun = asked
    for (let i = 0; i < 1900; i++) expect(world.put()).toBe(Stored)
    for (const owner of Array.from(world.blocks.keys())) if (owner % 10 !== 3) world.free(owner)
    expect(world.compact(1000)).toBe(0)
    for (let i = 0; i < 1500; i++) expect(world.put()).toBe(Stored)
    expect(asked).toBe(begun)
    world.check()
  })
})

test('a lowered limit: too much is here, nothing more is taken, and what leaves takes its chunks along', () => {
  const world = new World(16 * MiB)
  for (let i = 0; i < 3500; i++) world.put()
  expect(world.place.excess()).toBeLessThanOrEqual(0)
  world.limit.bytes = 4 * MiB
  const excess = world.place.excess()
  expect(excess).toBeGreaterThan(9 * MiB)
  expect(world.put()).toBe(NoMemory)
  for (const owner of [...world.blocks.keys()].slice(0, excess / 4096)) world.free(owner)
  expect(world.place.excess()).toBe(0)
  while (world.compact(1000) > 0);
  // In whole chunks of 2 MiB.
  expect(world.counters['used_bytes']).toBeLessThan(6 * MiB)
  world.check()
  world.limit.bytes = 0
  expect(world.put()).toBe(NoMemory)
  world.limit.bytes = 16 * MiB
  for (let i = 0; i < 2000; i++) expect(world.put()).toBe(Stored)
  world.check()
})

test('metadata has room for an object a page', () => {
  const world = new World(4 * MiB)
  const pages = world.place.traits.reservedBytes / 4096
  expect(world.place.charge(pages * 103)).toBe(true)
  expect(world.place.charge(pages * 103)).toBe(false)
  expect(world.counters).toMatchObject({ directory_bytes: pages * 103 })
  for (let i = 0; i < pages; i++) expect(world.put()).toBe(Stored)
  expect(world.counters['used_bytes']).toBeLessThanOrEqual(4 * MiB)
})

test('every table that cannot be had is an error that says what to do', () => {
  const sites = new Set<string>()
  const noting: Allocator = {
    allocate: (bytes, site) => {
      sites.add(site)
      return systemAllocator.allocate(bytes, site)
    },
  }
  void new World(MiB, noting)
  expect(sites.size).toBe(3)
  for (const failing of sites) {
    const allocator: Allocator = {
      allocate: (bytes, site) => (site === failing ? undefined : systemAllocator.allocate(bytes, site)),
    }
    const opening = (): World => new World(MiB, allocator)
    expect(opening).toThrow(TmemError)
    expect(opening).toThrow(new RegExp(`no memory for ${failing} .*: give a smaller limit`))
  }
})

describe('in a stack', () => {
  const poolOf = (store: PageStore): Pool => {
    const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
    return pool
  }

  test('what all places reserve is there, whatever is put over it', async () => {
    const accounts = createAccounts()
    const store = compose([memory({ limitBytes: MiB }), memory({ limitBytes: 3 * MiB })], { accounts, check: 'model' })
    const pool = poolOf(store)
    const pages = store.capabilities.reservedBytes / 4096
    const page = new Uint8Array(4096)
    const put = (index: number, seed: number): PutOutcome => {
      // No page repeats itself, so that each takes a frame.
      for (let i = 0; i < 4096; i += 4) page[i] = (seed * 31 + i * (i >> 5)) & 0xff
      page[0] = seed & 0xff
      return pool.put(0, index, page)
    }
    const held = new Map<number, number>()
    for (let i = 0; i < pages; i++) {
      expect(put(i, i)).toBe(Stored)
      held.set(i, i)
    }
    let state = 1
    for (let n = 0; n < 3 * pages; n++) {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0
      const index = (state >>> 8) % pages
      expect(put(index, n)).toBe(Stored)
      held.set(index, n)
      if (n % 16 === 0) store.tick({ pages: 64 })
    }
    store.check!()
    for (const [index, seed] of held) {
      expect(pool.get(0, index, page)).toBe(GetOutcome.Hit)
      expect(page[0]).toBe(seed & 0xff)
    }
    pool.destroy()
    store.check!()
    expect(accounts.charged(0)).toBe(0)
    await store.close()
  })
})
