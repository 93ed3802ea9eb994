/** Where the swap file puts what it is sent: the place alone, with owners that the test plays. */
import { Flight, type LayerContext, none, type Owners, type PlaceTraits, systemAllocator } from '@tmem/core'
import { PageFile, TransferBuffers } from '@tmem/page-file'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { roomFor, SwapPlace } from '../src/index.ts'
import { Disk, same } from './device.ts'

/** Room for 32 pages of 4 KiB that do not shrink. */
const cluster = 33 * 4096
const unit = 128
/** Units of a page that does not shrink. */
const rawUnits = 33

interface Frame {
  location: number
  readonly units: number
  readonly fill: number
}

interface RigOptions {
  readonly bytesPerHour?: number
  readonly clock?: () => number
}

/** A place over a disk in memory, and what was put there. */
class Rig {
  readonly disk: Disk = new Disk()
  readonly place: SwapPlace
  readonly frames: Map<number, Frame> = new Map()
  refused = 0
  #next = 0

  constructor(sizeBytes: number, { bytesPerHour, clock }: RigOptions = {}) {
    const roomBytes = roomFor(sizeBytes)
    const { path, files } = this.disk
    const content = { name: 'test' }
    const buffers = new TransferBuffers({ bytes: cluster })
    const file = PageFile.open({ path, files, mode: 'make', bytes: 4096 + roomBytes, content, buffers })
    const traits = { reservedBytes: sizeBytes } as PlaceTraits
    const context = { allocator: systemAllocator, clock } as unknown as LayerContext
    this.place = new SwapPlace({ file, traits, from: 4096, roomBytes, slots: false, bytesPerHour }, context)
    this.disk.forget()
    const owners: Owners = {
      unitsAt: (owner, location) => {
        const frame = this.frames.get(owner)
        return frame?.location === location ? frame.units : 0
      },
      moved: (owner, from, to, units) => {
        const frame = this.frames.get(owner)
        if (frame?.location !== from) return false
        same(units, frame.units)
        frame.location = to
        return true
      },
      drop: () => false,
      recall: async () => false,
      isCurrent: () => true,
      landed: () => undefined,
      poolOf: () => 0,
      isPersistent: () => true,
      objectOf: () => 0,
      indexOf: () => 0,
    }
    this.place.attach(owners)
  }

  /** A flight of frames of so many units each. */
  flight(units: readonly number[]): Flight {
    const flight = new Flight(new ArrayBuffer(cluster), cluster, unit)
    for (const count of units) {
      const owner = this.#next++
      const n = flight.count++
      flight.bytes.fill(owner % 251, flight.filled, flight.filled + count * unit)
      flight.words[(flight.filled >>> 2) + 1] = count * unit - 17
      flight.words[(flight.filled >>> 2) + 3] = owner
      flight.offsets[n] = flight.filled
      flight.units[n] = count
      flight.owners[n] = owner
      flight.locations[n] = none
      flight.filled += count * unit
    }
    return flight
  }

  /** Notes what came of a flight; the numbers of what was taken. */
  landed(flight: Flight): number[] {
    const taken: number[] = []
    for (let n = 0; n < flight.count; n++) {
      const owner = flight.owners[n]!
      const location = flight.locations[n]!
      if (location === none) this.refused++
      else {
        this.frames.set(owner, { location, units: flight.units[n]!, fill: owner % 251 })
        taken.push(owner)
      }
    }
    return taken
  }

  write(units: readonly number[]): number[] {
    const flight = this.flight(units)
    const before = flight.bytes.slice()
    this.place.writeNow(flight)
    same(Buffer.compare(flight.bytes, before), 0)
    return this.landed(flight)
  }

  free(owner: number): void {
    const { location, units } = this.frames.get(owner)!
    this.frames.delete(owner)
    this.place.free(location, units)
  }

  check(): void {
    this.place.check([...this.frames.values()])
  }

  /** Every frame is what was written. */
  readAll(): void {
    const into = new Uint8Array(64 * 1024)
    for (const [owner, { location, units, fill }] of this.frames) {
      this.place.readNow(location, units, into)
      same(new DataView(into.buffer).getInt32(12, true), owner)
      same(
        into.subarray(16, units * unit).every((byte) => byte === fill),
        true,
      )
    }
  }

  get counters(): Readonly<Record<string, number>> {
    return this.place.stats().counters
  }

  get usedUnits(): number {
    return [...this.frames.values()].reduce((sum, { units }) => sum + units, 0)
  }
}

/** Numbers that look random, the same in every run. */
function sequence(seed: number): (below: number) => number {
  let state = seed
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return Math.floor((state / 2 ** 32) * below)
  }
}

const repeated = (units: number, count: number): number[] => new Array<number>(count).fill(units)

