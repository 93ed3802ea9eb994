/** Real clusters, of three primaries and three replicas each, and what happens to them: Redis 7.0 as Debian has it. */
import { execFile } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { afterAll, afterEach, beforeEach, expect, test, vi } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { type ValkeyClusterOptions, valkey, valkeyCluster } from '../src/index.ts'
import { RealCluster, RealServer, serverCertificates, serverCommand } from './server.ts'
import { range, World } from './world.ts'

const run = promisify(execFile)
const cleanups: (() => Promise<void>)[] = []
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup()
})

beforeEach((ctx) => requires(ctx, { commands: [serverCommand, 'redis-cli'] }))
vi.setConfig({ testTimeout: 120_000 })

/** Both are started once; a test that has killed servers starts them again, or takes the clusters away. */
let both: Promise<readonly [RealCluster, RealCluster]> | undefined
const clusters = (): Promise<readonly [RealCluster, RealCluster]> => {
  both ??= (async () => [await RealCluster.start(), await RealCluster.start()] as const)()
  return both
}
afterAll(async () => {
  for (const cluster of (await both) ?? []) await cluster.stop()
})

const at = (cluster: RealCluster, more: Partial<ValkeyClusterOptions> = {}): ValkeyClusterOptions => ({
  nodes: cluster.servers.map(({ port }) => ({ host: '127.0.0.1', port })),
  deadlineMs: 1000,
  connectMs: 20_000,
  ...more,
})

async function open(...options: readonly ValkeyClusterOptions[]): Promise<World> {
  const world = new World(
    options.map((one) => valkeyCluster(one)),
    options.length > 1,
    { waitMs: 30_000 },
  )
  cleanups.push(() => world.store.close())
  await world.store.ready!()
  return world
}

/** Starts again who was killed, and waits until all is well. */
async function mend(cluster: RealCluster): Promise<void> {
  for (const server of cluster.servers) if (!server.isRunning) await server.start()
  await cluster.isWell()
}

test('pages are in both clusters, spread over their primaries, come back, and go with the stack', async () => {
  const [a, b] = await clusters()
  const world = await open(at(a), at(b))
  expect(await world.fill(300)).toBe(300)
  for (const one of [a, b]) {
    const counts = await Promise.all((await one.primaries()).map((primary) => primary.keys()))
    expect(counts.reduce((sum, count) => sum + count)).toBe(300)
    for (const count of counts) expect(count).toBeGreaterThan(40)
  }
  await world.expectPages(300)
  for (let index = 0; index < 100; index++) world.pool.flushPage(1, index)
  await world.expectSoon(async () => (await a.keys()) === 200 && (await b.keys()) === 200)
  await world.store.close()
  expect([await a.keys(), await b.keys()]).toEqual([0, 0])
})

test('one server of a cluster is enough to find the others', async () => {
  const [a, b] = await clusters()
  const [last] = at(a).nodes.slice(-1)
  const world = await open(at(a, { nodes: [last!] }), at(b))
  expect(await world.fill(30)).toBe(30)
  await world.expectPages(30)
})

test('what goes to one server, or comes from it, is one write', async () => {
  const [a, b] = await clusters()
  const world = await open(at(a), at(b))
  const written = vi.spyOn(Socket.prototype, 'write')
  cleanups.push(async () => written.mockRestore())
  /** Writes to both clusters, without those that ask them how they are. */
  const writes = (): number => written.mock.calls.filter(([bytes]) => !/info|cluster/i.test(String(bytes))).length
  // 200 pages go in 8 flights of 25.
  expect(await world.fill(200)).toBe(200)
  expect(writes()).toBeGreaterThanOrEqual(8)
  expect(writes()).toBeLessThanOrEqual(8 * 6)
  written.mockClear()
  await Promise.all(range(200).map((index) => world.expectPage(index)))
  expect(writes()).toBeGreaterThan(0)
  expect(writes()).toBeLessThanOrEqual(6)
  written.mockClear()
  world.pool.flushObject(1)
  await world.expectSoon(async () => (await a.keys()) === 0 && (await b.keys()) === 0)
  const unlinks = written.mock.calls.filter(([bytes]) => String(bytes).includes('unlink'))
  expect(unlinks.length).toBeGreaterThan(0)
  expect(unlinks.length).toBeLessThanOrEqual(6)
})

