// A worker that has a SwappableBuffer of its own.
import { parentPort, workerData } from 'node:worker_threads'
import { SwappableBuffer } from '@tmem/userfault'

const memory = await SwappableBuffer.open({ bytes: 2 ** 22, residentBytes: 2 ** 20, stack: 'memory(limit=8MiB)' })
const words = new Uint32Array(memory.buffer)
for (let i = 0; i < words.length; i += 64) words[i] = i
let wrong = 0
for (let i = 0; i < words.length; i += 64) if (words[i] !== i) wrong++
const { evictions } = memory.stats().counters
if (workerData === 'close') await memory.close()
parentPort.postMessage({ wrong, evictions })
