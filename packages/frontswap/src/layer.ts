/**
 * The end of a stack: swap areas, with frontswap in front of them if the caller wants it.
 *
 * Each page that is put gets a slot. It is offered to the frontswap backend, when there is one; what the backend refuses, or
 * all pages when there is none, are written to the slot before the put returns. This is the regular way: it refuses only when
 * its slots are used up or the device fails. A page on disk is `Deferred` to a get; `fetch` reads it.
 *
 * Invariants:
 *  - A handle is in the table exactly while its page is in its slot or in the backend; in between (staged in a
 *    batch) nothing else runs.
 *  - A refused put leaves neither the handle nor the slot behind.
 *  - A fetch delivers what the handle held at some time during the call, never the bytes of another page: the slot's stamp
 *    tells whether it changed hands while it was read, and then the handle is looked up again.
 *
 * Source: the swap-out and swap-in paths of mm/page_io.c and mm/swapfile.c as described in the reference notes.
 */
import {
  assertBatch,
  assertEntries,
  assertIndex,
  assertObject,
  assertPage,
  type Borrower,
  type Budget,
  type Capabilities,
  checkedAttributes,
  compose,
  GetOutcome,
  HandleTable,
  idle,
  type Layer,
  type LayerContext,
  type LayerFactory,
  maxEntries,
  maxPageSize,
  none,
  type ObjectId,
  type OptionValue,
  PageBatch,
  type PageStore,
  Pending,
  type Pool,
  type PoolAttributes,
  PoolRefusal,
  type Progress,
  PutOutcome,
  planStack,
  type StatsNode,
  TmemError,
} from '@tmem/core'
import { slotBytes } from './block-file.ts'
import {
  Frontswap,
  lost,
  maxTypes,
  noEntry,
  slotsOf,
  swapIndex,
  swapObject,
  swapOffset,
  swapType,
} from './frontswap.ts'
import { checkSize, gatherSlots, SwapArea, type SwapAreaOptions } from './swap-area.ts'

/** Pools that one store can have at once. */
const maxPools = 256
/** Pages that are offered to the backend in one batch. */
const offeredPages = 64

/** A frontswap layer over several areas. */
export interface FrontswapAreasOptions {
  /** The areas: 1 to 32, of at most 64 GiB of pages together. */
  readonly areas: readonly SwapAreaOptions[]
  /** The stack in front of the areas: its first layer is offered each page first. Default: none. */
  readonly front?: readonly Layer[]
  /** True: pages that the backend takes are written to disk as well, so that it may lose them. Default false. */
  readonly writethrough?: boolean
}

/** A frontswap layer over one area. */
export interface FrontswapFileOptions extends SwapAreaOptions, Omit<FrontswapAreasOptions, 'areas'> {}

/** The end of a stack: every page finds a place in the swap file. */
export function frontswap(options: FrontswapFileOptions | FrontswapAreasOptions): Layer {
  const areas = 'areas' in options ? options.areas : [options]
  const front = options.front ?? []
  if (areas.length < 1 || areas.length > maxTypes) throw new RangeError(`frontswap takes 1 to ${maxTypes} areas`)
  let sizeBytes = 0
  for (const area of areas) {
    checkSize(area.sizeBytes)
    sizeBytes += area.sizeBytes
  }
  if (sizeBytes / slotBytes > maxEntries)
    throw new RangeError(`a frontswap layer holds at most ${maxEntries * slotBytes} bytes of pages, got ${sizeBytes}`)
  let largest = slotBytes
  while (largest * 2 <= Math.min(maxPageSize, sizeBytes)) largest *= 2
  const capabilities: Capabilities = Object.freeze({
    ephemeral: false,
    persistent: true,
    shared: false,
    minPageSize: slotBytes,
    maxPageSize: largest,
    deferred: true,
    split: false,
    reservedBytes: sizeBytes,
  })
  return Object.freeze({
    name: 'frontswap',
    plan: (below: Capabilities | undefined): Capabilities | string => {
      if (below !== undefined)
        return 'it is the end of a stack: what it takes goes to its own file, and nothing further'
      return frontTrouble(front) ?? capabilities
    },
    open: (_next: PageStore | undefined, context: LayerContext): PageStore =>
      new FrontswapStore(areas, front, options.writethrough ?? false, capabilities, context),
  })
}