test('ASK: a page whose slot is on the move is read from where it is going', async () => {
  const [a, b] = await clusters()
  const world = await open(at(a, { prefix: 'ask' }), at(b))
  expect(await world.fill(40)).toBe(40)
  const [from, to] = (await a.primaries()) as [RealServer, RealServer]
  const idOf = (one: RealServer): Promise<string> => one.ask(async (client) => String(await client.cluster('MYID')))
  const [fromId, toId] = [await idOf(from), await idOf(to)]
  const keys = await from.ask((client) => client.keys('ask:*'))
  expect(keys.length).toBeGreaterThan(2)
  const slots = await from.ask((client) => Promise.all(keys.map((key) => client.cluster('KEYSLOT', key))))
  for (const slot of new Set(slots)) {
    await to.ask((client) => client.cluster('SETSLOT', slot, 'IMPORTING', fromId))
    await from.ask((client) => client.cluster('SETSLOT', slot, 'MIGRATING', toId))
  }
  for (const key of keys) await from.ask((client) => client.migrate('127.0.0.1', to.port, key, 0, 5000))
  await world.expectPages(40)
  expect(await from.ask((client) => client.info('errorstats'))).toContain('errorstat_ASK:')
  expect(world.counter('missing_copies')).toBe(0)
  // MOVED: the slots are the other one's now.
  for (const slot of new Set(slots))
    for (const one of await a.primaries()) await one.ask((client) => client.cluster('SETSLOT', slot, 'NODE', toId))
  // What came up goes down again, and is read anew.
  await world.send(...range(40))
  await world.expectPages(40)
  expect(await world.fill(40, 100)).toBe(40)
  await world.expectPages(40, 100)
  const errors = await Promise.all((await a.primaries()).map((one) => one.ask((client) => client.info('errorstats'))))
  expect(errors.join()).toContain('errorstat_MOVED:')
  expect([world.counter('missing_copies'), world.counter('damaged_copies')]).toEqual([0, 0])
})

test('MOVED: slots that are moved while pages come and go', async () => {
  const [a, b] = await clusters()
  const world = await open(at(a), at(b))
  expect(await world.fill(300)).toBe(300)
  const [from, to] = (await a.primaries()) as [RealServer, RealServer]
  const idOf = (one: RealServer): Promise<string> => one.ask(async (client) => String(await client.cluster('MYID')))
  const words = ['--cluster', 'reshard', `127.0.0.1:${from.port}`, '--cluster-from', await idOf(from)]
  const moving = run('redis-cli', [...words, '--cluster-to', await idOf(to), '--cluster-slots', '400', '--cluster-yes'])
  let isOver = false
  const over = moving.finally(() => {
    isOver = true
  })
  for (let round = 0; !isOver || round < 2; round++) {
    expect(await world.fill(50, 1000 + (round % 4) * 50)).toBe(50)
    await world.expectPages(300)
  }
  await over
  await world.expectPages(300)
  expect([world.counter('missing_copies'), world.counter('damaged_copies')]).toEqual([0, 0])
  world.store.check!()
})

