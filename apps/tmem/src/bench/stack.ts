/**
 * `tmem bench stack --stack TEXT`: what one put, get and flush cost in any stack, also in places of others
 * (`--modules`), against the copy of a page. Pages are bytes of this Node.js itself: code and data, which compress
 * about as the memory of programs does. A page that is deferred is fetched, one by one, and its waiting counts.
 */
import { closeSync, openSync, readSync } from 'node:fs'
import { basePageSize, compose, GetOutcome, type Pool, PutOutcome, parseStack, poolRefusalName } from '@tmem/core'
import { BadInput } from '../ending.ts'
import { layersWith } from '../layers.ts'
import { type Bench, type Row, ratioRow, type Suite, valueRow } from './frame.ts'

const pages = 4096

/** The suite for one stack. Throws `BadInput` for modules that have no layers, `TmemError` for a text that is wrong. */
export async function stackSuite(text: string, modules: readonly string[] = []): Promise<Suite> {
  const layers = parseStack(text, await layersWith(modules))
  const names = layers.map(({ name }) => name).join(' > ')
  return {
    name: 'stack',
    summary: `${names}: ${pages} pages of 4 KiB out of this Node.js, one by one`,
    async run(bench) {
      const store = compose(layers, { clock: () => performance.now() })
      try {
        await store.ready?.()
        const { persistent } = store.capabilities
        const pool = store.newPool({ client: 0, persistent, shared: false, pageSize: basePageSize })
        if (typeof pool === 'number') throw new BadInput(`${names} keeps no 4 KiB pages: ${poolRefusalName(pool)}`)
        return await rowsOf(bench, pool)
      } finally {
        await store.close()
      }
    },
  }
}

async function rowsOf(bench: Bench, pool: Pool): Promise<Row[]> {
  const source = bytesOfNode()
  const page = (n: number): Uint8Array => source.subarray(n * basePageSize, (n + 1) * basePageSize)
  const views = Array.from({ length: pages }, (_, n) => page(n))
  const into = new Uint8Array(basePageSize)
  const copies = Buffer.alloc(pages * basePageSize)
  let [puts, refused, gets, missed] = [0, 0, 0, 0]
  const put = (count: number): void => {
    for (let n = 0; n < count; n++) if (pool.put(0, n, views[n]!) !== PutOutcome.Stored) refused++
    puts += count
  }
  const flush = (count: number): void => {
    for (let n = 0; n < count; n++) pool.flushPage(0, n)
  }
  const ns = await bench.measure(
    'stack: put, get, flush',
    {
      copy: {
        run(count) {
          for (let n = 0; n < count; n++) copies.set(views[n]!, n * basePageSize)
        },
      },
      putNew: { prepare: flush, run: put },
      putReplace: { prepare: put, run: put },
      get: {
        prepare: put,
        async run(count) {
          for (let n = 0; n < count; n++) {
            let got: GetOutcome = pool.get(0, n, into)
            if (got === GetOutcome.Deferred) got = await pool.fetch(0, n, into)
            if (got !== GetOutcome.Hit) missed++
          }
          gets += count
        },
      },
      flush: { prepare: put, run: flush },
    },
    { operations: pages },
  )
  const row = (name: string, value: number): Row => ratioRow(name, 'ns/page', value, 'buffer-copy', ns.copy)
  return [
    row('put-new-4k', ns.putNew),
    row('put-replace-4k', ns.putReplace),
    row('get-4k', ns.get),
    row('flush-4k', ns.flush),
    valueRow('puts-refused', '%', (100 * refused) / puts),
    valueRow('gets-missed', '%', (100 * missed) / gets),
  ]
}

/** The first bytes of the program that runs this; what it has too few of stays zero. */
function bytesOfNode(): Uint8Array {
  const bytes = new Uint8Array(pages * basePageSize)
  const file = openSync(process.execPath, 'r')
  try {
    readSync(file, bytes, 0, bytes.length, 0)
  } finally {
    closeSync(file)
  }
  return bytes
}
