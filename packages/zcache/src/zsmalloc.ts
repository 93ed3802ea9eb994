/**
 * A size-class allocator for compressed pages, in the style of Linux's zsmalloc: objects of one class lie side by side
 * in zspages (a run of granules whose length is chosen so that little is left over at its end).
 *
 * Classes are 32 bytes apart up to a little over 4 KiB; sizes whose best zspage holds the same number of objects share a
 * class. A larger object has a zspage of its own. Zspages of a class are kept in four fullness groups; an allocation takes
 * the fullest zspage that has a free slot. An empty zspage gives its run back at once, for any class.
 *
 * Compaction moves objects out of the emptiest zspage of a class into the fuller ones, and whole zspages out of the
 * emptiest chunk: a zspage is addressed by number, so that moving one changes a single word.
 *
 * A slot begins with one word: the owner's number, or, in a free slot, the next free one (negative). The object follows.
 *
 * Invariants (see `check`): every used slot has an owner that is not negative; the free slots of a zspage are exactly
 * its free list; a zspage that is neither full nor empty is in the list of its fullness group.
 *
 * Sources: "zsmalloc" of the Linux kernel's documentation (size classes, zspages, fullness groups, compaction).
 * DEVIATION: zspages lie in one piece (granules are neighbours), so that a codec reads an object where it rests; the
 * original chains single pages and lets objects cross them. Instead of a multiple of 4 KiB, a zspage may have any
 * number of granules from 4 to 24 KiB; with 32 bytes from class to class that wastes least (measured over the compressed
 * sizes of executables, libraries, headers and scripts, 12,000 to 120,000 pages: 1 to 2 %).
 */
import type { Allocator } from '@tmem/core'
import { TmemError } from '@tmem/core'
import type { Arena } from './arena.ts'
import { granuleBytes, none } from './arena.ts'

/** Told of each object that compaction has moved; `from` is no longer valid. */
export type Moved = (owner: number, from: number, to: number) => void

/**
 * Finds places for compressed pages. A place is named by a location, a number from 0 to 2^32-1; `locate` tells where
 * its bytes are. An owner is a number from 0 to 2^31-1 by which the caller knows the page.
 */
export interface ZAllocator {
  readonly name: string
  /** Largest object, in bytes. */
  readonly maxSize: number
  /** After `locate`: the chunk, as bytes and as words, and the offset of the object in it (a multiple of 4). */
  readonly bytes: Uint8Array
  readonly words: Int32Array
  readonly at: number
  /** Objects and the bytes that were asked for are counted by the caller; these are the bytes of their slots. */
  readonly slotBytes: number
  /** Takes a place for `size` bytes (1 to `maxSize`), with room up to the next multiple of four, or `none`. */
  alloc(size: number, owner: number): number
  /** Bytes that `alloc` would take for an object of `size` bytes. */
  slotSize(size: number): number
  /** Gives a place back. */
  free(location: number): void
  /** Sets `bytes`, `words` and `at`. */
  locate(location: number): void
  /**
   * Moves up to `objects` objects so that whole runs and chunks become free. Returns how many were moved; 0 means
   * that there is nothing to gain now.
   */
  compact(objects: number, moved: Moved): number
  /** As `compact`, but stops at the first run that became free. True when one did. */
  compactOne(objects: number, moved: Moved): boolean
  /** Throws an `Error` that says which invariant is broken. `owns(owner, location)` must be true for all objects. */
  check(owns: (owner: number, location: number) => boolean): void
  /** Counters of its own, for the statistics. */
  counters(): Record<string, number>
}

const headerBytes = 4
const classStep = 32
const classShift = 5
/** Largest object that shares zspages: a raw page of 4 KiB fits. */
const classLimit = 4096 + classStep
/** Bytes of a zspage, at least and at most. */
const minZspageBytes = 4096
const maxZspageBytes = 24 * 1024
const groups = 4
const slotBits = 10
const slotMask = 2 ** slotBits - 1

