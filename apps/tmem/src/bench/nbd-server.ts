/** The process that `tmem bench nbd` measures: `nbd-server.js plain|compressed BYTES SOCKET`. Ends with SIGTERM. */
import { nbdServer } from '@tmem/nbd'
import { compressedDevice, plainDevice } from './devices.ts'

const [kind, bytes, path] = process.argv.slice(2)
const device = kind === 'plain' ? plainDevice(Number(bytes)) : compressedDevice(Number(bytes))
const server = nbdServer({ exports: [{ device }] })
process.once('SIGTERM', () => {
  void server.close().then(() => device.close())
})
await server.listen({ path: path! })
