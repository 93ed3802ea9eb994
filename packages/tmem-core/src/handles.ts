/**
 * The table of handles: (pool, object, index) → entry number, in typed arrays, without a JavaScript object per page.
 *
 * A store keeps whatever it knows of a page in arrays of its own, indexed by the entry number (0 to capacity-1). The
 * table knows for every entry its object and index, chains all pages of an object and all objects of a pool (so that
 * flushing either costs what it removes), and links entries into queues in the order in which they were appended
 * (so that the oldest page is found at once).
 *
 * Layout. Entry: five words; the low 24 bits of the first four are links (previous and next page of the object, older
 * and newer entry of the queue), three of their top bytes are the object slot, the fifth word is the index. Both
 * indexes are open addressing with Robin Hood order: a slot holds a number (24 bits) and its distance from home, so
 * that a miss ends early, and removal shifts back without reading anything else. Nothing is ever rehashed: the arrays
 * are reserved once, for the whole capacity, and the operating system gives real memory only to what was touched. All
 * state lies in the arrays, none in fields, so that several threads can attach to the same (shared) memory, one at a
 * time.
 *
 * A page's slot also holds its index, and its home is (offset of the object + scattered index) modulo the number of
 * slots, where different objects have different offsets. Home and index together therefore name one handle exactly, and
 * a lookup never reads the entry: that is one cache miss instead of two, which at a hundred thousand pages measured as
 * a tenth of the copy of a page against a third.
 *
 * Invariant: a page has an entry exactly when `find` reports it; an object has a slot exactly while it has a page.
 */
import { checkOptions } from './options.ts'
import { TmemError } from './outcomes.ts'
import type { Allocator, ObjectId } from './store.ts'
import { assertObject } from './store.ts'

/** No entry, no object. */
export const none = -1

/** Largest number of entries in one table: entry numbers have 24 bits. */
export const maxEntries: number = 2 ** 24 - 1

/** Words of an entry: entry `n` of a table has those of `words` from `n × entryWords` on. */
export const entryWords = 5
const PREVIOUS_PAGE = 0
const NEXT_PAGE = 1
const OLDER = 2
const NEWER = 3
const INDEX = 4

/** Object: pool, six words of id, wide flag, first page, page count, previous and next object of the pool, offset. */
const objectWords = 13
const POOL = 0
const ID = 1
const WIDE = 7
const FIRST_PAGE = 8
const PAGES = 9
const PREVIOUS_OBJECT = 10
const NEXT_OBJECT = 11
const OFFSET = 12

/** Slot: bits 24 to 30 are the distance from home plus one, bits 0 to 23 the entry or object number; 0 is empty. */
const step = 1 << 24
const numberMask = step - 1
const topByte = 0xff000000 | 0
/** No link, in 24 bits. */
const nil = numberMask
const maxDistance = 127

/**
 * Words at the start of the state: the rest are three per queue, then those of the pools: first object, pages, objects.
 */
const FREE_ENTRY = 0
const ENTRY_WATERMARK = 1
const FREE_OBJECT = 2
const OBJECT_WATERMARK = 3
const OBJECTS = 4
const ENTRIES = 5
/** Changes of the page slots, so that what a search remembers can be told to be out of date. */
const VERSION = 6
const stateWords = 8
const poolWords = 3
const POOL_PAGES = 1
const POOL_OBJECTS = 2

/** What a table is made for. */
export interface HandleTableOptions {
  /** Largest number of entries at once: 1 to `maxEntries`. */
  readonly capacity: number
  /** Number of queues (default 1). */
  readonly queues?: number
  /** Pools are numbered 0 to pools-1 (default 256). */
  readonly pools?: number
  /** Where the memory comes from. */
  readonly allocator: Allocator
  /** Prefix of the allocation sites, e.g. `memory`: then `memory.entries`, `memory.slots`, … */
  readonly site: string
}

