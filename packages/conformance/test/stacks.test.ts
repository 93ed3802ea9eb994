/**
 * The suite on every stack of up to four places: all orders in which places in memory come before those that wait, as
 * they are and with filters above and between them. What repeats a kind of place is tried with histories only. The
 * stacks are small, so that pages go down.
 */
import type { Layer } from '@tmem/core'
import { count, delay, fail, refuse, slowMemory, TraceLog, trace } from '@tmem/faults'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { afterAll, describe, expect, it, test } from 'vitest'
import { conformance, conformanceCases, type Manifest, type Refusal, type Subject } from '../src/index.ts'
import { propertyName } from '../src/suite.ts'
import { MiB, stack, swapFolder } from './subjects.ts'

const KiB = 1024
const folder = swapFolder()
afterAll(() => folder.remove())

/** A turn is a few microtasks: the same number each time. */
const turn = async (): Promise<void> => {
  for (let i = 0; i < 3; i++) await Promise.resolve()
}

/** A kind of place, and how one is made. */
interface Kind {
  readonly name: string
  readonly waits: boolean
  readonly make: () => Layer
}

const kinds: readonly Kind[] = [
  { name: 'memory', waits: false, make: () => memory({ limitBytes: 200 * KiB }) },
  { name: 'zcache', waits: false, make: () => zcache({ limitBytes: 300 * KiB }) },
  { name: 'slow memory', waits: true, make: () => slowMemory({ sizeBytes: 128 * KiB, turn, moves: 2 }) },
  { name: 'frontswap', waits: true, make: () => frontswap({ file: folder.file(), sizeBytes: 128 * KiB }) },
]

/** A filter, and what it makes of the stack. */
interface Filter {
  readonly name: string
  readonly make: () => Layer
  /** It refuses, or makes others refuse: with this reason. */
  readonly refuses?: 'Policy' | 'Unavailable'
}

const watching: readonly Filter[] = [
  { name: 'count', make: count },
  { name: 'trace', make: () => trace({ log: new TraceLog({ operations: 16 }) }) },
]
const refusing: Filter = { name: 'refuse', make: () => refuse({ every: 7 }), refuses: 'Policy' }
const delaying: Filter = { name: 'delay', make: () => delay({ turn, pages: 20_000 }) }
const failing: Filter = {
  name: 'fail',
  make: () => fail({ every: 5, what: ['write'] }),
  refuses: 'Unavailable',
}
const above: readonly Filter[] = [delaying, ...watching, refusing]
const overMemory: readonly Filter[] = [refusing, ...watching]
const overSlow: readonly Filter[] = [failing, delaying, refusing, ...watching]

/** All sequences of up to `most` different ones. */
function orders<T>(those: readonly T[], most: number): T[][] {
  if (most === 0) return [[]]
  return [
    [],
    ...those.flatMap((one) =>
      orders(
        those.filter((other) => other !== one),
        most - 1,
      ).map((rest) => [one, ...rest]),
    ),
  ]
}

/** All sequences of up to `most`, with repetition. */
function sequences<T>(those: readonly T[], most: number): T[][] {
  if (most === 0) return [[]]
  return [[], ...those.flatMap((one) => sequences(those, most - 1).map((rest) => [one, ...rest]))]
}

const mostPlaces = 4
const inMemory = kinds.filter(({ waits }) => !waits)
const slow = kinds.filter(({ waits }) => waits)
const together = (upper: readonly Kind[][], lower: readonly Kind[][]): Kind[][] =>
  upper
    .flatMap((first) => lower.map((last) => [...first, ...last]))
    .filter(({ length }) => length > 0 && length <= mostPlaces)
const different = together(orders(inMemory, mostPlaces), orders(slow, mostPlaces))
const repeated = together(sequences(inMemory, mostPlaces), sequences(slow, mostPlaces)).filter(
  (places) => new Set(places).size < places.length,
)

/** A stack of these places, with these filters above each of them, if any. */
function subjectOf(places: readonly Kind[], filters: readonly (Filter | undefined)[], runs: number): Subject {
  const parts = places.flatMap((place, i) => (filters[i] === undefined ? [place] : [filters[i], place]))
  const refusals: Partial<Record<'NoMemory' | 'Policy' | 'Unavailable' | 'Quota', Refusal>> = {
    NoMemory: { by: 'filling', bytes: 40 * MiB },
  }
  for (const reason of reasonsOf(places, filters)) refusals[reason] = { by: 'filling', bytes: 40 * MiB }
  // What memory refuses for want of quota, a place below that waits takes.
  if (!places.at(-1)!.waits) refusals.Quota = { by: 'quota', bytes: MiB }
  const manifest: Manifest = {
    steady: !filters.some((filter) => filter?.refuses !== undefined),
    pageSizes: [filters.length === 0 ? 4096 : 8192],
    refusals,
    property: { runs },
  }
  return stack(parts.map(({ name }) => name).join(' > '), () => parts.map(({ make }) => make()), manifest)
}

/**
 * For which reasons a put is refused because of filters: the one on top, and the one around the place that is asked
 * last.
 */
function reasonsOf(places: readonly Kind[], filters: readonly (Filter | undefined)[]): ('Policy' | 'Unavailable')[] {
  const [top] = filters
  const last = filters[places.length - 1]
  const reasons = top?.refuses === undefined ? [] : [top.refuses]
  // A place that waits refuses without a reason, and may be full before a second one fails.
  const isReached = last === refusing ? !places.at(-1)!.waits : places.filter(({ waits }) => waits).length === 1
  if (places.length > 1 && last?.refuses !== undefined && isReached) reasons.push(last.refuses)
  return reasons
}

/** Filters for a stack, others for each. */
const filtersFor = (places: readonly Kind[], number: number): Filter[] =>
  places.map(({ waits }, i) => {
    const those = i === 0 ? above : waits ? overSlow : overMemory
    return those[(number + i) % those.length]!
  })

for (const [number, places] of different.entries()) {
  await conformance(subjectOf(places, [], 6), { describe, it })
  await conformance(subjectOf(places, filtersFor(places, number), 6), { describe, it })
}

describe('stacks with several places of one kind answer any history as the reference store could have:', () => {
  for (const [number, places] of repeated.entries()) {
    const subject = subjectOf(places, number % 2 === 0 ? [] : filtersFor(places, number), 2)
    it(`${subject.name}`, async () => {
      const history = (await conformanceCases(subject)).find(({ name }) => name === propertyName)
      await expect(history!.run()).resolves.toBeUndefined()
    })
  }
})

test('these are all of them', () => {
  expect(different.length).toBe(24)
  expect(different.length + repeated.length).toBe(128)
})
