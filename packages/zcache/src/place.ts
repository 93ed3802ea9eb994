/**
 * zcache as a place of a stack: compressed blocks in bounded memory.
 *
 * It finds each block a place of its size (zsmalloc) in an arena of chunks, all within one byte budget, and makes
 * blocks of pages (`block-codec.ts`). What rests here, for how long, and where it goes, is the chain's business.
 *
 * Invariants: `budget.used` counts chunks, tables as far as they were ever touched, and what the chain has charged; it
 * never passes the limit in force (a limit lowered later is reached as blocks leave).
 *
 * Sources: zcache of Linux 2.6.39 to 3.10 (its limits, as options), zsmalloc.
 */
import type {
  Block,
  BlockCodec,
  ByteLimit,
  LayerContext,
  MemoryPlace,
  MovedBlock,
  PlaceTraits,
  StatsNode,
} from '@tmem/core'
import { basePageSize, PutOutcome } from '@tmem/core'
import { Arena, ByteBudget, granuleBytes, none, type ZAllocator } from './arena.ts'
import { copyBytes } from './bytes.ts'

/** Sizes that the histograms tell apart: a 64th of the page each. */
const distUnits = 64

/**
 * The rules of the historical zcache, where they are wanted. DEVIATION: the mean is over ephemeral blocks, too: they
 * rest here as well.
 */
export interface ZvRules {
  /** Pages that do not shrink are taken as they are. */
  readonly keepsRaw: boolean
  /** Largest block that is taken of a persistent page, in bytes per 4 KiB of page. */
  readonly maxZsize: number | undefined
  /** While the mean of the blocks is above this, larger ones are refused; in bytes per 4 KiB of page. */
  readonly maxMeanZsize: number | undefined
  /** Pages, uncompressed, in percent of the limit at most. */
  readonly pageCountPercent: number | undefined
}

export class ZcachePlace implements MemoryPlace {
  readonly name = 'zcache'
  readonly traits: PlaceTraits
  readonly codec: BlockCodec
  readonly stronger?: BlockCodec
  readonly #budget: ByteBudget
  readonly #arena: Arena
  readonly #allocator: ZAllocator
  readonly #rules: ZvRules
  #blocks = 0
  #bytes = 0
  #rawBlocks = 0
  /** Bytes of the pages that they are made of. */
  #pageBytes = 0
  /** Blocks by size, those here and those that ever were (zv_curr_dist_counts, zv_cumul_dist_counts). */
  readonly #distribution: Float64Array = new Float64Array(distUnits + 1)
  readonly #cumulDistribution: Float64Array = new Float64Array(distUnits + 1)
  #compressPoor = 0
  #meanCompressPoor = 0
  #rejectedPageCount = 0
  #limitHit = 0
  /** Bytes in slots that are too many since a block found no room, until they are fewer. */
  #mark = Number.POSITIVE_INFINITY
  #failedAlloc = 0
  #compacted = 0
  #charged = 0
  /** The last `compact` found nothing to move, and nothing has left since. */
  #isTogether = false

  /** Throws `TmemError` (`TMEM_NO_MEMORY`) when the allocator has no memory for its tables. */
  constructor(
    limit: ByteLimit,
    codec: BlockCodec,
    stronger: BlockCodec | undefined,
    rules: ZvRules,
    allocator: (arena: Arena) => ZAllocator,
    traits: PlaceTraits,
    context: LayerContext,
  ) {
    this.traits = traits
    this.codec = codec
    if (stronger !== undefined) this.stronger = stronger
    this.#rules = rules
    this.#budget = new ByteBudget(limit)
    this.#arena = new Arena(context.allocator, this.#budget)
    this.#allocator = allocator(this.#arena)
  }

  get limitBytes(): number {
    return this.#budget.limit.bytes
  }

  get usedBytes(): number {
    return this.#budget.used
  }

  prepare(length: number): void {
    const { longestRun } = this.#allocator
    this.#arena.preload(longestRun, length <= basePageSize ? longestRun : length + (length >>> 2))
  }

