/**
 * The boundary around a place: each lie of a place, and each misuse by whoever calls it, stops the stack and is named.
 */
import {
  Block,
  type Budget,
  compose,
  Flight,
  type LayerContext,
  type MemoryPlace,
  type MovedBlock,
  none,
  type Owners,
  type PlaceTraits,
  type Progress,
  type SlowPlace,
  type StatsNode,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { type Broken, checkedPlace } from '@tmem/core/unstable'
import { describe, expect, test } from 'vitest'
import { Ledger, makePage } from '../src/index.ts'
import { calm, layerOf, MapPlace, mapTraits, type Outside, SlowMapPlace, slowTraits } from './places.ts'

const context: LayerContext = { allocator: systemAllocator, accounts: new Ledger() }
const room = 64 * 1024

const noise = makePage('noise', 1, 4096)

/** A block of a page, raw unless it is shorter. */
function blockOf(length = 4096, bytes: Uint8Array = noise): Block {
  const block = new Block()
  block.bytes = bytes
  block.length = length
  block.codec = length === 4096 ? 0 : 2
  block.pageBytes = 4096
  block.persistent = true
  return block
}

/** What a place is asked in a short life; a lie of any kind shows. */
function live(place: MemoryPlace, told: Broken): void {
  const moved: [number, number][] = []
  const note: MovedBlock = (owner, to) => moved.push([owner, to])
  expect(place.limitBytes).toBeGreaterThan(0)
  place.sizeOf(100)
  place.sizeOf(100)
  const locations: number[] = []
  for (let owner = 0; owner < 6; owner++) {
    place.prepare?.(4096)
    locations.push(place.put(blockOf(owner % 2 === 0 ? 4096 : 100), owner))
  }
  const into = new Block()
  into.bytes = new Uint8Array(8192)
  into.at = 100
  into.length = 4096
  place.get(locations[0]!, into)
  place.excess()
  place.charge(64)
  place.free(locations[2]!, 4096, 4096)
  place.compact?.(2, note)
  place.fit?.(4096, note)
  place.tick?.({ pages: 1 })
  place.stats()
  expect(told.broken).toBe(undefined)
}

/** A flight of frames of these lengths. */
function flightOf(place: SlowPlace, ...lengths: readonly number[]): Flight {
  const flight = new Flight(new ArrayBuffer(128 * 1024), 128 * 1024, place.unitBytes)
  for (const [n, length] of lengths.entries()) {
    flight.offsets[n] = flight.filled
    flight.units[n] = Math.ceil((length + 16) / place.unitBytes)
    flight.owners[n] = n
    flight.locations[n] = none
    flight.bytes.set(makePage('noise', n, 65_536).subarray(0, length), flight.filled + 16)
    flight.filled += flight.units[n]! * place.unitBytes
    flight.count++
  }
  return flight
}

/** An owner of frames, who agrees to everything that the place says of them. */
const agreeing = (units: (location: number) => number): Owners => ({
  unitsAt: (_owner, location) => units(location),
  moved: () => true,
  drop: () => false,
  recall: async () => false,
  poolOf: () => 0,
  isPersistent: () => true,
  objectOf: () => 0,
  indexOf: () => 0,
  isCurrent: () => true,
  landed: () => undefined,
})

async function liveSlowly(place: SlowPlace, told: Broken): Promise<void> {
  let known = new Map<number, number>()
  place.attach?.(agreeing((location) => known.get(location) ?? 0))
  place.open(true)
  const flight = flightOf(place, 4096, 600, 600)
  await place.write(flight)
  const [first, second, third] = [...flight.locations.subarray(0, 3)] as [number, number, number]
  const [units, fewer] = [flight.units[0]!, flight.units[1]!]
  const into = new Uint8Array(8192)
  await place.read(first, units, into)
  place.readNow?.(third, fewer, into)
  place.free(second, fewer)
  known = new Map([[third, fewer]])
  // Nothing is free in one piece: the place packs.
  const next = flightOf(place, ...new Array<number>(14).fill(4096))
  await place.write(next)
  place.writeNow?.(flightOf(place, 50))
  await place.sync?.()
  place.stats()
  expect(told.broken).toBe(undefined)
}

const broken = (): Broken => ({ broken: undefined })

test('an honest place is left alone', async () => {
  const told = broken()
  live(checkedPlace(new MapPlace(room, context), told) as MemoryPlace, told)
  await liveSlowly(checkedPlace(new SlowMapPlace(room, calm(), context), told) as SlowPlace, told)
  expect(told.broken).toBe(undefined)
})

const lies: readonly (readonly [rule: string, Liar: new (limitBytes: number, context: LayerContext) => MemoryPlace])[] =
  [
    [
      'location 0 was given out while it is in use',
      class extends MapPlace {
        override put(block: Block, owner: number): number {
          return Math.min(0, super.put(block, owner))
        }
      },
    ],
    [
      'put answered 1.5',
      class extends MapPlace {
        override put(block: Block, owner: number): number {
          return super.put(block, owner) + 1.5
        }
      },
    ],
    [
      'put answered -9',
      class extends MapPlace {
        override put(): number {
          return -9
        }
      },
    ],
    [
      "put changed the caller's bytes",
      class extends MapPlace {
        override put(block: Block, owner: number): number {
          const location = super.put(block, owner)
          block.bytes[block.at]! ^= 1
          return location
        }
      },
    ],
    [
      'the bytes are not those that were taken (location 0, owner 0)',
      class extends MapPlace {
        override get(location: number, into: Block): void {
          super.get(location, into)
          into.bytes[into.at]! ^= 1
        }
      },
    ],
    [
      'get filled more than the 4096 bytes of the block',
      class extends MapPlace {
        override get(location: number, into: Block): void {
          super.get(location, into)
          into.bytes[into.at + into.length] = 1
        }
      },
    ],
    [
      'a block of 100 bytes takes 96.5',
      class extends MapPlace {
        override sizeOf(): number {
          return 96.5
        }
      },
    ],
    [
      'a block of 100 bytes takes 192, before 128',
      class extends MapPlace {
        #more = 0
        override sizeOf(length: number): number {
          if (length === 100) this.#more += 64
          return super.sizeOf(length) + this.#more - 64
        }
      },
    ],
    [
      'an excess of NaN bytes',
      class extends MapPlace {
        override excess(): number {
          return Number.NaN
        }
      },
    ],
    [
      'a limit of Infinity bytes',
      class extends MapPlace {
        override get limitBytes(): number {
          return Number.POSITIVE_INFINITY
        }
      },
    ],
    [
      'charge answered 64',
      class extends MapPlace {
        override charge(bytes: number): boolean {
          return bytes as never
        }
      },
    ],
    [
      'compact answered 5, asked for at most 2',
      class extends MapPlace {
        override compact(blocks: number, moved: MovedBlock): number {
          return super.compact(blocks, moved) + 3
        }
      },
    ],
    [
      'a block of owner 2 was moved, who has none',
      class extends MapPlace {
        override compact(blocks: number, moved: MovedBlock): number {
          return super.compact(blocks, (_owner, to) => moved(2, to))
        }
      },
    ],
    [
      'owner 3 was moved to 0, which is in use',
      class extends MapPlace {
        override compact(blocks: number, moved: MovedBlock): number {
          return super.compact(blocks, (owner) => moved(owner, 0))
        }
      },
    ],
    [
      'the bytes are not those that were taken (location 66, owner 3)',
      class extends MapPlace {
        override compact(blocks: number, moved: MovedBlock): number {
          return super.compact(blocks, (owner, to) => {
            this.row.kept.get(to)!.bytes[7]! ^= 1
            moved(owner, to)
          })
        }
      },
    ],
    [
      'owner 5 was moved when nobody had asked for it',
      class extends MapPlace {
        #late: () => void = () => undefined
        override compact(blocks: number, moved: MovedBlock): number {
          return super.compact(blocks, (owner, to) => {
            this.#late = () => moved(owner, to)
          })
        }
        tick(): Progress {
          this.#late()
          return { pages: 0, pending: false }
        }
      },
    ],
    [
      'free failed (location',
      class extends MapPlace {
        override free(location: number): void {
          super.free(location, 0, 0)
          throw new Error('no')
        }
      },
    ],
    [
      'tick touched 2 of 1 pages',
      class extends MapPlace {
        tick(budget: Budget): Progress {
          return { pages: budget.pages + 1, pending: false }
        }
      },
    ],
    [
      'the counter map/used_bytes is NaN',
      class extends MapPlace {
        override stats(): StatsNode {
          return { name: 'map', counters: { used_bytes: Number.NaN }, children: [] }
        }
      },
    ],
    [
      'a capacity of 0 blocks',
      class extends MapPlace {
        override traits: PlaceTraits = { ...mapTraits, capacity: 0 }
      },
    ],
  ]

/** Runs something that stops the stack. */
async function stops(told: Broken, run: () => unknown): Promise<TmemError> {
  try {
    await run()
  } catch (error) {
    if (error instanceof TmemError && (told.broken === undefined || told.broken === error)) return error
    throw error
  }
  throw new Error('nothing was broken')
}

describe('a memory place that lies is named, and its stack stopped:', () => {
  test.each(lies)('%s', async (rule, Liar) => {
    const told = broken()
    // What is only noted shows in the next call.
    const error = await stops(told, () => {
      const place = checkedPlace(new Liar(room, context), told) as MemoryPlace
      live(place, broken())
      place.charge(1)
    })
    expect(error.code).toBe('TMEM_BROKEN')
    expect(error.layer).toBe('map')
    expect(error.message).toContain('map broke a rule of places: ')
    expect(error.message).toContain(rule)
  })
})

type SlowClass = new (roomBytes: number, outside: Outside, context: LayerContext) => SlowPlace

const slowLies: readonly (readonly [rule: string, Liar: SlowClass])[] = [
  [
    'a unit of 48 bytes',
    class extends SlowMapPlace {
      override readonly unitBytes: number = 48
    },
  ],
  [
    'its largest frame has 4097 units of 16 bytes, more than 2048',
    class extends SlowMapPlace {
      override readonly unitBytes: number = 16
    },
  ],
  [
    'a flight of 1000 bytes',
    class extends SlowMapPlace {
      override readonly flightBytes: number = 1000
    },
  ],
  [
    'location 0 was given out while it is in use (frame 1 of a flight, owner 1)',
    class extends SlowMapPlace {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        flight.locations.fill(0, 0, count)
      }
    },
  ],
  [
    'a location of -7',
    class extends SlowMapPlace {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        flight.locations[0] = -7
      }
    },
  ],
  [
    '34 units (frame 0 of a flight',
    class extends SlowMapPlace {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        flight.units[0]! += 17
      }
    },
  ],
  [
    '16 units (frame 0 of a flight',
    class extends SlowMapPlace {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        flight.units[0]!--
      }
    },
  ],
  [
    'it set locations of frames that a flight does not have',
    class extends SlowMapPlace {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        flight.locations[count] = 9999
      }
    },
  ],
  [
    'it changed the number of frames of a flight',
    class extends SlowMapPlace {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        flight.count--
      }
    },
  ],
  [
    'the bytes of a flight changed on its way (frame 0',
    class extends SlowMapPlace {
      override place(flight: Flight, count: number): void {
        super.place(flight, count)
        flight.bytes[20]! ^= 1
      }
    },
  ],
  [
    'write failed with no, which is no Error',
    class extends SlowMapPlace {
      override write(): Promise<void> {
        return Promise.reject('no')
      }
    },
  ],
  [
    'the bytes are not those that were taken (location 0, owner 0)',
    class extends SlowMapPlace {
      override readNow(location: number, units: number, into: Uint8Array): void {
        super.readNow(location, units, into)
        into[20]! ^= 1
      }
    },
  ],
  [
    'read filled more than the 17 units at 0',
    class extends SlowMapPlace {
      override readNow(location: number, units: number, into: Uint8Array): void {
        super.readNow(location, units, into)
        into[units * this.unitBytes] = 1
      }
    },
  ],
  [
    'read failed with no, which is no Error',
    class extends SlowMapPlace {
      override read(): Promise<void> {
        return Promise.reject('no')
      }
    },
  ],
  [
    'a frame was moved to 20, which is in use (owner 2, from 20)',
    class extends SlowMapPlace {
      override pack(): number {
        this.owners!.moved(2, 20, 20, 3)
        return 0
      }
    },
  ],
  [
    'a frame of somebody else was moved (owner 5, from 20)',
    class extends SlowMapPlace {
      override pack(): number {
        this.owners!.moved(5, 20, 17, 3)
        return 0
      }
    },
  ],
  [
    'a frame has 2 units after moving',
    class extends SlowMapPlace {
      override pack(): number {
        this.owners!.moved(2, 20, 17, 2)
        return 0
      }
    },
  ],
  [
    'free failed (location',
    class extends SlowMapPlace {
      override free(location: number): void {
        super.free(location, 0)
        throw new Error('no')
      }
    },
  ],
  [
    'open answered 1',
    class extends SlowMapPlace {
      override open(): boolean {
        return 1 as never
      }
    },
  ],
  [
    'sync failed with Error: no, which is no TmemError',
    class extends SlowMapPlace {
      override sync(): Promise<void> {
        return Promise.reject(new Error('no'))
      }
    },
  ],
]

