/**
 * Saved domains: the part of tmem in the streams of libxc, written and read by way of control, as a toolstack does.
 *
 * Two generations: up to 4.7 single values, from 4.8 on structures. Both end with the same record of the pages that
 * were flushed while a domain moved. How they are read is in `saved-stream.ts`.
 *
 * Invariant: a stream that is cut or wrong restores nothing (its head was not whole) or all pages before the mistake,
 * each whole; the error says where, and how much is there.
 *
 * DEVIATION: a writer that finds a page gone ends its pool with the mark of all ones; the original wrote fewer pages
 * than announced, and the reader took the following record for a page. DEVIATION: versions, separators and the word
 * behind the pools are checked, each pool is there once, weights are restored, and a client is frozen after its pages
 * have come. `defects: 'original'` brings the defects of §5.4 back.
 *
 * Source: the reference notes on the ABI, §5.
 */
import { TmemError } from '@tmem/core'
import {
  clientInfoLayout,
  handleLayout,
  maxPools,
  OldClientBit,
  PoolBit,
  pageBytes,
  poolInfoLayout,
  readField,
  SubOperation as Sub,
  writeField,
} from './abi.ts'
import { type ControlBuffer, type ControlRequest, controlBuffer } from './control.ts'
import type { XenHost } from './host.ts'
import {
  flushedMark,
  readStream,
  type StreamFlushed,
  type StreamHead,
  type StreamPage,
  type StreamPool,
  type StreamRecord,
  type StreamSource,
  streamEnd,
  streamMark,
} from './saved-stream.ts'

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
  yield words(streamMark)
  yield* isNew ? saveNew(host, id) : saveOld(host, id)
  yield words(streamEnd)
}

async function* saveOld(host: XenHost, id: number): AsyncGenerator<Uint8Array> {
  const get = (subOperation: number, more: Partial<ControlRequest> = {}): Promise<number> =>
    Promise.resolve(host.control({ subOperation, client: id, ...more }))
  yield words(await get(Sub.SaveGetVersion), await get(Sub.SaveGetMaxPools), streamEnd)
  yield words(await get(Sub.SaveGetFlags), await get(Sub.SaveGetWeight), await get(Sub.SaveGetCap), streamEnd)
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
  yield words(streamEnd)
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
  yield words(flushedMark)
  for (;;) {
    const handle = new Uint8Array(bytes)
    const request = { subOperation: Sub.SaveGetNextInvalidation, client: id, arg1: bytes }
    if ((await ask(host, 'SAVE_GET_NEXT_INV', { ...request, buffer: controlBuffer(handle) }, 0)) === 0) break
    yield handle.slice(0, 4)
    yield handle.slice(fields.oid.at)
    yield handle.slice(fields.index.at, fields.index.at + 4)
  }
  yield words(streamEnd)
}

/** Ends a save: the client is frozen as it was before. */
export function endSave(host: XenHost, id: number): void {
  void host.control({ subOperation: Sub.SaveEnd, client: id })
}

/**
 * Restores what `saveDomain` and `saveFlushed` wrote, of the same release, into a domain without a client. An empty
 * stream restores nothing. `isLive`: the record of flushed pages must come. Rejects with `TmemError` (`TMEM_CORRUPT`)
 * when the stream is cut or wrong: what was whole before is there; kill the domain, or go on with it as it is.
 */
export async function restoreDomain(
  host: XenHost,
  id: number,
  source: StreamSource,
  isLive = false,
): Promise<Restored> {
  const { release, isOriginal } = host
  const restoring = new Restoring(host, id)
  try {
    for await (const record of readStream(source, { release, isOriginal, isLive })) await restoring.restore(record)
  } catch (error) {
    if (!(error instanceof TmemError)) throw error
    const { pools, pages } = restoring
    const is = `${pages} pages in ${pools} pools of domain ${id} are restored`
    throw new TmemError(error.code, `${error.message}; ${is}`, { layer: 'xen', cause: error })
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
  /** To be frozen when its pages have come. */
  #isFrozen = false

  constructor(host: XenHost, id: number) {
    this.#host = host
    this.#id = id
  }

  /** Does what a record says. */
  async restore(record: StreamRecord): Promise<void> {
    switch (record.kind) {
      case 'head':
        return this.#head(record)
      case 'pool':
        return this.#pool(record)
      case 'page':
        return this.#page(record)
      case 'flushed':
        return this.#flushed(record)
      case 'end of pools':
        if (this.#isFrozen) await this.#set(Sub.Freeze, 0)
        return
      case 'no more pages':
      case 'flushed pages':
      case 'end of flushed pages':
    }
  }

  async #set(subOperation: number, arg1: number): Promise<void> {
    await ask(this.#host, `sub-operation ${subOperation}`, { subOperation, client: this.#id, arg1 }, 0)
  }

  async #head({ info, flags, weight, cap = 0 }: StreamHead): Promise<void> {
    const host = this.#host
    const begin = { subOperation: Sub.RestoreBegin, client: this.#id }
    await ask(host, `RESTORE_BEGIN of domain ${this.#id}`, begin, host.isSince('4.8') ? 0 : 1)
    if (info !== undefined) {
      const set = { subOperation: Sub.SetClientInfo, client: this.#id, buffer: controlBuffer(info) }
      await ask(host, 'SET_CLIENT_INFO', set, 0)
      return
    }
    await this.#set(Sub.SetCompress, flags & OldClientBit.Compress)
    const isFrozen = (flags & OldClientBit.FrozenBefore) !== 0
    // Frozen so early, it takes no page.
    if (isFrozen && host.isOriginal) await this.#set(Sub.Freeze, 0)
    this.#isFrozen = isFrozen
    await this.#set(Sub.SetWeight, host.isOriginal ? 0 : weight)
    await this.#set(Sub.SetCap, host.isOriginal ? 0 : cap)
  }

  async #pool({ poolId, flags, uuid, info }: StreamPool): Promise<void> {
    const host = this.#host
    if (info !== undefined && host.isSince('4.9')) {
      writeField(new DataView(info.buffer), poolInfoLayout.fields.n_pages, 0)
      const request = { subOperation: Sub.SetPools, client: this.#id, arg1: info.length, buffer: this.#bounced(info) }
      await ask(host, `SET_POOLS of pool ${poolId}`, request, 0)
    } else {
      const slot = host.restoreNew(this.#id, poolId, flags, uuid)
      if (slot < 0) throw failed(`RESTORE_NEW of pool ${poolId}`, slot)
    }
    this.pools++
  }

  /** What libxc sent: from 4.8 on its copy was never filled. */
  #bounced(bytes: Uint8Array): ControlBuffer {
    return controlBuffer(this.#host.isOriginal && this.#host.isSince('4.8') ? new Uint8Array(bytes.length) : bytes)
  }

  async #page({ poolId, object, index, page }: StreamPage): Promise<void> {
    const request = {
      subOperation: Sub.RestorePutPage,
      client: this.#id,
      poolId,
      arg1: pageBytes,
      arg2: index,
      object,
      buffer: this.#bounced(page),
    }
    await ask(this.#host, `RESTORE_PUT_PAGE of object ${object} index ${index} of pool ${poolId}`, request, 1)
    this.pages++
  }

  async #flushed({ poolId, object, index }: StreamFlushed): Promise<void> {
    const request = { subOperation: Sub.RestoreFlushPage, client: this.#id, poolId, arg2: index, object }
    const answer = await this.#host.control(request)
    // Frozen, it is flushed all the same.
    if (answer === -1) throw failed(`RESTORE_FLUSH_PAGE in pool ${poolId}`, answer)
    this.flushed++
  }
}
