/**
 * xvmalloc: blocks of any size inside page frames of 4 KiB, found through free lists eight bytes apart and two levels
 * of bitmaps (a two-level segregated fit).
 *
 * A block has a header of one word: its size (16 bits), and the offset of the block before it (16 bits, of which the
 * low two, zero in any offset, say that this block is free and that the one before is). A frame begins as one free
 * block of 4092 bytes; a block is cut to size and the rest becomes a free block; neighbouring free blocks merge; an
 * entirely free frame is given back. A free block of at least 32 bytes is in the list of its size: its next and
 * previous one stand in its first two words. In a block in use the first word is the owner's number.
 *
 * No block crosses frames, so above half a frame no two fit: that is what zsmalloc came to replace it for.
 *
 * Invariants (see `check`): the blocks of a frame fill it without a gap; no two free blocks are neighbours; the flags
 * tell the truth; exactly the free blocks of 32 bytes and more are in the lists, and a bit is set exactly for a list
 * that has one.
 *
 * Source: xvmalloc of compcache/ramzswap 0.6 (alignment 4, blocks of 32 to 4092 bytes, 508 lists).
 */
import type { StatsNode } from '@tmem/core'
import { type Arena, granuleBytes, localBits, none, type ZAllocator } from './arena.ts'

const frameBytes = 4096
const frameGranules = frameBytes / granuleBytes
const headerBytes = 4
const ownerBytes = 4
const minBlock = 32
const maxBlock = frameBytes - headerBytes
const listShift = 3
const lists = ((maxBlock - minBlock) >>> listShift) + 1
const localMask = 2 ** localBits - 1

/** Header: size, flags, offset of the block before. */
const sizeMask = 0xffff
const FREE = 1 << 16
const PREVIOUS_FREE = 1 << 17
const previousMask = 0xfffc0000

export class Xvmalloc implements ZAllocator {
  readonly maxSize: number = maxBlock - ownerBytes
  readonly longestRun: number = frameBytes
  bytes: Uint8Array = new Uint8Array(0)
  words: Int32Array = new Int32Array(0)
  at = 0
  slotBytes = 0
  readonly #arena: Arena
  readonly #tag: number
  /** First free block of each list, as a location. */
  readonly #heads: Float64Array = new Float64Array(lists).fill(none)
  readonly #bits: Int32Array = new Int32Array((lists + 31) >>> 5)
  #topBits = 0
  #frames = 0
  #blocks = 0
  #freeBlocks = 0

  constructor(arena: Arena) {
    this.#arena = arena
    this.#tag = arena.newTag()
  }

  alloc(size: number, owner: number): number {
    const need = blockSize(size)
    let block = this.#find((need - minBlock + 7) >>> listShift)
    if (block === none) {
      block = this.#newFrame()
      if (block === none) return none
    }
    this.#removeFree(block)
    const word = this.#wordOf(block)
    const { words } = this
    const offset = (block & localMask) << 2
    const rest = (words[word]! & sizeMask) - need
    const after = offset + headerBytes + need
    if (rest > 0) {
      // The rest is at least a header: sizes are multiples of four.
      words[word] = (words[word]! & ~sizeMask) | need
      words[word + ((after - offset) >>> 2)] = (rest - headerBytes) | FREE | (offset << 16)
      this.#linkBack(block, after, rest - headerBytes)
      if (rest - headerBytes >= minBlock) this.#insertFree(block - (block & localMask) + (after >>> 2))
    } else this.#setPreviousFree(word, offset, after, false)
    words[word] = words[word]! & ~FREE
    words[word + 1] = owner
    this.slotBytes += need + headerBytes
    this.#blocks++
    this.at = (word << 2) + headerBytes + ownerBytes
    return block
  }

  slotSize(size: number): number {
    return blockSize(size) + headerBytes
  }

