import { existsSync, writeFileSync } from 'node:fs'
import {
  compose,
  GetOutcome,
  getOutcomeName,
  type Layer,
  PageBatch,
  type PageStore,
  Pending,
  type Pool,
  PoolRefusal,
  PutOutcome,
  TmemError,
} from '@tmem/core'
import { delay, refuse } from '@tmem/faults'
import { memory } from '@tmem/memory'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { type FrontswapFileOptions, frontswap, frontswapFactory } from '../src/index.ts'
import { attributes, codeOf, type Device, onDevice, page, poolOf, same, systemError, testFolder } from './device.ts'

const folder = testFolder()

interface Opened {
  readonly store: PageStore
  readonly pool: Pool
  readonly device: Device
  readonly counter: (name: string) => number
}

/** A layer over a device in memory, with one pool. */
function openLayer(pages: number, more: Partial<FrontswapFileOptions> = {}, size = 4096): Opened {
  const { options, device } = onDevice(pages)
  const store = compose([frontswap({ ...options, ...more })], { check: 'model' })
  const pool = poolOf(store.newPool({ ...attributes, pageSize: size }))
  return { store, pool, device: device(), counter: (name) => store.stats().counters[name] ?? Number.NaN }
}

function batchOf(pages: readonly (readonly [index: number, fill: number])[], size = 4096): PageBatch {
  const batch = new PageBatch(Math.max(1, pages.length), size)
  for (const [index, fill] of pages) {
    const at = batch.offsets[batch.push(1, index)]!
    batch.bytes.fill(fill, at, at + size)
  }
  return batch
}

async function fetched(pool: Pool, index: number, size = 4096): Promise<number | string> {
  const into = page(0, size)
  const outcome = await pool.fetch(1, index, into)
  if (outcome !== GetOutcome.Hit) return getOutcomeName(outcome)
  expect(into).toEqual(page(into[0]!, size))
  return into[0]!
}

test('a page goes to the file and comes back, and the file goes with the store', async () => {
  const file = folder.file()
  const stack = compose([frontswap({ file, sizeBytes: 64 * 4096 })], { check: 'model' })
  const pool = poolOf(stack.newPool(attributes))
  const into = page(0)
  expect(pool.put(7, 3, page(42))).toBe(PutOutcome.Stored)
  expect(pool.get(7, 3, into)).toBe(GetOutcome.Deferred)
  expect(into[0]).toBe(0)
  expect(await pool.fetch(7, 3, into)).toBe(GetOutcome.Hit)
  expect(into).toEqual(page(42))
  expect(stack.stats().counters).toMatchObject({ diskWrites: 1, diskReads: 1, used_slots: 1, pages: 1 })
  pool.flushPage(7, 3)
  expect(pool.get(7, 3, into)).toBe(GetOutcome.Miss)
  expect(existsSync(file)).toBe(true)
  await Promise.all([stack.close(), stack.close()])
  expect(existsSync(file)).toBe(false)
  expect(stack.newPool(attributes)).toBe(PoolRefusal.Closed)
})

test('it ends a stack, and says what it can do', async () => {
  const layer = frontswap(onDevice(100).options)
  expect(layer.plan(undefined)).toMatchObject({
    persistent: true,
    ephemeral: false,
    deferred: true,
    reservedBytes: 409600,
  })
  expect(() => compose([layer, memory({ limitBytes: 2 ** 20 })])).toThrow(
    /frontswap cannot stand above memory: it is the end of a stack/,
  )
  const { store } = openLayer(100)
  expect(store.newPool({ ...attributes, persistent: false })).toBe(PoolRefusal.Unsupported)
  expect(store.newPool({ ...attributes, pageSize: 2 ** 19 })).toBe(PoolRefusal.BadPageSize)
  for (let number = 1; number < 256; number++) poolOf(store.newPool(attributes))
  expect(store.newPool(attributes)).toBe(PoolRefusal.NoSlot)
  await store.close()
})

