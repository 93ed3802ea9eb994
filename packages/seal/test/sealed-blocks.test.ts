/** The table of sealed blocks, against a map. */
import { systemAllocator } from '@tmem/core'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { maxSeal, maxSealedBytes, SealedBlocks } from '../src/sealed-blocks.ts'

const capacity = 12
const step = fc.record({
  // Few locations, so that they meet; and those at both ends.
  location: fc.oneof(fc.nat(20), fc.constantFrom(2 ** 31, 2 ** 32 - 2, 2 ** 32 - 3)),
  seal: fc.oneof(fc.integer({ min: 1, max: maxSeal }), fc.constantFrom(1, 2 ** 32 - 1, 2 ** 32, maxSeal)),
  length: fc.oneof(fc.integer({ min: 1, max: maxSealedBytes }), fc.constantFrom(1, maxSealedBytes)),
})

test('it knows what a map knows', () => {
  fc.assert(
    fc.property(fc.array(step, { maxLength: 200 }), (steps) => {
      const table = SealedBlocks.take(capacity, systemAllocator)!
      const map = new Map<number, { seal: number; length: number }>()
      for (const { location, seal, length } of steps) {
        if (map.has(location) || map.size === capacity) {
          table.remove(location)
          map.delete(location)
        } else {
          table.add(location, seal, length)
          map.set(location, { seal, length })
        }
        expect(table.count).toBe(map.size)
        for (const { location: known } of steps) {
          const slot = table.find(known)
          const there = slot < 0 ? undefined : { seal: table.sealAt(slot), length: table.lengthAt(slot) }
          expect(there).toEqual(map.get(known))
        }
      }
    }),
    { numRuns: 200 },
  )
})
