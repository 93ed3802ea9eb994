/**
 * Metrics for Prometheus: every counter has a name and a help, what is served is what `tmem stat` says, and the
 * dashboard and the alert rules ask for nothing that is not served.
 */
import { execFileSync } from 'node:child_process'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { compose, type Layer, type StatsNode, systemAllocator } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { nbdServer } from '@tmem/nbd'
import { openSnapshot, ramzswap } from '@tmem/ramzswap'
import { seal } from '@tmem/seal'
import { spill } from '@tmem/spill'
import { zcache } from '@tmem/zcache'
import { expect, onTestFinished, test } from 'vitest'
import { parse } from 'yaml'
import { RealServer, serverCommand } from '../../../packages/ramster/test/server.ts'
import { Xvmalloc } from '../../../packages/zcache/src/xvmalloc.ts'
import { Zbud } from '../../../packages/zcache/src/zbud.ts'
import { requires } from '../../../tools/requires.ts'
import { Metrics } from '../src/metrics/metrics.ts'
import { valueCacheTables } from '../src/metrics/names.ts'
import { CachedFileDevice } from '../src/serve/cached-file.ts'
import { Latencies } from '../src/serve/latency.ts'
import { ServedCache } from '../src/serve/served-cache.ts'
import { type Serving, serving, servingIn } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const sizeBytes = 4 * 2 ** 20
const device = ['--device', 'name=a,size=4MiB']
const metrics = ['--metrics', 'tcp:127.0.0.1:0']

/** Metrics by name: what is said of each, and its lines. */
interface Family {
  readonly help: string
  readonly type: string
  readonly lines: Map<string, number>
}

