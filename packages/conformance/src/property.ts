/**
 * The property: whatever is done to a store, it answers as the reference store could have.
 *
 * fast-check makes up histories of operations on up to three pools; every answer is compared with that of a reference
 * store that is told the same. What the reference misses must be missed; what is served must be the same bytes; a
 * persistent page must be served; what the reference refuses (a new page in a frozen pool, any in a pool that is gone)
 * must be refused. A store may refuse more, and may forget ephemeral pages: then the reference forgets them, too, so
 * that they can never come back. A history that fails is shrunk, and printed with the command that repeats it.
 */
import type { ObjectId, PageStore, Pool, PoolAttributes } from '@tmem/core'
import {
  basePageSize,
  createAccounts,
  GetOutcome,
  getOutcomeName,
  maxObjectId,
  PageBatch,
  PutOutcome,
  putOutcomeName,
  systemAllocator,
} from '@tmem/core'
import { builtin } from '@tmem/core/runtime'
import fc from 'fast-check'
import type { Kind, Ledger, Subject } from './harness.ts'
import { openWorld, poolOf } from './harness.ts'
import { ConformanceError, expect, expectSame, firstDifference, makePage, type PageKind } from './pages.ts'
import { pageAt, ReferenceStore } from './reference.ts'

const objects: readonly ObjectId[] = [0, 5, 2n ** 64n, 2n ** 130n + 5n, maxObjectId]
const indexes: readonly number[] = [0, 1, 2, 7]
const slots = 3

/** A page by its kind and seed, so that a history can be printed. */
interface Content {
  readonly kind: PageKind
  readonly seed: number
}

interface Place {
  readonly object: ObjectId
  readonly index: number
}

/** The pool in a slot, as the store and as the reference have it. */
interface Pair {
  readonly real: Pool
  readonly model: Pool
}

interface Both {
  readonly store: PageStore
  readonly model: ReferenceStore
  readonly ledger: Ledger
  readonly pairs: (Pair | undefined)[]
  readonly fetches: Fetching[]
}

/** A fetch under way: its answer must be one of the states that the page had since it began. */
interface Fetching {
  readonly pair: Pair
  readonly place: Place
  readonly into: Uint8Array
  readonly outcome: Promise<GetOutcome>
  readonly states: (Uint8Array | undefined)[]
}

/** One operation of a history. */
class Step implements fc.AsyncCommand<object, Both> {
  readonly #text: string
  readonly #run: (both: Both) => void | Promise<void>

  constructor(text: string, run: (both: Both) => void | Promise<void>) {
    this.#text = text
    this.#run = run
  }

  check(): boolean {
    return true
  }

  async run(_model: object, both: Both): Promise<void> {
    await this.#run(both)
    for (const { pair, place, states } of both.fetches) {
      const state = look(pair, place)
      if (!samePage(state, states.at(-1))) states.push(state)
    }
  }

  toString(): string {
    return this.#text
  }
}

const objectName = (object: ObjectId): string => (typeof object === 'bigint' ? `${object}n` : `${object}`)
const placeName = ({ object, index }: Place): string => `${objectName(object)}/${index}`
const contentName = ({ kind, seed }: Content): string => `${kind}(${seed})`
const contentOf = ({ kind, seed }: Content, size: number): Uint8Array => makePage(kind, seed, size)

/** What the model holds under a handle of a pool in which a get takes nothing away. */
function look({ model }: Pair, { object, index }: Place): Uint8Array | undefined {
  let page: Uint8Array | undefined
  model.lend(object, index, (bytes, at, length) => {
    page = bytes.slice(at, at + length)
  })
  return page
}

const samePage = (a: Uint8Array | undefined, b: Uint8Array | undefined): boolean =>
  a === b || (a !== undefined && b !== undefined && firstDifference(a, b) < 0)