test('all of its slots hold pages, then it refuses; a replaced page needs no more room', async () => {
  const { store, pool } = openLayer(50)
  for (let index = 0; index < 50; index++) expect(pool.put(1, index, page(index))).toBe(PutOutcome.Stored)
  expect(pool.put(1, 50, page(50))).toBe(PutOutcome.NoMemory)
  expect(pool.put(1, 7, page(77))).toBe(PutOutcome.Stored)
  const again = batchOf([
    [8, 88],
    [60, 1],
    [9, 99],
  ])
  expect(pool.putMany(again)).toBe(2)
  expect([...again.outcomes]).toEqual([PutOutcome.Stored, PutOutcome.NoMemory, PutOutcome.Stored])
  expect([await fetched(pool, 7), await fetched(pool, 8), await fetched(pool, 9)]).toEqual([77, 88, 99])
  expect(await fetched(pool, 60)).toBe('Miss')
  await store.close()
})

test('a batch is written in one request, and one handle twice in it ends with the second page', async () => {
  const { store, pool, device } = openLayer(200)
  const batch = batchOf(Array.from({ length: 100 }, (_, n) => [n, n]))
  expect(pool.putMany(batch)).toBe(100)
  expect(device.writes).toEqual([[1, 100]])
  // Twice in a batch; and an entry that a layer above took.
  const second = batchOf([
    [5, 50],
    [5, 51],
    [6, 60],
  ])
  second.outcomes[2] = PutOutcome.Stored
  pool.putMany(second)
  expect([await fetched(pool, 5), await fetched(pool, 6), await fetched(pool, 7)]).toEqual([51, 'Miss', 7])
  await store.close()
})

describe('a device that fails', () => {
  test('each write in turn: the page is refused, nothing else is lost, the slot is retired', async () => {
    for (let failing = 1; ; failing++) {
      const { store, pool, device, counter } = openLayer(64)
      let writes = 0
      device.failWrite = () => (++writes === failing ? systemError('EIO') : undefined)
      const outcomes: number[] = []
      for (let index = 0; index < 6; index++) outcomes.push(pool.put(1, index, page(index + 1)))
      const batch = batchOf([6, 7, 8, 2].map((index) => [index, index + 101]))
      pool.putMany(batch)
      const expected = new Map<number, number | string>()
      for (const [index, outcome] of outcomes.entries())
        expected.set(index, outcome === PutOutcome.Stored ? index + 1 : 'Miss')
      for (let n = 0; n < 4; n++)
        expected.set(batch.indexes[n]!, batch.outcomes[n] === PutOutcome.Stored ? batch.indexes[n]! + 101 : 'Miss')
      for (const [index, wanted] of expected) expect(await fetched(pool, index)).toBe(wanted)
      const all = [...outcomes, ...batch.outcomes]
      const refused = all.filter((outcome) => outcome !== PutOutcome.Stored)
      const done = writes < failing
      // A cluster that fails is written again slot by slot, so only single writes refuse a page.
      expect(refused).toEqual(done || failing === 7 ? [] : [PutOutcome.Unavailable])
      expect(counter('bad_slots')).toBe(refused.length)
      expect(counter('writeErrors')).toBe(done ? 0 : 1)
      expect(counter('used_slots')).toBe(counter('pages'))
      await store.close()
      if (done) break
    }
  })

  test('for good: every page is refused, and the handles keep nothing old', async () => {
    const { store, pool, device, counter } = openLayer(16)
    expect(pool.put(1, 1, page(1))).toBe(PutOutcome.Stored)
    device.failWrite = () => systemError('EIO')
    expect(pool.put(1, 1, page(2))).toBe(PutOutcome.Unavailable)
    const batch = batchOf([1, 2, 3].map((index) => [index, 9]))
    expect(pool.putMany(batch)).toBe(0)
    expect([...batch.outcomes]).toEqual([PutOutcome.Unavailable, PutOutcome.Unavailable, PutOutcome.Unavailable])
    for (let index = 1; index <= 3; index++) expect(await fetched(pool, index)).toBe('Miss')
    expect([counter('pages'), counter('used_slots'), counter('bad_slots')]).toEqual([0, 0, 4])
    await store.close()
  })

  test('why is known: of one page, of a batch, and not any more after what is stored', async () => {
    const { store, pool, device } = openLayer(16)
    expect(store.failure).toBe(undefined)
    for (const code of ['ENOSPC', 'EIO']) {
      device.failWrite = () => systemError(code)
      expect(pool.put(1, 1, page(2))).toBe(PutOutcome.Unavailable)
      expect(store.failure).toMatchObject({ code })
      device.failWrite = () => undefined
      expect(pool.put(1, 1, page(2))).toBe(PutOutcome.Stored)
      expect(store.failure).toBe(undefined)
      let first: number | undefined
      device.failWrite = (slot) => {
        first ??= slot
        return slot === first ? systemError(code) : undefined
      }
      const batch = batchOf([2, 3, 4].map((index) => [index, 9]))
      const stored = pool.putMany(batch)
      expect([stored, (store.failure as { code?: string } | undefined)?.code]).toEqual([2, code])
      device.failWrite = () => undefined
      pool.putMany(batchOf([[5, 9]]))
      expect(store.failure).toBe(undefined)
      pool.flushObject(1)
    }
    await store.close()
  })

  test('each read in turn: fetch rejects, and a second one has the page', async () => {
    for (let failing = 1; failing <= 8; failing++) {
      const { store, pool, device } = openLayer(64, {}, 8192)
      for (let index = 0; index < 8; index++) pool.put(1, index, page(index + 1, 8192))
      let reads = 0
      device.failRead = () => (++reads === failing ? systemError('EIO') : undefined)
      const seen: (number | string)[] = []
      for (let index = 0; index < 8; index++)
        seen.push(
          await fetched(pool, index, 8192).catch((error: unknown) => {
            if (!(error instanceof TmemError)) throw error
            const cause = error.cause instanceof Error && 'code' in error.cause ? error.cause.code : 'none'
            same([error.handle, cause], [`object 1 index ${index}`, 'EIO'])
            return error.code
          }),
        )
      expect(seen).toEqual(Array.from({ length: 8 }, (_, n) => (n === failing - 1 ? 'TMEM_IO' : n + 1)))
      expect(await fetched(pool, failing - 1, 8192)).toBe(failing)
      await store.close()
    }
  })

  test('altered content is never served', async () => {
    const { store, pool, device, counter } = openLayer(16)
    pool.put(1, 1, page(1))
    device.content[4096 + 100] = 2
    expect(await codeOf(() => fetched(pool, 1))).toBe('TMEM_CORRUPT')
    expect(counter('corruptSlots')).toBe(1)
    // The way out: the page is stored anew, or flushed.
    pool.put(1, 1, page(3))
    expect(await fetched(pool, 1)).toBe(3)
    await store.close()
  })
})

