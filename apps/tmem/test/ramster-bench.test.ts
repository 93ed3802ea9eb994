/** `tmem bench ramster`, in quick rounds. */
import { expect, test } from 'vitest'
import { serverCommand } from '../../../packages/ramster/test/server.ts'
import { requires } from '../../../tools/requires.ts'
import { createBench } from '../src/bench/frame.ts'
import { ramster, sealRows } from '../src/bench/ramster.ts'
import { Interrupted } from '../src/ending.ts'
import { silentTerminal } from './tmem.ts'

test('every row of the table is there, with a figure', { timeout: 240_000 }, async (ctx) => {
  requires(ctx, { commands: [serverCommand] })
  const rows = await ramster.run(createBench(silentTerminal(), true))
  expect(rows.map(({ name }) => name)).toEqual([
    'remotify-one-copy',
    'remotify-two-copies',
    'fetch-one',
    'fetch-batch-256',
    'put-while-remotifying-median',
    'put-while-remotifying-p99',
    'hot-set',
    'nbd-read-4k-qd32',
    'seal-4k',
    'open-4k',
    'vram-put-64',
    'vram-get-64',
  ])
  for (const row of rows) expect('skipped' in row || ('ratio' in row && row.ratio! > 0)).toBe(true)
  for (const row of rows.slice(0, 7)) expect(row).not.toHaveProperty('skipped')
})

test('without a server the rows that need one say so, and sealing is measured', async () => {
  const path = process.env['PATH']
  process.env['PATH'] = '/nowhere'
  try {
    const rows = await ramster.run(createBench(silentTerminal(), true))
    expect(rows.slice(0, 8).every((row) => 'skipped' in row)).toBe(true)
    expect(rows[9]).toMatchObject({ name: 'open-4k', reference: 'node-crypto-aes-256-gcm', goal: 1.15 })
  } finally {
    process.env['PATH'] = path
  }
})

test('an interruption ends it', async () => {
  await expect(sealRows(createBench(silentTerminal(AbortSignal.abort()), true))).rejects.toBeInstanceOf(Interrupted)
})
