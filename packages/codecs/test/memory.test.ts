// No garbage: what a codec makes per call would show in the heap long before the collector runs.
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { createCodec, createLz4Arena, createPortableLz4 } from '@tmem/codecs'
import { expect, test } from 'vitest'
import { likeMemory } from './blocks.ts'

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

const CALLS = 2000
/** One object of a few words per call would be more. */
const TOLERANCE = CALLS * 16

/** Smallest growth of several rounds: other things of the process allocate now and then, a codec would always. */
function growth(call: () => void): number {
  for (let i = 0; i < 20_000; i++) call()
  let smallest = Number.POSITIVE_INFINITY
  for (let round = 0; round < 6; round++) {
    collect()
    const before = process.memoryUsage().heapUsed
    for (let i = 0; i < CALLS; i++) call()
    smallest = Math.min(smallest, process.memoryUsage().heapUsed - before)
  }
  return smallest
}

const arena = createLz4Arena(100_000)
const cases = [
  ['lz4 in its arena', arena.codec, arena.bytes],
  ['lz4 in TypeScript', createPortableLz4(), new Uint8Array(100_000)],
  ['lz4js', createCodec('lz4js'), new Uint8Array(100_000)],
] as const

test('the measure sees one view per call', () => {
  const whole = new Uint8Array(4096)
  const kept: { view?: Uint8Array } = {}
  expect(
    growth(() => {
      kept.view = whole.subarray(1)
    }),
  ).toBeGreaterThan(TOLERANCE)
})

test.each(cases)('%s makes no garbage', (_, codec, memory) => {
  const page = likeMemory(1024, 1)
  const into = new Uint8Array(1024)
  const room = codec.bound(1024)
  const call = (): void => {
    const written = codec.compress(page, 0, 1024, memory, 5000, room)
    codec.decompress(memory, 5000, written, into, 0, 1024)
  }
  expect(growth(call)).toBeLessThan(TOLERANCE)
})

test('lz4 outside an arena: one short-lived view for a source that is a part of an array, else nothing', () => {
  const codec = createCodec('lz4')
  const page = likeMemory(1024, 1)
  const into = new Uint8Array(1024)
  const memory = new Uint8Array(10_000)
  let written = 0
  expect(
    growth(() => {
      written = codec.compress(page, 0, 1024, memory, 5000, 2000)
    }),
  ).toBeLessThan(TOLERANCE)
  const block = memory.slice(5000, 5000 + written)
  expect(growth(() => codec.decompress(block, 0, written, into, 0, 1024))).toBeLessThan(TOLERANCE)
  expect(growth(() => codec.decompress(memory, 5000, written, into, 0, 1024))).toBeLessThan(CALLS * 256)
})
