/**
 * Spill: the end of a stack of ephemeral pages. Pages go, compressed, to a ring in a file; the oldest are overwritten. The file
 * survives a restart: pools that are made again in the same order, for the same client and of the same kind, find their pages.
 *
 * Invariants:
 *  - A handle is in the table exactly while its record is in the file: a put, a flush, a get that takes the page away empties the
 *    old record before anything else, so that nothing that went can come back after a crash.
 *  - A page is served only when its bytes, together with its handle, have the digest of its record. Anything else costs the page.
 *  - Entries are in queue 0 in the order of their places in the ring, the next to be overwritten first.
 *
 * **What the client owes.** After a restart the pages are those of before. So object ids must name *contents* for good
 * (a version of a file, a hash), not places in the memory of the process that died. Those of @tmem/page-cache and @tmem/fscache do.
 *
 * DEVIATION: the pages of a pool that is destroyed cannot be reached any more in this run, but stay in the file, until a pool of the
 * same kind is made in this run or their place is needed: closing a stack destroys its pools, and what is to survive would be gone.
 * What must not come back is flushed.
 * DEVIATION: a digest and a record make objects for each page; this is the way to a disk, not the hot path.
 */
import { createHash } from 'node:crypto'
import { type Codec, type CodecName, createCodec } from '@tmem/codecs'
import {
  assertBatch,
  assertEntries,
  assertIndex,
  assertObject,
  assertPage,
  type Borrower,
  type Budget,
  basePageSize,
  type Capabilities,
  checkedAttributes,
  GetOutcome,
  HandleTable,
  idle,
  type Layer,
  type LayerContext,
  type LayerFactory,
  maxPageSize,
  none,
  type ObjectId,
  type OptionValue,
  type PageBatch,
  type PageStore,
  Pending,
  type Pool,
  type PoolAttributes,
  PoolRefusal,
  type Progress,
  PutOutcome,
  type StatsNode,
  TmemError,
} from '@tmem/core'
import {
  bootName,
  geometryOf,
  nodeSpillIo,
  SpillFile,
  type SpillIo,
  type SpillRecord,
  unitBytes,
} from './spill-file.ts'

/** Settings of a spill. */
export interface SpillOptions {
  /** Path; the file is made if it is not there. Nobody else may write to it. */
  readonly file: string
  /** Bytes of the file: 64 KiB to 256 GiB. A file of another size is begun anew. */
  readonly sizeBytes: number
  /** Codec for new pages (default `lz4`). */
  readonly codec?: CodecName
  /** The file system (default: this machine's). */
  readonly io?: SpillIo
  /** Names this boot of the machine (default: what Linux says); empty: only a file that was closed counts. */
  readonly boot?: string
}

const minSizeBytes = 64 * 1024
const maxSizeBytes = 2 ** 38
const maxPools = 256
const ordinals = 1024
/** Bytes before the page of which the digest is made: pool, index, object. */
const handleBytes = 32
const digestBytes = 16

/** The end of a stack of ephemeral pages. */
export function spill(options: SpillOptions): Layer {
  const { sizeBytes, codec = 'lz4' } = options
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < minSizeBytes || sizeBytes > maxSizeBytes)
    throw new RangeError(`a spill file has ${minSizeBytes} to ${maxSizeBytes} bytes, got ${sizeBytes}`)
  const { units } = geometryOf(sizeBytes)
  let largest = basePageSize
  while (largest * 2 <= Math.min(maxPageSize, (units * unitBytes) / 4)) largest *= 2
  const capabilities: Capabilities = Object.freeze({
    ephemeral: true,
    persistent: false,
    shared: true,
    minPageSize: basePageSize,
    maxPageSize: largest,
    deferred: true,
    split: false,
    reservedBytes: 0,
  })
  return Object.freeze({
    name: 'spill',
    plan: (below: Capabilities | undefined) =>
      below === undefined ? capabilities : 'it is the end of a stack: what it drops is gone',
    open: (_next: PageStore | undefined, context: LayerContext): PageStore =>
      new SpillStore(options, codec, capabilities, context),
  })
}

