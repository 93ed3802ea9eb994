/**
 * What a block device may answer: for each sector the version that is there, those that may be there instead, and those
 * that may come back when its server is killed.
 *
 * A version is a number that is given out once; it and the sector decide every byte, so what is read can be compared as
 * a whole, and named when it is another one. Version 0 is zeros: what was never written, trimmed, zeroed, cut off.
 *
 * Invariants:
 *  - A sector has at most one change under way, and none while an abandoned one may still reach it: who begins a change
 *    asks `isFree`. So what is there is `now` or what that one change writes, whatever the order in which a server
 *    works.
 *  - `older` of a sector are the versions that were there since the last flush that covers them: in an image any of
 *    them may be what a kill leaves. A flush covers what was acknowledged before it was sent.
 *  - Where a read overlaps a change in time, either version is right, for each sector by itself.
 */
import { scatter } from '@tmem/simulator/unstable'

/** The unit of the model, in bytes: the smallest that a device takes. */
export const sectorBytes = 512
/** Of a page: devices keep those whole. */
export const pageSectors: number = 4096 / sectorBytes

/**
 * What a server leaves of a device when it ends: nothing, what was flushed and perhaps more, all that was acknowledged.
 */
export type Left = 'nothing' | 'flushed' | 'acknowledged'

/** A change of the sectors from `from` up to but without `to`. */
export interface Change {
  readonly from: number
  readonly to: number
  readonly version: number
}

/** A read under way: what was there when it began, and what was changed since. */
export interface Reading {
  readonly from: number
  readonly to: number
  readonly before: Uint32Array
  readonly changes: Change[]
}

/** A version that is there no more, and how many flushes had begun when that was acknowledged. */
interface Older {
  readonly version: number
  readonly replacedAt: number
}

/** A sector that is not as it has to be. */
export interface Wrong {
  readonly sector: number
  readonly expected: readonly number[]
  /** In words: which device, which sector, what it should hold and what it holds. */
  readonly message: string
}

/** Kinds of content: one word repeated, noise, a part noise, a stamp and zeros, zeros that are written. */
const kinds = { same: 0, noise: 1, half: 2, stamp: 3, zeros: 4 } as const
const kindCount = 5
const sectorWords = sectorBytes / 4
/** Words of noise in a sector that shrinks. */
const halfWords = sectorWords / 4

export class DeviceModel {
  readonly name: string
  /** Tells its sectors from those of other devices. */
  readonly #number: number
  readonly #now: Uint32Array
  readonly #older = new Map<number, Older[]>()
  readonly #underWay = new Set<Change>()
  readonly #abandoned = new Set<Change>()
  readonly #reads = new Set<Reading>()
  /** Versions beside `now` that an ended server may have left, by sector. */
  #doubtful = new Map<number, number[]>()
  /** Pages that may be held: written since they were last given up as a whole. */
  readonly #held: Uint8Array
  #sectors: number
  #versions = 0
  #flushes = 0
  #expected: Buffer = Buffer.alloc(0)

  /**
   * @param number below 16: of the device among others; @param sizeBytes whole pages; @param maxBytes that it may grow
   * to
   */
  constructor(name: string, number: number, sizeBytes: number, maxBytes: number) {
    this.name = name
    this.#number = number
    this.#sectors = sizeBytes / sectorBytes
    this.#now = new Uint32Array(maxBytes / sectorBytes)
    this.#held = new Uint8Array(this.#now.length / pageSectors)
  }

  get sectors(): number {
    return this.#sectors
  }

  get sizeBytes(): number {
    return this.#sectors * sectorBytes
  }

