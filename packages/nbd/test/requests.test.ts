import { TmemError } from '@tmem/core'
import { describe, expect, test } from 'vitest'
import { memoryDevice, type NbdExport, type NbdServerOptions } from '../src/index.ts'
import { Command, CommandFlag, Errno, Option } from '../src/protocol.ts'
import { bytesOf, Client, contexts, optionBytes, requestBytes, SlowDevice, serve, until } from './client.ts'

const { FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO } = CommandFlag
const size = 4 * 2 ** 20

async function ready(
  given: Partial<NbdExport> = {},
  how: { structured?: boolean; status?: boolean } = {},
  options: Partial<NbdServerOptions> = {},
): Promise<Client> {
  const { address } = await serve({ exports: [{ device: memoryDevice({ sizeBytes: size }), ...given }], ...options })
  return Client.ready(address, how)
}

/** A slow device and somebody connected to it. */
async function slowly(
  how: { structured?: boolean; status?: boolean } = {},
  options: Partial<NbdServerOptions> = {},
): Promise<{ device: SlowDevice; client: Client }> {
  const device = new SlowDevice(memoryDevice({ sizeBytes: size }))
  return { device, client: await ready({ device }, how, options) }
}

describe.each([
  ['simple', false],
  ['structured', true],
] as const)('%s replies', (_, structured) => {
  test('write, read', async () => {
    const client = await ready({}, { structured })
    for (const [at, length] of [
      [0, 1],
      [4095, 2],
      [8192, 4096],
      [12_345, 100_000],
      [size - 1_500_001, 1_500_000],
    ] as const) {
      const bytes = bytesOf(at, length)
      expect(await client.write(at, bytes)).toMatchObject({ error: 0, parts: 1 })
      const answer = await client.read(at, length)
      expect(answer.error).toBe(0)
      expect(answer.data.equals(bytes)).toBe(true)
    }
    expect(await client.read(0, 0)).toMatchObject({ error: 0, data: Buffer.alloc(0) })
    expect((await client.write(0, Buffer.alloc(0))).error).toBe(0)
  })

  test('many at once, large and small', async () => {
    const client = await ready({}, { structured })
    const writes = Array.from({ length: 64 }, (__, n) =>
      client.write(n * 65_536, bytesOf(n, n % 8 === 0 ? 65_536 : 4096)),
    )
    expect((await Promise.all(writes)).every(({ error }) => error === 0)).toBe(true)
    const reads = Array.from({ length: 64 }, (__, n) => client.read(n * 65_536, n % 8 === 0 ? 65_536 : 4096))
    const whole = client.read(0, size)
    for (const [n, answer] of (await Promise.all(reads)).entries())
      expect(answer.data.equals(bytesOf(n, answer.data.length))).toBe(true)
    expect((await whole).data.subarray(65_536, 65_536 + 4096).equals(bytesOf(1, 4096))).toBe(true)
  })

  test('a device that waits: replies come as it is done, in any order', async () => {
    const { device, client } = await slowly({ structured })
    const bytes = bytesOf(1, 4096)
    const written = client.write(4096, bytes)
    await until(() => device.waiting.length === 1)
    const early = client.read(0, 100)
    await until(() => device.waiting.length === 2)
    device.waiting.pop()!()
    expect((await early).data).toEqual(Buffer.alloc(100))
    device.go()
    expect((await written).error).toBe(0)
    const reads = [client.read(4096, 4096), client.read(0, 512), client.read(4096, 1)]
    await until(() => device.waiting.length === 3)
    device.waiting.reverse()
    device.go()
    const [a, b, c] = await Promise.all(reads)
    expect(a!.data.equals(bytes)).toBe(true)
    expect(b!.data).toEqual(Buffer.alloc(512))
    expect(c!.data[0]).toBe(bytes[0])
  })

  test('a device that waits, and large requests', async () => {
    const { device, client } = await slowly({ structured })
    device.slow = 'turn'
    const bytes = bytesOf(3, 1_000_000)
    const answers = await Promise.all([client.write(5, bytes), client.write(2_000_000, bytesOf(4, 700_000))])
    expect(answers.map(({ error }) => error)).toEqual([0, 0])
    const [first, small, second] = await Promise.all([
      client.read(5, bytes.length),
      client.read(5, 10),
      client.read(2_000_000, 700_000),
    ])
    expect(first!.data.equals(bytes)).toBe(true)
    expect(small!.data.equals(bytes.subarray(0, 10))).toBe(true)
    expect(second!.data.equals(bytesOf(4, 700_000))).toBe(true)
  })

  test.each([
    ['at once', false],
    ['later', 'turn'],
  ] as const)('errors of the device, %s', async (__, slow) => {
    const seen: unknown[] = []
    const { device, client } = await slowly({ structured }, { onError: (error, name) => seen.push([error, name]) })
    device.slow = slow
    const system = (code: string): Error => Object.assign(new Error(code), { code })
    const wrapped = new TmemError('TMEM_IO', 'no', { cause: system('ENOSPC') })
    for (const [failure, errno] of [
      [wrapped, Errno.ENOSPC],
      [system('EDQUOT'), Errno.ENOSPC],
      [system('EIO'), Errno.EIO],
      [system('EROFS'), Errno.EPERM],
      [new TmemError('TMEM_CORRUPT', 'no'), Errno.EIO],
      [new TmemError('TMEM_NO_MEMORY', 'no'), Errno.ENOMEM],
      [new TmemError('TMEM_CLOSED', 'no'), Errno.ESHUTDOWN],
      [new RangeError('beyond'), Errno.EINVAL],
      [new Error('a bug'), Errno.EIO],
    ] as const) {
      for (const name of ['read', 'write', 'discard', 'zero', 'flush']) device.failing.set(name, () => failure)
      seen.length = 0
      const answers = await Promise.all([
        client.read(0, 4096),
        client.read(0, 1_000_000),
        client.write(0, bytesOf(0, 4096)),
        client.write(0, bytesOf(0, 1_000_000)),
        client.request(Command.TRIM, 0, 4096),
        client.request(Command.WRITE_ZEROES, 0, 4096),
        client.request(Command.FLUSH, 0, 0),
      ])
      expect(answers.map(({ error }) => error)).toEqual(answers.map(() => errno))
      expect(seen.length).toBeGreaterThanOrEqual(answers.length)
      expect(seen[0]).toEqual([failure, ''])
    }
    device.failing.clear()
    expect((await client.write(0, bytesOf(1, 100))).error).toBe(0)
    expect((await client.read(0, 100)).data.equals(bytesOf(1, 100))).toBe(true)
  })

  test.each([
    ['at once', false],
    ['later', 'turn'],
  ] as const)('a long read that fails in the middle, %s', async (__, slow) => {
    const { device, client } = await slowly({ structured })
    device.slow = slow
    let reads = 0
    const failure = Object.assign(new Error('bad sector'), { code: 'EIO' })
    device.failing = { get: (name: string) => (name === 'read' && ++reads === 3 ? () => failure : undefined) } as never
    const answer = client.read(0, 2_000_000).then(
      ({ error }) => error,
      (reason: Error) => reason.message,
    )
    // In a simple reply there is no place for an error once bytes were promised.
    expect(await answer).toBe(structured ? Errno.EIO : 'closed')
    const over = await Promise.race([client.closed, client.read(0, 100).then(({ error }) => error)])
    expect(over).toBe(structured ? 0 : true)
  })

  test('FUA is answered after a flush', async () => {
    const { device, client } = await slowly({ structured })
    for (const slow of [false, 'turn'] as const) {
      device.slow = slow
      for (const [request, call] of [
        [() => client.write(0, bytesOf(0, 4096), FUA), 'write'],
        [() => client.request(Command.TRIM, 0, 4096, { flags: FUA }), 'discard'],
        [() => client.request(Command.WRITE_ZEROES, 0, 4096, { flags: FUA | NO_HOLE }), 'zero keep'],
      ] as const) {
        device.calls = []
        expect((await request()).error).toBe(0)
        expect(device.calls).toEqual([call, 'flush'])
        device.failing.set('flush', () => Object.assign(new Error('full'), { code: 'ENOSPC' }))
        expect((await request()).error).toBe(Errno.ENOSPC)
        device.failing.clear()
      }
      device.calls = []
      await client.read(0, 10, FUA)
      expect(device.calls).toEqual(['read'])
    }
  })

  test('DISC: what is in flight is answered, then the connection ends', async () => {
    const { device, client } = await slowly({ structured })
    const written = client.write(0, bytesOf(0, 4096))
    const read = client.read(0, 4096)
    client.send(requestBytes(Command.DISC, 0, 0, 99n))
    await until(() => device.waiting.length === 2)
    device.go()
    expect((await written).error).toBe(0)
    expect((await read).error).toBe(0)
    expect(await client.closed).toBe(true)
  })
})

