/**
 * What the page says, worked out of what the server counts: plain functions, so that they can be tested without a
 * browser.
 *
 * Invariants:
 *  - Bytes add up: of a place in memory blocks + metadata + waste = used; of all places together logical bytes are
 *    those of the pages that the device holds, lost ones apart.
 *  - A rate is what was counted between two states of one run of a server. Where a counter went back (the device was
 *    reset) there is none.
 */
import type { StatsNode } from '@tmem/core'
import type { ConsoleDevice, ConsoleState } from '../state.ts'

export const pageBytes = 4096

/** The child of that name; an empty one where there is none. */
export function section(node: StatsNode, name: string): StatsNode {
  return node.children.find((child) => child.name === name) ?? { name, counters: {}, children: [] }
}

/** A counter; 0 where there is none. */
export const counter = (node: StatsNode, name: string): number => node.counters[name] ?? 0

/** What a place counts in both trees: of the device, and of the chain. */
interface PlaceNodes {
  readonly of: StatsNode
  readonly chain: StatsNode
}

function placesOf(device: ConsoleDevice): PlaceNodes[] {
  const chain = section(device.stats, 'chain').children.filter(({ name }) => name !== 'refused')
  return section(device.stats, 'places').children.map((of, n) => ({
    of,
    chain: chain[n] ?? { name: of.name, counters: {}, children: [] },
  }))
}

/** Where bytes are in one place. */
export interface PlaceBytes {
  readonly name: string
  readonly kind: 'directory' | 'memory' | 'waits' | 'foreign'
  readonly pages: number
  /** Bytes of its pages as their owner knows them. */
  readonly logical: number
  /** Bytes of their blocks, compressed or not. */
  readonly blocks: number
  readonly metadata: number
  /** Taken, and neither of these: rounding, holes, what is free in what was taken. */
  readonly waste: number
  /** Taken of memory, or of a file. */
  readonly used: number
  /** Most that it may take; 0: not known. */
  readonly limit: number
}

/** Where the bytes of a device are; the directory first, then its places from the top. */
export function bytesOf(device: ConsoleDevice): PlaceBytes[] {
  const { stats } = device
  const chain = section(stats, 'chain')
  const same = counter(section(stats, 'slots'), 'same_filled')
  const nodes = placesOf(device)
  // What the chain keeps of blocks is charged to their places, and counted there; here is what is left of it.
  const charged = nodes.reduce((sum, { chain: node }) => sum + counter(node, 'directory_bytes'), 0)
  const directory = Math.max(0, counter(chain, 'metadata_bytes') - charged)
  return [
    {
      name: 'directory',
      kind: 'directory',
      pages: same,
      logical: same * pageBytes,
      blocks: 0,
      metadata: directory,
      waste: 0,
      used: directory,
      limit: 0,
    },
    ...nodes.map(({ of, chain: node }): PlaceBytes => {
      const waits = counter(of, 'waits') === 1
      const foreign = counter(of, 'foreign') === 1
      const [pages, blocks] = [counter(of, 'pages'), counter(of, 'bytes')]
      const metadata = waits ? 0 : counter(node, 'metadata_bytes')
      const taken = waits ? counter(node, 'used_bytes_on_disk') : counter(of, 'used_bytes')
      const used = Math.max(taken, blocks + metadata)
      return {
        name: of.name,
        kind: foreign ? 'foreign' : waits ? 'waits' : 'memory',
        pages,
        logical: pages * pageBytes,
        blocks,
        metadata,
        waste: used - blocks - metadata,
        used,
        limit: counter(node, 'limit_bytes') || counter(node, 'room_bytes_on_disk'),
      }
    }),
  ]
}

/** What a device holds, all in all. */
export interface Totals {
  /** Pages that were written and not discarded, and their bytes. */
  readonly pages: number
  readonly logical: number
  readonly lost: number
  /** Bytes of memory: of places in memory, and of the directory. */
  readonly memory: number
  /** Bytes in places that wait. */
  readonly file: number
  /** Bytes of pages in memory over bytes of memory that they take; `undefined`: there are none. */
  readonly ratio: number | undefined
}

export function totalsOf(device: ConsoleDevice): Totals {
  const slots = section(device.stats, 'slots')
  const places = bytesOf(device)
  const sum = (kinds: readonly PlaceBytes['kind'][], of: (place: PlaceBytes) => number): number =>
    places.filter(({ kind }) => kinds.includes(kind)).reduce((all, place) => all + of(place), 0)
  const pages = counter(slots, 'slots') - counter(slots, 'empty')
  const memory = sum(['memory', 'directory'], ({ used }) => used)
  // As `tmem stat` has it.
  const { orig_data_size: original = 0, mem_used_total: used = 0 } = device.stats.counters
  return {
    pages,
    logical: pages * pageBytes,
    lost: counter(slots, 'lost'),
    memory,
    file: sum(['waits'], (place) => place.used),
    ratio: original === 0 || used === 0 ? undefined : original / used,
  }
}

