import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'
import { maxPlaces } from '../src/directory.ts'
import { compose, planStack, TmemError } from '../src/index.ts'
import type { PlaceTraits } from '../src/place.ts'
import type { Layer } from '../src/store.ts'

const fail = (): never => {
  throw new Error('planning opens nothing')
}

const unopened = (layer: Layer): Layer => ({ ...layer, open: fail })

test('a stack is judged without opening anything', () => {
  const layer = unopened(memory({ limitBytes: 2 ** 24 }))
  const alone = planStack([layer])
  const { readsOnce, ...others } = alone
  expect(readsOnce).toBe(true)
  expect(planStack([layer, layer])).toEqual({ ...others, split: false, reservedBytes: expect.any(Number) })
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

describe('a chain of places', () => {
  const traits: PlaceTraits = Object.freeze({
    persistent: true,
    ephemeral: true,
    waits: false,
    survives: 'nothing',
    rawOnly: false,
    capacity: 100,
    reservedBytes: 4096,
    maxPageSize: 65_536,
  })
  const place = (name: string, changes: Partial<PlaceTraits> = {}): Layer => ({
    name,
    place: { traits: { ...traits, ...changes }, open: fail },
  })
  const between = (name: string, planPlace?: Layer['planPlace']): Layer => ({
    name,
    wrapPlace: fail,
    ...(planPlace === undefined ? {} : { planPlace }),
  })
  const [ram, disk] = [place('ram'), place('disk', { waits: true, ephemeral: false, maxPageSize: 4096 })]

  test('can what one of its places can, and has room for what all of them have', () => {
    expect(planStack([ram, ram, disk])).toEqual({
      ephemeral: true,
      persistent: true,
      shared: true,
      minPageSize: 4096,
      maxPageSize: 65_536,
      deferred: true,
      split: false,
      reservedBytes: 3 * 4096,
    })
    expect(planStack([disk])).toMatchObject({ ephemeral: false, shared: false, maxPageSize: 4096, reservedBytes: 4096 })
    expect(planStack([ram, place('theirs', { foreign: true })]).reservedBytes).toBe(4096)
    const unsure = between('unsure', (below) => ({ ...below, reservedBytes: 0 }))
    expect(planStack([ram, unsure, disk]).reservedBytes).toBe(4096)
  })

  test('begins with a filter of places, which belongs to the first place', () => {
    const unsure = between('unsure', (below) => ({ ...below, reservedBytes: 0 }))
    expect(planStack([unsure, ram, disk]).reservedBytes).toBe(planStack([disk]).reservedBytes)
  })

  test.each<[string, readonly Layer[], string]>([
    ['memory below what waits', [ram, disk, ram], 'ram cannot stand below a place that waits: memory comes first'],
    [
      'a filter at the end',
      [ram, between('lens')],
      'lens cannot be the last layer: it keeps no pages itself and needs a place below',
    ],
    [
      'a filter that does not want what is below it',
      [ram, between('lens', () => 'it is for disks'), ram],
      'lens cannot stand above ram: it is for disks',
    ],
    [
      'too many places',
      Array.from({ length: maxPlaces + 1 }, () => ram),
      `a stack has at most ${maxPlaces} places, not ${maxPlaces + 1}`,
    ],
  ])('is refused for %s, before anything is opened', (_, layers, message) => {
    expect(() => planStack(layers)).toThrow(expect.objectContaining({ code: 'TMEM_BAD_STACK', message }))
    expect(() => compose(layers)).toThrow(message)
  })

  test('a place that cannot open: those below it, which are open, are closed, and the error is the place’s own', async () => {
    const closed: string[] = []
    const opening = (name: string, changes: Partial<PlaceTraits> = {}): Layer => ({
      name,
      place: {
        traits: { ...traits, ...changes },
        open: () =>
          ({ name, traits, close: async () => void closed.push(name), stats: fail }) as unknown as ReturnType<
            NonNullable<Layer['place']>['open']
          >,
      },
    })
    const broken: Layer = {
      name: 'broken',
      place: {
        traits,
        open: () => {
          throw new TmemError('TMEM_IO', 'broken: no such file', { layer: 'broken' })
        },
      },
    }
    const layers = [opening('top'), broken, opening('a', { waits: true }), opening('b', { waits: true })]
    expect(() => compose(layers)).toThrow('broken: no such file')
    await new Promise(setImmediate)
    expect(closed.sort()).toEqual(['a', 'b'])
  })
})
