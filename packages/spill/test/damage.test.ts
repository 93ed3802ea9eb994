/**
 * A file that is torn or altered costs the cache, never wrong bytes. One that is not ours is refused, and stays as it
 * was.
 */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { compose, PutOutcome, TmemError } from '@tmem/core'
import fc from 'fast-check'
import { beforeAll, describe, expect, test } from 'vitest'
import { spill } from '../src/index.ts'
import { countersOf, fetched, isRightOrGone, MemoryFiles, open, pageOf, path, poolOf, put } from './stores.ts'

const sizeBytes = 512 * 1024
const pages = 80
const recordsAt = 4096
const ringAt = recordsAt + 512 * 64
/** Where the mark of the page file stands, twice. */
const marks = [
  [0, 1024],
  [3072, 4086],
] as const
/** A closed file of so many pages. */
let prepared: Uint8Array

beforeAll(async () => {
  const files = new MemoryFiles()
  const store = open(files, { sizeBytes })
  const pool = poolOf(store)
  for (let index = 0; index < pages; index++) put(pool, index % 10, index, index)
  await store.close()
  prepared = files.content(path)!
})

/** Opens a file with that content; how many pages are right. Every other one must be missing. */
async function survivors(content: Uint8Array): Promise<number> {
  const files = new MemoryFiles()
  files.put(path, content)
  const store = open(files, { sizeBytes })
  const pool = poolOf(store)
  store.check!()
  let right = 0
  for (let index = 0; index < pages; index++) {
    const page = await fetched(pool, index % 10, index)
    if (page === undefined) continue
    expect(Buffer.compare(page, pageOf(index))).toBe(0)
    right++
  }
  // And it can be used as if nothing had been.
  for (let index = 0; index < 50; index++) expect(pool.put(77, index, pageOf(index))).toBe(PutOutcome.Stored)
  for (let index = 0; index < 50; index++)
    expect(Buffer.compare((await fetched(pool, 77, index))!, pageOf(index))).toBe(0)
  store.check!()
  await store.close()
  return right
}

const altered = (work: (bytes: Uint8Array) => void): Uint8Array => {
  const bytes = prepared.slice()
  work(bytes)
  return bytes
}

describe('altered', () => {
  test('untouched: all of them', async () => {
    expect(await survivors(prepared)).toBe(pages)
  })

  test('zeros, as a power failure leaves them: begun anew', async () => {
    for (const length of [sizeBytes, 0, 4096, 5000, 2 * sizeBytes])
      expect(await survivors(new Uint8Array(length))).toBe(0)
  })

  test('damage in its first bytes: all of them', async () => {
    for (let at = 0; at < 8; at++) expect(await survivors(altered((bytes) => (bytes[at]! ^= 0x55)))).toBe(pages)
    expect(await survivors(altered((bytes) => bytes.fill(0, 0, 8)))).toBe(pages)
    // Of the second mark, too.
    expect(await survivors(altered((bytes) => (bytes[3075]! ^= 1)))).toBe(pages)
  })

  test('any bytes', { timeout: 120_000 }, async () => {
    const place = fc.oneof(
      fc.nat(sizeBytes - 1),
      fc.integer({ min: recordsAt, max: recordsAt + pages * 64 }),
      fc.integer({ min: ringAt, max: ringAt + pages * 4160 }),
      fc.nat(4095),
    )
    let refused = 0
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(place, fc.integer({ min: 1, max: 255 })), { minLength: 1, maxLength: 20 }),
        async (changes) => {
          const bytes = altered((all) => {
            for (const [at, change] of changes) all[at]! ^= change
          })
          const isMark = changes.some(([at]) => marks.some(([from, to]) => at >= from && at < to))
          try {
            await survivors(bytes)
          } catch (error) {
            // Whose it is can be read no more.
            if (!isMark || !(error instanceof TmemError && /none of ours/.test(error.message))) throw error
            refused++
          }
        },
      ),
      { seed: 11, numRuns: 100 },
    )
    expect(refused).toBeLessThan(50)
  })

  test('a header that does not check, or is of another version: begun anew', async () => {
    expect(await survivors(altered((bytes) => (bytes[1024]! ^= 1)))).toBe(0)
    expect(await survivors(altered((bytes) => (bytes[1040]! ^= 1)))).toBe(0)
  })

  test('blocks exchanged, records copied to other places', async () => {
    // Two records exchanged: neither is at its place.
    expect(
      await survivors(
        altered((bytes) => {
          const first = bytes.slice(recordsAt, recordsAt + 64)
          bytes.copyWithin(recordsAt, recordsAt + 64, recordsAt + 128)
          bytes.set(first, recordsAt + 64)
        }),
      ),
    ).toBe(pages - 2)
    // The ring moved by a unit: every page is another one's.
    expect(await survivors(altered((bytes) => bytes.copyWithin(ringAt, ringAt + 64)))).toBeLessThan(10)
    // One record twice.
    const twice = altered((bytes) => bytes.copyWithin(recordsAt + 200 * 64, recordsAt, recordsAt + 64))
    expect(await survivors(twice)).toBe(pages)
    // A frame in the place of another one.
    const frames = altered((bytes) => bytes.copyWithin(ringAt + 4160, ringAt, ringAt + 4160))
    expect(await survivors(frames)).toBe(pages - 1)
  })
})

