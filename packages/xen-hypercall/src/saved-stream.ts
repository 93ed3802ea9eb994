/**
 * The reader of libxc's streams: the records of a saved domain, in both generations of the format.
 *
 * A stream is read piece by piece, and one page of it is kept. Only whole records are yielded, so that a caller has
 * processed all of them before it learns of a mistake.
 *
 * Source: the reference notes on the ABI, §5.
 */
import { checkOptions, type ObjectId, TmemError } from '@tmem/core'
import {
  ClientBit,
  clientInfoLayout,
  defaultRelease,
  handleLayout,
  invalidObject,
  isSince,
  maxPools,
  OldClientBit,
  pageBytes,
  poolInfoLayout,
  type Release,
  readField,
  readObject,
  readUuid,
} from './abi.ts'

/** The first word of a stream, that of the record of flushed pages, and what ends a list. */
export const streamMark = -5
export const flushedMark = -6
export const streamEnd = 0xffffffff

/** Where a stream comes from: pieces of any size. */
export type StreamSource = AsyncIterable<Uint8Array> | Iterable<Uint8Array>

/** Where a record begins in its stream, and how long it is. */
interface Extent {
  readonly at: number
  readonly bytes: number
}

/** The description of the client. */
export interface StreamHead extends Extent {
  readonly kind: 'head'
  /** That the stream was read as. */
  readonly release: Release
  readonly version: number
  readonly maxPools: number
  /** `OldClientBit` up to 4.7, `ClientBit` from 4.8 on. */
  readonly flags: number
  readonly weight: number
  /** Up to 4.7. */
  readonly cap?: number
  /** From 4.8 on: how many come. */
  readonly pools?: number
  /** From 4.8 on: the structure. */
  readonly info?: Uint8Array<ArrayBuffer>
}

/** A pool; its pages follow. */
export interface StreamPool extends Extent {
  readonly kind: 'pool'
  readonly poolId: number
  readonly flags: number
  /** At most so many. */
  readonly pages: number
  readonly uuid: bigint
  /** From 4.8 on: the structure. */
  readonly info?: Uint8Array<ArrayBuffer>
}

/** A page. */
export interface StreamPage extends Extent {
  readonly kind: 'page'
  readonly poolId: number
  readonly object: ObjectId
  readonly index: number
  readonly page: Uint8Array<ArrayBuffer>
}

/** A page that was flushed while its domain moved. */
export interface StreamFlushed extends Extent {
  readonly kind: 'flushed'
  readonly poolId: number
  readonly object: ObjectId
  readonly index: number
}

/** A mark: fewer pages than were said; the pools are at their end; flushed pages begin, and are at their end. */
export interface StreamMark extends Extent {
  readonly kind: 'no more pages' | 'end of pools' | 'flushed pages' | 'end of flushed pages'
}

export type StreamRecord = StreamHead | StreamPool | StreamPage | StreamFlushed | StreamMark

/** How a stream is read. */
export interface StreamReadOptions {
  /** Of what it is. Default: the generation that its head has, `defaultRelease` or 4.7 (4.0.0 for its version 0). */
  readonly release?: Release
  /**
   * As the original: nothing is checked that it did not check, and the word behind the pools of 4.8 is left (default
   * false).
   */
  readonly isOriginal?: boolean
  /** The record of flushed pages must come (default false: it may). */
  readonly isLive?: boolean
}

/** `TmemError` (`TMEM_CORRUPT`): the stream is cut or wrong; the message says where. */
const mistake = (message: string, at: number): TmemError =>
  new TmemError('TMEM_CORRUPT', `the saved stream ${message} (byte ${at})`, { layer: 'xen' })

const hex = (value: number): string => `0x${(value >>> 0).toString(16)}`

/** Reads bytes that come in pieces of any size. */
class Reader {
  readonly #source: AsyncIterator<Uint8Array>
  #piece: Uint8Array = new Uint8Array(0)
  #at = 0
  /** Bytes taken. */
  position = 0

  constructor(source: StreamSource) {
    this.#source = iterate(source)
  }

  /** Whether there is nothing more. */
  async isAtEnd(): Promise<boolean> {
    while (this.#at === this.#piece.length) {
      const next = await this.#source.next()
      if (next.done === true) return true
      this.#piece = next.value
      this.#at = 0
    }
    return false
  }

