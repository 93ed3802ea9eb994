/**
 * Puts pages into a place of a stack that promises to outlive the host, in the file `argv[2]`; tells the tracer before
 * and after a sync.
 */
import { accessSync } from 'node:fs'
import { compose } from '@tmem/core'
import { roomFor, SwapPlace } from '@tmem/frontswap'
import { openSwapFile } from '../dist/layer.js'

const file = process.argv[2]
/** A call that the tracer sees, and nothing else does. */
const say = (what) => {
  try {
    accessSync(`${file}.${what}`)
  } catch (error) {
    if (error.code !== 'ENOENT') throw error
  }
}
const sizeBytes = 2 ** 20
const roomBytes = roomFor(sizeBytes)
const traits = {
  persistent: true,
  ephemeral: false,
  waits: true,
  survives: 'host',
  rawOnly: false,
  capacity: sizeBytes / 4096,
  reservedBytes: sizeBytes,
  maxPageSize: 65536,
}
const open = (context) => {
  const swapFile = openSwapFile({ file, bytes: 4096 + roomBytes }, context)
  const place = { file: swapFile, traits, from: 4096, roomBytes, slots: false, bytesPerHour: undefined }
  return new SwapPlace(place, context)
}
const store = compose([{ name: 'swap', place: { traits, open } }])
const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
for (let index = 0; index < 8; index++)
  pool.put(
    1,
    index,
    Uint8Array.from({ length: 4096 }, (_, at) => at * index),
  )
say('put')
await store.sync()
say('synced')
await store.close()
