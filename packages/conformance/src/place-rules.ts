/**
 * The rules of places, one named case each: what `place.ts` of @tmem/core promises of a place in memory and of one that
 * may have to wait. Which of them apply is read off the place's traits and the manifest.
 *
 * Sources: the contracts at the head of that file; zsmalloc (locations stay, blocks move), the writeback of zswap and
 * zram, nbdkit.
 */
import type { BlockCodec, LayerContext, Place, PlaceTraits } from '@tmem/core'
import {
  basePageSize,
  isSlow,
  maxBlockBytes,
  maxEntries,
  maxFrameUnits,
  none,
  PutOutcome,
  type StatsNode,
  TmemError,
  unitsOf,
} from '@tmem/core'
import { turn } from '@tmem/core/runtime'
import fc from 'fast-check'
import { ConformanceError, expect, expectSame, fail, makePage } from './pages.ts'
import {
  bytesOf,
  type Form,
  formsOf,
  MemoryHands,
  type PlaceManifest,
  type PlaceSubject,
  type PlaceWorld,
  placeWorld,
  poolKey,
  rawPage,
  SlowHands,
} from './place-hands.ts'
import { repetition } from './property.ts'

/** What a rule about places works with. Everything that it opens is closed after the case. */
export interface PlaceBench {
  readonly subject: PlaceSubject
  readonly manifest: PlaceManifest
  /** Opens another place. */
  readonly open: (world?: PlaceWorld) => Place
  /** Opens what a place that was closed has left. */
  readonly reopen: () => Place
  /** Closes a place before the case is over. */
  readonly close: (place: Place) => Promise<void>
}

/** A rule about places. `when`: what it applies to, of a place that was opened to see. */
export interface PlaceRule {
  readonly name: string
  readonly when?: (place: Place, manifest: PlaceManifest) => boolean
  run(bench: PlaceBench): Promise<void> | void
}

const inMemory = (place: Place): boolean => !isSlow(place)
const cycle = <T>(values: readonly T[], count: number): T[] =>
  Array.from({ length: count }, (_, n) => values[n % values.length]!)

/** Some blocks of every kind that a place takes, a few KiB. */
const someForms = (place: Place): readonly Form[] =>
  formsOf(place.traits).filter(({ length }) => length <= basePageSize)

/** A simple sequence of numbers that is the same in every run. */
function numbers(seed: number): (below: number) => number {
  let state = seed | 0 || 1
  return (below) => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % below
  }
}

export const commonRules: readonly PlaceRule[] = [
  {
    name: 'its traits are frozen and make sense',
    run({ open }) {
      const place = open()
      const { traits } = place
      expect(Object.isFrozen(traits), 'the traits can be changed')
      const { capacity, reservedBytes, maxPageSize, survives } = traits
      expect(Number.isInteger(capacity) && capacity > 0, `it has a capacity of ${capacity} blocks`)
      expect(Number.isSafeInteger(reservedBytes) && reservedBytes >= 0, `${reservedBytes} bytes are reserved`)
      expect(reservedBytes <= maxEntries * maxBlockBytes, `${reservedBytes} bytes are reserved, for ${capacity} blocks`)
      expect(traits.persistent || traits.ephemeral, 'it keeps neither persistent nor ephemeral pages')
      expect(traits.persistent || reservedBytes === 0, 'it reserves room for pages that may vanish')
      expect(traits.waits || survives === 'nothing', `a place in memory does not survive its ${survives}`)
      const isSize =
        maxPageSize >= basePageSize && maxPageSize <= 2 ** 21 && 2 ** Math.floor(Math.log2(maxPageSize)) === maxPageSize
      expect(isSize, `pages of up to ${maxPageSize} bytes`)
      if (!isSlow(place)) return
      const { unitBytes, flightBytes } = place
      expect(
        unitBytes >= 16 && unitBytes <= 4096 && 2 ** Math.floor(Math.log2(unitBytes)) === unitBytes,
        `a unit of ${unitBytes} bytes`,
      )
      const largest = Math.min(maxPageSize, maxBlockBytes)
      const units = traits.rawOnly ? largest / unitBytes : unitsOf(largest, unitBytes)
      expect(units <= maxFrameUnits, `its largest frame has ${units} units`)
      expect(flightBytes >= unitBytes && flightBytes % unitBytes === 0, `a flight of ${flightBytes} bytes`)
    },
  },
  {
    name: 'two places in one process share nothing',
    async run({ open, manifest }) {
      // What survives may be one file.
      if (manifest.reopen !== undefined) return
      const places = [open(), open()]
      if (places.some(isSlow)) {
        const [one, other] = places.map((place, n) => new SlowHands(place, 1000 * n))
        await one!.mustWrite(rawPage)
        await other!.mustWrite(rawPage, rawPage)
        other!.free(0)
        await one!.mustWrite(rawPage)
        await Promise.all([one!.expectAll(), other!.expectAll()])
        return
      }
      const [one, other] = places.map((place, n) => new MemoryHands(place, 1000 * n))
      one!.mustPut(rawPage)
      const first = other!.mustPut(rawPage)
      other!.mustPut(rawPage)
      other!.free(first)
      one!.mustPut(rawPage)
      one!.expectAll()
      other!.expectAll()
    },
  },
  {
    name: 'its statistics are a tree of named numbers, and asking changes nothing',
    async run({ open }) {
      const place = open()
      judge(place.stats())
      const before = JSON.stringify(place.stats())
      expect(JSON.stringify(place.stats()) === before, 'the statistics change when they are asked for')
      if (isSlow(place)) await new SlowHands(place).mustWrite(...someForms(place))
      else for (const form of someForms(place)) new MemoryHands(place).mustPut(form)
      judge(place.stats())
      expect(place.stats().name === place.name, `the statistics of ${place.name} are named ${place.stats().name}`)
    },
  },
  {
    name: 'closing gives everything back, with blocks inside, too, and closing again does nothing',
    async run({ open }) {
      const empty = open()
      await empty.close()
      await empty.close()
      const place = open()
      if (isSlow(place)) await new SlowHands(place).mustWrite(...someForms(place))
      else {
        const hands = new MemoryHands(place)
        for (const form of someForms(place)) hands.mustPut(form)
      }
      await Promise.all([place.close(), place.close()])
      await place.close()
    },
  },
  {
    name: 'every allocation fails once, and no byte is lost',
    async run(bench) {
      const { allocator } = placeWorld()
      const whole = await work(bench, { allocator, context: { allocator, accounts: placeWorld().context.accounts } })
      if (whole === undefined) fail('it does not open with all the memory that it wants')
      for (const site of allocator.sites.keys()) await failing(bench, { sites: [site] })
      for (let nth = 1; ; nth++) if (!(await failing(bench, { nth }))) return
    },
  },
]

