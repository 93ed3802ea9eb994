/** Caches of values that a server serves, as clients of Redis, operators and Prometheus see them. */
import { execFile, spawn } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { type AddressInfo, createServer } from 'node:net'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { StatsNode } from '@tmem/core'
import { Valkey } from 'iovalkey'
import { expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { bin } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const run = promisify(execFile)
const text = `
caches:
  sessions: { memory: 8MiB, ttl: 3600, listen: unix:sessions.sock }
  kept: { memory: 4MiB, file: { path: kept.cache, size: 16MiB }, listen: tcp:127.0.0.1:0 }
control: control.sock
metrics: tcp:127.0.0.1:0
`

interface Up {
  readonly info: {
    readonly pid: number
    readonly metrics: string
    readonly caches: readonly { readonly name: string; readonly listen: string }[]
  }
  readonly end: (signal?: NodeJS.Signals) => Promise<{ code: number | null; stderr: string }>
}

/** Serves what a file in the folder says. Rejects with what it said where it does not. */
async function up(folder: string, says = text): Promise<Up> {
  writeFileSync(join(folder, 'tmem.yaml'), says)
  const child = spawn(process.execPath, [bin, 'up', '-f', join(folder, 'tmem.yaml'), '--json'], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  onTestFinished(() => void child.kill('SIGKILL'))
  let stderr = ''
  child.stderr.setEncoding('utf8').on('data', (part: string) => {
    stderr += part
  })
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve))
  const ready = await Promise.race([
    new Promise<string>((resolve) => child.stdout.setEncoding('utf8').once('data', resolve)),
    ended.then((code) => {
      throw new Error(`exit code ${code}: ${stderr.trimEnd()}`)
    }),
  ])
  return {
    info: JSON.parse(ready),
    end: async (signal = 'SIGTERM') => {
      child.kill(signal)
      return { code: await ended, stderr }
    },
  }
}

/** A client as applications have it. */
async function clientOf({ info }: Up, name: string): Promise<Valkey> {
  const { listen } = info.caches.find((cache) => cache.name === name)!
  const [, host, port] = /^tcp:(.+):(\d+)$/.exec(listen) ?? []
  const where = host === undefined ? { path: listen.replace('unix:', '') } : { host, port: Number(port) }
  const client = new Valkey({ ...where, lazyConnect: true, retryStrategy: () => null })
  client.on('error', () => undefined)
  onTestFinished(() => client.disconnect())
  await client.connect()
  return client
}

async function statOf(folder: string): Promise<Record<string, StatsNode>> {
  const { stdout } = await tmem(['stat', '--json', '--control', join(folder, 'control.sock')])
  const { caches } = JSON.parse(stdout) as { caches: StatsNode[] }
  return Object.fromEntries(caches.map((cache) => [cache.name, cache]))
}

const section = (node: StatsNode, name: string): Readonly<Record<string, number>> =>
  node.children.find((child) => child.name === name)!.counters