test('trim and zeroes', async () => {
  const client = await ready()
  await client.write(0, bytesOf(7, size / 2))
  for (const [type, flags, at, length] of [
    [Command.TRIM, 0, 4096, 8192],
    [Command.TRIM, 0, 20_001, 4097],
    [Command.WRITE_ZEROES, 0, 40_000, 10_000],
    [Command.WRITE_ZEROES, NO_HOLE, 60_000, 10_000],
    [Command.WRITE_ZEROES, FAST_ZERO, 80_000, 10_000],
    [Command.WRITE_ZEROES, 0, 100_000, 0],
  ] as const) {
    expect((await client.request(type, at, length, { flags })).error).toBe(0)
    expect((await client.read(at, length)).data.equals(Buffer.alloc(length))).toBe(true)
  }
  expect((await client.read(0, 4096)).data.equals(bytesOf(7, 4096))).toBe(true)
  // Zeros that keep their room are not promised to be fast; nothing was changed.
  const both = await client.request(Command.WRITE_ZEROES, 0, 4096, { flags: FAST_ZERO | NO_HOLE })
  expect(both.error).toBe(Errno.ENOTSUP)
  expect((await client.read(0, 4096)).data.equals(bytesOf(7, 4096))).toBe(true)
})

test('large writes are given to the device in large pieces, once they are known to come', async () => {
  const { device, client } = await slowly()
  device.slow = false
  await client.write(0, bytesOf(1, 2 ** 20))
  device.calls = []
  await client.write(0, bytesOf(2, 2 ** 20))
  expect(device.calls.length).toBeLessThan(12)
  expect((await client.read(0, 2 ** 20)).data.equals(bytesOf(2, 2 ** 20))).toBe(true)
})