/** Every counter is a finite number with a name, in this node and below. */
function judge({ name, counters, children }: StatsNode): void {
  expect(typeof name === 'string' && name !== '', 'a node of the statistics has no name')
  for (const [counter, value] of Object.entries(counters))
    expect(Number.isFinite(value), `the counter ${name}/${counter} is ${value}`)
  for (const child of children) judge(child)
}

/**
 * Does some work on a place whose memory is that of `world`. How many blocks were kept; `undefined`: it did not open.
 */
async function work({ open, close }: PlaceBench, world: PlaceWorld): Promise<number | undefined> {
  let place: Place
  try {
    place = open(world)
  } catch (error) {
    if (error instanceof TmemError && error.code === 'TMEM_NO_MEMORY' && world.allocator.failures > 0) return undefined
    throw error
  }
  if (isSlow(place)) {
    const hands = new SlowHands(place)
    for (const form of formsOf(place.traits)) await hands.write(form)
    for (const owner of [...hands.kept.keys()].filter((_, n) => n % 2 === 0)) hands.free(owner)
    for (const form of formsOf(place.traits)) await hands.write(form)
    await hands.expectAll()
    await close(place)
    return hands.kept.size
  }
  const hands = new MemoryHands(place)
  for (const form of formsOf(place.traits)) hands.put(form)
  for (const owner of [...hands.kept.keys()].filter((_, n) => n % 2 === 0)) hands.free(owner)
  place.compact?.(100, hands.moved)
  for (const form of formsOf(place.traits)) hands.put(form)
  hands.expectAll()
  await close(place)
  return hands.kept.size
}

/** Repeats the work with some allocations failing; whether any did. */
async function failing(
  bench: PlaceBench,
  plan: { readonly nth: number } | { readonly sites: readonly string[] },
): Promise<boolean> {
  const world = placeWorld()
  world.allocator.fail(plan)
  await work(bench, world)
  return world.allocator.failures > 0
}

const hasCodec = (place: Place): boolean => place.codec !== undefined

/** Where blocks may be made and read in the workspace of a codec. */
const areas = ({ spareAt }: BlockCodec): readonly number[] => [0, spareAt, spareAt + maxBlockBytes]