/** Why a stack cannot be in front of the areas, if it cannot. */
function frontTrouble(front: readonly Layer[]): string | undefined {
  if (front.length === 0) return undefined
  try {
    return planStack(front).persistent ? undefined : 'the stack in front of it does not keep persistent pages'
  } catch (error) {
    if (error instanceof TmemError) return `the stack in front of it cannot be built: ${error.message}`
    throw error
  }
}

/** `frontswap(file=/tmp/swap.img,size=1GiB)` in the text of a stack. */
export const frontswapFactory: LayerFactory = Object.freeze({
  name: 'frontswap',
  summary: 'the end of a stack: pages go to a swap file',
  options: Object.freeze({
    file: { kind: 'text', summary: 'path of the swap file or block device', required: true },
    size: { kind: 'bytes', summary: 'bytes of pages that it holds', required: true, minimum: slotBytes },
    existing: { kind: 'flag', summary: 'use a file or device made with mkswap (default: make the file)' },
    keep: { kind: 'flag', summary: 'leave the file in place at the end' },
    blockingReads: {
      kind: 'flag',
      summary: 'read in the calling thread, which waits (default: in the pool of threads)',
    },
  } as const),
  create: (options: Readonly<Record<string, OptionValue>>): Layer => {
    const { file, size, existing, keep, blockingReads } = options
    return frontswap({
      file: String(file),
      // A size need not be a whole number of pages in the text.
      sizeBytes: Math.floor(Number(size) / slotBytes) * slotBytes,
      existing: existing === true,
      keep: keep === true,
      blockingReads: blockingReads === true,
    })
  },
})

class FrontswapStore implements PageStore {
  readonly name = 'frontswap'
  readonly capabilities: Capabilities
  readonly table: HandleTable
  readonly swap: Frontswap
  readonly areas: readonly SwapArea[]
  /** By entry of the table: its swap entry; and 1 while it is staged in a batch, before its page was written. */
  readonly swapEntries: Uint32Array
  readonly staged: Uint8Array
  failure: Error | undefined
  readonly #backend: PageStore | undefined
  readonly #pools: (FrontswapPool | undefined)[] = []
  readonly #reservedBytes: number
  #closing: Promise<void> | undefined

