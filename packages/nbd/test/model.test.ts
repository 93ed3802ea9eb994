/** Random requests through a real socket, against a plain Buffer that does the same. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { memoryDevice } from '../src/index.ts'
import { Command, CommandFlag, Errno } from '../src/protocol.ts'
import { bytesOf, Client, SlowDevice, serve } from './client.ts'

const size = 1_500_000
const largest = 2_000_000

type Operation =
  | { kind: 'write' | 'read' | 'trim' | 'zero'; at: number; length: number; flags: number; seed: number }
  | { kind: 'flush' }
  | { kind: 'resize'; to: number }

function operations(blockSize: number): fc.Arbitrary<Operation[]> {
  const position = fc.oneof(
    fc.nat(Math.floor(largest / blockSize)).map((block) => block * blockSize),
    fc.nat(Math.floor(largest / 4096)).map((page) => page * 4096),
  )
  const length = fc.oneof(
    fc.nat(Math.floor(20_000 / blockSize)).map((blocks) => blocks * blockSize),
    fc.constantFrom(4096, 65_536, 262_144, 266_240, 512 * 1024),
  )
  const range = fc.record({
    kind: fc.constantFrom('write', 'write', 'read', 'read', 'trim', 'zero'),
    at: position,
    length,
    flags: fc.constantFrom(0, 0, CommandFlag.FUA),
    seed: fc.nat(1000),
  })
  const operation: fc.Arbitrary<Operation> = fc.oneof(
    { arbitrary: range as fc.Arbitrary<Operation>, weight: 12 },
    { arbitrary: fc.constant<Operation>({ kind: 'flush' }), weight: 1 },
    { arbitrary: position.map((to): Operation => ({ kind: 'resize', to: Math.max(to, 8192) })), weight: 1 },
  )
  return fc.array(operation, { minLength: 1, maxLength: 40 })
}

const types = { write: Command.WRITE, read: Command.READ, trim: Command.TRIM, zero: Command.WRITE_ZEROES }

/** Does the same to the model; what the reply must be. */
function onModel(model: { bytes: Buffer }, operation: Operation): { error: number; data?: Buffer } {
  if (operation.kind === 'flush') return { error: 0 }
  if (operation.kind === 'resize') {
    const bytes = Buffer.alloc(operation.to)
    model.bytes.copy(bytes)
    model.bytes = bytes
    return { error: 0 }
  }
  const { kind, at, length, seed } = operation
  if (at + length > model.bytes.length)
    return { error: kind === 'write' || kind === 'zero' ? Errno.ENOSPC : Errno.EINVAL }
  if (kind === 'read') return { error: 0, data: Buffer.from(model.bytes.subarray(at, at + length)) }
  if (kind === 'write') bytesOf(seed, length).copy(model.bytes, at)
  else model.bytes.fill(0, at, at + length)
  return { error: 0 }
}

describe.each([
  ['at once, any bytes', 1, false, 64 * 2 ** 20],
  ['at once, blocks of 512', 512, false, 64 * 2 ** 20],
  ['later, any bytes', 1, 'turn', 64 * 2 ** 20],
  ['later, blocks of 4096, little memory', 4096, 'turn', 300_000],
] as const)('a device that is done %s', (_, blockSize, slow, bytes) => {
  test.each([
    ['simple', false],
    ['structured', true],
  ] as const)('does as a Buffer does (%s replies)', async (__, structured) => {
    const rounded = Math.floor(size / blockSize) * blockSize
    await fc.assert(
      fc.asyncProperty(operations(blockSize), fc.nat(3), async (list, together) => {
        const inner = memoryDevice({ sizeBytes: rounded, blockSize })
        const device = new SlowDevice(inner)
        device.slow = slow
        const resizing = Object.assign(device, { resize: (to: number) => inner.resize(to) })
        const { address, server } = await serve({ exports: [{ device: resizing, resizable: true }], limits: { bytes } })
        const client = await Client.ready(address, { structured })
        const model = { bytes: Buffer.alloc(rounded) }
        // Some at the same time, where their order does not matter: a device promises none for overlapping ranges.
        let waiting: Promise<void>[] = []
        let busy: [number, number][] = []
        for (const operation of list) {
          const range: [number, number] =
            'at' in operation ? [operation.at, operation.at + operation.length] : [0, Number.POSITIVE_INFINITY]
          if (waiting.length > together || busy.some(([from, to]) => from < range[1] && range[0] < to)) {
            await Promise.all(waiting)
            waiting = []
            busy = []
          }
          const expected = onModel(model, operation)
          const answer =
            operation.kind === 'flush'
              ? client.request(Command.FLUSH, 0, 0)
              : operation.kind === 'resize'
                ? client.request(Command.RESIZE, operation.to, 0)
                : client.request(types[operation.kind], operation.at, operation.length, {
                    flags: operation.flags,
                    ...(operation.kind === 'write' ? { payload: bytesOf(operation.seed, operation.length) } : {}),
                  })
          busy.push(range)
          waiting.push(
            answer.then(({ error, data }) => {
              expect(error).toBe(expected.error)
              expect(data.equals(expected.data ?? data)).toBe(true)
            }),
          )
        }
        await Promise.all(waiting)
        const whole = await client.read(0, model.bytes.length)
        expect(whole.data.equals(model.bytes)).toBe(true)
        client.socket.destroy()
        await server.close()
        expect(server.stats().counters['buffer_bytes']).toBe(0)
      }),
      { numRuns: 25, seed: 20111005 },
    )
  })
})