  free(location: number): void {
    let block = location
    let word = this.#wordOf(block)
    const { words } = this
    const frame = location - (location & localMask)
    let offset = (location & localMask) << 2
    let size = words[word]! & sizeMask
    this.slotBytes -= size + headerBytes
    this.#blocks--
    const after = offset + headerBytes + size
    if (after < frameBytes) {
      const next = word + ((after - offset) >>> 2)
      if ((words[next]! & FREE) !== 0) {
        const nextSize = words[next]! & sizeMask
        if (nextSize >= minBlock) this.#removeFree(frame + (after >>> 2))
        size += headerBytes + nextSize
      }
    }
    if ((words[word]! & PREVIOUS_FREE) !== 0) {
      const before = (words[word]! & previousMask) >>> 16
      word -= (offset - before) >>> 2
      if ((words[word]! & sizeMask) >= minBlock) this.#removeFree(frame + (before >>> 2))
      size += headerBytes + (words[word]! & sizeMask)
      offset = before
      block = frame + (before >>> 2)
    }
    if (size === maxBlock) {
      this.#frames--
      this.#arena.free(location >>> localBits)
      return
    }
    words[word] = (words[word]! & ~sizeMask) | size | FREE
    if (size >= minBlock) this.#insertFree(block)
    this.#linkBack(block, offset + headerBytes + size, none)
    this.#setPreviousFree(word, offset, offset + headerBytes + size, true)
  }

