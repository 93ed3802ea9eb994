/**
 * The process that `tmem bench nbd` and `tmem bench ramster` measure: `nbd-server.js plain|compressed BYTES SOCKET`, or
 * `nbd-server.js remote BYTES SIGN PORT LENDER...`, which makes the file SIGN when it
 * listens, and has its swap file beside it. Ends with SIGTERM.
 */
import { writeFileSync } from 'node:fs'
import type { BlockDevice } from '@tmem/core'
import { nbdServer } from '@tmem/nbd'
import type { Ramzswap } from '@tmem/ramzswap'
import { Ticking } from '../serve/ticking.ts'
import { compressedDevice, plainDevice, remoteDevice } from './devices.ts'

const [kind, bytes, path, port, ...lenders] = process.argv.slice(2)
const sizeBytes = Number(bytes)
let ticking: Ticking | undefined
function remote(): BlockDevice {
  const one = remoteDevice({
    sizeBytes,
    ports: lenders.map(Number),
    file: `${path}.img`,
    wake: () => ticking?.wake(),
  })
  ticking = new Ticking(
    () => one.tick({ pages: 256 }),
    (error) => {
      throw error
    },
  )
  return one
}
const device =
  kind === 'plain' ? plainDevice(sizeBytes) : kind === 'compressed' ? compressedDevice(sizeBytes) : remote()
const server = nbdServer({ exports: [{ device }] })
process.once('SIGTERM', () => {
  ticking?.stop()
  void server.close().then(() => device.close())
})
if (port === undefined) await server.listen({ path: path! })
else {
  await (device as Ramzswap).ready()
  await server.listen({ host: '127.0.0.1', port: Number(port) })
  writeFileSync(path!, '')
}
