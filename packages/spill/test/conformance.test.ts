import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { conformance, everyAllocation, makePage, regularWay } from '@tmem/conformance'
import { compose, GetOutcome, type Layer, type LayerContext, PutOutcome, type StatsNode } from '@tmem/core'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { afterAll, describe, expect, it } from 'vitest'
import { spill } from '../src/index.ts'

const MiB = 2 ** 20
const folder = mkdtempSync(join(tmpdir(), 'spill-conformance-'))
afterAll(() => rmSync(folder, { recursive: true }))
let files = 0
const file = (): string => join(folder, `spill${files++}`)
const pageSizes = [4096, 65_536]
const stack = (layers: () => readonly Layer[]) => (context: LayerContext) =>
  compose(layers(), { ...context, check: 'model' })

await conformance(
  {
    name: 'spill',
    open: stack(() => [spill({ file: file(), sizeBytes: 8 * MiB })]),
    manifest: {
      pageSizes,
      property: { runs: 30 },
      refusals: { Unavailable: 'only a disk that fails brings this about: see spill.test.ts' },
    },
  },
  { describe, it },
)

await conformance(
  {
    name: 'a zcache with little room over a spill',
    open: stack(() => [zcache({ limitBytes: 400_000 }), spill({ file: file(), sizeBytes: 8 * MiB })]),
    manifest: { steady: false, pageSizes, property: { runs: 30 } },
  },
  { describe, it },
)

await conformance(
  {
    name: 'memory over zcache over a spill',
    open: stack(() => [
      memory({ limitBytes: 200_000 }),
      zcache({ limitBytes: 300_000 }),
      spill({ file: file(), sizeBytes: 8 * MiB }),
    ]),
    manifest: { steady: false, pageSizes, refusals: { Quota: { by: 'quota', bytes: 65_536 } }, property: { runs: 30 } },
  },
  { describe, it },
)

it('every allocation, failed once', async () => {
  const report = await everyAllocation(stack(() => [spill({ file: file(), sizeBytes: MiB })]))
  expect([...report.sites.keys()]).toEqual(
    expect.arrayContaining(['spill.tables', 'spill.records', 'pageFile.buffers', 'chain.flight', 'chain.reads']),
  )
  expect(report.notOpened).toBeGreaterThanOrEqual(7)
})

it('every allocation, failed once, of a zcache over a spill that gets what is cold', async () => {
  let sunk = 0
  const report = await everyAllocation(
    stack(() => [zcache({ limitBytes: 256 * 1024 }), spill({ file: file(), sizeBytes: MiB })]),
    async (store) => {
      const result = await regularWay(store)
      const pool = store.newPool({ client: 1, persistent: false, shared: true, pageSize: 4096 })
      if (typeof pool === 'number') return result
      let stored = 0
      for (let index = 0; index < 900; index++)
        if (pool.put(9, index, makePage('text', index, 4096)) === PutOutcome.Stored) stored++
      sunk += counterOf(store.stats(), 'spill', 'written')
      const into = new Uint8Array(4096)
      let found = 0
      for (let index = 0; index < 900; index++) {
        if ((await pool.fetch(9, index, into)) !== GetOutcome.Hit) continue
        found++
        if (Buffer.compare(into, makePage('text', index, 4096)) !== 0) throw new Error(`wrong bytes in page ${index}`)
      }
      if (found > stored) throw new Error(`${found} pages found, ${stored} stored`)
      return { stored: result.stored + stored, regular: result.regular + 900 - stored }
    },
  )
  expect([...report.sites.keys()]).toEqual(expect.arrayContaining(['zcache.chunk', 'spill.tables']))
  expect(sunk).toBeGreaterThan(1000)
})

function counterOf({ name, counters, children }: StatsNode, layer: string, counter: string): number {
  if (name === layer) return counters[counter]!
  return children.reduce((sum, child) => sum + counterOf(child, layer, counter), 0)
}
