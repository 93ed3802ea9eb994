/**
 * A block device in compressed memory: ramzswap (compcache 0.6.2) and what zram made of it, over any stack of places;
 * and virtswap, whose stack begins with memory of a hypervisor.
 *
 * A slot is a page of 4 KiB, under its own number in the one pool of the device's stack. Where it rests, and when it
 * moves, is the stack's business; the device turns requests into pages. Requests may be of any multiple of 512 bytes;
 * what is no whole page is read, changed and written.
 *
 * Invariants:
 *  - A page that was acknowledged stays until it is overwritten, discarded or cut off: an overwrite that is refused
 *    leaves the old page
 *    (`Pool.replace`).
 *  - Pages are changed whole, and two changes of different parts of a page are both kept: who has waited for a page in
 *    order to change a part of
 *    it looks again when somebody else has changed it meanwhile.
 *  - A slot that holds a page, which the stack does not find, is lost: an error until it is overwritten or discarded,
 *    and never zeros.
 *
 * DEVIATION from ramzswap: num_reads counts all reads, as num_writes counts all writes (what was forwarded to the
 * backing store was taken out of the former only); failed_writes counts writes that failed (also those for which memory
 * was wanting and which went to the backing store); sizes are given (they had defaults by the size of memory); size
 * limit, memlimit and statistics are each device's own (the limit on compressed pages was one variable for all);
 * requests need not be single aligned pages; a slot that holds nothing reads as zeros (it left the buffer as it was);
 * an overwrite that fails leaves the old page (it was freed first); slot 0 is a page like any other, mkswap writes the
 * header (it was preset, and freeing it made counters underflow); a backing store that is too small is refused (its
 * size replaced the one that was given); a device without room for its whole size is refused (writes failed later);
 * pages that do not shrink rest in memory while there is room, and go to the backing store when they are cold (they
 * went there at once).
 *
 * Sources: the reference notes on ramzswap, zram's documentation, and Nitin Gupta's virtswap (December 2009).
 */
import {
  type Allocator,
  assertBlockRange,
  type BlockDevice,
  type Budget,
  type ByteAmount,
  bytesOf,
  type Completion,
  checkOptions,
  GetOutcome,
  type Layer,
  type MoveReason,
  type OpenProgress,
  type OptionNames,
  PageBatch,
  type Progress,
  PutOutcome,
  placeNames,
  type StackUsage,
  type StatsNode,
  systemAllocator,
  TmemError,
  Whereabouts,
} from '@tmem/core'
import { Moves, type RecompressRequest, type WritebackRequest } from './moves.ts'
import { Slots } from './slots.ts'
import { closedError, type DeviceStack, lent, object, openStack, pageBytes, pageError, refusalError } from './stack.ts'
import { type DeviceState, type RamzswapStats, Statistics } from './statistics.ts'
import { PageTimes } from './times.ts'

/** Settings of a device. */
export interface RamzswapOptions {
  /** Name in messages and statistics, e.g. `ramzswap0`. */
  readonly name: string
  /** Size (disksize): a positive multiple of 4096. */
  readonly sizeBytes: ByteAmount
  /** Largest size that `resize` will be asked for (default: `sizeBytes`). A table is reserved for it. */
  readonly maxSizeBytes?: ByteAmount
  /**
   * Where pages rest, as `compose` takes it, e.g. `[zcache({ limitBytes }), frontswap({ file, sizeBytes })]`. Must be
   * sure to have room for the whole device, which opens it for itself.
   */
  readonly stack: readonly Layer[]
  /**
   * Largest amount of memory for pages, as it is charged to a client; what is over it goes to the places below that
   * wait. Default: what the places' own limits allow.
   */
  readonly memlimitBytes?: ByteAmount
  /**
   * Milliseconds, from any start, never going back: `idle` knows how long a page was not touched, and places have
   * budgets of wear. Default: neither.
   */
  readonly clock?: () => number
  /**
   * Moves of pages between places that are remembered for `explain`, 20 bytes each: 1 to 2^20; it needs a `clock`
   * (default: none).
   */
  readonly history?: number
  /**
   * Milliseconds with their parts, such as `performance.now`: how long pages take is counted, by operation and place
   * (section `latency` of the statistics). Default: it is not.
   */
  readonly stopwatch?: () => number
  /**
   * Called when background work has come up: somebody should call `tick` soon (default: whoever has it ticks all the
   * time).
   */
  readonly wake?: () => void
  /** Told how far a place is that takes long to open, such as a file whose blocks have to be written. */
  readonly onProgress?: OpenProgress
  /** Where memory comes from, for the device and its stack (default: the system). */
  readonly allocator?: Allocator
  /** As for `compose`; `model` is for tests. */
  readonly check?: 'arguments' | 'model'
}