/** The memory of a table: what another thread needs to attach to it. */
export interface HandleTableMemory {
  readonly capacity: number
  readonly queues: number
  readonly pools: number
  readonly state: ArrayBufferLike
  readonly entries: ArrayBufferLike
  readonly slots: ArrayBufferLike
  readonly objects: ArrayBufferLike
  readonly objectSlots: ArrayBufferLike
}

/** Homes for so many numbers: at most four fifths of them are taken. */
const homesFor = (capacity: number): number => Math.ceil(capacity * 1.25) + 1
/**
 * Slots for so many homes: nothing lies further from home than `maxDistance`, so the last home needs that many more.
 */
const slotsFor = (capacity: number): number => homesFor(capacity) + maxDistance + 5

/** Scatters a word over 32 bits, one to one (the finaliser of MurmurHash3). */
function scatter(word: number): number {
  let h = Math.imul(word ^ (word >>> 16), 0x85ebca6b)
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
  return h ^ (h >>> 16)
}

/** Public form of a link. */
const linked = (link: number): number => (link === nil ? none : link)

/** A number near the golden section of `size` that has no factor in common with it. */
function multiplierFor(size: number): number {
  const common = (a: number, b: number): number => (b === 0 ? a : common(b, a % b))
  let multiplier = Math.max(1, Math.floor(size * 0.618))
  while (common(size, multiplier) !== 1) multiplier++
  return multiplier
}

/** Object numbers plus distances: a Robin Hood set of small numbers under a hash that the caller computes. */
class Slots {
  readonly slots: Int32Array
  readonly size: number
  readonly scale: number

  constructor(memory: ArrayBufferLike, capacity: number) {
    this.size = slotsFor(capacity)
    this.slots = new Int32Array(memory, 0, this.size)
    this.scale = this.size / 2 ** 32
  }

  home(hash: number): number {
    return ((hash >>> 0) * this.scale) | 0
  }

  /** Adds `number` under `hash`. Returns what found no place: `none`, or the number that was pushed out at the end. */
  add(hash: number, number: number): number {
    const { slots, size } = this
    let position = this.home(hash)
    let carried = step | number
    for (;;) {
      const resident = slots[position]
      if (resident === 0) {
        slots[position] = carried
        return none
      }
      if (resident >>> 24 < carried >>> 24) {
        slots[position] = carried
        carried = resident
      }
      if (carried >>> 24 === maxDistance) return carried & numberMask
      carried += step
      if (++position === size) position = 0
    }
  }

  /** Removes `number`, which is there under `hash`. */
  remove(hash: number, number: number): void {
    const { slots, size } = this
    let position = this.home(hash)
    while ((slots[position] & numberMask) !== number || slots[position] === 0) if (++position === size) position = 0
    for (;;) {
      const next = position + 1 === size ? 0 : position + 1
      const resident = slots[next]
      if (resident >>> 24 <= 1) break
      slots[position] = resident - step
      position = next
    }
    slots[position] = 0
  }
}

/**
 * Handles and their entries: `find` before `insert`, `remove` before the number is used again. A store that moves, ages
 * or evicts entries uses the queues; every operation is bounded and allocates nothing.
 */
export class HandleTable {
  /** Bytes reserved for one entry: its words and its share of the index. */
  static readonly bytesPerEntry: number = entryWords * 4 + 10
  /** Bytes used by one object: its words and its share of the index. */
  static readonly bytesPerObject: number = objectWords * 4 + 5

  readonly capacity: number
  readonly queues: number
  readonly pools: number
  /** The memory, for another thread's `HandleTable.attach`. */
  readonly memory: HandleTableMemory
  readonly #state: Int32Array
  readonly #entries: Int32Array
  readonly #objects: Int32Array
  /** Two words per slot: number and distance, index. */
  readonly #slots: Int32Array
  readonly #homes: number
  readonly #slotScale: number
  /** Object slot × this, modulo the number of slots, is the object's offset: different for different objects. */
  readonly #multiplier: number
  readonly #objectSlots: Slots
  /** Scratch: the six words of the id being looked up. */
  readonly #id: Int32Array = new Int32Array(6)
  /** The way from a wide id to its words; each part is cut to its lower 64 bits. */
  readonly #idBytes: DataView = new DataView(new ArrayBuffer(24))
  /** 1 when any of the upper four words of the scratch id is set. */
  #wide = 0
  /** The wide id in the scratch, if it is one. */
  #idOf: bigint | undefined
  /** Where the page found last was: a hint, always checked against the memory. */
  #foundAt = 0
  /** Where the search for the page missed last ended, and with how many changes before. */
  #missedSlot = none
  #missedIndex = 0
  #missedAt = 0
  #missedDistance = 0
  #missedVersion = none
  /** The object found last: a hint, always checked against the memory. */
  #hint = 0

