/**
 * `tmem bench ramster`: pages that go to Redis servers and return, against the client library with the same bytes;
 * their cost for a program and a block device (ramster-uses.ts); sealing, against `node:crypto` alone; and blocks in
 * the memory of a video device (vram.ts).
 *
 * The bench starts Redis or Valkey servers on loopback ports. The library is measured with the very blocks that the
 * stack sends, which are captured on their way, in pipelines of as many blocks as a flight carries.
 */
import { createCipheriv, createDecipheriv, randomBytes } from 'node:crypto'
import { setImmediate, setTimeout } from 'node:timers/promises'
import { mixedCorpus } from '@tmem/codecs/bench'
import {
  compose,
  createAccounts,
  Flight,
  frameBytes,
  GetOutcome,
  idle,
  none,
  PageBatch,
  type PageStore,
  type Pool,
  PutOutcome,
  type SlowPlace,
  type StatsNode,
  systemAllocator,
  unitsOf,
} from '@tmem/core'
import {
  type Borrower,
  processMemory,
  type RemoteMemory,
  type RemotePlan,
  ramster as remote,
  valkey,
} from '@tmem/ramster'
import { seal } from '@tmem/seal'
import { zcache } from '@tmem/zcache'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { LendingServer, lackingServer } from '../lending-server.ts'
import { type Bench, median, type Row, ratioRow, type Suite, skippedRow } from './frame.ts'
import { hotSetRow, nbdRow, useNames } from './ramster-uses.ts'
import { vramRows } from './vram.ts'

/** The suite. */
export const ramster: Suite = {
  name: 'ramster',
  summary: 'pages in the memory of Redis servers against the client library with the same bytes, and sealing',
  run: async (bench) => [...(await serverRows(bench)), ...(await sealRows(bench)), ...(await vramRows(bench))],
}

const MiB = 2 ** 20
const pageBytes = 4096
const batchPages = 256
/** Blocks in a pipeline of the reference: as many as a flight of 128 KiB carries of such pages, about. */
const perPipeline = 64

/** All rows that need servers. */
async function serverRows(bench: Bench): Promise<Row[]> {
  const names = [
    'remotify-one-copy',
    'remotify-two-copies',
    'fetch-one',
    'fetch-batch-256',
    'put-while-remotifying-median',
    'put-while-remotifying-p99',
    ...useNames,
  ]
  const servers: LendingServer[] = []
  try {
    for (let n = 0; n < 2; n++) {
      const server = await LendingServer.start()
      if (server === undefined) return names.map((name) => skippedRow(name, lackingServer))
      servers.push(server)
    }
    const count = bench.quick ? 512 : 4096
    // Pages that shrink: all of them have room above.
    const pages = mixedCorpus(4 * count).pages.slice(0, count)
    return [
      ...(await remotifyRows(bench, servers, pages)),
      ...(await fetchRows(bench, servers, pages)),
      ...(await putRows(bench, servers, pages)),
      await hotSetRow(bench, servers),
      await nbdRow(bench, servers),
    ]
  } finally {
    for (const server of servers) await server.stop()
  }
}

/** A zcache with room for all, over the servers. */
async function open(
  servers: readonly LendingServer[],
  persistent: boolean,
  limitBytes: number,
): Promise<{ store: PageStore; pool: Pool }> {
  const machines = servers.map(({ port }) => valkey({ host: '127.0.0.1', port }))
  const store = compose([zcache({ limitBytes }), remote({ machines, sizeBytes: 256 * MiB })])
  await store.ready!()
  return { store, pool: poolOf(store, persistent) }
}

function poolOf(store: PageStore, persistent: boolean): Pool {
  const pool = store.newPool({ client: 0, persistent, shared: !persistent, pageSize: pageBytes })
  if (typeof pool === 'number') throw new Failed(`bench ramster: the stack refused the pool (${pool})`)
  return pool
}

function putAll(pool: Pool, pages: readonly Uint8Array[]): void {
  for (const [index, page] of pages.entries())
    if (pool.put(0, index, page) !== PutOutcome.Stored) throw new Failed(`bench ramster: page ${index} was refused`)
}

/** Sends pages, until all that are no mere word have gone. */
async function sinkAll(pool: Pool, indexes: Uint32Array): Promise<void> {
  const { failure } = await pool.sink!(0, indexes, indexes.length, true)
  if (failure !== undefined) throw new Failed(`bench ramster: ${failure.message}`)
}

