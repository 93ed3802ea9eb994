import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { conformance, everyAllocation, makePage, regularWay } from '@tmem/conformance'
import { compose, GetOutcome, PutOutcome } from '@tmem/core'
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

await conformance(
  {
    name: 'spill',
    open: (context) => compose([spill({ file: file(), sizeBytes: 8 * MiB })], { ...context, check: 'model' }),
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
    name: 'memory over a spill',
    open: (context) =>
      compose([memory({ limitBytes: 200_000 }), spill({ file: file(), sizeBytes: 8 * MiB })], {
        ...context,
        check: 'model',
      }),
    manifest: { pageSizes, property: { runs: 20 } },
  },
  { describe, it },
)

await conformance(
  {
    name: 'a zcache with little room over a spill',
    open: (context) =>
      compose([zcache({ limitBytes: 400_000 }), spill({ file: file(), sizeBytes: 8 * MiB })], {
        ...context,
        check: 'model',
      }),
    manifest: { steady: false, pageSizes, property: { runs: 30 } },
  },
  { describe, it },
)

it('every allocation, failed once', async () => {
  const report = await everyAllocation((context) =>
    compose([spill({ file: file(), sizeBytes: MiB })], { ...context, check: 'model' }),
  )
  expect([...report.sites.keys()]).toEqual(expect.arrayContaining(['spill.entries', 'spill.scratch']))
  expect(report.notOpened).toBeGreaterThanOrEqual(7)
})

it('every allocation, failed once, of a zcache over a spill that gets what it evicts', async () => {
  let passedOn = 0
  const report = await everyAllocation(
    (context) =>
      compose([zcache({ limitBytes: 256 * 1024 }), spill({ file: file(), sizeBytes: MiB })], {
        ...context,
        check: 'model',
      }),
    async (store) => {
      const result = await regularWay(store)
      const pool = store.newPool({ client: 1, persistent: false, shared: true, pageSize: 4096 })
      if (typeof pool === 'number') return result
      let stored = 0
      for (let index = 0; index < 900; index++)
        if (pool.put(9, index, makePage('text', index, 4096)) === PutOutcome.Stored) stored++
      passedOn += store.stats().counters['evicted_eph_passed_on']!
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
  expect([...report.sites.keys()]).toEqual(expect.arrayContaining(['zcache.chunk', 'zcache.page', 'spill.entries']))
  expect(passedOn).toBeGreaterThan(1000)
})
