import assert from 'node:assert/strict'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { systemAllocator } from '../src/context.ts'
import { HandleTable, maxEntries, none } from '../src/handles.ts'
import { TmemError } from '../src/outcomes.ts'
import type { ObjectId } from '../src/store.ts'
import { maxObjectId } from '../src/store.ts'

const table = (capacity: number, queues = 2, pools = 4): HandleTable =>
  HandleTable.create({ capacity, queues, pools, allocator: systemAllocator, site: 'test' })

/** Ids around every boundary that an implementation in 32-bit words could trip over. */
const ids: readonly ObjectId[] = [
  0,
  0n,
  1,
  5,
  5n,
  0x7fffffff,
  0x80000000,
  0xffffffff,
  2 ** 32,
  2 ** 32 + 5,
  2n ** 32n + 5n,
  2 ** 52,
  Number.MAX_SAFE_INTEGER,
  BigInt(Number.MAX_SAFE_INTEGER),
  2n ** 53n,
  2n ** 53n + 1n,
  2n ** 63n,
  2n ** 64n - 1n,
  2n ** 64n,
  2n ** 64n + 5n,
  2n ** 96n + 5n,
  2n ** 128n,
  2n ** 160n + 5n,
  2n ** 191n,
  maxObjectId,
]
const indexes: readonly number[] = [0, 1, 2, 511, 512, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff]

interface Known {
  readonly pool: number
  readonly object: bigint
  readonly index: number
  entry: number
  queue: number
}

/** The table beside a Map: every step does the same to both. */
class Pair {
  readonly real: HandleTable
  readonly known = new Map<string, Known>()
  readonly queues: Known[][]
  readonly free: number[] = []

  constructor(capacity: number, queues: number) {
    this.real = table(capacity, queues)
    this.queues = Array.from({ length: queues }, () => [])
  }

  static key(pool: number, object: ObjectId, index: number): string {
    return `${pool}:${BigInt(object)}:${index}`
  }

  insert(pool: number, object: ObjectId, index: number, queue: number): void {
    const key = Pair.key(pool, object, index)
    if (this.known.has(key)) return
    const entry = this.real.acquire()
    if (this.known.size === this.real.capacity) {
      assert.equal(entry, none)
      return
    }
    assert.ok(entry >= 0)
    assert.equal(this.real.insert(entry, pool, object, index), true)
    const page = { pool, object: BigInt(object), index, entry, queue }
    this.known.set(key, page)
    if (queue === none) return
    this.real.append(queue, entry)
    this.queues[queue].push(page)
  }

  remove(page: Known): void {
    if (page.queue !== none) {
      this.real.unlink(page.queue, page.entry)
      this.queues[page.queue].splice(this.queues[page.queue].indexOf(page), 1)
    }
    this.real.remove(page.entry)
    this.real.release(page.entry)
    this.known.delete(Pair.key(page.pool, page.object, page.index))
  }

  /** The page moves to another entry number, as when the store moves its bytes. */
  move(page: Known): void {
    const to = this.real.acquire()
    if (to === none) return
    this.real.move(page.entry, to, page.queue)
    this.real.release(page.entry)
    page.entry = to
  }

  toBack(page: Known): void {
    if (page.queue === none) return
    const queue = this.queues[page.queue]
    this.real.unlink(page.queue, page.entry)
    this.real.append(page.queue, page.entry)
    queue.push(...queue.splice(queue.indexOf(page), 1))
  }

  flushObject(pool: number, object: ObjectId): void {
    const pages = [...this.known.values()].filter((page) => page.pool === pool && page.object === BigInt(object))
    for (let left = pages.length; left > 0; left--) this.#removeEntry(this.real.firstOfObject(pool, object))
    assert.equal(this.real.firstOfObject(pool, object), none)
    assert.equal(this.real.hasObject(pool, object), false)
  }

  flushPool(pool: number): void {
    const pages = [...this.known.values()].filter((page) => page.pool === pool)
    for (let left = pages.length; left > 0; left--) this.#removeEntry(this.real.firstOfPool(pool))
    assert.equal(this.real.firstOfPool(pool), none)
  }

  #removeEntry(entry: number): void {
    const page = [...this.known.values()].find((one) => one.entry === entry)
    assert.ok(page !== undefined)
    this.remove(page!)
  }

  check(): void {
    const { real, known } = this
    assert.equal(real.size, known.size)
    const objects = new Set<string>()
    for (const page of known.values()) {
      objects.add(`${page.pool}:${page.object}`)
      assert.equal(real.find(page.pool, page.object, page.index), page.entry)
      assert.equal(real.poolOf(page.entry), page.pool)
      assert.equal(real.indexOf(page.entry), page.index)
      const object = real.objectOf(page.entry)
      assert.equal(BigInt(object), page.object)
      assert.equal(typeof object, page.object <= Number.MAX_SAFE_INTEGER ? 'number' : 'bigint')
    }
    assert.equal(real.objects, objects.size)
    for (const [number, queue] of this.queues.entries()) {
      assert.equal(real.queued(number), queue.length)
      let entry = real.oldest(number)
      for (const page of queue) {
        assert.equal(entry, page.entry)
        entry = real.newer(entry)
      }
      assert.equal(entry, none)
    }
  }
}

