import type { LayerContext } from '@tmem/core'
import { describe, expect, test } from 'vitest'
import { conformanceCases, type Manifest } from '../src/index.ts'
import { ReferenceStore } from '../src/reference.ts'
import { type Mutant, mutants, referenceLimit, referenceManifest, soundManifests } from './mutants.ts'

const history = 'any history is answered as the reference store could have'

/** Names of the cases that fail; the property test takes longest, and is run only where it is asked for. */
async function failures(open: Mutant['open'], manifest: Manifest, withHistory: boolean): Promise<string[]> {
  const failed = new Set<string>()
  for (const one of await conformanceCases({ name: 'mutant', open, manifest }))
    if (withHistory || one.name !== history) await one.run().catch(() => failed.add(one.name))
  return [...failed]
}

const sound = (context: LayerContext): ReferenceStore => new ReferenceStore(context, referenceLimit)

describe('a store with one rule broken fails exactly there:', () => {
  test.each(mutants)('$wrong', async ({ open, manifest = referenceManifest, fails, history: found }) => {
    // More histories than usual, so that finding it is not a matter of luck.
    const failed = await failures(open, { ...manifest, property: { runs: 1000 } }, found)
    expect(failed.toSorted()).toEqual([...fails, ...(found ? [history] : [])].toSorted())
  })
})

test('there is a broken store for every case of the suite, and the sound one passes them all', async () => {
  const caught = new Set([history, ...mutants.flatMap(({ fails }) => fails)])
  for (const manifest of soundManifests) {
    expect(await failures(sound, manifest, true)).toEqual([])
    const cases = await conformanceCases({ name: 'sound', open: sound, manifest })
    expect(cases.map(({ name }) => name).filter((name) => !caught.has(name))).toEqual([])
  }
})
