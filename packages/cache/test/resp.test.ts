/** A cache as clients of Redis see it: what commands say, what is refused, and what clients cannot do to others. */
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { join } from 'node:path'
import { TmemError } from '@tmem/core'
import { delay } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import { random } from '../../../tools/random.ts'
import { Cache } from '../src/index.ts'
import { RespServer, respWorkBytes } from '../src/resp.ts'
import { type Client, type Reply, request, requestOf, serving, sunk } from './resp-client.ts'

const keys = 'wrong number of arguments'

/** Commands in their order, and what is said to each. */
const talk: readonly (readonly [line: string, reply: Reply | RegExp])[] = [
  ['PING', 'PONG'],
  ['ping hello', 'hello'],
  ['PING a b', /^-ERR wrong number/],
  ['ECHO hi', 'hi'],
  ['GET a', null],
  ['SET a 1', 'OK'],
  ['get a', '1'],
  ['GET', /^-ERR wrong number of arguments for 'get' command$/],
  ['GET a b', new RegExp(`^-ERR ${keys}`)],
  ['SET a', /^-ERR wrong number of arguments for 'set' command$/],
  ['SET a 2 NX', null],
  ['SET a 2 XX', 'OK'],
  ['SET b 2 XX', null],
  ['SET b 2 NX', 'OK'],
  ['SET b 3 GET', '2'],
  ['SET c 3 GET', null],
  ['SET c 4 NX GET', '3'],
  ['GET c', '3'],
  ['SET c 4 NX XX', '-ERR syntax error'],
  ['SET c 4 EX', '-ERR syntax error'],
  ['SET c 4 EX 1 PX 1', '-ERR syntax error'],
  ['SET c 4 KEEPTTL EX 1', '-ERR syntax error'],
  ['SET c 4 EX 1 KEEPTTL', '-ERR syntax error'],
  ['SET c 4 EXAT 99', '-ERR syntax error'],
  ['SET c 4 EX x', '-ERR value is not an integer or out of range'],
  ['SET c 4 EX 1.5', '-ERR value is not an integer or out of range'],
  ['SET c 4 EX 01', '-ERR value is not an integer or out of range'],
  ['SET c 4 EX 0', "-ERR invalid expire time in 'set' command"],
  ['SET c 4 PX -1', "-ERR invalid expire time in 'set' command"],
  ['SET c 4 EX 9223372036854775807', "-ERR invalid expire time in 'set' command"],
  ['GET c', '3'],
  ['SETEX c 0 4', "-ERR invalid expire time in 'setex' command"],
  ['PSETEX c 1000 5', 'OK'],
  ['SETEX d 10 6', 'OK'],
  ['PTTL c', 1000],
  ['TTL c', 1],
  ['TTL d', 10],
  ['TTL a', -1],
  ['PTTL none', -2],
  ['SET d 7 KEEPTTL', 'OK'],
  ['PTTL d', 10_000],
  ['SET d 8', 'OK'],
  ['TTL d', -1],
  ['EXPIRE d 5', 1],
  ['TTL d', 5],
  ['PEXPIRE d 1500', 1],
  ['TTL d', 2],
  ['GET d', '8'],
  ['PERSIST d', 1],
  ['PERSIST d', 0],
  ['PERSIST none', 0],
  ['EXPIRE none 5', 0],
  ['EXPIRE d 5 NX', /^-ERR wrong number/],
  ['EXPIRE d x', '-ERR value is not an integer or out of range'],
  ['EXPIRE d -1', 1],
  ['EXISTS d', 0],
  ['MSET x 1 y 22', 'OK'],
  ['MSET x', /^-ERR wrong number of arguments for 'mset' command$/],
  ['MSET x 1 y', /^-ERR wrong number of arguments for 'mset' command$/],
  ['MGET x none y', ['1', null, '22']],
  ['EXISTS x x y none', 3],
  ['STRLEN y', 2],
  ['STRLEN none', 0],
  ['DBSIZE', 5],
  ['DEL x x none', 1],
  ['UNLINK y', 1],
  ['SELECT 0', 'OK'],
  ['SELECT 1', '-ERR DB index is out of range'],
  ['SELECT x', '-ERR DB index is out of range'],
  ['CLIENT SETINFO LIB-NAME me', 'OK'],
  ['CLIENT GETNAME', null],
  ['CLIENT SETNAME me', 'OK'],
  ['CLIENT GETNAME', 'me'],
  ['CLIENT LIST', "-ERR unknown subcommand 'LIST'"],
  ['CLIENT ID x', /^-ERR wrong number/],
  ['COMMAND', []],
  ['COMMAND DOCS', []],
  ['CONFIG GET maxmemory', ['maxmemory', String(16 * 2 ** 20)]],
  ['CONFIG GET save', []],
  ['CONFIG SET maxmemory 1', "-ERR unknown subcommand 'SET'"],
  ['HELLO 4', '-NOPROTO unsupported protocol version'],
  ['HELLO x', '-ERR Protocol version is not an integer or out of range'],
  ['HELLO 2 AUTH default secret', /^-ERR there are no passwords here/],
  ['INCR a', "-ERR unknown command 'INCR'"],
  ['EVAL x 0', "-ERR unknown command 'EVAL'"],
  ['FLUSHALL x', '-ERR syntax error'],
  ['FLUSHDB ASYNC', 'OK'],
  ['MGET a b c', [null, null, null]],
]