test('a trim of gigabytes lets others take their turns', async () => {
  const device = new SlowDevice(memoryDevice({ sizeBytes: 3 * 2 ** 30 }))
  device.slow = false
  const { address } = await serve({ exports: [{ device }] })
  const [one, other] = await Promise.all([Client.ready(address), Client.ready(address)])
  const trimmed = one.request(Command.TRIM, 0, 3 * 2 ** 30)
  let over = false
  void trimmed.then(() => {
    over = true
  })
  await until(() => device.calls.length > 0)
  expect((await other.read(0, 512)).error).toBe(0)
  expect(over).toBe(false)
  expect((await trimmed).error).toBe(0)
  expect(device.calls.filter((name) => name === 'discard').length).toBeGreaterThan(100)
})

describe('block status', () => {
  test('tells holes from bytes', async () => {
    const client = await ready({}, { status: true })
    await client.write(4096, bytesOf(0, 8192))
    await client.write(65_536, bytesOf(0, 1))
    const status = (at: number, length: number, flags = 0): Promise<[number, number][]> =>
      client.request(Command.BLOCK_STATUS, at, length, { flags }).then(({ extents }) => extents)
    const all = [
      [4096, 3],
      [8192, 0],
      [65_536 - 12_288, 3],
      [4096, 0],
      [size - 65_536 - 4096, 3],
    ]
    expect(await status(0, size)).toEqual(all)
    expect(await status(0, size, REQ_ONE)).toEqual([[4096, 3]])
    expect(await status(5000, 100)).toEqual([[100, 0]])
    await client.request(Command.TRIM, 4096, 8192)
    expect((await status(0, size))[0]).toEqual([65_536, 3])
  })

  test('says no more than fits, from the beginning of what was asked for', async () => {
    const device = memoryDevice({ sizeBytes: 2 ** 24 })
    for (let at = 0; at < 2 ** 24; at += 8192) device.write(at, new Uint8Array(1))
    const client = await ready({ device }, { status: true })
    const { extents } = await client.request(Command.BLOCK_STATUS, 0, 2 ** 24)
    expect(extents.length).toBe(1024)
    expect(extents.every(([length, state], n) => length === 4096 && state === (n % 2 === 0 ? 0 : 3))).toBe(true)
  })

  test('needs to have been negotiated, and may fail', async () => {
    expect((await (await ready()).request(Command.BLOCK_STATUS, 0, 4096)).error).toBe(Errno.EINVAL)
    const { device, client } = await slowly({ status: true })
    device.failing.set('map', () => Object.assign(new Error('no'), { code: 'EIO' }))
    expect((await client.request(Command.BLOCK_STATUS, 0, 4096)).error).toBe(Errno.EIO)
    expect((await client.request(Command.BLOCK_STATUS, 0, 0)).error).toBe(Errno.EINVAL)
  })
})

