/**
 * A slow place whose blocks are sealed: AES-256-GCM, the nonce of each being a number that counts up.
 *
 * A frame of the chain is sealed whole, its header included, and becomes the block of another frame:
 *
 *     0, length - 1, 0, owner   16 bytes: what a place may look at in order to move its frames together
 *     ciphertext of the frame   as long as the frame, without the padding to whole units
 *     tag                       16 bytes
 *
 * The number is not written anywhere. It is kept here, by location, and a block can be opened under the number that was
 * noted for its location only: one of another page, of another location, or an earlier one of the same page was sealed
 * under another number.
 *
 * Invariants:
 *  - A number is used once, whatever becomes of what was sealed under it; the key is of this start, and of this place.
 *  - What is known of a location is that of the block which the place has there.
 *  - No byte of what could not be opened is handed out as the page's.
 *
 * Source: NIST SP 800-38D, 8.2.1: nonces of a counter.
 */
import { type CipherGCM, createCipheriv, createDecipheriv, type DecipherGCM } from 'node:crypto'
import {
  type BlockCodec,
  type Budget,
  Flight,
  frameBytes,
  idle,
  type LayerContext,
  maxBlockBytes,
  maxRoundingBytes,
  none,
  type Owners,
  type PlaceTraits,
  type Progress,
  type SlowPlace,
  type StatsNode,
  TmemError,
  unitsOf,
} from '@tmem/core'
import { maxSeal, SealedBlocks, sealedBlocksBytes } from './sealed-blocks.ts'

export const keyBytes = 32
const tagBytes = 16
const nonceBytes = 12
/** Bytes by which a sealed frame is longer. */
const extraBytes: number = frameBytes + tagBytes
/** Smallest unit in which a page that does not shrink takes no more of them when it is sealed. */
const leastUnitBytes = 64
/** Flights to the place at once, and one more for what cannot wait. */
const flightsAtOnce = 3
const algorithm = 'aes-256-gcm'
const settings = { authTagLength: tagBytes } as const

/** A flight to the place, whose frames are those of another flight from `first` on. */
class SealedFlight extends Flight {
  outer: Flight | undefined
  first = 0
  /** By frame: the number under which it was sealed, and the bytes that were. */
  readonly seals: Float64Array
  readonly lengths: Uint32Array

  constructor(memory: ArrayBufferLike, bytes: number, unitBytes: number) {
    super(memory, bytes, unitBytes)
    this.seals = new Float64Array(this.owners.length)
    this.lengths = new Uint32Array(this.owners.length)
  }
}

export class SealedPlace implements SlowPlace {
  readonly name: string
  readonly traits: PlaceTraits
  readonly unitBytes: number
  readonly flightBytes: number
  readonly codec?: BlockCodec
  readonly writeNow?: (flight: Flight) => void
  readonly readNow?: (location: number, units: number, into: Uint8Array) => void
  readonly #next: SlowPlace
  readonly #key: Uint8Array
  readonly #blocks: SealedBlocks
  /** Flights that nobody uses, and who waits for one. */
  readonly #free: SealedFlight[] = []
  readonly #waiting: ((flight: SealedFlight) => void)[] = []
  readonly #now: SealedFlight
  readonly #nonce: Buffer = Buffer.alloc(nonceBytes)
  #lastSeal = 0
  /** Frames in flights to the place. */
  #underWay = 0
  #opened = 0
  #corrupt = 0

  /** Throws `TmemError`: `TMEM_NO_MEMORY`, or `TMEM_BAD_STACK` over a place with units that are too small. */
  constructor(next: SlowPlace, key: Uint8Array, { allocator }: LayerContext) {
    const { unitBytes, flightBytes, traits } = next
    if (unitBytes < leastUnitBytes)
      throw new TmemError(
        'TMEM_BAD_STACK',
        `seal cannot stand above ${next.name}: its unit has ${unitBytes} bytes, fewer than ${leastUnitBytes}`,
        { layer: 'seal' },
      )
    this.#next = next
    this.#key = key
    this.name = next.name
    this.traits = traits
    this.unitBytes = unitBytes
    // So that sealed frames fit into one flight. Where room is promised, how frames fill a flight is part of that.
    const share = traits.reservedBytes > 0 ? 0 : Math.ceil(flightBytes / 32 / unitBytes) * unitBytes
    this.flightBytes = Math.max(unitBytes, flightBytes - share)
    if (next.codec !== undefined) this.codec = next.codec
    const bytes = Math.max(flightBytes, unitsOf(maxBlockBytes + extraBytes, unitBytes) * unitBytes)
    const flights: SealedFlight[] = []
    for (let n = 0; n <= flightsAtOnce; n++) {
      const memory = allocator.allocate(bytes, 'seal.flight')
      if (memory === undefined) throw noMemory(bytes)
      flights.push(new SealedFlight(memory, bytes, unitBytes))
    }
    this.#now = flights.pop()!
    this.#free = flights
    const blocks = SealedBlocks.take(traits.capacity, allocator)
    if (blocks === undefined) throw noMemory(sealedBlocksBytes(traits.capacity))
    this.#blocks = blocks
    if (next.writeNow !== undefined) this.writeNow = (flight) => this.#writeNow(flight)
    if (next.readNow !== undefined) this.readNow = (location, units, into) => this.#readNow(location, units, into)
  }

