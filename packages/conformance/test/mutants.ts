/**
 * Stores that are wrong in one respect each: the reference store with one rule broken. The suite must fail for each of
 * them, exactly in the rules that are named here.
 */
import type {
  Borrower,
  Budget,
  Capabilities,
  LayerContext,
  ObjectId,
  PageStore,
  Pool,
  PoolAttributes,
  Progress,
  StatsNode,
} from '@tmem/core'
import {
  assertBatch,
  assertIndex,
  assertObject,
  assertPage,
  basePageSize,
  GetOutcome,
  PageBatch,
  Pending,
  type PoolRefusal,
  PutOutcome,
} from '@tmem/core'
import type { Manifest } from '../src/index.ts'
import type { Part, ReferenceContents } from '../src/reference.ts'
import { pageAt, ReferencePool, ReferenceStore, referenceCapabilities } from '../src/reference.ts'

/** A store with one rule broken. */
export interface Mutant {
  /** What is wrong with it. */
  readonly wrong: string
  /** The rules that fail, and no other. */
  readonly fails: readonly string[]
  /** True: the property test must show it, too. (It shows more than these; those are not asked for.) */
  readonly history: boolean
  readonly manifest?: Manifest
  readonly open: (context: LayerContext) => PageStore
}

/** How the reference store is brought to its refusals. */
export const referenceManifest: Manifest = {
  pageSizes: [8192],
  refusals: {
    NoMemory: { by: 'filling', bytes: 300_000 },
    Quota: { by: 'quota', bytes: 65_536 },
    AllocationFailed: { by: 'allocator', bytes: 65_536 },
  },
}
export const referenceLimit = 250_000

type PoolClass = new (store: ReferenceStore, contents: ReferenceContents, attributes: PoolAttributes) => ReferencePool

/** A reference store whose pools are of another class. */
const withPools =
  (MutantPool: PoolClass) =>
  (context: LayerContext): PageStore => {
    class MutantStore extends ReferenceStore {
      override poolOf(contents: ReferenceContents, attributes: PoolAttributes): Pool {
        return new MutantPool(this, contents, attributes)
      }
    }
    return new MutantStore(context, referenceLimit)
  }

/** A reference store of another class. */
const withStore =
  (MutantStore: new (context: LayerContext, limitBytes: number) => ReferenceStore) =>
  (context: LayerContext): PageStore =>
    new MutantStore(context, referenceLimit)

const isZero = (page: Uint8Array): boolean => page.every((byte) => byte === 0)
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

/** What each pool has in common with its view in parts, when a mutant has to remember something. */
const shared = <T>(make: () => T): ((contents: ReferenceContents) => T) => {
  const known = new WeakMap<ReferenceContents, T>()
  return (contents) => {
    let value = known.get(contents)
    if (value === undefined) {
      value = make()
      known.set(contents, value)
    }
    return value
  }
}

/** A reference store whose gets are all answered later. */
class DeferringStore extends ReferenceStore {
  override readonly capabilities: Capabilities = { ...Object.freeze({ ...referenceCapabilities, deferred: true }) }
}

