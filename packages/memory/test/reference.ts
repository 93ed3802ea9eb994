/**
 * A slow and obvious store to compare the real one with, and a language of operations that are done to both.
 *
 * The reference knows for every 4 KiB part what it must contain. A part is certain, or it may have been evicted: that
 * becomes possible for all ephemeral parts as soon as the real store counts an eviction, and for no other reason.
 */
import assert from 'node:assert/strict'
import type { Allocator, ClientAccounts, ObjectId, PageStore, Pool } from '@tmem/core'
import {
  ByteLimit,
  basePageSize,
  createAccounts,
  GetOutcome,
  getOutcomeName,
  maxObjectId,
  PageBatch,
  Pending,
  PoolRefusal,
  PutOutcome,
  poolRefusalName,
  putOutcomeName,
  systemAllocator,
} from '@tmem/core'
import fc from 'fast-check'
import type { MemoryPool, MemoryStore } from '../src/memory.ts'

/** One 4 KiB part: the number that its bytes repeat, and whether it must be there. */
interface Part {
  readonly value: number
  certain: boolean
}

interface PoolReference {
  readonly real: Pool
  /** The real one, where it can exchange frames. */
  readonly frames: MemoryPool | undefined
  readonly parts: Pool | undefined
  readonly client: number
  readonly persistent: boolean
  readonly shared: boolean
  readonly pageSize: number
  readonly partsPerPage: number
  frozen: boolean
  readonly objects: Map<bigint, Map<number, Part>>
}

interface LentFrame {
  readonly frame: number
  readonly pool: PoolReference
  readonly value: number
}

/** What a world is made of. */
export interface WorldOptions {
  /** The store under test, made with these. */
  readonly open: (limit: ByteLimit, allocator: Allocator, accounts: ClientAccounts) => PageStore
  readonly limitBytes: number
  readonly pageSizes: readonly number[]
  /** The store itself, when `open` answers it bare: then every count must be exact. */
  readonly single?: () => MemoryStore
  /** Called after every operation. */
  readonly check: () => void
}

const objects: readonly ObjectId[] = [0, 7, 2 ** 33 + 7, 2n ** 64n + 7n, maxObjectId]

/** Where an operation goes: which pool, which object, which page or part. All of them are folded into what there is. */
interface Where {
  readonly pool: number
  readonly object: number
  readonly page: number
  /** `undefined`: the whole page. */
  readonly part: number | undefined
}

/** An operation of the language. */
export type Operation =
  | { readonly do: 'newPool'; readonly client: number; readonly kind: number; readonly size: number }
  | { readonly do: 'destroy' | 'freeze' | 'thaw'; readonly pool: number }
  | { readonly do: 'put' | 'get' | 'fetch' | 'flushPage'; readonly at: Where }
  | { readonly do: 'lend'; readonly at: Where; readonly inside: Operation | undefined }
  | { readonly do: 'flushObject'; readonly at: Where }
  | {
      readonly do: 'putMany' | 'getMany' | 'flushMany'
      readonly at: Where
      readonly entries: readonly (readonly [object: number, page: number, state: number])[]
    }
  | { readonly do: 'fill'; readonly at: Where; readonly pages: number }
  | { readonly do: 'thin'; readonly at: Where; readonly step: number }
  | { readonly do: 'shrink'; readonly quarter: number; readonly ticks: number; readonly pages: number }
  | { readonly do: 'reserveFrame'; readonly pool: number }
  | { readonly do: 'putFrame' | 'takeFrame'; readonly at: Where; readonly frame: number }
  | { readonly do: 'freeFrame' | 'misuseFrame'; readonly frame: number }
  | { readonly do: 'limit'; readonly quarter: number }
  | { readonly do: 'tick'; readonly pages: number }
  | { readonly do: 'memory'; readonly fails: boolean }
  | { readonly do: 'quota'; readonly client: number; readonly pages: number | undefined }
  | { readonly do: 'weight'; readonly client: number; readonly weight: number }

const where: fc.Arbitrary<Where> = fc.record({
  pool: fc.nat(4),
  object: fc.oneof({ weight: 3, arbitrary: fc.nat(1) }, { weight: 1, arbitrary: fc.nat(objects.length - 1) }),
  page: fc.oneof({ weight: 9, arbitrary: fc.nat(4) }, { weight: 1, arbitrary: fc.constant(-1) }),
  part: fc.option(fc.oneof(fc.nat(3), fc.nat(511)), { nil: undefined }),
})
const one = <const Name extends string>(...names: Name[]): fc.Arbitrary<Name> => fc.constantFrom(...names)