describe('where frames go', () => {
  test('a flight goes behind the last one, into one free cluster, in one write of whole blocks', () => {
    const rig = new Rig(2 ** 20)
    rig.write(repeated(20, 51))
    expect(rig.disk.asked('write').map(({ position, length }) => [position, length])).toEqual([[4096, 32 * 4096]])
    // Short ones share a block with the one before; long ones do not, so that nothing has to be read.
    rig.write([10])
    rig.write([10])
    rig.disk.forget()
    rig.write(repeated(20, 15))
    expect(rig.disk.asked('write').map(({ position, length }) => [position, length])).toEqual([
      [4096 + 33 * 4096, 10 * 4096],
    ])
    expect(rig.disk.asked('read')).toEqual([])
    rig.check()
    rig.readAll()
  })

  test('holes are filled exactly: no more is written than the frames have, and nothing is read', () => {
    const rig = new Rig(2 ** 20)
    const clusters = rig.counters['free_clusters']!
    const kept: number[] = []
    for (let n = 0; n < clusters - 1; n++) kept.push(...rig.write(repeated(32, 33)))
    expect([rig.counters['free_clusters'], rig.refused]).toEqual([1, 0])
    // Two holes of eight blocks in each cluster.
    for (const [n, owner] of kept.entries()) if (n % 33 < 32 && (n % 33) % 16 >= 8) rig.free(owner)
    rig.disk.forget()
    // No two frames in their order fill eight blocks; put in another one they do.
    rig.write([150, 7, 200, 106, 49, 120, 136, 256])
    expect(rig.disk.asked('write').map(({ length }) => length)).toEqual(repeated(8 * 4096, 4))
    expect(rig.disk.asked('read')).toEqual([])
    rig.check()
    rig.readAll()
  })

  test('what the disk was asked for is what is counted', () => {
    const rig = new Rig(2 ** 20)
    const random = sequence(3)
    const live: number[] = []
    for (let n = 0; n < 400; n++) {
      live.push(...rig.write(Array.from({ length: 12 }, () => 1 + random(rawUnits))))
      while (rig.usedUnits > 5000) rig.free(live.splice(random(live.length), 1)[0]!)
    }
    const { counters, disk } = rig
    expect(counters).toMatchObject({
      diskReads: disk.asked('read').length,
      diskWrites: disk.asked('write').length,
      diskBytesRead: disk.bytes('read'),
      diskBytesWritten: disk.bytes('write'),
      frames: rig.frames.size,
      used_bytes_on_disk: rig.usedUnits * unit,
      writeErrors: 0,
    })
  })
})

describe('space comes back', () => {
  test('whatever is overwritten, as long as there is room for as many bytes of pages: nothing is refused', () => {
    const step = fc.record({
      most: fc.integer({ min: 3, max: rawUnits }),
      count: fc.integer({ min: 8, max: 31 }),
      /** Who goes: the oldest, the newest, anybody, or every second one. */
      goes: fc.constantFrom('oldest', 'newest', 'any', 'second'),
    })
    let packed = 0
    fc.assert(
      fc.property(
        fc.array(step, { minLength: 2, maxLength: 5 }),
        fc.integer({ min: 1, max: 1e9 }),
        fc.boolean(),
        (steps, seed, alike) => {
          const sizeBytes = 2 * 2 ** 20
          const rig = new Rig(sizeBytes)
          const random = sequence(seed)
          const most = (sizeBytes / 4096) * rawUnits
          const live: number[] = []
          for (const { most: largest, count, goes } of steps)
            for (let left = most; left > 0; ) {
              const units = Array.from({ length: count }, () => (alike ? largest : 1 + random(largest)))
              const sum = units.reduce((a, b) => a + b)
              left -= sum
              for (let n = 0; rig.usedUnits + sum > most; n++) {
                const which = {
                  oldest: 0,
                  newest: live.length - 1,
                  any: random(live.length),
                  second: (2 * n) % live.length,
                }
                rig.free(live.splice(which[goes], 1)[0]!)
              }
              live.push(...rig.write(units))
              same(rig.refused, 0)
            }
          rig.check()
          rig.readAll()
          packed += rig.counters['packedFrames']!
        },
      ),
      { seed: 7, numRuns: 6 },
    )
    // Histories in which nothing had to be packed would show little.
    expect(packed).toBeGreaterThan(100)
  })

  test('pages that do not shrink, all of them live, are overwritten three times at random', () => {
    const pages = 4096
    const rig = new Rig(pages * 4096)
    const random = sequence(11)
    const live: number[] = []
    for (let n = 0; n < pages; n += 31) live.push(...rig.write(repeated(rawUnits, Math.min(31, pages - n))))
    for (let n = 0; n < 3 * pages; n += 16) {
      // The new ones are there before the old ones go.
      const fresh = rig.write(repeated(rawUnits, 16))
      for (const owner of fresh) {
        const which = random(live.length)
        rig.free(live[which]!)
        live[which] = owner
      }
    }
    expect([rig.refused, rig.frames.size]).toEqual([0, pages])
    rig.check()
    rig.readAll()
  })
})

