/**
 * The metric of each counter of a server for Prometheus: its name with the unit, a sentence of help, and labels.
 *
 * Counters lie in sections of the tree of statistics (`tmem stat --json`). Each table below is for one kind of section
 * and gives the metric of each counter, or the reason why there is none (`same`: another counter has the value).
 * Several counters may be one metric with different labels. Metrics whose names end in `_total` only grow; all others
 * are gauges.
 *
 * Invariants (asserted by tests): every counter of the program's own layers and servers is in a table; a metric has the
 * same help and labels everywhere; `promtool check metrics` finds no fault.
 *
 * Source: Prometheus, "Metric and label naming". The code that counts says what a counter means.
 */

/** A metric that a counter is part of. */
export interface Described {
  /** Name without the prefix `tmem_`. */
  readonly name: string
  readonly help: string
  /** Labels beside those of the section. */
  readonly labels?: Readonly<Record<string, string>>
  /** What the counter is multiplied by: 0.01 for percent. */
  readonly scale?: number
}

/** The counters of one kind of section. */
export type Table = Readonly<Record<string, Described | 'same'>>

const metric = (name: string, help: string, labels?: Readonly<Record<string, string>>): Described =>
  labels === undefined ? { name, help } : { name, help, labels }

/** Several counters that are one metric: their values for one label, by counter. */
function each(name: string, help: string, label: string, counters: readonly string[], prefix = ''): Table {
  return Object.fromEntries(
    counters.map((counter) => [counter, metric(name, help, { [label]: counter.slice(prefix.length) })]),
  )
}

const same = (...counters: string[]): Table => Object.fromEntries(counters.map((counter) => [counter, 'same' as const]))

/** The device itself: GET_STATS of ramzswap. Labels: device. */
export const deviceTable: Table = {
  memlimit: metric('device_memory_limit_bytes', 'Limit on the memory for pages of the device, 0: none of its own.'),
  disksize: metric('device_size_bytes', 'Size of the device.'),
  num_reads: metric('device_reads_total', 'Pages, or parts of pages, that were read.'),
  num_writes: metric('device_writes_total', 'Pages, or parts of pages, that were written.'),
  ...each(
    'device_failures_total',
    'Reads and writes of pages that failed.',
    'operation',
    ['failed_reads', 'failed_writes'],
    'failed_',
  ),
  invalid_io: metric('device_invalid_requests_total', 'Requests outside of the device, or not in whole blocks.'),
  notify_free: metric('device_discarded_pages_total', 'Pages that were discarded, as a kernel does with freed slots.'),
  good_compress_pct: {
    name: 'device_good_compression_ratio',
    help: 'Share of the pages in memory that take at most half a page.',
    scale: 0.01,
  },
  pages_expand_pct: {
    name: 'device_incompressible_ratio',
    help: 'Share of the pages in memory that do not shrink.',
    scale: 0.01,
  },
  pages_stored: metric('device_memory_pages', "Pages in memory of the device's own places."),
  orig_data_size: metric('device_original_bytes', 'Bytes of the pages in memory, before they were compressed.'),
  compr_data_size: metric(
    'device_compressed_bytes',
    'Bytes that the pages in memory take, compressed where they shrink.',
  ),
  mem_used_total: metric('device_memory_used_bytes', 'Memory that the places of the device use, metadata included.'),
  bdev_num_reads: metric('device_backing_reads_total', 'Pages that were read from a place that waits.'),
  bdev_num_writes: metric('device_backing_writes_total', 'Pages that were written to a place that waits.'),
  ...same('pages_zero', 'pages_used'),
}

const changed = 'Changes of pages: stored, overwritten, freed (discarded or zeroed), cut off by a smaller size.'
const asked = 'Pages that knobs moved: written back, recalled from a hypervisor, and recalls that failed.'
const again = 'Pages that were compressed again: they take less now (smaller), or not (poor).'