function familiesIn(text: string): Map<string, Family> {
  const families = new Map<string, Family>()
  let help = ''
  for (const line of text.split('\n').filter((one) => one !== '')) {
    const [, what, name, rest] = /^# (HELP|TYPE) (\S+) (.*)$/.exec(line) ?? []
    if (what === 'HELP') help = rest!
    else if (what === 'TYPE') families.set(name!, { help, type: rest!, lines: new Map() })
    else {
      const [, full, value] = /^(\S+?(?:\{.*\})?) (\S+)$/.exec(line) ?? []
      const base = full!.replace(/\{.*$/s, '')
      const family = families.get(base) ?? families.get(base.replace(/_(?:bucket|sum|count)$/, ''))!
      if (family.lines.has(full!)) throw new Error(`${full} is there twice`)
      family.lines.set(full!, Number(value))
    }
  }
  return families
}

const fetched = async (url: string): Promise<Map<string, Family>> => familiesIn(await (await fetch(url)).text())

/** Statistics of a stack without a device, as part of one. */
function statisticsOf(stack: readonly Layer[]): StatsNode {
  const store = compose(stack)
  onTestFinished(() => store.close())
  return { name: `over ${store.name}`, counters: {}, children: [store.stats()] }
}

/** A device that has been used in each way. */
async function used(stack: readonly Layer[], name: string): Promise<StatsNode> {
  const folder = temporaryDirectory()
  const latencies = new Latencies()
  const inner = ramzswap({
    name,
    sizeBytes,
    stack: latencies.withMoves(stack),
    stopwatch: () => performance.now(),
  })
  const device = await openSnapshot(inner, { path: join(folder, 'image') })
  onTestFinished(() => device.close())
  const [nbd, fuse] = [latencies.timed(device, 'nbd'), latencies.timed(device, 'fuse')]
  const page = Buffer.alloc(4096, 'a page ')
  for (let n = 0; n < 122; n++) {
    page.writeUInt32LE(n)
    await nbd.write(n * 4096, page)
  }
  await inner.writeback({ pageIndex: 0, lastPageIndex: 99 })
  for (let n = 0; n < 100; n++) await fuse.read(n * 4096, page)
  return latencies.complete(device.stats())
}

test('every counter of every layer and server has a name and a help of its own', async () => {
  const folder = temporaryDirectory()
  const file = (name: string): string => join(folder, name)
  const limitBytes = 2 ** 23
  const devices = [
    await used(
      [
        zcache({ limitBytes, recompress: 'deflate' }),
        memory({ limitBytes }),
        frontswap({ file: file('a'), sizeBytes: 2 * sizeBytes }),
      ],
      'a',
    ),
    await used(
      [
        zcache({ limitBytes, allocator: (arena) => new Xvmalloc(arena) }),
        seal(),
        frontswap({ file: file('b'), sizeBytes: 2 * sizeBytes }),
      ],
      'b',
    ),
    statisticsOf([
      zcache({ limitBytes, allocator: (arena) => new Zbud(arena, 2), zvMaxZsize: 2048, zvMaxMeanZsize: 2048 }),
      spill({ file: file('c'), sizeBytes }),
    ]),
  ]
  const server = nbdServer({ exports: [] })
  writeFileSync(file('d'), Buffer.alloc(sizeBytes, 'a file '))
  const cache = await CachedFileDevice.open(
    { name: 'e', file: file('d'), memoryBytes: 2 ** 16 },
    { stack: [zcache({ limitBytes })], clock: () => 0, wake: () => undefined, allocator: systemAllocator },
  )
  onTestFinished(() => cache.close())
  await cache.read(0, Buffer.alloc(2 ** 20))
  const pageCaches = [cache.stats()]
  const values = await ServedCache.open(
    { name: 'f', memoryBytes: 2 ** 22, file: { path: file('f'), sizeBytes }, listen: '' },
    { onError: () => undefined, onRefused: () => undefined },
  )
  onTestFinished(() => values.close())
  const caches = [values.stats()]
  const text = await new Metrics(() => ({ devices, pageCaches, caches, servers: [server.stats()] }), '1.2.3').text()
  const families = familiesIn(text)
  expect(text).not.toContain('tmem_layer_value')
  expect(families.size).toBeGreaterThan(100)
  const kindOf = (name: string): string =>
    name.endsWith('_total') ? 'counter' : name.endsWith('_duration_seconds') ? 'histogram' : 'gauge'
  const wrong = [...families].filter(
    ([name, { help, type }]) => !/^.{10,}\.$|^1, with/.test(help) || type !== kindOf(name),
  )
  expect(wrong).toEqual([])
  expect(families.get('tmem_build_info')!.lines).toEqual(new Map([['tmem_build_info{version="1.2.3"}', 1]]))
  const { lines } = families.get('tmem_page_duration_seconds')!
  for (const kind of ['operation="put",place="zcache"', 'operation="fetch",place="frontswap"'])
    expect(lines.get(`tmem_page_duration_seconds_bucket{${kind},le="+Inf"}`)).toBeGreaterThan(0)
  expect(lines.get('tmem_page_duration_seconds_count{operation="fetch",place="frontswap"}')).toBe(200)
  expect(
    families.get('tmem_move_duration_seconds')!.lines.get('tmem_move_duration_seconds_count{place="frontswap"}'),
  ).toBeGreaterThan(0)
  const requests = families.get('tmem_request_duration_seconds')!.lines
  expect(requests.get('tmem_request_duration_seconds_count{device="a",server="nbd",operation="write"}')).toBe(122)
  expect(requests.get('tmem_request_duration_seconds_count{device="a",server="fuse",operation="read"}')).toBe(100)
})

test('a counter that nobody has described is shown all the same', async () => {
  const strange: StatsNode = {
    name: 'd',
    counters: {},
    children: [
      {
        name: 'chain',
        counters: {},
        children: [
          { name: 'refused', counters: {}, children: [] },
          { name: 'mine', counters: { pages: 1, oddities: 7 }, children: [] },
        ],
      },
    ],
  }
  const text = await new Metrics(() => ({ devices: [strange], pageCaches: [], caches: [], servers: [] }), '0').text()
  expect(text).toContain('tmem_layer_value{device="d",place="mine",section="mine",counter="oddities"} 7\n')
})

test('lending machines are named', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: [serverCommand] })
  const [a, b] = [await RealServer.start(), await RealServer.start()]
  onTestFinished(async () => {
    await Promise.all([a.stop(), b.stop()])
  })
  const server = await serving(
    `zcache(limit=1MiB) > ramster(valkey=127.0.0.1:${a.port},valkey2=127.0.0.1:${b.port},size=8MiB) > frontswap(file=FOLDER/x,size=8MiB)`,
    ...device,
    ...metrics,
  )
  const families = await fetched(urlOf(server))
  expect(families.has('tmem_layer_value')).toBe(false)
  expect(
    families
      .get('tmem_machine_open')!
      .lines.get(`tmem_machine_open{device="a",place="ramster",machine="127.0.0.1:${a.port}"}`),
  ).toBe(1)
  // The rest of what alert rules may ask for.
  judgeNames(new Set([...families.keys(), ...snapshotNames, ...fuseNames, ...cacheNames]))
  expect((await server.stop()).code).toBe(0)
})

