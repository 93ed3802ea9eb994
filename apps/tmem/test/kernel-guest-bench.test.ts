/** The rows of `tmem bench guest`, where they cannot be measured: each says why. */
import { expect, test } from 'vitest'
import { createBench } from '../src/bench/frame.ts'
import { guest } from '../src/bench/kernel-guest.ts'
import { silentTerminal } from './tmem.ts'

test('without its programs every row is skipped with the command that installs them', async () => {
  const path = process.env['PATH']
  process.env['PATH'] = '/nowhere'
  try {
    const rows = await guest.run(createBench(silentTerminal(), true))
    const skipped = expect.stringMatching(
      /^(qemu-system-x86_64, .* missing; install: apt-get install|a guest runs on )/,
    )
    expect(rows).toHaveLength(17)
    expect(rows).toEqual(rows.map(({ name }) => ({ name, skipped })))
  } finally {
    process.env['PATH'] = path
  }
})
