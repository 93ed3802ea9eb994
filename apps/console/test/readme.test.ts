/** The example of the README is run as it stands there, with a console of its own. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
  const said: unknown[] = []
  const run = runInThisContext(`async ({ serveConsole }, console) => { ${code} }`)
  await run(own, { log: (...words: unknown[]) => said.push(...words) })
  expect(said).toEqual([true, 0])
})
