import { expect, test } from 'vitest'
import { driveWords } from '../src/index.ts'

test('a raw image is used around the cache of the host only when that is asked for', () => {
  const node = { driver: 'file', filename: '/images/a.raw', 'node-name': 'drive1', discard: 'unmap' }
  const told = (direct?: true): unknown => {
    const words = driveWords({ file: '/images/a.raw', ...(direct === undefined ? {} : { direct }) }, 1)
    expect(words).toEqual(['-blockdev', expect.any(String), '-device', 'virtio-blk-pci,drive=drive1'])
    return JSON.parse(words[1]!)
  }
  expect(told()).toEqual(node)
  expect(told(true)).toEqual({ ...node, cache: { direct: true } })
})
