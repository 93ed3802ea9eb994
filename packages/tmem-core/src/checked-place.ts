/**
 * A boundary around a place: it knows what the place has taken, and breaks when an answer cannot be right.
 *
 * It remembers of each location who owns it and a checksum of the bytes, and asserts the rules at the head of
 * `place.ts`: what was taken comes back as it was, a location in use is not given out again, what has moved is where it
 * is said to be, numbers are numbers, buffers of the caller are left alone. It looks the other way, too: the chain
 * frees, reads and moves only what is there, and calls nothing after `close`. `compose` puts one around every place,
 * and around every filter between places, with `check: 'model'`.
 *
 * Who breaks a rule stops the stack (`TMEM_BROKEN`, with the name of the place and the rule). A call that may be told
 * throws; `free`, sizes and what comes while nobody waits are only noted. In both cases `Broken` has the error, and
 * whoever stands above the chain asks nothing any more: the chain itself need not know. `close` still gives everything
 * back.
 *
 * Invariants: a location is in the book exactly while the place has a block there that it has acknowledged.
 */
import { none } from './handles.ts'
import { putOutcomeCount, TmemError } from './outcomes.ts'
import {
  type Block,
  type BlockCodec,
  type Flight,
  frameBytes,
  isSlow,
  type MemoryPlace,
  type MovedBlock,
  maxBlockBytes,
  maxFrameUnits,
  maxLocation,
  maxRoundingBytes,
  type Owners,
  type Place,
  type PlaceTraits,
  type RecoverBlock,
  type SlowPlace,
  unitsOf,
} from './place.ts'
import { compareBytes, crc32 } from './runtime.ts'
import type { Budget, Progress, StatsNode } from './store.ts'
import { idle } from './store.ts'

/** Who is told that a rule was broken: `undefined` while none was. */
export interface Broken {
  broken: TmemError | undefined
}

/**
 * Wraps a place. The first broken rule is noted in `told`. Throws `TmemError` (`TMEM_BROKEN`) for traits or units that
 * cannot be.
 */
export function checkedPlace(place: Place, told: Broken): Place {
  return isSlow(place) ? new CheckedSlowPlace(place, told) : new CheckedMemoryPlace(place, told)
}

const sumOf = (bytes: Uint8Array, at: number, length: number): number => crc32(bytes.subarray(at, at + length))
const isCount = (value: unknown, most: number = Number.MAX_SAFE_INTEGER): boolean =>
  Number.isSafeInteger(value) && (value as number) >= 0 && (value as number) <= most
const isLocation = (value: unknown): boolean => isCount(value, maxLocation)

/** What both kinds have in common. */
abstract class CheckedPlace {
  readonly name: string
  readonly traits: PlaceTraits
  readonly codec?: BlockCodec
  readonly #place: Place
  readonly #told: Broken
  #isClosed = false

  constructor(place: Place, told: Broken) {
    this.#place = place
    this.#told = told
    this.name = place.name
    this.traits = place.traits
    if (place.codec !== undefined) this.codec = place.codec
    const { capacity, reservedBytes, persistent, ephemeral, readsAtOnce = 1 } = this.traits
    this.holds(isCount(capacity) && capacity > 0, `a capacity of ${capacity} blocks`)
    this.holds(isCount(reservedBytes), `${reservedBytes} bytes are reserved`)
    this.holds(isCount(readsAtOnce, 65_536) && readsAtOnce > 0, `${readsAtOnce} blocks are read at once`)
    this.holds(persistent || ephemeral, 'it keeps no kind of page')
  }

  get failure(): Error | undefined {
    return this.#place.failure
  }

  get isBroken(): boolean {
    return this.#told.broken !== undefined
  }

  ready(): Promise<void> {
    this.asked('ready')
    return this.#place.ready?.() ?? Promise.resolve()
  }

  tick(budget: Budget): Progress {
    this.asked('tick')
    const progress = this.#place.tick?.(budget) ?? idle
    this.holds(isCount(progress.pages, budget.pages), `tick touched ${progress.pages} of ${budget.pages} pages`)
    return progress
  }

  stats(): StatsNode {
    const node = this.#place.stats()
    this.#judge(node)
    return node
  }

