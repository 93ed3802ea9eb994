/**
 * The device's side of a channel: takes chains out of the queue, does their operations, and writes the results. The
 * entries of a chain are of one pool and cross into the store as one batch.
 *
 * The guest is treated as hostile: it may write to all of the memory at any time. Each descriptor and header is copied
 * once, and the copy is checked; a page is copied before anything reads it twice. A store that `readsOnce` makes that
 * copy itself, from the guest's page. A bad chain (a loop, too long, outside of the memory, of another form) is
 * completed with nothing written. A ring index that jumps stops the device. A channel has its own client and pools, so
 * that it reaches nothing of another guest.
 */
import {
  GetOutcome,
  maxObjectId,
  type ObjectId,
  PageBatch,
  type PageStore,
  Pending,
  type Pool,
  PutOutcome,
  TmemError,
} from '@tmem/core'
import {
  ChannelCommand,
  type ChannelHandle,
  ChannelStatus,
  ChannelViews,
  DescriptorFlag,
  entryBytes,
  headerBytes,
  needsEvent,
  pageBytes,
} from './shape.ts'

/** Pools of a channel at most. */
const maxPools = 16
/** How long one sleep is, in milliseconds, before the state of the channel is looked at again. */
const napMs = 1000

/** Counters of a device. */
export interface DeviceCounters {
  /** Chains done, and those that were wrong. */
  chains: number
  refused: number
  /** Entries done. */
  entries: number
}

export class ChannelDevice {
  readonly counters: DeviceCounters = { chains: 0, refused: 0, entries: 0 }
  readonly #views: ChannelViews
  readonly #store: PageStore
  readonly #client: number
  /** The store takes pages from where the guest writes, and to there. */
  readonly #isInPlace: boolean
  readonly #pools: (Pool | undefined)[] = new Array<undefined>(maxPools).fill(undefined)
  readonly #header: Uint8Array
  readonly #headerView: DataView
  readonly #results: Int32Array
  readonly #resultBytes: Uint8Array
  /** Where the pages of the chain lie that is done now, by entry, and how many there are. */
  readonly #pagesAt: Float64Array
  #pages = 0
  /** The entries that are with the store, with pages of the device's own, and the number of each in the chain. */
  readonly #batch: PageBatch
  readonly #numbers: Uint16Array
  /** The pages of the batch, and by number those of the shared memory, as far as they were met. */
  readonly #ownPages: readonly Buffer[]
  readonly #guestPages: (Buffer | undefined)[] = []
  #headerLength = 0
  #resultsAt = 0
  #resultsLength = 0
  #available = 0
  #used = 0

  /** `client`: whose the pages are, 0 to 65,535. The store stays the caller's. */
  constructor(handle: ChannelHandle, store: PageStore, client: number) {
    this.#views = new ChannelViews(handle)
    this.#store = store
    this.#client = client
    this.#isInPlace = store.capabilities.readsOnce === true && !store.capabilities.deferred
    const { pagesPerChain } = this.#views.shape
    this.#header = new Uint8Array(headerBytes + pagesPerChain * entryBytes)
    this.#headerView = new DataView(this.#header.buffer)
    this.#results = new Int32Array(pagesPerChain)
    this.#resultBytes = new Uint8Array(this.#results.buffer)
    this.#pagesAt = new Float64Array(pagesPerChain)
    this.#batch = new PageBatch(pagesPerChain, pageBytes)
    this.#numbers = new Uint16Array(pagesPerChain)
    const { buffer } = this.#batch.bytes
    this.#ownPages = Array.from({ length: pagesPerChain }, (_, n) => Buffer.from(buffer, n * pageBytes, pageBytes))
  }

  /** Notifications so far: of the device, and of the guest. */
  get kicks(): number {
    return this.#views.kicks
  }

  get interrupts(): number {
    return this.#views.interrupts
  }

