/** Wherever a process dies: what the next one finds of a page is what was put last, or nothing. */
import { ByteLimit, compose, GetOutcome, type Pool } from '@tmem/core'
import { memory } from '@tmem/memory'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import {
  countersOf,
  crash,
  fetched,
  isRightOrGone,
  MemoryFiles,
  open,
  pageOf,
  path,
  poolOf,
  put,
  spillIn,
} from './stores.ts'

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
const [objects, indexes] = [3, 9]
/** Where the ring of a spill of 1 MiB begins. */
const ringAt = 4096 + 1024 * 64

/** What a file was when the process could have died, and what each page may be then. */
interface Image {
  readonly content: Uint8Array
  readonly may: ReadonlyMap<string, readonly (number | undefined)[]>
}

/** A stack whose file is looked at before every write to it. */
class World {
  readonly files: MemoryFiles = new MemoryFiles()
  readonly images: Image[] = []
  readonly waiting: (() => void)[] = []
  /** By handle: the seed of the page that was put last. */
  readonly model = new Map<string, number>()
  hits = 0
  restored = 0
  #change: { readonly handles: readonly string[]; readonly to: number | undefined } | undefined
  #calls = 0
  #every: number

  constructor(every: number, held: boolean) {
    this.#every = every
    this.files.fault = ({ name }) => {
      if (name !== 'write') return undefined
      if (this.#calls++ % this.#every === 0) this.look()
      return held ? { until: new Promise((resolve) => this.waiting.push(resolve)) } : undefined
    }
  }

  look(): void {
    const content = this.files.content(path)
    if (content === undefined) return
    const may = new Map<string, (number | undefined)[]>()
    for (const [handle, seed] of this.model) may.set(handle, [seed])
    for (const handle of this.#change?.handles ?? [])
      may.set(handle, [...(may.get(handle) ?? [undefined]), this.#change!.to])
    this.images.push({ content, may })
  }

  /** A change that is over when the action has returned. */
  change<T>(handles: readonly string[], to: number | undefined, action: () => T): T {
    this.#change = { handles, to }
    try {
      return action()
    } finally {
      this.#change = undefined
      for (const handle of handles)
        if (to === undefined) this.model.delete(handle)
        else this.model.set(handle, to)
    }
  }

  async go(): Promise<void> {
    for (const resolve of this.waiting.splice(0)) resolve()
    await turn()
  }
}

/** Opens a file as it was, and compares what is found with what may be there. */
async function judge({ content, may }: Image, shared: boolean, sizeBytes: number): Promise<number> {
  const files = new MemoryFiles()
  files.put(path, content)
  const store = open(files, { sizeBytes })
  const pool = poolOf(store, 1, shared)
  store.check!()
  let found = 0
  for (let object = 0; object < objects; object++)
    for (let index = 0; index < indexes; index++) {
      const page = await fetched(pool, object, index)
      if (page === undefined) continue
      found++
      const right = may.get(`${object}:${index}`) ?? []
      if (!right.some((seed) => seed !== undefined && Buffer.compare(page, pageOf(seed)) === 0))
        throw new Error(`${object}:${index} is ${page[0]}, and may be ${right.join(' or ')}`)
    }
  return found
}

test('histories with crashes and restarts, looked at before each write', { timeout: 120_000 }, async () => {
  const what = fc.constantFrom(
    'put',
    'put',
    'put',
    'put',
    'fetch',
    'fetch',
    'flush',
    'flushObject',
    'tick',
    'go',
    'end',
  )
  const step = fc.record({ what, object: fc.nat(objects - 1), index: fc.nat(indexes - 1), seed: fc.nat(250) })
  let [hits, restored, found] = [0, 0, 0]
  await fc.assert(
    fc.asyncProperty(
      fc.array(step, { minLength: 20, maxLength: 100, size: 'max' }),
      fc.boolean(),
      fc.constantFrom(0, 48 * 1024),
      fc.boolean(),
      fc.integer({ min: 3, max: 15 }),
      async (steps, shared, memoryBytes, held, every) => {
        const sizeBytes = 96 * 1024
        const world = new World(every, held)
        const { files, model } = world
        const limit = new ByteLimit(Math.max(1, memoryBytes))
        const start = () => {
          const end = spillIn(files, { sizeBytes })
          limit.bytes = limit.maximumBytes
          const store = compose(memoryBytes === 0 ? [end] : [memory({ limitBytes: limit }), end])
          return { store, pool: poolOf(store, 1, shared) }
        }
        let { store, pool } = start()
        const act = async (name: string, object: number, index: number, seed: number): Promise<void> => {
          const handle = `${object}:${index}`
          if (name === 'put') world.change([handle], seed, () => put(pool, object, index, seed))
          else if (name === 'flush') world.change([handle], undefined, () => pool.flushPage(object, index))
          else if (name === 'flushObject') {
            const all = Array.from({ length: indexes }, (_, n) => `${object}:${n}`)
            world.change(all, undefined, () => pool.flushObject(object))
          } else if (name === 'tick') store.tick({ pages: 16 })
          else if (name === 'go') await world.go()
          else if (name === 'fetch') {
            const page = await fetched(pool, object, index)
            if (page !== undefined) hits++
            const wanted = model.get(handle)
            if (page !== undefined && (wanted === undefined || Buffer.compare(page, pageOf(wanted)) !== 0))
              throw new Error(`wrong bytes for ${handle}`)
            // A miss is for good; a private page is taken.
            if (page === undefined || !shared) model.delete(handle)
          } else {
            store.check!()
            if (seed % 2 === 0) {
              const closing = store.close()
              for (let n = 0; n < 4; n++) await world.go()
              await closing
            } else {
              crash(files)
              world.waiting.length = 0
            }
            ;({ store, pool } = start())
            restored += countersOf(store)['recovered']!
          }
        }
        for (const { what: name, object, index, seed } of steps) await act(name, object, index, seed)
        store.check!()
        world.look()
        for (const image of world.images) found += await judge(image, shared, sizeBytes)
      },
    ),
    { seed: 2, numRuns: 50 },
  )
  expect([hits, restored, found].every((count) => count > 50)).toBe(true)
})

/** Pages in memory that sink in one flight, whose write is held up. */
function sinking(): { world: World; pool: Pool } {
  const world = new World(1, false)
  const limit = new ByteLimit(256 * 1024)
  const store = compose([memory({ limitBytes: limit }), spillIn(world.files)], { check: 'model' })
  const pool = poolOf(store)
  for (let index = 0; index < 27; index++) world.change([`0:${index}`], index, () => put(pool, 0, index, index))
  limit.bytes = 64 * 1024
  store.tick({ pages: 100 })
  return { world, pool }
}

test('a page that is put anew while it is on its way', async () => {
  const { world, pool } = sinking()
  for (let index = 0; index < indexes; index += 2)
    world.change([`0:${index}`], 100 + index, () => put(pool, 0, index, 100 + index))
  world.images.length = 0
  await turn()
  await turn()
  world.look()
  expect(world.images.length).toBeGreaterThan(1)
  let found = 0
  for (const image of world.images) found = Math.max(found, await judge(image, true, 2 ** 20))
  expect(found).toBeGreaterThan(3)
})

test('a page that is put anew when its record was just written', async () => {
  const { world, pool } = sinking()
  const { files } = world
  const { fault } = files
  let isArmed = true
  files.fault = (call) => {
    if (call.name === 'write' && call.position >= 4096 && call.position < ringAt && isArmed) {
      isArmed = false
      // As soon as whoever writes the record lets others have a turn.
      queueMicrotask(() => {
        for (let index = 0; index < indexes; index++)
          world.change([`0:${index}`], 100 + index, () => put(pool, 0, index, 100 + index))
        world.images.length = 0
        world.look()
      })
    }
    return fault(call)
  }
  await turn()
  await turn()
  expect(isArmed).toBe(false)
  expect(world.images.length).toBeGreaterThan(0)
  for (const image of world.images) await judge(image, true, 2 ** 20)
})

test('a page that had to give way, and is put anew before its place is written over', async () => {
  const world = new World(1, false)
  const sizeBytes = 96 * 1024
  const limit = new ByteLimit(512 * 1024)
  const store = compose([memory({ limitBytes: limit }), spillIn(world.files, { sizeBytes })], { check: 'model' })
  const pool = poolOf(store)
  for (let index = 0; index < 60; index++) put(pool, 1, index, index)
  // The ring has room for twenty.
  const sink = async (bytes: number): Promise<void> => {
    limit.bytes = bytes
    store.tick({ pages: 100 })
    await turn()
  }
  while (countersOf(store)['overwritten'] === 0) await sink(128 * 1024)
  limit.bytes = limit.maximumBytes
  for (let index = 60; index < 100; index++) put(pool, 1, index, index)
  world.files.fault = ({ name }) => (name === 'write' ? { until: new Promise(() => undefined) } : undefined)
  const before = Array.from({ length: 60 }, (_, index) => pool.get(1, index, pageOf(0)))
  await sink(128 * 1024)
  limit.bytes = limit.maximumBytes
  const gone = before.findIndex(
    (was, index) => was === GetOutcome.Deferred && pool.get(1, index, pageOf(0)) === GetOutcome.Miss,
  )
  expect(gone).toBeGreaterThanOrEqual(0)
  put(pool, 1, gone, 200)
  const files = new MemoryFiles()
  files.put(path, world.files.content(path)!)
  expect(await fetched(poolOf(open(files, { sizeBytes })), 1, gone)).toBeUndefined()
})

test('a record of one time and a frame of another, of the same page', async () => {
  const images = [3, 6].map((seed) => {
    const files = new MemoryFiles()
    put(poolOf(open(files)), 1, 1, seed)
    return files.content(path)!
  })
  const [older, newer] = images as [Uint8Array, Uint8Array]
  for (const [table, ring, isThere] of [
    [older, older, true],
    [newer, older, false],
    [older, newer, false],
  ] as const) {
    const mixed = table.slice()
    mixed.set(ring.subarray(ringAt), ringAt)
    const files = new MemoryFiles()
    files.put(path, mixed)
    const store = open(files)
    const pool = poolOf(store)
    expect(await isRightOrGone(pool, 1, 1, 3)).toBe(true)
    expect((await fetched(pool, 1, 1)) !== undefined).toBe(isThere)
  }
})
