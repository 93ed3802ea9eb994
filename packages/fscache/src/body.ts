/**
 * Bodies: what a server sends fills the cache as it passes by, and what a program reads is put together from memory, from
 * pages of the cache, and from what a server sends.
 *
 * Invariants:
 *  - Nothing is read from a server before somebody wants it, and nothing is held that was read but the page that it ends in.
 *  - Pages are written in the order in which they come; the last one when the body has ended well.
 *  - A body hands on each byte once, in order, of one version; or it errors.
 */
import type { Cookie } from './cookies.ts'

/** Bytes of a body from `at` on. */
export interface Piece {
  readonly at: number
  readonly bytes: Uint8Array
}

/** What comes over one connection. */
export interface FillOptions {
  readonly body: ReadableStream<Uint8Array>
  readonly cookie: Cookie
  readonly pageSize: number
  /** Where the body begins in the file: at the beginning of a page. */
  readonly start: number
  /** Where it ends, when that is known. */
  readonly end?: number
  /** True: another end is an error. Otherwise it is told to `ended`. */
  readonly exact: boolean
  /** Bytes behind which nothing is kept. */
  readonly limit: number
  /** Bytes and pages that came. */
  readonly received: (bytes: number, pages: number) => void
  /** The body has ended well at `size`; or it has not, and will not. */
  readonly ended: (size: number | undefined) => void
  /** What the body is of, for messages. */
  readonly name: string
}

/** A body on its way from a server, read by one or several, each at its own pace. */
export class Fill {
  readonly start: number
  readonly end: number | undefined
  readonly exact: boolean
  /** Where the next piece begins. */
  position: number
  /** Those who read it. When the last one leaves, the connection is given up. */
  users = 0
  readonly #options: FillOptions
  readonly #reader: ReadableStreamDefaultReader<Uint8Array>
  /** The page that a piece ended in. */
  readonly #page: Uint8Array
  #coming: Promise<Piece | undefined> | undefined
  #over = false

  constructor(options: FillOptions) {
    this.#options = options
    this.start = options.start
    this.end = options.end
    this.exact = options.exact
    this.position = options.start
    this.#reader = options.body.getReader()
    this.#page = new Uint8Array(options.pageSize)
  }

  /** False when nothing can come any more. */
  get open(): boolean {
    return !this.#over
  }

  /** What has come of the page that the last piece ended in: the caller must copy it. */
  get begun(): Piece {
    const rest = this.position % this.#page.length
    return { at: this.position - rest, bytes: this.#page.subarray(0, rest) }
  }

  /** The next piece, the same for all who wait for it; undefined at the end. Its bytes are the caller's when there is one user. */
  next(): Promise<Piece | undefined> {
    this.#coming ??= this.#read()
    return this.#coming
  }

  /** One user less. */
  async leave(): Promise<void> {
    this.users--
    if (this.users > 0 || this.#over) return
    this.#finish(undefined)
    // Nobody wants it any more, so nobody is told how it would have ended.
    await this.#reader.cancel().catch(() => undefined)
  }

  async #read(): Promise<Piece | undefined> {
    const { exact, end, name } = this.#options
    try {
      const { done, value } = await this.#reader.read()
      if (!done) {
        this.#coming = undefined
        return this.#keep(value)
      }
      if (exact && end !== undefined && this.position < end)
        throw new Error(
          `${name}: the answer ended after ${this.position - this.start} bytes, ${end - this.start} were promised`,
        )
    } catch (error) {
      this.#finish(undefined)
      throw error
    }
    this.#finish(this.position)
    return undefined
  }

  #keep(bytes: Uint8Array): Piece {
    const { pageSize, received, exact, end, name } = this.#options
    const at = this.position
    if (exact && end !== undefined && at + bytes.length > end)
      throw new Error(`${name}: the answer goes on after the ${end - this.start} bytes that were promised`)
    let from = 0
    let pages = 0
    while (from < bytes.length) {
      const place = (at + from) % pageSize
      const count = Math.min(pageSize - place, bytes.length - from)
      const index = Math.floor((at + from) / pageSize)
      const part = bytes.subarray(from, from + count)
      if (count < pageSize) this.#page.set(part, place)
      if (place + count === pageSize) {
        this.#write(index, count < pageSize ? this.#page : part)
        pages++
      }
      from += count
    }
    this.position += bytes.length
    received(bytes.length, pages)
    return { at, bytes }
  }

  #write(index: number, page: Uint8Array): void {
    const { cookie, pageSize, end, limit } = this.#options
    const behind = (index + 1) * pageSize
    if (!cookie.enabled || behind > limit) return
    // Of a body whose length is not known the file grows as it comes.
    if (end === undefined && cookie.size < behind) cookie.resize(behind)
    if (index < cookie.pages) cookie.write(index, page)
  }

  #finish(size: number | undefined): void {
    if (this.#over) return
    this.#over = true
    const { cookie, pageSize, received, ended, end, limit } = this.#options
    const rest = this.position % pageSize
    if (size !== undefined && rest > 0) {
      this.#page.fill(0, rest)
      if (cookie.enabled && size <= limit && (end === undefined || end === size)) {
        if (end === undefined) cookie.resize(size)
        const index = Math.floor(size / pageSize)
        if (index < cookie.pages) cookie.write(index, this.#page)
      }
      received(0, 1)
    }
    ended(size)
  }
}

/** What of a file was found in the cache. */
export interface Look {
  /** Copies of the beginning of the file, in segments; zeros where there are holes. */
  readonly segments: readonly Uint8Array[]
  /** Bytes of a segment, but for the last one. */
  readonly segmentBytes: number
  /** Where holes begin and end; both are the size of the file when there is none. Between them there may be pages. */
  readonly first: number
  readonly last: number
}