export const codecRules: readonly PlaceRule[] = [
  {
    name: 'a page that was encoded is decoded again, anywhere in the workspace',
    when: hasCodec,
    run({ open }) {
      const codec = open().codec!
      expect(codec.id >= 1 && codec.id <= 15 && Number.isInteger(codec.id), `the codec has the number ${codec.id}`)
      for (const size of [basePageSize, 4 * basePageSize, maxBlockBytes])
        for (const [n, to] of areas(codec).entries()) {
          const page = makePage('text', n + 1, size)
          const source = new Uint8Array(size + 64)
          source.set(page, 32)
          const length = codec.encode(source, 32, size, to, size - 1)
          expect(length > 0 && length < size && Number.isInteger(length), `a page of ${size} bytes became ${length}`)
          expectSame(source.subarray(32, 32 + size), page, 'the page after it was encoded')
          const into = new Uint8Array(size + 64)
          expect(codec.decode(codec.id, to, length, into, 32, size), `a block of ${length} bytes is not decoded`)
          expectSame(into.subarray(32, 32 + size), page, `a page of ${size} bytes by way of ${length}`)
          expect(
            into.subarray(0, 32).every((byte) => byte === 0) && into.subarray(32 + size).every((byte) => byte === 0),
            'bytes beside the page were written',
          )
        }
    },
  },
  {
    name: 'a page may be encoded out of one part of the workspace into another',
    when: hasCodec,
    run({ open }) {
      const codec = open().codec!
      const page = makePage('text', 3, basePageSize)
      codec.workspace.set(page, codec.spareAt)
      const to = codec.spareAt + maxBlockBytes
      const length = codec.encode(codec.workspace, codec.spareAt, basePageSize, to, basePageSize - 1)
      const into = new Uint8Array(basePageSize)
      expect(codec.decode(codec.id, to, length, into, 0, basePageSize), 'the block is not decoded')
      expectSame(into, page, 'the page')
    },
  },
  {
    name: 'encoding says 0 for a page that does not shrink as far as it must',
    when: hasCodec,
    run({ open }) {
      const codec = open().codec!
      expect(
        codec.encode(makePage('noise', 1, basePageSize), 0, basePageSize, 0, basePageSize - 1) === 0,
        'noise shrinks',
      )
      const page = makePage('text', 1, basePageSize)
      const length = codec.encode(page, 0, basePageSize, 0, basePageSize - 1)
      expect(
        codec.encode(page, 0, basePageSize, 0, length - 1) === 0,
        `${length} bytes were given as at most ${length - 1}`,
      )
      expect(codec.encode(page, 0, basePageSize, 0, length) === length, `${length} bytes have no room in ${length}`)
    },
  },
  {
    name: 'what is no block is not decoded, and no error',
    when: hasCodec,
    run({ open }) {
      const codec = open().codec!
      const into = new Uint8Array(basePageSize)
      const length = codec.encode(makePage('text', 1, basePageSize), 0, basePageSize, 0, basePageSize - 1)
      expect(!codec.decode(15, 0, length, into, 0, basePageSize), 'a block of a codec that nobody has was decoded')
      expect(!codec.decode(codec.id, 0, Math.floor(length / 2), into, 0, basePageSize), 'half of a block was decoded')
      const random = numbers(1)
      for (let n = 0; n < 200; n++) {
        for (let at = 0; at < 64; at++) codec.workspace[at] = random(256)
        const answer: unknown = codec.decode(codec.id, 0, 1 + random(64), into, 0, basePageSize)
        expect(typeof answer === 'boolean', `decoding answered ${String(answer)}`)
      }
    },
  },
  {
    name: 'a checksum tells every bit of a block, its length and its codec apart',
    when: hasCodec,
    run({ open }) {
      const codec = open().codec!
      for (const at of areas(codec)) {
        codec.workspace.set(bytesOf(1, 200), at)
        const sum = codec.checksum(2, at, 200)
        expect(sum === codec.checksum(2, at, 200), 'a checksum is another the next time')
        expect(
          (sum | 0) === (codec.checksum(2, areas(codec)[0]!, 200) | 0) || at !== areas(codec)[0],
          'a checksum depends on the place',
        )
        expect((sum | 0) !== (codec.checksum(3, at, 200) | 0), 'a checksum is the same for another codec')
        expect((sum | 0) !== (codec.checksum(2, at, 199) | 0), 'a checksum is the same for another length')
        for (let bit = 0; bit < 1600; bit += 7) {
          codec.workspace[at + (bit >>> 3)]! ^= 1 << (bit & 7)
          expect((codec.checksum(2, at, 200) | 0) !== (sum | 0), `a checksum is the same without bit ${bit}`)
          codec.workspace[at + (bit >>> 3)]! ^= 1 << (bit & 7)
        }
      }
    },
  },
]

