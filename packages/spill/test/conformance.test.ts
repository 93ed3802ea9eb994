import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { conformance, everyAllocation } from '@tmem/conformance'
import { compose, memory } from '@tmem/core'
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

it('every allocation, failed once', async () => {
  const report = await everyAllocation((context) =>
    compose([spill({ file: file(), sizeBytes: MiB })], { ...context, check: 'model' }),
  )
  expect([...report.sites.keys()]).toEqual(expect.arrayContaining(['spill.entries', 'spill.scratch']))
  expect(report.notOpened).toBeGreaterThanOrEqual(7)
})
