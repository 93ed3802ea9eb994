/**
 * Control: the requests of a toolstack to the host, by sub-operation.
 *
 * The two generations differ in numbers, arguments and answers: up to 4.7 single values, -1 for whatever fails; from
 * 4.8 on structures and error numbers. Buffers belong to the caller; their content is copied before it is checked, and
 * output that does not fit is cut at the end of a record.
 *
 * Source: the reference notes on the ABI, §3, §5.3 and §5.4.
 */
import { GetOutcome, type ObjectId, Whereabouts } from '@tmem/core'
import {
  allClients,
  ClientBit,
  clientInfoLayout,
  Errno,
  handleLayout,
  maxPools,
  OldClientBit,
  PoolBit,
  pageBytes,
  poolInfoLayout,
  readField,
  readUuid,
  SubOperation as Sub,
  versionShift,
  writeField,
  writeObject,
  writeUuid,
} from './abi.ts'
import type { Client, PageName, XenPool } from './clients.ts'
import type { Answer, XenHost } from './host.ts'
import { listText } from './list.ts'

/** Where a sub-operation reads or writes; false: that is not there. */
export interface ControlBuffer {
  read(at: number, into: Uint8Array): boolean
  write(at: number, from: Uint8Array): boolean
}

/** A buffer of our own. */
export function controlBuffer(bytes: Uint8Array): ControlBuffer {
  const isWithin = (at: number, length: number): boolean => at >= 0 && at + length <= bytes.length
  return {
    read(at, into) {
      if (!isWithin(at, into.length)) return false
      into.set(bytes.subarray(at, at + into.length))
      return true
    },
    write(at, from) {
      if (!isWithin(at, from.length)) return false
      bytes.set(from, at)
      return true
    },
  }
}

/** What is asked, in the words of the structures: which argument means what depends on release and sub-operation. */
export interface ControlRequest {
  readonly subOperation: number
  /** Number of a domain; 0xFFFF: all. */
  readonly client?: number
  readonly poolId?: number
  /** From 4.8 on `len`. */
  readonly arg1?: number
  /** From 4.8 on `arg`. */
  readonly arg2?: number
  readonly object?: ObjectId
  readonly buffer?: ControlBuffer
}

/** A request with all of its parts. */
type Asked = Required<ControlRequest>

const noBuffer: ControlBuffer = { read: () => false, write: () => false }

/** Does what is asked: a result of at least 0, or what failed. Whether whoever asks may is known. */
export function control(host: XenHost, request: ControlRequest): Answer {
  const asked: Asked = {
    client: 0,
    poolId: 0,
    arg1: 0,
    arg2: 0,
    object: 0,
    buffer: noBuffer,
    ...request,
  }
  const isNew = host.isSince('4.8')
  const value = isNew ? asked.arg2 : asked.arg1
  switch (asked.subOperation) {
    case Sub.Thaw:
    case Sub.Destroy:
      return each(host, asked.client, (client) => host.freeze(client, false))
    case Sub.Freeze:
      return each(host, asked.client, (client) => host.freeze(client, true))
    case Sub.Flush: {
      if (asked.client !== allClients) return -1
      const pages = Math.ceil((value * 1024) / pageBytes)
      return host.giveBack(pages * pageBytes) / 1024
    }
    case Sub.List:
      return list(host, asked)
    case Sub.QueryFreeable:
      return Math.floor(host.freeableBytes / 2 ** 20)
    case Sub.SaveBegin:
      return saveBegin(host, asked.client, value !== 0)
    case Sub.SaveGetNextPage:
      return nextPage(host, asked)
    case Sub.SaveGetNextInvalidation:
      return nextInvalidation(host, asked)
    case Sub.SaveEnd:
      return saveEnd(host, asked.client)
    case Sub.RestoreBegin:
      return restoreBegin(host, asked.client)
    case Sub.RestorePutPage:
      return restorePut(host, asked)
    case Sub.RestoreFlushPage: {
      const pool = poolOf(host, asked)
      return pool === undefined ? -1 : host.flushPage(pool, asked.object, asked.arg2)
    }
    default:
      return isNew ? newControl(host, asked) : oldControl(host, asked)
  }
}

