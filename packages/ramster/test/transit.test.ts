/** What is late, lost or damaged on the way, over machines that do what the test says. */
import { makePage } from '@tmem/conformance'
import { compose, GetOutcome, type PageStore, parseStack, planStack } from '@tmem/core'
import { zcache, zcacheFactory } from '@tmem/zcache'
import { afterEach, expect, test } from 'vitest'
import { ramster, ramsterFactory } from '../src/index.ts'
import { Machine, type SwitchedMemory } from './machines.ts'
import { range, World as StackWorld, turn } from './world.ts'

const MiB = 2 ** 20
const stores: PageStore[] = []
afterEach(async () => {
  for (const store of stores.splice(0)) await store.close()
})

class World extends StackWorld {
  readonly machines: readonly Machine[]
  readonly a: SwitchedMemory
  readonly b: SwitchedMemory

  constructor({ count = 2, limitBytes = 8 * MiB, persistent = true } = {}) {
    const machines = range(count).map((n) => new Machine(`machine ${n}`, limitBytes))
    super(machines, persistent)
    stores.push(this.store)
    this.machines = machines
    this.a = machines[0]!.memory!
    this.b = machines[1]?.memory ?? this.a
  }
}

function gate(): { readonly closed: Promise<void>; readonly open: () => void } {
  let open = (): void => undefined
  const closed = new Promise<void>((resolve) => {
    open = resolve
  })
  return { closed, open: () => open() }
}

for (const when of ['before', 'after'] as const)
  test(`a put during a transfer stays, and the old page is given up (${when} the machine has it)`, async () => {
    const world = new World()
    const { closed, open } = gate()
    world.a[when] = closed
    world.put(1, 10)
    const sunk = world.send(1)
    await turn()
    world.put(1, 11)
    open()
    expect(await sunk).toBe(0)
    await world.expectPage(1, 11)
    await world.expectSoon(() => world.a.keys.size + world.b.keys.size === 0)
    // And the new one goes the same way, under another key.
    world.a[when] = undefined
    expect(await world.send(1)).toBe(1)
    await world.expectPage(1, 11)
    expect(new Set(world.a.put_.flat()).size).toBe(2)
    world.store.check?.()
  })

test('a flush during a transfer leaves nothing on any machine', async () => {
  const world = new World()
  const { closed, open } = gate()
  world.b.after = closed
  for (let index = 0; index < 5; index++) world.put(index)
  const sunk = world.send(0, 1, 2, 3, 4)
  await turn()
  expect(world.a.keys.size).toBe(5)
  world.pool.flushObject(1)
  open()
  await sunk
  await world.expectSoon(() => world.a.keys.size + world.b.keys.size === 0)
  expect(await world.pool.fetch(1, 0, new Uint8Array(4096))).toBe(GetOutcome.Miss)
})

test('a pool that is destroyed during a transfer leaves nothing on any machine', async () => {
  const world = new World()
  const { closed, open } = gate()
  world.a.before = closed
  world.put(1)
  const sunk = world.send(1)
  await turn()
  world.pool.destroy()
  open()
  await sunk
  await world.expectSoon(() => world.a.removed.length > 0)
  expect([world.a.keys.size, world.b.keys.size]).toEqual([0, 0])
})

test('a fetch that fails leaves the page, and everybody who waits is told', async () => {
  const world = new World()
  world.put(1)
  await world.send(1)
  for (const machine of world.machines) machine.fails = 'reads'
  const into = new Uint8Array(4096)
  const waiting = await Promise.allSettled([1, 2, 3].map(() => world.pool.fetch(1, 1, into)))
  for (const one of waiting) expect(one).toMatchObject({ status: 'rejected', reason: { code: 'TMEM_IO' } })
  for (const machine of world.machines) machine.fails = 'nothing'
  await world.expectPage(1)
  expect(world.counter('remote_pers_pages_unsucc_get')).toBe(3)
  expect(world.counter('remote_pers_pages_succ_get')).toBe(1)
})

