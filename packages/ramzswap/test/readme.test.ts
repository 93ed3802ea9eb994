/** The example of the README is run as it stands there, but for the path. */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { runInThisContext } from 'node:vm'
import { frontswap } from '@tmem/frontswap'
import { zcache } from '@tmem/zcache'
import { expect, test } from 'vitest'
import { ramzswap } from '../src/index.ts'

test('the example of the README works', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'ramzswap-'))
  try {
    const code = /```ts\n([\s\S]*?)```/
      .exec(readFileSync(new URL('../README.md', import.meta.url), 'utf8'))![1]!
      .replace(/^import .*\n/gm, '')
      .replace('./swap.img', join(folder, 'swap.img'))
    const lines: string[] = []
    const run = runInThisContext(
      `async (modules, console) => { const { frontswap, ramzswap, zcache } = modules; ${code} }`,
    )
    await run({ frontswap, ramzswap, zcache }, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
    expect(lines).toEqual(['transcendent memory - 1 page in memory'])
    expect(readdirSync(folder)).toEqual([])
  } finally {
    rmSync(folder, { recursive: true })
  }
})
