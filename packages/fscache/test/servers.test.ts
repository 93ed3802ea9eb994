/**
 * Thirteen real servers: `files.fetch` answers as `fetch` does, cold, warm, and when a file has changed meanwhile; and
 * what comes over the wire is counted. The servers are processes of their own, unpacked from Debian, from npm, and
 * Python's.
 */
import { createHash } from 'node:crypto'
import { chmodSync, mkdtempSync, rmSync, utimesSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { compose } from '@tmem/core'
import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { FsCache, type HttpFile, HttpFiles } from '../src/index.ts'
import { type FileServer, fileServers, type Running, start } from './servers/start.ts'

/** Bytes that do not compress, and text that does. */
function contents(name: string, version: number): Buffer {
  const length = name === 'big.bin' ? 400_000 : name === 'small.txt' ? 3000 : 80_000
  const bytes = Buffer.alloc(length, `<p>version ${version} of ${name}, </p>\n`)
  if (name !== 'big.bin') return bytes
  let state = version
  for (let at = 0; at < length; at++) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    bytes[at] = state >>> 24
  }
  return bytes
}
const names = ['big.bin', 'page.html', 'small.txt']

interface Site {
  readonly running: Running
  /**
   * Writes all files in a version, as if that had been some time ago. Of the same length, so that the time must tell.
   */
  readonly write: (version: number) => void
}

async function site(server: FileServer, run: (site: Site) => Promise<void>): Promise<void> {
  const root = mkdtempSync(join(tmpdir(), 'tmem-fscache-'))
  const state = mkdtempSync(join(tmpdir(), 'tmem-fscache-'))
  // Apache serves as somebody else.
  for (const folder of [root, state]) chmodSync(folder, 0o755)
  const write = (version: number): void => {
    for (const name of names) {
      const path = join(root, name)
      const time = Math.floor(Date.now() / 1000) - 3600 + 10 * version
      writeFileSync(path, contents(name, version))
      utimesSync(path, time, time)
    }
  }
  try {
    write(1)
    const running = await start(server, root, state)
    try {
      await run({ running, write })
    } finally {
      await running.stop()
    }
  } finally {
    for (const folder of [root, state]) rmSync(folder, { recursive: true, force: true })
  }
}

function client(limitBytes = 2 ** 23): { files: HttpFiles; asked: string[] } {
  const asked: string[] = []
  const cache = new FsCache({ store: compose([memory({ limitBytes })]) })
  const counted: typeof fetch = (input, init) => {
    asked.push(new Request(input, init).method)
    return fetch(input, init)
  }
  return { files: new HttpFiles({ cache, fetch: counted }), asked }
}

const digest = (bytes: Uint8Array | ArrayBuffer): string =>
  createHash('sha256').update(new Uint8Array(bytes)).digest('hex')

interface Seen extends Readonly<Record<string, unknown>> {
  readonly redirected: boolean
}

/** All that a program sees of an answer. What tells the time differs from answer to answer. */
async function seen(response: Response): Promise<Seen> {
  const changing = new Set(['age', 'date', 'expires', 'keep-alive', 'connection'])
  const { status, statusText, url, redirected, type, ok } = response
  const headers = [...response.headers].filter(([name]) => !changing.has(name))
  return { status, statusText, url, redirected, type, ok, headers, body: digest(await response.arrayBuffer()) }
}

