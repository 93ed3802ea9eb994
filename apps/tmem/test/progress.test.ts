/** Progress into a pipe: each part is a line once it is over, with what it came to or how long it took. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { expect, test } from 'vitest'

const terminal = new URL('../dist/terminal.js', import.meta.url)

async function said(script: string): Promise<string> {
  const before = `import { processTerminal } from '${terminal}'
const terminal = processTerminal(new AbortController().signal, () => () => undefined)
`
  const child = spawn(process.execPath, ['--input-type=module', '-e', before + script])
  let text = ''
  child.stderr.setEncoding('utf8').on('data', (part: string) => {
    text += part
  })
  await once(child, 'close')
  return text
}

test('a part with a result, one without, one of which somebody else tells, and one that failed', async () => {
  const text = await said(`
for (const [name, result, only] of [['pages', '7 of them'], ['swap'], ['image', undefined, 'bar']]) {
  const part = terminal.progress(name, only)
  part.at(1, 3)
  part.done(result)
  part.end()
}
const failed = terminal.progress('failed')
failed.at(1, 2)
failed.end()
`)
  expect(text).toMatch(/^pages: 7 of them\nswap: \d+\.\d s\n$/)
})