test('getters of a page in transit all have it', async () => {
  const world = new World()
  world.put(1)
  await world.send(1)
  const { closed, open } = gate()
  world.a.held = world.b.held = closed
  const all = Promise.all([1, 2, 3].map(() => world.expectPage(1)))
  await turn()
  open()
  await expect(all).resolves.toHaveLength(3)
})

test('a put that fails leaves the page where it was, and it is sent again; no copy is left behind', async () => {
  const world = new World()
  world.put(1)
  for (const machine of world.machines.slice(1)) machine.fails = 'writes'
  expect(await world.send(1)).toBe(0)
  expect(world.counter('pers_pages_remote_failed')).toBe(1)
  await world.expectSoon(() => world.a.keys.size === 0)
  for (const machine of world.machines) machine.fails = 'nothing'
  let went = 0
  for (let n = 0; n < 20 && went === 0; n++) went = await world.send(1)
  expect(went).toBe(1)
  expect([world.a.keys.size, world.b.keys.size]).toEqual([1, 1])
  await world.expectPage(1)
})

test('the answer to a put is lost: the copy that may be there is given up', async () => {
  const world = new World()
  const { closed, open } = gate()
  world.b.after = closed
  world.put(1)
  const sunk = world.send(1)
  await turn()
  expect(world.b.keys.size).toBe(1)
  world.machines[1]!.fails = 'writes'
  open()
  expect(await sunk).toBe(0)
  world.machines[1]!.fails = 'nothing'
  world.b.after = undefined
  await world.expectSoon(() => world.a.keys.size + world.b.keys.size === 0)
  await world.expectPage(1)
})

test('an object that is flushed is given up in one message to each machine, before what is put later', async () => {
  const world = new World()
  const indexes = range(20)
  for (const index of indexes) world.put(index)
  expect(await world.send(...indexes)).toBe(20)
  world.pool.flushObject(1)
  world.put(3, 33)
  expect(await world.send(3)).toBe(1)
  for (const memory of [world.a, world.b]) {
    expect(memory.removed.map((keys) => keys.length)).toEqual([20])
    expect([...memory.keys]).toEqual([memory.put_.at(-1)![0]])
  }
  await world.expectPage(3, 33)
})

test('flushes wait for a machine that is away, and reach it when it is back', async () => {
  const world = new World()
  for (let index = 0; index < 4; index++) world.put(index)
  await world.send(0, 1, 2, 3)
  world.a.die()
  world.pool.flushObject(1)
  await world.expectSoon(() => world.b.keys.size === 0)
  expect(world.a.keys.size).toBe(4)
  expect(world.counter('pending_flushes')).toBe(4)
  await world.a.comeBack(true)
  await world.expectSoon(() => world.a.keys.size === 0)
})

test('flushes that a machine does not take are sent again', async () => {
  const world = new World()
  for (const index of range(4)) world.put(index)
  await world.send(...range(4))
  world.machines[0]!.fails = 'all'
  world.pool.flushObject(1)
  await world.expectSoon(() => world.b.keys.size === 0)
  world.machines[0]!.fails = 'nothing'
  world.store.tick({ pages: 16 })
  await world.expectSoon(() => world.counter('pending_flushes') === 0)
  expect(world.a.keys.size).toBe(0)
})

for (const [what, alter] of [
  ['cut', (bytes: Uint8Array) => bytes.subarray(0, bytes.length - 1)],
  ['altered', (bytes: Uint8Array) => bytes.with(bytes.length - 1, bytes.at(-1)! ^ 1)],
  ['longer', (bytes: Uint8Array) => Buffer.concat([bytes, bytes])],
  ['empty', () => new Uint8Array(0)],
  ['gone', () => undefined],
] as const)
  test(`a copy that is ${what} is not served; the other one is, and is copied`, async () => {
    const world = new World()
    for (let index = 0; index < 6; index++) world.put(index)
    await world.send(0, 1, 2, 3, 4, 5)
    world.a.alter = alter
    for (let index = 0; index < 6; index++) await world.expectPage(index)
    expect(world.counter(what === 'gone' ? 'missing_copies' : 'damaged_copies')).toBeGreaterThan(0)
    world.a.alter = undefined
    await world.expectSoon(() => world.counter('one_copy_only') === 0)
    expect(world.counter('healed_copies')).toBeGreaterThan(0)
    world.store.check?.()
  })

