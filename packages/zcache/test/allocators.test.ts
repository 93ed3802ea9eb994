/** The finders of places, alone: random sequences, contents that stay what they were, invariants. */
import { ByteLimit, systemAllocator } from '@tmem/core'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { random } from '../../../tools/random.ts'
import { Arena, ByteBudget, none, type ZAllocator } from '../src/arena.ts'
import { xvmalloc, zbud } from '../src/history.ts'
import { Zsmalloc } from '../src/zsmalloc.ts'
import { MiB } from './pages.ts'

const makers: readonly [string, (arena: Arena) => ZAllocator][] = [
  ['zsmalloc', (arena) => new Zsmalloc(arena)],
  ['xvmalloc', xvmalloc],
  ['zbud of generation 1', (arena) => zbud(arena, 1)],
  ['zbud of generation 2', zbud],
]

/** An allocator, what is in it, and the operations of a caller that fills each object with its owner's number. */
class World {
  readonly arena: Arena
  readonly allocator: ZAllocator
  readonly objects: Map<number, { location: number; size: number }> = new Map()
  next = 1

  constructor(make: (arena: Arena) => ZAllocator, limit: number) {
    this.arena = new Arena(systemAllocator, new ByteBudget(new ByteLimit(limit)))
    this.allocator = make(this.arena)
  }

  alloc(size: number): boolean {
    const { allocator } = this
    this.arena.preload(allocator.longestRun, allocator.longestRun)
    const owner = this.next
    const location = allocator.alloc(size, owner)
    if (location === none) return false
    this.next++
    allocator.locate(location)
    for (let i = 0; i < size; i++) allocator.bytes[allocator.at + i] = owner + i
    this.objects.set(owner, { location, size })
    return true
  }

  free(nth: number): void {
    const owner = [...this.objects.keys()][nth % this.objects.size]
    if (owner === undefined) return
    this.allocator.free(this.objects.get(owner)!.location)
    this.objects.delete(owner)
  }

  compact(objects: number): number {
    const moved = this.allocator.compact(objects, (owner, to) => {
      this.objects.get(owner)!.location = to
    })
    const runs = this.arena.compact(objects)
    if (moved > objects || runs > objects) throw new Error(`${moved} and ${runs} moved, allowed were ${objects}`)
    return moved + runs
  }

  check(): void {
    const { allocator, objects } = this
    const runs = new Set<number>()
    let owned = 0
    allocator.check((owner, location) => {
      owned++
      return objects.get(owner)?.location === location
    }, runs)
    this.arena.check(runs)
    if (owned !== objects.size) throw new Error(`${objects.size} objects, ${owned} owned`)
    let slots = 0
    for (const [owner, { location, size }] of objects) {
      allocator.locate(location)
      slots += allocator.slotSize(size)
      const { bytes, words, at } = allocator
      if (at % 4 !== 0 || words.buffer !== bytes.buffer) throw new Error(`object ${owner} is not where words are`)
      for (let i = 0; i < size; i++)
        if (bytes[at + i] !== ((owner + i) & 0xff)) throw new Error(`byte ${i} of object ${owner} was changed`)
    }
    if (allocator.slotBytes !== slots) throw new Error(`${slots} bytes in slots, counted ${allocator.slotBytes}`)
  }
}

test.each(makers)('%s: any sequence keeps contents and invariants', (_name, make) => {
  const operation = fc.oneof(
    { weight: 6, arbitrary: fc.record({ alloc: fc.integer({ min: 1, max: 3900 }) }) },
    {
      weight: 2,
      arbitrary: fc.record({ alloc: fc.constantFrom(1, 27, 28, 29, 64, 2016, 2017, 2048, 3840, 3904, 4000) }),
    },
    { weight: 5, arbitrary: fc.record({ free: fc.nat(10_000) }) },
    { weight: 1, arbitrary: fc.record({ compact: fc.nat(40) }) },
  )
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 400, size: 'max' }), (operations) => {
      const world = new World(make, MiB)
      for (const each of operations) {
        if ('alloc' in each) {
          if (each.alloc <= world.allocator.maxSize) world.alloc(each.alloc)
        } else if ('free' in each) world.free(each.free)
        else world.compact(each.compact)
      }
      world.check()
      while (world.objects.size > 0) world.free(0)
      world.check()
      expect(world.arena.usedGranules).toBe(0)
      world.arena.trim()
      expect(world.arena.chunks).toBe(0)
    }),
    { numRuns: 40, seed: 3 },
  )
})

