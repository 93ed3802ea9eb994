/**
 * What it costs to be watched: pages through a device whose pages and requests are timed, as `tmem serve` has it,
 * against the same device that counts no time; and one scrape of a server with sixteen devices.
 *
 * The device is called directly: a client's socket would cost ten times as much as is looked for here.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { BlockDevice, Layer } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { nbdServer } from '@tmem/nbd'
import { type Ramzswap, ramzswap } from '@tmem/ramzswap'
import { zcache } from '@tmem/zcache'
import { Metrics, type Statistics } from '../metrics/metrics.ts'
import { Latencies } from '../serve/latency.ts'
import { type Bench, type Row, ratioRow, type Suite, valueRow } from './frame.ts'

const sizeBytes = 64 * 2 ** 20
const pages = sizeBytes / 4096
const devices = 16

/** `tmem bench metrics`. */
export const metrics: Suite = {
  name: 'metrics',
  summary: 'what it costs to count how long pages and requests take, and one scrape by Prometheus',
  run: async (bench) => {
    const folder = mkdtempSync(join(tmpdir(), 'tmem-bench-'))
    try {
      return [...(await countingRows(bench, folder)), await scrapeRow(bench, folder)]
    } finally {
      rmSync(folder, { recursive: true })
    }
  },
}

/** Where the pages of a device rest: all of them in memory, or with `limitBytes` most of them in a file. */
const stackOf = (file: string, limitBytes: number = 2 * sizeBytes): Layer[] => [
  zcache({ limitBytes }),
  frontswap({ file, sizeBytes }),
]

/** As a server opens it: what clients see, and what has to be closed. */
function counted(
  name: string,
  stack: readonly Layer[],
  bytes: number,
): { inner: Ramzswap; device: BlockDevice; latencies: Latencies } {
  const latencies = new Latencies()
  const options = { name, sizeBytes: bytes, stopwatch: () => performance.now() }
  const inner = ramzswap({ ...options, stack: latencies.withMoves(stack) })
  return { inner, device: latencies.timed(inner, 'nbd'), latencies }
}

async function countingRows(bench: Bench, folder: string): Promise<Row[]> {
  const bare = ramzswap({ name: 'bare', sizeBytes, stack: stackOf(join(folder, 'bare')) })
  const { inner, device } = counted('counted', stackOf(join(folder, 'counted')), sizeBytes)
  const page = new Uint8Array(4096)
  // Half of it shrinks well, half does not.
  for (let at = 0; at < 4096; at++) page[at] = at < 2048 ? (at * 2654435761) >>> 13 : 7
  const into = new Uint8Array(4096)
  const write = (to: BlockDevice, count: number): void => {
    for (let n = 0; n < count; n++) {
      page[0] = n
      void to.write((n % pages) * 4096, page)
    }
  }
  const read = (from: BlockDevice, count: number): void => {
    for (let n = 0; n < count; n++) void from.read((n % pages) * 4096, into)
  }
  const operations = bench.quick ? 8192 : 32_768
  // What is looked for is a hundredth: many short rounds, so that both see the same machine.
  const rounds = bench.quick ? 3 : 61
  try {
    const puts = await bench.measure(
      'metrics: writes',
      { counted: { run: (count) => write(device, count) }, bare: { run: (count) => write(bare, count) } },
      { operations, rounds },
    )
    const gets = await bench.measure(
      'metrics: reads',
      { counted: { run: (count) => read(device, count) }, bare: { run: (count) => read(bare, count) } },
      { operations, rounds },
    )
    return [
      ratioRow('count-write-4k', 'ns/page', puts.counted, 'uncounted', puts.bare, 1.01),
      ratioRow('count-read-4k', 'ns/page', gets.counted, 'uncounted', gets.bare, 1.01),
    ]
  } finally {
    await Promise.all([bare.close(), inner.close()])
  }
}

/** One scrape of devices that all have been used in each way, so that none of their lines is missing. */
async function scrapeRow(bench: Bench, folder: string): Promise<Row> {
  const all = Array.from({ length: devices }, (_, n) =>
    counted(`device${n}`, stackOf(join(folder, `${n}`), 2 ** 20), 2 ** 22),
  )
  const server = nbdServer({ exports: all.map(({ device }) => ({ name: device.name, device })) })
  const page = Buffer.alloc(4096, 'a page of text, ')
  try {
    for (const { inner, device, latencies } of all) {
      const asFile = latencies.timed(inner, 'fuse')
      for (let n = 0; n < 100; n++) {
        page.writeUInt32LE(n)
        await device.write(n * 4096, page)
        await asFile.write((100 + n) * 4096, page)
      }
      await inner.writeback({ pageIndex: 0, lastPageIndex: 99 })
      for (let n = 0; n < 50; n++)
        await Promise.all([device.read(n * 4096, page), asFile.read((50 + n) * 4096, Buffer.alloc(4096))])
      await device.flush()
      await device.discard(0, 4096)
    }
    const read = (): Statistics => ({
      pageCaches: [],
      caches: [],
      devices: all.map(({ inner, latencies }) => latencies.complete(inner.stats())),
      servers: [server.stats()],
    })
    const shown = new Metrics(read, '0')
    const { scrape } = await bench.measure(
      'metrics: scrapes',
      {
        scrape: {
          run: async (count) => {
            for (let n = 0; n < count; n++) await shown.text()
          },
        },
      },
      { operations: bench.quick ? 5 : 20 },
    )
    return valueRow('scrape-16-devices', 'ms', scrape / 1e6, 5)
  } finally {
    await server.close()
    await Promise.all(all.map(({ inner }) => inner.close()))
  }
}
