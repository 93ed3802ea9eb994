// A worker that uses the memory of somebody else's SwappableBuffer until it is told to stop.
import { parentPort, workerData } from 'node:worker_threads'
import koffi from 'koffi'
import { increments as increment } from './increments.mjs'

const { address, length, turns, increments } = workerData
const buffer = koffi.view(BigInt(address), length)
const stopped = () => Atomics.load(turns, 1) !== 0
if (increments) {
  let seed = 0x1234567
  const random = () => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
    return seed >>> 8
  }
  const stop = () => {
    Atomics.add(turns, 0, 1)
    return stopped()
  }
  parentPort.postMessage(increment(buffer, 1, Infinity, random, stop))
} else {
  const bytes = new Uint8Array(buffer)
  for (let n = 0; !stopped(); n = (n + 12_289) % length) {
    bytes[n]++
    Atomics.add(turns, 0, 1)
  }
}
