/** The suite on zcache with each finder of places, each codec, recompression, and cold pages in a file. */
import { type ZcacheOptions, zcache } from '@tmem/zcache'
import { afterAll, describe, it } from 'vitest'
import { conformance } from '../src/index.ts'
import { MiB, small, stack, swapFolder } from './subjects.ts'

const folder = swapFolder()
afterAll(() => folder.remove())

const variants: readonly (readonly [string, () => Omit<ZcacheOptions, 'limitBytes'>])[] = [
  ['xvmalloc', () => ({ allocator: 'xvmalloc' })],
  ['zbud', () => ({ allocator: 'zbud', codec: 'lz4js' })],
  ['zcache1', () => ({ allocator: 'zcache1', acceptThresholdPercent: 90 })],
  ['deflate', () => ({ codec: 'deflate' })],
  ['recompression', () => ({ recompress: 'deflate', incompressible: 'keep' })],
  ['a file', () => ({ writeback: { file: folder.file(), sizeBytes: 4 * MiB, startPercent: 1 } })],
]
for (const [name, options] of variants)
  await conformance(
    stack(`zcache with ${name}`, () => [zcache({ limitBytes: 8 * MiB, ...options() })], {
      pageSizes: small,
      refusals: {
        ...(name === 'recompression' ? {} : { Incompressible: { by: 'noise' } }),
        Quota: { by: 'quota', bytes: MiB },
      },
      property: { runs: 30 },
    }),
    { describe, it },
  )
