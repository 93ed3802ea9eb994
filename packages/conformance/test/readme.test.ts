/** The examples of the README are run as they stand there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import * as core from '@tmem/core'
import * as memory from '@tmem/memory'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'

const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
const [suite = '', allocations = ''] = [...readme.matchAll(/```ts\n(.*?)```/gs)].map(([, code]) =>
  code!.replace(/^import .*\n/gm, ''),
)

test('the suite of the README runs, with any runner that has describe and it', async () => {
  const cases: (() => Promise<void>)[] = []
  const titles: string[] = []
  const runner = {
    describe: (title: string, body: () => void): void => {
      titles.push(title)
      body()
    },
    it: (_title: string, body: () => Promise<void>): number => cases.push(body),
  }
  const register = runInThisContext(
    `async (modules, { describe, it }) => { const { compose, memory, conformance } = modules; ${suite} }`,
  )
  await register({ ...core, ...memory, ...own }, runner)
  expect(titles).toEqual(['my stack conforms', 'store', 'refusals', 'pages of 4 KiB', 'pages of 64 KiB', 'history'])
  expect(cases.length).toBeGreaterThan(100)
  const failures: unknown[] = []
  for (const run of cases) await run().catch((error: unknown) => failures.push(error))
  expect(failures.map(String)).toEqual([])
})

test('the allocations of the README fail', async () => {
  const lines: string[] = []
  const run = runInThisContext(
    `async (modules, console) => { const { compose, memory, everyAllocation } = modules; ${allocations} }`,
  )
  await run({ ...core, ...memory, ...own }, { log: (line: string) => lines.push(line) })
  expect(lines).toEqual([expect.stringMatching(/^\d+ sites, \d+ runs, \d+ did not open, [1-9]\d* fell back$/)])
})

test('the place of the README passes the rules for places, in at most 60 lines, and may be a layer', async () => {
  const [place = '', use = ''] = [...readme.matchAll(/```js\n(.*?)```/gs)].map(([, code]) => code!)
  expect(place.split('\n').length - 1).toBeLessThanOrEqual(60)
  const cases: (() => Promise<void>)[] = []
  const runner = {
    describe: (_title: string, body: () => void): void => body(),
    it: (_title: string, body: () => Promise<void>): number => cases.push(body),
  }
  const code = `${place}${use}`.replace(/^import .*\n/gm, '')
  const run = runInThisContext(`async (modules, { describe, it }) => {
    const { compose, PutOutcome, placeConformance } = modules
    ${code}
    return store
  }`)
  const store: core.PageStore = await run({ ...core, ...own }, runner)
  for (const one of cases) await one()
  expect(cases.length).toBeGreaterThan(12)
  await own.regularWay(store)
  store.check!()
  await store.close()
})
