import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { compose, type Layer } from '@tmem/core'
import { discard, refuse } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import fc from 'fast-check'
import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest'
import { FsCache, HttpFiles, StaleFileError } from '../src/index.ts'

/** A file of the server, and how it behaves. */
interface Served {
  bytes: Buffer
  etag: string | undefined
  ranges: boolean
  control?: string
  /** Called before each answer. */
  before?: (request: IncomingMessage) => void
  /** Answers itself. */
  instead?: (request: IncomingMessage, response: ServerResponse) => boolean
}

const served = new Map<string, Served>()
const log: string[] = []
let server: Server
let origin: string

beforeAll(async () => {
  server = createServer((request, response) => {
    const file = served.get(request.url!)
    log.push([request.method, request.headers.range].filter(Boolean).join(' '))
    file?.before?.(request)
    if (file === undefined) {
      response.writeHead(404).end()
      return
    }
    if (file.instead?.(request, response) === true) return
    const { bytes, etag } = file
    const headers: Record<string, string> = { 'content-type': 'text/plain' }
    if (etag !== undefined) headers['etag'] = etag
    if (file.control !== undefined) headers['cache-control'] = file.control
    if (request.headers['if-none-match'] === etag && etag !== undefined) {
      response.writeHead(304, headers).end()
      return
    }
    if (request.headers['if-match'] !== undefined && request.headers['if-match'] !== etag) {
      response.writeHead(412).end()
      return
    }
    const range = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '')
    if (range === null || !file.ranges) {
      response.writeHead(200, { ...headers, 'content-length': bytes.length })
      response.end(request.method === 'HEAD' ? undefined : bytes)
      return
    }
    const [start, end] = [Number(range[1]), Math.min(Number(range[2]), bytes.length - 1)]
    headers['content-range'] = `bytes ${start}-${end}/${bytes.length}`
    response.writeHead(206, headers).end(bytes.subarray(start, end + 1))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
})
afterAll(() => {
  server.closeAllConnections()
  server.close()
})
beforeEach(() => {
  served.clear()
  log.length = 0
})

const bytesOf = (length: number, fill: number): Buffer => {
  const bytes = Buffer.alloc(length, fill)
  for (let at = 0; at + 4 <= length; at += 512) bytes.writeUInt32LE(at + fill, at)
  return bytes
}
function serve(path: string, bytes: Buffer, etag: string | undefined = '"1"'): { file: Served; url: string } {
  const file: Served = { bytes, etag, ranges: true }
  served.set(path, file)
  return { file, url: origin + path }
}
const open = (layers: Layer[] = [zcache({ limitBytes: 2 ** 20 })], files?: number): HttpFiles => {
  const cache = new FsCache({ store: compose(layers, { check: 'model' }) })
  return new HttpFiles({ cache, ...(files === undefined ? {} : { files }) })
}
const text = async (files: HttpFiles, url: string): Promise<Buffer> =>
  Buffer.from(await (await files.fetch(url)).arrayBuffer())

test('the first fetch reads from the server, the second only asks whether it is still good', async () => {
  const { file, url } = serve('/a', bytesOf(100_000, 1))
  const files = open()
  expect((await text(files, url)).equals(file.bytes)).toBe(true)
  expect(log).toEqual(['GET'])
  log.length = 0
  const response = await files.fetch(url)
  expect([response.status, response.headers.get('content-type')]).toEqual([200, 'text/plain'])
  expect(Buffer.from(await response.arrayBuffer()).equals(file.bytes)).toBe(true)
  expect(log).toEqual(['GET'])
  expect(files.counters).toMatchObject({ notModified: 1, pagesFetched: 25, pagesCached: 25, bytesFetched: 100_000 })
  files.close()
  // Closed and opened again: nothing is remembered, the pages are there.
  expect((await text(files, url)).equals(file.bytes)).toBe(true)
  expect(files.counters.pagesFetched).toBe(25)
})

test('a file that changed on the server is read anew, and nothing of the old one is served', async () => {
  const { file, url } = serve('/a', bytesOf(30_000, 1))
  const files = open()
  await text(files, url)
  for (const [length, fill] of [
    [30_000, 2],
    [10_000, 3],
    [50_000, 4],
    [0, 5],
    [5, 6],
  ] as const) {
    Object.assign(file, { bytes: bytesOf(length, fill), etag: `"${fill}"` })
    expect((await text(files, url)).equals(file.bytes)).toBe(true)
    expect((await text(files, url)).equals(file.bytes)).toBe(true)
  }
  expect(files.counters.changes).toBe(5)
})

test('parts of a file: only the pages that are touched are fetched', async () => {
  const { file, url } = serve('/a', bytesOf(100_001, 1))
  const files = open()
  const opened = await files.open(url)
  expect([opened.size, opened.version]).toEqual([100_001, '"1"'])
  const into = Buffer.alloc(200)
  expect(await opened.read(into, 50, 100, 8150)).toBe(100)
  expect(into.subarray(50, 150).equals(file.bytes.subarray(8150, 8250))).toBe(true)
  expect(log).toEqual(['HEAD', 'GET bytes=4096-12287'])
  // With a hole before and behind what is there.
  const all = Buffer.alloc(20_000)
  expect(await opened.read(all, 0, 20_000, 0)).toBe(20_000)
  expect(all.equals(file.bytes.subarray(0, 20_000))).toBe(true)
  expect(log.slice(2)).toEqual(['GET bytes=0-4095', 'GET bytes=12288-20479'])
  expect(await opened.read(into, 0, 200, 100_000)).toBe(1)
  expect(await opened.read(into, 0, 200, 100_001)).toBe(0)
  await expect(opened.read(into, 0, 201, 0)).rejects.toThrow(RangeError)
  await expect(opened.read(into, -1, 2, 0)).rejects.toThrow(RangeError)
  opened.close()
  opened.close()
  await expect(opened.read(into, 0, 1, 0)).rejects.toThrow('closed')
})

test('readers of the same page share one request; one that gives up does not disturb the others', async () => {
  const { file, url } = serve('/a', bytesOf(5000, 1))
  const files = open()
  const opened = await files.open(url)
  const read = async (signal?: AbortSignal): Promise<Buffer> => {
    const into = Buffer.alloc(5000)
    await opened.read(into, 0, 5000, 0, signal)
    return into
  }
  const [first, second] = await Promise.all([read(), read()])
  expect([first.equals(file.bytes), second.equals(file.bytes)]).toEqual([true, true])
  expect(log).toEqual(['HEAD', 'GET bytes=0-4999'])
  const other = open()
  const reopened = await other.open(url)
  const abort = new AbortController()
  const into = Buffer.alloc(5000)
  const gaveUp = reopened.read(into, 0, 5000, 0, abort.signal)
  const patient = Buffer.alloc(5000)
  const waits = reopened.read(patient, 0, 5000, 0)
  // Both ask the cache at once; the first asks the server, the second joins; then the first gives up.
  abort.abort()
  await expect(gaveUp).rejects.toMatchObject({ name: 'AbortError' })
  await waits
  expect(patient.equals(file.bytes)).toBe(true)
})

test('an open file is of one version: changed on the server, what is not in memory is stale', async () => {
  const { file, url } = serve('/a', bytesOf(40_960, 1))
  const files = open()
  const opened = await files.open(url)
  const into = Buffer.alloc(4096)
  await opened.read(into, 0, 4096, 0)
  Object.assign(file, { bytes: bytesOf(40_960, 2), etag: '"2"' })
  await opened.read(into, 0, 4096, 0)
  expect(into.equals(bytesOf(40_960, 1).subarray(0, 4096))).toBe(true)
  await expect(opened.read(into, 0, 4096, 8192)).rejects.toMatchObject({ code: 'ESTALE' })
  // From now on nothing of the old version is served, not even what was there.
  await expect(opened.read(into, 0, 4096, 0)).rejects.toBeInstanceOf(StaleFileError)
  opened.close()
  expect((await text(files, url)).equals(file.bytes)).toBe(true)
})

test('pages that were on their way when the file changed are not kept for the new version', async () => {
  const { file, url } = serve('/a', bytesOf(8192, 1))
  const files = open()
  const opened = await files.open(url)
  let answer = (): void => {}
  const asked = new Promise<void>((resolve) => {
    file.instead = (request, response) => {
      if (request.headers.range === undefined) return false
      answer = () => {
        response.writeHead(206, { etag: '"1"', 'content-range': 'bytes 0-8191/8192' }).end(bytesOf(8192, 1))
      }
      resolve()
      return true
    }
  })
  const old = Buffer.alloc(8192)
  const reading = opened.read(old, 0, 8192, 0)
  await asked
  delete file.instead
  Object.assign(file, { bytes: bytesOf(8192, 2), etag: '"2"' })
  const second = await files.open(url)
  answer()
  await reading
  expect(old.equals(bytesOf(8192, 1))).toBe(true)
  const fresh = Buffer.alloc(8192)
  await second.read(fresh, 0, 8192, 0)
  expect(fresh.equals(file.bytes)).toBe(true)
})

test('a server that ignores If-Match is found out by its ETag', async () => {
  const { file, url } = serve('/a', bytesOf(40_960, 1))
  const files = open()
  const opened = await files.open(url)
  Object.assign(file, { bytes: bytesOf(40_960, 2), etag: '"2"' })
  file.before = (request) => {
    if (request.headers['if-match'] !== undefined) request.headers['if-match'] = file.etag!
  }
  await expect(opened.read(Buffer.alloc(10), 0, 10, 0)).rejects.toMatchObject({ code: 'ESTALE' })
})

test('a body of more than 16 MiB whose pages are dropped while it is read, of a file that has changed, errors', async () => {
  const { file, url } = serve('/a', bytesOf(20 * 2 ** 20, 1))
  const files = open([memory({ limitBytes: 2 ** 25 })])
  await text(files, url)
  const response = await files.fetch(url)
  const reader = response.body!.getReader()
  await reader.read()
  files.cache.withdraw()
  Object.assign(file, { bytes: bytesOf(20 * 2 ** 20, 2), etag: '"2"' })
  const rest = async (): Promise<void> => {
    while (!(await reader.read()).done);
  }
  await expect(rest()).rejects.toMatchObject({ code: 'ESTALE' })
  expect((await text(files, url)).equals(file.bytes)).toBe(true)
})

test.each([
  ['at once', async (response: Response) => Buffer.from(await response.arrayBuffer())],
  [
    'as a stream',
    async (response: Response) => {
      const parts: Uint8Array[] = []
      for await (const part of response.body as unknown as AsyncIterable<Uint8Array>) parts.push(part)
      return Buffer.concat(parts)
    },
  ],
])(
  'a body of up to 16 MiB holds what it has promised, read %s: its pages may go, and its file change',
  async (_how, all) => {
    const bytes = bytesOf(2 ** 24, 1)
    const { file, url } = serve('/a', bytes)
    const files = open([memory({ limitBytes: 2 ** 25 })])
    await text(files, url)
    const response = await files.fetch(url)
    files.cache.withdraw()
    Object.assign(file, { bytes: bytesOf(2 ** 24, 2), etag: '"2"' })
    expect((await all(response)).equals(bytes)).toBe(true)
  },
)

test('a server without ranges sends all of it; the right pages are taken', async () => {
  const { file, url } = serve('/a', bytesOf(300_000, 1))
  file.ranges = false
  const files = open()
  const opened = await files.open(url)
  const into = Buffer.alloc(10_000)
  expect(await opened.read(into, 0, 10_000, 150_001)).toBe(10_000)
  expect(into.equals(file.bytes.subarray(150_001, 160_001))).toBe(true)
  expect((await text(files, url)).equals(file.bytes)).toBe(true)
})

test.each([
  ['no ETag', { etag: undefined }],
  ['no-store', { control: 'private, no-store' }],
])('with %s a file is passed through', async (_what, change) => {
  const { file, url } = serve('/a', bytesOf(9000, 1))
  Object.assign(file, change)
  const files = open()
  for (let round = 0; round < 2; round++) expect((await text(files, url)).equals(file.bytes)).toBe(true)
  expect(files.counters).toMatchObject({ uncached: 2, pagesFetched: 0 })
  await expect(files.open(url)).rejects.toThrow('cannot be read by pages')
})

test('what the server refuses is passed on', async () => {
  const files = open()
  expect((await files.fetch(`${origin}/none`)).status).toBe(404)
  await expect(files.open(`${origin}/none`)).rejects.toThrow('404')
  await expect(files.open('nonsense')).rejects.toThrow(TypeError)
  const { file, url } = serve('/odd', bytesOf(10, 1))
  file.instead = (_request, response) => {
    response.writeHead(304).end()
    return true
  }
  await expect(files.open(url)).rejects.toThrow('304')
  await expect(files.open('http://127.0.0.1:1/')).rejects.toThrow('fetch failed')
})

test('requests with headers or another method go through; what changes something forgets the file', async () => {
  const { file, url } = serve('/a', bytesOf(5000, 1))
  const files = open()
  await text(files, url)
  const part = await files.fetch(url, { headers: { range: 'bytes=0-9' } })
  expect([part.status, (await part.arrayBuffer()).byteLength]).toEqual([206, 10])
  file.instead = (request, response) => {
    if (request.method !== 'PUT') return false
    Object.assign(file, { bytes: bytesOf(5000, 2), etag: '"1"' })
    response.writeHead(204).end()
    return true
  }
  // A server that gives the new bytes the old ETag lies; after our own PUT it is not believed.
  expect((await files.fetch(url, { method: 'PUT', body: 'x' })).status).toBe(204)
  expect((await text(files, url)).equals(bytesOf(5000, 2))).toBe(true)
})

test.each([
  [
    'ends early',
    (response: ServerResponse, bytes: Buffer) => {
      response.writeHead(206, { etag: '"1"', 'content-range': `bytes 0-8191/${bytes.length}` })
      response.end(bytes.subarray(0, 5000))
    },
    'ended after 5000 bytes',
  ],
  [
    'is of another range',
    (response: ServerResponse, bytes: Buffer) => {
      response.writeHead(206, { etag: '"1"', 'content-range': `bytes 4096-12287/${bytes.length}` })
      response.end(bytes.subarray(4096, 12_288))
    },
    'asked for bytes 0 to 8191',
  ],
  [
    'is an error',
    (response: ServerResponse) => {
      response.writeHead(500, { etag: '"1"' }).end('an error page of some length'.repeat(1000))
    },
    'the server answers 500',
  ],
  ['is cut off', (response: ServerResponse) => response.destroy(), 'fetch failed'],
])(
  'an answer that %s: an error, nothing wrong is kept, and the next try may succeed',
  async (_what, answer, message) => {
    const { file, url } = serve('/a', bytesOf(20_000, 1))
    const files = open()
    const opened = await files.open(url)
    file.instead = (_request, response) => {
      answer(response, file.bytes)
      return true
    }
    const into = Buffer.alloc(8192)
    await expect(opened.read(into, 0, 8192, 0)).rejects.toThrow(message)
    delete file.instead
    await opened.read(into, 0, 8192, 0)
    expect(into.equals(file.bytes.subarray(0, 8192))).toBe(true)
    expect(files.counters.pagesCached).toBe(0)
  },
)

test.each([
  ['refuses', [refuse({ every: 1 }), memory({ limitBytes: 2 ** 20 })]],
  ['loses', [discard({ mode: 'lose' as const })]],
  ['has hardly any room for', [memory({ limitBytes: 70_000 })]],
])('with a store that %s pages every read is right', async (_what, layers) => {
  const { file, url } = serve('/a', bytesOf(200_000, 1))
  const files = open(layers)
  for (let round = 0; round < 3; round++) expect((await text(files, url)).equals(file.bytes)).toBe(true)
})

test('files that nobody has open are forgotten when there are too many; their pages stay', async () => {
  const files = open(undefined, 2)
  const urls = ['/a', '/b', '/c'].map((path, n) => serve(path, bytesOf(70_000, n)).url)
  for (const url of urls) await text(files, url)
  expect(files.cache.stats().counters['cookies']).toBe(2)
  const { pagesFetched } = files.counters
  for (const url of urls) await text(files, url)
  expect(files.counters.pagesFetched).toBe(pagesFetched)
})

test('any history of reads and changes is answered with the bytes of the version that was opened', async () => {
  const step = fc.record({
    change: fc.nat(9).map((n) => n === 0),
    at: fc.nat(60_000),
    length: fc.nat(20_000),
    length2: fc.integer({ min: 1, max: 60_000 }),
  })
  let [reads, hits] = [0, 0]
  await fc.assert(
    fc.asyncProperty(fc.array(step, { minLength: 5, maxLength: 30, size: 'max' }), async (steps) => {
      let version = 1
      const { file, url } = serve('/a', bytesOf(50_000, 1))
      const files = open([memory({ limitBytes: 90_000 })])
      for (const { change, at, length, length2 } of steps) {
        if (change) Object.assign(file, { bytes: bytesOf(length2, ++version), etag: `"${version}"` })
        const opened = await files.open(url)
        const into = Buffer.alloc(length)
        const count = await opened.read(into, 0, length, at)
        opened.close()
        reads++
        const wanted = file.bytes.subarray(at, at + length)
        expect(into.subarray(0, count).equals(wanted)).toBe(true)
      }
      hits += files.counters.pagesCached
    }),
    { seed: 7, numRuns: 25 },
  )
  expect(reads).toBeGreaterThan(200)
  expect(hits).toBeGreaterThan(200)
})