/** What flows through a place: pages a second. */
export interface PlaceFlow {
  readonly name: string
  /** From clients, straight here. */
  readonly put: number
  /** From the places above, and from those below. */
  readonly sunk: number
  readonly rose: number
  /** To the places below, and to those above. */
  readonly down: number
  readonly up: number
  /** Overwritten, discarded. */
  readonly gone: number
  /** Refused, by reason. */
  readonly refused: readonly { readonly reason: string; readonly rate: number }[]
}

/** What flows through a device: requests for pages a second, and through each of its places. */
export interface Flows {
  readonly reads: number
  readonly writes: number
  readonly freed: number
  readonly refused: readonly { readonly reason: string; readonly rate: number }[]
  readonly places: readonly PlaceFlow[]
}

/** What flowed between two states; `undefined`: they cannot be compared. */
export function flowsOf(name: string, before: ConsoleState | undefined, now: ConsoleState): Flows | undefined {
  const seconds = before === undefined ? 0 : (now.atMs - before.atMs) / 1000
  const was = before?.devices.find((device) => device.name === name)
  const is = now.devices.find((device) => device.name === name)
  if (before?.server.run !== now.server.run || was === undefined || is === undefined || seconds <= 0) return undefined
  const rate = (a: StatsNode, b: StatsNode, key: string): number => {
    const more = counter(b, key) - counter(a, key)
    return more > 0 ? more / seconds : 0
  }
  const reasons = (a: StatsNode, b: StatsNode): { reason: string; rate: number }[] => {
    const [old, recent] = [section(a, 'refused'), section(b, 'refused')]
    return Object.keys(recent.counters)
      .map((reason) => ({ reason, rate: rate(old, recent, reason) }))
      .filter((one) => one.rate > 0)
  }
  const [oldPlaces, places] = [placesOf(was), placesOf(is)]
  return {
    reads: rate(was.stats, is.stats, 'num_reads'),
    writes: rate(was.stats, is.stats, 'num_writes'),
    freed: rate(was.stats, is.stats, 'notify_free'),
    refused: reasons(section(was.stats, 'chain'), section(is.stats, 'chain')),
    places: places.map(({ of, chain }, n) => {
      const old = oldPlaces[n] ?? { of: { name: '', counters: {}, children: [] }, chain }
      const own = (key: string): number => rate(old.of, of, key)
      return {
        name: of.name,
        put: own('put'),
        sunk: own('sunk'),
        rose: own('rose'),
        down: own('passed_down'),
        up: own('raised'),
        gone: own('gone'),
        refused: reasons(old.chain, chain),
      }
    }),
  }
}

/** How swap of the kernel compares with what is held here: in pages. */
export interface SwapUse {
  readonly kernel: number
  readonly ours: number
  /** Held here, and not used by the kernel any more (or its header): to be discarded. */
  readonly stale: number
  /** Used by the kernel, and never written: it knows pages of zeros itself. */
  readonly unwritten: number
}

/** As `tmem stat` has it; `undefined`: the kernel does not swap here. */
export function swapUseOf(device: ConsoleDevice): SwapUse | undefined {
  if (device.swap === null) return undefined
  const kernel = device.swap.usedBytes / pageBytes
  const { pages: ours } = totalsOf(device)
  return { kernel, ours, stale: Math.max(0, ours - kernel), unwritten: Math.max(0, kernel - ours) }
}

/** A count for people: always as wide as its number of digits says, with thin groups. */
export const count = (value: number): string => Math.round(value).toLocaleString('en-US')

/** A rate for people: a digit after the point below ten. */
export const rateText = (value: number): string => (value < 10 && value > 0 ? value.toFixed(1) : count(value))

/** Bytes for people, always in a form that reads alike. */
export function bytesText(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  let unit = 0
  let value = bytes
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024
    unit++
  }
  return `${unit === 0 ? String(value) : value.toFixed(value < 100 ? 1 : 0)} ${units[unit]}`
}

/** Seconds for people: `10 s`, `10 min`, `1 h`. */
export function ageText(seconds: number): string {
  if (seconds < 60) return `${seconds} s`
  if (seconds < 3600) return `${seconds / 60} min`
  return seconds < 86_400 ? `${seconds / 3600} h` : `${seconds / 86_400} d`
}

/** How long something takes. */
export interface Latency {
  readonly name: string
  readonly count: number
  /** Nanoseconds that 50, 90 and 99 % do not take longer than, and the longest. */
  readonly percentiles: readonly number[]
}

const shares = ['p50_ns', 'p90_ns', 'p99_ns', 'max_ns'] as const

/** Of what a device measures, by operation: of pages by place, of requests by kind. */
export const latenciesOf = ({ stats }: ConsoleDevice): Latency[] =>
  section(stats, 'latency').children.flatMap(({ name, children }) =>
    children.map((kind) => ({
      name: `${name} ${kind.name}`,
      count: counter(kind, 'count'),
      percentiles: shares.map((share) => counter(kind, share)),
    })),
  )

/** A time for people, three digits at most. */
export function nanosecondsText(ns: number): string {
  if (ns < 1000) return `${Math.round(ns)} ns`
  if (ns < 1e6) return `${(ns / 1e3).toFixed(ns < 1e5 ? 1 : 0)} µs`
  return ns < 1e9 ? `${(ns / 1e6).toFixed(ns < 1e8 ? 1 : 0)} ms` : `${(ns / 1e9).toFixed(1)} s`
}