export const memoryRules: readonly PlaceRule[] = [
  {
    name: 'a block comes back byte for byte, whatever its length',
    when: inMemory,
    run({ open }) {
      const hands = new MemoryHands(open())
      for (const form of formsOf(hands.place.traits)) hands.mustPut(form)
      hands.expectAll()
    },
  },
  {
    name: 'a location in use is not given out again, and freeing one block leaves the others alone',
    when: inMemory,
    run({ open }) {
      const hands = new MemoryHands(open())
      const forms = someForms(hands.place)
      const random = numbers(2)
      for (let n = 0; n < 120; n++) {
        if (hands.put(forms[random(forms.length)]!) === none || random(3) === 0) {
          const owners = [...hands.kept.keys()]
          if (owners.length > 0) hands.free(owners[random(owners.length)]!)
        }
        if (n % 20 === 0) hands.expectAll()
      }
      hands.expectAll()
    },
  },
  {
    name: 'freed blocks leave all of their room to others',
    when: (place, { filledBy }) => inMemory(place) && filledBy !== undefined,
    run({ open, manifest }) {
      const hands = new MemoryHands(open())
      const before = hands.fill(rawPage, manifest.filledBy!)
      for (let round = 0; round < 3; round++) {
        hands.freeAll()
        hands.expectAll()
        const now = hands.fill(rawPage, manifest.filledBy!)
        expect(now >= before, `there was room for ${before} pages, after all were freed only for ${now}`)
      }
      hands.expectAll()
    },
  },
  {
    name: 'a block that is refused leaves nothing behind, and harms none',
    when: (place, { filledBy }) => inMemory(place) && filledBy !== undefined,
    run({ open, manifest }) {
      const hands = new MemoryHands(open())
      hands.fill(rawPage, manifest.filledBy!)
      expect(hands.refusal === PutOutcome.NoMemory, `a full place refuses with the reason ${hands.refusal}`)
      for (const form of formsOf(hands.place.traits)) hands.put(form)
      hands.expectAll()
      // What is freed is taken again.
      const owners = [...hands.kept.keys()].slice(0, 64)
      for (const owner of owners) hands.free(owner)
      expect(hands.put(rawPage) !== none, 'after 64 blocks were freed it has no room for one')
      hands.expectAll()
    },
  },
  {
    name: 'it refuses while it can have no memory, and takes blocks again afterwards',
    when: inMemory,
    run({ open }) {
      const world = placeWorld()
      const hands = new MemoryHands(open(world))
      hands.mustPut(rawPage)
      world.allocator.fail('all')
      const forms = formsOf(hands.place.traits)
      for (const form of cycle(forms, 400)) if (hands.put(form) === none) break
      const isWithout = world.allocator.failures > 0
      expect(
        !isWithout || hands.refusal === PutOutcome.AllocationFailed,
        `without memory it refuses with the reason ${hands.refusal}`,
      )
      hands.expectAll()
      world.allocator.fail('none')
      if (isWithout) hands.mustPut(rawPage)
      hands.expectAll()
    },
  },
  {
    name: 'what a block takes is a whole number of bytes, at least its length, and always the same',
    when: inMemory,
    run({ open }) {
      const hands = new MemoryHands(open())
      const sizes = new Map<number, number>()
      const ask = (): void => {
        for (const { length } of formsOf(hands.place.traits)) {
          const size = hands.place.sizeOf(length)
          expect(Number.isSafeInteger(size) && size >= length, `a block of ${length} bytes takes ${size}`)
          expect(
            (sizes.get(length) ?? size) === size,
            `a block of ${length} bytes took ${sizes.get(length)}, now ${size}`,
          )
          sizes.set(length, size)
        }
      }
      ask()
      for (const form of formsOf(hands.place.traits)) hands.mustPut(form)
      ask()
      hands.freeAll()
      ask()
    },
  },
  {
    name: 'it is above its mark when it has no room, and below when it is empty',
    when: (place, { filledBy }) => inMemory(place) && filledBy !== undefined,
    run({ open, manifest }) {
      const hands = new MemoryHands(open())
      const excess = (): number => {
        const bytes = hands.place.excess()
        expect(Number.isSafeInteger(bytes), `an excess of ${bytes} bytes`)
        return bytes
      }
      expect(excess() <= 0, `${excess()} bytes should go, and nothing is there`)
      hands.fill(rawPage, manifest.filledBy!)
      expect(excess() > 0, 'it is full, and nothing should go')
      hands.freeAll()
      expect(excess() <= 0, `${excess()} bytes should go, after all are gone`)
    },
  },
  {
    name: 'it keeps to its limit, and so does what is charged to it',
    when: inMemory,
    run({ open }) {
      const hands = new MemoryHands(open())
      const { place } = hands
      expect(Number.isSafeInteger(place.limitBytes) && place.limitBytes > 0, `a limit of ${place.limitBytes} bytes`)
      const forms = someForms(place)
      let charged = 0
      for (let n = 0; place.charge(1024); n++) {
        charged += 1024
        expect(charged <= place.limitBytes, `${charged} bytes were charged to a limit of ${place.limitBytes}`)
        hands.put(forms[n % forms.length]!)
        const used: number = place.usedBytes
        expect(
          Number.isSafeInteger(used) && used <= place.limitBytes,
          `${used} bytes are used, more than ${place.limitBytes}`,
        )
      }
      hands.expectAll()
    },
  },
  {
    name: 'compacting says where blocks went, keeps to its number, and comes to an end',
    when: (place) => !isSlow(place) && place.compact !== undefined,
    run({ open }) {
      const hands = new MemoryHands(open())
      scatter(hands)
      for (let n = 0; ; n++) {
        const most = 1 + (n % 7)
        const done: number = hands.place.compact!(most, hands.moved)
        expect(Number.isInteger(done) && done >= 0 && done <= most, `of at most ${most} blocks it moved ${done}`)
        hands.expectAll()
        if (done === 0) break
        expect(n < rounds, 'compacting comes to no end')
      }
    },
  },
  {
    name: 'making a block fit says where others went, and comes to an end',
    when: (place) => !isSlow(place) && place.fit !== undefined,
    run({ open }) {
      const hands = new MemoryHands(open())
      scatter(hands)
      for (let n = 0; ; n++) {
        const answer: unknown = hands.place.fit!(basePageSize, hands.moved)
        expect(typeof answer === 'boolean', `fit answered ${String(answer)}`)
        hands.expectAll()
        if (answer === false) break
        expect(n < rounds, 'there is always something to gain')
      }
    },
  },
  {
    name: 'a lower limit loses nothing, and when it is raised there is room as before',
    when: (place, { limit, filledBy }) => inMemory(place) && limit !== undefined && filledBy !== undefined,
    run({ open, manifest }) {
      const limit = manifest.limit!
      const hands = new MemoryHands(open())
      try {
        const before = hands.fill(rawPage, manifest.filledBy!)
        limit.bytes = 0
        expect(hands.place.limitBytes === 0, `the limit is 0, and it says ${hands.place.limitBytes}`)
        expect(hands.put(rawPage) === none, 'a block was taken above the limit')
        expect(hands.place.excess() > 0, 'its limit is 0, and nothing should go')
        hands.expectAll()
        for (const owner of [...hands.kept.keys()].filter((_, n) => n % 2 === 0)) hands.free(owner)
        for (let n = 0; n < rounds && hands.place.compact?.(64, hands.moved); n++) hands.expectNothingElse()
        hands.expectAll()
        limit.bytes = limit.maximumBytes
        const after = hands.fill(rawPage, manifest.filledBy!)
        expect(after >= before, `there was room for ${before} blocks, with the same limit again only for ${after}`)
        hands.expectAll()
      } finally {
        limit.bytes = limit.maximumBytes
      }
    },
  },
  {
    name: 'pages of all the bytes that are reserved find room, however they were overwritten',
    when: ({ traits }) => !traits.waits && traits.reservedBytes > 0,
    run({ open }) {
      const { traits } = open()
      for (const [size] of reservedSizes(traits).filter(({ length }) => length === 1)) {
        const hands = new MemoryHands(open())
        const form = { length: size!, pageBytes: size! }
        const pages = Math.floor(traits.reservedBytes / size!)
        // As in life: the metadata of each page is in the limit as well, if every page is an object of its own.
        for (let n = 0; n < pages; n++) {
          expect(hands.place.charge(110), `there is no room for the metadata of page ${n} of ${pages}`)
          hands.mustPut(form)
        }
        const random = numbers(3)
        for (let n = 0; n < 3 * pages; n++) {
          const owners = [...hands.kept.keys()]
          hands.free(owners[random(owners.length)]!)
          hands.mustPut(form)
        }
        hands.expectAll()
      }
    },
  },
]

