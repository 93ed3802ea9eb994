/** The suite on zcache with each finder of places, each codec, recompression, and cold pages in a file. */
import { availableCodecs } from '@tmem/codecs'
import { type ZcacheOptions, zcache } from '@tmem/zcache'
import { afterAll, describe, it } from 'vitest'
import { conformance } from '../src/index.ts'
import { layers, MiB, small, stack, swapFolder } from './subjects.ts'

const folder = swapFolder()
afterAll(() => folder.remove())

type Variant = readonly [name: string, runs: number, options: () => Omit<ZcacheOptions, 'limitBytes'>]

/** Every finder of places with every codec that this runtime has; which of both is at work is independent, so few histories do. */
const pairs = (['zsmalloc', 'xvmalloc', 'zbud', 'zcache1'] as const).flatMap((allocator) =>
  availableCodecs().map((codec): Variant => [`${allocator} and ${codec}`, 8, () => ({ allocator, codec })]),
)
const variants: readonly Variant[] = [
  ...pairs,
  ['hysteresis', 30, () => ({ allocator: 'zcache1', acceptThresholdPercent: 90 })],
  ['recompression', 30, () => ({ recompress: 'deflate', incompressible: 'keep' })],
  ['a file', 30, () => ({ writeback: { file: folder.file(), sizeBytes: 4 * MiB, startPercent: 1 } })],
]
for (const [name, runs, options] of variants)
  await conformance(
    stack(`zcache with ${name}`, () => [zcache({ limitBytes: 8 * MiB, ...options() })], {
      pageSizes: small,
      refusals: {
        ...(name === 'recompression' ? {} : { Incompressible: { by: 'noise' } }),
        Quota: { by: 'quota', bytes: MiB },
      },
      property: { runs },
    }),
    { describe, it },
  )

for (const allocator of ['zsmalloc', 'zcache1'] as const)
  await conformance(
    stack(
      `zcache with ${allocator} and little room, over memory that gets what it evicts`,
      () => [zcache({ limitBytes: 400_000, allocator }), layers.memory()],
      // A page of a batch that is passed down before the batch is: it is lost, as an ephemeral one may be.
      { steady: false, pageSizes: small, refusals: { Quota: { by: 'quota', bytes: MiB } }, property: { runs: 30 } },
    ),
    { describe, it },
  )