/** Words of a zspage: its class (or minus its granules, for one large object), first granule, used slots, first free slot. */
const CLASS = 0
const BASE = 1
const USED = 2
const FREE_SLOT = 3
/** Neighbours in the fullness group; NEXT also chains free zspage numbers. */
const PREVIOUS = 4
const NEXT = 5
/** Neighbours in the chunk. */
const PREVIOUS_IN_CHUNK = 6
const NEXT_IN_CHUNK = 7
const zspageWords = 8

/** Layout of the classes: the same for every allocator, so it is computed once. */
interface Classes {
  /** Class by size in steps of `classStep`, rounded up. */
  readonly ofStep: Uint16Array
  readonly size: Int32Array
  readonly granules: Int32Array
  readonly slots: Int32Array
}

function layOutClasses(): Classes {
  const steps = classLimit / classStep
  const ofStep = new Uint16Array(steps + 1)
  const size: number[] = []
  const granules: number[] = []
  const slots: number[] = []
  // From the largest size down, so that a size can join the class above it.
  for (let step = steps; step >= 1; step--) {
    const bytes = step * classStep
    let best = 0
    let bestWaste = 1
    for (let count = minZspageBytes / granuleBytes; count <= maxZspageBytes / granuleBytes; count++) {
      const room = count * granuleBytes
      if (room < bytes) continue
      const waste = (room % bytes) / room
      if (waste < bestWaste) {
        best = count
        bestWaste = waste
      }
      if (waste <= 0.005) break
    }
    const fit = Math.floor((best * granuleBytes) / bytes)
    const last = size.length - 1
    if (last < 0 || granules[last] !== best || slots[last] !== fit) {
      size.push(bytes)
      granules.push(best)
      slots.push(fit)
    }
    ofStep[step] = size.length - 1
  }
  ofStep[0] = ofStep[1]!
  return {
    ofStep,
    size: Int32Array.from(size),
    granules: Int32Array.from(granules),
    slots: Int32Array.from(slots),
  }
}

export class Zsmalloc implements ZAllocator {
  readonly name = 'zsmalloc'
  readonly maxSize: number
  bytes: Uint8Array = new Uint8Array(0)
  words: Int32Array = new Int32Array(0)
  at = 0
  slotBytes = 0
  /** Objects moved by compaction so far (pages_compacted counts the runs). */
  objectsMoved = 0
  runsFreed = 0
  readonly #arena: Arena
  readonly #classes: Classes
  readonly #zspages: Int32Array
  readonly #capacity: number
  /** First zspage per class and group; group 0 is the emptiest. */
  readonly #heads: Int32Array
  /** Free slots per class, in zspages that are not full. */
  readonly #freeSlots: Int32Array
  readonly #chunkHeads: Int32Array
  /** Scratch: the zspages of one chunk by place. */
  readonly #order: Float64Array
  #freeZspage = none
  #watermark = 0
  #zspagesInUse = 0
  #large = 0
  /** Class at which the next compaction looks first. */
  #compactFrom = 0

  constructor(arena: Arena, allocator: Allocator) {
    this.#arena = arena
    this.#classes = layOutClasses()
    const classCount = this.#classes.size.length
    this.maxSize = Math.min(arena.chunkBytes, 2 ** 17) - headerBytes
    // Reserved for the whole limit; counted as it is touched. Locations have 22 bits for the number.
    this.#capacity = Math.min(2 ** (32 - slotBits), (arena.maxChunks * arena.chunkBytes) / minZspageBytes)
    const heads = classCount * groups
    const zspagesPerChunk = arena.chunkBytes / minZspageBytes
    const fixed = 4 * (heads + classCount + arena.maxChunks) + 8 * zspagesPerChunk
    const bytes = 4 * this.#capacity * zspageWords + fixed
    const memory = allocator.allocate(bytes, 'zcache.zsmalloc')
    if (memory === undefined || !arena.budget.take(fixed))
      throw new TmemError('TMEM_NO_MEMORY', `zcache: no memory for the table of zspages (${bytes} bytes)`, {
        layer: 'zcache',
      })
    this.#zspages = new Int32Array(memory, 0, this.#capacity * zspageWords)
    let at = this.#zspages.byteLength
    this.#order = new Float64Array(memory, at, zspagesPerChunk)
    at += zspagesPerChunk * 8
    this.#heads = new Int32Array(memory, at, heads).fill(none)
    at += heads * 4
    this.#freeSlots = new Int32Array(memory, at, classCount)
    at += classCount * 4
    this.#chunkHeads = new Int32Array(memory, at, arena.maxChunks).fill(none)
  }

