/**
 * Persistent pages of a guest in a file, so that they outlive the process that serves the guest: after a kill, the next
 * process begins with them.
 *
 * The file (of @tmem/page-file, through the operating system's cache: what is written survives the process, not the
 * machine) is a row of records: a checksum, the page's name, the page. A record whose checksum does not match holds no
 * page.
 *
 * Invariants: a put is answered after its record is written, and a flush after its record is emptied. A record that was
 * cut off in the middle belongs to a call that nobody answered, and that the guest's next host does again.
 *
 * Only pools are kept whose flags say private and persistent, and only names as our module gives them: object ids below
 * 2^17. A put of another name is refused.
 */
import { crc32 } from 'node:zlib'
import { type ByteAmount, bytesOf, checkOptions, type ObjectId } from '@tmem/core'
import { PageFile } from '@tmem/page-file'
import {
  ClientBit,
  clientInfoLayout,
  maxPools,
  PoolBit,
  pageBytes,
  poolInfoLayout,
  writeField,
} from '@tmem/xen-hypercall'

/** Where pages are kept. */
export interface SavedPagesOptions {
  /** Path of the file. Nothing may be there, or such a file. */
  readonly file: string
  /**
   * Bytes of pages for which there is room: 4 KiB to 256 GiB. A file that is there grows to it, and does not shrink.
   */
  readonly sizeBytes: ByteAmount
}

/** Bytes before the pages of the file, and before the page of a record: checksum, then its name as a number. */
const headBytes = 4096
const recordHead = 64
const recordBytes = recordHead + pageBytes
/** Where in the head the flags of each pool are. */
const poolsAt = 1024
const objects = 2 ** 17

export class SavedPages {
  readonly #file: PageFile
  readonly #records: number
  /** By name: the number of its record. */
  readonly #places = new Map<number, number>()
  /** Records that were emptied; beyond `#used` none was ever used. */
  readonly #free: number[] = []
  #used = 0
  /** By number: the flags of a pool; 0: there is none. */
  readonly #pools = new Uint32Array(maxPools)
  readonly #record = new Uint8Array(recordBytes)
  readonly #view: DataView = new DataView(this.#record.buffer)
  readonly #emptied = new Uint8Array(4)
  /** The system's error of the last write that failed. */
  failure: unknown

  /** Opens the file, or makes it, and reads what it has. Throws `TmemError` when it cannot be used or read. */
  static open(options: SavedPagesOptions): SavedPages {
    checkOptions('SavedPages.open', options, { file: 'text', sizeBytes: 'bytes' })
    const sizeBytes = bytesOf('SavedPages.open', 'sizeBytes', options.sizeBytes)
    if (sizeBytes < pageBytes || sizeBytes > 2 ** 38)
      throw new RangeError(`SavedPages.open: sizeBytes must be from 4 KiB to 256 GiB, got ${sizeBytes}`)
    const bytes = headBytes + Math.ceil((Math.floor(sizeBytes / pageBytes) * recordBytes) / 4096) * 4096
    const content = { name: 'tmem saved pages of a guest' }
    const request = { path: options.file, mode: 'ours', bytes, content, keep: true, through: 'cache' } as const
    const file = PageFile.open({ ...request, layer: 'kernel-guest' })
    try {
      if (file.bytes < bytes) file.resize(bytes)
      return new SavedPages(file)
    } catch (error) {
      file.closeNow()
      throw error
    }
  }

