/**
 * Blocks in the memory of a video device, for `tmem bench ramster`: those of a flight, 64 of 2 KiB, which is about what
 * pages shrink to; against copies of the same bytes by the same calls of OpenCL, with one wait for all of them.
 */
import { randomBytes } from 'node:crypto'
import { createAccounts, Flight, none, type SlowPlace, systemAllocator, TmemError } from '@tmem/core'
import { openDevice, vram } from '@tmem/vram'
import { Failed } from '../ending.ts'
import { type Bench, type Row, ratioRow, skippedRow } from './frame.ts'

const names = ['vram-put-64', 'vram-get-64'] as const
const batch = 64
const blockBytes = 2048

export async function vramRows(bench: Bench): Promise<Row[]> {
  const context = { allocator: systemAllocator, accounts: createAccounts() }
  let place: SlowPlace
  try {
    place = vram({ limitBytes: '64MiB', volatile: true }).place!.open(context) as SlowPlace
  } catch (error) {
    if (!(error instanceof TmemError) || error.code !== 'TMEM_UNSUPPORTED') throw error
    return names.map((name) => skippedRow(name, error.message))
  }
  const device = openDevice()
  const buffer = device.create(batch * blockBytes)
  try {
    const bytes = randomBytes(batch * blockBytes)
    const units = blockBytes / place.unitBytes
    const flight = new Flight(new ArrayBuffer(place.flightBytes), place.flightBytes, place.unitBytes)
    flight.bytes.set(bytes)
    flight.count = batch
    flight.filled = batch * blockBytes
    for (let n = 0; n < batch; n++) {
      flight.offsets[n] = n * blockBytes
      flight.owners[n] = n
      flight.locations[n] = none
    }
    const batches = bench.quick ? 64 : 512
    const part = (all: Uint8Array, n: number): Uint8Array => all.subarray(n * blockBytes, (n + 1) * blockBytes)
    const into = new Uint8Array(new ArrayBuffer(batch * blockBytes))
    const put = async (): Promise<void> => {
      for (let n = 0; n < batch; n++) {
        if (flight.locations[n] !== none) place.free(flight.locations[n]!, flight.units[n]!)
        flight.locations[n] = none
        flight.units[n] = units
      }
      await place.write(flight)
    }
    await put()
    const ns = await bench.measure(
      'vram: blocks to the device and back',
      {
        put: {
          run: async () => {
            for (let n = 0; n < batches; n++) await put()
          },
        },
        write: {
          run: async () => {
            for (let n = 0; n < batches; n++) {
              for (let m = 0; m < batch; m++) device.write(buffer, m * blockBytes, part(bytes, m))
              await device.finish()
            }
          },
        },
        get: {
          run: async () => {
            for (let n = 0; n < batches; n++) {
              const reads: Promise<void>[] = []
              for (let m = 0; m < batch; m++) reads.push(place.read(flight.locations[m]!, units, part(into, m)))
              await Promise.all(reads)
            }
          },
        },
        read: {
          run: async () => {
            for (let n = 0; n < batches; n++) {
              for (let m = 0; m < batch; m++) device.read(buffer, m * blockBytes, part(into, m))
              await device.finish()
            }
          },
        },
      },
      { operations: batches * batch },
    )
    await Promise.all(Array.from({ length: batch }, (_, m) => place.read(flight.locations[m]!, units, part(into, m))))
    if (bytes.compare(into) !== 0) throw new Failed('bench ramster: blocks of vram are not what was put')
    return [
      ratioRow(names[0], 'ns/block', ns.put, 'opencl-write-buffer', ns.write, 1.2),
      ratioRow(names[1], 'ns/block', ns.get, 'opencl-read-buffer', ns.read, 1.2),
    ]
  } finally {
    device.release(buffer)
    device.close()
    await place.close()
  }
}
