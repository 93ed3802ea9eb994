/** The commands of guests: every answer of the tables, in the order of the checks, by release. */
import { compose, createAccounts } from '@tmem/core'
import { refuse } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { describe, expect, test } from 'vitest'
import { Command, controlBuffer, Errno, GuestMemory, noFrame, type Release, releases, XenHost } from '../src/index.ts'
import { firstFrame, flags, Guest, world } from './guest.ts'

const invalid = 2n ** 192n - 1n
const uuid = 0x0123456789abcdef_fedcba9876543210n

describe.each(releases.map((release) => ({ release })))('release $release', ({ release }) => {
  const version = release === '4.0.0' ? 0 : 0x01000000
  const since = (other: Release): boolean => releases.indexOf(release) >= releases.indexOf(other)

  test.each([{ bits: 32 as const }, { bits: 64 as const }])(
    'a page goes in and out, guest of $bits bits',
    ({ bits }) => {
      const { host } = world({ release })
      const guest = new Guest(host, 1, bits)
      const pool = guest.newPool(version | 1)
      expect(pool).toBe(0)
      expect(guest.get(pool, 5n, 1)).toBe(-Errno.EEMPTY)
      expect(guest.put(pool, 5n, 1, 9)).toBe(1)
      expect(guest.get(pool, 5n, 1)).toBe(9)
      expect(guest.get(pool, 5n, 1)).toBe(9)
      expect(guest.get(pool, 5n, 2)).toBe(0)
      expect(guest.put(pool, 5n, 1, 8)).toBe(1)
      expect(guest.get(pool, 5n, 1)).toBe(8)
      expect(guest.page(Command.FlushPage, pool, 5n, 1)).toBe(1)
      expect(guest.page(Command.FlushPage, pool, 5n, 1)).toBe(1)
      expect(guest.get(pool, 5n, 1)).toBe(-Errno.EEMPTY)
      for (const index of [0, 1, 2 ** 32 - 1]) guest.put(pool, 7n, index, 7)
      expect(guest.page(Command.FlushObject, pool, 7n, 0)).toBe(1)
      expect(guest.get(pool, 7n, 2 ** 32 - 1)).toBe(-Errno.EEMPTY)
      expect(guest.destroyPool(pool)).toBe(1)
      expect(guest.destroyPool(pool)).toBe(0)
      expect(guest.page(Command.GetPage, pool, 7n, 0)).toBe(-Errno.ENODEV)
    },
  )

  test('NEW_POOL: the checks', () => {
    const { host } = world({ release })
    const guest = new Guest(host, 1)
    const isFirst = release === '4.0.0'
    expect(guest.newPool(isFirst ? 0x01000000 : 0)).toBe(-Errno.EPERM)
    expect(guest.newPool(0x02000000)).toBe(-Errno.EPERM)
    expect(guest.newPool(version | 0x10)).toBe(-Errno.EPERM)
    expect(guest.newPool(version | 4)).toBe(isFirst ? 0 : -Errno.EPERM)
    expect(guest.newPool(version | 0x100)).toBe(isFirst ? 1 : -Errno.EPERM)
    expect(guest.newPool(version | 0x00800000)).toBe(isFirst ? 2 : -Errno.EPERM)
    // Bit 3 has no name, and is let through.
    const first = isFirst ? 3 : 0
    expect(guest.newPool(version | 8)).toBe(first)
    expect(guest.newPool(version | 3, uuid)).toBe(since('4.5') ? -Errno.EPERM : first + 1)
    while (host.clients.get(1)!.slots.includes(undefined)) expect(guest.newPool(version)).toBeGreaterThan(0)
    expect(guest.newPool(version)).toBe(-Errno.EPERM)
    expect(guest.destroyPool(9)).toBe(1)
    expect(guest.newPool(version)).toBe(9)
  })

  test('pool ids that are none, structures that are not there', () => {
    const { host } = world({ release })
    const guest = new Guest(host, 1)
    for (const pool of [0, 15, 16, -1, 2 ** 31 - 1, -(2 ** 31)]) {
      expect(guest.page(Command.PutPage, pool, 1n, 0)).toBe(-Errno.ENODEV)
      expect(guest.page(Command.FlushObject, pool, 1n, 0)).toBe(-Errno.ENODEV)
      // What is unknown is told only after the pool.
      expect(guest.page(77, pool, 1n, 0)).toBe(-Errno.ENODEV)
      expect(guest.destroyPool(pool)).toBe(0)
    }
    const size = guest.bytes.length
    for (const address of [size, size - 8, -8, 2 ** 53, Number.NaN, 2 ** 64])
      expect(host.call(1, address)).toBe(-Errno.EFAULT)
    const hole = new Guest(host, 2)
    hole.memory.map(1, noFrame)
    expect(hole.call('creat', { cmd: Command.NewPool, flags: version }, 4096 - 8)).toBe(-Errno.EFAULT)
    hole.memory.map(1, 1)
    // Unaligned, and across two frames.
    expect(hole.call('creat', { cmd: Command.NewPool, flags: version }, 4096 - 7)).toBe(0)
    expect(host.counters).toMatchObject({ Te: expect.any(Number) })
  })

  test('commands that are no more, and those that never were', () => {
    const { host } = world({ release })
    const guest = new Guest(host, 1)
    const pool = guest.newPool(version | 1)
    expect(guest.page(77, pool, 1n, 0)).toBe(since('4.4') ? -Errno.ENOSYS : 0)
    expect(guest.page(Command.Exchange, pool, 1n, 0)).toBe(since('4.4') ? -Errno.ENOSYS : 0)
    expect(guest.call('creat', { cmd: Command.Control })).toBe(since('4.6') ? -Errno.EOPNOTSUPP : -Errno.EPERM)
    expect(guest.call('creat', { cmd: Command.Auth })).toBe(since('4.9') ? -Errno.EOPNOTSUPP : -Errno.EPERM)
    expect(guest.call('creat', { cmd: Command.RestoreNew })).toBe(since('4.9') ? -Errno.EOPNOTSUPP : -Errno.EPERM)
    const answers = [Command.NewPage, Command.Read, Command.Write].map((command) => guest.page(command, pool, 1n, 0))
    expect(answers).toEqual(since('4.4') ? new Array(3).fill(-Errno.ENOSYS) : [1, 1, 1])
  })

  test('frames that are not there', () => {
    const { host } = world({ release })
    const guest = new Guest(host, 1)
    const persistent = guest.newPool(version | 1)
    const ephemeral = guest.newPool(version)
    for (const frame of [16, 2 ** 31, 2 ** 32 - 1, noFrame >>> 0]) {
      expect(guest.page(Command.PutPage, persistent, 1n, 0, frame)).toBe(-Errno.EFAULT)
      expect(guest.page(Command.GetPage, persistent, 1n, 0, frame)).toBe(-Errno.EEMPTY)
    }
    for (const pool of [persistent, ephemeral]) {
      guest.put(pool, 1n, 0, 5)
      // A get that cannot be given leaves the page; a put that cannot be read ends it.
      expect(guest.page(Command.GetPage, pool, 1n, 0, 16)).toBe(-Errno.EFAULT)
      expect(guest.page(Command.GetPage, pool, 1n, 1, 16)).toBe(0)
      expect(guest.page(Command.PutPage, pool, 1n, 0, 16)).toBe(-Errno.EFAULT)
      expect(guest.get(pool, 1n, 0)).toBe(-Errno.EEMPTY)
    }
    expect(host.counters.Cf).toBeGreaterThan(0)
  })

  test('an ephemeral page is gone with the get, a shared one stays', () => {
    const { host } = world({ release })
    const guest = new Guest(host, 1)
    const priv = guest.newPool(version)
    guest.put(priv, 1n, 1, 3)
    guest.put(priv, 1n, 2, 4)
    expect(guest.get(priv, 1n, 1)).toBe(3)
    expect(guest.get(priv, 1n, 1)).toBe(0)
    host.everybodyShares = true
    const shared = guest.newPool(version | 2, uuid)
    guest.put(shared, 1n, 1, 3)
    expect(guest.get(shared, 1n, 1)).toBe(3)
    expect(guest.get(shared, 1n, 1)).toBe(3)
  })
})

