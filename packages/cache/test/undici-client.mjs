// Runs the tests for HTTP caches against the server that is named, by undici with its cache interceptor over the store
// that is named, and says what came of each: `undici-client.mjs tmem|memory PORT [ID...]`.
import { fileURLToPath } from 'node:url'
import { Cache } from '@tmem/cache'
import { UndiciStore } from '@tmem/cache/undici'
import { Agent, cacheStores, fetch, interceptors } from 'undici'

const [kind, port, ...only] = process.argv.slice(2)
const load = (path) => import(fileURLToPath(import.meta.resolve(`http-cache-tests/${path}`)))
const { default: all } = await load('tests/index.mjs')
const suites = all.map((suite) => ({
  ...suite,
  tests: suite.tests.filter(({ id }) => only.length === 0 || only.includes(id)),
}))
const { runTests, getResults } = await load('client/runner.mjs')
const { makeCacheTest, testResults } = await load('client/test.mjs')

const cache = new Cache({ memory: '64MiB' })
const store = kind === 'tmem' ? new UndiciStore(cache) : new cacheStores.MemoryCacheStore()
const dispatcher = new Agent().compose(interceptors.cache({ store }))
await runTests(suites, (url, init) => fetch(url, { ...init, dispatcher }), false, `http://127.0.0.1:${port}`, 200)
// They tell time by seconds, which go by where others work, too: what has failed is asked again, a few at a time.
const failing = () => suites.flatMap(({ tests }) => tests).filter(({ id }) => Array.isArray(testResults[id]))
for (let round = 0; round < 2; round++) {
  const again = failing()
  for (const { id } of again) delete testResults[id]
  while (again.length > 0) await Promise.all(again.splice(0, 20).map(makeCacheTest))
}
process.send({ results: getResults(), stats: cache.stats() })
process.disconnect()
await dispatcher.close()
