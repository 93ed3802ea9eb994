/**
 * Bodies. The bytes of a server fill the cache on their way, and a program reads bytes from memory, from pages of the
 * cache, and from a server, put together.
 *
 * Invariants:
 *  - Bytes are read from a server only on demand, and of the read bytes only the last, incomplete page is held.
 *  - Pages are written in the order of their arrival; the last one after a successful end of the body.
 *  - A body delivers each byte once, in order, of one version, or it fails.
 *  - Bytes that a body promises from the cache are copied before its first byte, as pages may vanish at any time.
 */
import { untilAborted } from '@tmem/core'
import { type Cookie, ReadOutcome } from './cookies.ts'

/** Bytes of a body from `at` on. */
export interface Piece {
  readonly at: number
  readonly bytes: Uint8Array
}

/** What comes over one connection. */
export interface FillOptions {
  /** Whose body it is: one that has a body. A runtime breaks off the body of a response that nobody holds. */
  readonly response: Response
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

const nothing = new Uint8Array(0)

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
  #reader: ReadableStreamDefaultReader<Uint8Array> | undefined
  /**
   * True: pages wait until the body has ended, and are put after it was handed over. Then the bytes of pieces are the
   * cache's, too: nobody may change them, or give them away.
   */
  behind = false
  /** The page that a piece ended in, and memory for further ones. */
  #page: Uint8Array | undefined
  #spare: Uint8Array = nothing
  #coming: Promise<Piece | undefined> | undefined
  #over = false

  constructor(options: FillOptions) {
    this.#options = options
    this.start = options.start
    this.end = options.end
    this.exact = options.exact
    this.position = options.start
  }

  /** False when nothing can come any more. */
  get open(): boolean {
    return !this.#over
  }

  /** What has come of the page that the last piece ended in: the caller must copy it. */
  get begun(): Piece {
    const rest = this.position % this.#options.pageSize
    return { at: this.position - rest, bytes: rest === 0 ? nothing : this.#border.subarray(0, rest) }
  }

  /**
   * The next piece, the same for all who wait for it; undefined at the end. Its bytes are the caller's when there is
   * one user.
   */
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
    await (this.#reader ?? this.#options.response.body!).cancel().catch(() => undefined)
  }

  async #read(): Promise<Piece | undefined> {
    const { exact, end, name } = this.#options
    try {
      this.#reader ??= this.#options.response.body!.getReader()
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
    const begun = at % pageSize
    let from = 0
    let pages = 0
    if (begun > 0) {
      from = Math.min(pageSize - begun, bytes.length)
      this.#border.set(bytes.subarray(0, from), begun)
      if (begun + from === pageSize) pages += this.#write(at - begun, this.#takePage())
    }
    const until = bytes.length - ((bytes.length - from) % pageSize)
    if (until > from) pages += this.#write(at + from, bytes.subarray(from, until))
    if (until < bytes.length) this.#border.set(bytes.subarray(until))
    this.position += bytes.length
    received(bytes.length, pages)
    return { at, bytes }
  }

  /** The page that is on its way in parts. */
  get #border(): Uint8Array {
    if (this.#page === undefined) {
      const { pageSize } = this.#options
      // Where pages wait there are many: several are cut from one buffer, which costs about as much as one of a page.
      if (this.#spare.length === 0) this.#spare = unwritten(this.behind ? 4 * pageSize : pageSize)
      this.#page = this.#spare.subarray(0, pageSize)
      this.#spare = this.#spare.subarray(pageSize)
    }
    return this.#page
  }

  /** The page that is full now: the cache's, when it waits. */
  #takePage(): Uint8Array {
    const page = this.#border
    if (this.behind) this.#page = undefined
    return page
  }

