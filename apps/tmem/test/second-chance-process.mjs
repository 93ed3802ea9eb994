// A program that reads files through a page cache over zcache > spill, compares every page, and says where they came
// from: node second-chance-process.mjs FOLDER SPILL ROUNDS closed|drained|killed
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { Cleancache, tmemBackend } from '@tmem/cleancache'
import { ByteLimit, compose, Tmem } from '@tmem/core'
import { PageCache, pageCacheFacts } from '@tmem/page-cache'
import { spill } from '@tmem/spill'
import { zcache } from '@tmem/zcache'

const [folder, file, rounds, end] = process.argv.slice(2)
const limitBytes = new ByteLimit(2 ** 20)
const store = compose([zcache({ limitBytes }), spill({ file, sizeBytes: 32 * 2 ** 20 })])
const cleancache = new Cleancache()
cleancache.register(tmemBackend(new Tmem(store), 1, { stats: () => store.stats() }))
// The folder may be on any file system: nobody else changes it.
const optIn = () => ({ facts: pageCacheFacts('test', 4096) })
const cache = new PageCache({ sizeBytes: 64 * 4096, cleancache, optIn })
const report = []
for (let round = 0; round < Number(rounds); round++) {
  const before = cache.counters.diskPagesRead
  let pages = 0
  for (const name of readdirSync(folder).sort()) {
    const wanted = readFileSync(join(folder, name))
    const handle = await cache.open(join(folder, name))
    const into = Buffer.alloc(wanted.length)
    const { bytesRead } = await handle.read(into, 0, into.length, 0)
    if (bytesRead !== wanted.length || !into.equals(wanted)) throw new Error(`wrong bytes in ${name}`)
    await handle.close()
    pages += wanted.length / 4096
  }
  report.push({ pages, fromFiles: cache.counters.diskPagesRead - before })
}
const find = (node, name) =>
  node.name === name ? node : node.children.map((child) => find(child, name)).find((found) => found !== undefined)
const nodeOf = (name) => find(cleancache.stats(), name)
const answer = JSON.stringify({
  report,
  chain: nodeOf('chain').counters,
  zcache: nodeOf('zcache').counters,
  moves: find(nodeOf('zcache'), 'moves').counters,
  spill: nodeOf('spill').counters,
})
if (end === 'killed') {
  process.stdout.write(answer, () => process.kill(process.pid, 'SIGKILL'))
} else {
  if (end === 'drained') {
    // What is in memory goes to the file: from the first level, then from the second.
    cache.dropCaches()
    limitBytes.bytes = 0
    while (nodeOf('zcache').counters.pages > 0) {
      store.tick({ pages: 256 })
      await new Promise((resolve) => setImmediate(resolve))
    }
  }
  await cache.close()
  await store.close()
  process.stdout.write(answer)
}
