/** The simulator finds bugs: each one that is planted within 100,000 histories, and none where there is none. */
import { expect, test } from 'vitest'
import { simulate } from '../src/index.ts'
import { planted } from './planted.ts'

test.each(planted)('found: $name', { timeout: 300_000 }, async ({ first, plant }) => {
  const undo = plant()
  let found: Awaited<ReturnType<typeof simulate>>
  try {
    found = await simulate({ seed: 1, first, histories: 100_000 - first })
  } finally {
    undo()
  }
  expect(found.failure).toBeDefined()
  const clean = await simulate({ seed: 1, first, histories: found.histories })
  expect(clean.failure).toBeUndefined()
})
