/** Machines that come and go while pages are there, want memory back, lose some of it, or are away for a while. */
import { GetOutcome, type PageStore } from '@tmem/core'
import { afterEach, expect, test } from 'vitest'
import { Lenders, type RamsterOptions } from '../src/index.ts'
import { Machine, type SwitchedMemory } from './machines.ts'
import { range, turn, World } from './world.ts'

const MiB = 2 ** 20
const stores: PageStore[] = []
afterEach(async () => {
  for (const store of stores.splice(0)) await store.close()
})

const machine = (name: string, limitBytes = 8 * MiB): Machine => new Machine(name, limitBytes)

function worldOf(
  machines: readonly Machine[],
  more: Partial<RamsterOptions> & { readonly limitBytes?: number } = {},
  persistent = true,
): World & { readonly lenders: Lenders; readonly at: (n: number) => SwitchedMemory } {
  const lenders = new Lenders(machines)
  const world = new World(lenders, persistent, more)
  stores.push(world.store)
  return Object.assign(world, { lenders, at: (n: number) => machines[n]!.memory! })
}

test('a machine that is added is used', async () => {
  const [a, b, c] = [machine('a'), machine('b'), machine('c', 64 * MiB)]
  const world = worldOf([a, b])
  expect(await world.fill(20)).toBe(20)
  world.lenders.add(c)
  expect(await world.fill(20, 100)).toBe(20)
  expect(c.memory!.keys.size).toBe(20)
  await world.expectPages(20)
  await world.expectPages(20, 100)
})

test('a machine that is taken out gives its pages to the others, and is let go of', async () => {
  const [a, b, c] = [machine('a'), machine('b'), machine('c')]
  const world = worldOf([a, b, c])
  expect(await world.fill(90)).toBe(90)
  expect(world.at(0).keys.size).toBeGreaterThan(0)
  const gone = world.lenders.remove('a')
  expect(world.lenders.machines).toContainEqual({ name: 'a', isLeaving: true })
  await gone
  expect(world.lenders.machines.map(({ name }) => name)).toEqual(['b', 'c'])
  expect([world.at(0).keys.size, world.at(1).keys.size, world.at(2).keys.size]).toEqual([0, 90, 90])
  expect([world.counter('one_copy_only'), world.counter('lost')]).toEqual([0, 0])
  await world.expectPages(90)
  world.store.check!()
  // It may come back, with another life.
  world.lenders.add(a)
  expect(await world.fill(60, 100)).toBe(60)
  expect(world.at(0).keys.size).toBeGreaterThan(0)
  await world.expectPages(60, 100)
})

test('as many machines stay as pages need, and a name that is none is told', () => {
  const world = worldOf([machine('a'), machine('b')])
  expect(() => world.lenders.remove('a')).toThrow('a cannot go: 2 must stay')
  expect(() => world.lenders.remove('z')).toThrow('z lends nothing; there are a, b')
  expect(() => world.lenders.add(machine('a'))).toThrow('a lends already')
  for (const name of 'cdefgh') world.lenders.add(machine(name))
  expect(() => world.lenders.add(machine('i'))).toThrow('8 machines, which is the most')
})

test('what no other machine has room for comes up; what has no room there either stays, until there is some', async () => {
  const machines = [machine('a'), machine('b', 100_000), machine('c', 100_000)]
  const world = worldOf(machines)
  expect(await world.fill(20)).toBe(20)
  const gone = world.lenders.remove('a')
  await gone
  expect(world.at(0).keys.size).toBe(0)
  await world.expectPages(20)
  world.store.check!()
})

test('a machine that wants memory back gets it: blocks go to the third one', async () => {
  const world = worldOf([machine('a'), machine('b'), machine('c', 64 * MiB)])
  expect(await world.fill(120)).toBe(120)
  const before = world.at(0).keys.size
  world.at(0).press(20 * 4096)
  await world.expectSoon(() => world.at(0).keys.size <= before - 20)
  expect(world.at(0).keys.size).toBeGreaterThan(before - 40)
  await world.expectSoon(() => world.counter('pending_flushes') === 0)
  expect([world.counter('one_copy_only'), world.counter('lost')]).toEqual([0, 0])
  await world.expectPages(120)
  world.store.check!()
})

test('a machine that wants memory back, and no third one: blocks come up', async () => {
  const world = worldOf([machine('a'), machine('b')])
  expect(await world.fill(100)).toBe(100)
  world.at(0).press(30 * 4096)
  await world.expectSoon(() => world.at(0).keys.size <= 70)
  expect(world.at(1).keys.size).toBe(world.at(0).keys.size)
  await world.expectPages(100)
  expect(world.counter('lost')).toBe(0)
  world.store.check!()
})

test('what may vanish is dropped where it can go nowhere', async () => {
  const world = worldOf([machine('a')], {}, false)
  expect(await world.fill(40)).toBe(40)
  world.at(0).press(40 * 8192)
  await world.expectSoon(() => world.at(0).keys.size === 0)
  world.store.check!()
})

