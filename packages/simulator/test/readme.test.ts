/** The example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'

test('the example of the README prints what the README says', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const [, code = '', output] = /```ts\n(.*?)```\n\n```text\n(.*?)```/s.exec(readme) ?? []
  const printed: string[] = []
  const run = runInThisContext(`async ({ simulate }, console) => { ${code.replace(/^import .*\n/gm, '')} }`)
  await run(own, { log: (...words: unknown[]) => printed.push(words.join(' ')) })
  expect(`${printed.join('\n')}\n`).toBe(output)
})