describe('a slow place that lies is named, and its stack stopped:', () => {
  test.each(slowLies)('%s', async (rule, Liar) => {
    const told = broken()
    const error = await stops(told, () => {
      const place = checkedPlace(new Liar(room, calm(), context), told) as SlowPlace
      return liveSlowly(place, broken())
    })
    expect(error.code).toBe('TMEM_BROKEN')
    expect(error.message).toContain('slow broke a rule of places: ')
    expect(error.message).toContain(rule)
  })
})

describe('so is a stack that misuses a place:', () => {
  const memoryOf = (): { readonly place: MemoryPlace; readonly told: Broken } => {
    const told = broken()
    const place = checkedPlace(new MapPlace(room, context), told) as MemoryPlace
    place.prepare!(4096)
    place.put(blockOf(100), 1)
    place.prepare!(4096)
    return { place, told }
  }
  const into = new Block()
  into.bytes = new Uint8Array(4096)
  into.length = 99
  const misuses: readonly (readonly [rule: string, misuse: (place: MemoryPlace) => unknown])[] = [
    ['free of location 8, where nothing is', (place) => place.free(8, 100, 4096)],
    ['free of 99 bytes of 4096 at 0, where 100 of 4096 are', (place) => place.free(0, 99, 4096)],
    ['get of location 8, where nothing is', (place) => place.get(8, into)],
    ['get of 99 of the 100 bytes at 0', (place) => place.get(0, into)],
    ['a block of 0 bytes, codec 2, of a page of 4096', (place) => place.put(blockOf(0), 2)],
    ['prepare for 0 bytes', (place) => place.prepare!(0)],
    ['put after close', (place) => place.close().then(() => place.put(blockOf(), 2))],
  ]
  test.each(misuses)('%s', async (rule, misuse) => {
    const { place, told } = memoryOf()
    const error = await stops(told, () => misuse(place))
    expect(error.message).toContain(`the stack broke a rule towards map: ${rule}`)
  })

  const slowMisuses: readonly (readonly [rule: string, misuse: (place: SlowPlace) => unknown])[] = [
    ['free of location 8, where nothing is', (place) => place.free(8, 1)],
    ['free of 3 units at 0, where 17 are', (place) => place.free(0, 3)],
    ['read of location 8, where nothing is', (place) => place.read(8, 1, new Uint8Array(512))],
    ['read of 17 units at 0, where 17 are, into 512 bytes', (place) => place.read(0, 17, new Uint8Array(512))],
    ['a flight of 0 frames, 0 bytes', (place) => place.write(flightOf(place))],
    ['attach, twice or after something else', (place) => place.attach!(agreeing(() => 0))],
    [
      'close while 1 transfers are under way',
      (place) => {
        void place.read(0, 17, new Uint8Array(8192))
        return place.close()
      },
    ],
    ['write after close', (place) => place.close().then(() => place.write(flightOf(place, 100)))],
  ]
  test.each(slowMisuses)('%s', async (rule, misuse) => {
    const told = broken()
    const place = checkedPlace(new SlowMapPlace(room, calm(), context), told) as SlowPlace
    await place.write(flightOf(place, 4096))
    const error = await stops(told, () => misuse(place))
    expect(error.message).toContain(`the stack broke a rule towards slow: ${rule}`)
  })
})