describe('cut off', () => {
  test('anywhere', { timeout: 120_000 }, async () => {
    const counts: number[] = []
    for (const at of [0, 1024, 4095, 4096, 4160, 5000, ringAt, 60_000, 100_000, ringAt + pages * 4160 - 100])
      counts.push(await survivors(prepared.slice(0, at)))
    expect(counts.slice(0, 4)).toEqual([0, 0, 0, 0])
    expect(counts.at(-1)).toBe(pages - 1)
  })

  test('at, before and behind each structure', { timeout: 120_000 }, async () => {
    const view = new DataView(prepared.buffer)
    const borders = [1024, 1152, 4096, ringAt]
    for (let record = 0; record < pages; record += 11)
      borders.push(recordsAt + record * 64, recordsAt + record * 64 + 60)
    // Where frames begin and end, by their records.
    for (let record = 0; record < pages; record += 7) {
      const at = recordsAt + record * 64
      const begin = ringAt + view.getFloat64(at + 32, true) * 64
      borders.push(begin, begin + view.getUint32(at + 40, true) * 64)
    }
    let last = 0
    for (const border of borders.sort((a, b) => a - b))
      for (const at of [border - 1, border, border + 1]) {
        const right = await survivors(prepared.slice(0, at))
        if (at <= ringAt && right > 0) throw new Error(`${right} pages without a ring, cut off at ${at}`)
        last = Math.max(last, right)
      }
    expect(last).toBeGreaterThan(pages / 2)
  })

  test('in the text of a mark: nobody can tell whose it is', async () => {
    for (const at of [1, 20, 100, 3080]) await expect(survivors(prepared.slice(0, at))).rejects.toThrow('none of ours')
  })
})

test('blocks of several generations of the file: a page that was once put there, or none', {
  timeout: 120_000,
}, async () => {
  const files = new MemoryFiles()
  const small = 128 * 1024
  /** By handle: all that was ever put under it. */
  const ever = new Map<string, Set<number>>()
  const generations: Uint8Array[] = []
  let seed = 1
  for (let generation = 0; generation < 5; generation++) {
    const store = open(files, { sizeBytes: small })
    const pool = poolOf(store)
    for (let n = 0; n < 20; n++) {
      const [object, index] = [n % 3, (n * 7 + generation) % 30]
      const handle = `${object}:${index}`
      seed = (seed * 5 + 3) % 251
      if (n % 5 === 4) pool.flushPage(object, index)
      else if (pool.put(object, index, pageOf(seed)) === PutOutcome.Stored)
        ever.set(handle, (ever.get(handle) ?? new Set()).add(seed))
    }
    await store.close()
    generations.push(files.content(path)!)
  }
  let [found, gone] = [0, 0]
  await fc.assert(
    fc.asyncProperty(fc.infiniteStream(fc.nat(4)), fc.constantFrom(64, 512, 4096, 32_768), async (choices, block) => {
      const mixed = new Uint8Array(small)
      // The header is one block: it has a checksum of its own.
      for (let at = 4096; at < small; at += block)
        mixed.set(generations[choices.next().value]!.subarray(at, at + block), at)
      mixed.set(generations[choices.next().value]!.subarray(0, 4096))
      files.put(path, mixed)
      const store = open(files, { sizeBytes: small })
      const pool = poolOf(store)
      store.check!()
      for (const [handle, seeds] of ever) {
        const [object, index] = handle.split(':').map(Number)
        const page = await fetched(pool, object!, index!)
        if (page === undefined) gone++
        else if ([...seeds].some((one) => Buffer.compare(page, pageOf(one)) === 0)) found++
        else throw new Error(`wrong bytes for ${handle}`)
      }
      store.check!()
      await store.close()
    }),
    { seed: 12, numRuns: 60 },
  )
  expect(found).toBeGreaterThan(200)
  expect(gone).toBeGreaterThan(500)
})

