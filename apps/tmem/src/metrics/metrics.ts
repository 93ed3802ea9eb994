/**
 * The statistics of a server in the text format of Prometheus, made from the tree of `tmem stat --json` alone, so that
 * both agree at any moment.
 *
 * `names.ts` names the metric of each counter; this file walks the tree. A counter without a description, such as one
 * of a layer from --modules, is shown as `tmem_layer_value`. The registry of prom-client writes the text.
 *
 * Invariant: no two lines have the same name and labels.
 */
import { cpuUsage, memoryUsage, uptime } from 'node:process'
import { durationBoundsNs, placeNames, putOutcomeCount, putOutcomeName, type StatsNode } from '@tmem/core'
import { type Metric, Registry } from 'prom-client'
import {
  chainTable,
  type Described,
  deviceTable,
  distributions,
  exportTable,
  fuseRequests,
  fuseTable,
  logTable,
  machineTable,
  machineTimes,
  moveTimes,
  nbdTable,
  otherCounter,
  ownTables,
  pageCacheTables,
  pageTimes,
  placeTable,
  refusedBlocks,
  refusedPuts,
  refusedSets,
  requestTimes,
  seatTables,
  sectionTables,
  type Table,
  valueCacheTables,
} from './names.ts'

/** The statistics of a server: of its devices, and of its own parts. */
export interface Statistics {
  readonly devices: readonly StatsNode[]
  readonly pageCaches: readonly StatsNode[]
  readonly caches: readonly StatsNode[]
  readonly servers: readonly StatsNode[]
}

/** Labels as text: `device="a",place="zcache"`. Written once for all counters of a section. */
type Labels = string

/** A line, whose name and labels are already text. */
interface Sample {
  readonly metricName: string
  readonly labels: typeof noLabels
  readonly sharedLabels: typeof noLabels
  value: number
}

/** One object for all lines: the registry keeps each such object that it sees, which costs more than the line. */
const noLabels = {}
const sampleOf = (metricName: string, value: number): Sample => ({
  metricName,
  labels: noLabels,
  sharedLabels: noLabels,
  value,
})

/** The source of a line. */
interface Line {
  readonly described: Described
  readonly labels: Labels
  readonly more: Labels
  readonly shown: Shown
  readonly sample: Sample
}

/** The lines of a histogram: buckets, the one that has all, sum and count. */
interface Histogram {
  readonly labels: Labels
  readonly shown: Shown
  readonly buckets: readonly Sample[]
  readonly all: Sample
  readonly sum: Sample
  readonly count: Sample
}

const labelled = (name: string, labels: Labels): string => (labels === '' ? name : `${name}{${labels}}`)
const and = (labels: Labels, more: Labels): Labels =>
  labels === '' || more === '' ? labels + more : `${labels},${more}`
const label = (name: string, value: string): Labels => `${name}="${/[\\"\n]/.test(value) ? escaped(value) : value}"`
const escaped = (value: string): string => value.replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n')
const labelsOf = (values: Readonly<Record<string, string>>): Labels =>
  Object.entries(values)
    .map(([name, value]) => label(name, value))
    .join(',')

/** Reasons of refusals, with their label. */
const reasons = Array.from({ length: putOutcomeCount - 1 }, (_, n) => {
  const reason = putOutcomeName(n + 1)
  return { reason, written: label('reason', reason) }
})
/** Bounds of histograms that are shown, every other one, with their label. */
const bounds = durationBoundsNs.map((bound, n) => (n % 2 === 0 ? label('le', String(bound / 1e9)) : undefined))
const buckets = durationBoundsNs.map((bound) => `below_${bound}_ns`)

/** All samples of one metric: the part of a metric that the registry uses. */
class Shown {
  readonly name: string
  readonly help: string
  readonly type: 'counter' | 'gauge' | 'histogram'
  readonly aggregator = 'sum'
  values: Sample[] = []

  constructor(name: string, help: string, type: Shown['type']) {
    this.name = name
    this.help = help
    this.type = type
  }

  get(): Promise<this> {
    return Promise.resolve(this)
  }
}

export class Metrics {
  readonly #registry = new Registry()
  readonly #metrics = new Map<string, Shown>()
  /** The lines of the last time, in their order, and the number of the next one. */
  readonly #lines: Line[] = []
  #at = 0
  /** Histograms of the last time likewise. */
  readonly #histograms: Histogram[] = []
  #histogramAt = 0
  readonly #read: () => Statistics
  readonly #version: string

  /** `version`: of this program. */
  constructor(read: () => Statistics, version: string) {
    this.#read = read
    this.#version = version
  }

  /** Media type of the text. */
  get contentType(): string {
    return this.#registry.contentType
  }