test.each([{ release: '4.0.0' as const }, { release: '4.0' as const }, { release: '4.3' as const }])(
  'parts of pages in $release',
  ({ release }) => {
    const { host } = world({ release })
    const guest = new Guest(host, 1)
    const pool = guest.newPool(release === '4.0.0' ? 1 : flags.persistent)
    expect(guest.page(Command.NewPage, pool, 1n, 0)).toBe(1)
    expect(guest.get(pool, 1n, 0)).toBe(0)
    guest.fill(firstFrame, 6)
    const part = { tmem_offset: 100, pfn_offset: 10, len: 50 }
    expect(guest.page(Command.Write, pool, 1n, 0, firstFrame, part)).toBe(1)
    expect(guest.page(Command.GetPage, pool, 1n, 0, firstFrame + 1)).toBe(1)
    const page = guest.memory.frame(firstFrame + 1)!
    expect([page[99], page[100], page[149], page[150]]).toEqual([0, 6, 6, 0])
    guest.fill(5, 1)
    expect(guest.page(Command.Read, pool, 1n, 0, 5, { tmem_offset: 99, pfn_offset: 4000, len: 3 })).toBe(1)
    expect([...guest.memory.frame(5)!.subarray(3999, 4004)]).toEqual([1, 0, 6, 6, 1])
    // A page that was not there is zero where it is not written, and oversized parts change nothing.
    expect(guest.page(Command.Write, pool, 1n, 8, firstFrame, { len: 1 })).toBe(1)
    expect(guest.page(Command.GetPage, pool, 1n, 8, firstFrame + 1)).toBe(1)
    expect([page[0], page[1], page[4095]]).toEqual([6, 0, 0])
    for (const bad of [
      { len: 4097 },
      { len: 2, tmem_offset: 4095 },
      { len: 2 ** 32 - 1 },
      { pfn_offset: 2 ** 32 - 1, len: 1 },
    ])
      for (const command of [Command.Read, Command.Write])
        expect(guest.page(command, pool, 1n, 8, firstFrame, bad)).toBe(-Errno.EFAULT)
  },
)

