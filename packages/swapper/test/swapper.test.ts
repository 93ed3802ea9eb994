import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  ByteLimit,
  compose,
  type Layer,
  type PageStore,
  type Pool,
  type PoolRefusal,
  PutOutcome,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { delay, failingAllocator, refuse } from '@tmem/faults'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { Swapper } from '../src/index.ts'

let folder = ''
let files = 0
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'swapper-'))
})
afterAll(() => {
  rmSync(folder, { recursive: true })
})

const swapFile = (pages: number): Layer => frontswap({ file: join(folder, `${files++}.img`), sizeBytes: pages * 4096 })
const kib = 1024

/** Opens the stack for the time of `use`. */
async function withStack(layers: Layer[], use: (store: PageStore) => Promise<void>): Promise<void> {
  const store = compose(layers, { check: 'model' })
  try {
    await use(store)
  } finally {
    await store.close()
  }
}

/** What is answered at once, without a promise. */
const now = (answer: Promise<void> | undefined): void => expect(answer).toBeUndefined()

const expectSame = (bytes: Uint8Array, wanted: Uint8Array): void => expect(Buffer.compare(bytes, wanted)).toBe(0)

/** Tries again while the store refuses every page: nothing is lost by that. */
async function insist(access: () => Promise<void> | undefined): Promise<void> {
  for (let tries = 1; ; tries++) {
    try {
      return await access()
    } catch (error) {
      if (tries === 20 || !(error instanceof TmemError && error.code === 'TMEM_NO_MEMORY')) throw error
    }
  }
}

const codeOf = (use: () => unknown): string => {
  try {
    use()
  } catch (error) {
    if (error instanceof TmemError) return error.code
    throw error
  }
  return 'none'
}

describe('against a plain buffer', () => {
  const pages = 24
  const operation = fc.record({
    kind: fc.constantFrom('read', 'write', 'write', 'whole', 'discard', 'touch'),
    page: fc.integer({ min: 0, max: pages - 1 }),
    at: fc.integer({ min: 0, max: 4096 }),
    length: fc.constantFrom(1, 8, 64, 100, 4096),
    seed: fc.integer({ min: 0, max: 255 }),
  })
  const bytesOf = (length: number, seed: number): Uint8Array => {
    const bytes = new Uint8Array(length)
    let state = (seed + 1) * 2654435761
    // Half of the pages are noise, which does not compress.
    for (let n = 0; n < length; n++) {
      if (seed % 2 === 0) state = (Math.imul(state, 1664525) + 1013904223) | 0
      bytes[n] = state >>> 24
    }
    return bytes
  }
  const stacks: [name: string, layers: () => Layer[]][] = [
    ['memory', () => [memory({ limitBytes: 512 * kib })]],
    ['memory that refuses every third page', () => [refuse({ every: 3 }), memory({ limitBytes: 512 * kib })]],
    ['a swap file', () => [swapFile(pages)]],
    ['little memory, then a swap file', () => [memory({ limitBytes: 32 * kib }), swapFile(pages)]],
    ['zcache, then a swap file', () => [zcache({ limitBytes: 256 * kib }), swapFile(pages)]],
    [
      'zcache that refuses every second page, then a swap file',
      () => [refuse({ every: 2 }), zcache({ limitBytes: 256 * kib }), refuse({ every: 3 }), swapFile(pages)],
    ],
    ['memory far away', () => [delay({ turn: () => Promise.resolve() }), memory({ limitBytes: 512 * kib })]],
  ]
  test.each(stacks)('%s', async (_name, layers) => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(operation, { minLength: 20, maxLength: 120 }),
        fc.constantFrom(2, 5, 12),
        fc.constantFrom(1, 4, 32),
        async (operations, frames, cluster) => {
          await withStack(layers(), async (store) => {
            const swapper = new Swapper({ pages, frames, store, cluster })
            const model = Buffer.alloc(pages * 4096)
            for (const { kind, page, at, length, seed } of operations) {
              const from = Math.min(at, 4096 - length)
              const start = page * 4096 + from
              if (kind === 'read') {
                const into = new Uint8Array(length)
                await insist(() => swapper.read(page, from, into))
                expectSame(into, model.subarray(start, start + length))
              } else if (kind === 'discard') {
                swapper.discard(page)
                model.fill(0, page * 4096, (page + 1) * 4096)
              } else if (kind === 'touch') {
                let offset = swapper.resident(page)
                for (; offset < 0; offset = swapper.resident(page)) await insist(() => swapper.fault(page))
                const frame = swapper.memory.subarray(offset, offset + 4096)
                expectSame(frame, model.subarray(page * 4096, (page + 1) * 4096))
              } else {
                const whole = kind === 'whole'
                const bytes = bytesOf(whole ? 4096 : length, seed)
                await insist(() => swapper.write(page, whole ? 0 : from, bytes))
                model.set(bytes, whole ? page * 4096 : start)
              }
            }
            for (let page = 0; page < pages; page++) {
              const into = new Uint8Array(4096)
              await insist(() => swapper.read(page, 0, into))
              expectSame(into, model.subarray(page * 4096, (page + 1) * 4096))
            }
            const { counters } = swapper.stats()
            expect(counters['resident']).toBeLessThanOrEqual(frames)
            swapper.close()
          })
        },
      ),
      { seed: 7, numRuns: 12 },
    )
  })
})