test('an application uses it, its operator sees it, and nothing is left', { timeout: 60_000 }, async () => {
  const folder = temporaryDirectory()
  const server = await up(folder)
  expect(server.info.caches).toEqual([
    { name: 'sessions', listen: `unix:${folder}/sessions.sock` },
    { name: 'kept', listen: expect.stringMatching(/^tcp:127\.0\.0\.1:[1-9]\d*$/) },
  ])
  expect(statSync(join(folder, 'sessions.sock')).mode & 0o777).toBe(0o600)
  const client = await clientOf(server, 'sessions')
  const value = Buffer.from(Array.from({ length: 100_000 }, (_, n) => n % 253))
  expect(await client.set('user:1', value, 'EX', 60)).toBe('OK')
  expect((await client.getBuffer('user:1'))!.equals(value)).toBe(true)
  expect(await client.ttl('user:1')).toBe(60)
  expect(await client.set('user:1', 'x', 'NX')).toBe(null)
  expect(await client.mset({ a: '1', b: '2' })).toBe('OK')
  expect(await client.ttl('a')).toBe(3600)
  expect(await client.mget('a', 'b', 'c')).toEqual(['1', '2', null])
  const results = await client
    .pipeline(Array.from({ length: 10_000 }, (_, n) => (n % 2 === 0 ? ['set', `p${n}`, n] : ['get', `p${n - 1}`])))
    .exec()
  expect(results!.map(([error, said]) => error ?? said)).toEqual(
    Array.from({ length: 10_000 }, (_, n) => (n % 2 === 0 ? 'OK' : String(n - 1))),
  )
  await expect(client.incr('a')).rejects.toThrow("ERR unknown command 'incr'")
  await expect(client.set('user:1', Buffer.alloc(5 * 2 ** 20))).rejects.toThrow('a value has at most 4194304 bytes')
  expect(await client.get('user:1')).toBe(null)
  const kept = await clientOf(server, 'kept')
  expect(await kept.get('a')).toBe(null)

  const { sessions } = await statOf(folder)
  expect(sessions!.counters).toMatchObject({ entries: 5002, sets: 5003, hits: 5006, limit_bytes: 8 * 2 ** 20 })
  expect(section(sessions!, 'misses')['absent']).toBe(2)
  expect(section(sessions!, 'resp')).toMatchObject({ connections: 1, errors: 2, refused_large: 1, protocol_errors: 0 })
  const metrics = await (await fetch(server.info.metrics)).text()
  for (const line of [
    'tmem_cache_entries{cache="sessions"} 5002',
    'tmem_cache_hits_total{cache="sessions"} 5006',
    'tmem_cache_misses_total{cache="sessions",reason="absent"} 2',
    'tmem_cache_refused_writes_total{cache="sessions",reason="large"} 1',
    'tmem_cache_connections{cache="kept"} 1',
  ])
    expect(metrics).toContain(`${line}\n`)
  expect(metrics).not.toContain('tmem_layer_value')

  const shown = await tmem(['stat', '--control', join(folder, 'control.sock')])
  expect(shown.stdout).toMatch(/^cache +entries +memory +limit +hits +misses +sets +refused +evicted +clients$/m)
  expect(shown.stdout).toMatch(/^sessions +5002 +[\d.]+MiB +8\.0MiB +5006 +2 +5003 +1 +0 +1$/m)
  const file = join(folder, 'tmem.yaml')
  const status = await tmem(['status', '-f', file])
  expect([status.code, status.stdout]).toEqual([0, expect.stringContaining(`cache sessions on unix:${folder}/sess`)])
  writeFileSync(file, text.replace('sessions:', 'others:'))
  const differs = await tmem(['status', '-f', file])
  expect([differs.code, differs.stderr]).toEqual([
    1,
    expect.stringMatching(/sessions is served but not in the file; others is not served$/m),
  ])
  expect((await tmem(['config', 'check', '-f', file])).stdout).toContain('cache others of 8MiB on unix:sessions.sock')
  expect(await server.end()).toEqual({ code: 0, stderr: '' })
  expect(readdirSync(folder).toSorted()).toEqual(['kept.cache', 'tmem.yaml'])
})

test('what was in a cache with a file is there after a restart, and one without is empty', {
  timeout: 60_000,
}, async () => {
  const folder = temporaryDirectory()
  const first = await up(folder)
  const valueFor = (n: number): string => `value ${n} `.repeat(40)
  for (const name of ['sessions', 'kept']) {
    const client = await clientOf(first, name)
    const pipeline = client.pipeline()
    for (let n = 0; n < 2000; n++) pipeline.set(`k${n}`, valueFor(n), 'EX', 1000)
    await pipeline.exec()
  }
  expect((await first.end()).code).toBe(0)
  const second = await up(folder)
  expect(await (await clientOf(second, 'sessions')).dbsize()).toBe(0)
  const client = await clientOf(second, 'kept')
  const said = await client.mget(Array.from({ length: 2000 }, (_, n) => `k${n}`))
  expect(said).toEqual(Array.from({ length: 2000 }, (_, n) => valueFor(n)))
  expect(await client.ttl('k1')).toBeGreaterThan(900)
  expect(await client.set('k1', 'new', 'XX', 'GET')).toBe(valueFor(1))
  expect(section((await statOf(folder))['kept']!, 'resp')['errors']).toBe(0)
  expect(await second.end()).toEqual({ code: 0, stderr: '' })
})

test('a cache beside devices ends with clients that are at work', { timeout: 60_000 }, async () => {
  const folder = temporaryDirectory()
  const server = await up(
    folder,
    `${text}devices: { a: { size: 1MiB, stack: memory(limit=2MiB) } }\nnbd: [unix:nbd.sock]\n`,
  )
  const client = await clientOf(server, 'kept')
  let isOver = false
  const errors: Error[] = []
  const busy = (async () => {
    for (let n = 0; !isOver; n++) {
      await client.set(`k${n}`, 'v'.repeat(1000)).catch((error: Error) => {
        isOver = true
        errors.push(error)
      })
    }
  })()
  await new Promise((resolve) => setTimeout(resolve, 200))
  expect(await server.end()).toEqual({ code: 0, stderr: '' })
  await busy
  expect(errors[0]!.message).toMatch(/closed|EPIPE|ECONNRESET/)
  expect(readdirSync(folder).toSorted()).toEqual(['kept.cache', 'tmem.yaml'])
})

