/**
 * The rules, one named case each. A rule is tried for every kind of pool that the store keeps, and where it makes sense
 * for every page size and in every mode (single operations, batches, `fetch`, `lend`).
 *
 * Sources: the contracts in the interface of @tmem/core, and the behaviour of the transcendent memory of 2009 to
 * 2018: what a put, a get and a flush promise; put-put-get, get-get and flush-get coherency; frozen pools; refusals.
 */
import type { Capabilities, ObjectId, PageStore, PoolAttributes, StatsNode } from '@tmem/core'
import {
  basePageSize,
  GetOutcome,
  getOutcomeName,
  isPageSize,
  maxObjectId,
  maxPageSize,
  PageBatch,
  Pending,
  PoolRefusal,
  PutOutcome,
  poolRefusalName,
  putOutcomeName,
} from '@tmem/core'
import { turn } from '@tmem/core/runtime'
import type { DrivenReason, Entry, Handle, Kind, Manifest, Mode, Refusal, Subject, World } from './harness.ts'
import { Hands, keepsKind, kinds, openWorld, poolOf, type Trial } from './harness.ts'
import { expect, expectSame, fail, makePage } from './pages.ts'
import { pageAt } from './reference.ts'

/** A rule about pages: tried with each kind of pool, each size and each mode. */
export interface PageRule {
  readonly name: string
  /** Kinds of pools that it is about (default: all). */
  readonly kinds?: (kind: Kind) => boolean
  /** Modes that make a difference to it (default: all). */
  readonly modes?: readonly Mode[]
  /** `smallest`: the page size makes no difference. */
  readonly sizes?: 'smallest'
  readonly when?: (capabilities: Capabilities) => boolean
  run(trial: Trial): Promise<void>
}

/** A rule about a store as a whole. */
export interface StoreRule {
  readonly name: string
  readonly when?: (capabilities: Capabilities) => boolean
  run(bench: Bench): Promise<void>
}

/** What a rule about a store works with. Everything that it opens is closed after the case. */
export interface Bench {
  readonly capabilities: Capabilities
  readonly manifest: Manifest
  /** Kinds of pools and page sizes that the store keeps and the manifest wants tried. */
  readonly kinds: readonly Kind[]
  readonly sizes: readonly number[]
  readonly open: (open?: Subject['open']) => Promise<World>
  /** Operations on a new pool of the store: persistent if it keeps such pools. */
  readonly hands: (store: PageStore, client?: number) => Hands
}

const single: readonly Mode[] = ['single']
const putModes: readonly Mode[] = ['single', 'batched']
const keepers = (kind: Kind): boolean => kind.persistent || kind.shared
const persistentOnly = (kind: Kind): boolean => kind.persistent
const wideIds: readonly ObjectId[] = [
  0,
  1,
  2 ** 32 - 1,
  2 ** 32,
  2 ** 53 - 1,
  2n ** 53n,
  2n ** 64n,
  2n ** 64n + 1n,
  2n ** 128n,
  2n ** 160n,
  2n ** 191n,
  maxObjectId,
]

/** Runs something that must throw one of the errors of misuse, at once or by rejecting. */
async function expectMisuse(what: string, misuse: () => unknown): Promise<void> {
  try {
    await misuse()
  } catch (error) {
    if (error instanceof TypeError || error instanceof RangeError) return
    throw error
  }
  fail(`${what} did not throw a TypeError or RangeError`)
}

const bad = (value: unknown): never => value as never
const badObjects: readonly unknown[] = [-1, 1.5, Number.NaN, 2 ** 53, -1n, maxObjectId + 1n, 2n ** 192n, '5', undefined]
const badIndexes: readonly unknown[] = [-1, 1.5, Number.NaN, 2 ** 32, '0', undefined]

