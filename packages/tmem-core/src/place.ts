/**
 * What a place is: where blocks rest. A stack is a chain of places (`chain.ts`); no place knows another one.
 *
 * A block is a page of up to 64 KiB on its way or at rest: `length` bytes, written by the codec of number `codec` (0:
 * the page as it is), with a checksum. A larger page is kept in parts of 64 KiB.
 *
 * A place names what it holds by locations, numbers of its own. There are two kinds. A *memory place* answers at once;
 * the chain knows length, codec and checksum of each of its blocks. A *slow place* may have to wait (disk, network); it
 * takes many blocks in one transfer, a flight, in which each is framed: a header with length, codec and checksum in
 * front of the bytes. So the chain needs no memory for them, and what comes back is known to be what was sent, and for
 * which page.
 *
 * Rules that every place keeps (asserted by the checked boundary and by the place suite of @tmem/conformance):
 *  1. What a place has taken it keeps, byte for byte, until `free`; a location in use is never given out again.
 *  2. What a place refuses leaves nothing behind in it.
 *  3. Taking and refusing are synchronous in a memory place. A slow place has taken a block when the promise of `write`
 *     has resolved, not before, and only where it has set a location.
 *  4. A place evicts nothing by itself. Who goes, and where to, is the chain's business.
 *  5. Buffers belong to the caller: they are read or filled during the call (a flight: until its promise settles).
 *  6. `free` cannot fail.
 *
 * Sources: the storage allocators of nbdkit (a back end in few functions, the header says which can fail); zswap's and
 * zram's writeback, whose unit is one page, and why here it is a flight.
 */
import type { PutOutcome } from './outcomes.ts'
import type { Budget, LayerContext, ObjectId, Progress, StatsNode } from './store.ts'

/** Largest block, in bytes of page. */
export const maxBlockBytes: number = 64 * 1024

/** Largest location that a place may give out. */
export const maxLocation: number = 2 ** 32 - 2

/** Bytes of the header of a framed block. */
export const frameBytes = 16

/** Largest number of units of a framed block in a slow place. */
export const maxFrameUnits = 2048

/** Most bytes by which a slow place may raise the units of a frame, to whole blocks of its disk. */
export const maxRoundingBytes = 4096

/** What a place is able to do and promises: frozen data, known before it is opened. */
export interface PlaceTraits {
  /** Keeps pages that may not vanish. */
  readonly persistent: boolean
  /** Keeps pages that may vanish. */
  readonly ephemeral: boolean
  /** It may have to wait: a `SlowPlace`. */
  readonly waits: boolean
  /** What is acknowledged survives this (`sync` first, where it says `process` or `host`). */
  readonly survives: 'nothing' | 'process' | 'host'
  /** Takes pages as they are only: blocks are decoded for it. */
  readonly rawOnly: boolean
  /** Largest number of blocks at once: what the directory reserves room for. */
  readonly capacity: number
  /** Bytes of pages that are sure to find room, whatever their content: 0, none. */
  readonly reservedBytes: number
  /** Bytes of the largest page that it is worth offering it (in parts): 4 KiB to 2 MiB. */
  readonly maxPageSize: number
  /** Its memory belongs to somebody else (a hypervisor): no client is charged for it (default: false). */
  readonly foreign?: boolean
  /**
   * Blocks that it wants to be asked for at once, in a place that waits: 1 to 65,536 (default: 16). Many where they
   * come together, from far away; few where each takes its turn.
   */
  readonly readsAtOnce?: number
}

/** A block in somebody's memory. One object serves many blocks: nobody keeps it. */
export class Block {
  /** Where the block lies: `bytes[at, at + length)`. */
  bytes: Uint8Array = new Uint8Array(0)
  at = 0
  length = 0
  /** Who wrote it: a codec's number, 0 for a page as it is. */
  codec = 0
  /** Bytes of the page that it is made of, and whether that page may not vanish. */
  pageBytes = 0
  persistent = false
}

/** Makes blocks of pages and pages of blocks, in a workspace of its own. */
export interface BlockCodec {
  /**
   * Where blocks are made and read: three areas, at its start, at `spareAt` and 64 KiB behind that, each with room for
   * a page of 64 KiB. Who uses it leaves nothing there that the next one could need.
   */
  readonly workspace: Uint8Array
  readonly spareAt: number
  /** Number of the codec that `encode` uses: 1 to 15. 0: it never shrinks anything. */
  readonly id: number
  /**
   * Makes a block of `length` bytes of page at `bytes[at]`, at `workspace[to]`. Returns its bytes, at most `room`; 0:
   * the page does not shrink so far. `bytes` may be another area of the workspace.
   */
  encode(bytes: Uint8Array, at: number, length: number, to: number, room: number): number
  /**
   * Makes the page of `length` bytes at `into[to]` from the block of `size` bytes at `workspace[at]`. False: it is no
   * such block, or no codec of this number is known.
   */
  decode(codec: number, at: number, size: number, into: Uint8Array, to: number, length: number): boolean
  /** Checksum of the `size` bytes at `workspace[at]` and of the codec's number: 32 bits. */
  checksum(codec: number, at: number, size: number): number
}