/** What a body is put together from. */
export interface SourceOptions {
  /** Bytes of the file, when they are known. */
  readonly size?: number
  readonly look?: Look
  readonly fill?: Fill
  /** True: when `fill` breaks off, the rest is to be had without it. It was asked for by somebody else. */
  readonly shared?: boolean
  readonly signal?: AbortSignal | undefined
  /** What is neither in `look` nor in `fill`: pages of the cache from `position` on, or else what the server sends. */
  readonly rest: (position: number) => Promise<Uint8Array | Fill>
}

/** What is used of a byte stream's controller: as Node's types and a browser's have it, which disagree about the rest. */
interface Controller {
  readonly byobRequest: { respond(bytes: number): void } | null
  enqueue(bytes: Uint8Array<ArrayBuffer>): void
  error(reason: unknown): void
  close(): void
}

/** The body of a `Response`, for a byte stream. */
export class Source {
  readonly type = 'bytes' as const
  readonly #options: SourceOptions
  readonly #segments: (Uint8Array | undefined)[]
  #size: number | undefined
  #fill: Fill | undefined
  #position = 0
  #over = false
  #forget: (() => void) | undefined

  constructor(options: SourceOptions) {
    this.#options = options
    this.#size = options.size
    this.#segments = [...(options.look?.segments ?? [])]
    if (options.fill !== undefined) this.#use(options.fill)
  }

  start(controller: Controller): void {
    const { signal } = this.#options
    if (signal === undefined) return
    // A signal may live longer than all bodies that nobody reads to their end.
    const weak = new WeakRef(this)
    const aborted = (): void => {
      const source = weak.deref()
      if (source === undefined || source.#over) return
      controller.error(signal.reason)
      void source.#end()
    }
    signal.addEventListener('abort', aborted, { once: true })
    this.#forget = () => signal.removeEventListener('abort', aborted)
  }

  async pull(controller: Controller): Promise<void> {
    try {
      const bytes = await this.#piece()
      if (this.#over) return
      if (bytes !== undefined) {
        this.#position += bytes.length
        controller.enqueue(bytes as Uint8Array<ArrayBuffer>)
        if (this.#position !== this.#size || this.#fill !== undefined) return
      }
      await this.#end()
      controller.close()
      controller.byobRequest?.respond(0)
    } catch (error) {
      if (this.#over) return
      await this.#end()
      throw error
    }
  }

  async cancel(): Promise<void> {
    await this.#end()
  }

  async #piece(): Promise<Uint8Array | undefined> {
    for (;;) {
      const fill = this.#fill
      const position = this.#position
      // A part that has come is read to its end, so that the connection serves again, and one that is too long is found out.
      const passed = fill?.exact === true && position >= fill.end!
      const found = passed ? undefined : this.#found()
      if (found !== undefined) return found
      if (fill === undefined && position === this.#size) return undefined
      if (fill === undefined || position < fill.position) {
        const begun = fill?.begun
        if (begun !== undefined && begun.at <= position) return begun.bytes.slice(position - begun.at)
        const rest = await this.#options.rest(position)
        if (rest instanceof Uint8Array) return rest
        await this.#drop()
        this.#use(rest)
        continue
      }
      const piece = await this.#next(fill)
      if (piece === undefined) {
        if (this.#size === undefined) return undefined
      } else if (piece.at <= position && piece.at + piece.bytes.length > position) {
        const bytes = piece.bytes.subarray(position - piece.at)
        // A byte stream takes the whole buffer away.
        return fill.users > 1 || bytes.length !== bytes.buffer.byteLength ? bytes.slice() : bytes
      }
    }
  }

  async #next(fill: Fill): Promise<Piece | undefined> {
    let piece: Piece | undefined
    try {
      piece = await fill.next()
    } catch (error) {
      if (this.#options.shared !== true || fill !== this.#options.fill) throw error
    }
    if (piece === undefined && this.#fill === fill) await this.#drop()
    return piece
  }

  /** What was looked up, from the position on. */
  #found(): Uint8Array | undefined {
    const { look } = this.#options
    if (look === undefined) return undefined
    const { segmentBytes } = look
    const position = this.#position
    const segment = Math.floor(position / segmentBytes)
    const bytes = this.#segments[segment]
    if (bytes === undefined) return undefined
    if (position >= look.first && position < look.last) return undefined
    const from = position - segment * segmentBytes
    const until = Math.min(bytes.length, (position < look.first ? look.first : this.#size!) - segment * segmentBytes)
    if (from >= until) return undefined
    if (from > 0 || until < bytes.length) return bytes.slice(from, until)
    this.#segments[segment] = undefined
    return bytes
  }

  #use(fill: Fill): void {
    this.#fill = fill
    fill.users++
  }

  async #drop(): Promise<void> {
    const fill = this.#fill
    this.#fill = undefined
    await fill?.leave()
  }

  async #end(): Promise<void> {
    this.#over = true
    this.#segments.length = 0
    this.#forget?.()
    await this.#drop()
  }
}

/** A response made here looks like one of `fetch`; so do its clones. */
export function dressed(response: Response, like: Pick<Response, 'url' | 'redirected' | 'type'>): Response {
  const { url, redirected, type } = like
  const clone = response.clone.bind(response)
  return Object.defineProperties(response, {
    url: { value: url },
    redirected: { value: redirected },
    type: { value: type },
    clone: { value: () => dressed(clone(), like) },
  })
}
