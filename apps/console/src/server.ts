/**
 * The web server of the console: static pages, a stream of states, and, for clients with the token, knobs.
 *
 * Security model: everybody who reaches the port may read. Other sites in the same browser may do nothing, and only
 * clients with the token may set knobs.
 *
 * Invariants:
 *  - Files are those that were read when it began, by name: no request leads to the file system.
 *  - A request is answered only if its Host is an address, `localhost`, or the name that it was told to listen on: so
 *    a name of somebody else's that is pointed here (DNS rebinding) leads nowhere. What a browser sends for another
 *    site (`Sec-Fetch-Site`, `Origin`) is refused.
 *  - A knob is turned by POST with JSON and the token in a header, which no form and no page of another site can send.
 *  - A state is made once a second for all pages together, and only while there is one. A page that does not read
 *    misses states, and after half a minute its stream: nothing is kept for it.
 *  - There are at most `maxPages` streams and twice as many connections.
 */
import { createHash, timingSafeEqual } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import { type AddressInfo, isIP } from 'node:net'
import { extname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { checkOptions, type OptionNames } from '@tmem/core'
import type { ConsoleState, ExplainedSlot } from './state.ts'

/** What the console is about. */
export interface ConsoleSubject {
  /** How things are now. */
  state(): ConsoleState | Promise<ConsoleState>
  /** Turns a knob; resolves to what it says. Rejects with an `Error` for what makes no sense or cannot be done. */
  turn(device: string, knob: string, value: string): Promise<string>
  /** What is known of the page at a byte of a device. Rejects with an `Error` where there is none. */
  explain?(device: string, offset: number): ExplainedSlot | Promise<ExplainedSlot>
}

/** Settings of a console. */
export interface ConsoleOptions {
  /** Name or address to listen on. */
  readonly host: string
  /** 0: any that is free. */
  readonly port: number
  readonly subject: ConsoleSubject
  /** Who says it may turn knobs (default: nobody may). */
  readonly token?: string
  /** Streams at most (default 256). */
  readonly maxPages?: number
  /** Milliseconds between two states (default 1000). */
  readonly everyMs?: number
  /** Told of requests that fail for a reason that is not the client's. */
  readonly onError?: (error: Error) => void
}

const names: OptionNames<ConsoleOptions> = {
  host: 'text',
  port: 'number',
  subject: 'object',
  token: 'text?',
  maxPages: 'number?',
  everyMs: 'number?',
  onError: 'function?',
}

/** A console that is served. */
export interface Console {
  /** Where, e.g. `http://127.0.0.1:8780/`. */
  readonly url: string
  /** Pages that have a stream now. */
  readonly pages: number
  /** Ends all streams and connections. */
  close(): Promise<void>
}

const maxBody = 4096
/** A page that has not read a state for so long is gone. */
const deafMs = 30_000

/** What the pages may do: only what comes from here. */
const policy = [
  "default-src 'none'",
  "script-src 'self'",
  "style-src 'self'",
  "img-src 'self' data:",
  "connect-src 'self'",
  "worker-src 'self'",
  "base-uri 'none'",
  "form-action 'none'",
  "frame-ancestors 'none'",
].join('; ')

const headers = {
  'content-security-policy': policy,
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
  'referrer-policy': 'no-referrer',
  'x-content-type-options': 'nosniff',
  'x-frame-options': 'DENY',
} as const

const types: Readonly<Record<string, string>> = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.svg': 'image/svg+xml',
}

/** Where the built pages lie: beside the compiled sources, also for who runs this from the sources. */
export const staticFolder: string = fileURLToPath(new URL('../dist/static/', import.meta.url))

/** A file that is served. */
interface StaticFile {
  readonly bytes: Buffer
  readonly type: string
  readonly etag: string
}

/** Refuses a request: a status, and a line that says why. */
class Refused extends Error {
  readonly status: number

  constructor(status: number, message: string) {
    super(message)
    this.status = status
  }
}

/** Serves a console. Rejects with the system's error when it cannot listen, `RangeError` for settings of no sense. */
export async function serveConsole(options: ConsoleOptions): Promise<Console> {
  checkOptions('serveConsole', options, names)
  const { maxPages = 256, everyMs = 1000 } = options
  if (!(Number.isSafeInteger(maxPages) && maxPages > 0))
    throw new RangeError(`maxPages must be above 0, got ${maxPages}`)
  if (!(everyMs >= 10)) throw new RangeError(`everyMs must be at least 10, got ${everyMs}`)
  const served = new Served(options, staticFiles(), maxPages, everyMs)
  await served.listen()
  return served
}

/** Reads all files of the pages. Throws when they were not built. */
function staticFiles(): ReadonlyMap<string, StaticFile> {
  const files = new Map<string, StaticFile>()
  for (const name of readdirSync(staticFolder)) {
    const type = types[extname(name)]
    if (type === undefined) continue
    const bytes = readFileSync(join(staticFolder, name))
    const etag = `"${createHash('sha256').update(bytes).digest('base64url').slice(0, 22)}"`
    files.set(`/${name}`, { bytes, type, etag })
  }
  const index = files.get('/console.html')
  if (index === undefined) throw new Error(`there are no pages in ${staticFolder}: build them`)
  files.set('/', index)
  return files
}

