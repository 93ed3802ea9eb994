/**
 * Plain memory as a place of a stack: pages as they are, in the frames of a buddy system.
 *
 * Invariants: frames in use never pass what the limit in force has room for, beside the metadata that each page may
 * need (an object of its own included), so that a put within `reservedBytes` is refused only when the system has no
 * memory. (Among pages of several sizes a large one may find its frames in pieces.)
 */
import type { Block, ByteLimit, LayerContext, MemoryPlace, MovedBlock, PlaceTraits, StatsNode } from '@tmem/core'
import { basePageSize, maxBlockBytes, maxEntries, none, PutOutcome, TmemError } from '@tmem/core'
import { Frames } from './frames.ts'

/**
 * Bytes of our own per frame: its state, and two words for the chains of free frames, the first of which names its
 * owner while it is in use.
 */
const stride = 2
const ownBytesPerFrame = 1 + stride * 4
/** Bytes of the chain's for a page that is an object by itself. */
const metadataPerPage = 110
const largestChunkBytes = 16 * 1024 * 1024
const smallestChunkBytes = 64 * 1024
/** Pages that stay free so that puts find room: one in so many. */
const freeShare = 128

/** Frames that a limit has room for. */
export const framesFor = (bytes: number): number =>
  Math.min(maxEntries, Math.max(0, Math.floor(bytes / (basePageSize + ownBytesPerFrame + metadataPerPage))))

export class FramesPlace implements MemoryPlace {
  readonly name = 'memory'
  readonly traits: PlaceTraits
  readonly #limit: ByteLimit
  readonly #frames: Frames
  readonly #owners: Int32Array
  readonly #allocator: LayerContext['allocator']
  readonly #ahead: boolean
  /** Frames of the chunks that are there. */
  #present = 0
  #charged = 0
  #noMemory = 0
  #failedAlloc = 0
  #moved = 0

  /** Throws `TmemError` (`TMEM_NO_MEMORY`) when the allocator has no memory for its tables. */
  constructor(limit: ByteLimit, traits: PlaceTraits, { allocator }: LayerContext) {
    this.traits = traits
    this.#limit = limit
    this.#allocator = allocator
    this.#ahead = allocator.ahead === true
    const capacity = framesFor(limit.maximumBytes)
    let chunkBytes = largestChunkBytes
    while (chunkBytes > smallestChunkBytes && chunkBytes * 8 > limit.maximumBytes) chunkBytes /= 2
    const chunkShift = Math.log2(chunkBytes / basePageSize)
    const chunks = Math.ceil(capacity / 2 ** chunkShift)
    const reserve = (bytes: number, site: string): ArrayBufferLike => {
      const memory = allocator.allocate(bytes, site)
      if (memory === undefined)
        throw new TmemError('TMEM_NO_MEMORY', `no memory for ${site} (${bytes} bytes): give a smaller limit`, {
          layer: 'memory',
        })
      return memory
    }
    this.#owners = new Int32Array(reserve(capacity * stride * 4, 'memory.owners'))
    this.#frames = new Frames(
      {
        capacity,
        chunkShift,
        state: reserve(Frames.stateBytes(chunks), 'memory.frameState'),
        frameStates: reserve(capacity, 'memory.frameStates'),
        chunks: new Array<undefined>(chunks).fill(undefined),
      },
      this.#owners,
      stride,
    )
    this.#frames.initialize()
    if (this.#ahead)
      for (let chunk = 0; chunk < chunks; chunk++)
        this.#add(chunk, reserve(this.#frames.chunkFrames(chunk) * basePageSize, 'memory.chunk'))
  }

  get limitBytes(): number {
    return this.#limit.bytes
  }

  get usedBytes(): number {
    return this.#present * basePageSize + this.#frames.capacity * ownBytesPerFrame + this.#charged
  }

