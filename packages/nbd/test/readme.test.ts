/** The example of the README is run as it stands there, but for the path. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { runInThisContext } from 'node:vm'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'
import { Client, later, testFolder } from './client.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const path = join(testFolder(), 'nbd.sock')
  const code = /```js\n([\s\S]*?)```/
    .exec(readme)![1]!
    .replace(/^import .*\n/gm, '')
    .replace('/tmp/tmem.sock', path)
  const lines: string[] = []
  const signals: (() => Promise<void>)[] = []
  const run = runInThisContext(
    `async (modules, console, process) => { const { memoryDevice, nbdServer } = modules; ${code} }`,
  )
  await run(
    own,
    { log: (...words: unknown[]) => lines.push(words.join(' ')), error: () => {} },
    { once: (_: string, action: () => Promise<void>) => signals.push(action) },
  )
  later(() => signals[0]!())
  expect(lines).toEqual([`nbd+unix:///scratch?socket=${path}`])
  const client = await Client.ready({ path }, { name: 'scratch' })
  expect((await client.write(4096, Buffer.from('hello'))).error).toBe(0)
  expect((await client.read(4096, 5)).data.toString()).toBe('hello')
  await signals[0]!()
  await client.closed
})