const simple: fc.Arbitrary<Operation> = fc.oneof(
  { weight: 8, arbitrary: fc.record({ do: one('put'), at: where }) },
  { weight: 5, arbitrary: fc.record({ do: one('get', 'fetch'), at: where }) },
  { weight: 3, arbitrary: fc.record({ do: one('flushPage'), at: where }) },
  { weight: 1, arbitrary: fc.record({ do: one('flushObject'), at: where }) },
  { weight: 1, arbitrary: fc.record({ do: one('destroy', 'freeze', 'thaw'), pool: fc.nat(7) }) },
  { weight: 1, arbitrary: fc.record({ do: one('tick'), pages: fc.constantFrom(0, 1, 3, 64, 5000) }) },
)

/** Any operation. */
export const operation: fc.Arbitrary<Operation> = fc.oneof(
  { weight: 20, arbitrary: simple },
  {
    weight: 3,
    arbitrary: fc.record({ do: one('newPool'), client: fc.nat(2), kind: fc.nat(3), size: fc.nat(3) }),
  },
  {
    weight: 2,
    arbitrary: fc.record({ do: one('lend'), at: where, inside: fc.option(simple, { nil: undefined }) }),
  },
  {
    weight: 6,
    arbitrary: fc.record({
      do: one('putMany', 'getMany', 'flushMany'),
      at: where,
      entries: fc.array(fc.tuple(fc.nat(1), fc.nat(5), fc.nat(9)), { minLength: 1, maxLength: 10 }),
    }),
  },
  { weight: 5, arbitrary: fc.record({ do: one('fill'), at: where, pages: fc.integer({ min: 1, max: 300 }) }) },
  { weight: 2, arbitrary: fc.record({ do: one('thin'), at: where, step: fc.integer({ min: 2, max: 5 }) }) },
  {
    weight: 2,
    arbitrary: fc.record({
      do: one('shrink'),
      quarter: fc.integer({ min: 1, max: 3 }),
      ticks: fc.integer({ min: 1, max: 4 }),
      pages: fc.constantFrom(5, 600),
    }),
  },
  { weight: 3, arbitrary: fc.record({ do: one('reserveFrame'), pool: fc.nat(4) }) },
  { weight: 8, arbitrary: fc.record({ do: one('putFrame', 'takeFrame'), at: where, frame: fc.nat(3) }) },
  { weight: 1, arbitrary: fc.record({ do: one('freeFrame', 'misuseFrame'), frame: fc.nat(9) }) },
  { weight: 2, arbitrary: fc.record({ do: one('limit'), quarter: fc.constantFrom(0, 1, 2, 3, 4, 4, 4) }) },
  { weight: 1, arbitrary: fc.record({ do: one('memory'), fails: fc.boolean() }) },
  {
    weight: 1,
    arbitrary: fc.record({
      do: one('quota'),
      client: fc.nat(2),
      pages: fc.constantFrom(0, 1, 40, undefined, undefined),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: one('weight'), client: fc.nat(2), weight: fc.nat(3) }) },
)

/** The real store and the reference, side by side. */
export class World {
  readonly store: PageStore
  readonly limit: ByteLimit
  readonly accounts = createAccounts()
  readonly #options: WorldOptions
  readonly #pools: PoolReference[] = []
  readonly #gone: Pool[] = []
  readonly #lent: LentFrame[] = []
  readonly #maxima = [Infinity, Infinity, Infinity]
  #memoryFails = false
  #value = 1
  #losses = 0
  /** A borrower is using the store. */
  #lending = false
  /** What happened, for the test to see that everything did. */
  readonly seen = new Map<string, number>()

