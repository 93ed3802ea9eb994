import { expect, test } from 'vitest'
import { KeyHash, KeyKind } from '../src/hash.ts'

/** Of Linux (lib/tests/siphash_kunit.c, hsiphash on 32 bits): the bytes 0 to n-1 under the key 0 to 7. */
const vectors = [
  0x5814c896, 0xe7e864ca, 0xbc4b0e30, 0x01539939, 0x7e059ea6, 0x88e3d89b, 0xa0080b65, 0x9d38d9d6, 0x577999b1,
  0xc839caed, 0xe4fa32cf, 0x959246ee, 0x6b28096c, 0x66dd9cd6, 0x16658a7c, 0xd0257b04, 0x8b31d501, 0x2b1cd04b,
  0x06712339, 0x522aca67, 0x911bb605, 0x90a65f0e, 0xf826ef7b, 0x62512deb, 0x57150ad7, 0x5d473507, 0x1ec47442,
  0xab64afd3, 0x0a4100d0, 0x6d2ce652, 0x2331b6a3, 0x08d8791a, 0xbc6dda8d, 0xe0f6c934, 0xb0652033, 0x9b9851cc,
]

test('the hash of a narrow string is HalfSipHash-1-3 of its bytes', () => {
  const hash = new KeyHash(0x03020100, 0x07060504)
  for (const [n, wanted] of vectors.entries()) {
    const bytes = Uint8Array.from({ length: n }, (_, i) => i)
    expect(hash.of(String.fromCharCode(...bytes)) >>> 0).toBe(wanted)
    expect(hash.bytes(bytes, 0, n, KeyKind.Narrow) >>> 0).toBe(wanted)
  }
})

test('a string, a wide string and bytes have hashes of their own, which can be had from their bytes', () => {
  const hash = new KeyHash(1, 2)
  const keys: (string | Uint8Array)[] = [
    '',
    'a',
    'é',
    'ÿ\u0000',
    'Ā',
    'ĀĀ',
    'a\ud800',
    '\udc00',
    'x'.repeat(300),
    'я'.repeat(301),
  ]
  for (const key of keys) {
    const of = hash.of(key)
    const { kind, length } = hash
    const bytes = kind === KeyKind.Wide ? Buffer.from(key as string, 'utf16le') : Buffer.from(key as string, 'latin1')
    expect(bytes.length).toBe(length)
    expect(hash.bytes(bytes, 0, length, kind)).toBe(of)
    expect(hash.of(new Uint8Array(bytes))).not.toBe(of)
  }
  expect(new Set(keys.map((key) => hash.of(key))).size).toBe(keys.length)
})

test('another seed scatters the same keys otherwise', () => {
  const one = new KeyHash(1, 2)
  const other = new KeyHash(1, 3)
  const same = Array.from({ length: 1000 }, (_, n) => `key ${n}`).filter((key) => one.of(key) === other.of(key))
  expect(same).toEqual([])
})
