// Uses a spill file until it is killed: node holder.mjs FILE SIZE LIMIT Says on standard output, before and after each
// change, what it does: `b NUMBER`, then `e NUMBER`. LIMIT above 0: a zcache of so many bytes above the spill, which
// sinks in the background. As a thread it only posts a message when it has the file.
import { writeSync } from 'node:fs'
import { parentPort } from 'node:worker_threads'
import { compose, PutOutcome } from '@tmem/core'
import { spill } from '@tmem/spill'
import { zcache } from '@tmem/zcache'
import { changeOf, pageOf } from './changes.mjs'

const [, , file, size, limit] = process.argv
const end = spill({ file, sizeBytes: Number(size) })
const store = compose(Number(limit) > 0 ? [zcache({ limitBytes: Number(limit) }), end] : [end])
const pool = store.newPool({ client: 1, persistent: false, shared: true, pageSize: 4096 })
const say = parentPort === null ? (text) => writeSync(1, text) : () => undefined
parentPort?.postMessage('open')
for (let number = 0; ; number++) {
  const { index, flush } = changeOf(number)
  say(`b ${number}\n`)
  if (flush) pool.flushPage(7, index)
  else if (pool.put(7, index, pageOf(number)) !== PutOutcome.Stored) throw new Error('it does not take a page')
  say(`e ${number}\n`)
  if (number % 50 === 0) {
    store.tick({ pages: 64 })
    await new Promise((resolve) => setImmediate(resolve))
  }
}
