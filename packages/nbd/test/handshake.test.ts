import { connect } from 'node:net'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { memoryDevice, nbdServer } from '../src/index.ts'
import { Command, ExportFlag, Info, Option, Reply } from '../src/protocol.ts'
import { Client, contexts, Gone, infoBytes, later, optionBytes, serve, testFolder, u16, u32 } from './client.ts'

const types = (answers: { type: number }[]): number[] => answers.map(({ type }) => type)
const device = memoryDevice({ sizeBytes: 2 ** 20 })

describe('the greeting', () => {
  test('is fixed newstyle', async () => {
    const { address } = await serve()
    const client = await Client.raw(address)
    expect((await client.bytes(18)).toString('latin1')).toBe('NBDMAGICIHAVEOPT\0\x03')
  })

  test('ends for a client with flags that nobody knows', async () => {
    const { address } = await serve()
    const client = await Client.greeted(address, 7)
    expect(await client.closed).toBe(true)
  })

  test('an option without the magic ends the connection', async () => {
    const { address } = await serve()
    const client = await Client.greeted(address)
    client.send(Buffer.alloc(16))
    expect(await client.closed).toBe(true)
  })
})

describe('EXPORT_NAME', () => {
  test.each([
    [3, 10],
    [1, 134],
  ])('with client flags %i answers in %i bytes', async (flags, length) => {
    const { address } = await serve()
    const client = await Client.greeted(address, flags)
    client.send(optionBytes(Option.EXPORT_NAME))
    const answer = await client.bytes(length)
    expect(answer.readBigUInt64BE()).toBe(2n ** 20n)
    expect(answer.readUInt16BE(8) & ExportFlag.HAS_FLAGS).toBe(1)
    expect(answer.readUInt16BE(8) & ExportFlag.SEND_DF).toBe(0)
    expect(answer.subarray(10).every((byte) => byte === 0)).toBe(true)
    client.transmit()
    expect((await client.read(0, 4)).data).toEqual(Buffer.alloc(4))
  })

  test('of what is not there ends the connection', async () => {
    const { address } = await serve()
    for (const name of [Buffer.from('other'), Buffer.alloc(9000)]) {
      const client = await Client.greeted(address)
      client.send(optionBytes(Option.EXPORT_NAME, name))
      expect(await client.closed).toBe(true)
    }
  })
})

test('ABORT is acknowledged, then the connection ends', async () => {
  const { address } = await serve()
  const client = await Client.greeted(address)
  expect(types(await client.option(Option.ABORT))).toEqual([Reply.ACK])
  expect(await client.closed).toBe(true)
})

test('LIST names the exports', async () => {
  const { address } = await serve({
    exports: [
      { name: 'ä', description: 'the first', device },
      { name: '', device },
    ],
  })
  const client = await Client.greeted(address)
  const answers = await client.option(Option.LIST)
  expect(types(answers)).toEqual([Reply.SERVER, Reply.SERVER, Reply.ACK])
  expect(answers[0]!.payload).toEqual(Buffer.concat([u32(2), Buffer.from('äthe first')]))
  expect(answers[1]!.payload).toEqual(u32(0))
  expect(types(await client.option(Option.LIST, Buffer.from('x')))).toEqual([Reply.ERR_INVALID])
})

