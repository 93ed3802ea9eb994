/** A zcache above a place that has to wait: cold blocks go down as they are and come back, whatever that place does. */
import { setImmediate } from 'node:timers/promises'
import type { Layer, Pool, SlowPlace } from '@tmem/core'
import { ByteLimit, createAccounts, GetOutcome, PutOutcome, TmemError } from '@tmem/core'
import { fail, passingPlace, type SlowMemoryOptions, slowMemory } from '@tmem/faults'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { random } from '../../../tools/random.ts'
import type { ZcacheOptions } from '../src/index.ts'
import { KiB, MiB, newPool, noisyPage, open, type Stack, sameBytes } from './pages.ts'

const { Stored } = PutOutcome
const { Hit, Miss, Deferred } = GetOutcome

/** A zcache of 1 MiB over slow memory, with filters between the two, and a pool for swap. */
function over(
  slow: Partial<SlowMemoryOptions> = {},
  filters: readonly Layer[] = [],
  options: Partial<ZcacheOptions> = {},
  given: Parameters<typeof open>[1] = {},
): { stack: Stack; pool: Pool } {
  const below = [...filters, slowMemory({ sizeBytes: 8 * MiB, ...slow })]
  const stack = open({ limitBytes: MiB, ...options }, { below, ...given })
  return { stack, pool: newPool(stack, 'swap') }
}

function fillWith(pool: Pool, count: number): void {
  for (let i = 0; i < count; i++) if (pool.put(0, i, noisyPage(i, 0.4)) !== Stored) throw new Error(`no room for ${i}`)
}

/** Ticks until nothing more sinks, whatever it waits for. */
async function settle({ store }: Stack, ticks = 60): Promise<void> {
  for (let i = 0; i < ticks; i++) {
    store.tick({ pages: 200 })
    for (let turns = 0; turns < 4; turns++) await setImmediate()
  }
}

/** Gets a page, waiting for it where that is needed: how it came, or what is wrong with it. */
async function load(pool: Pool, index: number, seed = index): Promise<string> {
  const into = new Uint8Array(4096).fill(0xcd)
  let outcome: GetOutcome = pool.get(0, index, into)
  const deferred = outcome === Deferred
  if (deferred && into.some((byte) => byte !== 0xcd)) return 'a deferred get touched the page'
  if (deferred) outcome = await pool.fetch(0, index, into)
  if (outcome === Miss) return 'miss'
  return sameBytes(into, noisyPage(seed, 0.4)) ? (deferred ? 'fetched' : 'hit') : 'wrong bytes'
}

/** How all pages come: how many hits, and how many that were fetched. Throws for any other answer. */
async function loadAll(pool: Pool, count: number): Promise<{ hit: number; fetched: number }> {
  const all = { hit: 0, fetched: 0 }
  for (let i = 0; i < count; i++) {
    const how = await load(pool, i)
    if (how !== 'hit' && how !== 'fetched') throw new Error(`page ${i}: ${how}`)
    all[how]++
  }
  return all
}

test('cold blocks sink, many in one write and as they are; what is used stays and rises again', async () => {
  const { stack, pool } = over()
  fillWith(pool, 400)
  for (let i = 300; i < 400; i++) expect(await load(pool, i)).toBe('hit')
  for (let i = 400; i < 1000; i++) {
    expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
    if (i % 20 === 0) {
      for (let k = 300; k < 400; k += 5) pool.get(0, k, new Uint8Array(4096))
      await settle(stack, 1)
    }
  }
  await settle(stack)
  stack.check()
  const { sunk_in, flights, frames, frame_bytes } = movesBelow(stack)
  expect(sunk_in).toBeGreaterThan(400)
  expect(frames! / flights!).toBeGreaterThan(16)
  // A block of these has 1,800 bytes; its frame as many, and what fills up a unit.
  expect(frame_bytes! / frames!).toBeLessThan(2000)
  expect(stack.chain()).toMatchObject({ pages: 1000, encoded: 1000, encoded_again: 0, decoded_to_move: 0 })
  for (let k = 300; k < 400; k += 5) expect(await load(pool, k)).toBe('hit')
  expect(await load(pool, 0)).toBe('fetched')
  expect(await load(pool, 0)).toBe('hit')
  const all = await loadAll(pool, 1000)
  expect(all.fetched).toBeGreaterThan(400)
  expect(stack.chain()).toMatchObject({ encoded: 1000, encoded_again: 0 })
  stack.check()
})