  get failure(): Error | undefined {
    return this.#next.failure
  }

  attach(owners: Owners): void {
    this.#next.attach?.({
      unitsAt: (owner, location) => owners.unitsAt(owner, location),
      moved: (owner, from, to, units) => {
        const isKept = owners.moved(owner, from, to, units)
        const slot = this.#blocks.find(from)
        if (!isKept || slot < 0) return isKept
        const number = this.#blocks.sealAt(slot)
        const length = this.#blocks.lengthAt(slot)
        this.#blocks.remove(from)
        this.#blocks.add(to, number, length)
        return true
      },
      drop: (owner, location) => owners.drop(owner, location),
      recall: (owner, location, where) => owners.recall(owner, location, where),
      poolOf: (owner) => owners.poolOf(owner),
      isPersistent: (owner) => owners.isPersistent(owner),
      objectOf: (owner) => owners.objectOf(owner),
      indexOf: (owner) => owners.indexOf(owner),
      isCurrent: (flight, frame) => {
        const { outer, first } = flight as SealedFlight
        return owners.isCurrent(outer!, first + frame)
      },
      // For places that survive their process, which are not sealed: all others are asked when their promise resolves.
      landed: () => undefined,
    })
  }

  open(forced: boolean): boolean {
    return this.#next.open(forced)
  }

  async write(flight: Flight): Promise<void> {
    const sealed = this.#free.pop() ?? (await new Promise<SealedFlight>((resolve) => this.#waiting.push(resolve)))
    try {
      for (let first = 0; this.#load(sealed, flight, first); first = this.#landed(sealed)) {
        try {
          await this.#next.write(sealed)
        } catch (error) {
          this.#crashed(sealed, error)
          return
        }
      }
    } finally {
      sealed.outer = undefined
      const waiting = this.#waiting.shift()
      if (waiting === undefined) this.#free.push(sealed)
      else waiting(sealed)
    }
  }

  #writeNow(flight: Flight): void {
    const sealed = this.#now
    for (let first = 0; this.#load(sealed, flight, first); first = this.#landed(sealed)) {
      try {
        this.#next.writeNow!(sealed)
      } catch (error) {
        this.#crashed(sealed, error)
        return
      }
    }
  }

  /** Seals frames from `first` on, as many as there is room for in one flight. False: none. */
  #load(sealed: SealedFlight, flight: Flight, first: number): boolean {
    sealed.clear()
    sealed.outer = flight
    sealed.first = first
    const { unitBytes } = this
    for (let n = first; n < flight.count; n++) {
      const from = flight.offsets[n]!
      const length = frameBytes + (flight.words[(from >>> 2) + 1]! & 0xffff) + 1
      const units = unitsOf(length + tagBytes, unitBytes)
      const end = sealed.filled + units * unitBytes
      const isFull = end > Math.max(this.#next.flightBytes, units * unitBytes) || end > sealed.bytes.length
      if (isFull && sealed.count > 0) break
      // A place may have room for more blocks than it says: there is none here to know them.
      if (this.#blocks.count + this.#underWay === this.traits.capacity) break
      this.#underWay++
      this.#seal(sealed, flight, n, length, units)
    }
    sealed.bytes.fill(0, sealed.filled, sealed.filled + maxRoundingBytes)
    return sealed.count > 0
  }

  #seal(sealed: SealedFlight, flight: Flight, n: number, length: number, units: number): void {
    const { bytes, words, count } = sealed
    const from = flight.offsets[n]!
    const at = sealed.filled
    const word = at >>> 2
    words[word] = 0
    // One of 64 KiB would be too long for this field: that says 64 KiB, which takes as many units.
    words[word + 1] = Math.min(length + tagBytes, maxBlockBytes) - 1
    words[word + 2] = 0
    words[word + 3] = flight.owners[n]!
    const seal = this.#nextSeal()
    const cipher = createCipheriv(algorithm, this.#key, this.#nonceOf(seal), settings) as CipherGCM
    bytes.set(cipher.update(flight.bytes.subarray(from, from + length)), at + frameBytes)
    cipher.final()
    bytes.set(cipher.getAuthTag(), at + frameBytes + length)
    const end = at + units * this.unitBytes
    bytes.fill(0, at + frameBytes + length + tagBytes, end)
    sealed.offsets[count] = at
    sealed.units[count] = units
    sealed.owners[count] = flight.owners[n]!
    sealed.locations[count] = none
    sealed.seals[count] = seal
    sealed.lengths[count] = length
    sealed.count = count + 1
    sealed.filled = end
  }

  /**
   * A flight did not arrive. What an earlier one has brought there stays, the rest was refused; else it is an error.
   */
  #crashed({ outer, first, count }: SealedFlight, error: unknown): void {
    this.#underWay -= count
    if (outer!.locations.subarray(0, first).every((location) => location === none)) throw error
  }

  /** Notes where frames are. Returns the number of the first that has not gone. */
  #landed(sealed: SealedFlight): number {
    const { outer, first, count, locations, units, seals, lengths } = sealed
    this.#underWay -= count
    for (let n = 0; n < count; n++) {
      const location = locations[n]!
      outer!.locations[first + n] = location
      if (location === none) continue
      outer!.units[first + n] = units[n]!
      this.#blocks.add(location, seals[n]!, lengths[n]!)
    }
    return first + count
  }

  #nextSeal(): number {
    if (this.#lastSeal === maxSeal)
      throw new TmemError('TMEM_IO', 'seal: all numbers of this start are used: start anew', { layer: 'seal' })
    return ++this.#lastSeal
  }

  /** The nonce of a number, until the next one is asked for. */
  #nonceOf(seal: number): Uint8Array {
    this.#nonce.writeUIntBE(seal, nonceBytes - 6, 6)
    return this.#nonce
  }

  async read(location: number, units: number, into: Uint8Array): Promise<void> {
    const slot = this.#blocks.find(location)
    if (slot < 0) throw this.#unsealed()
    // The block may go, or move, while it is read.
    const seal = this.#blocks.sealAt(slot)
    const length = this.#blocks.lengthAt(slot)
    await this.#next.read(location, units, into)
    this.#open(seal, length, into)
  }

  #readNow(location: number, units: number, into: Uint8Array): void {
    const slot = this.#blocks.find(location)
    if (slot < 0) throw this.#unsealed()
    const seal = this.#blocks.sealAt(slot)
    const length = this.#blocks.lengthAt(slot)
    this.#next.readNow!(location, units, into)
    this.#open(seal, length, into)
  }

  /** Makes the frame of what was read. */
  #open(seal: number, length: number, into: Uint8Array): void {
    const decipher = createDecipheriv(algorithm, this.#key, this.#nonceOf(seal), settings) as DecipherGCM
    const end = frameBytes + length
    const frame = decipher.update(into.subarray(frameBytes, end))
    decipher.setAuthTag(into.subarray(end, end + tagBytes))
    try {
      decipher.final()
    } catch (error) {
      if (!(error instanceof Error)) throw error
      this.#corrupt++
      throw new TmemError(
        'TMEM_CORRUPT',
        `seal: what ${this.name} has is not what was sealed for this page: it was altered, or exchanged, or is an older one`,
        { layer: 'seal', cause: error },
      )
    }
    into.set(frame)
    into.fill(0, length, Math.ceil(length / this.unitBytes) * this.unitBytes)
    this.#opened++
  }

  #unsealed(): TmemError {
    this.#corrupt++
    return new TmemError('TMEM_CORRUPT', `seal: nothing was sealed at this location of ${this.name}`, { layer: 'seal' })
  }

  free(location: number, units: number): void {
    this.#blocks.remove(location)
    this.#next.free(location, units)
  }

  tick(budget: Budget): Progress {
    return this.#next.tick?.(budget) ?? idle
  }

  ready(): Promise<void> {
    return this.#next.ready?.() ?? Promise.resolve()
  }

  stats(): StatsNode {
    const stats = this.#next.stats()
    const own = {
      name: 'seal',
      counters: {
        sealed: this.#lastSeal,
        opened: this.#opened,
        corrupt: this.#corrupt,
        blocks: this.#blocks.count,
        table_bytes: sealedBlocksBytes(this.traits.capacity),
      },
      children: [],
    }
    return { ...stats, children: [own, ...stats.children] }
  }

  close(): Promise<void> {
    return this.#next.close().finally(() => this.#key.fill(0))
  }

  check(blocks: readonly { readonly location: number; readonly units: number }[]): void {
    if (blocks.length !== this.#blocks.count)
      throw new Error(`seal: ${blocks.length} blocks are known, ${this.#blocks.count} were sealed`)
    for (const { location } of blocks)
      if (this.#blocks.find(location) < 0) throw new Error(`seal: nothing was sealed at ${location}`)
    this.#next.check?.(blocks)
  }
}

const noMemory = (bytes: number): TmemError =>
  new TmemError('TMEM_NO_MEMORY', `seal: no memory for ${bytes} bytes: give the place below a smaller size`, {
    layer: 'seal',
  })
