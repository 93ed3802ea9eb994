/**
 * Blocks in the memory of other machines, as a slow place: RAMster's remotify, fetch and flush, without its failures.
 *
 * A location is a number of a table in this process, which says which generation of which length and checksum lies
 * there, and on which machines. The generation is the key of the block on these machines; it is never used again. So
 * nothing that is late on its way (a put that was given up, a flush, an answer) can be taken for the page of now.
 *
 * A block of a page that may not vanish is on two machines, or it was not taken; one of a page that may vanish is on
 * one. While fewer machines answer than that takes, the place takes nothing. When a machine comes back empty, or has
 * lost a block, the block is copied from the other one (`#heal`); it can be read all the while.
 *
 * Invariants:
 *  - A location is in use from the moment a flight is given it until it is freed, or the flight fails.
 *  - What is read is served only with the length and the checksum of its generation. A machine whose copy does not
 *    match, or that has none, no longer counts as having it once another copy was found good.
 *  - A copy counts only if its machine has not lost its content since it was put there (`lives`).
 *  - Keys that are not needed any more are given up in batches, before the next flight goes; those that cannot be are
 *    noted, as many as there are locations, and given up later; the rest ends with its lease.
 *
 * Source: ramster of Linux 3.6 and 3.10; the counters have its names. There a put during a transfer was overwritten by
 * the old page, a flush during it lost sight of the remote copy, a fetch that failed left its page in transit for ever,
 * a put that failed was never tried again, and nothing was checked on its way back.
 * DEVIATION: which page is cold, and whether what is read comes up or stays here as well, is the chain's business: its
 * copies are what the original called the non-exclusive mode. So pers_pages_remote_nomem does not exist, nor do the
 * counters of objects: the flush of an object is that of its blocks, in one batch to each machine that has any.
 */
import { crc32 } from 'node:zlib'
import {
  type Budget,
  type Flight,
  idle,
  type LayerContext,
  none,
  type Owners,
  type PlaceTraits,
  type Progress,
  type SlowPlace,
  type StatsNode,
  TmemError,
} from '@tmem/core'
import type { RemoteMemory, RemotePlan } from './remote.ts'

/** Bytes of the unit of frames: the smallest in which the largest frame can be counted. */
export const unitBytes = 64
/** Bytes that one flight carries at most. */
const flightBytes = 128 * 1024
/** Machines that a page which may not vanish is on. */
const copiesOfPersistent = 2
/** Keys in one message that gives up or renews. */
const keysAtOnce = 1024
/** Blocks that are copied together when a machine has come back. */
const healedAtOnce = 32
/** Milliseconds after which copying is tried again when it could not go on. */
const healAgainMs = 1000
/** Parts of the table whose leases are renewed one after the other; a lease is renewed three times before it ends. */
const leaseParts = 16
const renewalsPerLease = 3

/** What a location is: free, on its way out, or kept. */
const FREE = 0
const LEAVING = 1
const EPHEMERAL = 2
const PERSISTENT = 3

/** Bytes of the table for one location. */
export const bytesPerLocation: number = 8 + 4 + 4 + 2 + 1 + 1

/** One machine, and what this place knows of it. */
interface Machine {
  readonly memory: RemoteMemory
  /** Its bit in the mask of who has a block. */
  readonly bit: number
  /** How often it was found to have lost its content. */
  lives: number
  /** Keys that it is to give up, and the message under way. */
  readonly flushes: number[]
  draining: Promise<void> | undefined
  blocks: number
}

/** A frame on its way: where it is to be, and of which kind its page is. Its owner may be gone when it lands. */
interface Leaving {
  /** `none`: there is no room. */
  readonly location: number
  readonly persistent: boolean
}

/** Frames that go to one machine in one message. */
interface Batch {
  readonly machine: Machine
  readonly life: number
  readonly keys: number[]
  readonly blocks: Uint8Array[]
  /** Whether each was taken; `undefined`: that is not known. */
  taken: readonly boolean[] | undefined
}

export interface RamsterPlaceOptions {
  readonly traits: PlaceTraits
  readonly machines: readonly RemotePlan[]
  /** Bytes of frames that it takes at most. */
  readonly sizeBytes: number
  /** `bytesPerLocation` for each location of the traits' capacity. */
  readonly table: ArrayBufferLike
}

