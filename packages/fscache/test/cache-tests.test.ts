/**
 * The tests for HTTP caches of https://cache-tests.fyi, against their own server: as a private cache, which a browser's
 * is.
 *
 * The suite's client marks each request by headers, which would make each a question of its own here; they are added
 * behind the cache.
 */
import { AsyncLocalStorage } from 'node:async_hooks'
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { compose } from '@tmem/core'
import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import { FsCache, HttpFiles } from '../src/index.ts'

type Kind = 'required' | 'optimal' | 'check'
interface CacheTest {
  readonly id: string
  readonly name: string
  /** Without one it is required. */
  readonly kind?: Kind
  readonly browser_skip?: boolean
}
interface Suite {
  readonly id: string
  readonly tests: readonly CacheTest[]
}
type Results = Record<string, true | readonly [string, string]>

const unreachable = 'the server breaks off, and `fetch` rejects; the suite wants the 502 or 504 of a proxy'
/** Required tests that fail, and why. */
const expected: Readonly<Record<string, string>> = {
  'stale-close-must-revalidate': unreachable,
  'stale-close-no-cache': unreachable,
  'stale-close-proxy-revalidate': unreachable,
  'stale-close-s-maxage=2': unreachable,
  '304-etag-update-response-ETag':
    'a 304 that names another ETag is a surprise (RFC 9111 §4.3.4), and ends in a plain GET',
  'age-parse-prefix':
    'Age: 0,7200 is no age, as in age-parse-prefix-twoline, which `fetch` shows in the same way: asked for again',
  'partial-use-headers':
    'requests for a range are passed through, so there is no part from the cache whose headers could be looked at',
}

const load = async (path: string): Promise<Record<string, unknown>> =>
  (await import(/* @vite-ignore */ fileURLToPath(import.meta.resolve(`http-cache-tests/${path}`)))) as Record<
    string,
    unknown
  >

async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  await new Promise((resolve) => server.close(resolve))
  return port
}

test('required tests for HTTP caches', { timeout: 240_000 }, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-fscache-'))
  const port = await freePort()
  const program = fileURLToPath(import.meta.resolve('http-cache-tests/server/server.mjs'))
  const settings = {
    npm_config_protocol: 'http',
    npm_config_port: String(port),
    npm_config_pidfile: join(folder, 'pid'),
  }
  const server = spawn(process.execPath, [program], {
    env: { ...process.env, ...settings },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const ended = new Promise((resolve) => server.once('exit', resolve))
  try {
    await new Promise<void>((resolve) => server.stdout.once('data', () => resolve()))
    server.stdout.resume()
    const marks = new AsyncLocalStorage<[string, string][]>()
    const marked: typeof fetch = (input, init) => {
      const headers = new Headers(init?.headers ?? (input instanceof Request ? input.headers : undefined))
      for (const [name, value] of marks.getStore() ?? []) headers.set(name, value)
      return fetch(input, { ...init, headers })
    }
    const store = compose([memory({ limitBytes: 2 ** 26 })])
    const files = new HttpFiles({ cache: new FsCache({ store }), fetch: marked })
    const isMark = ([name]: [string, string]): boolean => /^(test-name|test-id|req-num)$/i.test(name)
    const cached = (url: string, init: { headers?: [string, string][] } = {}): Promise<Response> => {
      const headers = init.headers ?? []
      const rest: object = { ...init, headers: headers.filter((header) => !isMark(header)) }
      return marks.run(headers.filter(isMark), () => files.fetch(url, rest))
    }
    const suites = (await load('tests/index.mjs'))['default'] as Suite[]
    const runner = (await load('client/runner.mjs')) as {
      runTests(tests: object[], fetch: unknown, browser: boolean, base: string, atOnce: number): Promise<void>
      getResults(): Results
    }
    await runner.runTests(suites, cached, true, `http://127.0.0.1:${port}`, 400)
    const kindOf = ({ kind = 'required' }: CacheTest): Kind => kind
    const all = suites.flatMap(({ tests }) => tests)
    const failing = (): CacheTest[] => {
      const results = runner.getResults()
      return all.filter((one) => kindOf(one) === 'required' && ![true, undefined].includes(results[one.id] as true))
    }
    // They tell time by seconds, which go by where others work, too: what has failed is asked again, a few at a time.
    const { makeCacheTest } = (await load('client/test.mjs')) as { makeCacheTest: (test: CacheTest) => Promise<void> }
    for (let round = 0; round < 3; round++) {
      const again = failing().filter(({ id }) => !(id in expected))
      while (again.length > 0) await Promise.all(again.splice(0, 20 >> (2 * round)).map(makeCacheTest))
    }
    const results = runner.getResults()
    const passed = { required: 0, optimal: 0, check: 0 }
    for (const one of all) if (results[one.id] === true) passed[kindOf(one)]++
    expect(
      failing()
        .map(({ id }) => id)
        .sort(),
    ).toEqual(Object.keys(expected).sort())
    expect(passed).toMatchObject({ required: 140 })
  } finally {
    server.kill()
    await ended
    rmSync(folder, { recursive: true, force: true })
  }
})
