/** `tmem demo --remote`, on a small program. */
import { readdirSync } from 'node:fs'
import { expect, test } from 'vitest'
import { serverCommand } from '../../../packages/ramster/test/server.ts'
import { requires } from '../../../tools/requires.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

test('a server is killed in the middle, and every byte is right', { timeout: 240_000 }, async (ctx) => {
  requires(ctx, { commands: [serverCommand] })
  const directory = temporaryDirectory()
  const words = ['demo', '--remote', '--size', '64MiB', '--dir', directory]
  const { code, stdout, stderr } = await tmem([...words, '--json'])
  expect({ code, stderr }).toMatchObject({
    code: 0,
    stderr: expect.stringMatching(/ is killed\n(.*\n)*.* is back, and empty/),
  })
  const report = JSON.parse(stdout)
  expect(report).toMatchObject({ killed: true, lost: 0, wrongBytes: 0 })
  for (const count of ['remoted', 'fetched', 'healedCopies', 'swapIns']) expect(report[count]).toBeGreaterThan(100)
  // Each page is read at least once more at the end.
  expect(report.comparedBytes).toBeGreaterThanOrEqual(64 * 2 ** 20)
  expect(readdirSync(directory)).toEqual([])
})

test('without a server it says what is needed, and bad sizes are refused', async () => {
  const path = process.env['PATH']
  process.env['PATH'] = '/nowhere'
  try {
    const { code, stdout, stderr } = await tmem(['demo', '--remote', '--size', '8MiB'])
    expect([code, stdout]).toEqual([1, ''])
    expect(stderr).toMatch(/needs a lending server: install valkey-server, redis-server or redis-tools/)
  } finally {
    process.env['PATH'] = path
  }
  expect(await tmem(['demo', '--remote', '--size', '1MiB'])).toMatchObject({ code: 2, stdout: '' })
})
