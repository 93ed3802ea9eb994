/** Real servers, and what happens to them: Redis 7.0 as Debian has it. */
import { writeFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { placeCases } from '@tmem/conformance'
import { GetOutcome } from '@tmem/core'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { Lenders, type RemoteMemory, type RemotePlan, ramster, type ValkeyOptions, valkey } from '../src/index.ts'
import { Network, RealServer, serverCertificates, serverCommand } from './server.ts'
import { range, World } from './world.ts'

const MiB = 2 ** 20
const cleanups: (() => Promise<void>)[] = []
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup()
})

beforeEach((ctx) => requires(ctx, { commands: [serverCommand] }))
vi.setConfig({ testTimeout: 60_000 })

async function server(...options: string[]): Promise<RealServer> {
  const one = await RealServer.start(...options)
  cleanups.push(() => one.stop())
  return one
}

async function network(before: RealServer): Promise<Network> {
  const one = await Network.before(before)
  cleanups.push(() => one.close())
  return one
}

const at = ({ port }: { readonly port: number }, more: Partial<ValkeyOptions> = {}): ValkeyOptions => ({
  host: '127.0.0.1',
  port,
  deadlineMs: 400,
  connectMs: 3000,
  ...more,
})

const worldOf = (servers: readonly ValkeyOptions[], persistent?: boolean): World => {
  const world = new World(
    servers.map((one) => valkey(one)),
    persistent,
  )
  cleanups.push(() => world.store.close())
  return world
}

async function open(servers: readonly ValkeyOptions[], persistent?: boolean): Promise<World> {
  const world = worldOf(servers, persistent)
  await world.store.ready!()
  return world
}

test('pages are on both servers, come back, and go with the stack', async () => {
  const [a, b] = [await server(), await server()]
  const world = await open([at(a), at(b)])
  expect(await world.fill(100)).toBe(100)
  expect([await a.keys(), await b.keys()]).toEqual([100, 100])
  await world.expectPages(100)
  world.pool.flushPage(1, 7)
  world.pool.flushPage(1, 8)
  await world.expectSoon(async () => (await a.keys()) === 98 && (await b.keys()) === 98)
  await world.store.close()
  expect([await a.keys(), await b.keys()]).toEqual([0, 0])
})

test('before it has connected it refuses, and ready says why it cannot', async () => {
  const a = await server()
  const gone = await server()
  await gone.kill()
  const world = worldOf([at(a, { connectMs: 300 }), at(gone, { connectMs: 300 })])
  expect(await world.fill(1)).toBe(0)
  await expect(world.store.ready!()).rejects.toMatchObject({
    code: 'TMEM_IO',
    message: expect.stringContaining(`127.0.0.1:${gone.port}: connect ECONNREFUSED`),
  })
  expect(await world.send(0)).toBe(0)
  await gone.start()
  await world.expectSoon(() => world.counter('degraded') === 0)
  await world.expectSent(1, 0)
  await world.expectPages(1)
})

test('a server is killed while pages are in transit: none is lost; it comes back empty and is filled; the other is killed', async () => {
  const [a, b] = [await server(), await server()]
  const world = await open([at(a), at(b)])
  expect(await world.fill(500)).toBe(500)
  const sinking = world.fill(1000, 500)
  await sleep(5)
  await a.kill()
  await sinking
  await world.expectPages(1500)
  expect(world.counter('degraded')).toBe(1)
  await a.start()
  await world.expectSoon(() => world.counter('degraded') === 0 && world.counter('one_copy_only') === 0)
  expect(world.counter('healed_copies')).toBeGreaterThan(0)
  await world.expectSoon(async () => (await a.keys()) === (await b.keys()))
  await b.kill()
  await world.expectPages(1500)
  expect(world.counter('lost')).toBe(0)
  world.store.check!()
})

test('a server is killed while pages come back: the other one answers', async () => {
  const [a, b] = [await server(), await server()]
  const world = await open([at(a), at(b)])
  expect(await world.fill(400)).toBe(400)
  const reading = Promise.all([0, 100, 200, 300].map((first) => world.expectPages(100, first)))
  await sleep(5)
  await a.kill()
  await reading
})