/** Sections of a device. Labels: device. */
export const sectionTables: Readonly<Record<string, Table>> = {
  mm_stat: {
    mem_used_max: metric('device_memory_used_max_bytes', 'The most memory that the places have used.'),
    pages_compacted: metric('device_compacted_pages_total', 'Pages that were compacted to free memory.'),
    huge_pages_since: metric('device_incompressible_pages_total', 'Pages that were stored and did not shrink.'),
    ...same('orig_data_size', 'compr_data_size', 'mem_used_total', 'mem_limit', 'same_pages', 'huge_pages'),
  },
  io_stat: same('failed_reads', 'failed_writes', 'invalid_io', 'notify_free'),
  bd_stat: {
    writeback_limit_enable: metric(
      'device_writeback_limit_enabled',
      '1: the knob writeback may move a number of pages only.',
    ),
    writeback_limit: metric(
      'device_writeback_limit_pages',
      'Pages that the knob writeback may still move, if limited.',
    ),
    ...same('bd_count', 'bd_reads', 'bd_writes'),
  },
  slots: {
    ...each('device_pages', 'Pages of the device by location; their sum is its size.', 'state', [
      'empty',
      'same_filled',
      'hypervisor',
      'compressed',
      'uncompressed',
      'backing',
      'lost',
    ]),
    ...each('device_page_changes_total', changed, 'change', ['stored', 'overwritten', 'freed', 'cut_off']),
    ...each('device_asked_moves_total', asked, 'move', ['written_back', 'recalled', 'recall_failed']),
    recompressed: metric('device_recompressed_pages_total', again, { outcome: 'smaller' }),
    recompress_poor: metric('device_recompressed_pages_total', again, { outcome: 'poor' }),
    ...same('slots'),
  },
  snapshot: {
    image_bytes: metric('snapshot_image_bytes', 'Size of the image.'),
    writethrough: metric('snapshot_writethrough', '1: a write is in the image before it is acknowledged.'),
    dirty_pages: metric(
      'snapshot_dirty_pages',
      'Pages that differ from the image: lost if the server were killed now.',
    ),
    unsynced_pages: metric('snapshot_unsynced_pages', 'Pages written to the image since its last sync began.'),
    filled_pages: metric('snapshot_filled_pages', 'Pages of the image that are not all zeros.'),
    loaded_pages: metric('snapshot_loaded_pages_total', 'Pages that were read from the image at the start.'),
    saved_pages: metric('snapshot_saved_pages_total', 'Pages that were written to the image.'),
    flushes: metric('snapshot_flushes_total', 'Flushes that were requested.'),
    failures: metric('snapshot_failures_total', 'Flushes, or writes to the image, that failed.'),
  },
}

/** Where pages rest: a section of each place. Labels: device, place. */
export const placeTable: Table = {
  pages: metric('place_pages', 'Blocks in the place: pages, or parts of pages of more than 64 KiB.'),
  bytes: metric('place_bytes', 'Bytes of the blocks; for a place that waits, headers and rounding included.'),
  huge_pages: metric('place_incompressible_pages', 'Blocks that do not shrink.'),
  used_bytes: metric(
    'place_memory_used_bytes',
    'Memory that the place has taken, metadata included; 0 where it waits.',
  ),
  foreign: metric('place_foreign', '1: its memory belongs to a hypervisor.'),
  waits: metric('place_waits', '1: the place may have to wait for a disk or another machine.'),
  ...same('put', 'sunk', 'rose', 'passed_down', 'raised', 'gone', 'refused', 'writes', 'reads'),
}

const ended = 'Pages that ended, by reason: replaced, refused anew, got, flushed, dropped, damaged.'
const compressions = 'Pages that were compressed: when they were put (put), and again on their way (again).'
const costs = 'Bytes of metadata of the chain for each page anywhere, each page in memory, and each object.'

/** The stack of a device: the chain that knows where each page is. Labels: device. */
export const chainTable: Table = {
  puts: metric('chain_puts_total', 'Pages that were put: stored and refused.'),
  stored: metric('chain_stored_pages_total', 'Pages that were put, and taken.'),
  recovered: metric('chain_recovered_pages_total', 'Pages that an earlier run had left.'),
  ...each('chain_ended_pages_total', ended, 'reason', [
    'replaced',
    'put_to_flush',
    'got',
    'flushed',
    'dropped',
    'corrupt_dropped',
  ]),
  gets: metric('chain_gets_total', 'Gets of pages.'),
  hits: metric('chain_hits_total', 'Gets that found their page.'),
  deferred: metric('chain_deferred_gets_total', 'Gets of pages in a place that waits, which are then fetched.'),
  fetched: metric('chain_fetched_blocks_total', 'Blocks that a fetch waited for.'),
  unchanged_puts: metric('chain_unchanged_puts_total', 'Puts of pages that their caller had not changed.'),
  released: metric(
    'chain_released_pages_total',
    'Pages whose copy in memory was dropped because a lower place has another.',
  ),
  pages: metric('chain_pages', 'Pages in the stack.'),
  blocks: metric('chain_blocks', 'Entries of the directory.'),
  same_filled_pages: metric('chain_same_filled_pages', 'Pages that repeat one word of 32 bits, and take no place.'),
  clean_copies: metric(
    'chain_clean_copies',
    'Pages in memory with a clean copy in a lower place: they can sink without a write.',
  ),
  objects: metric('chain_objects', 'Objects with a page.'),
  encoded: metric('chain_compressed_pages_total', compressions, { when: 'put' }),
  encoded_again: metric('chain_compressed_pages_total', compressions, { when: 'again' }),
  decoded_to_move: metric('chain_decompressed_to_move_total', 'Pages that were decompressed in order to be moved.'),
  charged_bytes: metric('chain_charged_bytes', 'Bytes that are charged to clients.'),
  metadata_bytes: metric('chain_metadata_bytes', 'Bytes of the directory that were ever touched.'),
  bytes_per_page: metric('chain_entry_bytes', costs, { of: 'page' }),
  bytes_per_resident: metric('chain_entry_bytes', costs, { of: 'page_in_memory' }),
  bytes_per_object: metric('chain_entry_bytes', costs, { of: 'object' }),
}

