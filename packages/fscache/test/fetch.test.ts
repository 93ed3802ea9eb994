/**
 * `files.fetch` in the place of `fetch`: what others reported, kind by kind, against a server of Node's that counts
 * what it is asked and sends.
 */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { setTimeout } from 'node:timers/promises'
import { gzipSync } from 'node:zlib'
import { compose, type Layer } from '@tmem/core'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { FsCache, HttpFiles } from '../src/index.ts'

type Answer = (request: IncomingMessage, response: ServerResponse) => void

let server: Server
let origin: string
let answer: Answer = () => undefined
let requests: string[] = []
let sent = 0

beforeAll(async () => {
  server = createServer((request, response) => {
    const asked = Object.entries(request.headers).filter(([name]) => /^(if-|range$)/.test(name))
    requests.push([request.method, request.url, ...asked.flat()].join(' '))
    const write = response.write.bind(response)
    const end = response.end.bind(response)
    const count = (chunk: unknown): void => {
      if (request.method !== 'HEAD' && chunk instanceof Uint8Array) sent += chunk.length
    }
    response.write = ((...words: Parameters<typeof write>) => {
      count(words[0])
      return write(...words)
    }) as typeof write
    response.end = ((...words: Parameters<typeof end>) => {
      count(words[0])
      return end(...words)
    }) as typeof end
    answer(request, response)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
})
afterAll(() => {
  server.closeAllConnections()
  server.close()
})
beforeEach(() => {
  requests = []
  sent = 0
})

const noise = (length: number, seed = 1): Buffer => {
  const bytes = Buffer.alloc(length)
  let state = seed
  for (let at = 0; at + 4 <= length; at += 4) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    bytes.writeUInt32LE(state, at)
  }
  return bytes
}
const open = (layers: Layer[] = [memory({ limitBytes: 2 ** 26 })]): HttpFiles =>
  new HttpFiles({ cache: new FsCache({ store: compose(layers) }) })
const read = async (response: Response | Promise<Response>): Promise<Buffer> =>
  Buffer.from(await (await response).arrayBuffer())

interface File {
  bytes: Buffer
  etag?: string
  headers?: Record<string, string>
  ranges?: boolean
}
/** A server that does what RFC 9110 says. */
function files(file: File): Answer {
  return (request, response) => {
    const { bytes, etag, ranges = true } = file
    const headers = { ...file.headers, ...(etag === undefined ? {} : { etag }) }
    if (etag !== undefined && request.headers['if-none-match'] === etag)
      return void response.writeHead(304, headers).end()
    const same = request.headers['if-range'] === undefined || request.headers['if-range'] === etag
    const range = ranges && same ? /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') : null
    if (range === null) {
      response.writeHead(200, { ...headers, 'content-length': bytes.length })
      return void response.end(request.method === 'HEAD' ? undefined : bytes)
    }
    const [start, end] = [Number(range[1]), Math.min(Number(range[2]), bytes.length - 1)]
    const part = {
      ...headers,
      'content-range': `bytes ${start}-${end}/${bytes.length}`,
      'content-length': end - start + 1,
    }
    return void response.writeHead(206, part).end(bytes.subarray(start, end + 1))
  }
}
/** Fetches it three times, with what a plain client would have asked and got, and one request more at most. */
async function never(client: HttpFiles, url: string, wanted: () => Buffer, rounds = 3): Promise<void> {
  for (let round = 0; round < rounds; round++) {
    const before = requests.length
    expect((await read(client.fetch(url))).equals(wanted())).toBe(true)
    expect(requests.length - before).toBeLessThanOrEqual(2)
  }
}

describe('pages are put after the body was handed over', () => {
  const bytes = noise(1_000_000)
  const pages = Math.ceil(bytes.length / 4096)
  const turns = async (client: HttpFiles): Promise<void> => {
    for (let turn = 0; turn < 10; turn++) await new Promise((resolve) => setImmediate(resolve))
    expect(client.cache.counters.writes_ok).toBe(pages)
  }

  test('the body first; who asks meanwhile gets what waits; nobody asks the server for it again', async () => {
    answer = files({ bytes, etag: '"1"', headers: { 'cache-control': 'max-age=60' } })
    const client = open()
    expect((await read(client.fetch(`${origin}/later`))).equals(bytes)).toBe(true)
    expect(client.cache.counters.writes).toBe(0)
    expect((await read(client.fetch(`${origin}/later`))).equals(bytes)).toBe(true)
    expect(client.cache.counters.writes_ok).toBe(pages)
    const file = await client.open(`${origin}/later`)
    const into = Buffer.alloc(5000)
    await file.read(into, 0, 5000, 500_000)
    expect(into.equals(bytes.subarray(500_000, 505_000))).toBe(true)
    file.close()
    expect(requests).toHaveLength(1)
    const other = open()
    await read(other.fetch(`${origin}/later`))
    await turns(other)
  })

  test('what waits is kept by close', async () => {
    answer = files({ bytes, etag: '"1"', headers: { 'cache-control': 'no-cache' } })
    const client = open()
    await read(client.fetch(`${origin}/closed`))
    client.close()
    expect(client.cache.counters.writes_ok).toBe(pages)
  })

  test('a stream is given pieces of its own, which do not wait', async () => {
    answer = files({ bytes, etag: '"1"' })
    const client = open()
    const pieces: Uint8Array[] = []
    for await (const piece of (await client.fetch(`${origin}/stream`)).body!) pieces.push(piece)
    expect(client.cache.counters.writes_ok).toBe(pages)
    // What a reader does with its bytes is its own affair.
    for (const piece of pieces) piece.fill(0)
    expect((await read(client.fetch(`${origin}/stream`))).equals(bytes)).toBe(true)
  })

  test('a body that breaks off: what has come is kept, and only the rest is asked for', async () => {
    const whole = files({ bytes, etag: '"1"' })
    answer = (request, response) => {
      if (requests.length > 1) return whole(request, response)
      response.writeHead(200, { etag: '"1"', 'content-length': bytes.length })
      response.write(bytes.subarray(0, 600_000), () => response.destroy())
    }
    const client = open()
    await expect(read(client.fetch(`${origin}/breaks`))).rejects.toThrow('terminated')
    sent = 0
    expect((await read(client.fetch(`${origin}/breaks`))).equals(bytes)).toBe(true)
    expect(sent).toBeLessThan(500_000)
  })
})

describe('a file that is copied while the server is asked', () => {
  test('pages that go meanwhile are asked for again: all bytes, one request more', async () => {
    const bytes = noise(300_000)
    answer = files({ bytes, etag: '"1"' })
    const store = compose([memory({ limitBytes: 2 ** 20 })])
    const cache = new FsCache({ store })
    let meanwhile = (): void => undefined
    const client = new HttpFiles({
      cache,
      fetch: (input, init) => {
        meanwhile()
        return fetch(input, init)
      },
    })
    const url = `${origin}/goes`
    for (let round = 0; round < 2; round++) expect((await read(client.fetch(url))).equals(bytes)).toBe(true)
    expect(client.counters.notModified).toBe(1)
    const other = cache.acquireVolume('others').acquireCookie('f', { version: '1', size: 2 ** 21 })
    meanwhile = () => void other.writeMany(0, new Uint8Array(2 ** 21))
    requests = []
    expect((await read(client.fetch(url))).equals(bytes)).toBe(true)
    expect(requests).toEqual([`GET /goes if-none-match "1"`, 'GET /goes'])
    expect(client.counters.surprises).toBe(0)
  })
})

describe('surprises before the first byte', () => {
  const bytes = noise(150_000)
  let turn = 0
  const honest = files({ bytes, etag: '"1"' })
  const kinds: readonly [string, Answer][] = [
    [
      'a redirect to another signed address each time',
      (request, response) => {
        if (request.url === '/f') response.writeHead(302, { location: `/signed?at=${turn++}` }).end()
        else honest(request, response)
      },
    ],
    ['another ETag in each answer', (request, response) => files({ bytes, etag: `"${turn++}"` })(request, response)],
    [
      'two back ends in turn, with two versions',
      (request, response) =>
        files({ bytes: turn++ % 2 ? bytes : noise(150_000, 2), etag: `"${turn % 2}"` })(request, response),
    ],
    [
      'HEAD and GET that disagree',
      (request, response) => {
        if (request.method === 'HEAD') response.writeHead(200, { etag: '"0"', 'content-length': 7 }).end()
        else honest(request, response)
      },
    ],
    [
      '412 to whatever has a condition',
      (request, response) => {
        if (Object.keys(request.headers).some((name) => name.startsWith('if-'))) response.writeHead(412).end()
        else honest(request, response)
      },
    ],
    [
      '206 without an ETag',
      (request, response) => {
        if (request.headers.range === undefined) return honest(request, response)
        delete request.headers['if-range']
        return files({ bytes })(request, response)
      },
    ],
    [
      'a range of another place',
      (request, response) => {
        if (request.headers.range === undefined) return honest(request, response)
        return void response.writeHead(206, { etag: '"1"', 'content-range': 'bytes 0-9/10' }).end('0123456789')
      },
    ],
    [
      'a connection that breaks at each question',
      (request, response) => {
        const asked = Object.keys(request.headers).some((name) => name.startsWith('if-') || name === 'range')
        if (asked) request.socket.destroy()
        else honest(request, response)
      },
    ],
    [
      '403 to HEAD',
      (request, response) => {
        if (request.method === 'HEAD') response.writeHead(403).end()
        else honest(request, response)
      },
    ],
    [
      '400, 403, 416, 500, 501 or 304 to a question',
      (request, response) => {
        const asked = Object.keys(request.headers).some((name) => name.startsWith('if-') || name === 'range')
        const odd = [400, 403, 416, 500, 501, 304][turn++ % 6]!
        if (asked) response.writeHead(odd, { etag: '"other"' }).end()
        else honest(request, response)
      },
    ],
  ]
  // With room for all of the file, for a part of it, and for hardly anything.
  for (const limitBytes of [2 ** 22, 150_000, 70_000])
    test.each(kinds)(`%s, with ${limitBytes} bytes of cache`, async (what, one) => {
      turn = 0
      answer = one
      const client = open([memory({ limitBytes })])
      const either = what.startsWith('two')
      for (let round = 0; round < 5; round++) {
        const before = requests.length
        const redirects = what.startsWith('a redirect') ? 2 : 1
        const got = await read(client.fetch(`${origin}/f`))
        expect(got.equals(bytes) || (either && got.equals(noise(150_000, 2)))).toBe(true)
        // What surprised once is not tried again.
        const more = round >= 3 && client.counters.surprises > 0 ? redirects : redirects + 1
        expect(requests.length - before).toBeLessThanOrEqual(more)
      }
      // A connection may break by chance, once.
      expect(client.counters.surprises).toBeLessThanOrEqual(what.startsWith('a connection') ? 2 : 1)
    })
})

test('a connection that breaks once by chance costs one request, and nothing is remembered', async () => {
  const bytes = noise(30_000)
  const honest = files({ bytes, etag: '"1"' })
  let breaks = false
  answer = (request, response) => {
    if (breaks && request.headers['if-none-match'] !== undefined) request.socket.destroy()
    else honest(request, response)
  }
  const client = open()
  await never(client, `${origin}/f`, () => bytes)
  breaks = true
  await never(client, `${origin}/f`, () => bytes, 1)
  breaks = false
  await never(client, `${origin}/f`, () => bytes)
  expect(client.counters).toMatchObject({ surprises: 1, notModified: 5 })
})

test('a server that ignores ranges sends a file of 8 MiB once, however it is read', async () => {
  const bytes = noise(2 ** 23)
  answer = files({ bytes, etag: '"1"', ranges: false })
  await never(open(), `${origin}/f`, () => bytes, 1)
  expect([requests.length, sent]).toEqual([1, bytes.length])
  // From time to time, and with a cache that holds half of it.
  const small = open([memory({ limitBytes: 2 ** 22 })])
  for (let round = 1; round <= 3; round++) {
    expect((await read(small.fetch(`${origin}/f`))).equals(bytes)).toBe(true)
    expect(sent).toBeLessThanOrEqual((1 + round) * bytes.length)
  }
  sent = 0
  requests = []
  const file = await open().open(`${origin}/f`)
  const into = Buffer.alloc(65_536)
  for (let at = 0; at < bytes.length; at += into.length) {
    await file.read(into, 0, into.length, at)
    expect(into.equals(bytes.subarray(at, at + into.length))).toBe(true)
  }
  file.close()
  expect([requests.length, sent]).toEqual([2, bytes.length])
})

test('ranges are for holes: one request for all of them, and no byte in front of the first', async () => {
  const bytes = noise(400_000)
  answer = files({ bytes, etag: '"1"' })
  const client = open([memory({ limitBytes: 2 ** 22 })])
  const file = await client.open(`${origin}/f`)
  // The beginning and the end are there.
  await file.read(Buffer.alloc(100_000), 0, 100_000, 0)
  await file.read(Buffer.alloc(100_000), 0, 100_000, 300_000)
  requests = []
  sent = 0
  expect((await read(client.fetch(`${origin}/f`))).equals(bytes)).toBe(true)
  expect(requests).toEqual(['GET /f range bytes=102400-299007 if-range "1"'])
  expect(sent).toBe(299_008 - 102_400)
  file.close()
})

test('a file that has changed where there are holes: its new version, by the same request', async () => {
  const file = { bytes: noise(400_000), etag: '"1"' }
  answer = files(file)
  const client = open([memory({ limitBytes: 2 ** 22 })])
  const opened = await client.open(`${origin}/f`)
  await opened.read(Buffer.alloc(100_000), 0, 100_000, 0)
  Object.assign(file, { bytes: noise(300_000, 2), etag: '"2"' })
  requests = []
  expect((await read(client.fetch(`${origin}/f`))).equals(file.bytes)).toBe(true)
  expect(requests).toEqual(['GET /f range bytes=102400-399999 if-range "1"'])
  await expect(opened.read(Buffer.alloc(10), 0, 10, 0)).rejects.toMatchObject({ code: 'ESTALE' })
})

test('two clients of one cache and one server find each other’s pages', async () => {
  const bytes = noise(150_000)
  answer = files({ bytes, etag: '"1"' })
  const cache = new FsCache({ store: compose([memory({ limitBytes: 2 ** 22 })]) })
  const clients = [new HttpFiles({ cache }), new HttpFiles({ cache })]
  for (const client of clients) expect((await read(client.fetch(`${origin}/f`))).equals(bytes)).toBe(true)
  const opened = await Promise.all(clients.map((client) => client.open(`${origin}/f`)))
  for (const file of opened) await file.read(Buffer.alloc(100_000), 0, 100_000, 0)
  expect(clients[1]!.counters.pagesFetched).toBe(0)
  clients[0]!.close()
  expect((await read(clients[1]!.fetch(`${origin}/f`))).equals(bytes)).toBe(true)
  clients[1]!.close()
  expect(cache.stats().counters).toMatchObject({ volumes: 0, cookies: 0 })
})

test('a weak ETag names no bytes: what two clients got under the same one is not mixed', async () => {
  let bytes = noise(30_000, 1)
  answer = (request, response) => {
    if (request.headers['if-none-match'] === 'W/"1"') response.writeHead(304, { etag: 'W/"1"' }).end()
    else response.writeHead(200, { etag: 'W/"1"', 'content-length': bytes.length }).end(bytes)
  }
  const cache = new FsCache({ store: compose([memory({ limitBytes: 2 ** 22 })]) })
  const [first, second] = [new HttpFiles({ cache }), new HttpFiles({ cache })]
  await read(first.fetch(origin))
  bytes = noise(20_000, 2)
  await read(second.fetch(origin))
  expect((await read(first.fetch(origin))).equals(noise(30_000, 1))).toBe(true)
  expect((await read(second.fetch(origin))).equals(noise(20_000, 2))).toBe(true)
  expect(requests.length).toBe(4)
})

test('what does not compress is cached by the stack of the README', async () => {
  const bytes = noise(150_000)
  answer = files({ bytes, etag: '"1"' })
  const client = open([zcache({ limitBytes: 64 * 2 ** 20 })])
  await never(client, `${origin}/f`, () => bytes)
  expect(client.counters).toMatchObject({ pagesFetched: 37, pagesCached: 74, bytesFetched: 150_000 })
  // Also when the server answers each time with all of it.
  answer = (_request, response) =>
    void response.writeHead(200, { etag: '"1"', 'content-length': bytes.length }).end(bytes)
  await never(client, `${origin}/f`, () => bytes)
  expect(client.counters).toMatchObject({ pagesFetched: 37, pagesCached: 185 })
})

describe('used like fetch', () => {
  const bytes = noise(150_000)
  test('it has its type, and needs no object', async () => {
    answer = files({ bytes, etag: '"1"' })
    const fetch: typeof globalThis.fetch = open().fetch
    expect((await read(fetch(`${origin}/f`))).equals(bytes)).toBe(true)
  })

  test('requests, no settings, clones, byte readers', async () => {
    answer = files({ bytes, etag: '"1"', headers: { 'content-type': 'text/x', 'x-a': 'b' } })
    const client = open()
    const none = null as unknown as undefined
    for (let round = 0; round < 2; round++) {
      const native = await fetch(`${origin}/f`)
      const response = await client.fetch(new Request(`${origin}/f#part`), none)
      const copy = response.clone()
      const third = copy.clone()
      for (const one of [response, copy, third]) {
        expect(one).toBeInstanceOf(Response)
        expect([one.url, one.redirected, one.type, one.ok, one.status, one.statusText]).toEqual([
          `${origin}/f`,
          native.redirected,
          native.type,
          native.ok,
          native.status,
          native.statusText,
        ])
        const [ours, theirs] = [one, native].map(({ headers }) => [...headers].filter(([name]) => name !== 'date'))
        expect(ours).toEqual(theirs)
      }
      const bodies = await Promise.all([response.arrayBuffer(), copy.arrayBuffer(), third.arrayBuffer()])
      for (const body of bodies) expect(Buffer.from(body).equals(bytes)).toBe(true)
      await native.arrayBuffer()
    }
    expect(client.counters).toMatchObject({ requests: 2, notModified: 1 })
    for (const url of [`${origin}/f`, new URL(`${origin}/f`)]) {
      const reader = (await client.fetch(url, none)).body!.getReader({ mode: 'byob' })
      const parts: Uint8Array[] = []
      for (;;) {
        const { done, value } = await reader.read(new Uint8Array(10_000))
        if (done) break
        expect(value.length).toBeLessThanOrEqual(10_000)
        parts.push(value)
      }
      expect(Buffer.concat(parts).equals(bytes)).toBe(true)
    }
  })

  test('addresses that are no server’s, and none', async () => {
    const client = open()
    const blob = URL.createObjectURL(new Blob(['in a blob']))
    expect(await (await client.fetch(blob)).text()).toBe('in a blob')
    expect(await (await client.fetch('data:text/plain,in%20an%20address')).text()).toBe('in an address')
    for (const wrong of ['nonsense', 'http://', 'ftp://x/', 'http://a:b@127.0.0.1/', '']) {
      const native = await fetch(wrong).catch((error: unknown) => error)
      const ours = await client.fetch(wrong).catch((error: unknown) => error)
      expect([(ours as Error).name, (ours as Error).message]).toEqual([
        (native as Error).name,
        (native as Error).message,
      ])
    }
    // A blob can be taken back.
    URL.revokeObjectURL(blob)
    await expect(client.fetch(blob)).rejects.toThrow(TypeError)
  })

  test('wrong settings, and those of a request', async () => {
    answer = files({ bytes, etag: '"1"' })
    const client = open()
    const url = `${origin}/f`
    for (const init of [{ method: 'CON NECT' }, { headers: { 'a b': 'c' } }, { body: 'x' }, { signal: 7 }, 7]) {
      const native = await fetch(url, init as RequestInit).catch((error: unknown) => error)
      const ours = await client.fetch(url, init as RequestInit).catch((error: unknown) => error)
      expect((ours as Error).message).toBe((native as Error).message)
    }
    const inherited: RequestInit = Object.create({ method: 'POST', body: 'x' })
    requests = []
    await read(client.fetch(url, inherited))
    await read(client.fetch(new Request(url, { method: 'DELETE' })))
    await read(client.fetch(new Request(url, { method: 'DELETE' }), { method: 'GET' }))
    expect(requests.map((one) => one.split(' ')[0])).toEqual(['POST', 'DELETE', 'GET'])
  })

  test('a signal ends it, before and after the first byte; others go on', async () => {
    const slow = files({ bytes, etag: '"1"', headers: { 'cache-control': 'max-age=60' } })
    answer = (request, response) => void globalThis.setTimeout(() => slow(request, response), 20)
    const client = open()
    const abort = new AbortController()
    const first = client.fetch(`${origin}/f`, { signal: abort.signal })
    const others = [client.fetch(`${origin}/f`), client.fetch(`${origin}/f`)]
    const reason = new Error('enough')
    abort.abort(reason)
    await expect(first).rejects.toBe(reason)
    for (const other of others) expect((await read(other)).equals(bytes)).toBe(true)
    const late = new AbortController()
    const response = await client.fetch(`${origin}/f`, { signal: late.signal })
    late.abort(reason)
    await expect(response.arrayBuffer()).rejects.toBe(reason)
    await expect(client.fetch(`${origin}/f`, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
  })

  test('other headers are another question', async () => {
    answer = (request, response) =>
      void response.writeHead(200, { 'cache-control': 'max-age=60' }).end(`for ${String(request.headers['x-api-key'])}`)
    const client = open()
    const ask = async (key: string): Promise<string> =>
      (await client.fetch(origin, { headers: { 'x-api-key': key } })).text()
    expect([await ask('a'), await ask('b'), await ask('a')]).toEqual(['for a', 'for b', 'for a'])
    expect(requests.length).toBe(2)
    // What is for one person is not kept, nor given to others.
    for (const name of ['authorization', 'cookie'])
      await read(client.fetch(origin, { headers: { 'x-api-key': 'a', [name]: 'me' } }))
    expect(requests.length).toBe(4)
  })
})

describe('freshness', () => {
  const bytes = noise(30_000)
  test('immutable, with an age: no request', async () => {
    answer = files({ bytes, etag: '"1"', headers: { 'cache-control': 'public, max-age=31536000, immutable' } })
    const client = open()
    await never(client, `${origin}/f`, () => bytes)
    const response = await client.fetch(`${origin}/f`)
    expect(response.headers.get('age')).toBe('0')
    await response.body?.cancel()
    expect([requests.length, client.counters.fresh]).toEqual([1, 3])
    // A file that is open is known, too.
    const file = await client.open(`${origin}/f`)
    await file.read(Buffer.alloc(30_000), 0, 30_000, 0)
    expect(requests.length).toBe(1)
    // `cache` is known to the runtime, not to its types.
    const settings: object = { cache: 'no-cache' }
    await read(client.fetch(`${origin}/f`, settings))
    await read(client.fetch(`${origin}/f`, { headers: { 'cache-control': 'no-cache' } }))
    expect(requests.slice(1)).toEqual(Array.from({ length: 2 }, () => 'GET /f if-none-match "1"'))
  })

  test.each([
    ['no-store', { 'cache-control': 'no-store' }],
    ['No-Store, in another case', { 'cache-control': 'No-Store, max-age=60' }],
    ['Vary: *', { vary: '*' }],
    ['nothing to ask with', {}],
  ])('%s: not kept', async (_what, headers) => {
    answer = (_request, response) => void response.writeHead(200, headers).end(bytes)
    const client = open()
    await never(client, `${origin}/f`, () => bytes)
    expect(client.counters).toMatchObject({ requests: 3, pagesFetched: 0, uncached: 3 })
  })

  test('a date of change asks, when the file was old enough then', async () => {
    const date = new Date()
    let changed = new Date(date.getTime() - 60_000).toUTCString()
    answer = (request, response) => {
      const headers = { 'last-modified': changed, date: date.toUTCString() }
      if (request.headers['if-modified-since'] === changed) response.writeHead(304, headers).end()
      else response.writeHead(200, headers).end(bytes)
    }
    const client = open()
    await never(client, `${origin}/f`, () => bytes)
    expect(client.counters).toMatchObject({ requests: 3, notModified: 2 })
    // It can be written once more in the same second.
    changed = date.toUTCString()
    await never(client, `${origin}/f`, () => bytes)
    expect(client.counters).toMatchObject({ requests: 6, notModified: 2 })
  })

  test('weak ETags, compressed or not, with a length or without: cached, as a whole', async () => {
    const packed = gzipSync(bytes)
    for (const encoded of [false, true])
      for (const chunked of [false, true]) {
        let version = 1
        answer = (request, response) => {
          const headers: Record<string, string | number> = { etag: `W/"${version}"`, vary: 'accept-encoding' }
          if (request.headers['if-none-match'] === headers['etag']) return void response.writeHead(304, headers).end()
          const body = encoded ? packed : bytes
          if (encoded) headers['content-encoding'] = 'gzip'
          if (!chunked) headers['content-length'] = body.length
          response.writeHead(200, headers)
          response.write(body.subarray(0, 100))
          return void response.end(body.subarray(100))
        }
        const client = open()
        await never(client, `${origin}/f`, () => bytes)
        expect(client.counters).toMatchObject({ notModified: 2, pagesFetched: 8, pagesCached: 16 })
        version++
        await never(client, `${origin}/f`, () => bytes)
        expect(client.counters).toMatchObject({ notModified: 4, pagesFetched: 16, changes: 1 })
      }
  })

  test('a body that breaks off, or is given up, is not taken for the whole', async () => {
    let broken = true
    answer = (_request, response) => {
      response.writeHead(200, { etag: 'W/"1"', 'cache-control': 'max-age=60' })
      response.write(bytes.subarray(0, 20_000))
      if (broken) globalThis.setTimeout(() => response.destroy(), 10)
      else response.end(bytes.subarray(20_000))
    }
    const client = open()
    await expect(read(client.fetch(`${origin}/f`))).rejects.toThrow(TypeError)
    const given = await client.fetch(`${origin}/f`)
    const reader = given.body!.getReader()
    await reader.read()
    await reader.cancel()
    broken = false
    await never(client, `${origin}/f`, () => bytes)
    expect(client.counters).toMatchObject({ requests: 3, fresh: 2 })
    expect(client.cache.stats().counters['cookies']).toBe(1)
  })

  test('an answer that was on its way when the file was written to is not kept', async () => {
    let release = (): void => undefined
    let count = 0
    answer = (request, response) => {
      if (request.method === 'PUT') return void response.writeHead(204).end()
      const body = `${++count}`
      const send = (): void => void response.writeHead(200, { 'cache-control': 'max-age=60' }).end(body)
      if (count > 1) return send()
      release = send
    }
    const client = open()
    const early = client.fetch(`${origin}/f`)
    while (count === 0) await setTimeout(1)
    await read(client.fetch(`${origin}/f`, { method: 'PUT', body: 'x' }))
    release()
    expect(await (await early).text()).toBe('1')
    expect(await (await client.fetch(`${origin}/f`)).text()).toBe('2')
    expect(await (await client.fetch(`${origin}/f`)).text()).toBe('2')
    // What is written elsewhere says nothing of it.
    await read(client.fetch(`${origin}/g`, { method: 'PUT', body: 'x' }))
    expect(await (await client.fetch(`${origin}/f`)).text()).toBe('2')
  })
})

describe('many at once', () => {
  const bytes = noise(300_000)
  const hundred = async (client: HttpFiles): Promise<void> => {
    const all = await Promise.all(Array.from({ length: 100 }, () => client.fetch(`${origin}/f`).then(read)))
    for (const one of all) expect(one.equals(bytes)).toBe(true)
  }
  test('one GET, and one question whether it is still good', async () => {
    answer = files({ bytes, etag: '"1"' })
    const client = open()
    await hundred(client)
    expect([requests.length, sent]).toEqual([1, bytes.length])
    await hundred(client)
    expect(requests.slice(1)).toEqual(['GET /f if-none-match "1"'])
  })

  test('also with a cache that holds hardly anything; then as a plain client, plus one', async () => {
    answer = files({ bytes, etag: '"1"' })
    const client = open([memory({ limitBytes: 70_000 })])
    await hundred(client)
    expect(requests.length).toBeLessThanOrEqual(101)
    await hundred(client)
    expect(requests.length).toBeLessThanOrEqual(202)
  })

  test('of a file that cannot be shared: each its own, and none waits for another a second time', async () => {
    let together = 1
    const waiting: ServerResponse[] = []
    answer = (_request, response) => {
      waiting.push(response)
      if (waiting.length < together) return
      for (const one of waiting.splice(0)) one.writeHead(200, { 'cache-control': 'no-store' }).end(bytes)
    }
    const client = open()
    await hundred(client)
    expect(requests.length).toBe(100)
    // Each is answered when all have come.
    together = 100
    await hundred(client)
    expect(requests.length).toBe(200)
  })

  test('nobody waits for one who does not read', async () => {
    answer = files({ bytes: noise(4 * 2 ** 20), etag: '"1"' })
    const client = open([memory({ limitBytes: 2 ** 23 })])
    const [lazy, ...others] = await Promise.all(Array.from({ length: 5 }, () => client.fetch(`${origin}/f`)))
    for (const other of others) expect((await read(other)).equals(noise(4 * 2 ** 20))).toBe(true)
    expect((await read(lazy!)).equals(noise(4 * 2 ** 20))).toBe(true)
    expect(requests.length).toBe(1)
  })
})

test('what is remembered is bounded', async () => {
  answer = (request, response) => {
    const long = 'x'.repeat(Number(new URL(request.url!, origin).searchParams.get('length')))
    response.writeHead(200, { etag: '"1"', 'content-length': 3, 'x-long': long }).end('abc')
  }
  const client = new HttpFiles({ cache: new FsCache({ store: compose([memory({ limitBytes: 2 ** 20 })]) }), files: 10 })
  const held = (): number => client.cache.stats().counters['cookies']!
  const kept: Response[] = []
  for (let n = 0; n < 30; n++) kept.push(await client.fetch(`${origin}/${n}`))
  expect(held()).toBe(10)
  // Also headers, and bodies that nobody reads.
  for (let n = 0; n < 30; n++) kept.push(await client.fetch(`${origin}/${n}?length=6000`))
  expect(held()).toBeLessThan(5)
  for (const response of kept) expect(await response.text()).toBe('abc')
  await read(client.fetch(`${origin}/${'y'.repeat(9000)}`))
  expect(held()).toBeLessThan(5)
})