test('records of two futures of one file: what remains is in order, and right', { timeout: 120_000 }, async () => {
  const files = new MemoryFiles()
  const small = 128 * 1024
  const future = async (past: Uint8Array | undefined, size: number, from: number): Promise<Uint8Array> => {
    if (past !== undefined) files.put(path, past)
    const store = open(files, { sizeBytes: small })
    const pool = poolOf(store, 1, true, size)
    for (let index = from; index < from + 12; index++) put(pool, 1, index, index)
    await store.close()
    return files.content(path)!
  }
  const past = await future(undefined, 4096, 0)
  const futures = [await future(past, 4096, 20), await future(past, 8192, 40)]
  await fc.assert(
    fc.asyncProperty(fc.infiniteStream(fc.nat(1)), fc.constantFrom(64, 128, 192), async (choices, block) => {
      const mixed = futures[0]!.slice()
      for (let at = 4096; at < small; at += block)
        mixed.set(futures[choices.next().value]!.subarray(at, at + block), at)
      files.put(path, mixed)
      const store = open(files, { sizeBytes: small })
      const pools = [poolOf(store), poolOf(store, 1, true, 8192)]
      store.check!()
      for (let index = 0; index < 60; index++)
        for (const pool of pools) expect(await isRightOrGone(pool, 1, index, index)).toBe(true)
      await store.close()
    }),
    { seed: 13, numRuns: 40 },
  )
})

test('a file that is not ours is refused, and stays as it was', () => {
  const folder = mkdtempSync(join(tmpdir(), 'spill-foreign-'))
  try {
    const file = join(folder, 'file')
    const refused = (message: string): void =>
      expect(() => compose([spill({ file, sizeBytes: 2 ** 20 })])).toThrow(message)
    for (const content of ['x', 'TMEMSPIL', 'somebody else\n'.repeat(1000), Buffer.alloc(2 ** 20, 1)]) {
      writeFileSync(file, content)
      refused('it is there, and it is none of ours')
      expect(readFileSync(file)).toEqual(Buffer.from(content))
    }
    rmSync(file)
    writeFileSync(join(folder, 'other'), 'x')
    symlinkSync(join(folder, 'other'), file)
    refused('it is a symbolic link')
    expect(readFileSync(join(folder, 'other'), 'utf8')).toBe('x')
    rmSync(file)
    mkdirSync(file)
    refused('it is a directory')
    rmSync(file, { recursive: true })
    expect(() => compose([spill({ file: join(folder, 'none', 'spill'), sizeBytes: 2 ** 20 })])).toThrow(
      'its folder does not exist',
    )
    // Nor is a page file that holds something else.
    const files = new MemoryFiles()
    files.put(path, prepared)
    const bytes = files.content(path)!
    const text = Buffer.from(bytes.subarray(0, 200)).toString('latin1')
    expect(text).toContain('content tmem spill\n')
    expect(countersOf(open(files, { sizeBytes }))['left']).toBe(pages)
  } finally {
    rmSync(folder, { recursive: true })
  }
})
