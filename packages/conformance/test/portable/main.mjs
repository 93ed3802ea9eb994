// The portable suite in a runtime without pages (Node.js, Deno, Bun): prints `{passed, failed}` as JSON.
import { Worker } from 'node:worker_threads'
import { runPortable } from './suite.mjs'

const startThread = (message) =>
  new Promise((resolve, reject) => {
    const worker = new Worker(new URL('./thread.mjs', import.meta.url))
    worker.once('error', reject)
    worker.once('message', (answer) => {
      resolve(answer)
      void worker.terminate()
    })
    worker.postMessage(message)
  })

const result = await runPortable(startThread, process.argv.includes('--quick'))
console.log(JSON.stringify(result))
process.exit(result.failed.length === 0 ? 0 : 1)