test('many pages at once, in whatever order the store answers', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.scheduler(),
      fc.array(fc.tuple(fc.integer({ min: 0, max: 9 }), fc.boolean()), { minLength: 10, maxLength: 60 }),
      fc.integer({ min: 1, max: 6 }),
      async (scheduler, accesses, frames) => {
        await withStack(
          [delay({ turn: () => scheduler.schedule(Promise.resolve()) }), memory({ limitBytes: 512 * kib })],
          async (store) => {
            const swapper = new Swapper({ pages: 10, frames, store })
            const model = new Uint32Array(10)
            // One user per page, as the page lock has it; the users run at the same time.
            const user = async (page: number): Promise<void> => {
              const word = new Uint32Array(1)
              const bytes = new Uint8Array(word.buffer)
              for (const [place, [wanted, write]] of accesses.entries()) {
                if (wanted !== page) continue
                if (write) {
                  word[0] = place + 1
                  await swapper.write(page, 40, bytes)
                  model[page] = place + 1
                }
                word[0] = 0xffffffff
                await swapper.read(page, 40, bytes)
                expect(word[0]).toBe(model[page])
              }
            }
            await scheduler.waitFor(Promise.all([...model.keys()].map(user)).then(() => undefined))
          },
        )
      },
    ),
    { seed: 3, numRuns: 60 },
  )
})

test('what is in memory is reached without the store', async () => {
  await withStack([memory({ limitBytes: 256 * kib })], async (store) => {
    const swapper = new Swapper({ pages: 8, frames: 4, store })
    expect(swapper.resident(3)).toBe(-1)
    expect(swapper.fault(3)).toBeUndefined()
    const at = swapper.resident(3)
    expect(swapper.write(3, 5, Uint8Array.of(1, 2, 3))).toBeUndefined()
    expect([...swapper.memory.subarray(at + 4, at + 9)]).toEqual([0, 1, 2, 3, 0])
    expect(store.stats().counters['puts']).toBe(0)
    expect(swapper.counters).toMatchObject({ minorFaults: 1, zeroFills: 1, swapIns: 0 })
  })
})

test('a clean page whose copy is good is not stored again; a written one is', async () => {
  await withStack([memory({ limitBytes: 256 * kib })], async (store) => {
    const swapper = new Swapper({ pages: 3, frames: 1, store, cluster: 1 })
    now(swapper.write(0, 0, Uint8Array.of(9)))
    now(swapper.fault(1))
    expect(swapper.counters.swapOuts).toBe(1)
    now(swapper.fault(0))
    expect(swapper.counters).toMatchObject({ swapIns: 1, zeroDrops: 1, writebacksAvoided: 0 })
    now(swapper.fault(1))
    expect(swapper.counters).toMatchObject({ swapOuts: 1, writebacksAvoided: 1 })
    const into = new Uint8Array(1)
    now(swapper.read(0, 0, into))
    expect(into[0]).toBe(9)
    now(swapper.write(0, 0, Uint8Array.of(10)))
    expect(store.stats().counters['pages'] ?? swapper.stats().counters['swapCached']).toBe(0)
    now(swapper.fault(1))
    expect(swapper.counters.swapOuts).toBe(2)
  })
})