test('the id of all ones names no page', () => {
  const { host } = world()
  const guest = new Guest(host, 1)
  const pool = guest.newPool(flags.persistent)
  expect(guest.put(pool, invalid, 0, 1)).toBe(-Errno.ENOMEM)
  expect(guest.get(pool, invalid, 0)).toBe(-Errno.EEMPTY)
  expect(guest.put(pool, invalid - 1n, 0, 1)).toBe(1)
  expect(guest.get(pool, invalid, 0)).toBe(0)
  expect(guest.page(Command.FlushPage, pool, invalid, 0)).toBe(1)
  expect(guest.page(Command.FlushObject, pool, invalid, 0)).toBe(1)
  expect(guest.get(pool, invalid - 1n, 0)).toBe(1)
})

test('a frozen client: new pages are refused, old ones replaced, flushes done and told', () => {
  const { host } = world()
  const guest = new Guest(host, 1)
  const pool = guest.newPool(flags.persistent)
  guest.put(pool, 1n, 1, 1)
  host.freeze(host.clients.get(1)!, true)
  const later = guest.newPool(flags.persistent)
  expect(later).toBe(1)
  expect(guest.put(pool, 1n, 2, 2)).toBe(-Errno.EFROZEN)
  expect(guest.put(later, 1n, 2, 2)).toBe(-Errno.EFROZEN)
  expect(guest.put(pool, 1n, 1, 3)).toBe(1)
  expect(guest.get(pool, 1n, 1)).toBe(3)
  expect(guest.page(Command.PutPage, pool, 1n, 2, 99)).toBe(-Errno.EFROZEN)
  expect(guest.page(Command.FlushPage, pool, 1n, 1)).toBe(-Errno.EFROZEN)
  expect(guest.get(pool, 1n, 1)).toBe(-Errno.EEMPTY)
  expect(guest.page(Command.FlushObject, pool, 1n, 1)).toBe(-Errno.EFROZEN)
  host.freeze(host.clients.get(1)!, false)
  expect(guest.put(pool, 1n, 2, 2)).toBe(1)
})

