/**
 * zbud: at most two compressed pages ("buddies") per page frame of 4 KiB, one at each end, in units of 64 bytes.
 *
 * Simple and predictable: a freed buddy gives its part of the frame to the next page that fits. It never keeps more
 * than twice what it has frames for.
 *
 * Two generations, with the limits of their time:
 *  1 (Linux 2.6.39 to 3.8): 128 bytes of header in each frame, 62 units, at most 61 for one buddy: 3904 bytes.
 *  2 (Linux 3.9 and 3.10): no header; 32 bytes of handle in front of each buddy, 64 units, at most 63: 4000 bytes.
 *
 * Both look for a partner among the frames with one buddy, the fullest that still has room first.
 *
 * Invariants (see `check`): a frame has one or two buddies that do not overlap; with one it is in the list of its
 * units, with two in the list of full ones.
 *
 * DEVIATION: an empty frame goes back to the arena; generation 1 kept a list of unused ones. DEVIATION: it evicts
 * nothing: the chain decides page by page what goes. The original evicted whole frames, in generation 1 those with one
 * buddy first, in generation 2 the one to which a buddy was added longest ago.
 */
import type { StatsNode } from '@tmem/core'
import { type Arena, granuleBytes, localBits, none, OWN, runWords, type ZAllocator } from './arena.ts'

const frameBytes = 4096
const frameGranules = frameBytes / granuleBytes
const unitBytes = 64
const unitShift = 6
/** Lists by units of the only buddy (1 to 63); 0 is the list of frames with two. */
const lists = 64

/** Words of a frame: units of buddy 0 and (eight bits up) buddy 1; neighbours in its list. */
const UNITS = OWN
const PREVIOUS = OWN + 1
const NEXT = OWN + 2

export class Zbud implements ZAllocator {
  readonly maxSize: number
  readonly longestRun: number = frameBytes
  bytes: Uint8Array = new Uint8Array(0)
  words: Int32Array = new Int32Array(0)
  at = 0
  slotBytes = 0
  readonly #arena: Arena
  readonly #tag: number
  readonly #runs: Int32Array
  readonly #generation: 1 | 2
  /** Units in a frame, and bytes of handle in front of each buddy. */
  readonly #units: number
  readonly #handleBytes: number
  /** Where buddy 0 begins. */
  readonly #start: number
  readonly #heads: Int32Array = new Int32Array(lists).fill(none)
  readonly #tails: Int32Array = new Int32Array(lists).fill(none)
  /** Frames in each list: `unbuddied_list_counts`, and the buddied ones at 0. */
  readonly #counts: Int32Array = new Int32Array(lists)
  /** Pages that ever took so many units (cumul_chunk_counts). */
  readonly #cumulative: Float64Array = new Float64Array(lists)
  #frames = 0
  #framesMax = 0
  #zpages = 0
  #cumulZpages = 0
  #cumulZbytes = 0

