/** The example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInNewContext } from 'node:vm'
import * as own from '@tmem/codecs'
import { expect, test } from 'vitest'

test('the example of the README works', () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?)```/.exec(readme)?.[1]?.replace(/^import .*\n/gm, '') ?? ''
  const lines: string[] = []
  runInNewContext(code, { ...own, Buffer, console: { log: (line: string) => lines.push(line) } })
  expect(lines).toEqual([expect.stringMatching(/^\d\d bytes hold a page of 4096$/), 'transcendent memory'])
})
