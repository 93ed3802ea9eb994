/**
 * `tmem top`: what devices and places did in each interval, longest waits first.
 *
 * Devices are ordered by the time that clients waited for them: the sum over all requests in a second, which is more
 * than a second if many wait at once. Places are ordered by the time that pages waited for them, in fetches and moves,
 * and then by the pages that they refused.
 *
 * On a terminal each interval replaces the one before on the screen; elsewhere it is printed below it.
 */
import { setTimeout } from 'node:timers/promises'
import { Durations, durationBoundsNs, placeNames, type StatsNode } from '@tmem/core'
import { throwIfInterrupted } from '../ending.ts'
import { type Terminal, tableOf } from '../terminal.ts'
import { type Answers, ask } from './control.ts'

type Counters = Readonly<Record<string, number>>

/** The rates of a device, per second. */
export interface DeviceRow {
  readonly device: string
  /** Milliseconds that its requests took, summed. */
  readonly waitMs: number
  readonly reads: number
  readonly writes: number
  /** The 99th percentile of its requests in the interval, in milliseconds; null without requests. */
  readonly p99Ms: number | null
  readonly refused: number
  readonly failed: number
  /**
   * Now: its pages, the memory of its places, and the ratio of the uncompressed size of its pages in memory to that.
   */
  readonly pages: number
  readonly memoryBytes: number
  readonly ratio: number | null
}

/** The rates of a place of a device, per second. */
export interface PlaceRow {
  readonly device: string
  readonly place: string
  /** Milliseconds that pages waited for it, in fetches and moves. */
  readonly waitMs: number
  /** Blocks that came and went. */
  readonly put: number
  readonly sunk: number
  readonly rose: number
  readonly down: number
  readonly up: number
  readonly refused: number
  readonly fetchP99Ms: number | null
  readonly moveP99Ms: number | null
  /** Now. */
  readonly pages: number
  readonly bytes: number
}

/** The work between two looks. */
export interface Interval {
  readonly seconds: number
  readonly devices: readonly DeviceRow[]
  readonly places: readonly PlaceRow[]
}

/** Shows one interval, or intervals until it is interrupted. Rejects with `Failed` if no server answers. */
export async function top(
  options: { readonly control: string; readonly interval: number; readonly once?: true; readonly json?: true },
  terminal: Terminal,
): Promise<void> {
  const screen = options.json === true || options.once === true ? undefined : terminal.screen
  let before = await ask(options.control, 'stats')
  let beforeAt = performance.now()
  try {
    for (;;) {
      await setTimeout(options.interval * 1000, undefined, { signal: terminal.signal }).catch(() => undefined)
      throwIfInterrupted(terminal.signal)
      const now = await ask(options.control, 'stats')
      const nowAt = performance.now()
      const interval = between(before, now, (nowAt - beforeAt) / 1000)
      if (options.json === true) terminal.print(JSON.stringify(interval))
      else if (screen === undefined) terminal.print(textOf(interval))
      else screen.draw(`${headOf(now)}\n\n${textOf(interval)}`)
      if (options.once === true) return
      before = now
      beforeAt = nowAt
    }
  } finally {
    screen?.end()
  }
}

/** The work between two answers of one server. A counter that was reset meanwhile counts from zero. */
export function between(before: Answers['stats'], now: Answers['stats'], seconds: number): Interval {
  const devices: DeviceRow[] = []
  const places: PlaceRow[] = []
  for (const device of now.devices) {
    const former = before.devices.find(({ name }) => name === device.name)
    devices.push(deviceRow(device, former, seconds))
    const chain = childOf(device, 'chain')
    const names = placeNames(chain.children.slice(1))
    for (const [n, place] of names.entries()) places.push(placeRow({ device, former, place, seat: n + 1, seconds }))
  }
  return {
    seconds,
    devices: devices.toSorted((a, b) => b.waitMs - a.waitMs || b.failed - a.failed || b.refused - a.refused),
    places: places.toSorted((a, b) => b.waitMs - a.waitMs || b.refused - a.refused),
  }
}

function deviceRow(now: StatsNode, before: StatsNode | undefined, seconds: number): DeviceRow {
  const rate = rateOf(now, before, seconds)
  const requests = (node: StatsNode | undefined): StatsNode[] =>
    node === undefined ? [] : ['nbd', 'fuse'].flatMap((asker) => childOf(childOf(node, 'latency'), asker).children)
  const spent = durationsOf(requests(now), requests(before))
  const { mem_used_total: memoryBytes = 0, orig_data_size: original = 0 } = now.counters
  const { slots = 0, empty = 0 } = childOf(now, 'slots').counters
  return {
    device: now.name,
    waitMs: spent.sumNs / 1e6 / seconds,
    reads: rate([], 'num_reads'),
    writes: rate([], 'num_writes'),
    p99Ms: percentile(spent),
    refused:
      sumOf(
        childOf(childOf(now, 'chain'), 'refused').counters,
        before && childOf(childOf(before, 'chain'), 'refused').counters,
      ) / seconds,
    failed: rate([], 'failed_reads') + rate([], 'failed_writes'),
    pages: slots - empty,
    memoryBytes,
    ratio: original === 0 ? null : original / memoryBytes,
  }
}