/** Sub-operations that were up to 4.7. */
function oldControl(host: XenHost, asked: Asked): number {
  const client = host.clients.get(asked.client)
  switch (asked.subOperation) {
    case Sub.SetWeight:
      return each(host, asked.client, (one) => host.setWeight(one, asked.arg1))
    case Sub.SetCap:
      return each(host, asked.client, (one) => {
        one.cap = asked.arg1
      })
    case Sub.SetCompress:
      if (asked.client === allClients && host.clients.size === 0 && host.isSince('4.5')) return -1
      return each(host, asked.client, (one) => {
        one.compress = asked.arg1 !== 0
      })
    case Sub.SaveGetVersion:
      return host.release === '4.0.0' ? 0 : 1
    case Sub.SaveGetMaxPools:
      return maxPools
    case Sub.SaveGetWeight:
      return client === undefined ? -1 : noMinusOne(client.weight)
    case Sub.SaveGetCap:
      return client === undefined ? -1 : noMinusOne(client.cap)
    case Sub.SaveGetFlags:
      if (client === undefined) return -1
      return (client.compress ? OldClientBit.Compress : 0) | (client.wasFrozen ? OldClientBit.FrozenBefore : 0)
  }
  const pool = poolOf(host, asked)
  switch (asked.subOperation) {
    case Sub.SaveGetPoolFlags: {
      if (pool === undefined) return -1
      // Before the corrections of 2012 the version was not told, and restoring failed for want of it.
      const hasVersion = host.release !== '4.0.0' && !(host.isOriginal && host.release === '4.0')
      return flagsOf(pool) | (hasVersion ? 1 << versionShift : 0)
    }
    case Sub.SaveGetPoolPages:
      if (pool === undefined) return -1
      return pool.isPersistent ? pool.census().pages : 0
    case Sub.SaveGetPoolUuid: {
      if (pool === undefined || !hasRoom(asked, 16)) return -1
      const view = new DataView(new ArrayBuffer(16))
      writeUuid(view, { at: 0, bytes: 8, count: 2 }, pool.uuid)
      if (!asked.buffer.write(0, new Uint8Array(view.buffer))) return -Errno.EFAULT
      // A missing break before the corrections of 2012: it went on into SAVE_END.
      if (host.isOriginal && host.release.startsWith('4.0')) return saveEnd(host, asked.client)
      return 0
    }
    default:
      return -1
  }
}

/** Up to 4.7 nobody said how long the buffer is. */
const hasRoom = ({ arg1 }: Asked, bytes: number): boolean => arg1 === 0 || arg1 >= bytes

/** Sub-operations that began with 4.8 or 4.9. */
function newControl(host: XenHost, asked: Asked): number {
  switch (asked.subOperation) {
    case Sub.GetClientInfo:
      return getClientInfo(host, asked)
    case Sub.SetClientInfo:
      return setClientInfo(host, asked)
    case Sub.GetPools:
      return getPools(host, asked)
    case Sub.SetPools:
    case Sub.SetAuth:
      return host.isSince('4.9') ? setPools(host, asked) : -1
    default:
      return -1
  }
}

/** Does it for a client, or for all of them; -1: there is none of that number. */
function each(host: XenHost, id: number, work: (client: Client) => void): number {
  if (id === allClients) {
    for (const client of host.clients.values()) work(client)
    return 0
  }
  const client = host.clients.get(id)
  if (client === undefined) return -1
  work(client)
  return 0
}

function poolOf(host: XenHost, { client, poolId }: Asked): XenPool | undefined {
  return poolId >>> 0 < maxPools ? host.clients.get(client)?.slots[poolId] : undefined
}

/** Values are signed to who reads them: a real -1 is told as -2. */
const noMinusOne = (value: number): number => ((value | 0) === -1 ? -2 : value | 0)

const flagsOf = (pool: XenPool): number =>
  (pool.isPersistent ? PoolBit.Persistent : 0) | (pool.isShared ? PoolBit.Shared : 0)

function list(host: XenHost, { client, arg1, arg2, buffer }: Asked): number {
  const text = listText(host, client, arg1, arg2 !== 0)
  if (text === undefined) return -1
  // Each line came with a zero behind it, which the next one overwrote.
  return text.length === 0 || buffer.write(0, new Uint8Array([...text, 0])) ? 0 : -Errno.EFAULT
}

// ---- Saving ---------------------------------------------------------------------------------------------------------

function saveBegin(host: XenHost, id: number, isLive: boolean): number {
  const client = host.clients.get(id)
  const hasPools = client?.slots.some((pool) => pool !== undefined) === true
  if (client === undefined || !hasPools) return host.isSince('4.8') ? -Errno.ENOENT : 0
  if (!client.isSaving || host.isOriginal) client.wasFrozen = client.isFrozen
  client.isSaving = true
  host.freeze(client, true)
  if (isLive) client.isMigrating = true
  // The original went on where the save before had ended.
  if (!host.isOriginal) for (const pool of client.slots) if (pool !== undefined) pool.saving = undefined
  return host.isSince('4.8') ? 0 : 1
}

