import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import { expect, test } from 'vitest'
import * as library from '../src/index.ts'

test('the example of the README prints what the README says', () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const [, code = '', output] = /```js\n(.*?)```\n\n```text\n(.*?)```/s.exec(readme) ?? []
  const body = code.replace(/import (\{.*?\}) from '@tmem\/interleave'/, 'const $1 = library')
  const printed: string[] = []
  runInThisContext(`(library, console) => {${body}}`)(library, { log: (text: string) => printed.push(text) })
  expect(`${printed.join('\n')}\n`).toBe(output)
})
