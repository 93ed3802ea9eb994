/**
 * Open files: each of one version, read by ranges that name the version (`If-Match`).
 *
 * Invariants:
 *  - All bytes of an open file are of the version that was opened.
 *  - Readers of the same page share one request.
 *
 * DEVIATION: once the server has another version, reads of bytes outside of the cache reject (`ESTALE`).
 *
 * Source: RFC 9110 §13.1.1 (If-Match), §14 (range requests).
 */
import { untilAborted } from '@tmem/core'
import { isEncoded, targetOf, wrongLength, wrongRange } from './answers.ts'
import { type Fill, type Piece, unwritten } from './body.ts'
import { type FsCache, ReadOutcome } from './cookies.ts'
import { asking, type Fetch, identity } from './request.ts'
import type { Entry, HttpFilesCounters, Table, Way } from './table.ts'

/** Pages asked for in one request of an open file at most. */
const largestRange = 256
/** Answers of an address that was good for a while. */
const expired: ReadonlySet<number> = new Set([401, 403, 404, 410])

/** The server has another version than the one that was opened. */
export class StaleFileError extends Error {
  override readonly name = 'StaleFileError'
  /** As of a stale handle of NFS. */
  readonly code = 'ESTALE'
}

/** For somebody who was given a file of another version. */
export const stale = ({ url }: Entry): StaleFileError =>
  new StaleFileError(`${url} has changed on the server since it was opened: open it again`)

/** An open file's reads, for all that are open. */
export class Parts {
  readonly cache: FsCache
  readonly #table: Table
  readonly #counters: HttpFilesCounters
  readonly #fetch: Fetch

  constructor(cache: FsCache, table: Table, counters: HttpFilesCounters, fetch: Fetch) {
    this.cache = cache
    this.#table = table
    this.#counters = counters
    this.#fetch = fetch
  }

  /** Fills `into` with pages `first` to `last` of a file. For `HttpFile`. */
  async pages(entry: Entry, version: string, first: number, last: number, signal?: AbortSignal): Promise<Uint8Array[]> {
    const { cookie } = entry
    if (cookie.version !== version) throw stale(entry)
    const { pageSize } = this.cache
    const count = last - first + 1
    const room = unwritten(count * pageSize)
    const pages: (Uint8Array | undefined)[] = new Array<undefined>(count).fill(undefined)
    const ways: (Way | undefined)[] = []
    const answers = cookie.readMany(first, room)
    // Awaited only where a store has to wait.
    const outcomes = Array.isArray(answers) ? answers : await answers
    for (let at = 0; at < count; at++) {
      if (outcomes[at] === ReadOutcome.Data) {
        pages[at] = room.subarray(at * pageSize, (at + 1) * pageSize)
        this.#counters.pagesCached++
      } else ways[at] = entry.coming?.get(first + at)
    }
    if (cookie.version !== version) throw stale(entry)
    const waiting: Promise<void>[] = []
    for (let at = 0; at < count; at++) {
      if (pages[at] !== undefined) continue
      const way = ways[at]
      if (way !== undefined) {
        const alone = this.#along(way, entry, version, first + at, signal)
        waiting.push(alone.then((page) => void pages.splice(at, 1, page)))
        continue
      }
      const begin = at
      while (at + 1 < count && pages[at + 1] === undefined && ways[at + 1] === undefined) at++
      const part = this.#part(entry, version, first + begin, first + at, signal)
      this.#announce(entry, first + begin, first + at, part)
      waiting.push(part.then((some) => void pages.splice(begin, some.length, ...some)))
    }
    if (waiting.length > 0) await Promise.all(waiting)
    return pages as Uint8Array[]
  }

  /** A page that is on its way to somebody else, who may give up: that is no answer to us. */
  async #along(way: Way, entry: Entry, version: string, index: number, signal?: AbortSignal): Promise<Uint8Array> {
    const pages = await way.pages.catch(() => undefined)
    return pages?.[index - way.first] ?? (await this.#range(entry, version, index, index, signal))[0]!
  }

