/**
 * Responses that look like those of `fetch`, and whose bodies come from a `Source`.
 *
 * Invariants:
 *  - As with `fetch`, the headers are immutable, and a body is read once, as a stream or as a whole; clones look the
 *    same.
 *  - A stream is made only on demand. `arrayBuffer` and similar methods return the bytes copied from the cache, or
 *    assemble them as they arrive; the methods of the runtime would copy each body twice more.
 *
 * DEVIATION: the methods of `Response.prototype`, called on such a response by themselves, see no body.
 */
import { Readable } from 'node:stream'
import type { Source } from './body.ts'
import type { Fields } from './request.ts'

/** What a response looks like, but for its body. */
export type Like = Pick<Response, 'status' | 'statusText' | 'headers' | 'url' | 'redirected' | 'type'>

type Stream = NonNullable<Response['body']>

// The runtime's classes, without what is defined here: to TypeScript that is no accessor or method of theirs.
const NativeHeaders: new (init: Headers) => Omit<Headers, 'append' | 'set' | 'delete'> = Headers
const NativeResponse: new (body: null, init: ResponseInit) => Pick<Response, 'ok' | 'status' | 'statusText'> = Response

/** Headers that cannot be changed, as those of what `fetch` answers. */
export class FixedHeaders extends NativeHeaders implements Headers {
  append(_name: string, _value: string): void {
    throw new TypeError('immutable')
  }
  set(_name: string, _value: string): void {
    throw new TypeError('immutable')
  }
  delete(_name: string): void {
    throw new TypeError('immutable')
  }
}

/** The headers of an answer as they were: those of the runtime's `fetch` cannot be changed, those of a program can. */
export const fixed = ({ headers, type }: Pick<Like, 'headers' | 'type'>): Headers =>
  type === 'default' ? new FixedHeaders(headers) : headers

/** The same with others: a name that comes again has all of its values. */
export function withFields(headers: Headers, fields: Fields): FixedHeaders {
  const all = new FixedHeaders(headers)
  const { set, append } = Headers.prototype
  let before = ''
  for (const [name, value] of fields) {
    if (name === before) append.call(all, name, value)
    else set.call(all, name, value)
    before = name
  }
  return all
}

/** An answer, 200, with the bytes of a source, or of a stream. */
export class CachedResponse extends NativeResponse implements Response {
  readonly #like: Like
  #source: Source | undefined
  /** Made when it is asked for. */
  #stream: Stream | undefined

  constructor(body: Source | Stream, like: Like) {
    super(null, { status: like.status, statusText: like.statusText })
    this.#like = like
    if (body instanceof ReadableStream) this.#stream = body
    else this.#source = body
  }

  get headers(): Headers {
    return this.#like.headers
  }
  get url(): string {
    return this.#like.url
  }
  get redirected(): boolean {
    return this.#like.redirected
  }
  get type(): Response['type'] {
    return this.#like.type
  }

  get body(): Stream {
    if (this.#stream === undefined) {
      const source = this.#source
      this.#source = undefined
      this.#stream = source === undefined ? spent() : new ReadableStream(source, { highWaterMark: 0 })
    }
    return this.#stream
  }

  get bodyUsed(): boolean {
    if (this.#stream === undefined) return this.#source === undefined
    return Readable.isDisturbed(this.#stream as unknown as NodeJS.ReadableStream)
  }

  clone(): Response {
    if (this.bodyUsed || this.body.locked) throw new TypeError('Response.clone: Body has already been consumed.')
    const [mine, other] = this.body.tee()
    this.#stream = mine
    return new CachedResponse(other, this.#like)
  }

  async arrayBuffer(): Promise<ArrayBuffer> {
    return (await this.#all()).buffer
  }
  async bytes(): Promise<Uint8Array<ArrayBuffer>> {
    return this.#all()
  }
  async text(): Promise<string> {
    return new TextDecoder().decode(await this.#all())
  }
  async json(): Promise<unknown> {
    return JSON.parse(await this.text())
  }
  async blob(): Promise<Blob> {
    return new Response(await this.#all(), { headers: this.headers }).blob()
  }
  async formData(): Promise<FormData> {
    return new Response(await this.#all(), { headers: this.headers }).formData()
  }

  /** The whole body; its buffer holds nothing else. */
  async #all(): Promise<Uint8Array<ArrayBuffer>> {
    if (this.bodyUsed || this.#stream?.locked === true)
      throw new TypeError('Body is unusable: Body has already been read')
    const source = this.#source
    this.#source = undefined
    return source === undefined ? new Uint8Array(await new Response(this.#stream!).arrayBuffer()) : source.all()
  }
}

/** A body of which everything has been read. */
function spent(): Stream {
  const stream = new ReadableStream<Uint8Array<ArrayBuffer>>({
    start: (controller) => controller.close(),
  })
  void stream.getReader().read()
  return stream
}