describe('requests that are refused', () => {
  test('over the end, not in blocks, with flags that do not belong', async () => {
    const device = memoryDevice({ sizeBytes: size, blockSize: 512 })
    const client = await ready({ device }, { status: true })
    const block = Buffer.alloc(512)
    const { EINVAL, ENOSPC } = Errno
    const ask = (type: number, at: number, length: number, flags = 0): Promise<number> =>
      client.request(type, at, length, { flags }).then(({ error }) => error)
    const put = (at: number, payload: Buffer, flags = 0): Promise<number> =>
      client.write(at, payload, flags).then(({ error }) => error)
    for (const [answer, expected] of [
      [ask(Command.READ, size, 512), EINVAL],
      [ask(Command.READ, size - 512, 1024), EINVAL],
      [ask(Command.READ, 2 ** 53 - 512, 512), EINVAL],
      [ask(Command.READ, 0, 2 ** 32 - 512), EINVAL],
      [ask(Command.READ, 0, 2 ** 25 + 512), EINVAL],
      [ask(Command.READ, 1, 512), EINVAL],
      [ask(Command.READ, 0, 511), EINVAL],
      [ask(Command.READ, 0, 512, NO_HOLE), EINVAL],
      [ask(Command.READ, 0, 512, 1 << 15), EINVAL],
      [put(size, block), ENOSPC],
      [put(size - 512, Buffer.alloc(1024)), ENOSPC],
      [put(1, block), EINVAL],
      [put(0, Buffer.alloc(300_001)), EINVAL],
      [put(0, block, DF), EINVAL],
      [ask(Command.TRIM, size, 512), EINVAL],
      [ask(Command.TRIM, 0, 2 ** 32 - 512), EINVAL],
      [ask(Command.TRIM, 100, 512), EINVAL],
      [ask(Command.TRIM, 0, 512, NO_HOLE), EINVAL],
      [ask(Command.WRITE_ZEROES, size, 512), ENOSPC],
      [ask(Command.WRITE_ZEROES, 0, 513), EINVAL],
      [ask(Command.WRITE_ZEROES, 0, 512, DF), EINVAL],
      [ask(Command.CACHE, size, 512), EINVAL],
      [ask(Command.CACHE, 0, 512, NO_HOLE), EINVAL],
      [ask(Command.BLOCK_STATUS, size, 512), EINVAL],
      [ask(Command.BLOCK_STATUS, 0, 512, FAST_ZERO), EINVAL],
      [ask(Command.FLUSH, 0, 512), EINVAL],
      [ask(Command.FLUSH, 512, 0), EINVAL],
      [ask(Command.RESIZE, 512, 0), Errno.EPERM],
      [ask(9, 0, 0), EINVAL],
      [ask(65_535, 0, 0), EINVAL],
      [ask(Command.CACHE, 0, 512), 0],
      [ask(Command.READ, 0, 512, DF | FUA), 0],
      [put(0, block), 0],
    ] as const)
      expect(await answer).toBe(expected)
  })

  test('without structured replies, DF', async () => {
    const client = await ready({}, { structured: false })
    expect((await client.read(0, 512, DF)).error).toBe(Errno.EINVAL)
  })

  test('an unfragmented read may be as large as any', async () => {
    const client = await ready()
    await client.write(0, bytesOf(1, 2_000_000))
    const { data, error } = await client.read(0, 2_000_000, DF)
    expect([error, data.equals(bytesOf(1, 2_000_000))]).toEqual([0, true])
  })

  test('on a read-only export everything that writes', async () => {
    const client = await ready({ readOnly: true })
    const { EPERM } = Errno
    expect((await client.write(0, Buffer.alloc(100_000))).error).toBe(EPERM)
    expect((await client.request(Command.TRIM, 0, 4096)).error).toBe(EPERM)
    expect((await client.request(Command.WRITE_ZEROES, 0, 4096)).error).toBe(EPERM)
    expect((await client.request(Command.RESIZE, 4096, 0)).error).toBe(EPERM)
    expect((await client.request(Command.FLUSH, 0, 0)).error).toBe(0)
    expect((await client.read(0, 4096)).data.equals(Buffer.alloc(4096))).toBe(true)
  })

  test('a write beyond the maximum payload, or without the magic, ends the connection', async () => {
    for (const request of [requestBytes(Command.WRITE, 0, 2 ** 25 + 1, 1n), Buffer.alloc(28)]) {
      const client = await ready()
      client.send(request)
      expect(await client.closed).toBe(true)
    }
  })
})

