/**
 * Files of HTTP servers: `fetch` with a cache behind it, and files that are read by pages.
 *
 * `fetch` is one plain GET whose body fills the cache as it passes by. A later request gets the bytes from the cache if
 * the server has allowed that (freshness) or confirms them (one conditional GET). Missing bytes come with one range
 * request with `If-Range`, which a server with a newer version answers with the whole file.
 *
 * Invariants:
 *  - Never worse than `fetch`: if a server answers a request that a plain client would not send in an unexpected way,
 *    before the first byte is delivered, a plain GET follows, and that URL gets no such request again. There is at most
 *    one request more than with a plain client.
 *  - All bytes of a body, and of an open file, are of one version. Only a strong ETag names a version; a file without
 *    one is kept under a name that is used once, and served only when it is complete.
 *  - An answer is given only to requests with the same headers as its original request.
 *
 * table.ts has the URLs, freshness.ts the freshness of answers, body.ts the bodies, parts.ts the open files.
 *
 * Source: RFC 9110 (conditional requests §13, range requests §14), RFC 9111 §4 (using stored answers).
 */
import { checkOptions, untilAborted } from '@tmem/core'
import { turn } from '@tmem/core/runtime'
import { isEncoded, isMeant, isPart, isSame, isStrong, lengthOf, rangeOf, targetOf } from './answers.ts'
import { type Fill, type Look, lookAt, pieceBytes, Source } from './body.ts'
import { type FsCache, ReadOutcome } from './cookies.ts'
import { Freshness } from './freshness.ts'
import { HttpFile, Parts, stale } from './parts.ts'
import { type Asked, addressOf, askedBy, asking, type Fetch, identity } from './request.ts'
import { CachedResponse } from './response.ts'
import {
  averageWeight,
  type Entry,
  type HttpFilesCounters,
  largestWhole,
  type Note,
  type Question,
  Table,
  weightOf,
  withAge,
} from './table.ts'

/** Settings of `HttpFiles`. */
export interface HttpFilesOptions {
  /** May be that of other `HttpFiles`, too: they find each other's pages. */
  readonly cache: FsCache
  /** How to talk to servers (default: this runtime's `fetch`). */
  readonly fetch?: Fetch
  /**
   * Files that are remembered while nobody has them open (default 1024), with 4 KiB of URLs and headers each on
   * average.
   */
  readonly files?: number
}

/** Bytes of a file that are copied from the cache before the first one is delivered. */
const ahead = largestWhole
/** An answer of this size is rather taken than broken off: a new connection costs as much. */
const smallBody = 65_536
/** Answers that a plain client would have got, too. */
const settled: ReadonlySet<number> = new Set([404, 410, 429, 503])
/** Answers to HEAD that a GET would get, too. */
const absent: ReadonlySet<number> = new Set([404, 410])

/** What one request found out for all who asked the same at the same time. */
interface Found {
  readonly entry: Entry
  readonly fill?: Fill
}

export class HttpFiles {
  readonly cache: FsCache
  readonly counters: HttpFilesCounters = {
    requests: 0,
    notModified: 0,
    ranges: 0,
    bytesFetched: 0,
    pagesCached: 0,
    pagesFetched: 0,
    fresh: 0,
    uncached: 0,
    surprises: 0,
    changes: 0,
  }
  readonly #fetch: Fetch
  readonly #table: Table
  readonly #parts: Parts
  /** Requests that others may wait for. */
  readonly #flights = new Map<string, Promise<Found | undefined>>()

