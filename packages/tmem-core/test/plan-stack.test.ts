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
  expect(planStack([layer, layer])).toEqual(layer.plan(layer.plan(undefined) as never))
  const picky: Layer = {
    ...layer,
    name: 'picky',
    plan: (below) => (below === undefined ? 'it needs one below' : below),
  }
  expect(planStack([picky, layer])).toEqual(layer.plan(undefined))
  for (const [layers, message] of [
    [[layer, picky], 'picky cannot be the last layer: it needs one below'],
    [[], 'a stack needs at least one layer that keeps pages, e.g. memory'],
  ] as const) {
    expect(() => planStack(layers)).toThrow(TmemError)
    expect(() => planStack(layers)).toThrow(message)
  }
})
