import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { runInNewContext } from 'node:vm'
import { availableCodecs, CodecError, type CodecName, createCodec, createLz4Arena, MAX_BLOCK_BYTES } from '@tmem/codecs'
import fc from 'fast-check'
import { afterEach, describe, expect, test, vi } from 'vitest'
import { checksumPortable } from '../src/lz4.ts'
import {
  allSubjects,
  compressed,
  decompressed,
  Guarded,
  inputs,
  likeMemory,
  numbers,
  randomBytes,
  same,
} from './blocks.ts'

afterEach(() => {
  vi.unstubAllGlobals()
})

describe.each(allSubjects())('$title', (subject) => {
  const { codec, memory } = subject

  test('every length from 0 to 300, every kind of input', () => {
    for (let length = 0; length <= 300; length++) {
      for (const [name, input] of inputs(length)) {
        const block = compressed(subject, input)
        expect(same(decompressed(codec, block, length), input), `${length} bytes, ${name}`).toBe(true)
      }
    }
  })

  test.each([4095, 4096, 4097, 8192, 65_535, 65_536, 65_537, 262_144, MAX_BLOCK_BYTES])('%i bytes', (length) => {
    for (const [name, input] of inputs(length)) {
      const block = compressed(subject, input)
      expect(same(decompressed(codec, block, length), input), `${name}, ${length} bytes`).toBe(true)
    }
    expect(compressed(subject, new Uint8Array(length)).length).toBeLessThan(length / 100)
  })

  test('source and destination anywhere in their arrays', () => {
    fc.assert(
      fc.property(fc.nat(9000), fc.nat(70), fc.nat(70), fc.nat(), (length, srcAt, dstAt, seed) => {
        const input = likeMemory(length, seed)
        const holder = new Uint8Array(length + 100).fill(0x55)
        holder.set(input, srcAt)
        const room = codec.bound(length)
        const written = codec.compress(holder, srcAt, length, memory, dstAt, room)
        const into = new Guarded(length)
        expect(codec.decompress(memory, dstAt, written, into.bytes, into.at, length)).toBe(length)
        expect(same(into.content(), input)).toBe(true)
        expect(into.intact()).toBe(true)
      }),
      { seed: 20_091_015, numRuns: 150 },
    )
  })

  test('every room: the block, or 0 and nothing outside the room', () => {
    for (const input of [
      likeMemory(700, 1),
      randomBytes(300, 2),
      new Uint8Array(5000),
      likeMemory(4096, 3),
      new Uint8Array(1),
    ]) {
      const needed = compressed(subject, input).length
      const step = Math.max(1, Math.floor(needed / 400))
      for (let room = 0; room <= codec.bound(input.length); room += room < needed + 40 ? step : 97) {
        const into = new Guarded(room, memory)
        const written = codec.compress(input, 0, input.length, into.bytes, into.at, room)
        expect(into.intact(), `room ${room}`).toBe(true)
        expect(written).toBeLessThanOrEqual(room)
        const back = written === 0 ? undefined : decompressed(codec, into.content(written), input.length)
        expect(written === 0 ? room < needed : same(back, input), `room ${room} of ${needed}`).toBe(true)
      }
    }
  })

  test('the bound holds for what does not compress', () => {
    for (const length of [0, 1, 15, 16, 270, 4096, 70_000]) {
      const input = randomBytes(length, length)
      expect(compressed(subject, input).length).toBeLessThanOrEqual(codec.bound(length))
    }
  })

  test('altered, cut and lengthened blocks: -1 or the right length, and nothing outside the destination', () => {
    const next = numbers(4711)
    let refused = 0
    let accepted = 0
    const missed: string[] = []
    for (let round = 0; round < 1500; round++) {
      const length = 1 + next(next(5) === 0 ? 6000 : 300)
      const block = compressed(subject, likeMemory(length, round))
      const kind = next(4)
      const altered =
        kind === 0
          ? block.slice(0, next(block.length))
          : Uint8Array.from([...block, ...(kind === 1 ? [next(256)] : [])])
      if (kind >= 2) for (let changes = 1 + next(3); changes > 0; changes--) altered[next(altered.length)] = next(256)
      // In the memory of the codec, because that is where an arena's blocks are; with other bytes behind the block.
      memory.fill(next(256), 0, altered.length + 300)
      memory.set(altered, 5)
      const claimed = next(3) === 0 ? next(2 * length) : length
      const into = new Guarded(claimed)
      const result = codec.decompress(memory, 5, altered.length, into.bytes, into.at, claimed)
      expect([-1, claimed]).toContain(result)
      expect(into.intact()).toBe(true)
      if (result === -1) refused++
      else accepted++
      if (kind < 2 && claimed === length && result !== -1)
        missed.push(`${kind === 0 ? 'cut' : 'longer'}, round ${round}`)
    }
    expect(missed).toEqual([])
    // Both happen: changed literals are found out only by the checksum of the store.
    expect(refused).toBeGreaterThan(500)
    expect(accepted).toBeGreaterThan(subject.title === 'deflate' || subject.title === 'zstd' ? 0 : 20)
  })

  test('a wrong length is refused', () => {
    const input = likeMemory(4096, 9)
    const block = compressed(subject, input)
    for (const length of [0, 1, 2048, 4095, 4097, 8192, MAX_BLOCK_BYTES]) {
      expect(decompressed(codec, block, length), `${length}`).toBeUndefined()
    }
    expect(codec.decompress(block, 0, 0, new Uint8Array(8), 0, 8)).toBe(-1)
    expect(codec.decompress(block, 0, 0, new Uint8Array(8), 0, 0)).toBe(-1)
  })

  test('ranges outside their arrays are misuse', () => {
    const page = new Uint8Array(64)
    for (const [srcAt, srcLength, dstAt, dstLength] of [
      [-1, 10, 0, 10],
      [0, 65, 0, 64],
      [60, 5, 0, 64],
      [0, 10, 60, 5],
      [0, 10, 0, 65],
      [0.5, 10, 0, 10],
      [0, Number.NaN, 0, 10],
      [0, 10, 2 ** 32, 10],
      [0, 10, 0, -1],
    ] as const) {
      expect(() => codec.compress(page, srcAt, srcLength, page, dstAt, dstLength)).toThrow(RangeError)
      expect(() => codec.decompress(page, srcAt, srcLength, page, dstAt, dstLength)).toThrow(RangeError)
    }
    const large = new Uint8Array(MAX_BLOCK_BYTES + 1)
    expect(() => codec.compress(large, 0, large.length, page, 0, 64)).toThrow(RangeError)
    expect(() => codec.decompress(page, 0, 64, large, 0, large.length)).toThrow(RangeError)
    for (const length of [-1, 1.5, MAX_BLOCK_BYTES + 1, Number.NaN])
      expect(() => codec.bound(length)).toThrow(RangeError)
  })
})

