/** The example of the README is run as it stands there, but for the path. */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { runInThisContext } from 'node:vm'
import * as cleancache from '@tmem/cleancache'
import * as core from '@tmem/core'
import * as zcache from '@tmem/zcache'
import { expect, test } from 'vitest'
import * as pageCache from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const folder = mkdtempSync(join(tmpdir(), 'page-cache-readme-'))
  try {
    const code = /```ts\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
    const lines: string[] = []
    const here = code.replace('./data.txt', join(folder, 'data.txt'))
    const names = 'Cleancache, tmemBackend, compose, Tmem, PageCache, zcache'
    const run = runInThisContext(`async (modules, console) => { const { ${names} } = modules; ${here} }`)
    const modules = { ...core, ...cleancache, ...pageCache, ...zcache }
    await run(modules, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
    expect(lines).toEqual(['memory 19'])
    expect(readFileSync(join(folder, 'data.txt'), 'utf8')).toBe('transcendent memory')
  } finally {
    rmSync(folder, { recursive: true })
  }
})