  alloc(size: number, owner: number): number {
    const need = size + headerBytes
    if (need > classLimit) return this.#allocLarge(need, owner)
    const kind = this.#classes.ofStep[(need + classStep - 1) >>> classShift]!
    let zspage = none
    const head = kind * groups
    for (let group = groups - 1; group >= 0; group--) {
      zspage = this.#heads[head + group]!
      if (zspage !== none) break
    }
    if (zspage === none) {
      zspage = this.#newZspage(kind)
      if (zspage === none) return none
    }
    const slot = this.#takeSlot(zspage, kind, owner)
    return zspage * 2 ** slotBits + slot
  }

  slotSize(size: number): number {
    const need = size + headerBytes
    if (need > classLimit) return Math.ceil(need / granuleBytes) * granuleBytes
    return this.#classes.size[this.#classes.ofStep[(need + classStep - 1) >>> classShift]!]!
  }

  free(location: number): void {
    const zspage = location >>> slotBits
    const kind = this.#zspages[zspage * zspageWords + CLASS]!
    if (kind < 0) {
      this.slotBytes += kind * granuleBytes
      this.#large--
      this.#dropZspage(zspage, -kind)
      return
    }
    this.#freeSlot(zspage, kind, location & slotMask)
  }

  locate(location: number): void {
    const zspage = location >>> slotBits
    const at = zspage * zspageWords
    const kind = this.#zspages[at + CLASS]!
    const base = this.#zspages[at + BASE]!
    const arena = this.#arena
    const chunk = base >>> arena.chunkShift
    this.bytes = arena.bytes[chunk]!
    this.words = arena.words[chunk]!
    const offset = arena.offsetOf(base) + headerBytes
    this.at = kind < 0 ? offset : offset + (location & slotMask) * this.#classes.size[kind]!
  }

  compact(objects: number, moved: Moved): number {
    let left = objects
    // A run that became free is progress, too, but one zspage after the other: the loop ends when there is none.
    while (left > 0) {
      const before = left
      left -= this.#compactClass(left, moved)
      if (left === before) break
    }
    while (left > 0) {
      const before = left
      left -= this.#emptyChunk(left)
      if (left === before) break
    }
    if (left > 0) this.#arena.trim()
    return objects - left
  }

