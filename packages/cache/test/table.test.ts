import { systemAllocator } from '@tmem/core'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { EntryTable, noSlot, pageOf, recordOf, refOf, usesOf, withUses } from '../src/table.ts'

test('a reference has page, record and uses', () => {
  for (const [page, record, uses] of [
    [0, 0, 0],
    [2 ** 24 - 3, 63, 3],
    [77, 1, 2],
  ] as const) {
    const ref = refOf(page, record, uses)
    expect([pageOf(ref), recordOf(ref), usesOf(ref)]).toEqual([page, record, uses])
    expect([pageOf(withUses(ref, 1)), recordOf(withUses(ref, 1)), usesOf(withUses(ref, 1))]).toEqual([page, record, 1])
  }
})

test('the table answers as a Map does, also for hashes that lie close together', () => {
  // Few segments and homes, so that runs go over the end of a segment.
  const hash = fc.oneof(
    fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 }),
    fc.integer({ min: 0x03fffff0, max: 0x04000010 }),
    fc.integer({ min: -16, max: 16 }),
  )
  const step = fc.record({ hash, isAdd: fc.boolean(), page: fc.integer({ min: 0, max: 2 ** 24 - 3 }) })
  fc.assert(
    fc.property(fc.array(step, { maxLength: 400 }), fc.integer({ min: 1, max: 5 }), (steps, modulus) => {
      const table = new EntryTable(systemAllocator)
      const model = new Map<number, number>()
      const agree = (): void => {
        expect(table.count).toBe(model.size)
        const seen = new Map<number, number>()
        table.forEach((key, ref) => {
          seen.set(key, ref)
        })
        expect(seen).toEqual(model)
        for (const [key, ref] of model) expect(table.refAt(table.find(key))).toBe(ref)
      }
      for (const { hash: key, isAdd, page } of steps) {
        const slot = table.find(key)
        expect(slot !== noSlot).toBe(model.has(key))
        if (!isAdd) {
          if (slot !== noSlot) table.removeAt(slot)
          model.delete(key)
        } else if (slot === noSlot) {
          table.reserve(key)
          table.add(key, refOf(page, 0, 0))
          model.set(key, refOf(page, 0, 0))
        } else {
          table.setRef(slot, refOf(page, 1, 0))
          model.set(key, refOf(page, 1, 0))
        }
      }
      agree()
      table.shrink()
      agree()
      table.removeWhere((ref) => pageOf(ref) % modulus === 0)
      for (const [key, ref] of model) if (pageOf(ref) % modulus === 0) model.delete(key)
      agree()
    }),
    { numRuns: 200 },
  )
})

test('a table of a million entries takes at most 12 bytes for each, and grows in small steps', () => {
  const table = new EntryTable(systemAllocator)
  let largest = 0
  for (let n = 0; n < 1_000_000; n++) {
    const hash = Math.imul(n, 0x9e3779b1)
    largest = Math.max(largest, table.growthFor(hash))
    table.reserve(hash)
    table.add(hash, refOf(n, 0, 0))
  }
  expect(table.bytes).toBeLessThan(12_500_000)
  expect(largest).toBeLessThan(table.bytes / 64)
})
