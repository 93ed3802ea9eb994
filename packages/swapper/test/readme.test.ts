/** The example of the README is run as it stands there, but for the path. */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { runInThisContext } from 'node:vm'
import { compose } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { zcache } from '@tmem/zcache'
import { expect, test } from 'vitest'
import { Swapper } from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const folder = mkdtempSync(join(tmpdir(), 'swapper-readme-'))
  try {
    const code = /```ts\n([\s\S]*?)```/.exec(readme)![1]!.replace(/^import .*\n/gm, '')
    const lines: string[] = []
    const here = code.replace('./swap.img', join(folder, 'swap.img'))
    const run = runInThisContext(
      `async (modules, console) => { const { compose, frontswap, Swapper, zcache } = modules; ${here} }`,
    )
    await run({ compose, frontswap, Swapper, zcache }, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
    expect(lines).toEqual([expect.stringMatching(/^page 4711 after \d+ swap-outs$/)])
    expect(readdirSync(folder)).toEqual([])
  } finally {
    rmSync(folder, { recursive: true })
  }
})