const names: OptionNames<RamzswapOptions> = {
  name: 'text',
  sizeBytes: 'bytes',
  maxSizeBytes: 'bytes?',
  stack: 'list',
  memlimitBytes: 'bytes?',
  clock: 'function?',
  history: 'number?',
  stopwatch: 'function?',
  wake: 'function?',
  onProgress: 'function?',
  allocator: 'object?',
  check: 'text?',
}

const sectorBytes = 512
/** Largest number of slots: indexes have 32 bits. */
const maxSlots = 2 ** 32
/** Pages for what has to wait and is no whole page. */
const waitingPages = 16
/** Pages that one write hands to the stack at once. */
const batchPages = 128
/** Pages that one request fetches at the same time. */
const fetchedPages = 32
/** How often a page may be gone when it is fetched, and there when it is looked for. */
const maxMisses = 3

/** Seconds: a page that is younger is in the column; the last column has all others. */
const ageBounds: readonly number[] = Object.freeze([1, 10, 60, 600, 3600, 86_400])

/** Pages by how long nobody has touched them. */
export interface PageAges {
  /** Ages in seconds at which a column ends, upwards; the last column has no end. */
  readonly bounds: readonly number[]
  /** Pages that were looked at. */
  readonly seen: number
  /** By place from the top, `directory` (pages that repeat one word) first: pages by column. */
  readonly places: readonly { readonly name: string; readonly pages: readonly number[] }[]
}

/** A page that somebody waits for in order to change a part of it. */
interface Watch {
  readonly slot: number
  changed: boolean
}

/** Where the page of a slot is, and in which form. */
export interface PageReport {
  /** Number of the slot: the page of 4 KiB at `slot * 4096`. */
  readonly slot: number
  /**
   * `empty`: there is no page, it reads as zeros; `same`: it repeats one word, and takes no place; `held`: it is in a
   * place; `lost`: the stack has lost it, and reading it is an error.
   */
  readonly state: 'empty' | 'same' | 'held' | 'lost'
  /**
   * Name of its place (the second `frontswap` is `frontswap-2`), and the place's number from the top, 0 being the
   * first; `null` for any other than `held`.
   */
  readonly place: string | null
  readonly placeNumber: number | null
  /** Bytes of its block: where it waits, with what its frame and rounding take. */
  readonly bytes: number
  /** Number of the codec that made the block, 0: none did; `null`: it is in no place, or only its block knows. */
  readonly codec: number | null
  /** The flags that zram's block_state shows for it: s, w, h, i, r, n. */
  readonly flags: string
  /** Seconds since it was read or written, whole ones; `null` without a clock, or a page. */
  readonly ageSeconds: number | null
  /**
   * Its last moves between places, the newest first, also those of what the slot held before; `null`: none are
   * remembered (see `RamzswapOptions.history`). Writes into the first place, and what ends there, are not among them.
   */
  readonly moves: readonly MoveReport[] | null
  /** All moves of the last so many seconds are remembered; `null` as `moves`. */
  readonly movesSeconds: number | null
}

/** A move of the page of a slot. */
export interface MoveReport {
  readonly reason: MoveReason
  /** Names of the place that it was in, and of that which it was in then, or which had its copy; `null`: none. */
  readonly from: string | null
  readonly to: string | null
  /** Seconds since then, to a thousandth. */
  readonly agoSeconds: number
}

/** Makes a device. Throws `RangeError` for settings that make no sense, `TmemError` when it cannot be opened. */
export function ramzswap(options: RamzswapOptions): Ramzswap {
  return new Ramzswap(options)
}

/**
 * Makes a virtswap: a device whose stack begins with memory of a hypervisor, which may be small, and which may be
 * wanted back (`recall`).
 */
export function virtswap(options: RamzswapOptions): Ramzswap {
  checkOptions('virtswap', options, names)
  return new Ramzswap({ ...options, stack: lent(options.stack) })
}