/** Waits until what was given up is gone on the servers, too. */
async function drained(store: PageStore): Promise<void> {
  await setTimeout(20)
  while (counterOf(store.stats(), 'pending_flushes') > 0) await setTimeout(5)
}

function counterOf(node: StatsNode, name: string): number {
  return node.counters[name] ?? Math.max(0, ...node.children.map((child) => counterOf(child, name)))
}

/** The blocks that a stack sends for pages, by index; without those that repeat a word. */
async function blocksOf(pages: readonly Uint8Array[]): Promise<Buffer[]> {
  const blocks: Buffer[] = []
  const plan = processMemory({ limitBytes: 1024 * MiB })
  const tapped: RemotePlan = {
    name: 'tap',
    borrow(borrower: Borrower): RemoteMemory {
      const memory = plan.borrow(borrower)
      const put = memory.put.bind(memory)
      return Object.assign(memory, {
        put: (keys: readonly number[], sent: readonly Uint8Array[]) => {
          blocks.push(...sent.map((block) => Buffer.from(block)))
          return put(keys, sent)
        },
      })
    },
  }
  const store = compose([zcache({ limitBytes: 64 * MiB }), remote({ machines: [tapped], sizeBytes: 256 * MiB })])
  try {
    const pool = poolOf(store, false)
    putAll(pool, pages)
    await sinkAll(pool, allOf(pages))
    return blocks
  } finally {
    await store.close()
  }
}

const allOf = (pages: readonly Uint8Array[]): Uint32Array => Uint32Array.from(pages, (_, index) => index)

async function remotifyRows(
  bench: Bench,
  servers: readonly LendingServer[],
  all: readonly Uint8Array[],
): Promise<Row[]> {
  const blocks = await blocksOf(all)
  const pages = all
  const indexes = allOf(pages)
  const client = servers[0]!.client()
  const one = await open(servers.slice(0, 1), false, 64 * MiB)
  const two = await open(servers, true, 64 * MiB)
  const remotify = ({ store, pool }: typeof one) => ({
    prepare: async () => {
      pool.flushObject(0)
      await drained(store)
      putAll(pool, pages)
    },
    run: () => sinkAll(pool, indexes),
  })
  try {
    const ns = await bench.measure(
      'ramster: pages to servers',
      {
        one: remotify(one),
        two: remotify(two),
        set: {
          prepare: async () => {
            for (let n = 0; n < blocks.length; n += 1024)
              await client.unlink(blocks.slice(n, n + 1024).map((_, m) => `bench:${n + m}`))
          },
          run: async () => {
            for (let n = 0; n < blocks.length; n += perPipeline) {
              const pipeline = client.pipeline()
              for (const [m, block] of blocks.slice(n, n + perPipeline).entries())
                pipeline.set(`bench:${n + m}`, block, 'PX', 3_600_000)
              await pipeline.exec()
            }
          },
        },
      },
      { operations: blocks.length },
    )
    return [
      ratioRow('remotify-one-copy', 'ns/page', ns.one, 'iovalkey-pipelined-set', ns.set, 1.2),
      ratioRow('remotify-two-copies', 'ns/page', ns.two, 'twice-iovalkey-pipelined-set', 2 * ns.set, 1.1),
    ]
  } finally {
    client.disconnect()
    await one.store.close()
    await two.store.close()
  }
}

