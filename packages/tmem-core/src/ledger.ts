/**
 * Who has which block, and what is owed for it: every change of that is made here, so that the directory, the places,
 * the counts and the accounts of the clients say the same at every moment.
 *
 * Invariants: a location of a slow place is known to exactly one entry, as its place or as its clean copy, or to a
 * flight; a read in progress whose location is given up is marked as stale before the location can be given out again;
 * a client is charged for what its persistent pages take in memory, and for nothing else.
 */
import {
  bytesPerObject,
  bytesPerPage,
  bytesPerResident,
  codecIn,
  type Directory,
  EPHEMERAL,
  lengthIn,
  MAIN,
  placeIn,
  samePlace,
  TRIED,
  tagOf,
} from './directory.ts'
import { none } from './handles.ts'
import { History, moved, nowhere } from './history.ts'
import { SinkClock } from './order.ts'
import { TmemError } from './outcomes.ts'
import { Block, type BlockCodec, type Flight, isSlow, type MovedBlock, maxBlockBytes } from './place.ts'
import type { Read } from './reads.ts'
import { copyBytes } from './runtime.ts'
import { type OpenPlace, type PoolKind, Seat } from './seat.ts'
import type { LayerContext } from './store.ts'

export interface LedgerOptions {
  readonly places: readonly OpenPlace[]
  readonly directory: Directory
  readonly codec: BlockCodec
  readonly pools: readonly (PoolKind | undefined)[]
  readonly context: LayerContext
  /** Where several directories share the places: which of them this is. */
  readonly share?: LedgerShare
}

/** What tells the ledgers of a stack with several directories apart. */
export interface LedgerShare {
  /** Added to the numbers by which places know what is ours. */
  readonly base: number
  /** Finds the ledger of a resident that a place has moved. */
  readonly moved: MovedBlock
}

export class Ledger {
  readonly seats: readonly Seat[]
  readonly directory: Directory
  readonly codec: BlockCodec
  /** The block that is being put, and one that is on the move meanwhile. */
  readonly block: Block = new Block()
  readonly moving: Block = new Block()
  /** All reads that are under way. */
  reads: readonly Read[] = []
  /** Added to the numbers of entries and residents by which places know them. */
  readonly base: number
  /** Told by a place of a block that it has moved. */
  readonly moved: MovedBlock
  /** By place: bytes that the block of an entry takes there. */
  readonly sizes: readonly ((entry: number) => number)[]
  /** The last moves; absent where nobody wants to know them. */
  readonly history: History | undefined
  /** A page for blocks that must be decoded on their way down. */
  page: Uint8Array = new Uint8Array(0)
  /** Pages that were decoded on their way, and encoded. */
  decoded = 0
  encoded = 0
  /** Pages encoded although a block of them lay below: they had risen to where pages are kept as they are. */
  encodedAgain = 0
  readonly #pools: readonly (PoolKind | undefined)[]
  readonly #context: LayerContext
  #countedObjects = 0

  /** Throws `TmemError` (`TMEM_NO_MEMORY`). */
  constructor({ places, directory, codec, pools, context, share }: LedgerOptions) {
    this.directory = directory
    this.codec = codec
    this.#pools = pools
    this.#context = context
    let slow = 0
    const clock = new SinkClock(directory)
    this.seats = places.map(
      (open, number) => new Seat(number, open, directory, context.allocator, isSlow(open.place) ? slow++ : 0, clock),
    )
    const { history: records, clock: now, allocator } = context
    this.history =
      records === undefined || now === undefined
        ? undefined
        : new History({ table: directory.table, records, clock: now, allocator })
    this.base = share?.base ?? 0
    this.moved = share?.moved ?? ((resident, location) => directory.moveBlock(resident, location))
    this.sizes = this.seats.map(
      ({ memory }) =>
        (entry: number) =>
          memory === undefined ? 0 : memory.sizeOf(lengthIn(directory.stateOf(entry))),
    )
  }

  /** Bytes that a client pays for a block in memory. */
  chargeOf({ foreign, memory }: Seat, length: number): number {
    return foreign ? 0 : bytesPerPage + bytesPerResident + memory!.sizeOf(length)
  }