test('failover while pages leave: none is lost, and what the new primary lacks is copied to it again', async () => {
  const [a, b] = await clusters()
  const world = await open(at(a), at(b))
  expect(await world.fill(200)).toBe(200)
  const [victim] = (await a.primaries()) as [RealServer]
  const leaving = world.fill(800, 200)
  await sleep(20)
  await victim.kill()
  await leaving
  await world.expectPages(1000)
  await world.expectSoon(() => world.counter('degraded') === 0 && world.counter('one_copy_only') === 0)
  await mend(a)
  await world.expectSoon(() => world.counter('degraded') === 0 && world.counter('one_copy_only') === 0)
  // It goes on.
  for (let index = 2000; index < 2100; index++) world.put(index)
  await world.expectSent(100, 2000)
  // And now everything is in this cluster, too: the other one goes with all its servers.
  await world.expectSoon(() => {
    world.store.tick({ pages: 16 })
    return world.counter('one_copy_only') === 0 && world.counter('pending_flushes') === 0
  })
  for (const server of b.servers) await server.kill()
  await world.expectPages(1000)
  expect(world.counter('lost')).toBe(0)
  world.store.check!()
  await world.store.close()
  both = undefined
  await Promise.all([a.stop(), b.stop()])
})

test('failover while pages come back: each is right, from the other cluster or from the new primary', async () => {
  const [a, b] = await clusters()
  const world = await open(at(a), at(b))
  expect(await world.fill(400)).toBe(400)
  const [victim] = (await a.primaries()) as [RealServer]
  const reading = Promise.all([0, 100, 200, 300].map((first) => world.expectPages(100, first)))
  await sleep(5)
  await victim.kill()
  await reading
  await world.expectPages(400)
  await world.expectSoon(() => world.counter('degraded') === 0 && world.counter('one_copy_only') === 0)
  await mend(a)
  await world.expectPages(400)
  expect(world.counter('lost')).toBe(0)
})

test('a primary that starts anew, empty, empties its replica: what was there is copied again', async () => {
  const [a, b] = await clusters()
  const world = await open(at(a), at(b))
  expect(await world.fill(300)).toBe(300)
  const [victim] = (await a.primaries()) as [RealServer]
  expect(await victim.keys()).toBeGreaterThan(40)
  await victim.kill()
  await victim.start()
  await a.isWell()
  await world.expectSoon(() => world.counter('healed_copies') > 40)
  await world.expectSoon(() => world.counter('degraded') === 0 && world.counter('one_copy_only') === 0)
  // All of it is in this cluster, too.
  for (const server of b.servers) await server.kill()
  await world.expectPages(300)
  expect(world.counter('lost')).toBe(0)
  await world.store.close()
  both = undefined
  await Promise.all([a.stop(), b.stop()])
})

test('a primary that stands still is given up, and a replica takes its place', async () => {
  const [a, b] = await clusters()
  const world = await open(at(a), at(b))
  expect(await world.fill(200)).toBe(200)
  const [victim] = (await a.primaries()) as [RealServer]
  victim.stall()
  await world.expectPages(200)
  await world.expectSoon(() => world.counter('degraded') === 0)
  for (let index = 1000; index < 1050; index++) world.put(index)
  await world.expectSent(50, 1000)
  victim.resume()
  await a.isWell()
  await world.expectSoon(() => world.counter('degraded') === 0 && world.counter('one_copy_only') === 0)
  await world.expectPages(200)
  expect(world.counter('lost')).toBe(0)
})

test('one cluster alone is for pages that may vanish; one under two names is one', async () => {
  const [a] = await clusters()
  const world = await open(at(a))
  expect(await world.fill(30)).toBe(30)
  expect(await world.hits(30)).toBe(30)
  const nodes = at(a).nodes
  await expect(open(at(a, { nodes: nodes.slice(0, 1) }), at(a, { nodes: nodes.slice(3, 4) }))).rejects.toThrow(
    'one and the same',
  )
})

test('a user of an ACL needs the commands that the documentation names, and no others', async () => {
  const [a, b] = await clusters()
  const rules = '>secret resetchannels ~tmem:* -@all +info +cluster +get +set +unlink +pexpire +asking'.split(' ')
  for (const one of [...a.servers, ...b.servers])
    await one.ask((client) => client.call('ACL', 'SETUSER', 'borrower', 'on', ...rules))
  const user = { username: 'borrower', password: 'secret' }
  const world = await open(at(a, user), at(b, user))
  expect(await world.fill(60)).toBe(60)
  await world.expectPages(60)
  world.pool.flushObject(1)
  await world.expectSoon(() => world.counter('pending_flushes') === 0)
  await expect(open(at(a, { ...user, password: 'other' }), at(b, user))).rejects.toThrow('WRONGPASS')
})

