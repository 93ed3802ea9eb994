/** The example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import { expect, test } from 'vitest'
import { DeviceModel } from '../src/index.ts'

test('the example of the README prints what it says', () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
  const lines: string[] = []
  const run = runInThisContext(`(DeviceModel, console) => { ${code} }`)
  run(DeviceModel, { log: (line: string) => lines.push(line) })
  expect(`${lines.join('\n')}\n`).toBe(/```text\n([\s\S]*?)```/.exec(readme)![1])
})
