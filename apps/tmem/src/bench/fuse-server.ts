/**
 * The process that `tmem bench fuse` measures: `fuse-server.js BYTES DIRECTORY`. In the directory there are the devices
 * `plain` and `compressed`, and `times`: what this process has done so far (`ServerTimes`, as JSON). Ends with SIGTERM.
 */
import type { BlockDevice, Completion } from '@tmem/core'
import { type FuseNode, fuseServer, setIoFlusher } from '@tmem/fuse'
import { compressedDevice, plainDevice } from './devices.ts'
import type { ServerTimes } from './fuse.ts'

const [bytes, mountPoint] = process.argv.slice(2)
const plain = plainDevice(Number(bytes))
const compressed = compressedDevice(Number(bytes))
const spent = { readMs: 0, writeMs: 0, reads: 0, writes: 0, writtenBytes: 0 }

/** Runs an operation of the device, which does everything at once, and adds its time. */
function clocked(of: 'readMs' | 'writeMs', operation: () => Completion): Completion {
  const from = performance.now()
  const completion = operation()
  spent[of] += performance.now() - from
  return completion
}

const device: BlockDevice = {
  name: compressed.name,
  sizeBytes: compressed.sizeBytes,
  blockSize: compressed.blockSize,
  preferredBlockSize: compressed.preferredBlockSize,
  readOnly: false,
  read(at, into) {
    spent.reads++
    return clocked('readMs', () => compressed.read(at, into))
  },
  write(at, given) {
    spent.writes++
    spent.writtenBytes += given.length
    return clocked('writeMs', () => compressed.write(at, given))
  },
  discard: (at, length) => compressed.discard(at, length),
  zero: (at, length) => compressed.zero(at, length),
  flush: () => compressed.flush(),
  map: (at, length, report) => compressed.map(at, length, report),
  stats: () => compressed.stats(),
  close: () => compressed.close(),
}

function times(): ServerTimes {
  const { user, system } = process.cpuUsage()
  return { ...spent, userMs: user / 1000, systemMs: system / 1000 }
}

const entries: ReadonlyMap<string, FuseNode> = new Map<string, FuseNode>([
  ['plain', { kind: 'device', device: plain }],
  ['compressed', { kind: 'device', device }],
  ['times', { kind: 'text', read: () => JSON.stringify(times()) }],
])
await setIoFlusher()
const server = await fuseServer({ mountPoint: mountPoint!, root: { kind: 'directory', entries: () => entries } })
process.on('SIGTERM', () => {
  // In use: whoever measures has to end that first, and asks again.
  void server.close().catch((error: Error) => process.stderr.write(`${error.message}\n`))
})
await server.ended
await plain.close()
await compressed.close()