test('an exclusive load leaves no second copy in memory, but one on disk', async () => {
  await withStack([memory({ limitBytes: 64 * kib }), swapFile(64)], async (store) => {
    const swapper = new Swapper({ pages: 64, frames: 4, store, cluster: 1 })
    for (let page = 0; page < 64; page++) now(swapper.write(page, 0, Uint8Array.of(page)))
    const gauges = (): Record<string, number> => swapper.stats().counters
    const before = gauges()
    // The first pages to go found room in memory, later ones only on disk.
    now(swapper.fault(0))
    expect(gauges()).toMatchObject({ dirty: before['dirty']!, swapCached: before['swapCached']! })
    await swapper.fault(40)
    expect(swapper.counters.majorFaults).toBe(1)
    expect(gauges()['swapCached']).toBe(before['swapCached']! + 1)
    expect([swapper.memory[swapper.resident(0)], swapper.memory[swapper.resident(40)]]).toEqual([0, 40])
  })
})

test('the hand gives a touched page a second chance', async () => {
  await withStack([memory({ limitBytes: 256 * kib })], async (store) => {
    const swapper = new Swapper({ pages: 9, frames: 4, store, cluster: 1 })
    for (let page = 0; page < 4; page++) now(swapper.write(page, 0, Uint8Array.of(page + 1)))
    // All were touched: the first round takes every bit, the second takes page 0.
    now(swapper.fault(4))
    expect([0, 1, 2, 3].filter((page) => swapper.resident(page) >= 0)).toEqual([1, 2, 3])
    now(swapper.fault(5))
    now(swapper.fault(6))
    expect(swapper.resident(4) >= 0 || swapper.resident(3) >= 0).toBe(true)
    expect(swapper.counters.secondChances).toBeGreaterThanOrEqual(4)
  })
})

test('pages that the store refuses stay, and others go; when all are refused the error says why', async () => {
  await withStack(
    [refuse({ every: 2, reason: PutOutcome.Incompressible }), memory({ limitBytes: 256 * kib })],
    async (store) => {
      const swapper = new Swapper({ pages: 40, frames: 8, store })
      for (let page = 0; page < 40; page++) now(swapper.write(page, 0, Uint8Array.of(page + 1)))
      const into = new Uint8Array(1)
      for (let page = 0; page < 40; page++) {
        now(swapper.read(page, 0, into))
        expect(into[0]).toBe(page + 1)
      }
      expect(swapper.stats().counters['refusedIncompressible']).toBeGreaterThan(0)
    },
  )
  await withStack(
    [refuse({ every: 1, reason: PutOutcome.Quota }), memory({ limitBytes: 256 * kib })],
    async (store) => {
      const swapper = new Swapper({ pages: 9, frames: 4, store })
      for (let page = 0; page < 4; page++) now(swapper.write(page, 0, Uint8Array.of(page + 1)))
      expect(codeOf(() => swapper.fault(4))).toBe('TMEM_NO_MEMORY')
      expect(() => swapper.fault(4)).toThrow(/Quota: \d+.*frontswap/)
      expect(codeOf(() => swapper.write(5, 0, new Uint8Array(4096)))).toBe('TMEM_NO_MEMORY')
      // Nothing is lost, and what needs no storing can still go.
      for (let page = 0; page < 4; page++) expect(swapper.memory[swapper.resident(page)]).toBe(page + 1)
      swapper.discard(2)
      expect(swapper.fault(4)).toBeUndefined()
    },
  )
})