  private constructor(memory: HandleTableMemory) {
    this.memory = memory
    this.capacity = memory.capacity
    this.queues = memory.queues
    this.pools = memory.pools
    this.#state = new Int32Array(memory.state)
    this.#entries = new Int32Array(memory.entries)
    this.#objects = new Int32Array(memory.objects)
    this.#slots = new Int32Array(memory.slots)
    this.#homes = homesFor(memory.capacity)
    this.#slotScale = this.#homes / 2 ** 32
    this.#multiplier = multiplierFor(this.#homes)
    this.#objectSlots = new Slots(memory.objectSlots, memory.capacity)
  }

  /** Makes an empty table. Throws `TmemError` (`TMEM_NO_MEMORY`) when the allocator has no memory for it. */
  static create(options: HandleTableOptions): HandleTable {
    checkOptions('HandleTable.create', options, {
      capacity: 'number',
      queues: 'number?',
      pools: 'number?',
      allocator: 'object',
      site: 'text',
    })
    const { capacity, queues = 1, pools = 256, allocator, site } = options
    if (!Number.isInteger(capacity) || capacity < 1 || capacity > maxEntries)
      throw new RangeError(`a handle table holds 1 to ${maxEntries} entries, got ${capacity}`)
    const reserve = (part: string, words: number): ArrayBufferLike => {
      const memory = allocator.allocate(words * 4, `${site}.${part}`)
      if (memory === undefined)
        throw new TmemError(
          'TMEM_NO_MEMORY',
          `no memory for the table of handles (${words * 4} bytes for ${part}): give a smaller limit`,
          { layer: site },
        )
      return memory
    }
    const table = new HandleTable({
      capacity,
      queues,
      pools,
      state: reserve('state', stateWords + queues * 3 + pools * poolWords),
      entries: reserve('entries', capacity * entryWords),
      slots: reserve('slots', slotsFor(capacity) * 2),
      objects: reserve('objects', capacity * objectWords),
      objectSlots: reserve('objectSlots', slotsFor(capacity)),
    })
    const state = table.#state
    state[FREE_ENTRY] = none
    state[FREE_OBJECT] = none
    for (let queue = 0; queue < queues; queue++) {
      state[stateWords + queue * 3] = none
      state[stateWords + queue * 3 + 1] = none
    }
    for (let pool = 0; pool < pools; pool++) state[stateWords + queues * 3 + pool * poolWords] = none
    return table
  }

  /** The same table seen from another thread. Calls of several threads must exclude one another. */
  static attach(memory: HandleTableMemory): HandleTable {
    return new HandleTable(memory)
  }

  /** Entries in use. */
  get size(): number {
    return this.#state[ENTRIES]
  }

  /** Objects with at least one page. */
  get objects(): number {
    return this.#state[OBJECTS]
  }

  /** Largest number of objects that there ever were: what `objects` memory was touched for. */
  get objectWatermark(): number {
    return this.#state[OBJECT_WATERMARK]
  }

  /** Largest number of entries that `acquire` ever had out. */
  get entryWatermark(): number {
    return this.#state[ENTRY_WATERMARK]
  }

  /**
   * The words of all entries, `entryWords` each. The words of a number that is not in the table belong to the caller,
   * who may chain free numbers in them; a store that does so does not use `acquire`.
   */
  get words(): Int32Array {
    return this.#entries
  }

