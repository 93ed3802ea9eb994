/** The example of the README is run as it stands there, but for one type. */
import { readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { runInThisContext } from 'node:vm'
import { compose } from '@tmem/core'
import { zcache } from '@tmem/zcache'
import { expect, test } from 'vitest'
import { FsCache, HttpFiles } from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?)```/
    .exec(readme)![1]!
    .replace(/^import .*\n/gm, '')
    .replace(' as { port: number }', '')
  const lines: string[] = []
  const names = 'createServer, compose, FsCache, HttpFiles, zcache'
  const run = runInThisContext(`async (modules, console) => { const { ${names} } = modules; ${code} }`)
  const modules = { createServer, compose, FsCache, HttpFiles, zcache }
  await run(modules, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
  expect(lines).toEqual(['served once', 'served once', 'served once', '1 page fetched, 2 from memory'])
})
