// A server that holds a million records in 256 MiB, and says what lru-cache would have taken for them.
//
//   node server.mjs [--records 1000000] [--memory 256MiB] [--port 8080] [--once]
//
// A worker thread fills the cache, which it shares with the thread that serves; nothing is sent between them. Then:
//
//   curl localhost:8080/records/4711     the record, out of the cache; one that had to go is made anew
//   curl localhost:8080/stats            what the cache has counted
//
// `--once` ends after the table.
import { spawnSync } from 'node:child_process'
import { createServer } from 'node:http'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { isMainThread, Worker, workerData } from 'node:worker_threads'
import { Cache } from '@tmem/cache'

const json = { encode: JSON.stringify, decode: JSON.parse }
const program = fileURLToPath(import.meta.url)

const first = ['Ada', 'Grace', 'Edsger', 'Barbara', 'Donald', 'Frances', 'Ken', 'Radia', 'Dennis', 'Karen']
const last = ['Lovelace', 'Hopper', 'Dijkstra', 'Liskov', 'Knuth', 'Allen', 'Thompson', 'Perlman', 'Ritchie', 'Jones']
const streets = [
  'Main Street',
  'Station Road',
  'Church Lane',
  'Mill Road',
  'High Street',
  'Park Avenue',
  'North Street',
]

/** What a database would have under that number: about 250 bytes of JSON. */
function recordOf(n) {
  const mixed = Math.imul(n + 1, 0x9e3779b1) >>> 0
  const [given, family] = [first[mixed % 10], last[(mixed >>> 8) % 10]]
  return {
    id: n,
    name: `${given} ${family}`,
    email: `${given}.${family}.${n}@example.com`.toLowerCase(),
    address: {
      street: `${mixed % 300} ${streets[(mixed >>> 4) % 7]}`,
      postcode: `${10_000 + (mixed % 90_000)}`,
      country: 'NL',
    },
    created: new Date(1.6e12 + mixed * 10).toISOString(),
    token: mixed.toString(36) + Math.imul(mixed, 0x85ebca6b).toString(36),
    roles: mixed % 20 === 0 ? ['reader', 'editor', 'admin'] : ['reader'],
    balance: (mixed % 1_000_000) / 100,
  }
}

const keyOf = (n) => `record:${n}`
const MiB = (bytes) => `${(bytes / 2 ** 20).toFixed(1).padStart(8)} MiB`

/** Bytes that an lru-cache takes for each record, measured in a process of its own with so many of them. */
async function measureLru(count) {
  const { LRUCache } = await import('lru-cache')
  globalThis.gc()
  const before = process.memoryUsage().rss
  const lru = new LRUCache({ max: count })
  for (let n = 0; n < count; n++) lru.set(keyOf(n), JSON.stringify(recordOf(n)))
  globalThis.gc()
  console.log((process.memoryUsage().rss - before) / lru.size)
}

async function main() {
  const { values } = parseArgs({
    options: {
      records: { type: 'string', default: '1000000' },
      memory: { type: 'string', default: '256MiB' },
      port: { type: 'string', default: '8080' },
      once: { type: 'boolean', default: false },
      lru: { type: 'string' },
    },
  })
  if (values.lru !== undefined) return await measureLru(Number(values.lru))
  const records = Number(values.records)
  if (!Number.isSafeInteger(records) || records < 1)
    throw new RangeError(`--records is a whole number above 0, got ${values.records}`)

  const before = process.memoryUsage().rss
  const cache = new Cache({ memory: values.memory, codec: json })
  const started = performance.now()
  const worker = new Worker(program, { workerData: { shared: cache.share(), records } })
  await new Promise((resolve, reject) => worker.once('exit', resolve).once('error', reject))
  const seconds = (performance.now() - started) / 1000

  let [there, bytes] = [0, 0]
  const sample = Math.min(records, 20_000)
  for (let n = 0; n < sample; n++) {
    const number = Math.floor((n * records) / sample)
    bytes += JSON.stringify(recordOf(number)).length
    if (cache.get(keyOf(number))?.id === number) there++
  }
  const { entries, memoryBytes, limitBytes } = cache.stats()
  // Fewer are lost in what a process takes and gives back by itself.
  const measured = 100_000
  const lru = spawnSync(process.execPath, ['--expose-gc', program, '--lru', `${measured}`], { encoding: 'utf8' })
  if (lru.status !== 0) throw new Error(`lru-cache could not be measured: ${lru.stderr}`)
  console.log(
    `${entries.toLocaleString('en')} records of ${Math.round(bytes / sample)} bytes of JSON, in ${seconds.toFixed(1)} s`,
  )
  console.log(`  of ${sample.toLocaleString('en')} that were looked for, ${there.toLocaleString('en')} are there`)
  console.log(`  the cache uses          ${MiB(memoryBytes)} of ${MiB(limitBytes).trim()}`)
  console.log(`  the process has grown by${MiB(process.memoryUsage().rss - before)}`)
  console.log(
    `  lru-cache would take    ${MiB(Number(lru.stdout) * records)} (measured with ${measured.toLocaleString('en')} of them)`,
  )
  if (values.once) return await cache.close()

  const answer = async (request, response) => {
    const number = Number(/^\/records\/(\d{1,9})$/.exec(request.url)?.[1] ?? Number.NaN)
    response.setHeader('content-type', 'application/json')
    if (request.url === '/stats') response.end(`${JSON.stringify(cache.stats(), undefined, 2)}\n`)
    else if (number < records) {
      const record = await cache.fetch(keyOf(number), () => recordOf(number))
      response.end(`${JSON.stringify(record)}\n`)
    } else {
      response.statusCode = 404
      response.end('{"error":"there is no such record"}\n')
    }
  }
  const server = createServer((request, response) => void answer(request, response))
  server.listen(Number(values.port), '127.0.0.1', () => {
    console.log(`http://127.0.0.1:${server.address().port}/records/4711`)
  })
}

if (isMainThread) await main()
else {
  const cache = Cache.join(workerData.shared, { codec: json })
  for (let n = 0; n < workerData.records; n++) cache.set(keyOf(n), recordOf(n))
  await cache.close()
}
