/**
 * Hostile clients: whatever they send, they get an error or are disconnected; memory stays bounded, and a client that
 * was there all the time notices nothing.
 */
import fc from 'fast-check'
import { beforeEach, describe, expect, test } from 'vitest'
import { memoryDevice, type NbdAddress, type NbdServer } from '../src/index.ts'
import { Command, Option } from '../src/protocol.ts'
import { bytesOf, Client, contexts, infoBytes, optionBytes, requestBytes, serve, u32, until } from './client.ts'

const size = 2 ** 20
const precious = bytesOf(42, 65_536)
const flags = Buffer.from([0, 0, 0, 3])

let server: NbdServer
let address: NbdAddress
let witness: Client

beforeEach(async () => {
  const exports = [
    { name: '', device: memoryDevice({ sizeBytes: size }) },
    { name: 'kept', device: memoryDevice({ sizeBytes: size, blockSize: 512 }) },
  ]
  ;({ server, address } = await serve({ exports }))
  witness = await Client.ready(address, { name: 'kept', status: true })
  await witness.write(0, precious)
})

/** How the server is after an attack, told by the client that was there before. */
async function harm(): Promise<Record<string, boolean | number>> {
  const intact = (await witness.read(0, precious.length)).data.equals(precious)
  witness.socket.destroy()
  await until(() => server.stats().counters['connections'] === 0)
  const { buffer_bytes: kept, peak_buffer_bytes: peak } = server.stats().counters
  return { intact, kept: kept!, bounded: peak! < 3 * 2 ** 20 }
}
const none = { intact: true, kept: 0, bounded: true }

/** Sends bytes on a new connection, in pieces; waits until they were dealt with and closes it. */
async function attack(pieces: Uint8Array[]): Promise<void> {
  const client = await Client.raw(address)
  for (const piece of pieces) {
    if (client.socket.destroyed) break
    client.socket.write(piece)
  }
  client.socket.end()
  await client.closed
}

const pieces = (bytes: Buffer, cuts: number[]): Buffer[] => {
  const at = [0, ...[...cuts].map((cut) => cut % (bytes.length + 1)).sort((a, b) => a - b), bytes.length]
  return at.slice(1).map((to, n) => bytes.subarray(at[n], to))
}

const options: [string, Buffer][] = [
  ['EXPORT_NAME', optionBytes(Option.EXPORT_NAME)],
  ['ABORT', optionBytes(Option.ABORT)],
  ['LIST', optionBytes(Option.LIST)],
  ['STARTTLS', optionBytes(Option.STARTTLS)],
  ['INFO', optionBytes(Option.INFO, infoBytes('kept', 0, 1, 2, 3))],
  ['GO', optionBytes(Option.GO, infoBytes('', 3))],
  ['STRUCTURED_REPLY', optionBytes(Option.STRUCTURED_REPLY)],
  ['LIST_META_CONTEXT', optionBytes(Option.LIST_META_CONTEXT, contexts('', 'base:'))],
  ['SET_META_CONTEXT', optionBytes(Option.SET_META_CONTEXT, contexts('', 'base:allocation'))],
]
const negotiation = Buffer.concat([flags, options[6]![1], options[8]![1], options[5]![1]])
const requests: [string, Buffer][] = [
  ...Object.entries(Command)
    .filter(([name]) => name !== 'WRITE')
    .map(([name, type]): [string, Buffer] => [name, requestBytes(type, 0, type === Command.FLUSH ? 0 : 4096, 7n)]),
  ['WRITE', Buffer.concat([requestBytes(Command.WRITE, 0, 64, 7n), bytesOf(1, 64)])],
]

describe('every message, cut short at every byte', () => {
  test.each(options)('option %s', async (_, option) => {
    for (let length = 0; length <= option.length; length++)
      await attack([Buffer.concat([flags, option.subarray(0, length)])])
    expect(await harm()).toEqual(none)
  })

  test.each(requests)('request %s', async (_, request) => {
    for (let length = 0; length <= request.length; length++)
      await attack([Buffer.concat([negotiation, request.subarray(0, length)])])
    expect(await harm()).toEqual(none)
  })

  test('the beginning', async () => {
    for (let length = 0; length <= negotiation.length; length++) await attack([negotiation.subarray(0, length)])
    expect(await harm()).toEqual(none)
  })
})

test('requests before GO, options after it', async () => {
  for (const [, request] of requests) await attack([Buffer.concat([flags, request])])
  for (const [, option] of options) await attack([Buffer.concat([negotiation, option])])
  expect(await harm()).toEqual(none)
})

test('lengths of options: 0, one, 4 GiB', async () => {
  for (let option = 0; option < 14; option++)
    for (const length of [0, 1, 3, 4, 8192, 8193, 2 ** 31, 2 ** 32 - 1])
      await attack([Buffer.concat([flags, optionBytes(option, bytesOf(option, Math.min(length, 10_000)), length)])])
  expect(await harm()).toEqual(none)
})

