/**
 * The options of a client, from its greeting to the choice of an export: what is answered, and what follows.
 *
 * Knows no buffers: it gets options whole, and hands its replies on. Whatever an option says, either it is answered or
 * the connection ends; nothing that was agreed on for one export holds for another.
 *
 * Source: doc/proto.md of NetworkBlockDevice/nbd.
 */
import type { BlockDevice } from '@tmem/core'
import {
  ExportFlag,
  Handshake,
  Info,
  MAXIMUM_PAYLOAD,
  MAXIMUM_STRING,
  OPTION_REPLY,
  Option,
  Reply,
} from './protocol.ts'
import type { Slices } from './slices.ts'

/** What is counted for each export. */
export interface ExportCounters {
  reads: number
  writes: number
  bytesRead: number
  bytesWritten: number
  flushes: number
  trims: number
  zeroes: number
  caches: number
  statuses: number
  resizes: number
  /** Requests that were answered with an error. */
  errors: number
}

/** An export as it is served. */
export interface Served {
  readonly name: string
  /** The name as it is sent. */
  readonly nameBytes: Buffer
  readonly description: Buffer | undefined
  readonly device: BlockDevice
  readonly readOnly: boolean
  /** Clients may change the size. */
  readonly resizable: boolean
  /** Others than clients use the device now. */
  readonly isUsedElsewhere: () => boolean
  /** Connections in transmission. */
  connections: number
  readonly slices: Slices
  readonly counters: ExportCounters
}

/** How a connection stands to TLS: not offered, offered, insisted upon, or in use. */
export type TlsState = 'none' | 'optional' | 'required' | 'on'

/** How a client stands to the server. */
export interface Standing {
  readonly tls: TlsState
  /** TLS can begin on this connection. */
  readonly canSecure: boolean
  /** Why the client may not have anything, whatever it asks for: each option is answered with it. */
  readonly refusal?: string | undefined
  /** The client would send requests from now on. Answers why it may not. */
  admit(): string | undefined
}

/** Longest option that is looked at: a name, and some queries. */
export const MAXIMUM_OPTION: number = 2 * MAXIMUM_STRING
/** Number of `base:allocation` in BLOCK_STATUS. */
export const CONTEXT_ID = 1
const contextName = Buffer.from('base:allocation')

/**
 * What follows an option: another one, the end (in order, or because the client broke the rules), TLS, or requests to
 * an export.
 */
export type Next = 'more' | 'end' | 'broken' | 'tls' | Served

/** What one client asks for and gets. */
export class Negotiation {
  readonly #exports: ReadonlyMap<string, Served>
  readonly #standing: Standing
  readonly #send: (reply: Buffer) => void
  /** What the client said in its greeting. */
  clientFlags = 0
  structured = false
  /** Export for which `base:allocation` was selected. */
  contextOf: Served | undefined
  /** It was told that it needs TLS. */
  needsTls = false

  constructor(exports: ReadonlyMap<string, Served>, standing: Standing, send: (reply: Buffer) => void) {
    this.#exports = exports
    this.#standing = standing
    this.#send = send
  }