describe.each(fileServers)('$name', (server) => {
  test('cold, warm, changed meanwhile: as fetch sees it', { timeout: 60_000 }, async (ctx) => {
    requires(ctx, server.needs)
    await site(server, async ({ running, write }) => {
      const { files, asked } = client()
      const { origin, wire } = running
      const over = async (run: () => Promise<Response>): Promise<{ seen: Seen; bytes: number }> => {
        const before = wire.bytes
        const what = await seen(await run())
        return { seen: what, bytes: wire.bytes - before }
      }
      for (let version = 1; version <= 3; version++) {
        if (version > 1) write(version)
        for (const name of names) {
          const url = `${origin}/${name}`
          const native = await over(() => fetch(url))
          expect(native.seen).toMatchObject({ body: digest(contents(name, version)) })
          const settings: object = server.fresh && version > 1 ? { cache: 'no-cache' } : {}
          asked.length = 0
          const cold = await over(() => files.fetch(url, settings))
          expect(cold.seen).toEqual(native.seen)
          // What a question adds to the request does not come back.
          expect([asked.length, cold.bytes <= native.bytes + 100]).toEqual([1, true])
          // What a redirect leads to (of serve-handler, from page.html to page) is kept from the second time on.
          if (version === 1 && native.seen.redirected) await seen(await files.fetch(url))
          asked.length = 0
          for (let round = 0; round < 2; round++) {
            const warm = await over(() => files.fetch(url))
            expect(warm.seen).toEqual(native.seen)
            expect(warm.bytes).toBeLessThan(1000)
          }
          expect(asked.length).toBe(server.fresh ? 0 : 2)
        }
      }
      for (const url of [`${origin}/none`, `${origin}/none?${'x'.repeat(3000)}`])
        for (let round = 0; round < 2; round++)
          expect(await seen(await files.fetch(url))).toEqual(await seen(await fetch(url)))
      const head: RequestInit = { method: 'HEAD' }
      expect(await seen(await files.fetch(`${origin}/big.bin`, head))).toEqual(
        await seen(await fetch(`${origin}/big.bin`, head)),
      )
    })
  })

  test('a cache that holds a part, many at once', { timeout: 60_000 }, async (ctx) => {
    requires(ctx, server.needs)
    await site(server, async ({ running }) => {
      const { origin, wire } = running
      const url = `${origin}/big.bin`
      const whole = contents('big.bin', 1)
      const small = client(250_000)
      for (let round = 0; round < 4; round++) {
        const { surprises } = small.files.counters
        const before = wire.bytes
        small.asked.length = 0
        expect(Buffer.from(await (await small.files.fetch(url)).arrayBuffer()).equals(whole)).toBe(true)
        // Hono gives a part the ETag of its bytes: that surprises once, and costs the hole.
        const times = small.files.counters.surprises > surprises ? 2 : 1
        expect(wire.bytes - before).toBeLessThanOrEqual(times * whole.length + 2000)
        expect(small.asked.length).toBeLessThanOrEqual(2)
      }
      const { files, asked } = client()
      await (await files.fetch(url)).arrayBuffer()
      asked.length = 0
      const all = await Promise.all(
        Array.from({ length: 100 }, async () => Buffer.from(await (await files.fetch(url)).arrayBuffer())),
      )
      expect(all.every((one) => one.equals(whole))).toBe(true)
      expect(asked.length).toBe(server.fresh ? 0 : 1)
    })
  })

  test('files that are open: of one version, by parts', { timeout: 60_000 }, async (ctx) => {
    requires(ctx, server.needs)
    await site(server, async ({ running, write }) => {
      const url = `${running.origin}/big.bin`
      const reads = async (file: HttpFile, version: number): Promise<string> => {
        const whole = contents('big.bin', version)
        const into = Buffer.alloc(50_000)
        for (const at of [0, 300_000, 100_000, 380_000, 1, 390_000]) {
          const count = await file.read(into, 0, into.length, at)
          if (!into.subarray(0, count).equals(whole.subarray(at, at + into.length))) return 'wrong bytes'
        }
        return 'right'
      }
      const outcomes: string[] = []
      const note = async (run: () => Promise<string>): Promise<void> => {
        outcomes.push(await run().catch((error: Error & { code?: string }) => error.code ?? error.message))
      }
      const { files } = client()
      await note(async () => reads(await files.open(url), 1))
      let open: HttpFile | undefined
      await note(async () => {
        open = await client().files.open(url)
        return 'open'
      })
      write(2)
      await note(async () => (open === undefined ? 'not open' : reads(open, 2)))
      // Only the hour has passed for who asked before.
      await note(async () => reads(await client().files.open(url), 2))
      const none = `${url} cannot be read by pages: it has no strong ETag, no length, or says no-store`
      expect(outcomes).toEqual(
        {
          parts: ['right', 'open', 'ESTALE', 'right'],
          none: [none, none, 'not open', none],
          // Each part has an ETag of its own.
          wrong: ['ESTALE', 'open', 'ESTALE', 'ESTALE'],
        }[server.parts],
      )
    })
  })
})