describe('INFO and GO', () => {
  test('tell size, flags, block sizes, and what else was asked for', async () => {
    const { address } = await serve({
      exports: [{ name: 'a', description: 'words', device: memoryDevice({ sizeBytes: 4096, blockSize: 512 }) }],
    })
    const client = await Client.greeted(address)
    const answers = await client.option(Option.INFO, infoBytes('a', Info.NAME, Info.DESCRIPTION, 77))
    expect(types(answers)).toEqual([Reply.INFO, Reply.INFO, Reply.INFO, Reply.INFO, Reply.ACK])
    expect(answers[0]!.payload.readUInt16BE()).toBe(Info.EXPORT)
    expect(answers[0]!.payload.readBigUInt64BE(2)).toBe(4096n)
    expect(answers[1]!.payload).toEqual(Buffer.concat([u16(Info.BLOCK_SIZE), u32(512, 4096, 2 ** 25)]))
    expect(answers[2]!.payload.toString('latin1')).toBe('\0\x01a')
    expect(answers[3]!.payload.toString('latin1')).toBe('\0\x02words')
    // Still haggling after INFO.
    expect((await client.go('a')).length).toBe(3)
    expect((await client.write(512, Buffer.alloc(512, 5))).error).toBe(0)
  })

  test('flags say what the export can', async () => {
    const { address } = await serve({
      exports: [
        { name: 'plain', device },
        { name: 'read only', device, readOnly: true },
        { name: 'resizable', device, resizable: true },
      ],
    })
    const client = await Client.greeted(address)
    const flags = async (name: string): Promise<string[]> => {
      const value = (await client.option(Option.INFO, infoBytes(name)))[0]!.payload.readUInt16BE(10)
      return Object.entries(ExportFlag).flatMap(([flag, bit]) => ((value & bit) === 0 ? [] : [flag]))
    }
    const reading = ['HAS_FLAGS', 'SEND_FLUSH', 'SEND_FUA', 'CAN_MULTI_CONN', 'SEND_CACHE']
    const writing = ['SEND_TRIM', 'SEND_WRITE_ZEROES', 'SEND_FAST_ZERO']
    expect(new Set(await flags('plain'))).toEqual(new Set([...reading, ...writing]))
    expect(new Set(await flags('read only'))).toEqual(new Set([...reading, 'READ_ONLY']))
    expect(new Set(await flags('resizable'))).toEqual(new Set([...reading, ...writing, 'SEND_RESIZE']))
    await client.structuredReplies()
    expect(await flags('plain')).toContain('SEND_DF')
  })

  test.each([
    ['no data', Buffer.alloc(0)],
    ['a name longer than the data', Buffer.concat([u32(100), Buffer.alloc(20)])],
    ['a name of 4 GiB', Buffer.concat([u32(2 ** 32 - 1), Buffer.alloc(20)])],
    ['fewer items than said', Buffer.concat([u32(0), u16(2, 3)])],
    ['more items than said', Buffer.concat([u32(0), u16(0, 3)])],
    ['a name over 4096 bytes', infoBytes('x'.repeat(4097))],
  ])('%s is invalid', async (_, data) => {
    const { address } = await serve()
    const client = await Client.greeted(address)
    expect(types(await client.option(Option.GO, data))).toEqual([Reply.ERR_INVALID])
    await client.go()
  })

  test('of what is not there: unknown, and the connection goes on', async () => {
    const { address } = await serve()
    const client = await Client.greeted(address)
    expect(types(await client.option(Option.GO, infoBytes('other')))).toEqual([Reply.ERR_UNKNOWN])
    await client.go()
  })
})

describe('options that are refused', () => {
  test('unknown ones, withdrawn ones, and TLS where there is none', async () => {
    const { address } = await serve()
    const client = await Client.greeted(address)
    for (const option of [0, 4, 11, 12, 0xffffffff]) {
      expect(types(await client.option(option, Buffer.alloc(5)))).toEqual([Reply.ERR_UNSUP])
    }
    expect(types(await client.option(Option.STARTTLS))).toEqual([Reply.ERR_POLICY])
    expect(types(await client.option(Option.STARTTLS, Buffer.alloc(1)))).toEqual([Reply.ERR_INVALID])
    expect(types(await client.option(Option.STRUCTURED_REPLY, Buffer.alloc(1)))).toEqual([Reply.ERR_INVALID])
    await client.go()
  })

  test('one that is too long is passed over, however it comes in', async () => {
    const { address, server } = await serve()
    const client = await Client.greeted(address)
    client.send(optionBytes(99, Buffer.alloc(0), 3_000_000))
    for (let n = 0; n < 30; n++) client.send(Buffer.alloc(100_000, n))
    expect((await client.optionAnswer()).type).toBe(Reply.ERR_TOO_BIG)
    expect(server.stats().counters['buffer_bytes']).toBeLessThan(2 ** 19)
    await client.go()
  })
})