/** Counters of the moves of the slow place, which is the last. */
function movesBelow({ store }: Stack): Readonly<Record<string, number>> {
  const last = store.stats().children.at(-1)!
  return last.children.find(({ name }) => name === 'moves')!.counters
}

test('when enough has sunk nothing more does; what only rose sinks again without being written', async () => {
  const { stack, pool } = over({}, [], { limitBytes: 4 * MiB })
  fillWith(pool, 2600)
  await settle(stack)
  const before = movesBelow(stack)
  await settle(stack)
  expect(movesBelow(stack)).toEqual(before)
  // A few pages more have room: that is what was made.
  for (let i = 2600; i < 2610; i++) expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
  expect(movesBelow(stack)['forced_flights']).toBe(before['forced_flights'])
  await settle(stack)
  const written: number[] = []
  for (let round = 0; round < 4; round++) {
    written.push(movesBelow(stack)['frame_bytes']!)
    await loadAll(pool, 2610)
    await settle(stack)
  }
  // At first those that had never been below go down; then all have been.
  expect(movesBelow(stack)['frame_bytes']! - written.at(-2)!).toBeLessThan(40_000)
  stack.check()
})

test('who ticks when the stack asks for it keeps puts from waiting', async () => {
  let asked = false
  const wake = (): void => {
    asked = true
  }
  const { stack, pool } = over({ sizeBytes: 16 * MiB }, [], { limitBytes: 2 * MiB }, { wake })
  for (let i = 0; i < 4000; i++) {
    expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
    if (asked) asked = stack.store.tick({ pages: 200 }).pending
    for (let turns = 0; turns < 2; turns++) await setImmediate()
  }
  const { flights, forced_flights, frames } = movesBelow(stack)
  expect(frames! / flights!).toBeGreaterThan(16)
  expect(forced_flights! / flights!).toBeLessThan(0.4)
  await loadAll(pool, 4000)
  stack.check()
})

test('a place that fails at writing loses nothing, is left alone for a while, and tried again', async () => {
  let broken = true
  const { stack, pool } = over({}, [fail({ what: ['write'], code: 'ENOSPC', when: () => broken })])
  // Where no page can go down, a put is refused in the end, with the reason, and the pages that are there stay.
  let stored = 0
  let outcome: PutOutcome = Stored
  for (; outcome === Stored && stored < 2000; stored++) outcome = pool.put(0, stored, noisyPage(stored, 0.4))
  stored--
  expect(outcome).toBe(PutOutcome.Unavailable)
  expect(stack.store.failure).toMatchObject({ code: 'ENOSPC' })
  expect(await load(pool, stored)).toBe('miss')
  const before = movesBelow(stack)['failed_flights']!
  for (let i = 0; i < 40; i++) {
    await settle(stack, 1)
    stack.check()
  }
  const tries = movesBelow(stack)['failed_flights']! - before
  expect(tries).toBeGreaterThan(0)
  expect(tries).toBeLessThan(10)
  expect(movesBelow(stack)['resting']).toBeGreaterThan(0)
  expect(await loadAll(pool, stored)).toEqual({ hit: stored, fetched: 0 })
  broken = false
  expect(pool.put(0, stored, noisyPage(stored, 0.4))).toBe(Stored)
  await settle(stack, 100)
  expect(movesBelow(stack)['sunk_in']).toBeGreaterThan(0)
  await loadAll(pool, stored + 1)
  stack.check()
})

test('a failing read is an error of that one fetch; the page stays and can be had later', async () => {
  let broken = false
  const { stack, pool } = over({}, [fail({ what: ['read'], when: () => broken })])
  fillWith(pool, 800)
  await settle(stack)
  const into = new Uint8Array(4096)
  expect(pool.get(0, 0, into)).toBe(Deferred)
  broken = true
  const error = await pool.fetch(0, 0, into).catch((thrown: unknown) => thrown)
  expect(error).toBeInstanceOf(TmemError)
  expect(error).toMatchObject({ code: 'TMEM_IO', layer: 'slowMemory', cause: { code: 'EIO' } })
  // Whoever is in memory does not notice.
  expect(await load(pool, 799)).toBe('hit')
  broken = false
  expect(await loadAll(pool, 800)).toMatchObject({ fetched: expect.any(Number) })
  expect(movesBelow(stack)['failed_reads']).toBe(1)
  stack.check()
})

