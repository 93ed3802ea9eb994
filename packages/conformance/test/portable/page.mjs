// The portable suite in a page: posts `{passed, failed, isolated}` to /result.
import { runPortable } from './suite.mjs'

const startThread = (message) =>
  new Promise((resolve, reject) => {
    const worker = new Worker('/thread.js', { type: 'module' })
    worker.onerror = (event) => reject(new Error(event.message))
    worker.onmessage = ({ data }) => {
      resolve(data)
      worker.terminate()
    }
    worker.postMessage(message)
  })

const post = (result) => fetch('/result', { method: 'POST', body: JSON.stringify(result) })
runPortable(startThread, location.search === '?quick')
  .then((result) => post({ ...result, isolated: globalThis.crossOriginIsolated }))
  .catch((error) => post({ passed: 0, failed: [String(error.stack)], isolated: globalThis.crossOriginIsolated }))