  /** Answers an option; STARTTLS, where it is possible, is to be answered by whoever can begin it. */
  option(option: number, body: Buffer): Next {
    const { tls, canSecure, refusal } = this.#standing
    if (refusal !== undefined && option !== Option.ABORT) {
      if (option === Option.EXPORT_NAME) return 'broken'
      this.reply(option, Reply.ERR_POLICY, message(refusal))
      return 'more'
    }
    if (tls === 'required' && option !== Option.STARTTLS && option !== Option.ABORT) {
      this.needsTls = true
      if (option === Option.EXPORT_NAME) return 'broken'
      this.reply(option, Reply.ERR_TLS_REQD, message('TLS is required'))
      return 'more'
    }
    switch (option) {
      case Option.EXPORT_NAME:
        return this.#exportName(body)
      case Option.ABORT:
        this.reply(option, Reply.ACK)
        return 'end'
      case Option.LIST:
        this.#list(body)
        return 'more'
      case Option.STARTTLS:
        if (body.length > 0 || tls === 'on') this.reply(Option.STARTTLS, Reply.ERR_INVALID)
        else if (tls !== 'none' && canSecure) return 'tls'
        else this.reply(Option.STARTTLS, Reply.ERR_POLICY, message('TLS is not offered here'))
        return 'more'
      case Option.INFO:
      case Option.GO:
        return this.#info(option, body)
      case Option.STRUCTURED_REPLY:
        if (body.length > 0) this.reply(option, Reply.ERR_INVALID, message('the option has no data'))
        else {
          this.structured = true
          this.reply(option, Reply.ACK)
        }
        return 'more'
      case Option.LIST_META_CONTEXT:
      case Option.SET_META_CONTEXT:
        this.#metaContext(option, body)
        return 'more'
      default:
        this.reply(option, Reply.ERR_UNSUP)
        return 'more'
    }
  }

  /** Answers an option that is longer than `MAXIMUM_OPTION`. */
  tooLong(option: number): void {
    this.reply(option, Reply.ERR_TOO_BIG, message('the option is too long'))
  }

  /** Sends a reply to an option. */
  reply(option: number, type: number, payload?: Buffer): void {
    const header = Buffer.alloc(20)
    header.writeUInt32BE(OPTION_REPLY[0], 0)
    header.writeUInt32BE(OPTION_REPLY[1], 4)
    header.writeUInt32BE(option, 8)
    header.writeUInt32BE(type, 12)
    header.writeUInt32BE(payload?.length ?? 0, 16)
    this.#send(header)
    if (payload !== undefined) this.#send(payload)
  }