  /** So many bytes, copied. Throws where the stream ends before. */
  async take(bytes: number, what: string): Promise<Uint8Array<ArrayBuffer>> {
    const taken = new Uint8Array(bytes)
    for (let done = 0; done < bytes; ) {
      if (await this.isAtEnd()) throw mistake(`ends in ${what}`, this.position)
      const length = Math.min(bytes - done, this.#piece.length - this.#at)
      taken.set(this.#piece.subarray(this.#at, this.#at + length), done)
      this.#at += length
      this.position += length
      done += length
    }
    return taken
  }

  async view(bytes: number, what: string): Promise<DataView> {
    return new DataView((await this.take(bytes, what)).buffer)
  }

  async word(what: string): Promise<number> {
    return (await this.view(4, what)).getUint32(0, true)
  }

  async expect(value: number, what: string): Promise<void> {
    const found = await this.word(what)
    if (found !== value >>> 0) throw mistake(`has ${hex(found)} for ${what}, which is ${hex(value)}`, this.position - 4)
  }

  /** What an async iterator holds open is closed. */
  async close(): Promise<void> {
    await this.#source.return?.()
  }
}

async function* iterate(source: StreamSource): AsyncGenerator<Uint8Array> {
  yield* source
}

/**
 * The records of a stream, in their order; none of an empty one. Throws `TmemError` (`TMEM_CORRUPT`) where it is cut or
 * wrong, after what was whole before; `TypeError` for options that there are not.
 */
export async function* readStream(
  source: StreamSource,
  options: StreamReadOptions = {},
): AsyncGenerator<StreamRecord, void> {
  checkOptions('readStream', options, { release: 'text?', isOriginal: 'flag?', isLive: 'flag?' })
  const reader = new Reader(source)
  try {
    yield* new Parser(reader, options).records()
  } finally {
    await reader.close()
  }
}

class Parser {
  readonly #reader: Reader
  readonly #isOriginal: boolean
  readonly #isLive: boolean
  readonly #release: Release | undefined
  readonly #seen = new Set<number>()

  constructor(reader: Reader, { release, isOriginal = false, isLive = false }: StreamReadOptions) {
    this.#reader = reader
    this.#release = release
    this.#isOriginal = isOriginal
    this.#isLive = isLive
  }

  async *records(): AsyncGenerator<StreamRecord, void> {
    const reader = this.#reader
    if (await reader.isAtEnd()) {
      if (this.#isLive) throw mistake('is empty: nothing was saved', 0)
      return
    }
    await reader.expect(streamMark, 'the mark of its beginning')
    const head = await this.#head()
    yield head
    if (isSince(head.release, '4.8')) yield* this.#newPools(head)
    else yield* this.#oldPools(head.release)
    if (await reader.isAtEnd()) {
      if (this.#isLive) throw mistake('ends before the pages that were flushed meanwhile', reader.position)
      return
    }
    await reader.expect(flushedMark, 'the mark of flushed pages')
    yield this.#mark('flushed pages', 4)
    yield* this.#flushed(head.release)
    if (!(await reader.isAtEnd())) throw mistake('goes on after its end', reader.position)
  }

  #mark(kind: StreamMark['kind'], bytes: number): StreamMark {
    return { kind, at: this.#reader.position - bytes, bytes }
  }

  async #head(): Promise<StreamHead> {
    const reader = this.#reader
    const first = await reader.view(12, 'its head')
    // Up to 4.7 a separator is where later the number of pools is.
    const third = first.getUint32(8, true)
    const old = first.getUint32(0, true) === 0 ? '4.0.0' : '4.7'
    const release = this.#release ?? (third === streamEnd ? old : defaultRelease)
    const isNew = isSince(release, '4.8')
    if (!this.#isOriginal && (isNew ? third === streamEnd : third > 0 && third <= maxPools))
      throw mistake(`is of Xen ${isNew ? '4.7 or earlier' : '4.8 or later'}, not of ${release}`, 12)
    return isNew ? this.#newHead(release, first) : this.#oldHead(release, first)
  }

  async #oldHead(release: Release, first: DataView): Promise<StreamHead> {
    const rest = await this.#reader.view(16, 'its head')
    const version = first.getUint32(0, true)
    const pools = first.getUint32(4, true)
    const flags = rest.getUint32(0, true)
    if (!this.#isOriginal) {
      const wanted = release === '4.0.0' ? 0 : 1
      if (version !== wanted) throw mistake(`is of version ${version}, not ${wanted}`, 4)
      if (pools > maxPools) throw mistake(`has up to ${pools} pools, more than ${maxPools}`, 8)
      if (first.getUint32(8, true) !== streamEnd || rest.getUint32(12, true) !== streamEnd)
        throw mistake('has no separator where one must be', 12)
      if ((flags & ~(OldClientBit.Compress | OldClientBit.FrozenBefore)) !== 0)
        throw mistake(`has flags ${hex(flags)} that nobody knows`, 16)
    }
    const [weight, cap] = [rest.getUint32(4, true), rest.getUint32(8, true)]
    return { kind: 'head', at: 0, bytes: 32, release, version, maxPools: pools, flags, weight, cap }
  }

  async #newHead(release: Release, first: DataView): Promise<StreamHead> {
    const reader = this.#reader
    const { bytes, fields } = clientInfoLayout
    const info = new Uint8Array(bytes)
    info.set(new Uint8Array(first.buffer))
    info.set(await reader.take(bytes - 12, 'the description of the client'), 12)
    const separator = await reader.word('a separator')
    const view = new DataView(info.buffer)
    const field = (name: keyof typeof fields): number => readField(view, fields[name])
    const [version, most, pools, flags] = [field('version'), field('maxpools'), field('nr_pools'), field('flags')]
    if (!this.#isOriginal) {
      if (separator !== streamEnd) throw mistake(`has ${hex(separator)} for a separator`, reader.position - 4)
      if (version !== 1) throw mistake(`is of version ${version}, not 1`, 4)
      if (most > maxPools || pools > maxPools) throw mistake(`has ${pools} of ${most} pools, more than ${maxPools}`, 8)
      if ((flags & ~(ClientBit.Frozen | ClientBit.Compress | ClientBit.Migrating)) !== 0)
        throw mistake(`has flags ${hex(flags)} that nobody knows`, 16)
    }
    if (pools === 0) throw mistake('has no pools', 12)
    const weight = field('weight')
    return { kind: 'head', at: 0, bytes: 28, release, version, maxPools: most, flags, weight, pools, info }
  }

  async *#oldPools(release: Release): AsyncGenerator<StreamRecord, void> {
    const reader = this.#reader
    for (;;) {
      const poolId = await reader.word('the number of a pool')
      if (poolId === streamEnd) break
      const view = await reader.view(24, `pool ${poolId}`)
      this.#assertPool(poolId, 28)
      const pages = view.getUint32(4, true)
      const uuid = readUuid(view, { at: 8, bytes: 8 })
      const extent = { at: reader.position - 28, bytes: 28 }
      yield { kind: 'pool', ...extent, poolId, flags: view.getUint32(0, true), pages, uuid }
      yield* this.#pages(release, poolId, pages)
    }
    yield this.#mark('end of pools', 4)
  }

  async *#newPools({ release, pools = 0 }: StreamHead): AsyncGenerator<StreamRecord, void> {
    const reader = this.#reader
    const { bytes, fields } = poolInfoLayout
    for (let n = 0; n < pools; n++) {
      const info = await reader.take(bytes, `pool ${n + 1} of ${pools}`)
      const view = new DataView(info.buffer)
      const poolId = readField(view, fields.id)
      this.#assertPool(poolId, bytes)
      const pages = readField(view, fields.n_pages)
      const extent = { at: reader.position - bytes, bytes }
      const words = { poolId, flags: readField(view, fields.flags), pages, uuid: readUuid(view, fields.uuid), info }
      yield { kind: 'pool', ...extent, ...words }
      yield* this.#pages(release, poolId, pages)
    }
    // The original left the last word where it was, for whoever read on.
    if (!this.#isOriginal) await reader.expect(streamEnd, 'the end of the pools')
    yield this.#mark('end of pools', this.#isOriginal ? 0 : 4)
  }

  #assertPool(poolId: number, length: number): void {
    if (poolId < maxPools && !this.#seen.has(poolId)) {
      this.#seen.add(poolId)
      return
    }
    const why = poolId < maxPools ? 'twice' : `, of ${maxPools}`
    throw mistake(`has a pool ${poolId} ${why}`, this.#reader.position - length)
  }

  async *#pages(release: Release, poolId: number, most: number): AsyncGenerator<StreamRecord, void> {
    const reader = this.#reader
    for (let n = 0; n < most; n++) {
      const what = `page ${n + 1} of ${most} of pool ${poolId}`
      const at = reader.position
      const object = await this.#object(release, what)
      if (object === undefined) {
        yield this.#mark('no more pages', reader.position - at)
        return
      }
      // Index and page together: half a page is none.
      const rest = await reader.take(4 + pageBytes, what)
      const index = new DataView(rest.buffer).getUint32(0, true)
      yield { kind: 'page', at, bytes: reader.position - at, poolId, object, index, page: rest.subarray(4) }
    }
  }

  /** An object id; `undefined`: all ones. */
  async #object(release: Release, what: string): Promise<ObjectId | undefined> {
    const { bytes, fields } = handleLayout(release)
    const object = readObject(await this.#reader.view(bytes - fields.oid.at, what), { ...fields.oid, at: 0 })
    return object === invalidObject ? undefined : object
  }

  async *#flushed(release: Release): AsyncGenerator<StreamRecord, void> {
    const reader = this.#reader
    for (;;) {
      const at = reader.position
      const poolId = await reader.word('the number of a pool')
      if (poolId === streamEnd) break
      const object = await this.#object(release, 'a flushed page')
      const index = await reader.word('a flushed page')
      if (!this.#seen.has(poolId)) throw mistake(`flushes pages of pool ${poolId}, which it has not`, reader.position)
      // Nothing is kept under all ones.
      if (object !== undefined) yield { kind: 'flushed', at, bytes: reader.position - at, poolId, object, index }
    }
    yield this.#mark('end of flushed pages', 4)
  }
}