/** A server whose clock stands still. */
const stopped = (): ReturnType<typeof serving> => serving({ clock: () => 1_700_000_000_000 })

test.each([2, 3])('what commands say, in RESP%i', async (protocol) => {
  const client = (await stopped()).client()
  const about = ['server', 'tmem', 'version', '7.0.0', 'proto', protocol, 'id', 1]
  const fixed = ['mode', 'standalone', 'role', 'master', 'modules', []]
  expect(await client.say(`HELLO ${protocol} SETNAME first`)).toEqual([...about, ...fixed])
  expect(await client.say('CLIENT GETNAME')).toBe('first')
  expect(await client.say('HELLO 2')).toContain(2)
  const again = (await stopped()).client()
  await again.say(`HELLO ${protocol}`)
  for (const [line, reply] of talk) {
    const said = await again.say(line)
    const isRight = reply instanceof RegExp && reply.test(String(said))
    expect([line, said]).toEqual([line, isRight ? said : reply])
  }
})

test('INFO says what its readers look for, with the cache’s own figures', async () => {
  const client = (await stopped()).client()
  for (const line of ['SET a 1', 'GET a', 'GET b']) await client.say(line)
  const info = String(await client.say('INFO everything'))
  for (const line of ['redis_version:7.0.0', 'loading:0', 'role:master', 'connected_clients:1', 'keyspace_hits:1'])
    expect(info).toContain(`${line}\r\n`)
  expect(info).toContain('keyspace_misses:1\r\n')
  expect(info).toContain('total_commands_processed:4\r\n')
  expect(info).toContain('db0:keys=1\r\n')
})

test('lives end by the clock, and one is given to what says none', async () => {
  const time = { now: 1e12 }
  const { client } = await serving({ clock: () => time.now }, { ttl: 5000 })
  const one = client()
  await one.say('SET a 1')
  await one.say('SET b 1 PX 7000')
  await one.say('SET c 1')
  await one.say('PERSIST c')
  await one.say('MSET d 1')
  expect(await one.say('PTTL a')).toBe(5000)
  time.now += 4999
  expect(await one.say('EXISTS a b c d')).toBe(4)
  expect(await one.say('PTTL a')).toBe(1)
  time.now += 1
  expect(await one.say('MGET a b c d')).toEqual([null, '1', '1', null])
  expect(await one.say('TTL a')).toBe(-2)
  expect(await one.say('SET b 2 KEEPTTL')).toBe('OK')
  time.now += 2000
  expect(await one.say('EXISTS b c')).toBe(1)
})

