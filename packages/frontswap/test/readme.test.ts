/** The example of the README is run as it stands there, but for the path. */
import { existsSync, readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import * as core from '@tmem/core'
import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'
import { testFolder } from './device.ts'

const folder = testFolder()

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const file = folder.file()
  const code = /```ts\n([\s\S]*?)```/
    .exec(readme)![1]!
    .replace(/^import .*\n/gm, '')
    .replace('./swap.img', file)
  const lines: string[] = []
  const run = runInThisContext(
    `async (modules, console) => { const { compose, GetOutcome, PutOutcome, frontswap } = modules; ${code} }`,
  )
  await run({ ...core, ...own }, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
  expect(lines).toEqual(['transcendent memory'])
  expect(existsSync(file)).toBe(false)
})

test('the core is used as the README says', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = [...readme.matchAll(/```ts\n([\s\S]*?)```/g)][1]![1]!.replace(/^import .*\n/gm, '')
  const store = core.compose([memory({ limitBytes: 2 ** 20 })])
  const pulled: number[] = []
  const run = runInThisContext(
    `async (modules, file, sizeBytes, allocator, store, page, markDirty, unuse) => {
      const { Frontswap, GetOutcome, PutOutcome, SwapArea, swapOffset } = modules; ${code}
      return { swap, area, entry } }`,
  )
  const page = new Uint8Array(4096).fill(7)
  const result: { swap: own.Frontswap; area: own.SwapArea; entry: number } = await run(
    { ...core, ...own },
    folder.file(),
    64 * 4096,
    core.systemAllocator,
    store,
    page,
    (entry: number) => pulled.push(entry),
    { frame: () => new Uint8Array(4096), done: () => pulled.push(0) },
  )
  const { swap, area, entry } = result
  expect([own.swapType(entry), own.swapOffset(entry), swap.currPages, area.usedSlots]).toEqual([0, 1, 0, 0])
  expect(swap.counters).toEqual({ loads: 1, succ_stores: 1, failed_stores: 0, invalidates: 1 })
  expect(page).toEqual(new Uint8Array(4096).fill(7))
  expect(pulled).toEqual([])
  await area.close()
  await store.close()
})