/** Refusals, by reason: of the whole stack (labels: device), and of a place (labels: device, place). */
export const refusedPuts: Described = metric('chain_refused_puts_total', 'Pages that were refused, by reason.')
export const refusedBlocks: Described = metric(
  'place_refused_blocks_total',
  'Blocks that the place refused, by reason.',
)

/** The counters of each kind of place, by its name. Labels: device, place. */
export const ownTables: Readonly<Record<string, Table>> = {
  zcache: {
    limit_bytes: metric('place_limit_bytes', 'Limit on the memory of the place.'),
    metadata_bytes: metric('place_metadata_bytes', 'Memory of the place that does not hold blocks: tables.'),
    directory_bytes: metric(
      'place_directory_bytes',
      "Memory that the chain's metadata takes of the limit of the place.",
    ),
    zpages: metric('zcache_blocks', 'Blocks in zcache.'),
    zbytes: metric('zcache_block_bytes', 'Bytes of the blocks in zcache.'),
    orig_bytes: metric('zcache_original_bytes', 'Bytes of the pages in zcache, uncompressed.'),
    raw_pages: metric('zcache_uncompressed_blocks', 'Blocks that are stored raw.'),
    slot_bytes: metric('zcache_slot_bytes', 'Bytes of the slots of the blocks in the chunks.'),
    pages_compacted: metric('zcache_compacted_blocks_total', 'Blocks that were moved together.'),
    compress_poor: metric('zcache_poor_compressions_total', 'Pages that did not shrink enough.'),
    mean_compress_poor: metric(
      'zcache_poor_mean_refusals_total',
      'Blocks that were refused because the mean size was too large.',
    ),
    rejected_page_count: metric(
      'zcache_rejected_blocks_total',
      'Blocks that were refused because of the limit on pages.',
    ),
    pool_limit_hit: metric('zcache_limit_hits_total', 'Blocks that were refused because of the limit.'),
    failed_alloc: metric('zcache_allocation_failures_total', 'Blocks for which there was no slot.'),
    failed_getfreepages: metric('zcache_chunk_failures_total', 'Chunks that could not be allocated.'),
  },
  memory: {
    limit_bytes: metric('place_limit_bytes', 'Limit on the memory of the place.'),
    metadata_bytes: metric('place_metadata_bytes', 'Memory of the place that does not hold blocks: tables.'),
    directory_bytes: metric(
      'place_directory_bytes',
      "Memory that the chain's metadata takes of the limit of the place.",
    ),
    frames: metric('memory_frames', 'Most frames that the place may have.'),
    used_frames: metric('memory_used_frames', 'Frames in use.'),
    chunks: metric('memory_chunks', 'Chunks of frames.'),
    moved_pages: metric('memory_moved_blocks_total', 'Blocks that were moved together.'),
    refused_no_memory: metric('memory_refused_blocks_total', 'Blocks that were refused, by cause.', { why: 'limit' }),
    refused_allocation: metric('memory_refused_blocks_total', 'Blocks that were refused, by cause.', {
      why: 'allocation',
    }),
  },
  frontswap: {
    slots: metric('frontswap_slots', 'Pages for which the file is sure to have room.'),
    used_slots: metric('frontswap_used_slots', 'Frames in the file.'),
    used_bytes_on_disk: metric('frontswap_used_bytes', 'Bytes of the file that frames take.'),
    room_bytes_on_disk: metric('frontswap_room_bytes', 'Bytes of the file that frames can take.'),
    free_clusters: metric('frontswap_free_clusters', 'Empty clusters of the file.'),
    directIo: metric('frontswap_direct_io', "1: the file is read and written around the system's cache."),
    ...frontswapTransfers(),
    clusteredWrites: metric('frontswap_clustered_writes_total', 'Writes of many frames side by side.'),
    holeWrites: metric('frontswap_hole_writes_total', 'Writes into holes between frames.'),
    forcedBytesWritten: metric('frontswap_forced_written_bytes_total', 'Bytes written because a put could not wait.'),
    packedFrames: metric('frontswap_packed_frames_total', 'Frames that were moved together.'),
    packedBytes: metric('frontswap_packed_bytes_total', 'Bytes of the frames that were moved together.'),
    ...each('frontswap_errors_total', 'Reads and writes of the file that failed.', 'operation', [
      'readErrors',
      'writeErrors',
    ]),
    fragmented: metric(
      'frontswap_fragmented_total',
      'Flights for which other frames had to be written again to make room.',
    ),
    map_bytes: metric('frontswap_map_bytes', 'Memory for the map of the file.'),
    ...same('frames'),
  },
  spill: {
    live: metric('spill_live_records', 'Records in the file whose page is in the stack.'),
    left: metric('spill_left_records', 'Records of an earlier run without a get so far.'),
    ...each('spill_records_total', 'Changes of records.', 'change', [
      'written',
      'recovered',
      'overwritten',
      'erased',
      'forgotten',
    ]),
    ...each('spill_damaged_total', 'Records, and frames, that were found damaged.', 'what', [
      'damaged_records',
      'corrupt_frames',
    ]),
    ...each('spill_errors_total', 'Reads and writes of the file that failed.', 'operation', [
      'read_errors',
      'write_errors',
    ]),
    ring_writes: metric('spill_writes_total', 'Writes to the ring.'),
    written_bytes: metric('spill_written_bytes_total', 'Bytes written to the file.'),
    read_bytes: metric('spill_read_bytes_total', 'Bytes read from the file.'),
    records: metric('spill_record_limit', 'Records that the file has room for.'),
    ring_bytes: metric('spill_ring_bytes', 'Bytes of the ring of frames.'),
    abandoned: metric('spill_abandoned', '1: the file failed and is no longer used.'),
  },
  vram: vramTable(),
  ramster: {
    ...each('ramster_sent_blocks_total', 'Blocks that were sent to other machines, by kind.', 'kind', [
      'eph_pages_remoted',
      'pers_pages_remoted',
    ]),
    ...each('ramster_refused_blocks_total', 'Blocks that no other machine took, by kind.', 'kind', [
      'eph_pages_remote_failed',
      'pers_pages_remote_failed',
    ]),
    ...each('ramster_blocks', 'Blocks on other machines, by kind.', 'kind', ['remote_eph_pages', 'remote_pers_pages']),
    ...each('ramster_gets_total', 'Reads of blocks on other machines, by outcome.', 'outcome', [
      'remote_eph_pages_succ_get',
      'remote_pers_pages_succ_get',
      'remote_eph_pages_unsucc_get',
      'remote_pers_pages_unsucc_get',
    ]),
    remote_pages_flushed: metric('ramster_flushed_blocks_total', 'Blocks that were deleted on other machines.'),
    remote_page_flushes_failed: metric(
      'ramster_failed_flushes_total',
      'Blocks that could not be deleted on other machines.',
    ),
    ...each('ramster_copies_total', 'Copies that reads tried, by their state.', 'copy', [
      'second_copies_read',
      'damaged_copies',
      'missing_copies',
      'healed_copies',
    ]),
    waited_reads: metric(
      'ramster_waited_reads_total',
      'Reads that had to wait because no machine with a copy answered.',
    ),
    relieved_blocks: metric(
      'ramster_relieved_blocks_total',
      'Blocks that were moved off machines that wanted memory back.',
    ),
    repatriated_blocks: metric('ramster_repatriated_blocks_total', 'Blocks that were taken back from machines.'),
    size_bytes: metric('ramster_size_bytes', 'Bytes that may be lent.'),
    one_copy_only: metric('ramster_one_copy_blocks', 'Blocks of persistent pages with only one copy.'),
    lost: metric('ramster_lost_blocks', 'Blocks of persistent pages without any copy.'),
    pending_flushes: metric('ramster_pending_flushes', 'Blocks that are still to be deleted.'),
    machines_open: metric('ramster_open_machines', 'Machines that answer.'),
    degraded: metric('ramster_degraded', '1: too few machines answer for new blocks.'),
    table_bytes: metric('ramster_table_bytes', 'Memory for the table of blocks.'),
    used_bytes: metric('ramster_lent_bytes', 'Bytes that are lent.'),
  },
}

