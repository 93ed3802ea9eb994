import { afterAll, describe, it } from 'vitest'
import { conformance } from '../src/index.ts'
import { layers, MiB, small, stack, swapFolder } from './subjects.ts'

const folder = swapFolder()
afterAll(() => folder.remove())

await conformance(
  stack('zcache over frontswap', () => [layers.zcache(MiB), layers.frontswap(folder.file())], {
    pageSizes: small,
    refusals: { NoMemory: { by: 'filling', bytes: 60 * MiB } },
    property: { runs: 40 },
  }),
  { describe, it },
)
await conformance(
  stack(
    'zcache over memory over frontswap',
    () => [layers.zcache(300_000), layers.memory(200_000), layers.frontswap(folder.file())],
    {
      steady: false,
      pageSizes: small,
      refusals: { NoMemory: { by: 'filling', bytes: 60 * MiB } },
      property: { runs: 40 },
    },
  ),
  { describe, it },
)
