import { expect, test } from 'vitest'
import { placeholder } from '../src/index.ts'

test('the package loads', () => {
  expect(placeholder).toBe('@tmem/interleave')
})
