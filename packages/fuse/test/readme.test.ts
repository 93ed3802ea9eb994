/** The example of the README is run as it stands there, but for the path. */
import { mkdtempSync, readFileSync, rmdirSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { runInThisContext } from 'node:vm'
import { memory } from '@tmem/memory'
import { ramzswap } from '@tmem/ramzswap'
import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { fuseServer, setIoFlusher, statisticsTree } from '../src/index.ts'

test('the example of the README works', async (ctx) => {
  requires(ctx, { root: true, paths: ['/dev/fuse'] })
  const mountPoint = mkdtempSync(join(tmpdir(), 'fuse-readme-'))
  const code = /```js\n([\s\S]*?)```/
    .exec(readFileSync(new URL('../README.md', import.meta.url), 'utf8'))![1]!
    .replace(/^import .*\n/gm, '')
    .replaceAll('/mnt/tmem', mountPoint)
  const lines: string[] = []
  const run = runInThisContext(
    `async (modules, console) => { const { fuseServer, memory, ramzswap, readFile, statisticsTree } = modules; ${code} }`,
  )
  await run(
    { fuseServer, memory, ramzswap, readFile, statisticsTree },
    { log: (...words: unknown[]) => lines.push(words.join(' ')) },
  )
  expect(lines).toEqual(['disksize 16777216'])
  rmdirSync(mountPoint)
})

test('the io-flusher flag can be asked for', async (ctx) => {
  requires(ctx, { root: true, paths: ['/dev/fuse'] })
  expect(await setIoFlusher()).toBeTypeOf('boolean')
})
