/**
 * What `files.fetch` answers, compared with what `fetch` answers: every way to read a body, every wrong way, and what
 * cannot be changed.
 */
import { createHash } from 'node:crypto'
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import { inspect } from 'node:util'
import { compose } from '@tmem/core'
import { memory } from '@tmem/memory'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { FsCache, HttpFiles } from '../src/index.ts'

const text = JSON.stringify({ text: 'é, and more of it. '.repeat(4000) })
const bodies: Readonly<Record<string, { type: string; bytes: Buffer }>> = {
  '/json': { type: 'application/json', bytes: Buffer.from(text) },
  '/marked': { type: 'text/plain; charset=utf-8', bytes: Buffer.from(`\uFEFF${text}`) },
  '/form': { type: 'application/x-www-form-urlencoded', bytes: Buffer.from('a=1&b=%C3%A9') },
  '/broken': { type: 'application/json', bytes: Buffer.from('{"a":') },
  // More than a piece, and more than is copied before the first byte.
  '/large': { type: 'application/octet-stream', bytes: Buffer.alloc(600_007, 'tmem') },
  '/huge': { type: 'application/octet-stream', bytes: Buffer.alloc(17 * 2 ** 20 + 7, 'tmem') },
  '/none': { type: 'text/plain', bytes: Buffer.alloc(0) },
}
let server: Server
let origin: string

