/**
 * Blocks in the memory of a video device, as a slow place.
 *
 * All frames of a flight are copied together, and so are all blocks that are read in one turn: each copy is started on
 * its own, and one wait covers all. Memory is allocated in buffers of two MiB at first use; blocks for which the device
 * has no room are refused.
 *
 * A device can be reset or removed, and then loses its content. Blocks are refused until a device can be opened again,
 * which ticks try. So persistent pages are taken only if a file has a copy of each frame, at the same offset, from
 * which they are read after a loss; or with `volatile`, by which the user accepts the loss.
 *
 * Invariants:
 *  - A slot is in use from its assignment to a flight until it is freed or the flight fails.
 *  - Nothing is read from a slab that was in use when a device was lost, nor written to it before it is empty.
 *  - The source and target of a running copy stay unchanged until all copies are done.
 */
import {
  type Flight,
  idle,
  type LayerContext,
  none,
  type PlaceTraits,
  type Progress,
  type SlowPlace,
  type StatsNode,
  TmemError,
} from '@tmem/core'
import type { PageFile } from '@tmem/page-file'
import { type DeviceBuffer, type DeviceMemory, OpenClError } from './opencl.ts'
import { bytesPerSlab, Slabs, slabOf, slabUnits, unitBytes } from './slabs.ts'

/** Bytes that one flight carries at most. */
const flightBytes = 128 * 1024
/** Slabs of a buffer. */
const slabsOfBuffer = 16
const slabBytes: number = slabUnits * unitBytes
const bufferBytes: number = slabsOfBuffer * slabBytes
/** Milliseconds after which a lost device is looked for again. */
const lookAgainMs = 1000
/** What the device says when it has no room. */
const noRoom: readonly number[] = [-4, -5, -6]

/** Slabs that fit into so many bytes. */
export const slabsIn = (bytes: number): number => Math.floor(bytes / slabBytes)
/** Bytes of the copy of so many bytes of device memory, behind the file's header. */
export const copyBytes = (bytes: number): number => Math.ceil((slabsIn(bytes) * slabBytes) / 4096) * 4096
const headerBytes = 4096

/** A read that waits for its turn. */
interface Asked {
  readonly location: number
  readonly into: Uint8Array
  readonly resolve: () => void
  readonly reject: (error: unknown) => void
}

/** A device that was lost, and what it had of ours. */
interface Gone {
  readonly device: DeviceMemory
  readonly buffers: readonly (DeviceBuffer | undefined)[]
}

export interface VramPlaceOptions {
  readonly traits: PlaceTraits
  readonly limitBytes: number
  /** Opens the device: at the start, and again when it was lost. */
  readonly open: () => DeviceMemory
  /** Has a copy of each frame. */
  readonly copy: PageFile | undefined
}