test('a server that is full refuses what comes; what is there stays, and there is room again after flushes', async () => {
  const [a, b] = [await server('--maxmemory', '4mb', '--maxmemory-policy', 'noeviction'), await server()]
  const world = await open([at(a), at(b)])
  const went = await world.fill(1500)
  expect(went).toBeGreaterThan(100)
  expect(went).toBeLessThan(1400)
  expect(world.counter('pers_pages_remote_failed')).toBeGreaterThan(0)
  await world.expectSoon(async () => (await a.keys()) === went && (await b.keys()) === went)
  await world.expectPages(1500)
  for (let index = 0; index < 1500; index++) if (index % 3 !== 0) world.pool.flushPage(1, index)
  await world.expectSoon(() => world.counter('pending_flushes') === 0)
  const more = await world.fill(100, 2000)
  expect(more).toBeGreaterThan(50)
  await world.expectPages(100, 2000)
  world.store.check!()
})

test('a server that drops keys by itself is refused for pages that may not vanish, and is good for others', async () => {
  const lru = ['--maxmemory', '4mb', '--maxmemory-policy', 'allkeys-lru']
  const [a, b] = [await server(...lru), await server()]
  await expect(open([at(a), at(b)])).rejects.toThrow('maxmemory-policy is allkeys-lru')
  const world = await open([at(a)], false)
  expect(await world.fill(2000)).toBe(2000)
  const hits = await world.hits(2000)
  expect(hits).toBeGreaterThan(100)
  expect(hits).toBeLessThan(2000)
})

test('LOADING: a server that loads its data is waited for', async () => {
  const debug = ['--enable-debug-command', 'yes', '--loading-process-events-interval-bytes', '1024']
  const [a, b] = [await server(...debug), await server()]
  await a.ask(async (client) => {
    await client.call('DEBUG', 'POPULATE', '20000', 'older', '100')
    await client.call('SAVE')
  })
  const world = await open([at(a), at(b)])
  expect(await world.fill(50)).toBe(50)
  await a.kill()
  await a.start('--key-load-delay', '50')
  expect(await a.ask((client) => client.info('persistence'))).toContain('loading:1')
  expect(await world.fill(1, 100)).toBe(0)
  await world.expectSoon(() => world.counter('degraded') === 0)
  await world.expectSoon(() => world.counter('one_copy_only') === 0)
  await b.kill()
  await world.expectPages(50)
})

test('READONLY: a server that has become a replica takes nothing, and does again when it is a primary', async () => {
  const [a, b] = [await server(), await server()]
  const world = await open([at(a), at(b)])
  expect(await world.fill(10)).toBe(10)
  await a.ask((client) => client.replicaof('127.0.0.1', 1))
  expect(await world.fill(10, 10)).toBe(0)
  // It may have been noticed before anything went there.
  expect(world.counter('pers_pages_remote_failed') + world.counter('degraded')).toBeGreaterThan(0)
  await world.expectPages(20)
  await a.ask((client) => client.call('REPLICAOF', 'NO', 'ONE'))
  await world.expectSent(10, 10)
  await world.expectPages(20)
})

test('NOPERM: a user without the commands is told; with them given it goes on without a restart', async () => {
  const [a, b] = [await server(), await server()]
  const rules = ['on', '>secret', '~tmem:*', 'resetchannels', '-@all']
  await a.ask((client) => client.call('ACL', 'SETUSER', 'borrower', ...rules, '+info', '+mget', '+unlink'))
  const user = { username: 'borrower', password: 'secret' }
  const world = await open([at(a, user), at(b)])
  expect(await world.fill(5)).toBe(0)
  expect(world.store.stats()).toBeDefined()
  await a.ask((client) => client.call('ACL', 'SETUSER', 'borrower', '+set', '+pexpire'))
  await world.expectSent(5, 0)
  await world.expectPages(5)
  await a.ask((client) => client.call('ACL', 'SETUSER', 'other', ...rules, '+mget', '+set'))
  await expect(open([at(a, { ...user, username: 'other' }), at(b)])).rejects.toThrow(/NOPERM.*info/)
})

