/**
 * The directory of a stack: for every page the one place that holds it, and where in it; and for the pages in memory
 * the order in which they are used.
 *
 * An entry of the table of handles has two words of its own (the links of a queue, which this table does not use). They
 * say where the page is:
 *
 *     in memory:  24 bits number of the resident
 *                 16 length - 1, 4 codec, 9 flags, 3 place
 *     slow:       32 bits location (8 of them in the first word)
 *                 11 units - 1, 1 ghost, 8 epoch, 1 huge, 3 place
 *     same:       32 bits of content
 *                 3 place (`samePlace`)
 *
 * A resident is a page whose block is in a memory place: four words with its neighbours in the queue, its location, 24
 * bits of checksum and, in the top bytes, the number of its entry. So a page costs 30 bytes anywhere, and 16 more in
 * memory. The location of a clean copy below is in a table apart, which is touched only by pages that have one.
 *
 * Invariants: an entry is in the table exactly while one place has its page; a resident is in exactly one queue of its
 * place; resident and entry name each other; bytes of a queue are those of its residents.
 *
 * All state lies in typed arrays from the stack's allocator, so that threads can share it.
 */
import { entryWords, HandleTable, none } from './handles.ts'
import { TmemError } from './outcomes.ts'
import type { Allocator, ObjectId } from './store.ts'

/** Place of pages that repeat one word of 32 bits: the directory itself. */
export const samePlace = 7
/** Places of a stack at most. */
export const maxPlaces = 7

/** Words of an entry that are ours: low 24 bits of the first, all of the second. */
const FIRST = 2
const SECOND = 3
const low24 = 0xffffff
const topByte = 0xff000000 | 0

const placeShift = 29
const codecShift = 16
const codecMask = 15
const lengthMask = 0xffff
/** Flags of a page in memory: used since the order passed by; */
export const REFERENCED: number = 1 << 20
const queueShift = 21
const queueMask = 3
const flightShift = 23
const flightMask = 15
/** compressing it (again) gains nothing; */
export const TRIED: number = 1 << 27
/** not touched since recompression passed by. */
export const UNTOUCHED: number = 1 << 28

const unitsShift = 8
const unitsMask = 0x7ff
const copyPlaceShift = 12
const ghostBit = 1 << 19
const epochShift = 20
const epochMask = 0xff
const hugeBit = 1 << 28

/** Words of a resident. */
const residentWords = 4
const OLDER = 0
const NEWER = 1
const LOCATION = 2
const SUM = 3

/** Queues of a place, and the one that a page in memory is in. */
export const MAIN = 0
export const PROBATION = 1
export const EPHEMERAL = 2
const queuesOfPlace = 3
const nil = low24
/** Blocks of at most so many bytes count as good: half a page of 4 KiB. */
const goodBytes = 2048
/** Second word of an entry that is nowhere: no location of a slow place, no resident, on no flight. */
const nowhere = 0xff

/** Bytes of a page's metadata, wherever it is; what a page in memory has on top; what a clean copy has; an object. */
export const bytesPerPage: number = HandleTable.bytesPerEntry
export const bytesPerResident: number = residentWords * 4
export const bytesPerCopy = 6
export const bytesPerObject: number = HandleTable.bytesPerObject

export interface DirectoryOptions {
  /** Pages at once: 1 to `maxEntries`. */
  readonly capacity: number
  /** Pages in memory places at once: 0 to `capacity`. */
  readonly residents: number
  readonly pools: number
  /** By place: whether it is a slow one. */
  readonly slow: readonly boolean[]
  readonly allocator: Allocator
}

