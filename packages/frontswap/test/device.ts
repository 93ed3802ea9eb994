/** A device in memory whose writes and reads fail, change or wait when a test says so; and what the tests share. */
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Pool, type PoolAttributes, type PoolRefusal, systemAllocator, TmemError } from '@tmem/core'
import { afterAll, expect } from 'vitest'
import { type BlockFile, type BlockFileRequest, SwapArea, type SwapAreaOptions } from '../src/index.ts'

export class Device implements BlockFile {
  readonly directIo = true
  readonly alignedFrom = 496
  readonly request: BlockFileRequest
  readonly content: Uint8Array
  /** Position and length of every write, in slots. */
  readonly writes: [slot: number, count: number][] = []
  reads = 0
  closed = false
  /** Asked before each transfer; what it answers is thrown. */
  failWrite: (slot: number, count: number) => Error | undefined = () => undefined
  failRead: (slot: number, count: number) => Error | undefined = () => undefined
  /** Awaited before each read. */
  beforeRead: () => Promise<void> = () => Promise.resolve()

  constructor(request: BlockFileRequest) {
    this.request = request
    this.content = new Uint8Array(request.bytes)
    this.content.set(request.header)
  }

  write(at: number, length: number, position: number): void {
    if (this.closed) throw new Error('written after close')
    this.writes.push([position / 4096, length / 4096])
    const error = this.failWrite(position / 4096, length / 4096)
    if (error !== undefined) throw error
    this.content.set(this.request.memory.subarray(at, at + length), position)
  }

  async read(at: number, length: number, position: number): Promise<void> {
    this.reads++
    await this.beforeRead()
    if (this.closed) throw new Error('read after close')
    const error = this.failRead(position / 4096, length / 4096)
    if (error !== undefined) throw error
    this.request.memory.set(this.content.subarray(position, position + length), at)
  }

  close(): void {
    this.closed = true
  }
}

export const systemError = (code: string): Error => Object.assign(new Error(`${code}: injected`), { code })

/** Options of an area on a device in memory, and the device once the area was opened. */
export function onDevice(pages: number): { options: SwapAreaOptions; device: () => Device } {
  let device: Device | undefined
  return {
    options: {
      file: 'device',
      sizeBytes: pages * 4096,
      open: (request) => {
        device = new Device(request)
        return device
      },
    },
    device: () => {
      if (device === undefined) throw new Error('the area is not open')
      return device
    },
  }
}

/** An open area on a device in memory. */
export function openArea(pages: number, more: Partial<SwapAreaOptions> = {}): { area: SwapArea; device: Device } {
  const { options, device } = onDevice(pages)
  return { area: SwapArea.open({ ...options, ...more }, systemAllocator), device: device() }
}

export const page = (fill: number, size = 4096): Uint8Array => new Uint8Array(size).fill(fill)

export const attributes: PoolAttributes = { client: 1, persistent: true, shared: false, pageSize: 4096 }

export function poolOf(pool: Pool | PoolRefusal): Pool {
  if (typeof pool === 'number') throw new Error(`pool refused: ${pool}`)
  return pool
}

/** The code of the `TmemError` that `use` throws or rejects with; `'none'` when it does neither. */
export async function codeOf(use: () => unknown): Promise<string> {
  try {
    await use()
  } catch (error) {
    if (error instanceof TmemError) return error.code
    throw error
  }
  return 'none'
}

/** A folder of its own for the tests of a file. */
export function testFolder(): {
  readonly file: () => string
  readonly files: () => string[]
  readonly path: string
} {
  const path = mkdtempSync(join(tmpdir(), 'frontswap-'))
  let count = 0
  afterAll(() => {
    rmSync(path, { recursive: true })
  })
  return { path, file: () => join(path, `swap${count++}.img`), files: () => readdirSync(path) }
}

/** Asserts equality, also where a history takes another branch each time. */
export const same = (got: unknown, wanted: unknown): void => expect(got).toEqual(wanted)
