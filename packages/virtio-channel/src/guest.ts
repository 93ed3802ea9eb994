/**
 * The guest's side of a channel: puts chains of tmem operations into the queue, tells the device once for many of them,
 * and blocks until they are done, because tmem is synchronous.
 *
 * A chain has a header, the pages as runs of descriptors, and room for the results. The lists of free descriptors and
 * slots are in the guest's private memory, so that the device cannot corrupt them. Nothing is allocated per operation.
 */
import { type ObjectId, TmemError } from '@tmem/core'
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

const { Next, Write } = DescriptorFlag
const none = 0xffff
/** How long one sleep is, in milliseconds, before the state of the channel is looked at again. */
const napMs = 1000

/** What a chain is about: `count` pages of one pool, from `from` on in each list. */
export interface ChainEntries {
  readonly objects: ArrayLike<ObjectId>
  readonly indexes: ArrayLike<number>
  /** Numbers of pages in the shared memory (puts and gets). */
  readonly pages: ArrayLike<number>
}

export class ChannelGuest {
  readonly pages: number
  readonly pagesPerChain: number
  readonly #views: ChannelViews
  /** By descriptor: the next free one, or the next of its chain. */
  readonly #next: Uint16Array
  /** By descriptor at the head of a chain: its slot. */
  readonly #slots: Uint16Array
  #freeDescriptor = 0
  #freeDescriptors: number
  /** By slot: the next free one; entries of the chain; whether its results are there. */
  readonly #nextSlot: Uint16Array
  readonly #counts: Uint16Array
  readonly #done: Uint8Array
  #freeSlot = 0
  /** Chains put into the ring, told to the device, and seen done; modulo 2^16. */
  #available = 0
  #told = 0
  #used = 0
  /** Chains that are not done. */
  underWay = 0

  constructor(handle: ChannelHandle) {
    this.#views = new ChannelViews(handle)
    const { queueSize, chains, pages, pagesPerChain } = this.#views.shape
    this.pages = pages
    this.pagesPerChain = pagesPerChain
    this.#next = Uint16Array.from({ length: queueSize }, (_, n) => (n + 1 === queueSize ? none : n + 1))
    this.#slots = new Uint16Array(queueSize).fill(none)
    this.#freeDescriptors = queueSize
    this.#nextSlot = Uint16Array.from({ length: chains }, (_, n) => (n + 1 === chains ? none : n + 1))
    this.#counts = new Uint16Array(chains)
    this.#done = new Uint8Array(chains)
  }

  /** Notifications so far: of the device (exits of the virtual machine), and of the guest. */
  get kicks(): number {
    return this.#views.kicks
  }

  get interrupts(): number {
    return this.#views.interrupts
  }

  /** The 4 KiB of a page of the shared memory; a new view each time. */
  page(number: number): Uint8Array {
    this.#assertPage(number)
    const at = this.#views.shape.pagesAt + number * pageBytes
    return this.#views.bytes.subarray(at, at + pageBytes)
  }

