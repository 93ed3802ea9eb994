/**
 * Reading from slow places: a page that is asked for rises to memory, if there is room for it without failing anybody.
 *
 * A page that rose keeps its block below as a clean copy, so that sinking again writes nothing; where content survives
 * the process it is given up there.
 */
import { type Directory, EPHEMERAL, TRIED } from './directory.ts'
import { sealOf } from './frame.ts'
import { moved } from './history.ts'
import type { Ledger } from './ledger.ts'
import { TmemError } from './outcomes.ts'
import { frameBytes } from './place.ts'
import { type Read, Reads } from './reads.ts'
import { copyBytes } from './runtime.ts'
import type { PoolKind, Seat } from './seat.ts'
import type { Sinking } from './sinking.ts'
import type { LayerContext } from './store.ts'

export class Rising {
  readonly seats: readonly Seat[]
  readonly directory: Directory
  readonly reads: Reads
  readonly #ledger: Ledger
  readonly #sinking: Sinking
  readonly #context: LayerContext
  #closed = false

  /** Throws `TmemError` (`TMEM_NO_MEMORY`). */
  constructor(ledger: Ledger, sinking: Sinking, context: LayerContext) {
    this.seats = ledger.seats
    this.directory = ledger.directory
    this.reads = new Reads(ledger.seats, context)
    ledger.reads = this.reads.underWay
    this.#ledger = ledger
    this.#sinking = sinking
    this.#context = context
  }

  /**
   * Reads the page of an entry, which is in the place that the read is of, to `into[to]`, and takes it out of a private
   * ephemeral pool. True: it is there. False: it changed meanwhile, or was ephemeral and is gone: look again. Rejects
   * with `TmemError` (`TMEM_IO`, `TMEM_CORRUPT`): a persistent page stays.
   */
  async read(read: Read, entry: number, into: Uint8Array, to: number): Promise<boolean> {
    const { directory } = this
    const { seat } = read
    const slow = seat.slow!
    const location = directory.locationOf(entry)
    const units = directory.unitsOf(entry)
    read.location = location
    let failure: Error | undefined
    try {
      if (this.#context.io === 'blocking' && slow.readNow !== undefined) slow.readNow(location, units, read.bytes)
      else await slow.read(location, units, read.bytes)
    } catch (error) {
      if (!(error instanceof Error)) throw error
      failure = error
    }
    if (read.stale || this.#closed) {
      seat.counters.staleReads++
      return false
    }
    const pool = this.#ledger.poolOf(entry)
    const isHere = directory.placeOf(entry) === seat.number
    // Somebody else may have brought it up meanwhile: what was read is the same.
    if (failure !== undefined && !isHere) return false
    const error =
      failure === undefined ? this.#arrived(read, entry, units, into, to) : this.#notRead(seat, entry, failure)
    // What follows is done at once: whoever fetches the same page sees one state or the other.
    const { persistent, shared } = pool.attributes
    if (error !== undefined) {
      if (persistent) throw error
      // An ephemeral page may vanish at any time.
      this.#ledger.dropPage(entry)
      pool.ended('corrupt_dropped')
      return false
    }
    if (!persistent && !shared && pool.parts === 1) {
      this.#ledger.drop(entry)
      pool.ended('got')
    }
    return true
  }

  #notRead(seat: Seat, entry: number, failure: Error): TmemError {
    if (failure instanceof TmemError && failure.code === 'TMEM_CORRUPT') {
      seat.counters.corrupt++
      return this.#ledger.error('TMEM_CORRUPT', seat, entry, failure.message)
    }
    seat.counters.failedReads++
    return this.#ledger.error('TMEM_IO', seat, entry, 'cannot read the page', failure)
  }

