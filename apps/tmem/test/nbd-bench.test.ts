/** `tmem bench nbd` where it cannot measure: every row of a server says why. */
import { expect, test } from 'vitest'
import { createBench } from '../src/bench/frame.ts'
import { serverRows } from '../src/bench/nbd.ts'
import { silentTerminal } from './tmem.ts'

test('without fio or nbdkit every row is skipped with the reason', async () => {
  const path = process.env['PATH']
  process.env['PATH'] = '/nowhere'
  try {
    const rows = await serverRows(createBench(silentTerminal(), true))
    expect(rows).toHaveLength(9)
    expect(rows.every((row) => 'skipped' in row && row.skipped === 'needs the program fio')).toBe(true)
  } finally {
    process.env['PATH'] = path
  }
})
