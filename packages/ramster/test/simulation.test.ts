/** Thousands of histories of five nodes; `RAMSTER_HISTORIES=100000 RAMSTER_SEED=1` before the command plays more. */
import { expect, test } from 'vitest'
import { play } from './simulation.ts'

const histories = Number(process.env['RAMSTER_HISTORIES'] ?? 2000)
const first = Number(process.env['RAMSTER_SEED'] ?? 1)

test(`${histories} histories of five nodes, with crashes, cuts, slow and repeated messages, and lenders that come and go`, {
  timeout: 3_600_000,
}, async () => {
  const all = { crashes: 0, breaks: 0, remoted: 0, healed: 0, relieved: 0, turned: 0, fetched: 0 }
  for (let seed = first; seed < first + histories; seed++) {
    const played = await play(seed)
    for (const name of Object.keys(all) as (keyof typeof all)[]) all[name] += played[name]
  }
  // It was about something.
  for (const count of Object.values(all)) expect(count).toBeGreaterThan(histories / 20)
})

test('a seed decides everything', async () => {
  expect(await play(77)).toEqual(await play(77))
})