export class Directory {
  readonly table: HandleTable
  readonly capacity: number
  /** Pages by place (`samePlace` included). */
  readonly pages: Float64Array = new Float64Array(maxPlaces + 1)
  /**
   * By place: bytes of the blocks in memory, units of those in slow places; pages that do not shrink; blocks in memory
   * of at most 2 KiB.
   */
  readonly sizes: Float64Array = new Float64Array(maxPlaces + 1)
  readonly huge: Float64Array = new Float64Array(maxPlaces + 1)
  readonly good: Float64Array = new Float64Array(maxPlaces + 1)
  readonly #slow: Uint8Array = new Uint8Array(maxPlaces + 1)
  /** By queue: first and last resident, residents, and bytes that the chain says they take. */
  readonly #oldest: Int32Array = new Int32Array(maxPlaces * queuesOfPlace).fill(none)
  readonly #newest: Int32Array = new Int32Array(maxPlaces * queuesOfPlace).fill(none)
  readonly #counts: Float64Array = new Float64Array(maxPlaces * queuesOfPlace)
  readonly #bytes: Float64Array = new Float64Array(maxPlaces * queuesOfPlace)
  readonly #words: Int32Array
  readonly #residents: Int32Array
  /** By resident: location of its clean copy plus one (0: none); its units less one, and its place in the top bits. */
  readonly #copies: Uint32Array
  readonly #copyForms: Uint16Array
  readonly #maxResidents: number
  #freeResident = none
  /** Residents that there ever were at once, and copies: what memory was touched for. */
  residentWatermark = 0
  copyWatermark = 0
  /** Pages that have a clean copy below. */
  copies = 0

  /** Throws `TmemError` (`TMEM_NO_MEMORY`) when the allocator has no memory for it. */
  constructor(options: DirectoryOptions) {
    const { capacity, residents, pools, slow, allocator } = options
    this.capacity = capacity
    for (const [place, waits] of slow.entries()) this.#slow[place] = waits ? 1 : 0
    this.table = HandleTable.create({ capacity, queues: 0, pools, allocator, site: 'chain.handles' })
    this.#words = this.table.words
    this.#maxResidents = residents
    const memory = allocator.allocate(Math.max(1, residents) * (bytesPerResident + bytesPerCopy), 'chain.residents')
    if (memory === undefined)
      throw new TmemError(
        'TMEM_NO_MEMORY',
        `no memory for the directory of a stack (${residents} pages in memory): give smaller limits`,
        { layer: 'chain' },
      )
    this.#residents = new Int32Array(memory, 0, residents * residentWords)
    this.#copies = new Uint32Array(memory, residents * bytesPerResident, residents)
    this.#copyForms = new Uint16Array(memory, residents * (bytesPerResident + 4), residents)
  }

  // ---- Entries ----------------------------------------------------------------------------------------------------

  /** The entry of a page, or `none`. */
  find(pool: number, object: ObjectId, index: number): number {
    return this.table.find(pool, object, index)
  }

  /** A new entry for a handle that has none, nowhere yet; `none`: there is no room for it. */
  enter(pool: number, object: ObjectId, index: number): number {
    const entry = this.table.acquire()
    if (entry === none) return none
    if (!this.table.insert(entry, pool, object, index)) {
      this.table.release(entry)
      return none
    }
    this.#setNowhere(entry)
    return entry
  }

  /** Removes an entry that is nowhere. */
  remove(entry: number): void {
    this.table.remove(entry)
    this.table.release(entry)
  }

  /** Place of an entry. */
  placeOf(entry: number): number {
    return this.#words[entry * entryWords + SECOND]! >>> placeShift
  }

  /** The second word of a page in memory, for `lengthIn`, `codecIn` and `flags`. */
  stateOf(entry: number): number {
    return this.#words[entry * entryWords + SECOND]!
  }

  /** Sets and clears flags of a page in memory. */
  flag(entry: number, set: number, clear: number): void {
    const at = entry * entryWords + SECOND
    this.#words[at] = (this.#words[at]! & ~clear) | set
  }

  residentOf(entry: number): number {
    return this.#words[entry * entryWords + FIRST]! & low24
  }

  /** Notes that a page is in a memory place. It is in no queue yet. */
  setResident(entry: number, place: number, resident: number, length: number, codec: number): void {
    this.#set(entry, resident, (length - 1) | (codec << codecShift) | (place << placeShift))
  }

  /** Changes length and codec of a page in memory. */
  setForm(entry: number, length: number, codec: number): void {
    const at = entry * entryWords + SECOND
    const state = this.#words[at]!
    this.#count(state, -1)
    this.#words[at] = (state & ~(lengthMask | (codecMask << codecShift))) | (length - 1) | (codec << codecShift)
    this.#count(this.#words[at]!, 1)
  }