function vramTable(): Table {
  return {
    flights: metric('vram_flights_total', 'Transfers of many blocks to the device.'),
    written: metric('vram_written_blocks_total', 'Blocks that were written to the device.'),
    refused: metric('vram_refused_blocks_total', 'Blocks that the device had no room for.'),
    read: metric('vram_read_blocks_total', 'Blocks that were read from the device.'),
    read_batches: metric('vram_read_batches_total', 'Reads of the device, of one block or several.'),
    copies_read: metric('vram_copies_read_total', 'Blocks that were read from the copy beside the device.'),
    devices_lost: metric('vram_lost_devices_total', 'Times that the device was lost.'),
    blocks: metric('vram_blocks', 'Blocks on the device.'),
    device_bytes: metric('vram_device_bytes', 'Bytes of the device that are allocated.'),
    limit_bytes: metric('place_limit_bytes', 'Limit on the memory of the place.'),
    device_open: metric('vram_device_open', '1: the device works.'),
    used_bytes: metric('vram_used_bytes', 'Bytes of the blocks on the device.'),
  }
}

function frontswapTransfers(): Table {
  return {
    diskReads: metric('frontswap_reads_total', 'Reads of the file.'),
    diskWrites: metric('frontswap_writes_total', 'Writes of the file.'),
    diskBytesRead: metric('frontswap_read_bytes_total', 'Bytes read from the file.'),
    diskBytesWritten: metric('frontswap_written_bytes_total', 'Bytes written to the file.'),
  }
}