  constructor(options: WorldOptions) {
    this.#options = options
    this.limit = new ByteLimit(options.limitBytes)
    const allocator: Allocator = {
      allocate: (bytes, site) => (this.#memoryFails ? undefined : systemAllocator.allocate(bytes, site)),
    }
    this.store = options.open(this.limit, allocator, this.accounts)
  }

  /** Does one operation to both, compares, and checks every invariant. */
  async step(operation: Operation): Promise<void> {
    if (operation.do === 'fetch') await this.#fetch(operation.at)
    else this.#now(operation)
    this.#check()
  }

  #now(operation: Operation): void {
    switch (operation.do) {
      case 'newPool':
        this.#newPool(operation.client, operation.kind, operation.size)
        break
      case 'destroy':
        this.#destroy(operation.pool)
        break
      case 'freeze':
      case 'thaw':
        this.#freeze(operation.pool, operation.do === 'freeze')
        break
      case 'put':
        this.#put(operation.at)
        break
      case 'get':
      case 'fetch':
        this.#get(operation.at)
        break
      case 'flushPage':
        this.#flushPage(operation.at)
        break
      case 'flushObject':
        this.#flushObject(operation.at)
        break
      case 'lend':
        this.#lend(operation.at, operation.inside)
        break
      case 'putMany':
      case 'getMany':
      case 'flushMany':
        this.#batch(operation.do, operation.at, operation.entries)
        break
      case 'fill':
        this.#fill(operation.at, operation.pages)
        break
      case 'thin':
        this.#thin(operation.at, operation.step)
        break
      case 'shrink':
        this.limit.bytes = Math.floor((this.limit.maximumBytes * operation.quarter) / 4)
        for (let tick = 0; tick < operation.ticks; tick++) this.#tick(operation.pages)
        this.limit.bytes = this.limit.maximumBytes
        break
      case 'reserveFrame':
        this.#reserveFrame(operation.pool)
        break
      case 'putFrame':
        this.#putFrame(operation.at, operation.frame)
        break
      case 'takeFrame':
        this.#takeFrame(operation.at)
        break
      case 'freeFrame':
        this.#freeFrame(operation.frame)
        break
      case 'misuseFrame':
        this.#misuseFrame(operation.frame)
        break
      case 'limit':
        this.limit.bytes = Math.floor((this.limit.maximumBytes * operation.quarter) / 4)
        break
      case 'tick':
        this.#tick(operation.pages)
        break
      case 'memory':
        this.#memoryFails = operation.fails
        break
      case 'quota':
        this.#maxima[operation.client] = operation.pages === undefined ? Infinity : operation.pages * basePageSize
        this.accounts.setMaximum(operation.client, this.#maxima[operation.client])
        break
      case 'weight':
        this.accounts.setWeight(operation.client, operation.weight)
        break
      default: {
        const never: never = operation
        throw new Error(`unknown operation ${JSON.stringify(never)}`)
      }
    }
    this.#noteLosses()
  }

  #newPool(client: number, kind: number, size: number): void {
    if (this.#pools.length === 8) return
    const pageSize = this.#options.pageSizes[size % this.#options.pageSizes.length]
    const persistent = kind === 1
    const shared = kind === 2
    const real = this.store.newPool({ client, persistent, shared, pageSize })
    if (typeof real === 'number') {
      assert.equal(real, PoolRefusal.NoMemory, `newPool answered ${poolRefusalName(real)}`)
      assert.ok(this.#memoryFails)
      return
    }
    assert.deepEqual({ ...real.attributes }, { client, persistent, shared, pageSize })
    const parts = this.store.capabilities.split ? real.split() : undefined
    assert.ok(typeof parts !== 'number')
    this.#pools.push({
      real,
      frames: this.#options.single === undefined ? undefined : (real as MemoryPool),
      parts,
      client,
      persistent,
      shared,
      pageSize,
      partsPerPage: pageSize / basePageSize,
      frozen: false,
      objects: new Map(),
    })
  }