describe('the table of handles', () => {
  const pool = fc.nat(3)
  const object = fc.constantFrom(...ids)
  const index = fc.constantFrom(...indexes)
  const step = fc.oneof(
    { weight: 6, arbitrary: fc.record({ do: fc.constant('insert'), pool, object, index, pick: fc.nat(2) }) },
    {
      weight: 6,
      arbitrary: fc.record({
        do: fc.constantFrom('remove', 'move', 'toBack', 'find'),
        pool,
        object,
        index,
        pick: fc.nat(1000),
      }),
    },
    {
      weight: 1,
      arbitrary: fc.record({ do: fc.constantFrom('flushObject', 'flushPool'), pool, object, index, pick: fc.nat(0) }),
    },
  )

  test('does what a Map does, for every kind of id and index, with queues and moves', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 60 }),
        fc.array(step, { maxLength: 120, size: 'max' }),
        (capacity, steps) => {
          const pair = new Pair(capacity, 2)
          for (const one of steps) {
            const page = [...pair.known.values()][one.pick % Math.max(1, pair.known.size)]
            if (one.do === 'insert') pair.insert(one.pool, one.object, one.index, one.pick - 1)
            else if (one.do === 'flushObject') pair.flushObject(one.pool, one.object)
            else if (one.do === 'flushPool') pair.flushPool(one.pool)
            else if (one.do === 'find') {
              const known = pair.known.get(Pair.key(one.pool, one.object, one.index))
              assert.equal(pair.real.find(one.pool, one.object, one.index), known?.entry ?? none)
            } else if (page === undefined) continue
            else if (one.do === 'remove') pair.remove(page)
            else if (one.do === 'move') pair.move(page)
            else pair.toBack(page)
          }
          pair.check()
        },
      ),
      { seed: 20091201, numRuns: 150 },
    )
  })

  test('stays right when it is filled to the last entry, emptied and filled again', () => {
    const pair = new Pair(500, 1)
    for (let round = 0; round < 3; round++) {
      for (let i = 0; pair.known.size < 500; i++) pair.insert(i % 4, i * 7919 + round, (i * 2654435761) >>> 0, 0)
      pair.insert(0, 1, 1, 0)
      pair.check()
      for (const page of pair.known.values()) if ((page.entry + round) % 3 !== 0) pair.remove(page)
      pair.check()
      for (let pool = 0; pool < 4; pool++) pair.flushPool(pool)
      pair.check()
    }
    expect(pair.real.objectWatermark).toBe(500)
    expect(pair.real.entryWatermark).toBe(500)
  })

  test('5 and 5n name the same object; ids that differ in a single word do not', () => {
    const real = table(100)
    real.insert(real.acquire(), 0, 5, 7)
    expect(real.find(0, 5n, 7)).toBe(0)
    expect(real.hasObject(0, 5n)).toBe(true)
    for (let word = 1n; word < 6n; word++) expect(real.find(0, 5n + (1n << (32n * word)), 7)).toBe(none)
    for (let pool = 1; pool < 4; pool++) expect(real.find(pool, 5, 7)).toBe(none)
    expect(real.find(0, 5, 8)).toBe(none)
  })

  test('what is no object id is refused by name, whatever was looked up before', () => {
    const real = table(10)
    real.insert(real.acquire(), 0, 5, 0)
    for (const object of [-1, 0.5, 5.5, Number.NaN, 2 ** 53, Infinity, -5, -1n, maxObjectId + 1n, 2n ** 192n]) {
      expect(() => real.find(0, object, 0)).toThrow(RangeError)
      expect(() => real.insert(9, 0, object, 0)).toThrow(RangeError)
    }
    for (const object of ['5', undefined, null, {}]) {
      expect(() => real.find(0, object as unknown as number, 0)).toThrow(TypeError)
    }
    expect(real.size).toBe(1)
    expect(real.find(0, 5, 0)).toBe(0)
  })

  test('another view of the same memory sees everything at once', () => {
    const one = table(50)
    const other = HandleTable.attach(one.memory)
    for (let i = 0; i < 50; i++) {
      const [writer, reader] = i % 2 === 0 ? [one, other] : [other, one]
      const entry = writer.acquire()
      expect(writer.insert(entry, 1, 2n ** 100n, i)).toBe(true)
      writer.append(0, entry)
      expect(reader.find(1, 2n ** 100n, i)).toBe(entry)
      expect(reader.size).toBe(i + 1)
    }
    // What one has just looked up and the other removes must not be found by a shortcut.
    for (let i = 0; i < 50; i++) {
      const entry = one.find(1, 2n ** 100n, i)
      other.unlink(0, entry)
      other.remove(entry)
      expect(one.find(1, 2n ** 100n, i)).toBe(none)
    }
    expect(one.hasObject(1, 2n ** 100n)).toBe(false)
  })

  test('every allocation may fail, and says which', () => {
    const sites: string[] = []
    HandleTable.create({
      capacity: 10,
      allocator: {
        allocate: (bytes, site) => {
          sites.push(site)
          return systemAllocator.allocate(bytes, site)
        },
      },
      site: 'some',
    })
    expect(sites.length).toBeGreaterThan(0)
    for (const failing of sites) {
      let error: unknown
      try {
        HandleTable.create({
          capacity: 10,
          allocator: {
            allocate: (bytes, site) => (site === failing ? undefined : systemAllocator.allocate(bytes, site)),
          },
          site: 'some',
        })
      } catch (thrown) {
        error = thrown
      }
      expect(error).toBeInstanceOf(TmemError)
      expect((error as TmemError).code).toBe('TMEM_NO_MEMORY')
      expect(failing).toMatch(/^some\./)
    }
  })

  test('an impossible capacity is refused', () => {
    for (const capacity of [0, -1, 1.5, Number.NaN, maxEntries + 1]) expect(() => table(capacity)).toThrow(RangeError)
  })
})

