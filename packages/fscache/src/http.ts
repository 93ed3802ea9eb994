/**
 * Files of HTTP servers: `fetch` with a cache behind it, and files that are read by pages.
 *
 * `fetch` is one plain GET whose body fills the cache as it passes by. Whoever asks again gets the bytes from the cache when the server
 * has allowed it (freshness), or has said that they are still good (one conditional GET), and asks for what is missing (one range with
 * `If-Range`: a server that has another version by now answers with all of it).
 *
 * Invariants:
 *  - Never worse than `fetch`: until the first byte is delivered, whatever a server answers to a question that a plain client would not
 *    have asked ends in a plain GET, and for that URL such questions are not asked again. At most one request more than a plain client.
 *  - All bytes of one body, and of one open file, are of one version. Only a strong ETag names one; what has none is kept under a name
 *    that is used once, and served only when all of it is there.
 *  - An ETag names a version of one URL. After a redirect that is the URL where it ended: when it ends elsewhere that is another file. The
 *    redirect itself is asked for each time.
 *  - An answer is given only to requests with the same headers as the one that it was the answer to.
 *  - What is remembered is bounded: files by number and by the length of their headers, and so are the URLs that are not cached.
 *
 * DEVIATION: a file that is open (`open`) is read by ranges that name its version (`If-Match`); when the server has another one, a read
 * of what is not in the cache rejects (`ESTALE`).
 *
 * Source: RFC 9110 (conditional requests §13, range requests §14), RFC 9111 (see freshness.ts; §4.3.4 headers of a 304; §4.4 invalidation).
 */
import { randomUUID } from 'node:crypto'
import { dressed, Fill, type Look, type Piece, Source } from './body.ts'
import { type Cookie, type FsCache, ReadOutcome, type Volume } from './cookies.ts'
import { Freshness } from './freshness.ts'

/** How to talk to servers. */
export type Fetch = typeof globalThis.fetch

/** Settings of `HttpFiles`. */
export interface HttpFilesOptions {
  /** May be that of other `HttpFiles`, too: they find each other's pages. */
  readonly cache: FsCache
  /** How to talk to servers (default: this runtime's `fetch`). */
  readonly fetch?: Fetch
  /** Files that are remembered while nobody has them open (default 1024), with 4 KiB of URLs and headers each on average. */
  readonly files?: number
}

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

/** Pages asked for in one request of an open file at most. */
const largestRange = 256
/** Bytes of a file that are copied before its first byte is delivered; of a file that is only good as a whole, all of it. */
const ahead = 4 * 2 ** 20
/** A file that is only good as a whole is not kept when it is larger. */
const largestWhole = 16 * 2 ** 20
/** Bytes of a piece of a body that comes from the cache, or a page when that is larger. */
const pieceBytes = 262_144
/** An answer of this size is rather taken than broken off: a new connection costs as much. */
const smallBody = 65_536
/** Characters of a URL with the headers of the request; what has more is passed through. */
const longestKey = 8192
/** Bytes of URLs and headers that a file may have on average. */
const averageWeight = 4096
/** How many pages are asked for at a time where the store has to wait. */
const lookAtOnce = 64

/** The server has another version than the one that was opened. */
export class StaleFileError extends Error {
  override readonly name = 'StaleFileError'
  /** As of a stale handle of NFS. */
  readonly code = 'ESTALE'
}

/** What is known of a file on a server. */
interface Entry {
  /** The URL, and the headers of the request. */
  readonly key: string
  readonly url: string
  /** Where the redirects ended, if there were any; otherwise the URL. */
  readonly target: string
  readonly type: Response['type']
  readonly volume: Volume
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
  /** Pages on their way, by index. */
  readonly coming: Map<number, Promise<Uint8Array>>
  /** The whole file, from a server that was asked for a part. */
  fill: Fill | undefined
}

/** A GET that may be answered from the cache. */
interface Asked {
  readonly key: string
  readonly url: string
  readonly headers: Headers
  readonly cache: 'default' | 'no-cache' | 'reload'
  readonly signal: AbortSignal | undefined
  /** Sends it, with further headers. */
  readonly send: (headers?: Readonly<Record<string, string>>) => Promise<Response>
}

/** What one request found out for all who asked the same at the same time. */
interface Found {
  readonly entry: Entry
  readonly fill?: Fill
}

/** A question to a server, until it is answered. What is written meanwhile overtakes it: then the answer is not kept. */
interface Question {
  readonly url: string
  overtaken: boolean
}

/**
 * What is not cached: `alone`, its answers could not be; `plain`, questions about it had surprising answers. `broken`: the connection broke at a
 * question, which may have been chance once.
 */