/** Begins a fetch that other operations overtake. (In a private ephemeral pool nobody could tell what it took away.) */
function beginFetch(pair: Pair, place: Place, both: Both): void {
  const { persistent, shared } = pair.real.attributes
  if (!persistent && !shared) return
  const into = buffer(pair.real)
  const outcome = pair.real.fetch(place.object, place.index, into)
  both.fetches.push({ pair, place, into, outcome, states: [look(pair, place)] })
}

/** Waits for every fetch under way, and compares their answers. */
async function endFetches({ fetches }: Both): Promise<void> {
  for (const { pair, place, into, outcome, states } of fetches.splice(0)) {
    const name = `page ${placeName(place)} fetched beside other operations`
    if ((await outcome) === GetOutcome.Hit) {
      const known = states.some((state) => state !== undefined && samePage(state, into))
      expect(known, `${name} is none of the ${states.length} that it was since the fetch began`)
    } else {
      expectSame(into, buffer(pair.real), `the buffer of ${name}, a miss`)
      expect(states.includes(undefined) || !pair.real.attributes.persistent, `${name} is lost`)
    }
  }
}

/** Compares the outcome of a put, and tells the model. */
function checkPut({ model }: Pair, { object, index }: Place, page: Uint8Array, outcome: number): void {
  if (outcome !== PutOutcome.Stored) model.flushPage(object, index)
  // A pool that is gone must say so, whatever else could be said.
  const asked = outcome === PutOutcome.Stored ? model.put(object, index, page) : undefined
  if (asked !== undefined)
    expect(asked === PutOutcome.Stored, `stored, where the answer must be ${putOutcomeName(asked)}`)
}

/** Compares the answer to a get, and tells the model. */
function checkGot({ model }: Pair, { object, index }: Place, page: Uint8Array | undefined): void {
  const { pageSize, persistent } = model.attributes
  if (page === undefined && !persistent) {
    model.flushPage(object, index)
    return
  }
  const wanted = new Uint8Array(pageSize)
  const answer = model.get(object, index, wanted)
  const name = placeName({ object, index })
  if (page === undefined) expect(answer === GetOutcome.Miss, `persistent page ${name} is lost`)
  else {
    expect(answer === GetOutcome.Hit, `page ${name} is there and should not be`)
    expectSame(page, wanted, `page ${name}`)
  }
}

async function settle(
  pool: Pool,
  { object, index }: Place,
  outcome: number,
  into: Uint8Array,
): Promise<Uint8Array | undefined> {
  if (outcome === GetOutcome.Hit) return into
  expectSame(into, makePage('word', 77, into.length), `the buffer after ${getOutcomeName(outcome)}`)
  if (outcome === GetOutcome.Miss) return undefined
  expect(outcome === GetOutcome.Deferred, `a get answered ${outcome}`)
  return settle(pool, { object, index }, await pool.fetch(object, index, into), into)
}

const buffer = (pool: Pool): Uint8Array => makePage('word', 77, pool.attributes.pageSize)

async function getBoth(pair: Pair, place: Place, how: 'get' | 'fetch' | 'lend'): Promise<void> {
  const { object, index } = place
  const into = buffer(pair.real)
  let outcome: GetOutcome
  if (how === 'lend')
    outcome = pair.real.lend(object, index, (bytes, at, length) => {
      into.set(bytes.subarray(at, at + length))
    })
  else if (how === 'get') outcome = pair.real.get(object, index, into)
  else outcome = await pair.real.fetch(object, index, into)
  checkGot(pair, place, await settle(pair.real, place, outcome, into))
}

function putBoth(pair: Pair, place: Place, content: Content): void {
  const page = contentOf(content, pair.real.attributes.pageSize)
  checkPut(pair, place, page, pair.real.put(place.object, place.index, page))
}

function batchOf(pool: Pool, places: readonly Place[]): PageBatch {
  const batch = new PageBatch(places.length, pool.attributes.pageSize)
  for (const { object, index } of places) batch.push(object, index)
  return batch
}

/** A batch is answered with the number of entries whose outcome is 0: `Stored`, or `Hit`. */
function expectCount(what: string, answer: number, batch: PageBatch): void {
  let count = 0
  for (let i = 0; i < batch.length; i++) if (batch.outcomes[i] === 0) count++
  expect(answer === count, `${what} answered ${answer}, the outcomes say ${count}`)
}