const cameIn = 'Blocks that came into the place, by reason.'
const wentOut = 'Blocks that left the place, by reason.'

/** Sections of a place in the chain. Labels: device, place. */
export const seatTables: Readonly<Record<string, Table>> = {
  moves: {
    ...each('place_in_blocks_total', cameIn, 'reason', ['put', 'sunk_in', 'sunk_clean', 'rose', 'recovered']),
    ...each('place_out_blocks_total', wentOut, 'reason', [
      'passed_down',
      'dropped_clean',
      'released',
      'raised',
      'gone',
    ]),
    dropped_ephemeral: metric(
      'place_dropped_ephemeral_blocks_total',
      'Ephemeral blocks that were dropped to make room.',
    ),
    compacted: metric('place_compacted_blocks_total', 'Blocks that were moved together.'),
    recompressed_pages: metric('place_recompressed_blocks_total', again, { outcome: 'smaller' }),
    recompress_poor: metric('place_recompressed_blocks_total', again, { outcome: 'poor' }),
    recompress_saved_bytes: metric('place_recompress_saved_bytes_total', 'Bytes saved by recompression.'),
    used_in_flight: metric('place_used_in_flight_blocks_total', 'Blocks that were used while they were on their way.'),
    cleaned: metric('place_cleaned_blocks_total', 'Blocks that were written ahead and stay in the place above.'),
    corrupt: metric('place_corrupt_blocks_total', 'Blocks that were found damaged.'),
    flights: metric('place_flights_total', 'Transfers of many blocks to the place.'),
    forced_flights: metric('place_forced_flights_total', 'Transfers that a put had to wait for.'),
    failed_flights: metric('place_failed_flights_total', 'Transfers that failed.'),
    frames: metric('place_written_blocks_total', 'Blocks that transfers carried.'),
    frame_bytes: metric('place_written_bytes_total', 'Bytes that transfers carried.'),
    reads: metric('place_read_blocks_total', 'Blocks that were read.'),
    failed_reads: metric('place_failed_reads_total', 'Reads that failed.'),
    stale_reads: metric('place_stale_reads_total', 'Reads whose page had changed meanwhile.'),
    resting: metric('place_resting_attempts', 'Attempts that are still skipped after a failure of the place.'),
  },
  order: {
    main_pages: metric('place_queue_blocks', 'Blocks in memory, by queue.', { queue: 'main' }),
    probation_pages: metric('place_queue_blocks', 'Blocks in memory, by queue.', { queue: 'probation' }),
    ephemeral_pages: metric('place_queue_blocks', 'Blocks in memory, by queue.', { queue: 'ephemeral' }),
    main_bytes: metric('place_queue_bytes', 'Bytes of the blocks in memory, by queue.', { queue: 'main' }),
    probation_bytes: metric('place_queue_bytes', 'Bytes of the blocks in memory, by queue.', { queue: 'probation' }),
    ephemeral_bytes: metric('place_queue_bytes', 'Bytes of the blocks in memory, by queue.', { queue: 'ephemeral' }),
    probation_share_percent: {
      name: 'place_probation_share_ratio',
      help: 'Share of the bytes that pages on probation may have.',
      scale: 0.01,
    },
    refaults_main: metric('place_refaults_total', 'Blocks that came back soon after they sank, by queue.', {
      queue: 'main',
    }),
    refaults_probation: metric('place_refaults_total', 'Blocks that came back soon after they sank, by queue.', {
      queue: 'probation',
    }),
  },
  zsmalloc: {
    zspages: metric('zsmalloc_zspages', 'Runs of memory for blocks of one size.'),
    large_objects: metric('zsmalloc_large_blocks', 'Blocks with a run of their own.'),
    objects_moved: metric('zsmalloc_moved_blocks_total', 'Blocks that were moved together.'),
    zspages_compacted: metric('zsmalloc_freed_zspages_total', 'Runs that compaction freed.'),
    ...same('slot_bytes'),
  },
  zbud: {
    pageframes: metric('zbud_frames', 'Frames in use.'),
    pageframes_max: metric('zbud_frames_max', 'The most frames that were in use.'),
    buddied_count: metric('zbud_buddied_frames', 'Frames by their number of blocks.', { blocks: '2' }),
    unbuddied_count: metric('zbud_buddied_frames', 'Frames by their number of blocks.', { blocks: '1' }),
    cumul_zpages: metric('zbud_stored_blocks_total', 'Blocks that were stored.'),
    cumul_zbytes: metric('zbud_stored_bytes_total', 'Bytes of the blocks that were stored.'),
    ...same('zpages', 'slot_bytes'),
  },
  xvmalloc: {
    pageframes: metric('xvmalloc_frames', 'Frames in use.'),
    free_blocks: metric('xvmalloc_free_blocks', 'Free pieces between blocks.'),
    ...same('zpages', 'slot_bytes'),
  },
  zv: {
    curr_mean_zsize: metric('zcache_mean_block_bytes', 'Mean size of the blocks, for each 4 KiB of page.'),
    max_zsize: metric('zcache_max_block_bytes', 'Largest block that is taken.'),
    max_mean_zsize: metric('zcache_max_mean_block_bytes', 'Mean above which larger blocks are refused.'),
    ...same('curr_zpages', 'curr_zbytes'),
  },
  arena: {
    chunks: metric('zcache_chunks', 'Chunks of memory.'),
    chunk_bytes: metric('zcache_chunk_bytes', 'Bytes of the chunks.'),
    spare_chunks: metric('zcache_spare_chunks', 'Empty chunks.'),
    chunks_taken: metric('zcache_taken_chunks_total', 'Chunks that were taken from the system.'),
    chunks_returned: metric('zcache_returned_chunks_total', 'Chunks that were given back to the system.'),
    runs: metric('zcache_runs', 'Runs in the chunks.'),
    run_bytes: metric('zcache_run_bytes', 'Bytes of the runs.'),
    runs_moved: metric('zcache_moved_runs_total', 'Runs that were moved together.'),
    wasted_bytes: metric('zcache_wasted_bytes', 'Bytes of the chunks outside of slots in use.'),
  },
  seal: {
    sealed: metric('seal_sealed_blocks_total', 'Blocks that were encrypted.'),
    opened: metric('seal_opened_blocks_total', 'Blocks that were decrypted.'),
    corrupt: metric('seal_corrupt_blocks_total', 'Blocks whose seal did not match.'),
    blocks: metric('seal_blocks', 'Sealed blocks.'),
    table_bytes: metric('seal_table_bytes', 'Memory for the table of sealed blocks.'),
  },
}