test('keys and values are any bytes', async () => {
  const client = (await serving()).client()
  const key = Buffer.from(Array.from({ length: 256 }, (_, n) => n))
  const value = Buffer.concat([key, Buffer.from('\r\n$5\r\n'), randomBytes(70_000)])
  expect(await client.ask('SET', key, value)).toBe('OK')
  expect(await client.ask('GET', key)).toBe(value.toString('latin1'))
  expect(await client.ask('SET', '', '')).toBe('OK')
  expect(await client.ask('GET', '')).toBe('')
  expect(await client.ask('STRLEN', key)).toBe(value.length)
  expect(await client.ask('SET', Buffer.alloc(65_536, 'k'), 'v')).toBe('OK')
  for (const command of ['GET', 'DEL', 'EXISTS', 'TTL'])
    expect(await client.ask(command, Buffer.alloc(65_537, 'k'))).toBe('-ERR a key has at most 65536 bytes')
  expect(await client.ask('SET', Buffer.alloc(65_537, 'k'), 'v')).toBe('-ERR a key has at most 65536 bytes')
})

// ---- Refused writes ---------------------------------------------------------------------------------------------

const tooLarge = Buffer.alloc(2 ** 20 + 1)

test.each([
  ['SET', ['SET', 'a', tooLarge]],
  ['SET with a condition that holds', ['SET', 'a', tooLarge, 'XX']],
  ['SET that keeps the life', ['SET', 'a', tooLarge, 'KEEPTTL']],
  ['SETEX', ['SETEX', 'a', '10', tooLarge]],
  ['PSETEX', ['PSETEX', 'a', '10', tooLarge]],
  ['MSET', ['MSET', 'a', '1', 'b', tooLarge, 'c', '1']],
] as const)('a value that is too large is an error, and its key has no value: %s', async (_, words) => {
  const { client, server } = await serving({ memory: '2MiB' })
  const one = client()
  await one.say('MSET a old b old c old')
  expect(await one.ask(...words)).toBe(
    '-ERR a value has at most 1048576 bytes, and this one, or the whole request, is too large; the key has no value now',
  )
  const others = words[0] === 'MSET' ? null : 'old'
  expect(await one.say('MGET a b c')).toEqual([null, others, others])
  expect(server.stats().counters).toMatchObject({ refused_large: 1, errors: 1, protocol_errors: 0 })
})

test('a command that is wrong, or whose condition does not hold, changes nothing', async () => {
  const client = (await serving({ memory: '2MiB' })).client()
  await client.say('SET a old')
  expect(await client.ask('SET', 'a', tooLarge, 'NX')).toBe(null)
  expect(await client.ask('SET', 'a', tooLarge, 'EX', '0')).toMatch(/^-ERR invalid expire/)
  expect(await client.ask('SETEX', 'a', 'x', tooLarge)).toMatch(/^-ERR value is not an integer/)
  expect(await client.ask('ECHO', tooLarge)).toBe('-ERR an argument, or the whole request, is too large')
  expect(await client.say('GET a')).toBe('old')
})

test('a value without room is an error, and its key has no value', async () => {
  const { client, server } = await serving({ memory: '2MiB' })
  const one = client()
  await one.say('SET a old')
  // With its key and what its pages begin with it is more than half of the memory.
  expect(await one.ask('SET', 'a', randomBytes(2 ** 20 - 3))).toMatch(/^-OOM no room for a value of 1048573 bytes/)
  expect(await one.say('GET a')).toBe(null)
  expect(server.stats().counters).toMatchObject({ refused_room: 1 })
})

