// What the codec tests share: codecs under test, inputs, a guarded destination, and a second reading of the LZ4 format.
import {
  availableCodecs,
  type Codec,
  createCodec,
  createLz4Arena,
  createPortableLz4,
  MAX_BLOCK_BYTES,
} from '@tmem/codecs'

/** A codec and where its blocks lie in a test. */
export interface Subject {
  readonly title: string
  readonly codec: Codec
  /** Memory for blocks: the arena, where there is one. */
  readonly memory: Uint8Array
}

const MEMORY_BYTES = MAX_BLOCK_BYTES + (MAX_BLOCK_BYTES >> 3) + 4096

export function lz4Subjects(): Subject[] {
  const arena = createLz4Arena(MEMORY_BYTES)
  return [
    { title: 'lz4', codec: createCodec('lz4'), memory: new Uint8Array(MEMORY_BYTES) },
    { title: 'lz4 in its arena', codec: arena.codec, memory: arena.bytes },
    { title: 'lz4 in TypeScript', codec: createPortableLz4(), memory: new Uint8Array(MEMORY_BYTES) },
    { title: 'lz4js', codec: createCodec('lz4js'), memory: new Uint8Array(MEMORY_BYTES) },
  ]
}

export function allSubjects(): Subject[] {
  const strong = availableCodecs().filter((name) => name === 'deflate' || name === 'zstd')
  return [
    ...lz4Subjects(),
    ...strong.map((name) => ({ title: name, codec: createCodec(name), memory: new Uint8Array(MEMORY_BYTES) })),
  ]
}

/** A small generator of its own: the same numbers from the same seed everywhere. */
export function numbers(seed: number): (below: number) => number {
  let state = seed >>> 0
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0
    let value = Math.imul(state ^ (state >>> 15), state | 1)
    value ^= value + Math.imul(value ^ (value >>> 7), value | 61)
    return ((value ^ (value >>> 14)) >>> 0) % below
  }
}

export function randomBytes(length: number, seed: number): Uint8Array {
  const next = numbers(seed)
  return Uint8Array.from({ length }, () => next(256))
}

/** Bytes as programs and text have them: fresh ones, runs, and copies of what came before at any distance. */
export function likeMemory(length: number, seed: number): Uint8Array {
  const next = numbers(seed)
  const bytes = new Uint8Array(length)
  for (let at = 0; at < length; ) {
    const end = Math.min(length, at + 1 + next(next(8) === 0 ? 600 : 24))
    const kind = next(4)
    const distance = 1 + next(Math.min(at, next(3) === 0 ? 80_000 : 40) || 1)
    const value = next(256)
    for (; at < end; at++) {
      if (kind === 0) bytes[at] = next(256)
      else if (kind === 1) bytes[at] = value
      else bytes[at] = at >= distance ? (bytes[at - distance] as number) : next(4)
    }
  }
  return bytes
}

/** Named inputs of one length: nothing to gain, everything to gain, and between. */
export function inputs(length: number): [string, Uint8Array][] {
  return [
    ['zeros', new Uint8Array(length)],
    ['one value', new Uint8Array(length).fill(0xab)],
    ['counting', Uint8Array.from({ length }, (_, i) => i)],
    ['period 3', Uint8Array.from({ length }, (_, i) => 'abc'.charCodeAt(i % 3))],
    ['period 19', Uint8Array.from({ length }, (_, i) => ((i % 19) * 37) & 255)],
    ['random', randomBytes(length, length)],
    ['four values', randomBytes(length, length + 1).map((value) => value & 3)],
    ['like memory', likeMemory(length, length)],
    ['random, then zeros', Uint8Array.from(randomBytes(length, 7), (value, i) => (i < length >> 1 ? value : 0))],
  ]
}

export interface Sequence {
  readonly literals: number
  /** Missing in the last sequence. */
  readonly match?: { readonly start: number; readonly distance: number; readonly length: number }
}

/** The sequences of a sound LZ4 block; `start` counts decoded bytes. Written apart from the codecs on purpose. */
export function sequencesOf(block: Uint8Array): Sequence[] {
  const found: Sequence[] = []
  let at = 0
  let decoded = 0
  const extended = (first: number): number => {
    let length = first
    if (first === 15) {
      for (;;) {
        const more = block[at++] as number
        length += more
        if (more !== 255) break
      }
    }
    return length
  }
  while (at < block.length) {
    const token = block[at++] as number
    const literals = extended(token >> 4)
    at += literals
    decoded += literals
    if (at >= block.length) {
      found.push({ literals })
      break
    }
    const distance = (block[at] as number) + 256 * (block[at + 1] as number)
    at += 2
    const length = extended(token & 15) + 4
    found.push({ literals, match: { start: decoded, distance, length } })
    decoded += length
  }
  return found
}

/** An array with a place in the middle, and marks on both sides that must stay. */
export class Guarded {
  readonly bytes: Uint8Array
  readonly at: number = 64
  readonly length: number

  constructor(length: number, bytes: Uint8Array = new Uint8Array(length + 192)) {
    this.length = length
    this.bytes = bytes.subarray(0, length + 192)
    this.bytes.fill(0xe7)
  }

  /** True while nothing outside the place was written. */
  intact(): boolean {
    const { at, bytes, length } = this
    return bytes.every((value, i) => value === 0xe7 || (i >= at && i < at + length))
  }

  content(length: number = this.length): Uint8Array {
    return this.bytes.subarray(this.at, this.at + length)
  }
}

/** Compresses with room for everything, at an odd offset. Returns a copy of the block. */
export function compressed({ codec, memory }: Pick<Subject, 'codec' | 'memory'>, input: Uint8Array): Uint8Array {
  const room = codec.bound(input.length)
  const written = codec.compress(input, 0, input.length, memory, 3, room)
  if (written <= 0 || written > room) throw new Error(`${codec.name}: ${written} bytes in a room of ${room}`)
  return memory.slice(3, 3 + written)
}

export function decompressed(codec: Codec, block: Uint8Array, length: number): Uint8Array | undefined {
  const into = new Uint8Array(length)
  return codec.decompress(block, 0, block.length, into, 0, length) === length ? into : undefined
}

/** Equality without the cost of a matcher's difference; for large arrays. */
export function same(a: Uint8Array | undefined, b: Uint8Array): boolean {
  return a !== undefined && Buffer.compare(a, b) === 0
}