test.each(makers)('%s: what is full says so, and takes again what was freed', (_name, make) => {
  const world = new World(make, MiB)
  const size = Math.min(1700, world.allocator.maxSize)
  while (world.alloc(size));
  const full = world.objects.size
  // At least every second frame's worth of the chunks is in use by objects.
  expect(full * size).toBeGreaterThan((world.arena.chunks * world.arena.chunkBytes) / 2)
  for (let i = 0; i < 50; i++) world.free(i * 7)
  for (let i = 0; i < 50; i++) expect(world.alloc(size)).toBe(true)
  expect(world.alloc(size)).toBe(false)
  expect(world.objects.size).toBe(full)
  world.check()
})

test('zsmalloc: compaction leaves one zspage per class that is not full, and the arena no chunk that it could empty', () => {
  const world = new World((arena) => new Zsmalloc(arena), 16 * MiB)
  const next = random(11)
  while (world.alloc(200 + Math.floor(next() * 3400)));
  for (const owner of Array.from(world.objects.keys()))
    if (next() < 0.9) {
      world.allocator.free(world.objects.get(owner)!.location)
      world.objects.delete(owner)
    }
  const before = world.arena.chunks
  for (let rounds = 0; world.compact(100) > 0; rounds++) expect(rounds).toBeLessThan(500)
  world.check()
  world.arena.trim()
  const bytes = world.arena.chunks * world.arena.chunkBytes
  expect(before * world.arena.chunkBytes).toBeGreaterThan(7 * bytes)
  // Half a zspage per class and half a chunk are what may be left over.
  expect(bytes - world.allocator.slotBytes).toBeLessThan(1.2 * MiB)
})

test('zsmalloc: a raw page and its neighbours in size share zspages; larger objects have their own', () => {
  const world = new World((arena) => new Zsmalloc(arena), 2 * MiB)
  for (const size of [4095, 4096, 4124, 4125, 10_000, 65_536]) expect(world.alloc(size)).toBe(true)
  expect(world.allocator.stats().counters).toMatchObject({ large_objects: 3 })
  expect(world.allocator.slotSize(65_536)).toBe(65_664)
  world.check()
  while (world.objects.size > 0) world.free(0)
  world.check()
})

test('zbud: the limits of both generations, and who shares a frame', () => {
  for (const [generation, largest] of [
    [1, 3904],
    [2, 4000],
  ] as const) {
    const world = new World((arena) => zbud(arena, generation), MiB)
    const { allocator } = world
    expect(allocator.maxSize).toBe(largest)
    expect(world.alloc(largest)).toBe(true)
    // Nothing fits beside the largest but one unit; the fullest partner with room is taken first.
    for (const size of [1000, 2000, 3000]) expect(world.alloc(size)).toBe(true)
    expect(allocator.stats().counters).toMatchObject({ pageframes: 3, zpages: 4, buddied_count: 1 })
    expect(world.alloc(900)).toBe(true)
    expect(allocator.stats().counters).toMatchObject({ pageframes: 3, buddied_count: 2 })
    world.check()
    const [, first, second] = [...world.objects.values()]
    // The same frame, the other end of it.
    expect(first!.location ^ second!.location).toBe(1)
    world.free(3)
    world.check()
  }
})

test('xvmalloc: cut and merged to the byte', () => {
  const world = new World(xvmalloc, MiB)
  const { allocator } = world
  expect(allocator.maxSize).toBe(4088)
  expect([allocator.slotSize(1), allocator.slotSize(28), allocator.slotSize(29), allocator.slotSize(1000)]).toEqual([
    36, 36, 40, 1008,
  ])
  // Three blocks of 1012 bytes in a frame of 4096; the rest is one free block.
  for (const size of [1004, 1004, 1004]) expect(world.alloc(size)).toBe(true)
  expect(allocator.stats().counters).toMatchObject({ pageframes: 1, free_blocks: 1 })
  world.free(1)
  expect(allocator.stats().counters).toMatchObject({ pageframes: 1, free_blocks: 2 })
  world.check()
  world.free(1)
  expect(allocator.stats().counters).toMatchObject({ pageframes: 1, free_blocks: 1 })
  expect(world.alloc(4096 - 1012 - 4 - 4)).toBe(true)
  expect(allocator.stats().counters).toMatchObject({ pageframes: 1, free_blocks: 0 })
  world.check()
  // Above half a frame no two fit.
  expect(world.alloc(2100)).toBe(true)
  expect(world.alloc(2100)).toBe(true)
  expect(allocator.stats().counters['pageframes']).toBe(3)
})