  /**
   * Takes the metadata of one block more, as far as there never were so many, out of the limit of its place. Each may
   * be an object by itself; objects beyond that are those of pages elsewhere. False: there is no room for it.
   */
  charge(seat: Seat): boolean {
    const { pages, table } = this.directory
    const blocks = pages[seat.number]! + 1
    const moreBlocks = Math.max(0, blocks - seat.countedBlocks)
    const mayHave = seat.countedBlocks + moreBlocks - seat.countedObjects
    const moreObjects = Math.max(0, Math.min(table.objects - this.#countedObjects, mayHave))
    if (moreBlocks === 0 && moreObjects === 0) return true
    if (!seat.memory!.charge(moreBlocks * (bytesPerPage + bytesPerResident) + moreObjects * bytesPerObject))
      return false
    seat.countedBlocks += moreBlocks
    seat.countedObjects += moreObjects
    this.#countedObjects += moreObjects
    return true
  }

  /** A shared ephemeral page was used: it is the newest now. */
  touch(entry: number): void {
    const place = this.directory.placeOf(entry)
    if (place === samePlace) return
    const seat = this.seats[place]!
    if (seat.memory !== undefined) this.requeue(seat, entry, this.directory.residentOf(entry), EPHEMERAL)
  }

  requeue(seat: Seat, entry: number, resident: number, queue: number): void {
    const bytes = this.sizes[seat.number]!(entry)
    this.directory.unlink(seat.number, resident, entry, bytes)
    this.directory.append(seat.number, queue, resident, entry, bytes)
  }

  /** Whether a page can go for nothing: it has a clean copy below, and no other memory place comes before that. */
  isClean(seat: Seat, resident: number): boolean {
    const { directory } = this
    if (directory.copyOf(resident) === none) return false
    const below = this.seats[seat.number + 1]!
    return below.memory === undefined || below.number > directory.copyPlaceOf(resident)
  }

  /** A page that has a clean copy goes for nothing. */
  dropClean(seat: Seat, entry: number, resident: number): void {
    const { directory } = this
    const isEphemeral = directory.queueOf(entry) === EPHEMERAL
    this.dropToCopy(seat, entry, resident)
    seat.counters.droppedClean++
    this.history?.note(moved.sunk_clean, entry, seat.number, directory.placeOf(entry))
    seat.savedWrites = Math.min(seat.savedWrites + 1, directory.pages[seat.number]!)
    if (!isEphemeral) seat.order.sank(directory.isMainGhost(entry))
  }

  /** Gives the block in memory up in favour of its clean copy. */
  dropToCopy(seat: Seat, entry: number, resident: number): void {
    const { directory } = this
    const place = directory.copyPlaceOf(resident)
    const location = directory.copyOf(resident)
    this.seats[place]!.counters.sunkClean++
    this.leaveMemory(seat, entry, resident, place, location, directory.copyUnitsOf(resident))
  }

  /** A page is in a slow place from now on: its block in memory is given up. */
  leaveMemory(seat: Seat, entry: number, resident: number, place: number, location: number, units: number): void {
    const { directory } = this
    const memory = seat.memory!
    const state = directory.stateOf(entry)
    const length = lengthIn(state)
    const main = directory.queueOf(entry) === MAIN
    const huge = this.isHuge(seat, entry)
    directory.unlink(seat.number, resident, entry, memory.sizeOf(length))
    memory.free(directory.blockOf(resident), length, this.poolOf(entry).blockBytes)
    if (directory.copyOf(resident) !== none) directory.dropCopy(resident)
    directory.releaseResident(resident)
    this.poolOf(entry).account?.release(this.chargeOf(seat, length))
    directory.leave(entry)
    directory.setSlow(entry, place, location, units, main, seat.order.epochOf(main), huge)
  }

  /**
   * Frees whatever holds the page of an entry, clean copies included. The entry stays in the table, nowhere. `forget`:
   * what survives the process may keep it for the next one.
   */
  vacate(entry: number, forget: boolean = false): void {
    const { directory } = this
    // A put that a broken rule has stopped in the middle leaves one behind.
    if (directory.isNowhere(entry)) return
    const state = directory.stateOf(entry)
    const place = placeIn(state)
    const pool = this.poolOf(entry)
    if (place === samePlace) {
      pool.account?.release(bytesPerPage)
      directory.leave(entry)
      return
    }
    const seat = this.seats[place]!
    seat.counters.gone++
    // What is only forgotten here is with its pool's end.
    if (seat.number > 0 && !forget) this.history?.note(moved.gone, entry, seat.number, nowhere)
    if (seat.memory === undefined) this.freeSlow(seat, directory.locationOf(entry), directory.unitsOf(entry), forget)
    else {
      const resident = directory.residentOf(entry)
      const length = lengthIn(state)
      if (directory.copyOf(resident) !== none) {
        this.endCopy(resident)
        seat.savedWrites = Math.max(0, seat.savedWrites - 1)
      }
      directory.unlink(place, resident, entry, seat.memory.sizeOf(length))
      seat.memory.free(directory.blockOf(resident), length, pool.blockBytes)
      directory.releaseResident(resident)
      pool.account?.release(this.chargeOf(seat, length))
    }
    directory.leave(entry)
  }

  /** Removes a block wherever it is. */
  drop(entry: number, forget: boolean = false): void {
    this.vacate(entry, forget)
    this.directory.remove(entry)
  }

  /** Removes the page of a block, with all its parts. */
  dropPage(entry: number): void {
    const { table } = this.directory
    const pool = this.poolOf(entry)
    if (pool.parts === 1) {
      this.drop(entry)
      return
    }
    const object = table.objectOf(entry)
    const index = table.indexOf(entry)
    const first = index - (index % pool.parts)
    for (let part = first; part < first + pool.parts; part++) {
      const found = table.find(pool.number, object, part)
      // One that is nowhere is just being put.
      if (found !== none && !this.directory.isNowhere(found)) this.drop(found)
    }
  }

  /** Drops an ephemeral page whose room is needed. */
  evict(entry: number): void {
    const { directory } = this
    const { table } = directory
    this.seats[directory.placeOf(entry)]!.counters.droppedEphemeral++
    this.poolOf(entry).wasDropped(table.objectOf(entry), table.indexOf(entry))
    this.dropPage(entry)
  }

  /** Gives up the clean copy of a resident. */
  endCopy(resident: number): void {
    const { directory } = this
    const below = this.seats[directory.copyPlaceOf(resident)]!
    this.freeSlow(below, directory.copyOf(resident), directory.copyUnitsOf(resident))
    directory.dropCopy(resident)
  }

  /**
   * A place had no room for so many units: as many go of what pages in memory do not need, so that the next ones find
   * some.
   */
  giveUpCopies(seat: Seat, units: number): void {
    const { directory } = this
    let freed = 0
    for (let left = directory.copyWatermark; left > 0 && freed < units && directory.copies > 0; left--) {
      seat.copyHand = (seat.copyHand + 1) % directory.copyWatermark
      const resident = seat.copyHand
      if (directory.copyOf(resident) === none || directory.copyPlaceOf(resident) !== seat.number) continue
      freed += directory.copyUnitsOf(resident)
      this.endCopy(resident)
    }
  }

  freeSlow(seat: Seat, location: number, units: number, forget: boolean = false): void {
    this.stale(seat, location)
    seat.gaveUp(units)
    const slow = seat.slow!
    if (forget && slow.forget !== undefined) slow.forget(location, units)
    else slow.free(location, units)
  }

  /** Whoever is reading there has to look again. */
  stale(seat: Seat, location: number): void {
    for (const read of this.reads) if (read.location === location && read.seat === seat) read.stale = true
  }

  /** Gives up the block in memory of a page that has a clean copy, which stays. False when it has none. */
  release(entry: number): boolean {
    const { directory } = this
    const place = directory.placeOf(entry)
    if (place === samePlace) return false
    const seat = this.seats[place]!
    if (seat.memory === undefined) return true
    const resident = directory.residentOf(entry)
    if (directory.copyOf(resident) === none) return false
    // It is in use, not cold: it counts as of the main queue.
    if (directory.queueOf(entry) !== MAIN) this.requeue(seat, entry, resident, MAIN)
    this.dropToCopy(seat, entry, resident)
    seat.counters.released++
    this.history?.note(moved.released, entry, seat.number, directory.placeOf(entry))
    return true
  }

  /** A checksum of a handle: what a frame has, so that nobody else's frame is taken for it. */
  tagOf(entry: number): number {
    const { table } = this.directory
    return tagOf(this.poolOf(entry).key, table.objectOf(entry), table.indexOf(entry))
  }

  poolOf(entry: number): PoolKind {
    return this.#pools[this.directory.table.poolOf(entry)]!
  }

  /** Whether the page of an entry does not shrink, as far as anybody has tried. */
  isHuge(seat: Seat, entry: number): boolean {
    const state = this.directory.stateOf(entry)
    return codecIn(state) === 0 && (!seat.raw || (state & TRIED) !== 0)
  }

  /** A damaged block does not move: a get reports it. It goes behind all others, so that it stops nobody. */
  keepDamaged(seat: Seat, entry: number, resident: number): void {
    seat.counters.corrupt++
    if (this.directory.queueOf(entry) === EPHEMERAL) this.evict(entry)
    else this.requeue(seat, entry, resident, MAIN)
  }

  /**
   * Puts `block` where the page of an entry is, of the same length and in memory. False: the place cannot do that, and
   * nothing was done.
   */
  overwrite({ memory }: Seat, entry: number): boolean {
    if (memory?.overwrite === undefined) return false
    const { directory } = this
    const resident = directory.residentOf(entry)
    memory.overwrite(directory.blockOf(resident), this.block)
    directory.setFlight(entry, 0)
    if (directory.copyOf(resident) !== none) this.endCopy(resident)
    return true
  }

  /**
   * Brings the block of a resident to `#moving`, in the form that `target` takes: decoded where that keeps pages as
   * they are, encoded where it was a page as it is and `target` compresses. Returns its checksum, or `undefined` when
   * it is damaged.
   */
  fetchBlock(seat: Seat, entry: number, resident: number, target: Seat): number | undefined {
    const { directory, codec } = this
    const state = directory.stateOf(entry)
    const pool = this.poolOf(entry)
    const moving = this.moving
    const { workspace, spareAt } = codec
    moving.pageBytes = pool.blockBytes
    moving.persistent = pool.attributes.persistent
    moving.length = lengthIn(state)
    moving.codec = codecIn(state)
    moving.bytes = workspace
    moving.at = spareAt
    seat.memory!.get(directory.blockOf(resident), moving)
    if (seat.raw && target.place.codec !== undefined && (state & TRIED) === 0) {
      const to = spareAt + maxBlockBytes
      const length = codec.encode(workspace, spareAt, moving.length, to, moving.length - 1)
      this.encoded++
      if (directory.copyOf(resident) !== none) this.encodedAgain++
      if (length > 0) {
        moving.at = to
        moving.length = length
        moving.codec = codec.id
      } else directory.flag(entry, TRIED, 0)
    }
    const checksum = codec.checksum(moving.codec, moving.at, moving.length)
    if (!seat.raw && !directory.isSum(resident, checksum)) return undefined
    if (!target.raw || moving.codec === 0) return target.raw ? 0 : checksum
    this.decoded++
    if (!codec.decode(moving.codec, spareAt, moving.length, this.page, 0, pool.blockBytes)) return undefined
    moving.bytes = this.page
    moving.at = 0
    moving.length = pool.blockBytes
    moving.codec = 0
    return 0
  }

  /** The entry that a frame of a flight is of. */
  entryIn(flight: Flight, frame: number): number {
    return flight.owners[frame]! - this.base
  }

  /** Makes room for decoding pages of that size on their way. False: no memory. */
  reservePage(bytes: number): boolean {
    if (this.page.length >= bytes) return true
    const memory = this.#context.allocator.allocate(bytes, 'chain.page')
    if (memory === undefined) return this.page.length >= bytes
    this.page = new Uint8Array(memory, 0, bytes)
    return true
  }

  /** Whether the page of an entry is in memory, as that resident. */
  isResident(entry: number, resident: number): boolean {
    const { directory } = this
    if (entry >= directory.capacity || directory.isNowhere(entry)) return false
    const place = directory.placeOf(entry)
    return this.seats[place]?.memory !== undefined && directory.residentOf(entry) === resident
  }

  /** An error about a page. */
  error(code: 'TMEM_IO' | 'TMEM_CORRUPT', seat: Seat, entry: number, what: string, cause?: Error): TmemError {
    const { table } = this.directory
    const handle = `pool ${table.poolOf(entry)} object ${table.objectOf(entry)} index ${table.indexOf(entry)}`
    const why = cause === undefined ? '' : `: ${cause.message}`
    return new TmemError(code, `${seat.place.name}: ${what} (${handle})${why}`, {
      layer: seat.place.name,
      handle,
      cause,
    })
  }

  /** Makes a page of the block at the start of the workspace. */
  decode(codec: number, length: number, into: Uint8Array, to: number, pageBytes: number): boolean {
    if (codec !== 0) return this.codec.decode(codec, 0, length, into, to, pageBytes)
    copyBytes.call(this.codec.workspace, into, to, 0, pageBytes)
    return true
  }
}
