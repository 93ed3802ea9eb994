/**
 * A block device in compressed memory: ramzswap (compcache 0.6.2) and what zram made of it, over any page stores; and
 * virtswap, which offers each page to a hypervisor first.
 *
 * A slot is a page of 4 KiB. A page that repeats one word is two words in a table; every other one is in exactly one of the
 * device's tiers (`tiers.ts`), in the order hypervisor, compressed, uncompressed, backing: what one refuses goes to the next.
 * Requests may be of any multiple of 512 bytes; what is no whole page is read, changed and written.
 *
 * Invariants:
 *  - A slot's page is under one handle of one tier, the one that its state names; no other handle of that slot is in use.
 *  - A page that was acknowledged stays until it is overwritten, discarded or cut off: an overwrite puts the new page under the slot's
 *    other handle and gives the old one up afterwards. Only where there is no room for both is the old one given up first.
 *  - A slot's stamp changes with every change of its page: what waited for a read looks again when the stamp moved. So pages
 *    are changed whole, and two changes of different parts of a page are both kept.
 *  - Every slot is counted in `#places` under its place; pages written and moved in = in place + moved on + overwritten + freed.
 *
 * DEVIATION from ramzswap: num_reads counts all reads, as num_writes counts all writes (what was forwarded to the backing store was taken out of
 * the former only); failed_writes counts writes that failed (also those for which memory was wanting and which went to the backing store);
 * sizes are given (they had defaults by the size of memory); size limit, memlimit and statistics are each device's own (the limit on compressed pages was one
 * variable for all); requests need not be single aligned pages; a slot that holds nothing reads as zeros (it left the buffer
 * as it was); an overwrite that fails leaves the old page (it was freed first); slot 0 is a page like any other, mkswap writes the
 * header (it was preset, and freeing it made counters underflow); a backing store that is too small is refused (its size replaced
 * the one that was given); a device without room for its whole size is refused (writes failed later).
 *
 * Sources: the reference notes on ramzswap, zram's documentation, and Nitin Gupta's virtswap (December 2009).
 */