const pageMutants: readonly Mutant[] = [
  {
    wrong: 'looks for objects by the low 16 bits of their id',
    fails: ['what was put is got back, byte for byte'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
          const low = typeof object === 'number' && object >= 0 && object < 2 ** 31 ? object % 65_536 : object
          return super.get(low, index, into)
        }
      },
    ),
  },
  {
    wrong: 'takes an all-zero page for no page',
    fails: ['an all-zero page is data'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          const outcome = super.put(object, index, page)
          if (outcome === PutOutcome.Stored && isZero(page)) this.flushPage(object, index)
          return outcome
        }
      },
    ),
  },
  {
    wrong: 'takes a page whose first half repeats one word for a page that repeats it throughout',
    fails: ['a page of one repeated word is kept exactly, and so is one that differs in its last byte'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          assertPage(page, this.attributes.pageSize)
          const half = page.subarray(0, page.length / 2)
          const same = half.every((byte, i) => byte === half[i % 4])
          return super.put(object, index, same ? page.map((_, i) => half[i % 4]!) : page)
        }
      },
    ),
  },
  {
    wrong: 'cuts the last byte off a page that does not compress',
    fails: ['a page that cannot be compressed is kept exactly or refused'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          assertPage(page, this.attributes.pageSize)
          const copy = page.slice()
          if (page[64] !== page[128] || page[65] !== page[129] || page[66] !== page[130]) copy[page.length - 1] = 0
          return super.put(object, index, copy)
        }
      },
    ),
  },
  {
    wrong: 'takes an index for a signed number',
    fails: ['object 0 and index 0 are ordinary, and so is the last index'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override read(keys: readonly string[]): Uint8Array | undefined {
          return keys.some((key) => Number(key.split('/')[1]) > 0x7fffffff) ? undefined : super.read(keys)
        }
      },
    ),
  },
  {
    wrong: 'keeps numbers and bigints apart',
    fails: ['a number and a bigint of the same value name the same object'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override keys(object: ObjectId, index: number): string[] {
          return super.keys(object, index).map((key) => `${typeof object}${key}`)
        }
        override flushObject(object: ObjectId): void {
          assertObject(object)
          const prefix = `${typeof object}${object}/`
          this.remove([...this.contents.parts.keys()].filter((key) => key.startsWith(prefix)))
        }
      },
    ),
  },
  {
    wrong: 'keeps 64 bits of an object id',
    fails: ['object ids of up to 192 bits are told apart'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override keys(object: ObjectId, index: number): string[] {
          assertObject(object)
          return super.keys(typeof object === 'bigint' ? BigInt.asUintN(64, object) : object, index)
        }
        override flushObject(object: ObjectId): void {
          assertObject(object)
          super.flushObject(typeof object === 'bigint' ? BigInt.asUintN(64, object) : object)
        }
      },
    ),
  },
  {
    wrong: 'leaves a got page in a private ephemeral pool',
    fails: [
      'a get removes the page from a private ephemeral pool',
      'to a frozen pool a page that was taken out is new again',
      'of several fetches of one page in a private ephemeral pool at most one has it',
      'a page of a pool and its parts are the same bytes',
    ],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override taken(): void {}
      },
    ),
  },
  {
    wrong: 'leaves a lent page in a private ephemeral pool',
    fails: [
      'a get removes the page from a private ephemeral pool',
      'to a frozen pool a page that was taken out is new again',
    ],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
          const page = this.read(this.keys(object, index))
          if (page === undefined) return GetOutcome.Miss
          use(page, 0, page.length)
          return GetOutcome.Hit
        }
      },
    ),
  },
  {
    wrong: 'removes a got page from a shared pool',
    fails: [
      'a get leaves the page in a shared or persistent pool',
      'what is done to a got page does not reach the store',
      'a page of a pool and its parts are the same bytes',
    ],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override taken(keys: readonly string[]): void {
          if (!this.attributes.persistent) this.remove(keys)
        }
      },
    ),
  },
  {
    wrong: 'removes a got page from a persistent pool',
    fails: [
      'a get leaves the page in a shared or persistent pool',
      'what is done to a got page does not reach the store',
      'a page of a pool and its parts are the same bytes',
    ],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override taken(keys: readonly string[]): void {
          if (!this.attributes.shared) this.remove(keys)
        }
      },
    ),
  },
  {
    wrong: 'keeps the old page when the new one repeats one word',
    fails: ['put-put-get gives the second page'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          const held = this.read(this.keys(object, index)) !== undefined
          const same = !isZero(page) && page.every((byte, i) => byte === page[i % 4])
          return held && same ? PutOutcome.Stored : super.replace(object, index, page)
        }
      },
    ),
  },
  {
    wrong: 'keeps the old page when it has no memory for the new one',
    fails: [
      'after a refused put the handle is empty, also of an older page',
      'a put is refused with AllocationFailed, and no page is left behind',
    ],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          const old = this.read(this.keys(object, index))
          const room = this.store.allocator.allocate(1, 'mutant') !== undefined
          return old !== undefined && !room ? PutOutcome.AllocationFailed : super.replace(object, index, page)
        }
      },
    ),
  },
  {
    wrong: 'brings a flushed page back with the next tick',
    fails: ['get-get: what was missed once stays missed'],
    history: true,
    open: (context) => {
      class Limbo extends ReferenceStore {
        readonly limbo: (() => void)[] = []
        override poolOf(contents: ReferenceContents, attributes: PoolAttributes): Pool {
          return new LimboPool(this, contents, attributes)
        }
        override tick(): Progress {
          for (const back of this.limbo.splice(0)) back()
          return super.tick()
        }
      }
      class LimboPool extends ReferencePool {
        override flushPage(object: ObjectId, index: number): void {
          const page = this.read(this.keys(object, index))
          super.flushPage(object, index)
          const back = (): void => {
            if (this.read(this.keys(object, index)) === undefined) super.put(object, index, page!)
          }
          if (page !== undefined) (this.store as Limbo).limbo.push(back)
        }
      }
      return new Limbo(context, referenceLimit)
    },
  },
  {
    wrong: 'loses the first page that is put after a flush',
    fails: ['flush-get misses, and a new put is there again'],
    history: true,
    open: (context) => {
      const flushed = shared(() => new Set<string>())
      return withPools(
        class extends ReferencePool {
          override flushPage(object: ObjectId, index: number): void {
            super.flushPage(object, index)
            flushed(this.contents).add(`${object}/${index}`)
          }
          override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
            const outcome = super.put(object, index, page)
            if (flushed(this.contents).delete(`${object}/${index}`)) super.flushPage(object, index)
            return outcome
          }
        },
      )(context)
    },
  },
  {
    wrong: 'does not flush single pages',
    fails: [
      'a number and a bigint of the same value name the same object',
      'object ids of up to 192 bits are told apart',
      'get-get: what was missed once stays missed',
      'flush-get misses, and a new put is there again',
      'flushing what is absent changes nothing',
      'a miss leaves the buffer as it was',
      'a frozen pool still replaces, gets and flushes',
      'flushMany flushes every entry, whatever its outcome says',
      'putMany drops its copy of what a layer above stored',
      'a flush during a fetch is for good',
      'pools do not see each other',
      'a flushed part is missing from its page, the other parts stay',
      'a flush of a page or an object removes its parts',
      'a persistent page is charged to its client until it goes',
    ],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override flushPage(object: ObjectId, index: number): void {
          this.keys(object, index)
        }
      },
    ),
  },
  {
    wrong: 'flushes the whole object when the page is absent',
    fails: ['flushing what is absent changes nothing'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override flushPage(object: ObjectId, index: number): void {
          if (this.read(this.keys(object, index)) === undefined) super.flushObject(object)
          else super.flushPage(object, index)
        }
      },
    ),
  },
  {
    wrong: 'flushes of an object only the low half of its indexes',
    fails: ['flushObject removes every page of its object, and no other'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override flushObject(object: ObjectId): void {
          assertObject(object)
          const pages = [...this.contents.parts.keys()].filter((key) => key.startsWith(`${object}/`))
          this.remove(pages.filter((key) => Number(key.split('/')[1]) < 0x80000000))
        }
      },
    ),
  },
  {
    wrong: 'flushes with an object those whose ids begin with the same digits',
    fails: ['flushObject removes every page of its object, and no other'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override flushObject(object: ObjectId): void {
          assertObject(object)
          this.remove([...this.contents.parts.keys()].filter((key) => key.startsWith(`${object}`)))
        }
      },
    ),
  },
  {
    wrong: 'keeps the caller’s page instead of a copy',
    fails: ['put leaves the source as it was, and does not look at it later'],
    history: false,
    open: (context) => {
      class Keeping extends ReferenceStore {
        override add(pool: ReferenceContents, key: string, source: Uint8Array): PutOutcome {
          const outcome = super.add(pool, key, source)
          const part = pool.parts.get(key)
          if (part !== undefined) (part as { bytes: Uint8Array }).bytes = source
          return outcome
        }
      }
      return new Keeping(context, referenceLimit)
    },
  },
  {
    wrong: 'clears the pages of a batch that it has put',
    fails: [
      'put leaves the source as it was, and does not look at it later',
      'a batch comes back as it was, but for its outcomes and the pages that were got',
    ],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override putMany(batch: PageBatch): number {
          const stored = super.putMany(batch)
          for (let i = 0; i < batch.length; i++) pageAt(batch, i).fill(0)
          return stored
        }
      },
    ),
  },
  {
    wrong: 'keeps the page that it filled as its own',
    fails: ['what is done to a got page does not reach the store'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
          const outcome = super.get(object, index, into)
          for (const [i, key] of this.keys(object, index).entries()) {
            const part = this.contents.parts.get(key) as { bytes: Uint8Array } | undefined
            if (part !== undefined && outcome === GetOutcome.Hit)
              part.bytes = into.subarray(i * basePageSize, (i + 1) * basePageSize)
          }
          return outcome
        }
      },
    ),
  },
  {
    wrong: 'clears the buffer on a miss',
    fails: ['a miss leaves the buffer as it was'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
          const outcome = super.get(object, index, into)
          if (outcome === GetOutcome.Miss) into.fill(0)
          return outcome
        }
      },
    ),
  },
  {
    wrong: 'begins to fill the buffer although it answers Deferred',
    fails: ['an answer of Deferred leaves the buffer as it was, and fetch then fills it'],
    history: true,
    open: (context) => {
      class Deferring extends DeferringStore {
        override readonly capabilities: Capabilities = Object.freeze({ ...referenceCapabilities, deferred: true })
        override poolOf(contents: ReferenceContents, attributes: PoolAttributes): Pool {
          return new DeferringPool(this, contents, attributes)
        }
      }
      class DeferringPool extends ReferencePool {
        override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
          assertPage(into, this.attributes.pageSize)
          const page = this.read(this.keys(object, index))
          if (page === undefined) return GetOutcome.Miss
          into.set(page.subarray(0, 100))
          return GetOutcome.Deferred
        }
        override getMany(batch: PageBatch): number {
          this.assertBatch(batch)
          let hits = 0
          for (let i = 0; i < batch.length; i++) {
            if (batch.outcomes[i] === Pending)
              batch.outcomes[i] =
                this.read(this.keys(batch.objects[i]!, batch.indexes[i]!)) === undefined
                  ? GetOutcome.Miss
                  : GetOutcome.Deferred
            if (batch.outcomes[i] === GetOutcome.Hit) hits++
          }
          return hits
        }
        override async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
          return super.get(object, index, into)
        }
      }
      return new Deferring(context, referenceLimit)
    },
  },
  {
    wrong: 'writes a byte too many where the page does not begin at a multiple of eight',
    fails: ['only the bytes of the page itself are read and written'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
          const outcome = super.get(object, index, into)
          if (into.byteOffset % 8 === 4) new Uint8Array(into.buffer, into.byteOffset + into.length)[0] = 0
          return outcome
        }
      },
    ),
  },
  {
    wrong: 'takes in a frozen pool new pages of an object that it knows',
    fails: ['a frozen pool takes no new page'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          const { contents } = this
          const known = [...contents.parts.keys()].some((key) => key.startsWith(`${object}/`))
          const { frozen } = contents
          if (known) contents.frozen = false
          const outcome = super.replace(object, index, page)
          contents.frozen = frozen
          return outcome
        }
      },
    ),
  },
  {
    wrong: 'does not flush in a frozen pool',
    fails: ['a frozen pool still replaces, gets and flushes'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override flushPage(object: ObjectId, index: number): void {
          if (!this.contents.frozen) super.flushPage(object, index)
          else this.keys(object, index)
        }
      },
    ),
  },
  {
    wrong: 'remembers in a frozen pool what was taken out of it',
    fails: ['to a frozen pool a page that was taken out is new again'],
    history: true,
    open: (context) => {
      const taken = shared(() => new Set<string>())
      return withPools(
        class extends ReferencePool {
          override taken(keys: readonly string[]): void {
            super.taken(keys)
            for (const key of keys) taken(this.contents).add(key)
          }
          override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
            const { contents } = this
            const { frozen } = contents
            if (this.keys(object, index).some((key) => taken(contents).has(key))) contents.frozen = false
            const outcome = super.replace(object, index, page)
            contents.frozen = frozen
            return outcome
          }
        },
      )(context)
    },
  },
  {
    wrong: 'stays frozen',
    fails: ['a thawed pool takes new pages again'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override thaw(): void {}
      },
    ),
  },
  {
    wrong: 'freezes all pools with one',
    fails: ['freezing one pool leaves the others alone'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          const { contents } = this
          const { frozen } = contents
          contents.frozen = [...this.store.pools].some((pool) => pool.frozen)
          const outcome = super.replace(object, index, page)
          contents.frozen = frozen
          return outcome
        }
      },
    ),
  },
  {
    wrong: 'pads and cuts pages of the wrong length',
    fails: ['a page of the wrong length or type throws before anything changed'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          const fitting = new Uint8Array(this.attributes.pageSize)
          fitting.set(page.subarray(0, fitting.length))
          return super.put(object, index, fitting)
        }
      },
    ),
  },
  {
    wrong: 'drops the old page before it looks at the length of the new one',
    fails: ['a page of the wrong length or type throws before anything changed'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          if (!this.contents.frozen) this.flushPage(object, index)
          return super.put(object, index, page)
        }
      },
    ),
  },
  {
    wrong: 'wraps an index that is too large',
    fails: ['an impossible index throws before anything changed'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override keys(object: ObjectId, index: number): string[] {
          const parts = this.attributes.pageSize / basePageSize
          return super.keys(object, (index >>> 0) % (2 ** 32 / parts))
        }
      },
    ),
  },
  {
    wrong: 'takes anything for an object id',
    fails: ['an impossible object id throws before anything changed'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override keys(object: ObjectId, index: number): string[] {
          assertIndex(index, this.attributes.pageSize)
          const parts = this.attributes.pageSize / basePageSize
          return Array.from({ length: parts }, (_, part) => `${object}/${index * parts + part}`)
        }
      },
    ),
  },
  {
    wrong: 'looks at the entries of a batch one by one',
    fails: ['a batch that cannot be right throws before anything changed'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override assertBatch(batch: PageBatch): void {
          assertBatch(batch, this.attributes.pageSize)
        }
      },
    ),
  },
  {
    wrong: 'counts the stored pages of a batch in two bits',
    fails: ['a batch has an outcome for each entry, and is counted'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override putMany(batch: PageBatch): number {
          return super.putMany(batch) & 3
        }
      },
    ),
  },
  {
    wrong: 'puts the entries of a batch that a layer above refused for its policy',
    fails: ['putMany leaves alone what a layer above refused'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override putMany(batch: PageBatch): number {
          this.assertBatch(batch)
          for (let i = 0; i < batch.length; i++)
            if (batch.outcomes[i] === PutOutcome.Policy) batch.outcomes[i] = Pending
          return super.putMany(batch)
        }
      },
    ),
  },
  {
    wrong: 'keeps its copy of what a layer above stored',
    fails: ['putMany drops its copy of what a layer above stored'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override putMany(batch: PageBatch): number {
          this.assertBatch(batch)
          let stored = 0
          for (let i = 0; i < batch.length; i++) {
            if (batch.outcomes[i] === Pending)
              batch.outcomes[i] = this.put(batch.objects[i]!, batch.indexes[i]!, pageAt(batch, i))
            if (batch.outcomes[i] === PutOutcome.Stored) stored++
          }
          return stored
        }
      },
    ),
  },
  {
    wrong: 'puts a batch from its end',
    fails: ['putMany works in order: of two pages for one handle the second stays'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override putMany(batch: PageBatch): number {
          this.assertBatch(batch)
          for (let i = batch.length - 1; i >= 0; i--)
            if (batch.outcomes[i] === Pending)
              batch.outcomes[i] = this.put(batch.objects[i]!, batch.indexes[i]!, pageAt(batch, i))
            else if (batch.outcomes[i] === PutOutcome.Stored) this.flushPage(batch.objects[i]!, batch.indexes[i]!)
          return batch.outcomes.subarray(0, batch.length).filter((outcome) => outcome === PutOutcome.Stored).length
        }
      },
    ),
  },
  {
    wrong: 'gets again what a layer above missed',
    fails: ['getMany answers what is pending, and nothing else'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override getMany(batch: PageBatch): number {
          this.assertBatch(batch)
          for (let i = 0; i < batch.length; i++) if (batch.outcomes[i] === GetOutcome.Miss) batch.outcomes[i] = Pending
          return super.getMany(batch)
        }
      },
    ),
  },
  {
    wrong: 'counts in a batch only the hits of its own',
    fails: ['getMany answers what is pending, and nothing else'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override getMany(batch: PageBatch): number {
          this.assertBatch(batch)
          let before = 0
          for (let i = 0; i < batch.length; i++) if (batch.outcomes[i] === GetOutcome.Hit) before++
          return super.getMany(batch) - before
        }
      },
    ),
  },
  {
    wrong: 'does not flush entries that were missed',
    fails: ['flushMany flushes every entry, whatever its outcome says'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override flushMany(batch: PageBatch): void {
          this.assertBatch(batch)
          for (let i = 0; i < batch.length; i++)
            if (batch.outcomes[i] !== GetOutcome.Miss) this.flushPage(batch.objects[i]!, batch.indexes[i]!)
        }
      },
    ),
  },
  {
    wrong: 'takes the pages of a batch in the order in which they lie',
    fails: ['the pages of a batch lie where its offsets say'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override putMany(batch: PageBatch): number {
          this.assertBatch(batch)
          const sorted = new PageBatch(batch.capacity, batch.pageSize, batch.bytes)
          const places = [...batch.offsets.subarray(0, batch.length)].sort((a, b) => a - b)
          for (let i = 0; i < batch.length; i++) sorted.push(batch.objects[i]!, batch.indexes[i]!, places[i]!)
          sorted.outcomes.set(batch.outcomes)
          const stored = super.putMany(sorted)
          batch.outcomes.set(sorted.outcomes)
          return stored
        }
      },
    ),
  },
  {
    wrong: 'takes an empty batch for a mistake',
    fails: ['an empty batch is nothing'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override assertBatch(batch: PageBatch): void {
          super.assertBatch(batch)
          if (batch.length === 0) throw new RangeError('the batch is empty')
        }
      },
    ),
  },
  {
    wrong: 'turns the object ids of a batch into bigints',
    fails: ['a batch comes back as it was, but for its outcomes and the pages that were got'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override getMany(batch: PageBatch): number {
          const hits = super.getMany(batch)
          for (let i = 0; i < batch.length; i++) batch.objects[i] = BigInt(batch.objects[i]!)
          return hits
        }
      },
    ),
  },
  {
    wrong: 'refuses all of a batch for one new page in a frozen pool',
    fails: ['in a frozen pool a batch replaces what is known and refuses the rest'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override putMany(batch: PageBatch): number {
          this.assertBatch(batch)
          if (!this.contents.frozen) return super.putMany(batch)
          let fresh = false
          for (let i = 0; i < batch.length; i++)
            fresh ||= this.read(this.keys(batch.objects[i]!, batch.indexes[i]!)) === undefined
          if (!fresh) return super.putMany(batch)
          this.flushMany(batch)
          batch.outcomes.fill(PutOutcome.Frozen, 0, batch.length)
          return 0
        }
      },
    ),
  },
  {
    wrong: 'lends a page twice',
    fails: ['lend calls its borrower once for a hit, and not at all otherwise'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
          return super.lend(object, index, (bytes, at, length) => {
            use(bytes, at, length)
            use(bytes, at, length)
          })
        }
      },
    ),
  },
  {
    wrong: 'lends zeros where there is no page',
    fails: ['lend calls its borrower once for a hit, and not at all otherwise'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
          const outcome = super.lend(object, index, use)
          if (outcome === GetOutcome.Miss) use(new Uint8Array(this.attributes.pageSize), 0, this.attributes.pageSize)
          return outcome
        }
      },
    ),
  },
  {
    wrong: 'swallows what a borrower throws',
    fails: ['what a borrower throws comes out, and the page stays in a shared or persistent pool'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
          return super.lend(object, index, (bytes, at, length) => {
            try {
              use(bytes, at, length)
            } catch (error) {
              if (error instanceof TypeError) throw error
            }
          })
        }
      },
    ),
  },
  {
    wrong: 'loses the page when its borrower throws',
    fails: ['what a borrower throws comes out, and the page stays in a shared or persistent pool'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
          return super.lend(object, index, (bytes, at, length) => {
            const keys = this.keys(object, index)
            const parts = keys.map((key) => this.contents.parts.get(key)!)
            this.remove(keys)
            use(bytes, at, length)
            for (const part of parts) this.store.add(this.contents, part.key, part.bytes)
          })
        }
      },
    ),
  },
  {
    wrong: 'has one buffer for all fetches',
    fails: ['several fetches at once are all answered right'],
    history: true,
    open: (context) => {
      const buffer = shared(() => new Uint8Array(65_536))
      return withPools(
        class extends ReferencePool {
          override async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
            assertPage(into, this.attributes.pageSize)
            const page = buffer(this.contents).subarray(0, into.length)
            const outcome = super.get(object, index, page)
            await turn()
            if (outcome === GetOutcome.Hit) into.set(page)
            return outcome
          }
        },
      )(context)
    },
  },
  {
    wrong: 'removes a fetched page after it waited',
    fails: ['of several fetches of one page in a private ephemeral pool at most one has it'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
          assertPage(into, this.attributes.pageSize)
          const keys = this.keys(object, index)
          const part = this.contents.parts.get(keys[0]!)
          const page = this.read(keys)
          await turn()
          if (page === undefined) return GetOutcome.Miss
          into.set(page)
          if (this.contents.parts.get(keys[0]!) === part) this.taken(keys)
          return GetOutcome.Hit
        }
      },
    ),
  },
  {
    wrong: 'takes a page out while it is fetched, and then brings it back',
    fails: ['a flush during a fetch is for good'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
          const outcome = super.get(object, index, into)
          await turn()
          const keeps = this.attributes.persistent || this.attributes.shared
          if (outcome === GetOutcome.Hit && keeps && this.read(this.keys(object, index)) === undefined)
            this.put(object, index, into)
          return outcome
        }
      },
    ),
  },
  {
    wrong: 'writes a fetched page back over a newer one',
    fails: ['a put during a fetch stays, and the fetch gives one of the two pages whole'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
          const outcome = super.get(object, index, into)
          await turn()
          if (outcome === GetOutcome.Hit && this.read(this.keys(object, index)) !== undefined)
            this.put(object, index, into)
          return outcome
        }
      },
    ),
  },
  {
    wrong: 'gives another reason in a destroyed pool',
    fails: ['a destroyed pool holds nothing and takes nothing'],
    history: true,
    open: (context) => {
      const gone = shared(() => ({ yes: false }))
      return withPools(
        class extends ReferencePool {
          override destroy(): void {
            gone(this.contents).yes = true
            super.destroy()
          }
          override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
            const outcome = super.put(object, index, page)
            return gone(this.contents).yes ? PutOutcome.NoMemory : outcome
          }
        },
      )(context)
    },
  },
  {
    wrong: 'lets a destroyed pool reach the pool that has its place now',
    fails: ['no page of a destroyed pool is in a pool made later', 'a destroyed pool holds nothing and takes nothing'],
    history: true,
    open: (context) => {
      class Reusing extends ReferenceStore {
        last: ReferencePool | undefined
        override poolOf(contents: ReferenceContents, attributes: PoolAttributes): Pool {
          this.last = new ReusedPool(this, contents, attributes)
          return this.last
        }
      }
      class ReusedPool extends ReferencePool {
        override flushPage(object: ObjectId, index: number): void {
          const { last } = this.store as Reusing
          if (this.contents.gone && last !== undefined && last !== this && !last.contents.gone)
            last.remove(last.keys(object, index))
          else super.flushPage(object, index)
        }
      }
      return new Reusing(context, referenceLimit)
    },
  },
  {
    wrong: 'cuts the numbers of pools to one bit',
    fails: ['pools do not see each other', 'no page of a destroyed pool is in a pool made later'],
    history: true,
    open: (context) => {
      class Cutting extends ReferenceStore {
        readonly live: ReferenceContents[] = []
        override poolOf(contents: ReferenceContents, attributes: PoolAttributes): Pool {
          if (!this.live.includes(contents)) {
            const free = this.live.findIndex((pool) => pool.gone)
            this.live.splice(free < 0 ? this.live.length : free, 1, contents)
          }
          return new CutPool(this, contents, attributes)
        }
      }
      class CutPool extends ReferencePool {
        override keys(object: ObjectId, index: number): string[] {
          const keys = super.keys(object, index)
          const { live } = this.store as Cutting
          const twin = live[live.indexOf(this.contents) & 1]
          const same =
            twin !== undefined && !twin.gone && twin.attributes.pageSize === this.contents.attributes.pageSize
          // What the other pool holds is found here, too.
          if (same && twin !== this.contents)
            for (const key of keys) {
              const part = twin.parts.get(key)
              if (part !== undefined && !this.contents.parts.has(key)) this.contents.parts.set(key, part)
            }
          return keys
        }
      }
      return new Cutting(context, referenceLimit)
    },
  },
  {
    wrong: 'leaves a page in a private ephemeral pool that was got in parts',
    fails: ['a page of a pool and its parts are the same bytes'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override taken(keys: readonly string[]): void {
          if (this.attributes.pageSize === this.contents.attributes.pageSize && !Object.hasOwn(this, 'part'))
            super.taken(keys)
        }
        override split(): Pool | PoolRefusal {
          return Object.assign(super.split() as ReferencePool, { part: true })
        }
      },
    ),
  },
  {
    wrong: 'does not flush single parts',
    fails: ['a flushed part is missing from its page, the other parts stay'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override split(): Pool | PoolRefusal {
          const parts = super.split() as ReferencePool
          parts.flushPage = () => undefined
          return parts
        }
      },
    ),
  },
  {
    wrong: 'finds only pages that were put whole',
    fails: ['parts put one by one make a page'],
    history: true,
    open: (context) => {
      const whole = shared(() => new Set<string>())
      return withPools(
        class extends ReferencePool {
          override split(): Pool | PoolRefusal {
            return Object.assign(super.split() as ReferencePool, { part: true })
          }
          override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
            const outcome = super.replace(object, index, page)
            if (outcome === PutOutcome.Stored && !Object.hasOwn(this, 'part'))
              whole(this.contents).add(`${object}/${index}`)
            return outcome
          }
          override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
            const found = Object.hasOwn(this, 'part') || whole(this.contents).has(`${object}/${index}`)
            if (found) return super.get(object, index, into)
            assertPage(into, this.attributes.pageSize)
            this.keys(object, index)
            return GetOutcome.Miss
          }
        },
      )(context)
    },
  },
  {
    wrong: 'keeps replaced parts beside their page',
    fails: ['a replaced part shows in its page, and a replaced page in its parts'],
    history: true,
    open: (context) => {
      const beside = shared(() => new Map<string, Uint8Array>())
      return withPools(
        class extends ReferencePool {
          override split(): Pool | PoolRefusal {
            const parts = super.split() as ReferencePool
            const overlay = beside(this.contents)
            const sound = ReferencePool.prototype
            parts.put = (object, index, page) => {
              if (!this.contents.parts.has(`${object}/${index}`)) return sound.put.call(parts, object, index, page)
              overlay.set(`${object}/${index}`, page.slice())
              return PutOutcome.Stored
            }
            parts.read = (keys) => {
              const held = sound.read.call(parts, keys)
              return held === undefined ? undefined : (overlay.get(keys[0]!) ?? held)
            }
            parts.remove = (keys) => {
              for (const key of keys) overlay.delete(key)
              sound.remove.call(parts, keys)
            }
            return parts
          }
        },
      )(context)
    },
  },
  {
    wrong: 'does not flush objects through the view in parts',
    fails: ['a flush of a page or an object removes its parts'],
    history: false,
    open: withPools(
      class extends ReferencePool {
        override split(): Pool | PoolRefusal {
          const parts = super.split() as ReferencePool
          parts.flushObject = () => undefined
          return parts
        }
      },
    ),
  },
  {
    wrong: 'answers a split with a number that means nothing',
    fails: ['a store that cannot split says so'],
    history: false,
    open: (context) => {
      class Unsplitting extends ReferenceStore {
        override readonly capabilities: Capabilities = Object.freeze({ ...referenceCapabilities, split: false })
        override poolOf(contents: ReferenceContents, attributes: PoolAttributes): Pool {
          return Object.assign(new ReferencePool(this, contents, attributes), { split: () => 99 as PoolRefusal })
        }
      }
      return new Unsplitting(context, referenceLimit)
    },
  },
  {
    wrong: 'does not give back what a flushed object was charged',
    fails: ['a persistent page is charged to its client until it goes'],
    history: true,
    open: withPools(
      class extends ReferencePool {
        override flushObject(object: ObjectId): void {
          const before = this.contents.parts.size
          super.flushObject(object)
          const { client, persistent } = this.attributes
          if (persistent) this.store.accounts.of(client).charge((before - this.contents.parts.size) * basePageSize)
        }
      },
    ),
  },
  {
    wrong: 'charges ephemeral pages, too',
    fails: ['ephemeral pages are charged to nobody'],
    history: false,
    open: (context) => {
      class Charging extends ReferenceStore {
        override add(pool: ReferenceContents, key: string, source: Uint8Array): PutOutcome {
          const { client, persistent } = pool.attributes
          if (!persistent && !this.accounts.of(client).charge(basePageSize)) return PutOutcome.Quota
          return super.add(pool, key, source)
        }
        override drop(part: Part): void {
          super.drop(part)
          const { client, persistent } = part.pool.attributes
          if (!persistent) this.accounts.of(client).release(basePageSize)
        }
      }
      return new Charging(context, referenceLimit)
    },
  },
  {
    wrong: 'keeps the third page when a fourth is put under a handle',
    fails: [],
    history: true,
    open: (context) => {
      const puts = shared(() => new Map<string, number>())
      return withPools(
        class extends ReferencePool {
          override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
            const key = `${object}/${index}`
            const held = this.read(this.keys(object, index)) !== undefined
            const count = held ? (puts(this.contents).get(key) ?? 0) + 1 : 1
            puts(this.contents).set(key, count)
            return count === 4 ? PutOutcome.Stored : super.replace(object, index, page)
          }
        },
      )(context)
    },
  },
]

