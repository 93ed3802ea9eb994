/**
 * Saved domains: the part of tmem in the streams of libxc, written and read by way of control, as a toolstack does.
 *
 * Two generations: up to 4.7 single values, from 4.8 on structures. Both end with the same record of the pages that
 * were flushed while a domain moved. A stream is read piece by piece: what is kept is one page.
 *
 * Invariant: a stream that is cut or wrong restores nothing (its head was not whole) or all pages before the mistake,
 * each whole; the error says where, and how much is there.
 *
 * DEVIATION: a writer that meets a page which has gone ends its pool with the mark of all ones; the original wrote
 * fewer pages than it had said, and the reader took what followed for one. DEVIATION: versions, separators and the word
 * behind the pools are checked, each pool is there once, weights are restored, and a client is frozen after its pages
 * have come. `defects: 'original'` brings the defects of §5.4 back.
 *
 * Source: the reference notes on the ABI, §5.
 */
import { type ObjectId, TmemError } from '@tmem/core'
import {
  ClientBit,
  Command,
  clientInfoLayout,
  handleLayout,
  maxPools,
  OldClientBit,
  PoolBit,
  pageBytes,
  poolInfoLayout,
  readField,
  readObject,
  readUuid,
  SubOperation as Sub,
  writeField,
} from './abi.ts'
import { type ControlBuffer, type ControlRequest, controlBuffer } from './control.ts'
import type { XenHost } from './host.ts'

const beginning = -5
const flushedPages = -6
const end = 0xffffffff

/** What a stream has brought. */
export interface Restored {
  readonly pools: number
  readonly pages: number
  /** Pages that were flushed while the domain moved. */
  readonly flushed: number
}

const failed = (what: string, answer: number): TmemError =>
  new TmemError('TMEM_IO', `xen: ${what} was answered ${answer}`, { layer: 'xen' })

/** Asks; throws where the answer is less than `least`. */
async function ask(host: XenHost, what: string, request: ControlRequest, least: number): Promise<number> {
  const answer = await host.control(request)
  if (answer < least) throw failed(what, answer)
  return answer
}

function words(...values: readonly number[]): Uint8Array {
  const view = new DataView(new ArrayBuffer(values.length * 4))
  for (const [n, value] of values.entries()) view.setUint32(n * 4, value, true)
  return new Uint8Array(view.buffer)
}

/**
 * Saves a domain: begins (the client is frozen), and yields its description and pages. Nothing: there is nothing to
 * save. `isLive`: the guest goes on running meanwhile; then, when it stands still, comes `saveFlushed`. The caller ends
 * the save with `endSave`, also when it does not go on. Throws `TmemError`.
 */
export async function* saveDomain(host: XenHost, id: number, isLive = false): AsyncGenerator<Uint8Array> {
  const isNew = host.isSince('4.8')
  const began = await host.control({
    subOperation: Sub.SaveBegin,
    client: id,
    arg1: Number(isLive),
    arg2: Number(isLive),
  })
  if (isNew ? began < 0 : began <= 0) return
  yield words(beginning)
  yield* isNew ? saveNew(host, id) : saveOld(host, id)
  yield words(end)
}

async function* saveOld(host: XenHost, id: number): AsyncGenerator<Uint8Array> {
  const get = (subOperation: number, more: Partial<ControlRequest> = {}): Promise<number> =>
    Promise.resolve(host.control({ subOperation, client: id, ...more }))
  yield words(await get(Sub.SaveGetVersion), await get(Sub.SaveGetMaxPools), end)
  yield words(await get(Sub.SaveGetFlags), await get(Sub.SaveGetWeight), await get(Sub.SaveGetCap), end)
  for (let poolId = 0; poolId < maxPools; poolId++) {
    const flags = await get(Sub.SaveGetPoolFlags, { poolId })
    if (flags === -1) continue
    const pages = await get(Sub.SaveGetPoolPages, { poolId })
    const uuid = new Uint8Array(16)
    await get(Sub.SaveGetPoolUuid, { poolId, buffer: controlBuffer(uuid) })
    yield words(poolId, flags, pages)
    yield uuid
    yield* savePages(host, id, poolId, pages)
  }
}

