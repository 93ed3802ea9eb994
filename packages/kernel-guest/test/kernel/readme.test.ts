/** The example of the README works as it stands. */
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { runInThisContext } from 'node:vm'
import * as core from '@tmem/core'
import * as xen from '@tmem/xen-hypercall'
import { zcache } from '@tmem/zcache'
import { expect, test } from 'vitest'
import * as own from '../../src/index.ts'

const cache = fileURLToPath(new URL('../../../../.cache/kernel-guest', import.meta.url))

test('the example of the README works', { timeout: 600_000 }, async (ctx) => {
  const lacks = own.lacksForGuests()
  if (lacks !== undefined) ctx.skip(`needs what a guest needs: ${lacks}`)
  const readme = readFileSync(new URL('../../README.md', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?)```/
    .exec(readme)![1]!
    .replace(/^import .*\n/gm, '')
    .replace("'./guest-parts'", JSON.stringify(cache))
  const lines: string[] = []
  const names = 'compose, attachGuest, bootGuest, prepareParts, XenHost, zcache'
  const example = runInThisContext(`async (modules, console) => { const { ${names} } = modules; ${code} }`)
  const modules = { ...core, ...own, ...xen, zcache }
  await example(modules, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
  expect(lines).toEqual(['0 0 true'])
})
