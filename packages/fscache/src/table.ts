/**
 * The table of URLs: cached files, targets of redirects, and URLs that cannot be cached.
 *
 * Invariants:
 *  - An ETag names a version of one URL; after a redirect, of the final URL. A redirect with another end is another
 *    file.
 *  - An entry is complete, or it is still arriving and valid only as a whole; then only its requester reads it.
 *  - The table is bounded: files by number and by the length of their headers, and URLs that are not cached likewise.
 *
 * Source: RFC 9111 §3.1 (headers that are not kept), §4.3.4 (headers of a 304), §4.4 (invalidation).
 */
import { randomUUID } from 'node:crypto'
import { isEncoded, isSame, isStrong, lengthOf, targetOf } from './answers.ts'
import { Fill } from './body.ts'
import type { Cookie, FsCache, Volume } from './cookies.ts'
import { Freshness } from './freshness.ts'
import type { Asked, Fields } from './request.ts'
import { FixedHeaders, fixed, withFields } from './response.ts'

/** Counters. */
export interface HttpFilesCounters {
  /** Requests to servers: all; those answered 304; those for ranges, and the bytes that came for the cache. */
  requests: number
  notModified: number
  ranges: number
  bytesFetched: number
  /** Pages answered from the cache, and those fetched. */
  pagesCached: number
  pagesFetched: number
  /** Answers from the cache without a request: they were fresh. */
  fresh: number
  /** Answers passed through because they may not or cannot be cached. */
  uncached: number
  /** Answers that a plain client would not have got, each followed by a plain GET. */
  surprises: number
  /** Times that a server had another version. */
  changes: number
}

/** A file that is only good as a whole is not kept when it is larger. */
export const largestWhole: number = 16 * 2 ** 20
/** Bytes of URLs and headers that a file may have on average. */
export const averageWeight = 4096

/** A server, while there are files of it. */
interface Server {
  readonly origin: string
  readonly volume: Volume
  files: number
}

/** Pages on their way, from the `first` on. */
export interface Way {
  readonly first: number
  readonly pages: Promise<Uint8Array[]>
}

/** What is known of a file on a server. */
export interface Entry {
  /** The URL, and the headers of the request. */
  readonly key: string
  readonly url: string
  /** Where the redirects ended, if there were any; otherwise the URL. */
  readonly target: string
  readonly type: Response['type']
  readonly server: Server
  readonly cookie: Cookie
  /** As the server sent it; the version of the cookie only with `parts`. */
  readonly etag: string
  /** True: it has a strong ETag, its length is known, and it is sent as it is. So parts of it may be asked for. */
  readonly parts: boolean
  /** False while a file that is only good as a whole is coming. */
  complete: boolean
  /** Status text and headers of the last full answer, with those of later ones that said that it is still good. */
  statusText: string
  headers: Headers
  freshness: Freshness
  /** Who has it open. */
  users: number
  /** Bytes of what is known of it, about. */
  weight: number
  /** How pages are on their way, by index. */
  coming: Map<number, Way> | undefined
  /** The whole file, from a server that was asked for a part. */
  fill: Fill | undefined
}

/**
 * A question to a server, until it is answered. What is written meanwhile overtakes it: then the answer is not kept.
 */
export interface Question {
  readonly url: string
  overtaken: boolean
}

/**
 * What is not cached: `alone`, its answers could not be; `plain`, questions about it had surprising answers. `broken`:
 * the connection broke at a question, which may have been chance once.
 */
export type Note = 'alone' | 'broken' | 'plain'

export class Table {
  readonly #cache: FsCache
  readonly #counters: HttpFilesCounters
  readonly #limit: number
  /** In the order of their last use. */
  readonly #entries = new Map<string, Entry>()
  readonly #notes = new Map<string, Note>()
  /** Where redirects led the last time. */
  readonly #targets = new Map<string, string>()
  /** Versions that HEAD tells of files of which GET tells another. */
  readonly #doubts = new Map<string, string>()
  readonly #servers = new Map<string, Server>()
  readonly #questions = new Set<Question>()
  #weight = 0

  constructor(cache: FsCache, counters: HttpFilesCounters, limit: number) {
    this.#cache = cache
    this.#counters = counters
    this.#limit = limit
  }