  constructor(arena: Arena, generation: 1 | 2) {
    this.#arena = arena
    this.#tag = arena.newTag()
    this.#runs = arena.runs
    this.#generation = generation
    this.#units = generation === 1 ? 62 : 64
    this.#start = generation === 1 ? 128 : 0
    this.#handleBytes = generation === 1 ? 0 : 32
    this.maxSize = (this.#units - 1) * unitBytes - this.#handleBytes
  }

  alloc(size: number, owner: number): number {
    const runs = this.#runs
    const units = this.#unitsFor(size)
    // The fullest partner that leaves room: more units used are tried first.
    let list = this.#units - units
    while (list > 0 && this.#heads[list] === none) list--
    let frame: number
    let buddy = 0
    if (list > 0) {
      frame = this.#heads[list]!
      const at = frame * runWords
      buddy = (runs[at + UNITS]! & 0xff) === 0 ? 0 : 1
      this.#unlink(list, frame)
      runs[at + UNITS] = runs[at + UNITS]! | (units << (8 * buddy))
      this.#append(0, frame)
    } else {
      frame = this.#arena.take(frameGranules, this.#tag)
      if (frame === none) return none
      runs[frame * runWords + UNITS] = units
      this.#append(units, frame)
      if (++this.#frames > this.#framesMax) this.#framesMax = this.#frames
    }
    this.slotBytes += units * unitBytes
    this.#zpages++
    this.#cumulZpages++
    this.#cumulZbytes += size
    this.#cumulative[units] = this.#cumulative[units]! + 1
    const location = frame * 2 ** localBits + buddy
    this.locate(location)
    this.words[this.#ownerWord(location)] = owner
    return location
  }

  slotSize(size: number): number {
    return this.#unitsFor(size) * unitBytes
  }

  free(location: number): void {
    const runs = this.#runs
    const frame = location >>> localBits
    const at = frame * runWords
    const shift = 8 * (location & 1)
    const units = (runs[at + UNITS]! >>> shift) & 0xff
    const other = (runs[at + UNITS]! >>> (8 - shift)) & 0xff
    this.#unlink(other === 0 ? units : 0, frame)
    this.slotBytes -= units * unitBytes
    this.#zpages--
    if (other !== 0) {
      runs[at + UNITS] = other << (8 - shift)
      this.#append(other, frame)
      return
    }
    this.#frames--
    this.#arena.free(frame)
  }

  locate(location: number): void {
    const frame = location >>> localBits
    const arena = this.#arena
    const chunk = arena.chunkOf(frame)
    this.bytes = arena.bytes[chunk]!
    this.words = arena.words[chunk]!
    const offset = arena.offsetOf(frame) + this.#handleBytes
    this.at =
      (location & 1) === 0
        ? offset + this.#start
        : offset + frameBytes - (((this.#runs[frame * runWords + UNITS]! >>> 8) & 0xff) << unitShift)
  }

  /** Nothing: a buddy stays where it is. */
  compact(): number {
    return 0
  }

  stats(): StatsNode {
    const unbuddied: Record<string, number> = {}
    const cumulative: Record<string, number> = {}
    for (let units = 1; units < lists; units++) {
      if (this.#counts[units] !== 0) unbuddied[units] = this.#counts[units]!
      if (this.#cumulative[units] !== 0) cumulative[units] = this.#cumulative[units]!
    }
    return {
      name: 'zbud',
      counters: {
        pageframes: this.#frames,
        pageframes_max: this.#framesMax,
        zpages: this.#zpages,
        buddied_count: this.#counts[0]!,
        unbuddied_count: this.#frames - this.#counts[0]!,
        cumul_zpages: this.#cumulZpages,
        cumul_zbytes: this.#cumulZbytes,
        slot_bytes: this.slotBytes,
      },
      children: [
        { name: 'unbuddied_list_counts', counters: unbuddied, children: [] },
        { name: 'cumul_chunk_counts', counters: cumulative, children: [] },
      ],
    }
  }

  check(owns: (owner: number, location: number) => boolean, runs: Set<number>): void {
    const words = this.#runs
    const listed = new Map<number, number>()
    for (let list = 0; list < lists; list++) {
      let previous = none
      let count = 0
      for (let frame = this.#heads[list]!; frame !== none; frame = words[frame * runWords + NEXT]!) {
        if (listed.has(frame)) throw new Error(`zbud: frame ${frame} is listed twice`)
        if (words[frame * runWords + PREVIOUS] !== previous)
          throw new Error(`zbud: frame ${frame} has a wrong neighbour`)
        listed.set(frame, list)
        previous = frame
        count++
      }
      if (this.#tails[list] !== previous) throw new Error(`zbud: list ${list} has a wrong end`)
      if (this.#counts[list] !== count) throw new Error(`zbud: list ${list} has ${count} frames`)
    }
    let slotBytes = 0
    let zpages = 0
    let frames = 0
    for (const frame of this.#arena.runsOf(this.#tag)) {
      runs.add(frame)
      frames++
      const first = words[frame * runWords + UNITS]! & 0xff
      const second = words[frame * runWords + UNITS]! >>> 8
      if (first + second === 0 || first + second > this.#units || Math.max(first, second) > this.#units - 1)
        throw new Error(`zbud: frame ${frame} has buddies of ${first} and ${second} units`)
      if (listed.get(frame) !== (first !== 0 && second !== 0 ? 0 : first + second))
        throw new Error(`zbud: frame ${frame} is in list ${listed.get(frame)}`)
      for (const [buddy, units] of [first, second].entries()) {
        if (units === 0) continue
        const location = frame * 2 ** localBits + buddy
        const owner = this.#ownerAt(location)
        if (!owns(owner, location)) throw new Error(`zbud: buddy ${buddy} of frame ${frame} is owned by ${owner}`)
        zpages++
        slotBytes += units * unitBytes
      }
    }
    if (frames !== this.#frames || frames !== listed.size)
      throw new Error(`zbud: ${frames} frames, counted ${this.#frames}, listed ${listed.size}`)
    if (zpages !== this.#zpages) throw new Error(`zbud: ${zpages} pages, counted ${this.#zpages}`)
    if (slotBytes !== this.slotBytes) throw new Error(`zbud: ${slotBytes} bytes in buddies, counted ${this.slotBytes}`)
  }

  #unitsFor(size: number): number {
    return (size + this.#handleBytes + unitBytes - 1) >>> unitShift
  }

  #ownerAt(location: number): number {
    this.locate(location)
    return this.words[this.#ownerWord(location)]!
  }

  /**
   * Word of the owner's number, after `locate`: in the handle, or in the frame's header (two parts of 48 bytes from
   * 32).
   */
  #ownerWord(location: number): number {
    if (this.#generation === 2) return (this.at - this.#handleBytes) >>> 2
    return (this.#arena.offsetOf(location >>> localBits) + 32 + 48 * (location & 1)) >>> 2
  }

  #append(list: number, frame: number): void {
    const runs = this.#runs
    const tail = this.#tails[list]!
    runs[frame * runWords + PREVIOUS] = tail
    runs[frame * runWords + NEXT] = none
    if (tail === none) this.#heads[list] = frame
    else runs[tail * runWords + NEXT] = frame
    this.#tails[list] = frame
    this.#counts[list] = this.#counts[list]! + 1
  }

  #unlink(list: number, frame: number): void {
    const runs = this.#runs
    const previous = runs[frame * runWords + PREVIOUS]!
    const next = runs[frame * runWords + NEXT]!
    if (previous === none) this.#heads[list] = next
    else runs[previous * runWords + NEXT] = next
    if (next === none) this.#tails[list] = previous
    else runs[next * runWords + PREVIOUS] = previous
    this.#counts[list] = this.#counts[list]! - 1
  }
}
