// LZ4 against LZ4: the codecs read each other's blocks, lz4-napi's and those of C's lz4; and they keep the format's
// rules.
import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { isLz4Block } from '@tmem/codecs'
import fc from 'fast-check'
import { compressSync, uncompressSync } from 'lz4-napi'
import { describe, expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import {
  compressed,
  decompressed,
  Guarded,
  inputs,
  likeMemory,
  lz4Subjects,
  numbers,
  same,
  sequencesOf,
} from './blocks.ts'

const LENGTHS = [1, 5, 12, 13, 14, 20, 64, 300, 4096, 20_000, 65_536, 200_000]

/** lz4-napi puts the length before a block. */
function napiRead(block: Uint8Array, length: number): Uint8Array {
  const prefixed = Buffer.alloc(4 + block.length)
  prefixed.writeUInt32LE(length)
  prefixed.set(block, 4)
  return uncompressSync(prefixed)
}

function xxh32(bytes: Uint8Array): number {
  const rotated = (value: number, by: number): number => (value << by) | (value >>> (32 - by))
  let hash = (0x165667b1 + bytes.length) | 0
  for (const byte of bytes) hash = Math.imul(rotated(hash + Math.imul(byte, 0x165667b1), 11), 0x9e3779b1)
  hash = Math.imul(hash ^ (hash >>> 15), 0x85ebca77)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae3d)
  return (hash ^ (hash >>> 16)) >>> 0
}

/** The frame that the lz4 command reads, around one block: blocks of up to 4 MiB, no checksums. */
function frameOf(block: Uint8Array): Buffer {
  const descriptor = Uint8Array.of(0x60, 0x70)
  const frame = Buffer.alloc(4 + 2 + 1 + 4 + block.length + 4)
  frame.writeUInt32LE(0x184d2204)
  frame.set(descriptor, 4)
  frame[6] = (xxh32(descriptor) >>> 8) & 255
  frame.writeUInt32LE(block.length, 7)
  frame.set(block, 11)
  return frame
}

/** The only block of a frame without a content size, undefined when it was stored as it is. */
function blockOf(frame: Buffer): Uint8Array | undefined {
  const size = frame.readUInt32LE(7)
  return size >= 2 ** 31 ? undefined : frame.subarray(11, 11 + size)
}

describe('who reads whose blocks', () => {
  const subjects = lz4Subjects()

  test('every codec reads every codec', () => {
    for (const length of LENGTHS) {
      for (const [name, input] of inputs(length)) {
        for (const writer of subjects) {
          const block = compressed(writer, input)
          for (const reader of subjects) {
            const back = decompressed(reader.codec, block, length)
            expect(same(back, input), `${writer.title} to ${reader.title}: ${name}, ${length} bytes`).toBe(true)
          }
        }
      }
    }
  })

  test('lz4-napi, both ways', () => {
    for (const length of LENGTHS) {
      for (const [name, input] of inputs(length)) {
        const theirs = compressSync(Buffer.from(input)).subarray(4)
        for (const { codec, memory, title } of subjects) {
          expect(same(decompressed(codec, theirs, length), input), `${title} reads ${name}, ${length}`).toBe(true)
          const ours = compressed({ codec, memory }, input)
          expect(same(napiRead(ours, length), input), `lz4-napi reads ${title}: ${name}, ${length}`).toBe(true)
        }
      }
    }
  })

  test("C's lz4, both ways", (ctx) => {
    requires(ctx, { commands: ['lz4'] })
    const run = (input: Uint8Array, ...words: string[]): Buffer =>
      execFileSync('lz4', ['-q', '-c', ...words], { input, maxBuffer: 2 ** 26 })
    for (const length of [13, 300, 4096, 200_000]) {
      for (const [name, input] of inputs(length)) {
        const theirs = blockOf(run(input, '-z', '-B7', '--no-frame-crc'))
        for (const { codec, title } of subjects) {
          const back = theirs === undefined ? input : decompressed(codec, theirs, length)
          expect(same(back, input), `${title} reads ${name}, ${length}`).toBe(true)
        }
        const writer = subjects[length % subjects.length] ?? subjects[0]
        for (const one of length === 4096 ? subjects : [writer]) {
          if (one === undefined) throw new Error('unreachable')
          const back = run(frameOf(compressed(one, input)), '-d')
          expect(same(back, input), `lz4 reads ${one.title}: ${name}, ${length}`).toBe(true)
        }
      }
    }
  })
})

