/**
 * How the shared memory of a channel is laid out: a split virtqueue as in virtio 1.x, words to wait on, and the guest's
 * headers, results and pages.
 *
 *     descriptors  16 bytes each: address u64, length u32, flags u16, next u16
 *     available    flags u16, idx u16, ring of u16, used_event u16
 *     used         flags u16, idx u16, ring of {id u32, length u32}, avail_event u16
 *     words        kick, interrupt, status, kicks, interrupts: u32 each
 *     headers      one for each chain: its operation
 *     results      one for each chain: a signed word for each page
 *     pages        4 KiB each
 *
 * Addresses are offsets in this memory. All integers are little endian, as in virtio 1.x and on every supported machine
 * (asserted).
 *
 * Source: Virtual I/O Device (VIRTIO) 1.x, §2.7 split virtqueues, VIRTIO_F_EVENT_IDX.
 */
import { checkOptions, type OptionNames } from '@tmem/core'

export const pageBytes = 4096
/** Flags of a descriptor: another one follows; the device writes to it. Indirect ones are not offered. */
export const DescriptorFlag = { Next: 1, Write: 2, Indirect: 4 } as const
/** Bytes of a header before its entries, and of an entry: the handle of Xen's tmem. */
export const headerBytes = 8
export const entryBytes = 32

/** What a chain asks for; the numbers are those of Xen's commands. */
export const ChannelCommand = { NewPool: 1, DestroyPool: 2, Put: 4, Get: 5, FlushPage: 6, FlushObject: 7 } as const
export type ChannelCommand = (typeof ChannelCommand)[keyof typeof ChannelCommand]

/** State of a channel. */
export const ChannelStatus = {
  Running: 0,
  /** The device met a ring that no driver writes, and has stopped (DEVICE_NEEDS_RESET). */
  NeedsReset: 1,
  Closed: 2,
} as const

/** Sizes of a channel. */
export interface ChannelOptions {
  /** Descriptors: a power of two from 2 to 32,768 (default 1024). */
  readonly queueSize?: number
  /** Chains under way at most (default 64). */
  readonly chains?: number
  /** Pages of a chain at most: 1 to 512 (default 16). */
  readonly pagesPerChain?: number
  /** Pages of the guest in the shared memory (default 1024). */
  readonly pages?: number
  /**
   * How often a guest looks for its answers before it sleeps, and 16 times how often a device looks for chains: 0 to
   * 2^24 (default 2^17, about 0.2 ms: as long as Linux lets a virtual processor look before it halts it). 0: both sleep
   * at once, and to wake them costs 10 to 50 µs.
   */
  readonly looks?: number
}

const optionNames: OptionNames<ChannelOptions> = {
  queueSize: true,
  chains: true,
  pagesPerChain: true,
  pages: true,
  looks: true,
}

/** What another thread needs to use the channel: can be posted to it. */
export interface ChannelHandle extends Required<ChannelOptions> {
  readonly memory: SharedArrayBuffer
}

/** Makes the memory of a channel. Throws `TypeError` or `RangeError` for sizes that make no sense. */
export function createChannel(options: ChannelOptions = {}): ChannelHandle {
  checkOptions('createChannel', options, optionNames)
  const { queueSize = 1024, chains = 64, pagesPerChain = 16, pages = 1024, looks = 2 ** 17 } = options
  const assert = (name: string, value: number, most: number, least = 1): void => {
    if (!Number.isInteger(value) || value < least || value > most)
      throw new RangeError(`createChannel: ${name} must be from ${least} to ${most}, got ${value}`)
  }
  assert('queueSize', queueSize, 32_768)
  if (queueSize < 2 || (queueSize & (queueSize - 1)) !== 0)
    throw new RangeError(`createChannel: queueSize must be a power of two from 2 to 32768, got ${queueSize}`)
  assert('chains', chains, queueSize)
  assert('pagesPerChain', pagesPerChain, 512)
  assert('pages', pages, 2 ** 19)
  assert('looks', looks, 2 ** 24, 0)
  const sizes = { queueSize, chains, pagesPerChain, pages }
  return Object.freeze({ ...sizes, looks, memory: new SharedArrayBuffer(new ChannelShape(sizes).bytes) })
}

const words = { kick: 0, interrupt: 1, status: 2, kicks: 3, interrupts: 4 } as const

/** Where everything lies. */
export class ChannelShape {
  readonly queueSize: number
  readonly chains: number
  readonly pagesPerChain: number
  readonly pages: number
  readonly availableAt: number
  readonly usedAt: number
  readonly wordsAt: number
  readonly headersAt: number
  readonly headerStride: number
  readonly resultsAt: number
  readonly pagesAt: number
  readonly bytes: number