/** Sections whose counters have numbers as names, and the label of that number. Labels: device, place, and this one. */
export const distributions: Readonly<Record<string, readonly [described: Described, label: string]>> = {
  curr_dist_counts: [metric('zcache_size_blocks', 'Blocks by their size, in units of the distribution.'), 'size'],
  cumul_dist_counts: [metric('zcache_size_stored_blocks_total', 'Blocks that were stored, by their size.'), 'size'],
  unbuddied_list_counts: [metric('zbud_unbuddied_frames', 'Frames with one block, by its size in chunks.'), 'chunks'],
  cumul_chunk_counts: [
    metric('zbud_size_stored_blocks_total', 'Blocks that were stored, by their size in chunks.'),
    'chunks',
  ],
}

/** A machine that lends memory. Labels: device, place, machine. */
export const machineTable: Table = {
  open: metric('machine_open', '1: the machine answers.'),
  blocks: metric('machine_blocks', 'Blocks on the machine.'),
  lost_with_it: metric('machine_lost_with_it_blocks', 'Blocks that would be lost with the machine now.'),
  vanish_with_it: metric(
    'machine_vanish_with_it_blocks',
    'Blocks of ephemeral pages that would vanish with the machine now.',
  ),
  lost_content: metric('machine_lost_content_total', 'Times that the machine came back without its blocks.'),
  leaving: metric('machine_leaving', '1: the machine is to leave and gets no new blocks.'),
  wanted_back_bytes: metric('machine_wanted_back_bytes', 'Bytes that the machine wants back.'),
  free_bytes: metric('machine_free_bytes', 'Bytes that the machine may still lend.'),
}