test('a wrong password is told at once; when it is right it connects without a restart', async () => {
  const [a, b] = [await server('--requirepass', 'one'), await server()]
  const world = worldOf([at(a, { password: 'two', connectMs: 60_000 }), at(b)])
  await expect(world.store.ready!()).rejects.toThrow('WRONGPASS')
  expect(await world.fill(1)).toBe(0)
  await a.ask((client) => client.config('SET', 'requirepass', 'two'), 'one')
  await world.expectSoon(() => world.counter('degraded') === 0)
  await world.expectSent(1, 0)
  await world.expectPages(1)
})

test('TLS and an ACL: who cannot vouch for itself is refused, and a user has its own keys only', async (ctx) => {
  requires(ctx, { commands: ['openssl'] })
  const certificates = serverCertificates()
  const { path, settings: tls } = certificates
  cleanups.push(async () => certificates.remove())
  const acl = ['--user', ...'tmem on >secret resetchannels ~tmem:* -@all +info +mget +set +unlink +pexpire'.split(' ')]
  const [a, b] = [await server(...tls, ...acl), await server(...tls, ...acl)]
  writeFileSync(path('secret'), 'secret\n')
  const user = { username: 'tmem', passwordFile: path('secret'), caFile: path('ca.pem') }
  const world = await open([at(a, user), at(b, user)])
  expect(await world.fill(40)).toBe(40)
  await world.expectPages(40)
  await b.kill()
  await world.expectPages(40)
  await b.start()
  await world.expectSoon(() => world.counter('degraded') === 0 && world.counter('one_copy_only') === 0)
  await expect(open([at(a, { ...user, caFile: path('stranger.pem') })])).rejects.toThrow(/certificate/)
  await expect(open([at(a, { ...user, host: 'localhost', caFile: path('stranger.pem') })])).rejects.toThrow(
    /certificate/,
  )
  await expect(open([at(a, { username: 'tmem', passwordFile: path('secret') })])).rejects.toMatchObject({
    code: 'TMEM_IO',
  })
  const other = await open([at(a, { ...user, prefix: 'other' }), at(b, { ...user, prefix: 'other' })])
  expect(await other.fill(5)).toBe(0)
  expect(other.counter('pers_pages_remote_failed')).toBeGreaterThan(0)
  await other.expectPages(5)
})

test('hostile values: what somebody else has written, cut, exchanged or removed is never served', async () => {
  const [a, b] = [await server(), await server()]
  const world = await open([at(a), at(b)])
  expect(await world.fill(60)).toBe(60)
  const spoil = (one: RealServer, prefix: string): Promise<void> =>
    one.ask(async (client) => {
      const keys = (await client.keys(`${prefix}:*`)).toSorted()
      const values = await Promise.all(keys.map((key) => client.getBuffer(key)))
      for (const [n, key] of keys.entries()) {
        const value = values[n]!
        if (n % 6 === 0) await client.set(key, value.subarray(0, 100))
        else if (n % 6 === 1) await client.set(key, values[(n + 1) % keys.length]!)
        else if (n % 6 === 2) await client.del(key)
        else if (n % 6 === 3) await client.set(key, value.fill(0))
        else if (n % 6 === 4) {
          await client.del(key)
          await client.rpush(key, 'a', 'list')
        } else await client.set(key, Buffer.alloc(1_000_000))
      }
    })
  await spoil(a, 'tmem')
  await world.expectPages(60)
  expect(world.counter('damaged_copies') + world.counter('missing_copies')).toBeGreaterThan(20)
  await world.expectSoon(() => world.counter('one_copy_only') === 0)
  const both = await open([at(a, { prefix: 'both' }), at(b, { prefix: 'both' })])
  expect(await both.fill(60)).toBe(60)
  for (const one of [a, b]) await spoil(one, 'both')
  const answers = await Promise.allSettled(range(60).map((index) => both.expectPage(index)))
  const errors = answers.flatMap((one) => (one.status === 'rejected' ? [one.reason as { code: string }] : []))
  for (const { code } of errors) expect(code).toMatch(/^TMEM_(CORRUPT|IO)$/)
  expect(errors.length).toBeGreaterThan(30)
})

