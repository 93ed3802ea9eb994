/** Cold pages in a file: they come back, whatever the device does; the file is used again, within its budget. */
import { existsSync, mkdtempSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Pool } from '@tmem/core'
import { compose, createAccounts, GetOutcome, PageBatch, PutOutcome, systemAllocator, TmemError } from '@tmem/core'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { type WritebackDevice, type WritebackOptions, zcache, zcacheFactory } from '../src/index.ts'
import type { Zcache } from '../src/zcache.ts'
import { attributes, KiB, MiB, newPool, noisyPage, open, sameBytes } from './pages.ts'

const { Hit, Miss, Deferred } = GetOutcome

/** A file in memory whose operations end when the test says so, and fail as it says. */
class Disk implements WritebackDevice {
  readonly bytes: Uint8Array
  /** Answers for the next operations: a code is an error, a number that many bytes, nothing is success. */
  readonly answers: (string | number | undefined)[] = []
  readonly #waiting: (() => void)[] = []
  manual = false
  closed = 0
  writes = 0

  constructor(size: number) {
    this.bytes = new Uint8Array(size)
  }

  write(bytes: Uint8Array, length: number, position: number, done: (error: Error | null, bytes: number) => void): void {
    this.writes++
    if (position + length > this.bytes.length) throw new Error('written behind the end')
    this.#answer(length, done, (count) => this.bytes.set(bytes.subarray(0, count), position))
  }

  read(bytes: Uint8Array, length: number, position: number, done: (error: Error | null, bytes: number) => void): void {
    this.#answer(length, done, (count) => bytes.set(this.bytes.subarray(position, position + count)))
  }

  close(): void {
    this.closed++
  }

  /** Ends the oldest operation that waits. */
  step(): void {
    this.#waiting.shift()?.()
  }

  /** Ends the youngest operation that waits. */
  stepLast(): void {
    this.#waiting.pop()?.()
  }

  #answer(length: number, done: (error: Error | null, bytes: number) => void, act: (count: number) => void): void {
    const answer = this.answers.shift()
    const finish = (): void => {
      if (typeof answer === 'string') {
        done(Object.assign(new Error(answer), { code: answer }), 0)
        return
      }
      act(answer ?? length)
      done(null, answer ?? length)
    }
    this.#waiting.push(finish)
    if (!this.manual) setImmediate(() => this.step())
  }
}

function openOver(
  disk: Disk,
  options: Partial<WritebackOptions> = {},
  limitBytes = 2 * MiB,
): { store: Zcache; pool: Pool } {
  const store = open({
    limitBytes,
    writeback: { file: disk, sizeBytes: disk.bytes.length, startPercent: 40, ...options },
  })
  return { store, pool: newPool(store, 'swap') }
}

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
const disk = (store: Zcache): Record<string, number> =>
  store.stats().children.find(({ name }) => name === 'writeback')!.counters

/** Ticks until nothing more is written. */
async function settle(store: Zcache, ticks = 60): Promise<void> {
  for (let i = 0; i < ticks; i++) {
    store.tick({ pages: 200 })
    await turn()
    await turn()
  }
}

const fillWith = (pool: Pool, count: number): void => {
  for (let i = 0; i < count; i++)
    if (pool.put(0, i, noisyPage(i, 0.4)) !== PutOutcome.Stored) throw new Error(`page ${i} was refused`)
}

/** Gets a page, waiting for it if that is needed; what is wrong with it, or how it came. */
async function load(pool: Pool, index: number, seed = index): Promise<string> {
  const into = new Uint8Array(4096).fill(0xcd)
  let outcome: GetOutcome = pool.get(0, index, into)
  const deferred = outcome === Deferred
  if (deferred && into.some((byte) => byte !== 0xcd)) return 'a deferred get touched the page'
  if (deferred) outcome = await pool.fetch(0, index, into)
  if (outcome === Miss) return 'miss'
  return sameBytes(into, noisyPage(seed, 0.4)) ? (deferred ? 'fetched' : 'hit') : 'wrong bytes'
}