type Note = 'alone' | 'broken' | 'plain'

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
  readonly #limit: number
  /** In the order of their last use. */
  readonly #entries = new Map<string, Entry>()
  readonly #notes = new Map<string, Note>()
  /** Where redirects led the last time. */
  readonly #targets = new Map<string, string>()
  /** Versions that HEAD tells of files of which GET tells another. */
  readonly #doubts = new Map<string, string>()
  /** Requests that others may wait for. */
  readonly #flights = new Map<string, Promise<Found | undefined>>()
  readonly #questions = new Set<Question>()
  #weight = 0

  constructor(options: HttpFilesOptions) {
    const { cache, files = 1024, fetch = globalThis.fetch } = options
    if (!Number.isInteger(files) || files < 1) throw new RangeError(`files must be a positive integer, got ${files}`)
    this.cache = cache
    this.#limit = files
    this.#fetch = fetch
  }

  /**
   * As `fetch` of the runtime, of which it takes everything; it need not be called as a method. A GET without headers that make it a question of
   * its own (ranges, conditions, credentials) is answered with pages from the cache, as far as RFC 9111 allows and as far as they are
   * there. A method that changes something forgets the file. Everything else is passed on. Rejects as `fetch` does, and so does the body; a body
   * that comes from the cache in part, and whose pages are dropped meanwhile, also with `StaleFileError`, when the server has another version.
   */
  readonly fetch: Fetch = async (input, init) => {
    const asked = this.#asked(input, init)
    if (asked !== undefined) return this.#answer(asked)
    this.counters.uncached++
    this.counters.requests++
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
        if (named.origin === new URL(url).origin) this.#wrote(named.href)
      }
      return response
    } finally {
      this.#wrote(url)
    }
  }

  /**
   * Opens a file: one request without a body, or none while the last answer is fresh; where HEAD is refused, a GET. Rejects with `Error`
   * when the server answers neither 200 nor 304, or when the file has no strong ETag or no length (see `fetch` for those).
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
    return new HttpFile(this, answer)
  }

  /** Forgets all files; their pages stay in the cache, for who opens the same version again. Who reads one goes on without a cache. */
  close(): void {
    for (const entry of this.#entries.values()) this.#remove(entry)
    this.#notes.clear()
    this.#doubts.clear()
    this.#targets.clear()
  }

  /** A file is closed. For `HttpFile`. */
  release(entry: Entry): void {
    entry.users--
    if (entry.users === 0) void this.#abandon(entry)
    this.#trim()
  }

  /** Undefined: nothing that could be answered from the cache. What is wrong with a request is said by `fetch` itself. */
  #asked(input: Parameters<Fetch>[0], init: RequestInit | null | undefined): Asked | undefined {
    const request = input instanceof Request ? input : undefined
    const url = addressOf(input)
    if (url === undefined) return undefined
    const settings: Record<string, unknown> = {}
    // As `fetch` reads them: also what is inherited.
    for (const name in init ?? {}) {
      const value = (init as Record<string, unknown>)[name]
      if (value === undefined) continue
      if (!(name in harmless)) return undefined
      settings[name] = value
    }
    const setting = (name: string): unknown =>
      settings[name] ?? (request as Record<string, unknown> | undefined)?.[name]
    for (const [name, values] of Object.entries(harmless)) {
      const value = setting(name)
      if (value !== undefined && values !== undefined && !values.includes(value)) return undefined
    }
    const signal = setting('signal') ?? undefined
    if (signal !== undefined && !(signal instanceof AbortSignal)) return undefined
    const method = setting('method') ?? 'GET'
    const given = setting('headers') ?? {}
    // What can be read once only is left to `fetch`.
    if (typeof method !== 'string' || !/^get$/i.test(method) || !isReadable(given)) return undefined
    let headers: Headers
    try {
      headers = new Headers(given as Headers)
    } catch {
      return undefined
    }
    const names = [...headers].filter(([name]) => !directives.has(name))
    const key = names.length === 0 ? url : `${url} ${JSON.stringify(names)}`
    if (key.length > longestKey || [...headers.keys()].some((name) => questions.has(name))) return undefined
    if (/\b(no-store|only-if-cached)\b/i.test(headers.get('cache-control') ?? '')) return undefined
    return {
      key,
      url,
      headers,
      cache: (setting('cache') as Asked['cache'] | undefined) ?? 'default',
      signal,
      send: (more) => {
        this.counters.requests++
        if (more === undefined) return this.#fetch(input, init ?? undefined)
        const all = new Headers(headers)
        for (const [name, value] of Object.entries(more)) all.set(name, value)
        return this.#fetch(input, { ...settings, ...asking, headers: all })
      },
    }
  }

  /** Answers from the cache, or lets one request answer all who ask for the same at the same time. */
  async #answer(asked: Asked): Promise<Response> {
    const { key, signal } = asked
    signal?.throwIfAborted()
    const entry = this.#known(asked)
    // A redirect is asked for each time: nothing is known of how long it is good.
    const unasked = entry?.target === asked.url && asked.cache === 'default' && entry.freshness.serves(asked.headers)
    if (entry !== undefined && unasked) {
      const look = await this.#look(entry)
      if (look.first === look.last) {
        this.counters.fresh++
        return this.#fromCache(asked, entry, look, undefined, true)
      }
    }
    const note = this.#notes.get(key)
    if (asked.cache === 'reload' || note === 'alone' || note === 'plain') return this.#plain(asked)
    const flight = this.#flights.get(key)
    if (flight !== undefined) {
      const found = await abortable(flight, signal)
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
    if (freshness.conditions(asked.headers) === undefined && !freshness.serves(asked.headers)) return this.#plain(asked)
    if (fill?.open === true) return this.#fromCache(asked, entry, undefined, fill, false)
    const look = await this.#look(entry)
    const whole = look.first === look.last
    return whole ? this.#fromCache(asked, entry, look, undefined, false) : this.#ask(asked, () => undefined)
  }

  /** One request: for a file that is not known, whether it is still good, or for what is missing of it. */
  async #ask(asked: Asked, land: (found: Found) => void): Promise<Response> {
    const entry = this.#known(asked)
    const conditions = entry?.freshness.conditions(asked.headers)
    if (entry === undefined || conditions === undefined) return this.#plain(asked, land)
    const look = await this.#look(entry)
    const whole = look.first === look.last
    if (!whole && !entry.parts) return this.#plain(asked, land)
    if (!whole) this.counters.ranges++
    const headers = whole ? conditions : rangeOf(entry, look)
    return this.#during(asked.url, (question) => this.#inquire(asked, entry, look, headers, question, land))
  }

  /** Asks whether a file is still good, or for what is missing of it. */
  async #inquire(
    asked: Asked,
    entry: Entry,
    look: Look,
    headers: Readonly<Record<string, string>>,
    question: Question,
    land: (found: Found) => void,
  ): Promise<Response> {
    const whole = look.first === look.last
    let response: Response
    try {
      response = await asked.send(headers)
    } catch (error) {
      if (asked.signal?.aborted === true) throw error
      return this.#surprise(asked, this.#notes.get(asked.key) === 'broken' ? 'plain' : 'broken')
    }
    if (this.#notes.get(asked.key) === 'broken') this.#notes.delete(asked.key)
    const known = this.#entries.get(entry.key) === entry
    const here = known && targetOf(response, asked.url) === entry.target
    if (whole && response.status === 304 && here && isMeant(response, entry)) {
      this.counters.notModified++
      this.#renew(asked, entry, response)
      land({ entry })
      return this.#fromCache(asked, entry, look, undefined, false)
    }
    if (!whole && response.status === 206 && here && isPart(response, entry, look)) {
      this.#renew(asked, entry, response)
      land({ entry })
      const fill = this.#fill(entry, response.body!, look.first, look.last, true)
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
    this.#forget(asked.key)
    const response = await this.#plain(asked)
    // Then it was the question.
    if (response.ok) {
      if (note === 'plain') this.#forget(asked.key)
      this.#note(asked.key, note)
    }
    return response
  }

  /** Runs what asks a server about a URL, so that it can be overtaken. */
  async #during<Answer>(url: string, run: (question: Question) => Promise<Answer>): Promise<Answer> {
    const question: Question = { url, overtaken: false }
    this.#questions.add(question)
    try {
      return await run(question)
    } finally {
      this.#questions.delete(question)
    }
  }

  /** A plain GET. */
  async #plain(asked: Asked, land?: (found: Found) => void): Promise<Response> {
    return this.#during(asked.url, async (question) => this.#take(asked, await asked.send(), question, land))
  }

  /** An answer to a plain client: its body fills the cache as it passes by, if it may. */
  async #take(asked: Asked, response: Response, question: Question, land?: (found: Found) => void): Promise<Response> {
    const { key, url } = asked
    const { status, headers, body } = response
    const target = targetOf(response, url)
    const freshness = new Freshness(url, asked.headers, headers)
    const { overtaken } = question
    const good =
      status === 200 &&
      body !== null &&
      !overtaken &&
      this.#notes.get(key) !== 'plain' &&
      !this.cache.withdrawn &&
      freshness.storable &&
      (target === url || (this.#settled(key, target) && freshness.conditions(asked.headers) !== undefined)) &&
      weightOf(key, target, headers) <= averageWeight * 16
    if (!good) {
      this.counters.uncached++
      this.#forget(key)
      if (status === 200 && !overtaken && !this.#notes.has(key)) this.#note(key, 'alone')
      return response
    }
    if (this.#notes.get(key) === 'alone') this.#notes.delete(key)
    const entry = this.#keep(asked, response, freshness)
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
    const fill = this.#fill(entry, body, 0, size, false)
    if (entry.parts) land?.({ entry, fill })
    const { statusText } = response
    const source = new Source({ fill, signal: asked.signal, rest: (at) => this.#rest(asked, entry, size ?? 0, at) })
    const stream = new ReadableStream(source, { highWaterMark: 0 })
    return dressed(new Response(stream, { status, statusText, headers }), response)
  }

  /** Whether a redirect has led there before: to an address that is used once there is no second time. */
  #settled(key: string, target: string): boolean {
    const before = this.#targets.get(key)
    this.#targets.delete(key)
    this.#targets.set(key, target)
    shorten(this.#targets, this.#limit)
    return before === target
  }

  /** Whether the first page of a file is there. */
  async #begins({ cookie }: Entry): Promise<boolean> {
    return (await cookie.read(0, new Uint8Array(this.cache.pageSize))) === ReadOutcome.Data
  }

  /** An answer made of what is in the cache, and of what is coming. `aged`: the server was not asked. */
  #fromCache(asked: Asked, entry: Entry, look: Look | undefined, fill: Fill | undefined, aged: boolean): Response {
    const { cookie, target, statusText, type } = entry
    const { size } = cookie
    const headers = new Headers(entry.headers)
    if (aged) headers.set('age', String(entry.freshness.age))
    if (look !== undefined) this.counters.pagesCached += cookie.pages - this.#missing(look)
    const source = new Source({
      size,
      ...(look === undefined ? { shared: true } : { look }),
      ...(fill === undefined ? {} : { fill }),
      signal: asked.signal,
      rest: (at) => this.#rest(asked, entry, size, at),
    })
    const stream = new ReadableStream(source, { highWaterMark: 0 })
    const like = { url: target, redirected: target !== asked.url, type }
    return dressed(new Response(stream, { status: 200, statusText, headers }), like)
  }

  #missing({ first, last }: Look): number {
    return Math.ceil((last - first) / this.cache.pageSize)
  }

  /** What is known of a file, as far as it can be used. */
  #known({ key }: Asked): Entry | undefined {
    const entry = this.#entries.get(key)
    if (entry === undefined || !entry.complete || !entry.cookie.enabled) return undefined
    this.#entries.delete(key)
    this.#entries.set(key, entry)
    return entry
  }

  /** Remembers a file, before its first byte has come. What was known of it goes. */
  #keep(
    { key, url, headers: wanted }: Pick<Asked, 'key' | 'url' | 'headers'>,
    response: Pick<Response, 'headers' | 'statusText' | 'type' | 'url'>,
    freshness: Freshness,
  ): Entry {
    const { headers, statusText, type } = response
    const target = targetOf(response, url)
    const version = headers.get('etag') ?? ''
    const size = lengthOf(headers)
    const parts = isStrong(version) && size !== undefined && !isEncoded(headers)
    const known = this.#entries.get(key)
    if (known !== undefined && parts && known.target === target && isSame(response, known)) {
      known.statusText = statusText
      this.#update(known, wanted, headers)
      return known
    }
    if (known !== undefined) this.counters.changes++
    this.#forget(key)
    return this.#make({ key, url, target, type, parts, complete: parts, statusText, headers, freshness }, version, size)
  }

  #make(
    what: Pick<
      Entry,
      'key' | 'url' | 'target' | 'type' | 'parts' | 'complete' | 'statusText' | 'headers' | 'freshness'
    >,
    version: string,
    size: number | undefined,
  ): Entry {
    const { key, url, target, parts } = what
    const volume = this.cache.acquireVolume(new URL(target).origin, { shared: true })
    // Several URLs may lead to one: each has its own pages of it.
    const name = target === url ? key : `${key} ${target}`
    const auxiliary = parts ? { version, size: size! } : { version: `${version} ${randomUUID()}`, size: 0 }
    const cookie = volume.acquireCookie(name, auxiliary)
    const headers = keptOf(what.headers)
    const weight = weightOf(key, target, headers)
    const more = { headers, volume, cookie, weight, etag: version, users: 0, coming: new Map(), fill: undefined }
    const entry: Entry = { ...what, ...more }
    this.#entries.set(key, entry)
    this.#weight += weight
    this.#trim(entry)
    return entry
  }

  /** The body of an answer, from which the pages of a file are kept. */
  #fill(entry: Entry, body: ReadableStream<Uint8Array>, start: number, end: number | undefined, exact: boolean): Fill {
    const { cookie, parts, url } = entry
    const { counters } = this
    return new Fill({
      body,
      cookie,
      pageSize: this.cache.pageSize,
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
        else if (mine && (parts ? !exact && size !== undefined && size !== end : true)) this.#forget(entry.key)
      },
    })
  }

  /** Reads what is there of a file, and finds out what is not. */
  async #look(entry: Entry): Promise<Look> {
    const { cookie, parts } = entry
    const { size, pages } = cookie
    const { pageSize } = this.cache
    const copied = parts ? Math.min(size, ahead) : size
    const segmentBytes = Math.max(pieceBytes, pageSize)
    const segments: Uint8Array[] = []
    for (let at = 0; at < copied; at += segmentBytes) segments.push(new Uint8Array(Math.min(segmentBytes, size - at)))
    const scratch = new Uint8Array(pageSize)
    // The last page has more bytes than the file.
    const tail = new Uint8Array(pageSize)
    let [first, last] = [size, 0]
    const note = (index: number, outcome: ReadOutcome): void => {
      if (outcome === ReadOutcome.Data) return
      first = Math.min(first, index * pageSize)
      last = Math.max(last, Math.min(size, (index + 1) * pageSize))
    }
    for (let index = 0; index < pages; ) {
      const waiting: Promise<void>[] = []
      const until = Math.min(pages, index + lookAtOnce)
      for (; index < until; index++) {
        const at = index * pageSize
        const segment = segments[Math.floor(at / segmentBytes)]
        const place = at % segmentBytes
        const part = segment !== undefined && place + pageSize > segment.length
        const into = part ? tail : (segment?.subarray(place, place + pageSize) ?? scratch)
        const answer = cookie.read(index, into)
        const page = index
        if (typeof answer === 'number') note(page, answer)
        else waiting.push(answer.then((outcome) => note(page, outcome)))
      }
      if (waiting.length > 0) await Promise.all(waiting)
    }
    const end = segments.at(-1)
    const rest = size % pageSize
    if (end !== undefined && rest > 0 && segments.length * segmentBytes >= size)
      end.set(tail.subarray(0, rest), end.length - rest)
    return { segments, segmentBytes, first, last: first === size ? size : last }
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
    if (body !== null && isPart(response, entry, part)) return this.#fill(entry, body, start, size, true)
    // A server that does not know ranges: what has been delivered already is passed over.
    if (body !== null && response.status === 200 && isSame(response, entry))
      return this.#fill(entry, body, 0, size, true)
    await response.body?.cancel()
    throw this.#stale(entry)
  }

  /** The server says that what is known is still good: with what it says of it now. */
  #renew({ headers: wanted }: Pick<Asked, 'headers'>, entry: Entry, response: Response): void {
    const headers = new Headers(entry.headers)
    for (const name of new Set(response.headers.keys())) {
      // An ETag that is the same, but for being weak or not, is that of the compressed file or not.
      if (ofBody.has(name) || (name === 'etag' && entry.etag !== '')) continue
      if (name !== 'set-cookie') headers.set(name, response.headers.get(name)!)
    }
    const cookies = response.headers.getSetCookie()
    if (cookies.length > 0) headers.delete('set-cookie')
    for (const cookie of cookies) headers.append('set-cookie', cookie)
    this.#update(entry, wanted, headers)
  }

  #update(entry: Entry, wanted: Headers, headers: Headers): void {
    entry.headers = keptOf(headers)
    entry.freshness = new Freshness(entry.url, wanted, entry.headers)
    const weight = weightOf(entry.key, entry.target, entry.headers)
    if (this.#entries.get(entry.key) !== entry) return
    this.#weight += weight - entry.weight
    entry.weight = weight
    // It may have been told not to keep it.
    if (entry.freshness.storable) this.#trim(entry)
    else this.#remove(entry, true)
  }

  #note(key: string, note: Note): void {
    this.#notes.delete(key)
    this.#notes.set(key, note)
    shorten(this.#notes, this.#limit)
  }

  /** Fills `into` with pages `first` to `last` of a file. For `HttpFile`. */
  async pages(entry: Entry, version: string, first: number, last: number, signal?: AbortSignal): Promise<Uint8Array[]> {
    const { cookie } = entry
    if (cookie.version !== version) throw this.#stale(entry)
    const { pageSize } = this.cache
    const found: (Uint8Array | Promise<Uint8Array> | undefined)[] = []
    for (let index = first; index <= last; index++) {
      const coming = entry.coming.get(index)
      if (coming !== undefined) {
        // Whoever asked for it first may have given up: that is no answer to us.
        found.push(coming.catch(async () => (await this.#range(entry, version, index, index, signal))[0]!))
        continue
      }
      const page = new Uint8Array(pageSize)
      const answer = cookie.read(index, page)
      // Awaited one by one: only a store that has to wait makes promises at all.
      const outcome = typeof answer === 'number' ? answer : await answer
      found.push(outcome === ReadOutcome.Data ? page : entry.coming.get(index))
      if (outcome === ReadOutcome.Data) this.counters.pagesCached++
    }
    if (cookie.version !== version) throw this.#stale(entry)
    for (let at = 0; at < found.length; at++) {
      if (found[at] !== undefined) continue
      let end = at
      while (end + 1 < found.length && found[end + 1] === undefined && end + 1 - at < largestRange) end++
      const begin = at
      const range = this.#part(entry, version, first + begin, first + end, signal)
      for (let place = begin; place <= end; place++) {
        const coming = range.then((pages) => pages[place - begin]!)
        found[place] = coming
        this.#announce(entry, first + place, coming)
      }
      at = end
    }
    return Promise.all(found.map(async (page) => (await page)!))
  }

  /** Lets others wait for a page that is on its way, until it is here, or is not going to come. */
  #announce(entry: Entry, index: number, coming: Promise<Uint8Array>): void {
    entry.coming.set(index, coming)
    const arrived = (): void => {
      if (entry.coming.get(index) === coming) entry.coming.delete(index)
    }
    // A failure is told to those who wait for the page.
    coming.then(arrived, arrived)
  }

  /** Pages from the server: out of the whole file, if that is coming already and has not passed them, or by a request of their own. */
  async #part(entry: Entry, version: string, first: number, last: number, signal?: AbortSignal): Promise<Uint8Array[]> {
    const { fill, cookie } = entry
    const { pageSize } = this.cache
    const start = first * pageSize
    if (fill?.open === true && fill.begun.at <= start) {
      const pages = await abortable(this.#through(fill, start, Math.min(cookie.size, (last + 1) * pageSize)), signal)
      if (cookie.version !== version) throw this.#stale(entry)
      if (pages !== undefined) return pages
    }
    return this.#range(entry, version, first, last, signal)
  }

  /** Reads on until a part of the file has come; undefined when it does not come. */
  async #through(fill: Fill, start: number, end: number): Promise<Uint8Array[] | undefined> {
    const { pageSize } = this.cache
    const pages = Array.from({ length: Math.ceil((end - start) / pageSize) }, () => new Uint8Array(pageSize))
    place(pages, pageSize, start, end, fill.begun)
    while (fill.position < end) {
      let piece: Piece | undefined
      try {
        piece = await fill.next()
      } catch {
        // Whoever asked for it may have given up: a request of our own will tell.
      }
      if (piece === undefined) return undefined
      place(pages, pageSize, start, end, piece)
    }
    return pages
  }

  /** One range request; the pages, which also go to the cache. */
  async #range(
    entry: Entry,
    version: string,
    first: number,
    last: number,
    signal?: AbortSignal,
  ): Promise<Uint8Array[]> {
    const { cookie, url, target } = entry
    const { pageSize } = this.cache
    const { size } = cookie
    const start = first * pageSize
    const end = Math.min(size, (last + 1) * pageSize)
    this.counters.requests++
    this.counters.ranges++
    const init: RequestInit = {
      ...asking,
      headers: { ...identity, range: `bytes=${start}-${end - 1}`, 'if-match': version },
      ...(signal === undefined ? {} : { signal }),
    }
    // What was opened is what the redirect led to then: an address that may be good for a while only.
    let response = await this.#fetch(target, init)
    if (target !== url && expired.has(response.status)) {
      await response.body?.cancel()
      this.counters.requests++
      response = await this.#fetch(url, init)
    }
    const { status, headers } = response
    const whole = status === 200
    const other = response.ok && (headers.get('etag') !== version || targetOf(response, url) !== target)
    // 416: the file is shorter now, or was never as long as the server said.
    if (status === 412 || status === 416 || other) {
      await response.body?.cancel()
      this.#changed(entry, version)
      throw this.#stale(entry)
    }
    const wrong = isEncoded(headers)
      ? `${status} in the encoding ${headers.get('content-encoding')}, not asked for`
      : whole
        ? wrongLength(headers, size)
        : wrongRange(response, start, end, size)
    if (wrong !== undefined) {
      await response.body?.cancel()
      throw new Error(`${url}: asked for bytes ${start} to ${end - 1} of ${size}, the server answers ${wrong}`)
    }
    if (whole && response.body !== null) return this.#whole(entry, version, response.body, start, end)
    const pages = await this.#receive(response, end, start, end, url)
    for (let page = 0; page < pages.length; page++) {
      this.counters.pagesFetched++
      // Meanwhile another version may have been found: then these pages are good for this call only.
      if (cookie.version === version && cookie.enabled && first + page < cookie.pages)
        cookie.write(first + page, pages[page]!)
    }
    return pages
  }

  /** A server that does not know ranges sends all of the file: its pages are kept, and what is asked for next may still come. */
  async #whole(
    entry: Entry,
    version: string,
    body: ReadableStream<Uint8Array>,
    start: number,
    end: number,
  ): Promise<Uint8Array[]> {
    const { cookie, url } = entry
    const { size } = cookie
    const fill = this.#fill(entry, body, 0, size, true)
    fill.users = 1
    if (cookie.version === version && entry.users > 0) {
      await this.#abandon(entry)
      entry.fill = fill
    }
    const pages = await this.#through(fill, start, end)
    if (entry.fill !== fill) await fill.leave()
    if (pages === undefined)
      throw new Error(`${url}: the answer ended after ${fill.position} bytes, ${size} were promised`)
    return pages
  }

  /** Takes the bytes from `start` to `end` of a file out of a body, as pages; the last one is filled up with zeros. */
  async #receive(response: Response, limit: number, start: number, end: number, url: string): Promise<Uint8Array[]> {
    const { pageSize } = this.cache
    const pages = Array.from({ length: Math.ceil((end - start) / pageSize) }, () => new Uint8Array(pageSize))
    let position = start
    if (response.body !== null)
      for await (const bytes of response.body as unknown as AsyncIterable<Uint8Array>) {
        place(pages, pageSize, start, end, { at: position, bytes })
        position += bytes.length
        this.counters.bytesFetched += bytes.length
        // A hostile one never ends: enough is enough.
        if (position > limit) break
      }
    if (position > limit)
      throw new Error(`${url}: the answer goes on after the ${limit - start} bytes that were promised`)
    if (position < end)
      throw new Error(`${url}: the answer ended after ${position - start} bytes, ${end - start} were promised`)
    return pages
  }

  /** Asks the server for the file's validators: what is known of it, or the answer when it cannot be read by parts. */
  #validate(url: string, signal?: AbortSignal): Promise<Entry | Response> {
    return this.#during(url, (question) => this.#examine(url, question, signal))
  }

  async #examine(url: string, question: Question, signal?: AbortSignal): Promise<Entry | Response> {
    const none = new Headers()
    const known = this.#entries.get(url)
    const usable = known?.parts === true && known.cookie.enabled ? known : undefined
    if (usable?.target === url && usable.freshness.serves(none)) {
      this.counters.fresh++
      return this.#used(usable)
    }
    const conditions = usable === undefined ? {} : { 'if-none-match': usable.etag }
    const ask = (method: string): Promise<Response> => {
      this.counters.requests++
      const headers = { ...identity, ...conditions }
      return this.#fetch(url, { method, headers, ...asking, ...(signal === undefined ? {} : { signal }) })
    }
    let response = await ask('HEAD')
    let entry = this.#opened(url, response, usable, question)
    const doubtful = entry !== undefined && this.#doubts.get(url) === entry.etag
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
    const none = new Headers()
    const asked = { key: url, url, headers: none }
    const target = targetOf(response, url)
    const current = this.#entries.get(url)
    if (status === 304 && current === known && known?.target === target && isMeant(response, known)) {
      this.counters.notModified++
      this.#renew(asked, known, response)
      return this.#entries.get(url) === known ? this.#used(known) : undefined
    }
    const freshness = new Freshness(url, none, headers)
    const size = lengthOf(headers)
    const version = headers.get('etag') ?? ''
    const parts = isStrong(version) && size !== undefined && !isEncoded(headers)
    const good = status === 200 && parts && freshness.storable && !question.overtaken && !this.cache.withdrawn
    if (!good) {
      this.#forget(url)
      return undefined
    }
    return this.#keep(asked, { headers, statusText, type, url: target }, freshness)
  }

  #used(entry: Entry): Entry {
    this.#entries.delete(entry.key)
    this.#entries.set(entry.key, entry)
    return entry
  }

  #stale({ url }: Entry): StaleFileError {
    return new StaleFileError(`${url} has changed on the server since it was opened: open it again`)
  }

  /** The server has another version: nobody may be given the old one any more. */
  #changed(entry: Entry, version: string): void {
    if (entry.cookie.version !== version) return
    this.counters.changes++
    this.#doubts.delete(entry.url)
    this.#doubts.set(entry.url, version)
    shorten(this.#doubts, this.#limit)
    this.#forget(entry.key)
  }

  /** Something may have changed at a URL. */
  #wrote(url: string | undefined): void {
    for (const question of this.#questions) if (question.url === url) question.overtaken = true
    for (const entry of this.#entries.values()) if (entry.url === url || entry.target === url) this.#forget(entry.key)
  }

  #forget(key: string): void {
    const entry = this.#entries.get(key)
    if (entry !== undefined) this.#remove(entry, true)
  }

  /** An entry goes; with `retire` its pages, too. */
  #remove(entry: Entry, retire = false): void {
    this.#entries.delete(entry.key)
    this.#weight -= entry.weight
    entry.coming.clear()
    // Open files hold on to a cookie without a version: their next read says that it is stale.
    if (retire && entry.users > 0) entry.cookie.invalidate({ version: '', size: 0 })
    entry.cookie.relinquish(retire)
    entry.volume.relinquish()
    void this.#abandon(entry)
  }

  /** Nobody reads on. */
  async #abandon(entry: Entry): Promise<void> {
    const { fill } = entry
    entry.fill = undefined
    await fill?.leave()
  }

  /** Files that nobody has open are forgotten, the ones longest unused first; their pages stay. */
  #trim(keep?: Entry): void {
    for (const entry of this.#entries.values()) {
      if (this.#entries.size <= this.#limit && this.#weight <= this.#limit * averageWeight) return
      if (entry.users > 0 || entry === keep) continue
      this.#remove(entry, !entry.complete)
    }
  }
}

