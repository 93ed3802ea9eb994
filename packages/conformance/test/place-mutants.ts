/**
 * Places that are wrong in one respect each: the small places of `places.ts` with one rule broken. The suite must fail
 * for each of them, exactly in the rules that are named here.
 */
import { crc32, deflateRawSync, inflateRawSync } from 'node:zlib'
import {
  type Block,
  type BlockCodec,
  ByteLimit,
  type Flight,
  type LayerContext,
  type MovedBlock,
  maxBlockBytes,
  none,
  type ObjectId,
  type Owners,
  type Place,
  type PlaceTraits,
  PutOutcome,
  type RecoverBlock,
  type StatsNode,
  TmemError,
} from '@tmem/core'
import type { PlaceManifest } from '../src/index.ts'
import { calm, MapPlace, mapTraits, type Outside, SlowMapPlace, slowTraits } from './places.ts'
import { MiB } from './subjects.ts'

/** A place with one rule broken. */
export interface PlaceMutant {
  /** What is wrong with it. */
  readonly wrong: string
  /** The rules that fail, and no other. */
  readonly fails: readonly string[]
  /** True: the property test must show it, too. (It shows more than these; those are not asked for.) */
  readonly history: boolean
  readonly manifest: PlaceManifest
  readonly open: (context: LayerContext) => Place
}

// ---- In memory ------------------------------------------------------------------------------------------------------

const limit = new ByteLimit(MiB)
const reservedTraits: PlaceTraits = Object.freeze({ ...mapTraits, reservedBytes: 896 * 1024 })

/** A toy codec, honest and slow. */
class Codec implements BlockCodec {
  readonly workspace: Uint8Array = new Uint8Array(3 * maxBlockBytes)
  readonly spareAt: number = maxBlockBytes
  readonly id: number = 3

  encode(bytes: Uint8Array, at: number, length: number, to: number, room: number): number {
    const block = deflateRawSync(bytes.subarray(at, at + length))
    if (block.length > room) return 0
    this.workspace.set(block, to)
    return block.length
  }

  decode(codec: number, at: number, size: number, into: Uint8Array, to: number, length: number): boolean {
    if (codec !== this.id) return false
    try {
      const page = inflateRawSync(this.workspace.subarray(at, at + size), { maxOutputLength: length })
      if (page.length !== length) return false
      into.set(page, to)
      return true
    } catch (error) {
      if (error instanceof Error) return false
      throw error
    }
  }

  checksum(codec: number, at: number, size: number): number {
    return crc32(this.workspace.subarray(at, at + size)) ^ Math.imul(codec, 0x9e3779b1)
  }
}

/** The honest place in memory: with a codec, a limit that can be changed, and reserved bytes. */
export class Memory extends MapPlace {
  override readonly traits: PlaceTraits = reservedTraits
  readonly codec: BlockCodec = new Codec()

  constructor(context: LayerContext) {
    super(limit, context)
  }
}

export const memoryManifest: PlaceManifest = { filledBy: 2 * MiB, limit }

type MemoryClass = new (context: LayerContext) => Memory

const inMemory = (wrong: string, fails: readonly string[], Mutant: MemoryClass, history = false): PlaceMutant => ({
  wrong,
  fails,
  history,
  manifest: memoryManifest,
  open: (context) => new Mutant(context),
})

const withCodec = (wrong: string, fails: string, Mutant: new () => Codec): PlaceMutant =>
  inMemory(
    wrong,
    [fails],
    class extends Memory {
      override readonly codec: BlockCodec = new Mutant()
    },
  )

const wholeLength = 'a block comes back byte for byte, whatever its length'
const neighbours = 'a location in use is not given out again, and freeing one block leaves the others alone'
const roomBack = 'freed blocks leave all of their room to others'
const refusals = 'a block that is refused leaves nothing behind, and harms none'
const noMemory = 'it refuses while it can have no memory, and takes blocks again afterwards'
const sizes = 'what a block takes is a whole number of bytes, at least its length, and always the same'
const mark = 'it is above its mark when it has no room, and below when it is empty'
const charges = 'it keeps to its limit, and so does what is charged to it'
const compacting = 'compacting says where blocks went, keeps to its number, and comes to an end'
const fitting = 'making a block fit says where others went, and comes to an end'
const lowered = 'a lower limit loses nothing, and when it is raised there is room as before'
const reserved = 'pages of all the bytes that are reserved find room, however they were overwritten'
const allocations = 'every allocation fails once, and no byte is lost'
const traits = 'its traits are frozen and make sense'
const statistics = 'its statistics are a tree of named numbers, and asking changes nothing'
const closing = 'closing gives everything back, with blocks inside, too, and closing again does nothing'