  #judge({ name, counters, children }: StatsNode): void {
    for (const [counter, value] of Object.entries(counters))
      this.holds(Number.isFinite(value), `the counter ${name}/${counter} is ${value}`)
    for (const child of children) this.#judge(child)
  }

  close(): Promise<void> {
    this.#isClosed = true
    return this.#place.close()
  }

  /** Before each call: nobody asks a place that is closed, or a stack that has stopped. */
  asked(what: string): void {
    if (this.#told.broken !== undefined) throw this.#told.broken
    this.demands(!this.#isClosed, `${what} after close`)
  }

  /** Stops the stack unless the place kept a rule. */
  holds(rule: boolean, what: string): void {
    if (rule) return
    this.note(what)
    throw this.#told.broken
  }

  /** Stops the stack unless the chain kept a rule. */
  demands(rule: boolean, what: string): void {
    if (rule) return
    this.#tell(`the stack broke a rule towards ${this.name}: ${what}`)
    throw this.#told.broken
  }

  /** Notes that the place broke a rule. */
  note(what: string): void {
    this.#tell(`${this.name} broke a rule of places: ${what}`)
  }

  #tell(what: string): void {
    this.#told.broken ??= new TmemError('TMEM_BROKEN', `${what}; this stack is stopped`, { layer: this.name })
  }
}

/** A block in a memory place. */
interface Taken {
  readonly owner: number
  readonly length: number
  readonly pageBytes: number
  readonly sum: number
  location: number
}

/** Bytes beside what is filled that are looked at. */
const margin = 64