test('no copy is good: the page is corrupt, never other bytes, and an ephemeral one is a miss', async () => {
  const world = new World()
  world.put(1)
  await world.send(1)
  world.a.alter = world.b.alter = (bytes) => bytes.fill(7)
  await expect(world.pool.fetch(1, 1, new Uint8Array(4096))).rejects.toMatchObject({ code: 'TMEM_CORRUPT' })
  // What damaged it may have been the way.
  world.a.alter = undefined
  await world.expectPage(1)
  const ephemeral = new World({ persistent: false, count: 1 })
  ephemeral.put(1)
  await ephemeral.send(1)
  ephemeral.a.alter = (bytes) => bytes.fill(7)
  expect(await ephemeral.pool.fetch(1, 1, new Uint8Array(4096))).toBe(GetOutcome.Miss)
})

test('an older page of the same handle is not taken for the one of now, not even under its key', async () => {
  const world = new World()
  world.put(1, 10)
  await world.send(1)
  const old = await world.a.inner.get(world.a.put_[0]![0]!)
  world.put(1, 11)
  await world.send(1)
  world.a.alter = world.b.alter = () => old!
  await expect(world.pool.fetch(1, 1, new Uint8Array(4096))).rejects.toMatchObject({ code: 'TMEM_CORRUPT' })
})

test('one machine dies: every page is read, nothing more is taken; it comes back empty and is filled; the other dies', async () => {
  const world = new World()
  const indexes = range(100)
  for (const index of indexes) world.put(index)
  for (let n = 0; n < 100; n += 25) expect(await world.send(...indexes.slice(n, n + 25))).toBe(25)
  world.put(200)
  world.a.die()
  for (const index of indexes.slice(0, 10)) await world.expectPage(index)
  expect(world.counter('degraded')).toBe(1)
  expect(await world.send(200)).toBe(0)
  await world.a.comeBack(false)
  await world.expectSoon(() => world.counter('one_copy_only') === 0)
  expect(world.counter('degraded')).toBe(0)
  expect(world.a.keys.size).toBe(100)
  world.b.die()
  for (const index of [...indexes, 200]) await world.expectPage(index)
  expect(world.counter('lost')).toBe(0)
  world.store.check?.()
})

test('pages that are put anew or flushed while copies are made are not harmed, and leave nothing', async () => {
  const world = new World()
  const indexes = range(20)
  for (const index of indexes) world.put(index)
  await world.send(...indexes)
  world.a.die()
  const { closed, open } = gate()
  await world.a.comeBack(false)
  world.a.before = closed
  await world.expectSoon(() => world.a.put_.length > 1)
  world.put(3, 33)
  world.pool.flushPage(1, 4)
  open()
  await world.expectSoon(() => world.counter('one_copy_only') === 0)
  await world.expectSoon(() => world.counter('pending_flushes') === 0)
  expect([world.a.keys.size, world.b.keys.size]).toEqual([18, 18])
  await world.expectPage(3, 33)
  await world.expectPage(5)
  world.store.check?.()
})

test('a machine that loses its memory while the other is written to does not count', async () => {
  const world = new World()
  const { closed, open } = gate()
  world.b.before = closed
  world.put(1)
  const sunk = world.send(1)
  await turn()
  world.a.die()
  await world.a.comeBack(false)
  open()
  expect(await sunk).toBe(0)
  await world.expectSoon(() => world.b.keys.size === 0)
  await world.expectPage(1)
})

test('of three machines any two have a page, and one may die for good', async () => {
  const world = new World({ count: 3 })
  const indexes = range(30)
  for (const index of indexes) {
    world.put(index)
    expect(await world.send(index)).toBe(1)
  }
  const sizes = world.machines.map(({ memory }) => memory!.keys.size)
  expect(sizes.reduce((sum, size) => sum + size)).toBe(60)
  for (const size of sizes) expect(size).toBeGreaterThan(10)
  world.a.die()
  world.put(100)
  expect(await world.send(100)).toBe(1)
  for (const index of [...indexes, 100]) await world.expectPage(index)
})

