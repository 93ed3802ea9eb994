/**
 * The cost of a page for a guest through a virtio channel, against the same call on a store of its own: with 512 pages
 * for each notification, and with one. A notification stands for an exit of a virtual machine; here it wakes a thread.
 *
 * Method: the guest is this thread, the device another one, each with a store of plain memory; pages lie scattered, so
 * that each has a descriptor of its own. Exits are counted over all that is measured with many pages. Where each page
 * is to cost an exit, both sides sleep at once: else they would see each other's work before they are told.
 */
import { Worker } from 'node:worker_threads'
import { basePageSize, compose, type ObjectId, PutOutcome } from '@tmem/core'
import { memory } from '@tmem/memory'
import { ChannelCommand, ChannelGuest, createChannel } from '@tmem/virtio-channel'
import { Failed } from '../ending.ts'
import { type Bench, type Row, ratioRow, type Suite, valueRow } from './frame.ts'
import type { DeviceData } from './virtio-worker.ts'

const perNotification = 512
const perChain = 16
const limitBytes = 64 * 2 ** 20

/** `tmem bench virtio`. */
export const virtio: Suite = {
  name: 'virtio',
  summary: 'pages through a virtio channel between two threads, against direct calls of the store',
  run,
}

/** Pages of a guest: numbers in an order in which no two neighbours lie together, under handles in 8 objects. */
class Pages {
  readonly objects: ObjectId[] = []
  readonly indexes: number[] = []
  readonly pages: number[] = []

  constructor() {
    for (let n = 0; n < perNotification; n++) {
      this.objects.push(n % 8)
      this.indexes.push(n)
      this.pages.push((n * 37) % perNotification)
    }
  }
}

/** A channel, its guest, and its device in a thread of its own. */
class Channel {
  readonly guest: ChannelGuest
  /** Rejects when the thread fails; and resolves when it has ended. */
  readonly #failed: Promise<never>
  readonly #ended: Promise<void>
  readonly #online: Promise<void>
  #pool = -1

  constructor(looks: number | undefined) {
    const sizes = { queueSize: 1024, chains: 64, pagesPerChain: perChain, pages: perNotification }
    const handle = createChannel(looks === undefined ? sizes : { ...sizes, looks })
    const data: DeviceData = { handle, limitBytes }
    const worker = new Worker(new URL('virtio-worker.js', import.meta.url), { execArgv: [], workerData: data })
    this.#failed = new Promise<never>((_, reject) => {
      worker.once('error', reject)
    })
    // Whoever waits below sees it; nobody may wait just then.
    this.#failed.catch(() => undefined)
    this.#ended = new Promise<void>((resolve) => {
      worker.once('exit', () => resolve())
    })
    this.#online = new Promise<void>((resolve) => worker.once('online', resolve))
    this.guest = new ChannelGuest(handle)
  }

  /** The pool that pages go to. */
  get pool(): number {
    return this.#pool
  }

  async open(own: readonly Uint8Array[]): Promise<void> {
    await Promise.race([this.#online, this.#failed])
    this.#pool = this.guest.newPool(true)
    for (const [n, page] of own.entries()) this.guest.page(n).set(page)
  }

  async close(): Promise<void> {
    this.guest.close()
    await this.#ended
  }
}

async function run(bench: Bench): Promise<readonly Row[]> {
  const channel = new Channel(undefined)
  const sleepy = new Channel(0)
  const store = compose([memory({ limitBytes })])
  try {
    const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: basePageSize })
    if (typeof pool === 'number') throw new Failed(`the store refused the pool (${pool})`)
    const pages = new Pages()
    const own = Array.from({ length: perNotification }, (_, n) => new Uint8Array(basePageSize).fill(n).fill(1, 0, 8))
    await channel.open(own)
    await sleepy.open(own)
    const { guest, pool: number } = channel
    let exits = 0
    let carried = 0

    const tickets = new Uint16Array(perNotification / perChain)
    const many = (command: ChannelCommand, operations: number): void => {
      const kicks = guest.kicks
      for (let done = 0; done < operations; done += perNotification) {
        for (let from = 0; from < perNotification; from += perChain) {
          tickets[from / perChain] = guest.submit(command, number, pages, from, perChain)
          // The device wakes while the other chains are written.
          if (from === 0) guest.notify()
        }
        guest.wait()
        for (const ticket of tickets) {
          for (let entry = 0; entry < perChain; entry++)
            if (guest.result(ticket, entry) !== 1) throw new Failed(`the channel refused a page of command ${command}`)
          guest.release(ticket)
        }
      }
      exits += guest.kicks - kicks
      carried += operations
    }
    const single = (command: ChannelCommand, operations: number): void => {
      for (let n = 0; n < operations; n++) {
        const at = n % perNotification
        if (sleepy.guest.call(command, sleepy.pool, pages.objects[at]!, pages.indexes[at]!, pages.pages[at]) !== 1)
          throw new Failed(`the channel refused a page of command ${command}`)
      }
    }
    const put = (operations: number): void => {
      for (let n = 0; n < operations; n++) {
        const at = n % perNotification
        const outcome = pool.put(pages.objects[at]!, pages.indexes[at]!, own[pages.pages[at]!]!)
        if (outcome !== PutOutcome.Stored) throw new Failed(`the store refused a page (${outcome})`)
      }
    }
    const get = (operations: number): void => {
      for (let n = 0; n < operations; n++) {
        const at = n % perNotification
        if (pool.get(pages.objects[at]!, pages.indexes[at]!, own[pages.pages[at]!]!) !== 0)
          throw new Failed('the store lost a page')
      }
    }
    const operations = perNotification * (bench.quick ? 8 : 64)
    const few = bench.quick ? 256 : 2048
    const { Put, Get } = ChannelCommand
    const puts = await bench.measure(
      'put',
      { channel: { run: (count) => many(Put, count) }, direct: { run: put } },
      { operations },
    )
    const gets = await bench.measure(
      'get',
      { channel: { run: (count) => many(Get, count) }, direct: { run: get } },
      { operations },
    )
    const singlePuts = await bench.measure(
      'put, one page per notification',
      { channel: { run: (count) => single(Put, count) }, direct: { run: put } },
      { operations: few },
    )
    const singleGets = await bench.measure(
      'get, one page per notification',
      { channel: { run: (count) => single(Get, count) }, direct: { run: get } },
      { operations: few },
    )
    return [
      ratioRow('put-512-per-exit', 'ns/page', puts.channel, 'direct-put', puts.direct, 2),
      ratioRow('get-512-per-exit', 'ns/page', gets.channel, 'direct-get', gets.direct, 2),
      ratioRow('put-1-per-exit', 'ns/page', singlePuts.channel, 'direct-put', singlePuts.direct),
      ratioRow('get-1-per-exit', 'ns/page', singleGets.channel, 'direct-get', singleGets.direct),
      valueRow('exits-per-512-pages', 'exits', (exits * perNotification) / carried, 1),
    ]
  } finally {
    await channel.close()
    await sleepy.close()
    await store.close()
  }
}