export class RamsterPlace implements SlowPlace {
  readonly name = 'ramster'
  readonly traits: PlaceTraits
  readonly unitBytes: number = unitBytes
  readonly flightBytes: number = flightBytes
  readonly #machines: readonly Machine[]
  readonly #copies: number
  readonly #mostUnits: number
  readonly #capacity: number
  /** By location: generation, checksum, units, mask of machines that have it, what it is; and a stack of free ones. */
  readonly #generations: Float64Array
  readonly #sums: Uint32Array
  readonly #units: Uint16Array
  readonly #holders: Uint8Array
  readonly #states: Uint8Array
  readonly #free: Int32Array
  #freeCount = 0
  /** Locations that were ever in use: those from here on are free, and not on the stack. */
  #watermark = 0
  #nextGeneration = 1
  #usedUnits = 0
  /** Blocks of pages that may not vanish that are on one machine only, and on none. */
  #lacking = 0
  #lost = 0
  #owners: Owners | undefined
  #failure: Error | undefined
  #willDrain = false
  #healing: Promise<void> | undefined
  /** The lack was there before a round of healing that brought nothing: another one needs a reason. */
  #healHand = 0
  #again: NodeJS.Timeout | undefined
  #renewing: Promise<void> | undefined
  #renewHand = 0
  readonly #leases: NodeJS.Timeout | undefined
  #closed = false
  #closing: Promise<void> | undefined
  readonly #counters = {
    eph_pages_remoted: 0,
    pers_pages_remoted: 0,
    eph_pages_remote_failed: 0,
    pers_pages_remote_failed: 0,
    remote_eph_pages: 0,
    remote_pers_pages: 0,
    remote_eph_pages_succ_get: 0,
    remote_pers_pages_succ_get: 0,
    remote_eph_pages_unsucc_get: 0,
    remote_pers_pages_unsucc_get: 0,
    remote_pages_flushed: 0,
    remote_page_flushes_failed: 0,
    second_copies_read: 0,
    damaged_copies: 0,
    missing_copies: 0,
    healed_copies: 0,
  }

  /** Begins to reach its machines. Throws what one of them cannot be borrowed for; then none is. */
  constructor({ traits, machines, sizeBytes, table }: RamsterPlaceOptions) {
    const { capacity } = traits
    this.traits = traits
    this.#copies = traits.persistent ? copiesOfPersistent : 1
    this.#mostUnits = Math.floor(sizeBytes / unitBytes)
    this.#capacity = capacity
    this.#generations = new Float64Array(table, 0, capacity)
    this.#sums = new Uint32Array(table, capacity * 8, capacity)
    this.#free = new Int32Array(table, capacity * 12, capacity)
    this.#units = new Uint16Array(table, capacity * 16, capacity)
    this.#holders = new Uint8Array(table, capacity * 18, capacity)
    this.#states = new Uint8Array(table, capacity * 19, capacity)
    const borrowed: Machine[] = []
    try {
      for (const [n, plan] of machines.entries()) {
        const opened = (kept: boolean): void => this.#opened(machine, kept)
        const memory = plan.borrow({ persistent: traits.persistent, opened })
        const machine: Machine = { memory, bit: 1 << n, lives: 0, flushes: [], draining: undefined, blocks: 0 }
        borrowed.push(machine)
      }
    } catch (error) {
      // A rejection of these surfaces as an unhandled one, beside the error that is thrown here.
      for (const { memory } of borrowed) void memory.close()
      throw error
    }
    this.#machines = borrowed
    const leases = this.#machines.map(({ memory }) => memory.leaseMs).filter((lease) => lease !== undefined)
    if (leases.length > 0)
      this.#leases = setInterval(
        () => this.#renewPart(),
        Math.max(1, Math.min(...leases) / (leaseParts * renewalsPerLease)),
      ).unref()
  }

  get failure(): Error | undefined {
    return this.#failure ?? this.#machines.find(({ memory }) => !memory.isOpen)?.memory.failure
  }

  async ready(): Promise<void> {
    await Promise.all(this.#machines.map(({ memory }) => memory.ready()))
    if (this.#open().length < this.#copies)
      throw ioError('the machines are one and the same: a second copy there would be none. Name another one')
  }

  attach(owners: Owners): void {
    this.#owners = owners
  }

  open(): boolean {
    return !this.#closed && this.#opens() >= this.#copies
  }

  /** How many machines answer, each counted once. Asked for each page that sinks: it takes no memory. */
  #opens(): number {
    let count = 0
    for (let n = 0; n < this.#machines.length; n++) {
      const { memory } = this.#machines[n]!
      if (!memory.isOpen || memory.identity === undefined) continue
      let isFirst = true
      for (let before = 0; before < n && isFirst; before++) {
        const other = this.#machines[before]!.memory
        isFirst = !other.isOpen || other.identity !== memory.identity
      }
      if (isFirst) count++
    }
    return count
  }

  /** Machines that answer, those with most room first, and each only once, whatever the number of its names. */
  #open(): Machine[] {
    const seen = new Set<string>()
    const open: Machine[] = []
    for (const machine of this.#machines) {
      const { isOpen, identity } = machine.memory
      if (!isOpen || identity === undefined || seen.has(identity)) continue
      seen.add(identity)
      open.push(machine)
    }
    return open.toSorted((a, b) => b.memory.freeBytes - a.memory.freeBytes)
  }

  // ---- Out --------------------------------------------------------------------------------------------------------

  async write(flight: Flight): Promise<void> {
    const flushing = this.#open().filter(({ flushes }) => flushes.length > 0)
    // What was given up leaves its room to what comes.
    if (flushing.length > 0) await Promise.all(flushing.map((machine) => this.#drain(machine)))
    const open = this.#open()
    if (this.#closed || open.length < this.#copies) throw this.#unavailable()
    const batches = open.map((machine): Batch => ({ machine, life: machine.lives, keys: [], blocks: [], taken: [] }))
    const firstKey = this.#nextGeneration
    const leaving = this.#load(flight, batches)
    const failure = await this.#put(batches)
    const landed = this.#land(flight, batches, leaving, firstKey)
    if (failure === undefined || landed > 0) this.#failure = undefined
    else throw this.#noted(failure)
  }

  /** Sends each machine what it is to have, and notes what it took. Answers the first failure. */
  async #put(batches: readonly Batch[]): Promise<unknown> {
    let failure: unknown
    await Promise.all(
      batches
        .filter(({ keys }) => keys.length > 0)
        .map(async (batch) => {
          try {
            batch.taken = await batch.machine.memory.put(batch.keys, batch.blocks)
          } catch (error) {
            batch.taken = undefined
            failure ??= error
          }
        }),
    )
    return failure
  }

  /** Gives the frames of a flight locations and generations, and to each machine those that it is to have. */
  #load(flight: Flight, batches: readonly Batch[]): Leaving[] {
    const leaving: Leaving[] = []
    for (let n = 0; n < flight.count; n++) {
      const units = flight.units[n]!
      const persistent = this.#owners?.isPersistent(flight.owners[n]!) ?? this.traits.persistent
      const location = this.#allot(units)
      // Also one that finds no room: so a key says which frame it is of.
      const generation = this.#nextGeneration++
      leaving.push({ location, persistent })
      if (location === none) continue
      const at = flight.offsets[n]!
      const bytes = flight.bytes.subarray(at, at + units * unitBytes)
      this.#generations[location] = generation
      this.#sums[location] = crc32(bytes)
      const copies = persistent ? copiesOfPersistent : 1
      // Blocks that are on one machine only take turns; of several copies the first are where there is most room.
      const first = copies === 1 ? generation % batches.length : 0
      for (let copy = 0; copy < copies; copy++) {
        const batch = batches[(first + copy) % batches.length]!
        batch.keys.push(generation)
        batch.blocks.push(bytes)
      }
    }
    return leaving
  }

  /**
   * Notes where the frames of a flight are, whose keys count up from `firstKey`: all of their copies, or none. Answers
   * how many there are.
   */
  #land(flight: Flight, batches: readonly Batch[], leaving: readonly Leaving[], firstKey: number): number {
    // By frame: who has it.
    const masks = new Uint8Array(leaving.length)
    for (const { machine, life, keys, taken } of batches)
      for (const [n, key] of keys.entries()) {
        if (taken?.[n] === true && machine.lives === life) masks[key - firstKey]! |= machine.bit
        else if (taken === undefined) machine.flushes.push(key)
      }
    let landed = 0
    for (const [n, { location, persistent }] of leaving.entries()) {
      const mask = masks[n]!
      const isHere = location !== none && countOf(mask) === (persistent ? copiesOfPersistent : 1)
      this.#counters[namesOf(persistent)[isHere ? 'remoted' : 'failed']]++
      if (location === none) continue
      if (!isHere) {
        this.#flush(this.#generations[location]!, mask)
        this.#release(location, flight.units[n]!)
        continue
      }
      this.#states[location] = persistent ? PERSISTENT : EPHEMERAL
      this.#counters[persistent ? 'remote_pers_pages' : 'remote_eph_pages']++
      this.#setHolders(location, mask)
      flight.locations[n] = location
      landed++
    }
    this.#drainSoon()
    return landed
  }

  /** A location for so many units, or `none`. */
  #allot(units: number): number {
    const isFull = this.#freeCount === 0 && this.#watermark === this.#capacity
    if (isFull || this.#usedUnits + units > this.#mostUnits) return none
    const location = this.#freeCount > 0 ? this.#free[--this.#freeCount]! : this.#watermark++
    this.#states[location] = LEAVING
    this.#units[location] = units
    this.#usedUnits += units
    return location
  }

  #release(location: number, units: number): void {
    this.#states[location] = FREE
    this.#generations[location] = 0
    this.#usedUnits -= units
    this.#free[this.#freeCount++] = location
  }

  // ---- Back -------------------------------------------------------------------------------------------------------

  async read(location: number, units: number, into: Uint8Array): Promise<void> {
    const generation = this.#generations[location]!
    const names = namesOf(this.#states[location] !== EPHEMERAL)
    try {
      into.set(await this.#fetch(location, generation, units))
      this.#counters[names.got]++
    } catch (error) {
      this.#counters[names.notGot]++
      throw error
    }
  }

  /**
   * The bytes of a block, from whoever has it. Rejects with `TmemError`: `TMEM_CORRUPT` when nobody has it any more.
   */
  async #fetch(location: number, generation: number, units: number): Promise<Uint8Array> {
    const bad: Machine[] = []
    let failure: unknown
    let left = this.#holders[location]!
    for (let machine = this.#oneOf(left, location); machine !== undefined; machine = this.#oneOf(left, location)) {
      left &= ~machine.bit
      let bytes: Uint8Array | undefined
      try {
        bytes = await machine.memory.get(generation)
      } catch (error) {
        failure ??= error
        continue
      }
      // Freed meanwhile: nobody looks at what comes.
      if (this.#generations[location] !== generation) throw ioError('the block was given up while it was read')
      if (bytes?.length === units * unitBytes && crc32(bytes) === this.#sums[location]) {
        if (bad.length > 0 || failure !== undefined) this.#counters.second_copies_read++
        for (const one of bad) this.#setHolders(location, this.#holders[location]! & ~one.bit)
        if (bad.length > 0) this.#healSoon()
        return bytes
      }
      this.#counters[bytes === undefined ? 'missing_copies' : 'damaged_copies']++
      bad.push(machine)
    }
    if (failure !== undefined) throw this.#noted(failure)
    throw new TmemError(
      'TMEM_CORRUPT',
      bad.length === 0
        ? 'ramster: the block is lost: every machine that had it has lost its memory'
        : `ramster: the block is not what was sent, or is gone, on ${bad.map(({ memory }) => memory.name).join(' and ')}`,
      { layer: 'ramster' },
    )
  }

  /** One of the machines of a mask: rather one that answers, and not for each location the same one. */
  #oneOf(mask: number, location: number): Machine | undefined {
    let found: Machine | undefined
    for (const machine of this.#machines) {
      if ((mask & machine.bit) === 0) continue
      const { isOpen } = machine.memory
      if (found === undefined || (isOpen === found.memory.isOpen ? location % 2 === 1 : isOpen)) found = machine
    }
    return found
  }

  // ---- Flushing ---------------------------------------------------------------------------------------------------

  free(location: number, units: number): void {
    const generation = this.#generations[location]!
    this.#counters[this.#states[location] === EPHEMERAL ? 'remote_eph_pages' : 'remote_pers_pages']--
    this.#flush(generation, this.#holders[location]!)
    this.#setHolders(location, 0, true)
    this.#release(location, units)
    this.#drainSoon()
  }

  /** Notes that machines are to give up a key. */
  #flush(key: number, mask: number): void {
    for (const machine of this.#machines) {
      if ((mask & machine.bit) === 0) continue
      if (machine.flushes.length < this.#capacity) machine.flushes.push(key)
      else this.#counters.remote_page_flushes_failed++
    }
  }

  /** All that is given up in one turn goes together. */
  #drainSoon(): void {
    if (this.#willDrain) return
    this.#willDrain = true
    queueMicrotask(() => {
      this.#willDrain = false
      for (const machine of this.#machines) if (machine.memory.isOpen) void this.#drain(machine)
    })
  }

  /** Sends what a machine is to give up, one message after the other, until nothing is left or one fails. */
  #drain(machine: Machine): Promise<void> {
    machine.draining ??= this.#drainNow(machine).finally(() => {
      machine.draining = undefined
    })
    return machine.draining
  }

  async #drainNow(machine: Machine): Promise<void> {
    while (machine.flushes.length > 0 && machine.memory.isOpen) {
      const life = machine.lives
      const keys = machine.flushes.splice(0, keysAtOnce)
      try {
        await machine.memory.remove(keys)
        this.#counters.remote_pages_flushed += keys.length
      } catch (error) {
        this.#noted(error)
        if (machine.lives !== life) return
        const room = Math.max(0, this.#capacity - machine.flushes.length)
        machine.flushes.unshift(...keys.slice(0, room))
        this.#counters.remote_page_flushes_failed += Math.max(0, keys.length - room)
        return
      }
    }
  }

  // ---- Machines that come back ------------------------------------------------------------------------------------

  #opened(machine: Machine, kept: boolean): void {
    if (this.#closed) return
    if (!kept) {
      machine.lives++
      machine.flushes.length = 0
      for (let location = 0; location < this.#watermark; location++)
        if ((this.#holders[location]! & machine.bit) !== 0)
          this.#setHolders(location, this.#holders[location]! & ~machine.bit)
    }
    this.#drainSoon()
    this.#healSoon()
  }

  /** Notes who has a block. `isGone`: nobody misses it. */
  #setHolders(location: number, mask: number, isGone: boolean = false): void {
    const before = this.#holders[location]!
    const state = this.#states[location]
    this.#holders[location] = mask
    for (const machine of this.#machines)
      machine.blocks += Number((mask & machine.bit) !== 0) - Number((before & machine.bit) !== 0)
    if (state !== PERSISTENT) return
    // A block that has landed has copies, so one without them is lost, or has just been given its first.
    const isNew = before === 0 && countOf(mask) === copiesOfPersistent
    if (!isNew) {
      if (countOf(before) === 1) this.#lacking--
      if (before === 0) this.#lost--
    }
    if (isGone) return
    if (countOf(mask) === 1) this.#lacking++
    if (mask === 0) this.#lost++
  }

  #healSoon(): void {
    if (this.#lacking === 0 || this.#closed || this.#healing !== undefined) return
    this.#healing = this.#heal().finally(() => {
      this.#healing = undefined
      if (this.#lacking === 0 || this.#closed || this.#again !== undefined) return
      this.#again = setTimeout(() => {
        this.#again = undefined
        this.#healSoon()
      }, healAgainMs).unref()
    })
  }

  /** Makes second copies of blocks that have lost one, as long as that succeeds. */
  async #heal(): Promise<void> {
    // In a turn of its own: whoever called is in the middle of something.
    await Promise.resolve()
    while (this.#lacking > 0 && this.open()) if ((await this.#healSome()) === 0) return
  }

  /** Copies some blocks. Answers how many have their second copy now. */
  async #healSome(): Promise<number> {
    const open = this.#open()
    const batches = open.map((machine): Batch => ({ machine, life: machine.lives, keys: [], blocks: [], taken: [] }))
    const found: { readonly location: number; readonly generation: number; readonly batch: Batch }[] = []
    for (let left = this.#watermark; left > 0 && found.length < healedAtOnce; left--) {
      const location = this.#healHand
      this.#healHand = location + 1 >= this.#watermark ? 0 : location + 1
      if (this.#states[location] !== PERSISTENT || countOf(this.#holders[location]!) !== 1) continue
      const mask = this.#holders[location]!
      const batch = batches.find(({ machine }) => (mask & machine.bit) === 0)
      const isReadable = open.some(({ bit }) => (mask & bit) !== 0)
      if (batch !== undefined && isReadable) found.push({ location, generation: this.#generations[location]!, batch })
    }
    const sent: typeof found = []
    await Promise.all(
      found.map(async (one) => {
        try {
          const bytes = await this.#fetch(one.location, one.generation, this.#units[one.location]!)
          one.batch.keys.push(one.generation)
          one.batch.blocks.push(bytes)
          sent.push(one)
        } catch (error) {
          this.#noted(error)
        }
      }),
    )
    const failure = await this.#put(batches)
    if (failure !== undefined) this.#noted(failure)
    let healed = 0
    for (const { location, generation, batch } of sent) {
      const { machine, life, keys, taken } = batch
      if (machine.lives !== life) continue
      const isTaken = taken?.[keys.indexOf(generation)]
      if (isTaken === true && this.#generations[location] === generation) {
        this.#setHolders(location, this.#holders[location]! | machine.bit)
        this.#counters.healed_copies++
        healed++
      } else if (isTaken !== false) this.#flush(generation, machine.bit)
    }
    this.#drainSoon()
    return healed
  }

  // ---- Leases -----------------------------------------------------------------------------------------------------

  /** Renews the leases of the next part of the table, unless the last part is still under way. */
  #renewPart(): void {
    if (this.#renewing !== undefined || this.#closed) return
    const first = this.#renewHand
    const end = Math.min(this.#watermark, first + Math.ceil(this.#watermark / leaseParts))
    this.#renewHand = end === this.#watermark ? 0 : end
    this.#renewing = Promise.all(this.#machines.map((machine) => this.#renew(machine, first, end))).then(() => {
      this.#renewing = undefined
      this.#healSoon()
    })
  }

  async #renew(machine: Machine, first: number, end: number): Promise<void> {
    for (let at = first; at < end && machine.memory.isOpen && !this.#closed; ) {
      const locations: number[] = []
      for (; at < end && locations.length < keysAtOnce; at++)
        if ((this.#holders[at]! & machine.bit) !== 0) locations.push(at)
      if (locations.length === 0) return
      const keys = locations.map((location) => this.#generations[location]!)
      try {
        const there = await machine.memory.renew(keys)
        for (const [n, location] of locations.entries()) {
          if (there[n] === true || this.#generations[location] !== keys[n]) continue
          if ((this.#holders[location]! & machine.bit) === 0) continue
          this.#counters.missing_copies++
          this.#setHolders(location, this.#holders[location]! & ~machine.bit)
        }
      } catch (error) {
        this.#noted(error)
        return
      }
    }
  }

  // ---- The rest ---------------------------------------------------------------------------------------------------

  tick(_budget: Budget): Progress {
    this.#healSoon()
    // What a machine did not take, although it could be reached.
    this.#drainSoon()
    return idle
  }

  stats(): StatsNode {
    return {
      name: this.name,
      counters: {
        ...this.#counters,
        used_bytes: this.#usedUnits * unitBytes,
        size_bytes: this.#mostUnits * unitBytes,
        one_copy_only: this.#lacking,
        lost: this.#lost,
        pending_flushes: this.#machines.reduce((sum, { flushes }) => sum + flushes.length, 0),
        machines_open: this.#open().length,
        degraded: this.open() ? 0 : 1,
        table_bytes: this.#capacity * bytesPerLocation,
      },
      children: this.#machines.map((machine) => ({
        name: machine.memory.name,
        counters: this.#statsOf(machine),
        children: [],
      })),
    }
  }

  #statsOf({ memory, blocks, lives, bit }: Machine): Record<string, number> {
    let reachable = 0
    for (const other of this.#machines) if (other.memory.isOpen) reachable |= other.bit
    const others = reachable & ~bit
    // What nobody else who answers has: of pages that may not vanish, and of those that may.
    const only = { persistent: 0, ephemeral: 0 }
    for (let location = 0; location < this.#watermark; location++) {
      const holders = this.#holders[location]!
      if ((holders & bit) === 0 || (holders & others) !== 0) continue
      if (this.#states[location] === PERSISTENT) only.persistent++
      else only.ephemeral++
    }
    const counters = {
      open: memory.isOpen ? 1 : 0,
      blocks,
      lost_with_it: only.persistent,
      vanish_with_it: only.ephemeral,
      lost_content: lives,
    }
    return Number.isFinite(memory.freeBytes) ? { ...counters, free_bytes: memory.freeBytes } : counters
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    this.#closed = true
    clearInterval(this.#leases)
    clearTimeout(this.#again)
    await Promise.all([this.#healing, this.#renewing])
    // What cannot be given up now ends with its lease.
    await Promise.all(this.#machines.map((machine) => this.#drain(machine)))
    await Promise.all(this.#machines.map(({ memory }) => memory.close()))
  }

  check(blocks: readonly { readonly location: number; readonly units: number }[]): void {
    const seen = new Set<number>()
    let units = 0
    for (const block of blocks) {
      const { location } = block
      if (seen.has(location)) throw new Error(`ramster: location ${location} is in two blocks`)
      seen.add(location)
      units += block.units
      if (this.#states[location] !== EPHEMERAL && this.#states[location] !== PERSISTENT)
        throw new Error(`ramster: nothing is at location ${location}`)
      if (this.#units[location] !== block.units) throw new Error(`ramster: location ${location} has other units`)
    }
    let kept = 0
    let leaving = 0
    for (let location = 0; location < this.#watermark; location++) {
      const state = this.#states[location]!
      if (state === LEAVING) {
        leaving++
        units += this.#units[location]!
      } else if (state !== FREE) kept++
    }
    if (kept !== blocks.length) throw new Error(`ramster: ${kept} blocks, ${blocks.length} are known`)
    if (units !== this.#usedUnits) throw new Error(`ramster: ${units} units, counted ${this.#usedUnits}`)
    if (kept + leaving + this.#freeCount !== this.#watermark) throw new Error('ramster: a location is nobody’s')
  }

  #unavailable(): TmemError {
    const away = this.#machines.filter(({ memory }) => !memory.isOpen).map(({ memory }) => memory.name)
    const why = this.#machines.find(({ memory }) => !memory.isOpen)?.memory.failure
    return ioError(`${away.join(' and ') || 'a second machine'} cannot be reached: nothing is taken`, why)
  }

  /** Notes why something failed, for whoever asks. */
  #noted(error: unknown): Error {
    if (!(error instanceof Error)) throw error
    this.#failure = error
    return error
  }
}

/** Opens a place. Throws `TmemError` (`TMEM_NO_MEMORY`) when there is no memory for its table. */
export function openRamster(options: Omit<RamsterPlaceOptions, 'table'>, { allocator }: LayerContext): RamsterPlace {
  const bytes = options.traits.capacity * bytesPerLocation
  const table = allocator.allocate(bytes, 'ramster.table')
  if (table === undefined)
    throw new TmemError('TMEM_NO_MEMORY', `no memory for the table of ramster (${bytes} bytes): give a smaller size`, {
      layer: 'ramster',
    })
  return new RamsterPlace({ ...options, table })
}

/** Names of the counters of pages that may not vanish, and of those that may. */
const persistentNames = {
  remoted: 'pers_pages_remoted',
  failed: 'pers_pages_remote_failed',
  got: 'remote_pers_pages_succ_get',
  notGot: 'remote_pers_pages_unsucc_get',
} as const
const ephemeralNames = {
  remoted: 'eph_pages_remoted',
  failed: 'eph_pages_remote_failed',
  got: 'remote_eph_pages_succ_get',
  notGot: 'remote_eph_pages_unsucc_get',
} as const
const namesOf = (persistent: boolean): typeof persistentNames | typeof ephemeralNames =>
  persistent ? persistentNames : ephemeralNames

const countOf = (mask: number): number => {
  let count = 0
  for (let left = mask; left !== 0; left &= left - 1) count++
  return count
}

function ioError(message: string, cause?: unknown): TmemError {
  return new TmemError('TMEM_IO', `ramster: ${message}`, {
    layer: 'ramster',
    ...(cause === undefined ? {} : { cause }),
  })
}