/** Shared by all stores of the mutant that has mutable state in its module. */
const everywhere: ReferenceContents[] = []

const storeMutants: readonly Mutant[] = [
  {
    wrong: 'has capabilities that can be changed',
    fails: ['the capabilities are frozen and make sense'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        override readonly capabilities: Capabilities = { ...referenceCapabilities }
      },
    ),
  },
  {
    wrong: 'keeps the attributes that it is given',
    fails: ['a pool of every kind and size that the capabilities name can be had, with these attributes'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        override newPool(attributes: PoolAttributes): Pool | PoolRefusal {
          const pool = super.newPool(attributes)
          return typeof pool === 'number' ? pool : Object.assign(pool, { attributes })
        }
      },
    ),
  },
  {
    wrong: 'takes pools of pages that it says it cannot keep',
    fails: ['a pool that the store cannot keep is refused with the reason'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        override readonly capabilities: Capabilities = Object.freeze({ ...referenceCapabilities, maxPageSize: 65_536 })
      },
    ),
  },
  {
    wrong: 'takes any number for a client',
    fails: ['impossible pool attributes throw'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        override newPool(attributes: PoolAttributes): Pool | PoolRefusal {
          return super.newPool({ ...attributes, client: attributes.client & 0xffff })
        }
      },
    ),
  },
  {
    wrong: 'reserves less than it says',
    fails: ['every page finds a place up to the reserved bytes, each in an object of its own'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        override readonly capabilities: Capabilities = Object.freeze({
          ...referenceCapabilities,
          reservedBytes: referenceLimit + basePageSize,
        })
      },
    ),
  },
  {
    wrong: 'keeps its pools in its module',
    fails: ['two stores in one process share nothing'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        readonly first: PoolAttributes[] = []
        override newPool(attributes: PoolAttributes): Pool | PoolRefusal {
          const pool = super.newPool(attributes)
          if (typeof pool === 'number' || this.first.push(attributes) > 1) return pool
          const { contents } = pool as ReferencePool
          const twin = everywhere.find((other) => !other.gone && other.attributes.client === attributes.client)
          everywhere.push(contents)
          return twin === undefined ? pool : this.poolOf(twin, contents.attributes)
        }
      },
    ),
  },
  {
    wrong: 'goes on after it was closed',
    fails: ['a closed store takes nothing and holds nothing, and closing again does nothing'],
    history: true,
    open: withStore(
      class extends ReferenceStore {
        override async close(): Promise<void> {}
      },
    ),
  },
  {
    wrong: 'makes pools after it was closed',
    fails: ['a closed store takes nothing and holds nothing, and closing again does nothing'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        override async close(): Promise<void> {
          await super.close()
          this.closed = false
        }
      },
    ),
  },
  {
    wrong: 'hands out counters that go on counting',
    fails: ['the statistics are a tree of named integers, and a snapshot'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        override stats(): StatsNode {
          return { name: this.name, counters: this.counters, children: [] }
        }
      },
    ),
  },
  {
    wrong: 'has a mean among its counters',
    fails: ['the statistics are a tree of named integers, and a snapshot'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        override stats(): StatsNode {
          const { gets, puts } = this.counters
          return { name: this.name, counters: { ...this.counters, gets_per_put: gets / puts }, children: [] }
        }
      },
    ),
  },
  {
    wrong: 'does a little more than its budget',
    fails: ['tick keeps to its budget, comes to an end, and changes no page'],
    history: true,
    open: withStore(
      class extends ReferenceStore {
        override tick(budget?: Budget): Progress {
          return { pages: (budget?.pages ?? 0) + 1, pending: false }
        }
      },
    ),
  },
  {
    wrong: 'always has more to do',
    fails: ['tick keeps to its budget, comes to an end, and changes no page'],
    history: false,
    open: withStore(
      class extends ReferenceStore {
        override tick(): Progress {
          return { pages: 0, pending: true }
        }
      },
    ),
  },
]