  /**
   * Serves until the channel ends, in this thread: it blocks while there is nothing to do, and while the store waits
   * for a disk the thread goes on. Resolves when the guest has closed the channel, or the device has stopped.
   */
  async serve(): Promise<void> {
    const views = this.#views
    while (views.status === ChannelStatus.Running) {
      const seen = views.kickWord
      const done = this.poll()
      if (typeof done !== 'number') await done
      else if (done > 0 || this.#seesChain()) continue
      // To be told of the next chain; what came before that was said is looked for once more.
      views.store(views.availableEvent, this.#available)
      if (views.load(views.availableIdx) !== this.#available) continue
      views.waitForKick(seen, napMs)
    }
  }

  /** Looks for a chain, for a while. */
  #seesChain(): boolean {
    const views = this.#views
    for (let look = 0; look < views.looks / 16; look++)
      if (views.load(views.availableIdx) !== this.#available) return true
    return false
  }

  /** Does all chains that are there: how many. A promise: one has to wait for the store. */
  poll(): number | Promise<number> {
    const views = this.#views
    const { queueSize } = views.shape
    const idx = views.load(views.availableIdx)
    const waiting = (idx - this.#available) & 0xffff
    if (waiting > queueSize) {
      views.end(ChannelStatus.NeedsReset)
      return 0
    }
    if (waiting === 0) return 0
    return this.#doChains(waiting, this.#used)
  }

  #doChains(waiting: number, old: number): number | Promise<number> {
    const { shape, view } = this.#views
    for (let n = 0; n < waiting; n++) {
      const head = view.getUint16(shape.availableAt + 4 + (this.#available & (shape.queueSize - 1)) * 2, true)
      this.#available = (this.#available + 1) & 0xffff
      const done = this.#doChain(head)
      if (typeof done !== 'number')
        return done.then((written) => {
          this.#finish(head, written)
          this.#interrupt(old)
          return this.#doChains(waiting - n - 1, this.#used)
        })
      this.#finish(head, done)
    }
    this.#interrupt(old)
    return waiting
  }

  #finish(head: number, written: number): void {
    const views = this.#views
    const { shape, view } = views
    const at = shape.usedAt + 4 + (this.#used & (shape.queueSize - 1)) * 8
    view.setUint32(at, head, true)
    view.setUint32(at + 4, written, true)
    this.#used = (this.#used + 1) & 0xffff
    views.store(views.usedIdx, this.#used)
    if (written === 0) this.counters.refused++
    else this.counters.chains++
  }

  #interrupt(old: number): void {
    const views = this.#views
    if (old !== this.#used && needsEvent(views.load(views.usedEvent), this.#used, old)) views.interrupt()
  }

  /** Bytes written for a chain; 0: it was refused. */
  #doChain(head: number): number | Promise<number> {
    if (!this.#read(head)) return 0
    const command = this.#headerView.getUint32(0, true)
    const count = this.#headerView.getUint32(4, true)
    if (count < 1 || count > this.#views.shape.pagesPerChain) return 0
    if (this.#headerLength !== headerBytes + count * entryBytes || this.#resultsLength !== count * 4) return 0
    const hasPages = command === ChannelCommand.Put || command === ChannelCommand.Get
    if (this.#pages !== (hasPages ? count : 0)) return 0
    const late = this.#doEntries(command, 0, count)
    if (late === undefined) return this.#answer(count, command)
    return late.then(() => this.#answer(count, command))
  }

  #answer(count: number, command: number): number {
    copy.call(this.#resultBytes, this.#views.bytes, this.#resultsAt, 0, count * 4)
    this.counters.entries += count
    return count * 4 + (command === ChannelCommand.Get ? count * pageBytes : 0)
  }

  /**
   * Reads a chain: header, runs of pages, results, in that order; the pages are all read or all written. False: it is
   * none.
   */
  #read(head: number): boolean {
    const { shape, view, bytes } = this.#views
    this.#pages = 0
    this.#headerLength = 0
    this.#resultsLength = 0
    let descriptor = head
    for (let length = 1; length <= shape.pagesPerChain + 2; length++) {
      if (descriptor >= shape.queueSize) return false
      // Once each: what is judged is what is used.
      const at = descriptor * 16
      const address = view.getUint32(at, true)
      const upper = view.getUint32(at + 4, true)
      const size = view.getUint32(at + 8, true)
      const flags = view.getUint16(at + 12, true)
      descriptor = view.getUint16(at + 14, true)
      if (upper !== 0 || address + size > shape.bytes || (flags & ~3) !== 0) return false
      const isWritten = (flags & DescriptorFlag.Write) !== 0
      if (length === 1) {
        if (isWritten || size < headerBytes + entryBytes || size > this.#header.length) return false
        copy.call(bytes, this.#header, 0, address, address + size)
        this.#headerLength = size
      } else if ((flags & DescriptorFlag.Next) === 0) {
        if (!isWritten || size === 0 || size > this.#resultBytes.length) return false
        this.#resultsAt = address
        this.#resultsLength = size
        return true
      } else {
        const wanted = this.#headerView.getUint32(0, true) === ChannelCommand.Get ? DescriptorFlag.Write : 0
        if (size === 0 || size % pageBytes !== 0 || (flags & DescriptorFlag.Write) !== wanted) return false
        if (size > (this.#pagesAt.length - this.#pages) * pageBytes) return false
        for (let at = 0; at < size; at += pageBytes) this.#pagesAt[this.#pages++] = address + at
      }
      if ((flags & DescriptorFlag.Next) === 0) return false
    }
    // Longer than any chain can be, or a loop.
    return false
  }

  /** Does the entries `from` to `to` - 1, those of one pool together. A promise: some have to wait. */
  #doEntries(command: number, from: number, to: number): Promise<void> | undefined {
    for (let first = from, end: number; first < to; first = end) {
      const number = this.#poolAt(first)
      end = first + 1
      while (end < to && this.#poolAt(end) === number) end++
      const pool = number >= 0 && number < maxPools ? this.#pools[number] : undefined
      const late = this.#doGroup(command, pool, first, end)
      if (late !== undefined) return late.then(() => this.#doEntries(command, end, to))
    }
    return undefined
  }

  #poolAt(entry: number): number {
    return this.#headerView.getInt32(headerBytes + entry * entryBytes, true)
  }

  #indexAt(entry: number): number {
    return this.#headerView.getUint32(headerBytes + entry * entryBytes + 4, true)
  }

  #objectAt(entry: number): ObjectId {
    return objectAt(this.#headerView, headerBytes + entry * entryBytes + 8)
  }

  #doGroup(command: number, pool: Pool | undefined, from: number, to: number): Promise<void> | undefined {
    const results = this.#results
    if (command === ChannelCommand.NewPool) {
      for (let n = from; n < to; n++) results[n] = this.#newPool((Number(this.#objectAt(n)) & 1) !== 0)
      return undefined
    }
    if (pool === undefined) {
      results.fill(-PutOutcome.PoolGone, from, to)
      return undefined
    }
    switch (command) {
      case ChannelCommand.Put:
        if (this.#isInPlace) {
          for (let n = from; n < to; n++) results[n] = this.#putInPlace(pool, n)
          return undefined
        }
        this.#collect(from, to, -PutOutcome.Policy)
        this.#put(pool)
        return undefined
      case ChannelCommand.Get:
        if (this.#isInPlace) {
          for (let n = from; n < to; n++) results[n] = this.#getInPlace(pool, n)
          return undefined
        }
        this.#collect(from, to, 0)
        return this.#get(pool)
      case ChannelCommand.FlushPage:
        this.#collect(from, to, 1)
        pool.flushMany(this.#batch)
        results.fill(1, from, to)
        return undefined
      case ChannelCommand.FlushObject:
        for (let n = from; n < to; n++) {
          const object = this.#objectAt(n)
          if (isNamed(object)) pool.flushObject(object)
          results[n] = 1
        }
        return undefined
      case ChannelCommand.DestroyPool:
        pool.destroy()
        this.#pools[this.#pools.indexOf(pool)] = undefined
        results[from] = 1
        results.fill(-PutOutcome.PoolGone, from + 1, to)
        return undefined
      default:
        results.fill(-PutOutcome.PoolGone, from, to)
        return undefined
    }
  }

  /** Makes a batch of entries. Nothing is kept under the id of all ones: it has its result at once. */
  #collect(from: number, to: number, unnamed: number): void {
    const batch = this.#batch
    batch.clear()
    for (let n = from; n < to; n++) {
      const object = this.#objectAt(n)
      if (isNamed(object)) this.#numbers[batch.push(object, this.#indexAt(n))] = n
      else this.#results[n] = unnamed
    }
  }

  /** The page of the guest's at an address; a view for each page of the shared memory is made once. */
  #pageAt(address: number): Buffer {
    const { shape, bytes } = this.#views
    const number = (address - shape.pagesAt) / pageBytes
    const isPage = number >= 0 && Number.isInteger(number)
    const made = isPage ? this.#guestPages[number] : undefined
    if (made !== undefined) return made
    const page = Buffer.from(bytes.buffer, bytes.byteOffset + address, pageBytes)
    if (isPage) this.#guestPages[number] = page
    return page
  }

  #putInPlace(pool: Pool, entry: number): number {
    const object = this.#objectAt(entry)
    if (!isNamed(object)) return -PutOutcome.Policy
    const outcome = pool.put(object, this.#indexAt(entry), this.#pageAt(this.#pagesAt[entry]!))
    return outcome === PutOutcome.Stored ? 1 : -outcome
  }

  #getInPlace(pool: Pool, entry: number): number {
    const object = this.#objectAt(entry)
    if (!isNamed(object)) return 0
    try {
      const outcome = pool.get(object, this.#indexAt(entry), this.#pageAt(this.#pagesAt[entry]!))
      return outcome === GetOutcome.Hit ? 1 : 0
    } catch (error) {
      assertOfPage(error)
      return -PutOutcome.Unavailable
    }
  }

  #put(pool: Pool): void {
    const batch = this.#batch
    for (let entry = 0; entry < batch.length; entry++)
      copyPage(this.#pageAt(this.#pagesAt[this.#numbers[entry]!]!), this.#ownPages[entry]!)
    pool.putMany(batch)
    for (let entry = 0; entry < batch.length; entry++) {
      const outcome = batch.outcomes[entry]!
      this.#results[this.#numbers[entry]!] = outcome === PutOutcome.Stored ? 1 : -outcome
    }
  }

  #get(pool: Pool): Promise<void> | undefined {
    const batch = this.#batch
    try {
      pool.getMany(batch)
    } catch (error) {
      // The others of the batch are still pending.
      assertOfPage(error)
    }
    for (let entry = 0; entry < batch.length; entry++)
      if (batch.outcomes[entry]! > GetOutcome.Miss) return this.#fetch(pool).then(() => this.#got())
    this.#got()
    return undefined
  }

  /** Waits for what has no answer yet. What cannot be had stays `Pending`. */
  async #fetch(pool: Pool): Promise<void> {
    const batch = this.#batch
    const { objects, indexes, outcomes } = batch
    const fetching: Promise<void>[] = []
    for (let entry = 0; entry < batch.length; entry++) {
      if (outcomes[entry]! <= GetOutcome.Miss) continue
      outcomes[entry] = Pending
      const fetched = pool.fetch(objects[entry]!, indexes[entry]!, batch.page(entry))
      fetching.push(
        fetched.then((outcome) => {
          outcomes[entry] = outcome
        }, assertOfPage),
      )
    }
    await Promise.all(fetching)
  }

  #got(): void {
    const batch = this.#batch
    for (let entry = 0; entry < batch.length; entry++) {
      const number = this.#numbers[entry]!
      const outcome = batch.outcomes[entry]
      if (outcome === GetOutcome.Hit) copyPage(this.#ownPages[entry]!, this.#pageAt(this.#pagesAt[number]!))
      // A page that is there and cannot be had is no miss.
      this.#results[number] = outcome === GetOutcome.Hit ? 1 : outcome === GetOutcome.Miss ? 0 : -PutOutcome.Unavailable
    }
  }

  #newPool(persistent: boolean): number {
    const number = this.#pools.indexOf(undefined)
    if (number < 0) return -1
    const pool = this.#store.newPool({ client: this.#client, persistent, shared: false, pageSize: pageBytes })
    if (typeof pool === 'number') return -pool
    this.#pools[number] = pool
    return number
  }

  /** Ends the channel, and gives its pools up. */
  close(): void {
    this.#views.end(ChannelStatus.Closed)
    for (const pool of this.#pools) pool?.destroy()
    this.#pools.fill(undefined)
  }
}

/** Whether pages can be kept under it: the id of all ones is reserved. */
const isNamed = (object: ObjectId): boolean => typeof object === 'number' || object <= maxObjectId

/** Goes on when it is one page that cannot be had; throws it when the store has stopped. */
function assertOfPage(error: unknown): void {
  if (!(error instanceof TmemError) || error.code === 'TMEM_BROKEN') throw error
}

function objectAt(view: DataView, at: number): ObjectId {
  const high = view.getUint32(at + 4, true)
  let rest = 0
  for (let word = at + 8; word < at + 24; word += 4) rest |= view.getUint32(word, true)
  if (rest === 0 && high < 0x200000) return high * 2 ** 32 + view.getUint32(at, true)
  let object = 0n
  for (let word = 2; word >= 0; word--) object = (object << 64n) | view.getBigUint64(at + word * 8, true)
  return object
}

/**
 * Copies a page. What fills a buffer with another one's bytes is a plain copy of the machine's; the others copy shared
 * memory word by word, and take half as long again.
 */
function copyPage(from: Buffer, to: Buffer): void {
  to.fill(from)
}

/** The runtime's own copy with offsets, which makes no view. */
const copy: (this: Uint8Array, target: Uint8Array, to: number, from: number, end: number) => number =
  Buffer.prototype.copy