/** An open device. Any number of them stand side by side and share nothing. */
export class Ramzswap implements BlockDevice {
  readonly name: string
  readonly blockSize: number = sectorBytes
  readonly preferredBlockSize: number = pageBytes
  readonly readOnly = false
  readonly maxSizeBytes: number
  readonly #slots: Slots
  readonly #stack: DeviceStack
  readonly #moves: Moves
  readonly #statistics: Statistics
  readonly #times: PageTimes | undefined
  /** A page for what need not wait; pages for what must, and who waits for one. */
  readonly #scratch: Uint8Array
  readonly #zeros: Uint8Array
  readonly #free: Uint8Array[] = []
  readonly #waiting: ((page: Uint8Array) => void)[] = []
  readonly #watches: Watch[] = []
  readonly #batch: PageBatch = new PageBatch(batchPages, pageBytes, new Uint8Array(0))
  readonly #where = new Whereabouts()
  readonly #clock: (() => number) | undefined
  #closing: Promise<void> | undefined

  constructor(options: RamzswapOptions) {
    checkOptions('ramzswap', options, names)
    const { name, stack, allocator = systemAllocator, check = 'arguments', clock, wake } = options
    const { history, onProgress, stopwatch } = options
    const sizeBytes = bytesOf('ramzswap', 'sizeBytes', options.sizeBytes)
    const maxSizeBytes = bytesOf('ramzswap', 'maxSizeBytes', options.maxSizeBytes ?? sizeBytes)
    const memlimitBytes = bytesOf('ramzswap', 'memlimitBytes', options.memlimitBytes ?? 0)
    this.name = name
    this.maxSizeBytes = maxSizeBytes
    assertSize('the size', sizeBytes)
    assertSize('the largest size', maxSizeBytes)
    if (maxSizeBytes < sizeBytes)
      throw new RangeError(`the largest size of ${name}, ${maxSizeBytes}, is less than its size, ${sizeBytes}`)
    const capacity = maxSizeBytes / pageBytes
    this.#slots = new Slots(name, sizeBytes / pageBytes, capacity, clock, allocator)
    const pages = allocator.allocate((waitingPages + 2) * pageBytes, 'ramzswap.pages')
    if (pages === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `device ${name}: no memory for its pages`, { layer: name })
    this.#scratch = new Uint8Array(pages, 0, pageBytes)
    this.#zeros = new Uint8Array(pages, pageBytes, pageBytes)
    for (let n = 2; n < waitingPages + 2; n++) this.#free.push(new Uint8Array(pages, n * pageBytes, pageBytes))
    this.#stack = openStack({ name, layers: stack, sizeBytes, allocator, check, clock, history, wake, onProgress })
    this.#clock = clock
    const { store } = this.#stack
    this.#moves = new Moves(name, this.#slots, this.#stack, () => this.#closing !== undefined)
    this.#statistics = new Statistics(() => store.usage())
    this.#times = stopwatch === undefined ? undefined : new PageTimes(stopwatch, (slot) => this.#placeOf(slot))
    try {
      this.memlimitBytes = memlimitBytes
    } catch (error) {
      // A rejection of this close is not handled on purpose: it surfaces beside the error thrown here.
      void store.close()
      throw error
    }
    this.#recover()
  }

  get sizeBytes(): number {
    return this.#slots.size * pageBytes
  }

  get allocatedBytes(): number {
    return this.#slots.full * pageBytes
  }

  /**
   * Limit on the memory for pages (memlimit), in bytes; 0: none but the places' own. What is above a lowered one stays.
   */
  get memlimitBytes(): number {
    const { limit } = this.#stack.meter
    return limit === Number.POSITIVE_INFINITY ? 0 : limit
  }