/** So that ranges and lengths are those of the file, not of a compressed form. */
const identity = { 'accept-encoding': 'identity' }
/**
 * With the default, `fetch` adds `Cache-Control: no-cache` to each question, and then there are servers that send the whole file; so it is
 * `max-age=0`. The setting is known to the runtime, not to its types.
 */
const asking: object = { cache: 'no-cache' }
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
  const kept = new Headers(headers)
  for (const name of (headers.get('connection') ?? '').split(',')) {
    const trimmed = name.trim().toLowerCase()
    if (/^[!#$%&'*+.^_`|~0-9a-z-]+$/.test(trimmed) && trimmed !== 'keep-alive') kept.delete(trimmed)
  }
  return kept
}

/** Headers that make a request a question of its own, or answers for one person. */
const questions: ReadonlySet<string> = new Set([
  'authorization',
  'cookie',
  'if-match',
  'if-modified-since',
  'if-none-match',
  'if-range',
  'if-unmodified-since',
  'proxy-authorization',
  'range',
])
/** Headers that say how to use a cache, not what is wanted. */
const directives: ReadonlySet<string> = new Set(['cache-control', 'pragma'])
/** Answers that a plain client would have got, too. */
const settled: ReadonlySet<number> = new Set([404, 410, 429, 503])
/** Answers to HEAD that a GET would get, too. */
const absent: ReadonlySet<number> = new Set([404, 410])
/** Answers of an address that was good for a while. */
const expired: ReadonlySet<number> = new Set([401, 403, 404, 410])
/** Settings of a request that change nothing of the answer; undefined: any value. What is not here is not known to do no harm. */
const harmless: Readonly<Record<string, readonly unknown[] | undefined>> = {
  method: undefined,
  headers: undefined,
  signal: undefined,
  duplex: undefined,
  body: [null],
  cache: ['default', 'no-cache', 'reload'],
  credentials: ['same-origin'],
  integrity: [''],
  keepalive: [false],
  mode: ['cors'],
  redirect: ['follow'],
  referrer: ['about:client'],
  referrerPolicy: [''],
  window: [null],
}

/** The address of a file on an HTTP server, without a fragment. */
function addressOf(input: Parameters<Fetch>[0]): string | undefined {
  const text = input instanceof Request ? input.url : input
  if (!(typeof text === 'string' || text instanceof URL) || !URL.canParse(String(text))) return undefined
  const address = new URL(text)
  // What has a name and a password is refused by `fetch`.
  if (!/^https?:$/.test(address.protocol) || address.username !== '' || address.password !== '') return undefined
  address.hash = ''
  return address.href
}

/** Whether headers can be read more than once. */
function isReadable(given: unknown): boolean {
  if (given instanceof Headers || Array.isArray(given)) return true
  return typeof given === 'object' && given !== null && !(Symbol.iterator in given)
}

/** The promise, or a rejection when the signal aborts before. */
async function abortable<Value>(promise: Promise<Value>, signal: AbortSignal | undefined): Promise<Value> {
  if (signal === undefined) return promise
  signal.throwIfAborted()
  let aborted = (): void => undefined
  const given = new Promise<never>((_resolve, reject) => {
    aborted = () => reject(signal.reason as Error)
    signal.addEventListener('abort', aborted, { once: true })
  })
  try {
    return await Promise.race([promise, given])
  } finally {
    signal.removeEventListener('abort', aborted)
  }
}

/** The oldest go until few enough are left. */
function shorten(map: Map<string, unknown>, limit: number): void {
  for (const oldest of map.keys()) {
    if (map.size <= limit) return
    map.delete(oldest)
  }
}

/** Bytes of what is remembered of an answer, about: names and values are kept twice. */
function weightOf(key: string, target: string, headers: Headers): number {
  let length = 2 * key.length + target.length
  for (const [name, value] of headers) length += 2 * (name.length + value.length)
  return length
}

/** Where an answer comes from, after redirects. Answers that a program made itself have no URL. */
const targetOf = ({ url }: Pick<Response, 'url'>, asked: string): string => {
  if (url === '') return asked
  const hash = url.indexOf('#')
  return hash < 0 ? url : url.slice(0, hash)
}

const isEncoded = (headers: Headers): boolean => !/^(identity)?$/i.test(headers.get('content-encoding') ?? '')
const isStrong = (etag: string): boolean => /^"[^"]*"$/.test(etag)