/** A file that is served through a page cache, by section. Labels: device. */
export const pageCacheTables: Readonly<Record<string, Table>> = {
  file: { file_bytes: metric('page_cache_file_bytes', 'Size of the file.') },
  'page-cache': {
    hits: metric('page_cache_hits_total', 'Reads of pages that were in the first level.'),
    misses: metric('page_cache_misses_total', 'Reads of pages that were not in the first level.'),
    readaheadPages: metric('page_cache_readahead_pages_total', 'Pages that were read ahead.'),
    readaheadHits: metric('page_cache_readahead_hits_total', 'Pages read ahead that were then used.'),
    diskReads: metric('page_cache_reads_total', 'Reads of the file.'),
    diskPagesRead: metric('page_cache_read_pages_total', 'Pages that were read from the file.'),
    diskBytesRead: metric('page_cache_read_bytes_total', 'Bytes that were read from the file.'),
    uncachedReads: metric('page_cache_uncached_reads_total', 'Reads that found no free frame and bypassed the cache.'),
    diskWrites: metric('page_cache_writes_total', 'Writes of the file.'),
    diskBytesWritten: metric('page_cache_written_bytes_total', 'Bytes that were written to the file.'),
    foreignChanges: metric('page_cache_foreign_changes_total', 'Times that another program had changed the file.'),
    unsettledDrops: metric(
      'page_cache_unsettled_drops_total',
      'Times that pages were dropped because the file had changed too recently.',
    ),
    ...each('page_cache_errors_total', 'Failures, by kind.', 'what', ['readErrors', 'writeErrors', 'cleancacheErrors']),
    resident: metric('page_cache_pages', 'Pages in the first level.'),
    active: metric('page_cache_list_pages', 'Pages in the first level, by list.', { list: 'active' }),
    inactive: metric('page_cache_list_pages', 'Pages in the first level, by list.', { list: 'inactive' }),
    activations: metric('page_cache_activations_total', 'Pages that were used again.'),
    deactivations: metric('page_cache_deactivations_total', 'Pages that were not used any more.'),
    evictions: metric('page_cache_evictions_total', 'Pages that were evicted from the first level.'),
    inodes: metric('page_cache_files', 'Files that are remembered.'),
  },
  'direct-reads': {
    directReads: metric('page_cache_direct_reads_total', "Reads that bypassed the system's cache."),
    directBytes: metric('page_cache_direct_read_bytes_total', "Bytes of reads that bypassed the system's cache."),
    bufferedReads: metric(
      'page_cache_buffered_reads_total',
      "Reads of whole pages that could not bypass the system's cache.",
    ),
    refusedFiles: metric('page_cache_refused_files_total', "Files whose reads cannot bypass the system's cache."),
    refusedDevices: metric(
      'page_cache_refused_devices',
      "Devices whose files' reads cannot bypass the system's cache.",
    ),
  },
  cleancache: {
    succ_gets: metric('cleancache_gets_total', 'Gets from the second chance, by outcome.', {
      outcome: 'hit',
    }),
    failed_gets: metric('cleancache_gets_total', 'Gets from the second chance, by outcome.', {
      outcome: 'miss',
    }),
    puts: metric('cleancache_puts_total', 'Pages that were offered to the second chance.'),
    invalidates: metric('cleancache_invalidates_total', 'Pages, or files, that were invalidated in the second chance.'),
  },
}

/** The NBD server as a whole. No labels. */
export const nbdTable: Table = {
  connections: metric('nbd_connections', 'Connections.'),
  accepted: metric('nbd_accepted_connections_total', 'Connections that were accepted.'),
  negotiating: metric('nbd_negotiating_connections', 'Connections that are still negotiating.'),
  ...each(
    'nbd_refused_connections_total',
    'Clients that were refused, by reason.',
    'reason',
    ['refused_full', 'refused_address', 'refused_silent', 'refused_displaced', 'refused_tls'],
    'refused_',
  ),
  secured: metric('nbd_secured_connections_total', 'Connections on which TLS began.'),
  buffer_bytes: metric('nbd_buffer_bytes', 'Buffers in use.'),
  peak_buffer_bytes: metric('nbd_buffer_max_bytes', 'The most buffers that were in use.'),
  reserved_buffer_bytes: metric('nbd_buffer_reserved_bytes', 'Buffers that were reserved at the start.'),
  ...same('refused'),
}

const nbdRequests = 'Requests of NBD clients, by operation.'

/** An export of the NBD server. Labels: device. */
export const exportTable: Table = {
  connections: metric('nbd_export_connections', 'Connections that have the device open.'),
  reads: metric('nbd_requests_total', nbdRequests, { operation: 'read' }),
  writes: metric('nbd_requests_total', nbdRequests, { operation: 'write' }),
  flushes: metric('nbd_requests_total', nbdRequests, { operation: 'flush' }),
  trims: metric('nbd_requests_total', nbdRequests, { operation: 'trim' }),
  zeroes: metric('nbd_requests_total', nbdRequests, { operation: 'write_zeroes' }),
  caches: metric('nbd_requests_total', nbdRequests, { operation: 'cache' }),
  statuses: metric('nbd_requests_total', nbdRequests, { operation: 'block_status' }),
  resizes: metric('nbd_requests_total', nbdRequests, { operation: 'resize' }),
  bytesRead: metric('nbd_read_bytes_total', 'Bytes that clients have read.'),
  bytesWritten: metric('nbd_written_bytes_total', 'Bytes that clients have written.'),
  errors: metric('nbd_errors_total', 'Requests that were answered with an error.'),
}