/** A reference store that says `given` where it should say `right`. */
const confusing = (right: PutOutcome, given: PutOutcome): ((context: LayerContext) => PageStore) =>
  withPools(
    class extends ReferencePool {
      override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
        const outcome = super.put(object, index, page)
        return outcome === right ? given : outcome
      }
    },
  )

/** A reference store that refuses for `reason` what does not compress, when it has no memory for it. */
const neverMutant = (reason: PutOutcome): ((context: LayerContext) => PageStore) =>
  withPools(
    class extends ReferencePool {
      override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
        const outcome = super.put(object, index, page)
        const noise = outcome === PutOutcome.AllocationFailed && page[64] !== page[128]
        return noise ? reason : outcome
      }
    },
  )

/** The reference store refusing every fourth page for a reason that it does not have by itself. */
const fourth = (reason: PutOutcome): ((context: LayerContext) => PageStore) => {
  return (context) => {
    let puts = 0
    return withPools(
      class extends ReferencePool {
        override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
          if (++puts % 4 !== 0) return super.put(object, index, page)
          this.flushPage(object, index)
          return reason
        }
      },
    )(context)
  }
}

const refused = (reason: string): string => `a put is refused with ${reason}, and no page is left behind`
const never = (reason: string): string =>
  `a put is never refused with ${reason} (not applicable: the manifest names no way to it)`

