import { compose } from '@tmem/core'
import { describe, it } from 'vitest'
import { conformance, reference } from '../src/index.ts'
import { ReferenceStore } from '../src/reference.ts'
import { MiB, small } from './subjects.ts'

await conformance(
  {
    name: 'the reference store',
    open: (context) => new ReferenceStore(context),
    manifest: {
      pageSizes: small,
      refusals: { Quota: { by: 'quota', bytes: 65_536 }, AllocationFailed: { by: 'allocator', bytes: 65_536 } },
    },
  },
  { describe, it },
)

await conformance(
  {
    name: 'compose([reference])',
    open: (context) => compose([reference({ limitBytes: 8 * MiB })], context),
    manifest: {
      pageSizes: small,
      refusals: {
        NoMemory: { by: 'filling', bytes: 9 * MiB },
        Quota: { by: 'quota', bytes: 65_536 },
        AllocationFailed: { by: 'allocator', bytes: 65_536 },
      },
    },
  },
  { describe, it },
)