async function* saveNew(host: XenHost, id: number): AsyncGenerator<Uint8Array> {
  const info = new Uint8Array(clientInfoLayout.bytes)
  await ask(host, 'GET_CLIENT_INFO', { subOperation: Sub.GetClientInfo, client: id, buffer: controlBuffer(info) }, 0)
  yield info
  yield words(end)
  const { bytes, fields } = poolInfoLayout
  const pools = new Uint8Array(maxPools * bytes)
  const request = { subOperation: Sub.GetPools, client: id, arg1: pools.length, buffer: controlBuffer(pools) }
  const count = await ask(host, 'GET_POOLS', request, 0)
  for (let n = 0; n < count; n++) {
    const pool = pools.slice(n * bytes, (n + 1) * bytes)
    const view = new DataView(pool.buffer)
    if ((readField(view, fields.flags) & PoolBit.Persistent) === 0) writeField(view, fields.n_pages, 0)
    yield pool
    yield* savePages(host, id, readField(view, fields.id), readField(view, fields.n_pages))
  }
}

/** Up to `most` pages of a pool, and the mark of all ones where fewer come. */
async function* savePages(host: XenHost, id: number, poolId: number, most: number): AsyncGenerator<Uint8Array> {
  const { bytes, fields } = handleLayout(host.release)
  const idBytes = bytes - fields.oid.at
  let written = 0
  let answer = 0
  for (let turn = 0; turn < most; turn++) {
    const record = new Uint8Array(bytes + pageBytes)
    const request = { subOperation: Sub.SaveGetNextPage, client: id, poolId, arg1: record.length }
    answer = await host.control({ ...request, buffer: controlBuffer(record) })
    if (answer < 0) break
    if (answer === 0) continue
    written++
    // In the stream the object id comes first, and the number of the pool is known.
    yield record.slice(fields.oid.at, fields.oid.at + idBytes)
    yield record.slice(fields.index.at, fields.index.at + 4)
    yield record.subarray(bytes)
  }
  if (host.isOriginal ? answer < 0 : written < most) yield new Uint8Array(idBytes).fill(0xff)
}

/** The record of the pages that were flushed since a live save began; the guest stands still. */
export async function* saveFlushed(host: XenHost, id: number): AsyncGenerator<Uint8Array> {
  const { bytes, fields } = handleLayout(host.release)
  yield words(flushedPages)
  for (;;) {
    const handle = new Uint8Array(bytes)
    const request = { subOperation: Sub.SaveGetNextInvalidation, client: id, arg1: bytes }
    if ((await ask(host, 'SAVE_GET_NEXT_INV', { ...request, buffer: controlBuffer(handle) }, 0)) === 0) break
    yield handle.slice(0, 4)
    yield handle.slice(fields.oid.at)
    yield handle.slice(fields.index.at, fields.index.at + 4)
  }
  yield words(end)
}

/** Ends a save: the client is frozen as it was before. */
export function endSave(host: XenHost, id: number): void {
  void host.control({ subOperation: Sub.SaveEnd, client: id })
}

/** Reads bytes that come in pieces of any size. */
class Reader {
  readonly #source: AsyncIterator<Uint8Array>
  #piece: Uint8Array = new Uint8Array(0)
  #at = 0
  /** Bytes taken. */
  position = 0

  constructor(source: AsyncIterable<Uint8Array> | Iterable<Uint8Array>) {
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
      if (await this.isAtEnd()) throw new Mistake(`ends in ${what}`, this.position)
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
    if (found !== value >>> 0)
      throw new Mistake(`has ${hex(found)} for ${what}, which is ${hex(value)}`, this.position - 4)
  }
}

async function* iterate(source: AsyncIterable<Uint8Array> | Iterable<Uint8Array>): AsyncGenerator<Uint8Array> {
  yield* source
}

const hex = (value: number): string => `0x${(value >>> 0).toString(16)}`

/** Something is wrong with a stream. */
class Mistake extends Error {
  readonly at: number

  constructor(message: string, at: number) {
    super(message)
    this.at = at
  }
}

/**
 * Restores what `saveDomain` and `saveFlushed` wrote, of the same release, into a domain without a client. An empty
 * stream restores nothing. `isLive`: the record of flushed pages must come. Rejects with `TmemError` (`TMEM_CORRUPT`)
 * when the stream is cut or wrong: what was whole before is there; kill the domain, or go on with it as it is.
 */
export async function restoreDomain(
  host: XenHost,
  id: number,
  source: AsyncIterable<Uint8Array> | Iterable<Uint8Array>,
  isLive = false,
): Promise<Restored> {
  const reader = new Reader(source)
  const restoring = new Restoring(host, id, reader)
  try {
    await restoring.run(isLive)
  } catch (error) {
    const { pools, pages } = restoring
    const is = `${pages} pages in ${pools} pools of domain ${id} are restored`
    if (error instanceof Mistake)
      throw new TmemError('TMEM_CORRUPT', `the saved stream ${error.message} (byte ${error.at}); ${is}`, {
        layer: 'xen',
      })
    if (error instanceof TmemError)
      throw new TmemError(error.code, `${error.message}; ${is}`, { layer: 'xen', cause: error })
    throw error
  }
  const { pools, pages, flushed } = restoring
  return { pools, pages, flushed }
}