class CheckedMemoryPlace extends CheckedPlace implements MemoryPlace {
  readonly stronger?: BlockCodec
  readonly overwrite?: (location: number, block: Block) => void
  readonly #place: MemoryPlace
  readonly #book = new Map<number, Taken>()
  readonly #owners = new Map<number, Taken>()
  readonly #sizes = new Map<number, number>()
  /** What moved in the call that may move blocks; `undefined`: there is none. */
  #moved: Taken[] | undefined
  readonly #page: Block = {
    bytes: new Uint8Array(maxBlockBytes + 2 * margin),
    at: 0,
    length: 0,
    codec: 0,
    pageBytes: 0,
    persistent: false,
  }

  constructor(place: MemoryPlace, told: Broken) {
    super(place, told)
    this.#place = place
    if (place.stronger !== undefined) this.stronger = place.stronger
    if (place.overwrite !== undefined) this.overwrite = (location, block) => this.#overwrite(location, block)
  }

  get limitBytes(): number {
    const { limitBytes } = this.#place
    if (!isCount(limitBytes)) this.note(`a limit of ${limitBytes} bytes`)
    return limitBytes
  }

  get usedBytes(): number {
    const { usedBytes } = this.#place
    if (!isCount(usedBytes)) this.note(`${usedBytes} bytes are used`)
    return usedBytes
  }

  prepare(length: number): void {
    this.asked('prepare')
    this.demands(length > 0 && Number.isFinite(length), `prepare for ${length} bytes`)
    this.#place.prepare?.(length)
  }

  put(block: Block, owner: number): number {
    this.asked('put')
    const { bytes, at, length, codec, pageBytes, persistent } = block
    const what = `a block of ${length} bytes, codec ${codec}, of a page of ${pageBytes}`
    this.demands(length > 0 && length <= pageBytes && pageBytes <= maxBlockBytes, what)
    this.demands((codec === 0) === (length === pageBytes) && (codec === 0 || !this.traits.rawOnly), what)
    this.demands(persistent ? this.traits.persistent : this.traits.ephemeral, 'a page of a kind that is not kept there')
    this.demands(isCount(owner), `a block of owner ${owner}`)
    const sum = sumOf(bytes, at, length)
    const location = this.#place.put(block, owner)
    this.holds(
      block.bytes === bytes && sumOf(bytes, at, length) === sum,
      `put changed the caller's bytes (owner ${owner})`,
    )
    if (location < 0) {
      this.holds(isCount(-location, putOutcomeCount - 1), `put answered ${location}`)
      return location
    }
    this.holds(isLocation(location), `put answered ${location}`)
    this.holds(!this.#book.has(location), `location ${location} was given out while it is in use`)
    const taken: Taken = { owner, length, pageBytes, sum, location }
    this.#book.set(location, taken)
    this.#owners.set(owner, taken)
    return location
  }

  #overwrite(location: number, block: Block): void {
    this.asked('overwrite')
    const { bytes, at, length, pageBytes } = block
    const taken = this.#book.get(location)
    this.demands(
      this.traits.rawOnly && taken?.length === length && taken.pageBytes === pageBytes,
      `${length} bytes of ${pageBytes} over location ${location}, where ${taken?.length ?? 0} of ${taken?.pageBytes ?? 0} are`,
    )
    this.#place.overwrite!(location, block)
    const written: Taken = { ...taken!, sum: sumOf(bytes, at, length) }
    this.#book.set(location, written)
    this.#owners.set(written.owner, written)
    this.#verify(written)
  }

  get(location: number, into: Block): void {
    this.asked('get')
    const taken = this.#book.get(location)
    this.demands(taken !== undefined, `get of location ${location}, where nothing is`)
    this.demands(into.length === taken!.length, `get of ${into.length} of the ${taken!.length} bytes at ${location}`)
    this.#compare(taken!, into)
  }

  /** Gets a block, and looks whether it is what was taken, and whether nothing beside it was touched. */
  #compare(taken: Taken, into: Block): void {
    const { bytes, at, length } = into
    const first = Math.max(0, at - margin)
    const before = bytes.slice(first, at)
    const behind = bytes.slice(at + length, at + length + margin)
    this.#place.get(taken.location, into)
    const where = `(location ${taken.location}, owner ${taken.owner})`
    this.holds(sumOf(bytes, at, length) === taken.sum, `the bytes are not those that were taken ${where}`)
    this.holds(
      compareBytes.call(bytes, before, 0, before.length, first, at) === 0 &&
        compareBytes.call(bytes, behind, 0, behind.length, at + length, at + length + behind.length) === 0,
      `get filled more than the ${length} bytes of the block ${where}`,
    )
  }

  free(location: number, length: number, pageBytes: number): void {
    const taken = this.#book.get(location)
    if (this.isBroken && taken === undefined) return
    this.demands(taken !== undefined, `free of location ${location}, where nothing is`)
    this.demands(
      taken!.length === length && taken!.pageBytes === pageBytes,
      `free of ${length} bytes of ${pageBytes} at ${location}, where ${taken!.length} of ${taken!.pageBytes} are`,
    )
    this.#book.delete(location)
    // Its owner may have the next one already.
    if (this.#owners.get(taken!.owner) === taken) this.#owners.delete(taken!.owner)
    try {
      this.#place.free(location, length, pageBytes)
    } catch (error) {
      this.note(`free failed (location ${location}): ${String(error)}`)
    }
  }

  sizeOf(length: number): number {
    const size = this.#place.sizeOf(length)
    const before = this.#sizes.get(length) ?? size
    if (!isCount(size) || size < length || size !== before)
      this.note(`a block of ${length} bytes takes ${size}, before ${before}`)
    this.#sizes.set(length, size)
    return size
  }

  excess(): number {
    const excess = this.#place.excess()
    if (!Number.isSafeInteger(excess)) this.note(`an excess of ${excess} bytes`)
    return excess
  }

  charge(bytes: number): boolean {
    this.asked('charge')
    this.demands(isCount(bytes), `a charge of ${bytes} bytes`)
    const answer = this.#place.charge(bytes)
    this.holds(typeof answer === 'boolean', `charge answered ${String(answer)}`)
    return answer
  }

  fit(length: number, moved: MovedBlock): boolean {
    this.asked('fit')
    return this.#moving(moved, (tell) => this.#place.fit?.(length, tell) ?? false)
  }

  compact(blocks: number, moved: MovedBlock): number {
    this.asked('compact')
    const done = this.#moving(moved, (tell) => this.#place.compact?.(blocks, tell) ?? 0)
    this.holds(isCount(done, blocks), `compact answered ${done}, asked for at most ${blocks}`)
    return done
  }

  /** Lets the place move blocks; each must then be where it was said to be. */
  #moving<T>(moved: MovedBlock, run: (tell: MovedBlock) => T): T {
    const those: Taken[] = []
    this.#moved = those
    try {
      const answer = run((owner, to) => {
        this.holds(this.#moved === those, `owner ${owner} was moved when nobody had asked for it`)
        const taken = this.#owners.get(owner)
        this.holds(taken !== undefined, `a block of owner ${owner} was moved, who has none`)
        this.holds(isLocation(to) && !this.#book.has(to), `owner ${owner} was moved to ${to}, which is in use`)
        this.#book.delete(taken!.location)
        taken!.location = to
        this.#book.set(to, taken!)
        those.push(taken!)
        moved(owner, to)
      })
      for (const taken of those) this.#verify(taken)
      return answer
    } finally {
      this.#moved = undefined
    }
  }

  #verify(taken: Taken): void {
    const page = this.#page
    page.at = margin
    page.length = taken.length
    this.#compare(taken, page)
  }

  check(owns: (owner: number, location: number) => boolean): void {
    const visited = new Set<number>()
    if (this.#place.check !== undefined) {
      this.#place.check((owner, location) => {
        visited.add(location)
        return this.#book.get(location)?.owner === owner
      })
      if (visited.size !== this.#book.size)
        throw new Error(`${this.name}: ${visited.size} blocks are there, ${this.#book.size} were taken`)
    }
    for (const taken of this.#book.values()) {
      if (!owns(taken.owner, taken.location))
        throw new Error(`${this.name}: the block at ${taken.location} belongs to nobody (owner ${taken.owner})`)
      this.#verify(taken)
    }
  }
}

