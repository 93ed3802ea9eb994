import type { Layer, LayerContext } from '@tmem/core'
import { PutOutcome, planStack } from '@tmem/core'
import { describe, expect, it, test } from 'vitest'
import { openChains } from '../../tmem-core/src/shards.ts'
import { conformance } from '../src/index.ts'
import { countersOf, layers, MiB, plainStack, small, stack, swapFolder } from './subjects.ts'

// More pages than one directory numbers: here a directory has so few that some stacks need several.
const folder = swapFolder()
process.on('exit', () => folder.remove())

const sharded = (places: () => readonly Layer[], pagesOfOne: number): Layer => {
  const plan = planStack(places())
  return {
    name: 'shards',
    plan: () => plan,
    open: (_next, context: LayerContext) =>
      openChains(
        places().map((layer) => ({ place: layer.place!.open(context), foreign: false })),
        plan,
        context,
        pagesOfOne,
      ),
  }
}

await conformance(
  stack(
    'zcache over a swap file in shards',
    () => [sharded(() => [layers.zcache(MiB), layers.frontswap(folder.file())], 900)],
    {
      pageSizes: small,
      steady: false,
      property: { runs: 20 },
    },
  ),
  { describe, it },
)

test('pages fall to all shards, and are found there', async () => {
  const subject = plainStack('', () => [sharded(() => [layers.zcache(4 * MiB), layers.memory(4 * MiB)], 2000)], {})
  const { systemAllocator, createAccounts } = await import('@tmem/core')
  const store = await subject.open({ allocator: systemAllocator, accounts: createAccounts() })
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  const page = new Uint8Array(4096)
  const fill = (index: number): Uint8Array => {
    new Uint32Array(page.buffer).fill(index)
    page[7] = 1
    return page
  }
  for (let index = 0; index < 3000; index++) expect(pool.put(index % 7, index, fill(index))).toBe(PutOutcome.Stored)
  expect(countersOf(store, 'chain')[0]).toMatchObject({ pages: 3000, stored: 3000, objects: expect.any(Number) })
  const into = new Uint8Array(4096)
  for (let index = 0; index < 3000; index++) {
    expect(pool.get(index % 7, index, into)).toBe(0)
    expect(Buffer.compare(into, fill(index))).toBe(0)
  }
  pool.flushObject(3)
  expect(countersOf(store, 'chain')[0]!['pages']).toBe(3000 - 429)
  await store.close()
})