describe('a fetch that is overtaken', () => {
  /** Holds the first read, lets `meanwhile` happen, then lets it go on. */
  async function overtaken(meanwhile: (opened: Opened) => void): Promise<[number | string, Opened]> {
    const opened = openLayer(1)
    let release = (): void => undefined
    opened.pool.put(1, 1, page(1))
    opened.device.beforeRead = () =>
      new Promise((resolve) => {
        release = resolve
        opened.device.beforeRead = () => Promise.resolve()
      })
    const result = fetched(opened.pool, 1)
    meanwhile(opened)
    release()
    return [await result, opened]
  }

  // There is one slot: whatever is put next is put there.
  test.each<[string, (opened: Opened) => void, number | string]>([
    ['by a flush', ({ pool }) => pool.flushPage(1, 1), 'Miss'],
    ['by a put', ({ pool }) => pool.put(1, 1, page(2)), 2],
    [
      'by a flush and another page in its slot',
      ({ pool }) => {
        pool.flushPage(1, 1)
        pool.put(1, 9, page(9))
      },
      'Miss',
    ],
    [
      'by a flush, another page, a flush and a put',
      ({ pool }) => {
        pool.flushPage(1, 1)
        pool.put(1, 9, page(9))
        pool.flushPage(1, 9)
        pool.put(1, 1, page(3))
      },
      3,
    ],
    ['by a batch', ({ pool }) => pool.putMany(batchOf([[1, 4]])), 4],
    ['by flushing the object', ({ pool }) => pool.flushObject(1), 'Miss'],
    ['by the end of the pool', ({ pool }) => pool.destroy(), 'Miss'],
  ])('%s', async (_name, meanwhile, wanted) => {
    const [seen, { store, counter }] = await overtaken(meanwhile)
    expect(seen).toBe(wanted)
    expect(counter('staleReads')).toBe(1)
    await store.close()
  })

  test('by close', async () => {
    let closing: Promise<void> | undefined
    const [seen, { device }] = await overtaken(({ store }) => {
      closing = store.close()
    })
    await closing
    expect([seen, device.closed]).toEqual(['Miss', true])
  })

  test('in any order: what it answers was true at some time during the call', async () => {
    const step = fc.record({
      kind: fc.constantFrom('put', 'putMany', 'fetch', 'fetch', 'flush', 'wait'),
      index: fc.integer({ min: 0, max: 3 }),
      fill: fc.integer({ min: 1, max: 255 }),
    })
    let overtakenReads = 0
    await fc.assert(
      fc.asyncProperty(
        fc.scheduler(),
        fc.array(step, { minLength: 5, maxLength: 60 }),
        fc.boolean(),
        async (scheduler, steps, front) => {
          const turn = (): Promise<void> => scheduler.schedule(Promise.resolve())
          const { store, pool, device, counter } = openLayer(
            5,
            front ? { front: [refuse({ every: 2 }), delay({ turn }), memory({ limitBytes: 2 ** 20 })] } : {},
          )
          device.beforeRead = turn
          // All values that a handle ever had.
          const history = [0, 1, 2, 3].map((): (number | string)[] => ['Miss'])
          const fetches: Promise<void>[] = []
          for (const { kind, index, fill } of steps) {
            const values = history[index]!
            if (kind === 'put') {
              same(pool.put(1, index, page(fill)), PutOutcome.Stored)
              values.push(fill)
            } else if (kind === 'putMany') {
              const other = (index + 1) % 4
              const batch = batchOf([index, other].map((one) => [one, fill]))
              same(pool.putMany(batch), 2)
              values.push(fill)
              history[other]!.push(fill)
            } else if (kind === 'flush') {
              pool.flushPage(1, index)
              values.push('Miss')
            } else if (kind === 'fetch') {
              const since = values.length - 1
              fetches.push(
                fetched(pool, index).then((seen) => {
                  same(values.slice(since).includes(seen), true)
                }),
              )
            } else if (scheduler.count() > 0) await scheduler.waitOne()
          }
          await scheduler.waitFor(Promise.all(fetches).then(() => undefined))
          overtakenReads += counter('staleReads')
          await store.close()
        },
      ),
      { seed: 13, numRuns: 150 },
    )
    // Histories in which nothing is overtaken would show nothing.
    expect(overtakenReads).toBeGreaterThan(50)
  })
})