test('a machine that is full refuses, and no single copy is left on the other', async () => {
  const world = new World({ limitBytes: 100_000 })
  const indexes = range(40)
  for (const index of indexes) world.put(index)
  for (const index of indexes) await world.send(index)
  await world.expectSoon(() => world.counter('pending_flushes') === 0)
  const held = world.counter('remote_pers_pages')
  expect(held).toBeGreaterThan(10)
  expect(held).toBeLessThan(25)
  expect([world.a.keys.size, world.b.keys.size]).toEqual([held, held])
  for (const index of indexes) await world.expectPage(index)
})

test('one machine under two names is one: nothing that may not vanish goes there', async () => {
  const machine = new Machine('one', MiB)
  const layer = ramster({ machines: [machine, machine], sizeBytes: MiB })
  const store = compose([zcache({ limitBytes: MiB }), layer])
  stores.push(store)
  await expect(store.ready!()).rejects.toThrow('one and the same')
  const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error('no pool')
  pool.put(1, 1, makePage('text', 1, 4096))
  expect((await pool.sink!(1, Uint32Array.of(1), 1, true)).pages).toBe(0)
})

test('what may vanish is on one machine only, and its loss is a miss', async () => {
  const world = new World({ persistent: false })
  const indexes = range(20)
  for (const index of indexes) world.put(index)
  await world.send(...indexes)
  expect([world.a.keys.size, world.b.keys.size]).toEqual([10, 10])
  world.a.die()
  await world.a.comeBack(false)
  let hits = 0
  for (const index of indexes) if ((await world.pool.fetch(1, index, new Uint8Array(4096))) === GetOutcome.Hit) hits++
  expect(hits).toBe(10)
})

test('options that make no sense are refused with a reason', () => {
  const machines = [new Machine('one', MiB)]
  expect(() => ramster({ machines: [], sizeBytes: MiB })).toThrow('1 to 8 machines')
  expect(() => ramster({ machines, sizeBytes: 100 })).toThrow('sizeBytes is')
  expect(() => ramster({ machines, size: MiB } as never)).toThrow('did you mean sizeBytes')
})

test('the text of a stack names servers, and what is wrong in it is told', () => {
  const stack = (text: string) => planStack(parseStack(text, [zcacheFactory, ramsterFactory]))
  expect(stack('zcache(limit=16MiB) > ramster(valkey=10.0.0.5:6379,valkey2=[::1]:6380)').persistent).toBe(true)
  const one = parseStack('ramster(valkey=somewhere,size=1MiB)', [ramsterFactory])[0]!.place!
  expect(one.traits).toMatchObject({ persistent: false, ephemeral: true, survives: 'nothing', capacity: 512 })
  expect(() => stack('ramster')).toThrow('name a server (valkey=HOST:PORT) or a cluster (cluster=HOST:PORT)')
  expect(stack('zcache(limit=16MiB) > ramster(cluster=10.0.1.1:7001+10.0.1.2,cluster2=[::1]:6380)').persistent).toBe(
    true,
  )
  expect(() => stack('ramster(cluster=a:7001+)')).toThrow('cluster is HOST:PORT')
  expect(() => stack('ramster(valkey=a:b:c)')).toThrow('valkey is HOST:PORT')
  expect(() => stack('ramster(valkey=a:99999)')).toThrow('port is 1 to 65535')
  expect(() => stack('ramster(valkey=a,valky2=b)')).toThrow('did you mean valkey2')
})

test('a file with a password that is not there is told when the stack is opened, and nothing is left behind', async () => {
  const text = 'zcache(limit=1MiB) > ramster(valkey=127.0.0.1:1,valkey2=127.0.0.1:2,passwordFile=/nowhere/secret)'
  expect(() => compose(parseStack(text, [zcacheFactory, ramsterFactory]))).toThrow(
    'ramster: cannot read the password in /nowhere/secret',
  )
  await turn()
})
