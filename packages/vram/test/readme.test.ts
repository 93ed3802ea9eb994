/** The example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import { compose, GetOutcome, PutOutcome } from '@tmem/core'
import { zcache } from '@tmem/zcache'
import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { videoDevices, vram } from '../src/index.ts'
import { pocl } from './device.ts'

test('the example of the README works', async (ctx) => {
  requires(ctx, pocl)
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
  const lines: string[] = []
  const modules = { compose, GetOutcome, PutOutcome, videoDevices, vram, zcache }
  const run = runInThisContext(
    `async (modules, console) => { const { ${Object.keys(modules).join(', ')} } = modules; ${code} }`,
  )
  await run(modules, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
  expect(lines).toEqual(['true', 'true on the card'])
})