/** Sizes of pages that do not shrink, by which reserved bytes are filled: each alone, and all at once. */
function reservedSizes({ maxPageSize }: PlaceTraits): readonly (readonly number[])[] {
  const sizes: number[] = []
  for (let size = basePageSize; size <= Math.min(maxPageSize, maxBlockBytes); size *= 2) sizes.push(size)
  return [...sizes.map((size) => [size]), sizes]
}

/** How often a place may find something more to move, with a few hundred blocks. */
const rounds = 500

/** Leaves a place with blocks of many sizes, and a hole beside almost each of them. */
function scatter(hands: MemoryHands): void {
  const forms = someForms(hands.place)
  const random = numbers(4)
  for (let n = 0; n < 200; n++) if (hands.put(forms[random(forms.length)]!) === none) break
  for (const owner of hands.kept.keys()) if (random(5) !== 0) hands.free(owner)
}

const waits = (place: Place): boolean => isSlow(place)
const canFail = (place: Place, { fail }: PlaceManifest): boolean => waits(place) && fail !== undefined

/** Runs something that must reject with an error of the system's. */
async function expectFailure(what: string, run: () => unknown): Promise<void> {
  try {
    await run()
  } catch (error) {
    if (error instanceof ConformanceError) throw error
    expect(error instanceof Error, `${what} failed with ${String(error)}, which is no Error`)
    return
  }
  fail(`${what} did not fail`)
}