test.each([
  ['memory', false],
  ['memory and a file', true],
])(
  'overfull %s: what is asked for often stays, and nothing older is ever read',
  { timeout: 60_000 },
  async (_, hasFile) => {
    const { folder } = await serving()
    const file = hasFile ? { file: { path: join(folder, 'file'), size: '4MiB' } as const } : {}
    const { client, cache, errors } = await serving({ memory: '4MiB', ...file })
    const one = client()
    const next = random(41)
    const below = (n: number): number => Math.floor(next() * n)
    const versions = new Map<string, number>()
    const [hot, cold] = [50, 12_000]
    const counts = { hits: 0, misses: 0, wrong: 0, lost: 0 }
    const say = async (key: string, round: number): Promise<void> => {
      const isSet = versions.get(key) === undefined || next() < 0.3
      if (isSet) {
        versions.set(key, round)
        await one.ask('SET', key, `${key} ${round} ${randomBytes(600).toString('hex')}`)
        return
      }
      const said = await one.ask('GET', key)
      if (said === null) counts.misses++
      else if (String(said).startsWith(`${key} ${versions.get(key)} `)) counts.hits++
      else counts.wrong++
      if (said === null && key.startsWith('hot')) counts.lost++
    }
    for (let round = 0; round < 12_000; round++) {
      await say(`hot${below(hot)}`, round)
      await say(`cold${below(cold)}`, round)
    }
    expect(counts).toMatchObject({ wrong: 0, lost: 0 })
    expect(counts.hits).toBeGreaterThan(8000)
    expect(counts.misses).toBeGreaterThan(100)
    expect(cache.stats().memoryBytes).toBeLessThanOrEqual(4 * 2 ** 20)
    expect(errors).toEqual([])
    cache.check()
  },
)

// ---- A model ------------------------------------------------------------------------------------------------------

/** What Redis would say, for a few keys. */
class Model {
  now = 1e12
  readonly #values = new Map<string, { value: string; end: number }>()