async function fetchRows(bench: Bench, servers: readonly LendingServer[], all: readonly Uint8Array[]): Promise<Row[]> {
  // No words that repeat: these never left.
  const pages = all.filter((page) => page.some((byte, n) => byte !== page[n % 4]))
  const blocks = await blocksOf(pages)
  const client = servers[0]!.client()
  const { store, pool } = await open(servers, true, 64 * MiB)
  const indexes = allOf(pages)
  const into = Buffer.alloc(pageBytes)
  const whole = pages.length - (pages.length % batchPages)
  const batches: PageBatch[] = []
  for (let first = 0; first < whole; first += batchPages) {
    const batch = new PageBatch(batchPages, pageBytes)
    for (let n = 0; n < batchPages; n++) batch.push(0, first + n)
    batches.push(batch)
  }
  const fetch = async (index: number): Promise<void> => {
    if ((await pool.fetch(0, index, into)) !== GetOutcome.Hit) throw new Failed(`bench ramster: page ${index} is gone`)
  }
  try {
    putAll(pool, pages)
    await sinkAll(pool, indexes)
    for (const [index, page] of pages.entries()) {
      await fetch(index)
      if (into.compare(page) !== 0) throw new Failed(`bench ramster: page ${index} is not what was put`)
    }
    for (const [n, block] of blocks.entries()) await client.set(`bench:${n}`, block)
    // What came up goes down again without a write: it has a clean copy there.
    const prepare = (): Promise<void> => sinkAll(pool, indexes)
    const ns = await bench.measure(
      'ramster: pages from servers, one at a time',
      {
        fetch: {
          prepare,
          run: async (operations) => {
            for (let n = 0; n < operations; n++) await fetch(n)
          },
        },
        get: {
          run: async (operations) => {
            for (let n = 0; n < operations; n++) await client.getBuffer(`bench:${n}`)
          },
        },
      },
      { operations: Math.min(512, pages.length) },
    )
    const many = await bench.measure(
      'ramster: pages from servers, 256 at a time',
      {
        fetch: {
          prepare: async () => {
            for (const batch of batches) batch.outcomes.fill(255)
            await prepare()
          },
          run: async () => {
            for (const batch of batches)
              if ((await pool.fetchMany!(batch)) !== batchPages) throw new Failed('bench ramster: pages are gone')
          },
        },
        get: {
          run: async () => {
            for (let first = 0; first < whole; first += batchPages) {
              const pipeline = client.pipeline()
              for (let n = 0; n < batchPages; n++) pipeline.getBuffer(`bench:${first + n}`)
              await pipeline.exec()
            }
          },
        },
      },
      { operations: whole },
    )
    return [
      ratioRow('fetch-one', 'ns/page', ns.fetch, 'iovalkey-getBuffer', ns.get, 1.2),
      ratioRow('fetch-batch-256', 'ns/page', many.fetch, 'iovalkey-pipelined-get', many.get, 1.2),
    ]
  } finally {
    client.disconnect()
    await store.close()
  }
}

/** What single puts take, while pages leave and without. */
async function putRows(bench: Bench, servers: readonly LendingServer[], pages: readonly Uint8Array[]): Promise<Row[]> {
  const puts = bench.quick ? 4096 : 32_768
  const progress = bench.progress('ramster: puts while pages leave')
  /** Nanoseconds of each put, in turns of 64 with the background's work between them. */
  const timed = async (store: PageStore, pool: Pool): Promise<Float64Array> => {
    const taken = new Float64Array(puts)
    for (let n = 0; n < puts; ) {
      const page = pages[n % pages.length]!
      const start = process.hrtime.bigint()
      const outcome = pool.put(0, n % (2 * pages.length), page)
      taken[n] = Number(process.hrtime.bigint() - start)
      // One that is refused goes the regular way, and is no part of this: it is tried again.
      if (outcome === PutOutcome.Stored && ++n % 64 !== 0) continue
      do await setImmediate()
      while (store.tick({ pages: 64 }).pending)
      throwIfInterrupted(bench.signal)
    }
    return taken.toSorted()
  }
  const medians: [number[], number[]] = [[], []]
  const tails: [number[], number[]] = [[], []]
  const rounds = bench.quick ? 1 : 5
  try {
    for (let round = 0; round < rounds; round++)
      for (const turn of round % 2 === 0 ? ([0, 1] as const) : ([1, 0] as const)) {
        const { store, pool } =
          turn === 0 ? await open(servers, true, Math.max(MiB, pages.length * 512)) : roomy(pages.length)
        try {
          const taken = await timed(store, pool)
          if (turn === 0 && counterOf(store.stats(), 'pers_pages_remoted') < puts / 4)
            throw new Failed('bench ramster: hardly a page has left meanwhile')
          medians[turn].push(taken[puts >> 1]!)
          tails[turn].push(taken[Math.floor(puts * 0.99)]!)
        } finally {
          await store.close()
        }
        progress.at(2 * round + 1, 2 * rounds)
      }
    progress.done()
  } finally {
    progress.end()
  }
  const reference = 'put-without-ramster'
  return [
    ratioRow('put-while-remotifying-median', 'ns/page', median(medians[0]), reference, median(medians[1]), 1.2),
    ratioRow('put-while-remotifying-p99', 'ns/page', median(tails[0]), reference, median(tails[1]), 2),
  ]
}

function roomy(pages: number): { store: PageStore; pool: Pool } {
  const store = compose([zcache({ limitBytes: 4 * pages * pageBytes })])
  return { store, pool: poolOf(store, true) }
}