export const slowRules: readonly PlaceRule[] = [
  {
    name: 'a frame comes back as it was sent, whatever its length',
    when: waits,
    async run({ open }) {
      const hands = new SlowHands(open())
      const forms = formsOf(hands.place.traits)
      await hands.mustWrite(...forms)
      await hands.expectAll()
      hands.freeAll()
      for (const form of forms) await hands.mustWrite(form)
      await hands.expectAll()
    },
  },
  {
    name: 'what is written or read before the call returns is the same',
    when: (place) => isSlow(place) && (place.writeNow !== undefined || place.readNow !== undefined),
    async run({ open }) {
      const hands = new SlowHands(open())
      for (const form of formsOf(hands.place.traits)) {
        const owners = hands.place.writeNow === undefined ? await hands.mustWrite(form) : hands.writeNow(form)
        expect(owners.length === 1, `a frame of ${form.length} bytes was refused`)
        if (hands.place.readNow !== undefined) hands.expectFrameNow(owners[0]!)
      }
      await hands.expectAll()
    },
  },
  {
    name: 'a location in use is not given out again, and freeing one frame leaves the others alone',
    when: waits,
    async run({ open }) {
      const hands = new SlowHands(open())
      const forms = someForms(hands.place)
      const random = numbers(5)
      for (let n = 0; n < 40; n++) {
        await hands.write(...cycle(forms, 1 + random(Math.min(9, hands.perFlight(rawPage)))))
        const owners = [...hands.kept.keys()]
        for (let left = random(owners.length); left > 0; left--) {
          const owner = owners[random(owners.length)]!
          if (hands.kept.has(owner)) hands.free(owner)
        }
        if (n % 10 === 0) await hands.expectAll()
      }
      await hands.expectAll()
    },
  },
  {
    name: 'freed frames leave all of their room to others',
    when: (place, { filledBy }) => waits(place) && filledBy !== undefined,
    async run({ open, manifest }) {
      const hands = new SlowHands(open())
      const before = await hands.fill(rawPage, manifest.filledBy!)
      for (let round = 0; round < 3; round++) {
        hands.freeAll()
        hands.expectNothingElse()
        const now = await hands.fill(rawPage, manifest.filledBy!)
        expect(now >= before, `there was room for ${before} pages, after all were freed only for ${now}`)
      }
      await hands.expectAll()
    },
  },
  {
    name: 'frames that are refused leave nothing behind, and harm none',
    when: (place, { filledBy }) => waits(place) && filledBy !== undefined,
    async run({ open, manifest }) {
      const hands = new SlowHands(open())
      await hands.fill(rawPage, manifest.filledBy!)
      for (const form of formsOf(hands.place.traits)) await hands.write(form)
      if (hands.place.writeNow !== undefined) hands.writeNow(...cycle([rawPage], hands.perFlight(rawPage)))
      await hands.expectAll()
      const owners = [...hands.kept.keys()].slice(0, 64)
      for (const owner of owners) hands.free(owner)
      expect((await hands.write(rawPage)).length === 1, 'after 64 frames were freed it has no room for one')
      await hands.expectAll()
    },
  },
  {
    name: 'reads, flights and frees that overlap do not disturb one another',
    when: waits,
    async run({ open }) {
      const hands = new SlowHands(open())
      const few = Math.min(4, hands.perFlight(rawPage))
      const flight = (): Form[] => new Array<Form>(few).fill(rawPage)
      const owners = await hands.mustWrite(...flight(), ...flight(), ...flight())
      for (let round = 0; round < 5; round++) {
        const writes = [hands.write(...flight()), hands.write(...flight())]
        const reads = owners.slice(0, 2 * few).map((owner) => hands.expectFrame(owner))
        // Given up while flights are under way, and while it is being read itself: what such a read brings nobody looks
        // at.
        for (const owner of owners.splice(few, few)) hands.free(owner)
        if (round % 2 === 1) await turn()
        reads.push(...owners.slice(0, few).map((owner) => hands.expectFrame(owner)))
        for (const written of await Promise.all(writes)) {
          expect(written.length === few, 'frames of a flight were refused')
          owners.push(...written)
        }
        await Promise.all(reads)
      }
      await hands.expectAll()
    },
  },
  {
    name: 'it says whether it would take a flight, and takes one when it says so',
    when: waits,
    async run({ open }) {
      const hands = new SlowHands(open())
      for (const forced of [false, true]) {
        const answer: unknown = hands.place.open(forced)
        expect(typeof answer === 'boolean', `open answered ${String(answer)}`)
        if (answer === true) await hands.mustWrite(rawPage)
      }
      expect(hands.place.open(true), 'it takes nothing, not even when there is no other way')
      await hands.expectAll()
    },
  },
  {
    name: 'a write that fails keeps nothing and loses nothing, and the next one may succeed',
    when: canFail,
    async run({ open, manifest }) {
      const hands = new SlowHands(open())
      const before = await hands.mustWrite(...someForms(hands.place))
      for (let round = 0; round < 3; round++) {
        manifest.fail!('writes')
        await expectFailure('a write', () => hands.write(rawPage, rawPage))
        await Promise.all([
          expectFailure('the first of two writes', () => hands.write(rawPage)),
          expectFailure('the second of two writes', () => hands.write(rawPage)),
        ])
        if (hands.place.writeNow !== undefined) await expectFailure('writeNow', () => hands.writeNow(rawPage))
        hands.expectNothingElse()
        manifest.fail!('nothing')
        await hands.mustWrite(rawPage)
        hands.free(before[round]!)
        await hands.expectAll()
      }
    },
  },
  {
    name: 'a read that fails says so, and the frame is there afterwards',
    when: canFail,
    async run({ open, manifest }) {
      const hands = new SlowHands(open())
      const owners = await hands.mustWrite(...someForms(hands.place))
      manifest.fail!('reads')
      for (const owner of owners) await expectFailure('a read', () => hands.expectFrame(owner))
      if (hands.place.readNow !== undefined) await expectFailure('readNow', () => hands.expectFrameNow(owners[0]!))
      manifest.fail!('nothing')
      await hands.expectAll()
    },
  },
  {
    name: 'pages of all the bytes that are reserved find room, however they were overwritten',
    when: ({ traits }) => traits.waits && traits.reservedBytes > 0,
    async run({ open }) {
      const { traits } = open()
      for (const sizes of reservedSizes(traits)) {
        const hands = new SlowHands(open())
        const random = numbers(6)
        let bytes = 0
        const put = async (): Promise<void> => {
          const forms: Form[] = []
          let length = 0
          for (const most = 1 + random(40); forms.length < most; ) {
            const size = sizes[random(sizes.length)]!
            length += hands.unitsFor({ length: size, pageBytes: size }) * hands.place.unitBytes
            if (bytes + size > traits.reservedBytes || (length > hands.place.flightBytes && forms.length > 0)) break
            bytes += size
            forms.push({ length: size, pageBytes: size })
          }
          if (forms.length > 0) await hands.mustWrite(...forms)
        }
        const smallest = Math.min(...sizes)
        while (bytes + smallest <= traits.reservedBytes) await put()
        for (let overwritten = 0; overwritten < 3 * traits.reservedBytes; ) {
          const owners = [...hands.kept.keys()]
          for (let left = 1 + random(32); left > 0 && owners.length > 0; left--) {
            const [owner] = owners.splice(random(owners.length), 1)
            bytes -= hands.kept.get(owner!)!.length
            overwritten += hands.kept.get(owner!)!.length
            hands.free(owner!)
          }
          while (bytes + smallest <= traits.reservedBytes) await put()
        }
        await hands.expectAll()
      }
    },
  },
  {
    name: 'room comes back when frames of many sizes are overwritten, and what is moved for that is where it was said to be',
    when: (place, { filledBy }) =>
      isSlow(place) && place.attach !== undefined && filledBy !== undefined && !place.traits.rawOnly,
    async run({ open, manifest }) {
      const hands = new SlowHands(open())
      const small: Form = { length: 700, pageBytes: basePageSize }
      const first = await hands.fill(small, manifest.filledBy!)
      // One of four stays: there is room for pages then, in pieces that are too small for them.
      for (const [n, owner] of [...hands.kept.keys()].entries()) if (n % 4 !== 0) hands.free(owner)
      const kept = hands.kept.size
      const room = Math.floor(((first - kept) * hands.unitsFor(small)) / hands.unitsFor(rawPage))
      const pages = Math.floor(room / 4)
      for (let left = pages; left > 0; left -= 8)
        await hands.mustWrite(...new Array<Form>(Math.min(left, 8)).fill(rawPage))
      await hands.expectAll()
    },
  },
  {
    name: 'a sync resolves, and everything is there',
    when: (place) => isSlow(place) && place.sync !== undefined,
    async run({ open }) {
      const hands = new SlowHands(open())
      await hands.place.sync!()
      await hands.mustWrite(...someForms(hands.place))
      await hands.place.sync!()
      await hands.expectAll()
    },
  },
  {
    name: 'what survives is handed over once, by the key of its pool; what was freed is not',
    when: (place, { reopen }) => isSlow(place) && place.traits.survives !== 'nothing' && reopen !== undefined,
    async run({ open, close, reopen }) {
      const place = open()
      const hands = new SlowHands(place)
      const owners = await hands.mustWrite(...cycle(someForms(place), 12))
      const handles = owners.map((owner) => `${hands.objectOf(owner)}/${hands.indexOf(owner)}`)
      for (const owner of owners.slice(0, 4)) hands.free(owner)
      for (const owner of owners.slice(4, 8)) if (hands.place.forget !== undefined) hands.forget(owner)
      const expected = handles.slice(4)
      await hands.place.sync?.()
      await close(place)
      const again = reopen()
      if (!isSlow(again)) fail('it waits no more after it was opened again')
      await again.ready?.()
      const back = new SlowHands(again)
      const text = new TextEncoder()
      const found: string[] = []
      again.recover?.(poolKey + 1, () => fail('frames of one pool were handed over for another'))
      again.recover?.(poolKey, (object, index, location, units) => {
        expect(Number.isInteger(units) && units > 0, `a frame of ${units} units was handed over`)
        expect(Number.isInteger(location) && location >= 0, `a frame at ${location} was handed over`)
        found.push(`${object}/${index}`)
        return none
      })
      expectSame(
        text.encode(found.toSorted().join(' ')),
        text.encode(expected.toSorted().join(' ')),
        'the handles that survived',
      )
      // Nobody took them in: they are gone.
      await back.mustWrite(rawPage)
      await back.expectAll()
    },
  },
]

