/** The example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import * as core from '@tmem/core'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'

test('each claim of the README’s example is true', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```js\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
  const printed: unknown[] = []
  const run = runInThisContext(
    `async (modules, console) => { const { GetOutcome, PutOutcome, SharedMemoryStore } = modules; ${code} }`,
  )
  await run({ ...core, ...own }, { log: (value: unknown) => printed.push(value) })
  expect(printed).toEqual([true, true])
})