  constructor(
    options: readonly SwapAreaOptions[],
    front: readonly Layer[],
    writethrough: boolean,
    capabilities: Capabilities,
    context: LayerContext,
  ) {
    this.capabilities = capabilities
    const { allocator } = context
    const areas: SwapArea[] = []
    this.areas = areas
    const capacity = capabilities.reservedBytes / slotBytes
    try {
      this.swap = new Frontswap({ allocator, writethrough })
      this.table = HandleTable.create({ capacity, allocator, site: 'frontswap', queues: 0, pools: maxPools })
      const memory = allocator.allocate(capacity * 5, 'frontswap.entries')
      if (memory === undefined)
        throw new TmemError('TMEM_NO_MEMORY', `no memory for a table of ${capacity} pages: give a smaller size`, {
          layer: 'frontswap',
        })
      this.swapEntries = new Uint32Array(memory, 0, capacity)
      this.staged = new Uint8Array(memory, capacity * 4, capacity)
      for (const option of options) {
        const area = SwapArea.open(option, allocator)
        areas.push(area)
        this.swap.swapon(area)
      }
      this.#reservedBytes = areas.reduce(
        (sum, area) => sum + area.reservedBytes,
        Math.ceil(capacity * (5 + tableBytes)),
      )
      // Last: a store can only be closed by waiting, and nothing after it may fail.
      this.#backend = front.length === 0 ? undefined : compose(front, context)
      if (this.#backend !== undefined) this.swap.register(this.#backend)
    } catch (error) {
      for (const area of areas) area.dispose()
      throw error
    }
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const kept = checkedAttributes(attributes)
    if (this.#closing !== undefined) return PoolRefusal.Closed
    if (kept.persistent && kept.shared) return PoolRefusal.SharedPersistent
    if (kept.pageSize > this.capabilities.maxPageSize) return PoolRefusal.BadPageSize
    if (!kept.persistent) return PoolRefusal.Unsupported
    let number = 0
    while (this.#pools[number] !== undefined) number++
    if (number === maxPools) return PoolRefusal.NoSlot
    this.swap.addOwner(number, kept)
    const pool = new FrontswapPool(this, number, kept, () => {
      this.#pools[number] = undefined
    })
    this.#pools[number] = pool
    return pool
  }

  tick(budget: Budget): Progress {
    return this.#backend?.tick(budget) ?? idle
  }

  stats(): StatsNode {
    const { swap, areas } = this
    const sum = (of: (area: SwapArea) => number): number => areas.reduce((total, area) => total + of(area), 0)
    const children: StatsNode[] = areas.map((area, number) => ({
      name: `area${number}`,
      counters: {
        priority: area.priority,
        slots: area.slots - 1,
        used_slots: area.usedSlots,
        bad_slots: area.badSlots,
        frontswap_pages: swap.pagesOf(number),
        directIo: area.directIo ? 1 : 0,
        ...area.counters,
      },
      children: [],
    }))
    if (this.#backend !== undefined) children.push(this.#backend.stats())
    return {
      name: this.name,
      counters: {
        ...swap.counters,
        curr_pages: swap.currPages,
        pages: this.table.size,
        slots: sum((area) => area.slots - 1),
        used_slots: sum((area) => area.usedSlots),
        bad_slots: sum((area) => area.badSlots),
        directIo: areas.every((area) => area.directIo) ? 1 : 0,
        diskReads: sum((area) => area.counters.diskReads),
        diskWrites: sum((area) => area.counters.diskWrites),
        diskBytesRead: sum((area) => area.counters.diskBytesRead),
        diskBytesWritten: sum((area) => area.counters.diskBytesWritten),
        clusteredWrites: sum((area) => area.counters.clusteredWrites),
        readErrors: sum((area) => area.counters.readErrors),
        writeErrors: sum((area) => area.counters.writeErrors),
        corruptSlots: sum((area) => area.counters.corruptSlots),
        staleReads: sum((area) => area.counters.staleReads),
        reserved_bytes: this.#reservedBytes,
      },
      children,
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    for (const pool of this.#pools) pool?.destroy()
    const results = await Promise.allSettled([this.#backend?.close(), ...this.areas.map((area) => area.close())])
    for (const result of results) if (result.status === 'rejected') throw result.reason
  }
}

const tableBytes: number = HandleTable.bytesPerEntry + HandleTable.bytesPerObject

class FrontswapPool implements Pool {
  readonly attributes: PoolAttributes
  readonly #store: FrontswapStore
  readonly #number: number
  readonly #release: () => void
  /** Slots of one page. */
  readonly #slots: number
  #frozen = false
  #gone = false
  /** What a batch has staged: entries of the table, their swap entries, and their places in the batch. */
  readonly #stagedEntries: Int32Array
  readonly #stagedSwapped: Uint32Array
  readonly #stagedAt: Uint32Array
  #staged = 0
  /** By type: slots gathered so far. */
  readonly #gathered: Uint32Array = new Uint32Array(maxTypes)
  readonly #offer: PageBatch | undefined

  constructor(store: FrontswapStore, number: number, attributes: PoolAttributes, release: () => void) {
    this.attributes = attributes
    this.#store = store
    this.#number = number
    this.#release = release
    this.#slots = slotsOf(attributes.pageSize)
    const front = store.swap.poolOf(number)
    const capacity = front === undefined ? gatherSlots / this.#slots : Math.min(offeredPages, gatherSlots / this.#slots)
    this.#stagedEntries = new Int32Array(capacity)
    this.#stagedSwapped = new Uint32Array(capacity)
    this.#stagedAt = new Uint32Array(capacity)
    this.#offer = front && new PageBatch(capacity, attributes.pageSize, new Uint8Array(0))
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.attributes.pageSize)
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    this.#store.failure = undefined
    if (this.#gone) return PutOutcome.PoolGone
    const { table, swap, swapEntries } = this.#store
    let entry = table.find(this.#number, object, index)
    if (entry === none) {
      if (this.#frozen) return PutOutcome.Frozen
      entry = this.#enter(object, index)
      if (entry === none) return PutOutcome.NoMemory
    }
    const swapped = swapEntries[entry]!
    if (swap.store(swapped, page, this.#number) === PutOutcome.Stored) return PutOutcome.Stored
    const area = this.#area(swapped)
    if (area.write(swapOffset(swapped), page)) return PutOutcome.Stored
    this.#store.failure = area.lastError
    this.#drop(entry)
    return PutOutcome.Unavailable
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.attributes.pageSize)
    assertIndex(index, this.attributes.pageSize)
    const entry = this.#find(object, index)
    if (entry === none) return GetOutcome.Miss
    const outcome = this.#store.swap.load(this.#store.swapEntries[entry]!, into, this.#number)
    return outcome === GetOutcome.Hit ? outcome : GetOutcome.Deferred
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    assertPage(into, this.attributes.pageSize)
    assertIndex(index, this.attributes.pageSize)
    for (;;) {
      const entry = this.#find(object, index)
      if (entry === none) return GetOutcome.Miss
      try {
        if (await this.#read(this.#store.swapEntries[entry]!, into)) return GetOutcome.Hit
      } catch (error) {
        if (!(error instanceof TmemError)) throw error
        throw new TmemError(error.code, error.message, {
          layer: 'frontswap',
          handle: `object ${object} index ${index}`,
          cause: error.cause ?? error,
        })
      }
    }
  }

  flushPage(object: ObjectId, index: number): void {
    assertIndex(index, this.attributes.pageSize)
    const entry = this.#find(object, index)
    if (entry !== none) this.#drop(entry)
  }

  flushObject(object: ObjectId): void {
    assertObject(object)
    if (this.#gone) return
    const { table } = this.#store
    for (
      let entry = table.firstOfObject(this.#number, object);
      entry !== none;
      entry = table.firstOfObject(this.#number, object)
    )
      this.#drop(entry)
  }

  putMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    this.#store.failure = undefined
    const { table, staged, swapEntries } = this.#store
    for (let n = 0; n < batch.length; n++) {
      const outcome = batch.outcomes[n]!
      if (outcome !== Pending && outcome !== PutOutcome.Stored) continue
      if (this.#gone) {
        if (outcome === Pending) batch.outcomes[n] = PutOutcome.PoolGone
        continue
      }
      let entry = table.find(this.#number, batch.objects[n]!, batch.indexes[n]!)
      // The same handle twice in a batch: the first page must be in place before the second replaces it.
      if (entry !== none && staged[entry] === 1) {
        this.#commit(batch)
        entry = table.find(this.#number, batch.objects[n]!, batch.indexes[n]!)
      }
      // A page that is replaced gets a new slot, beside those of the others.
      const replaced = entry !== none
      if (replaced) this.#drop(entry)
      if (outcome === PutOutcome.Stored) continue
      if (this.#frozen && !replaced) {
        batch.outcomes[n] = PutOutcome.Frozen
        continue
      }
      entry = this.#enter(batch.objects[n]!, batch.indexes[n]!)
      if (entry === none) {
        batch.outcomes[n] = PutOutcome.NoMemory
        continue
      }
      staged[entry] = 1
      this.#stagedEntries[this.#staged] = entry
      this.#stagedSwapped[this.#staged] = swapEntries[entry]!
      this.#stagedAt[this.#staged] = n
      if (++this.#staged === this.#stagedEntries.length) this.#commit(batch)
    }
    this.#commit(batch)
    let stored = 0
    for (let n = 0; n < batch.length; n++) if (batch.outcomes[n] === PutOutcome.Stored) stored++
    return stored
  }

  getMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    const { pageSize } = this.attributes
    let hits = 0
    for (let n = 0; n < batch.length; n++) {
      if (batch.outcomes[n] === Pending) {
        const at = batch.offsets[n]!
        batch.outcomes[n] = this.get(batch.objects[n]!, batch.indexes[n]!, batch.bytes.subarray(at, at + pageSize))
      }
      if (batch.outcomes[n] === GetOutcome.Hit) hits++
    }
    return hits
  }

  flushMany(batch: PageBatch): void {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    for (let n = 0; n < batch.length; n++) this.flushPage(batch.objects[n]!, batch.indexes[n]!)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    assertIndex(index, this.attributes.pageSize)
    const entry = this.#find(object, index)
    if (entry === none) return GetOutcome.Miss
    const swapped = this.#store.swapEntries[entry]!
    const { swap } = this.#store
    if (!swap.test(swapped)) return GetOutcome.Deferred
    const outcome = swap.poolOf(this.#number)!.lend(swapObject(swapped), swapIndex(swapped), use)
    return outcome === GetOutcome.Hit ? outcome : GetOutcome.Deferred
  }

  split(): Pool | PoolRefusal {
    return PoolRefusal.Unsupported
  }

  freeze(): void {
    this.#frozen = true
  }

  thaw(): void {
    this.#frozen = false
  }

  destroy(): void {
    if (this.#gone) return
    const { table, swap } = this.#store
    for (let entry = table.firstOfPool(this.#number); entry !== none; entry = table.firstOfPool(this.#number))
      this.#drop(entry)
    this.#gone = true
    swap.removeOwner(this.#number)
    this.#release()
  }

  #area(swapped: number): SwapArea {
    return this.#store.areas[swapType(swapped)]!
  }

  #find(object: ObjectId, index: number): number {
    assertObject(object)
    return this.#gone ? none : this.#store.table.find(this.#number, object, index)
  }

  /** Gives a new handle an entry and its slots; `none` when there is no room. */
  #enter(object: ObjectId, index: number): number {
    const { table, swap, swapEntries } = this.#store
    const swapped = swap.getSwapPage(this.#slots)
    if (swapped === noEntry) return none
    // There are as many entries as slots, and each page has at least one slot.
    const entry = table.acquire()
    if (table.insert(entry, this.#number, object, index)) {
      swapEntries[entry] = swapped
      return entry
    }
    table.release(entry)
    swap.swapFree(swapped, this.#number)
    return none
  }

  #drop(entry: number): void {
    const { table, swap, swapEntries } = this.#store
    table.remove(entry)
    table.release(entry)
    swap.swapFree(swapEntries[entry]!, this.#number)
  }

  /** Offers what is staged to the backend, writes the rest, and settles the outcomes. */
  #commit(batch: PageBatch): void {
    const { swap, staged, areas } = this.#store
    const offer = this.#offer
    const count = this.#staged
    this.#staged = 0
    if (count === 0) return
    if (offer !== undefined) {
      offer.clear()
      offer.bytes = batch.bytes
      for (let n = 0; n < count; n++) {
        const swapped = this.#stagedSwapped[n]!
        offer.push(swapObject(swapped), swapIndex(swapped), batch.offsets[this.#stagedAt[n]!]!)
      }
      swap.storeMany(offer, this.#stagedSwapped, this.#number)
    }
    for (let n = 0; n < count; n++) {
      if (offer !== undefined && offer.outcomes[n] === PutOutcome.Stored) continue
      const swapped = this.#stagedSwapped[n]!
      this.#area(swapped).gather(swapOffset(swapped), batch.offsets[this.#stagedAt[n]!]!)
    }
    for (const area of areas) area.submit(batch.bytes)
    this.#gathered.fill(0)
    for (let n = 0; n < count; n++) {
      const entry = this.#stagedEntries[n]!
      staged[entry] = 0
      const at = this.#stagedAt[n]!
      batch.outcomes[at] = PutOutcome.Stored
      if (offer !== undefined && offer.outcomes[n] === PutOutcome.Stored) continue
      const type = swapType(this.#stagedSwapped[n]!)
      const from = this.#gathered[type]!
      this.#gathered[type] = from + this.#slots
      let failed = false
      for (let slot = from; slot < from + this.#slots; slot++) if (areas[type]!.failed(slot)) failed = true
      if (!failed) continue
      batch.outcomes[at] = PutOutcome.Unavailable
      this.#store.failure = areas[type]!.lastError
      this.#drop(entry)
    }
  }

  /** Reads a page from the backend or from its slot. False when the handle has to be looked up again. */
  async #read(swapped: number, into: Uint8Array): Promise<boolean> {
    const { swap } = this.#store
    const area = this.#area(swapped)
    const slot = swapOffset(swapped)
    if (!swap.test(swapped)) return area.read(slot, into)
    const stamp = area.stamp(slot)
    // Into memory of our own: when the slot changes hands meanwhile, these bytes are another page's.
    const outcome = await area.borrow(into.length, async (page) => {
      const answer = await swap.fetch(swapped, page, this.#number)
      if (area.stamp(slot) !== stamp || answer !== GetOutcome.Hit) return answer
      into.set(page)
      return answer
    })
    if (area.stamp(slot) !== stamp) return false
    if (outcome === GetOutcome.Hit) return true
    if (swap.writethrough) return area.read(slot, into)
    throw lost(swapped)
  }
}
