/**
 * The references of `tmem bench tiers`: textbook orders of pages, simulated over the calls that reach the stack; and a
 * log.
 *
 * The simulated orders know memory for so many compressed bytes, and a disk with room for all. They see what the stack
 * sees: calls that the front end made because of what the stack answered, too (a page that a get took out of memory is
 * flushed by the swapper). Of the limit they use every byte for pages: a real stack pays for its tables out of the
 * same.
 *
 * Only the number of pages that are read from disk is counted. Nothing is stored here but sizes.
 */
import { createCodec } from '@tmem/codecs'
import { basePageSize, type PageBatch, type PageStore, Pending, type Pool } from '@tmem/core'
import { Failed } from '../ending.ts'

/** Who is told of the calls that reach a stack, one by one. `page` is an index of the only object. */
export interface Calls {
  /** A page came, which shrinks to `bytes`. */
  put(page: number, bytes: number): void
  /** A page was asked for. */
  get(page: number): void
  /** The front end has the page in memory of its own, and asks for it only when it has put it back. */
  release(page: number): void
  /** A page was given up. */
  flush(page: number): void
}

/**
 * Least recently used: what was not used for longest goes to disk. A page that is read from there comes to memory
 * again.
 */
export class Lru implements Calls {
  /** Pages that were read from disk. */
  reads = 0
  readonly #limitBytes: number
  /** Bytes by page, in the order of use. */
  readonly #memory: Map<number, number> = new Map()
  readonly #disk: Map<number, number> = new Map()
  #bytes = 0

  constructor(limitBytes: number) {
    this.#limitBytes = limitBytes
  }

  put(page: number, bytes: number): void {
    this.flush(page)
    this.#add(page, bytes)
  }

  get(page: number): void {
    const here = this.#memory.get(page)
    if (here !== undefined) {
      this.#memory.delete(page)
      this.#memory.set(page, here)
      return
    }
    const there = this.#disk.get(page)
    if (there === undefined) return
    this.reads++
    this.#disk.delete(page)
    this.#add(page, there)
  }

  release(page: number): void {
    const bytes = this.#memory.get(page)
    if (bytes === undefined) return
    this.flush(page)
    this.#disk.set(page, bytes)
  }

  flush(page: number): void {
    this.#bytes -= this.#memory.get(page) ?? 0
    this.#memory.delete(page)
    this.#disk.delete(page)
  }

  #add(page: number, bytes: number): void {
    this.#memory.set(page, bytes)
    this.#bytes += bytes
    for (const [oldest, size] of this.#memory) {
      if (this.#bytes <= this.#limitBytes) break
      this.#memory.delete(oldest)
      this.#bytes -= size
      this.#disk.set(oldest, size)
    }
  }
}

// Kinds of recorded calls, in the upper bits; the page is in the others.
const PUT = 1
const GET = 2
const RELEASE = 3
const FLUSH = 4
const pageBits = 28
const pageMask = 2 ** pageBits - 1

/** Writes the calls down, for somebody who must know what is to come. */
export class RecordedCalls implements Calls {
  /** Kind and page of each call, and the bytes of a put. */
  readonly #calls: number[] = []
  readonly #bytes: number[] = []

  put(page: number, bytes: number): void {
    this.#add(PUT, page, bytes)
  }

  get(page: number): void {
    this.#add(GET, page, 0)
  }

  release(page: number): void {
    this.#add(RELEASE, page, 0)
  }

  flush(page: number): void {
    this.#add(FLUSH, page, 0)
  }

