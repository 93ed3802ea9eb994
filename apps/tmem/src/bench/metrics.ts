/**
 * What it costs to be watched: pages through a device whose pages and requests are timed, as `tmem serve` has it,
 * against the same device that counts no time; through one that remembers the moves of its pages against one that does
 * not; and one scrape of a server with sixteen devices.
 *
 * The device is called directly, and slow pages rest in memory: a client's socket or a disk would cost ten times as
 * much as is looked for here. Both devices are made anew before each round: where memory happens to lie is worth a
 * hundredth, too, and up to a tenth.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { BlockDevice, Completion, Layer } from '@tmem/core'
import { slowMemory } from '@tmem/faults'
import { frontswap } from '@tmem/frontswap'
import { nbdServer } from '@tmem/nbd'
import { type Ramzswap, ramzswap } from '@tmem/ramzswap'
import { zcache } from '@tmem/zcache'
import { Metrics, type Statistics } from '../metrics/metrics.ts'
import { Latencies } from '../serve/latency.ts'
import { rememberedMoves } from '../serve/serve.ts'
import { type Bench, type Row, ratioRow, type Subject, type Suite, valueRow } from './frame.ts'

const sizeBytes = 16 * 2 ** 20
const pages = sizeBytes / 4096
const devices = 16

/** `tmem bench metrics`. */
export const metrics: Suite = {
  name: 'metrics',
  summary: 'what it costs to time pages and requests, to remember moves, and to be scraped by Prometheus',
  run: async (bench) => {
    const folder = mkdtempSync(join(tmpdir(), 'tmem-bench-'))
    try {
      return [...(await countingRows(bench)), ...(await historyRows(bench)), await scrapeRow(bench, folder)]
    } finally {
      rmSync(folder, { recursive: true })
    }
  },
}

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

/** What is looked for is a hundredth: many short rounds, so that both see the same machine. */
const roundsOf = (bench: Bench): { readonly operations: number; readonly rounds: number } =>
  bench.quick ? { operations: 8192, rounds: 3 } : { operations: 16_384, rounds: 101 }

/** A device under test, and what of it is to be closed. */
interface Made {
  readonly device: BlockDevice
  readonly inner: Ramzswap
}

/** Does operations on each page in turn, in a device that is full, and new in each round. */
class Rounds implements Subject {
  readonly #make: () => Made
  readonly #act: (device: BlockDevice, page: number) => Completion
  #made: Made | undefined

  constructor(make: () => Made, act: (device: BlockDevice, page: number) => Completion) {
    this.#make = make
    this.#act = act
  }

  async prepare(): Promise<void> {
    await this.close()
    this.#made = this.#make()
    for (let page = 0; page < pages; page++) await writeTo(this.#made.device, page)
  }

  async run(count: number): Promise<void> {
    const { device } = this.#made!
    const act = this.#act
    for (let n = 0; n < count; n++) {
      // A prime: the next page is not the one beside.
      const completion = act(device, (n * 17) % pages)
      if (completion !== undefined) await completion
    }
  }

  async close(): Promise<void> {
    await this.#made?.inner.close()
    this.#made = undefined
  }
}

/** Half of it shrinks well, half does not. */
const content = Uint8Array.from({ length: 4096 }, (_, at) => (at < 2048 ? (at * 2654435761) >>> 13 : 7))
const into = new Uint8Array(4096)
const writeTo = (device: BlockDevice, page: number): Completion => device.write(page * 4096, content)
const readFrom = (device: BlockDevice, page: number): Completion => device.read(page * 4096, into)

/** Nanoseconds of an operation on one of the two, and on the other. */
async function compared(
  bench: Bench,
  label: string,
  [ours, theirs]: readonly [ours: () => Made, theirs: () => Made],
  act: typeof writeTo,
): Promise<{ readonly ours: number; readonly theirs: number }> {
  const subjects = { ours: new Rounds(ours, act), theirs: new Rounds(theirs, act) }
  try {
    return await bench.measure(label, subjects, roundsOf(bench))
  } finally {
    await subjects.ours.close()
    await subjects.theirs.close()
  }
}

/** Zcache of so many bytes, over memory that waits. */
const stackOf = (limitBytes: number): Layer[] => [zcache({ limitBytes }), slowMemory({ sizeBytes: 2 * sizeBytes })]

/** All pages are in memory: that is where counting would be noticed. */
async function countingRows(bench: Bench): Promise<Row[]> {
  const both = [
    () => counted('counted', stackOf(2 * sizeBytes), sizeBytes),
    () => made(ramzswap({ name: 'bare', sizeBytes, stack: stackOf(2 * sizeBytes) })),
  ] as const
  const puts = await compared(bench, 'metrics: writes', both, writeTo)
  const gets = await compared(bench, 'metrics: reads', both, readFrom)
  return [
    ratioRow('count-write-4k', 'ns/page', puts.ours, 'uncounted', puts.theirs, 1.01),
    ratioRow('count-read-4k', 'ns/page', gets.ours, 'uncounted', gets.theirs, 1.01),
  ]
}

const made = (device: Ramzswap): Made => ({ device, inner: device })

/** Each page that is written sends another one down, and nearly each that is read rises. */
async function historyRows(bench: Bench): Promise<Row[]> {
  const options = { name: 'device', sizeBytes, clock: () => performance.now() }
  const stack = (): Layer[] => stackOf(sizeBytes / 16)
  const both = [
    () => made(ramzswap({ ...options, stack: stack(), history: rememberedMoves })),
    () => made(ramzswap({ ...options, stack: stack() })),
  ] as const
  const downs = await compared(bench, 'metrics: pages that sink', both, writeTo)
  const ups = await compared(bench, 'metrics: pages that rise', both, readFrom)
  return [
    ratioRow('history-write-4k-sinking', 'ns/page', downs.ours, 'unnoted', downs.theirs, 1.01),
    ratioRow('history-read-4k-rising', 'ns/page', ups.ours, 'unnoted', ups.theirs, 1.01),
  ]
}

/** One scrape of devices that all have been used in each way, so that none of their lines is missing. */
async function scrapeRow(bench: Bench, folder: string): Promise<Row> {
  const all = Array.from({ length: devices }, (_, n) =>
    counted(
      `device${n}`,
      [zcache({ limitBytes: 2 ** 20 }), frontswap({ file: join(folder, `${n}`), sizeBytes: 2 ** 22 })],
      2 ** 22,
    ),
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
