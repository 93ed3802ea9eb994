import { createCodec } from '@tmem/codecs'
import { expect, test } from 'vitest'

test('a page comes back', () => {
  const page = new Uint8Array(4096).map((_, i) => (i * i) >> 6)
  for (const name of ['lz4js', 'lz4'] as const) {
    const codec = createCodec(name)
    const block = new Uint8Array(codec.bound(page.length))
    const length = codec.compress(page, 0, page.length, block, 0, block.length)
    const back = new Uint8Array(4096)
    expect(codec.decompress(block, 0, length, back, 0, 4096)).toBe(4096)
    expect(back).toEqual(page)
  }
})