describe('a stack in model mode with a place that lies', () => {
  /** Forgets what it wrote when the frames are read. */
  class Forgetful extends SlowMapPlace {
    override readNow(location: number, units: number, into: Uint8Array): void {
      super.readNow(location, units, into)
      into[18]! ^= 1
    }
  }
  /** Gives one location to two flights. */
  class Generous extends SlowMapPlace {
    override place(flight: Flight, count: number): void {
      super.place(flight, count)
      flight.locations[0] = 0
    }
    override free(location: number): void {
      if (this.row.kept.has(location)) super.free(location, 0)
    }
  }
  const stackOf = (
    Liar: typeof SlowMapPlace,
  ): {
    readonly ledger: Ledger
    readonly outside: Outside
    readonly opened: SlowMapPlace[]
    readonly store: ReturnType<typeof compose>
  } => {
    const ledger = new Ledger()
    const outside = calm()
    const opened: SlowMapPlace[] = []
    const open = (given: LayerContext): SlowMapPlace => {
      opened.push(new Liar(256 * 1024, outside, given))
      return opened[0]!
    }
    const map = layerOf('map', mapTraits, (given) => new MapPlace(room, given))
    return {
      ledger,
      outside,
      opened,
      store: compose([map, layerOf('slow', slowTraits, open)], { accounts: ledger, check: 'model' }),
    }
  }

  test('stops when a fetch brings other bytes, and closing gives everything back', async () => {
    const { ledger, opened, store } = stackOf(Forgetful)
    const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') throw new Error('no pool')
    for (let n = 0; n < 30; n++) pool.put(0, n, makePage('noise', n, 4096))
    const outcomes = await Promise.allSettled(
      Array.from({ length: 30 }, (_, n) => pool.fetch(0, n, new Uint8Array(4096))),
    )
    const failed = outcomes.flatMap((one) => (one.status === 'rejected' ? [one.reason as TmemError] : []))
    expect(failed[0]).toMatchObject({ code: 'TMEM_BROKEN', layer: 'slow' })
    expect(failed[0]!.message).toContain('the bytes are not those that were taken')
    for (const call of [
      () => pool.put(0, 0, makePage('noise', 1, 4096)),
      () => pool.get(0, 0, new Uint8Array(4096)),
      () => store.tick({ pages: 1 }),
    ])
      expect(call).toThrow(failed[0]!.message)
    await store.close()
    expect(opened[0]!.closed).toBe(true)
    ledger.expectSettled('after close')
  })

  test('stops when a flight that nobody waits for lands where something is', async () => {
    const { ledger, outside, opened, store } = stackOf(Generous)
    const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') throw new Error('no pool')
    for (let n = 0; n < 14; n++) pool.put(0, n, makePage('noise', n, 4096))
    store.tick({ pages: 1 })
    store.tick({ pages: 1 })
    await outside.turn()
    await outside.turn()
    expect(() => pool.put(0, 0, makePage('noise', 1, 4096))).toThrow('location 0 was given out while it is in use')
    await store.close()
    expect(opened[0]!.closed).toBe(true)
    ledger.expectSettled('after close')
  })
})
