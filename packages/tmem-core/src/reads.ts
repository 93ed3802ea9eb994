/**
 * Reads from slow places that are under way, and the memory that they fill.
 *
 * The memory is taken when the stack is made: a page that cannot be read for want of it would be lost to its caller.
 * Each read has as much of it as its block takes, so there is room for 16 blocks of the largest size, or for about 270
 * pages of 4 KiB. Of one place as many reads are under way as its traits say (`readsAtOnce`): a disk has its hands full
 * with a few, while from another machine all that is asked for together comes in one message.
 *
 * Invariants: no byte belongs to two reads; of no place are more under way than it wants; who waits for memory is
 * overtaken by nobody, who waits for a turn of its place only by those that read from other ones.
 */
import { none } from './handles.ts'
import { TmemError } from './outcomes.ts'
import { maxBlockBytes, maxRoundingBytes } from './place.ts'
import type { Seat } from './seat.ts'
import type { LayerContext } from './store.ts'

/** Blocks of the largest size that are read at once; and blocks of any size from a place that does not say. */
const largestAtOnce = 16
/** Bytes in which memory is given out: a page of 4 KiB with a header, in units of 64. */
const grainBytes = 4096 + 64

/** A read under way. */
export class Read {
  readonly bytes: Uint8Array
  readonly words: Int32Array
  /** Which grain of the memory is its first. */
  readonly grain: number
  /** What is read; `none` until that is certain. */
  seat: Seat
  location: number = none
  /** What was asked for was given up, or moved, meanwhile. */
  stale = false
  /** Where it is among those under way. */
  slot = -1

  constructor(memory: ArrayBufferLike, grain: number, grains: number, seat: Seat) {
    const length = grains * grainBytes
    this.bytes = new Uint8Array(memory, grain * grainBytes, length)
    this.words = new Int32Array(memory, grain * grainBytes, length >>> 2)
    this.grain = grain
    this.seat = seat
  }
}

/** Somebody who waits for a read of so many bytes; the lower the ticket, the longer. */
interface Waiter {
  readonly ticket: number
  readonly bytes: number
  readonly resolve: (read: Read | undefined) => void
}

/** The reads of one place. */
interface Turns {
  readonly seat: Seat
  readonly most: number
  underWay: number
  readonly waiting: Waiter[]
}

export class Reads {
  /** All that are under way. */
  readonly underWay: Read[] = []
  readonly #memory: ArrayBufferLike = new ArrayBuffer(0)
  /** By grain: 1 while it belongs to a read; and the last read that began there, which may serve again. */
  readonly #used: Uint8Array = new Uint8Array(0)
  readonly #made: (Read | undefined)[] = []
  /** By number of the seat. */
  readonly #turns: readonly Turns[]
  #waiting = 0
  #nextTicket = 0
  /** Called when no read is under way any more. */
  #allBack: (() => void) | undefined
  #closed = false

  /** Throws `TmemError` (`TMEM_NO_MEMORY`). */
  constructor(seats: readonly Seat[], { allocator, io }: LayerContext) {
    const isBlocking = io === 'blocking'
    this.#turns = seats.map(
      (seat): Turns => ({
        seat,
        most: isBlocking ? 1 : (seat.place.traits.readsAtOnce ?? largestAtOnce),
        underWay: 0,
        waiting: [],
      }),
    )
    const largest = seats.flatMap((seat) =>
      // A place may round up to whole blocks.
      seat.slow === undefined ? [] : [seat.unitsFor(maxBlockBytes) * seat.slow.unitBytes + maxRoundingBytes],
    )
    if (largest.length === 0) return
    const grains = Math.ceil(Math.max(...largest) / grainBytes) * (isBlocking ? 1 : largestAtOnce)
    const memory = allocator.allocate(grains * grainBytes, 'chain.reads')
    if (memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `no memory to read pages (${grains * grainBytes} bytes)`, {
        layer: 'chain',
      })
    this.#memory = memory
    this.#used = new Uint8Array(grains)
  }

  /** A read of so many bytes from a place, if it can begin at once. */
  lend(seat: Seat, bytes: number): Read | undefined {
    return this.#closed || this.#waiting > 0 ? undefined : this.#take(seat, bytes)
  }

  /** The same, when it is its turn; `undefined` when the stack was closed meanwhile. */
  wait(seat: Seat, bytes: number): Promise<Read | undefined> {
    return new Promise((resolve) => {
      if (this.#closed) {
        resolve(undefined)
        return
      }
      this.#turns[seat.number]!.waiting.push({ ticket: this.#nextTicket++, bytes, resolve })
      this.#waiting++
      this.#serve()
    })
  }

  giveBack(read: Read): void {
    const last = this.underWay.pop()!
    if (last !== read) {
      this.underWay[read.slot] = last
      last.slot = read.slot
    }
    read.location = none
    this.#turns[read.seat.number]!.underWay--
    this.#used.fill(0, read.grain, read.grain + read.bytes.length / grainBytes)
    if (this.#waiting > 0) this.#serve()
    if (this.underWay.length === 0) this.#allBack?.()
  }

  #take(seat: Seat, bytes: number): Read | undefined {
    const turns = this.#turns[seat.number]!
    if (turns.underWay >= turns.most) return undefined
    const grains = Math.ceil(bytes / grainBytes)
    const grain = this.#free(grains)
    if (grain < 0) return undefined
    let read = this.#made[grain]
    if (read?.bytes.length !== grains * grainBytes) {
      read = new Read(this.#memory, grain, grains, seat)
      this.#made[grain] = read
    }
    read.seat = seat
    read.stale = false
    read.slot = this.underWay.push(read) - 1
    this.#used.fill(1, grain, grain + grains)
    turns.underWay++
    return read
  }

  /** The first of so many grains in a row that are free; -1: there are none. */
  #free(grains: number): number {
    const used = this.#used
    for (let first = used.indexOf(0); first >= 0 && first + grains <= used.length; ) {
      const end = used.indexOf(1, first)
      if (end < 0 || end - first >= grains) return first
      first = used.indexOf(0, end)
    }
    return -1
  }

  /** Lets those begin that waited longest, until one of them lacks memory. */
  #serve(): void {
    for (;;) {
      let next: Turns | undefined
      for (const turns of this.#turns) {
        const [waiter] = turns.waiting
        if (waiter === undefined || turns.underWay >= turns.most) continue
        if (next === undefined || waiter.ticket < next.waiting[0]!.ticket) next = turns
      }
      if (next === undefined) return
      const read = this.#take(next.seat, next.waiting[0]!.bytes)
      if (read === undefined) return
      this.#waiting--
      next.waiting.shift()!.resolve(read)
    }
  }

  /** Nothing is read any more; who waits is told. */
  close(): void {
    this.#closed = true
    this.#waiting = 0
    for (const { waiting } of this.#turns) for (const { resolve } of waiting.splice(0)) resolve(undefined)
  }

  /** Resolves when no read is under way any more: they need their memory and their places. */
  async settle(): Promise<void> {
    if (this.underWay.length === 0) return
    await new Promise<void>((resolve) => {
      this.#allBack = resolve
    })
  }
}