  /**
   * A free entry number, or `none`. For stores whose entries have no place of their own; give it back with `release`.
   */
  acquire(): number {
    const state = this.#state
    const free = state[FREE_ENTRY]
    if (free !== none) {
      state[FREE_ENTRY] = this.#entries[free * entryWords + INDEX]
      return free
    }
    const fresh = state[ENTRY_WATERMARK]
    if (fresh === this.capacity) return none
    state[ENTRY_WATERMARK] = fresh + 1
    return fresh
  }

  /** Gives back a number from `acquire`; it must not be in the table any more. */
  release(entry: number): void {
    this.#entries[entry * entryWords + INDEX] = this.#state[FREE_ENTRY]
    this.#state[FREE_ENTRY] = entry
  }

  /** The entry of a page, or `none`. Throws for what is no object id, as `assertObject`. */
  find(pool: number, object: ObjectId, index: number): number {
    const slot = this.#findObject(pool, object)
    return slot === none ? none : this.#findPage(slot, index)
  }

  /** Whether a page of that handle would find its object already there: a new object costs `bytesPerObject`. */
  hasObject(pool: number, object: ObjectId): boolean {
    return this.#findObject(pool, object) !== none
  }

  /**
   * Enters `entry` (a free number) under a handle that is not in the table. False, and nothing changed, when
   * the index has no room near the handle's home (only hostile handles come that far).
   */
  insert(entry: number, pool: number, object: ObjectId, index: number): boolean {
    let slot = this.#findObject(pool, object)
    if (slot === none) {
      slot = this.#addObject(pool)
      if (slot === none) return false
    }
    const entries = this.#entries
    const objects = this.#objects
    const at = entry * entryWords
    const objectAt = slot * objectWords
    if (!this.#addPage(slot, index, entry)) {
      if (objects[objectAt + PAGES] === 0) this.#removeObject(slot)
      return false
    }
    const first = objects[objectAt + FIRST_PAGE]
    entries[at + PREVIOUS_PAGE] = nil | (slot << 24)
    entries[at + NEXT_PAGE] = (first & numberMask) | ((slot << 16) & topByte)
    entries[at + OLDER] = nil | ((slot << 8) & topByte)
    entries[at + NEWER] = nil
    entries[at + INDEX] = index
    if (first !== none) this.#link(first, PREVIOUS_PAGE, entry)
    objects[objectAt + FIRST_PAGE] = entry
    objects[objectAt + PAGES] = objects[objectAt + PAGES] + 1
    this.#state[ENTRIES] = this.#state[ENTRIES] + 1
    this.#state[this.#poolAt(pool) + POOL_PAGES]++
    return true
  }

  /** Takes an entry out of the table (not out of a queue). The object goes with its last page. */
  remove(entry: number): void {
    const entries = this.#entries
    const objects = this.#objects
    const at = entry * entryWords
    const slot = this.#objectSlotOf(entry)
    const objectAt = slot * objectWords
    this.#removePage(slot, entries[at + INDEX], entry)
    const previous = entries[at + PREVIOUS_PAGE] & numberMask
    const next = entries[at + NEXT_PAGE] & numberMask
    if (previous === nil) objects[objectAt + FIRST_PAGE] = linked(next)
    else this.#link(previous, NEXT_PAGE, next)
    if (next !== nil) this.#link(next, PREVIOUS_PAGE, previous)
    const pages = objects[objectAt + PAGES] - 1
    objects[objectAt + PAGES] = pages
    this.#state[ENTRIES] = this.#state[ENTRIES] - 1
    this.#state[this.#poolAt(objects[objectAt + POOL]) + POOL_PAGES]--
    if (pages === 0) this.#removeObject(slot)
  }