/**
 * Both views in parts, of a persistent pool: of an ephemeral one any part may vanish, and nothing could be compared.
 */
function splitBoth(pair: Pair): Pair | undefined {
  if (!pair.real.attributes.persistent) return undefined
  const real = pair.real.split()
  const model = pair.model.split()
  return typeof real === 'number' || typeof model === 'number' ? undefined : { real, model }
}

function openPair(both: Both, slot: number, attributes: PoolAttributes): void {
  both.pairs[slot]?.real.destroy()
  both.pairs[slot]?.model.destroy()
  both.pairs[slot] = { real: poolOf(both.store, attributes), model: poolOf(both.model, attributes) }
}

// Most operations meet on few handles of few pools: histories are interesting where pages are replaced, taken and
// flushed.
const slotOf = fc.constantFrom(0, 0, 0, 0, 1, 2)
const objectOf = fc.constantFrom(5, 5, 5, 5, 5n, 5n, ...objects)
const indexOf = fc.constantFrom(0, 0, 0, 0, 0, 0, 1, ...indexes)
const placeOf = fc.record({ object: objectOf, index: indexOf })
const contentKinds = fc.record({
  kind: fc.constantFrom<PageKind>('text', 'text', 'zero', 'word', 'noise'),
  seed: fc.nat({ max: 999 }),
})

function attributesOf(kinds: readonly Kind[], sizes: readonly number[]): fc.Arbitrary<PoolAttributes> {
  // Persistent pools twice: nothing may be missing there, so that they show most.
  const weighted = [...kinds, ...kinds.filter(({ persistent }) => persistent)]
  return fc
    .record({
      kind: fc.constantFrom(...weighted),
      pageSize: fc.constantFrom(...sizes),
      client: fc.constantFrom(1, 1, 2),
    })
    .map(({ kind: { persistent, shared }, pageSize, client }) => ({ client, persistent, shared, pageSize }))
}