/** A place of a device. */
interface Seat {
  readonly device: StatsNode
  readonly former: StatsNode | undefined
  readonly place: string
  /** Number of its section in the chain. */
  readonly seat: number
  readonly seconds: number
}

function placeRow({ device, former, place, seat, seconds }: Seat): PlaceRow {
  const nodeOf = (of: StatsNode | undefined): StatsNode | undefined => of && childOf(of, 'chain').children[seat]
  const now = nodeOf(device)!
  const before = nodeOf(former)
  const moved = rateOf(now, before, seconds)
  const times = (of: StatsNode | undefined, kind: string): StatsNode[] =>
    of === undefined ? [] : childOf(childOf(of, 'latency'), kind).children.filter(({ name }) => name === place)
  const fetches = durationsOf(times(device, 'fetch'), times(former, 'fetch'))
  const moves = durationsOf(times(device, 'move'), times(former, 'move'))
  return {
    device: device.name,
    place,
    waitMs: (fetches.sumNs + moves.sumNs) / 1e6 / seconds,
    put: moved(['moves'], 'put'),
    sunk: moved(['moves'], 'sunk_in') + moved(['moves'], 'sunk_clean'),
    rose: moved(['moves'], 'rose'),
    down: moved(['moves'], 'passed_down') + moved(['moves'], 'dropped_clean') + moved(['moves'], 'released'),
    up: moved(['moves'], 'raised'),
    refused: sumOf(childOf(now, 'refused').counters, before && childOf(before, 'refused').counters) / seconds,
    fetchP99Ms: percentile(fetches),
    moveP99Ms: percentile(moves),
    pages: now.counters['pages'] ?? 0,
    bytes: now.counters['block_bytes'] ?? 0,
  }
}

const childOf = ({ children }: StatsNode, name: string): StatsNode =>
  children.find((child) => child.name === name) ?? { name, counters: {}, children: [] }

/** Each second, of a counter in a section below two states of a node. */
const rateOf =
  (now: StatsNode, before: StatsNode | undefined, seconds: number) =>
  (path: readonly string[], counter: string): number => {
    const valueIn = (node: StatsNode): number => path.reduce(childOf, node).counters[counter] ?? 0
    return grown(valueIn(now), before === undefined ? 0 : valueIn(before)) / seconds
  }

/** The growth of a counter: all of it, if it was reset. */
const grown = (now: number, before: number): number => (now >= before ? now - before : now)

const sumOf = (now: Counters, before: Counters = {}): number =>
  Object.entries(now).reduce((sum, [name, value]) => sum + grown(value, before[name] ?? 0), 0)

/** The times of an interval, of several kinds together. */
function durationsOf(now: readonly StatsNode[], before: readonly StatsNode[]): Durations {
  const all = new Durations()
  const bounds = [...durationBoundsNs.map(String), 'any']
  for (const { name, counters } of now) {
    const former = before.find((node) => node.name === name)?.counters ?? {}
    const of = (counter: string): number => grown(counters[counter] ?? 0, former[counter] ?? 0)
    all.count += of('count')
    all.sumNs += of('sum_ns')
    all.maxNs = Math.max(all.maxNs, counters['max_ns'] ?? 0)
    for (const [bucket, bound] of bounds.entries()) all.below[bucket]! += of(`below_${bound}_ns`)
  }
  return all
}

const percentile = (durations: Durations): number | null =>
  durations.count === 0 ? null : durations.shareNs(0.99) / 1e6

function headOf({ info }: Answers['stats']): string {
  const { pid, stack, devices } = info
  return `tmem top: process ${pid}, ${devices.length} devices over ${stack}; Ctrl-C ends it`
}

const deviceHead = ['device', 'wait', 'reads', 'writes', 'p99', 'refused', 'failed', 'pages', 'memory', 'ratio']
const placeHead = ['device', 'place', 'wait', 'put', 'sunk', 'rose', 'down', 'up', 'refused', 'fetch p99', 'move p99']

/** Two tables. Numbers are rates per second, except pages, memory and bytes. */
export function textOf({ devices, places }: Interval): string {
  const deviceRows = devices.map((row) => [
    row.device,
    `${row.waitMs.toFixed(1)}ms`,
    count(row.reads),
    count(row.writes),
    ms(row.p99Ms),
    count(row.refused),
    count(row.failed),
    String(row.pages),
    mebibytes(row.memoryBytes),
    row.ratio === null ? '-' : row.ratio.toFixed(2),
  ])
  const placeRows = places.map((row) => [
    row.device,
    row.place,
    `${row.waitMs.toFixed(1)}ms`,
    ...[row.put, row.sunk, row.rose, row.down, row.up, row.refused].map(count),
    ms(row.fetchP99Ms),
    ms(row.moveP99Ms),
    String(row.pages),
    mebibytes(row.bytes),
  ])
  return `${tableOf(deviceHead, deviceRows)}\n${tableOf([...placeHead, 'pages', 'bytes'], placeRows, ['left', 'left'])}`
}

const count = (perSecond: number): string => String(Math.round(perSecond))
const ms = (value: number | null): string =>
  value === null ? '-' : `${value < 10 ? value.toFixed(2) : value.toFixed(0)}ms`
const mebibytes = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)}MiB`