  /** Gives the handle (and the place in its queue) of entry `from` to entry `to`, a free number. */
  move(from: number, to: number, queue: number): void {
    const entries = this.#entries
    const source = from * entryWords
    const slot = this.#objectSlotOf(from)
    const position = this.#positionOf(slot, entries[source + INDEX], from)
    this.#slots[position * 2] = (this.#slots[position * 2] & topByte) | to
    entries.copyWithin(to * entryWords, source, source + entryWords)
    const previous = entries[source + PREVIOUS_PAGE] & numberMask
    const next = entries[source + NEXT_PAGE] & numberMask
    if (previous === nil) this.#objects[slot * objectWords + FIRST_PAGE] = to
    else this.#link(previous, NEXT_PAGE, to)
    if (next !== nil) this.#link(next, PREVIOUS_PAGE, to)
    if (queue === none) return
    const older = entries[source + OLDER] & numberMask
    const newer = entries[source + NEWER] & numberMask
    const queueAt = stateWords + queue * 3
    if (older === nil) this.#state[queueAt] = to
    else this.#link(older, NEWER, to)
    if (newer === nil) this.#state[queueAt + 1] = to
    else this.#link(newer, OLDER, to)
  }

  /** The pool of an entry. */
  poolOf(entry: number): number {
    return this.#objects[this.#objectSlotOf(entry) * objectWords + POOL]
  }

  /** The object id of an entry: a number where it is a safe integer. */
  objectOf(entry: number): ObjectId {
    const at = this.#objectSlotOf(entry) * objectWords
    const objects = this.#objects
    const low = objects[at + ID] >>> 0
    const high = objects[at + ID + 1] >>> 0
    if (objects[at + WIDE] === 0 && high < 0x200000) return high * 2 ** 32 + low
    let id = 0n
    for (let word = 5; word >= 0; word--) id = (id << 32n) | BigInt(objects[at + ID + word] >>> 0)
    return id
  }

  /** The index of an entry. */
  indexOf(entry: number): number {
    return this.#entries[entry * entryWords + INDEX] >>> 0
  }

  /** Any page of an object, or `none`: remove until there is none to flush it. */
  firstOfObject(pool: number, object: ObjectId): number {
    const slot = this.#findObject(pool, object)
    return slot === none ? none : this.#objects[slot * objectWords + FIRST_PAGE]
  }

  /** Any page of a pool, or `none`: remove until there is none to empty it. */
  firstOfPool(pool: number): number {
    const slot = this.#state[this.#poolAt(pool)]
    return slot === none ? none : this.#objects[slot * objectWords + FIRST_PAGE]
  }

  /**
   * The page of its pool that a walk from `firstOfPool` comes to after this one, or `none`. Nothing may be added or
   * removed meanwhile.
   */
  nextOfPool(entry: number): number {
    const next = this.#entries[entry * entryWords + NEXT_PAGE] & numberMask
    if (next !== nil) return next
    const object = this.#objects[this.#objectSlotOf(entry) * objectWords + NEXT_OBJECT]
    return object === none ? none : this.#objects[object * objectWords + FIRST_PAGE]
  }

  /** The page of its object that a walk from `firstOfObject` comes to after this one, or `none`; as `nextOfPool`. */
  nextOfObject(entry: number): number {
    return linked(this.#entries[entry * entryWords + NEXT_PAGE] & numberMask)
  }

  /** Entries of a pool. */
  pagesOf(pool: number): number {
    return this.#state[this.#poolAt(pool) + POOL_PAGES]
  }

  /** Objects of a pool with at least one page. */
  objectsOf(pool: number): number {
    return this.#state[this.#poolAt(pool) + POOL_OBJECTS]
  }

  /** Where the words of a pool are. */
  #poolAt(pool: number): number {
    return stateWords + this.queues * 3 + pool * poolWords
  }

  /** Links an entry in at the new end of a queue. */
  append(queue: number, entry: number): void {
    const at = stateWords + queue * 3
    const newest = this.#state[at + 1]
    this.#link(entry, OLDER, newest & numberMask)
    this.#link(entry, NEWER, nil)
    if (newest === none) this.#state[at] = entry
    else this.#link(newest, NEWER, entry)
    this.#state[at + 1] = entry
    this.#state[at + 2] = this.#state[at + 2] + 1
  }

