/**
 * Files of HTTP servers, by pages: a network file client in front of FS-Cache.
 *
 * A file is opened by asking the server for its validators; with those of the last time, if they are known (`If-None-Match`). Its pages
 * come from the cache, or from the server by range requests that name the version (`If-Match`); every answer is checked against it.
 *
 * Invariants:
 *  - All bytes of one open file are of one version: the one the server had when it was opened. When the server has another one, a read
 *    of what is not in the cache rejects (`ESTALE`), and what is opened from then on is the new one.
 *  - Only files with a strong ETag and a known length are cached, and none that the server marks `no-store` or sends encoded (compressed).
 *    Everything else is passed through.
 *  - An ETag names a version of one URL. After a redirect that is the URL where it ended: when it ends elsewhere that is another file.
 *
 * Source: RFC 9110 (conditional requests §13, range requests §14), RFC 9111 (no-store; §4.3.4 headers of a 304).
 */
import { type Cookie, type FsCache, ReadOutcome, type Volume } from './cookies.ts'

/** The part of `fetch` that is needed. */
export type Fetch = (url: string, init: RequestInit) => Promise<Response>

/** Settings of `HttpFiles`. */
export interface HttpFilesOptions {
  readonly cache: FsCache
  /** How to talk to servers (default: this runtime's `fetch`). */
  readonly fetch?: Fetch
  /** Files whose validators are remembered while nobody has them open (default 1024). */
  readonly files?: number
}

/** Counters. */
export interface HttpFilesCounters {
  /** Requests to servers: all; those answered 304; those for ranges, and the bytes of pages that they brought. */
  requests: number
  notModified: number
  ranges: number
  bytesFetched: number
  /** Pages answered from the cache, and those fetched. */
  pagesCached: number
  pagesFetched: number
  /** Answers passed through because they may not or cannot be cached. */
  uncached: number
  /** Times that a server had another version. */
  changes: number
}

/** Pages asked for in one request at most. */
const largestRange = 256
/** Bytes handed on at a time by the body of `HttpFiles.fetch`. */
const bodyChunk = 65_536

/** The server has another version than the one that was opened. */
export class StaleFileError extends Error {
  override readonly name = 'StaleFileError'
  /** As of a stale handle of NFS. */
  readonly code = 'ESTALE'
}

