import { MemoryStore, memory, SharedMemoryStore } from '@tmem/memory'
import { describe, expect, it } from 'vitest'
import {
  Authorization,
  ByteLimit,
  compose,
  createAccounts,
  decodePoolFlags,
  encodePoolFlags,
  GetOutcome,
  PoolRefusal,
  PutOutcome,
  systemAllocator,
  Tmem,
} from '../src/index.ts'

const privateEphemeral = encodePoolFlags({ persistent: false, shared: false, pageSize: 4096 })
const privatePersistent = encodePoolFlags({ persistent: true, shared: false, pageSize: 4096 })
const sharedEphemeral = encodePoolFlags({ persistent: false, shared: true, pageSize: 4096 })
const uuid = 0x1234_5678_9abc_def0_1234_5678_9abc_def0n

const open = (options?: ConstructorParameters<typeof Tmem>[1], accounts = createAccounts()) =>
  new Tmem(compose([memory({ limitBytes: 4 * 2 ** 20 })], { check: 'model', accounts }), options)
const page = (fill: number, size = 4096) => new Uint8Array(size).fill(fill)
const poolId = (answer: ReturnType<Tmem['newPool']>): number => {
  if ('refusal' in answer) throw new Error(`refused: ${answer.refusal}`)
  return answer.poolId
}

describe('the flags word', () => {
  it('carries kind, page size and version', () => {
    expect(privateEphemeral).toBe(0x01000000)
    expect(privatePersistent).toBe(0x01000001)
    expect(encodePoolFlags({ persistent: false, shared: true, pageSize: 2 * 2 ** 20 })).toBe(0x01000092)
    for (let order = 0; order <= 9; order++) {
      const flags = { persistent: order % 2 === 0, shared: false, pageSize: 4096 << order }
      expect(decodePoolFlags(encodePoolFlags(flags))).toEqual(flags)
    }
    expect(() => encodePoolFlags({ persistent: true, shared: false, pageSize: 5000 })).toThrow(RangeError)
  })

  it('is refused for the first reason in the order of new_pool', () => {
    expect(decodePoolFlags(0xff)).toBe(PoolRefusal.BadVersion)
    expect(decodePoolFlags(0x02000000)).toBe(PoolRefusal.BadVersion)
    expect(decodePoolFlags(0x010000f7)).toBe(PoolRefusal.SharedPersistent)
    expect(decodePoolFlags(0x010000a4)).toBe(PoolRefusal.BadPageSize)
    expect(decodePoolFlags(0x0100010c)).toBe(PoolRefusal.Precompressed)
    expect(decodePoolFlags(0x01000008), 'bit 3 has no name and is ignored').toEqual(decodePoolFlags(0x01000000))
    for (const bit of [8, 15, 23]) expect(decodePoolFlags(0x01000000 | (1 << bit))).toBe(PoolRefusal.ReservedBits)
  })
})

describe('pool ids', () => {
  it('start at 0, are the lowest free slot, and end at the table', () => {
    const tmem = open({ poolsPerClient: 3 })
    const make = () => tmem.newPool(7, 0n, privateEphemeral)
    expect([make(), make(), make(), make()]).toEqual([
      { poolId: 0 },
      { poolId: 1 },
      { poolId: 2 },
      { refusal: PoolRefusal.NoSlot },
    ])
    tmem.destroyPool(7, 1)
    expect(make()).toEqual({ poolId: 1 })
    expect(tmem.newPool(8, 0n, privateEphemeral)).toEqual({ poolId: 0 })
  })

  it('reach nothing of a destroyed pool, also when used again', () => {
    const tmem = open()
    const id = poolId(tmem.newPool(1, 0n, privatePersistent))
    const old = tmem.pool(1, id)!
    expect(tmem.putPage(1, id, 5, 6, page(1))).toBe(PutOutcome.Stored)
    tmem.destroyPool(1, id)
    tmem.destroyPool(1, id)
    expect(tmem.putPage(1, id, 5, 6, page(1))).toBe(PutOutcome.PoolGone)
    expect(tmem.getPage(1, id, 5, 6, page(0))).toBe(GetOutcome.Miss)
    expect(poolId(tmem.newPool(1, 0n, privatePersistent))).toBe(id)
    expect(tmem.getPage(1, id, 5, 6, page(0))).toBe(GetOutcome.Miss)
    expect(tmem.putPage(1, id, 5, 6, page(2))).toBe(PutOutcome.Stored)
    expect(old.get(5, 6, page(0))).toBe(GetOutcome.Miss)
    expect(old.put(5, 6, page(3))).toBe(PutOutcome.PoolGone)
  })

  it('of another client mean nothing', () => {
    const tmem = open()
    const id = poolId(tmem.newPool(1, 0n, privatePersistent))
    tmem.putPage(1, id, 5, 6, page(1))
    expect(tmem.getPage(2, id, 5, 6, page(0))).toBe(GetOutcome.Miss)
    tmem.flushObject(2, id, 5)
    expect(tmem.getPage(1, id, 5, 6, page(0))).toBe(GetOutcome.Hit)
  })
})