function saveEnd(host: XenHost, id: number): number {
  const client = host.clients.get(id)
  if (client === undefined) return host.isSince('4.8') ? -Errno.ENOENT : -1
  client.isMigrating = false
  client.isSaving = false
  client.invalidations = []
  client.nextInvalidation = 0
  host.freeze(client, client.wasFrozen)
  if (!host.isOriginal) for (const pool of client.slots) if (pool !== undefined) pool.saving = undefined
  return 0
}

/** The names of all pages of a pool: 28 bytes and an object each while it is saved. */
function namesOf(pool: XenPool): PageName[] {
  const names: PageName[] = []
  pool.pool.walk!((object, index) => names.push({ poolId: 0, object, index }) > 0)
  return names
}

const where = (): Whereabouts => new Whereabouts()

/** SAVE_GET_NEXT_PAGE: 1 a page, 0 one that has gone meanwhile, -1 the end. */
function nextPage(host: XenHost, asked: Asked): Answer {
  const pool = poolOf(host, asked)
  if (pool === undefined || !pool.isPersistent) return -1
  const layout = handleLayout(host.release)
  if (asked.arg1 < layout.bytes + pageBytes) return -Errno.ENOMEM
  // The original began with the second page of the list, so that one was lost.
  pool.saving ??= { names: namesOf(pool), next: host.isOriginal ? 1 : 0 }
  const { saving } = pool
  const name = saving.names[saving.next]
  if (name === undefined) return -1
  if (host.isOriginal && host.isSince('4.4') && isUncompressed(host, pool, asked.client, name)) return -Errno.EINVAL
  saving.next++
  const record = new Uint8Array(layout.bytes + pageBytes)
  const page = record.subarray(layout.bytes)
  const found = (outcome: GetOutcome): number => {
    if (outcome !== GetOutcome.Hit) return 0
    writeHandle(host, record, { ...name, poolId: asked.poolId })
    return asked.buffer.write(0, record) ? 1 : -Errno.EFAULT
  }
  const outcome = pool.pool.get(name.object, name.index, page)
  if (outcome !== GetOutcome.Deferred) return found(outcome)
  return pool.pool.fetch(name.object, name.index, page).then(found)
}

/** Control buffers could not take pages that were kept as they are (4.4 and later). */
function isUncompressed(host: XenHost, pool: XenPool, id: number, { object, index }: PageName): boolean {
  if (host.clients.get(id)?.compress === false) return true
  const at = where()
  return pool.pool.whereIs?.(object, index, at) === true && at.huge
}

function writeHandle(host: XenHost, into: Uint8Array, { poolId, object, index }: PageName): void {
  const view = new DataView(into.buffer, into.byteOffset)
  const { fields } = handleLayout(host.release)
  writeField(view, fields.pool_id, poolId)
  writeField(view, fields.index, index)
  writeObject(view, fields.oid, object)
}

/** SAVE_GET_NEXT_INV: 1 a handle, 0 there are no more (then it begins anew). */
function nextInvalidation(host: XenHost, asked: Asked): number {
  const client = host.clients.get(asked.client)
  const record = new Uint8Array(handleLayout(host.release).bytes)
  if (client === undefined || asked.arg1 < record.length) return 0
  const name = client.invalidations[client.nextInvalidation]
  if (name === undefined) {
    client.nextInvalidation = 0
    return 0
  }
  writeHandle(host, record, name)
  if (!asked.buffer.write(0, record)) return -Errno.EFAULT
  client.nextInvalidation++
  return 1
}

// ---- Restoring ------------------------------------------------------------------------------------------------------

function restoreBegin(host: XenHost, id: number): number {
  const isNew = host.isSince('4.8')
  if (host.clients.has(id)) return isNew ? -Errno.EEXIST : -1
  if (host.clientOf(id) === undefined) return isNew ? -Errno.ENOMEM : -1
  return isNew ? 0 : 1
}

function restorePut(host: XenHost, asked: Asked): number {
  const pool = poolOf(host, asked)
  const client = host.clients.get(asked.client)
  if (pool === undefined || client === undefined) return -1
  if (host.isSince('4.4') && asked.arg1 !== pageBytes) return -Errno.EINVAL
  if (host.isOriginal && host.isSince('4.4') && !client.compress) return -Errno.EINVAL
  const page = new Uint8Array(pageBytes)
  if (!asked.buffer.read(0, page)) return -Errno.EFAULT
  return host.put(client, pool, asked.object, asked.arg2, page)
}

// ---- Structures of 4.8 and later
// --------------------------------------------------------------------------------------

