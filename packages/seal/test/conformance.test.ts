import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { conformance, everyAllocation, makePage, placeConformance, regularWay } from '@tmem/conformance'
import { compose, type Layer, type LayerContext, type Place, PutOutcome } from '@tmem/core'
import { fail, slowMemory } from '@tmem/faults'
import { frontswap } from '@tmem/frontswap'
import { processMemory, ramster } from '@tmem/ramster'
import { zcache } from '@tmem/zcache'
import { afterAll, describe, expect, it } from 'vitest'
import { seal } from '../src/index.ts'

const MiB = 2 ** 20
const folder = mkdtempSync(join(tmpdir(), 'seal-conformance-'))
afterAll(() => rmSync(folder, { recursive: true }))
let files = 0
const swapFile = (): Layer => frontswap({ file: join(folder, `swap${files++}`), sizeBytes: 2 * MiB })
const machines = (count: number): Layer =>
  ramster({
    machines: Array.from({ length: count }, (_, n) => processMemory({ name: `machine ${n}`, limitBytes: 16 * MiB })),
    sizeBytes: 2 * MiB,
  })
const sealed =
  (layer: () => Layer) =>
  (context: LayerContext): Place => {
    const place = layer().place!.open(context)
    try {
      return seal().wrapPlace!(place, context)
    } catch (error) {
      void place.close()
      throw error
    }
  }

for (const [name, layer] of [
  ['a swap file', swapFile],
  ['two machines', () => machines(2)],
  [
    'slow memory with small flights that moves frames',
    () => slowMemory({ sizeBytes: 2 * MiB, unitBytes: 64, flightBytes: 8192, ephemeral: true, moves: 8 }),
  ],
] as const)
  await placeConformance(
    { name: `seal over ${name}`, open: sealed(layer), manifest: { filledBy: 3 * MiB, property: { runs: 20 } } },
    { describe, it },
  )

const stack = (layers: () => readonly Layer[]) => (context: LayerContext) =>
  compose(layers(), { ...context, check: 'model' })
const pageSizes = [4096, 65_536]

await conformance(
  {
    name: 'a zcache with little room over sealed machines over a sealed swap file',
    open: stack(() => [zcache({ limitBytes: 400_000 }), seal(), machines(2), seal(), swapFile()]),
    manifest: { steady: false, pageSizes, property: { runs: 15 } },
  },
  { describe, it },
)

await conformance(
  {
    name: 'a zcache over a sealed swap file that fails now and then',
    open: stack(() => [zcache({ limitBytes: 400_000 }), seal(), fail({ every: 7, what: ['write'] }), swapFile()]),
    manifest: { steady: false, pageSizes, property: { runs: 10 } },
  },
  { describe, it },
)

it('every allocation, failed once, with pages that are sealed', async () => {
  const report = await everyAllocation(
    stack(() => [zcache({ limitBytes: 256 * 1024 }), seal(), swapFile()]),
    async (store) => {
      const result = await regularWay(store)
      const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
      if (typeof pool === 'number') return result
      let stored = 0
      for (let index = 0; index < 200; index++)
        if (pool.put(9, index, makePage('text', index, 4096)) === PutOutcome.Stored) stored++
      return { stored: result.stored + stored, regular: result.regular + 200 - stored }
    },
  )
  expect([...report.sites.keys()]).toEqual(expect.arrayContaining(['seal.table', 'seal.flight']))
})