describe('metadata contexts', () => {
  const name = 'a'
  const start = async (): Promise<Client> => {
    const { address } = await serve({
      exports: [
        { name, device },
        { name: 'b', device },
      ],
    })
    return Client.greeted(address)
  }

  test('need structured replies', async () => {
    const client = await start()
    for (const option of [Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT])
      expect(types(await client.option(option, contexts(name, 'base:allocation')))).toEqual([Reply.ERR_INVALID])
  })

  test('are listed and selected', async () => {
    const client = await start()
    await client.structuredReplies()
    const list = (...queries: string[]): Promise<{ type: number; payload: Buffer }[]> =>
      client.option(Option.LIST_META_CONTEXT, contexts(name, ...queries))
    for (const queries of [[], ['base:'], ['qemu:x', 'base:allocation']]) {
      const answers = await list(...queries)
      expect(types(answers)).toEqual([Reply.META_CONTEXT, Reply.ACK])
      expect(answers[0]!.payload).toEqual(Buffer.concat([u32(0), Buffer.from('base:allocation')]))
    }
    expect(types(await list('base:other', 'x'))).toEqual([Reply.ACK])
    const set = (...queries: string[]): Promise<{ type: number; payload: Buffer }[]> =>
      client.option(Option.SET_META_CONTEXT, contexts(name, ...queries))
    for (const queries of [[], ['base:']]) expect(types(await set(...queries))).toEqual([Reply.ACK])
    const answers = await set('base:allocation')
    expect(answers[0]!.payload).toEqual(Buffer.concat([u32(1), Buffer.from('base:allocation')]))
    await client.go(name)
    expect((await client.request(Command.BLOCK_STATUS, 0, 4096)).error).toBe(0)
  })

  test('lengths that do not fit, and exports that are not there', async () => {
    const client = await start()
    await client.structuredReplies()
    const good = contexts(name, 'base:allocation')
    for (let length = 0; length < good.length; length++)
      expect(types(await client.option(Option.SET_META_CONTEXT, good.subarray(0, length)))).toEqual([Reply.ERR_INVALID])
    const longer = Buffer.concat([good, Buffer.alloc(1)])
    expect(types(await client.option(Option.SET_META_CONTEXT, longer))).toEqual([Reply.ERR_INVALID])
    expect(types(await client.option(Option.SET_META_CONTEXT, contexts('c')))).toEqual([Reply.ERR_UNKNOWN])
  })

  test.each([
    ['for another export', contexts('b', 'base:allocation')],
    ['and then none', contexts(name)],
    ['and then wrongly', Buffer.alloc(3)],
  ])('selected %s: no status', async (_, second) => {
    const client = await start()
    await client.structuredReplies()
    await client.option(Option.SET_META_CONTEXT, contexts(name, 'base:allocation'))
    await client.option(Option.SET_META_CONTEXT, second)
    await client.go(name)
    expect((await client.request(Command.BLOCK_STATUS, 0, 4096)).error).toBe(22)
  })
})

describe('what cannot be served', () => {
  const withBlocks = (blockSize: number): typeof device => Object.create(device, { blockSize: { value: blockSize } })
  test.each([
    ['two exports of one name', () => nbdServer({ exports: [{ device }, { device }] }), 'same name'],
    ['a name too long', () => nbdServer({ exports: [{ name: 'x'.repeat(4097), device }] }), '4096 bytes'],
    ['a zero in a name', () => nbdServer({ exports: [{ name: 'a\0', device }] }), 'none of them zero'],
    [
      'resizing a read-only export',
      () => nbdServer({ exports: [{ readOnly: true, resizable: true, device }] }),
      'read-only',
    ],
    ['a limit of nothing', () => nbdServer({ exports: [{ device }], limits: { requests: 0 } }), 'limits.requests'],
    ['odd blocks', () => nbdServer({ exports: [{ device: withBlocks(768) }] }), 'blocks of 768'],
    ['blocks that are too large', () => nbdServer({ exports: [{ device: withBlocks(8192) }] }), 'blocks of 8192'],
  ])('%s', (_, make, why) => {
    expect(make).toThrow(why)
  })
})

describe('unix sockets', () => {
  test('one that nobody listens on is replaced, one in use is not', async () => {
    const path = join(testFolder(), 'x.sock')
    await serve({}, { path })
    await expect(serve({}, { path })).rejects.toMatchObject({ code: 'EADDRINUSE' })
    // Linked under another name it stays when its server goes.
    const { linkSync } = await import('node:fs')
    const other = `${path}2`
    const server = nbdServer({ exports: [{ device }] })
    await server.listen({ path: `${path}1` })
    linkSync(`${path}1`, other)
    await server.close()
    const { address } = await serve({}, { path: other })
    await Client.ready(address)
  })

  test('a file is not', async () => {
    const path = join(testFolder(), 'file')
    const { writeFileSync, readFileSync } = await import('node:fs')
    writeFileSync(path, 'precious')
    await expect(serve({}, { path })).rejects.toMatchObject({ code: 'EADDRINUSE' })
    expect(readFileSync(path, 'utf8')).toBe('precious')
  })
})

test('a closed server refuses, closes its connections, and may be closed again', async () => {
  const { server, address } = await serve()
  const haggling = await Client.greeted(address)
  const working = await Client.ready(address)
  await server.close()
  await Promise.all([haggling.closed, working.closed, server.close()])
  await expect(working.bytes(1)).rejects.toBeInstanceOf(Gone)
  const late = connect('path' in address ? address.path : '')
  later(() => late.destroy())
  await new Promise((resolve) => late.once('error', resolve))
  await expect(server.listen(address as { path: string })).rejects.toThrow(TypeError)
  expect(server.stats().counters).toMatchObject({ connections: 0, accepted: 2, buffer_bytes: 0 })
})
