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

test('a drive that does so many requests a second lies behind what holds it up', () => {
  const words = driveWords({ file: '/images/a.raw', requestsPerSecond: 500 }, 0)
  expect(words.map((word) => (word.startsWith('{') ? JSON.parse(word) : word))).toEqual([
    '-object',
    { 'qom-type': 'throttle-group', id: 'drive0-group', limits: { 'iops-total': 500 } },
    '-blockdev',
    {
      driver: 'throttle',
      'node-name': 'drive0',
      'throttle-group': 'drive0-group',
      discard: 'unmap',
      file: { driver: 'file', filename: '/images/a.raw', discard: 'unmap' },
    },
    '-device',
    'virtio-blk-pci,drive=drive0',
  ])
})