/** Told by a place that it has moved a block of an owner. */
export type MovedBlock = (owner: number, location: number) => void

interface PlaceBase {
  /** Name as in the text of a stack, e.g. `zcache`. */
  readonly name: string
  readonly traits: PlaceTraits
  /** Why the last block was refused for want of the outside world, if it was: the system's own error. */
  readonly failure?: Error | undefined
  /** Makes and reads the blocks of this place, where it wants them compressed. */
  readonly codec?: BlockCodec
  /** Does background work of its own. */
  tick?(budget: Budget): Progress
  /** Resolves when the place takes blocks: it has connected, or recovered. Until then it refuses (`Unavailable`). */
  ready?(): Promise<void>
  /** Its statistics; the chain adds what it knows of the place. */
  stats(): StatsNode
  /** Gives everything back. Nothing is under way any more. Idempotent. */
  close(): Promise<void>
}

/** A place that answers at once. */
export interface MemoryPlace extends PlaceBase {
  /**
   * Gets memory for blocks of `length` bytes together, one of them or several, as far as limit and allocator allow.
   * Called before anything is half done: what the allocator does meanwhile may use the stack. Absent where `put` needs
   * none.
   */
  prepare?(length: number): void
  /**
   * Takes a block, copying it: its location, or a refusal as a negative `PutOutcome`. Evicts nothing. `owner` is a
   * number of the caller's, by which `moved` tells of it.
   */
  put(block: Block, owner: number): number
  /** Fills `into.bytes[into.at]` with the `into.length` bytes of a block. */
  get(location: number, into: Block): void
  /**
   * Writes a block over the one at a location, which has the same length and owner. Only where all blocks have one
   * size.
   */
  overwrite?(location: number, block: Block): void
  /** Gives a block up, of `length` bytes, made of a page of `pageBytes`. */
  free(location: number, length: number, pageBytes: number): void
  /** Bytes of memory that a block of `length` bytes takes here, whatever belongs to it alone. */
  sizeOf(length: number): number
  /**
   * Bytes that should sink so that puts find room: above 0 when the place is above its high mark, or above a lowered
   * limit.
   */
  excess(): number
  /** Bytes that blocks may take, all in all, when nothing else is here. */
  readonly limitBytes: number
  /** Bytes of memory that it has taken, metadata included. */
  readonly usedBytes: number
  /**
   * Makes smaller blocks than `codec`, at the price of more time: for pages that rest. Absent: nothing is compressed
   * again here.
   */
  readonly stronger?: BlockCodec
  /**
   * Takes bytes for the chain's own metadata of blocks here out of the place's limit; false when there is no room for
   * them.
   */
  charge(bytes: number): boolean
  /**
   * Moves a bounded number of blocks together so that one of `length` bytes may fit. False: there is nothing to gain.
   */
  fit?(length: number, moved: MovedBlock): boolean
  /**
   * Moves blocks together so that memory becomes free; says so with `moved`. Returns the blocks moved; 0: nothing to
   * gain.
   */
  compact?(blocks: number, moved: MovedBlock): number
  /** Throws an `Error` that names a broken invariant. For tests. */
  check?(owns: (owner: number, location: number) => boolean): void
}

/** A place that may have to wait. */
export interface SlowPlace extends PlaceBase {
  /** Bytes of the unit in which it counts: frames begin at multiples of it. A power of two, 16 to 4096. */
  readonly unitBytes: number
  /** Bytes that one flight carries at most. */
  readonly flightBytes: number
  /**
   * Whether a flight would be taken now. `forced`: the caller has no other way, so a budget for wear does not count.
   */
  open(forced: boolean): boolean
  /**
   * Takes the frames of a flight, and sets the location of each, or `none` where it refuses. Resolves when all of it is
   * safe (what is acknowledged has come to no error that could be known). Rejects when nothing of it is kept.
   */
  write(flight: Flight): Promise<void>
  /** The same, before it returns. Absent: the place cannot do that, and a put that would need it is refused. */
  writeNow?(flight: Flight): void
  /**
   * Fills `into` from its start with the `units` units at a location. Rejects with the system's error, or with
   * `TmemError` (`TMEM_CORRUPT`) where it knows by itself that they are not what was written.
   */
  read(location: number, units: number, into: Uint8Array): Promise<void>
  /** The same, before it returns: where the runtime's pool of threads may not be used. */
  readNow?(location: number, units: number, into: Uint8Array): void
  /**
   * Gives a block up. In a place that survives its process: for good, so that it does not come back after a restart.
   */
  free(location: number, units: number): void
  /**
   * Gives a block up in this run only: what survives keeps it for the next one (the pool was destroyed). Absent: as
   * `free`.
   */
  forget?(location: number, units: number): void
  /**
   * Hands over what an earlier run has left here of a pool, once for each key: asked again, because the pool was
   * destroyed and there is a new one, it gives up what it has of the old one. So it does with what the stack does not
   * take in.
   */
  recover?(pool: number, enter: RecoverBlock): void
  /** What was acknowledged before survives what the traits promise. Rejects with `TmemError`. */
  sync?(): Promise<void>
  /** Called once, before anything else: whom a place asks that regains space by moving frames. */
  attach?(owners: Owners): void
  /** Throws an `Error` unless exactly these blocks are here. For tests. */
  check?(blocks: readonly { readonly location: number; readonly units: number }[]): void
}

