/**
 * Requests of RESP: however they come in pieces, they are the same; what is none is one error; nothing is held on to.
 */
import { expect, test } from 'vitest'
import { random } from '../../../tools/random.ts'
import { type Argument, maxArguments, ProtocolError, RequestParser } from '../src/resp-parser.ts'
import { request } from './resp-client.ts'

const limits = { argumentBytes: 100, requestBytes: 400 }

/** What comes of pieces: requests, as latin1, and the error at the end if there was one. */
function read(pieces: readonly Buffer[]): { requests: (string | undefined)[][]; error: string | undefined } {
  const parser = new RequestParser(limits)
  const requests: (string | undefined)[][] = []
  for (const piece of pieces) {
    const chunk = Buffer.from(piece)
    parser.push(chunk)
    try {
      for (let next = parser.next(); next !== undefined; next = parser.next()) {
        requests.push(next.map((one: Argument) => one?.toString('latin1')))
        parser.done()
      }
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error
      return { requests, error: error.message }
    }
    if (parser.heldBytes > limits.requestBytes + 64 * 1024 + 64) throw new Error(`it holds ${parser.heldBytes} bytes`)
    // Whoever kept a view of it would see that.
    chunk.fill(0xee)
  }
  return { requests, error: undefined }
}

const split = (bytes: Buffer, points: readonly number[]): Buffer[] =>
  [0, ...points].map((from, n) => bytes.subarray(from, points[n]))

const large = Buffer.alloc(101, 'x')
const stream = Buffer.concat([
  Buffer.from('PING\r\n\r\n*0\r\n  get\t a \n'),
  request('SET', 'key', Buffer.from([0, 13, 10, 255, 36, 42])),
  request('', ''),
  request('SET', 'large', large, 'PX', '1'),
  request('MSET', ...Array.from({ length: 8 }, (_, n) => Buffer.alloc(90, String(n)))),
  request('GET', 'after'),
])
const expected = [
  ['PING'],
  ['get', 'a'],
  ['SET', 'key', '\0\r\n\u00ff$*'],
  ['', ''],
  ['SET', 'large', undefined, 'PX', '1'],
  ['MSET', ...Array.from({ length: 8 }, (_, n) => (n < 2 ? String(n).repeat(90) : undefined))],
  ['GET', 'after'],
]

test('requests are the same wherever they are split', () => {
  expect(read([stream])).toEqual({ requests: expected, error: undefined })
  for (let at = 1; at < stream.length; at++) expect(read(split(stream, [at])).requests).toEqual(expected)
  expect(read(Array.from(stream, (byte) => Buffer.of(byte))).requests).toEqual(expected)
})

test.each([1, 2, 3, 4])('requests are the same in any pieces (seed %i)', (seed) => {
  const next = random(seed)
  for (let round = 0; round < 500; round++) {
    const points = Array.from({ length: Math.floor(next() * 12) }, () => Math.floor(next() * stream.length))
    const pieces = split(
      stream,
      points.toSorted((a, b) => a - b),
    )
    expect(read(pieces)).toEqual({ requests: expected, error: undefined })
  }
})

test.each([
  ['*-1\r\n', 'invalid multibulk length'],
  ['*+1\r\n', 'invalid multibulk length'],
  ['*01\r\n', 'invalid multibulk length'],
  ['*\r\n', 'invalid multibulk length'],
  ['*1\n', 'invalid multibulk length'],
  ['*1x\r\n', 'invalid multibulk length'],
  [`*${maxArguments + 1}\r\n`, 'invalid multibulk length'],
  ['*99999999999\r\n', 'invalid length'],
  [`*1${'0'.repeat(400)}`, 'invalid length'],
  ['*1\r\n$-1\r\n', 'invalid bulk length'],
  ['*1\r\n$00\r\n\r\n', 'invalid bulk length'],
  ['*1\r\n$ 1\r\na\r\n', 'invalid bulk length'],
  ['*1\r\n$1.0\r\na\r\n', 'invalid bulk length'],
  [`*1\r\n$${512 * 2 ** 20 + 1}\r\n`, 'invalid bulk length'],
  ['*1\r\n$18446744073709551617\r\n', 'invalid length'],
  ['*1\r\n:1\r\n', "expected '$', got ':'"],
  ['*1\r\n\r\n', "expected '$', got byte 13"],
  ['*1\r\n\n', "expected '$', got nothing"],
  ['*1\r\n$3\r\nabcd\r\n', 'a bulk string does not end where it says'],
  ['*1\r\n$3\r\nabc\n\n', 'a bulk string does not end where it says'],
  ['*1\r\n$3\r\nabc\r\r', 'a bulk string does not end where it says'],
  ['SET a "b c"\r\n', 'an inline command has no quotation marks here: send bulk strings'],
  [`${'x'.repeat(64 * 1024 + 1)}`, 'an inline command has at most 65536 bytes'],
])('%j is one error, wherever it is split', (text, error) => {
  const bytes = Buffer.from(`PING\r\n${text}`)
  expect(read([bytes])).toEqual({ requests: [['PING']], error })
  for (let at = 1; at < Math.min(bytes.length, 600); at++)
    expect(read(split(bytes, [at]))).toEqual({ requests: [['PING']], error })
})

test.each([11, 12, 13, 14])('what is changed at random is requests, or one error (seed %i)', (seed) => {
  const next = random(seed)
  const alphabet = Buffer.from('*$\r\n0123456789-+: aZ"\0\xff', 'latin1')
  let errors = 0
  for (let round = 0; round < 3000; round++) {
    const bytes = Buffer.from(stream)
    for (let change = 0; change < 3; change++)
      bytes[Math.floor(next() * bytes.length)] = alphabet[Math.floor(next() * alphabet.length)]!
    const whole = read([bytes])
    const at = Math.floor(next() * bytes.length)
    expect(read(split(bytes, [at]))).toEqual(whole)
    if (whole.error !== undefined) errors++
  }
  expect(errors).toBeGreaterThan(500)
})

test('a large argument that comes byte by byte is whole', () => {
  const value = Buffer.from(Array.from({ length: 200_000 }, (_, n) => n % 251))
  const parser = new RequestParser({ argumentBytes: value.length, requestBytes: 2 ** 20 })
  const found: Buffer[] = []
  for (const byte of request('SET', 'k', value)) {
    parser.push(Buffer.of(byte))
    const next = parser.next()
    if (next !== undefined) found.push(next[2]!)
  }
  expect(found).toHaveLength(1)
  expect(found[0]!.equals(value)).toBe(true)
  parser.done()
  expect(parser.heldBytes).toBe(0)
})

test('what is announced counts as held', () => {
  const parser = new RequestParser({ argumentBytes: 1000, requestBytes: 2000 })
  parser.push(Buffer.from('*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1000\r\nx'))
  expect(parser.next()).toBeUndefined()
  expect(parser.heldBytes).toBeGreaterThanOrEqual(1004)
  expect(parser.heldBytes).toBeLessThan(1300)
})