function getClientInfo(host: XenHost, { client: id, buffer }: Asked): number {
  const { bytes, fields } = clientInfoLayout
  const view = new DataView(new ArrayBuffer(bytes))
  writeField(view, fields.version, 1)
  writeField(view, fields.maxpools, maxPools)
  const client = host.clients.get(id)
  if (client !== undefined) {
    writeField(view, fields.nr_pools, client.slots.filter((pool) => pool !== undefined).length)
    writeField(
      view,
      fields.flags,
      (client.isFrozen ? ClientBit.Frozen : 0) |
        (client.compress ? ClientBit.Compress : 0) |
        (client.isMigrating ? ClientBit.Migrating : 0),
    )
    writeField(view, fields.weight, client.weight)
  }
  return buffer.write(0, new Uint8Array(view.buffer)) ? 0 : -Errno.EFAULT
}

function setClientInfo(host: XenHost, { client: id, buffer }: Asked): number {
  const isThere = id === allClients ? host.clients.size > 0 : host.clients.has(id)
  if (!isThere) return -Errno.ENOENT
  const { bytes, fields } = clientInfoLayout
  const info = new Uint8Array(bytes)
  if (!buffer.read(0, info)) return -Errno.EFAULT
  const view = new DataView(info.buffer)
  if (readField(view, fields.version) !== 1) return -Errno.EOPNOTSUPP
  if (readField(view, fields.maxpools) > maxPools) return -Errno.ERANGE
  return each(host, id, (client) => {
    host.setWeight(client, readField(view, fields.weight))
    client.compress = (readField(view, fields.flags) & ClientBit.Compress) !== 0
  })
}

/** Entries of an array of pool information, or what is wrong with its length. */
function entriesOf({ arg1 }: Asked): number {
  if (arg1 % poolInfoLayout.bytes !== 0) return -Errno.EINVAL
  const entries = arg1 / poolInfoLayout.bytes
  return entries > maxPools ? -Errno.E2BIG : entries
}

function getPools(host: XenHost, asked: Asked): number {
  const entries = entriesOf(asked)
  if (entries < 0) return entries
  const client = host.clients.get(asked.client)
  if (client === undefined) return -Errno.EINVAL
  const { bytes, fields } = poolInfoLayout
  let written = 0
  for (const [slot, pool] of client.slots.entries()) {
    if (pool === undefined) continue
    const view = new DataView(new ArrayBuffer(bytes))
    writeField(view, fields.flags, flagsOf(pool) | (1 << versionShift))
    writeField(view, fields.id, slot)
    writeField(view, fields.n_pages, pool.census().pages)
    writeUuid(view, fields.uuid, pool.uuid)
    if (!asked.buffer.write(written * bytes, new Uint8Array(view.buffer))) return -Errno.EFAULT
    // Looked at after the first one: a length of 0 writes one, too.
    if (++written >= entries) break
  }
  return written
}

/** SET_POOLS and SET_AUTH: what comes before an entry that fails stays done. */
function setPools(host: XenHost, asked: Asked): number {
  const entries = entriesOf(asked)
  if (entries < 0) return entries
  const { bytes, fields } = poolInfoLayout
  const isAuth = asked.subOperation === Sub.SetAuth
  // The original could not reach the switch for everybody: it looked for a client of that number.
  const forAll = isAuth && asked.client === allClients && !host.isOriginal
  const client = forAll ? undefined : host.clientOf(asked.client)
  if (client === undefined && !forAll) return -Errno.ENOMEM
  let last = 0
  for (let n = 0; n < entries; n++) {
    const info = new Uint8Array(bytes)
    if (!asked.buffer.read(n * bytes, info)) return -Errno.EFAULT
    const view = new DataView(info.buffer)
    if (readField(view, fields.n_pages) !== 0) return -Errno.EINVAL
    const flags = readField(view, fields.flags)
    const uuid = readUuid(view, fields.uuid)
    if (isAuth) {
      const isPermitted = (flags & authBit) !== 0
      last =
        client === undefined ? host.authorize(allClients, uuid, isPermitted) : host.permit(client, uuid, isPermitted)
    } else {
      const wanted = readField(view, fields.id)
      last = host.newPool(client!, Math.min(wanted, maxPools), flags, uuid)
      if (last >= 0) {
        writeField(view, fields.id, last)
        if (!asked.buffer.write(n * bytes, info)) return -Errno.EFAULT
      }
    }
    if (last < 0) return last
  }
  // Meant was the number of entries; what came was what the last one answered, unless that was 0.
  return last !== 0 ? last : entries
}

/** Bit 2 of the flags of a pool in SET_AUTH. */
const authBit = 4