import {
  type Allocator,
  assertBlockRange,
  type BlockDevice,
  type Budget,
  type Completion,
  GetOutcome,
  PageBatch,
  type Progress,
  PutOutcome,
  putOutcomeName,
  type StatsNode,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import {
  type DevicePlan,
  openTiers,
  pageBytes,
  type Tier,
  type TierName,
  type Tiers,
  tierNames,
  usedBytes,
} from './tiers.ts'

/** Settings of a device. */
export interface RamzswapOptions extends DevicePlan {
  /** Name in messages and statistics, e.g. `ramzswap0`. */
  readonly name: string
  /** Size (disksize): a positive multiple of 4096. */
  readonly sizeBytes: number
  /** Largest size that `resize` will be asked for (default: `sizeBytes`). Tables are reserved for it. */
  readonly maxSizeBytes?: number
  /**
   * Largest amount of memory for pages, compressed or not, as the stores account for it; what is over it goes to the backing
   * store. Default: what the stores' own limits allow.
   */
  readonly memlimitBytes?: number
  /** Seconds, from any start: makes `idle` know how long a page was not touched. Default: no ages. */
  readonly clock?: () => number
  /** Where memory comes from, for the device and its stores (default: the system). */
  readonly allocator?: Allocator
  /** As for `compose`; `model` is for tests. */
  readonly check?: 'arguments' | 'model'
}

/** Which pages `recompress` and `writeback` look at. */
export type PageKind = 'huge' | 'idle' | 'huge_idle' | 'incompressible'

/** What `writeback` moves: all pages of a kind, or the page of one slot. */
export type WritebackRequest = PageKind | { readonly pageIndex: number }

/** What `recompress` tries. */
export interface RecompressRequest {
  /** Default: all pages in memory. `incompressible` pages are never tried again. */
  readonly type?: Exclude<PageKind, 'incompressible'>
  /** Only pages that take at least so many bytes (default 0). */
  readonly thresholdBytes?: number
  /** At most so many pages are tried (default: all). */
  readonly maxPages?: number
}

/** The statistics of ramzswap's GET_STATS, under their names. Sizes in bytes; percentages are of `pages_stored`. */
export interface RamzswapStats {
  readonly memlimit: number
  readonly disksize: number
  readonly num_reads: number
  readonly num_writes: number
  readonly failed_reads: number
  readonly failed_writes: number
  readonly invalid_io: number
  readonly notify_free: number
  readonly pages_zero: number
  readonly good_compress_pct: number
  readonly pages_expand_pct: number
  readonly pages_stored: number
  readonly pages_used: number
  readonly orig_data_size: number
  readonly compr_data_size: number
  readonly mem_used_total: number
  readonly bdev_num_reads: number
  readonly bdev_num_writes: number
}

/** State of a slot: the place in the low three bits, then flags. */
const EMPTY = 0
const SAME = 1
/** First tier; the place of tier n is `TIER + n`. */
const TIER = 2
const HYPERVISOR = 2
const RECOMPRESSED = 4
const UNCOMPRESSED = 5
const BACKING = 6
/** The page was given up for one that could not be stored: reads fail until it is overwritten or discarded. */
const LOST = 7
const placeMask = 7
/** Which of the slot's two handles is in use. */
const OTHER = 8
const IDLE_FLAG = 16
/** Recompression found nothing to gain. */
const INCOMPRESSIBLE_FLAG = 32
/** The compressor refused it. */
const HUGE_FLAG = 64

const sectorBytes = 512
const goodBytes = 2048
/** Largest number of slots: each has two handles, whose indexes have 32 bits. */
const maxSlots = 2 ** 31
/** Pages for what has to wait and is no whole page, or is on the move. */
const waitingPages = 16
/** Pages that one write hands to the backing store at once. */
const spillPages = 128
/** Pages that one request fetches at the same time. */
const fetchedPages = 32
/** Pages that are moved at once, before requests have their turn. */
const turnPages = 16
/** Every page is in one object. */
const object = 0

/** Makes a virtswap: a ramzswap that offers each page to a hypervisor first. */
export function virtswap(options: RamzswapOptions & Required<Pick<DevicePlan, 'hypervisor'>>): Ramzswap {
  return new Ramzswap(options)
}

/** Makes a device. Throws `RangeError` for settings that make no sense, `TmemError` when it cannot be opened. */
export function ramzswap(options: RamzswapOptions): Ramzswap {
  return new Ramzswap(options)
}

/** An open device. Any number of them stand side by side and share nothing. */
export class Ramzswap implements BlockDevice {
  readonly name: string
  readonly blockSize: number = sectorBytes
  readonly preferredBlockSize: number = pageBytes
  readonly readOnly = false
  readonly maxSizeBytes: number
  readonly #tiers: Tiers
  /** In the order in which a new page is offered; the backing store is separate, because it takes batches. */
  readonly #memoryTiers: readonly Tier[]
  readonly #backing: Tier | undefined
  /** The one that every page ends in. */
  readonly #last: Tier
  readonly #clock: (() => number) | undefined
  /** By slot: state; stamp; bytes at rest; the two words of a same-filled page; seconds of the last access. */
  readonly #states: Uint8Array
  readonly #stamps: Uint32Array
  readonly #sizes: Uint16Array
  readonly #words: Uint32Array
  readonly #touched: Uint32Array
  /** A page for what need not wait; pages for what must, and who waits for one. */
  readonly #scratch: Uint8Array
  readonly #zeros: Uint8Array
  readonly #free: Uint8Array[] = []
  readonly #waiting: ((page: Uint8Array) => void)[] = []
  readonly #batch: PageBatch = new PageBatch(spillPages, pageBytes, new Uint8Array(0))
  readonly #tableBytes: number
  #slots: number
  #closing: Promise<void> | undefined
  /** Of the last page that was offered: the compressor's opinion, and why the last tier refused it. */
  #huge = 0
  #reason: PutOutcome = PutOutcome.Stored
  /** The compressor's opinion of the pages in the batch. */
  readonly #batchHuge: Uint8Array = new Uint8Array(spillPages)
  /** Pages that may still be written back; `undefined`: any number. */
  #writebackLimit: number | undefined

  /** Slots by place. */
  readonly #places: Float64Array = new Float64Array(8)
  #reads = 0
  #writes = 0
  #failedReads = 0
  #failedWrites = 0
  #invalid = 0
  #notifyFree = 0
  #hugeNow = 0
  #hugeSince = 0
  #good = 0
  #backingReads = 0
  #backingWrites = 0
  #compacted = 0
  #mostUsed = 0
  /** What became of pages: stored, overwritten, freed (discarded or zeroed), cut off by a resize. */
  #stored = 0
  #overwritten = 0
  #freed = 0
  #cutOff = 0
  #writtenBack = 0
  #recalled = 0
  #recallFailed = 0
  #recompressed = 0
  #recompressPoor = 0
  /** Puts that a tier refused, by tier. */
  readonly #refused: Float64Array = new Float64Array(tierNames.length)

  constructor(options: RamzswapOptions) {
    const { name, sizeBytes, allocator = systemAllocator, check = 'arguments', memlimitBytes, clock } = options
    const maxSizeBytes = options.maxSizeBytes ?? sizeBytes
    this.name = name
    this.maxSizeBytes = maxSizeBytes
    assertSize('the size', sizeBytes)
    assertSize('the largest size', maxSizeBytes)
    if (maxSizeBytes < sizeBytes)
      throw new RangeError(`the largest size of ${name}, ${maxSizeBytes}, is less than its size, ${sizeBytes}`)
    if (memlimitBytes !== undefined && options.backing === undefined)
      throw new RangeError(`${name}: memlimitBytes needs a backing store, where the rest can go`)
    this.#slots = sizeBytes / pageBytes
    this.#clock = clock
    const capacity = maxSizeBytes / pageBytes
    this.#tableBytes = capacity * (clock === undefined ? 15 : 19)
    const ask = (bytes: number, site: string): ArrayBufferLike => {
      const memory = allocator.allocate(bytes, `ramzswap.${site}`)
      if (memory === undefined)
        throw new TmemError('TMEM_NO_MEMORY', `device ${name}: no memory for its ${site} (${bytes} bytes)`, {
          layer: name,
        })
      return memory
    }
    const table = ask(this.#tableBytes, 'table')
    this.#words = new Uint32Array(table, 0, capacity * 2)
    this.#stamps = new Uint32Array(table, capacity * 8, capacity)
    const touchedAt = capacity * 12
    this.#touched = new Uint32Array(table, touchedAt, clock === undefined ? 0 : capacity)
    const sizesAt = touchedAt + (clock === undefined ? 0 : capacity * 4)
    this.#sizes = new Uint16Array(table, sizesAt, capacity)
    this.#states = new Uint8Array(table, sizesAt + capacity * 2, capacity)
    const pages = ask((waitingPages + 2) * pageBytes, 'pages')
    this.#scratch = new Uint8Array(pages, 0, pageBytes)
    this.#zeros = new Uint8Array(pages, pageBytes, pageBytes)
    for (let n = 2; n < waitingPages + 2; n++) this.#free.push(new Uint8Array(pages, n * pageBytes, pageBytes))
    this.#tiers = openTiers(name, options, sizeBytes, allocator, check)
    const { hypervisor, compressed, uncompressed, backing } = this.#tiers.byName
    this.#memoryTiers = [hypervisor, compressed, uncompressed].filter((tier) => tier !== undefined)
    this.#backing = backing
    this.#last = backing ?? this.#memoryTiers[this.#memoryTiers.length - 1]!
    this.#places[EMPTY] = this.#slots
    this.memlimitBytes = memlimitBytes ?? 0
  }

  get sizeBytes(): number {
    return this.#slots * pageBytes
  }

  /** Limit on the memory for pages (memlimit), in bytes; 0: none but the stores' own. What is above a lowered one stays. */
  get memlimitBytes(): number {
    const { limit } = this.#tiers.memory
    return limit === Number.POSITIVE_INFINITY ? 0 : limit
  }

  set memlimitBytes(bytes: number) {
    if (!Number.isSafeInteger(bytes) || bytes < 0) throw new RangeError(`the memlimit must be bytes or 0, got ${bytes}`)
    if (bytes > 0 && this.#backing === undefined)
      throw new RangeError(`${this.name}: a memlimit needs a backing store, where the rest can go`)
    this.#tiers.memory.limit = bytes === 0 ? Number.POSITIVE_INFINITY : bytes
  }

  /** Pages that `writeback` may still write (writeback_limit); `undefined`: any number (writeback_limit_enable off). */
  get writebackLimit(): number | undefined {
    return this.#writebackLimit
  }

  set writebackLimit(pages: number | undefined) {
    if (pages !== undefined && !(Number.isSafeInteger(pages) && pages >= 0))
      throw new RangeError(`the writeback limit must be a number of pages, got ${pages}`)
    this.#writebackLimit = pages
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
        this.#reads++
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

  /** Done at once: nothing of a device in memory survives its process, and no write is kept back. */
  flush(): Completion {
    return this.#guarded(() => undefined)
  }

  map(at: number, length: number, report: (length: number, allocated: boolean) => boolean): void {
    this.#assertRange(at, length)
    const end = at + length
    for (let from = at; from < end; ) {
      const allocated = this.#hasBytes(Math.floor(from / pageBytes))
      let to = from
      do to = Math.min(end, (Math.floor(to / pageBytes) + 1) * pageBytes)
      while (to < end && this.#hasBytes(to / pageBytes) === allocated)
      if (!report(to - from, allocated)) return
      from = to
    }
  }

  /**
   * Changes the size while the device is in use, up to `maxSizeBytes`. What lies beyond a smaller end is gone.
   * Throws `RangeError` for a size that cannot be, and `TmemError` (`TMEM_NO_MEMORY`) when the stores have no room for it.
   */
  resize(sizeBytes: number): void {
    assertSize('the size', sizeBytes)
    if (sizeBytes > this.maxSizeBytes)
      throw new RangeError(`${this.name} was made for at most ${this.maxSizeBytes} bytes, not ${sizeBytes}`)
    if (sizeBytes > this.#tiers.roomBytes)
      throw new TmemError(
        'TMEM_NO_MEMORY',
        `${this.name} cannot grow to ${sizeBytes} bytes: its stores are sure to have room for ${this.#tiers.roomBytes}`,
        { layer: this.name },
      )
    const slots = sizeBytes / pageBytes
    for (let slot = slots; slot < this.#slots; slot++) {
      if (this.#placeOf(slot) !== EMPTY) this.#cutOff++
      this.#settle(slot, EMPTY, 0)
    }
    this.#places[EMPTY]! += slots - this.#slots
    this.#slots = slots
  }

  /**
   * Marks pages as idle, until their next access: all of them, or those not accessed for so many seconds (needs `clock`).
   * Returns how many are marked now.
   */
  idle(age: 'all' | number): number {
    const clock = this.#clock
    if (age !== 'all' && clock === undefined)
      throw new TmemError('TMEM_UNSUPPORTED', `${this.name} has no clock, so it knows no ages: give it one`, {
        layer: this.name,
      })
    const before = age === 'all' ? Number.POSITIVE_INFINITY : clock!() - age
    let marked = 0
    for (let slot = 0; slot < this.#slots; slot++) {
      const state = this.#states[slot]!
      const place = state & placeMask
      if (place === EMPTY || place === LOST) continue
      if (age === 'all' || this.#touched[slot]! <= before) this.#states[slot] = state | IDLE_FLAG
      if ((this.#states[slot]! & IDLE_FLAG) !== 0) marked++
    }
    return marked
  }

  /**
   * Moves pages of a kind (or one page) from memory to the backing store, within `writebackLimit`. Resolves to how many were
   * moved. Rejects with `TMEM_UNSUPPORTED` without a backing store, with `TMEM_IO` when it refuses: the pages stay where they were.
   */
  async writeback(request: WritebackRequest, maxPages: number = Number.POSITIVE_INFINITY): Promise<number> {
    const backing = this.#backing
    if (backing === undefined) throw this.#unsupported('writeback needs a backing store')
    const one = typeof request === 'object' ? request.pageIndex : undefined
    if (one !== undefined && !(Number.isInteger(one) && one >= 0 && one < this.#slots))
      throw new RangeError(`${this.name} has no page ${one}`)
    const matches = (slot: number, state: number): boolean =>
      isOwn(state) && (typeof request === 'object' || isKind(state, request)) && this.#writebackLimit !== 0
    return this.#walk(
      maxPages,
      matches,
      (slot, page) => {
        const outcome = this.#put(backing, slot, this.#states[slot]! & OTHER, page)
        if (outcome !== PutOutcome.Stored)
          throw this.#refusal('write back', slot, 'the backing store refused it', outcome, backing)
        this.#moved(slot, BACKING, this.#states[slot]! & HUGE_FLAG, 0)
        // It may have been lowered while the page was read.
        if (this.#writebackLimit !== undefined && this.#writebackLimit > 0) this.#writebackLimit--
        this.#writtenBack++
        return true
      },
      one,
    )
  }

  /**
   * Compresses pages in memory again with the stronger codec of the `recompressed` stack. A page is moved only when it takes less
   * there, else it is marked incompressible. Resolves to how many were moved.
   */
  async recompress(request: RecompressRequest = {}): Promise<number> {
    const tier = this.#tiers.byName.recompressed
    if (tier === undefined) throw this.#unsupported('recompress needs a stack for recompressed pages')
    const { type, thresholdBytes = 0, maxPages = Number.POSITIVE_INFINITY } = request
    let left = maxPages
    const matches = (slot: number, state: number): boolean =>
      left > 0 &&
      isOwn(state) &&
      (state & placeMask) !== RECOMPRESSED &&
      (state & INCOMPRESSIBLE_FLAG) === 0 &&
      (type === undefined || isKind(state, type)) &&
      this.#sizes[slot]! >= thresholdBytes
    return this.#walk(Number.POSITIVE_INFINITY, matches, (slot, page) => {
      left--
      const state = this.#states[slot]!
      const before = tier.meter.bytes
      const outcome = this.#put(tier, slot, state & OTHER, page)
      const bytes = tier.meter.bytes - before
      if (outcome === PutOutcome.Stored && bytes < this.#sizes[slot]!) {
        this.#moved(slot, RECOMPRESSED, state & HUGE_FLAG, bytes)
        this.#recompressed++
        return true
      }
      if (outcome === PutOutcome.Stored) tier.pool.flushPage(object, handleOf(slot, state & OTHER))
      // No room now says nothing about the page.
      if (outcome !== PutOutcome.Stored && outcome !== PutOutcome.Incompressible) return false
      this.#states[slot] = state | INCOMPRESSIBLE_FLAG
      this.#recompressPoor++
      return false
    })
  }

  /**
   * The hypervisor wants memory back: up to `maxPages` pages come from there into the device's own tiers. Resolves to how many
   * did; fewer when nothing here would take them, and those stay there.
   */
  async recall(maxPages: number = Number.POSITIVE_INFINITY): Promise<number> {
    const own = this.#tiers.all.filter(({ name }) => name !== 'hypervisor' && name !== 'recompressed')
    let full = false
    const matches = (_slot: number, state: number): boolean => (state & placeMask) === HYPERVISOR && !full
    return this.#walk(maxPages, matches, (slot, page) => {
      this.#huge = 0
      for (const tier of own) {
        const before = tier.meter.bytes
        if (this.#put(tier, slot, this.#states[slot]! & OTHER, page) !== PutOutcome.Stored) continue
        this.#moved(slot, placeOf(tier.name), this.#huge, tier.meter.bytes - before)
        this.#recalled++
        return true
      }
      this.#recallFailed++
      full = true
      return false
    })
  }

  /** Gives up all pages, and begins to count anew: what the device was when it was made (RESET), with the settings that it has now. */
  reset(): void {
    for (let slot = 0; slot < this.#slots; slot++) if (this.#placeOf(slot) !== EMPTY) this.#settle(slot, EMPTY, 0)
    this.#reads = this.#writes = this.#failedReads = this.#failedWrites = this.#invalid = this.#notifyFree = 0
    this.#backingReads = this.#backingWrites = this.#hugeSince = this.#compacted = 0
    this.#stored = this.#overwritten = this.#freed = this.#cutOff = 0
    this.#writtenBack = this.#recalled = this.#recallFailed = this.#recompressed = this.#recompressPoor = 0
    this.#refused.fill(0)
    this.#tiers.memory.most = this.#tiers.memory.bytes
    this.forgetMostUsed()
  }

  /** The largest amount of memory in use (mem_used_max) is that of now; writing 0 to it, with zram. */
  forgetMostUsed(): void {
    this.#mostUsed = 0
    this.#used()
  }

  /** Lets the stores do background work (compact, with zram). */
  tick(budget: Budget): Progress {
    let pages = 0
    let pending = false
    for (const { name, store } of this.#tiers.all) {
      const progress = store.tick({ pages: budget.pages - pages })
      pages += progress.pages
      if (name !== 'hypervisor' && name !== 'backing') this.#compacted += progress.pages
      pending ||= progress.pending
    }
    this.#used()
    return { pages, pending }
  }

  /** Flags of a slot as zram's block_state shows them: s same, w written back, h huge, i idle, r recompressed, n incompressible. */
  blockState(slot: number): string {
    const state = this.#states[slot] ?? 0
    const place = state & placeMask
    return [
      place === SAME && 's',
      place === BACKING && 'w',
      (state & HUGE_FLAG) !== 0 && 'h',
      (state & IDLE_FLAG) !== 0 && 'i',
      place === RECOMPRESSED && 'r',
      (state & INCOMPRESSIBLE_FLAG) !== 0 && 'n',
    ]
      .filter(Boolean)
      .join('')
  }

  /** The statistics of GET_STATS. */
  ramzswapStats(): RamzswapStats {
    const stored = this.#ownPages()
    const percent = (pages: number): number => (stored === 0 ? 0 : Math.floor((pages * 100) / stored))
    return {
      memlimit: this.memlimitBytes,
      disksize: this.sizeBytes,
      num_reads: this.#reads,
      num_writes: this.#writes,
      failed_reads: this.#failedReads,
      failed_writes: this.#failedWrites,
      invalid_io: this.#invalid,
      notify_free: this.#notifyFree,
      pages_zero: this.#places[SAME]!,
      good_compress_pct: percent(this.#good),
      pages_expand_pct: percent(this.#places[UNCOMPRESSED]!),
      pages_stored: stored,
      pages_used: Math.ceil(this.#used() / pageBytes),
      orig_data_size: stored * pageBytes,
      compr_data_size: this.#tiers.memory.bytes,
      mem_used_total: this.#used(),
      bdev_num_reads: this.#backingReads,
      bdev_num_writes: this.#backingWrites,
    }
  }

  stats(): StatsNode {
    const places = this.#places
    const { memory } = this.#tiers
    const section = (name: string, counters: Record<string, number>): StatsNode => ({ name, counters, children: [] })
    const all = this.ramzswapStats()
    const refused: Record<string, number> = {}
    for (const [n, name] of tierNames.entries())
      if (this.#tiers.byName[name] !== undefined) refused[name] = this.#refused[n]!
    return {
      name: this.name,
      counters: { ...all },
      children: [
        section('mm_stat', {
          orig_data_size: all.orig_data_size,
          compr_data_size: all.compr_data_size,
          mem_used_total: all.mem_used_total,
          mem_limit: all.memlimit,
          mem_used_max: this.#mostUsed,
          same_pages: all.pages_zero,
          pages_compacted: this.#compacted,
          huge_pages: this.#hugeNow,
          huge_pages_since: this.#hugeSince,
        }),
        section('io_stat', {
          failed_reads: all.failed_reads,
          failed_writes: all.failed_writes,
          invalid_io: all.invalid_io,
          notify_free: all.notify_free,
        }),
        section('bd_stat', {
          bd_count: places[BACKING]!,
          bd_reads: this.#backingReads,
          bd_writes: this.#backingWrites,
          writeback_limit_enable: this.#writebackLimit === undefined ? 0 : 1,
          writeback_limit: this.#writebackLimit ?? 0,
        }),
        section('slots', {
          slots: this.#slots,
          empty: places[EMPTY]!,
          same_filled: places[SAME]!,
          hypervisor: places[HYPERVISOR]!,
          compressed: places[HYPERVISOR + 1]!,
          recompressed: places[RECOMPRESSED]!,
          uncompressed: places[UNCOMPRESSED]!,
          backing: places[BACKING]!,
          lost: places[LOST]!,
          stored: this.#stored,
          overwritten: this.#overwritten,
          freed: this.#freed,
          cut_off: this.#cutOff,
          written_back: this.#writtenBack,
          recalled: this.#recalled,
          recall_failed: this.#recallFailed,
          recompressed_total: this.#recompressed,
          recompress_poor: this.#recompressPoor,
          compr_data_max: memory.most,
        }),
        section('refused', refused),
        ...this.#tiers.all.map(({ name, store }) => ({ name, counters: {}, children: [store.stats()] })),
      ],
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    // Who waits for a page finds the device closed.
    for (const resolve of this.#waiting.splice(0)) resolve(this.#scratch)
    const results = await Promise.allSettled(this.#tiers.all.map(({ store }) => store.close()))
    for (const result of results) if (result.status === 'rejected') throw result.reason
  }

  /** Throws `RangeError`, and counts it, for what is no range of this device. */
  #assertRange(at: number, length: number): void {
    try {
      assertBlockRange(this, at, length)
    } catch (error) {
      this.#invalid++
      throw error
    }
  }

  /** What the outside world does wrong is always a rejection. */
  #guarded(run: () => Completion): Completion {
    if (this.#closing !== undefined) return Promise.reject(this.#closedError())
    try {
      return run()
    } catch (error) {
      return Promise.reject(error as Error)
    }
  }

  #write(at: number, bytes: Uint8Array): Completion {
    let later: Job[] | undefined
    let failure: TmemError | undefined
    const batch = this.#batch
    batch.clear()
    for (let done = 0; done < bytes.length; ) {
      const slot = Math.floor((at + done) / pageBytes)
      const from = (at + done) % pageBytes
      const length = Math.min(pageBytes - from, bytes.length - done)
      const source = length === bytes.length ? bytes : bytes.subarray(done, done + length)
      if (length === pageBytes) {
        this.#writes++
        if (!this.#take(slot, source)) {
          if (this.#backing === undefined) failure = this.#lastResort(slot, source) ?? failure
          else {
            if (batch.length === 0) batch.bytes = bytes
            const entry = batch.push(object, handleOf(slot, this.#otherOf(slot)), done)
            batch.scratch[entry] = slot
            this.#batchHuge[entry] = this.#huge
            if (batch.length === spillPages) failure = this.#spill() ?? failure
          }
        }
      } else {
        const { pending, error } = this.#modify(slot, from, source)
        if (pending !== undefined) later = queued(later, () => pending)
        failure = error ?? failure
      }
      done += length
    }
    failure = this.#spill() ?? failure
    if (later === undefined) return failure === undefined ? undefined : Promise.reject(failure)
    return inTurn(later).then(() => {
      if (failure !== undefined) throw failure
    })
  }

  /** Gives a whole page a place in memory (or with the hypervisor); false when nobody there takes it. */
  #take(slot: number, page: Uint8Array): boolean {
    if (isSame(page)) {
      this.#words[slot * 2] = wordAt(page, 0)
      this.#words[slot * 2 + 1] = wordAt(page, 4)
      this.#written(slot, SAME, 0, 0)
      return true
    }
    const other = this.#otherOf(slot)
    this.#huge = 0
    for (const tier of this.#memoryTiers) {
      const before = tier.meter.bytes
      if (this.#put(tier, slot, other, page) !== PutOutcome.Stored) continue
      this.#written(slot, placeOf(tier.name) | other, this.#huge, tier.meter.bytes - before)
      return true
    }
    return false
  }

  /** Writes the gathered pages to the backing store. Answers the error of the last that failed. */
  #spill(): TmemError | undefined {
    const batch = this.#batch
    if (batch.length === 0) return undefined
    let failure: TmemError | undefined
    const backing = this.#backing!
    if (batch.length === 1) {
      this.#huge = this.#batchHuge[0]!
      failure = this.#lastResort(batch.scratch[0]!, batch.page(0))
    } else {
      this.#backingWrites += backing.pool.putMany(batch)
      for (let n = 0; n < batch.length; n++) {
        const slot = batch.scratch[n]!
        if (batch.outcomes[n] === PutOutcome.Stored)
          this.#written(slot, BACKING | this.#otherOf(slot), this.#batchHuge[n]!, 0)
      }
      for (let n = 0; n < batch.length; n++) {
        const outcome = batch.outcomes[n] as PutOutcome
        if (outcome === PutOutcome.Stored) continue
        this.#refused[BACKING - TIER]!++
        this.#huge = this.#batchHuge[n]!
        failure = this.#settleRefused(batch.scratch[n]!, batch.page(n), outcome) ?? failure
      }
    }
    batch.clear()
    // The caller's buffer is not kept.
    batch.bytes = this.#scratch
    return failure
  }

  /** The tier that every page ends in, alone. */
  #lastResort(slot: number, page: Uint8Array): TmemError | undefined {
    // Without a backing store the last tier has refused it just now.
    if (this.#backing === undefined) return this.#settleRefused(slot, page, this.#reason)
    const outcome = this.#put(this.#backing, slot, this.#otherOf(slot), page)
    if (outcome !== PutOutcome.Stored) return this.#settleRefused(slot, page, outcome)
    this.#written(slot, BACKING | this.#otherOf(slot), this.#huge, 0)
    return undefined
  }

  /**
   * Nobody took a page. Where that was for want of room it is offered again, because other pages of the same write may have given up
   * theirs meanwhile. There is room for as many pages as there are slots: so it can be wanting only when the slot's own old
   * page takes it. Then that one is given up first, and the slot's page is lost if something fails just now. Where something failed
   * before, the old page stays.
   */
  #settleRefused(slot: number, page: Uint8Array, outcome: PutOutcome): TmemError | undefined {
    let reason = outcome
    if (outcome === PutOutcome.NoMemory || outcome === PutOutcome.Quota) {
      const other = this.#otherOf(slot)
      if (this.#placeOf(slot) === placeOf(this.#last.name)) {
        this.#overwritten++
        this.#stored++
        this.#settle(slot, LOST, 0)
      }
      for (const tier of this.#backing === undefined ? this.#memoryTiers : [...this.#memoryTiers, this.#backing]) {
        const before = tier.meter.bytes
        reason = this.#put(tier, slot, other, page)
        if (reason !== PutOutcome.Stored) continue
        const bytes = tier.meter.bytes - before
        if (this.#placeOf(slot) === LOST) this.#settle(slot, placeOf(tier.name) | other | this.#huge, bytes)
        else this.#written(slot, placeOf(tier.name) | other, this.#huge, bytes)
        return undefined
      }
    }
    this.#failedWrites++
    return this.#refusal('write', slot, 'its stores refused the page', reason, this.#last)
  }

  /** Changes a part of a page. */
  #modify(slot: number, from: number, part: Uint8Array): { pending?: Promise<void>; error?: TmemError } {
    const page = this.#scratch
    try {
      if (!this.#load(slot, page)) return { pending: this.#modifyLater(slot, from, part) }
    } catch (error) {
      if (!(error instanceof TmemError)) throw error
      this.#failedWrites++
      return { error }
    }
    page.set(part, from)
    return this.#rewrite(slot, page)
  }

  #rewrite(slot: number, page: Uint8Array): { error?: TmemError } {
    this.#writes++
    if (this.#take(slot, page)) return {}
    const error = this.#lastResort(slot, page)
    return error === undefined ? {} : { error }
  }

  async #modifyLater(slot: number, from: number, part: Uint8Array): Promise<void> {
    await this.#borrow(async (page) => {
      let error: TmemError | undefined
      await this.#fetch(slot, page, () => {
        page.set(part, from)
        error = this.#rewrite(slot, page).error
      })
      if (error !== undefined) throw error
    })
  }

  /** Frees the whole pages of a range and zeroes the rest. */
  #clear(at: number, length: number, discarded: boolean): Completion {
    let later: Job[] | undefined
    let failure: TmemError | undefined
    for (let done = 0; done < length; ) {
      const slot = Math.floor((at + done) / pageBytes)
      const from = (at + done) % pageBytes
      const part = Math.min(pageBytes - from, length - done)
      const place = this.#placeOf(slot)
      if (part === pageBytes) {
        if (place !== EMPTY) {
          this.#freed++
          if (discarded) this.#notifyFree++
          this.#settle(slot, EMPTY, 0)
        }
      } else if (place !== EMPTY) {
        const { pending, error } = this.#modify(slot, from, this.#zeros.subarray(0, part))
        if (pending !== undefined) later = queued(later, () => pending)
        failure = error ?? failure
      }
      done += part
    }
    if (later === undefined) return failure === undefined ? undefined : Promise.reject(failure)
    return inTurn(later).then(() => {
      if (failure !== undefined) throw failure
    })
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

  /** Fills a page; false when its tier has to wait. Throws when it is known to be there and cannot be had. */
  #load(slot: number, into: Uint8Array): boolean {
    const state = this.#states[slot]!
    const place = state & placeMask
    if (place === EMPTY) {
      into.fill(0)
      return true
    }
    this.#touch(slot, state)
    if (place === SAME) {
      fillSame(into, this.#words[slot * 2]!, this.#words[slot * 2 + 1]!)
      return true
    }
    if (place === LOST) {
      this.#failedReads++
      throw this.#ioError('read', slot, 'its page was lost when a write failed; overwrite or discard it')
    }
    try {
      const outcome = this.#tierAt(place).pool.get(object, handleOf(slot, state & OTHER), into)
      if (outcome === GetOutcome.Deferred) return false
      if (outcome === GetOutcome.Miss)
        throw this.#ioError('read', slot, `the ${this.#tierAt(place).name} store has lost its page`)
    } catch (error) {
      this.#failedReads++
      throw error
    }
    if (place === BACKING) this.#backingReads++
    return true
  }

  /**
   * Fills a page, waiting for its tier, with what the slot held at some time during the call. `use` runs while it still holds
   * that: whoever awaits this may run after another change.
   */
  async #fetch(slot: number, into: Uint8Array, use?: () => void): Promise<void> {
    for (;;) {
      if (this.#closing !== undefined) throw this.#closedError()
      if (slot >= this.#slots) throw this.#ioError('read', slot, 'the device has become smaller')
      if (this.#load(slot, into)) {
        use?.()
        return
      }
      const state = this.#states[slot]!
      const stamp = this.#stamps[slot]!
      const place = state & placeMask
      if (place === BACKING) this.#backingReads++
      try {
        const outcome = await this.#tierAt(place).pool.fetch(object, handleOf(slot, state & OTHER), into)
        if (this.#stamps[slot] !== stamp) continue
        if (outcome !== GetOutcome.Hit)
          throw this.#ioError('read', slot, `the ${this.#tierAt(place).name} store has lost its page`)
      } catch (error) {
        if (this.#closing !== undefined) throw this.#closedError()
        // The page was overwritten, moved or discarded while it was read: nobody wants the old one any more.
        if (this.#stamps[slot] !== stamp) continue
        this.#failedReads++
        throw error
      }
      use?.()
      return
    }
  }

  /** Lends a page until `use` has settled. */
  async #borrow(use: (page: Uint8Array) => Promise<void>): Promise<void> {
    const page = this.#free.pop() ?? (await new Promise<Uint8Array>((resolve) => this.#waiting.push(resolve)))
    if (this.#closing !== undefined) throw this.#closedError()
    try {
      await use(page)
    } finally {
      const next = this.#waiting.shift()
      if (next === undefined) this.#free.push(page)
      else next(page)
    }
  }

  /**
   * Calls `move` with the pages that match, in the order of their slots (or with the one of slot `only`), and lets requests have their
   * turn in between; how many it moved.
   */
  async #walk(
    maxPages: number,
    matches: (slot: number, state: number) => boolean,
    move: (slot: number, page: Uint8Array) => boolean,
    only?: number,
  ): Promise<number> {
    if (this.#closing !== undefined) throw this.#closedError()
    let moved = 0
    let tried = 0
    await this.#borrow(async (page) => {
      for (let slot = only ?? 0; slot < (only === undefined ? this.#slots : only + 1) && moved < maxPages; slot++) {
        const state = this.#states[slot]!
        if (!matches(slot, state)) continue
        const stamp = this.#stamps[slot]!
        const tier = this.#tierAt(state & placeMask)
        const handle = handleOf(slot, state & OTHER)
        let outcome = tier.pool.get(object, handle, page)
        if (outcome === GetOutcome.Deferred) outcome = await tier.pool.fetch(object, handle, page)
        if (this.#closing !== undefined) throw this.#closedError()
        if (this.#stamps[slot] !== stamp) continue
        if (outcome !== GetOutcome.Hit) throw this.#ioError('move', slot, `the ${tier.name} store has lost its page`)
        if (move(slot, page)) moved++
        if (++tried % turnPages !== 0) continue
        await new Promise((resolve) => setImmediate(resolve))
        if (this.#closing !== undefined) throw this.#closedError()
      }
    })
    return moved
  }

  /** Puts a page into a tier and counts. */
  #put(tier: Tier, slot: number, other: number, page: Uint8Array): PutOutcome {
    const outcome = tier.pool.put(object, handleOf(slot, other), page)
    if (outcome === PutOutcome.Stored) {
      if (tier === this.#backing) this.#backingWrites++
      return outcome
    }
    this.#refused[placeOf(tier.name) - TIER]!++
    if (outcome === PutOutcome.Incompressible) this.#huge = HUGE_FLAG
    this.#reason = outcome
    return outcome
  }

  /** A page was written whole: its slot's old one is given up. */
  #written(slot: number, place: number, flags: number, bytes: number): void {
    this.#stored++
    if (this.#placeOf(slot) !== EMPTY) this.#overwritten++
    if (flags !== 0) this.#hugeSince++
    this.#settle(slot, place | flags, bytes)
    if (this.#clock !== undefined) this.#touched[slot] = this.#clock()
  }

  /** A page is in another tier now, under the same handle. */
  #moved(slot: number, place: number, flags: number, bytes: number): void {
    this.#settle(slot, place | flags | (this.#states[slot]! & OTHER), bytes)
  }

  /** Gives a slot's page up and enters its new state. The only place where a slot changes. */
  #settle(slot: number, state: number, bytes: number): void {
    const old = this.#states[slot]!
    const from = old & placeMask
    const to = state & placeMask
    if (from >= TIER && from !== LOST) this.#tierAt(from).pool.flushPage(object, handleOf(slot, old & OTHER))
    this.#places[from]!--
    this.#places[to]!++
    if ((old & HUGE_FLAG) !== 0 && isOwn(old)) this.#hugeNow--
    if ((state & HUGE_FLAG) !== 0 && isOwn(state)) this.#hugeNow++
    if (isOwn(old) && this.#sizes[slot]! <= goodBytes) this.#good--
    if (isOwn(state) && bytes <= goodBytes) this.#good++
    this.#states[slot] = state
    this.#sizes[slot] = isOwn(state) ? Math.min(bytes, 0xffff) : 0
    this.#stamps[slot]!++
  }

  /** An access ends idleness. */
  #touch(slot: number, state: number): void {
    if ((state & IDLE_FLAG) !== 0) this.#states[slot] = state & ~IDLE_FLAG
    if (this.#clock !== undefined) this.#touched[slot] = this.#clock()
  }

  #placeOf(slot: number): number {
    return this.#states[slot]! & placeMask
  }

  /** The handle of a slot that is not in use. */
  #otherOf(slot: number): number {
    return (this.#states[slot]! & OTHER) ^ OTHER
  }

  #tierAt(place: number): Tier {
    return this.#tiers.byName[tierNames[place - TIER]!]!
  }

  /** Whether a slot has bytes, and not only zeros. */
  #hasBytes(slot: number): boolean {
    const place = this.#placeOf(slot)
    return place >= TIER || (place === SAME && (this.#words[slot * 2]! | this.#words[slot * 2 + 1]!) !== 0)
  }

  /** Pages in the device's own memory, same-filled ones excepted. */
  #ownPages(): number {
    return this.#places[HYPERVISOR + 1]! + this.#places[RECOMPRESSED]! + this.#places[UNCOMPRESSED]!
  }

  /** Bytes of memory that the device's own stores use; the largest that was seen is remembered. */
  #used(): number {
    let bytes = 0
    for (const { name, store } of this.#tiers.all)
      if (name !== 'hypervisor' && name !== 'backing') bytes += usedBytes(store.stats())
    if (bytes > this.#mostUsed) this.#mostUsed = bytes
    return bytes
  }

  #ioError(what: string, slot: number, reason: string, cause?: Error): TmemError {
    return new TmemError('TMEM_IO', `device ${this.name}: cannot ${what} page ${slot}: ${reason}`, {
      layer: this.name,
      handle: `page ${slot}`,
      cause,
    })
  }

  /** For servers, which tell a full device from a broken one by the code of the cause: the system's error, or our own where there is none. */
  #refusal(what: string, slot: number, who: string, outcome: PutOutcome, tier: Tier): TmemError {
    const cause = outcome === PutOutcome.Unavailable ? tier.store.failure : full(outcome)
    const why = cause === undefined ? '' : ` (${cause.message})`
    return this.#ioError(what, slot, `${who}: ${putOutcomeName(outcome)}${why}`, cause)
  }

  #unsupported(reason: string): TmemError {
    return new TmemError('TMEM_UNSUPPORTED', `device ${this.name}: ${reason}`, { layer: this.name })
  }

  #closedError(): TmemError {
    return new TmemError('TMEM_CLOSED', `device ${this.name} is closed`, { layer: this.name })
  }
}

/** The error of a device that is full, if that was the reason. */
function full(outcome: PutOutcome): Error | undefined {
  if (outcome !== PutOutcome.NoMemory && outcome !== PutOutcome.Quota && outcome !== PutOutcome.AllocationFailed)
    return undefined
  return Object.assign(new Error('no store has room'), { code: 'ENOSPC' })
}

/** Index of one of the two handles of a slot. */
const handleOf = (slot: number, other: number): number => slot * 2 + (other === 0 ? 0 : 1)

const placeOf = (name: TierName): number => TIER + tierNames.indexOf(name)

/** Whether a page in this state takes memory of the device's own. */
const isOwn = (state: number): boolean => {
  const place = state & placeMask
  return place > HYPERVISOR && place < BACKING
}

function isKind(state: number, kind: PageKind): boolean {
  switch (kind) {
    case 'huge':
      return (state & HUGE_FLAG) !== 0
    case 'idle':
      return (state & IDLE_FLAG) !== 0
    case 'huge_idle':
      return (state & (HUGE_FLAG | IDLE_FLAG)) === (HUGE_FLAG | IDLE_FLAG)
    case 'incompressible':
      return (state & INCOMPRESSIBLE_FLAG) !== 0
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

/** Whether a page repeats its first eight bytes. */
function isSame(page: Uint8Array): boolean {
  const end = pageBytes - 8
  // Most pages differ at one of these; only what does not is compared as a whole with itself, a word further on.
  for (let i = 0; i < 8; i++) if (page[i] !== page[end + i] || page[i] !== page[pageBytes / 2 + i]) return false
  return Buffer.prototype.compare.call(page, page, 0, end, 8, pageBytes) === 0
}

const wordAt = (bytes: Uint8Array, at: number): number =>
  bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)

function fillSame(page: Uint8Array, low: number, high: number): void {
  if (low === 0 && high === 0) {
    page.fill(0)
    return
  }
  for (let i = 0; i < 4; i++) {
    page[i] = low >>> (8 * i)
    page[4 + i] = high >>> (8 * i)
  }
  for (let done = 8; done < pageBytes; done *= 2) page.copyWithin(done, 0, done)
}
