/**
 * What the rules for places work with: a place opened for one case, and hands that put blocks there as a chain does and
 * know what must be where. Hands look at every answer; the place itself is asked whether it has anything else
 * (`check`).
 */
import type {
  ByteLimit,
  LayerContext,
  MemoryPlace,
  MovedBlock,
  Owners,
  Place,
  PlaceTraits,
  SlowPlace,
} from '@tmem/core'
import {
  Block,
  basePageSize,
  createAccounts,
  Flight,
  frameBytes,
  isSlow,
  maxBlockBytes,
  maxLocation,
  maxRoundingBytes,
  none,
  PutOutcome,
  putOutcomeCount,
  putOutcomeName,
  systemAllocator,
  unitsOf,
} from '@tmem/core'
import { type FailingAllocator, failingAllocator } from '@tmem/faults'
import { expect, expectSame, fail, makePage } from './pages.ts'

/** What the suite cannot see from a place's traits. */
export interface PlaceManifest {
  /** Bytes of blocks that do not shrink, more than it has room for (default: it is never filled). */
  readonly filledBy?: number
  /** Makes transfers fail from now on, until called with `nothing` (default: they never fail). */
  readonly fail?: (what: 'nothing' | 'writes' | 'reads') => void
  /** The limit of all places that `open` makes, where it can be changed while they are in use. */
  readonly limit?: ByteLimit
  /** Opens the place once more, after it was closed: for what survives its process (default: that is not tried). */
  readonly reopen?: (context: LayerContext) => Place
  /**
   * Called after each case, when all of its places are closed: throws when something was left open (files, sockets).
   */
  readonly afterCase?: () => void | Promise<void>
  /** Runs of the property test (default 60) and its seed (default 1). */
  readonly property?: { readonly runs?: number; readonly seed?: number }
}

/** A place under test. */
export interface PlaceSubject {
  readonly name: string
  /** Opens a new, empty place with this memory. Called for each case. */
  readonly open: (context: LayerContext) => Place
  readonly manifest?: PlaceManifest
}

/** A block by its size: `length` bytes, made of a page of `pageBytes`; a page as it is where the two are the same. */
export interface Form {
  readonly length: number
  readonly pageBytes: number
}

const raw = (pageBytes: number): Form => ({ length: pageBytes, pageBytes })

/** A page of 4 KiB as it is: what takes most room. */
export const rawPage: Form = raw(basePageSize)

/** Blocks of all kinds that a place takes: of one byte, in the middle, around borders, as large as can be. */
export function formsOf({ rawOnly, maxPageSize }: PlaceTraits): readonly Form[] {
  const largest = Math.min(maxPageSize, maxBlockBytes)
  const forms = [rawPage, raw(2 * basePageSize), raw(largest)]
  for (const length of [1, 15, 16, 31, 100, 500, 1023, 1024, 2047, 3000, 4095])
    forms.push({ length, pageBytes: basePageSize })
  for (const length of [700, 5000, 40_000, 65_535]) forms.push({ length, pageBytes: maxBlockBytes })
  return forms.filter(
    ({ length, pageBytes }) => pageBytes <= largest && length <= pageBytes && !(rawOnly && length < pageBytes),
  )
}

/** The bytes of a block, out of a small number. */
export const bytesOf = (seed: number, length: number): Uint8Array =>
  makePage('noise', seed, Math.ceil(length / basePageSize) * basePageSize).subarray(0, length)

/** What a case opens a place with. */
export interface PlaceWorld {
  readonly allocator: FailingAllocator
  readonly context: LayerContext
}

export function placeWorld(): PlaceWorld {
  const allocator = failingAllocator(systemAllocator)
  return { allocator, context: { allocator, accounts: createAccounts() } }
}

/** Bytes around what is read, which nobody may touch. */
const margin = 96
const untouched = 0xa5

/** Throws unless the bytes beside `length` bytes at `at` are as they were. */
function expectUntouched(bytes: Uint8Array, at: number, length: number, what: string): void {
  const before = bytes.subarray(0, at).every((byte) => byte === untouched)
  const behind = bytes.subarray(at + length).every((byte) => byte === untouched)
  expect(before && behind, `${what}: bytes beside the block were written`)
}

