import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import * as memory from '@tmem/memory'
import { expect, test } from 'vitest'
import * as core from '../src/index.ts'

test('the store in ten lines has ten lines, and each of its claims is true', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```js\n([\s\S]*?)```/.exec(readme)?.[1] ?? ''
  const lines = code.split('\n').filter((line) => line !== '')
  expect(lines.length).toBeLessThanOrEqual(10)
  const imported = [...code.matchAll(/import \{(.*)\} from '@tmem\/(?:core|memory)'/g)].map(([, names]) => names).join()
  const printed: unknown[] = []
  const run = runInThisContext(
    `async (modules, console) => { const {${imported}} = modules\n${code.replace(/^import .*\n/gm, '')} }`,
  )
  await run({ ...core, ...memory }, { log: (value: unknown) => printed.push(value) })
  expect(printed).toEqual([true, true, true])
})
