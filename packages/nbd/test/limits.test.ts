import { describe, expect, test, vi } from 'vitest'
import { memoryDevice } from '../src/index.ts'
import { Command, Option } from '../src/protocol.ts'
import { bareConnection, bytesOf, Client, optionBytes, requestBytes, SlowDevice, serve, until } from './client.ts'

const size = 4 * 2 ** 20

test('a client that does not read stops itself, and nobody else; memory is bounded', async () => {
  const { address, server } = await serve({ exports: [{ device: memoryDevice({ sizeBytes: size }) }] })
  const idle = await Client.ready(address)
  const before = server.stats().counters['buffer_bytes']!
  for (const { length, count, structured } of [
    { length: 4096, count: 3000, structured: true },
    { length: 2 ** 20, count: 20, structured: false },
  ]) {
    const stuck = await Client.ready(address, { structured })
    stuck.socket.removeAllListeners('data').pause()
    for (let n = 0; n < count; n++) stuck.send(requestBytes(Command.READ, 0, length, BigInt(n)))
    const reads = (): number => server.stats().children[0]!.counters['reads']!
    let last = -1
    // Until the server has stopped taking its requests.
    while (reads() !== last) {
      last = reads()
      for (let n = 0; n < 50; n++) expect((await idle.read(0, 512)).error).toBe(0)
      last += 50
    }
    expect(server.stats().counters['buffer_bytes']! - before).toBeLessThan(2 ** 20)
    // It may go on where it stopped.
    const other = await Client.ready(address)
    expect((await other.write(0, bytesOf(1, 4096))).error).toBe(0)
    stuck.socket.resume()
    await until(() => stuck.socket.bytesRead > count * length)
    stuck.socket.destroy()
    other.socket.destroy()
    await until(() => server.stats().counters['connections'] === 1)
  }
  idle.socket.destroy()
  await until(() => server.stats().counters['connections'] === 0)
  expect(server.stats().counters['buffer_bytes']).toBe(0)
})

test('the server can be closed while a client does not read', async () => {
  const { address, server } = await serve({ exports: [{ device: memoryDevice({ sizeBytes: size }) }] })
  const stuck = await Client.ready(address)
  stuck.socket.pause()
  for (let n = 0; n < 200; n++) stuck.send(requestBytes(Command.READ, 0, n === 99 ? size : 4096, BigInt(n)))
  await until(() => server.stats().children[0]!.counters['reads']! >= 40)
  await server.close()
  expect(server.stats().counters).toMatchObject({ connections: 0, buffer_bytes: 0 })
})

test('200 connections at once, each with its own bytes', async () => {
  const { address, server } = await serve({ exports: [{ device: memoryDevice({ sizeBytes: size }) }] })
  const clients = await Promise.all(Array.from({ length: 200 }, () => Client.ready(address)))
  expect(server.stats().counters).toMatchObject({ connections: 200, refused: 0 })
  // Idle ones have one small buffer each.
  expect(server.stats().counters['buffer_bytes']).toBe(200 * 20_480)
  for (let round = 0; round < 3; round++) {
    const written = clients.map((client, n) => client.write(n * 8192, bytesOf(round * 1000 + n, 8192)))
    expect((await Promise.all(written)).every(({ error }) => error === 0)).toBe(true)
    const read = await Promise.all(clients.map((client, n) => client.read(n * 8192, 8192)))
    expect(read.every(({ data }, n) => data.equals(bytesOf(round * 1000 + n, 8192)))).toBe(true)
  }
  for (const client of clients) client.socket.destroy()
  await until(() => server.stats().counters['connections'] === 0)
  expect(server.stats().counters['buffer_bytes']).toBe(0)
})