  /** Takes an entry out of the queue that it is in. */
  unlink(queue: number, entry: number): void {
    const entries = this.#entries
    const at = stateWords + queue * 3
    const older = entries[entry * entryWords + OLDER] & numberMask
    const newer = entries[entry * entryWords + NEWER] & numberMask
    if (older === nil) this.#state[at] = linked(newer)
    else this.#link(older, NEWER, newer)
    if (newer === nil) this.#state[at + 1] = linked(older)
    else this.#link(newer, OLDER, older)
    this.#state[at + 2] = this.#state[at + 2] - 1
  }

  /** The entry that was appended first and is still in the queue, or `none`. */
  oldest(queue: number): number {
    return this.#state[stateWords + queue * 3]
  }

  /** The entry appended after this one, or `none`. */
  newer(entry: number): number {
    return linked(this.#entries[entry * entryWords + NEWER] & numberMask)
  }

  /** Entries in a queue. */
  queued(queue: number): number {
    return this.#state[stateWords + queue * 3 + 2]
  }

  /** Splits an id into the scratch words. Throws for what is no object id, as `assertObject`. */
  #setId(object: ObjectId): void {
    // Taking a wide id apart makes numbers on the heap, and most operations name the object of the one before.
    if (typeof object === 'bigint' && object === this.#idOf) return
    assertObject(object)
    const id = this.#id
    this.#idOf = undefined
    if (typeof object === 'number') {
      id[0] = object
      id[1] = object / 2 ** 32
      id[2] = 0
      id[3] = 0
      id[4] = 0
      id[5] = 0
      this.#wide = 0
      return
    }
    const bytes = this.#idBytes
    bytes.setBigUint64(0, object, true)
    bytes.setBigUint64(8, object >> 64n, true)
    bytes.setBigUint64(16, object >> 128n, true)
    for (let word = 0; word < 6; word++) id[word] = bytes.getInt32(word * 4, true)
    this.#wide = (id[2] | id[3] | id[4] | id[5]) === 0 ? 0 : 1
    this.#idOf = object
  }

  #findObject(pool: number, object: ObjectId): number {
    const objects = this.#objects
    const hintAt = this.#hint * objectWords
    const low = typeof object === 'number' ? object | 0 : 0
    // Fast path: a 32-bit number naming the same object as the last call. `low >>> 0` fails the test for anything else.
    if (
      typeof object === 'number' &&
      low >>> 0 === object &&
      objects[hintAt + ID] === low &&
      objects[hintAt + POOL] === pool &&
      objects[hintAt + ID + 1] === 0 &&
      objects[hintAt + WIDE] === 0 &&
      objects[hintAt + PAGES] !== 0
    )
      return this.#hint
    this.#setId(object)
    const id = this.#id
    const { slots, size } = this.#objectSlots
    let position = this.#objectSlots.home(this.#idHash(pool))
    for (let distance = 1; ; distance++) {
      const resident = slots[position]
      if (resident >>> 24 < distance) return none
      if (resident >>> 24 === distance) {
        const slot = resident & numberMask
        const at = slot * objectWords
        if (
          objects[at + ID] === id[0] &&
          objects[at + ID + 1] === id[1] &&
          objects[at + POOL] === pool &&
          objects[at + ID + 2] === id[2] &&
          objects[at + ID + 3] === id[3] &&
          objects[at + ID + 4] === id[4] &&
          objects[at + ID + 5] === id[5]
        ) {
          this.#hint = slot
          return slot
        }
      }
      if (++position === size) position = 0
    }
  }