/** Bytes of a body, if that is said. */
function lengthOf(headers: Headers): number | undefined {
  const length = headers.get('content-length') ?? ''
  return /^\d+$/.test(length) && Number.isSafeInteger(Number(length)) ? Number(length) : undefined
}

/** Whether an answer, 200, is the file that is known. */
function isSame({ headers }: Pick<Response, 'headers'>, { etag, parts, cookie }: Entry): boolean {
  return parts && headers.get('etag') === etag && lengthOf(headers) === cookie.size && !isEncoded(headers)
}

/** Whether an answer that says that a file is still good means the one that is known (RFC 9111 §4.3.4: compared weakly). */
function isMeant({ headers }: Response, { etag }: Entry): boolean {
  const other = headers.get('etag')
  return other === null || etag === '' || other.replace(/^W\//, '') === etag.replace(/^W\//, '')
}

/** Headers that ask for a part of a file if it is still the same, otherwise for all of it. */
function rangeOf({ etag }: Entry, { first, last }: Pick<Look, 'first' | 'last'>): Record<string, string> {
  return { ...identity, range: `bytes=${first}-${last - 1}`, 'if-range': etag }
}

/** Whether an answer is the part that was asked for. */
function isPart(response: Response, entry: Entry, { first, last }: Pick<Look, 'first' | 'last'>): boolean {
  const { headers } = response
  const length = lengthOf(headers) ?? last - first
  const right = headers.get('etag') === entry.etag && length === last - first && !isEncoded(headers)
  return right && response.body !== null && wrongRange(response, first, last, entry.cookie.size) === undefined
}

/** Copies the bytes of a piece that lie between `start`, where the first page begins, and `end`. */
function place(pages: readonly Uint8Array[], pageSize: number, start: number, end: number, { at, bytes }: Piece): void {
  for (let from = Math.max(0, start - at); from < bytes.length && at + from < end; ) {
    const into = at + from - start
    const count = Math.min(pageSize - (into % pageSize), bytes.length - from, end - at - from)
    pages[Math.floor(into / pageSize)]!.set(bytes.subarray(from, from + count), into % pageSize)
    from += count
  }
}

/** What is wrong with a whole file, if that can be seen. */
function wrongLength(headers: Headers, size: number): string | undefined {
  const length = headers.get('content-length')
  return length === null || Number(length) === size ? undefined : `200 with ${length} bytes`
}

/** What is wrong with an answer that is to be a part of a file. */
function wrongRange(
  { status, statusText, headers }: Response,
  start: number,
  end: number,
  size: number,
): string | undefined {
  const text = headers.get('content-range') ?? ''
  const range = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(text)
  const right =
    status === 206 &&
    range !== null &&
    Number(range[1]) === start &&
    Number(range[2]) === end - 1 &&
    (range[3] === '*' || Number(range[3]) === size)
  return right ? undefined : `${status} ${text || statusText}`
}

/** A version of a file of a server, open for reading. */
export class HttpFile {
  readonly url: string
  /** Bytes of the file. */
  readonly size: number
  /** Its ETag. */
  readonly version: string
  readonly #files: HttpFiles
  readonly #entry: Entry
  #closed = false

  /** Made by `HttpFiles.open`. */
  constructor(files: HttpFiles, entry: Entry) {
    this.#files = files
    this.#entry = entry
    this.url = entry.url
    this.size = entry.cookie.size
    this.version = entry.cookie.version
  }

  /**
   * Fills `into` from `at` with up to `length` bytes of the file from `position`; answers how many, fewer only at the end. Rejects
   * with `StaleFileError` when the server has another version by now, with what `fetch` rejects with when it cannot be reached.
   */
  async read(into: Uint8Array, at: number, length: number, position: number, signal?: AbortSignal): Promise<number> {
    if (this.#closed) throw new Error(`${this.url} is closed`)
    if (![at, length, position].every((number) => Number.isSafeInteger(number) && number >= 0))
      throw new RangeError(`at, length and position must be integers, not negative; got ${at}, ${length}, ${position}`)
    if (at + length > into.length) throw new RangeError(`${length} bytes at ${at} lie outside of ${into.length} bytes`)
    const { pageSize } = this.#files.cache
    const end = Math.min(position + length, this.size)
    if (end <= position) return 0
    for (let from = position; from < end; ) {
      const first = Math.floor(from / pageSize)
      const last = Math.min(Math.floor((end - 1) / pageSize), first + largestRange - 1)
      const pages = await this.#files.pages(this.#entry, this.version, first, last, signal)
      for (let index = first; index <= last; index++) {
        const start = from - index * pageSize
        const count = Math.min(pageSize - start, end - from)
        into.set(pages[index - first]!.subarray(start, start + count), at + from - position)
        from += count
      }
    }
    return end - position
  }

  /** Lets the file be forgotten. Idempotent. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.#files.release(this.#entry)
  }
}
