/**
 * What a stack says of itself: pages and bytes by place, moves by reason and direction, refusals by reason and place.
 */
import type { Blocks, ChainCounters } from './blocks.ts'
import {
  bytesPerObject,
  bytesPerPage,
  bytesPerResident,
  type Directory,
  EPHEMERAL,
  MAIN,
  PROBATION,
  samePlace,
} from './directory.ts'
import { putOutcomeCount, putOutcomeName } from './outcomes.ts'
import type { Seat } from './seat.ts'
import type { StackUsage, StatsNode } from './store.ts'

/** See `PageStore.usage`. */
export function usageOf({ directory, seats }: Blocks): StackUsage {
  return {
    sameFilled: directory.pages[samePlace]!,
    places: seats.map(({ number, place, memory, slow, foreign, counters, refused, failure }) => ({
      name: place.name,
      waits: slow !== undefined,
      survives: place.traits.survives,
      foreign,
      recompresses: memory?.stronger !== undefined,
      pages: directory.pages[number]!,
      bytes: directory.sizes[number]! * (slow?.unitBytes ?? 1),
      huge: directory.huge[number]!,
      good: directory.good[number]!,
      usedBytes: memory?.usedBytes ?? 0,
      put: counters.put,
      putHuge: counters.putHuge,
      sunk: counters.sunkIn + counters.sunkClean,
      rose: counters.rose,
      recovered: counters.recovered,
      passedDown: counters.passedDown + counters.droppedClean + counters.released,
      raised: counters.raised,
      gone: counters.gone,
      refused: refused.reduce((sum, one) => sum + one, 0),
      writes: slow === undefined ? 0 : counters.frames,
      reads: counters.reads,
      failed: counters.failedFlights + counters.failedReads,
      failure,
      compacted: counters.compacted,
      recompressed: counters.recompressed,
      recompressPoor: counters.recompressPoor,
    })),
  }
}

/** See `PageStore.stats`. `isShared`: the places are those of several chains, and say nothing of themselves here. */
export function statsOf(blocks: Blocks, isShared: boolean): StatsNode {
  const { directory, ledger, seats } = blocks
  const refused: Record<string, number> = {}
  for (let reason = 1; reason < putOutcomeCount; reason++)
    if (blocks.refused[reason]! > 0) refused[putOutcomeName(reason)] = blocks.refused[reason]!
  return {
    name: 'chain',
    counters: {
      ...blocks.counters,
      pages: pagesOf(blocks.counters),
      blocks: directory.table.size,
      same_filled_pages: directory.pages[samePlace]!,
      clean_copies: directory.copies,
      objects: directory.table.objects,
      encoded: ledger.encoded,
      encoded_again: ledger.encodedAgain,
      decoded_to_move: ledger.decoded,
      charged_bytes: chargedBytes(blocks),
      metadata_bytes: metadataBytes(directory),
      bytes_per_page: bytesPerPage,
      bytes_per_resident: bytesPerPage + bytesPerResident,
      bytes_per_object: bytesPerObject,
    },
    children: [
      { name: 'refused', counters: refused, children: [] },
      ...seats.map((seat) => seatStats(seat, directory, isShared)),
    ],
  }
}

/** What a place says of itself, and what the chain knows of it. */
function seatStats(seat: Seat, directory: Directory, isShared: boolean): StatsNode {
  const own = isShared ? { name: seat.place.name, counters: {}, children: [] } : seat.place.stats()
  const refused: Record<string, number> = {}
  for (let reason = 1; reason < putOutcomeCount; reason++)
    if (seat.refused[reason]! > 0) refused[putOutcomeName(reason)] = seat.refused[reason]!
  const { number, order, counters } = seat
  const queues =
    seat.memory === undefined
      ? []
      : [
          {
            name: 'order',
            counters: {
              main_pages: directory.queued(number, MAIN),
              main_bytes: directory.bytesOf(number, MAIN),
              probation_pages: directory.queued(number, PROBATION),
              probation_bytes: directory.bytesOf(number, PROBATION),
              ephemeral_pages: directory.queued(number, EPHEMERAL),
              ephemeral_bytes: directory.bytesOf(number, EPHEMERAL),
              probation_share_percent: Math.round(order.share * 100),
              refaults_main: order.mainRefaults,
              refaults_probation: order.probationRefaults,
            },
            children: [],
          },
        ]
  return {
    name: own.name,
    counters: {
      pages: directory.pages[number]!,
      block_bytes: directory.sizes[number]! * (seat.slow?.unitBytes ?? 1),
      huge_pages: directory.huge[number]!,
      ...own.counters,
    },
    children: [
      {
        name: 'moves',
        counters: {
          put: counters.put,
          sunk_in: counters.sunkIn,
          sunk_clean: counters.sunkClean,
          rose: counters.rose,
          recovered: counters.recovered,
          passed_down: counters.passedDown,
          dropped_clean: counters.droppedClean,
          released: counters.released,
          raised: counters.raised,
          gone: counters.gone,
          dropped_ephemeral: counters.droppedEphemeral,
          compacted: counters.compacted,
          recompressed_pages: counters.recompressed,
          recompress_poor: counters.recompressPoor,
          recompress_saved_bytes: counters.recompressSavedBytes,
          used_in_flight: counters.usedInFlight,
          cleaned: counters.cleaned,
          corrupt: counters.corrupt,
          flights: counters.flights,
          forced_flights: counters.forcedFlights,
          failed_flights: counters.failedFlights,
          frames: counters.frames,
          frame_bytes: counters.frameBytes,
          reads: counters.reads,
          failed_reads: counters.failedReads,
          stale_reads: counters.staleReads,
          resting: seat.rest,
        },
        children: [],
      },
      { name: 'refused', counters: refused, children: [] },
      ...queues,
      ...own.children,
    ],
  }
}

/** Pages that are here. */
export function pagesOf(counters: ChainCounters): number {
  const { stored, recovered, replaced, put_to_flush, got, flushed, dropped, corrupt_dropped } = counters
  return stored + recovered - replaced - put_to_flush - got - flushed - dropped - corrupt_dropped
}

/** Bytes that are charged to clients. */
function chargedBytes({ directory, seats }: Blocks): number {
  let bytes = directory.pages[samePlace]! * bytesPerPage
  for (const { number, memory, foreign } of seats)
    if (memory !== undefined && !foreign)
      for (const queue of [MAIN, PROBATION])
        bytes += directory.bytesOf(number, queue) + directory.queued(number, queue) * (bytesPerPage + bytesPerResident)
  return bytes
}

/** Bytes of the directory that were ever touched. */
function metadataBytes(directory: Directory): number {
  const { table } = directory
  return (
    table.entryWatermark * bytesPerPage +
    directory.residentWatermark * bytesPerResident +
    table.objectWatermark * bytesPerObject
  )
}