  /**
   * Notes that a page is in a slow place; `ghost`: it was in the main queue before; `epoch`: when it sank; `huge`: it
   * does not shrink, as far as anybody has tried.
   */
  setSlow(
    entry: number,
    place: number,
    location: number,
    units: number,
    ghost: boolean,
    epoch: number,
    huge: boolean,
  ): void {
    this.#set(
      entry,
      location & low24,
      (location >>> 24) |
        ((units - 1) << unitsShift) |
        (ghost ? ghostBit : 0) |
        ((epoch & epochMask) << epochShift) |
        (huge ? hugeBit : 0) |
        (place << placeShift),
    )
  }

  /** Notes that a page repeats one word. */
  setSame(entry: number, word: number): void {
    this.#set(entry, word & low24, (word >>> 24) | (samePlace << placeShift))
  }

  #set(entry: number, first: number, second: number): void {
    const at = entry * entryWords
    this.#words[at + FIRST] = (this.#words[at + FIRST]! & topByte) | first
    this.#words[at + SECOND] = second
    this.#count(second, 1)
  }

  /**
   * The page leaves its place: before it is noted in another one, or removed. Whatever was noted of it is forgotten.
   */
  leave(entry: number): void {
    this.#count(this.#words[entry * entryWords + SECOND]!, -1)
    this.#setNowhere(entry)
  }

  /** Nobody who asks for an owner's location may take an entry without a page for one that has it. */
  #setNowhere(entry: number): void {
    const at = entry * entryWords
    this.#words[at + FIRST] = this.#words[at + FIRST]! | nil
    this.#words[at + SECOND] = nowhere
  }

  /** Whether an entry has no page. */
  isNowhere(entry: number): boolean {
    const at = entry * entryWords
    return this.#words[at + SECOND] === nowhere && (this.#words[at + FIRST]! & low24) === nil
  }

  /** Counts a page in its place (`by` 1), or takes it off there (-1). */
  #count(state: number, by: number): void {
    const place = state >>> placeShift
    this.pages[place] = this.pages[place]! + by
    if (place === samePlace) return
    const isSlow = this.#slow[place] === 1
    const size = isSlow ? ((state >>> unitsShift) & unitsMask) + 1 : (state & lengthMask) + 1
    this.sizes[place] = this.sizes[place]! + by * size
    if (isSlow ? (state & hugeBit) !== 0 : ((state >>> codecShift) & codecMask) === 0)
      this.huge[place] = this.huge[place]! + by
    if (!isSlow && size <= goodBytes) this.good[place] = this.good[place]! + by
  }

  /** Whether the page of an entry is kept as it is in memory, or does not shrink in a slow place. */
  isHuge(entry: number): boolean {
    const state = this.#words[entry * entryWords + SECOND]!
    const place = state >>> placeShift
    if (place === samePlace) return false
    return this.#slow[place] === 1 ? (state & hugeBit) !== 0 : ((state >>> codecShift) & codecMask) === 0
  }

  /** Location of a page in a slow place. */
  locationOf(entry: number): number {
    const at = entry * entryWords
    return (this.#words[at + SECOND]! & 0xff) * 2 ** 24 + (this.#words[at + FIRST]! & low24)
  }

  /** A page in a slow place has moved inside of it. */
  relocate(entry: number, location: number, units: number): void {
    const at = entry * entryWords
    this.#words[at + FIRST] = (this.#words[at + FIRST]! & topByte) | (location & low24)
    this.#count(this.#words[at + SECOND]!, -1)
    const rest = this.#words[at + SECOND]! & ~(0xff | (unitsMask << unitsShift))
    this.#words[at + SECOND] = rest | (location >>> 24) | ((units - 1) << unitsShift)
    this.#count(this.#words[at + SECOND]!, 1)
  }

  /** Units of a page in a slow place. */
  unitsOf(entry: number): number {
    return ((this.#words[entry * entryWords + SECOND]! >>> unitsShift) & unitsMask) + 1
  }

  /** Whether a page in a slow place sank from the main queue. */
  isMainGhost(entry: number): boolean {
    return (this.#words[entry * entryWords + SECOND]! & ghostBit) !== 0
  }

  /** Epochs since a page in a slow place sank, modulo 256. */
  ageOf(entry: number, epoch: number): number {
    return (epoch - (this.#words[entry * entryWords + SECOND]! >>> epochShift)) & epochMask
  }

  /** The word that a page of the same place repeats. */
  wordOf(entry: number): number {
    const at = entry * entryWords
    return (this.#words[at + FIRST]! & low24) | (this.#words[at + SECOND]! << 24)
  }

  // ---- Residents --------------------------------------------------------------------------------------------------

  /** Residents at once, at most. */
  get maxResidents(): number {
    return this.#maxResidents
  }

  /** A free number for a resident, or `none`. */
  acquireResident(): number {
    const free = this.#freeResident
    if (free !== none) {
      this.#freeResident = this.#residents[free * residentWords + LOCATION]!
      return free
    }
    if (this.residentWatermark === this.#maxResidents) return none
    return this.residentWatermark++
  }

  /** Gives a number back; its resident is in no queue. */
  releaseResident(resident: number): void {
    this.#residents[resident * residentWords + LOCATION] = this.#freeResident
    this.#freeResident = resident
  }

  /** Fills in a resident that is in no queue yet. */
  setBlock(resident: number, entry: number, location: number, checksum: number): void {
    const at = resident * residentWords
    const words = this.#residents
    words[at + OLDER] = nil | (entry << 24)
    words[at + NEWER] = nil | ((entry << 16) & topByte)
    words[at + LOCATION] = location
    words[at + SUM] = (checksum & low24) | ((entry << 8) & topByte)
  }

  /** Changes what is at rest of a resident. */
  moveBlock(resident: number, location: number): void {
    this.#residents[resident * residentWords + LOCATION] = location
  }

  /** Changes the checksum of a resident. */
  setSum(resident: number, checksum: number): void {
    const at = resident * residentWords + SUM
    this.#residents[at] = (this.#residents[at]! & topByte) | (checksum & low24)
  }

  /** Location of a resident's block. */
  blockOf(resident: number): number {
    return this.#residents[resident * residentWords + LOCATION]! >>> 0
  }

  /** Whether a checksum is that of a resident. */
  isSum(resident: number, checksum: number): boolean {
    return ((this.#residents[resident * residentWords + SUM]! ^ checksum) & low24) === 0
  }

  /** The entry of a resident. */
  entryOf(resident: number): number {
    const at = resident * residentWords
    const words = this.#residents
    return (words[at + OLDER]! >>> 24) | ((words[at + NEWER]! >>> 24) << 8) | ((words[at + SUM]! >>> 24) << 16)
  }

  /** Location of the clean copy of a resident, or `none`. */
  copyOf(resident: number): number {
    return this.#copies[resident]! - 1
  }

  /** Place of the clean copy of a resident that has one. */
  copyPlaceOf(resident: number): number {
    return this.#copyForms[resident]! >>> copyPlaceShift
  }

  /** Units of the clean copy of a resident that has one. */
  copyUnitsOf(resident: number): number {
    return (this.#copyForms[resident]! & unitsMask) + 1
  }

  /** Notes the clean copy of a resident that has none. */
  setCopy(resident: number, place: number, location: number, units: number): void {
    this.copies++
    if (resident >= this.copyWatermark) this.copyWatermark = resident + 1
    this.#copies[resident] = location + 1
    this.#copyForms[resident] = (units - 1) | (place << copyPlaceShift)
  }

  /** Forgets the clean copy of a resident that has one. */
  dropCopy(resident: number): void {
    this.copies--
    this.#copies[resident] = 0
  }

  // ---- Queues -----------------------------------------------------------------------------------------------------

  /** Oldest resident of a queue of a place, or `none`. */
  oldest(place: number, queue: number): number {
    return this.#oldest[place * queuesOfPlace + queue]!
  }

  /** The resident that came after this one in its queue, or `none`. */
  newer(resident: number): number {
    const link = this.#residents[resident * residentWords + NEWER]! & low24
    return link === nil ? none : link
  }

  /** Residents of a queue. */
  queued(place: number, queue: number): number {
    return this.#counts[place * queuesOfPlace + queue]!
  }

  /** Bytes of a queue. */
  bytesOf(place: number, queue: number): number {
    return this.#bytes[place * queuesOfPlace + queue]!
  }

  /** Changes the bytes of a queue by those of a block that got another size. */
  resize(place: number, queue: number, bytes: number): void {
    const number = place * queuesOfPlace + queue
    this.#bytes[number] = this.#bytes[number]! + bytes
  }

  /** Links a resident in at the new end of a queue. */
  append(place: number, queue: number, resident: number, entry: number, bytes: number): void {
    const number = place * queuesOfPlace + queue
    const newest = this.#newest[number]!
    this.#link(resident, OLDER, newest)
    this.#link(resident, NEWER, none)
    if (newest === none) this.#oldest[number] = resident
    else this.#link(newest, NEWER, resident)
    this.#newest[number] = resident
    this.#enter(number, queue, entry, bytes)
  }

  /** Links a resident in at the old end of a queue: it goes next. */
  prepend(place: number, queue: number, resident: number, entry: number, bytes: number): void {
    const number = place * queuesOfPlace + queue
    const oldest = this.#oldest[number]!
    this.#link(resident, NEWER, oldest)
    this.#link(resident, OLDER, none)
    if (oldest === none) this.#newest[number] = resident
    else this.#link(oldest, OLDER, resident)
    this.#oldest[number] = resident
    this.#enter(number, queue, entry, bytes)
  }

  /** Takes a resident out of its queue. */
  unlink(place: number, resident: number, entry: number, bytes: number): void {
    const queue = this.queueOf(entry)
    const number = place * queuesOfPlace + queue
    const at = resident * residentWords
    const older = this.#residents[at + OLDER]! & low24
    const newer = this.#residents[at + NEWER]! & low24
    if (older === nil) this.#oldest[number] = newer === nil ? none : newer
    else this.#link(older, NEWER, newer)
    if (newer === nil) this.#newest[number] = older === nil ? none : older
    else this.#link(newer, OLDER, older)
    this.#counts[number] = this.#counts[number]! - 1
    this.#bytes[number] = this.#bytes[number]! - bytes
  }

  /** The queue of a page in memory. */
  queueOf(entry: number): number {
    return (this.#words[entry * entryWords + SECOND]! >>> queueShift) & queueMask
  }

  /** The flight that a page in memory is on, 1 to 15; 0: none. */
  flightOf(entry: number): number {
    return (this.#words[entry * entryWords + SECOND]! >>> flightShift) & flightMask
  }

  /** Notes the flight of a page in memory. */
  setFlight(entry: number, flight: number): void {
    this.flag(entry, flight << flightShift, flightMask << flightShift)
  }

  /**
   * Throws an `Error` that names a broken invariant. `sizeOf` says what a block of a length takes in a memory place.
   * For tests: not in the middle of a move.
   */
  check(sizeOf: (place: number, length: number) => number): void {
    const { table } = this
    const holders = new Map<number, number>()
    const counted = [this.pages, this.sizes, this.huge, this.good].map((counts) => counts.slice())
    for (let pool = 0; pool < table.pools; pool++)
      for (let entry = table.firstOfPool(pool); entry !== none; entry = table.nextOfPool(entry)) {
        if (this.isNowhere(entry)) throw new Error(`chain: entry ${entry} has no page`)
        if (this.placeOf(entry) !== samePlace) holders.set(entry, this.placeOf(entry))
        this.#count(this.stateOf(entry), -1)
      }
    // What is left over was counted wrongly.
    for (const [n, counts] of [this.pages, this.sizes, this.huge, this.good].entries()) {
      const wrong = counts.findIndex((left) => left !== 0)
      if (wrong >= 0) throw new Error(`chain: ${counts[wrong]} too many were counted in place ${wrong} (count ${n})`)
      counts.set(counted[n]!)
    }
    const seen = new Set<number>()
    for (let place = 0; place < maxPlaces; place++)
      for (let queue = 0; queue < queuesOfPlace; queue++) this.#checkQueue(place, queue, holders, seen, sizeOf)
    let copies = 0
    for (const resident of seen) if (this.copyOf(resident) !== none) copies++
    if (copies !== this.copies) throw new Error(`chain: ${copies} clean copies, counted ${this.copies}`)
    for (let free = this.#freeResident; free !== none; free = this.#residents[free * residentWords + LOCATION]!) {
      if (seen.has(free)) throw new Error(`chain: resident ${free} is free and in use`)
      if (this.copyOf(free) !== none) throw new Error(`chain: resident ${free} is free and has a clean copy`)
      seen.add(free)
    }
    if (seen.size !== this.residentWatermark)
      throw new Error(`chain: ${this.residentWatermark - seen.size} residents are neither in a queue nor free`)
  }

  #checkQueue(
    place: number,
    queue: number,
    holders: ReadonlyMap<number, number>,
    seen: Set<number>,
    sizeOf: (place: number, length: number) => number,
  ): void {
    const number = place * queuesOfPlace + queue
    let older: number = none
    let count = 0
    let bytes = 0
    for (let resident = this.#oldest[number]!; resident !== none; resident = this.newer(resident)) {
      const entry = this.entryOf(resident)
      const where = `chain: resident ${resident} of queue ${queue} of place ${place}`
      if (seen.has(resident)) throw new Error(`${where} is queued twice`)
      if ((this.#residents[resident * residentWords + OLDER]! & low24) !== (older & low24))
        throw new Error(`${where} does not know who is before it`)
      if (holders.get(entry) !== place || this.residentOf(entry) !== resident || this.queueOf(entry) !== queue)
        throw new Error(`${where} and entry ${entry} do not name each other`)
      seen.add(resident)
      older = resident
      count++
      bytes += sizeOf(place, lengthIn(this.stateOf(entry)))
    }
    if (this.#newest[number] !== older) throw new Error(`chain: queue ${queue} of place ${place} has another end`)
    if (count !== this.#counts[number] || bytes !== this.#bytes[number])
      throw new Error(
        `chain: queue ${queue} of place ${place} has ${count} residents with ${bytes} bytes, counted ${this.#counts[number]} with ${this.#bytes[number]}`,
      )
  }

  #enter(number: number, queue: number, entry: number, bytes: number): void {
    this.flag(entry, queue << queueShift, queueMask << queueShift)
    this.#counts[number] = this.#counts[number]! + 1
    this.#bytes[number] = this.#bytes[number]! + bytes
  }

  #link(resident: number, which: number, to: number): void {
    const at = resident * residentWords + which
    this.#residents[at] = (this.#residents[at]! & topByte) | (to & low24)
  }
}

/** Bytes of the block of a page in memory, out of `stateOf`. */
export const lengthIn = (state: number): number => (state & lengthMask) + 1
/** Codec of the block of a page in memory, out of `stateOf`. */
export const codecIn = (state: number): number => (state >>> codecShift) & codecMask
/** Place, out of `stateOf`. */
export const placeIn = (state: number): number => state >>> placeShift
/** Resident flight, out of `stateOf`. */
export const isFlying = (state: number): boolean => ((state >>> flightShift) & flightMask) !== 0

/** Scatters a handle over 32 bits: the same in every run. */
export function tagOf(pool: number, object: ObjectId, index: number): number {
  let hash = Math.imul(pool + 1, 0x9e3779b1) ^ Math.imul(index | 0, 0x85ebca6b)
  if (typeof object === 'number') hash = Math.imul(hash ^ (object | 0), 0xc2b2ae35) ^ Math.floor(object / 2 ** 32)
  else {
    // The same for 5n as for 5.
    hash = Math.imul(hash ^ Number(BigInt.asIntN(32, object)), 0xc2b2ae35) ^ Number(BigInt.asIntN(32, object >> 32n))
    for (let wide = object >> 64n; wide > 0n; wide >>= 32n)
      hash = Math.imul(hash ^ Number(BigInt.asIntN(32, wide)), 0x27d4eb2f)
  }
  return hash ^ (hash >>> 15)
}