/** What is known of a file on a server. */
interface Entry {
  readonly url: string
  /** Where the redirects ended, if there were any; otherwise the URL. */
  readonly target: string
  readonly cookie: Cookie
  /** Headers of the last full answer, with those of later ones that said that it is still good. */
  headers: Headers
  users: number
  /** Pages on their way, by index. */
  readonly coming: Map<number, Promise<Uint8Array>>
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
    uncached: 0,
    changes: 0,
  }
  readonly #fetch: Fetch
  readonly #limit: number
  /** In the order of their last opening. */
  readonly #entries = new Map<string, Entry>()
  readonly #volumes = new Map<string, Volume>()

  constructor(options: HttpFilesOptions) {
    const { cache, files = 1024, fetch = globalThis.fetch } = options
    if (!Number.isInteger(files) || files < 1) throw new RangeError(`files must be a positive integer, got ${files}`)
    this.cache = cache
    this.#limit = files
    this.#fetch = fetch
  }

  /**
   * Opens a file: one request, without a body. Rejects with `Error` when the server does not answer 200 or 304, or when the file has
   * no strong ETag or no length (see `fetch` for those).
   */
  async open(url: string, signal?: AbortSignal): Promise<HttpFile> {
    const href = addressOf(url)
    const answer = await this.#validate(href, signal)
    if (answer instanceof Response)
      throw new Error(
        answer.ok
          ? `${href} cannot be read by pages: it has no strong ETag, no length, or says no-store`
          : `${href}: the server answers ${answer.status} ${answer.statusText}`.trim(),
      )
    answer.users++
    return new HttpFile(this, answer)
  }

  /**
   * As `fetch`: a GET without headers or settings of its own (a `signal` apart) is answered with pages from the cache as far as they are
   * there, after one request that asks whether they are still good. Everything else is passed on; a method that changes something
   * forgets the file.
   */
  async fetch(url: string | URL, init: RequestInit = {}): Promise<Response> {
    const href = addressOf(url)
    const method = (init.method ?? 'GET').toUpperCase()
    if (method !== 'GET' || !isPlain(init)) {
      this.counters.uncached++
      this.counters.requests++
      try {
        return await this.#fetch(href, init)
      } finally {
        if (method !== 'GET' && method !== 'HEAD') this.#forget(href)
      }
    }
    const { signal } = init
    const entry = await this.#validate(href, signal ?? undefined)
    // There are servers that give the length of what they send to a HEAD: nothing.
    if (entry instanceof Response || entry.cookie.size === 0) {
      this.counters.uncached++
      this.counters.requests++
      if (entry instanceof Response) await entry.body?.cancel()
      return this.#fetch(href, init)
    }
    entry.users++
    const file = new HttpFile(this, entry)
    let position = 0
    const body = new ReadableStream<Uint8Array>({
      pull: async (controller) => {
        const chunk = new Uint8Array(Math.min(bodyChunk, file.size - position))
        try {
          // Also when all of it is in the cache.
          signal?.throwIfAborted()
          await file.read(chunk, 0, chunk.length, position, signal ?? undefined)
        } catch (error) {
          file.close()
          throw error
        }
        position += chunk.length
        if (chunk.length > 0) controller.enqueue(chunk)
        if (position < file.size) return
        file.close()
        controller.close()
      },
      cancel: () => file.close(),
    })
    const response = new Response(body, { status: 200, headers: entry.headers })
    return Object.defineProperties(response, {
      url: { value: entry.target },
      redirected: { value: entry.target !== href },
    })
  }

  /** Forgets all files; their pages stay in the cache, for who opens the same version again. */
  close(): void {
    for (const volume of this.#volumes.values()) volume.relinquish()
    this.#volumes.clear()
    this.#entries.clear()
  }

  /** A file is closed. For `HttpFile`. */
  release(entry: Entry): void {
    entry.users--
    this.#trim()
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
      const range = this.#range(entry, version, first + begin, first + end, signal)
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

  /** One range request; the pages, which also go to the cache. */
  async #range(
    entry: Entry,
    version: string,
    first: number,
    last: number,
    signal?: AbortSignal,
  ): Promise<Uint8Array[]> {
    const { cookie, url } = entry
    const { pageSize } = this.cache
    const { size } = cookie
    const start = first * pageSize
    const end = Math.min(size, (last + 1) * pageSize)
    this.counters.requests++
    this.counters.ranges++
    const response = await this.#fetch(url, {
      headers: { ...identity, range: `bytes=${start}-${end - 1}`, 'if-match': version },
      ...(signal === undefined ? {} : { signal }),
    })
    const { status, headers } = response
    const whole = status === 200
    const other = response.ok && (headers.get('etag') !== version || targetOf(response, url) !== entry.target)
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
    const pages = await this.#receive(response, whole ? size : end, start, end, url)
    for (let page = 0; page < pages.length; page++) {
      this.counters.pagesFetched++
      // Meanwhile another version may have been found: then these pages are good for this call only.
      if (cookie.version === version && cookie.enabled && first + page < cookie.pages)
        cookie.write(first + page, pages[page]!)
    }
    return pages
  }

  /**
   * Takes the bytes from `start` to `end` of a file out of a body, as pages; the last one is filled up with zeros. A part begins at
   * `start`, the whole file at 0; neither goes on behind `limit`.
   */
  async #receive(response: Response, limit: number, start: number, end: number, url: string): Promise<Uint8Array[]> {
    const { pageSize } = this.cache
    const at = response.status === 200 ? 0 : start
    const pages = Array.from({ length: Math.ceil((end - start) / pageSize) }, () => new Uint8Array(pageSize))
    let position = at
    if (response.body !== null)
      for await (const chunk of response.body as unknown as AsyncIterable<Uint8Array>) {
        for (let from = Math.max(0, start - position); from < chunk.length && position + from < end; ) {
          const place = position + from - start
          const page = Math.floor(place / pageSize)
          const count = Math.min(pageSize - (place % pageSize), chunk.length - from, end - position - from)
          pages[page]!.set(chunk.subarray(from, from + count), place % pageSize)
          from += count
          this.counters.bytesFetched += count
        }
        position += chunk.length
        // A server that does not know ranges sends all of it, a hostile one never ends: enough is enough.
        if (position > limit || (position >= end && end < limit)) break
      }
    if (position > limit) throw new Error(`${url}: the answer goes on after the ${limit - at} bytes that were promised`)
    if (position < end)
      throw new Error(`${url}: the answer ended after ${position - at} bytes, ${end - at} were promised`)
    return pages
  }

  /** Asks the server for the file's validators: what is known of it, or the answer when it cannot be cached. */
  async #validate(url: string, signal?: AbortSignal): Promise<Entry | Response> {
    const known = this.#entries.get(url)
    this.counters.requests++
    const response = await this.#fetch(url, {
      method: 'HEAD',
      headers: { ...identity, ...(known === undefined ? {} : { 'if-none-match': known.cookie.version }) },
      ...(signal === undefined ? {} : { signal }),
    })
    const target = targetOf(response, url)
    if (response.status === 304 && known !== undefined) {
      this.counters.notModified++
      // The same ETag elsewhere is another file's.
      if (known.target !== target) this.#forget(url)
      // Somebody else may have asked at the same time, and found another version.
      if (this.#entries.get(url) !== known) return this.#validate(url, signal)
      for (const [name, value] of response.headers) if (!ofBody.has(name)) known.headers.set(name, value)
      return this.#used(known)
    }
    const version = response.headers.get('etag') ?? ''
    const length = response.headers.get('content-length') ?? ''
    const control = response.headers.get('cache-control') ?? ''
    const size = /^\d+$/.test(length) ? Number(length) : Number.NaN
    const good = response.status === 200 && /^"[^"]*"$/.test(version) && Number.isSafeInteger(size)
    if (!good || isEncoded(response.headers) || /\bno-store\b/i.test(control)) {
      this.#forget(url)
      return response
    }
    const auxiliary = { version, size }
    if (this.#entries.get(url)?.target !== target) this.#forget(url)
    const entry = this.#entries.get(url)
    if (entry !== undefined) {
      if (entry.cookie.version !== version || entry.cookie.size !== auxiliary.size) {
        this.counters.changes++
        entry.coming.clear()
        entry.cookie.invalidate(auxiliary)
      }
      entry.headers = new Headers(response.headers)
      return this.#used(entry)
    }
    const { origin } = new URL(target)
    let volume = this.#volumes.get(origin)
    if (volume === undefined) {
      volume = this.cache.acquireVolume(origin)
      this.#volumes.set(origin, volume)
    }
    // Several URLs may lead to one: each has its own pages of it.
    const cookie = volume.acquireCookie(target === url ? url : `${url} ${target}`, auxiliary)
    const headers = new Headers(response.headers)
    const made: Entry = { url, target, cookie, headers, users: 0, coming: new Map() }
    this.#entries.set(url, made)
    this.#trim(made)
    return made
  }

  #used(entry: Entry): Entry {
    this.#entries.delete(entry.url)
    this.#entries.set(entry.url, entry)
    return entry
  }

  #stale({ url }: Entry): StaleFileError {
    return new StaleFileError(`${url} has changed on the server since it was opened: open it again`)
  }

  /** The server has another version: nobody may be given the old one any more. */
  #changed(entry: Entry, version: string): void {
    if (entry.cookie.version !== version) return
    this.counters.changes++
    this.#forget(entry.url)
  }

  #forget(url: string): void {
    const entry = this.#entries.get(url)
    if (entry === undefined) return
    this.#entries.delete(url)
    entry.coming.clear()
    // Open files hold on to a cookie without a version: their next read says that it is stale.
    entry.cookie.invalidate({ version: '', size: 0 })
    entry.cookie.relinquish(true)
  }

  /** Files that nobody has open are forgotten, the ones longest unused first; their pages stay. */
  #trim(keep?: Entry): void {
    for (const entry of this.#entries.values()) {
      if (this.#entries.size <= this.#limit) return
      if (entry.users > 0 || entry === keep) continue
      this.#entries.delete(entry.url)
      entry.cookie.relinquish()
    }
  }
}