  #add(kind: number, page: number, bytes: number): void {
    this.#calls.push(kind * 2 ** pageBits + page)
    this.#bytes.push(bytes)
  }

  /**
   * How many pages Belady's MIN reads from disk over these calls with `limitBytes` of memory. When there is too much,
   * what goes is the page whose next get is furthest away; that may be the one that came just now. What is put anew,
   * released or flushed before any get takes no memory. Where all pages are of one size no order reads less. With
   * various sizes the least is not known in reasonable time (the problem is NP-hard), and this rule, which does not
   * look at sizes, is near it.
   *
   * Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5
   * (1966), 78-101.
   */
  minReads(limitBytes: number): number {
    const nextGet = this.#nextGets()
    const bytesOf = new Map<number, number>()
    const memory = new Set<number>()
    const furthest = new Furthest()
    let bytes = 0
    let reads = 0
    const leave = (page: number): void => {
      if (memory.delete(page)) bytes -= bytesOf.get(page)!
    }
    for (let n = 0; n < this.#calls.length; n++) {
      const page = this.#calls[n] & pageMask
      switch (this.#calls[n] >>> pageBits) {
        case PUT:
          leave(page)
          bytesOf.set(page, this.#bytes[n])
          break
        case GET:
          if (!bytesOf.has(page)) continue
          if (!memory.has(page)) reads++
          leave(page)
          break
        case RELEASE:
          leave(page)
          continue
        default:
          leave(page)
          bytesOf.delete(page)
          continue
      }
      if (nextGet[n] === never) continue
      memory.add(page)
      bytes += bytesOf.get(page)!
      furthest.push(nextGet[n])
      // A get that has passed is nearer than any that is to come: as long as there are pages in memory the furthest is
      // one of theirs.
      while (bytes > limitBytes) leave(this.#calls[furthest.pop()] & pageMask)
    }
    return reads
  }

  /** By call: the next get of its page, or `never` when that is put, released or flushed before, or not used again. */
  #nextGets(): Uint32Array {
    const next = new Uint32Array(this.#calls.length)
    const upcoming = new Map<number, number>()
    for (let n = this.#calls.length - 1; n >= 0; n--) {
      const page = this.#calls[n] & pageMask
      next[n] = upcoming.get(page) ?? never
      if (this.#calls[n] >>> pageBits === GET) upcoming.set(page, n)
      else upcoming.delete(page)
    }
    return next
  }
}

const never = 0xffffffff

/** A heap whose top is the largest number. */
class Furthest {
  readonly #heap: number[] = []

  push(value: number): void {
    const heap = this.#heap
    let at = heap.push(value) - 1
    for (let parent = (at - 1) >> 1; at > 0 && heap[parent] < value; parent = (at - 1) >> 1) {
      heap[at] = heap[parent]
      at = parent
    }
    heap[at] = value
  }

  pop(): number {
    const heap = this.#heap
    const top = heap[0]
    const last = heap.pop()!
    if (heap.length === 0) return top
    let at = 0
    for (;;) {
      let child = 2 * at + 1
      if (child + 1 < heap.length && heap[child + 1] > heap[child]) child++
      if (child >= heap.length || heap[child] <= last) break
      heap[at] = heap[child]
      at = child
    }
    heap[at] = last
    return top
  }
}

type Methods = Required<Omit<Pool, 'attributes'>>
type Meaning = { readonly [Name in keyof Methods]: (...words: Parameters<Methods[Name]>) => void }

/**
 * The store, whose pools tell `calls` of each call before it is made. For a front end that uses one object, 0, as the
 * swapper does.
 */
export function watched(store: PageStore, calls: readonly Calls[]): PageStore {
  const codec = createCodec('lz4')
  const room = new Uint8Array(codec.bound(basePageSize))
  const put = (page: number, bytes: Uint8Array, at: number): void => {
    const size = codec.compress(bytes, at, basePageSize, room, 0, basePageSize - 1) || basePageSize
    for (const told of calls) told.put(page, size)
  }
  const get = (page: number): void => {
    for (const told of calls) told.get(page)
  }
  const release = (page: number): void => {
    for (const told of calls) told.release(page)
  }
  const flush = (page: number): void => {
    for (const told of calls) told.flush(page)
  }
  const pending = (batch: PageBatch, each: (n: number) => void): void => {
    for (let n = 0; n < batch.length; n++) if (batch.outcomes[n] === Pending) each(n)
  }
  const unknown = (): never => {
    throw new Failed('bench tiers: the front end made a call that the simulated orders know nothing of')
  }
  const nothing = (): void => undefined
  const putMany = (batch: PageBatch): void =>
    pending(batch, (n) => put(batch.indexes[n], batch.bytes, batch.offsets[n]))
  const getMany = (batch: PageBatch): void => pending(batch, (n) => get(batch.indexes[n]))
  /** What every method of a pool means to an order of pages: one that is added has to be added here. */
  const meaning: Meaning = {
    put: (_object, index, page) => put(index, page, 0),
    replace: (_object, index, page) => put(index, page, 0),
    get: (_object, index) => get(index),
    // Was told of by the get that was deferred.
    fetch: nothing,
    // As unchanged or not: it is in use, and in the way of others.
    putMany,
    replaceMany: putMany,
    getMany,
    fetchMany: getMany,
    lend: (_object, index) => get(index),
    // Where it is not granted the front end flushes the page, and that is told of, too.
    release: (_object, index) => release(index),
    flushPage: (_object, index) => flush(index),
    flushObject: unknown,
    flushMany: (batch) => {
      for (let n = 0; n < batch.length; n++) flush(batch.indexes[n])
    },
    whereIs: nothing,
    movesOf: nothing,
    walk: nothing,
    census: nothing,
    sink: unknown,
    recompress: nothing,
    split: unknown,
    handOver: unknown,
    freeze: nothing,
    thaw: nothing,
    // The end: nothing is asked for afterwards.
    destroy: nothing,
  }
  const tell = new Map<PropertyKey, (...words: never[]) => void>(Object.entries(meaning))
  return intercepted(store, (name, answer) =>
    name === 'newPool' && typeof answer !== 'number'
      ? intercepted(answer as Pool, undefined, (method, words) => tell.get(method)!(...(words as never[])))
      : answer,
  )
}

/** An object whose methods are told of before they are called, or whose answers are exchanged. */
function intercepted<Target extends object>(
  target: Target,
  exchange: ((name: PropertyKey, answer: unknown) => unknown) | undefined,
  before?: (name: PropertyKey, words: unknown[]) => void,
): Target {
  return new Proxy(target, {
    get(_, name) {
      const value: unknown = Reflect.get(target, name)
      if (typeof value !== 'function') return value
      return (...words: unknown[]) => {
        before?.(name, words)
        const answer: unknown = Reflect.apply(value, target, words)
        return exchange === undefined ? answer : exchange(name, answer)
      }
    },
  })
}

/**
 * A log with greedy cleaning: blocks are written one behind the other into segments. When segments run short, the one
 * with the fewest live bytes is read, what is live in it is written again, and the segment is free. It is what a place
 * without holes to reuse would do.
 *
 * Source: M. Rosenblum, J. K. Ousterhout, "The design and implementation of a log-structured file system", ACM TOCS 10
 * (1992), 26-52.
 */
export class GreedyLog {
  /** Bytes that were written, cleaning included. */
  writtenBytes = 0
  readonly #segmentBytes: number
  /** By segment: bytes that were appended (0: free), and those of them that are live. */
  readonly #filled: Float64Array
  readonly #live: Float64Array
  /** By segment: pages that were ever appended since it was free. */
  readonly #pages: number[][]
  readonly #free: number[] = []
  #current: number
  /** By page: its segment, and its bytes. */
  readonly #segmentOf: Map<number, number> = new Map()
  readonly #bytesOf: Map<number, number> = new Map()

  /** At least four segments; a block is not longer than one. */
  constructor(sizeBytes: number, segmentBytes: number) {
    const segments = Math.floor(sizeBytes / segmentBytes)
    if (segments < 4) throw new RangeError(`a log needs at least 4 segments, got ${segments}`)
    this.#segmentBytes = segmentBytes
    this.#filled = new Float64Array(segments)
    this.#live = new Float64Array(segments)
    this.#pages = Array.from({ length: segments }, () => [])
    for (let segment = segments - 1; segment > 0; segment--) this.#free.push(segment)
    this.#current = 0
  }

  /** Bytes of all live blocks. */
  get liveBytes(): number {
    return this.#live.reduce((sum, bytes) => sum + bytes, 0)
  }

  /** Writes a block anew, in place of the one before. Throws `RangeError` when there is more live than fits. */
  write(page: number, bytes: number): void {
    if (bytes > this.#segmentBytes) throw new RangeError(`a block of ${bytes} bytes is longer than a segment`)
    this.#forget(page)
    // One is kept free, for what is live in the next one that is cleaned. Who gains nothing from cleaning all has no
    // room.
    for (let left = this.#live.length; !this.#fits(bytes) && this.#free.length < 2; left--) {
      if (left === 0) throw new RangeError(`the log is full: ${this.liveBytes} bytes are live`)
      this.#clean()
    }
    this.#append(page, bytes)
  }

  #fits(bytes: number): boolean {
    return this.#filled[this.#current] + bytes <= this.#segmentBytes
  }

  #forget(page: number): void {
    const segment = this.#segmentOf.get(page)
    if (segment === undefined) return
    this.#live[segment] -= this.#bytesOf.get(page)!
    this.#segmentOf.delete(page)
  }

  #append(page: number, bytes: number): void {
    if (!this.#fits(bytes)) this.#current = this.#free.pop()!
    const segment = this.#current
    this.#filled[segment] += bytes
    this.#live[segment] += bytes
    this.#pages[segment].push(page)
    this.#segmentOf.set(page, segment)
    this.#bytesOf.set(page, bytes)
    this.writtenBytes += bytes
  }

  #clean(): void {
    let victim = -1
    for (let segment = 0; segment < this.#live.length; segment++)
      if (segment !== this.#current && this.#filled[segment] > 0)
        if (victim < 0 || this.#live[segment] < this.#live[victim]) victim = segment
    const pages = this.#pages[victim]
    this.#pages[victim] = []
    // Each page once, however often it was appended here: of these only the last is live.
    const live = new Set(pages.filter((page) => this.#segmentOf.get(page) === victim))
    for (const page of live) {
      this.#forget(page)
      this.#append(page, this.#bytesOf.get(page)!)
    }
    this.#filled[victim] = 0
    this.#live[victim] = 0
    this.#free.unshift(victim)
  }
}
