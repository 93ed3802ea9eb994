import { compose } from '@tmem/core'
import { describe, it } from 'vitest'
import { conformance, reference } from '../src/index.ts'
import { ReferenceStore } from '../src/reference.ts'

await conformance(
  {
    name: 'the reference store',
    open: (context) => new ReferenceStore(context),
    manifest: {
      refusals: { Quota: { by: 'quota', bytes: 65536 }, AllocationFailed: { by: 'allocator', bytes: 65536 } },
    },
  },
  { describe, it },
)
await conformance(
  {
    name: 'compose([reference])',
    open: (context) => compose([reference({ limitBytes: 64 * 2 ** 20 })], { ...context, check: 'model' }),
    manifest: {
      refusals: {
        Quota: { by: 'quota', bytes: 65536 },
        AllocationFailed: { by: 'allocator', bytes: 65536 },
        NoMemory: { by: 'filling', bytes: 65 * 2 ** 20 },
      },
    },
  },
  { describe, it },
)