describe('a device that waits', () => {
  test('gets no more than the limit of requests', async () => {
    const device = new SlowDevice(memoryDevice({ sizeBytes: size }))
    const { address } = await serve({ exports: [{ device }], limits: { requests: 5 } })
    const client = await Client.ready(address)
    const answers = Array.from({ length: 40 }, (_, n) =>
      n % 2 === 0 ? client.write(n * 4096, bytesOf(n, 4096)) : client.read(n * 4096, 4096),
    )
    await until(() => device.waiting.length === 5)
    const pump = setInterval(() => device.go(), 1)
    expect((await Promise.all(answers)).every(({ error }) => error === 0)).toBe(true)
    clearInterval(pump)
    expect(device.most).toBe(5)
  })

  test('and pins buffers: memory stays bounded, and everyone gets on', async () => {
    const device = new SlowDevice(memoryDevice({ sizeBytes: size }))
    const { address, server } = await serve({ exports: [{ device }], limits: { bytes: 2 ** 20 } })
    const clients = await Promise.all([1, 2, 3, 4].map(() => Client.ready(address)))
    const pump = setInterval(() => device.go(), 1)
    const answers = clients.flatMap((client, c) =>
      Array.from({ length: 60 }, (_, n) => {
        const at = (c * 60 + n) * 16_384
        return n % 3 === 0 ? client.read(at, 16_384) : client.write(at, bytesOf(at, 16_384))
      }),
    )
    expect((await Promise.all(answers)).every(({ error }) => error === 0)).toBe(true)
    clearInterval(pump)
    // The limit, what may have been given out when it was reached, and what each connection is sure of.
    expect(server.stats().counters['peak_buffer_bytes']).toBeLessThan(2 ** 20 + 2 ** 18 + 4 * 4 * 20_480)
    device.slow = false
    for (const [c, client] of clients.entries()) {
      const at = (c * 60 + 59) * 16_384
      expect((await client.read(at, 16_384)).data.equals(bytesOf(at, 16_384))).toBe(true)
    }
  })

  test('for a client that is gone: nothing is kept, and the server closes when the device is done', async () => {
    const device = new SlowDevice(memoryDevice({ sizeBytes: size }))
    const { address, server } = await serve({ exports: [{ device }] })
    const client = await Client.ready(address)
    const answers = [
      client.write(0, bytesOf(0, 4096)),
      client.read(0, 4096),
      client.read(0, 1_000_000),
      client.request(Command.FLUSH, 0, 0),
    ].map((answer) => answer.catch((error: Error) => error.message))
    await until(() => device.waiting.length === 3)
    client.socket.destroy()
    expect(await Promise.all(answers)).toEqual(['closed', 'closed', 'closed', 'closed'])
    const pump = setInterval(() => device.go(), 1)
    await until(() => server.stats().counters['connections'] === 0)
    await until(() => server.stats().counters['buffer_bytes'] === 0)
    clearInterval(pump)
  })

  test('and is waited for when the server closes', async () => {
    const device = new SlowDevice(memoryDevice({ sizeBytes: size }))
    const { address, server } = await serve({ exports: [{ device }] })
    const client = await Client.ready(address)
    const written = client.write(0, bytesOf(5, 4096))
    await until(() => device.waiting.length === 1)
    let closed = false
    const closing = server.close().then(() => {
      closed = true
    })
    for (let n = 0; n < 20; n++) await new Promise((resolve) => setImmediate(resolve))
    expect(closed).toBe(false)
    device.go()
    expect((await written).error).toBe(0)
    await closing
    await client.closed
    expect(server.stats().counters['buffer_bytes']).toBe(0)
  })
})

test('a client that is found to be gone in the middle of an answer leaves no buffer behind', () => {
  // The second answer has no room behind the first: that one is sent, in vain.
  const lengths = [32 * 1024, 250 * 1024]
  const two = Buffer.concat(lengths.map((length) => requestBytes(Command.READ, 0, length, 1n)))
  const { connection, wire, pool } = bareConnection({})
  wire.gone = true
  connection.feed(two)
  expect(connection.ended).toBe(true)
  expect(pool.used).toBe(0)
})

test('when the memory is used up, large requests are done in small pieces', async () => {
  const { address, server } = await serve({
    exports: [{ device: memoryDevice({ sizeBytes: size }) }],
    limits: { bytes: 1 },
  })
  const client = await Client.ready(address)
  const bytes = bytesOf(9, 1_000_003)
  expect((await client.write(77, bytes)).error).toBe(0)
  expect((await client.read(77, bytes.length)).data.equals(bytes)).toBe(true)
  expect(server.stats().counters['peak_buffer_bytes']).toBeLessThan(5 * 20_480)
})

test('an endless negotiation without reading the answers stops itself', async () => {
  const { address, server } = await serve()
  const stuck = await Client.greeted(address)
  stuck.socket.removeAllListeners('data').pause()
  for (let n = 0; n < 20; n++) stuck.send(Buffer.concat(Array.from({ length: 2000 }, () => optionBytes(Option.LIST))))
  const other = await Client.ready(address)
  for (let n = 0; n < 100; n++) expect((await other.read(0, 512)).error).toBe(0)
  expect(server.stats().counters['buffer_bytes']).toBeLessThan(2 ** 20)
  stuck.socket.resume()
  await until(() => stuck.socket.bytesRead === 18 + 40_000 * 44)
})

test('the event loop turns without sleeping while requests come, and rests when none do', async () => {
  for (const busyTurns of [0, 50]) {
    const { address, server } = await serve({ busyTurns })
    const client = await Client.ready(address)
    const turns = vi.spyOn(globalThis, 'setImmediate')
    for (let n = 0; n < 20; n++) expect((await client.read(0, 512)).error).toBe(0)
    const pause = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 20))
    await pause()
    const counted = turns.mock.calls.length
    // A connection that was slow, because the machine was, takes a turn of its own.
    expect(counted > 20).toBe(busyTurns > 0)
    await pause()
    expect(turns.mock.calls.length).toBe(counted)
    // In vain again and again: then only at every sixteenth arrival.
    for (let n = 0; n < 40; n++) {
      await client.read(0, 512)
      await new Promise((resolve) => setTimeout(resolve, 2))
    }
    expect(turns.mock.calls.length - counted).toBeLessThan(busyTurns * 30 + 20)
    turns.mockRestore()
    await server.close()
  }
})