describe('resize', () => {
  test('grows and shrinks; others see it', async () => {
    const { address } = await serve({ exports: [{ device: memoryDevice({ sizeBytes: 8192 }), resizable: true }] })
    const [one, other] = await Promise.all([Client.ready(address), Client.ready(address)])
    const resize = (to: number): Promise<number> => one.request(Command.RESIZE, to, 0).then(({ error }) => error)
    await one.write(4096, bytesOf(1, 4096))
    expect(await resize(65_536)).toBe(0)
    expect((await other.write(61_440, bytesOf(2, 4096))).error).toBe(0)
    expect(await resize(4096)).toBe(Errno.EPERM)
    other.socket.destroy()
    expect(await other.closed).toBe(true)
    await until(() => true)
    while ((await resize(4096)) !== 0) await new Promise((resolve) => setImmediate(resolve))
    expect((await one.write(4096, Buffer.alloc(1))).error).toBe(Errno.ENOSPC)
    expect(await resize(65_536)).toBe(0)
    expect((await one.read(4096, 61_440)).data.equals(Buffer.alloc(61_440))).toBe(true)
  })

  test('to a size that cannot be', async () => {
    const device = memoryDevice({ sizeBytes: 8192, blockSize: 512 })
    const client = await ready({ device, resizable: true })
    const resize = (to: number, flags = 0): Promise<number> =>
      client.request(Command.RESIZE, to, 0, { flags }).then(({ error }) => error)
    expect(await resize(100)).toBe(Errno.EINVAL)
    expect(await resize(1024, DF)).toBe(Errno.EINVAL)
    device.resize = () => {
      throw new TmemError('TMEM_NO_MEMORY', 'no')
    }
    expect(await resize(16_384)).toBe(Errno.ENOSPC)
    expect((await client.read(0, 8192)).error).toBe(0)
  })
})

test('several exports have a device each', async () => {
  const { address, server } = await serve({
    exports: ['a', 'b'].map((name) => ({ name, device: memoryDevice({ sizeBytes: 4096 }) })),
  })
  const [a, b] = await Promise.all([Client.ready(address, { name: 'a' }), Client.ready(address, { name: 'b' })])
  await a.write(0, Buffer.from('a'))
  await b.write(0, Buffer.from('b'))
  expect((await a.read(0, 1)).data.toString()).toBe('a')
  expect((await b.read(0, 1)).data.toString()).toBe('b')
  expect(server.stats().children.map(({ name, counters }) => [name, counters])).toEqual(
    ['a', 'b'].map((name) => [
      name,
      {
        connections: 1,
        reads: 1,
        writes: 1,
        bytesRead: 1,
        bytesWritten: 1,
        flushes: 0,
        trims: 0,
        zeroes: 0,
        caches: 0,
        statuses: 0,
        resizes: 0,
        errors: 0,
      },
    ]),
  )
})

test('over TCP, byte by byte', async () => {
  const { address } = await serve({}, { port: 0 })
  const client = await Client.raw(address)
  await client.bytes(18)
  const all = Buffer.concat([
    Buffer.from([0, 0, 0, 3]),
    optionBytes(Option.STRUCTURED_REPLY),
    optionBytes(Option.SET_META_CONTEXT, contexts('', 'base:allocation')),
    optionBytes(Option.EXPORT_NAME),
    requestBytes(Command.WRITE, 4096, 10, 1n),
    Buffer.from('0123456789'),
    requestBytes(Command.READ, 4096, 10, 2n),
    requestBytes(Command.DISC, 0, 0, 3n),
  ])
  for (const byte of all) {
    client.socket.write(Buffer.from([byte]))
    await new Promise((resolve) => setImmediate(resolve))
  }
  const answers = await client.bytes(20 + (20 + 19) + 20 + 10 + 16 + 28 + 10)
  expect(answers.subarray(-10).toString()).toBe('0123456789')
  expect(await client.closed).toBe(true)
})

test('where the runtime keeps the insides of its sockets to itself, streams serve as well', async () => {
  const runtime = process as unknown as { binding(name: string): Record<string, { prototype: object }> }
  const handles = [runtime.binding('tcp_wrap')['TCP']!, runtime.binding('pipe_wrap')['Pipe']!]
  for (const { prototype } of handles) Object.defineProperty(prototype, 'useUserBuffer', { configurable: true })
  try {
    const client = await ready()
    const writes = Array.from({ length: 64 }, (_, n) =>
      client.write(n * 65_536, bytesOf(n, n % 2 === 0 ? 65_536 : 512)),
    )
    expect((await Promise.all(writes)).every(({ error }) => error === 0)).toBe(true)
    const reads = await Promise.all(writes.map((_, n) => client.read(n * 65_536, n % 2 === 0 ? 65_536 : 512)))
    expect(reads.every(({ data }, n) => data.equals(bytesOf(n, data.length)))).toBe(true)
    expect((await client.read(0, size)).error).toBe(0)
  } finally {
    for (const { prototype } of handles) Reflect.deleteProperty(prototype, 'useUserBuffer')
  }
})
