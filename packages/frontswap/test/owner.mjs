// Opens a swap file as a stack of its own, says so, and keeps it until it is killed, as a process or as a thread: node
// owner.mjs FILE BYTES
import { parentPort } from 'node:worker_threads'
import { compose } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'

const [, , file, bytes] = process.argv
compose([frontswap({ file, sizeBytes: Number(bytes) })])
if (parentPort === null) console.log('open')
else parentPort.postMessage('open')
setInterval(() => undefined, 1000)