  #assertPage(number: number): void {
    if (!(Number.isInteger(number) && number >= 0 && number < this.pages))
      throw new RangeError(`page ${number} is none of the ${this.pages} of the channel`)
  }

  /**
   * Puts a chain into the queue: `count` entries (1 to `pagesPerChain`) from `from` on. A ticket for `result` and
   * `release`; -1: the queue is full, `notify` and `wait` first. A device that is awake may do it at once; one that
   * sleeps is woken by `notify`.
   */
  submit(command: ChannelCommand, pool: number, entries: ChainEntries, from: number, count: number): number {
    const { shape, view } = this.#views
    if (!(Number.isInteger(count) && count >= 1 && count <= shape.pagesPerChain))
      throw new RangeError(`a chain has 1 to ${shape.pagesPerChain} entries, not ${count}`)
    const hasPages = command === ChannelCommand.Put || command === ChannelCommand.Get
    const { objects, indexes, pages } = entries
    let runs = 0
    if (hasPages)
      for (let n = from; n < from + count; n++) {
        this.#assertPage(pages[n]!)
        if (n === from || pages[n] !== pages[n - 1]! + 1) runs++
      }
    const slot = this.#freeSlot
    if (slot === none || this.#freeDescriptors < runs + 2) return -1
    this.#freeSlot = this.#nextSlot[slot]!
    this.#counts[slot] = count
    this.#done[slot] = 0

    const headerAt = shape.headersAt + slot * shape.headerStride
    view.setUint32(headerAt, command, true)
    view.setUint32(headerAt + 4, count, true)
    for (let n = 0, at = headerAt + headerBytes; n < count; n++, at += entryBytes) {
      view.setInt32(at, pool, true)
      view.setUint32(at + 4, indexes[from + n]!, true)
      writeObject(view, at + 8, objects[from + n]!)
    }
    const head = this.#freeDescriptor
    let last = this.#describe(headerAt, headerBytes + count * entryBytes, 0)
    const flags = command === ChannelCommand.Get ? Write : 0
    if (hasPages)
      for (let n = from; n < from + count; ) {
        const first = pages[n]!
        let length = 1
        while (n + length < from + count && pages[n + length] === first + length) length++
        last = this.#describe(shape.pagesAt + first * pageBytes, length * pageBytes, flags)
        n += length
      }
    last = this.#describe(shape.resultsAt + slot * shape.pagesPerChain * 4, count * 4, Write)
    view.setUint16(last * 16 + 12, Write, true)
    this.#next[last] = none
    this.#slots[head] = slot
    const place = this.#available & (shape.queueSize - 1)
    view.setUint16(shape.availableAt + 4 + place * 2, head, true)
    this.#available = (this.#available + 1) & 0xffff
    this.#views.store(this.#views.availableIdx, this.#available)
    this.underWay++
    return slot
  }

  /** Takes the next free descriptor; another one follows. */
  #describe(address: number, length: number, flags: number): number {
    const { view } = this.#views
    const descriptor = this.#freeDescriptor
    const next = this.#next[descriptor]!
    view.setUint32(descriptor * 16, address, true)
    view.setUint32(descriptor * 16 + 4, 0, true)
    view.setUint32(descriptor * 16 + 8, length, true)
    view.setUint16(descriptor * 16 + 12, flags | Next, true)
    view.setUint16(descriptor * 16 + 14, next, true)
    this.#freeDescriptor = next
    this.#freeDescriptors--
    return descriptor
  }

  /** Tells the device of all chains since the last time, with one notification at most: it may be awake already. */
  notify(): void {
    const views = this.#views
    const old = this.#told
    if (old === this.#available) return
    this.#told = this.#available
    if (needsEvent(views.load(views.availableEvent), this.#told, old)) views.kick()
  }

  /**
   * Blocks until every chain is done: looks for that for a while, and then sleeps; one interrupt at most. Throws
   * `TmemError`: `TMEM_CLOSED` when the channel ends, `TMEM_BROKEN` when the device has stopped or names a chain that
   * is none.
   */
  wait(): void {
    const views = this.#views
    this.notify()
    for (let look = 0; this.underWay > 0 && look < views.looks; look++)
      if (views.load(views.usedIdx) !== this.#used) this.#collect()
    for (;;) {
      this.#collect()
      if (this.underWay === 0) return
      this.#assertRunning()
      const seen = views.interruptWord
      // To be told when the last one is done, and not before.
      views.store(views.usedEvent, (this.#available - 1) & 0xffff)
      this.#collect()
      if (this.underWay === 0) return
      views.waitForInterrupt(seen, napMs)
    }
  }

  #assertRunning(): void {
    const { status } = this.#views
    if (status === ChannelStatus.Closed)
      throw new TmemError('TMEM_CLOSED', 'the channel is closed', { layer: 'virtio' })
    if (status !== ChannelStatus.Running)
      throw new TmemError('TMEM_BROKEN', 'the device of the channel has stopped: it needs a reset', { layer: 'virtio' })
  }

  /** Takes what is done out of the used ring. */
  #collect(): void {
    const views = this.#views
    const { shape, view } = views
    const idx = views.load(views.usedIdx)
    while (this.#used !== idx) {
      const at = shape.usedAt + 4 + (this.#used & (shape.queueSize - 1)) * 8
      const head = view.getUint32(at, true)
      const slot = head < shape.queueSize ? this.#slots[head]! : none
      if (slot === none)
        throw new TmemError('TMEM_BROKEN', `the device answered chain ${head}, which is none`, { layer: 'virtio' })
      this.#slots[head] = none
      // A chain whose results were not written was none that the device understood.
      this.#done[slot] = view.getUint32(at + 4, true) === 0 ? 2 : 1
      for (let descriptor = head; descriptor !== none; ) {
        const next = this.#next[descriptor]!
        this.#next[descriptor] = this.#freeDescriptor
        this.#freeDescriptor = descriptor
        this.#freeDescriptors++
        descriptor = next
      }
      this.#used = (this.#used + 1) & 0xffff
      this.underWay--
    }
  }

  /** The result of an entry of a chain that is done: at least 0, or why not. Throws `RangeError` before that. */
  result(ticket: number, entry: number): number {
    if (this.#done[ticket] !== 1 || !(entry >= 0 && entry < this.#counts[ticket]!))
      throw new RangeError(
        `chain ${ticket} has no result ${entry}${this.#done[ticket] === 2 ? ': it was refused' : ''}`,
      )
    const { shape, view } = this.#views
    return view.getInt32(shape.resultsAt + (ticket * shape.pagesPerChain + entry) * 4, true)
  }

  /** Gives a ticket back. */
  release(ticket: number): void {
    if (this.#done[ticket] === 0 || this.#done[ticket] === undefined)
      throw new RangeError(`chain ${ticket} is not done`)
    this.#done[ticket] = 0
    this.#nextSlot[ticket] = this.#freeSlot
    this.#freeSlot = ticket
  }

  /** One operation, alone: the price of an exit for a page. Its result. */
  call(command: ChannelCommand, pool: number, object: ObjectId, index: number, page = 0): number {
    this.#lone.objects[0] = object
    this.#lone.indexes[0] = index
    this.#lone.pages[0] = page
    let ticket = this.submit(command, pool, this.#lone, 0, 1)
    if (ticket < 0) {
      this.wait()
      ticket = this.submit(command, pool, this.#lone, 0, 1)
      if (ticket < 0) throw new RangeError('all chains of the channel have tickets that were not released')
    }
    this.wait()
    const result = this.result(ticket, 0)
    this.release(ticket)
    return result
  }

  readonly #lone = { objects: [0] as ObjectId[], indexes: [0], pages: [0] }

  /** Makes a pool; its number, or why not. */
  newPool(isPersistent: boolean): number {
    return this.call(ChannelCommand.NewPool, 0, isPersistent ? 1 : 0, 0)
  }

  /** Ends the channel, for both sides. */
  close(): void {
    this.#views.end(ChannelStatus.Closed)
  }
}

function writeObject(view: DataView, at: number, object: ObjectId): void {
  if (typeof object === 'number') {
    view.setUint32(at, object, true)
    view.setUint32(at + 4, object / 2 ** 32, true)
    view.setFloat64(at + 8, 0, true)
    view.setFloat64(at + 16, 0, true)
    return
  }
  for (let word = 0, rest = object; word < 3; word++, rest >>= 64n) view.setBigUint64(at + word * 8, rest, true)
}
