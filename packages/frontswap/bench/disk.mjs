// Measures the layer on the disk of this machine. After a build, from anywhere:
//   node packages/frontswap/bench/disk.mjs [--directory DIR] [--json]
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import process from 'node:process'
import { parseArgs } from 'node:util'
import { compose, PageBatch } from '@tmem/core'
import { frontswap } from '../dist/index.js'

const { values } = parseArgs({ options: { directory: { type: 'string' }, json: { type: 'boolean' } } })
const pages = 16_384
const perRound = 1024
const rounds = 9
const folder = mkdtempSync(join(values.directory ?? tmpdir(), 'frontswap-bench-'))
const rows = []
let directIo
try {
  const store = compose([frontswap({ file: join(folder, 'swap.img'), sizeBytes: pages * 4096 })])
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
  const page = new Uint8Array(4096).map((_, n) => n * 31)
  const batches = new Map(
    [8, 32, 128].map((size) => [
      size,
      new PageBatch(
        size,
        4096,
        new Uint8Array(size * 4096).map((_, n) => (n >>> 3) * 31),
      ),
    ]),
  )
  const buffers = Array.from({ length: 16 }, () => new Uint8Array(4096))
  let next = 0
  // Scattered over the file, the same in every run.
  const index = () => (next++ * 7919) % pages
  for (let n = 0; n < pages; n++) pool.put(0, n, page)
  const find = (node) => (node.name === 'frontswap' ? node : node.children.map(find).find(Boolean))
  directIo = find(store.stats()).counters.directIo === 1

  const putMany = (size) => () => {
    const batch = batches.get(size)
    for (let done = 0; done < perRound; done += size) {
      batch.clear()
      for (let n = 0; n < size; n++) batch.push(0, (next + n) % pages)
      next += size
      pool.putMany(batch)
    }
  }
  const fetch = (depth) => async () => {
    let left = perRound
    const reader = async (into) => {
      while (left-- > 0) await pool.fetch(0, index(), into)
    }
    await Promise.all(buffers.slice(0, depth).map(reader))
  }
  const kinds = [
    [
      'put, one page',
      () => {
        for (let n = 0; n < perRound; n++) pool.put(0, index(), page)
      },
    ],
    ['putMany, 8 pages', putMany(8)],
    ['putMany, 32 pages', putMany(32)],
    ['putMany, 128 pages', putMany(128)],
    ['fetch, one at a time', fetch(1)],
    ['fetch, 4 at a time', fetch(4)],
    ['fetch, 16 at a time', fetch(16)],
  ]
  const samples = new Map(kinds.map(([name]) => [name, []]))
  for (let round = 0; round < rounds; round++)
    for (const [name, run] of kinds) {
      const from = process.hrtime.bigint()
      await run()
      samples.get(name).push(Number(process.hrtime.bigint() - from) / perRound / 1000)
    }
  for (const [name, times] of samples) {
    times.sort((a, b) => a - b)
    rows.push({ name, unit: 'µs/page', value: times[rounds >> 1], best: times[0], worst: times[rounds - 1] })
  }
  await store.close()
} finally {
  rmSync(folder, { recursive: true })
}
if (values.json) console.log(JSON.stringify({ suite: 'frontswap', directIo, rows }))
else {
  console.log(`medians of ${rounds} rounds of ${perRound} pages of 4 KiB; direct I/O: ${directIo ? 'yes' : 'no'}`)
  for (const { name, value, best, worst } of rows)
    console.log(
      `${name.padEnd(22)} ${value.toFixed(1).padStart(7)} µs/page   (${best.toFixed(1)} to ${worst.toFixed(1)})`,
    )
}