/** `spill(file=/var/cache/pages,size=1GiB)` in the text of a stack. */
export const spillFactory: LayerFactory = Object.freeze({
  name: 'spill',
  summary: 'the end of a stack of ephemeral pages: a file that survives a restart',
  options: Object.freeze({
    file: { kind: 'text', summary: 'path of the file', required: true },
    size: { kind: 'bytes', summary: 'bytes of the file', required: true, minimum: minSizeBytes, maximum: maxSizeBytes },
    codec: { kind: 'text', summary: 'codec for new pages (default lz4)', choices: ['lz4', 'lz4js', 'deflate', 'zstd'] },
  } as const),
  create: ({ file, size, codec }: Readonly<Record<string, OptionValue>>): Layer =>
    spill({
      file: String(file),
      sizeBytes: Number(size),
      ...(codec === undefined ? {} : { codec: codec as CodecName }),
    }),
})

interface Counters {
  stored: number
  replaced: number
  got: number
  flushed: number
  evicted: number
  destroyed: number
  recovered: number
  corrupt_dropped: number
  read_errors: number
  write_errors: number
  written_bytes: number
  read_bytes: number
}

class SpillStore implements PageStore {
  readonly name = 'spill'
  readonly capabilities: Capabilities
  readonly table: HandleTable
  readonly counters: Counters = {
    stored: 0,
    replaced: 0,
    got: 0,
    flushed: 0,
    evicted: 0,
    destroyed: 0,
    recovered: 0,
    corrupt_dropped: 0,
    read_errors: 0,
    write_errors: 0,
    written_bytes: 0,
    read_bytes: 0,
  }
  readonly #file: SpillFile
  readonly #codec: Codec
  readonly #codecs: (Codec | undefined)[] = []
  readonly #units: number
  /** By entry: place in the ring in units, bytes, codec, digest; and how often the entry was used. */
  readonly #unit: Uint32Array
  readonly #length: Uint32Array
  readonly #stamp: Uint32Array
  readonly #codecId: Uint8Array
  readonly #digest: Uint8Array
  /** The handle and the page of a put, and its compressed form; the same of a fetch. */
  readonly #page: Uint8Array
  readonly #packed: Uint8Array
  readonly #readPage: Uint8Array
  readonly #readPacked: Uint8Array
  /** By pool number: its kind and ordinal; undefined when no page and no pool has it. */
  readonly #keys: (number | undefined)[] = []
  readonly #pools: (SpillPool | undefined)[] = []
  /** Pool numbers whose pool was destroyed in this run. */
  readonly #destroyed = new Set<number>()
  /** Next place in the ring. */
  #head = 0
  /** Fetches wait for each other: there is one buffer. */
  #reading: Promise<unknown> = Promise.resolve()
  /** A record could not be emptied: the file must never be believed again. */
  #abandoned = false
  #closing: Promise<void> | undefined