test('ranges: of length 0, unaligned, over the end, 4 GiB', async () => {
  const client = await Client.ready(address, { name: 'kept', status: true })
  const answers: Promise<number>[] = []
  for (const type of [...Object.values(Command), 9, 255, 65_535]) {
    if (type === Command.WRITE || type === Command.DISC) continue
    for (const at of [0, 1, 511, size - 512, size, size + 1, 2 ** 32, 2 ** 53 - 1, 2 ** 63])
      for (const length of [0, 1, 512, 513, size, size + 512, 2 ** 31, 2 ** 32 - 512, 2 ** 32 - 1]) {
        const harmless = type === Command.TRIM || type === Command.WRITE_ZEROES
        // What is right would really be done, to what the witness looks after.
        if (harmless && at + length <= size && at % 512 === 0 && length % 512 === 0) continue
        const fits = at + length <= size && at % 512 === 0 && length % 512 === 0
        const right =
          ((type === Command.READ || type === Command.CACHE) && fits) ||
          (type === Command.BLOCK_STATUS && fits && length > 0) ||
          (type === Command.FLUSH && at === 0 && length === 0)
        answers.push(
          client.request(type, at, length).then(({ error }) => {
            expect([type, at, length, error === 0]).toEqual([type, at, length, right])
            return error
          }),
        )
      }
  }
  expect((await Promise.all(answers)).length).toBeGreaterThan(500)
  client.socket.destroy()
  for (const [at, length] of [
    [1, 512],
    [0, 513],
    [size, 512],
    [2 ** 63, 512],
    [size - 512, 1024],
  ] as const) {
    const other = await Client.ready(address, { name: 'kept' })
    expect((await other.request(Command.WRITE, at, length, { payload: bytesOf(1, length) })).error).toBeGreaterThan(0)
    expect((await other.read(0, 512)).error).toBe(0)
    other.socket.destroy()
  }
  await attack([negotiation, requestBytes(Command.WRITE, 0, 2 ** 32 - 1, 1n), bytesOf(3, 100_000)])
  expect(await harm()).toEqual(none)
})

describe('random', () => {
  const garbage = fc.uint8Array({ maxLength: 300 }).map((bytes) => Buffer.from(bytes))
  const number = fc.oneof(fc.nat(20), fc.integer({ min: 0, max: 2 ** 32 - 1 }), fc.constantFrom(2 ** 31, 2 ** 32 - 1))
  const someOption = fc
    .tuple(number, garbage, fc.option(number))
    .map(([option, data, length]) => optionBytes(option, data, length ?? data.length))
  const someRequest = fc
    .tuple(fc.nat(0xffff), fc.oneof(fc.nat(10), fc.nat(0xffff)), fc.nat(2 ** 21), number)
    .map(([commandFlags, type, at, length]) => requestBytes(type, at, length, 5n, commandFlags & 31))
  const mutated = fc
    .tuple(fc.constantFrom(...options, ...requests), fc.nat(200), fc.nat(255))
    .map(([[, message], at, value]) => {
      const bytes = Buffer.from(message)
      bytes[at % bytes.length] = value
      return bytes
    })
  const many = (part: fc.Arbitrary<Buffer>): fc.Arbitrary<Buffer> =>
    fc.array(part, { maxLength: 12 }).map((parts) => Buffer.concat(parts))
  const after = (begin: Buffer, rest: fc.Arbitrary<Buffer>): fc.Arbitrary<Buffer> =>
    rest.map((bytes) => Buffer.concat([begin, bytes]))

  test.each([
    ['garbage at the beginning', garbage],
    ['garbage as options', after(flags, garbage)],
    ['garbage as requests', after(negotiation, garbage)],
    ['options', after(flags, many(someOption))],
    ['requests', after(negotiation, many(someRequest))],
    ['messages with one wrong byte', after(flags, many(mutated))],
    ['requests with one wrong byte', after(negotiation, many(mutated))],
  ])('%s', async (_, arbitrary) => {
    await fc.assert(
      fc.asyncProperty(arbitrary, fc.array(fc.nat(), { maxLength: 3 }), (bytes, cuts) => attack(pieces(bytes, cuts))),
      { numRuns: 150, seed: 20091217 },
    )
    expect(await harm()).toEqual(none)
  })
})

test('an option that never comes to its end', async () => {
  const client = await Client.greeted(address)
  client.send(u32(0x49484156, 0x454f5054, Option.GO, 8000), bytesOf(1, 7999))
  await witness.read(0, 512)
  client.socket.destroy()
  expect(await harm()).toEqual(none)
})
