import { describe, it } from 'vitest'
import { conformance } from '../src/index.ts'
import { layers, MiB, plainStack, small, stack } from './subjects.ts'

await conformance(
  plainStack('zcache', () => [layers.zcache()], {
    refusals: {
      NoMemory: { by: 'filling', bytes: 600 * MiB },
      Quota: { by: 'quota', bytes: MiB },
      AllocationFailed: { by: 'allocator', bytes: 64 * MiB },
    },
  }),
  { describe, it },
)
await conformance(
  stack('zcache with room for few pages', () => [layers.zcache(300_000)], {
    steady: false,
    pageSizes: small,
    refusals: {
      NoMemory: { by: 'filling', bytes: 20 * MiB },
      Quota: { by: 'quota', bytes: MiB },
    },
  }),
  { describe, it },
)
await conformance(
  stack('zcache over memory', () => [layers.zcache(), layers.memory()], {
    pageSizes: small,
    refusals: {
      NoMemory: { by: 'filling', bytes: 600 * MiB },
      Quota: { by: 'quota', bytes: MiB },
      AllocationFailed: { by: 'allocator', bytes: 64 * MiB },
    },
  }),
  { describe, it },
)