/** Name of the case that tries long histories. */
export const placePropertyName = 'whatever is done to it, in any order, every block is there until it is freed'

type Step = readonly [what: number, a: number, b: number]

/** One step of a history in a memory place. */
function stepInMemory(hands: MemoryHands, [what, a, b]: Step, { limit }: PlaceManifest, world: PlaceWorld): void {
  const { place } = hands
  const forms = formsOf(place.traits)
  const owners = [...hands.kept.keys()]
  const owner = owners[a % Math.max(1, owners.length)]
  if (what < 50) hands.put(forms[a % forms.length]!)
  else if (what < 75) {
    if (owner !== undefined) hands.free(owner)
  } else if (what < 85) {
    if (owner !== undefined) hands.expectBlock(owner)
  } else if (what < 88) place.compact?.(1 + (b % 20), hands.moved)
  else if (what < 91) place.fit?.(forms[a % forms.length]!.length, hands.moved)
  else if (what < 93) place.charge(b % 300)
  else if (what < 95) world.allocator.fail(b % 2 === 0 ? 'none' : 'all')
  else if (what < 97) {
    if (limit !== undefined) limit.bytes = Math.floor((limit.maximumBytes * (b % 5)) / 4)
  } else hands.expectNothingElse()
}

/** One step of a history in a slow place; what is under way is in `waiting`. */
async function stepInSlow(
  hands: SlowHands,
  [what, a, b]: Step,
  manifest: PlaceManifest,
  waiting: Promise<unknown>[],
): Promise<void> {
  const { place } = hands
  const forms = formsOf(place.traits)
  const owners = [...hands.kept.keys()]
  const owner = owners[a % Math.max(1, owners.length)]
  const flight = Array.from({ length: 1 + (b % 6) }, (_, n) => forms[(a + n * b) % forms.length]!)
  const fits = (): Form[] => {
    let bytes = 0
    return flight.filter((form, n) => {
      bytes += hands.unitsFor(form) * place.unitBytes
      return n === 0 || bytes <= place.flightBytes
    })
  }
  // What fails was told to; everything else is noted, for whoever waits.
  const mayFail = (wait: Promise<unknown>): void => {
    waiting.push(
      wait.then(
        () => undefined,
        (error: unknown) => (isTold(error, manifest) ? undefined : error),
      ),
    )
  }
  if (what < 35) {
    if (waiting.length < 8) mayFail(hands.write(...fits()))
  } else if (what < 45) {
    if (place.writeNow !== undefined) now(() => hands.writeNow(...fits()), manifest)
  } else if (what < 65) {
    if (owner !== undefined) hands.free(owner)
  } else if (what < 78) {
    if (owner !== undefined) mayFail(hands.expectFrame(owner))
  } else if (what < 84) {
    if (owner !== undefined && place.readNow !== undefined) now(() => hands.expectFrameNow(owner), manifest)
  } else if (what < 88) await turn()
  else if (what < 92) place.tick?.({ pages: 1 + (b % 16) })
  else if (what < 95) manifest.fail?.((['nothing', 'writes', 'nothing', 'reads'] as const)[b % 4]!)
  else if (what < 96)
    await place
      .sync?.()
      .catch((error: unknown) => expect(error instanceof TmemError, `sync failed with ${String(error)}`))
  else {
    await settle(waiting)
    hands.expectNothingElse()
  }
}