/** A page that has a stream. */
interface Page {
  readonly response: ServerResponse
  /** When it had read all that was sent last. */
  readAtMs: number
}

class Served implements Console {
  readonly #options: ConsoleOptions
  readonly #files: ReadonlyMap<string, StaticFile>
  readonly #maxPages: number
  readonly #everyMs: number
  readonly #server: Server
  readonly #streams = new Set<Page>()
  readonly #token: Buffer | undefined
  #timer: NodeJS.Timeout | undefined
  /** A state is being made. */
  #looks = false
  /** What was told last, and when: for a page that comes before the next time. */
  #told: { readonly message: string; readonly atMs: number } | undefined

  constructor(options: ConsoleOptions, files: ReadonlyMap<string, StaticFile>, maxPages: number, everyMs: number) {
    this.#options = options
    this.#files = files
    this.#maxPages = maxPages
    this.#everyMs = everyMs
    this.#token = options.token === undefined ? undefined : digest(options.token)
    this.#server = createServer(
      { maxHeaderSize: 8192, headersTimeout: 10_000, requestTimeout: 10_000, keepAliveTimeout: 5000 },
      (request, response) => void this.#answer(request, response),
    )
    this.#server.maxConnections = 2 * maxPages
    // What is no HTTP.
    this.#server.on('clientError', (_, socket) => socket.destroy())
  }

  listen(): Promise<void> {
    const { host, port } = this.#options
    return new Promise((resolve, reject) => {
      this.#server.once('error', reject)
      this.#server.listen({ host, port }, () => {
        this.#server.off('error', reject)
        resolve()
      })
    })
  }

  get url(): string {
    const { address, port, family } = this.#server.address() as AddressInfo
    return `http://${family === 'IPv6' ? `[${address}]` : address}:${port}/`
  }

  get pages(): number {
    return this.#streams.size
  }

  close(): Promise<void> {
    clearTimeout(this.#timer)
    this.#timer = undefined
    return new Promise((resolve) => {
      this.#server.close(() => resolve())
      this.#server.closeAllConnections()
    })
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    // Whoever asked may go away at any time.
    response.on('error', () => response.destroy())
    try {
      judgeOrigin(request, this.#options.host)
      await this.#route(request, response)
    } catch (error) {
      if (!(error instanceof Refused)) this.#options.onError?.(error as Error)
      const { status, message } =
        error instanceof Refused ? error : new Refused(500, `the server failed: ${(error as Error).message}`)
      if (response.headersSent) response.destroy()
      else send(response, status, { error: message })
    }
  }

  async #route(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const { pathname, searchParams } = new URL(request.url ?? '/', 'http://localhost')
    if (pathname === '/api/knob') {
      only(request, 'POST')
      send(response, 200, await this.#turn(request))
      return
    }
    only(request, 'GET', 'HEAD')
    const file = this.#files.get(pathname)
    if (file !== undefined) sendFile(request, response, file)
    else if (pathname === '/api/state') send(response, 200, await this.#options.subject.state())
    else if (pathname === '/api/events') this.#open(request, response)
    else if (pathname === '/api/explain') send(response, 200, await this.#explain(searchParams))
    else throw new Refused(404, `there is nothing at ${pathname}`)
  }

  async #explain(query: URLSearchParams): Promise<object> {
    const { subject } = this.#options
    const [device, offset] = [query.get('device'), query.get('offset')]
    if (device === null || offset === null || !/^\d{1,15}$/.test(offset))
      throw new Refused(400, 'expected a device, and an offset in bytes')
    if (subject.explain === undefined) throw new Refused(501, 'this server does not explain slots')
    return this.#asked(() => subject.explain!(device, Number(offset)))
  }

  async #turn(request: IncomingMessage): Promise<object> {
    if (this.#token === undefined)
      throw new Refused(403, 'this console is for reading: start the server with --http-token FILE to turn knobs here')
    const [, given] = /^Bearer (.+)$/.exec(request.headers.authorization ?? '') ?? []
    if (given === undefined || !timingSafeEqual(digest(given), this.#token))
      throw new Refused(401, 'this is not the token')
    if (request.headers['content-type'] !== 'application/json') throw new Refused(415, 'expected application/json')
    const { device, knob, value } = (await bodyOf(request)) as Record<string, unknown>
    if (typeof device !== 'string' || typeof knob !== 'string' || typeof value !== 'string')
      throw new Refused(400, 'expected device, knob and value, each a text')
    return { answer: await this.#asked(() => this.#options.subject.turn(device, knob, value)) }
  }

  /** What the subject says no to is the asker's mistake. */
  async #asked<Result>(ask: () => Result | Promise<Result>): Promise<Result> {
    try {
      return await ask()
    } catch (error) {
      throw new Refused(422, (error as Error).message)
    }
  }

  /** Begins a stream. */
  #open(request: IncomingMessage, response: ServerResponse): void {
    if (request.method === 'HEAD') throw new Refused(405, 'expected GET')
    if (this.#streams.size >= this.#maxPages)
      throw new Refused(503, `${this.#maxPages} pages are open already: close one`)
    const page: Page = { response, readAtMs: performance.now() }
    this.#streams.add(page)
    response.on('close', () => this.#streams.delete(page))
    response.writeHead(200, {
      ...headers,
      'content-type': 'text/event-stream; charset=utf-8',
      'cache-control': 'no-store',
      'x-accel-buffering': 'no',
    })
    // How long a browser waits before it comes back.
    response.write('retry: 1000\n\n')
    if (this.#told !== undefined && performance.now() - this.#told.atMs < this.#everyMs) {
      response.write(this.#told.message)
      this.#later(this.#told.atMs)
    } else void this.#tell()
  }

  /** Tells all pages again, when it is time. */
  #later(beforeMs: number): void {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => void this.#tell(), Math.max(10, beforeMs + this.#everyMs - performance.now()))
  }

  /** Tells all pages how things are, and again after a while. */
  async #tell(): Promise<void> {
    if (this.#looks) return
    this.#looks = true
    const begun = performance.now()
    try {
      const message = `data: ${JSON.stringify(await this.#options.subject.state())}\n\n`
      this.#told = { message, atMs: begun }
      for (const page of this.#streams) this.#send(page, message)
    } catch (error) {
      this.#options.onError?.(error as Error)
    } finally {
      this.#looks = false
    }
    if (this.#streams.size === 0) this.#told = undefined
    else if (this.#server.listening) this.#later(begun)
  }

  #send(page: Page, message: string): void {
    const now = performance.now()
    if (page.response.writableLength === 0) page.readAtMs = now
    if (page.response.writableLength === 0) page.response.write(message)
    else if (now - page.readAtMs > deafMs) page.response.destroy()
  }
}

const digest = (text: string): Buffer => createHash('sha256').update(text).digest()

function only(request: IncomingMessage, ...methods: readonly string[]): void {
  if (!methods.includes(request.method ?? '')) throw new Refused(405, `expected ${methods.join(' or ')}`)
}

/** Throws `Refused` unless the request is meant for this server, by a page of its own or by nobody's page. */
function judgeOrigin({ method, headers: { host, origin, ...others } }: IncomingMessage, listensOn: string): void {
  const [, name] = /^(\[[\da-f:.]+\]|[^:]+)(?::\d+)?$/i.exec(host ?? '') ?? []
  const plain = name?.replaceAll(/^\[|\]$/g, '').toLowerCase()
  if (plain === undefined || !(isIP(plain) > 0 || plain === 'localhost' || plain === listensOn.toLowerCase()))
    throw new Refused(421, 'this server answers to its address, to localhost, and to the name that it listens on')
  const site = others['sec-fetch-site']
  // Somebody may have followed a link to here: what comes of that is shown to nobody else.
  const isFollowed = method === 'GET' && others['sec-fetch-mode'] === 'navigate'
  if (site !== undefined && site !== 'same-origin' && site !== 'none' && !isFollowed)
    throw new Refused(403, 'pages of other sites are not answered')
  if (origin !== undefined && origin !== `http://${host}` && origin !== `https://${host}`)
    throw new Refused(403, 'pages of other sites are not answered')
}

async function bodyOf(request: IncomingMessage): Promise<object> {
  const parts: Buffer[] = []
  let length = 0
  for await (const part of request as AsyncIterable<Buffer>) {
    length += part.length
    if (length > maxBody) throw new Refused(413, `expected at most ${maxBody} bytes`)
    parts.push(part)
  }
  let body: unknown
  try {
    body = JSON.parse(Buffer.concat(parts).toString())
  } catch (error) {
    throw new Refused(400, `expected JSON: ${(error as Error).message}`)
  }
  if (typeof body !== 'object' || body === null) throw new Refused(400, 'expected a JSON object')
  return body
}

function send(response: ServerResponse, status: number, body: object): void {
  const text = `${JSON.stringify(body)}\n`
  response.writeHead(status, {
    ...headers,
    'content-type': 'application/json; charset=utf-8',
    'content-length': Buffer.byteLength(text),
    'cache-control': 'no-store',
    // What is left of a request that was refused is not read.
    ...(status >= 400 ? { connection: 'close' } : {}),
  })
  response.end(text)
}

function sendFile(request: IncomingMessage, response: ServerResponse, { bytes, type, etag }: StaticFile): void {
  const known = request.headers['if-none-match'] === etag
  response.writeHead(known ? 304 : 200, {
    ...headers,
    etag,
    'cache-control': 'no-cache',
    ...(known ? {} : { 'content-type': type, 'content-length': bytes.length }),
  })
  response.end(known || request.method === 'HEAD' ? undefined : bytes)
}