describe('gets', () => {
  it('take a page out of a private ephemeral pool', () => {
    const tmem = open()
    const id = poolId(tmem.newPool(1, 0n, privateEphemeral))
    tmem.putPage(1, id, 1, 1, page(9))
    const into = page(0)
    expect(tmem.getPage(1, id, 1, 1, into)).toBe(GetOutcome.Hit)
    expect(into).toEqual(page(9))
    expect(tmem.getPage(1, id, 1, 1, into)).toBe(GetOutcome.Miss)
  })

  it('leave it in a private persistent one (DEVIATION from the 2009 text)', () => {
    const tmem = open()
    const id = poolId(tmem.newPool(1, 0n, privatePersistent))
    tmem.putPage(1, id, 1, 1, page(9))
    expect(tmem.getPage(1, id, 1, 1, page(0))).toBe(GetOutcome.Hit)
    expect(tmem.getPage(1, id, 1, 1, page(0))).toBe(GetOutcome.Hit)
  })

  it('wait, lend and work in batches through the pool behind an id', async () => {
    const tmem = open()
    const id = poolId(tmem.newPool(1, 0n, privatePersistent))
    tmem.putPage(1, id, 1, 1, page(9))
    expect(await tmem.fetchPage(1, id, 1, 1, page(0))).toBe(GetOutcome.Hit)
    expect(await tmem.fetchPage(1, 9, 1, 1, page(0))).toBe(GetOutcome.Miss)
    let lent = 0
    expect(
      tmem.lendPage(1, id, 1, 1, (bytes, at) => {
        lent = bytes[at]
      }),
    ).toBe(GetOutcome.Hit)
    expect(lent).toBe(9)
    expect(tmem.lendPage(1, 9, 1, 1, () => {})).toBe(GetOutcome.Miss)
    expect(tmem.pool(1, 9)).toBeUndefined()
  })
})

