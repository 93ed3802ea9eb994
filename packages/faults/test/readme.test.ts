/** The example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import * as core from '@tmem/core'
import * as memory from '@tmem/memory'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'

test('the example of the README prints what the README says', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const [, code = '', output] = /```ts\n(.*?)```\n\n```text\n(.*?)```/s.exec(readme) ?? []
  const printed: string[] = []
  const run = runInThisContext(
    `async (modules, console) => {
      const { compose, memory, PutOutcome, count, refuse, TraceLog, trace } = modules; ${code.replace(/^import .*\n/gm, '')} }`,
  )
  await run({ ...core, ...memory, ...own }, { log: (...words: unknown[]) => printed.push(words.join(' ')) })
  expect(`${printed.join('\n')}\n`).toBe(output)
})

test('the README names every layer and its options', () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const factories = [own.refuseFactory, own.corruptFactory, own.countFactory, own.discardFactory]
  factories.push(
    own.delayFactory(() => Promise.resolve()),
    own.traceFactory(new own.TraceLog()),
  )
  for (const { name, options } of factories) {
    const row = readme.split('\n').find((line) => line.startsWith(`| \`${name}(`))
    for (const option of Object.keys(options)) expect(row).toContain(option)
  }
})
