import type { Allocator } from '@tmem/core'
import { systemAllocator, TmemError } from '@tmem/core'
import { expect, test } from 'vitest'
import { memoryDevice } from '../src/index.ts'
import { bytesOf } from './client.ts'

const piece = 64 * 2 ** 20

test('bytes across the pieces that memory comes in', () => {
  const device = memoryDevice({ sizeBytes: 2 * piece + 5000 })
  const bytes = bytesOf(1, 200_000)
  for (const at of [piece - 100_000, 2 * piece - 199_999, 2 * piece + 5000 - bytes.length]) {
    device.write(at, bytes)
    const into = Buffer.alloc(bytes.length)
    device.read(at, into)
    expect(into.equals(bytes)).toBe(true)
  }
  device.discard(0, device.sizeBytes)
  expect(device.stats().counters['written_pages']).toBe(0)
  const into = Buffer.alloc(200_000, 1)
  device.read(piece - 100_000, into)
  expect(into.every((byte) => byte === 0)).toBe(true)
})

test('what is asked for wrongly', async () => {
  const device = memoryDevice({ sizeBytes: 8192, blockSize: 512, name: 'small' })
  expect(() => device.read(0, Buffer.alloc(100))).toThrow(RangeError)
  expect(() => device.write(8192, Buffer.alloc(512))).toThrow(RangeError)
  expect(() => device.resize(1)).toThrow(RangeError)
  expect(() => memoryDevice({ sizeBytes: -1 })).toThrow(RangeError)
  expect(() => memoryDevice({ sizeBytes: 4096, blockSize: 3 })).toThrow(RangeError)
  await device.close()
  await device.close()
  expect(() => device.read(0, Buffer.alloc(512))).toThrow('small was closed')
})

test('no memory: an error when it is made, no change when it should grow', () => {
  let left = 2
  const allocator: Allocator = {
    allocate: (bytes, site) => (left-- > 0 ? systemAllocator.allocate(bytes, site) : undefined),
  }
  const device = memoryDevice({ sizeBytes: 8192, allocator })
  device.write(4096, bytesOf(1, 4096))
  for (const allowed of [0, 1]) {
    left = allowed
    expect(() => device.resize(65_536)).toThrow(TmemError)
    expect(device.sizeBytes).toBe(8192)
    const into = Buffer.alloc(4096)
    device.read(4096, into)
    expect(into.equals(bytesOf(1, 4096))).toBe(true)
  }
  for (const allowed of [0, 1]) {
    left = allowed
    expect(() => memoryDevice({ sizeBytes: 8192, allocator })).toThrow(TmemError)
  }
})

test('the map of a device: written, zeroed with its room kept, discarded', () => {
  const device = memoryDevice({ sizeBytes: 65_536 })
  device.write(5000, new Uint8Array(10))
  device.zero(20_480, 4096, true)
  const map = (): [number, boolean][] => {
    const runs: [number, boolean][] = []
    device.map(0, 65_536, (length, allocated) => runs.push([length, allocated]) < 100)
    return runs
  }
  expect(map()).toEqual([
    [4096, false],
    [4096, true],
    [12_288, false],
    [4096, true],
    [40_960, false],
  ])
  // Half of a page does not make a hole.
  device.discard(4096, 2048)
  device.zero(20_480, 4096)
  expect(map()).toEqual([
    [4096, false],
    [4096, true],
    [57_344, false],
  ])
  const first: number[] = []
  device.map(0, 65_536, (length) => first.push(length) < 1)
  expect(first).toEqual([4096])
})