  /** Hands pages in, which begin at a place in the file, as far as they are kept; how many they are. */
  #write(at: number, pages: Uint8Array): number {
    const { cookie, pageSize, end, limit } = this.#options
    const count = pages.length / pageSize
    const first = at / pageSize
    const allowed = Math.min(count, Math.floor(limit / pageSize) - first)
    if (!cookie.enabled || allowed <= 0) return count
    const behind = (first + allowed) * pageSize
    // Of a body whose length is not known the file grows as it comes.
    if (end === undefined && cookie.size < behind) cookie.resize(behind)
    const kept = Math.min(allowed, cookie.pages - first)
    if (kept > 0) this.#hand(first, pages.subarray(0, kept * pageSize))
    return count
  }

  #hand(first: number, pages: Uint8Array): void {
    const { cookie } = this.#options
    if (this.behind) cookie.hold(first, pages)
    else cookie.writeMany(first, pages)
  }

  #finish(size: number | undefined): void {
    if (this.#over) return
    this.#over = true
    const { cookie, pageSize, received, ended, end, limit } = this.#options
    const rest = this.position % pageSize
    if (size !== undefined && rest > 0) {
      this.#border.fill(0, rest)
      if (cookie.enabled && size <= limit && (end === undefined || end === size)) {
        if (end === undefined) cookie.resize(size)
        const index = Math.floor(size / pageSize)
        if (index < cookie.pages) this.#hand(index, this.#border)
      }
      received(0, 1)
    }
    ended(size)
    cookie.settleSoon()
  }
}

/** What of a file was found in the cache. */
export interface Look {
  /** A copy of the beginning of the file; where there are holes, anything. */
  readonly bytes: Uint8Array<ArrayBuffer>
  /** Where holes begin and end; both are the size of the file when there is none. Between them there may be pages. */
  readonly first: number
  readonly last: number
}

/** How many pages are asked for at a time: where the store has to wait, it has that many to bring. */
const lookAtOnce = 64

/** Memory for bytes all of which are going to be written: what is in it first is not defined. */
export function unwritten(bytes: number): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Buffer.allocUnsafeSlow(bytes).buffer)
}

