/** The example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import * as core from '@tmem/core'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
  const lines: string[] = []
  const run = runInThisContext(
    `async (modules, console) => { const { compose, GetOutcome, PutOutcome, zcache } = modules; ${code} }`,
  )
  await run({ ...core, ...own }, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
  expect(lines[0]).toBe('transcendent memory')
  expect(lines[1]).toMatch(/^\d+ bytes hold a page of 4096$/)
  expect(Number.parseInt(lines[1]!, 10)).toBeLessThan(200)
})