test('cold pages go to the file until enough memory is free, and come back', async () => {
  const file = new Disk(4 * MiB)
  const { store, pool } = openOver(file)
  fillWith(pool, 600)
  for (let i = 500; i < 600; i++) expect(await load(pool, i)).toBe('hit')
  await settle(store)
  store.check()
  const { counters } = store.stats()
  expect(disk(store)['bd_count']).toBeGreaterThan(100)
  expect(counters['pers_pages_on_file']).toBe(disk(store)['bd_count'])
  expect(counters['pers_pages']).toBe(600)
  // Many pages to a write, as they are.
  expect(disk(store)['written_bytes']! / disk(store)['cluster_writes']!).toBeGreaterThan(90 * KiB)
  expect(disk(store)['written_bytes']).toBeLessThan(disk(store)['bd_count']! * 2200)
  // The oldest went, those that had been read stayed.
  expect(await load(pool, 0)).toBe('fetched')
  for (let i = 500; i < 600; i++) expect(await load(pool, i)).toBe('hit')
  // There was room: the page is in memory again.
  expect(await load(pool, 0)).toBe('hit')
  expect(store.stats().counters['promoted_pages']).toBe(1)
  for (let i = 0; i < 600; i++) expect(await load(pool, i)).toMatch(/hit|fetched/)
  store.check()
  await store.close()
  expect(file.closed).toBe(1)
})

test('all operations know of pages in the file', async () => {
  const { store, pool } = openOver(new Disk(4 * MiB))
  fillWith(pool, 600)
  await settle(store)
  const into = new Uint8Array(4096)
  expect(pool.get(0, 0, into)).toBe(Deferred)
  expect(pool.lend(0, 0, () => expect.unreachable())).toBe(Deferred)
  const batch = new PageBatch(2)
  batch.push(0, 0)
  batch.push(5, 5)
  expect(pool.getMany(batch)).toBe(0)
  expect([...batch.outcomes]).toEqual([Deferred, Miss])
  pool.flushPage(0, 0)
  expect(pool.get(0, 0, into)).toBe(Miss)
  expect(await pool.fetch(0, 0, into)).toBe(Miss)
  expect(pool.get(0, 1, into)).toBe(Deferred)
  expect(pool.put(0, 1, noisyPage(7, 0.4))).toBe(PutOutcome.Stored)
  expect(await load(pool, 1, 7)).toBe('hit')
  pool.flushObject(0)
  store.check()
  expect(disk(store)).toMatchObject({ bd_count: 0, free_clusters: 32 })
  await store.close()
})

