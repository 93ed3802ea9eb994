/**
 * What a device counts, and the statistics that are made of it and of what its stack says: those of ramzswap's
 * GET_STATS and of zram's files, under their names.
 *
 * Invariants (asserted by the tests): empty + same_filled + hypervisor + compressed + uncompressed + backing + lost =
 * slots; stored = all of these but empty + overwritten + freed + cut_off.
 */
import type { PlaceUsage, StackUsage, StatsNode } from '@tmem/core'
import { pageBytes } from './stack.ts'

/** The statistics of ramzswap's GET_STATS, under their names. Sizes in bytes; percentages are of `pages_stored`. */
export interface RamzswapStats {
  readonly memlimit: number
  readonly disksize: number
  readonly num_reads: number
  readonly num_writes: number
  readonly failed_reads: number
  readonly failed_writes: number
  readonly invalid_io: number
  readonly notify_free: number
  readonly pages_zero: number
  readonly good_compress_pct: number
  readonly pages_expand_pct: number
  readonly pages_stored: number
  readonly pages_used: number
  readonly orig_data_size: number
  readonly compr_data_size: number
  readonly mem_used_total: number
  readonly bdev_num_reads: number
  readonly bdev_num_writes: number
}

/** What a device counts itself. */
export class Counters {
  reads = 0
  writes = 0
  failedReads = 0
  failedWrites = 0
  invalid = 0
  notifyFree = 0
  /** What became of pages: stored, overwritten, freed (discarded or zeroed), cut off by a resize. */
  stored = 0
  overwritten = 0
  freed = 0
  cutOff = 0

  reset(): void {
    this.reads = this.writes = this.failedReads = this.failedWrites = this.invalid = this.notifyFree = 0
    this.stored = this.overwritten = this.freed = this.cutOff = 0
  }
}

/** What a device is, as far as statistics are concerned. */
export interface DeviceState {
  readonly name: string
  readonly sizeBytes: number
  readonly memlimitBytes: number
  readonly heldPages: number
  readonly writebackLimit: number | undefined
  readonly writtenBack: number
  readonly recalled: number
  readonly recallFailed: number
}

/** Counters of places that only ever grow. */
const growing = [
  'put',
  'putHuge',
  'sunk',
  'rose',
  'passedDown',
  'raised',
  'gone',
  'refused',
  'writes',
  'reads',
  'compacted',
  'recompressed',
  'recompressPoor',
] as const

export class Statistics {
  readonly counters: Counters = new Counters()
  readonly #usage: () => StackUsage
  /** What the places had counted when the device began to count anew. */
  #before: readonly PlaceUsage[] = []
  #mostUsed = 0

  constructor(usage: () => StackUsage) {
    this.#usage = usage
  }

  /** Counts anew from now on. */
  reset(): void {
    this.counters.reset()
    this.#before = this.#usage().places
    this.forgetMostUsed()
  }

  /** The largest amount of memory in use is that of now. */
  forgetMostUsed(): void {
    this.#mostUsed = 0
    this.look()
  }

  /** Looks how much memory is in use, so that the largest amount is known. */
  look(): void {
    this.#sums(this.#usage())
  }

  /** The statistics of GET_STATS. */
  ramzswapStats(state: DeviceState, usage: StackUsage = this.#usage()): RamzswapStats {
    const { counters } = this
    const sums = this.#sums(usage)
    const percent = (pages: number): number => (sums.pages === 0 ? 0 : Math.floor((pages * 100) / sums.pages))
    return {
      memlimit: state.memlimitBytes,
      disksize: state.sizeBytes,
      num_reads: counters.reads,
      num_writes: counters.writes,
      failed_reads: counters.failedReads,
      failed_writes: counters.failedWrites,
      invalid_io: counters.invalid,
      notify_free: counters.notifyFree,
      pages_zero: usage.sameFilled,
      good_compress_pct: percent(sums.good),
      pages_expand_pct: percent(sums.huge),
      pages_stored: sums.pages,
      pages_used: Math.ceil(sums.usedBytes / pageBytes),
      orig_data_size: sums.pages * pageBytes,
      compr_data_size: sums.bytes,
      mem_used_total: sums.usedBytes,
      bdev_num_reads: sums.reads,
      bdev_num_writes: sums.writes,
    }
  }