test('what is no Uint8Array, and what is no number, is misuse: the same for every codec', () => {
  const page = new Uint8Array(64)
  const foreign = runInNewContext('new Uint8Array(256)') as Uint8Array
  const wrong: readonly unknown[] = [
    'text',
    [1, 2, 3],
    undefined,
    null,
    5,
    page.buffer,
    new DataView(page.buffer),
    new Int8Array(64),
    {},
  ]
  const messages = allSubjects().map(({ codec }) => {
    const said: unknown[] = []
    const call = (name: string, ...args: readonly unknown[]): void => {
      try {
        said.push((codec as unknown as Record<string, (...args: readonly unknown[]) => unknown>)[name]!(...args))
      } catch (error) {
        said.push(String(error))
      }
    }
    for (const name of ['compress', 'decompress'])
      for (const one of wrong) {
        call(name, one, 0, 3, page, 0, 64)
        call(name, page, 0, 64, one, 0, 3)
      }
    for (const at of ['0', 0n, null, undefined, Symbol('place')]) {
      call('compress', page, at, 3, page, 0, 64)
      call('decompress', page, 0, 3, page, 0, at)
      call('bound', at)
    }
    expect(said.every((one) => /^(Type|Range)Error: codec: /.test(String(one)))).toBe(true)
    // Bytes of another realm are bytes.
    const written = codec.compress(foreign, 0, 64, foreign, 64, Math.min(codec.bound(64), 192))
    expect(codec.decompress(foreign, 64, written, foreign, 0, 64)).toBe(64)
    return said
  })
  for (const said of messages) expect(said).toEqual(messages[0])
})

test('where compiling WebAssembly is forbidden, all that is LZ4 is done in TypeScript', () => {
  // The refusal is V8's own.
  const forbidding = { contextCodeGeneration: { strings: false, wasm: false } }
  vi.stubGlobal('WebAssembly', runInNewContext('WebAssembly', {}, forbidding))
  expect(availableCodecs()).toContain('lz4')
  const { bytes, codec } = createLz4Arena(10_000)
  expect([createCodec('lz4').engine, codec.engine]).toEqual(['typescript', 'typescript'])
  const page = likeMemory(4096, 3)
  const length = codec.compress(page, 0, 4096, bytes, 0, 8000)
  expect(same(decompressed(createCodec('lz4'), bytes.slice(0, length), 4096), page)).toBe(true)
  // What is wrong with anything else is not taken for it.
  vi.stubGlobal('WebAssembly', {
    validate: () => true,
    Module: class {
      constructor() {
        throw new TypeError('broken')
      }
    },
  })
  expect(() => createCodec('lz4')).toThrow('broken')
})