class Restoring {
  pools = 0
  pages = 0
  flushed = 0
  readonly #host: XenHost
  readonly #id: number
  readonly #reader: Reader
  readonly #seen = new Set<number>()

  constructor(host: XenHost, id: number, reader: Reader) {
    this.#host = host
    this.#id = id
    this.#reader = reader
  }

  async run(isLive: boolean): Promise<void> {
    const reader = this.#reader
    if (await reader.isAtEnd()) {
      if (isLive) throw new Mistake('is empty: nothing was saved', 0)
      return
    }
    await reader.expect(beginning, 'the mark of its beginning')
    if (this.#host.isSince('4.8')) await this.#new()
    else await this.#old()
    // The original left the last word where it was, for whoever read on.
    if (await reader.isAtEnd()) {
      if (isLive) throw new Mistake('ends before the pages that were flushed meanwhile', reader.position)
      return
    }
    await reader.expect(flushedPages, 'the mark of flushed pages')
    await this.#flushed()
    if (!(await reader.isAtEnd())) throw new Mistake('goes on after its end', reader.position)
  }

  async #begin(): Promise<void> {
    const least = this.#host.isSince('4.8') ? 0 : 1
    const request = { subOperation: Sub.RestoreBegin, client: this.#id }
    await ask(this.#host, `RESTORE_BEGIN of domain ${this.#id}`, request, least)
  }

  async #old(): Promise<void> {
    const host = this.#host
    const reader = this.#reader
    const client = this.#id
    const version = host.release === '4.0.0' ? 0 : 1
    const head = await reader.view(28, 'its head')
    const word = (n: number): number => head.getUint32(n * 4, true)
    if (!host.isOriginal) {
      if (word(0) !== version) throw new Mistake(`is of version ${word(0)}, not ${version}`, 4)
      if (word(1) > maxPools) throw new Mistake(`has up to ${word(1)} pools, more than ${maxPools}`, 8)
      if (word(2) !== end || word(6) !== end) throw new Mistake('has no separator where one must be', 12)
      if ((word(3) & ~(OldClientBit.Compress | OldClientBit.FrozenBefore)) !== 0)
        throw new Mistake(`has flags ${hex(word(3))} that nobody knows`, 16)
    }
    await this.#begin()
    const set = (subOperation: number, arg1: number): Promise<number> =>
      ask(host, `sub-operation ${subOperation}`, { subOperation, client, arg1 }, 0)
    await set(Sub.SetCompress, word(3) & OldClientBit.Compress)
    const isFrozen = (word(3) & OldClientBit.FrozenBefore) !== 0
    // Frozen so early, it takes no page.
    if (isFrozen && host.isOriginal) await set(Sub.Freeze, 0)
    await set(Sub.SetWeight, host.isOriginal ? 0 : word(4))
    await set(Sub.SetCap, host.isOriginal ? 0 : word(5))
    for (;;) {
      const poolId = await reader.word('the number of a pool')
      if (poolId === end) break
      const pool = await reader.view(24, `pool ${poolId}`)
      this.#assertPool(poolId, 28)
      const slot = host.restoreNew(client, poolId, pool.getUint32(0, true), readUuid(pool, { at: 8, bytes: 8 }))
      if (slot < 0) throw failed(`RESTORE_NEW of pool ${poolId}`, slot)
      this.pools++
      await this.#restorePages(poolId, pool.getUint32(4, true))
    }
    if (isFrozen) await set(Sub.Freeze, 0)
  }

  async #new(): Promise<void> {
    const host = this.#host
    const reader = this.#reader
    const client = this.#id
    const info = await reader.take(clientInfoLayout.bytes, 'the description of the client')
    const view = new DataView(info.buffer)
    const { fields } = clientInfoLayout
    const pools = readField(view, fields.nr_pools)
    const separator = await reader.word('a separator')
    if (!host.isOriginal) {
      if (separator !== end) throw new Mistake(`has ${hex(separator)} for a separator`, reader.position - 4)
      const version = readField(view, fields.version)
      if (version !== 1) throw new Mistake(`is of version ${version}, not 1`, 4)
      if (readField(view, fields.maxpools) > maxPools || pools > maxPools)
        throw new Mistake(`has ${pools} of ${readField(view, fields.maxpools)} pools, more than ${maxPools}`, 8)
      if ((readField(view, fields.flags) & ~(ClientBit.Frozen | ClientBit.Compress | ClientBit.Migrating)) !== 0)
        throw new Mistake(`has flags ${hex(readField(view, fields.flags))} that nobody knows`, 16)
    }
    if (pools === 0) throw new Mistake('has no pools', 12)
    await this.#begin()
    const set = { subOperation: Sub.SetClientInfo, client, buffer: controlBuffer(info) }
    await ask(host, 'SET_CLIENT_INFO', set, 0)
    for (let n = 0; n < pools; n++) {
      const pool = await reader.take(poolInfoLayout.bytes, `pool ${n + 1} of ${pools}`)
      await this.#restorePool(pool)
    }
    if (!host.isOriginal) await reader.expect(end, 'the end of the pools')
  }

