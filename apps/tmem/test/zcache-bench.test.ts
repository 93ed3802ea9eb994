/** Parts of `tmem bench zcache` that change nothing on the machine, on few pages. */
import { mixedCorpus } from '@tmem/codecs/bench'
import { expect, test } from 'vitest'
import { createBench, type MeasuredRow, type Row } from '../src/bench/frame.ts'
import { churnRows, codecRows, giveBackRows, pageRows, tradeRows, zcache } from '../src/bench/zcache.ts'
import { Interrupted } from '../src/ending.ts'
import { silentTerminal } from './tmem.ts'

const few = mixedCorpus(1024)
const bench = createBench(silentTerminal(), true)
const measured = (rows: readonly Row[], name: string): MeasuredRow => {
  const row = rows.find((one) => one.name === name)
  if (row === undefined || 'skipped' in row) throw new Error(`no figure ${name} in ${JSON.stringify(rows)}`)
  return row
}

test('put and get are measured against the codec alone', async () => {
  const rows = await pageRows(bench, few)
  expect(rows.map(({ name }) => name)).toEqual(['put-new', 'get'])
  for (const { name } of rows) expect(measured(rows, name).ratio).toBeGreaterThan(0)
})

test('space for time: less than a page of memory, for more than a get of plain memory', async () => {
  const rows = await tradeRows(bench, few)
  expect(measured(rows, 'trade-space')).toMatchObject({ reference_value: 4096, goal: 0.5 })
  expect(measured(rows, 'trade-space').ratio).toBeLessThan(1)
  expect(measured(rows, 'trade-get')).toMatchObject({ reference: 'memory', goal: 10 })
})

test('bytes in use are more than those of the compressed pages, and most go back', async () => {
  const churned = measured(await churnRows(bench, few), 'bytes-after-churn')
  expect(churned.ratio).toBeGreaterThan(1)
  const flushed = await giveBackRows(bench, few)
  expect(measured(flushed, 'chunks-kept-after-flush').ratio).toBeGreaterThan(1)
  // A tenth of the pages is left.
  expect(measured(flushed, 'bytes-kept-after-flush').value).toBeLessThan(churned.value / 3)
  expect(measured(flushed, 'bytes-kept-after-flush').reference_value).toBeLessThan(churned.reference_value! / 5)
})

test('without a compiler the rows of C say so, the others are measured', async () => {
  const path = process.env['PATH']
  process.env['PATH'] = '/nowhere'
  try {
    const rows = await codecRows(bench, few)
    expect(measured(rows, 'lz4-decompress-to-lz4-napi')).toMatchObject({ reference: 'lz4-napi', goal: 0.5 })
    for (const name of ['lz4-compress-to-liblz4', 'lz4-decompress-to-liblz4'])
      expect(rows).toContainEqual({ name, skipped: expect.stringMatching(/^needs gcc and liblz4\.so\.1: /) })
  } finally {
    process.env['PATH'] = path
  }
})

test('an interruption ends it', async () => {
  await expect(zcache.run(createBench(silentTerminal(AbortSignal.abort()), true))).rejects.toBeInstanceOf(Interrupted)
})