test('a store that refuses is not asked for more than is needed', async () => {
  await withStack([refuse({ every: 2 }), memory({ limitBytes: 256 * kib })], async (store) => {
    const swapper = new Swapper({ pages: 40, frames: 16, store, cluster: 4 })
    for (let page = 0; page < 17; page++) now(swapper.write(page, 0, Uint8Array.of(page + 1)))
    expect(swapper.counters.swapOuts).toBe(2)
    expect(swapper.stats().counters['refusedPolicy']).toBe(2)
  })
})

test('a whole page that cannot be written leaves the old one', async () => {
  const limitBytes = new ByteLimit(256 * kib)
  await withStack([memory({ limitBytes })], async (store) => {
    const swapper = new Swapper({ pages: 8, frames: 2, store })
    for (let page = 0; page < 8; page++) now(swapper.write(page, 0, Uint8Array.of(page + 1)))
    for (const page of [6, 7]) now(swapper.write(page, 0, Uint8Array.of(100 + page)))
    limitBytes.bytes = 0
    expect(codeOf(() => swapper.write(0, 0, new Uint8Array(4096).fill(55)))).toBe('TMEM_NO_MEMORY')
    limitBytes.bytes = 256 * kib
    const into = new Uint8Array(1)
    for (const [page, wanted] of [
      [0, 1],
      [6, 106],
      [7, 107],
    ] as const) {
      now(swapper.read(page, 0, into))
      expect(into[0]).toBe(wanted)
    }
  })
})

test('a frame that waits for its page is not taken for another one', async () => {
  let release = (): void => undefined
  const turn = (): Promise<void> =>
    new Promise((resolve) => {
      release = resolve
    })
  await withStack([delay({ turn }), memory({ limitBytes: 256 * kib })], async (store) => {
    const swapper = new Swapper({ pages: 12, frames: 3, store })
    for (let page = 0; page < 4; page++) now(swapper.write(page, 9, Uint8Array.of(page + 1)))
    const reading = swapper.fault(0)
    // These go through the two other frames, several times.
    for (let page = 4; page < 12; page++) now(swapper.write(page, 9, Uint8Array.of(page + 1)))
    const others = [10, 11].map((page) => [page, swapper.resident(page)] as const)
    release()
    await reading
    expect(swapper.memory[swapper.resident(0) + 9]).toBe(1)
    for (const [page, at] of others) {
      expect(swapper.resident(page)).toBe(at)
      expect(swapper.memory[at + 9]).toBe(page + 1)
    }
  })
})

test('a store that loses a page is found out, and a fault that failed can be tried again', async () => {
  const failing = { reads: 0 }
  const turn = (): Promise<void> => {
    failing.reads++
    return failing.reads === 1 ? Promise.reject(new TmemError('TMEM_IO', 'the link is down')) : Promise.resolve()
  }
  await withStack([delay({ turn }), memory({ limitBytes: 256 * kib })], async (store) => {
    const swapper = new Swapper({ pages: 3, frames: 1, store })
    now(swapper.write(0, 0, Uint8Array.of(7)))
    now(swapper.fault(1))
    const first = swapper.fault(0)
    expect(swapper.fault(0)).toBe(first)
    expect(swapper.resident(0)).toBe(-1)
    expect(() => swapper.modified(0)).toThrow(RangeError)
    await expect(first).rejects.toThrow('the link is down')
    await swapper.fault(0)
    expect(swapper.memory[swapper.resident(0)]).toBe(7)
  })
  // A store that forgets a page behind the swapper's back.
  await withStack([memory({ limitBytes: 256 * kib })], async (store) => {
    let pool: Pool | PoolRefusal | undefined
    const forgetful: PageStore = {
      name: 'forgetful',
      capabilities: store.capabilities,
      newPool: (attributes) => {
        pool = store.newPool(attributes)
        return pool
      },
      tick: (budget) => store.tick(budget),
      stats: () => store.stats(),
      close: () => store.close(),
    }
    const swapper = new Swapper({ pages: 3, frames: 1, store: forgetful })
    now(swapper.write(0, 0, Uint8Array.of(7)))
    now(swapper.fault(1))
    if (typeof pool === 'object') pool.flushPage(0, 0)
    expect(codeOf(() => swapper.fault(0))).toBe('TMEM_CORRUPT')
    // The frame is free again.
    now(swapper.fault(2))
  })
})