describe.each(lz4Subjects())('the format as $title writes it', (subject) => {
  /** What is wrong with the block that comes of an input. */
  function faults(input: Uint8Array): string[] {
    const block = compressed(subject, input)
    const sequences = sequencesOf(block)
    const last = sequences.at(-1)
    const found: string[] = []
    if (!isLz4Block(block, 0, block.length, input.length)) found.push('the check refuses it')
    if (last === undefined || last.match !== undefined) found.push('no final literals')
    else if (sequences.length > 1 && last.literals < 5) found.push(`only ${last.literals} final literals`)
    for (const { match } of sequences) {
      if (match === undefined) continue
      if (match.start > input.length - 12) found.push(`match at ${match.start} of ${input.length}`)
      if (match.distance < 1 || match.distance > Math.min(match.start, 65_535)) found.push(`distance ${match.distance}`)
    }
    return found
  }

  test('block ends: 5 literals at least, no match that starts in the last 12 bytes', () => {
    for (let length = 0; length <= 300; length++) {
      for (const [, input] of inputs(length)) expect(faults(input)).toEqual([])
    }
    // Repetitions that begin just before the end tempt most.
    for (let length = 13; length < 80; length++) {
      for (let start = 1; start < length; start++) {
        expect(faults(Uint8Array.from({ length }, (_, i) => (i < start ? i * 7 : (i - start) * 7)))).toEqual([])
      }
    }
  })

  test('distances up to 65,535 and no further', () => {
    const next = numbers(3)
    for (const distance of [65_534, 65_535, 65_536, 65_537, 131_072]) {
      const input = Uint8Array.from({ length: distance + 500 }, () => next(256))
      input.copyWithin(distance, 0, 400)
      expect(faults(input)).toEqual([])
    }
    expect(faults(likeMemory(500_000, 12))).toEqual([])
  })

  test('any input', () => {
    fc.assert(
      fc.property(fc.nat(6000), fc.nat(), (length, seed) => {
        expect(faults(likeMemory(length, seed))).toEqual([])
      }),
      { seed: 1_620_086_400, numRuns: 200 },
    )
  })
})

describe('decoders agree', () => {
  const subjects = lz4Subjects()

  function verdicts(block: Uint8Array, length: number): (string | undefined)[] {
    return subjects.map(({ codec, memory }) => {
      memory.fill(0x99, 0, block.length + 100)
      memory.set(block, 7)
      const into = new Guarded(length)
      const result = codec.decompress(memory, 7, block.length, into.bytes, into.at, length)
      expect(into.intact()).toBe(true)
      return result === -1 ? undefined : Buffer.from(into.content()).toString('base64')
    })
  }

  test('on altered blocks, on their content too', () => {
    const next = numbers(99)
    let accepted = 0
    for (let round = 0; round < 3000; round++) {
      const length = 1 + next(600)
      const writer = subjects[next(subjects.length)] ?? subjects[0]
      if (writer === undefined) throw new Error('unreachable')
      const block = compressed(writer, likeMemory(length, round))
      for (let changes = 1 + next(2); changes > 0; changes--) block[next(block.length)] = next(256)
      const [first, ...others] = verdicts(block, length)
      for (const other of others) expect(other).toBe(first)
      expect(isLz4Block(block, 0, block.length, length)).toBe(first !== undefined)
      if (first !== undefined) accepted++
    }
    expect(accepted).toBeGreaterThan(200)
    expect(accepted).toBeLessThan(2800)
  })

  test('on bytes that never were a block', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 60 }), fc.nat(400), (bytes, length) => {
        const [first, ...others] = verdicts(bytes, length)
        for (const other of others) expect(other).toBe(first)
      }),
      { seed: 5_000_000, numRuns: 3000 },
    )
  })

  test.each([
    ['nothing', [], 0],
    ['a token without literals behind it', [0x10], 1],
    ['literals cut', [0x30, 1, 2], 3],
    ['a length without end', [0xf0, 255, 255], 600],
    ['distance 0', [0x40, 1, 2, 3, 4, 0, 0, 0x50, 1, 2, 3, 4, 5], 13],
    ['distance before the start', [0x40, 1, 2, 3, 4, 5, 0, 0x50, 1, 2, 3, 4, 5], 13],
    ['half a distance', [0x40, 1, 2, 3, 4, 1], 8],
    ['a match without the last literals', [0x40, 1, 2, 3, 4, 4, 0], 8],
    ['a match too long', [0x4f, 1, 2, 3, 4, 4, 0, 200, 0x50, 1, 2, 3, 4, 5], 30],
    ['a match length cut', [0x4f, 1, 2, 3, 4, 4, 0], 30],
    ['a match length cut at 255', [0x4f, 1, 2, 3, 4, 4, 0, 255], 300],
    ['bytes left over', [0x10, 1, 0x10, 2], 1],
    ['too few bytes', [0x10, 1], 2],
  ] as const)('refused: %s', (_, bytes, length) => {
    for (const verdict of verdicts(Uint8Array.from(bytes), length)) expect(verdict).toBeUndefined()
  })

  test('every distance from 1 to 40 with every match length from 4 to 80', () => {
    for (let distance = 1; distance <= 40; distance++) {
      for (let match = 4; match <= 80; match++) {
        const literals = Array.from({ length: distance }, (_, i) => (i * 31 + 7) & 255)
        const run = distance < 15 ? [distance << 4] : [0xf0, distance - 15]
        const rest = match - 4
        run[0] = (run[0] as number) | Math.min(rest, 15)
        const block = Uint8Array.from(
          [run, literals, [distance, 0], rest >= 15 ? [rest - 15] : [], [0x50, 1, 2, 3, 4, 5]].flat(),
        )
        const expected = Uint8Array.from([
          ...Array.from({ length: distance + match }, (_, i) => literals[i % distance] as number),
          1,
          2,
          3,
          4,
          5,
        ])
        for (const verdict of verdicts(block, expected.length)) {
          expect(verdict).toBe(Buffer.from(expected).toString('base64'))
        }
      }
    }
  })
})

test('the compiled module is what its source says', () => {
  const build = fileURLToPath(new URL('../wasm/build.mjs', import.meta.url))
  expect(() => execFileSync(process.execPath, [build, '--check'], { stdio: 'pipe' })).not.toThrow()
})