  set memlimitBytes(bytes: number) {
    if (!Number.isSafeInteger(bytes) || bytes < 0) throw new RangeError(`the memlimit must be bytes or 0, got ${bytes}`)
    if (bytes > 0 && this.#stack.waitingRoomBytes < this.sizeBytes)
      throw new RangeError(
        `${this.name}: memlimitBytes needs a backing store, where the rest can go: end the stack in a file`,
      )
    this.#stack.meter.limit = bytes === 0 ? Number.POSITIVE_INFINITY : bytes
  }

  /** Pages that `writeback` may still move (writeback_limit); `undefined`: any number (writeback_limit_enable off). */
  get writebackLimit(): number | undefined {
    return this.#moves.limit
  }

  set writebackLimit(pages: number | undefined) {
    if (pages !== undefined && !(Number.isSafeInteger(pages) && pages >= 0))
      throw new RangeError(`the writeback limit must be a number of pages, got ${pages}`)
    this.#moves.limit = pages
  }

  read(at: number, into: Uint8Array): Completion {
    this.#assertRange(at, into.length)
    return this.#guarded(() => {
      let later: Job[] | undefined
      for (let done = 0; done < into.length; ) {
        const slot = Math.floor((at + done) / pageBytes)
        const from = (at + done) % pageBytes
        const length = Math.min(pageBytes - from, into.length - done)
        const target = length === into.length ? into : into.subarray(done, done + length)
        this.#statistics.counters.reads++
        if (!this.#readPart(slot, from, target)) later = queued(later, () => this.#fetchPart(slot, from, target))
        done += length
      }
      return later === undefined ? undefined : inTurn(later)
    })
  }

  write(at: number, bytes: Uint8Array): Completion {
    this.#assertRange(at, bytes.length)
    return this.#guarded(() => this.#write(at, bytes))
  }

  discard(at: number, length: number): Completion {
    this.#assertRange(at, length)
    return this.#guarded(() => this.#clear(at, length, true))
  }

  zero(at: number, length: number): Completion {
    this.#assertRange(at, length)
    return this.#guarded(() => this.#clear(at, length, false))
  }

  /** Done at once, unless some place promises to survive the process: no write is kept back. */
  flush(): Completion {
    return this.#guarded(() => (this.#stack.survives ? this.#stack.store.sync?.() : undefined))
  }

