/** Any sequence of operations against a map: what is served is what was put last, and nothing adds up wrongly. */
import type { Allocator, Pool } from '@tmem/core'
import { createAccounts, GetOutcome, PageBatch, PutOutcome, residentAllocator, systemAllocator } from '@tmem/core'
import { memory } from '@tmem/memory'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { xvmalloc, zbud } from '../src/history.ts'
import type { ZcacheOptions } from '../src/index.ts'
import { KiB, newPool, noisyPage, open, type Stack, sameBytes } from './pages.ts'

/** What must be there: by handle, the page, or `undefined` when it may only be missing. */
class Model {
  readonly pages: Map<string, Uint8Array> = new Map()
  refuse = 0
}

interface Real {
  readonly stack: Stack
  readonly pools: readonly Pool[]
  readonly model: Model
}

type Command = fc.Command<Model, Real>

const into = (pool: Pool): Uint8Array => new Uint8Array(pool.attributes.pageSize).fill(0xaa)
const key = (pool: number, object: number, index: number): string => `${pool}/${object}/${index}`

function judgeGet(model: Model, pool: Pool, at: string, outcome: GetOutcome, page: Uint8Array): void {
  const known = model.pages.get(at)
  if (outcome === GetOutcome.Miss) {
    if (known !== undefined && pool.attributes.persistent) throw new Error(`lost ${at}`)
    model.pages.delete(at)
    return
  }
  if (known === undefined || !sameBytes(known, page)) throw new Error(`${at} is not what was put`)
  if (!pool.attributes.persistent && !pool.attributes.shared) model.pages.delete(at)
}

const put = (pool: number, object: number, index: number, seed: number, noise: number): Command => ({
  check: () => true,
  run(model, { pools }) {
    const target = pools[pool]!
    const page = noisyPage(seed, noise, target.attributes.pageSize)
    const outcome = target.put(object, index, page)
    if (outcome === PutOutcome.Stored) model.pages.set(key(pool, object, index), page)
    else model.pages.delete(key(pool, object, index))
  },
  toString: () => `put(${pool}, ${object}, ${index}, noisyPage(${seed}, ${noise}))`,
})

const get = (pool: number, object: number, index: number, lend: boolean): Command => ({
  check: () => true,
  run(model, { pools }) {
    const target = pools[pool]!
    const page = into(target)
    const outcome = lend
      ? target.lend(object, index, (bytes, at, length) => page.set(bytes.subarray(at, at + length)))
      : target.get(object, index, page)
    judgeGet(model, target, key(pool, object, index), outcome, page)
  },
  toString: () => `${lend ? 'lend' : 'get'}(${pool}, ${object}, ${index})`,
})

const flush = (pool: number, object: number, index: number, whole: boolean): Command => ({
  check: () => true,
  run(model, { pools }) {
    if (whole) pools[pool]!.flushObject(object)
    else pools[pool]!.flushPage(object, index)
    for (const at of model.pages.keys())
      if (at === key(pool, object, index) || (whole && at.startsWith(`${pool}/${object}/`))) model.pages.delete(at)
  },
  toString: () => (whole ? `flushObject(${pool}, ${object})` : `flushPage(${pool}, ${object}, ${index})`),
})

const batch = (pool: number, object: number, first: number, seed: number, noise: number): Command => ({
  check: () => true,
  run(model, { pools }) {
    const target = pools[pool]!
    const { pageSize } = target.attributes
    const entries = new PageBatch(3, pageSize)
    for (let i = 0; i < 3; i++)
      entries.bytes.set(noisyPage(seed + i, noise, pageSize), entries.offsets[entries.push(object, first + i)])
    // The middle one was taken by a layer above.
    entries.outcomes[1] = PutOutcome.Stored
    target.putMany(entries)
    for (let i = 0; i < 3; i++)
      if (i !== 1 && entries.outcomes[i] === PutOutcome.Stored)
        model.pages.set(key(pool, object, first + i), noisyPage(seed + i, noise, pageSize))
      else model.pages.delete(key(pool, object, first + i))
    entries.rearm()
    target.getMany(entries)
    for (let i = 0; i < 3; i++)
      judgeGet(
        model,
        target,
        key(pool, object, first + i),
        entries.outcomes[i] as GetOutcome,
        entries.bytes.subarray(i * pageSize, (i + 1) * pageSize),
      )
  },
  toString: () => `batch(${pool}, ${object}, ${first}, ${seed}, ${noise})`,
})