/** What several places have at once, in one that is wrong. */
const shared = new Map<number, Uint8Array>()

const memoryMutants: readonly PlaceMutant[] = [
  inMemory(
    'has traits that can be changed',
    [traits],
    class extends Memory {
      override readonly traits: PlaceTraits = { ...reservedTraits }
    },
  ),
  inMemory(
    'has one memory for the whole process',
    ['two places in one process share nothing'],
    class extends Memory {
      override put(block: Block, owner: number): number {
        const location = super.put(block, owner)
        const one = this.row.kept.get(location)
        if (one !== undefined) shared.set(location, one.bytes)
        return location
      }
      override get(location: number, into: Block): void {
        const { bytes } = this.row.kept.get(location)!
        const last = shared.get(location)
        into.bytes.set((last?.length === bytes.length ? last : bytes).subarray(0, into.length), into.at)
      }
      override compact(): number {
        return 0
      }
    },
  ),
  inMemory(
    'has a counter that is no number',
    [statistics],
    class extends Memory {
      override stats(): StatsNode {
        const { name, counters, children } = super.stats()
        return { name, counters: { ...counters, mean_bytes: this.row.used / this.row.kept.size }, children }
      }
    },
  ),
  inMemory(
    'cannot be closed twice',
    [closing],
    class extends Memory {
      override close(): Promise<void> {
        if (this.closed) return Promise.reject(new Error('it is closed already'))
        return super.close()
      }
    },
  ),
  inMemory(
    'fails to open with an error of any kind when it can have no memory',
    [allocations],
    class extends Memory {
      constructor(context: LayerContext) {
        super(context)
        if (context.allocator.allocate(64, 'map.table') === undefined) throw new Error('no memory')
      }
    },
  ),
  withCodec(
    'decodes what is at the start of its workspace, wherever it is told to',
    'a page that was encoded is decoded again, anywhere in the workspace',
    class extends Codec {
      override decode(codec: number, at: number, size: number, into: Uint8Array, to: number, length: number): boolean {
        return super.decode(codec, at === this.spareAt ? 0 : at, size, into, to, length)
      }
    },
  ),
  withCodec(
    'stages pages in the second part of its workspace',
    'a page may be encoded out of one part of the workspace into another',
    class extends Codec {
      override encode(bytes: Uint8Array, at: number, length: number, to: number, room: number): number {
        this.workspace.fill(0, this.spareAt, this.spareAt + 64)
        return super.encode(bytes, at, length, to, room)
      }
    },
  ),
  withCodec(
    'has no room to keep to',
    'encoding says 0 for a page that does not shrink as far as it must',
    class extends Codec {
      override encode(bytes: Uint8Array, at: number, length: number, to: number, _room: number): number {
        return super.encode(bytes, at, length, to, maxBlockBytes)
      }
    },
  ),
  withCodec(
    'fails when it is given what is no block',
    'what is no block is not decoded, and no error',
    class extends Codec {
      override decode(codec: number, at: number, size: number, into: Uint8Array, to: number, length: number): boolean {
        if (codec !== this.id) return false
        const page = inflateRawSync(this.workspace.subarray(at, at + size))
        into.set(page.subarray(0, length), to)
        return page.length === length
      }
    },
  ),
  withCodec(
    'has checksums that do not know the codec',
    'a checksum tells every bit of a block, its length and its codec apart',
    class extends Codec {
      override checksum(_codec: number, at: number, size: number): number {
        return crc32(this.workspace.subarray(at, at + size))
      }
    },
  ),
  inMemory(
    'loses the last byte of a block of 65535 bytes',
    [allocations, wholeLength],
    class extends Memory {
      override put(block: Block, owner: number): number {
        const location = super.put(block, owner)
        if (location >= 0 && block.length === 65_535) this.row.kept.get(location)!.bytes[65_534] = 0
        return location
      }
    },
    true,
  ),
  inMemory(
    'keeps the memory of who put a long block, not a copy',
    [allocations, wholeLength],
    class extends Memory {
      override put(block: Block, owner: number): number {
        const location = super.put(block, owner)
        if (location >= 0 && block.length === 40_000)
          this.row.kept.get(location)!.bytes = block.bytes.subarray(block.at, block.at + block.length)
        return location
      }
    },
    true,
  ),
  inMemory(
    'fills the buffer that it is given to the end of a unit',
    [allocations, wholeLength],
    class extends Memory {
      override get(location: number, into: Block): void {
        super.get(location, into)
        if (into.length === 5000) into.bytes.fill(0, into.at + into.length, into.at + this.sizeOf(into.length))
      }
    },
    true,
  ),
  inMemory(
    'frees the block behind a freed one, too',
    [allocations, neighbours, sizes, compacting, fitting],
    class extends Memory {
      override free(location: number): void {
        const { units } = this.row.kept.get(location)!
        this.row.remove(location)
        if (this.row.kept.has(location + units) && units < 8) this.row.remove(location + units)
      }
    },
    true,
  ),
  inMemory(
    'loses a unit of the room of each block that is freed',
    [roomBack, lowered],
    class extends Memory {
      lost = 0
      override free(location: number): void {
        super.free(location, 0, 0)
        this.lost += 64
      }
      override put(block: Block, owner: number): number {
        if (this.row.used * 64 + block.length + this.lost > this.limitBytes) return this.refuse(PutOutcome.NoMemory)
        return super.put(block, owner)
      }
    },
  ),
  inMemory(
    'keeps a part of what it refuses',
    [allocations, roomBack, refusals, noMemory, lowered],
    class extends Memory {
      override refuse(reason: PutOutcome): number {
        this.row.add(1e6 + this.refusals, { bytes: new Uint8Array(1), owner: 1e6, units: 0 })
        return super.refuse(reason)
      }
    },
    true,
  ),
  inMemory(
    'gives its first block up for one that finds no room',
    [roomBack, refusals, mark, lowered],
    class extends Memory {
      override put(block: Block, owner: number): number {
        const location = super.put(block, owner)
        const [first] = this.row.kept.keys()
        if (location !== -PutOutcome.NoMemory || first === undefined) return location
        this.row.remove(first)
        return super.put(block, owner)
      }
      override free(location: number): void {
        if (this.row.kept.has(location)) super.free(location, 0, 0)
      }
    },
  ),
  inMemory(
    'says that its limit is reached when there is no memory',
    [noMemory],
    class extends Memory {
      override refuse(reason: PutOutcome): number {
        return super.refuse(reason === PutOutcome.AllocationFailed ? PutOutcome.NoMemory : reason)
      }
    },
  ),
  inMemory(
    'takes blocks for larger when there are others',
    [sizes],
    class extends Memory {
      override sizeOf(length: number): number {
        return super.sizeOf(length) + (this.row.kept.size === 0 ? 0 : 64)
      }
    },
  ),
  inMemory(
    'is never above its mark',
    [mark, lowered],
    class extends Memory {
      override excess(): number {
        return Math.min(0, super.excess())
      }
    },
  ),
  inMemory(
    'takes any charge',
    [charges],
    class extends Memory {
      override charge(_bytes: number): boolean {
        return true
      }
    },
  ),
  inMemory(
    'does not tell of every block that it moves',
    [allocations, compacting, fitting, lowered],
    class extends Memory {
      #moves = 0
      override compact(blocks: number, moved: MovedBlock): number {
        return super.compact(blocks, (owner, to) => {
          if (++this.#moves % 5 !== 0) moved(owner, to)
        })
      }
    },
    true,
  ),
  inMemory(
    'moves more blocks than it is asked to',
    [compacting],
    class extends Memory {
      override compact(blocks: number, moved: MovedBlock): number {
        return super.compact(blocks + 1, moved)
      }
    },
  ),
  inMemory(
    'always gains something by making a block fit',
    [fitting],
    class extends Memory {
      override fit(length: number, moved: MovedBlock): boolean {
        super.fit(length, moved)
        return true
      }
    },
  ),
  inMemory(
    'forgets what is above a lowered limit',
    [lowered],
    class extends Memory {
      override excess(): number {
        const excess = super.excess()
        if (this.limitBytes === 0) for (const location of this.row.kept.keys()) this.row.remove(location)
        return excess
      }
    },
  ),
  inMemory(
    'has room for a page less than it reserves',
    [reserved],
    class extends Memory {
      override put(block: Block, owner: number): number {
        if (block.length === 4096 && this.row.used * 64 + 4096 >= reservedTraits.reservedBytes)
          return this.refuse(PutOutcome.NoMemory)
        return super.put(block, owner)
      }
    },
  ),
]

// ---- Slow -----------------------------------------------------------------------------------------------------------

const outside: Outside = calm()
const slowReserved: PlaceTraits = Object.freeze({ ...slowTraits, reservedBytes: 256 * 1024 })

/** The honest slow place: one that fails when it is told to, and has reserved bytes. */
export class Slow extends SlowMapPlace {
  override readonly traits: PlaceTraits = slowReserved

  constructor(context: LayerContext) {
    super(384 * 1024, outside, context)
  }
}

export const slowManifest: PlaceManifest = {
  filledBy: MiB,
  fail: (what) => {
    outside.failing = what
  },
}

const slow = (
  wrong: string,
  fails: readonly string[],
  Mutant: new (context: LayerContext) => Slow,
  history = false,
): PlaceMutant => ({
  wrong,
  fails,
  history,
  manifest: slowManifest,
  open: (context) => new Mutant(context),
})

const slowLength = 'a frame comes back as it was sent, whatever its length'
const atOnce = 'what is written or read before the call returns is the same'
const slowNeighbours = 'a location in use is not given out again, and freeing one frame leaves the others alone'
const slowRoomBack = 'freed frames leave all of their room to others'
const slowRefusals = 'frames that are refused leave nothing behind, and harm none'
const overlapping = 'reads, flights and frees that overlap do not disturb one another'
const opening = 'it says whether it would take a flight, and takes one when it says so'
const failingWrites = 'a write that fails keeps nothing and loses nothing, and the next one may succeed'
const failingReads = 'a read that fails says so, and the frame is there afterwards'
const moving =
  'room comes back when frames of many sizes are overwritten, and what is moved for that is where it was said to be'
const syncing = 'a sync resolves, and everything is there'

const slowMutants: readonly PlaceMutant[] = [
  slow(
    'has a unit that is no power of two',
    [traits],
    class extends Slow {
      override readonly unitBytes: number = 192
    },
  ),
  slow(
    'loses the last unit of its largest frames',
    [allocations, slowLength, atOnce, reserved],
    class extends Slow {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        for (let n = 0; n < count; n++) {
          const one = this.row.kept.get(flight.locations[n]!)
          if (one !== undefined && one.units > 256) one.bytes.fill(0, 256 * this.unitBytes)
        }
      }
    },
    true,
  ),
  slow(
    'reads as it was before when it may not wait',
    [slowLength, slowNeighbours, slowRefusals, overlapping],
    class extends Slow {
      readonly #first = new Map<number, Uint8Array>()
      override readNow(location: number, units: number, into: Uint8Array): void {
        super.readNow(location, units, into)
        const first = this.#first.get(location)
        if (first === undefined) this.#first.set(location, into.slice(0, units * this.unitBytes))
        else into.set(first.subarray(0, units * this.unitBytes))
      }
    },
    true,
  ),
  slow(
    'writes no headers when it may not wait',
    [atOnce],
    class extends Slow {
      override writeNow(flight: Flight): void {
        super.writeNow(flight)
        for (let n = 0; n < flight.count; n++)
          if (flight.units[n] === 5) this.row.kept.get(flight.locations[n]!)?.bytes.fill(0, 0, 16)
      }
    },
    true,
  ),
  slow(
    'fills more of the buffer than the frame has units',
    [allocations, slowLength, atOnce],
    class extends Slow {
      override async read(location: number, units: number, into: Uint8Array): Promise<void> {
        await super.read(location, units, into)
        if (units === 157) into.fill(0, units * this.unitBytes)
      }
    },
    true,
  ),
  slow(
    'uses the memory of a flight for something else when it is written',
    [allocations, slowLength, slowRefusals],
    class extends Slow {
      override async write(flight: Flight): Promise<void> {
        await super.write(flight)
        if (flight.units[0] === 157) flight.bytes.fill(0, 0, 16)
      }
    },
    true,
  ),
  slow(
    'sets a location more than a flight has frames',
    [allocations, slowLength, atOnce, slowRefusals],
    class extends Slow {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        if (flight.units[0] === 157) flight.locations[count] = none
      }
    },
    true,
  ),
  slow(
    'gives two frames of a long flight one location',
    [slowRoomBack, slowRefusals, moving, reserved],
    class extends Slow {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        if (count > 20 && flight.locations[count - 1] !== none) {
          this.row.remove(flight.locations[count - 1]!)
          flight.locations[count - 1] = flight.locations[0]!
        }
      }
    },
  ),
  slow(
    'frees the frame behind a freed one, too',
    [allocations, slowLength, slowNeighbours, failingWrites, moving],
    class extends Slow {
      override free(location: number): void {
        const { units } = this.row.kept.get(location)!
        this.row.remove(location)
        if (this.row.kept.has(location + units) && units < 4) this.row.remove(location + units)
      }
    },
    true,
  ),
  slow(
    'loses a unit of the room of each frame that is freed',
    [slowRoomBack],
    class extends Slow {
      lost = 0
      override free(location: number): void {
        super.free(location, 0)
        this.lost++
      }
      override room(units: number): number {
        return this.row.used + units + this.lost > this.row.length ? none : super.room(units)
      }
    },
  ),
  slow(
    'keeps what it refuses',
    [slowRoomBack, slowRefusals],
    class extends Slow {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        for (let n = 0; n < count; n++)
          if (flight.locations[n] === none && this.row.find(1) !== none)
            this.row.add(this.row.find(1), { bytes: new Uint8Array(256), owner: -5, units: 1 })
      }
    },
    true,
  ),
  slow(
    'reads where a frame is when the read ends, not when it began',
    [overlapping],
    class extends Slow {
      #last = 0
      override async read(location: number, units: number, into: Uint8Array): Promise<void> {
        this.#last = location
        await this.outside.turn()
        this.readNow(this.#last, units, into)
      }
    },
    true,
  ),
  slow(
    'takes nothing when it is not forced to',
    [opening],
    class extends Slow {
      override open(forced: boolean): boolean {
        return !forced
      }
    },
  ),
  slow(
    'keeps the frames of a flight that failed',
    [failingWrites],
    class extends Slow {
      override undo(flight: Flight, _count: number): never {
        super.undo(flight, 1)
      }
    },
    true,
  ),
  slow(
    'takes a flight for written when the disk has failed',
    [failingWrites],
    class extends Slow {
      override async write(flight: Flight): Promise<void> {
        this.place(flight, flight.count)
        await this.outside.turn()
      }
    },
  ),
  slow(
    'answers a read that failed with what was in memory',
    [failingReads],
    class extends Slow {
      override readNow(location: number, units: number, into: Uint8Array): void {
        if (!this.fails('reads')) super.readNow(location, units, into)
      }
    },
    true,
  ),
  slow(
    'gives a frame up when it could not be read',
    [failingReads],
    class extends Slow {
      override readNow(location: number, units: number, into: Uint8Array): void {
        try {
          super.readNow(location, units, into)
        } catch (error) {
          if (this.row.kept.has(location)) this.row.remove(location)
          throw error
        }
      }
      override free(location: number): void {
        if (this.row.kept.has(location)) super.free(location, 0)
      }
    },
    true,
  ),
  slow(
    'has room for a page less than it reserves',
    [reserved],
    class extends Slow {
      override room(units: number): number {
        return units === 17 && this.row.used + units > 64 * 17 - 17 ? none : super.room(units)
      }
    },
  ),
  slow(
    'does not move anything to regain space',
    [moving],
    class extends Slow {
      override pack(): number {
        return 0
      }
    },
  ),
  slow(
    'does not tell of every frame that it moves',
    [moving],
    class extends Slow {
      #moves = 0
      override attach(owners: Owners): void {
        super.attach({
          unitsAt: (owner, location) => owners.unitsAt(owner, location),
          moved: (owner, from, to, units) => (++this.#moves % 5 === 0 ? true : owners.moved(owner, from, to, units)),
          drop: (owner, location) => owners.drop(owner, location),
          recall: (owner, location, where) => owners.recall(owner, location, where),
          poolOf: (owner) => owners.poolOf(owner),
          isPersistent: (owner) => owners.isPersistent(owner),
          objectOf: (owner) => owners.objectOf(owner),
          indexOf: (owner) => owners.indexOf(owner),
          isCurrent: (flight, frame) => owners.isCurrent(flight, frame),
          landed: (flight) => owners.landed(flight),
        })
      }
    },
  ),
  slow(
    'cannot sync what was just written',
    [syncing],
    class extends Slow {
      override sync(): Promise<void> {
        return this.row.kept.size > 0 ? Promise.reject(new TmemError('TMEM_IO', 'the disk failed')) : super.sync()
      }
    },
  ),
]

// ---- What survives --------------------------------------------------------------------------------------------------

interface Survivor {
  readonly pool: number
  readonly object: ObjectId
  readonly index: number
  readonly units: number
}

/** What the last place has left. */
let left = new Map<number, Survivor>()

/** The honest place whose frames outlive it. */
export class Lasting extends SlowMapPlace {
  override readonly traits: PlaceTraits = Object.freeze({ ...slowTraits, survives: 'process' })
  readonly #handed: Map<number, Survivor> = left

  constructor(context: LayerContext) {
    super(384 * 1024, calm(), context)
    left = new Map()
    for (const [location, { units }] of this.#handed)
      this.row.add(location, { bytes: new Uint8Array(units * 256), owner: none, units })
  }

  override place(flight: Flight, count: number): void {
    super.place(flight, count)
    const { owners } = this
    for (let n = 0; n < count; n++) {
      const owner = flight.owners[n]!
      if (flight.locations[n] !== none)
        left.set(flight.locations[n]!, {
          pool: owners!.poolOf(owner),
          object: owners!.objectOf(owner),
          index: owners!.indexOf(owner),
          units: flight.units[n]!,
        })
    }
  }

  override free(location: number): void {
    super.free(location, 0)
    left.delete(location)
  }

  forget(location: number): void {
    super.free(location, 0)
  }

  recover(pool: number, enter: RecoverBlock): void {
    for (const [location, one] of this.#handed) {
      if (one.pool !== pool) continue
      this.#handed.delete(location)
      if (this.hand(one, location, enter) === none) this.row.remove(location)
    }
  }

  hand({ object, index, units }: Survivor, location: number, enter: RecoverBlock): number {
    return enter(object, index, location, units)
  }

  // What is forgotten keeps its location: packing would give that to others.
  override pack(): number {
    return 0
  }
}

const surviving = 'what survives is handed over once, by the key of its pool; what was freed is not'

const lasting = (wrong: string, Mutant: new (context: LayerContext) => Lasting): PlaceMutant => ({
  wrong,
  fails: [surviving],
  history: false,
  manifest: { reopen: (context) => new Mutant(context) },
  open: (context) => {
    left = new Map()
    return new Mutant(context)
  },
})

export const lastingManifest: PlaceManifest = { reopen: (context) => new Lasting(context) }
export const openLasting = (context: LayerContext): Place => {
  left = new Map()
  return new Lasting(context)
}

const lastingMutants: readonly PlaceMutant[] = [
  lasting(
    'lets what was freed come back',
    class extends Lasting {
      override free(location: number): void {
        this.forget(location)
      }
    },
  ),
  lasting(
    'forgets for good',
    class extends Lasting {
      override forget(location: number): void {
        this.free(location)
      }
    },
  ),
  lasting(
    'hands frames over to any pool',
    class extends Lasting {
      override recover(_pool: number, enter: RecoverBlock): void {
        super.recover(7, enter)
      }
    },
  ),
  lasting(
    'keeps what nobody took in',
    class extends Lasting {
      override hand(one: Survivor, location: number, enter: RecoverBlock): number {
        enter(one.object, one.index, location, one.units)
        return 0
      }
    },
  ),
]

export const placeMutants: readonly PlaceMutant[] = [...memoryMutants, ...slowMutants, ...lastingMutants]
