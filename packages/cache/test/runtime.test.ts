/** What stands in for a `Buffer` in browsers writes and reads the same bytes. */
import { expect, test } from 'vitest'
import { PortableBuffer } from '../src/runtime.ts'

const texts = [
  '',
  'plain',
  'Grüße',
  '日本語',
  '😀 pair',
  '\ud83d alone',
  'alone \ude00',
  '\ud83d\ud83d\ude00',
  'a'.repeat(9000),
]

test.each(texts)('text %j', (text) => {
  expect(PortableBuffer.byteLength(text)).toBe(Buffer.byteLength(text))
  for (const encoding of ['latin1', 'utf8', 'utf16le'] as const) {
    const length = encoding === 'latin1' ? text.length : encoding === 'utf8' ? Buffer.byteLength(text) : 2 * text.length
    const [here, there] = [PortableBuffer.alloc(length + 6), Buffer.alloc(length + 6)]
    expect(here.write(text, 3, length, encoding)).toBe(there.write(text, 3, length, encoding))
    expect(Buffer.from(here)).toEqual(there)
    expect(here.toString(encoding, 3, 3 + length)).toBe(there.toString(encoding, 3, 3 + length))
  }
})

test('numbers', () => {
  const [here, there] = [PortableBuffer.alloc(64), Buffer.alloc(64)]
  for (const bytes of [here, there]) {
    expect(bytes.writeInt32LE(-2_000_000_000, 1)).toBe(5)
    expect(bytes.writeUInt32LE(4_000_000_000, 5)).toBe(9)
    expect(bytes.writeDoubleLE(-Math.PI, 9)).toBe(17)
    expect(bytes.writeUIntLE(2 ** 48 - 3, 17, 6)).toBe(23)
  }
  expect(Buffer.from(here)).toEqual(there)
  expect(here.readInt32LE(1)).toBe(-2_000_000_000)
  expect(here.readUInt32LE(5)).toBe(4_000_000_000)
  expect(here.readDoubleLE(9)).toBe(-Math.PI)
  expect(here.readUIntLE(17, 6)).toBe(2 ** 48 - 3)
})

test('bytes: copies, views, comparison', () => {
  const bytes = new Uint8Array([1, 2, 3, 4])
  const copy = PortableBuffer.from(bytes)
  copy[0] = 9
  expect(bytes[0]).toBe(1)
  const view = PortableBuffer.from(bytes.buffer, 1, 2)
  view[0] = 8
  expect([...bytes]).toEqual([1, 8, 3, 4])
  expect(PortableBuffer.isBuffer(view.subarray(1))).toBe(true)
  expect(PortableBuffer.isBuffer(bytes)).toBe(false)
  expect(copy.compare(bytes, 2, 4, 2, 4)).toBe(0)
})