test('who stores more than its maximum is refused; a duplicate that is refused is gone', () => {
  const accounts = createAccounts()
  const { host } = world({ accounts }, [memory({ limitBytes: '1MiB' }), zcache({ limitBytes: '1MiB' })])
  const guest = new Guest(host, 1)
  const other = new Guest(host, 2)
  const pool = guest.newPool(flags.persistent)
  expect(guest.put(pool, 1n, 0, 1)).toBe(1)
  accounts.setMaximum(1, 0)
  expect(guest.put(pool, 1n, 1, 1)).toBe(-Errno.ENOMEM)
  expect(guest.put(pool, 1n, 0, 2)).toBe(-Errno.ENOSPC)
  expect(guest.get(pool, 1n, 0)).toBe(-Errno.EEMPTY)
  expect(other.put(other.newPool(flags.persistent), 1n, 0, 1)).toBe(1)
  expect(host.clients.get(1)!.slots[0]!.counters).toMatchObject({ pt: 3, ps: 1, pd: 1, px: 2 })
})

test('a store that refuses', () => {
  const { host } = world({}, [refuse({ every: 2 }), zcache({ limitBytes: '1MiB' })])
  const guest = new Guest(host, 1)
  const pool = guest.newPool(flags.persistent)
  const answers = [0, 1, 0, 1].map((index) => guest.put(pool, 1n, index, 1))
  expect(answers.filter((answer) => answer === 1).length).toBe(2)
  expect(answers.every((answer) => answer === 1 || answer === -Errno.ENOMEM || answer === -Errno.ENOSPC)).toBe(true)
})