test('another life with leftovers, and two clients of one name, never meet; what is left has a lease', async () => {
  const [a, b] = [await server(), await server()]
  const first = await open([at(a), at(b)])
  expect(await first.fill(40)).toBe(40)
  const second = await open([at(a), at(b)])
  expect(await second.pool.fetch(1, 3, new Uint8Array(4096))).toBe(GetOutcome.Miss)
  second.put(3, 77)
  expect(await second.send(3)).toBe(1)
  await first.expectPages(40)
  second.pool.flushObject(1)
  await second.store.close()
  expect(await a.keys()).toBe(40)
  await first.expectPages(40)
  const leases = await a.ask(async (client) => Promise.all((await client.keys('*')).map((key) => client.pttl(key))))
  for (const lease of leases) expect(lease).toBeGreaterThan(3_000_000)
})

test('a million leftovers of another life go by themselves, and nobody looks for them', {
  timeout: 240_000,
}, async () => {
  const [a, b] = [await server(), await server()]
  const script = `for n = tonumber(ARGV[1]), tonumber(ARGV[1]) + 9999 do
    redis.call('SET', 'tmem:anotherlife:' .. n, 'left over', 'PX', 20000 - math.floor(n / 100)) end`
  const clients = 10 ** 6
  await a.ask(async (client) => {
    for (let first = 0; first < clients; first += 10_000) await client.eval(script, 0, first)
  })
  // As long as that takes there may be some that are gone by now.
  expect(await a.keys()).toBeGreaterThan(clients / 2)
  const patient = { deadlineMs: 5000 }
  const world = await open([at(a, patient), at(b, patient)])
  expect(await world.fill(40)).toBe(40)
  await world.expectPages(40)
  for (let round = 1; (await a.keys()) > 40; round++) {
    await world.fill(40)
    await world.expectPages(40)
    await sleep(200)
  }
  expect([await a.keys(), await b.keys(), world.counter('lost')]).toEqual([40, 40, 0])
  const asked = await a.ask((client) => client.info('commandstats'))
  expect(asked).toContain('cmdstat_set:')
  expect(asked).not.toMatch(/cmdstat_(keys|scan|flushdb|flushall|del):/)
})

test('leases are renewed while it runs, and end when nobody does', async () => {
  const [a, b] = [await server(), await server()]
  const short = { leaseMs: 1500 }
  const world = await open([at(a, short), at(b, short)])
  expect(await world.fill(40)).toBe(40)
  await sleep(4000)
  expect([await a.keys(), await b.keys()]).toEqual([40, 40])
  await world.expectPages(40)
  // What is dropped there all the same is noticed, and copied again.
  await a.ask((client) => client.flushall())
  await world.expectSoon(async () => (await a.keys()) === 40)
  // One that stands still for longer than a lease has dropped what it had.
  a.stall()
  await sleep(2500)
  a.resume()
  await world.expectPages(40)
  await world.expectSoon(async () => (await a.keys()) === 40 && world.counter('one_copy_only') === 0)
})

test('clocks that jump: this one by a day either way, and a server’s past its leases', async () => {
  const [a, b] = [await server(), await server()]
  const lease = { leaseMs: 6000 }
  const world = await open([at(a, lease), at(b, lease)])
  expect(await world.fill(40)).toBe(40)
  vi.useFakeTimers({ toFake: ['Date'] })
  cleanups.push(async () => void vi.useRealTimers())
  const now = Date.now()
  for (const jump of [86_400_000, -86_400_000, 0]) {
    vi.setSystemTime(now + jump)
    await world.expectPages(40)
    expect(await world.fill(10, 100)).toBe(10)
    await world.expectPages(10, 100)
  }
  expect([world.counter('missing_copies'), world.counter('degraded')]).toEqual([0, 0])
  // To a server whose clock is set ahead, every lease has ended.
  await a.ask(async (client) => {
    await Promise.all((await client.keys('*')).map((key) => client.pexpire(key, 1)))
  })
  await world.expectSoon(() => world.counter('healed_copies') >= 50 && world.counter('one_copy_only') === 0)
  await b.kill()
  await world.expectPages(40)
})

test('a network that stops forwarding: the other server answers, and it goes on when it forwards again', async () => {
  const [a, b] = [await server(), await server()]
  const way = await network(a)
  const world = await open([at(way), at(b)])
  expect(await world.fill(50)).toBe(50)
  way.mode = 'stands'
  await world.expectPages(50)
  world.put(100)
  expect(await world.send(100)).toBe(0)
  world.pool.flushPage(1, 3)
  way.mode = 'forwards'
  await world.expectSoon(() => world.counter('degraded') === 0)
  await world.expectSent(1, 100)
  await world.expectSoon(async () => (await a.keys()) === 50 && (await b.keys()) === 50)
  await world.expectPages(1, 100)
})