test('discard while the page is being read leaves zeros', async () => {
  let release = (): void => undefined
  const turn = (): Promise<void> =>
    new Promise((resolve) => {
      release = resolve
    })
  await withStack([delay({ turn }), memory({ limitBytes: 256 * kib })], async (store) => {
    const swapper = new Swapper({ pages: 3, frames: 1, store })
    now(swapper.write(0, 0, new Uint8Array(4096).fill(7)))
    now(swapper.fault(1))
    const reading = swapper.fault(0)
    swapper.discard(0)
    // The only frame is locked: this fault waits for it.
    const waiting = swapper.fault(2)
    release()
    await reading
    const at = swapper.resident(0)
    expect(swapper.memory.subarray(at, at + 4096).every((byte) => byte === 0)).toBe(true)
    await waiting
    await swapper.fault(2)
    expect(swapper.resident(2)).toBe(at)
  })
})

test('closed: faults that wait end with TMEM_CLOSED', async () => {
  let release = (): void => undefined
  const turn = (): Promise<void> =>
    new Promise((resolve) => {
      release = resolve
    })
  await withStack([delay({ turn }), memory({ limitBytes: 256 * kib })], async (store) => {
    const swapper = new Swapper({ pages: 3, frames: 1, store })
    now(swapper.write(0, 0, Uint8Array.of(7)))
    now(swapper.fault(1))
    const reading = swapper.fault(0)
    swapper.close()
    swapper.close()
    release()
    await expect(reading).rejects.toMatchObject({ code: 'TMEM_CLOSED' })
    expect(codeOf(() => swapper.fault(2))).toBe('TMEM_CLOSED')
  })
})

test('misuse is refused before anything changes', async () => {
  await withStack([memory({ limitBytes: 256 * kib })], async (store) => {
    for (const wrong of [
      { pages: 0 },
      { frames: 0 },
      { frames: 1.5 },
      { cluster: 0 },
      { pageSize: 5000 },
      { client: -1 },
    ])
      expect(() => new Swapper({ pages: 4, frames: 2, store, ...wrong })).toThrow(RangeError)
    const swapper = new Swapper({ pages: 4, frames: 2, store })
    for (const page of [-1, 4, 1.5, Number.NaN]) {
      expect(() => swapper.resident(page)).toThrow(RangeError)
      expect(() => swapper.fault(page)).toThrow(RangeError)
      expect(() => swapper.modified(page)).toThrow(RangeError)
      expect(() => swapper.discard(page)).toThrow(RangeError)
    }
    expect(() => swapper.read(0, 4090, new Uint8Array(7))).toThrow(RangeError)
    expect(() => swapper.write(0, -1, new Uint8Array(7))).toThrow(RangeError)
    expect(swapper.stats().counters['resident']).toBe(0)
  })
})

test('every allocation of the swapper, failed once', async () => {
  await withStack([memory({ limitBytes: 256 * kib })], async (store) => {
    const allocator = failingAllocator(systemAllocator)
    new Swapper({ pages: 4, frames: 2, store, allocator }).close()
    const sites = allocator.requests
    expect(sites).toBe(3)
    for (let nth = 1; nth <= sites; nth++) {
      allocator.fail({ nth })
      expect(codeOf(() => new Swapper({ pages: 4, frames: 2, store, allocator }))).toBe('TMEM_NO_MEMORY')
    }
  })
})

test('a store without such pools is refused', async () => {
  await withStack([swapFile(4)], async (store) => {
    const open = (): Swapper => new Swapper({ pages: 4, frames: 2, pageSize: 32_768, store })
    expect(codeOf(open)).toBe('TMEM_BAD_STACK')
    expect(open).toThrow('BadPageSize')
  })
})