/** Blocks of 4 KiB that do not shrink, sealed and opened, flight by flight. */
export async function sealRows(bench: Bench): Promise<Row[]> {
  const place = new Kept()
  const sealed = seal().wrapPlace!(place, { allocator: systemAllocator, accounts: createAccounts() }) as SlowPlace
  const units = unitsOf(pageBytes, place.unitBytes)
  const frames = Math.floor(sealed.flightBytes / (units * place.unitBytes))
  const flight = new Flight(new ArrayBuffer(place.flightBytes), place.flightBytes, place.unitBytes)
  const length = frameBytes + pageBytes
  const page = randomBytes(length)
  const board = (): void => {
    flight.clear()
    for (let n = 0; n < frames; n++) {
      const at = n * units * place.unitBytes
      flight.bytes.set(page, at)
      flight.words[(at >>> 2) + 1] = pageBytes - 1
      flight.offsets[n] = at
      flight.units[n] = units
      flight.owners[n] = n
      flight.locations[n] = none
    }
    flight.count = frames
    flight.filled = frames * units * place.unitBytes
  }
  const freeAll = (): void => {
    for (let n = 0; n < flight.count; n++)
      if (flight.locations[n] !== none) sealed.free(flight.locations[n]!, flight.units[n]!)
  }
  const key = randomBytes(32)
  const nonce = Buffer.alloc(12)
  const bytes = new Uint8Array(length)
  const into = new Uint8Array(place.flightBytes)
  const settings = { authTagLength: 16 } as const
  const cipher = createCipheriv('aes-256-gcm', key, nonce, settings)
  const secret = cipher.update(page)
  cipher.final()
  const tag = cipher.getAuthTag()
  board()
  await sealed.write(flight)
  const flights = bench.quick ? 8 : 64
  const ns = await bench.measure(
    'seal: blocks of 4 KiB',
    {
      seal: {
        run: async () => {
          for (let n = 0; n < flights; n++) {
            freeAll()
            flight.locations.fill(none)
            for (let frame = 0; frame < frames; frame++) flight.units[frame] = units
            await sealed.write(flight)
          }
        },
      },
      encrypt: {
        run: () => {
          for (let n = 0; n < flights * frames; n++) {
            nonce.writeUIntBE(n + 1, 6, 6)
            const alone = createCipheriv('aes-256-gcm', key, nonce, settings)
            bytes.set(alone.update(page))
            alone.final()
            alone.getAuthTag()
          }
        },
      },
      open: {
        run: async () => {
          for (let n = 0; n < flights * frames; n++) {
            const frame = n % frames
            await sealed.read(flight.locations[frame]!, flight.units[frame]!, into)
          }
        },
      },
      decrypt: {
        run: () => {
          nonce.fill(0)
          for (let n = 0; n < flights * frames; n++) {
            const alone = createDecipheriv('aes-256-gcm', key, nonce, settings)
            const plain = alone.update(secret)
            alone.setAuthTag(tag)
            alone.final()
            bytes.set(plain)
          }
        },
      },
    },
    { operations: flights * frames },
  )
  return [
    ratioRow('seal-4k', 'ns/block', ns.seal, 'node-crypto-aes-256-gcm', ns.encrypt, 1.15),
    ratioRow('open-4k', 'ns/block', ns.open, 'node-crypto-aes-256-gcm', ns.decrypt, 1.15),
  ]
}

/** The end of the bench of sealing: it keeps the bytes of one flight. */
class Kept implements SlowPlace {
  readonly name = 'kept'
  readonly unitBytes = 64
  readonly flightBytes: number = 128 * 1024
  readonly traits: SlowPlace['traits'] = {
    persistent: true,
    ephemeral: true,
    waits: true,
    survives: 'nothing',
    rawOnly: false,
    capacity: 4096,
    reservedBytes: 0,
    maxPageSize: 2 ** 21,
  }
  readonly #bytes = new Uint8Array(128 * 1024)

  open(): boolean {
    return true
  }

  write(flight: Flight): Promise<void> {
    this.#bytes.set(flight.bytes.subarray(0, flight.filled))
    for (let n = 0; n < flight.count; n++) flight.locations[n] = flight.offsets[n]! / this.unitBytes
    return Promise.resolve()
  }

  read(location: number, units: number, into: Uint8Array): Promise<void> {
    into.set(this.#bytes.subarray(location * this.unitBytes, (location + units) * this.unitBytes))
    return Promise.resolve()
  }

  free(): void {}

  tick(): typeof idle {
    return idle
  }

  stats(): StatsNode {
    return { name: this.name, counters: {}, children: [] }
  }

  close(): Promise<void> {
    return Promise.resolve()
  }
}
