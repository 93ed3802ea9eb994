/**
 * Any programs at once, over any caches: what `fetch` would have got, whatever changes on the server, is given up, or
 * falls out of memory.
 *
 * Two clients share a cache; files change between steps only, so each answer must be of the version that the server
 * has.
 */
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { setImmediate } from 'node:timers/promises'
import { gzipSync } from 'node:zlib'
import { compose, type Layer } from '@tmem/core'
import { delay } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import fc from 'fast-check'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { FsCache, HttpFiles } from '../src/index.ts'

/** Bytes that tell the version and their place. */
function bytesOf(length: number, version: number): Buffer {
  const bytes = Buffer.alloc(length, version)
  for (let at = 0; at + 8 <= length; at += 64) bytes.writeUInt32LE(at ^ version, at)
  return bytes
}

const kinds = ['parts', 'weak', 'chunked', 'compressed'] as const
interface File {
  readonly kind: (typeof kinds)[number]
  readonly length: number
  readonly version: number
}
let file: File
let server: Server
let url: string

beforeAll(async () => {
  server = createServer((request, response) => {
    const { kind, length, version } = file
    const bytes = bytesOf(length, version)
    const etag = kind === 'weak' || kind === 'compressed' ? `W/"${version}"` : `"${version}"`
    const headers: Record<string, string | number> = { etag }
    if (request.headers['if-none-match'] === etag) return void response.writeHead(304, headers).end()
    const range = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '')
    const condition = request.headers['if-range'] ?? request.headers['if-match'] ?? etag
    if (range !== null && kind === 'parts' && condition === etag) {
      const [start, end] = [Number(range[1]), Number(range[2])]
      response.writeHead(206, { ...headers, 'content-range': `bytes ${start}-${end}/${length}` })
      return void response.end(bytes.subarray(start, end + 1))
    }
    const body = kind === 'compressed' ? gzipSync(bytes) : bytes
    if (kind === 'compressed') headers['content-encoding'] = 'gzip'
    if (kind !== 'chunked') headers['content-length'] = body.length
    response.writeHead(200, headers)
    // In two parts, so that others come in between.
    response.write(body.subarray(0, body.length >> 1))
    return void setTimeout(() => response.end(body.subarray(body.length >> 1)), 1)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`
})
afterAll(() => {
  server.closeAllConnections()
  server.close()
})

const ways = ['all', 'all', 'all', 'clone', 'cancel', 'some', 'abort', 'part'] as const
const stacks: Readonly<Record<string, () => Layer[]>> = {
  'little memory': () => [memory({ limitBytes: 2 ** 17 })],
  'enough memory': () => [memory({ limitBytes: 2 ** 23 })],
  compressed: () => [zcache({ limitBytes: 2 ** 22 })],
  'a store that has to wait': () => [delay({ turn: () => setImmediate() }), memory({ limitBytes: 2 ** 20 })],
}

/** What one program sees: `right`, or what is wrong. */
async function use(files: HttpFiles, way: (typeof ways)[number], at: number): Promise<string> {
  const wanted = bytesOf(file.length, file.version)
  const told = (bytes: Uint8Array, right: Uint8Array): string =>
    Buffer.compare(bytes, right) === 0 ? 'right' : `${way} of ${JSON.stringify(file)}: ${bytes.length} bytes, wrong`
  if (way === 'part' && file.kind === 'parts') {
    const opened = await files.open(url)
    const into = Buffer.alloc(30_000)
    const count = await opened.read(into, 0, into.length, at % (file.length + 1))
    opened.close()
    return told(into.subarray(0, count), wanted.subarray(at % (file.length + 1)).subarray(0, into.length))
  }
  const abort = new AbortController()
  if (way === 'abort') setTimeout(() => abort.abort(), at % 6)
  try {
    const response = await files.fetch(url, { signal: abort.signal })
    const from = way === 'clone' ? response.clone() : response
    if (way === 'cancel' || way === 'some') {
      const reader = from.body!.getReader()
      if (way === 'some') await reader.read()
      await reader.cancel()
      return 'right'
    }
    return told(Buffer.from(await from.arrayBuffer()), wanted)
  } catch (error) {
    if (abort.signal.aborted && error === abort.signal.reason) return 'right'
    throw error
  }
}

test.each(Object.entries(stacks))('%s', { timeout: 120_000 }, async (_name, stack) => {
  const length = fc.oneof(fc.constantFrom(0, 1, 4096, 65_536), fc.nat(400_000))
  const step = fc.oneof(
    fc.record({ kind: fc.constantFrom(...kinds), length }),
    ...Array.from({ length: 4 }, () =>
      fc.record({
        programs: fc.array(fc.record({ way: fc.constantFrom(...ways), at: fc.nat(400_000), client: fc.nat(1) }), {
          minLength: 1,
          maxLength: 6,
        }),
      }),
    ),
  )
  let cached = 0
  await fc.assert(
    fc.asyncProperty(
      fc.array(step, { minLength: 10, maxLength: 40, size: 'max' }),
      fc.constantFrom(4096, 8192),
      async (steps, pageSize) => {
        const store = compose(stack())
        const cache = new FsCache({ store, pageSize })
        const clients = [new HttpFiles({ cache }), new HttpFiles({ cache })]
        const outcomes = ['right']
        file = { kind: 'parts', length: 100_000, version: 1 }
        for (const one of steps) {
          if ('kind' in one) file = { ...one, version: (file.version % 250) + 1 }
          else {
            const run = one.programs.map(({ way, at, client }) => use(clients[client]!, way, at))
            outcomes.push(...(await Promise.all(run)))
          }
        }
        expect([...new Set(outcomes)]).toEqual(['right'])
        for (const { counters } of clients) cached += counters.pagesCached
        for (const client of clients) client.close()
        expect(cache.stats().counters).toMatchObject({ cookies: 0, volumes: 0 })
        await store.close()
      },
    ),
    { seed: 15, numRuns: 25 },
  )
  expect(cached).toBeGreaterThan(500)
})
