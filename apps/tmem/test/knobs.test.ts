/** Knobs whose work has to wait: what happens meanwhile. */
import { memory } from '@tmem/memory'
import { ramzswap } from '@tmem/ramzswap'
import { expect, test } from 'vitest'
import { knobsOf } from '../src/serve/knobs.ts'

test('reset takes nothing away from who came while it waited', async () => {
  const device = ramzswap({ name: 'dev', sizeBytes: 8 * 4096, stack: [memory({ limitBytes: 2 ** 20 })] })
  const page = Buffer.alloc(4096, 'a page of somebody who came late')
  let holder: string | undefined
  const served = {
    resize: (sizeBytes: number): void => device.resize(sizeBytes),
    discard: async (at: number, length: number): Promise<void> => {
      await device.discard(at, length)
      holder = '1 client of NBD'
      await device.write(0, page)
    },
  }
  const reset = knobsOf({ device, served, holder: () => holder }).get('reset')!
  await expect(async () => reset.write('1')).rejects.toThrow(
    'dev is empty, its counters stay: in use since: 1 client of NBD',
  )
  const into = Buffer.alloc(4096)
  await device.read(0, into)
  expect(into.equals(page)).toBe(true)
  await expect(async () => reset.write('1')).rejects.toThrow('dev is in use: 1 client of NBD')
  await device.close()
})
