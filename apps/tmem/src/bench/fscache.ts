/**
 * `tmem bench fscache`: `HttpFiles` against `fetch`, and against ranges by hand, with a server in a process of its own
 * on the loopback, which waits 20 ms before the first byte, or does not.
 *
 * Every body is read to its end (`arrayBuffer`). The store is plain memory: what compression costs is measured by
 * `zcache`. Cold: files that nobody has asked for yet. `bytes-…` are those that the server has sent in one more round.
 * Pages are put after a body was handed over: what is left of that is done before the next measurement begins, and
 * `cold-…-and-put`, without a goal, is the time until all are put.
 * Who asks whether a file is still good wants its bytes: the reference of `revalidated-…` asks by `If-None-Match`, too,
 * gets 304, and copies the body that it has kept (a copy, because who gets it may change it).
 * `revalidated-…-without-body` compares with the 304 alone, and has no goal.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { compose } from '@tmem/core'
import { FsCache, type HttpFile, HttpFiles } from '@tmem/fscache'
import { memory } from '@tmem/memory'
import { Failed } from '../ending.ts'
import { started } from './fio.ts'
import { type Bench, type MeasuredRow, type Row, ratioRow, type Suite } from './frame.ts'

/** The suite. */
export const fscache: Suite = {
  name: 'fscache',
  summary: 'files of an HTTP server through a cache, against fetch',
  run: fscacheRows,
}

const large = 4 * 2 ** 20
const small = 4096
const smalls = 100
const smallsAtOnce = 8
const huge = 256 * 2 ** 20
const part = 65_536

interface Client {
  readonly files: HttpFiles
  close(): Promise<void>
}

function client(limitBytes: number): Client {
  const store = compose([memory({ limitBytes })])
  const files = new HttpFiles({ cache: new FsCache({ store }) })
  return {
    files,
    async close() {
      files.close()
      await store.close()
    },
  }
}

/** Until all pages that came are put. */
async function settled({ files }: Client): Promise<void> {
  while (files.cache.counters.writes < files.counters.pagesFetched) await setImmediate()
}

/** What is used of a response. */
type HasBody = Pick<Response, 'arrayBuffer'>

async function body(response: HasBody, bytes: number): Promise<void> {
  const { byteLength } = await response.arrayBuffer()
  if (byteLength !== bytes) throw new Failed(`bench fscache: a body has ${byteLength} bytes, not ${bytes}`)
}

/** All URLs, so many at once. */
async function all(urls: readonly string[], atOnce: number, run: (url: string) => Promise<void>): Promise<void> {
  let next = 0
  const work = async (): Promise<void> => {
    while (next < urls.length) await run(urls[next++]!)
  }
  await Promise.all(Array.from({ length: atOnce }, work))
}

/** What is fetched in one operation. */
interface Load {
  readonly name: string
  readonly bytes: number
  readonly count: number
  readonly atOnce: number
}
const loads: readonly Load[] = Object.freeze([
  { name: '4m', bytes: large, count: 1, atOnce: 1 },
  { name: '100-small', bytes: small, count: smalls, atOnce: smallsAtOnce },
])

