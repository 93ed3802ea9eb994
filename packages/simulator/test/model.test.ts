/** What the reference takes for a reason, and what it does not. */
import { basePageSize, compose, GetOutcome, PutOutcome, TmemError } from '@tmem/core'
import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import { Complaint, type Fetch, Model, ModelPool } from '../src/model.ts'
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
  const pages = new Pages()
  pages.begin(new Random(2, 2))
  return { model: new Model(pages, world), pool: new ModelPool(pool, 0, '', 8, 1) }
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

test('what rotted in memory is no excuse for another page, and takes none from a disk that has lied', () => {
  const lied = newModel(0, 1)
  lied.model.world.faults.memoryRot = 1
  const older = put(lied.model, lied.pool)
  put(lied.model, lied.pool)
  lied.model.failed(lied.pool, 3, damaged)
  fetch(lied.model, lied.pool)(older)
  expect(() => lied.model.failed(lied.pool, 3, damaged)).toThrow('nothing was damaged')

  const rotten = newModel(0, 0)
  rotten.model.world.faults.memoryRot = 1
  const first = put(rotten.model, rotten.pool)
  put(rotten.model, rotten.pool)
  expect(() => fetch(rotten.model, rotten.pool)(first)).toThrow('nothing was damaged')
})

/** Puts a version to handle 0, and answers it. */
function put(model: Model, pool: ModelPool): number {
  const version = model.next(pool, 0)
  model.wasPut(pool, 0, version, PutOutcome.Stored, false)
  return version
}

/** A fetch of handle 0 that has begun; what is given is called with the version that it is answered. */
function fetch(model: Model, pool: ModelPool): (version: number) => void {
  const into = new Uint8Array(basePageSize)
  const one: Fetch = { pool, handle: 0, possible: model.possibleOf(pool, 0), into, at: 0 }
  model.fetches.push(one)
  return (version) => {
    model.fetches.splice(model.fetches.indexOf(one), 1)
    model.pages.fill(version, into, 0, basePageSize)
    model.wasFetched(one, GetOutcome.Hit)
  }
}

test('an older page that a disk has lied about may stay, or be gone with the read, until something else is put', () => {
  const { model, pool } = newModel(0, 1)
  const older = put(model, pool)
  const newer = put(model, pool)
  // One lie excuses it.
  for (const version of [older, newer, older]) fetch(model, pool)(version)
  put(model, pool)
  expect(() => fetch(model, pool)(older)).toThrow('nothing was damaged')
})

test.each([false, true])(
  'an older page that was read before another one was put says nothing of that (flushed: %s)',
  (flushed) => {
    const { model, pool } = newModel(0, 1)
    const older = put(model, pool)
    put(model, pool)
    const end = fetch(model, pool)
    const next = put(model, pool)
    if (flushed) model.set(pool, 0, 0)
    end(older)
    const again = (): void => {
      const fetched = { pool, handle: 0, possible: model.possibleOf(pool, 0), into: new Uint8Array(0), at: 0 }
      if (flushed) model.wasFetched(fetched, GetOutcome.Miss)
      else fetch(model, pool)(next)
    }
    expect(again).not.toThrow()
  },
)