describe('sharing', () => {
  const pair = (release: Release, sharedAuth = false): [XenHost, Guest, Guest] => {
    const { host } = world({ release, sharedAuth })
    return [host, new Guest(host, 1), new Guest(host, 2)]
  }

  test('by uuid, under the numbers of each; the owner goes, the pool stays', () => {
    const [host, one, two] = pair('4.8')
    two.newPool(flags.persistent)
    const a = one.newPool(flags.shared, uuid)
    const b = two.newPool(flags.shared, uuid)
    expect([a, b]).toEqual([0, 1])
    one.put(a, 1n, 0, 7)
    two.put(b, 2n, 0, 8)
    expect(two.get(b, 1n, 0)).toBe(7)
    expect(one.get(a, 2n, 0)).toBe(8)
    two.page(Command.FlushPage, b, 1n, 0)
    expect(one.get(a, 1n, 0)).toBe(0)
    // Frozen is who owns it.
    host.freeze(host.clients.get(1)!, true)
    expect(two.put(b, 3n, 0, 1)).toBe(-Errno.EFROZEN)
    // The first has touched object 2 last: it goes with it.
    one.page(Command.GetPage, a, 2n, 0)
    host.freeze(host.clients.get(1)!, false)
    two.put(b, 4n, 0, 4)
    two.get(b, 4n, 0)
    expect(one.destroyPool(a)).toBe(1)
    expect(two.get(b, 2n, 0)).toBe(0)
    expect(two.get(b, 4n, 0)).toBe(4)
    expect(host.clients.get(2)!.slots[b]!.owner.id).toBe(2)
    expect(two.destroyPool(b)).toBe(1)
    expect(host.shared.every((pool) => pool === undefined)).toBe(true)
  })

  test('all ones is private; so is what is not permitted', () => {
    const [host, one, two] = pair('4.8', true)
    const dom0 = new Guest(host, 0)
    const auth = (client: number, on: number): unknown =>
      dom0.call('creat', { cmd: Command.Auth, arg1: client, flags: on, uuid: [uuid & (2n ** 64n - 1n), uuid >> 64n] })
    expect(auth(1, 1)).toBe(-Errno.EINVAL)
    const first = one.newPool(flags.shared, uuid)
    expect(host.clients.get(1)!.slots[first]!.isShared).toBe(false)
    two.newPool(flags.ephemeral)
    expect([auth(1, 1), auth(1, 1), auth(2, 1), auth(2, 0), auth(2, 0)]).toEqual([1, 1, 1, 1, 0])
    expect(host.clients.get(1)!.slots[one.newPool(flags.shared, uuid)]!.isShared).toBe(true)
    expect(host.clients.get(2)!.slots[two.newPool(flags.shared, uuid)]!.isShared).toBe(false)
    expect(auth(0xffff, 1)).toBe(1)
    expect(host.clients.get(2)!.slots[two.newPool(flags.shared, uuid)]!.isShared).toBe(true)
    expect(host.clients.get(2)!.slots[two.newPool(flags.shared, 2n ** 128n - 1n)]!.isShared).toBe(false)
  })

  test('16 shared pools in all; one more is refused and leaves nothing', () => {
    const [, one, two] = pair('4.8')
    for (let n = 0; n < 16; n++) expect(one.newPool(flags.shared, BigInt(n))).toBe(n)
    expect(two.newPool(flags.shared, 99n)).toBe(-Errno.EPERM)
    expect(two.newPool(flags.ephemeral)).toBe(0)
    expect(two.newPool(flags.shared, 3n)).toBe(1)
  })

  test('the same client twice', () => {
    const [host, one] = pair('4.8')
    const a = one.newPool(flags.shared, uuid)
    const b = one.newPool(flags.shared, uuid)
    one.put(a, 1n, 0, 5)
    expect(one.destroyPool(a)).toBe(1)
    expect(one.page(Command.GetPage, a, 1n, 0)).toBe(-Errno.ENODEV)
    expect(one.put(b, 2n, 0, 6)).toBe(1)
    expect(one.get(b, 2n, 0)).toBe(6)
    host.killDomain(1)
    expect(host.shared.every((pool) => pool === undefined)).toBe(true)
  })

  test('who touched what is forgotten with the pages', () => {
    const [host, one] = pair('4.8')
    const pool = one.newPool(flags.shared, uuid)
    for (let n = 0; n < 1100; n++) {
      one.put(pool, BigInt(n), 0, n & 0xff)
      one.page(Command.FlushPage, pool, BigInt(n), 0)
    }
    expect(host.clients.get(1)!.slots[pool]!.lastClients.size).toBeLessThanOrEqual(1025)
  })
})