  /** All of it, with the tree of the stack at the end. */
  tree(state: DeviceState, stack: StatsNode): StatsNode {
    const usage = this.#usage()
    const { counters } = this
    const all = this.ramzswapStats(state, usage)
    const sums = this.#sums(usage)
    const slots = state.sizeBytes / pageBytes
    const known = usage.sameFilled + sums.hypervisor + sums.pages + sums.backing
    const section = (name: string, values: Record<string, number>, children: readonly StatsNode[] = []): StatsNode => ({
      name,
      counters: values,
      children,
    })
    return {
      name: state.name,
      counters: { ...all },
      children: [
        section('mm_stat', {
          orig_data_size: all.orig_data_size,
          compr_data_size: all.compr_data_size,
          mem_used_total: all.mem_used_total,
          mem_limit: all.memlimit,
          mem_used_max: this.#mostUsed,
          same_pages: all.pages_zero,
          pages_compacted: sums.compacted,
          huge_pages: sums.huge,
          huge_pages_since: sums.hugeSince,
        }),
        section('io_stat', {
          failed_reads: all.failed_reads,
          failed_writes: all.failed_writes,
          invalid_io: all.invalid_io,
          notify_free: all.notify_free,
        }),
        section('bd_stat', {
          bd_count: sums.backing,
          bd_reads: sums.reads,
          bd_writes: sums.writes,
          writeback_limit_enable: state.writebackLimit === undefined ? 0 : 1,
          writeback_limit: state.writebackLimit ?? 0,
        }),
        section('slots', {
          slots,
          empty: slots - state.heldPages,
          same_filled: usage.sameFilled,
          hypervisor: sums.hypervisor,
          compressed: sums.pages - sums.huge,
          uncompressed: sums.huge,
          backing: sums.backing,
          lost: state.heldPages - known,
          stored: counters.stored,
          overwritten: counters.overwritten,
          freed: counters.freed,
          cut_off: counters.cutOff,
          written_back: state.writtenBack,
          recalled: state.recalled,
          recall_failed: state.recallFailed,
          recompressed: sums.recompressed,
          recompress_poor: sums.recompressPoor,
        }),
        section(
          'places',
          {},
          usage.places.map((place, n) => section(place.name, this.#countersOf(place, n))),
        ),
        stack,
      ],
    }
  }

  /** What came and went there since the device counts; and what is there. */
  #countersOf(place: PlaceUsage, n: number): Record<string, number> {
    const since = this.#since(place, n)
    return {
      pages: place.pages,
      bytes: place.bytes,
      huge_pages: place.huge,
      used_bytes: place.usedBytes,
      foreign: place.foreign ? 1 : 0,
      waits: place.waits ? 1 : 0,
      put: since.put,
      sunk: since.sunk,
      rose: since.rose,
      passed_down: since.passedDown,
      raised: since.raised,
      gone: since.gone,
      refused: since.refused,
      writes: since.writes,
      reads: since.reads,
    }
  }

  #since(place: PlaceUsage, n: number): Record<(typeof growing)[number], number> {
    const before = this.#before[n]
    const since = {} as Record<(typeof growing)[number], number>
    for (const name of growing) since[name] = place[name] - (before?.[name] ?? 0)
    return since
  }

  #sums({ places }: StackUsage) {
    const sums = { pages: 0, bytes: 0, huge: 0, good: 0, usedBytes: 0, hypervisor: 0, backing: 0 }
    const counted = { reads: 0, writes: 0, hugeSince: 0, compacted: 0, recompressed: 0, recompressPoor: 0 }
    for (const [n, place] of places.entries()) {
      const since = this.#since(place, n)
      if (place.foreign) sums.hypervisor += place.pages
      else if (place.waits) {
        sums.backing += place.pages
        counted.reads += since.reads
        counted.writes += since.writes
      } else {
        for (const name of ['pages', 'bytes', 'huge', 'good', 'usedBytes'] as const) sums[name] += place[name]
        counted.compacted += since.compacted
        counted.recompressed += since.recompressed
        counted.recompressPoor += since.recompressPoor
      }
      if (!place.foreign) counted.hugeSince += since.putHuge
    }
    if (sums.usedBytes > this.#mostUsed) this.#mostUsed = sums.usedBytes
    return { ...sums, ...counted }
  }
}