const tick = (pages: number): Command => ({
  check: () => true,
  run(_model, { stack }) {
    if (stack.store.tick({ pages }).pages > pages) throw new Error('tick did more than it may')
    stack.check()
  },
  toString: () => `tick(${pages})`,
})

const refuse = (allocations: number): Command => ({
  check: () => true,
  run(_model, real) {
    real.model.refuse = allocations
  },
  toString: () => `refuse(${allocations})`,
})

const pool = fc.nat(3)
const object = fc.nat(2)
const index = fc.nat(40)
const seed = fc.nat(1000)
const noise = fc.constantFrom(0, 0, 0.1, 0.3, 0.5, 0.8, 1)
const commands = [
  fc.tuple(pool, object, index, seed, noise).map((args) => put(...args)),
  fc.tuple(pool, object, index, seed, noise).map((args) => put(...args)),
  fc.tuple(pool, object, index, fc.boolean()).map((args) => get(...args)),
  fc.tuple(pool, object, index, fc.boolean()).map((args) => flush(...args)),
  fc.tuple(pool, object, index, seed, noise).map((args) => batch(...args)),
  fc.nat(64).map(tick),
  fc.nat(2).map(refuse),
]

const settings: readonly [string, Omit<ZcacheOptions, 'limitBytes'>][] = [
  ['defaults', {}],
  [
    'the rules of 2011',
    { incompressible: 'refuse', zvMaxZsize: 3584, zvMaxMeanZsize: 2560, zvPageCountPolicyPercent: 75 },
  ],
  ['lz4js', { codec: 'lz4js' }],
  ['xvmalloc', { allocator: xvmalloc }],
  ['zbud', { allocator: zbud }],
]

test.each(settings)('any history agrees with a map: %s', (_name, options) => {
  fc.assert(
    fc.property(fc.commands(commands, { size: '+1', maxCommands: 300 }), (history) => {
      const model = new Model()
      const allocator: Allocator = {
        allocate: (bytes, site) => {
          if (site !== 'zcache.chunk' || model.refuse === 0) return systemAllocator.allocate(bytes, site)
          model.refuse--
          return undefined
        },
      }
      const accounts = createAccounts({ maximumBytes: 300 * KiB })
      const stack = open({ limitBytes: 640 * KiB, ...options }, { allocator, accounts })
      const pools = [
        newPool(stack, 'swap'),
        newPool(stack, 'cache'),
        newPool(stack, 'shared'),
        newPool(stack, 'swap', 128 * KiB),
      ]
      fc.modelRun(() => ({ model, real: { stack, pools, model } }), history)
      stack.check()
      expect(stack.counters()['used_bytes']).toBeLessThanOrEqual(640 * KiB)
      for (const each of pools) each.destroy()
      stack.check()
      expect(accounts.charged(1)).toBe(0)
      expect(stack.chain()['pages']).toBe(0)
      expect(stack.counters()).toMatchObject({ zpages: 0, zbytes: 0, orig_bytes: 0, slot_bytes: 0, raw_pages: 0 })
    }),
    { numRuns: 20, seed: 7 },
  )
})

test.each(settings)('the same above memory that gets what finds no room: %s', (_name, options) => {
  let passedDown = 0
  fc.assert(
    fc.property(fc.commands(commands, { size: '+1', maxCommands: 300 }), (history) => {
      const model = new Model()
      // Chunks that were given back come again, with whatever is in them.
      const stack = open(
        { limitBytes: 640 * KiB, ...options },
        { allocator: residentAllocator, below: [memory({ limitBytes: 2048 * KiB })], check: 'model' },
      )
      const pools = [
        newPool(stack, 'swap'),
        newPool(stack, 'cache'),
        newPool(stack, 'shared'),
        newPool(stack, 'cache', 128 * KiB),
      ]
      // So much that the zcache is full from the start, also one that takes no large blocks.
      for (let i = 0; i < 300; i++) {
        const page = noisyPage(i, 0.5)
        if (pools[1]!.put(3, i, page) === PutOutcome.Stored) model.pages.set(key(1, 3, i), page)
      }
      for (let i = 0; i < 12; i++) {
        const page = noisyPage(i, 0.5, 128 * KiB)
        if (pools[3]!.put(0, i, page) === PutOutcome.Stored) model.pages.set(key(3, 0, i), page)
      }
      fc.modelRun(() => ({ model, real: { stack, pools, model } }), history)
      stack.check()
      passedDown += stack.counters('moves')['passed_down']!
      expect(stack.counters()['used_bytes']).toBeLessThanOrEqual(640 * KiB)
    }),
    { numRuns: 15, seed: 8 },
  )
  expect(passedDown).toBeGreaterThan(50)
})