/** Reads what is there of a file, the first `copied` bytes of which are kept, and finds out what is not. */
export async function lookAt(cookie: Cookie, pageSize: number, copied: number): Promise<Look> {
  const { size, pages } = cookie
  const bytes = unwritten(copied)
  // Of the last page, which has more bytes than the file, a part is kept; of those behind what is kept nothing.
  const whole = Math.floor(copied / pageSize)
  const scratch = new Uint8Array(Math.min(pages - whole, lookAtOnce) * pageSize)
  let [first, last] = [size, 0]
  for (let index = 0; index < pages; ) {
    const from = index
    const until = Math.min(from < whole ? whole : pages, from + lookAtOnce)
    const into = (from < whole ? bytes.subarray(from * pageSize) : scratch).subarray(0, (until - from) * pageSize)
    const answers = cookie.readMany(from, into)
    for (const outcome of Array.isArray(answers) ? answers : await answers) {
      if (outcome !== ReadOutcome.Data) {
        first = Math.min(first, index * pageSize)
        last = Math.max(last, Math.min(size, (index + 1) * pageSize))
      }
      index++
    }
    if (from === whole && copied % pageSize > 0) bytes.set(into.subarray(0, copied % pageSize), whole * pageSize)
  }
  return { bytes, first, last: first === size ? size : last }
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

/**
 * What is used of a byte stream's controller: as Node's types and a browser's have it, which disagree about the rest.
 */
interface Controller {
  readonly byobRequest: { respond(bytes: number): void } | null
  enqueue(bytes: Uint8Array<ArrayBuffer>): void
  error(reason: unknown): void
  close(): void
}

/** Bytes of a piece of a body that comes from the cache, at most, or a page when that is larger. */
export const pieceBytes = 262_144

/** Of a body that has more bytes to come the pages are put after it was handed over. */
const waitFrom = 65_536

/** The bytes of a body: piece by piece as the source of a byte stream, or all at once. */
export class Source {
  readonly type = 'bytes' as const
  readonly #options: SourceOptions
  #look: Look | undefined
  #size: number | undefined
  #fill: Fill | undefined
  #position = 0
  #over = false
  #controller: Controller | undefined
  /** Others may read the piece that was given last. */
  #lent = false
  #forget: (() => void) | undefined

  constructor(options: SourceOptions) {
    this.#options = options
    this.#size = options.size
    this.#look = options.look
    if (options.fill !== undefined) this.#use(options.fill)
    if (options.signal !== undefined) this.#heed(options.signal)
  }

  start(controller: Controller): void {
    this.#controller = controller
    const { signal } = this.#options
    if (signal?.aborted === true) controller.error(signal.reason)
  }

  async pull(controller: Controller): Promise<void> {
    try {
      const bytes = await this.#piece()
      if (this.#over) return
      if (bytes !== undefined) {
        this.#position += bytes.length
        // A byte stream takes the whole buffer away.
        const mine =
          bytes.length === bytes.buffer.byteLength && !this.#lent && !this.#fill?.behind ? bytes : bytes.slice()
        controller.enqueue(mine as Uint8Array<ArrayBuffer>)
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

  /** All bytes, for who has not begun with a stream of them. */
  async all(): Promise<Uint8Array<ArrayBuffer>> {
    const { signal } = this.#options
    signal?.throwIfAborted()
    const look = this.#look
    try {
      if (look !== undefined && look.first === look.last && look.bytes.length === this.#size) return look.bytes
      // Joined at the end, as `fetch` does: room for all of it that stands from the first byte on outlives scavenges,
      // and costs full collections.
      const pieces: Uint8Array[] = []
      const fill = this.#fill
      if (fill?.users === 1 && fill.end !== undefined && fill.end - fill.position > waitFrom) fill.behind = true
      for (;;) {
        const bytes = await (signal === undefined ? this.#piece() : untilAborted(this.#piece(), signal))
        if (bytes === undefined) break
        this.#position += bytes.length
        pieces.push(this.#lent ? bytes.slice() : bytes)
      }
      const into = unwritten(this.#position)
      let at = 0
      for (const piece of pieces) {
        into.set(piece, at)
        at += piece.length
      }
      return into
    } finally {
      await this.#end()
    }
  }

  /** The next bytes; undefined at the end. They are the caller's if nobody else is given their buffer. */
  async #piece(): Promise<Uint8Array | undefined> {
    for (;;) {
      if (this.#over) return undefined
      const fill = this.#fill
      const position = this.#position
      this.#lent = false
      // A part that has come is read to its end, so that the connection serves again, and one that is too long is found
      // out.
      const passed = fill?.exact === true && position >= fill.end!
      const found = passed ? undefined : this.#found()
      if (found !== undefined) return found
      if (fill === undefined && position === this.#size) return undefined
      if (fill === undefined || position < fill.position) {
        const begun = fill?.begun
        if (begun !== undefined && begun.at <= position) {
          this.#lent = true
          return begun.bytes.subarray(position - begun.at)
        }
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
        this.#lent = fill.users > 1
        return piece.bytes.subarray(position - piece.at)
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
    const look = this.#look
    if (look === undefined) return undefined
    const { bytes, first, last } = look
    const position = this.#position
    if (position >= first && position < last) return undefined
    const until = Math.min(bytes.length, position < first ? first : this.#size!, position + pieceBytes)
    if (until === bytes.length) this.#look = undefined
    return position < until ? bytes.subarray(position, until) : undefined
  }

  /** Ends with the signal, which may live longer than all bodies that nobody reads to their end. */
  #heed(signal: AbortSignal): void {
    const weak = new WeakRef(this)
    const aborted = (): void => {
      const source = weak.deref()
      if (source !== undefined) source.#abort(signal)
    }
    signal.addEventListener('abort', aborted, { once: true })
    this.#forget = () => signal.removeEventListener('abort', aborted)
    if (signal.aborted) this.#abort(signal)
  }

  #abort(signal: AbortSignal): void {
    if (this.#over) return
    this.#controller?.error(signal.reason)
    void this.#end()
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
    this.#look = undefined
    this.#forget?.()
    await this.#drop()
  }
}
