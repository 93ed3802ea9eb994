/** The process that `tmem bench nbd` measures: `nbd-server.js plain|compressed BYTES SOCKET`. Ends with SIGTERM. */
import { memory } from '@tmem/core'
import { memoryDevice, nbdServer } from '@tmem/nbd'
import { ramzswap } from '@tmem/ramzswap'
import { zcache } from '@tmem/zcache'

const [kind, bytes, path] = process.argv.slice(2)
const sizeBytes = Number(bytes)
const device =
  kind === 'plain'
    ? memoryDevice({ sizeBytes })
    : ramzswap({
        name: 'bench',
        sizeBytes,
        compressed: [zcache({ limitBytes: sizeBytes })],
        // What does not shrink; a device must have room for all of its pages.
        uncompressed: [memory({ limitBytes: Math.ceil(sizeBytes * 1.1) })],
      })
const server = nbdServer({ exports: [{ device }] })
process.once('SIGTERM', () => {
  void server.close().then(() => device.close())
})
await server.listen({ path: path! })
