/**
 * The layout of a shard (`shard.ts`) in its part of the shared memory.
 *
 * Memory of zeros, as the system provides it, is an empty shard. Parts of fixed size come first; nodes and segments
 * follow, reserved for the whole limit and touched only as far as they are used.
 */

import { queues } from './pages.ts'
import { pageBytes } from './records.ts'
import { Buffer } from './runtime.ts'
import { maxRecords } from './table.ts'

/** Words of a node: hash, place, link. */
export const nodeWords = 3
/** Slots for deleted tags. */
export const tagSlots = 2048
/** Counters of writes, by hash. */
export const versionCount = 1024

/** Words of the shard. Queues have a range of words each. */
export const Word = {
  freeSegment: 0,
  /** Segments free in that list; given out so far; touched ever. */
  freeSegments: 1,
  segments: 2,
  touchedSegments: 3,
  freeNode: 4,
  nodes: 5,
  touchedNodes: 6,
  entries: 7,
  hand: 8,
  /** Segments in queues of both kinds. */
  queued: 9,
  tags: 11,
  /** Rises with all that deletes more than one key. */
  epoch: 12,
  /** Blocks that there are. */
  pages: 13,
  oldest: 16,
  newest: (16 + queues) as number,
  /** The segment that is being written. */
  open: (16 + 2 * queues) as number,
  /** Bytes of the open page, 0: there is none. */
  filled: (16 + 3 * queues) as number,
  /** Records of the open page that are alive. */
  openLive: (16 + 4 * queues) as number,
  count: (16 + 5 * queues) as number,
} as const

/** Counters of a shard, and numbers that only rise. */
export const Count = {
  stamp: 0,
  sequence: 1,
  floor: 2,
  sets: 3,
  deletes: 4,
  kept: 5,
  pagesRead: 6,
  pagesWritten: 7,
  room: 8,
  expired: 9,
  refused: 10,
  tooLarge: 11,
  noRoom: 12,
  /** How often the shard was emptied because a change was not finished, and entries that it had. */
  dropped: 13,
  droppedEntries: 14,
  count: 16,
} as const

/** How the memory of a shard is divided. */
export interface ShardShape {
  /** Bytes that may be in use. */
  readonly limitBytes: number
  readonly segmentBytes: number
  readonly segments: number
  readonly nodes: number
  readonly buckets: number
  readonly frames: number
  readonly ghosts: number
}

/** The shape of a shard with so many bytes. */
export function shapeOf(limitBytes: number): ShardShape {
  const segmentBytes = Math.max(32 * 1024, 2 ** Math.floor(Math.log2(limitBytes / 2048)))
  const power = 2 ** Math.floor(Math.log2(limitBytes / 512))
  return {
    limitBytes,
    segmentBytes,
    segments: Math.floor(limitBytes / segmentBytes),
    nodes: Math.min(2 ** 24 - 2, Math.floor(limitBytes / 64)),
    buckets: power,
    frames: Math.max(12, Math.floor(limitBytes / 24 / pageBytes)),
    ghosts: power,
  }
}

/** Takes arrays one after the other out of one piece of memory; without memory it only counts. */
class Divider {
  bytes = 0
  readonly #memory: ArrayBufferLike

  constructor(memory: ArrayBufferLike) {
    this.#memory = memory
  }

  words(count: number): Int32Array {
    return new Int32Array(this.#memory, this.#take(count * 4), this.#memory.byteLength === 0 ? 0 : count)
  }

  numbers(count: number): Float64Array {
    return new Float64Array(this.#memory, this.#take(count * 8), this.#memory.byteLength === 0 ? 0 : count)
  }

  buffer(bytes: number): Buffer {
    const at = this.#take(bytes)
    return Buffer.from(this.#memory, at, this.#memory.byteLength === 0 ? 0 : bytes)
  }

  #take(bytes: number): number {
    const at = this.bytes
    this.bytes += Math.ceil(bytes / 64) * 64
    return this.#memory.byteLength === 0 ? 0 : at
  }
}

/** The arrays of a shard. */
export class ShardMemory {
  readonly counts: Float64Array
  readonly words: Int32Array
  readonly versions: Int32Array
  readonly buckets: Int32Array
  readonly ghosts: Int32Array
  /** By slot: hash of the tag. And the last write when it was deleted; 0: the slot is empty. */
  readonly tagHashes: Int32Array
  readonly tagWrites: Float64Array
  /** By segment: neighbours in the queue, or next free one; next of the same record; bytes; entries; blocks; queue. */
  readonly older: Int32Array
  readonly newer: Int32Array
  readonly chained: Int32Array
  readonly fill: Int32Array
  readonly live: Int32Array
  readonly blocks: Int32Array
  readonly queue: Int32Array
  readonly expiry: Float64Array
  readonly stamp: Float64Array
  /** By queue: the nodes of the records of the open page, the latest end of life of one, and the page. */
  readonly openNodes: Int32Array
  readonly openExpiry: Float64Array
  readonly openPages: Buffer
  /** By frame: place of the block, one more; used since the hand passed. And the pages. */
  readonly frameOf: Int32Array
  readonly frameUsed: Int32Array
  readonly window: Buffer
  /** Bytes of all above. */
  readonly fixedBytes: number
  readonly nodes: Int32Array
  readonly segments: Buffer
  readonly segmentWords: Int32Array
  readonly bytes: number

  constructor(shape: ShardShape, memory: ArrayBufferLike) {
    const divider = new Divider(memory)
    this.counts = divider.numbers(Count.count)
    this.words = divider.words(Word.count)
    this.versions = divider.words(versionCount)
    this.buckets = divider.words(shape.buckets)
    this.ghosts = divider.words(shape.ghosts)
    this.tagHashes = divider.words(tagSlots)
    this.tagWrites = divider.numbers(tagSlots)
    this.older = divider.words(shape.segments)
    this.newer = divider.words(shape.segments)
    this.chained = divider.words(shape.segments)
    this.fill = divider.words(shape.segments)
    this.live = divider.words(shape.segments)
    this.blocks = divider.words(shape.segments)
    this.queue = divider.words(shape.segments)
    this.expiry = divider.numbers(shape.segments)
    this.stamp = divider.numbers(shape.segments)
    this.openNodes = divider.words(queues * maxRecords)
    this.openExpiry = divider.numbers(queues)
    this.openPages = divider.buffer(queues * pageBytes)
    this.frameOf = divider.words(shape.frames)
    this.frameUsed = divider.words(shape.frames)
    this.window = divider.buffer(shape.frames * pageBytes)
    this.fixedBytes = divider.bytes
    this.nodes = divider.words(shape.nodes * nodeWords)
    const at = divider.bytes
    this.segments = divider.buffer(shape.segments * shape.segmentBytes)
    this.segmentWords =
      memory.byteLength === 0
        ? new Int32Array(0)
        : new Int32Array(memory, at, (shape.segments * shape.segmentBytes) / 4)
    this.bytes = divider.bytes
  }
}

/** Bytes of address space that a shard needs; of memory it takes no more than its limit. */
export function memoryOf(shape: ShardShape): number {
  return new ShardMemory(shape, new ArrayBuffer(0)).bytes
}
