/** What browsers get in place of Node's functions gives the same bytes, orders and sums. */
import { crc32 as crcOfZlib } from 'node:zlib'
import { expect, test } from 'vitest'
import * as own from '../src/runtime.ts'

/** Numbers below `bound` that are the same in every run. */
function numbers(seed: number): (bound: number) => number {
  let state = seed
  return (bound) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return Math.floor((state / 2 ** 32) * bound)
  }
}

test('where there is Node, its own functions are used', () => {
  expect(own.copyBytes).toBe(Buffer.prototype.copy)
  expect(own.compareBytes).toBe(Buffer.prototype.compare)
  expect(own.crc32).toBe(crcOfZlib)
  expect(own.builtin<typeof import('node:path')>('node:path')?.sep).toMatch(/[/\\]/)
  expect(own.builtin('node:nothing')).toBeUndefined()
})

test('the portable copy is that of Buffer, also when bytes overlap', () => {
  const next = numbers(1)
  for (let round = 0; round < 500; round++) {
    const bytes = Uint8Array.from({ length: 64 }, () => next(256))
    const [from, to, length] = [next(32), next(32), next(33)]
    const [here, there] = [bytes.slice(), bytes.slice()]
    own.portableCopy.call(here, here, to, from, from + length)
    Buffer.prototype.copy.call(there, there, to, from, from + length)
    expect(here).toEqual(there)
  }
})

test('the portable comparison is that of Buffer', () => {
  const next = numbers(2)
  for (let round = 0; round < 500; round++) {
    const [a, b] = [0, 1].map(() => Uint8Array.from({ length: 8 }, () => next(2)))
    const ranges = [next(4), 4 + next(5), next(4), 4 + next(5)] as const
    const expected = Buffer.prototype.compare.call(a, b!, ...ranges)
    expect(own.portableCompare.call(a!, b!, ...ranges)).toBe(expected)
  }
})

test('the portable sum is that of zlib', () => {
  const [next, portable] = [numbers(3), own.makePortableCrc32()]
  for (let length = 0; length < 100; length++) {
    const bytes = Uint8Array.from({ length }, () => next(256))
    expect(portable(bytes)).toBe(crcOfZlib(bytes))
  }
  expect(portable(new TextEncoder().encode('123456789'))).toBe(0xcbf43926)
})

test('a turn lets others run first', async () => {
  const order: string[] = []
  setImmediate(() => order.push('other'))
  await own.turn()
  order.push('this')
  expect(order).toEqual(['other', 'this'])
})