  async #restorePool(info: Uint8Array<ArrayBuffer>): Promise<void> {
    const host = this.#host
    const view = new DataView(info.buffer)
    const { fields } = poolInfoLayout
    const poolId = readField(view, fields.id)
    const pages = readField(view, fields.n_pages)
    this.#assertPool(poolId, poolInfoLayout.bytes)
    if (host.isSince('4.9')) {
      writeField(view, fields.n_pages, 0)
      const request = { subOperation: Sub.SetPools, client: this.#id, arg1: info.length, buffer: this.#bounced(info) }
      await ask(host, `SET_POOLS of pool ${poolId}`, request, 0)
    } else {
      const slot = host.restoreNew(this.#id, poolId, readField(view, fields.flags), readUuid(view, fields.uuid))
      if (slot < 0) throw failed(`RESTORE_NEW of pool ${poolId} (command ${Command.RestoreNew})`, slot)
    }
    this.pools++
    await this.#restorePages(poolId, pages)
  }

  #assertPool(poolId: number, length: number): void {
    if (poolId < maxPools && !this.#seen.has(poolId)) {
      this.#seen.add(poolId)
      return
    }
    const why = poolId < maxPools ? 'twice' : `, of ${maxPools}`
    throw new Mistake(`has a pool ${poolId} ${why}`, this.#reader.position - length)
  }

  /** What libxc sent: from 4.8 on its copy was never filled. */
  #bounced(bytes: Uint8Array): ControlBuffer {
    return controlBuffer(this.#host.isOriginal && this.#host.isSince('4.8') ? new Uint8Array(bytes.length) : bytes)
  }

  async #restorePages(poolId: number, most: number): Promise<void> {
    for (let n = 0; n < most; n++) {
      const object = await this.#object(`page ${n + 1} of ${most} of pool ${poolId}`)
      if (object === undefined) return
      // Index and page together: half a page restores nothing.
      const rest = await this.#reader.take(4 + pageBytes, `page ${n + 1} of ${most} of pool ${poolId}`)
      const request = {
        subOperation: Sub.RestorePutPage,
        client: this.#id,
        poolId,
        arg1: pageBytes,
        arg2: new DataView(rest.buffer).getUint32(0, true),
        object,
        buffer: this.#bounced(rest.subarray(4)),
      }
      await ask(this.#host, `RESTORE_PUT_PAGE of page ${n + 1} of pool ${poolId}`, request, 1)
      this.pages++
    }
  }

  /** An object id; `undefined`: all ones. */
  async #object(what: string): Promise<ObjectId | undefined> {
    const { bytes, fields } = handleLayout(this.#host.release)
    const taken = await this.#reader.take(bytes - fields.oid.at, what)
    if (taken.every((byte) => byte === 0xff)) return undefined
    return readObject(new DataView(taken.buffer), { ...fields.oid, at: 0 })
  }

  async #flushed(): Promise<void> {
    for (;;) {
      const poolId = await this.#reader.word('the number of a pool')
      if (poolId === end) return
      const object = await this.#object('a flushed page')
      const index = await this.#reader.word('a flushed page')
      if (!this.#seen.has(poolId))
        throw new Mistake(`flushes pages of pool ${poolId}, which it has not`, this.#reader.position)
      if (object === undefined) continue
      const request = { subOperation: Sub.RestoreFlushPage, client: this.#id, poolId, arg2: index, object }
      const answer = await this.#host.control(request)
      // Frozen, it is flushed all the same.
      if (answer === -1) throw failed(`RESTORE_FLUSH_PAGE in pool ${poolId}`, answer)
      this.flushed++
    }
  }
}