const urlOf = ({ info }: Serving): string => (info as unknown as { metrics: string }).metrics
const snapshotNames = ['tmem_snapshot_dirty_pages', 'tmem_snapshot_failures_total']
const cacheNames = Object.values(valueCacheTables)
  .flatMap((table) => Object.values(table))
  .flatMap((described) => (described === 'same' ? [] : `tmem_${described.name}`))
const fuseNames = ['tmem_fuse_requests_total', 'tmem_fuse_read_bytes_total', 'tmem_fuse_written_bytes_total']
const timesNames = ['page', 'move', 'request'].flatMap((what) =>
  ['bucket', 'sum', 'count'].map((part) => `tmem_${what}_duration_seconds_${part}`),
)

/** What the dashboard and the alert rules ask for. */
function askedNames(): string[] {
  const folder = new URL('../monitoring/', import.meta.url)
  const texts: string[] = []
  const collect = (value: unknown): void => {
    if (typeof value !== 'object' || value === null) return
    for (const [name, inner] of Object.entries(value)) {
      if ((name === 'expr' || name === 'query') && typeof inner === 'string') texts.push(inner)
      collect(inner)
    }
  }
  expect(readdirSync(folder).toSorted()).toEqual(['alerts.yaml', 'dashboard.json'])
  collect(JSON.parse(readFileSync(new URL('dashboard.json', folder), 'utf8')))
  collect(parse(readFileSync(new URL('alerts.yaml', folder), 'utf8')))
  return texts.flatMap((text) => text.match(/\b(?:tmem|process)_\w+/g) ?? [])
}

function judgeNames(served: ReadonlySet<string>): void {
  const asked = askedNames()
  expect(asked.length).toBeGreaterThan(30)
  expect(asked.filter((name) => !served.has(name) && !timesNames.includes(name))).toEqual([])
}

/** Writes through NBD, reads some of it back, and discards a part. */
function use({ folder }: Serving): void {
  const program = `
import nbd, random
h = nbd.NBD()
h.connect_uri('nbd+unix:///a?socket=${folder}/nbd.sock')
for n in range(600): h.pwrite(random.Random(n).randbytes(3000) + b'x' * 1096, n * 4096)
for n in range(600): h.pread(4096, n * 4096)
h.trim(100 * 4096, 0)
`
  execFileSync('/usr/bin/python3', ['-c', program])
}