  /** Whether a change may begin there. */
  isFree(from: number, to: number): boolean {
    if (to > this.#sectors) return false
    for (const set of [this.#underWay, this.#abandoned])
      for (const change of set) if (change.from < to && change.to > from) return false
    return true
  }

  /** A change is sent: bytes of a version of its own, or zeros. */
  begin(from: number, to: number, isZero = false): Change {
    const change = { from, to, version: isZero ? 0 : ++this.#versions }
    this.#underWay.add(change)
    for (const reading of this.#reads) if (reading.from < to && reading.to > from) reading.changes.push(change)
    if (!isZero) this.#held.fill(1, Math.floor(from / pageSectors), Math.ceil(to / pageSectors))
    return change
  }

  /** It is acknowledged. `lasts`: a kill leaves it. */
  done(change: Change, lasts: boolean): void {
    const { from, to, version } = change
    this.#underWay.delete(change)
    for (let sector = from; sector < to; sector++) this.#set(sector, version, lasts)
    if (version === 0) this.#held.fill(0, Math.ceil(from / pageSectors), Math.max(0, Math.floor(to / pageSectors)))
  }

  /** Nobody will be told whether it is done; it may be later. Until the device is settled nothing begins there. */
  abandon(change: Change): void {
    if (this.#underWay.delete(change)) this.#abandoned.add(change)
  }

  /** A flush is sent; for `flushed`. */
  beginFlush(): number {
    return this.#flushes++
  }

  /** A flush is acknowledged. */
  flushed(flush: number): void {
    for (const [sector, older] of this.#older) {
      const left = older.filter(({ replacedAt }) => replacedAt > flush)
      if (left.length === 0) this.#older.delete(sector)
      else if (left.length < older.length) this.#older.set(sector, left)
    }
  }

  /** A read is sent. */
  beginRead(from: number, to: number): Reading {
    const changes = [...this.#underWay, ...this.#abandoned].filter((each) => each.from < to && each.to > from)
    const reading = { from, to, before: this.#now.slice(from, to), changes }
    this.#reads.add(reading)
    return reading
  }

  /** Its answer, or `undefined` where there is none. */
  endRead(reading: Reading, bytes: Uint8Array | undefined): Wrong | undefined {
    const { from, to, before, changes } = reading
    this.#reads.delete(reading)
    if (bytes === undefined || this.#isAll(before, from, bytes)) return undefined
    for (let sector = from; sector < to; sector++) {
      const allowed = [before[sector - from]!]
      for (const change of changes) if (change.from <= sector && change.to > sector) allowed.push(change.version)
      const found = this.#found(allowed, sector, bytes, (sector - from) * sectorBytes)
      if (found === undefined) return this.#wrong(sector, allowed, bytes, (sector - from) * sectorBytes)
    }
    return undefined
  }

  /**
   * The device has another size. What is cut off may come back from an image until the next flush; growing adds zeros.
   */
  resize(sizeBytes: number): void {
    const sectors = sizeBytes / sectorBytes
    for (let sector = sectors; sector < this.#sectors; sector++) this.#set(sector, 0, false)
    if (sectors < this.#sectors) this.#held.fill(0, sectors / pageSectors)
    this.#sectors = sectors
  }

  /**
   * The server has ended: all that it was asked and has not answered may be done or not, and this is what it leaves.
   */
  ended(left: Left): void {
    this.#reads.clear()
    if (left === 'nothing') {
      this.#now.fill(0)
      this.#held.fill(0)
      this.#underWay.clear()
      this.#abandoned.clear()
    } else {
      for (const change of this.#underWay) this.#abandoned.add(change)
      this.#underWay.clear()
      if (left === 'flushed')
        for (const [sector, older] of this.#older)
          this.#doubtful.set(
            sector,
            older.map(({ version }) => version),
          )
      this.settling()
    }
    this.#older.clear()
  }

  /** Nobody but the caller has the device open, and nothing is under way: the next `settle` says what came of it. */
  settling(): void {
    for (const change of this.#abandoned)
      for (let sector = change.from; sector < change.to; sector++)
        this.#doubtful.set(sector, [...(this.#doubtful.get(sector) ?? []), change.version])
    this.#abandoned.clear()
  }

  /**
   * What is there from `from` on: it must be what may be there, and is what is there from now on. `lasts`: it was left
   * by a server that has ended.
   */
  settle(from: number, bytes: Uint8Array, lasts: boolean): Wrong | undefined {
    const sectors = bytes.length / sectorBytes
    for (let sector = from; sector < from + sectors; sector++) {
      const at = (sector - from) * sectorBytes
      const now = this.#now[sector]!
      const allowed = [now, ...(this.#doubtful.get(sector) ?? [])]
      const found = this.#found(allowed, sector, bytes, at)
      if (found === undefined) return this.#wrong(sector, allowed, bytes, at)
      this.#doubtful.delete(sector)
      if (found !== now) this.#set(sector, found, lasts)
      if (found !== 0) this.#held[Math.floor(sector / pageSectors)] = 1
    }
    return undefined
  }

  /** How many pages the device holds at least (they are not zeros) and at most (they were written). */
  pages(): { readonly least: number; readonly most: number } {
    let [least, most] = [0, 0]
    for (let page = 0; page * pageSectors < this.#sectors; page++) {
      most += this.#held[page]!
      const first = page * pageSectors
      for (let sector = first; sector < first + pageSectors; sector++)
        if (kindOf(this.#now[sector]!) !== kinds.zeros) {
          least++
          break
        }
    }
    return { least, most }
  }

  /** The bytes of a change. */
  bytesOf({ from, to, version }: Change): Buffer {
    const bytes = Buffer.alloc((to - from) * sectorBytes)
    for (let sector = from; sector < to; sector++) this.#fill(version, sector, bytes, (sector - from) * sectorBytes)
    return bytes
  }

  #set(sector: number, version: number, lasts: boolean): void {
    const before = this.#now[sector]!
    this.#now[sector] = version
    if (lasts) {
      this.#older.delete(sector)
      return
    }
    const older = this.#older.get(sector)
    if (older === undefined) this.#older.set(sector, [{ version: before, replacedAt: this.#flushes }])
    else older.push({ version: before, replacedAt: this.#flushes })
  }

  #isAll(versions: Uint32Array, from: number, bytes: Uint8Array): boolean {
    if (this.#expected.length < bytes.length) this.#expected = Buffer.alloc(bytes.length)
    for (let n = 0; n < versions.length; n++) this.#fill(versions[n]!, from + n, this.#expected, n * sectorBytes)
    return this.#expected.compare(bytes, 0, bytes.length, 0, bytes.length) === 0
  }

  #found(allowed: readonly number[], sector: number, bytes: Uint8Array, at: number): number | undefined {
    return allowed.find((version) => {
      this.#fill(version, sector, scratch, 0)
      return scratch.compare(bytes, at, at + sectorBytes) === 0
    })
  }

  #fill(version: number, sector: number, into: Buffer, at: number): void {
    fillSector(version, sector + this.#number * 2 ** 28, into, at)
  }

  #wrong(sector: number, expected: readonly number[], bytes: Uint8Array, at: number): Wrong {
    const holds = Buffer.from(bytes.subarray(at, at + sectorBytes))
    const which = [...new Set(expected)].map((version) => (version === 0 ? 'zeros' : `version ${version}`)).join(' or ')
    return {
      sector,
      expected,
      message: `${this.name}, byte ${sector * sectorBytes}: expected ${which}, found ${this.#nameOf(holds, sector)}`,
    }
  }

  /** Whose bytes these are. */
  #nameOf(bytes: Buffer, sector: number): string {
    if (bytes.every((byte) => byte === 0)) return 'zeros'
    const [version, place] = [bytes.readUInt32LE(0), bytes.readUInt32LE(4)]
    const own = sector + this.#number * 2 ** 28
    for (const where of [own, place]) {
      fillSector(version, where, scratch, 0)
      if (scratch.compare(bytes) !== 0) continue
      const device = Math.floor(where / 2 ** 28)
      if (device === this.#number && version > this.#versions) continue
      if (where === own) return `version ${version}`
      // One word that repeats does not say where it was written.
      if (kindOf(version) === kinds.same) continue
      const at = (where % 2 ** 28) * sectorBytes
      return `version ${version} of byte ${at} of ${device === this.#number ? this.name : `device number ${device}`}`
    }
    return `what was never written (${bytes.subarray(0, 16).toString('hex')}…)`
  }
}

const scratch = Buffer.alloc(sectorBytes)

const kindOf = (version: number): number => (version === 0 ? kinds.zeros : scatter(version) % kindCount)

function fillSector(version: number, place: number, into: Buffer, at: number): void {
  const kind = kindOf(version)
  if (kind === kinds.zeros) {
    into.fill(0, at, at + sectorBytes)
    return
  }
  if (kind === kinds.same) {
    for (let n = 0; n < sectorWords; n++) into.writeInt32LE(version | 0, at + 4 * n)
    return
  }
  into.writeInt32LE(version | 0, at)
  into.writeInt32LE(place | 0, at + 4)
  const noise = kind === kinds.noise ? sectorWords : kind === kinds.half ? halfWords : 2
  let word = scatter(version ^ scatter(place)) | 1
  for (let n = 2; n < noise; n++) {
    // Marsaglia's xorshift, 32 bits.
    word ^= word << 13
    word ^= word >>> 17
    word ^= word << 5
    into.writeInt32LE(word | 0, at + 4 * n)
  }
  into.fill(0, at + 4 * noise, at + sectorBytes)
}
