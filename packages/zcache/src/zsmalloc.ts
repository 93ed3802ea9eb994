/**
 * A size-class allocator for compressed pages, in the style of Linux's zsmalloc: objects of one class lie side by side
 * in zspages (a run of granules whose length is chosen so that little is left over at its end).
 *
 * Classes are 32 bytes apart up to a little over 4 KiB; sizes whose best zspage holds the same number of objects share
 * a class. A larger object has a zspage of its own. Zspages of a class are kept in four fullness groups; an allocation
 * takes the fullest zspage that has a free slot. An empty zspage gives its run back at once, for any class. Compaction
 * moves objects out of the emptiest zspage of a class into the fuller ones.
 *
 * A slot begins with one word: the owner's number, or, in a free slot, the next free one (negative). The object
 * follows.
 *
 * Invariants (see `check`): every used slot has an owner that is not negative; the free slots of a zspage are exactly
 * its free list; a zspage that is neither full nor empty is in the list of its fullness group.
 *
 * Sources: "zsmalloc" of the Linux kernel's documentation (size classes, zspages, fullness groups, compaction).
 * DEVIATION: zspages lie in one piece (granules are neighbours), so that a codec reads an object where it rests; the
 * original chains single pages and lets objects cross them. Instead of a multiple of 4 KiB, a zspage may have any
 * number of granules from 4 to 24 KiB; with 32 bytes from class to class that wastes least (computed over the
 * compressed sizes of executables, libraries, headers and scripts, 12,000 to 120,000 pages: 1 to 2 %).
 */
import type { MovedBlock, StatsNode } from '@tmem/core'
import { type Arena, granuleBytes, localBits, minRunBytes, none, OWN, runWords, type ZAllocator } from './arena.ts'

const headerBytes = 4
const classStep = 32
const classShift = 5
/** Largest object that shares zspages: a raw page of 4 KiB fits. */
const classLimit = 4096 + classStep
const maxZspageBytes = 24 * 1024
const groups = 4
const slotMask = 2 ** localBits - 1

/**
 * Words of a zspage: class (`none` for one large object), used slots, first free slot, neighbours in the fullness
 * group.
 */
const CLASS = OWN
const USED = OWN + 1
const FREE_SLOT = OWN + 2
const PREVIOUS = OWN + 3
const NEXT = OWN + 4