test('the whole package, as it was built, in a context that forbids all code generation', () => {
  const script = fileURLToPath(new URL('forbidden.mjs', import.meta.url))
  const answer = execFileSync(process.execPath, ['--experimental-vm-modules', '--no-warnings', script], {
    encoding: 'utf8',
  })
  expect(JSON.parse(answer)).toEqual({
    forbidden: 'typescript 4096 true',
    allowed: 'wasm-simd 4096 true',
    bare: 'typescript 4096 true',
  })
})

test('two instances do not disturb one another, nor do blocks of one instance', () => {
  for (const [first, second] of allSubjects().map((subject, i) => [subject, allSubjects()[i]] as const)) {
    if (second === undefined) throw new Error('unreachable')
    for (let round = 0; round < 200; round++) {
      // The same bytes at other places: what one block leaves in a table would be a tempting match in the next.
      const whole = likeMemory(12_000, round)
      const a = whole.subarray(0, 4096)
      const b = whole.subarray(round, round + 4096)
      const blockA = compressed(first, a)
      const blockB = compressed(second, b)
      const blockOther = compressed(first, whole)
      expect(same(decompressed(second.codec, blockA, 4096), a)).toBe(true)
      expect(same(decompressed(first.codec, blockB, 4096), b)).toBe(true)
      expect(same(decompressed(second.codec, blockOther, 12_000), whole)).toBe(true)
    }
  }
})

test('blocks inside the arena, from the arena and to the arena', () => {
  const { bytes, codec } = createLz4Arena(100_000)
  const input = likeMemory(4096, 77)
  bytes.set(input, 1000)
  const written = codec.compress(bytes, 1000, 4096, bytes, 90_000, 5000)
  expect(written).toBeGreaterThan(0)
  expect(codec.decompress(bytes, 90_000, written, bytes, 50_001, 4096)).toBe(4096)
  expect(same(bytes.slice(50_001, 54_097), input)).toBe(true)
  expect(bytes.slice(0, 1000).every((value) => value === 0)).toBe(true)
  expect(bytes.slice(54_097, 90_000).every((value) => value === 0)).toBe(true)
  // A page at the very end, and a view of the arena.
  const end = bytes.subarray(100_000 - 4096)
  expect(codec.decompress(bytes, 90_000, written, new Uint8Array(4096), 0, 4096)).toBe(4096)
  end.set(input)
  const block = new Uint8Array(codec.bound(4096))
  const length = codec.compress(end, 0, 4096, block, 0, block.length)
  expect(same(decompressed(codec, block.subarray(0, length), 4096), input)).toBe(true)
  bytes.set(block.subarray(0, length), 100_000 - length)
  expect(same(decompressed(codec, bytes.subarray(100_000 - length), 4096), input)).toBe(true)
})

test('checksums are those of the portable code, and any flipped bit changes them', () => {
  const arena = createLz4Arena(10_000)
  arena.bytes.set(likeMemory(9000, 5))
  for (let length = 0; length < 300; length++) {
    const at = (length * 7) % 61
    expect(arena.checksum(at, length)).toBe(checksumPortable(arena.bytes, at, length))
  }
  const sum = arena.checksum(10, 1000)
  expect(sum).toBe(checksumPortable(arena.bytes.slice(10, 1010), 0, 1000))
  for (let bit = 0; bit < 8000; bit++) {
    arena.bytes[10 + (bit >> 3)]! ^= 1 << (bit & 7)
    expect(arena.checksum(10, 1000)).not.toBe(sum)
    arena.bytes[10 + (bit >> 3)]! ^= 1 << (bit & 7)
  }
  // What lies beside the range does not count; what is shorter is another sum, even when only zeros are missing.
  arena.bytes.fill(0, 1010, 1100)
  expect(arena.checksum(10, 1000)).toBe(sum)
  expect(arena.checksum(10, 1001)).not.toBe(sum)
  expect(() => arena.checksum(9990, 11)).toThrow(RangeError)
})

