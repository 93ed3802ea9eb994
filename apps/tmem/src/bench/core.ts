/** `tmem bench core`: the store of plain memory against the copy of a page to a random place. */
import { basePageSize, compose, memory, type Pool } from '@tmem/core'
import { Failed } from '../ending.ts'
import { type Bench, type Row, ratioRow, type Subject, type Suite } from './frame.ts'

/** The suite. */
export const core: Suite = {
  name: 'core',
  summary: 'the store of plain memory: put, get and miss against copies of a page to random places',
  run: coreRows,
}

async function coreRows(bench: Bench): Promise<readonly Row[]> {
  const pages = bench.quick ? 10_000 : 100_000
  const operations = bench.quick ? 20_000 : 200_000
  const store = compose([memory({ limitBytes: pages * (basePageSize + 64) + 2 ** 20 })])
  try {
    const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: basePageSize })
    if (typeof pool === 'number') throw new Failed(`bench core: the store refused the pool (${pool})`)
    const page = new Uint8Array(basePageSize).fill(7)
    for (let index = 0; index < pages; index++)
      if (pool.put(0, index, page) !== 0) throw new Failed(`bench core: the store refused page ${index} of ${pages}`)
    const buffer = Buffer.alloc(pages * basePageSize, 1)
    const ns = await bench.measure(
      `core: ${pages} pages of 4 KiB`,
      {
        put: putSubject(pool, pages, page),
        get: getSubject(pool, pages, page),
        miss: missSubject(pool, pages, page),
        'copy-in': copyInSubject(buffer, pages, page),
        'copy-out': copyOutSubject(buffer, pages, page),
      },
      { operations },
    )
    const size = `4k-${pages / 1000}k`
    return [
      ratioRow(`put-replace-${size}`, 'ns/page', ns.put, 'copy-in', ns['copy-in'], 1.25),
      ratioRow(`get-hit-${size}`, 'ns/page', ns.get, 'copy-out', ns['copy-out'], 1.2),
      ratioRow(`get-miss-${size}`, 'ns/page', ns.miss, 'copy-out', ns['copy-out'], 0.15),
    ]
  } finally {
    await store.close()
  }
}

/** The next place: a full-period walk that no prefetcher follows; the same for every subject. */
const step = (at: number, pages: number): number => (at + 61_803) % pages

function putSubject(pool: Pool, pages: number, page: Uint8Array): Subject {
  return {
    run(operations) {
      for (let done = 0, at = 0; done < operations; done++, at = step(at, pages)) pool.put(0, at, page)
    },
  }
}

function getSubject(pool: Pool, pages: number, into: Uint8Array): Subject {
  return {
    run(operations) {
      for (let done = 0, at = 0; done < operations; done++, at = step(at, pages)) pool.get(0, at, into)
    },
  }
}

function missSubject(pool: Pool, pages: number, into: Uint8Array): Subject {
  return {
    run(operations) {
      for (let done = 0, at = 0; done < operations; done++, at = step(at, pages)) pool.get(0, pages + at, into)
    },
  }
}

/** The copy of a page to a random place of a buffer of the same size. */
function copyInSubject(buffer: Buffer, pages: number, page: Uint8Array): Subject {
  return {
    run(operations) {
      for (let done = 0, at = 0; done < operations; done++, at = step(at, pages)) buffer.set(page, at * basePageSize)
    },
  }
}

/** The copy of a page from a random place of a buffer of the same size. */
function copyOutSubject(buffer: Buffer, pages: number, into: Uint8Array): Subject {
  return {
    run(operations) {
      for (let done = 0, at = 0; done < operations; done++, at = step(at, pages))
        buffer.copy(into, 0, at * basePageSize, (at + 1) * basePageSize)
    },
  }
}
