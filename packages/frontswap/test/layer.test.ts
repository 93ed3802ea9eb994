import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { compose, GetOutcome, memory, PageBatch, type Pool, PutOutcome } from '@tmem/core'
import fc from 'fast-check'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { frontswap } from '../src/index.ts'

let folder = ''
let files = 0
const nextFile = (): string => join(folder, `swap${files++}.img`)
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'frontswap-'))
})
afterAll(() => {
  rmSync(folder, { recursive: true })
})

const page = (fill: number, size = 4096): Uint8Array => new Uint8Array(size).fill(fill)
const attributes = { client: 1, persistent: true, shared: false, pageSize: 4096 }
const poolOf = (pool: Pool | number): Pool => {
  if (typeof pool === 'number') throw new Error(`pool refused: ${pool}`)
  return pool
}

test('a page goes to the file and comes back, and the file goes with the store', async () => {
  const file = nextFile()
  const stack = compose([frontswap({ file, sizeBytes: 64 * 4096 })], { check: 'model' })
  const pool = poolOf(stack.newPool(attributes))
  const into = page(0)
  expect(pool.put(7, 3, page(42))).toBe(PutOutcome.Stored)
  expect(pool.get(7, 3, into)).toBe(GetOutcome.Deferred)
  expect(into[0]).toBe(0)
  expect(await pool.fetch(7, 3, into)).toBe(GetOutcome.Hit)
  expect(into).toEqual(page(42))
  expect(stack.stats().counters).toMatchObject({ diskWrites: 1, diskReads: 1, used_slots: 1 })
  pool.flushPage(7, 3)
  expect(pool.get(7, 3, into)).toBe(GetOutcome.Miss)
  expect(existsSync(file)).toBe(true)
  await stack.close()
  expect(existsSync(file)).toBe(false)
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
              file: nextFile(),
              sizeBytes: 90 * 4096,
              writethrough,
              ...(front ? { front: [memory({ limitBytes: 48 * 1024 })] } : {}),
            }),
          ],
          { check: 'model' },
        )
        try {
          const pools = sizes.map((pageSize) => poolOf(stack.newPool({ ...attributes, pageSize })))
          const model = new Map<string, number>()
          let batchFill = 0
          for (const { kind, pool: number, object, index, fill } of operations) {
            const pool = pools[number]!
            const size = sizes[number]!
            const key = `${number}/${object}/${index}`
            const note = (k: string, outcome: number, value: number): void => {
              if (outcome === PutOutcome.Stored) model.set(k, value)
              else {
                expect(outcome).toBe(PutOutcome.NoMemory)
                model.delete(k)
              }
            }
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
              expect(outcome).toBe(model.has(key) ? GetOutcome.Hit : GetOutcome.Miss)
              expect(into).toEqual(page(model.get(key) ?? 0, size))
            }
            const slots = [...model.keys()].reduce((sum, k) => sum + (k.startsWith('0') ? 1 : 4), 0)
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