  compactOne(objects: number, moved: Moved): boolean {
    const before = this.runsFreed
    if (this.#compactClass(objects, moved) > 0) return this.runsFreed !== before
    // Sliding costs as much as copying a chunk: not for the last hole.
    const chunk = this.#slidable(none, (4 * maxZspageBytes) / granuleBytes)
    if (chunk === none) return false
    this.#slideTogether(chunk)
    return true
  }

  counters(): Record<string, number> {
    return {
      zspages: this.#zspagesInUse,
      large_objects: this.#large,
      slot_bytes: this.slotBytes,
      frame_bytes: this.#arena.usedGranules * granuleBytes,
      chunk_bytes: this.#arena.chunks * this.#arena.chunkBytes,
      objects_moved: this.objectsMoved,
      zspages_compacted: this.runsFreed,
      chunks_returned: this.#arena.chunksReturned,
    }
  }

  check(owns: (owner: number, location: number) => boolean): void {
    const zspages = this.#zspages
    const runs: [number, number][] = []
    const listed = new Set<number>()
    const freeSlots = new Int32Array(this.#freeSlots.length)
    for (let kind = 0; kind < this.#classes.size.length; kind++) {
      for (let group = 0; group < groups; group++) {
        let previous = none
        for (let zspage = this.#heads[kind * groups + group]!; zspage !== none; ) {
          const at = zspage * zspageWords
          if (listed.has(zspage)) throw new Error(`zsmalloc: zspage ${zspage} is listed twice`)
          listed.add(zspage)
          if (zspages[at + PREVIOUS] !== previous) throw new Error(`zsmalloc: zspage ${zspage} has a wrong neighbour`)
          if (zspages[at + CLASS] !== kind)
            throw new Error(`zsmalloc: zspage ${zspage} is in the list of class ${kind}`)
          if (this.#groupOf(kind, zspages[at + USED]!) !== group)
            throw new Error(`zsmalloc: zspage ${zspage} is in fullness group ${group}`)
          previous = zspage
          zspage = zspages[at + NEXT]!
        }
      }
    }
    const free = new Set<number>()
    for (let zspage = this.#freeZspage; zspage !== none; zspage = zspages[zspage * zspageWords + NEXT]!)
      free.add(zspage)
    if (this.#watermark - free.size !== this.#zspagesInUse)
      throw new Error(`zsmalloc: ${this.#watermark - free.size} zspages in use, counted ${this.#zspagesInUse}`)
    const inChunks = new Set<number>()
    for (let chunk = 0; chunk < this.#chunkHeads.length; chunk++) {
      for (let zspage = this.#chunkHeads[chunk]!; zspage !== none; ) {
        if (zspages[zspage * zspageWords + BASE]! >>> this.#arena.chunkShift !== chunk)
          throw new Error(`zsmalloc: zspage ${zspage} is not in chunk ${chunk}`)
        inChunks.add(zspage)
        zspage = zspages[zspage * zspageWords + NEXT_IN_CHUNK]!
      }
    }
    let slotBytes = 0
    for (let zspage = 0; zspage < this.#watermark; zspage++) {
      if (free.has(zspage)) continue
      if (!inChunks.has(zspage)) throw new Error(`zsmalloc: zspage ${zspage} is in no chunk`)
      const at = zspage * zspageWords
      const kind = zspages[at + CLASS]!
      const granules = this.#granulesOf(zspage)
      runs.push([zspages[at + BASE]!, granules])
      const slots = kind < 0 ? 1 : this.#classes.slots[kind]!
      const open = new Set<number>()
      for (let slot = zspages[at + FREE_SLOT]!; slot !== none; ) {
        if (open.has(slot) || slot >= slots) throw new Error(`zsmalloc: the free list of zspage ${zspage} is wrong`)
        open.add(slot)
        this.locate(zspage * 2 ** slotBits + slot)
        slot = decodeFree(this.words[(this.at - headerBytes) >>> 2]!)
      }
      let used = 0
      for (let slot = 0; slot < slots; slot++) {
        if (open.has(slot)) continue
        used++
        const location = zspage * 2 ** slotBits + slot
        this.locate(location)
        const owner = this.words[(this.at - headerBytes) >>> 2]!
        if (owner < 0 || !owns(owner, location))
          throw new Error(`zsmalloc: slot ${slot} of zspage ${zspage} belongs to nobody (${owner})`)
        slotBytes += kind < 0 ? granules * granuleBytes : this.#classes.size[kind]!
      }
      if (used === 0 || used !== zspages[at + USED]!) throw new Error(`zsmalloc: zspage ${zspage} has ${used} objects`)
      if (kind >= 0) {
        if (listed.has(zspage) !== used < slots)
          throw new Error(`zsmalloc: zspage ${zspage} is not listed as it should`)
        if (used < slots) freeSlots[kind] = freeSlots[kind]! + slots - used
      }
    }
    for (let kind = 0; kind < freeSlots.length; kind++)
      if (freeSlots[kind] !== this.#freeSlots[kind])
        throw new Error(`zsmalloc: class ${kind} has ${freeSlots[kind]} free slots, counted ${this.#freeSlots[kind]}`)
    if (slotBytes !== this.slotBytes)
      throw new Error(`zsmalloc: ${slotBytes} bytes in slots, counted ${this.slotBytes}`)
    this.#arena.check(runs)
  }

  #allocLarge(need: number, owner: number): number {
    const granules = Math.ceil(need / granuleBytes)
    const zspage = this.#takeZspage(-granules, granules)
    if (zspage === none) return none
    const at = zspage * zspageWords
    this.#zspages[at + USED] = 1
    this.#zspages[at + FREE_SLOT] = none
    this.slotBytes += granules * granuleBytes
    this.#large++
    const location = zspage * 2 ** slotBits
    this.locate(location)
    this.words[(this.at - headerBytes) >>> 2] = owner
    return location
  }

  /** An empty zspage of a class, in its group. */
  #newZspage(kind: number): number {
    const zspage = this.#takeZspage(kind, this.#classes.granules[kind]!)
    if (zspage === none) return none
    const at = zspage * zspageWords
    const slots = this.#classes.slots[kind]!
    this.#zspages[at + USED] = 0
    this.#zspages[at + FREE_SLOT] = 0
    this.locate(zspage * 2 ** slotBits)
    const stepWords = this.#classes.size[kind]! >>> 2
    let word = (this.at - headerBytes) >>> 2
    for (let slot = 0; slot < slots; slot++, word += stepWords)
      this.words[word] = encodeFree(slot + 1 < slots ? slot + 1 : none)
    this.#freeSlots[kind] = this.#freeSlots[kind]! + slots
    this.#link(zspage, kind, 0)
    return zspage
  }

  /** A zspage number with a run of its own, in no group. */
  #takeZspage(kind: number, granules: number): number {
    const arena = this.#arena
    let zspage = this.#freeZspage
    if (zspage === none) {
      if (this.#watermark === this.#capacity || !arena.budget.take(zspageWords * 4)) return none
      // Taken back below when there is no run: then nothing was touched.
      zspage = this.#watermark
    }
    const base = arena.run(granules)
    if (base === none) {
      if (this.#freeZspage === none) arena.budget.give(zspageWords * 4)
      return none
    }
    if (this.#freeZspage === none) this.#watermark++
    else this.#freeZspage = this.#zspages[zspage * zspageWords + NEXT]!
    this.#zspagesInUse++
    this.#zspages[zspage * zspageWords + CLASS] = kind
    this.#enterChunk(zspage, base)
    return zspage
  }

  #dropZspage(zspage: number, granules: number): void {
    const at = zspage * zspageWords
    this.#leaveChunk(zspage)
    this.#arena.freeRun(this.#zspages[at + BASE]!, granules)
    this.#zspages[at + NEXT] = this.#freeZspage
    this.#freeZspage = zspage
    this.#zspagesInUse--
  }

  #enterChunk(zspage: number, base: number): void {
    const zspages = this.#zspages
    const at = zspage * zspageWords
    const chunk = base >>> this.#arena.chunkShift
    const head = this.#chunkHeads[chunk]!
    zspages[at + BASE] = base
    zspages[at + PREVIOUS_IN_CHUNK] = none
    zspages[at + NEXT_IN_CHUNK] = head
    if (head !== none) zspages[head * zspageWords + PREVIOUS_IN_CHUNK] = zspage
    this.#chunkHeads[chunk] = zspage
  }

  #leaveChunk(zspage: number): void {
    const zspages = this.#zspages
    const at = zspage * zspageWords
    const previous = zspages[at + PREVIOUS_IN_CHUNK]!
    const next = zspages[at + NEXT_IN_CHUNK]!
    if (previous === none) this.#chunkHeads[zspages[at + BASE]! >>> this.#arena.chunkShift] = next
    else zspages[previous * zspageWords + NEXT_IN_CHUNK] = next
    if (next !== none) zspages[next * zspageWords + PREVIOUS_IN_CHUNK] = previous
  }

  /** Fullness group for a number of used slots; `none` for a full zspage. */
  #groupOf(kind: number, used: number): number {
    const slots = this.#classes.slots[kind]!
    return used === slots ? none : Math.floor((used * groups) / slots)
  }

  #link(zspage: number, kind: number, group: number): void {
    if (group === none) return
    const zspages = this.#zspages
    const at = zspage * zspageWords
    const head = this.#heads[kind * groups + group]!
    zspages[at + PREVIOUS] = none
    zspages[at + NEXT] = head
    if (head !== none) zspages[head * zspageWords + PREVIOUS] = zspage
    this.#heads[kind * groups + group] = zspage
  }

  #unlink(zspage: number, kind: number, group: number): void {
    if (group === none) return
    const zspages = this.#zspages
    const at = zspage * zspageWords
    const previous = zspages[at + PREVIOUS]!
    const next = zspages[at + NEXT]!
    if (previous === none) this.#heads[kind * groups + group] = next
    else zspages[previous * zspageWords + NEXT] = next
    if (next !== none) zspages[next * zspageWords + PREVIOUS] = previous
  }

  #takeSlot(zspage: number, kind: number, owner: number): number {
    const at = zspage * zspageWords
    const zspages = this.#zspages
    const slot = zspages[at + FREE_SLOT]!
    this.locate(zspage * 2 ** slotBits + slot)
    const header = (this.at - headerBytes) >>> 2
    zspages[at + FREE_SLOT] = decodeFree(this.words[header]!)
    this.words[header] = owner
    const used = zspages[at + USED]!
    zspages[at + USED] = used + 1
    const before = this.#groupOf(kind, used)
    const after = this.#groupOf(kind, used + 1)
    if (before !== after) {
      this.#unlink(zspage, kind, before)
      this.#link(zspage, kind, after)
    }
    this.#freeSlots[kind] = this.#freeSlots[kind]! - 1
    this.slotBytes += this.#classes.size[kind]!
    return slot
  }

