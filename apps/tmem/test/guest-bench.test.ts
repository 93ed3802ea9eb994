/** The rows of `tmem bench nbd` about a guest, where they cannot be measured: each says why. */
import { expect, test } from 'vitest'
import { createBench } from '../src/bench/frame.ts'
import { guestRows } from '../src/bench/guest.ts'
import { silentTerminal } from './tmem.ts'

test('without its programs every row is skipped with the reason', async () => {
  const path = process.env['PATH']
  process.env['PATH'] = '/nowhere'
  try {
    // What is found missing first depends on what was unpacked.
    const skipped = expect.stringMatching(/^needs the (program qemu-system-x86_64$|package )/)
    expect(await guestRows(createBench(silentTerminal(), true))).toEqual([
      { name: 'guest-swap', skipped },
      { name: 'guest-swap-nbdkit', skipped },
    ])
  } finally {
    process.env['PATH'] = path
  }
})