/** Layout of the classes. */
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
    for (let count = minRunBytes / granuleBytes; count <= maxZspageBytes / granuleBytes; count++) {
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
  readonly maxSize: number
  readonly longestRun: number = maxZspageBytes
  bytes: Uint8Array = new Uint8Array(0)
  words: Int32Array = new Int32Array(0)
  at = 0
  slotBytes = 0
  readonly #arena: Arena
  readonly #tag: number
  readonly #runs: Int32Array
  readonly #classes: Classes
  /** First zspage per class and group; group 0 is the emptiest. A few KiB, made once. */
  readonly #heads: Int32Array
  /** Free slots per class, in zspages that are not full. */
  readonly #freeSlots: Int32Array
  #zspages = 0
  #large = 0
  #objectsMoved = 0
  #zspagesCompacted = 0
  /** Class at which the next compaction looks first. */
  #compactFrom = 0

  constructor(arena: Arena) {
    this.#arena = arena
    this.#tag = arena.newTag()
    this.#runs = arena.runs
    this.#classes = layOutClasses()
    const count = this.#classes.size.length
    this.maxSize = Math.min(arena.chunkBytes, 2 ** 17) - headerBytes
    this.#heads = new Int32Array(count * groups).fill(none)
    this.#freeSlots = new Int32Array(count)
  }

  alloc(size: number, owner: number): number {
    const need = size + headerBytes
    if (need > classLimit) return this.#allocLarge(need, owner)
    const kind = this.#classes.ofStep[(need + classStep - 1) >>> classShift]!
    let zspage = this.#fullest(kind)
    if (zspage === none) {
      zspage = this.#newZspage(kind)
      if (zspage === none) return none
    }
    return zspage * 2 ** localBits + this.#takeSlot(zspage, kind, owner)
  }

  slotSize(size: number): number {
    const need = size + headerBytes
    if (need > classLimit) return Math.ceil(need / granuleBytes) * granuleBytes
    return this.#classes.size[this.#classes.ofStep[(need + classStep - 1) >>> classShift]!]!
  }

  free(location: number): void {
    const zspage = location >>> localBits
    const kind = this.#runs[zspage * runWords + CLASS]!
    if (kind !== none) {
      this.#freeSlot(zspage, kind, location & slotMask)
      return
    }
    this.slotBytes -= this.#runs[zspage * runWords + USED]!
    this.#large--
    this.#arena.free(zspage)
  }

  locate(location: number): void {
    const zspage = location >>> localBits
    const kind = this.#runs[zspage * runWords + CLASS]!
    const arena = this.#arena
    const chunk = arena.chunkOf(zspage)
    this.bytes = arena.bytes[chunk]!
    this.words = arena.words[chunk]!
    const offset = arena.offsetOf(zspage) + headerBytes
    this.at = kind === none ? offset : offset + (location & slotMask) * this.#classes.size[kind]!
  }

  compact(objects: number, moved: MovedBlock): number {
    let left = objects
    while (left > 0) {
      const done = this.#compactClass(left, moved)
      if (done === 0) break
      left -= done
    }
    return objects - left
  }

  stats(): StatsNode {
    return {
      name: 'zsmalloc',
      counters: {
        zspages: this.#zspages,
        large_objects: this.#large,
        slot_bytes: this.slotBytes,
        objects_moved: this.#objectsMoved,
        zspages_compacted: this.#zspagesCompacted,
      },
      children: [],
    }
  }

  check(owns: (owner: number, location: number) => boolean, runs: Set<number>): void {
    const words = this.#runs
    const { size, granules, slots } = this.#classes
    const listed = new Map<number, number>()
    for (let kind = 0; kind < size.length; kind++) {
      for (let group = 0; group < groups; group++) {
        let previous = none
        for (let zspage = this.#heads[kind * groups + group]!; zspage !== none; ) {
          const at = zspage * runWords
          if (listed.has(zspage)) throw new Error(`zsmalloc: zspage ${zspage} is listed twice`)
          listed.set(zspage, kind)
          if (words[at + PREVIOUS] !== previous) throw new Error(`zsmalloc: zspage ${zspage} has a wrong neighbour`)
          if (words[at + CLASS] !== kind) throw new Error(`zsmalloc: zspage ${zspage} is in the list of class ${kind}`)
          if (this.#groupOf(kind, words[at + USED]!) !== group)
            throw new Error(`zsmalloc: zspage ${zspage} is in fullness group ${group}`)
          previous = zspage
          zspage = words[at + NEXT]!
        }
      }
    }
    const freeSlots = new Int32Array(size.length)
    let slotBytes = 0
    let zspages = 0
    const visit = (location: number): void => {
      this.locate(location)
      const owner = this.words[(this.at - headerBytes) >>> 2]!
      if (owner < 0 || !owns(owner, location))
        throw new Error(
          `zsmalloc: slot ${location & slotMask} of zspage ${location >>> localBits} is owned by ${owner}`,
        )
    }
    for (const zspage of this.#arena.runsOf(this.#tag)) {
      const at = zspage * runWords
      const kind = words[at + CLASS]!
      runs.add(zspage)
      if (kind === none) {
        visit(zspage * 2 ** localBits)
        slotBytes += words[at + USED]!
        continue
      }
      zspages++
      if (this.#arena.granulesOf(zspage) !== granules[kind])
        throw new Error(`zsmalloc: zspage ${zspage} has a wrong length`)
      const open = new Set<number>()
      for (let slot = words[at + FREE_SLOT]!; slot !== none; ) {
        if (open.has(slot) || slot >= slots[kind]!) throw new Error(`zsmalloc: the free list of ${zspage} is wrong`)
        open.add(slot)
        this.locate(zspage * 2 ** localBits + slot)
        slot = decodeFree(this.words[(this.at - headerBytes) >>> 2]!)
      }
      const used = slots[kind]! - open.size
      for (let slot = 0; slot < slots[kind]!; slot++) if (!open.has(slot)) visit(zspage * 2 ** localBits + slot)
      slotBytes += used * size[kind]!
      if (used === 0 || used !== words[at + USED]!) throw new Error(`zsmalloc: zspage ${zspage} has ${used} objects`)
      if (listed.has(zspage) !== open.size > 0) throw new Error(`zsmalloc: zspage ${zspage} is not listed as it should`)
      freeSlots[kind] = freeSlots[kind]! + open.size
    }
    for (let kind = 0; kind < freeSlots.length; kind++)
      if (freeSlots[kind] !== this.#freeSlots[kind])
        throw new Error(`zsmalloc: class ${kind} has ${freeSlots[kind]} free slots, counted ${this.#freeSlots[kind]}`)
    if (slotBytes !== this.slotBytes)
      throw new Error(`zsmalloc: ${slotBytes} bytes in slots, counted ${this.slotBytes}`)
    if (zspages !== this.#zspages) throw new Error(`zsmalloc: ${zspages} zspages, counted ${this.#zspages}`)
  }

  #allocLarge(need: number, owner: number): number {
    const granules = Math.ceil(need / granuleBytes)
    const zspage = this.#arena.take(granules, this.#tag)
    if (zspage === none) return none
    const at = zspage * runWords
    this.#runs[at + CLASS] = none
    this.#runs[at + USED] = granules * granuleBytes
    this.slotBytes += granules * granuleBytes
    this.#large++
    const location = zspage * 2 ** localBits
    this.locate(location)
    this.words[(this.at - headerBytes) >>> 2] = owner
    return location
  }

  /** An empty zspage of a class, in its group. */
  #newZspage(kind: number): number {
    const zspage = this.#arena.take(this.#classes.granules[kind]!, this.#tag)
    if (zspage === none) return none
    const at = zspage * runWords
    const slots = this.#classes.slots[kind]!
    this.#runs[at + CLASS] = kind
    this.#runs[at + USED] = 0
    this.#runs[at + FREE_SLOT] = 0
    this.locate(zspage * 2 ** localBits)
    const stepWords = this.#classes.size[kind]! >>> 2
    let word = (this.at - headerBytes) >>> 2
    for (let slot = 0; slot < slots; slot++, word += stepWords)
      this.words[word] = encodeFree(slot + 1 < slots ? slot + 1 : none)
    this.#freeSlots[kind] = this.#freeSlots[kind]! + slots
    this.#zspages++
    this.#link(zspage, kind, 0)
    return zspage
  }

  #dropZspage(zspage: number, kind: number): void {
    this.#freeSlots[kind] = this.#freeSlots[kind]! - this.#classes.slots[kind]!
    this.#zspages--
    this.#arena.free(zspage)
  }

  /** Fullness group for a number of used slots; `none` for a full zspage. */
  #groupOf(kind: number, used: number): number {
    const slots = this.#classes.slots[kind]!
    return used === slots ? none : Math.floor((used * groups) / slots)
  }

  #link(zspage: number, kind: number, group: number): void {
    if (group === none) return
    const runs = this.#runs
    const at = zspage * runWords
    const head = this.#heads[kind * groups + group]!
    runs[at + PREVIOUS] = none
    runs[at + NEXT] = head
    if (head !== none) runs[head * runWords + PREVIOUS] = zspage
    this.#heads[kind * groups + group] = zspage
  }

  #unlink(zspage: number, kind: number, group: number): void {
    if (group === none) return
    const runs = this.#runs
    const at = zspage * runWords
    const previous = runs[at + PREVIOUS]!
    const next = runs[at + NEXT]!
    if (previous === none) this.#heads[kind * groups + group] = next
    else runs[previous * runWords + NEXT] = next
    if (next !== none) runs[next * runWords + PREVIOUS] = previous
  }

  #takeSlot(zspage: number, kind: number, owner: number): number {
    const at = zspage * runWords
    const runs = this.#runs
    const slot = runs[at + FREE_SLOT]!
    this.locate(zspage * 2 ** localBits + slot)
    const header = (this.at - headerBytes) >>> 2
    runs[at + FREE_SLOT] = decodeFree(this.words[header]!)
    this.words[header] = owner
    const used = runs[at + USED]!
    runs[at + USED] = used + 1
    this.#regroup(zspage, kind, used, used + 1)
    this.#freeSlots[kind] = this.#freeSlots[kind]! - 1
    this.slotBytes += this.#classes.size[kind]!
    return slot
  }

  #freeSlot(zspage: number, kind: number, slot: number): void {
    const at = zspage * runWords
    const runs = this.#runs
    this.locate(zspage * 2 ** localBits + slot)
    this.words[(this.at - headerBytes) >>> 2] = encodeFree(runs[at + FREE_SLOT]!)
    runs[at + FREE_SLOT] = slot
    const used = runs[at + USED]! - 1
    runs[at + USED] = used
    this.slotBytes -= this.#classes.size[kind]!
    this.#freeSlots[kind] = this.#freeSlots[kind]! + 1
    if (used > 0) {
      this.#regroup(zspage, kind, used + 1, used)
      return
    }
    this.#unlink(zspage, kind, this.#groupOf(kind, 1))
    this.#dropZspage(zspage, kind)
  }

  /** Moves a zspage to the list of its new fullness group. */
  #regroup(zspage: number, kind: number, usedBefore: number, usedNow: number): void {
    const before = this.#groupOf(kind, usedBefore)
    const now = this.#groupOf(kind, usedNow)
    if (before === now) return
    this.#unlink(zspage, kind, before)
    this.#link(zspage, kind, now)
  }

  /** Empties one zspage of the next class that has room for its objects elsewhere. Returns the objects moved. */
  #compactClass(objects: number, moved: MovedBlock): number {
    const { slots } = this.#classes
    const count = slots.length
    for (let step = 0; step < count; step++) {
      const kind = this.#compactFrom + step < count ? this.#compactFrom + step : this.#compactFrom + step - count
      // As many free slots as a zspage has, over at least two zspages: one of them can be emptied.
      if (this.#freeSlots[kind]! < slots[kind]!) continue
      this.#compactFrom = kind
      return this.#emptyZspage(kind, objects, moved)
    }
    return 0
  }

  #emptyZspage(kind: number, objects: number, moved: MovedBlock): number {
    const runs = this.#runs
    const size = this.#classes.size[kind]!
    let group = 0
    while (this.#heads[kind * groups + group] === none) group++
    const source = this.#heads[kind * groups + group]!
    const at = source * runWords
    // Out of its list, so that no object moves into the zspage that it comes from.
    this.#unlink(source, kind, group)
    let used = runs[at + USED]!
    let done = 0
    for (let slot = 0; used > 0 && done < objects; slot++) {
      const from = source * 2 ** localBits + slot
      this.locate(from)
      const { bytes, words, at: start } = this
      const header = (start - headerBytes) >>> 2
      const owner = words[header]!
      if (owner < 0) continue
      const target = this.#fullest(kind)
      const to = target * 2 ** localBits + this.#takeSlot(target, kind, owner)
      this.bytes.set(bytes.subarray(start, start - headerBytes + size), this.at)
      words[header] = encodeFree(runs[at + FREE_SLOT]!)
      runs[at + FREE_SLOT] = slot
      runs[at + USED] = --used
      this.#freeSlots[kind] = this.#freeSlots[kind]! + 1
      this.slotBytes -= size
      moved(owner, to)
      done++
    }
    this.#objectsMoved += done
    if (used === 0) {
      this.#zspagesCompacted++
      this.#dropZspage(source, kind)
    } else this.#link(source, kind, this.#groupOf(kind, used))
    return done
  }

  /** The fullest zspage of a class that has a free slot, or `none`. */
  #fullest(kind: number): number {
    for (let group = groups - 1; group >= 0; group--) {
      const zspage = this.#heads[kind * groups + group]!
      if (zspage !== none) return zspage
    }
    return none
  }
}

/** A free slot holds the next free one as a negative number, so that it cannot be taken for an owner. */
const encodeFree = (next: number): number => -2 - next
const decodeFree = (word: number): number => -2 - word