export const pageRules: readonly PageRule[] = [
  {
    name: 'what was put is got back, byte for byte',
    async run(t) {
      const entries: Entry[] = [
        [1, 0, t.page(1)],
        [1, 1, t.page(2)],
        [2, 0, t.page(3)],
        [70_000, 9, t.page(4)],
      ]
      t.put(...entries)
      await t.expectPages(...entries.toReversed())
    },
  },
  {
    name: 'an all-zero page is data',
    async run(t) {
      t.put([1, 0, t.page(0, 'zero')], [1, 1, t.page(5)])
      await t.expectPages([1, 0, t.page(0, 'zero')], [1, 1, t.page(5)])
    },
  },
  {
    name: 'a page of one repeated word is kept exactly, and so is one that differs in its last byte',
    async run(t) {
      const almost = t.page(7, 'word')
      almost[almost.length - 1]! ^= 0x40
      const entries: Entry[] = [
        [1, 0, t.page(7, 'word')],
        [1, 1, almost],
      ]
      t.put(...entries)
      await t.expectPages(...entries)
    },
  },
  {
    name: 'a page that cannot be compressed is kept exactly or refused',
    async run(t) {
      const entry: Entry = [1, 0, t.page(9, 'noise')]
      t.offer(entry)
      await t.expectPages(entry)
    },
  },
  {
    name: 'object 0 and index 0 are ordinary, and so is the last index',
    async run(t) {
      const entries: Entry[] = [
        [0, 0, t.page(1)],
        [0, t.lastIndex, t.page(2)],
        [1, t.lastIndex, t.page(3)],
      ]
      t.put(...entries)
      await t.expectPages(...entries)
    },
  },
  {
    name: 'a number and a bigint of the same value name the same object',
    sizes: 'smallest',
    async run(t) {
      t.put([5, 0, t.page(1)], [6n, 0, t.page(2)], [2 ** 40, 0, t.page(3)])
      await t.expectPages([5n, 0, t.page(1)], [6, 0, t.page(2)], [2n ** 40n, 0, t.page(3)])
      t.put([5n, 0, t.page(4)])
      t.flush([5, 0])
      await t.expectNone([5n, 0])
    },
  },
  {
    name: 'object ids of up to 192 bits are told apart',
    sizes: 'smallest',
    async run(t) {
      const entries = wideIds.map((id, i): Entry => [id, 3, t.page(i + 1)])
      t.put(...entries)
      t.flush([2n ** 128n, 3], [2 ** 32, 3])
      const left = entries.filter(([id]) => id !== 2n ** 128n && id !== 2 ** 32)
      await t.expectPages(...left)
      await t.expectNone([2n ** 128n, 3], [2 ** 32, 3], [2n ** 96n, 3])
    },
  },
  {
    name: 'a get removes the page from a private ephemeral pool',
    kinds: (kind) => !keepers(kind),
    async run(t) {
      t.put([1, 0, t.page(1)], [1, 1, t.page(2)])
      await t.expectPages([1, 0, t.page(1)])
      await t.expectNone([1, 0])
      await t.expectPages([1, 1, t.page(2)])
    },
  },
  {
    name: 'a get leaves the page in a shared or persistent pool',
    kinds: keepers,
    async run(t) {
      t.put([1, 0, t.page(1)])
      await t.expectPages([1, 0, t.page(1)])
      await t.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'put-put-get gives the second page',
    async run(t) {
      t.put([1, 0, t.page(1)], [1, 1, t.page(2)])
      t.put([1, 0, t.page(3)])
      t.put([1, 1, t.page(4, 'word')])
      await t.expectPages([1, 0, t.page(3)], [1, 1, t.page(4, 'word')])
    },
  },
  {
    name: 'after a refused put the handle is empty, also of an older page',
    modes: putModes,
    async run(t) {
      const { allocator, ledger } = t.world
      t.put([1, 0, t.page(1)], [1, 1, t.page(2)], [1, 2, t.page(3, 'zero')])
      ledger.maximum = 0
      allocator.fail('all')
      const second: Entry[] = [
        [1, 0, t.page(4, 'noise')],
        [1, 1, t.page(5)],
        [1, 2, t.page(6, 'noise')],
        [1, 3, t.page(7, 'noise')],
      ]
      t.offer(...second)
      allocator.fail('none')
      ledger.maximum = Number.POSITIVE_INFINITY
      await t.expectPagesUnderPressure(...second)
    },
  },
  {
    name: 'get-get: what was missed once stays missed',
    async run(t) {
      t.put([1, 0, t.page(1)], [1, 1, t.page(2)])
      t.flush([1, 0])
      for (let round = 0; round < 3; round++) {
        await t.expectNone([1, 0], [9, 9])
        t.world.store.tick({ pages: 64 })
      }
      await t.expectPages([1, 1, t.page(2)])
    },
  },
  {
    name: 'flush-get misses, and a new put is there again',
    async run(t) {
      t.put([1, 0, t.page(1)], [1, 1, t.page(2)], [2, 0, t.page(3)])
      t.flush([1, 0])
      await t.expectNone([1, 0])
      t.put([1, 0, t.page(4)])
      await t.expectPages([1, 0, t.page(4)], [1, 1, t.page(2)], [2, 0, t.page(3)])
    },
  },
  {
    name: 'flushing what is absent changes nothing',
    modes: putModes,
    async run(t) {
      t.put([1, 0, t.page(1)])
      t.flush([1, 1], [7, 0], [7, 0])
      t.pool.flushObject(7)
      await t.expectPages([1, 0, t.page(1)])
      t.flush([1, 0], [1, 0])
      t.flush([1, 0])
      await t.expectNone([1, 0])
    },
  },
  {
    name: 'flushObject removes every page of its object, and no other',
    modes: putModes,
    async run(t) {
      const other = t.another()
      t.put([1, 0, t.page(1)], [1, 5, t.page(2)], [1, t.lastIndex, t.page(3)], [2, 0, t.page(4)], [11, 0, t.page(5)])
      other.put([1, 0, t.page(6)])
      t.pool.flushObject(1)
      await t.expectNone([1, 0], [1, 5], [1, t.lastIndex])
      await t.expectPages([2, 0, t.page(4)], [11, 0, t.page(5)])
      await other.expectPages([1, 0, t.page(6)])
      t.put([1, 5, t.page(7)])
      await t.expectPages([1, 5, t.page(7)])
    },
  },
  {
    name: 'put leaves the source as it was, and does not look at it later',
    modes: putModes,
    async run(t) {
      const source = t.page(1)
      if (t.mode === 'single') t.note(1, 0, t.pool.put(1, 0, source))
      else {
        const batch = t.batch([[1, 0, source]])
        t.pool.putMany(batch)
        t.note(1, 0, batch.outcomes[0]! as PutOutcome)
        expectSame(batch.bytes, source, 'the source in the batch')
        batch.bytes.fill(0xee)
      }
      expectSame(source, t.page(1), 'the source')
      source.fill(0xee)
      t.world.store.tick({ pages: 64 })
      await t.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'what is done to a got page does not reach the store',
    kinds: keepers,
    async run(t) {
      t.put([1, 0, t.page(1)])
      for (let round = 0; round < 2; round++) {
        const [page] = await t.get([1, 0])
        if (page === undefined) break
        expectSame(page, t.page(1), `page 1/0 in round ${round}`)
        page.fill(0xee)
      }
      await t.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'a miss leaves the buffer as it was',
    modes: ['single', 'batched', 'fetched'],
    async run(t) {
      t.put([1, 0, t.page(1)])
      t.flush([1, 0])
      const into = t.page(2)
      if (t.mode === 'single') t.pool.get(1, 0, into)
      else if (t.mode === 'fetched') await t.pool.fetch(1, 0, into)
      else {
        const batch = t.batch([[1, 0, into]])
        t.pool.getMany(batch)
        into.set(batch.bytes)
      }
      expectSame(into, t.page(2), 'the buffer')
    },
  },
  {
    name: 'an answer of Deferred leaves the buffer as it was, and fetch then fills it',
    kinds: keepers,
    modes: ['single', 'batched'],
    async run(t) {
      t.put([1, 0, t.page(1)])
      const into = t.page(2)
      let outcome: number
      if (t.mode === 'single') outcome = t.pool.get(1, 0, into)
      else {
        const batch = t.batch([[1, 0, into]])
        t.pool.getMany(batch)
        outcome = batch.outcomes[0]!
        into.set(batch.bytes)
      }
      if (outcome === GetOutcome.Hit) return expectSame(into, t.page(1), 'the page of a hit')
      expectSame(into, t.page(2), `the buffer after ${getOutcomeName(outcome)}`)
      const fetched = await t.pool.fetch(1, 0, into)
      if (outcome === GetOutcome.Deferred && t.steady)
        expect(fetched === GetOutcome.Hit, `fetch after Deferred ended with ${getOutcomeName(fetched)}`)
      if (fetched === GetOutcome.Hit) expectSame(into, t.page(1), 'the fetched page')
    },
  },
  {
    name: 'only the bytes of the page itself are read and written',
    async run(t) {
      const around = 12
      const guarded = (page: Uint8Array): PageBatch => {
        const batch = new PageBatch(1, t.size, new Uint8Array(t.size + 2 * around).fill(0xa5))
        batch.push(1, 0, around)
        batch.bytes.set(page, around)
        return batch
      }
      const expectGuards = ({ bytes }: PageBatch): void => {
        for (let i = 0; i < around; i++)
          expect(bytes[i] === 0xa5 && bytes[bytes.length - 1 - i] === 0xa5, 'bytes beside the page were changed')
      }
      const put = guarded(t.page(1))
      if (t.mode === 'batched') t.pool.putMany(put)
      else put.outcomes[0] = t.pool.put(1, 0, pageAt(put, 0))
      t.note(1, 0, put.outcomes[0]! as PutOutcome)
      expectGuards(put)

      const got = guarded(t.page(2))
      const page = pageAt(got, 0)
      let outcome: number
      if (t.mode === 'batched') {
        t.pool.getMany(got)
        outcome = got.outcomes[0]!
      } else if (t.mode === 'fetched') outcome = await t.pool.fetch(1, 0, page)
      else if (t.mode === 'single') outcome = t.pool.get(1, 0, page)
      else
        outcome = t.pool.lend(1, 0, (bytes, at, length) => {
          expect(length === t.size && at >= 0 && at + length <= bytes.length, `lend gave ${length} bytes at ${at}`)
          page.set(bytes.subarray(at, at + length))
        })
      expectGuards(got)
      if (outcome === GetOutcome.Deferred) outcome = await t.pool.fetch(1, 0, page)
      expectGuards(got)
      if (outcome === GetOutcome.Hit) expectSame(page, t.page(1), 'the page')
    },
  },
  {
    name: 'a frozen pool takes no new page',
    modes: putModes,
    async run(t) {
      t.put([1, 0, t.page(1)])
      t.pool.freeze()
      const outcomes = t.offer([1, 1, t.page(2)], [2, 0, t.page(3)])
      expect(!outcomes.includes(PutOutcome.Stored), 'a new page was stored in a frozen pool')
      await t.expectNone([1, 1], [2, 0])
      await t.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'a frozen pool still replaces, gets and flushes',
    async run(t) {
      t.put([1, 0, t.page(1)], [1, 1, t.page(2)], [1, 2, t.page(3)], [2, 0, t.page(4)])
      t.pool.freeze()
      t.put([1, 0, t.page(5)])
      t.flush([1, 1])
      t.pool.flushObject(2)
      await t.expectNone([1, 1], [2, 0])
      await t.expectPages([1, 0, t.page(5)], [1, 2, t.page(3)])
    },
  },
  {
    name: 'to a frozen pool a page that was taken out is new again',
    kinds: (kind) => !keepers(kind),
    async run(t) {
      t.put([1, 0, t.page(1)])
      t.pool.freeze()
      await t.expectPages([1, 0, t.page(1)])
      const [outcome] = t.offer([1, 0, t.page(2)])
      // An ephemeral page may have gone before it was asked for, but it cannot have stayed.
      expect(outcome !== PutOutcome.Stored, 'the page was stored')
      await t.expectNone([1, 0])
    },
  },
  {
    name: 'a thawed pool takes new pages again',
    modes: putModes,
    async run(t) {
      t.pool.freeze()
      t.offer([1, 0, t.page(1)])
      t.pool.thaw()
      t.put([1, 0, t.page(2)], [1, 1, t.page(3)])
      await t.expectPages([1, 0, t.page(2)], [1, 1, t.page(3)])
    },
  },
  {
    name: 'freezing one pool leaves the others alone',
    modes: putModes,
    sizes: 'smallest',
    async run(t) {
      const other = t.another()
      t.pool.freeze()
      other.put([1, 0, t.page(1)])
      await other.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'a page of the wrong length or type throws before anything changed',
    modes: single,
    async run(t) {
      const { pool } = t
      t.put([1, 0, t.page(1)])
      const long = new Uint8Array(t.size + 1)
      for (const page of [long, long.subarray(2), new Uint8Array(0), bad(new Array(t.size).fill(0)), bad(undefined)]) {
        const what = `of a page of ${page?.length} bytes`
        await expectMisuse(`put ${what}`, () => pool.put(1, 0, page))
        await expectMisuse(`get ${what}`, () => pool.get(1, 0, page))
        await expectMisuse(`fetch ${what}`, () => pool.fetch(1, 0, page))
      }
      await t.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'an impossible index throws before anything changed',
    modes: single,
    async run(t) {
      const { pool } = t
      t.put([1, 0, t.page(1)])
      for (const index of [...badIndexes, t.lastIndex + 1] as number[]) {
        const what = `index ${String(index)}`
        await expectMisuse(`put with ${what}`, () => pool.put(1, index, t.page(2)))
        await expectMisuse(`get with ${what}`, () => pool.get(1, index, t.page(2)))
        await expectMisuse(`fetch with ${what}`, () => pool.fetch(1, index, t.page(2)))
        await expectMisuse(`lend with ${what}`, () => pool.lend(1, index, () => undefined))
        await expectMisuse(`flushPage with ${what}`, () => pool.flushPage(1, index))
      }
      await t.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'an impossible object id throws before anything changed',
    modes: single,
    sizes: 'smallest',
    async run(t) {
      const { pool } = t
      t.put([1, 0, t.page(1)], [5, 0, t.page(2)])
      for (const object of badObjects as ObjectId[]) {
        const what = `object id ${String(object)}`
        await expectMisuse(`put with ${what}`, () => pool.put(object, 0, t.page(2)))
        await expectMisuse(`get with ${what}`, () => pool.get(object, 0, t.page(2)))
        await expectMisuse(`fetch with ${what}`, () => pool.fetch(object, 0, t.page(2)))
        await expectMisuse(`lend with ${what}`, () => pool.lend(object, 0, () => undefined))
        await expectMisuse(`flushPage with ${what}`, () => pool.flushPage(object, 0))
        await expectMisuse(`flushObject with ${what}`, () => pool.flushObject(object))
      }
      await t.expectPages([1, 0, t.page(1)], [5, 0, t.page(2)])
    },
  },
  {
    name: 'a batch that cannot be right throws before anything changed',
    modes: ['batched'],
    async run(t) {
      const { pool } = t
      t.put([1, 0, t.page(1)])
      type Spoil = (batch: PageBatch) => void
      const spoil: readonly (readonly [string, Spoil])[] = [
        ['a bad object id', (batch) => batch.objects.splice(1, 1, -1)],
        ['a place outside of its bytes', (batch) => batch.offsets.set([t.size + 1], 1)],
        ['a negative place', (batch) => batch.offsets.set([-1], 1)],
        [
          'more entries than room',
          (batch) => {
            batch.length = 3
          },
        ],
      ]
      const other = new PageBatch(1, t.size === maxPageSize ? t.size / 2 : t.size * 2)
      for (const wrong of [bad({ length: 0 }) as PageBatch, other]) {
        await expectMisuse('putMany of a wrong batch', () => pool.putMany(wrong))
        await expectMisuse('getMany of a wrong batch', () => pool.getMany(wrong))
        await expectMisuse('flushMany of a wrong batch', () => pool.flushMany(wrong))
      }
      for (const [what, how] of spoil) {
        const batch = (): PageBatch => {
          const spoilt = t.batch([
            [1, 0, t.page(2)],
            [1, 1, t.page(3)],
          ])
          how(spoilt)
          return spoilt
        }
        await expectMisuse(`putMany with ${what}`, () => pool.putMany(batch()))
        await expectMisuse(`getMany with ${what}`, () => pool.getMany(batch()))
        await expectMisuse(`flushMany with ${what}`, () => pool.flushMany(batch()))
      }
      if (t.size > basePageSize) {
        const batch = t.batch([
          [1, 0, t.page(2)],
          [1, 1, t.page(3)],
        ])
        batch.indexes[1] = t.lastIndex + 1
        await expectMisuse('putMany with an impossible index', () => pool.putMany(batch))
      }
      await t.expectNone([1, 1])
      await t.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'a batch has an outcome for each entry, and is counted',
    modes: ['batched'],
    async run(t) {
      const entries: Entry[] = [
        [1, 0, t.page(1)],
        [1, 1, t.page(2)],
        [2, 0, t.page(3, 'word')],
        [3, 7, t.page(4)],
      ]
      const put = t.batch(entries)
      const stored = t.pool.putMany(put)
      const storedAt = entries.map((_, i) => put.outcomes[i] === PutOutcome.Stored)
      expect(stored === storedAt.filter(Boolean).length, `putMany answered ${stored}, the outcomes say otherwise`)
      if (t.steady) expect(stored === entries.length, `only ${stored} of ${entries.length} pages were stored`)
      for (const [i, [object, index]] of entries.entries()) t.note(object, index, put.outcomes[i]! as PutOutcome)

      const handles: Handle[] = [
        [1, 0],
        [9, 0],
        [1, 1],
        [2, 0],
        [1, 9],
        [3, 7],
      ]
      const got = t.batch(handles)
      const hits = t.pool.getMany(got)
      let count = 0
      for (const [i, [object, index]] of handles.entries()) {
        const outcome = got.outcomes[i]!
        const at = entries.findIndex(([o, x]) => o === object && x === index)
        if (outcome === GetOutcome.Hit) {
          count++
          expect(at >= 0 && storedAt[at] === true, `entry ${i}: a hit for a page that is not stored`)
          expectSame(got.bytes.subarray(i * t.size, (i + 1) * t.size), entries[at]![2], `entry ${i}`)
        } else if (at < 0) expect(outcome === GetOutcome.Miss, `entry ${i}: ${getOutcomeName(outcome)} for no page`)
        else if (outcome === GetOutcome.Miss && storedAt[at] && (t.steady || t.kind.persistent))
          fail(`entry ${i} is missing`)
      }
      expect(hits === count, `getMany answered ${hits}, the outcomes say ${count}`)
    },
  },
  {
    name: 'putMany leaves alone what a layer above refused',
    modes: ['batched'],
    async run(t) {
      t.put([1, 0, t.page(1)])
      const batch = t.batch([
        [1, 0, t.page(2)],
        [1, 1, t.page(3)],
        [1, 2, t.page(4)],
      ])
      batch.outcomes[0] = PutOutcome.Policy
      batch.outcomes[2] = PutOutcome.Incompressible
      const stored = t.pool.putMany(batch)
      expect(batch.outcomes[0] === PutOutcome.Policy, 'the outcome of a refused entry was changed')
      expect(batch.outcomes[2] === PutOutcome.Incompressible, 'the outcome of a refused entry was changed')
      if (t.steady) expect(stored === 1, `putMany answered ${stored}, one page was stored`)
      t.note(1, 1, batch.outcomes[1]! as PutOutcome)
      await t.expectPages([1, 0, t.page(1)], [1, 1, t.page(3)])
      await t.expectNone([1, 2])
    },
  },
  {
    name: 'putMany drops its copy of what a layer above stored',
    modes: ['batched'],
    async run(t) {
      t.put([1, 0, t.page(1)], [1, 1, t.page(2)])
      const batch = t.batch([
        [1, 0, t.page(3)],
        [1, 2, t.page(4)],
      ])
      batch.outcomes[0] = PutOutcome.Stored
      const stored = t.pool.putMany(batch)
      expect(batch.outcomes[0] === PutOutcome.Stored, 'the outcome of a stored entry was changed')
      if (t.steady) expect(stored === 2, `putMany answered ${stored}, two entries are stored`)
      t.note(1, 2, batch.outcomes[1]! as PutOutcome)
      await t.expectNone([1, 0])
      await t.expectPages([1, 1, t.page(2)], [1, 2, t.page(4)])
    },
  },
  {
    name: 'putMany works in order: of two pages for one handle the second stays',
    modes: ['batched'],
    async run(t) {
      const [, , last] = t.offer([1, 0, t.page(1)], [1, 1, t.page(2)], [1, 0, t.page(3)])
      t.note(1, 0, last!)
      await t.expectPages([1, 0, t.page(3)], [1, 1, t.page(2)])
    },
  },
  {
    name: 'getMany answers what is pending, and nothing else',
    modes: ['batched'],
    async run(t) {
      const pages: Entry[] = [
        [1, 0, t.page(1)],
        [1, 1, t.page(2)],
        [1, 2, t.page(3)],
      ]
      t.put(...pages)
      const batch = t.batch([
        [1, 0, t.page(7)],
        [1, 1, t.page(8)],
        [1, 2, t.page(9)],
        [8, 8, t.page(6)],
      ])
      batch.outcomes[0] = GetOutcome.Hit
      batch.outcomes[2] = GetOutcome.Miss
      const hits = t.pool.getMany(batch)
      expect(!batch.outcomes.subarray(0, 4).includes(Pending), 'getMany left an entry pending')
      expect(batch.outcomes[0] === GetOutcome.Hit && batch.outcomes[2] === GetOutcome.Miss, 'getMany changed an answer')
      expectSame(batch.bytes.subarray(0, t.size), t.page(7), 'the page of an entry that had its answer')
      expectSame(batch.bytes.subarray(2 * t.size, 3 * t.size), t.page(9), 'the page of an entry that had its answer')
      if (batch.outcomes[1] === GetOutcome.Hit)
        expectSame(batch.bytes.subarray(t.size, 2 * t.size), t.page(2), 'the page of the pending entry')
      else expectSame(batch.bytes.subarray(t.size, 2 * t.size), t.page(8), 'the buffer of an entry without a hit')
      expect(
        hits === (batch.outcomes[1] === GetOutcome.Hit ? 2 : 1),
        `getMany answered ${hits} hits in the whole batch`,
      )
      await t.expectPages(pages[0]!, pages[2]!)
    },
  },
  {
    name: 'flushMany flushes every entry, whatever its outcome says',
    modes: ['batched'],
    async run(t) {
      const outcomes = [Pending, PutOutcome.Stored, GetOutcome.Miss, GetOutcome.Deferred, PutOutcome.Unavailable]
      const entries = outcomes.map((_, i): Entry => [1, i, t.page(i + 1)])
      t.put(...entries, [1, 10, t.page(20)])
      const batch = t.batch(entries)
      batch.outcomes.set(outcomes)
      t.pool.flushMany(batch)
      await t.expectNone(...entries.map(([object, index]): Handle => [object, index]))
      await t.expectPages([1, 10, t.page(20)])
    },
  },
  {
    name: 'the pages of a batch lie where its offsets say',
    modes: ['batched'],
    async run(t) {
      const gap = 24
      const room = (): Uint8Array => new Uint8Array(3 * (t.size + gap)).fill(0xa5)
      const places = [2 * (t.size + gap), 5, t.size + gap]
      const put = new PageBatch(3, t.size, room())
      for (const [i, at] of places.entries()) {
        put.push(4, i, at)
        put.bytes.set(t.page(i + 1), at)
      }
      t.pool.putMany(put)
      const got = new PageBatch(3, t.size, room())
      for (const [i, at] of places.entries()) got.push(4, i, at)
      t.pool.getMany(got)
      for (const [i, at] of places.entries()) {
        const page = got.bytes.subarray(at, at + t.size)
        if (got.outcomes[i] === GetOutcome.Deferred) got.outcomes[i] = await t.pool.fetch(4, i, page)
        if (got.outcomes[i] === GetOutcome.Hit) expectSame(page, t.page(i + 1), `entry ${i}`)
        else if (t.steady) fail(`entry ${i} is missing`)
        page.fill(0xa5)
      }
      expectSame(got.bytes, room(), 'the bytes between the pages')
    },
  },
  {
    name: 'an empty batch is nothing',
    modes: ['batched'],
    async run(t) {
      t.put([1, 0, t.page(1)])
      const batch = new PageBatch(4, t.size)
      expect(t.pool.putMany(batch) === 0, 'putMany of nothing stored something')
      expect(t.pool.getMany(batch) === 0, 'getMany of nothing hit something')
      t.pool.flushMany(batch)
      await t.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'a batch comes back as it was, but for its outcomes and the pages that were got',
    modes: ['batched'],
    async run(t) {
      const entries: Entry[] = [
        [1, 0, t.page(1)],
        [2n ** 100n, 1, t.page(2)],
        [3n, 2, t.page(3)],
      ]
      t.put([3, 2, t.page(4)])
      const same = (batch: PageBatch, after: string): void => {
        const fresh = t.batch(entries)
        expect(batch.length === fresh.length && batch.capacity === fresh.capacity, `${after} changed the length`)
        for (const [i, [object, index]] of entries.entries())
          expect(
            batch.objects[i] === object && batch.indexes[i] === index && batch.offsets[i] === fresh.offsets[i],
            `${after} changed the handle of entry ${i}`,
          )
        expectSame(batch.bytes, fresh.bytes, `the bytes of the batch after ${after}`)
      }
      const batch = t.batch(entries)
      t.pool.putMany(batch)
      same(batch, 'putMany')
      // What is got is what lies there already.
      batch.rearm()
      t.pool.getMany(batch)
      same(batch, 'getMany')
      t.pool.flushMany(batch)
      same(batch, 'flushMany')
    },
  },
  {
    name: 'in a frozen pool a batch replaces what is known and refuses the rest',
    modes: ['batched'],
    async run(t) {
      t.put([1, 0, t.page(1)], [1, 1, t.page(2)])
      t.pool.freeze()
      const outcomes = t.offer([5, 0, t.page(3)], [1, 0, t.page(4)], [5, 1, t.page(5)], [1, 1, t.page(6)])
      expect(outcomes[0] !== PutOutcome.Stored && outcomes[2] !== PutOutcome.Stored, 'a new page was stored')
      if (t.steady)
        expect(outcomes[1] === PutOutcome.Stored && outcomes[3] === PutOutcome.Stored, 'a known page was refused')
      await t.expectNone([5, 0], [5, 1])
      await t.expectPages([1, 0, t.page(4)], [1, 1, t.page(6)])
    },
  },
  {
    name: 'lend calls its borrower once for a hit, and not at all otherwise',
    modes: single,
    async run(t) {
      t.put([1, 0, t.page(1)])
      let calls = 0
      const outcome = t.pool.lend(1, 0, (bytes, at, length) => {
        calls++
        expectSame(bytes.slice(at, at + length), t.page(1), 'the lent page')
      })
      expect(calls === (outcome === GetOutcome.Hit ? 1 : 0), `the borrower was called ${calls} times`)
      if (outcome === GetOutcome.Miss && t.steady) fail('the page is missing')
      const absent = t.pool.lend(1, 1, () => fail('the borrower was called for an absent page'))
      expect(absent === GetOutcome.Miss, `lend of an absent page answered ${getOutcomeName(absent)}`)
    },
  },
  {
    name: 'what a borrower throws comes out, and the page stays in a shared or persistent pool',
    kinds: keepers,
    modes: single,
    async run(t) {
      t.put([1, 0, t.page(1)])
      const mine = new Error('from the borrower')
      let thrown: unknown
      let called = false
      try {
        t.pool.lend(1, 0, () => {
          called = true
          throw mine
        })
      } catch (error) {
        thrown = error
      }
      expect(!called || thrown === mine, 'the error of the borrower was swallowed')
      await t.expectPages([1, 0, t.page(1)])
    },
  },
  {
    name: 'several fetches at once are all answered right',
    modes: ['fetched'],
    async run(t) {
      const entries: Entry[] = [0, 1, 2, 3].map((i): Entry => [1, i, t.page(i + 1)])
      t.put(...entries)
      const into = entries.map(() => new Uint8Array(t.size))
      const outcomes = await Promise.all(entries.map(([object, index], i) => t.pool.fetch(object, index, into[i]!)))
      for (const [i, outcome] of outcomes.entries())
        if (outcome === GetOutcome.Hit) expectSame(into[i]!, entries[i]![2], `fetch ${i}`)
        else if (t.steady) fail(`fetch ${i} of a page that is there ended with ${getOutcomeName(outcome)}`)
    },
  },
  {
    name: 'of several fetches of one page in a private ephemeral pool at most one has it',
    kinds: (kind) => !keepers(kind),
    modes: ['fetched'],
    async run(t) {
      t.put([1, 0, t.page(1)])
      const into = [0, 1, 2].map(() => new Uint8Array(t.size))
      const outcomes = await Promise.all(into.map((page) => t.pool.fetch(1, 0, page)))
      const hits = outcomes.filter((outcome) => outcome === GetOutcome.Hit).length
      expect(hits <= 1, `${hits} fetches had the page`)
      if (t.steady) expect(hits === 1, 'no fetch had the page')
      for (const [i, outcome] of outcomes.entries())
        if (outcome === GetOutcome.Hit) expectSame(into[i]!, t.page(1), `fetch ${i}`)
      await t.expectNone([1, 0])
    },
  },
  {
    name: 'a flush during a fetch is for good',
    modes: ['fetched'],
    async run(t) {
      t.put([1, 0, t.page(1)])
      const into = t.page(9)
      const fetching = t.pool.fetch(1, 0, into)
      t.pool.flushPage(1, 0)
      const outcome = await fetching
      expectSame(into, outcome === GetOutcome.Hit ? t.page(1) : t.page(9), 'the buffer')
      await t.expectNone([1, 0])
    },
  },
  {
    name: 'a put during a fetch stays, and the fetch gives one of the two pages whole',
    modes: ['fetched'],
    async run(t) {
      t.put([1, 0, t.page(1)])
      const into = t.page(9)
      const fetching = t.pool.fetch(1, 0, into)
      t.put([1, 0, t.page(2)])
      const outcome = await fetching
      const second = outcome === GetOutcome.Hit && into[0] === t.page(2)[0]
      expectSame(into, outcome === GetOutcome.Miss ? t.page(9) : t.page(second ? 2 : 1), 'the buffer')
      if (second && !t.keeps) await t.expectNone([1, 0])
      else await t.expectPages([1, 0, t.page(2)])
    },
  },
  {
    name: 'a destroyed pool holds nothing and takes nothing',
    async run(t) {
      const other = t.another()
      t.put([1, 0, t.page(1)], [2, 0, t.page(2)])
      other.put([1, 0, t.page(3)])
      t.pool.destroy()
      await t.expectNone([1, 0], [2, 0])
      for (const outcome of t.offer([1, 0, t.page(4)], [1, 1, t.page(5)]))
        expect(outcome === PutOutcome.PoolGone, `put answered ${putOutcomeName(outcome)}, not PoolGone`)
      await t.expectNone([1, 0], [1, 1])
      t.flush([1, 0])
      t.pool.flushObject(2)
      t.pool.freeze()
      t.pool.thaw()
      t.pool.destroy()
      await other.expectPages([1, 0, t.page(3)])
    },
  },
  {
    name: 'no page of a destroyed pool is in a pool made later',
    sizes: 'smallest',
    modes: putModes,
    async run(t) {
      const old = t.another()
      old.put([1, 0, t.page(1)], [1, 1, t.page(2)])
      old.pool.destroy()
      for (let round = 0; round < 3; round++) {
        const fresh = t.another()
        await fresh.expectNone([1, 0], [1, 1])
        fresh.put([1, 0, t.page(3 + round)])
        old.pool.flushPage(1, 0)
        old.pool.flushObject(1)
        old.pool.destroy()
        expect(old.offer([1, 1, t.page(8)])[0] !== PutOutcome.Stored, 'a destroyed pool is back')
        await fresh.expectNone([1, 1])
        await fresh.expectPages([1, 0, t.page(3 + round)])
        fresh.pool.destroy()
      }
    },
  },
  {
    name: 'pools do not see each other',
    sizes: 'smallest',
    async run(t) {
      const pools = [t, t.another(), t.another(2), t.another(65_535)]
      for (const [i, pool] of pools.entries()) pool.put([1, 0, t.page(i + 1)], [2, i, t.page(i + 11)])
      pools[1]!.flush([1, 0])
      pools[2]!.pool.flushObject(1)
      await t.expectPages([1, 0, t.page(1)], [2, 0, t.page(11)])
      await t.expectNone([2, 1], [2, 2], [2, 3])
      await pools[1]!.expectNone([1, 0])
      await pools[2]!.expectNone([1, 0])
      await pools[3]!.expectPages([1, 0, t.page(4)], [2, 3, t.page(14)])
    },
  },
  {
    name: 'a page of a pool and its parts are the same bytes',
    when: (capabilities) => capabilities.split,
    modes: putModes,
    async run(t) {
      const parts = partsOf(t)
      const last = t.size / basePageSize - 1
      t.put([1, 3, t.page(1)])
      if (t.wasRefused(1, 3)) return t.expectNone([1, 3])
      const wanted = last === 0 ? [0] : [0, last]
      await parts.expectPages(...wanted.map((part): Entry => [1, 3 * (last + 1) + part, partOf(t.page(1), part)]))
      await parts.expectNone([1, 3 * (last + 1) - 1], [1, 4 * (last + 1)])
      if (t.keeps) await t.expectPages([1, 3, t.page(1)])
      else await t.expectNone([1, 3])
    },
  },
  {
    name: 'a flushed part is missing from its page, the other parts stay',
    when: (capabilities) => capabilities.split,
    modes: putModes,
    async run(t) {
      const parts = partsOf(t)
      const count = t.size / basePageSize
      t.put([1, 2, t.page(1)])
      parts.flush([1, 2 * count + count - 1])
      await t.expectNone([1, 2])
      await parts.expectNone([1, 2 * count + count - 1])
      if (count > 1 && !t.wasRefused(1, 2)) await parts.expectPages([1, 2 * count, partOf(t.page(1), 0)])
    },
  },
  {
    name: 'parts put one by one make a page',
    when: (capabilities) => capabilities.split,
    modes: putModes,
    async run(t) {
      const parts = partsOf(t)
      const count = t.size / basePageSize
      const entries = Array.from({ length: count }, (_, part): Entry => [1, count + part, partOf(t.page(1), part)])
      if (count > 1) {
        parts.put(...entries.slice(1))
        await t.expectNone([1, 1])
      }
      const [first] = parts.offer(entries[0]!)
      if (!t.steady) return
      expect(first === PutOutcome.Stored, `the last part was refused: ${putOutcomeName(first!)}`)
      await t.expectPages([1, 1, t.page(1)])
    },
  },
  {
    name: 'a replaced part shows in its page, and a replaced page in its parts',
    when: (capabilities) => capabilities.split,
    modes: putModes,
    async run(t) {
      if (!t.steady) return
      const parts = partsOf(t)
      const last = t.size / basePageSize - 1
      t.put([1, 0, t.page(1)])
      parts.put([1, last, partOf(t.page(2), last)])
      const mixed = t.page(1)
      mixed.set(partOf(t.page(2), last), last * basePageSize)
      await t.expectPages([1, 0, mixed])
      t.put([1, 0, t.page(3)])
      await parts.expectPages([1, last, partOf(t.page(3), last)])
    },
  },
  {
    name: 'a flush of a page or an object removes its parts',
    when: (capabilities) => capabilities.split,
    modes: putModes,
    async run(t) {
      const parts = partsOf(t)
      const count = t.size / basePageSize
      t.put([1, 0, t.page(1)], [2, 0, t.page(2)], [3, 0, t.page(3)])
      parts.put([3, 0, partOf(t.page(4), 0)])
      t.flush([1, 0])
      t.pool.flushObject(2)
      parts.pool.flushObject(3)
      for (const object of [1, 2, 3]) await parts.expectNone([object, 0], [object, count - 1])
      await t.expectNone([1, 0], [2, 0], [3, 0])
    },
  },
  {
    name: 'a store that cannot split says so',
    when: (capabilities) => !capabilities.split,
    modes: single,
    async run(t) {
      const parts = t.pool.split()
      // A single pool may be able to do more than the store promises for all.
      if (typeof parts !== 'number') partsOf(t)
      else expect(!poolRefusalName(parts).startsWith('unknown'), `split answered ${parts}, which is no reason`)
    },
  },
  {
    name: 'a persistent page is charged to its client until it goes',
    kinds: persistentOnly,
    modes: putModes,
    async run(t) {
      const { ledger } = t.world
      const before = ledger.charged(1)
      const beforeOther = ledger.charged(2)
      const entries = Array.from({ length: 6 }, (_, i): Entry => [1 + (i >> 2), i, t.page(i + 1)])
      t.put(...entries)
      t.put([1, 0, t.page(9)])
      expect(ledger.charged(2) === beforeOther, 'a page was charged to another client')
      t.flush([1, 0], [1, 1])
      t.pool.flushObject(1)
      t.flush([2, 4], [2, 5])
      const left = ledger.charged(1) - before
      expect(left === 0, `${left} bytes are still charged after every page was flushed`)
      t.put(...entries)
      t.pool.destroy()
      expect(ledger.charged(1) <= before, 'a destroyed pool is still charged')
      expect(ledger.mistakes.length === 0, `${ledger.mistakes[0]}`)
    },
  },
  {
    name: 'ephemeral pages are charged to nobody',
    kinds: (kind) => !kind.persistent,
    modes: putModes,
    async run(t) {
      t.put([1, 0, t.page(1)], [1, 1, t.page(2)])
      expect(t.world.ledger.charged(1) === 0, 'an ephemeral page was charged')
    },
  },
]

/** The view in parts of a trial's pool. */
function partsOf(t: Trial): Hands {
  const parts = t.pool.split()
  if (typeof parts === 'number') return fail(`split was refused: ${poolRefusalName(parts)}`)
  expect(parts.attributes.pageSize === basePageSize, `parts have ${parts.attributes.pageSize} bytes`)
  return new Hands(parts, t.mode, t.steady)
}

const partOf = (page: Uint8Array, part: number): Uint8Array =>
  page.slice(part * basePageSize, (part + 1) * basePageSize)

export const storeRules: readonly StoreRule[] = [
  {
    name: 'the capabilities are frozen and make sense',
    async run({ open }) {
      const { capabilities: can } = (await open()).store
      expect(Object.isFrozen(can), 'the capabilities are not frozen')
      expect(isPageSize(can.minPageSize) && isPageSize(can.maxPageSize), 'the page sizes are none')
      expect(can.minPageSize <= can.maxPageSize, 'the smallest page is larger than the largest')
      expect(can.ephemeral || can.persistent, 'the store keeps no kind of pool')
      expect(can.ephemeral || !can.shared, 'shared pools are ephemeral')
      expect(Number.isInteger(can.reservedBytes) && can.reservedBytes >= 0, 'reservedBytes is no number of bytes')
      for (const flag of ['ephemeral', 'persistent', 'shared', 'deferred', 'split'] as const)
        expect(typeof can[flag] === 'boolean', `${flag} is not a boolean`)
    },
  },
  {
    name: 'a pool of every kind and size that the capabilities name can be had, with these attributes',
    async run({ open, kinds, sizes }) {
      const { store } = await open()
      for (const { persistent, shared } of kinds)
        for (const pageSize of sizes) {
          const wanted: { -readonly [K in keyof PoolAttributes]: PoolAttributes[K] } = {
            client: 3,
            persistent,
            shared,
            pageSize,
          }
          const pool = poolOf(store, wanted)
          wanted.client = 4
          const { attributes } = pool
          expect(Object.isFrozen(attributes), 'the attributes are not frozen')
          expect(
            attributes.client === 3 &&
              attributes.persistent === persistent &&
              attributes.shared === shared &&
              attributes.pageSize === pageSize,
            `the attributes are ${JSON.stringify(attributes)}`,
          )
          pool.destroy()
        }
    },
  },
  {
    name: 'a pool that the store cannot keep is refused with the reason',
    async run({ open, capabilities: can }) {
      const { store } = await open()
      const attributes = { client: 1, persistent: !can.ephemeral, shared: false, pageSize: can.minPageSize }
      const refused = (change: Partial<PoolAttributes>, ...reasons: PoolRefusal[]): void => {
        const pool = store.newPool({ ...attributes, ...change })
        const answer = typeof pool === 'number' ? poolRefusalName(pool) : 'a pool'
        const names = reasons.map(poolRefusalName).join(' or ')
        expect(
          typeof pool === 'number' && reasons.includes(pool),
          `${JSON.stringify(change)} got ${answer}, not ${names}`,
        )
      }
      // Shared persistent pools never had a user: a store may keep them, as the first versions did, or refuse them.
      const both = store.newPool({ ...attributes, persistent: true, shared: true })
      if (typeof both === 'number') {
        const named = both === PoolRefusal.SharedPersistent || both === PoolRefusal.Unsupported
        expect(named, `a shared persistent pool was refused with ${poolRefusalName(both)}`)
      } else both.destroy()
      if (!can.persistent) refused({ persistent: true }, PoolRefusal.Unsupported)
      if (!can.ephemeral) refused({ persistent: false }, PoolRefusal.Unsupported)
      if (!can.shared) refused({ persistent: false, shared: true }, PoolRefusal.Unsupported)
      if (can.minPageSize > basePageSize) refused({ pageSize: basePageSize }, PoolRefusal.BadPageSize)
      if (can.maxPageSize < maxPageSize) refused({ pageSize: maxPageSize }, PoolRefusal.BadPageSize)
    },
  },
  {
    name: 'impossible pool attributes throw',
    async run({ open, capabilities: can }) {
      const { store } = await open()
      const good = { client: 1, persistent: !can.ephemeral, shared: false, pageSize: can.minPageSize }
      for (const change of [
        { client: -1 },
        { client: 65_536 },
        { client: 1.5 },
        { pageSize: 0 },
        { pageSize: 2048 },
        { pageSize: 6000 },
        { pageSize: 2 * maxPageSize },
        { persistent: bad(undefined) },
        { shared: bad(1) },
      ])
        await expectMisuse(`newPool with ${JSON.stringify(change)}`, () => store.newPool({ ...good, ...change }))
    },
  },
  {
    name: 'every page finds a place up to the reserved bytes, each in an object of its own',
    when: (can) => can.persistent && can.reservedBytes > 0,
    async run({ open, capabilities, hands }) {
      const { store } = await open()
      const { pool, size } = hands(store)
      // Of a large store the beginning must do.
      const pages = Math.min(Math.floor(capabilities.reservedBytes / size), 2048)
      for (let i = 0; i < pages; i++) {
        const outcome = pool.put(i, i, makePage('noise', i, size))
        expect(outcome === PutOutcome.Stored, `page ${i} of ${pages} was refused: ${putOutcomeName(outcome)}`)
      }
      for (let i = 0; i < pages; i += 97) {
        const into = new Uint8Array(size)
        if (pool.get(i, i, into) === GetOutcome.Deferred) await pool.fetch(i, i, into)
        expectSame(into, makePage('noise', i, size), `page ${i}`)
      }
    },
  },
  {
    name: 'two stores in one process share nothing',
    async run({ open, hands }) {
      const a = await open()
      const b = await open()
      const inA = hands(a.store)
      const inB = hands(b.store)
      inA.put([1, 0, inA.page(1)], [1, 1, inA.page(2)])
      inB.put([1, 0, inB.page(3)])
      await inB.expectNone([1, 1])
      inB.pool.freeze()
      inA.put([1, 2, inA.page(4)])
      await b.store.close()
      await inA.expectPages([1, 0, inA.page(1)], [1, 1, inA.page(2)], [1, 2, inA.page(4)])
    },
  },
  {
    name: 'a closed store takes nothing and holds nothing, and closing again does nothing',
    async run({ open, hands }) {
      const { store, ledger } = await open()
      const pool = hands(store)
      pool.put([1, 0, pool.page(1)], [1, 1, pool.page(2)])
      await store.close()
      await store.close()
      const [outcome] = pool.offer([1, 0, pool.page(3)])
      expect(outcome === PutOutcome.PoolGone, `put answered ${putOutcomeName(outcome!)}, not PoolGone`)
      await pool.expectNone([1, 0], [1, 1])
      pool.flush([1, 0])
      pool.pool.destroy()
      const refusal = store.newPool(pool.pool.attributes)
      expect(refusal === PoolRefusal.Closed, 'a closed store did not answer newPool with Closed')
      ledger.expectSettled('after close')
    },
  },
  {
    name: 'the statistics are a tree of named integers, and a snapshot',
    async run({ open, hands }) {
      const { store } = await open()
      const pool = hands(store)
      const before = store.stats()
      const flat = JSON.stringify(before)
      const check = (node: StatsNode, path: string): void => {
        expect(typeof node.name === 'string' && node.name !== '', `${path}: a node without a name`)
        for (const [name, value] of Object.entries(node.counters))
          expect(Number.isSafeInteger(value) && value >= 0, `${path}/${node.name}/${name} is ${value}`)
        for (const child of node.children) check(child, `${path}/${node.name}`)
      }
      check(before, '')
      pool.offer([1, 0, pool.page(1)], [1, 1, pool.page(2, 'noise')], [1, 0, pool.page(3)])
      await pool.get([1, 0], [9, 9])
      pool.flush([1, 1])
      check(store.stats(), '')
      expect(JSON.stringify(before) === flat, 'statistics that were handed out changed later')
      await store.close()
      check(store.stats(), '')
    },
  },
  {
    name: 'tick keeps to its budget, comes to an end, and changes no page',
    async run({ open, hands }) {
      const { store } = await open()
      const pool = hands(store)
      const entries = Array.from({ length: 10 }, (_, i): Entry => [1, i, pool.page(i)])
      pool.put(...entries)
      const tick = (pages: number): boolean => {
        const progress = store.tick({ pages })
        expect(
          Number.isInteger(progress.pages) && progress.pages >= 0 && progress.pages <= pages,
          `tick touched ${progress.pages} pages with a budget of ${pages}`,
        )
        expect(typeof progress.pending === 'boolean', 'tick did not say whether there is more to do')
        return progress.pending
      }
      tick(0)
      tick(1)
      tick(3)
      // Some background work waits for the world outside (writes to a file): it needs turns of the event loop.
      let rounds = 0
      while (tick(64)) {
        expect(++rounds < 20_000, 'tick does not come to an end')
        if (rounds % 8 === 0) await turn()
      }
      await pool.expectPages(...entries)
    },
  },
]

/** A rule about one reason of a refused put: how the store is brought to it, or that it never gives it. */
export function refusalRule(reason: DrivenReason, refusal: Refusal): StoreRule {
  if (typeof refusal === 'string')
    return {
      name: `a put is never refused with ${reason} (not applicable: ${refusal})`,
      run: (bench) => expectNever(reason, bench),
    }
  return {
    name: `a put is refused with ${reason}, and no page is left behind`,
    run: (b) => expectRefusal(reason, refusal, b),
  }
}

async function expectRefusal(reason: DrivenReason, refusal: Exclude<Refusal, string>, bench: Bench): Promise<void> {
  const wanted = PutOutcome[reason]
  const { store, allocator, ledger } = await bench.open(refusal.by === 'opening' ? refusal.open : undefined)
  const hands = bench.hands(store)
  const { pool, size } = hands
  const kind = refusal.by === 'noise' ? 'noise' : 'text'
  // An older page under the first handle, because a refusal has to remove that, too. (A frozen pool would replace it.)
  pool.put(100, 0, makePage('text', 1, size))
  if (refusal.by === 'freezing') pool.freeze()
  if (refusal.by === 'quota') ledger.maximum = ledger.charged(pool.attributes.client)
  if (refusal.by === 'allocator') allocator.fail('all')
  const most = 'bytes' in refusal ? Math.ceil(refusal.bytes / size) : 4
  const first = refusal.by === 'freezing' ? 1 : 0
  const stored: number[] = []
  let outcome: PutOutcome = PutOutcome.Stored
  let last = first
  for (; last < first + most; last++) {
    outcome = pool.put(100 + last, 0, makePage(kind, last + 2, size))
    if (outcome === PutOutcome.Stored) stored.push(last)
    // A store that is not steady may have other reasons on the way.
    else if (hands.steady || outcome === wanted) break
  }
  allocator.fail('none')
  ledger.maximum = Number.POSITIVE_INFINITY
  expect(outcome !== PutOutcome.Stored, `no put was refused within ${most} pages`)
  expect(outcome === wanted, `put was refused with ${putOutcomeName(outcome)}, not ${reason}`)
  await hands.expectNone([100 + last, 0])
  if (!pool.attributes.persistent) return
  // What was stored before must still be there; of many pages the first and the last few.
  const checked = stored.length <= 32 ? stored : [...stored.slice(0, 16), ...stored.slice(-16)]
  for (const i of checked) await hands.expectPages([100 + i, 0, makePage(kind, i + 2, size)])
}

/** Drives the store to every refusal that the suite knows of; the reason must not be among them. */
async function expectNever(reason: DrivenReason, bench: Bench): Promise<void> {
  const outcomes: PutOutcome[] = []
  const { store, allocator, ledger } = await bench.open()
  const { pool, size } = bench.hands(store)
  const put = (index: number, kind: 'text' | 'noise' | 'zero'): void => {
    outcomes.push(pool.put(1, index, makePage(kind, index + 1, size)))
  }
  for (const kind of ['text', 'noise', 'zero'] as const) for (let i = 0; i < 8; i++) put(i, kind)
  pool.freeze()
  for (let i = 6; i < 10; i++) put(i, 'noise')
  pool.thaw()
  ledger.maximum = ledger.charged(pool.attributes.client)
  for (let i = 6; i < 12; i++) put(i, 'text')
  ledger.maximum = Number.POSITIVE_INFINITY
  allocator.fail('all')
  for (let i = 6; i < 14; i++) put(i, 'noise')
  allocator.fail('none')
  pool.destroy()
  put(1, 'text')
  expect(!outcomes.includes(PutOutcome[reason]), `a put was refused with ${reason}`)
}

/** Kinds and sizes of pools to try. */
export function scopeOf(can: Capabilities, manifest: Manifest): { kinds: Kind[]; sizes: number[] } {
  const wanted = manifest.pageSizes ?? [4096, 8192, 65_536, maxPageSize]
  return {
    kinds: kinds.filter((kind) => keepsKind(can, kind)),
    sizes: wanted.filter((size) => size >= can.minPageSize && size <= can.maxPageSize),
  }
}

/** Opens the store of a subject to see what it can do. */
export async function capabilitiesOf(subject: Subject): Promise<Capabilities> {
  const { store } = await openWorld(subject.open)
  await store.close()
  return store.capabilities
}