test('a hostile block does not reach what lies behind the scratch memory', () => {
  const { bytes, codec } = createLz4Arena(40 * 1024 * 1024)
  const short = Array.from({ length: 600_000 }, () => [0x0e, 1, 0]).flat()
  const many = new Uint8Array(1_600_000).fill(255)
  const hostile: [string, Uint8Array][] = [
    ['short matches', Uint8Array.from([[0x1e, 1, 1, 0], short].flat())],
    ['one run of 400 MB', many.with(0, 0xf0)],
  ]
  hostile.push([
    'one match of 400 MB',
    Buffer.concat([Uint8Array.of(0x1f, 1, 1, 0), many, Uint8Array.of(0, 0x50, 1, 2, 3, 4, 5)]),
  ])
  const into = new Uint8Array(MAX_BLOCK_BYTES)
  bytes.fill(0x77)
  for (const [name, block] of hostile) {
    bytes.set(block)
    const before = bytes.slice()
    expect(codec.decompress(bytes, 0, block.length, into, 0, MAX_BLOCK_BYTES), `${name}`).toBe(-1)
    expect(codec.decompress(block, 0, block.length, into, 0, MAX_BLOCK_BYTES), `${name}`).toBe(-1)
    expect(same(bytes, before), `${name}`).toBe(true)
  }
  expect(into.every((value) => value === 0)).toBe(true)
})

test('many instances live side by side', () => {
  const input = likeMemory(4096, 5)
  const many = Array.from({ length: 200 }, () => createCodec('lz4'))
  const room = new Uint8Array(5000)
  for (const codec of many) {
    const written = codec.compress(input, 0, 4096, room, 0, 5000)
    expect(same(decompressed(codec, room.subarray(0, written), 4096), input)).toBe(true)
  }
})

test.each(['missing', 'without SIMD', 'without memory'])('the portable codec takes over: WebAssembly %s', (how) => {
  const fast = createCodec('lz4')
  expect(fast.engine).toBe('wasm-simd')
  const real = (globalThis as unknown as { WebAssembly: object }).WebAssembly
  const Memory = class {
    constructor() {
      throw new RangeError('could not allocate memory')
    }
  }
  const changed = { missing: undefined, 'without SIMD': { validate: () => false }, 'without memory': { Memory } }[how]
  const present = ['validate', 'Module', 'Instance', 'Memory'].map((key) => [key, Reflect.get(real, key)])
  vi.stubGlobal('WebAssembly', changed && { ...Object.fromEntries(present), ...changed })
  const slow = createCodec('lz4')
  const arena = createLz4Arena(10_000)
  const input = likeMemory(4096, 6)
  for (const codec of [slow, arena.codec]) {
    expect([codec.engine, codec.name, codec.id]).toEqual(['typescript', 'lz4', 2])
    const block = compressed({ codec, memory: arena.bytes }, input)
    expect(same(decompressed(fast, block, 4096), input)).toBe(true)
    expect(same(decompressed(codec, compressed({ codec: fast, memory: arena.bytes }, input), 4096), input)).toBe(true)
  }
})

test('an arena has limits', () => {
  for (const length of [-1, 1.5, Number.NaN, 2 ** 32]) expect(() => createLz4Arena(length)).toThrow(RangeError)
  expect(createLz4Arena(0).bytes.length).toBe(0)
})

test('ids and names are a contract', () => {
  const available = availableCodecs()
  const known: Record<CodecName, number> = { lz4js: 1, lz4: 2, deflate: 3, zstd: 4 }
  for (const name of available) expect([createCodec(name).name, createCodec(name).id]).toEqual([name, known[name]])
  expect(available).toEqual(expect.arrayContaining(['lz4', 'lz4js', 'deflate']))
})

test('what is not there says so', () => {
  const unknown = (): unknown => createCodec('lzo' as CodecName)
  expect(unknown).toThrow(CodecError)
  expect(unknown).toThrow(expect.objectContaining({ code: 'CODEC_UNKNOWN', codec: 'lzo' }))
  vi.stubGlobal('process', { ...process, getBuiltinModule: () => undefined })
  expect(availableCodecs()).toEqual(['lz4', 'lz4js'])
  expect(() => createCodec('zstd')).toThrow(expect.objectContaining({ code: 'CODEC_UNAVAILABLE', codec: 'zstd' }))
})

test('zstd is what the zstd command and node:zlib read', (ctx) => {
  if (!availableCodecs().includes('zstd')) ctx.skip('needs a Node with zstd in node:zlib (22.15 or later)')
  const codec = createCodec('zstd')
  const block = compressed({ codec, memory: new Uint8Array(9000) }, likeMemory(4096, 8))
  expect([...block.subarray(0, 4)]).toEqual([0x28, 0xb5, 0x2f, 0xfd])
  const twice = Uint8Array.from([...block, ...block])
  expect(decompressed(codec, twice, 4096)).toBeUndefined()
  expect(decompressed(codec, twice, 8192)).toBeUndefined()
})
