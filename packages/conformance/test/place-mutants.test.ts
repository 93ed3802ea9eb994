import type { LayerContext, Place } from '@tmem/core'
import { describe, expect, test } from 'vitest'
import { type PlaceManifest, placeCases } from '../src/index.ts'
import { placePropertyName } from '../src/place-rules.ts'
import {
  Lasting,
  lastingManifest,
  Memory,
  memoryManifest,
  openLasting,
  placeMutants,
  Slow,
  slowManifest,
} from './place-mutants.ts'

/** Names of the cases that fail; the property test takes longest, and is run only where it is asked for. */
async function failures(
  open: (context: LayerContext) => Place,
  manifest: PlaceManifest,
  withHistory: boolean,
): Promise<string[]> {
  const failed = new Set<string>()
  for (const one of await placeCases({ name: 'mutant', open, manifest }))
    if (withHistory || one.name !== placePropertyName) await one.run().catch(() => failed.add(one.name))
  return [...failed]
}

describe('a place with one rule broken fails exactly there:', () => {
  test.each(placeMutants)('$wrong', async ({ open, manifest, fails, history }) => {
    const failed = await failures(open, { ...manifest, property: { runs: 100 } }, history)
    expect(failed.toSorted()).toEqual([...fails, ...(history ? [placePropertyName] : [])].toSorted())
  })
})

test('there is a broken place for every case of the suite, and the sound ones pass them all', async () => {
  const caught = new Set([placePropertyName, ...placeMutants.flatMap(({ fails }) => fails)])
  const sound = [
    { open: (context: LayerContext) => new Memory(context), manifest: memoryManifest },
    { open: (context: LayerContext) => new Slow(context), manifest: slowManifest },
    { open: openLasting, manifest: lastingManifest },
  ]
  for (const { open, manifest } of sound) {
    expect(await failures(open, manifest, true)).toEqual([])
    const cases = await placeCases({ name: 'sound', open, manifest })
    expect(cases.map(({ name }) => name).filter((name) => !caught.has(name))).toEqual([])
  }
  expect(Lasting).toBeDefined()
})