describe('with a store in front', () => {
  test('what it takes costs no write; what it refuses goes to disk', async () => {
    const front: Layer[] = [refuse({ every: 3 }), memory({ limitBytes: 2 ** 20 })]
    const { store, pool, device, counter } = openLayer(64, { front })
    for (let index = 0; index < 9; index++) expect(pool.put(1, index, page(index + 1))).toBe(PutOutcome.Stored)
    expect(device.writes.length).toBe(3)
    expect([counter('succ_stores'), counter('failed_stores'), counter('curr_pages')]).toEqual([6, 3, 6])
    const into = page(0)
    const seen = Array.from({ length: 9 }, (_, index) => pool.get(1, index, into))
    expect(seen.filter((outcome) => outcome === GetOutcome.Deferred)).toHaveLength(3)
    for (let index = 0; index < 9; index++) expect(await fetched(pool, index)).toBe(index + 1)
    expect(pool.lend(1, 0, (bytes, at) => expect(bytes[at]).toBe(1))).toBe(GetOutcome.Hit)
    expect(pool.lend(1, 2, () => expect.unreachable())).toBe(GetOutcome.Deferred)
    // In batches: every entry is offered once, and those that are refused are written together.
    const batch = batchOf(Array.from({ length: 30 }, (_, n) => [n + 20, n + 20]))
    expect(pool.putMany(batch)).toBe(30)
    expect(counter('failed_stores')).toBe(13)
    for (let index = 20; index < 50; index++) expect(await fetched(pool, index)).toBe(index)
    batch.rearm()
    expect(pool.getMany(batch)).toBe(20)
    // The same handle twice: the page in front of the first slot must not be left behind.
    pool.putMany(
      batchOf([
        [70, 1],
        [70, 2],
        [70, 3],
      ]),
    )
    expect(await fetched(pool, 70)).toBe(3)
    pool.flushObject(1)
    expect([counter('curr_pages'), counter('used_slots')]).toEqual([0, 0])
    expect(store.stats().children.map(({ name }) => name)).toEqual(['area0', 'refuse'])
    await store.close()
  })

  test('writethrough: every page is on disk as well, and survives a store that loses it', async () => {
    let lost = false
    const inner = memory({ limitBytes: 2 ** 20 })
    // Loses all pages when it is told to.
    const forgetful: Layer = {
      ...inner,
      open: (next, context) => {
        const opened = inner.open(next, context)
        return {
          name: 'forgetful',
          capabilities: opened.capabilities,
          newPool: (wanted) => {
            const pool = poolOf(opened.newPool(wanted))
            return {
              attributes: pool.attributes,
              put: (...all) => pool.put(...all),
              get: (...all) => (lost ? GetOutcome.Miss : pool.get(...all)),
              fetch: (...all) => (lost ? Promise.resolve(GetOutcome.Miss) : pool.fetch(...all)),
              flushPage: (...all) => pool.flushPage(...all),
              flushObject: (...all) => pool.flushObject(...all),
              putMany: (...all) => pool.putMany(...all),
              getMany: (...all) => pool.getMany(...all),
              flushMany: (...all) => pool.flushMany(...all),
              lend: (...all) => pool.lend(...all),
              split: () => pool.split(),
              freeze: () => pool.freeze(),
              thaw: () => pool.thaw(),
              destroy: () => pool.destroy(),
            }
          },
          tick: (budget) => opened.tick(budget),
          stats: () => opened.stats(),
          close: () => opened.close(),
        }
      },
    }
    for (const writethrough of [true, false]) {
      lost = false
      const { store, pool, device } = openLayer(8, { front: [forgetful], writethrough })
      pool.put(1, 1, page(5))
      pool.putMany(batchOf([[2, 6]]))
      expect(device.writes.length).toBe(writethrough ? 2 : 0)
      expect(pool.get(1, 1, page(0))).toBe(GetOutcome.Hit)
      lost = true
      expect(pool.get(1, 1, page(0))).toBe(GetOutcome.Deferred)
      const seen = await fetched(pool, 1).catch((error: unknown) => (error instanceof TmemError ? error.code : error))
      expect(seen).toBe(writethrough ? 5 : 'TMEM_CORRUPT')
      await store.close()
    }
  })

  test('a front that does not fit is told before anything is made', async () => {
    const file = folder.file()
    const layer = frontswap({
      file,
      sizeBytes: 8192,
      front: [frontswap(onDevice(2).options), memory({ limitBytes: 2 ** 20 })],
    })
    expect(layer.plan(undefined)).toContain('frontswap cannot stand above memory')
    expect(existsSync(file)).toBe(false)
  })
})