test('a place that has written enough for now takes what must go, and nothing else', async () => {
  let isOpen = true
  const saving: Layer = {
    name: 'saving',
    wrapPlace: (next) =>
      passingPlace(next as SlowPlace, { open: (forced) => (forced || isOpen) && (next as SlowPlace).open(forced) }),
  }
  const { stack, pool } = over({}, [saving])
  fillWith(pool, 400)
  await settle(stack)
  isOpen = false
  const before = movesBelow(stack)
  for (let i = 400; i < 1000; i++) {
    expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
    if (i % 50 === 0) await settle(stack, 5)
  }
  const after = movesBelow(stack)
  expect(after['flights']! - before['flights']!).toBe(after['forced_flights']! - before['forced_flights']!)
  expect(after['sunk_in']).toBeGreaterThan(300)
  await loadAll(pool, 1000)
  stack.check()
})

test('a full place below: pages are refused, none is lost, and there is room again when some go', async () => {
  const { stack, pool } = over({ sizeBytes: 512 * KiB })
  let stored = 0
  let outcome: PutOutcome = Stored
  for (; outcome === Stored; stored++) outcome = pool.put(0, stored, noisyPage(stored, 0.4))
  stored--
  expect(outcome).toBe(PutOutcome.NoMemory)
  expect(stored).toBeGreaterThan(650)
  await settle(stack)
  await loadAll(pool, stored)
  for (let i = 0; i < stored; i += 3) pool.flushPage(0, i)
  await settle(stack)
  const again = Array.from({ length: stored / 3 }, (_, i) => pool.put(0, i * 3, noisyPage(i * 3, 0.4)))
  // They need not lie as well as before, each of them.
  expect(again.filter((answer) => answer === Stored).length).toBeGreaterThan(0.95 * again.length)
  for (let i = 0; i < stored; i++) expect(await load(pool, i)).not.toBe('wrong bytes')
  stack.check()
})

test('a full place below gives up copies of what is in memory, for pages that have no other place', async () => {
  const limitBytes = new ByteLimit(2 * MiB)
  const { stack, pool } = over({ sizeBytes: 512 * KiB }, [], { limitBytes })
  fillWith(pool, 250)
  limitBytes.bytes = 0
  await settle(stack)
  limitBytes.bytes = 2 * MiB
  const put = (from: number, to: number): void => {
    for (let i = from; i < to; i++) expect(pool.put(0, i, noisyPage(i, 0.4))).toBe(Stored)
  }
  put(250, 850)
  // They rise, and are used again: what has no copy is colder.
  for (let i = 0; i < 250; i++) await load(pool, i)
  await loadAll(pool, 250)
  expect(stack.chain()['clean_copies']).toBe(250)
  put(850, 1230)
  expect(stack.chain()['clean_copies']).toBeLessThan(100)
  const used = await loadAll(pool, 250)
  expect(used.hit).toBeGreaterThan(200)
  await loadAll(pool, 1230)
  stack.check()
})

test('the limit to the smallest and back, under load', async () => {
  const limitBytes = new ByteLimit(2 * MiB)
  const { stack, pool } = over({}, [], { limitBytes })
  const next = random(1)
  fillWith(pool, 800)
  for (const bytes of [MiB, 300 * KiB, 0, 2 * MiB, 0, 2 * MiB]) {
    limitBytes.bytes = bytes
    for (let i = 0; i < 300; i++) {
      const index = Math.floor(next() * 800)
      const isPut = i % 3 === 0
      const answer = isPut ? pool.put(0, index, noisyPage(index, 0.4)) : await load(pool, index)
      expect(isPut ? [Stored] : ['hit', 'fetched']).toContain(answer)
      if (i % 10 === 0) await settle(stack, 2)
    }
    await settle(stack)
    stack.check()
    const { used_bytes, metadata_bytes } = stack.counters()
    // Tables are there for the largest limit.
    expect(used_bytes).toBeLessThanOrEqual(Math.max(bytes, metadata_bytes!))
  }
  await loadAll(pool, 800)
})

