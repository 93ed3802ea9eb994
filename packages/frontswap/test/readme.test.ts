/** The example of the README is run as it stands there, but for the path. */
import { existsSync, readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import * as core from '@tmem/core'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'
import { testFolder } from './device.ts'

const folder = testFolder()

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const file = folder.file()
  const code = /```ts\n([\s\S]*?)```/
    .exec(readme)![1]!
    .replace(/^import .*\n/gm, '')
    .replace('./swap.img', file)
  const lines: string[] = []
  const run = runInThisContext(
    `async (modules, console) => { const { compose, GetOutcome, PutOutcome, frontswap } = modules; ${code} }`,
  )
  await run({ ...core, ...own }, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
  expect(lines).toEqual([expect.stringMatching(/^transcendent memory - direct I\/O: (true|false)$/)])
  expect(existsSync(file)).toBe(false)
})