describe('the end of a domain', () => {
  test('its pools go, those it shared stay, its number reaches nothing', async () => {
    const { host, store } = world({ release: '4.8' })
    const one = new Guest(host, 1)
    const two = new Guest(host, 2)
    one.put(one.newPool(flags.persistent), 1n, 0, 1)
    const shared = one.newPool(flags.shared, uuid)
    const joined = two.newPool(flags.shared, uuid)
    one.put(shared, 1n, 0, 2)
    two.get(joined, 1n, 0)
    host.killDomain(1)
    expect(() => host.call(1, 0)).toThrow('there is no domain 1')
    expect(two.get(joined, 1n, 0)).toBe(2)
    const next = new Guest(host, 1)
    expect(next.page(Command.GetPage, 0, 1n, 0)).toBe(-Errno.ENODEV)
    expect(next.newPool(flags.persistent)).toBe(0)
    expect(next.get(0, 1n, 0)).toBe(-Errno.EEMPTY)
    host.close()
    expect((store as unknown as { check(): void }).check()).toBeUndefined()
    await store.close()
  })

  test('clients beyond the limit are refused', () => {
    const { host } = world({ clients: 2 })
    const guests = [1, 2, 3].map((id) => new Guest(host, id))
    expect(guests.map((guest) => guest.newPool(flags.ephemeral))).toEqual([0, 0, -Errno.ENOMEM])
    host.killDomain(1)
    expect(guests[2]!.newPool(flags.ephemeral)).toBe(0)
  })

  test.each([
    { name: 'plain memory, small', layers: [memory({ limitBytes: '1MiB' })], domains: 64, pools: 4 },
    { name: 'plain memory of 1 GiB', layers: [memory({ limitBytes: '1GiB' })], domains: 1000, pools: 4 },
    { name: 'a stack of places', layers: [zcache({ limitBytes: '64MiB' })], domains: 1024, pools: 16 },
  ])(
    '$name: $domains domains with $pools pools each, and a refusal beyond what there can be',
    async (one) => {
      const { host, store } = world({}, one.layers)
      const guests = Array.from({ length: one.domains }, (_, n) => new Guest(host, n + 1, 64, 4))
      for (const guest of guests)
        for (let pool = 0; pool < one.pools; pool++) expect(guest.newPool(flags.persistent)).toBe(pool)
      for (const guest of guests) expect(guest.put(one.pools - 1, 5n, guest.id, guest.id & 0xff)).toBe(1)
      // Until the store has no more of the one or of the other.
      const more: Guest[] = []
      for (let answer = 0; answer >= 0 && more.length < 200; ) {
        more.push(new Guest(host, one.domains + 1 + more.length, 64, 4))
        for (let pool = 0; pool < one.pools && answer >= 0; pool++) answer = more.at(-1)!.newPool(flags.ephemeral)
      }
      const failed = host.counters.Af
      const refused = more.at(-1)!
      expect(refused.newPool(flags.ephemeral)).toBe(-Errno.ENOMEM)
      expect(host.counters.Af).toBe(failed + 1)
      // Nothing else has changed, and what becomes free can be had.
      for (const guest of guests) expect(guest.get(one.pools - 1, 5n, guest.id)).toBe(guest.id & 0xff)
      host.killDomain(guests[0]!.id)
      expect(refused.newPool(flags.ephemeral)).toBeGreaterThanOrEqual(0)
      store.check?.()
      host.close()
      await store.close()
    },
    60_000,
  )
})