  #destroy(number: number): void {
    const pool = this.#pools[number]
    if (pool === undefined) return
    pool.real.destroy()
    pool.real.destroy()
    this.#pools.splice(number, 1)
    const late = pool.real.split()
    this.#gone.push(pool.real, pool.parts ?? pool.real, ...(typeof late === 'number' ? [] : [late]))
  }

  #freeze(number: number, frozen: boolean): void {
    const pool = this.#pools[number]
    if (pool === undefined) return
    if (frozen) pool.real.freeze()
    else pool.real.thaw()
    pool.frozen = frozen
  }

  /** Folds a place into what there is: pool, view, object, index and the parts that it stands for. */
  #find(at: Where): Place | undefined {
    const pool = this.#pools[at.pool % Math.max(1, this.#pools.length)]
    if (pool === undefined) return undefined
    const object = objects[at.object]
    const last = 2 ** 32 / pool.partsPerPage - 1
    const page = at.page < 0 ? last : at.page
    if (at.part === undefined || pool.parts === undefined)
      return { pool, view: pool.real, object, index: page, first: page * pool.partsPerPage, count: pool.partsPerPage }
    const index = page * pool.partsPerPage + (at.part % pool.partsPerPage)
    return { pool, view: pool.parts, object, index, first: index, count: 1 }
  }

  #put(at: Where): void {
    const place = this.#find(at)
    if (place === undefined) return
    const value = this.#newValue(place.count)
    const page = pageOf(value, place.count)
    const before = this.#gauges()
    const outcome = place.view.put(place.object, place.index, page)
    this.#stored(place, value, outcome, before)
    assert.ok(page.equals(pageOf(value, place.count)), 'a put changed the caller’s page')
  }

  /** Notes an answer to a put, after judging whether it may be given. */
  #stored(place: Place, value: number, outcome: number, before: Record<string, number> | undefined): void {
    const { pool, first, count } = place
    this.#see(`put ${putOutcomeName(outcome)}`)
    const known = this.#knows(place)
    const pages = this.#objectOf(place)
    for (let part = 0; part < count; part++) pages.delete(first + part)
    const bytes = count * basePageSize
    switch (outcome) {
      case PutOutcome.Stored:
        if (pool.frozen) assert.ok(known, 'a frozen pool stored a new handle')
        for (let part = 0; part < count; part++) pages.set(first + part, { value: value + part, certain: true })
        break
      case PutOutcome.Frozen:
        assert.ok(pool.frozen, 'Frozen, and the pool is not')
        // A 4 KiB page that is certainly there can be replaced whatever the state of the store is.
        if (pool.partsPerPage === 1) assert.notEqual(known, 'certainly')
        break
      case PutOutcome.Quota:
        assert.ok(pool.persistent, 'an ephemeral page is charged to nobody')
        if (before !== undefined)
          assert.ok(this.accounts.charged(pool.client) + bytes > this.#maxima[pool.client], 'Quota within the maximum')
        break
      case PutOutcome.NoMemory:
        if (before !== undefined && this.limit.bytes === this.limit.maximumBytes) {
          const room = before.capacity - before.frames
          assert.ok(room < count + 16, `NoMemory for ${count} frames with ${room} left`)
          if (count === 1) assert.equal(before.eph_frames, 0, 'NoMemory with pages that could be evicted')
        }
        break
      case PutOutcome.AllocationFailed:
        assert.ok(this.#memoryFails, 'AllocationFailed, and there is memory')
        break
      default:
        assert.fail(`put answered ${putOutcomeName(outcome)}`)
    }
    if (pages.size === 0) pool.objects.delete(BigInt(place.object))
  }

  #get(at: Where): void {
    const place = this.#find(at)
    if (place === undefined) return
    const into = Buffer.alloc(place.count * basePageSize, 0xaa)
    this.#got(place, place.view.get(place.object, place.index, into), into)
  }

  async #fetch(at: Where): Promise<void> {
    const place = this.#find(at)
    if (place === undefined) return
    const into = Buffer.alloc(place.count * basePageSize, 0xaa)
    this.#got(place, await place.view.fetch(place.object, place.index, into), into)
    this.#noteLosses()
  }

  /** Judges an answer to a get and notes what it did. */
  #got(place: Place, outcome: number, into: Buffer): void {
    this.#judge(place, outcome)
    if (outcome === GetOutcome.Hit) {
      this.#compare(place, into)
      this.#taken(place)
    } else assert.ok(into.equals(Buffer.alloc(into.length, 0xaa)), 'a miss changed the caller’s page')
  }

  #judge(place: Place, outcome: number): void {
    this.#see(`get ${getOutcomeName(outcome)}`)
    const known = this.#complete(place)
    if (outcome === GetOutcome.Hit) assert.ok(known, 'a hit for what was never stored, or is gone')
    else {
      assert.equal(outcome, GetOutcome.Miss)
      assert.notEqual(known, 'certainly', 'a page is lost')
      // What was missed once may not come back.
      if (place.count === 1) this.#objectOf(place).delete(place.first)
    }
  }

  #compare(place: Place, bytes: Uint8Array): void {
    const pages = this.#objectOf(place)
    for (let part = 0; part < place.count; part++) {
      const known = pages.get(place.first + part)!
      assert.ok(
        pageOf(known.value, 1).equals(bytes.subarray(part * basePageSize, (part + 1) * basePageSize)),
        `part ${part} of ${place.object}:${place.index} has other bytes than ${known.value}`,
      )
      known.certain = true
    }
  }

  /** A hit takes the page out of a private ephemeral pool. */
  #taken(place: Place): void {
    if (!place.pool.persistent && !place.pool.shared) this.#forget(place)
  }

  #forget(place: Place): void {
    const pages = place.pool.objects.get(BigInt(place.object))
    if (pages === undefined) return
    for (let part = 0; part < place.count; part++) pages.delete(place.first + part)
    if (pages.size === 0) place.pool.objects.delete(BigInt(place.object))
  }

  #flushPage(at: Where): void {
    const place = this.#find(at)
    if (place === undefined) return
    place.view.flushPage(place.object, place.index)
    this.#forget(place)
  }

  #flushObject(at: Where): void {
    const place = this.#find(at)
    if (place === undefined) return
    place.view.flushObject(place.object)
    place.pool.objects.delete(BigInt(place.object))
  }

  #lend(at: Where, inside: Operation | undefined): void {
    const place = this.#find(at)
    if (place === undefined) return
    let lent = false
    const outcome = place.view.lend(place.object, place.index, (bytes, start, length) => {
      lent = true
      assert.equal(length, place.count * basePageSize)
      assert.ok(this.#complete(place), 'lent what was never stored, or is gone')
      this.#compare(place, bytes.subarray(start, start + length))
      // The borrower uses the store: with the page still there, as far as it is not evicted or replaced now.
      if (inside === undefined || inside.do === 'fetch') return
      if (!place.pool.persistent && !place.pool.shared) this.#doubt(place)
      this.#lending = true
      this.#now(inside)
      this.#lending = false
    })
    assert.equal(lent, outcome === GetOutcome.Hit)
    if (!lent) this.#judge(place, outcome)
    else if (inside === undefined) this.#taken(place)
    // Whether the page of now is still the one that was lent is the store's business; it may take it or leave it.
    else if (!place.pool.persistent && !place.pool.shared) this.#doubt(place)
  }

  /** From now on the page may be there or not. */
  #doubt(place: Place): void {
    const pages = place.pool.objects.get(BigInt(place.object))
    for (let part = 0; part < place.count; part++) {
      const left = pages?.get(place.first + part)
      if (left !== undefined) left.certain = false
    }
  }

  #batch(
    what: 'putMany' | 'getMany' | 'flushMany',
    at: Where,
    entries: readonly (readonly [object: number, page: number, state: number])[],
  ): void {
    const common = this.#find(at)
    if (common === undefined) return
    const { view, count } = common
    const batch = new PageBatch(entries.length, count * basePageSize)
    const places: Place[] = []
    const values: number[] = []
    const batchShift = entries[0][2] > 5 ? 1 : 0
    for (const [i, [object, page, state]] of entries.entries()) {
      const inParts = common.view !== common.pool.real
      const place = this.#find({ ...at, object, page: inParts ? at.page : page })!
      const shifted = inParts ? this.#shifted(place, page) : place
      const value = this.#newValue(count)
      // Sometimes not back to back, so that copies cannot be joined.
      const slot = what === 'putMany' ? (state === 8 ? entries.length - 1 - i : i) : (i + batchShift) % entries.length
      batch.push(objects[object], shifted.index, slot * count * basePageSize)
      places.push(shifted)
      values.push(value)
      if (state === 9) batch.outcomes[i] = PutOutcome.Stored
      if (state === 7) batch.outcomes[i] = what === 'putMany' ? PutOutcome.Policy : GetOutcome.Miss
    }
    // Entries may share a place in the batch's bytes: the last one decides what lies there.
    const lies = new Map<number, number>()
    for (const [i, value] of values.entries()) lies.set(batch.offsets[i], value)
    if (what === 'putMany') for (const [offset, value] of lies) batch.bytes.set(pageOf(value, count), offset)
    else batch.bytes.fill(0xaa)
    const asked = batch.outcomes.slice()
    const losses = this.#losses
    if (what === 'flushMany') {
      view.flushMany(batch)
      for (const place of places) this.#forget(place)
      return
    }
    const answer = what === 'putMany' ? view.putMany(batch) : view.getMany(batch)
    this.#noteLosses()
    let zeros = 0
    for (const [i, place] of places.entries()) {
      const outcome = batch.outcomes[i]
      if (outcome === 0) zeros++
      if (asked[i] !== Pending) {
        assert.equal(outcome, asked[i], 'an entry that does not wait is left alone')
        if (asked[i] === PutOutcome.Stored && what === 'putMany') this.#forget(place)
      } else if (what === 'putMany') {
        this.#stored(place, lies.get(batch.offsets[i])!, outcome, undefined)
      } else {
        this.#judge(place, outcome)
        if (outcome === GetOutcome.Hit) {
          this.#compare(place, batch.bytes.subarray(batch.offsets[i], batch.offsets[i] + count * basePageSize))
          this.#taken(place)
        }
      }
    }
    assert.equal(answer, zeros)
    if (losses !== this.#losses) this.#uncertain()
    if (what === 'putMany') return
    for (const [i, place] of places.entries()) {
      const at = batch.offsets[i]
      const untouched = batch.bytes.subarray(at, at + place.count * basePageSize).every((byte) => byte === 0xaa)
      assert.ok(untouched || batch.outcomes[i] === GetOutcome.Hit, 'a miss changed the caller’s bytes')
    }
  }

  /** Another part of the same page. */
  #shifted(place: Place, by: number): Place {
    const { pool } = place
    const head = place.first - (place.first % pool.partsPerPage)
    const index = head + ((place.first + by) % pool.partsPerPage)
    return { ...place, index, first: index }
  }

  /** Many pages in one batch, one after the other: what fills a store. */
  #fill(at: Where, pages: number): void {
    const common = this.#find({ ...at, page: 0, part: undefined })
    if (common === undefined) return
    const { pool, count } = common
    const length = Math.max(1, Math.min(pages, Math.floor(400 / count)))
    const batch = new PageBatch(length, pool.pageSize)
    const values: number[] = []
    for (let i = 0; i < length; i++) {
      const value = this.#newValue(count)
      values.push(value)
      batch.push(common.object, i + 20)
      batch.bytes.set(pageOf(value, count), batch.offsets[i])
    }
    const losses = this.#losses
    pool.real.putMany(batch)
    this.#noteLosses()
    for (let i = 0; i < length; i++) {
      const first = (i + 20) * count
      this.#stored({ ...common, index: i + 20, first }, values[i], batch.outcomes[i], undefined)
    }
    if (losses !== this.#losses) this.#uncertain()
  }

  /** Leaves one of `step` pages of those that `fill` puts: what makes free runs short and chunks half empty. */
  #thin(at: Where, step: number): void {
    const common = this.#find({ ...at, page: 0, part: undefined })
    if (common === undefined) return
    const batch = new PageBatch(400, common.pool.pageSize, new Uint8Array(common.pool.pageSize))
    for (let i = 0; i < 400; i++) {
      if (i % step === 0) continue
      batch.push(common.object, i + 20, 0)
      this.#forget({ ...common, index: i + 20, first: (i + 20) * common.count })
    }
    common.pool.real.flushMany(batch)
  }

  #reserveFrame(number: number): void {
    const pool = this.#pools[number]
    if (pool?.frames === undefined || this.#lent.length === 6) return
    const frame = pool.frames.reserveFrame()
    if (frame < 0) {
      const refusal = -frame
      assert.ok(refusal === PutOutcome.NoMemory || (refusal === PutOutcome.AllocationFailed && this.#memoryFails))
      return
    }
    this.#see('frame reserved')
    const bytes = this.#frameBytes(pool, frame)
    assert.ok(
      bytes.every((byte) => byte === 0),
      'a reserved frame shows old bytes',
    )
    const value = this.#newValue(pool.partsPerPage)
    bytes.set(pageOf(value, pool.partsPerPage))
    this.#lent.push({ frame, pool, value })
  }

  #frameBytes(pool: PoolReference, frame: number): Uint8Array {
    const at = pool.frames!.frameOffset(frame)
    return pool.frames!.frameBytes(frame).subarray(at, at + pool.pageSize)
  }

  #putFrame(at: Where, number: number): void {
    const place = this.#find({ ...at, part: undefined })
    const lent = this.#lent[number]
    if (place?.pool.frames === undefined || lent === undefined) return
    if (lent.pool.pageSize !== place.pool.pageSize) {
      assert.throws(() => place.pool.frames!.putFrame(place.object, place.index, lent.frame), RangeError)
      return
    }
    const outcome = place.pool.frames.putFrame(place.object, place.index, lent.frame)
    this.#stored(place, lent.value, outcome, undefined)
    if (outcome === PutOutcome.Stored) {
      this.#see('frame put')
      this.#lent.splice(number, 1)
    }
  }

  #takeFrame(at: Where): void {
    const place = this.#find({ ...at, part: undefined })
    if (place?.pool.frames === undefined || this.#lent.length === 6) return
    const known = this.#complete(place)
    const frame = place.pool.frames.takeFrame(place.object, place.index)
    if (frame < 0) {
      // A page that lies in parts cannot be taken as one frame.
      if (place.count === 1) {
        assert.notEqual(known, 'certainly')
        this.#objectOf(place).delete(place.first)
      }
      return
    }
    this.#see('frame taken')
    assert.ok(known, 'took what was never stored, or is gone')
    const value = this.#objectOf(place).get(place.first)!.value
    this.#compare(place, this.#frameBytes(place.pool, frame))
    const sequential = Array.from({ length: place.count }, (_, part) => this.#objectOf(place).get(place.first + part)!)
    this.#forget(place)
    // Its bytes may come from several puts; the caller writes it anew.
    const fresh = sequential.every((part, i) => part.value === value + i) ? value : this.#newValue(place.count)
    if (fresh !== value) this.#frameBytes(place.pool, frame).set(pageOf(fresh, place.count))
    this.#lent.push({ frame, pool: place.pool, value: fresh })
  }

  #freeFrame(number: number): void {
    const lent = this.#lent[number]
    if (lent === undefined) return
    lent.pool.frames!.freeFrame(lent.frame)
    assert.throws(() => lent.pool.frames!.freeFrame(lent.frame), RangeError)
    this.#lent.splice(number, 1)
  }

  #misuseFrame(number: number): void {
    const pool = this.#pools.find((some) => some.frames !== undefined)
    if (pool === undefined || this.#lent.some(({ frame }) => frame === number)) return
    for (const frame of [number, -1, 1e9, 0.5, Number.NaN]) {
      assert.throws(() => pool.frames!.freeFrame(frame), RangeError)
      assert.throws(() => pool.frames!.putFrame(0, 0, frame), RangeError)
    }
  }

  #tick(pages: number): void {
    const progress = this.store.tick({ pages })
    assert.ok(progress.pages <= pages, `a tick of ${pages} pages touched ${progress.pages}`)
  }

  /** `certainly`, `perhaps`, or nothing: whether any of it is known. */
  #knows(place: Place): Knowledge {
    const pages = place.pool.objects.get(BigInt(place.object))
    let knowledge: Knowledge
    for (let part = 0; part < place.count; part++) {
      const known = pages?.get(place.first + part)
      if (known?.certain === true) return 'certainly'
      if (known !== undefined) knowledge = 'perhaps'
    }
    return knowledge
  }

  /** `certainly`, `perhaps`, or nothing: whether all of it is there. */
  #complete(place: Place): Knowledge {
    const pages = place.pool.objects.get(BigInt(place.object))
    let knowledge: Knowledge = 'certainly'
    for (let part = 0; part < place.count; part++) {
      const known = pages?.get(place.first + part)
      if (known === undefined) return undefined
      if (!known.certain) knowledge = 'perhaps'
    }
    return knowledge
  }

  #objectOf(place: Place): Map<number, Part> {
    const key = BigInt(place.object)
    let pages = place.pool.objects.get(key)
    if (pages === undefined) {
      pages = new Map()
      place.pool.objects.set(key, pages)
    }
    return pages
  }

  #newValue(count: number): number {
    const value = this.#value
    this.#value += count
    return value
  }

  #see(what: string): void {
    this.seen.set(what, (this.seen.get(what) ?? 0) + 1)
  }

  #gauges(): Record<string, number> | undefined {
    return this.#options.single === undefined || this.#lending
      ? undefined
      : { ...this.store.stats().counters, capacity: this.#capacity() }
  }

  /** Frames that fit the largest limit beside few objects. */
  #capacity(): number {
    const { metadata_bytes } = this.store.stats().counters
    return Math.floor((this.limit.maximumBytes - metadata_bytes) / basePageSize)
  }

  /** Pages evicted so far. */
  #lost(): number {
    return this.store.stats().counters.evicted_pages
  }

  #noteLosses(): void {
    const losses = this.#lost()
    if (losses === this.#losses) return
    this.#losses = losses
    this.#see('evicted')
    this.#uncertain()
  }

  /** From now on every ephemeral page may have been evicted. */
  #uncertain(): void {
    for (const pool of this.#pools)
      if (!pool.persistent)
        for (const pages of pool.objects.values()) for (const part of pages.values()) part.certain = false
  }

  #check(): void {
    this.#options.check()
    const counters = this.store.stats().counters
    assert.ok(
      counters.bytes <= this.limit.maximumBytes,
      `${counters.bytes} bytes, the limit is ${this.limit.maximumBytes}`,
    )
    const charged = [0, 0, 0]
    let certain = 0
    let perhaps = 0
    let persistent = 0
    const certainObjects = { least: 0, most: 0 }
    for (const pool of this.#pools)
      for (const [object, pages] of pool.objects) {
        if (pages.size === 0) {
          pool.objects.delete(object)
          continue
        }
        let sure = false
        for (const part of pages.values()) {
          if (part.certain) certain++
          else perhaps++
          sure ||= part.certain
        }
        certainObjects.most++
        if (sure) certainObjects.least++
        if (pool.persistent) {
          charged[pool.client] += pages.size * basePageSize
          persistent += pages.size
        }
      }
    for (const [client, bytes] of charged.entries()) assert.equal(this.accounts.charged(client), bytes)
    for (const lent of this.#lent)
      assert.ok(
        pageOf(lent.value, lent.pool.partsPerPage).equals(this.#frameBytes(lent.pool, lent.frame)),
        `somebody wrote to frame ${lent.frame}, which is the caller’s`,
      )
    for (const gone of this.#gone) {
      const page = Buffer.alloc(gone.attributes.pageSize)
      assert.equal(gone.put(0, 0, page), PutOutcome.PoolGone)
      assert.equal(gone.get(0, 0, page), GetOutcome.Miss)
    }
    this.#gone.length = Math.min(this.#gone.length, 6)
    if (this.#options.single === undefined) return
    const lent = this.#lent.reduce((sum, { pool }) => sum + pool.partsPerPage, 0)
    assert.equal(counters.pers_frames, persistent)
    between(counters.frames - lent, certain, certain + perhaps, 'frames')
    between(counters.objects, certainObjects.least, certainObjects.most, 'objects')
    assert.equal(counters.eph_frames, counters.frames - lent - persistent)
  }

  /** Reads back everything that must be there, and ends. */
  async finish(): Promise<void> {
    const counters = this.store.stats().counters
    this.seen.set('moved', counters.moved_pages)
    this.#memoryFails = false
    for (const pool of this.#pools)
      for (const [object, pages] of pool.objects)
        for (const first of pages.keys()) {
          if (pool.parts === undefined && first % pool.partsPerPage !== 0) continue
          const count = pool.parts === undefined ? pool.partsPerPage : 1
          const view = pool.parts ?? pool.real
          const into = Buffer.alloc(count * basePageSize, 0xaa)
          const place = { pool, view, object, index: first / count, first, count }
          if (this.#complete(place) === undefined) continue
          this.#got(place, view.get(object, place.index, into), into)
        }
    this.#check()
    await this.store.close()
    this.#options.check()
    for (let client = 0; client < 3; client++) assert.equal(this.accounts.charged(client), 0)
  }
}

type Knowledge = 'certainly' | 'perhaps' | undefined

interface Place {
  readonly pool: PoolReference
  readonly view: Pool
  readonly object: ObjectId
  readonly index: number
  readonly first: number
  readonly count: number
}

const between = (value: number, least: number, most: number, what: string): void =>
  assert.ok(value >= least && value <= most, `${value} ${what}, expected ${least} to ${most}`)

/** A page of which part i repeats the number `value + i`: no two puts of a test have the same bytes. */
export function pageOf(value: number, parts: number): Buffer {
  const words = new Uint32Array((parts * basePageSize) / 4)
  for (let part = 0; part < parts; part++)
    words.fill(value + part, (part * basePageSize) / 4, ((part + 1) * basePageSize) / 4)
  return Buffer.from(words.buffer)
}