  private constructor(file: PageFile) {
    this.#file = file
    this.#records = Math.floor((file.bytes - headBytes) / recordBytes)
    file.readNow(new Uint8Array(this.#pools.buffer), 0, maxPools * 4, poolsAt)
    for (const [position, length] of file.dataExtents(headBytes)) {
      const first = Math.max(0, Math.floor((position - headBytes) / recordBytes))
      const last = Math.min(this.#records, Math.ceil((position + length - headBytes) / recordBytes))
      for (let record = Math.max(first, this.#used); record < last; record++) this.#find(record)
    }
  }

  /** Takes up the page of a record, where it has one. */
  #find(record: number): void {
    while (this.#used < record) this.#free.push(this.#used++)
    this.#used = record + 1
    this.#file.readNow(this.#record, 0, recordBytes, headBytes + record * recordBytes)
    const name = this.#view.getFloat64(8, true)
    const isWhole = this.#view.getUint32(0, true) === this.#checksum() && this.#pools[poolOf(name)] !== 0
    if (isWhole && !this.#places.has(name)) this.#places.set(name, record)
    else this.#free.push(record)
  }

  /** Of the record in memory; never 0, which is what an emptied one has. */
  #checksum(): number {
    return crc32(this.#record.subarray(4)) || 1
  }

  /** Pages that are kept. */
  get pages(): number {
    return this.#places.size
  }

  /** There is a pool of that number from now on. */
  newPool(pool: number, flags: number): void {
    this.#setPool(pool, (flags & (PoolBit.Persistent | PoolBit.Shared)) === PoolBit.Persistent ? flags : 0)
  }

  /** A pool is gone, with its pages. */
  destroyPool(pool: number): void {
    for (const name of this.#places.keys()) if (poolOf(name) === pool) this.#remove(name)
    this.#setPool(pool, 0)
  }

  #setPool(pool: number, flags: number): void {
    this.#pools[pool] = flags
    this.#file.writeNow(new Uint8Array(this.#pools.buffer), 0, maxPools * 4, poolsAt)
  }

  /** Keeps a page; false: it cannot, and has none under that name then. */
  put(pool: number, object: ObjectId, index: number, page: Uint8Array): boolean {
    if (this.#pools[pool] === 0) return true
    if (typeof object !== 'number' || object >= objects) return false
    const name = nameOf(pool, object, index)
    const record = this.#places.get(name) ?? this.#free.pop() ?? (this.#used < this.#records ? this.#used++ : undefined)
    if (record === undefined) return false
    this.#places.set(name, record)
    this.#view.setFloat64(8, name, true)
    this.#record.set(page, recordHead)
    this.#view.setUint32(0, this.#checksum(), true)
    try {
      this.#file.writeNow(this.#record, 0, recordBytes, headBytes + record * recordBytes)
      return true
    } catch (error) {
      this.failure = error
      this.#remove(name)
      return false
    }
  }

  flushPage(pool: number, object: ObjectId, index: number): void {
    if (typeof object === 'number' && object < objects) this.#remove(nameOf(pool, object, index))
  }

  flushObject(pool: number, object: ObjectId): void {
    if (typeof object !== 'number' || object >= objects) return
    const first = nameOf(pool, object, 0)
    for (const name of this.#places.keys()) if (name >= first && name < first + 2 ** 32) this.#remove(name)
  }

  /** Throws `TmemError` when the record cannot be emptied: the next process would find a page that is gone. */
  #remove(name: number): void {
    const record = this.#places.get(name)
    if (record === undefined) return
    this.#places.delete(name)
    this.#file.writeNow(this.#emptied, 0, 4, headBytes + record * recordBytes)
    this.#free.push(record)
  }

  /**
   * What `restoreDomain` of @tmem/xen-hypercall takes (of release 4.8 and later): all pools and pages. Nothing where
   * there is no pool. Throws `TmemError` (`TMEM_IO`) when a page cannot be read.
   */
  *stream(): Generator<Uint8Array> {
    const pools = [...this.#pools.keys()].filter((pool) => this.#pools[pool] !== 0)
    if (pools.length === 0) return
    yield words(-5)
    const info = new DataView(new ArrayBuffer(clientInfoLayout.bytes))
    const { fields } = clientInfoLayout
    writeField(info, fields.version, 1)
    writeField(info, fields.maxpools, maxPools)
    writeField(info, fields.nr_pools, pools.length)
    writeField(info, fields.flags, ClientBit.Compress)
    yield new Uint8Array(info.buffer)
    yield words(-1)
    for (const pool of pools) {
      const names = [...this.#places.keys()].filter((name) => poolOf(name) === pool)
      const head = new DataView(new ArrayBuffer(poolInfoLayout.bytes))
      writeField(head, poolInfoLayout.fields.flags, this.#pools[pool]!)
      writeField(head, poolInfoLayout.fields.id, pool)
      writeField(head, poolInfoLayout.fields.n_pages, names.length)
      yield new Uint8Array(head.buffer)
      for (const name of names) yield this.#saved(name)
    }
    yield words(-1)
  }

  /** Object id, index, page. */
  #saved(name: number): Uint8Array {
    const record = new Uint8Array(24 + 4 + pageBytes)
    const view = new DataView(record.buffer)
    view.setUint32(0, Math.floor(name / 2 ** 32) % objects, true)
    view.setUint32(24, name % 2 ** 32, true)
    this.#file.readNow(record, 28, pageBytes, headBytes + this.#places.get(name)! * recordBytes + recordHead)
    return record
  }

  /** Closes the file. `remove`: the guest is gone, and nobody wants its pages any more. */
  close({ remove = false }: { readonly remove?: boolean } = {}): void {
    this.#file.closeNow({ remove })
  }
}

const nameOf = (pool: number, object: number, index: number): number => (pool * objects + object) * 2 ** 32 + index
const poolOf = (name: number): number => Math.floor(name / (objects * 2 ** 32)) % maxPools

function words(...values: readonly number[]): Uint8Array {
  return new Uint8Array(Int32Array.from(values).buffer)
}