/** A frame in a slow place. `sum`: of the units that were sent; `undefined`: it was there before. */
interface Framed {
  owner: number
  units: number
  readonly sent: number
  sum: number | undefined
}

/** What a flight was when it was sent. */
interface Sent {
  readonly count: number
  readonly filled: number
  readonly offsets: Uint32Array
  readonly units: Uint32Array
  readonly owners: Int32Array
  readonly sums: readonly number[]
  /** Locations behind those of its frames. */
  readonly beyond: Float64Array
}

class CheckedSlowPlace extends CheckedPlace implements SlowPlace {
  readonly unitBytes: number
  readonly flightBytes: number
  readonly writeNow?: (flight: Flight) => void
  readonly readNow?: (location: number, units: number, into: Uint8Array) => void
  readonly #place: SlowPlace
  readonly #book = new Map<number, Framed>()
  /** Transfers under way; and flights that have not landed yet. */
  #transfers = 0
  readonly #underWay = new Map<Flight, Sent>()
  #isAttached = false

  constructor(place: SlowPlace, told: Broken) {
    super(place, told)
    this.#place = place
    this.unitBytes = place.unitBytes
    this.flightBytes = place.flightBytes
    const { unitBytes, flightBytes } = this
    this.holds(
      unitBytes >= 16 && unitBytes <= 4096 && 2 ** Math.round(Math.log2(unitBytes)) === unitBytes,
      `a unit of ${unitBytes} bytes`,
    )
    const most = this.traits.rawOnly ? maxBlockBytes / unitBytes : unitsOf(maxBlockBytes, unitBytes)
    this.holds(
      most <= maxFrameUnits,
      `its largest frame has ${most} units of ${unitBytes} bytes, more than ${maxFrameUnits}`,
    )
    this.holds(flightBytes > 0 && flightBytes % unitBytes === 0, `a flight of ${flightBytes} bytes`)
    if (place.writeNow !== undefined) this.writeNow = (flight) => this.#writeNow(flight)
    if (place.readNow !== undefined) this.readNow = (location, units, into) => this.#readNow(location, units, into)
  }

  attach(owners: Owners): void {
    this.asked('attach')
    this.demands(!this.#isAttached && this.#book.size === 0, 'attach, twice or after something else')
    this.#isAttached = true
    this.#place.attach?.({
      unitsAt: (owner, location) => {
        const units = owners.unitsAt(owner, location)
        const framed = this.#book.get(location)
        this.demands(
          units === 0 || (framed?.units === units && framed.owner === owner),
          `owner ${owner} has ${units} units at ${location}, where ${framed?.units ?? 0} of ${framed?.owner ?? none} are`,
        )
        return units
      },
      moved: (owner, from, to, units) => this.#wasMoved(owners, owner, from, to, units),
      drop: (owner, location) => {
        const isGone = owners.drop(owner, location)
        this.demands(
          !isGone || !this.#book.has(location),
          `owner ${owner} was dropped, and the frame at ${location} not freed`,
        )
        return isGone
      },
      recall: async (owner, location, where) => {
        const framed = this.#book.get(location)
        const isGone = await owners.recall(owner, location, where)
        // Another frame may be there by now.
        this.demands(
          !isGone || framed === undefined || this.#book.get(location) !== framed,
          `owner ${owner} was recalled, and the frame at ${location} not freed`,
        )
        return isGone
      },
      poolOf: (owner) => owners.poolOf(owner),
      isPersistent: (owner) => owners.isPersistent(owner),
      objectOf: (owner) => owners.objectOf(owner),
      indexOf: (owner) => owners.indexOf(owner),
      isCurrent: (flight, frame) => {
        this.holds(this.#underWay.has(flight), 'it asks about a flight that is not under way')
        return owners.isCurrent(flight, frame)
      },
      landed: (flight) => {
        const sent = this.#underWay.get(flight)
        this.holds(sent !== undefined, 'a flight landed that is not under way')
        this.#underWay.delete(flight)
        this.#landed(flight, sent!)
        owners.landed(flight)
      },
    })
  }