  #exportName(name: Buffer): Next {
    const served = this.#exports.get(name.toString())
    if (served === undefined || this.#standing.admit() !== undefined) return 'broken'
    const padding = (this.clientFlags & Handshake.NO_ZEROES) === 0 ? 124 : 0
    const answer = Buffer.alloc(10 + padding)
    answer.writeBigUInt64BE(BigInt(served.device.sizeBytes), 0)
    answer.writeUInt16BE(this.#exportFlags(served), 8)
    this.#send(answer)
    return served
  }

  #list(body: Buffer): void {
    if (body.length > 0) {
      this.reply(Option.LIST, Reply.ERR_INVALID, message('the option has no data'))
      return
    }
    // The default export is there under two names.
    for (const { nameBytes, description } of new Set(this.#exports.values())) {
      const entry = Buffer.alloc(4 + nameBytes.length + (description?.length ?? 0))
      entry.writeUInt32BE(nameBytes.length, 0)
      nameBytes.copy(entry, 4)
      description?.copy(entry, 4 + nameBytes.length)
      this.reply(Option.LIST, Reply.SERVER, entry)
    }
    this.reply(Option.LIST, Reply.ACK)
  }

  #info(option: number, body: Buffer): Next {
    const nameLength = body.length >= 6 ? body.readUInt32BE(0) : Number.POSITIVE_INFINITY
    const requests = nameLength <= body.length - 6 ? body.readUInt16BE(4 + nameLength) : -1
    if (requests < 0 || body.length !== 6 + nameLength + 2 * requests || nameLength > MAXIMUM_STRING) {
      this.reply(option, Reply.ERR_INVALID, message('the lengths do not fit'))
      return 'more'
    }
    const served = this.#exports.get(body.toString('utf8', 4, 4 + nameLength))
    if (served === undefined) {
      this.reply(option, Reply.ERR_UNKNOWN, message('there is no such export'))
      return 'more'
    }
    const refusal = option === Option.GO ? this.#standing.admit() : undefined
    if (refusal !== undefined) {
      this.reply(option, Reply.ERR_POLICY, message(refusal))
      return 'more'
    }
    const { device, nameBytes, description } = served
    const about = Buffer.alloc(12)
    about.writeUInt16BE(Info.EXPORT, 0)
    about.writeBigUInt64BE(BigInt(device.sizeBytes), 2)
    about.writeUInt16BE(this.#exportFlags(served), 10)
    this.reply(option, Reply.INFO, about)
    const sizes = Buffer.alloc(14)
    sizes.writeUInt16BE(Info.BLOCK_SIZE, 0)
    sizes.writeUInt32BE(device.blockSize, 2)
    sizes.writeUInt32BE(Math.max(device.preferredBlockSize, device.blockSize, 512), 6)
    sizes.writeUInt32BE(MAXIMUM_PAYLOAD, 10)
    this.reply(option, Reply.INFO, sizes)
    for (let n = 0; n < requests; n++) {
      const wanted = body.readUInt16BE(6 + nameLength + 2 * n)
      if (wanted === Info.NAME) this.reply(option, Reply.INFO, labelled(Info.NAME, nameBytes))
      if (wanted === Info.DESCRIPTION && description !== undefined)
        this.reply(option, Reply.INFO, labelled(Info.DESCRIPTION, description))
    }
    this.reply(option, Reply.ACK)
    return option === Option.GO ? served : 'more'
  }

  #metaContext(option: number, body: Buffer): void {
    if (option === Option.SET_META_CONTEXT) this.contextOf = undefined
    const asked = this.structured ? contextQueries(body) : undefined
    if (asked === undefined) {
      this.reply(option, Reply.ERR_INVALID, message('needs structured replies, and lengths that fit'))
      return
    }
    if (!this.#exports.has(asked.name)) {
      this.reply(option, Reply.ERR_UNKNOWN, message('there is no such export'))
      return
    }
    const { queries } = asked
    const setting = option === Option.SET_META_CONTEXT
    const exact = queries.includes('base:allocation')
    if (exact || (!setting && (queries.length === 0 || queries.includes('base:')))) {
      const answer = Buffer.alloc(4 + contextName.length)
      answer.writeUInt32BE(setting ? CONTEXT_ID : 0, 0)
      contextName.copy(answer, 4)
      this.reply(option, Reply.META_CONTEXT, answer)
      if (setting) this.contextOf = this.#exports.get(asked.name)
    }
    this.reply(option, Reply.ACK)
  }

  #exportFlags(served: Served): number {
    const { HAS_FLAGS, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN, SEND_CACHE, SEND_DF } = ExportFlag
    let flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE
    if (this.structured) flags |= SEND_DF
    if (served.readOnly) return flags | ExportFlag.READ_ONLY
    flags |= ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES | ExportFlag.SEND_FAST_ZERO
    return served.resizable ? flags | ExportFlag.SEND_RESIZE : flags
  }
}

/** Text that goes with an error reply. */
const message = (text: string): Buffer => Buffer.from(text)

/** An NBD_INFO item that is a string. */
function labelled(type: number, text: Buffer): Buffer {
  const item = Buffer.alloc(2 + text.length)
  item.writeUInt16BE(type, 0)
  text.copy(item, 2)
  return item
}

/** Data of (SET_|LIST_)META_CONTEXT; `undefined` when the lengths do not fit. */
function contextQueries(body: Buffer): { name: string; queries: string[] } | undefined {
  let at = 0
  const number = (): number => {
    if (at + 4 > body.length) return -1
    at += 4
    return body.readUInt32BE(at - 4)
  }
  const text = (): string | undefined => {
    const length = number()
    if (length < 0 || length > MAXIMUM_STRING || at + length > body.length) return undefined
    at += length
    return body.toString('utf8', at - length, at)
  }
  const name = text()
  const count = number()
  if (name === undefined || count < 0) return undefined
  const queries: string[] = []
  for (let n = 0; n < count; n++) {
    const query = text()
    if (query === undefined) return undefined
    queries.push(query)
  }
  return at === body.length ? { name, queries } : undefined
}
