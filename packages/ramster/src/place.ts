/**
 * Blocks in the memory of other machines, as a slow place: RAMster's remotify, fetch and flush, without its failures.
 *
 * A location is an index of a table in this process, which holds the generation, length, checksum and machines of its
 * block. The generation is the key of the block on these machines and is never used again. So no delayed message (an
 * abandoned put, a flush, an answer) can be taken for the current page.
 *
 * A block of a persistent page is on two machines, or it was refused; a block of an ephemeral page is on one. While
 * fewer machines answer, the place refuses blocks. If a machine comes back empty, or has lost a block, the block is
 * copied from the other machine (`#heal`), and can be read meanwhile.
 *
 * A machine that is leaving, or that wants memory back, gets no new blocks. Its blocks move to other machines or rise
 * into memory (`#relieve`). If they can do neither, persistent ones stay and ephemeral ones are dropped.
 *
 * Invariants:
 *  - A location is in use from its assignment to a flight until it is freed or the flight fails.
 *  - A copy is served only if it has the length and checksum of its generation. A machine with a bad copy, or none, no
 *    longer counts as a holder once another copy was found good.
 *  - A copy counts only if its machine has not lost its content since the put (`lives`).
 *  - Unneeded keys are deleted in batches, before the next flight. Keys whose deletion fails are noted, at most one for
 *    each location, and deleted later; the rest ends with its lease.
 *
 * Source: ramster of Linux 3.6 and 3.10; the counters have its names. There, a put during a transfer was overwritten by
 * the old page, a flush during a transfer leaked the remote copy, a failed fetch left its page in transit for ever, a
 * failed put was never retried, and returning data was not checked. DEVIATION: the chain decides which page is cold,
 * and whether a page that is read rises or also stays here; its clean copies are what the original called the
 * non-exclusive mode. So pers_pages_remote_nomem does not exist, nor do the counters of objects: the flush of an object
 * is that of its blocks, in one batch to each machine that has any.
 */