async function fscacheRows(bench: Bench): Promise<Row[]> {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-bench-fscache-'))
  const sign = join(folder, 'port')
  try {
    const program = fileURLToPath(new URL('./fscache-server.js', import.meta.url))
    const server = await started(process.execPath, [program, sign], sign)
    try {
      const origin = `http://127.0.0.1:${readFileSync(sign, 'utf8')}`
      const rows: Row[] = []
      for (const delay of [20, 0]) {
        for (const load of loads) rows.push(...(await loadRows(bench, origin, delay, load)))
        rows.push(...(await partRows(bench, origin, delay)))
      }
      return rows
    } finally {
      await server.stop()
    }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

async function loadRows(bench: Bench, origin: string, delay: number, load: Load): Promise<MeasuredRow[]> {
  const { name, bytes, count, atOnce } = load
  const urls = (policy: string, round = 0): string[] =>
    Array.from({ length: count }, (_, n) => `${origin}/${delay}/${policy}/${bytes}/${round}-${n}`)
  const [asked, fresh] = [urls('asked'), urls('fresh')]
  const operations = delay > 0 ? 1 : 4
  const limitBytes = 16 * 2 ** 20
  const through =
    (
      fetch: (url: string, init: RequestInit) => Promise<HasBody>,
      which: () => readonly string[],
      init: RequestInit,
      got: number,
    ) =>
    async (times: number): Promise<void> => {
      for (let turn = 0; turn < times; turn++)
        await all(which(), atOnce, async (url) => body(await fetch(url, init), got))
    }
  // Nobody has asked for these yet.
  let round = 0
  const unknown = (): string[] => urls('asked', ++round)
  const cold = client(limitBytes)
  const warm = client(limitBytes)
  const put = (): Promise<void> => settled(cold)
  const suffix = `${name}-${delay}ms`
  try {
    const coldNs = await bench.measure(
      `cold ${suffix}`,
      {
        ours: { prepare: put, run: through(cold.files.fetch, unknown, {}, bytes) },
        oursAndPut: {
          prepare: put,
          run: async (times: number) => {
            await through(cold.files.fetch, unknown, {}, bytes)(times)
            await put()
          },
        },
        fetch: { prepare: put, run: through(fetch, unknown, {}, bytes) },
      },
      { operations },
    )
    const sent = async (run: () => Promise<void>): Promise<number> => {
      const told = async (): Promise<number> => Number(await (await fetch(`${origin}/sent`)).text())
      const before = await told()
      await run()
      return (await told()) - before
    }
    const oursSent = await sent(() => through(cold.files.fetch, unknown, {}, bytes)(1))
    const nativeSent = await sent(() => through(fetch, unknown, {}, bytes)(1))
    for (const which of [asked, fresh]) await through(warm.files.fetch, () => which, {}, bytes)(1)
    const freshNs = await bench.measure(
      `fresh ${suffix}`,
      {
        ours: { run: through(warm.files.fetch, () => fresh, {}, bytes) },
        fetch: { run: through(fetch, () => fresh, {}, bytes) },
      },
      { operations },
    )
    const conditional: RequestInit = { headers: { 'if-none-match': '"1"' } }
    const kept = new Uint8Array(bytes).fill(1)
    const byHand = async (url: string, init: RequestInit): Promise<HasBody> => {
      const response = await fetch(url, init)
      if (response.status !== 304) throw new Failed(`bench fscache: ${response.status} instead of 304`)
      return { arrayBuffer: async () => kept.slice().buffer }
    }
    const askedNs = await bench.measure(
      `revalidated ${suffix}`,
      {
        ours: { run: through(warm.files.fetch, () => asked, {}, bytes) },
        byHand: { run: through(byHand, () => asked, conditional, bytes) },
        unmodified: { run: through(fetch, () => asked, conditional, 0) },
      },
      { operations },
    )
    const { fresh: unasked, notModified, pagesFetched } = warm.files.counters
    if (unasked === 0 || notModified === 0 || pagesFetched !== (2 * count * bytes) / 4096)
      throw new Failed(`bench fscache: not from the cache: ${JSON.stringify(warm.files.counters)}`)
    const ms = (ns: number): number => ns / 1e6
    return [
      ratioRow(`cold-${suffix}`, 'ms', ms(coldNs.ours), 'fetch', ms(coldNs.fetch), 1.05),
      ratioRow(`cold-${suffix}-and-put`, 'ms', ms(coldNs.oursAndPut), 'fetch', ms(coldNs.fetch)),
      ratioRow(`bytes-cold-${suffix}`, 'bytes', oursSent, 'fetch', nativeSent, 1),
      ratioRow(`fresh-${suffix}`, 'ms', ms(freshNs.ours), 'fetch', ms(freshNs.fetch), 0.2),
      ratioRow(`revalidated-${suffix}`, 'ms', ms(askedNs.ours), 'fetch-304-and-copy', ms(askedNs.byHand), 1.1),
      ratioRow(`revalidated-${suffix}-without-body`, 'ms', ms(askedNs.ours), 'fetch-304', ms(askedNs.unmodified)),
    ]
  } finally {
    await cold.close()
    await warm.close()
  }
}

/** Random parts of a large file. */
async function partRows(bench: Bench, origin: string, delay: number): Promise<MeasuredRow[]> {
  const url = `${origin}/${delay}/asked/${huge}/0`
  const parts = huge / part
  let state = 7
  const next = (): number => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return (state >>> 8) % parts
  }
  const operations = delay > 0 ? 10 : 50
  let places: number[] = []
  const into = new Uint8Array(part)
  const read = async (file: HttpFile): Promise<void> => {
    for (const place of places) await file.read(into, 0, part, place * part)
  }
  const byHand = async (): Promise<void> => {
    for (const place of places) {
      const range = `bytes=${place * part}-${(place + 1) * part - 1}`
      await body(await fetch(url, { headers: { range } }), part)
    }
  }
  const reader = client(64 * 2 ** 20)
  const file = await reader.files.open(url)
  const seen = new Set<number>()
  // Places that nobody has read yet; both read the same ones.
  const draw = async (): Promise<void> => {
    await settled(reader)
    places = []
    while (places.length < operations) {
      const place = next()
      if (seen.has(place)) continue
      seen.add(place)
      places.push(place)
    }
  }
  try {
    const cold = await bench.measure(
      `parts cold ${delay} ms`,
      { ours: { prepare: draw, run: () => read(file) }, ranges: { prepare: () => settled(reader), run: byHand } },
      { operations },
    )
    const again = [...seen].slice(-operations)
    const keep = (): void => {
      places = again
    }
    const warm = await bench.measure(
      `parts warm ${delay} ms`,
      { ours: { prepare: keep, run: () => read(file) }, ranges: { prepare: keep, run: byHand } },
      { operations },
    )
    const us = (ns: number): number => ns / 1e3
    return [
      ratioRow(`parts-64k-cold-${delay}ms`, 'us/read', us(cold.ours), 'ranges-by-hand', us(cold.ranges), 1.05),
      ratioRow(`parts-64k-warm-${delay}ms`, 'us/read', us(warm.ours), 'ranges-by-hand', us(warm.ranges), 0.1),
    ]
  } finally {
    file.close()
    await reader.close()
  }
}