test('a device that fails at writing loses nothing, and is left in peace for longer each time', async () => {
  const file = new Disk(4 * MiB)
  file.answers.push('EIO', 'ENOSPC', 0, 4096, 'EIO')
  const { store, pool } = openOver(file)
  fillWith(pool, 600)
  const writesAfter: number[] = []
  for (let i = 0; i < 40; i++) {
    store.tick({ pages: 200 })
    await turn()
    await turn()
    store.check()
    writesAfter.push(file.writes)
  }
  // Rests of 1, 2, 4, 8 and 16 ticks, then it works.
  expect([0, 1, 2, 4, 5, 9, 10, 18, 19, 35].map((tick) => writesAfter[tick])).toEqual([1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
  expect(disk(store)).toMatchObject({ failed_writes: 5 })
  expect(disk(store)['bd_count']).toBeGreaterThan(0)
  for (let i = 0; i < 600; i++) expect(await load(pool, i)).toMatch(/hit|fetched/)
  await store.close()
})

test('a failing read is an error of that one get; the page stays and can be had later', async () => {
  const file = new Disk(4 * MiB)
  const { store, pool } = openOver(file)
  fillWith(pool, 600)
  await settle(store)
  const into = new Uint8Array(4096)
  for (const answer of ['EIO', 0, 100] as const) {
    file.answers.push(answer)
    await expect(pool.fetch(0, 0, into)).rejects.toMatchObject({ code: 'TMEM_IO', layer: 'zcache' })
  }
  expect(disk(store)['failed_reads']).toBe(3)
  expect(await load(pool, 0)).toBe('fetched')
  await store.close()
})

test('a file that was altered or cut is found out; the page is never served', async () => {
  const file = new Disk(4 * MiB)
  const { store, pool } = openOver(file)
  fillWith(pool, 600)
  await settle(store)
  const into = new Uint8Array(4096)
  const good = file.bytes.slice()
  const untouched = into.slice()
  for (let bit = 0; bit < 64 * 8; bit += 7) {
    file.bytes[bit >> 3]! ^= 1 << (bit & 7)
    await expect(pool.fetch(0, 0, into)).rejects.toMatchObject({
      code: 'TMEM_CORRUPT',
      handle: 'pool 0 object 0 index 0',
    })
    file.bytes.set(good)
  }
  file.bytes.fill(0)
  await expect(pool.fetch(0, 0, into)).rejects.toBeInstanceOf(TmemError)
  expect(sameBytes(into, untouched)).toBe(true)
  file.bytes.set(good)
  expect(await load(pool, 0)).toBe('fetched')
  store.check()
  await store.close()
})

test('pages that change while they are written or read', async () => {
  const file = new Disk(4 * MiB)
  file.manual = true
  const { store, pool } = openOver(file)
  fillWith(pool, 600)
  store.tick({ pages: 200 })
  expect(disk(store)['writing']).toBe(1)
  // While it is written the page is here, and may be flushed, replaced, and read (which keeps it here).
  pool.flushPage(0, 0)
  pool.put(0, 1, noisyPage(1001, 0.4))
  expect(await load(pool, 2)).toBe('hit')
  store.tick({ pages: 50 })
  store.check()
  file.step()
  store.check()
  const into = new Uint8Array(4096)
  expect(pool.get(0, 0, into)).toBe(Miss)
  expect(await load(pool, 1, 1001)).toBe('hit')
  expect(await load(pool, 2)).toBe('hit')
  expect(pool.get(0, 3, into)).toBe(Deferred)
  // While it is read it may be flushed, and replaced.
  const flushed = pool.fetch(0, 3, into)
  const replaced = pool.fetch(0, 4, into)
  pool.flushPage(0, 3)
  await turn()
  file.step()
  expect(await flushed).toBe(Miss)
  await turn()
  pool.put(0, 4, noisyPage(1004, 0.4))
  file.step()
  expect(await replaced).toBe(Hit)
  expect(sameBytes(into, noisyPage(1004, 0.4))).toBe(true)
  // Two who want the same page both get it; so does nobody from a pool that is gone.
  const both = [pool.fetch(0, 5, into), pool.fetch(0, 5, new Uint8Array(4096))]
  for (let i = 0; i < 6; i++) {
    await turn()
    file.step()
  }
  expect(await Promise.all(both)).toEqual([Hit, Hit])
  const late = pool.fetch(0, 6, into)
  pool.destroy()
  await turn()
  file.step()
  expect(await late).toBe(Miss)
  store.check()
  file.manual = false
  await store.close()
})

test('a page that is replaced and written again while its old bytes are read is served new', async () => {
  const file = new Disk(4 * MiB)
  const { store, pool } = openOver(file, { startPercent: 1 }, MiB)
  fillWith(pool, 100)
  await settle(store)
  const into = new Uint8Array(4096)
  expect(pool.get(0, 3, into)).toBe(Deferred)
  file.manual = true
  const late = pool.fetch(0, 3, into)
  await turn()
  pool.put(0, 3, noisyPage(2003, 0.4))
  store.tick({ pages: 200 })
  expect(disk(store)['writing']).toBe(1)
  file.stepLast()
  expect(pool.get(0, 3, into)).toBe(Deferred)
  // The old bytes arrive; then the new ones are asked for.
  file.step()
  await turn()
  file.step()
  expect(await late).toBe(Hit)
  expect(sameBytes(into, noisyPage(2003, 0.4))).toBe(true)
  store.check()
  file.manual = false
  await store.close()
})

test('a full file takes no more, and clusters are used again', async () => {
  const file = new Disk(256 * KiB)
  const { store, pool } = openOver(file)
  fillWith(pool, 600)
  await settle(store, 10)
  expect(disk(store)).toMatchObject({ free_clusters: 0, cluster_writes: 2 })
  for (let i = 0; i < 600; i++) expect(await load(pool, i)).toMatch(/hit|fetched/)
  const before = disk(store)['cluster_writes']!
  for (let i = 0; i < 200; i++) pool.flushPage(0, i)
  for (let i = 0; i < 200; i++) pool.put(0, i, noisyPage(i, 0.4))
  for (let i = 0; i < 200; i++) pool.flushPage(0, 200 + i)
  for (let i = 0; i < 200; i++) pool.put(0, 200 + i, noisyPage(200 + i, 0.4))
  await settle(store, 10)
  expect(disk(store)['cluster_writes']).toBeGreaterThan(before)
  for (let i = 0; i < 600; i++) expect(await load(pool, i)).toMatch(/hit|fetched/)
  store.check()
  await store.close()
})

test('no more is written in an hour than is allowed', async () => {
  let now = 0
  const file = new Disk(4 * MiB)
  const { store, pool } = openOver(file, { bytesPerHour: 256 * KiB, clock: () => now })
  fillWith(pool, 600)
  await settle(store, 20)
  expect(disk(store)['written_bytes']).toBeLessThanOrEqual(256 * KiB)
  expect(disk(store)['cluster_writes']).toBe(2)
  now = 1_200_000
  await settle(store, 20)
  expect(disk(store)['cluster_writes']).toBe(2)
  now = 1_900_000
  await settle(store, 20)
  expect(disk(store)['cluster_writes']).toBe(3)
  await store.close()
})

test('charges follow: a page in the file costs its owner metadata only', async () => {
  const accounts = createAccounts()
  const store = open(
    { limitBytes: 2 * MiB, writeback: { file: new Disk(4 * MiB), sizeBytes: 4 * MiB, startPercent: 40 } },
    { accounts },
  )
  const pool = newPool(store, 'swap')
  fillWith(pool, 600)
  const before = accounts.charged(1)
  await settle(store)
  expect(accounts.charged(1)).toBeLessThan(before * 0.7)
  pool.destroy()
  expect(accounts.charged(1)).toBe(0)
  await store.close()
})

test('any history over a device that is slow and fails at random', async () => {
  const operation = fc.oneof(
    { weight: 5, arbitrary: fc.record({ put: fc.nat(300), seed: fc.nat(5000) }) },
    { weight: 5, arbitrary: fc.record({ get: fc.nat(300) }) },
    { weight: 2, arbitrary: fc.record({ flush: fc.nat(300) }) },
    { weight: 4, arbitrary: fc.record({ tick: fc.nat(200) }) },
    { weight: 4, arbitrary: fc.record({ step: fc.nat(2) }) },
    { weight: 1, arbitrary: fc.record({ fail: fc.constantFrom('EIO', 'ENOSPC', 0, 512) }) },
  )
  await fc.assert(
    fc.asyncProperty(fc.array(operation, { minLength: 200, maxLength: 600, size: 'max' }), async (operations) => {
      const file = new Disk(512 * KiB)
      file.manual = true
      const { store, pool } = openOver(file, { startPercent: 1 }, MiB)
      const model = new Map<number, number>()
      for (let i = 0; i < 200; i++) if (pool.put(0, i, noisyPage(i, 0.4)) === PutOutcome.Stored) model.set(i, i)
      const into = new Uint8Array(4096)
      for (const each of operations) {
        if ('put' in each) {
          const outcome = pool.put(0, each.put, noisyPage(each.seed, 0.4))
          if (outcome === PutOutcome.Stored) model.set(each.put, each.seed)
          else model.delete(each.put)
        } else if ('get' in each) {
          const outcome = pool.get(0, each.get, into)
          const seed = model.get(each.get)
          if ((seed === undefined) !== (outcome === Miss)) throw new Error(`page ${each.get}: outcome ${outcome}`)
          if (outcome === Hit && !sameBytes(into, noisyPage(seed!, 0.4))) throw new Error(`page ${each.get} is wrong`)
        } else if ('flush' in each) {
          pool.flushPage(0, each.flush)
          model.delete(each.flush)
        } else if ('tick' in each) store.tick({ pages: each.tick })
        else if ('step' in each) {
          file.step()
          store.check()
        } else file.answers.push(each.fail)
      }
      file.manual = false
      file.answers.length = 0
      for (let i = 0; i < 3; i++) file.step()
      for (const [index, seed] of model) {
        const how = await load(pool, index, seed)
        if (how !== 'hit' && how !== 'fetched') throw new Error(`page ${index}: ${how}`)
      }
      store.check()
      expect(store.stats().counters['live']).toBe(model.size)
      await store.close()
    }),
    { numRuns: 12, seed: 9 },
  )
})

test('a real file, through the textual form: emptied at the start and at the end', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-writeback-'))
  const file = join(folder, 'cold')
  try {
    const layer = zcacheFactory.create({
      limit: MiB,
      writebackFile: file,
      writebackSize: 4 * MiB,
      writebackPerHour: MiB,
    })
    const store = compose([layer], { check: 'model' })
    expect(store.capabilities.deferred).toBe(true)
    const pool = store.newPool(attributes('swap')) as Pool
    let stored = 0
    for (; pool.put(0, stored, noisyPage(stored, 0.4)) === PutOutcome.Stored; stored++);
    for (let i = 0; i < 200 && statSync(file).size === 0; i++) {
      store.tick({ pages: 200 })
      await new Promise((resolve) => setTimeout(resolve, 5))
    }
    expect(statSync(file).size).toBeGreaterThan(64 * KiB)
    for (let i = 0; i < stored; i++) expect(await load(pool, i)).toMatch(/hit|fetched/)
    await store.close()
    expect(statSync(file).size).toBe(0)
  } finally {
    rmSync(folder, { recursive: true })
  }
  expect(existsSync(folder)).toBe(false)
})

test('settings that make no sense, no memory, no file', () => {
  const file = new Disk(MiB)
  const good: WritebackOptions = { file, sizeBytes: MiB }
  expect(() => zcache({ limitBytes: MiB, writeback: { ...good, sizeBytes: 1000 } })).toThrow(RangeError)
  expect(() => zcache({ limitBytes: MiB, writeback: { ...good, startPercent: 0 } })).toThrow(RangeError)
  expect(() => zcache({ limitBytes: MiB, writeback: { ...good, bytesPerHour: 10 } })).toThrow(RangeError)
  expect(() => zcache({ limitBytes: MiB, writeback: { ...good, bytesPerHour: MiB } })).toThrow(TypeError)
  expect(() => zcacheFactory.create({ limit: MiB, writebackFile: '/tmp/x' })).toThrow(RangeError)
  expect(() => open({ limitBytes: MiB, writeback: { ...good, file: '/nonexistent/folder/file' } })).toThrow(
    expect.objectContaining({ code: 'TMEM_IO' }),
  )
  const allocator = {
    allocate: (bytes: number, site: string) =>
      site === 'zcache.writeback' ? undefined : systemAllocator.allocate(bytes, site),
  }
  expect(() => open({ limitBytes: MiB, writeback: good }, { allocator })).toThrow(
    expect.objectContaining({ code: 'TMEM_NO_MEMORY' }),
  )
})