  prepare(length: number): void {
    const order = orderFor(length)
    const room = framesFor(this.#limit.bytes)
    while (
      !this.#frames.available(order) ||
      this.#present < Math.min(room, this.#frames.used + length / basePageSize)
    ) {
      if (this.#frames.used + 2 ** order > room) return
      const chunk = this.#frames.absentChunk()
      if (chunk === none) return
      const memory = this.#allocator.allocate(this.#frames.chunkFrames(chunk) * basePageSize, 'memory.chunk')
      if (memory === undefined) {
        this.#failedAlloc++
        return
      }
      // Whoever gave the memory may have used this place meanwhile.
      if (!this.#frames.has(chunk)) this.#add(chunk, memory)
    }
  }

  #add(chunk: number, memory: ArrayBufferLike): void {
    this.#frames.addChunk(chunk, memory)
    this.#present += this.#frames.chunkFrames(chunk)
  }

  put(block: Block, owner: number): number {
    const order = orderFor(block.length)
    if (this.#frames.used + 2 ** order > framesFor(this.#limit.bytes)) {
      this.#noMemory++
      return -PutOutcome.NoMemory
    }
    const frame = this.#frames.allocate(order)
    if (frame === none)
      // A run of that length may be had when colder pages go; a chunk that the system did not give is not had that way.
      return this.#frames.absentChunk() === none ? -PutOutcome.NoMemory : -PutOutcome.AllocationFailed
    this.overwrite(frame, block)
    this.#owners[frame * stride] = owner
    return frame
  }

  overwrite(frame: number, block: Block): void {
    if (block.at === 0 && block.length === block.bytes.length) this.#frames.fill(frame, 0, block.bytes)
    else this.#frames.copyIn(frame, block.bytes, block.at, block.length)
  }

  get(location: number, into: Block): void {
    this.#frames.copyOut(location, 0, into.bytes, into.at, into.length)
  }

  free(location: number): void {
    this.#frames.free(location)
  }

  sizeOf(length: number): number {
    return basePageSize << orderFor(length)
  }

  charge(bytes: number): boolean {
    // There is room for as many pages' metadata as there are frames.
    if (this.#charged + bytes > this.#frames.capacity * metadataPerPage) return false
    this.#charged += bytes
    return true
  }

  excess(): number {
    const room = framesFor(this.#limit.bytes)
    return (this.#frames.used - (room - Math.floor(room / freeShare))) * basePageSize
  }

  compact(blocks: number, moved: MovedBlock): number {
    if (this.#ahead) return 0
    const frames = this.#frames
    const wanted = framesFor(this.#limit.bytes)
    let done = 0
    for (;;) {
      let emptiest = none
      const present = this.#present
      for (let chunk = 0; chunk < frames.chunkCount; chunk++) {
        if (!frames.has(chunk)) continue
        if (emptiest === none || frames.chunkUsed(chunk) < frames.chunkUsed(emptiest)) emptiest = chunk
      }
      if (emptiest === none || frames.chunks === 1) return done
      const others = present - frames.chunkFrames(emptiest) - (frames.used - frames.chunkUsed(emptiest))
      // A chunk is kept for the puts to come, unless the limit has no room for it any more.
      const spare = present > wanted ? 0 : frames.chunkFrames(emptiest)
      if (others - spare < frames.chunkUsed(emptiest)) return done
      if (frames.chunkUsed(emptiest) === 0) {
        this.#dropChunk(emptiest)
        continue
      }
      if (done >= blocks) return done
      const before = done
      done += this.#empty(emptiest, blocks - done, moved)
      if (done === before) return done
    }
  }

  stats(): StatsNode {
    const frames = this.#frames
    return {
      name: this.name,
      counters: {
        used_bytes: this.usedBytes,
        limit_bytes: this.#limit.bytes,
        metadata_bytes: frames.capacity * ownBytesPerFrame + this.#charged,
        directory_bytes: this.#charged,
        frames: framesFor(this.#limit.bytes),
        used_frames: frames.used,
        chunks: frames.chunks,
        moved_pages: this.#moved,
        refused_no_memory: this.#noMemory,
        refused_allocation: this.#failedAlloc,
      },
      children: [],
    }
  }

  check(owns: (owner: number, location: number) => boolean): void {
    const frames = this.#frames
    frames.check()
    for (let chunk = 0; chunk < frames.chunkCount; chunk++) {
      if (!frames.has(chunk)) continue
      const end = (chunk << frames.chunkShift) + frames.chunkFrames(chunk)
      for (let frame = frames.nextUsed(chunk << frames.chunkShift); frame !== none; ) {
        if (!owns(this.#owners[frame * stride]!, frame)) throw new Error(`memory: frame ${frame} belongs to nobody`)
        const next = frame + 2 ** frames.orderOf(frame)
        frame = next < end ? frames.nextUsed(next) : none
      }
    }
  }

  close(): Promise<void> {
    const frames = this.#frames
    for (let chunk = 0; chunk < frames.chunkCount; chunk++)
      if (frames.has(chunk) && frames.chunkUsed(chunk) === 0) this.#dropChunk(chunk)
    return Promise.resolve()
  }

  #dropChunk(chunk: number): void {
    const memory = this.#frames.dropChunk(chunk)
    this.#present -= this.#frames.chunkFrames(chunk)
    this.#allocator.free?.(memory, 'memory.chunk')
  }

  /** Moves blocks out of a chunk into the others; as many as find a place, up to `most`. */
  #empty(chunk: number, most: number, moved: MovedBlock): number {
    const frames = this.#frames
    let done = 0
    frames.fence(chunk)
    for (let frame = frames.nextUsed(chunk << frames.chunkShift); frame !== none && done < most; ) {
      const order = frames.orderOf(frame)
      const to = frames.allocate(order)
      if (to === none) break
      frames.copyFrame(frame, to, 2 ** order)
      const owner = this.#owners[frame * stride]!
      this.#owners[to * stride] = owner
      frames.freeFenced(frame)
      moved(owner, to)
      done++
      frame = frames.nextUsed(frame)
    }
    frames.unfence(chunk)
    this.#moved += done
    return done
  }
}

/** log2 of the frames that a block takes. */
const orderFor = (length: number): number =>
  length <= basePageSize ? 0 : 32 - Math.clz32((Math.min(length, maxBlockBytes) - 1) >>> 12)
