import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import { expect, test } from 'vitest'
import * as core from '../src/index.ts'

test('the store in ten lines has ten lines, and each of its claims is true', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```js\n([\s\S]*?)```/.exec(readme)?.[1] ?? ''
  const lines = code.split('\n').filter((line) => line !== '')
  expect(lines.length).toBeLessThanOrEqual(10)
  const imported = /import \{(.*)\} from '@tmem\/core'/.exec(lines[0])?.[1] ?? ''
  const printed: unknown[] = []
  const run = runInThisContext(`async (core, console) => { const {${imported}} = core\n${lines.slice(1).join('\n')} }`)
  await run(core, { log: (value: unknown) => printed.push(value) })
  expect(printed).toEqual([true, true, true])
})
