/**
 * Shared pools with three clients, over every stack that keeps them: joining by uuid, authorisation, gets that leave
 * the page, leaving, ownership passing on; and for each known defect of the original the behaviour that is sane.
 *
 *     npm run -s tool -- vitest run packages/conformance/test/shared-pools.test.ts
 */
import {
  Authorization,
  compose,
  encodePoolFlags,
  GetOutcome,
  type Layer,
  type PageStore,
  PoolRefusal,
  PutOutcome,
  Tmem,
  type TmemOptions,
} from '@tmem/core'
import { slowMemory } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { makePage } from '../src/pages.ts'

const KiB = 1024
const { Stored } = PutOutcome
const { Hit } = GetOutcome
const pageSize = 4096
const shared = encodePoolFlags({ persistent: false, shared: true, pageSize })
const ephemeral = encodePoolFlags({ persistent: false, shared: false, pageSize })
const persistent = encodePoolFlags({ persistent: true, shared: false, pageSize })
const uuid = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdefn
const reserved = (1n << 128n) - 1n
const page = (seed: number): Uint8Array => makePage('text', seed, pageSize)

/** Room for about twenty pages at the top, so that they are evicted, or passed down. */
const stacks: readonly [name: string, layers: () => readonly Layer[]][] = [
  ['memory', () => [memory({ limitBytes: 120_000 })]],
  ['zcache', () => [zcache({ limitBytes: 256 * KiB })]],
  ['zcache over memory', () => [zcache({ limitBytes: 256 * KiB }), memory({ limitBytes: 200_000 })]],
  [
    'memory over a place that has to wait',
    () => [memory({ limitBytes: 120_000 }), slowMemory({ sizeBytes: 200_000, ephemeral: true })],
  ],
]

/** Pages that have made room: counted by a chain, or by memory as a store by itself. */
const evictedIn = (store: PageStore): number => {
  const { counters } = store.stats()
  return counters['dropped'] ?? counters['evicted_pages']!
}

/** Three clients on one store, all authorised unless said otherwise. */
class World {
  readonly store: PageStore
  readonly tmem: Tmem

  constructor(layers: readonly Layer[], authorized: readonly number[] = [1, 2, 3], options: TmemOptions = {}) {
    this.store = compose(layers, { check: 'model' })
    this.tmem = new Tmem(this.store, options)
    for (const client of authorized)
      if (this.tmem.authorize(client, uuid) !== Authorization.Done)
        throw new Error(`client ${client} is not authorised`)
  }

  join(client: number, flags: number = shared, id: bigint = uuid): number {
    const made = this.tmem.newPool(client, id, flags)
    if ('refusal' in made) throw new Error(`refused: ${made.refusal}`)
    return made.poolId
  }

  put(client: number, pool: number, index: number, seed: number, object = 7): PutOutcome {
    return this.tmem.putPage(client, pool, object, index, page(seed))
  }

  /** The page, `undefined` for a miss; waiting where that is needed. */
  async get(client: number, pool: number, index: number, object = 7): Promise<Uint8Array | undefined> {
    const into = new Uint8Array(pageSize)
    let outcome = this.tmem.getPage(client, pool, object, index, into)
    if (outcome === GetOutcome.Deferred) outcome = await this.tmem.fetchPage(client, pool, object, index, into)
    return outcome === Hit ? into : undefined
  }
}