  #at(key: string): { value: string; end: number } | undefined {
    const found = this.#values.get(key)
    if (found === undefined || found.end > this.now) return found
    this.#values.delete(key)
    return undefined
  }

  #set(key: string, value: string, end = Number.POSITIVE_INFINITY): void {
    this.#values.set(key, { value, end })
  }

  say([command, key = '', ...rest]: readonly string[]): Reply {
    const found = this.#at(key)
    switch (command) {
      case 'GET':
        return found?.value ?? null
      case 'SET': {
        const [value = '', ...options] = rest
        const time = options.indexOf('PX')
        if (options.includes('NX') && found !== undefined) return options.includes('GET') ? found.value : null
        if (options.includes('XX') && found === undefined) return null
        const end = time >= 0 ? this.now + Number(options[time + 1]) : undefined
        this.#set(key, value, options.includes('KEEPTTL') ? found?.end : end)
        return options.includes('GET') ? (found?.value ?? null) : 'OK'
      }
      case 'PTTL':
        return found === undefined ? -2 : found.end === Number.POSITIVE_INFINITY ? -1 : found.end - this.now
      case 'PEXPIRE':
        if (found === undefined) return 0
        found.end = this.now + Number(rest[0])
        return 1
      case 'PERSIST':
        if (found === undefined || found.end === Number.POSITIVE_INFINITY) return 0
        found.end = Number.POSITIVE_INFINITY
        return 1
      case 'DEL':
        return [key, ...rest].filter((one) => this.#at(one) !== undefined && this.#values.delete(one)).length
      case 'EXISTS':
        return [key, ...rest].filter((one) => this.#at(one) !== undefined).length
      case 'MGET':
        return [key, ...rest].map((one) => this.#at(one)?.value ?? null)
      case 'MSET':
        for (let n = -1; n < rest.length; n += 2) this.#set(n < 0 ? key : rest[n]!, rest[n + 1]!)
        return 'OK'
      case 'STRLEN':
        return found?.value.length ?? 0
      case 'FLUSHALL':
        this.#values.clear()
        return 'OK'
      default:
        throw new Error(command)
    }
  }
}

/** A command, by chance. */
function commandBy(next: () => number): string[] {
  const below = (n: number): number => Math.floor(next() * n)
  const key = (): string => `key${below(6)}`
  const value = (): string => String.fromCharCode(97 + below(26)).repeat(next() < 0.1 ? below(30_000) : below(200))
  const time = (): string => String(1 + below(50))
  switch (below(11)) {
    case 0:
    case 1:
      return [
        'SET',
        key(),
        value(),
        ...[[], ['NX'], ['XX'], ['GET'], ['KEEPTTL'], ['PX', time()], ['NX', 'GET']][below(7)]!,
      ]
    case 2:
      return ['PTTL', key()]
    case 3:
      return ['PEXPIRE', key(), time()]
    case 4:
      return ['PERSIST', key()]
    case 5:
      return next() < 0.5 ? ['DEL', key(), key()] : ['SET', key(), value(), 'PX', time(), 'XX']
    case 6:
      return ['EXISTS', key(), key(), key()]
    case 7:
      return ['MGET', key(), key(), key()]
    case 8:
      return ['MSET', key(), value(), key(), value()]
    case 9:
      return next() < 0.05 ? ['FLUSHALL'] : ['STRLEN', key()]
    default:
      return ['GET', key()]
  }
}

test.each([
  [21, false],
  [22, false],
  [23, true],
  [24, true],
])('what clients are told is what a model says (seed %i, file: %s)', { timeout: 60_000 }, async (seed, hasFile) => {
  const model = new Model()
  const { folder, client, cache, errors } = await serving({ clock: () => model.now })
  const over = hasFile
    ? await serving({ clock: () => model.now, memory: '4MiB', file: { path: join(folder, 'file'), size: '16MiB' } })
    : { client, cache, errors }
  const [one, other] = [over.client(), over.client()]
  const next = random(seed)
  let deferred = 0
  for (let step = 0; step < 4000; step++) {
    if (next() < 0.2) model.now += Math.floor(next() * 20)
    if (hasFile && step % 40 === 0) {
      await sunk(over.cache as Cache<never>)
      deferred += Number(over.cache.has(Buffer.from('key1')) && over.cache.get(Buffer.from('key1')) === undefined)
    }
    const words = commandBy(next)
    expect([step, words, await (next() < 0.5 ? one : other).ask(...words)]).toEqual([step, words, model.say(words)])
  }
  over.cache.check()
  expect(over.errors).toEqual([])
  expect(deferred > 20).toBe(hasFile)
})

test('of many clients that set one key each is told what the one before it set, also where one has to wait', async () => {
  const { folder } = await serving()
  const { client, cache } = await serving({ memory: '4MiB', file: { path: join(folder, 'file'), size: '16MiB' } })
  const clients = Array.from({ length: 20 }, client)
  for (let round = 0; round < 10; round++) {
    await clients[0]!.say(`SET gone${round} x`)
    await sunk(cache as Cache<never>)
    expect(cache.get(Buffer.from(`gone${round}`))).toBeUndefined()
    const said = await Promise.all(clients.map((one, n) => one.say(`SET gone${round} ${n} GET`)))
    // Each of them was told what the one before it had set: a chain without a fork.
    expect(new Set(said).size).toBe(clients.length)
    expect(said).toContain('x')
  }
})

test('a place that fails is an error for who asks, told once each; what is written or deleted is so', async () => {
  const turn = (): Promise<void> => Promise.reject(new TmemError('TMEM_IO', 'the disk\nis gone', { layer: 'test' }))
  const stack = [delay({ turn }), memory({ limitBytes: 2 ** 23 })]
  const { client, cache, errors } = await serving({ memory: '16MiB', stack })
  const one = client()
  await one.say('MSET a 1 b 2 c 3')
  for (let n = 0; n < 1000; n++) cache.set(`filler ${n}`, randomBytes(3500))
  expect(await one.say('GET a')).toBe('-ERR the disk?is gone')
  expect(await one.say('MGET none a b')).toEqual([null, '-ERR the disk?is gone', '-ERR the disk?is gone'])
  expect(await one.say('SET a 2 KEEPTTL')).toBe('-ERR the disk?is gone')
  expect(errors).toHaveLength(4)
  expect(await one.say('DEL a none')).toBe(1)
  expect(await one.say('MGET a none')).toEqual([null, null])
  expect(await one.say('SET b 3')).toBe('OK')
  expect(await one.say('GET b')).toBe('3')
})

// ---- Clients that are many, slow, or hostile ------------------------------------------------------------------

test('10,000 commands at once are answered in their order', async () => {
  const client = (await serving()).client()
  const asked: Promise<Reply>[] = []
  const parts: Buffer[] = []
  for (let n = 0; n < 5000; n++) {
    parts.push(request('SET', `k${n}`, `v${n}`), request('GET', `k${n}`))
    asked.push(client.reply(), client.reply())
  }
  client.socket.write(Buffer.concat(parts))
  expect(await Promise.all(asked)).toEqual(Array.from({ length: 5000 }, (_, n) => ['OK', `v${n}`]).flat())
})

test('who does not read its answers is not read, and has all of them later', { timeout: 30_000 }, async () => {
  const { client, server } = await serving({ memory: '8MiB' })
  const [slow, other] = [client(), client()]
  const value = 'x'.repeat(100_000)
  await slow.say(`SET a ${value}`)
  const asked = Array.from({ length: 2000 }, () => slow.reply())
  slow.socket.pause()
  for (let n = 0; n < 2000; n++) slow.socket.write(request('GET', 'a'))
  const count = (name: string): number => server.stats().counters[name]!
  for (let before = -1; before !== count('commands'); ) {
    before = count('commands')
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
  expect(count('commands')).toBeLessThan(200)
  expect(count('held_bytes')).toBeLessThan(1e6)
  // Nobody else notices.
  expect(await other.say('STRLEN a')).toBe(100_000)
  slow.socket.resume()
  for (const reply of asked) expect(await reply).toBe(value)
})

test('one answer of many large values waits for its reader, too', { timeout: 30_000 }, async () => {
  const { client, server } = await serving({ memory: '8MiB' })
  const one = client()
  await one.say(`SET a ${'x'.repeat(100_000)}`)
  one.socket.pause()
  const asked = one.ask('MGET', ...Array.from({ length: 100 }, () => 'a'))
  await new Promise((resolve) => setTimeout(resolve, 300))
  expect(server.stats().counters['held_bytes']).toBeLessThan(1e6)
  one.socket.resume()
  expect(await asked).toHaveLength(100)
})

test('together they hold what is said at most: who holds most is ended, others go on', async () => {
  const { client, server, refused } = await serving({ memory: '16MiB' })
  const most = respWorkBytes(8 * 2 ** 20)
  expect(most).toBe(32 * 2 ** 20)
  const small = client()
  await small.say('SET a 1')
  const greedy: Client[] = []
  for (let n = 0; n < 8; n++) {
    const one = client()
    greedy.push(one)
    await one.say('PING')
    one.socket.write(`*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$${7 * 2 ** 20 + n}\r\nx`)
  }
  await Promise.race(greedy.map(({ ended }) => ended))
  while (server.stats().counters['overloads']! < 4) await new Promise((resolve) => setTimeout(resolve, 10))
  const { held_bytes: held, connections } = server.stats().counters
  expect(held).toBeLessThanOrEqual(most)
  expect(connections).toBe(5)
  expect(refused[0]).toMatch(/^of \d+ bytes of requests and answers it held \d+$/)
  expect(await small.say('GET a')).toBe('1')
})

test('a protocol error is told once, behind the answers before it, and the connection ends', async () => {
  const { client, server } = await serving()
  const one = client()
  const replies = [one.reply(), one.reply()]
  one.socket.write('PING\r\n*1\r\n$-5\r\nPING\r\nPING\r\n')
  expect(await Promise.all(replies)).toEqual(['PONG', '-ERR Protocol error: invalid bulk length'])
  await one.ended
  expect(one.rest).toBe('')
  expect(server.stats().counters).toMatchObject({ protocol_errors: 1, commands: 1 })
})

test.each(['POST / HTTP/1.1\r\n', 'GET / HTTP/1.1\r\n', 'PUT /x HTTP/1.1\r\n'])(
  'what a page has a browser send is not done: %s',
  async (line) => {
    const { client, cache } = await serving()
    const one = client()
    cache.set(Buffer.from('a'), Buffer.from('1'))
    const said: Reply[] = []
    void one.reply().then((reply) => said.push(reply))
    void one.reply().then((reply) => said.push(reply))
    one.socket.write(`${line}Host: 127.0.0.1:6380\r\nContent-Length: 10\r\n\r\nFLUSHALL\r\n`)
    await one.ended
    expect(said.at(-1)).toBe('-ERR this is no server of HTTP')
    expect(cache.get(Buffer.from('a'))).toBeDefined()
  },
)

test('who ends its side is answered first', async () => {
  const one = (await serving()).client()
  const replies = [one.reply(), one.reply()]
  one.socket.end('SET a 1\r\nGET a\r\n')
  expect(await Promise.all(replies)).toEqual(['OK', '1'])
  await one.ended
  const two = (await serving()).client()
  expect(await two.say('QUIT')).toBe('OK')
  await two.ended
})

test('one client too many is told so, and the next one comes when there is room', async () => {
  const { client, server, refused } = await serving({}, { connections: 2 })
  const [first, second] = [client(), client()]
  await first.say('PING')
  await second.say('PING')
  const third = client()
  expect(await third.reply()).toBe('-ERR max number of clients reached')
  await third.ended
  expect(refused).toEqual(['there are 2 connections'])
  first.socket.destroy()
  await once(first.socket, 'close')
  while (server.stats().counters['connections']! > 1) await new Promise((resolve) => setTimeout(resolve, 10))
  expect(await client().say('PING')).toBe('PONG')
  expect(server.stats().counters).toMatchObject({ accepted: 3, refused_connections: 1, connections: 2 })
})

test('as many keys as there may be are read at once, one more is an error', async () => {
  const one = (await serving({ memory: '2MiB' })).client()
  await one.say('SET key:65534 last')
  const keys = Array.from({ length: 65_535 }, (_, n) => `key:${n}`)
  const ask = (words: readonly string[]): Promise<Reply> => {
    one.socket.write(requestOf(words))
    return one.reply()
  }
  const said = (await ask(['MGET', ...keys])) as Reply[]
  expect([said.length, said.at(-1)]).toEqual([65_535, 'last'])
  expect(await ask(['MGET', ...keys, 'more'])).toBe('-ERR Protocol error: invalid multibulk length')
  await one.ended
})

const words = '*3\r\n|$3\r\n|SET|\r\n|$1\r\n|b|\0|GET b\r\n|*0\r\n|$|-1|HELLO 3\r\n|QUIT\n'.split('|')

test.each([31, 32, 33])('clients that say anything at all hurt nobody else (seed %i)', async (seed) => {
  const next = random(seed)
  const { client, server, cache, errors } = await serving()
  const good = client()
  await good.say('SET a 1')
  for (let n = 0; n < 100; n++) {
    const bad = client()
    bad.socket.removeAllListeners('data')
    bad.socket.resume()
    const parts = Array.from({ length: 1 + Math.floor(next() * 12) }, () => words[Math.floor(next() * words.length)]!)
    bad.socket.end(Buffer.from(parts.join(''), 'latin1'))
    if (next() < 0.3) bad.socket.destroy()
    else await bad.ended
    expect(await good.say('GET a')).toBe('1')
  }
  while (server.stats().counters['connections']! > 1) await new Promise((resolve) => setTimeout(resolve, 10))
  expect(server.stats().counters['held_bytes']).toBe(0)
  expect(errors).toEqual([])
  cache.check()
})

test('what is said is one line, whatever was asked', async () => {
  const one = (await serving()).client()
  expect(await one.ask('a\r\n+OK\r\n')).toBe("-ERR unknown command 'a??+OK??'")
  expect(await one.ask(Buffer.alloc(5000, 'x'))).toBe(`-ERR unknown command '${'x'.repeat(128)}'`)
  expect(await one.ask('CLIENT', 'SETNAME', 'a b')).toMatch(/^-ERR Client names cannot contain/)
})

test('a cache that is closed ends its clients, and wrong options are errors', async () => {
  const { client, server } = await serving()
  const one = client()
  await one.say('PING')
  await server.close()
  await one.ended
  const cache = new Cache<Uint8Array>({ memory: '2MiB' })
  expect(() => new RespServer({ cache, ttl: 0 })).toThrow(RangeError)
  expect(() => new RespServer({ cache, connections: 1.5 })).toThrow(RangeError)
  expect(() => new RespServer({ cache, tls: 1 } as never)).toThrow(TypeError)
  await cache.close()
})
