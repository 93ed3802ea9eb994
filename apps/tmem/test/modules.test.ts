/** `--modules`: layers of other modules in the text of a stack. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { tmem } from './tmem.ts'

let folder = ''
const file = (name: string): string => join(folder, name)

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'tmem-modules-'))
  const plan =
    '{ persistent: true, ephemeral: true, shared: true, minPageSize: 4096, maxPageSize: 4096, deferred: false, split: false, reservedBytes: 0 }'
  const factory = (name: string): string =>
    `{ name: '${name}', summary: 'takes nothing', options: { n: { kind: 'integer', summary: 'a number' } },
      create: () => ({ name: '${name}', plan: () => (${plan}), open: () => { throw new Error('not here') } }) }`
  writeFileSync(file('own.mjs'), `export const own = ${factory('own')}\nexport const other = 5\n`)
  writeFileSync(file('taken.mjs'), `export default ${factory('zcache')}\n`)
  writeFileSync(file('nothing.mjs'), 'export const nothing = {}\n')
  writeFileSync(file('broken.mjs'), 'import "./not-there.mjs"\n')
})
afterAll(() => rmSync(folder, { recursive: true }))

test('a stack may name a layer of another module', async () => {
  const listed = await tmem(['stack', '--modules', file('own.mjs')])
  expect(listed).toMatchObject({ code: 0, stderr: '' })
  expect(listed.stdout).toContain('own: takes nothing')
  const planned = await tmem(['stack', '--modules', file('own.mjs'), 'own(n=3)'])
  expect(planned).toMatchObject({ code: 0, stdout: expect.stringContaining('own can stand.') })
  const without = await tmem(['stack', 'own(n=3)'])
  expect(without).toMatchObject({ code: 2, stderr: expect.stringContaining('no layer is named "own"') })
})

test.each([
  ['nothing.mjs', /exports no layer/],
  ['taken.mjs', /exports a layer zcache, but there is one of that name/],
  ['broken.mjs', /cannot be loaded: Cannot find module/],
  ['not-there.mjs', /cannot be loaded: Cannot find module/],
])('%s: one sentence, and nothing else', async (name, message) => {
  for (const words of [
    ['stack', '--modules', file(name)],
    [
      'serve',
      '--modules',
      file(name),
      '--stack',
      'memory(limit=8MiB)',
      '--device',
      'name=a,size=4MiB',
      '--nbd',
      `unix:${file('s')}`,
      '--control',
      file('c'),
    ],
  ]) {
    const { code, stdout, stderr } = await tmem(words)
    expect([code, stdout]).toEqual([2, ''])
    expect(stderr.trim().split('\n')).toHaveLength(1)
    expect(stderr).toMatch(message)
  }
})