  constructor(options: HttpFilesOptions) {
    checkOptions('HttpFiles', options, { cache: 'object', fetch: 'function?', files: 'number?' })
    const { cache, files = 1024, fetch = globalThis.fetch } = options
    if (!Number.isInteger(files) || files < 1) throw new RangeError(`files must be a positive integer, got ${files}`)
    this.cache = cache
    this.#fetch = (input, init) => {
      this.counters.requests++
      return fetch(input, init)
    }
    this.#table = new Table(cache, this.counters, files)
    this.#parts = new Parts(cache, this.#table, this.counters, this.#fetch)
  }

  /**
   * As `fetch` of the runtime, of which it takes everything; it need not be called as a method. A GET without headers
   * that make it a question of its own (ranges, conditions, credentials) is answered with pages from the cache, as far
   * as RFC 9111 allows and as far as they are there. A method that changes something forgets the file. Everything else
   * is passed on. Rejects as `fetch` does, and so does the body; one of more than 16 MiB, whose pages are dropped while
   * it is read, also with `StaleFileError`, when the server has another version.
   */
  readonly fetch: Fetch = async (input, init) => {
    const asked = askedBy(this.#fetch, input, init)
    if (asked !== undefined) return this.#answer(asked)
    this.counters.uncached++
    const method = init?.method ?? (input instanceof Request ? input.method : 'GET')
    if (/^(get|head|options)$/i.test(method)) return this.#fetch(input, init)
    const url = addressOf(input)
    try {
      const response = await this.#fetch(input, init)
      // RFC 9111 §4.4: what the answer names, too, if it is the same server's.
      for (const name of ['location', 'content-location']) {
        const other = response.headers.get(name)
        if (url === undefined || other === null || !URL.canParse(other, url)) continue
        const named = new URL(other, url)
        named.hash = ''
        if (named.origin === new URL(url).origin) this.#table.wrote(named.href)
      }
      return response
    } finally {
      this.#table.wrote(url)
    }
  }

  /**
   * Opens a file: one request without a body, or none while the last answer is fresh; where HEAD is refused, a GET.
   * Rejects with `Error` when the server answers neither 200 nor 304, or when the file has no strong ETag or no length
   * (see `fetch` for those).
   */
  async open(url: string | URL, signal?: AbortSignal): Promise<HttpFile> {
    const href = new URL(url)
    href.hash = ''
    const answer = await this.#validate(href.href, signal)
    if (answer instanceof Response)
      throw new Error(
        answer.ok
          ? `${href.href} cannot be read by pages: it has no strong ETag, no length, or says no-store`
          : `${href.href}: the server answers ${answer.status} ${answer.statusText}`.trim(),
      )
    answer.users++
    return new HttpFile(this.#parts, answer)
  }

  /**
   * Forgets all files; their pages stay in the cache, for who opens the same version again. Who reads one goes on
   * without a cache.
   */
  close(): void {
    this.#table.clear()
  }

  /** Answers from the cache, or lets one request answer all who ask for the same at the same time. */
  async #answer(asked: Asked): Promise<Response> {
    const { key, signal } = asked
    signal?.throwIfAborted()
    const entry = this.#table.known(asked)
    // A redirect is asked for each time: nothing is known of how long it is good.
    const unasked = entry?.target === asked.url && asked.cache === 'default' && entry.freshness.serves(asked.fields)
    if (entry !== undefined && unasked) {
      const look = await this.#look(entry)
      if (look.first === look.last) {
        this.counters.fresh++
        return this.#fromCache(asked, entry, look, undefined, true)
      }
    }
    const note = this.#table.noted(key)
    if (asked.cache === 'reload' || note === 'alone' || note === 'plain') return this.#plain(asked)
    const flight = this.#flights.get(key)
    if (flight !== undefined) {
      const found = await untilAborted(flight, signal)
      return found === undefined ? this.#plain(asked) : this.#join(asked, found)
    }
    let land: (found?: Found) => void = () => undefined
    const mine = new Promise<Found | undefined>((resolve) => {
      land = resolve
    })
    this.#flights.set(key, mine)
    try {
      return await this.#ask(asked, land)
    } finally {
      if (this.#flights.get(key) === mine) this.#flights.delete(key)
      land()
    }
  }

  /** What another request has just found out is good for this one. */
  async #join(asked: Asked, { entry, fill }: Found): Promise<Response> {
    const { freshness } = entry
    if (freshness.conditions(asked.fields) === undefined && !freshness.serves(asked.fields)) return this.#plain(asked)
    if (fill?.open === true) return this.#fromCache(asked, entry, undefined, fill, false)
    const look = await this.#look(entry)
    const whole = look.first === look.last
    return whole ? this.#fromCache(asked, entry, look, undefined, false) : this.#ask(asked, () => undefined)
  }

  /** One request: for a file that is not known, whether it is still good, or for what is missing of it. */
  async #ask(asked: Asked, land: (found: Found) => void): Promise<Response> {
    const entry = this.#table.known(asked)
    const conditions = entry?.freshness.conditions(asked.fields)
    if (entry === undefined || conditions === undefined) return this.#plain(asked, land)
    const { cookie } = entry
    // All of it seems to be there: it is copied while the server answers.
    const later = cookie.size > smallBody && cookie.size <= ahead && cookie.complete
    const look = later ? undefined : await this.#look(entry)
    const whole = look === undefined || look.first === look.last
    if (!whole && !entry.parts) return this.#plain(asked, land)
    if (!whole) this.counters.ranges++
    const headers = whole ? conditions : rangeOf(entry, look)
    const question = this.#table.ask(asked.url)
    try {
      return await this.#inquire(asked, entry, look, headers, question, land)
    } finally {
      this.#table.answered(question)
    }
  }

  /**
   * Asks whether a file is still good, or for what is missing of it. Without `look` it is looked at while the server
   * answers.
   */
  async #inquire(
    asked: Asked,
    entry: Entry,
    before: Look | undefined,
    headers: Readonly<Record<string, string>>,
    question: Question,
    land: (found: Found) => void,
  ): Promise<Response> {
    const whole = before === undefined || before.first === before.last
    const sent = asked.send(headers)
    let look = before
    if (look === undefined) {
      // Its failure is told below.
      sent.catch(() => undefined)
      // Until it is sent.
      await turn()
      look = await this.#look(entry)
    }
    let response: Response
    try {
      response = await sent
    } catch (error) {
      if (asked.signal?.aborted === true) throw error
      return this.#surprise(asked, this.#table.noted(asked.key) === 'broken' ? 'plain' : 'broken')
    }
    if (this.#table.noted(asked.key) === 'broken') this.#table.unnote(asked.key)
    const known = this.#table.get(entry.key) === entry
    const here = known && targetOf(response, asked.url) === entry.target
    if (whole && response.status === 304 && here && isMeant(response, entry)) {
      this.counters.notModified++
      this.#table.renew(asked, entry, response)
      // Pages have gone while the server answered.
      if (look.first < look.last) return this.#plain(asked, land)
      land({ entry })
      return this.#fromCache(asked, entry, look, undefined, false)
    }
    if (!whole && response.status === 206 && here && isPart(response, entry, look)) {
      this.#table.renew(asked, entry, response)
      land({ entry })
      const fill = this.#table.fill(entry, response, look.first, look.last, true)
      return this.#fromCache(asked, entry, look, fill, false)
    }
    if (response.status === 200 || settled.has(response.status)) return this.#take(asked, response, question, land)
    await response.body?.cancel()
    // Forgotten meanwhile: that surprises nobody.
    return known ? this.#surprise(asked, 'plain') : this.#plain(asked)
  }

  /** A question has had a surprising answer: what would a plain client have got? */
  async #surprise(asked: Asked, note: Note): Promise<Response> {
    this.counters.surprises++
    this.#table.forget(asked.key)
    const response = await this.#plain(asked)
    // Then it was the question.
    if (response.ok) {
      if (note === 'plain') this.#table.forget(asked.key)
      this.#table.note(asked.key, note)
    }
    return response
  }

  /** A plain GET. */
  async #plain(asked: Asked, land?: (found: Found) => void): Promise<Response> {
    const question = this.#table.ask(asked.url)
    try {
      return await this.#take(asked, await asked.send(), question, land)
    } finally {
      this.#table.answered(question)
    }
  }

  /** An answer to a plain client: its body fills the cache as it passes by, if it may. */
  async #take(asked: Asked, response: Response, question: Question, land?: (found: Found) => void): Promise<Response> {
    const { key, url } = asked
    const { status, headers, body } = response
    const target = targetOf(response, url)
    const fields = [...headers]
    const freshness = new Freshness(url, asked.fields, fields)
    const { overtaken } = question
    const weight = weightOf(key, target, fields)
    const good =
      status === 200 &&
      body !== null &&
      !overtaken &&
      this.#table.noted(key) !== 'plain' &&
      !this.cache.withdrawn &&
      freshness.storable &&
      (target === url || (this.#table.settled(key, target) && freshness.conditions(asked.fields) !== undefined)) &&
      weight <= averageWeight * 16
    if (!good) {
      this.counters.uncached++
      this.#table.forget(key)
      if (status === 200 && !overtaken && this.#table.noted(key) === undefined) this.#table.note(key, 'alone')
      return response
    }
    if (this.#table.noted(key) === 'alone') this.#table.unnote(key)
    const entry = this.#table.keep(asked, response, freshness, weight)
    const size = entry.parts ? entry.cookie.size : undefined
    if (size !== undefined && size > smallBody && asked.cache !== 'reload' && (await this.#begins(entry))) {
      const look = await this.#look(entry)
      if (look.first === look.last) {
        // This version is here already, from before it was forgotten, or from others: it need not be sent again.
        await body.cancel()
        land?.({ entry })
        return this.#fromCache(asked, entry, look, undefined, false)
      }
    }
    const fill = this.#table.fill(entry, response, 0, size, false)
    if (entry.parts) land?.({ entry, fill })
    const source = new Source({ fill, signal: asked.signal, rest: (at) => this.#rest(asked, entry, size ?? 0, at) })
    return new CachedResponse(source, response)
  }

  /** Whether the first page of a file is there. */
  async #begins({ cookie }: Entry): Promise<boolean> {
    return (await cookie.read(0, new Uint8Array(this.cache.pageSize))) === ReadOutcome.Data
  }

  /** An answer made of what is in the cache, and of what is coming. `aged`: the server was not asked. */
  #fromCache(asked: Asked, entry: Entry, look: Look | undefined, fill: Fill | undefined, aged: boolean): Response {
    const { cookie, target, statusText, type } = entry
    const { size } = cookie
    const headers = aged ? withAge(entry.headers, entry.freshness.age) : entry.headers
    if (look !== undefined) this.counters.pagesCached += cookie.pages - this.#missing(look)
    const source = new Source({
      size,
      ...(look === undefined ? { shared: true } : { look }),
      ...(fill === undefined ? {} : { fill }),
      signal: asked.signal,
      rest: (at) => this.#rest(asked, entry, size, at),
    })
    const redirected = target !== asked.url
    return new CachedResponse(source, { status: 200, statusText, headers, url: target, redirected, type })
  }

  #missing({ first, last }: Look): number {
    return Math.ceil((last - first) / this.cache.pageSize)
  }

  /** What is there of a file. */
  #look({ cookie }: Entry): Promise<Look> {
    return lookAt(cookie, this.cache.pageSize, Math.min(cookie.size, ahead))
  }

  /** Pages of the cache from a position on; or, when there is none, what the server sends from there. */
  async #rest({ url, signal, send }: Asked, entry: Entry, size: number, position: number): Promise<Uint8Array | Fill> {
    const { cookie, etag, target } = entry
    const { pageSize } = this.cache
    const start = position - (position % pageSize)
    const bytes = new Uint8Array(Math.min(Math.max(pieceBytes, pageSize), size - start))
    const page = new Uint8Array(pageSize)
    let end = start
    while (end - start < bytes.length && cookie.version === etag) {
      const answer = cookie.read(Math.floor(end / pageSize), page)
      if ((typeof answer === 'number' ? answer : await answer) !== ReadOutcome.Data) break
      const count = Math.min(pageSize, size - end)
      bytes.set(page.subarray(0, count), end - start)
      end += count
      this.counters.pagesCached++
    }
    if (end > position) return bytes.slice(position - start, end - start)
    signal?.throwIfAborted()
    this.counters.ranges++
    const part = { first: start, last: size }
    const response = await send(rangeOf(entry, part))
    const body = targetOf(response, url) === target ? response.body : null
    if (body !== null && isPart(response, entry, part)) return this.#table.fill(entry, response, start, size, true)
    // A server that does not know ranges: what has been delivered already is passed over.
    if (body !== null && response.status === 200 && isSame(response, entry))
      return this.#table.fill(entry, response, 0, size, true)
    await response.body?.cancel()
    throw stale(entry)
  }

  /** Asks the server for the file's validators: what is known of it, or the answer when it cannot be read by parts. */
  async #validate(url: string, signal?: AbortSignal): Promise<Entry | Response> {
    const question = this.#table.ask(url)
    try {
      return await this.#examine(url, question, signal)
    } finally {
      this.#table.answered(question)
    }
  }

  async #examine(url: string, question: Question, signal?: AbortSignal): Promise<Entry | Response> {
    const known = this.#table.get(url)
    const usable = known?.parts === true && known.cookie.enabled ? known : undefined
    if (usable?.target === url && usable.freshness.serves([])) {
      this.counters.fresh++
      return this.#table.used(usable)
    }
    const conditions = usable === undefined ? {} : { 'if-none-match': usable.etag }
    const ask = (method: string): Promise<Response> => {
      const headers = { ...identity, ...conditions }
      return this.#fetch(url, { method, headers, ...asking, ...(signal === undefined ? {} : { signal }) })
    }
    let response = await ask('HEAD')
    let entry = this.#opened(url, response, usable, question)
    const doubtful = entry !== undefined && this.#table.doubted(url, entry.etag)
    if ((entry !== undefined && !doubtful) || absent.has(response.status)) return entry ?? response
    // HEAD is not known, or says other things than GET: a GET decides.
    response = await ask('GET')
    entry = this.#opened(url, response, usable, question)
    if (entry === undefined) return response
    await response.body?.cancel()
    return entry
  }

  /** What an answer that describes a file makes of it; undefined when it cannot be read by parts. */
  #opened(url: string, response: Response, known: Entry | undefined, question: Question): Entry | undefined {
    const { status, headers, statusText, type } = response
    const asked = { key: url, url, fields: [] }
    const target = targetOf(response, url)
    const current = this.#table.get(url)
    if (status === 304 && current === known && known?.target === target && isMeant(response, known)) {
      this.counters.notModified++
      this.#table.renew(asked, known, response)
      return this.#table.get(url) === known ? this.#table.used(known) : undefined
    }
    const fields = [...headers]
    const freshness = new Freshness(url, [], fields)
    const size = lengthOf(headers)
    const version = headers.get('etag') ?? ''
    const parts = isStrong(version) && size !== undefined && !isEncoded(headers)
    const good = status === 200 && parts && freshness.storable && !question.overtaken && !this.cache.withdrawn
    if (!good) {
      this.#table.forget(url)
      return undefined
    }
    return this.#table.keep(asked, { headers, statusText, type, url: target }, freshness, weightOf(url, target, fields))
  }
}