/** The operations of a history. */
function steps(attributes: fc.Arbitrary<PoolAttributes>): fc.Arbitrary<Step>[] {
  /** An operation on the pool in a slot; nothing where there is none. */
  const on = (slot: number, text: string, run: (pair: Pair, both: Both) => void | Promise<void>): Step =>
    new Step(`${text} in ${slot}`, (both) => {
      const pair = both.pairs[slot]
      return pair === undefined ? undefined : run(pair, both)
    })
  const places = fc.array(placeOf, { minLength: 1, maxLength: 5 })
  const pages = fc.array(fc.record({ place: placeOf, content: contentKinds }), { minLength: 1, maxLength: 5 })
  const part = fc.record({ object: objectOf, index: fc.constantFrom(0, 1, 1, 2, 15) })
  const put = fc
    .tuple(slotOf, placeOf, contentKinds)
    .map(([slot, place, content]) =>
      on(slot, `put ${placeName(place)} ${contentName(content)}`, (pair) => putBoth(pair, place, content)),
    )
  const get = fc
    .tuple(slotOf, placeOf, fc.constantFrom('get', 'fetch', 'lend'))
    .map(([slot, place, how]) => on(slot, `${how} ${placeName(place)}`, (pair) => getBoth(pair, place, how)))
  const begin = fc
    .tuple(slotOf, placeOf)
    .map(([slot, place]) =>
      on(slot, `begin to fetch ${placeName(place)}`, (pair, both) => beginFetch(pair, place, both)),
    )
  return [
    put,
    put,
    put,
    put,
    put,
    get,
    get,
    get,
    get,
    begin,
    begin,
    fc.constant(0).map(() => new Step('wait for the fetches', endFetches)),
    fc.tuple(slotOf, placeOf).map(([slot, place]) =>
      on(slot, `flushPage ${placeName(place)}`, ({ real, model }) => {
        real.flushPage(place.object, place.index)
        model.flushPage(place.object, place.index)
      }),
    ),
    fc.tuple(slotOf, objectOf).map(([slot, object]) =>
      on(slot, `flushObject ${objectName(object)}`, ({ real, model }) => {
        real.flushObject(object)
        model.flushObject(object)
      }),
    ),
    fc.tuple(slotOf, pages).map(([slot, entries]) => {
      const text = entries.map(({ place, content }) => `${placeName(place)} ${contentName(content)}`).join(', ')
      return on(slot, `putMany [${text}]`, (pair) => {
        const batch = batchOf(
          pair.real,
          entries.map(({ place }) => place),
        )
        for (const [i, { content }] of entries.entries()) pageAt(batch, i).set(contentOf(content, batch.pageSize))
        const stored = pair.real.putMany(batch)
        expectCount('putMany', stored, batch)
        for (const [i, { place }] of entries.entries()) checkPut(pair, place, pageAt(batch, i), batch.outcomes[i]!)
      })
    }),
    fc.tuple(slotOf, places).map(([slot, entries]) =>
      on(slot, `getMany [${entries.map(placeName).join(', ')}]`, async (pair) => {
        const batch = batchOf(pair.real, entries)
        for (let i = 0; i < batch.length; i++) pageAt(batch, i).set(buffer(pair.real))
        const hits = pair.real.getMany(batch)
        expectCount('getMany', hits, batch)
        // A page that was got by an earlier entry of the same batch is gone for a later one only where a get removes.
        for (const [i, place] of entries.entries())
          checkGot(pair, place, await settle(pair.real, place, batch.outcomes[i]!, pageAt(batch, i)))
      }),
    ),
    fc.tuple(slotOf, places).map(([slot, entries]) =>
      on(slot, `flushMany [${entries.map(placeName).join(', ')}]`, ({ real, model }) => {
        real.flushMany(batchOf(real, entries))
        model.flushMany(batchOf(model, entries))
      }),
    ),
    fc.tuple(slotOf, fc.constantFrom('freeze', 'thaw', 'thaw')).map(([slot, how]) =>
      on(slot, how, ({ real, model }) => {
        real[how]()
        model[how]()
      }),
    ),
    fc.constantFrom(0, 1, 5, 64).map(
      (pages) =>
        new Step(`tick ${pages}`, ({ store }) => {
          const progress = store.tick({ pages })
          expect(progress.pages <= pages, `tick touched ${progress.pages} pages with a budget of ${pages}`)
        }),
    ),
    fc.tuple(slotOf, attributes).map(([slot, wanted]) => {
      const kind = `${wanted.shared ? 'shared' : 'private'} ${wanted.persistent ? 'persistent' : 'ephemeral'}`
      const text = `new pool of client ${wanted.client}, ${kind}, ${wanted.pageSize} bytes, in ${slot}`
      return new Step(text, (both) => openPair(both, slot, wanted))
    }),
    fc.tuple(slotOf, fc.constantFrom('destroy', 'destroy and make again')).map(([slot, how]) =>
      on(slot, how, ({ real, model }, both) => {
        real.destroy()
        model.destroy()
        const outcome = real.put(1, 1, buffer(real))
        expect(outcome === PutOutcome.PoolGone, `a put answered ${putOutcomeName(outcome)}, not PoolGone`)
        if (how === 'destroy and make again') openPair(both, slot, real.attributes)
      }),
    ),
    fc.tuple(slotOf, part, contentKinds).map(([slot, place, content]) =>
      on(slot, `put part ${placeName(place)} ${contentName(content)}`, (pair) => {
        const parts = splitBoth(pair)
        if (parts !== undefined) putBoth(parts, place, content)
      }),
    ),
    fc.tuple(slotOf, part).map(([slot, place]) =>
      on(slot, `get part ${placeName(place)}`, async (pair) => {
        const parts = splitBoth(pair)
        if (parts !== undefined) await getBoth(parts, place, 'get')
      }),
    ),
    fc.tuple(slotOf, part).map(([slot, { object, index }]) =>
      on(slot, `flush part ${placeName({ object, index })}`, (pair) => {
        const parts = splitBoth(pair)
        parts?.real.flushPage(object, index)
        parts?.model.flushPage(object, index)
      }),
    ),
  ]
}

