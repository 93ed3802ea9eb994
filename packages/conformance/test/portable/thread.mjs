// The other thread of the suite, in Node.js and where threads are web workers.
import { builtin } from '@tmem/core/runtime'
import { threadWork } from './suite.mjs'

const parent = builtin('node:worker_threads')?.parentPort
const answer = (data) => {
  try {
    return threadWork(data)
  } catch (error) {
    return String(error.stack)
  }
}
if (parent) parent.once('message', (data) => parent.postMessage(answer(data)))
else globalThis.onmessage = ({ data }) => globalThis.postMessage(answer(data))