describe('memory', () => {
  test('pages go in the order in which they came, over all domains', () => {
    const { host } = world()
    const one = new Guest(host, 1)
    const two = new Guest(host, 2)
    for (const guest of [one, two]) guest.newPool(flags.ephemeral)
    for (let n = 0; n < 3; n++) {
      one.put(0, 1n, n, n + 1)
      two.put(0, 1n, n, n + 1)
    }
    for (let n = 0; n < 3; n++) expect(host.evict()).toBeGreaterThan(0)
    expect([one.get(0, 1n, 0), one.get(0, 1n, 1), one.get(0, 1n, 2)]).toEqual([0, 0, 3])
    expect([two.get(0, 1n, 0), two.get(0, 1n, 1), two.get(0, 1n, 2)]).toEqual([0, 2, 3])
    expect(host.evict()).toBe(0)
    expect(host.counters).toMatchObject({ Et: 3, Ea: 4 })
  })

  test.each([{ defects: 'mended' as const }, { defects: 'original' as const }])(
    'the quota, $defects',
    ({ defects }) => {
      const { host } = world({ defects })
      const one = new Guest(host, 1)
      const two = new Guest(host, 2)
      one.newPool(flags.ephemeral)
      two.newPool(flags.ephemeral)
      for (let n = 0; n < 8; n++) one.put(0, 1n, n, n + 1)
      for (let n = 0; n < 2; n++) two.put(0, 1n, n, n + 1)
      const [first, second] = [host.clients.get(1)!, host.clients.get(2)!]
      // Nobody is over it while there are no weights.
      expect([host.isOverQuota(first), host.isOverQuota(second)]).toEqual([false, false])
      host.setWeight(first, 100)
      host.setWeight(second, 100)
      expect([host.isOverQuota(first), host.isOverQuota(second)]).toEqual(
        defects === 'mended' ? [true, false] : [false, true],
      )
      host.evict(second)
      expect(two.page(Command.GetPage, 0, 1n, 0)).toBe(defects === 'mended' ? 1 : 0)
    },
  )

  test('a put sees to it that 1 MiB is free, and is refused in 4.4 and later where it cannot be', () => {
    for (const release of ['4.2', '4.9'] as const) {
      let free = 2 ** 20
      const { host } = world({ release, freeBytes: () => free })
      const guest = new Guest(host, 1)
      const ephemeral = guest.newPool(flags.ephemeral)
      const persistent = guest.newPool(flags.persistent)
      for (let n = 0; n < 3; n++) expect(guest.put(ephemeral, 1n, n, n)).toBe(1)
      expect(guest.put(persistent, 1n, 0, 1)).toBe(1)
      free = 0
      const isRefused = release === '4.9'
      expect(guest.put(persistent, 1n, 1, 1)).toBe(isRefused ? -Errno.ENOMEM : 1)
      expect(guest.get(ephemeral, 1n, 2)).toBe(-Errno.EEMPTY)
      // Also then the old page of a refused put is gone.
      expect(guest.put(persistent, 1n, 0, 2)).toBe(isRefused ? -Errno.ENOSPC : 1)
      expect(guest.get(persistent, 1n, 0)).toBe(isRefused ? -Errno.EEMPTY : 2)
    }
  })

  test('relinquish gives single pages, and none of persistent ones', () => {
    const { host } = world({}, [memory({ limitBytes: '1MiB' }), zcache({ limitBytes: '1MiB' })])
    const guest = new Guest(host, 1)
    const kept = guest.newPool(flags.persistent)
    guest.put(kept, 1n, 0, 1)
    expect(host.relinquish(0)).toBe(false)
    expect(host.counters.Ra).toBe(0)
    const pool = guest.newPool(flags.ephemeral)
    for (let n = 0; n < 3; n++) guest.put(pool, 1n, n, n)
    expect(host.relinquish(1)).toBe(false)
    expect([host.relinquish(0), host.relinquish(0), host.relinquish(0), host.relinquish(0)]).toEqual([
      true,
      true,
      true,
      false,
    ])
    expect(host.counters).toMatchObject({ Rt: 3, Ra: 4, Rx: 1 })
    expect(guest.get(kept, 1n, 0)).toBe(1)
  })
})

test('a guest that writes while its page is read gets one version or the other, whole', () => {
  const { host } = world()
  const bytes = new Uint8Array(new SharedArrayBuffer(4 * 4096))
  const shared = new GuestMemory(bytes)
  expect(shared.isShared).toBe(true)
  host.addDomain({ id: 4, memory: shared })
  const view = new DataView(bytes.buffer)
  view.setUint32(0, Command.NewPool, true)
  view.setUint32(24, flags.persistent, true)
  expect(host.call(4, 0)).toBe(0)
  bytes.fill(0, 0, 56)
  view.setUint32(0, Command.PutPage, true)
  view.setUint32(48, 2, true)
  bytes.fill(9, 2 * 4096, 3 * 4096)
  expect(host.call(4, 0)).toBe(1)
  view.setUint32(0, Command.GetPage, true)
  view.setUint32(48, 3, true)
  expect(host.call(4, 0)).toBe(1)
  expect(bytes[3 * 4096 + 4095]).toBe(9)
})

