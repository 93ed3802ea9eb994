/** A zcache over ramster, and hands that put pages there, send them and look at them. */

import { deepEqual, equal } from 'node:assert/strict'
import { setTimeout as sleep } from 'node:timers/promises'
import { makePage } from '@tmem/conformance'
import { compose, GetOutcome, type PageStore, type Pool, PutOutcome, type StatsNode } from '@tmem/core'
import { zcache } from '@tmem/zcache'
import { type RamsterOptions, ramster } from '../src/index.ts'

const MiB = 2 ** 20
/** Pages that are sent at once. */
const sentAtOnce = 25

export class World {
  readonly store: PageStore
  readonly pool: Pool

  constructor(
    machines: RamsterOptions['machines'],
    persistent: boolean = true,
    { limitBytes = 32 * MiB, ...more }: Partial<RamsterOptions> & { readonly limitBytes?: number } = {},
  ) {
    this.store = compose([zcache({ limitBytes }), ramster({ machines, sizeBytes: 64 * MiB, waitMs: 0, ...more })], {
      check: 'model',
    })
    const pool = this.store.newPool({ client: 1, persistent, shared: !persistent, pageSize: 4096 })
    if (typeof pool === 'number') throw new Error('no pool')
    this.pool = pool
  }

  put(index: number, seed: number = index): void {
    equal(this.pool.put(1, index, makePage('noise', seed, 4096)), PutOutcome.Stored)
  }

  /** Sends pages to the machines. Answers how many went. */
  async send(...indexes: readonly number[]): Promise<number> {
    let went = 0
    for (let n = 0; n < indexes.length; n += sentAtOnce) {
      const some = Uint32Array.from(indexes.slice(n, n + sentAtOnce))
      went += (await this.pool.sink!(1, some, some.length, true)).pages
    }
    return went
  }

  /** Puts pages, and sends them. Answers how many went. */
  async fill(count: number, first: number = 0): Promise<number> {
    for (const index of range(count, first)) this.put(index)
    return await this.send(...range(count, first))
  }

  /** Sends until everything has gone: a place that failed is left alone for some attempts. */
  async expectSent(count: number, first: number = 0): Promise<void> {
    let went = 0
    await this.expectSoon(async () => {
      went += await this.send(...range(count, first))
      return went === count
    })
  }

  async expectPage(index: number, seed: number = index): Promise<void> {
    const into = new Uint8Array(4096)
    equal(await this.pool.fetch(1, index, into), GetOutcome.Hit)
    deepEqual(into, makePage('noise', seed, 4096))
  }

  async expectPages(count: number, first: number = 0): Promise<void> {
    for (const index of range(count, first)) await this.expectPage(index)
  }

  /** Fetches pages that may have vanished: how many are there, and right. */
  async hits(count: number): Promise<number> {
    const into = new Uint8Array(4096)
    let hits = 0
    for (const index of range(count)) {
      if ((await this.pool.fetch(1, index, into)) !== GetOutcome.Hit) continue
      hits++
      deepEqual(into, makePage('noise', index, 4096))
    }
    return hits
  }

  counter(name: string): number {
    const find = (node: StatsNode): number | undefined =>
      node.name === 'ramster' && name in node.counters
        ? node.counters[name]
        : node.children.map(find).find((found) => found !== undefined)
    return find(this.store.stats()) ?? Number.NaN
  }

  /** Waits until it is so: a thousand turns, and twenty seconds, at most. */
  async expectSoon(so: () => boolean | Promise<boolean>): Promise<void> {
    for (let n = 0; n < 3000; n++) {
      if (await so()) return
      if (n < 1000) await turn()
      else await sleep(10)
    }
    throw new Error(`it never was so: ${so.toString()}: ${JSON.stringify(this.store.stats())}`)
  }
}

export const range = (count: number, first: number = 0): number[] => Array.from({ length: count }, (_, n) => first + n)

export const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
