/** The example of the README is run as it stands there, but for the path. */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { runInThisContext } from 'node:vm'
import { compose, GetOutcome } from '@tmem/core'
import { expect, test } from 'vitest'
import { spill } from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const folder = mkdtempSync(join(tmpdir(), 'spill-readme-'))
  try {
    const code = /```ts\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
    const lines: string[] = []
    const here = code.replace('./pages.spill', join(folder, 'pages.spill'))
    const run = runInThisContext(
      `async (modules, console) => { const { compose, GetOutcome, spill } = modules; ${here} }`,
    )
    await run({ compose, GetOutcome, spill }, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
    expect(lines).toEqual(['true before the restart'])
  } finally {
    rmSync(folder, { recursive: true })
  }
})