describe('shared pools', () => {
  const share = (tmem: Tmem, ...clients: number[]): number[] =>
    clients.map((client) => {
      expect(tmem.authorize(client, uuid)).toBe(Authorization.Done)
      return poolId(tmem.newPool(client, uuid, sharedEphemeral))
    })

  it('are one pool under different ids', () => {
    const tmem = open()
    poolId(tmem.newPool(2, 0n, privateEphemeral))
    const [one, two] = share(tmem, 1, 2)
    expect([one, two]).toEqual([0, 1])
    tmem.putPage(1, one, 3, 4, page(5))
    const into = page(0)
    expect(tmem.getPage(2, two, 3, 4, into)).toBe(GetOutcome.Hit)
    expect(into).toEqual(page(5))
    expect(tmem.getPage(1, one, 3, 4, page(0)), 'a shared get leaves the page').toBe(GetOutcome.Hit)
    tmem.flushPage(2, two, 3, 4)
    expect(tmem.getPage(1, one, 3, 4, page(0)), 'a flush is for all').toBe(GetOutcome.Miss)
  })

  it('need a permit (DEVIATION: a refusal, no silent private pool)', () => {
    const tmem = open()
    expect(tmem.newPool(1, uuid, sharedEphemeral)).toEqual({ refusal: PoolRefusal.NotAuthorized })
    tmem.authorize(1, uuid)
    expect(tmem.newPool(1, uuid, sharedEphemeral)).toEqual({ poolId: 0 })
    expect(tmem.newPool(2, uuid, sharedEphemeral)).toEqual({ refusal: PoolRefusal.NotAuthorized })
    tmem.authorizeEverybody(true)
    expect(tmem.newPool(2, uuid, sharedEphemeral)).toEqual({ poolId: 0 })
    expect(tmem.newPool(2, 2n ** 128n - 1n, sharedEphemeral)).toEqual({ refusal: PoolRefusal.NotAuthorized })
    tmem.authorizeEverybody(false)
    expect(tmem.newPool(3, uuid, sharedEphemeral)).toEqual({ refusal: PoolRefusal.NotAuthorized })
  })

  it('count a permit once (DEVIATION) and have a limited number of them', () => {
    const tmem = open({ permitsPerClient: 1 })
    expect(tmem.authorize(1, uuid)).toBe(Authorization.Done)
    expect(tmem.authorize(1, uuid)).toBe(Authorization.Done)
    expect(tmem.authorize(1, 5n)).toBe(Authorization.NoSlot)
    expect(tmem.withdraw(1, uuid)).toBe(Authorization.Done)
    expect(tmem.withdraw(1, uuid)).toBe(Authorization.Absent)
    expect(tmem.withdraw(9, uuid)).toBe(Authorization.Absent)
    expect(tmem.newPool(1, uuid, sharedEphemeral)).toEqual({ refusal: PoolRefusal.NotAuthorized })
  })

  it('are limited in number, and never joined with another page size (DEVIATION)', () => {
    const tmem = open({ sharedPools: 1, everybodyShares: true })
    expect(tmem.newPool(1, 1n, sharedEphemeral)).toEqual({ poolId: 0 })
    expect(tmem.newPool(1, 2n, sharedEphemeral)).toEqual({ refusal: PoolRefusal.NoSharedSlot })
    const larger = encodePoolFlags({ persistent: false, shared: true, pageSize: 8192 })
    expect(tmem.newPool(2, 1n, larger)).toEqual({ refusal: PoolRefusal.BadPageSize })
  })

  it('keep their pages when a sharer leaves, pass on when the owner does, and go with the last (DEVIATION)', () => {
    const tmem = open()
    const [one, two, three] = share(tmem, 1, 2, 3)
    tmem.putPage(1, one, 3, 4, page(5))
    tmem.getPage(2, two, 3, 4, page(0))
    tmem.destroyPool(2, two)
    expect(tmem.getPage(3, three, 3, 4, page(0))).toBe(GetOutcome.Hit)
    tmem.destroyPool(1, one)
    expect(tmem.getPage(3, three, 3, 4, page(0))).toBe(GetOutcome.Hit)
    expect(tmem.getPage(1, one, 3, 4, page(0))).toBe(GetOutcome.Miss)
    tmem.destroyPool(3, three)
    const [again] = share(tmem, 3)
    expect(tmem.getPage(3, again, 3, 4, page(0))).toBe(GetOutcome.Miss)
  })

  it('leave the other pools of a leaving owner alone, and stay evictable', () => {
    const tmem = open()
    const own = poolId(tmem.newPool(1, 0n, privateEphemeral))
    const [one, two] = share(tmem, 1, 2)
    tmem.putPage(1, own, 9, 9, page(1))
    tmem.putPage(1, one, 3, 4, page(5))
    tmem.destroyPool(1, one)
    expect(tmem.getPage(1, own, 9, 9, page(0))).toBe(GetOutcome.Hit)
    for (let index = 0; index < 2000; index++)
      expect(tmem.putPage(2, two, 8, index, page(7)), `page ${index}`).toBe(PutOutcome.Stored)
    expect(tmem.getPage(2, two, 3, 4, page(0)), 'the oldest page was evicted').toBe(GetOutcome.Miss)
  })

  for (const [kind, openStore] of [
    [
      'one thread',
      () => {
        const accounts = createAccounts()
        return {
          store: new MemoryStore(new ByteLimit(2 ** 20), { allocator: systemAllocator, accounts }),
          weights: accounts,
        }
      },
    ],
    [
      'several threads',
      () => {
        const store = SharedMemoryStore.create({ limitBytes: 2 ** 20, shards: 1 })
        return { store, weights: store }
      },
    ],
  ] as const)
    it(`count as the next owner's when the owner has gone, not as those of a later client of its number (memory for ${kind})`, () => {
      const { store, weights } = openStore()
      for (const client of [1, 2]) weights.setWeight(client, 1)
      const tmem = new Tmem(store)
      const [, two] = share(tmem, 1, 2)
      const trial = poolId(tmem.newPool(3, 0n, privateEphemeral))
      let room = -1
      for (; store.stats().counters['evicted_pages'] === 0; room++) tmem.putPage(3, trial, 1, room + 1, page(1))
      tmem.destroyPool(3, trial)
      const shared = Math.ceil(room * 0.6)
      for (let index = 0; index < shared; index++)
        expect(tmem.putPage(2, two, 1, index, page(1))).toBe(PutOutcome.Stored)
      tmem.destroyClient(1)
      const own = poolId(tmem.newPool(1, 0n, privateEphemeral))
      for (let index = 0; index < room - shared; index++)
        expect(tmem.putPage(1, own, 1, index, page(2))).toBe(PutOutcome.Stored)
      // The pages of the later client are the oldest; who has more than its share pays all the same.
      for (let index = 0; index < shared; index++) expect(tmem.getPage(2, two, 1, index, page(0))).toBe(GetOutcome.Hit)
      expect(tmem.putPage(2, two, 2, 0, page(1))).toBe(PutOutcome.Stored)
      expect(tmem.getPage(1, own, 1, 0, page(0)), 'the later client did not pay').toBe(GetOutcome.Hit)
      expect(tmem.getPage(2, two, 1, 0, page(0))).toBe(GetOutcome.Miss)
      store.check()
    })

  it('count as the next owner’s as soon as the store has room for one more client', () => {
    const given: number[] = []
    let room = false
    class Handed extends MemoryStore {
      override newPool(...args: Parameters<MemoryStore['newPool']>): ReturnType<MemoryStore['newPool']> {
        const pool = super.newPool(...args)
        if (typeof pool !== 'number')
          pool.handOver = (client) => {
            given.push(client)
            return room
          }
        return pool
      }
    }
    const tmem = new Tmem(
      new Handed(new ByteLimit(2 ** 20), { allocator: systemAllocator, accounts: createAccounts() }),
    )
    const other = poolId(tmem.newPool(1, 0n, privateEphemeral))
    const [one] = share(tmem, 1, 2)
    tmem.destroyPool(1, one)
    expect(given).toEqual([2])
    room = true
    tmem.destroyPool(1, other)
    expect(given).toEqual([2, 2])
    tmem.destroyPool(1, poolId(tmem.newPool(1, 0n, privateEphemeral)))
    expect(given).toEqual([2, 2])
  })

  it('may be joined by one client more than once', () => {
    const tmem = open()
    const [first, second] = share(tmem, 1, 1)
    expect(first).not.toBe(second)
    tmem.putPage(1, first, 3, 4, page(5))
    tmem.destroyPool(1, first)
    expect(tmem.getPage(1, second, 3, 4, page(0))).toBe(GetOutcome.Hit)
  })

  it('are frozen with their owner, also with a new one', () => {
    const tmem = open()
    const [one, two] = share(tmem, 1, 2)
    tmem.freeze(2)
    expect(tmem.putPage(2, two, 1, 1, page(1)), 'a sharer’s freeze does not count').toBe(PutOutcome.Stored)
    tmem.destroyPool(1, one)
    expect(tmem.putPage(2, two, 1, 2, page(1))).toBe(PutOutcome.Frozen)
    tmem.thaw(2)
    expect(tmem.putPage(2, two, 1, 2, page(1))).toBe(PutOutcome.Stored)
  })
})

