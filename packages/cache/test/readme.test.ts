/** The first example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import { expect, test } from 'vitest'
import * as cache from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?)```/
    .exec(readme)![1]!
    .replace(/^import .*\n/gm, '')
    .replace(/<\{.*?\}>/, '')
  const lines: string[] = []
  const run = runInThisContext(`async (modules, console) => { const { Cache } = modules; ${code} }`)
  await run(cache, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
  expect(lines).toEqual(['Ada'])
})