test('several areas: by priority; when one cannot be opened the others leave nothing behind', async () => {
  const [low, high] = [onDevice(40), onDevice(40)]
  const layer = frontswap({ areas: [low.options, { ...high.options, priority: 1 }] })
  const store = compose([layer])
  const pool = poolOf(store.newPool(attributes))
  for (let index = 0; index < 50; index++) expect(pool.put(1, index, page(index))).toBe(PutOutcome.Stored)
  expect(store.stats().children.map(({ counters }) => counters['used_slots'])).toEqual([10, 40])
  const batch = batchOf(Array.from({ length: 45 }, (_, n) => [n + 10, n]))
  expect(pool.putMany(batch)).toBe(45)
  for (let n = 0; n < 45; n++) expect(await fetched(pool, n + 10)).toBe(n)
  await store.close()
  expect([low.device().closed, high.device().closed]).toEqual([true, true])

  const [first, second] = [folder.file(), folder.file()]
  writeFileSync(second, 'in the way')
  const areas = [first, second].map((file) => ({ file, sizeBytes: 8192 }))
  expect(await codeOf(() => compose([frontswap({ areas })]))).toBe('TMEM_IO')
  expect([existsSync(first), existsSync(second)]).toEqual([false, true])
})

test('frozen: new handles are refused, others go on', async () => {
  const { store, pool } = openLayer(8)
  pool.put(1, 1, page(1))
  pool.freeze()
  const batch = batchOf([
    [1, 3],
    [2, 2],
  ])
  pool.putMany(batch)
  expect([pool.put(1, 1, page(2)), pool.put(1, 2, page(2)), ...batch.outcomes]).toEqual([
    PutOutcome.Stored,
    PutOutcome.Frozen,
    PutOutcome.Stored,
    PutOutcome.Frozen,
  ])
  pool.thaw()
  expect(pool.put(1, 2, page(2))).toBe(PutOutcome.Stored)
  pool.destroy()
  expect(pool.put(1, 2, page(2))).toBe(PutOutcome.PoolGone)
  await store.close()
})