test('what is served is what tmem stat says, and adds up', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['nbdsh'], paths: ['/usr/bin/python3'] })
  const server = await serving('zcache(limit=1MiB) > frontswap(file=FOLDER/x,size=8MiB)', ...device, ...metrics)
  use(server)
  // Background work goes on for a moment.
  let stat = ''
  let families = new Map<string, Family>()
  for (let again = true; again; ) {
    const look = async (): Promise<string> => (await tmem(['stat', '--json', '--control', server.control])).stdout
    stat = await look()
    families = await fetched(urlOf(server))
    again = stat !== (await look())
  }
  const [node] = (JSON.parse(stat) as { devices: StatsNode[] }).devices
  const section = (name: string): StatsNode => node!.children.find((one) => one.name === name)!
  const pages = families.get('tmem_device_pages')!.lines
  expect([...pages.values()].reduce((sum, value) => sum + value, 0)).toBe(sizeBytes / 4096)
  expect(pages.get('tmem_device_pages{device="a",state="backing"}')).toBe(section('slots').counters['backing'])
  for (const { name, counters } of section('places').children) {
    expect(counters['pages']).toBeGreaterThan(0)
    const value = (metric: string, more = ''): number | undefined =>
      families.get(metric)!.lines.get(`${metric}{device="a",place="${name}"${more}}`)
    expect(value('tmem_place_pages')).toBe(counters['pages'])
    expect(value('tmem_place_bytes')).toBe(counters['bytes'])
    const flow = (metric: string): number =>
      [...families.get(metric)!.lines].reduce(
        (sum, [line, count]) => sum + (line.includes(`place="${name}"`) ? count : 0),
        0,
      )
    expect(flow('tmem_place_in_blocks_total') - flow('tmem_place_out_blocks_total')).toBe(counters['pages'])
  }
  const requests = families.get('tmem_nbd_requests_total')!.lines
  expect(requests.get('tmem_nbd_requests_total{device="a",operation="write"}')).toBe(600)
  expect(
    families
      .get('tmem_chain_refused_puts_total')!
      .lines.get('tmem_chain_refused_puts_total{device="a",reason="NoMemory"}'),
  ).toBe(0)
  expect((await server.stop()).code).toBe(0)
})

test('what is no page of it is told so, and nothing can be turned there', async () => {
  const server = await serving('memory(limit=8MiB)', ...device, ...metrics)
  const url = urlOf(server)
  expect(url).toMatch(/^http:\/\/127\.0\.0\.1:\d+\/metrics$/)
  const status = async (path: string, method = 'GET'): Promise<number> =>
    (await fetch(new URL(path, url), { method })).status
  expect([await status('/metrics?x=1'), await status('/metrics', 'HEAD'), await status('/')]).toEqual([200, 200, 404])
  expect([await status('/metrics', 'POST'), await status('/metrics/knobs')]).toEqual([405, 404])
  const { headers } = await fetch(url)
  expect(headers.get('content-type')).toBe('text/plain; version=0.0.4; charset=utf-8')
  expect((await server.stop()).code).toBe(0)
  await expect(fetch(url)).rejects.toThrow('fetch failed')
})

test('a port that is taken is told in one line, and nothing is left', async () => {
  const taken = createServer().listen(0, '127.0.0.1')
  await new Promise((resolve) => taken.once('listening', resolve))
  const { port } = taken.address() as AddressInfo
  const folder = temporaryDirectory()
  await expect(
    servingIn(folder, 'memory(limit=8MiB)', ...device, '--metrics', `tcp:127.0.0.1:${port}`),
  ).rejects.toThrow(
    new RegExp(
      `^exit code 1: tmem: metrics cannot be served on tcp:127.0.0.1:${port}: .*EADDRINUSE.*: another process listens there, name another port$`,
    ),
  )
  expect(readdirSync(folder)).toEqual([])
  taken.close()
})

test.each(['9464', 'tcp:127.0.0.1', 'tcp:127.0.0.1:70000', 'unix:/tmp/x', ''])(
  '--metrics %j is no address',
  async (address) => {
    const folder = temporaryDirectory()
    const words = ['serve', '--stack', 'memory(limit=8MiB)', ...device, '--nbd', `unix:${folder}/s`]
    const { code, stderr } = await tmem([...words, '--control', `${folder}/c`, '--metrics', address])
    expect([code, stderr]).toEqual([
      2,
      `tmem: bad --metrics "${address}": expected tcp:HOST:PORT, e.g. tcp:127.0.0.1:9464\n`,
    ])
    expect(readdirSync(folder)).toEqual([])
  },
)