describe('freezing a client', () => {
  it('refuses new handles and nothing else', () => {
    const tmem = open()
    const id = poolId(tmem.newPool(1, 0n, privatePersistent))
    tmem.putPage(1, id, 1, 1, page(1))
    tmem.putPage(1, id, 1, 3, page(1))
    tmem.freeze(1)
    expect(tmem.putPage(1, id, 1, 2, page(1))).toBe(PutOutcome.Frozen)
    expect(tmem.putPage(1, id, 1, 1, page(2))).toBe(PutOutcome.Stored)
    expect(tmem.getPage(1, id, 1, 1, page(0))).toBe(GetOutcome.Hit)
    tmem.flushPage(1, id, 1, 1)
    expect(tmem.getPage(1, id, 1, 1, page(0))).toBe(GetOutcome.Miss)
    const later = poolId(tmem.newPool(1, 0n, privatePersistent))
    expect(tmem.putPage(1, later, 1, 1, page(1)), 'a pool made while frozen').toBe(PutOutcome.Frozen)
    tmem.destroyPool(1, later)
    tmem.thaw(1)
    expect(tmem.putPage(1, id, 1, 2, page(1))).toBe(PutOutcome.Stored)
  })
})

describe('the persistent memory of a client', () => {
  it('is charged to it, up to its maximum', () => {
    const accounts = createAccounts({ maximumBytes: 2 * 4096 })
    const tmem = open({}, accounts)
    const id = poolId(tmem.newPool(1, 0n, privatePersistent))
    const other = poolId(tmem.newPool(2, 0n, privatePersistent))
    const ephemeral = poolId(tmem.newPool(1, 0n, privateEphemeral))
    const outcomes = [1, 2, 3].map((index) => tmem.putPage(1, id, 1, index, page(index)))
    expect(outcomes).toEqual([PutOutcome.Stored, PutOutcome.Stored, PutOutcome.Quota])
    expect(tmem.putPage(1, ephemeral, 1, 1, page(1)), 'ephemeral pages are free').toBe(PutOutcome.Stored)
    expect(tmem.putPage(2, other, 1, 1, page(1)), 'another client pays for itself').toBe(PutOutcome.Stored)
    expect(tmem.putPage(1, id, 1, 1, page(9)), 'replacing costs nothing').toBe(PutOutcome.Stored)
    tmem.flushPage(1, id, 1, 1)
    expect(tmem.putPage(1, id, 1, 3, page(3))).toBe(PutOutcome.Stored)
    tmem.destroyClient(1)
    tmem.destroyClient(1)
    expect(accounts.charged(1)).toBe(0)
    expect(tmem.getPage(1, id, 1, 3, page(0))).toBe(GetOutcome.Miss)
  })
})

describe('misuse', () => {
  it('throws before anything changes', () => {
    const tmem = open()
    expect(() => tmem.newPool(-1, 0n, privateEphemeral)).toThrow(RangeError)
    expect(() => tmem.newPool(1, 2n ** 128n, sharedEphemeral)).toThrow(RangeError)
    expect(() => tmem.newPool(1, 5 as never, sharedEphemeral)).toThrow(TypeError)
    expect(() => tmem.authorize(70000, 0n)).toThrow(RangeError)
    expect(() => open({ poolsPerClient: 0 })).toThrow(RangeError)
    const id = poolId(tmem.newPool(1, 0n, privateEphemeral))
    expect(() => tmem.putPage(1, id, 1, 1, page(1, 100))).toThrow(RangeError)
    expect(() => tmem.putPage(1, id, -1, 1, page(1))).toThrow(RangeError)
  })
})