  /** Makes the page of what was read, and lets it rise. Returns what is wrong with it. */
  #arrived(read: Read, entry: number, units: number, into: Uint8Array, to: number): TmemError | undefined {
    const { directory } = this
    const { seat } = read
    const pool = this.#ledger.poolOf(entry)
    const isHere = directory.placeOf(entry) === seat.number
    seat.counters.reads++
    if (seat.raw) {
      copyBytes.call(read.bytes, into, to, 0, pool.blockBytes)
      if (isHere) this.#rise(read, entry, pool, seat, 0, 0, pool.blockBytes, 0, into, to)
      return undefined
    }
    const form = read.words[1]!
    const length = (form & 0xffff) + 1
    const codec = (form >>> 16) & 15
    const { workspace } = this.#ledger.codec
    const checksum = read.words[0]! ^ sealOf(form, read.words[2]!)
    const fits = read.words[2] === this.#ledger.tagOf(entry) && this.#isFrame(seat, length, codec, units, pool)
    if (fits) copyBytes.call(read.bytes, workspace, 0, frameBytes, frameBytes + length)
    if (
      !fits ||
      this.#ledger.codec.checksum(codec, 0, length) !== checksum ||
      !this.#ledger.decode(codec, length, into, to, pool.blockBytes)
    ) {
      seat.counters.corrupt++
      return this.#ledger.error('TMEM_CORRUPT', seat, entry, 'what came back is not what was written')
    }
    if (isHere) this.#rise(read, entry, pool, seat, codec, frameBytes, length, checksum, into, to)
    return undefined
  }

  #isFrame(seat: Seat, length: number, codec: number, units: number, pool: PoolKind): boolean {
    // A place may have rounded up.
    return seat.unitsFor(length) <= units && (codec !== 0 || length === pool.blockBytes)
  }

  /**
   * Brings a block that was just read up into memory, if there is room for it without failing anybody. `page[pageAt]`
   * is the page that it was made of.
   */
  #rise(
    read: Read,
    entry: number,
    pool: PoolKind,
    seat: Seat,
    codec: number,
    at: number,
    length: number,
    checksum: number,
    page: Uint8Array,
    pageAt: number,
  ): void {
    const { persistent, shared } = pool.attributes
    if (!persistent && !shared) return
    const upper = this.seats.find(
      (one) => one.memory !== undefined && one.number < seat.number && one.keeps(persistent),
    )
    if (upper === undefined) return
    const { directory } = this
    const { block } = this.#ledger
    this.#sinking.prepare(pool.blockBytes)
    if (read.stale || directory.placeOf(entry) !== seat.number) return
    const queue = persistent ? upper.order.queueFor(entry) : EPHEMERAL
    block.pageBytes = pool.blockBytes
    block.persistent = persistent
    let sum = checksum
    if (upper.raw && codec !== 0) {
      block.bytes = page
      block.at = pageAt
      block.length = pool.blockBytes
      block.codec = 0
    } else {
      block.bytes = read.bytes
      block.at = at
      block.length = length
      block.codec = codec
      if (seat.raw && !upper.raw) {
        copyBytes.call(read.bytes, this.#ledger.codec.workspace, 0, 0, length)
        sum = this.#ledger.codec.checksum(0, 0, length)
      }
    }
    const resident = this.#sinking.allocate(upper, pool)
    if (resident < 0) {
      upper.refused[-resident]!++
      return
    }
    if (directory.isNowhere(entry)) {
      // It was what had to go for it.
      this.#sinking.cancel(upper, pool, resident)
      return
    }
    // It may have moved meanwhile.
    const location = directory.locationOf(entry)
    const units = directory.unitsOf(entry)
    const huge = directory.isHuge(entry)
    directory.leave(entry)
    this.#sinking.enter(upper, entry, resident, queue, sum)
    if (huge && upper.raw) directory.flag(entry, TRIED, 0)
    upper.counters.rose++
    seat.counters.raised++
    this.#ledger.history?.note(moved.rose, entry, seat.number, upper.number)
    if (seat.keepsCopies) directory.setCopy(resident, seat.number, location, units)
    else this.#ledger.freeSlow(seat, location, units)
  }

  /** Nothing is read any more; who waits for a read is told. */
  close(): void {
    this.#closed = true
    this.reads.close()
  }
}
