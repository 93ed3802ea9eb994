/**
 * The device's side of a channel: takes chains out of the queue, does what they ask, writes the results.
 *
 * The guest is hostile: it writes to all of the memory at any time. Each descriptor and each header is copied once, and
 * the copy is judged; a page is copied before anything reads it twice. A chain that is wrong (a loop, too long, outside
 * of the memory, of another form) is answered with nothing written. A ring index that jumps stops the device. Nothing
 * of another guest's is reachable: a channel has a client and pools of its own.
 */
import { GetOutcome, maxObjectId, type ObjectId, type PageStore, type Pool, PutOutcome } from '@tmem/core'
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
  readonly #pools: (Pool | undefined)[] = new Array<undefined>(maxPools).fill(undefined)
  readonly #header: Uint8Array
  readonly #headerView: DataView
  readonly #results: Int32Array
  readonly #resultBytes: Uint8Array
  readonly #page: Uint8Array = new Uint8Array(pageBytes)
  /** Data of the chain that is done now: address and bytes of each run, in pages. */
  readonly #runs: Float64Array
  readonly #lengths: Uint32Array
  #runCount = 0
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
    const { pagesPerChain } = this.#views.shape
    this.#header = new Uint8Array(headerBytes + pagesPerChain * entryBytes)
    this.#headerView = new DataView(this.#header.buffer)
    this.#results = new Int32Array(pagesPerChain)
    this.#resultBytes = new Uint8Array(this.#results.buffer)
    this.#runs = new Float64Array(pagesPerChain)
    this.#lengths = new Uint32Array(pagesPerChain)
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
      else if (done > 0) continue
      // To be told of the next chain; what came before that was said is looked for once more.
      views.store(views.availableEvent, this.#available)
      if (views.load(views.availableIdx) !== this.#available) continue
      views.waitForKick(seen, napMs)
    }
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
    let pages = 0
    for (let run = 0; run < this.#runCount; run++) pages += this.#lengths[run]!
    if (pages !== (hasPages ? count : 0)) return 0
    const isLate = this.#doEntries(command, count, 0, 0, 0)
    if (isLate === undefined) return this.#answer(count, command)
    return isLate.then(() => this.#answer(count, command))
  }

  #answer(count: number, command: number): number {
    this.#views.bytes.set(this.#resultBytes.subarray(0, count * 4), this.#resultsAt)
    this.counters.entries += count
    return count * 4 + (command === ChannelCommand.Get ? count * pageBytes : 0)
  }

  /**
   * Reads a chain: header, runs of pages, results, in that order; the pages are all read or all written. False: it is
   * none.
   */
  #read(head: number): boolean {
    const { shape, view, bytes } = this.#views
    this.#runCount = 0
    this.#headerLength = 0
    this.#resultsLength = 0
    let descriptor = head
    let pagesFlag = -1
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
        this.#header.set(bytes.subarray(address, address + size))
        this.#headerLength = size
      } else if ((flags & DescriptorFlag.Next) === 0) {
        if (!isWritten || size === 0 || size > this.#resultBytes.length) return false
        this.#resultsAt = address
        this.#resultsLength = size
        return true
      } else {
        const wanted = this.#headerView.getUint32(0, true) === ChannelCommand.Get ? DescriptorFlag.Write : 0
        pagesFlag = flags & DescriptorFlag.Write
        if (size === 0 || size % pageBytes !== 0 || pagesFlag !== wanted) return false
        if (this.#runCount === this.#runs.length) return false
        this.#runs[this.#runCount] = address
        this.#lengths[this.#runCount++] = size / pageBytes
      }
      if ((flags & DescriptorFlag.Next) === 0) return false
    }
    // Longer than any chain can be, or a loop.
    return false
  }

  /** Does the entries from `entry` on; `run` and `within` say where its page is. A promise: one has to wait. */
  #doEntries(command: number, count: number, entry: number, run: number, within: number): Promise<void> | undefined {
    const view = this.#headerView
    for (let n = entry; n < count; n++) {
      const at = headerBytes + n * entryBytes
      const pool = view.getInt32(at, true)
      const index = view.getUint32(at + 4, true)
      const pageAt = this.#runs[run]! + within * pageBytes
      if (++within === this.#lengths[run]) {
        run++
        within = 0
      }
      const result = this.#doEntry(command, pool, objectAt(view, at + 8), index, pageAt)
      if (typeof result === 'number') {
        this.#results[n] = result
        continue
      }
      const [nextRun, nextWithin] = [run, within]
      return result.then((late) => {
        this.#results[n] = late
        return this.#doEntries(command, count, n + 1, nextRun, nextWithin)
      })
    }
    return undefined
  }

  #doEntry(command: number, number: number, object: ObjectId, index: number, pageAt: number): number | Promise<number> {
    if (command === ChannelCommand.NewPool) return this.#newPool((Number(object) & 1) !== 0)
    const pool = number >= 0 && number < maxPools ? this.#pools[number] : undefined
    const { PoolGone } = PutOutcome
    if (pool === undefined) return -PoolGone
    // The id of all ones is reserved: nothing is kept under it.
    const isNamed = typeof object === 'number' || object <= maxObjectId
    switch (command) {
      case ChannelCommand.Put: {
        copy.call(this.#views.bytes, this.#page, 0, pageAt, pageAt + pageBytes)
        const outcome = isNamed ? pool.put(object, index, this.#page) : PutOutcome.Policy
        return outcome === PutOutcome.Stored ? 1 : -outcome
      }
      case ChannelCommand.Get: {
        if (!isNamed) return 0
        const outcome = pool.get(object, index, this.#page)
        if (outcome === GetOutcome.Deferred)
          return pool.fetch(object, index, this.#page).then((late) => this.#got(late, pageAt))
        return this.#got(outcome, pageAt)
      }
      case ChannelCommand.FlushPage:
        if (isNamed) pool.flushPage(object, index)
        return 1
      case ChannelCommand.FlushObject:
        if (isNamed) pool.flushObject(object)
        return 1
      case ChannelCommand.DestroyPool:
        pool.destroy()
        this.#pools[number] = undefined
        return 1
      default:
        return -PoolGone
    }
  }

  #got(outcome: GetOutcome, pageAt: number): number {
    if (outcome !== GetOutcome.Hit) return 0
    copy.call(this.#page, this.#views.bytes, pageAt, 0, pageBytes)
    return 1
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

function objectAt(view: DataView, at: number): ObjectId {
  const high = view.getUint32(at + 4, true)
  let rest = 0
  for (let word = at + 8; word < at + 24; word += 4) rest |= view.getUint32(word, true)
  if (rest === 0 && high < 0x200000) return high * 2 ** 32 + view.getUint32(at, true)
  let object = 0n
  for (let word = 2; word >= 0; word--) object = (object << 64n) | view.getBigUint64(at + word * 8, true)
  return object
}

/** The runtime's own copy with offsets, which makes no view. */
const copy: (this: Uint8Array, target: Uint8Array, to: number, from: number, end: number) => number =
  Buffer.prototype.copy