  /**
   * The entry of a page, or `none`. Four slots are judged at a time without a branch between them: how far a page is
   * from home cannot be predicted, and a wrong guess costs more than judging all four.
   */
  #findPage(slot: number, index: number): number {
    const slots = this.#slots
    const word = index | 0
    const home = this.#home(this.#objects[slot * objectWords + OFFSET], word)
    for (let position = home, distance = 1; ; position += 4, distance += 4) {
      const at = position * 2
      const first = slots[at]
      const second = slots[at + 2]
      const third = slots[at + 4]
      const fourth = slots[at + 6]
      // Zero where the page is: its index, at its distance.
      const inFirst = (slots[at + 1] ^ word) | ((first >>> 24) ^ distance)
      const inSecond = (slots[at + 3] ^ word) | ((second >>> 24) ^ (distance + 1))
      const inThird = (slots[at + 5] ^ word) | ((third >>> 24) ^ (distance + 2))
      const inFourth = (slots[at + 7] ^ word) | ((fourth >>> 24) ^ (distance + 3))
      // All ones where it is, else zero.
      const isFirst = ~((inFirst | -inFirst) >> 31)
      const isSecond = ~((inSecond | -inSecond) >> 31)
      const isThird = ~((inThird | -inThird) >> 31)
      const isFourth = ~((inFourth | -inFourth) >> 31)
      if ((isFirst | isSecond | isThird | isFourth) !== 0) {
        this.#foundAt = position + (isSecond & 1) + (isThird & 2) + (isFourth & 3)
        return ((first & isFirst) | (second & isSecond) | (third & isThird) | (fourth & isFourth)) & numberMask
      }
      // The page would have pushed aside whoever is nearer to home than it would be.
      const ends =
        ((first >>> 24) - distance) |
        ((second >>> 24) - distance - 1) |
        ((third >>> 24) - distance - 2) |
        ((fourth >>> 24) - distance - 3)
      if (ends < 0) {
        this.#missed(slot, word, position, distance)
        return none
      }
    }
  }

  /** Remembers where a page that was not found belongs: the first slot from `position` on that is nearer to home. */
  #missed(slot: number, word: number, position: number, distance: number): void {
    this.#missedSlot = slot
    this.#missedIndex = word
    this.#missedAt = position
    this.#missedDistance = distance
    this.#missedVersion = this.#state[VERSION]
  }

  /** Home of a page: its object's offset plus its scattered index, modulo the number of homes. */
  #home(offset: number, index: number): number {
    const position = (((scatter(index) >>> 0) * this.#slotScale) | 0) + offset
    return position < this.#homes ? position : position - this.#homes
  }

  /** Position of an entry that is there. */
  #positionOf(slot: number, index: number, entry: number): number {
    const slots = this.#slots
    // Most entries are removed right after they were found.
    let position = this.#foundAt
    if ((slots[position * 2] & numberMask) === entry && slots[position * 2] !== 0) return position
    position = this.#home(this.#objects[slot * objectWords + OFFSET], index)
    // An empty slot reads as number 0; its distance tells it from entry 0.
    while ((slots[position * 2] & numberMask) !== entry || slots[position * 2] === 0) position++
    return position
  }

  /** Enters a page; false, and nothing changed, when that would move any page further than the largest distance. */
  #addPage(slot: number, index: number, entry: number): boolean {
    const slots = this.#slots
    // Where the search for it ended is where it belongs; most pages are entered right after they were missed.
    if (this.#missedVersion !== this.#state[VERSION] || this.#missedSlot !== slot || this.#missedIndex !== (index | 0))
      this.#findPage(slot, index)
    let at = this.#missedAt * 2
    let distance = this.#missedDistance
    while (slots[at] >>> 24 >= distance) {
      at += 2
      distance++
    }
    if (distance > maxDistance) return false
    let end = at
    for (let resident = slots[end]; resident !== 0; resident = slots[end]) {
      if (resident >>> 24 === maxDistance) return false
      end += 2
    }
    for (; end !== at; end -= 2) {
      slots[end] = slots[end - 2] + step
      slots[end + 1] = slots[end - 1]
    }
    slots[at] = (distance * step) | entry
    slots[at + 1] = index
    this.#state[VERSION]++
    return true
  }

  #removePage(slot: number, index: number, entry: number): void {
    const slots = this.#slots
    let at = this.#positionOf(slot, index, entry) * 2
    for (let next = slots[at + 2]; next >>> 24 > 1; next = slots[at + 2]) {
      slots[at] = next - step
      slots[at + 1] = slots[at + 3]
      at += 2
    }
    slots[at] = 0
    this.#state[VERSION]++
  }

  /** Sets one link of an entry. */
  #link(entry: number, which: number, to: number): void {
    const at = entry * entryWords + which
    this.#entries[at] = (this.#entries[at] & topByte) | to
  }

  /** The object slot of an entry: the top bytes of its first three links. */
  #objectSlotOf(entry: number): number {
    const entries = this.#entries
    const at = entry * entryWords
    return (
      (entries[at + PREVIOUS_PAGE] >>> 24) |
      ((entries[at + NEXT_PAGE] >>> 24) << 8) |
      ((entries[at + OLDER] >>> 24) << 16)
    )
  }

  /** Hash of the scratch id in a pool. */
  #idHash(pool: number): number {
    const id = this.#id
    let hash = scatter(id[0] ^ Math.imul(id[1] ^ Math.imul(pool + 1, 0x27d4eb2f), 0x9e3779b1))
    if (this.#wide !== 0) for (let word = 2; word < 6; word++) hash = scatter(Math.imul(hash, 0x9e3779b1) ^ id[word])
    return hash
  }

  /** Makes an object for the scratch id, without a page yet. */
  #addObject(pool: number): number {
    const state = this.#state
    const objects = this.#objects
    let slot = state[FREE_OBJECT]
    if (slot !== none) state[FREE_OBJECT] = objects[slot * objectWords + NEXT_OBJECT]
    else {
      slot = state[OBJECT_WATERMARK]
      // There are as many object slots as entries and each object has a page, so only a full table has none left.
      if (slot === this.capacity) return none
      state[OBJECT_WATERMARK] = slot + 1
    }
    const at = slot * objectWords
    objects[at + POOL] = pool
    objects.set(this.#id, at + ID)
    objects[at + WIDE] = this.#wide
    objects[at + FIRST_PAGE] = none
    objects[at + PAGES] = 0
    // Below 2^24 × 2^25 the product is exact.
    objects[at + OFFSET] = (slot * this.#multiplier) % this.#homes
    const pushedOut = this.#objectSlots.add(this.#idHash(pool), slot)
    if (pushedOut !== none) {
      if (pushedOut !== slot) {
        this.#objectSlots.remove(this.#idHash(pool), slot)
        this.#objectSlots.add(this.#hashOfObject(pushedOut), pushedOut)
      }
      objects[at + NEXT_OBJECT] = state[FREE_OBJECT]
      state[FREE_OBJECT] = slot
      return none
    }
    const poolAt = this.#poolAt(pool)
    const first = state[poolAt]
    objects[at + PREVIOUS_OBJECT] = none
    objects[at + NEXT_OBJECT] = first
    if (first !== none) objects[first * objectWords + PREVIOUS_OBJECT] = slot
    state[poolAt] = slot
    state[poolAt + POOL_OBJECTS]++
    state[OBJECTS] = state[OBJECTS] + 1
    this.#hint = slot
    return slot
  }

  #removeObject(slot: number): void {
    const state = this.#state
    const objects = this.#objects
    const at = slot * objectWords
    this.#objectSlots.remove(this.#hashOfObject(slot), slot)
    const previous = objects[at + PREVIOUS_OBJECT]
    const next = objects[at + NEXT_OBJECT]
    const poolAt = this.#poolAt(objects[at + POOL])
    state[poolAt + POOL_OBJECTS]--
    if (previous === none) state[poolAt] = next
    else objects[previous * objectWords + NEXT_OBJECT] = next
    if (next !== none) objects[next * objectWords + PREVIOUS_OBJECT] = previous
    objects[at + PAGES] = 0
    objects[at + NEXT_OBJECT] = state[FREE_OBJECT]
    state[FREE_OBJECT] = slot
    state[OBJECTS] = state[OBJECTS] - 1
  }

  #hashOfObject(slot: number): number {
    const at = slot * objectWords
    const objects = this.#objects
    this.#idOf = undefined
    for (let word = 0; word < 6; word++) this.#id[word] = objects[at + ID + word]
    this.#wide = objects[at + WIDE]
    return this.#idHash(objects[at + POOL])
  }
}