  locate(location: number): void {
    this.at = (this.#wordOf(location) << 2) + headerBytes + ownerBytes
  }

  /** Nothing: a block stays where it is. */
  compact(): number {
    return 0
  }

  stats(): StatsNode {
    return {
      name: 'xvmalloc',
      counters: {
        pageframes: this.#frames,
        zpages: this.#blocks,
        free_blocks: this.#freeBlocks,
        slot_bytes: this.slotBytes,
      },
      children: [],
    }
  }

  check(owns: (owner: number, location: number) => boolean, runs: Set<number>): void {
    const listed = new Map<number, number>()
    for (let list = 0; list < lists; list++) {
      let previous = none
      for (let block = this.#heads[list]!; block !== none; ) {
        const word = this.#wordOf(block)
        if (listed.has(block)) throw new Error(`xvmalloc: block ${block} is listed twice`)
        listed.set(block, list)
        if (fromWord(this.words[word + 2]!) !== previous)
          throw new Error(`xvmalloc: block ${block} has a wrong neighbour`)
        previous = block
        block = fromWord(this.words[word + 1]!)
      }
      const bit = ((this.#bits[list >>> 5]! >>> (list & 31)) & 1) === 1
      const top = ((this.#topBits >>> (list >>> 5)) & 1) === 1
      if (bit !== (this.#heads[list] !== none) || (bit && !top))
        throw new Error(`xvmalloc: the bit of list ${list} is wrong`)
    }
    let slotBytes = 0
    let blocks = 0
    let frames = 0
    let free = 0
    for (const frame of this.#arena.runsOf(this.#tag)) {
      runs.add(frame)
      frames++
      let before = 0
      let beforeFree = false
      for (let offset = 0; offset < frameBytes; ) {
        const location = frame * 2 ** localBits + (offset >>> 2)
        const word = this.#wordOf(location)
        const header = this.words[word]!
        const size = header & sizeMask
        const isFree = (header & FREE) !== 0
        const name = `xvmalloc: the block at ${offset} of frame ${frame}`
        if ((size & 3) !== 0 || offset + headerBytes + size > frameBytes) throw new Error(`${name} has ${size} bytes`)
        if (offset > 0 && (header & previousMask) >>> 16 !== before) throw new Error(`${name} has lost the one before`)
        if (((header & PREVIOUS_FREE) !== 0) !== beforeFree) throw new Error(`${name} is wrong about the one before`)
        if (isFree && beforeFree) throw new Error(`${name} was not merged`)
        if (isFree && size >= minBlock) {
          free++
          if (listed.get(location) !== (size - minBlock) >>> listShift) throw new Error(`${name} is in the wrong list`)
        }
        if (!isFree) {
          const owner = this.words[word + 1]!
          if (!owns(owner, location)) throw new Error(`${name} is owned by ${owner}`)
          slotBytes += size + headerBytes
          blocks++
        }
        before = offset
        beforeFree = isFree
        offset += headerBytes + size
      }
    }
    if (frames !== this.#frames) throw new Error(`xvmalloc: ${frames} frames, counted ${this.#frames}`)
    if (blocks !== this.#blocks) throw new Error(`xvmalloc: ${blocks} blocks, counted ${this.#blocks}`)
    if (free !== listed.size || free !== this.#freeBlocks)
      throw new Error(`xvmalloc: ${free} free blocks, listed ${listed.size}, counted ${this.#freeBlocks}`)
    if (slotBytes !== this.slotBytes)
      throw new Error(`xvmalloc: ${slotBytes} bytes in blocks, counted ${this.slotBytes}`)
  }

  /** Sets `bytes` and `words` to the chunk of a block; returns the word of its header. */
  #wordOf(block: number): number {
    const arena = this.#arena
    const frame = block >>> localBits
    const chunk = arena.chunkOf(frame)
    this.bytes = arena.bytes[chunk]!
    this.words = arena.words[chunk]!
    return (arena.offsetOf(frame) >>> 2) + (block & localMask)
  }

  /** A frame as one free block, in its list. */
  #newFrame(): number {
    const frame = this.#arena.take(frameGranules, this.#tag)
    if (frame === none) return none
    const block = frame * 2 ** localBits
    const word = this.#wordOf(block)
    this.words[word] = maxBlock | FREE
    this.#frames++
    this.#insertFree(block)
    return block
  }

  /** The first free block of the first list from `list` that has one. */
  #find(list: number): number {
    const inWord = this.#bits[list >>> 5]! & (-1 << (list & 31))
    if (inWord !== 0) return this.#heads[(list & ~31) + lowestBit(inWord)]!
    const above = (list >>> 5) + 1
    const top = above > 31 ? 0 : this.#topBits & (-1 << above)
    if (top === 0) return none
    const word = lowestBit(top)
    return this.#heads[word * 32 + lowestBit(this.#bits[word]!)]!
  }

  #insertFree(block: number): void {
    const word = this.#wordOf(block)
    const list = ((this.words[word]! & sizeMask) - minBlock) >>> listShift
    const head = this.#heads[list]!
    this.words[word + 1] = toWord(head)
    this.words[word + 2] = toWord(none)
    if (head !== none) {
      const headWord = this.#wordOf(head)
      this.words[headWord + 2] = toWord(block)
      this.#wordOf(block)
    }
    this.#heads[list] = block
    this.#bits[list >>> 5] = this.#bits[list >>> 5]! | (1 << (list & 31))
    this.#topBits |= 1 << (list >>> 5)
    this.#freeBlocks++
  }

  /** Takes a block out of its list; `words` is of its chunk afterwards. */
  #removeFree(block: number): void {
    const word = this.#wordOf(block)
    const { words } = this
    const list = ((words[word]! & sizeMask) - minBlock) >>> listShift
    const next = fromWord(words[word + 1]!)
    const previous = fromWord(words[word + 2]!)
    if (next !== none) {
      const nextWord = this.#wordOf(next)
      this.words[nextWord + 2] = toWord(previous)
    }
    if (previous !== none) {
      const previousWord = this.#wordOf(previous)
      this.words[previousWord + 1] = toWord(next)
    } else {
      this.#heads[list] = next
      if (next === none) {
        this.#bits[list >>> 5] = this.#bits[list >>> 5]! & ~(1 << (list & 31))
        if (this.#bits[list >>> 5] === 0) this.#topBits &= ~(1 << (list >>> 5))
      }
    }
    this.#freeBlocks--
    this.#wordOf(block)
  }

  /** Tells the block that starts `after` (if the frame does not end there) where the one before it starts. */
  #linkBack(block: number, after: number, restSize: number): void {
    const base = this.#wordOf(block - (block & localMask))
    const { words } = this
    let follows = after
    let before = (block & localMask) << 2
    if (restSize !== none) {
      // The rest of a cut block has just been made at `after`: it is the one behind it that must learn of it.
      before = after
      follows = after + headerBytes + restSize
    }
    if (follows >= frameBytes) return
    const word = base + (follows >>> 2)
    words[word] = (words[word]! & 0x3ffff) | (before << 16)
  }

  /** Tells the block that starts `after` whether the one before it, at `offset`, is free. */
  #setPreviousFree(word: number, offset: number, after: number, free: boolean): void {
    if (after >= frameBytes) return
    const next = word + ((after - offset) >>> 2)
    this.words[next] = free ? this.words[next]! | PREVIOUS_FREE : this.words[next]! & ~PREVIOUS_FREE
  }
}

/** Bytes of a block for an object: with the owner's word, a multiple of four, at least 32. */
const blockSize = (size: number): number => Math.max(minBlock, (size + ownerBytes + 3) & ~3)
const lowestBit = (bits: number): number => 31 - Math.clz32(bits & -bits)
/** Locations have 32 bits; -1 is no location, for no block begins in the last word of a frame. */
const toWord = (location: number): number => location | 0
const fromWord = (word: number): number => (word === none ? none : word >>> 0)