/** A full place of which every second frame was given up, so that only packing makes room for long ones. */
function scattered(): Rig {
  const rig = new Rig(2 ** 20)
  const all: number[] = []
  for (let n = rig.counters['free_clusters']! - 1; n > 0; n--) all.push(...rig.write(repeated(16, 66)))
  for (const [n, owner] of all.entries()) if (n % 2 === 0) rig.free(owner)
  rig.disk.forget()
  return rig
}

describe('packing', () => {
  test('makes room for what fits nowhere, and moves frames whole', () => {
    const rig = scattered()
    rig.write(repeated(33, 31))
    expect(rig.refused).toBe(0)
    expect(rig.counters).toMatchObject({ packedFrames: 66, fragmented: 1 })
    rig.check()
    rig.readAll()
  })

  test.each(['read', 'write'] as const)('that fails (%s) loses nothing', (name) => {
    const rig = scattered()
    rig.disk.fault = (call) => (call.name === name && call.length === cluster ? { code: 'EIO' } : undefined)
    rig.write(repeated(33, 5))
    expect(rig.refused).toBe(5)
    rig.disk.fault = () => undefined
    expect(rig.place.failure).toMatchObject({ cause: { code: 'EIO' } })
    rig.check()
    rig.readAll()
    rig.write(repeated(33, 5))
    expect(rig.refused).toBe(5)
    rig.check()
    rig.readAll()
  })

  test('goes on around a frame whose header is damaged', () => {
    const rig = scattered()
    const [owner] = rig.frames.keys()
    const damaged = rig.frames.get(owner!)!
    const beside = rig.frames.get(owner! + 2)!.location
    rig.disk.damage(4096 + damaged.location * unit + 12)
    rig.write(repeated(33, 31))
    expect(rig.refused).toBe(0)
    expect(rig.frames.get(owner!)).toBe(damaged)
    // Its cluster cannot become free, so nothing of it is moved.
    expect([rig.frames.get(owner! + 2)!.location, rig.counters['packedFrames']]).toEqual([beside, 66])
    rig.check()
  })
})

describe('several flights at once', () => {
  test('one that blocks keeps away from the blocks of one that is under way', async () => {
    const rig = new Rig(2 ** 20)
    let release = (): void => undefined
    const until = new Promise<void>((resolve) => {
      release = resolve
    })
    rig.disk.fault = ({ name }) => (name === 'write' ? { until } : undefined)
    const slow = rig.flight([10, 10])
    const writing = rig.place.write(slow)
    await new Promise((resolve) => setImmediate(resolve))
    rig.write([10])
    release()
    await writing
    rig.landed(slow)
    expect([rig.frames.size, rig.refused]).toEqual([3, 0])
    rig.check()
    rig.readAll()
  })

  test('one that fails gives its room back, whichever of its writes it was', async () => {
    const rig = new Rig(2 ** 20)
    const all: number[] = []
    while (rig.counters['free_clusters']! > 1) all.push(...rig.write(repeated(32, 33)))
    for (const [n, owner] of all.entries()) if (n % 4 === 0) rig.free(owner)
    let failures = 0
    for (let failing = 1, done = false; !done; failing++) {
      let writes = 0
      rig.disk.fault = ({ name }) => (name === 'write' && ++writes === failing ? { code: 'EIO' } : undefined)
      const flight = rig.flight(Array.from({ length: 20 }, (_, n) => 9 + ((n * 5) % 13)))
      const before = flight.bytes.slice()
      const landed = await rig.place.write(flight).then(
        () => true,
        () => false,
      )
      expect(Buffer.compare(flight.bytes, before)).toBe(0)
      expect(rig.landed(flight).length).toBe(landed ? 20 : 0)
      done = landed
      if (!landed) failures++
      rig.disk.fault = () => undefined
      rig.check()
    }
    expect(failures).toBeGreaterThan(5)
    rig.readAll()
  })
})

test('what may be written in an hour is counted by the clock; what must be written goes all the same', async () => {
  let now = 0
  const rig = new Rig(2 ** 20, { bytesPerHour: 2 * cluster, clock: () => now })
  const send = async (): Promise<boolean> => {
    if (!rig.place.open(false)) return false
    const flight = rig.flight(repeated(32, 33))
    await rig.place.write(flight)
    rig.landed(flight)
    return true
  }
  expect([await send(), await send(), await send(), rig.place.open(true)]).toEqual([true, true, false, true])
  now += 1_799_000
  expect(rig.place.open(false)).toBe(false)
  now += 1001
  expect([await send(), await send()]).toEqual([true, false])
  // No more is saved up than an hour's worth.
  now += 10 * 3_600_000
  expect([await send(), await send(), await send()]).toEqual([true, true, false])
  rig.write([32])
  expect(rig.counters['forcedBytesWritten']).toBe(4096)
})