test('clusters over TLS with an ACL: certificates and users count for each of their servers', async (ctx) => {
  requires(ctx, { commands: ['openssl'] })
  const certificates = serverCertificates()
  cleanups.push(async () => certificates.remove())
  const { path, settings } = certificates
  const acl = 'tmem on >secret resetchannels ~tmem:* -@all +info +cluster +get +set +unlink +pexpire +asking'.split(' ')
  const secure = '--tls-cluster yes --tls-replication yes --requirepass owner --masterauth owner --user'.split(' ')
  const start = async (...more: string[]): Promise<RealCluster> => {
    const cluster = await RealCluster.startFor(
      { ...certificates.access, password: 'owner' },
      ['--tls', '--cacert', path('ca.pem'), '-a', 'owner', '--no-auth-warning'],
      ...settings,
      ...secure,
      ...acl,
      ...more,
    )
    cleanups.push(() => cluster.stop())
    return cluster
  }
  const named = ['--cluster-announce-hostname', 'localhost', '--cluster-preferred-endpoint-type', 'hostname']
  const [a, b] = [await start(), await start(...named)]
  writeFileSync(path('secret'), 'secret\n')
  const user = { username: 'tmem', passwordFile: path('secret'), caFile: path('ca.pem') }
  const world = await open(at(a, user), at(b, user))
  expect(await world.fill(100)).toBe(100)
  await world.expectPages(100)
  for (const primary of await a.primaries()) expect(await primary.keys()).toBeGreaterThan(10)
  // A replica takes over, with the same certificate and the same users.
  const [victim] = (await a.primaries()) as [RealServer]
  await victim.kill()
  await world.expectPages(100)
  await world.expectSoon(() => world.counter('degraded') === 0 && world.counter('one_copy_only') === 0)
  for (let index = 100; index < 150; index++) world.put(index)
  await world.expectSent(50, 100)
  await world.expectPages(150)
  await mend(a)
  world.pool.flushObject(1)
  await world.expectSoon(async () => (await a.keys()) === 0 && (await b.keys()) === 0)
  // Who cannot vouch for itself, speaks without TLS, or is another user.
  const soon = { ...user, connectMs: 3000 }
  await expect(open(at(a, { ...soon, caFile: path('stranger.pem') }), at(b, user))).rejects.toThrow(/certificate/)
  await expect(
    open(at(a, { username: 'tmem', passwordFile: path('secret'), connectMs: 3000 }), at(b, user)),
  ).rejects.toMatchObject({ code: 'TMEM_IO' })
  writeFileSync(path('wrong'), 'wrong\n')
  await expect(open(at(a, { ...soon, passwordFile: path('wrong') }), at(b, user))).rejects.toThrow('WRONGPASS')
  const other = await open(at(a, { ...user, prefix: 'other' }), at(b, { ...user, prefix: 'other' }))
  expect(await other.fill(5)).toBe(0)
  await other.expectPages(5)
})

test('a cluster that is named as a server, and a server as a cluster, are told', async () => {
  const [a] = await clusters()
  const single = await RealServer.start()
  cleanups.push(() => single.stop())
  const world = new World([valkey({ host: '127.0.0.1', port: a.servers[0]!.port })], false)
  cleanups.push(() => world.store.close())
  await expect(world.store.ready!()).rejects.toThrow('it is a node of a cluster: name it so (cluster=HOST:PORT)')
  await expect(open({ nodes: [{ host: '127.0.0.1', port: single.port }], connectMs: 2000 })).rejects.toMatchObject({
    code: 'TMEM_IO',
  })
})