test('a network that cuts in the middle of an answer, again and again', async () => {
  const [a, b] = [await server(), await server()]
  const way = await network(a)
  const world = await open([at(way), at(b)])
  expect(await world.fill(50)).toBe(50)
  for (const bytes of [1, 5, 100, 1000, 3000, 4111, 10_000]) {
    way.cutAfter = bytes
    await world.expectPages(50)
    await world.fill(20, 1000)
    await world.expectPages(20, 1000)
    await world.expectSoon(() => world.counter('degraded') === 0)
  }
  world.store.check!()
  await world.expectSoon(() => world.counter('pending_flushes') === 0)
})

test('a network that is slow costs time, and nothing else', async () => {
  const [a, b] = [await server(), await server()]
  const way = await network(a)
  const world = await open([at(way, { deadlineMs: 5000 }), at(b)])
  way.delayMs = 60
  expect(await world.fill(30)).toBe(30)
  await world.expectPages(30)
})

test('a network that alters what it carries', async () => {
  const [a, b] = [await server(), await server()]
  const way = await network(a)
  const world = await open([at(way), at(b)])
  expect(await world.fill(50)).toBe(50)
  way.alter = (bytes) => (bytes.length > 2000 ? Buffer.from(bytes).fill(0x55, 1500, 1501) : bytes)
  await world.expectPages(50)
  expect(world.counter('damaged_copies')).toBeGreaterThan(0)
  way.alter = (bytes) => Buffer.from(bytes).fill(0x24, 0, 4)
  await world.expectPages(50)
  way.alter = undefined
  await world.expectSoon(() => world.counter('degraded') === 0 && world.counter('one_copy_only') === 0)
  await world.expectPages(50)
})

test('a server that stands still for a while', async () => {
  const [a, b] = [await server(), await server()]
  const world = await open([at(a), at(b)])
  expect(await world.fill(50)).toBe(50)
  a.stall()
  await world.expectPages(50)
  a.resume()
  await world.expectSoon(() => world.counter('degraded') === 0)
  await world.fill(50, 100)
  await world.expectPages(50, 100)
  // It has kept what it had: nothing had to be copied.
  expect(world.counter('healed_copies')).toBe(0)
})

test('maxmemory that is lowered: the pages of that server go to a third one, or come back', async () => {
  const limit = ['--maxmemory', '32mb', '--maxmemory-policy', 'noeviction']
  const [a, b, c] = [await server(...limit), await server(), await server()]
  const lenders = new Lenders([valkey(at(a)), valkey(at(b))])
  const world = new World(lenders)
  cleanups.push(() => world.store.close())
  await world.store.ready!()
  expect(await world.fill(1000)).toBe(1000)
  const used = async (): Promise<number> =>
    Number(/used_memory:(\d+)/.exec(await a.ask((client) => client.info('memory')))![1])
  const before = await used()
  // There is no third one: as much as that comes back.
  await a.ask((client) => client.config('SET', 'maxmemory', `${before - MiB}`))
  await world.expectSoon(async () => (await used()) <= before - MiB)
  expect(await a.keys()).toBeLessThan(900)
  expect(await a.keys()).toBeGreaterThan(300)
  await world.expectPages(1000)
  // And now there is.
  lenders.add(valkey(at(c)))
  await world.expectSoon(() => world.counter('machines_open') === 3)
  await a.ask((client) => client.config('SET', 'maxmemory', `${before - 2 * MiB}`))
  await world.expectSoon(async () => (await used()) <= before - 2 * MiB)
  expect(await c.keys()).toBeGreaterThan(50)
  await world.expectSoon(() => world.counter('one_copy_only') === 0)
  // Taken out, it has nothing of ours left, and may go.
  await lenders.remove(`127.0.0.1:${a.port}`)
  expect(await a.keys()).toBe(0)
  await a.kill()
  await world.expectPages(1000)
  expect([world.counter('lost'), world.counter('one_copy_only')]).toEqual([0, 0])
  world.store.check!()
})

