/** Where a page is and how long pages take, as a device says it. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Layer, StatsNode } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { zcache } from '@tmem/zcache'
import { expect, onTestFinished, test } from 'vitest'
import { type Ramzswap, ramzswap } from '../src/index.ts'

const sizeBytes = 2 ** 20

function stackOf(): Layer[] {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-explain-'))
  onTestFinished(() => rmSync(folder, { recursive: true }))
  return [
    zcache({ limitBytes: 2 ** 21, recompress: 'deflate' }),
    frontswap({ file: join(folder, 'file'), sizeBytes: 2 * sizeBytes }),
  ]
}

// Of few letters in no order, which a stronger codec makes less of.
const text = Buffer.from(Array.from({ length: 4096 }, (_, n) => 97 + ((Math.imul(n + 1, 2654435761) >>> 7) % 5)))

test('explain follows a page on its way', async () => {
  let seconds = 0
  const device = ramzswap({ name: 'd', sizeBytes, stack: stackOf(), clock: () => seconds * 1000, history: 100 })
  expect(device.explain(7)).toEqual({
    slot: 7,
    state: 'empty',
    place: null,
    placeNumber: null,
    bytes: 0,
    codec: null,
    flags: '',
    ageSeconds: null,
    moves: [],
    movesSeconds: 0,
  })
  void device.write(7 * 4096, text)
  seconds = 5
  const held = device.explain(7)
  expect(held).toMatchObject({ state: 'held', place: 'zcache', placeNumber: 0, codec: 2, flags: '', ageSeconds: 5 })
  await device.recompress()
  const smaller = device.explain(7)
  expect(smaller).toMatchObject({ codec: 3, flags: 'r' })
  expect(smaller.bytes).toBeLessThan(held.bytes)
  await device.writeback({ pageIndex: 7 })
  expect(device.explain(7)).toMatchObject({
    place: 'frontswap',
    placeNumber: 1,
    codec: null,
    flags: 'w',
    ageSeconds: 5,
  })
  seconds = 8
  await device.read(7 * 4096, new Uint8Array(4096))
  const { ageSeconds, moves, movesSeconds } = device.explain(7)
  expect([ageSeconds, movesSeconds]).toEqual([0, 8])
  expect(moves).toEqual([
    { reason: 'rose', from: 'frontswap', to: 'zcache', agoSeconds: 0 },
    { reason: 'sunk', from: 'zcache', to: 'frontswap', agoSeconds: 3 },
  ])
  expect(device.explain(8).moves).toEqual([])
  void device.write(0, Buffer.alloc(4096, 3))
  expect(device.explain(0)).toMatchObject({ state: 'same', place: null, bytes: 0, codec: null, flags: 's' })
  for (const slot of [-1, 256, 0.5, Number.NaN]) expect(() => device.explain(slot)).toThrow(/d has pages 0 to 255, got/)
  await device.close()
})

const section = (node: StatsNode, name: string): StatsNode | undefined =>
  node.children.find((child) => child.name === name)

/** How many there were, by operation and place. */
function countsOf(device: Ramzswap): Record<string, number> {
  const counts: Record<string, number> = {}
  for (const operation of section(device.stats(), 'latency')!.children)
    for (const place of operation.children) counts[`${operation.name} ${place.name}`] = place.counters['count']!
  return counts
}

test('a device that was not asked to remember moves says so', async () => {
  const device = ramzswap({ name: 'd', sizeBytes, stack: stackOf(), clock: () => 0 })
  expect(device.explain(0)).toMatchObject({ moves: null, movesSeconds: null })
  await device.close()
})

test('puts, gets and fetches are timed by the place that has the page, and count for all of them', async () => {
  let ms = 0
  // Each look at the clock is a thousandth of a millisecond later.
  const device = ramzswap({ name: 'd', sizeBytes, stack: stackOf(), stopwatch: () => (ms += 0.001) })
  expect(countsOf(device)).toEqual({})
  const into = new Uint8Array(4096)
  for (let n = 0; n < 183; n++) void device.write((n % 100) * 4096, text)
  for (let n = 0; n < 366; n++) void device.read((n % 100) * 4096, into)
  expect(countsOf(device)).toEqual({ 'put zcache': 183, 'get zcache': 366 })
  // A batch: its pages count, and each took its share of the time.
  void device.write(0, Buffer.concat(Array.from({ length: 64 }, () => text)))
  expect(countsOf(device)['put zcache']).toBe(183 + 64)
  for (let n = 0; n < 61; n++) void device.write(200 * 4096, Buffer.alloc(4096, 1))
  expect(countsOf(device)['put same']).toBe(61)
  await device.writeback({ pageIndex: 0, lastPageIndex: 99 })
  for (let n = 0; n < 10; n++) await device.read(n * 4096, into)
  expect(countsOf(device)['fetch frontswap']).toBe(10)
  const fetches = section(section(section(device.stats(), 'latency')!, 'fetch')!, 'frontswap')!.counters
  expect(fetches).toMatchObject({ sum_ns: 10_000, max_ns: 1000 })
  await device.close()
})

test('without a stopwatch nothing is timed', async () => {
  const device = ramzswap({ name: 'd', sizeBytes, stack: stackOf() })
  void device.write(0, text)
  expect(section(device.stats(), 'latency')).toBeUndefined()
  await device.close()
})
