import { readFileSync } from 'node:fs'
import { inspect } from 'node:util'
import { runInThisContext } from 'node:vm'
import * as mixedmap from '@tmem/vm-mixedmap'
import { expect, test } from 'vitest'
import * as mmu from '../src/index.ts'

const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')

test('the example of the README prints what the README says', () => {
  const [, code = '', output] = /```js\n(.*?)```\n\n```text\n(.*?)```/s.exec(readme) ?? []
  const body = code
    .replace(/import (\{.*?\}) from '@tmem\/vm-mixedmap'/, 'const $1 = mixedmap')
    .replace("import * as mmu from '@tmem/mmu-notifier'", '')
  const printed: string[] = []
  const log = (...values: unknown[]) =>
    printed.push(values.map((value) => (typeof value === 'string' ? value : inspect(value))).join(' '))
  runInThisContext(`(mixedmap, mmu, console) => {${body}}`)(mixedmap, mmu, { log })
  expect(`${printed.join('\n')}\n`).toBe(output)
})

test.each(mmu.WORKLOADS)('the row of the README for %s', (workload) => {
  const [kept, ranges] = [mmu.V13_FIRST_PART, mmu.RANGES_ONLY].map((shape) => mmu.countHooks(shape, workload, 100))
  const cells = [workload, kept?.hooks, ranges?.hooks, kept?.heldOffPages, ranges?.heldOffPages]
  expect(readme).toContain(`| ${cells.join(' | ')} |`)
})

test('the report of the README', () => {
  expect(readme).toContain(mmu.pageMapping.explore('page-lives-until-callback-returns').text)
})

test('the table of bugs', () => {
  const rows = [...readme.matchAll(/^\| .* \| [0-9a-f]{12}, [\d.]+ \| `(.*)` \| (\d+) \| (\d+) \|$/gm)]
  expect(rows.length).toBeGreaterThanOrEqual(10)
  for (const [, name, steps, states] of rows) {
    const { kept, broken, mutantCaught } = mmu.pageMapping.explore(name!)
    const found = broken.kind === 'violated' ? broken.history.length : 0
    expect([name, mutantCaught, found, kept.states]).toEqual([name, true, Number(steps), Number(states)])
  }
})