/** So that ranges and lengths are those of the file, not of a compressed form. */
const identity = { 'accept-encoding': 'identity' }
/** Headers that describe a body: a 304 has none. */
const ofBody: ReadonlySet<string> = new Set([
  'content-length',
  'content-encoding',
  'content-range',
  'transfer-encoding',
])
/** Settings of a request that change nothing of the answer. */
const plain: Readonly<Record<string, readonly unknown[]>> = {
  body: [null],
  cache: ['default', 'no-cache'],
  redirect: ['follow'],
}

/** Whether a request can be answered from the cache: settings that are not known to do no harm are none of ours. */
function isPlain(init: RequestInit): boolean {
  return Object.entries(init).every(([name, value]) => {
    if (value === undefined || name === 'method' || name === 'signal') return true
    if (name === 'headers') return [...new Headers(init.headers).keys()].length === 0
    return plain[name]?.includes(value) ?? false
  })
}

/** What servers are asked for: without a fragment. Throws `TypeError` for what is no URL. */
function addressOf(url: string | URL): string {
  const address = new URL(url)
  address.hash = ''
  return address.href
}

/** Where an answer comes from, after redirects. Answers that a program made itself have no URL. */
const targetOf = ({ url }: Response, asked: string): string => (url === '' ? asked : url)

const isEncoded = (headers: Headers): boolean => !/^(identity)?$/i.test(headers.get('content-encoding') ?? '')

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