/** A manifest by which the store under `opening` refuses for the reason. */
const driven = (reason: 'Incompressible' | 'Policy' | 'Unavailable', given: PutOutcome): Manifest => ({
  ...referenceManifest,
  refusals: { ...referenceManifest.refusals, [reason]: { by: 'opening', bytes: 65_536, open: fourth(given) } },
})

const refusalMutants: readonly Mutant[] = [
  {
    wrong: 'says Quota where it means NoMemory',
    fails: [refused('NoMemory')],
    history: false,
    open: confusing(PutOutcome.NoMemory, PutOutcome.Quota),
  },
  {
    wrong: 'says NoMemory where it means Quota',
    fails: [refused('Quota')],
    history: false,
    open: confusing(PutOutcome.Quota, PutOutcome.NoMemory),
  },
  {
    wrong: 'says NoMemory where it means Frozen',
    fails: [refused('Frozen')],
    history: false,
    open: confusing(PutOutcome.Frozen, PutOutcome.NoMemory),
  },
  {
    wrong: 'says NoMemory where it means AllocationFailed',
    fails: [refused('AllocationFailed')],
    history: false,
    open: confusing(PutOutcome.AllocationFailed, PutOutcome.NoMemory),
  },
  ...(['Incompressible', 'Policy', 'Unavailable'] as const).flatMap((reason): Mutant[] => [
    {
      wrong: `refuses for ${reason}, which it should not know`,
      fails: [never(reason)],
      history: false,
      open: neverMutant(PutOutcome[reason]),
    },
    {
      wrong: `says NoMemory where ${reason} is what its manifest promises`,
      fails: [refused(reason)],
      history: false,
      manifest: driven(reason, PutOutcome.NoMemory),
      open: (context) => new ReferenceStore(context, referenceLimit),
    },
  ]),
]

export const mutants: readonly Mutant[] = [...pageMutants, ...storeMutants, ...refusalMutants]
/** A store without a fault for each manifest of the mutants. */
export const soundManifests: readonly Manifest[] = [
  referenceManifest,
  ...(['Incompressible', 'Policy', 'Unavailable'] as const).map((reason) => driven(reason, PutOutcome[reason])),
]