  put(block: Block, owner: number): number {
    const refusal = this.#judge(block)
    if (refusal !== PutOutcome.Stored) return -refusal
    const location = this.#allocator.alloc(block.length, owner)
    if (location === none) return -this.#noRoom()
    this.#allocator.locate(location)
    copyBytes(block.bytes, block.at, block.length, this.#allocator.bytes, this.#allocator.at)
    this.#blocks++
    this.#bytes += block.length
    this.#pageBytes += block.pageBytes
    if (block.length === block.pageBytes) this.#rawBlocks++
    const unit = Math.ceil((block.length * distUnits) / block.pageBytes)
    this.#distribution[unit]!++
    this.#cumulDistribution[unit]!++
    return location
  }

  get(location: number, into: Block): void {
    this.#allocator.locate(location)
    copyBytes(this.#allocator.bytes, this.#allocator.at, into.length, into.bytes, into.at)
  }

  free(location: number, length: number, pageBytes: number): void {
    this.#allocator.free(location)
    this.#isTogether = false
    this.#blocks--
    this.#bytes -= length
    this.#pageBytes -= pageBytes
    if (length === pageBytes) this.#rawBlocks--
    this.#distribution[Math.ceil((length * distUnits) / pageBytes)]!--
    if (this.#allocator.slotBytes <= this.#mark) this.#mark = Number.POSITIVE_INFINITY
  }

  sizeOf(length: number): number {
    return this.#allocator.slotSize(length)
  }

  charge(bytes: number): boolean {
    if (!this.#arena.charge(bytes)) return false
    this.#charged += bytes
    return true
  }

  /**
   * Above the high mark: what lies in slots is so near to all that the chunks could hold that puts would not find room.
   * Slots of some sizes are free while others are wanted, and a zspage is had in one piece: that is what stays free.
   * Blocks that do not shrink leave more of each chunk, more than can be known ahead: once a block has found no room,
   * as much has to go below that. Above a lowered limit: a chunk more than that, when moving together has nothing to
   * gain any more.
   */
  excess(): number {
    const arena = this.#arena
    const room = this.#roomChunks() * arena.chunkBytes
    const above = this.#allocator.slotBytes - Math.min(room - this.#spare(room), this.#mark)
    const isStuck = this.#isTogether && (arena.chunks - arena.spares) * arena.chunkBytes > room
    return isStuck ? Math.max(above, Math.min(arena.chunkBytes, this.#allocator.slotBytes)) : above
  }

  /** Chunks that the limit has room for. */
  #roomChunks(): number {
    const arena = this.#arena
    const { limit, used } = this.#budget
    const elsewhere = used - arena.chunks * arena.chunkBytes
    return Math.max(0, Math.min(arena.maxChunks, Math.floor((limit.bytes - elsewhere) / arena.chunkBytes)))
  }

  /** What of so many bytes of chunks should be free so that puts find room. */
  #spare(room: number): number {
    return Math.min(Math.ceil(room / 4), Math.max(Math.ceil(room / 40), 2 * this.#allocator.longestRun))
  }

  fit(_length: number, moved: MovedBlock): boolean {
    const runs = this.#arena.runCount
    this.#compacted += this.#allocator.compact(256, moved)
    // Moving a chunk together costs as much as copying it: not for the last hole.
    return this.#arena.runCount < runs || this.#arena.defragment(4 * this.#allocator.longestRun)
  }

  compact(blocks: number, moved: MovedBlock): number {
    // Objects that move together make holes between runs: neither may starve the other.
    let done = this.#allocator.compact(Math.ceil(blocks / 2), moved)
    while (done < blocks) {
      const pages = this.#arena.compact(blocks - done)
      if (pages === 0) break
      done += pages
    }
    // The last chunk that the limit allows is for the puts to come.
    if (done < blocks) this.#arena.trim(this.#blocks > 0 && this.#arena.chunks === this.#roomChunks() ? 1 : 0)
    this.#isTogether = done === 0
    this.#compacted += done
    return done
  }

  stats(): StatsNode {
    const arena = this.#arena
    const chunkBytes = arena.chunks * arena.chunkBytes
    return {
      name: this.name,
      counters: {
        used_bytes: this.#budget.used,
        limit_bytes: this.#budget.limit.bytes,
        metadata_bytes: this.#budget.used - chunkBytes,
        directory_bytes: this.#charged,
        zpages: this.#blocks,
        zbytes: this.#bytes,
        orig_bytes: this.#pageBytes,
        raw_pages: this.#rawBlocks,
        slot_bytes: this.#allocator.slotBytes,
        pages_compacted: this.#compacted,
        compress_poor: this.#compressPoor,
        mean_compress_poor: this.#meanCompressPoor,
        rejected_page_count: this.#rejectedPageCount,
        pool_limit_hit: this.#limitHit,
        failed_alloc: this.#failedAlloc,
        failed_getfreepages: arena.failures,
      },
      children: [
        this.#allocator.stats(),
        {
          name: 'zv',
          counters: {
            curr_zpages: this.#blocks,
            curr_zbytes: this.#bytes,
            curr_mean_zsize: this.#pageBytes === 0 ? 0 : Math.round((this.#bytes * basePageSize) / this.#pageBytes),
            ...(this.#rules.maxZsize === undefined ? {} : { max_zsize: this.#rules.maxZsize }),
            ...(this.#rules.maxMeanZsize === undefined ? {} : { max_mean_zsize: this.#rules.maxMeanZsize }),
          },
          children: [
            { name: 'curr_dist_counts', counters: histogram(this.#distribution), children: [] },
            { name: 'cumul_dist_counts', counters: histogram(this.#cumulDistribution), children: [] },
          ],
        },
        {
          name: 'arena',
          counters: {
            chunks: arena.chunks,
            chunk_bytes: chunkBytes,
            spare_chunks: arena.spares,
            chunks_taken: arena.chunksTaken,
            chunks_returned: arena.chunksReturned,
            runs: arena.runCount,
            run_bytes: arena.usedGranules * granuleBytes,
            runs_moved: arena.runsMoved,
            wasted_bytes: chunkBytes - this.#allocator.slotBytes,
          },
          children: [],
        },
      ],
    }
  }

  check(owns: (owner: number, location: number) => boolean): void {
    const runs = new Set<number>()
    this.#allocator.check(owns, runs)
    this.#arena.check(runs)
  }

  close(): Promise<void> {
    this.#arena.close()
    return Promise.resolve()
  }

  /** The historical rules about a block, where they are wanted. */
  #judge({ length, pageBytes, persistent }: Block): PutOutcome {
    const { keepsRaw, maxZsize, maxMeanZsize, pageCountPercent } = this.#rules
    if ((!keepsRaw && length === pageBytes) || length > this.#allocator.maxSize) {
      this.#compressPoor++
      return PutOutcome.Incompressible
    }
    if (!persistent) return PutOutcome.Stored
    if (maxZsize !== undefined && length * basePageSize > maxZsize * pageBytes) {
      this.#compressPoor++
      return PutOutcome.Incompressible
    }
    if (
      maxMeanZsize !== undefined &&
      this.#bytes * basePageSize > maxMeanZsize * this.#pageBytes &&
      length * basePageSize > maxMeanZsize * pageBytes
    ) {
      this.#meanCompressPoor++
      return PutOutcome.Incompressible
    }
    if (pageCountPercent !== undefined && (this.#pageBytes + pageBytes) * 100 > pageCountPercent * this.limitBytes) {
      this.#rejectedPageCount++
      return PutOutcome.Policy
    }
    return PutOutcome.Stored
  }

  /** Why there is no room. */
  #noRoom(): PutOutcome {
    if (this.#arena.refusedByAllocator) {
      this.#failedAlloc++
      return PutOutcome.AllocationFailed
    }
    this.#limitHit++
    this.#mark = Math.max(0, this.#allocator.slotBytes - this.#spare(this.#roomChunks() * this.#arena.chunkBytes))
    return PutOutcome.NoMemory
  }
}

/** What is not 0, by unit. */
function histogram(counts: Float64Array): Record<string, number> {
  const all: Record<string, number> = {}
  for (const [unit, count] of counts.entries()) if (count !== 0) all[unit] = count
  return all
}