  #wasMoved(owners: Owners, owner: number, from: number, to: number, units: number): boolean {
    const framed = this.#book.get(from)
    const where = `(owner ${owner}, from ${from})`
    this.holds(framed === undefined || framed.owner === owner, `a frame of somebody else was moved ${where}`)
    this.holds(isLocation(to) && !this.#book.has(to), `a frame was moved to ${to}, which is in use ${where}`)
    this.holds(framed === undefined || units >= framed.sent, `a frame has ${units} units after moving ${where}`)
    const isKept = owners.moved(owner, from, to, units)
    this.demands(isKept === (framed !== undefined), `it does not agree that the frame was there ${where}`)
    if (!isKept) return false
    this.#book.delete(from)
    // Whoever is reading the old location knows another object.
    this.#book.set(to, { ...framed!, units })
    return true
  }

  open(forced: boolean): boolean {
    this.asked('open')
    const answer = this.#place.open(forced)
    this.holds(typeof answer === 'boolean', `open answered ${String(answer)}`)
    return answer
  }

  async write(flight: Flight): Promise<void> {
    const sent = this.#send(flight)
    this.#underWay.set(flight, sent)
    this.#transfers++
    try {
      await this.#place.write(flight)
    } catch (error) {
      this.holds(error instanceof Error, `write failed with ${String(error)}, which is no Error`)
      this.holds(this.#underWay.delete(flight), 'write failed after its flight had landed')
      throw error
    } finally {
      this.#transfers--
    }
    // It may have said so itself, and the flight may be another one's since.
    if (this.#underWay.delete(flight)) this.#landed(flight, sent)
  }

  #writeNow(flight: Flight): void {
    const sent = this.#send(flight)
    this.#underWay.set(flight, sent)
    try {
      this.#place.writeNow!(flight)
    } finally {
      this.#underWay.delete(flight)
    }
    this.#landed(flight, sent)
  }

  /** A flight before it goes. */
  #send(flight: Flight): Sent {
    this.asked('write')
    const { count, filled, offsets, units, owners, locations, bytes } = flight
    this.demands(count > 0 && filled <= bytes.length, `a flight of ${count} frames, ${filled} bytes`)
    const sums: number[] = []
    let at = 0
    for (let n = 0; n < count; n++) {
      const length = units[n]! * this.unitBytes
      this.demands(offsets[n] === at && length >= frameBytes, `frame ${n} of a flight is not where it should be`)
      this.demands(locations[n] === none, `frame ${n} of a flight has a location before it is written`)
      sums.push(sumOf(bytes, at, length))
      at += length
    }
    this.demands(at === filled, `a flight of ${filled} bytes with frames of ${at}`)
    return {
      count,
      filled,
      offsets: offsets.slice(0, count),
      units: units.slice(0, count),
      owners: owners.slice(0, count),
      sums,
      beyond: locations.slice(count),
    }
  }

  /** A flight is safe: what has a location was taken. */
  #landed(flight: Flight, sent: Sent): void {
    const { count, filled, offsets, units, owners, locations, bytes } = flight
    this.holds(count === sent.count && filled === sent.filled, 'it changed the number of frames of a flight')
    this.holds(
      sent.beyond.every((location, n) => locations[count + n] === location),
      'it set locations of frames that a flight does not have',
    )
    for (let n = 0; n < count; n++) {
      const location = locations[n]!
      const where = `(frame ${n} of a flight, owner ${sent.owners[n]})`
      this.holds(offsets[n] === sent.offsets[n] && owners[n] === sent.owners[n], `it changed a flight ${where}`)
      this.holds(
        sumOf(bytes, offsets[n]!, sent.units[n]! * this.unitBytes) === sent.sums[n],
        `the bytes of a flight changed on its way ${where}`,
      )
      if (location === none) continue
      this.holds(isLocation(location), `a location of ${location} ${where}`)
      const most = Math.min(maxFrameUnits, sent.units[n]! + maxRoundingBytes / this.unitBytes)
      this.holds(units[n]! >= sent.units[n]! && units[n]! <= most, `${units[n]} units ${where}`)
      this.holds(!this.#book.has(location), `location ${location} was given out while it is in use ${where}`)
      this.#book.set(location, { owner: owners[n]!, units: units[n]!, sent: sent.units[n]!, sum: sent.sums[n] })
    }
  }

