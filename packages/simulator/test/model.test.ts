/** What the reference takes for a reason, and what it does not. */
import { basePageSize, compose, TmemError } from '@tmem/core'
import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import { Complaint, Model, ModelPool } from '../src/model.ts'
import { Pages } from '../src/pages.ts'
import { Random } from '../src/random.ts'
import { MemoryPool, noFaults, World } from '../src/world.ts'

const damaged: TmemError = new TmemError('TMEM_CORRUPT', 'what came back is not what was written')
const unread: TmemError = new TmemError('TMEM_IO', 'cannot read the page')

/** The reference in a world in which so much was handed out that is wrong, and a pool. */
function newModel(readErrors: number, damagedReads: number): { model: Model; pool: ModelPool } {
  const world = new World(new Random(1, 1), noFaults(), new MemoryPool())
  world.readErrors = readErrors
  world.damagedReads = damagedReads
  const store = compose([memory({ limitBytes: 64 * 1024 })])
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: basePageSize })
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return { model: new Model(new Pages(), world), pool: new ModelPool(pool, 0, '', 8, 1) }
}

test.each([damaged, unread])('a batch tells one error ($code), and its pages may have another', (error) => {
  const { model, pool } = newModel(1, 1)
  model.failedMany(pool, [2, 5], error)
  // Each reason was for one page.
  expect(() => model.failed(pool, 3, damaged)).toThrow(Complaint)
  expect(() => model.failed(pool, 3, unread)).toThrow(Complaint)
})

test('more pages of a batch than something happened to are a wrong answer', () => {
  const { model, pool } = newModel(1, 1)
  expect(() => model.failedMany(pool, [2, 5, 6], damaged)).toThrow('object 6 index 0: no answer in a batch')
})

test('an error that is told is of its own kind', () => {
  const { model, pool } = newModel(1, 0)
  expect(() => model.failedMany(pool, [1], damaged)).toThrow('nothing was damaged')
  const other = newModel(0, 1)
  expect(() => other.model.failedMany(other.pool, [1], unread)).toThrow('no read has failed')
})