test('a machine that has lost some of what it had is asked for all of it, and filled again', async () => {
  const world = worldOf([machine('a'), machine('b')])
  expect(await world.fill(60)).toBe(60)
  const lost = [...world.at(0).keys].slice(10, 30)
  await world.at(0).lose(lost)
  await world.expectSoon(() => world.counter('healed_copies') === 20 && world.counter('one_copy_only') === 0)
  expect(world.counter('missing_copies')).toBe(20)
  expect(world.at(0).keys.size).toBe(60)
  world.at(1).die()
  await world.expectPages(60)
})

test('a read of what only a machine that is away has waits for it', async () => {
  const world = worldOf([machine('a'), machine('b')], { waitMs: 60_000 })
  expect(await world.fill(5)).toBe(5)
  for (const n of [0, 1]) world.at(n).die()
  let isRead = false
  const reading = Promise.all([world.expectPage(1), world.expectPage(2)]).then(() => {
    isRead = true
  })
  for (let n = 0; n < 20; n++) await turn()
  expect(isRead).toBe(false)
  expect(world.counter('waited_reads')).toBe(2)
  await world.at(1).comeBack(true)
  await reading
})

test('it waits no longer than was said, the page stays, and what may vanish is not waited for', async () => {
  const world = worldOf([machine('a'), machine('b')], { waitMs: 30 })
  expect(await world.fill(5)).toBe(5)
  for (const n of [0, 1]) world.at(n).die()
  await expect(world.pool.fetch(1, 1, new Uint8Array(4096))).rejects.toMatchObject({ code: 'TMEM_IO' })
  await world.at(0).comeBack(true)
  await world.expectPage(1)
  const ephemeral = worldOf([machine('c')], { waitMs: 3_600_000 }, false)
  expect(await ephemeral.fill(2)).toBe(2)
  ephemeral.at(0).die()
  expect(await ephemeral.pool.fetch(1, 1, new Uint8Array(4096))).toBe(GetOutcome.Miss)
})

test('a stack that is closed while a read waits is closed when that has ended', async () => {
  const world = worldOf([machine('a'), machine('b')], { waitMs: 300 })
  expect(await world.fill(5)).toBe(5)
  for (const n of [0, 1]) world.at(n).die()
  const reading = world.pool.fetch(1, 1, new Uint8Array(4096))
  const closing = world.store.close()
  await expect(Promise.allSettled([reading, closing])).resolves.toHaveLength(2)
})

test('pages come back by themselves while there is room above, if that is asked for', async () => {
  const world = worldOf([machine('a'), machine('b')], { repatriate: true })
  expect(await world.fill(50)).toBe(50)
  await world.expectSoon(() => {
    world.store.tick({ pages: 16 })
    return world.counter('remote_pers_pages') === 0
  })
  expect(world.counter('repatriated_blocks')).toBe(50)
  await world.expectSoon(() => world.at(0).keys.size + world.at(1).keys.size === 0)
  await world.expectPages(50)
  world.store.check!()
})

test('puts and flushes race with machines that are taken out and want memory back', async () => {
  const machines = ['a', 'b', 'c', 'd'].map((name) => machine(name))
  const world = worldOf(machines)
  const seeds = new Map<number, number>()
  let seed = 1
  for (let round = 0; round < 40; round++) {
    for (let n = 0; n < 20; n++) {
      const index = (round * 7 + n * 3) % 100
      world.put(index, ++seed)
      seeds.set(index, seed)
    }
    const sinking = world.send(...range(100))
    const name = 'abcd'[round % 4]!
    const now = world.lenders.machines
    if (now.every((one) => one.name !== name)) world.lenders.add(machines[round % 4]!)
    else if (round % 3 === 0) world.at(round % 4).press(10 * 4096)
    else if (now.filter(({ isLeaving }) => !isLeaving).length > 2) void world.lenders.remove(name)
    await turn()
    for (let n = 0; n < 10; n++) {
      const index = (round * 11 + n * 7) % 100
      if (n % 2 === 0) {
        world.pool.flushPage(1, index)
        seeds.delete(index)
      } else {
        world.put(index, ++seed)
        seeds.set(index, seed)
      }
    }
    await sinking
  }
  for (const [index, now] of seeds) await world.expectPage(index, now)
  await world.expectSoon(
    () => world.counter('pending_flushes') === 0 && world.lenders.machines.every(({ isLeaving }) => !isLeaving),
  )
  expect(world.counter('relieved_blocks')).toBeGreaterThan(0)
  world.store.check!()
})

test('how long puts and gets take is counted by machine', async () => {
  const world = worldOf([machine('a'), machine('b')])
  expect(await world.fill(10)).toBe(10)
  await world.expectPages(10)
  const find = (name: string): number =>
    world.store
      .stats()
      .children.flatMap(({ children }) => children)
      .concat(world.store.stats().children)
      .filter((node) => node.name === 'ramster')
      .flatMap(({ children }) => children)
      .flatMap(({ children }) => children)
      .filter((node) => node.name === name)
      .reduce((sum, { counters }) => sum + counters['count']!, 0)
  expect([find('put_latency'), find('get_latency')]).toEqual([2, 10])
})