  async read(location: number, units: number, into: Uint8Array): Promise<void> {
    const framed = this.#reading(location, units, into)
    const beyond = this.#beyond(units, into)
    this.#transfers++
    try {
      await this.#place.read(location, units, into)
    } catch (error) {
      this.holds(error instanceof Error, `read failed with ${String(error)}, which is no Error`)
      throw error
    } finally {
      this.#transfers--
    }
    this.#wasRead(framed, location, units, into, beyond)
  }

  #readNow(location: number, units: number, into: Uint8Array): void {
    const framed = this.#reading(location, units, into)
    const beyond = this.#beyond(units, into)
    this.#place.readNow!(location, units, into)
    this.#wasRead(framed, location, units, into, beyond)
  }

  #reading(location: number, units: number, into: Uint8Array): Framed {
    this.asked('read')
    const framed = this.#book.get(location)
    this.demands(framed !== undefined, `read of location ${location}, where nothing is`)
    this.demands(
      framed!.units === units && into.length >= units * this.unitBytes,
      `read of ${units} units at ${location}, where ${framed!.units} are, into ${into.length} bytes`,
    )
    return framed!
  }

  #beyond(units: number, into: Uint8Array): number {
    return crc32(into.subarray(units * this.unitBytes))
  }

  #wasRead(framed: Framed, location: number, units: number, into: Uint8Array, beyond: number): void {
    this.holds(this.#beyond(units, into) === beyond, `read filled more than the ${units} units at ${location}`)
    // What was given up meanwhile may be anything.
    if (this.#book.get(location) !== framed) return
    const sum = sumOf(into, 0, framed.sent * this.unitBytes)
    framed.sum ??= sum
    this.holds(
      framed.sum === sum,
      `the bytes are not those that were taken (location ${location}, owner ${framed.owner})`,
    )
  }

  free(location: number, units: number): void {
    this.#free(location, units, () => this.#place.free(location, units))
  }

  forget(location: number, units: number): void {
    this.#free(location, units, () => {
      if (this.#place.forget === undefined) this.#place.free(location, units)
      else this.#place.forget(location, units)
    })
  }

  #free(location: number, units: number, free: () => void): void {
    const framed = this.#book.get(location)
    if (this.isBroken && framed === undefined) return
    this.demands(framed !== undefined, `free of location ${location}, where nothing is`)
    this.demands(framed!.units === units, `free of ${units} units at ${location}, where ${framed!.units} are`)
    this.#book.delete(location)
    try {
      free()
    } catch (error) {
      this.note(`free failed (location ${location}): ${String(error)}`)
    }
  }

  recover(pool: number, enter: RecoverBlock): void {
    this.asked('recover')
    this.#place.recover?.(pool, (object, index, location, units) => {
      this.holds(
        isLocation(location) && !this.#book.has(location),
        `it recovered location ${location}, which is in use`,
      )
      this.holds(units > 0 && isCount(units, maxFrameUnits), `it recovered ${units} units at ${location}`)
      const owner = enter(object, index, location, units)
      if (owner !== none) this.#book.set(location, { owner, units, sent: units, sum: undefined })
      return owner
    })
  }

  async sync(): Promise<void> {
    this.asked('sync')
    try {
      await this.#place.sync?.()
    } catch (error) {
      this.holds(error instanceof TmemError, `sync failed with ${String(error)}, which is no TmemError`)
      throw error
    }
  }

  override close(): Promise<void> {
    this.demands(this.#transfers === 0 || this.isBroken, `close while ${this.#transfers} transfers are under way`)
    return super.close()
  }

  check(blocks: readonly { readonly location: number; readonly units: number }[]): void {
    for (const { location, units } of blocks)
      if (this.#book.get(location)?.units !== units)
        throw new Error(`${this.name}: no frame of ${units} units was taken at ${location}`)
    if (blocks.length !== this.#book.size)
      throw new Error(`${this.name}: ${blocks.length} blocks are known, ${this.#book.size} were taken`)
    this.#place.check?.(blocks)
  }
}