test('random histories agree with a map, with and without a store in front, in pages of 4 to 16 KiB', async () => {
  const operation = fc.record({
    kind: fc.constantFrom('put', 'put', 'putMany', 'fetch', 'flush', 'flushObject'),
    pool: fc.integer({ min: 0, max: 1 }),
    object: fc.integer({ min: 0, max: 2 }),
    index: fc.integer({ min: 0, max: 9 }),
    fill: fc.integer({ min: 1, max: 255 }),
  })
  await fc.assert(
    fc.asyncProperty(
      fc.array(operation, { minLength: 1, maxLength: 60 }),
      fc.boolean(),
      fc.boolean(),
      async (operations, front, writethrough) => {
        const sizes = [4096, 16384]
        const stack = compose(
          [
            frontswap({
              file: folder.file(),
              sizeBytes: 90 * 4096,
              writethrough,
              ...(front ? { front: [memory({ limitBytes: 48 * 1024 })] } : {}),
            }),
          ],
          { check: 'model' },
        )
        const pools = sizes.map((pageSize) => poolOf(stack.newPool({ ...attributes, pageSize })))
        const model = new Map<string, number>()
        const note = (key: string, outcome: number, fill: number): void => {
          if (outcome === PutOutcome.Stored) model.set(key, fill)
          else model.delete(key)
          expect([PutOutcome.Stored, PutOutcome.NoMemory]).toContain(outcome)
        }
        let batchFill = 0
        try {
          for (const { kind, pool: number, object, index, fill } of operations) {
            const pool = pools[number]!
            const size = sizes[number]!
            const key = `${number}/${object}/${index}`
            if (kind === 'put') note(key, pool.put(object, index, page(fill, size)), fill)
            else if (kind === 'putMany') {
              const batch = new PageBatch(5, size)
              // The last one has the handle of the first.
              for (let n = 0; n < 5; n++) {
                batch.push(object, (index + (n % 4)) % 10)
                batchFill = (batchFill % 255) + 1
                batch.bytes.fill(batchFill, n * size, (n + 1) * size)
              }
              pool.putMany(batch)
              same(batch.outcomes.includes(Pending), false)
              for (let n = 0; n < 5; n++)
                note(`${number}/${object}/${batch.indexes[n]}`, batch.outcomes[n]!, batch.bytes[n * size]!)
            } else if (kind === 'flush') {
              pool.flushPage(object, index)
              model.delete(key)
            } else if (kind === 'flushObject') {
              pool.flushObject(object)
              for (let n = 0; n < 10; n++) model.delete(`${number}/${object}/${n}`)
            } else {
              const into = page(0, size)
              const outcome = await pool.fetch(object, index, into)
              same(outcome, model.has(key) ? GetOutcome.Hit : GetOutcome.Miss)
              same(into, page(model.get(key) ?? 0, size))
            }
            const slots = [...model.keys()].reduce((sum, held) => sum + (held.startsWith('0') ? 1 : 4), 0)
            expect(stack.stats().counters['used_slots']).toBe(slots)
          }
        } finally {
          await stack.close()
        }
      },
    ),
    { seed: 1, numRuns: 40 },
  )
})

test('from text: file and size, and what else there is', async () => {
  const file = folder.file()
  const store = compose([frontswapFactory.create({ file, size: 10_000, keep: true })])
  expect(store.capabilities.reservedBytes).toBe(8192)
  await store.close()
  const again = compose([frontswapFactory.create({ file, size: 8192, existing: true })])
  await again.close()
  expect(existsSync(file)).toBe(true)
})

test('numbers that make no sense are refused', () => {
  expect(() => frontswap({ areas: [] })).toThrow(RangeError)
  expect(() => frontswap({ file: 'x', sizeBytes: 100 })).toThrow(RangeError)
  expect(() => frontswap({ file: 'x', sizeBytes: 2 ** 37 })).toThrow(RangeError)
})
