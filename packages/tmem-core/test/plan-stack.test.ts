import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import { planStack, TmemError } from '../src/index.ts'
import type { Layer } from '../src/store.ts'

const unopened = (layer: Layer): Layer => ({
  ...layer,
  open: () => {
    throw new Error('planning opens nothing')
  },
})

test('a stack is judged without opening anything', () => {
  const layer = unopened(memory({ limitBytes: 2 ** 24 }))
  const alone = planStack([layer])
  expect(planStack([layer, layer])).toEqual({ ...alone, split: false, reservedBytes: expect.any(Number) })
  expect(planStack([layer, layer]).reservedBytes).toBeGreaterThan(1.9 * alone.reservedBytes)
  const picky: Layer = {
    name: 'picky',
    plan: (below) => (below === undefined ? 'it needs one below' : below),
  }
  expect(planStack([picky, layer])).toEqual(alone)
  for (const [layers, message] of [
    [[picky], 'picky cannot be the last layer: it needs one below'],
    [[layer, picky], 'picky cannot stand below memory: it is no place, nor a filter between places'],
    [[], 'a stack needs at least one layer that keeps pages, e.g. memory'],
  ] as const) {
    expect(() => planStack(layers)).toThrow(TmemError)
    expect(() => planStack(layers)).toThrow(message)
  }
})
