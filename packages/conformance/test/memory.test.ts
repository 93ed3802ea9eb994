import { describe, it } from 'vitest'
import { conformance } from '../src/index.ts'
import { layers, MiB, plainStack, stack } from './subjects.ts'

await conformance(
  plainStack('memory', () => [layers.memory()], {
    refusals: {
      NoMemory: { by: 'filling', bytes: 65 * MiB },
      Quota: { by: 'quota', bytes: 1 * MiB },
      AllocationFailed: { by: 'allocator', bytes: 65 * MiB },
    },
  }),
  { describe, it },
)
await conformance(
  stack('memory with room for 20 pages', () => [layers.memory(200_000)], {
    steady: false,
    refusals: {
      NoMemory: { by: 'filling', bytes: 1 * MiB },
      Quota: { by: 'quota', bytes: 1 * MiB },
    },
  }),
  { describe, it },
)
await conformance(
  stack('memory over memory', () => [layers.memory(200_000), layers.memory(32 * MiB)], {
    pageSizes: [4096, 8192, 65536],
    refusals: {
      NoMemory: { by: 'filling', bytes: 40 * MiB },
      Quota: { by: 'quota', bytes: 1 * MiB },
      AllocationFailed: { by: 'allocator', bytes: 40 * MiB },
    },
  }),
  { describe, it },
)