test('the socket that a killed server left is replaced; one that is alive, and what is no socket, are not', {
  timeout: 60_000,
}, async () => {
  const folder = temporaryDirectory()
  const killed = await up(folder)
  await killed.end('SIGKILL')
  expect(existsSync(join(folder, 'sessions.sock'))).toBe(true)
  const server = await up(folder)
  const other = text
    .replace('control.sock', 'other.sock')
    .replace(/ {2}kept.*\n/, '')
    .replace('metrics: tcp:127.0.0.1:0\n', '')
  writeFileSync(join(folder, 'other.yaml'), other)
  const alive = await tmem(['up', '-f', join(folder, 'other.yaml')])
  expect([alive.code, alive.stderr]).toEqual([1, expect.stringMatching(/cache sessions cannot listen: .*EADDRINUSE/)])
  const owned = text.replace('sessions.sock', 'third.sock').replace('control.sock', 'other.sock')
  writeFileSync(join(folder, 'owned.yaml'), owned)
  const taken = await tmem(['up', '-f', join(folder, 'owned.yaml')])
  expect(taken.code).toBe(1)
  expect(taken.stderr).toContain('kept.cache')
  expect((await clientOf(server, 'sessions')).status).toBe('ready')
  expect((await server.end()).code).toBe(0)
  writeFileSync(join(folder, 'sessions.sock'), 'mine')
  const file = await tmem(['up', '-f', join(folder, 'other.yaml')])
  expect([file.code, file.stderr]).toEqual([2, expect.stringContaining('sessions.sock exists and is not a socket')])
  expect(readFileSync(join(folder, 'sessions.sock'), 'utf8')).toBe('mine')
  expect(readdirSync(folder).toSorted()).toEqual([
    'kept.cache',
    'other.yaml',
    'owned.yaml',
    'sessions.sock',
    'tmem.yaml',
  ])
})

test('a port that is taken is told, and nothing is left', async () => {
  const taken = createServer().listen(0, '127.0.0.1')
  await new Promise((resolve) => taken.once('listening', resolve))
  const { port } = taken.address() as AddressInfo
  onTestFinished(() => void taken.close())
  const folder = temporaryDirectory()
  await expect(up(folder, text.replace('unix:sessions.sock', `tcp:127.0.0.1:${port}`))).rejects.toThrow(
    /exit code 1: .*cache sessions cannot listen: .*EADDRINUSE.*: another process listens there, name another port$/,
  )
  expect(readdirSync(folder).toSorted()).toEqual(['kept.cache', 'tmem.yaml'])
})

test.each([
  ['a file that is also a socket', text.replace('path: kept.cache', 'path: sessions.sock'), /would be both .*sessions/],
  ['one file for two', text.replace('ttl: 3600', 'file: { path: kept.cache, size: 1MiB }'), /would be both .*kept/],
  ['memory that is no match for its file', text.replace('16MiB', '64MiB'), /kept\.memory: expected at least 3MiB and/],
])('%s is refused before anything is there', async (_, says, why) => {
  const folder = temporaryDirectory()
  writeFileSync(join(folder, 'tmem.yaml'), says)
  const { code, stderr } = await tmem(['up', '-f', join(folder, 'tmem.yaml')])
  expect([code, stderr]).toEqual([2, expect.stringMatching(why)])
  expect(readdirSync(folder)).toEqual(['tmem.yaml'])
})

test('memory that the host has not is refused', async () => {
  const folder = temporaryDirectory()
  await expect(up(folder, text.replace('8MiB', '1000GiB'))).rejects.toThrow(/exit code 1: .*may take .* of memory/)
  expect(readdirSync(folder)).toEqual(['tmem.yaml'])
})

test('a socket is for whom the file says', async () => {
  const folder = temporaryDirectory()
  const says = text.replace('tcp:127.0.0.1:0 }', '"unix:own.sock,mode=600" }').replace('metrics: tcp:127.0.0.1:0', '')
  const server = await up(folder, `${says}sockets: { mode: "666" }\n`)
  const mode = (name: string): number => statSync(join(folder, name)).mode & 0o777
  expect(['sessions.sock', 'own.sock'].map(mode)).toEqual([0o666, 0o600])
  expect(await server.end()).toEqual({ code: 0, stderr: '' })
})

test('an address that others reach is told', async () => {
  const server = await up(temporaryDirectory(), text.replace('unix:sessions.sock', 'tcp:0.0.0.0:0'))
  const { code, stderr } = await server.end()
  expect([code, stderr]).toEqual([
    0,
    expect.stringMatching(/everybody who reaches tcp:0\.0\.0\.0:\d+ can read, write and empty the cache sessions/),
  ])
})

test('redis-cli and redis-benchmark are served', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['redis-cli', 'redis-benchmark'] })
  const folder = temporaryDirectory()
  const server = await up(folder)
  const cli = async (...words: string[]): Promise<string> =>
    (await run('redis-cli', ['-s', join(folder, 'sessions.sock'), ...words])).stdout
  expect(await cli('SET', 'a', '1')).toBe('OK\n')
  expect(await cli('-3', 'GET', 'a')).toBe('1\n')
  expect(await cli('-3', '--no-raw', 'MGET', 'a', 'b')).toBe('1) "1"\n2) (nil)\n')
  expect(await cli('INFO')).toContain('loading:0')
  const words = ['-s', join(folder, 'sessions.sock'), '-n', '2000', '-P', '16', '--csv', '-t', 'ping,set,get,mset']
  const { stdout } = await run('redis-benchmark', words)
  expect(stdout.match(/^"/gm)).toHaveLength(6)
  expect((await server.end()).code).toBe(0)
})