/** A cache of values, by section. Labels: cache; those of a place: cache, place. */
export const valueCacheTables: Readonly<Record<string, Table>> = {
  cache: {
    entries: metric('cache_entries', 'Entries that are known; some of them may have expired.'),
    limit_bytes: metric('cache_limit_bytes', 'Memory that the cache may use.'),
    memory_bytes: metric('cache_memory_bytes', 'Memory that the cache uses, tables and keys included.'),
    table_bytes: metric('cache_table_bytes', 'Memory of tables, by content.', { of: 'entries' }),
    page_table_bytes: metric('cache_table_bytes', 'Memory of tables, by content.', { of: 'pages' }),
    window_bytes: metric('cache_window_bytes', 'Memory of uncompressed pages for reading.'),
    largest_bytes: metric('cache_largest_value_bytes', 'Size of the largest value that the cache can hold.'),
    hits: metric('cache_hits_total', 'Gets that found their value.'),
    sets: metric('cache_sets_total', 'Values that were set, refused ones included.'),
    deletes: metric('cache_deletes_total', 'Values that were deleted.'),
    kept: metric('cache_kept_entries_total', 'Entries that were written again because they were used.'),
    pages_read: metric('cache_read_pages_total', 'Pages that were brought to the window.'),
    pages_written: metric('cache_written_pages_total', 'Pages that were written to a place.'),
  },
  misses: each('cache_misses_total', 'Gets that did not find their value, by reason.', 'reason', [
    'absent',
    'evicted',
    'expired',
    'untagged',
    'collided',
    'vanished',
    'deferred',
  ]),
  evictions: each('cache_evicted_entries_total', 'Entries that were evicted, by reason.', 'reason', [
    'room',
    'expired',
    'refused',
    'vanished',
  ]),
  place: {
    pages: metric('cache_place_pages', 'Pages in the place.'),
    bytes: metric('cache_place_bytes', 'Bytes of the pages, as they are in the place.'),
    used_bytes: metric('cache_place_memory_used_bytes', 'Memory that the place has taken; 0 where it waits.'),
  },
  resp: {
    connections: metric('cache_connections', 'Clients that are connected.'),
    held_bytes: metric('cache_client_held_bytes', 'Bytes of incomplete requests and of answers that are not yet sent.'),
    accepted: metric('cache_connections_total', 'Clients that were accepted.'),
    refused_connections: metric(
      'cache_refused_connections_total',
      'Clients that were refused because there were too many.',
    ),
    overloads: metric('cache_ended_connections_total', 'Clients that were disconnected, by reason.', {
      reason: 'overload',
    }),
    protocol_errors: metric('cache_ended_connections_total', 'Clients that were disconnected, by reason.', {
      reason: 'protocol',
    }),
    commands: metric('cache_commands_total', 'Commands of clients.'),
    errors: metric('cache_command_errors_total', 'Commands that were answered with an error.'),
    refused_large: metric('cache_refused_writes_total', 'Writes of clients that were refused, by reason.', {
      reason: 'large',
    }),
    refused_room: metric('cache_refused_writes_total', 'Writes of clients that were refused, by reason.', {
      reason: 'room',
    }),
  },
}

/** Sets that a cache refused, by its own reason. Labels: cache, reason. */
export const refusedSets: Described = metric('cache_refused_sets_total', 'Values that the cache refused, by reason.')

/** The mount. No labels. */
export const fuseTable: Table = {
  errors: metric('fuse_errors_total', 'Requests that failed.'),
  bytes_read: metric('fuse_read_bytes_total', 'Bytes of devices that were read through the mount.'),
  bytes_written: metric('fuse_written_bytes_total', 'Bytes of devices that were written through the mount.'),
  in_flight: metric('fuse_requests_in_flight', 'Requests at work.'),
  open_texts: metric('fuse_open_texts', 'Statistics and knobs that are open.'),
}

/** Requests of the mount. Labels: operation, the kernel's. */
export const fuseRequests: Described = metric('fuse_requests_total', 'Requests of the kernel, by operation.')

/** The log of the server. No labels. */
export const logTable: Table = {
  ...each('log_lines_total', 'Lines that the server wrote, by level.', 'level', ['error', 'warn', 'info', 'debug']),
  suppressed: metric('log_suppressed_events_total', 'Events that were counted instead of logged.'),
  dropped: metric('log_dropped_lines_total', 'Lines that were dropped because nobody read them.'),
}

/** A counter of a layer that is not one of the program's own. Labels: those of its section, section, counter. */
export const otherCounter: Described = metric(
  'layer_value',
  'A counter of a layer that came with --modules, as the layer counts it.',
)

/** How long operations take. */
export const pageTimes = {
  name: 'page_duration_seconds',
  help: 'Time of a page in the stack, by operation (put, get, fetch) and place; one in 61 puts and gets is timed and counts for 61.',
}
export const moveTimes = {
  name: 'move_duration_seconds',
  help: 'Time of a transfer of many blocks to a place that waits.',
}
export const machineTimes = {
  name: 'machine_duration_seconds',
  help: 'Time until a lending machine has answered, by operation (put: a message with blocks; get: a block).',
}
export const requestTimes = {
  name: 'request_duration_seconds',
  help: 'Time that a device takes for a request of a server (nbd, fuse); a large request counts as several.',
}