  #freeSlot(zspage: number, kind: number, slot: number): void {
    const at = zspage * zspageWords
    const zspages = this.#zspages
    this.locate(zspage * 2 ** slotBits + slot)
    this.words[(this.at - headerBytes) >>> 2] = encodeFree(zspages[at + FREE_SLOT]!)
    zspages[at + FREE_SLOT] = slot
    const used = zspages[at + USED]! - 1
    zspages[at + USED] = used
    const before = this.#groupOf(kind, used + 1)
    this.slotBytes -= this.#classes.size[kind]!
    if (used === 0) {
      this.#unlink(zspage, kind, before)
      this.#freeSlots[kind] = this.#freeSlots[kind]! + 1 - this.#classes.slots[kind]!
      this.#dropZspage(zspage, this.#classes.granules[kind]!)
      return
    }
    this.#freeSlots[kind] = this.#freeSlots[kind]! + 1
    const after = this.#groupOf(kind, used)
    if (before !== after) {
      this.#unlink(zspage, kind, before)
      this.#link(zspage, kind, after)
    }
  }

  /** Empties one zspage of the next class that has room for its objects elsewhere. Returns the objects moved. */
  #compactClass(objects: number, moved: Moved): number {
    const { size, slots } = this.#classes
    const count = size.length
    for (let step = 0; step < count; step++) {
      const kind = this.#compactFrom + step < count ? this.#compactFrom + step : this.#compactFrom + step - count
      // As many free slots as a zspage has, over at least two zspages: one of them can be emptied.
      if (this.#freeSlots[kind]! < slots[kind]!) continue
      this.#compactFrom = kind
      return this.#emptyZspage(kind, objects, moved)
    }
    return 0
  }

  #emptyZspage(kind: number, objects: number, moved: Moved): number {
    const zspages = this.#zspages
    const size = this.#classes.size[kind]!
    let source = none
    let group = 0
    for (; group < groups && source === none; group++) source = this.#heads[kind * groups + group]!
    group--
    const at = source * zspageWords
    // Out of its list, so that no object moves into the zspage that it comes from.
    this.#unlink(source, kind, group)
    let used = zspages[at + USED]!
    let done = 0
    for (let slot = 0; used > 0 && done < objects; slot++) {
      const from = source * 2 ** slotBits + slot
      this.locate(from)
      const { bytes, words, at: start } = this
      const header = (start - headerBytes) >>> 2
      const owner = words[header]!
      if (owner < 0) continue
      const target = this.#fullest(kind)
      const to = target * 2 ** slotBits + this.#takeSlot(target, kind, owner)
      this.bytes.set(bytes.subarray(start, start - headerBytes + size), this.at)
      words[header] = encodeFree(zspages[at + FREE_SLOT]!)
      zspages[at + FREE_SLOT] = slot
      zspages[at + USED] = --used
      this.#freeSlots[kind] = this.#freeSlots[kind]! + 1
      this.slotBytes -= size
      moved(owner, from, to)
      done++
    }
    this.objectsMoved += done
    if (used === 0) {
      this.#freeSlots[kind] = this.#freeSlots[kind]! - this.#classes.slots[kind]!
      this.#dropZspage(source, this.#classes.granules[kind]!)
      this.runsFreed++
    } else this.#link(source, kind, this.#groupOf(kind, used))
    return done
  }

  #fullest(kind: number): number {
    for (let group = groups - 1; group >= 0; group--) {
      const zspage = this.#heads[kind * groups + group]!
      if (zspage !== none) return zspage
    }
    return none
  }

  /** Moves zspages out of the emptiest chunk, making room in the others. Returns the objects moved. */
  #emptyChunk(objects: number): number {
    const arena = this.#arena
    const chunk = arena.emptiest()
    if (chunk === none) return 0
    let done = 0
    for (let zspage = this.#chunkHeads[chunk]!; zspage !== none && done < objects; ) {
      const at = zspage * zspageWords
      const granules = this.#granulesOf(zspage)
      const next = this.#zspages[at + NEXT_IN_CHUNK]!
      let to = arena.moveOut(this.#zspages[at + BASE]!, granules)
      if (to === none) {
        const other = this.#slidable(chunk, granules)
        if (other === none) return done
        done += this.#slideTogether(other)
        to = arena.moveOut(this.#zspages[at + BASE]!, granules)
      }
      this.#leaveChunk(zspage)
      this.#enterChunk(zspage, to)
      done += this.#zspages[at + USED]!
      zspage = next
    }
    this.objectsMoved += done
    return Math.min(done, objects)
  }

  /** The chunk (but not `except`) with most free granules in pieces, if those are at least so many. */
  #slidable(except: number, granules: number): number {
    const arena = this.#arena
    let best = none
    for (let chunk = 0; chunk < arena.maxChunks; chunk++)
      if (
        chunk !== except &&
        arena.freeIn(chunk) >= granules &&
        arena.isFragmented(chunk) &&
        (best === none || arena.freeIn(chunk) > arena.freeIn(best))
      )
        best = chunk
    return best
  }

  /** Slides the zspages of a chunk to its start, so that its free granules are in one piece. Returns the objects moved. */
  #slideTogether(chunk: number): number {
    const zspages = this.#zspages
    let count = 0
    for (
      let zspage = this.#chunkHeads[chunk]!;
      zspage !== none;
      zspage = zspages[zspage * zspageWords + NEXT_IN_CHUNK]!
    )
      this.#order[count++] = zspages[zspage * zspageWords + BASE]! * 2 ** 22 + zspage
    this.#order.subarray(0, count).sort()
    let to = chunk << this.#arena.chunkShift
    let done = 0
    for (let i = 0; i < count; i++) {
      const zspage = this.#order[i]! % 2 ** 22
      const at = zspage * zspageWords
      const granules = this.#granulesOf(zspage)
      if (zspages[at + BASE] !== to) {
        this.#arena.slide(zspages[at + BASE]!, granules, to)
        zspages[at + BASE] = to
        done += zspages[at + USED]!
      }
      to += granules
    }
    this.#arena.slidTogether(chunk)
    return done
  }

  #granulesOf(zspage: number): number {
    const kind = this.#zspages[zspage * zspageWords + CLASS]!
    return kind < 0 ? -kind : this.#classes.granules[kind]!
  }
}

/** A free slot holds the next free one as a negative number, so that it cannot be taken for an owner. */
const encodeFree = (next: number): number => -2 - next
const decodeFree = (word: number): number => -2 - word