  /** Forgets all. */
  clear(): void {
    for (const entry of this.#entries.values()) this.remove(entry)
    this.#notes.clear()
    this.#doubts.clear()
    this.#targets.clear()
  }

  /** A file is closed by who had it open. */
  release(entry: Entry): void {
    entry.users--
    if (entry.users === 0) void this.abandon(entry)
    this.#trim()
  }

  /** A server is asked about a URL: until `answered`, that can be overtaken. */
  ask(url: string): Question {
    const question: Question = { url, overtaken: false }
    this.#questions.add(question)
    return question
  }

  answered(question: Question): void {
    this.#questions.delete(question)
  }

  /** What is known of a URL, good or not. */
  get(key: string): Entry | undefined {
    return this.#entries.get(key)
  }

  /** What is known of a file, as far as it can be used. */
  known({ key }: Asked): Entry | undefined {
    const entry = this.#entries.get(key)
    if (entry === undefined || !entry.complete || !entry.cookie.enabled) return undefined
    return this.used(entry)
  }

  /** It is used: it goes last. */
  used(entry: Entry): Entry {
    this.#entries.delete(entry.key)
    this.#entries.set(entry.key, entry)
    return entry
  }

  /** Whether a redirect has led there before: to an address that is used once there is no second time. */
  settled(key: string, target: string): boolean {
    const before = this.#targets.get(key)
    this.#targets.delete(key)
    this.#targets.set(key, target)
    shorten(this.#targets, this.#limit)
    return before === target
  }

  /** What is noted of a URL. */
  noted(key: string): Note | undefined {
    return this.#notes.get(key)
  }

  unnote(key: string): void {
    this.#notes.delete(key)
  }

  note(key: string, note: Note): void {
    this.#notes.delete(key)
    this.#notes.set(key, note)
    shorten(this.#notes, this.#limit)
  }

  /** Whether HEAD has told this version of a file of which GET told another. */
  doubted(url: string, version: string): boolean {
    return this.#doubts.get(url) === version
  }

  /**
   * Remembers a file, before its first byte has come; `weight` is that of its URL and headers. What was known of it
   * goes.
   */
  keep(
    { key, url, fields: wanted }: Pick<Asked, 'key' | 'url' | 'fields'>,
    response: Pick<Response, 'headers' | 'statusText' | 'type' | 'url'>,
    freshness: Freshness,
    weight: number,
  ): Entry {
    const { headers, statusText, type } = response
    const target = targetOf(response, url)
    const version = headers.get('etag') ?? ''
    const size = lengthOf(headers)
    const parts = isStrong(version) && size !== undefined && !isEncoded(headers)
    const known = this.#entries.get(key)
    if (known !== undefined && parts && known.target === target && isSame(response, known)) {
      known.statusText = statusText
      this.#update(known, wanted, keptOf(fixed(response)))
      return known
    }
    if (known !== undefined) this.#counters.changes++
    this.forget(key)
    // Up to its path: an address is not parsed twice.
    const origin = target === url ? url.slice(0, url.indexOf('/', 'https://'.length)) : new URL(target).origin
    const server = this.#serverOf(origin)
    // Several URLs may lead to one: each has its own pages of it.
    const name = target === url ? key : `${key} ${target}`
    const auxiliary = parts ? { version, size } : { version: `${version} ${randomUUID()}`, size: 0 }
    const entry: Entry = {
      key,
      url,
      target,
      type,
      server,
      cookie: server.volume.acquireCookie(name, auxiliary),
      etag: version,
      parts,
      complete: parts,
      statusText,
      headers: keptOf(fixed(response)),
      freshness,
      users: 0,
      weight,
      coming: undefined,
      fill: undefined,
    }
    this.#entries.set(key, entry)
    this.#weight += weight
    this.#trim(entry)
    return entry
  }

  #serverOf(origin: string): Server {
    let server = this.#servers.get(origin)
    if (server === undefined) {
      server = { origin, volume: this.#cache.acquireVolume(origin, { shared: true }), files: 0 }
      this.#servers.set(origin, server)
    }
    server.files++
    return server
  }

  /** The body of an answer, from which the pages of a file are kept. */
  fill(entry: Entry, response: Response, start: number, end: number | undefined, exact: boolean): Fill {
    const { cookie, parts, url } = entry
    const counters = this.#counters
    return new Fill({
      response,
      cookie,
      pageSize: this.#cache.pageSize,
      start,
      ...(end === undefined ? {} : { end }),
      exact,
      limit: parts ? Number.MAX_SAFE_INTEGER : largestWhole,
      name: url,
      received: (bytes: number, pages: number) => {
        counters.bytesFetched += bytes
        counters.pagesFetched += pages
      },
      ended: (size: number | undefined) => {
        const mine = this.#entries.get(entry.key) === entry
        if (!parts && size !== undefined && size <= largestWhole) entry.complete = true
        // Another length than was said, or no use without its end.
        else if (mine && (parts ? !exact && size !== undefined && size !== end : true)) this.forget(entry.key)
      },
    })
  }

  /** The server says that what is known is still good: with what it says of it now. */
  renew({ fields: wanted }: Pick<Asked, 'fields'>, entry: Entry, response: Response): void {
    // An ETag that is the same, but for being weak or not, is that of the compressed file or not.
    const news = [...response.headers].filter(([name]) => !ofBody.has(name) && (name !== 'etag' || entry.etag === ''))
    this.#update(entry, wanted, keptOf(withFields(entry.headers, news)))
  }

  #update(entry: Entry, wanted: Fields, headers: Headers): void {
    const fields = [...headers]
    entry.headers = headers
    entry.freshness = new Freshness(entry.url, wanted, fields)
    const weight = weightOf(entry.key, entry.target, fields)
    if (this.#entries.get(entry.key) !== entry) return
    this.#weight += weight - entry.weight
    entry.weight = weight
    // It may have been told not to keep it.
    if (entry.freshness.storable) this.#trim(entry)
    else this.remove(entry, true)
  }

  /** The server has another version: nobody may be given the old one any more. */
  changed(entry: Entry, version: string): void {
    if (entry.cookie.version !== version) return
    this.#counters.changes++
    this.#doubts.delete(entry.url)
    this.#doubts.set(entry.url, version)
    shorten(this.#doubts, this.#limit)
    this.forget(entry.key)
  }

  /** Something may have changed at a URL. */
  wrote(url: string | undefined): void {
    for (const question of this.#questions) if (question.url === url) question.overtaken = true
    for (const entry of this.#entries.values()) if (entry.url === url || entry.target === url) this.forget(entry.key)
  }

  forget(key: string): void {
    const entry = this.#entries.get(key)
    if (entry !== undefined) this.remove(entry, true)
  }

  /** An entry goes; with `retire` its pages, too. */
  remove(entry: Entry, retire = false): void {
    this.#entries.delete(entry.key)
    this.#weight -= entry.weight
    entry.coming?.clear()
    // Open files hold on to a cookie without a version: their next read says that it is stale.
    if (retire && entry.users > 0) entry.cookie.invalidate({ version: '', size: 0 })
    entry.cookie.relinquish(retire)
    const { server } = entry
    if (--server.files === 0) {
      this.#servers.delete(server.origin)
      server.volume.relinquish()
    }
    if (entry.fill !== undefined) void this.abandon(entry)
  }

  /** Nobody reads on. */
  async abandon(entry: Entry): Promise<void> {
    const { fill } = entry
    entry.fill = undefined
    await fill?.leave()
  }

  /** Files that nobody has open are forgotten, the ones longest unused first; their pages stay. */
  #trim(keep?: Entry): void {
    for (const entry of this.#entries.values()) {
      if (this.#entries.size <= this.#limit && this.#weight <= this.#limit * averageWeight) return
      if (entry.users > 0 || entry === keep) continue
      this.remove(entry, !entry.complete)
    }
  }
}

/** Headers that describe a body: a 304 has none. */
const ofBody: ReadonlySet<string> = new Set([
  'content-length',
  'content-encoding',
  'content-md5',
  'content-range',
  'transfer-encoding',
])
/** Headers of a file, without those that are of the connection that it came over (RFC 9111 §3.1). */
function keptOf(headers: Headers): Headers {
  const connection = headers.get('connection')
  if (connection === null || /^(keep-alive|close)$/i.test(connection)) return headers
  const kept = new Headers(headers)
  for (const name of connection.split(',')) {
    const trimmed = name.trim().toLowerCase()
    if (/^[!#$%&'*+.^_`|~0-9a-z-]+$/.test(trimmed) && trimmed !== 'keep-alive') kept.delete(trimmed)
  }
  return new FixedHeaders(kept)
}

/** The headers of an answer that is so many seconds old. */
export function withAge(headers: Headers, seconds: number): FixedHeaders {
  return withFields(headers, [['age', String(seconds)]])
}

/** The oldest go until few enough are left. */
function shorten(map: Map<string, unknown>, limit: number): void {
  for (const oldest of map.keys()) {
    if (map.size <= limit) return
    map.delete(oldest)
  }
}

/** Bytes of what is remembered of an answer, about: names and values are kept twice. */
export function weightOf(key: string, target: string, fields: Fields): number {
  let length = 2 * key.length + target.length
  for (const [name, value] of fields) length += 2 * (name.length + value.length)
  return length
}
