import { execFileSync } from 'node:child_process'
import { expect, test } from 'vitest'

test('the built program prints its help', () => {
  const bin = new URL('../dist/bin.js', import.meta.url).pathname
  expect(execFileSync(process.execPath, [bin, '--help'], { encoding: 'utf8' })).toContain('demo')
})
