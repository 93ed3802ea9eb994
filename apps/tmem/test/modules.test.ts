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
  const memory = new URL('../../../packages/memory/dist/index.js', import.meta.url)
  writeFileSync(
    file('mine.mjs'),
    `import { memoryFactory } from '${memory}'
export const mine = { ...memoryFactory, name: 'mine' }
`,
  )
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

test('its puts, gets and flushes are measured', async () => {
  const words = ['bench', 'stack', '--quick', '--json', '--modules', file('mine.mjs'), '--stack', 'mine(limit=32MiB)']
  const { code, stdout } = await tmem(words)
  expect(code).toBe(0)
  const { suite, rows } = JSON.parse(stdout)
  const names = ['put-new-4k', 'put-replace-4k', 'get-4k', 'flush-4k', 'puts-refused', 'gets-missed']
  expect([suite, rows.map(({ name }: { name: string }) => name)]).toEqual(['stack', names])
  expect(rows.slice(4)).toMatchObject([{ value: 0 }, { value: 0 }])
  // What a stack refuses, it says.
  const small = await tmem(['bench', 'stack', '--quick', '--json', '--stack', 'memory(limit=8MiB)'])
  expect(JSON.parse(small.stdout).rows[4].value).toBeGreaterThan(30)
}, 60_000)

test.each([
  [['bench', 'stack'], /--stack is missing/],
  [['bench', 'core', '--stack', 'memory(limit=32MiB)'], /are for tmem bench stack/],
  [['bench', 'stack', '--stack', 'mine(limit=32MiB)'], /no layer is named "mine"/],
])('%s is refused', async (words, message) => {
  expect(await tmem(words)).toMatchObject({ code: 2, stdout: '', stderr: expect.stringMatching(message) })
})

test.each([
  ['nothing.mjs', /exports no layer/],
  ['taken.mjs', /exports a layer zcache, but that name is taken: rename the layer/],
  ['broken.mjs', /cannot be loaded: Cannot find module/],
  ['not-there.mjs', /cannot be loaded: Cannot find module/],
])('%s: one sentence, and nothing else', async (name, message) => {
  for (const words of [
    ['stack', '--modules', file(name)],
    ['bench', 'stack', '--modules', file(name), '--stack', 'memory(limit=8MiB)'],
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