/**
 * Enters a block that survived into the directory: the number of its owner, or `none`: there is no room, or the handle
 * is known already.
 */
export type RecoverBlock = (object: ObjectId, index: number, location: number, units: number) => number

/** What a slow place may ask the stack about its frames. An owner is the number that a flight gave for a frame. */
export interface Owners {
  /** Units of the frame of an owner at a location, as the place gave them; 0: there is none in use. */
  unitsAt(owner: number, location: number): number
  /**
   * The frame has moved, and takes so many units there. False: it was given up meanwhile, and so is the new location.
   */
  moved(owner: number, from: number, to: number, units: number): boolean
  /** The room of an ephemeral page is needed: it is dropped, and its frame freed. False: it cannot go. */
  drop(owner: number, location: number): boolean
  /**
   * The frame is wanted away from here: its page comes up into memory, or is there already, and the frame is freed.
   * `where` room: only while the memory above is less than half full. False: it has no room there, or could not be
   * read, and stays. A private ephemeral page never comes up by itself. Never rejects.
   */
  recall(owner: number, location: number, where: 'anyhow' | 'room'): Promise<boolean>
  /** The handle of an owner that is on a flight or here: its pool's key (the same in every run), object and index. */
  poolOf(owner: number): number
  /** Whether the page of an owner may not vanish. A flight under way may outlive its owners: ask before it goes. */
  isPersistent(owner: number): boolean
  objectOf(owner: number): ObjectId
  indexOf(owner: number): number
  /** Whether a frame of a flight under way is still the page of its owner: not flushed, taken or put anew meanwhile. */
  isCurrent(flight: Flight, frame: number): boolean
  /**
   * The flight is safe, and its locations are set: the stack notes them before this returns. For a place that survives
   * its process: between what makes frames last and this nothing may come that changes their pages, and the promise of
   * `write` resolves later. Called or not, the stack notes them when that has resolved.
   */
  landed(flight: Flight): void
}

export type Place = MemoryPlace | SlowPlace

/** Whether a place may have to wait. */
export const isSlow = (place: Place): place is SlowPlace => place.traits.waits

/** What a layer that is a place exports: data, and how to open it. */
export interface PlacePlan {
  readonly traits: PlaceTraits
  /** Opens the place. Throws `TmemError` when it cannot be, with nothing left behind. */
  open(context: LayerContext): Place
}

/** Frames on their way to a slow place. The chain fills it; the place reads it and sets `locations`. */
export class Flight {
  /** The frames, each at a multiple of the place's unit, one behind the other. */
  readonly bytes: Uint8Array
  readonly words: Int32Array
  /**
   * Per frame: where it begins, its units (the place may raise the number by up to `maxRoundingBytes`), and where it is
   * from now on (`none`: refused).
   */
  readonly offsets: Uint32Array
  readonly units: Uint32Array
  readonly locations: Float64Array
  /** Per frame: the number of its owner. */
  readonly owners: Int32Array
  /** Frames, and bytes of all of them, the last one rounded up to its unit. */
  count = 0
  filled = 0
  readonly unitBytes: number

  /** @param memory at least `bytes` long */
  constructor(memory: ArrayBufferLike, bytes: number, unitBytes: number) {
    // A frame takes a unit at least.
    const most = Math.ceil(bytes / Math.max(unitBytes, frameBytes))
    this.bytes = new Uint8Array(memory, 0, bytes)
    this.words = new Int32Array(memory, 0, bytes >>> 2)
    this.offsets = new Uint32Array(most)
    this.units = new Uint32Array(most)
    this.owners = new Int32Array(most)
    this.locations = new Float64Array(most)
    this.unitBytes = unitBytes
  }

  clear(): void {
    this.count = 0
    this.filled = 0
  }
}

/** Units that a block of `length` bytes takes with its header. */
export const unitsOf = (length: number, unitBytes: number): number => Math.ceil((length + frameBytes) / unitBytes)

/** What a refusal of a memory place says. */
export const refusalOf = (location: number): PutOutcome => -location as PutOutcome