test('a server that is killed for good while it is taken out costs nothing', async () => {
  const servers = [await server(), await server(), await server()] as const
  const lenders = new Lenders(servers.map((one) => valkey(at(one))))
  const world = new World(lenders)
  cleanups.push(() => world.store.close())
  await world.store.ready!()
  expect(await world.fill(600)).toBe(600)
  const [a] = servers
  const gone = lenders.remove(`127.0.0.1:${a.port}`)
  await sleep(5)
  await a.kill()
  await gone
  await world.expectSoon(() => world.counter('one_copy_only') === 0)
  await world.expectPages(600)
  expect(world.counter('lost')).toBe(0)
})

test('flushes and puts race with pages on their way', async () => {
  const [a, b] = [await server(), await server()]
  const world = await open([at(a), at(b)])
  const seeds = new Map<number, number>()
  let seed = 1
  for (let round = 0; round < 60; round++) {
    for (let n = 0; n < 20; n++) {
      const index = (round * 7 + n * 3) % 100
      world.put(index, ++seed)
      seeds.set(index, seed)
    }
    const sinking = world.send(...range(100, 0))
    await Promise.resolve()
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
  const into = new Uint8Array(4096)
  for (const index of range(100).filter((one) => !seeds.has(one)))
    expect(await world.pool.fetch(1, index, into)).toBe(GetOutcome.Miss)
  await world.expectSoon(async () => (await a.keys()) === (await b.keys()) && (await a.keys()) <= 100)
  world.store.check!()
})

test('settings that make no sense are refused with a reason', () => {
  expect(() => valkey({ host: '' })).toThrow('host is the name')
  expect(() => valkey({ host: 'a', port: 70_000 })).toThrow('port is 1 to 65535')
  expect(() => valkey({ host: 'a', leaseMs: 5 })).toThrow('leaseMs is')
  expect(() => valkey({ host: 'a', pasword: 'b' } as never)).toThrow('did you mean password')
})

/** One connection to a server for many places, each with keys of its own: a place refuses until it has connected. */
class Connected implements RemotePlan {
  readonly name: string
  readonly #memory: RemoteMemory
  #borrowers = 0
  fails: 'nothing' | 'writes' | 'reads' = 'nothing'

  private constructor(plan: RemotePlan) {
    this.name = plan.name
    this.#memory = plan.borrow({ persistent: true, opened: () => undefined, pressed: () => undefined })
  }

  static async to(one: RealServer): Promise<Connected> {
    const connected = new Connected(valkey(at(one)))
    await connected.#memory.ready()
    return connected
  }

  borrow(): RemoteMemory {
    const first = ++this.#borrowers * 2 ** 32
    const memory = this.#memory
    const mine = (keys: readonly number[]): number[] => keys.map((key) => first + key)
    const reach = (what: string): void => {
      if (this.fails === what) throw new Error('the network failed')
    }
    return {
      name: this.name,
      isOpen: true,
      identity: memory.identity,
      failure: undefined,
      freeBytes: memory.freeBytes,
      excessBytes: 0,
      leaseMs: undefined,
      ready: () => Promise.resolve(),
      put: async (keys, blocks) => {
        reach('writes')
        return await memory.put(mine(keys), blocks)
      },
      get: async (key) => {
        reach('reads')
        return await memory.get(first + key)
      },
      remove: (keys) => memory.remove(mine(keys)),
      renew: (keys) => memory.renew(mine(keys)),
      close: () => Promise.resolve(),
    }
  }

  close(): Promise<void> {
    return this.#memory.close()
  }
}

test('the place suite over two servers', { timeout: 240_000 }, async () => {
  const connected = await Promise.all([server(), server()].map(async (one) => await Connected.to(await one)))
  for (const one of connected) cleanups.push(() => one.close())
  const cases = await placeCases({
    name: 'ramster over two servers',
    open: (context) => ramster({ machines: connected, sizeBytes: 2 * MiB }).place!.open(context),
    manifest: {
      filledBy: 3 * MiB,
      fail: (what) => {
        for (const one of connected) one.fails = what
      },
      property: { runs: 20 },
    },
  })
  for (const one of cases) await expect(one.run()).resolves.toBeUndefined()
})