/** After a history: every page of every pool is asked for, and closing gives everything back. */
async function sweep(both: Both): Promise<void> {
  await endFetches(both)
  for (const pair of both.pairs)
    if (pair !== undefined)
      // Each page twice: what the first get takes out must be gone.
      for (const object of objects)
        for (const index of indexes)
          for (const how of ['lend', 'get'] as const) await getBoth(pair, { object, index }, how)
  await both.store.close()
  both.ledger.expectSettled('after close')
}

/** What repeats a failure: seed, path of the shrunk case and of its commands, as printed. */
export function repetition(): { seed: number; path: string; replayPath: string } | undefined {
  const text = builtin<typeof import('node:process')>('node:process')?.env['TMEM_PROPERTY']
  if (text === undefined) return undefined
  const [seed = '', path = '', replayPath = ''] = text.split(';')
  if (!/^-?\d+$/.test(seed)) throw new RangeError(`TMEM_PROPERTY must be SEED;PATH;COMMANDS, got ${text}`)
  return { seed: Number(seed), path, replayPath }
}

/** Runs the property on a store. Throws `ConformanceError` with a short history and the command that repeats it. */
export async function runProperty(
  subject: Subject,
  scope: { readonly kinds: readonly Kind[]; readonly sizes: readonly number[] },
  name: string,
): Promise<void> {
  const { runs = 60, seed = 1 } = subject.manifest?.property ?? {}
  const again = repetition()
  // Large pages would only make the same histories slow.
  const [smallest, ...larger] = scope.sizes.filter((size) => size <= 16 * basePageSize)
  const sizes = smallest === undefined ? scope.sizes : [smallest, smallest, smallest, smallest, ...larger]
  const attributes = attributesOf(scope.kinds, sizes)
  const commands = fc.commands(steps(attributes), {
    maxCommands: 100,
    size: 'max',
    ...(again === undefined ? {} : { replayPath: again.replayPath }),
  })
  const property = fc.asyncProperty(
    fc.array(attributes, { minLength: 1, maxLength: slots, size: 'max' }),
    commands,
    async (pools, history) => {
      const { store, ledger } = await openWorld(subject.open)
      const model = new ReferenceStore({ allocator: systemAllocator, accounts: createAccounts() })
      const both: Both = { store, model, ledger, pairs: [], fetches: [] }
      try {
        for (const [slot, wanted] of pools.entries()) openPair(both, slot, wanted)
        await fc.asyncModelRun(() => ({ model: {}, real: both }), history)
        await sweep(both)
      } finally {
        // A history that failed may have left fetches behind: what becomes of them is no longer looked at.
        await Promise.allSettled(both.fetches.map(({ outcome }) => outcome))
        await store.close()
      }
    },
  )
  const details = await fc.check(property, {
    numRuns: runs,
    seed: again?.seed ?? seed,
    ...(again === undefined ? {} : { path: again.path }),
  })
  if (!details.failed) return
  const [pools = [], commandList = []] = details.counterexample ?? []
  // The list of commands prints itself, with the path of its own.
  const history = fc.stringify(commandList)
  const replayPath = /replayPath=\\?"([^"\\]*)\\?"/.exec(history)?.[1] ?? ''
  const cause: unknown = details.errorInstance
  throw new ConformanceError(
    [
      cause instanceof Error ? cause.message : String(cause),
      `pools: ${JSON.stringify(pools)}`,
      `history: ${history.replace(/\s*\/\*.*\*\//, '')}`,
      `seed ${details.seed}, path ${details.counterexamplePath}, after ${details.numRuns} runs and ${details.numShrinks} shrinks`,
      `repeat: TMEM_PROPERTY='${details.seed};${details.counterexamplePath};${replayPath}' npx vitest run -t '${name}'`,
    ].join('\n'),
    { cause },
  )
}