test('options and arguments that make no sense', async () => {
  const store = compose([zcache({ limitBytes: '1MiB' })])
  expect(() => new XenHost({ store, realease: '4.9' } as never)).toThrow('did you mean release?')
  expect(() => new XenHost({ store, release: '4.13' as never })).toThrow('release 4.13 is none of')
  expect(() => new XenHost({ store, defects: 'none' as never })).toThrow('mended or original')
  expect(() => new XenHost({ store, clients: 0 })).toThrow('from 1 to 65535')
  const host = new XenHost({ store })
  const memory = new GuestMemory(new Uint8Array(4096))
  expect(() => host.addDomain({ id: 40_000, memory })).toThrow('0 to 32751')
  expect(() => host.addDomain({ id: 1, memory, bits: 16 as never })).toThrow('32 or 64')
  host.addDomain({ id: 1, memory })
  expect(() => host.addDomain({ id: 1, memory })).toThrow('already')
  expect(() => new GuestMemory(new Uint8Array(4095))).toThrow('multiple of 4096')
  expect(() => new GuestMemory(new Uint8Array(4096), [1])).toThrow('frame 0 cannot stand for page 1')
  expect(() => memory.map(1, 0)).toThrow('there is no frame 1')
  host.close()
  expect(() => host.call(1, 0)).toThrow('there is no domain 1')
  await store.close()
})

test('a domain that is killed between any two calls leaves nothing, whatever came before', async () => {
  for (let calls = 0; calls < 8; calls++) {
    const { host, store } = world({ release: '4.8' })
    const other = new Guest(host, 2)
    const kept = other.newPool(flags.shared, uuid)
    const guest = new Guest(host, 1)
    const operations: readonly (() => unknown)[] = [
      () => guest.newPool(flags.persistent),
      () => guest.put(0, 1n, 0, 1),
      () => guest.put(0, 1n, 0, 2),
      () => guest.newPool(flags.shared, uuid),
      () => guest.put(1, 2n, 0, 3),
      () => guest.get(1, 2n, 0),
      () => guest.page(Command.FlushObject, 0, 1n, 0),
      () => guest.destroyPool(0),
    ]
    for (const operate of operations.slice(0, calls)) operate()
    host.killDomain(1)
    expect(host.clients.has(1)).toBe(false)
    expect(other.put(kept, 9n, 0, 9)).toBe(1)
    expect(other.get(kept, 9n, 0)).toBe(9)
    // An object that it touched last has gone with it; a put counts as the owner's touch, a get as its own.
    expect(other.get(kept, 2n, 0)).toBe(calls === 5 ? 3 : 0)
    expect(host.clients.get(2)!.slots[kept]!.users.length).toBe(1)
    store.check?.()
    host.close()
    expect(store.ephemeralBytes?.()).toBe(0)
    await store.close()
  }
})

test('LIST while pages go: what it prints is whole, and the store unharmed', async () => {
  const { host, store } = world({ release: '4.5' }, [
    memory({ limitBytes: '256KiB' }),
    zcache({ limitBytes: '256KiB' }),
  ])
  const guest = new Guest(host, 1)
  const pool = guest.newPool(flags.ephemeral)
  for (let n = 0; n < 300; n++) {
    // More than there is room for: pages sink and are evicted meanwhile.
    guest.bytes.forEach((_, at) => {
      if (at >= firstFrame * 4096 && at < (firstFrame + 1) * 4096)
        guest.bytes[at] = Math.imul(at * 31 + n, 2_654_435_761) >>> 24
    })
    expect(guest.page(Command.PutPage, pool, BigInt(n % 5), n)).toBe(1)
    if (n % 10 === 0) store.tick({ pages: 4 })
    if (n % 50 !== 0) continue
    const buffer = new Uint8Array(4096)
    expect(host.control({ subOperation: 4, client: 0xffff, arg1: 4096, arg2: 1, buffer: controlBuffer(buffer) })).toBe(
      0,
    )
    const text = Buffer.from(buffer.subarray(0, buffer.indexOf(0))).toString()
    const pages = Number(/P=.*Pc:(\d+)/.exec(text)![1])
    expect(pages).toBe(host.clients.get(1)!.slots[pool]!.pool.census!().pages)
    expect(text.endsWith('T\n')).toBe(true)
  }
  expect(host.clients.get(1)!.slots[pool]!.pool.census!().pages).toBeLessThan(300)
  store.check?.()
  host.close()
  await store.close()
})
