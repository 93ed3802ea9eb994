/**
 * A disk in memory that fails or waits when a test says so, and remembers what it was asked for; and what the tests
 * share.
 */
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  GetOutcome,
  getOutcomeName,
  type Pool,
  type PoolAttributes,
  type PoolRefusal,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { type FileCall, type FileFault, MemoryFiles } from '@tmem/page-file'
import { afterAll, expect } from 'vitest'
import { SwapArea, type SwapAreaOptions } from '../src/index.ts'

export class Disk {
  readonly path = 'swap.img'
  /** Reads, writes and syncs, in the order in which they were asked for. */
  readonly calls: FileCall[] = []
  /** Asked before each of them, and before everything else that the system is asked for. */
  fault: (call: FileCall) => FileFault | undefined = () => undefined
  readonly files: MemoryFiles

  constructor(roomBytes: number = Number.POSITIVE_INFINITY) {
    this.files = new MemoryFiles({
      roomBytes,
      fault: (call) => {
        this.calls.push(call)
        return this.fault(call)
      },
    })
  }

  /** Those of one kind, since the disk was made or `forget` was called. */
  asked(name: FileCall['name']): FileCall[] {
    return this.calls.filter((call) => call.name === name)
  }

  bytes(name: FileCall['name']): number {
    return this.asked(name).reduce((sum, { length }) => sum + length, 0)
  }

  forget(): void {
    this.calls.length = 0
  }

  /** From now on calls of that name fail with that code, or work again. */
  fail(name: FileCall['name'], code: string | undefined): void {
    this.fault = (call) => (call.name === name && code !== undefined ? { code } : undefined)
  }

  /** Turns a bit of the file over. */
  damage(byte: number): void {
    const content = this.files.content(this.path)!
    content[byte] = content[byte]! ^ 1
    const descriptor = this.files.open(this.path, { write: true, follow: false, exclusive: false })
    this.files.writeNow(descriptor, content, byte, 1, byte)
    this.files.close(descriptor)
  }
}

/** An open area on a disk in memory. */
export function openArea(
  pages: number,
  more: Partial<SwapAreaOptions> = {},
  disk: Disk = new Disk(),
): { area: SwapArea; disk: Disk } {
  const options = { file: disk.path, sizeBytes: pages * 4096, files: disk.files, ...more }
  const area = SwapArea.open(options, systemAllocator)
  disk.forget()
  return { area, disk }
}

export const page = (fill: number, size = 4096): Uint8Array => new Uint8Array(size).fill(fill)

export const attributes: PoolAttributes = { client: 1, persistent: true, shared: false, pageSize: 4096 }

export function poolOf(pool: Pool | PoolRefusal): Pool {
  if (typeof pool === 'number') throw new Error(`pool refused: ${pool}`)
  return pool
}

/** A page that is not all of one word, which would be kept in no place; it begins with that byte. */
export const mixed = (fill: number, size = 4096): Uint8Array => new Uint8Array(size).map((_, n) => fill + (n >>> 3))

/** What the `mixed` page of an index begins with, or the name of the outcome. */
export async function fetched(pool: Pool, index: number, size = 4096): Promise<number | string> {
  const into = page(0, size)
  const outcome = await pool.fetch(1, index, into)
  if (outcome !== GetOutcome.Hit) return getOutcomeName(outcome)
  expect(Buffer.compare(into, mixed(into[0]!, size))).toBe(0)
  return into[0]!
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
