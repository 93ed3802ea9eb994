/** `tmem stat`: what rests where, as a table that adds up. */
import { setTimeout } from 'node:timers/promises'
import { formatBytes, type StatsNode } from '@tmem/core'
import { BadInput, throwIfInterrupted } from '../ending.ts'
import { type Terminal, tableOf } from '../terminal.ts'
import { type Answers, ask, infoWithin } from './control.ts'
import { usesBy } from './swap.ts'

/** Waits until a server answers, then prints the statistics once, or again and again until it is interrupted. */
export async function stat(
  options: {
    readonly control: string
    readonly watch?: string | true
    readonly wait: number
    readonly json?: true
  },
  terminal: Terminal,
): Promise<void> {
  const { watch } = options
  const pauseMs = watch === undefined || watch === true ? 1000 : Number(watch) * 1000
  if (!(pauseMs >= 100 && pauseMs <= 86_400_000))
    throw new BadInput(`--watch takes seconds, 0.1 to 86400, got ${String(watch)}`)
  await infoWithin(options.wait, options.control, terminal.signal)
  for (;;) {
    const answer = await ask(options.control, 'stats')
    terminal.print(options.json === true ? JSON.stringify(answer) : await tableFor(answer))
    if (watch === undefined) return
    await setTimeout(pauseMs, undefined, { signal: terminal.signal }).catch(() => undefined)
    throwIfInterrupted(terminal.signal)
  }
}

/**
 * Two tables. Of each device, in pages: used = same + hyper + compr + raw + backing + lost, and used + unwritten =
 * kernel + stale: `kernel` are the slots that the kernel uses, `stale` are pages that the kernel has freed and not yet
 * discarded (and the header page), `unwritten` are slots that the kernel has not written (it keeps pages of zeros
 * itself). The kernel reports only a number, so that only the difference of the last two is known and shown. `unsaved`
 * are pages that a snapshot would lose if the server were killed now.
 *
 * Of each place of its stack, from the top: pages = put + sunk + rose - down - up - gone, and the pages of all places
 * are hyper + compr + raw + backing.
 *
 * Of each machine that lends memory: its blocks, the persistent ones that would be lost with it now, and the ephemeral
 * ones that would vanish.
 *
 * Of each cache of values: its entries and memory, and the work of its clients.
 */
async function tableFor({ info, devices, caches }: Answers['stats']): Promise<string> {
  const names = devices.map(({ name }) => name)
  const uses = info.fuse === null ? undefined : await usesBy(info, names)
  const head = [
    'device',
    'size',
    'pages',
    'used',
    'same',
    'hyper',
    'compr',
    'raw',
    'backing',
    'lost',
    'kernel',
    'stale',
    'unwritten',
    'unsaved',
    'memory',
    'ratio',
  ]
  const rows = devices.map((device) => {
    const s = section(device, 'slots').counters
    const used = s['slots']! - s['empty']!
    const swap = uses?.get(device.name)?.find((use) => use.swap !== undefined)?.swap
    const kernel = swap === undefined ? undefined : swap.usedBytes / 4096
    const { mem_used_total: memory = 0, orig_data_size: original = 0 } = device.counters
    return [
      device.name,
      formatBytes(device.counters['disksize']!),
      ...[
        s['slots'],
        used,
        s['same_filled'],
        s['hypervisor'],
        s['compressed'],
        s['uncompressed'],
        s['backing'],
        s['lost'],
      ].map(String),
      kernel === undefined ? '-' : String(kernel),
      kernel === undefined ? '-' : String(Math.max(0, used - kernel)),
      kernel === undefined ? '-' : String(Math.max(0, kernel - used)),
      String(section(device, 'snapshot').counters['dirty_pages'] ?? '-'),
      mebibytes(memory),
      original === 0 ? '-' : (original / memory).toFixed(2),
    ]
  })
  const tables =
    devices.length === 0 && caches.length > 0
      ? []
      : [tableOf(head, rows), tableOf(placeHead, devices.flatMap(placeRows), ['left', 'left'])]
  const machines = devices.flatMap((device) => machinesOf(device).map((machine) => machineRow(device.name, machine)))
  if (machines.length > 0) tables.push(tableOf(machineHead, machines, ['left', 'left', 'left']))
  if (caches.length > 0) tables.push(tableOf(cacheHead, caches.map(cacheRow)))
  return tables.join('\n')
}

const cacheHead = ['cache', 'entries', 'memory', 'limit', 'hits', 'misses', 'sets', 'refused', 'evicted', 'clients']

function cacheRow(cache: StatsNode): string[] {
  const sum = (name: string): number => Object.values(section(cache, name).counters).reduce((all, one) => all + one, 0)
  const { entries, memory_bytes: memory, limit_bytes: limit, hits, sets } = cache.counters
  const { refused_large: large, connections } = section(cache, 'resp').counters
  return [
    cache.name,
    String(entries),
    mebibytes(memory!),
    mebibytes(limit!),
    ...[hits, sum('misses'), sets, sum('refused') + large!, sum('evictions'), connections].map(String),
  ]
}

const machineHead = ['device', 'machine', 'state', 'blocks', 'lost with it', 'vanish with it']

/** A machine that lends memory: its blocks, and the blocks that would be gone with it now. */
const machineRow = (device: string, { name, counters: c }: StatsNode): string[] => [
  device,
  name,
  c['open'] === 1 ? 'open' : 'away',
  String(c['blocks']),
  String(c['lost_with_it']),
  String(c['vanish_with_it']),
]

/** The machines that lend memory to a device. */
export function machinesOf(node: StatsNode): StatsNode[] {
  if (node.name === 'ramster') return node.children.filter(({ counters }) => counters['lost_with_it'] !== undefined)
  return node.children.flatMap(machinesOf)
}

const placeHead = ['device', 'place', 'pages', 'bytes', 'put', 'sunk', 'rose', 'down', 'up', 'gone', 'writes', 'reads']

const placeRows = (device: StatsNode): string[][] =>
  section(device, 'places').children.map(({ name, counters: c }) => [
    device.name,
    name,
    String(c['pages']),
    mebibytes(c['bytes']!),
    ...['put', 'sunk', 'rose', 'passed_down', 'raised', 'gone'].map((counter) => String(c[counter])),
    ...['writes', 'reads'].map((counter) => (c['waits'] === 1 ? String(c[counter]) : '-')),
  ])

const mebibytes = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)}MiB`

function section({ children }: StatsNode, name: string): StatsNode {
  return children.find((child) => child.name === name) ?? { name, counters: {}, children: [] }
}
