/**
 * A stand-in for remote memory: blocks in this process, up to a limit, for programs without a server, for tests and for
 * simulation. It acts in the order of the calls and needs no clock.
 *
 * Each borrower has its own blocks; all borrowers share the limit.
 */
import { randomUUID } from 'node:crypto'
import { type ByteAmount, bytesOf, checkOptions } from '@tmem/core'
import type { RemoteMemory, RemotePlan } from './remote.ts'

/** Bytes that a block takes beside its own, more or less. */
const blockOverhead = 64

/** Settings of memory of this process. */
export interface ProcessMemoryOptions {
  /** Bytes that blocks of all borrowers may take together, each with 64 bytes of overhead. */
  readonly limitBytes: ByteAmount
  /** Which machine it stands for (default: `process`). */
  readonly name?: string
}

/**
 * Memory of this process that can be borrowed as another machine's. Throws `RangeError` for a limit that makes no
 * sense.
 */
export function processMemory(options: ProcessMemoryOptions): RemotePlan {
  checkOptions('processMemory', options, { limitBytes: true, name: 'text?' })
  const limitBytes = bytesOf('processMemory', 'limitBytes', options.limitBytes)
  if (!Number.isSafeInteger(limitBytes) || limitBytes <= 0)
    throw new RangeError(`processMemory: limitBytes is a positive number of bytes, got ${limitBytes}`)
  const lender: Lender = { name: options.name ?? 'process', limitBytes, usedBytes: 0, identity: randomUUID() }
  return Object.freeze({ name: lender.name, borrow: () => new ProcessMemory(lender) })
}

interface Lender {
  readonly name: string
  readonly identity: string
  readonly limitBytes: number
  usedBytes: number
}

class ProcessMemory implements RemoteMemory {
  readonly name: string
  readonly identity: string
  readonly failure: undefined = undefined
  readonly leaseMs: undefined = undefined
  readonly #lender: Lender
  readonly #blocks: Map<number, Uint8Array> = new Map()

  constructor(lender: Lender) {
    this.name = lender.name
    this.identity = lender.identity
    this.#lender = lender
  }

  readonly isOpen = true
  readonly excessBytes = 0

  get freeBytes(): number {
    return this.#lender.limitBytes - this.#lender.usedBytes
  }

  ready(): Promise<void> {
    return Promise.resolve()
  }

  put(keys: readonly number[], blocks: readonly Uint8Array[]): Promise<readonly boolean[]> {
    const taken = keys.map((key, n) => {
      const bytes = blocks[n]!
      if (bytes.length + blockOverhead > this.freeBytes) return false
      this.#blocks.set(key, bytes.slice())
      this.#lender.usedBytes += bytes.length + blockOverhead
      return true
    })
    return Promise.resolve(taken)
  }

  get(key: number): Promise<Uint8Array | undefined> {
    return Promise.resolve(this.#blocks.get(key))
  }

  remove(keys: readonly number[]): Promise<void> {
    for (const key of keys) {
      const bytes = this.#blocks.get(key)
      if (bytes === undefined) continue
      this.#blocks.delete(key)
      this.#lender.usedBytes -= bytes.length + blockOverhead
    }
    return Promise.resolve()
  }

  renew(keys: readonly number[]): Promise<readonly boolean[]> {
    return Promise.resolve(keys.map((key) => this.#blocks.has(key)))
  }

  close(): Promise<void> {
    return this.remove([...this.#blocks.keys()])
  }
}