/** Waits for what is under way, and throws what failed of it. */
async function settle(waiting: Promise<unknown>[]): Promise<void> {
  for (const error of await Promise.all(waiting.splice(0))) if (error !== undefined) throw error
}

/** Whether a transfer failed because it was told to. */
const isTold = (error: unknown, { fail }: PlaceManifest): boolean =>
  fail !== undefined && error instanceof Error && !(error instanceof ConformanceError)

/** Runs what may fail because it was told to. */
function now(run: () => unknown, manifest: PlaceManifest): void {
  try {
    run()
  } catch (error) {
    if (!isTold(error, manifest)) throw error
  }
}

/** Tries histories. Throws `ConformanceError` with a short one and the command that repeats it. */
export async function runPlaceProperty({ subject, manifest, open, close }: PlaceBench, title: string): Promise<void> {
  const { runs = 60, seed = 1 } = manifest.property ?? {}
  const again = repetition()
  const steps = fc.array(fc.tuple(fc.nat(99), fc.nat(1000), fc.nat(1000)), {
    minLength: 10,
    maxLength: 200,
    size: 'max',
  })
  const property = fc.asyncProperty(steps, async (history) => {
    const world = placeWorld()
    const place = open(world)
    const waiting: Promise<unknown>[] = []
    try {
      if (isSlow(place)) {
        const hands = new SlowHands(place)
        for (const step of history) await stepInSlow(hands, step, manifest, waiting)
        manifest.fail?.('nothing')
        await settle(waiting)
        await hands.expectAll()
        hands.freeAll()
        hands.expectNothingElse()
      } else {
        const hands = new MemoryHands(place)
        for (const step of history) stepInMemory(hands, step, manifest, world)
        hands.expectAll()
        hands.freeAll()
        hands.expectNothingElse()
      }
    } finally {
      manifest.fail?.('nothing')
      if (manifest.limit !== undefined) manifest.limit.bytes = manifest.limit.maximumBytes
      await Promise.all(waiting)
      await close(place)
    }
  })
  const details = await fc.check(property, {
    numRuns: runs,
    seed: again?.seed ?? seed,
    endOnFailure: false,
    ...(again === undefined ? {} : { path: again.path }),
  })
  if (!details.failed) return
  const cause: unknown = details.errorInstance
  throw new ConformanceError(
    [
      cause instanceof Error ? cause.message : String(cause),
      `history of ${subject.name}: ${fc.stringify(details.counterexample?.[0])}`,
      `seed ${details.seed}, path ${details.counterexamplePath}, after ${details.numRuns} runs and ${details.numShrinks} shrinks`,
      `repeat: TMEM_PROPERTY='${details.seed};${details.counterexamplePath}' npx vitest run -t '${title}'`,
    ].join('\n'),
    { cause },
  )
}

/** Opens places for a case, and closes them after it. */
export async function withPlaces(
  subject: PlaceSubject,
  run: (bench: PlaceBench) => Promise<void> | void,
): Promise<void> {
  const manifest = subject.manifest ?? {}
  const places = new Set<Place>()
  const note = (place: Place): Place => {
    places.add(place)
    return place
  }
  try {
    await run({
      subject,
      manifest,
      open: (world = placeWorld()) => note(subject.open(world.context)),
      reopen: () => note((manifest.reopen as (context: LayerContext) => Place)(placeWorld().context)),
      close: async (place) => {
        places.delete(place)
        await place.close()
      },
    })
  } finally {
    manifest.fail?.('nothing')
    for (const place of places) await place.close()
    await manifest.afterCase?.()
  }
}
