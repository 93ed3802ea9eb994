/** The example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import * as core from '@tmem/core'
import * as zcache from '@tmem/zcache'
import { expect, test } from 'vitest'
import * as virtio from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```js\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
  const lines: string[] = []
  const names = 'compose, ChannelCommand, ChannelDevice, ChannelGuest, createChannel, zcache'
  const run = runInThisContext(`async (modules, console) => { const { ${names} } = modules; ${code} }`)
  await run({ ...core, ...zcache, ...virtio }, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
  expect(lines).toEqual(['true 65'])
})
