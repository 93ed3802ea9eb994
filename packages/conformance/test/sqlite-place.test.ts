/** The example of a place over SQLite passes the rules for places, and is one of a stack. */
import { readFileSync } from 'node:fs'
import { isBuiltin } from 'node:module'
import { compose, type LayerFactory, PutOutcome, parseStack, type SlowPlace } from '@tmem/core'
import { zcacheFactory } from '@tmem/zcache'
import { expect, test } from 'vitest'
import { placeConformance } from '../src/index.ts'

const example = new URL('../examples/sqlite-place.mjs', import.meta.url)
const reason = isBuiltin('node:sqlite') ? undefined : 'needs a Node with node:sqlite'

test('it has at most 80 lines', () => {
  expect(readFileSync(example, 'utf8').split('\n').length - 1).toBeLessThanOrEqual(80)
})

test('it passes the rules for places', async (ctx) => {
  if (reason !== undefined) ctx.skip(reason)
  const { sqliteFactory } = (await import(example.href)) as { sqliteFactory: LayerFactory }
  const cases: (() => Promise<void>)[] = []
  const runner = {
    describe: (_title: string, body: () => void): void => body(),
    it: (_title: string, body: () => Promise<void>): number => cases.push(body),
  }
  const layer = sqliteFactory.create({ limit: 2 ** 20 })
  const subject = {
    name: 'sqlite',
    open: (context: Parameters<NonNullable<typeof layer.place>['open']>[0]) => layer.place!.open(context) as SlowPlace,
    manifest: { filledBy: 2 ** 21 },
  }
  await placeConformance(subject, runner)
  expect(cases.length).toBeGreaterThan(12)
  for (const one of cases) await one()
})

test('a stack has it below a zcache', async (ctx) => {
  if (reason !== undefined) ctx.skip(reason)
  const { sqliteFactory } = (await import(example.href)) as { sqliteFactory: LayerFactory }
  const factories = [zcacheFactory, sqliteFactory]
  const store = compose(parseStack('zcache(limit=1MiB) > sqlite(limit=8MiB)', factories), { check: 'model' })
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error(`refused: ${pool}`)
  const page = (seed: number): Buffer =>
    Buffer.from(Array.from({ length: 4096 }, (_, at) => (at * at * (seed + 7)) >> 3))
  for (let index = 0; index < 1000; index++) expect(pool.put(1, index, page(index))).toBe(PutOutcome.Stored)
  const into = Buffer.alloc(4096)
  for (let index = 0; index < 1000; index++) {
    pool.get(1, index, into)
    expect(into.equals(page(index))).toBe(true)
  }
  store.check?.()
  await store.close()
})