  constructor(options: SpillOptions, codec: CodecName, capabilities: Capabilities, { allocator }: LayerContext) {
    const { file, sizeBytes, io = nodeSpillIo, boot = bootName() } = options
    this.capabilities = capabilities
    const { capacity, units } = geometryOf(sizeBytes)
    this.#units = units
    const reserve = (bytes: number, part: string): ArrayBufferLike => {
      const memory = allocator.allocate(bytes, `spill.${part}`)
      if (memory === undefined)
        throw new TmemError(
          'TMEM_NO_MEMORY',
          `no memory for the ${part} of a spill (${bytes} bytes): give a smaller size`,
          {
            layer: 'spill',
          },
        )
      return memory
    }
    this.#codec = createCodec(codec)
    this.table = HandleTable.create({ capacity, queues: 1, pools: maxPools, allocator, site: 'spill' })
    const entries = reserve(capacity * (13 + digestBytes), 'entries')
    this.#unit = new Uint32Array(entries, 0, capacity)
    this.#length = new Uint32Array(entries, capacity * 4, capacity)
    this.#stamp = new Uint32Array(entries, capacity * 8, capacity)
    this.#codecId = new Uint8Array(entries, capacity * 12, capacity)
    this.#digest = new Uint8Array(entries, capacity * 13, capacity * digestBytes)
    const { maxPageSize: largest } = capabilities
    const scratch = reserve((handleBytes + largest * 2) * 2, 'scratch')
    this.#page = new Uint8Array(scratch, 0, handleBytes + largest)
    this.#packed = new Uint8Array(scratch, handleBytes + largest, largest)
    this.#readPage = new Uint8Array(scratch, handleBytes + largest * 2, handleBytes + largest)
    this.#readPacked = new Uint8Array(scratch, (handleBytes + largest) * 2 + largest, largest)
    const records: (SpillRecord & { entry: number })[] = []
    this.#file = new SpillFile(file, sizeBytes, io, boot, (entry, record) => {
      records.push({ entry, ...record })
      return true
    })
    try {
      this.#adopt(records, capacity)
    } catch (error) {
      this.#file.close(false)
      throw error
    }
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const kept = checkedAttributes(attributes)
    if (this.#closing !== undefined) return PoolRefusal.Closed
    if (kept.persistent && kept.shared) return PoolRefusal.SharedPersistent
    if (kept.pageSize > this.capabilities.maxPageSize) return PoolRefusal.BadPageSize
    if (kept.persistent) return PoolRefusal.Unsupported
    for (let ordinal = 0; ordinal < ordinals; ordinal++) {
      const key = keyOf(kept, ordinal)
      let number = this.#keys.indexOf(key)
      if (number !== none && this.#pools[number] !== undefined) continue
      if (number === none) {
        number = this.#freeNumber()
        if (number === none) return PoolRefusal.NoSlot
        this.#keys[number] = key
      }
      // What was destroyed in this run is gone for this run; what another run left is found.
      if (this.#destroyed.delete(number)) this.#empty(number)
      const pool = new SpillPool(this, number, kept)
      this.#pools[number] = pool
      return pool
    }
    return PoolRefusal.NoSlot
  }

  tick(_budget: Budget): Progress {
    return idle
  }

  stats(): StatsNode {
    return {
      name: this.name,
      counters: {
        ...this.counters,
        live: this.table.size,
        ring_bytes: this.#units * unitBytes,
        abandoned: this.#abandoned ? 1 : 0,
      },
      children: [],
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    for (const pool of this.#pools) pool?.destroy()
    await this.#reading
    this.#file.close(!this.#abandoned)
  }

  put(number: number, object: ObjectId, index: number, page: Uint8Array, frozen: boolean): PutOutcome {
    const { table, counters } = this
    const old = table.find(number, object, index)
    if (old === none && frozen) return PutOutcome.Frozen
    if (old !== none) {
      this.#drop(old)
      counters.replaced++
    }
    if (this.#abandoned) return PutOutcome.Unavailable
    this.#page.set(page, handleBytes)
    const bytes = handleBytes + page.length
    let codec = this.#codec.id
    let packed = this.#packed
    let length = this.#codec.compress(this.#page, handleBytes, page.length, packed, 0, page.length - 1)
    if (length === 0) {
      codec = 0
      length = page.length
      packed = page
    }
    const digest = this.#digestOf(this.#page, bytes, number, object, index)
    const units = Math.ceil(length / unitBytes)
    this.#makeRoom(units)
    let entry = table.acquire()
    if (entry === none) {
      this.#evict(table.oldest(0))
      entry = table.acquire()
    }
    if (this.#abandoned || !table.insert(entry, number, object, index)) {
      table.release(entry)
      return this.#abandoned ? PutOutcome.Unavailable : PutOutcome.NoMemory
    }
    const unit = this.#head
    try {
      this.#file.writePage(packed, length, unit)
      const poolKey = this.#keys[number]!
      this.#file.writeRecord(entry, { poolKey, object: BigInt(object), index, unit, length, codec, digest })
    } catch (error) {
      if (!isSystemError(error)) throw error
      counters.write_errors++
      table.remove(entry)
      // The record may be there in part: it is emptied as any other.
      this.#clear(entry)
      table.release(entry)
      return PutOutcome.Unavailable
    }
    table.append(0, entry)
    this.#unit[entry] = unit
    this.#length[entry] = length
    this.#codecId[entry] = codec
    this.#stamp[entry]!++
    this.#digest.set(digest, entry * digestBytes)
    this.#head = unit + units
    counters.stored++
    counters.written_bytes += length
    return PutOutcome.Stored
  }

  /** Reads a page. Fetches take turns. */
  fetch(number: number, object: ObjectId, index: number, into: Uint8Array, pool: SpillPool): Promise<GetOutcome> {
    const mine = this.#reading.then(() => this.#read(number, object, index, into, pool))
    // The next one's turn comes in any case.
    this.#reading = mine.catch(() => undefined)
    return mine
  }

  flushEntry(entry: number): void {
    this.#drop(entry)
    this.counters.flushed++
  }

  destroyed(number: number): void {
    this.#pools[number] = undefined
    this.#destroyed.add(number)
  }

  async #read(number: number, object: ObjectId, index: number, into: Uint8Array, pool: SpillPool): Promise<GetOutcome> {
    const { table, counters } = this
    for (;;) {
      const entry = pool.gone ? none : table.find(number, object, index)
      if (entry === none) return GetOutcome.Miss
      const stamp = this.#stamp[entry]!
      const length = this.#length[entry]!
      const codec = this.#codecId[entry]!
      let failed = false
      try {
        await this.#file.readPage(this.#readPacked, length, this.#unit[entry]!)
      } catch (error) {
        if (!isSystemError(error)) throw error
        failed = true
      }
      // Meanwhile the entry may have been given to another page, which is then looked for anew.
      if (pool.gone || table.find(number, object, index) !== entry || this.#stamp[entry] !== stamp) continue
      if (failed) {
        counters.read_errors++
        this.#drop(entry)
        return GetOutcome.Miss
      }
      counters.read_bytes += length
      if (!this.#unpack(length, codec, into.length) || !this.#isRight(entry, number, object, index, into.length)) {
        counters.corrupt_dropped++
        this.#drop(entry)
        return GetOutcome.Miss
      }
      into.set(this.#readPage.subarray(handleBytes, handleBytes + into.length))
      if (!pool.attributes.shared) {
        this.#drop(entry)
        counters.got++
      }
      return GetOutcome.Hit
    }
  }

  /** Decodes what was read behind the place of its handle. False when it is no block. */
  #unpack(length: number, codec: number, pageSize: number): boolean {
    if (codec === 0) {
      if (length !== pageSize) return false
      this.#readPage.set(this.#readPacked.subarray(0, length), handleBytes)
      return true
    }
    const decoder = this.#decoder(codec)
    return decoder?.decompress(this.#readPacked, 0, length, this.#readPage, handleBytes, pageSize) === pageSize
  }

  /** The codec of an id: a file may have been written with another one. */
  #decoder(id: number): Codec | undefined {
    if (id === this.#codec.id) return this.#codec
    const names: readonly (CodecName | undefined)[] = [undefined, 'lz4js', 'lz4', 'deflate', 'zstd']
    const name = names[id]
    if (name === undefined) return undefined
    this.#codecs[id] ??= createCodec(name)
    return this.#codecs[id]
  }

  #isRight(entry: number, number: number, object: ObjectId, index: number, pageSize: number): boolean {
    const digest = this.#digestOf(this.#readPage, handleBytes + pageSize, number, object, index)
    for (let at = 0; at < digestBytes; at++) if (digest[at] !== this.#digest[entry * digestBytes + at]) return false
    return true
  }

  /** Digest of a handle and the page behind it in `bytes`. */
  #digestOf(bytes: Uint8Array, length: number, number: number, object: ObjectId, index: number): Uint8Array {
    const view = new DataView(bytes.buffer, bytes.byteOffset, handleBytes)
    view.setUint32(0, this.#keys[number]!, true)
    view.setUint32(4, index, true)
    const wide = BigInt(object)
    for (let word = 0; word < 3; word++)
      view.setBigUint64(8 + word * 8, BigInt.asUintN(64, wide >> BigInt(word * 64)), true)
    return createHash('sha256').update(bytes.subarray(0, length)).digest().subarray(0, digestBytes)
  }

  /** Makes room at the head of the ring, overwriting the oldest pages. */
  #makeRoom(units: number): void {
    const { table } = this
    if (this.#head + units > this.#units) {
      // What is left at the end is too short: the oldest pages lie there.
      for (let oldest = table.oldest(0); oldest !== none && this.#unit[oldest]! >= this.#head; oldest = table.oldest(0))
        this.#evict(oldest)
      this.#head = 0
    }
    const end = this.#head + units
    for (let oldest = table.oldest(0); oldest !== none; oldest = table.oldest(0)) {
      const unit = this.#unit[oldest]!
      if (unit < this.#head || unit >= end) return
      this.#evict(oldest)
    }
  }

  #evict(entry: number): void {
    this.#drop(entry)
    this.counters.evicted++
  }

  #empty(number: number): void {
    const { table } = this
    for (let entry = table.firstOfPool(number); entry !== none; entry = table.firstOfPool(number)) {
      this.#drop(entry)
      this.counters.destroyed++
    }
  }

  /** Takes a page out of the table and out of the file. */
  #drop(entry: number): void {
    const { table } = this
    table.unlink(0, entry)
    table.remove(entry)
    this.#stamp[entry]!++
    this.#clear(entry)
    table.release(entry)
  }

  #clear(entry: number): void {
    if (this.#abandoned) return
    try {
      this.#file.clearRecord(entry)
    } catch (error) {
      if (!isSystemError(error)) throw error
      this.counters.write_errors++
      this.#abandoned = true
      // What must not come back is still in the file: then nothing of it may.
      if (!this.#file.abandon())
        throw new TmemError(
          'TMEM_BROKEN',
          'a page cannot be removed from the spill file, nor can the file: remove it',
          {
            layer: 'spill',
            cause: error,
          },
        )
    }
  }

  /** Enters what was found in the file, in the order of the ring. */
  #adopt(records: (SpillRecord & { entry: number })[], capacity: number): void {
    const { table } = this
    const taken = new Map(records.map((record) => [record.entry, record]))
    // The numbers of a table are given out from 0: those that the file does not use are given back.
    const free: number[] = []
    let last = none
    for (const { entry } of records) if (entry > last) last = entry
    for (let entry = 0; entry <= last && entry < capacity; entry++) {
      const acquired = table.acquire()
      if (!taken.has(acquired)) free.push(acquired)
    }
    let end = 0
    for (const record of records.sort((a, b) => a.unit - b.unit)) {
      const { entry, unit, length, codec, poolKey, object, index, digest } = record
      const number = this.#numberOf(poolKey)
      // Two records for one handle, or for one place: neither can be told to be the right one, so the second goes.
      const good =
        number !== none &&
        unit >= end &&
        object < (1n << 192n) - 1n &&
        table.find(number, object, index) === none &&
        table.insert(entry, number, object, index)
      if (!good) {
        this.counters.corrupt_dropped++
        this.#clear(entry)
        free.push(entry)
        continue
      }
      table.append(0, entry)
      end = unit + Math.ceil(length / unitBytes)
      this.#unit[entry] = unit
      this.#length[entry] = length
      this.#codecId[entry] = codec
      this.#digest.set(digest, entry * digestBytes)
      this.counters.recovered++
    }
    for (const entry of free) table.release(entry)
    // Which page is the oldest is not written down: the ring goes on behind the last one.
    this.#head = end
  }

  /** The pool number of a kind of pool, an old or a new one; `none` when all are in use or the kind makes no sense. */
  #numberOf(key: number): number {
    const known = this.#keys.indexOf(key)
    if (known !== none) return known
    const pageSize = basePageSize * 2 ** ((key >>> 17) & 0xf)
    if (pageSize > this.capabilities.maxPageSize) return none
    const number = this.#freeNumber()
    if (number !== none) this.#keys[number] = key
    return number
  }

  #freeNumber(): number {
    for (let number = 0; number < maxPools; number++) {
      if (this.#keys[number] === undefined) return number
      // No pool, no page: the kind can be forgotten.
      if (this.#pools[number] !== undefined || this.table.firstOfPool(number) !== none) continue
      this.#destroyed.delete(number)
      this.#keys[number] = undefined
      return number
    }
    return none
  }
}

/** Client (16 bits), shared (1), log2 of the page size over 4 KiB (4), number of the pool among those of its kind (10). */
const keyOf = ({ client, shared, pageSize }: PoolAttributes, ordinal: number): number =>
  (client | ((shared ? 1 : 0) << 16) | (Math.log2(pageSize / basePageSize) << 17) | (ordinal << 21)) >>> 0

/** Errors of files, not those of programs. */
const isSystemError = (error: unknown): boolean =>
  error instanceof Error && !(error instanceof TypeError || error instanceof RangeError || error instanceof TmemError)

class SpillPool implements Pool {
  readonly attributes: PoolAttributes
  gone = false
  readonly #store: SpillStore
  readonly #number: number
  #frozen = false

  constructor(store: SpillStore, number: number, attributes: PoolAttributes) {
    this.#store = store
    this.#number = number
    this.attributes = attributes
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    assertPage(page, this.attributes.pageSize)
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    return this.gone ? PutOutcome.PoolGone : this.#store.put(this.#number, object, index, page, this.#frozen)
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    assertPage(into, this.attributes.pageSize)
    return this.#find(object, index) === none ? GetOutcome.Miss : GetOutcome.Deferred
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    assertPage(into, this.attributes.pageSize)
    if (this.#find(object, index) === none) return GetOutcome.Miss
    return this.#store.fetch(this.#number, object, index, into, this)
  }

  flushPage(object: ObjectId, index: number): void {
    const entry = this.#find(object, index)
    if (entry !== none) this.#store.flushEntry(entry)
  }

  flushObject(object: ObjectId): void {
    assertObject(object)
    if (this.gone) return
    const { table } = this.#store
    const number = this.#number
    for (let entry = table.firstOfObject(number, object); entry !== none; entry = table.firstOfObject(number, object))
      this.#store.flushEntry(entry)
  }

  putMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    let stored = 0
    for (let entry = 0; entry < batch.length; entry++) {
      const outcome = batch.outcomes[entry]
      if (outcome === Pending)
        batch.outcomes[entry] = this.put(batch.objects[entry]!, batch.indexes[entry]!, batch.page(entry))
      else if (outcome === PutOutcome.Stored) this.flushPage(batch.objects[entry]!, batch.indexes[entry]!)
      if (batch.outcomes[entry] === PutOutcome.Stored) stored++
    }
    return stored
  }

  getMany(batch: PageBatch): number {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    let hits = 0
    for (let entry = 0; entry < batch.length; entry++) {
      if (batch.outcomes[entry] === Pending) {
        const there = this.#find(batch.objects[entry]!, batch.indexes[entry]!) !== none
        batch.outcomes[entry] = there ? GetOutcome.Deferred : GetOutcome.Miss
      }
      if (batch.outcomes[entry] === GetOutcome.Hit) hits++
    }
    return hits
  }

  flushMany(batch: PageBatch): void {
    assertBatch(batch, this.attributes.pageSize)
    assertEntries(batch)
    for (let entry = 0; entry < batch.length; entry++) this.flushPage(batch.objects[entry]!, batch.indexes[entry]!)
  }

  lend(object: ObjectId, index: number, _use: Borrower): GetOutcome {
    return this.#find(object, index) === none ? GetOutcome.Miss : GetOutcome.Deferred
  }

  split(): Pool | PoolRefusal {
    return PoolRefusal.Unsupported
  }

  freeze(): void {
    this.#frozen = true
  }

  thaw(): void {
    this.#frozen = false
  }

  destroy(): void {
    if (this.gone) return
    this.gone = true
    this.#store.destroyed(this.#number)
  }

  #find(object: ObjectId, index: number): number {
    assertObject(object)
    assertIndex(index, this.attributes.pageSize)
    return this.gone ? none : this.#store.table.find(this.#number, object, index)
  }
}
