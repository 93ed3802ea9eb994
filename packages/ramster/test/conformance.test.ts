import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { conformance, everyAllocation, makePage, placeConformance, regularWay } from '@tmem/conformance'
import { compose, GetOutcome, type Layer, type LayerContext, PutOutcome } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { zcache } from '@tmem/zcache'
import { afterAll, describe, expect, it } from 'vitest'
import { processMemory, ramster } from '../src/index.ts'
import { Machine } from './machines.ts'

const MiB = 2 ** 20
const folder = mkdtempSync(join(tmpdir(), 'ramster-conformance-'))
afterAll(() => rmSync(folder, { recursive: true }))
let files = 0
const file = (): string => join(folder, `swap${files++}`)
const machines = (count: number, limitBytes = 64 * MiB): Machine[] =>
  Array.from({ length: count }, (_, n) => new Machine(`machine ${n}`, limitBytes))
const failing =
  (all: readonly Machine[]) =>
  (what: 'nothing' | 'writes' | 'reads'): void => {
    for (const machine of all) machine.fails = what
  }

const two = machines(2)
await placeConformance(
  {
    name: 'ramster over two machines',
    open: (context) => ramster({ machines: two, sizeBytes: 2 * MiB }).place!.open(context),
    manifest: { filledBy: 3 * MiB, fail: failing(two) },
  },
  { describe, it },
)

const small = machines(3, MiB)
await placeConformance(
  {
    name: 'ramster over three machines that become full',
    open: (context) => ramster({ machines: small, sizeBytes: 16 * MiB }).place!.open(context),
    manifest: { filledBy: 4 * MiB, fail: failing(small) },
  },
  { describe, it },
)

const one = machines(1)
await placeConformance(
  {
    name: 'ramster over one machine',
    open: (context) => ramster({ machines: one, sizeBytes: 2 * MiB }).place!.open(context),
    manifest: { filledBy: 3 * MiB, fail: failing(one) },
  },
  { describe, it },
)

const remote = (count: number, sizeBytes = 16 * MiB): Layer =>
  ramster({
    machines: Array.from({ length: count }, (_, n) => processMemory({ name: `machine ${n}`, limitBytes: 64 * MiB })),
    sizeBytes,
  })
const stack = (layers: () => readonly Layer[]) => (context: LayerContext) =>
  compose(layers(), { ...context, check: 'model' })
const pageSizes = [4096, 65_536]

await conformance(
  {
    name: 'a zcache with little room over two machines over a swap file',
    open: stack(() => [zcache({ limitBytes: 400_000 }), remote(2), frontswap({ file: file(), sizeBytes: 16 * MiB })]),
    manifest: { steady: false, pageSizes, property: { runs: 30 } },
  },
  { describe, it },
)

await conformance(
  {
    name: 'a zcache with little room over one machine',
    open: stack(() => [zcache({ limitBytes: 400_000 }), remote(1)]),
    manifest: { steady: false, pageSizes, refusals: { Quota: { by: 'quota', bytes: 65_536 } }, property: { runs: 30 } },
  },
  { describe, it },
)

it('every allocation, failed once, with pages that go to two machines and come back', async () => {
  let remoted = 0
  const report = await everyAllocation(
    stack(() => [
      zcache({ limitBytes: 256 * 1024 }),
      remote(2, 4 * MiB),
      frontswap({ file: file(), sizeBytes: 8 * MiB }),
    ]),
    async (store) => {
      const result = await regularWay(store)
      const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
      if (typeof pool === 'number') return result
      const kept: number[] = []
      for (let index = 0; index < 600; index++) {
        if (pool.put(9, index, makePage('text', index, 4096)) === PutOutcome.Stored) kept.push(index)
        if (index % 20 !== 19) continue
        const indexes = Uint32Array.from({ length: 20 }, (_, n) => index - 19 + n)
        await pool.sink!(9, indexes, indexes.length, true)
      }
      remoted += store.stats().children.find(({ name }) => name === 'ramster')?.counters['pers_pages_remoted'] ?? 0
      const into = new Uint8Array(4096)
      for (const index of kept) {
        expect(await pool.fetch(9, index, into)).toBe(GetOutcome.Hit)
        expect(Buffer.compare(into, makePage('text', index, 4096))).toBe(0)
      }
      return { stored: result.stored + kept.length, regular: result.regular + 600 - kept.length }
    },
  )
  expect([...report.sites.keys()]).toEqual(expect.arrayContaining(['zcache.chunk', 'ramster.table', 'chain.flight']))
  expect(remoted).toBeGreaterThan(100)
})
