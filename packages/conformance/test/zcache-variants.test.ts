/**
 * The suite on zcache with each finder of places, each codec, the rules of 2011, recompression, and a file for cold
 * pages.
 */
import { availableCodecs } from '@tmem/codecs'
import { type ZcacheOptions, zcache } from '@tmem/zcache'
import { xvmalloc, zbud } from '@tmem/zcache/history'
import { afterAll, describe, it } from 'vitest'
import { conformance, type Refusal } from '../src/index.ts'
import { layers, MiB, small, stack, swapFolder } from './subjects.ts'

const folder = swapFolder()
afterAll(() => folder.remove())

interface Variant {
  readonly name: string
  readonly options: Omit<ZcacheOptions, 'limitBytes'>
  /** Runs of the property test. */
  readonly runs: number
  readonly refusals?: { readonly Incompressible?: Refusal; readonly Policy?: Refusal }
}

const refusesNoise = { Incompressible: { by: 'noise' } } as const
const finders = [
  { name: 'zsmalloc', options: {} },
  { name: 'xvmalloc', options: { allocator: xvmalloc }, refusals: refusesNoise },
  { name: 'zbud', options: { allocator: zbud }, refusals: refusesNoise },
  {
    name: 'zbud of 2011',
    options: { allocator: (arena: Parameters<typeof zbud>[0]) => zbud(arena, 1) },
    refusals: refusesNoise,
  },
]

/**
 * Every finder of places with the usual codec, and every codec that this runtime has with the usual finder: which of
 * both is at work is independent.
 */
const [usual, ...others] = finders
const pairs = [
  ...availableCodecs().map((codec) => ({ ...usual!, codec })),
  ...others.map((finder) => ({ ...finder, codec: 'lz4' as const })),
].map(
  ({ name, options, codec, ...rest }): Variant => ({
    name: `${name} and ${codec}`,
    options: { ...options, codec },
    runs: 12,
    ...rest,
  }),
)
const variants: readonly Variant[] = [
  ...pairs,
  {
    name: 'the rules of 2011',
    options: { zvMaxZsize: 3584, zvMaxMeanZsize: 2560, zvPageCountPolicyPercent: 70 },
    runs: 30,
    refusals: { ...refusesNoise, Policy: { by: 'filling', bytes: 8 * MiB } },
  },
  { name: 'what does not shrink refused', options: { incompressible: 'refuse' }, runs: 30, refusals: refusesNoise },
  { name: 'recompression', options: { recompress: 'deflate' }, runs: 30 },
]
for (const { name, options, runs, refusals } of variants)
  await conformance(
    stack(`zcache with ${name}`, () => [zcache({ limitBytes: 8 * MiB, ...options })], {
      pageSizes: small,
      refusals: { ...refusals, Quota: { by: 'quota', bytes: MiB } },
      property: { runs },
    }),
    { describe, it },
  )

for (const [name, allocator] of [
  ['zsmalloc', undefined],
  ['zbud', zbud],
] as const) {
  const little = (): ZcacheOptions => ({ limitBytes: 400_000, ...(allocator === undefined ? {} : { allocator }) })
  await conformance(
    stack(`zcache with ${name} and little room, over memory`, () => [zcache(little()), layers.memory()], {
      pageSizes: small,
      refusals: { Quota: { by: 'quota', bytes: MiB } },
      property: { runs: 30 },
    }),
    { describe, it },
  )
  await conformance(
    stack(
      `zcache with ${name} and little room, over a file`,
      () => [zcache(little()), layers.frontswap(folder.file())],
      {
        steady: false,
        pageSizes: small,
        property: { runs: 30 },
      },
    ),
    { describe, it },
  )
}
