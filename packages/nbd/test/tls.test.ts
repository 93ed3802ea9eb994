import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { makeCertificates } from '../../../tools/certificates.ts'
import { requires } from '../../../tools/requires.ts'
import { memoryDevice, type NbdAddress, type NbdRefusal, type NbdServer, type NbdTls } from '../src/index.ts'
import { Option, Reply } from '../src/protocol.ts'
import { bytesOf, Client, infoBytes, optionBytes, serve, testFolder, until } from './client.ts'

interface Keys {
  readonly ca: Buffer
  readonly server: { key: Buffer; cert: Buffer }
  readonly client: { key: Buffer; cert: Buffer }
  /** Signed by nobody whom the server knows. */
  readonly stranger: { key: Buffer; cert: Buffer }
}

function makeKeys(folder: string): Keys {
  makeCertificates(folder, { ca: ['server', 'client'], stranger: [] })
  const at = (name: string): string => join(folder, name)
  const pair = (name: string): { key: Buffer; cert: Buffer } => ({
    key: readFileSync(at(`${name}.key`)),
    cert: readFileSync(at(`${name}.pem`)),
  })
  return { ca: readFileSync(at('ca.pem')), server: pair('server'), client: pair('client'), stranger: pair('stranger') }
}

describe('TLS', () => {
  let keys: Keys
  beforeAll(() => {
    try {
      keys = makeKeys(testFolder())
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
    }
  })

  const start = async (
    tls: Partial<NbdTls> = {},
    onRefused: (refusal: NbdRefusal) => void = () => {},
  ): Promise<{ address: NbdAddress; server: NbdServer }> =>
    serve(
      { exports: [{ device: memoryDevice({ sizeBytes: 2 ** 22 }) }], onRefused },
      { port: 0, tls: { ...keys.server, ca: keys.ca, ...tls } },
    )
  const checks = { ca: (): Buffer => keys.ca }

  test('is required: everything else is refused before', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    const { address } = await start()
    const client = await Client.greeted(address)
    for (const option of [Option.LIST, Option.STRUCTURED_REPLY, Option.GO, 77])
      expect((await client.option(option, infoBytes('')))[0]!.type).toBe(Reply.ERR_TLS_REQD)
    expect((await client.option(Option.STARTTLS))[0]!.type).toBe(Reply.ACK)
    await client.secure({ ca: checks.ca(), host: 'localhost' })
    // What was said before does not count, and TLS is there already.
    expect((await client.option(Option.STARTTLS))[0]!.type).toBe(Reply.ERR_INVALID)
    await client.structuredReplies()
    await client.go()
    const bytes = bytesOf(1, 1_500_000)
    expect((await client.write(7, bytes)).error).toBe(0)
    expect((await client.read(7, bytes.length)).data.equals(bytes)).toBe(true)
    const many = await Promise.all(Array.from({ length: 64 }, (_, n) => client.read(7 + n * 4096, 4096)))
    expect(many.every(({ data }, n) => data.equals(bytes.subarray(n * 4096, n * 4096 + 4096)))).toBe(true)
  })

  test('the old way in ends the connection; with TLS it works, with and without padding', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    const { address, server } = await start()
    const early = await Client.greeted(address)
    early.send(optionBytes(Option.EXPORT_NAME))
    expect(await early.closed).toBe(true)
    for (const [flags, length] of [
      [3, 10],
      [1, 134],
    ] as const) {
      const client = await Client.greeted(address, flags)
      await client.option(Option.STARTTLS)
      await client.secure({ ca: checks.ca(), host: 'localhost' })
      client.send(optionBytes(Option.EXPORT_NAME))
      expect((await client.bytes(length)).readBigUInt64BE()).toBe(2n ** 22n)
      client.transmit()
      expect((await client.read(0, 16)).data).toEqual(Buffer.alloc(16))
    }
    expect(server.stats().counters).toMatchObject({ connections: 2, secured: 2 })
  })

  test('optional: a client may do without', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    const { address } = await start({ optional: true })
    expect((await (await Client.ready(address)).read(0, 16)).error).toBe(0)
  })

  test('clients that have to show a certificate', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    const refused: NbdRefusal[] = []
    const { address, server } = await start({ verifyClients: true }, (refusal) => refused.push(refusal))
    const known = await Client.greeted(address)
    await known.option(Option.STARTTLS)
    await known.secure({ ca: checks.ca(), host: 'localhost', ...keys.client })
    await known.go()
    expect((await known.read(0, 16)).error).toBe(0)
    for (const [credentials, reason] of [
      [{}, 'it showed no certificate'],
      [keys.stranger, 'its certificate is not accepted: DEPTH_ZERO_SELF_SIGNED_CERT'],
    ] as const) {
      const unknown = await Client.greeted(address)
      await unknown.option(Option.STARTTLS)
      await unknown.secure({ ca: checks.ca(), host: 'localhost', ...credentials })
      for (const option of [Option.STRUCTURED_REPLY, Option.LIST, Option.INFO, Option.GO]) {
        const [answer] = await unknown.option(option, option < Option.INFO ? Buffer.alloc(0) : infoBytes(''))
        expect(answer).toMatchObject({ type: Reply.ERR_POLICY, payload: Buffer.from(reason) })
      }
      expect(refused.splice(0)).toEqual([
        { reason: 'tls', peer: expect.stringMatching(/^127\.0\.0\.1:\d+$/), message: reason },
      ])
      unknown.send(optionBytes(Option.EXPORT_NAME))
      expect(await unknown.closed).toBe(true)
    }
    expect(server.stats().counters).toMatchObject({ secured: 1, refused: 2, refused_tls: 2 })
    expect((await known.read(0, 16)).error).toBe(0)
  })

  test('a session that began without a certificate is not resumed as one that had one', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
      const { address } = await start({ verifyClients: true })
      let session: Buffer | undefined
      for (let round = 0; round < 3; round++) {
        const unknown = await Client.greeted(address)
        await unknown.option(Option.STARTTLS)
        const options = { ca: checks.ca(), host: 'localhost', minVersion: version, maxVersion: version }
        const keep = (given: Buffer): void => {
          session = given
        }
        await unknown.secure({ ...options, ...(session === undefined ? {} : { session }) }, keep)
        const [answer] = await unknown.option(Option.GO, infoBytes(''))
        expect(answer!.type).toBe(Reply.ERR_POLICY)
        unknown.socket.destroy()
      }
    }
  })

  test('whoever does not begin TLS, or fails in it, is counted', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    const refused: string[] = []
    const { address, server } = await start({}, ({ reason, message }) => refused.push(`${reason}: ${message}`))
    const plain = await Client.greeted(address)
    await plain.option(Option.LIST)
    plain.socket.destroy()
    await until(() => refused.length === 1)
    const garbage = await Client.greeted(address)
    await garbage.option(Option.STARTTLS)
    garbage.send(bytesOf(1, 1000))
    expect(await garbage.closed).toBe(true)
    expect(refused).toEqual(['tls: it does not use TLS', expect.stringContaining('tls: TLS failed: ')])
    expect(server.stats().counters).toMatchObject({ refused: 2, refused_tls: 2, negotiating: 0 })
  })

  test('bytes in the clear behind STARTTLS end the connection', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    const { address } = await start()
    const client = await Client.greeted(address)
    client.send(optionBytes(Option.STARTTLS), optionBytes(Option.LIST))
    expect(await client.closed).toBe(true)
  })

  test('garbage instead of a handshake, and a server that closes in the middle of one', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    const { address, server } = await start()
    const garbage = await Client.greeted(address)
    await garbage.option(Option.STARTTLS)
    garbage.send(bytesOf(1, 1000))
    expect(await garbage.closed).toBe(true)
    const waiting = await Client.greeted(address)
    await waiting.option(Option.STARTTLS)
    await server.close()
    expect(await waiting.closed).toBe(true)
    await until(() => server.stats().counters['buffer_bytes'] === 0)
  })

  test('verifyClients without somebody who signs', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    await expect(serve({}, { port: 0, tls: { ...keys.server, verifyClients: true } })).rejects.toThrow(
      'verifyClients needs ca',
    )
  })
})
