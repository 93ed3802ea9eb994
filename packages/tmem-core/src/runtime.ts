/**
 * What page stores use of a runtime beside the language: copying and comparing bytes at offsets, and CRC-32. It is
 * looked up, not imported, so that a store loads wherever there is JavaScript: Node.js, Deno, Bun and Jest have it, and
 * their own functions are used, which make no view; browsers do not, and get portable ones.
 *
 * Invariant: both kinds give the same bytes, orders and sums.
 *
 * Source of the sum: ISO 3309, as in zlib (polynomial 0xedb88320, reflected).
 */

/**
 * Copies `this[from, end)` to `target` at `to`, where it must fit; also when they overlap. Returns the bytes copied.
 */
export type CopyBytes = (this: Uint8Array, target: Uint8Array, to: number, from: number, end: number) => number

/** Compares `this[from, end)` with `target[targetFrom, targetEnd)`: negative, 0 (the same bytes) or positive. */
export type CompareBytes = (
  this: Uint8Array,
  target: Uint8Array,
  targetFrom: number,
  targetEnd: number,
  from: number,
  end: number,
) => number

interface Port {
  onmessage: (() => void) | null
  postMessage(message: undefined): void
  close(): void
}

interface Runtime {
  readonly process?: { getBuiltinModule?(name: string): unknown }
  readonly Buffer?: { readonly prototype: { readonly copy: CopyBytes; readonly compare: CompareBytes } }
  readonly setImmediate?: (done: () => void) => unknown
  readonly MessageChannel: new () => Record<'port1' | 'port2', Port>
}

const runtime = globalThis as unknown as Runtime

/** A module of Node.js, such as `node:fs`, or `undefined` where there is none. */
export function builtin<Module>(name: `node:${string}`): Module | undefined {
  return runtime.process?.getBuiltinModule?.(name) as Module | undefined
}

export const copyBytes: CopyBytes = runtime.Buffer?.prototype.copy ?? portableCopy

export const compareBytes: CompareBytes = runtime.Buffer?.prototype.compare ?? portableCompare

/** CRC-32 of bytes, unsigned. */
export const crc32: (bytes: Uint8Array) => number =
  builtin<{ readonly crc32?: (bytes: Uint8Array) => number }>('node:zlib')?.crc32 ?? makePortableCrc32()

/** Lets everything else that is ready run first: in Node.js also what waits for I/O. */
export function turn(): Promise<void> {
  return new Promise((resolve) => {
    if (runtime.setImmediate !== undefined) {
      runtime.setImmediate(resolve)
      return
    }
    // A timer of zero waits 4 ms in browsers, a message does not.
    const { port1, port2 } = new runtime.MessageChannel()
    port1.onmessage = () => {
      port1.close()
      resolve()
    }
    port2.postMessage(undefined)
  })
}

/** As `copyBytes`, where the runtime has none. */
export function portableCopy(this: Uint8Array, target: Uint8Array, to: number, from: number, end: number): number {
  target.set(this.subarray(from, end), to)
  return end - from
}

/** As `compareBytes`, where the runtime has none. */
export function portableCompare(
  this: Uint8Array,
  target: Uint8Array,
  targetFrom: number,
  targetEnd: number,
  from: number,
  end: number,
): number {
  const lengths = [end - from, targetEnd - targetFrom] as const
  const both = Math.min(...lengths)
  for (let i = 0; i < both; i++) {
    const difference = this[from + i]! - target[targetFrom + i]!
    if (difference !== 0) return difference < 0 ? -1 : 1
  }
  return Math.sign(lengths[0] - lengths[1])
}

/** As `crc32`, where the runtime has none: eight bytes a step, from eight tables. */
export function makePortableCrc32(): (bytes: Uint8Array) => number {
  const tables = new Uint32Array(8 * 256)
  for (let byte = 0; byte < 256; byte++) {
    let sum = byte
    for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0)
    tables[byte] = sum
  }
  for (let at = 256; at < tables.length; at++) {
    const before = tables[at - 256]!
    tables[at] = tables[before & 0xff]! ^ (before >>> 8)
  }
  const table = (n: number, byte: number): number => tables[n * 256 + (byte & 0xff)]!
  return (bytes) => {
    let sum = -1
    let i = 0
    for (; i + 8 <= bytes.length; i += 8) {
      const low = sum ^ (bytes[i]! | (bytes[i + 1]! << 8) | (bytes[i + 2]! << 16) | (bytes[i + 3]! << 24))
      sum =
        table(7, low) ^
        table(6, low >>> 8) ^
        table(5, low >>> 16) ^
        table(4, low >>> 24) ^
        table(3, bytes[i + 4]!) ^
        table(2, bytes[i + 5]!) ^
        table(1, bytes[i + 6]!) ^
        table(0, bytes[i + 7]!)
    }
    for (; i < bytes.length; i++) sum = table(0, sum ^ bytes[i]!) ^ (sum >>> 8)
    return ~sum >>> 0
  }
}