interface Kept extends Form {
  location: number
  readonly seed: number
}

/** Hands that keep blocks in a memory place. */
export class MemoryHands {
  readonly place: MemoryPlace
  /** By owner. */
  readonly kept: Map<number, Kept> = new Map()
  /** Why the last block was refused. */
  refusal: PutOutcome = PutOutcome.Stored
  /** Locations in use. */
  readonly #used: Set<number> = new Set()
  readonly #free: number[] = []
  #owners = 0
  #seed: number
  readonly moved: MovedBlock = (owner, location) => {
    const one = this.kept.get(owner)
    if (one === undefined) fail(`a block of owner ${owner} was moved, who has none`)
    expect(isLocation(location) && !this.#used.has(location), `the block of owner ${owner} was moved to ${location}`)
    this.#used.delete(one.location)
    this.#used.add(location)
    one.location = location
  }

  /** @param seed sets its blocks apart from those of other hands */
  constructor(place: Place, seed = 0) {
    if (isSlow(place)) fail('it says that it waits, and is tried as a place that does not')
    this.place = place
    this.#seed = seed
  }

  /** Puts a block: its owner, or `none` when it was refused. */
  put({ length, pageBytes }: Form): number {
    const { place } = this
    // As a chain does: memory is had before anything is half done.
    place.prepare?.(pageBytes)
    const seed = ++this.#seed
    const owner = this.#free.pop() ?? this.#owners++
    const block = new Block()
    block.bytes = new Uint8Array(length + 2 * margin).fill(untouched)
    block.bytes.set(bytesOf(seed, length), margin)
    block.at = margin
    block.length = length
    block.codec = length === pageBytes ? 0 : 2
    block.pageBytes = pageBytes
    block.persistent = place.traits.persistent
    const before = block.bytes.slice()
    const location = place.put(block, owner)
    expectSame(block.bytes, before, 'the block after it was put')
    // Whoever put it uses its memory for the next one.
    block.bytes.fill(0)
    if (location < 0) {
      expect(-location > 0 && -location < putOutcomeCount && Number.isInteger(location), `put answered ${location}`)
      this.refusal = -location as PutOutcome
      this.#free.push(owner)
      return none
    }
    expect(isLocation(location), `put answered ${location}`)
    expect(!this.#used.has(location), `location ${location} was given out, and is in use`)
    this.#used.add(location)
    this.kept.set(owner, { location, length, pageBytes, seed })
    return owner
  }

  /** Puts a block that must find room. */
  mustPut(form: Form): number {
    const owner = this.put(form)
    if (owner === none) fail(`a block of ${form.length} bytes was refused: ${putOutcomeName(this.refusal)}`)
    return owner
  }

  /** Puts blocks until one is refused, `bytes` of them at most. Answers how many there are. */
  fill(form: Form, bytes: number): number {
    for (let left = bytes; left > 0; left -= form.length) {
      expect(
        this.place.usedBytes <= this.place.limitBytes,
        `${this.place.usedBytes} bytes are used, more than its limit`,
      )
      if (this.put(form) === none) return this.kept.size
    }
    return fail(`it took ${bytes} bytes of blocks and had room for more`)
  }

  free(owner: number): void {
    const { location, length, pageBytes } = this.kept.get(owner)!
    this.kept.delete(owner)
    this.#used.delete(location)
    this.place.free(location, length, pageBytes)
    this.#free.push(owner)
  }

  freeAll(): void {
    for (const owner of this.kept.keys()) this.free(owner)
  }

  /** The block of an owner must be there, byte for byte. */
  expectBlock(owner: number): void {
    const { location, length, seed } = this.kept.get(owner)!
    const into = new Block()
    into.bytes = new Uint8Array(length + 2 * margin).fill(untouched)
    into.at = margin
    into.length = length
    this.place.get(location, into)
    const what = `block of ${length} bytes at ${location}`
    expectUntouched(into.bytes, margin, length, what)
    expectSame(into.bytes.subarray(margin, margin + length), bytesOf(seed, length), what)
  }

  /** Every block must be there, and nothing else. */
  expectAll(): void {
    for (const owner of this.kept.keys()) this.expectBlock(owner)
    this.expectNothingElse()
  }

  /** The place has these blocks and no other, where it can say so. */
  expectNothingElse(): void {
    const seen = new Set<number>()
    this.place.check?.((owner, location) => {
      seen.add(owner)
      return this.kept.get(owner)?.location === location
    })
    if (this.place.check !== undefined)
      expect(seen.size === this.kept.size, `the place has ${seen.size} blocks, ${this.kept.size} were put there`)
  }
}

interface Framed extends Form {
  location: number
  units: number
  readonly sent: number
  readonly seed: number
}

/** Frames of a flight on their way. */
interface Boarded extends Form {
  readonly owner: number
  readonly seed: number
  readonly sent: number
}

/** Key of the pool that the hands' frames are of. */
export const poolKey = 7

/** Hands that keep frames in a slow place, and answer what it asks of its owners. */
export class SlowHands implements Owners {
  readonly place: SlowPlace
  /** By owner. */
  readonly kept: Map<number, Framed> = new Map()
  /** Frames that were moved, and refused. */
  relocated = 0
  refused = 0
  readonly #underWay: Map<Flight, readonly Boarded[]> = new Map()
  /** Locations in use. */
  readonly #used: Set<number> = new Set()
  readonly #free: number[] = []
  #owners = 0
  #seed: number

  /** @param seed sets its blocks apart from those of other hands */
  constructor(place: Place, seed = 0) {
    if (!isSlow(place)) fail('it says that it does not wait, and is tried as a place that does')
    this.place = place
    this.#seed = seed
    place.attach?.(this)
  }

  // ---- What a place asks ------------------------------------------------------------------------------------------

  unitsAt(owner: number, location: number): number {
    const one = this.kept.get(owner)
    return one?.location === location ? one.units : 0
  }

  moved(owner: number, from: number, to: number, units: number): boolean {
    if (this.unitsAt(owner, from) === 0) return false
    const one = this.kept.get(owner)!
    expect(isLocation(to) && !this.#used.has(to), `the frame of owner ${owner} was moved from ${from} to ${to}`)
    expect(this.#areUnits(units, one.sent), `the frame of owner ${owner} has ${units} units where it was moved`)
    this.#used.delete(from)
    this.#used.add(to)
    one.location = to
    one.units = units
    this.relocated++
    return true
  }

  drop(): boolean {
    return false
  }

  /** There is no memory above. */
  recall(): Promise<boolean> {
    return Promise.resolve(false)
  }

  poolOf(): number {
    return poolKey
  }

  isPersistent(): boolean {
    return this.place.traits.persistent
  }

  objectOf(owner: number): number {
    return owner % 3
  }

  indexOf(owner: number): number {
    return owner
  }

  isCurrent(): boolean {
    return true
  }

  landed(flight: Flight): void {
    const boarded = this.#underWay.get(flight)
    if (boarded === undefined) fail('a flight landed that is not under way')
    this.#underWay.delete(flight)
    const { count, locations, units, offsets, bytes } = flight
    expect(count === boarded.length, `the flight has ${count} frames after it was written, not ${boarded.length}`)
    let at = 0
    for (const [n, { owner, length, pageBytes, seed, sent }] of boarded.entries()) {
      const where = `frame ${n} of a flight`
      expect(offsets[n] === at, `${where} begins at ${offsets[n]}, not at ${at}`)
      expectSame(bytes.subarray(at, at + sent * this.place.unitBytes), this.#frameOf(owner, seed, length, sent), where)
      at += sent * this.place.unitBytes
      const location = locations[n]!
      if (location === none) {
        this.refused++
        this.#free.push(owner)
        continue
      }
      expect(isLocation(location), `${where} has the location ${location}`)
      expect(!this.#used.has(location), `${where} has the location ${location}, which is in use`)
      expect(this.#areUnits(units[n]!, sent), `${where} has ${units[n]} units, was sent with ${sent}`)
      this.#used.add(location)
      this.kept.set(owner, { location, units: units[n]!, sent, length, pageBytes, seed })
    }
  }

  #areUnits(units: number, sent: number): boolean {
    return Number.isInteger(units) && units >= sent && (units - sent) * this.place.unitBytes <= maxRoundingBytes
  }

  // ---- What is done with it ---------------------------------------------------------------------------------------

  /** Units that a block takes. */
  unitsFor({ length }: Form): number {
    const { unitBytes, traits } = this.place
    return traits.rawOnly ? length / unitBytes : unitsOf(length, unitBytes)
  }

  /** Blocks of a form that fit one flight; one at least. */
  perFlight(form: Form): number {
    return Math.max(1, Math.floor(this.place.flightBytes / (this.unitsFor(form) * this.place.unitBytes)))
  }

  /** A frame as it is sent: a header as the chain writes it, but for its seal, and the block. */
  #frameOf(owner: number, seed: number, length: number, units: number): Uint8Array {
    const { unitBytes, traits } = this.place
    const bytes = new Uint8Array(units * unitBytes)
    const at = traits.rawOnly ? 0 : frameBytes
    bytes.set(bytesOf(seed, length), at)
    if (traits.rawOnly) return bytes
    const words = new DataView(bytes.buffer)
    words.setUint32(0, Math.imul(seed, 0x9e3779b1) >>> 0, true)
    words.setUint32(4, (length - 1) | (2 << 16), true)
    words.setUint32(8, seed, true)
    words.setInt32(12, owner, true)
    return bytes
  }

  /** Fills a flight with blocks, which must fit. */
  board(forms: readonly Form[]): Flight {
    const { place } = this
    const { unitBytes } = place
    const sizes = forms.map((form) => this.unitsFor(form))
    const filled = sizes.reduce((sum, units) => sum + units * unitBytes, 0)
    const flight = new Flight(
      new ArrayBuffer(Math.max(filled, place.flightBytes)),
      Math.max(filled, place.flightBytes),
      unitBytes,
    )
    // What an earlier flight has left there says nothing.
    flight.locations.fill(12_345_678)
    const boarded = forms.map((form, n): Boarded => {
      const owner = this.#free.pop() ?? this.#owners++
      const seed = ++this.#seed
      const sent = sizes[n]!
      flight.bytes.set(this.#frameOf(owner, seed, form.length, sent), flight.filled)
      flight.offsets[n] = flight.filled
      flight.units[n] = sent
      flight.owners[n] = owner
      flight.locations[n] = none
      flight.filled += sent * unitBytes
      return { ...form, owner, seed, sent }
    })
    flight.count = forms.length
    this.#underWay.set(flight, boarded)
    return flight
  }

  /**
   * Sends blocks in one flight. Resolves to the owners of those that were taken; rejects as the place does, and then
   * has nothing.
   */
  async write(...forms: readonly Form[]): Promise<number[]> {
    const flight = this.board(forms)
    const boarded = this.#underWay.get(flight)!
    const { count } = flight
    const beyond = flight.locations.slice(count)
    try {
      await this.place.write(flight)
    } catch (error) {
      this.#failed(flight)
      throw error
    }
    return this.#wasWritten(flight, boarded, beyond)
  }

  /** As `write`, before it returns. */
  writeNow(...forms: readonly Form[]): number[] {
    const flight = this.board(forms)
    const boarded = this.#underWay.get(flight)!
    const beyond = flight.locations.slice(flight.count)
    try {
      this.place.writeNow!(flight)
    } catch (error) {
      this.#failed(flight)
      throw error
    }
    return this.#wasWritten(flight, boarded, beyond)
  }

  #wasWritten(flight: Flight, boarded: readonly Boarded[], beyond: Float64Array): number[] {
    // A place may have said so itself.
    if (this.#underWay.has(flight)) this.landed(flight)
    const is = flight.locations.slice(boarded.length)
    expect(
      beyond.every((location, n) => location === is[n]),
      'it set locations of frames that the flight does not have',
    )
    return boarded.filter(({ owner, seed }) => this.kept.get(owner)?.seed === seed).map(({ owner }) => owner)
  }

  #failed(flight: Flight): void {
    const boarded = this.#underWay.get(flight)
    if (boarded === undefined) fail('a flight failed after it had landed')
    for (const { owner } of boarded) this.#free.push(owner)
    this.#underWay.delete(flight)
  }

  /** Sends blocks that must find room, in as many flights as they need. */
  async mustWrite(...forms: readonly Form[]): Promise<number[]> {
    const owners: number[] = []
    for (let n = 0; n < forms.length; ) {
      const flight: Form[] = []
      let bytes = 0
      while (n < forms.length && (flight.length === 0 || bytes + this.#bytesFor(forms[n]!) <= this.place.flightBytes)) {
        bytes += this.#bytesFor(forms[n]!)
        flight.push(forms[n++]!)
      }
      const taken = await this.write(...flight)
      expect(taken.length === flight.length, `of ${flight.length} frames of a flight, ${taken.length} were taken`)
      owners.push(...taken)
    }
    return owners
  }

  #bytesFor(form: Form): number {
    return this.unitsFor(form) * this.place.unitBytes
  }

  /** Sends blocks until one is refused, `bytes` of them at most. Answers how many there are. */
  async fill(form: Form, bytes: number): Promise<number> {
    const perFlight = this.perFlight(form)
    for (let left = bytes; left > 0; left -= form.length * perFlight) {
      const taken = await this.write(...new Array<Form>(perFlight).fill(form))
      if (taken.length < perFlight) return this.kept.size
    }
    return fail(`it took ${bytes} bytes of blocks and had room for more`)
  }

  free(owner: number): void {
    const { location, units } = this.kept.get(owner)!
    this.#lose(owner)
    this.place.free(location, units)
  }

  /** Gives a frame up in this run only. */
  forget(owner: number): void {
    const { location, units } = this.kept.get(owner)!
    this.#lose(owner)
    this.place.forget!(location, units)
  }

  #lose(owner: number): void {
    this.#used.delete(this.kept.get(owner)!.location)
    this.kept.delete(owner)
    this.#free.push(owner)
  }

  freeAll(): void {
    for (const owner of this.kept.keys()) this.free(owner)
  }

  /** Reads the frame of an owner; it must be there, unless it was given up or moved meanwhile. */
  async expectFrame(owner: number): Promise<void> {
    const one = this.kept.get(owner)!
    const { location, units } = one
    const into = this.#buffer(units)
    const isThere = (): boolean => this.kept.get(owner) === one && one.location === location
    try {
      await this.place.read(location, units, into)
    } catch (error) {
      if (isThere()) throw error
      return
    }
    expectUntouched(into, 0, this.#unitsThere(units), `frame at ${location}`)
    if (isThere()) this.#compare(owner, one, into)
  }

  /** The same, before it returns. */
  expectFrameNow(owner: number): void {
    const one = this.kept.get(owner)!
    const into = this.#buffer(one.units)
    this.place.readNow!(one.location, one.units, into)
    expectUntouched(into, 0, this.#unitsThere(one.units), `frame at ${one.location}`)
    this.#compare(owner, one, into)
  }

  #unitsThere(units: number): number {
    return units * this.place.unitBytes
  }

  #buffer(units: number): Uint8Array {
    return new Uint8Array(this.#unitsThere(units) + margin).fill(untouched)
  }

  #compare(owner: number, { location, length, seed, sent }: Framed, into: Uint8Array): void {
    const bytes = sent * this.place.unitBytes
    expectSame(
      into.subarray(0, bytes),
      this.#frameOf(owner, seed, length, sent),
      `frame of ${length} bytes at ${location}`,
    )
  }

  /** Every frame must be there, and nothing else. */
  async expectAll(): Promise<void> {
    for (const owner of this.kept.keys()) await this.expectFrame(owner)
    if (this.place.readNow !== undefined)
      for (const owner of [...this.kept.keys()].slice(0, 8)) this.expectFrameNow(owner)
    this.expectNothingElse()
  }

  /** The place has these frames and no other, where it can say so. Nothing is under way. */
  expectNothingElse(): void {
    this.place.check?.([...this.kept.values()].map(({ location, units }) => ({ location, units })))
  }
}

const isLocation = (location: number): boolean => Number.isInteger(location) && location >= 0 && location <= maxLocation