describe('handles made to collide', () => {
  const capacity = 300
  /** First word that is set in a part of the table's memory: with a single page, its home. */
  const firstSet = (memory: ArrayBufferLike): number => new Int32Array(memory).findIndex((word) => word !== 0)

  /**
   * Handles whose home is that of the first or one of the `spread` words after it, found by watching an empty table.
   */
  const colliding = (
    part: 'slots' | 'objectSlots',
    spread: number,
    count: number,
  ): [object: number, index: number][] => {
    const real = table(capacity)
    const entry = real.acquire()
    const homeOf = (object: number, index: number): number => {
      assert.ok(real.insert(entry, 0, object, index))
      const home = firstSet(real.memory[part])
      real.remove(entry)
      // The index of a page that is gone may still stand there.
      new Int32Array(real.memory[part]).fill(0)
      return home
    }
    const handle = (i: number): [number, number] => (part === 'slots' ? [1, i] : [i, 0])
    // A window in the middle, so that the words do not wrap around inside of it.
    let start = 0
    while (homeOf(...handle(start)) < 50 || homeOf(...handle(start)) > 100) start++
    const home = homeOf(...handle(start))
    const found: [number, number][] = []
    for (let i = start; found.length < count; i++) {
      const at = homeOf(...handle(i))
      if (at >= home && at <= home + spread) found.push(handle(i))
    }
    return found
  }

  for (const part of ['slots', 'objectSlots'] as const)
    for (const spread of [0, 10])
      test(`${part}, ${spread} words apart: what finds no room changes nothing, and everything stays findable`, () => {
        const real = table(capacity)
        const inside: [object: number, index: number, entry: number][] = []
        const outside: [object: number, index: number][] = []
        const add = (object: number, index: number): void => {
          const entry = real.acquire()
          if (real.insert(entry, 0, object, index)) inside.push([object, index, entry])
          else {
            real.release(entry)
            outside.push([object, index])
          }
        }
        const check = (): void => {
          assert.equal(real.size, inside.length)
          expect(inside.filter(([object, index, entry]) => real.find(0, object, index) !== entry)).toEqual([])
          expect(outside.filter(([object, index]) => real.find(0, object, index) !== none)).toEqual([])
          expect(real.objects).toBe(new Set(inside.map(([object]) => object)).size)
        }
        const handles = colliding(part, spread, 150)
        // Those at the end of the window come first, so that later ones push them along.
        for (const [object, index] of handles.reverse()) {
          add(object, index)
          check()
        }
        expect(outside.length).toBeGreaterThan(0)
        expect(inside.length).toBeGreaterThan(100)
        expect(outside.filter(([object]) => part === 'objectSlots' && real.hasObject(0, object))).toEqual([])
        // Where some go there is room again.
        for (const [, , entry] of inside.splice(0, 30)) {
          real.remove(entry)
          real.release(entry)
        }
        check()
        const [object, index] = outside.pop()!
        add(object, index)
        check()
        expect(real.find(0, object, index)).not.toBe(none)
        // And when all went, nothing is left that could stand in the way.
        for (const [, , entry] of inside.splice(0)) {
          real.remove(entry)
          real.release(entry)
        }
        outside.length = 0
        check()
        for (let i = 0; i < capacity; i++) add(10_000 + (i % 50), i * 31)
        expect(inside.length).toBe(capacity)
        check()
        expect(real.firstOfPool(1)).toBe(none)
      })
})