  /** The text of all metrics, as of now. */
  async text(): Promise<string> {
    for (const shown of this.#metrics.values()) shown.values = []
    this.#at = 0
    this.#histogramAt = 0
    const { devices, pageCaches, caches, servers } = this.#read()
    for (const device of devices) this.#device(device)
    for (const cache of pageCaches) this.#pageCache(cache)
    for (const cache of caches) this.#valueCache(cache)
    this.#times([...devices, ...pageCaches])
    for (const server of servers) this.#server(server)
    this.#process()
    return this.#registry.metrics()
  }

  #device(node: StatsNode): void {
    const labels = label('device', node.name)
    this.#counters(node, deviceTable, labels)
    for (const child of node.children) {
      if (child.name === 'places') this.#places(child, labels)
      else if (child.name === 'chain') this.#chain(child, labels)
      else if (child.name !== 'latency') this.#section(child, sectionTables[child.name], labels)
    }
  }

  #pageCache({ name: device, counters, children }: StatsNode): void {
    const labels = label('device', device)
    this.#counters({ name: 'file', counters, children }, pageCacheTables['file']!, labels)
    const below = ({ name, ...node }: StatsNode): void => {
      if (name === 'chain') this.#chain({ name, ...node }, labels)
      else {
        this.#counters({ name, ...node }, pageCacheTables[name] ?? {}, labels)
        for (const child of node.children) below(child)
      }
    }
    for (const child of children) if (child.name !== 'latency') below(child)
  }

  #valueCache({ name: cache, counters, children }: StatsNode): void {
    const labels = label('cache', cache)
    this.#counters({ name: 'cache', counters, children }, valueCacheTables['cache']!, labels)
    for (const child of children) {
      if (child.name === 'refused')
        for (const [reason, value] of Object.entries(child.counters))
          this.#add(refusedSets, labels, value, label('reason', reason))
      else if (child.name === 'places')
        for (const place of child.children)
          this.#counters(place, valueCacheTables['place']!, and(labels, label('place', place.name)))
      else this.#counters(child, valueCacheTables[child.name] ?? {}, labels)
    }
  }

  #places({ children }: StatsNode, labels: Labels): void {
    const names = placeNames(children)
    for (const [n, place] of children.entries())
      this.#counters(place, placeTable, and(labels, label('place', names[n]!)))
  }

  #chain(chain: StatsNode, labels: Labels): void {
    this.#counters(chain, chainTable, labels)
    const [refused, ...seats] = chain.children
    this.#reasons(refused!, refusedPuts, labels)
    const names = placeNames(seats)
    for (const [n, seat] of seats.entries()) this.#seat(seat, and(labels, label('place', names[n]!)))
  }

  #seat(seat: StatsNode, labels: Labels): void {
    const own = ownTables[seat.name] ?? {}
    // The section `places` has these, too.
    const known: Table = { pages: 'same', block_bytes: 'same', huge_pages: 'same', used_bytes: 'same', ...own }
    this.#counters(seat, known, labels)
    for (const child of seat.children) {
      if (child.name === 'refused') this.#reasons(child, refusedBlocks, labels)
      else if (seat.name === 'ramster' && child.counters['lost_with_it'] !== undefined)
        this.#machine(child, and(labels, label('machine', child.name)))
      else this.#section(child, seatTables[child.name], labels)
    }
  }

  #machine(node: StatsNode, labels: Labels): void {
    this.#counters(node, machineTable, labels)
    for (const { name, counters } of node.children) {
      const operation = /^(put|get)_latency$/.exec(name)?.[1]
      if (operation !== undefined) this.#histogram(machineTimes, and(labels, label('operation', operation)), counters)
    }
  }

  /** A section and the sections below it. */
  #section(node: StatsNode, table: Table | undefined, labels: Labels): void {
    const distribution = distributions[node.name]
    if (distribution === undefined) this.#counters(node, table ?? {}, labels)
    else
      for (const [number, value] of Object.entries(node.counters))
        this.#add(distribution[0], labels, value, label(distribution[1], number))
    for (const child of node.children) this.#section(child, seatTables[child.name], labels)
  }

  /** Refusals by reason. Reasons that never occurred are 0, so that the first refusal shows as a change. */
  #reasons({ counters }: StatsNode, described: Described, labels: Labels): void {
    for (const { reason, written } of reasons) this.#add(described, labels, counters[reason] ?? 0, written)
  }

  #server(node: StatsNode): void {
    if (node.name === 'nbd') {
      this.#counters(node, nbdTable, '')
      for (const child of node.children) this.#counters(child, exportTable, label('device', child.name))
    } else if (node.name === 'fuse') {
      for (const [counter, value] of Object.entries(node.counters)) {
        const described = fuseTable[counter]
        if (described === undefined) this.#add(fuseRequests, label('operation', counter), value)
        else if (described !== 'same') this.#add(described, '', value)
      }
    } else this.#section(node, node.name === 'log' ? logTable : undefined, '')
  }

  #counters({ name, counters }: StatsNode, table: Table, labels: Labels): void {
    for (const [counter, value] of Object.entries(counters)) {
      const described = table[counter]
      if (described === undefined) this.#add(otherCounter, labels, value, labelsOf({ section: name, counter }))
      else if (described !== 'same') this.#add(described, labels, value)
    }
  }

  /** Adds a line. Lines mostly come in the order of the last time, and then reuse their text. */
  #add(described: Described, labels: Labels, value: number, more: Labels = ''): void {
    const at = this.#at++
    let line = this.#lines[at]
    if (line === undefined || line.described !== described || line.labels !== labels || line.more !== more) {
      const { name, help, labels: own } = described
      const shown = this.#shown(`tmem_${name}`, help, name.endsWith('_total') ? 'counter' : 'gauge')
      const all = and(and(labels, more), own === undefined ? '' : labelsOf(own))
      line = { described, labels, more, shown, sample: sampleOf(labelled(shown.name, all), value) }
      this.#lines[at] = line
    }
    line.sample.value = described.scale === undefined ? value : value * described.scale
    line.shown.values.push(line.sample)
  }

  #shown(name: string, help: string, type: Shown['type']): Shown {
    const known = this.#metrics.get(name)
    if (known !== undefined) return known
    const shown = new Shown(name, help, type)
    this.#metrics.set(name, shown)
    // It asks for nothing else of what its own classes are.
    this.#registry.registerMetric(shown as unknown as Metric)
    return shown
  }

  /** Pages and moves by place, of all devices together; requests by device. */
  #times(devices: readonly StatsNode[]): void {
    const pages = new Map<Labels, Record<string, number>>()
    const moves = new Map<Labels, Record<string, number>>()
    for (const { name: device, children } of devices)
      for (const { name: kind, children: each } of children.find(({ name }) => name === 'latency')?.children ?? [])
        for (const { name, counters } of each) {
          if (kind === 'nbd' || kind === 'fuse')
            this.#histogram(requestTimes, labelsOf({ device, server: kind, operation: name }), counters)
          else if (kind === 'move') added(moves, labelsOf({ place: name }), counters)
          else added(pages, labelsOf({ operation: kind, place: name }), counters)
        }
    for (const [labels, counters] of pages) this.#histogram(pageTimes, labels, counters)
    for (const [labels, counters] of moves) this.#histogram(moveTimes, labels, counters)
  }

  /** Adds the lines of a histogram, which reuse their text as other lines do. */
  #histogram({ name, help }: Described, labels: Labels, counters: Readonly<Record<string, number>>): void {
    const full = `tmem_${name}`
    const at = this.#histogramAt++
    let histogram = this.#histograms[at]
    if (histogram === undefined || histogram.labels !== labels || histogram.shown.name !== full) {
      histogram = histogramOf(this.#shown(full, help, 'histogram'), labels)
      this.#histograms[at] = histogram
    }
    const { shown, all, sum, count } = histogram
    let seen = 0
    let bucket = 0
    for (const [n, below] of buckets.entries()) {
      seen += counters[below] ?? 0
      if (bounds[n] !== undefined) histogram.buckets[bucket++]!.value = seen
    }
    all.value = counters['count']!
    sum.value = counters['sum_ns']! / 1e9
    count.value = counters['count']!
    shown.values.push(...histogram.buckets, all, sum, count)
  }

  /** Metrics of the process, under the names that all clients of Prometheus use. */
  #process(): void {
    const { user, system } = cpuUsage()
    const gauge = (name: string, help: string, value: number, labels: Labels = ''): void =>
      void this.#shown(name, help, 'gauge').values.push(sampleOf(labelled(name, labels), value))
    this.#shown('process_cpu_seconds_total', 'Total user and system CPU time spent in seconds.', 'counter').values.push(
      sampleOf('process_cpu_seconds_total', (user + system) / 1e6),
    )
    gauge('process_resident_memory_bytes', 'Resident memory size in bytes.', memoryUsage.rss())
    gauge(
      'process_start_time_seconds',
      'Start time of the process since unix epoch in seconds.',
      Math.round(Date.now() / 1000 - uptime()),
    )
    gauge('tmem_build_info', '1, with the version of the program.', 1, label('version', this.#version))
  }
}

function histogramOf(shown: Shown, labels: Labels): Histogram {
  const { name } = shown
  return {
    labels,
    shown,
    buckets: bounds.flatMap((bound) => (bound === undefined ? [] : sampleOf(`${name}_bucket{${labels},${bound}}`, 0))),
    all: sampleOf(`${name}_bucket{${labels},le="+Inf"}`, 0),
    sum: sampleOf(`${name}_sum{${labels}}`, 0),
    count: sampleOf(`${name}_count{${labels}}`, 0),
  }
}

function added(
  all: Map<Labels, Record<string, number>>,
  labels: Labels,
  counters: Readonly<Record<string, number>>,
): void {
  const sums = all.get(labels) ?? {}
  for (const [name, value] of Object.entries(counters)) sums[name] = (sums[name] ?? 0) + value
  all.set(labels, sums)
}
