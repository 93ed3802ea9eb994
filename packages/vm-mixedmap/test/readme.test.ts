import { readFileSync } from 'node:fs'
import { inspect } from 'node:util'
import { runInThisContext } from 'node:vm'
import { expect, test } from 'vitest'
import * as library from '../src/index.ts'

const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')

test('the example of the README prints what the README says', () => {
  const [, code = '', output] = /```js\n(.*?)```\n\n```text\n(.*?)```/s.exec(readme) ?? []
  const body = code.replace("import * as vm from '@tmem/vm-mixedmap'", 'const vm = library')
  const printed: string[] = []
  const log = (value: unknown) => printed.push(typeof value === 'string' ? value : inspect(value))
  runInThisContext(`(library, console) => {${body}}`)(library, { log })
  expect(`${printed.join('\n')}\n`).toBe(output)
})

test.each([1, 74, 100])('the row of the README for %i guests', (guests) => {
  const { descriptors, bytes, ofImage } = library.structPageSaving({ guests, imageBytes: 2 ** 30 })
  const cells = [
    `${guests}`,
    descriptors.toLocaleString('en'),
    `${(bytes / 2 ** 20).toLocaleString('en')} MiB`,
    `${(100 * ofImage).toFixed(1)} %`,
  ]
  expect(readme).toContain(`| ${cells.join(' | ')} |`)
})