  /** Lets others wait for pages that are on their way, until they are here, or are not going to come. */
  #announce(entry: Entry, first: number, last: number, pages: Promise<Uint8Array[]>): void {
    entry.coming ??= new Map()
    const { coming } = entry
    const way: Way = { first, pages }
    for (let index = first; index <= last; index++) coming.set(index, way)
    const arrived = (): void => {
      for (let index = first; index <= last; index++) if (coming.get(index) === way) coming.delete(index)
    }
    // A failure is told to those who wait for the pages.
    pages.then(arrived, arrived)
  }

  /**
   * Pages from the server: out of the whole file, if that is coming already and has not passed them, or by a request of
   * their own.
   */
  async #part(entry: Entry, version: string, first: number, last: number, signal?: AbortSignal): Promise<Uint8Array[]> {
    const { fill, cookie } = entry
    const { pageSize } = this.cache
    const start = first * pageSize
    if (fill?.open === true && fill.begun.at <= start) {
      const pages = await untilAborted(this.#through(fill, start, Math.min(cookie.size, (last + 1) * pageSize)), signal)
      if (cookie.version !== version) throw stale(entry)
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
    this.#counters.ranges++
    const init: RequestInit = {
      ...asking,
      headers: { ...identity, range: `bytes=${start}-${end - 1}`, 'if-match': version },
      ...(signal === undefined ? {} : { signal }),
    }
    // What was opened is what the redirect led to then: an address that may be good for a while only.
    let response = await this.#fetch(target, init)
    if (target !== url && expired.has(response.status)) {
      await response.body?.cancel()
      response = await this.#fetch(url, init)
    }
    const { status, headers } = response
    const whole = status === 200
    const other = response.ok && (headers.get('etag') !== version || targetOf(response, url) !== target)
    // 416: the file is shorter now, or was never as long as the server said.
    if (status === 412 || status === 416 || other) {
      await response.body?.cancel()
      this.#table.changed(entry, version)
      throw stale(entry)
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
    if (whole && response.body !== null) return this.#whole(entry, version, response, start, end)
    const bytes = await this.#receive(response, start, end, url)
    const count = bytes.length / pageSize
    this.#counters.pagesFetched += count
    // Meanwhile another version may have been found: then these pages are good for this call only.
    if (cookie.version === version && cookie.enabled) {
      cookie.hold(first, bytes)
      cookie.settleSoon()
    }
    return Array.from({ length: count }, (_, page) => bytes.subarray(page * pageSize, (page + 1) * pageSize))
  }

  /**
   * A server that does not know ranges sends all of the file: its pages are kept, and what is asked for next may still
   * come.
   */
  async #whole(entry: Entry, version: string, response: Response, start: number, end: number): Promise<Uint8Array[]> {
    const { cookie, url } = entry
    const { size } = cookie
    const fill = this.#table.fill(entry, response, 0, size, true)
    fill.users = 1
    if (cookie.version === version && entry.users > 0) {
      await this.#table.abandon(entry)
      entry.fill = fill
    }
    const pages = await this.#through(fill, start, end)
    if (entry.fill !== fill) await fill.leave()
    if (pages === undefined)
      throw new Error(`${url}: the answer ended after ${fill.position} bytes, ${size} were promised`)
    return pages
  }

  /**
   * Takes the bytes from `start` to `end` of a file, which are all of a body; the last page is filled up with zeros.
   */
  async #receive({ body }: Response, start: number, end: number, url: string): Promise<Uint8Array> {
    const { pageSize } = this.cache
    const promised = end - start
    const bytes = unwritten(Math.ceil(promised / pageSize) * pageSize)
    const reader = body?.getReader()
    let came = 0
    for (;;) {
      const value = (await reader?.read())?.value
      if (value === undefined) break
      this.#counters.bytesFetched += value.length
      // A hostile one never ends: enough is enough.
      if (came + value.length > promised) {
        await reader!.cancel()
        throw new Error(`${url}: the answer goes on after the ${promised} bytes that were promised`)
      }
      bytes.set(value, came)
      came += value.length
    }
    if (came < promised) throw new Error(`${url}: the answer ended after ${came} bytes, ${promised} were promised`)
    return bytes.fill(0, promised)
  }

  /** A file is closed. */
  release(entry: Entry): void {
    this.#table.release(entry)
  }
}

/** A version of a file of a server, open for reading. */
export class HttpFile {
  readonly url: string
  /** Bytes of the file. */
  readonly size: number
  /** Its ETag. */
  readonly version: string
  readonly #parts: Parts
  readonly #entry: Entry
  #closed = false

  /** Made by `HttpFiles.open`. */
  constructor(parts: Parts, entry: Entry) {
    this.#parts = parts
    this.#entry = entry
    this.url = entry.url
    this.size = entry.cookie.size
    this.version = entry.cookie.version
  }

  /**
   * Fills `into` from `at` with up to `length` bytes of the file from `position`; answers how many, fewer only at the
   * end. Rejects with `StaleFileError` when the server has another version by now, with what `fetch` rejects with when
   * it cannot be reached.
   */
  async read(into: Uint8Array, at: number, length: number, position: number, signal?: AbortSignal): Promise<number> {
    if (this.#closed) throw new Error(`${this.url} is closed`)
    if (![at, length, position].every((number) => Number.isSafeInteger(number) && number >= 0))
      throw new RangeError(`at, length and position must be integers, not negative; got ${at}, ${length}, ${position}`)
    if (at + length > into.length) throw new RangeError(`${length} bytes at ${at} lie outside of ${into.length} bytes`)
    const { pageSize } = this.#parts.cache
    const end = Math.min(position + length, this.size)
    if (end <= position) return 0
    for (let from = position; from < end; ) {
      const first = Math.floor(from / pageSize)
      const last = Math.min(Math.floor((end - 1) / pageSize), first + largestRange - 1)
      const pages = await this.#parts.pages(this.#entry, this.version, first, last, signal)
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
    this.#parts.release(this.#entry)
  }
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
