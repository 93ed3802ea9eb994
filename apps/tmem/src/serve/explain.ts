/** `tmem explain`: where one page of a device is, in which form, and how it got there. */
import { formatBytes, type MoveReason } from '@tmem/core'
import { type Terminal, tableOf } from '../terminal.ts'
import { type Answers, ask } from './control.ts'

/** Shows the page with a byte of a device. Rejects with `Failed` if the server has no such device or byte. */
export async function explain(
  device: string,
  offset: number,
  options: { readonly control: string; readonly json?: true },
  terminal: Terminal,
): Promise<void> {
  const answer = await ask(options.control, 'explain', { device, offset })
  if (options.json === true) terminal.print(JSON.stringify(answer))
  else terminal.print(tableOf(['what', 'value'], rowsOf(answer), ['left', 'left']))
}

const states: Readonly<Record<Answers['explain']['state'], string>> = {
  empty: 'empty: it reads as zeros',
  same: 'same-filled: one word, repeated, which needs no place',
  held: 'held',
  lost: 'lost: the stack has lost the page; reads of it fail until it is overwritten or discarded',
}

/** Letters of block_state, as zram has them. */
const flagTexts: Readonly<Record<string, string>> = {
  s: 'one word',
  w: 'in a place that waits',
  h: 'does not shrink',
  i: 'idle',
  r: 'recompressed',
  n: 'recompression gains nothing',
}

function rowsOf(page: Answers['explain']): string[][] {
  const { device, slot, state, place, placeNumber, bytes, codec, codecName, flags, ageSeconds, moves } = page
  const rows = [
    ['device', device],
    ['page', `${slot}, bytes ${slot * 4096} to ${slot * 4096 + 4095}`],
    ['state', states[state]],
  ]
  if (place !== null) {
    rows.push(['place', `${place}, number ${placeNumber! + 1} from the top`])
    rows.push(['size', `${bytes} bytes of ${formatBytes(4096)}`])
    rows.push([
      'codec',
      codec === null ? 'stands in its block' : (codecName ?? (codec === 0 ? 'none' : `number ${codec}`)),
    ])
  }
  if (flags !== '')
    rows.push([
      'flags',
      flags
        .split('')
        .map((flag) => `${flag} (${flagTexts[flag]})`)
        .join(', '),
    ])
  if (ageSeconds !== null) rows.push(['last used', `${ageSeconds} seconds ago`])
  for (const [n, { reason, from, to, agoSeconds }] of (moves ?? []).entries())
    rows.push([n === 0 ? 'moves' : '', `${agoSeconds} seconds ago: ${moveTexts[reason](from, to)}`])
  if (moves !== null)
    rows.push([moves.length === 0 ? 'moves' : '', `${moves.length === 0 ? 'none' : 'no other'} ${sinceText(page)}`])
  return rows
}

const sinceText = ({ movesSeconds }: Answers['explain']): string =>
  `in the last ${movesSeconds} seconds, which is all that is recorded`

/** A move in words. Which places a reason has is `Pool.movesOf`'s to say. */
const moveTexts: Readonly<Record<MoveReason, (from: string | null, to: string | null) => string>> = {
  put: (from, to) => (from === null ? `written straight to ${to}` : `put back from ${from} to ${to}`),
  recovered: (_, to) => `recovered from an earlier run in ${to}`,
  sunk: (from, to) => `sank from ${from} to ${to}`,
  sunk_clean: (from, to) => `sank from ${from} to its copy in ${to}`,
  copied: (from, to) => `copied from ${from} to ${to}, and stayed in ${from}`,
  rose: (from, to) => `rose from ${from} to ${to}`,
  released: (from, to) => `dropped from ${from}, as its reader has it; a copy is in ${to}`,
  gone: (from) => `overwritten, discarded or dropped in ${from}`,
}