export class VramPlace implements SlowPlace {
  readonly name = 'vram'
  readonly traits: PlaceTraits
  readonly unitBytes: number = unitBytes
  readonly flightBytes: number = flightBytes
  failure: Error | undefined
  readonly #open: () => DeviceMemory
  readonly #copy: PageFile | undefined
  readonly #slabs: Slabs
  readonly #buffers: (DeviceBuffer | undefined)[] = []
  #device: DeviceMemory | undefined
  #deviceName: string
  #lostAt = 0
  /** Devices that were lost, while transfers are under way there. */
  readonly #gone: Gone[] = []
  #asked: Asked[] = []
  /** Transfers that are under way, for whoever closes. */
  #underWay = 0
  #allBack: (() => void) | undefined
  #closed = false
  #closing: Promise<void> | undefined
  readonly #counters = {
    flights: 0,
    written: 0,
    refused: 0,
    read: 0,
    read_batches: 0,
    copies_read: 0,
    devices_lost: 0,
  }

  /** Throws `TmemError` (`TMEM_NO_MEMORY`, `TMEM_UNSUPPORTED`), `RangeError`. */
  constructor({ traits, limitBytes, open, copy }: VramPlaceOptions, { allocator }: LayerContext) {
    this.traits = traits
    this.#open = open
    this.#copy = copy
    const count = slabsIn(limitBytes)
    const bytes = count * bytesPerSlab
    const table = allocator.allocate(bytes, 'vram.table')
    if (table === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `no memory for the table of vram (${bytes} bytes): give a smaller limit`, {
        layer: 'vram',
      })
    this.#slabs = new Slabs(table, count)
    this.#device = open()
    this.#deviceName = this.#device.name
  }

  open(): boolean {
    return !this.#closed && this.#device !== undefined
  }

  async write(flight: Flight): Promise<void> {
    const device = this.#device
    if (this.#closed || device === undefined) throw this.failure ?? ioError('it is closed')
    const taken: number[] = []
    const copies: Promise<void>[] = []
    this.#begin()
    try {
      for (let n = 0; n < flight.count; n++) {
        const location = this.#slabs.take(flight.units[n]!)
        if (location === none) continue
        const at = flight.offsets[n]!
        const length = flight.units[n]! * unitBytes
        if (!this.#send(device, location, flight.bytes.subarray(at, at + length))) {
          this.#slabs.free(location)
          continue
        }
        taken.push(location)
        flight.locations[n] = location
        if (this.#copy !== undefined)
          copies.push(this.#copy.write(flight.bytes, at, length, headerBytes + location * unitBytes))
      }
      // All of them end before the flight does, also when one fails.
      const ends = await Promise.allSettled([device.finish(), ...copies])
      const failed = ends.find((end) => end.status === 'rejected')
      if (failed !== undefined) throw failed.reason
      if (this.#device !== device) throw this.failure ?? ioError('the device was lost')
    } catch (error) {
      // What was begun still reads the flight.
      await Promise.allSettled([device.finish(), ...copies])
      for (const location of taken) this.#slabs.free(location)
      flight.locations.fill(none, 0, flight.count)
      if (error instanceof OpenClError) throw this.#lost(device, error)
      throw error
    } finally {
      this.#end()
    }
    this.failure = undefined
    this.#counters.flights++
    this.#counters.written += taken.length
    this.#counters.refused += flight.count - taken.length
  }

  /** Begins to copy a frame to its slot. False: the device has no room. */
  #send(device: DeviceMemory, location: number, bytes: Uint8Array): boolean {
    const slab = slabOf(location)
    const number = Math.floor(slab / slabsOfBuffer)
    try {
      this.#buffers[number] ??= device.create(bufferBytes)
      device.write(this.#buffers[number]!, (location - number * slabsOfBuffer * slabUnits) * unitBytes, bytes)
      return true
    } catch (error) {
      if (error instanceof OpenClError && noRoom.includes(error.number)) return false
      throw error
    }
  }

  read(location: number, units: number, into: Uint8Array): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#asked.push({ location, into: into.subarray(0, units * unitBytes), resolve, reject })
      // All that is asked for in this turn comes together.
      if (this.#asked.length === 1) process.nextTick(() => void this.#readAll())
    })
  }

  async #readAll(): Promise<void> {
    const asked = this.#asked
    this.#asked = []
    const device = this.#device
    this.#begin()
    let begun: readonly Asked[] = []
    try {
      begun = asked.filter(({ location }) => device !== undefined && !this.#slabs.isLost(location))
      if (device !== undefined && begun.length > 0) {
        for (const { location, into } of begun) {
          const number = Math.floor(slabOf(location) / slabsOfBuffer)
          const at = (location - number * slabsOfBuffer * slabUnits) * unitBytes
          device.read(this.#buffers[number]!, at, into)
        }
        await device.finish()
        this.#counters.read_batches++
        this.#counters.read += begun.length
        for (const { resolve } of begun) resolve()
      }
    } catch (error) {
      begun = []
      if (!(error instanceof OpenClError) || device === undefined) {
        for (const { reject } of asked) reject(error)
        return
      }
      await finished(device)
      this.#lost(device, error)
    } finally {
      this.#end()
    }
    const done = new Set(begun)
    for (const one of asked) if (!done.has(one)) void this.#readCopy(one)
  }

  /** Reads what the device has lost from the copy, if there is one. */
  async #readCopy({ location, into, resolve, reject }: Asked): Promise<void> {
    if (this.#copy === undefined) {
      reject(
        new TmemError('TMEM_CORRUPT', 'vram: the block is lost: the device was reset, and has no copy elsewhere', {
          layer: 'vram',
          cause: this.failure,
        }),
      )
      return
    }
    this.#begin()
    try {
      await this.#copy.read(into, 0, into.length, headerBytes + location * unitBytes)
      this.#counters.copies_read++
      resolve()
    } catch (error) {
      reject(error)
    } finally {
      this.#end()
    }
  }

  free(location: number): void {
    this.#slabs.free(location)
  }

  /** The device is gone, with all that it had. Another one is looked for in a while. */
  #lost(device: DeviceMemory, error: OpenClError): TmemError {
    const failure = ioError(`the device ${device.name} is lost: ${error.message}`, error)
    this.failure = failure
    if (this.#device !== device) return failure
    this.#device = undefined
    this.#lostAt = performance.now()
    this.#counters.devices_lost++
    this.#slabs.lose()
    this.#gone.push({ device, buffers: this.#buffers.splice(0) })
    return failure
  }

  /** Gives back what a device has of ours, as far as it still can. Nothing is under way there. */
  #release({ device, buffers }: Gone): void {
    for (const buffer of buffers) {
      if (buffer === undefined) continue
      try {
        device.release(buffer)
      } catch (error) {
        // A device that is gone has nothing to give back.
        if (!(error instanceof OpenClError)) throw error
      }
    }
    try {
      device.close()
    } catch (error) {
      if (!(error instanceof OpenClError)) throw error
    }
  }

  tick(): Progress {
    if (this.#closed || this.#device !== undefined || performance.now() - this.#lostAt < lookAgainMs) return idle
    this.#lostAt = performance.now()
    try {
      this.#device = this.#open()
      this.#deviceName = this.#device.name
      this.failure = undefined
    } catch (error) {
      if (!(error instanceof OpenClError || error instanceof TmemError || error instanceof RangeError)) throw error
      this.failure = ioError(`no device: ${error.message}`, error)
    }
    return idle
  }

  stats(): StatsNode {
    return {
      name: this.name,
      counters: {
        ...this.#counters,
        blocks: this.#slabs.frames,
        used_bytes: this.#slabs.usedUnits * unitBytes,
        device_bytes: this.#buffers.filter((buffer) => buffer !== undefined).length * bufferBytes,
        limit_bytes: this.#slabs.count * slabBytes,
        device_open: this.#device === undefined ? 0 : 1,
      },
      children: [{ name: this.#deviceName, counters: {}, children: [] }],
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    this.#closed = true
    if (this.#underWay > 0)
      await new Promise<void>((resolve) => {
        this.#allBack = resolve
      })
    const device = this.#device
    this.#device = undefined
    if (device !== undefined) this.#release({ device, buffers: this.#buffers.splice(0) })
    await this.#copy?.close()
  }

  check(blocks: readonly { readonly location: number; readonly units: number }[]): void {
    for (const { location, units } of blocks) {
      if (!this.#slabs.isUsed(location)) throw new Error(`vram: nothing is at location ${location}`)
      if (this.#slabs.unitsAt(location) < units) throw new Error(`vram: location ${location} has too few units`)
    }
    if (blocks.length !== this.#slabs.frames)
      throw new Error(`vram: ${this.#slabs.frames} blocks, ${blocks.length} are known`)
  }

  #begin(): void {
    this.#underWay++
  }

  #end(): void {
    if (--this.#underWay > 0) return
    for (const gone of this.#gone.splice(0)) this.#release(gone)
    this.#allBack?.()
  }
}

/** Waits until a device that has failed does nothing any more: it may still fill what it was given. */
async function finished(device: DeviceMemory): Promise<void> {
  try {
    await device.finish()
  } catch (error) {
    if (!(error instanceof OpenClError)) throw error
  }
}

function ioError(message: string, cause?: unknown): TmemError {
  return new TmemError('TMEM_IO', `vram: ${message}`, {
    layer: 'vram',
    ...(cause === undefined ? {} : { cause }),
  })
}
