/** The example of the README is run as it stands there, but for the path. */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { runInThisContext } from 'node:vm'
import { expect, test } from 'vitest'
import { PageFile } from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const folder = mkdtempSync(join(tmpdir(), 'page-file-readme-'))
  try {
    const code = /```js\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
    const lines: string[] = []
    const here = code.replace('./cold.pages', join(folder, 'cold.pages'))
    const run = runInThisContext(`async (modules, console) => { const { PageFile } = modules; ${here} }`)
    await run({ PageFile }, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
    expect(lines).toEqual(['TMEM_IO true', 'ours cold cold c'])
    expect(readdirSync(folder)).toEqual([])
  } finally {
    rmSync(folder, { recursive: true })
  }
})