describe.each(stacks)('shared pools with three clients, over %s', (_name, layers) => {
  test('who comes first makes the pool, who gives its uuid joins, each under an id of its own', async () => {
    const world = new World(layers())
    world.join(2, ephemeral)
    world.join(3, ephemeral)
    world.join(3, persistent)
    const pools = [world.join(1), world.join(2), world.join(3)]
    expect(pools).toEqual([0, 1, 2])
    expect(world.put(1, 0, 5, 50)).toBe(Stored)
    for (const [client, pool] of [
      [2, 1],
      [3, 2],
      [1, 0],
    ] as const)
      expect(await world.get(client, pool, 5)).toEqual(page(50))
    // Neither under another uuid, nor in a private pool, nor under somebody else's id.
    world.tmem.authorize(1, 99n)
    expect(await world.get(1, world.join(1, shared, 99n), 5)).toBeUndefined()
    expect(await world.get(2, 0, 5)).toBeUndefined()
    expect(await world.get(1, 2, 5)).toBeUndefined()
  })

  test('a get leaves the page for everybody; the last put counts; a flush of anybody is for all', async () => {
    const world = new World(layers())
    const pools = [world.join(1), world.join(2), world.join(3)]
    world.put(1, pools[0]!, 5, 50)
    world.put(1, pools[0]!, 6, 60)
    world.put(1, pools[0]!, 0, 70, 8)
    for (let round = 0; round < 3; round++)
      for (const client of [1, 2, 3]) expect(await world.get(client, pools[client - 1]!, 5)).toEqual(page(50))
    world.put(3, pools[2]!, 5, 51)
    for (const client of [1, 2, 3]) expect(await world.get(client, pools[client - 1]!, 5)).toEqual(page(51))
    world.tmem.flushPage(2, pools[1]!, 7, 5)
    for (const client of [1, 2, 3]) expect(await world.get(client, pools[client - 1]!, 5)).toBeUndefined()
    world.tmem.flushObject(3, pools[2]!, 7)
    for (const client of [1, 2, 3]) {
      expect(await world.get(client, pools[client - 1]!, 6)).toBeUndefined()
      expect(await world.get(client, pools[client - 1]!, 0, 8)).toEqual(page(70))
    }
  })

  test('who is not authorised is refused, and says so; everybody may be let in; a member stays one', async () => {
    const world = new World(layers(), [1, 2])
    const [one, two] = [world.join(1), world.join(2)]
    expect(world.tmem.newPool(3, uuid, shared)).toEqual({ refusal: PoolRefusal.NotAuthorized })
    world.put(1, one, 5, 50)
    world.tmem.withdraw(2, uuid)
    expect(await world.get(2, two, 5)).toEqual(page(50))
    world.tmem.destroyPool(2, two)
    expect(world.tmem.newPool(2, uuid, shared)).toEqual({ refusal: PoolRefusal.NotAuthorized })
    world.tmem.authorizeEverybody(true)
    expect(await world.get(3, world.join(3), 5)).toEqual(page(50))
  })

  test('the owner leaves, then the next: the pages stay until nobody is left, and the uuid is free then', async () => {
    const world = new World(layers(), [1, 2, 3], { sharedPools: 1 })
    const pools = [world.join(1), world.join(2), world.join(3)]
    world.put(1, pools[0]!, 5, 50)
    world.tmem.destroyPool(1, pools[0]!)
    expect(await world.get(1, pools[0]!, 5)).toBeUndefined()
    expect(world.put(1, pools[0]!, 5, 51)).toBe(PutOutcome.PoolGone)
    expect(await world.get(3, pools[2]!, 5)).toEqual(page(50))
    // Somebody who comes back is a member like any other.
    const again = world.join(1)
    expect(await world.get(1, again, 5)).toEqual(page(50))
    world.tmem.destroyClient(2)
    world.tmem.destroyPool(3, pools[2]!)
    expect(await world.get(1, again, 5)).toEqual(page(50))
    world.tmem.destroyPool(1, again)
    world.tmem.authorize(1, 99n)
    const other = world.join(1, shared, 99n)
    expect(await world.get(1, other, 5)).toBeUndefined()
    world.tmem.destroyPool(1, other)
    expect(await world.get(1, world.join(1), 5)).toBeUndefined()
  })

  test('frozen is the owner, and so is who becomes it', async () => {
    const world = new World(layers())
    const pools = [world.join(1), world.join(2), world.join(3)]
    world.put(1, pools[0]!, 5, 50)
    world.tmem.freeze(2)
    expect(world.put(3, pools[2]!, 6, 60)).toBe(Stored)
    world.tmem.destroyPool(1, pools[0]!)
    expect(world.put(3, pools[2]!, 8, 80)).toBe(PutOutcome.Frozen)
    expect(await world.get(3, pools[2]!, 5)).toEqual(page(50))
    world.tmem.destroyPool(2, pools[1]!)
    expect(world.put(3, pools[2]!, 8, 80)).toBe(Stored)
  })

  describe('known defects of the original are not copied', () => {
    test('without authorisation, or with the reserved uuid, it silently made a private pool', () => {
      const world = new World(layers(), [])
      expect(world.tmem.newPool(1, uuid, shared)).toEqual({ refusal: PoolRefusal.NotAuthorized })
      world.tmem.authorizeEverybody(true)
      expect(world.tmem.newPool(1, reserved, shared)).toEqual({ refusal: PoolRefusal.NotAuthorized })
    })

    test('who joined with another page size got the pool all the same', () => {
      const world = new World(layers())
      world.join(1)
      const larger = encodePoolFlags({ persistent: false, shared: true, pageSize: 2 * pageSize })
      expect(world.tmem.newPool(2, uuid, larger)).toEqual({ refusal: PoolRefusal.BadPageSize })
    })

    test('authorised twice, a client stayed so when that was withdrawn once', () => {
      const world = new World(layers(), [1, 1])
      expect(world.tmem.withdraw(1, uuid)).toBe(Authorization.Done)
      expect(world.tmem.newPool(1, uuid, shared)).toEqual({ refusal: PoolRefusal.NotAuthorized })
    })

    test('a client that joined twice crashed the host when it left', async () => {
      const world = new World(layers())
      const [first, second, other] = [world.join(1), world.join(1), world.join(2)]
      world.put(2, other, 5, 50)
      world.tmem.destroyPool(1, first)
      world.tmem.destroyPool(1, first)
      expect(await world.get(1, second, 5)).toEqual(page(50))
      world.tmem.destroyPool(2, other)
      expect(await world.get(1, second, 5)).toEqual(page(50))
      world.tmem.destroyPool(1, second)
      expect(await world.get(3, world.join(3), 5)).toBeUndefined()
    })

    test('whoever left took the objects along that it had touched last', async () => {
      const world = new World(layers())
      const pools = [world.join(1), world.join(2), world.join(3)]
      for (let object = 1; object <= 3; object++) {
        world.put(1, pools[0]!, 0, object, object)
        await world.get(object, pools[object - 1]!, 0, object)
      }
      world.tmem.destroyPool(2, pools[1]!)
      for (let object = 1; object <= 3; object++) expect(await world.get(3, pools[2]!, 0, object)).toEqual(page(object))
    })

    test('with the pool, the owner gave all of its other ephemeral pages to the heir', async () => {
      const world = new World(layers())
      const own = world.join(1, ephemeral)
      const kept = world.join(1, persistent)
      const [one, two] = [world.join(1), world.join(2)]
      world.put(1, own, 1, 10)
      world.put(1, kept, 1, 20)
      world.put(1, one, 1, 30)
      world.tmem.destroyPool(1, one)
      // What the heir does with all that is its own does not concern them.
      world.tmem.freeze(2)
      world.tmem.flushObject(2, two, 7)
      world.tmem.destroyClient(2)
      expect(world.put(1, own, 2, 11)).toBe(Stored)
      expect(await world.get(1, own, 1)).toEqual(page(10))
      expect(await world.get(1, own, 2)).toEqual(page(11))
      expect(await world.get(1, kept, 1)).toEqual(page(20))
    })

    test('after one had left, pages could never be evicted again', async () => {
      const world = new World(layers())
      const [one, two] = [world.join(1), world.join(2)]
      world.join(3)
      for (let index = 0; index < 20; index++) world.put(1, one, index, index)
      world.tmem.destroyPool(1, one)
      for (let index = 100; index < 1100; index++) expect(world.put(2, two, index, index)).toBe(Stored)
      expect(evictedIn(world.store)).toBeGreaterThan(400)
      for (let index = 0; index < 20; index++) expect(await world.get(2, two, index)).toBeUndefined()
      expect(await world.get(2, two, 1099)).toEqual(page(1099))
    })

    test('a join that found no memory was not noticed', async () => {
      // Neither a slot of its own nor one for the uuid: refused, and nothing of it is left behind.
      const world = new World(layers(), [1, 2, 3], { poolsPerClient: 1, sharedPools: 1 })
      world.join(2, ephemeral)
      expect(world.tmem.newPool(2, uuid, shared)).toEqual({ refusal: PoolRefusal.NoSlot })
      const one = world.join(1)
      expect(world.tmem.newPool(2, uuid, shared)).toEqual({ refusal: PoolRefusal.NoSlot })
      world.tmem.authorize(3, 99n)
      expect(world.tmem.newPool(3, 99n, shared)).toEqual({ refusal: PoolRefusal.NoSharedSlot })
      world.put(1, one, 5, 50)
      world.tmem.destroyPool(1, one)
      // The pool went with its only user.
      expect(await world.get(3, world.join(3), 5)).toBeUndefined()
      // A store that makes no pool: the uuid is not taken by it.
      const closed = new World(layers())
      await closed.store.close()
      for (const client of [1, 2, 3])
        expect(closed.tmem.newPool(client, uuid, shared)).toEqual({ refusal: PoolRefusal.Closed })
    })
  })

  test('any history of three clients: what is got is the last put, by a member, while there is one', async () => {
    const often = ['put', 'put', 'put', 'get', 'get', 'get', 'get', 'join'] as const
    const step = fc.record({
      do: fc.constantFrom(...often, ...often, 'flush', 'flushObject', 'leave', 'die'),
      client: fc.integer({ min: 1, max: 3 }),
      object: fc.nat(1),
      index: fc.nat(5),
      seed: fc.nat(10_000),
    })
    let hits = 0
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 20, maxLength: 150, size: 'max' }), async (steps) => {
        const world = new World(layers())
        /** Ids of the memberships of each client; what the pool holds at most. */
        const members = new Map<number, number[]>([1, 2, 3].map((client) => [client, []]))
        const model = new Map<string, number>()
        const settle = (): void => {
          if ([...members.values()].every((ids) => ids.length === 0)) model.clear()
        }
        for (const { do: what, client, object, index, seed } of steps) {
          const ids = members.get(client)!
          const id = ids[seed % Math.max(1, ids.length)] ?? 15
          const handle = `${object}:${index}`
          if (what === 'put') {
            if (world.put(client, id, index, seed, object) === Stored) model.set(handle, seed)
            else if (ids.length > 0) model.delete(handle)
          } else if (what === 'get') {
            const got = await world.get(client, id, index, object)
            if (got === undefined) {
              // Evicted: for good.
              if (ids.length > 0) model.delete(handle)
              continue
            }
            hits++
            if (ids.length === 0) throw new Error(`client ${client} got ${handle} and is no member`)
            const wanted = model.get(handle)
            if (wanted === undefined || Buffer.compare(got, page(wanted)) !== 0)
              throw new Error(`wrong bytes in ${handle}`)
          } else if (what === 'flush' || what === 'flushObject') {
            if (what === 'flush') world.tmem.flushPage(client, id, object, index)
            else world.tmem.flushObject(client, id, object)
            if (ids.length > 0)
              for (const known of model.keys())
                if (known === handle || (what === 'flushObject' && known.startsWith(`${object}:`))) model.delete(known)
          } else if (what === 'join' && ids.length < 3) ids.push(world.join(client))
          else if (what === 'leave' && ids.length > 0) {
            ids.splice(ids.indexOf(id), 1)
            world.tmem.destroyPool(client, id)
            settle()
          } else if (what === 'die') {
            world.tmem.destroyClient(client)
            world.tmem.authorize(client, uuid)
            ids.length = 0
            settle()
          }
        }
        await world.store.close()
      }),
      { seed: 3, numRuns: 80 },
    )
    expect(hits).toBeGreaterThan(150)
  })
})
