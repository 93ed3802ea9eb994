/** A layer of one's own passes everything on and conforms; @tmem/conformance has the compositions of all layers. */
import { conformance } from '@tmem/conformance'
import type { Layer, Pool } from '@tmem/core'
import { compose } from '@tmem/core'
import { memory } from '@tmem/memory'
import { describe, it } from 'vitest'
import { PassingPool, PassingStore, passingPlan } from '../src/index.ts'

class PlainPool extends PassingPool {
  over(next: Pool): Pool {
    return new PlainPool(next)
  }
}

class PlainStore extends PassingStore {
  wrap(pool: Pool): Pool {
    return new PlainPool(pool)
  }

  counters(): Readonly<Record<string, number>> {
    return {}
  }
}

const plain: Layer = {
  name: 'plain',
  plan: (below) => passingPlan(below),
  open: (next) => new PlainStore('plain', next!.capabilities, next!),
}

await conformance(
  {
    name: 'a plain layer over memory',
    open: (context) => compose([plain, memory({ limitBytes: 2 ** 20 })], { ...context, check: 'model' }),
    manifest: {
      pageSizes: [4096, 8192],
      refusals: { NoMemory: { by: 'filling', bytes: 2 ** 21 }, Quota: { by: 'quota', bytes: 65_536 } },
    },
  },
  { describe, it },
)