test('the arena: budget, allocator and preloading', () => {
  const limit = new ByteLimit(MiB)
  const budget = new ByteBudget(limit)
  let refuse = true
  const sites: string[] = []
  const arena = new Arena(
    {
      allocate: (bytes, site) => {
        sites.push(site)
        return refuse && site === 'zcache.chunk' ? undefined : systemAllocator.allocate(bytes, site)
      },
    },
    budget,
  )
  const before = budget.used
  arena.preload(4096, 4096)
  expect([arena.refusedByAllocator, arena.failures, arena.take(32, 1), budget.used]).toEqual([true, 1, none, before])
  refuse = false
  arena.preload(4096, 4096)
  expect([arena.refusedByAllocator, arena.chunks, budget.used - before]).toEqual([false, 1, arena.chunkBytes])
  const run = arena.take(32, 1)
  expect(run).toBe(0)
  const allocations = sites.length
  // A chunk with enough room is enough.
  arena.preload(4096, 4096)
  expect(sites.length).toBe(allocations)
  arena.preload(4096, 300_000)
  expect(arena.spares).toBe(3)
  limit.bytes = 0
  arena.preload(4096, 4 * MiB)
  expect(arena.chunks).toBe(4)
  arena.free(run)
  arena.trim()
  expect([arena.chunks, arena.usedGranules]).toEqual([0, 0])
  arena.check(new Set())
  // What was known to be free is not, when its chunk was given back.
  limit.bytes = MiB
  arena.preload(4096, 4096)
  arena.preload(4096, 4096)
  expect(arena.chunks).toBe(1)
  arena.trim()
  arena.preload(4096, 4096)
  expect(arena.chunks).toBe(1)
})

test('the arena: an empty chunk stays for the next puts, unless its bytes are needed for a table', () => {
  const arena = new Arena(systemAllocator, new ByteBudget(new ByteLimit(MiB)))
  const { limit } = arena.budget
  arena.preload(4096, 600_000)
  const runs = Array.from({ length: 100 }, () => arena.take(32, 1))
  const { chunks } = arena
  for (const run of runs) arena.free(run)
  expect([arena.chunks, arena.spares, arena.chunksReturned]).toEqual([chunks, chunks, 0])
  const left = limit.bytes - arena.budget.used
  expect(arena.charge(left)).toBe(true)
  expect(arena.chunks).toBe(chunks)
  expect(arena.charge(1)).toBe(true)
  expect([arena.chunks, arena.chunksReturned]).toEqual([0, chunks])
  expect(arena.charge(limit.bytes)).toBe(false)
  arena.check(new Set())
})

test('zsmalloc: a million random operations', () => {
  const limit = new ByteLimit(16 * MiB)
  const arena = new Arena(systemAllocator, new ByteBudget(limit))
  const zsmalloc = new Zsmalloc(arena)
  const next = random(2)
  // By owner: location and size of what is there; owners are used again.
  const locations = new Float64Array(12_000).fill(none)
  const sizes = new Int32Array(locations.length)
  const moved = (owner: number, to: number): void => {
    locations[owner] = to
  }
  const stampOf = (owner: number): number => Math.imul(owner + 1, 0x9e3779b1)
  for (let step = 0; step < 1_000_000; step++) {
    const owner = Math.floor(next() * locations.length)
    const location = locations[owner]!
    if (location === none) {
      const size = 8 + Math.floor(next() * next() * 4088)
      arena.preload(zsmalloc.longestRun, zsmalloc.longestRun)
      const place = zsmalloc.alloc(size, owner)
      if (place === none) continue
      locations[owner] = place
      sizes[owner] = size
      zsmalloc.locate(place)
      zsmalloc.words[zsmalloc.at >>> 2] = stampOf(owner)
      zsmalloc.words[(zsmalloc.at + size - 4) >>> 2] = stampOf(owner)
    } else {
      zsmalloc.locate(location)
      const { words, at } = zsmalloc
      if (words[at >>> 2] !== stampOf(owner) || words[(at + sizes[owner]! - 4) >>> 2] !== stampOf(owner))
        throw new Error(`object ${owner} is not what it was`)
      zsmalloc.free(location)
      locations[owner] = none
    }
    if (step % 500 === 0) {
      zsmalloc.compact(100, moved)
      arena.compact(100)
    }
    if (step % 100_000 === 99_999) {
      const runs = new Set<number>()
      zsmalloc.check((each, place) => locations[each] === place, runs)
      arena.check(runs)
    }
  }
  expect(zsmalloc.stats().counters['objects_moved']).toBeGreaterThan(10_000)
  expect(arena.runsMoved).toBeGreaterThan(1000)
  expect(arena.budget.used).toBeLessThanOrEqual(16 * MiB)
})