beforeAll(async () => {
  server = createServer((request, response) => {
    const [, policy, name] = /^(\/\w+)(\/\w+)$/.exec(request.url!)!
    const { type, bytes } = bodies[name!]!
    const control = policy === '/fresh' ? 'max-age=60' : 'no-cache'
    const headers = { etag: '"1"', 'content-type': type, 'cache-control': control, date: new Date().toUTCString() }
    if (request.headers['if-none-match'] === '"1"') response.writeHead(304, headers).end()
    else response.writeHead(200, { ...headers, 'content-length': bytes.length }).end(bytes)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
})
afterAll(() => {
  server.closeAllConnections()
  server.close()
})

const open = (): HttpFiles =>
  new HttpFiles({ cache: new FsCache({ store: compose([memory({ limitBytes: 2 ** 26 })]) }) })

/** What a use of a response comes to, an error included. */
async function outcome(use: () => unknown): Promise<unknown> {
  try {
    const result = await use()
    // What differs is shown soon enough.
    return typeof result === 'string' && result.length > 1000 ? digest(Buffer.from(result)) : result
  } catch (error) {
    // Runtimes word it differently.
    return (error as Error).name
  }
}
const digest = (bytes: Uint8Array | ArrayBuffer): string =>
  createHash('sha256').update(new Uint8Array(bytes)).digest('hex')
const state = (response: Response): unknown => [response.bodyUsed, response.body?.locked]
const drained = async (stream: AsyncIterable<Uint8Array>): Promise<string> => {
  const parts: Uint8Array[] = []
  for await (const part of stream) parts.push(part)
  return digest(Buffer.concat(parts))
}
const streamOf = (response: Response): AsyncIterable<Uint8Array> =>
  response.body as unknown as AsyncIterable<Uint8Array>

type Use = (response: Response) => unknown
const uses: Readonly<Record<string, Use>> = {
  arrayBuffer: async (response) => digest(await response.arrayBuffer()),
  'a buffer of its own': async (response) => {
    const other = response.clone()
    const bytes = new Uint8Array(await response.arrayBuffer()).fill(0)
    return [bytes.length, digest(await other.arrayBuffer())]
  },
  text: (response) => response.text(),
  json: (response) => response.json(),
  blob: async (response) => {
    const blob = await response.blob()
    return [blob.type, blob.size, await blob.text()]
  },
  formData: async (response) => [...(await response.formData())],
  bytes: async (response) => {
    // Not in each runtime, and not in these types.
    const { bytes } = response as { bytes?: () => Promise<Uint8Array> }
    return bytes === undefined ? 'none' : digest(await bytes.call(response))
  },
  'a stream': (response) => drained(streamOf(response)),
  'a stream of Node': (response) => drained(Readable.fromWeb(response.body as never)),
  'a stream of text': async (response) => {
    let all = ''
    const decoder = new TextDecoderStream()
    const decoded = response.body!.pipeThrough(decoder as never) as unknown as AsyncIterable<string>
    for await (const part of decoded) all += part
    return all
  },
  'both branches of a tee': async (response) => {
    const [a, b] = response.body!.tee()
    return Promise.all([a, b].map((branch) => new Response(branch).text()))
  },
  'another response': async (response) => {
    const other = new Response(response.body, response)
    return [other.status, other.headers.get('content-type'), await other.text(), state(response)]
  },
  'the same body each time': (response) => {
    const { body } = response
    return response.body === body
  },
  'state before and after': async (response) => {
    const before = [response.bodyUsed]
    await response.arrayBuffer()
    return [before, state(response), state(response)]
  },
  'state after the stream was looked at': async (response) => {
    const before = state(response)
    await response.text()
    return [before, state(response)]
  },
  'state with a reader': async (response) => {
    const reader = response.body!.getReader()
    const states = [state(response)]
    await reader.read()
    states.push(state(response))
    reader.releaseLock()
    return [...states, state(response), await outcome(() => response.text())]
  },
  'twice at once': (response) => Promise.all([outcome(() => response.text()), outcome(() => response.text())]),
  'read, then cloned': async (response) => {
    await response.text()
    return [await outcome(() => response.clone()), await outcome(() => response.blob())]
  },
  'locked, then cloned': (response) => {
    response.body!.getReader()
    return outcome(() => response.clone())
  },
  'clones of clones': async (response) => {
    const one = response.clone()
    const two = one.clone()
    const all = await Promise.all([two, response, one].map((each) => each.text()))
    return [all, [one, two].map((each) => [each.status, each.headers.get('etag'), each.url.length])]
  },
  cancelled: async (response) => {
    await response.body!.cancel()
    return [state(response), await outcome(() => response.arrayBuffer())]
  },
  'changed headers': async (response) => {
    const { headers } = response
    const tries = [
      () => headers.set('x', 'y'),
      () => headers.append('x', 'y'),
      () => headers.delete('etag'),
      () => response.clone().headers.set('x', 'y'),
    ]
    const outcomes = await Promise.all(tries.map(outcome))
    return [outcomes, headers.get('x'), headers.get('etag'), headers.getSetCookie(), headers instanceof Headers]
  },
  'a copy of the headers': (response) => {
    const headers = new Headers(response.headers)
    headers.set('x', 'y')
    return [headers.get('x'), headers.get('etag'), Object.fromEntries(response.headers)['etag']]
  },
  'what it is': (response) => [response instanceof Response, Object.prototype.toString.call(response)],
  'how it is shown': (response) => inspect(response).replace(/'?(keep-alive|connection|age|date)'?: '[^']*',?\s*/g, ''),
}

const all = Object.keys(bodies).flatMap((name) =>
  Object.entries(uses)
    .filter(([what]) => name !== '/huge' || ['arrayBuffer', 'a stream', 'clones of clones'].includes(what))
    .map(([what, use]): [string, string, Use] => [name, what, use]),
)

test.each(all)('%s, %s: as of fetch', async (name, _what, use) => {
  const files = open()
  for (const policy of ['/fresh', '/asked']) {
    const url = `${origin}${policy}${name}`
    const native = await outcome(async () => use(await fetch(url)))
    // Cold: what comes is read as the native one is. Then read to the end, so that it is kept.
    expect(await outcome(async () => use(await files.fetch(url)))).toEqual(native)
    await (await files.fetch(url)).arrayBuffer()
    const { requests, notModified } = files.counters
    expect(await outcome(async () => use(await files.fetch(url)))).toEqual(native)
    expect(files.counters.requests - requests).toBe(policy === '/fresh' ? 0 : 1)
    expect(files.counters.notModified - notModified).toBe(policy === '/fresh' ? 0 : 1)
  }
})

test('a body that a program keeps is its own: what is changed in it is not found by the next one', async () => {
  const files = open()
  for (const name of ['/json', '/large']) {
    const url = `${origin}/fresh${name}`
    for (let round = 0; round < 3; round++) {
      const bytes = new Uint8Array(await (await files.fetch(url)).arrayBuffer())
      expect(Buffer.from(bytes).equals(bodies[name]!.bytes)).toBe(true)
      bytes.fill(round)
    }
  }
})
