/** Who may come in, how long somebody may say nothing, and what clients are told who may not. */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { addressClass } from '../src/door.ts'
import type { NbdRefusal, NbdServerOptions } from '../src/index.ts'
import { Option, Reply } from '../src/protocol.ts'
import { Client, infoBytes, later, optionBytes, serve, testFolder, until } from './client.ts'

type Limits = NonNullable<NbdServerOptions['limits']>

async function door(limits: Limits, tcp = false) {
  const refused: NbdRefusal[] = []
  const options = { limits, onRefused: (refusal: NbdRefusal) => refused.push(refusal) }
  const { address, server } = await serve(options, tcp ? { port: 0, host: '127.0.0.1' } : undefined)
  return { address, server, refused, counters: () => server.stats().counters }
}

describe('places', () => {
  test('all taken: the next one is told so; when one goes, it may come in', async () => {
    const { address, refused, counters } = await door({ connections: 3 })
    const clients = await Promise.all([1, 2, 3].map(() => Client.ready(address)))
    const next = await Client.greeted(address)
    for (let n = 0; n < 2; n++)
      expect((await next.option(Option.GO, infoBytes('')))[0]).toMatchObject({
        type: Reply.ERR_POLICY,
        payload: Buffer.from('all 3 places of this server are taken: try again later'),
      })
    expect(refused).toEqual([{ reason: 'full', peer: 'a unix socket', message: 'all 3 places are taken' }])
    expect(counters()).toMatchObject({ connections: 4, negotiating: 1, accepted: 4, refused: 1, refused_full: 1 })
    // The old way in has no words for it.
    const old = await Client.greeted(address)
    old.send(optionBytes(Option.EXPORT_NAME))
    expect(await old.closed).toBe(true)
    clients[0]!.socket.destroy()
    await until(() => counters()['connections'] === 3)
    await next.go()
    expect((await next.read(0, 1)).error).toBe(0)
    expect((await clients[1]!.read(0, 1)).error).toBe(0)
  })

  test('256 that say nothing keep nobody out, also of one address; served ones stay', async () => {
    for (const tcp of [false, true]) {
      const { address, refused, counters } = await door({ connections: 64, connectionsPerAddress: 48 }, tcp)
      const served = await Client.ready(address)
      const silent = await Promise.all(Array.from({ length: 256 }, () => Client.raw(address)))
      const next = await Client.ready(address)
      expect((await next.read(0, 1)).error).toBe(0)
      expect((await served.read(0, 1)).error).toBe(0)
      const most = tcp ? 48 : 64 + 2
      await until(() => counters()['connections']! <= most)
      expect(counters()).toMatchObject({ refused_displaced: refused.length, refused_full: 0, refused_address: 0 })
      expect(refused.length).toBeGreaterThan(256 - 64)
      await Promise.all(silent.slice(0, 150).map(({ closed }) => closed))
    }
  })

  test('an address whose connections are all served gets no more', async () => {
    const { address, refused, counters } = await door({ connectionsPerAddress: 4 }, true)
    const served = await Promise.all([1, 2, 3, 4].map(() => Client.ready(address)))
    const next = await Client.raw(address)
    expect(await next.closed).toBe(true)
    expect(refused).toMatchObject([{ reason: 'address' }])
    expect(counters()).toMatchObject({ connections: 4, accepted: 4, refused: 1, refused_address: 1 })
    served[0]!.socket.destroy()
    await until(() => counters()['connections'] === 3)
    expect((await (await Client.ready(address)).read(0, 1)).error).toBe(0)
  })
})

test('who says nothing, or not enough, has gone after the time to negotiate; who is served has not', async () => {
  for (const tcp of [false, true]) {
    const { address, refused, counters } = await door({ handshakeMs: 150 }, tcp)
    const served = await Client.ready(address)
    const silent = await Client.raw(address)
    const slow = await Client.greeted(address)
    const talking = setInterval(() => slow.send(optionBytes(Option.LIST)), 20)
    expect(await Promise.all([silent.closed, slow.closed])).toEqual([true, true])
    clearInterval(talking)
    expect(refused.map(({ reason }) => reason)).toEqual(['silent', 'silent'])
    await until(() => counters()['connections'] === 1)
    expect(counters()).toMatchObject({ negotiating: 0, refused: 2, refused_silent: 2 })
    expect((await served.read(0, 1)).error).toBe(0)
  }
})

test('a socket that somebody else listens on can be handed over, and is not the server’s to remove', async () => {
  const path = join(testFolder(), 'handed.sock')
  const listener = createServer()
  await new Promise<void>((resolve) => listener.listen(path, resolve))
  later(() => listener.close())
  const { fd } = (listener as unknown as { _handle: { fd: number } })._handle
  const program = `
    import { memoryDevice, nbdServer } from ${JSON.stringify(new URL('../dist/index.js', import.meta.url).href)}
    const server = nbdServer({ exports: [{ device: memoryDevice({ sizeBytes: 1048576 }) }] })
    await server.listen({ fd: 0 }).catch(({ message }) => console.log(message))
    console.log(JSON.stringify(await server.listen({ fd: 3 })))
    process.once('SIGTERM', () => server.close())`
  const child = spawn(process.execPath, ['--input-type=module', '-e', program], {
    stdio: ['ignore', 'pipe', 'inherit', fd],
  })
  const ended = new Promise((resolve) => child.once('exit', resolve))
  let said = ''
  child.stdout!.on('data', (text) => {
    said += text
  })
  try {
    await until(() => said.includes('{'))
    expect(said).toBe('descriptor 0 is no socket\n{"fd":3}\n')
    // Whoever takes a connection first has it: this process does, or the child.
    listener.on('connection', (socket) => socket.destroy())
    for (let tries = 0; ; tries++) {
      const client = await Client.ready({ path }).catch(() => undefined)
      if (client === undefined && tries < 100) continue
      expect((await client!.read(0, 1)).error).toBe(0)
      break
    }
  } finally {
    child.kill('SIGTERM')
    await ended
  }
  expect(existsSync(path)).toBe(true)
})

test('limits that cannot be are refused', async () => {
  for (const [name, value] of [
    ['connections', 0],
    ['connectionsPerAddress', 1.5],
    ['handshakeMs', 2 ** 31],
    ['keepAliveMs', -1],
  ] as const)
    await expect(serve({ limits: { [name]: value } })).rejects.toThrow(`limits.${name} must be an integer`)
})

test('what counts as one address', () => {
  expect(addressClass('192.0.2.7')).toBe('192.0.2.7')
  expect(addressClass('::ffff:192.0.2.7')).toBe('192.0.2.7')
  expect(addressClass('2001:db8:0:1::7')).toBe('2001:db8:0:1::/64')
  expect(addressClass('2001:db8::1:2:3:4')).toBe('2001:db8:0:0::/64')
  expect(addressClass('2001:0db8:1:2:3:4:5:6')).toBe('2001:db8:1:2::/64')
  expect(addressClass('fe80::1%eth0')).toBe('fe80:0:0:0::/64')
  expect(addressClass('::1')).toBe('0:0:0:0::/64')
  expect(addressClass(undefined)).toBe(undefined)
})