  constructor({ queueSize, chains, pagesPerChain, pages }: Required<Omit<ChannelOptions, 'looks'>>) {
    if (new Uint8Array(Uint16Array.of(1).buffer)[0] !== 1) throw new Error('a channel needs a little-endian machine')
    const upTo = (at: number, unit: number): number => Math.ceil(at / unit) * unit
    this.queueSize = queueSize
    this.chains = chains
    this.pagesPerChain = pagesPerChain
    this.pages = pages
    this.availableAt = queueSize * 16
    this.usedAt = upTo(this.availableAt + 6 + queueSize * 2, 4)
    this.wordsAt = upTo(this.usedAt + 6 + queueSize * 8, 64)
    this.headersAt = this.wordsAt + 64
    this.headerStride = headerBytes + pagesPerChain * entryBytes
    this.resultsAt = this.headersAt + chains * this.headerStride
    this.pagesAt = upTo(this.resultsAt + chains * pagesPerChain * 4, pageBytes)
    this.bytes = this.pagesAt + pages * pageBytes
  }
}

/** The memory of a channel as both sides see it: plain words, and those that both write, with order between them. */
export class ChannelViews {
  readonly shape: ChannelShape
  readonly looks: number
  readonly bytes: Uint8Array
  readonly view: DataView
  readonly words: Int32Array
  readonly #u16: Uint16Array

  constructor(handle: ChannelHandle) {
    this.shape = new ChannelShape(handle)
    this.looks = handle.looks
    if (handle.memory.byteLength < this.shape.bytes)
      throw new RangeError(`a channel of that shape has ${this.shape.bytes} bytes, not ${handle.memory.byteLength}`)
    this.bytes = new Uint8Array(handle.memory, 0, this.shape.bytes)
    this.view = new DataView(handle.memory, 0, this.shape.bytes)
    this.words = new Int32Array(handle.memory, this.shape.wordsAt, 16)
    this.#u16 = new Uint16Array(handle.memory, 0, this.shape.wordsAt / 2)
  }

  load(at: number): number {
    return Atomics.load(this.#u16, at / 2)
  }

  store(at: number, value: number): void {
    Atomics.store(this.#u16, at / 2, value)
  }

  /** Where idx and the event word of each ring are. */
  get availableIdx(): number {
    return this.shape.availableAt + 2
  }

  get usedEvent(): number {
    return this.shape.availableAt + 4 + this.shape.queueSize * 2
  }

  get usedIdx(): number {
    return this.shape.usedAt + 2
  }

  get availableEvent(): number {
    return this.shape.usedAt + 4 + this.shape.queueSize * 8
  }

  get status(): number {
    return Atomics.load(this.words, words.status)
  }

  /** Tells both sides that it is over. */
  end(status: number): void {
    Atomics.store(this.words, words.status, status)
    this.#ring(words.kick)
    this.#ring(words.interrupt)
  }

  /** From the guest to the device: what costs an exit of the virtual machine. */
  kick(): void {
    Atomics.add(this.words, words.kicks, 1)
    this.#ring(words.kick)
  }

  /** From the device to the guest. */
  interrupt(): void {
    Atomics.add(this.words, words.interrupts, 1)
    this.#ring(words.interrupt)
  }

  #ring(word: number): void {
    Atomics.add(this.words, word, 1)
    Atomics.notify(this.words, word)
  }

  get kicks(): number {
    return Atomics.load(this.words, words.kicks)
  }

  get interrupts(): number {
    return Atomics.load(this.words, words.interrupts)
  }

  get kickWord(): number {
    return Atomics.load(this.words, words.kick)
  }

  get interruptWord(): number {
    return Atomics.load(this.words, words.interrupt)
  }

  /** Blocks until there was an interrupt since the word was `seen`, or for so many milliseconds. */
  waitForInterrupt(seen: number, ms: number): void {
    Atomics.wait(this.words, words.interrupt, seen, ms)
  }

  /** Blocks until there was a kick since the word was `seen`, or for so many milliseconds. */
  waitForKick(seen: number, ms: number): void {
    Atomics.wait(this.words, words.kick, seen, ms)
  }
}

/** Whether whoever asked to be told of `event` has to be, when an index went from `old` to `now` (all modulo 2^16). */
export const needsEvent = (event: number, now: number, old: number): boolean =>
  ((now - event - 1) & 0xffff) < ((now - old) & 0xffff)