import { crc32 } from 'node:zlib'
import {
  type Budget,
  Durations,
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
import { type Borrowing, copiesOfPersistent, type Lenders, mostMachines } from './lenders.ts'
import type { Kept, RemoteMemory, RemotePlan } from './remote.ts'

/** Bytes of the unit of frames: the smallest in which the largest frame can be counted. */
export const unitBytes = 64
/** Bytes that one flight carries at most. */
const flightBytes = 128 * 1024
/** Keys in one message that gives up or renews. */
const keysAtOnce = 1024
/** Blocks that are copied together when a machine has come back. */
const healedAtOnce = 32
/** Blocks that leave a machine together. */
const relievedAtOnce = 32
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
export const bytesPerLocation: number = 8 + 4 + 4 + 4 + 2 + 1 + 1

/** One machine, and what this place knows of it. */
interface Machine {
  readonly plan: RemotePlan
  readonly memory: RemoteMemory
  /** Its bit in the mask of who has a block. */
  readonly bit: number
  /** How often it was found to have lost all of its content, and some or all of it. */
  losses: number
  lives: number
  /** Keys that it is to give up, and the message under way. */
  readonly flushes: number[]
  draining: Promise<void> | undefined
  blocks: number
  /** Some of what it had may be gone: each block is asked for (`#audit`). */
  isUnsure: boolean
  /** Messages with blocks that are on their way there. */
  sending: number
  /** It is to go: who waits for that. */
  leaving: { readonly gone: Promise<void>; readonly resolve: () => void } | undefined
  /** Bytes that it still wants back, of those that it wanted when it said so last. */
  pressedBytes: number
  readonly putLatency: Durations
  readonly getLatency: Durations
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
  readonly lenders: Lenders
  /** Bytes of frames that it takes at most. */
  readonly sizeBytes: number
  /** Milliseconds that a read waits for a machine which alone has the block, and is away. */
  readonly waitMs: number
  /** Blocks come up by themselves while the memory above is less than half full. */
  readonly repatriate: boolean
  /** `bytesPerLocation` for each location of the traits' capacity. */
  readonly table: ArrayBufferLike
}

export class RamsterPlace implements SlowPlace, Borrowing {
  readonly name = 'ramster'
  readonly traits: PlaceTraits
  readonly unitBytes: number = unitBytes
  readonly flightBytes: number = flightBytes
  readonly #lenders: Lenders
  readonly #machines: Machine[] = []
  readonly #copies: number
  readonly #mostUnits: number
  readonly #capacity: number
  readonly #waitMs: number
  readonly #repatriate: boolean
  /**
   * By location: generation, checksum, owner, units, mask of machines that have it, what it is; and a stack of free
   * ones.
   */
  readonly #generations: Float64Array
  readonly #sums: Uint32Array
  readonly #owner: Int32Array
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
  /** Blocks leave machines, or come up: what is under way, and where the search for them goes on. */
  #relieving: Promise<void> | undefined
  #relieveHand = 0
  #repatriating: Promise<void> | undefined
  #repatriateHand = 0
  /** Reads that wait for a machine, and copying that could not go on. */
  readonly #awaiting: Set<() => void> = new Set()
  #renewing: Promise<void> | undefined
  #renewHand = 0
  #leases: NodeJS.Timeout | undefined
  #renewEveryMs = Number.POSITIVE_INFINITY
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
    waited_reads: 0,
    relieved_blocks: 0,
    repatriated_blocks: 0,
  }

  /** Begins to reach its machines. Throws what one of them cannot be borrowed for; then none is. */
  constructor({ traits, lenders, sizeBytes, waitMs, repatriate, table }: RamsterPlaceOptions) {
    const { capacity } = traits
    this.traits = traits
    this.#copies = traits.persistent ? copiesOfPersistent : 1
    this.#lenders = lenders
    this.#waitMs = waitMs
    this.#repatriate = repatriate
    this.#mostUnits = Math.floor(sizeBytes / unitBytes)
    this.#capacity = capacity
    this.#generations = new Float64Array(table, 0, capacity)
    this.#sums = new Uint32Array(table, capacity * 8, capacity)
    this.#free = new Int32Array(table, capacity * 12, capacity)
    this.#owner = new Int32Array(table, capacity * 16, capacity)
    this.#units = new Uint16Array(table, capacity * 20, capacity)
    this.#holders = new Uint8Array(table, capacity * 22, capacity)
    this.#states = new Uint8Array(table, capacity * 23, capacity)
    try {
      for (const plan of lenders.joined(this)) this.add(plan)
    } catch (error) {
      lenders.left(this)
      // A rejection of these surfaces as an unhandled one, beside the error that is thrown here.
      for (const { memory } of this.#machines) void memory.close()
      clearInterval(this.#leases)
      throw error
    }
  }

  /** Renews leases as often as the shortest of them needs. */
  #renewFrom(leaseMs: number): void {
    const everyMs = Math.max(1, leaseMs / (leaseParts * renewalsPerLease))
    if (everyMs >= this.#renewEveryMs) return
    clearInterval(this.#leases)
    this.#renewEveryMs = everyMs
    this.#leases = setInterval(() => this.#renewPart(), everyMs).unref()
  }

  add(plan: RemotePlan): void {
    let bit = 1
    while (this.#machines.some((one) => one.bit === bit)) bit <<= 1
    if (bit >= 1 << mostMachines) throw new RangeError('ramster: a machine that was taken out is still being emptied')
    const memory = plan.borrow({
      persistent: this.traits.persistent,
      opened: (kept) => this.#opened(machine, kept),
      pressed: () => {
        machine.pressedBytes = memory.excessBytes
        this.#relieveSoon()
      },
    })
    const machine: Machine = {
      plan,
      memory,
      bit,
      losses: 0,
      lives: 0,
      flushes: [],
      draining: undefined,
      blocks: 0,
      isUnsure: false,
      sending: 0,
      leaving: undefined,
      pressedBytes: 0,
      putLatency: new Durations(),
      getLatency: new Durations(),
    }
    this.#machines.push(machine)
    if (memory.leaseMs !== undefined) this.#renewFrom(memory.leaseMs)
  }

  remove(plan: RemotePlan): Promise<void> {
    const machine = this.#machines.find((one) => one.plan === plan)
    if (machine === undefined) return Promise.resolve()
    if (machine.leaving === undefined) {
      let resolve = (): void => undefined
      const gone = new Promise<void>((done) => {
        resolve = done
      })
      machine.leaving = { gone, resolve }
      this.#relieveSoon()
    }
    return machine.leaving.gone
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
      const { memory, leaving } = this.#machines[n]!
      if (!memory.isOpen || memory.identity === undefined || leaving !== undefined) continue
      let isFirst = true
      for (let before = 0; before < n && isFirst; before++) {
        const other = this.#machines[before]!
        isFirst = other.leaving !== undefined || !other.memory.isOpen || other.memory.identity !== memory.identity
      }
      if (isFirst) count++
    }
    return count
  }

  /**
   * Machines that answer and are not to go, those with most room first, and each only once, whatever the number of its
   * names.
   */
  #open(): Machine[] {
    const seen = new Set<string>()
    const open: Machine[] = []
    for (const machine of this.#machines) {
      const { isOpen, identity } = machine.memory
      if (!isOpen || identity === undefined || machine.leaving !== undefined || seen.has(identity)) continue
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
          const { machine, keys, blocks } = batch
          const since = performance.now()
          machine.sending++
          try {
            // It may have been let go of since it was chosen.
            if (!this.#machines.includes(machine)) throw this.#unavailable()
            batch.taken = await machine.memory.put(keys, blocks)
            machine.putLatency.add((performance.now() - since) * 1e6)
          } catch (error) {
            batch.taken = undefined
            failure ??= error
          } finally {
            machine.sending--
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
      this.#owner[location] = flight.owners[n]!
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
        else if (taken?.[n] !== false) machine.flushes.push(key)
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
    if (batches.some(({ machine }) => machine.leaving !== undefined)) this.#relieveSoon()
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
      let bytes: Uint8Array
      try {
        bytes = await this.#fetch(location, generation, units)
      } catch (error) {
        bytes = await this.#fetchAgain(location, generation, units, error)
      }
      into.set(bytes)
      this.#counters[names.got]++
    } catch (error) {
      this.#counters[names.notGot]++
      throw error
    }
  }

  /**
   * The same after a failure: where the block may not vanish this waits for a machine that alone has it and is away, as
   * long as it may, because whoever swaps has nothing else that it could do. Where one of them answers again they are
   * asked once more: each has been away in its turn.
   */
  async #fetchAgain(location: number, generation: number, units: number, failure: unknown): Promise<Uint8Array> {
    const since = performance.now()
    let [waited, askedAgain] = [false, false]
    for (let error = failure; ; ) {
      const isLost = error instanceof TmemError && error.code === 'TMEM_CORRUPT'
      if (isLost || this.#closed || this.#generations[location] !== generation) throw error
      if (this.#states[location] !== PERSISTENT) throw error
      const mask = this.#holders[location]!
      if (this.#machines.some(({ bit, memory }) => (mask & bit) !== 0 && memory.isOpen)) {
        if (askedAgain) throw error
        askedAgain = true
      } else {
        const leftMs = this.#waitMs - (performance.now() - since)
        if (leftMs <= 0 || mask === 0) throw error
        if (!waited) this.#counters.waited_reads++
        waited = true
        askedAgain = false
        await this.#someChange(leftMs)
      }
      try {
        return await this.#fetch(location, generation, units)
      } catch (again) {
        error = again
      }
    }
  }

  /** Resolves when a machine answers again, the place is closed, or so much time has passed. */
  #someChange(mostMs: number): Promise<void> {
    return new Promise((resolve) => {
      const end = (): void => {
        clearTimeout(timer)
        this.#awaiting.delete(end)
        resolve()
      }
      const timer = setTimeout(end, mostMs)
      this.#awaiting.add(end)
    })
  }

  #changed(): void {
    for (const end of this.#awaiting) end()
  }

  /**
   * The bytes of a block, from whoever has it. Rejects with `TmemError`: `TMEM_CORRUPT` when nobody has it any more.
   */
  async #fetch(location: number, generation: number, units: number): Promise<Uint8Array> {
    const bad: Machine[] = []
    let failure: unknown
    let asked = 0
    // It may move meanwhile: who has it is looked up each time.
    for (;;) {
      const machine = this.#oneOf(this.#holders[location]! & ~asked, location)
      if (machine === undefined) break
      asked |= machine.bit
      let bytes: Uint8Array | undefined
      let isAway = false
      const since = performance.now()
      try {
        bytes = await machine.memory.get(generation)
        machine.getLatency.add((performance.now() - since) * 1e6)
      } catch (error) {
        failure ??= error
        isAway = true
      }
      // Freed meanwhile: nobody looks at what comes.
      if (this.#generations[location] !== generation) throw ioError('the block was given up while it was read')
      if (isAway) continue
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
      const { losses } = machine
      const keys = machine.flushes.splice(0, keysAtOnce)
      try {
        await machine.memory.remove(keys)
        this.#counters.remote_pages_flushed += keys.length
      } catch (error) {
        this.#noted(error)
        if (machine.losses !== losses) return
        const room = Math.max(0, this.#capacity - machine.flushes.length)
        machine.flushes.unshift(...keys.slice(0, room))
        this.#counters.remote_page_flushes_failed += Math.max(0, keys.length - room)
        return
      }
    }
  }

  // ---- Machines that come back ------------------------------------------------------------------------------------

  #opened(machine: Machine, kept: Kept): void {
    if (this.#closed) return
    // What is on its way may have been taken by who is gone.
    if (kept !== 'all') machine.lives++
    if (kept === 'some') machine.isUnsure = true
    if (kept === 'nothing') {
      machine.isUnsure = false
      machine.losses++
      machine.flushes.length = 0
      for (let location = 0; location < this.#watermark; location++)
        if ((this.#holders[location]! & machine.bit) !== 0)
          this.#setHolders(location, this.#holders[location]! & ~machine.bit)
    }
    if (machine.isUnsure) void this.#audit(machine)
    this.#drainSoon()
    this.#healSoon()
    this.#relieveSoon()
    this.#changed()
  }

  /** Finds out which blocks a machine still has. */
  async #audit(machine: Machine): Promise<void> {
    machine.isUnsure = false
    if (!(await this.#renew(machine, 0, this.#watermark))) machine.isUnsure = true
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
      if (this.#lacking > 0) this.#tryAgain()
    })
  }

  /** What could not go on is tried again in a while. */
  #tryAgain(): void {
    if (this.#closed) return
    this.#again ??= setTimeout(() => {
      this.#again = undefined
      this.#healSoon()
      this.#relieveSoon()
    }, healAgainMs).unref()
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
      const isTaken = machine.lives === life ? taken?.[keys.indexOf(generation)] : undefined
      if (isTaken === true && this.#generations[location] === generation) {
        this.#setHolders(location, this.#holders[location]! | machine.bit)
        this.#counters.healed_copies++
        healed++
      } else if (isTaken !== false) this.#flush(generation, machine.bit)
    }
    this.#drainSoon()
    return healed
  }

  // ---- Machines that are to go, and blocks that come up ------------------------------------------------------------

  #relieveSoon(): void {
    if (this.#closed || this.#relieving !== undefined || !this.#machines.some((one) => this.#mustGive(one))) return
    this.#relieving = this.#relieve().finally(() => {
      this.#relieving = undefined
      if (this.#machines.some((one) => this.#mustGive(one))) this.#tryAgain()
    })
  }

  #mustGive({ leaving, pressedBytes, blocks }: Machine): boolean {
    return leaving !== undefined || (pressedBytes > 0 && blocks > 0)
  }

  /** Takes blocks away from machines that are to go, or want memory back, as long as that succeeds. */
  async #relieve(): Promise<void> {
    // In a turn of its own: whoever called is in the middle of something.
    await Promise.resolve()
    for (const machine of this.#machines.filter((one) => this.#mustGive(one))) {
      while (!this.#closed && this.#mustGive(machine) && machine.blocks > 0)
        if ((await this.#relieveSome(machine)) <= 0) break
      await this.#letGo(machine)
    }
  }

  /** Lets go of a machine that is to go and has nothing any more. */
  async #letGo(machine: Machine): Promise<void> {
    const { leaving, memory } = machine
    if (leaving === undefined || machine.blocks > 0 || machine.sending > 0 || this.#closed) return
    // What cannot be given up there now ends with its lease.
    await this.#drain(machine)
    if (machine.blocks > 0 || machine.sending > 0 || this.#closed) return
    this.#machines.splice(this.#machines.indexOf(machine), 1)
    await memory.close()
    leaving.resolve()
  }

  /** Takes some blocks away from a machine. Answers how many it has fewer. */
  async #relieveSome(machine: Machine): Promise<number> {
    const targets = this.#open().filter((one) => one !== machine && one.pressedBytes === 0)
    const batches = targets.map((one): Batch => ({ machine: one, life: one.lives, keys: [], blocks: [], taken: [] }))
    const found: { readonly location: number; readonly generation: number; readonly batch: Batch | undefined }[] = []
    const before = machine.blocks
    let bytes = 0
    for (let left = this.#watermark; left > 0 && found.length < relievedAtOnce; left--) {
      const location = this.#relieveHand
      this.#relieveHand = location + 1 >= this.#watermark ? 0 : location + 1
      const mask = this.#holders[location]!
      if ((mask & machine.bit) === 0 || (this.#states[location] !== PERSISTENT && this.#states[location] !== EPHEMERAL))
        continue
      if (machine.leaving === undefined && bytes >= machine.pressedBytes) break
      const size = this.#units[location]! * unitBytes
      bytes += size
      const batch = batches.find((one) => (mask & one.machine.bit) === 0 && one.machine.memory.freeBytes > size)
      found.push({ location, generation: this.#generations[location]!, batch })
    }
    await Promise.all(
      found.map(async ({ location, generation, batch }) => {
        if (batch === undefined) return
        try {
          const block = await this.#fetch(location, generation, this.#units[location]!)
          batch.keys.push(generation)
          batch.blocks.push(block)
        } catch (error) {
          this.#noted(error)
        }
      }),
    )
    const failure = await this.#put(batches)
    if (failure !== undefined) this.#noted(failure)
    for (const { location, generation, batch } of found) {
      const at = batch?.keys.indexOf(generation) ?? -1
      const isTaken = at < 0 || batch!.machine.lives !== batch!.life ? false : batch!.taken?.[at]
      const isCurrent = this.#generations[location] === generation
      if (batch !== undefined && at >= 0 && !(isTaken === true && isCurrent) && isTaken !== false)
        this.#flush(generation, batch.machine.bit)
      if (!isCurrent) continue
      if (isTaken === true) {
        this.#setHolders(location, (this.#holders[location]! & ~machine.bit) | batch!.machine.bit)
        this.#flush(generation, machine.bit)
      } else await this.#bringUp(location, generation)
    }
    machine.pressedBytes = Math.max(0, machine.pressedBytes - bytes)
    this.#counters.relieved_blocks += Math.max(0, before - machine.blocks)
    this.#drainSoon()
    return before - machine.blocks
  }

  /** A block that no other machine takes comes up; or is dropped, where it may vanish. */
  async #bringUp(location: number, generation: number): Promise<void> {
    const owners = this.#owners
    const owner = this.#owner[location]!
    if (owners === undefined || (await owners.recall(owner, location, 'anyhow'))) return
    if (this.#generations[location] === generation && this.#states[location] === EPHEMERAL) owners.drop(owner, location)
  }

  /** Blocks come up while there is room for them above. */
  async #repatriateSome(most: number): Promise<void> {
    // In a turn of its own: whoever called is in the middle of something.
    await Promise.resolve()
    for (let left = this.#watermark, asked = 0; left > 0 && asked < most && !this.#closed; left--) {
      const location = this.#repatriateHand
      this.#repatriateHand = location + 1 >= this.#watermark ? 0 : location + 1
      if (this.#states[location] !== PERSISTENT && this.#states[location] !== EPHEMERAL) continue
      asked++
      if (!(await this.#owners!.recall(this.#owner[location]!, location, 'room'))) return
      this.#counters.repatriated_blocks++
    }
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

  /** Renews the leases of a machine's blocks in a part of the table. False: it could not do so for all. */
  async #renew(machine: Machine, first: number, end: number): Promise<boolean> {
    for (let at = first; at < end; ) {
      if (!machine.memory.isOpen || this.#closed) return false
      const locations: number[] = []
      for (; at < end && locations.length < keysAtOnce; at++)
        if ((this.#holders[at]! & machine.bit) !== 0) locations.push(at)
      if (locations.length === 0) return true
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
        return false
      }
    }
    return true
  }

  // ---- The rest ---------------------------------------------------------------------------------------------------

  tick({ pages }: Budget): Progress {
    this.#healSoon()
    for (const machine of this.#machines) if (machine.isUnsure && machine.memory.isOpen) void this.#audit(machine)
    this.#relieveSoon()
    if (this.#repatriate && this.#owners !== undefined && !this.#closed)
      this.#repatriating ??= this.#repatriateSome(pages).finally(() => {
        this.#repatriating = undefined
      })
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
        children: [
          { name: 'put_latency', counters: machine.putLatency.counters(), children: [] },
          { name: 'get_latency', counters: machine.getLatency.counters(), children: [] },
        ],
      })),
    }
  }

  #statsOf({ memory, blocks, losses, bit, leaving, pressedBytes }: Machine): Record<string, number> {
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
      lost_content: losses,
      leaving: leaving === undefined ? 0 : 1,
      wanted_back_bytes: pressedBytes,
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
    this.#lenders.left(this)
    this.#changed()
    await Promise.all([this.#healing, this.#renewing, this.#relieving, this.#repatriating])
    // What cannot be given up now ends with its lease.
    await Promise.all(this.#machines.map((machine) => this.#drain(machine)))
    await Promise.all(this.#machines.map(({ memory }) => memory.close()))
    for (const { leaving } of this.#machines) leaving?.resolve()
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