  map(at: number, length: number, report: (length: number, allocated: boolean) => boolean): void {
    this.#assertRange(at, length)
    const end = at + length
    for (let from = at; from < end; ) {
      const allocated = this.#slots.hasBytes(Math.floor(from / pageBytes))
      let to = from
      do to = Math.min(end, (Math.floor(to / pageBytes) + 1) * pageBytes)
      while (to < end && this.#slots.hasBytes(to / pageBytes) === allocated)
      if (!report(to - from, allocated)) return
      from = to
    }
  }

  /**
   * Changes the size while the device is in use, up to `maxSizeBytes`. What lies beyond a smaller end is gone. Throws
   * `RangeError` for a size that cannot be, and `TmemError` (`TMEM_NO_MEMORY`) when the stack has no room for it.
   */
  resize(sizeBytes: number): void {
    assertSize('the size', sizeBytes)
    if (sizeBytes > this.maxSizeBytes)
      throw new RangeError(`${this.name} was made for at most ${this.maxSizeBytes} bytes, not ${sizeBytes}`)
    const room = this.memlimitBytes === 0 ? this.#stack.roomBytes : this.#stack.waitingRoomBytes
    if (sizeBytes > room)
      throw new TmemError(
        'TMEM_NO_MEMORY',
        `${this.name} cannot grow to ${sizeBytes} bytes: its stack is sure to have room for ${room}`,
        { layer: this.name },
      )
    const slots = this.#slots
    for (let slot = sizeBytes / pageBytes; slot < slots.size; slot++)
      if (this.#empty(slot)) this.#statistics.counters.cutOff++
    slots.size = sizeBytes / pageBytes
  }

  /**
   * Marks pages as idle, until their next access: all of them, or those not accessed for so many seconds (needs
   * `clock`). Returns how many are marked now.
   */
  idle(age: 'all' | number): number {
    if (age !== 'all' && !this.#slots.hasAges)
      throw new TmemError('TMEM_UNSUPPORTED', `${this.name} has no clock, so it knows no ages: give it one`, {
        layer: this.name,
      })
    return this.#slots.markIdle(age)
  }

  /**
   * Moves pages of a kind (or one page) from memory to the place that waits, within `writebackLimit`. Resolves to how
   * many were moved. Rejects with `TMEM_UNSUPPORTED` when none waits, with `TMEM_IO` when it fails: what is not moved
   * by then stays where it was.
   */
  async writeback(request: WritebackRequest, maxPages: number = Number.POSITIVE_INFINITY): Promise<number> {
    this.#assertOpen()
    return this.#moves.writeback(request, maxPages)
  }

  /**
   * Compresses pages in memory again with the stronger codec of their place (`zcache({ recompress })`). What does not
   * take less by that is marked incompressible. Resolves to how many take less. Rejects with `TMEM_UNSUPPORTED` when no
   * place has such a codec.
   */
  async recompress(request: RecompressRequest = {}): Promise<number> {
    this.#assertOpen()
    return this.#moves.recompress(request)
  }

  /**
   * The hypervisor wants memory back: up to `maxPages` pages come from there to the device's own places. Resolves to
   * how many did; fewer when nothing here would take them, and those stay there.
   */
  async recall(maxPages: number = Number.POSITIVE_INFINITY): Promise<number> {
    this.#assertOpen()
    return this.#moves.recall(maxPages)
  }

  /**
   * Gives up all pages, and begins to count anew: what the device was when it was made (RESET), with the settings that
   * it has now.
   */
  reset(): void {
    for (let slot = 0; slot < this.#slots.size; slot++) this.#empty(slot)
    this.#moves.reset()
    this.#statistics.reset()
  }

  /** The largest amount of memory in use (mem_used_max) is that of now; writing 0 to it, with zram. */
  forgetMostUsed(): void {
    this.#statistics.forgetMostUsed()
  }

  /**
   * Lets the stack do background work. Throws `TmemError` (`TMEM_BROKEN`) when its invariants do not hold any more:
   * nothing of it is served then.
   */
  tick(budget: Budget): Progress {
    const progress = this.#stack.store.tick(budget)
    this.#statistics.look()
    return progress
  }

  /**
   * Moves pages in memory together, so that memory becomes free; how many, 0: there is nothing to gain (compact, with
   * zram).
   */
  compact(pages: number): number {
    return this.#stack.store.compact(pages)
  }

  /**
   * Flags of a slot as zram's block_state shows them: s same, w written back, h huge, i idle, r recompressed, n
   * incompressible.
   */
  blockState(slot: number): string {
    const where = this.#where
    if (slot >= this.#slots.size || !this.#find(slot)) return ''
    const { places } = this.#stack.store.usage()
    return [
      where.place < 0 && 's',
      where.place >= 0 && places[where.place]!.waits && 'w',
      where.huge && 'h',
      this.#slots.isIdle(slot) && 'i',
      where.recompressed && 'r',
      where.incompressible && 'n',
    ]
      .filter(Boolean)
      .join('')
  }

  /**
   * How long pages were not touched, by where they rest; `undefined` without a clock. Of a device with more than `most`
   * slots so many are looked at, spread evenly and the same each time, and the counts are of those.
   */
  ages(most: number = 16_384): PageAges | undefined {
    if (!this.#slots.hasAges) return undefined
    const names = ['directory', ...this.#stack.store.usage().places.map(({ name }) => name)]
    const places = names.map((name) => ({ name, pages: [...ageBounds.map(() => 0), 0] }))
    const { size } = this.#slots
    const stride = Math.max(1, Math.ceil(size / most))
    let seen = 0
    for (let n = 0; n * stride < size; n++) {
      // Not at even distances: what is written may have a stride, too.
      const slot = n * stride + ((Math.imul(n, 0x9e3779b1) >>> 0) % stride)
      if (slot >= size || !this.#slots.holds(slot) || !this.#find(slot)) continue
      const age = this.#slots.ageOf(slot)
      const column = ageBounds.findIndex((bound) => age < bound)
      places[this.#where.place + 1]!.pages[column < 0 ? ageBounds.length : column]!++
      seen++
    }
    return { bounds: ageBounds, seen, places }
  }

  /**
   * Where the page of a slot is, which does not count as use of it. Throws `RangeError` for a slot that is none of the
   * device's.
   */
  explain(slot: number): PageReport {
    const slots = this.#slots
    if (!Number.isSafeInteger(slot) || slot < 0 || slot >= slots.size)
      throw new RangeError(`${this.name} has pages 0 to ${slots.size - 1}, got ${slot}`)
    const where = this.#where
    const isHeld = slots.holds(slot)
    const isFound = this.#find(slot)
    const isPlaced = isFound && where.place >= 0
    const history = this.#stack.pool.movesOf?.(object, slot)
    const names = placeNames(this.#stack.store.usage().places)
    const ago = (ms: number): number => Math.round(this.#clock!() - ms) / 1000
    return {
      slot,
      state: isPlaced ? 'held' : isFound ? 'same' : isHeld ? 'lost' : 'empty',
      place: isPlaced ? names[where.place]! : null,
      placeNumber: isPlaced ? where.place : null,
      bytes: isPlaced ? where.bytes : 0,
      codec: isPlaced && where.codec >= 0 ? where.codec : null,
      flags: this.blockState(slot),
      ageSeconds: isHeld && slots.hasAges ? slots.ageOf(slot) : null,
      moves:
        history?.moves.toReversed().map(({ reason, from, to, atMs }) => ({
          reason,
          from: names[from] ?? null,
          to: names[to] ?? null,
          agoSeconds: ago(atMs),
        })) ?? null,
      movesSeconds: history === undefined ? null : ago(history.sinceMs),
    }
  }

  /** Resolves when every place of the stack takes pages. Rejects with `TmemError` where one says that it cannot. */
  ready(): Promise<void> {
    return this.#stack.store.ready?.() ?? Promise.resolve()
  }

  /** What rests in each place of the stack, and which of them fail. */
  usage(): StackUsage {
    return this.#stack.store.usage()
  }

  /** The statistics of GET_STATS. */
  ramzswapStats(): RamzswapStats {
    return this.#statistics.ramzswapStats(this.#state())
  }

  stats(): StatsNode {
    const tree = this.#statistics.tree(this.#state(), this.#stack.store.stats())
    if (this.#times === undefined) return tree
    return { ...tree, children: [...tree.children, this.#times.stats(placeNames(this.usage().places))] }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    // Who waits for a page finds the device closed.
    for (const resolve of this.#waiting.splice(0)) resolve(this.#scratch)
    await this.#stack.store.close()
  }

  /** Pages that places have kept from an earlier run are there again; those beyond the end are not. */
  #recover(): void {
    if (!this.#stack.store.usage().places.some(({ recovered }) => recovered > 0)) return
    const { pool } = this.#stack
    for (let slot = 0; slot < this.maxSizeBytes / pageBytes; slot++) {
      if (!this.#find(slot)) continue
      if (slot < this.#slots.size) this.#hold(slot, false)
      else pool.flushPage(object, slot)
    }
  }

  #state(): DeviceState {
    const { limit: writebackLimit, writtenBack, recalled, recallFailed } = this.#moves
    const { name, sizeBytes, memlimitBytes } = this
    const { held: heldPages } = this.#slots
    return { name, sizeBytes, memlimitBytes, heldPages, writebackLimit, writtenBack, recalled, recallFailed }
  }

  /** Throws `RangeError`, and counts it, for what is no range of this device. */
  #assertRange(at: number, length: number): void {
    try {
      assertBlockRange(this, at, length)
    } catch (error) {
      this.#statistics.counters.invalid++
      throw error
    }
  }

  #assertOpen(): void {
    if (this.#closing !== undefined) throw closedError(this.name)
  }

  /** What the outside world does wrong is always a rejection. */
  #guarded(run: () => Completion): Completion {
    try {
      this.#assertOpen()
      return run()
    } catch (error) {
      return Promise.reject(error as Error)
    }
  }

  #write(at: number, bytes: Uint8Array): Completion {
    let later: Job[] | undefined
    let failure: TmemError | undefined
    const batch = this.#batch
    for (let done = 0; done < bytes.length; ) {
      const slot = Math.floor((at + done) / pageBytes)
      const from = (at + done) % pageBytes
      const length = Math.min(pageBytes - from, bytes.length - done)
      if (length === bytes.length && length === pageBytes) failure = this.#put(slot, bytes)
      else if (length === pageBytes) {
        if (batch.length === 0) batch.bytes = bytes
        batch.push(object, slot, done)
        if (batch.length === batchPages) failure = this.#putBatch() ?? failure
      } else {
        const { pending, error } = this.#modify(slot, from, bytes.subarray(done, done + length))
        if (pending !== undefined) later = queued(later, () => pending)
        failure = error ?? failure
      }
      done += length
    }
    failure = this.#putBatch() ?? failure
    return after(later, failure)
  }

  /** Stores a whole page. Answers why it could not be. */
  #put(slot: number, page: Uint8Array): TmemError | undefined {
    this.#statistics.counters.writes++
    const begun = this.#times?.beginPut(1)
    const outcome = this.#stack.pool.replace(object, slot, page)
    if (begun !== undefined && outcome === PutOutcome.Stored) this.#times!.put(begun, slot, 1)
    return this.#wasPut(slot, outcome, page, 0)
  }

  /** Stores the gathered pages. Answers the error of the last that failed. */
  #putBatch(): TmemError | undefined {
    const batch = this.#batch
    if (batch.length === 0) return undefined
    let failure: TmemError | undefined
    this.#statistics.counters.writes += batch.length
    const begun = this.#times?.beginPut(batch.length)
    const stored = this.#stack.pool.replaceMany(batch)
    if (begun !== undefined && stored === batch.length) this.#times!.put(begun, batch.indexes[0]!, batch.length)
    for (let n = 0; n < batch.length; n++)
      failure =
        this.#wasPut(batch.indexes[n]!, batch.outcomes[n] as PutOutcome, batch.bytes, batch.offsets[n]!) ?? failure
    batch.clear()
    // The caller's buffer is not kept.
    batch.bytes = this.#scratch
    return failure
  }

  #wasPut(slot: number, outcome: PutOutcome, bytes: Uint8Array, at: number): TmemError | undefined {
    const { counters } = this.#statistics
    if (outcome !== PutOutcome.Stored) {
      counters.failedWrites++
      return refusalError(this.name, slot, outcome, this.#stack.store.failure)
    }
    if (this.#slots.holds(slot)) counters.overwritten++
    this.#hold(slot, this.#isZero(bytes, at))
    return undefined
  }

  /** Changes a part of a page. */
  #modify(slot: number, from: number, part: Uint8Array): { pending?: Promise<void>; error?: TmemError } {
    const page = this.#scratch
    let error: TmemError | undefined
    try {
      if (!this.#load(slot, page)) return { pending: this.#modifyLater(slot, from, part) }
      page.set(part, from)
      error = this.#put(slot, page)
    } catch (thrown) {
      if (!(thrown instanceof TmemError)) throw thrown
      this.#statistics.counters.failedWrites++
      error = thrown
    }
    return error === undefined ? {} : { error }
  }

  async #modifyLater(slot: number, from: number, part: Uint8Array): Promise<void> {
    await this.#borrow(async (page) => {
      const watch: Watch = { slot, changed: true }
      this.#watches.push(watch)
      try {
        while (watch.changed) {
          watch.changed = false
          await this.#fetch(slot, page)
        }
      } finally {
        this.#watches.splice(this.#watches.indexOf(watch), 1)
      }
      page.set(part, from)
      const error = this.#put(slot, page)
      if (error !== undefined) throw error
    })
  }

  /** Frees the whole pages of a range and zeroes the rest. */
  #clear(at: number, length: number, discarded: boolean): Completion {
    const { counters } = this.#statistics
    let later: Job[] | undefined
    let failure: TmemError | undefined
    for (let done = 0; done < length; ) {
      const slot = Math.floor((at + done) / pageBytes)
      const from = (at + done) % pageBytes
      const part = Math.min(pageBytes - from, length - done)
      if (part === pageBytes) {
        if (this.#empty(slot)) {
          counters.freed++
          if (discarded) counters.notifyFree++
        }
      } else if (this.#slots.holds(slot)) {
        const { pending, error } = this.#modify(slot, from, this.#zeros.subarray(0, part))
        if (pending !== undefined) later = queued(later, () => pending)
        failure = error ?? failure
      }
      done += part
    }
    return after(later, failure)
  }

  /** Fills `into` with a part of a page; false when that has to wait. */
  #readPart(slot: number, from: number, into: Uint8Array): boolean {
    if (into.length === pageBytes) return this.#load(slot, into)
    if (!this.#load(slot, this.#scratch)) return false
    into.set(this.#scratch.subarray(from, from + into.length))
    return true
  }

  async #fetchPart(slot: number, from: number, into: Uint8Array): Promise<void> {
    if (into.length === pageBytes) return this.#fetch(slot, into)
    return this.#borrow(async (page) => {
      await this.#fetch(slot, page)
      into.set(page.subarray(from, from + into.length))
    })
  }

  /** Fills a page; false when it has to be waited for. Throws when it is known to be there and cannot be had. */
  #load(slot: number, into: Uint8Array): boolean {
    if (!this.#slots.holds(slot)) {
      into.fill(0)
      return true
    }
    this.#slots.touch(slot)
    try {
      const begun = this.#times?.beginGet()
      const outcome = this.#stack.pool.get(object, slot, into)
      if (outcome === GetOutcome.Miss) throw this.#lost(slot)
      if (begun !== undefined && outcome === GetOutcome.Hit) this.#times!.got(begun, slot)
      return outcome === GetOutcome.Hit
    } catch (error) {
      this.#statistics.counters.failedReads++
      throw error
    }
  }

  /** Fills a page, waiting for it, with what the slot held at some time during the call. */
  async #fetch(slot: number, into: Uint8Array): Promise<void> {
    for (let misses = 0; ; misses++) {
      this.#assertOpen()
      if (slot >= this.#slots.size) throw pageError(this.name, 'read', slot, 'the device has become smaller')
      if (this.#load(slot, into)) return
      try {
        const place = this.#times === undefined ? undefined : this.#placeOf(slot)
        const begun = this.#times?.beginFetch()
        const outcome = await this.#stack.pool.fetch(object, slot, into)
        if (outcome === GetOutcome.Hit) {
          if (begun !== undefined) this.#times!.fetched(begun, place!)
          return
        }
        // It was discarded meanwhile, or it is lost: looking again tells.
        if (misses === maxMisses) throw this.#lost(slot)
      } catch (error) {
        this.#assertOpen()
        this.#statistics.counters.failedReads++
        throw error
      }
    }
  }

  /** Lends a page until `use` has settled. */
  async #borrow(use: (page: Uint8Array) => Promise<void>): Promise<void> {
    const page = this.#free.pop() ?? (await new Promise<Uint8Array>((resolve) => this.#waiting.push(resolve)))
    this.#assertOpen()
    try {
      await use(page)
    } finally {
      const next = this.#waiting.shift()
      if (next === undefined) this.#free.push(page)
      else next(page)
    }
  }

  /** A page was stored. */
  #hold(slot: number, isZero: boolean): void {
    this.#slots.hold(slot, isZero)
    this.#statistics.counters.stored++
    this.#changed(slot)
  }

  /** Gives a slot's page up; false when it holds none. */
  #empty(slot: number): boolean {
    if (!this.#slots.holds(slot)) return false
    this.#stack.pool.flushPage(object, slot)
    this.#slots.empty(slot)
    this.#changed(slot)
    return true
  }

  /** Who waits for the page in order to change a part of it has to look again. */
  #changed(slot: number): void {
    for (const watch of this.#watches) if (watch.slot === slot) watch.changed = true
  }

  #find(slot: number): boolean {
    return this.#stack.pool.whereIs(object, slot, this.#where)
  }

  /** Number of the place that has the page of a slot; -1: none. */
  #placeOf(slot: number): number {
    return this.#find(slot) ? this.#where.place : -1
  }

  #isZero(bytes: Uint8Array, at: number): boolean {
    // Most pages are no zeros at once.
    if (bytes[at] !== 0 || bytes[at + pageBytes / 2] !== 0) return false
    return Buffer.prototype.compare.call(bytes, this.#zeros, 0, pageBytes, at, at + pageBytes) === 0
  }

  #lost(slot: number): TmemError {
    return pageError(this.name, 'read', slot, 'its stack has lost the page; overwrite or discard it')
  }
}

/** Something that has to wait; begun when it is called. */
type Job = () => Promise<void>

/** Adds to a list that exists only when it is needed. */
function queued(jobs: Job[] | undefined, job: Job): Job[] {
  if (jobs === undefined) return [job]
  jobs.push(job)
  return jobs
}

/** Done when all jobs are; then fails with what went wrong before them. */
function after(jobs: Job[] | undefined, failure: TmemError | undefined): Completion {
  if (jobs === undefined) return failure === undefined ? undefined : Promise.reject(failure)
  return inTurn(jobs).then(() => {
    if (failure !== undefined) throw failure
  })
}

/** Runs what has to wait, a few at a time; all of it, then the first error. */
async function inTurn(jobs: readonly Job[]): Promise<void> {
  let failed = false
  let reason: unknown
  for (let from = 0; from < jobs.length; from += fetchedPages)
    for (const result of await Promise.allSettled(jobs.slice(from, from + fetchedPages).map((job) => job())))
      if (result.status === 'rejected' && !failed) {
        failed = true
        reason = result.reason
      }
  if (failed) throw reason
}

function assertSize(what: string, bytes: number): void {
  if (!Number.isSafeInteger(bytes) || bytes <= 0 || bytes % pageBytes !== 0 || bytes / pageBytes > maxSlots)
    throw new RangeError(`${what} of a device must be a positive multiple of ${pageBytes} bytes, got ${bytes}`)
}