test('charges follow: a page below costs its owner nothing', async () => {
  const accounts = createAccounts()
  const { stack, pool } = over({}, [], {}, { accounts })
  fillWith(pool, 300)
  await settle(stack)
  const perPage = accounts.charged(1) / 300
  for (let i = 300; i < 1500; i++) pool.put(0, i, noisyPage(i, 0.4))
  await settle(stack)
  const { pages } = stack.counters()
  expect(pages).toBeLessThan(600)
  expect(accounts.charged(1) / pages!).toBeCloseTo(perPage, -2)
  pool.destroy()
  expect(accounts.charged(1)).toBe(0)
  stack.check()
})

test('any history over a place that is slow and fails at random agrees with a map', async () => {
  const operation = fc.oneof(
    { weight: 5, arbitrary: fc.record({ put: fc.nat(500), seed: fc.nat(5000) }) },
    { weight: 5, arbitrary: fc.record({ get: fc.nat(500) }) },
    { weight: 3, arbitrary: fc.record({ fetch: fc.nat(500) }) },
    { weight: 2, arbitrary: fc.record({ flush: fc.nat(500) }) },
    { weight: 4, arbitrary: fc.record({ tick: fc.nat(200) }) },
    { weight: 4, arbitrary: fc.record({ turns: fc.nat(3) }) },
    { weight: 1, arbitrary: fc.record({ fail: fc.nat(3) }) },
    { weight: 1, arbitrary: fc.record({ limit: fc.constantFrom(0, 300, 640) }) },
  )
  let sunk = 0
  let failed = 0
  await fc.assert(
    fc.asyncProperty(fc.array(operation, { minLength: 200, maxLength: 600, size: 'max' }), async (operations) => {
      let failures = 0
      /** Transfers that wait for their turn. */
      const waiting: (() => void)[] = []
      let manual = true
      const turn = (): Promise<void> =>
        manual ? new Promise((resolve) => waiting.push(resolve)) : new Promise((resolve) => resolve())
      const limitBytes = new ByteLimit(640 * KiB)
      const filter = fail({ what: ['write', 'read'], when: () => failures-- > 0 })
      const { stack, pool } = over({ turn, moves: 3 }, [filter], { limitBytes }, { check: 'model' })
      const model = new Map<number, number>()
      for (let i = 0; i < 400; i++) if (pool.put(0, i, noisyPage(i, 0.4)) === Stored) model.set(i, i)
      const into = new Uint8Array(4096)
      const fetches: Promise<unknown>[] = []
      for (const each of operations) {
        if ('put' in each) {
          const outcome = pool.put(0, each.put, noisyPage(each.seed, 0.4))
          if (outcome === Stored) model.set(each.put, each.seed)
          else model.delete(each.put)
        } else if ('get' in each) {
          const outcome = pool.get(0, each.get, into)
          const seed = model.get(each.get)
          if ((seed === undefined) !== (outcome === Miss)) throw new Error(`page ${each.get}: outcome ${outcome}`)
          if (outcome === Hit && !sameBytes(into, noisyPage(seed!, 0.4))) throw new Error(`page ${each.get} is wrong`)
        } else if ('fetch' in each) fetches.push(pool.fetch(0, each.fetch, new Uint8Array(4096)).catch(isIoError))
        else if ('flush' in each) {
          pool.flushPage(0, each.flush)
          model.delete(each.flush)
        } else if ('tick' in each) stack.store.tick({ pages: each.tick })
        else if ('turns' in each) {
          for (let i = 0; i <= each.turns; i++) waiting.shift()?.()
          await setImmediate()
          stack.check()
        } else if ('fail' in each) failures = each.fail
        else limitBytes.bytes = each.limit * KiB
      }
      manual = false
      failures = 0
      while (waiting.length > 0) {
        for (const resolve of waiting.splice(0)) resolve()
        await setImmediate()
      }
      await Promise.all(fetches)
      for (const [index, seed] of model) {
        const how = await load(pool, index, seed)
        if (how !== 'hit' && how !== 'fetched') throw new Error(`page ${index}: ${how}`)
      }
      stack.check()
      const moves = movesBelow(stack)
      sunk += moves['sunk_in']!
      failed += moves['failed_flights']! + moves['failed_reads']!
      await stack.store.close()
    }),
    { numRuns: 12, seed: 9 },
  )
  expect(sunk).toBeGreaterThan(500)
  expect(failed).toBeGreaterThan(5)
})

/** A fetch may fail with what the place said, and with nothing else. */
function isIoError(error: unknown): void {
  if (!(error instanceof TmemError) || error.code !== 'TMEM_IO') throw error
}
